"""The demo as its user runs it, on tiny checkpoints, and that nothing of it is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from checkpoint_engine.cli.demo.checkpoint import perturb, read_checkpoint
from checkpoint_engine.cli.demo.joining import latencies
from checkpoint_engine.cli.demo.processes import Fleet, free_port_pair
from checkpoint_engine.errors import DeadlineError, FileFormatError, PeerLostError, SettingsError
from embedded_support import save_bert, save_llama

WAIT = 100


@contextmanager
def demo(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The running demo. Afterwards no process that carries its mark is left."""
    mark = f"{os.getpid()}-{directory}"
    process = subprocess.Popen(
        [sys.executable, "-m", "checkpoint_engine", "demo", "--checkpoint", str(directory), *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TEST_DEMO_MARK": mark},
    )  # fmt: skip
    try:
        yield process
        # Children end when their standard input does; one that is still being started needs a moment to notice.
        _, alive = psutil.wait_procs(marked(mark), timeout=20)
        assert alive == []
    finally:
        for left in (process, *marked(mark)):
            left.kill()
        process.communicate()


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TEST_DEMO_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # gone, or another user's
            continue
    return found


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["embed", "generate"])
def test_demo(tmp_path: Path, kind: str) -> None:
    directory = (save_bert if kind == "embed" else save_llama)(tmp_path / "model")
    with demo(directory, "--json") as process:
        output, errors = process.communicate(timeout=WAIT)
        assert process.returncode == 0, errors
    result = json.loads(output)
    assert result["ok"] and result["kind"] == kind and result["tensors"] == len(read_checkpoint(directory))
    assert [u["version"] for u in result["updates"]] == ["real", "perturbed"]
    for update in result["updates"]:
        assert update["report"]["nbytes"] >= result["nbytes"]
        assert len(update["engines"]) == 2
        assert all(e["parameters_equal"] and e["answers_equal"] and e["version_equal"] for e in update["engines"])
    for client in result["clients"]:
        assert client["failed"] == 0 and client["mixed"] == [] and client["answered"] > 0


@pytest.mark.timeout(120)
def test_an_engine_joins_a_pair_that_serves(tmp_path: Path) -> None:
    directory = save_bert(tmp_path / "model")
    with demo(directory, "--json", "--method", "p2p") as process:
        output, errors = process.communicate(timeout=WAIT)
        assert process.returncode == 0, errors
    result = json.loads(output)
    joins = result["joins"]
    assert result["ok"] and joins["report"]["method"] == "p2p (tcp)"
    assert joins["report"]["stages"]["fetch"]["nbytes"] >= result["nbytes"]
    assert len(joins["seconds"]) == joins["count"] and len(joins["source_cpu_seconds"]) == 2
    assert joins["before"]["p99"] >= joins["before"]["median"] > 0 and joins["during"]["count"] > 0
    assert len(result["engines"]) == 3
    assert all(e["parameters_equal"] and e["answers_equal"] and e["version_equal"] for e in result["engines"])
    assert [client["failed"] for client in result["clients"]] == [0, 0]


def test_latencies() -> None:
    assert latencies([]) == {"count": 0, "median": 0.0, "p99": 0.0}
    assert latencies([float(n) for n in range(100, 0, -1)]) == {"count": 100, "median": 51.0, "p99": 99.0}


def test_interrupted(tmp_path: Path) -> None:
    with demo(save_bert(tmp_path / "model")) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("starting 2 engines")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT)
        assert process.returncode == 130
        assert "Traceback" not in errors


def test_no_checkpoint_there(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        _, errors = process.communicate(timeout=WAIT)
        assert process.returncode == 2
        assert f"{tmp_path} holds no safetensors file" in errors


def test_perturb_is_repeatable_and_changes_only_floats() -> None:
    tensor = torch.randn(3, 5).to(torch.bfloat16)
    assert torch.equal(perturb("a", tensor), perturb("a", tensor))
    assert not torch.equal(perturb("a", tensor), perturb("b", tensor))
    assert perturb("a", tensor).dtype == torch.bfloat16
    assert torch.equal(perturb("a", torch.arange(3)), torch.arange(3))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        read_checkpoint(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(FileFormatError, match=r"a\.safetensors"):
        read_checkpoint(tmp_path)


def test_children_that_fail_or_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    stubborn = tmp_path / "stubborn.py"
    stubborn.write_text(
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('here', flush=True)\nwhile True: signal.pause()\n"
    )
    with Fleet(tmp_path, end_seconds=0.2) as fleet:
        lost = fleet.start("lost", "no_such_module")
        with pytest.raises(PeerLostError, match=r"lost is gone \(exit code 1.*no_such_module"):
            lost.line(20, "to start")
        child = fleet.start("stubborn", "stubborn")
        assert child.line(20, "to start") == "here"
        with pytest.raises(DeadlineError, match="stubborn to do more"):
            child.line(0.01, "to do more")
    assert not psutil.pid_exists(lost.pid) and not psutil.pid_exists(child.pid)


def test_free_port_pair() -> None:
    assert 1024 <= free_port_pair() < 65535
