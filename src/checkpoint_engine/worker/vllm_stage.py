"""One layer of a vLLM model, loaded beside its live parameters and then copied into them.

vLLM records at start what the layer looked like before post-processing; here it gets fresh tensors of that layout when its
first weight arrives, its own loaders write into them at once (nothing is kept of the tensors that were sent), and when the
last has arrived, post-processing runs and the result goes into the live storage, where CUDA graphs find it. Until then the
live tensors are kept aside, and `put_back` restores them at any time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from checkpoint_engine.loads.staging import Listener
from checkpoint_engine.worker.vllm_parts import Loader, Parts, like


class Internals:
    """What is used of vLLM's own reload, which has no public interface.

    Raises AttributeError or ImportError when something of it is not there.
    """

    def __init__(self) -> None:
        from importlib import import_module

        layerwise = import_module("vllm.model_executor.model_loader.reload.layerwise")
        meta = import_module("vllm.model_executor.model_loader.reload.meta")
        utils = import_module("vllm.model_executor.model_loader.reload.utils")
        self.info: Callable[[torch.nn.Module], Any] = layerwise.get_layerwise_info
        self.to_meta: Callable[[torch.nn.Module, Any], None] = meta.restore_layer_on_meta
        self.materialize: Callable[[torch.nn.Module, Any], None] = meta.materialize_layer
        self.count: Callable[[Loader, inspect.BoundArguments], tuple[int, Any]] = meta.get_numel_loaded
        self.numel: Callable[[torch.nn.Module], int] = utils.get_layer_size
        self.unloadable: frozenset[str] = frozenset(getattr(meta, "SKIP_LOAD_TENSORS", meta.SKIP_TENSORS))
        loader = import_module("vllm.model_executor.model_loader.default_loader")
        self.configured: frozenset[str] = frozenset(getattr(loader, "_CONFIG_BUILT_PARAMS", ()))  # no checkpoint has them
        self.original_loader: Callable[[torch.Tensor], Loader] = layerwise._get_original_loader


def own_tensors(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Its parameters and buffers, without those of the layers below."""
    mine = {**layer._parameters, **layer._buffers}
    return {name: tensor for name, tensor in mine.items() if tensor is not None}


