"""The commands around timelines of updates: get one from a serving fleet, and tell what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from checkpoint_engine.cli.fleet_client import DEFAULT_URL, FleetClient, Socket, TokenFile, Url, read_token
from checkpoint_engine.cli.progress import line, size, table
from checkpoint_engine.cli.report import write_trace
from checkpoint_engine.cli.update import notes
from checkpoint_engine.errors import SettingsError

if TYPE_CHECKING:
    from checkpoint_engine.timeline import Summary

trace = typer.Typer(no_args_is_help=True, help="Timelines of updates: get one from a serving fleet, tell what bounds the update.")


@trace.command()
def summary(
    file: Annotated[Path, typer.Argument(help="What `update --trace`, `join --trace` or `trace get` wrote.")],
    ceilings: Annotated[Path | None, typer.Option(help="What `probe --json` found on this host, to compare with.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON; bytes and seconds.")] = False,
) -> None:
    """Show each stage's time at work, what overlapped it, its rate, and what bounds the update."""
    from checkpoint_engine.timeline import from_chrome, summarise

    try:
        found = from_chrome(file.read_bytes())
    except OSError as e:
        raise SettingsError(f"{file}: {e.strerror}") from None
    except SettingsError as e:
        raise SettingsError(f"{file}: {e}") from None
    rates: dict[str, float] = {}
    if ceilings is not None:
        from checkpoint_engine.http.ceilings import read_ceilings

        rates = read_ceilings(ceilings)
    told = summarise(found, rates)
    if json_output:
        print(json.dumps(told.to_dict()))
    else:
        show(Console(), told)


@trace.command()
def get(
    update: Annotated[str | None, typer.Argument(help="Id of an update; by default the last one that has a timeline.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write; update-ID.trace.json by default.")] = None,
    url: Url = DEFAULT_URL,
    uds: Socket = None,
    token_file: TokenFile = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Get an update's timeline from a serving fleet, as a file for ui.perfetto.dev or `trace summary`."""
    with notes(0), FleetClient(url, uds, read_token(token_file)) as fleet:
        if update is None:
            update = next((u["id"] for u in fleet.get("/v1/updates") if u["timeline"]), None)
        if update is None:
            raise SettingsError("no update has a timeline")
        data = fleet.download(f"/v1/updates/{update}/trace")
    place = output or Path(f"update-{update}.trace.json")
    write_trace(place, data)
    if json_output:
        print(json.dumps({"update": update, "file": str(place)}))
    else:
        line(Console(), f"wrote {place}: open it at https://ui.perfetto.dev, or with `checkpoint-engine trace summary {place}`")


def show(console: Console, found: Summary) -> None:
    """Print a summary: one row for each stage, then what bounds the update."""
    rows = []
    for stage in found.stages:
        others = sorted(((seconds, other) for other, seconds in stage.overlap.items() if seconds > 0), reverse=True)
        rows.append(
            [
                stage.stage,
                f"{stage.busy:.4f} s",
                f"{stage.busy / found.seconds:.0%}" if found.seconds else "-",
                f"{stage.alone:.4f} s",
                ", ".join(f"{other} {seconds / stage.busy:.0%}" for seconds, other in others[:3]) or "-",
                size(stage.nbytes) if stage.nbytes else "-",
                f"{stage.gb_per_s:.2f} GB/s" if stage.nbytes else "-",
                "-" if stage.of_ceiling is None else f"{stage.of_ceiling:.0%}",
                str(stage.rank),
            ]
        )
    title = f"{found.version} by {found.method}: {size(found.nbytes)} on {found.ranks} ranks in {found.seconds:.3f} s"
    columns = ["stage", "at work", "of update", "alone", "beside", "bytes", "rate", "of ceiling", "rank"]
    table(console, title, columns, rows, numbers=0)
    line(console, found.bound)
    if found.merged:
        line(console, f"{found.merged} spans stand for several buckets each: pauses between these count as work")
