"""Puts new weights into inference engines that are already serving: in place, in seconds, without restarting them.

Public names are imported when they are first used, so that `import checkpoint_engine` costs an engine nothing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checkpoint_engine.api import request_inference_to_update
    from checkpoint_engine.errors import CheckpointEngineError, UpdateError, WorkerUpdateError
    from checkpoint_engine.ps import ParameterServer
    from checkpoint_engine.server import UpdateReport
    from checkpoint_engine.settings import Settings
    from checkpoint_engine.worker import VllmColocateWorkerExtension, WeightsState, update_weights_from_ipc

__version__ = "0.1.0"

__all__ = [
    "CheckpointEngineError",
    "ParameterServer",
    "Settings",
    "UpdateError",
    "UpdateReport",
    "VllmColocateWorkerExtension",
    "WeightsState",
    "WorkerUpdateError",
    "__version__",
    "request_inference_to_update",
    "update_weights_from_ipc",
]

_HOME = {
    "CheckpointEngineError": "checkpoint_engine.errors",
    "ParameterServer": "checkpoint_engine.ps",
    "Settings": "checkpoint_engine.settings",
    "UpdateError": "checkpoint_engine.errors",
    "UpdateReport": "checkpoint_engine.server",
    "VllmColocateWorkerExtension": "checkpoint_engine.worker",
    "WeightsState": "checkpoint_engine.worker",
    "WorkerUpdateError": "checkpoint_engine.errors",
    "request_inference_to_update": "checkpoint_engine.api",
    "update_weights_from_ipc": "checkpoint_engine.worker",
}


def __getattr__(name: str) -> object:
    if (module := _HOME.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _warn_of_upstream() -> None:
    """Both distributions own the directory `checkpoint_engine`: whichever was installed last has overwritten the other."""
    try:
        version = importlib.metadata.version("checkpoint-engine")
    except importlib.metadata.PackageNotFoundError:
        return
    warnings.warn(
        f"the distribution checkpoint-engine {version} is installed beside ckpt-engine {__version__}, and both provide the "
        "package checkpoint_engine: uninstall both, then install one of them",
        UserWarning,
        stacklevel=3,
    )


_warn_of_upstream()
