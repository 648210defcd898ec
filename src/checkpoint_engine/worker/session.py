"""The receiving end of one pass: attach, load bucket by bucket, release, post-hook, commit."""

from __future__ import annotations

import collections
import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import zmq

from checkpoint_engine.devices.base import Device, Event, get_device
from checkpoint_engine.devices.digests import has_kernel
from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineError,
    PeerLostError,
    ProtocolError,
    WorkerUpdateError,
)
from checkpoint_engine.loads.recordable import Recordable
from checkpoint_engine.settings import Settings
from checkpoint_engine.transport.messages import (
    Abort,
    Again,
    Attach,
    Commit,
    Committed,
    Failed,
    FromServer,
    Hello,
    Load,
    Loaded,
    Message,
    Ready,
    Release,
    Spent,
    Table,
)
from checkpoint_engine.transport.session import ServerChannel, connect
from checkpoint_engine.worker.announced import Coming, coming_of
from checkpoint_engine.worker.attached import known_plans, mappings, tables_of, views_of
from checkpoint_engine.worker.check import Check, make_check
from checkpoint_engine.worker.failing import Failure, failing
from checkpoint_engine.worker.recorded import Loads, LoadWeights
from checkpoint_engine.worker.sliced_check import with_slices
from checkpoint_engine.worker.state import WeightsState, weights_state
from checkpoint_engine.worker.views import Views
from checkpoint_engine.worker.work import Work

Expected = TypeVar("Expected")


