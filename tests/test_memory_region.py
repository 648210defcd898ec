from __future__ import annotations

import fcntl
import gc
import os
from pathlib import Path

import pytest
import torch

from checkpoint_engine.errors import CheckpointError
from checkpoint_engine.memory.pool import RegionPool
from checkpoint_engine.memory.region import PAGE, HostRegion


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def mapped(marker: str) -> bool:
    return marker in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("nbytes", [1, PAGE - 1, PAGE, PAGE + 1, (16 << 20) + 5])
@pytest.mark.parametrize("touch", [True, False])
def test_size_and_seals(nbytes: int, touch: bool) -> None:
    before = descriptors()
    with HostRegion(nbytes, touch=touch) as region:
        assert region.tensor.shape == (nbytes,)
        assert region.tensor.dtype == torch.uint8
        assert region.touched == touch
        assert not region.tensor.any()
        assert os.fstat(region.fd).st_size == -(-nbytes // PAGE) * PAGE
        seals = fcntl.fcntl(region.fd, fcntl.F_GET_SEALS)
        assert seals == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        with pytest.raises(PermissionError):
            os.ftruncate(region.fd, 2 * nbytes + PAGE)
        region.tensor[-1] = 7
        assert os.pread(region.fd, 1, nbytes - 1) == b"\7"
        region.touch(0, nbytes)
        region.touch_all(2)
        assert region.tensor[-1] == 7
    assert descriptors() == before


def test_closing_leaves_views_alive() -> None:
    before = descriptors()
    region = HostRegion(3 * PAGE)
    part = region.tensor[10:20]
    part.fill_(5)
    region.close()
    region.close()
    assert region.fd == -1
    assert region.closed
    assert part.tolist() == [5] * 10
    with pytest.raises(CheckpointError):
        _ = region.tensor
    with pytest.raises(CheckpointError):
        region.view(0, 1)
    del part
    assert descriptors() == before


def test_a_region_that_is_dropped_closes_itself() -> None:
    before = descriptors()
    regions = [HostRegion(PAGE) for _ in range(3)]
    assert len({r.generation for r in regions}) == 3
    del regions
    assert descriptors() == before


def test_sizes_that_cannot_be_had() -> None:
    before = descriptors()
    for nbytes in (0, -1, 1 << 62, 1 << 70):
        with pytest.raises(CheckpointError):
            HostRegion(nbytes, touch=False)
    assert descriptors() == before


def test_map_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"abc" * 3000)
    with HostRegion.map_file(path) as region:
        assert region.nbytes == 9000
        assert region.in_place
        assert bytes(region.view(0, 3)) == b"abc"
        path.write_bytes(b"xbc" * 3000)  # the same memory, not a copy
        assert bytes(region.view(0, 3)) == b"xbc"
        assert mapped(str(path))
    assert not mapped(str(path))
    (tmp_path / "empty").touch()
    for bad in (tmp_path / "empty", tmp_path / "missing", tmp_path):
        with pytest.raises(CheckpointError, match=str(bad)):
            HostRegion.map_file(bad)


def test_pool_uses_regions_again() -> None:
    created: list[int] = []
    destroyed: list[int] = []
    before = descriptors()
    with RegionPool(lambda r: created.append(r.generation), lambda r: destroyed.append(r.generation)) as pool:
        first = pool.acquire(5000)
        second = pool.acquire(5000)  # the first is in use
        assert first.fd != second.fd
        pool.release(first, keep=True)
        assert pool.kept_bytes == 5000
        assert pool.acquire(5000) is first
        assert created == [first.generation, second.generation]
        pool.release(second, keep=False)
        assert destroyed == [second.generation]
        pool.release(first, keep=True)
        pool.drop()
        assert destroyed == [second.generation, first.generation]
        assert pool.kept_bytes == 0
        kept = pool.acquire(100)
        pool.release(kept, keep=True)
        other = pool.acquire(200)  # another shape: what is kept makes room
        assert kept.closed
        pool.release(other, keep=True)
        late = pool.acquire(300)
    assert sorted(destroyed) == sorted(set(created) - {late.generation})
    pool.release(late, keep=True)
    assert late.closed
    assert sorted(destroyed) == sorted(created)
    with pytest.raises(CheckpointError, match="closed"):
        pool.acquire(1)
    assert descriptors() == before


def test_pool_undo_and_failing_hook() -> None:
    refuse = False
    destroyed: list[int] = []

    def register(region: HostRegion) -> None:
        if refuse:
            raise CheckpointError("no")

    before = descriptors()
    with RegionPool(register, lambda r: destroyed.append(r.generation)) as pool:
        kept = pool.acquire(100)
        pool.release(kept, keep=True)
        got = pool.acquire_all([100, 200])
        assert got[0] is kept
        pool.undo(got)
        assert got[1].closed
        assert pool.kept_bytes == 100
        assert destroyed == []  # the new one was never announced
        refuse = True
        with pytest.raises(CheckpointError, match="no"):
            pool.acquire(300)
        assert pool.kept_bytes == 0
        with pytest.raises(CheckpointError):
            pool.acquire_all([100, 1 << 62])
    del kept, got
    assert descriptors() == before
