"""Several worlds that hold the same checkpoint, as one manifest: what one failed to deliver the others do."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

from checkpoint_engine.errors import ManifestError, SettingsError
from checkpoint_engine.manifest import RankManifest, TensorMeta
from checkpoint_engine.planning.holders import all_holders
from checkpoint_engine.server.sources import Metas


def with_holders(metas: Metas, others: Iterable[Metas]) -> Metas:
    """`metas`, and behind its ranks those of `others`, numbered anew, in messages too. What others may be: `check_holder`."""
    ranks, offers = list(metas.ranks), list(metas.offers)
    for other in others:
        for rank, offer in zip(other.ranks, other.offers, strict=True):
            if offer is not None:
                offers.append(msgspec.structs.replace(offer, name=f"rank {len(ranks)} ({rank.host})"))
                ranks.append(RankManifest(len(ranks), rank.host, rank.device, rank.regions))
    return Metas(metas.checkpoint, tuple(ranks), tuple(offers))


def without(metas: Metas, ranks: Collection[int]) -> Metas:
    """The same, but these ranks are not read: what one of them delivered was not what it should be, say.

    Raises SettingsError for a rank that is not there.
    """
    if unknown := sorted(set(ranks) - set(range(metas.world_size))):
        raise SettingsError(f"the metas of {metas.checkpoint!r} have ranks 0 to {metas.world_size - 1}, not {unknown}")
    offers = tuple(None if rank in ranks else offer for rank, offer in enumerate(metas.offers))
    return Metas(metas.checkpoint, metas.ranks, offers)


def check_holder(metas: Metas, other: Metas) -> None:
    """That all which `other` holds are tensors of `metas`, with the same bytes by their digests: then a reader can take them from
    either. Raises ManifestError naming a tensor for which that is not known."""
    other.check()
    if other.checkpoint != metas.checkpoint:
        raise ManifestError(f"it holds {other.checkpoint!r}, not {metas.checkpoint!r}")
    known = {tensor.name: tensor for rank in metas.ranks for region in rank.regions for tensor in region.tensors}
    for name, held in all_holders(other).items():
        for theirs in held:
            if not _same(known.get(name), theirs.tensor):
                raise ManifestError(f"its tensor {name!r} is not the one of {metas.version!r}, or has no digest")


def _same(mine: TensorMeta | None, theirs: TensorMeta) -> bool:
    same_kind = mine is not None and (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
    return mine is not None and same_kind and mine.digest == theirs.digest != 0
