"""What each operation of a loader means for a recording: a view, an exact copy, or the loader's business."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from checkpoint_engine.loads.geometry import simplify
from checkpoint_engine.loads.model import Model
from checkpoint_engine.loads.observed import Observed, Unexplained
from checkpoint_engine.loads.plan import Copy, Place
from checkpoint_engine.loads.spots import MODEL, SOURCE, Spot, Spots
from checkpoint_engine.loads.trace import Segment

Handler = Callable[[Any, Sequence[Any], dict[str, Any], Any], None]

# Aliases without saying so in their schema.
_ALIASES = {"aten::_unsafe_view"}
# The tensors that they are given only say how large and where.
_BLANK = {
    f"aten::{name}"
    for name in ("empty_like", "new_empty", "new_empty_strided", "zeros_like", "new_zeros", "ones_like", "new_ones", "full_like",
                 "new_full", "rand_like", "randn_like")
}  # fmt: skip
_OVERWRITES = {"aten::fill_", "aten::zero_", "aten::copy_"}


COMPOSITE = object()
"""Stands for operations made of others, which inference mode does not take apart by itself; some of those that call themselves
views copy (reshape)."""
UNKNOWN = object()
"""Stands for operations that were not seen before."""


class Operations:
    """Follows the storages of one recording, by `spots`. handlers: what to do after an operation; None: nothing, it is
    a view; COMPOSITE: to be taken apart.

    Taints are sets of sources (numbers >= 0) and of the model's storages (~number).
    """

    def __init__(self, model: Model, observed: Observed) -> None:
        self._seen = observed
        self._call = -1
        self._stale = False
        self._spots = self.spots = Spots(model)
        self.failure: str | None = None
        self.handlers: dict[Any, Any] = {}  # None, COMPOSITE or a Handler
        self._special: dict[str, Handler] = {
            "aten::copy_": self._copy,
            "aten::_foreach_copy_": self._foreach_copy,
            "aten::clone": self._same,
            "aten::_to_copy": self._same,
            "aten::_pin_memory": self._same,
            "aten::cat": self._cat,
            "aten::stack": self._stack,
        }

    def learn(self, func: Any) -> Any:
        """Find the handler of an operation that is seen for the first time, and return it."""
        name = func._schema.name
        handler: Any = None if func.is_view or name in _ALIASES else self._special.get(name, self._other)
        if func._schema.is_mutable and not name.endswith("_"):  # out=
            handler = self._other
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            handler = COMPOSITE
        self.handlers[func] = handler
        return handler

    def begin(self, call: int, sources: Iterable[tuple[int, torch.Tensor]]) -> None:
        self._call, self._stale = call, False
        self._spots.begin(sources)

    def end(self) -> None:
        """The call is over: what the loader still holds, it keeps."""
        for traced in self._spots.kept():
            self._business(traced.taint, "its loader keeps something made of it")
        if self._stale:
            mine = [number for number, source in enumerate(self._seen.sources) if source.call == self._call]
            self._seen.business(mine, "it came in one call with what its loader kept from an earlier one")

    def release(self, key: int) -> None:
        """The source's storage of this key goes away now."""
        self._spots.release(key)

    def forget(self) -> None:
        self._spots.forget()

    def fail(self, func: Any, error: Exception) -> None:
        self.failure = self.failure or f"{func}: {type(error).__name__}: {error}"

    def _taint(self, spots: Iterable[Spot | None]) -> set[int]:
        taint: set[int] = set()
        sources = self._seen.sources
        for spot in spots:
            if spot is None:
                continue
            if spot.traced is not None:
                taint |= spot.traced.taint
            else:
                taint.add(spot.number if spot.kind == SOURCE else ~spot.number)
        if len(taint) > 1:
            mine = frozenset(n for n in taint if n >= 0)
            if len(mine) > 1:
                self._seen.coupled.add(mine)
        if any(n >= 0 and sources[n].call != self._call for n in taint):
            self._stale = True
            self._business(taint, "its loader keeps it between calls")
        return taint

    def _business(self, taint: Iterable[int], reason: str) -> None:
        self._seen.business((n for n in taint if n >= 0), reason)

    # Writes

    def _move(self, target: torch.Tensor, source: torch.Tensor, op: str) -> None:
        """Every element of `source` went to the element of `target` at the same index."""
        into, origin = self._spots.of(target), self._spots.of(source)
        if into is None:
            self._business(self._taint((origin,)), f"{op} writes it where this recorder does not see it")
            return
        taint = self._taint((origin,))
        exact = (
            origin is not None
            and source.dtype == target.dtype
            and not (source.is_conj() or source.is_neg() or target.is_conj() or target.is_neg())
        )
        segments = _segments(origin, source, target) if exact and origin is not None else None
        if segments is None:
            how = op if exact else f"{op} from {dtype_name(source.dtype)} to {dtype_name(target.dtype)}"
            self._write(into, target, how, taint, renewed=True)
        else:
            self._write_segments(into, segments, taint)

    def _write_segments(self, into: Spot, segments: list[Segment], taint: set[int]) -> None:
        if into.kind == MODEL:
            for s in segments:
                copy = Copy(s.source_offset, into.number, into.offset + s.offset, s.run, s.sizes, s.source_strides, s.strides)
                self._seen.sources[s.source].copies.append(copy)
        elif into.traced is not None:
            into.traced.taint |= taint
            into.traced.written += [s._replace(offset=into.offset + s.offset) for s in segments]
            self._foreign(into, taint)
        else:
            self._business(taint | {into.number}, "its loader copies one tensor of the checkpoint over another")

    def _write(self, into: Spot, target: torch.Tensor, op: str, taint: set[int], *, renewed: bool) -> None:
        """Something that is no copy was written to `target`."""
        self._business(taint, f"its loader does more than copy it ({op})")
        strides = tuple(s * target.itemsize for s in target.stride())
        run, sizes, _, b = simplify(target.shape, strides, strides, target.itemsize)
        if into.kind == MODEL:
            place = Place(into.number, into.offset, run, sizes, b)
            sources, storages = frozenset(n for n in taint if n >= 0), frozenset(~n for n in taint if n < 0)
            self._seen.unexplained.append(Unexplained(op, place, sources, storages, self._call, renewed))
        elif into.traced is not None:
            into.traced.taint |= taint
            into.traced.written.append(Segment(-1, 0, into.offset, run, sizes, (0,) * len(sizes), b))
            self._foreign(into, taint)
        else:
            self._business((into.number,), f"its loader changes it in place ({op})")

    def _foreign(self, into: Spot, taint: set[int]) -> None:
        if into.foreign:
            self._business(taint, "its loader also writes it to memory outside of the model")

    # Operations: called with the operation, its arguments, and what it returned

    def _copy(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        target = args[0]
        source = args[1] if len(args) > 1 else kwargs["src"]
        self._move(target, source if source.shape == target.shape else source.expand(target.shape), "copy_")

    def _foreach_copy(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        for target, source in zip(args[0], args[1] if len(args) > 1 else kwargs["src"], strict=True):
            self._move(target, source if source.shape == target.shape else source.expand(target.shape), "_foreach_copy_")

    def _same(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        self._spots.made(out)
        self._move(out, args[0], _name(func))

    def _cat(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        parts, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
        self._spots.made(out)
        self._taint([self._spots.of(part) for part in parts])
        at = 0
        for part in parts:
            if part.dim() == out.dim():  # torch lets an empty vector pass anywhere
                self._move(out.narrow(dim, at, part.shape[dim]), part, "cat")
                at += part.shape[dim]

    def _stack(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        parts, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
        self._spots.made(out)
        self._taint([self._spots.of(part) for part in parts])
        for index, part in enumerate(parts):
            self._move(out.select(dim, index), part, "stack")

    def _other(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        schema = func._schema
        op = _name(func)
        written: list[torch.Tensor] = []
        read: list[torch.Tensor] = []
        for index, argument in enumerate(schema.arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes:
                written += _tensors(value)
            if schema.name not in _BLANK and not (writes and schema.name in _OVERWRITES):
                read += _tensors(value)
        taint = self._taint([self._spots.of(t) for t in read])
        self._business(taint, f"its loader does more than copy it ({op})")
        for tensor in written:
            if (into := self._spots.of(tensor)) is not None:
                self._write(into, tensor, op, taint, renewed=schema.name in _OVERWRITES)
        if not written:
            for tensor in _tensors(out):
                if (spot := self._spots.made(tensor)) is not None and spot.traced is not None:
                    spot.traced.taint |= taint


def _segments(origin: Spot, source: torch.Tensor, target: torch.Tensor) -> list[Segment] | None:
    """Where the bytes of `source`, which go to `target`, came from; None when that is not known of all of them."""
    size = target.itemsize
    a, b = tuple(s * size for s in source.stride()), tuple(s * size for s in target.stride())
    run, sizes, a_, b_ = simplify(target.shape, a, b, size)
    if origin.kind == SOURCE:
        return [Segment(origin.number, origin.offset, 0, run, sizes, a_, b_)]
    if origin.traced is None:
        return None
    segments = origin.traced.read(origin.offset, run, sizes, a_, b_)
    if segments is not None and len(segments) <= len(origin.traced.taint):
        return segments
    # What is contiguous now may have been put together along the dimensions that are no longer told apart.
    others = origin.traced.read(origin.offset, size, target.shape, a, b)
    return min((s for s in (segments, others) if s is not None), key=len, default=None)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _name(func: Any) -> str:
    name: str = func._schema.name
    return name.removeprefix("aten::")


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
