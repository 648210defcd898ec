"""The application: routes, guard, and how errors are answered."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.resources
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from checkpoint_engine import __version__
from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.http.contract import contract_routes
from checkpoint_engine.http.control import control_routes
from checkpoint_engine.http.director import Director
from checkpoint_engine.http.examples import answers, mend_validation_errors
from checkpoint_engine.http.guard import Guard
from checkpoint_engine.http.holders import Holders, holder_routes
from checkpoint_engine.http.metrics import CONTENT_TYPE, Metrics
from checkpoint_engine.http.node import Node
from checkpoint_engine.http.problems import problem_of, status_of
from checkpoint_engine.http.records import Failed, Problem
from checkpoint_engine.http.routes import checkpoint_routes, fleet_routes, timeline_routes, update_routes

ABOUT = """REST of a parameter server. Routes tagged `contract` act on the rank that is asked; all others on the fleet, and only
rank 0 answers them. Errors are `{"error": {"type", "message", "rank", "names", "notes"}}`: 4xx for what the caller did, 5xx for
what a server, a rank or an engine did."""
METHODS = ("GET", "PUT", "POST", "DELETE")
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


def create_app(
    node: Node,
    *,
    token: str | None = None,
    control: tuple[str, int] | None = None,
    ceilings: Mapping[str, float] | None = None,
    holder_lease: float = 30.0,
) -> FastAPI:
    """The ASGI application around `node`. token, control: see Guard; ceilings: stage -> bytes per second; holder_lease: seconds
    for which another world that holds the same is listed."""
    director, holders = Director(node, ceilings or {}), Holders(holder_lease)
    metrics = Metrics(director)
    node.tracker.ended = metrics.count

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(director.run())
        yield
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    # FastAPI's own pages of documentation load scripts from elsewhere.
    app = FastAPI(
        title="checkpoint-engine", version=__version__, description=ABOUT, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.add_middleware(Guard, token=token, control=control, secret=lambda: node.secret)
    app.include_router(contract_routes(node))
    for routes in (checkpoint_routes, update_routes, timeline_routes):
        app.include_router(routes(director))
    for routed in (fleet_routes, holder_routes):
        app.include_router(routed(director, holders))
    app.include_router(control_routes(node))
    _add_pages(app, director, metrics)
    _add_errors(app, node)
    app.openapi = lambda: app.openapi_schema or mend_validation_errors(FastAPI.openapi(app))  # type: ignore[method-assign]
    return app


def _add_pages(app: FastAPI, director: Director, metrics: Metrics) -> None:
    page = importlib.resources.files("checkpoint_engine.http").joinpath("static/dashboard.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, tags=["pages"], responses=answers("<!doctype html>", errors=(), media="text/html"))
    async def dashboard() -> HTMLResponse:
        """The dashboard; on other ranks than 0 it says where to look."""
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})

    sample = (
        "# HELP checkpoint_engine_ranks Ranks of the fleet.\n# TYPE checkpoint_engine_ranks gauge\ncheckpoint_engine_ranks 8.0\n"
    )

    @app.get("/metrics", response_class=Response, tags=["pages"], responses=answers(sample, errors=(), media="text/plain"))
    async def scrape() -> Response:
        """For Prometheus (docs/metrics.md). Rank 0 has the whole fleet's; another rank its own."""
        return Response(await asyncio.to_thread(metrics.render), media_type=CONTENT_TYPE)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)


def _add_errors(app: FastAPI, node: Node) -> None:
    def answer(problem: Problem, status: int, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse(dataclasses.asdict(Failed(problem)), status, headers)

    async def ours(_: Request, error: Exception) -> JSONResponse:
        return answer(problem_of(error, node.rank), status_of(error))

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        found = error.errors() if isinstance(error, RequestValidationError) else ()
        # Without the input: it may hold a token.
        message = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in found)
        return answer(Problem("RequestValidationError", message, node.rank), 422)

    async def no_such_route(request: Request, error: Exception) -> JSONResponse:
        """No such route, or not with this method: Starlette would name the methods of one route with this path only."""
        status = error.status_code if isinstance(error, HTTPException) else 404
        message = f"{request.method} {request.url.path}: {HTTPStatus(status).phrase.lower()}"
        methods = [m for m in METHODS if any(r.matches({**request.scope, "method": m})[0] is Match.FULL for r in app.routes)]
        return answer(Problem("HTTPError", message, node.rank), status, {"Allow": ", ".join(methods)} if methods else None)

    app.add_exception_handler(HTTPException, no_such_route)
    app.add_exception_handler(CheckpointEngineError, ours)
    app.add_exception_handler(Exception, ours)  # its traceback is in the log
    app.add_exception_handler(RequestValidationError, invalid)
