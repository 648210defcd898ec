"""Broadcasts among servers, on a communicator of their own: never on the caller's process group.

Made once and kept. torch's back-end classes are used directly, so no default group is needed.
"""

from __future__ import annotations

import datetime
import threading
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from checkpoint_engine.devices.base import Closing
from checkpoint_engine.errors import DeadlineError, PeerLostError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

SLICE = 0.1
"""Seconds between two looks at whether a blocked broadcast has been abandoned."""


class Collective(Closing):
    """Rank `rank`'s part of a communicator. After `abandon` it is good for nothing: make another."""

    def __init__(self, backend: str, *, rank: int, world_size: int, store: Store, address: str, seconds: float) -> None:
        """store: a prefix that no other communicator used. address: of this rank's interface that the others reach.

        Raises DeadlineError when the others do not take part within `seconds`.
        """
        self.rank, self.backend = rank, backend
        self._abandoned = threading.Event()
        self._seconds = seconds
        timeout = datetime.timedelta(seconds=seconds)
        self._group: Any
        try:
            if backend == "gloo":
                options = dist.ProcessGroupGloo._Options()
                options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
                options._timeout = timeout
                self._group = dist.ProcessGroupGloo(store, rank, world_size, options)
            else:
                options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
                options._timeout = timeout
                self._group = dist.ProcessGroupNCCL(store, rank, world_size, options)
        except RuntimeError as e:
            raise DeadlineError(f"all {world_size} ranks to join the {backend} communicator ({e})", seconds) from e

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """`tensor` (uint8, one-dimensional) of rank `source` into everybody's.

        On CUDA it is queued on the current stream. On a CPU it blocks; raises PeerLostError when the connection broke or
        the communicator was abandoned, DeadlineError when it did not end in time. The tensor must not be re-used then.
        """
        options = dist.BroadcastOptions()
        options.rootRank = source
        options.rootTensor = 0
        if self._abandoned.is_set():
            raise PeerLostError("communicator", "abandoned after a failure")
        try:
            work = self._group.broadcast([tensor], options)
        except RuntimeError as e:
            raise PeerLostError(f"a rank in the broadcast from rank {source}", str(e).splitlines()[0]) from e
        if self.backend == "gloo":
            self._wait(work, source)
        else:
            work.wait()  # orders the current stream behind it; the host goes on

    def _wait(self, work: dist.Work, source: int) -> None:
        deadline = time.monotonic() + self._seconds
        while True:
            completed = work.is_completed()
            try:
                work.wait(datetime.timedelta(seconds=SLICE))
                return
            except RuntimeError as e:
                if completed:  # else it is only this slice of the wait that is over
                    raise PeerLostError(f"a rank in the broadcast from rank {source}", str(e).splitlines()[0]) from e
            if self._abandoned.is_set():
                raise PeerLostError("communicator", "abandoned after a failure")
            if time.monotonic() > deadline:
                raise DeadlineError(f"the broadcast from rank {source}", self._seconds)

    def abandon(self) -> None:
        """Give up on broadcasts that a dead rank holds up. Their memory may still be written by late arrivals: whoever
        owns it must not use it again while this process lives."""
        self._abandoned.set()
        if self.backend == "nccl":
            self._group.abort()

    def close(self) -> None:
        if self.backend == "nccl" and not self._abandoned.is_set():
            self._group.shutdown()
