"""Which cells the fault matrix has, and why some of them make no sense."""

from __future__ import annotations

from dataclasses import dataclass

from checkpoint_engine.settings import Settings
from faults.actors import STAGES

WHO = ("server", "store host", "worker", "engine's HTTP", "peer source")
BETWEEN = "between updates"
KINDS = ("SIGKILL", "SIGSTOP", "exception", "wrong answer")
LOADS = ("load first", "load middle", "load last")

NOT_THERE = "it takes no part in this stage"
AS_SERVER = "a source registers and gathers as any server does"
NO_CODE = "no code but ours runs there"
NOBODY_ASKS = "nobody asks it anything between updates"
OVER = "everything was read before"
UNSEEN = "digests are not checked yet"

CHECKED = "verify" in Settings.__dataclass_fields__
"""Whether bytes are checked on their way."""


@dataclass(frozen=True)
class Cell:
    """succeeds: the update is none the worse for it."""

    who: str
    stage: str
    kind: str
    succeeds: bool = False

    def __str__(self) -> str:
        return f"{self.who}, {self.stage}, {self.kind}"


def senseless(who: str, stage: str, kind: str) -> str:
    """Why there is no such cell; "": there is."""
    if stage in ("register", "gather"):
        return {"worker": NOT_THERE, "engine's HTTP": NOT_THERE, "peer source": AS_SERVER}.get(who, "")
    own = kind in ("exception", "wrong answer")
    if kind == "wrong answer" and not CHECKED and _is_bytes(who, stage):
        return UNSEEN
    match who:
        case "server" | "store host" if own and stage in ("release", "commit"):
            return NO_CODE
        case "worker" if stage == BETWEEN and kind == "exception":
            return NOBODY_ASKS
        case "engine's HTTP" if stage == BETWEEN and own:
            return NOBODY_ASKS
        case "peer source" if own and stage in ("release", "commit"):
            return OVER
    return ""


def _is_bytes(who: str, stage: str) -> bool:
    """Whether the wrong answer is other bytes than those that were registered."""
    return (who in ("server", "store host") and stage in LOADS) or (who == "peer source" and stage in ("attach", *LOADS, BETWEEN))


def succeeds(who: str, stage: str, kind: str) -> bool:
    """An answer of the engine that comes too early proves nothing and spoils nothing; what was read is not needed any more; a
    worker that serves something else gets an update as any other."""
    match who:
        case "engine's HTTP":
            return kind == "wrong answer" and stage != "attach"
        case "peer source":
            return stage in ("load last", "release", "commit")
        case "worker":
            return stage == BETWEEN and kind == "wrong answer"
        case "server" | "store host":
            return stage == "load last" and kind == "wrong answer"
    return False


def cells() -> list[Cell]:
    """All that make sense, by who and stage, so that neighbours can share a fleet."""
    return [
        Cell(who, stage, kind, succeeds(who, stage, kind))
        for who in WHO
        for stage in STAGES
        for kind in KINDS
        if not senseless(who, stage, kind)
    ]
