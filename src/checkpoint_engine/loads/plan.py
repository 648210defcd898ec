"""What a load plan is: which bytes of which checkpoint tensor go where in the model. Pure data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property
from typing import Self

import msgspec

from checkpoint_engine.errors import NOT_DECODED, LoadPlanError
from checkpoint_engine.loads.geometry import extent
from checkpoint_engine.manifest import ITEMSIZE, hex_digest

FORMAT = 1


class Copy(msgspec.Struct, frozen=True, array_like=True):
    """`run` adjacent bytes, once for every index of `sizes`. Nothing is converted.

    source          bytes from the start of the checkpoint's tensor
    storage         number of the model's storage, and `target` the bytes from its start
    source_strides  bytes between two runs, for every dimension of `sizes`; 0 where bytes are used again
    target_strides  the same in the storage, in falling order
    """

    source: int
    storage: int
    target: int
    run: int
    sizes: tuple[int, ...] = ()
    source_strides: tuple[int, ...] = ()
    target_strides: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.run * math.prod(self.sizes)


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Bytes of the model's storage `storage`, as in Copy."""

    storage: int
    target: int
    run: int
    sizes: tuple[int, ...] = ()
    target_strides: tuple[int, ...] = ()


class PlannedTensor(msgspec.Struct, frozen=True, array_like=True):
    """A tensor of the checkpoint that needs no loader. No copies: this rank keeps nothing of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    copies: tuple[Copy, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


class LoadersTensor(msgspec.Struct, frozen=True, array_like=True):
    """A tensor that the engine's loader gets every time, and why. writes: where it was seen to put all new bytes."""

    name: str
    reason: str
    writes: tuple[Place, ...] = ()


class Slot(msgspec.Struct, frozen=True, array_like=True):
    """A tensor that the engine makes anew in every pass, to post-process what was loaded there: `name` of layer `layer`.

    It begins with its storage; strides in elements.
    """

    layer: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Storage(msgspec.Struct, frozen=True, array_like=True):
    """A storage of the model: its size, and the parameters and buffers that lie in it. slot: it is that tensor's, and there for
    a part of a pass only."""

    nbytes: int
    names: tuple[str, ...]
    slot: Slot | None = None


