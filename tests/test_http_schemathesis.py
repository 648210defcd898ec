"""REST under schemathesis: requests made up from the schema, to a real server with a real engine.

No answer is a server's error unless an engine is to blame, and all are as the schema says, whether the request fits it or not.
More examples: SCHEMATHESIS_EXAMPLES=200.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from helpers.engines import engine_processes
from helpers.rest import follow, model_dir, serving, wait_until_met
from helpers.tools import tool

CONFIGURATION = Path(__file__).with_name("schemathesis.toml")
EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES", "10")
QUICK = {f"CHECKPOINT_ENGINE_{name}_TIMEOUT": "2" for name in ("ATTACH", "JOIN")}
UNENDING = "/v1/events"  # tests/test_http_updates.py has it


@pytest.mark.timeout(300)
def test_rest_keeps_its_schema(tmp_path: Path) -> None:
    program = tool("schemathesis")
    model = model_dir(tmp_path / "bert")
    with (
        engine_processes(model, [[]]) as [engine],
        serving(1, "--port", "0", "--endpoint", engine, env=QUICK) as served,
        served.client() as rest,
    ):
        wait_until_met(rest, 1)
        # Of the name that the schema's examples have, so that some requests find it.
        body = {"name": "step-12", "directory": str(model)}
        rest.post("/v1/checkpoints", json=body).raise_for_status()
        options = ["--seed", "1", "--max-examples", EXAMPLES, "--continue-on-failure", "--exclude-path", UNENDING]
        done = subprocess.run(
            [program, "--config-file", str(CONFIGURATION), "run", f"{served.url}/openapi.json", "--no-color", *options],
            cwd=tmp_path, capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
        # It still serves.
        for record in rest.get("/v1/updates").json():
            rest.delete(f"/v1/updates/{record['id']}")
        rest.post("/v1/checkpoints", json=body | {"name": "after"}).raise_for_status()
        begun = rest.post("/v1/updates", json={"checkpoint": "after"}).raise_for_status()
        assert follow(rest, begun.json()["id"])["state"] == "committed"
