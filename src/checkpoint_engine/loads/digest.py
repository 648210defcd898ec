"""Digests of a model's storages, made on the device that holds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from checkpoint_engine.memory.checksum import finish, partial_sum


def storage_digests(storages: Sequence[torch.Tensor]) -> list[int]:
    """Of each of `storages` (uint8, one-dimensional), as memory.checksum makes them. Blocks until the devices are done."""
    sums = _fetch([partial_sum(raw) for raw in storages])
    return [finish(total, raw.numel()) for total, raw in zip(sums, storages, strict=True)]


def _fetch(sums: list[torch.Tensor]) -> list[int]:
    """All values, with one transfer for each device."""
    result = [0] * len(sums)
    for device in {s.device for s in sums}:
        mine = [index for index, s in enumerate(sums) if s.device == device]
        for index, value in zip(mine, torch.stack([sums[i] for i in mine]).tolist(), strict=True):
            result[index] = value
    return result
