"""New weights for a whole vLLM model that is serving: layer by layer the way that its post-processing allows."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch

from checkpoint_engine.errors import SettingsError, TensorError
from checkpoint_engine.worker.vllm_layers import LayerFacts, Way, choose_way
from checkpoint_engine.worker.vllm_stage import Held, Internals, StagedLayer, own_tensors

KNOWN_VERSIONS = range(26, 34)  # 0.26 to 0.33
_SHOWN = 5
_calls: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()
"""How many calls of loaders completed a staged layer in the last update that was whole."""


class MissingWeightsError(ValueError):
    """A checkpoint that lacks tensors which the model has."""


class Reload:
    """One pass of new weights through `model`: begin, load any number of times, then finish or abort.

    All under vLLM's current configuration and torch.no_grad(), as vLLM loads weights itself. After `abort`, which may follow
    anything, the model is whole again (a mixture of old and new weights) and the next pass heals it.

    peak_bytes  the most memory that staged layers held at once, bytes
    ways        how many layers went which way
    """

    def __init__(self, model: torch.nn.Module, model_config: Any) -> None:
        self._model, self._config = model, model_config
        self._staged: list[StagedLayer] = []
        self._refreshed: list[torch.nn.Module] = []
        self._scales: list[torch.nn.Module] = []
        self._expected: set[str] = set()
        self._loaded: set[str] | None = set()
        self._held = Held()
        self.ways: Counter[str] = Counter()

    @property
    def peak_bytes(self) -> int:
        return self._held.peak

    def begin(self) -> None:
        """Raises SettingsError when a layer needs more than bare loading and this version of vLLM is not known."""
        self._set_up()
        staged = {name for layer in self._staged for name in _names(layer.name, own_tensors(layer.layer))}
        attention = {
            name
            for prefix, module in self._model.named_modules()
            if is_attention(module)
            for name in _names(prefix, own_tensors(module))
        }
        every = {name for name, parameter in self._model.named_parameters() if parameter.numel()}
        self._expected = every - staged - attention

    def _set_up(self) -> None:
        internals: Internals | None = None
        for name, layer in list(self._model.named_modules()):
            if not own_tensors(layer) and not is_attention(layer):
                continue
            way, _ = choose_way(facts(layer))
            self.ways[way.value] += 1
            if way is Way.STAGE:
                internals = internals or internals_of_this_version()
                self._staged.append(StagedLayer(name, layer, internals, _calls.get(layer), self._held))
                self._staged[-1].prepare()
            elif way is Way.REFRESH:
                self._refreshed.append(layer)
            elif has_scales(layer):
                with self._device_of(layer):
                    _method(layer).create_weights(layer)
                self._scales.append(layer)

    def load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """The tensors may be overwritten as soon as what was queued on the current stream is over.

        Raises TensorError naming the tensor that the engine's loader took last before it failed.
        """
        taken = [""]
        try:
            loaded = self._model.load_weights(_noting(without_tied(self._config, weights), taken))  # type: ignore[operator]
        except Exception as e:
            raise TensorError(taken[0], f"{type(e).__name__}: {e}".removesuffix(": ")) from e
        if loaded is None:
            self._loaded = None
        elif self._loaded is not None:
            self._loaded.update(loaded)

    def finish(self) -> None:
        """Raises MissingWeightsError naming parameters for which nothing was sent."""
        missing = [name for layer in self._staged for name in layer.missing]
        if self._loaded is not None:
            missing += sorted(self._expected - self._loaded)
        if missing:
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise MissingWeightsError(f"nothing was sent for {', '.join(map(repr, missing[:_SHOWN]))}{more}")
        for layer in self._staged:
            if not layer.done:  # padding is never loaded, so that its elements do not add up
                layer.finish()
        for module in self._refreshed:
            _method(module).process_weights_after_loading(module)
        for module in self._scales:
            self._take_scales(module)
        for module in list(self._model.modules()):
            if is_attention(module):
                module.process_weights_after_loading(self._config.dtype)  # type: ignore[operator]
        for layer in self._staged:
            _calls[layer.layer] = layer.calls

    def abort(self) -> None:
        """Put what is half loaded back. Never raises for a layer that is as it should be."""
        for layer in self._staged:
            layer.put_back()
            _calls.pop(layer.layer, None)
        for module in self._scales:
            _drop_scales(module)

    def _take_scales(self, module: torch.nn.Module) -> None:
        if any(float(parameter) >= 0 for parameter in _scale_parameters(module)):
            _method(module).process_weights_after_loading(module)
        _drop_scales(module)

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


def is_attention(layer: torch.nn.Module) -> bool:
    """Whether vLLM post-processes it by itself, after all other layers."""
    attention = import_module("vllm.model_executor.layers.attention")
    if hasattr(attention, "is_deferred_attention_layer"):  # not in 0.26
        return bool(attention.is_deferred_attention_layer(layer))
    return isinstance(layer, (attention.Attention, attention.MLAAttention))


def has_scales(layer: torch.nn.Module) -> bool:
    method = import_module("vllm.model_executor.layers.quantization.kv_cache").BaseKVCacheMethod
    return isinstance(getattr(layer, "quant_method", None), method)


def _method(layer: torch.nn.Module) -> Any:
    return layer.quant_method


_SCALES = ("q_scale", "k_scale", "v_scale", "prob_scale")


def _scale_parameters(layer: torch.nn.Module) -> Iterator[torch.Tensor]:
    return (getattr(layer, name) for name in _SCALES if name in layer._parameters)


def _drop_scales(layer: torch.nn.Module) -> None:
    for name in _SCALES:
        if name in layer._parameters:
            delattr(layer, name)


def _names(prefix: str, tensors: dict[str, torch.Tensor]) -> list[str]:
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
