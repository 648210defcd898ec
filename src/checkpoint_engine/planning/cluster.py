"""Clusters by their links, and how long an update on one would take: predictions, never measurements."""

from __future__ import annotations

import dataclasses
from typing import Self

import msgspec

from checkpoint_engine.errors import SettingsError
from checkpoint_engine.manifest import Manifest, RankManifest, RegionMeta, TensorMeta
from checkpoint_engine.planning import zoo
from checkpoint_engine.planning.buckets import plan_broadcast
from checkpoint_engine.planning.cost import Prediction, Rates, predict
from checkpoint_engine.planning.plan import Plan
from checkpoint_engine.planning.sizes import default_sizes
from checkpoint_engine.planning.stripe import stripe

VLLM_TENSOR_SECONDS = 60e-6
"""What vLLM's load_weights took for each tensor: 18 867 tensors in 1.13 s (Qwen3-30B-A3B on 2 x H200)."""
DEALINGS = ("stripe", "even", "held")
_PLENTY = 1 << 62  # bytes of free device memory, when nobody says


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """Hosts of one kind. Bytes per second; latencies in seconds.

    device           "cuda" or "cpu": whose default sizes and staging
    h2d              host to device, one GPU alone
    h2d_all          the same of each GPU when all of the host lift at once
    broadcast        a broadcast within a host, once it flows, while nothing else uses the GPUs
    beside_load      the part of it that is left while workers copy: their kernels and NCCL's take turns on the GPU
    peer             a copy from one GPU to another of its host, which a single host shares by; 0: they broadcast
    nic              what a host can send to the next one, all its NICs together; not used for a single host
    copy             the worker's copies out of the ring, bytes read
    update_seconds   what an update takes besides its stream: requests, agreement, commit
    lift_latency, share_latency, load_latency   more for every piece lifted, every piece shared, every bucket loaded
    peer_latency     how much later a copied piece is noticed
    hop_latency      how much later a broadcast reaches the next GPU of the host
    nic_latency      how much later it reaches the next host
    """

    name: str
    hosts: int
    gpus_per_host: int
    h2d: float
    h2d_all: float
    broadcast: float
    nic: float = 0.0
    peer: float = 0.0
    beside_load: float = 1.0
    copy: float = 1.7e12
    device: str = "cuda"
    update_seconds: float = 0.011
    lift_latency: float = 10e-6
    share_latency: float = 30e-6
    peer_latency: float = 100e-6
    load_latency: float = 100e-6
    hop_latency: float = 3.3e-6
    nic_latency: float = 25e-6

    @property
    def world_size(self) -> int:
        return self.hosts * self.gpus_per_host

    @property
    def copies(self) -> bool:
        """Whether ranks copy into each other's rings, as those of one host do by default."""
        return self.hosts == 1 and self.gpus_per_host > 1 and self.peer > 0

    @property
    def staging(self) -> int:
        """Staging slots of each rank: where they broadcast."""
        return 2 if self.device == "cuda" and self.world_size > 1 and not self.copies else 0

    @property
    def share(self) -> float:
        """Of a broadcast over all ranks, or of a copy to one: a ring through the hosts is as fast as its slowest link."""
        if self.copies:
            return self.peer
        within = self.broadcast * self.beside_load if self.gpus_per_host > 1 else self.nic
        return min(within, self.nic) if self.hosts > 1 else within

    def rates(self, tensor_seconds: float = VLLM_TENSOR_SECONDS) -> Rates:
        """For `planning.predict`. tensor_seconds: what the engine's own loader takes for each tensor.

        Raises SettingsError when a link has no rate, or a time is negative.
        """
        self._check()
        if tensor_seconds < 0:
            raise SettingsError(f"seconds per tensor must not be negative, but are {tensor_seconds}")
        between = self.nic_latency if self.hosts > 1 else self.hop_latency
        return Rates(
            lift=self.h2d_all if self.gpus_per_host > 1 else self.h2d,
            share=self.share if self.world_size > 1 else 1.0,
            load=self.copy,
            lift_latency=self.lift_latency,
            share_latency=self.peer_latency if self.copies else self.share_latency,
            copies=self.copies,
            hop_latency=((self.gpus_per_host - 1) * self.hop_latency + between) / self.gpus_per_host,
            load_latency=self.load_latency,
            load_per_tensor=tensor_seconds,
        )

    def _check(self) -> None:
        if self.hosts < 1 or self.gpus_per_host < 1:
            raise SettingsError(f"a cluster has hosts and GPUs, not {self.hosts} hosts of {self.gpus_per_host}")
        needed = {"h2d": self.h2d, "h2d_all": self.h2d_all, "copy": self.copy, "beside_load": self.beside_load}
        if self.gpus_per_host > 1:
            needed["broadcast"] = self.broadcast
        if self.hosts > 1:
            needed["nic"] = self.nic
        for what, value in needed.items():
            if not value > 0:
                raise SettingsError(f"cluster {self.name!r}: {what} must be positive, not {value}")

    def replace(self, **changes: object) -> Self:
        return msgspec.structs.replace(self, **changes)


class ClusterPrediction(msgspec.Struct, frozen=True, kw_only=True):
    """A prediction for one update, every rank of which receives the whole checkpoint. Bytes and seconds.

    seconds       of the whole update: a later one of a checkpoint of this shape, when plan, memory and communicator are there
    lift, share, load   seconds at work of each stage; of lifts, those of the rank that lifts longest
    bound_by      as in planning.Prediction
    link          what holds up the stage that bounds it, in words
    ring_bytes    device memory that server and worker share; staging_bytes: of the server alone, beside it
    """

    checkpoint: str
    nbytes: int
    tensors: int
    cluster: Cluster
    method: str
    tensor_seconds: float
    seconds: float
    lift: float
    share: float
    load: float
    bound_by: str
    link: str
    order: str
    buckets: int
    pieces: int
    bucket_bytes: int
    piece_bytes: int
    ring_bytes: int
    staging_bytes: int


