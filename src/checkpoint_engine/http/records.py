"""What REST answers with, and what ranks tell rank 0 about themselves: plain frozen data, the same in msgpack and in JSON."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from checkpoint_engine.server.watch import ServerStatus

State = Literal["starting", "updating", "committed", "failed", "cancelled"]
"""starting: until bytes may move; committed: every worker serves the new version; the last three are final."""

RUNNING = ("starting", "updating")


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """An error. type: its class; rank: where it was raised; names: what it is about (rank, host, stage, endpoint, tensor, ...);
    notes: what is left to do."""

    type: str
    message: str
    rank: int
    names: dict[str, str | int | float | bool | None] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class Failed:
    """The body of every answer that is an error."""

    error: Problem


@dataclasses.dataclass(frozen=True, slots=True)
class UpdateRecord:
    """One update, as rank 0 knows it.

    id        null on other ranks
    version   null while it is the default of a checkpoint that has not been gathered
    started   seconds since the epoch
    seconds   from the request to now, or to the end
    nbytes    bytes of tensors that each replica is shown; 0 while that is not known
    done      of them, bytes of buckets that are complete, by rank; of the attempt that runs
    attempts  more than one when the update went on without an engine that failed
    report    RolloutReport.to_dict or UpdateReport.to_dict, once it is over
    timeline  whether its timeline is known: of the last updates that were committed
    """

    id: str
    checkpoint: str
    version: str | None
    state: State
    started: float
    seconds: float
    nbytes: int = 0
    done: list[int] = dataclasses.field(default_factory=list)
    attempts: int = 0
    report: dict[str, Any] | None = None
    error: Problem | None = None
    timeline: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class SpanView:
    """As timeline.Span. Times in seconds."""

    stage: str
    bucket: int
    start: float
    seconds: float
    nbytes: int
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class RankTimeline:
    """In order of time. start 0 is the moment at which this rank had heard that all ranks take part."""

    rank: int
    host: str
    spans: list[SpanView]


@dataclasses.dataclass(frozen=True, slots=True)
class TimelineView:
    """When each stage was at work on which bucket. seconds: of the update, as in its report. stages: those that there are, in the
    order in which bytes go through them. bound: one sentence on what bounds the update."""

    id: str
    version: str
    method: str
    nbytes: int
    seconds: float
    bound: str
    stages: list[str]
    ranks: list[RankTimeline]


@dataclasses.dataclass(frozen=True, slots=True)
class RankState:
    """What a rank says about itself. version, dirty: of its worker, as of the last update that it took part in (null:
    none, or unknown); done: bytes of the update that runs."""

    server: ServerStatus
    running: bool = False
    done: int = 0
    version: str | None = None
    dirty: bool | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class RankView:
    """A rank as rank 0 sees it. error: why it could not be asked; the rest is then as it was last."""

    rank: int
    host: str
    error: str | None = None
    state: RankState | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class FleetView:
    """The state of all ranks. ceilings: stage -> bytes per second that this host could do at best.

    met, error: whether the ranks have found each other, and why not; until then only this one is known.
    """

    world_size: int
    met: bool
    error: str | None
    server_version: str
    ranks: list[RankView]
    running: UpdateRecord | None
    ceilings: dict[str, float]


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointPart:
    rank: int
    nbytes: int
    tensors: int


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointView:
    """A checkpoint in the host memory of the ranks. nbytes, tensors: of all parts. version: null until it was gathered."""

    name: str
    nbytes: int
    tensors: int
    version: str | None
    parts: list[CheckpointPart]


@dataclasses.dataclass(frozen=True, slots=True)
class TensorView:
    name: str
    dtype: str
    shape: list[int]
    nbytes: int
    rank: int


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointDetail:
    """listed: tensors that match, of which `tensors` is one page."""

    checkpoint: CheckpointView
    listed: int
    tensors: list[TensorView]


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerWeights:
    """Of the worker beside a rank, as of the last update it took part in; null: none yet."""

    rank: int
    version: str | None
    dirty: bool | None


@dataclasses.dataclass(frozen=True, slots=True)
class EngineWeights:
    """What an engine says now. version, dirty null: it cannot tell, or (error) could not be asked."""

    endpoint: str
    version: str | None
    dirty: bool | None
    error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class WeightsView:
    workers: list[WorkerWeights]
    engines: list[EngineWeights]
