"""The command that shows what a checkpoint on disk holds, and how it would travel to the engines."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from checkpoint_engine.cli.load_plan import show_plan
from checkpoint_engine.cli.progress import line, size, table
from checkpoint_engine.errors import DuplicateTensorError
from checkpoint_engine.manifest import Manifest, RankManifest, RegionMeta, TensorMeta
from checkpoint_engine.memory.safetensors import FileTensor, checkpoint_files, parse_file
from checkpoint_engine.planning import CPU, H200, Plan, default_sizes, plan_broadcast, stripe
from checkpoint_engine.settings import Settings

PLENTY = 1 << 62
"""Bytes of free device memory that are assumed: as many as are wanted."""


class DeviceKind(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


def inspect(
    directory: Annotated[Path | None, typer.Argument(help="Directory of safetensors files.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Show this load plan instead (docs/recorded-loads.md).")] = None,
    ranks: Annotated[int, typer.Option(help="Show how so many ranks would share the checkpoint.", min=1)] = 1,
    device: Annotated[DeviceKind, typer.Option(help="Whose default sizes to plan with.")] = DeviceKind.cpu,
    bucket_bytes: Annotated[int | None, typer.Option(help="Plan with buckets of this size.", min=4096)] = None,
    tensors: Annotated[bool, typer.Option(help="List every tensor.")] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a checkpoint's tensors, dtypes and bytes, and the buckets in which they would travel; or a load plan."""
    if plan is not None:
        show_plan(plan, tensors=tensors, json_output=json_output)
        return
    if directory is None:
        raise typer.BadParameter("a DIRECTORY or --plan FILE is needed")
    files = checkpoint_files(directory)
    held = read(files)
    settings = Settings.from_environment(bucket_bytes=bucket_bytes)
    manifest = striped(directory.resolve().name, [tensor for tensor, _ in held.values()], ranks)
    sizes = default_sizes(device, ranks, PLENTY, settings.mem_fraction, settings.bucket_bytes, settings.ring_bytes)
    rates = H200 if device is DeviceKind.cuda else CPU
    stream = plan_broadcast(
        manifest,
        **dataclasses.asdict(sizes),
        rates=rates,
    )
    described = describe(manifest, stream, held, len(files))
    if json_output:
        print(json.dumps(described))
    else:
        show(Console(), described, tensors)


def read(files: Sequence[Path]) -> dict[str, tuple[FileTensor, Path]]:
    """Every tensor of `files` and the file it is in, in file order. Raises as `parse_file` does, and DuplicateTensorError."""
    held: dict[str, tuple[FileTensor, Path]] = {}
    for file in files:
        for tensor in parse_file(file).tensors:
            if tensor.name in held:
                raise DuplicateTensorError(tensor.name, str(held[tensor.name][1]), str(file))
            held[tensor.name] = (tensor, file)
    return held


def striped(name: str, tensors: Sequence[FileTensor], ranks: int) -> Manifest:
    """What `ranks` ranks would hold of `tensors`, each its share of every layer in one region."""
    by_name = {tensor.name: tensor for tensor in tensors}
    shares = stripe([(tensor.name, tensor.nbytes) for tensor in tensors], ranks)
    return Manifest(name, tuple(_rank(rank, [by_name[n] for n in share]) for rank, share in enumerate(shares)))


def _rank(rank: int, tensors: Sequence[FileTensor]) -> RankManifest:
    metas, offset = [], 0
    for tensor in tensors:
        metas.append(TensorMeta(tensor.name, tensor.dtype, tensor.shape, offset))
        offset += tensor.nbytes
    return RankManifest(rank, "", "", (RegionMeta(offset, tuple(metas)),) if metas else ())


def describe(manifest: Manifest, plan: Plan, held: dict[str, tuple[FileTensor, Path]], files: int) -> dict[str, Any]:
    """All that is shown, as plain data for JSON; sizes in bytes."""
    owner = {t.name: rank.rank for rank in manifest.ranks for region in rank.regions for t in region.tensors}
    bucket = {item.name: index for index, b in enumerate(plan.buckets) for item in b.items}
    tensors = [t for t, _ in held.values()]
    count = Counter(t.dtype for t in tensors)
    return {
        "checkpoint": manifest.checkpoint,
        "files": files,
        "nbytes": manifest.nbytes,
        "dtypes": [
            {"dtype": dtype, "tensors": number, "nbytes": sum(t.nbytes for t in tensors if t.dtype == dtype)}
            for dtype, number in count.most_common()
        ],
        "tensors": [
            {
                "name": t.name,
                "dtype": t.dtype,
                "shape": list(t.shape),
                "nbytes": t.nbytes,
                "file": file.name,
                "rank": owner[t.name],
                "bucket": bucket[t.name],
            }
            for t, file in held.values()
        ],
        "ranks": [
            {"rank": r.rank, "tensors": sum(len(region.tensors) for region in r.regions), "nbytes": r.nbytes}
            for r in manifest.ranks
        ],
        "order": plan.order,
        "ring_bytes": plan.ring_bytes,
        "bucket_bytes": plan.bucket_bytes,
        "buckets": [
            {
                "tensors": len(b.items),
                "nbytes": sum(item.nbytes for item in b.items),
                "ranks": sorted({piece.owner for piece in b.pieces}),
                "first": b.items[0].name,
                "last": b.items[-1].name,
            }
            for b in plan.buckets
        ],
    }


def show(console: Console, described: dict[str, Any], tensors: bool) -> None:
    """Print what `describe` returned as tables."""
    if tensors:
        rows = [
            [t["name"], t["dtype"], "x".join(map(str, t["shape"])) or "scalar", t["file"], str(t["rank"]), str(t["bucket"]),
             size(t["nbytes"])]
            for t in described["tensors"]
        ]  # fmt: skip
        table(console, "tensors", ["name", "dtype", "shape", "file", "rank", "bucket", "size"], rows, numbers=3)
    rows = [[d["dtype"], str(d["tensors"]), size(d["nbytes"])] for d in described["dtypes"]]
    table(console, "dtypes", ["dtype", "tensors", "size"], rows, numbers=2)
    rows = [[str(r["rank"]), str(r["tensors"]), size(r["nbytes"])] for r in described["ranks"]]
    table(console, "ranks", ["rank", "tensors", "size"], rows, numbers=2)
    rows = [
        [str(index), b["first"], b["last"], ",".join(map(str, b["ranks"])), str(b["tensors"]), size(b["nbytes"])]
        for index, b in enumerate(described["buckets"])
    ]
    title = f"buckets of {size(described['bucket_bytes'])} at most, in the order of {described['order']}"
    table(console, title, ["bucket", "first", "last", "from rank", "tensors", "size"], rows, numbers=3)
    count, files, buckets = len(described["tensors"]), described["files"], len(described["buckets"])
    total = f"{size(described['nbytes'])} ({described['nbytes']} bytes)"
    line(console, f"{described['checkpoint']}: {count} tensors, {total}, {_files(files)}, {buckets} buckets")


def _files(count: int) -> str:
    return f"{count} file{'s' if count != 1 else ''}"
