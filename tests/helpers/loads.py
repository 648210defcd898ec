"""Recording a loader and replaying its plan, on real memory of this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from checkpoint_engine.loads.model import Model
from checkpoint_engine.loads.moves import Source
from checkpoint_engine.loads.plan import LoadPlan, checkpoint_fingerprint
from checkpoint_engine.loads.recorder import Recorder
from checkpoint_engine.loads.replay import Replayer

Weights = list[tuple[str, torch.Tensor]]
Run = Callable[[Weights], Any]
ALIGNMENT = 256


class Memory:
    """A checkpoint's tensors one behind the other in one piece of memory, as a bucket's are, and views of them."""

    def __init__(self, weights: Weights, device: str = "cpu") -> None:
        offsets, end = [], 0
        for _, tensor in weights:
            offsets.append(end)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.raw = torch.zeros(end + ALIGNMENT, dtype=torch.uint8, device=device)
        self.sources = [Source(name, 0, offset) for (name, _), offset in zip(weights, offsets, strict=True)]
        self.weights: Weights = []
        for (name, tensor), offset in zip(weights, offsets, strict=True):
            flat = self.raw[offset : offset + tensor.nbytes]
            flat.copy_(tensor.contiguous().reshape(-1).view(torch.uint8))
            self.weights.append((name, flat.view(tensor.dtype).view(tensor.shape)))


def fingerprint(buckets: Sequence[Weights]) -> str:
    return checkpoint_fingerprint([[(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in b] for b in buckets])


def record(run: Run, buckets: Sequence[Weights], tensors: dict[str, torch.Tensor]) -> LoadPlan:
    """One pass of `run` over `buckets`, recorded. `tensors`: the model."""
    model = Model(tensors)
    with Recorder(model) as recorder, torch.no_grad():
        for bucket in buckets:
            recorder.load(run, bucket)
        return recorder.finish(Model(tensors), fingerprint(buckets))


def replay(plan: LoadPlan, run: Run, buckets: Sequence[Weights], tensors: dict[str, torch.Tensor]) -> None:
    """As an update does it: the planned tensors by the plan, the others by the loader."""
    replayer = Replayer(plan, Model(tensors))
    for bucket in buckets:
        memory = Memory(bucket)
        prepared = replayer.prepare(memory.sources)
        prepared.replay([memory.raw])
        if rest := [(name, tensor) for name, tensor in memory.weights if name in prepared.rest]:
            with torch.no_grad():
                run(rest)


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
