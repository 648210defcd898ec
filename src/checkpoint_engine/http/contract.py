"""The contract's routes, unchanged: each acts on the rank that is asked, and collective ones end when all ranks were."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any

from fastapi import APIRouter

from checkpoint_engine.api import request_inference_to_update
from checkpoint_engine.errors import SettingsError, UpdateError
from checkpoint_engine.http.examples import OK, UPDATE_REPORT, answers
from checkpoint_engine.http.node import Node
from checkpoint_engine.http.schemas import ContractUpdateBody, FilesBody

UPDATE_MARGIN = 300.0
"""Seconds for the ranks to come to the update, besides those for the engine to answer."""


def contract_routes(node: Node) -> APIRouter:
    routes, ps = APIRouter(tags=["contract"]), node.ps

    @routes.get("/v1/healthz", responses=answers({"status": "ok", "rank": 0}, errors=()))
    async def healthz() -> dict[str, str | int]:
        """200 as long as the server serves, also while it updates."""
        return {"status": "ok", "rank": node.rank}

    @routes.post("/v1/checkpoints/{name}/files", responses=answers(OK, errors=(400, 409)))
    async def register(name: str, body: FilesBody) -> dict[str, str]:
        """Bring files into the host memory of this rank."""
        await node.other(partial(ps.register_checkpoint, name, files=body.files))
        return OK

    @routes.post("/v1/checkpoints/{name}/gather-metas", responses=answers(OK, errors=(409, 503, 504)))
    async def gather(name: str) -> dict[str, str]:
        """Collective: agree on who holds what."""
        await node.collective(partial(node.remembering, partial(ps.gather_metas, name)))
        return OK

    @routes.post("/v1/checkpoints/{name}/update", responses=answers(UPDATE_REPORT, errors=(400, 404, 409, 500, 502, 503, 504)))
    async def update(name: str, body: ContractUpdateBody) -> dict[str, Any]:
        """Collective: put the checkpoint into the engines. Answers when all workers have committed."""
        limit = timedelta(seconds=body.timeout + UPDATE_MARGIN)
        request = Request(body)
        try:
            report = await node.collective(partial(ps.update, name, request, ranks=body.ranks, timeout=limit))
        except UpdateError:
            # The other ranks are told that the update failed; whoever asked for what cannot be done is told that.
            if request.refused is not None:
                raise request.refused from None
            raise
        return report.to_dict()

    return routes


class Request:
    """Asks the engine as `body` says. refused: why that could not even be tried."""

    def __init__(self, body: ContractUpdateBody) -> None:
        self._body = body
        self.refused: SettingsError | None = None

    def __call__(self, handles: list[tuple[str, str]]) -> None:
        body = self._body
        if body.update_url is None:
            return
        try:
            if beyond := [rank for rank in body.inference_group_ranks if rank >= len(handles)]:
                raise SettingsError(f"inference_group_ranks {beyond} are not in a world of {len(handles)}")
            chosen = [handles[rank] for rank in body.inference_group_ranks] or handles
            request_inference_to_update(body.update_url, dict(chosen), timeout=body.timeout, uds=body.uds)
        except SettingsError as e:
            self.refused = e
            raise
