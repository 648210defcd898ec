"""A host's measured ceilings, stage by stage: what `checkpoint-engine probe --json` found, as the dashboard needs it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from checkpoint_engine.devices.probe import Ceilings
from checkpoint_engine.errors import NOT_DECODED, SettingsError


def read_ceilings(path: Path) -> dict[str, float]:
    """Stage -> bytes per second. Raises SettingsError when the file is not what `probe --json` printed."""
    try:
        return stage_ceilings(msgspec.json.decode(path.read_bytes(), type=Ceilings))
    except (OSError, *NOT_DECODED) as e:
        raise SettingsError(f"{path} is not what `checkpoint-engine probe --json` prints: {e}") from None


def stage_ceilings(found: Ceilings) -> dict[str, float]:
    """Of the slowest device: lift by the copy from the host with all at once, share by the fastest broadcast, load by the
    copy within a device; peer_copy, which is what sharing by copies is measured by. On a CPU all copies are its memcpy."""
    rates = {
        "lift": min(found.h2d_together or found.h2d_alone, default=found.memcpy),
        "load": min(found.device_copy, default=found.memcpy),
    }
    if found.peer_copy or found.device == "cpu":
        rates["peer_copy"] = min(found.peer_copy, default=found.memcpy)
    if found.broadcast:
        rates["share"] = max(entry.rate for entry in found.broadcast)
    return rates
