"""The CPU as a device: rings are sealed memfds, a stream is a thread with a queue, an event a future of it."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import queue
import socket
import threading
import time
from collections.abc import Callable

import torch

from checkpoint_engine.devices.base import Clock, Closing, Device, Event, Mapping, Ring, SharedHandle, Stream
from checkpoint_engine.errors import ManifestError, ProtocolError
from checkpoint_engine.memory.region import HostRegion

_MADV_POPULATE_READ = 22


class CpuRing(Ring):
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._region = HostRegion(nbytes)
        self.tensor = self._region.tensor

    def share(self) -> tuple[SharedHandle, tuple[int, ...]]:
        return SharedHandle("memfd", self.nbytes), (self._region.fd,)

    def close(self) -> None:
        del self.tensor
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self._region.close()


class CpuMapping(Mapping):
    """private: what a loader writes into the tensors stays its own (copy on write)."""

    def __init__(self, descriptor: int, nbytes: int, *, private: bool) -> None:
        flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
        try:
            # Without the seal the other side could shrink the file and kill this process with SIGBUS.
            if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise ProtocolError("the server's memory is not sealed against shrinking")
            if os.fstat(descriptor).st_size < nbytes:
                raise ProtocolError(f"the server's memory holds {os.fstat(descriptor).st_size} bytes, not {nbytes}")
            memory = mmap.mmap(descriptor, nbytes, flags=flags)
        except OSError as e:
            raise ProtocolError(f"the server's memory cannot be mapped: {e}") from e
        finally:
            os.close(descriptor)
        if private:
            with contextlib.suppress(OSError):  # Linux 5.14; page by page it takes longer than copying the bytes
                memory.madvise(_MADV_POPULATE_READ)
        # The tensor keeps the mapping alive: a view that a loader held on to stays readable.
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)

    def close(self) -> None:
        self.tensor = torch.empty(0, dtype=torch.uint8)


class CpuEvent(Event):
    def __init__(self) -> None:
        self._done = threading.Event()
        self.time = 0.0
        self.error: BaseException | None = None

    def set(self, error: BaseException | None) -> None:
        self.time, self.error = time.perf_counter(), error
        self._done.set()

    def done(self) -> bool:
        return self.wait(0)

    def wait(self, seconds: float) -> bool:
        finished = self._done.wait(seconds)
        if finished and self.error is not None:
            raise self.error
        return finished


class CpuStream(Stream):
    """After an error nothing queued later runs, and every later event raises it."""

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | CpuEvent | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        error: BaseException | None = None
        while (work := self._queue.get()) is not None:
            if isinstance(work, CpuEvent):
                work.set(error)
            elif error is None:
                try:
                    work()
                except BaseException as e:  # kept for the events: this thread has nobody to raise to
                    error = e

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        # memmove drops the GIL and, unlike copy_, starts no further threads beside the engine's.
        self._queue.put(lambda: (ctypes.memmove(target.data_ptr(), source.data_ptr(), source.numel()), None)[1])

    def call(self, work: Callable[[], None]) -> None:
        self._queue.put(work)

    def record(self) -> Event:
        event = CpuEvent()
        self._queue.put(event)
        return event

    def after(self, event: Event) -> None:
        def wait() -> None:
            while not event.wait(60):  # the other stream's own deadlines end this
                pass

        self._queue.put(wait)

    def busy(self, since: Event, until: Event) -> float:
        return until.time - since.time  # type: ignore[attr-defined, no-any-return]

    def clock(self) -> Clock:
        return lambda event: event.time  # type: ignore[attr-defined]

    def finish(self, seconds: float) -> bool:
        """End when all that is queued is done; whether that was within `seconds`."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(max(0.0, seconds))
        return not self._thread.is_alive()

    def close(self) -> None:
        self.finish(5)


class _NotRegistered(Closing):
    def close(self) -> None:
        pass


class CpuDevice(Device):
    kind = name = "cpu"
    backend = "gloo"
    staging_slots = 0
    keeps_rings = True  # new pages cost more than the bytes that go through them

    def __init__(self, index: int = 0) -> None:
        self.index = index

    @property
    def uuid(self) -> str:
        return f"CPU-{socket.gethostname()}-{self.index}"

    def free_bytes(self) -> int:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def bind_thread(self) -> None:
        pass

    def allocate_ring(self, nbytes: int) -> Ring:
        try:
            return CpuRing(nbytes)
        except (OSError, MemoryError) as e:
            raise ManifestError(f"a ring of {nbytes} bytes cannot be allocated: {e}") from e

    def open_ring(self, handle: SharedHandle, descriptors: tuple[int, ...]) -> Mapping:
        if handle.kind not in ("memfd", "region") or len(descriptors) != 1:
            for descriptor in descriptors:
                os.close(descriptor)
            raise ProtocolError(f"a worker on a CPU cannot map memory of kind {handle.kind!r}")
        return CpuMapping(descriptors[0], handle.nbytes, private=handle.kind == "region")

    allocate, open_peer = allocate_ring, open_ring

    def stream(self, name: str) -> Stream:
        return CpuStream(name)

    def mark(self) -> Event:
        event = CpuEvent()
        event.set(None)  # on a CPU nothing is queued: what returned is done
        return event

    def synchronize(self) -> None:
        pass

    def register_host(self, tensor: torch.Tensor) -> Closing:
        return _NotRegistered()
