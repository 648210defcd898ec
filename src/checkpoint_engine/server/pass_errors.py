"""How a pass ends when it does not end well."""

from __future__ import annotations

from checkpoint_engine.errors import CheckpointEngineError


class PassError(CheckpointEngineError):
    """The pass failed on this rank, in `stage`."""

    def __init__(self, stage: str, reason: str) -> None:
        self.stage, self.reason = stage, reason
        super().__init__(f"stage {stage}: {reason}")


class Stopped(CheckpointEngineError):
    """The pass was stopped from outside."""
