"""Slices of tensors that ranks take, and where the ranks' slices of one tensor are known to make up all of it. Pure.

Sums of slices add up to the sum of the whole (memory.slices). So workers that take only parts check only those, if together they
took each byte once: `rules` finds for which tensors that is so.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import msgspec

from checkpoint_engine.errors import NOT_DECODED
from checkpoint_engine.manifest import hex_digest

MAX_SLICES = 256
"""Of one tensor, in one rank."""
MAX_ROWS = 1 << 20
"""Runs that are compared, which takes a second or two; tensors that come after so many are checked whole."""
MAX_DIMS = 16


class Slice(msgspec.Struct, frozen=True, array_like=True, order=True):
    """`run` adjacent bytes of a tensor, once for every index of `sizes`, from byte `first` on and `strides` bytes apart."""

    first: int
    run: int
    sizes: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.run * math.prod(self.sizes)

    @property
    def rows(self) -> int:
        return math.prod(self.sizes)

    @property
    def end(self) -> int:
        return self.first + self.run + sum((n - 1) * s for n, s in zip(self.sizes, self.strides, strict=True))

    def starts(self) -> Iterable[int]:
        """The first byte of each run."""
        steps = (range(0, n * s, s) if s else itertools.repeat(0, n) for n, s in zip(self.sizes, self.strides, strict=True))
        return (self.first + sum(index) for index in itertools.product(*steps))

    def inside(self, nbytes: int) -> bool:
        """Whether it is a slice at all, and of a tensor of so many bytes."""
        if len(self.sizes) != len(self.strides) or len(self.sizes) > MAX_DIMS:
            return False
        return min((self.first, *self.strides)) >= 0 and min((self.run, *self.sizes)) >= 1 and self.end <= nbytes


Part = tuple[Slice, ...]
"""What one rank takes of one tensor; nothing: ()."""


class Taken(msgspec.Struct, frozen=True, array_like=True):
    """What one rank takes of each tensor of a checkpoint, in the order of its buckets; None: that is not known, or all of it is
    checked in any case."""

    parts: tuple[Part | None, ...]

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @property
    def name(self) -> str:
        """Another one where anything is different."""
        return hex_digest(self.encode())

    @classmethod
    def decode(cls, data: bytes, sizes: Sequence[int]) -> Self:
        """sizes: bytes of the tensors that it must be about. Raises ValueError when `data` is something else."""
        try:
            taken = msgspec.msgpack.decode(data, type=cls)
        except NOT_DECODED as e:
            raise ValueError(f"no description of slices: {e}") from e
        if len(taken.parts) != len(sizes):
            raise ValueError(f"slices of {len(taken.parts)} tensors, and there are {len(sizes)}")
        alike: dict[tuple[Part | None, int], Part | None] = {}  # layers are: one of each is looked at, and kept
        for part, nbytes in zip(taken.parts, sizes, strict=True):
            if (part, nbytes) in alike:
                continue
            if part is not None and (len(part) > MAX_SLICES or not all(each.inside(nbytes) for each in part)):
                raise ValueError(f"slices that are not those of a tensor of {nbytes} bytes")
            alike[part, nbytes] = part
        return cls(tuple(alike[key] for key in zip(taken.parts, sizes, strict=True)))


class Rule(NamedTuple):
    """How to check tensors, numbers `items`: what the ranks of a class took is the same, and the classes of a cover took every
    byte of it once. covers: of classes, of ranks (numbers of what `rules` was asked about)."""

    covers: tuple[tuple[tuple[int, ...], ...], ...]
    items: tuple[int, ...]


def rules(sizes: Sequence[int], taken: Sequence[Taken]) -> tuple[Rule, ...]:
    """For which tensors, of `sizes` bytes, the slices of these ranks can be checked by their sums, and how.

    In no rule: what some rank does not tell, or none takes; slices that overlap, unless they are the same; tensors of which
    nobody takes some byte; and those that are cut in too many runs (MAX_ROWS).
    """
    left = MAX_ROWS
    known: dict[tuple[object, ...], tuple[tuple[tuple[int, ...], ...], ...]] = {}
    found: dict[tuple[tuple[tuple[int, ...], ...], ...], list[int]] = collections.defaultdict(list)
    for item, nbytes in enumerate(sizes):
        parts = tuple(each.parts[item] for each in taken)
        told = [part for part in parts if part is not None]
        if len(told) < len(parts) or not any(told):
            continue
        key = (nbytes, parts)  # layers, and experts, are alike
        if key not in known:
            left -= sum(each.rows for part in told for each in part)
            known[key] = _covers(nbytes, told) if left >= 0 else ()
        if known[key]:
            found[known[key]].append(item)
    return tuple(Rule(covers, tuple(items)) for covers, items in found.items())


def _covers(nbytes: int, parts: Sequence[Part]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Of which every rank that takes anything is in one; none where there are no such."""
    classes: dict[Part, list[int]] = collections.defaultdict(list)
    for number, part in enumerate(parts):
        if part:
            classes[tuple(sorted(part))].append(number)
    whole = [part for part in classes if _makes_up(nbytes, part)]
    rest = [part for part in classes if part not in whole]
    if rest and not _makes_up(nbytes, [each for part in rest for each in part]):
        return ()
    covers = [[part] for part in whole] + ([rest] if rest else [])
    return tuple(tuple(tuple(classes[part]) for part in cover) for cover in covers)


def _makes_up(nbytes: int, slices: Sequence[Slice]) -> bool:
    """Whether each of `nbytes` bytes is in one of these slices, which are inside of them, and only once."""
    if sum(each.nbytes for each in slices) != nbytes:
        return False
    runs = sorted((start, start + each.run) for each in slices for start in each.starts())
    return all(end <= start for (_, end), (start, _) in itertools.pairwise(runs))
