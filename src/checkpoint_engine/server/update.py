"""One update as one rank sees it: which pass runs when, when all commit, and how everybody stops together.

Every rank runs the same loop over one inbox: messages of the other ranks and events of this one. Rank 0 leads: it begins
passes, lets them commit, and ends the update. News of a failure goes from the rank where it happened straight to all.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable

import torch

from checkpoint_engine.errors import CheckpointEngineError, DeadlineError, UpdateError, said
from checkpoint_engine.planning.plan import Plan
from checkpoint_engine.planning.sharing import Shares
from checkpoint_engine.server.crew import Crew
from checkpoint_engine.server.events import PassEnded, RequestDone, SessionFailed, WorkerCame
from checkpoint_engine.server.expected import Expected
from checkpoint_engine.server.heard import Heard
from checkpoint_engine.server.lane import Lane
from checkpoint_engine.server.leader import Leader
from checkpoint_engine.server.level import await_verdict, level, telling
from checkpoint_engine.server.pass_errors import Fail, PassError
from checkpoint_engine.server.pass_thread import start_pass
from checkpoint_engine.server.pipeline import Pass
from checkpoint_engine.server.report import Outcome
from checkpoint_engine.server.request import Request, RequestFunction
from checkpoint_engine.server.served import Served
from checkpoint_engine.settings import Settings
from checkpoint_engine.timeline import Recorder
from checkpoint_engine.transport import messages as m
from checkpoint_engine.transport.links import LEFT, Inbox, Links
from checkpoint_engine.transport.meeting import LEADER

log = logging.getLogger(__name__)
CAUSE_SECONDS = 0.25
"""An engine's request fails because its worker did; the worker's own words, on their way here, say more."""

LATE_SECONDS = 1.0
"""Before an update's deadline: a request that ends by its own one then has the same."""


