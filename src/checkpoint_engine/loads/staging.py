"""Layers that an engine loads beside their live parameters, in tensors that it makes anew in every pass and then post-processes.

Such a tensor is a slot of a load plan: known by its layer and its name, with a layout, and without an address. What is to be
known of it in a pass is told to a listener: when its memory is there, and when all is loaded and post-processing comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch

from checkpoint_engine.devices.foreign import tensor_at
from checkpoint_engine.errors import LoadPlanError, said
from checkpoint_engine.loads.digest import storage_digests
from checkpoint_engine.loads.model import storage_key
from checkpoint_engine.loads.plan import LoadPlan, Slot, Storage
from checkpoint_engine.loads.replay import view
from checkpoint_engine.loads.spots import Spots

Tensors = Mapping[str, torch.Tensor]


class Listener:
    """Told of the staged layers of one pass, by their names. It never raises: failure says what went wrong first."""

    failure: str | None = None

    def opened(self, layer: str, tensors: Tensors) -> None:
        """Its tensors are there, and nothing was written to them yet."""
        self._guard(layer, self._opened, tensors)

    def closing(self, layer: str, tensors: Tensors) -> None:
        """All was written; post-processing comes next, and then the tensors go."""
        self._guard(layer, self._closing, tensors)

    def _guard(self, layer: str, act: Callable[[str, Tensors], None], tensors: Tensors) -> None:
        try:
            act(layer, {name: tensor for name, tensor in tensors.items() if tensor.numel()})
        except Exception as e:
            self.failure = self.failure or f"layer {layer}: {said(e)}"

    def _opened(self, layer: str, tensors: Tensors) -> None: ...

    def _closing(self, layer: str, tensors: Tensors) -> None: ...


class Stages(Protocol):
    """An engine with staged layers. Names of layers and tensors are those of its `Recordable`'s model."""

    def listen(self, listener: Listener | None, written: frozenset[str]) -> None:
        """A pass begins: whom to tell of its layers, and the tensors that are written in it without `run`."""

    def open(self, layer: str, names: Iterable[str]) -> Tensors:
        """Its tensors, into which these will be written without `run`; staged now, if they were not yet."""

    def finish_layer(self, layer: str) -> None:
        """All of it was written: post-process it."""

    def settle(self) -> None:
        """All that the pass brings has come. Post-process layers that nothing said to be complete; afterwards all live tensors
        are in place. Raises what `post_hook` raises for an incomplete checkpoint."""

    def abandon(self) -> None:
        """The pass is of no use. Afterwards all live tensors are in place, whatever is in them."""

    @property
    def replaced(self) -> frozenset[str]:
        """Names of live tensors which post-processing alone writes."""


def slot_storage(layer: str, name: str, tensor: torch.Tensor) -> Storage:
    """Raises LoadPlanError for a tensor that is not all of its own, strided storage."""
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.storage_offset():
        raise LoadPlanError("it has no storage of its own", f"{layer}.{name}")
    dtype = str(tensor.dtype).removeprefix("torch.")
    slot = Slot(layer, name, dtype, tuple(tensor.shape), tuple(tensor.stride()))
    return Storage(tensor.untyped_storage().nbytes(), (f"{layer}.{name}",), slot)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Its storage's bytes, which are the tensor's as long as that lives."""
    storage = tensor.untyped_storage()
    return tensor_at(storage.data_ptr(), storage.nbytes(), tensor.device)


def slots_of(plan: LoadPlan, layer: str, tensors: Tensors) -> dict[int, torch.Tensor]:
    """The bytes of a layer's tensors by their storage's number in the plan. Raises LoadPlanError where one is not as it was."""
    found: dict[int, torch.Tensor] = {}
    for name, number in plan.layers.get(layer, {}).items():
        if name not in tensors or slot_storage(layer, name, tensors[name]) != plan.storages[number]:
            raise LoadPlanError("its layout is not what it was when the plan was recorded", f"{layer}.{name}")
        found[number] = whole(tensors[name])
    return found


class RecordedSlots(Listener):
    """While a loader is recorded: slots get numbers, from `first` on, and begin as zeroes; digests: of what was loaded."""

    def __init__(self, first: int, spots: Spots) -> None:
        self._first, self._spots = first, spots
        self._open: dict[str, dict[str, tuple[int, torch.UntypedStorage]]] = {}  # by layer and name; the storage keeps its key
        self.storages: list[Storage] = []
        self.digests: dict[int, int] = {}

    def _opened(self, layer: str, tensors: Tensors) -> None:
        if layer in self._open:
            raise LoadPlanError("it was staged twice")
        mine = self._open[layer] = {}
        for name, tensor in tensors.items():
            storage, number = slot_storage(layer, name, tensor), self._first + len(self.storages)
            whole(tensor).zero_()
            self.storages.append(storage)
            mine[name] = (number, tensor.untyped_storage())
            self._spots.bind(storage_key(tensor), number)

    def _closing(self, layer: str, tensors: Tensors) -> None:
        mine, self._open[layer] = self._open.get(layer, {}), {}
        for _, storage in mine.values():
            self._spots.unbind(storage._cdata)
        for name, (_, storage) in mine.items():
            if name not in tensors or storage_key(tensors[name]) != storage._cdata:
                raise LoadPlanError("its loader replaced it, instead of writing into it", f"{layer}.{name}")
        digests = storage_digests([whole(tensors[name]) for name in mine])
        self.digests.update((number, digest) for (number, _), digest in zip(mine.values(), digests, strict=True))


class ProvenSlots(Listener):
    """While a plan is proved: slots begin as zeroes, as when it was recorded, and what it or the loader is to write there as
    chance has it. recorded: digests of then, when all was loaded."""

    def __init__(self, plan: LoadPlan, recorded: Mapping[int, int]) -> None:
        self._plan, self._recorded = plan, recorded
        self._digests: dict[int, int] = {}

    def _opened(self, layer: str, tensors: Tensors) -> None:
        for number, raw in slots_of(self._plan, layer, tensors).items():
            raw.zero_()
            # Not a constant, which could be what belongs there; and not of torch's own generator, which the engine may use.
            chance = torch.Generator(raw.device).manual_seed(number)
            for place in self._plan.written[number]:
                view(raw, place.target, place.run, place.sizes, place.target_strides).random_(generator=chance)

    def _closing(self, layer: str, tensors: Tensors) -> None:
        slots = slots_of(self._plan, layer, tensors)
        self._digests.update(zip(slots, storage_digests(list(slots.values())), strict=True))

    def differing(self) -> list[str]:
        """Names of slots that did not get what the loader had put there."""
        wrong = [number for number, digest in self._recorded.items() if self._digests.get(number) != digest]
        return [name for number in wrong for name in self._plan.storages[number].names]


class BlankSlots(Listener):
    """While a plan is replayed: slots of which it does not write every byte begin as zeroes, as when it was proved."""

    def __init__(self, plan: LoadPlan) -> None:
        self._plan = plan

    def _opened(self, layer: str, tensors: Tensors) -> None:
        for number, raw in slots_of(self._plan, layer, tensors).items():
            if number not in self._plan.covered:
                raw.zero_()
