"""Real vLLM servers on a CPU, and small checkpoints for them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from checkpoint_engine.engines.vllm import Vllm

ROOT = Path(__file__).parents[2]
VENV = os.environ.get("VLLM_VENV", "")
SHM = Path("/dev/shm")
READY_SECONDS = 240.0
SECONDS = 60.0
PROMPTS = [[5, 6, 7, 8], [9, 300, 17], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]]


def save_qwen3(path: Path, seed: int, *, experts: bool = False, tied: bool = False) -> Path:
    """A random Qwen3, or Qwen3-MoE, whose answers depend on every layer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(seed)
    if experts:
        few = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
        model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **few, norm_topk_prob=True))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**shape))
    model.to(torch.bfloat16).save_pretrained(path)
    return path


@contextmanager
def vllm_server(model: Path, *arguments: str, load: bool = False, tensor_parallel: int = 1) -> Iterator[str]:
    """The Unix socket of a vLLM server: with random weights, or (`load`) with those of `model`."""
    folder = Path(tempfile.mkdtemp(prefix="vllm-", dir="/tmp"))
    before = _shared()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(Path(__file__).parent)]),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(tensor_parallel))) if tensor_parallel > 1 else "auto",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [f"{VENV}/bin/vllm", "serve", str(model), "--served-model-name", "m", "--uds", str(folder / "http")]
    command += ["--dtype", "bfloat16", "--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager"]
    command += ["--load-format", "auto" if load else "dummy", "--tensor-parallel-size", str(tensor_parallel)]
    command += ["--worker-extension-cls", "checkpoint_engine.worker.VllmColocateWorkerExtension", *arguments]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        _wait(process, str(folder / "http"))
        yield str(folder / "http")
    except BaseException:
        sys.stderr.write(log.read_text(errors="replace")[-20000:])
        raise
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)
        for left in _shared() - before:  # workers that are killed leave what they shared
            if not _mapped(left):
                left.unlink(missing_ok=True)


def _wait(process: subprocess.Popen[bytes], path: str) -> None:
    """Until it answers. httpx leaves sockets open that did not connect, hence the bare socket first."""
    end = time.monotonic() + READY_SECONDS
    while not _listens(path):
        with suppress(subprocess.TimeoutExpired):
            raise RuntimeError(f"vllm serve ended with status {process.wait(0.1)}")
        if time.monotonic() > end:
            raise TimeoutError(f"vllm serve did not listen within {READY_SECONDS} s")
    with Vllm("http://vllm", uds=path) as engine:
        engine.wait_ready(end - time.monotonic())


def _shared() -> set[Path]:
    return {*SHM.glob("vllm_dist_*"), *SHM.glob("psm_*")}


def _mapped(path: Path) -> bool:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            if str(path) in maps.read_text():
                return True
    return False


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
        except OSError:
            return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def answers(address: str, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[list[int]]:
    """Greedy token ids for each prompt, asked one at a time: another batch may differ in the last bits."""
    fixed = {"model": "m", "max_tokens": 16, "temperature": 0, "ignore_eos": True, "return_token_ids": True, "detokenize": False}
    with Vllm("http://vllm", uds=address) as engine:
        said = [engine.request("POST", "/v1/completions", {**fixed, "prompt": list(p)}, SECONDS).json() for p in prompts]
    return [one["choices"][0]["token_ids"] for one in said]


def embeddings(address: str, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[list[float]]:
    with Vllm("http://vllm", uds=address) as engine:
        said = [engine.request("POST", "/v1/embeddings", {"model": "m", "input": list(p)}, SECONDS).json() for p in prompts]
    return [one["data"][0]["embedding"] for one in said]


def rpc(address: str, method: str, *args: Any) -> Any:
    with Vllm("http://vllm", uds=address) as engine:
        response = engine.request("POST", "/collective_rpc", {"method": method, "args": list(args)}, SECONDS)
    return json.loads(response.content)["results"]


def run_update(rank: int, world_size: int, address: str, file: str, version: str, settings: dict[str, Any]) -> str | None:
    """One rank's part of an update of the engine at `address`. Returns the error that it ended with."""
    from checkpoint_engine.engines import request_for_rank
    from checkpoint_engine.errors import UpdateError
    from helpers.fleet import server

    with server(**{"timeout": SECONDS, "bucket_bytes": 128 << 10, **settings}) as ps, Vllm("http://vllm", uds=address) as engine:
        ps.register_checkpoint(version, files=[file], stripe=True)
        ps.gather_metas(version)
        try:
            ps.update(version, request_for_rank([engine], rank, world_size, version=version, seconds=SECONDS), version=version)
        except UpdateError as e:
            return str(e)
    return None


def update(address: str, checkpoint: Path, version: str, ranks: int = 1, **settings: Any) -> list[str | None]:
    """What each rank's update ended with: None, or its error."""
    from helpers.ranks import run_ranks

    return run_ranks(run_update, ranks, address, str(checkpoint / "model.safetensors"), version, settings, timeout=120.0)


def changed(checkpoint: Path, path: Path, change: Any) -> Path:
    """A copy of a checkpoint with `change(tensors)` applied to its dict of tensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path
