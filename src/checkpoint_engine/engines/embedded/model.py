"""The model that the embedded engine serves: sentence embeddings, or generation, greedy or sampled."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from checkpoint_engine.engines.embedded.loader import Targets
from checkpoint_engine.errors import SettingsError

LoadFormat = Literal["auto", "dummy"]
Kind = Literal["embed", "generate"]


@dataclass(frozen=True, slots=True)
class Generated:
    """output_ids: only what was generated; text: None without a tokenizer."""

    output_ids: list[int]
    text: str | None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. temperature 0: greedy; else from the `top_k` likeliest (-1: all) that make up `top_p`.

    seed: of all prompts of one call together, as torch's generator takes it; None: another one each time.
    """

    max_new_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int | None = None


class ServedModel:
    """A transformers model on the CPU, in evaluation mode. Its methods are called by one thread at a time.

    kind       "generate" when the configuration names a causal language model, else "embed"
    tokenizer  None when the directory has none; inputs are then lists of token ids
    targets    where tensors of a checkpoint go
    """

    def __init__(self, module: Any, tokenizer: Any, kind: Kind, max_tokens: int | None = None) -> None:
        self.module, self.tokenizer, self.kind, self.max_tokens = module.eval().requires_grad_(False), tokenizer, kind, max_tokens
        self.targets = Targets(module)

    @classmethod
    def load(
        cls, directory: Path, load_format: LoadFormat = "auto", state_dict: dict[str, torch.Tensor] | None = None
    ) -> ServedModel:
        """The model of a Hugging Face directory. "dummy": random weights; `state_dict`: these instead of the directory's.

        Raises SettingsError when the directory is no model or transformers cannot load it.
        """
        if not (directory / "config.json").is_file():
            raise SettingsError(f"{directory} holds no config.json")
        try:
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
            causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) & set(config.architectures or ())
            kind: Kind = "generate" if causal else "embed"
            auto: Any = AutoModelForCausalLM if causal else AutoModel
            dtype = config.dtype or _dtype_of_files(directory)
            if load_format == "dummy":
                module = auto.from_config(config, dtype=dtype)
            elif state_dict is None:
                module = auto.from_pretrained(directory, config=config, dtype=dtype, local_files_only=True)
            else:  # the automatic classes insist on a directory
                concrete: Any = type(auto.from_config(config, dtype=dtype))
                module = concrete.from_pretrained(None, config=config, dtype=dtype, state_dict=state_dict)
            has_tokenizer = any((directory / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.txt"))
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True) if has_tokenizer else None
        except (OSError, ValueError, KeyError, ImportError) as e:
            raise SettingsError(f"{directory}: transformers cannot load this model: {e}") from e
        return cls(module, tokenizer, kind, _max_tokens(directory, config))

    def embed(self, inputs: Sequence[str | list[int]]) -> list[list[float]]:
        """One vector of length 1 per input: the mean of the last hidden states over its tokens, normalised.

        Inputs longer than `max_tokens` are cut. Raises SettingsError for text without a tokenizer.
        """
        ids, mask = self._batch(inputs)
        with torch.inference_mode():
            hidden = self.module(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
            vectors: list[list[float]] = torch.nn.functional.normalize(mean, dim=1).tolist()
        return vectors

    def generate(self, prompts: Sequence[str | list[int]], sampling: Sampling = Sampling()) -> list[Generated]:
        """A continuation of each prompt, computed together; one ends early at the model's end-of-sequence token.

        Raises SettingsError for text without a tokenizer.
        """
        ids, mask = self._batch(prompts, pad_left=True)
        eos = self.module.generation_config.eos_token_id
        ends = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
        own = self.module.generation_config.pad_token_id
        pad = own if own is not None else min(ends, default=0)
        chosen: dict[str, Any] = {"do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            chosen |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": max(0, sampling.top_k)}
        how = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=sampling.max_new_tokens, eos_token_id=eos, pad_token_id=pad, **chosen
        )
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)
            out = self.module.generate(input_ids=ids, attention_mask=mask, generation_config=how)
        return [self._made(row, ends) for row in out[:, ids.shape[1] :].tolist()]

    def _made(self, row: list[int], ends: set[int]) -> Generated:
        """Without what pads a prompt that ended before the others."""
        length = next((i for i, token in enumerate(row, 1) if token in ends), len(row))
        text = self.tokenizer.decode(row[:length], skip_special_tokens=True) if self.tokenizer is not None else None
        return Generated(row[:length], text)

    def _batch(self, inputs: Sequence[str | list[int]], pad_left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(inputs[0], str):
            if self.tokenizer is None:
                raise SettingsError("this model has no tokenizer: send lists of token ids")
            rows = self.tokenizer(list(inputs), truncation=self.max_tokens is not None, max_length=self.max_tokens)["input_ids"]
        else:
            rows = [list(row)[: self.max_tokens] for row in inputs]
        vocabulary = self.module.config.get_text_config().vocab_size
        for row in rows:
            if not row or not all(0 <= token < vocabulary for token in row):
                raise SettingsError(f"each input needs at least one token, each token id must be in [0, {vocabulary})")
        ids, mask = torch.zeros(2, len(rows), max(map(len, rows)), dtype=torch.long)
        for row, own_ids, own_mask in zip(rows, ids, mask, strict=True):
            place = slice(-len(row), None) if pad_left else slice(len(row))
            own_ids[place], own_mask[place] = torch.tensor(row), 1
        return ids, mask


def _dtype_of_files(directory: Path) -> torch.dtype:
    """The first floating dtype in the directory's files: what a configuration that names none means. float32 without files."""
    from safetensors import safe_open

    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            for name in f.keys():  # noqa: SIM118  (not a mapping)
                dtype: torch.dtype = f.get_tensor(name).dtype
                if dtype.is_floating_point:
                    return dtype
    return torch.float32


def _max_tokens(directory: Path, config: Any) -> int | None:
    """sentence-transformers' own limit where there is one, else the model's positions."""
    file = directory / "sentence_bert_config.json"
    limit = json.loads(file.read_text()).get("max_seq_length") if file.is_file() else None
    limit = limit or getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None
