"""Reinforcement learning on a laptop: a tiny language model learns to count, and its rollouts come from two serving engines.

    torchrun --nproc-per-node 2 examples/rl_loop.py

A prompt is a hexadecimal digit; an answer is right as far as each of its digits follows the one before. Two ranks train one model
together by policy gradient. Each rank starts an engine, a real server whose weights are random at first and change by nothing but
`ps.push`: this puts what the ranks hold, each a half of the parameters, into both engines, at every step.

Needs 'ckpt-engine[embedded]'. Ends with a chart, rl_loop.svg, the figures in rl_loop.json, and the trained model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from checkpoint_engine import ParameterServer
from checkpoint_engine.engines import get_engine

DIGITS = "0123456789abcdef"  # token i is digit i
LENGTH, SAMPLES = 8, 64  # tokens of an answer; answers in a step, on each rank
Step = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path.cwd(), help="where chart, figures and model go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same first weights on every rank
    config = LlamaConfig(
        vocab_size=len(DIGITS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    dist.init_process_group("gloo")
    torch.manual_seed(1 + dist.get_rank())  # other prompts on each
    with contextlib.ExitStack() as stack:
        urls = [""] * dist.get_world_size()
        dist.all_gather_object(urls, stack.enter_context(started_engine(config)))
        ps = stack.enter_context(ParameterServer(auto_pg=False))
        engines = [stack.enter_context(get_engine("sglang", url)) for url in urls]

        def push(version: str) -> None:
            mine = list(model.named_parameters())[ps.rank :: ps.world_size]
            ps.push(mine, engines=engines, version=version)

        history = train(model, push, urls[ps.rank], options.steps)
        prompts = [[digit] for digit in range(len(DIGITS))]
        greedy = [rollouts(url, prompts, f"step-{options.steps}", temperature=0).tolist() for url in urls]
        if ps.rank == 0:
            disable_progress_bar()
            model.save_pretrained(options.out / "model")
            (options.out / "rl_loop.json").write_text(json.dumps({"steps": history, "greedy": greedy}))
            (options.out / "rl_loop.svg").write_text(chart(history))
            print(f"chart: {options.out / 'rl_loop.svg'}")
        dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def started_engine(config: LlamaConfig) -> Iterator[str]:
    """The URL of an engine of its own process that serves such a model, with random weights. It ends with this process."""
    with tempfile.TemporaryDirectory() as directory:
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(directory)
        command = [sys.executable, "-m", "checkpoint_engine", "engine", directory, "--load-format", "dummy", "--threads", "1"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([*command, "--until-stdin-ends"], text=True, **pipes) as process:
            assert process.stdin and process.stdout
            line = process.stdout.readline()
            if not line.startswith("listening on "):
                raise RuntimeError("the engine did not start")
            yield line.split()[-1]
            process.stdin.close()


def rollouts(url: str, prompts: Sequence[list[int]], version: str, **sampling: Any) -> torch.Tensor:
    """What the engine answers, [prompts, LENGTH]. Raises RuntimeError if it does so with other weights than `version`."""
    body = {"input_ids": prompts, "sampling_params": {"max_new_tokens": LENGTH, **sampling}}
    answers = httpx.post(f"{url}/generate", json=body, timeout=60).raise_for_status().json()
    if served := {answer["version"] for answer in answers} - {version}:
        raise RuntimeError(f"{url} answered with {served}, not with {version}")
    return torch.tensor([answer["output_ids"] for answer in answers])


def train(model: LlamaForCausalLM, push: Callable[[str], None], url: str, steps: int) -> list[Step]:
    """REINFORCE: each token's reward is whether it follows the one before; the baseline is the mean over the batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history = []
    for number in range(steps + 1):
        begun = time.perf_counter()
        push(f"step-{number}")
        pushed = time.perf_counter()
        if number == steps:
            break
        prompts = torch.randint(len(DIGITS), (SAMPLES, 1))
        answers = rollouts(url, prompts.tolist(), f"step-{number}", temperature=1)
        texts = torch.cat([prompts, answers], 1)
        rewards = (texts[:, 1:] == (texts[:, :-1] + 1) % len(DIGITS)).float()
        log_policy = model(texts[:, :-1]).logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]
        loss = -((rewards - rewards.mean()) * log_policy).mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        optimizer.step()
        reward = rewards.mean()
        dist.all_reduce(reward)
        took = time.perf_counter() - begun
        history.append({"reward": reward.item() / dist.get_world_size(), "update_seconds": pushed - begun, "step_seconds": took})
        if dist.get_rank() == 0:
            show(number, history[-1], texts[0])
    return history


def show(number: int, step: Step, text: torch.Tensor) -> None:
    bar = "#" * round(30 * step["reward"])
    said = "".join(DIGITS[token] for token in text)
    share = step["update_seconds"] / step["step_seconds"]
    print(
        f"step {number:3}  reward {step['reward']:.2f} {bar:30}  {said[0]} -> {said[1:]}  "
        f"update {step['update_seconds'] * 1e3:4.0f} ms, {share:3.0%} of the step",
        flush=True,
    )


def chart(history: Sequence[Step]) -> str:
    """An SVG of three curves over the steps, each from 0 to its greatest value."""
    curves = {
        "reward": ("#1a6b33", [step["reward"] for step in history], "{:.2f}"),
        "update": ("#0b5cad", [step["update_seconds"] * 1e3 for step in history], "{:.0f} ms"),
        "update's share of a step": ("#9c4a00", [step["update_seconds"] / step["step_seconds"] for step in history], "{:.0%}"),
    }
    parts = []
    for row, (name, (color, values, shown)) in enumerate(curves.items()):
        base, top = 110 + 120 * row, max(values)
        points = " ".join(f"{20 + 560 * i / max(1, len(values) - 1):.1f},{base - 80 * v / top:.1f}" for i, v in enumerate(values))
        parts.append(f'<text x="20" y="{base - 88}">{name}: last {shown.format(values[-1])}, most {shown.format(top)}</text>')
        parts.append(f'<path d="M20 {base}H580" stroke="#999"/>')
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 380" font-family="sans-serif" font-size="14">'
    return "\n".join([head, '<rect width="600" height="380" fill="#fff"/>', *parts, "</svg>\n"])


if __name__ == "__main__":
    main()
