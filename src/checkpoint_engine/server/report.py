"""What an update tells about itself."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from checkpoint_engine.timeline import Timeline, Trace
from checkpoint_engine.transport.messages import StageStats


@dataclasses.dataclass(frozen=True, slots=True)
class StageReport:
    """nbytes moved and seconds at work; a stage that waits for another is not at work."""

    nbytes: int
    seconds: float

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes per second; 0 when the stage did nothing."""
        return self.nbytes / self.seconds / 1e9 if self.seconds > 0 else 0.0


class Saved(NamedTuple):
    """By sending ranks only what their load plans need; see UpdateReport."""

    unsent: int = 0
    groups: int = 0
    group_bytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class UpdateReport:
    """One update, the same on every rank but for `seconds` and `group_bytes`.

    nbytes   bytes of tensors that each replica's workers were shown
    seconds  from the call of `update` to its end, on this rank
    method   "broadcast"; "copies": peer copies within a host; "mapped": engines loaded straight from the servers' memory;
             "pull": the same, replayed
    stages   lift, share, load (of it load_weights: the engine's own function), post_hook; worker: all that Python did in it,
             waiting left out, and of that record, prove, replay; verify: digests being made, beside all else, where they were
             checked; of each the rank that was longest at work in it
    ranks    the same per rank, in rank order
    passes   how often the stream ran (more than once with speculative decoding, and to record and prove a load plan)
    ways     how workers loaded: "loader", "proved" (the loader, then a plan that is used from then on), "replayed"; all that
             there were among ranks and workers
    notes    why a worker does not replay, where it was asked to
    unsent   bytes that ranks were not sent in the first stream, of all ranks together: their load plans need nothing of them
    groups   sub-groups that this took, beside the communicator of all ranks, and group_bytes: device memory that those of this
             rank keep, estimated; 0 on a CPU, and where ranks of one host copy
    timelines  on rank 0: when each rank's stages were at work on what (Settings.timelines); not in `to_dict`
    """

    version: str
    method: str
    nbytes: int
    seconds: float
    passes: int
    stages: dict[str, StageReport]
    ranks: tuple[dict[str, StageReport], ...]
    ways: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unsent: int = 0
    groups: int = 0
    group_bytes: int = 0
    timelines: tuple[Timeline, ...] = dataclasses.field(default=(), repr=False, compare=False)

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / self.seconds / 1e9

    @property
    def trace(self) -> Trace:
        """For timeline.to_chrome and timeline.summarise. Without ranks where there are no timelines."""
        return Trace(self.version, self.method, self.nbytes, self.seconds, self.timelines)

    def __str__(self) -> str:
        """One line: 10^9 bytes, seconds, GB/s, stage by stage."""
        stages = ", ".join(f"{name} {s.seconds:.3f} s ({s.gb_per_s:.1f} GB/s)" for name, s in self.stages.items())
        return f"{self.version}: {self.nbytes / 1e9:.3f} GB in {self.seconds:.3f} s ({self.gb_per_s:.1f} GB/s); at work: {stages}"

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON, rates included."""

        def stages(of: dict[str, StageReport]) -> dict[str, object]:
            return {k: {"nbytes": s.nbytes, "seconds": s.seconds, "gb_per_s": s.gb_per_s} for k, s in of.items()}

        return {
            "version": self.version,
            "method": self.method,
            "nbytes": self.nbytes,
            "seconds": self.seconds,
            "gb_per_s": self.gb_per_s,
            "passes": self.passes,
            "stages": stages(self.stages),
            "ranks": [stages(r) for r in self.ranks],
            "ways": list(self.ways),
            "notes": list(self.notes),
            "unsent": self.unsent,
            "groups": self.groups,
            "group_bytes": self.group_bytes,
        }


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """Of an update that went well. passes: streams. reads, needs, ahead: of this rank's workers, see Crew. timelines: on
    rank 0 only. All else is of all ranks."""

    passes: int
    stats: tuple[dict[str, StageStats], ...]
    ways: tuple[str, ...]
    notes: tuple[str, ...]
    reads: int
    needs: bytes
    ahead: bool
    timelines: tuple[Timeline, ...] = ()


def make_report(version: str, method: str, nbytes: int, seconds: float, outcome: Outcome, saved: Saved) -> UpdateReport:
    """nbytes: of one stream; seconds: of this rank."""
    ranks = tuple({k: StageReport(s.nbytes, s.seconds) for k, s in stats.items()} for stats in outcome.stats)
    what = (outcome.passes, slowest(ranks), ranks, outcome.ways, outcome.notes, *saved, outcome.timelines)
    return UpdateReport(version, method, nbytes, seconds, *what)


def method_name(shared_by: str, ways: tuple[str, ...], *, mapped: bool) -> str:
    """shared_by: of the lane; mapped: workers had all ranks' regions."""
    if not mapped:
        return shared_by
    return "pull" if ways == ("replayed",) else "mapped"


def merge(first: dict[str, StageStats], second: dict[str, StageStats]) -> dict[str, StageStats]:
    """The sum, stage by stage: what two passes did."""
    total = dict(first)
    for stage, stats in second.items():
        before = total.get(stage, StageStats())
        total[stage] = StageStats(before.nbytes + stats.nbytes, before.seconds + stats.seconds)
    return total


def slowest(ranks: tuple[dict[str, StageReport], ...]) -> dict[str, StageReport]:
    names = dict.fromkeys(name for stats in ranks for name in stats)
    return {name: max((stats[name] for stats in ranks if name in stats), key=lambda s: s.seconds) for name in names}
