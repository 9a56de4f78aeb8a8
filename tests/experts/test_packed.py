"""Experts in 8 and 4 bits: exact products over what is written out ahead of each, so y and every gradient are those
over the same weights written out, bit for bit."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from devices import CPU, CUDA, TRITON
from experts_draws import NAMES, asking, draw, fused, loop, results
from torch.utils.checkpoint import checkpoint

from lora_fast.bases.four_bits import Mxfp4Weight, Nf4Weight
from lora_fast.bases.scaled import ScaledFp8Weight
from lora_fast.bases.stack import STACKED, PackedStack
from lora_fast.experts.form import ExpertsForm, Gate
from lora_fast.timing import graphed

if TRITON:
    from lora_fast.experts.fused import FusedExperts
    from lora_fast.kernels.program import Program

needs_triton = pytest.mark.skipif(not TRITON, reason="needs Triton")
GPT_OSS = ExpertsForm(transposed=True, interleaved=True, gate=Gate("gpt_oss", 1.702, 1.0))
KINDS = pytest.mark.parametrize("kind", STACKED.values(), ids=STACKED)
FORMS = pytest.mark.parametrize("form", [ExpertsForm(), GPT_OSS], ids=["plain", "gpt-oss"])
HALF, BF16 = torch.float16, torch.bfloat16


def packed(one, kind, both=True):
    """(the draw with packed experts, the draw with what these are written out to)"""
    turned = one.form.transposed
    gate_up = PackedStack.pack(one.gate_up, kind, turned) if both else one.gate_up
    down = PackedStack.pack(one.down, kind, turned)
    dense = replace(one, gate_up=gate_up.dequantise() if both else gate_up, down=down.dequantise())
    return replace(one, gate_up=gate_up, down=down), dense


def same(function, pair, wanted=NAMES):
    ours, dense = (results(function, one, wanted) for one in pair)
    for name in dense:
        assert torch.equal(ours[name], dense[name]), name


# The tensors.


@KINDS
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 128, 96)], ids=str)
def test_a_stack_is_its_experts(kind, turned, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(BF16)
    stack = PackedStack.pack(weight, kind, turned)
    dense = stack.dequantise()
    assert stack.shape == weight.shape and stack.dtype == BF16 and stack.is_made_from(weight)
    assert (dense - weight).float().norm() / weight.float().norm() < (0.03 if kind is ScaledFp8Weight else 0.13)
    matrix = stack.matrix.dequantise().view(stack.stored_shape)
    assert torch.equal(matrix.mT if turned else matrix, dense)
    for e, expert in enumerate(stack):
        found = expert if turned else expert.dequantise()
        assert torch.equal(found, dense[e]) and torch.equal(torch.as_tensor(stack[e] + 0), dense[e])
    if not turned and kind is not Nf4Weight:  # as the expert is by itself (NF4's scales share theirs with others)
        assert kind is not Mxfp4Weight or torch.equal(dense[1], kind.quantise(weight[1]).dequantise())


@KINDS
def test_a_stack_goes_where_tensors_go(kind):
    stack = PackedStack.pack(torch.randn(3, 32, 64), kind, True)
    parameter = torch.nn.Parameter(stack, requires_grad=False)
    dense = stack.dequantise()
    for other in (copy.deepcopy(parameter), pickle.loads(pickle.dumps(parameter)), parameter.to("cpu", copy=True)):
        assert isinstance(other, PackedStack) and torch.equal(other.dequantise(), dense)
    assert parameter.to(BF16).dtype == BF16 and torch.equal(parameter.to(BF16).dequantise(), dense.to(BF16))
    other = torch.randn(3, 32, 64)
    with torch.no_grad():
        parameter.copy_(other)
    assert torch.equal(parameter.dequantise(), PackedStack.pack(other, kind, True).dequantise())
    with pytest.raises(RuntimeError, match="read-only"):
        parameter.data.mul_(2)
    with pytest.raises(RuntimeError, match="ignored_params"):
        parameter.split(1)


def test_mxfp4_of_experts_that_were_mxfp4_is_lossless():
    """gpt-oss' checkpoints, dequantised by whoever loads them: blocks lie along the contraction."""
    was = PackedStack.pack(torch.randn(2, 64, 32), Mxfp4Weight, True).dequantise()
    assert torch.equal(PackedStack.pack(was, Mxfp4Weight, True).dequantise(), was)


@pytest.mark.parametrize(
    "weight, kind, error, said",
    [
        (torch.ones(2, 3, 5), Nf4Weight, ValueError, "multiple of 64"),
        (torch.ones(2, 3, 5), Mxfp4Weight, ValueError, "multiple of 32"),
        (torch.ones(4, 64), Nf4Weight, ValueError, r"expected \[E, N, K\]"),
        (torch.ones(2, 8, 8).double(), ScaledFp8Weight, TypeError, "float64"),
        (torch.tensor([1.0, torch.inf]).view(2, 1, 1), ScaledFp8Weight, ValueError, "expert 1 has elements"),
        (PackedStack.pack(torch.ones(2, 8, 8), Nf4Weight, False), ScaledFp8Weight, TypeError, "experts in nf4"),
    ],
)
def test_what_cannot_be_packed_is_refused(weight, kind, error, said):
    with pytest.raises(error, match=said):
        PackedStack.pack(weight, kind, False)


# The products.


@KINDS
@FORMS
def test_the_loop_over_packed_experts(kind, form):
    pair = packed(draw(9, form=form, bias=True), kind)
    ours, dense = (results(loop, one) for one in pair)
    for name in NAMES:
        torch.testing.assert_close(ours[name], dense[name], rtol=1e-5, atol=1e-5)


