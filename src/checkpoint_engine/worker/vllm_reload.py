"""New weights for a whole vLLM model that is serving: layer by layer the way that its post-processing allows."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from checkpoint_engine.errors import SettingsError, TensorError
from checkpoint_engine.loads.model import expert_maps
from checkpoint_engine.loads.staging import Listener
from checkpoint_engine.worker.vllm_attention import drop_scales, has_scales, is_attention, scale_parameters
from checkpoint_engine.worker.vllm_layers import LayerFacts, Way, choose_way
from checkpoint_engine.worker.vllm_parts import WatchedLayer, has_parts, muted
from checkpoint_engine.worker.vllm_stage import Held, Internals, StagedLayer, own_tensors

KNOWN_VERSIONS = range(26, 34)  # 0.26 to 0.33
_SHOWN = 5
_calls: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()
"""How many calls of loaders completed a staged layer in the last update that was whole."""
_names: weakref.WeakKeyDictionary[torch.nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()
"""The checkpoint's tensors in the last update of a model that was whole: a name that is not sent again is named in errors."""


class MissingWeightsError(ValueError):
    """A checkpoint that lacks tensors which the model has, or parts of them."""


class Reload:
    """One pass of new weights through `model`: begin, load any number of times, then finish or abort.

    All under vLLM's current configuration and torch.no_grad(), as vLLM loads weights itself. After `abort`, which may follow
    anything, the model is whole again (a mixture of old and new weights) and the next pass heals it.

    label       begins the names of its layers in load plans
    other       a model that shares layers with this one and is loaded in the same pass: those are left to it, and
                what this one's checkpoint has for them is dropped, as vLLM does when it starts
    peak_bytes  the most memory that staged layers held at once, bytes
    ways        how many layers went which way
    """

    def __init__(self, model: torch.nn.Module, model_config: Any, other: torch.nn.Module | None = None, label: str = "") -> None:
        self._model, self._config, self.label = model, model_config, label
        self._others = frozenset(other.modules()) if other is not None else frozenset()
        self._shared = [module for module in model.modules() if module in self._others]
        self._held = Held()
        self._clear()

    def _clear(self) -> None:
        self._staged: list[StagedLayer] = []
        self._labels: dict[str, StagedLayer] = {}
        self._watched: list[WatchedLayer] = []
        self._refreshed: list[torch.nn.Module] = []
        self._scales: list[torch.nn.Module] = []
        self._expected: set[str] = set()
        self._loaded: set[str] | None = set()
        self._sent: set[str] = set()
        self._replayed: set[str] = set()
        self._replayed_into = self._settled = False
        self.ways: Counter[str] = Counter()

    @property
    def peak_bytes(self) -> int:
        return self._held.peak

    def begin(self, listener: Listener | None = None) -> None:
        """listener: is told of staged layers.

        Raises SettingsError when a layer needs more than bare loading and this version of vLLM is not known.
        """
        with _disable_current_modes():
            self._set_up(listener)
        every = {name for name, parameter in self._model.named_parameters() if parameter.numel()}
        elsewhere = {layer.layer for layer in self._staged} | self._others
        for prefix, module in self._model.named_modules():
            if module in elsewhere or is_attention(module):
                every.difference_update(_names_of(prefix, own_tensors(module)))
        self._expected = every

    def _set_up(self, listener: Listener | None) -> None:
        internals: Internals | None = None
        for name, layer in list(self._model.named_modules()):
            if layer in self._others or not (own_tensors(layer) or is_attention(layer)):
                continue
            way, _ = choose_way(facts(layer))
            self.ways[way.value] += 1
            if way is Way.STAGE:
                internals = internals or internals_of_this_version()
                expected = _calls.get(layer) if listener is None else None  # a load plan leaves calls out
                label = self.label + name
                self._staged.append(StagedLayer(name, layer, internals, expected, self._held, listener, label))
                self._labels[label] = self._staged[-1]
                self._staged[-1].prepare()
                continue
            if way is Way.REFRESH:
                self._refreshed.append(layer)
            elif has_scales(layer):
                with self._device_of(layer):
                    _method(layer).create_weights(layer)
                self._scales.append(layer)
            if has_parts(layer):
                self._watched.append(WatchedLayer(name, layer))
                self._watched[-1].prepare()

    def load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """The tensors may be overwritten as soon as what was queued on the current stream is over.

        Raises TensorError naming the tensor that the engine's loader took last before it failed.
        """
        taken = [""]
        weights = without_tied(self._config, weights)
        self._sent.update(name for name, _ in weights)
        try:
            with muted(self._shared):
                loaded = self._model.load_weights(_noting(weights, taken))  # type: ignore[operator]
        except Exception as e:
            raise TensorError(taken[0], f"{type(e).__name__}: {e}".removesuffix(": ")) from e
        if loaded is None:
            self._loaded = None
        elif self._loaded is not None:
            self._loaded.update(loaded)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All parameters and buffers as they serve, while no pass is under way. Not among them: what attention with scales has of
        its own. Those, and what is derived of them, may be other tensors after every pass."""
        scaled = [(name, layer) for name, layer in self._model.named_modules() if has_scales(layer)]
        passing = {name for prefix, layer in scaled for name in _names_of(prefix, own_tensors(layer))}
        mine = [*self._model.named_parameters(remove_duplicate=False), *self._model.named_buffers(remove_duplicate=False)]
        return {self.label + name: tensor for name, tensor in mine if name not in passing}

    def maps(self) -> dict[str, torch.Tensor]:
        """Its expert maps."""
        return {self.label + name: tensor for name, tensor in expert_maps(self._model).items()}

    def staged(self, label: str) -> StagedLayer:
        """Raises KeyError when no layer of this label is staged."""
        return self._labels[label]

    @property
    def replaced(self) -> frozenset[str]:
        """Names of live tensors which post-processing of staged layers writes."""
        return frozenset(name for layer in self._staged for name in _names_of(layer.label, layer.replaced))

    def replaying(self, names: Iterable[str]) -> None:
        """Tensors that are put in place without `load`, some of them here."""
        self._replayed.update(names)
        self._replayed_into = True

    @property
    def touched(self) -> bool:
        """Whether anything was loaded that is not another model's."""
        loaded = self._replayed_into or bool(self._loaded and self._loaded & self._expected)
        return loaded or any(s.calls for s in self._staged) or any(w.parts.seen for w in self._watched)

    def settle(self) -> None:
        """All was sent: post-process staged layers that are not yet. Raises MissingWeightsError naming what was not sent."""
        if self._settled:
            return
        self._check_complete()
        for layer in self._staged:
            if not layer.done:  # padding is never loaded, so that its elements do not add up
                layer.finish()
        self._settled = True

    def finish(self) -> None:
        """As `settle`, and then what is derived from live tensors."""
        self.settle()
        for module in self._refreshed:
            _method(module).process_weights_after_loading(module)
        for module in self._scales:
            self._take_scales(module)
        for module in list(self._model.modules()):
            if is_attention(module):
                module.process_weights_after_loading(self._config.dtype)  # type: ignore[operator]
        for layer in self._staged:
            if not self._replayed:
                _calls[layer.layer] = layer.calls
        _names[self._model] = frozenset(self._sent | self._replayed)
        self._stop_watching()

    def _check_complete(self) -> None:
        missing = [name for layer in self._staged if not (self._replayed and layer.done) for name in layer.missing]
        if not self._replayed <= self._sent and not missing:
            return  # the checkpoint of a load plan, whose completeness was checked when it was proved
        missing += [name for layer in self._watched for name in layer.parts.missing]
        if self._loaded is not None:  # 0.26 tells other names of experts than they have
            missing += sorted(self._expected.difference(self._loaded, *(layer.parts.seen for layer in self._watched)))
        if not missing:
            return
        reason = f"nothing was sent for {_list(missing)}"
        if gone := sorted(_names.get(self._model, frozenset()) - self._sent - self._replayed):
            reason += f"; the last update brought {_list(gone)}, this one does not"
        raise MissingWeightsError(reason)

    def _stop_watching(self) -> None:
        for layer in self._watched:
            layer.put_back()

    def abort(self) -> None:
        """Put what is half loaded back. Never raises for a layer that is as it should be."""
        for layer in self._staged:
            _calls.pop(layer.layer, None)
        self.again()

    def again(self) -> None:
        """The same for a pass after which another one follows: `begin` it."""
        self._stop_watching()
        for layer in self._staged:
            layer.put_back()
        for module in self._scales:
            drop_scales(module)
        self._clear()

    def _take_scales(self, module: torch.nn.Module) -> None:
        if any(float(parameter) >= 0 for parameter in scale_parameters(module)):
            _method(module).process_weights_after_loading(module)
        drop_scales(module)

    def _device_of(self, layer: torch.nn.Module) -> torch.device:
        return next((t.device for t in own_tensors(layer).values()), next(self._model.parameters()).device)


