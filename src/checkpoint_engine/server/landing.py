"""Where a receiver keeps what it reads: host memory for all of it, which becomes a registered checkpoint of this rank's."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from checkpoint_engine.devices.base import Closing
from checkpoint_engine.manifest import RegionMeta, TensorMeta
from checkpoint_engine.memory.registry import Registry
from checkpoint_engine.planning.landing import held_tensors, lay_out_runs, place_pieces
from checkpoint_engine.planning.plan import Plan
from checkpoint_engine.server.slots import Slot


class Landing(Closing):
    """Taken before the update. `keep` registers it; otherwise `close` gives it back."""

    def __init__(self, registry: Registry, name: str, plan: Plan, rank: int, reads: Sequence[TensorMeta]) -> None:
        """reads: the tensors that this rank reads. Raises CheckpointExistsError when it has `name` already, CheckpointError when
        there is not enough memory."""
        self._plan, self._reads = plan, reads
        self._runs, nbytes = lay_out_runs(plan, rank)
        self._places = [(offset, piece.nbytes) for piece, offset in place_pieces(plan, rank, self._runs)]
        with contextlib.ExitStack() as stack:
            self._received = stack.enter_context(registry.receive(name, [max(1, nbytes)] if reads else []))
            self._owned = stack.pop_all()

    @property
    def places(self) -> list[torch.Tensor]:
        """Memory for each piece, in the order in which they are shared."""
        return [self._received.regions[0].tensor[offset : offset + nbytes] for offset, nbytes in self._places]

    def keep(self, slots: Sequence[Slot]) -> None:
        """All has arrived. slots: what each piece was read into; those that had to move are left out."""
        lost = [place for place, slot in zip(self._places, slots, strict=True) if slot.moved]
        tensors = held_tensors(self._plan, self._runs, self._reads, lost)
        self._received.metas = tuple(RegionMeta(region.nbytes, tensors) for region in self._received.regions)
        self.close()

    def close(self) -> None:
        self._owned.close()
