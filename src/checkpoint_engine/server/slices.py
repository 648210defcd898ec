"""Whether the slices that workers took are those of what was registered: rank 0 adds up what they tell, before the commit.

Who replays a load plan says what it takes of each tensor, once; from the next update on rank 0 knows which ranks' slices make up
a tensor (planning.slices), asks the workers for the sums of theirs, and compares with the digests that the owners made.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from checkpoint_engine.errors import CheckpointEngineError, IntegrityError, ProtocolError
from checkpoint_engine.manifest import hex_digest
from checkpoint_engine.memory.checksum import LENGTH_WEIGHT, finish, signed, unpacked
from checkpoint_engine.planning.bits import pack_bits
from checkpoint_engine.planning.plan import Plan
from checkpoint_engine.planning.slices import Rule, Taken, rules
from checkpoint_engine.recent import Recent
from checkpoint_engine.transport.messages import Slicing

KEPT_TAKEN = 8
"""Of what one rank's workers take; each is some 10 bytes a tensor where layers are alike."""
MAX_GUESSES = 64
_MASK = (1 << 64) - 1

Rules = tuple[Rule, ...]


class Checked(NamedTuple):
    """A rule. items: numbers of its tensors that have a digest; at: their places among the sums that are told; lengths: what the
    lengths add to the digests. int64."""

    rule: Rule
    items: torch.Tensor
    at: torch.Tensor
    lengths: torch.Tensor


class Asked(NamedTuple):
    """items: numbers of the tensors that the rules are about and that have a digest, in order, int64; bits: the same, packed."""

    rules: tuple[Checked, ...]
    items: torch.Tensor
    bits: bytes

    @classmethod
    def about(cls, rules: Rules, has: torch.Tensor, sizes: Sequence[int]) -> Asked:
        """has: of each tensor, whether it has a digest; sizes: bytes."""
        items = torch.tensor(sorted(itertools.chain.from_iterable(rule.items for rule in rules)), dtype=torch.int64)
        items = items[has[items]]
        lengths = torch.tensor(sizes, dtype=torch.int64) * signed(LENGTH_WEIGHT)
        checked = []
        for rule in rules:
            mine = torch.tensor(rule.items, dtype=torch.int64)
            mine = mine[has[mine]]
            checked.append(Checked(rule, mine, torch.searchsorted(items, mine), lengths[mine]))
        chosen = set(items.tolist())
        return cls(tuple(checked), items, pack_bits(n in chosen for n in range(len(has))) if chosen else b"")


NOTHING = Asked((), torch.zeros(0, dtype=torch.int64), b"")


class SliceBook:
    """What workers have said that they take, of the plans of one server's updates; and what follows from it."""

    def __init__(self) -> None:
        self._taken: Recent[tuple[str, str], Taken] = Recent(KEPT_TAKEN)  # by plan and name
        self._rules: Recent[tuple[str, tuple[str, ...]], Rules] = Recent(KEPT_TAKEN)
        self._asked_key: object = None
        self._asked, self._has = NOTHING, torch.zeros(0, dtype=torch.bool)

    def learn(self, plan: Plan, data: bytes, ranks: int) -> None:
        """Raises ValueError when `data` is not what a worker takes of this plan's tensors. ranks: how many tell theirs."""
        if (plan.digest, hex_digest(data)) in self._taken:
            return  # a replica takes the same
        taken = Taken.decode(data, plan.item_sizes)
        self._taken.size = KEPT_TAKEN * ranks
        self._taken.put((plan.digest, taken.name), taken)

    def known(self, plan: Plan, names: Sequence[str]) -> str | None:
        """The first of these names that is known."""
        return next((name for name in names if (plan.digest, name) in self._taken), None)

    def rules(self, plan: Plan, names: tuple[str, ...]) -> Rules:
        """Of those who take what has these names, all of them known and different."""
        return self._rules.of(
            (plan.digest, names), lambda: rules(plan.item_sizes, [self._taken[plan.digest, name] for name in names])
        )

    def asked(self, plan: Plan, names: tuple[str, ...], digests: torch.Tensor) -> Asked:
        """What those are asked for who take what has these names. digests: of the plan's tensors."""
        key, has = (plan.digest, names), digests != 0
        if self._asked_key != key or not torch.equal(self._has, has):
            self._asked = Asked.about(self.rules(plan, names), has, plan.item_sizes)
            self._asked_key, self._has = key, has
        return self._asked


