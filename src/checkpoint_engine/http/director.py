"""Rank 0 speaking for the fleet: it has all ranks do what REST asks for, and knows how all of them are."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Coroutine, Mapping, Sequence

import msgspec

from checkpoint_engine import __version__
from checkpoint_engine.errors import CheckpointEngineError, CheckpointNotFoundError, UpdateInProgressError
from checkpoint_engine.http.commands import COLLECTIVE, Command, EngineSpec, Gather, Refused, Register, RollOut, Unregister
from checkpoint_engine.http.crew import Crew
from checkpoint_engine.http.node import Node
from checkpoint_engine.http.problems import NotFoundError, NotLeaderError, NotMetError, RankError, problem_of
from checkpoint_engine.http.records import (
    CheckpointDetail,
    CheckpointPart,
    CheckpointView,
    EngineWeights,
    FleetView,
    RankState,
    RankTimeline,
    RankView,
    SpanView,
    TensorView,
    TimelineView,
    UpdateRecord,
    WeightsView,
    WorkerWeights,
)
from checkpoint_engine.http.tracker import KEPT_TIMELINES, is_over
from checkpoint_engine.timeline import Trace, summarise
from checkpoint_engine.transport.meeting import LEADER

log = logging.getLogger(__name__)
BUSY_SECONDS, IDLE_SECONDS = 0.25, 2.0
RANKS_A_SECOND = 800
"""How many ranks are asked for their state in a second, at most."""
REGISTER_SECONDS = 3600.0
ENGINE_SECONDS = 5.0
CANCEL_SECONDS = 0.05


class Director:
    """On the event loop of rank 0's REST, between `run`'s beginning and its end."""

    def __init__(self, node: Node, ceilings: Mapping[str, float]) -> None:
        self.node, self._ceilings = node, dict(ceilings)
        self._crew: Crew | None = None
        self._views: dict[int, RankView] = {}
        self._order = asyncio.Lock()  # collective commands reach all ranks in the same order
        self._engines: tuple[EngineSpec, ...] = node.engines
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Meet the other ranks, then watch them; ends when it is cancelled."""
        self.node.pulse.bind()
        try:
            await self.node.meet()
            if self.node.met and self.node.rank == LEADER:
                self._crew = Crew(self.node.introductions, self.node.secret)
                while True:
                    await self._look()
                    await self._pause()
        finally:
            for task in self._tasks:
                task.cancel()
            if self._crew is not None:
                await self._crew.close()

    async def _look(self) -> None:
        crew = self._need_crew()
        found = await asyncio.gather(*(self._look_at(crew, rank, host) for rank, host in crew.hosts.items()))
        self._views = {view.rank: view for view in found}
        self.node.pulse.beat()

    async def _look_at(self, crew: Crew, rank: int, host: str) -> RankView:
        try:
            return RankView(rank, host, None, await crew.state(rank))
        except CheckpointEngineError as e:
            before = self._views.get(rank)
            return RankView(rank, host, str(e), before.state if before else None)

    async def _pause(self) -> None:
        least = max(BUSY_SECONDS, self.node.world_size / RANKS_A_SECOND)
        await asyncio.sleep(least)
        late = any(view.state is not None and view.state.running and view.error is None for view in self._views.values())
        if self.node.tracker.running is None and not late:
            await self.node.pulse.wait(self.node.pulse.count, IDLE_SECONDS - BUSY_SECONDS)

    # --- all ranks -----------------------------------------------------------------------------------------------------

    def must_lead(self) -> None:
        """Raises NotLeaderError."""
        if self.node.rank != LEADER:
            raise NotLeaderError(f"this is rank {self.node.rank}: ask rank {LEADER}, which speaks for the fleet")

    def _need_crew(self) -> Crew:
        self.must_lead()
        if self._crew is None:
            raise NotMetError(self.node.meeting_error or f"the {self.node.world_size} ranks have not all met yet")
        return self._crew

    async def _all(self, command: Command, seconds: float) -> dict[int, BaseException | None]:
        """Have every rank do it; what each raised."""
        crew = self._need_crew()
        async with self._order if isinstance(command, COLLECTIVE) else contextlib.nullcontext():
            work = [self._one(crew, rank, command, seconds) for rank in crew.hosts]
            results = await asyncio.gather(self.node.do(command), *work, return_exceptions=True)
        if not isinstance(command, RollOut):
            await self._look()
        return dict(zip((LEADER, *crew.hosts), results, strict=True))

    async def _one(self, crew: Crew, rank: int, command: Command, seconds: float) -> None:
        answer = await crew.command(rank, command, seconds)
        if isinstance(answer, Refused):
            raise RankError(answer.problem, answer.status)

    async def _must(self, command: Command, seconds: float) -> None:
        """As `_all`. Raises the first rank's error."""
        results = await self._all(command, seconds)
        for error in results.values():
            if error is not None:
                raise error

    async def register(self, name: str, directory: str | None, files: Sequence[str]) -> CheckpointView:
        """On all ranks, or on none. Raises what register_checkpoint raises, on whichever rank."""
        results = await self._all(Register(name, directory, tuple(files)), REGISTER_SECONDS)
        if error := next((e for e in results.values() if e is not None), None):
            await self._take_back(name, [rank for rank, e in results.items() if e is None])
            raise error
        await self._must(Gather(name), self.node.join_seconds + ENGINE_SECONDS)
        return self.checkpoint(name)

    async def _take_back(self, name: str, ranks: Sequence[int]) -> None:
        crew, command = self._need_crew(), Unregister(name, False)
        for rank in ranks:
            with contextlib.suppress(CheckpointEngineError):
                await (self.node.do(command) if rank == LEADER else self._one(crew, rank, command, REGISTER_SECONDS))

    async def unregister(self, name: str, force: bool) -> None:
        """On all ranks. Raises the first rank's error; ranks that could have forgotten it then."""
        self.node.manifests.pop(name, None)
        await self._must(Unregister(name, force), REGISTER_SECONDS)

    # --- updates -------------------------------------------------------------------------------------------------------

    def start(self, command: RollOut) -> UpdateRecord:
        """Raises UpdateInProgressError, CheckpointNotFoundError."""
        self._need_crew()
        self.checkpoint(command.name)
        if (record := self.node.tracker.begin(command.name, command.version)) is None:
            raise UpdateInProgressError("an update is running: one at a time")
        self._engines = command.engines
        self._spawn(self._update(record.id, command))
        return record

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _update(self, id_: str, command: RollOut) -> None:
        # Each step of a rollout has a deadline of its own; this one is for a rank that forgets all of them.
        seconds = 2 * command.timeout + (command.ready_seconds or 0.0) + 6 * self.node.join_seconds
        results: dict[int, BaseException | None] = {}
        try:
            results = await self._all(Gather(command.name), self.node.join_seconds + ENGINE_SECONDS)
            if not any(results.values()):
                results = await self._all(command, seconds)
        finally:
            failed = {rank: e for rank, e in results.items() if e is not None}
            error = next(iter(failed.values()), CheckpointEngineError("rank 0 stopped"))
            for rank, e in failed.items():
                log.log(logging.WARNING if e is error else logging.INFO, "update %s, rank %d: %s", id_, rank, e)
            self.node.tracker.fail(id_, problem_of(error, LEADER))  # if nothing has ended it yet

    def record(self, id_: str) -> UpdateRecord:
        """Raises NotFoundError."""
        running = self.running
        record = running if running is not None and running.id == id_ else self.node.tracker.find(id_)
        if record is None:
            raise NotFoundError(f"no update {id_!r}; the last {len(self.updates())} are known")
        return record

    def trace(self, id_: str) -> Trace:
        """Raises NotFoundError."""
        self.record(id_)
        if (trace := self.node.tracker.trace(id_)) is None:
            raise NotFoundError(
                f"update {id_!r} has no timeline: the last {KEPT_TIMELINES} have that were committed, unless it is switched off"
            )
        return trace

    def timeline(self, id_: str) -> TimelineView:
        """Blocks for as long as it takes to make. Raises NotFoundError."""
        trace = self.trace(id_)
        found = summarise(trace, self._ceilings)
        ranks = [RankTimeline(t.rank, t.host, [SpanView(*msgspec.structs.astuple(s)) for s in t.spans]) for t in trace.ranks]
        stages = [stage.stage for stage in found.stages]
        return TimelineView(id_, trace.version, trace.method, trace.nbytes, trace.seconds, found.bound, stages, ranks)

    def cancel(self, id_: str) -> UpdateRecord:
        """Ask for it; the record says when it is over. Raises NotFoundError."""
        if not is_over(record := self.record(id_)):
            self._spawn(self._cancel(id_))
        return record

    async def _cancel(self, id_: str) -> None:
        """There is nothing to cancel before all ranks have gathered."""
        while not is_over(self.record(id_)) and not self.node.ps.watch.cancel(f"update {id_} was cancelled"):
            await asyncio.sleep(CANCEL_SECONDS)

    @property
    def running(self) -> UpdateRecord | None:
        if (record := self.node.tracker.running) is None:
            return None
        states = {view.rank: view.state for view in self._views.values()}
        done = [self.node.tracker.done if record.attempts else 0]
        for rank in range(1, self.node.world_size):
            state = states.get(rank)
            done.append(state.done if state is not None and state.running else 0)
        return dataclasses.replace(record, done=done)

    def updates(self) -> list[UpdateRecord]:
        """Newest first, the one that runs included."""
        running = self.running
        return [*([running] if running else []), *self.node.tracker.updates()]

    # --- what there is -------------------------------------------------------------------------------------------------

    def view(self) -> FleetView:
        node = self.node
        mine = node.state()
        ranks = [RankView(node.rank, mine.server.host, None, mine), *self._views.values()]
        error = None if node.met else node.meeting_error or "waiting for all ranks to meet"
        return FleetView(node.world_size, node.met, error, __version__, ranks, self.running, self._ceilings)

    def _states(self) -> dict[int, RankState]:
        return {view.rank: view.state for view in self.view().ranks if view.state is not None}

    def checkpoints(self) -> list[CheckpointView]:
        """As of the last look at the ranks."""
        parts: dict[str, list[CheckpointPart]] = {}
        for rank, state in self._states().items():
            for held in state.server.checkpoints:
                parts.setdefault(held.name, []).append(CheckpointPart(rank, held.nbytes, held.tensors))
        views = []
        for name, held_by in parts.items():
            manifest = self.node.manifests.get(name)
            version = None if manifest is None else manifest.version
            nbytes, tensors = sum(p.nbytes for p in held_by), sum(p.tensors for p in held_by)
            views.append(CheckpointView(name, nbytes, tensors, version, held_by))
        return views

    def checkpoint(self, name: str) -> CheckpointView:
        """Raises CheckpointNotFoundError."""
        for view in self.checkpoints():
            if view.name == name:
                return view
        raise CheckpointNotFoundError(name, "on any rank")

    def detail(self, name: str, contains: str, offset: int, limit: int) -> CheckpointDetail:
        """Blocks for as long as it takes to list all tensors. Raises CheckpointNotFoundError."""
        view, manifest = self.checkpoint(name), self.node.manifest(name)
        tensors = [
            TensorView(t.name, t.dtype, list(t.shape), t.nbytes, holder.rank)
            for holder in manifest.ranks
            for region in holder.regions
            for t in region.tensors
            if contains in t.name
        ]
        tensors.sort(key=lambda t: t.name)
        return CheckpointDetail(view, len(tensors), tensors[offset : offset + limit])

    async def weights(self) -> WeightsView:
        """What each worker and each engine serves; all are asked now, for 5 s at most."""
        if self._crew is not None:
            await self._look()
        workers = [WorkerWeights(rank, s.version, s.dirty) for rank, s in sorted(self._states().items())]
        engines = await asyncio.gather(*(asyncio.to_thread(self._ask, spec) for spec in self._engines))
        return WeightsView(workers, list(engines))

    def _ask(self, spec: EngineSpec) -> EngineWeights:
        try:
            (engine,) = self.node.clients.get([spec])
            served = engine.weights(ENGINE_SECONDS)
        except CheckpointEngineError as e:
            return EngineWeights(spec.url, None, None, str(e))
        if served is None:
            return EngineWeights(engine.endpoint, None, None)
        return EngineWeights(engine.endpoint, served.version, served.dirty)
