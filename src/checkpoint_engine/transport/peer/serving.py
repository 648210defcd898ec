"""One reader's connection, as the source serves it: greeting, leases, bytes."""

from __future__ import annotations

import contextlib
import hmac
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from checkpoint_engine.errors import CheckpointEngineError, DeadlineError, PeerLostError, RegionGoneError, TransferError
from checkpoint_engine.transport.peer.base import Deadline
from checkpoint_engine.transport.peer.served import RegionTable, Served
from checkpoint_engine.transport.peer.wire import (
    FROM_READER,
    Bytes,
    Confirm,
    Confirmed,
    Fetch,
    FromReader,
    Hello,
    Open,
    Opened,
    Refused,
    Welcome,
    Wire,
)

log = logging.getLogger(__name__)

NAME = 100
"""Characters of a reader's name that get into messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """greeting: seconds for a connection to show its token. idle: seconds without a request after which a connection, and
    with it its leases, ends. stalled: seconds after which a reader that takes nothing is given up. connections: at once."""

    greeting: float = 10.0
    idle: float = 120.0
    stalled: float = 60.0
    connections: int = 1024


class Serving:
    """A thread that answers one reader until the connection ends; its leases end with it.

    Ending a lease early harms no read: a reader counts as read only what the source confirms after its last byte.
    """

    def __init__(
        self,
        sock: socket.socket,
        address: str,
        table: RegionTable,
        token: str,
        limits: ServerLimits,
        on_end: Callable[[Serving], None],
    ) -> None:
        self._socket, self._reader = sock, f"a reader at {address}"
        self._table, self._token, self._limits, self._on_end = table, token, limits, on_end
        self._leases: dict[int, Served] = {}
        self.thread = threading.Thread(target=self._run, name="peer-serving", daemon=True)

    def interrupt(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            self._converse()
        except PeerLostError as e:
            log.debug("%s", e)  # this is how readers leave
        except (CheckpointEngineError, OSError) as e:
            log.warning("ended the connection of %s: %s", self._reader, e)
        finally:
            self._socket.close()
            for served in self._leases.values():
                self._table.release(served, self._reader)
            self._on_end(self)

    def _converse(self) -> None:
        greeting = Deadline.after(self._limits.greeting)
        wire: Wire[FromReader] = Wire(self._socket, self._reader, FromReader, FROM_READER, greeting)  # type: ignore[arg-type]
        hello = wire.receive(greeting, "greeting")
        if not isinstance(hello, Hello) or not hmac.compare_digest(hello.token.encode(), self._token.encode()):
            self._refuse(wire, TransferError(self._reader, "connect", "its token is not this server's"))
        else:
            name = "".join(c for c in hello.reader[:NAME] if c.isprintable())
            self._reader = wire.peer = f"{name} at {self._socket.getpeername()[0]}"
            wire.send(Welcome(), greeting, "greeting")
        while True:
            request = wire.receive(Deadline.after(self._limits.idle), "its next request")
            try:
                self._answer(wire, request)
            except (DeadlineError, PeerLostError):
                raise
            except CheckpointEngineError as e:
                self._refuse(wire, e)

    def _answer(self, wire: Wire[FromReader], request: FromReader) -> None:
        if isinstance(request, Fetch):
            self._send(wire, request)
            return
        deadline = Deadline.after(self._limits.stalled)
        if isinstance(request, Open):
            wire.send(Opened(request.region, self._open(request)), deadline, "open")
        elif isinstance(request, Confirm):
            wire.send(Confirmed(), deadline, "confirm")
        else:
            raise TransferError(self._reader, "connect", "it said Hello twice")

    def _open(self, request: Open) -> bytes:
        served = self._leases.get(request.region)
        if served is None or served.offer.generation != request.generation:
            served = self._table.lease(request.region, request.generation, self._reader)
            self._leases[request.region] = served
        if request.kind not in ("tcp", *served.tickets):
            raise TransferError("this server", "open", f"it does not offer {request.kind}", request.region)
        return served.tickets.get(request.kind, b"")

    def _send(self, wire: Wire[FromReader], request: Fetch) -> None:
        served = self._leases.get(request.region)
        if served is None:
            raise RegionGoneError("this server", "fetch", "it was not opened", request.region)
        size = served.offer.nbytes
        if request.offset < 0 or request.nbytes < 0 or request.offset + request.nbytes > size:
            asked = f"bytes [{request.offset}, {request.offset + request.nbytes})"
            raise TransferError("this server", "fetch", f"{asked} are not in its {size} bytes", request.region)
        wire.send(Bytes(request.nbytes), Deadline.after(self._limits.stalled), "fetch")
        view = served.view[request.offset : request.offset + request.nbytes]
        wire.send_bytes(view, self._limits.stalled, "fetch")

    def _refuse(self, wire: Wire[FromReader], error: CheckpointEngineError) -> None:
        """Tell the reader, and raise the error."""
        stage, region = getattr(error, "stage", "request"), getattr(error, "region", None)
        reason = getattr(error, "reason", str(error))
        refused = Refused(stage, -1 if region is None else region, reason, isinstance(error, RegionGoneError))
        wire.send(refused, Deadline.after(self._limits.greeting), stage)
        raise error
