"""The fused experts against the loop over them in float64, under the error rule, with every trap of a routing."""

import math
from dataclasses import replace

import pytest
import torch
from accuracy import compare
from devices import CPU, CUDA, TRITON
from experts_draws import NAMES, asking, draw, fused, loop, results

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from torch.utils.checkpoint import checkpoint

from lora_fast.experts.form import ExpertsForm, Gate
from lora_fast.experts.fused import FusedExperts
from lora_fast.kernels import tiles
from lora_fast.kernels.experts import problem as problems
from lora_fast.kernels.program import Program
from lora_fast.kernels.tiles import Tile
from lora_fast.timing import graphed

pytestmark = pytest.mark.usefixtures("poisoned")

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
GPT_OSS = ExpertsForm(transposed=True, interleaved=True, gate=Gate("gpt_oss", 1.702, 1.0))
CLAMPED = ExpertsForm(gate=Gate("clamped", limit=0.5))


def hold(draws, wanted=NAMES):
    """The error rule, squared errors pooled over the draws."""
    ours, eagers, truths = ([results(function, one, wanted) for one in each] for function, each in sides(draws))
    compare(ours, eagers, truths, draws[0].x.dtype)


def sides(draws):
    return (fused, draws), (loop, draws), (loop, [one.to(torch.float64) for one in draws])


def routed(one, ids):
    return replace(one, ids=ids.to(one.ids))


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Several tiles and chunks of each expert, though there are few rows."""
    monkeypatch.setattr(problems, "CHUNK", 16)
    with tiles.override(experts_product=Tile(m=16, n=32, k=16), experts_rows=Tile(m=16, k=16, r=16)):
        yield


# The forms.

SMALL = [
    pytest.param(FLOAT, {"r": (4, 16), "experts": 16, "k": 3}, id="E=16"),
    pytest.param(FLOAT, {"r": (16, 4), "experts": 4}, id="E=4"),
    pytest.param(FLOAT, {"form": GPT_OSS, "bias": True, "r": (16, 16)}, id="gpt-oss"),
    pytest.param(
        HALF,
        {"form": GPT_OSS, "bias": True, "r": (3, 40), "adapter": FLOAT},
        id="gpt-oss-float16",
        marks=pytest.mark.medium,
    ),
    pytest.param(FLOAT, {"form": CLAMPED, "bias": True, "r": (80, 2)}, id="clamped"),
    pytest.param(HALF, {"form": ExpertsForm(interleaved=True), "r": (16, 16), "adapter": FLOAT}, id="interleaved"),
    pytest.param(HALF, {"form": ExpertsForm(transposed=True), "routing": HALF, "ids": torch.int32}, id="transposed"),
    pytest.param(FLOAT, {"h": 35, "i": 37, "tokens": 13, "k": 1}, id="odd"),
]


@pytest.mark.medium
@pytest.mark.interpreted
@pytest.mark.parametrize("dtype, about", SMALL)
def test_error_rule(dtype, about):
    hold([draw(dtype=dtype, seed=seed, **about) for seed in range(1 if dtype == FLOAT else 2)])


@pytest.mark.medium
@pytest.mark.interpreted
@pytest.mark.usefixtures("tiny_tiles")
def test_error_rule_with_many_tiles_and_chunks():
    hold([draw(40, 2, 3, dtype=FLOAT, bias=True, r=(16, 8))])


@pytest.mark.medium
@pytest.mark.interpreted
@pytest.mark.parametrize("ranks", [(0, 0), (16, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("form", [ExpertsForm(), GPT_OSS], ids=["plain", "gpt-oss"])
def test_one_target_or_none(ranks, form):
    hold([draw(9, r=ranks, form=form, bias=True)])


@pytest.mark.medium
@pytest.mark.interpreted
@pytest.mark.parametrize("wanted", [(), ("dx",), ("dw",), ("dA1",), ("dB1",), ("dA2", "dB2"), NAMES[3:]], ids="+".join)
def test_what_asks_for_a_gradient_gets_it_alone(wanted):
    draws = 3 if wanted == ("dw",) else 1  # of so few numbers that eager's error of one draw is chance
    hold([draw(9, bias=True, seed=seed) for seed in range(draws)], wanted)


@pytest.mark.interpreted
def test_weights_that_are_views_of_the_other_layout():
    one = draw(12)
    hold([replace(one, gate_up=one.gate_up.mT.contiguous().mT)])


@pytest.mark.interpreted
def test_tensors_that_are_not_contiguous():
    one = draw(12)
    other = replace(one, x=torch.cat((one.x, one.x), 1)[:, ::2], ids=one.ids.t().contiguous().t())
    found, expected = results(fused, other), results(fused, replace(other, x=other.x.contiguous()))
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


# Routings.


@pytest.mark.interpreted
def test_few_tokens():
    """Held together, since torch sums up a single token's products in a better order than those of several."""
    hold([draw(1, 1), draw(1, 3), draw(5, 1), draw(7, 3)])


