from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.devices import numa


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0-3,8,10-11\n", {0, 1, 2, 3, 8, 10, 11}), ("0\n", {0}), ("\n", set()), ("", set()), ("5-5", {5})],
)
def test_cpulist(text: str, cpus: set[int]) -> None:
    assert numa.parse_cpulist(text) == cpus


@given(st.sets(st.integers(0, 600)))
def test_cpulist_of_singles(cpus: set[int]) -> None:
    assert numa.parse_cpulist(",".join(map(str, sorted(cpus)))) == cpus


@pytest.mark.parametrize("text", ["a", "1-b", "-1", "1..3"])
def test_not_a_cpulist(text: str) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        numa.parse_cpulist(text)


@pytest.mark.parametrize("spelled", ["0000:17:00.0", "00000000:17:00.0", "0000:17:00.0\n", "0:17:00.0"])
def test_bus_id(spelled: str) -> None:
    assert numa.normal_bus_id(spelled) == "0000:17:00.0"
    assert numa.normal_bus_id("0000:AB:1C.0") == "0000:ab:1c.0"
    assert numa.normal_bus_id("10000:AB:1C.0") == "10000:ab:1c.0"


@pytest.mark.parametrize(("text", "node"), [("1\n", 1), ("0\n", 0), ("-1\n", None), ("", None)])
def test_node_of_a_pci_device(tmp_path: Path, text: str, node: int | None) -> None:
    (tmp_path / "0000:17:00.0").mkdir()
    (tmp_path / "0000:17:00.0" / "numa_node").write_text(text)
    assert numa.pci_node("00000000:17:00.0", tmp_path) == node
    assert numa.pci_node("0000:18:00.0", tmp_path) is None


def host(root: Path, nodes: dict[int, str], online: str | None = None) -> Path:
    for node, cpus in nodes.items():
        (root / f"node{node}").mkdir()
        (root / f"node{node}" / "cpulist").write_text(cpus + "\n")
    if online is not None:
        (root / "online").write_text(online + "\n")
    return root


def test_nodes(tmp_path: Path) -> None:
    root = host(tmp_path, {0: "0-3", 1: "4-7", 10: ""})
    assert numa.online_nodes(root) == (0, 1, 10)  # no list: the directories
    (root / "online").write_text("0-1\n")
    assert numa.online_nodes(root) == (0, 1)
    assert numa.node_cpus(1, root) == {4, 5, 6, 7}
    assert numa.node_cpus(10, root) == numa.node_cpus(11, root) == frozenset()
    assert numa.online_nodes(root / "missing") == ()


def bound(node: int | None, root: Path) -> tuple[frozenset[int], set[int]]:
    """In a thread of its own, so that the test's stays as it is."""
    result: list[tuple[frozenset[int], set[int]]] = []
    thread = threading.Thread(target=lambda: result.append((numa.bind_to_node(node, root), os.sched_getaffinity(0))))
    thread.start()
    thread.join(30)
    return result[0]


def test_binding_a_thread(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    one = min(allowed)
    root = host(tmp_path, {0: str(one), 1: "100000"}, online="0-1")
    assert bound(0, root) == (frozenset({one}), {one})
    assert bound(1, root) == (frozenset(), allowed)  # none of its CPUs is ours
    assert bound(None, root) == (frozenset(), allowed)
    (root / "online").write_text("0\n")
    assert bound(0, root) == (frozenset(), allowed)  # one node: nothing to choose
    assert os.sched_getaffinity(0) == allowed


def test_node_mask() -> None:
    mask, bits = numa.node_mask(3)
    assert list(mask) == [8] and bits == 65
    mask, bits = numa.node_mask(70)
    assert list(mask) == [0, 1 << 6] and bits == 129


def test_placing_memory_for_real(tmp_path: Path) -> None:
    if 0 not in numa.online_nodes():
        pytest.skip("this kernel shows no NUMA node 0")
    import ctypes

    with mmap.mmap(-1, 1 << 20) as memory:
        view = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(view)
        placed = numa.place_memory(address, len(memory), 0)
        memory[:8] = b"touched!"
        assert memory[:8] == b"touched!"
        assert not numa.place_memory(address, 0, 0)
        assert not numa.place_memory(address + 1, 4096, 0)  # not page-aligned: refused by the kernel
        assert not numa.place_on_node(address, len(memory), 0, host(tmp_path, {0: "0"}, online="0"))
        del view
    if not placed:
        pytest.skip("this sandbox does not permit mbind")
