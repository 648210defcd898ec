"""How long work took on its streams, and when it did, found out while later work runs."""

from __future__ import annotations

from collections import deque

from checkpoint_engine.devices.base import Clock, Event, Stream


class Spans:
    """Adds up the seconds between pairs of events. One thread may add while another settles.

    A device takes some 10 us to say how long a pair took: asking for hundreds of them at its end would hold an update up.
    """

    def __init__(self) -> None:
        self._open: deque[tuple[Stream, Event, Event]] = deque()
        self._clock: Clock | None = None
        self._seconds = 0.0
        self._times: list[tuple[float, float]] = []

    def begin(self, clock: Clock | None) -> None:
        """Forget what was before. clock: to find out, too, when each pair began; that takes as long again."""
        self._open.clear()
        self._clock, self._seconds, self._times = clock, 0.0, []

    def add(self, stream: Stream, since: Event, until: Event) -> None:
        """Both of `stream`; pairs in the order in which they end."""
        self._open.append((stream, since, until))

    def settle(self) -> None:
        """Take in what is over by now. Raises what the work raised, if it failed."""
        while self._open and self._open[0][2].done():
            stream, since, until = self._open.popleft()
            seconds = stream.busy(since, until)
            self._seconds += seconds
            if self._clock is not None:
                start = self._clock(since)
                self._times.append((start, start + seconds))

    def take(self) -> tuple[float, list[tuple[float, float]]]:
        """Seconds so far, and (beginning, end) of each pair where there is a clock; both start anew."""
        self.settle()
        taken = self._seconds, self._times
        self._seconds, self._times = 0.0, []
        return taken
