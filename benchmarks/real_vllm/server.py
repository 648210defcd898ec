"""Real vLLM servers as child processes, and questions to them over HTTP."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PROMPTS = [[5, 6, 7, 8], [9, 300, 17], list(range(10, 74))]
PORTS = range(18000, 20000)
"""Below the ports that Linux gives to clients, so that nobody takes one between the choice and the use."""
READY_SECONDS = 280.0

_ports = iter(PORTS)
# One for all calls: to make a client is to read all certificates of the host, 25 ms of what the benchmarks measure. But a
# connection for each call, for servers close those that are idle.
http = httpx.Client(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
_choosing = threading.Lock()


class ServerDiedError(RuntimeError):
    """A server or what runs beside it ended, or did not come up in time."""


@dataclasses.dataclass(frozen=True)
class Host:
    """Where and with what servers are run.

    python   interpreter that has vLLM; ranks: the one for torchrun
    source   folder that holds the `checkpoint_engine` to use
    work     folder for logs and caches; every server has a cache of its own
    known    folder of vLLM's model descriptions (VLLM_CACHE_ROOT/modelinfos), which make starts shorter; or None
    gpus     0: vLLM's build for CPUs
    settings more environment variables
    """

    python: str
    ranks: str
    source: Path
    work: Path
    known: Path | None
    gpus: int
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def environment(self, gpus: Sequence[int]) -> dict[str, str]:
        paths = [str(self.source), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        settings = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        if self.gpus:
            settings["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
            # NVLink multicast stays off: on a host whose GPUs are shared, a program that dies with it can block them.
            settings |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
            settings["VLLM_ALLREDUCE_USE_SYMM_MEM"] = "0"
        else:
            settings["CHECKPOINT_ENGINE_DEVICE"] = "cpu"
        return {**os.environ, **settings, **self.settings}


class Processes:
    """Child processes with sessions of their own. `end`: all of them, and no more begin; who runs them sees to what is left."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._ended = False

    @contextmanager
    def run(self, command: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
        with self._lock:
            if self._ended:
                raise ServerDiedError("out of time")
            with log.open("wb") as output:
                child = subprocess.Popen(
                    command, env=environment, cwd=log.parent, stdout=output, stderr=output, start_new_session=True
                )
            self._running.add(child)
        try:
            yield child
        finally:
            _end(child)
            with self._lock:
                self._running.discard(child)

    def end(self) -> None:
        with self._lock:
            self._ended = True
            for child in self._running:
                child.terminate()  # torchrun's ranks have sessions of their own: it must end them itself


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(15)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody listens on and that this process never chose before."""
    with _choosing:
        while True:
            first = next(_ports)
            for _ in range(count - 1):
                next(_ports)
            if all(_is_free(port) for port in range(first, first + count)):
                return first


def _is_free(port: int) -> bool:
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@contextmanager
def serve(
    host: Host, processes: Processes, name: str, model: Path, tp: int, gpus: Sequence[int], *arguments: str
) -> Iterator[Server]:
    """A server that is starting; `Server.wait` waits until it can be asked."""
    port, cache = free_ports(1), host.work / f"cache-{name}"
    shutil.rmtree(cache, ignore_errors=True)
    if host.known:
        shutil.copytree(host.known, cache / "modelinfos")
    environment = host.environment(gpus) | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CACHE_ROOT": str(cache), "OMP_NUM_THREADS": "4"}
    command = [host.python, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", "m"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--tensor-parallel-size", str(tp)]
    command += ["--worker-extension-cls", "real_vllm.extension.Extension", *arguments]
    if host.gpus:
        environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    else:
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(tp)))}
        command += ["--enforce-eager"]
    log = host.work / f"{name}.log"
    with processes.run(command, environment, log) as child:
        yield Server(f"http://127.0.0.1:{port}", child, log)


@dataclasses.dataclass(frozen=True)
class Server:
    url: str
    child: subprocess.Popen[bytes]
    log: Path

    def wait(self, seconds: float = READY_SECONDS) -> float:
        """Seconds until it answered. Raises ServerDiedError."""
        start = time.monotonic()
        while time.monotonic() < start + seconds:
            self.check()
            with suppress(httpx.HTTPError):
                if http.get(f"{self.url}/health", timeout=5).is_success:
                    return time.monotonic() - start
            time.sleep(0.5)
        raise ServerDiedError(f"{self.log.name}: not ready within {seconds} s")

    def check(self) -> None:
        if self.child.poll() is not None:
            raise ServerDiedError(f"{self.log.name}: ended with {self.child.returncode}: {last_error(self.log)}")


def last_error(log: Path) -> str:
    """The last line of a log that tells of an error."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line]
    return lines[-1].strip()[-300:] if lines else "no error in its log"


def ask(url: str, prompt: Sequence[int], tokens: int = 24, seconds: float = 120.0) -> list[int]:
    """The greedy token ids that follow `prompt`. Raises httpx.HTTPError."""
    fixed = {"model": "m", "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    body = {**fixed, "prompt": list(prompt), "max_tokens": tokens}
    response = http.post(f"{url}/v1/completions", json=body, timeout=seconds)
    response.raise_for_status()
    found: list[int] = response.json()["choices"][0]["token_ids"]
    return found


def rpc(url: str, method: str, *args: Any, seconds: float = 300.0) -> list[Any]:
    """What each worker answered to `method`. Raises httpx.HTTPError."""
    body = {"method": method, "args": list(args), "timeout": seconds}
    response = http.post(f"{url}/collective_rpc", json=body, timeout=seconds)
    response.raise_for_status()
    found: list[Any] = json.loads(response.content)["results"] if response.content else []
    return found


def state(url: str) -> dict[str, Any]:
    """Answers to single prompts, and every parameter of every worker."""
    return {"answers": [ask(url, prompt) for prompt in PROMPTS], "parameters": rpc(url, "bench_parameters")}


def torchrun(host: Host, count: int, *arguments: str) -> list[str]:
    """torchrun on two ports of ours: its own, and the next one, which the servers' store takes."""
    command = [host.ranks, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--nnodes", "1"]
    return [*command, "--master-addr", "127.0.0.1", "--master-port", str(free_ports(2)), *arguments]


def say(text: str) -> None:
    print(text, file=sys.stdout, flush=True)