def update_weights_from_ipc(
    zmq_ctx: zmq.Context[zmq.Socket[bytes]] | None,
    zmq_handle: str,
    device_id: int,
    *,
    run: LoadWeights,
    post_hook: Callable[[], None] | None = None,
    state: WeightsState | None = None,
    model: torch.nn.Module | Recordable | None = None,
) -> str:
    """Take one update from the server behind `zmq_handle` and return the version that is served from now on.

    run        called once per bucket with [(name, tensor)]; the tensors are views of memory shared with the server, valid
               only during the call. What it queues on a device must be on the current stream, or joined to it
    post_hook  called once after the last bucket, when the shared memory is unmapped again
    state      where version and dirty are kept; None: one per device of this process (`weights_state`)
    model      what `run` writes into, if nothing but that and `post_hook` makes the weights what they are. Then its copies are
               recorded at the first update, proved with the same checkpoint at once (`run` may get it up to two times more), and
               from the next update on made without `run`, which gets only what is not a mere copy (docs/recorded-loads.md)
    zmq_ctx    accepted for the contract's sake and not used (docs/decisions.md)

    Raises WorkerUpdateError when the update failed here or on any other rank; its `dirty` says whether the weights are a
    mixture now. Nothing is committed then, and the next complete update heals it.
    """
    settings = Settings.from_environment()
    if isinstance(model, torch.nn.Module):
        model = Recordable(model)
    session = _Session(device_id, run, post_hook, state or weights_state(device_id), settings, model)
    with session.connect(zmq_handle) as session.channel, _no_collection(), contextlib.closing(session.loads):
        return session.receive()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Python's cycle collector off: the views of tens of thousands of tensors would set it off again and again, and each
    full run walks the whole of the engine's heap."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Session:
    channel: ServerChannel

    def __init__(
        self,
        device_id: int,
        run: LoadWeights,
        post_hook: Callable[[], None] | None,
        state: WeightsState,
        settings: Settings,
        model: Recordable | None,
    ) -> None:
        self.post_hook, self.state, self.settings = post_hook, state, settings
        self._index = device_id
        self.device: Device = get_device(settings.device, device_id)
        self.device.bind_thread()
        able = self.device.kind == "cpu" or has_kernel()
        recorded = settings.recorded_loads == "on" or (settings.recorded_loads == "auto" and able)
        self.loads = Loads(run, model if recorded else None, self.device)
        self.soiled = self._checked = self._tell = False
        self._sums = b""
        self._work = Work(self.device)
        self._queued: collections.deque[tuple[Loaded, Event, float]] = collections.deque()

    def connect(self, handle: str) -> ServerChannel:
        try:
            return connect(handle, self.settings.connect_timeout)
        except CheckpointEngineError as e:
            raise WorkerUpdateError(str(e), dirty=self.state.dirty) from e

    def receive(self) -> str:
        try:
            version, dirty = self.state.read()
            self._send(Hello(os.getpid(), self.device.uuid, version, dirty, known_plans(), tuple(self.loads.offered)))
            while self._load_all():
                self._send(Again(self._spent()))
            self._finish()
            return self._commit()
        except Failure as e:
            self.loads.failed()
            # The server may have gone first; then it knows already.
            with contextlib.suppress(CheckpointEngineError):
                self._send(Failed(e.stage, e.bucket, e.reason, self.soiled, e.wrong))
            where = f"{e.stage} of bucket {e.bucket}" if e.bucket >= 0 else e.stage
            raise WorkerUpdateError(f"{where} failed here: {e.reason}", dirty=self.state.dirty) from e.__cause__
        except CheckpointEngineError as e:
            if self._sums:  # what was replayed may have been found to be wrong
                self.loads.failed()
            raise WorkerUpdateError(str(e), dirty=self.state.dirty) from e

    def _load_all(self) -> bool:
        """One stream. Whether it is needed once more."""
        attach = self._next("Attach", Attach)
        start = time.perf_counter()
        tables = tables_of(attach)
        with contextlib.ExitStack() as mapped:
            try:
                descriptors = self.channel.take_descriptors()
                memories = [mapped.enter_context(m).tensor for m in mappings(attach, descriptors, self.device)]
                views = views_of(memories, self.device, self._index)
                coming = coming_of(attach, len(tables))
                self.loads.begin(attach.plan, tables, coming.absent)
                check = mapped.enter_context(self._make_check(attach, tables, memories))
            except Exception as e:
                raise Failure("attach", -1, e) from e
            self._work.did("attach", start)
            for bucket in self._buckets(coming, check):
                self._load(bucket, tables[bucket], views, check)
            while self._queued:
                self._report(self.settings.timeout)
            self._end_check(check)
        return self._end_stream()

    def _make_check(self, attach: Attach, tables: tuple[Table, ...], memories: Sequence[torch.Tensor]) -> Check:
        seconds, at_work, loads = self.settings.timeout, self._work.checks, self.loads
        self._checked, self._tell, self._sums = bool(attach.digests), attach.slicing.tell, b""
        whole = make_check(attach, tables, memories, self.device, seconds, at_work)
        return with_slices(whole, attach, loads.offered, tables, memories, loads.replaying, self.device, seconds, at_work)

    def _buckets(self, coming: Coming, check: Check) -> Iterator[int]:
        """Numbers of the stream's buckets, as they are to be loaded; the check of each begins when it is there. Raises
        ProtocolError unless exactly those come that were announced, in their order."""
        ahead: collections.deque[int] = collections.deque()
        message: Message | None = None
        while ahead or not isinstance(message, Release):
            full = isinstance(message, Release) or len(ahead) == check.ahead
            if full or (message := self._next_bucket(wait=not ahead)) is None:
                yield ahead.popleft()
            elif isinstance(message, Load):
                coming.came(message.bucket)
                with failing("verify", message.bucket):
                    check.begin(message.bucket, self.loads.used(message.bucket))
                ahead.append(message.bucket)
            else:
                coming.released()

    def _end_check(self, check: Check) -> None:
        with failing("verify"):
            check.finish()
        self._work.checked += check.nbytes
        self._work.checking += check.seconds
        self._sums = check.sums

    def _end_stream(self) -> bool:
        start = time.perf_counter()
        try:
            return self.loads.end()
        except Exception as e:
            raise Failure("load", -1, e) from e
        finally:
            self._work.did("plan", start)

    def _next_bucket(self, *, wait: bool) -> Message | None:
        """The next order, or None where there is none yet and it is not to be waited for. Meanwhile buckets whose copies are over
        are reported: Python goes on while the device copies."""
        while self._queued or not wait:
            self._report(0.0)
            if (message := self.channel.poll()) is not None:
                return self._expect(message, "a bucket", Load, Release)
            if not wait:
                return None
            self._report(self.settings.timeout)
        return self._next("a bucket", Load, Release)

    def _load(self, bucket: int, table: Table, views: Views, check: Check) -> None:
        with failing("verify", bucket):
            check.before_load(bucket)
        start = time.perf_counter()
        with failing("load", bucket):
            self.state.soil()
            self.soiled = True
            inside = self.loads.load(bucket, table, views)
            seconds = self._work.did("load", start, bucket)
            check.loaded(bucket)
            self._queued.append((Loaded(bucket, seconds, inside), self.device.mark(), start + seconds))

    def _report(self, seconds: float) -> None:
        """Say Loaded for queued buckets whose copies are over, waiting up to `seconds` for the oldest.

        Their bytes may be overwritten from then on: the engine's copies must be done, not just queued.
        """
        while self._queued:
            loaded, copied, queued = self._queued[0]
            with failing("load", loaded.bucket):
                done = copied.wait(seconds)
            if not done:
                if seconds:
                    raise Failure("load", loaded.bucket, DeadlineError("the device to copy it", seconds))
                return
            self._queued.popleft()
            self._send(loaded)
            self._work.copied(loaded.bucket, queued)
            seconds = 0.0

    def _finish(self) -> None:
        start = time.perf_counter()
        with failing("post_hook"):
            if self.post_hook is not None:
                self.post_hook()
            self.device.synchronize()
        seconds = self._work.did("post_hook", start)
        reads = self.loads.reads(checked=self._checked) if self.device.reads_regions else -1
        told = reads, self.loads.needs, self._sums, self.loads.taken if self._tell else b"", self.device.regions_ready
        self._send(Ready(seconds, self._spent(), self.loads.way.value, *told))

    def _spent(self) -> Spent:
        """Since the last time that it was told."""
        loads = self.loads
        seconds, spans, verified = self._work.take()
        spent = Spent({**seconds, **loads.spent}, tuple(loads.notes), verified, spans)
        loads.spent.clear()
        loads.notes.clear()
        return spent

    def _commit(self) -> str:
        commit = self._next("Commit", Commit)
        self.loads.commit()
        self.state.commit(commit.version)
        with contextlib.suppress(CheckpointEngineError):  # committed is committed
            self._send(Committed())
        return commit.version

    def _send(self, message: Hello | Loaded | Again | Ready | Committed | Failed) -> None:
        try:
            self.channel.send(message, seconds=self.settings.timeout)
        except PeerLostError:
            self._next("the reason", Abort)  # a server that aborted said why before it hung up
            raise

    def _next(self, what: str, *expected: type[Expected]) -> Expected:
        return self._expect(self.channel.receive(seconds=self.settings.timeout, waiting_for=what), what, *expected)

    def _expect(self, message: FromServer, what: str, *expected: type[Expected]) -> Expected:
        if isinstance(message, Abort):
            raise WorkerUpdateError(message.reason, dirty=self.state.dirty)
        if not isinstance(message, expected):
            raise ProtocolError(f"the server sent {type(message).__name__} instead of {what}")
        return message
