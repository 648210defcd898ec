"""Bodies of the embedded engine's requests and answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Tokens = Annotated[list[int], Field(min_length=1, max_length=1 << 20)]


class EmbedRequest(BaseModel):
    """input: texts, or lists of token ids."""

    input: Annotated[list[str] | list[Tokens], Field(min_length=1, max_length=4096)]


class EmbedResponse(BaseModel):
    """One vector per input; version: of the weights that made them, None for the first ones."""

    embeddings: list[list[float]]
    version: str | None


class SamplingParams(BaseModel):
    """Of SGLang's these; others are accepted and have no effect. Greedy unless a temperature is given, unlike SGLang."""

    model_config = ConfigDict(extra="ignore")
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 16
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    sampling_seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None


class GenerateRequest(BaseModel):
    """Either text or input_ids, of one prompt or of several. sampling_seed: of all of them together."""

    text: str | Annotated[list[str], Field(min_length=1, max_length=4096)] | None = None
    input_ids: Tokens | Annotated[list[Tokens], Field(min_length=1, max_length=4096)] | None = None
    sampling_params: SamplingParams = SamplingParams()


class GenerateResponse(BaseModel):
    """Of one prompt; several are answered with a list."""

    text: str | None
    output_ids: list[int]
    version: str | None


class WeightsResponse(BaseModel):
    version: str | None
    dirty: bool


class PauseRequest(BaseModel):
    """SGLang's. A request here is computed as a whole, so retract and in_place are the same: one that computes is finished."""

    mode: Literal["abort", "retract", "in_place"] = "abort"


class UpdateRequest(BaseModel):
    """SGLang's, and `worker_index`, which a leader adds for each of its followers: their place among the handles."""

    zmq_handles: Annotated[dict[str, str], Field(min_length=1, max_length=65536)]
    flush_cache: bool = True
    weight_version: str | None = None
    worker_index: Annotated[int, Field(ge=0)] | None = None


class UpdateResponse(BaseModel):
    success: bool
    message: str
