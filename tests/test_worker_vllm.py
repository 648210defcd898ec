"""What of the vLLM worker extension can be said without vLLM; with it: tests/vllm_cpu."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import pytest
import torch

from checkpoint_engine.worker import VllmColocateWorkerExtension
from checkpoint_engine.worker.vllm_layers import EMBEDDING, EXPERTS, LINEAR, LayerFacts, Way, choose_way
from checkpoint_engine.worker.vllm_models import default_dtype, draft_of, split
from checkpoint_engine.worker.vllm_parts import Part, Parts, WatchedLayer, has_parts, muted, said
from checkpoint_engine.worker.vllm_reload import MissingWeightsError, Reload, without_tied

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


class Experts(torch.nn.Module):
    """Ranks have two of the four experts each, as under expert parallelism."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.moe_config = type("Moe", (), {"num_experts": 4, "is_act_and_mul": True})
        self._first = 2 * rank

    def _map_global_expert_id_to_local_expert_id(self, expert: int) -> int:
        return expert - self._first if 0 <= expert - self._first < 2 else -1


class Merged(torch.nn.Module):
    output_sizes: ClassVar = [8, 4]


@pytest.mark.parametrize(
    ("layer", "parameter", "seen", "missing"),
    [
        (Merged(), "weight", [(None, 0)], [(None, 1)]),
        (Merged(), "weight", [(None, 1), (None, 0)], []),
        (Merged(), "weight", [(None, None)], []),
        (torch.nn.Linear(2, 2), "weight", [(None, "q"), (None, "v")], [(None, "k")]),
        (torch.nn.Linear(2, 2), "weight", [(None, "index_q")], []),
        (Experts(0), "w2_weight", [(e, "w2") for e in (0, 2, 3)], [(1, "w2")]),
        (Experts(1), "w2_weight", [(e, "w2") for e in (2, 3)], []),
        (Experts(0), "w13_weight", [(0, "w1"), (0, "w3"), (1, "w1")], [(1, "w3")]),
        (Experts(0), "w13_weight_scale", [(0, "w1"), (1, "w1")], [(0, "w3"), (1, "w3")]),
        (Experts(0), "w2_weight", [(None, "w2")], []),
        (torch.nn.Linear(2, 2), "weight", [(5, "w2")], []),
    ],
)
def test_parts_that_were_not_sent(layer: torch.nn.Module, parameter: str, seen: list[Part], missing: list[Part]) -> None:
    parts = Parts("layer", layer)
    for expert, shard in seen:
        parts.note(parameter, {"loaded_weight": torch.zeros(2, 2), "shard_id": shard, "expert_id": expert})
    assert parts.seen
    assert parts.missing == [f"layer.{parameter} ({said(part)})" for part in missing]


def test_an_expert_that_is_smaller_than_the_others() -> None:
    """As if the rest of it were padding, vLLM would leave there what there was."""
    parts = Parts("layer", Experts(0))
    parts.note("w2_weight", {"loaded_weight": torch.zeros(4, 2), "shard_id": "w2", "expert_id": 0})
    parts.note("w13_weight", {"loaded_weight": torch.zeros(2, 4), "shard_id": "w1", "expert_id": 0})
    parts.note("w13_weight", {"loaded_weight": torch.zeros(4, 4), "shard_id": ["w1", "w3"], "expert_id": 1})
    with pytest.raises(ValueError, match=r"its shape is \(4, 1\), that of the experts before it \(4, 2\)"):
        parts.note("w2_weight", {"loaded_weight": torch.zeros(4, 1), "shard_id": "w2", "expert_id": 1})


