"""The command line: what it prints, and which exit code stands for what."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from checkpoint_engine import cli
from checkpoint_engine.cli.progress import meter, size, speed, table
from checkpoint_engine.errors import (
    CheckpointNotFoundError,
    DeadlineError,
    EngineUnreachableError,
    FileFormatError,
    ManifestError,
    PeerLostError,
    SettingsError,
    UpdateError,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    first = {f"layers.{layer}.weight": torch.rand(64, 64) for layer in range(3)}
    second = {"head[bold].weight": torch.rand(8, 8, dtype=torch.bfloat16), "step": torch.tensor(3)}
    save_file(first, tmp_path / "a.safetensors")
    save_file(second, tmp_path / "b.safetensors")
    return tmp_path


def test_inspect_as_json(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(checkpoint), "--ranks", "2", "--bucket-bytes", "16384", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["checkpoint"], told["files"], told["nbytes"]) == (checkpoint.name, 2, 3 * 64 * 64 * 4 + 8 * 8 * 2 + 8)
    assert {d["dtype"]: d["tensors"] for d in told["dtypes"]} == {"float32": 3, "bfloat16": 1, "int64": 1}
    by_name = {t["name"]: t for t in told["tensors"]}
    assert by_name["step"]["shape"] == []
    assert by_name["layers.1.weight"]["file"] == "a.safetensors"
    assert sum(rank["nbytes"] for rank in told["ranks"]) == told["nbytes"]
    assert all(rank["nbytes"] > 0 for rank in told["ranks"])
    assert sum(bucket["nbytes"] for bucket in told["buckets"]) == told["nbytes"]
    assert all(bucket["nbytes"] <= 16384 for bucket in told["buckets"])


@pytest.mark.parametrize("terminal", [True, False])
def test_inspect_as_tables(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    assert cli.run(["inspect", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    for word in ("layers.2.weight", "head[bold].weight", "64x64", "scalar", "bfloat16", "5 tensors", "2 files"):
        assert word in out
    assert ("┃" in out) == terminal


def test_bad_input_is_one_line_and_code_2(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"step": torch.zeros(1)}, checkpoint / "c.safetensors")
    assert cli.run(["inspect", str(checkpoint)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("checkpoint-engine: error: tensor 'step' is in both ")
    assert said.count("\n") == 1
    assert cli.run(["inspect", str(checkpoint / "none")]) == 2
    assert f"{checkpoint / 'none'}: no such directory" in capsys.readouterr().err
    assert cli.run(["inspect"]) == 2
    assert cli.run(["nothing"]) == 2


UPDATE = ["update", "--checkpoint", "/none", "--inference-parallel-size", "2", "--endpoint", "http://127.0.0.1:1"]


def test_update_checks_ranks_first(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.run(UPDATE) == 2
    assert "RANK is not set: start this command with torchrun" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert cli.run(UPDATE) == 2
    said = capsys.readouterr().err
    assert "error on rank 1: 1 endpoint of 2 ranks each make 2 ranks, but torchrun started 3" in said
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.run(UPDATE) == 2
    assert "/none: no such directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UpdateError(rank=1, host="a", stage="load", reason="no"), 1),
        (SettingsError("no"), 2),
        (FileFormatError("a", "no"), 2),
        (CheckpointNotFoundError("a"), 2),
        (ManifestError("no"), 2),
        (EngineUnreachableError("a", "no"), 3),
        (PeerLostError("a"), 4),
        (DeadlineError("a", 1), 4),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_exit_codes(error: Exception, code: int) -> None:
    assert cli.exit_code(error) == code  # type: ignore[arg-type]


def test_help_and_version() -> None:
    module = [sys.executable, "-m", "checkpoint_engine"]
    shown = subprocess.run([*module, "--help"], capture_output=True, text=True, timeout=50, check=True).stdout
    assert all(command in shown for command in cli.COMMANDS)
    shown = subprocess.run([*module, "--version"], capture_output=True, text=True, timeout=50, check=True).stdout
    assert shown.startswith("ckpt-engine 0.")


def test_sigterm_ends_context_managers() -> None:
    code = (
        "import sys, signal; from checkpoint_engine import cli\n"
        "def command():\n"
        "    try:\n"
        "        print('ready', flush=True); signal.pause()\n"
        "    finally:\n"
        "        print('closed', flush=True)\n"
        "import types; sys.modules['probe'] = types.SimpleNamespace(command=command)\n"
        "cli.COMMANDS['probe'] = 'probe:command'\n"
        "sys.exit(cli.run(['probe']))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=50)[0] == "closed\n"
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (90856960, "90.9 MB"),
        (999_999, "1 MB"),
        (10**12, "1 TB"),
        (10**16, "1e+04 TB"),
    ],
)
def test_sizes(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


def test_progress_is_a_line_or_a_bar_or_nothing() -> None:
    def shown(terminal: bool, show: bool) -> str:
        console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
        with meter(console, "register [a]", show=show) as bar:
            bar.advance(1000)
            bar.reach(3000, 3000)
            bar.reach(2000, 3000)  # threads may report late
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    line = shown(terminal=False, show=True)
    assert line.startswith("register [a]: 3 kB in ")
    assert line.count("\n") == 1
    assert "register [a]" in shown(terminal=True, show=True)
    assert shown(terminal=True, show=False) == ""


def test_no_line_when_the_work_failed() -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(SettingsError), meter(console, "update", 1):
        raise SettingsError("no")
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_tables_are_aligned_text_elsewhere() -> None:
    console = Console(file=io.StringIO(), width=10)
    table(console, "title", ["name", "n"], [["a-long-name", "1"], ["b", "22"]], numbers=1)
    assert console.file.getvalue() == "title\n  name          n\n  a-long-name   1\n  b            22\n"  # type: ignore[attr-defined]
    assert speed(10**9, 2) == "0.50 GB/s"
    assert speed(1, 0) == "-"
