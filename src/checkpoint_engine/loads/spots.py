"""Which storage a tensor that a loader uses lies in: a source's, the model's, or one of the loader's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from checkpoint_engine.loads.model import Model, storage_key
from checkpoint_engine.loads.trace import Traced

SOURCE, MODEL, TRACED = 0, 1, 2


class Spot(NamedTuple):
    """Where a tensor's first byte lies: `offset` bytes into source or storage `number`, or into `traced`.

    foreign  the loader had that memory before it was called
    """

    kind: int
    number: int
    offset: int
    traced: Traced | None = None
    foreign: bool = False


class _Own(NamedTuple):
    """A storage of the loader's. The weak reference keeps its key from being used again, but not its memory."""

    traced: Traced
    alive: StorageWeakRef
    foreign: bool


class Spots:
    """Finds tensors by their storages' keys. A source's key is valid from `begin` until `release`."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._sources: dict[int, int] = {}
        self._addresses: list[tuple[int, int, int]] = []
        self._own: dict[int, _Own] = {}
        self._slots: dict[int, int] = {}

    def bind(self, key: int, number: int) -> None:
        """The storage of this key is the model's number `number`, until `unbind`; it must not go before."""
        self._slots[key] = number

    def unbind(self, key: int) -> None:
        self._slots.pop(key, None)

    def begin(self, sources: Iterable[tuple[int, torch.Tensor]]) -> None:
        """A call with these sources begins, numbers and tensors; all have storages of their own."""
        self._addresses = []
        for number, tensor in sources:
            if tensor.numel():
                self._sources[storage_key(tensor)] = number
                self._addresses.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, number))

    def release(self, key: int) -> None:
        """The source's storage of this key goes away now."""
        self._sources.pop(key, None)

    def kept(self) -> list[Traced]:
        """Own storages that are still there; the others are forgotten."""
        gone = [key for key, own in self._own.items() if own.alive.expired()]  # type: ignore[no-untyped-call]
        for key in gone:
            del self._own[key]
        return [own.traced for own in self._own.values()]

    def forget(self) -> None:
        self._sources.clear()
        self._own.clear()
        self._slots.clear()

    def of(self, tensor: torch.Tensor) -> Spot | None:
        """None for a tensor without bytes of its own. Memory that was never seen is the loader's, from before."""
        if tensor.layout is not torch.strided or not tensor.numel():
            return None
        try:
            key = storage_key(tensor)
        except (RuntimeError, NotImplementedError):
            return None
        offset = int(tensor.storage_offset()) * tensor.itemsize
        if (number := self._sources.get(key)) is not None:
            return Spot(SOURCE, number, offset)
        if (found := self._model.by_key.get(key)) is not None:
            return Spot(MODEL, found[0], found[1] + offset)
        if (slot := self._slots.get(key)) is not None:
            return Spot(MODEL, slot, offset)
        if (own := self._own.get(key)) is not None:
            return Spot(TRACED, key, offset, own.traced, own.foreign)
        return self._by_address(tensor) or self._add(tensor, offset, foreign=True)

    def made(self, tensor: torch.Tensor) -> Spot | None:
        """Of a tensor that an operation has just made; None if it is none, but one that was passed on."""
        if not tensor.numel():
            return None
        key = storage_key(tensor)
        known = key in self._sources or key in self._model.by_key or key in self._slots or key in self._own
        return None if known else self._add(tensor, 0, foreign=False)

    def _add(self, tensor: torch.Tensor, offset: int, *, foreign: bool) -> Spot:
        storage = tensor.untyped_storage()
        traced, key = Traced(storage.nbytes()), storage_key(tensor)
        self._own[key] = _Own(traced, StorageWeakRef(storage), foreign)  # type: ignore[no-untyped-call]
        return Spot(TRACED, key, offset, traced, foreign)

    def _by_address(self, tensor: torch.Tensor) -> Spot | None:
        """Memory of the model or of a source in another storage: numpy and DLPack make such."""
        address = 0 if tensor.is_meta else tensor.data_ptr()
        if (found := self._model.at(address)) is not None:
            return Spot(MODEL, *found)
        for low, high, number in self._addresses:
            if low <= address < high:
                return Spot(SOURCE, number, address - low)
        return None