class Renaming(torch.nn.Module):
    """Its load_weights tells other names than its parameters have, as vLLM 0.26 does of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts(0)
        self.experts.weight = torch.nn.Parameter(torch.zeros(4, 2), requires_grad=False)
        self.norm = torch.nn.Parameter(torch.zeros(2), requires_grad=False)

        def loader(param: torch.Tensor, loaded_weight: torch.Tensor, shard_id: str, expert_id: int) -> None:
            param.data[expert_id].copy_(loaded_weight)

        setattr(self.experts.weight, "weight_loader", loader)  # noqa: B010

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        told = set()
        for name, tensor in weights:
            if name == "norm":
                self.norm.data.copy_(tensor)
                told.add(name)
            else:
                vars(self.experts.weight)["weight_loader"](self.experts.weight, tensor, "w2", int(name))
                told.add("experts.routed.weight")
        return told


def test_what_was_sent_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoint_engine.worker.vllm_reload.facts", lambda layer: LayerFacts(None, ""))
    for asked in ("is_attention", "has_scales"):
        monkeypatch.setattr(f"checkpoint_engine.worker.vllm_reload.{asked}", lambda layer: False)
    model, whole = Renaming(), [("norm", torch.ones(2)), *[(str(expert), torch.ones(2)) for expert in (0, 1)]]
    for sent, missing in (
        (whole, ""),
        (whole[1:], "'norm'"),
        (whole[:1], "'experts.weight'"),
        (whole[:2], r"'experts.weight \(expert 1, part w2\)'"),
    ):
        reload = Reload(model, None)
        reload.begin()
        reload.load(sent)
        if missing:
            with pytest.raises(MissingWeightsError, match=f"^nothing was sent for {missing}"):
                reload.settle()
        else:
            reload.settle()
        reload.abort()


def test_nothing_was_sent() -> None:
    parts = Parts("layer", Merged())
    assert not parts.seen
    assert parts.missing == []


def test_tensor_of_all_experts_or_of_several_parts() -> None:
    parts = Parts("layer", Experts(0))
    parts.note("w2_weight", {"loaded_weight": torch.zeros(4, 2, 2), "shard_id": "w2", "expert_id": 0})
    assert parts.missing == []
    parts = Parts("layer", Merged())
    parts.note("weight", {"loaded_weight": torch.zeros(2, 2), "loaded_shard_id": (0, 1)})
    assert parts.missing == []


def merged_with_loader() -> tuple[Any, list[Any]]:
    layer: Any = Merged()
    calls: list[Any] = []
    layer.weight = torch.nn.Parameter(torch.zeros(12, 2, dtype=torch.bfloat16), requires_grad=False)

    def load(param: torch.Tensor, loaded_weight: torch.Tensor, loaded_shard_id: int | None = None) -> None:
        calls.append(loaded_shard_id)
        param.data[: loaded_weight.shape[0]].copy_(loaded_weight)

    layer.weight.weight_loader = load
    return layer, calls


def test_watched_layer_has_its_loaders_back() -> None:
    layer, calls = merged_with_loader()
    before = layer.weight.weight_loader
    watched = WatchedLayer("mlp.gate_up_proj", layer)
    watched.prepare()
    layer.weight.weight_loader(layer.weight, torch.ones(8, 2), 0)
    assert watched.parts.missing == ["mlp.gate_up_proj.weight (part 1)"]
    layer.weight.weight_loader(layer.weight, loaded_weight=torch.ones(4, 2), loaded_shard_id=1)
    assert watched.parts.missing == []
    watched.put_back()
    assert layer.weight.weight_loader is before
    assert calls == [0, 1]
    assert layer.weight[0, 0] == 1


def test_muted_layer_takes_nothing() -> None:
    layer, calls = merged_with_loader()
    plain: Any = torch.nn.LayerNorm(2)
    before = layer.weight.weight_loader
    with muted([layer, plain]):
        layer.weight.weight_loader(layer.weight, torch.ones(8, 2), 0)
        plain.weight.weight_loader(plain.weight, torch.zeros(2))
    assert calls == []
    assert plain.weight[0] == 1
    assert layer.weight.weight_loader is before
    assert not hasattr(plain.weight, "weight_loader")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_quantized_tensor_for_a_parameter_that_is_not(dtype: torch.dtype) -> None:
    layer, calls = merged_with_loader()
    watched = WatchedLayer("layer", layer)
    watched.prepare()
    with pytest.raises(ValueError, match=f"it is {str(dtype)[6:]}, and this engine holds bfloat16 there"):
        layer.weight.weight_loader(layer.weight, torch.zeros(8, 2, dtype=dtype), 0)
    assert calls == []


def test_which_layers_are_filled_by_several_tensors() -> None:
    assert has_parts(Merged())
    assert has_parts(Experts(0))
    assert not has_parts(torch.nn.Linear(2, 2))


def test_split_of_targets_and_drafts() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    assert split([("model.a", one)]) == ([("model.a", one)], [])
    assert split([("draft.model.a", two), ("model.a", one)]) == ([("model.a", one)], [("model.a", two)])


def test_default_dtype_is_put_back() -> None:
    before = torch.get_default_dtype()
    with default_dtype(torch.bfloat16):
        assert torch.zeros(1).dtype == torch.bfloat16
    assert torch.get_default_dtype() == before


class Runner:
    def __init__(self, drafter: Any) -> None:
        self.drafter = drafter


class NewRunner(Runner):
    def get_draft_model(self) -> Any:
        return getattr(self.drafter, "model", None)


class Draft(torch.nn.Module):
    def load_weights(self, weights: Any) -> set[str]:
        return set()


@pytest.mark.parametrize("runner", [Runner, NewRunner])
def test_draft_of_a_runner(runner: type[Runner]) -> None:
    draft = Draft()
    assert draft_of(runner(type("Drafter", (), {"model": draft}))) is draft
    assert draft_of(runner(type("NGrams", (), {}))) is None
    assert draft_of(runner(None)) is None
    assert draft_of(object()) is None


def test_draft_within_a_wrapper_of_graphs() -> None:
    draft = Draft()
    wrapper = type("Wrapper", (), {"unwrap": lambda self: draft})()
    assert draft_of(Runner(type("Drafter", (), {"model": wrapper}))) is draft
