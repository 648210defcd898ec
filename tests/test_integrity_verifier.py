"""The verifier: over layouts of any shape, by every kind of sum, and in real updates whose bytes change on the way."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.devices.base import Device, get_device
from checkpoint_engine.devices.cpu import CpuDevice, CpuEvent
from checkpoint_engine.devices.digests import Layout, Mismatch, Run, Verifier
from checkpoint_engine.errors import DeadlineError
from checkpoint_engine.manifest import Manifest, RankManifest, RegionMeta, TensorMeta
from checkpoint_engine.memory.checksum import CHUNK_BYTES, digest
from checkpoint_engine.planning.buckets import plan_broadcast
from checkpoint_engine.planning.digests import pack, packed_digests, source_of

SECONDS = 20.0
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
SIZES = [0, 1, 7, 8, 9, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 16 * CHUNK_BYTES, 16 * CHUNK_BYTES + 1, 200_003, 12]


def memories_and_layout(device: str) -> tuple[list[torch.Tensor], Layout]:
    """Two memories; the second one's first tensor is not aligned."""
    runs, end = [], 0
    for nbytes in SIZES:
        runs.append(Run(0, end, nbytes))
        end = -(-(end + nbytes) // 16) * 16
    runs += [Run(1, 3, 5000), Run(1, 5008, 60_001)]
    memories = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in (end, 70_000)]
    return [memory.to(device) for memory in memories], Layout([runs[:5], runs[5:8], [], runs[8:]])


def expected_of(memories: Sequence[torch.Tensor], layout: Layout) -> bytes:
    return pack([digest(memories[m][offset : offset + nbytes].cpu()) for m, offset, nbytes in layout.runs])


def finds_every_corruption(device: str, kernel: bool) -> None:
    memories, layout = memories_and_layout(device)
    expected = expected_of(memories, layout)
    there: Device = get_device(device)
    buckets = range(len(layout.starts) - 1)

    def mismatches(checked: Sequence[int] = buckets) -> list[Mismatch]:
        verifier = Verifier(layout, expected, memories, kernel=kernel)
        for bucket in checked:
            verifier.check(bucket)
        return verifier.mismatches(there, SECONDS)

    assert mismatches() == []
    for number, (memory, offset, nbytes) in enumerate(layout.runs):
        bucket = max(b for b in buckets if layout.starts[b] <= number)
        for place in {0, nbytes // 2, nbytes - 1} if nbytes else ():
            memories[memory][offset + place] ^= 128
            assert mismatches() == [Mismatch(bucket, number - layout.starts[bucket])]
            assert mismatches([b for b in buckets if b != bucket]) == [], "what was not checked is not judged"
            memories[memory][offset + place] ^= 128


def test_torch_sums_on_a_cpu() -> None:
    finds_every_corruption("cpu", kernel=False)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")
def test_the_kernel_in_the_interpreter() -> None:
    finds_every_corruption("cpu", kernel=True)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [True, False])
def test_sums_on_a_gpu(kernel: bool) -> None:
    finds_every_corruption("cuda", kernel)


@pytest.mark.gpu
def test_digests_of_every_length_on_a_gpu() -> None:
    data = torch.randint(0, 256, (40_000,), dtype=torch.uint8)
    there = data.cuda()
    for start in (0, 1, 2, 4, 8, 13):
        for nbytes in (*range(20), 4095, 4096, 4097, 39_900):
            assert digest(there[start : start + nbytes]) == digest(data[start : start + nbytes])


def test_what_has_no_digest_is_not_judged() -> None:
    memory = torch.ones(100, dtype=torch.uint8)
    layout = Layout([[Run(0, 0, 50), Run(0, 50, 50)]])
    verifier = Verifier(layout, pack([0, 12345]), [memory])
    verifier.check(0)
    assert verifier.mismatches(get_device("cpu"), SECONDS) == [Mismatch(0, 1)]
    with pytest.raises(IndexError):
        verifier.check(1)
    with pytest.raises(ValueError, match="8 bytes of digests for 2 tensors"):
        Verifier(layout, pack([1]), [memory])
    assert Verifier(Layout([]), b"", []).mismatches(get_device("cpu"), SECONDS) == []


def test_a_device_that_does_not_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.ones(100, dtype=torch.uint8)
    verifier = Verifier(Layout([[Run(0, 0, 100)]]), pack([1]), [memory])
    verifier.check(0)
    monkeypatch.setattr(CpuDevice, "mark", lambda _: CpuEvent())
    with pytest.raises(DeadlineError, match="cpu to check digests"):
        verifier.mismatches(get_device("cpu"), 0.01)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=12), st.integers(1, 3), st.integers(0, 3), st.data())
def test_digests_travel_in_the_order_of_the_plan(sizes: list[int], ranks: int, without: int, data: st.DataObject) -> None:
    """From a manifest to what a worker compares, through a ring that is filled as the plan says."""
    regions: list[list[TensorMeta]] = [[] for _ in range(ranks)]
    memory = [bytearray() for _ in range(ranks)]
    for number, nbytes in enumerate(sizes):
        owner = data.draw(st.integers(0, ranks - 1))
        content = bytes([number + 1]) * nbytes
        made = 0 if number < without else digest(torch.tensor(list(content), dtype=torch.uint8))
        regions[owner].append(TensorMeta(f"t{number}", "uint8", (nbytes,), len(memory[owner]), made))
        memory[owner] += content
    metas = [(RegionMeta(max(1, len(memory[r])), tuple(regions[r])),) for r in range(ranks)]
    manifest = Manifest("c", tuple(RankManifest(r, "h", f"d{r}", metas[r]) for r in range(ranks)))
    plan = plan_broadcast(manifest, bucket_bytes=2048, ring_bytes=4096, piece_bytes=1024)
    expected = packed_digests(plan, manifest)
    if without >= len(sizes):
        assert expected == b""
        return
    layout = Layout([[Run(0, b.offset + i.offset, i.nbytes) for i in b.items] for b in plan.buckets])
    for spoilt in (False, True):
        ring = torch.zeros(plan.ring_bytes, dtype=torch.uint8)
        verifier = Verifier(layout, expected, [ring])
        wanted = []
        for number, bucket in enumerate(plan.buckets):  # they may lie in one another's place
            for piece in bucket.pieces:
                for copy in piece.copies:
                    content = memory[piece.owner][copy.source : copy.source + copy.nbytes]
                    at = bucket.offset + copy.offset
                    ring[at : at + copy.nbytes] = torch.tensor(list(content), dtype=torch.uint8)
            last = max(range(len(bucket.items)), key=lambda i: bucket.items[i].nbytes)
            item = bucket.items[last]
            if spoilt and item.nbytes:
                ring[bucket.offset + item.offset + item.nbytes - 1] ^= 1
                if int(item.name[1:]) >= without:
                    wanted.append(Mismatch(number, last))
                    owners = [r for r in range(ranks) if item.name in [t.name for t in regions[r]]]
                    assert list(source_of(item.name, plan.buckets)) == owners
            verifier.check(number)
        assert verifier.mismatches(get_device("cpu"), SECONDS) == wanted
