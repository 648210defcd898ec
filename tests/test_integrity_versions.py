"""A version names bytes: fleets that hold the same tensors have the same digest of them, whatever else is different."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from checkpoint_engine.manifest import Manifest, RankManifest, RegionMeta, TensorMeta
from helpers.fleet import server, share_of, tensors
from helpers.ranks import run_ranks

Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
Spread = list[list[tuple[str, int]]]


def _version(rank: int, world_size: int, ways: list[tuple[str, Any]]) -> list[tuple[str, str]]:
    """(digest, version) of each way to register. ways: (how, tensors or files)."""
    found = []
    with server(bucket_bytes=64 << 10) as ps:
        for number, (how, what) in enumerate(ways):
            name = f"c{number}"
            if how == "on a GPU":  # taken there by this process: sharing it would leave a file of torch's
                what = {tensor: value.cuda() for tensor, value in what.items()}
                ps.register_checkpoint(name, named_tensors=what)
            elif how == "tensors":
                ps.register_checkpoint(name, named_tensors=share_of(what, rank, world_size))
            elif how == "all of them":
                ps.register_checkpoint(name, named_tensors=what)
            elif how == "one of the files":
                ps.register_checkpoint(name, files=what[rank::world_size])
            else:
                ps.register_checkpoint(name, files=what, stripe=True)
            ps.gather_metas(name)
            found.append((ps.get_metas().content_digest, ps.get_metas().version))
    return found


def _write(everything: dict[str, torch.Tensor], count: int, path: Path) -> list[str]:
    files = [str(path / f"model-{number}-of-{count}.safetensors") for number in range(count)]
    for number, file in enumerate(files):
        save_file(share_of(everything, number, count), file)
    return files


def test_the_same_bytes_have_one_digest(tmp_path: Path, shm_dir: Path) -> None:
    """From memory, from files on disk and in memory, by files or striped, once or on all ranks, over 1, 2 and 3 ranks."""
    everything = tensors(1)
    strided = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in everything.items()}
    ways: list[tuple[str, Any]] = [("tensors", everything), ("tensors", strided), ("all of them", everything)]
    for place, count in ((tmp_path, 3), (shm_dir, 4)):
        files = _write(everything, count, place)
        ways += [("one of the files", files), ("striped", files)]
    found = [each for world_size in (1, 2, 3) for rank in run_ranks(_version, world_size, ways) for each in rank]
    assert len({digest for digest, _ in found}) == 1
    assert all(version == f"c{number % len(ways)}@{digest[:12]}" for number, (digest, version) in enumerate(found))


def _one_bit(everything: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = max(everything, key=lambda each: everything[each].nbytes)
    raw = everything[name].clone().view(torch.uint8)
    raw[0, 0] ^= 1
    return everything | {name: raw.view(everything[name].dtype)}


def _named_otherwise(everything: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("layers.0", "layers.9"): tensor for name, tensor in everything.items()}


def _flipped(everything: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(name for name, t in everything.items() if t.dtype == torch.int8 and t.numel() > 9)
    return everything | {name: everything[name].flip(0)}


def _shaped_otherwise(everything: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.reshape(-1) for name, tensor in everything.items()}


def _typed_otherwise(everything: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.view(torch.int16) if tensor.dtype == torch.float16 else tensor for name, tensor in everything.items()}


def _without_one(everything: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(list(everything.items())[1:])


def test_whatever_is_different_has_another_digest() -> None:
    everything = tensors(1)
    changes: list[Change] = [dict, _one_bit, _named_otherwise, _flipped, _shaped_otherwise, _typed_otherwise, _without_one]
    (found,) = run_ranks(_version, 1, [("tensors", change(everything)) for change in changes])
    assert len({digest for digest, _ in found}) == len(changes)


def _manifest(spread: Spread) -> Manifest:
    """spread: rank -> (name, digest) of what it holds."""
    ranks = []
    for number, held in enumerate(spread):
        metas = tuple(TensorMeta(name, "uint8", (8,), 8 * place, digest) for place, (name, digest) in enumerate(held))
        ranks.append(RankManifest(number, f"host{number}", f"d{number}", (RegionMeta(8 * len(held), metas),) if held else ()))
    return Manifest("c", tuple(ranks))


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 5), min_size=1), st.integers(1, 4), st.data())
def test_holders_and_their_order_do_not_matter(content: dict[str, int], world_size: int, data: st.DataObject) -> None:
    """Any number of holders of each tensor, of which at least one made its digest."""
    spread: Spread = [[] for _ in range(world_size)]
    for name in data.draw(st.permutations(list(content))):
        holders = data.draw(st.sets(st.integers(0, world_size - 1), min_size=1))
        made = data.draw(st.sampled_from(sorted(holders)))
        for rank in holders:
            spread[rank].append((name, content[name] if rank == made or data.draw(st.booleans()) else 0))
    once = _manifest([sorted(content.items())])
    assert _manifest(spread).content_digest == once.content_digest
    other = _manifest([[(name, digest + (name == min(content))) for name, digest in sorted(content.items())]])
    assert other.content_digest != once.content_digest
    assert _manifest([[(name, 0) for name in sorted(content)]]).content_digest != once.content_digest


@pytest.mark.gpu
def test_tensors_of_a_gpu_have_the_same_digest() -> None:
    everything = tensors(1)
    (found,) = run_ranks(_version, 1, [("tensors", everything), ("on a GPU", everything)])
    assert found[0][0] == found[1][0]
