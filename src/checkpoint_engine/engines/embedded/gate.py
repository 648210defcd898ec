"""Who may touch the weights when: requests share them, a session that loads has them alone."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Self

from checkpoint_engine.errors import DeadlineError


class Gate:
    """A readers-writer gate of one event loop. A writer that waits goes before readers that come after it.

    All methods belong to the loop's thread; threads use `ThreadHold`.
    """

    def __init__(self) -> None:
        self._readers = 0
        self._writing = False
        self._waiting_readers: deque[asyncio.Future[None]] = deque()
        self._waiting_writers: deque[asyncio.Future[None]] = deque()

    @property
    def readers(self) -> int:
        return self._readers

    @property
    def waiting(self) -> int:
        """Readers that wait for a writer."""
        return len(self._waiting_readers)

    @asynccontextmanager
    async def reading(self, seconds: float) -> AsyncIterator[None]:
        """Hold the weights still. Raises DeadlineError when a writer had them for `seconds`."""
        if self._writing or self._waiting_writers:
            await self._wait(self._waiting_readers, seconds, "a weight update to end", self._leave_read)
        else:
            self._readers += 1
        try:
            yield
        finally:
            self._leave_read()

    async def acquire_write(self, seconds: float) -> None:
        """Return once all readers have left. Raises DeadlineError when they did not within `seconds`."""
        if self._writing or self._readers or self._waiting_writers:
            await self._wait(self._waiting_writers, seconds, "running requests to finish", self.release_write)
        else:
            self._writing = True

    def release_write(self) -> None:
        self._writing = False
        self._wake()

    def _leave_read(self) -> None:
        self._readers -= 1
        self._wake()

    async def _wait(self, queue: deque[asyncio.Future[None]], seconds: float, what: str, undo: Callable[[], None]) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(turn)
        try:
            async with asyncio.timeout(seconds):
                await turn
        except BaseException as e:
            if turn.done() and not turn.cancelled():  # admitted and given up at the same moment
                undo()
            else:
                with suppress(ValueError):
                    queue.remove(turn)
                self._wake()
            if isinstance(e, TimeoutError):
                raise DeadlineError(what, seconds) from None
            raise

    def _wake(self) -> None:
        """Admit whoever may enter now; what they hold is counted here, before they run."""
        if self._writing:
            return
        while self._waiting_writers:
            if self._readers:
                return
            if not (turn := self._waiting_writers.popleft()).done():
                self._writing = True
                turn.set_result(None)
                return
        while self._waiting_readers:
            if not (turn := self._waiting_readers.popleft()).done():
                self._readers += 1
                turn.set_result(None)


class ThreadHold:
    """The writing side for one thread that is not the loop's: taken at the first `take`, given back at the end of `with`."""

    def __init__(self, gate: Gate, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._gate, self._loop, self._seconds = gate, loop, seconds
        self._held = False

    def take(self) -> None:
        """Wait until no request uses the weights; at once if held already. Raises DeadlineError."""
        if self._held:
            return
        waiting = asyncio.run_coroutine_threadsafe(self._gate.acquire_write(self._seconds), self._loop)
        try:
            # The gate's own deadline comes first; this one is for a loop that no longer runs.
            waiting.result(self._seconds + 5)
        except DeadlineError:
            raise
        except TimeoutError:
            waiting.cancel()
            raise DeadlineError("the engine's event loop", self._seconds + 5) from None
        self._held = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._held:
            self._held = False
            with suppress(RuntimeError):  # the loop is closed: nobody is left to wait
                self._loop.call_soon_threadsafe(self._gate.release_write)
