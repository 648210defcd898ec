"""A plan proves itself: poison what it writes, let it write, and see whether the model is again what the loader made of it."""

from __future__ import annotations

from collections.abc import Mapping

from checkpoint_engine.errors import LoadPlanError
from checkpoint_engine.loads.digest import storage_digests
from checkpoint_engine.loads.model import Model
from checkpoint_engine.loads.plan import LoadPlan
from checkpoint_engine.loads.replay import view
from checkpoint_engine.loads.staging import ProvenSlots


class Proof:
    """Started when the engine's loader has just loaded a complete checkpoint into `model`, with no request running.

    Then the same checkpoint goes through the plan, exactly as it will later: replayed, and what the loader must get to the
    loader. `differing` says afterwards what is not as before. Whatever it says, or if the pass breaks off, a pass of the loader
    alone makes the model whole: only bytes that it was seen to write are poisoned.

    staged  digests of the plan's slots, as the loader had left them before they were post-processed
    slots   to be told of layers that are staged meanwhile
    """

    def __init__(self, plan: LoadPlan, model: Model, staged: Mapping[int, int] | None = None) -> None:
        self._plan, self._model = plan, model
        self.slots = ProvenSlots(plan, staged or {})
        self._before = storage_digests(model.bytes)

    def poison(self) -> None:
        """Change every byte that a replay writes, and those that the loader was seen to overwrite with the other tensors."""
        covered = [number for number in self._plan.covered if number < len(self._model.bytes)]
        for number in covered:
            self._model.bytes[number].bitwise_not_()
        for copy in (copy for tensor in self._plan.planned for copy in tensor.copies):
            if copy.storage < len(self._model.bytes) and copy.storage not in self._plan.covered:
                raw = self._model.bytes[copy.storage]
                view(raw, copy.target, copy.run, copy.sizes, copy.target_strides).bitwise_not_()
        for left in self._plan.loader:
            for place in (p for p in left.writes if p.storage < len(self._model.bytes)):
                raw = self._model.bytes[place.storage]
                # Not inverted: places of two tensors may overlap.
                view(raw, place.target, place.run, place.sizes, place.target_strides).fill_(0x5A)

    def differing(self) -> list[str]:
        """Names of parameters and buffers in storages that are not as the loader left them; empty: the plan can be trusted.

        Raises LoadPlanError when a staged layer could not be looked at.
        """
        if self.slots.failure is not None:
            raise LoadPlanError(self.slots.failure)
        after = storage_digests(self._model.bytes)
        changed = [number for number, (x, y) in enumerate(zip(self._before, after, strict=True)) if x != y]
        return self.slots.differing() + [name for number in changed for name in self._plan.storages[number].names]

    def summary(self, differing: list[str]) -> str:
        """One sentence for a report."""
        if not differing:
            return f"proved: {len(self._plan.planned)} tensors replayed as the loader loads them"
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        return f"refused: after a replay {', '.join(differing[:5])}{more} differ from what the loader made"
