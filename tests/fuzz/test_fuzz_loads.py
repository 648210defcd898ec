"""Load plans: not one, or one whose every copy stays inside its tensor and its storage."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.errors import LoadPlanError
from checkpoint_engine.loads.plan import Copy, LoadersTensor, LoadPlan, Place, PlannedTensor, Slot, Storage
from helpers.damage import INTEGERS, damaged, misshapen, nested
from helpers.fuzzing import fuzz

VALID = LoadPlan(
    "model",
    "checkpoint",
    (Storage(1000, ("a", "b")), Storage(64, ("c",)), Storage(40, ("l.w",), Slot("l", "w", "int8", (5, 8), (8, 1)))),
    (
        PlannedTensor("w", "float32", (4, 8), (Copy(0, 0, 0, 16, (4,), (32,), (16,)), Copy(16, 0, 500, 16, (4,), (32,), (16,)))),
        PlannedTensor("v", "uint8", (3, 3, 3), (Copy(1, 1, 8, 1, (3, 3), (9, 3), (6, 2)),)),
        PlannedTensor("w", "int8", (32,), (Copy(0, 2, 8, 32),)),
        PlannedTensor("unused", "int8", (5,), ()),
    ),
    (LoadersTensor("s", "it is converted", (Place(0, 900, 4, (5,), (20,)),)),),
)
TREE: Any = msgspec.to_builtins(VALID)
MOST = 4096


def starts(offset: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    indices = itertools.islice(itertools.product(*(range(n) for n in sizes)), MOST)
    return [offset + sum(i * s for i, s in zip(index, strides, strict=True)) for index in indices]


def test_what_is_nested_too_deeply() -> None:
    check(nested(VALID, 100_000))


def check(data: bytes) -> None:
    try:
        plan = LoadPlan.decode(data)
    except LoadPlanError as e:
        error = str(e)
    else:
        again = LoadPlan.decode(plan.encode())
        assert again == plan and len(plan.digest) == 32
        for tensor in plan.planned:
            for copy in tensor.copies:
                room = plan.storages[copy.storage].nbytes
                assert copy.run > 0
                assert all(0 <= s <= tensor.nbytes - copy.run for s in starts(copy.source, copy.sizes, copy.source_strides))
                assert all(0 <= t <= room - copy.run for t in starts(copy.target, copy.sizes, copy.target_strides))
        for left in plan.loader:
            for place in left.writes:
                room = plan.storages[place.storage].nbytes
                assert all(0 <= t <= room - place.run for t in starts(place.target, place.sizes, place.target_strides))
        return
    assert error.startswith("load plan: ")


@fuzz
@given(damaged(VALID.encode(), most=6))
def test_damaged_bytes(data: bytes) -> None:
    check(data)


@fuzz
@given(misshapen(TREE, most=4))
def test_another_structure(tree: Any) -> None:
    check(msgspec.msgpack.encode(tree))


NUMBERS = st.one_of(st.integers(-2, 70), INTEGERS.filter(lambda n: -(2**63) <= n < 2**63))
LISTS = st.lists(NUMBERS, max_size=3).map(tuple)
COPIES = st.builds(
    Copy,
    source=NUMBERS,
    storage=st.integers(-1, 3),
    target=NUMBERS,
    run=NUMBERS,
    sizes=LISTS,
    source_strides=LISTS,
    target_strides=LISTS,
)


@fuzz
@given(COPIES, LISTS, st.sampled_from(["float32", "int8", "nothing"]))
def test_well_formed_plans_of_hostile_contents(copy: Copy, shape: tuple[int, ...], dtype: str) -> None:
    check(LoadPlan("m", "c", VALID.storages, (PlannedTensor("t", dtype, shape, (copy,)),), ()).encode())
