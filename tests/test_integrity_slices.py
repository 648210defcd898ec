"""Sums of slices: wherever they lie, and however they cut a tensor, they add up to its digest; and when that is known."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.memory.checksum import CHUNK_BYTES, digest, finish
from checkpoint_engine.memory.slices import slice_sum
from checkpoint_engine.planning.slices import MAX_ROWS, Rule, Slice, Taken, rules

many = settings(max_examples=60, deadline=None)


def content(nbytes: int, seed: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(random.Random(seed).randbytes(nbytes)), dtype=torch.uint8)


def laid_out(raw: torch.Tensor, part: Slice, shift: int, gap: int) -> tuple[torch.Tensor, int, tuple[int, ...]]:
    """The part's bytes somewhere else, runs `gap` bytes further apart than they need be: memory, offset, strides."""
    strides: list[int] = []
    step = part.run + gap
    for size in reversed(part.sizes):
        strides.insert(0, step)
        step *= size
    memory = torch.full((shift + step + 8,), 0xA5, dtype=torch.uint8)
    memory.as_strided((*part.sizes, part.run), (*strides, 1), shift).copy_(
        raw.as_strided((*part.sizes, part.run), (*part.strides, 1), part.first)
    )
    return memory, shift, tuple(strides)


def summed(raw: torch.Tensor, part: Slice, shift: int = 0, gap: int = 0) -> int:
    memory, offset, strides = laid_out(raw, part, shift, gap)
    return slice_sum(memory, offset, strides, part)


# --- sums ----------------------------------------------------------------------------------------------------------------

ROWS = st.one_of(st.integers(1, 12), st.sampled_from([64, 200]))
WIDTHS = st.one_of(st.integers(1, 40), st.sampled_from([256, 1000, 1024, 2048, 2052, 4096, 4100, 6144, 70_000]))


