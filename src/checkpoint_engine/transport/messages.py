"""Every message on every wire, one small struct each. No pickle; nothing in a message is ever executed."""

from __future__ import annotations

import msgspec

from checkpoint_engine.devices.base import SharedHandle
from checkpoint_engine.planning.plan import Item
from checkpoint_engine.timeline import Span

PROTOCOL = 5
"""Raised by one whenever a message changes its meaning; both ends come from the installed package."""


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A tagged array on the wire: [type, field, ...]."""


class Slicing(msgspec.Struct, frozen=True, array_like=True):
    """How slices are checked. names: of what workers take (Taken.name), "" if unknown: in Begin by rank, in Attach its. items:
    a bit for each tensor: 1 where sums of slices are asked for. tell: say in Ready what you take; in Begin, to the unnamed."""

    names: tuple[str, ...] = ()
    items: bytes = b""
    tell: bool = False


# --- worker -> server, over a session ---------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """I am ready to load. `plans`: digests of the tables that I still have. slices: names (Taken.name) of what I take where I
    replay, whose sums I can make."""

    pid: int
    device: str
    version: str | None
    dirty: bool
    plans: tuple[str, ...]
    slices: tuple[str, ...] = ()


class Loaded(Message, frozen=True):
    """The bucket's tensors are in place and its bytes in the ring may be overwritten. seconds: in all;
    inside: of them, in the engine's own `run`."""

    bucket: int
    seconds: float
    inside: float


class Spent(msgspec.Struct, frozen=True, array_like=True):
    """What a worker tells of one stream. seconds: at work, by stage: "worker" (all that its Python did, waiting left out), and of
    it "record", "prove" or "replay"; "verify": while any digest was being made. verified: bytes that had theirs. notes: for
    people, about its load plan. spans: by its own `time.perf_counter`."""

    seconds: dict[str, float] = {}
    notes: tuple[str, ...] = ()
    verified: int = 0
    spans: tuple[Span, ...] = ()


class Again(Message, frozen=True):
    """All buckets are loaded and the memories unmapped, but I need the stream once more before I can be ready."""

    spent: Spent = Spent()


class Ready(Message, frozen=True):
    """All is loaded, the ring unmapped, the post-hook done; `seconds` inside it. way: how the last stream was loaded, "loader",
    "proved", "replayed". pull: bytes that a replay of this checkpoint reads on this rank; -1: it has no plan for it, or cannot
    read the servers' memory. needs: buckets that a replay takes anything of, as bits; empty: all. sums: 8 bytes for each tensor
    that Attach asked for slices of. taken: a Taken, if asked for. ahead: Attach's regions of that name are there to be read."""

    seconds: float
    spent: Spent = Spent()
    way: str = "loader"
    pull: int = -1
    needs: bytes = b""
    sums: bytes = b""
    taken: bytes = b""
    ahead: bool = False


class Committed(Message, frozen=True):
    """This worker serves the version that Commit named."""


class Failed(Message, frozen=True):
    """This worker cannot go on. bucket: -1 outside of loading. dirty: some bytes were loaded already. wrong: names of tensors
    that are not what was registered."""

    stage: str
    bucket: int
    reason: str
    dirty: bool
    wrong: tuple[str, ...] = ()


# --- server -> worker -------------------------------------------------------------------------------------------------


class Table(Message, frozen=True):
    """A bucket's tensors; offset, nbytes: its place in the memory, to which its items' offsets are relative."""

    offset: int
    nbytes: int
    items: tuple[Item, ...]


class Attach(Message, frozen=True):
    """Map these memories (descriptors travel beside the message): the ring, or all ranks' regions. `tables` is None when
    Hello named the plan. ahead: all ranks' regions, which a later update is going to be pulled from; their descriptors follow.
    digests: of the tables' tensors, in order (planning.digests), which they must have; empty: nothing is checked. slicing: of
    which tensors only slices are. coming: the buckets of this stream, one bit each (planning.bits); empty: all."""

    rank: int
    memories: tuple[SharedHandle, ...]
    plan: str
    tables: tuple[Table, ...] | None
    ahead: tuple[SharedHandle, ...] = ()
    digests: bytes = b""
    slicing: Slicing = Slicing()
    coming: bytes = b""


