"""What this package asks of an engine, the table of engines, and who of a world's ranks asks which one."""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any, ClassVar, Literal, NamedTuple, Self

from checkpoint_engine.errors import EngineUnsupportedError, SettingsError

Handles = Sequence[tuple[str, str]]
"""(device uuid, handle) of the ranks that one replica spans, in rank order."""


PauseMode = Literal["keep", "wait", "abort"]
"""What becomes of requests that run when an engine is paused: they go on after it, are finished before it, or end now.
New ones wait until the engine is resumed."""


class Weights(NamedTuple):
    """What an engine serves. dirty: an update broke off after its first byte, so that the weights are a mixture."""

    version: str | None
    dirty: bool


class Engine(ABC):
    """A client of one running engine (one replica). A context manager; may be used by several threads at once.

    An update is safe in this order: wait_ready, pause, update, finish (reset_prefix_cache and publish), resume.

    endpoint               how errors name it: its URL, with the Unix socket where there is one
    resets_cache_itself    `update` already forgets what the old weights computed
    pause_drops_weights    once paused it has no weights until an update succeeds: there is no way back to the old ones

    left_dirty             a rollout of this process left it with a mixture of old and new weights

    Every method that asks the engine raises what `update` does, within its `seconds`.
    """

    endpoint: str
    resets_cache_itself: ClassVar[bool] = False
    pause_drops_weights: ClassVar[bool] = False
    left_dirty: bool = False

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

    def pause(self, mode: PauseMode, seconds: float) -> bool:
        """Stop generating; see PauseMode. False: in this mode `update` itself holds requests off, so there is nothing to resume.

        Raises EngineUnsupportedError where the engine has no such mode; it then goes on as before.
        """
        raise EngineUnsupportedError(self.endpoint, f"cannot be paused (mode {mode})")

    def resume(self, seconds: float) -> None:
        """Generate again. Harmless on an engine that is not paused."""
        raise EngineUnsupportedError(self.endpoint, "cannot be resumed")

    def reset_prefix_cache(self, seconds: float) -> None:  # noqa: B027  (not every engine has one)
        """Forget keys and values that the old weights computed. Does nothing where there is no such cache."""

    def publish(self, version: str, seconds: float) -> None:  # noqa: B027  (not every engine has a place for it)
        """Tell the front end which version it serves, where `update` does not. Does nothing where there is no such word."""

    def finish(self, version: str | None, seconds: float) -> None:
        """What follows a successful `update`: no old key or value is used any more, and `version` is published."""
        if not self.resets_cache_itself:
            self.reset_prefix_cache(seconds)
        if version is not None:
            self.publish(version, seconds)

    def close(self) -> None:  # noqa: B027  (not every engine has something to drop)
        """Drop connections. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


_ENGINES = {
    "lmdeploy": "checkpoint_engine.engines.lmdeploy:LMDeploy",
    "sglang": "checkpoint_engine.engines.sglang:SGLang",
    "tensorrt-llm": "checkpoint_engine.engines.tensorrt_llm:TensorRTLLM",
    "vllm": "checkpoint_engine.engines.vllm:Vllm",
}


ENGINES = tuple(_ENGINES)
"""The kinds that `get_engine` knows."""


def get_engine(name: str, url: str, uds: str | None = None, token: str | None = None) -> Engine:
    """A client of the engine of kind `name` at `url`; the embedded engine is of kind "sglang".

    uds: connect to this Unix socket instead of the URL's host and port. token: sent as a bearer token, for engines that were
    started with an API key. Raises SettingsError for an unknown name or a URL that is none; connects to nothing yet.
    """
    if name not in _ENGINES:
        raise SettingsError(f"no engine called {name!r}; there are {', '.join(_ENGINES)}")
    module, _, cls = _ENGINES[name].partition(":")
    options: dict[str, Any] = {"uds": uds, "token": token}
    engine: Engine = getattr(importlib.import_module(module), cls)(url, **options)
    return engine


def replica_size(engines: int, rank: int, world_size: int) -> int:
    """How many ranks each engine spans. Raises SettingsError when they cannot be divided evenly, or `rank` is none of them."""
    if not engines or world_size % engines:
        raise SettingsError(f"{world_size} ranks cannot be divided evenly among {engines} engines")
    if not 0 <= rank < world_size:
        raise SettingsError(f"rank {rank} is not in a world of {world_size}")
    return world_size // engines


@dataclasses.dataclass(frozen=True)
class EngineRequest:
    """What `request_for_rank` returns. engine: None on a rank that asks none. first, size: of the ranks that it serves."""

    engine: Engine | None
    first: int
    size: int
    version: str | None
    seconds: float

    def __call__(self, handles: list[tuple[str, str]]) -> None:
        if self.engine is not None:
            self.engine.update(handles[self.first : self.first + self.size], version=self.version, seconds=self.seconds)
            self.engine.finish(self.version, self.seconds)

    def of(self, version: str) -> EngineRequest:
        """The same with another version, for what is put back after a failure."""
        return dataclasses.replace(self, version=None if self.version is None else version)


def request_for_rank(
    engines: Sequence[Engine], rank: int, world_size: int, version: str | None = None, seconds: float = 600.0
) -> EngineRequest:
    """The `req_func` of rank `rank` for `ParameterServer.update`.

    Engine i serves ranks [i*K, (i+1)*K), K = world_size / len(engines). The first of them asks it, with the handles of
    these ranks, and finishes (Engine.finish); on the others the function returns at once. It raises what Engine.update does.
    Pausing is the caller's; `ParameterServer.roll_out` does all of it. Raises SettingsError when the ranks cannot be divided
    among the engines.
    """
    size = replica_size(len(engines), rank, world_size)
    index, position = divmod(rank, size)
    return EngineRequest(None if position else engines[index], rank, size, version, seconds)
