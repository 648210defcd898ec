"""What the workers of an update must find in memory, and whose memory it was when they do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import msgspec

from checkpoint_engine.errors import IntegrityError
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.planning.digests import packed_digests, source_of
from checkpoint_engine.planning.plan import Plan
from checkpoint_engine.server.slices import SliceBook, SliceCheck
from checkpoint_engine.transport.messages import Attach, Slicing


class Expected:
    """digests: of the plan's tensors, as workers get them; empty where the owners made none.

    sources: name of a tensor -> ranks of `manifest` whose memory its bytes come from; None: the owners that the plan names.
    book: what workers are known to take; None: whole tensors are checked.
    slicing: what this rank's worker is asked for in the pass that runs.
    """

    def __init__(
        self,
        plan: Plan,
        manifest: Manifest,
        sources: Callable[[str], tuple[int, ...]] | None = None,
        book: SliceBook | None = None,
    ) -> None:
        self._plan, self._manifest, self._sources = plan, manifest, sources
        self._book, self.slicing = book, Slicing()

    @cached_property
    def digests(self) -> bytes:
        return packed_digests(self._plan, self._manifest)

    def slices(self) -> SliceCheck | None:
        """The check of what workers take, of one update, for the rank that leads it."""
        return None if self._book is None else SliceCheck(self._book, self._plan, self.digests, self.mismatch)

    def ask(self, slicing: Slicing, rank: int) -> None:
        """What this rank's worker is asked for in the pass that begins."""
        names = slicing.names[rank : rank + 1]
        known = any(names)
        self.slicing = Slicing(names, slicing.items if known else b"", slicing.tell and not known)

    def put_into(self, attach: Attach) -> Attach:
        return msgspec.structs.replace(attach, digests=self.digests, slicing=self.slicing)

    def mismatch(self, wrong: Sequence[str], takers: Sequence[int] = ()) -> IntegrityError:
        """The error for tensors of these names, of which there is at least one. takers: see IntegrityError."""
        ranks = self._sources(wrong[0]) if self._sources is not None else source_of(wrong[0], self._plan.buckets)
        return IntegrityError(wrong, ranks, [self._manifest.ranks[rank].host for rank in ranks], takers)
