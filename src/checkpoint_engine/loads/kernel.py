"""The moves of a bucket in one launch: a Triton kernel over a table of descriptors. Imported only where it is used.

Large pieces of host memory are left to the copy engine (loads.bulk).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from checkpoint_engine.devices.compiling import finish, make_ready
from checkpoint_engine.loads.bulk import Block, BulkCopies, in_bulk
from checkpoint_engine.loads.moves import MAX_DIMS, Move, Storages

BLOCK = 1024
"""Units (16 bytes, or what the alignment allows) that a program moves at a time."""
HOST_PROGRAMS = 32
"""Programs when a source is in host memory: 16 to 32 fill a PCIe 5 link (50.5 of 54 GB/s on an H200) and leave the rest of the
device alone."""
COLUMNS = 16
"""Of a descriptor."""
WARPS = 8
"""Of a program."""
_MAX_UNITS = (1 << 31) - BLOCK


def compile_for(device: torch.device) -> None:
    """For arguments as `_launch` has them; see devices.compiling.make_ready."""
    sizes = {"BLOCK": BLOCK, "COLUMNS": COLUMNS}
    make_ready(_gather, device, torch.int64, torch.int32, torch.int64, 0, **sizes, num_warps=WARPS)


def _launch(programs: int, table: torch.Tensor, tiles: torch.Tensor, bases: torch.Tensor, count: int) -> None:
    """On the current stream."""
    if table.device.type != "cuda":  # Triton's interpreter
        _gather[(programs,)](table, tiles, bases, count, BLOCK=BLOCK, COLUMNS=COLUMNS)
        return
    with torch.cuda.device(table.device):
        _gather[(programs,)](table, tiles, bases, count, BLOCK=BLOCK, COLUMNS=COLUMNS, num_warps=WARPS)


class Gather:
    """Descriptors of one bucket, on the device once they have been used. Ran on the current stream."""

    def __init__(self, found: Sequence[Move], storages: Storages) -> None:
        self._moves, self._storages = found, storages
        self._device = storages[found[0].storage].device if found else torch.device("cpu")
        self._made_for: tuple[tuple[int, bool], ...] | None = None  # of each memory: base modulo 16, whether it is the host's
        self._bases: tuple[int, ...] = ()
        self._bulk: BulkCopies | None = None

    def run(self, memories: Sequence[torch.Tensor]) -> None:
        if not self._moves:
            return
        bases = tuple(memory.data_ptr() for memory in memories)
        kinds = tuple((base % 16, memory.device.type == "cpu") for base, memory in zip(bases, memories, strict=True))
        if self._made_for != kinds:
            finish(compile_for, self._device)
            self._make(kinds)
        if self._bases != bases:
            self._bases_there = torch.tensor(bases, dtype=torch.int64).to(self._device)
            self._bases = bases
        with self._bulk.beside(bases) if self._bulk is not None else contextlib.nullcontext():
            if tiles := self._tiles.shape[0]:
                programs = HOST_PROGRAMS if any(host for _, host in kinds) else self._many()
                _launch(min(programs, tiles), self._table, self._tiles, self._bases_there, tiles)

    def _many(self) -> int:
        if self._device.type != "cuda":
            return HOST_PROGRAMS
        return 4 * torch.cuda.get_device_properties(self._device).multi_processor_count

    def _make(self, kinds: tuple[tuple[int, bool], ...]) -> None:
        rows: list[list[int]] = []
        bulk: list[Block] = []
        for move in self._moves:
            target = self._storages[move.storage].data_ptr() + move.target
            alignment, host = kinds[move.memory]
            if host and self._device.type == "cuda" and (large := in_bulk(move, target)):
                bulk += large
            else:
                rows += descriptors(move, target, math.gcd(move.unit, alignment, target))
        table = torch.tensor(rows, dtype=torch.int64).view(-1, COLUMNS)
        self._table, self._tiles = table.to(self._device), tiled(table, BLOCK).to(self._device)
        self._bulk = BulkCopies(bulk, self._device) if bulk else None
        self._made_for = kinds


def tiled(table: torch.Tensor, units: int) -> torch.Tensor:
    """int32, (tiles, 2): number of a descriptor, and of the tile of so many units in it; in their order."""
    tiles = (table[:, 5] + units - 1) // units
    owner = torch.arange(len(table)).repeat_interleave(tiles)
    first = (tiles.cumsum(0) - tiles)[owner]
    return torch.stack([owner, torch.arange(len(owner)) - first], 1).to(torch.int32)


def descriptors(move: Move, target: int, unit: int) -> list[list[int]]:
    """int64 each: memory, source, target's address, unit, units a run, units in all, sizes, and strides on both sides.

    One, unless it has more units than 32 bits count: then its longest side is cut.
    """
    units = move.nbytes // unit
    if units > _MAX_UNITS:
        sizes = (*move.sizes, move.run // unit)
        dim = max(range(len(sizes)), key=lambda d: sizes[d])
        half = sizes[dim] // 2
        if dim == len(move.sizes):
            parts = [
                (move._replace(run=half * unit), 0, 0),
                (move._replace(run=move.run - half * unit), half * unit, half * unit),
            ]
        else:
            s, t = move.source_strides[dim] * half, move.target_strides[dim] * half
            resized = [(*move.sizes[:dim], n, *move.sizes[dim + 1 :]) for n in (half, sizes[dim] - half)]
            parts = [(move._replace(sizes=resized[0]), 0, 0), (move._replace(sizes=resized[1]), s, t)]
        return [row for part, s, t in parts for row in descriptors(part._replace(source=part.source + s), target + t, unit)]
    pad = (0,) * (MAX_DIMS - len(move.sizes))
    sizes = (*(1 for _ in pad), *move.sizes)
    return [
        [
            *(move.memory, move.source, target, unit, move.run // unit, units),
            *(*sizes, *pad, *move.source_strides, *pad, *move.target_strides, 0),
        ]
    ]


# No annotations but constexpr: the compiler would look their names up.


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def unit_places(row, lane):  # type: ignore[no-untyped-def]
    # Of the units of these numbers, as a descriptor has it: bytes from the source's memory's start, and the target's address.
    unit, run = tl.load(row + 3), tl.load(row + 4).to(tl.int32)
    n1, n2 = tl.load(row + 7).to(tl.int32), tl.load(row + 8).to(tl.int32)
    outer = lane // run
    within = (lane % run).to(tl.int64) * unit
    i2, outer = (outer % n2).to(tl.int64), outer // n2
    i1, i0 = (outer % n1).to(tl.int64), (outer // n1).to(tl.int64)
    source = tl.load(row + 1) + within
    source += i0 * tl.load(row + 9) + i1 * tl.load(row + 10) + i2 * tl.load(row + 11)
    target = tl.load(row + 2) + within
    target += i0 * tl.load(row + 12) + i1 * tl.load(row + 13) + i2 * tl.load(row + 14)
    return source, target


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _move(source, target, mask, kind: tl.constexpr, words: tl.constexpr, bytes_: tl.constexpr):  # type: ignore[no-untyped-def]
    # The hint is what makes one 16-byte access of two words.
    source = tl.multiple_of(source.to(tl.pointer_type(kind)), bytes_)
    target = tl.multiple_of(target.to(tl.pointer_type(kind)), bytes_)
    word = tl.arange(0, words)[None, :]
    values = tl.load(source[:, None] + word, mask=mask[:, None])
    tl.store(target[:, None] + word, values, mask=mask[:, None])


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator, unused-ignore]  # else 1 and multiples of 16 compile anew
def _gather(table, tiles, bases, count, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    for tile in range(tl.program_id(0), count, tl.num_programs(0)):
        row = table + tl.load(tiles + 2 * tile) * COLUMNS
        lane = tl.load(tiles + 2 * tile + 1) * BLOCK + tl.arange(0, BLOCK)
        mask = lane < tl.load(row + 5).to(tl.int32)
        source, target = unit_places(row, lane)
        source += tl.load(bases + tl.load(row))
        unit = tl.load(row + 3)
        if unit == 16:
            _move(source, target, mask, tl.int64, 2, 16)
        elif unit == 8:
            _move(source, target, mask, tl.int64, 1, 8)
        elif unit == 4:
            _move(source, target, mask, tl.int32, 1, 4)
        elif unit == 2:
            _move(source, target, mask, tl.int16, 1, 2)
        else:
            _move(source, target, mask, tl.int8, 1, 1)
