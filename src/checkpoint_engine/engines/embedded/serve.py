"""Running the application: sockets that are bound before anybody is told about them, and an end on SIGTERM or SIGINT."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from checkpoint_engine.errors import SettingsError

_BACKLOG = 512
_SHUTDOWN_SECONDS = 5


def bind(host: str, port: int, uds: Path | None) -> tuple[socket.socket, str]:
    """A listening socket and the URL (`http://host:port`, port 0 resolved) or `unix:PATH` under which it is reached.

    A socket file that nobody listens on is replaced. Raises SettingsError when the address cannot be had.
    """
    try:
        if uds is not None:
            return _bind_unix(uds), f"unix:{uds}"
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=_BACKLOG)
        # Inherited by connections. asyncio leaves it out for sockets that it did not make, and answers then take 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as e:
        raise SettingsError(f"cannot listen on {uds or f'{host}:{port}'}: {e}") from None
    shown = f"[{host}]" if ":" in host else host
    return listener, f"http://{shown}:{listener.getsockname()[1]}"


def _bind_unix(path: Path) -> socket.socket:
    _remove_dead(path)
    with ExitStack() as undo:
        listener = undo.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        os.chmod(path, 0o600)
        listener.listen(_BACKLOG)
        undo.pop_all()
    return listener


def _remove_dead(path: Path) -> None:
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe, suppress(ConnectionRefusedError, FileNotFoundError):
        probe.settimeout(1.0)
        probe.connect(str(path))
        raise OSError("another process listens there")
    path.unlink(missing_ok=True)


def serve(app: FastAPI, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, then give running requests 5 s. `ready` is called once connections are accepted."""

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready()

    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_SHUTDOWN_SECONDS)
    with listener:
        Server(config).run(sockets=[listener])
