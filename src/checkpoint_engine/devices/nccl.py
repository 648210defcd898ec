"""A communicator of our own on the copy of libnccl that torch has loaded: create, broadcast out of place, abort.

torch's ProcessGroupNCCL comes with a watchdog that may end the process, driven by environment variables which belong to
the program we are embedded in, and broadcasts in place only. docs/notes-cuda.md compares the two.

NCCL's communicators are not thread-safe: calls are serialised here, and none of them blocks (the communicator is
non-blocking: it reports "in progress", and the waiting, with its deadline, is done here).
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time

import torch

from checkpoint_engine.devices.base import Closing
from checkpoint_engine.devices.cudart import loaded_libraries
from checkpoint_engine.errors import DeadlineError, DeviceError

UNIQUE_ID_BYTES = 128
SUCCESS, IN_PROGRESS = 0, 7

_UNDEFINED = -(1 << 31)  # NCCL_CONFIG_UNDEF_INT
_MAGIC = 0xCAFEBEEF
_CONFIG_VERSION = 21800  # the layout below is 2.18's; newer libraries accept it and fill in the rest
_UINT8 = 1
_ABORT_SECONDS = 10.0


class _UniqueId(ctypes.Structure):  # passed by value
    _fields_ = (("internal", ctypes.c_ubyte * UNIQUE_ID_BYTES),)


class _Config(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
        ("padding", ctypes.c_int),
    )


_INT, _POINTER, _SIZE = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "ncclGetVersion": (ctypes.POINTER(_INT),),
    "ncclGetUniqueId": (ctypes.POINTER(_UniqueId),),
    "ncclCommInitRankConfig": (ctypes.POINTER(_POINTER), _INT, _UniqueId, _INT, ctypes.POINTER(_Config)),
    "ncclBroadcast": (_POINTER, _POINTER, _SIZE, _INT, _INT, _POINTER, _POINTER),
    "ncclCommGetAsyncError": (_POINTER, ctypes.POINTER(_INT)),
    "ncclCommAbort": (_POINTER,),
}


@functools.cache
def library() -> ctypes.CDLL:
    """libnccl with its signatures set. Raises DeviceError where there is none."""
    reasons = []
    for path in [*loaded_libraries("libnccl.so"), "libnccl.so.2"]:
        try:
            found = ctypes.CDLL(path)
            for name, arguments in _SIGNATURES.items():
                getattr(found, name).argtypes, getattr(found, name).restype = arguments, _INT
            found.ncclGetErrorString.argtypes, found.ncclGetErrorString.restype = (_INT,), ctypes.c_char_p
            return found
        except (OSError, AttributeError) as e:
            reasons.append(f"{path}: {e}")
    raise DeviceError("dlopen of libnccl.so.2", 0, "; ".join(reasons), "install the nvidia-nccl wheel that torch names")


def _check(name: str, code: int) -> None:
    if code not in (SUCCESS, IN_PROGRESS):
        text = library().ncclGetErrorString(code).decode()
        raise DeviceError(name, code, f"{text} ({code})", "NCCL_DEBUG=WARN makes NCCL print the cause")


def nccl_version() -> int:
    """Like 22803 for 2.28.3."""
    version = ctypes.c_int()
    _check("ncclGetVersion", library().ncclGetVersion(ctypes.byref(version)))
    return version.value


def unique_id() -> bytes:
    """128 bytes, made by one rank and given to all of one communicator (over the store). Serves one communicator."""
    new = _UniqueId()
    _check("ncclGetUniqueId", library().ncclGetUniqueId(ctypes.byref(new)))
    return bytes(new)


class NcclCommunicator(Closing):
    """One rank of a communicator. The constructor returns when all ranks have come, or raises after `timeout` seconds.

    device    number of the visible device
    max_ctas  at most so many channels: each takes some of the device's cores while a broadcast runs, and memory for its
              buffers for as long as the communicator lives; None: NCCL's choice

    Raises DeviceError, DeadlineError. Both ends of its life are local: closing does not wait for the other ranks.
    """

    def __init__(self, token: bytes, rank: int, size: int, device: int, *, timeout: float, max_ctas: int | None = None) -> None:
        if len(token) != UNIQUE_ID_BYTES:
            raise DeviceError("ncclCommInitRankConfig", 0, f"a unique id has {UNIQUE_ID_BYTES} bytes, not {len(token)}")
        self.rank, self.size, self._device = rank, size, device
        self._lock = threading.Lock()
        self._handle: int | None = None
        channels = _UNDEFINED if max_ctas is None else max_ctas
        config = _Config(
            ctypes.sizeof(_Config), _MAGIC, _CONFIG_VERSION, 0, _UNDEFINED, _UNDEFINED, channels, None, _UNDEFINED, _UNDEFINED
        )
        handle = ctypes.c_void_p()
        with torch.cuda.device(device):
            code = library().ncclCommInitRankConfig(
                ctypes.byref(handle), size, _UniqueId.from_buffer_copy(token), rank, ctypes.byref(config)
            )
        self._handle = handle.value
        try:
            _check("ncclCommInitRankConfig", code)
            self._settle(timeout, f"all {size} ranks to join the NCCL communicator")
        except BaseException:
            self.abort()
            raise

    def broadcast(self, target: torch.Tensor, source: torch.Tensor, root: int, stream: int, *, timeout: float) -> None:
        """Queue a broadcast of rank `root`'s `source` into every rank's `target` on `stream` (a cudaStream_t).

        uint8, one-dimensional, of one length; `source` is read on the root only and may be `target` itself. Returns when
        it is queued; the first call also connects the ranks, for which it waits `timeout` seconds. Every rank must make
        the same calls in the same order. Raises DeviceError, also when an earlier broadcast failed, and DeadlineError.
        """
        with self._lock:
            handle = self._open()
            with torch.cuda.device(self._device):
                code = library().ncclBroadcast(source.data_ptr(), target.data_ptr(), target.numel(), _UINT8, root, handle, stream)
        _check("ncclBroadcast", code)
        if code == IN_PROGRESS:
            self._settle(timeout, f"NCCL to start a broadcast from rank {root}")

    def check(self) -> None:
        """Raises DeviceError when something has failed since: a peer's process or its network is gone."""
        with self._lock:
            self._state(self._open())

    def abort(self, seconds: float = _ABORT_SECONDS) -> bool:
        """Stop what is running and free everything, without the other ranks. Streams go on with what is queued after it,
        on whatever bytes had arrived. False when NCCL did not come back in time: then its memory stays lost.

        May be called from any thread, also while another one waits in `broadcast`; that one raises.
        """
        with self._lock:
            handle, self._handle = self._handle, None
        if not handle:
            return True

        def work() -> None:
            with torch.cuda.device(self._device):
                library().ncclCommAbort(handle)

        thread = threading.Thread(target=work, name="nccl-abort", daemon=True)
        thread.start()
        thread.join(seconds)
        return not thread.is_alive()

    def close(self) -> None:
        """`abort`: after the caller's last event is done there is nothing left to lose."""
        self.abort()

    def _open(self) -> int:
        if not self._handle:
            raise DeviceError("ncclBroadcast", 0, "this communicator was aborted")
        return self._handle

    def _state(self, handle: int) -> int:
        state = ctypes.c_int()
        _check("ncclCommGetAsyncError", library().ncclCommGetAsyncError(handle, ctypes.byref(state)))
        _check("an NCCL operation in the background", state.value)
        return state.value

    def _settle(self, timeout: float, what: str) -> None:
        start = time.monotonic()
        while True:
            with self._lock:  # not for the whole wait: `abort` must get in between
                if self._state(self._open()) != IN_PROGRESS:
                    return
            waited = time.monotonic() - start
            if waited >= timeout:
                raise DeadlineError(what, timeout)
            time.sleep(min(1e-3, waited / 8 + 20e-6))
