"""One checkpoint into many engines in their one safe order: all ready, all paused, one update, each finished and resumed.

Each engine is asked by the first rank of its replica, all at the same time. After each step the ranks tell each other how it
went, so that all of them go on, go on without the same engines, or stop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Collection, Sequence

import msgspec

from checkpoint_engine.engines.base import Engine, replica_size
from checkpoint_engine.engines.rollout import Policy, Turn
from checkpoint_engine.errors import CheckpointEngineError, EngineError, ReplicaError, UpdateError
from checkpoint_engine.server.events import CANCELLED, VERIFY
from checkpoint_engine.server.report import UpdateReport
from checkpoint_engine.server.request import NO_WORKER, RequestFunction
from checkpoint_engine.server.restore import Restorer, told
from checkpoint_engine.server.served import Commit
from checkpoint_engine.timeline import Trace
from checkpoint_engine.transport.links import Links

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicaReport:
    """One engine. pause_ms: see RolloutReport, NaN when no call paused it; error: why the others went on without it."""

    endpoint: str
    pause_ms: float
    error: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class RolloutReport:
    """A rollout, the same on every rank but for `update.seconds`.

    update    the update alone
    replicas  in rank order
    attempts  how often the update was begun; more than once when it went on without an engine that failed
    """

    update: UpdateReport
    replicas: tuple[ReplicaReport, ...]
    attempts: int = 1

    @property
    def version(self) -> str:
        return self.update.version

    @property
    def nbytes(self) -> int:
        return self.update.nbytes

    @property
    def seconds(self) -> float:
        """Of the update alone."""
        return self.update.seconds

    @property
    def trace(self) -> Trace:
        """As UpdateReport.trace."""
        return self.update.trace

    @property
    def pause_ms(self) -> float:
        """The longest pause of an engine, in milliseconds: from the call that paused it to the answer that it goes on.

        NaN when none was paused by a call.
        """
        return max((r.pause_ms for r in self.replicas if not math.isnan(r.pause_ms)), default=math.nan)

    @property
    def failed(self) -> dict[str, str]:
        """Endpoint -> why, of engines that the others went on without."""
        return {r.endpoint: r.error for r in self.replicas if r.error}

    def __str__(self) -> str:
        paused = "" if math.isnan(self.pause_ms) else f"; engines paused for {self.pause_ms:.0f} ms at most"
        failed = "".join(f"; without {endpoint}: {why}" for endpoint, why in self.failed.items())
        return f"{self.update}{paused}{failed}"

    def to_dict(self) -> dict[str, object]:
        """UpdateReport.to_dict, and pause_ms (None: not paused), attempts, replicas."""
        replicas = [{"endpoint": r.endpoint, "pause_ms": _finite(r.pause_ms), "error": r.error or None} for r in self.replicas]
        return {**self.update.to_dict(), "pause_ms": _finite(self.pause_ms), "attempts": self.attempts, "replicas": replicas}


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


class _Said(msgspec.Struct, frozen=True, array_like=True):
    """How a step went on one rank. culprit: the rank that an update failed on."""

    error: str = ""
    dirty: bool = False
    culprit: int = -1
    pause_ms: float | None = None


class Rollout:
    """One use: make it and `run` it, on all ranks with the same engines and policy. It owns nothing.

    seconds       for an engine to answer the request to update
    join_seconds  for all ranks to reach the same step
    restorer      puts the last committed checkpoint back when the update failed; None: the policy is not to
    Raises SettingsError when the ranks cannot be divided evenly among the engines.
    """

    def __init__(
        self,
        links: Links,
        engines: Sequence[Engine],
        policy: Policy,
        seconds: float,
        join_seconds: float,
        restorer: Restorer | None = None,
    ) -> None:
        self._links, self._engines, self._policy = links, engines, policy
        self._seconds, self._join_seconds, self._restorer = seconds, join_seconds, restorer
        self._size = replica_size(len(engines), links.rank, links.world_size)
        self._replica, position = divmod(links.rank, self._size)
        self._turn = Turn(engines[self._replica], policy) if position == 0 else None
        self._failed: dict[int, str] = {}  # replica -> why; the same on all ranks
        self._dirty: set[int] = set()  # replicas
        self._restored: str | None = None  # version that this replica was put back to
        self._attempts = 0

    def run(self, update: Callable[[RequestFunction], UpdateReport], version: str | None) -> RolloutReport:
        """`update`: one attempt, with the request function that it is given.

        Raises EngineError on the rank that asks it and ReplicaError on the others, or what `update` raises. Then, and
        for engines that were left out, clean engines have been resumed and dirty ones stay paused, unless the policy says
        otherwise; what is left to do is in the error's notes.
        """
        try:
            self._step("ready", lambda turn: turn.wait_ready(), self._policy.ready_seconds or 0.0)
            self._step("pause", lambda turn: turn.pause(), self._policy.call_seconds)
            report = self._update(update, version)
        except UpdateError as e:
            if self._restorer is None:
                self._let_go(e)
                raise
            raise self._after(e, self._restorer) from e
        except BaseException as e:
            self._let_go(e)
            raise
        return self._finish(report, version)

    def _after(self, error: UpdateError, restorer: Restorer) -> UpdateError:
        new = self._restore(error, restorer)
        self._let_go(new)
        return new

    def _let_go(self, error: BaseException) -> None:
        if self._turn is None:
            return
        turn, restored = self._turn, self._restored
        note = turn.give_up(self._replica in self._dirty) if restored is None else turn.go_back(restored)
        if note:
            error.add_note(note)

    def _finish(self, report: UpdateReport, version: str | None) -> RolloutReport:
        note = None
        if self._turn is not None and self._replica in self._failed:
            note = self._turn.give_up(self._replica in self._dirty)
        try:
            says = self._step("finish", lambda turn: turn.finish(version), 3 * self._policy.call_seconds)
        except EngineError as e:
            if self._turn is not None and math.isnan(self._turn.pause_ms) and e.endpoint == self._turn.engine.endpoint:
                e.add_note(f"engine at {e.endpoint} may still be paused; its weights are {report.version}")
            raise
        if note:
            log.warning("rank %d: %s", self._links.rank, note)
        leaders = says[:: self._size]
        replicas = tuple(
            ReplicaReport(engine.endpoint, math.nan if said.pause_ms is None else said.pause_ms, self._failed.get(number, ""))
            for number, (engine, said) in enumerate(zip(self._engines, leaders, strict=True))
        )
        return RolloutReport(report, replicas, self._attempts)

    # --- the update ----------------------------------------------------------------------------------------------------

    def _update(self, update: Callable[[RequestFunction], UpdateReport], version: str | None) -> UpdateReport:
        while True:
            self._attempts += 1
            try:
                report = update(self._request(version, self._failed))
            except UpdateError as e:
                if not self._without_culprit(e):
                    raise
            else:
                self._dirty &= self._failed.keys()
                return report

    def _request(self, version: str | None, without: Collection[int]) -> RequestFunction:
        """of `update`. without: replicas."""
        first = self._replica * self._size

        def request(handles: list[tuple[str, str]]) -> object:
            if self._replica in without:
                return NO_WORKER
            if self._turn is not None:
                self._turn.update(handles[first : first + self._size], version, self._seconds)
            return None

        return request

    def _without_culprit(self, error: UpdateError) -> bool:
        """After a failed attempt: whether there is to be another one, without the replica that it failed on."""
        try:
            culprit, reason = self._culprit(error)
        except CheckpointEngineError:  # a rank is gone, and what its worker holds nobody knows
            if error.dirty or self._size > 1:
                self._dirty.add(self._replica)
            return False
        if self._policy.on_replica_failure == "abort" or culprit in self._failed or error.stage in (CANCELLED, VERIFY):
            return False
        if len(self._failed) + 1 == len(self._engines):
            return False
        self._leave_out({culprit: reason})
        return True

    def _culprit(self, error: UpdateError) -> tuple[int, str]:
        """Collective, after a failed attempt: the replica that it failed on, and why; notes which are dirty now."""
        says = self._exchange("failure", _Said(error.reason, error.dirty, error.rank), self._join_seconds)
        self._dirty |= {rank // self._size for rank, said in enumerate(says) if said.dirty}
        return says[0].culprit // self._size, says[0].error

    # --- after a failed one --------------------------------------------------------------------------------------------

    def _restore(self, error: UpdateError, restorer: Restorer) -> UpdateError:
        """Collective: put back what was committed last, into all engines that take it; `error` with what came of it."""
        dirty = self._replica in self._dirty
        try:
            if (commit := restorer.agree(dirty)) is None:
                return error.but()
            left = self._put_back(commit, restorer)
        except CheckpointEngineError as e:
            return told(error, dirty=self._replica in self._dirty, why_not=str(e))
        self._dirty &= left.keys()
        if self._replica not in left:
            self._restored = commit.version
        without = [f"engine at {self._engines[replica].endpoint} ({why})" for replica, why in left.items()]
        return told(error, dirty=self._replica in self._dirty, restored=commit.version, without=without)

    def _put_back(self, commit: Commit, restorer: Restorer) -> dict[int, str]:
        """Replicas that could not take it, and why. Raises UpdateError when none could, and what `_exchange` does."""
        left = dict(self._failed)
        while True:
            try:
                restorer.put_back(commit, self._request(commit.version, left))
                return left
            except UpdateError as e:
                culprit, reason = self._culprit(e)
                if culprit in left or len(left) + 1 == len(self._engines):
                    raise
                left[culprit] = reason

    # --- steps ---------------------------------------------------------------------------------------------------------

    def _step(self, name: str, action: Callable[[Turn], None], seconds: float) -> list[_Said]:
        """Do it here, unless this replica was left out, and hear how it went elsewhere. Raises as `run`."""
        failure: CheckpointEngineError | None = None
        if self._turn is not None and self._replica not in self._failed:
            try:
                action(self._turn)
            except CheckpointEngineError as e:
                failure = e
        pause_ms = None if self._turn is None else _finite(self._turn.pause_ms)
        says = self._exchange(name, _Said(str(failure) if failure else "", pause_ms=pause_ms), seconds + self._join_seconds)
        new = {rank // self._size: said.error for rank, said in enumerate(says) if said.error}
        if new and (self._policy.on_replica_failure == "abort" or len(self._failed | new) == len(self._engines)):
            if isinstance(failure, EngineError):
                raise failure
            replica, reason = (self._replica, str(failure)) if failure else next(iter(new.items()))
            raise ReplicaError(self._engines[replica].endpoint, replica * self._size, name, reason) from failure
        self._leave_out(new)
        return says

    def _leave_out(self, failed: dict[int, str]) -> None:
        for replica, reason in failed.items():
            log.warning("going on without the engine at %s: %s", self._engines[replica].endpoint, reason)
        self._failed |= failed

    def _exchange(self, step: str, mine: _Said, seconds: float) -> list[_Said]:
        payloads = self._links.exchange(f"rollout, {step}", msgspec.msgpack.encode(mine), seconds)
        with contextlib.suppress(msgspec.MsgspecError):
            return [msgspec.msgpack.decode(payload, type=_Said) for payload in payloads]
        raise CheckpointEngineError("another rank runs another version of this package")
