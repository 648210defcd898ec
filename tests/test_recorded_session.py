"""Recorded loads over several ranks: what is proved is replayed, what cannot be is loaded; the weights are always the loader's.

Whatever happens, the parameters must be what the same loader makes of the same checkpoint in a new model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import pytest

from checkpoint_engine.errors import AgreementError, CheckpointBusyError, UpdateError
from checkpoint_engine.server import pull
from checkpoint_engine.server.mapped import OpenRegions
from checkpoint_engine.server.pull import Puller
from helpers.fleet import Handles, Worker, server, share_of
from helpers.ranks import run_ranks
from helpers.recorded import Deed, checkpoint, engines, fresh

KIB = 1 << 10
METHODS = ["broadcast", "pull"]


class Seen(NamedTuple):
    """Of one update on one rank: of its report, of the worker's state, and of what it ought to be."""

    ways: tuple[str, ...]
    passes: int
    method: str
    notes: tuple[str, ...]
    stages: set[str]
    version: str | None
    dirty: bool
    right: bool
    loaded: list[str]
    replayed: int


def _ask(worker: Worker, rank: int, deed: Deed) -> Callable[[Handles], None]:
    return lambda handles: worker.ask("update", handles[rank][1], deed)


def _updates(
    rank: int,
    world_size: int,
    crew: list[Worker],
    kinds: Sequence[str],
    method: str,
    count: int,
    deeds: dict[tuple[int, int], Deed],
) -> list[Seen | str]:
    """deeds: by number of the update and rank. An update that fails is its error's text."""
    seen: list[Seen | str] = []
    permuted = False
    with server(method=method, bucket_bytes=8 * KIB) as ps:
        for number in range(count):
            weights, deed = checkpoint(number), deeds.get((number, rank), Deed())
            permuted ^= deed.what == "permute"
            ps.register_checkpoint("c", named_tensors=share_of(weights, rank, world_size))
            ps.gather_metas("c")
            try:
                report = ps.update("c", _ask(crew[rank], rank, deed), version=f"v{number}")
            except UpdateError as e:
                seen.append(str(e))
                ps.unregister_checkpoint("c")
                continue
            version, dirty, digests, loaded, replayed = crew[rank].ask("state")
            right = digests == fresh(weights, rank, world_size, kinds[rank], permuted)
            facts = report.ways, report.passes, report.method, report.notes, set(report.stages)
            seen.append(Seen(*facts, version, dirty, right, loaded, replayed))
            ps.unregister_checkpoint("c")
    return seen


def _run(kinds: Sequence[str], method: str, count: int = 3, deeds: dict[tuple[int, int], Deed] | None = None) -> list[list[Any]]:
    with engines(kinds) as crew:
        ranks: list[list[Any]] = run_ranks(_updates, len(kinds), crew, kinds, method, count, deeds or {})
    for seen in ranks:
        for number, each in enumerate(seen):
            if isinstance(each, str):
                assert number in {when for when, _ in deeds or {}}, each
            else:
                assert each.right, f"update {number}: {each}"
                assert (each.version, each.dirty) == (f"v{number}", False)
    return ranks


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_proved_once_then_replayed(world_size: int, method: str) -> None:
    for seen in _run([""] * world_size, method, 4):
        assert [each.ways for each in seen] == [("proved",)] + [("replayed",)] * 3
        assert [each.passes for each in seen] == [2, 1, 1, 1]
        assert [each.method for each in seen[1:]] == ["pull" if method == "pull" else seen[0].method] * 3
        assert all(each.loaded == [] and each.replayed == len(checkpoint(0)) for each in seen[1:])
        assert {"record", "prove", "worker"} <= seen[0].stages
        assert {"replay", "worker"} <= seen[1].stages


def test_by_collective_broadcasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, the second of which needs a third stream: the communicator's broadcasts stay in step."""
    monkeypatch.setenv("CHECKPOINT_ENGINE_PEER_COPIES", "0")
    for seen in _run(["", "writes behind"], "broadcast"):
        assert [(each.method, each.passes) for each in seen] == [("broadcast", 3), ("broadcast", 1), ("broadcast", 1)]


