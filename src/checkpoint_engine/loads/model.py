"""A model as a load plan sees it: its storages, and a fingerprint of all that a plan depends on."""

from __future__ import annotations

import bisect
import copy
import functools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from checkpoint_engine.devices.foreign import tensor_at
from checkpoint_engine.loads.plan import Storage
from checkpoint_engine.manifest import hex_digest

# Tensors whose values say which expert goes where: vLLM's `_expert_map` and EPLB's tables, SGLang's `physical_to_logical_map`.
_MAPS = re.compile(r"expert.*map|physical_to_logical|logical_to_physical|logical_replica|expert_location|log2phy")

_Span = tuple[str, int, int, str, torch.Tensor]  # device, first byte, byte behind the last, name, tensor


class _Laid(NamedTuple):
    """bytes, by_key: as Model's. names: of the tensors in each storage. ends: (first byte, end, its number), sorted."""

    bytes: list[torch.Tensor]
    by_key: dict[int, tuple[int, int]]
    names: list[list[str]]
    ends: list[tuple[int, int, int]]


class Model:
    """The storages of `tensors` (name -> parameter or buffer), numbered in the tensors' order; those that share bytes are one.

    maps  further tensors whose values decide where weights go (expert maps), by name

    It refers to the tensors' memory, and keeps it. Make a new one to see whether anything moved: only the fingerprint is worked
    out before more is asked for.
    fingerprint: 32 hex digits of the tensors' names, dtypes, shapes, strides and places, and of the maps' values.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], maps: Mapping[str, torch.Tensor] | None = None) -> None:
        rows: list[object] = []
        self._spans: list[_Span] = []
        for name, tensor in tensors.items():
            if _has_no_storage(tensor):
                rows.append((name, type(tensor).__qualname__))  # what writes there is not planned
                continue
            storage = tensor.untyped_storage()
            place = (storage.data_ptr(), storage.nbytes(), tensor.storage_offset(), tensor.stride(), str(tensor.device))
            rows.append((name, str(tensor.dtype), tuple(tensor.shape), *place))
            if place[1]:
                self._spans.append((place[4], place[0], place[0] + place[1], name, tensor))
        values = [(name, _values(tensor)) for name, tensor in sorted((maps or {}).items())]
        self.fingerprint = hex_digest(msgspec.msgpack.encode([rows, values]))

    @classmethod
    def of(cls, module: torch.nn.Module, maps: Mapping[str, torch.Tensor] | None = None) -> Model:
        """Of a module's parameters and buffers; its expert maps are found by their names, others are passed as `maps`."""
        tensors: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
        tensors.update(module.named_buffers(remove_duplicate=False))
        return cls(tensors, {**expert_maps(module), **(maps or {})})

    @functools.cached_property
    def _laid(self) -> _Laid:
        laid = _Laid([], {}, [], [])
        order = {span[3]: index for index, span in enumerate(self._spans)}
        groups = _groups(sorted(self._spans, key=lambda span: span[:3]))
        for group in groups:
            group.sort(key=lambda span: order[span[3]])
        for group in sorted(groups, key=lambda group: order[group[0][3]]):
            _add(laid, group)
        laid.ends.sort()
        return laid

    @property
    def bytes(self) -> list[torch.Tensor]:
        """Every storage as a uint8 tensor."""
        return self._laid.bytes

    @property
    def by_key(self) -> dict[int, tuple[int, int]]:
        """`storage_key` -> (number, bytes from the number's start)."""
        return self._laid.by_key

    def unheld(self) -> Model:
        """The same, without keeping the memory: to be used only while the model is known to have this fingerprint."""
        model = copy.copy(self)
        raws = [tensor_at(raw.data_ptr(), raw.numel(), raw.device) for raw in self.bytes]
        vars(model)["_laid"] = self._laid._replace(bytes=raws)
        model._spans = []
        return model

    @property
    def storages(self) -> tuple[Storage, ...]:
        return tuple(Storage(raw.numel(), tuple(names)) for raw, names in zip(self.bytes, self._laid.names, strict=True))

    def at(self, address: int) -> tuple[int, int] | None:
        """Storage and offset of the byte at `address`; None where nothing of the model lies."""
        ends = self._laid.ends
        index = bisect.bisect_right(ends, (address, 1 << 64, 0)) - 1
        if index < 0 or address >= ends[index][1]:
            return None
        return ends[index][2], address - ends[index][0]


def _add(laid: _Laid, group: list[_Span]) -> None:
    number, low, high = len(laid.bytes), min(span[1] for span in group), max(span[2] for span in group)
    kept = [span[4].detach() for span in group]
    laid.bytes.append(tensor_at(low, high - low, kept[0].device, functools.partial(_let_go, kept)))
    laid.names.append([span[3] for span in group])
    laid.ends.append((low, high, number))
    for _, base, _, _, tensor in group:
        laid.by_key[storage_key(tensor)] = (number, base - low)


def storage_key(tensor: torch.Tensor) -> int:
    """The same for all views of one storage, and no other storage's while that one lives."""
    key: int = tensor.untyped_storage()._cdata
    return key


def _has_no_storage(tensor: torch.Tensor) -> bool:
    return is_traceable_wrapper_subclass(tensor) or tensor.is_meta or tensor.layout is not torch.strided


def _groups(spans: Iterable[_Span]) -> list[list[_Span]]:
    """Spans of one device that overlap, together."""
    groups: list[list[_Span]] = []
    device, end = "", 0
    for span in spans:
        if not groups or span[0] != device or span[1] >= end:
            groups.append([])
            end = 0
        groups[-1].append(span)
        device, end = span[0], max(end, span[2])
    return groups


def _let_go(_: list[torch.Tensor]) -> None:
    """Called when the memory is no longer needed; until then the partial holds it."""


def expert_maps(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tensors anywhere in it whose names say that their values decide which weights go where."""
    found: dict[str, torch.Tensor] = {}
    for path, child in module.named_modules():
        attributes: Iterable[tuple[str, object]] = {**vars(child), **child._buffers, **child._parameters}.items()
        for name, value in attributes:
            if isinstance(value, torch.Tensor) and _MAPS.search(name):
                found[f"{path}.{name}"] = value
    return found


def _values(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return str(tensor.dtype), tuple(tensor.shape), bytes(raw.tolist())
