"""Digests of a model's storages, made on the device that holds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from checkpoint_engine.devices.digests import Layout, Run, Sums, TorchSums, kernel_works
from checkpoint_engine.memory.checksum import finish


def storage_digests(storages: Sequence[torch.Tensor]) -> list[int]:
    """Of each of `storages` (uint8, one-dimensional), as memory.checksum makes them. Blocks until the devices are done."""
    result = [0] * len(storages)
    for device in {raw.device for raw in storages}:
        mine = [number for number, raw in enumerate(storages) if raw.device == device]
        for number, total in zip(mine, _sums([storages[number] for number in mine], device), strict=True):
            result[number] = finish(total, storages[number].numel())
    return result


def _sums(raws: Sequence[torch.Tensor], device: torch.device) -> list[int]:
    """Of all of one device, by few launches: torch's operations take six for every 8 MiB."""
    sums: Sums
    layout = Layout([[Run(number, 0, raw.numel()) for number, raw in enumerate(raws)]])
    aligned = all(raw.data_ptr() % 8 == 0 for raw in raws)
    if device.type == "cuda" and aligned and kernel_works(device):
        from checkpoint_engine.devices.digest_kernel import KernelSums

        sums = KernelSums(layout, raws)
    else:
        sums = TorchSums(layout, raws)
    sums.add(0)
    return [int(total) for total in sums.totals.tolist()]