def test_two_passes_of_one_update() -> None:
    """As with a draft model: the second one has a plan by then; and both ranks' workers come again."""
    deed = Deed("twice")
    for seen in _run(["", ""], "broadcast", 2, {(number, rank): deed for number in range(2) for rank in range(2)}):
        assert [(each.ways, each.passes) for each in seen] == [(("proved", "replayed"), 3), (("replayed",), 2)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["casts", "transposes into another dtype", "writes twice", "keeps"])
def test_what_is_no_copy_stays_the_loaders(kind: str, method: str) -> None:
    """On the last rank; the first one replays everything."""
    first, last = _run(["", kind], method)
    assert all(each.ways == ("replayed",) and each.loaded == [] for each in first[1:])
    wanted = {"q", "k"} if kind == "keeps" else {"norm"}
    for each in last[1:]:
        assert {name.split(".")[2] for name in each.loaded} >= wanted
        assert 0 < len(each.loaded) < len(checkpoint(0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "reason", "passes"),
    [
        ("writes nothing", "was not seen to write anything", 2),
        ("replaces", "replaced parameters", 2),
        ("writes behind", "norm differ from what the loader made", 3),
    ],
)
def test_a_refusal_on_one_rank(kind: str, reason: str, passes: int, method: str) -> None:
    """Its loader runs at every update, and the other rank replays."""
    first, last = _run(["", kind], method)
    assert first[0].passes == passes
    assert set(first[0].ways) == {"proved", "loader"}
    for seen in (first, last):
        for each in seen if kind != "replaces" else seen[:1]:
            assert all(note.startswith("rank 1: ") and reason in note for note in each.notes) and each.notes
    assert all(each.loaded == [] for each in first[1:])
    assert all(each.loaded == sorted(checkpoint(0)) for each in last)
    if kind != "replaces":  # there the model is another one at every update, and recorded every time
        assert [each.passes for each in last[1:]] == [1, 1]


@pytest.mark.parametrize("what", ["move", "permute"])
def test_a_model_that_changed_is_recorded_again(what: str) -> None:
    """On one rank; the other has its plan still."""
    first, last = _run(["", ""], "pull", 4, {(2, 1): Deed(what)})
    assert set(last[2].ways) == {"replayed", "proved"}
    assert (first[2].replayed, first[2].loaded) == (len(checkpoint(0)), [])
    assert last[2].loaded == sorted(checkpoint(0))
    assert last[3].ways == ("replayed",)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("deed", "stage", "ways"),
    [
        (Deed("raise", "replay", 2), "load", {"replayed", "proved"}),
        (Deed("raise", "post_hook"), "post_hook", {"replayed", "proved"}),
    ],
)
def test_after_a_failure_the_plan_of_who_failed_is_made_anew(deed: Deed, stage: str, ways: set[str], method: str) -> None:
    first, last = _run(["", ""], method, 5, {(2, 1): deed})
    assert first[2] == last[2]
    assert f"stage {stage}" in first[2]
    assert "ordered to fail" in first[2]
    assert set(first[3].ways) == ways
    assert first[3].loaded == [] and last[3].loaded == sorted(checkpoint(0))
    assert first[4].ways == ("replayed",)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["replay", "post_hook"])
def test_a_proof_that_breaks_off_is_healed(method: str, where: str) -> None:
    """In the first update: while what was poisoned is replayed, and after it. No plan is left of it."""
    deed = Deed("raise", where)
    first, last = _run(["", ""], method, 3, {(0, 1): deed})
    assert "ordered to fail" in first[0]
    assert all(seen[1].ways == ("proved",) and seen[2].ways == ("replayed",) for seen in (first, last))


def _dies(rank: int, world_size: int, crew: list[Worker], spare: list[Worker], method: str) -> Any:
    with server(method=method, bucket_bytes=8 * KIB) as ps:
        for number in range(2):
            ps.register_checkpoint("c", named_tensors=share_of(checkpoint(number), rank, world_size))
            ps.gather_metas("c")
            ps.update("c", _ask(crew[rank], rank, Deed()))
            ps.unregister_checkpoint("c")
        ps.register_checkpoint("c", named_tensors=share_of(checkpoint(2), rank, world_size))
        ps.gather_metas("c")
        with pytest.raises(UpdateError) as caught:
            ps.update("c", _ask(crew[rank], rank, Deed("die", "replay", 2) if rank == 1 else Deed()))
        other = crew[0].ask("state")[:2] if rank == 0 else None
        alive = spare[0] if rank == 1 else crew[0]
        report = ps.update("c", _ask(alive, rank, Deed()), version="healed")
        state = alive.ask("state")
        return caught.value.rank, other, set(report.ways), state[:2], state[2] == fresh(checkpoint(2), rank, world_size)


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_dies_while_it_replays(method: str) -> None:
    with engines(["", ""]) as crew, engines(["", ""]) as spare:
        first, last = run_ranks(_dies, 2, crew, spare[1:], method)
    assert first[0] == last[0] == 1
    assert first[1] is not None and first[1][1], "the other worker is dirty"
    for seen in (first, last):
        assert seen[2] == {"replayed", "proved"}
        assert seen[3] == ("healed", False)
        assert seen[4]


