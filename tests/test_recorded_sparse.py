"""Ranks of an expert-parallel model: each is sent only the buckets that its load plan takes anything of.

Whatever happens, the weights must be the loader's.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest

from checkpoint_engine.errors import UpdateError
from checkpoint_engine.server.fleet import Fleet
from helpers.fleet import Handles, Worker, server, share_of
from helpers.netns import TwoHosts
from helpers.ranks import run_ranks
from helpers.recorded import Deed, checkpoint, engines, fresh

KIB = 1 << 10
WORLD = 3
KIND = "apart"
Deeds = dict[tuple[int, int], Deed]


class Seen(NamedTuple):
    """Of one update on one rank. shared: bytes that came to each rank in it."""

    ways: frozenset[str]
    passes: int
    method: str
    unsent: int
    groups: int
    shared: tuple[int, ...]
    notes: tuple[str, ...]
    replayed: int
    right: bool
    state: tuple[str | None, bool]


def _ask(worker: Worker, rank: int, deed: Deed) -> Callable[[Handles], None]:
    return lambda handles: worker.ask("update", handles[rank][1], deed)


def _updates(rank: int, world_size: int, crew: Sequence[Worker], numbers: range, deeds: Deeds) -> list[Seen | str]:
    """deeds: by number of the update and rank; in "server" the server dies. An update that fails is its error's text."""
    seen: list[Seen | str] = []
    experts_of = rank
    with server(method="broadcast", bucket_bytes=4 * KIB, ring_bytes=32 * KIB) as ps:
        for number in numbers:
            weights, deed = checkpoint(number, KIND), deeds.get((number, rank), Deed())
            experts_of = (rank + 1) % world_size if deed.what == "exchange" else experts_of
            came = 0

            def progress(nbytes: int, deed: Deed = deed) -> None:
                nonlocal came
                came += 1
                if deed.where == "server" and came > deed.number:
                    os.kill(os.getpid(), signal.SIGKILL)

            ps.register_checkpoint("c", named_tensors=share_of(weights, rank, world_size))
            ps.gather_metas("c")
            try:
                report = ps.update("c", _ask(crew[rank], rank, deed), version=f"v{number}", progress=progress)
            except UpdateError as e:
                seen.append(str(e))
                ps.unregister_checkpoint("c")
                continue
            version, dirty, digests, _, replayed = crew[rank].ask("state")
            right = digests == fresh(weights, rank, world_size, KIND, experts_of=experts_of)
            shared = tuple(stages["share"].nbytes for stages in report.ranks)
            facts = report.method, report.unsent, report.groups, shared, report.notes, replayed
            seen.append(Seen(frozenset(report.ways), report.passes, *facts, right, (version, dirty)))
            ps.unregister_checkpoint("c")
    return seen


def _check(ranks: Sequence[Sequence[Seen | str]], numbers: range, failing: Sequence[int] = ()) -> list[list[Any]]:
    for seen in ranks:
        for number, each in zip(numbers, seen, strict=True):
            if isinstance(each, str):
                assert number in failing, each
            else:
                assert each.right, f"update {number}: {each}"
                assert each.state == (f"v{number}", False)
    return [list(seen) for seen in ranks]


def _run(count: int, deeds: Deeds | None = None, failing: Sequence[int] = (), **options: Any) -> list[list[Any]]:
    with engines([KIND] * WORLD) as crew:
        ranks = run_ranks(_updates, WORLD, crew, range(count), deeds or {}, **options)
    return _check(ranks, range(count), failing)


TOTAL = sum(tensor.nbytes for tensor in checkpoint(0, KIND).values())


def test_what_no_plan_needs_is_not_sent(sharing: str) -> None:
    """Proved, then replayed three times with other weights; engines are told of tensors that did not come, too."""
    for seen in _run(4):
        assert [each.method for each in seen] == [sharing] * 4
        assert [each.ways for each in seen] == [{"proved"}] + [{"replayed"}] * 3
        assert [each.passes for each in seen] == [2, 1, 1, 1]
        assert [each.unsent > 0 for each in seen] == [False, True, True, True]
        assert [each.groups > 0 for each in seen] == [False] + [sharing == "broadcast"] * 3
        for each in seen[1:]:
            assert WORLD * TOTAL - sum(each.shared) == each.unsent
            assert each.replayed == len(checkpoint(0, KIND))
            assert each.notes == ()


