"""Threads for work that blocks: the event loop never does."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")


class SerialThread:
    """One thread that does what it is given, in order.

    One and the same thread for all of a model's work, because each new thread would start an OpenMP team of its own. A
    daemon, so that work that hangs cannot keep the process from exiting.
    """

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    async def call(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. Cancelling the caller drops work that has not begun."""
        future: Future[T] = Future()
        self._work.put((future, work))
        return await asyncio.wrap_future(future)

    def close(self, seconds: float = 5.0) -> None:
        """Do what is queued, then end; wait for that for at most `seconds`."""
        self._work.put(None)
        self._thread.join(seconds)

    def _main(self) -> None:
        while (item := self._work.get()) is not None:
            future, work = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as e:
                future.set_exception(e)
            del future, work, item

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