class SliceCheck:
    """Of one update. For each pass `begin`, then `hear` what each rank tells of it, and its `verdict` when all have told.

    slicing: what the workers of the pass are asked for.
    """

    def __init__(
        self, book: SliceBook, plan: Plan, digests: bytes, mismatch: Callable[[Sequence[str], Sequence[int]], IntegrityError]
    ) -> None:
        """digests: as workers get them. mismatch: makes the error, of tensors' names and the ranks whose slices they may be."""
        self._book, self._plan, self._mismatch = book, plan, mismatch
        self._digests = unpacked(digests)
        self._names: dict[int, str] = {}  # of the ranks whose worker is in the pass
        self._sums: dict[int, torch.Tensor] = {}
        self._asked = NOTHING
        self._ranks = 1
        self.slicing = Slicing()

    def begin(self, names: Mapping[int, Sequence[str]], ranks: int) -> Slicing:
        """A pass begins. names: of what the workers say that they take, by rank; ranks: of the world."""
        self._sums.clear()
        self._ranks = ranks
        found = {rank: self._book.known(self._plan, each) for rank, each in names.items()}
        self._names = {rank: name for rank, name in found.items() if name is not None}
        self._asked = NOTHING
        tell = len(self._digests) > 0 and len(self._names) < len(names)
        if len(self._digests) and not tell:
            self._asked = self._book.asked(self._plan, self._different, self._digests)
        named = self._names and (self._asked.bits or tell)
        known = tuple(self._names.get(rank, "") for rank in range(ranks)) if named else ()
        self.slicing = Slicing(known, self._asked.bits, tell)
        return self.slicing

    @property
    def _different(self) -> tuple[str, ...]:
        return tuple(sorted(set(self._names.values())))

    def hear(self, rank: int, sums: bytes, taken: bytes) -> None:
        """Of a stream; a later one of the pass counts. Raises ProtocolError for what was not asked for."""
        if taken:
            try:
                self._book.learn(self._plan, taken, self._ranks)
            except ValueError as e:
                raise ProtocolError(f"the worker of rank {rank} did not tell what it takes of this plan's tensors: {e}") from e
        if not sums:
            return
        asked = len(self._asked.items) if rank in self._names else 0
        if len(sums) != 8 * asked:
            raise ProtocolError(f"rank {rank} told {len(sums)} bytes of sums of slices, asked for {asked} sums")
        self._sums[rank] = unpacked(sums)

    def verdict(self) -> tuple[int, CheckpointEngineError] | None:
        """What is wrong, and on which rank; None: nothing that was asked for is."""
        if not self._asked.bits:
            return None
        if missing := sorted(self._names.keys() - self._sums.keys()):
            return missing[0], ProtocolError(f"the worker of rank {missing[0]} did not tell the sums of its slices")
        wrong = torch.zeros(len(self._digests), dtype=torch.bool)
        first: tuple[int, list[list[int]]] | None = None
        for checked in self._asked.rules:
            for cover in self._covers(checked.rule):
                bad = checked.items[self._differ(checked, cover)]
                wrong[bad] = True
                if len(bad) and (first is None or int(bad[0]) < first[0]):
                    first = int(bad[0]), cover
        if first is None:
            return None
        takers = self._blame(*first)
        return takers[0], self._mismatch(self._named(first[0], wrong), takers)

    def _covers(self, rule: Rule) -> list[list[list[int]]]:
        """Of ranks instead of the numbers of what they take."""
        ranks = [[rank for rank, name in sorted(self._names.items()) if name == each] for each in self._different]
        return [[[rank for number in group for rank in ranks[number]] for group in cover] for cover in rule.covers]

    def _differ(self, checked: Checked, cover: list[list[int]]) -> torch.Tensor:
        """For each of its tensors, whether its slices do not make up what was registered."""
        total = checked.lengths.clone()
        differ = torch.zeros(len(total), dtype=torch.bool)
        for group in cover:
            one = self._sums[group[0]][checked.at]
            total += one
            for rank in group[1:]:
                differ |= self._sums[rank][checked.at] != one
        total[total == 0] = 1  # as checksum.finish
        return differ | (total != self._digests[checked.items])

    def _blame(self, item: int, cover: list[list[int]]) -> list[int]:
        """The ranks whose sums are not those by which the others' make up the tensor; all, where that tells nothing."""
        at, nbytes = int(torch.searchsorted(self._asked.items, item)), self._plan.item_sizes[item]
        told = {rank: int(self._sums[rank][at]) for group in cover for rank in group}
        choices = [list(dict.fromkeys(told[rank] for rank in group)) for group in cover]
        for guess in itertools.islice(itertools.product(*choices), MAX_GUESSES):
            if finish(sum(guess), nbytes) == int(self._digests[item]) & _MASK:
                return [rank for group, right in zip(cover, guess, strict=True) for rank in group if told[rank] != right]
        return sorted(told)

    def _named(self, first: int, wrong: torch.Tensor) -> list[str]:
        names = self._plan.item_names
        return [names[first], *(names[item] for item in wrong.nonzero().flatten().tolist() if item != first)]
