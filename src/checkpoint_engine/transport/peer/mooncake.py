"""Reads by Mooncake's transfer engine: RDMA, EFA, or its own TCP. Optional; needs package and libraries (see `_engine_class`).

Once an operation has failed, Mooncake cannot say whether it will still write (measured: it may), so its destination stays in
quarantine for as long as the process lives.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from typing import Any

import msgspec
import torch

from checkpoint_engine.errors import SettingsError, TransferError
from checkpoint_engine.transport.peer.base import Destination, PeerOptions
from checkpoint_engine.transport.peer.connecting import Lease
from checkpoint_engine.transport.peer.lanes import LaneTransport
from checkpoint_engine.transport.peer.onesided import Mover, OneSidedLane, read_tickets
from checkpoint_engine.transport.peer.reading import LanePeer, Piece
from checkpoint_engine.transport.peer.served import Served

log = logging.getLogger(__name__)

SLICE = 3584 << 20
"""Bytes that are registered in one call: adapters limit the size of a memory region, many to just under 4 GiB."""
DONE, BUSY = 1, 0
FORCE = ("MC_FORCE_TCP", "MC_FORCE_HCA")


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """session: where the source's engine is. address: of the region's first byte in the source."""

    session: str
    address: int


def _engine_class() -> Any:
    """Raises SettingsError that says what to install."""
    try:
        return importlib.import_module("mooncake.engine").TransferEngine
    except ImportError as e:
        raise SettingsError(
            f"the peer transport mooncake cannot be used: {e}. Install one of the packages mooncake-transfer-engine (CUDA) or "
            "mooncake-transfer-engine-non-cuda, never both, and the system's libibverbs1 and ibverbs-providers"
        ) from e


class MooncakeTransport(LaneTransport):
    """One engine. The port it listens on is open on all interfaces and asks nobody for a token (Mooncake's way): for trusted
    networks only."""

    kind = "mooncake"

    def __init__(self, options: PeerOptions) -> None:
        """Raises SettingsError when it is not installed, TransferError when the engine does not start."""
        super().__init__(options, lanes=1)
        engine_class = _engine_class()
        self._lock = threading.Lock()
        self._destinations: set[Destination] = set()  # what is registered must not be freed
        rdma = bool(options.rdma_devices)
        # The protocol argument alone is not obeyed: without a device Mooncake falls back to TCP silently.
        if not any(os.environ.get(name) for name in FORCE):
            os.environ[FORCE[rdma]] = "1"
        self._engine = engine_class()
        protocol = "rdma" if rdma else "tcp"
        code = self._engine.initialize(options.host, "P2PHANDSHAKE", protocol, ",".join(options.rdma_devices))
        if code != 0:
            raise TransferError("this host", "start", f"Mooncake's engine did not start with {protocol} (error {code})")
        self._session = f"{options.host}:{self._engine.get_rpc_port()}"

    def export(self, region: Served) -> bytes:
        self._register(region.address, region.offer.nbytes)
        return msgspec.msgpack.encode(Ticket(self._session, region.address))

    def unexport(self, region: Served) -> None:
        self._unregister(region.address, region.offer.nbytes)

    def register(self, memory: torch.Tensor) -> Destination:
        destination = Destination(memory)
        self._register(destination.address, destination.nbytes)
        self._destinations.add(destination)
        return destination

    def unregister(self, destination: Destination) -> None:
        super().unregister(destination)
        self._unregister(destination.address, destination.nbytes)
        self._destinations.discard(destination)

    def _register(self, address: int, nbytes: int) -> None:
        starts = range(address, address + nbytes, SLICE)
        sizes = [min(SLICE, address + nbytes - start) for start in starts]
        with self._lock:
            code = self._engine.batch_register_memory(list(starts), sizes)
        if code != 0:
            advice = "; GPU memory needs nvidia-peermem or dma-buf" if self._options.rdma_devices else ""
            raise TransferError("this host", "register", f"Mooncake did not register {nbytes} bytes (error {code}){advice}")

    def _unregister(self, address: int, nbytes: int) -> None:
        with self._lock:
            code = self._engine.batch_unregister_memory(list(range(address, address + nbytes, SLICE)))
        if code != 0:
            log.warning("Mooncake did not unregister %d bytes (error %d)", nbytes, code)

    def _lane(self, peer: LanePeer, lease: Lease) -> OneSidedLane[int]:
        return OneSidedLane(peer, lease, MooncakeMover(peer.name, self._engine, self._options.connections))

    def close(self) -> None:
        self._engine = None  # its destructor ends it, once no lane has it any more


class MooncakeMover(Mover[int]):
    def __init__(self, peer: str, engine: Any, ahead: int) -> None:
        self._peer, self._engine, self.ahead = peer, engine, ahead
        self._tickets: dict[int, Ticket] = {}
        self._failed: set[int] = set()

    def open(self, tickets: dict[int, bytes]) -> None:
        self._tickets = dict(read_tickets(self._peer, tickets, Ticket))

    def start(self, piece: Piece) -> int:
        op, ticket = piece.op, self._tickets[piece.op.region]
        target = piece.read.destination.address + op.target
        # One operation in each batch: the status call looks at the first one only.
        batch: int = self._engine.batch_transfer_async_read(ticket.session, [target], [ticket.address + op.offset], [op.nbytes])
        if batch == 0:
            raise TransferError(self._peer, "fetch", f"Mooncake could not begin to read from {ticket.session}", op.region)
        return batch

    def done(self, started: int) -> bool:
        status = self._engine.transfer_check_status(started)
        if status not in (DONE, BUSY):
            self._failed.add(started)
            reason = f"Mooncake's read failed (status {status}): the source, or its memory, is gone"
            raise TransferError(self._peer, "fetch", reason)
        return bool(status == DONE)

    def over(self, started: int) -> bool | None:
        if started in self._failed:  # its status may not be asked for again, and would tell nothing
            return None
        status = self._engine.transfer_check_status(started)
        return None if status not in (DONE, BUSY) else bool(status == DONE)
