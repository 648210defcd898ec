"""Large pieces of moves out of host memory, by the device's copy engine.

It gets 55 GB/s out of a PCIe 5 link from which no kernel reads more than 49 (H200; benchmarks/RESULTS.md), and takes none of the
device's multiprocessors. Small pieces are the kernel's, at the same time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from checkpoint_engine.devices.cudart import MAX_PITCH, runtime
from checkpoint_engine.loads.moves import Move

BULK_BYTES = 256 << 10
"""Of a run: a copy of fewer takes longer to start than to make."""
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
    """`start` queues them behind the current stream, beside what is queued there next; `join` lets that stream wait for them."""

    def __init__(self, rows: Sequence[Rows], device: torch.device) -> None:
        self._rows, self._device = tuple(rows), device
        self._side = _side(device)

    def start(self, bases: Sequence[int]) -> None:
        """bases: addresses of the memories. Raises DeviceError."""
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        copy, stream = runtime().memcpy_2d_async, self._side.cuda_stream
        for row in self._rows:
            source = bases[row.memory] + row.source
            copy(row.target, row.target_pitch, source, row.source_pitch, row.width, row.height, stream)

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._side)


_sides: dict[torch.device, torch.cuda.Stream] = {}


def _side(device: torch.device) -> torch.cuda.Stream:
    if device not in _sides:
        _sides[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _sides[device]
