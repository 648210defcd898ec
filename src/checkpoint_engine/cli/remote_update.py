"""An update that a serving fleet makes: started by REST, followed to its end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from checkpoint_engine.cli.fleet_client import FleetClient, read_token
from checkpoint_engine.cli.report import show, write_trace
from checkpoint_engine.cli.update import notes
from checkpoint_engine.cli.watch import follow, verdict


def remote_update(url: str, body: dict[str, Any], trace: Path | None, *, json_output: bool) -> None:
    """body: of POST /v1/updates. trace: the file for its timeline. Ends with the exit code that stands for how it ended."""
    console = Console(file=sys.stderr if json_output else sys.stdout)
    with notes(0), FleetClient(url, None, read_token(None)) as fleet:
        begun = fleet.post("/v1/updates", body)
        record = follow(fleet, begun["id"], console)
        if record["report"] and json_output:
            print(json.dumps(record["report"]))
        elif record["report"]:
            show(console, record["report"])
        if trace is not None and record["report"]:
            write_trace(trace, fleet.download(f"/v1/updates/{begun['id']}/trace") if record["timeline"] else None)
    if code := verdict(record):
        raise typer.Exit(code)
