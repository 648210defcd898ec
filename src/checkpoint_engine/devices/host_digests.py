"""Checking host memory against its digests in threads, several buckets ahead of whoever loads them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import NamedTuple

import torch

from checkpoint_engine.devices.base import Closing
from checkpoint_engine.devices.busy import Busy
from checkpoint_engine.devices.digests import Layout, Mismatch
from checkpoint_engine.errors import DeadlineError
from checkpoint_engine.memory.checksum import CHUNK_BYTES, finish, run_sums
from checkpoint_engine.planning.digests import unpack

THREADS = 4
"""At most. Each sums up 5 to 7 GB/s; a loader copies at about the rate of two of them."""
BLOCK_BYTES = 2 << 20
"""What a thread takes at a time, of one large tensor or of several small ones."""


AtWork = Callable[[int, float, float, int], None]
"""(bucket, beginning and end by `time.perf_counter`, bytes) of digests that were made."""


class _Part(NamedTuple):
    """Bytes [first, first + nbytes) of run number `run`; first is a multiple of CHUNK_BYTES."""

    run: int
    first: int
    nbytes: int


class HostVerifier(Closing):
    """Checks the buckets of one pass in host memory. For each bucket `begin`, then `mismatches`; begin as many ahead as you like.

    seconds: in which any thread made digests; nbytes: of tensors that were, or are being, checked.
    """

    def __init__(
        self,
        layout: Layout,
        expected: bytes,
        memories: Sequence[torch.Tensor],
        threads: int | None = None,
        at_work: AtWork | None = None,
    ) -> None:
        """See digests.Verifier; the memories are this process's own, or mapped. at_work: called in the threads that make digests.
        Raises ValueError as Verifier does."""
        if len(expected) != 8 * len(layout.runs):
            raise ValueError(f"{len(expected)} bytes of digests for {len(layout.runs)} tensors")
        self._layout, self._memories = layout, memories
        self._expected = unpack(expected)
        threads = threads or min(THREADS, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")
        self._begun: dict[int, list[Future[list[tuple[int, int]]]]] = {}
        self._busy, self._at_work = Busy(), at_work
        self.nbytes = 0

    @property
    def seconds(self) -> float:
        return self._busy.seconds

    def begin(self, bucket: int, items: Iterable[int] | None = None) -> None:
        """Its bytes are there. items: numbers of those of its tensors that matter; None: all. Never waits.

        Raises IndexError when there is no such bucket or item.
        """
        first, end = self._layout.starts[bucket], self._layout.starts[bucket + 1]
        wanted = range(first, end) if items is None else [first + item for item in items]
        checked = [run for run in wanted if self._expected[run] and self._layout.runs[run].nbytes]
        self.nbytes += sum(self._layout.runs[run].nbytes for run in checked)
        self._begun[bucket] = [self._pool.submit(self._sum, bucket, unit) for unit in self._units(checked)]

    def _units(self, runs: Iterable[int]) -> Iterator[list[_Part]]:
        unit: list[_Part] = []
        size = 0
        for run in runs:
            nbytes = self._layout.runs[run].nbytes
            for first in range(0, nbytes, BLOCK_BYTES):
                part = _Part(run, first, min(BLOCK_BYTES, nbytes - first))
                unit.append(part)
                size += max(part.nbytes, CHUNK_BYTES)
                if size >= BLOCK_BYTES:
                    yield unit
                    unit, size = [], 0
        if unit:
            yield unit

    def _sum(self, bucket: int, unit: list[_Part]) -> list[tuple[int, int]]:
        """(run, sum of the part's chunks) for each."""
        start = time.perf_counter()
        with self._busy:
            sums = run_sums([self._bytes(part) for part in unit], [part.first // CHUNK_BYTES for part in unit])
        if self._at_work is not None:
            self._at_work(bucket, start, time.perf_counter(), sum(part.nbytes for part in unit))
        return [(part.run, total) for part, total in zip(unit, sums, strict=True)]

    def _bytes(self, part: _Part) -> torch.Tensor:
        memory, offset, _ = self._layout.runs[part.run]
        return self._memories[memory][offset + part.first : offset + part.first + part.nbytes]

    def mismatches(self, bucket: int, seconds: float) -> list[Mismatch]:
        """The tensors of a bucket that was begun whose bytes do not have their digest. Waits for them.

        Raises DeadlineError when that takes longer than `seconds`.
        """
        deadline = time.monotonic() + seconds
        totals: dict[int, int] = {}
        for future in self._begun.pop(bucket):
            try:
                sums = future.result(max(0.0, deadline - time.monotonic()))
            except NotYet:
                raise DeadlineError(f"the digests of bucket {bucket} to be made", seconds) from None
            for run, total in sums:
                totals[run] = totals.get(run, 0) + total
        runs, first = self._layout.runs, self._layout.starts[bucket]
        wrong = [run for run, total in totals.items() if finish(total, runs[run].nbytes) != self._expected[run]]
        return [Mismatch(bucket, run - first) for run in sorted(wrong)]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