def test_a_rank_that_wants_all_gets_all(sharing: str) -> None:
    """Its setting says so; the others get what they need."""
    for seen in _run(2, env_of=_whole_on_rank_1):
        assert seen[1].unsent > 0
        assert seen[1].shared[1] == TOTAL
        assert max(seen[1].shared[0], seen[1].shared[2]) < TOTAL


def _whole_on_rank_1(rank: int) -> dict[str, str]:
    return {"CHECKPOINT_ENGINE_SPARSE": "off"} if rank == 1 else {}


def test_plans_that_went_stale(sharing: str) -> None:
    """On one rank because its experts are others now, on another because it moved: what was not sent to them comes in a further
    stream, and nothing is committed before. In the update after that they are sent what their new plans need."""
    for seen in _run(4, {(2, 1): Deed("exchange"), (2, 2): Deed("move")}):
        assert [each.passes for each in seen] == [2, 1, 3, 1]
        assert seen[2].unsent > 0
        assert seen[2].ways == {"replayed", "proved"}
        assert [note[:33] for note in seen[2].notes] == [f"rank {rank}: not all that it needs was" for rank in (1, 2)]
        assert seen[3].ways == {"replayed"} and seen[3].unsent > 0 and seen[3].notes == ()
        assert seen[3].shared[1] != seen[1].shared[1]


def test_a_replay_that_breaks_off_gets_all(sharing: str) -> None:
    """The loader takes over, from a stream that lacks nothing; from then on that rank is sent all."""
    for seen in _run(4, {(2, 1): Deed("break", number=2)}):
        assert [each.passes for each in seen] == [2, 1, 2, 1]
        assert seen[2].ways == {"replayed", "loader"}
        assert any("broke off" in note or "break off" in note for note in seen[2].notes)
        assert seen[3].unsent > 0 and seen[3].shared[1] == TOTAL


def test_a_further_pass_of_an_update_is_whole(sharing: str) -> None:
    """Another worker, or model, may have come for it; and which of several will come first the next time is not known."""
    twice = {(2, rank): Deed("twice") for rank in range(WORLD)}
    for seen in _run(5, twice):
        assert [each.passes for each in seen] == [2, 1, 2, 1, 1]
        assert [each.unsent > 0 for each in seen] == [False, True, True, False, True]
        assert WORLD * 2 * TOTAL - sum(seen[2].shared) == seen[2].unsent


def test_after_a_failure_all_is_sent(sharing: str) -> None:
    """The next update heals whatever the failed one left, and needs nothing of what was known before."""
    first, middle, last = _run(5, {(2, 1): Deed("raise", "replay", 2)}, failing=[2])
    for seen in (first, middle, last):
        assert "rank 1" in seen[2] and "ordered to fail" in seen[2]
        assert (seen[3].unsent, seen[3].passes) == (0, 2)
        assert seen[4].unsent > 0 and seen[4].ways == {"replayed"}


def _spared(rank: int, world_size: int, crew: list[Worker], spare: list[Worker], deeds: Deeds) -> list[Any]:
    """Three updates, then rank 1 has another worker."""
    with_spare = [spare[0] if number == 1 else worker for number, worker in enumerate(crew)]
    with server(method="broadcast", bucket_bytes=4 * KIB, ring_bytes=32 * KIB) as ps:
        seen = []
        for number in range(5):
            weights, worker = checkpoint(number, KIND), (crew if number < 3 else with_spare)[rank]
            deed = deeds.get((number, rank), Deed())
            ps.register_checkpoint("c", named_tensors=share_of(weights, rank, world_size))
            ps.gather_metas("c")
            try:
                report = ps.update("c", _ask(worker, rank, deed), version=f"v{number}")
            except UpdateError as e:
                seen.append((str(e), 0, 0, True, ("", False)))
            else:
                state = worker.ask("state")
                right = state[2] == fresh(weights, rank, world_size, KIND)
                seen.append(("", report.passes, report.unsent, right, state[:2]))
            ps.unregister_checkpoint("c")
    return seen


