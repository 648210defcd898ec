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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from checkpoint_engine.engines.vllm import Vllm

ROOT = Path(__file__).parents[2]
VENV = os.environ.get("VLLM_VENV", "")


def _version() -> tuple[int, ...]:
    """Of vLLM in that environment."""
    (found,) = Path(VENV).glob("lib/python3*/site-packages/vllm-*.dist-info")
    return tuple(map(int, found.name.removeprefix("vllm-").removesuffix(".dist-info").partition("+")[0].split(".")))


NAMES_VERSIONS = _version() >= (0, 32)
"""Whether vLLM's answers say which versions made them, if asked to."""
SHM = Path("/dev/shm")
READY_SECONDS = 600.0
SECONDS = 60.0
PROMPTS = [[5, 6, 7, 8], [9, 300, 17], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]]


SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def save_qwen3(path: Path, seed: int, *, experts: bool = False, tied: bool = False) -> Path:
    """A random Qwen3, or Qwen3-MoE, whose answers depend on every layer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = {**SHAPE, "tie_word_embeddings": tied}
    torch.manual_seed(seed)
    if experts:
        few = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
        model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **few, norm_topk_prob=True))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**shape))
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def save_glm4(path: Path, seed: int) -> Path:
    """A random GLM-4 MoE with one layer that predicts a further token (MTP): a fourth decoder layer and what is around it."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    few = {"moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1}
    config = Glm4MoeConfig(**{**SHAPE, **few, "num_hidden_layers": 4, "topk_group": 1, "first_k_dense_replace": 1})
    torch.manual_seed(seed)
    Glm4MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    width, draft = config.hidden_size, "model.layers.3."
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{draft}{name}.weight"] = torch.rand(width, dtype=torch.bfloat16) + 0.5
    tensors[f"{draft}eh_proj.weight"] = torch.randn(width, 2 * width, dtype=torch.bfloat16) * 0.1
    tensors[f"{draft}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{draft}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return configured(path, num_hidden_layers=3, num_nextn_predict_layers=1)


def configured(path: Path, **settings: Any) -> Path:
    """A checkpoint's folder with these settings in its config.json."""
    config = path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return path


INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
        }
    },
}


def quantized(checkpoint: Path, path: Path, scales: str = "bfloat16") -> Path:
    """A copy of a checkpoint with its projections in int8, and a scale of that dtype for each of their channels."""
    import torch

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("proj.weight")]:
            weight = tensors[name].float()
            scale = weight.abs().amax(1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale.to(getattr(torch, scales))

    return configured(changed(checkpoint, path, quantize), quantization_config=INT8)


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
    command += ["--dtype", "bfloat16", "--max-model-len", "1280", "--max-num-seqs", "4", "--enforce-eager"]
    command += ["--load-format", "auto" if load else "dummy", "--tensor-parallel-size", str(tensor_parallel)]
    command += ["--worker-extension-cls", "extension.Extension", *arguments]
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
            if not _fresh(left) and not _mapped(left):
                left.unlink(missing_ok=True)


@contextmanager
def vllm_beside(
    checkpoints: Sequence[Path], *arguments: str, tensor_parallel: int = 1, ask: Callable[[str], Any] | None = None
) -> Iterator[tuple[str, list[Any]]]:
    """The Unix socket of a server with random weights, and what servers that read each checkpoint themselves told when asked
    (None: `answers`). These run one after the other while the first one starts: a server starts on one core."""

    def told(checkpoint: Path) -> Any:
        with vllm_server(checkpoint, *arguments, load=True, tensor_parallel=tensor_parallel) as address:
            return (ask or answers)(address)

    with ThreadPoolExecutor(1) as pool:
        expected = [pool.submit(told, checkpoint) for checkpoint in checkpoints]
        with vllm_server(checkpoints[0], *arguments, tensor_parallel=tensor_parallel) as address:
            yield address, [one.result() for one in expected]


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


def _fresh(path: Path) -> bool:
    """Whether it was just made: perhaps by a server that starts, and has not mapped it yet."""
    with suppress(OSError):
        return time.time() - path.stat().st_ctime < 10
    return False


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


def generate(address: str, prompt: Sequence[int], length: int, begun: threading.Event | None = None) -> dict[str, Any]:
    """One greedy answer of `length` tokens: token_ids, and weight_versions, the versions that made them. `begun` is set with the
    first of its tokens."""
    sampling = {"max_tokens": length, "temperature": 0, "ignore_eos": True, "detokenize": False}
    body = {"model": "m", "token_ids": list(prompt), "sampling_params": sampling, "stream": True}
    told: dict[str, Any] = {"token_ids": []}
    with (
        httpx.Client(transport=httpx.HTTPTransport(uds=address, verify=False), timeout=SECONDS, trust_env=False) as client,
        client.stream("POST", "http://vllm/inference/v1/generate", json=body) as answer,
    ):
        for line in answer.raise_for_status().iter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line.removeprefix("data: ")).get("choices", ()):
                told["token_ids"] += choice.get("token_ids") or []
                told["weight_versions"] = choice.get("weight_versions") or told.get("weight_versions")
            if begun is not None and told["token_ids"]:
                begun.set()
    return told


def published(address: str) -> str:
    """The version that vLLM itself says it serves."""
    with Vllm("http://vllm", uds=address) as engine:
        return str(engine.request("GET", "/weight_info", None, SECONDS).json()["weight_version"])


def embeddings(address: str, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[list[float]]:
    with Vllm("http://vllm", uds=address) as engine:
        said = [engine.request("POST", "/v1/embeddings", {"model": "m", "input": list(p)}, SECONDS).json() for p in prompts]
    return [one["data"][0]["embedding"] for one in said]


def rpc(address: str, method: str, *args: Any) -> Any:
    with Vllm("http://vllm", uds=address) as engine:
        response = engine.request("POST", "/collective_rpc", {"method": method, "args": list(args)}, SECONDS)
    return json.loads(response.content)["results"]


def run_update(
    rank: int, world_size: int, address: str, file: str, version: str, settings: dict[str, Any]
) -> str | dict[str, Any]:
    """One rank's part of an update of the engine at `address`. Returns the error that it ended with, or its report."""
    from checkpoint_engine.engines import request_for_rank
    from checkpoint_engine.errors import UpdateError
    from helpers.fleet import server

    with server(**{"timeout": SECONDS, "bucket_bytes": 128 << 10, **settings}) as ps, Vllm("http://vllm", uds=address) as engine:
        ps.register_checkpoint(version, files=[file], stripe=True)
        ps.gather_metas(version)
        request = request_for_rank([engine], rank, world_size, version=version, seconds=SECONDS)
        try:
            return ps.update(version, request, version=version).to_dict()
        except UpdateError as e:
            return str(e)


def told(address: str, checkpoint: Path, version: str, ranks: int = 1, **settings: Any) -> list[str | dict[str, Any]]:
    """What each rank's update ended with: its error, or its report."""
    from helpers.ranks import run_ranks

    return run_ranks(run_update, ranks, address, str(checkpoint / "model.safetensors"), version, settings, timeout=120.0)


def update(address: str, checkpoint: Path, version: str, ranks: int = 1, **settings: Any) -> list[str | None]:
    """What each rank's update ended with: None, or its error."""
    ended = told(address, checkpoint, version, ranks, **settings)
    return [one if isinstance(one, str) else None for one in ended]


def changed(checkpoint: Path, path: Path, change: Any) -> Path:
    """A copy of a checkpoint with `change(tensors)` applied to its dict of tensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path
