"""Fixtures that every test file may use; what they are made of is in tests/helpers."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.leaks import SHM, SHM_PREFIX, Watch
from helpers.netns import TwoHosts, Unavailable
from helpers.ports import free_ports

_numbers = itertools.count()


@functools.cache
def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device here"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and (reason := _no_gpu()):
            item.add_marker(pytest.mark.skip(reason=reason))
        if "netns" in getattr(item, "fixturenames", ()):
            item.add_marker("netns")


@pytest.fixture(autouse=True)
def socket_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The socket directory of this test, with a path short enough for a Unix socket (108 bytes).

    After the test nothing may be left: no process, no thread that keeps the process alive, no file in /dev/shm, no socket.
    """
    path = Path(tempfile.mkdtemp(prefix="ce-", dir="/tmp"))
    monkeypatch.setenv("CHECKPOINT_ENGINE_SOCKET_DIR", str(path))
    watch = Watch(path)
    yield path
    leaks = watch.leaks()
    shutil.rmtree(path, ignore_errors=True)
    if leaks:
        pytest.fail("the test left behind:\n  " + "\n  ".join(leaks), pytrace=False)


@pytest.fixture(autouse=True)
def _no_inherited_settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test sees none of the variables that configure us, unless it sets them; and no GPU, unless it is marked for one."""
    for name in list(os.environ):
        if name.startswith(("CHECKPOINT_ENGINE_", "PS_")) and name != "CHECKPOINT_ENGINE_SOCKET_DIR":
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setenv("CHECKPOINT_ENGINE_DEVICE", "cpu")


@pytest.fixture(params=["copies", "broadcast"])
def sharing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How ranks of one host share: each copies into the others' rings, or all broadcast on a communicator."""
    monkeypatch.setenv("CHECKPOINT_ENGINE_PEER_COPIES", str(int(request.param == "copies")))
    method: str = request.param
    return method


@pytest.fixture
def master_port() -> int:
    """MASTER_PORT: free, and so is the port after it, where the store listens."""
    return free_ports(2)


@pytest.fixture
def shm_dir() -> Iterator[Path]:
    """A directory in /dev/shm, removed after the test. Skipped where there is none."""
    if not SHM.is_dir():
        pytest.skip("no /dev/shm here")
    path = SHM / f"{SHM_PREFIX}{next(_numbers)}"
    path.mkdir()
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def netns() -> Iterator[TwoHosts]:
    """Two hosts; see helpers.netns. Skipped with the reason where namespaces cannot be made."""
    try:
        hosts = TwoHosts()
    except Unavailable as e:
        pytest.skip(f"no network namespaces: {e}")
    with hosts:
        yield hosts
