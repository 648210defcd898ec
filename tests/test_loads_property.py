"""Any nesting of operations that only move bytes replays exactly; so do copies through the loader's own tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from checkpoint_engine.loads.geometry import Bytes, overlapping, simplify
from checkpoint_engine.loads.plan import LoadPlan
from checkpoint_engine.manifest import ITEMSIZE
from helpers.loads import Memory, Weights, raw_bytes, record, replay

DTYPES = [getattr(torch, name) for name in ITEMSIZE if hasattr(torch, name)]
Step = Callable[[torch.Tensor], torch.Tensor]


@st.composite
def steps(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Step]:
    """Operations that fit one another, for a tensor of `shape`."""
    found: list[Step] = []
    shaped = torch.empty(shape)
    for _ in range(draw(st.integers(0, 6))):
        step = draw(one_step(shaped))
        shaped = step(shaped)
        found.append(step)
    return found


def one_step(t: torch.Tensor) -> st.SearchStrategy[Step]:
    choices: list[st.SearchStrategy[Step]] = [
        st.just(lambda x: x.contiguous()),
        st.just(lambda x: x.clone()),
        st.just(lambda x: x.flatten()),
        st.just(lambda x: x.reshape(-1)),
        st.integers(0, t.dim()).map(lambda d: lambda x: x.unsqueeze(d)),
        st.just(lambda x: x.squeeze()),
        st.permutations(range(t.dim())).map(lambda order: lambda x: x.permute(order)),
        st.just(lambda x: x.expand(2, *x.shape) if x.numel() < 200 else x),
        st.just(lambda x: torch.cat([x.reshape(-1), x.reshape(-1)]) if x.numel() < 200 else x),
        st.just(lambda x: torch.stack([x, x], -1) if x.numel() < 200 else x),
        st.sampled_from(factors(t.numel())).map(lambda n: lambda x: x.reshape(n, x.numel() // n)),
    ]
    if t.dim():
        dims = st.integers(0, t.dim() - 1)
        choices += [
            st.tuples(dims, dims).map(lambda two: lambda x: x.transpose(*two)),
            dims.flatmap(lambda d: narrowed(d, t.shape[d])),
            st.tuples(dims, st.integers(1, 3)).map(lambda two: lambda x: x.chunk(two[1], two[0])[0]),
            st.tuples(dims, st.integers(1, 3)).map(lambda two: lambda x: x.split(two[1], two[0])[-1]),
            dims.map(lambda d: lambda x: x[(slice(None),) * d + (slice(None, None, 2),)]),
        ]
        if all(t.shape):
            choices.append(st.tuples(dims, st.just(0)).map(lambda two: lambda x: x.select(*two)))
            choices.append(dims.map(lambda d: lambda x: x.unbind(d)[-1]))
    return st.one_of(choices)


def narrowed(dim: int, n: int) -> st.SearchStrategy[Step]:
    return st.integers(0, n).flatmap(lambda low: st.integers(0, n - low).map(lambda length: lambda x: x.narrow(dim, low, length)))


def factors(n: int) -> list[int]:
    return [f for f in range(1, n + 1) if n % f == 0] or [1]


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random bits; NaNs and all."""
    generator = torch.Generator().manual_seed(seed)
    top = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, top, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@st.composite
def loads(draw: st.DrawFn) -> tuple[tuple[int, ...], torch.dtype, list[Step]]:
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    return shape, draw(st.sampled_from(DTYPES)), draw(steps(shape))


@settings(deadline=None, max_examples=300)
@given(loads())
@example(((2, 3), torch.float64, [lambda x: x.t(), lambda x: x.reshape(2, 3)]))  # rows that go back
def test_any_nesting_of_moves_replays_exactly(load: tuple[tuple[int, ...], torch.dtype, list[Step]]) -> None:
    shape, dtype, found = load

    def walk(tensor: torch.Tensor) -> torch.Tensor:
        for step in found:
            tensor = step(tensor)
        return tensor

    walked = walk(torch.empty(shape, dtype=dtype))
    # The target is itself a view: a transposed one in a larger buffer.
    whole = torch.zeros((*reversed(walked.shape), 3), dtype=dtype)
    model = {"m.weight": whole}

    def run(weights: Weights) -> None:
        for _, tensor in weights:
            whole[..., 1].permute(tuple(reversed(range(walked.dim())))).copy_(walk(tensor))

    first, second = ([("w", values(shape, dtype, seed))] for seed in (1, 2))
    plan = record(run, [Memory(first).weights], model)
    assert [tensor.name for tensor in plan.planned] == ["w"], plan.loader
    assert LoadPlan.decode(plan.encode()) == plan
    run(second)
    expected = raw_bytes(whole).clone()
    run(first)
    replay(plan, forbidden, [second], model)
    assert torch.equal(raw_bytes(whole), expected)


def forbidden(weights: Weights) -> None:
    pytest.fail(f"the loader was called for {[name for name, _ in weights]}")


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 4), st.integers(1, 4), st.integers(0, 9)), max_size=6))
def test_overlaps_are_those_of_the_bytes(places: list[tuple[int, int, int, int]]) -> None:
    mine = [Bytes(i, offset, run, (n,), (run + gap,)) for i, (offset, run, n, gap) in enumerate(places)]
    covered = [{start + i for start in p.starts().tolist() for i in range(p.run)} for p in mine]
    clashing = {pair for pair in itertools.combinations(range(len(mine)), 2) if covered[pair[0]] & covered[pair[1]]}
    found = overlapping(mine)
    assert found <= clashing
    assert {owner for pair in found for owner in pair} == {owner for pair in clashing for owner in pair}


@settings(deadline=None)
@given(st.permutations(range(3)), st.tuples(*[st.integers(1, 4)] * 3), st.permutations(range(3)))
def test_simplified_copies_move_the_same_bytes(a: list[int], sizes: tuple[int, ...], b: list[int]) -> None:
    def strides(order: list[int]) -> list[int]:
        result, step = [0] * 3, 2
        for dim in order:
            result[dim], step = step, step * sizes[dim]
        return result

    def pairs(sizes: tuple[int, ...], a: list[int], b: list[int], run: int) -> set[tuple[int, int]]:
        return {
            (sum(i * s for i, s in zip(index, a, strict=True)) + k, sum(i * s for i, s in zip(index, b, strict=True)) + k)
            for index in itertools.product(*map(range, sizes))
            for k in range(run)
        }

    shape = simplify(tuple(sizes), tuple(strides(a)), tuple(strides(b)), 2)
    assert pairs(shape.sizes, list(shape.a), list(shape.b), shape.run) == pairs(sizes, strides(a), strides(b), 2)
    assert list(shape.b) == sorted(shape.b, reverse=True)
