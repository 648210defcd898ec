"""Large pieces of moves out of host memory, by the device's copy engine.

On an H200 it got 55 GB/s out of a PCIe 5 link from which the kernel read 49, also in rows of 768 bytes, but 50 in pieces of
1.5 MiB and 35 in pieces of 256 KiB: it pauses for some 3 us between two (benchmarks/RESULTS.md). It takes none of the device's
multiprocessors. What it is not asked for the kernel moves at the same time.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from checkpoint_engine.devices.cudart import MAX_PITCH, Side, runtime
from checkpoint_engine.loads.moves import Move

BULK_BYTES = 4 << 20
"""Of a copy, at the least: 75 us of the link."""
ROW_BYTES = 256
"""Of a row, at the least; shorter ones were not measured."""
MAX_COPIES = 256
"""Of one move; one that would take more calls is left to the kernel."""


class Block(NamedTuple):
    """`depth` layers of `height` rows of `width` bytes: from a memory, `source` bytes from its start, to an address. pitch: bytes
    from row to row, where there are several; rows: from layer to layer."""

    memory: int
    source: int
    target: int
    width: int
    height: int = 1
    depth: int = 1
    source_pitch: int = 0
    target_pitch: int = 0
    source_rows: int = 1
    target_rows: int = 1

    @property
    def nbytes(self) -> int:
        return self.width * self.height * self.depth


def in_bulk(move: Move, target: int) -> list[Block]:
    """The move to `target`, an address, in few copies. Empty: it is none for the copy engine."""
    if move.run < ROW_BYTES:
        return []
    dims = list(zip(move.sizes, move.source_strides, move.target_strides, strict=True))
    block = Block(move.memory, move.source, target, move.run, source_pitch=move.run, target_pitch=move.run)
    if dims and move.run <= min(dims[-1][1:]) and max(dims[-1][1:]) <= MAX_PITCH:
        height, source_pitch, target_pitch = dims.pop()
        block = block._replace(height=height, source_pitch=source_pitch, target_pitch=target_pitch)
        if dims and _layered(block, *dims[-1][1:]):
            depth, source_step, target_step = dims.pop()
            block = block._replace(depth=depth, source_rows=source_step // source_pitch, target_rows=target_step // target_pitch)
    if block.nbytes < BULK_BYTES or math.prod(size for size, _, _ in dims) > MAX_COPIES:
        return []
    blocks = []
    for index in itertools.product(*(range(size) for size, _, _ in dims)):
        s = sum(i * step for i, (_, step, _) in zip(index, dims, strict=True))
        t = sum(i * step for i, (_, _, step) in zip(index, dims, strict=True))
        blocks.append(block._replace(source=move.source + s, target=target + t))
    return blocks


def _layered(block: Block, source_step: int, target_step: int) -> bool:
    """Whether its rows, again after so many bytes, are a further layer to CUDA: whole rows away, and behind all rows."""
    whole = source_step % block.source_pitch == target_step % block.target_pitch == 0
    return whole and min(source_step // block.source_pitch, target_step // block.target_pitch) >= block.height


class BulkCopies:
    """What is queued on the current stream `beside` them runs at the same time; what comes after waits for both."""

    def __init__(self, blocks: Sequence[Block], device: torch.device) -> None:
        self._blocks, self._device = tuple(blocks), device
        self._side = _side(device)

    @contextlib.contextmanager
    def beside(self, bases: Sequence[int]) -> Iterator[None]:
        """bases: addresses of the memories. Raises DeviceError."""
        stream, side = torch.cuda.current_stream(self._device), self._side
        side.wait_stream(stream)
        try:
            for block in self._blocks:
                _queue(block, bases[block.memory] + block.source, side.cuda_stream)
            yield
        finally:
            stream.wait_stream(side)


def _queue(block: Block, source: int, stream: int) -> None:
    if block.depth > 1:
        into, out_of = (
            Side(block.target, block.target_pitch, block.target_rows),
            Side(source, block.source_pitch, block.source_rows),
        )
        runtime().memcpy_3d_async(into, out_of, block.width, block.height, block.depth, stream)
    elif block.height == 1:
        runtime().memcpy_async(block.target, source, block.width, stream)
    else:
        pitches = block.target_pitch, block.source_pitch
        runtime().memcpy_2d_async(block.target, pitches[0], source, pitches[1], block.width, block.height, stream)


_sides: dict[torch.device, torch.cuda.Stream] = {}


def _side(device: torch.device) -> torch.cuda.Stream:
    if device not in _sides:
        _sides[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _sides[device]
