"""A torch tensor over memory that torch did not allocate, by DLPack: public, no copy, no numpy, any torch.

`__cuda_array_interface__` would do too, but torch needs numpy to read it and guesses the device from the address.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
from collections.abc import Callable

import torch
from torch.utils.dlpack import from_dlpack

_DLPACK_DEVICE = {"cpu": 1, "cuda": 2}
_UINT = 1  # DLPack's type code


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


# What a tensor needs for as long as it lives, by the number it carries in `context`.
_alive: dict[int, tuple[_DLManagedTensor, object, Callable[[], None] | None]] = {}
_numbers = itertools.count(1)


def _deleted(address: int) -> None:
    """Called by torch, in whatever thread drops the last reference to the storage."""
    number = _DLManagedTensor.from_address(address).context
    _, _, released = _alive.pop(number)
    if released is not None:
        released()


_deleter = _Deleter(_deleted)


@atexit.register
def _forget() -> None:
    """What still lives now may be dropped by C++ after Python is gone: leave torch nothing to call, and the structs in place."""
    for managed, shapes, _ in _alive.values():
        managed.deleter = _Deleter()  # NULL: torch skips it
        for kept in (managed, shapes):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.argtypes, _new_capsule.restype = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p), ctypes.py_object
_CAPSULE_NAME = b"dltensor"  # must outlive every capsule


def tensor_at(address: int, nbytes: int, device: torch.device, released: Callable[[], None] | None = None) -> torch.Tensor:
    """A uint8 tensor of shape (nbytes,) over `nbytes` > 0 bytes at `address` on `device` ("cpu", or "cuda" with its index).

    `released` is called once, when the tensor and every view of it are gone; it must not raise.
    """
    number = next(_numbers)
    shape, strides = (ctypes.c_int64 * 1)(nbytes), (ctypes.c_int64 * 1)(1)
    managed = _DLManagedTensor(
        _DLTensor(
            data=address,
            device_type=_DLPACK_DEVICE[device.type],
            device_id=device.index or 0,
            ndim=1,
            code=_UINT,
            bits=8,
            lanes=1,
            shape=shape,
            strides=strides,
            byte_offset=0,
        ),
        number,
        _deleter,
    )
    _alive[number] = (managed, (shape, strides), released)
    return from_dlpack(_new_capsule(ctypes.addressof(managed), _CAPSULE_NAME, None))
