"""Load plans in real vLLM servers on a CPU, which packs weights: plans write into the layers' staged tensors. Answers are again
those of servers that loaded the checkpoint themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import answers, changed, quantized, rpc, save_glm4, save_qwen3, told, vllm_beside

pytestmark = pytest.mark.timeout(900)
NO_WORDS = "--skip-tokenizer-init"
MTP = ("--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": 1}))


def _loaded(socket: str, checkpoint: Path, version: str, way: str, ranks: int = 1, **settings: Any) -> dict[str, Any]:
    """Update, which must go this way on all ranks. Returns the report."""
    reports = told(socket, checkpoint, version, ranks, **settings)
    for report in reports:
        assert isinstance(report, dict), report
        assert (report["ways"], report["notes"]) == ([way], []), report
        assert report["passes"] == (2 if way == "proved" else 1)
    assert isinstance(reports[0], dict)
    print(version, json.dumps({name: stage["seconds"] for name, stage in reports[0]["stages"].items()}))
    return reports[0]


def _staged(socket: str, checkpoint: Path) -> None:
    """No more than a layer's memory was taken beside the model's."""
    for status in rpc(socket, "weights_status"):
        assert status["layers"]["stage"] > 0, status
        assert 0 < status["staged_peak_bytes"] < (checkpoint / "model.safetensors").stat().st_size / 4, status


def _one_after_another(socket: str, checkpoints: list[Path], expected: list[Any], ranks: int = 1) -> None:
    for number, which in enumerate((0, 1, 1, 0)):
        _loaded(socket, checkpoints[which], f"v{number}", "proved" if number == 0 else "replayed", ranks)
        assert answers(socket) == expected[which], number
        _staged(socket, checkpoints[which])


def test_dense(tmp_path: Path) -> None:
    checkpoints = [save_qwen3(tmp_path / f"dense-{seed}", seed) for seed in range(2)]
    with vllm_beside(checkpoints, NO_WORDS) as (socket, expected):
        assert expected[0] != expected[1]
        # One plan, whatever the buckets are: in small ones layers come in pieces.
        for number, (which, small) in enumerate(((1, True), (0, True), (1, False), (0, False), (1, True))):
            settings = {"bucket_bytes": 40 << 10} if small else {}
            _loaded(socket, checkpoints[which], f"v{number}", "replayed" if number else "proved", **settings)
            assert answers(socket) == expected[which], number
            _staged(socket, checkpoints[which])


def test_experts_on_two_workers_with_failures_between(tmp_path: Path) -> None:
    checkpoints = [save_qwen3(tmp_path / f"experts-{seed}", seed, experts=True, tied=True) for seed in range(2)]
    key = "model.layers.1.mlp.experts.3.down_proj.weight"
    bad = changed(checkpoints[1], tmp_path / "bad", lambda t: t.pop(key))
    with vllm_beside(checkpoints, NO_WORDS, tensor_parallel=2) as (socket, expected):
        assert expected[0] != expected[1]
        layout = rpc(socket, "testing_layout")
        _one_after_another(socket, checkpoints, expected, 2)
        assert all(key in str(error) for error in told(socket, bad, "bad", 2))  # another checkpoint: by the loader
        assert rpc(socket, "testing_layout") == layout
        _loaded(socket, checkpoints[1], "healed", "replayed", 2)
        assert answers(socket) == expected[1]
        rpc(socket, "testing_fail_staged", 1, 5)
        for report in told(socket, checkpoints[0], "fallen back", 2):  # rank 1's replay breaks off; its loader does it at once
            assert isinstance(report, dict), report
            assert sorted(report["ways"]) == ["loader", "replayed"]
            assert "out of order" in report["notes"][0]
        assert answers(socket) == expected[0]
        assert rpc(socket, "testing_layout") == layout


def test_quantized(tmp_path: Path) -> None:
    """With scales as vLLM holds them. (Scales that it converts make their layers the loader's: test_vllm_updates.)"""
    checkpoints = [quantized(save_qwen3(tmp_path / f"dense-{n}", n), tmp_path / f"int8-{n}", "float32") for n in range(2)]
    with vllm_beside(checkpoints, NO_WORDS) as (socket, expected):
        assert expected[0] != expected[1]
        _one_after_another(socket, checkpoints, expected)


def test_draft(tmp_path: Path) -> None:
    """One plan fills the model and its draft."""
    checkpoints = [save_glm4(tmp_path / f"glm4-{seed}", seed) for seed in range(2)]

    def state(socket: str) -> Any:
        return answers(socket), rpc(socket, "testing_digest", False), rpc(socket, "testing_digest", True)

    draft = "model.layers.3."
    without = changed(checkpoints[1], tmp_path / "none", lambda t: [t.pop(n) for n in list(t) if n.startswith(draft)])
    with vllm_beside(checkpoints, NO_WORDS, *MTP, ask=state) as (socket, expected):
        assert expected[0] != expected[1]
        for number, which in enumerate((0, 1, 0)):
            _loaded(socket, checkpoints[which], f"v{number}", "replayed" if number else "proved")
            assert state(socket) == expected[which], number
            assert rpc(socket, "weights_status")[0]["draft_layers"]
        for number in range(2):  # the draft stays as it was
            _loaded(socket, without, f"w{number}", "replayed" if number else "proved")
            now = state(socket)
            assert now[:2] == expected[1][:2]
            assert rpc(socket, "weights_status")[0]["draft_layers"] == {}
