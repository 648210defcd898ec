"""What importing the package costs, offers and says."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoint_engine

PUBLIC = [
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

CONTRACT = [
    ("checkpoint_engine.ps", "ParameterServer"),
    ("checkpoint_engine.worker", "update_weights_from_ipc"),
    ("checkpoint_engine.worker", "VllmColocateWorkerExtension"),
    ("checkpoint_engine.api", "request_inference_to_update"),
]

MODULES = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"


def python(code: str, *path: Path) -> str:
    """What a fresh interpreter prints; warnings are errors in it as they are here, unless it says otherwise."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(code: str) -> set[str]:
    return set(json.loads(python(f"{code}; {MODULES}")))


def test_public_names() -> None:
    assert checkpoint_engine.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(checkpoint_engine, name) is not None
    assert set(PUBLIC) <= set(dir(checkpoint_engine))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = checkpoint_engine.nothing


@pytest.mark.parametrize(("module", "name"), CONTRACT)
def test_names_of_the_contract(module: str, name: str) -> None:
    value = getattr(importlib.import_module(module), name)
    assert value is getattr(checkpoint_engine, name)


def test_importing_the_package_is_light() -> None:
    third_party = imported("import checkpoint_engine") - imported("pass") - set(sys.stdlib_module_names)
    assert third_party == {"checkpoint_engine"}


def test_worker_imports_torch_zmq_and_msgspec_only() -> None:
    alone = imported("import torch, torch.distributed, zmq, msgspec")
    more = imported("import torch, torch.distributed, zmq, msgspec, checkpoint_engine.worker") - alone
    assert more - set(sys.stdlib_module_names) == {"checkpoint_engine"}


def fake_distribution(directory: Path, name: str, version: str) -> None:
    info = directory / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


COUNT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import checkpoint_engine
print([(w.category.__name__, str(w.message)) for w in caught])
"""


def test_warns_when_upstream_is_installed_beside_it(tmp_path: Path) -> None:
    fake_distribution(tmp_path, "checkpoint-engine", "0.1.2")
    said = python(COUNT, tmp_path)
    assert said.count("UserWarning") == 1
    assert "checkpoint-engine 0.1.2 is installed beside ckpt-engine" in said


def test_does_not_warn_alone(tmp_path: Path) -> None:
    fake_distribution(tmp_path, "some-checkpoint-engine", "0.1.2")
    assert python(COUNT, tmp_path).strip() == "[]"
