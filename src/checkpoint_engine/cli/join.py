"""The command by which new engines get their weights from the servers of a world that is running already."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

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
from checkpoint_engine.errors import CheckpointNotFoundError, DeadlineError, ManifestError, PeerLostError, SettingsError

if TYPE_CHECKING:
    from checkpoint_engine.engines import Engine, Policy
    from checkpoint_engine.ps import ParameterServer
    from checkpoint_engine.server import RolloutReport
    from checkpoint_engine.server.sources import Metas

STORE = "store://"
SERVE_TOKEN = "CHECKPOINT_ENGINE_SERVE_TOKEN"
CALL_SECONDS = 60.0

From = Annotated[
    str, typer.Option("--from", help="URL of a server of the running world, a file of its metas, or store://HOST:PORT/KEY.")
]
Avoid = Annotated[
    list[int] | None, typer.Option(help="Rank of the metas that is not to be read; repeatable. Errors name ranks by them.")
]
Serve = Annotated[
    bool, typer.Option("--serve", help="Keep the weights in host memory, for later joiners to read, until SIGTERM.")
]


def join(
    source: From,
    endpoint: Endpoints,
    inference_parallel_size: Annotated[int, typer.Option(help="Ranks that one engine spans (TP x PP).", min=1)] = 1,
    name: Annotated[str | None, typer.Option(help="Name of the checkpoint; by default what was gathered last there.")] = None,
    avoid: Avoid = None,
    engine: Kind = "sglang",
    uds: Sockets = None,
    token: Token = None,
    pause: PauseMode = None,
    resume_dirty: ResumeDirty = False,
    on_replica_failure: OnFailure = "abort",
    weight_version: Version = None,
    wait: Wait = 600.0,
    timeout: Timeout = 600.0,
    serve: Serve = False,
    trace: TraceFile = None,
    json_output: AsJson = False,
) -> None:
    """Update new engines with the weights that a running world's servers hold in host memory.

    checkpoint-engine join --from http://HOST:8600 --endpoint URL

    The servers that are read, and their engines, do nothing for it. One rank needs no launcher; more are started by torchrun,
    and share what each of them reads. A guarded server's token is taken from CHECKPOINT_ENGINE_SERVE_TOKEN. With --serve the
    server at that URL tells later joiners of this one, for as long as it lives.
    """
    alone = "RANK" not in os.environ and "WORLD_SIZE" not in os.environ
    rank, world_size = (0, 1) if alone else world(os.environ)
    check_ranks(len(endpoint), inference_parallel_size, world_size)
    console = Console(file=sys.stderr if json_output else sys.stdout)

    # Imported here, so that a mistake in the arguments is told at once.
    from checkpoint_engine.engines import Policy, get_engine
    from checkpoint_engine.server.holders import without

    if serve and not is_url(source):
        raise SettingsError("--serve needs --from URL: files and stores tell nobody of this one")
    metas = read_metas(source, name)
    asked: dict[str, Any] = {"pause": pause, "resume_dirty": resume_dirty, "on_replica_failure": on_replica_failure}
    policy = Policy(**asked, ready_seconds=wait, call_seconds=timeout)
    with ExitStack() as stack, notes(rank):
        engines = [stack.enter_context(get_engine(engine, url, path, token)) for url, path in sockets(endpoint, uds)]
        ps = stack.enter_context(_server(source, rank, world_size))
        metas = without(_same_for_all(ps, metas), avoid or ())
        report = _join(console, ps, metas, engines, policy, weight_version, timeout, keep=serve)
        if rank == 0:
            tell(console, report, trace, json_output=json_output)
        if serve:
            _serve(console, ps, metas.checkpoint, source)


def _server(source: str, rank: int, world_size: int) -> ParameterServer:
    """One that peers can read where the world that is joined can reach it."""
    from checkpoint_engine.ps import ParameterServer
    from checkpoint_engine.settings import Settings

    settings = Settings.from_environment()
    if is_url(source) and not settings.peer_hosts:
        settings = settings.replace(peer_hosts=_address_towards(source))
    return ParameterServer(rank=rank, world_size=world_size, settings=settings)


def _same_for_all(ps: ParameterServer, metas: Metas) -> Metas:
    """Rank 0's: what the others read a moment later may list other holders."""
    import msgspec

    from checkpoint_engine.server.sources import Metas

    if ps.world_size == 1:
        return metas
    mine = msgspec.msgpack.encode(metas) if ps.rank == 0 else b""
    return msgspec.msgpack.decode(ps.watch.introduce(mine, CALL_SECONDS)[0], type=Metas)


