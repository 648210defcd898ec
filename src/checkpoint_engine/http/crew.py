"""How rank 0 has the other ranks take part: each listens on a control port of its own, and rank 0 sends it commands.

The ranks tell each other their ports and rank 0's secret over their links, once. Nobody else knows the secret, and a control
port answers nobody who does not say it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import msgspec

from checkpoint_engine.errors import DeadlineError, PeerLostError, ProtocolError
from checkpoint_engine.http.commands import Answer, Command
from checkpoint_engine.http.records import RankState

CONNECT_SECONDS = 10.0
STATE_SECONDS = 5.0
COMMAND_PATH, STATE_PATH = "/control/command", "/control/state"


class Introduction(msgspec.Struct, frozen=True):
    """url: of the control port, "" on rank 0. secret: rank 0's, "" from the others."""

    rank: int
    host: str
    url: str
    secret: str


class Crew:
    """The other ranks, as rank 0 reaches them. A context manager; used on one event loop."""

    def __init__(self, introductions: Sequence[Introduction], secret: str) -> None:
        self._others = {i.rank: i for i in introductions if i.url}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        headers = {"Authorization": f"Bearer {secret}"}
        self._client = httpx.AsyncClient(headers=headers, trust_env=False, limits=limits)

    @property
    def hosts(self) -> dict[int, str]:
        return {rank: other.host for rank, other in self._others.items()}

    async def command(self, rank: int, command: Command, seconds: float) -> Answer:
        """Raises PeerLostError, DeadlineError, ProtocolError."""
        body = await self._ask(rank, "POST", COMMAND_PATH, msgspec.msgpack.encode(command), seconds)
        answer: Answer = self._decode(rank, body, Answer)
        return answer

    async def state(self, rank: int) -> RankState:
        """Raises as `command`."""
        state: RankState = self._decode(rank, await self._ask(rank, "GET", STATE_PATH, None, STATE_SECONDS), RankState)
        return state

    def _decode(self, rank: int, body: bytes, kind: Any) -> Any:
        try:
            return msgspec.msgpack.decode(body, type=kind)
        except msgspec.MsgspecError as e:
            raise ProtocolError(f"rank {rank} answered something else: {e}") from None

    async def _ask(self, rank: int, method: str, path: str, body: bytes | None, seconds: float) -> bytes:
        other = self._others[rank]
        name = f"the server of rank {rank} on {other.host}"
        timeout = httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))
        try:
            async with asyncio.timeout(seconds):
                response = await self._client.request(method, other.url + path, content=body, timeout=timeout)
        except (httpx.TimeoutException, TimeoutError):
            raise DeadlineError(f"{name} to answer {path}", seconds) from None
        except httpx.TransportError as e:
            raise PeerLostError(name, str(e) or type(e).__name__) from None
        if response.status_code != 200:
            raise ProtocolError(f"{name} answered {response.status_code} to {path}")
        return response.content

    async def close(self) -> None:
        await self._client.aclose()
