"""What the embedded engine computes, against transformers used directly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertModel

from checkpoint_engine.cli.demo.checkpoint import read_checkpoint
from checkpoint_engine.engines.embedded.model import Sampling, ServedModel
from checkpoint_engine.errors import SettingsError
from embedded_support import save_bert, save_llama

TEXTS = ["the cat sat on a mat", "dog", "a fast dog ran"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


def test_embeddings_are_normalised_means(bert: Path) -> None:
    model, tokenizer = BertModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    served = ServedModel.load(bert)
    assert served.embed(TEXTS) == expected.tolist()
    assert served.embed(tokenizer(TEXTS)["input_ids"]) == expected.tolist()


def test_long_inputs_are_cut(bert: Path) -> None:
    served = ServedModel.load(bert)
    assert served.max_tokens == 16
    assert served.embed(["cat " * 50]) == served.embed(["cat " * 16]) == served.embed([[4] * 50])


def test_weights_given_instead_of_the_directorys(bert: Path, tmp_path: Path) -> None:
    other = read_checkpoint(save_bert(tmp_path, seed=2))
    served = ServedModel.load(bert, state_dict=other)
    assert served.embed(TEXTS) == ServedModel.load(tmp_path).embed(TEXTS) != ServedModel.load(bert).embed(TEXTS)


@pytest.mark.parametrize("ids", [[], [32], [-1]])
def test_token_ids_that_the_model_does_not_have(tmp_path: Path, ids: list[int]) -> None:
    served = ServedModel.load(save_llama(tmp_path), "dummy")
    with pytest.raises(SettingsError, match="token"):
        served.generate([ids])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return ServedModel.load(save_llama(tmp_path_factory.mktemp("llama"), dtype=torch.float32))


def test_prompts_of_several_lengths_are_answered_as_each_alone(llama: ServedModel) -> None:
    """Among them one that ends early: what pads it is not part of its answer."""
    prompts: list[str | list[int]] = [[3], [4, 5, 6, 7, 8], [9, 10]]
    alone = [llama.generate([prompt], Sampling(12))[0] for prompt in prompts]
    llama.module.generation_config.eos_token_id = alone[1].output_ids[3]
    try:
        together = llama.generate(prompts, Sampling(12))
        assert together == [llama.generate([prompt], Sampling(12))[0] for prompt in prompts]
        assert together[1].output_ids == alone[1].output_ids[: alone[1].output_ids.index(alone[1].output_ids[3]) + 1]
    finally:
        llama.module.generation_config.eos_token_id = 2


def test_sampling_is_from_the_models_own_distribution(llama: ServedModel) -> None:
    """All of it (transformers' own default is the 50 likeliest), at the temperature, which is what a policy gradient needs."""
    many = llama.generate([[3, 4]] * 4096, Sampling(1, temperature=0.5, seed=7))
    counts = torch.bincount(torch.tensor([made.output_ids[0] for made in many]), minlength=32)
    with torch.no_grad():
        expected = torch.softmax(llama.module(torch.tensor([[3, 4]])).logits[0, -1] / 0.5, 0) * 4096
    assert ((counts - expected).square() / expected).sum() < 75  # chi-squared of 31 degrees of freedom: 62 in one of 1000
    one = llama.generate([[3, 4]] * 64, Sampling(1, temperature=0.5, top_k=1, seed=7))
    assert {made.output_ids[0] for made in one} == {int(expected.argmax())}


def test_seeds(llama: ServedModel) -> None:
    """The same seed, the same tokens; without one, others each time; nobody else's generator is touched."""
    before = torch.get_rng_state()
    made = [llama.generate([[3], [4]], Sampling(16, temperature=2.0, seed=seed)) for seed in (1, 1, 2, None, None)]
    assert made[0] == made[1]
    assert len({str(m) for m in made}) == 4
    assert torch.equal(before, torch.get_rng_state())
