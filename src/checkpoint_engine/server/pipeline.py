"""One pass of the stream on one rank: lift, share and load of different buckets at the same time.

Three threads. The driver queues lifts and broadcasts on the device's streams as far ahead as memory allows. The deliverer
tells the worker of each bucket whose bytes HAVE arrived. The collector hears which buckets are loaded, which frees their
place in the ring. Within this process order is kept by streams and events; between processes only completed work is named.
"""

from __future__ import annotations

import collections
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from checkpoint_engine.devices.base import Event
from checkpoint_engine.errors import CheckpointEngineError, DeadlineError, PeerLostError, ProtocolError, bare, said
from checkpoint_engine.planning.plan import Bucket, Piece, Plan
from checkpoint_engine.planning.sharing import Shares
from checkpoint_engine.server.coming import Coming, check_needs
from checkpoint_engine.server.expected import Expected
from checkpoint_engine.server.heard import Heard
from checkpoint_engine.server.lane import Lane
from checkpoint_engine.server.pass_errors import PassError, Stopped
from checkpoint_engine.server.stages import Stages
from checkpoint_engine.timeline import Recorder
from checkpoint_engine.transport.messages import Again, Attach, Failed, Load, Loaded, Ready, Release, StageStats, Table
from checkpoint_engine.transport.session import WorkerChannel

SLICE = 0.1
"""Seconds between two looks at whether the pass was stopped."""


class _Lifted(NamedTuple):
    done: Event
    slot: int | None


