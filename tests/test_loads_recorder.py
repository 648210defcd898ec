"""Which loaders are recorded, and which stay the loader's business, and why."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from checkpoint_engine.errors import LoadPlanError
from checkpoint_engine.loads.model import Model
from checkpoint_engine.loads.plan import LoadPlan
from checkpoint_engine.loads.recorder import Recorder
from helpers.loads import Memory, Run, Weights, fingerprint, raw_bytes, record, replay

BF16, F32 = torch.bfloat16, torch.float32
Tensors = dict[str, torch.Tensor]


def weights(seed: int = 0, **shapes: tuple[int, ...]) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return [(name, torch.randn(shape, generator=generator).to(BF16)) for name, shape in shapes.items()]


def qkv(seed: int = 0) -> list[Weights]:
    """Three buckets' worth."""
    return [[pair] for pair in weights(seed, q=(4, 6), k=(2, 6), v=(2, 6))]


def together(seed: int) -> Weights:
    """The same in one bucket."""
    return [pair for bucket in qkv(seed) for pair in bucket]


def model(**more: torch.Tensor) -> Tensors:
    return {"attn.qkv": torch.zeros(8, 6, dtype=BF16), "mlp.up": torch.zeros(4, 6, dtype=BF16), **more}


def reasons(plan: LoadPlan) -> dict[str, str]:
    return {left.name: left.reason for left in plan.loader}


def planned(plan: LoadPlan) -> list[str]:
    return [tensor.name for tensor in plan.planned]


def as_loaded(make: Callable[[Tensors], Run], first: list[Weights], second: list[Weights], tensors: Tensors) -> LoadPlan:
    """Record with `first`, update with `second`; the model must be as a loader of its own makes another of `second`."""
    run = make(tensors)
    plan = record(run, [Memory(b).weights for b in first], tensors)
    replay(plan, run, second, tensors)
    fresh = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    other = make(fresh)
    for source in (first, second):
        for bucket in source:
            with torch.no_grad():
                other(bucket)
    for name in tensors:
        assert torch.equal(raw_bytes(tensors[name]), raw_bytes(fresh[name])), name
    return plan


SLOTS = {"q": (0, 4), "k": (4, 2), "v": (6, 2)}


def stacking(tensors: Tensors) -> Run:
    def run(given: Weights) -> None:
        for name, w in given:
            tensors["attn.qkv"].narrow(0, *SLOTS[name]).copy_(w)

    return run


def test_a_loader_that_copies_is_recorded() -> None:
    plan = as_loaded(stacking, qkv(1), qkv(2), model())
    assert planned(plan) == ["q", "k", "v"] and plan.loader == () and plan.useless() is None
    assert plan.nbytes == 8 * 6 * 2


def test_nothing_is_planned_twice_when_gathered_by_one_operation() -> None:
    def concatenating(tensors: Tensors) -> Run:
        return lambda given: tensors["attn.qkv"].copy_(torch.cat([w for _, w in given]))

    plan = as_loaded(concatenating, [together(1)], [together(2)], model())
    assert planned(plan) == ["q", "k", "v"]


def test_sources_that_are_stacked_are_told_apart() -> None:
    def stacked(tensors: Tensors) -> Run:
        return lambda given: tensors["moe.w"].copy_(torch.stack([w.t() for _, w in given], 1))

    shapes = {f"e{number}": (4, 3) for number in range(5)}
    plan = as_loaded(stacked, [weights(1, **shapes)], [weights(2, **shapes)], {"moe.w": torch.zeros(3, 5, 4, dtype=BF16)})
    assert planned(plan) == list(shapes) and all(len(tensor.copies) == 1 for tensor in plan.planned)


def test_what_one_operation_gathers_stays_together() -> None:
    def gathering(tensors: Tensors) -> Run:
        def run(given: Weights) -> None:
            tensors["attn.qkv"].copy_(torch.cat([w for _, w in given]))
            if given[1][1].float().isnan().any():  # of k alone
                raise ValueError("k is not a number")

        return run

    plan = as_loaded(gathering, [together(1)], [together(2)], model())
    assert planned(plan) == [] and reasons(plan)["q"] == reasons(plan)["v"] == "it is loaded together with k"


