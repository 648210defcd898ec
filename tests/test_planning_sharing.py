"""Who takes part in which bucket: properties of the choice, and that ranks which left it halfway come level again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.devices.base import Device, Event, Stream
from checkpoint_engine.devices.cpu import CpuDevice
from checkpoint_engine.errors import AgreementError, ProtocolError
from checkpoint_engine.planning.bits import pack_bits, unpack_bits
from checkpoint_engine.planning.plan import Bucket, Item, Piece, Plan
from checkpoint_engine.planning.sharing import MAX_GROUPS, Shares, plan_shares
from checkpoint_engine.server.coming import Coming, check_needs
from checkpoint_engine.server.fleet import Fleet
from checkpoint_engine.server.keeper import Keeper
from checkpoint_engine.server.lane import Lane
from checkpoint_engine.server.offer import Offer
from checkpoint_engine.server.sparse import Sparse
from checkpoint_engine.settings import Settings
from checkpoint_engine.transport.collective import Collective, Ranks, StreamCollective
from checkpoint_engine.transport.messages import Attach
from checkpoint_engine.worker.announced import Coming as Announced
from checkpoint_engine.worker.announced import coming_of

PIECE = 256


def _plan(owners: list[list[int]]) -> Plan:
    """One bucket for each list, one piece of 256 bytes for each owner in it, one bucket behind the other."""
    buckets, stream, offset = [], [], 0
    for index, own in enumerate(owners):
        nbytes = PIECE * len(own)
        pieces = tuple(Piece(owner, number * PIECE, PIECE, ()) for number, owner in enumerate(own))
        buckets.append(Bucket(offset, nbytes, -1, (Item(f"t{index}", "uint8", (nbytes,), 0, nbytes),), pieces))
        stream += [(index, number) for number in range(len(own))]
        offset += nbytes
    return Plan(offset, offset, PIECE, "layers", tuple(buckets), tuple(stream))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Plan, list[bytes], list[str]]:
    """A plan, what each of 1 to 5 ranks needs, and their hosts."""
    world = draw(st.integers(1, 5))
    owners = draw(st.lists(st.lists(st.integers(0, world - 1), min_size=1, max_size=3), min_size=1, max_size=12))
    count = len(owners)
    needs = [
        b"" if draw(st.integers(0, 4)) == 0 else pack_bits(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
        for _ in range(world)
    ]
    return _plan(owners), needs, draw(st.lists(st.sampled_from("ab"), min_size=world, max_size=world))


def _needed(plan: Plan, needs: list[bytes], bucket: int) -> set[int]:
    """Who must take part."""
    count = len(plan.buckets)
    ranks = {rank for rank, bits in enumerate(needs) if not bits or bucket in unpack_bits(bits, count)}
    return ranks | {piece.owner for piece in plan.buckets[bucket].pieces} if ranks else set()


def _taking_part(shares: Shares | None, world: int, bucket: int) -> set[int]:
    ranks = None if shares is None else shares.ranks(bucket)
    return set(range(world)) if ranks is None else set(ranks)


@given(cases(), st.sampled_from([None, 0, 1, 2, 8]))
def test_nobody_lacks_anything(case: tuple[Plan, list[bytes], list[str]], limit: int | None) -> None:
    """Who needs a bucket and who owns any of it takes part; beside that only whom too few sub-groups bring in."""
    plan, needs, hosts = case
    world = len(needs)
    shares = plan_shares(plan, needs, hosts, limit)
    unsent = 0
    for bucket in range(len(plan.buckets)):
        needed, there = _needed(plan, needs, bucket), _taking_part(shares, world, bucket)
        assert there >= needed
        unsent += (world - len(there)) * plan.buckets[bucket].nbytes
        if limit is None or len(needed) < 2:
            assert there == needed or shares is None
        elif shares is not None and len(there) < world:
            assert shares.members(shares.buckets[bucket]) == shares.ranks(bucket)
            assert shares.buckets[bucket] in shares.groups
    assert unsent == (0 if shares is None else shares.unsent)
    if shares is not None:
        memberships = Counter(rank for group in shares.groups for rank in shares.members(group))
        assert max(memberships.values(), default=0) <= (limit or 0)
        assert all(1 < len(shares.members(group)) < world for group in shares.groups)


@given(cases())
def test_all_come_to_the_same(case: tuple[Plan, list[bytes], list[str]]) -> None:
    plan, needs, hosts = case
    copied = msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=Plan)
    assert plan_shares(plan, needs, hosts, 8) == plan_shares(copied, list(needs), list(hosts), 8)
    saved = [0 if shares is None else shares.unsent for shares in (plan_shares(plan, needs, hosts, n) for n in (0, 1, 4, None))]
    assert all(each <= saved[-1] for each in saved)


def test_the_groups_that_save_most_are_chosen() -> None:
    """Of 12 pairs of ranks on two hosts with one group for each rank: each host's ranks, to which all of the pairs belong. With
    more, the pairs themselves."""
    pairs = [(a, b) for host in (0, 4) for a in range(host, host + 4) for b in range(a + 1, host + 4)]
    plan = _plan([[a] for a, _ in pairs])
    needs = [pack_bits(b == rank for _, b in pairs) for rank in range(8)]
    hosts = ["a"] * 4 + ["b"] * 4
    shares, more = plan_shares(plan, needs, hosts, 1), plan_shares(plan, needs, hosts, 4)
    assert shares is not None and more is not None
    assert len(more.groups) == len(pairs)
    assert shares.groups == (0b1111, 0b11110000)
    assert {shares.ranks(bucket) for bucket in range(len(pairs))} == {(0, 1, 2, 3), (4, 5, 6, 7)}


def test_no_group_is_made_for_next_to_nothing() -> None:
    plan = _plan([[0]] * 400)
    needs = [b"", b"", pack_bits(bucket != 7 for bucket in range(400))]
    assert plan_shares(plan, needs, ["a"] * 3, 8) is None
    assert plan_shares(plan, needs, ["a"] * 3, None) is not None


@given(st.lists(st.booleans(), max_size=70))
def test_bits(bits: list[bool]) -> None:
    packed = pack_bits(bits)
    assert unpack_bits(packed, len(bits)) == tuple(i for i, bit in enumerate(bits) if bit)
    for wrong in (packed + b"\0", packed[:-1] if packed else b"\1", packed[:-1] + b"\xff" if len(bits) % 8 else packed + b"\1"):
        with pytest.raises(ValueError, match="are not"):
            unpack_bits(wrong, len(bits))


def test_needs_of_another_plan() -> None:
    offers = [Offer("c", "plan", "v", "d", "h", 0, "a", needs=needs) for needs in (b"", b"\1\1")]
    with pytest.raises(AgreementError, match=r"rank 1: 2 bytes are not 3 bits"):
        Sparse(CpuDevice()).shares(offers, _plan([[0], [1], [0]]), copies=True)
    with pytest.raises(ProtocolError, match="the worker says what it needs of 3 buckets"):
        check_needs(b"\xff", 3)
    check_needs(b"", 3)


def test_what_is_known_serves_once() -> None:
    """Until the next update has gone well: after a failed one all is sent."""
    offer, plan = Offer("c", "", "v", "d", "h", 0, "a"), _plan([[0], [1]])
    offer = msgspec.structs.replace(offer, plan=plan.digest)
    sparse, settings = Sparse(CpuDevice()), Settings()
    sparse.settle(plan, b"\1")
    assert sparse.offer(offer, settings).needs == b"\1"
    assert sparse.offer(offer, settings).needs == b""
    sparse.settle(plan, b"\1")
    assert sparse.offer(offer, settings.replace(sparse="off")).needs == b""


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_the_next_bucket_that_comes(here: list[bool]) -> None:
    plan, count = _plan([[0]] * len(here)), len(here)
    coming = Coming(plan, Shares(1, tuple(int(bit) for bit in here), (), 0), 0)
    numbers = [i for i, bit in enumerate(here) if bit]
    assert [i for i in range(count) if i in coming] == numbers
    assert coming.first == min(numbers, default=count)
    assert all(coming.after(i) == min((n for n in numbers if n > i), default=count) for i in range(count))
    announced = coming_of(Attach(0, (), "p", None, coming=coming.bits), count)
    assert announced.absent == tuple(i for i in range(count) if i not in numbers)
    for number in numbers:
        announced.came(number)
    announced.released()


def test_a_stream_that_is_not_what_was_announced() -> None:
    with pytest.raises(ProtocolError, match="announced other buckets"):
        coming_of(Attach(0, (), "p", None, coming=b"\xff"), 3)
    with pytest.raises(ProtocolError, match="bucket 1 of 3, which was not the next one"):
        Announced((0, 2), 3).came(1)
    with pytest.raises(ProtocolError, match="without bucket 2 of 3"):
        Announced((2,), 3).released()
    ended = Announced((0,), 3)
    ended.came(0)
    with pytest.raises(ProtocolError, match="not the next one"):
        ended.came(2)


class _Noting(Collective):
    """Notes the broadcasts of one rank: who takes part, and at which place of the ring."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.noted: list[tuple[tuple[int, ...] | None, int]] = []

    def broadcast(
        self, target: object, source: object, root: int, stream: Stream, ready: Event | None, ranks: Ranks = None
    ) -> Event:
        self.noted.append((None if ranks is None else tuple(ranks), target.storage_offset()))  # type: ignore[attr-defined]
        return stream.record()

    def abandon(self, missing: object) -> bool:
        return True

    def close(self) -> None:
        pass


@settings(max_examples=25, deadline=None)
@given(cases(), st.sampled_from([2, 8]), st.data())
def test_ranks_that_stopped_at_different_places_come_level(
    case: tuple[Plan, list[bytes], list[str]], limit: int, data: st.DataObject
) -> None:
    """In every set of ranks each has queued the same broadcasts, in the same order, also in a second, whole stream."""
    plan, needs, hosts = case
    shares = plan_shares(plan, needs, hosts, limit)
    second = data.draw(st.booleans())  # all have ended the first stream
    lanes, noted = [], []
    for rank in range(len(needs)):
        lane, noting = Lane(CpuDevice(), rank, plan.ring_bytes, PIECE), _Noting()
        lane.use(noting)
        lanes.append(lane)
        noted.append(noting)
        length = len(plan.stream)
        for position in range(data.draw(st.integers(0, length)) + length * second):
            index, number = plan.stream[position % length]
            bucket = plan.buckets[index]
            ranks = None if shares is None or position >= length else shares.ranks(index)
            if ranks is None or rank in ranks:
                lane.share(bucket, bucket.pieces[number], None, None, ranks)
            else:
                lane.skip(bucket.pieces[number])
    target = max(lane.posted for lane in lanes)
    for lane in lanes:
        assert lane.level(plan, shares, target, 5.0)
        lane.close()
    for group in {ranks for noting in noted for ranks, _ in noting.noted}:
        members = range(len(needs)) if group is None else group
        queued = [[place for ranks, place in noted[rank].noted if ranks == group] for rank in members]
        assert all(each == queued[0] for each in queued)
        assert all(group not in [ranks for ranks, _ in noted[rank].noted] for rank in set(range(len(needs))).difference(members))


