"""The loads of one update, stream by stream, on real memory of this process: what happens when a plan cannot go on."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from checkpoint_engine.devices.cpu import CpuDevice
from checkpoint_engine.errors import ProtocolError
from checkpoint_engine.loads.recordable import Recordable
from checkpoint_engine.planning.plan import Item
from checkpoint_engine.server.leader import MAX_REPEATS, Leader
from checkpoint_engine.settings import Settings
from checkpoint_engine.transport import messages as m
from checkpoint_engine.transport.messages import Table
from checkpoint_engine.worker.plans import lookup
from checkpoint_engine.worker.recorded import Loads, Way
from checkpoint_engine.worker.views import Views
from checkpoint_engine.worker.vllm_reload import MissingWeightsError, Reload

ROWS, COLUMNS = 8, 16


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whole = torch.nn.Linear(COLUMNS, 2 * ROWS, bias=False).requires_grad_(False)
        self.calls: list[list[str]] = []

    def load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.calls.append([name for name, _ in weights])
        for name, tensor in weights:
            start = ROWS * int(name)
            self.whole.weight[start : start + ROWS].copy_(tensor)


NBYTES = ROWS * COLUMNS * 4
TABLES = tuple(Table(n * NBYTES, NBYTES, (Item(str(n), "float32", (ROWS, COLUMNS), 0, NBYTES),)) for n in range(2))


def _memory(seed: int) -> torch.Tensor:
    return torch.rand(2 * ROWS * COLUMNS, generator=torch.Generator().manual_seed(seed)).view(torch.uint8)


def _stream(loads: Loads, memory: torch.Tensor, layout: str = "layout") -> bool:
    loads.begin(layout, TABLES)
    views = Views([memory])
    for bucket, table in enumerate(TABLES):
        loads.load(bucket, table, views)
    return loads.end()


def _proved(net: Net) -> Loads:
    loads = Loads(net.load, Recordable(net), CpuDevice())
    assert _stream(loads, _memory(0))
    assert not _stream(loads, _memory(0))
    assert loads.way is Way.PROVE
    return loads


def _right(net: Net, memory: torch.Tensor) -> bool:
    return torch.equal(net.whole.weight.reshape(-1), memory.view(torch.float32))


def test_a_plan_is_trusted_when_its_update_is_committed() -> None:
    net = Net()
    loads = _proved(net)
    assert _right(net, _memory(0))
    again = Loads(net.load, Recordable(net), CpuDevice())
    assert _stream(again, _memory(1)), "not committed: recorded again"
    again.close()
    loads.commit()
    assert loads.reads(checked=False) == 2 * NBYTES
    calls = len(net.calls)
    trusted = Loads(net.load, Recordable(net), CpuDevice())
    assert not _stream(trusted, _memory(2), "another layout")
    assert trusted.way is Way.REPLAY
    assert _right(net, _memory(2))
    assert len(net.calls) == calls


def test_a_replay_that_breaks_off_is_followed_by_the_loader_at_once_and_from_then_on() -> None:
    net = Net()
    _proved(net).commit()
    loads = Loads(net.load, Recordable(net), CpuDevice())
    assert _stream(loads, _memory(1)[:NBYTES]), "the second bucket's memory ends too early"
    assert "has no" in loads.notes[0]
    assert not _stream(loads, _memory(1))
    assert loads.way is Way.LOADER
    assert _right(net, _memory(1))
    later = Loads(net.load, Recordable(net), CpuDevice())
    assert not _stream(later, _memory(2))
    assert later.notes == loads.notes
    assert later.reads(checked=False) == -1
    assert _right(net, _memory(2))


def test_a_loader_that_fails_takes_the_plan_with_it() -> None:
    net = Net()
    _proved(net).commit()
    loads = Loads(net.load, Recordable(net), CpuDevice())
    loads.begin("layout", TABLES)
    loads.failed()
    again = Loads(net.load, Recordable(net), CpuDevice())
    assert _stream(again, _memory(1)), "recorded"
    again.close()


def test_a_stream_that_begins_again_is_told_to_the_engine() -> None:
    net, begun = Net(), []
    loads = Loads(net.load, Recordable(net, begins=lambda: begun.append(len(net.calls))), CpuDevice())
    _stream(loads, _memory(0))
    _stream(loads, _memory(0))
    assert begun == [0, 2]


def test_plans_keep_neither_the_model_nor_its_memory() -> None:
    net = Net()
    _proved(net).commit()
    assert lookup(net, Recordable(net).model().fingerprint, "") is None
    memory = weakref.ref(net.whole.weight.untyped_storage())
    module = weakref.ref(net)
    net.whole.weight.data = torch.zeros(1)
    gc.collect()
    assert memory() is None
    del net
    gc.collect()
    assert module() is None


class Half(Net):
    """Keeps nothing of the second tensor, unless told to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("expert_map", torch.tensor([0, -1]))

    def load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        super().load([(name, tensor) for name, tensor in weights if int(self.expert_map[int(name)]) >= 0])


def _sparse(loads: Loads, memory: torch.Tensor, coming: int) -> bool:
    """A stream in which only one of the two buckets comes."""
    loads.begin("layout", TABLES, (1 - coming,))
    loads.load(coming, TABLES[coming], Views([memory]))
    return loads.end()


