"""The interface of peer-to-peer reads, and the table of its implementations.

A source offers regions of its host memory (`server.PeerServer`); a reader connects with a `PeerTransport` and reads from them
into memory of its own. The source's threads answer by themselves: its owner, its engine and its accelerator do nothing.

While a reader has a region open it holds a lease on it, and the source does not give the region up. A read is done when every
byte has arrived AND the source has said after that that the lease held all along: what arrived is then what was offered.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import importlib
import threading
import time
import weakref
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import msgspec
import torch

from checkpoint_engine.devices.base import Closing
from checkpoint_engine.errors import QuarantineError, SettingsError, TransferError

if TYPE_CHECKING:
    from checkpoint_engine.transport.peer.reading import Read
    from checkpoint_engine.transport.peer.served import Served

MIB = 1 << 20


class RegionOffer(msgspec.Struct, frozen=True, array_like=True):
    """A region that can be read. generation: unlike that of any region before or after it, of any process."""

    region: int
    generation: int
    nbytes: int


class PeerOffer(msgspec.Struct, frozen=True):
    """What a reader must know of a source. Whoever has it can read the regions: the token is the key to them.

    name         for messages: "rank 3 (host-a)"
    addresses    (host, port), one for each network interface it listens on
    whereabouts  equal to the reader's own (`descriptors.whereabouts`) where it can open the source's descriptors
    transports   implementations that it offers, "tcp" always among them
    """

    name: str
    addresses: tuple[tuple[str, int], ...]
    token: str
    whereabouts: str
    transports: tuple[str, ...]
    regions: tuple[RegionOffer, ...]

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Raises msgspec.ValidationError or DecodeError when `data` is not an offer."""
        try:
            return msgspec.json.decode(data, type=cls)
        except RecursionError as e:
            raise msgspec.DecodeError("it is nested too deeply") from e


class ReadOp(NamedTuple):
    """Bytes [offset, offset + nbytes) of the source's region number `region` go to the destination's from `target` on."""

    region: int
    offset: int
    nbytes: int
    target: int


class Outcome(enum.Enum):
    """What is known of a read's destination after `cancel`."""

    QUIESCED = "nothing of the read can be written any more"
    UNKNOWN = "it may still be written to: the destination is in quarantine"


class Deadline(NamedTuple):
    """`seconds` that end at time.monotonic() == `at`."""

    seconds: float
    at: float

    @classmethod
    def after(cls, seconds: float) -> Self:
        return cls(seconds, time.monotonic() + seconds)

    @property
    def left(self) -> float:
        return max(0.0, self.at - time.monotonic())


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerOptions:
    """connections: with one source at a time (tcp, shm: threads as well). piece_bytes: what is asked for at once, at most.
    host: this host's address, by which others reach engines that bind one (mooncake). rdma_devices: see `rdma_devices`;
    empty: no RDMA."""

    connections: int = 2
    piece_bytes: int = 8 * MIB
    host: str = "127.0.0.1"
    rdma_devices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.connections < 1 or self.piece_bytes < 1:
            raise SettingsError("connections and piece_bytes must be at least 1")


