"""Bodies of requests to REST, with the examples that its OpenAPI schema shows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from checkpoint_engine.engines.base import PauseMode
from checkpoint_engine.engines.rollout import FailurePolicy, OnFailure
from checkpoint_engine.http.commands import EngineSpec, RollOut

Rank = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0, le=86400)]
Name = Annotated[str, Field(min_length=1, max_length=512)]


def _example(**values: Any) -> ConfigDict:
    return ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [values]})


class FilesBody(BaseModel):
    """The contract's. files: safetensors files that belong to this rank."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"files": ["/models/m/model-00001.safetensors"]}]})
    files: list[str]


class ContractUpdateBody(BaseModel):
    """The contract's. Without update_url this rank asks no engine; inference_group_ranks: whose handles the engine is sent,
    all by default; timeout: seconds for its answer; uds: its Unix socket."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"update_url": "http://127.0.0.1:8000/collective_rpc", "inference_group_ranks": [0, 1], "timeout": 300}]
        }
    )
    ranks: list[Rank] = []
    update_url: str | None = None
    inference_group_ranks: list[Rank] = []
    timeout: Seconds = 300.0
    uds: str | None = None


class CheckpointBody(BaseModel):
    """A checkpoint on disk that all ranks see: a directory, or files. Each rank takes its share of every layer."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [{"name": "step-12", "directory": "/models/step-12"}],
            "oneOf": [
                {"required": ["directory"], "properties": {"directory": {"type": "string"}, "files": {"maxItems": 0}}},
                {"required": ["files"], "properties": {"directory": {"type": "null"}, "files": {"minItems": 1}}},
            ],
        },
    )
    name: Name
    directory: str | None = None
    files: list[str] = []

    @model_validator(mode="after")
    def _one_of_them(self) -> CheckpointBody:
        if (self.directory is None) == (not self.files):
            raise ValueError("give either a directory or files")
        return self


class EngineBody(BaseModel):
    """token: sent to the engine as a bearer token, and shown nowhere."""

    model_config = _example(kind="vllm", url="http://127.0.0.1:8000")
    kind: str = "sglang"
    url: str
    uds: str | None = None
    token: SecretStr | None = None

    def spec(self) -> EngineSpec:
        return EngineSpec(self.kind, self.url, self.uds, None if self.token is None else self.token.get_secret_value())


class UpdateBody(BaseModel):
    """engines: engine i serves ranks [i*K, (i+1)*K), K = world size / number of engines; none: those that the server was
    started with. All else: as for ParameterServer.roll_out and Policy. Times in seconds."""

    model_config = _example(checkpoint="step-12", engines=[{"kind": "sglang", "url": "http://127.0.0.1:30000"}], pause="keep")
    checkpoint: Name
    engines: list[EngineBody] = []
    version: Name | None = None
    pause: PauseMode | None = None
    resume_dirty: bool = False
    on_replica_failure: FailurePolicy = "abort"
    on_failure: OnFailure = "abort"
    ready_seconds: Seconds | None = None
    timeout: Seconds = 600.0
    verify: Literal["on", "off"] | None = None

    def command(self, default: tuple[EngineSpec, ...]) -> RollOut:
        return RollOut(
            self.checkpoint,
            tuple(engine.spec() for engine in self.engines) or default,
            self.version,
            self.pause,
            self.resume_dirty,
            self.on_replica_failure,
            self.ready_seconds,
            self.timeout,
            self.verify,
            self.on_failure,
        )
