"""The command by which new engines get their weights from the servers of a world that is running already."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from checkpoint_engine.cli.progress import line, meter
from checkpoint_engine.cli.update import (
    AsJson,
    Endpoints,
    Kind,
    OnFailure,
    PauseMode,
    ResumeDirty,
    Sockets,
    Timeout,
    Token,
    TraceFile,
    Version,
    Wait,
    check_ranks,
    notes,
    sockets,
    tell,
    world,
)
from checkpoint_engine.errors import CheckpointNotFoundError, ManifestError, PeerLostError, SettingsError

if TYPE_CHECKING:
    from checkpoint_engine.engines import Engine, Policy
    from checkpoint_engine.server import RolloutReport
    from checkpoint_engine.server.sources import Metas

SERVE_TOKEN = "CHECKPOINT_ENGINE_SERVE_TOKEN"
CALL_SECONDS = 60.0


def join(
    source: Annotated[str, typer.Option("--from", help="URL of a server of the running world, or a JSON file of its metas.")],
    endpoint: Endpoints,
    inference_parallel_size: Annotated[int, typer.Option(help="Ranks that one engine spans (TP x PP).", min=1)] = 1,
    name: Annotated[str | None, typer.Option(help="Name of the checkpoint; by default what was gathered last there.")] = None,
    engine: Kind = "sglang",
    uds: Sockets = None,
    token: Token = None,
    pause: PauseMode = None,
    resume_dirty: ResumeDirty = False,
    on_replica_failure: OnFailure = "abort",
    weight_version: Version = None,
    wait: Wait = 600.0,
    timeout: Timeout = 600.0,
    trace: TraceFile = None,
    json_output: AsJson = False,
) -> None:
    """Update new engines with the weights that a running world's servers hold in host memory.

    checkpoint-engine join --from http://HOST:8600 --endpoint URL

    The servers that are read, and their engines, do nothing for it. One rank needs no launcher; more are started by torchrun,
    and share what each of them reads. A guarded server's token is taken from CHECKPOINT_ENGINE_SERVE_TOKEN.
    """
    alone = "RANK" not in os.environ and "WORLD_SIZE" not in os.environ
    rank, world_size = (0, 1) if alone else world(os.environ)
    check_ranks(len(endpoint), inference_parallel_size, world_size)
    console = Console(file=sys.stderr if json_output else sys.stdout)

    # Imported here, so that a mistake in the arguments is told at once.
    from checkpoint_engine.engines import Policy, get_engine

    metas = read_metas(source, name)
    policy = Policy(
        pause=pause,
        resume_dirty=resume_dirty,
        on_replica_failure=on_replica_failure,
        ready_seconds=wait,
        call_seconds=timeout,
    )
    with ExitStack() as stack, notes(rank):
        engines = [stack.enter_context(get_engine(engine, url, path, token)) for url, path in sockets(endpoint, uds)]
        report = _join(console, rank, world_size, metas, engines, policy, weight_version, timeout)
    if rank == 0:
        tell(console, report, trace, json_output=json_output)


def _join(
    console: Console,
    rank: int,
    world_size: int,
    metas: Metas,
    engines: Sequence[Engine],
    policy: Policy,
    version: str | None,
    timeout: float,
) -> RolloutReport:
    from checkpoint_engine.ps import ParameterServer

    name, limit = metas.checkpoint, timedelta(seconds=timeout)
    with ParameterServer(rank=rank, world_size=world_size) as ps:
        ps.load_metas(metas)
        if rank == 0:
            line(console, f"wait for {', '.join(engine.endpoint for engine in engines)}")
        with meter(console, f"join {name}", metas.nbytes, show=rank == 0) as bar:
            return ps.roll_out(
                name, engines=engines, policy=policy, version=version, timeout=limit, progress=bar.advance, read=True
            )


def read_metas(source: str, name: str | None = None) -> Metas:
    """From a server's URL, or a file. name: of the checkpoint that they must be of.

    Raises SettingsError for what cannot be read, PeerLostError for a server that does not answer, CheckpointNotFoundError,
    ManifestError.
    """
    import msgspec

    from checkpoint_engine.server.sources import Metas

    data = _download(source, name) if source.startswith(("http://", "https://")) else _read(source)
    try:
        metas = Metas.from_json(data)
    except (msgspec.ValidationError, msgspec.DecodeError) as e:
        raise ManifestError(f"{source} has no metas: {e}") from e
    if name is not None and metas.checkpoint != name:
        raise CheckpointNotFoundError(name, f"in {source}, which has {metas.checkpoint!r}")
    return metas


def _read(source: str) -> bytes:
    try:
        return Path(source).read_bytes()
    except OSError as e:
        raise SettingsError(f"{source}: {e.strerror}") from e


def _download(url: str, name: str | None) -> bytes:
    import httpx

    token = os.environ.get(SERVE_TOKEN)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    params = {} if name is None else {"checkpoint": name}
    try:
        answer = httpx.get(
            f"{url.rstrip('/')}/v1/manifest", params=params, headers=headers, timeout=CALL_SECONDS, trust_env=False
        )
    except httpx.InvalidURL as e:
        raise SettingsError(f"{url}: {e}") from e
    except httpx.HTTPError as e:
        raise PeerLostError(f"the server at {url}", str(e) or type(e).__name__) from e
    if answer.status_code == 404:
        raise CheckpointNotFoundError(name or "", f"at {url}")
    if answer.status_code != 200:
        hint = f" (set {SERVE_TOKEN})" if answer.status_code in (401, 403) else ""
        raise SettingsError(f"{url} answered {answer.status_code}{hint}: {answer.text[:200]}")
    return answer.content
