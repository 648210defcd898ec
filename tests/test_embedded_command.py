"""`checkpoint-engine engine` as a process."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from checkpoint_engine.engines import Weights, get_engine
from checkpoint_engine.engines.embedded.serve import bind
from checkpoint_engine.errors import SettingsError
from embedded_support import save_bert

WAIT = 40


@contextmanager
def command(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "checkpoint_engine", "engine", *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_unix_socket_port_file_and_sigterm(tmp_path: Path) -> None:
    directory, path, file = save_bert(tmp_path / "bert"), tmp_path / "socket", tmp_path / "port"
    with command(str(directory), "--uds", str(path), "--port-file", str(file), "--threads", "1") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"listening on unix:{path}\n"
        with get_engine("sglang", "http://engine", uds=str(path)) as engine:
            engine.wait_ready(WAIT)
            assert engine.weights() == Weights("bert", False)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=WAIT)
        assert errors == ""
        assert file.read_text() == f"unix:{path}"


def test_tcp_random_weights_and_end_of_stdin(tmp_path: Path) -> None:
    with command(str(save_bert(tmp_path)), "--load-format", "dummy", "--until-stdin-ends", "--json") as process:
        assert process.stdout is not None
        assert process.stdin is not None
        told = json.loads(process.stdout.readline())
        url = told["url"]
        assert told["pid"] == process.pid
        answer = httpx.post(f"{url}/embed", json={"input": ["the cat"]}, timeout=WAIT, trust_env=False)
        assert answer.status_code == 200 and answer.json()["version"] is None
        process.stdin.close()
        process.wait(WAIT)


def test_no_model_there(tmp_path: Path) -> None:
    with command(str(tmp_path)) as process:
        _, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 2
    assert f"{tmp_path} holds no config.json" in errors and "Traceback" not in errors


def test_bind(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    first, _ = bind("", 0, path)
    with first, pytest.raises(SettingsError, match="another process"):
        bind("", 0, path)
    bind("", 0, path)[0].close()  # nobody listens there any more
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SettingsError, match="cannot listen"):
        bind("127.0.0.1", taken.getsockname()[1], None)
    with pytest.raises(SettingsError, match="cannot listen"):
        bind("", 0, tmp_path / "missing" / "socket")
