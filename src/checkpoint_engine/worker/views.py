"""A bucket's tensors, as views of the memory that server and worker share."""

from __future__ import annotations

import functools

import msgspec
import torch

from checkpoint_engine.transport.messages import Table


class Views:
    """The buckets' tensors as views of a mapping's bytes (uint8, one-dimensional).

    One as_strided a tensor: checkpoints of experts have tens of thousands, and the engine waits for each.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._typed: dict[str, tuple[torch.Tensor, int]] = {}

    def of(self, table: Table) -> list[tuple[str, torch.Tensor]]:
        """[(name, tensor)] of one bucket. Raises RuntimeError when the table does not fit the mapping."""
        weights = []
        for name, dtype, shape, offset, _ in map(msgspec.structs.astuple, table.items):
            typed, itemsize = self._typed.get(dtype) or self._of_dtype(dtype)
            weights.append((name, typed.as_strided(shape, _contiguous(shape), (table.offset + offset) // itemsize)))
        return weights

    def _of_dtype(self, name: str) -> tuple[torch.Tensor, int]:
        dtype = getattr(torch, name)
        whole = self._memory.numel() // dtype.itemsize * dtype.itemsize
        self._typed[name] = self._memory[:whole].view(dtype), dtype.itemsize
        return self._typed[name]


@functools.lru_cache(maxsize=4096)
def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * max(1, shape[i + 1])
    return tuple(strides)
