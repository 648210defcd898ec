"""NUMA: which node a GPU hangs on, and how to keep a thread and a piece of memory there. Linux system calls, no libnuma.

Everything here is a hint: where the host has one node, or the sandbox forbids the call, nothing happens and the functions
say so.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from pathlib import Path

NODES = Path("/sys/devices/system/node")
PCI_DEVICES = Path("/sys/bus/pci/devices")

_MBIND = {"x86_64": 237, "aarch64": 235}  # system call numbers
_PREFERRED = 1  # the node first, others when it is full: better slow than out of memory
_MASK_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)


def parse_cpulist(text: str) -> frozenset[int]:
    """The kernel's list format: "0-3,8,10-11". Raises ValueError for anything else."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        if not part:
            continue
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def normal_bus_id(bus_id: str) -> str:
    """sysfs's spelling, 0000:17:00.0, of any of the driver's (00000000:17:00.0, 0000:17:00.0, capitals)."""
    domain, bus, rest = bus_id.strip().lower().split(":")
    return f"{int(domain, 16):04x}:{bus}:{rest}"


def online_nodes(root: Path = NODES) -> tuple[int, ...]:
    """Numbers of the nodes that are online; empty where the kernel knows of none."""
    try:
        return tuple(sorted(parse_cpulist((root / "online").read_text())))
    except (OSError, ValueError):
        names = (re.fullmatch(r"node(\d+)", path.name) for path in root.glob("node*"))
        return tuple(sorted(int(name[1]) for name in names if name))


def node_cpus(node: int, root: Path = NODES) -> frozenset[int]:
    """CPUs of a node; empty for a node without any, or an unknown one."""
    try:
        return parse_cpulist((root / f"node{node}" / "cpulist").read_text())
    except (OSError, ValueError):
        return frozenset()


def pci_node(bus_id: str, root: Path = PCI_DEVICES) -> int | None:
    """The node that a PCI device is attached to; None where the host does not say."""
    try:
        node = int((root / normal_bus_id(bus_id) / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def gpu_node(index: int) -> int | None:
    """The node of visible CUDA device number `index`, or None. Raises DeviceError where there is no such device."""
    from checkpoint_engine.devices.cudart import runtime  # needs a GPU; the rest of this module does not

    return pci_node(runtime().pci_bus_id(index))


def bind_to_node(node: int | None, root: Path = NODES) -> frozenset[int]:
    """Keep the calling thread, and threads it starts from now on, on the node's CPUs, as far as it may use them.

    Returns the CPUs it is bound to; empty when nothing was changed: no node given, one node only, or none of its CPUs allowed.
    """
    if node is None or len(online_nodes(root)) < 2:
        return frozenset()
    cpus = node_cpus(node, root) & os.sched_getaffinity(0)
    if cpus:
        os.sched_setaffinity(0, cpus)
    return frozenset(cpus)


def node_mask(node: int) -> tuple[ctypes.Array[ctypes.c_ulong], int]:
    """The kernel's bit mask with one node set, and the number of bits to pass with it (it reads one less than it is told)."""
    words = node // _MASK_BITS + 1
    mask = (ctypes.c_ulong * words)()
    mask[node // _MASK_BITS] = 1 << node % _MASK_BITS
    return mask, words * _MASK_BITS + 1


def place_memory(address: int, nbytes: int, node: int) -> bool:
    """Prefer `node` for pages of [address, address + nbytes) that are touched from now on; `address` page-aligned.

    False where that is not possible (no such node, not permitted in this container, unknown architecture).
    """
    if (number := _MBIND.get(platform.machine())) is None or nbytes <= 0:
        return False
    mask, bits = node_mask(node)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    result = libc.syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(address),
        ctypes.c_ulong(nbytes),
        ctypes.c_int(_PREFERRED),
        mask,
        ctypes.c_ulong(bits),
        ctypes.c_uint(0),
    )
    return bool(result == 0)


def place_on_node(address: int, nbytes: int, node: int | None, root: Path = NODES) -> bool:
    """`place_memory` where the host has several nodes and `node` is known; otherwise nothing, and False."""
    if node is None or len(online_nodes(root)) < 2:
        return False
    return place_memory(address, nbytes, node)