class UpdateRun:
    """inbox: of this update. hosts: of all ranks, for messages. served: what this rank's workers served before. make_pass: the
    kind of pass. device: uuid a worker on this rank must have, None: not checked. recorder: of this rank's timeline.
    expected: what workers check, None: nothing. shares: who takes part in which bucket of the first stream; None: all in all, as
    in every further one."""

    def __init__(
        self,
        inbox: Inbox,
        version: str,
        plan: Plan,
        lane: Lane,
        regions: list[torch.Tensor],
        links: Links,
        hosts: list[str],
        settings: Settings,
        served: Served,
        make_pass: Callable[..., Pass] = Pass,
        device: str | None = None,
        progress: Callable[[int], None] | None = None,
        recorder: Recorder | None = None,
        expected: Expected | None = None,
        shares: Shares | None = None,
    ) -> None:
        self._recorder, self._shares = recorder or Recorder(enabled=False), shares
        self._inbox, self._number = inbox, inbox.update
        self._version, self._plan, self._lane, self._regions = version, plan, lane, regions
        self._links, self._settings, self._device, self._progress = links, settings, device, progress
        self._make_pass, self._hosts = make_pass, hosts
        self._rank = links.rank
        self._deadline = time.monotonic() + settings.timeout
        self._crew = Crew(served)
        self._expected, slices = expected, None if expected is None else expected.slices()
        leads = self._rank == LEADER
        self._leader = Leader(inbox.update, links.world_size, settings, time.monotonic(), slices) if leads else None
        self._pass: Pass | None = None
        self._pass_thread: threading.Thread | None = None
        self._pass_number = 0
        self._loaded_before = False  # an earlier stream of the pass has
        self._dirty = False
        self._ready = self._committed = False  # this rank's workers, of the pass that runs; of the update

    def _put(self, event: object) -> None:
        self._inbox.put(self._rank, event)

    # --- the loop ------------------------------------------------------------------------------------------------------

    def run(self, request: RequestFunction, handles: list[tuple[str, str]]) -> Outcome:
        """Returns after the last pass has been committed on all ranks. Raises UpdateError, the same on all ranks."""
        asked = Request(self._inbox, self._rank, request, handles)
        # A stage's own deadline names most, the leader's less, a member's least: they come in this order.
        deadline = self._deadline + (0.5 if self._rank == LEADER else 1.0)
        try:
            while (end := self._step(deadline)) is None:
                pass
        except Fail as e:
            failure, end = e.failure, self._abort(e.failure, e.announced)
        except BaseException as e:  # Ctrl-C, or a mistake of ours: the others must not wait for this rank
            self._abort(self._failure("update", f"{type(e).__name__}: {e}"), announced=False)
            raise
        finally:
            asked.leave()
        if end is None:
            # Ranks that fail at the same time tell each other before they stop: now all know of all, and name the same one.
            raise self._error(min((failure, *self._inbox.failures), key=telling))
        timelines = self._leader.timelines(self._hosts) if self._leader is not None else ()
        crew = self._crew
        return Outcome(self._pass_number, end.stats, end.ways, end.notes, crew.reads, crew.needs, crew.ahead, timelines)

    def _error(self, failure: m.Failure) -> UpdateError:
        committed, f = self._committed and not self._dirty, failure
        error = UpdateError(rank=f.rank, host=f.host, stage=f.stage, reason=f.reason, dirty=self._dirty, committed=committed)
        serves = [f"its worker serves {self._version!r} already"] if committed else []
        for note in (*serves, *self._crew.noticed):
            error.add_note(f"rank {self._rank}: {note}")
        return error

    def _step(self, deadline: float) -> m.End | None:
        """Take one message or event. Returns the leader's End."""
        wake = deadline
        if self._leader is not None:
            self._check_deadlines(deadline)
            if self._inbox.failures:  # whether or not its turn has come: nothing is decided after it
                raise Fail(self._inbox.failures[0], announced=True)
            for order in self._leader.orders(time.monotonic()):
                self._links.tell(order)
            wake = min(deadline, self._leader.wake)
        if (entry := self._inbox.get(wake - time.monotonic())) is None:
            self._check_deadlines(deadline)
            return None
        try:
            return self._handle(*entry)
        except CheckpointEngineError as e:  # a link broke under a message, or a rank spoke out of turn
            self._await_cause()
            raise self._fail("update", str(e)) from e

    def _check_deadlines(self, deadline: float) -> None:
        if self._leader is not None and (found := self._leader.trouble(time.monotonic())):
            raise self._fail(found[1], str(found[2]), found[0])
        if time.monotonic() >= deadline:
            what, ranks = f"rank {LEADER} to end the update", frozenset([LEADER])
            if self._leader is not None:
                what, ranks = self._leader.waiting_for()
            raise self._fail("update", str(DeadlineError(what, self._settings.timeout)), min(ranks) if ranks else None)

    def _handle(self, sender: int, event: object) -> m.End | None:
        match event:
            case WorkerCame():
                self._welcome(event)
            case RequestDone(error=None, absent=absent):
                self._links.send(LEADER, m.Returned(self._number, absent))
            case RequestDone(error=TimeoutError()) if time.monotonic() > self._deadline - LATE_SECONDS:
                pass  # the engine waits for whom the update waits for, whose own deadline is near, and says for whom
            case RequestDone(error=error) if error is not None:
                self._await_cause()
                raise self._fail("request", said(error))
            case SessionFailed(error=problem):
                raise self._fail("attach", str(problem))
            case m.Begin():
                self._begin(event)
            case PassEnded(stats=None, error=failed):
                stage = failed.stage if isinstance(failed, PassError) else "update"
                raise self._fail(stage, failed.reason if isinstance(failed, PassError) else str(failed))
            case PassEnded(stats=stats):
                self._pass_over(stats or {})
            case m.CommitPass():
                self._commit()
            case m.Failure():
                raise Fail(event, announced=True)
            case m.Lost(reason=reason) if reason == LEFT:
                pass  # it has seen the end of this update already, or its Failure came first
            case m.Lost(rank=rank, reason=reason):
                raise self._fail("update", f"the server of rank {rank} is gone ({reason})", rank)
            case m.Stopped():
                self._inbox.put(sender, event)  # _level counts it
                self._await_cause()
                raise self._fail("update", f"rank {sender} stopped")
            case m.End():
                return event
            case _ if self._leader is not None:
                self._leader.hear(sender, event)
        return None

    def _await_cause(self) -> None:
        """Give a more telling failure a moment to arrive; raises it if it does."""
        until = time.monotonic() + CAUSE_SECONDS
        kept = []
        try:
            while (entry := self._inbox.get(until - time.monotonic())) is not None:
                kept.append(entry)
                event = entry[1]
                if isinstance(event, m.Failure | m.Lost) or (isinstance(event, PassEnded) and event.error is not None):
                    self._handle(*entry)
        finally:
            for entry in kept:
                self._inbox.put(*entry)

    # --- passes --------------------------------------------------------------------------------------------------------

    def _welcome(self, worker: WorkerCame) -> None:
        self._crew.came(worker)
        if self._device is not None and worker.hello.device != self._device:
            raise self._fail("attach", f"a worker on {worker.hello.device} took the handle of {self._device} (rank {self._rank})")
        self._links.send(LEADER, m.Waiting(self._number, self._crew.asked, worker.hello.slices))

    def _begin(self, begin: m.Begin) -> None:
        if begin.again:
            self._loaded_before = self._loaded_before or (self._pass is not None and self._pass.last_sent >= 0)
            self._lane.rest()
        else:
            self._recorder.lap("wait")
        worker = self._crew.take(again=begin.again) if self._rank in begin.ranks else None
        self._pass_number, self._ready = begin.pass_, False
        if self._expected is not None:
            self._expected.ask(begin.slicing, self._rank)
        self._pass = self._make_pass(
            self._plan,
            self._lane,
            self._regions,
            worker.channel if worker else None,
            self._crew.known(worker) if worker else (),
            self._settings.timeout,
            self._deadline,
            self._progress if begin.pass_ == 1 else None,
            self._recorder,
            self._expected,
            self._shares if begin.pass_ == 1 else None,
        )
        self._pass_thread = start_pass(self._pass, self._put)

    def _pass_over(self, stats: dict[str, m.StageStats]) -> None:
        heard = self._pass.heard if self._pass is not None else Heard()
        self._crew.heard(heard, stats)
        self._ready = not heard.again
        crew, told = self._crew, (heard.sums, heard.taken)
        self._links.send(
            LEADER, m.PassDone(self._number, self._pass_number, crew.stats, heard.again, crew.ways, crew.notes, *told)
        )

    def _commit(self) -> None:
        self._ready = False
        self._recorder.lap()
        try:
            self._crew.commit(self._version, self._settings.commit_timeout)
        except CheckpointEngineError as e:
            self._dirty = True
            raise self._fail("commit", str(e)) from e
        self._pass, self._loaded_before, self._committed = None, False, True
        self._lane.rest()
        self._recorder.lap("commit")
        self._links.send(LEADER, m.Settled(self._number, self._pass_number, self._recorder.take()))

    def _await_verdict(self) -> m.End | None:
        """The update has failed somewhere, and this rank is ready, or has committed. Whether to commit, and whether the update is
        over, is the leader's to say, who may have said so before it heard of the failure: then all that can commit do, so that no
        worker is left with something else, and what is over is over on all ranks."""
        if not (self._ready or (self._committed and self._pass is None)):
            return None
        patience = 0.0 if self._leader is not None or LEADER in self._links.lost else self._settings.stop_timeout
        verdict = await_verdict(self._inbox, patience)
        if isinstance(verdict, m.CommitPass):
            with contextlib.suppress(Fail, CheckpointEngineError):
                self._commit()
        return verdict if isinstance(verdict, m.End) else None

    # --- failure -------------------------------------------------------------------------------------------------------

    def _fail(self, stage: str, reason: str, rank: int | None = None) -> Fail:
        return Fail(self._failure(stage, reason, rank), announced=False)

    def _failure(self, stage: str, reason: str, rank: int | None = None) -> m.Failure:
        """rank: whose fault it is; None: this one's."""
        rank = self._rank if rank is None else rank
        return m.Failure(self._number, rank, self._hosts[rank], stage, reason)

    def _abort(self, failure: m.Failure, announced: bool) -> m.End | None:
        """Tell everybody, stop this rank's pass, tell its workers, and leave the communicator consistent or give it up. Or return
        the leader's End, where it came first."""
        if not announced:
            self._links.tell(failure, to_self=False)
        if (end := self._await_verdict()) is not None:
            return end
        if self._pass is not None:
            self._pass.stop()
        text = str(UpdateError(rank=failure.rank, host=failure.host, stage=failure.stage, reason=failure.reason))
        self._crew.dismiss(text, self._pass_thread, self._settings.stop_timeout)
        loaded = self._loaded_before or (self._pass is not None and self._pass.last_sent >= 0)
        self._dirty = self._dirty or loaded or self._crew.dirty
        if self._pass_thread is not None and self._pass_thread.is_alive():
            self._lane.abandon()
        level(self._inbox, self._links, self._lane, self._plan, self._shares, text, self._settings.stop_timeout)
        return None
