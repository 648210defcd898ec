"""Which rank brings in which tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from checkpoint_engine.errors import ManifestError
from checkpoint_engine.manifest import ITEMSIZE, Manifest, RegionMeta, TensorMeta
from checkpoint_engine.planning.order import layer_key, together


class Held(NamedTuple):
    """A tensor where rank `owner` holds it: at byte `source` of its region number `region`."""

    owner: int
    region: int
    source: int
    nbytes: int
    tensor: TensorMeta


def choose_holders(manifest: Manifest) -> list[list[Held]]:
    """Every tensor of the checkpoint once, in units that must be in one bucket, in the order in which they travel.

    Of several ranks that hold the same tensor the one that brings in least so far is chosen, the lowest of equals; a unit
    comes from one rank if any holds all of it. Raises ManifestError naming tensor and ranks when two hold different
    tensors under one name, and when a tensor cannot be where the manifest says it is.
    """
    holders = all_holders(manifest)
    units: dict[str, list[str]] = {}
    for name in sorted(holders, key=layer_key):
        units.setdefault(together(name) or f"\0{name}", []).append(name)

    lifts = {rank.rank: 0 for rank in manifest.ranks}
    # What only one rank holds is settled; the rest evens it out.
    for held in holders.values():
        if len(held) == 1:
            lifts[held[0].owner] += held[0].nbytes
    return [_choose([holders[name] for name in names], lifts) for names in units.values()]


def _choose(tensors: list[list[Held]], lifts: dict[int, int]) -> list[Held]:
    """One holder for each tensor of a unit; adds to `lifts` what was not settled before."""
    if all(len(held) == 1 for held in tensors):
        return [held[0] for held in tensors]
    common = set.intersection(*({h.owner for h in held} for held in tensors))
    chosen = []
    for held in tensors:
        candidates: Iterable[Held] = (h for h in held if h.owner in common) if common else held
        best = min(candidates, key=lambda h: (lifts[h.owner], h.owner))
        if len(tensors) > 1 and common:
            common = {best.owner}
        if len(held) > 1:
            lifts[best.owner] += best.nbytes
        chosen.append(best)
    return chosen


def all_holders(manifest: Manifest) -> dict[str, list[Held]]:
    """Tensor name -> everywhere it is held, in rank order."""
    holders: dict[str, list[Held]] = {}
    for rank in sorted(manifest.ranks, key=lambda r: r.rank):
        for index, region in enumerate(rank.regions):
            for tensor in region.tensors:
                held = Held(rank.rank, index, tensor.offset, _checked_nbytes(rank.rank, region, tensor), tensor)
                others = holders.setdefault(tensor.name, [])
                if others:
                    _compare(others, held)
                others.append(held)
    return holders


def _checked_nbytes(rank: int, region: RegionMeta, tensor: TensorMeta) -> int:
    if tensor.dtype not in ITEMSIZE:
        raise ManifestError(f"tensor {tensor.name!r} on rank {rank} has an unknown dtype, {tensor.dtype!r}")
    nbytes = tensor.nbytes
    if (tensor.shape and min(tensor.shape) < 0) or tensor.offset < 0 or tensor.offset + nbytes > region.nbytes:
        raise ManifestError(
            f"tensor {tensor.name!r} on rank {rank}, shape {list(tensor.shape)} at byte {tensor.offset}, "
            f"is not inside its region of {region.nbytes} bytes"
        )
    return nbytes


def _compare(others: list[Held], held: Held) -> None:
    first, mine = others[0], held.tensor
    for what in ("dtype", "shape"):
        if getattr(first.tensor, what) != getattr(mine, what):
            raise ManifestError(
                f"tensor {mine.name!r} differs between rank {first.owner} ({what} {getattr(first.tensor, what)}) "
                f"and rank {held.owner} ({what} {getattr(mine, what)})"
            )
    for other in others if mine.digest else ():
        if other.tensor.digest not in (0, mine.digest):
            raise ManifestError(f"tensor {mine.name!r} differs between rank {other.owner} and rank {held.owner} in its bytes")
