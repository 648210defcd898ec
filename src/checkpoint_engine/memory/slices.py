"""Sums of slices of tensors, which add up to the tensor's sum wherever the slices lie (what the sums are: memory.checksum).

Every byte has the weight of its place in the whole tensor, and words are sums of bytes: so it does not matter where a slice cuts
words or chunks, nor how far apart its runs lie now.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from checkpoint_engine.memory.checksum import CHUNK_BYTES, chunk_sums, partial_sum, place_weights, row_sums
from checkpoint_engine.planning.slices import Slice

LONG_RUN = 16 * CHUNK_BYTES
"""Bytes from which on a run is summed up by itself."""
WINDOW_BYTES = 1 << 19
"""What is put together at a time, so that it is still in the cache when it is summed up."""
FEW_ROWS = 8
"""With fewer that begin at the same place of a chunk, it is as fast to put them where they lay."""
_CPU = torch.device("cpu")
_MASK = (1 << 64) - 1


def slice_sum(raw: torch.Tensor, offset: int, strides: Sequence[int], part: Slice) -> int:
    """The share of `part` in the sum of its tensor, modulo 2^64. Its bytes lie in `raw` (uint8, one-dimensional, contiguous, on a
    CPU): the first run at `offset`, the others `strides` bytes apart. None of part's bytes may be in it twice.

    Raises IndexError when that leaves `raw`.
    """
    end = offset + part.run + sum((n - 1) * s for n, s in zip(part.sizes, strides, strict=True))
    if offset < 0 or end > raw.numel():
        raise IndexError(f"a slice of bytes {offset} to {end} leaves a memory of {raw.numel()}")
    if not part.sizes:
        return _run(raw, offset, part.first, part.run) & _MASK
    if part.end - part.first <= WINDOW_BYTES and part.end - part.first <= 4 * part.nbytes:
        return _put_back(raw, offset, strides, part) & _MASK
    inner = max(range(len(part.sizes)), key=lambda d: part.sizes[d])
    outer = [d for d in range(len(part.sizes)) if d != inner]
    total = 0
    for index in itertools.product(*(range(part.sizes[d]) for d in outer)):
        at = offset + sum(i * strides[d] for i, d in zip(index, outer, strict=True))
        place = part.first + sum(i * part.strides[d] for i, d in zip(index, outer, strict=True))
        total += _rows(raw, at, strides[inner], place, part.strides[inner], part.sizes[inner], part.run)
    return total & _MASK


def _rows(raw: torch.Tensor, at: int, step: int, place: int, apart: int, count: int, run: int) -> int:
    """Of `count` runs, `step` bytes apart in `raw` and `apart` bytes apart in the tensor."""
    if run >= LONG_RUN or apart < run or apart > WINDOW_BYTES:
        return sum(_run(raw, at + n * step, place + n * apart, run) for n in range(count))
    period = CHUNK_BYTES // math.gcd(apart, CHUNK_BYTES)  # after so many rows the weights of words come again
    if step == run and not (run % CHUNK_BYTES or place % CHUNK_BYTES or apart % CHUNK_BYTES):
        return _whole_chunks(raw, at, place, apart, count, run)
    if count >= FEW_ROWS * period:
        return sum(
            _alike(raw, at + n * step, period * step, place + n * apart, period * apart, -(-(count - n) // period), run)
            for n in range(period)
        )
    block = max(1, WINDOW_BYTES // apart)
    blocks = ((n, min(block, count - n)) for n in range(0, count, block))
    return sum(_put_back(raw, at + n * step, (step,), Slice(place + n * apart, run, (rows,), (apart,))) for n, rows in blocks)


def _run(raw: torch.Tensor, at: int, place: int, run: int) -> int:
    """Of adjacent bytes."""
    head = min(run, -place % CHUNK_BYTES)
    total = _put_back(raw, at, (), Slice(place, head)) if head else 0
    if head < run:
        total += int(partial_sum(raw[at + head : at + run], (place + head) // CHUNK_BYTES))
    return total


def _put_back(raw: torch.Tensor, at: int, strides: Sequence[int], part: Slice) -> int:
    """By a copy of the tensor from the part's first byte to its last, with zeroes in between."""
    base = part.first // CHUNK_BYTES * CHUNK_BYTES
    window = torch.zeros(part.end - base, dtype=torch.uint8)
    shape = (*part.sizes, part.run)
    window.as_strided(shape, (*part.strides, 1), part.first - base).copy_(
        raw.as_strided(shape, (*strides, 1), raw.storage_offset() + at)
    )
    return int(partial_sum(window, base // CHUNK_BYTES))


def _whole_chunks(raw: torch.Tensor, at: int, place: int, apart: int, count: int, run: int) -> int:
    """Of runs of whole chunks, which lie one after the other in `raw`."""
    first, each = place // CHUNK_BYTES, run // CHUNK_BYTES
    places = place_weights(_CPU, (place + (count - 1) * apart + run) // CHUNK_BYTES)
    sums = chunk_sums(raw[at : at + count * run])
    return int(torch.dot(sums, places.as_strided((count, each), (apart // CHUNK_BYTES, 1), first).reshape(-1)))


def _alike(raw: torch.Tensor, at: int, step: int, place: int, apart: int, count: int, run: int) -> int:
    """Of rows that all begin at the same place of a chunk: piece by piece of a chunk, all rows together."""
    total, done = 0, 0
    chunks = apart // CHUNK_BYTES
    while done < run:
        chunk, begin = divmod(place + done, CHUNK_BYTES)
        width = min(run - done, CHUNK_BYTES - begin)
        sums = _piece(raw, at + done, step, count, begin, width)
        places = place_weights(_CPU, chunk + (count - 1) * chunks + 1)[chunk :: chunks or 1][:count]
        total += int(torch.dot(sums, places if chunks else places[:1].expand(count)))
        done += width
    return total


def _piece(raw: torch.Tensor, at: int, step: int, count: int, begin: int, width: int) -> torch.Tensor:
    """For each of `count` rows, the sum of W * u over its bytes [begin, begin + width) of a chunk. int64."""
    sums = torch.empty(count, dtype=torch.int64)
    if not (begin % 8 or width % 8 or step % 8):
        row_sums(raw.data_ptr() + at, sums, step // 8, begin // 8, width // 8)
        return sums
    first, words = begin // 8, -(-(begin + width) // 8) - begin // 8
    block = max(1, WINDOW_BYTES // (8 * words))
    for n in range(0, count, block):
        rows = min(block, count - n)
        padded = torch.zeros(rows, 8 * words, dtype=torch.uint8)
        padded[:, begin - 8 * first :][:, :width].copy_(
            raw.as_strided((rows, width), (step, 1), raw.storage_offset() + at + n * step)
        )
        row_sums(padded.data_ptr(), sums[n : n + rows], words, first, words)
    return sums