def predict_cluster(
    checkpoint: Manifest | str,
    cluster: Cluster,
    *,
    method: str = "broadcast",
    tensor_seconds: float = VLLM_TENSOR_SECONDS,
    dealing: str = "stripe",
    bucket_bytes: int | None = None,
    ring_bytes: int | None = None,
) -> ClusterPrediction:
    """Predict an update of all ranks of `cluster`. Plans it as the servers would: seconds for a hundred thousand tensors.

    checkpoint    a manifest, or a name of planning.zoo
    dealing       which rank holds what: "stripe" as registering from files does, "even" each tensor to the rank with the
                  fewest bytes, "held" as the manifest says
    bucket_bytes, ring_bytes   None: the defaults of planning.default_sizes, with memory enough

    Raises SettingsError for an unknown name, method or dealing, a manifest of another world, a cluster without rates.
    """
    if method != "broadcast":
        raise SettingsError(f"there is no prediction for method {method!r}, only for broadcast")
    manifest = zoo.checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint
    rates, world = cluster.rates(tensor_seconds), cluster.world_size
    manifest = dealt(manifest, world, dealing)
    sizes = default_sizes(cluster.device, world, _PLENTY, 0.9, bucket_bytes, ring_bytes)
    plan = plan_broadcast(
        manifest,
        **dataclasses.asdict(sizes),
        rates=rates,
        staging=cluster.staging,
    )
    found = predict(plan, rates, world, staging=cluster.staging)
    return _describe(plan, found, manifest, cluster, method, tensor_seconds, cluster.staging * plan.piece_bytes)


def _describe(
    plan: Plan, found: Prediction, manifest: Manifest, cluster: Cluster, method: str, tensor_seconds: float, staged: int
) -> ClusterPrediction:
    return ClusterPrediction(
        checkpoint=manifest.checkpoint,
        nbytes=plan.nbytes,
        tensors=manifest.tensor_count,
        cluster=cluster,
        method=method,
        tensor_seconds=tensor_seconds,
        seconds=cluster.update_seconds + found.seconds,
        lift=found.lift,
        share=found.share,
        load=found.load,
        bound_by=found.bound_by,
        link=_link(found, plan, cluster, cluster.rates(tensor_seconds)),
        order=plan.order,
        buckets=len(plan.buckets),
        pieces=len(plan.stream),
        bucket_bytes=plan.bucket_bytes,
        piece_bytes=plan.piece_bytes,
        ring_bytes=plan.ring_bytes,
        staging_bytes=staged,
    )


def _link(found: Prediction, plan: Plan, cluster: Cluster, rates: Rates) -> str:
    tensors = sum(len(bucket.items) for bucket in plan.buckets)
    match found.bound_by:
        case "lift":
            return f"host to device, {rates.lift / 1e9:.0f} GB/s for each GPU"
        case "share" if cluster.copies:
            return f"copies to the {cluster.world_size - 1} other GPUs, {rates.share / 1e9:.0f} GB/s"
        case "share":
            flow = plan.nbytes / rates.share
            if 2 * flow < found.share:
                return "the latency of broadcasts and of their way around the ring"
            between = cluster.hosts > 1 and cluster.nic <= cluster.broadcast * cluster.beside_load
            return f"broadcasts {'between hosts' if between else 'within a host'}, {rates.share / 1e9:.0f} GB/s"
        case "load" if 2 * tensors * rates.load_per_tensor > found.load:
            return f"the engine's loader, {rates.load_per_tensor * 1e6:.0f} us for each of {tensors} tensors"
        case "load":
            return "the worker's copies and messages"
        case _:
            return "stages wait for one another"


def dealt(manifest: Manifest, world_size: int, dealing: str) -> Manifest:
    """The same tensors, each once, as `world_size` ranks would hold them: see predict_cluster.

    Raises SettingsError for an unknown dealing, and for "held" when the manifest is of another world.
    """
    if dealing not in DEALINGS:
        raise SettingsError(f"unknown dealing {dealing!r}; there are {', '.join(DEALINGS)}")
    if dealing == "held":
        if manifest.world_size != world_size:
            raise SettingsError(f"{manifest.checkpoint!r} is held by {manifest.world_size} ranks, not by {world_size}")
        return manifest
    by_name = {tensor.name: tensor for rank in manifest.ranks for region in rank.regions for tensor in region.tensors}
    sizes = [(name, tensor.nbytes) for name, tensor in by_name.items()]
    shares = stripe(sizes, world_size) if dealing == "stripe" else _even(sizes, world_size)
    return Manifest(
        manifest.checkpoint, tuple(_rank(number, [by_name[name] for name in share]) for number, share in enumerate(shares))
    )


def _even(sizes: list[tuple[str, int]], world_size: int) -> list[list[str]]:
    shares: list[list[str]] = [[] for _ in range(world_size)]
    held = [0] * world_size
    for name, nbytes in sizes:
        rank = held.index(min(held))
        shares[rank].append(name)
        held[rank] += nbytes
    return shares


def _rank(number: int, tensors: list[TensorMeta]) -> RankManifest:
    metas, offset = [], 0
    for tensor in tensors:
        metas.append(TensorMeta(tensor.name, tensor.dtype, tensor.shape, offset))
        offset += tensor.nbytes
    return RankManifest(number, "", "", (RegionMeta(offset, tuple(metas)),) if metas else ())
