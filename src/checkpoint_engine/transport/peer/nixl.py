"""Reads by NIXL's agent with its UCX back end: RDMA, or TCP, or same-host copies. Optional; needs its packages (see `_api`).

As with Mooncake, the destination of an operation that failed stays in quarantine for as long as the process lives; one that is
only late leaves it when NIXL says that it is done.
"""

from __future__ import annotations

import importlib
import secrets
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

_unreleased: list[Any] = []
"""Handles of operations that failed: releasing one whose state is unknown could free what it still uses."""


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """metadata: of the source's agent, when this region was registered with it. address: of the region's first byte there."""

    metadata: bytes
    address: int


def _api() -> Any:
    """Raises SettingsError that says what to install."""
    try:
        return importlib.import_module("nixl._api")
    except ImportError as e:
        raise SettingsError(
            f"the peer transport nixl cannot be used: {e}. Install the packages nixl and nixl-cu12 (or nixl-cu13) of one version"
        ) from e


class NixlTransport(LaneTransport):
    """One agent with the UCX back end, which chooses its own devices (UCX_TLS, UCX_NET_DEVICES)."""

    kind = "nixl"

    def __init__(self, options: PeerOptions) -> None:
        """Raises SettingsError when it is not installed, TransferError when the agent does not start."""
        super().__init__(options, lanes=1)
        api = _api()
        try:
            self._agent = api.nixl_agent(f"checkpoint-engine-{secrets.token_hex(8)}", api.nixl_agent_config(backends=["UCX"]))
        except Exception as e:  # of a type of its own, of a module that may not be there
            raise TransferError("this host", "start", f"NIXL's agent did not start: {type(e).__name__}: {e}") from e
        self._lock = threading.Lock()
        self._registered: dict[int, Any] = {}  # by address
        self._destinations: set[Destination] = set()  # what is registered must not be freed

    def export(self, region: Served) -> bytes:
        self._register(region.address, region.offer.nbytes, "DRAM", 0)
        with self._lock:
            return msgspec.msgpack.encode(Ticket(self._agent.get_agent_metadata(), region.address))

    def unexport(self, region: Served) -> None:
        self._unregister(region.address)

    def register(self, memory: torch.Tensor) -> Destination:
        destination = Destination(memory)
        self._register(destination.address, destination.nbytes, *_place(memory))
        self._destinations.add(destination)
        return destination

    def unregister(self, destination: Destination) -> None:
        super().unregister(destination)
        self._unregister(destination.address)
        self._destinations.discard(destination)

    def _register(self, address: int, nbytes: int, kind: str, device: int) -> None:
        try:
            with self._lock:
                self._registered[address] = self._agent.register_memory([(address, nbytes, device, "")], kind)
        except Exception as e:
            raise TransferError("this host", "register", f"NIXL did not register {nbytes} bytes: {e}") from e

    def _unregister(self, address: int) -> None:
        try:
            with self._lock:
                self._agent.deregister_memory(self._registered.pop(address))
        except Exception as e:
            raise TransferError("this host", "unregister", f"NIXL did not: {type(e).__name__}: {e}") from e

    def _lane(self, peer: LanePeer, lease: Lease) -> OneSidedLane[Any]:
        return OneSidedLane(peer, lease, NixlMover(peer.name, self._agent, self._lock, self._options.connections))

    def close(self) -> None:
        self._agent = None  # its destructor ends it, once no lane has it any more


class NixlMover(Mover[Any]):
    def __init__(self, peer: str, agent: Any, lock: threading.Lock, ahead: int) -> None:
        """lock: of those who change what the agent knows."""
        self._peer, self._agent, self._lock, self.ahead = peer, agent, lock, ahead
        self._sources: dict[int, tuple[str, int]] = {}
        self._failed: set[int] = set()

    def open(self, tickets: dict[int, bytes]) -> None:
        for region, ticket in read_tickets(self._peer, tickets, Ticket):
            try:
                with self._lock:
                    name = self._agent.add_remote_agent(ticket.metadata)
            except Exception as e:
                raise TransferError(self._peer, "open", f"NIXL does not take its metadata: {e}", region) from e
            self._sources[region] = (name.decode() if isinstance(name, bytes) else name, ticket.address)

    def start(self, piece: Piece) -> Any:
        op, destination = piece.op, piece.read.destination
        agent, address = self._sources[op.region]
        kind, device = _place(destination.tensor)
        try:
            local = self._agent.get_xfer_descs([(destination.address + op.target, op.nbytes, device)], kind)
            remote = self._agent.get_xfer_descs([(address + op.offset, op.nbytes, 0)], "DRAM")
            handle = self._agent.initialize_xfer("READ", local, remote, agent, b"")
        except Exception as e:
            raise TransferError(self._peer, "fetch", f"NIXL could not begin: {type(e).__name__}: {e}", op.region) from e
        # From here on it is an operation, whatever comes of it: `done` tells.
        try:
            if self._agent.transfer(handle) == "ERR":
                self._fail(handle)
        except Exception:
            self._fail(handle)
        return handle

    def _fail(self, handle: Any) -> None:
        _unreleased.append(handle)
        self._failed.add(id(handle))

    def _state(self, handle: Any) -> str:
        if id(handle) in self._failed:
            return "ERR"
        try:
            state = str(self._agent.check_xfer_state(handle))
        except Exception as e:
            state = f"{type(e).__name__}: {e}"
        if state == "DONE":
            self._agent.release_xfer_handle(handle)
        elif state != "PROC":
            self._fail(handle)
        return state

    def done(self, started: Any) -> bool:
        state = self._state(started)
        if state not in ("DONE", "PROC"):
            raise TransferError(self._peer, "fetch", f"NIXL's read failed ({state}): the source, or its memory, is gone")
        return state == "DONE"

    def over(self, started: Any) -> bool | None:
        state = self._state(started)
        return None if state not in ("DONE", "PROC") else state == "DONE"


def _place(memory: torch.Tensor) -> tuple[str, int]:
    """NIXL's kind of memory, and the number of its device."""
    return ("VRAM", memory.device.index or 0) if memory.device.type == "cuda" else ("DRAM", 0)
