"""What rank 0 decides in an update: when a pass begins, when it commits, when the update is over.

Pure state: it hears messages and gives orders; time is an argument.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence

from checkpoint_engine.errors import CheckpointEngineError, DeadlineError, ProtocolError
from checkpoint_engine.server.events import VERIFY
from checkpoint_engine.server.slices import SliceCheck
from checkpoint_engine.settings import Settings
from checkpoint_engine.timeline import Span, Timeline
from checkpoint_engine.transport import messages as m
from checkpoint_engine.transport.meeting import LEADER

MAX_REPEATS = 4
"""Streams of one pass: one that lacks what its worker needs after all, recorded, proved, and the loader alone where that was
refused."""


class Leader:
    """The first pass begins when every rank's worker is there, but for ranks that said that none will come; a further one
    when some worker asks for it. Ranks without one relay. A request that returned proves nothing; the update ends when all
    have returned, no pass runs and no worker waits. A pass is streamed again to workers that ask for it, and commits when all are
    ready, and the slices that they took, if these are checked, are what was registered."""

    def __init__(self, number: int, world_size: int, settings: Settings, now: float, slices: SliceCheck | None = None) -> None:
        self._number, self._everybody, self._settings = number, frozenset(range(world_size)), settings
        self._slices = slices
        self._waiting: dict[int, int] = {}  # rank -> workers that wait there
        self._names: dict[int, collections.deque[tuple[str, ...]]] = collections.defaultdict(collections.deque)  # theirs
        self._returned: set[int] = set()
        self._absent: set[int] = set()
        self._done: dict[int, m.PassDone] = {}
        self._settled: set[int] = set()
        self._spans: dict[int, tuple[Span, ...]] = {}  # by rank, of all passes
        self._pass = self._repeats = 0
        self._state = "idle"  # -> "loading" -> "committing" -> "idle"
        self._grace_ends = math.inf
        self._attach_by = now + settings.attach_timeout

    def hear(self, sender: int, message: object) -> None:
        """Raises ProtocolError for a message that fits no state."""
        match message:
            case m.Waiting():
                self._waiting[sender] = self._waiting.get(sender, 0) + 1
                self._names[sender].append(message.slices)
            case m.Returned(absent=absent):
                self._returned.add(sender)
                if absent:
                    self._absent.add(sender)
            case m.PassDone(pass_=number) if self._state == "loading" and number == self._pass:
                if message.again and self._repeats == MAX_REPEATS:
                    raise ProtocolError(
                        f"the worker of rank {sender} asks for pass {number} once more, after {MAX_REPEATS} times"
                    )
                if self._slices is not None:
                    self._slices.hear(sender, message.sums, message.taken)
                self._done[sender] = message
            case m.Settled(pass_=number, spans=spans) if self._state == "committing" and number == self._pass:
                self._settled.add(sender)
                self._spans[sender] = self._spans.get(sender, ()) + spans
            case _:
                raise ProtocolError(f"rank {sender} sent {type(message).__name__} while the leader was {self._state}")

    @property
    def wake(self) -> float:
        """When to ask for orders again even if nothing was heard."""
        return min(self._grace_ends, self._attach_by)

    def orders(self, now: float) -> list[m.Begin | m.CommitPass | m.End]:
        """What to tell all ranks now, given what was heard."""
        if self._state == "loading" and self._done.keys() == self._everybody:
            if again := {rank for rank, done in self._done.items() if done.again}:
                return [self._repeat(again)]
            self._state = "committing"
            self._settled.clear()
            return [m.CommitPass(self._number, self._pass)]
        if self._state == "committing" and self._settled == self._everybody:
            self._state = "idle"
        if self._state == "idle":
            return self._idle(now)
        return []

    def _idle(self, now: float) -> list[m.Begin | m.CommitPass | m.End]:
        asking = {rank for rank, count in self._waiting.items() if count}
        if asking and asking >= self._everybody - self._absent:
            return [self._begin(asking)]
        if self._pass == 0:
            return []
        if asking:
            # Workers of one engine ask within moments of each other: one pass serves them all.
            self._grace_ends = min(self._grace_ends, now + self._settings.pass_grace)
            return [self._begin(asking)] if now >= self._grace_ends else []
        if self._returned == self._everybody:
            self._state = "ended"
            return [self._end()]
        return []

    def timelines(self, hosts: Sequence[str]) -> tuple[Timeline, ...]:
        """Of all ranks, in rank order; none without spans."""
        return tuple(Timeline(rank, hosts[rank], spans) for rank, spans in sorted(self._spans.items()) if spans)

    def _end(self) -> m.End:
        done = [self._done[rank] for rank in sorted(self._done)]
        ways = tuple(dict.fromkeys(way for each in done for way in each.ways))
        notes = tuple(f"rank {rank}: {note}" for rank, each in enumerate(done) for note in each.notes)
        return m.End(self._number, tuple(each.stats for each in done), ways, notes)

    def _begin(self, ranks: set[int]) -> m.Begin:
        names = {rank: self._names[rank].popleft() for rank in ranks}
        for rank in ranks:
            self._waiting[rank] -= 1
        self._pass, self._repeats = self._pass + 1, 1
        self._state, self._grace_ends, self._attach_by = "loading", math.inf, math.inf
        self._done.clear()
        slicing = m.Slicing() if self._slices is None else self._slices.begin(names, len(self._everybody))
        return m.Begin(self._number, self._pass, tuple(sorted(ranks)), slicing=slicing)

    def _repeat(self, ranks: set[int]) -> m.Begin:
        self._pass, self._repeats = self._pass + 1, self._repeats + 1
        self._done.clear()
        slicing = m.Slicing() if self._slices is None else self._slices.slicing
        return m.Begin(self._number, self._pass, tuple(sorted(ranks)), again=True, slicing=slicing)

    def trouble(self, now: float) -> tuple[int, str, CheckpointEngineError] | None:
        """(rank, stage, error) when the first pass's workers ought to have come by now; or when all are ready, and what one took
        is not what was registered."""
        loaded = self._state == "loading" and self._done.keys() == self._everybody
        if self._slices is not None and loaded and not any(done.again for done in self._done.values()):
            wrong = self._slices.verdict()
            if wrong is not None:
                return wrong[0], VERIFY, wrong[1]
        if now < self._attach_by:
            return None
        missing = self._missing_workers()
        error = DeadlineError(f"the workers of ranks {missing} to connect", self._settings.attach_timeout)
        return (missing or [LEADER])[0], "attach", error

    def _missing_workers(self) -> list[int]:
        return sorted(r for r in self._everybody - self._absent if not self._waiting.get(r))

    def waiting_for(self) -> tuple[str, frozenset[int]]:
        """What, and for which ranks, for the error of a deadline."""
        if self._state == "loading":
            late = self._everybody - self._done.keys()
            return f"ranks {sorted(late)} to load pass {self._pass}", late
        if self._state == "committing":
            late = self._everybody - self._settled
            return f"ranks {sorted(late)} to commit pass {self._pass}", late
        if self._pass == 0:
            late = frozenset(self._missing_workers())
            return f"the workers of ranks {sorted(late)} to connect", late
        late = self._everybody - self._returned
        return f"the requests of ranks {sorted(late)} to return", late
