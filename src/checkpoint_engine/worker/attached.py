"""What a server's Attach brings: the plan's tables, kept for later updates, and the memories, mapped and seen as tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch

from checkpoint_engine.devices.base import Device, Mapping
from checkpoint_engine.errors import ProtocolError
from checkpoint_engine.recent import Recent
from checkpoint_engine.transport.messages import Attach, Table
from checkpoint_engine.worker.views import Views

KEPT_TABLES = 4

_tables: Recent[str, tuple[Table, ...]] = Recent(KEPT_TABLES)


def known_plans() -> tuple[str, ...]:
    """Digests of the plans whose tables are kept."""
    return _tables.keys()


def tables_of(attach: Attach) -> tuple[Table, ...]:
    """Sent now, or kept. Raises ProtocolError when they are neither."""
    if attach.tables is not None:
        return _tables.put(attach.plan, attach.tables)
    if attach.plan not in _tables:
        raise ProtocolError("the server did not send the plan's tables, which this worker does not have")
    return _tables[attach.plan]


def mappings(attach: Attach, taken: Sequence[int], device: Device) -> Iterator[Mapping]:
    """Its memories, one after the other. taken: the descriptors that came with it, which are owned from here on."""
    later, rest = len(taken) - len(attach.ahead), list(taken)
    try:
        if later < 0:
            raise ProtocolError("the server sent fewer descriptors than memories")
        if attach.ahead or all(handle.kind != "region" for handle in attach.memories):
            del rest[later:]
            device.map_ahead(attach.ahead, taken[later:])
        for handle in attach.memories:
            needs = handle.kind != "cuda_ipc"
            if needs and not rest:
                raise ProtocolError("the server sent fewer descriptors than memories")
            yield device.open_ring(handle, (rest.pop(0),) if needs else ())
    finally:
        for descriptor in rest:  # of what could not be mapped any more
            os.close(descriptor)


def views_of(memories: Sequence[torch.Tensor], device: Device, index: int) -> Views:
    """For a loader on that device, which is number `index` of this process."""
    elsewhere = device.kind == "cuda" and any(memory.device.type == "cpu" for memory in memories)
    return Views(memories, torch.device("cuda", index) if elsewhere else None)
