from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.errors import CheckpointError, FileFormatError
from checkpoint_engine.memory import reader as module
from checkpoint_engine.memory.digest import Digests, Span, content_digest
from checkpoint_engine.memory.layout import MERGE_GAP, Extent, RegionLayout, lay_out
from checkpoint_engine.memory.reader import FileReader, ReadPlan
from checkpoint_engine.memory.region import PAGE, HostRegion
from checkpoint_engine.memory.safetensors import FileTensor, SafetensorsFile
from checkpoint_engine.memory.work import CHUNK_BYTES, do_all


def made_up(path: str, sizes: list[int], header: int = 333) -> SafetensorsFile:
    tensors, position = [], header
    for i, size in enumerate(sizes):
        tensors.append(FileTensor(f"{path}.{i}", "uint8", (size,), position, size))
        position += size
    return SafetensorsFile(Path(path), position, header, tuple(tensors))


def check(layouts: tuple[RegionLayout, ...], files: list[SafetensorsFile], wanted: set[str]) -> None:
    placed = [p for layout in layouts for p in layout.placements]
    assert sorted(p.tensor.name for p in placed) == sorted(wanted)
    by_path = {file.path: file for file in files}
    for layout in layouts:
        end = 0
        for extent in layout.extents:
            assert extent.region_offset % PAGE == extent.file_offset % PAGE == 0
            assert extent.region_offset >= end
            end = extent.region_offset + extent.nbytes
            assert extent.file_offset + extent.nbytes <= by_path[extent.file].size
        assert max(end, 1) <= layout.nbytes <= end + PAGE  # files of which only empty tensors are wanted may come last
        end = 0
        for p in layout.placements:
            assert end <= p.offset <= p.end <= layout.nbytes
            end = p.end
            if p.tensor.nbytes:  # its bytes come from its place in its file
                assert any(
                    e.region_offset <= p.offset
                    and p.end <= e.region_offset + e.nbytes
                    and p.offset - e.region_offset == p.tensor.start - e.file_offset
                    and p.tensor.name.startswith(f"{e.file}.")
                    for e in layout.extents
                )


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_layouts(data: st.DataObject) -> None:
    size = st.one_of(st.just(0), st.integers(1, 5000), st.integers(MERGE_GAP - 2, MERGE_GAP + 2), st.integers(1, 1 << 20))
    files = [made_up(f"f{i}", data.draw(st.lists(size, min_size=1, max_size=8))) for i in range(data.draw(st.integers(0, 4)))]
    names = [t.name for f in files for t in f.tensors]
    select = data.draw(st.one_of(st.none(), st.sets(st.sampled_from(names)) if names else st.just(set())))
    limit = data.draw(st.sampled_from([1, 100_000, 1 << 40]))
    layouts = lay_out(files, select, limit)
    check(layouts, files, set(names) if select is None else select)
    if limit == 1 << 40:
        assert len(layouts) <= 1


def test_whole_files_are_one_extent_and_neighbours_merge() -> None:
    file = made_up("f", [10, 20, MERGE_GAP, 30, 40])
    (layout,) = lay_out([file])
    assert layout.extents == (Extent(Path("f"), 0, file.size, 0),)
    assert lay_out([file], {t.name for t in file.tensors}) == (layout,)
    (layout,) = lay_out([file], {"f.0", "f.1", "f.4"})
    assert len(layout.extents) == 2
    (layout,) = lay_out([file], {"f.0", "f.4"}, 1)
    assert len(layout.extents) == 2
    (layout,) = lay_out([file], {"f.1", "f.2", "f.4"})
    assert len(layout.extents) == 1
    assert lay_out([file], set()) == ()


