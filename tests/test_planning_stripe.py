from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.errors import SettingsError
from checkpoint_engine.planning import layer_of, stripe, together

LEAVES = ("a.weight", "b.weight", "q_a_proj.weight", "norm.weight", "kv_a_proj_with_mqa.weight")
FILES = st.lists(st.tuples(st.integers(0, 6), st.sampled_from(LEAVES)), unique=True).flatmap(
    lambda keys: st.tuples(*[st.tuples(st.just(f"layers.{n}.{leaf}"), st.integers(0, 1000)) for n, leaf in keys])
)


@given(FILES, st.integers(1, 9))
def test_every_tensor_once_in_file_order_groups_whole(tensors: tuple[tuple[str, int], ...], world: int) -> None:
    striped = stripe(tensors, world)
    assert len(striped) == world
    place = {name: i for i, (name, _) in enumerate(tensors)}
    assert sorted(name for names in striped for name in names) == sorted(place)
    where: dict[str, int] = {}
    for rank, names in enumerate(striped):
        assert [place[n] for n in names] == sorted(place[n] for n in names)
        for name in names:
            group = together(name)
            assert group is None or where.setdefault(group, rank) == rank
    assert stripe(tensors, world) == striped


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 8), st.integers(1, 20), st.integers(50, 2000))
def test_even_overall_and_in_turn(shapes: list[int], world: int, layers: int, run_bytes: int) -> None:
    tensors = [(f"layers.{n}.t{i}.weight", size) for n in range(layers) for i, size in enumerate(shapes)]
    total, run = sum(shapes) * layers, max(run_bytes, *shapes)
    owner = {name: rank for rank, names in enumerate(stripe(tensors, world, run_bytes)) for name in names}
    has = [0] * world
    for name, nbytes in tensors:
        has[owner[name]] += nbytes
        # At no point of the model is one rank far ahead of another: all lift at once.
        assert max(has) - min(has) <= 2 * run
    assert sum(has) == total


def test_a_rank_with_the_embedding_gets_less_of_the_rest() -> None:
    tensors = [("embed", 200)] + [(f"layers.{n}.e.{i}.w", 1) for n in range(10) for i in range(100)]
    sizes = dict(tensors)
    striped = stripe(tensors, 4, run_bytes=5)
    totals = [sum(sizes[n] for n in names) for names in striped]
    assert max(totals) - min(totals) <= 10
    assert all(name in striped[0] for name in ("embed", "layers.0.e.0.w"))  # fewer, but from the first layer on


def test_a_rank_with_more_than_its_share_gets_no_more() -> None:
    tensors = [("embed", 1000), *((f"layers.{n}.w", 1) for n in range(30))]
    assert [len(names) for names in stripe(tensors, 4, run_bytes=1)] == [1, 10, 10, 10]


def test_a_large_layer_is_shared_evenly_by_all() -> None:
    tensors = [(f"layers.{n}.experts.{i}.w", 3) for n in range(4) for i in range(128)]
    for names in stripe(tensors, 4, run_bytes=12):
        assert [sum(layer_of(name) == f"layers.{n}" for name in names) for n in range(4)] == [32] * 4


def test_runs() -> None:
    tensors = [(f"layers.0.e.{i}.w", 1) for i in range(12)]
    names = [n for n, _ in tensors]
    assert stripe(tensors, 3) == [names[:4], names[4:8], names[8:]]
    assert stripe([], 2) == [[], []]
    with pytest.raises(SettingsError):
        stripe(tensors, 0)
    with pytest.raises(SettingsError):
        stripe(tensors, 2, run_bytes=0)
