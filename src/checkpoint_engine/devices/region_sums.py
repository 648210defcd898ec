"""Sums of tensors in host memory that is registered with a GPU, made by the GPU while the CPU's cores do something else."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from checkpoint_engine.devices.base import Device
from checkpoint_engine.devices.compiling import COMPILE_SECONDS, begin, finish
from checkpoint_engine.devices.digests import Layout, Run, kernel_works

log = logging.getLogger(__name__)

PROGRAMS = 32
"""Of a launch: enough to fill a PCIe 5 link (loads.kernel), and the rest of the device is left alone."""
LAUNCH_BYTES = 256 << 20
"""Of tensors that are summed up by one launch, 5 ms of the link: others may want the device in between."""
BYTES_PER_SECOND = 1e9
"""Of a link, at the least; one of PCIe 5 has 55 times that."""


class DeviceSums:
    """See memory.digest.RegionSums. By one CUDA device, as fast as its link: 16 threads on an H200's host made 6 GB/s beside
    their copies, of which the link has 55."""

    def __init__(self, device: Device, torch_device: torch.device) -> None:
        self._device, self._torch_device = device, torch_device

    def prepare(self) -> bool:
        """The kernel is compiled in a thread."""
        return begin(kernel_works, self._torch_device) or kernel_works(self._torch_device)

    def __call__(self, memory: torch.Tensor, runs: Sequence[tuple[int, int]]) -> list[int] | None:
        if not (finish(kernel_works, self._torch_device) and kernel_works(self._torch_device)):
            return None
        try:
            return self._sum(memory, runs)
        except Exception as e:  # of any kind: the CPU can do it
            log.warning("digests are made by the CPU, not by %s: %s", self._device.name, e)
            return None

    def _sum(self, memory: torch.Tensor, runs: Sequence[tuple[int, int]]) -> list[int] | None:
        from checkpoint_engine.devices.digest_kernel import KernelSums

        groups: list[list[Run]] = [[]]
        size = 0
        for offset, nbytes in runs:
            groups[-1].append(Run(0, offset, nbytes))
            size += nbytes
            if size >= LAUNCH_BYTES:
                groups.append([])
                size = 0
        seconds = COMPILE_SECONDS + sum(nbytes for _, nbytes in runs) / BYTES_PER_SECOND
        with torch.cuda.device(self._torch_device), torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            sums = KernelSums(Layout(groups), [memory], self._torch_device, PROGRAMS)
            for group in range(len(groups)):
                sums.add(group)
            if not self._device.mark().wait(seconds):
                raise TimeoutError(f"they were not made in {seconds:.0f} s")
            return [int(total) for total in sums.totals.tolist()]