@many
@given(ROWS, st.lists(WIDTHS, min_size=1, max_size=4), st.integers(0, 9), st.sampled_from([0, 1, 2, 4, 8, 16]), st.integers())
def test_columns_of_a_matrix_add_up(rows: int, widths: list[int], shift: int, gap: int, seed: int) -> None:
    """As row-parallel layers are cut: each rank has some columns of every row. Any width, any alignment on both sides."""
    columns = sum(widths)
    rows = min(rows, max(1, (1 << 21) // columns))
    raw = content(rows * columns, seed)
    starts = [sum(widths[:n]) for n in range(len(widths))]
    parts = [Slice(start, width, (rows,), (columns,)) for start, width in zip(starts, widths, strict=True)]
    assert finish(sum(summed(raw, part, shift, gap) for part in parts), len(raw)) == digest(raw)


@st.composite
def nested(draw: st.DrawFn) -> tuple[int, list[Slice]]:
    """A tensor of random shape, cut along random dimensions again and again."""
    shape = [*draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)), draw(st.sampled_from([1, 2, 8, 24, 1024, 3000]))]
    boxes = [[(0, n) for n in shape]]
    for _ in range(draw(st.integers(0, 5))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        low, high = box[dim]
        cut = draw(st.integers(low, high))
        for part in ((low, cut), (cut, high)):
            if part[0] < part[1]:
                boxes.append([*box[:dim], part, *box[dim + 1 :]])
    strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * shape[d + 1]
    slices = [
        Slice(
            sum(low * s for (low, _), s in zip(box, strides, strict=True)),
            box[-1][1] - box[-1][0],
            tuple(high - low for low, high in box[:-1]),
            tuple(strides[:-1]),
        )
        for box in boxes
    ]
    return strides[0] * shape[0], slices


@many
@given(nested(), st.integers(0, 9), st.sampled_from([0, 1, 8]), st.integers())
def test_any_nesting_of_cuts_adds_up(cut: tuple[int, list[Slice]], shift: int, gap: int, seed: int) -> None:
    nbytes, slices = cut
    raw = content(nbytes, seed)
    assert finish(sum(summed(raw, part, shift, gap) for part in slices), nbytes) == digest(raw)
    found = rules([nbytes], [Taken(((part,),)) for part in slices])
    assert [sorted(rank for group in rule.covers[0] for rank in group) for rule in found] == [list(range(len(slices)))]


@many
@given(nested(), st.data())
def test_a_changed_byte_of_any_slice_is_found(cut: tuple[int, list[Slice]], data: st.DataObject) -> None:
    nbytes, slices = cut
    raw = content(nbytes, 1)
    wanted, total = digest(raw), sum(summed(raw, part) for part in slices)
    part = data.draw(st.sampled_from(slices))
    memory, offset, strides = laid_out(raw, part, 0, 0)
    memory[offset + data.draw(st.integers(0, part.nbytes - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert finish(total - summed(raw, part) + slice_sum(memory, offset, strides, part), nbytes) != wanted


def test_long_runs_and_many_rows_at_every_alignment() -> None:
    raw = content(3 << 20, 2)
    for first in (0, 1, 4095, 4096, 70_001):
        parts = [Slice(0, first)] * bool(first) + [Slice(first, len(raw) - first)]
        assert finish(sum(summed(raw, part, 3) for part in parts), len(raw)) == digest(raw)
    for columns in (8192, 5120, 3 * CHUNK_BYTES // 2):
        rows = len(raw) // columns
        half = columns // 2
        parts = [Slice(0, half, (rows,), (columns,)), Slice(half, columns - half, (rows,), (columns,))]
        rest = [Slice(rows * columns, len(raw) - rows * columns)] * (len(raw) > rows * columns)
        assert finish(sum(summed(raw, part) for part in parts + rest), len(raw)) == digest(raw)


def test_a_slice_that_leaves_its_memory() -> None:
    with pytest.raises(IndexError):
        slice_sum(torch.zeros(100, dtype=torch.uint8), 50, (8,), Slice(0, 8, (8,), (8,)))
    with pytest.raises(IndexError):
        slice_sum(torch.zeros(100, dtype=torch.uint8), -1, (), Slice(0, 8))


# --- which slices make up a tensor -----------------------------------------------------------------------------------------

LEFT, RIGHT = Slice(0, 4, (3,), (8,)), Slice(4, 4, (3,), (8,))
WHOLE, NARROW = Slice(0, 24), Slice(0, 2, (3,), (8,))


def of(*parts: tuple[Slice, ...] | None) -> list[Taken]:
    return [Taken((part,)) for part in parts]


def test_halves_replicas_and_wholes() -> None:
    assert rules([24], of((LEFT,), (RIGHT,))) == (Rule((((0,), (1,)),), (0,)),)
    assert rules([24], of((LEFT,), (RIGHT,), (LEFT,), (RIGHT,))) == (Rule((((0, 2), (1, 3)),), (0,)),)
    assert rules([24], of((WHOLE,), (WHOLE,))) == (Rule((((0, 1),),), (0,)),)
    assert rules([24], of((WHOLE,), (LEFT,), (RIGHT,))) == (Rule((((0,),), ((1,), (2,))), (0,)),), "replicas of two sizes"
    assert rules([24], of((WHOLE,), ())) == (Rule((((0,),),), (0,)),), "an expert of one rank"
    assert rules(
        [24],
        of(
            (RIGHT, LEFT),
        ),
    ) == (Rule((((0,),),), (0,)),)
    assert rules([24], of((LEFT, RIGHT), (RIGHT, LEFT))) == (Rule((((0, 1),),), (0,)),)


@pytest.mark.parametrize(
    "parts",
    [
        [(LEFT,), None],
        [(LEFT,), (LEFT,)],
        [(LEFT,), ()],
        [(), ()],
        [(LEFT,), (RIGHT,), (NARROW,)],
        [(LEFT,), (Slice(3, 5, (3,), (8,)),)],
        [(Slice(0, 23),)],
        [(LEFT, LEFT)],
        [(Slice(0, 8, (3,), (0,)),)],
        [(WHOLE, WHOLE)],
        [(Slice(0, 12), Slice(6, 12))],
    ],
)
def test_what_cannot_be_checked_by_slices(parts: list[tuple[Slice, ...] | None]) -> None:
    assert rules([24], of(*parts)) == ()


def test_alike_tensors_share_a_rule_and_too_many_rows_have_none() -> None:
    ranks = [Taken(((LEFT,), (WHOLE,), (LEFT,), None)), Taken(((RIGHT,), (WHOLE,), (RIGHT,), (LEFT,)))]
    assert rules([24] * 4, ranks) == (Rule((((0,), (1,)),), (0, 2)), Rule((((0, 1),),), (1,)))
    rows = MAX_ROWS + 1
    assert rules([2 * rows], of((Slice(0, 1, (rows,), (2,)),), (Slice(1, 1, (rows,), (2,)),))) == ()


def test_what_is_alike_is_kept_once() -> None:
    """Of a hundred thousand tensors on each of many ranks."""
    taken = Taken.decode(Taken(((LEFT,), (LEFT,), (RIGHT,), (LEFT,))).encode(), [24, 24, 24, 30])
    assert taken.parts[0] is taken.parts[1]
    assert taken.parts[0] == taken.parts[3] == (LEFT,) and taken.parts[2] == (RIGHT,)


def test_what_a_rank_tells_is_checked() -> None:
    taken = Taken(((LEFT, RIGHT), (), None))
    assert Taken.decode(taken.encode(), [24, 5, 9]) == taken
    assert taken.name != Taken(((LEFT,), (), None)).name
    for sizes in ([24, 5], [23, 5, 9]):
        with pytest.raises(ValueError, match="slices"):
            Taken.decode(taken.encode(), sizes)
    with pytest.raises(ValueError, match="slices"):
        Taken.decode(Taken(((WHOLE,), (WHOLE,))).encode(), [24, 23])
    wrong = (
        Slice(-1, 4),
        Slice(0, 0),
        Slice(0, 1, (2,), ()),
        Slice(0, 1, (0,), (1,)),
        Slice(0, 1, (1 << 60,), (1,)),
        Slice(0, 1, (2,), (-1,)),
    )
    for part in wrong:
        with pytest.raises(ValueError, match="slices"):
            Taken.decode(Taken(((part,),)).encode(), [24])
    for data in (b"", b"\xff", b"[]", b"\x91" * 2000):
        with pytest.raises(ValueError, match="slices"):
            Taken.decode(data, [24])
