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
    """Generation is greedy; other sampling parameters are accepted and have no effect."""

    model_config = ConfigDict(extra="ignore")
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 16


class GenerateRequest(BaseModel):
    """Either text or input_ids."""

    text: str | None = None
    input_ids: Tokens | None = None
    sampling_params: SamplingParams = SamplingParams()


class GenerateResponse(BaseModel):
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
