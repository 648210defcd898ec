"""One frozen settings object. Defaults are here and nowhere else; `from_environment` overlays the documented variables."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from checkpoint_engine.errors import SettingsError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def default_socket_dir() -> Path:
    """Where servers put their sockets: one directory per user, so that its mode can keep others out."""
    return Path(tempfile.gettempdir()) / f"checkpoint-engine-{os.getuid()}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sizes in bytes, times in seconds.

    device           "cuda" or "cpu"; None: cuda where there is one. The engine's process must see the same setting
    bucket_bytes     the unit of transfer; None: chosen from device and world size
    max_bucket_bytes no bucket that is chosen so gets larger
    ring_bytes       device memory shared with the worker; None: chosen from bucket_bytes
    nccl_channels    of the communicator that shares among GPUs; None: chosen from world size
    mem_fraction     at most this part of the smallest free device memory is used for the ring
    peer_copies      on one host, let each rank copy into the other ranks' rings instead of broadcasting
    map_regions      on a CPU, and one host, let workers load straight from the servers' memory instead of broadcasting
    method           how bytes reach the workers: "broadcast"; "pull", straight from the servers' memory (an error where that
                     cannot be); "auto": on one host what is predicted to be faster, where
                     registering what is pulled from pays back and it stays between updates
    recorded_loads   in the engine's process: "on": where the engine names its model, learn what its loader copies, prove it,
                     and copy without the loader from then on; "off": never; "auto": on a GPU where there is Triton
    sparse           whether buckets of which this rank's worker needs nothing, by its load plan, need not be sent to it: "on",
                     "off"; "auto": on a CPU, until it has run on GPUs
    verify           whether workers check every tensor, or the slices that they take, against the digest that its owner made when
                     it registered it, before any worker commits: "on", "off"; "auto": on, unless another rank is "off". "on"
                     on any rank is for all
    peer_reads       let peers that have this world's metas read the checkpoints that it gathered, over TCP and with a token
    peer_hosts       addresses of this host by which peers read, one for each network interface, separated by commas; empty: the
                     one by which the other ranks reach it
    peer_transport   by which this process reads peers: "auto" (shm on one host, else tcp), "tcp", "shm", "mooncake" or "nixl";
                     the last two must be named on the source, too
    peer_wait        for peers to end their reads when their checkpoint is unregistered
    holder_lease     REST: for another world that holds a checkpoint of this one to say again that it is there
    timelines        note when each stage was at work on which bucket; rank 0's report has it
    free_after_update  give ring, staging, communicator and memory to read into back after each update
    socket_dir       directory of the sockets a worker connects to; workers must see the same path
    socket_dir_mode  its mode; loosen it only where engines run as other users
    allowed_uids     users whose workers may connect, besides the server's own
    timeout          the whole of one update
    connect_timeout  for a peer that ought to be there already to answer
    attach_timeout   for every rank's worker to connect, once an update has begun: its engine may finish a step first
    join_timeout     for all ranks to reach the same collective call (gather_metas, update, barrier)
    commit_timeout   for a worker to acknowledge that it serves the new version
    stop_timeout     after a failure, for all ranks to stop together; what a rank that does not may still write to is given up
    pass_grace       how long the leader waits, once one worker asks for a further pass, for the others to ask too
    io_threads       threads that read and copy into host memory
    """

    device: str | None = None
    bucket_bytes: int | None = None
    max_bucket_bytes: int | None = None
    ring_bytes: int | None = None
    nccl_channels: int | None = None
    mem_fraction: float = 0.9
    peer_copies: bool = True
    map_regions: bool = True
    method: str = "auto"
    recorded_loads: str = "auto"
    sparse: str = "auto"
    verify: str = "auto"
    peer_reads: bool = True
    peer_hosts: str = ""
    peer_transport: str = "auto"
    peer_wait: float = 30.0
    holder_lease: float = 30.0
    timelines: bool = True
    free_after_update: bool = False
    socket_dir: Path = dataclasses.field(default_factory=default_socket_dir)
    socket_dir_mode: int = 0o700
    allowed_uids: frozenset[int] = frozenset()
    timeout: float = 600.0
    connect_timeout: float = 30.0
    attach_timeout: float = 120.0
    join_timeout: float = 300.0
    commit_timeout: float = 30.0
    stop_timeout: float = 5.0
    pass_grace: float = 0.05
    io_threads: int = dataclasses.field(default_factory=lambda: min(16, 2 * (os.cpu_count() or 4)))

    def __post_init__(self) -> None:
        for name in ("bucket_bytes", "max_bucket_bytes", "ring_bytes"):
            value = getattr(self, name)
            if value is not None and value < 4 * KIB:
                raise SettingsError(f"{name} must be at least 4096 bytes, not {value}")
        if not 0 < self.mem_fraction <= 1:
            raise SettingsError(f"mem_fraction must be in (0, 1], not {self.mem_fraction}")
        for name, known in _CHOICES.items():
            if (chosen := getattr(self, name)) not in known:
                raise SettingsError(f"{name} must be one of {', '.join(known)}, not {chosen!r}")
        for name in (*_TIMES, "io_threads"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingsError(f"{name} must be positive and finite, not {getattr(self, name)}")

    def replace(self, **changes: object) -> Self:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @classmethod
    def from_environment(cls, env: Mapping[str, str] | None = None, **overrides: object) -> Self:
        """Defaults, then the environment, then `overrides` that are not None.

        Raises SettingsError that names the variable when its value cannot be used.
        """
        env = os.environ if env is None else env
        values: dict[str, object] = {}
        for variable, (field, parse) in VARIABLES.items():
            if (text := env.get(variable)) is None or text == "":
                continue
            try:
                values[field] = parse(text)
            except ValueError as e:
                raise SettingsError(f"{variable}={text!r} cannot be used: {e}") from None
        values.update({k: v for k, v in overrides.items() if v is not None})
        return cls(**values)  # type: ignore[arg-type]


_TIMES = (
    "timeout", "connect_timeout", "attach_timeout", "join_timeout", "commit_timeout", "stop_timeout", "peer_wait", "holder_lease"
)  # fmt: skip
_CHOICES = {
    "method": ("auto", "broadcast", "pull"),
    "recorded_loads": ("auto", "on", "off"),
    "sparse": ("auto", "on", "off"),
    "verify": ("auto", "on", "off"),
    "peer_transport": ("auto", "tcp", "shm", "mooncake", "nixl"),
}


def _uids(text: str) -> frozenset[int]:
    return frozenset(int(part) for part in text.split(","))


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("use 0 or 1")
    return text == "1"


# Variable -> (field, parser). The first two are the contract's; PS_MAX_BUCKET_SIZE_GB counts GiB as upstream does.
VARIABLES: dict[str, tuple[str, Callable[[str], object]]] = {
    "PS_MAX_BUCKET_SIZE_GB": ("max_bucket_bytes", lambda s: int(float(s) * GIB)),
    "PS_MEM_FRACTION": ("mem_fraction", float),
    "CHECKPOINT_ENGINE_DEVICE": ("device", str),
    "CHECKPOINT_ENGINE_BUCKET_BYTES": ("bucket_bytes", int),
    "CHECKPOINT_ENGINE_RING_BYTES": ("ring_bytes", int),
    "CHECKPOINT_ENGINE_NCCL_CHANNELS": ("nccl_channels", int),
    "CHECKPOINT_ENGINE_PEER_COPIES": ("peer_copies", _flag),
    "CHECKPOINT_ENGINE_MAP_REGIONS": ("map_regions", _flag),
    "CHECKPOINT_ENGINE_METHOD": ("method", str),
    "CHECKPOINT_ENGINE_RECORDED_LOADS": ("recorded_loads", str),
    "CHECKPOINT_ENGINE_SPARSE": ("sparse", str),
    "CHECKPOINT_ENGINE_VERIFY": ("verify", str),
    "CHECKPOINT_ENGINE_PEER_READS": ("peer_reads", _flag),
    "CHECKPOINT_ENGINE_PEER_HOSTS": ("peer_hosts", str),
    "CHECKPOINT_ENGINE_PEER_TRANSPORT": ("peer_transport", str),
    "CHECKPOINT_ENGINE_PEER_WAIT": ("peer_wait", float),
    "CHECKPOINT_ENGINE_HOLDER_LEASE": ("holder_lease", float),
    "CHECKPOINT_ENGINE_TIMELINES": ("timelines", _flag),
    "CHECKPOINT_ENGINE_FREE_AFTER_UPDATE": ("free_after_update", _flag),
    "CHECKPOINT_ENGINE_SOCKET_DIR": ("socket_dir", Path),
    "CHECKPOINT_ENGINE_SOCKET_DIR_MODE": ("socket_dir_mode", lambda s: int(s, 8)),
    "CHECKPOINT_ENGINE_ALLOWED_UIDS": ("allowed_uids", _uids),
    "CHECKPOINT_ENGINE_TIMEOUT": ("timeout", float),
    "CHECKPOINT_ENGINE_CONNECT_TIMEOUT": ("connect_timeout", float),
    "CHECKPOINT_ENGINE_ATTACH_TIMEOUT": ("attach_timeout", float),
    "CHECKPOINT_ENGINE_JOIN_TIMEOUT": ("join_timeout", float),
    "CHECKPOINT_ENGINE_COMMIT_TIMEOUT": ("commit_timeout", float),
    "CHECKPOINT_ENGINE_STOP_TIMEOUT": ("stop_timeout", float),
    "CHECKPOINT_ENGINE_IO_THREADS": ("io_threads", int),
}