@pytest.mark.interpreted
@pytest.mark.usefixtures("tiny_tiles")
def test_one_expert_has_all_rows_and_the_others_no_gradient():
    one = draw(40, 1)
    one = routed(one, torch.full((40, 1), 2))
    hold([one])
    found, r = results(fused, one), 4
    others = [e for e in range(4) if e != 2]
    assert not found["dA1"].view(4, r, -1)[others].any() and found["dA1"].view(4, r, -1)[2].any()
    assert not found["dB1"].view(-1, r, 4)[..., others].any() and found["dB1"].view(-1, r, 4)[..., 2].any()


@pytest.mark.versions
@pytest.mark.medium
@pytest.mark.interpreted
@pytest.mark.parametrize("share", ["some", "all"])
def test_slots_of_no_expert(share):
    """Expert parallelism marks them with E; below 0 is none either. Their weights may be anything."""
    one = draw(13, 3, bias=True)
    ids = one.ids.clone()
    foreign = torch.zeros_like(ids, dtype=torch.bool) if share == "some" else torch.ones_like(ids, dtype=torch.bool)
    foreign[::3, 1], foreign[4] = True, True
    ids[foreign] = torch.tensor([4, -1, 1 << 40]).repeat(13)[: int(foreign.sum())]
    one = replace(routed(one, ids), weights=one.weights.masked_fill(foreign, math.nan))
    found = results(fused, one)
    assert not found["dw"][foreign].any() and not found["y"][4].any() and not found["dx"][4].any()
    if share == "some":
        hold([one])
    else:
        assert not any(found[name].any() for name in NAMES)


@pytest.mark.interpreted
def test_no_tokens():
    found = results(fused, draw(0))
    assert found["y"].shape == (0, 32) and not any(t.any() for t in found.values())


@pytest.mark.interpreted
def test_a_nan_stays_with_its_expert():
    """In the weights, the adapters or a row of one: those of the others are in reach of neither."""
    one = draw(20, 1, 3, i=40, r=(4, 4), dtype=HALF)
    clean = results(fused, one)
    spoilt = [t.clone() for t in (one.gate_up, one.down, one.gate_up_lora.lora_A, one.down_lora.lora_B)]
    spoilt[0][1], spoilt[1][1], spoilt[2].view(3, 4, -1)[1], spoilt[3].view(-1, 4, 3)[..., 1] = (math.nan,) * 4
    loras = one.gate_up_lora._replace(lora_A=spoilt[2]), one.down_lora._replace(lora_B=spoilt[3])
    found = results(fused, replace(one, gate_up=spoilt[0], down=spoilt[1], gate_up_lora=loras[0], down_lora=loras[1]))
    rest = one.ids[:, 0] != 1
    assert found["y"][~rest].isnan().all()
    for name in ("y", "dx", "dw"):
        assert torch.equal(found[name][rest], clean[name][rest]), name
    for name, axis in (("dA1", 0), ("dA2", 0), ("dB1", 2), ("dB2", 2)):
        shape = (3, 4, -1) if axis == 0 else (-1, 4, 3)
        ours, expected = (t[name].view(shape).index_select(axis, torch.tensor([0, 2])) for t in (found, clean))
        assert torch.equal(ours, expected), name


# What else must hold.


@pytest.mark.interpreted
def test_two_runs_give_the_same_bits_and_leave_their_inputs():
    one, leaves = asking(draw(9, dtype=HALF, bias=True, adapter=FLOAT))
    before = [t.clone() for t in (*leaves.values(), one.dout, one.ids, one.gate_up)]
    y = fused(one)
    first, again = (torch.autograd.grad(y, list(leaves.values()), one.dout, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, again)) and torch.equal(y, fused(one))
    assert all(map(torch.equal, before, (*leaves.values(), one.dout, one.ids, one.gate_up)))


@pytest.mark.interpreted
def test_a_program_serves_every_routing(monkeypatch):
    one, _ = asking(draw(5))
    call = FusedExperts(*one.given, form=one.form)
    made = []
    honest = Program.__init__
    monkeypatch.setattr(Program, "__init__", lambda self, *args: made.append(self) or honest(self, *args))
    for seed in range(2):
        other = routed(one, draw(5, seed=seed).ids)
        call(*other.given).backward(one.dout)
    assert len(made) == 2, "a forward's and a backward's"


