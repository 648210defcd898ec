"""One engine's way through a rollout: ready, paused, updated, finished, resumed; and what becomes of it when that fails."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from typing import Literal, get_args

from checkpoint_engine.engines.base import Engine, Handles, PauseMode
from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineError,
    EngineUnreachableError,
    EngineUnsupportedError,
    SettingsError,
)

FailurePolicy = Literal["abort", "continue"]
OnFailure = Literal["abort", "restore"]
"""What follows a failed update. abort: nothing; restore: all workers get the checkpoint again that was committed last."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How engines are treated while they are updated. Times in seconds.

    pause               what becomes of running requests; None: engines are not paused
    resume_dirty        after a failure also resume engines whose weights are a mixture
    on_replica_failure  abort: one engine that fails ends the rollout for all; continue: the others go on without it
    on_failure          of the update. abort: engines that hold a mixture keep it; restore: they get the checkpoint again that was
                        committed last, if it is still registered. One that cannot take it does not keep the others from it
    ready_seconds       for an engine to become ready; None: it is not asked
    call_seconds        for each other call but the update: pause, reset, publish, resume
    """

    pause: PauseMode | None = None
    resume_dirty: bool = False
    on_replica_failure: FailurePolicy = "abort"
    on_failure: OnFailure = "abort"
    ready_seconds: float | None = None
    call_seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.pause is not None and self.pause not in get_args(PauseMode):
            raise SettingsError(f"no pause mode {self.pause!r}; there are {', '.join(get_args(PauseMode))}")
        if self.on_replica_failure not in get_args(FailurePolicy):
            raise SettingsError(f"on_replica_failure is {' or '.join(get_args(FailurePolicy))}, not {self.on_replica_failure!r}")
        check_on_failure(self.on_failure)


def check_on_failure(value: str) -> None:
    """Raises SettingsError unless it is an OnFailure."""
    if value not in get_args(OnFailure):
        raise SettingsError(f"on_failure is {' or '.join(get_args(OnFailure))}, not {value!r}")


class Turn:
    """The calls of one engine in their one safe order: wait_ready, pause, update, finish; give_up instead of the rest.

    pause_ms  milliseconds from the call that paused it to the answer that it goes on; NaN when it was not paused by a call
    """

    def __init__(self, engine: Engine, policy: Policy) -> None:
        self.engine, self._policy = engine, policy
        self.pause_ms = math.nan
        self._paused_at: float | None = None

    def wait_ready(self) -> None:
        """Raises EngineUnreachableError, also for an engine that answers and takes no weights."""
        if self._policy.ready_seconds is not None:
            try:
                self.engine.wait_ready(self._policy.ready_seconds)
            except DeadlineError as e:
                raise EngineUnreachableError(self.engine.endpoint, str(e)) from None

    def pause(self) -> None:
        """Raises as Engine.pause."""
        if self._policy.pause is None:
            return
        start = time.perf_counter()
        try:
            paused = self.engine.pause(self._policy.pause, self._policy.call_seconds)
        except EngineUnsupportedError:
            raise
        except BaseException:
            self._paused_at = start  # a call that failed may have paused it all the same
            raise
        if paused:
            self._paused_at = start

    def update(self, handles: Handles, version: str | None, seconds: float) -> None:
        """Raises as Engine.update."""
        self.engine.update(handles, version=version, seconds=seconds)

    def finish(self, version: str | None) -> None:
        """After a good update: no old key or value is used, the version is published, requests go on.

        Raises as Engine.finish and Engine.resume. An engine that may still hold old keys and values stays paused.
        """
        self.engine.left_dirty = False
        self.engine.finish(version, self._policy.call_seconds)
        self._resume()

    def go_back(self, version: str) -> str | None:
        """After a failure, when the engine has been given `version` once more: as `finish`, but returns what its operator must
        know instead of raising."""
        try:
            self.finish(version)
        except CheckpointEngineError as e:
            return f"engine at {self.engine.endpoint} has {version!r} again, and may still be paused: {e}"
        return None

    def give_up(self, dirty: bool) -> str | None:
        """After a failure: resume the engine if its weights are whole (dirty: they are not), or if the policy says so.

        Returns what its operator must know, if anything: that it stays paused, or could not be resumed or paused.
        """
        dirty = dirty or self._was_dirty() or (self._paused_at is not None and self.engine.pause_drops_weights)
        self.engine.left_dirty = dirty
        held = dirty and not self._policy.resume_dirty
        try:
            if not held:
                self._resume()
                return None
            if self._paused_at is None and not self._hold():
                return (
                    f"engine at {self.engine.endpoint} is not paused, and its weights are a mixture: keep requests away from it"
                )
        except CheckpointEngineError as e:
            return f"engine at {self.engine.endpoint} could not be {'paused' if held else 'resumed'}: {e}"
        return f"engine at {self.engine.endpoint} stays paused: its weights are a mixture until the next complete update"

    def _was_dirty(self) -> bool:
        """Since an earlier failure, as far as anybody knows."""
        with contextlib.suppress(CheckpointEngineError):
            served = self.engine.weights()
            return self.engine.left_dirty or (served is not None and served.dirty)
        return self.engine.left_dirty

    def _hold(self) -> bool:
        """Pause an engine that was to hold requests off by itself during the update. Whether it is paused now."""
        return self._policy.pause is not None and self.engine.pause("keep", self._policy.call_seconds)

    def _resume(self) -> None:
        if self._paused_at is None:
            return
        self.engine.resume(self._policy.call_seconds)
        self.pause_ms = (time.perf_counter() - self._paused_at) * 1e3
        self._paused_at = None