def _join(
    console: Console,
    ps: ParameterServer,
    metas: Metas,
    engines: Sequence[Engine],
    policy: Policy,
    version: str | None,
    timeout: float,
    *,
    keep: bool,
) -> RolloutReport:
    name, limit = metas.checkpoint, timedelta(seconds=timeout)
    ps.load_metas(metas)
    if ps.rank == 0:
        line(console, f"wait for {', '.join(engine.endpoint for engine in engines)}")
    with meter(console, f"join {name}", metas.distinct_bytes, show=ps.rank == 0) as bar:
        progress = bar.advance
        return ps.roll_out(
            name, engines=engines, policy=policy, version=version, timeout=limit, progress=progress, read=True, keep=keep
        )


def _serve(console: Console, ps: ParameterServer, name: str, url: str) -> None:
    """Until SIGTERM, which ends the process."""
    from checkpoint_engine.http.announce import Announcer

    ps.gather_metas(name)
    if ps.rank != 0:
        threading.Event().wait()
    with Announcer(url, os.environ.get(SERVE_TOKEN), ps.get_metas(), lambda words: line(console, f"serve {name}: {words}")):
        threading.Event().wait()


def _address_towards(url: str) -> str:
    """This host's own address, by which it reaches the server at `url`. Raises SettingsError when it does not."""
    parts = urlsplit(url)
    try:
        family, _, _, _, address = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as towards:
            towards.connect(address)  # sends nothing
            return str(towards.getsockname()[0])
    except (OSError, ValueError) as e:
        raise SettingsError(f"{url}: {e}") from e


def is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def read_metas(source: str, name: str | None = None) -> Metas:
    """From a server's URL, a file, or a TCP store of torch's. name: of the checkpoint that they must be of.

    Raises SettingsError for what cannot be read, PeerLostError for a server or store that does not answer, DeadlineError for a
    key that nobody sets, CheckpointNotFoundError, ManifestError.
    """
    import msgspec

    from checkpoint_engine.server.sources import Metas

    read = _look_up if source.startswith(STORE) else _read
    data = _download(source, name) if is_url(source) else read(source)
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


def _look_up(source: str) -> bytes:
    """What somebody has set, or sets within CALL_SECONDS."""
    import torch.distributed as dist

    parts = urlsplit(source)
    key, limit = parts.path.removeprefix("/"), timedelta(seconds=CALL_SECONDS)
    try:
        host, port = parts.hostname, parts.port
    except ValueError as e:
        raise SettingsError(f"{source}: {e}") from e
    if not host or not port or not key:
        raise SettingsError(f"{source} is not store://HOST:PORT/KEY")
    try:
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)  # type: ignore[attr-defined]
    except RuntimeError as e:
        raise PeerLostError(f"the store at {host}:{port}", str(e).splitlines()[0]) from e
    try:
        data: bytes = store.get(key)
    except RuntimeError as e:
        raise DeadlineError(f"{key!r} to be set in the store at {host}:{port}", CALL_SECONDS) from e
    return data


def _download(url: str, name: str | None) -> bytes:
    import httpx

    from checkpoint_engine.engines.http import bearer

    headers = bearer(os.environ.get(SERVE_TOKEN))
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
