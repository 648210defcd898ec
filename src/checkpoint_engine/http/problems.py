"""Errors over HTTP: which status stands for which, and how one of another rank is raised here."""

from __future__ import annotations

from checkpoint_engine.errors import (
    AgreementError,
    CheckpointBusyError,
    CheckpointEngineError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    DeadlineError,
    EngineError,
    EngineUnsupportedError,
    LoadPlanError,
    ManifestError,
    PeerLostError,
    SettingsError,
    UpdateError,
    UpdateInProgressError,
)
from checkpoint_engine.http.records import Problem


class NotFoundError(CheckpointEngineError):
    """There is no such update."""


class NotLeaderError(CheckpointEngineError):
    """Only rank 0 speaks for the fleet."""


class NotMetError(CheckpointEngineError):
    """The ranks have not all met yet, or could not."""


class RankError(CheckpointEngineError):
    """What a rank answered. problem: its error; status: its HTTP status."""

    def __init__(self, problem: Problem, status: int) -> None:
        self.problem, self.status = problem, status
        super().__init__(f"rank {problem.rank}: {problem.type}: {problem.message}")


# First match wins. 4xx: what the caller did; 5xx: what we, an engine or a rank did.
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (NotFoundError, 404),
    (CheckpointNotFoundError, 404),
    (CheckpointExistsError, 409),
    (CheckpointBusyError, 409),
    (UpdateInProgressError, 409),
    (AgreementError, 409),
    (NotLeaderError, 421),
    (NotMetError, 503),
    (SettingsError, 400),
    (CheckpointError, 400),
    (ManifestError, 400),
    (LoadPlanError, 400),
    (EngineUnsupportedError, 400),
    (EngineError, 502),
    (PeerLostError, 503),
    (DeadlineError, 504),
)
# Of an update: what its request to an engine raised; that a worker did not come.
_STAGE_STATUS = {"request": 502, "attach": 504}


def status_of(error: BaseException) -> int:
    """The HTTP status that stands for `error`."""
    if isinstance(error, RankError):
        return error.status
    if isinstance(error, UpdateError):
        return _STAGE_STATUS.get(error.stage, 500)
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def problem_of(error: BaseException, rank: int) -> Problem:
    """`error`, raised on `rank`, as data. What is not ours says its class and its words, and no traceback."""
    if isinstance(error, RankError):
        return error.problem
    plain = (str, int, float, bool, type(None))
    names = {
        k: v
        for k, v in vars(error).items()
        if isinstance(v, plain) and not k.startswith("_") and k not in ("reason", "aftermath")
    }
    notes = [str(note) for note in getattr(error, "__notes__", ())]
    return Problem(type(error).__name__, str(error) or type(error).__name__, rank, names, notes)
