"""Which bytes of which file go where in which region. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoint_engine.memory.region import PAGE
from checkpoint_engine.memory.safetensors import FileTensor, SafetensorsFile

MERGE_GAP = 64 << 10
"""Bytes. Ranges of a file closer together than this are read in one go, gap included."""
REGION_BYTES = 8 << 30
"""Files share regions up to this size: few descriptors for many files, yet several regions to fill and pin at once."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [file_offset, file_offset + nbytes) of `file` go to the region from `region_offset` on; the two offsets are
    multiples of a page, which lets a device write straight into the region."""

    file: Path
    file_offset: int
    nbytes: int
    region_offset: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a tensor lies in the region, bytes."""

    tensor: FileTensor
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.tensor.nbytes


@dataclass(frozen=True, slots=True)
class RegionLayout:
    """A region of `nbytes` bytes: what is read into it, and the tensors it then holds, in order of offset."""

    nbytes: int
    extents: tuple[Extent, ...]
    placements: tuple[Placement, ...]


def lay_out(
    files: Iterable[SafetensorsFile], select: Collection[str] | None = None, limit: int = REGION_BYTES
) -> tuple[RegionLayout, ...]:
    """Regions for the tensors of `files` that `select` names (None: for whole files).

    Files follow one another, each from a page's start; a file of which nothing is selected takes nothing. A region is
    larger than `limit` bytes only if one file is.
    """
    regions: list[RegionLayout] = []
    group: list[RegionLayout] = []
    size = 0
    for one in (layout for file in files if (layout := _file(file, select)) is not None):
        if group and size + one.nbytes > limit:
            regions.append(_join(group))
            group, size = [], 0
        group.append(one)
        size += _page_up(one.nbytes)
    if group:
        regions.append(_join(group))
    return tuple(regions)


def _file(file: SafetensorsFile, select: Collection[str] | None) -> RegionLayout | None:
    """The layout of one file in a region of its own."""
    chosen = [t for t in file.tensors if select is None or t.name in select]
    if not chosen:
        return None
    if len(chosen) == len(file.tensors):
        whole = Extent(file.path, 0, file.size, 0)
        return RegionLayout(file.size, (whole,), tuple(Placement(t, t.start) for t in chosen))
    extents: list[Extent] = []
    position = 0
    for start, end in _ranges(chosen):
        extents.append(Extent(file.path, start, end - start, position))
        position = _page_up(position + end - start)
    nbytes = extents[-1].region_offset + extents[-1].nbytes if extents else 0
    return RegionLayout(nbytes, tuple(extents), tuple(_placements(chosen, extents)))


def _ranges(tensors: Iterable[FileTensor]) -> list[tuple[int, int]]:
    """Ranges of the file that cover `tensors`, each from a page's start to the end of a tensor."""
    ranges: list[tuple[int, int]] = []
    for tensor in tensors:
        end = tensor.start + tensor.nbytes
        if tensor.nbytes == 0:
            continue
        if ranges and tensor.start - ranges[-1][1] < MERGE_GAP:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((tensor.start // PAGE * PAGE, end))
    return ranges


def _placements(tensors: Iterable[FileTensor], extents: Sequence[Extent]) -> Iterator[Placement]:
    current, previous = 0, 0
    for tensor in tensors:
        if tensor.nbytes == 0:
            yield Placement(tensor, previous)
            continue
        while tensor.start >= extents[current].file_offset + extents[current].nbytes:
            current += 1
        placement = Placement(tensor, tensor.start - extents[current].file_offset + extents[current].region_offset)
        previous = placement.end
        yield placement


def _join(group: Sequence[RegionLayout]) -> RegionLayout:
    """One region of several files' layouts, one after the other."""
    extents: list[Extent] = []
    placements: list[Placement] = []
    base = end = 0
    for one in group:
        extents += [Extent(e.file, e.file_offset, e.nbytes, base + e.region_offset) for e in one.extents]
        placements += [Placement(p.tensor, base + p.offset) for p in one.placements]
        end = base + one.nbytes
        base = _page_up(end)
    return RegionLayout(max(end, 1), tuple(extents), tuple(placements))  # tensors without elements need a place too


def _page_up(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE
