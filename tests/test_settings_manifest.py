"""Settings from arguments and environment; manifests as data."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.errors import SettingsError
from checkpoint_engine.manifest import ITEMSIZE, Manifest, RankManifest, RegionMeta, TensorMeta
from checkpoint_engine.settings import GIB, VARIABLES, Settings


def test_the_environment_overlays_the_defaults_and_arguments_overlay_both() -> None:
    env = {"PS_MAX_BUCKET_SIZE_GB": "0.5", "PS_MEM_FRACTION": "0.5", "CHECKPOINT_ENGINE_ALLOWED_UIDS": "1,2", "UNRELATED": "x"}
    settings = Settings.from_environment(env, mem_fraction=0.25, timeout=None)
    assert settings.max_bucket_bytes == GIB // 2
    assert settings.mem_fraction == 0.25
    assert settings.allowed_uids == {1, 2}
    assert settings.timeout == Settings().timeout
    assert Settings.from_environment({"CHECKPOINT_ENGINE_SOCKET_DIR_MODE": "750"}).socket_dir_mode == 0o750
    assert Settings.from_environment({"CHECKPOINT_ENGINE_SOCKET_DIR": "/a"}).socket_dir == Path("/a")
    assert Settings.from_environment({"CHECKPOINT_ENGINE_FREE_AFTER_UPDATE": "1"}).free_after_update


@pytest.mark.parametrize("variable", [v for v in VARIABLES if VARIABLES[v][1] not in (Path, str)])
def test_a_value_that_cannot_be_used_names_its_variable(variable: str) -> None:
    with pytest.raises(SettingsError, match=variable):
        Settings.from_environment({variable: "much"})
    assert Settings.from_environment({variable: ""}) == Settings()


@pytest.mark.parametrize(
    "wrong", [{"mem_fraction": 0.0}, {"mem_fraction": 1.5}, {"timeout": 0}, {"holder_lease": float("inf")}, {"bucket_bytes": 100}]
)
def test_values_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        Settings(**wrong)  # type: ignore[arg-type]


TENSORS = st.builds(
    TensorMeta,
    name=st.text(min_size=1, max_size=20),
    dtype=st.sampled_from(sorted(ITEMSIZE)),
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    offset=st.integers(0, 1 << 40),
    digest=st.integers(0, (1 << 64) - 1),
)
RANKS = st.builds(
    RankManifest,
    rank=st.integers(0, 9),
    host=st.text(max_size=9),
    device=st.text(max_size=9),
    regions=st.lists(st.builds(RegionMeta, nbytes=st.integers(0, 1 << 40), tensors=st.lists(TENSORS, max_size=4).map(tuple))).map(
        tuple
    ),
)
MANIFESTS = st.builds(Manifest, checkpoint=st.text(max_size=9), ranks=st.lists(RANKS, max_size=3).map(tuple))


@given(MANIFESTS)
def test_manifests_survive_json_and_msgpack(manifest: Manifest) -> None:
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest == msgspec.msgpack.decode(msgspec.msgpack.encode(manifest), type=Manifest)
    assert again.layout_digest == manifest.layout_digest
    assert again.version == manifest.version


@given(MANIFESTS, st.data())
def test_digests_change_with_what_they_are_of(manifest: Manifest, data: st.DataObject) -> None:
    ranks = [r for r in manifest.ranks if any(g.tensors for g in r.regions)]
    if not ranks:
        return
    rank = data.draw(st.sampled_from(ranks))
    where = manifest.ranks.index(rank)
    region = next(g for g in rank.regions if g.tensors)
    tensor = region.tensors[0]

    def changed(**changes: object) -> Manifest:
        new = msgspec.structs.replace(tensor, **changes)
        regions = tuple(RegionMeta(g.nbytes, (new, *g.tensors[1:])) if g is region else g for g in rank.regions)
        new_rank = RankManifest(rank.rank, rank.host, rank.device, regions)
        return Manifest(manifest.checkpoint, (*manifest.ranks[:where], new_rank, *manifest.ranks[where + 1 :]))

    moved = changed(offset=tensor.offset + 1)
    assert moved.layout_digest != manifest.layout_digest
    assert moved.content_digest == manifest.content_digest
    assert changed(digest=tensor.digest ^ 1).layout_digest == manifest.layout_digest


@given(st.binary(max_size=100))
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        Manifest.from_json(data)
