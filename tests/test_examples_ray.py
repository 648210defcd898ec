"""examples/ray_actors.py on one host: servers in Ray's processes, engines in others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from checkpoint_engine.engines.embedded.model import ServedModel
from helpers.engines import engine_processes
from helpers.rest import model_dir

SCRIPT = Path(__file__).parents[1] / "examples" / "ray_actors.py"
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}


@pytest.mark.timeout(240)
def test_actors_update_engines(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="no ray here: `make tools` installs it")
    model = model_dir(tmp_path / "bert")
    with engine_processes(model, [[]] * 2) as urls:
        command = [sys.executable, str(SCRIPT), str(model), "--ranks", "2"]
        process = subprocess.Popen(
            [*command, *(word for url in urls for word in ("--endpoint", url))],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env={**os.environ, **QUIET},
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=200)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        assert process.returncode == 0, output
        assert "release@" in output
        expected = ServedModel.load(model).targets.digests()
        for url in urls:
            assert httpx.get(f"{url}/v1/parameters/digest", timeout=20, trust_env=False).json() == expected
