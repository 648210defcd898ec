"""The leader's decisions, as a pure state machine: whatever order messages come in, passes and the end come out right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.errors import ProtocolError
from checkpoint_engine.server.leader import Leader
from checkpoint_engine.settings import Settings
from checkpoint_engine.transport import messages as m

SETTINGS = Settings(pass_grace=1.0, attach_timeout=10.0)


def _leader(world_size: int) -> Leader:
    return Leader(1, world_size, SETTINGS, 0.0)


def _run_pass(leader: Leader, number: int, world_size: int, now: float) -> None:
    for rank in range(world_size):
        leader.hear(rank, m.PassDone(1, number, {"load": m.StageStats(1, 1.0)}))
    assert leader.orders(now) == [m.CommitPass(1, number)]
    assert leader.orders(now) == []
    for rank in range(world_size):
        leader.hear(rank, m.Settled(1, number))


def test_the_first_pass_waits_for_all_and_the_end_for_all_requests() -> None:
    leader = _leader(2)
    leader.hear(0, m.Waiting(1, 1))
    assert leader.orders(0.0) == []
    assert leader.waiting_for()[0] == "the workers of ranks [1] to connect"
    leader.hear(1, m.Waiting(1, 1))
    assert leader.orders(0.0) == [m.Begin(1, 1, (0, 1))]
    leader.hear(1, m.Returned(1))
    _run_pass(leader, 1, 2, 0.0)
    assert leader.orders(0.0) == []
    assert leader.waiting_for()[0] == "the requests of ranks [0] to return"
    leader.hear(0, m.Returned(1))
    (end,) = leader.orders(0.0)
    assert isinstance(end, m.End)
    assert len(end.stats) == 2


def test_nobody_waits_for_the_worker_of_a_rank_that_has_none() -> None:
    leader = _leader(3)
    leader.hear(0, m.Waiting(1, 1))
    leader.hear(2, m.Returned(1, absent=True))
    assert leader.orders(0.0) == []
    assert leader.waiting_for()[0] == "the workers of ranks [1] to connect"
    leader.hear(1, m.Waiting(1, 1))
    assert leader.orders(0.0) == [m.Begin(1, 1, (0, 1))]
    _run_pass(leader, 1, 3, 0.0)  # rank 2 relays
    for rank in (0, 1):
        leader.hear(rank, m.Returned(1))
    assert isinstance(leader.orders(0.0)[0], m.End)


def test_a_further_pass_begins_after_a_grace_or_when_all_ask() -> None:
    leader = _leader(2)
    for rank in range(2):
        leader.hear(rank, m.Waiting(1, 1))
    assert leader.orders(0.0)
    _run_pass(leader, 1, 2, 0.0)
    leader.hear(1, m.Waiting(1, 2))
    assert leader.orders(5.0) == []
    assert leader.wake == 6.0
    assert leader.orders(6.0) == [m.Begin(1, 2, (1,))]
    _run_pass(leader, 2, 2, 6.0)
    leader.hear(0, m.Waiting(1, 2))
    leader.hear(1, m.Waiting(1, 3))
    assert leader.orders(6.0) == [m.Begin(1, 3, (0, 1))]


def test_a_worker_that_does_not_come_is_named() -> None:
    leader = _leader(3)
    leader.hear(1, m.Waiting(1, 1))
    assert leader.orders(0.0) == []
    assert leader.wake == 10.0
    assert leader.trouble(9.9) is None
    overdue = leader.trouble(10.0)
    assert overdue is not None
    assert overdue[:2] == (0, "attach")
    assert "the workers of ranks [0, 2] to connect" in str(overdue[2])


def test_a_message_that_fits_no_state() -> None:
    with pytest.raises(ProtocolError, match="rank 1 sent PassDone while the leader was idle"):
        _leader(2).hear(1, m.PassDone(1, 1, {}))


@given(st.lists(st.lists(st.sets(st.integers(0, 2), min_size=1), max_size=3), min_size=1, max_size=1), st.randoms())
def test_any_interleaving_ends(further: list[list[set[int]]], random: object) -> None:
    """Three ranks ask for some further passes; messages of different ranks come in any order."""
    leader = _leader(3)
    asking: list[set[int]] = [{0, 1, 2}, *further[0]]
    now = 0.0
    for number, ranks in enumerate(asking, 1):
        for rank in sorted(ranks, key=lambda _: random.random()):  # type: ignore[attr-defined]
            leader.hear(rank, m.Waiting(1, number))
            now += 0.01
        orders = leader.orders(now)
        if not orders:
            now = leader.wake
            orders = leader.orders(now)
        assert orders == [m.Begin(1, number, tuple(sorted(ranks)))]
        _run_pass(leader, number, 3, now)
    for rank in range(3):
        assert leader.orders(now) == []
        leader.hear(rank, m.Returned(1))
    assert isinstance(leader.orders(now)[0], m.End)
    assert leader.orders(now) == []
