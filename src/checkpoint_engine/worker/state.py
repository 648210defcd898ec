"""What a worker serves: a version, and whether its weights are a mixture."""

from __future__ import annotations

import threading


class WeightsState:
    """version: the last one committed, None before the first. dirty: some byte was loaded and not committed since; until a
    complete update the weights are a mixture and must not serve."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._version: str | None = None
        self._dirty = False

    @property
    def version(self) -> str | None:
        return self.read()[0]

    @property
    def dirty(self) -> bool:
        return self.read()[1]

    def read(self) -> tuple[str | None, bool]:
        """Both, as of one moment."""
        with self._lock:
            return self._version, self._dirty

    def soil(self) -> None:
        with self._lock:
            self._dirty = True

    def commit(self, version: str) -> None:
        with self._lock:
            self._version, self._dirty = version, False


_states: dict[int, WeightsState] = {}
_states_lock = threading.Lock()


def weights_state(device_id: int = 0) -> WeightsState:
    """This process's state for a device, where the engine keeps none of its own."""
    with _states_lock:
        return _states.setdefault(device_id, WeightsState())
