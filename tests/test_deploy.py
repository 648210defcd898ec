"""What deploy/ offers: the manifests fit their schemas, and their commands, the script's too, start fleets that answer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from checkpoint_engine.http.serve import DEFAULT_PORT
from helpers.ports import free_ports
from helpers.processes import BIN, started, url_of
from helpers.rest import wait_until_met
from helpers.tools import tool

yaml = pytest.importorskip("yaml")
DEPLOY = Path(__file__).parents[1] / "deploy"
MANIFEST = DEPLOY / "kubernetes" / "engine.yaml"
TOKEN = "correct-horse-battery"


def test_manifests_fit_their_schemas() -> None:
    command = [tool("kubernetes-validate"), "--strict", str(MANIFEST)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr


def containers() -> dict[str, Any]:
    stateful = next(d for d in yaml.safe_load_all(MANIFEST.read_text()) if d["kind"] == "StatefulSet")
    pod = stateful["spec"]["template"]["spec"]
    assert pod["shareProcessNamespace"] is True
    assert {v["name"] for v in pod["volumes"]} == {m["name"] for c in pod["containers"] for m in c["volumeMounts"]}
    return {container["name"]: container for container in pod["containers"]}


def test_engine_and_server_of_a_pod_share_their_sockets() -> None:
    found = containers()
    directories = set()
    for container in found.values():
        directory = next(e["value"] for e in container["env"] if e["name"] == "CHECKPOINT_ENGINE_SOCKET_DIR")
        assert directory in [mount["mountPath"] for mount in container["volumeMounts"]]
        directories.add(directory)
    assert len(directories) == 1
    assert found["server"]["ports"] == [{"containerPort": DEFAULT_PORT}]


@pytest.mark.timeout(180)
def test_command_and_probe_of_the_pod(tmp_path: Path) -> None:
    """As the manifest has them, with this host's places in theirs, and one rank for sixteen."""
    token = tmp_path / "token"
    token.write_text(TOKEN)
    server = containers()["server"]
    own = {
        "--nnodes": "1", "--node-rank": "0", "--nproc-per-node": "1", "--master-addr": "127.0.0.1", "--port": "0",
        "--master-port": str(free_ports(3)), "--token-file": str(token),
    }  # fmt: skip
    words = [
        f"{key}={own.get(key, value)}" if value else key for key, _, value in map(partition, server["command"] + server["args"])
    ]
    with started([str(BIN / words[0]), *words[1:]]) as lines:
        url = url_of(lines)
        for probe in (server["readinessProbe"], server["livenessProbe"]):
            command = [w.replace(f"http://engine-0.engine:{DEFAULT_PORT}", url) for w in probe["exec"]["command"]]
            assert url in command[-1]
            subprocess.run([sys.executable, *command[1:]], check=True, timeout=30)
        assert httpx.get(f"{url}/v1/fleet", trust_env=False).status_code == 401
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False, timeout=30) as rest:
            wait_until_met(rest, 1)
            engines = {e["endpoint"] for e in rest.get("/v1/weights").json()["engines"]}
            assert engines == {"http://engine-0.engine:8000", "http://engine-1.engine:8000"}


def partition(word: str) -> tuple[str, str, str]:
    return word.partition("=")


@pytest.mark.timeout(180)
def test_script_for_several_hosts() -> None:
    """Both here, which is all the same to torchrun."""
    common = {"HOSTS": "2", "FIRST": "127.0.0.1", "PORT": str(free_ports(3)), "RANKS": "1"}
    script = [str(DEPLOY / "torchrun.sh"), "--port", "0"]
    with (
        started(script, HOST="0", **common) as first,
        started(script, HOST="1", **common),
        httpx.Client(base_url=url_of(first), trust_env=False, timeout=30) as rest,
    ):
        wait_until_met(rest, 2)
        assert [rank["error"] for rank in rest.get("/v1/fleet").json()["ranks"]] == [None, None]
