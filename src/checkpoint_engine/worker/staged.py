"""The staged layers of an engine (loads.staging) in a stream that is recorded, proved or replayed."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import torch

from checkpoint_engine.loads.recordable import Recordable
from checkpoint_engine.loads.staging import Listener, slots_of
from checkpoint_engine.worker.plans import PreparedBucket, Runnable


class StagedLayers:
    """Does nothing for an engine that has none. For each stream: begin, replay every bucket; then settle, or abandon."""

    def __init__(self, engine: Recordable | None) -> None:
        self._stages = engine.stages if engine is not None else None
        self._left: collections.Counter[str] = collections.Counter()  # buckets to come, by layer
        self._plan: Runnable | None = None
        self._slots: Listener | None = None

    def begin(self, slots: Listener | None, plan: Runnable | None, buckets: Sequence[PreparedBucket]) -> None:
        """slots: whom to tell of them. plan: what is replayed, and its buckets; None: the loader runs."""
        self._slots, self._plan = slots, plan
        self._left.clear()
        if plan is not None:
            self._left.update(staged.layer for bucket in buckets for staged in bucket.prepared.staged)
        if self._stages is not None:
            self._stages.listen(slots, plan.written if plan is not None else frozenset())

    def replay(self, bucket: PreparedBucket, memories: Sequence[torch.Tensor]) -> None:
        """Layer by layer: one for which this is the last bucket is post-processed before the next one gets memory. Raises what
        the engine raises, and RuntimeError with what went wrong."""
        for staged in bucket.prepared.staged:
            if self._stages is None or self._plan is None or self._slots is None:
                raise RuntimeError("its engine does not stage layers any more")
            tensors = self._stages.open(staged.layer, staged.names)
            staged.replay(slots_of(self._plan.plan, staged.layer, tensors), memories)
            self._left[staged.layer] -= 1
            if not self._left[staged.layer]:
                self._stages.finish_layer(staged.layer)
            if self._slots.failure is not None:
                raise RuntimeError(self._slots.failure)

    @property
    def lacking(self) -> str | None:
        """All buckets came: why a replay is not complete nevertheless."""
        if layers := [layer for layer, count in self._left.items() if count]:
            return f"buckets did not come of {', '.join(layers[:5])}"
        return None

    def settle(self) -> None:
        if self._stages is not None:
            self._stages.settle()

    def abandon(self) -> None:
        if self._stages is not None:
            self._stages.abandon()

    @property
    def replaced(self) -> frozenset[str]:
        return self._stages.replaced if self._stages is not None else frozenset()