class _Group(StreamCollective):
    def __init__(self, number: int) -> None:
        super().__init__(1.0)
        self.number, self.closed = number, False

    def _queue(self, target: object, source: object, root: int, stream: Stream) -> None:
        raise NotImplementedError

    def abandon(self, missing: object) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


class _Fleet(Fleet):
    """Makes communicators without other ranks."""

    def group(self, device: Device, generation: int, number: int, members: Sequence[int]) -> _Group:
        return _Group(number)


def test_sub_groups_are_kept_while_no_rank_is_in_too_many() -> None:
    """Numbers are never used twice, and are counted by ranks that are in none of them, too."""
    keepers = [Keeper(_Fleet(rank, 20, Settings(), None, None), CpuDevice()) for rank in (0, 19)]
    pairs = [(0, rank) for rank in range(1, MAX_GROUPS + 2)]
    for keeper in keepers:
        keeper.collective = _Group(0)
        keeper.group(pairs[:5])
        keeper.group(pairs[4:MAX_GROUPS])
    mine, others = (keeper.collective.groups for keeper in keepers if keeper.collective is not None)
    assert list(mine) == pairs[:MAX_GROUPS] and not others
    before = dict(mine)
    for keeper in keepers:
        keeper.group([pairs[0], pairs[-1]])
        keeper.group([(0, 19)])
    assert list(mine) == [pairs[0], pairs[-1], (0, 19)] and list(others) == [(0, 19)]
    assert mine[pairs[0]] is before[pairs[0]]
    assert all(group.closed for members, group in before.items() if members != pairs[0])
    assert mine[0, 19].number == others[0, 19].number == MAX_GROUPS + 2
