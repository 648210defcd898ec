"""What a worker's Python did in one stream: seconds at work, and spans for the update's timeline."""

from __future__ import annotations

import time

from checkpoint_engine.devices.base import Device
from checkpoint_engine.timeline import Recorder, Span

LEAST_SECONDS = 1e-3
"""A load plan that took less was neither made nor proved: it is not worth a span."""


class Work:
    """Times are of `time.perf_counter`, which the server's process reads alike."""

    def __init__(self, device: Device) -> None:
        self._notices = device.kind != "cpu"  # on a CPU what was queued is done
        self._recorder = Recorder()
        self._busy = self._copied = 0.0
        self.checked, self.checking = 0, 0.0  # bytes, and seconds in which their digests were made

    def did(self, stage: str, start: float, bucket: int = -1) -> float:
        """It was at work in `stage` since `start`: so many seconds."""
        now = time.perf_counter()
        self._busy += now - start
        if stage != "plan" or now - start > LEAST_SECONDS:
            self._recorder.add(stage, bucket, start, now)
        return now - start

    def checks(self, bucket: int, since: float, until: float, nbytes: int) -> None:
        """Digests of a bucket's tensors were made, in whichever thread."""
        self._recorder.add("verify", bucket, since, until, nbytes)

    def copied(self, bucket: int, queued: float) -> None:
        """What was queued until `queued` is seen to be over; that is looked at between two loads."""
        if self._notices:
            since, self._copied = max(queued, self._copied), time.perf_counter()
            self._recorder.add("copy", bucket, since, self._copied)

    def take(self) -> tuple[dict[str, float], tuple[Span, ...], int]:
        """Since the last time: seconds by stage, "worker" and, where anything was, "verify"; spans; bytes that were verified."""
        seconds, verified = {"worker": self._busy}, self.checked
        if verified:
            seconds["verify"] = self.checking
        self._busy, self.checked, self.checking = 0.0, 0, 0.0
        return seconds, self._recorder.take(), verified
