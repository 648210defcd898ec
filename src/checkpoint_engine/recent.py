"""What was worked out lately, and may be wanted again: a few values by key, so that no stream of new ones grows without end."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The `size` values that were put last; an older one goes when one more comes. Not for several threads at a time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: dict[K, V] = {}  # in the order in which they were put

    def __contains__(self, key: K) -> bool:
        return key in self._values

    def __getitem__(self, key: K) -> V:
        """Raises KeyError."""
        return self._values[key]

    def get(self, key: K, default: V) -> V:
        return self._values.get(key, default)

    def keys(self) -> tuple[K, ...]:
        return tuple(self._values)

    def values(self) -> tuple[V, ...]:
        return tuple(self._values.values())

    def put(self, key: K, value: V) -> V:
        """Now the youngest, also when the key had one already. Returns the value."""
        self._values.pop(key, None)
        self._values[key] = value
        while len(self._values) > self.size:
            del self._values[next(iter(self._values))]
        return value

    def of(self, key: K, make: Callable[[], V]) -> V:
        """The key's value, made and put where there is none. Raises what `make` raises."""
        return self._values[key] if key in self._values else self.put(key, make())

    def drop(self, key: K) -> None:
        """If it is there."""
        self._values.pop(key, None)
