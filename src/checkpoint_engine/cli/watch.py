"""The command that follows an update of a serving fleet to its end."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from checkpoint_engine.cli import EXIT_OK, EXIT_UPDATE
from checkpoint_engine.cli.fleet_client import DEFAULT_URL, FleetClient, Socket, TokenFile, Url, problem_code, read_token
from checkpoint_engine.cli.progress import meter
from checkpoint_engine.cli.report import show
from checkpoint_engine.cli.update import notes
from checkpoint_engine.errors import PeerLostError, SettingsError

RUNNING = ("starting", "updating")


def watch(
    update: Annotated[str | None, typer.Argument(help="Id of an update; by default the one that runs.")] = None,
    next_one: Annotated[bool, typer.Option("--next", help="Where none runs, wait for the next one to begin.")] = False,
    url: Url = DEFAULT_URL,
    uds: Socket = None,
    token_file: TokenFile = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print a line of JSON whenever something changed.")] = False,
) -> None:
    """Follow the update that runs, live. Ends with it, and with the exit code that `update` itself would have had."""
    console = Console(file=sys.stderr if json_output else sys.stdout)
    with notes(0), FleetClient(url, uds, read_token(token_file)) as fleet:
        record = follow(fleet, update or find_running(fleet, next_one), console, lines=json_output)
    if record["report"] and not json_output:
        show(console, record["report"])
    if code := verdict(record):
        raise typer.Exit(code)


def find_running(fleet: FleetClient, wait: bool) -> str:
    """Its id. Raises SettingsError when none runs, unless one is to be waited for."""
    if wait:
        for kind, data in fleet.events("/v1/events"):
            if kind == "fleet" and data["running"] is not None:
                return str(data["running"]["id"])
        raise PeerLostError(fleet.name, "it ended its events")
    running = fleet.get("/v1/fleet")["running"]
    if running is None:
        raise SettingsError("no update is running: name one that is over, or wait with --next")
    return str(running["id"])


def follow(fleet: FleetClient, id_: str, console: Console, *, lines: bool = False) -> dict[str, Any]:
    """The record of the update when it is over; meanwhile its progress on the console. lines: each record as JSON instead.
    Raises PeerLostError when the server goes first."""
    record: dict[str, Any] = {}
    with meter(console, f"update {id_}", show=console.is_terminal and not lines) as bar:  # its time here says nothing
        for kind, record in fleet.events(f"/v1/updates/{id_}/events"):
            if kind != "update":
                continue
            if lines:
                print(json.dumps(record), flush=True)
            over = record["state"] not in RUNNING
            done = record["nbytes"] if over and record["report"] else min(record["done"], default=0)  # of the slowest rank
            bar.reach(done, record["nbytes"])
            if over:
                return record
    raise PeerLostError(fleet.name, f"update {id_} was {record.get('state', 'not known')} as far as it said")


def verdict(record: dict[str, Any]) -> int:
    """The exit code of an update that is over; what went wrong goes to stderr."""
    if (error := record["error"]) is None:
        return EXIT_OK
    for said in (f"update {record['id']} {record['state']}: {error['message']}", *error["notes"]):
        typer.echo(f"checkpoint-engine: {' '.join(said.split())}", err=True)
    return EXIT_UPDATE if record["state"] == "cancelled" else problem_code(error)
