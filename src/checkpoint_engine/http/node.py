"""One rank behind its REST: its server, the threads that do what blocks, and what is known about it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from checkpoint_engine.engines.embedded.threads import SerialThread
from checkpoint_engine.errors import CheckpointEngineError, CheckpointNotFoundError, DeadlineError
from checkpoint_engine.http.commands import COLLECTIVE, Answer, Command, Done, EngineClients, EngineSpec, Refused, execute
from checkpoint_engine.http.crew import Introduction
from checkpoint_engine.http.problems import problem_of, status_of
from checkpoint_engine.http.pulse import Pulse
from checkpoint_engine.http.records import RankState
from checkpoint_engine.http.tracker import Tracker
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.ps import ParameterServer

log = logging.getLogger(__name__)
T = TypeVar("T")
STOP_SECONDS = 5.0


class Node:
    """A context manager. All collective calls of this rank run in one thread, in the order in which they came.

    control_url   where rank 0 reaches this rank; "" on rank 0 itself
    secret        what rank 0 will say there; made by rank 0, "" on the others
    join_seconds  for all ranks to meet, and to reach the same collective call
    engines       that are updated when a request names none
    """

    def __init__(
        self,
        ps: ParameterServer,
        *,
        control_url: str = "",
        secret: str = "",
        join_seconds: float = 300.0,
        engines: Sequence[EngineSpec] = (),
    ) -> None:
        self.ps, self.rank, self.world_size = ps, ps.rank, ps.world_size
        self.join_seconds, self.engines = join_seconds, tuple(engines)
        self.secret = secret
        self.introductions: tuple[Introduction, ...] = ()
        self.meeting_error: str | None = None
        self.clients, self.pulse = EngineClients(), Pulse()
        self.manifests: dict[str, Manifest] = {}
        self.tracker = Tracker(self.rank, self._size_of)
        self.tracker.changed = self.pulse.beat
        ps.watch.observers.append(self.tracker)
        self._mine = Introduction(self.rank, socket.gethostname(), control_url, secret)
        self._collective, self._other = SerialThread("rest-collective"), SerialThread("rest-register")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """An update that runs is cancelled on all ranks."""
        self.ps.watch.cancel(f"the server of rank {self.rank} stops")
        self.ps.watch.observers.remove(self.tracker)
        for thread in (self._collective, self._other):
            thread.close(STOP_SECONDS)
        self.clients.__exit__(kind, error, trace)

    async def meet(self) -> None:
        """Introduce this rank to the others; what is wrong with that is told to those who ask."""
        payload = msgspec.msgpack.encode(self._mine)
        try:
            payloads = await self.collective(partial(self.ps.watch.introduce, payload, self.join_seconds))
            self.introductions = tuple(msgspec.msgpack.decode(p, type=Introduction) for p in payloads)
            self.secret = self.introductions[0].secret
        except (CheckpointEngineError, msgspec.MsgspecError) as e:
            self.meeting_error = f"{type(e).__name__}: {e}"
            log.error("rank %d did not meet the others: %s", self.rank, e)
        self.pulse.beat()

    @property
    def met(self) -> bool:
        return bool(self.introductions)

    # --- work ----------------------------------------------------------------------------------------------------------

    async def collective(self, work: Callable[[], T]) -> T:
        """After what came before it. Raises DeadlineError when that takes longer than `join_seconds`."""
        loop, begun = asyncio.get_running_loop(), asyncio.Event()

        def begin() -> T:
            loop.call_soon_threadsafe(begun.set)
            return work()

        task = asyncio.ensure_future(self._collective.call(begin))
        turn = asyncio.ensure_future(begun.wait())
        try:
            await asyncio.wait((task, turn), timeout=self.join_seconds, return_when=asyncio.FIRST_COMPLETED)
            if not begun.is_set() and task.cancel():
                raise DeadlineError(f"the update that runs on rank {self.rank} to end", self.join_seconds)
            return await task
        finally:
            turn.cancel()
            task.cancel()

    async def other(self, work: Callable[[], T]) -> T:
        """What blocks and concerns this rank alone."""
        return await self._other.call(work)

    async def do(self, command: Command) -> None:
        """Raises what the server raises."""
        work = partial(execute, self.ps, self.clients, command)
        if isinstance(command, COLLECTIVE):
            await self.collective(partial(self.remembering, work))
        else:
            await self.other(work)

    async def answer(self, command: Command) -> Answer:
        """As `do`, for another rank."""
        try:
            await self.do(command)
        except Exception as e:  # of any kind: rank 0 waits for it
            return Refused(problem_of(e, self.rank), status_of(e))
        return Done()

    def remembering(self, work: Callable[[], T]) -> T:
        """Do it, and keep the manifest that was gathered."""
        try:
            return work()
        finally:
            with contextlib.suppress(CheckpointNotFoundError):
                manifest = self.ps.get_metas()
                _ = manifest.version  # takes long the first time, and whoever reads it later must not wait
                self.manifests[manifest.checkpoint] = manifest

    # --- state ---------------------------------------------------------------------------------------------------------

    def state(self) -> RankState:
        running = self.tracker.running is not None
        version, dirty = self.tracker.worker
        return RankState(self.ps.watch.status(), running, self.tracker.done if running else 0, version, dirty)

    def manifest(self, name: str | None) -> Manifest:
        """Of a checkpoint, or the last one. Raises CheckpointNotFoundError."""
        if name is not None and name in self.manifests:
            return self.manifests[name]
        manifest = self.ps.get_metas()
        if name is not None and manifest.checkpoint != name:
            raise CheckpointNotFoundError(name, "in what the ranks have gathered")
        return manifest

    def _size_of(self, name: str) -> int:
        with contextlib.suppress(CheckpointNotFoundError):
            return self.manifest(name).nbytes
        return 0

    async def stop(self) -> None:
        """Streams end."""
        self.pulse.close()
        await asyncio.sleep(0)