def test_storages_that_go_are_not_taken_for_those_that_come() -> None:
    """Keys of storages are addresses: they come again at once."""

    def cloning(tensors: Tensors) -> Run:
        return lambda given: [tensors["mlp.up"][int(n)].copy_(w.clone().clone()) for n, w in given]

    def rows(seed: int) -> list[Weights]:
        return [
            [(str(row), w) for row, (_, w) in enumerate(weights(seed, a=(6,), b=(6,), c=(6,), d=(6,)))][r : r + 1]
            for r in range(4)
        ]

    for seed in range(10):
        assert planned(as_loaded(cloning, rows(seed), rows(seed + 1), model())) == ["0", "1", "2", "3"]


def test_a_cast_is_the_loaders_business_every_time() -> None:
    def casting(tensors: Tensors) -> Run:
        def run(given: Weights) -> None:
            for name, w in given:
                tensors["attn.qkv"].narrow(0, *SLOTS[name]).copy_(w if name != "k" else w.float())

        return run

    plan = as_loaded(casting, qkv(1), qkv(2), model())
    assert planned(plan) == ["q", "v"] and "_to_copy from bfloat16 to float32" in reasons(plan)["k"]


def test_a_copy_into_another_dtype_is_refused() -> None:
    def transposing(tensors: Tensors) -> Run:
        return lambda given: tensors["m.w"].copy_(given[0][1].t())

    plan = as_loaded(transposing, [weights(1, w=(3, 5))], [weights(2, w=(3, 5))], {"m.w": torch.zeros(5, 3)})
    assert planned(plan) == [] and "copy_ from bfloat16 to float32" in str(plan.useless())


def cleared(w: torch.Tensor) -> torch.Tensor:
    copy = w.clone()
    copy[1].fill_(0)
    return copy


def doing(what: Callable[[torch.Tensor, torch.Tensor], object]) -> Callable[[Tensors], Run]:
    """A loader of one tensor `w` into `m.w`."""
    return lambda tensors: lambda given: [what(tensors["m.w"], w) for _, w in given]


SINGLE: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], object], str]] = {
    "arithmetic": (lambda p, w: p.copy_(w * 2), "mul"),
    "item": (lambda p, w: p.copy_(w) if w[0, 0].item() > -1e9 else None, "_local_scalar_dense"),
    "in place on the model": (lambda p, w: p.copy_(w).add_(1), "add_"),
    "in place on the source": (lambda p, w: p.copy_(w.clamp_(0)), "clamp_"),
    "indexed": (lambda p, w: p.copy_(w[torch.tensor([3, 2, 1, 0])]), "index"),
    "through memory of its own": (lambda p, w: p.copy_(STAGING.copy_(w)), "outside of the model"),
    "padded": (lambda p, w: (p[:4].copy_(w), p[3:].fill_(0)), "fill_"),
    "padded beside": (lambda p, w: p.copy_(torch.nn.functional.pad(w[:, :5], (0, 1))), "constant_pad_nd"),
    "compared": (lambda p, w: p.copy_(w) if not torch.equal(p, w) else None, "equal"),
    "swapped halves twice": (lambda p, w: (p.copy_(w), p[:2].copy_(w[2:])), "more than once"),
    "derived": (lambda p, w: (p[:2].copy_(w[:2]), p[2:].copy_(p[:2])), "copy_"),
    "scattered": (lambda p, w: p.index_put_((torch.arange(4),), w), "index_put_"),
    "partly cleared copy": (lambda p, w: p.copy_(cleared(w)), "copy_"),
    "chosen": (lambda p, w: p.copy_(torch.where(w > 0, w, -w)), "does more than copy"),
}
STAGING = torch.zeros(4, 6, dtype=BF16)


@pytest.mark.parametrize("kind", SINGLE)
def test_what_is_no_copy_is_refused(kind: str) -> None:
    what, reason = SINGLE[kind]
    plan = as_loaded(doing(what), [weights(1, w=(4, 6))], [weights(2, w=(4, 6))], {"m.w": torch.zeros(4, 6, dtype=BF16)})
    assert planned(plan) == [] and reason in reasons(plan)["w"]
    assert plan.useless() is not None


