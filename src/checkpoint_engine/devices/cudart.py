"""The few calls of the CUDA runtime that torch does not offer publicly, on the copy of libcudart that torch has loaded.

Only signatures that are the same in CUDA 12 and 13 are used. `cudaPointerAttributes` grew in 13; its first three fields,
the only ones read here, did not move.
"""

from __future__ import annotations

import ctypes
import functools
import site
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint_engine.errors import DeviceError

SUCCESS = 0
INVALID_VALUE = 1
OUT_OF_MEMORY = 2
ALREADY_REGISTERED = 712
NOT_REGISTERED = 713

IPC_HANDLE_BYTES = 64
MAX_PITCH = (1 << 31) - 1
"""Bytes: cudaDevAttrMaxPitch, as NVIDIA's deviceQuery prints it for its devices."""

_MEMCPY_DEFAULT = 4  # the direction follows from the pointers
_HOST_REGISTER_PORTABLE = 1  # pinned for every device of the process, not only the current one
_IPC_LAZY_PEER_ACCESS = 1  # the only flag there is; required
_STREAM_NON_BLOCKING = 1  # does not wait for the legacy default stream

_ADVICE = {
    OUT_OF_MEMORY: "free device (or, when registering, host) memory, or lower PS_MEM_FRACTION or the bucket size",
    ALREADY_REGISTERED: "this memory overlaps a region that is registered already; register each region once",
    NOT_REGISTERED: "the region was unregistered before",
    35: "the driver is older than this torch needs",
    46: "another process holds the device exclusively, or it is being reset",
    100: "no device is visible; look at CUDA_VISIBLE_DEVICES",
    101: "no such device; look at CUDA_VISIBLE_DEVICES",
    700: "an earlier kernel wrote out of bounds; this process cannot use the device any more",
    801: "this platform does not support the call",
}


class _IpcHandle(ctypes.Structure):  # passed by value
    _fields_ = (("reserved", ctypes.c_ubyte * IPC_HANDLE_BYTES),)


class _PointerAttributes(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("device", ctypes.c_int),
        ("device_pointer", ctypes.c_void_p),
        ("host_pointer", ctypes.c_void_p),
        ("reserved", ctypes.c_ubyte * 256),  # more than any version writes
    )


class _Position(ctypes.Structure):
    _fields_ = (("x", ctypes.c_size_t), ("y", ctypes.c_size_t), ("z", ctypes.c_size_t))


class _PitchedPointer(ctypes.Structure):
    _fields_ = (("pointer", ctypes.c_void_p), ("pitch", ctypes.c_size_t), ("width", ctypes.c_size_t), ("rows", ctypes.c_size_t))


class _Copy3D(ctypes.Structure):
    """cudaMemcpy3DParms, the same in CUDA 12 and 13."""

    _fields_ = (
        ("source_array", ctypes.c_void_p),
        ("source_position", _Position),
        ("source", _PitchedPointer),
        ("target_array", ctypes.c_void_p),
        ("target_position", _Position),
        ("target", _PitchedPointer),
        ("extent", _Position),
        ("kind", ctypes.c_int),
    )


class Side(NamedTuple):
    """Where rows lie: the first one's address, bytes from row to row (MAX_PITCH at most), and rows from layer to layer."""

    address: int
    pitch: int
    rows: int


_INT, _UINT, _SIZE, _POINTER = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p
_OUT_POINTER, _OUT_INT = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int)

