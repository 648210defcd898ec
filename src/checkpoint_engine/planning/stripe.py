"""Which rank reads which tensors of a checkpoint on disk, so that all ranks lift at once in whatever layer the stream is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from checkpoint_engine.errors import SettingsError
from checkpoint_engine.planning.order import layer_key, layer_of, together
from checkpoint_engine.planning.sizes import preferred_piece


def stripe(tensors: Sequence[tuple[str, int]], world_size: int, run_bytes: int | None = None) -> list[list[str]]:
    """Divide `tensors`, (name, bytes) in the order they have in the files, over `world_size` ranks.

    Returns the names of each rank, in file order; every tensor once, tensors that load together on one rank.

    The model, in the order in which it travels, is cut into runs of at most `run_bytes` (None: what a piece has on a GPU;
    a larger tensor is a run) and these are dealt out in turn. Any stretch of the model of `world_size` runs is then
    spread over all ranks, and a run is a bucket, or half of one: neighbouring buckets have different owners, and none
    reaches far ahead. A layer larger than that stretch is shared evenly by all ranks. Cutting every layer, however small,
    into `world_size` parts would fill a bucket with crumbs of many layers, and leave as many modules half loaded.

    Whole tensors make shares uneven: one rank alone takes the embedding. It gets less of the rest, all along.

    Raises SettingsError when `world_size` or `run_bytes` is not positive.
    """
    run_bytes = preferred_piece("cuda", world_size) if run_bytes is None else run_bytes
    if world_size < 1 or run_bytes < 1:
        raise SettingsError(f"world size and run size must be at least 1, not {world_size} and {run_bytes}")
    units: dict[str | int, list[int]] = {}  # the places in `tensors` of what stays on one rank
    for place in sorted(range(len(tensors)), key=lambda p: layer_key(tensors[p][0])):
        units.setdefault(together(tensors[place][0]) or place, []).append(place)
    loose = [unit for unit in units.values() if layer_of(tensors[unit[0]][0]) == ""]
    layered = list(units.values())[len(loose) :]  # sorted: what is in no layer comes first

    total = sum(nbytes for _, nbytes in tensors)
    laps = max(1, -(-total // (world_size * run_bytes)))
    limit = -(-total // (world_size * laps))  # equal runs, as many for each rank
    share = total / world_size

    places: list[list[int]] = [[] for _ in range(world_size)]
    has = _deal(_runs(tensors, loose, limit), [share] * world_size, places)
    _deal(_runs(tensors, layered, limit), [share - mine for mine in has], places)
    return [[tensors[place][0] for place in sorted(mine)] for mine in places]


def _runs(tensors: Sequence[tuple[str, int]], units: list[list[int]], limit: int) -> Iterable[tuple[list[int], int]]:
    """Neighbouring units, at most `limit` bytes of them together: (places, bytes)."""
    run: list[int] = []
    size = 0
    for unit in units:
        nbytes = sum(tensors[place][1] for place in unit)
        if run and size + nbytes > limit:
            yield run, size
            run, size = [], 0
        run = run + unit
        size += nbytes
    if run:
        yield run, size


def _deal(runs: Iterable[tuple[list[int], int]], wants: list[float], places: list[list[int]]) -> list[int]:
    """Give each run to the rank that has the smallest part of what it wants; returns the bytes given to each."""
    has = [0] * len(wants)
    able = [rank for rank, want in enumerate(wants) if want > 0] or list(range(len(wants)))
    for run, nbytes in runs:
        rank = min(able, key=lambda r: (has[r] / max(wants[r], 1.0), r))
        places[rank].extend(run)
        has[rank] += nbytes
    return has
