"""A region: one contiguous piece of host memory that can be shared with other processes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from checkpoint_engine.errors import CheckpointError

PAGE = mmap.PAGESIZE
TOUCH_BYTES = 16 << 20
MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module has no name for it

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_generations = itertools.count(1)
# mmap.madvise holds the interpreter's lock, so that threads could not touch in parallel; ctypes calls do not.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.restype = ctypes.c_int


class HostRegion:
    """`nbytes` bytes of host memory, mapped shared from `fd`, zero at first. A context manager.

    nbytes      exact; the mapping is larger only by what fills the last page
    fd          the memfd (sealed: its size never changes) or mapped file; -1 after `close`
    tensor      torch.uint8, one-dimensional, `nbytes` long
    generation  positive, unlike that of any other region of this process
    touched     whether its pages are known to be there
    in_place    whether it is a mapped file

    Closing closes `fd` and forgets the memory, which stays mapped until the last view or tensor of it is gone; so
    closing never pulls memory from under a reader. (The mapping keeps a descriptor of its own just as long.)
    """

    def __init__(self, nbytes: int, *, threads: int = 4, touch: bool = True) -> None:
        """Take new memory. touch: take its pages at once, with `threads` threads; otherwise they come with first use.

        Raises CheckpointError when there is not enough memory.
        """
        if nbytes < 1:
            raise CheckpointError(f"a region needs at least one byte, not {nbytes}")
        try:
            fd = os.memfd_create("checkpoint-engine", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as e:
            raise CheckpointError(f"cannot make a region of {nbytes} bytes: {e.strerror}") from e
        try:
            mapped = -(-nbytes // PAGE) * PAGE
            os.ftruncate(fd, mapped)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            self._adopt(fd, nbytes, mapped)
        except (OSError, OverflowError) as e:
            os.close(fd)
            raise CheckpointError(f"cannot make a region of {nbytes} bytes: {e}") from e
        self.touched = self.in_place = False
        with contextlib.suppress(OSError):  # refused by kernels built or set up without huge pages for shared memory
            self._live_map.madvise(mmap.MADV_HUGEPAGE)
        if touch:
            try:
                self.touch_all(threads)
            except BaseException:
                self.close()
                raise

    @classmethod
    def map_file(cls, path: str | Path) -> Self:
        """Map a whole file in place, shared and writable; meant for files in /dev/shm, which are memory already.

        Nobody may truncate the file while it is mapped. Raises CheckpointError naming it when it cannot be mapped.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            raise CheckpointError(f"{path}: cannot be mapped in place: {e.strerror}") from e
        self = cls.__new__(cls)
        try:
            size = os.fstat(fd).st_size
            self._adopt(fd, size, size)
        except (OSError, ValueError) as e:
            os.close(fd)
            raise CheckpointError(f"{path}: cannot be mapped in place: {e}") from e
        self.touched = self.in_place = True
        return self

    def _adopt(self, fd: int, nbytes: int, mapped: int) -> None:
        mapping = mmap.mmap(fd, mapped)
        self.nbytes, self.generation = nbytes, next(_generations)
        self._map: mmap.mmap | None = mapping
        self._tensor: torch.Tensor | None = torch.frombuffer(mapping, dtype=torch.uint8)[:nbytes]
        self._fd = fd
        self._close_fd = weakref.finalize(self, os.close, fd)

    @property
    def fd(self) -> int:
        return self._fd if self._close_fd.alive else -1

    @property
    def closed(self) -> bool:
        return self._map is None

    @property
    def tensor(self) -> torch.Tensor:
        """Raises CheckpointError when the region is closed."""
        if self._tensor is None:
            raise CheckpointError("the region is closed")
        return self._tensor

    @property
    def _live_map(self) -> mmap.mmap:
        if self._map is None:
            raise CheckpointError("the region is closed")
        return self._map

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Writable bytes [offset, offset + nbytes). Raises CheckpointError when the region is closed."""
        return memoryview(self._live_map)[offset : offset + nbytes]

    def touch(self, offset: int, nbytes: int) -> None:
        """Take the pages that hold bytes [offset, offset + nbytes). Keeps what is written there already.

        Raises CheckpointError when there is not enough memory.
        """
        first, end = offset // PAGE * PAGE, -(-(offset + nbytes) // PAGE) * PAGE
        address = self.tensor.data_ptr() + first
        while first < end and _libc.madvise(address, end - first, MADV_POPULATE_WRITE) != 0:
            code = ctypes.get_errno()
            if code == errno.EINVAL:  # an older kernel
                return  # they come with the first access then
            if code not in (errno.EINTR, errno.EAGAIN):
                raise CheckpointError(f"cannot get {self.nbytes} bytes of host memory: {os.strerror(code)}")

    def touch_all(self, threads: int) -> None:
        """Take all pages with `threads` threads, unless that was done before. Keeps what is written already.

        Raises CheckpointError when there is not enough memory.
        """
        if self.touched:
            return
        size = -(-self.nbytes // PAGE) * PAGE
        pieces = [(start, min(TOUCH_BYTES, size - start)) for start in range(0, size, TOUCH_BYTES)]
        with ThreadPoolExecutor(min(threads, len(pieces)), "touch") as workers:
            for _ in workers.map(lambda piece: self.touch(*piece), pieces):
                pass
        self.touched = True

    def close(self) -> None:
        self._close_fd()
        self._tensor = self._map = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
