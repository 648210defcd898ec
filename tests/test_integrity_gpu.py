"""Slices that workers on GPUs took: their sums by a kernel, which is also run by Triton's interpreter where it is told to, and
updates by replays and by pulling in which something changes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os

import pytest
import torch

import test_integrity_sliced_updates as sliced
from checkpoint_engine.devices.base import get_device
from checkpoint_engine.memory.slices import slice_sum
from checkpoint_engine.planning.bits import pack_bits
from checkpoint_engine.planning.plan import Item
from checkpoint_engine.planning.slices import Slice, Taken
from checkpoint_engine.transport.messages import Slicing, Table
from checkpoint_engine.worker.sliced_check import DeviceSliceSums
from checkpoint_engine.worker.slices import Asked

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
NBYTES = 1 << 20
PARTS = (
    (Slice(0, NBYTES),),
    (Slice(16, 96, (127,), (8192,)),),
    (Slice(3, 5001), Slice(70_000, 2, (5, 7, 3), (50, 300, 4096))),
    (),
    (Slice(8, 8, (2, 3, 2, 5), (65_536, 8192, 4096, 16)), Slice(40_001, 1)),
    (Slice(4096, 12_288),),
)
ASKED = (0, 1, 2, 4, 5)


def sums_are_those_of_a_cpu(device: str, shift: int) -> None:
    """Of the servers' memory, in which the tensors lie `shift` bytes from where they would be aligned."""
    memory = torch.randint(0, 256, (len(PARTS) * NBYTES + 16,), dtype=torch.uint8)
    there = memory.to(device)
    items = tuple(Item(str(n), "uint8", (NBYTES,), shift + n * NBYTES, NBYTES) for n in range(len(PARTS)))
    tables = Table(0, 0, items[:2]), Table(0, 0, items[2:3]), Table(0, 0, ()), Table(0, 0, items[3:])
    slicing = Slicing(("x",), pack_bits(n in ASKED for n in range(len(PARTS))))
    sums = DeviceSliceSums(Asked(slicing, Taken(PARTS), tables), None, [there], get_device(device))
    with contextlib.closing(sums):
        for bucket in range(len(tables)):
            sums.arrived(bucket, [there], 20.0)
            sums.landed(bucket)
        found = torch.frombuffer(bytearray(sums.finish(20.0)), dtype=torch.uint64).tolist()

    def right(n: int) -> int:
        at = shift + n * NBYTES
        return sum(slice_sum(memory, at + part.first, part.strides, part) for part in PARTS[n]) % (1 << 64)

    assert found == [right(n) for n in ASKED]
    assert sums.nbytes == sum(part.nbytes for n in ASKED for part in PARTS[n])


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")
@pytest.mark.parametrize("shift", [0, 8, 1])
def test_the_kernel_in_the_interpreter(shift: int) -> None:
    sums_are_those_of_a_cpu("cpu", shift)


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [0, 8, 4, 1])
def test_the_kernel_on_a_gpu(shift: int) -> None:
    sums_are_those_of_a_cpu("cuda", shift)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKPOINT_ENGINE_RECORDED_LOADS", "on")
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus", "sharing")
@pytest.mark.timeout(180)
@pytest.mark.parametrize("method", ["broadcast", "pull"])
def test_a_bit_of_a_slice_in_the_owners_memory(method: str) -> None:
    sliced.test_a_bit_of_a_slice_in_the_owners_memory(method)


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
@pytest.mark.timeout(180)
@pytest.mark.parametrize("method", ["broadcast", "pull"])
def test_a_rank_that_cannot_replay_and_a_replay_that_goes_wrong(method: str) -> None:
    sliced.check_a_rank_that_cannot_replay_and_a_replay_that_goes_wrong(method)