_SIGNATURES: dict[str, tuple[type, ...]] = {
    "cudaMalloc": (_OUT_POINTER, _SIZE),
    "cudaFree": (_POINTER,),
    "cudaIpcGetMemHandle": (ctypes.POINTER(_IpcHandle), _POINTER),
    "cudaIpcOpenMemHandle": (_OUT_POINTER, _IpcHandle, _UINT),
    "cudaIpcCloseMemHandle": (_POINTER,),
    "cudaHostRegister": (_POINTER, _SIZE, _UINT),
    "cudaHostUnregister": (_POINTER,),
    "cudaMemcpyAsync": (_POINTER, _POINTER, _SIZE, _INT, _POINTER),
    "cudaMemcpy2DAsync": (_POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE, _INT, _POINTER),
    "cudaMemcpy3DAsync": (ctypes.POINTER(_Copy3D), _POINTER),
    "cudaPointerGetAttributes": (ctypes.POINTER(_PointerAttributes), _POINTER),
    "cudaDeviceGetPCIBusId": (ctypes.c_char_p, _INT, _INT),
    "cudaDeviceGetStreamPriorityRange": (_OUT_INT, _OUT_INT),
    "cudaStreamCreateWithPriority": (_OUT_POINTER, _UINT, _INT),
    "cudaStreamDestroy": (_POINTER,),
    "cudaGetLastError": (),
}


