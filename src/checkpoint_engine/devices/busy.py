"""How long something was at work that several threads do."""

from __future__ import annotations

import threading
import time


class Busy:
    """seconds: in which at least one thread was inside. A context manager that threads share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside, self._since = 0, 0.0
        self.seconds = 0.0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self.seconds += time.perf_counter() - self._since
