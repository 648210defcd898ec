"""Digests of a model's storages, made on the device that holds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

CHUNK_BYTES = 16 << 20
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio: neighbours' weights differ in most bits


def storage_digests(storages: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
    """64 bits for every 16 MiB of each of `storages` (uint8, one-dimensional). Blocks until the device is done.

    The sum of the 8-byte words, each times an odd weight of its own, modulo 2^64: one changed word always shows, and so do two
    that changed places. Takes 48 MiB of the device's memory meanwhile.
    """
    words = -(-min(CHUNK_BYTES, max((raw.numel() for raw in storages), default=0)) // 8)
    weights = {d: (torch.arange(words, device=d) * 2 + 1) * _ODD for d in {raw.device for raw in storages}}
    sums = [[_digest(chunk, weights[raw.device]) for chunk in torch.split(raw, CHUNK_BYTES)] for raw in storages]
    flat = [value for chunks in sums for value in chunks]
    values = iter(_fetch(flat))
    return [tuple(next(values) for _ in chunks) for chunks in sums]


def _fetch(sums: list[torch.Tensor]) -> list[int]:
    """All values, with one transfer for each device."""
    result = [0] * len(sums)
    for device in {s.device for s in sums}:
        mine = [index for index, s in enumerate(sums) if s.device == device]
        for index, value in zip(mine, torch.stack([sums[i] for i in mine]).tolist(), strict=True):
            result[index] = value
    return result


def _digest(chunk: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    if chunk.numel() % 8 or chunk.data_ptr() % 8:
        padded = chunk.new_zeros(-(-chunk.numel() // 8) * 8)
        padded[: chunk.numel()] = chunk
        chunk = padded
    words = chunk.view(torch.int64)
    return (words * weights[: words.numel()]).sum()
