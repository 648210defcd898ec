"""Other worlds that hold what this one does, each listed for as long as it says every now and then that it is there."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Annotated

import msgspec
from fastapi import APIRouter, Path, Request

from checkpoint_engine.errors import CheckpointEngineError, CheckpointNotFoundError, ManifestError
from checkpoint_engine.http import examples as x
from checkpoint_engine.http.director import Director
from checkpoint_engine.http.problems import NotFoundError
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.server.holders import check_holder, with_holders
from checkpoint_engine.server.sources import Metas

MOST = 4096
"""Holders at a time."""
LARGEST, MOST_BYTES = 64 << 20, 1 << 30
"""Of JSON: one holder's metas (a tensor takes some 100 bytes), and all of them together."""
Id = Annotated[str, Path(min_length=8, max_length=64, pattern="^[0-9a-zA-Z-]+$", description="Chosen by the holder.")]


@dataclasses.dataclass(frozen=True, slots=True)
class Lease:
    """seconds: until the holder is forgotten unless it renews. listed: joiners are told of it; reason: why not."""

    seconds: float
    listed: bool
    reason: str = ""


@dataclasses.dataclass(slots=True)
class _Holder:
    """nbytes: of its metas as they came. until: on the clock. judged: version of what is gathered here -> why it does not fit,
    "" if it does."""

    metas: Metas
    nbytes: int
    until: float
    judged: tuple[str, str] | None = None

    def misfit(self, mine: Manifest | None) -> str:
        if not isinstance(mine, Metas) or mine.checkpoint != self.metas.checkpoint:
            return f"checkpoint {self.metas.checkpoint!r} is not gathered here any more"
        judged = self.judged
        if judged is None or judged[0] != mine.version:
            self.judged = judged = mine.version, _misfit(mine, self.metas)
        return judged[1]


def _misfit(mine: Metas, theirs: Metas) -> str:
    try:
        check_holder(mine, theirs)
    except CheckpointEngineError as e:
        return str(e)
    return ""


class Holders:
    """Threads share it. now: a clock, seconds."""

    def __init__(self, lease_seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._now = lease_seconds, now
        self._lock = threading.Lock()
        self._holders: dict[str, _Holder] = {}

    def _current(self) -> dict[str, _Holder]:
        """Under the lock: those whose leases have not ended."""
        now = self._now()
        self._holders = {id_: holder for id_, holder in self._holders.items() if holder.until > now}
        return self._holders

    def enter(self, id_: str, metas: Metas, nbytes: int, mine: Manifest | None) -> Lease:
        """nbytes: of the metas' JSON. mine: what is gathered here under that name. Raises ManifestError when there are too many,
        or what all of them told is too much."""
        holder = _Holder(metas, nbytes, self._now() + self._seconds)
        with self._lock:
            current = self._current()
            others = [other.nbytes for known, other in current.items() if known != id_]
            if len(others) >= MOST:
                raise ManifestError(f"{MOST} holders are listed already")
            if sum(others) + nbytes > MOST_BYTES:
                raise ManifestError(f"the metas of {len(others)} holders are {sum(others)} bytes already: with these, too many")
            current[id_] = holder
        return self._lease(holder, mine)

    def renew(self, id_: str, find: Callable[[str], Manifest | None]) -> Lease:
        """find: by a checkpoint's name what is gathered here. Raises NotFoundError when its lease has ended; it must be entered
        again then."""
        with self._lock:
            holder = self._current().get(id_)
            if holder is None:
                raise NotFoundError(f"no holder {id_!r}: its lease has ended, or this server was started anew")
            holder.until = self._now() + self._seconds
        return self._lease(holder, find(holder.metas.checkpoint))

    def remove(self, id_: str) -> None:
        with self._lock:
            self._holders.pop(id_, None)

    def listed(self, mine: Manifest) -> Manifest:
        """With all who hold the same bytes now."""
        with self._lock:
            current = tuple(self._current().values())
        others = [holder.metas for holder in current if not holder.misfit(mine)]
        return with_holders(mine, others) if others and isinstance(mine, Metas) else mine

    def _lease(self, holder: _Holder, mine: Manifest | None) -> Lease:
        reason = holder.misfit(mine)
        return Lease(self._seconds, not reason, reason)


async def read_metas(request: Request) -> bytes:
    """The body. Raises ManifestError for one that is too long, as soon as that is known."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > LARGEST:
            raise ManifestError(f"these metas are longer than {LARGEST} bytes")
    return bytes(body)


def holder_routes(director: Director, holders: Holders) -> APIRouter:
    routes = APIRouter(tags=["holders"])

    def mine(name: str) -> Manifest | None:
        try:
            return director.node.manifest(name)
        except CheckpointNotFoundError:
            return None

    # Its body is not declared: FastAPI would parse it on the event loop, tensor by tensor.
    @routes.put("/v1/holders/{id}", responses=x.answers(x.LEASE, errors=(400, 421)))
    async def enter(id: Id, request: Request) -> Lease:
        """A world that holds a checkpoint of this one says so; whoever asks for the manifest is told of it from then on.

        The body is its metas: what its own `GET /v1/manifest` would answer, or `get_metas().to_json()`.
        """
        director.must_lead()
        body = await read_metas(request)
        try:
            metas = await asyncio.to_thread(Metas.from_json, body)
        except (msgspec.ValidationError, msgspec.DecodeError) as e:
            raise ManifestError(f"these are no metas: {e}") from None
        metas.check()
        return await asyncio.to_thread(holders.enter, id, metas, len(body), mine(metas.checkpoint))

    @routes.post("/v1/holders/{id}/renew", responses=x.answers(x.LEASE, errors=(404, 421)))
    async def renew(id: Id) -> Lease:
        """It is still there. 404: it must enter again."""
        director.must_lead()
        return await asyncio.to_thread(holders.renew, id, mine)

    @routes.delete("/v1/holders/{id}", responses=x.answers(x.OK, errors=(421,)))
    async def remove(id: Id) -> dict[str, str]:
        """It is going."""
        director.must_lead()
        holders.remove(id)
        return x.OK

    return routes
