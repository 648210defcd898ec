"""What right answers are: made in the demo's own process by transformers, which loads the checkpoint itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import torch

from checkpoint_engine.cli.demo.client import ask
from checkpoint_engine.engines.embedded.loader import expected_digests
from checkpoint_engine.engines.embedded.model import ServedModel

PAIRS = [
    ("A man is eating food.", "A man is eating a piece of bread."),
    ("The cat sits outside.", "A kitten is sitting in the garden."),
    ("The new movie is awesome.", "The weather in Lisbon is mild in March."),
]
PROMPTS = ["The capital of France is", "Once upon a time"]


class Reference:
    """Right answers for one checkpoint. `tensors`: name -> tensor, as read by safetensors."""

    def __init__(self, directory: Path, tensors: dict[str, torch.Tensor], from_files: bool) -> None:
        model = ServedModel.load(directory, "auto", None if from_files else dict(tensors))
        # Same kernels as in the engines: whole files are mapped as they lie, which may be less aligned than a tensor of its own.
        for parameter in model.module.parameters():
            parameter.data = parameter.data.clone()
        self.kind = model.kind
        self.inputs: list[Any] = questions(model)
        self.digests = expected_digests(model.targets, tensors)
        if model.kind == "embed":
            self.answers: list[Any] = model.embed(self.inputs)
        else:
            self.answers = [model.generate([prompt])[0].output_ids for prompt in self.inputs]
        self.decode = None if model.tokenizer is None else model.tokenizer.decode

    def check(self, client: httpx.Client, url: str, version: str) -> dict[str, Any]:
        """Compare the engine at `url`: parameters (bit for bit), answers (exactly), version. `different`: parameters' names."""
        found = client.get(f"{url}/v1/parameters/digest").raise_for_status().json()
        answers, said = ask(client, url, self.kind, self.inputs)
        different = sorted(n for n in found.keys() | self.digests.keys() if found.get(n) != self.digests.get(n))
        return {
            "engine": url,
            "parameters": len(found),
            "different": different,
            "parameters_equal": not different,
            "answers_equal": answers == self.answers,
            "version_equal": said == version,
            "shown": self.show(answers),
        }

    def show(self, answers: list[Any]) -> list[Any]:
        """What a person can judge: cosine similarities of the pairs (vectors have length 1), or generated text."""
        if self.kind == "embed":
            return [sum(x * y for x, y in zip(a, b, strict=True)) for a, b in zip(answers[::2], answers[1::2], strict=True)]
        return [self.decode(a) if self.decode is not None else a for a in answers]


def questions(model: ServedModel) -> list[Any]:
    """Texts, or lists of token ids for a model without a tokenizer; for embeddings the pairs one after the other."""
    if model.tokenizer is not None:
        return [text for pair in PAIRS for text in pair] if model.kind == "embed" else list(PROMPTS)
    vocabulary = model.module.config.get_text_config().vocab_size
    return [[(7 * i + 3 * j + 1) % vocabulary for j in range(5)] for i in range(2 * len(PAIRS) if model.kind == "embed" else 2)]


def labels(kind: str, inputs: list[Any]) -> list[str]:
    """One for each entry of `Reference.show`."""
    texts = [str(i) for i in inputs]
    return [f"{a} | {b}" for a, b in zip(texts[::2], texts[1::2], strict=True)] if kind == "embed" else texts
