"""An engine around SGLang's own worker class: a real HTTP server, one process for each tensor-parallel rank, a small model.

SGLang's worker class runs as it is published. What it imports of the rest of SGLang is stood in for: the device's number and
uuid (on a CPU there is none) and the context in which post-processing runs. What calls it, in SGLang, is done alike here: a new
instance of the class for the target model and then for each draft model, on the same handles.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from helpers.fleet import digests
from helpers.ranks import _context

VOCABULARY, HIDDEN, INNER = 384, 64, 96
TARGET_LAYERS, DRAFT_LAYERS = ("0", "1"), ("2",)
# Checkpoint's part -> the engine's fused parameter, and which part of it.
FUSED = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2)}
FUSED |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
COLUMNS = ("o_proj", "down_proj")  # split by input features; norms are whole on every rank; the others are split by rows


class _Quant:
    """As SGLang's quantization methods: called for each layer that has one, after loading."""

    def process_weights_after_loading(self, module: Any) -> None:
        module.processed.copy_(module.weight.abs().amax())


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)
    layer.register_buffer("processed", torch.zeros((), dtype=torch.bfloat16))
    layer.quant_method = _Quant()  # type: ignore[assignment]
    return layer


class _Layer(nn.Module):
    def __init__(self, split: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        self.self_attn.qkv_proj = _linear(HIDDEN, 3 * HIDDEN // split)
        self.self_attn.o_proj = _linear(HIDDEN // split, HIDDEN)
        self.mlp.gate_up_proj = _linear(HIDDEN, 2 * INNER // split)
        self.mlp.down_proj = _linear(INNER // split, HIDDEN)
        self.input_layernorm = nn.RMSNorm(HIDDEN, dtype=torch.float32)


class SmallModel(nn.Module):
    """One tensor-parallel rank's part of a decoder, with fused and sharded parameters as engines have them.

    layers: those that it has; a draft model has another one than its target, and both are sent all.
    """

    def __init__(self, rank: int, split: int, layers: tuple[str, ...]) -> None:
        super().__init__()
        self.rank, self.split = rank, split
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCABULARY // split, HIDDEN, dtype=torch.bfloat16)
        self.model.layers = nn.ModuleDict({name: _Layer(split) for name in layers})
        self.lm_head = _linear(HIDDEN, VOCABULARY // split)
        self.register_buffer("absorbed", torch.zeros(HIDDEN, HIDDEN, dtype=torch.bfloat16))
        self.requires_grad_(False)

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """Raises RuntimeError when a tensor's shape is not the parameter's."""
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            module, kind = name.rsplit(".", 2)[-2:]
            fused, part = FUSED.get(module, (module, None))
            target = parameters.get(name.replace(f"{module}.{kind}", f"{fused}.{kind}"))
            if target is None:  # a layer of the other model
                continue
            if part is not None:
                target = target.chunk(3 if fused == "qkv_proj" else 2)[part]
            if module != "input_layernorm":
                tensor = tensor.chunk(self.split, 1 if module in COLUMNS else 0)[self.rank]
            if target.shape != tensor.shape:
                raise ValueError(f"{name}: a shard of {tuple(tensor.shape)} for a parameter of {tuple(target.shape)}")
            target.copy_(tensor)

    def post_load_weights(self) -> None:
        """As DeepSeek's: a product of weights that no tensor of the checkpoint brings."""
        for layer in self.model.layers.values():
            query, key, _ = layer.self_attn.qkv_proj.weight.chunk(3)
            self.absorbed.copy_(query.T @ key)


def checkpoint(seed: int) -> dict[str, torch.Tensor]:
    """A whole checkpoint, by the names and shapes that such have on disk."""
    made = torch.Generator().manual_seed(seed)

    def weight(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=made).to(dtype)

    tensors = {"model.embed_tokens.weight": weight(VOCABULARY, HIDDEN), "lm_head.weight": weight(VOCABULARY, HIDDEN)}
    for layer in (*TARGET_LAYERS, *DRAFT_LAYERS):
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.self_attn.{name}_proj.weight": weight(HIDDEN, HIDDEN) for name in "qkvo"}
        tensors |= {f"{prefix}.mlp.{name}_proj.weight": weight(INNER, HIDDEN) for name in ("gate", "up")}
        tensors[f"{prefix}.mlp.down_proj.weight"] = weight(HIDDEN, INNER)
        tensors[f"{prefix}.input_layernorm.weight"] = weight(HIDDEN, dtype=torch.float32)
    return tensors


def expected(tensors: dict[str, torch.Tensor], tensor_parallel: int, draft: bool) -> list[list[dict[str, str]]]:
    """Digests by rank and model of what loading `tensors` in this process makes."""
    return [[_loaded(m, tensors) for m in _models(rank, tensor_parallel, draft)] for rank in range(tensor_parallel)]


def _loaded(model: SmallModel, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    model.load_weights(list(tensors.items()))
    for module in model.modules():
        if isinstance(method := getattr(module, "quant_method", None), _Quant):
            method.process_weights_after_loading(module)
    model.post_load_weights()
    return digests(model.state_dict())


def _models(rank: int, split: int, draft: bool) -> list[SmallModel]:
    return [SmallModel(rank, split, layers) for layers in (TARGET_LAYERS, DRAFT_LAYERS)[: 1 + draft]]


# --- the workers -------------------------------------------------------------------------------------------------------


def _stand_in(wheel: Path, rank: int) -> None:
    """Make `sglang.srt.checkpoint_engine` importable from the wheel's folder, and what it imports of SGLang besides."""

    def module(name: str, **contents: Any) -> None:
        sys.modules[name] = made = ModuleType(name)
        made.__dict__.update(contents)

    @contextlib.contextmanager
    def device_loading_context(layer: Any, device: torch.device) -> Iterator[Any]:
        yield layer  # as SGLang's does for what is on its device already

    uuid = f"{socket.gethostname()}-{rank}"
    properties = SimpleNamespace(uuid=uuid)
    module("sglang", __path__=[str(wheel / "sglang")])
    module("sglang.srt", __path__=[str(wheel / "sglang/srt")])
    module("sglang.srt.model_loader", __path__=[])
    module("sglang.srt.model_loader.loader", device_loading_context=device_loading_context)
    # 0.5.23 asks SGLang's platform, 0.5.17 asks torch for the GPU's number and uuid.
    module("sglang.srt.platforms", current_platform=SimpleNamespace(get_device_uuid=lambda _: uuid))
    devices = SimpleNamespace(current_device=lambda: rank)
    module("sglang.srt.utils", get_device=lambda: "cpu", get_device_module=lambda: devices, is_npu=lambda: False)
    torch.cuda.current_device = lambda: rank
    torch.cuda.get_device_properties = lambda _=None: properties  # type: ignore[assignment]


def _worker(pipe: Connection, variables: dict[str, str], wheel: Path, rank: int, split: int, draft: bool) -> None:
    import os

    os.environ.update(variables)
    _stand_in(wheel, rank)
    from sglang.srt.checkpoint_engine import checkpoint_engine_worker

    torch.manual_seed(1000 + rank)
    models = _models(rank, split, draft)
    pipe.send(checkpoint_engine_worker.__file__)
    while (handles := pipe.recv()) is not None:
        answer = "IPC weight update completed successfully"
        success = True
        try:
            for model in models:
                runner = SimpleNamespace(model=model)
                checkpoint_engine_worker.SGLangCheckpointEngineWorkerExtensionImpl(runner).update_weights_from_ipc(handles)
        except Exception as e:
            success, answer = False, str(e)
        pipe.send((success, answer, [digests(model.state_dict()) for model in models]))


# --- the server --------------------------------------------------------------------------------------------------------


class SGLangEngine:
    """ping: what GET /ping answers until the first weights are in. requests: bodies of the updates that were asked for.
    weights: digests by rank and model after the last update."""

    def __init__(self, pipes: list[Connection], ping: int) -> None:
        self._pipes, self.ping = pipes, ping
        self.url = ""
        self.requests: list[dict[str, Any]] = []
        self.pings: list[int] = []
        self.weights: list[list[dict[str, str]]] = []

    def update(self, body: dict[str, Any]) -> tuple[bool, str]:
        self.requests.append(body)
        # SGLang's class looks for GPU-<uuid>; a server on a CPU lists CPU-<host>-<number>.
        handles = {key.replace("CPU-", "GPU-", 1): handle for key, handle in body["zmq_handles"].items()}
        for pipe in self._pipes:
            pipe.send(handles)
        answers = [pipe.recv() for pipe in self._pipes]
        self.weights = [answer[2] for answer in answers]
        if success := all(answer[0] for answer in answers):
            self.ping = 200
        return success, " | ".join(answer[1] for answer in answers)


@contextlib.contextmanager
def sglang_engine(wheel: Path, tensor_parallel: int, *, draft: bool = False, ping: int = 200) -> Iterator[SGLangEngine]:
    """Running: its workers have imported SGLang's class from `wheel`, its server listens at `url`."""
    import os

    with contextlib.ExitStack() as stack:
        pipes = []
        for rank in range(tensor_parallel):
            mine, theirs = _context.Pipe()
            args = (theirs, dict(os.environ), wheel, rank, tensor_parallel, draft)
            process = _context.Process(target=_worker, args=args)
            process.start()
            stack.callback(process.close)
            stack.callback(process.join)
            stack.callback(process.kill)
            stack.callback(mine.close)
            theirs.close()
            pipes.append(mine)
        for pipe in pipes:
            if not pipe.poll(60) or Path(pipe.recv()).parents[3] != wheel:
                raise RuntimeError("a worker did not take SGLang's class from its wheel")
        engine = SGLangEngine(pipes, ping)
        server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), _handler(engine)))
        engine.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        yield engine


def _handler(engine: SGLangEngine) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            engine.pings.append(engine.ping)
            self._answer(engine.ping if self.path == "/ping" else 404, {})

        def do_POST(self) -> None:
            if self.path != "/update_weights_from_ipc":
                return self._answer(404, {})
            success, message = engine.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            return self._answer(200 if success else 400, {"success": success, "message": message})

        def _answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
