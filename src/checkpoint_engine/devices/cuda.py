"""CUDA: rings of our own allocation shared by CUDA IPC, streams of our own, host memory registered region by region.

Rings come from cudaMalloc and not from torch's allocator, whose settings (expandable segments, cudaMallocAsync, pools)
decide whether its memory can be shared at all. torch's own IPC tuples are private API; a handle here is 64 plain bytes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence

import torch

from checkpoint_engine.devices.base import Clock, Closing, Device, Event, Mapping, Ring, SharedHandle, Stream
from checkpoint_engine.devices.cudart import INVALID_VALUE, OUT_OF_MEMORY, CudaRuntime, runtime
from checkpoint_engine.devices.digests import has_kernel
from checkpoint_engine.devices.foreign import tensor_at
from checkpoint_engine.devices.host_regions import HostRegions
from checkpoint_engine.devices.numa import bind_to_node, gpu_node, place_on_node
from checkpoint_engine.devices.polling import poll
from checkpoint_engine.devices.region_sums import DeviceSums
from checkpoint_engine.errors import DeadlineError, DeviceError, ManifestError, ProtocolError

GRANULE = 2 << 20
"""Bytes. cudaMalloc packs smaller allocations into one block of this size, and an IPC handle shares the whole block."""

IDLE_SECONDS = 10.0
"""For an event that was queued on an idle stream to be over."""

_host_regions: dict[int, HostRegions] = {}  # of this process, by the device's index: they outlive sessions

_CANNOT_MAP = (INVALID_VALUE, 201, 205, 217, 304, 400, 800, 801, 999)  # what drivers answer to a handle they cannot open


class CudaRing(Ring):
    """`nbytes` of device memory. Closing frees it, waiting for the copies that are queued on it."""

    def __init__(self, device: CudaDevice, nbytes: int) -> None:
        self._device, self.nbytes = device, nbytes
        with torch.cuda.device(device.index):
            self._address = device.runtime.malloc(-(-nbytes // GRANULE) * GRANULE)
        self.tensor = tensor_at(self._address, nbytes, device.torch_device)

    def share(self) -> tuple[SharedHandle, tuple[int, ...]]:
        with torch.cuda.device(self._device.index):
            return SharedHandle("cuda_ipc", self.nbytes, self._device.runtime.ipc_handle(self._address)), ()

    def close(self) -> None:
        address, self._address = self._address, 0
        self.tensor = torch.empty(0, dtype=torch.uint8)
        if address:
            with torch.cuda.device(self._device.index):
                self._device.runtime.free(address)


class CudaMapping(Mapping):
    """The memory is unmapped when the last view of `tensor` is gone: an engine may hold on to one for a while.

    anywhere: it may be another device's memory, which `tensor` then hides: only to be copied to or from.
    """

    def __init__(self, device: CudaDevice, handle: SharedHandle, *, anywhere: bool = False) -> None:
        calls, index = device.runtime, device.index
        with torch.cuda.device(index):
            address = calls.ipc_open(handle.token)

        def unmap() -> None:
            # Failing here means the context is gone, and the mapping with it: nobody could do anything about it.
            with contextlib.suppress(Exception), torch.cuda.device(index):
                calls.ipc_close(address)

        if not anywhere and (owner := calls.pointer_device(address)) != index:
            unmap()
            raise ProtocolError(f"the server's ring was mapped on cuda:{owner}, but this worker computes on cuda:{index}")
        self.tensor = tensor_at(address + handle.offset, handle.nbytes, device.torch_device, unmap)

    def close(self) -> None:
        # The mapping must not go while a copy out of it runs.
        if self.tensor.is_cuda:
            torch.cuda.synchronize(self.tensor.device)
        self.tensor = torch.empty(0, dtype=torch.uint8)


class _named:
    """A context manager: torch's own errors as DeviceError of work on `what`. (No generator: see worker.failing.)"""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise DeviceError(f"work on {self._what}", 0, str(error).splitlines()[0]) from error


class CudaEvent(Event):
    """A timing event. Waiting polls: the runtime's own wait has no deadline."""

    def __init__(self, what: str, stream: torch.cuda.Stream) -> None:
        self._what = what
        with _named(self._what):
            self.raw = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self.raw.record(stream)

    def done(self) -> bool:
        try:
            return bool(self.raw.query())  # type: ignore[no-untyped-call]
        except RuntimeError as e:
            raise DeviceError(f"work on {self._what}", 0, str(e).splitlines()[0]) from e

    def wait(self, seconds: float) -> bool:
        return poll(self.done, seconds)


class CudaStream(Stream):
    """Queue from threads that have bound the device."""

    def __init__(self, device: CudaDevice, name: str) -> None:
        self._device, self._what = device, f"stream {name!r} of {device.name}"
        with torch.cuda.device(device.index):
            self._handle = device.runtime.stream_create(high_priority=name == "share")
        self.raw = torch.cuda.ExternalStream(self._handle, device=device.torch_device)  # type: ignore[no-untyped-call]

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if nbytes := source.numel():
            self._device.runtime.memcpy_async(target.data_ptr(), source.data_ptr(), nbytes, self._handle)

    def call(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self.raw):
            work()

    def record(self) -> CudaEvent:
        return CudaEvent(self._what, self.raw)

    def after(self, event: Event) -> None:
        with _named(self._what):
            self.raw.wait_event(_own(event).raw)

    def busy(self, since: Event, until: Event) -> float:
        with _named(self._what):
            return float(_own(since).raw.elapsed_time(_own(until).raw)) / 1e3

    def clock(self) -> Clock:
        # The origin is over some 10 us after it was queued; later, by a time slice, where another process's kernels run.
        origin, now = self.record(), time.perf_counter()
        if not origin.wait(IDLE_SECONDS):  # events that are over can be told from one that is over only
            raise DeadlineError(f"{self._what} to be idle", IDLE_SECONDS)
        return lambda event: now + self.busy(origin, event)

    def close(self) -> None:
        handle, self._handle = self._handle, 0
        if handle:
            with torch.cuda.device(self._device.index):
                self._device.runtime.stream_destroy(handle)


