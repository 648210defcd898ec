"""Digests of a model's storages, made on the device that holds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from checkpoint_engine.devices.digests import Layout, Run, make_sums
from checkpoint_engine.memory.checksum import finish


def storage_digests(storages: Sequence[torch.Tensor]) -> list[int]:
    """Of each of `storages` (uint8, one-dimensional), as memory.checksum makes them. Blocks until the devices are done."""
    result = [0] * len(storages)
    for device in {raw.device for raw in storages}:
        mine = [number for number, raw in enumerate(storages) if raw.device == device]
        raws = [storages[number] for number in mine]
        sums = make_sums(Layout([[Run(number, 0, raw.numel()) for number, raw in enumerate(raws)]]), raws)
        sums.add(0)
        for number, total in zip(mine, sums.totals.tolist(), strict=True):
            result[number] = finish(int(total), storages[number].numel())
    return result
