"""Recent, against a list of all that was put."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.recent import Recent

steps = st.lists(st.tuples(st.sampled_from(["put", "of", "drop"]), st.integers(0, 5)), max_size=40)


@given(st.integers(1, 4), steps)
def test_the_last_ones_are_there(size: int, steps: list[tuple[str, int]]) -> None:
    recent: Recent[int, int] = Recent(size)
    right: list[tuple[int, int]] = []  # key and value, the oldest first
    for value, (step, key) in enumerate(steps):
        if step == "of" and any(key == k for k, _ in right):
            assert recent.of(key, lambda: pytest.fail("made again")) == dict(right)[key]
            continue
        right = [(k, v) for k, v in right if k != key]
        if step == "drop":
            recent.drop(key)
        else:
            right.append((key, value))
            assert (recent.put(key, value) if step == "put" else recent.of(key, lambda value=value: value)) == value
        right = right[-size:]
        assert list(zip(recent.keys(), recent.values(), strict=True)) == right
    for key in range(6):
        assert (key in recent) == (key in dict(right))
        assert recent.get(key, -1) == dict(right).get(key, -1)


def test_a_value_that_could_not_be_made_is_none() -> None:
    recent: Recent[str, int] = Recent(2)
    with pytest.raises(ZeroDivisionError):
        recent.of("a", lambda: 1 // 0)
    assert "a" not in recent and recent.of("a", lambda: 1) == 1


def test_a_smaller_size_holds_from_the_next_one_on() -> None:
    recent: Recent[int, int] = Recent(4)
    for key in range(4):
        recent.put(key, key)
    recent.size = 2
    recent.put(4, 4)
    assert recent.keys() == (3, 4)
