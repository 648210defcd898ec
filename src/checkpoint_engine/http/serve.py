"""Running one rank's REST: where it listens, and an end in good order."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from checkpoint_engine.engines.embedded.serve import bind
from checkpoint_engine.errors import SettingsError
from checkpoint_engine.http.app import create_app
from checkpoint_engine.http.commands import EngineSpec
from checkpoint_engine.http.guard import is_loopback
from checkpoint_engine.http.node import Node
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.settings import Settings
from checkpoint_engine.transport.meeting import LEADER

STOP_SECONDS = 5
DEFAULT_PORT = 8600


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """host, port  where rank 0 listens; uds: every rank listens there instead, and `{rank}` in it is replaced
    token       see Guard; needed when `host` is not this host's own loopback
    ceilings    stage -> bytes per second; see http.ceilings
    engines     that are updated when a request names none
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    uds: str | None = None
    token: str | None = None
    ceilings: Mapping[str, float] = dataclasses.field(default_factory=dict)
    engines: Sequence[EngineSpec] = ()


def run(ps: ParameterServer, settings: Settings, options: Options, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT. ready: called with the URL, or `unix:PATH`, once requests are accepted there; not on a
    rank that only rank 0 may ask.

    Raises SettingsError when an address cannot be had, or would be open to everybody.
    """
    with contextlib.ExitStack() as stack:
        listeners, url = _public(stack, ps.rank, options)
        control, control_url = None, ""
        if ps.rank != LEADER:
            listener, control_url = bind(ps.watch.address, 0, None)
            listeners.append(stack.enter_context(listener))
            control = listener.getsockname()[:2]
        secret = secrets.token_hex(32) if ps.rank == LEADER else ""
        waits = {"join_seconds": settings.join_timeout}
        node = stack.enter_context(Node(ps, control_url=control_url, secret=secret, engines=options.engines, **waits))
        lease = settings.holder_lease
        app = create_app(node, token=options.token, control=control, ceilings=options.ceilings, holder_lease=lease)
        _serve(app, node, listeners, lambda: ready(url) if url else None)


def _public(stack: contextlib.ExitStack, rank: int, options: Options) -> tuple[list[socket.socket], str]:
    """The listener for everybody, and its URL; none on a rank that has none."""
    if options.uds is None and rank != LEADER:
        return [], ""
    if options.uds is None:
        if options.token is None and not is_loopback(options.host):
            raise SettingsError(f"{options.host} can be reached from elsewhere: a token is needed to listen there")
        listener, url = bind(options.host, options.port, None)
    else:
        path = Path(options.uds.replace("{rank}", str(rank)))
        try:
            listener, url = bind("", 0, path)
        except SettingsError as e:
            raise SettingsError(f"{e}; ranks of one host need {{rank}} in --uds") from None
        stack.callback(path.unlink, missing_ok=True)
    return [stack.enter_context(listener)], url


def _serve(app: FastAPI, node: Node, listeners: list[socket.socket], ready: Callable[[], None]) -> None:
    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            node.pulse.close()  # streams would be waited for
            await super().shutdown(sockets)

    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=STOP_SECONDS)
    Server(config).run(sockets=listeners)