class Load(Message, frozen=True):
    """The bucket's bytes are complete in the ring."""

    bucket: int


class Release(Message, frozen=True):
    """No further bucket comes: unmap the ring, run the post-hook."""


class Commit(Message, frozen=True):
    """All workers of all ranks are ready: this version is what you serve from now on."""

    version: str


class Abort(Message, frozen=True):
    """The update failed, here or elsewhere."""

    reason: str


FromWorker = Hello | Loaded | Again | Ready | Committed | Failed
FromServer = Attach | Load | Release | Commit | Abort

# --- server <-> server, over links ------------------------------------------------------------------------------------


class Introduce(Message, frozen=True):
    """First on a link: who I am, and the secret that the store handed to members of this fleet only."""

    rank: int
    secret: bytes


class Give(Message, frozen=True):
    """Member to leader: my part of an exchange."""

    round: int
    what: str
    payload: bytes


class Given(Message, frozen=True):
    """Leader to members: everybody's parts, in rank order."""

    round: int
    payloads: tuple[bytes, ...]


class Withdrawn(Message, frozen=True):
    """This round will not come about. what: the leader's call; empty in a member's message."""

    round: int
    reason: str
    what: str = ""


class Waiting(Message, frozen=True):
    """A worker of this rank waits for pass number `pass_`. slices: as in Hello."""

    update: int
    pass_: int
    slices: tuple[str, ...] = ()


class Returned(Message, frozen=True):
    """This rank's request to the engine has returned. absent: it asked no engine, so no worker will come here."""

    update: int
    absent: bool = False


class Begin(Message, frozen=True):
    """Leader: start pass `pass_`; the workers of `ranks` take part, the others' ranks relay. again: they are workers of the pass
    before, which need its stream once more; that pass's other workers are ready. slicing: what to ask of them."""

    update: int
    pass_: int
    ranks: tuple[int, ...]
    again: bool = False
    slicing: Slicing = Slicing()


class StageStats(msgspec.Struct, frozen=True):
    """What one stage did on one rank: bytes moved and seconds it was at work."""

    nbytes: int = 0
    seconds: float = 0.0


class PassDone(Message, frozen=True):
    """This rank's worker is ready to commit pass `pass_` (or had none in it); again: it needs the stream once more first.
    stats, ways, notes: of the whole update so far. sums, taken: as in Ready."""

    update: int
    pass_: int
    stats: dict[str, StageStats]
    again: bool = False
    ways: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sums: bytes = b""
    taken: bytes = b""


class CommitPass(Message, frozen=True):
    """Leader: every rank is ready."""

    update: int
    pass_: int


class Settled(Message, frozen=True):
    """This rank's worker has committed pass `pass_`. spans: of the pass on this rank, for rank 0."""

    update: int
    pass_: int
    spans: tuple[Span, ...] = ()


class End(Message, frozen=True):
    """Leader: the update is over; all ranks' stage statistics, in rank order, how their workers loaded, and notes."""

    update: int
    stats: tuple[dict[str, StageStats], ...]
    ways: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Failure(Message, frozen=True):
    """The update failed on `rank`."""

    update: int
    rank: int
    host: str
    stage: str
    reason: str


class Stopped(Message, frozen=True):
    """After a failure: of this update's broadcasts, in the order of the stream, this rank queued its own among the first
    `posted`, the last of them too, and queues no more by itself."""

    update: int
    posted: int


class Goodbye(Message, frozen=True):
    """This server leaves in good order."""


class Lost(Message, frozen=True):
    """Never on the wire: the link to `rank` broke."""

    rank: int
    reason: str


OverLink = (
    Introduce
    | Give
    | Given
    | Withdrawn
    | Waiting
    | Returned
    | Begin
    | PassDone
    | CommitPass
    | Settled
    | End
    | Failure
    | Stopped
    | Goodbye
)