def test_a_replay_does_without_what_it_takes_nothing_of() -> None:
    """The engine is told of the tensor all the same, as it is when it comes and nothing is taken of it."""
    net, told = Half(), []
    proved = _proved(net)
    proved.commit()
    assert proved.needs == b"\1"
    loads = Loads(net.load, Recordable(net, replaying=told.extend), CpuDevice())
    assert not _sparse(loads, _memory(1), 0)
    assert (loads.way, loads.needs, told) == (Way.REPLAY, b"\1", ["0", "1"])
    assert torch.equal(net.whole.weight[:ROWS].reshape(-1), _memory(1)[:NBYTES].view(torch.float32))


@pytest.mark.parametrize("why", ["needed", "changed", "unknown", "no model"])
def test_a_stream_that_lacks_what_is_needed_changes_nothing(why: str) -> None:
    """It is asked for once more; what is known of the loader stays."""
    net = Half()
    if why != "unknown":
        _proved(net).commit()
    if why == "changed":
        net.expert_map[1] = 1
    before, calls = net.whole.weight.clone(), len(net.calls)
    loads = Loads(net.load, None if why == "no model" else Recordable(net), CpuDevice())
    assert _sparse(loads, _memory(1), 1 if why == "needed" else 0)
    assert loads.used(0) == ()
    assert torch.equal(net.whole.weight, before) and len(net.calls) == calls
    assert loads.needs == b"" and loads.reads(checked=False) == -1
    assert "not all that it needs was sent" in loads.notes[0]
    again = _stream(loads, _memory(1))
    assert (again, loads.way) == {
        "needed": (False, Way.REPLAY),
        "changed": (True, Way.RECORD),
        "unknown": (True, Way.RECORD),
        "no model": (False, Way.LOADER),
    }[why]
    loads.close()


def test_a_replay_of_a_sparse_stream_that_breaks_off_is_followed_by_the_loader() -> None:
    net = Half()
    _proved(net).commit()
    loads = Loads(net.load, Recordable(net), CpuDevice())
    assert _sparse(loads, _memory(1)[: NBYTES // 2], 0)
    assert not _stream(loads, _memory(1))
    assert loads.way is Way.LOADER
    assert torch.equal(net.whole.weight[:ROWS].reshape(-1), _memory(1)[:NBYTES].view(torch.float32))


def test_nothing_of_the_servers_memory_is_kept() -> None:
    net = Net()
    _proved(net).commit()
    loads = Loads(net.load, Recordable(net), CpuDevice())
    memory = _memory(1)
    assert not _stream(loads, memory)
    assert loads.way is Way.REPLAY
    storage = weakref.ref(memory.untyped_storage())
    del memory
    gc.collect()
    assert storage() is None


# --- the leader's part ---------------------------------------------------------------------------------------------------


def _loading(world_size: int) -> Leader:
    leader = Leader(1, world_size, Settings(), 0.0)
    for rank in range(world_size):
        leader.hear(rank, m.Waiting(1, 1))
    assert leader.orders(0.0) == [m.Begin(1, 1, tuple(range(world_size)))]
    return leader


def test_a_pass_is_streamed_again_to_those_who_ask_and_commits_when_all_are_ready() -> None:
    leader = _loading(3)
    for rank in range(3):
        assert leader.orders(0.0) == []
        leader.hear(rank, m.PassDone(1, 1, {}, again=rank > 0))
    assert leader.orders(0.0) == [m.Begin(1, 2, (1, 2), again=True)]
    leader.hear(0, m.Waiting(1, 2))  # a further worker has its turn when this pass is over
    for rank in range(3):
        leader.hear(rank, m.PassDone(1, 2, {}, again=rank == 2, ways=("proved",), notes=()))
    assert leader.orders(0.0) == [m.Begin(1, 3, (2,), again=True)]
    for rank in range(3):
        leader.hear(rank, m.PassDone(1, 3, {}, ways=("proved",) if rank < 2 else ("loader",), notes=("why",) * (rank == 2)))
    assert leader.orders(0.0) == [m.CommitPass(1, 3)]


def test_a_worker_that_is_never_content() -> None:
    leader = _loading(1)
    for number in range(1, MAX_REPEATS):
        leader.hear(0, m.PassDone(1, number, {}, again=True))
        leader.orders(0.0)
    with pytest.raises(ProtocolError, match=f"rank 0 asks for pass {MAX_REPEATS} once more"):
        leader.hear(0, m.PassDone(1, MAX_REPEATS, {}, again=True))


def test_the_end_says_how_all_loaded() -> None:
    leader = _loading(2)
    leader.hear(0, m.PassDone(1, 1, {}, ways=("replayed",)))
    leader.hear(1, m.PassDone(1, 1, {}, ways=("loader",), notes=("it casts",)))
    leader.orders(0.0)
    for rank in range(2):
        leader.hear(rank, m.Settled(1, 1))
        leader.hear(rank, m.Returned(1))
    assert leader.orders(0.0) == [m.End(1, ({}, {}), ("replayed", "loader"), ("rank 1: it casts",))]


# --- vLLM's part (the rest needs vLLM on a GPU) ----------------------------------------------------------------------------


def test_vllm_checks_completeness_when_a_plan_is_proved_and_not_when_it_is_replayed() -> None:
    net = Net()
    proving = Reload(net, None)
    proving._expected = {"whole.weight", "other.weight"}
    proving._sent, proving._loaded = {"0", "1"}, {"whole.weight"}
    proving.replaying(["0", "1"])  # the loader had them before, in the stream that was recorded
    with pytest.raises(MissingWeightsError, match=r"nothing was sent for 'other\.weight'"):
        proving._check_complete()
    replayed = Reload(net, None)
    replayed._expected, replayed._sent = {"whole.weight"}, {"1"}  # what the loader must get
    replayed.replaying(["0"])
    replayed._check_complete()
