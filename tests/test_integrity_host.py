"""Checking host memory in threads: the same verdict as any other way, for any tensors; and what does not fit is refused."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.devices import host_digests
from checkpoint_engine.devices.base import SharedHandle, get_device
from checkpoint_engine.devices.digests import Layout, Run, Verifier
from checkpoint_engine.devices.host_digests import BLOCK_BYTES, HostVerifier
from checkpoint_engine.errors import DeadlineError, IntegrityError, ProtocolError
from checkpoint_engine.memory.checksum import CHUNK_BYTES, SMALL_BYTES, digest, finish, partial_sum, run_sums
from checkpoint_engine.planning.digests import pack
from checkpoint_engine.planning.plan import Item
from checkpoint_engine.transport.messages import Attach, Table
from checkpoint_engine.worker.check import Check, DeviceCheck, HostCheck, make_check

SECONDS = 20.0
SIZES = [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, SMALL_BYTES - 1, SMALL_BYTES, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 3]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(SIZES), st.integers(0, 9), st.booleans()), max_size=12), st.integers(0, 1 << 30))
def test_sums_of_many_runs_are_those_of_each(runs: list[tuple[int, int, bool]], seed: int) -> None:
    """Of any size, at any address, one right behind the other or not, beginning with any chunk."""
    rng = random.Random(seed)
    raw = torch.frombuffer(bytearray(rng.randbytes(1 << 16)) * 900, dtype=torch.uint8)
    raws, firsts, end = [], [], 0
    for nbytes, gap, behind in runs:
        end += 0 if behind else gap
        raws.append(raw[end : end + nbytes])
        firsts.append(rng.choice((0, 1, 300)))
        end += nbytes
    assert end < len(raw)
    totals = [int(partial_sum(each, first)) for each, first in zip(raws, firsts, strict=True)]
    assert [finish(total, 0) for total in run_sums(raws, firsts)] == [finish(total, 0) for total in totals]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(SIZES), st.booleans(), st.booleans()), min_size=1, max_size=8),
    st.integers(1, 4),
    st.data(),
)
def test_the_same_verdict_as_the_verifier(tensors: list[tuple[int, bool, bool]], threads: int, data: st.DataObject) -> None:
    """tensors: bytes, whether it has a digest, whether it is spoilt. Any cut into buckets, begun in any number ahead."""
    runs, end = [], 1  # at any address
    for nbytes, _, _ in tensors:
        runs.append(Run(0, end, nbytes))
        end += nbytes + data.draw(st.integers(0, 9))
    memory = torch.randint(0, 256, (end,), dtype=torch.uint8, generator=torch.Generator().manual_seed(end))
    expected = [
        digest(memory[r.offset : r.offset + r.nbytes]) if has else 0 for r, (_, has, _) in zip(runs, tensors, strict=True)
    ]
    for run, (nbytes, _, spoilt) in zip(runs, tensors, strict=True):
        if spoilt and nbytes:
            memory[run.offset + data.draw(st.integers(0, nbytes - 1))] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.integers(0, len(runs)))
    layout = Layout([runs[:cut], [], runs[cut:]])
    verifier = Verifier(layout, pack(expected), [memory], kernel=False)
    for bucket in range(3):
        verifier.check(bucket)
    with HostVerifier(layout, pack(expected), [memory], threads) as host:
        for bucket in range(3):
            host.begin(bucket)
        found = [mismatch for bucket in range(3) for mismatch in host.mismatches(bucket, SECONDS)]
        assert found == verifier.mismatches(get_device("cpu"), SECONDS)
        assert host.nbytes == sum(nbytes for nbytes, has, _ in tensors if has)
        assert host.seconds > 0 or not host.nbytes


def _fitting(**changes: Any) -> tuple[Attach, list[Table], list[torch.Tensor]]:
    memory = torch.randint(0, 256, (1000,), dtype=torch.uint8)
    items = [Item(name, "uint8", (400,), offset, 400) for name, offset in (("a", 0), ("b", 500))]
    tables = [Table(100, 900, tuple(items))]
    digests = pack([digest(memory[100 + item.offset :][:400]) for item in items])
    attach = Attach(0, (SharedHandle("memfd", 1000),), f"plan {len(changes)}", None, digests=changes.pop("digests", digests))
    return attach, tables, [memory]


def test_only_what_matters_is_checked() -> None:
    attach, tables, memories = _fitting()
    with make_check(attach, tables, memories, get_device("cpu"), SECONDS) as check:
        assert isinstance(check, HostCheck)
        memories[0][100] ^= 1  # of a
        check.begin(0, [1])
        check.before_load(0)
        check.begin(0, None)
        with pytest.raises(IntegrityError, match="the bytes of tensor 'a' are not those that were registered"):
            check.before_load(0)
        check.finish()
        assert check.nbytes == 1200


def test_a_device_tells_at_the_end() -> None:
    attach, tables, memories = _fitting()
    layout = Layout([[Run(0, 100, 400), Run(0, 600, 400)]])
    check = DeviceCheck(Verifier(layout, attach.digests, memories), tables, get_device("cpu"), SECONDS)
    memories[0][600:] ^= 1
    check.begin(0, None)
    check.before_load(0)
    with pytest.raises(IntegrityError, match="tensor 'b'"):
        check.finish()
    assert check.nbytes == 800


def test_without_digests_nothing_is_checked() -> None:
    attach, tables, memories = _fitting(digests=b"")
    check = make_check(attach, tables, memories, get_device("cpu"), SECONDS)
    assert type(check) is Check and check.ahead == 1


@pytest.mark.parametrize("digests", [b"1" * 8, b"1" * 17, b"1" * 24])
def test_digests_of_another_plan_are_refused(digests: bytes) -> None:
    attach, tables, memories = _fitting(digests=digests)
    with pytest.raises(ProtocolError, match=f"{len(digests)} bytes of digests for 2 tensors"):
        make_check(attach, tables, memories, get_device("cpu"), SECONDS)


@pytest.mark.parametrize(
    "item",
    [
        Item("c", "uint8", (901,), 0, 901),
        Item("c", "uint8", (4,), 0, 4, memory=1),
        Item("c", "uint8", (4,), 0, 4, memory=-1),
        Item("c", "uint8", (4,), -101, 4),
    ],
)
def test_tables_that_do_not_fit_the_memory_are_refused(item: Item) -> None:
    _, _, memories = _fitting()
    attach = Attach(0, (SharedHandle("memfd", 1000),), repr(item), None, digests=b"1" * 8)
    with pytest.raises(ProtocolError, match="do not fit"):
        make_check(attach, [Table(100, 900, (item,))], memories, get_device("cpu"), SECONDS)


def test_a_digest_that_is_not_made_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def late(raws: list[torch.Tensor], firsts: list[int]) -> list[int]:
        go.wait(SECONDS)
        return [0 for _ in raws]

    monkeypatch.setattr(host_digests, "run_sums", late)
    memory = torch.ones(100, dtype=torch.uint8)
    with HostVerifier(Layout([[Run(0, 0, 100)]]), pack([finish(0, 100)]), [memory]) as host:
        host.begin(0)
        with pytest.raises(DeadlineError, match="the digests of bucket 0 to be made"):
            host.mismatches(0, 0.01)
        go.set()
    with pytest.raises(ValueError, match="8 bytes of digests for 0 tensors"):
        HostVerifier(Layout([]), pack([1]), [])
