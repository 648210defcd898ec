"""Who holds what: rank -> regions -> tensors. Pure data; knows nothing of torch, devices or processes."""

from __future__ import annotations

import hashlib
import math
from functools import cached_property
from typing import Annotated, Self

import msgspec

# torch's names of the dtypes that can be moved -> bytes of one element. safetensors' codes are mapped to these names.
ITEMSIZE = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1,
    "bool": 1, "complex64": 8, "complex128": 16,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
}  # fmt: skip


def hex_digest(data: bytes) -> str:
    """BLAKE2b of `data`, 32 hex digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class TensorMeta(msgspec.Struct, frozen=True, array_like=True):
    """One tensor of a region.

    dtype   torch's name of it, a key of ITEMSIZE
    offset  bytes from the start of the region
    digest  64-bit digest of its bytes; 0 when none was made
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    digest: Annotated[int, msgspec.Meta(ge=0)] = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


class RegionMeta(msgspec.Struct, frozen=True, array_like=True):
    """One contiguous piece of registered host memory, `nbytes` long; tensors in order of offset, never overlapping."""

    nbytes: int
    tensors: tuple[TensorMeta, ...]


class RankManifest(msgspec.Struct, frozen=True, dict=True):
    """What one rank holds of a checkpoint, and where that rank is."""

    rank: int
    host: str
    device: str
    regions: tuple[RegionMeta, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for r in self.regions for t in r.tensors)

    @cached_property
    def encoded(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @cached_property
    def digest(self) -> str:
        """Of everything in it, 32 hex digits: equal digests mean that a plan can be used again."""
        return hex_digest(self.encoded)


class Manifest(msgspec.Struct, frozen=True, dict=True):
    """What all ranks hold of one checkpoint, in rank order. The same object on every rank after `gather_metas`."""

    checkpoint: str
    ranks: tuple[RankManifest, ...]

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    @cached_property
    def nbytes(self) -> int:
        return sum(r.nbytes for r in self.ranks)

    @cached_property
    def tensor_count(self) -> int:
        return sum(len(region.tensors) for r in self.ranks for region in r.regions)

    @cached_property
    def layout_digest(self) -> str:
        """Of who holds what where, 32 hex digits; plans are kept by it. Blind to the tensors' contents and the name."""
        rows = [[[(t.name, t.dtype, t.shape, t.offset) for t in g.tensors] for g in r.regions] for r in self.ranks]
        return hex_digest(msgspec.msgpack.encode(rows))

    @cached_property
    def content_digest(self) -> str:
        """Of names, dtypes, shapes and the tensors' digests, 32 hex digits: two checkpoints have the same one if all of these
        are equal, however they are spread over ranks, whatever they are called and whether they came from files. A tensor
        without a digest (ParameterServer makes all) counts without its bytes."""
        rows = {(t.name, t.dtype, t.shape, t.digest) for r in self.ranks for region in r.regions for t in region.tensors}
        rows -= {(name, dtype, shape, 0) for name, dtype, shape, digest in rows if digest}  # another holder made it
        return hex_digest(msgspec.msgpack.encode(sorted(rows)))

    @property
    def version(self) -> str:
        """The default version: the checkpoint's name and 12 digits of `content_digest`."""
        return f"{self.checkpoint}@{self.content_digest[:12]}"

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Raises msgspec.ValidationError or DecodeError when `data` is not a manifest."""
        try:
            manifest = msgspec.json.decode(data, type=cls)
            msgspec.msgpack.encode(manifest)
        except UnicodeDecodeError as e:  # msgspec leaves text that is none to Python
            raise msgspec.DecodeError(str(e)) from e
        except RecursionError as e:
            raise msgspec.DecodeError("it is nested too deeply") from e
        except OverflowError as e:  # JSON has numbers that no manifest has on a wire
            raise msgspec.ValidationError(str(e)) from e
        return manifest
