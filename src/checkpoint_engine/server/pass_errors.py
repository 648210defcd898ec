"""How a pass, or the update that it is of, ends when it does not end well."""

from __future__ import annotations

from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.transport.messages import Failure


class PassError(CheckpointEngineError):
    """The pass failed on this rank, in `stage`."""

    def __init__(self, stage: str, reason: str) -> None:
        self.stage, self.reason = stage, reason
        super().__init__(f"stage {stage}: {reason}")


class Stopped(CheckpointEngineError):
    """The pass was stopped from outside."""


class Fail(Exception):
    """Raised inside the update's loop: it has failed, here or elsewhere. announced: all ranks were told."""

    def __init__(self, failure: Failure, *, announced: bool) -> None:
        self.failure, self.announced = failure, announced
