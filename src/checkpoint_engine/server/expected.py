"""What the workers of an update must find in memory, and whose memory it was when they do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from checkpoint_engine.errors import IntegrityError
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.planning.digests import packed_digests, source_of
from checkpoint_engine.planning.plan import Plan


class Expected:
    """digests: of the plan's tensors, as workers get them; empty where the owners made none.

    sources: name of a tensor -> ranks of `manifest` whose memory its bytes come from; None: the owners that the plan names.
    """

    def __init__(self, plan: Plan, manifest: Manifest, sources: Callable[[str], tuple[int, ...]] | None = None) -> None:
        self._plan, self._manifest, self._sources = plan, manifest, sources

    @cached_property
    def digests(self) -> bytes:
        return packed_digests(self._plan.buckets, self._manifest)

    def mismatch(self, wrong: Sequence[str]) -> IntegrityError:
        """The error for tensors of these names, of which there is at least one."""
        ranks = self._sources(wrong[0]) if self._sources is not None else source_of(wrong[0], self._plan.buckets)
        return IntegrityError(wrong, ranks, [self._manifest.ranks[rank].host for rank in ranks])
