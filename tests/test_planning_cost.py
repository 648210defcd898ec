"""Plans small enough to compute by hand. Rates are bytes per second; tensors are of 1024 bytes."""

from __future__ import annotations

import pytest

from checkpoint_engine.manifest import Manifest, RankManifest, RegionMeta, TensorMeta
from checkpoint_engine.planning import Plan, Rates, plan_broadcast, predict

K = 1024


def plan(owners: list[int], ring: int) -> Plan:
    """One tensor, and one bucket, per layer; layer i on owner owners[i]."""
    world = max(owners) + 1
    tensors: list[list[TensorMeta]] = [[] for _ in range(world)]
    for layer, owner in enumerate(owners):
        tensors[owner].append(TensorMeta(f"layers.{layer}.w", "uint8", (K,), len(tensors[owner]) * K))
    ranks = tuple(RankManifest(r, "h", "cpu", (RegionMeta(len(t) * K, tuple(t)),)) for r, t in enumerate(tensors))
    same = Rates(lift=1e30, share=1.0, load=1e30)  # share alone costs: both orders are equal, so "layers"
    return plan_broadcast(Manifest("c", ranks), bucket_bytes=K, ring_bytes=ring * K, rates=same)


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


def test_what_bounds_it() -> None:
    many = plan([0] * 20, 3)
    assert predict(many, Rates(lift=K, share=9 * K, load=9 * K), 2).bound_by == "lift"
    assert predict(many, Rates(lift=9 * K, share=K, load=9 * K), 2).bound_by == "share"
    assert predict(many, Rates(lift=9 * K, share=9 * K, load=K), 2).bound_by == "load"
    in_turn = plan([0] * 4 + [1] * 4 + [2] * 4 + [3] * 4, 3)
    assert predict(in_turn, Rates(lift=K, share=1e30, load=1e30), 4).bound_by == "order"
