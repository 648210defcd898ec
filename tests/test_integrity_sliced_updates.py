"""Updates whose workers check only the slices that they took: what changes anywhere is caught before the commit, and named.

The checkpoint is split as a tensor-parallel model's: q, k and v by rows, down by columns, norms on every rank. Of each expert one
rank takes half, and none the rest: experts are checked whole, by that rank.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import pytest
import torch

from checkpoint_engine.devices.base import get_device
from checkpoint_engine.errors import IntegrityError, ProtocolError, UpdateError
from checkpoint_engine.loads.plan import Copy, LoadersTensor, LoadPlan, PlannedTensor, Slot, Storage
from checkpoint_engine.loads.replay import Prepared
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.memory.checksum import digest
from checkpoint_engine.memory.slices import slice_sum
from checkpoint_engine.planning.digests import pack
from checkpoint_engine.planning.plan import Bucket, Item, Plan
from checkpoint_engine.planning.slices import Slice, Taken
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.server.expected import Expected
from checkpoint_engine.server.slices import SliceBook, SliceCheck
from checkpoint_engine.transport.messages import Attach, Slicing, Table
from checkpoint_engine.worker import slices
from checkpoint_engine.worker.check import Check
from checkpoint_engine.worker.sliced_check import with_slices
from checkpoint_engine.worker.slices import Asked, Piece, SliceSums, _cut, taken_of
from helpers import recorded
from helpers.fleet import Worker, server, share_of, worker_processes
from helpers.ranks import run_ranks
from helpers.recorded import Deed, checkpoint, fresh

KIB = 1 << 10
TOTAL = sum(t.nbytes for t in checkpoint(0).values())
NORMS = sum(t.nbytes for name, t in checkpoint(0).items() if "norm" in name)
EXPERTS = sum(t.nbytes for name, t in checkpoint(0).items() if "experts" in name)
SLICES = (TOTAL - NORMS - EXPERTS) // 2 + EXPERTS // 2 + NORMS
"""Bytes that each of two ranks reads to check them."""
FOUND = re.compile(
    r"rank (\d) \(.+\), stage verify: the bytes of tensor '(.+)', from rank (\d) \(.+\), are not those that were registered"
    r"(?: \(nor are \d+ more\))?(?:, in the slices? that (ranks? .+) took)?"
)


class _Engine(recorded._Engine):
    """One whose replays go wrong where it is ordered to: "spoil", a parameter of layer 2; "break" off."""

    def update(self, handle: str, deed: Deed) -> str:
        with pytest.MonkeyPatch.context() as patch:
            if deed.what == "spoil":
                patch.setattr(Prepared, "replay", self._spoiling(getattr(self.net.layers[2], deed.where)))
            if deed.what == "break":
                patch.setattr(Prepared, "replay", _breaking)
            return super().update(handle, deed)

    def _spoiling(self, parameter: torch.Tensor) -> Callable[..., None]:
        replay = Prepared.replay

        def spoil(prepared: Prepared, memories: Sequence[torch.Tensor]) -> None:
            before = parameter.clone()
            replay(prepared, memories)
            if not torch.equal(before, parameter):
                parameter.view(torch.int16).view(-1)[0] ^= 64

        return spoil


def _breaking(*_: Any) -> None:
    raise ValueError("ordered to break off")


def _serve(pipe: Connection, *arguments: Any) -> None:
    slices.SMALL_BYTES = 0
    recorded._Engine = _Engine  # type: ignore[misc]
    recorded._engine(pipe, *arguments)


def engines(kinds: Sequence[str]) -> contextlib.AbstractContextManager[list[Worker]]:
    return worker_processes(_serve, [(rank, rank, len(kinds), kind) for rank, kind in enumerate(kinds)])


class Step(NamedTuple):
    """One update. deeds: of the ranks' workers. flipped: the tensor of which the owner's memory changes after registering, in its
    last byte."""

    deeds: tuple[Deed, ...] = (Deed(), Deed())
    flipped: str = ""


class Seen(NamedTuple):
    """error: or, of an update that went well, "". verified: bytes, by rank. unsent: of all ranks."""

    error: str
    ways: set[str]
    verified: list[int]
    version: str | None
    dirty: bool
    right: bool
    unsent: int


def _flip(ps: ParameterServer, rank: int, name: str) -> None:
    with ps._registry.use("c") as held:
        for region, meta in zip(held.regions, ps.get_metas().ranks[rank].regions, strict=True):
            for tensor in meta.tensors:
                if tensor.name == name:
                    region.tensor[tensor.offset + tensor.nbytes - 1] ^= 64


def _course(
    rank: int, world_size: int, crew: list[Worker], kinds: Sequence[str], method: str, steps: Sequence[Step]
) -> list[Seen]:
    seen = []
    with server(method=method, bucket_bytes=8 * KIB, verify="on") as ps:
        for number, step in enumerate(steps):
            weights, deed = checkpoint(number, kinds[rank]), step.deeds[rank]
            ps.register_checkpoint("c", named_tensors=share_of(weights, rank, world_size))
            ps.gather_metas("c")
            _flip(ps, rank, step.flipped)
            error, ways, verified, unsent = "", set[str](), list[int](), 0
            try:
                report = ps.update(
                    "c", lambda handles, deed=deed: crew[rank].ask("update", handles[rank][1], deed), version=f"v{number}"
                )
                ways, verified = set(report.ways), [stages["verify"].nbytes for stages in report.ranks]
                unsent = report.unsent
            except UpdateError as e:
                error = str(e)
            version, dirty, state, _, _ = crew[rank].ask("state")
            right = state == fresh(weights, rank, world_size, kinds[rank])
            seen.append(Seen(error, ways, verified, version, dirty, right, unsent))
            ps.unregister_checkpoint("c")
    return seen


def course(method: str, *steps: Step, kinds: Sequence[str] = ("", "")) -> list[list[Seen]]:
    with engines(kinds) as crew:
        return run_ranks(_course, len(kinds), crew, kinds, method, steps)


def good(seen: Seen, number: int) -> bool:
    return not seen.error and (seen.version, seen.dirty, seen.right) == (f"v{number}", False, True)


@pytest.mark.parametrize("method", ["broadcast", "pull"])
def test_a_bit_of_a_slice_in_the_owners_memory(method: str) -> None:
    for seen in course(method, Step(), Step(), Step(flipped="layers.2.down"), Step(), Step()):
        proved, replayed, failed, again, last = seen
        assert proved.ways == {"proved"} and proved.verified[0] > TOTAL
        assert replayed.ways == last.ways == {"replayed"}
        assert replayed.verified == last.verified == [SLICES] * 2, "of q, k, v and down only what it takes"
        found = FOUND.search(failed.error)
        assert found, failed.error
        assert found[2] == "layers.2.down" and found[4] == "ranks 0 and 1", "either may have read it wrongly"
        assert found[3] == str(list(checkpoint(0)).index("layers.2.down") % 2), "the rank whose memory it came from"
        assert (failed.version, failed.dirty) == ("v1", True), "nothing was committed"
        assert again.ways == {"proved"}
        assert all(good(each, number) for number, each in enumerate(seen) if number != 2)


def test_a_replay_that_puts_a_wrong_byte_into_the_model() -> None:
    """What the check of whole tensors in the servers' memory does not see."""
    norm, down = Deed("spoil", "norm"), Deed("spoil", "down")
    for seen in course("pull", Step(), Step((Deed(), norm)), Step(), Step((down, Deed())), Step(), Step()):
        first, second = FOUND.search(seen[1].error), FOUND.search(seen[3].error)
        assert first and (first[1], first[2], first[4]) == ("1", "layers.2.norm", "rank 1"), "rank 0 has the same"
        assert second and (second[2], second[4]) == ("layers.2.down", "ranks 0 and 1")
        assert (seen[1].version, seen[3].version) == ("v0", "v2"), "nothing was committed"
        assert seen[2].ways == seen[4].ways == {"proved"}, "no plan is trusted any more"
        assert seen[5].ways == {"replayed"}
        assert all(good(each, number) for number, each in enumerate(seen) if number not in (1, 3))


