"""Watches an engine's loader at the dispatcher, and notes every copy out of the checkpoint's tensors into the model."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoint_engine.devices.foreign import tensor_at
from checkpoint_engine.errors import LoadPlanError
from checkpoint_engine.loads.digest import storage_digests
from checkpoint_engine.loads.model import Model, storage_key
from checkpoint_engine.loads.observed import Observed, Source
from checkpoint_engine.loads.operations import COMPOSITE, UNKNOWN, Operations, dtype_name
from checkpoint_engine.loads.plan import LoadPlan
from checkpoint_engine.loads.resolve import resolve
from checkpoint_engine.loads.staging import RecordedSlots
from checkpoint_engine.manifest import ITEMSIZE

Weights = Sequence[tuple[str, torch.Tensor]]
LoadWeights = Callable[[list[tuple[str, torch.Tensor]]], Any]


class Recorder:
    """Records one pass of an engine's loader over one model.

        with Recorder(Model.of(module)) as recorder:
            for weights in buckets:
                recorder.load(run, weights)
        plan = recorder.finish(Model.of(module), checkpoint_fingerprint(...))

    It sees what goes through torch's dispatcher in the calling thread. What it cannot see (a loader's threads, numpy, a library
    of kernels) is found by digests of the model before and after, if it changed anything, and by `proof`.
    slots: to be told of layers that are staged meanwhile.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._before = storage_digests(model.bytes)
        self._observed = Observed()
        self._numbers: dict[str, int] = {}
        self._calls = itertools.count()
        self._operations = Operations(model, self._observed)
        self.slots = RecordedSlots(len(model.bytes), self._operations.spots)
        self._unreleased: set[int] = set()
        self._kept: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._operations.forget()

    def load(self, run: LoadWeights, weights: Weights) -> None:
        """`run(weights)`, recorded. The loader gets tensors over the same memory, which lives until it has let go of them.

        Raises what `run` raises; a recorder that fails itself lets the loader finish, and `finish` says so.
        """
        call = next(self._calls)
        held = [(name, self._adopt(name, tensor, call)) for name, tensor in weights]
        self._operations.begin(call, [(self._numbers[name], tensor) for name, tensor in held if name in self._numbers])
        with _Watch(self._operations):
            run(list(held))
        del held
        if self._unreleased - self._kept:
            gc.collect()  # a cycle is no intention to keep something
        self._kept |= self._unreleased
        self._observed.business(tuple(self._unreleased), "its loader keeps it between calls")
        self._operations.end()

    def finish(self, model: Model, checkpoint: str, replaced: frozenset[str] = frozenset()) -> LoadPlan:
        """The plan. model: made anew; checkpoint: fingerprint of the buckets that `load` got; replaced: names of tensors that are
        written when a staged layer is post-processed.

        Raises LoadPlanError when something moved meanwhile, or the recorder failed.
        """
        if (failure := self._operations.failure or self.slots.failure) is not None:
            raise LoadPlanError(f"the recorder failed: {failure}")
        if model.fingerprint != self._model.fingerprint:
            raise LoadPlanError("the loader replaced parameters, or changed expert maps, instead of writing into them")
        if unseen := self._changed_unseen(replaced):
            raise LoadPlanError(f"{', '.join(unseen)} changed, and the recorder did not see how")
        return resolve(self._observed, model, checkpoint, self.slots.storages)

    def _changed_unseen(self, replaced: frozenset[str]) -> list[str]:
        """Parameters and buffers in storages that have other bytes than before, though nothing was seen to write there."""
        seen = {copy.storage for source in self._observed.sources for copy in source.copies}
        seen |= {write.place.storage for write in self._observed.unexplained}
        after = storage_digests(self._model.bytes)
        changed = {n for n, (x, y) in enumerate(zip(self._before, after, strict=True)) if x != y}
        names = [self._model.storages[number].names for number in sorted(changed - seen)]
        return [name for mine in names if not replaced.issuperset(mine) for name in mine]

    def _adopt(self, name: str, tensor: torch.Tensor, call: int) -> torch.Tensor:
        """The tensor in a storage of its own, so that views of it can be told from others', and its end noticed."""
        dtype = dtype_name(tensor.dtype)
        number = len(self._observed.sources)
        source = Source(name, dtype, tuple(tensor.shape), call)
        self._observed.sources.append(source)
        if name in self._numbers:
            source.reason = "it came more than once"
            self._observed.business((self._numbers[name],), source.reason)
        self._numbers[name] = number
        if dtype not in ITEMSIZE or not tensor.is_contiguous():
            source.reason = f"it came as a {dtype} tensor with strides {tensor.stride()}"
            tensor = tensor.contiguous()  # adopted in any case: what is done with it must be seen
        if not tensor.numel():
            return tensor
        self._unreleased.add(number)
        key = 0

        def released(_: torch.Tensor = tensor) -> None:
            self._unreleased.discard(number)
            self._operations.release(key)

        raw = tensor_at(tensor.data_ptr(), tensor.nbytes, tensor.device, released)
        key = storage_key(raw)
        return raw.view(tensor.dtype).view(tensor.shape)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, operations: Operations) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations = operations

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nobody compiles a loader; wrapping every operation against it (torch's default) takes as long as recording does."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handle = self._operations.handlers.get(func, UNKNOWN)  # looked up once: torch hashes its operations in Python
        if handle is UNKNOWN:
            handle = self._operations.learn(func)
        if handle is COMPOSITE:
            with self:
                return func.decompose(*args, **(kwargs or {}))
        out = func(*args, **kwargs) if kwargs else func(*args)
        if handle is not None:
            try:
                handle(func, args, kwargs or {}, out)
            except Exception as e:  # recording must never break a load
                self._operations.fail(func, e)
        return out
