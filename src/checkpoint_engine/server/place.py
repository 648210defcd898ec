"""Which rank this process is, and which accelerator it is beside."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from checkpoint_engine.errors import SettingsError


def find_place(rank: int | None, world_size: int | None, auto_pg: bool) -> tuple[int, int]:
    """(rank, world size) from the arguments, the caller's default group (auto_pg False), or RANK and WORLD_SIZE.

    rank=0 is a rank. Raises SettingsError naming the variable that is missing.
    """
    if not auto_pg and dist.is_initialized():
        rank = dist.get_rank() if rank is None else rank
        world_size = dist.get_world_size() if world_size is None else world_size
    return _number("RANK", rank), _number("WORLD_SIZE", world_size)


def _number(variable: str, value: int | None) -> int:
    if value is not None:
        return value
    text = os.environ.get(variable)
    if text is None:
        raise SettingsError(f"pass {variable.lower()}=, or set {variable} (torchrun does)")
    try:
        return int(text)
    except ValueError:
        raise SettingsError(f"{variable}={text!r} is not a number") from None


def local_rank(rank: int, gpu_count: int | None, device: str | None) -> int:
    """The accelerator beside `rank`, by its number on this host; on a CPU (`device`), the rank's number there."""
    count = 0
    if device != "cpu":
        count = gpu_count or (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return rank % count if count else int(os.environ.get("LOCAL_RANK", rank))
