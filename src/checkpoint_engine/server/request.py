"""The caller's function that asks the engines, in a thread of its own for as long as an update lasts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from checkpoint_engine.errors import bare
from checkpoint_engine.server.events import RequestDone, WorkerCame
from checkpoint_engine.transport.links import Inbox

RequestFunction = Callable[[list[tuple[str, str]]], object]
NO_WORKER = object()
"""What a RequestFunction returns when no worker will come to its rank, which then only relays. All else it returns is nothing."""
LEAVE_SECONDS = 1.0
"""How long a request may take to return when the update is over: an engine that hangs is its caller's to end."""


class Request:
    """Asks at once; the inbox hears RequestDone, from this rank."""

    def __init__(self, inbox: Inbox, rank: int, function: RequestFunction, handles: list[tuple[str, str]]) -> None:
        self._inbox, self._rank = inbox, rank
        self._thread = threading.Thread(target=self._ask, args=(function, handles), name="request", daemon=True)
        self._thread.start()

    def _ask(self, function: RequestFunction, handles: list[tuple[str, str]]) -> None:
        error, absent = None, False
        try:
            absent = function(handles) is NO_WORKER
        except BaseException as e:  # whatever the caller's function raises ends the update, with its name
            error = bare(e)
        self._inbox.put(self._rank, RequestDone(error, absent))

    def leave(self) -> None:
        """Wait a moment for it to return, and send off workers that came when nobody was waiting for them any more."""
        deadline = time.monotonic() + LEAVE_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._turn_away(0.02)
        self._turn_away(0)

    def _turn_away(self, seconds: float) -> None:
        while (entry := self._inbox.get(seconds)) is not None:
            if isinstance(entry[1], WorkerCame):
                entry[1].send_off("the update is over")
