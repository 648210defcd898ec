"""The command that runs a parameter server with REST and dashboard; torchrun starts it on every rank."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from checkpoint_engine.cli.report import announce
from checkpoint_engine.errors import SettingsError


def serve(
    host: Annotated[str, typer.Option(help="Address that rank 0 listens on; any but loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port that rank 0 listens on; 0: any.", min=0, max=65535)] = 8600,
    uds: Annotated[str | None, typer.Option(help="Unix socket that every rank listens on instead; {rank} is replaced.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token that callers must say; else CHECKPOINT_ENGINE_SERVE_TOKEN.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Say where it listens as a line of JSON.")] = False,
    endpoint: Annotated[list[str] | None, typer.Option(help="URL of an engine, for updates that name none; repeatable.")] = None,
    engine: Annotated[str, typer.Option(help="Kind of these engines: sglang, vllm, lmdeploy or tensorrt-llm.")] = "sglang",
    ceilings: Annotated[
        Path | None, typer.Option(help="What `probe --json` printed on this host, for the dashboard to compare with.")
    ] = None,
) -> None:
    """Serve REST, metrics and a dashboard for a fleet of parameter servers.

    torchrun --nproc-per-node N -m checkpoint_engine serve

    Rank 0 prints "listening on URL" and speaks for all ranks. Ends on SIGTERM or Ctrl-C; an update that runs is cancelled.
    """
    # Imported here, so that the other commands do not pay for torch and the web framework.
    try:
        from checkpoint_engine.http.commands import EngineSpec
        from checkpoint_engine.http.serve import Options, run
    except ModuleNotFoundError as e:
        raise SettingsError(f"serve needs {e.name}: pip install 'ckpt-engine[server]'") from None
    from checkpoint_engine.http.ceilings import read_ceilings
    from checkpoint_engine.http.guard import read_token
    from checkpoint_engine.ps import ParameterServer
    from checkpoint_engine.settings import Settings

    settings = Settings.from_environment()
    engine_token = os.environ.get("CHECKPOINT_ENGINE_TOKEN")
    options = Options(
        host=host,
        port=port,
        uds=uds,
        token=read_token(token_file),
        ceilings=read_ceilings(ceilings) if ceilings is not None else {},
        engines=[EngineSpec(engine, url, token=engine_token) for url in endpoint or ()],
    )
    alone = "RANK" not in os.environ
    with ParameterServer(settings=settings, rank=0 if alone else None, world_size=1 if alone else None) as ps:
        run(ps, settings, options, partial(announce, json_output=json_output))
