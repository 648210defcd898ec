"""The sums of slices (memory.checksum, memory.slices) on the device where they lie: a kernel over loads.kernel's descriptors.

Imported only where it is used.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from checkpoint_engine.devices.compiling import finish, make_ready
from checkpoint_engine.loads.geometry import extent
from checkpoint_engine.loads.kernel import COLUMNS, descriptors, tiled, unit_places
from checkpoint_engine.loads.moves import MAX_DIMS, Move, split
from checkpoint_engine.memory.checksum import CHUNK_BYTES, place_weights, word_weights

BLOCK = 1024
"""Units (words of 8 bytes, or bytes where anything is not aligned) that a program has in its registers at a time."""
TILE = 8 * BLOCK
"""Units that it sums up before it adds them to the slice's sum."""
PROGRAMS = 2
"""For each multiprocessor."""
WARPS = 8
"""Of a program."""
_SIZES = {"BLOCK": BLOCK, "TILE": TILE, "COLUMNS": COLUMNS, "CHUNK": CHUNK_BYTES}


def compile_for(device: torch.device) -> None:
    """For arguments as SliceTable has them; see devices.compiling.make_ready."""
    pointers = torch.int64, torch.int32, torch.int64, torch.int64, torch.int64, torch.int64
    make_ready(_sum, device, *pointers, 0, 1, **_SIZES, num_warps=WARPS)


class SliceTable:
    """Slices that lie where they lie, bucket by bucket: descriptors on the device, 8 bytes for every 64 KiB.

    nbytes: of the slices of each bucket
    """

    def __init__(self, buckets: Iterable[Iterable[Move]], device: torch.device) -> None:
        """Of a Move: `memory` is the number of the sum that it adds to, `source` the place of its first byte in its tensor,
        `target` its address; strides accordingly."""
        rows: list[list[int]] = []
        self.nbytes: list[int] = []
        ends, end = [0], 0
        for bucket in buckets:
            self.nbytes.append(0)
            for move in bucket:
                self.nbytes[-1] += move.nbytes
                end = max(end, move.source + extent(move.run, move.sizes, move.source_strides))
                rows += [row for part in split(move, MAX_DIMS) for row in descriptors(part, part.target, _unit(part))]
            ends.append(len(rows))
        table = torch.tensor(rows, dtype=torch.int64).view(-1, COLUMNS)
        tiles = tiled(table, TILE)
        self._starts = torch.searchsorted(tiles[:, 0].contiguous(), torch.tensor(ends, dtype=torch.int32)).tolist()
        self._device, self._table, self._tiles = device, table.to(device), tiles.to(device)
        self._weights = (*word_weights(device), place_weights(device, max(1, -(-end // CHUNK_BYTES))))

    def add(self, bucket: int, totals: torch.Tensor) -> None:
        """Queue the sums of a bucket's slices on the current stream. totals: int64, on the device; is added to."""
        first, end = self._starts[bucket : bucket + 2]
        if first == end:
            return
        arguments = (self._table, self._tiles, *self._weights, totals, first, end)
        if self._device.type != "cuda":  # Triton's interpreter
            _sum[(min(4, end - first),)](*arguments, **_SIZES)
            return
        finish(compile_for, self._device)
        most = PROGRAMS * torch.cuda.get_device_properties(self._device).multi_processor_count
        with torch.cuda.device(self._device):
            _sum[(min(most, end - first),)](*arguments, **_SIZES, num_warps=WARPS)


def _unit(move: Move) -> int:
    return 8 if move.unit >= 8 else 1


# No annotations but constexpr: the compiler would look their names up.


@triton.jit(do_not_specialize=["first", "end"])  # type: ignore[untyped-decorator, unused-ignore]
def _sum(  # type: ignore[no-untyped-def]
    table,
    tiles,
    low,
    high,
    places,
    totals,
    first,
    end,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    for tile in range(first + tl.program_id(0), end, tl.num_programs(0)):
        row = table + tl.load(tiles + 2 * tile) * COLUMNS
        unit, count = tl.load(row + 3), tl.load(row + 5).to(tl.int32)
        total = tl.zeros((BLOCK,), dtype=tl.int64)
        for step in range(0, TILE, BLOCK):
            lane = tl.load(tiles + 2 * tile + 1) * TILE + step + tl.arange(0, BLOCK)
            mask = lane < count
            place, address = unit_places(row, lane)
            word = (place % CHUNK) // 8
            even, odd = tl.load(low + word, mask=mask, other=0), tl.load(high + word, mask=mask, other=0)
            if unit == 8:
                x = tl.load(address.to(tl.pointer_type(tl.int64)), mask=mask, other=0)
                found = (x & 0xFFFFFFFF) * even + ((x >> 32) & 0xFFFFFFFF) * odd
            else:
                byte = tl.load(address.to(tl.pointer_type(tl.uint8)), mask=mask, other=0).to(tl.int64)
                found = (byte << (8 * (place % 4))) * tl.where(place % 8 < 4, even, odd)
            total += found * tl.load(places + place // CHUNK, mask=mask, other=0)
        tl.atomic_add(totals + tl.load(row), tl.sum(total, axis=0), sem="relaxed")
