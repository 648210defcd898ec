"""Shows a load plan: what of a checkpoint is replayed into which parameters, and what stays with the loader, and why."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from checkpoint_engine.cli.progress import line, size, table
from checkpoint_engine.errors import SettingsError
from checkpoint_engine.loads.plan import Copy, LoadPlan


def show_plan(file: Path, *, tensors: bool, json_output: bool) -> None:
    """Print the plan in `file`. Raises SettingsError when it cannot be read, LoadPlanError when it is no plan."""
    try:
        data = file.read_bytes()
    except OSError as e:
        raise SettingsError(f"{file}: {e.strerror}") from e
    plan = LoadPlan.decode(data)
    if json_output:
        print(json.dumps(describe(plan)))
    else:
        _print(Console(), plan, tensors)


def describe(plan: LoadPlan) -> dict[str, Any]:
    """All of it as plain data for JSON; sizes, offsets and strides in bytes."""
    copies = sum(len(tensor.copies) for tensor in plan.planned)
    return {
        "digest": plan.digest,
        "model": plan.model,
        "checkpoint": plan.checkpoint,
        "replayed": {"tensors": len(plan.planned), "nbytes": plan.nbytes, "copies": copies},
        "storages": [
            {"names": list(storage.names), "nbytes": storage.nbytes, "staged": storage.slot is not None}
            for storage in plan.storages
        ],
        "tensors": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "copies": [{"into": _into(plan, copy), **_fields(copy)} for copy in tensor.copies],
            }
            for tensor in plan.planned
        ],
        "loader": [{"name": left.name, "reason": left.reason} for left in plan.loader],
    }


def _fields(copy: Copy) -> dict[str, Any]:
    return {name: getattr(copy, name) for name in copy.__struct_fields__}


def _into(plan: LoadPlan, copy: Copy) -> str:
    names = plan.storages[copy.storage].names
    return names[0] if names else str(copy.storage)


def _print(console: Console, plan: LoadPlan, tensors: bool) -> None:
    if tensors:
        rows = [
            [tensor.name, tensor.dtype, str(c.source), _into(plan, c), str(c.target), _rows(c), size(c.nbytes)]
            for tensor in plan.planned
            for c in tensor.copies
        ]
        table(console, "copies", ["tensor", "dtype", "from byte", "into", "at byte", "rows", "size"], rows, numbers=1)
        table(console, "the loader's business", ["tensor", "why"], [[left.name, left.reason] for left in plan.loader], numbers=0)
    else:
        count = Counter(left.reason for left in plan.loader)
        table(console, "the loader's business", ["why", "tensors"], [[why, str(n)] for why, n in count.most_common()], numbers=1)
    line(
        console,
        f"plan {plan.digest[:12]}: {len(plan.planned)} tensors are replayed ({size(plan.nbytes)} into this rank's model), "
        f"{len(plan.loader)} go to the loader",
    )


def _rows(copy: Copy) -> str:
    return "x".join(map(str, (*copy.sizes, copy.run)))