@pytest.mark.medium
@needs_triton
@pytest.mark.interpreted
@KINDS
@FORMS
def test_packed_and_written_out(kind, form):
    same(fused, packed(draw(7, form=form, bias=True), kind))


@needs_triton
@pytest.mark.medium
@pytest.mark.interpreted
@KINDS
def test_packed_in_float16(kind):
    same(fused, packed(draw(7, h=64, i=32, r=(3, 0), form=GPT_OSS, dtype=HALF, adapter=torch.float32), kind))


@pytest.mark.medium
@needs_triton
@pytest.mark.interpreted
@pytest.mark.parametrize("wanted", [(), ("dx",), ("dw",), ("dA1",)], ids="+".join)
def test_packed_where_one_is_and_one_gradient_is_asked_for(wanted):
    same(fused, packed(draw(5, r=(4, 0)), Mxfp4Weight, both=False), wanted)


@needs_triton
@pytest.mark.interpreted
def test_a_checkpoint_writes_no_weight_that_nothing_reads(monkeypatch):
    one, leaves = asking(packed(draw(5), Nf4Weight)[0])
    call, ran = FusedExperts(*one.given, form=one.form), []
    honest = Program.run

    def run(self, bound, first=0, last=None):
        ran.append([launch.kernel.fn.__name__ for launch in self.launches[first:last]])
        return honest(self, bound, first, last)

    monkeypatch.setattr(Program, "run", run)
    checkpoint(call, *one.given, use_reentrant=False).backward(one.dout)
    fills = [names.count("_whole_kernel") for names in ran]
    assert fills == [1, 1, 1, 2], "gate_up; down with y; gate_up again; both for the gradients"
    for names in ran:
        at = [i for i, name in enumerate(names) if name == "_whole_kernel"]
        assert all(names[i + 1] == "_experts_kernel" for i in at), "right ahead of its product"
    expected = results(fused, packed(draw(5), Nf4Weight)[1])
    assert all(torch.equal(t.grad, expected[name]) for name, t in leaves.items())


@needs_triton
@pytest.mark.interpreted
def test_what_is_saved_and_the_scratch():
    """Nothing of a dense weight's size, and one piece of memory for both."""
    one, _ = asking(packed(draw(4, r=(4, 4)), Nf4Weight)[0])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused(one)
    dense = one.gate_up.numel() * 4
    inner = {id(getattr(w, name)) for w in (one.gate_up, one.down) for name in w.INNER}
    assert inner <= set(map(id, saved)) and all(t.dim() < 3 for t in saved), "the inner tensors, and no weight"
    call = FusedExperts(*one.given, form=one.form)
    call(*one.given)
    (program,) = call.problem.programs.values()
    (without,) = plain_programs(packed(draw(4, r=(4, 4)), Nf4Weight)[1])
    assert 0 <= program.own - without.own - dense < 256


def plain_programs(one):
    call = FusedExperts(*asking(one)[0].given, form=one.form)
    call(*one.given)
    return call.problem.programs.values()


@needs_triton
@pytest.mark.medium
@pytest.mark.interpreted
def test_packed_under_autocast():
    one, dense = (asking(one)[0] for one in packed(draw(5), ScaledFp8Weight))
    with torch.autocast("cpu", HALF):
        ours, expected = fused(one), fused(dense)
    assert torch.equal(ours, expected) and ours.dtype == torch.float32


@needs_triton
@pytest.mark.medium
@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("kind", [Nf4Weight, ScaledFp8Weight])
def test_packed_compiled(device, kind):
    torch._dynamo.reset()
    pair = packed(draw(5, bias=True, device=device), kind)
    one, leaves = asking(pair[0])

    def layer(gate_up, down):
        return fused(replace(one, gate_up=gate_up, down=down)).relu()

    step = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = step(one.gate_up, one.down)
    y.backward(one.dout)
    expected = results(lambda one: fused(one).relu(), pair[1])
    assert torch.equal(y, expected["y"]) and all(torch.equal(t.grad, expected[name]) for name, t in leaves.items())
    with torch.no_grad():
        assert torch.equal(step(one.gate_up, one.down), y)


# On a GPU.


@needs_triton
@pytest.mark.gpu
@KINDS
@FORMS
@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
def test_packed_on_a_gpu(kind, form, dtype):
    one = draw(700, 4, 16, 512, 384, (16, 8), dtype, "cuda", form=form, bias=True, adapter=torch.float32)
    same(fused, packed(one, kind))


@needs_triton
@pytest.mark.gpu
@KINDS
def test_a_graph_of_packed_experts(kind):
    about = {"bias": True, "dtype": BF16, "device": "cuda", "r": (16, 16), "form": GPT_OSS}
    one, leaves = asking(packed(draw(600, 4, 16, 512, 384, **about), kind)[0])
    call, held = FusedExperts(*one.given, form=one.form), {}

    def step():
        y = call(*one.given)
        grads = torch.autograd.grad(y, list(leaves.values()), one.dout)
        held.update(zip(("y", *leaves), (y.detach(), *grads), strict=True))

    replay = graphed(step)
    for seed in range(2):
        one.ids.copy_(draw(600, 4, 16, 512, 384, seed=seed, **about).ids)
        replay()
        dense = packed(draw(600, 4, 16, 512, 384, **about), kind)[1]
        expected = results(fused, replace(dense, ids=one.ids.clone()))
        assert all(torch.equal(held[name], expected[name]) for name in expected)
