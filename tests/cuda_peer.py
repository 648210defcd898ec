"""The other process of tests/test_devices_cuda.py. Reads one JSON object per line, answers one per line."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from checkpoint_engine.devices.base import Mapping, SharedHandle
from checkpoint_engine.devices.cuda import CudaDevice, CudaStream
from checkpoint_engine.devices.nccl import NcclCommunicator
from checkpoint_engine.errors import CheckpointEngineError

DEVICE = CudaDevice(0)
STATE: dict[str, Any] = {}


def uuid() -> str:
    return DEVICE.uuid


def map(token: str, nbytes: int) -> list[int]:
    """First and last byte and the sum of a ring, which is then filled with 9 from its second byte on."""
    handle = SharedHandle("cuda_ipc", nbytes, bytes.fromhex(token))
    mapping = DEVICE.open_ring(handle, ())
    tensor = mapping.tensor
    seen = [int(tensor[0]), int(tensor[-1]), int(tensor.sum(dtype=torch.int64))]
    tensor[1:].fill_(9)
    DEVICE.synchronize()
    STATE["mapping"], STATE["view"] = mapping, tensor[1:5]
    return seen


def close() -> list[int]:
    """Closes the mapping; a view that was kept stays readable until it goes too."""
    mapping: Mapping = STATE.pop("mapping")
    mapping.close()
    mapping.close()
    kept = STATE["view"].tolist()
    del STATE["view"]
    return list(kept)


def join(token: str, rank: int, size: int, max_ctas: int | None) -> int:
    STATE["stream"] = CudaStream(DEVICE, "share")
    STATE["communicator"] = NcclCommunicator(bytes.fromhex(token), rank, size, 0, timeout=40, max_ctas=max_ctas)
    return rank


def broadcast(nbytes: int, root: int) -> list[int]:
    """Posts and waits; what arrived, as its first and last byte and its sum."""
    communicator, stream = STATE["communicator"], STATE["stream"]
    source = torch.full((nbytes,), communicator.rank + 1, dtype=torch.uint8, device=DEVICE.torch_device)
    target = torch.zeros_like(source)
    DEVICE.synchronize()
    communicator.broadcast(target, source, root, stream.raw.cuda_stream, timeout=40)
    assert stream.record().wait(40)
    communicator.check()
    return [int(target[0]), int(target[-1]), int(target.sum(dtype=torch.int64))]


def leave() -> bool:
    return bool(STATE.pop("communicator").abort())


ACTIONS = {"uuid": uuid, "map": map, "close": close, "join": join, "broadcast": broadcast, "leave": leave}


def main() -> None:
    DEVICE.bind_thread()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": ACTIONS[request.pop("do")](**request)}  # type: ignore[operator]
        except CheckpointEngineError as e:
            answer = {"error": type(e).__name__, "text": str(e)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
