"""What an update of a vLLM worker fills: the model that answers and, where it speculates, the draft beside it.

A draft of the same checkpoint (MTP) is offered the whole stream, as vLLM's loader offers it the whole checkpoint, and takes
what is its own. The names in any other draft's checkpoint may be the target's as well, so it gets the tensors that are sent
as `draft.` + their name, and only those.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from checkpoint_engine.errors import TensorError
from checkpoint_engine.loads.model import Model
from checkpoint_engine.loads.recordable import Recordable
from checkpoint_engine.loads.staging import Listener
from checkpoint_engine.worker.vllm_reload import MissingWeightsError, Reload
from checkpoint_engine.worker.vllm_stage import StagedLayer

DRAFT = "draft."
Weights = list[tuple[str, torch.Tensor]]


class Models:
    """One pass of new weights through a worker's models: load any number of times, then finish or abort.

    A model that nothing is sent for stays as it is: a trainer may leave the draft alone, and with it only drafts get worse.
    """

    def __init__(self, worker: Any) -> None:
        target, draft = worker.model_runner.get_model(), draft_of(worker.model_runner)
        speculative = getattr(worker.vllm_config, "speculative_config", None)
        config = getattr(speculative, "draft_model_config", None)
        self._module = target
        self._target = Reload(target, worker.model_config)
        self._draft = Reload(draft, config, other=target, label=DRAFT) if draft is not None and config is not None else None
        self._together = config is not None and config.model == worker.model_config.model
        self._dtype: torch.dtype = worker.model_config.dtype
        self._begun: list[Reload] = []
        self._listener: Listener | None = None
        self._replayed: list[Reload] = []

    def load(self, weights: Weights) -> None:
        """As Reload.load. Raises TensorError for a draft's tensor where there is no draft."""
        own, drafts = split(weights)
        if drafts and self._draft is None:
            raise TensorError(DRAFT + drafts[0][0], "this engine has no draft model to load")
        with completeness_unchecked(), default_dtype(self._dtype):
            if own:
                self._load(self._target, own)
            if self._draft is not None and (drafts or (own and self._together)):
                self._load(self._draft, [*(own if self._together else []), *drafts])

    # --- what load plans ask for ---------------------------------------------------------------------------------------------

    @property
    def recordable(self) -> Recordable:
        """Target and draft as one model, into which loads may be recorded."""
        return Recordable(self._module, begins=self.abandon, replaying=self._replaying, stages=self, look=self._look)

    def _look(self) -> Model:
        tensors, maps = self._target.tensors(), self._target.maps()
        if self._draft is not None:
            tensors, maps = {**tensors, **self._draft.tensors()}, {**maps, **self._draft.maps()}
        return Model(tensors, maps)

    def abandon(self) -> None:
        """As Stages.abandon. What comes next begins with the checkpoint's first tensor."""
        for model in self._begun:
            model.again()
        self._begun.clear()

    def listen(self, listener: Listener | None, written: frozenset[str]) -> None:
        """As Stages.listen, before anything is loaded in the pass."""
        self._listener = listener
        self._replayed = [self._target] if any(not name.startswith(DRAFT) for name in written) else []
        if self._draft is not None and any(name.startswith(DRAFT) for name in written):
            self._replayed.append(self._draft)

    def _replaying(self, names: Sequence[str]) -> None:
        for model in self._replayed:
            self._begin(model)
            model.replaying(names)

    def _staged(self, layer: str) -> StagedLayer:
        draft = self._draft is not None and layer.startswith(DRAFT)
        return (self._draft if draft and self._draft is not None else self._target).staged(layer)

    def open(self, layer: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """As Stages.open."""
        return self._staged(layer).open(names)

    def finish_layer(self, layer: str) -> None:
        """As Stages.finish_layer."""
        with default_dtype(self._dtype):
            self._staged(layer).finish()

    def settle(self) -> None:
        """As Stages.settle."""
        with default_dtype(self._dtype):
            for model in self._filled():
                model.settle()

    @property
    def replaced(self) -> frozenset[str]:
        """As Stages.replaced."""
        return frozenset(name for model in self._begun for name in model.replaced)

    # -------------------------------------------------------------------------------------------------------------------------

    def _begin(self, model: Reload) -> None:
        if model not in self._begun:
            self._begun.append(model)
            with default_dtype(self._dtype):
                model.begin(self._listener)

    def _filled(self) -> list[Reload]:
        """Models that anything was sent for. The others are put back as they were."""
        filled = [model for model in self._begun if model is self._target or model.touched]
        for model in self._begun:
            if model not in filled:
                model.abort()
        return filled

    def _load(self, model: Reload, weights: Weights) -> None:
        self._begin(model)
        model.load(weights)

    def finish(self) -> None:
        """As Reload.finish. Raises MissingWeightsError when nothing at all was sent."""
        if not self._begun:
            raise MissingWeightsError("the checkpoint is empty")
        with default_dtype(self._dtype):
            for model in self._filled():
                model.finish()

    def abort(self) -> None:
        """As Reload.abort."""
        for model in self._begun:
            model.abort()

    def report(self) -> dict[str, Any]:
        """layers: how many of the target were loaded which way; draft_layers: of the draft, {} when it was left as it was;
        staged_peak_bytes: what staged layers held at most, beside the models."""
        draft = self._draft
        taken = dict(draft.ways) if draft in self._begun and draft is not None and draft.touched else {}
        peak = self._target.peak_bytes + (draft.peak_bytes if draft is not None else 0)
        return {"layers": dict(self._target.ways), "draft_layers": taken, "staged_peak_bytes": peak}


def split(weights: Weights) -> tuple[Weights, Weights]:
    """The target's tensors, and the draft's without what says so."""
    own = [(name, tensor) for name, tensor in weights if not name.startswith(DRAFT)]
    if len(own) == len(weights):
        return own, []
    return own, [(name.removeprefix(DRAFT), tensor) for name, tensor in weights if name.startswith(DRAFT)]


def draft_of(runner: Any) -> torch.nn.Module | None:
    """The draft model of a model runner of vLLM's. None: it has none, or one without weights of its own (n-grams)."""
    if callable(get := getattr(runner, "get_draft_model", None)):  # not in 0.26
        model = get()
    else:
        drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
        model = getattr(drafter, "model", None)
        unwrap = getattr(model, "unwrap", None)  # a wrapper of CUDA graphs
        model = unwrap() if callable(unwrap) else model
    return model if isinstance(model, torch.nn.Module) and hasattr(model, "load_weights") else None


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As while vLLM loads: some post-processing makes kernels for what torch's default is then."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def completeness_unchecked() -> Iterator[None]:
    """MTP models of some versions of vLLM want all their layers in every call, and a bucket need not have any."""
    try:
        disabled = import_module("vllm.model_executor.model_loader.mtp_validation").disable_mtp_completeness_check
    except (ImportError, AttributeError):
        yield
        return
    with disabled():
        yield
