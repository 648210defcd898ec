"""What rank 0 has all ranks do: one small message each, the same to the others as to itself."""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import msgspec

from checkpoint_engine.engines.base import Engine, PauseMode, get_engine
from checkpoint_engine.engines.rollout import FailurePolicy, OnFailure, Policy
from checkpoint_engine.http.records import Problem
from checkpoint_engine.memory.safetensors import checkpoint_files
from checkpoint_engine.ps import ParameterServer


class EngineSpec(msgspec.Struct, frozen=True):
    """Arguments of `get_engine`. The token is in no representation, so in no log."""

    kind: str
    url: str
    uds: str | None = None
    token: str | None = None

    def __repr__(self) -> str:
        return f"EngineSpec({self.kind!r}, {self.url!r}, uds={self.uds!r})"


class Register(msgspec.Struct, frozen=True, tag=True):
    """Each rank takes its share of every layer of these files, or of a directory's."""

    name: str
    directory: str | None
    files: tuple[str, ...]


class Unregister(msgspec.Struct, frozen=True, tag=True):
    name: str
    force: bool


class Gather(msgspec.Struct, frozen=True, tag=True):
    """Collective."""

    name: str


class RollOut(msgspec.Struct, frozen=True, tag=True):
    """Collective, after Gather. Times in seconds."""

    name: str
    engines: tuple[EngineSpec, ...]
    version: str | None
    pause: PauseMode | None
    resume_dirty: bool
    on_replica_failure: FailurePolicy
    ready_seconds: float | None
    timeout: float
    verify: Literal["on", "off"] | None = None
    on_failure: OnFailure = "abort"


Command = Register | Unregister | Gather | RollOut
COLLECTIVE = (Gather, RollOut)


class Done(msgspec.Struct, frozen=True, tag=True):
    """It was done."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """It was not."""

    problem: Problem
    status: int


Answer = Done | Refused


class EngineClients:
    """One client for each engine that was named, kept, because it remembers what it did to the engine."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: dict[EngineSpec, Engine] = {}

    def get(self, specs: Sequence[EngineSpec]) -> list[Engine]:
        """Raises as get_engine."""
        with self._lock:
            for spec in specs:
                if spec not in self._clients:
                    self._clients[spec] = get_engine(spec.kind, spec.url, spec.uds, spec.token)
            return [self._clients[spec] for spec in specs]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.ExitStack() as stack:
            for client in self._clients.values():
                stack.callback(client.close)


def execute(ps: ParameterServer, clients: EngineClients, command: Command) -> None:
    """Do it on this rank. Raises what the server's method raises."""
    match command:
        case Register(name=name, directory=directory, files=files):
            listed = [str(f) for f in checkpoint_files(Path(directory))] if directory is not None else list(files)
            ps.register_checkpoint(name, files=listed, stripe=True)
        case Unregister(name=name, force=force):
            ps.unregister_checkpoint(name, force=force)
        case Gather(name=name):
            ps.gather_metas(name)
        case RollOut():
            _roll_out(ps, clients, command)


def _roll_out(ps: ParameterServer, clients: EngineClients, command: RollOut) -> None:
    policy = Policy(
        pause=command.pause,
        resume_dirty=command.resume_dirty,
        on_replica_failure=command.on_replica_failure,
        on_failure=command.on_failure,
        ready_seconds=command.ready_seconds,
        call_seconds=min(120.0, command.timeout),
    )
    limit = datetime.timedelta(seconds=command.timeout)
    engines = clients.get(command.engines)
    ps.roll_out(command.name, engines=engines, policy=policy, version=command.version, timeout=limit, verify=command.verify)
