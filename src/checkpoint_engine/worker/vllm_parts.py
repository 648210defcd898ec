"""Which parts of a vLLM layer's parameters new weights have reached.

vLLM fuses: one parameter holds q, k and v, gate and up, or all experts. Its loaders are told which part a tensor is, and the
set of parameters that load_weights returns says nothing of the others: they would keep old weights, or memory as it came.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

Loader = Callable[..., Any]
Part = tuple[int | None, int | str | None]
"""(expert, shard) as vLLM's loaders are told them; None: all of them."""
_ALL: Part = (None, None)
_QKV = ("q", "k", "v")


class Parts:
    """What was sent of the layer `name`: `note` each call of a loader, then ask for what is `missing`."""

    def __init__(self, name: str, layer: torch.nn.Module) -> None:
        self._name, self._layer = name, layer
        self._seen: dict[str, set[Part]] = {}
        self._shapes: dict[tuple[str, Any], torch.Size] = {}  # of one expert's tensors, by (parameter, shard)
        self._known: set[tuple[str, torch.dtype]] = set()

    def note(self, parameter: str, arguments: Mapping[str, Any]) -> None:
        """arguments: what a loader is called with, by name. Raises ValueError for what vLLM would take without a word: a tensor
        of a quantized checkpoint for a parameter that is not quantized, and an expert that is smaller than the others."""
        sent = arguments.get("loaded_weight")
        if isinstance(sent, torch.Tensor) and (parameter, sent.dtype) not in self._known:
            _refuse_quantized(parameter, getattr(self._layer, parameter, None), sent.dtype)
            self._known.add((parameter, sent.dtype))
        expert, shard = arguments.get("expert_id"), arguments.get("loaded_shard_id", arguments.get("shard_id"))
        if expert is not None and isinstance(sent, torch.Tensor) and sent.dim() == 3:
            expert = None  # a tensor of all experts
        if expert is not None and isinstance(sent, torch.Tensor):
            self._refuse_other_shape(parameter, shard, sent.shape)
        seen = self._seen.setdefault(parameter, set())
        if isinstance(shard, (tuple, list)) and shard:
            seen.update((expert, each) for each in shard)
        else:
            seen.add((expert, shard if isinstance(shard, (int, str)) else None))

    def _refuse_other_shape(self, parameter: str, shard: Any, shape: torch.Size) -> None:
        """vLLM leaves what a tensor is too small for as it was, for it may be padding; but padding is the same for all."""
        others = self._shapes.setdefault((parameter, tuple(shard) if isinstance(shard, list) else shard), shape)
        if others != shape:
            raise ValueError(f"its shape is {tuple(shape)}, that of the experts before it {tuple(others)}")

    @property
    def seen(self) -> frozenset[str]:
        """Names of the parameters that anything was sent for, in the model."""
        return frozenset(f"{self._name}.{parameter}" if self._name else parameter for parameter in self._seen)

    @property
    def missing(self) -> list[str]:
        """Of the parameters that something was sent for: the parts that were not."""
        return [
            f"{self._name}.{parameter} ({said(part)})"
            for parameter, seen in self._seen.items()
            for part in wanted(self._layer, parameter, seen)
            if not seen & {part, (None, part[1]), (part[0], None)}
        ]


def has_parts(layer: torch.nn.Module) -> bool:
    """Whether its parameters are filled by more than one tensor of a checkpoint."""
    return hasattr(layer, "output_sizes") or _experts(layer) > 0


def wanted(layer: torch.nn.Module, parameter: str, seen: Iterable[Part]) -> list[Part]:
    """All parts of a parameter of which the parts `seen` were sent; those that a checkpoint cannot be asked for are left out."""
    seen = set(seen)
    shards = {shard for _, shard in seen}
    if _ALL in seen or not seen:
        return []
    if any(expert is not None for expert, _ in seen):
        local = getattr(layer, "_map_global_expert_id_to_local_expert_id", lambda expert: expert)
        experts = [expert for expert in range(_experts(layer)) if local(expert) != -1]
        gated = getattr(getattr(layer, "moe_config", None), "is_act_and_mul", False)
        if gated and parameter.startswith("w13"):
            shards |= {"w1", "w3"}
        return [(expert, shard) for expert in experts for shard in sorted(shards, key=str)]
    if all(isinstance(shard, int) for shard in shards):
        return [(None, shard) for shard in range(len(getattr(layer, "output_sizes", ())))]
    return [(None, shard) for shard in _QKV] if shards & set(_QKV) else []


class WatchedLayer:
    """A layer whose own loaders write into its live parameters, while notes are taken of what they are called with."""

    def __init__(self, name: str, layer: torch.nn.Module) -> None:
        self.parts = Parts(name, layer)
        self._layer = layer
        self._before: list[tuple[torch.Tensor, Loader]] = []

    def prepare(self) -> None:
        for name, parameter in self._layer._parameters.items():
            loader = getattr(parameter, "weight_loader", None)
            if parameter is not None and loader is not None:
                self._before.append((parameter, loader))
                _set_loader(parameter, self._watch(name, loader))

    def put_back(self) -> None:
        while self._before:
            _set_loader(*self._before.pop())

    def _watch(self, name: str, loader: Loader) -> Loader:
        names, note = tuple(inspect.signature(loader).parameters), self.parts.note

        def watched(*args: Any, **kwargs: Any) -> Any:
            arguments = dict(zip(names, args, strict=False))
            arguments.update(kwargs)
            note(name, arguments)
            return loader(*args, **kwargs)

        return like(watched, loader)


def like(wrapper: Loader, original: Loader) -> Loader:
    """`wrapper`, with what some models look at before they call a loader."""
    wrapper.__doc__, wrapper.__annotations__ = original.__doc__, getattr(original, "__annotations__", {})
    wrapper.__dict__.update({k: v for k, v in getattr(original, "__dict__", {}).items() if k != "__wrapped__"})
    return wrapper


def _set_loader(parameter: torch.Tensor, loader: Loader) -> None:
    name = "weight_loader"  # torch's tensors have no such attribute, vLLM's parameters a property
    setattr(parameter, name, loader)


@contextlib.contextmanager
def muted(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """What is loaded into the modules' own parameters is dropped."""
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    before = [(p, getattr(p, "weight_loader", None)) for p in parameters]
    for parameter in parameters:
        _set_loader(parameter, _drop)
    try:
        yield
    finally:
        for parameter, loader in before:
            if loader is None:
                delattr(parameter, "weight_loader")
            else:
                _set_loader(parameter, loader)


def _drop(*args: Any, **kwargs: Any) -> None:
    return None


def _experts(layer: torch.nn.Module) -> int:
    """How many experts all ranks have together, with redundant ones; 0: it has none, or does not say."""
    number = getattr(getattr(layer, "moe_config", None), "num_experts", None) or getattr(layer, "global_num_experts", 0)
    return number if isinstance(number, int) else 0


def said(part: Part) -> str:
    """For people."""
    expert, shard = part
    words = [] if expert is None else [f"expert {expert}"]
    return ", ".join([*words, f"part {shard}"] if shard is not None else words)


def _refuse_quantized(name: str, parameter: Any, sent: torch.dtype) -> None:
    if not isinstance(parameter, torch.Tensor) or not name.endswith("weight"):
        return
    if sent.itemsize == 1 and parameter.is_floating_point() and parameter.dtype.itemsize > 1:
        raise ValueError(f"it is {_short(sent)}, and this engine holds {_short(parameter.dtype)} there")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
