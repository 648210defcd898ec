"""The demo: real weights move from disk into two running engines, or out of two servers' memory into a third, under load."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer


def demo(
    checkpoint: Annotated[Path | None, typer.Option(help="Hugging Face directory; all-MiniLM-L6-v2 by default.")] = None,
    method: Annotated[
        Literal["broadcast", "p2p"], typer.Option(help="broadcast: update both engines, twice; p2p: a third one joins the two.")
    ] = "broadcast",
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds for each step, at most.", min=1)] = 120.0,
) -> None:
    """Update two running engines from a checkpoint on disk, twice, while a client keeps asking both.

    With --method p2p a third engine joins the two: it reads the weights out of the host memory of their servers.
    Needs no GPU. Exit code 0 only if every parameter in both engines equals the checkpoint bit for bit, their answers equal
    those that transformers gives with the checkpoint, and no request failed.
    """
    from rich.console import Console

    from checkpoint_engine.cli.demo.checkpoint import default_checkpoint
    from checkpoint_engine.cli.demo.run import run
    from checkpoint_engine.cli.demo.show import show

    console = Console(file=sys.stderr if json_output else sys.stdout)
    result = run(checkpoint or default_checkpoint(), timeout, console, method)
    if json_output:
        print(json.dumps(result))
    else:
        show(result, console)
    if not result["ok"]:
        raise typer.Exit(1)
