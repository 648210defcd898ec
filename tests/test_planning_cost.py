"""Plans small enough to compute by hand. Rates are bytes per second; tensors are of 1024 bytes."""

from __future__ import annotations

import pytest

from checkpoint_engine.planning import Bucket, Item, Piece, Plan, Rates, predict

K = 1024


def plan(owners: list[int], ring: int) -> Plan:
    """Buckets of one tensor and one piece, in a ring of `ring` of them; bucket i comes from owner owners[i]."""
    buckets = [
        Bucket(i % ring * K, K, max(-1, i - ring), (Item(f"w{i}", "uint8", (K,), 0, K),), (Piece(owner, 0, K, ()),))
        for i, owner in enumerate(owners)
    ]
    return Plan(ring * K, K, K, "layers", tuple(buckets), tuple((i, 0) for i in range(len(owners))))


def test_stages_overlap() -> None:
    found = predict(plan([0, 0, 0, 0], 3), Rates(lift=K, share=K, load=K), 2)
    assert found.seconds == 4 + 2
    assert (found.lift, found.share, found.load) == (4, 4, 4)


def test_one_slot_does_not_overlap_share_and_load() -> None:
    assert predict(plan([0, 0, 0, 0], 1), Rates(lift=1e30, share=K, load=K), 2).seconds == pytest.approx(8)


def test_owners_lift_at_once() -> None:
    rates = Rates(lift=K, share=1e30, load=1e30)
    assert predict(plan([0, 1, 0, 1], 3), rates, 2).seconds == pytest.approx(2)
    # Rank 1 lifts two pieces ahead, then waits for its turn.
    behind = predict(plan([0, 0, 0, 0, 1, 1, 1, 1], 3), rates, 2)
    assert behind.seconds == pytest.approx(6)


def test_staging_bounds_how_far_a_lift_runs_ahead() -> None:
    rates = Rates(lift=K, share=K / 10, load=1e30)
    assert predict(plan([0, 0], 3), rates, 2, staging=1).seconds == pytest.approx(1 + 10 + 1 + 10)
    assert predict(plan([0, 0], 3), rates, 2, staging=2).seconds == pytest.approx(1 + 10 + 10)


def test_lifting_straight_into_the_ring_waits_for_the_ring() -> None:
    rates = Rates(lift=K, share=1e30, load=K)
    assert predict(plan([0, 0], 1), rates, 2, staging=0).seconds == pytest.approx(4)
    assert predict(plan([0, 0], 2), rates, 2, staging=0).seconds == pytest.approx(3)


def test_latencies() -> None:
    rates = Rates(
        lift=1e30, share=1e30, load=1e30,
        lift_latency=1, share_latency=2, hop_latency=3, load_latency=4, load_per_tensor=5,
    )  # fmt: skip
    assert predict(plan([0], 1), rates, 4).seconds == pytest.approx(1 + 2 + 9 + 4 + 5)
    assert predict(plan([0], 1), rates, 1).seconds == pytest.approx(1 + 4 + 5)  # alone there is nobody to share with


def test_owners_copy_side_by_side() -> None:
    """Each to the two others in turn; a latency delays what arrives, not the next copy."""
    rates = Rates(lift=1e30, share=K, load=1e30, share_latency=0.5, copies=True)
    found = predict(plan([0, 1, 2, 0], 4), rates, 3, staging=0)
    assert found.seconds == pytest.approx(2 + 2 + 0.5)
    assert found.share == pytest.approx(4)
    assert predict(plan([0, 0], 2), rates, 1, staging=0).seconds == pytest.approx(0)


def test_the_stream_decides_which_piece_is_next() -> None:
    """Bucket 1 is large, of two pieces by owner 0; bucket 0 of owner 1 comes between them."""
    large = Bucket(K, 2 * K, -1, (Item("e", "uint8", (2 * K,), 0, 2 * K),), tuple(Piece(0, at, K, ()) for at in (0, K)))
    small = plan([1], 1).buckets[0]
    rates = Rates(lift=K, share=1e30, load=K)
    between = Plan(3 * K, K, K, "layers", (small, large), ((1, 0), (0, 0), (1, 1)))
    assert predict(between, rates, 2).seconds == pytest.approx(2 + 2)
    assert predict(between, rates, 2, staging=0).seconds == pytest.approx(2 + 2)
    behind = Plan(3 * K, K, K, "layers", (large, small), ((0, 0), (0, 1), (1, 0)))
    assert predict(behind, rates, 2).seconds == pytest.approx(2 + 2 + 1)


def test_what_bounds_it() -> None:
    many = plan([0] * 20, 3)
    assert predict(many, Rates(lift=K, share=9 * K, load=9 * K), 2).bound_by == "lift"
    assert predict(many, Rates(lift=9 * K, share=K, load=9 * K), 2).bound_by == "share"
    assert predict(many, Rates(lift=9 * K, share=9 * K, load=K), 2).bound_by == "load"
    in_turn = plan([0] * 4 + [1] * 4 + [2] * 4 + [3] * 4, 3)
    assert predict(in_turn, Rates(lift=K, share=1e30, load=1e30), 4).bound_by == "order"
