"""A bucket's tensors, as views of the memory that server and worker share."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence

import torch

from checkpoint_engine.planning.plan import Item
from checkpoint_engine.transport.messages import Table


class Views:
    """The buckets' tensors as views of the memories' bytes (each uint8, one-dimensional).

    One as_strided a tensor: checkpoints of experts have tens of thousands, and the engine waits for each.
    """

    def __init__(self, memories: Sequence[torch.Tensor], device: torch.device | None = None) -> None:
        """device: where tensors must be; those of memories that are elsewhere (the servers' host memory) are copied there."""
        self.memories = memories
        self._device = device
        self._typed: dict[tuple[int, str], tuple[torch.Tensor, int]] = {}

    def of(self, table: Table, names: Collection[str] | None = None) -> list[tuple[str, torch.Tensor]]:
        """[(name, tensor)] of one bucket; names: only of these. Raises RuntimeError or IndexError when the table does not fit the
        memories."""
        items = table.items if names is None else [item for item in table.items if item.name in names]
        views = [(item.name, self._view(item, table.offset + item.offset)) for item in items]
        if self._device is None:
            return views
        return [(name, tensor.to(self._device, non_blocking=True)) for name, tensor in views]

    def _view(self, item: Item, place: int) -> torch.Tensor:
        typed, itemsize = self._typed.get((item.memory, item.dtype)) or self._of_dtype(item.memory, item.dtype)
        first, rest = divmod(place, itemsize)
        if rest:  # a file need not align its tensors
            raw = self.memories[item.memory].narrow(0, place, item.nbytes)
            return raw.clone().view(typed.dtype).view(item.shape)
        return typed.as_strided(item.shape, _contiguous(item.shape), first)

    def _of_dtype(self, memory: int, name: str) -> tuple[torch.Tensor, int]:
        dtype, raw = getattr(torch, name), self.memories[memory]
        whole = raw.numel() // dtype.itemsize * dtype.itemsize
        self._typed[memory, name] = raw[:whole].view(dtype), dtype.itemsize
        return self._typed[memory, name]


@functools.lru_cache(maxsize=4096)
def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * max(1, shape[i + 1])
    return tuple(strides)