class LoadPlan(msgspec.Struct, frozen=True, dict=True, tag_field="load_plan", tag=FORMAT):
    """What one loader does with one checkpoint in one model.

    model       `Model.fingerprint` of the model it was recorded on
    checkpoint  `checkpoint_fingerprint` of the buckets it was recorded with
    storages    the model's own come first, slots follow
    planned     no byte of the model is written twice by these, nor by any of `loader`; all that goes into slots of one layer
                is planned, or none of it
    """

    model: str
    checkpoint: str
    storages: tuple[Storage, ...]
    planned: tuple[PlannedTensor, ...]
    loader: tuple[LoadersTensor, ...]

    @cached_property
    def by_name(self) -> dict[str, PlannedTensor]:
        return {tensor.name: tensor for tensor in self.planned}

    @cached_property
    def nbytes(self) -> int:
        """Bytes that a replay writes."""
        return sum(copy.nbytes for tensor in self.planned for copy in tensor.copies)

    @cached_property
    def held(self) -> tuple[Storage, ...]:
        """The model's own storages, which are there all the time."""
        return tuple(storage for storage in self.storages if storage.slot is None)

    @cached_property
    def layers(self) -> dict[str, dict[str, int]]:
        """Of every layer with slots: their names, and their numbers among the storages."""
        found: dict[str, dict[str, int]] = {}
        for number, storage in enumerate(self.storages):
            if storage.slot is not None:
                found.setdefault(storage.slot.layer, {})[storage.slot.name] = number
        return found

    @cached_property
    def written(self) -> dict[int, list[Copy | Place]]:
        """Of every storage: where anything is known to be written, by a replay or by the loader."""
        found: dict[int, list[Copy | Place]] = {number: [] for number in range(len(self.storages))}
        for tensor in self.planned:
            for copy in tensor.copies:
                found[copy.storage].append(copy)
        for left in self.loader:
            for place in left.writes:
                found[place.storage].append(place)
        return found

    @cached_property
    def covered(self) -> frozenset[int]:
        """Numbers of storages of which a replay writes every byte."""
        nbytes = dict.fromkeys(range(len(self.storages)), 0)
        for copy in (copy for tensor in self.planned for copy in tensor.copies):
            nbytes[copy.storage] += copy.nbytes
        return frozenset(number for number, storage in enumerate(self.storages) if nbytes[number] == storage.nbytes)

    @cached_property
    def digest(self) -> str:
        """32 hex digits of everything in it."""
        return hex_digest(self.encode())

    def of_bucket(self, names: Iterable[str]) -> tuple[list[PlannedTensor], list[str]]:
        """Of a bucket's tensors, those that can be replayed, and the names of those that the loader must get."""
        planned, rest = [], []
        for name in names:
            tensor = self.by_name.get(name)
            planned.append(tensor) if tensor is not None else rest.append(name)
        return planned, rest

    def useless(self) -> str | None:
        """Why there is nothing to replay; None if there is."""
        if self.nbytes:
            return None
        if not self.loader:
            return "the loader was not seen to write anything into the model"
        reasons = list(dict.fromkeys(tensor.reason for tensor in self.loader))
        return f"every tensor that was loaded is the loader's own business: {'; '.join(reasons[:3])}"

    def stale(self, model: str, checkpoint: str) -> str | None:
        """Why it does not fit a model and a checkpoint of these fingerprints (any more); None if it does."""
        if model != self.model:
            return "the model's parameters or expert maps are not where or what they were when it was recorded"
        if checkpoint != self.checkpoint:
            return "it was recorded with other tensors, shapes or dtypes"
        return None

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises LoadPlanError when `data` is not a plan, or one whose copies leave its tensors or storages."""
        try:
            plan = msgspec.msgpack.decode(data, type=cls)
        except NOT_DECODED as e:
            raise LoadPlanError(f"not a load plan: {e}") from e
        plan.check()
        return plan

    def check(self) -> None:
        """Raises LoadPlanError when a copy reads outside of its tensor or writes outside of its storage."""
        if self.storages[: len(self.held)] != self.held:
            raise LoadPlanError("a slot comes before the model's own storages")
        for tensor in self.planned:
            if tensor.dtype not in ITEMSIZE or any(n < 0 for n in tensor.shape):
                raise LoadPlanError(f"no dtype {tensor.dtype!r}, or no shape {tensor.shape}", tensor.name)
            for copy in tensor.copies:
                if not _inside(copy.source, copy.run, copy.sizes, copy.source_strides, tensor.nbytes):
                    raise LoadPlanError(f"{copy} leaves the tensor's {tensor.nbytes} bytes", tensor.name)
                if not self._holds(copy):
                    raise LoadPlanError(f"{copy} leaves its storage", tensor.name)
        for left in self.loader:
            if not all(self._holds(place) for place in left.writes):
                raise LoadPlanError("a place where its loader writes leaves its storage", left.name)

    def _holds(self, place: Copy | Place) -> bool:
        if not 0 <= place.storage < len(self.storages):
            return False
        room = self.storages[place.storage].nbytes
        return _inside(place.target, place.run, place.sizes, place.target_strides, room)


def _inside(offset: int, run: int, sizes: tuple[int, ...], strides: tuple[int, ...], room: int) -> bool:
    if len(sizes) != len(strides) or min((offset, *strides)) < 0 or min((run, *sizes)) < 1:
        return False
    return offset + extent(run, sizes, strides) <= room


def checkpoint_fingerprint(buckets: Iterable[Iterable[tuple[str, str, tuple[int, ...]]]]) -> str:
    """Of the buckets' tensors (name, dtype, shape) in their order, 32 hex digits. Neither where they lie in memory matters nor
    which of them come together."""
    return hex_digest(msgspec.msgpack.encode([list(tensor) for bucket in buckets for tensor in bucket]))
