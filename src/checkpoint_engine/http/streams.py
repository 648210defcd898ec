"""Server-sent events. A slow listener misses states in between, never the last one, and holds nothing up."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import msgspec

from checkpoint_engine.http.director import Director
from checkpoint_engine.http.records import UpdateRecord
from checkpoint_engine.http.tracker import is_over

KEEPALIVE_SECONDS = 15.0
LEAST_SECONDS = 0.1
"""Between two events of one stream."""
SHOWN_UPDATES, DETAILED_UPDATES = 50, 5


def _event(kind: str, data: object) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode(data))


async def follow_update(director: Director, id_: str) -> AsyncIterator[bytes]:
    """`update` whenever it changed; ends with its final state."""
    pulse, said = director.node.pulse, b""
    while not pulse.closed:
        seen, record = pulse.count, director.record(id_)
        if (event := _event("update", record)) != said:
            said = event
            yield event
        if is_over(record):
            return
        await asyncio.sleep(LEAST_SECONDS)
        if await pulse.wait(seen, KEEPALIVE_SECONDS) == seen:
            yield b": still here\n\n"


async def follow_fleet(director: Director) -> AsyncIterator[bytes]:
    """`fleet` whenever it changed, and `updates` whenever one began or ended."""
    pulse, said, newest = director.node.pulse, b"", ""
    while not pulse.closed:
        seen = pulse.count
        if (event := _event("fleet", director.view())) != said:
            said = event
            yield event
        over = director.node.tracker.updates()
        if over and over[0].id != newest:
            newest = over[0].id
            yield _event("updates", shortened(over[:SHOWN_UPDATES]))
        await asyncio.sleep(LEAST_SECONDS)
        if await pulse.wait(seen, KEEPALIVE_SECONDS) == seen:
            yield b": still here\n\n"


def shortened(records: list[UpdateRecord]) -> list[UpdateRecord]:
    """All but the newest without what each rank did."""
    return [*records[:DETAILED_UPDATES], *map(_without_ranks, records[DETAILED_UPDATES:])]


def _without_ranks(record: UpdateRecord) -> UpdateRecord:
    if record.report is None:
        return record
    return dataclasses.replace(record, report={k: v for k, v in record.report.items() if k != "ranks"})
