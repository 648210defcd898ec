"""How long work took on its streams, found out while later work runs."""

from __future__ import annotations

from collections import deque

from checkpoint_engine.devices.base import Event, Stream


class Spans:
    """Adds up the seconds between pairs of events. One thread may add while another settles.

    A device takes some 10 us to say how long a pair took: asking for hundreds of them at its end would hold an update up.
    """

    def __init__(self) -> None:
        self._open: deque[tuple[Stream, Event, Event]] = deque()
        self._seconds = 0.0

    def add(self, stream: Stream, since: Event, until: Event) -> None:
        """Both of `stream`; pairs in the order in which they end."""
        self._open.append((stream, since, until))

    def settle(self) -> None:
        """Take in what is over by now. Raises what the work raised, if it failed."""
        while self._open and self._open[0][2].done():
            stream, since, until = self._open.popleft()
            self._seconds += stream.busy(since, until)

    def take(self) -> float:
        """Seconds so far, which start from 0 again."""
        self.settle()
        seconds, self._seconds = self._seconds, 0.0
        return seconds
