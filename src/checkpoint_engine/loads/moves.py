"""From a plan and where a bucket's tensors lie to as few moves of bytes as possible. Pure."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from checkpoint_engine.loads.plan import LoadPlan

MAX_DIMS = 3
"""Sizes of a move that the kernel follows."""


MAX_TURNS = 4
Storages = Sequence[torch.Tensor] | Mapping[int, torch.Tensor]
"""Bytes of storages, by their numbers in a plan."""


class Source(NamedTuple):
    """Where a tensor of the checkpoint lies: `offset` bytes from the start of memory number `memory`."""

    name: str
    memory: int
    offset: int


class Move(NamedTuple):
    """`run` bytes at every index of `sizes`, from a memory to a storage; offsets and strides in bytes, as in plan.Copy."""

    memory: int
    source: int
    storage: int
    target: int
    run: int
    sizes: tuple[int, ...]
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.run * math.prod(self.sizes)

    @property
    def unit(self) -> int:
        """Largest of 16, 8, 4, 2, 1 that divides the run, all offsets and all strides: what can be moved at once, if memory and
        storage start at a multiple of it."""
        bits = self.source | self.target | self.run | 16
        for stride in (*self.source_strides, *self.target_strides):
            bits |= stride
        return bits & -bits


def moves(plan: LoadPlan, sources: Iterable[Source], max_dims: int | None = None) -> list[Move]:
    """What has to be moved for these tensors; all of them must be planned.

    Copies of equal shape whose ends are equally far apart on both sides become one (the experts of a layer). More than
    `max_dims` sizes: split up.
    """
    groups: dict[tuple[object, ...], list[Move]] = collections.defaultdict(list)
    for source in sources:
        for c in plan.by_name[source.name].copies:
            strides = c.source_strides, c.target_strides
            move = Move(source.memory, source.offset + c.source, c.storage, c.target, c.run, c.sizes, *strides)
            groups[source.memory, c.storage, c.run, c.sizes, *strides].append(move)
    found = [move for group in groups.values() for move in _fewest(group)]
    if max_dims is not None:
        found = [part for move in found for part in split(move, max_dims)]
    return found


def _fewest(group: list[Move]) -> list[Move]:
    """Neighbours may take turns (gate and up of every expert): then every second one, or third, is a row of its own."""
    group.sort(key=lambda move: move.target)
    best = group
    for turns in range(1, min(MAX_TURNS, len(group) // 2) + 1):
        merged = [move for turn in range(turns) for move in _merge(group[turn::turns])]
        if len(merged) < len(best):
            best = merged
        if len(best) <= turns:
            break
    return best


def _merge(group: list[Move]) -> Iterable[Move]:
    """Equal steps from one to the next, in both places, make one move."""
    first = 0
    while first < len(group):
        head, last = group[first], first + 1
        step = source_step = 0
        if last < len(group):
            step, source_step = group[last].target - head.target, group[last].source - head.source
        while (
            source_step > 0
            and last < len(group)
            and group[last].target - group[last - 1].target == step
            and group[last].source - group[last - 1].source == source_step
        ):
            last += 1
        yield _joined(head, last - first, source_step, step) if last - first > 1 else head
        first = last


def _joined(head: Move, count: int, source_step: int, step: int) -> Move:
    if not head.sizes and source_step == step == head.run:
        return head._replace(run=head.run * count)
    return head._replace(
        sizes=(count, *head.sizes),
        source_strides=(source_step, *head.source_strides),
        target_strides=(step, *head.target_strides),
    )


def split(move: Move, max_dims: int) -> Sequence[Move]:
    """The same bytes by moves of no more sizes than that."""
    if len(move.sizes) <= max_dims:
        return (move,)
    # The smallest dimension makes the fewest pieces.
    dim = min(range(len(move.sizes)), key=lambda d: move.sizes[d])
    rest = [(*t[:dim], *t[dim + 1 :]) for t in (move.sizes, move.source_strides, move.target_strides)]
    s, t = move.source_strides[dim], move.target_strides[dim]
    parts = (
        Move(move.memory, move.source + i * s, move.storage, move.target + i * t, move.run, *rest) for i in range(move.sizes[dim])
    )
    return [piece for part in parts for piece in split(part, max_dims)]