def test_one_that_writes_nothing_is_refused() -> None:
    plan = record(lambda given: None, qkv(), model())
    assert "not seen to write" in str(plan.useless())


def test_a_tensor_of_which_this_rank_keeps_nothing_needs_no_loader() -> None:
    def picking(tensors: Tensors) -> Run:
        return lambda given: [tensors["mlp.up"].copy_(w) for name, w in given if name == "up"]

    plan = as_loaded(picking, [weights(1, up=(4, 6), x=(9,))], [weights(2, up=(4, 6), x=(9,))], model())
    assert planned(plan) == ["up", "x"]


def test_two_tensors_for_one_place_are_both_the_loaders() -> None:
    def run_of(tensors: Tensors) -> Run:
        return lambda given: [tensors["mlp.up"].copy_(w) for _, w in given]

    plan = as_loaded(run_of, [weights(1, a=(4, 6), b=(4, 6))], [weights(2, a=(4, 6), b=(4, 6))], model())
    assert planned(plan) == [] and "more than once" in reasons(plan)["a"] and "more than once" in reasons(plan)["b"]


def test_the_same_copy_twice_is_one() -> None:
    plan = as_loaded(doing(lambda p, w: (p.copy_(w), p.copy_(w))), [weights(1, w=(4, 6))], [weights(2, w=(4, 6))],
                     {"m.w": torch.zeros(4, 6, dtype=BF16)})  # fmt: skip
    assert planned(plan) == ["w"] and len(plan.planned[0].copies) == 1


