"""The engine behind the routes: one model, its gate, and the sessions that change its weights."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple, Protocol, TypeVar

import httpx
import torch

from checkpoint_engine.engines.embedded.gate import Gate, ThreadHold
from checkpoint_engine.engines.embedded.loader import LoadPass
from checkpoint_engine.engines.embedded.model import Generated, Sampling, ServedModel
from checkpoint_engine.engines.embedded.schemas import UpdateRequest
from checkpoint_engine.engines.embedded.threads import SerialThread
from checkpoint_engine.errors import (
    DeadlineError,
    EngineError,
    EngineUnreachableError,
    SettingsError,
    UpdateInProgressError,
)
from checkpoint_engine.loads.recordable import Recordable

_PROBE_SECONDS = 2.0
T = TypeVar("T")


class Receive(Protocol):
    """The worker's side of a session: calls `run` for each bucket, or replays what it learned of it, and `post_hook` after the
    last; returns the version that was committed, or raises."""

    def __call__(
        self,
        handle: str,
        *,
        run: Callable[[list[tuple[str, torch.Tensor]]], None],
        post_hook: Callable[[], None],
        model: Recordable,
    ) -> str: ...


class Served(NamedTuple):
    """reason: why the weights are dirty."""

    version: str | None
    dirty: bool = False
    reason: str = ""


class DirtyError(EngineError):
    """The weights are a mixture: nothing is computed with them until a complete update."""


class AbortedError(EngineError):
    """The request had not begun when the engine was paused with mode abort."""


class EmbeddedEngine:
    """All methods are called in one event loop; what blocks runs in two threads of its own. Close it at the end.

    receive         how a session is joined
    version         what the model serves at first
    followers       URLs of the replica's other workers: follower i uses handle i + 1 of each request
    request_seconds  how long a request waits for an update to end
    drain_seconds    how long a session waits for running requests before its first byte
    update_seconds   how long a leader waits for its followers
    """

    def __init__(
        self,
        model: ServedModel,
        receive: Receive,
        *,
        version: str | None = None,
        followers: Sequence[str] = (),
        request_seconds: float = 600.0,
        drain_seconds: float = 120.0,
        update_seconds: float = 3600.0,
    ) -> None:
        self.model, self.followers = model, tuple(url.rstrip("/") for url in followers)
        self.gate = Gate()
        self._receive = receive
        self._served = Served(version)
        self._request_seconds, self._drain_seconds, self._update_seconds = request_seconds, drain_seconds, update_seconds
        self._running = asyncio.Event()  # not set: paused
        self._running.set()
        self._computing: set[asyncio.Task[object]] = set()
        self._updating = threading.Lock()
        self._loading = False
        self._compute = SerialThread("compute")
        self._sessions = SerialThread("session")

    def close(self) -> None:
        self._compute.close()
        self._sessions.close(seconds=0.1)  # a session ends by its own deadline; nobody waits for it here

    @property
    def weights(self) -> Served:
        """Now; dirty while a session loads."""
        return self._served._replace(dirty=True) if self._loading else self._served

    async def embed(self, inputs: Sequence[str | list[int]]) -> tuple[list[list[float]], str | None]:
        """Vectors, and the version that made them. Raises AbortedError, DirtyError, DeadlineError, SettingsError."""
        async with self._clean_weights() as version:
            return await self._work(lambda: self.model.embed(inputs)), version

    async def generate(self, prompts: Sequence[str | list[int]], sampling: Sampling) -> tuple[list[Generated], str | None]:
        """As `embed`."""
        async with self._clean_weights() as version:
            return await self._work(lambda: self.model.generate(prompts, sampling)), version

    async def digests(self) -> dict[str, str]:
        """Of every parameter, dirty or not. Raises DeadlineError."""
        async with self.gate.reading(self._request_seconds):
            return await self._compute.call(self.model.targets.digests)

    @asynccontextmanager
    async def _clean_weights(self) -> AsyncIterator[str | None]:
        try:
            async with asyncio.timeout(self._request_seconds):
                await self._running.wait()
        except TimeoutError:
            raise DeadlineError("the engine to be resumed", self._request_seconds) from None
        async with self.gate.reading(self._request_seconds):
            if self._served.dirty:
                raise DirtyError("this process", f"weights are incomplete since an update failed: {self._served.reason}")
            yield self._served.version

    async def _work(self, work: Callable[[], T]) -> T:
        """`work` in the thread that computes. Raises AbortedError when a pause dropped it before it began."""
        task = asyncio.ensure_future(self._compute.call(work))
        self._computing.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if (own := asyncio.current_task()) is not None and own.cancelling():
                raise  # nobody waits for the answer any more
            # It may have begun: the weights are not this request's to let go of until the thread is through with it.
            await self._compute.call(lambda: None)
            raise AbortedError("this process", "the engine was paused, and running requests were aborted") from None
        finally:
            self._computing.discard(task)

    @property
    def paused(self) -> bool:
        return not self._running.is_set()

    async def pause(self, *, abort: bool) -> None:
        """Let no request begin; return once none runs. abort: those that have not begun raise AbortedError.

        Raises DeadlineError when some were not done within drain_seconds; the engine is paused all the same.
        """
        self._running.clear()
        if abort:
            for task in self._computing:
                task.cancel()
        await self.gate.acquire_write(self._drain_seconds)
        self.gate.release_write()

    def resume(self) -> None:
        self._running.set()

    async def ready(self) -> None:
        """Raises EngineUnreachableError when a follower does not answer."""
        await asyncio.gather(*(self._follow("GET", url, "/ping", None, _PROBE_SECONDS) for url in self.followers))

    async def update(self, request: UpdateRequest) -> str:
        """Take part in one update, with all followers; returns the version. Raises what failed, naming each failure."""
        handles = list(request.zmq_handles.values())
        index, leads = request.worker_index or 0, request.worker_index is None
        if leads and len(handles) != 1 + len(self.followers):
            raise SettingsError(f"the request names {len(handles)} handles, this replica has {1 + len(self.followers)} workers")
        if index >= len(handles):
            raise SettingsError(f"worker {index} has no handle among the {len(handles)} of the request")
        if not self._updating.acquire(blocking=False):
            raise UpdateInProgressError("this engine is already updating")
        loop = asyncio.get_running_loop()
        own = self._sessions.call(lambda: self._session(handles[index], loop))
        body = request.model_dump()
        others = [
            self._follow("POST", url, "/update_weights_from_ipc", {**body, "worker_index": i}, self._update_seconds)
            for i, url in enumerate(self.followers, start=1)
            if leads
        ]
        results = await asyncio.gather(own, *others, return_exceptions=True)
        errors = [e for e in results if isinstance(e, BaseException)]
        if errors:
            raise errors[0] if len(errors) == 1 else EngineError("this replica", "; ".join(str(e) for e in errors))
        return str(results[0])

    def _session(self, handle: str, loop: asyncio.AbstractEventLoop) -> str:
        """In the session's thread. Requests go on until the first bucket is here."""
        load = LoadPass(self.model.targets)
        try:
            with ThreadHold(self.gate, loop, self._drain_seconds) as hold:

                def run(tensors: list[tuple[str, torch.Tensor]]) -> None:
                    hold.take()
                    self._loading = True
                    load.load(tensors)

                def replaying(names: Sequence[str]) -> None:
                    hold.take()
                    self._loading = True
                    load.replaying(names)

                model = Recordable(self.model.module, begins=load.begin, replaying=replaying)
                try:
                    version = self._receive(handle, run=run, post_hook=load.finish, model=model)
                    self._served = Served(version)
                except BaseException as e:
                    if load.began:
                        self._served = Served(self._served.version, dirty=True, reason=str(e))
                    raise
                finally:
                    self._loading = False
            return version
        finally:
            self._updating.release()

    async def _follow(self, method: str, url: str, path: str, body: object, seconds: float) -> None:
        try:
            async with httpx.AsyncClient(trust_env=False, timeout=httpx.Timeout(seconds, connect=10.0)) as client:
                response = await client.request(method, url + path, json=body)
        except httpx.HTTPError as e:
            raise EngineUnreachableError(f"{url} (follower)", str(e) or type(e).__name__) from e
        if not response.is_success:
            raise EngineError(f"{url} (follower)", f"answered {response.status_code}: {response.text[:500]}")
