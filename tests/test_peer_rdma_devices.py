from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.errors import SettingsError
from checkpoint_engine.transport.peer.rdma_devices import devices_for, list_devices, match_nccl, share

EIGHT = [f"mlx5_{n}" for n in range(8)]


def sysfs(root: Path, states: dict[str, list[str]]) -> Path:
    """A tree as the kernel's: adapter -> states of its ports."""
    for device, ports in states.items():
        (root / device / "ports").mkdir(parents=True)
        for number, state in enumerate(ports, 1):
            (root / device / "ports" / str(number)).mkdir()
            (root / device / "ports" / str(number) / "state").write_text(state + "\n")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight adapters, of which number 3 is down, and a dual-port one with one port up."""
    states = {name: ["1: DOWN" if name == "mlx5_3" else "4: ACTIVE"] for name in EIGHT}
    return sysfs(tmp_path, {**states, "bnxt_re0": ["1: DOWN", "4: ACTIVE"]})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("mlx5", ["mlx5_0", "mlx5_1", "mlx5_10"]),
        ("mlx5_1", ["mlx5_1", "mlx5_10"]),
        ("=mlx5_1", ["mlx5_1"]),
        ("=mlx5", []),
        ("^mlx5", ["bnxt_re0"]),
        ("^mlx5_1", ["bnxt_re0", "mlx5_0"]),
        ("^=mlx5_1", ["bnxt_re0", "mlx5_0", "mlx5_10"]),
        ("mlx5_0,bnxt", ["bnxt_re0", "mlx5_0"]),
        ("=mlx5_10, mlx5_0,", ["mlx5_0", "mlx5_10"]),
        ("ib", []),
    ],
)
def test_nccl_syntax(text: str, wanted: list[str]) -> None:
    assert match_nccl(text, ["bnxt_re0", "mlx5_0", "mlx5_1", "mlx5_10"]) == wanted


def test_ports_are_reported_as_ignored(caplog: pytest.LogCaptureFixture) -> None:
    assert match_nccl("=mlx5_0:1,mlx5_1", EIGHT) == ["mlx5_0", "mlx5_1"]
    assert match_nccl("^=mlx5_0:1", EIGHT[:2]) == ["mlx5_1"]
    used, left = (record.getMessage() for record in caplog.records)
    assert "port 1 of mlx5_0 is ignored, the adapter is used as a whole" in used
    assert "port 1 of mlx5_0 is ignored, the adapter is left out as a whole" in left


@pytest.mark.parametrize("text", ["^", "=", "^=,", " , "])
def test_values_that_name_nothing(text: str) -> None:
    with pytest.raises(SettingsError, match=r"NCCL_IB_HCA=.*names no adapter"):
        match_nccl(text, EIGHT)


def test_all_active_ones_in_natural_order(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "mlx5_10" / "ports" / "1").mkdir(parents=True)
    (root / "mlx5_10" / "ports" / "1" / "state").write_text("4: ACTIVE\n")
    assert list_devices(root)[-1] == "mlx5_10"
    assert devices_for(0, 1, {}, root) == ("bnxt_re0", *(name for name in EIGHT if name != "mlx5_3"), "mlx5_10")
    assert [r.getMessage() for r in caplog.records] == ["the RDMA adapter mlx5_3 is left out: port 1 is '1: DOWN'"]
    assert caplog.records[0].levelno == logging.WARNING


def test_ours_comes_before_nccls(root: Path) -> None:
    both = {"PS_P2P_STORE_RDMA_DEVICES": "mlx5_5, mlx5_1", "NCCL_IB_HCA": "=mlx5_0"}
    assert [devices_for(rank, 2, both, root) for rank in (0, 1)] == [("mlx5_5",), ("mlx5_1",)]
    assert devices_for(0, 1, {"NCCL_IB_HCA": "^mlx5"}, root) == ("bnxt_re0",)


def test_what_is_not_there(root: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"PS_P2P_STORE_RDMA_DEVICES=.*this host has no mlx5_8; it has bnxt_re0, mlx5_0"):
        devices_for(0, 1, {"PS_P2P_STORE_RDMA_DEVICES": "mlx5_0,mlx5_8"}, root)
    with pytest.raises(SettingsError, match="NCCL_IB_HCA='=mlx5_3' leaves no adapter with an active port"):
        devices_for(0, 1, {"NCCL_IB_HCA": "=mlx5_3"}, root)
    assert devices_for(0, 8, {"NCCL_IB_HCA": "mlx5"}, tmp_path / "nothing") == ()


def test_no_port_at_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert devices_for(0, 1, {}, sysfs(tmp_path, {"irdma0": []})) == ()
    assert "irdma0 is left out: it has no port" in caplog.text


@given(st.integers(0, 20), st.integers(1, 16))
def test_sharing_is_even_and_leaves_none_idle(devices: int, ranks: int) -> None:
    names = [f"mlx5_{n}" for n in range(devices)]
    shares = [share(names, rank, ranks) for rank in range(ranks)]
    users = [sum(name in mine for mine in shares) for name in names]
    if devices == 0:
        assert shares == [()] * ranks
    elif devices <= ranks:  # shared by GPUs
        assert {len(mine) for mine in shares} == {1}
        assert min(users) >= 1
        assert max(users) - min(users) <= 1
    else:  # several each, of its own
        assert users == [1] * devices
        sizes = [len(mine) for mine in shares]
        assert max(sizes) - min(sizes) <= 1
    flat = [names.index(name) for mine in shares for name in mine]
    assert flat == sorted(flat)  # neighbours


@pytest.mark.parametrize(("rank", "ranks"), [(-1, 2), (2, 2), (0, 0)])
def test_ranks_that_are_not_there(rank: int, ranks: int) -> None:
    with pytest.raises(SettingsError, match="no local rank"):
        share(EIGHT, rank, ranks)
