"""What an update of a vLLM worker fills: the model that answers and, where it speculates, the draft beside it.

A draft of the same checkpoint (MTP) is offered the whole stream, as vLLM's loader offers it the whole checkpoint, and takes
what is its own. The names in any other draft's checkpoint may be the target's as well, so it gets the tensors that are sent
as `draft.` + their name, and only those.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from checkpoint_engine.errors import TensorError
from checkpoint_engine.loads.recordable import Recordable
from checkpoint_engine.worker.vllm_reload import MissingWeightsError, Reload

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
        self._module, self._alone = target, draft is None
        self._target = Reload(target, worker.model_config)
        self._draft = Reload(draft, config, other=target) if draft is not None and config is not None else None
        self._together = config is not None and config.model == worker.model_config.model
        self._dtype: torch.dtype = worker.model_config.dtype
        self._begun: list[Reload] = []

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

    @property
    def recordable(self) -> Recordable | None:
        """The model, if loads into it may be recorded: it has no draft, and post-processing changes none of its layers."""
        return Recordable(self._module, replaying=self._replaying) if self._alone and self._target.bare else None

    def _replaying(self, names: Sequence[str]) -> None:
        self._begin(self._target)
        self._target.replaying(names)

    def _begin(self, model: Reload) -> None:
        if model not in self._begun:
            self._begun.append(model)
            model.begin()

    def _load(self, model: Reload, weights: Weights) -> None:
        self._begin(model)
        model.load(weights)

    def finish(self) -> None:
        """As Reload.finish. Raises MissingWeightsError when nothing at all was sent."""
        if not self._begun:
            raise MissingWeightsError("the checkpoint is empty")
        with default_dtype(self._dtype):
            for model in self._begun:
                if model is self._target or model.touched:
                    model.finish()
                else:
                    model.abort()

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
