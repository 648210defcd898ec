"""A pass in a thread of its own, whose end the update's loop hears."""

from __future__ import annotations

import threading
from collections.abc import Callable

from checkpoint_engine.errors import CheckpointEngineError, bare
from checkpoint_engine.server.events import PassEnded
from checkpoint_engine.server.pass_errors import PassError
from checkpoint_engine.server.pipeline import Pass


def start_pass(running: Pass, put: Callable[[PassEnded], None]) -> threading.Thread:
    """put: called in that thread, once, at the end."""
    thread = threading.Thread(target=_run, args=(running, put), name="pass", daemon=True)
    thread.start()
    return thread


def _run(running: Pass, put: Callable[[PassEnded], None]) -> None:
    stats, error = None, None
    try:
        stats = running.run()
    except CheckpointEngineError as e:
        error = bare(e)
    except Exception as e:  # nobody else would hear of it
        error = PassError("update", f"{type(e).__name__}: {e}")
    put(PassEnded(stats, error))
