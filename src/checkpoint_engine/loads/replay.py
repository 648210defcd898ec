"""Replays a plan: bytes go from the checkpoint's memory to where the engine's own loader would have put them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch

from checkpoint_engine.devices.compiling import begin
from checkpoint_engine.errors import LoadPlanError
from checkpoint_engine.loads.geometry import extent
from checkpoint_engine.loads.model import Model
from checkpoint_engine.loads.moves import MAX_DIMS, Move, Source, Storages, moves
from checkpoint_engine.loads.plan import LoadPlan, PlannedTensor

_UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Way(Protocol):
    """How the moves of one bucket are made."""

    def run(self, memories: Sequence[torch.Tensor]) -> None: ...


class Prepared:
    """A bucket that can be replayed any number of times. rest: names of its tensors that the loader must get. staged: what goes
    into slots, and is left to the caller; layers in the order of their first tensors."""

    def __init__(self, found: list[Move], rest: list[str], way: Way, staged: Sequence[StagedMoves] = ()) -> None:
        self.moves, self.rest, self._way, self.staged = found, rest, way, tuple(staged)
        self.nbytes = sum(move.nbytes for move in found)
        self._reach: dict[int, int] = {}
        for move in found:
            end = move.source + extent(move.run, move.sizes, move.source_strides)
            self._reach[move.memory] = max(self._reach.get(move.memory, 0), end)

    def replay(self, memories: Sequence[torch.Tensor]) -> None:
        """Move the bytes; on CUDA they are queued on the current stream, with one launch.

        memories  uint8, one-dimensional, contiguous: what the sources' numbers count. On CUDA they are device memory, or host
                  memory that is registered with the device. They must stay mapped until the moves are over.
        Raises LoadPlanError when there is no such memory, or it ends before a source does.
        """
        for number, end in self._reach.items():
            if not 0 <= number < len(memories) or memories[number].numel() < end:
                raise LoadPlanError(f"memory {number} has no {end} bytes")
        self._way.run(memories)


class StagedMoves:
    """Of one bucket, what goes into slots of one layer. names: of these slots."""

    def __init__(self, plan: LoadPlan, layer: str, found: list[Move], *, kernel: bool) -> None:
        self.layer, self.moves, self._kernel = layer, found, kernel
        numbers = {move.storage for move in found}
        self.names = tuple(name for name, number in plan.layers[layer].items() if number in numbers)

    def replay(self, slots: Mapping[int, torch.Tensor], memories: Sequence[torch.Tensor]) -> None:
        """As Prepared.replay. slots: the bytes of each slot of the layer, by its number among the plan's storages."""
        Prepared(self.moves, [], _way(self.moves, slots, kernel=self._kernel)).replay(memories)


class Replayer:
    """Replays `plan` on `model`, made anew of the model as it is now.

    Raises LoadPlanError when it is not the model that the plan was recorded on.
    """

    def __init__(self, plan: LoadPlan, model: Model) -> None:
        if (reason := plan.stale(model.fingerprint, plan.checkpoint)) is not None:
            raise LoadPlanError(reason)
        if plan.held != model.storages:
            raise LoadPlanError("its storages are not the model's")
        plan.check()
        self.plan, self._model = plan, model
        self.kernel = _device_with_kernel(model) is not None

    def prepare(self, sources: Iterable[Source]) -> Prepared:
        """Work out what to do for a bucket whose tensors lie at `sources`. Takes some 10 us a tensor; keep it."""
        by_name = {source.name: source for source in sources}
        planned, rest = self.plan.of_bucket(by_name)
        for tensor in planned:
            if by_name[tensor.name].offset < 0 or by_name[tensor.name].memory < 0:
                raise LoadPlanError("it lies before the start of its memory", tensor.name)
        held: list[Move] = []
        staged: dict[str, list[Move]] = {layer: [] for layer in self._layers(planned)}
        for move in moves(self.plan, [by_name[t.name] for t in planned], MAX_DIMS if self.kernel else None):
            slot = self.plan.storages[move.storage].slot
            (held if slot is None else staged[slot.layer]).append(move)
        found = [StagedMoves(self.plan, layer, mine, kernel=self.kernel) for layer, mine in staged.items()]
        return Prepared(held, rest, _way(held, self._model.bytes, kernel=self.kernel), found)

    def _layers(self, planned: Iterable[PlannedTensor]) -> list[str]:
        """Staged layers that these tensors go to, in their order."""
        slots = (self.plan.storages[copy.storage].slot for tensor in planned for copy in tensor.copies)
        return list(dict.fromkeys(slot.layer for slot in slots if slot is not None))


def make_ready(model: Model) -> None:
    """What takes long before anything was replayed on the model's device begins now, in threads."""
    if (device := _device_with_kernel(model)) is not None:
        with contextlib.suppress(ImportError):  # to be said when it is needed
            from checkpoint_engine.loads import kernel, slice_kernel

            for each in (kernel, slice_kernel):
                begin(each.compile_for, device)


def _device_with_kernel(model: Model) -> torch.device | None:
    """The CUDA device that all of the model is on."""
    devices = {raw.device for raw in model.bytes}
    device = next(iter(devices)) if len(devices) == 1 else None
    return device if device is not None and device.type == "cuda" else None


def _way(found: list[Move], storages: Storages, *, kernel: bool) -> Way:
    """Raises ImportError where the kernel needs Triton, and there is none."""
    if kernel:
        from checkpoint_engine.loads.kernel import Gather

        return Gather(found, storages)
    return Copies(found, storages)


class Copies:
    """Plain copies, one for each move. Views of the model are kept; of the memories nothing is, so that they can go."""

    def __init__(self, found: list[Move], storages: Storages) -> None:
        self._moves, self._storages = found, storages
        self._made_for: tuple[int, ...] | None = None
        self._targets: list[tuple[int, torch.Tensor]] = []  # with the bytes of a unit

    def run(self, memories: Sequence[torch.Tensor]) -> None:
        alignment = tuple(math.gcd(8, memory.data_ptr(), memory.storage_offset()) for memory in memories)
        if self._made_for != alignment:
            self._targets = [self._target(move, alignment[move.memory]) for move in self._moves]
            self._made_for = alignment
        for move, (unit, target) in zip(self._moves, self._targets, strict=True):
            source = view(memories[move.memory], move.source, move.run, move.sizes, move.source_strides, unit)
            target.copy_(source, non_blocking=True)

    def _target(self, move: Move, alignment: int) -> tuple[int, torch.Tensor]:
        storage = self._storages[move.storage]
        unit = math.gcd(move.unit, alignment, storage.data_ptr())
        return unit, view(storage, move.target, move.run, move.sizes, move.target_strides, unit)


def view(
    raw: torch.Tensor, offset: int, run: int, sizes: Sequence[int], strides: Sequence[int], unit: int | None = None
) -> torch.Tensor:
    """These bytes of `raw` (uint8, one-dimensional), as integers of `unit` bytes; None: the widest that fit, of 8 at most."""
    unit = unit or math.gcd(offset, run, *strides, 8, raw.data_ptr(), raw.storage_offset())
    typed = raw[: raw.numel() // unit * unit].view(_UNITS[unit])
    shape, steps = (*sizes, run // unit), (*(s // unit for s in strides), 1)
    return typed.as_strided(shape, steps, typed.storage_offset() + offset // unit)
