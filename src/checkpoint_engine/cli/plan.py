"""The command that predicts how long an update would take, on clusters that need not be there."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from checkpoint_engine.cli.inspect import read, striped
from checkpoint_engine.cli.progress import line, size, speed, table
from checkpoint_engine.errors import SettingsError
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.memory.safetensors import checkpoint_files
from checkpoint_engine.planning import zoo
from checkpoint_engine.planning.cluster import VLLM_TENSOR_SECONDS, Cluster, ClusterPrediction, predict_cluster
from checkpoint_engine.planning.presets import PUBLISHED, Published, from_probe, preset

SOURCE = "upstream's README of 0.4.2, its broadcast Update"


class Kind(StrEnum):
    h200 = "h200"
    h800 = "h800"
    h20 = "h20"


def plan(
    model: Annotated[str | None, typer.Option(help=f"Directory of safetensors files, or one of {', '.join(zoo.NAMES)}.")] = None,
    hosts: Annotated[int, typer.Option(min=1, help="Hosts.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of each host.")] = 8,
    kind: Annotated[Kind, typer.Option(help="What hosts are like.")] = Kind.h200,
    probe: Annotated[Path | None, typer.Option(help="Hosts are like the one this file is of: from `probe --json`.")] = None,
    nic: Annotated[float | None, typer.Option(min=0.001, help="GB/s from host to host; default: 400 Gb/s for each GPU.")] = None,
    loader_us: Annotated[
        float, typer.Option(min=0.0, help="Microseconds that the engine's loader takes for each tensor.")
    ] = VLLM_TENSOR_SECONDS * 1e6,
    beside_load: Annotated[
        float | None, typer.Option(min=0.01, max=1.0, help="Part of a broadcast's speed left while workers copy.")
    ] = None,
    method: Annotated[str, typer.Option(help="How ranks get the weights.")] = "broadcast",
    bucket_bytes: Annotated[int | None, typer.Option(min=4096, help="Plan with buckets of this size.")] = None,
    ring_bytes: Annotated[int | None, typer.Option(min=4096, help="Plan with a ring of this size.")] = None,
    published: Annotated[bool, typer.Option(help="Predict every update that upstream has published a time for.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON; bytes and seconds.")] = False,
) -> None:
    """Predict the seconds of an update, stage by stage, and what bounds it: not a measurement."""

    changes: dict[str, float | None] = {"nic": nic and nic * 1e9, "beside_load": beside_load}

    def predicted(checkpoint: Manifest | str, cluster: Cluster) -> ClusterPrediction:
        return predict_cluster(
            checkpoint,
            cluster.replace(**{name: value for name, value in changes.items() if value is not None}),
            method=method,
            tensor_seconds=loader_us * 1e-6,
            bucket_bytes=bucket_bytes,
            ring_bytes=ring_bytes,
        )

    if (model is None) != published:
        raise SettingsError("say which --model, or ask for --published")
    if model is None:
        rows: list[tuple[ClusterPrediction, Published | None]] = [
            (predicted(row.model, preset(row.kind, row.hosts, row.gpus_per_host)), row) for row in PUBLISHED
        ]
    else:
        cluster = from_probe(_read(probe), hosts, gpus) if probe else preset(kind, hosts, gpus)
        matching = (r for r in PUBLISHED if r[:4] == (model, cluster.name, hosts, gpus))
        rows = [(predicted(find(model), cluster), next(matching, None))]
    if json_output:
        print(json.dumps({"predictions": [described(*row) for row in rows]}))
    elif published:
        show_published(Console(), rows)
    else:
        show(Console(), *rows[0])


def find(model: str) -> Manifest:
    """The checkpoint of that name in the zoo, or in that directory. Raises SettingsError when there is neither."""
    if model in zoo.NAMES:
        return zoo.checkpoint(model)
    directory = Path(model)
    if not directory.is_dir():
        raise SettingsError(f"--model {model}: no such directory, and no model of that name; known are {', '.join(zoo.NAMES)}")
    held = read(checkpoint_files(directory))
    return striped(directory.resolve().name, [tensor for tensor, _ in held.values()], 1)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as e:
        raise SettingsError(f"--probe {file}: {e.strerror}") from None


def described(found: ClusterPrediction, row: Published | None) -> dict[str, Any]:
    """Plain data for JSON: the fields of ClusterPrediction, and what upstream published of the same update."""
    published = {"seconds": row.seconds, "source": SOURCE} if row else None
    return {"label": "prediction", **msgspec.to_builtins(found), "published": published}


def show(console: Console, found: ClusterPrediction, row: Published | None) -> None:
    """One prediction: seconds by stage, what bounds it, memory."""
    cluster = found.cluster
    gpus = f"{cluster.world_size} {'GPUs' if cluster.device == 'cuda' else 'ranks'}"
    line(console, f"prediction: {found.checkpoint}, {size(found.nbytes)} in {found.tensors} tensors, by {found.method} to "
                  f"{gpus} ({cluster.hosts} x {cluster.gpus_per_host}, {cluster.name})")  # fmt: skip
    stages = {"lift": found.lift, "share": found.share, "load": found.load, "whole update": found.seconds}
    cells = [[name, f"{seconds:.3f} s", speed(found.nbytes, seconds)] for name, seconds in stages.items()]
    table(console, "seconds at work, predicted; stages overlap", ["stage", "seconds", "speed"], cells, numbers=2)
    line(console, "speed: all bytes by a stage's seconds; owners lift at the same time")
    line(console, f"bound by: {found.bound_by} ({found.link})")
    line(console, f"device memory: ring {size(found.ring_bytes)}, staging {size(found.staging_bytes)}")
    line(console, f"order: {found.order}; {found.buckets} buckets of {size(found.bucket_bytes)}, "
                  f"{found.pieces} pieces of {size(found.piece_bytes)} at most")  # fmt: skip
    if row:
        line(console, f"published: {row.seconds:.2f} s ({SOURCE}); ours above is a prediction")


def show_published(console: Console, rows: list[tuple[ClusterPrediction, Published | None]]) -> None:
    """A table of predictions beside what upstream published."""
    cells = []
    for found, row in rows:
        cluster = found.cluster
        numbers = [found.lift, found.share, found.load, found.seconds]
        theirs = f"{row.seconds:.2f}" if row else "-"
        where = f"{cluster.world_size} x {cluster.name}"
        cells.append([found.checkpoint, where, found.bound_by, *(f"{n:.2f}" for n in numbers), theirs])
    columns = ["model", "GPUs", "bound by", "lift", "share", "load", "prediction", "published"]
    table(console, "seconds: ours predicted, upstream's published", columns, cells, numbers=5)
    line(console, f"published: {SOURCE}. Ours is a prediction for links as in docs/cost-model.md, "
                  f"with {rows[0][0].tensor_seconds * 1e6:g} us of the engine's loader for each tensor.")  # fmt: skip
