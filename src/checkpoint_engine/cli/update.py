"""The command that updates engines from a checkpoint on disk; torchrun starts it on every rank."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from checkpoint_engine.cli.progress import line, meter, size, speed, table
from checkpoint_engine.errors import DeadlineError, EngineUnreachableError, SettingsError

if TYPE_CHECKING:
    from checkpoint_engine.engines import Engine
    from checkpoint_engine.server import UpdateReport


def update(
    checkpoint: Annotated[Path, typer.Option(help="Directory of safetensors files; every rank must see it.")],
    endpoint: Annotated[list[str], typer.Option(help="URL of an engine; repeat it for further replicas, in rank order.")],
    inference_parallel_size: Annotated[int, typer.Option(help="Ranks that one engine spans (TP x PP).", min=1)],
    engine: Annotated[str, typer.Option(help="Kind of engine: sglang (and the embedded one) or vllm.")] = "sglang",
    weight_version: Annotated[str | None, typer.Option(help="Version that the engines report from then on.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the checkpoint; its directory's name by default.")] = None,
    wait: Annotated[float, typer.Option(help="Seconds for an engine to become ready.", min=0.1)] = 600.0,
    timeout: Annotated[float, typer.Option(help="Seconds for the update.", min=0.1)] = 600.0,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Update running engines from a checkpoint on disk.

    torchrun --nproc-per-node N -m checkpoint_engine update --checkpoint DIR --endpoint URL --inference-parallel-size K

    Each rank holds its share of every layer in host memory. Endpoint i serves ranks i*K to (i+1)*K - 1, and the first of
    them asks it to update.
    """
    rank, world_size = world(os.environ)
    check_ranks(len(endpoint), inference_parallel_size, world_size)
    name = name or checkpoint.resolve().name
    console = Console(file=sys.stderr if json_output else sys.stdout)

    # Imported here, so that a mistake in the arguments is told at once.
    from checkpoint_engine.engines import get_engine
    from checkpoint_engine.memory.safetensors import checkpoint_files

    files = [str(file) for file in checkpoint_files(checkpoint)]
    with ExitStack() as stack:
        engines = [stack.enter_context(get_engine(engine, url)) for url in endpoint]
        index, position = divmod(rank, inference_parallel_size)
        asked = engines[index] if position == 0 else None
        report = _update(console, name, files, engines, asked, weight_version, wait, timeout)
    if rank == 0:
        if json_output:
            print(json.dumps(report.to_dict()))
        else:
            show(console, report)


def _update(
    console: Console,
    name: str,
    files: list[str],
    engines: Sequence[Engine],
    asked: Engine | None,
    version: str | None,
    wait: float,
    timeout: float,
) -> UpdateReport:
    from datetime import timedelta

    from checkpoint_engine.engines import request_for_rank
    from checkpoint_engine.ps import ParameterServer

    rank, world_size = world(os.environ)
    leads = rank == 0
    with ParameterServer() as ps:
        with meter(console, f"register {name}, share of rank {rank}", show=leads) as bar:
            ps.register_checkpoint(name, files=files, stripe=True, progress=bar.reach)
        if asked is not None:
            if leads:
                line(console, f"wait for {', '.join(engine.endpoint for engine in engines)}")
            try:
                asked.wait_ready(wait)
            except DeadlineError as e:  # it answers, but takes no weights
                raise EngineUnreachableError(asked.endpoint, str(e)) from None
        ps.gather_metas(name)
        request = request_for_rank(engines, rank, world_size, version=version, seconds=timeout)
        limit = timedelta(seconds=timeout)
        with meter(console, f"update {name}", ps.get_metas().nbytes, show=leads) as bar:
            return ps.update(name, request, timeout=limit, version=version, progress=bar.advance)


def show(console: Console, report: UpdateReport) -> None:
    """Print a report: one row for each stage and one for the whole."""
    rows = [
        [stage, size(done.nbytes), f"{done.seconds:.3f} s", speed(done.nbytes, done.seconds)]
        for stage, done in report.stages.items()
    ]
    rows.append(["update", size(report.nbytes), f"{report.seconds:.3f} s", speed(report.nbytes, report.seconds)])
    title = f"{report.version} by {report.method}"
    table(console, title, ["stage", "bytes", "time", "speed"], rows, numbers=3)


def world(env: os._Environ[str] | dict[str, str]) -> tuple[int, int]:
    """(rank, world size) as torchrun gives them. Raises SettingsError when it did not."""
    try:
        return int(env["RANK"]), int(env["WORLD_SIZE"])
    except KeyError as e:
        raise SettingsError(f"{e.args[0]} is not set: start this command with torchrun") from None
    except ValueError as e:
        raise SettingsError(f"RANK and WORLD_SIZE must be whole numbers: {e}") from None


def check_ranks(endpoints: int, parallel_size: int, world_size: int) -> None:
    """Raises SettingsError unless every rank has an engine and every engine its ranks."""
    if endpoints * parallel_size != world_size:
        raise SettingsError(
            f"{endpoints} endpoint{'s' if endpoints != 1 else ''} of {parallel_size} rank{'s' if parallel_size != 1 else ''} "
            f"each make {endpoints * parallel_size} ranks, but torchrun started {world_size}"
        )
