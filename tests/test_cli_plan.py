"""The commands `plan` and `probe`, and how the one takes what the other prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from checkpoint_engine import cli
from checkpoint_engine.cli.plan import show_published
from checkpoint_engine.planning.cluster import predict_cluster
from checkpoint_engine.planning.presets import PUBLISHED, preset


def test_a_model_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", "--model", "glm-4.5-air", "--gpus", "8", "--kind", "h800"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("prediction: glm-4.5-air, 221 GB in 18329 tensors, by broadcast to 8 GPUs (1 x 8, h800)\n")
    for word in ("lift", "share", "load", "whole update", "bound by: ", "ring ", "order: layers", "published: 3.47 s"):
        assert word in out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", "--model", "tiny-moe", "--hosts", "2", "--gpus", "4", "--nic", "10", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["predictions"]
    assert found["label"] == "prediction" and found["published"] is None
    assert found["cluster"]["nic"] == 10e9 and found["cluster"]["hosts"] == 2
    assert found["bound_by"] in ("lift", "share", "load", "order") and found["seconds"] > 0


def test_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({f"layers.{i}.weight": torch.zeros(64, 64) for i in range(4)}, tmp_path / "a.safetensors")
    assert cli.run(["plan", "--model", str(tmp_path), "--gpus", "2", "--loader-us", "21", "--beside-load", "1", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["predictions"]
    assert (found["checkpoint"], found["tensors"], found["nbytes"]) == (tmp_path.name, 4, 4 * 64 * 64 * 4)
    assert found["tensor_seconds"] == pytest.approx(21e-6) and found["cluster"]["beside_load"] == 1


def test_hosts_like_a_probed_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--size", "1", "--size", "2", "--region", "1", "--seconds", "0", "--timeout", "50"]
    assert cli.run(["probe", "--device", "cpu", "--json", *size]) == 0
    out = capsys.readouterr().out
    assert [entry["nbytes"] for entry in json.loads(out)["broadcast"]] == [1 << 20, 2 << 20]
    (tmp_path / "probe.json").write_text(out)
    assert cli.run(["plan", "--model", "tiny-moe", "--gpus", "2", "--probe", str(tmp_path / "probe.json")]) == 0
    out = capsys.readouterr().out
    assert "to 2 ranks (1 x 2, " in out and "staging 0 B" in out


def test_published_times_stand_beside_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    found = predict_cluster("tiny-moe", preset("h20", 2, 8))
    show_published(Console(), [(found, PUBLISHED[2])])
    title, head, row, source = capsys.readouterr().out.splitlines()
    assert title == "seconds: ours predicted, upstream's published"
    assert head.split()[-2:] == ["prediction", "published"]
    assert row.split()[:4] == ["tiny-moe", "16", "x", "h20"] and row.split()[-1] == "10.19"
    assert "Ours is a prediction" in source


def test_probe_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["probe", "--device", "cpu", "--ranks", "1", "--region", "1", "--seconds", "0", "--timeout", "50"]) == 0
    out = capsys.readouterr().out
    assert "memcpy" in out and "GB/s" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say which --model, or ask for --published"),
        (["--model", "tiny-moe", "--published"], "say which --model, or ask for --published"),
        (["--model", "/none"], "--model /none: no such directory, and no model of that name; known are tiny-moe"),
        (["--model", "tiny-moe", "--probe", "/none"], "--probe /none: No such file"),
        (["--model", "tiny-moe", "--method", "p2p"], "no prediction for method 'p2p'"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
