"""Which RDMA adapters a process uses: the variables that say so, what the host has, and how processes share them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from checkpoint_engine.errors import SettingsError

log = logging.getLogger(__name__)

OURS, NCCL = "PS_P2P_STORE_RDMA_DEVICES", "NCCL_IB_HCA"
SYSFS = Path("/sys/class/infiniband")
ACTIVE = "4: ACTIVE"


def devices_for(local_rank: int, local_ranks: int, env: Mapping[str, str] | None = None, root: Path = SYSFS) -> tuple[str, ...]:
    """The adapters of the process `local_rank` of `local_ranks` on this host; empty when the host has none.

    PS_P2P_STORE_RDMA_DEVICES names those to use, of all processes; else NCCL_IB_HCA chooses among those that the host has; else
    it is all of them. Adapters without an active port are left out, with a warning. root: where the kernel lists them.

    Raises SettingsError when a variable names an adapter that the host does not have, or nothing usable is left of what a
    variable chose.
    """
    env = os.environ if env is None else env
    there = list_devices(root)
    if text := env.get(OURS, "").strip():
        variable, chosen = OURS, _named(text, there)
    elif text := env.get(NCCL, "").strip():
        variable, chosen = NCCL, match_nccl(text, there)
    else:
        variable, chosen = "", there
    usable = [device for device in chosen if _is_active(device, root)]
    if variable and not usable and (there or variable == OURS):  # NCCL's may be set everywhere
        raise SettingsError(f"{variable}={text!r} leaves no adapter with an active port; this host has {_list(there)}")
    return share(usable, local_rank, local_ranks)


def list_devices(root: Path = SYSFS) -> list[str]:
    """The host's adapters, by name in natural order."""
    return sorted((entry.name for entry in root.iterdir()), key=_natural) if root.is_dir() else []


def match_nccl(text: str, there: Sequence[str]) -> list[str]:
    """The adapters that a value of NCCL_IB_HCA chooses, in their own order.

    Syntax (NCCL's documentation of the variable): an optional `^` (all but these), then an optional `=` (exact names instead
    of prefixes), then names separated by commas, each with an optional `:port`. Ports are ignored, with a warning: engines
    choose theirs. Nothing matching is no error here.
    """
    exclude, rest = text.startswith("^"), text.removeprefix("^")
    exact, rest = rest.startswith("="), rest.removeprefix("=")
    names = []
    for item in filter(None, (part.strip() for part in rest.split(","))):
        name, colon, port = item.partition(":")
        if colon:
            whole = "left out" if exclude else "used"
            log.warning("%s=%s: port %s of %s is ignored, the adapter is %s as a whole", NCCL, text, port, name, whole)
        names.append(name)
    if not names:
        raise SettingsError(f"{NCCL}={text!r} names no adapter")

    def matches(device: str) -> bool:
        return any(device == name if exact else device.startswith(name) for name in names)

    return [device for device in there if matches(device) != exclude]


def share(devices: Sequence[str], local_rank: int, local_ranks: int) -> tuple[str, ...]:
    """Those of one process. More adapters than processes: each has a run of neighbours to itself, the first ones may have one
    more. Fewer: neighbours share one, as evenly as can be. Raises SettingsError for a rank that is not there."""
    if not 0 <= local_rank < local_ranks:
        raise SettingsError(f"there is no local rank {local_rank} among {local_ranks}")
    count = len(devices)
    if count == 0:
        return ()
    if count <= local_ranks:
        return (devices[local_rank * count // local_ranks],)
    each, more = divmod(count, local_ranks)
    first = local_rank * each + min(local_rank, more)
    return tuple(devices[first : first + each + (local_rank < more)])


def _named(text: str, there: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))
    if not names:
        raise SettingsError(f"{OURS}={text!r} names no adapter")
    if missing := [name for name in names if name not in there]:
        raise SettingsError(f"{OURS}={text!r}: this host has no {_list(missing)}; it has {_list(there)}")
    return names


def _is_active(device: str, root: Path) -> bool:
    """Whether any port is; warns when none is."""
    states = {}
    for port in sorted((root / device / "ports").glob("*")):
        try:
            states[port.name] = (port / "state").read_text().strip()
        except OSError as e:
            states[port.name] = f"unreadable: {e.strerror}"
    if ACTIVE in states.values():
        return True
    ports = ", ".join(f"port {port} is {state!r}" for port, state in states.items()) or "it has no port"
    log.warning("the RDMA adapter %s is left out: %s", device, ports)
    return False


def _natural(name: str) -> tuple[str, int, str]:
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or -1), name


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
