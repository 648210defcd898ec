"""The servers' host memory in a worker's process, mapped and registered with its GPU, kept from update to update."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet

import torch

from checkpoint_engine.devices.base import Closing, Mapping, SharedHandle
from checkpoint_engine.devices.cpu import CpuMapping
from checkpoint_engine.errors import DeadlineError

REGISTER_SECONDS = 300.0
"""Longest wait for a region to be registered."""

_Key = tuple[int, int, int]


class _Registered(Closing):
    def __init__(self, mapping: Mapping, registration: Closing) -> None:
        self.tensor, self._mapping, self._registration = mapping.tensor, mapping, registration

    def close(self) -> None:
        self._registration.close()
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self._mapping.close()


class Borrowed(Mapping):
    """A region that stays mapped when this is closed, which waits until nothing reads it any more."""

    def __init__(self, tensor: torch.Tensor, settle: Callable[[], None]) -> None:
        self.tensor, self._settle = tensor, settle

    def close(self) -> None:
        self._settle()
        self.tensor = torch.empty(0, dtype=torch.uint8)


class HostRegions:
    """Regions by device and inode, which is one region's as long as it is mapped here. register: with the accelerator, in a
    thread of its own for each region: it takes the longer the larger the region is. settle: wait until it has read all.

    usable: no registration has failed yet. Used by one session at a time.
    """

    def __init__(self, register: Callable[[torch.Tensor], Closing], settle: Callable[[], None]) -> None:
        self._register, self._settle = register, settle
        self._regions: dict[_Key, Future[_Registered]] = {}
        self.usable = True

    def prepare(self, handles: Sequence[SharedHandle], descriptors: Sequence[int]) -> None:
        """Begin to map these; give up all others. Takes ownership of `descriptors`. Never waits for a registration."""
        wanted = {self._begin(handle.nbytes, fd): None for handle, fd in zip(handles, descriptors, strict=True)}
        for key in [key for key in self._regions if key not in wanted]:
            # By the thread that registers it, if that is not over.
            self._regions.pop(key).add_done_callback(_give_up)

    @property
    def ready(self) -> bool:
        """Whether all of them are registered."""
        return self.usable and all(future.done() for future in self._regions.values())

    def open(self, handle: SharedHandle, descriptor: int) -> Mapping:
        """Takes ownership of `descriptor`; waits until the region is registered.

        Raises ProtocolError, ManifestError, DeadlineError.
        """
        future = self._regions[key := self._begin(handle.nbytes, descriptor)]
        try:
            return Borrowed(future.result(REGISTER_SECONDS).tensor, self._settle)
        except NotYet:
            raise DeadlineError(f"{handle.nbytes} bytes of host memory to be registered", REGISTER_SECONDS) from None
        except Exception:
            self._regions.pop(key, None)
            raise

    def _begin(self, nbytes: int, descriptor: int) -> _Key:
        status = os.fstat(descriptor)
        key = status.st_dev, status.st_ino, nbytes
        if key in self._regions:
            os.close(descriptor)
            return key
        future: Future[_Registered] = Future()
        self._regions[key] = future
        work = threading.Thread(target=self._map, args=(future, nbytes, descriptor), name="register-region", daemon=True)
        work.start()
        return key

    def _map(self, future: Future[_Registered], nbytes: int, descriptor: int) -> None:
        try:
            mapping = CpuMapping(descriptor, nbytes, private=False)
            future.set_result(_Registered(mapping, self._register(mapping.tensor)))
        except BaseException as e:  # it is raised where the region is wanted
            self.usable = False
            future.set_exception(e)


def _give_up(region: Future[_Registered]) -> None:
    if region.exception() is None:
        region.result().close()
