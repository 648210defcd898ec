"""The sums of a bucket's tensors in one launch: a Triton kernel over a table of descriptors. Imported only where it is used."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from checkpoint_engine.devices.compiling import make_ready
from checkpoint_engine.devices.digests import Layout
from checkpoint_engine.memory.checksum import CHUNK_BYTES, WORDS, partial_sum, place_weights, word_weights

ROWS = 4
"""Chunks that a program has in its registers at a time."""
TILE = 16
"""Chunks of one tensor that a program sums up before it adds them to the tensor's sum."""
PROGRAMS = 1
"""For each multiprocessor. Many times the rate at which bytes arrive, and most of the device is left to those who load them."""
WARPS = 4


class _Table:
    """A layout's descriptors on one device.

    runs   int64, (runs, 3): memory, offset, bytes
    tiles  int32, (tiles, 2): run, number of the tile in it; a bucket's are [starts[bucket], starts[bucket + 1])
    odd    numbers of the runs that do not start at a multiple of 8 bytes, by bucket: not in `tiles`
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        offset, nbytes = layout.table[:, 1], layout.table[:, 2]
        chunks = (nbytes + CHUNK_BYTES - 1) // CHUNK_BYTES
        count = torch.where(offset % 8 == 0, (chunks + TILE - 1) // TILE, 0)
        owner = torch.arange(len(count)).repeat_interleave(count)
        ends = count.cumsum(0)
        tiles = torch.stack([owner, torch.arange(len(owner)) - (ends - count)[owner]], 1).to(torch.int32)
        self.starts = torch.cat([ends.new_zeros(1), ends])[torch.tensor(layout.starts)].tolist()
        self.odd = [
            [run for run in range(*layout.starts[bucket : bucket + 2]) if layout.runs[run].offset % 8]
            for bucket in range(len(layout.starts) - 1)
        ]
        self.runs, self.tiles = layout.table.to(device), tiles.to(device)
        self.chunks = int(chunks.max()) if len(chunks) else 0


_tables: weakref.WeakKeyDictionary[Layout, dict[torch.device, _Table]] = weakref.WeakKeyDictionary()


def _table(layout: Layout, device: torch.device) -> _Table:
    """Kept as long as the layout is: 8 bytes of the device for every 64 KiB of tensors."""
    made = _tables.setdefault(layout, {})
    if device not in made:
        made[device] = _Table(layout, device)
    return made[device]


def compile_for(device: torch.device) -> None:
    """For arguments as KernelSums has them; see devices.compiling.make_ready."""
    pointers = torch.int64, torch.int32, torch.int64, torch.int64, torch.int64, torch.int64, torch.int64
    make_ready(_sum, device, *pointers, 0, 1, WORDS=WORDS, ROWS=ROWS, TILE=TILE, num_warps=WARPS)


class KernelSums:
    """See digests.Sums. Memories must start at multiples of 8 bytes, as all device memory does, and all mapped memory.

    device    that sums them up; None: the one that they are on. It reads those of the host that are registered with it
    programs  of a launch; None: one for each multiprocessor
    """

    def __init__(
        self,
        layout: Layout,
        memories: Sequence[torch.Tensor],
        device: torch.device | None = None,
        programs: int | None = None,
    ) -> None:
        self._layout, self._memories = layout, memories
        device = self._device = device or memories[0].device
        self._table = _table(layout, device)
        self._bases = torch.tensor([memory.data_ptr() for memory in memories], dtype=torch.int64).to(device)
        self._weights = (*word_weights(device), place_weights(device, max(1, self._table.chunks)))
        self.totals = torch.zeros(len(layout.runs), dtype=torch.int64, device=device)
        self._most = programs or 4
        if device.type == "cuda" and programs is None:
            self._most = PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count

    def add(self, bucket: int) -> None:
        first, end = self._table.starts[bucket : bucket + 2]
        if first < end:
            self._launch(first, end)
        for run in self._table.odd[bucket]:
            memory, offset, nbytes = self._layout.runs[run]
            self.totals[run] = partial_sum(self._memories[memory][offset : offset + nbytes])

    def _launch(self, first: int, end: int) -> None:
        arguments = (self._table.runs, self._table.tiles, self._bases, *self._weights, self.totals, first, end)
        grid, sizes = (min(self._most, end - first),), {"WORDS": WORDS, "ROWS": ROWS, "TILE": TILE}
        if self._device.type != "cuda":  # Triton's interpreter
            _sum[grid](*arguments, **sizes)
            return
        with torch.cuda.device(self._device):
            _sum[grid](*arguments, **sizes, num_warps=WARPS)


# No annotations but constexpr: the compiler would look their names up.


@triton.jit(do_not_specialize=["first", "end"])  # type: ignore[untyped-decorator, unused-ignore]
def _sum(  # type: ignore[no-untyped-def]
    runs, tiles, bases, low, high, places, totals, first, end, WORDS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr
):
    word = tl.arange(0, WORDS)[None, :]
    row = tl.arange(0, ROWS)
    low_weights, high_weights = tl.load(low + word), tl.load(high + word)  # for all tiles of this program
    byte = tl.arange(0, 8)
    for tile in range(first + tl.program_id(0), end, tl.num_programs(0)):
        run = tl.load(tiles + 2 * tile)
        chunk = tl.load(tiles + 2 * tile + 1).to(tl.int64) * TILE
        descriptor = runs + run * 3
        address = tl.load(bases + tl.load(descriptor)) + tl.load(descriptor + 1)
        nbytes = tl.load(descriptor + 2)
        whole = nbytes // 8  # words; up to 7 bytes are left, which make one more
        left = tl.load((address + whole * 8 + byte).to(tl.pointer_type(tl.uint8)), mask=byte < nbytes % 8, other=0)
        last = tl.sum(left.to(tl.int64) << (8 * byte).to(tl.int64), axis=0)
        total = tl.zeros((ROWS,), dtype=tl.int64)
        for step in range(0, TILE, ROWS):
            number = chunk + step + row
            place = number[:, None] * WORDS + word
            x = tl.load((address + place * 8).to(tl.pointer_type(tl.int64)), mask=place < whole, other=0)
            x = tl.where(place == whole, last, x)
            s = tl.sum((x & 0xFFFFFFFF) * low_weights + ((x >> 32) & 0xFFFFFFFF) * high_weights, axis=1)
            inside = number * (WORDS * 8) < nbytes
            total += tl.where(inside, s * tl.load(places + number, mask=inside, other=0), 0)
        tl.atomic_add(totals + run, tl.sum(total, axis=0), sem="relaxed")