def test_a_bit_of_what_nobody_takes() -> None:
    """Of a tensor that both take a part of it is found, as all of it is checked then; q, k and down are checked by slices."""
    kinds = ("drops a row", "drops a row")
    for seen in course("pull", Step(), Step(), Step(flipped="layers.1.v"), Step(), kinds=kinds):
        assert seen[1].ways == {"replayed"}
        v = sum(t.nbytes for name, t in checkpoint(0).items() if name.endswith(".v"))
        assert seen[1].verified == [SLICES + v // 2] * 2
        found = FOUND.search(seen[2].error)
        assert found and found[2] == "layers.1.v" and found[4] is None
        assert good(seen[0], 0) and good(seen[1], 1) and good(seen[3], 3)


def test_what_the_loader_must_get_is_checked_whole() -> None:
    """One rank's loader casts norms: they are checked whole on both, the others by slices."""
    for seen in course("pull", Step(), Step(), Step(flipped="layers.3.norm"), Step(), kinds=("", "casts")):
        assert seen[1].verified == [SLICES] * 2
        found = FOUND.search(seen[2].error)
        assert found and found[2] == "layers.3.norm" and found[4] is None
        assert good(seen[0], 0) and good(seen[1], 1) and good(seen[3], 3)


@pytest.mark.parametrize("method", ["broadcast", "pull"])
def test_a_rank_that_cannot_replay_does_not_keep_the_others_slices_from_being_checked(method: str) -> None:
    """A replay that breaks off is done by the loader; parameters that moved are recorded anew. Both in an update of slices."""
    broken, moved = Deed("break"), Deed("move")
    for seen in course(method, Step(), Step((broken, Deed())), Step(), Step()):
        assert all(good(each, number) for number, each in enumerate(seen)), seen
        assert seen[1].ways == {"loader", "replayed"}
        assert seen[1].verified[1] == SLICES
    for seen in course(method, Step(), Step((Deed(), moved)), Step()):
        assert all(good(each, number) for number, each in enumerate(seen)), seen
        assert seen[1].ways == {"replayed", "proved"} and seen[2].ways == {"replayed"}
        assert seen[2].verified == [SLICES] * 2
    for seen in course(method, Step(), Step((Deed("move"), Deed("spoil", "norm")))):
        found = FOUND.search(seen[1].error)
        assert found and (found[2], found[4]) == ("layers.2.norm", "rank 1")
        assert seen[1].version == "v0"


def check_a_rank_that_cannot_replay_and_a_replay_that_goes_wrong(method: str) -> None:
    """For those who check slices in other ways."""
    test_a_rank_that_cannot_replay_does_not_keep_the_others_slices_from_being_checked(method)
    for seen in course(method, Step(), Step(), Step((Deed("spoil", "down"), Deed())), Step()):
        found = FOUND.search(seen[2].error)
        assert found and (found[2], found[4]) == ("layers.2.down", "ranks 0 and 1")
        assert seen[3].ways == {"proved"} and good(seen[3], 3)


def test_slices_of_what_was_sent(sharing: str) -> None:
    """In sparse streams, too: of what nobody needs no rank takes or checks anything; and a rank that lacks something after all
    makes the sums of its slices in the stream that comes whole."""
    kinds, moved, flipped = ("apart", "apart"), (Deed(), Deed("move")), "layers.2.down"
    for seen in course("broadcast", Step(), Step(), Step(flipped=flipped), Step(), Step(moved), Step(), kinds=kinds):
        assert [each.unsent > 0 for each in seen] == [False, True, False, False, True, True]
        assert [each.ways for each in seen[:2]] == [{"proved"}, {"replayed"}]
        found = FOUND.search(seen[2].error)
        assert found and (found[2], found[4]) == (flipped, "ranks 0 and 1") and seen[2].version == "v1"
        assert seen[4].ways == {"replayed", "proved"} and seen[5].ways == {"replayed"}
        assert seen[1].verified == seen[5].verified
        assert all(good(each, number) for number, each in enumerate(seen) if number != 2)


def _dies(rank: int, world_size: int, crew: list[Worker]) -> list[str]:
    seen = []
    with server(method="pull", bucket_bytes=8 * KIB, verify="on") as ps:
        for deed in (Deed(), Deed("die", "post_hook") if rank else Deed()):
            ps.register_checkpoint("c", named_tensors=share_of(checkpoint(0), rank, world_size))
            ps.gather_metas("c")
            try:
                ps.update("c", lambda handles, deed=deed: crew[rank].ask("update", handles[rank][1], deed))
                seen.append("")
            except UpdateError as e:
                seen.append(str(e))
            ps.unregister_checkpoint("c")
    return seen


def test_a_worker_that_dies_before_it_told_its_sums() -> None:
    with engines(("", "")) as crew:
        for seen in run_ranks(_dies, 2, crew):
            assert seen[0] == "" and "rank 1" in seen[1] and "verify" not in seen[1]


# --- rank 0's part ---------------------------------------------------------------------------------------------------------

LEFT, RIGHT, WHOLE = Slice(0, 4, (3,), (8,)), Slice(4, 4, (3,), (8,)), Slice(0, 24)
CONTENT = torch.arange(24, dtype=torch.uint8)
SUMS = {part: slice_sum(CONTENT, part.first, part.strides, part) for part in (LEFT, RIGHT, WHOLE)}


def plan(count: int) -> Plan:
    items = tuple(Item(f"t{n}", "uint8", (24,), 32 * n, 24) for n in range(count))
    return Plan(1, 1, 1, "layers", (Bucket(0, 32 * count, -1, items, ()),), ())


def checking(ranks: Sequence[Sequence[Slice | None]], digests: Sequence[int] | None = None) -> tuple[SliceCheck, Slicing]:
    """What ranks take of each tensor: one slice; None: nothing."""
    count = len(ranks[0])
    made = plan(count)
    taken = [Taken(tuple((part,) if part else () for part in parts)) for parts in ranks]
    packed = pack(digests or [digest(CONTENT)] * count)
    check = SliceCheck(SliceBook(), made, packed, lambda names, takers: IntegrityError(names, takers=takers))
    assert check.begin({rank: (each.name,) for rank, each in enumerate(taken)}, len(ranks)) == Slicing(tell=True)
    for rank, each in enumerate(taken):
        check.hear(rank, b"", each.encode())
    return check, check.begin({rank: ("other", each.name) for rank, each in enumerate(taken)}, len(ranks))


def test_sums_of_ranks_make_up_the_tensors() -> None:
    check, slicing = checking([[LEFT, WHOLE, None], [RIGHT, WHOLE, WHOLE]])
    assert slicing.items == b"\x07" and not slicing.tell and len(slicing.names) == 2
    check.hear(0, pack([SUMS[LEFT], SUMS[WHOLE], 0]), b"")
    check.hear(1, pack([SUMS[RIGHT], SUMS[WHOLE], SUMS[WHOLE]]), b"")
    assert check.verdict() is None


@pytest.mark.parametrize(
    ("ranks", "wrong", "blamed"),
    [
        ([LEFT, RIGHT], {0}, [0, 1]),
        ([LEFT, RIGHT, LEFT, RIGHT], {2}, [2]),
        ([LEFT, RIGHT, LEFT, RIGHT], {0, 2}, [0, 1, 2, 3]),
        ([LEFT, RIGHT, LEFT, RIGHT], {0, 3}, [0, 3]),
        ([WHOLE, WHOLE, WHOLE], {1}, [1]),
        ([WHOLE, LEFT, RIGHT], {0}, [0]),
        ([WHOLE, LEFT, RIGHT], {2}, [1, 2]),
        ([None, WHOLE], {1}, [1]),
    ],
)
def test_ranks_are_blamed_where_the_others_sums_say_who_it_was(
    ranks: list[Slice | None], wrong: set[int], blamed: list[int]
) -> None:
    check, _ = checking([[part, WHOLE] for part in ranks])
    for rank, part in enumerate(ranks):
        check.hear(rank, pack([(SUMS[part] if part else 0) + (rank in wrong), SUMS[WHOLE]]), b"")
    found = check.verdict()
    assert found is not None and isinstance(found[1], IntegrityError)
    assert (found[0], found[1].tensors, list(found[1].takers)) == (blamed[0], ("t0",), blamed)


def test_a_tensor_without_a_digest_is_not_asked_for_and_every_wrong_one_is_named() -> None:
    check, slicing = checking([[WHOLE] * 10], [0, *[digest(CONTENT)] * 9])
    assert slicing.items == b"\xfe\x03"
    check.hear(0, pack([SUMS[WHOLE] + (n in (3, 8)) for n in range(9)]), b"")
    found = check.verdict()
    assert found is not None and isinstance(found[1], IntegrityError) and found[1].tensors == ("t4", "t9")


def test_a_rank_that_tells_nothing_or_nonsense() -> None:
    check, _ = checking([[LEFT], [RIGHT]])
    check.hear(0, pack([SUMS[LEFT]]), b"")
    found = check.verdict()
    assert found is not None and found[0] == 1 and "did not tell" in str(found[1])
    for rank, sums in ((1, b"1" * 16), (2, b"1" * 8)):
        with pytest.raises(ProtocolError, match="sums of slices"):
            check.hear(rank, sums, b"")
    with pytest.raises(ProtocolError, match="slices"):
        check.hear(1, b"", Taken(((WHOLE,), ())).encode())


def test_a_later_stream_of_a_pass_counts_and_a_further_pass_begins_anew() -> None:
    check, _ = checking([[LEFT], [RIGHT]])
    check.hear(0, pack([1]), b"")
    check.hear(1, pack([SUMS[RIGHT]]), b"")
    check.hear(0, pack([SUMS[LEFT]]), b"")
    check.hear(1, b"", b"")
    assert check.verdict() is None
    assert check.begin({0: ("unknown",), 1: ()}, 2) == Slicing(tell=True)
    assert check.verdict() is None, "whole tensors were checked"


def test_what_was_told_is_not_asked_again_while_another_rank_tells_nothing() -> None:
    """An engine that never replays keeps the others from being checked by slices, but costs them nothing else."""
    made = plan(1)
    taken, expected = Taken(((WHOLE,),)), Expected(made, Manifest("c", ()))
    check = SliceCheck(SliceBook(), made, pack([digest(CONTENT)]), lambda names, takers: IntegrityError(names, takers=takers))
    told = []
    for _ in range(2):
        slicing = check.begin({0: (), 1: (taken.name,)}, 3)
        assert not slicing.items
        for rank in range(2):
            expected.ask(slicing, rank)
            told.append(expected.slicing.tell)
        check.hear(1, b"", taken.encode())
        assert check.verdict() is None
    assert told == [True, True, True, False]


def test_without_digests_nobody_is_asked() -> None:
    check = SliceCheck(SliceBook(), plan(1), b"", lambda names, takers: IntegrityError(names, takers=takers))
    assert check.begin({0: ()}, 1) == Slicing() and check.verdict() is None


# --- a worker's part -------------------------------------------------------------------------------------------------------

TABLES = (Table(0, 64, (Item("t0", "uint8", (24,), 0, 24), Item("t1", "uint8", (24,), 32, 24))),)
CPU = get_device("cpu")


def asking(slicing: Slicing) -> Attach:
    return Attach(0, (), "a plan", TABLES, slicing=slicing)


def test_without_a_replay_sums_are_those_of_the_servers_memory() -> None:
    memory = torch.zeros(64, dtype=torch.uint8)
    memory[:24], memory[32:56] = CONTENT, CONTENT
    taken = Taken(((LEFT,), (RIGHT,)))
    with with_slices(Check(), asking(Slicing(("x",), b"\x03")), {"x": taken}, TABLES, [memory], None, CPU, 20.0) as check:
        check.begin(0, None)
        check.before_load(0)
        memory.zero_()  # overwritten by a later bucket
        check.loaded(0)
        check.finish()
        assert check.sums == pack([SUMS[LEFT], SUMS[RIGHT]])
        assert check.nbytes == 24


@pytest.mark.parametrize("slicing", [Slicing(("y",), b"\x03"), Slicing((), b"\x03"), Slicing(("x",), b"\x03\0")])
def test_what_a_server_asks_for_must_fit(slicing: Slicing) -> None:
    with pytest.raises(ProtocolError, match="slices"):
        with_slices(Check(), asking(slicing), {"x": Taken(((LEFT,), (RIGHT,)))}, TABLES, [], None, CPU, 20.0)


def test_what_a_worker_tells_is_what_a_server_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of tensors in more slices, or dimensions, than it takes, nor of what goes into a staged layer, gone by then."""
    monkeypatch.setattr(slices, "SMALL_BYTES", 0)
    nbytes, deep = 1 << 17, tuple(1 << n for n in reversed(range(17)))
    copies = {
        "whole": (Copy(0, 0, 0, nbytes),),
        "deep": (Copy(0, 0, 0, 1, (2,) * 17, deep, deep),),
        "many": tuple(Copy(2 * n, 0, 2 * n, 1) for n in range(257)),
        "staged": (Copy(0, 0, 0, 1), Copy(1, 1, 0, 1)),
        "nothing": (),
    }
    storages = Storage(nbytes, ("w",)), Storage(nbytes, ("l.w",), Slot("l", "w", "uint8", (nbytes,), (1,)))
    planned = tuple(PlannedTensor(name, "uint8", (nbytes,), each) for name, each in copies.items())
    plan = LoadPlan("", "", storages, planned, (LoadersTensor("loader's", ""),))
    plan.check()
    items = tuple(Item(name, "uint8", (nbytes,), 0, nbytes) for name in (*copies, "loader's"))
    taken = taken_of(plan, [Table(0, nbytes, items)])
    assert taken.parts == ((Slice(0, nbytes),), None, None, None, (), None)
    assert Taken.decode(taken.encode(), [nbytes] * 6) == taken


def test_a_slice_outside_of_its_tensor() -> None:
    sums = SliceSums(Asked(Slicing(("x",), b"\x01"), Taken(((Slice(20, 8),), ())), TABLES), None)
    with contextlib.closing(sums), pytest.raises(ProtocolError, match="outside of 't0'"):
        sums.arrived(0, [torch.zeros(64, dtype=torch.uint8)], 20.0)


@pytest.mark.parametrize(
    "part",
    [
        Slice(5, 9_000_001),
        Slice(100, 3000, (2, 2000), (12_000_000, 6000)),
        Slice(7, 5_000_001, (3,), (5_000_100,)),  # a run alone is too much for a thread
        Slice(0, 4 << 20, (2, 2), (16 << 20, 8 << 20)),
        Slice(0, 10),
    ],
)
def test_large_slices_are_cut_for_threads(part: Slice) -> None:
    raw = torch.randint(0, 256, (part.end,), dtype=torch.uint8)
    pieces = list(_cut(Piece(raw, part.first, part.strides, part)))
    assert sum(piece.part.nbytes for piece in pieces) == part.nbytes
    assert max(piece.part.nbytes for piece in pieces) < 5 << 20
    whole = slice_sum(raw, part.first, part.strides, part)
    assert sum(slice_sum(*piece) for piece in pieces) % (1 << 64) == whole
