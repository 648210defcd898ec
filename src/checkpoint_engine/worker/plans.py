"""Load plans that this process keeps for the models of its engine."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch

from checkpoint_engine.loads.model import Model
from checkpoint_engine.loads.moves import Source
from checkpoint_engine.loads.plan import LoadPlan, checkpoint_fingerprint
from checkpoint_engine.loads.replay import Prepared, Replayer
from checkpoint_engine.planning.slices import Taken
from checkpoint_engine.recent import Recent
from checkpoint_engine.transport.messages import Table
from checkpoint_engine.worker.slices import taken_of

KEPT_PLANS = 4
"""Checkpoints (by the tensors' names, shapes and order) that are remembered of one model."""
KEPT_LAYOUTS = 2
"""Of a plan: places where a checkpoint's tensors have lain (the ring, regions). On a GPU each takes 8 bytes for every 16 KiB."""

MAX_UNTOLD = 256 << 20
"""Bytes of which it is not told what is taken of them, for a device to pull: the host checks some 5 GB/s a core."""
KEPT_FINGERPRINTS = 8
_fingerprints: Recent[str, str] = Recent(KEPT_FINGERPRINTS)  # by the digest of a plan's tables


def checkpoint_of(layout: str, tables: Sequence[Table]) -> str:
    """The checkpoint's fingerprint. layout: what `tables` are kept under."""
    return _fingerprints.of(
        layout, lambda: checkpoint_fingerprint([[(i.name, i.dtype, i.shape) for i in t.items] for t in tables])
    )


class PreparedBucket(NamedTuple):
    """names: of its tensors that are replayed, `rest` of those that the loader must get. used: numbers of those of which any byte
    is taken."""

    prepared: Prepared
    names: tuple[str, ...]
    rest: frozenset[str]
    used: tuple[int, ...]


class Runnable:
    """A plan on the model it was recorded on, and what was worked out for each layout of its checkpoint.

    It does not keep the model's memory: use it while the model has the fingerprint that it was recorded with.
    taken: what it takes of the checkpoint's tensors, and its name, once `buckets` was asked for.
    """

    def __init__(self, plan: LoadPlan, model: Model) -> None:
        """Raises LoadPlanError. written: the first tensor of each storage that a replay writes."""
        self.plan, self._model = plan, model.unheld()
        self._replayer = Replayer(plan, self._model)
        self.taken, self.taken_name, self._untold, self._reads = Taken(()), "", 0, 0
        into = {copy.storage for tensor in plan.planned for copy in tensor.copies}
        self.written = frozenset(plan.storages[number].names[0] for number in into)
        self._layouts: Recent[str, tuple[PreparedBucket, ...]] = Recent(KEPT_LAYOUTS)

    def buckets(self, layout: str, tables: Sequence[Table]) -> tuple[PreparedBucket, ...]:
        """layout: what `tables` are kept under. Raises LoadPlanError, and ImportError where a device needs Triton."""
        if not self.taken_name:
            self.taken = self._taken(tables)
            self.taken_name = self.taken.name
            self._measure(tables)
        return self._layouts.of(layout, lambda: tuple(self._prepare(table) for table in tables))

    def _taken(self, tables: Sequence[Table]) -> Taken:
        """Nothing is told where no sums could be made: by threads of memory on the CPU, by the kernel on this thread's device."""
        devices = {raw.device for raw in self.storages}
        if self._replayer.kernel and devices == {torch.device("cuda", torch.cuda.current_device())}:
            return taken_of(self.plan, tables, 0)
        if all(device.type == "cpu" for device in devices):
            return taken_of(self.plan, tables)
        return Taken(tuple(None for table in tables for _ in table.items))

    @property
    def storages(self) -> Sequence[torch.Tensor]:
        """Where it writes: uint8."""
        return self._model.bytes

    def _prepare(self, table: Table) -> PreparedBucket:
        prepared = self._replayer.prepare(Source(i.name, i.memory, table.offset + i.offset) for i in table.items)
        rest = frozenset(prepared.rest)
        names = tuple(i.name for i in table.items if i.name not in rest)
        used = tuple(n for n, i in enumerate(table.items) if i.name in rest or self.plan.by_name[i.name].copies)
        return PreparedBucket(prepared, names, rest, used)

    def _measure(self, tables: Sequence[Table]) -> None:
        by_name, left = self.plan.by_name, {tensor.name for tensor in self.plan.loader}
        items = [item for table in tables for item in table.items]
        self._reads = self.plan.nbytes + sum(item.nbytes for item in items if item.name in left)
        parts = zip(self.taken.parts, items, strict=True)
        self._untold = sum(i.nbytes for part, i in parts if part is None and (i.name not in by_name or by_name[i.name].copies))

    def reads(self, *, checked: bool) -> int:
        """Bytes that a pass reads of the servers' memory: what is replayed, and all of each tensor that the loader gets. checked:
        digests are. -1: then a device had better not read there, for the host would have to check too much of it whole."""
        return -1 if checked and self._untold > MAX_UNTOLD else self._reads


class Kept(NamedTuple):
    """What is known of a model (its fingerprint) and a checkpoint: a proved plan, or why there is none."""

    model: str
    plan: Runnable | None
    reason: str = ""


_kept: weakref.WeakKeyDictionary[torch.nn.Module, Recent[str, Kept]] = weakref.WeakKeyDictionary()


def lookup(module: torch.nn.Module, model: str, checkpoint: str) -> Kept | None:
    """What is kept for these fingerprints. If the model's is another one now, nothing of `module` is kept any longer."""
    plans = _kept.get(module)
    if plans is None or checkpoint not in plans:
        return None
    if plans[checkpoint].model != model:
        del _kept[module]
        return None
    return plans.put(checkpoint, plans[checkpoint])  # used, so it stays


def trusted(module: torch.nn.Module) -> list[Runnable]:
    """All plans that are kept for it, whether or not the model is what it was."""
    plans = _kept.get(module)
    return [kept.plan for kept in plans.values() if kept.plan is not None] if plans is not None else []


def keep(module: torch.nn.Module, checkpoint: str, kept: Kept) -> None:
    _kept.setdefault(module, Recent(KEPT_PLANS)).put(checkpoint, kept)


def drop(module: torch.nn.Module, checkpoint: str) -> None:
    """Forget it, if it is there: the next update records anew."""
    if (plans := _kept.get(module)) is not None:
        plans.drop(checkpoint)
