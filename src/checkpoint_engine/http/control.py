"""What rank 0 asks of this rank, on its control port. The guard lets nobody else in."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from checkpoint_engine.errors import ProtocolError
from checkpoint_engine.http.commands import Command
from checkpoint_engine.http.crew import COMMAND_PATH, STATE_PATH
from checkpoint_engine.http.node import Node

MSGPACK = "application/msgpack"


def control_routes(node: Node) -> APIRouter:
    routes = APIRouter(include_in_schema=False)

    @routes.post(COMMAND_PATH)
    async def command(request: Request) -> Response:
        try:
            asked: Command = msgspec.msgpack.decode(await request.body(), type=Command)
        except msgspec.MsgspecError as e:
            raise ProtocolError(f"rank 0 runs another version of this package: {e}") from None
        return Response(msgspec.msgpack.encode(await node.answer(asked)), media_type=MSGPACK)

    @routes.get(STATE_PATH)
    async def state() -> Response:
        return Response(msgspec.msgpack.encode(node.state()), media_type=MSGPACK)

    return routes
