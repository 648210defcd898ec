"""Which method an update takes: the same on all ranks, because it follows from what all of them offered."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.errors import AgreementError
from checkpoint_engine.planning.cost import H200_PULL, PullRates, predict_pull
from checkpoint_engine.server.offer import Offer
from checkpoint_engine.server.pull import Method, choose_method, regions_digest
from checkpoint_engine.transport.descriptors import SharedDescriptor

GB = 10**9


def _offers(count: int, **changes: object) -> list[Offer]:
    made = []
    for rank in range(count):
        regions = (SharedDescriptor(100 + rank, 5, 1000 + rank, 60 * GB // count),)
        offer = Offer("c", "plan", "v", f"GPU-{rank}", "ipc://s", 0, "host", "here", True, regions)
        made.append(msgspec.structs.replace(offer, **changes))
    return made


def _ready(offers: list[Offer]) -> list[Offer]:
    return [msgspec.structs.replace(offer, ahead=regions_digest(offers)) for offer in offers]


def _choose(offers: list[Offer], seconds: float = 1.0, last: str | None = None) -> Method:
    """last: None: the same regions as now."""
    return choose_method(offers, lambda: seconds, regions_digest(offers) if last is None else last)


def test_pull_is_a_ranks_own_bytes_or_all_of_the_hosts() -> None:
    rates = PullRates(gather=10, memory=30, latency=1)
    assert predict_pull([20, 20], rates) == 1 + 2  # each over its own link
    assert predict_pull([20] * 8, rates) == pytest.approx(1 + 160 / 30)


def test_first_the_plans_then_the_regions_then_pull() -> None:
    assert _choose(_offers(2)) == Method(pull=False)
    assert _choose(_offers(2, reads=30 * GB)) == Method(pull=False, ahead=True)
    assert _choose(_ready(_offers(2, reads=30 * GB))) == Method(pull=True)


def test_nothing_is_prepared_for_regions_that_were_not_there_before() -> None:
    assert _choose(_offers(2, reads=30 * GB), last="") == Method(pull=False)
    assert _choose(_offers(2, reads=30 * GB), last=regions_digest(_offers(3))) == Method(pull=False)
    assert _choose(_ready(_offers(2, reads=30 * GB)), last="") == Method(pull=True)  # all that matters is that they are ready


def test_registering_has_to_pay_back() -> None:
    """Two workers of 60 GB: 9.6 s, of 100 updates 0.1 each, for one of 0.57 s by pulling."""
    assert _choose(_offers(2, reads=30 * GB), 0.65) == Method(pull=False)
    assert _choose(_offers(2, reads=30 * GB), 0.68) == Method(pull=False, ahead=True)
    assert _choose(_ready(_offers(2, reads=30 * GB)), 0.65) == Method(pull=True)


def test_replicas_that_all_read_everything_broadcast() -> None:
    """60 GB in eight GPUs: 0.6 s by broadcast, whatever they read by then."""
    assert _choose(_ready(_offers(8, reads=60 * GB)), 0.6) == Method(pull=False)
    assert _choose(_ready(_offers(8, reads=60 * GB // 8)), 0.6) == Method(pull=True)


def test_one_rank_is_enough() -> None:
    """Without a plan, with other regions, or elsewhere."""
    offers = _ready(_offers(2, reads=30 * GB))
    assert _choose([offers[0], msgspec.structs.replace(offers[1], reads=-1)]) == Method(pull=False)
    assert _choose([offers[0], msgspec.structs.replace(offers[1], ahead="other")]) == Method(pull=False, ahead=True)
    assert _choose([offers[0], msgspec.structs.replace(offers[1], where="there")]) == Method(pull=False)
    assert _choose([offers[0], msgspec.structs.replace(offers[1], method="broadcast")]) == Method(pull=False)
    assert _choose([offers[0], msgspec.structs.replace(offers[1], method="pull", ahead="")]) == Method(pull=True)


def test_cpus_need_no_preparation() -> None:
    assert _choose(_offers(2, maps=True)) == Method(pull=True)
    assert _choose(_offers(2, maps=True, method="broadcast")) == Method(pull=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"where": "there"}, r"rank 1 \(host\) is on another host"), ({"regions": None}, r"rank 1 \(host\) has memory that cannot")],
)
def test_a_pull_that_is_impossible_names_the_rank(changes: dict[str, object], words: str) -> None:
    first, second = _offers(2, method="pull")
    with pytest.raises(AgreementError, match=words):
        _choose([first, msgspec.structs.replace(second, **changes)])


def test_ranks_that_want_different_things() -> None:
    first, second = _offers(2, method="pull")
    with pytest.raises(AgreementError, match="others to broadcast"):
        _choose([first, msgspec.structs.replace(second, method="broadcast")])


@given(st.lists(st.integers(0, 60 * GB), min_size=1, max_size=8), st.floats(0.001, 10))
def test_pull_only_where_it_is_faster(reads: list[int], seconds: float) -> None:
    offers = _offers(len(reads))
    offers = _ready([msgspec.structs.replace(offer, reads=n) for offer, n in zip(offers, reads, strict=True)])
    assert _choose(offers, seconds).pull == (predict_pull(reads, H200_PULL) < seconds)
