"""The models of the whole-model benchmarks: sizes, candidates that compute the same, compiled ones, timed steps."""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from benchmarks import models
from benchmarks.models import Case
from lora_fast import DoRALinear
from lora_fast.peft.layers import FastLinear

SIZE = models.TINY._replace(hidden=32, intermediate=48, heads=4, kv_heads=2, vocabulary=50, layers=2, length=8)
PAIRS = [(f"peft_{kind}", f"lora_fast_{kind}") for kind in ("lora", "dora")]


def test_all_cases():
    cases = models.all_cases()
    assert len(cases) == len(set(map(str, cases))) == 2 * (2 + 15 * 2)
    assert {case.p for case in cases if case.impl in models.FROZEN} == {0}
    for size, mode in (("1b", "eager"), ("large", "default")):
        few = models.all_cases(size, mode)
        assert {case.impl for case in few} == set(models.PLAIN) and not any(case.checkpointing for case in few)

    assert [case.impl for case in models.all_cases("30b")] == list(models.OF_EXPERTS)


def test_sizes():
    """Their weights, without making them."""
    for name, parameters in {"1b": 1.2358e9, "8b": 2.0077e9, "small": 0.3746e9, "30b": 3.115e9}.items():
        shapes = models.SIZES[name]
        with torch.device("meta"):
            model = models.base_model(shapes[0]._replace(device="meta"))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-3), name
        assert {size._replace(batch=1, length=shapes[0].length) for size in shapes} == {shapes[0]}, "one model"
    assert [(size.batch, size.length) for size in models.SIZES["1b"]] == [(1, 512), (2, 1024), (8, 1024)]


def losses(cases: list[Case], size=SIZE) -> dict[tuple, float]:
    return {case: step().item() for case, step in zip(cases, models.build(cases, size).values(), strict=True)}


@pytest.mark.medium
def test_candidates_compute_the_same():
    """Without dropout stock and patched agree in the loss, with and without checkpointing, and differ from frozen."""
    cases = [case for case in models.all_cases() if case.p == 0]
    found = losses(cases)
    for case, loss in found.items():
        assert loss == pytest.approx(found[case._replace(checkpointing=0)], rel=1e-6)
        stock = case._replace(impl=models.stock_of(case.impl))
        quantised = "fp8" in case.impl or "nf4" in case.impl
        assert loss == pytest.approx(found[stock], rel=0.02 if quantised else 1e-6)
        assert not quantised or loss != found[stock]
        assert (loss == found[Case(case.checkpointing, "frozen", 0)]) == (case.impl in models.FROZEN)


@pytest.mark.medium
def test_candidates_over_experts_compute_the_same():
    found = losses([Case(0, impl, 0) for impl in models.OF_EXPERTS], SIZE._replace(experts=8))
    frozen, _, same, stock, ours = found.values()
    assert same == pytest.approx(frozen, rel=1e-6) and ours == pytest.approx(stock, rel=1e-6)
    assert ours != pytest.approx(frozen, rel=1e-5)


@pytest.mark.parametrize("impl", [*(impl for pair in PAIRS for impl in pair), "lora_fast_own_lora"])
def test_dropout_drops(impl):
    case = Case(0, impl, 0.5)
    (step,) = models.build([case], SIZE).values()
    assert step().item() != step().item()


def test_models_share_the_base():
    """One set of base weights; adapters of their own, equal in value and in the base's dtype; ours alone patched."""
    base = models.base_model(SIZE._replace(dtype="bf16"))
    stock, ours = (models.model_of(Case(1, impl, 0.1), base) for impl in PAIRS[1])
    shared = {parameter.data_ptr() for parameter in base.parameters()}
    trained = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in (stock, ours)]
    for model, adapters in zip((stock, ours), trained, strict=True):
        assert {p.data_ptr() for p in model.parameters() if not p.requires_grad} == shared
        assert len(adapters) == 7 * SIZE.layers * 3 and {p.dtype for p in adapters.values()} == {torch.bfloat16}
        assert model.training and model.is_gradient_checkpointing
    assert all(a is not b and torch.equal(a, b) for a, b in zip(*(t.values() for t in trained), strict=True))
    patched = [sum(isinstance(m, FastLinear) for m in model.modules()) for model in (base, stock, ours)]
    assert patched == [0, 0, 7 * SIZE.layers]
    own = models.model_of(Case(1, "lora_fast_own_dora", 0.1), base)
    layers = [m for m in own.modules() if isinstance(m, DoRALinear)]
    assert {p.data_ptr() for p in own.parameters() if not p.requires_grad} == shared and len(layers) == patched[2]
    assert {p.dtype for p in own.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("impl", ["frozen", "lora_fast_lora"])
def test_a_step_makes_every_gradient(impl):
    """The input of the first layer gets a gradient too, so that every dX is computed; a step drops the last one's."""
    model = models.model_of(Case(0, impl, 0), models.base_model(SIZE))
    seen = []

    def watch(module, args, out):
        out.register_hook(seen.append)

    model.get_input_embeddings().register_forward_hook(watch)
    step = models.step_of(model, torch.arange(16).reshape(2, 8))
    grads = []
    for _ in range(2):
        step()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert len(seen) == 2 and seen[0].any() and torch.equal(*seen)
    assert len(grads[0]) == (0 if impl == "frozen" else 7 * SIZE.layers * 2)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.medium
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_models(mode, compiler, monkeypatch):
    """Each is compiled, in one graph, and gives the eager loss; graphs are told of each step."""
    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    impls = ("frozen", "lora_fast_dora", "lora_fast_own_lora") if mode == "default" else ("frozen", "lora_fast_lora")
    cases = [Case(0, impl, 0) for impl in impls]
    size = SIZE._replace(layers=1)
    expected, steps = models.build(cases, size), models.build(cases, size, mode)
    assert compiler == [{"mode": mode, "dynamic": False}] * len(cases)
    for name, step in steps.items():
        first = step().item()
        assert step().item() == first == pytest.approx(expected[name]().item(), rel=1e-5)
    assert len(begun) == (4 if mode == "reduce-overhead" else 0)


class Event:
    """A CUDA event that notes how many steps had run."""

    steps = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.steps

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_timed_step_follows_one_of_its_own(device, monkeypatch):
    ran = []

    def step(name):
        def run():
            ran.append(name)
            Event.steps += 1

        return run

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: ran.append("end"))
    monkeypatch.setattr(models.time, "process_time", lambda: Event.steps)
    times = models.measure({name: step(name) for name in "abc"}, 6, device)
    assert times == {name: [1e6 if device == "cpu" else 1000] * 6 for name in "abc"}  # a step is a second, or a ms
    each = 6 if device == "cpu" else 7
    rounds = [ran[i : i + each] for i in range(0, len(ran), each)]
    assert len(rounds) == 6 and len({tuple(r) for r in rounds}) > 1
    assert all(r[0:5:2] == r[1:6:2] and sorted(r[0:5:2]) == list("abc") and r[6:] in ([], ["end"]) for r in rounds)
    ran.clear()
    times = models.measure({"a": step("a")}, 2, device, in_a_row=3)
    assert times == {"a": [1e6 if device == "cpu" else 1000] * 2} and ran.count("a") == 2 * 4
