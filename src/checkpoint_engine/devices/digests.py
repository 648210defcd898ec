"""Checking bytes against their digests on the device that holds them, without waiting for it bucket by bucket.

What a digest is: memory.checksum. On CUDA one kernel sums up a whole bucket where Triton is installed (it comes with torch);
otherwise, and on every other device, torch's own operations do it tensor by tensor, to the same result.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from checkpoint_engine.devices.base import Device
from checkpoint_engine.errors import DeadlineError
from checkpoint_engine.memory.checksum import LENGTH_WEIGHT, digest, partial_sum, signed, unpacked
from checkpoint_engine.memory.digest import WORD_BYTES

log = logging.getLogger(__name__)


class Run(NamedTuple):
    """Bytes [offset, offset + nbytes) of memory number `memory`."""

    memory: int
    offset: int
    nbytes: int


class Mismatch(NamedTuple):
    """Tensor number `item` of bucket `bucket` is not what was registered."""

    bucket: int
    item: int


class Layout:
    """Where the tensors of a plan's buckets lie. It depends on the plan alone: keep it with the plan's tables.

    runs    of all buckets, one after the other
    starts  number of each bucket's first run, and one more: how many there are
    """

    def __init__(self, buckets: Iterable[Iterable[Run]]) -> None:
        found = [list(bucket) for bucket in buckets]
        self.runs = [run for bucket in found for run in bucket]
        self.starts = [0, *itertools.accumulate(len(bucket) for bucket in found)]

    @functools.cached_property
    def table(self) -> torch.Tensor:
        """int64, (runs, 3): memory, offset, bytes. On the CPU."""
        return torch.tensor(self.runs, dtype=torch.int64).view(-1, 3)


class Sums(Protocol):
    """Sums up buckets. totals: int64, (runs,), on the device: complete when what is queued there is done."""

    totals: torch.Tensor

    def add(self, bucket: int) -> None:
        """Queue one bucket on the current stream."""


class TorchSums:
    """Sums made by torch's operations, of memories on any device. On a CPU `add` returns when it is done."""

    def __init__(self, layout: Layout, memories: Sequence[torch.Tensor]) -> None:
        self._layout, self._memories = layout, memories
        device = memories[0].device if memories else torch.device("cpu")
        self.totals = torch.zeros(len(layout.runs), dtype=torch.int64, device=device)

    def add(self, bucket: int) -> None:
        for index in range(*self._layout.starts[bucket : bucket + 2]):
            memory, offset, nbytes = self._layout.runs[index]
            self.totals[index] = partial_sum(self._memories[memory][offset : offset + nbytes])


class Verifier:
    """Checks the buckets of one pass. Queues work and remembers it; nobody waits before `mismatches`.

    `check` goes before whatever may change the bytes, on the same stream, and the event that says that a bucket's bytes may
    be overwritten behind it.
    """

    def __init__(self, layout: Layout, expected: bytes, memories: Sequence[torch.Tensor], *, kernel: bool | None = None) -> None:
        """expected: the digests of layout's runs, 8 bytes each, little-endian (planning.digests); 0 where there is none.
        memories: uint8, one-dimensional, all on one device. kernel: None: on CUDA, where it works.

        Raises ValueError when there are more or fewer digests than runs.
        """
        count = len(layout.runs)
        if len(expected) != 8 * count:
            raise ValueError(f"{len(expected)} bytes of digests for {count} tensors")
        self._layout, self._queued = layout, [False] * (len(layout.starts) - 1)
        self._sums = make_sums(layout, memories, kernel=kernel)
        self._expected = unpacked(expected)

    def nbytes(self, checked: Mapping[int, Collection[int] | None]) -> int:
        """Of the tensors that have a digest and are checked: of each bucket these, or (None) all."""
        held = torch.where(self._expected != 0, self._layout.table[:, 2], 0)
        total = 0
        for bucket, items in checked.items():
            begin, end = self._layout.starts[bucket : bucket + 2]
            if items is None:
                total += int(held[begin:end].sum())
            elif items:
                total += int(held[[begin + item for item in items]].sum())
        return total

    def check(self, bucket: int) -> None:
        """Queue the check of a bucket on the current stream of the memories' device; on a CPU it is done at once.

        Raises IndexError when there is no such bucket.
        """
        self._queued[bucket] = True
        self._sums.add(bucket)

    def mismatches(self, device: Device, seconds: float) -> list[Mismatch]:
        """The tensors, of the buckets that were checked, whose bytes do not have their digest.

        Blocks until `device` has done what the current stream holds. Raises DeadlineError when that takes longer than
        `seconds`, and DeviceError.
        """
        if not device.mark().wait(seconds):
            raise DeadlineError(f"{device.name} to check digests", seconds)
        found = self._sums.totals.cpu() + self._layout.table[:, 2] * signed(LENGTH_WEIGHT)
        found[found == 0] = 1  # as checksum.finish
        wrong = (found != self._expected) & (self._expected != 0)
        result, starts = [], self._layout.starts
        for bucket, queued in enumerate(self._queued):
            if queued:
                begin, end = starts[bucket : bucket + 2]
                result += [Mismatch(bucket, item) for item in wrong[begin:end].nonzero().flatten().tolist()]
        return result


def has_kernel() -> bool:
    """Whether Triton can be imported; nothing is compiled yet."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def kernel_works(device: torch.device) -> bool:
    """Whether there is Triton, and it makes the kernel ready for a CUDA device. That takes seconds the first time."""
    if not has_kernel():
        return False
    try:
        from checkpoint_engine.devices.digest_kernel import compile_for

        compile_for(device)
    except Exception as e:  # of any kind: torch's operations do as well
        log.warning("digests are made without a kernel, which Triton cannot compile: %s", e)
        return False
    return True


def make_sums(layout: Layout, memories: Sequence[torch.Tensor], *, kernel: bool | None = None) -> Sums:
    """memories: uint8, one-dimensional, all on one device. kernel: None: on CUDA, where it works and they are aligned for it."""
    if kernel is None:
        aligned = all(memory.data_ptr() % WORD_BYTES == 0 for memory in memories)
        kernel = bool(memories) and memories[0].is_cuda and aligned and kernel_works(memories[0].device)
    if not kernel:
        return TorchSums(layout, memories)
    from checkpoint_engine.devices.digest_kernel import KernelSums

    return KernelSums(layout, memories)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes in the order of its indices: uint8, one-dimensional; a view where it is contiguous, else a copy."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)


def slice_digest(raw: torch.Tensor, offset: int, run: int, sizes: Sequence[int] = (), strides: Sequence[int] = ()) -> int:
    """The digest of a slice: `run` bytes of `raw` (uint8, one-dimensional) at `offset`, and again at every index of `sizes`,
    `strides` bytes apart. That of the same bytes one after the other; so both ends of a copy between two layouts can make it.

    Takes as much memory again as the slice has, unless it is one run. Waits for the device. Raises RuntimeError when the slice
    is not inside `raw`.
    """
    if not sizes:
        return digest(raw[offset:][:run])
    part = raw[offset:]
    return digest(part.as_strided((*sizes, run), (*strides, 1), part.storage_offset()).contiguous().view(-1))


def verify(named: Iterable[tuple[str, torch.Tensor]], digests: Sequence[int]) -> list[str]:
    """Names of the tensors that do not have their digest; 0 is no digest. Tensors of any layout, on any device; waits for it."""
    pairs = zip(named, digests, strict=True)
    return [name for (name, tensor), wanted in pairs if wanted and digest(bytes_of(tensor)) != wanted]
