"""examples/rl_loop.py, in short: it learns, and what its engines answer in the end is what the trained model says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.ports import free_ports

SCRIPT = Path(__file__).parents[1] / "examples" / "rl_loop.py"
STEPS = 30


@pytest.mark.timeout(300)
def test_reward_rises_and_engines_serve_the_policy(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_ports(3))]
    process = subprocess.Popen(
        [*torchrun, str(SCRIPT), "--steps", str(STEPS), "--out", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=280)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, output
    figures = json.loads((tmp_path / "rl_loop.json").read_text())
    rewards = [step["reward"] for step in figures["steps"]]
    assert len(rewards) == STEPS
    assert sum(rewards[:3]) / 3 < 0.2 and sum(rewards[-3:]) / 3 > 0.5, rewards
    assert all(0 < step["update_seconds"] < step["step_seconds"] for step in figures["steps"])
    assert output.count("% of the step") == STEPS
    xml.etree.ElementTree.fromstring((tmp_path / "rl_loop.svg").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    prompts = torch.arange(16)[:, None]
    expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, do_sample=False)[:, 1:]
    assert figures["greedy"] == [expected.tolist()] * 2
