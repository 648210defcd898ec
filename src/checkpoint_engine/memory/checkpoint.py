"""A checkpoint in host memory, made from files, from tensors, or from both."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch

from checkpoint_engine.errors import CheckpointError, DuplicateTensorError
from checkpoint_engine.manifest import RegionMeta, TensorMeta
from checkpoint_engine.memory.digest import Block, Digests, RegionSums, Span
from checkpoint_engine.memory.layout import RegionLayout, lay_out
from checkpoint_engine.memory.pool import RegionPool
from checkpoint_engine.memory.reader import ReadPlan
from checkpoint_engine.memory.region import HostRegion
from checkpoint_engine.memory.safetensors import SafetensorsFile, parse_file
from checkpoint_engine.memory.tensors import CopyPlan, place_tensors
from checkpoint_engine.memory.work import CHUNK_BYTES, Work, do_all

logger = logging.getLogger(__name__)

MEMORY_ROOT = Path("/dev/shm")
"""Files below it are memory already and can be mapped in place."""

Progress = Callable[[int, int], None]


class HostCheckpoint:
    """A named set of tensors and the regions that hold them, which it owns. A context manager.

    regions  in the order of `metas`
    nbytes   of all tensors
    """

    def __init__(self, name: str, regions: Sequence[HostRegion], metas: Sequence[RegionMeta], pool: RegionPool) -> None:
        self.name, self.regions = name, tuple(regions)
        self._metas, self._pool, self._closed = tuple(metas), pool, False
        self.nbytes = sum(tensor.nbytes for meta in metas for tensor in meta.tensors)

    def metas(self) -> tuple[RegionMeta, ...]:
        """What each region holds; tensors in order of offset."""
        return self._metas

    def close(self, *, keep: bool = False) -> None:
        """Give the regions back; keep: to the pool, for the next checkpoint of this shape. May be called twice."""
        if not self._closed:
            self._closed = True
            for region in self.regions:
                self._pool.release(region, keep)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Entry(NamedTuple):
    """A tensor of a region."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    span: Span


class _Part(NamedTuple):
    """A region and what it is going to hold."""

    region: HostRegion
    entries: list[_Entry]

    @property
    def spans(self) -> list[Span]:
        return [entry.span for entry in self.entries]

    def meta(self, digests: Digests) -> RegionMeta:
        tensors = (TensorMeta(e.name, e.dtype, e.shape, e.span.offset, digests.of(e.span)) for e in self.entries)
        return RegionMeta(self.region.nbytes, tuple(tensors))


def build(
    name: str,
    *,
    files: Sequence[str | Path] = (),
    named_tensors: Mapping[str, torch.Tensor] | None = None,
    select: Collection[str] | None = None,
    pool: RegionPool,
    threads: int = 8,
    inplace: bool = True,
    reuse: bool = True,
    delete_inplace_files: bool = False,
    digests: bool = True,
    sums: RegionSums | None = None,
    progress: Progress | None = None,
) -> HostCheckpoint:
    """Bring `files` and `named_tensors` into regions of `pool`.

    select                names of the files' tensors that are wanted (None: all); the rest of the files is not read
    threads               that read and copy
    inplace               map files below /dev/shm that may be written to where they are, instead of reading them
    reuse                 take regions that the pool kept
    delete_inplace_files  remove files that were mapped in place, once all went well
    digests               make a digest of each tensor's bytes
    sums                  makes them, in large regions
    progress              called in this thread with bytes done and bytes in all

    Raises FileFormatError, TensorError, DuplicateTensorError or CheckpointError, which name the file or tensor. Nothing is
    left behind then, and regions that were kept are kept again.
    """
    named = named_tensors or {}
    parsed = [parse_file(path) for path in files]
    _check_names(parsed, named, select)
    if select is not None:
        select = frozenset(select)
    builder = _Builder(pool, threads, Digests(enabled=digests, by_device=sums), progress)
    try:
        mapped = builder.map_files([file for file in parsed if inplace and _in_memory(file.path)], select)
        builder.fill(lay_out([file for file in parsed if not (inplace and _in_memory(file.path))], select), named, reuse)
        checkpoint = HostCheckpoint(
            name, [p.region for p in builder.parts], [p.meta(builder.digests) for p in builder.parts], pool
        )
    except BaseException:
        pool.undo(part.region for part in builder.parts)
        raise
    if delete_inplace_files:
        _delete(mapped)
    return checkpoint


def _check_names(files: Sequence[SafetensorsFile], named: Mapping[str, object], select: Collection[str] | None) -> None:
    sources: dict[str, str] = dict.fromkeys(named, "the named tensors")
    in_files: set[str] = set()
    for file in files:
        for tensor in file.tensors:
            if (first := sources.setdefault(tensor.name, str(file.path))) != str(file.path) or tensor.name in in_files:
                raise DuplicateTensorError(tensor.name, first, str(file.path))
            in_files.add(tensor.name)
    for name in select or ():
        if name not in in_files:
            raise CheckpointError(f"tensor {name!r} is in none of the {len(files)} files")


