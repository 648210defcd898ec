"""What of the vLLM worker extension can be said without vLLM; with it: tests/vllm_cpu."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from checkpoint_engine.worker import VllmColocateWorkerExtension
from checkpoint_engine.worker.vllm_layers import EMBEDDING, EXPERTS, LINEAR, LayerFacts, Way, choose_way
from checkpoint_engine.worker.vllm_reload import without_tied

FP8 = "vllm.model_executor.layers.quantization.fp8.Fp8LinearMethod"


@pytest.mark.parametrize(
    ("layer", "way"),
    [
        (LayerFacts(None, ""), Way.BARE),
        (LayerFacts(LINEAR, "cuda"), Way.BARE),
        (LayerFacts(LINEAR, "cpu"), Way.STAGE),
        (LayerFacts(LINEAR, "rocm"), Way.STAGE),
        (LayerFacts(EMBEDDING, "cuda"), Way.BARE),
        (LayerFacts(EMBEDDING, "cpu"), Way.REFRESH),
        (LayerFacts(EXPERTS, "cuda", "TRITON"), Way.BARE),
        (LayerFacts(EXPERTS, "cuda", "FLASHINFER_TRTLLM"), Way.STAGE),
        (LayerFacts(EXPERTS, "cuda", "FLASHINFER_CUTLASS"), Way.STAGE),
        (LayerFacts(EXPERTS, "cuda", None), Way.STAGE),
        (LayerFacts(EXPERTS, "cpu", "CPU"), Way.STAGE),
        (LayerFacts(FP8, "cuda"), Way.STAGE),
        (LayerFacts("somebody.elses.Method", "cuda", "TRITON"), Way.STAGE),
        (LayerFacts("vllm.model_executor.layers.quantization.fp8.Fp8KVCacheMethod", "cuda", None, True), Way.BARE),
    ],
)
def test_way(layer: LayerFacts, way: Way) -> None:
    chosen, reason = choose_way(layer)
    assert chosen is way
    assert reason


class Config:
    def __init__(self, tied: bool, untied: bool = False) -> None:
        self.hf_text_config = type("Text", (), {"tie_word_embeddings": tied})
        self.word_embeddings_untied_by_checkpoint = untied


@pytest.mark.parametrize(
    ("config", "kept"), [(Config(True), 1), (Config(False), 2), (Config(True, untied=True), 2), (object(), 2)]
)
def test_copy_of_a_shared_table(config: Any, kept: int) -> None:
    weights = [("model.embed_tokens.weight", torch.zeros(1)), ("lm_head.weight", torch.zeros(1))]
    assert without_tied(config, weights) == weights[:kept]


class Worker(VllmColocateWorkerExtension):
    def __init__(self, rank: int) -> None:
        self.rank, self.local_rank, self.device = rank, rank, torch.device("cpu")


def test_no_handle_is_an_answer_not_an_exception() -> None:
    worker = Worker(2)
    answer = worker.update_weights_from_ipc({"CPU-a-0": "h0", "CPU-a-1": "h1"})
    assert (answer["ok"], answer["error"]) == (False, "no handle for rank 2: there are 2")
    assert worker.weights_status() == {"rank": 2, "version": None, "dirty": False}
    assert {key: answer[key] for key in ("rank", "version", "dirty")} == worker.weights_status()


def test_names_that_vllm_could_have_itself() -> None:
    """vLLM refuses an extension one of whose names its worker has."""
    ours = {name for name in dir(VllmColocateWorkerExtension) if not name.startswith(("__", "_checkpoint_engine_"))}
    assert ours == {"update_weights_from_ipc", "weights_status"}
