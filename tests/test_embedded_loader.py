"""Loading into a model in place: names, ties, prefixes, and what is refused before a byte is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint_engine.cli.demo.checkpoint import read_checkpoint
from checkpoint_engine.engines.embedded.loader import LoadPass, Targets, expected_digests, tensor_digest
from checkpoint_engine.engines.embedded.model import ServedModel
from checkpoint_engine.errors import CheckpointError, SettingsError, TensorError
from embedded_support import save_bert, save_llama


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def _load_all(model: ServedModel, checkpoint: dict[str, torch.Tensor]) -> None:
    load = LoadPass(model.targets)
    for pair in checkpoint.items():
        load.load([pair])
    load.finish()


@pytest.mark.parametrize("which", ["bert", "llama"])
def test_bit_exact_and_in_place(which: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(which)
    checkpoint = read_checkpoint(directory)
    model = ServedModel.load(directory, "dummy")
    addresses = {n: p.data_ptr() for n, p in model.module.named_parameters()}
    expected = expected_digests(model.targets, checkpoint)
    assert model.targets.digests() != expected
    _load_all(model, checkpoint)
    assert model.targets.digests() == expected
    assert addresses == {n: p.data_ptr() for n, p in model.module.named_parameters()}
    assert ServedModel.load(directory).targets.digests() == expected


def test_nan_payloads_and_negative_zero_survive() -> None:
    module = torch.nn.Linear(2, 1, bias=False)
    bits = torch.tensor([[0x7FC01234, -0x80000000]], dtype=torch.int32)
    load = LoadPass(Targets(module))
    load.load([("weight", bits.view(torch.float32))])
    load.finish()
    assert torch.equal(module.weight.detach().view(torch.int32), bits)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bool, torch.int8, torch.complex64, torch.bfloat16])
def test_any_dtype(dtype: torch.dtype) -> None:
    module = torch.nn.Module()
    module.register_buffer("x", torch.zeros(3).to(dtype))
    module.register_buffer("scalar", torch.zeros(()).to(dtype))
    source = torch.tensor([1.0, 0.0, 1.0]).to(dtype)
    LoadPass(Targets(module)).load([("x", source), ("scalar", source[0])])
    assert tensor_digest(module.x) == tensor_digest(source) and tensor_digest(module.scalar) == tensor_digest(source[0])


def test_prefix_that_the_checkpoint_has_or_lacks(bert: Path, llama: Path) -> None:
    model = ServedModel.load(bert, "dummy")
    checkpoint = read_checkpoint(bert)
    _load_all(model, {f"bert.{n}": t for n, t in checkpoint.items()})
    assert model.targets.digests() == expected_digests(model.targets, checkpoint)
    causal = ServedModel.load(llama, "dummy")
    checkpoint = read_checkpoint(llama)
    assert all(n.startswith("model.") for n in checkpoint)
    _load_all(causal, {n.removeprefix("model."): t for n, t in checkpoint.items()})
    assert causal.targets.digests() == expected_digests(causal.targets, checkpoint)


def test_tied_weights(llama: Path) -> None:
    model = ServedModel.load(llama, "dummy")
    checkpoint = read_checkpoint(llama)
    assert "lm_head.weight" not in checkpoint
    embedding = checkpoint.pop("model.embed_tokens.weight")
    _load_all(model, {**checkpoint, "lm_head.weight": embedding})
    _load_all(model, {**checkpoint, "lm_head.weight": embedding, "model.embed_tokens.weight": embedding.clone()})
    with pytest.raises(TensorError, match=r"lm_head.weight.*ties"):
        _load_all(model, {**checkpoint, "model.embed_tokens.weight": embedding, "lm_head.weight": embedding + 1})


def test_untied_weights_are_both_needed(tmp_path: Path) -> None:
    model = ServedModel.load(save_llama(tmp_path, tied=False), "dummy")
    checkpoint = read_checkpoint(tmp_path)
    del checkpoint["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"lacks 1 of \d+ parameters: lm_head.weight"):
        _load_all(model, checkpoint)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("nothing.weight", lambda t: t, "no tensor of this name"),
        ("embeddings.LayerNorm.bias", lambda t: t[:-1], "shape"),
        ("embeddings.LayerNorm.bias", lambda t: t.half(), "dtype"),
    ],
)
def test_refused_before_anything_of_the_bucket_is_written(bert: Path, name: str, change: object, reason: str) -> None:
    model = ServedModel.load(bert, "dummy")
    before = model.targets.digests()
    good = read_checkpoint(bert)["embeddings.LayerNorm.bias"]
    load = LoadPass(model.targets)
    with pytest.raises(TensorError, match=reason) as e:
        load.load([("embeddings.LayerNorm.weight", good), (name, change(good))])  # type: ignore[operator]
    assert e.value.tensor == name and not load.began
    assert model.targets.digests() == before


def test_dtype_comes_from_the_configuration_or_the_files(bert: Path, llama: Path) -> None:
    assert ServedModel.load(llama, "dummy").module.dtype == torch.bfloat16
    assert ServedModel.load(bert, "dummy").module.dtype == torch.float32


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"config\.json"):
        ServedModel.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nothing of this name"}')
    with pytest.raises(SettingsError, match="cannot load"):
        ServedModel.load(tmp_path)
    with pytest.raises(SettingsError, match="no safetensors"):
        read_checkpoint(tmp_path)
