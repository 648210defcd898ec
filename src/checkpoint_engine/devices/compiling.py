"""Triton's kernels, made ready before they are launched: compiled, and their launchers and modules loaded."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch

COMPILE_SECONDS = 60.0
"""Longest wait for a kernel that a thread makes ready."""

Work = Callable[[torch.device], object]
"""What makes a kernel ready for a device."""

_lock = threading.Lock()  # what a launch adds to a compiled kernel is made by the first one who asks for it, and only once
_starting = threading.Lock()
_threads: dict[tuple[Work, torch.device], threading.Thread] = {}


def make_ready(kernel: Any, device: torch.device, *signature: object, **options: object) -> None:
    """kernel: triton.jit's. signature: dtypes of pointers, and numbers. Nothing is launched, for the engine may be capturing a
    graph.

    That takes seconds where Triton has it in no cache (the digests' kernel 2.7 on an H200's host), and a C compiler. Raises what
    Triton raises.
    """
    with _lock, torch.cuda.device(device):
        compiled = kernel.warmup(*signature, **options, grid=(1,))
        getattr(compiled, "run", None)  # a property: the launcher, which is compiled, too, and the module


def begin(work: Work, device: torch.device) -> bool:
    """Do `work` in a thread, once for each device. What fails there fails again where it is needed. Returns whether it is still
    under way."""
    with _starting:
        if (thread := _threads.get((work, device))) is None:

            def run() -> None:
                with contextlib.suppress(Exception):
                    work(device)

            thread = _threads[work, device] = threading.Thread(target=run, name="compile-kernel", daemon=True)
            thread.start()
    return thread.is_alive()


def finish(work: Work, device: torch.device) -> bool:
    """Wait for what `begin` began, if it did: then it is not compiled twice at a time. Returns whether it is over."""
    if (thread := _threads.get((work, device))) is None:
        return True
    thread.join(COMPILE_SECONDS)
    return not thread.is_alive()
