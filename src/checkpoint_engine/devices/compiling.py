"""Triton's kernels, made ready before they are launched: compiled, and their launchers and modules loaded."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch

COMPILE_SECONDS = 60.0
"""Longest wait for a kernel that a thread makes ready."""

_lock = threading.Lock()  # what a launch adds to a compiled kernel is made by the first one who asks for it, and only once
_threads: dict[tuple[Callable[[torch.device], None], torch.device], threading.Thread] = {}


def make_ready(kernel: Any, device: torch.device, *signature: object, **options: object) -> None:
    """kernel: triton.jit's. signature: dtypes of pointers, and numbers. Nothing is launched, for the engine may be capturing a
    graph.

    That takes seconds where Triton has it in no cache (the digests' kernel 2.7 on an H200's host), and a C compiler. Raises what
    Triton raises.
    """
    with _lock, torch.cuda.device(device):
        compiled = kernel.warmup(*signature, **options, grid=(1,))
        getattr(compiled, "run", None)  # a property: the launcher, which is compiled, too, and the module


def begin(work: Callable[[torch.device], None], device: torch.device) -> None:
    """Do `work`, which makes a kernel ready, in a thread, once for each device. What fails there fails again where it is
    needed."""
    if (work, device) not in _threads:

        def run() -> None:
            with contextlib.suppress(Exception):
                work(device)

        _threads[work, device] = threading.Thread(target=run, name="compile-kernel", daemon=True)
        _threads[work, device].start()


def finish(work: Callable[[torch.device], None], device: torch.device) -> None:
    """Wait for what `begin` began, if it did: then it is not compiled twice at a time."""
    if (thread := _threads.get((work, device))) is not None:
        thread.join(COMPILE_SECONDS)
