"""From what a recorder saw to a plan: what can be replayed, and what stays the loader's business because of something else."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence

from checkpoint_engine.loads.geometry import Bytes, overlapping
from checkpoint_engine.loads.model import Model
from checkpoint_engine.loads.observed import Observed, Unexplained
from checkpoint_engine.loads.plan import LoadersTensor, LoadPlan, Place, PlannedTensor, Storage

CONSTANT = frozenset({"fill_", "zero_"})
TWICE = "the same bytes of the model are written more than once"


def resolve(seen: Observed, model: Model, checkpoint: str, slots: Sequence[Storage] = ()) -> LoadPlan:
    """The plan of `seen` on `model`, for the checkpoint of this fingerprint. Nothing in it writes a byte twice. slots: storages
    that were there for a while, whose numbers follow the model's."""
    storages = (*model.storages, *slots)
    _Rules(seen, storages).apply()
    planned: list[PlannedTensor] = []
    left: dict[str, LoadersTensor] = {}
    rewritten = _rewritten(seen)
    for number, source in enumerate(seen.sources):
        copies = tuple(dict.fromkeys(source.copies))
        if source.reason is None:
            planned.append(PlannedTensor(source.name, source.dtype, source.shape, copies))
        else:
            places = (Place(c.storage, c.target, c.run, c.sizes, c.target_strides) for c in copies)
            writes = tuple(dict.fromkeys([*places, *rewritten[number]]))
            left.setdefault(source.name, LoadersTensor(source.name, source.reason, writes))
    plan = LoadPlan(model.fingerprint, checkpoint, storages, tuple(planned), tuple(left.values()))
    plan.check()
    return plan


def _rewritten(seen: Observed) -> dict[int, list[Place]]:
    """Per source, where its loader put new bytes that are no copy, whatever was there before."""
    places: dict[int, list[Place]] = collections.defaultdict(list)
    for write in seen.unexplained:
        if write.renewed and not write.storages and len(write.sources) == 1:
            places[next(iter(write.sources))].append(write.place)
    return places


class _Rules:
    """Gives every source its reason to be the loader's business, if it has one."""

    def __init__(self, seen: Observed, storages: Sequence[Storage]) -> None:
        self._seen, self._storages = seen, storages
        self._writers: dict[int, set[int]] = collections.defaultdict(set)
        self._modules: dict[str, set[int]] = collections.defaultdict(set)
        self._layers: dict[str, set[int]] = collections.defaultdict(set)
        for number, source in enumerate(seen.sources):
            for storage in {copy.storage for copy in source.copies}:
                self._writers[storage].add(number)
        for write in seen.unexplained:
            self._writers[write.place.storage] |= write.sources
        for number, held in enumerate(storages):
            for module in _modules_of(held):
                self._modules[module].add(number)
            if held.slot is not None:
                self._layers[held.slot.layer].add(number)

    def apply(self) -> None:
        for write in self._seen.unexplained:
            if not write.sources:
                self._void(write)
            for storage in write.storages:  # what was derived from this storage must be derived again
                self._mark(self._writers[storage], self._why(write))
        self._written_twice()
        changed = True
        while changed:
            changed = any(self._couple(together) for together in (*self._seen.coupled, *self._staged()))

    def _staged(self) -> list[set[int]]:
        """Of every staged layer, the sources that go there: it is post-processed when all have come, by one way."""
        return [set().union(*(self._writers[number] for number in numbers)) for numbers in self._layers.values()]

    def _void(self, write: Unexplained) -> None:
        """Nothing of the checkpoint is known to be in what was written: it belongs to whatever is loaded into the same storage,
        or else into the same module. Bytes that are no constant may have come from any tensor of the call, by ways
        that the recorder does not see (numpy); and any constant from one that nothing else is known of."""
        storage = write.place.storage
        siblings = {number for module in _modules_of(self._storages[storage]) for number in self._modules[module]}
        found = self._writers[storage] or {writer for number in siblings for writer in self._writers[number]}
        for number, source in enumerate(self._seen.sources):
            if source.call == write.call and not (found and write.op in CONSTANT and source.copies):
                found = found | {number}
        self._mark(found, self._why(write))

    def _why(self, write: Unexplained) -> str:
        names = self._storages[write.place.storage].names
        return f"its loader also writes something else to {names[0]} ({write.op})"

    def _written_twice(self) -> None:
        places: dict[int, list[Bytes]] = collections.defaultdict(list)
        for number, source in enumerate(self._seen.sources):
            for c in dict.fromkeys(source.copies):
                places[c.storage].append(Bytes(number, c.target, c.run, c.sizes, c.target_strides))
        for write in self._seen.unexplained:
            p = write.place
            for number in write.sources:
                places[p.storage].append(Bytes(number, p.target, p.run, p.sizes, p.target_strides))
        for group in places.values():
            for x, y in overlapping(group):
                self._mark((x, y), TWICE)

    def _couple(self, together: Iterable[int]) -> bool:
        """What one operation read together is loaded together. Whether this changed anything."""
        sources = [self._seen.sources[number] for number in together]
        if all(s.reason is None for s in sources) or all(s.reason is not None for s in sources):
            return False
        first = next(s for s in sources if s.reason is not None)
        self._mark(together, f"it is loaded together with {first.name}")
        return True

    def _mark(self, numbers: Iterable[int], reason: str) -> None:
        self._seen.business(numbers, reason)


def _modules_of(storage: Storage) -> set[str]:
    return {name.rpartition(".")[0] for name in storage.names}