class Holding:
    """Keeps q and k until both came, and then loads them; v comes when it comes."""

    def __init__(self, tensors: Tensors, keep: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.tensors, self.keep, self.held = tensors, keep, dict[str, torch.Tensor]()

    def __call__(self, given: Weights) -> None:
        for name, w in given:
            if name in "qk":
                self.held[name] = self.keep(w)
                if len(self.held) == 2:
                    self.tensors["attn.qkv"][:6].copy_(torch.cat([self.held.pop("q"), self.held.pop("k")]))
            else:
                self.tensors["attn.qkv"].narrow(0, *SLOTS[name]).copy_(w)


@pytest.mark.parametrize("keep", [lambda w: w, lambda w: w[:], lambda w: w.clone()], ids=["tensor", "view", "copy"])
def test_what_is_kept_between_calls_is_the_loaders(keep: Callable[[torch.Tensor], torch.Tensor]) -> None:
    first, second = qkv(1), qkv(2)
    plan = as_loaded(lambda tensors: Holding(tensors, keep), first, second, model())
    assert planned(plan) == ["v"] and "keeps" in reasons(plan)["q"] and reasons(plan)["k"]


def test_what_is_kept_within_one_call_is_not_kept() -> None:
    plan = as_loaded(lambda t: Holding(t, lambda w: w), [together(1)], [together(2)], model())
    assert planned(plan) == ["q", "k", "v"]


def test_a_cycle_is_not_taken_for_keeping() -> None:
    def cyclic(tensors: Tensors) -> Run:
        def run(given: Weights) -> None:
            cycle: list[Any] = [given]
            cycle.append(cycle)
            stacking(tensors)(given)

        return run

    assert planned(as_loaded(cyclic, qkv(1), qkv(2), model())) == ["q", "k", "v"]


def test_padding_marks_what_is_loaded_into_the_same_parameter_only() -> None:
    def embedding(tensors: Tensors) -> Run:
        def run(given: Weights) -> None:
            for name, w in given:
                if name == "embed":
                    tensors["embed.weight"][:3].copy_(w)
                    tensors["embed.weight"][3:].fill_(0)
                else:
                    stacking(tensors)([(name, w)])

        return run

    more = {"embed.weight": torch.ones(5, 6, dtype=BF16)}
    first, second = ([weights(seed, embed=(3, 6)), *qkv(seed)] for seed in (1, 2))
    plan = as_loaded(embedding, first, second, model(**more))
    assert planned(plan) == ["q", "k", "v"] and "fill_" in reasons(plan)["embed"]


def test_a_write_that_nothing_explains_voids_its_module() -> None:
    def scaling(tensors: Tensors) -> Run:
        def run(given: Weights) -> None:
            for name, w in given:
                if name == "up":
                    tensors["mlp.up"].copy_(w)
                else:
                    stacking(tensors)([(name, w)])
                    tensors["attn.scale"].zero_()

        return run

    more = {"attn.scale": torch.ones(1)}
    first, second = ([*qkv(seed), weights(seed, up=(4, 6))] for seed in (1, 2))
    plan = as_loaded(scaling, first, second, model(**more))
    assert planned(plan) == ["up"] and all("attn.scale (zero_)" in reason for reason in reasons(plan).values())


def test_views_of_one_storage_and_numpy_aliases_are_found() -> None:
    flat = torch.zeros(10, 6, dtype=F32)
    tensors = {"m.a": flat[:4], "m.b": flat[4:]}

    def run_of(given_tensors: Tensors) -> Run:
        def run(given: Weights) -> None:
            for name, w in given:
                torch.from_numpy(given_tensors[name].numpy()).copy_(torch.from_numpy(w.numpy()))

        return run

    def make(seed: int) -> list[Weights]:
        return [[(n, w.float()) for n, w in weights(seed, **{"m.a": (4, 6), "m.b": (6, 6)})]]

    assert planned(as_loaded(run_of, make(1), make(2), tensors)) == ["m.a", "m.b"]


def test_parameters_that_moved_or_experts_that_were_permuted_are_noticed() -> None:
    layer = torch.nn.Linear(6, 4, bias=False, dtype=BF16)
    layer.register_buffer("expert_map", torch.tensor([0, 1, -1]))
    buckets = [weights(1, weight=(4, 6))]
    run: Run = lambda given: [layer.weight.copy_(w) for _, w in given]  # noqa: E731
    model = Model.of(layer)
    with torch.no_grad(), Recorder(model) as recorder:
        recorder.load(run, buckets[0])
    checkpoint = fingerprint(buckets)
    plan = recorder.finish(Model.of(layer), checkpoint)
    assert plan.stale(Model.of(layer).fingerprint, checkpoint) is None
    layer.expert_map.copy_(torch.tensor([1, 0, -1]))
    assert "expert maps" in str(plan.stale(Model.of(layer).fingerprint, checkpoint))
    layer.expert_map.copy_(torch.tensor([0, 1, -1]))
    assert plan.stale(Model.of(layer).fingerprint, checkpoint) is None
    layer.weight.data = layer.weight.data.clone()
    assert "not where" in str(plan.stale(Model.of(layer).fingerprint, checkpoint))


@pytest.mark.parametrize(
    "other",
    [weights(1, q=(4, 6), more=(2,)), weights(1), weights(1, q=(6, 4)), [("q", torch.zeros(4, 6))]],
    ids=["one more", "fewer", "another shape", "another dtype"],
)
def test_another_checkpoint_is_noticed(other: Weights) -> None:
    tensors = model()
    buckets = [weights(1, q=(4, 6))]
    plan = record(stacking(tensors), buckets, tensors)
    assert plan.stale(Model(tensors).fingerprint, fingerprint(buckets)) is None
    assert "other tensors" in str(plan.stale(Model(tensors).fingerprint, fingerprint([other])))


def test_a_loader_that_replaces_parameters_cannot_be_recorded() -> None:
    layer = torch.nn.Linear(6, 4, bias=False, dtype=BF16)

    def run(given: Weights) -> None:
        layer.weight.data = given[0][1].clone()

    with torch.no_grad(), Recorder(Model.of(layer)) as recorder:
        recorder.load(run, weights(1, weight=(4, 6)))
    with pytest.raises(LoadPlanError, match="replaced parameters"):
        recorder.finish(Model.of(layer), "")


def test_a_write_that_the_recorder_cannot_see_is_found_by_digest() -> None:
    tensors = {"m.w": torch.zeros(4, 6), "m.seen": torch.zeros(4, 6)}

    def run(given: Weights) -> None:
        for name, w in given:
            if name == "seen":
                tensors["m.seen"].copy_(w)
            else:
                worker = threading.Thread(target=lambda w=w: tensors["m.w"].copy_(w))  # the recorder watches one thread
                worker.start()
                worker.join()

    buckets = [[(name, w.float()) for name, w in weights(1, seen=(4, 6), w=(4, 6))]]
    with pytest.raises(LoadPlanError, match=r"m\.w changed"):
        record(run, buckets, tensors)


def test_the_loaders_error_is_the_callers() -> None:
    def run(given: Weights) -> None:
        raise ValueError("not today")

    with Recorder(Model(model())) as recorder, pytest.raises(ValueError, match="not today"):
        recorder.load(run, weights(1, q=(4, 6)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_autograd_modes_make_no_difference(mode: Callable[[], Any]) -> None:
    def moving(tensors: Tensors) -> Run:
        def run(given: Weights) -> None:
            with mode():
                for _, w in given:
                    tensors["m.w"].copy_(w.t().contiguous().reshape(2, 12).flatten().narrow(0, 0, 24).view(4, 6))
                    tensors["m.other"].copy_(w.to(BF16, copy=True).chunk(2, 0)[1].movedim(0, 1).reshape(-1))

        return run

    tensors = {"m.w": torch.zeros(4, 6, dtype=BF16), "m.other": torch.zeros(12, dtype=BF16)}
    plan = as_loaded(moving, [weights(1, w=(6, 4))], [weights(2, w=(6, 4))], tensors)
    assert planned(plan) == ["w"] and plan.nbytes == 36 * 2


def test_what_goes_through_numpy_is_the_loaders_business() -> None:
    def through_numpy(tensors: Tensors) -> Run:
        def run(given: Weights) -> None:
            for name, w in given:
                if name == "w":
                    tensors["m.w"].copy_(torch.from_numpy(w.numpy().T.copy()))
                else:
                    tensors[f"{name}.w"].copy_(w)

        return run

    def make(seed: int) -> list[Weights]:
        return [[(n, w.float()) for n, w in bucket] for bucket in ([*weights(seed, a=(2,), w=(6, 4))], [*weights(seed, b=(2,))])]

    tensors = {"m.w": torch.zeros(4, 6), "a.w": torch.zeros(2), "b.w": torch.zeros(2)}
    plan = as_loaded(through_numpy, make(1), make(2), tensors)
    assert planned(plan) == ["b"], "of the other bucket nothing is certain"


def test_one_that_waits_for_another_without_reading_both_at_once() -> None:
    def waiting(tensors: Tensors) -> Run:
        held: dict[str, torch.Tensor] = {}

        def run(given: Weights) -> None:
            for name, w in given:
                if name == "q":
                    held["q"] = w
                else:
                    tensors["mlp.up"].copy_(held.pop("q"))
                    tensors["attn.qkv"][:2].copy_(w)

        return run

    first, second = ([weights(seed, q=(4, 6)), weights(seed, k=(2, 6))] for seed in (1, 2))
    plan = as_loaded(waiting, first, second, model())
    assert planned(plan) == [] and "one call with what its loader kept" in reasons(plan)["k"]


def test_a_tensor_that_comes_twice_is_the_loaders_business() -> None:
    plan = as_loaded(stacking, [*qkv(1), *qkv(3)[:1]], qkv(2), model())
    assert planned(plan) == ["k", "v"] and "more than once" in reasons(plan)["q"]


def test_a_generator_of_a_loader_that_pops_is_followed() -> None:
    """What it has popped it no longer holds: the memory's place may be taken by others at once."""

    def popping(tensors: Tensors) -> Run:
        def each(given: Weights) -> Iterator[tuple[str, torch.Tensor]]:
            while given:
                yield given.pop(0)

        def run(given: Weights) -> None:
            for name, w in each(given):
                piece = w.clone()
                del w
                tensors["attn.qkv"].narrow(0, *SLOTS[name]).copy_(piece)

        return run

    first, second = [together(1)], [together(2)]
    tensors = model()
    plan = record(popping(tensors), [list(b) for b in first], tensors)
    replay(plan, popping(tensors), second, tensors)
    assert planned(plan) == ["q", "k", "v"]
    assert torch.equal(tensors["attn.qkv"], torch.cat([w for _, w in second[0]]))
