"""The command that tells how a serving fleet is: ranks, checkpoints, versions, and what runs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from checkpoint_engine.cli import EXIT_OK, EXIT_PEER, EXIT_UPDATE
from checkpoint_engine.cli.fleet_client import DEFAULT_URL, FleetClient, Socket, TokenFile, Url, read_token
from checkpoint_engine.cli.progress import line, size, table
from checkpoint_engine.cli.update import notes


def status(
    url: Url = DEFAULT_URL,
    uds: Socket = None,
    token_file: TokenFile = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a serving fleet: its ranks, their workers' versions, the engines, checkpoints, and the update that runs.

    Exit code 4: a rank is missing or does not answer; 1: a worker or an engine holds a mixture of weights.
    """
    with notes(0), FleetClient(url, uds, read_token(token_file)) as fleet:
        engines = fleet.get("/v1/weights")["engines"]
        told = {
            "fleet": fleet.get("/v1/fleet"),
            "checkpoints": fleet.get("/v1/checkpoints"),
            "engines": engines,
            "last": next((u for u in fleet.get("/v1/updates") if u["state"] not in ("starting", "updating")), None),
        }
    if json_output:
        print(json.dumps(told))
    else:
        show(Console(), told)
    if code := health(told):
        raise typer.Exit(code)


def health(told: dict[str, Any]) -> int:
    """The exit code that stands for it."""
    fleet = told["fleet"]
    if not fleet["met"] or any(rank["error"] for rank in fleet["ranks"]):
        return EXIT_PEER
    dirty = [rank["state"]["dirty"] for rank in fleet["ranks"] if rank["state"]] + [e["dirty"] for e in told["engines"]]
    return EXIT_UPDATE if any(dirty) else EXIT_OK


def show(console: Console, told: dict[str, Any]) -> None:
    """Print what `status` found as tables."""
    fleet = told["fleet"]
    line(console, f"{fleet['world_size']} ranks; server {fleet['server_version']}")
    if fleet["error"]:
        line(console, f"not complete: {fleet['error']}")
    table(console, "ranks", ["rank", "host", "version", "state", "held"], [_rank(rank) for rank in fleet["ranks"]], numbers=1)
    if told["engines"]:
        rows = [[e["endpoint"], e["version"] or "-", _weights(e["dirty"], e["error"])] for e in told["engines"]]
        table(console, "engines", ["endpoint", "version", "state"], rows, numbers=0)
    if told["checkpoints"]:
        held = [[c["name"], c["version"] or "-", str(c["tensors"]), size(c["nbytes"])] for c in told["checkpoints"]]
        table(console, "checkpoints", ["name", "version", "tensors", "bytes"], held, numbers=2)
    if running := fleet["running"]:
        done = f"{size(min(running['done'], default=0))} of {size(running['nbytes'])}"
        line(
            console,
            f"update {running['id']} of {running['checkpoint']} is {running['state']}: {done}, {running['seconds']:.1f} s",
        )
    elif last := told["last"]:
        error = f": {last['error']['message']}" if last["error"] else ""
        line(console, f"last update {last['id']} of {last['checkpoint']}: {last['state']} in {last['seconds']:.2f} s{error}")


def _rank(rank: dict[str, Any]) -> list[str]:
    state = rank["state"]
    if state is None:
        return [str(rank["rank"]), rank["host"], "-", rank["error"] or "-", "-"]
    held = size(sum(c["nbytes"] for c in state["server"]["checkpoints"]))
    return [str(rank["rank"]), rank["host"], state["version"] or "-", _weights(state["dirty"], rank["error"]), held]


def _weights(dirty: bool | None, error: str | None) -> str:
    """dirty None: no update has told."""
    return error or {None: "-", False: "whole", True: "dirty"}[dirty]
