"""The command that brings a checkpoint into the host memory of a serving fleet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from checkpoint_engine.cli.fleet_client import DEFAULT_URL, FleetClient, Socket, TokenFile, Url, read_token
from checkpoint_engine.cli.progress import line, size
from checkpoint_engine.cli.update import notes


def register(
    directory: Annotated[Path, typer.Argument(help="Directory of safetensors files; every rank must see it under this path.")],
    name: Annotated[str | None, typer.Option(help="Name of the checkpoint; its directory's name by default.")] = None,
    url: Url = DEFAULT_URL,
    uds: Socket = None,
    token_file: TokenFile = None,
    timeout: Annotated[float, typer.Option(help="Seconds for all ranks to read their shares.", min=0.1)] = 3600.0,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Bring a checkpoint into the host memory of a serving fleet, each rank its share of every layer; of none if one fails."""
    place = directory.absolute()
    with notes(0), FleetClient(url, uds, read_token(token_file)) as fleet:
        body = {"name": name or place.name, "directory": str(place)}
        held = fleet.post("/v1/checkpoints", body, timeout)
    if json_output:
        print(json.dumps(held))
    else:
        where = f"{held['tensors']} tensors, {size(held['nbytes'])}, on {len(held['parts'])} ranks"
        line(Console(), f"registered {held['name']}: {where}; version {held['version']}")
