"""How one update is loaded into a model: by the engine's loader, recorded, or by a load plan (docs/recorded-loads.md)."""

from __future__ import annotations

import contextlib
import enum
import logging
import time
from collections.abc import Callable, Iterator

import torch

from checkpoint_engine.devices.base import Device
from checkpoint_engine.errors import bare, said
from checkpoint_engine.loads.plan import LoadPlan
from checkpoint_engine.loads.proof import Proof
from checkpoint_engine.loads.recordable import Recordable
from checkpoint_engine.loads.recorder import Recorder
from checkpoint_engine.loads.replay import make_ready
from checkpoint_engine.loads.staging import BlankSlots, Listener
from checkpoint_engine.planning.bits import pack_bits
from checkpoint_engine.transport.messages import Table
from checkpoint_engine.worker.plans import Kept, PreparedBucket, Runnable, checkpoint_of, drop, keep, lookup, trusted
from checkpoint_engine.worker.staged import StagedLayers
from checkpoint_engine.worker.views import Views

log = logging.getLogger(__name__)
LoadWeights = Callable[[list[tuple[str, torch.Tensor]]], None]


class Way(enum.Enum):
    """How a stream is loaded. One that is recorded is never the last one of an update, unless no plan came of it (LOADER)."""

    LOADER = "loader"
    RECORD = "record"
    PROVE = "proved"
    REPLAY = "replayed"


