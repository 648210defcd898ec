"""What a session must know of an engine to record its loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch

from checkpoint_engine.loads.model import Model
from checkpoint_engine.loads.staging import Stages


@dataclasses.dataclass(frozen=True)
class Recordable:
    """An engine whose loader may be recorded, and left out from then on.

    module    what the loader writes into: all of it, and at the end of `run` in the form that serves (what `post_hook` derives
              from parameters, without changing them, is derived after every update), but in layers that are staged
    maps      tensors whose values decide which weights go where, which are not found by their names (`Model.of`)
    begins    called when the checkpoint begins to come, and again when it comes once more in the same update, from its first
              tensor: `run` gets all that the loader must get anew
    replaying called with the names of tensors of a bucket whose bytes go into the model now, without `run`; also of those of
              which nothing is taken, or which for that reason do not even come
    stages    its staged layers, if it has such
    look      makes the model's Model anew, while nothing is staged; None: all parameters and buffers of `module`
    """

    module: torch.nn.Module
    maps: Mapping[str, torch.Tensor] | None = None
    begins: Callable[[], None] | None = None
    replaying: Callable[[Sequence[str]], None] | None = None
    stages: Stages | None = None
    look: Callable[[], Model] | None = None

    def model(self) -> Model:
        return self.look() if self.look is not None else Model.of(self.module, self.maps)
