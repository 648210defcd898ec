"""Telling an event loop, from any thread, that something changed."""

from __future__ import annotations

import asyncio
import contextlib


class Pulse:
    """`count` of changes, as far as the loop has heard. `bind` it to its loop first: nobody hears a `beat` before that."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: set[asyncio.Future[None]] = set()
        self.count = 0
        self.closed = False

    def bind(self) -> None:
        """To the running loop."""
        self._loop = asyncio.get_running_loop()

    def beat(self) -> None:
        """From any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(self._release)

    def _release(self) -> None:
        self.count += 1
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def wait(self, seen: int, seconds: float) -> int:
        """The count, once it is not `seen` any more, or after so many seconds."""
        if self.count == seen:
            future = asyncio.get_running_loop().create_future()
            self._waiting.add(future)
            try:
                async with asyncio.timeout(seconds):
                    await future
            except TimeoutError:
                pass
            finally:
                self._waiting.discard(future)
        return self.count

    def close(self) -> None:
        """Whoever streams ends."""
        self.closed = True
        self.beat()
