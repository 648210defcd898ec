"""What an update's loop hears from this rank's own threads."""

from __future__ import annotations

import dataclasses

from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.transport import messages as m
from checkpoint_engine.transport.session import WorkerChannel, dismiss

CANCELLED = "cancel"
"""The stage in which an update fails that somebody cancelled."""
VERIFY = "verify"
"""The stage in which a worker found bytes that are not what was registered: no fault of its engine."""


@dataclasses.dataclass(frozen=True)
class WorkerCame:
    """A worker connected and said Hello."""

    channel: WorkerChannel
    hello: m.Hello

    def send_off(self, reason: str) -> None:
        dismiss(self.channel, reason)
        self.channel.close()


@dataclasses.dataclass(frozen=True)
class RequestDone:
    """req_func returned, or raised `error`. absent: it returned NO_WORKER."""

    error: BaseException | None
    absent: bool = False


@dataclasses.dataclass(frozen=True)
class PassEnded:
    """The pass is ready to commit, or wants its stream again (stats), or failed (error)."""

    stats: dict[str, m.StageStats] | None
    error: CheckpointEngineError | None


@dataclasses.dataclass(frozen=True)
class SessionFailed:
    """Someone connected to the session socket and did not behave."""

    error: CheckpointEngineError
