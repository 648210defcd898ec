"""Reading the header of a safetensors file: 8 bytes of length, JSON, then the tensors' bytes without holes."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from checkpoint_engine.errors import CheckpointError, FileFormatError
from checkpoint_engine.manifest import ITEMSIZE

MAX_HEADER = 100_000_000
INDEX = "model.safetensors.index.json"

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
"""safetensors' codes of dtypes -> torch's names."""

SUB_BYTE = frozenset({"F4", "F6_E2M3", "F6_E3M2"})


@dataclass(frozen=True, slots=True)
class FileTensor:
    """One tensor of a file. dtype: torch's name; start: bytes from the start of the FILE."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """What a file holds. size, data_start: bytes; tensors in the order in which they lie in the file."""

    path: Path
    size: int
    data_start: int
    tensors: tuple[FileTensor, ...]


def parse_file(path: str | Path) -> SafetensorsFile:
    """Read and check a file's header.

    Raises CheckpointError when the file cannot be read, and FileFormatError, which names the file and the tensor, when it
    is not a valid safetensors file or holds no tensors.
    """
    path = Path(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            header = _read_header(fd, size, str(path))
        finally:
            os.close(fd)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
    data_start = 8 + len(header)
    return SafetensorsFile(path, size, data_start, parse_header(header, size - data_start, str(path)))


def _read_header(fd: int, size: int, file: str) -> bytes:
    if size == 0:
        raise FileFormatError(file, "the file is empty")
    if size < 8:
        raise FileFormatError(file, f"{size} bytes are too few for a safetensors file")
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if length > MAX_HEADER:
        raise FileFormatError(file, f"the header's length is {length}, over the limit of {MAX_HEADER} bytes")
    if length > size - 8:
        raise FileFormatError(file, f"truncated: the header has {length} bytes, the file {size}")
    header = b""
    while len(header) < length:
        part = os.pread(fd, length - len(header), 8 + len(header))
        if not part:
            raise FileFormatError(file, "truncated while its header was read")
        header += part
    return header


def parse_header(header: bytes, data_bytes: int, file: str) -> tuple[FileTensor, ...]:
    """The tensors that `header` describes, which must cover the `data_bytes` bytes after it exactly.

    Raises FileFormatError.
    """
    fields = _decode(header, file)
    metadata = fields.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise FileFormatError(file, "__metadata__ must map strings to strings")
    if not fields:
        raise FileFormatError(file, "the file holds no tensors")
    data_start = 8 + len(header)
    tensors = sorted(
        (_tensor(name, info, data_start, file) for name, info in fields.items()), key=lambda t: (t.start, t.start + t.nbytes)
    )
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            what = "overlap those of another tensor" if tensor.start < position else "leave a hole before it"
            raise FileFormatError(file, f"its bytes {what}", tensor.name)
        position += tensor.nbytes
    if (end := data_start + data_bytes) != position:
        what = "truncated" if end < position else "padded"
        raise FileFormatError(file, f"{what}: the tensors end at byte {position}, the file at byte {end}")
    return tuple(tensors)


def _decode(header: bytes, file: str) -> dict[str, Any]:
    if not header.startswith(b"{"):
        raise FileFormatError(file, "the header is not a JSON object")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise FileFormatError(file, f"{twice!r} is in the header twice")
        return result

    try:
        fields: dict[str, Any] = json.loads(header.decode(), object_pairs_hook=unique)  # a brace opens it, so it is a dict
        "".join(fields).encode()  # JSON's escapes can spell strings that are not text
    except (ValueError, RecursionError) as e:
        raise FileFormatError(file, f"the header is not valid JSON: {str(e)[:200]}") from None
    return fields


def _tensor(name: str, info: object, data_start: int, file: str) -> FileTensor:
    def bad(reason: str) -> FileFormatError:
        return FileFormatError(file, reason, name)

    if not isinstance(info, dict):
        raise bad("its entry in the header is not an object")
    code, shape, offsets = (info.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(code, str):
        raise bad("it has no dtype")
    if code in SUB_BYTE:
        raise bad(f"dtype {code} has elements smaller than a byte, which is not supported")
    if code not in DTYPES:
        raise bad(f"unknown dtype {code[:40]!r}")
    if not _naturals(shape):
        raise bad("its shape is not a list of natural numbers")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad("its data_offsets are not two ascending natural numbers")
    itemsize = ITEMSIZE[DTYPES[code]]
    expected, span = itemsize, itemsize
    for dim in shape:
        expected, span = expected * dim, span * max(dim, 1)
        if span >= 1 << 63:
            raise bad("its shape is too large")
    begin, end = offsets
    if end - begin != expected:
        raise bad(f"{code} x {shape} needs {expected} bytes, its data_offsets give {end - begin}")
    return FileTensor(name, DTYPES[code], tuple(shape), data_start + begin, expected)


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)  # type(): True is not a size


def checkpoint_files(directory: str | Path) -> list[Path]:
    """The safetensors files of a Hugging Face checkpoint directory, sorted: those that its index names, all if it has none.

    Raises CheckpointError that names the directory or file that is missing or cannot be used.
    """
    directory = Path(directory)
    if not os.path.isdir(directory):  # not pathlib's, which raises for names that are too long
        raise CheckpointError(f"{directory}: no such directory")
    index = directory / INDEX
    files = _indexed(index) if index.exists() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory}: no safetensors files in it")
    for file in files:
        if not os.path.isfile(file):
            raise CheckpointError(f"{file}: no such file" + (f", though {index} names it" if index.exists() else ""))
    return files


def _indexed(index: Path) -> list[Path]:
    try:
        names: Iterable[Any] = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = set(names)
    except OSError as e:
        raise CheckpointError(f"{index}: cannot be read: {e.strerror}") from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{index}: not a valid index, which maps tensors to files under 'weight_map'") from e
    for name in names:
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{index}: {name!r} does not name a file of its directory")
    return sorted(index.parent / name for name in names)
