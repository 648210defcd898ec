"""What the embedded engine computes, against transformers used directly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertModel

from checkpoint_engine.cli.demo.checkpoint import read_checkpoint
from checkpoint_engine.engines.embedded.model import ServedModel
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
        served.generate(ids, 1)
