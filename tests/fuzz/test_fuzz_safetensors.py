"""Headers of safetensors files: every one is refused with a typed error that names the file, or read as what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from checkpoint_engine.errors import CheckpointError, FileFormatError
from checkpoint_engine.manifest import ITEMSIZE
from checkpoint_engine.memory.safetensors import DTYPES, FileTensor, checkpoint_files, parse_file, parse_header
from helpers.damage import INTEGERS, damaged, misshapen
from helpers.fuzzing import fuzz

TENSORS = {
    "a": torch.ones(3),
    "layers.0.b": torch.zeros(2, 2, dtype=torch.bfloat16),
    "none": torch.zeros(0, 4),
    "c": torch.zeros((), dtype=torch.int64),
}
VALID = save(TENSORS, metadata={"format": "pt"})
LENGTH = int.from_bytes(VALID[:8], "little")
HEADER: dict[str, Any] = json.loads(VALID[8 : 8 + LENGTH])
DATA = len(VALID) - 8 - LENGTH
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F4", "X", "", 1]),
        "shape": st.lists(INTEGERS, max_size=4),
        "data_offsets": st.lists(INTEGERS, min_size=1, max_size=3),
    },
)


def check(tensors: tuple[FileTensor, ...], data_start: int, end: int) -> None:
    """They cover the data exactly, each with as many bytes as its shape needs."""
    position = data_start
    assert len({t.name for t in tensors}) == len(tensors) > 0
    for t in tensors:
        assert t.start == position
        count = 1
        for n in t.shape:
            assert type(n) is int and n >= 0
            count *= n
        assert t.nbytes == count * ITEMSIZE[t.dtype]
        position += t.nbytes
    assert position == end


def try_header(header: bytes, nbytes: int) -> None:
    try:
        tensors = parse_header(header, nbytes, "some/file")
    except FileFormatError as e:
        error = e
    else:
        check(tensors, 8 + len(header), 8 + len(header) + nbytes)
        return
    assert error.file == "some/file" and str(error).startswith("some/file: ") and len(str(error)) < 10_000


@fuzz
@given(damaged(VALID[8 : 8 + LENGTH], most=8), st.integers(0, 2 * DATA))
def test_headers_of_damaged_bytes(header: bytes, nbytes: int) -> None:
    try_header(header, nbytes)
    try_header(header, DATA)


@fuzz
@given(misshapen(HEADER), st.data())
def test_headers_of_another_structure(header: Any, data: st.DataObject) -> None:
    if isinstance(header, dict) and data.draw(st.booleans()):
        header[data.draw(st.text(max_size=3))] = data.draw(ENTRIES)
    try_header(json.dumps(header, allow_nan=True).encode(), DATA)


@fuzz
@given(damaged(VALID, most=6))
def test_files_and_the_safetensors_package(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """What we take, the package takes, and says the same of it."""
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        parsed = parse_file(path)
    except FileFormatError:
        return
    check(parsed.tensors, parsed.data_start, len(content))
    theirs = {name: (info["dtype"], info["shape"], bytes(info["data"])) for name, info in safetensors.deserialize(content)}
    codes = {name: code for code, name in DTYPES.items()}
    ours = {t.name: (codes[t.dtype], list(t.shape), content[t.start : t.start + t.nbytes]) for t in parsed.tensors}
    assert ours == theirs


@fuzz
@given(st.binary(max_size=300))
def test_files_of_anything(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "anything.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"anything\.safetensors"):
        parse_file(path)


@fuzz
@given(misshapen({"metadata": {"total_size": 8}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
def test_indexes(tmp_path_factory: pytest.TempPathFactory, index: Any) -> None:
    """No file outside of the directory is ever named."""
    folder = tmp_path_factory.getbasetemp() / "model"
    folder.mkdir(exist_ok=True)
    for name in ("1.safetensors", "2.safetensors"):
        (folder / name).touch()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    try:
        files = checkpoint_files(folder)
    except CheckpointError:
        return
    assert files and all(Path(file).parent == folder and file.is_file() for file in files)
