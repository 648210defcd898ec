"""What each stage of a pass did on this rank: statistics for the report, spans for the timeline."""

from __future__ import annotations

import time
from collections.abc import Callable

from checkpoint_engine.devices.spans import Spans
from checkpoint_engine.planning.plan import Piece, Plan
from checkpoint_engine.server.coming import Coming
from checkpoint_engine.server.heard import Heard
from checkpoint_engine.server.lane import Lane
from checkpoint_engine.timeline import Recorder
from checkpoint_engine.transport.collective import Ranks
from checkpoint_engine.transport.messages import StageStats


class Stages:
    """lifts: of this rank's pieces, in their order; one thread adds while another one settles."""

    def __init__(self, plan: Plan, lane: Lane, recorder: Recorder, coming: Coming) -> None:
        self._plan, self._lane, self._recorder, self._coming = plan, lane, recorder, coming
        self.lifts = Spans()
        self._began = 0.0

    def begin(self) -> None:
        """The pass does; nothing is queued yet."""
        self._began = time.perf_counter()
        clock = self._lane.lifting.clock() if self._recorder.enabled else None
        for spans in self._streams():
            spans.begin(clock)

    def settle(self) -> None:
        """Find out what took how long, of what is over: now and then, while later work runs."""
        for spans in self._streams():
            spans.settle()

    def _streams(self) -> list[Spans]:
        collective = self._lane.collective
        return [self.lifts] if collective is None else [self.lifts, collective.spans]

    def moved(self, lifted: int) -> dict[str, StageStats]:
        """Of lift and share, at the end. lifted: bytes."""
        lane, plan = self._lane, self._plan
        stream = [(index, plan.buckets[index].pieces[number]) for index, number in self._coming.stream]
        own = [(index, piece) for index, piece in stream if piece.owner == lane.rank]
        stats = {"lift": StageStats(lifted, self._take("lift", self.lifts, own))}
        if (collective := lane.collective) is not None:
            pieces = stream if collective.in_step else own
            stats["share"] = StageStats(self._coming.nbytes, self._take("share", collective.spans, pieces, collective.sent))
        return stats

    def _take(
        self, stage: str, spans: Spans, pieces: list[tuple[int, Piece]], sent: Callable[[Ranks], int] = lambda _: 1
    ) -> float:
        """pieces: (bucket, piece), as they were added. sent: see Collective. Returns the seconds."""
        seconds, times = spans.take()
        for (bucket, piece), (since, until) in zip(pieces, times, strict=False):  # no times without a clock
            self._recorder.add(stage, bucket, since, until, sent(self._coming.ranks(bucket)) * piece.nbytes)
        return seconds

    def loaded(self, heard: Heard) -> dict[str, StageStats]:
        """Of all that the worker did."""
        self._recorder.add_worker(heard.spans, self._began, time.perf_counter(), self._plan.sizes)
        return heard.stats(self._coming.nbytes)