def facts(layer: torch.nn.Module) -> LayerFacts:
    """What `choose_way` asks of a layer of vLLM's."""
    base = import_module("vllm.model_executor.layers.quantization.base_config").QuantizeMethodBase
    method = getattr(layer, "quant_method", None)
    if not isinstance(method, base):
        return LayerFacts(None, "")
    kind = type(method)
    backend = getattr(getattr(method, "unquantized_backend", None), "name", None)
    platform = import_module("vllm.platforms").current_platform
    device = "rocm" if platform.is_rocm() else str(platform.device_type)
    return LayerFacts(f"{kind.__module__}.{kind.__qualname__}", device, backend, has_scales(layer))


def _method(layer: torch.nn.Module) -> Any:
    return layer.quant_method


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def _names_of(prefix: str, tensors: Iterable[str]) -> list[str]:
    return [f"{prefix}.{name}" if prefix else name for name in tensors]


def _noting(weights: list[tuple[str, torch.Tensor]], taken: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights`, with the name of the last one taken in taken[0]: loaders often fail without naming any."""
    for name, tensor in weights:
        taken[0] = name
        yield name, tensor


def without_tied(model_config: Any, weights: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    """Without the output head's copy of a table that the model shares with it: from 0.32 on, vLLM refuses that copy in any call
    of load_weights that does not carry the table itself, and a bucket need not."""
    config = getattr(model_config, "hf_text_config", None) or getattr(model_config, "hf_config", None)
    tied = getattr(config, "tie_word_embeddings", False) and not getattr(
        model_config, "word_embeddings_untied_by_checkpoint", False
    )
    return [(n, t) for n, t in weights if not n.endswith("lm_head.weight")] if tied else weights


def internals_of_this_version() -> Internals:
    """Raises SettingsError naming the version when it is none of 0.26 to 0.33, or lacks what is used of it."""
    version = str(import_module("vllm").__version__)
    numbers = version.split(".")
    known = numbers[0] == "0" and len(numbers) > 1 and numbers[1].isdigit() and int(numbers[1]) in KNOWN_VERSIONS
    try:
        if known:
            return Internals()
        reason = "it is not one of 0.26 to 0.33"
    except (ImportError, AttributeError) as e:
        reason = str(e)
    raise SettingsError(
        f"this model's weights are changed after loading, and how to reload them in vLLM {version} is not known: {reason}"
    )