@pytest.mark.parametrize("dies", [False, True])
def test_a_worker_that_was_started_anew(sharing: str, dies: bool) -> None:
    """Between two updates, of which its server learns too late to have all sent at once; or while it replayed."""
    deeds = {(2, 1): Deed("die", "replay", 2)} if dies else {}
    with engines([KIND] * WORLD) as crew, engines([KIND] * WORLD) as spare:
        ranks = run_ranks(_spared, WORLD, crew, spare[1:2], deeds)
    for seen in ranks:
        for number, (error, passes, unsent, right, state) in enumerate(seen):
            assert right, number
            if error:
                assert dies and number == 2
                continue
            assert state == (f"v{number}", False)
            assert passes == (2 if number == 0 else 3 - dies if number == 3 else 1)
            assert (unsent > 0) == (number > 0 and not (dies and number == 3))
        assert bool(seen[2][0]) == dies


def test_a_server_dies_in_the_middle(sharing: str) -> None:
    """New servers, which know nothing of the workers' needs, heal them."""
    deeds = {(2, 1): Deed("", "server", 12)}
    with engines([KIND] * WORLD) as crew:
        first = run_ranks(_updates, WORLD, crew, range(3), deeds, may_die=[1])
        assert crew[1].pipe.poll(30.0)
        assert not crew[1].pipe.recv()[0]  # what its worker told a server that was gone
        second = run_ranks(_updates, WORLD, crew, range(3, 6), {})
    assert first[1] is None
    for seen in (first[0], first[2]):
        assert "rank 1" in seen[2]
    for seen in _check(second, range(3, 6)):
        assert [each.unsent > 0 for each in seen] == [False, True, True]
        assert seen[1].ways == {"replayed"}


def _no_group(rank: int, world_size: int, crew: list[Worker]) -> list[Any]:
    """Rank 1 cannot make its sub-groups in the second update."""
    seen: list[Any] = []
    with server(method="broadcast", bucket_bytes=4 * KIB, ring_bytes=32 * KIB) as ps:
        for number in range(5):
            if number == 1 and rank == 1:
                make = Fleet.group
                Fleet.group = _raising  # type: ignore[method-assign]
            ps.register_checkpoint("c", named_tensors=share_of(checkpoint(number, KIND), rank, world_size))
            ps.gather_metas("c")
            try:
                report = ps.update("c", _ask(crew[rank], rank, Deed()), version=f"v{number}")
            except UpdateError as e:
                seen.append((e.rank, e.stage, e.reason, e.dirty))
                if rank == 1:
                    Fleet.group = make  # type: ignore[method-assign]
            else:
                right = crew[rank].ask("state")[2] == fresh(checkpoint(number, KIND), rank, world_size, KIND)
                seen.append((right, report.unsent > 0, report.groups > 0))
            ps.unregister_checkpoint("c")
    return seen


def _raising(*_: Any) -> Any:
    raise OSError("no more descriptors")


def test_sub_groups_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks hear of it at once, whether they wait for it in a sub-group or in the update; nothing was loaded."""
    monkeypatch.setenv("CHECKPOINT_ENGINE_PEER_COPIES", "0")
    with engines([KIND] * WORLD) as crew:
        for seen in run_ranks(_no_group, WORLD, crew):
            assert seen[0] == seen[2] == (True, False, False)
            assert seen[1] == (1, "join", "OSError: no more descriptors", False)
            assert seen[3] == seen[4] == (True, True, True)


@pytest.mark.netns
def test_two_hosts(netns: TwoHosts) -> None:
    """Two ranks on each, by broadcasts: groups of a host's ranks alone are among those that are made."""
    with engines([KIND] * 4) as crew:
        ranks = run_ranks(_updates, 4, crew, range(3), {}, hosts=netns.hosts)
    for seen in _check(ranks, range(3)):
        assert [each.method for each in seen] == ["broadcast"] * 3
        assert [each.unsent > 0 and each.groups > 0 for each in seen] == [False, True, True]