class Loads:
    """The loads of one update. For each stream: begin, load every bucket, end; then commit, or failed.

    way       of the last stream
    spent     seconds by what was done beside and instead of loading: record, prove, replay
    notes     for people: why a plan was not made, or not used
    offered   what this worker takes by the plans that it has, by name
    """

    def __init__(self, run: LoadWeights, engine: Recordable | None, device: Device) -> None:
        self._run, self._engine, self._device = run, engine, device
        self.way = Way.LOADER
        self.spent: dict[str, float] = {}
        self.notes: list[str] = []
        plans = trusted(engine.module) if engine is not None else []
        self.offered = {plan.taken_name: plan.taken for plan in plans}
        self._checkpoint = ""
        self._tables: tuple[Table, ...] = ()
        self._layout = ""
        self._recorder: Recorder | None = None
        self._plan: Runnable | None = None
        self._proof: Proof | None = None
        self._staged: dict[int, int] = {}  # digests of slots, as recorded
        self._slots: Listener | None = None
        self._stages = StagedLayers(engine)
        self._buckets: tuple[PreparedBucket, ...] = ()
        self._broken: str | None = None  # why the plan cannot go on: what comes is let pass, and comes again
        self._lacking = False  # so it is, too, when what does not come is needed; that says nothing against the plan
        self._absent: tuple[int, ...] = ()  # buckets that do not come in this stream
        self._over = False  # nothing but the loader in the rest of this update

    # --- a stream ------------------------------------------------------------------------------------------------------

    def begin(self, layout: str, tables: tuple[Table, ...], absent: tuple[int, ...] = ()) -> None:
        """A stream of these buckets begins, without those that are `absent`. May change weights: what is to be proved is
        poisoned."""
        self._layout, self._tables, self._broken, self._absent = layout, tables, None, absent
        self._lacking = bool(absent)
        if (engine := self._engine) is None:
            return
        if engine.begins is not None:
            engine.begins()
        proving, self.way, self._slots = self.way is Way.RECORD and not self._over, Way.LOADER, None
        if not self._over:
            with self._never_failing("its load plan was not used"):
                self._checkpoint = checkpoint_of(layout, tables)
                if absent:
                    self._choose_sparse(engine)
                elif proving:
                    self._begin_proof(engine)
                else:
                    self._choose(engine)
        replayed = self.way in (Way.PROVE, Way.REPLAY)
        self._stages.begin(self._slots, self._plan if replayed else None, self._buckets)

    def _choose_sparse(self, engine: Recordable) -> None:
        """What comes is enough for a replay that takes nothing of what does not. For anything else all must come."""
        start = time.perf_counter()
        kept = lookup(engine.module, engine.model().fingerprint, self._checkpoint)
        if kept is None or kept.plan is None:
            return
        buckets = kept.plan.buckets(self._layout, self._tables)
        if not any(buckets[number].used for number in self._absent):
            self._trust(kept.plan, start)
            self._lacking = False

    def _choose(self, engine: Recordable) -> None:
        start = time.perf_counter()
        model = engine.model()
        kept = lookup(engine.module, model.fingerprint, self._checkpoint)
        if kept is None:
            make_ready(model)
            self._recorder = Recorder(model)
            self._slots = self._recorder.slots
            self.way = Way.RECORD
            self._spend("record", start)
        elif kept.plan is None:
            self.notes.append(kept.reason)
        else:
            self._trust(kept.plan, start)

    def _trust(self, plan: Runnable, start: float) -> None:
        self._plan, self._buckets = plan, plan.buckets(self._layout, self._tables)
        self._slots = BlankSlots(plan.plan)
        self.way = Way.REPLAY
        self._spend("replay", start)

    def _begin_proof(self, engine: Recordable) -> None:
        if self._plan is None:
            raise RuntimeError("there is no plan to prove")
        start = time.perf_counter()
        model = engine.model()
        if (reason := self._plan.plan.stale(model.fingerprint, self._checkpoint)) is not None:
            self._refuse(reason)
            return
        self._buckets = self._plan.buckets(self._layout, self._tables)
        self._proof = Proof(self._plan.plan, model, self._staged)
        self._slots = self._proof.slots
        self.way = Way.PROVE  # from here on only a complete pass makes the model whole
        self._proof.poison()
        self._spend("prove", start)

    def used(self, bucket: int) -> tuple[int, ...] | None:
        """Numbers of the bucket's tensors of which this stream takes any byte; None: perhaps of all."""
        if self._lacking:
            return ()
        return self._buckets[bucket].used if self.way in (Way.PROVE, Way.REPLAY) else None

    def load(self, bucket: int, table: Table, views: Views) -> float:
        """Load a bucket, or queue that. Returns the seconds of it inside the engine's `run`. Raises what `run` raises."""
        if self._broken is not None or self._lacking:
            return 0.0
        if self.way in (Way.PROVE, Way.REPLAY):
            return self._replay(self._buckets[bucket], table, views)
        weights = views.of(table)
        start = time.perf_counter()
        if self._recorder is not None:
            self._recorder.load(self._run, weights)
            self._spend("record", start)
        else:
            self._run(weights)
        return time.perf_counter() - start

    def _replay(self, bucket: PreparedBucket, table: Table, views: Views) -> float:
        start = time.perf_counter()
        self._tell(bucket)
        try:
            bucket.prepared.replay(views.memories)
            self._stages.replay(bucket, views.memories)
        except Exception as e:  # of any kind: the loader can do without it
            self._broken = f"a replay failed: {said(e)}"
        self._spend("replay" if self.way is Way.REPLAY else "prove", start)
        if not bucket.rest or self._broken is not None:
            return 0.0
        weights = views.of(table, bucket.rest)
        start = time.perf_counter()
        self._run(weights)
        return time.perf_counter() - start

    def _tell(self, bucket: PreparedBucket) -> None:
        """The engine that counts its tensors."""
        if bucket.names and self._engine is not None and self._engine.replaying is not None:
            self._engine.replaying(bucket.names)

    def end(self) -> bool:
        """All buckets are loaded. Whether the stream is needed once more before the update can be complete."""
        if self._lacking:
            self.notes.append("not all that it needs was sent at first, for it has no load plan any more, or another one")
            return True
        if self._broken is None:
            for number in self._absent:  # nothing is taken of their tensors, as of others that came
                self._tell(self._buckets[number])
        self._broken = self._broken or self._stages.lacking
        if self._broken is None and self.way is Way.REPLAY and self._slots is not None:
            self._broken = self._slots.failure
        if self._broken is None and self.way is Way.RECORD:
            return self._end_recording()
        if self._broken is None and self.way is Way.PROVE:
            start = time.perf_counter()
            with self._never_failing("its load plan could not be proved"):
                self._stages.settle()
                self._device.synchronize()
                if self._proof is not None and (differing := self._proof.differing()):
                    self._broken = self._proof.summary(differing)
            self._spend("prove", start)
        if self._broken is None:
            return False
        self._stages.abandon()
        self._refuse(self._broken)
        self._over = True
        return True

    def _end_recording(self) -> bool:
        start = time.perf_counter()
        self._stages.settle()  # outside of what follows: an incomplete checkpoint ends the update
        recorder, self._recorder = self._recorder, None
        if recorder is None or self._engine is None:
            return False
        with recorder, self._never_failing("its loader cannot be recorded"):
            self._device.synchronize()
            model = self._engine.model()
            plan: LoadPlan = recorder.finish(model, self._checkpoint, self._stages.replaced)
            self._staged = recorder.slots.digests
            if (useless := plan.useless()) is not None:
                self._refuse(useless)
            else:
                self._plan = Runnable(plan, model)
                self._plan.buckets(self._layout, self._tables)  # what this device lacks shows before anything is poisoned
        self._spend("record", start)
        self._over = self._plan is None
        return not self._over

    # --- the update ----------------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """The update is committed on all ranks: a plan that was proved in it is used from now on."""
        if self.way is Way.PROVE and self._plan is not None and self._engine is not None:
            self._proof = None
            keep(self._engine.module, self._checkpoint, Kept(self._plan.plan.model, self._plan))

    def failed(self) -> None:
        """This worker failed: whatever it was, the next update does not depend on a plan of this one. (When another rank failed,
        a proved plan stays: it does not depend on what bytes the model has.)"""
        if self._engine is not None and self.way is not Way.LOADER:
            drop(self._engine.module, self._checkpoint)

    def close(self) -> None:
        if self._recorder is not None:
            self._recorder.__exit__(None, None, None)
            self._recorder = None

    def reads(self, *, checked: bool) -> int:
        """Bytes that the next replay of this checkpoint reads; -1: it would not be replayed, or not pulled. checked: see
        Runnable.reads."""
        return self._plan.reads(checked=checked) if self._trusted and self._plan is not None else -1

    @property
    def needs(self) -> bytes:
        """The buckets of which the next replay takes anything, as in Ready; empty: perhaps of all."""
        used = [bool(bucket.used) for bucket in self._buckets] if self._trusted else []
        return b"" if all(used) else pack_bits(used)

    @property
    def taken(self) -> bytes:
        """What the next replay of this checkpoint takes, encoded; empty: it would not be replayed."""
        return self._plan.taken.encode() if self._trusted and self._plan is not None else b""

    @property
    def replaying(self) -> Runnable | None:
        """What this stream replays."""
        return self._plan if self.way is Way.REPLAY else None

    @property
    def _trusted(self) -> bool:
        return self.way in (Way.PROVE, Way.REPLAY) and self._plan is not None and self._broken is None

    def _refuse(self, reason: str) -> None:
        """Remember that this model and this checkpoint have no plan, and why; and go on with the loader."""
        log.warning("checkpoint-engine: loads are not replayed: %s", reason)
        self.notes.append(reason)
        if self._engine is not None:
            with contextlib.suppress(Exception):  # a model that cannot be looked at has no fingerprint either
                keep(self._engine.module, self._checkpoint, Kept(self._engine.model().fingerprint, None, reason))
        self.way = Way.LOADER
        self._plan = self._proof = None

    @contextlib.contextmanager
    def _never_failing(self, what: str) -> Iterator[None]:
        """Plans are there to save time. What goes wrong with one must not fail an update that the loader can do."""
        try:
            yield
        except Exception as e:
            self._recorder = None
            if self.way is Way.PROVE:
                self._broken = f"{what}: {said(e)}"
            else:
                self._refuse(f"{what}: {said(e)}")
            bare(e)  # else it would keep what its frames hold, rings that are mapped, until a cycle is collected

    def _spend(self, stage: str, start: float) -> None:
        self.spent[stage] = self.spent.get(stage, 0.0) + time.perf_counter() - start
