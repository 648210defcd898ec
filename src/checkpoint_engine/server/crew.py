"""This rank's workers in one update: those that wait, the one of the pass that runs, and what they have told."""

from __future__ import annotations

import collections
import logging
import threading

from checkpoint_engine.errors import ProtocolError
from checkpoint_engine.server.events import WorkerCame
from checkpoint_engine.server.heard import Heard
from checkpoint_engine.server.report import merge
from checkpoint_engine.server.served import Served
from checkpoint_engine.transport import messages as m
from checkpoint_engine.transport.session import WorkerChannel, dismiss

log = logging.getLogger(__name__)


class Crew:
    """asked: how many came. reads: bytes that they would pull in the next update of the same plan; -1: one of them cannot. needs:
    the buckets of which the only one that came would take anything, as in Ready; empty: all, or several came. ahead: all of them
    have the regions of a later update ready. stats, ways, notes: of the whole update. noticed: those notes that are about workers
    that are not what this server left."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._waiting: collections.deque[WorkerCame] = collections.deque()
        self._current: WorkerCame | None = None
        self._streamed, self._tables = False, ""
        self.asked = 0
        self.reads = 0
        self.needs = b""
        self.ahead = True
        self.stats: dict[str, m.StageStats] = {}
        self.ways: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.noticed: tuple[str, ...] = ()

    def came(self, worker: WorkerCame) -> None:
        self._waiting.append(worker)
        self.asked += 1
        if note := self._served.notice(worker.hello):
            log.warning("%s: %s", worker.channel.peer, note)
            self.noticed += (note,)
            self.notes += (note,)

    @property
    def dirty(self) -> bool:
        """Whether one that has not committed since came with a mixture, which an earlier update left."""
        return any(worker.hello.dirty for worker in self._here())

    def _here(self) -> list[WorkerCame]:
        return [*self._waiting, *filter(None, [self._current])]

    def take(self, *, again: bool) -> WorkerCame:
        """The worker of the pass that begins; again: the one of the pass before, as it asked. Raises ProtocolError when there is
        none."""
        if again:
            self._streamed = True
        elif self._waiting:
            self._current, self._streamed = self._waiting.popleft(), False
        if self._current is None:
            raise ProtocolError("a pass began without this rank's worker")
        return self._current

    def known(self, worker: WorkerCame) -> tuple[str, ...]:
        """Names of the tables that it has."""
        return (*worker.hello.plans, self._tables) if self._streamed else worker.hello.plans

    def heard(self, heard: Heard, stats: dict[str, m.StageStats]) -> None:
        """Its stream is over."""
        self.stats, self._tables = merge(self.stats, stats), heard.tables
        self.notes += heard.notes
        if heard.way:
            self.ways = tuple(dict.fromkeys((*self.ways, heard.way)))
            self.reads = self.reads + heard.reads if min(self.reads, heard.reads) >= 0 else -1
            self.needs = heard.needs if self.asked == 1 else b""
            self.ahead = self.ahead and heard.ahead

    def commit(self, version: str, seconds: float) -> None:
        """Have the worker serve `version`; then it is none of the crew's. Raises PeerLostError, DeadlineError, ProtocolError."""
        if (worker := self._current) is not None:
            worker.channel.send(m.Commit(version), seconds=seconds)
            answer = worker.channel.receive(seconds=seconds, waiting_for="the commit to be acknowledged")
            if not isinstance(answer, m.Committed):
                raise ProtocolError(f"the worker answered Commit with {type(answer).__name__}")
            self._served.acknowledged(worker.hello.pid, version)
            worker.channel.close()
        self._current = None

    def dismiss(self, reason: str, running: threading.Thread | None, seconds: float) -> None:
        """Send all off, and wait for the pass that runs to notice."""
        channels: list[WorkerChannel] = [worker.channel for worker in self._here()]
        for channel in channels:
            dismiss(channel, reason)
        if running is not None:
            running.join(seconds)
        for channel in channels:
            channel.close()
