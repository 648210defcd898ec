"""Clusters that can be asked for by name or by a probe's findings, and what upstream published for some of them.

Where each number comes from is in docs/cost-model.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from checkpoint_engine.errors import NOT_DECODED, SettingsError
from checkpoint_engine.planning.cluster import Cluster

GB = 1e9
BESIDE_LOAD = 0.5
"""Measured on 2 x H200: 125-130 GB/s in an update, 247 GB/s without one. Carried over to all others."""
NIC_EFFICIENCY = 0.96
"""Of NCCL's ring over 8 NICs a host: 192 of 200 GB/s (NVIDIA/nccl#812)."""


def _h2d_all(gpus: int) -> float:
    """Per GPU. Measured on H200 with PCIe 5 for 1, 2 and 4 GPUs; a host of 8 is taken for two such halves."""
    return (55 if gpus == 1 else 53 if gpus == 2 else 40) * GB


def _nic(gpus: int) -> float:
    """One NIC of 400 Gb/s for each GPU."""
    return gpus * 50 * GB * NIC_EFFICIENCY


def _h200(hosts: int, gpus: int) -> Cluster:
    # 64 MiB in 0.272 ms with 8 channels (two GPUs) and in 0.219 ms with 16, of which some 33 us do not flow.
    broadcast = (281 if gpus <= 2 else 359) * GB
    return _hopper("h200", hosts, gpus, broadcast, 380 * GB, 1.7e12)


def _h800(hosts: int, gpus: int) -> Cluster:
    return _hopper("h800", hosts, gpus, 160 * GB, 160 * GB, 1.2e12)


def _h20(hosts: int, gpus: int) -> Cluster:
    return _hopper("h20", hosts, gpus, 359 * GB, 380 * GB, 1.4e12)


def _hopper(name: str, hosts: int, gpus: int, broadcast: float, peer: float, copy: float) -> Cluster:
    return Cluster(
        name=name,
        hosts=hosts,
        gpus_per_host=gpus,
        h2d=55 * GB,
        h2d_all=_h2d_all(gpus),
        broadcast=broadcast,
        peer=peer,
        beside_load=BESIDE_LOAD,
        nic=_nic(gpus),
        copy=copy,
    )


_PRESETS: dict[str, Callable[[int, int], Cluster]] = {"h200": _h200, "h800": _h800, "h20": _h20}
KINDS = tuple(_PRESETS)


def preset(kind: str, hosts: int, gpus_per_host: int) -> Cluster:
    """Raises SettingsError that lists the kinds when there is no `kind`."""
    if kind not in _PRESETS:
        raise SettingsError(f"no cluster of kind {kind!r}; known are {', '.join(KINDS)}")
    return _PRESETS[kind](hosts, gpus_per_host)


class _Message(msgspec.Struct):
    nbytes: int
    rate: float


class _Found(msgspec.Struct):
    """Of devices.probe.Ceilings, what is needed here."""

    host: str
    device: str
    memcpy: float
    h2d_alone: tuple[float, ...] = ()
    h2d_together: tuple[float, ...] = ()
    device_copy: tuple[float, ...] = ()
    peer_copy: tuple[float, ...] = ()
    broadcast: tuple[_Message, ...] = ()


def from_probe(data: bytes, hosts: int, gpus_per_host: int, nic: float | None = None) -> Cluster:
    """A cluster of hosts like the one that `checkpoint-engine probe --json` described.

    nic  bytes per second from host to host; None: as with the presets, one NIC of 400 Gb/s for each GPU (none for CPUs)

    Raises SettingsError when `data` is no such description, or when it was made by one rank and several share a host.
    """
    try:
        found = msgspec.json.decode(data, type=_Found)
    except NOT_DECODED as e:
        raise SettingsError(f"this is not what `checkpoint-engine probe --json` prints: {e}") from None
    gpu = found.device == "cuda"
    if gpus_per_host > 1 and not found.broadcast:
        raise SettingsError(f"the probe of {found.host} measured no broadcast; run it with all GPUs, or --ranks 2")
    flow, latency = _flow(found.broadcast)
    return Cluster(
        name=found.host,
        device=found.device,
        hosts=hosts,
        gpus_per_host=gpus_per_host,
        h2d=min(found.h2d_alone) if gpu else found.memcpy,
        h2d_all=min(found.h2d_together) if gpu else found.memcpy / gpus_per_host,
        broadcast=flow,
        peer=min(found.peer_copy, default=0.0),
        beside_load=BESIDE_LOAD,
        nic=nic if nic is not None else _nic(gpus_per_host) if gpu else 0.0,
        copy=min(found.device_copy) if gpu else found.memcpy / gpus_per_host,
        share_latency=latency,
    )


def _flow(messages: tuple[_Message, ...]) -> tuple[float, float]:
    """(bytes per second once a broadcast flows, seconds before it does), from the smallest and the largest message."""
    if not messages:
        return 0.0, 0.0
    small, large = min(messages, key=lambda m: m.nbytes), max(messages, key=lambda m: m.nbytes)
    seconds = large.nbytes / large.rate - small.nbytes / small.rate
    if large.nbytes == small.nbytes or seconds <= 0:
        return large.rate, 0.0
    flow = (large.nbytes - small.nbytes) / seconds
    return flow, max(0.0, small.nbytes / small.rate - small.nbytes / flow)


class Published(NamedTuple):
    """A broadcast update as upstream's README of 0.4.2 lists it: seconds of its "Update", without gathering metadata."""

    model: str
    kind: str
    hosts: int
    gpus_per_host: int
    seconds: float


PUBLISHED = (
    Published("glm-4.5-air", "h800", 1, 8, 3.47),
    Published("qwen3-235b-a22b", "h800", 1, 8, 6.22),
    Published("deepseek-v3.1", "h20", 2, 8, 10.19),
    Published("kimi-k2", "h20", 2, 8, 14.36),
    Published("deepseek-v3.1", "h20", 32, 8, 11.33),
    Published("kimi-k2", "h20", 32, 8, 16.04),
)
