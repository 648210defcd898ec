"""The embedded engine's routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

from checkpoint_engine.engines.embedded.model import Sampling
from checkpoint_engine.engines.embedded.schemas import (
    EmbedRequest,
    EmbedResponse,
    GenerateRequest,
    GenerateResponse,
    PauseRequest,
    UpdateRequest,
    UpdateResponse,
    WeightsResponse,
)
from checkpoint_engine.engines.embedded.service import AbortedError, DirtyError, EmbeddedEngine
from checkpoint_engine.errors import CheckpointEngineError, DeadlineError, SettingsError


def create_app(engine: EmbeddedEngine) -> FastAPI:
    """The ASGI application around `engine`, which it closes when the server stops."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(title="checkpoint-engine embedded engine", lifespan=lifespan)
    app.add_exception_handler(CheckpointEngineError, _answer_error)
    _add_state_routes(app, engine)
    _add_pause_routes(app, engine)
    _add_inference_routes(app, engine)
    return app


async def _answer_error(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, AbortedError | DirtyError | DeadlineError):
        return JSONResponse({"detail": str(error)}, status_code=503)
    return JSONResponse({"detail": str(error)}, status_code=400 if isinstance(error, SettingsError) else 500)


def _add_state_routes(app: FastAPI, engine: EmbeddedEngine) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """200 as long as the process serves, whatever its weights are like."""
        return {"status": "ok"}

    @app.get("/ping")
    async def ping() -> dict[str, str]:
        """200 when the engine can take weights; 502 while one of its followers cannot."""
        try:
            await engine.ready()
        except CheckpointEngineError as e:
            raise HTTPException(502, str(e)) from e
        return {"status": "ok"}

    @app.get("/v1/weights")
    async def weights() -> WeightsResponse:
        served = engine.weights
        return WeightsResponse(version=served.version, dirty=served.dirty)

    @app.get("/v1/parameters/digest")
    async def digest() -> dict[str, str]:
        """XXH3-128 of each parameter's bytes, by name; tied parameters once."""
        return await engine.digests()

    @app.post("/update_weights_from_ipc", response_model=UpdateResponse)
    async def update(request: UpdateRequest) -> UpdateResponse | JSONResponse:
        """Answers when the update has been committed (200) or has failed (400)."""
        try:
            version = await engine.update(request)
        except Exception as e:  # whatever a session raised is the caller's to know; the engine goes on
            answer = UpdateResponse(success=False, message=f"{type(e).__name__}: {e}")
            return JSONResponse(answer.model_dump(), status_code=400)
        return UpdateResponse(success=True, message=f"weights are {version}")


def _add_pause_routes(app: FastAPI, engine: EmbeddedEngine) -> None:
    @app.post("/pause_generation")
    async def pause(request: PauseRequest) -> dict[str, str]:
        """Answers when nothing computes any more; new requests wait. abort: those that have not begun are answered 503."""
        await engine.pause(abort=request.mode == "abort")
        return {"status": "ok", "message": "paused"}

    @app.post("/continue_generation")
    async def resume() -> dict[str, str]:
        engine.resume()
        return {"status": "ok", "message": "resumed"}

    @app.get("/is_paused")
    async def is_paused() -> dict[str, bool]:
        return {"is_paused": engine.paused}

    @app.api_route("/flush_cache", methods=["GET", "POST"])
    async def flush_cache() -> dict[str, str]:
        """There is no cache between requests: nothing to do."""
        return {"status": "ok", "message": "no cache"}


def _add_inference_routes(app: FastAPI, engine: EmbeddedEngine) -> None:
    @app.post("/embed")
    async def embed(request: EmbedRequest) -> EmbedResponse:
        if engine.model.kind != "embed":
            raise HTTPException(400, "this model generates: use /generate")
        vectors, version = await engine.embed(request.input)
        return EmbedResponse(embeddings=vectors, version=version)

    @app.post("/generate")
    async def generate(request: GenerateRequest) -> GenerateResponse | list[GenerateResponse]:
        if engine.model.kind != "generate":
            raise HTTPException(400, "this model makes embeddings: use /embed")
        if (request.text is None) == (request.input_ids is None):
            raise HTTPException(422, "give either text or input_ids")
        given: Any = request.text if request.text is not None else request.input_ids
        several = isinstance(given, list) and isinstance(given[0], str | list)
        asked = request.sampling_params
        sampling = Sampling(asked.max_new_tokens, asked.temperature, asked.top_p, asked.top_k, asked.sampling_seed)
        made, version = await engine.generate(given if several else [given], sampling)
        answers = [GenerateResponse(text=m.text, output_ids=m.output_ids, version=version) for m in made]
        return answers if several else answers[0]
