"""Updates whose workers check slices as a device does, on a CPU: queued, answered after the last bucket, whole tensors only where
no slice covers them. The sums are a CPU's own here; the kernel's are compared with these in test_integrity_gpu.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

import test_integrity_sliced_updates as sliced
from checkpoint_engine.devices.digests import Verifier
from checkpoint_engine.memory.slices import slice_sum
from checkpoint_engine.worker import check, session, sliced_check, slices
from checkpoint_engine.worker.slices import Asked, Piece
from helpers import recorded

_MASK = (1 << 64) - 1


class _Table:
    """As SliceTable."""

    def __init__(self, buckets: Iterable[Iterable[tuple[int, Piece]]], asked: Asked, _: torch.device) -> None:
        numbers = {item: number for number, item in enumerate(asked.items)}
        self._buckets = [[(numbers[item], piece) for item, piece in bucket] for bucket in buckets]
        self.nbytes = [sum(piece.part.nbytes for _, piece in bucket) for bucket in self._buckets]

    def add(self, bucket: int, totals: torch.Tensor) -> None:
        for number, piece in self._buckets[bucket]:
            total = (int(totals[number]) + slice_sum(*piece)) & _MASK
            totals[number] = total - ((total >> 63) << 64)


def _make_check(attach: Any, tables: Any, memories: Sequence[torch.Tensor], *more: Any) -> check.Check:
    if not attach.digests:
        return check.Check()
    return check.DeviceCheck(Verifier(check._layout(attach.plan, tables), attach.digests, memories), tables, *more)


def _serve(pipe: Connection, *arguments: Any) -> None:
    slices.SMALL_BYTES = 0
    sliced_check._table = _Table  # type: ignore[assignment]
    sliced_check._sums = lambda asked, replaying, memories, device, _: sliced_check.DeviceSliceSums(  # type: ignore[assignment]
        asked, replaying, memories, device
    )
    session.make_check = _make_check
    recorded._Engine = sliced._Engine  # type: ignore[misc]
    recorded._engine(pipe, *arguments)


@pytest.fixture(autouse=True)
def _engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliced, "_serve", _serve)


@pytest.mark.parametrize("method", ["broadcast", "pull"])
def test_a_bit_of_a_slice_in_the_owners_memory(method: str) -> None:
    sliced.test_a_bit_of_a_slice_in_the_owners_memory(method)


@pytest.mark.parametrize("method", ["broadcast", "pull"])
def test_a_rank_that_cannot_replay_and_a_replay_that_goes_wrong(method: str) -> None:
    sliced.check_a_rank_that_cannot_replay_and_a_replay_that_goes_wrong(method)


def test_a_bit_of_what_nobody_takes_and_what_the_loader_must_get() -> None:
    sliced.test_a_bit_of_what_nobody_takes()
    sliced.test_what_the_loader_must_get_is_checked_whole()


def test_slices_of_what_was_sent(sharing: str) -> None:
    sliced.test_slices_of_what_was_sent(sharing)