@pytest.mark.interpreted
def test_a_checkpoint_skips_what_nothing_reads(monkeypatch):
    one, leaves = asking(draw(5))
    call, runs = FusedExperts(*one.given, form=one.form), []
    honest = Program.run
    monkeypatch.setattr(Program, "run", lambda self, *args: runs.append(args[1:]) or honest(self, *args))
    checkpoint(call, *one.given, use_reentrant=False).backward(one.dout)
    assert runs == [(0, -2), (-2,), (0, -2), ()], "the second forward makes no y"
    expected = results(fused, draw(5))
    assert all(torch.equal(t.grad, expected[name]) for name, t in leaves.items())


@pytest.mark.interpreted
def test_saved_is_what_is_read():
    one, _ = asking(draw(r=(16, 16)), ("dB2",))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused(one)
    assert [t.dtype for t in saved] == [torch.uint8], "P2 and the routing"


@pytest.mark.medium
@pytest.mark.interpreted
def test_under_autocast():
    one, leaves = asking(draw(5, r=(16, 16)))
    with torch.autocast("cpu", torch.float16):
        y = fused(one)
    y.backward(one.dout)
    expected = results(fused, draw(5, r=(16, 16), dtype=HALF))
    assert y.dtype == FLOAT and torch.equal(y, expected["y"].float())
    assert all(t.grad.dtype == FLOAT for t in leaves.values())


@pytest.mark.medium
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_compiled(device):
    torch._dynamo.reset()
    one, leaves = asking(draw(5, bias=True, device=device))
    step = torch.compile(lambda: fused(one).relu(), backend="aot_eager", fullgraph=True)
    y = step()
    y.backward(one.dout)
    expected = results(lambda one: fused(one).relu(), draw(5, bias=True, device=device))
    assert torch.equal(y, expected["y"]) and all(torch.equal(t.grad, expected[name]) for name, t in leaves.items())
    with torch.no_grad():
        assert torch.equal(step(), y)


# On a GPU, at sizes that fill tiles and chunks.

REAL = [
    pytest.param({"tokens": 1024, "k": 8, "experts": 128, "h": 2048, "i": 768, "r": (16, 16)}, id="qwen"),
    pytest.param(
        {"tokens": 1024, "k": 4, "experts": 32, "h": 1440, "i": 1440, "r": (8, 64), "form": GPT_OSS, "bias": True},
        id="gpt-oss",
    ),
    pytest.param({"tokens": 1500, "k": 2, "experts": 8, "h": 1024, "i": 1792, "r": (32, 128)}, id="mixtral"),
    pytest.param({"tokens": 333, "k": 3, "experts": 5, "h": 515, "i": 387, "r": (5, 40), "form": CLAMPED}, id="odd"),
    pytest.param({"tokens": 512, "k": 4, "experts": 16, "h": 512, "i": 768, "r": (0, 0)}, id="frozen"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("about", REAL)
@pytest.mark.parametrize("dtype, adapter", [(BF16, None), (BF16, FLOAT), (HALF, FLOAT), (FLOAT, None)], ids=str)
def test_error_rule_on_a_gpu(about, dtype, adapter):
    hold([draw(dtype=dtype, adapter=adapter, device="cuda", **about)])


@pytest.mark.gpu
@pytest.mark.parametrize("skewed", [False, True])
def test_same_bits_twice_on_a_gpu(skewed):
    one = draw(2048, 8, 64, 1024, 768, (16, 16), BF16, "cuda")
    if skewed:
        one = routed(one, torch.where(one.ids < 32, 3, one.ids))
    first, again = results(fused, one), results(fused, one)
    assert all(torch.equal(first[name], again[name]) and not first[name].isnan().any() for name in NAMES)


@pytest.mark.gpu
@pytest.mark.parametrize("form", [ExpertsForm(), GPT_OSS], ids=["plain", "gpt-oss"])
def test_a_graph_replayed_with_other_routings(form):
    """The tables are read on the device: fewer rows, other experts, empty ones."""
    about = {"form": form, "bias": True, "dtype": BF16, "device": "cuda", "r": (16, 16)}
    one, leaves = asking(draw(600, 4, 16, 512, 384, **about))
    call, held = FusedExperts(*one.given, form=one.form), {}

    def step():
        y = call(*one.given)
        grads = torch.autograd.grad(y, list(leaves.values()), one.dout)
        held.update(zip(("y", *leaves), (y.detach(), *grads), strict=True))

    replay = graphed(step)
    routings = [draw(600, 4, 16, 512, 384, seed=seed, **about).ids for seed in range(3)]
    routings += [torch.full_like(one.ids, 5), torch.where(one.ids < 8, 16, one.ids), torch.full_like(one.ids, -1)]
    for ids in routings:
        one.ids.copy_(ids)
        replay()
        expected = results(fused, replace(draw(600, 4, 16, 512, 384, **about), ids=ids.clone()))
        assert all(torch.equal(held[name], expected[name]) for name in expected)
