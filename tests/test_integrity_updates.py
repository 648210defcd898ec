"""Bytes that change after they were registered: caught by every worker before the commit, named, and healed.

What is spoilt is one bit of one tensor. With verify="off" the same bit gets into the engine: it is the check that keeps it out.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from checkpoint_engine.devices.digests import Verifier
from checkpoint_engine.errors import UpdateError
from checkpoint_engine.manifest import TensorMeta
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.server.mapped import MappedPass
from checkpoint_engine.server.offer import Offer, verified
from checkpoint_engine.server.pipeline import Pass
from checkpoint_engine.server.sources import Metas
from checkpoint_engine.transport import messages as m
from checkpoint_engine.transport.collective import GlooCollective
from checkpoint_engine.transport.peer.serving import Serving
from helpers.fleet import Orders, Worker, _worker, digests, request, server, share_of, tensors, worker_processes, workers
from helpers.ranks import _context, run_ranks, start_ranks
from helpers.recorded import Deed, checkpoint, engines, fresh

KIB = 1 << 10
SECONDS = 30.0
CAUSE = re.compile(
    r"rank (\d+) \(.+\), stage verify: the bytes of tensor '(.+)', from rank (\d+) \(.+\), are not those that were"
)


def largest(ps: ParameterServer, rank: int) -> TensorMeta:
    """Of what this rank registered."""
    return max(ps.get_metas().ranks[rank].regions[0].tensors, key=lambda t: (t.nbytes, t.name))


def flip(raw: torch.Tensor) -> None:
    raw[-1] ^= 64


def flip_registered(ps: ParameterServer, tensor: TensorMeta) -> None:
    with ps._registry.use("c") as held:
        flip(held.regions[0].tensor[tensor.offset : tensor.offset + tensor.nbytes])


@contextlib.contextmanager
def spoilt(ps: ParameterServer, rank: int, where: str) -> Iterator[None]:
    """One bit: of the memory that rank 0 registered, of what lies in rank 1's ring when it is to be loaded, or of what gloo
    brings to rank 1."""
    tensor = largest(ps, 0)
    with pytest.MonkeyPatch.context() as patch:
        if where == "region" and rank == 0:
            flip_registered(ps, tensor)
        if where == "slot" and rank == 1:
            patch.setattr(Pass, "_tell", _spoil_slot(tensor.name))
        if where == "wire" and rank == 1:
            patch.setattr(GlooCollective, "_broadcast", _spoil_broadcast())
        yield
    if where == "region" and rank == 0:
        flip_registered(ps, tensor)


def _spoil_slot(name: str) -> Callable[..., None]:
    tell = Pass._tell

    def spoil(running: Pass, worker: Any, message: m.Load | m.Release) -> None:
        if isinstance(message, m.Load):
            bucket = running._plan.buckets[message.bucket]
            for item in bucket.items:
                if item.name == name:
                    flip(running._lane.ring.tensor[bucket.offset + item.offset :][: item.nbytes])
        tell(running, worker, message)

    return spoil


def _spoil_broadcast() -> Callable[..., None]:
    broadcast = GlooCollective._broadcast

    def spoil(collective: GlooCollective, tensor: torch.Tensor, root: int) -> None:
        broadcast(collective, tensor, root)
        if root == 0 and tensor.numel() >= KIB:
            flip(tensor)

    return spoil


def _course(rank: int, world_size: int, crew: list[Worker], where: str, changes: dict[str, Any]) -> Any:
    """A good update; a spoilt one, checked and then not; one that heals. Of each its error or stages, and the worker's state."""
    seen: list[Any] = []
    with server(bucket_bytes=64 * KIB, **changes) as ps:

        def update(version: str, verify: str | None = None) -> None:
            try:
                report = ps.update("c", request(crew[rank], rank), version=version, verify=verify)
                outcome: Any = report.method, {stage: did.nbytes for stage, did in report.stages.items()}
            except UpdateError as e:
                outcome = str(e)
            seen.append((outcome, *crew[rank].state()[:3]))

        for number in range(2):
            ps.register_checkpoint("c", named_tensors=share_of(tensors(number), rank, world_size))
            ps.gather_metas("c")
            if number == 0:
                update("first", "on")
                ps.unregister_checkpoint("c")
        with spoilt(ps, rank, where):
            update("spoilt", "on")
            update("unchecked", "off")
        ps.unregister_checkpoint("c")
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        update("healed", "on")
        return seen, largest(ps, 0).name


