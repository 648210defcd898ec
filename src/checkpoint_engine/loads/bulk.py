"""Large pieces of moves out of host memory, by the device's copy engine.

On an H200 it got 55 GB/s out of a PCIe 5 link from which the kernel read 49 (benchmarks/RESULTS.md), and it takes none of the
device's multiprocessors. Small pieces are the kernel's, at the same time.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from checkpoint_engine.devices.cudart import MAX_PITCH, runtime
from checkpoint_engine.loads.moves import Move

BULK_BYTES = 256 << 10
"""Of a run, 5 us of the link: about what a copy takes to start, it is assumed."""
MAX_COPIES = 256
"""Of one move; one that would take more calls is left to the kernel."""


class Rows(NamedTuple):
    """`height` rows of `width` bytes: from a memory, `source` bytes from its start, to an address."""

    memory: int
    source: int
    target: int
    width: int
    height: int
    source_pitch: int
    target_pitch: int


def in_bulk(move: Move, target: int) -> list[Rows]:
    """The move to `target`, an address, in copies of rows. Empty: it is none for the copy engine."""
    if move.run < BULK_BYTES:
        return []
    sizes, sources, targets = list(move.sizes), list(move.source_strides), list(move.target_strides)
    height, source_pitch, target_pitch = 1, move.run, move.run
    if sizes and move.run <= min(sources[-1], targets[-1]) and max(sources[-1], targets[-1]) <= MAX_PITCH:
        height, source_pitch, target_pitch = sizes.pop(), sources.pop(), targets.pop()
    if math.prod(sizes) > MAX_COPIES:
        return []
    rows = []
    for index in itertools.product(*map(range, sizes)):
        s = sum(i * step for i, step in zip(index, sources, strict=True))
        t = sum(i * step for i, step in zip(index, targets, strict=True))
        rows.append(Rows(move.memory, move.source + s, target + t, move.run, height, source_pitch, target_pitch))
    return rows


class BulkCopies:
    """What is queued on the current stream `beside` them runs at the same time; what comes after waits for both."""

    def __init__(self, rows: Sequence[Rows], device: torch.device) -> None:
        self._rows, self._device = tuple(rows), device
        self._side = _side(device)

    @contextlib.contextmanager
    def beside(self, bases: Sequence[int]) -> Iterator[None]:
        """bases: addresses of the memories. Raises DeviceError."""
        stream, side = torch.cuda.current_stream(self._device), self._side
        side.wait_stream(stream)
        try:
            for row in self._rows:
                source = bases[row.memory] + row.source
                runtime().memcpy_2d_async(
                    row.target, row.target_pitch, source, row.source_pitch, row.width, row.height, side.cuda_stream
                )
            yield
        finally:
            stream.wait_stream(side)


_sides: dict[torch.device, torch.cuda.Stream] = {}


def _side(device: torch.device) -> torch.cuda.Stream:
    if device not in _sides:
        _sides[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _sides[device]