@pytest.fixture
def big(tmp_path: Path) -> tuple[Path, bytes]:
    content = os.urandom(CHUNK_BYTES // 4) * 5 + b"tail"
    (tmp_path / "big").write_bytes(content)
    return tmp_path / "big", content


def evict(path: Path) -> None:
    """Ask the kernel to forget the file's cached pages; it may decline."""
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@pytest.mark.parametrize("state", ["cached", "cold", "half cached"])
@pytest.mark.parametrize("touch", [True, False])
def test_reading(big: tuple[Path, bytes], state: str, touch: bool) -> None:
    path, content = big
    if state != "cached":
        evict(path)
    if state == "half cached":
        with path.open("rb") as f:
            f.read(len(content) // 2 + 123)
    with HostRegion(len(content), touch=touch) as region, FileReader(path) as reader:
        reader.read(region, Extent(path, 0, len(content), 0))
        assert bytes(region.view(0, len(content))) == content
    with HostRegion(3 * PAGE, touch=touch) as region, FileReader(path) as reader:
        evict(path)
        reader.read(region, Extent(path, 2 * PAGE, PAGE + 77, PAGE))  # ends in the middle of the file
        assert bytes(region.view(PAGE, PAGE + 77)) == content[2 * PAGE : 3 * PAGE + 77]
        assert not region.tensor[:PAGE].any()
        assert not region.tensor[2 * PAGE + 77 :].any()


def test_a_memory_file_system() -> None:
    path = Path(f"/dev/shm/checkpoint-engine-test-{os.getpid()}")
    path.write_bytes(b"x" * 10_000)
    try:
        with HostRegion(10_000) as region, FileReader(path) as reader:
            reader.read(region, Extent(path, 0, 10_000, 0))
            assert bytes(region.view(0, 10_000)) == b"x" * 10_000
    finally:
        path.unlink()


# No file system here returns little at a time or refuses flags at will, so these stand between the reader and the kernel.
def reluctant(limit: int, no_flags: bool, no_direct: bool) -> Callable[..., int]:
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        import errno
        import fcntl

        if flags and no_flags:
            raise OSError(errno.EOPNOTSUPP, "not here")
        if no_direct and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "not here")
        return real(fd, [buffers[0][:limit]], offset, flags)

    return preadv


@pytest.mark.parametrize("limit", [1000, 4096, 12288 + 5])
@pytest.mark.parametrize("no_flags", [True, False])
@pytest.mark.parametrize("no_direct", [True, False])
def test_short_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, no_flags: bool, no_direct: bool) -> None:
    content = os.urandom(100_000)
    (tmp_path / "f").write_bytes(content)
    evict(tmp_path / "f")
    monkeypatch.setattr(module.os, "preadv", reluctant(limit, no_flags, no_direct))
    with HostRegion(len(content)) as region, FileReader(tmp_path / "f") as reader:
        reader.read(region, Extent(tmp_path / "f", 0, len(content), 0))
        assert bytes(region.view(0, len(content))) == content


@pytest.mark.parametrize("cold", [True, False])
def test_a_file_that_shrank(big: tuple[Path, bytes], cold: bool) -> None:
    path, content = big
    os.truncate(path, len(content) - PAGE - 10)
    if cold:
        evict(path)
    with HostRegion(len(content)) as region, FileReader(path) as reader, pytest.raises(FileFormatError, match="truncated"):
        reader.read(region, Extent(path, 0, len(content), 0))
    path.unlink()
    with pytest.raises(CheckpointError, match=str(path)):
        FileReader(path)


def test_plan_reads_all_and_makes_digests(tmp_path: Path) -> None:
    files, contents = [], {}
    for i, sizes in enumerate([[10, 0, CHUNK_BYTES + 9, 33, 1 << 20], [5], [0]]):
        file = made_up(str(tmp_path / f"f{i}"), sizes)
        contents[file.path] = os.urandom(file.size)
        file.path.write_bytes(contents[file.path])
        files.append(file)
    before = len(os.listdir("/proc/self/fd"))
    (layout,) = lay_out(files)
    done: list[int] = []
    digests = Digests(enabled=True)
    with HostRegion(layout.nbytes, touch=False) as region, ReadPlan(digests) as plan:
        spans = [Span(region, p.offset, p.tensor.nbytes) for p in layout.placements]
        plan.add(region, layout.extents, spans)
        do_all(plan.work, (), 3, done.append)
        assert len(os.listdir("/proc/self/fd")) == before + 2  # the region's and its mapping's
        assert sum(done) == sum(file.size for file in files)
        wanted = {t.name: contents[f.path][t.start : t.start + t.nbytes] for f in files for t in f.tensors}
        for p, span in zip(layout.placements, spans, strict=True):
            assert bytes(region.view(p.offset, p.tensor.nbytes)) == wanted[p.tensor.name]
            assert span.digest == content_digest(wanted[p.tensor.name])