def _in_memory(path: Path) -> bool:
    return path.resolve().is_relative_to(MEMORY_ROOT) and os.access(path, os.R_OK | os.W_OK)


def _delete(files: Sequence[SafetensorsFile]) -> None:
    for file in files:
        try:
            file.path.unlink()
        except OSError as e:  # the checkpoint is good all the same
            logger.warning("%s: cannot be deleted: %s", file.path, e.strerror)


@dataclass
class _Builder:
    """Collects the parts of one checkpoint; what is in `parts` is the caller's to give back if something fails."""

    pool: RegionPool
    threads: int
    digests: Digests
    progress: Progress | None

    def __post_init__(self) -> None:
        self.parts: list[_Part] = []
        self._shared: list[Work] = []
        self._later = 0  # bytes of files in place that a device sums up when all else is done
        self._total = self._done = 0

    def map_files(self, files: Sequence[SafetensorsFile], select: Collection[str] | None) -> list[SafetensorsFile]:
        """Map those of `files` that hold anything that is wanted, and return them."""
        mapped = []
        for file in files:
            wanted = [t for t in file.tensors if select is None or t.name in select]
            if not wanted:
                continue
            mapped.append(file)
            region = self.pool.map_file(file.path)
            part = _Part(region, [_Entry(t.name, t.dtype, t.shape, Span(region, t.start, t.nbytes)) for t in wanted])
            self.parts.append(part)
            if region.nbytes != file.size:
                raise CheckpointError(f"{file.path}: its size changed while it was registered")
            self.pool.ready(region)
            if self.digests.begin(region):
                self._later += sum(span.nbytes for span in part.spans)
            self._shared += self._digest(part.spans)
        return mapped

    def fill(self, layouts: Sequence[RegionLayout], named: Mapping[str, torch.Tensor], reuse: bool) -> None:
        """Read files as `layouts` say, and copy `named` into a region behind theirs."""
        tensors, named_bytes = place_tensors(named)
        sizes = [layout.nbytes for layout in layouts] + ([named_bytes] if tensors else [])
        regions = self.pool.acquire_all(sizes, reuse=reuse)
        self.parts += [_Part(region, []) for region in regions]
        parts = self.parts[len(self.parts) - len(regions) :]
        for region in regions:
            self.digests.begin(region)
        with ReadPlan(self.digests) as reads:
            for layout, (region, entries) in zip(layouts, parts, strict=False):
                entries += [
                    _Entry(p.tensor.name, p.tensor.dtype, p.tensor.shape, Span(region, p.offset, p.tensor.nbytes))
                    for p in layout.placements
                ]
                reads.add(region, layout.extents, [entry.span for entry in entries])
            self._shared += reads.work
            own: list[Work] = []
            late: list[Span] = []
            if tensors:
                region, entries = parts[-1]
                region.touch_all(self.threads)
                entries += [_Entry(t.name, t.dtype, tuple(t.value.shape), Span(region, t.offset, t.nbytes)) for t in tensors]
                copies = CopyPlan(region, tensors, parts[-1].spans, self.digests)
                self._shared += copies.shared
                # Registered before, not after, it is copied to from a device: that is several times faster.
                own, late = [Work(partial(self.pool.ready, region), 0), *copies.own], copies.late
            self._do(own)
        if tensors:
            copies.finish()
        do_all(self._digest(late), (), self.threads, lambda nbytes: None)
        for region, _ in parts:
            region.touched = True
            self.pool.ready(region)
        for part in self.parts:
            do_all(self._digest(self.digests.end(part.region, part.spans)), (), self.threads, lambda nbytes: None)
        self._report(self._later)

    def _do(self, own: Sequence[Work]) -> None:
        self._total = self._later + sum(work.nbytes for work in (*self._shared, *own))
        do_all(self._shared, own, self.threads, self._report)

    def _report(self, nbytes: int) -> None:
        self._done += nbytes
        if nbytes and self.progress is not None:
            self.progress(self._done, self._total)

    def _digest(self, spans: Sequence[Span]) -> list[Work]:
        """The work of making digests of bytes that are there, all in one region, unless a device is going to make them."""
        if not spans or not self.digests.early(spans[0].region):
            return []
        work: list[Work] = []
        batch: list[Block] = []
        size = 0
        blocks = [block for span in spans for block in span.blocks]
        for place, block in enumerate(blocks, start=1):
            batch.append(block)
            size += block.end - block.offset
            if size >= CHUNK_BYTES or place == len(blocks):
                work.append(Work(partial(self.digests.make, spans[0].region, batch), size))
                batch, size = [], 0
        return work