def _unregisters(rank: int, world_size: int, crew: list[Worker]) -> Any:
    with server(method="pull", bucket_bytes=8 * KIB) as ps:
        refused = 0
        for number in range(3):
            ps.register_checkpoint("c", named_tensors=share_of(checkpoint(number), rank, world_size))
            ps.gather_metas("c")

            def ask(handles: Handles) -> None:
                nonlocal refused
                try:
                    ps.unregister_checkpoint("c", force=True)
                except CheckpointBusyError:
                    refused += 1
                crew[rank].ask("update", handles[rank][1], Deed())

            report = ps.update("c", ask)
            ps.unregister_checkpoint("c", force=True)
        right = crew[rank].ask("state")[2] == fresh(checkpoint(2), rank, world_size)
        return refused, report.method, right


def test_memory_that_is_pulled_from_cannot_be_unregistered_meanwhile() -> None:
    """Between updates it can, for good: the next one has other memory."""
    with engines(["", ""]) as crew:
        assert run_ranks(_unregisters, 2, crew) == [(3, "pull", True)] * 2


def test_one_rank_insists_on_pulling_and_another_on_broadcasting() -> None:
    with engines(["", ""]) as crew:
        assert run_ranks(_insists, 2, crew) == [True] * 2


def _insists(rank: int, world_size: int, crew: list[Worker]) -> bool:
    with server(method="pull" if rank else "broadcast", bucket_bytes=8 * KIB) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(checkpoint(0), rank, world_size))
        ps.gather_metas("c")
        with pytest.raises(AgreementError, match="others to broadcast"):
            ps.update("c", _ask(crew[rank], rank, Deed()))
    return True


def _as_on_a_gpu(rank: int, world_size: int, crew: list[Worker]) -> Any:
    """The choice, the descriptors and the kept regions as where host memory is not device memory."""
    offer = Puller.offer
    Puller.offer = lambda *args: msgspec.structs.replace(offer(*args), maps=False)  # type: ignore[method-assign]
    pull.OpenRegions = lambda *args, writable: OpenRegions(*args, writable=True)  # type: ignore[misc, assignment]
    crew[rank].ask("keep regions")
    seen = []
    with server(method="auto", bucket_bytes=4 * KIB, map_regions=True) as ps:
        for number in range(8):
            weights = checkpoint(number)
            if number:
                ps.unregister_checkpoint("c", force=number == 3)  # from then on it has other memory
            ps.register_checkpoint("c", named_tensors=share_of(weights, rank, world_size), use_shared_memory_pool=True)
            ps.gather_metas("c")
            if number == 5:
                with pytest.raises(UpdateError):
                    ps.update("c", _ask(crew[rank], rank, Deed("raise", "replay") if rank else Deed()))
            report = ps.update("c", _ask(crew[rank], rank, Deed()))
            right = crew[rank].ask("state")[2] == fresh(weights, rank, world_size)
            seen.append((report.method == "pull", set(report.ways), right))
    return seen


def test_pull_once_the_regions_are_ready() -> None:
    """Proved, replayed while regions are mapped, pulled; so again after the memory became another, which is not mapped before it
    was used twice, and after a failure."""
    with engines(["", ""]) as crew:
        for seen in run_ranks(_as_on_a_gpu, 2, crew):
            assert all(right for _, _, right in seen)
            assert [pulled for pulled, _, _ in seen] == [False, False, True, False, False, False, True, True]
            replayed, proved = {"replayed"}, {"proved"}
            assert [ways for _, ways, _ in seen] == [proved, *[replayed] * 4, replayed | proved, *[replayed] * 2]
