"""What this package asks of an engine, the table of engines, and who of a world's ranks asks which one."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from checkpoint_engine.errors import SettingsError

Handles = Sequence[tuple[str, str]]
"""(device uuid, handle) of the ranks that one replica spans, in rank order."""


class Weights(NamedTuple):
    """What an engine serves. dirty: an update broke off after its first byte, so that the weights are a mixture."""

    version: str | None
    dirty: bool


class Engine(ABC):
    """A client of one running engine (one replica). A context manager; may be used by several threads at once.

    endpoint  how errors name it: its URL, with the Unix socket where there is one
    """

    endpoint: str

    @abstractmethod
    def wait_ready(self, seconds: float) -> None:
        """Return once the engine can take weights.

        Raises EngineUnreachableError when it did not answer within `seconds`, DeadlineError when it did but was not ready.
        """

    @abstractmethod
    def update(self, handles: Handles, *, version: str | None, seconds: float) -> None:
        """Ask the engine to take the weights that the servers behind `handles` offer; return when it has taken them.

        Raises EngineUnreachableError (no connection, or it broke), EngineRefusedError (it answered that it failed) or
        DeadlineError (no answer within `seconds`), each naming the endpoint.
        """

    def weights(self, seconds: float = 10.0) -> Weights | None:
        """What it serves now; None where the engine cannot tell. Raises as `update` does."""
        return None

    def close(self) -> None:  # noqa: B027  (not every engine has something to drop)
        """Drop connections. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


_ENGINES = {
    "sglang": "checkpoint_engine.engines.sglang:SGLang",
    "vllm": "checkpoint_engine.engines.vllm:Vllm",
}


def get_engine(name: str, url: str, uds: str | None = None) -> Engine:
    """A client of the engine of kind `name` ("sglang", which the embedded engine speaks too, or "vllm") at `url`.

    uds: connect to this Unix socket instead of the URL's host and port. Raises SettingsError for an unknown name or a URL
    that is none; connects to nothing yet.
    """
    if name not in _ENGINES:
        raise SettingsError(f"no engine called {name!r}; there are {', '.join(_ENGINES)}")
    module, _, cls = _ENGINES[name].partition(":")
    engine: Engine = getattr(importlib.import_module(module), cls)(url, uds=uds)
    return engine


def request_for_rank(
    engines: Sequence[Engine], rank: int, world_size: int, version: str | None = None, seconds: float = 600.0
) -> Callable[[list[tuple[str, str]]], None]:
    """The `req_func` of rank `rank` for `ParameterServer.update`.

    Engine i serves ranks [i*K, (i+1)*K), K = world_size / len(engines). The first of them asks it, with the handles of
    these ranks; on the others the function returns at once. It raises what Engine.update does. Raises SettingsError when
    the ranks cannot be divided among the engines.
    """
    if not engines or world_size % len(engines):
        raise SettingsError(f"{world_size} ranks cannot be divided evenly among {len(engines)} engines")
    if not 0 <= rank < world_size:
        raise SettingsError(f"rank {rank} is not in a world of {world_size}")
    size = world_size // len(engines)
    index, position = divmod(rank, size)

    def request(handles: list[tuple[str, str]]) -> None:
        if position == 0:
            engines[index].update(handles[rank : rank + size], version=version, seconds=seconds)

    return request
