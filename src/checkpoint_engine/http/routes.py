"""REST of rank 0, for the whole fleet: checkpoints, updates, weights, and what joiners need."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse

from checkpoint_engine.errors import SettingsError
from checkpoint_engine.http import examples as x
from checkpoint_engine.http.director import Director
from checkpoint_engine.http.holders import Holders
from checkpoint_engine.http.records import CheckpointDetail, CheckpointView, FleetView, TimelineView, UpdateRecord, WeightsView
from checkpoint_engine.http.schemas import CheckpointBody, UpdateBody
from checkpoint_engine.http.streams import follow_fleet, follow_update, shortened
from checkpoint_engine.timeline import to_chrome

LEADS = (421,)
EVENTS, JSON = "text/event-stream", "application/json"
_EVENTS = 'event: update\ndata: {"id": "1-a1b2c3", "state": "updating"}\n\n'


def fleet_routes(director: Director, holders: Holders) -> APIRouter:
    routes = APIRouter(tags=["fleet"])

    @routes.get("/v1/fleet", response_model=FleetView, responses=x.answers(x.FLEET, errors=LEADS))
    async def fleet() -> Response:
        """Ranks, their workers, and the update that runs."""
        director.must_lead()
        return _json(director.view())

    @routes.get("/v1/weights", responses=x.answers(x.WEIGHTS, errors=LEADS))
    async def weights() -> WeightsView:
        """Version and dirty state of each rank's worker, and of each engine, which is asked now."""
        director.must_lead()
        return await director.weights()

    @routes.get("/v1/events", response_class=StreamingResponse, responses=x.answers(_EVENTS, errors=LEADS, media=EVENTS))
    async def events() -> StreamingResponse:
        """Server-sent events for as long as the caller listens: `fleet` (as /v1/fleet) and `updates` (as /v1/updates)."""
        director.must_lead()
        return StreamingResponse(follow_fleet(director), media_type=EVENTS, headers={"Cache-Control": "no-store"})

    @routes.get("/v1/manifest", responses=x.answers(x.MANIFEST, errors=(404,)))
    async def manifest(checkpoint: str | None = None) -> Response:
        """Who holds what, as `Metas.from_json` reads it: of a checkpoint, or the one that was gathered last. Other worlds that
        hold the same come behind this one's ranks."""
        found = await asyncio.to_thread(holders.listed, director.node.manifest(checkpoint))
        return Response(await asyncio.to_thread(found.to_json), media_type="application/json")

    return routes


def checkpoint_routes(director: Director) -> APIRouter:
    routes, node = APIRouter(tags=["checkpoints"]), director.node

    @routes.get("/v1/checkpoints", responses=x.answers([x.CHECKPOINT], errors=LEADS))
    async def checkpoints() -> list[CheckpointView]:
        """What is in the host memory of the ranks."""
        director.must_lead()
        return director.checkpoints()

    @routes.post(
        "/v1/checkpoints", status_code=201, responses=x.answers(x.CHECKPOINT, errors=(400, 409, 503, *LEADS), status=201)
    )
    async def register(body: CheckpointBody) -> CheckpointView:
        """Bring a checkpoint into the host memory of all ranks, each its share, and gather; of none, when one fails."""
        return await director.register(body.name, body.directory, body.files)

    @routes.get("/v1/checkpoints/{name}", response_model=CheckpointDetail, responses=x.answers(x.DETAIL, errors=(404, *LEADS)))
    async def inspect(
        name: str,
        contains: Annotated[str, Query(description="Only tensors with this in their names.")] = "",
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=0, le=10_000)] = 100,
    ) -> Response:
        """A checkpoint that was gathered, and its tensors by name, page by page."""
        director.must_lead()
        return _json(await asyncio.to_thread(director.detail, name, contains, offset, limit))

    @routes.delete("/v1/checkpoints/{name}", tags=["contract"], responses=x.answers(x.OK, errors=(404, 409, 503, *LEADS)))
    async def unregister(name: str, fleet: bool = False, force: bool = False) -> dict[str, str]:
        """The contract's: give this rank's memory back. fleet: that of all ranks; force: also memory kept for the next one."""
        if fleet:
            await director.unregister(name, force)
        else:
            node.manifests.pop(name, None)
            await node.other(lambda: node.ps.unregister_checkpoint(name, force=force))
        return x.OK

    return routes