class Held:
    """Bytes that staged layers hold beside the live ones: now, and at most."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def add(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)


class StagedLayer:
    """See the module. `prepare` it first; `finish` comes by itself with the last weight, or is called.

    expected  how many calls of loaders made it complete last time; None: count elements, as vLLM does
    listener  is told of it under `label`; what is loaded without its loaders goes where `open` says
    """

    def __init__(
        self,
        name: str,
        layer: torch.nn.Module,
        internals: Internals,
        expected: int | None,
        held: Held,
        listener: Listener | None = None,
        label: str = "",
    ) -> None:
        self.name, self.layer, self._vllm, self._expected, self._held = name, layer, internals, expected, held
        self._listener, self.label = listener, label or name
        self._info = internals.info(layer)
        if not any(self._info.restore_metadata):
            raise RuntimeError(f"vLLM did not record what layer {name!r} looks like in a checkpoint")
        self._parameters = {n: p for n, p in layer._parameters.items() if p is not None}
        self._buffers = {n: b for n, b in layer._buffers.items() if b is not None}
        self._transient = set(layer._non_persistent_buffers_set)
        self._wrapped: dict[str, torch.Tensor] = {}  # in the checkpoint's layout, without memory
        self._before: dict[str, Loader | None] = {}
        self.calls, self._loaded, self._nbytes = 0, 0, 0
        self._touched: set[str] = set()
        self._parts = Parts(name, layer)
        self._open = self.done = False

    def prepare(self) -> None:
        """Put the checkpoint's layout, without memory yet, in place of the live tensors."""
        self._vllm.to_meta(self.layer, self._info)
        self._renew()
        for name, tensor in own_tensors(self.layer).items():
            if name not in self._vllm.unloadable:
                self._wrapped[name] = tensor
                self._before[name] = getattr(tensor, "weight_loader", None)
                _set(tensor, "weight_loader", self._wrap(name, self._vllm.original_loader(tensor)))

    def _renew(self) -> None:
        """vLLM leaves a bias where it is. But post-processing may have changed its dtype (to float32 on CPUs with AMX), and
        what is not rounded to the model's first is not what a fresh load makes of it; nor is a live one to be half loaded."""
        dtype = getattr(self.layer, "params_dtype", None)
        for name, live in self._parameters.items():
            if getattr(self.layer, name, None) is live and name not in self._vllm.unloadable:
                fresh = torch.nn.Parameter(torch.empty_like(live, dtype=dtype), requires_grad=False)
                fresh.__class__ = live.__class__
                vars(fresh).update(vars(live))
                self.layer.register_parameter(name, fresh)

    def _wrap(self, name: str, original: Loader) -> Loader:
        signature = inspect.signature(original)

        def load(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return self._load(name, original, bound)

        return like(load, original)

    def _load(self, name: str, original: Loader, bound: inspect.BoundArguments) -> Any:
        self.calls += 1
        if self.done:
            if self._expected is not None:
                raise RuntimeError(f"layer {self.name!r} was sent more weights than in the update before")
            return None  # some methods load the same small tensor once per partition: vLLM drops the surplus, too
        self._materialize()
        self._parts.note(name, bound.arguments)
        first = next(iter(bound.arguments))
        bound.arguments["param" if "param" in bound.arguments else first] = getattr(self.layer, name)
        self._touched.add(name)
        if self._expected is not None:
            result = original(*bound.args, **bound.kwargs)
            complete = self.calls >= self._expected
        else:
            numel, result = self._vllm.count(original, bound)
            self._loaded += numel
            complete = self._loaded >= self._vllm.numel(self.layer)
        if complete and not self.missing:
            self.finish()
        return result

    def _materialize(self) -> None:
        if not self._open:
            with _disable_current_modes():  # a recorder has no business here
                self._materialize_now()

    def _materialize_now(self) -> None:
        self._vllm.materialize(self.layer, self._info)
        self._open = True
        self._nbytes = sum(tensor.nbytes for tensor in self._wrapped.values() if tensor.is_meta)
        self._held.add(self._nbytes)
        for name, tensor in self._wrapped.items():  # lookups from now on find the real tensor: count those as well
            _set(getattr(self.layer, name), "weight_loader", _get(tensor, "weight_loader"))
        if self._listener is not None:
            self._listener.opened(self.label, self._fresh)

    @property
    def _fresh(self) -> dict[str, torch.Tensor]:
        """What is loaded into, once there is memory."""
        return {name: getattr(self.layer, name) for name in self._wrapped}

    @property
    def replaced(self) -> frozenset[str]:
        """Names of its live tensors that are kept aside, and written by `finish` alone."""
        return frozenset({*self._parameters, *self._buffers} - self._vllm.unloadable)

    def open(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Its tensors in the checkpoint's layout: somebody else writes these names into them, and calls `finish`."""
        if self.done:
            raise RuntimeError(f"layer {self.name!r} was complete already")
        self._materialize()
        self._touched.update(names)
        return self._fresh

    @property
    def missing(self) -> list[str]:
        """Parameters for which nothing was sent, and parts of the others that were not."""
        wanted = (n for n, tensor in self._wrapped.items() if isinstance(tensor, torch.nn.Parameter) and tensor.numel())
        untouched = [f"{self.name}.{n}" for n in wanted if n not in self._touched and n not in self._vllm.configured]
        return untouched + self._parts.missing

    def finish(self) -> None:
        """Post-process what was loaded and copy it into the live tensors."""
        with _disable_current_modes():
            if self._open and self._listener is not None:
                self._listener.closing(self.label, self._fresh)
            self._finish()

    def _finish(self) -> None:
        layer = self.layer
        self._unwrap()
        vars(layer).pop("_already_called_process_weights_after_loading", None)
        prepare_again(layer)
        _get(layer, "quant_method").process_weights_after_loading(layer)
        if hasattr(layer, "update_param_tp_status"):
            _get(layer, "update_param_tp_status")()
        # A CPU's int8 kernel keeps the address of the scales that it was made with, not the tensor.
        scales = [tensor for name, tensor in own_tensors(layer).items() if "scale" in name and tensor.device.type == "cpu"]
        vars(layer)["_checkpoint_engine_scales"] = scales
        for name, parameter in self._parameters.items():
            parameter.data.copy_(getattr(layer, name))
        for name, buffer in self._buffers.items():
            if name in layer._buffers and (name not in self._transient or name in self._touched):
                buffer.data.copy_(getattr(layer, name))
        self._place()
        self.done = True

    def put_back(self) -> None:
        """The live tensors as they are: as they were, unless `finish` was over or broke off in its last step."""
        if not self.done:
            self._unwrap()
            self._place()
            self.done = True

    def _unwrap(self) -> None:
        for name, tensor in self._wrapped.items():
            before = self._before[name]
            if before is not None:
                _set(tensor, "weight_loader", before)
            elif "weight_loader" in vars(tensor):
                delattr(tensor, "weight_loader")
            if (real := getattr(self.layer, name, tensor)) is not tensor:
                _set(real, "weight_loader", self._vllm.original_loader(tensor))

    def _place(self) -> None:
        self._held.add(-self._nbytes)
        self._nbytes = 0
        for name in own_tensors(self.layer):
            delattr(self.layer, name)
        for name, parameter in self._parameters.items():
            self.layer.register_parameter(name, parameter)
        for name, buffer in self._buffers.items():
            self.layer.register_buffer(name, buffer, persistent=name not in self._transient)


def prepare_again(layer: torch.nn.Module) -> None:
    """Experts on a CPU are packed only when their kernel is made: let it be made again. No graph refers to it there."""
    method: Any = getattr(layer, "quant_method", None)
    backend = getattr(method, "unquantized_backend", None)
    if getattr(backend, "name", None) == "CPU" and getattr(method, "moe_kernel", None) is not None:
        method.moe_kernel = None


def _get(of: Any, name: str) -> Any:
    return getattr(of, name)


def _set(tensor: torch.Tensor, name: str, value: Any) -> None:
    setattr(tensor, name, value)
