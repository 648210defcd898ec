"""The record of updates that one rank keeps, made from the events of its server whoever started them."""

from __future__ import annotations

import dataclasses
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec

from checkpoint_engine.errors import UpdateError
from checkpoint_engine.http.problems import problem_of
from checkpoint_engine.http.records import RUNNING, Problem, UpdateRecord
from checkpoint_engine.server.events import CANCELLED
from checkpoint_engine.server.watch import Ended, Event, Moved, Report, Started
from checkpoint_engine.timeline import Trace

KEPT_UPDATES, KEPT_TIMELINES = 100, 20


class Tracker:
    """An observer. Threads share it. changed: called, in whichever thread, after each change.

    size_of: checkpoint -> bytes of its tensors, 0 where that is not known.
    """

    def __init__(self, rank: int, size_of: Callable[[str], int], kept: int = KEPT_UPDATES) -> None:
        self._rank, self._size_of = rank, size_of
        self._lock = threading.Lock()
        self._count = 0
        self._running: UpdateRecord | None = None
        self._since = 0.0
        self._depth = 0
        self._ended: deque[UpdateRecord] = deque(maxlen=kept)
        self._timelines: dict[str, bytes] = {}  # id -> Trace, oldest first
        self._version: str | None = None
        self._dirty: bool | None = None
        self.done = 0  # bytes of buckets that are complete on this rank
        self.changed: Callable[[], None] = lambda: None
        self.ended: Callable[[UpdateRecord], None] = lambda record: None

    # --- what happens --------------------------------------------------------------------------------------------------

    def begin(self, checkpoint: str, version: str | None) -> UpdateRecord | None:
        """A record of an update that is about to be started; None: one is running."""
        with self._lock:
            if self._running is not None:
                return None
            record = self._open(checkpoint, version)
        self.changed()
        return record

    def fail(self, id_: str, problem: Problem) -> None:
        """The update that was begun failed, if its server has not said so itself."""
        with self._lock:
            if self._running is None or self._running.id != id_:
                return
            record = self._close(dataclasses.replace(self._running, state="failed", error=problem))
        self._announce(record)

    def __call__(self, event: Event) -> None:
        record = None
        match event:
            case Started():
                self._start(event)
            case Moved(nbytes=nbytes):
                self.done += nbytes  # only one thread moves buckets
            case Ended():
                record = self._end(event)
        if record is not None:
            self._announce(record)
        else:
            self.changed()

    def _start(self, event: Started) -> None:
        nbytes = self._size_of(event.checkpoint)
        with self._lock:
            record = self._running or self._open(event.checkpoint, event.version)
            self._depth += 1
            version = event.version or record.version
            if not event.rollout:
                self.done = 0
                record = dataclasses.replace(record, state="updating", attempts=record.attempts + 1)
            self._running = dataclasses.replace(record, version=version, nbytes=nbytes)

    def _end(self, event: Ended) -> UpdateRecord | None:
        with self._lock:
            self._depth -= 1
            self._learn(event)
            if self._running is None or self._depth > 0:
                return None
            if event.report is not None and event.report.trace.ranks:
                self._keep_timeline(self._running.id, event.report.trace)
            return self._close(self._finished(self._running, event.report, event.error))

    def _keep_timeline(self, id_: str, trace: Trace) -> None:
        self._timelines[id_] = msgspec.msgpack.encode(trace)
        while len(self._timelines) > KEPT_TIMELINES:
            del self._timelines[gone := next(iter(self._timelines))]
            for number, record in enumerate(self._ended):
                if record.id == gone:
                    self._ended[number] = dataclasses.replace(record, timeline=False)

    def _learn(self, event: Ended) -> None:
        """What the worker beside this rank serves now."""
        if event.report is not None and not event.rollout:
            self._version, self._dirty = event.report.version, False
        elif isinstance(event.error, UpdateError) and event.error.committed:
            self._version, self._dirty = self._running.version if self._running is not None else None, False
        elif isinstance(event.error, UpdateError) and event.error.dirty:
            self._dirty = True
        elif isinstance(event.error, UpdateError) and event.error.restored is not None:
            self._version, self._dirty = event.error.restored, False

    def _finished(self, record: UpdateRecord, report: Report | None, error: BaseException | None) -> UpdateRecord:
        if report is not None:
            done = dataclasses.replace(record, state="committed", version=report.version, nbytes=report.nbytes)
            return dataclasses.replace(done, report=report.to_dict(), timeline=record.id in self._timelines)
        cancelled = isinstance(error, UpdateError) and error.stage == CANCELLED
        problem = None if error is None else problem_of(error, self._rank)
        return dataclasses.replace(record, state="cancelled" if cancelled else "failed", error=problem)

    def _open(self, checkpoint: str, version: str | None) -> UpdateRecord:
        self._count += 1
        self._since, self.done = time.monotonic(), 0
        self._running = UpdateRecord(f"{self._count}-{secrets.token_hex(3)}", checkpoint, version, "starting", time.time(), 0.0)
        return self._running

    def _close(self, record: UpdateRecord) -> UpdateRecord:
        record = dataclasses.replace(record, seconds=time.monotonic() - self._since, done=[])
        self._ended.append(record)
        self._running, self._depth = None, 0
        return record

    def _announce(self, record: UpdateRecord) -> None:
        self.ended(record)
        self.changed()

    # --- what it knows -------------------------------------------------------------------------------------------------

    @property
    def running(self) -> UpdateRecord | None:
        with self._lock:
            if self._running is None:
                return None
            return dataclasses.replace(self._running, seconds=time.monotonic() - self._since)

    @property
    def worker(self) -> tuple[str | None, bool | None]:
        """(version, dirty) of the worker beside this rank, as far as updates tell; None: not known."""
        with self._lock:
            return self._version, self._dirty

    def updates(self) -> list[UpdateRecord]:
        """Those that are over, newest first."""
        with self._lock:
            return list(reversed(self._ended))

    def trace(self, id_: str) -> Trace | None:
        """Of an update that is over; None where none is kept."""
        with self._lock:
            kept = self._timelines.get(id_)
        return None if kept is None else msgspec.msgpack.decode(kept, type=Trace)

    def find(self, id_: str) -> UpdateRecord | None:
        running = self.running
        known = [running] if running is not None else []
        return next((r for r in (*known, *self.updates()) if r.id == id_), None)


def is_over(record: UpdateRecord) -> bool:
    return record.state not in RUNNING
