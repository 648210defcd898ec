"""The collective on CUDA: our own communicator on the NCCL library that torch has loaded (reasons: docs/notes-cuda.md)."""

from __future__ import annotations

import datetime
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from checkpoint_engine.devices.base import Device, Stream
from checkpoint_engine.devices.cuda import CudaDevice, CudaStream
from checkpoint_engine.devices.nccl import NcclCommunicator, unique_id
from checkpoint_engine.errors import DeadlineError, DeviceError
from checkpoint_engine.settings import Settings
from checkpoint_engine.transport.collective import StreamCollective

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


def channels(world_size: int) -> int:
    """How many channels a communicator gets. Each costs 18 MiB of device memory for as long as it lives, and a core of the
    device while it works; measured on 2 x H200, 64 MiB pieces: 8 channels share at 247 GB/s, 16 at 307, NCCL's own choice
    of 24 at 308. Up to 4 devices lift no more than 8 channels share."""
    return 8 if world_size <= 4 else 16


CHANNEL_BYTES = 18 << 20
"""Of device memory, measured on H200: see `channels`."""


class NcclCollective(StreamCollective):
    """Broadcasts are queued on the caller's stream and never block the host after the first."""

    def __init__(self, device: Device, rank: int, world_size: int, store: Store, settings: Settings) -> None:
        super().__init__(settings.timeout)
        if not isinstance(device, CudaDevice):
            raise DeviceError("NCCL", 0, f"there is no NCCL on a device of kind {device.name}")
        join_seconds = settings.join_timeout
        if rank == 0:
            store.set("id", unique_id().hex())
        try:
            store.wait(["id"], datetime.timedelta(seconds=join_seconds))
            token = bytes.fromhex(store.get("id").decode())
        except RuntimeError as e:  # torch's store errors
            reason = str(e).splitlines()[0]
            raise DeadlineError(f"the first of {world_size} ranks to begin an NCCL communicator ({reason})", join_seconds) from e
        count = settings.nccl_channels or channels(world_size)
        self.memory = count * CHANNEL_BYTES
        self._communicator = NcclCommunicator(token, rank, world_size, device.index, timeout=join_seconds, max_ctas=count)

    def _queue(self, target: torch.Tensor, source: torch.Tensor | None, root: int, stream: Stream) -> None:
        if not isinstance(stream, CudaStream):
            raise DeviceError("ncclBroadcast", 0, "needs a CUDA stream")
        source = target if source is None else source
        self._communicator.broadcast(target, source, root, stream.raw.cuda_stream, timeout=self.seconds)

    def check(self) -> None:
        self._communicator.check()
        for group in self.groups.values():
            group.check()

    def abandon(self, missing: Collection[int]) -> bool:
        """All communicators at the same time: what frees one waits for the device, and so for one that hangs."""
        all_of_them = [
            self._communicator,
            *(group._communicator for group in self.groups.values() if isinstance(group, NcclCollective)),
        ]
        with ThreadPoolExecutor(len(all_of_them)) as pool:
            return all(list(pool.map(NcclCommunicator.abort, all_of_them)))

    def close(self) -> None:
        self.drop_groups()
        self._communicator.close()