def check_course(results: list[Any], where: str, method: str) -> None:
    total = sum(t.nbytes for t in tensors(1).values())
    right = digests(tensors(1))
    causes = {seen[1][0] for seen, _ in results}
    assert len(causes) == 1, f"the ranks disagree: {causes}"
    found = CAUSE.search(causes.pop())
    assert found, results[0][0][1][0]
    assert found[3] == "0", "the rank whose memory it came from"
    if where != "region":
        assert found[1] == "1", "the rank whose worker saw it"
    for rank, (seen, name) in enumerate(results):
        first, failed, unchecked, healed = seen
        assert first[0][0] == healed[0][0] == method
        assert first[0][1]["verify"] == total
        if where != "wire":  # it may be any tensor of that piece
            assert found[2] == name
        assert failed[1] == "first", "nothing was committed"
        assert "verify" not in unchecked[0][1]
        assert unchecked[1:3] == ("unchecked", False)
        different = {each for each in right if unchecked[3][each] != right[each]}
        reached = where == "region" or rank == 1
        assert (different == {name} if where != "wire" else len(different) >= 1) if reached else different == set()
        assert healed[1:] == ("healed", False, right)


PATHS = [
    ("region", "mapped", {"map_regions": True}),
    ("region", "copies", {}),
    ("slot", "copies", {}),
    ("region", "broadcast", {"peer_copies": False}),
    ("wire", "broadcast", {"peer_copies": False}),
]


@pytest.mark.parametrize(("where", "method", "changes"), PATHS)
def test_one_bit_is_caught_named_and_healed(where: str, method: str, changes: dict[str, Any]) -> None:
    with workers(2) as crew:
        results = run_ranks(_course, 2, crew, where, changes)
    check_course(results, where, method)
    before, after = digests(tensors(0)), digests(tensors(1))
    for seen, _ in results:
        assert all(found in (before[name], after[name]) for name, found in seen[1][3].items()), "no engine was shown it"


def _checks_as_on_a_gpu(*arguments: Any) -> None:
    """A worker whose checks are queued, and answered after the last bucket; the sums are torch's."""
    from checkpoint_engine.worker import check, session

    def make(attach: m.Attach, tables: Any, memories: Any, *more: Any) -> check.Check:
        if not attach.digests:
            return check.Check()
        verifier = Verifier(check._layout(attach.plan, tables), attach.digests, memories)
        return check.DeviceCheck(verifier, tables, *more)

    session.make_check = make
    _worker(*arguments)


@pytest.mark.parametrize("where", ["region", "slot"])
def test_an_answer_after_the_last_bucket_is_early_enough(where: str) -> None:
    with worker_processes(_checks_as_on_a_gpu, [(0,), (1,)]) as crew:
        results = run_ranks(_course, 2, crew, where, {})
    check_course(results, where, "copies")
    for rank, (seen, name) in enumerate(results):
        if where == "region" or rank == 1:
            assert seen[1][3][name] != digests(tensors(0))[name], "it was loaded, and not committed"


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["region", "slot"])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_one_bit_on_gpus(where: str, sharing: str) -> None:
    with workers(2) as crew:
        check_course(run_ranks(_course, 2, crew, where, {}), where, sharing)


# Recorded loads: several streams in the first update, and from then on what a worker does not read it does not check


def flip_expert(ps: ParameterServer, rank: int, name: str) -> None:
    for region in ps.get_metas().ranks[rank].regions:
        for tensor in region.tensors:
            if tensor.name == name:
                flip_registered(ps, tensor)


def _replays(rank: int, world_size: int, crew: list[Worker], method: str) -> Any:
    """Proved; then replayed with a bit wrong in an expert that only rank 1 has; replayed again when it was registered anew."""
    name = "layers.2.experts.3"  # experts go to ranks in turn
    seen: list[Any] = []
    with server(method=method, bucket_bytes=8 * KIB) as ps:
        for number, spoil in enumerate((False, False, True, False, False)):
            weights = checkpoint(number)
            ps.register_checkpoint("c", named_tensors=share_of(weights, rank, world_size))
            ps.gather_metas("c")
            if spoil:
                flip_expert(ps, rank, name)
            try:
                report = ps.update("c", lambda handles: crew[rank].ask("update", handles[rank][1], Deed()), version=f"v{number}")
                facts: Any = set(report.ways), [stages["verify"].nbytes for stages in report.ranks]
            except UpdateError as e:
                facts = str(e)
            version, _, state, _, _ = crew[rank].ask("state")
            seen.append((facts, version, state == fresh(weights, rank, world_size)))
            ps.unregister_checkpoint("c")
    return seen


