"""Loads into layers that are staged and post-processed: recorded, proved and replayed, on real memory of this process."""

from __future__ import annotations

import pytest
import torch

from checkpoint_engine.devices.base import get_device
from checkpoint_engine.loads.plan import LoadPlan
from checkpoint_engine.planning.plan import Item
from checkpoint_engine.transport.messages import Table
from checkpoint_engine.worker.plans import lookup
from checkpoint_engine.worker.recorded import Loads, Way
from checkpoint_engine.worker.views import Views
from helpers.loads import Memory
from helpers.staged import COLUMNS, LAYERS, ROWS, Engine, checkpoint, serves

LAYER_BYTES = (2 * ROWS + 1) * COLUMNS * 4


def _stream(loads: Loads, seed: int, tensors: int, cut: bool = False, device: str = "cpu") -> bool:
    """One stream of the checkpoint `seed`, in buckets of so many tensors. cut: memory ends before its last tensor does."""
    weights = checkpoint(seed)
    memory = Memory(weights, device)
    items = [
        Item(name, "float32", tuple(tensor.shape), source.offset, tensor.nbytes)
        for (name, tensor), source in zip(weights, memory.sources, strict=True)
    ]
    tables = tuple(Table(0, memory.raw.numel(), tuple(items[n : n + tensors])) for n in range(0, len(items), tensors))
    loads.begin(f"{tensors} tensors", tables)
    views = Views([memory.raw[: items[-1].offset + 8] if cut else memory.raw])
    for bucket, table in enumerate(tables):
        loads.load(bucket, table, views)
    return loads.end()


def _update(engine: Engine, seed: int, tensors: int = 7, fails_once: bool = False) -> Loads:
    device = engine.table.device.type
    loads = Loads(engine.load, engine.recordable, get_device(device, 0))
    cut = fails_once
    while _stream(loads, seed, tensors, cut, device):
        cut = False
    engine.post_hook()
    loads.commit()
    loads.close()
    return loads


def _plan(engine: Engine) -> LoadPlan:
    loads = Loads(engine.load, engine.recordable, get_device("cpu", 0))
    _stream(loads, 0, 7)
    engine.abandon()
    kept = lookup(engine, engine.recordable.model().fingerprint, loads._checkpoint)
    assert kept is not None
    assert kept.plan is not None
    return kept.plan.plan


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("tensors", [1, 2, 3, 7])
def test_staged_layers_are_replayed(tensors: int, device: str) -> None:
    """In whatever pieces they come, one layer is staged at a time, and the loader is not called again."""
    engine = Engine(device=device)
    places = [layer.weight.data_ptr() for layer in engine.layers]
    assert _update(engine, 0, tensors).way is Way.PROVE
    assert serves(engine, 0)
    calls = engine.calls
    engine.held.peak = 0
    for seed in (1, 2, 1, 0):
        loads = _update(engine, seed, tensors)
        assert (loads.way, loads.notes) == (Way.REPLAY, [])
        assert serves(engine, seed)
    assert engine.calls == calls
    assert engine.held.now == 0
    assert engine.held.peak == LAYER_BYTES
    assert [layer.weight.data_ptr() for layer in engine.layers] == places


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["casts", "pads"])
def test_a_layer_that_is_more_than_copies_is_left_to_the_loader_whole(kind: str, device: str) -> None:
    engine = Engine(("copies", kind, "copies"), device)
    assert _update(engine, 0).way is Way.PROVE
    assert serves(engine, 0)
    calls = engine.calls
    for seed in (1, 2):
        assert _update(engine, seed).way is Way.REPLAY
        assert serves(engine, seed)
    assert [now - before for now, before in zip(engine.calls, calls, strict=True)] == [0, 4, 0]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("hides", "after a replay layers.1.weight"),
        ("numpy", "could not be proved"),
        ("replaces", "replaced it"),
    ],
)
def test_a_load_that_is_not_seen_is_refused_and_the_loader_heals_it(kind: str, reason: str) -> None:
    engine = Engine(("copies", kind, "copies"))
    for seed in (0, 1):
        loads = _update(engine, seed)
        assert loads.way is Way.LOADER
        assert any(reason in note for note in loads.notes), loads.notes
        assert serves(engine, seed)


def test_a_replay_that_breaks_off_is_followed_by_the_loader_at_once() -> None:
    engine = Engine()
    _update(engine, 0)
    loads = _update(engine, 1, fails_once=True)
    assert loads.way is Way.LOADER
    assert "has no" in loads.notes[0]
    assert serves(engine, 1)
    later = _update(engine, 2)
    assert (later.way, later.notes) == (Way.LOADER, loads.notes)  # remembered of the model as it serves
    assert serves(engine, 2)


def test_post_processing_that_fails_in_a_replay_leaves_live_tensors_in_place() -> None:
    engine = Engine()
    _update(engine, 0)
    engine.layers[1].quant_method.fails = True
    loads = Loads(engine.load, engine.recordable, get_device("cpu", 0))
    assert _stream(loads, 1, 7)
    assert "no kernel today" in loads.notes[0]
    assert engine.layers[1].weight.shape == (COLUMNS, 2 * ROWS)
    engine.layers[1].quant_method.fails = False
    assert not _stream(loads, 1, 7)
    engine.post_hook()
    assert serves(engine, 1)


def test_a_failed_update_between_does_no_harm() -> None:
    engine = Engine()
    _update(engine, 0)
    loads = Loads(engine.load, engine.recordable, get_device("cpu", 0))
    _stream(loads, 1, 7)
    engine.abandon()  # as an engine does it when another rank failed: the plan stays
    assert _update(engine, 2).way is Way.REPLAY
    assert serves(engine, 2)


def test_another_layout_than_when_it_was_recorded() -> None:
    engine = Engine()
    _update(engine, 0)
    engine.layers[2].dtype = torch.float64
    loads = _update(engine, 1)
    assert loads.way is Way.LOADER
    assert "its layout is not what it was" in loads.notes[0]
    assert serves(engine, 1)


def test_a_plan_with_slots_is_written_down_and_read() -> None:
    engine = Engine(("copies", "casts", "copies"))
    _update(engine, 0)
    plan = _plan(engine)
    assert LoadPlan.decode(plan.encode()) == plan
    assert [storage.names for storage in plan.held] == [("table",), *((f"layers.{n}.weight",) for n in range(LAYERS))]
    assert {layer: list(slots) for layer, slots in plan.layers.items()} == {f"layers.{n}": ["weight"] for n in range(LAYERS)}
    assert plan.covered == {0}  # a row of padding is nobody's
    assert {left.name for left in plan.loader} == {"layer.1.0", "layer.1.1"}
