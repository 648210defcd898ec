"""What failed keeps nothing: errors let go of what their frames held as soon as they are gone themselves, without the help of
Python's cycle collector, which an engine may have switched off. (Generators as context managers do, from Python 3.12 on.)"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from checkpoint_engine.devices.cpu import CpuDevice
from checkpoint_engine.devices.cuda import _named
from checkpoint_engine.errors import DeviceError
from checkpoint_engine.worker.failing import Failure, failing
from checkpoint_engine.worker.recorded import Loads


class Memory:
    """As a mapped ring is held by the frames of a load."""


def fail(guard: AbstractContextManager[None], memory: Memory) -> None:
    with guard:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("guard", "error"),
    [
        (lambda: failing("load", 3), Failure),
        (lambda: _named("stream 'lift'"), DeviceError),
        (lambda: Loads(lambda _: None, None, CpuDevice())._never_failing("the plan was not made"), None),
    ],
)
def test_errors_are_in_no_cycle(guard: Callable[[], AbstractContextManager[None]], error: type[Exception] | None) -> None:
    memory = Memory()
    alive = weakref.ref(memory)
    gc.disable()
    try:
        with contextlib.suppress(*[error] if error else []):
            fail(guard(), memory)
        del memory
        assert alive() is None
    finally:
        gc.enable()
    if error is not None:
        with pytest.raises(error, match="no"):
            fail(guard(), Memory())
