"""`checkpoint-engine probe`: this host's ceilings as a table or JSON."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from checkpoint_engine.devices.probe import MIB, Ceilings
from checkpoint_engine.devices.probe import probe as measure


def table(found: Ceilings) -> Table:
    """One row per measurement, one column per device; rates in GB/s (10^9 bytes)."""
    result = Table(title=f"{found.host}: {len(found.names)} x {found.names[0]}, torch {found.torch}", caption="GB/s")
    result.add_column("what")
    for rank in range(len(found.names)):
        result.add_column(f"{found.device}:{rank}", justify="right")

    def row(what: str, rates: tuple[float, ...]) -> None:
        if rates:
            result.add_row(what, *(f"{rate / 1e9:.1f}" for rate in rates))

    row("host memcpy, one thread", (found.memcpy,))
    row("registering host memory", found.register)
    row("host to device, alone", found.h2d_alone)
    row("host to device, all at once", found.h2d_together)
    row("device copy", found.device_copy)
    row("copy into the next device, all at once", found.peer_copy)
    for entry in found.broadcast:
        row(f"{found.backend} broadcast of {entry.nbytes / MIB:g} MiB", (entry.rate,))
    if found.communicator_bytes:
        result.add_row("memory held by the communicator", f"{found.communicator_bytes / MIB:.0f} MiB")
    return result


def probe(
    json: Annotated[bool, typer.Option("--json", help="Print JSON, rates in bytes per second.")] = False,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: cuda where there is one.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per GPU, two on a CPU.")] = None,
    size: Annotated[list[float] | None, typer.Option(help="Broadcast size in MiB; may be repeated.")] = None,
    region: Annotated[float | None, typer.Option(help="Host memory per process in MiB.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="For each kind of copy and device.")] = 0.5,
    timeout: Annotated[float, typer.Option(min=1.0, help="Give up after so many seconds.")] = 120.0,
) -> None:
    """Measure what this host can do at best: host to device, broadcast, device copy, memcpy."""
    found = measure(
        device,
        ranks=ranks,
        sizes=tuple(int(s * MIB) for s in size) if size else None,
        region_bytes=int(region * MIB) if region else None,
        seconds=seconds,
        timeout=timeout,
    )
    if json:
        typer.echo(found.to_json().decode())
    else:
        Console().print(table(found))