class Destination:
    """Memory of this process that reads may land in, from `PeerTransport.register` to `unregister`.

    It is in quarantine while a read into it that failed, or was given up, is not known to be over. Its tensor is then kept
    alive, whatever the caller does with its own references.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        """tensor: contiguous. Raises ValueError."""
        if not tensor.is_contiguous():
            raise ValueError("the memory to read into must be contiguous")
        self.tensor, self.address, self.nbytes = tensor, tensor.data_ptr(), tensor.nbytes
        self._lock = threading.Lock()
        self._reads: weakref.WeakSet[Read] = weakref.WeakSet()  # a read that may still write is kept alive elsewhere

    def add(self, read: Read) -> None:
        with self._lock:
            self._reads.add(read)

    def _known(self) -> list[Read]:
        with self._lock:
            return list(self._reads)

    @functools.cached_property
    def view(self) -> memoryview:
        """Its bytes, writable. Host memory only."""
        return memoryview((ctypes.c_char * self.nbytes).from_address(self.address)).cast("B")

    @property
    def quarantined(self) -> bool:
        return any(read.failed and not read.settled for read in self._known())

    def check_idle(self, stage: str, *, unfinished: bool) -> None:
        """Raises QuarantineError when it is in quarantine; if `unfinished`, also TransferError when a read goes on."""
        for read in self._known():
            if read.settled:
                continue
            if read.failed:
                raise QuarantineError(read.peer, stage, "a read that was given up may still write to this memory")
            if unfinished:
                raise TransferError(read.peer, stage, "a read into this memory goes on")


class Peer(Closing):
    """A connection to one source. Closing it ends its reads and the leases; threads may share it.

    When anything fails, all of it does: reads that were under way raise the first error, and a retry connects anew.
    """

    name: str

    @abstractmethod
    def submit_read(self, destination: Destination, ops: Sequence[ReadOp], *, seconds: float) -> Read:
        """Begin to read; the bytes may come in any order. The handle's `wait` ends `seconds` from now at the latest.

        Raises ValueError for ops that leave region or destination, QuarantineError when the destination is in quarantine,
        TransferError when the connection has failed before.
        """


class PeerTransport(Closing):
    """One way of reading. Not bound to a source; made once and kept, for engines may take seconds to start."""

    kind: ClassVar[str]

    @abstractmethod
    def export(self, region: Served) -> bytes:
        """Source: make a region readable; what a reader's side of this implementation must know of it."""

    @abstractmethod
    def unexport(self, region: Served) -> None:
        """Source: undo export. No lease is on the region any more."""

    @abstractmethod
    def connect(self, offer: PeerOffer, *, seconds: float, regions: Sequence[RegionOffer] | None = None, nic: int = 0) -> Peer:
        """Reader: connect to a source and open `regions` (default: all offered). nic: which of its addresses.

        Raises DeadlineError, PeerLostError, ProtocolError, RegionGoneError when a region is not served any more, TransferError
        when the source refuses.
        """

    def register(self, memory: torch.Tensor) -> Destination:
        """Reader: prepare memory to be read into. Raises ValueError when this implementation cannot write to it."""
        if memory.device.type != "cpu":
            raise ValueError(f"{self.kind} reads into host memory, not into {memory.device}")
        return Destination(memory)

    def unregister(self, destination: Destination) -> None:
        """Reader: no further read; the memory may be used for anything. Raises QuarantineError when it is in quarantine,
        TransferError when a read into it goes on."""
        destination.check_idle("unregister", unfinished=True)


# Imported when asked for, never before: the optional ones need packages that most installations do not have.
IMPLEMENTATIONS = {
    "tcp": "checkpoint_engine.transport.peer.tcp:TcpTransport",
    "shm": "checkpoint_engine.transport.peer.shm:ShmTransport",
    "mooncake": "checkpoint_engine.transport.peer.mooncake:MooncakeTransport",
    "nixl": "checkpoint_engine.transport.peer.nixl:NixlTransport",
}


def open_transport(kind: str, options: PeerOptions | None = None) -> PeerTransport:
    """An implementation by its name, a key of IMPLEMENTATIONS.

    Raises SettingsError when there is none of that name, or when what it needs is not installed; it says what to install.
    """
    if kind not in IMPLEMENTATIONS:
        raise SettingsError(f"there is no peer transport {kind!r}; there are {', '.join(IMPLEMENTATIONS)}")
    module, _, name = IMPLEMENTATIONS[kind].partition(":")
    made: PeerTransport = getattr(importlib.import_module(module), name)(options or PeerOptions())
    return made


def choose(offer: PeerOffer, here: str, available: Sequence[str]) -> str:
    """What "auto" means for a source: shm where its descriptors can be opened, else RDMA where both sides have it, else tcp.

    here: the reader's own whereabouts. available: the reader's implementations that have RDMA devices, best first.
    """
    if here == offer.whereabouts and "shm" in offer.transports:
        return "shm"
    return next((kind for kind in available if kind in offer.transports), "tcp")