class CudaRuntime:
    """Thin methods over libcudart. All raise DeviceError; sizes in bytes, addresses as integers.

    Calls that allocate or map act on the calling thread's current device: bind it first (`torch.cuda.device`). ctypes
    releases the GIL during each call.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        library.cudaGetErrorString.argtypes, library.cudaGetErrorString.restype = (ctypes.c_int,), ctypes.c_char_p
        self._memcpy_async = library.cudaMemcpyAsync

    def _call(self, name: str, *arguments: object) -> None:
        if code := getattr(self._library, name)(*arguments):
            raise self._error(name, code)

    def _error(self, name: str, code: int) -> DeviceError:
        # The runtime also remembers the error, and torch would raise it out of some later, innocent kernel launch.
        self._library.cudaGetLastError()
        text = self._library.cudaGetErrorString(code)
        return DeviceError(name, code, f"{text.decode() if text else 'unknown error'} ({code})", _ADVICE.get(code, ""))

    def malloc(self, nbytes: int) -> int:
        pointer = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(pointer), nbytes)
        return _address("cudaMalloc", pointer)

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def ipc_handle(self, address: int) -> bytes:
        """64 bytes by which another process of this host maps the allocation that starts at `address`."""
        handle = _IpcHandle()
        self._call("cudaIpcGetMemHandle", ctypes.byref(handle), address)
        return bytes(handle)

    def ipc_open(self, token: bytes) -> int:
        """Map another process's allocation on the current device. Not possible in the process that made the handle."""
        if len(token) != IPC_HANDLE_BYTES:
            raise DeviceError("cudaIpcOpenMemHandle", 0, f"a handle has {IPC_HANDLE_BYTES} bytes, not {len(token)}")
        pointer = ctypes.c_void_p()
        handle = _IpcHandle.from_buffer_copy(token)
        self._call("cudaIpcOpenMemHandle", ctypes.byref(pointer), handle, _IPC_LAZY_PEER_ACCESS)
        return _address("cudaIpcOpenMemHandle", pointer)

    def ipc_close(self, address: int) -> None:
        self._call("cudaIpcCloseMemHandle", address)

    def host_register(self, address: int, nbytes: int) -> None:
        self._call("cudaHostRegister", address, nbytes, _HOST_REGISTER_PORTABLE)

    def host_unregister(self, address: int) -> None:
        self._call("cudaHostUnregister", address)

    def memcpy_async(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Queue a copy. Asynchronous for device memory and registered host memory; `stream` is a cudaStream_t."""
        if code := self._memcpy_async(target, source, nbytes, _MEMCPY_DEFAULT, stream):
            raise self._error("cudaMemcpyAsync", code)

    def memcpy_2d_async(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int, stream: int
    ) -> None:
        """Queue a copy of `height` rows of `width` bytes, as memcpy_async. Pitches: from row to row, MAX_PITCH at most."""
        self._call("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, height, _MEMCPY_DEFAULT, stream)

    def memcpy_3d_async(self, target: Side, source: Side, width: int, height: int, depth: int, stream: int) -> None:
        """Queue a copy of `depth` layers of `height` rows of `width` bytes, as memcpy_async."""
        parameters = _Copy3D(kind=_MEMCPY_DEFAULT, extent=_Position(width, height, depth))
        parameters.source = _PitchedPointer(source.address, source.pitch, width, source.rows)
        parameters.target = _PitchedPointer(target.address, target.pitch, width, target.rows)
        self._call("cudaMemcpy3DAsync", ctypes.byref(parameters), stream)

    def pointer_device(self, address: int) -> int:
        """Number, among the visible ones, of the device that `address` belongs to; negative for host memory."""
        attributes = _PointerAttributes()
        self._call("cudaPointerGetAttributes", ctypes.byref(attributes), address)
        return int(attributes.device)

    def pci_bus_id(self, index: int) -> str:
        """Like 0000:17:00.0, hexadecimal digits in whatever case the driver writes them."""
        text = ctypes.create_string_buffer(32)
        self._call("cudaDeviceGetPCIBusId", text, len(text), index)
        return text.value.decode()

    def stream_create(self, *, high_priority: bool) -> int:
        """A stream of our own on the current device: those from torch's pool are handed out again after 32."""
        least, greatest = ctypes.c_int(), ctypes.c_int()
        self._call("cudaDeviceGetStreamPriorityRange", ctypes.byref(least), ctypes.byref(greatest))
        pointer = ctypes.c_void_p()
        priority = greatest.value if high_priority else least.value
        self._call("cudaStreamCreateWithPriority", ctypes.byref(pointer), _STREAM_NON_BLOCKING, priority)
        return _address("cudaStreamCreateWithPriority", pointer)

    def stream_destroy(self, stream: int) -> None:
        """Returns at once; what was queued still runs."""
        self._call("cudaStreamDestroy", stream)


def _address(call: str, pointer: ctypes.c_void_p) -> int:
    if pointer.value is None:
        raise DeviceError(call, 0, "it reported success and returned no address")
    return pointer.value


def loaded_libraries(name: str, maps: Path = Path("/proc/self/maps")) -> list[str]:
    """Paths of the shared libraries of this process whose file name starts with `name`, in the order of their mapping."""
    found: dict[str, None] = {}
    for line in maps.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and Path(fields[5]).name.startswith(name) and not fields[5].endswith(" (deleted)"):
            found[fields[5]] = None
    return list(found)


def _candidates() -> list[str]:
    """Where libcudart may be, best first: the one in use, then the loader's search path, then NVIDIA's wheels."""
    major = (torch.version.cuda or "").partition(".")[0]
    soname = f"libcudart.so.{major}"
    # Another package may have brought a second, older runtime into the process.
    mapped = sorted(loaded_libraries("libcudart"), key=lambda path: soname not in Path(path).name)
    wheels = []
    for folder in dict.fromkeys([*site.getsitepackages(), site.getusersitepackages(), *sys.path]):
        for pattern in (f"nvidia/cu{major}/lib", "nvidia/cuda_runtime/lib"):
            wheels += [str(path) for path in (Path(folder) / pattern).glob(soname + "*")]
    return [*mapped, soname, *wheels]


@functools.cache
def runtime() -> CudaRuntime:
    """The wrapper, made once. Initialises CUDA; raises DeviceError where there is no device or no runtime."""
    if not torch.cuda.is_available():
        raise DeviceError("cudaGetDeviceCount", 100, "torch sees no CUDA device", _ADVICE[100])
    torch.cuda.init()  # type: ignore[no-untyped-call]
    reasons = []
    for path in _candidates():
        try:
            return CudaRuntime(ctypes.CDLL(path))
        except (OSError, AttributeError) as e:  # AttributeError: a library without one of the calls
            reasons.append(f"{path}: {e}")
    raise DeviceError("dlopen of libcudart", 0, "; ".join(reasons), "install the nvidia-cuda-runtime wheel that torch names")
