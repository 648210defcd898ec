"""How fast one process copies: by the CPU, and by a stream of a device."""

from __future__ import annotations

import ctypes
import time

import torch

from checkpoint_engine.devices.base import Stream
from checkpoint_engine.errors import DeadlineError

_IN_FLIGHT = 4  # copies queued at once, so that none waits for Python


def memcpy_rate(target: torch.Tensor, source: torch.Tensor, seconds: float) -> float:
    """Bytes/second of libc's memmove in one thread; the best of the rounds that fit into `seconds`, at least two."""
    best, until, rounds = 0.0, time.perf_counter() + seconds, 0
    while rounds < 2 or time.perf_counter() < until:
        start = time.perf_counter()
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.numel())
        best, rounds = max(best, source.numel() / (time.perf_counter() - start)), rounds + 1
    return best


def copy_rate(stream: Stream, target: torch.Tensor, source: torch.Tensor, seconds: float, timeout: float) -> float:
    """Bytes/second of a stream's copies, timed by its events, over `seconds` (at least one round of a few copies)."""
    busy, nbytes, until = 0.0, 0, time.perf_counter() + seconds
    while True:
        since = stream.record()
        for _ in range(_IN_FLIGHT):
            stream.copy(target, source)
        end = stream.record()
        if not end.wait(timeout):
            raise DeadlineError(f"copies of {source.numel()} bytes", timeout)
        busy, nbytes = busy + stream.busy(since, end), nbytes + _IN_FLIGHT * source.numel()
        if time.perf_counter() >= until:
            return nbytes / busy