def _own(event: Event) -> CudaEvent:
    if not isinstance(event, CudaEvent):
        raise TypeError(f"a CUDA stream cannot wait for a {type(event).__name__}")
    return event


class RegisteredHost(Closing):
    """Host memory that the device reads at full speed. Closing unregisters it; the tensor must still be mapped then."""

    def __init__(self, device: CudaDevice, tensor: torch.Tensor) -> None:
        self._device, self._tensor = device, tensor  # keeps the memory mapped as long as it is registered
        self._address = 0
        if tensor.numel():
            with torch.cuda.device(device.index):
                device.runtime.host_register(tensor.data_ptr(), tensor.numel())
            self._address = tensor.data_ptr()

    def close(self) -> None:
        address, self._address = self._address, 0
        if address:
            with torch.cuda.device(self._device.index):
                self._device.runtime.host_unregister(address)
        self._tensor = torch.empty(0, dtype=torch.uint8)


class CudaDevice(Device):
    """Number `index` of the devices that this process sees."""

    kind = "cuda"
    backend = "nccl"
    staging_slots = 2  # one being filled while the other is shared
    keeps_rings = False  # cudaMalloc and cudaFree of a GiB take half a millisecond

    def __init__(self, index: int = 0) -> None:
        self.runtime: CudaRuntime = runtime()
        if not 0 <= index < torch.cuda.device_count():
            raise DeviceError("cudaSetDevice", 101, f"there is no cuda:{index} among {torch.cuda.device_count()} visible devices")
        self.index, self.name = index, f"cuda:{index}"
        self.torch_device = torch.device("cuda", index)
        self._node = gpu_node(index)

    @property
    def uuid(self) -> str:
        return f"GPU-{torch.cuda.get_device_properties(self.index).uuid!s}"

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.index)[0])

    def bind_thread(self) -> None:
        torch.cuda.set_device(self.index)

    def stay_near(self) -> None:
        bind_to_node(self._node)

    def place(self, tensor: torch.Tensor) -> None:
        place_on_node(tensor.data_ptr(), tensor.numel(), self._node)

    def allocate_ring(self, nbytes: int) -> Ring:
        try:
            return CudaRing(self, nbytes)
        except DeviceError as e:
            if e.code != OUT_OF_MEMORY:
                raise
            raise ManifestError(f"{self.name} has {self.free_bytes()} bytes free, {nbytes} are needed: {e}") from e

    allocate = allocate_ring

    @property
    def _regions(self) -> HostRegions:
        return _host_regions.setdefault(self.index, HostRegions(self._register_bound, self.synchronize))

    def _register_bound(self, tensor: torch.Tensor) -> Closing:
        self.bind_thread()
        return self.register_host(tensor)

    def map_ahead(self, regions: Sequence[SharedHandle], descriptors: Sequence[int]) -> None:
        self._regions.prepare(regions, descriptors)

    @property
    def reads_regions(self) -> bool:
        return self._regions.usable

    @property
    def regions_ready(self) -> bool:
        return self._regions.ready

    def open_ring(self, handle: SharedHandle, descriptors: tuple[int, ...]) -> Mapping:
        if handle.kind == "region" and len(descriptors) == 1:
            return self._regions.open(handle, descriptors[0])
        for descriptor in descriptors:  # a CUDA ring needs none
            os.close(descriptor)
        if handle.kind != "cuda_ipc":
            raise ProtocolError(f"a worker on {self.name} cannot map memory of kind {handle.kind!r}")
        try:
            return CudaMapping(self, handle)
        except DeviceError as e:
            if e.code and e.code not in _CANNOT_MAP:
                raise
            raise ProtocolError(
                f"the server's ring cannot be mapped on {self.name} ({self.uuid}): {e}. Server and worker must run on one"
                " host, see the same device, and share the PID and IPC namespaces (hostPID and hostIPC, --pid=host --ipc=host)"
            ) from e

    def open_peer(self, handle: SharedHandle, descriptors: tuple[int, ...]) -> Mapping:
        for descriptor in descriptors:
            os.close(descriptor)
        if handle.kind != "cuda_ipc":
            raise ProtocolError(f"a server on {self.name} cannot map memory of kind {handle.kind!r}")
        return CudaMapping(self, handle, anywhere=True)

    def stream(self, name: str) -> Stream:
        return CudaStream(self, name)

    def mark(self) -> CudaEvent:
        return CudaEvent(f"the current stream of {self.name}", torch.cuda.current_stream(self.index))

    def synchronize(self) -> None:
        # An engine may load on any stream, so all of this process's streams count; other processes' work does not.
        torch.cuda.synchronize(self.index)

    def region_sums(self) -> DeviceSums | None:
        return DeviceSums(self, self.torch_device) if has_kernel() else None

    def register_host(self, tensor: torch.Tensor) -> Closing:
        try:
            return RegisteredHost(self, tensor)
        except DeviceError as e:
            raise ManifestError(f"{tensor.numel()} bytes of host memory cannot be registered with {self.name}: {e}") from e
