"""What a recorder has seen of a loader. Plain data, filled call by call, and made into a plan afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from checkpoint_engine.loads.plan import Copy, Place


@dataclasses.dataclass
class Source:
    """A tensor of the checkpoint. call: the number of the loader's call that got it. reason: why it is the loader's business
    every time; None as long as all that happened to it were exact copies."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    call: int
    reason: str | None = None
    copies: list[Copy] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Unexplained:
    """A write into the model that is no copy of known bytes. op: what wrote.

    place    where; its storage is one of the model's
    sources  tensors that had a part in it
    storages of the model that had one
    renewed  every byte of the place is written without regard to what was there
    """

    op: str
    place: Place
    sources: frozenset[int]
    storages: frozenset[int]
    call: int
    renewed: bool


@dataclasses.dataclass
class Observed:
    """sources are numbered in the order in which they came. coupled: sets of sources that one operation read together."""

    sources: list[Source] = dataclasses.field(default_factory=list)
    unexplained: list[Unexplained] = dataclasses.field(default_factory=list)
    coupled: set[frozenset[int]] = dataclasses.field(default_factory=set)

    def business(self, sources: Iterable[int], reason: str) -> None:
        """These are the loader's from now on; the first reason stays."""
        for number in sources:
            source = self.sources[number]
            source.reason = source.reason or reason
