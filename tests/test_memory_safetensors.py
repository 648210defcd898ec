from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from checkpoint_engine.errors import CheckpointError, FileFormatError
from checkpoint_engine.manifest import ITEMSIZE
from checkpoint_engine.memory.safetensors import DTYPES, MAX_HEADER, checkpoint_files, parse_file, parse_header

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, header: object, data: bytes, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def fails(path: Path, reason: str, tensor: str | None = None) -> None:
    with pytest.raises(FileFormatError, match=reason) as caught:
        parse_file(path)
    assert caught.value.file == str(path)
    assert str(path) in str(caught.value)
    assert caught.value.tensor == tensor


def test_every_code_has_a_size() -> None:
    assert set(DTYPES.values()) <= set(ITEMSIZE)
    for name in (name for name in DTYPES.values() if hasattr(torch, name)):
        assert getattr(torch, name).itemsize == ITEMSIZE[name]


shapes = st.lists(st.integers(0, 5), max_size=4)
writable = sorted(set(DTYPES.values()) - {"float8_e8m0fnu"})  # the package has no torch dtype for it in every version


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda s: s != "__metadata__"),
                       st.tuples(st.sampled_from(writable), shapes), min_size=1, max_size=6))  # fmt: skip
def test_agrees_with_the_safetensors_package(
    tmp_path_factory: pytest.TempPathFactory, spec: dict[str, tuple[str, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("oracle") / "a.safetensors"
    tensors = {name: torch.zeros(shape, dtype=torch.int8).to(getattr(torch, dtype)) for name, (dtype, shape) in spec.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    parsed = parse_file(path)
    assert parsed.size == path.stat().st_size
    assert {t.name: (t.dtype, list(t.shape)) for t in parsed.tensors} == spec
    assert [t.start for t in parsed.tensors] == sorted(t.start for t in parsed.tensors)
    raw = path.read_bytes()
    with safe_open(path, "pt") as oracle:
        for t in parsed.tensors:
            assert raw[t.start : t.start + t.nbytes] == bytes(oracle.get_tensor(t.name).reshape(-1).view(torch.uint8).tolist())


def test_bad_files(tmp_path: Path) -> None:
    p = tmp_path / "bad.safetensors"
    p.write_bytes(b"")
    fails(p, "empty")
    p.write_bytes(b"1234567")
    fails(p, "too few")
    fails(write(p, b"{}", b"", length=MAX_HEADER + 1), "over the limit")
    fails(write(p, b"{}", b"", length=2**64 - 1), "over the limit")
    fails(write(p, b"{}", b"", length=3), "truncated")
    fails(write(p, b"", b""), "not a JSON object")
    fails(write(p, b"{}", b""), "no tensors")
    fails(write(p, {"__metadata__": {"a": "b"}}, b""), "no tensors")
    fails(write(p, {"__metadata__": {"a": 1}, "t": ONE}, bytes(8)), "__metadata__")
    fails(write(p, {"__metadata__": [], "t": ONE}, bytes(8)), "__metadata__")
    fails(write(p, {"t": ONE}, bytes(7)), "truncated")
    fails(write(p, {"t": ONE}, bytes(9)), "padded")
    with pytest.raises(CheckpointError, match="nowhere"):
        parse_file(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        parse_file(tmp_path)


@pytest.mark.parametrize("raw", [
    b"garbage", b"[]", b"{", b'{"a":}', b"\xff\xfe{}", b'{"a\xff": 1}', b'"x"', b" {}", b"{" + b'"a":{' * 100_000,
    b'{"\\ud800": {"dtype":"U8","shape":[],"data_offsets":[0,1]}}', b'{"t": ' + b"9" * 5000 + b"}", b'{} {}',
])  # fmt: skip
def test_garbage_headers(tmp_path: Path, raw: bytes) -> None:
    fails(write(tmp_path / "bad.safetensors", raw, b"\0"), "JSON")


def test_duplicate_names(tmp_path: Path) -> None:
    one = json.dumps(ONE)
    fails(write(tmp_path / "bad.safetensors", f'{{"t": {one}, "t": {one}}}'.encode(), bytes(8)), "'t' is in the header twice")


@pytest.mark.parametrize(("change", "reason"), [
    ({"dtype": "F33"}, "unknown dtype 'F33'"), ({"dtype": 3}, "no dtype"), ({"dtype": None}, "no dtype"),
    ({"dtype": "F4"}, "smaller than a byte"), ({"dtype": "F6_E2M3"}, "smaller than a byte"),
    ({"shape": None}, "shape"), ({"shape": [-1, -2]}, "shape"), ({"shape": [True, 2]}, "shape"), ({"shape": [2.0]}, "shape"),
    ({"shape": {"0": 2}}, "shape"), ({"shape": ["2"]}, "shape"), ({"shape": [3]}, "needs 12 bytes"),
    ({"shape": [2**64]}, "too large"), ({"shape": [0, 2**62, 2**62]}, "too large"),
    ({"data_offsets": None}, "data_offsets"), ({"data_offsets": [8, 0]}, "data_offsets"), ({"data_offsets": [0]}, "data_offsets"),
    ({"data_offsets": [0, 8, 16]}, "data_offsets"), ({"data_offsets": [-8, 0]}, "data_offsets"),
    ({"data_offsets": [False, 8]}, "data_offsets"), ({"data_offsets": [0, 8.0]}, "data_offsets"),
    ({"data_offsets": [0, 2**200]}, "needs 8 bytes"),
    ({"data_offsets": [4, 12]}, "hole"),
])  # fmt: skip
def test_bad_tensors(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    fails(write(tmp_path / "bad.safetensors", {"t": {**ONE, **change}}, bytes(8)), reason, "t")


def test_entries_that_are_no_tensors(tmp_path: Path) -> None:
    for entry in (None, 1, "x", []):
        fails(write(tmp_path / "bad.safetensors", {"t": entry}, bytes(8)), "not an object", "t")


def test_holes_and_overlaps(tmp_path: Path) -> None:
    p = tmp_path / "bad.safetensors"
    fails(write(p, {"a": ONE, "b": {**ONE, "data_offsets": [12, 20]}}, bytes(20)), "hole", "b")
    fails(write(p, {"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, bytes(12)), "overlap", "b")
    fails(write(p, {"a": ONE, "b": ONE}, bytes(8)), "overlap", "b")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_raises_our_error_or_parses(data: st.DataObject) -> None:
    raw = bytearray(save({"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}))
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length]
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    try:
        tensors = parse_header(bytes(header), len(raw) - 8 - length, "f")
    except FileFormatError:
        return
    assert sum(t.nbytes for t in tensors) == len(raw) - 8 - length


def test_checkpoint_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        checkpoint_files(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="no safetensors files"):
        checkpoint_files(tmp_path)
    for name in ("b", "a", "extra"):
        (tmp_path / f"{name}.safetensors").touch()
    assert [f.name for f in checkpoint_files(tmp_path)] == ["a.safetensors", "b.safetensors", "extra.safetensors"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}}))
    assert [f.name for f in checkpoint_files(str(tmp_path))] == ["a.safetensors", "b.safetensors"]
    os.unlink(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"b\.safetensors: no such file, though .*index\.json names it"):
        checkpoint_files(tmp_path)
    for bad in ("{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": []}}', '{"weight_map": {"a": "../x"}}',
                '{"weight_map": {"a": "/etc/passwd"}}', '{"weight_map": {"a": 3}}'):  # fmt: skip
        index.write_text(bad)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            checkpoint_files(tmp_path)
    index.write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"index\.json"):
        checkpoint_files(tmp_path)
    index.write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="no safetensors files"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize("name", ["b" * 300, "\u00e9" * 200])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    """Longer than file systems allow, by whom even the question whether it is there is refused."""
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint_files(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        checkpoint_files(tmp_path / name)