@pytest.mark.parametrize("method", ["broadcast", "pull"])
def test_replayed_loads_are_checked(method: str) -> None:
    total = sum(t.nbytes for t in checkpoint(0).values())
    experts = sum(t.nbytes for name, t in checkpoint(0).items() if "experts" in name)
    with engines(["", ""]) as crew:
        for seen in run_ranks(_replays, 2, crew, method):
            proved, replayed, spoilt, again, last = seen
            assert proved[0] == ({"proved"}, [2 * total - experts // 2] * 2), "everything for the loader, then what is replayed"
            assert replayed[0] == ({"replayed"}, [total - experts // 2] * 2), "not the other rank's experts"
            found = CAUSE.search(spoilt[0])
            assert found and found[1] == "1" and found[2] == "layers.2.experts.3", spoilt[0]
            assert spoilt[1] == "v1", "nothing was committed"
            assert "proved" in again[0][0] and last[0][0] == {"replayed"}
            assert [each[1:3] for each in (proved, replayed, again, last)] == [(f"v{n}", True) for n in (0, 1, 3, 4)]


def _between_streams(rank: int, world_size: int, crew: list[Worker]) -> Any:
    """Rank 0's memory changes when the first update has been recorded and is about to be proved."""
    attachment, streams = MappedPass._attachment, 0

    def spoil(running: MappedPass) -> Any:
        nonlocal streams
        streams += 1
        if streams == 2 and rank == 0:
            flip_registered(ps, largest(ps, 0))
        return attachment(running)

    seen = []
    with server(method="pull", bucket_bytes=8 * KIB) as ps, pytest.MonkeyPatch.context() as patch:
        patch.setattr(MappedPass, "_attachment", spoil)
        for number in range(3):
            ps.register_checkpoint("c", named_tensors=share_of(checkpoint(number), rank, world_size))
            ps.gather_metas("c")
            try:
                seen.append(set(ps.update("c", lambda handles: crew[rank].ask("update", handles[rank][1], Deed())).ways))
            except UpdateError as e:
                seen.append(str(e))
            ps.unregister_checkpoint("c")
        return seen, crew[rank].ask("state")[2] == fresh(checkpoint(2), rank, world_size)


def test_a_proof_gets_no_other_bytes_than_the_recording() -> None:
    with engines(["", ""]) as crew:
        for seen, right in run_ranks(_between_streams, 2, crew):
            assert CAUSE.search(seen[0]), seen[0]
            assert seen[1:] == [{"proved"}, {"replayed"}], "the next update records anew"
            assert right


def _two_passes(rank: int, world_size: int, crew: list[Worker]) -> Any:
    """As with a draft model: the bytes change between the passes, so the second one fails."""
    run, passes = Pass.run, 0

    def spoiling(running: Pass) -> Any:
        nonlocal passes
        passes += 1
        if passes == 2 and rank == 0:
            flip_registered(ps, largest(ps, 0))
        return run(running)

    with server(bucket_bytes=64 * KIB) as ps, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pass, "run", spoiling)  # before anything is lifted
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        with pytest.raises(UpdateError) as caught:
            ps.update("c", request(crew[rank], rank, Orders(passes=2)), version="v")
        return str(caught.value), passes


def test_the_second_pass_of_an_update_is_checked_too() -> None:
    with workers(2) as crew:
        for error, passes in run_ranks(_two_passes, 2, crew):
            assert CAUSE.search(error), error
            assert passes == 2


# Peers


def _source(rank: int, world_size: int, out: Connection, commands: Connection, where: str) -> None:
    """Holds a checkpoint; tells its metas and the name of the tensor that it spoils: in its memory, or on the wire."""
    with server() as ps, pytest.MonkeyPatch.context() as patch:
        ps.register_checkpoint("c", named_tensors=tensors(1))
        ps.gather_metas("c")
        tensor = largest(ps, 0)
        spoils = [True]
        send = Serving._send

        def spoil(serving: Serving, wire: Any, fetched: Any) -> None:
            if where != "wire" or not spoils[0]:
                return send(serving, wire, fetched)
            send_bytes = wire.send_bytes
            place = tensor.offset + tensor.nbytes - 1 - fetched.offset

            def other(view: memoryview, *rest: Any) -> None:
                copy = bytearray(view)
                if 0 <= place < len(copy):
                    copy[place] ^= 64
                send_bytes(memoryview(copy), *rest)

            with pytest.MonkeyPatch.context() as here:
                here.setattr(wire, "send_bytes", other)
                return send(serving, wire, fetched)

        patch.setattr(Serving, "_send", spoil)
        if where == "region":
            flip_registered(ps, tensor)
        out.send((ps.get_metas().to_json(), tensor.name))
        while commands.poll(SECONDS) and commands.recv() == "mend":
            spoils[0] = False
            if where == "region":
                flip_registered(ps, tensor)
            out.send("mended")


def _reads(rank: int, world_size: int, crew: list[Worker], metas: bytes, transport: str, pipes: tuple[Connection, ...]) -> Any:
    told, command = pipes
    with server(bucket_bytes=64 * KIB, peer_transport=transport) as ps:
        ps.gather_metas("c")
        ps.load_metas(Metas.from_json(metas))
        everybody = list(range(world_size))
        with pytest.raises(UpdateError) as caught:
            ps.update("c", request(crew[rank], rank), ranks=everybody, version="spoilt")
        failed = crew[rank].state()[0]
        ps.update("c", request(crew[rank], rank), ranks=everybody, version="unchecked", verify="off")
        unchecked = crew[rank].state()[2]
        if rank == 0:
            command.send("mend")
            assert told.poll(SECONDS) and told.recv() == "mended"
        ps.store_based_barrier()
        ps.update("c", request(crew[rank], rank), ranks=everybody, version="healed")
        return str(caught.value), failed, unchecked, crew[rank].state()[:3]


@pytest.mark.parametrize(("where", "transport"), [("wire", "tcp"), ("region", "tcp"), ("region", "shm")])
def test_what_a_peer_delivers_is_checked(where: str, transport: str) -> None:
    told, tell = _context.Pipe(duplex=False)
    commanded, command = _context.Pipe(duplex=False)
    with workers(2) as crew, start_ranks(_source, 1, tell, commanded, where) as source:
        assert told.poll(SECONDS)
        metas, name = told.recv()
        results = run_ranks(_reads, 2, crew, metas, transport, (told, command))
        command.send("go")
        source.results()
    right = digests(tensors(1))
    for error, failed, unchecked, healed in results:
        found = CAUSE.search(error)
        assert found and (found[2], found[3]) == (name, "0"), error
        assert failed is None, "nothing was committed"
        assert {each for each in right if unchecked[each] != right[each]} == {name}
        assert healed == ("healed", False, right)
    for end in (told, tell, commanded, command):
        end.close()


# Who decides


def _decides(rank: int, world_size: int, crew: list[Worker], settings: list[str]) -> Any:
    with server(bucket_bytes=64 * KIB, verify=settings[rank]) as ps:
        ps.register_checkpoint("c", named_tensors=share_of(tensors(1), rank, world_size))
        ps.gather_metas("c")
        return ["verify" in stages for stages in ps.update("c", request(crew[rank], rank)).ranks]


@pytest.mark.parametrize(("settings", "checked"), [(["off", "on"], True), (["auto", "off"], False), (["auto", "auto"], True)])
def test_all_ranks_check_or_none(settings: list[str], checked: bool) -> None:
    with workers(2) as crew:
        assert run_ranks(_decides, 2, crew, settings) == [[checked] * 2] * 2


@pytest.mark.parametrize(
    ("settings", "checked"),
    [(["auto", "auto"], True), (["auto", "on"], True), (["off", "on"], True), (["auto", "off"], False), (["off", "off"], False)],
)
def test_who_is_heard(settings: list[str], checked: bool) -> None:
    assert verified([Offer("c", "", "", "", "", 0, "h", verify=each) for each in settings]) is checked
