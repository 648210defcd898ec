"""What several commands tell: the report of an update, whoever made it (this process, or a server that sent it as JSON), its
timeline, and where they listen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from checkpoint_engine.cli.progress import line, size, speed, table
from checkpoint_engine.errors import SettingsError


def announce(url: str, *, json_output: bool) -> None:
    """What a command says once it accepts requests."""
    print(json.dumps({"url": url, "pid": os.getpid()}) if json_output else f"listening on {url}", flush=True)


def write_trace(file: Path, data: bytes | None) -> None:
    """Raises SettingsError when it cannot be written, or (None) there is none."""
    if data is None:
        raise SettingsError(f"{file} was not written: the update has no timeline (CHECKPOINT_ENGINE_TIMELINES=0)")
    try:
        file.write_bytes(data)
    except OSError as e:
        raise SettingsError(f"{file} cannot be written: {e.strerror}") from None


def show(console: Console, report: dict[str, Any]) -> None:
    """report: of UpdateReport.to_dict or RolloutReport.to_dict. One row for each stage and one for the whole; then the engines'
    pause, and those left out."""
    stages = {**report["stages"], "update": report}
    rows = [
        [stage, size(done["nbytes"]), f"{done['seconds']:.3f} s", speed(done["nbytes"], done["seconds"])]
        for stage, done in stages.items()
    ]
    title = f"{report['version']} by {report['method']}"
    table(console, title, ["stage", "bytes", "time", "speed"], rows, numbers=3)
    if unsent := report.get("unsent"):
        line(console, f"{size(unsent)} were not sent to ranks whose load plans need nothing of them")
    if (pause := report.get("pause_ms")) is not None:
        line(console, f"engines were paused for {pause:.0f} ms at most")
    for replica in report.get("replicas", ()):
        if replica["error"]:
            line(console, f"not updated: engine at {replica['endpoint']}: {replica['error']}")
