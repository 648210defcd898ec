"""Reads files straight into regions: what the page cache holds through the page cache, the rest past it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from checkpoint_engine.errors import CheckpointError, FileFormatError
from checkpoint_engine.memory.digest import Block, Digests, Span
from checkpoint_engine.memory.layout import Extent
from checkpoint_engine.memory.region import PAGE, HostRegion
from checkpoint_engine.memory.work import CHUNK_BYTES, Work

# Into new memory cached bytes are brought this many at a time, so that a core still has the zeroes of new pages in its cache when
# they are overwritten: a quarter less time than taking all pages first.
HOT_BYTES = 1 << 20


class FileReader:
    """An open file. A context manager; threads may share it. `read` is the only way in."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError naming the file when it cannot be opened."""
        self.path = path
        self._lock = threading.Lock()
        self._direct: int | None = None
        self._direct_tried = False
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e

    def read(self, region: HostRegion, extent: Extent) -> None:
        """Bring the bytes of `extent` into `region`.

        Raises FileFormatError when the file ends too early, CheckpointError when reading fails.
        """
        try:
            cached = self._read_cached(region, extent)
            if cached < extent.nbytes:
                if not region.touched:
                    region.touch(extent.region_offset + cached, extent.nbytes - cached)
                with region.view(extent.region_offset, extent.nbytes) as view:
                    self._read_uncached(view, extent.file_offset, cached)
        except OSError as e:
            raise CheckpointError(f"{self.path}: cannot be read: {e.strerror}") from e

    def _read_cached(self, region: HostRegion, extent: Extent) -> int:
        """Read from the start what the page cache holds; returns how many bytes that was."""
        done, flags = 0, os.RWF_NOWAIT
        while done < extent.nbytes:
            size = extent.nbytes - done
            if not region.touched:
                size = min(size, HOT_BYTES)
                region.touch(extent.region_offset + done, size)
            with region.view(extent.region_offset + done, size) as view:
                try:
                    count = os.preadv(self._fd, [view], extent.file_offset + done, flags)
                except BlockingIOError:
                    return done
                except OSError as e:
                    if not flags or e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise
                    flags = 0  # no telling what is cached on this file system: leave it all to the cache
                    continue
            done += count
            if count == 0 or (flags and count < size):
                break
        return done

    def _read_uncached(self, view: memoryview, offset: int, done: int) -> None:
        """Fill `view`, which starts at the file's byte `offset`, from its byte `done` on."""
        direct = self._open_direct()
        if direct is not None:
            aligned = min(-(-done // PAGE) * PAGE, len(view))
            self._read_buffered(view[:aligned], offset, done)
            done = aligned
            whole = len(view) // PAGE * PAGE
            while done < whole:
                try:
                    count = os.preadv(direct, [view[done:whole]], offset + done)
                except OSError as e:
                    if e.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                        raise
                    break
                done += count
                if count == 0 or count % PAGE:
                    break
        self._read_buffered(view, offset, done)

    def _read_buffered(self, view: memoryview, offset: int, done: int) -> None:
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], offset + done)
            if count == 0:
                raise FileFormatError(str(self.path), f"truncated: it ends at byte {offset + done} now")
            done += count

    def _open_direct(self) -> int | None:
        with self._lock:
            if not self._direct_tried:
                self._direct_tried = True
                try:
                    self._direct = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                except OSError:  # not on this file system
                    self._direct = None
            return self._direct

    def close(self) -> None:
        with self._lock:
            for fd in (self._fd, self._direct):
                if fd is not None and fd >= 0:
                    os.close(fd)
            self._fd, self._direct, self._direct_tried = -1, None, True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Turn:
    """Opens a file for the first of `chunks` chunks and closes it after the last, so that few are open at a time."""

    def __init__(self, path: Path) -> None:
        self.path, self.chunks = path, 0
        self._lock = threading.Lock()
        self._reader: FileReader | None = None

    def read(self, region: HostRegion, extent: Extent) -> None:
        with self._lock:
            reader = self._reader = self._reader or FileReader(self.path)
        try:
            reader.read(region, extent)
        finally:
            with self._lock:
                self.chunks -= 1
                if self.chunks == 0:
                    reader.close()

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()


class ReadPlan:
    """The work of reading extents into regions, in chunks. A context manager that closes the files.

    add   announce what goes into one region
    work  afterwards: the pieces of work, in file order
    """

    def __init__(self, digests: Digests) -> None:
        self.work: list[Work] = []
        self._digests = digests
        self._turns: dict[Path, _Turn] = {}

    def add(self, region: HostRegion, extents: Sequence[Extent], spans: Sequence[Span]) -> None:
        """spans: of the tensors in the region, in order of offset; their digests are made as their bytes arrive."""
        blocks = [block for span in spans for block in span.blocks]
        first = 0
        for chunk in (chunk for extent in extents for chunk in _chunks(extent)):
            end = chunk.region_offset + chunk.nbytes
            while first < len(blocks) and blocks[first].end <= chunk.region_offset:
                first += 1
            last = first
            while last < len(blocks) and blocks[last].offset < end:
                blocks[last].pending += 1
                last += 1
            turn = self._turns.setdefault(chunk.file, _Turn(chunk.file))
            turn.chunks += 1
            self.work.append(Work(partial(self._bring, turn, region, chunk, blocks[first:last]), chunk.nbytes))

    def _bring(self, turn: _Turn, region: HostRegion, chunk: Extent, blocks: Sequence[Block]) -> None:
        turn.read(region, chunk)
        self._digests.arrived(region, blocks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for turn in self._turns.values():
            turn.close()


def _chunks(extent: Extent) -> Iterator[Extent]:
    for start in range(0, extent.nbytes, CHUNK_BYTES):
        size = min(CHUNK_BYTES, extent.nbytes - start)
        yield Extent(extent.file, extent.file_offset + start, size, extent.region_offset + start)
