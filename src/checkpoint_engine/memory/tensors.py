"""Tensors that a caller hands over: which can be taken, where they go in a region, and the work of copying them there."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from checkpoint_engine.errors import TensorError
from checkpoint_engine.manifest import ITEMSIZE
from checkpoint_engine.memory.digest import Block, Digests, Span
from checkpoint_engine.memory.region import HostRegion
from checkpoint_engine.memory.work import CHUNK_BYTES, Work
from checkpoint_engine.planning.order import layer_key

ALIGNMENT = 256
"""Bytes. Every tensor starts at a multiple of this in the region."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor that can be taken and where it goes. value: plain and detached; dtype: torch's name; offset, nbytes: bytes."""

    name: str
    value: torch.Tensor
    dtype: str
    offset: int
    nbytes: int


def place_tensors(named: Mapping[str, torch.Tensor]) -> tuple[tuple[NamedTensor, ...], int]:
    """The tensors in the model's layer order, each at its aligned offset, and the size in bytes of the region they need.

    Raises TensorError for the first that cannot be taken.
    """
    placed: list[NamedTensor] = []
    end = 0
    plain = {name: plain_tensor(name, value) for name, value in named.items()}
    for name in sorted(plain, key=layer_key):
        value = plain[name]
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        nbytes = value.numel() * value.element_size()
        placed.append(NamedTensor(name, value, str(value.dtype).removeprefix("torch."), offset, nbytes))
        end = offset + nbytes
    return tuple(placed), max(end, 1)


def plain_tensor(name: str, value: torch.Tensor) -> torch.Tensor:
    """`value`, detached, if its bytes can be copied as they are. Raises TensorError that says what to do otherwise."""
    if not isinstance(name, str):
        raise TensorError(repr(name), "tensors are named by strings")
    if not isinstance(value, torch.Tensor):
        raise TensorError(name, f"it is not a tensor but a {type(value).__name__}")
    if hasattr(value, "placements") or hasattr(value, "device_mesh"):
        raise TensorError(name, "it is sharded (a DTensor); hand over full_tensor(), or to_local() where that is the whole")
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TensorError(name, f"it is a {type(value).__name__}, which wraps other tensors; hand those over instead")
    if value.layout != torch.strided:
        raise TensorError(name, f"its layout is {value.layout}; hand over to_dense()")
    if value.is_quantized:
        raise TensorError(name, "it is quantized by torch; hand over int_repr(), and its scales as further tensors")
    if value.is_meta:
        raise TensorError(name, "it is on the meta device and has no bytes; load or initialise the model first")
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in ITEMSIZE:
        raise TensorError(name, f"dtype {dtype} cannot be moved; hand over a view of another dtype, such as uint8")
    value = value.detach()
    reach = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    if value.numel() and (value.storage_offset() + reach) * value.element_size() > value.untyped_storage().nbytes():
        raise TensorError(name, "its storage has been freed or resized; gather the parameters first")
    return value


class _Piece(NamedTuple):
    """What is copied at a time: the part of `tensor` that goes to the block."""

    tensor: NamedTensor
    block: Block


class CopyPlan:
    """The work of copying tensors into one region.

    shared  for threads: contiguous host memory, in chunks, digests made on the way
    own     for the caller's thread: torch divides copies of strided host tensors over threads of its own, and copies
            from a device must follow what the caller queued there
    late    spans whose digests are still to be made when both are over and `finish` was called
    """

    def __init__(self, region: HostRegion, tensors: Sequence[NamedTensor], spans: Sequence[Span], digests: Digests) -> None:
        self.shared: list[Work] = []
        self.own: list[Work] = []
        self.late: list[Span] = []
        self._region, self._digests = region, digests
        self._devices: set[torch.device] = set()
        pieces: list[_Piece] = []
        for tensor, span in zip(tensors, spans, strict=True):
            if tensor.nbytes == 0:
                continue
            value = tensor.value
            if value.device.type == "cpu" and value.is_contiguous() and not (value.is_conj() or value.is_neg()):
                pieces += [_Piece(tensor, block) for block in span.blocks]
            else:
                self.own.append(Work(partial(self._convert, tensor), tensor.nbytes))
                self.late.append(span)
                if value.device.type != "cpu":
                    self._devices.add(value.device)
        self._divide(pieces)

    def _divide(self, pieces: Iterable[_Piece]) -> None:
        batch: list[_Piece] = []
        size = 0
        for piece in pieces:
            batch.append(piece)
            size += piece.block.end - piece.block.offset
            if size >= CHUNK_BYTES:
                self.shared.append(Work(partial(self._move, batch), size))
                batch, size = [], 0
        if batch:
            self.shared.append(Work(partial(self._move, batch), size))

    def _move(self, batch: Sequence[_Piece]) -> None:
        base = self._region.tensor.data_ptr()
        for tensor, block in batch:
            source = tensor.value.data_ptr() + block.offset - tensor.offset
            # Not torch's copy_, which would start a team of threads for each of ours.
            ctypes.memmove(base + block.offset, source, block.end - block.offset)
        self._digests.make(self._region, [block for _, block in batch])

    def _convert(self, tensor: NamedTensor) -> None:
        value = tensor.value.resolve_conj().resolve_neg()
        if value.dtype == torch.complex128:
            value = torch.view_as_real(value)
        integers = _INTEGERS[value.element_size()]  # moves any dtype, also those torch computes little with
        target = self._region.tensor[tensor.offset : tensor.offset + tensor.nbytes].view(integers).view(value.shape)
        target.copy_(value.view(integers), non_blocking=value.device.type == "cuda")

    def finish(self) -> None:
        """Wait until all copies from devices are over."""
        for device in self._devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
