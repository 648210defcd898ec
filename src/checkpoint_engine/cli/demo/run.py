"""The demo's course: two parameter servers, two engines with random weights, two updates, and what came of them."""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from checkpoint_engine.cli.demo.checkpoint import checkpoint_files, perturb, read_checkpoint
from checkpoint_engine.cli.demo.client import Asker, ask, http_client
from checkpoint_engine.cli.demo.processes import Child, Fleet, free_port_pair
from checkpoint_engine.cli.demo.reference import Reference, labels
from checkpoint_engine.cli.progress import line, size
from checkpoint_engine.errors import CheckpointEngineError, ProtocolError

ENGINES = 2
_LISTENING = "listening on "


def run(directory: Path, seconds: float, console: Console, method: str = "broadcast") -> dict[str, Any]:
    """Everything `show` prints and --json gives; "ok" says whether all was right.

    seconds: for each wait. method: "p2p": a third engine joins.
    Raises the typed error of whatever went wrong otherwise; no process is left in either case.
    """
    directory = directory.resolve()
    checkpoint_files(directory)
    # One thread in the engines and here: sums then have one order, and equal answers are equal bit for bit.
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ckpt-demo-")))
        fleet = stack.enter_context(Fleet(scratch))
        count = ENGINES + (method == "p2p")
        line(console, f"starting {count} engines with random weights and {count} parameter servers")
        engines = [_start_engine(fleet, i, directory) for i in range(count)]
        tensors = read_checkpoint(directory)
        if method == "p2p":
            return _join(stack, fleet, engines, tensors, directory, scratch, seconds, console)
        perturbed = {name: perturb(name, tensor) for name, tensor in tensors.items()}
        references = {"real": Reference(directory, tensors, True), "perturbed": Reference(directory, perturbed, False)}
        end = time.monotonic() + seconds
        urls = [_url(child, end - time.monotonic()) for child in engines]
        servers = _start_servers(fleet, directory, urls, seconds)
        client = stack.enter_context(http_client())
        return _course(client, urls, servers, references, tensors, directory, seconds, console)


def _join(
    stack: ExitStack,
    fleet: Fleet,
    engines: list[Child],
    tensors: dict[str, torch.Tensor],
    directory: Path,
    scratch: Path,
    seconds: float,
    console: Console,
) -> dict[str, Any]:
    from checkpoint_engine.cli.demo.joining import join_course  # which imports this module

    real = Reference(directory, tensors, True)
    end = time.monotonic() + seconds
    urls = [_url(child, end - time.monotonic()) for child in engines]
    servers = _start_servers(fleet, directory, urls[:ENGINES], seconds)
    # Over TCP, though all are on one host: another host's engine would come that way.
    (joiner,) = _start_servers(fleet, directory, urls[ENGINES:], seconds, "joining server", "tcp")
    client = stack.enter_context(http_client())
    result = join_course(client, urls, servers, joiner, real, scratch, seconds, console)
    about = {"checkpoint": str(directory), "tensors": len(tensors), "nbytes": _nbytes(tensors), "kind": real.kind}
    return {**about, "method": "p2p", **result}


def _course(
    client: httpx.Client,
    urls: list[str],
    servers: list[Child],
    references: dict[str, Reference],
    tensors: dict[str, torch.Tensor],
    directory: Path,
    seconds: float,
    console: Console,
) -> dict[str, Any]:
    real = references["real"]
    before = [real.show(ask(client, url, real.kind, real.inputs)[0]) for url in urls]
    updates = []
    with ExitStack() as asking:
        askers = [asking.enter_context(Asker(url, real.kind, real.inputs)) for url in urls]
        for name, reference in references.items():
            line(console, f"updating both engines: {name} weights, {size(_nbytes(tensors))}")
            answers = update_pair(servers, name, seconds)
            updates.append(
                {
                    "version": name,
                    "registered": max(a["registered"] for a in answers),
                    "report": answers[0]["report"],
                    "engines": [reference.check(client, url, name) for url in urls],
                }
            )
    right = {name: reference.answers for name, reference in references.items()}
    clients = [asker.summary(right) for asker in askers]
    equal = all(
        e["parameters_equal"] and e["answers_equal"] and e["version_equal"] for update in updates for e in update["engines"]
    )
    asked = all(c["answered"] and not c["failed"] and not c["mixed"] for c in clients)
    return {
        "ok": equal and asked,
        "method": "broadcast",
        "checkpoint": str(directory),
        "tensors": len(tensors),
        "nbytes": _nbytes(tensors),
        "kind": real.kind,
        "questions": labels(real.kind, real.inputs),
        "before": before,
        "updates": updates,
        "clients": clients,
    }


def _nbytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.nbytes for t in tensors.values())


def _start_engine(fleet: Fleet, index: int, directory: Path) -> Child:
    return fleet.start(
        f"engine {index}", "checkpoint_engine", "engine", str(directory),
        "--load-format", "dummy", "--threads", "1", "--until-stdin-ends",
    )  # fmt: skip


def _url(engine: Child, seconds: float) -> str:
    said = engine.line(seconds, "to start")
    if not said.startswith(_LISTENING):
        raise ProtocolError(f"{engine.name} said {said!r} instead of where it listens")
    return said.removeprefix(_LISTENING)


def _start_servers(
    fleet: Fleet, directory: Path, urls: list[str], seconds: float, name: str = "parameter server", transport: str = "auto"
) -> list[Child]:
    """A world with a rank for each engine. transport: by which it reads peers."""
    port = free_port_pair()
    servers = []
    for rank in range(len(urls)):
        arguments = {
            "rank": rank, "world_size": len(urls), "master_port": port,
            "urls": urls, "checkpoint": str(directory), "seconds": seconds, "peer_transport": transport,
        }  # fmt: skip
        servers.append(fleet.start(f"{name} {rank}", "checkpoint_engine.cli.demo.server", json.dumps(arguments)))
    gather(servers, seconds, "to start")
    return servers


def update_pair(servers: list[Child], name: str, seconds: float) -> list[dict[str, Any]]:
    for server in servers:
        server.send({"name": name, "perturbed": name == "perturbed"})
    return gather(servers, seconds + 10, f"to update to {name}")


def gather(servers: list[Child], seconds: float, what: str) -> list[dict[str, Any]]:
    """One answer of each. Raises CheckpointEngineError with what any of them says went wrong."""
    end = time.monotonic() + seconds
    answers = []
    for server in servers:
        answer = json.loads(server.line(end - time.monotonic(), what))
        if not answer["ok"]:
            raise CheckpointEngineError(f"{server.name}: {answer['error']}")
        answers.append(answer)
    return answers