def update_routes(director: Director) -> APIRouter:
    routes = APIRouter(tags=["updates"])

    @routes.post("/v1/updates", status_code=202, responses=x.answers(x.STARTED, errors=(400, 404, 409, 503, *LEADS), status=202))
    async def start(body: UpdateBody, response: Response) -> UpdateRecord:
        """Begin to update the engines, on all ranks; Location says where to follow it."""
        command = body.command(director.node.engines)
        if not command.engines:
            raise SettingsError("no engines: name some, or start the server with --endpoint")
        record = director.start(command)
        response.headers["Location"] = f"/v1/updates/{record.id}"
        return record

    @routes.get("/v1/updates", response_model=list[UpdateRecord], responses=x.answers([x.UPDATE], errors=LEADS))
    async def updates() -> Response:
        """The last hundred, newest first, whoever started them; reports of all but the newest without what each rank did."""
        director.must_lead()
        return _json(shortened(director.updates()))

    @routes.get("/v1/updates/{id}", response_model=UpdateRecord, responses=x.answers(x.UPDATE, errors=(404, *LEADS)))
    async def update(id: str) -> Response:
        """Its state now."""
        director.must_lead()
        return _json(director.record(id))

    @routes.get(
        "/v1/updates/{id}/events",
        response_class=StreamingResponse,
        responses=x.answers(_EVENTS, errors=(404, *LEADS), media=EVENTS),
    )
    async def follow(id: str) -> StreamingResponse:
        """Server-sent events `update`, each as GET /v1/updates/{id} would answer then; the stream ends with the update."""
        director.must_lead()
        director.record(id)
        return StreamingResponse(follow_update(director, id), media_type=EVENTS, headers={"Cache-Control": "no-store"})

    @routes.delete("/v1/updates/{id}", status_code=202, responses=x.answers(x.STARTED, errors=(404, *LEADS), status=202))
    async def cancel(id: str) -> UpdateRecord:
        """Ask that it end, on all ranks, as if it had failed; follow it to see how it ended. Harmless once it is over.

        It may have been committed before that. If bytes were loaded, the engines are dirty until the next complete update.
        """
        director.must_lead()
        return director.cancel(id)

    return routes


def timeline_routes(director: Director) -> APIRouter:
    routes = APIRouter(tags=["updates"])

    @routes.get("/v1/updates/{id}/timeline", response_model=TimelineView, responses=x.answers(x.TIMELINE, errors=(404, *LEADS)))
    async def timeline(id: str) -> Response:
        """When each stage was at work on which bucket, on every rank; of the last updates that were committed."""
        director.must_lead()
        return Response(await asyncio.to_thread(lambda: msgspec.json.encode(director.timeline(id))), media_type=JSON)

    @routes.get("/v1/updates/{id}/trace", response_class=Response, responses=x.answers(x.TRACE, errors=(404, *LEADS)))
    async def trace(id: str) -> Response:
        """The same in the Chrome trace event format: a file for ui.perfetto.dev or `checkpoint-engine trace summary`."""
        director.must_lead()
        made = await asyncio.to_thread(lambda: to_chrome(director.trace(id)))
        return Response(made, media_type=JSON, headers={"Content-Disposition": f'attachment; filename="update-{id}.trace.json"'})

    return routes


def _json(data: object) -> Response:
    """Large answers, made some ten times faster than FastAPI makes them: the loop is held up that much less."""
    return Response(msgspec.json.encode(data), media_type="application/json")