class Pass:
    """worker    the channel of this rank's worker, or None on a rank that only relays
    known     digests of the plans whose tables the worker has
    regions   this rank's regions, uint8, in manifest order
    deadline  of the update, on time.monotonic, `seconds` after its start
    progress  called with the bytes of each bucket when it is complete on this rank
    recorder  of this rank's timeline
    expected  what the worker checks; None: nothing
    shares    who takes part in which bucket; None: all ranks in all. Others are as good as loaded
    """

    def __init__(
        self,
        plan: Plan,
        lane: Lane,
        regions: list[torch.Tensor],
        worker: WorkerChannel | None,
        known: tuple[str, ...],
        seconds: float,
        deadline: float,
        progress: Callable[[int], None] | None = None,
        recorder: Recorder | None = None,
        expected: Expected | None = None,
        shares: Shares | None = None,
    ) -> None:
        self._plan, self._lane, self._regions, self._worker, self._known = plan, lane, regions, worker, known
        self._progress, self._expected = progress, expected
        self._recorder = recorder or Recorder(enabled=False)
        self._coming = Coming(plan, shares, lane.rank)
        self._stages = Stages(plan, lane, self._recorder, self._coming)
        self._seconds, self._deadline = seconds, deadline
        self._arrived: queue.SimpleQueue[tuple[int, dict[int, Event] | None] | None] = queue.SimpleQueue()
        self._state = threading.Condition()
        self._loaded = self._coming.first  # the next bucket that is to be loaded
        self._error: CheckpointEngineError | None = None
        self.last_sent = -1  # the bucket that the worker was told of last
        self.heard = Heard()
        stream = [(plan.buckets[index], plan.buckets[index].pieces[number]) for index, number in self._coming.stream]
        self._own: list[tuple[Bucket, Piece]] = [(b, p) for b, p in stream if p.owner == lane.rank]
        self._lifts: list[_Lifted] = []
        self._shares: list[Event] = []  # of own pieces

    def run(self) -> dict[str, StageStats]:
        """Returns when this rank's worker has loaded everything and run its post-hook.

        Raises PassError naming the stage, or Stopped after `stop`.
        """
        self._guard("lift", self._stages.begin)
        threads = [threading.Thread(target=self._guard, args=("share", self._deliver), name="deliver", daemon=True)]
        if self._worker is not None:
            threads.append(threading.Thread(target=self._guard, args=("load", self._collect), name="collect", daemon=True))
        for thread in threads:
            thread.start()
        self._guard("lift", self._drive)
        self._arrived.put(None)
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
        return self._stats()

    def stop(self) -> None:
        """End the pass soon, from any thread: nothing further is queued."""
        self._fail(Stopped("stopped"))

    def _guard(self, stage: str, part: Callable[[], None]) -> None:
        try:
            self._lane.device.bind_thread()
            self._lane.device.stay_near()
            part()
        except (PassError, Stopped) as e:
            self._fail(e)
        except Exception as e:  # any error of a stage ends the pass with the stage's name
            self._fail(PassError(stage, said(e)))

    def _fail(self, error: CheckpointEngineError) -> None:
        with self._state:
            self._error = self._error or bare(error)
            self._state.notify_all()
        self._arrived.put(None)

    # --- driver: lift and share ----------------------------------------------------------------------------------------

    def _drive(self) -> None:
        next_own = 0
        # bucket -> owner -> when the last of its pieces so far is here. One owner's arrive in order, several owners' do not.
        shares: dict[int, dict[int, Event]] = collections.defaultdict(dict)
        for index, bucket in enumerate(self._plan.buckets):
            if not bucket.pieces and index in self._coming:
                self._arrived.put((index, None))
        for index, number in self._plan.stream:
            bucket = self._plan.buckets[index]
            piece = bucket.pieces[number]
            if index not in self._coming:
                self._lane.skip(piece)
                continue
            self._lift_ahead()  # before waiting, in which lifts can go on
            self._wait_loaded(bucket.after)
            lifted: _Lifted | None = None
            if piece.owner == self._lane.rank:
                self._lift_ahead()
                lifted = self._lifts[next_own]
                next_own += 1
            slot = None if lifted is None or lifted.slot is None else self._lane.staging[lifted.slot]
            shared = self._lane.share(bucket, piece, lifted and lifted.done, slot, self._coming.ranks(index))
            shares[index][piece.owner] = shared
            if lifted is not None:
                self._shares.append(shared)
            if number + 1 == len(bucket.pieces):
                self._arrived.put((index, shares.pop(index)))

    def _lift_ahead(self) -> None:
        """Queue lifts of this rank's next pieces as far as there is room, up to the staging slots or what the ring has free."""
        staging = self._lane.staging
        while len(self._lifts) < len(self._own):
            number = len(self._lifts)
            bucket, piece = self._own[number]
            slot = None
            if staging:
                if number - len(staging) >= len(self._shares):
                    return
                slot = number % len(staging)
                if number >= len(staging):
                    self._lane.lifting.after(self._shares[number - len(staging)])
            elif self._loaded <= bucket.after:
                return
            times = self._lane.lift(bucket, piece, None if slot is None else staging[slot], self._regions)
            self._stages.lifts.add(self._lane.lifting, *times)
            self._lifts.append(_Lifted(times[1], slot))

    def _wait_loaded(self, bucket: int) -> None:
        with self._state:
            while self._loaded <= bucket and self._error is None:
                if not self._state.wait(max(self._remaining(), SLICE)) and self._overdue(False):
                    raise PassError("load", str(DeadlineError(f"the worker to load bucket {self._loaded}", self._seconds)))
            if self._error is not None:
                raise Stopped("stopped")

    def _remaining(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _overdue(self, knows: bool) -> bool:
        """knows: whether this thread knows what is late. Else the one that does speaks first."""
        return time.monotonic() >= self._deadline + (0.0 if knows else 2.5 * SLICE)

    # --- deliverer -----------------------------------------------------------------------------------------------------

    def _deliver(self) -> None:
        worker = self._worker
        if worker is not None:
            attach, descriptors = self._attachment()
            self.heard.tables = attach.plan
            if self._expected is not None:
                attach = self._expected.put_into(attach)
            worker.send(attach, descriptors, seconds=self._remaining())
        for number, nbytes in enumerate(self._plan.sizes):
            if number in self._coming:
                self._deliver_next(worker)
            if self._progress is not None:
                self._progress(nbytes)
        if worker is not None:
            self._tell(worker, Release())

    def _deliver_next(self, worker: WorkerChannel | None) -> None:
        if (entry := self._next_arrival()) is None:
            raise Stopped("stopped")
        index, shares = entry
        for owner, shared in (shares or {}).items():
            self._wait_shared(shared, index, owner)
        if worker is None:
            self._set_loaded(index)
        else:
            self.last_sent = index
            self._tell(worker, Load(index))
        self._stages.settle()

    def _next_arrival(self) -> tuple[int, dict[int, Event] | None] | None:
        try:
            return self._arrived.get(timeout=self._remaining() + 1.0)  # what holds the driver up has a name; it comes first
        except queue.Empty:
            raise DeadlineError("the next bucket to be queued", self._seconds) from None

    def _tell(self, worker: WorkerChannel, message: Load | Release) -> None:
        with contextlib.suppress(PeerLostError):  # the collector reads why: the worker's own words, or its death
            worker.send(message, seconds=self._remaining())

    def _attachment(self) -> tuple[Attach, tuple[int, ...]]:
        """What the worker has to map, and the descriptors that travel with it."""
        handle, descriptors = self._lane.ring.share()
        tables = None
        if self._plan.digest not in self._known:
            tables = tuple(Table(b.offset, b.nbytes, b.items) for b in self._plan.buckets)
        return Attach(self._lane.rank, (handle,), self._plan.digest, tables, coming=self._coming.bits), descriptors

    def _wait_shared(self, event: Event, bucket: int, owner: int) -> None:
        collective = self._lane.collective
        while not event.wait(SLICE):
            if self._error is not None:
                raise Stopped("stopped")
            if collective is not None:
                collective.check()
            if self._remaining() <= 0:
                blame = f" (which waits for {collective.awaited})" if collective is not None and collective.awaited else ""
                raise DeadlineError(f"bucket {bucket} to be shared by rank {owner}{blame}", self._seconds)

    def _set_loaded(self, bucket: int) -> None:
        with self._state:
            self._loaded = self._coming.after(bucket)
            self._state.notify_all()

    # --- collector -----------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        while True:
            match self._receive():
                case Loaded(bucket=bucket) as loaded:
                    if bucket != self._loaded:
                        raise ProtocolError(f"the worker loaded bucket {bucket} when {self._loaded} was next")
                    self.heard.loaded(loaded)
                    self._set_loaded(bucket)
                case Ready() | Again() as ended:
                    if isinstance(ended, Ready):
                        check_needs(ended.needs, len(self._plan.buckets))
                    if self._loaded != len(self._plan.buckets):
                        raise ProtocolError(f"the worker is ready after {self._loaded} of {len(self._plan.buckets)} buckets")
                    self.heard.ended(ended)
                    return
                case Failed(wrong=wrong) as failed if wrong and self._expected is not None:
                    raise PassError(failed.stage, str(self._expected.mismatch(wrong)))
                case Failed() as failed:
                    where = f" of bucket {failed.bucket}" if failed.bucket >= 0 else ""
                    raise PassError(failed.stage, f"the worker failed in {failed.stage}{where}: {failed.reason}")
                case other:
                    raise ProtocolError(f"the worker sent {type(other).__name__} during a pass")

    def _receive(self) -> object:
        worker = self._worker
        while worker is not None:
            what = f"bucket {self._loaded} to be loaded" if self._loaded < len(self._plan.buckets) else "the post-hook to end"
            try:
                return worker.receive(seconds=max(0.01, min(SLICE, self._remaining())), waiting_for=what)
            except PeerLostError as e:
                raise PassError("load", f"{e} while waiting for {what}") from e
            except DeadlineError:
                if self._error is not None:
                    raise Stopped("stopped") from None
                if self._overdue(self.last_sent >= self._loaded or self._loaded == len(self._plan.buckets)):
                    raise DeadlineError(f"{what} by {worker.peer}", self._seconds) from None
        raise Stopped("no worker")

    # --- statistics ----------------------------------------------------------------------------------------------------

    def _stats(self) -> dict[str, StageStats]:
        return self._stages.moved(sum(c.nbytes for _, p in self._own for c in p.copies)) | self._load_stats()

    def _load_stats(self) -> dict[str, StageStats]:
        return self._stages.loaded(self.heard) if self._worker is not None else {}
