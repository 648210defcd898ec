"""The interface that a device implements, and the table of devices.

The pipeline is written once against these classes: on CUDA a stream is a CUDA stream, on a CPU a thread with a queue;
in both, work queued on one stream runs in order, and an event tells when all work queued before it is done.
"""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import msgspec
import torch

from checkpoint_engine.errors import SettingsError
from checkpoint_engine.memory.digest import RegionSums


class SharedHandle(msgspec.Struct, frozen=True):
    """How another process gets at memory. kind "memfd": a ring, whose descriptor travels beside the message; "region": host
    memory that is only read, likewise; "cuda_ipc": a ring, and `token` its CUDA IPC handle. offset: where it starts in what
    is mapped."""

    kind: str
    nbytes: int
    token: bytes = b""
    offset: int = 0


class Closing(ABC):
    """Owns something until `close`, which may be called twice."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Ring(Closing):
    """Device memory of this process that a worker process maps. `tensor` is uint8, one-dimensional, `nbytes` long."""

    tensor: torch.Tensor
    nbytes: int

    @abstractmethod
    def share(self) -> tuple[SharedHandle, tuple[int, ...]]:
        """A handle for the worker and the descriptors (still owned by the ring) that must travel with it."""


class Mapping(Closing):
    """The worker's view of a ring. `tensor` as in Ring; closing unmaps it once no tensor refers to it any more."""

    tensor: torch.Tensor


class Event(ABC):
    """Done when all work queued on its stream before it was recorded is done."""

    @abstractmethod
    def done(self) -> bool:
        """Never blocks. Raises what the work raised, if it failed."""

    @abstractmethod
    def wait(self, seconds: float) -> bool:
        """Block until done or `seconds` are over; True if done. Raises what the work raised, if it failed."""


Clock = Callable[[Event], float]
"""When an event that is done was, in seconds of this process's `time.perf_counter`."""


class Stream(Closing):
    """Work in order. Nothing here blocks the caller but `close`."""

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy of bytes; both uint8, one-dimensional and of one length. `source` may be registered host memory."""

    @abstractmethod
    def call(self, work: Callable[[], None]) -> None:
        """Queue work that itself queues on the current stream (a collective). On a CPU it runs in the stream's thread and
        may block there; on CUDA it runs at once, with this stream current."""

    @abstractmethod
    def record(self) -> Event: ...

    @abstractmethod
    def after(self, event: Event) -> None:
        """Work queued from now on starts only after `event`, which may belong to another stream of this process."""

    @abstractmethod
    def busy(self, since: Event, until: Event) -> float:
        """Seconds between two events of this stream that are done."""

    @abstractmethod
    def clock(self) -> Clock:
        """For events of all streams of this process on the device. To be made while nothing is queued on this stream; it waits
        for that. Raises DeadlineError."""


class Device(ABC):
    """One accelerator, as seen by one process."""

    kind: str  # "cuda" or "cpu"
    name: str  # of this one, for messages
    backend: str  # torch.distributed's name of the collective library
    staging_slots: int  # how many staging slots a lift wants; 0: lift straight into the ring
    keeps_rings: bool  # whether a ring is worth keeping between updates: where its first touch is slow

    @property
    @abstractmethod
    def uuid(self) -> str:
        """By which a worker finds its server: `GPU-...`, or `CPU-{host}-{local rank}`."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory that could be allocated now."""

    @abstractmethod
    def bind_thread(self) -> None:
        """Make this the current device of the calling thread. Every thread that touches the device calls it first."""

    def stay_near(self) -> None:  # noqa: B027  (a device without a place of its own has none to stay near)
        """Keep the calling thread, which is one of ours, on the CPUs nearest to the device."""

    def place(self, tensor: torch.Tensor) -> None:  # noqa: B027
        """Have host memory that nobody touched yet (uint8, one-dimensional, page-aligned) come from nearest to the device."""

    @abstractmethod
    def allocate_ring(self, nbytes: int) -> Ring:
        """Raises ManifestError when there is not enough memory."""

    @abstractmethod
    def open_ring(self, handle: SharedHandle, descriptors: tuple[int, ...]) -> Mapping:
        """Map a ring of another process, or a region; takes ownership of `descriptors`. A region's tensor may be in host memory
        that the device reads. Raises ProtocolError naming what to share when it cannot be mapped."""

    def map_ahead(self, regions: Sequence[SharedHandle], descriptors: Sequence[int]) -> None:
        """Begin to make these regions ready to be opened in a later session, without waiting for it, and give up those of earlier
        calls. Takes ownership of `descriptors`."""
        for descriptor in descriptors:  # a device that has nothing to prepare
            os.close(descriptor)

    @property
    def reads_regions(self) -> bool:
        """Whether regions can be opened, as far as is known."""
        return True

    @property
    def regions_ready(self) -> bool:
        """Whether those of `map_ahead` can be opened without waiting."""
        return True

    @abstractmethod
    def open_peer(self, handle: SharedHandle, descriptors: tuple[int, ...]) -> Mapping:
        """Map another server's ring, perhaps on another device of this host, to copy into; takes ownership of `descriptors`.
        Raises ProtocolError or DeviceError when it cannot be mapped."""

    @abstractmethod
    def allocate(self, nbytes: int) -> Ring:
        """Staging memory: as a ring, but never shared."""

    @abstractmethod
    def stream(self, name: str) -> Stream: ...

    @abstractmethod
    def mark(self) -> Event:
        """An event behind all work that the calling thread queued on its current stream."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block until all work that this process queued on the device is done."""

    def region_sums(self) -> RegionSums | None:
        """What sums up registered memory faster than the CPU does; None: nothing."""
        return None

    @abstractmethod
    def register_host(self, tensor: torch.Tensor) -> Closing:
        """Make host memory (uint8, one-dimensional) fast to copy from. One call per region: no copy may span two
        registrations. Raises ManifestError when it cannot be registered."""


_DEVICES = {
    "cpu": "checkpoint_engine.devices.cpu:CpuDevice",
    "cuda": "checkpoint_engine.devices.cuda:CudaDevice",
}


def get_device(name: str | None = None, index: int = 0) -> Device:
    """The device called `name` ("cpu", "cuda"; None: cuda where there is one), number `index` among those visible.

    Raises SettingsError for an unknown name.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in _DEVICES:
        raise SettingsError(f"no device called {name!r}; there are {', '.join(_DEVICES)}")
    module, _, cls = _DEVICES[name].partition(":")
    device: Device = getattr(importlib.import_module(module), cls)(index)
    return device
