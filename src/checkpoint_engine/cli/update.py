"""The command that updates engines from a checkpoint on disk; torchrun starts it on every rank."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from checkpoint_engine.cli import EXIT_ENGINE
from checkpoint_engine.cli.progress import line, meter
from checkpoint_engine.cli.report import show, write_trace
from checkpoint_engine.errors import CheckpointEngineError, ReplicaError, SettingsError

if TYPE_CHECKING:
    from checkpoint_engine.server import RolloutReport


Endpoints = Annotated[list[str], typer.Option(help="URL of an engine; repeat it for further replicas, in rank order.")]
Kind = Annotated[str, typer.Option(help="Kind of engine: sglang (and the embedded one), vllm, lmdeploy or tensorrt-llm.")]
Sockets = Annotated[list[str] | None, typer.Option(help="Unix socket of the endpoint in the same place, instead of its port.")]
Token = Annotated[str | None, typer.Option(envvar="CHECKPOINT_ENGINE_TOKEN", help="API key of the engines.")]
PauseMode = Annotated[
    Literal["keep", "wait", "abort"] | None, typer.Option(help="Pause engines; running requests are kept, waited for or aborted.")
]
ResumeDirty = Annotated[bool, typer.Option("--resume-dirty", help="After a failure also resume engines with mixed weights.")]
OnFailure = Annotated[
    Literal["abort", "continue"], typer.Option(help="When an engine fails: abort for all, or continue without it.")
]
Version = Annotated[str | None, typer.Option(help="Version that the engines report from then on.")]
Wait = Annotated[float, typer.Option(help="Seconds for an engine to become ready.", min=0.1)]
Timeout = Annotated[float, typer.Option(help="Seconds for the update, and for each call around it.", min=0.1)]
TraceFile = Annotated[
    Path | None, typer.Option("--trace", help="Write the update's timeline here: for ui.perfetto.dev, `trace summary`.")
]
Verify = Annotated[
    Literal["on", "off"] | None,
    typer.Option(help="Check in the engines that tensors are what was registered; by default on CPUs."),
]
ParallelSize = Annotated[int | None, typer.Option(help="Ranks that one engine spans (TP x PP); not with --url.", min=1)]
RestoreFrom = Annotated[Path | None, typer.Option(help="After a failure put this checkpoint back, which engines serve now.")]
Restore = Annotated[bool, typer.Option("--restore", help="With --url: after a failure put back what it committed last.")]
FleetUrl = Annotated[str | None, typer.Option(help="URL of a serving fleet, which is to do it with a registered checkpoint.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


def update(
    checkpoint: Annotated[str, typer.Option(help="Directory of safetensors files that every rank sees; with --url, a name.")],
    endpoint: Annotated[list[str] | None, typer.Option(help="URL of an engine; repeat it, in rank order.")] = None,
    inference_parallel_size: ParallelSize = None,
    engine: Kind = "sglang",
    uds: Sockets = None,
    token: Token = None,
    pause: PauseMode = None,
    resume_dirty: ResumeDirty = False,
    on_replica_failure: OnFailure = "abort",
    restore_from: RestoreFrom = None,
    restore: Restore = False,
    weight_version: Version = None,
    name: Annotated[str | None, typer.Option(help="Name of the checkpoint; its directory's name by default.")] = None,
    wait: Wait = 600.0,
    timeout: Timeout = 600.0,
    trace: TraceFile = None,
    url: FleetUrl = None,
    verify: Verify = None,
    json_output: AsJson = False,
) -> None:
    """Update running engines from a checkpoint on disk, or from a serving fleet's memory.

    torchrun --nproc-per-node N -m checkpoint_engine update --checkpoint DIR --endpoint URL --inference-parallel-size K
    checkpoint-engine update --url http://HOST:8600 --checkpoint NAME --endpoint URL

    Each rank holds its share of every layer in host memory. Endpoint i serves ranks i*K to (i+1)*K - 1, and the first of
    them asks it: wait until ready, pause, update, forget cached prefixes, publish the version, resume. After a failure
    engines with whole weights are resumed, and those with a mixture stay paused, unless --restore-from, which is held in host
    memory too, gives them whole ones (--restore with --url). With --on-replica-failure continue one engine is enough.
    """
    places = sockets(endpoint or [], uds)
    asked = _policy(pause, resume_dirty, on_replica_failure, wait, restore or restore_from is not None)
    if url is not None:
        not_with_url({"--inference-parallel-size": inference_parallel_size, "--name": name, "--restore-from": restore_from})
        from checkpoint_engine.cli.remote_update import remote_update

        engines = [{"kind": engine, "url": place, "uds": path, "token": token} for place, path in places]
        body = {"checkpoint": checkpoint, "engines": engines, "version": weight_version, "timeout": timeout, "verify": verify}
        remote_update(url, {**body, **asked}, trace, json_output=json_output)
        return
    if not places or inference_parallel_size is None or restore:
        raise typer.BadParameter("give --endpoint and --inference-parallel-size, or --url; --restore goes with --url only")
    rank, world_size = world(os.environ)
    check_ranks(len(places), inference_parallel_size, world_size)
    console = Console(file=sys.stderr if json_output else sys.stdout)
    clients = [(engine, place, path, token) for place, path in places]
    report = _update(console, Path(checkpoint), name, clients, asked, weight_version, timeout, verify, restore_from)
    if rank == 0:
        tell(console, report, trace, json_output=json_output)


def _policy(pause: str | None, resume_dirty: bool, on_replica_failure: str, wait: float, restore: bool) -> dict[str, Any]:
    """Arguments of Policy, which REST takes by the same names."""
    on_failure = "restore" if restore else "abort"
    words = {"pause": pause, "resume_dirty": resume_dirty, "on_replica_failure": on_replica_failure, "on_failure": on_failure}
    return {**words, "ready_seconds": wait}


def not_with_url(options: dict[str, object]) -> None:
    """Raises BadParameter for the first of them that was given."""
    if given := [option for option, value in options.items() if value is not None]:
        why = "a fleet has checkpoints and ranks of its own, and --restore puts back what it committed last"
        raise typer.BadParameter(f"{given[0]} does not go with --url: {why}")


@contextmanager
def notes(rank: int) -> Iterator[None]:
    """Prints the notes of an error: what is left to do. Another rank's engine is that rank's to speak of."""
    try:
        yield
    except CheckpointEngineError as e:
        for note in getattr(e, "__notes__", ()):
            typer.echo(f"checkpoint-engine: {note}", err=True)
        if isinstance(e, ReplicaError) and e.rank != rank:
            raise typer.Exit(EXIT_ENGINE) from None
        raise


def _update(
    console: Console,
    checkpoint: Path,
    name: str | None,
    clients: Sequence[tuple[str, str, str | None, str | None]],
    asked: dict[str, Any],
    version: str | None,
    timeout: float,
    verify: Literal["on", "off"] | None,
    previous: Path | None,
) -> RolloutReport:
    """clients: arguments of get_engine. asked: of Policy. previous: what engines serve now, to put back after a failure."""
    # Imported here, so that a mistake in the arguments is told at once.
    from checkpoint_engine.engines import Policy, get_engine
    from checkpoint_engine.memory.safetensors import checkpoint_files
    from checkpoint_engine.ps import ParameterServer

    rank, _ = world(os.environ)
    leads, name = rank == 0, name or checkpoint.resolve().name
    files = [str(file) for file in checkpoint_files(checkpoint)]
    with ExitStack() as stack, notes(rank):
        engines = [stack.enter_context(get_engine(*client)) for client in clients]
        policy = Policy(call_seconds=timeout, **asked)
        ps = stack.enter_context(ParameterServer())
        if previous is not None:
            former = previous.resolve().name if previous.resolve().name != name else f"{name} (previous)"
            with meter(console, f"register {former}, share of rank {rank}", show=leads) as bar:
                ps.register_checkpoint(former, files=checkpoint_files(previous), stripe=True, progress=bar.reach)
            ps.gather_metas(former)
            ps.declare_served(former)
        with meter(console, f"register {name}, share of rank {rank}", show=leads) as bar:
            ps.register_checkpoint(name, files=files, stripe=True, progress=bar.reach)
        ps.gather_metas(name)
        if leads:
            line(console, f"wait for {', '.join(engine.endpoint for engine in engines)}")
        limit = timedelta(seconds=timeout)
        with meter(console, f"update {name}", ps.get_metas().nbytes, show=leads) as bar:
            options: dict[str, Any] = {"timeout": limit, "version": version, "progress": bar.advance, "verify": verify}
            return ps.roll_out(name, engines=engines, policy=policy, **options)


def tell(console: Console, report: RolloutReport, trace: Path | None, *, json_output: bool) -> None:
    """Print the report, and write the timeline. Raises SettingsError when that cannot be done."""
    if json_output:
        print(json.dumps(report.to_dict()))
    else:
        show(console, report.to_dict())
    if trace is not None:
        from checkpoint_engine.timeline import to_chrome

        write_trace(trace, to_chrome(report.trace) if report.trace.ranks else None)


def sockets(endpoints: Sequence[str], paths: Sequence[str] | None) -> list[tuple[str, str | None]]:
    """(URL, Unix socket or None) of each endpoint. Raises SettingsError unless each or none has one."""
    if not paths:
        return [(url, None) for url in endpoints]
    if len(paths) != len(endpoints):
        raise SettingsError(f"{len(endpoints)} endpoints and {len(paths)} Unix sockets: give each endpoint one, or none any")
    return list(zip(endpoints, paths, strict=True))


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
