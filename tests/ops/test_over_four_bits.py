"""Calls over bases that are written out ahead of each product, in 4 bits or as fp8 checkpoints hold them, as models
make them: compiled, checkpointed, under autocast, in CUDA graphs, on two streams. Each is held against the same call
over the dense weight, bit for bit."""

import gc

import pytest
import torch
from base_calls import FORMS, scaled
from devices import TRITON
from torch.utils.checkpoint import checkpoint

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from lora_fast.bases.four_bits import Nf4Weight
from lora_fast.bases.scaled import ScaledFp8Weight
from lora_fast.bases.written import WrittenWeight
from lora_fast.fp8 import Fp8Weight
from lora_fast.functional import dora_linear, lora_linear
from lora_fast.kernels import program
from lora_fast.timing import graphed

FILLS = {"_whole_kernel", "_rows_kernel", "_columns_kernel", "_scaled_kernel"}


def leaves(device, dtype=torch.float32, m=24, k=64, n=96, r=4):
    gen = torch.Generator().manual_seed(0)
    shapes = (m, k), (r, k), (n, r), (n,)
    return [torch.randn(*shape, generator=gen).to(device, dtype).requires_grad_() for shape in shapes]


def pair(device, e4m3, dtype=torch.float32, k=64, n=96, seed=1, form=None):
    """(a weight in 4 bits, or as fp8 checkpoints hold it with scales of this form; its dense form as products read
    it)"""
    if form is None:
        weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
        packed = Nf4Weight.quantise(weight)
    else:
        packed = scaled(form, n, k, dtype, device, seed)
    dense = packed.dequantise()
    return (packed.for_e4m3(), Fp8Weight.quantise(dense)) if e4m3 else (packed, dense)


def width(device, e4m3):
    """The interpreter takes long to write e4m3."""
    return 16 if e4m3 and device == "cpu" else 96


def call(x, weight, a, b, m, dora, p=0.0):
    if dora:
        return dora_linear(x, weight, a, b, m, 2.0, dropout_p=p, backend="triton")
    return lora_linear(x, weight, a, b, 2.0, dropout_p=p, backend="triton")


def grads(y, leaves, dora):
    wanted = leaves if dora else leaves[:3]
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), wanted)]


@pytest.mark.medium
@pytest.mark.parametrize(
    "dora, e4m3, form", [(True, False, None), (False, True, None), (True, False, "float32"), (False, True, "bf16 rows")]
)
def test_compiled(device, dora, e4m3, form):
    torch._dynamo.reset()
    given, weights = leaves(device, n=width(device, e4m3)), pair(device, e4m3, n=width(device, e4m3), form=form)
    x, *adapter = given

    def layer(x, weight):
        return call(x, weight, *adapter, dora)

    compiled = torch.compile(layer, backend="inductor" if device == "cuda" else "aot_eager", fullgraph=True)
    ours, dense = (grads(fn(x, w), given, dora) for fn, w in zip((compiled, layer), weights, strict=True))
    for one, other in zip(ours, dense, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weights[0]), dense[0], rtol=1e-5, atol=1e-5)


@pytest.mark.versions
@pytest.mark.medium
def test_two_block_sizes_are_two_problems(device):
    """As compiled calls share their programs by what they know of the base."""
    from lora_fast.bases.four_bits import BlockWeight

    torch._dynamo.reset()
    (x, a, b, _), packed = leaves(device), Nf4Weight.quantise(torch.randn(96, 64)).to(device)
    scales = packed.scales()
    halves = BlockWeight(packed.packed, scales, packed.table, shape=(96, 64), dtype=torch.float32)
    twice = scales.repeat_interleave(2) * torch.rand(192, device=device)
    finer = BlockWeight(packed.packed, twice, packed.table, shape=(96, 64), dtype=torch.float32)
    assert halves.block == 64 and finer.block == 32
    compiled = torch.compile(lambda x, w: call(x, w, a, b, None, False), backend="aot_eager", fullgraph=True)
    for weight in (halves, finer, halves):
        dense = call(x, weight.dequantise(), a, b, None, False)
        (expected,) = torch.autograd.grad(dense.sum(), [x])
        for found in (call(x, weight, a, b, None, False), compiled(x, weight)):
            assert torch.equal(found, dense)
            assert torch.equal(torch.autograd.grad(found.sum(), [x])[0], expected)


@pytest.mark.versions
@pytest.mark.medium
def test_scales_of_other_dtypes_are_other_problems(device):
    """Of one shape, each block in a form of its own."""
    torch._dynamo.reset()
    (x, a, b, _), stored = leaves(device), scaled("float32", 96, 64, device=device).stored
    compiled = torch.compile(lambda x, w: call(x, w, a, b, None, False), backend="aot_eager", fullgraph=True)
    for scale in (torch.tensor([[0.5]]), torch.tensor([[120]], dtype=torch.uint8), torch.full((96, 1), 0.25)):
        weight = ScaledFp8Weight(stored, scale.to(device), shape=(96, 64), dtype=torch.float32)
        dense = call(x, weight.dequantise(), a, b, None, False)
        (expected,) = torch.autograd.grad(dense.sum(), [x])
        for found in (call(x, weight, a, b, None, False), compiled(x, weight)):
            assert torch.equal(found, dense)
            assert torch.equal(torch.autograd.grad(found.sum(), [x])[0], expected)


CHECKPOINTED = [(False, False, False), (False, True, False), (True, False, False), (True, False, True)]


@pytest.mark.medium
@pytest.mark.parametrize(
    "dora, e4m3, reentrant, form",
    [*((*one, None) for one in CHECKPOINTED), (False, False, False, "e8m0"), (True, True, False, "rows")],
)
def test_a_checkpoint_writes_no_weight_that_nothing_reads(device, dora, e4m3, reentrant, form, monkeypatch):
    n = width(device, e4m3)
    given, (packed, dense) = leaves(device, n=n), pair(device, e4m3, n=n, form=form)
    x, *adapter = given
    ran, start = [], program.Program.run

    def recorded(program, bound, first=0, last=None):
        kernels = [launch.kernel for launch in program.launches[first:last]]
        ran.extend(getattr(kernel, "__name__", None) or kernel.fn.__name__ for kernel in kernels)
        start(program, bound, first, last)

    monkeypatch.setattr(program.Program, "run", recorded)

    def step(weight, checkpointed):
        ran.clear()
        torch.manual_seed(3)

        def layer(x):
            return call(x, weight, *adapter, dora, p=0.3)

        y = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
        return grads(y, given, dora), sum(kernel in FILLS for kernel in ran)

    if reentrant:  # torch.autograd.grad is not for it
        monkeypatch.setitem(globals(), "grads", backward_grads)
    (plain, fills), (again, fills_again) = step(packed, False), step(packed, True)
    expected, none = step(dense, False)
    assert all(map(torch.equal, plain, expected)) and all(map(torch.equal, again, expected))
    # DoRA over e4m3 writes the rows of small gains once more, for the gradient of the magnitude.
    assert none == 0 and fills == 2 + (dora and e4m3)
    assert fills_again == fills + (dora or reentrant)


def backward_grads(y, leaves, dora):
    wanted = leaves if dora else leaves[:3]
    y.sin().sum().backward()
    found = [t.grad for t in wanted]
    for t in wanted:
        t.grad = None
    return [y.detach(), *found]


@pytest.mark.medium
@pytest.mark.parametrize("e4m3", [False, True])
def test_under_autocast(device, e4m3):
    n = width(device, e4m3)
    given, (packed, dense) = leaves(device, n=n), pair(device, e4m3, n=n)
    results = []
    for weight in (packed, dense):
        with torch.autocast(device, torch.float16):
            y = call(given[0], weight, *given[1:], True)
        assert y.dtype == torch.float16
        results.append(grads(y.float(), given, True))
    for one, other in zip(*results, strict=True):  # e4m3 comes from float16 here, there from float32
        assert (one - other).norm() <= (2e-2 if e4m3 else 0) * other.norm()


def test_an_exception_in_between(device):
    given, (packed, dense) = leaves(device), pair(device, False)
    y = call(given[0], packed, *given[1:], True)
    with pytest.raises(ValueError, match="lora_A: got shape"):
        call(given[0], packed, given[1][:, :3], *given[2:], True)
    other, _ = pair(device, False, n=256, k=64, seed=5)  # a larger one in between
    call(given[0], other, given[1], torch.randn(256, 4, device=device), None, False)
    assert all(map(torch.equal, grads(y, given, True), grads(call(given[0], dense, *given[1:], True), given, True)))


@pytest.mark.gpu
@pytest.mark.parametrize("form", [None, *FORMS])
@pytest.mark.parametrize("e4m3", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_two_graphs_on_two_streams_beside_eager(dora, e4m3, form):
    kinds = {"dtype": torch.bfloat16, "k": 1024, "n": 2048}
    given = [leaves("cuda", m=m, r=16, **kinds) for m in (4096, 300)]
    weights = [pair("cuda", e4m3, seed=seed, form=form, **kinds) for seed in (1, 2)]
    steps, outputs, expected = [], [[], []], []
    for i, (one, (packed, dense)) in enumerate(zip(given, weights, strict=True)):
        expected.append(grads(call(one[0], dense, *one[1:], dora), one, dora))

        def step(one=one, packed=packed, out=outputs[i]):
            out[:] = grads(call(one[0], packed, *one[1:], dora), one, dora)

        steps.append((step, graphed(step)))
    streams = [torch.cuda.Stream() for _ in steps]
    for _ in range(50):
        for stream, (_, replay) in zip(streams, steps, strict=True):
            with torch.cuda.stream(stream):
                replay()
        eager = [
            grads(call(one[0], packed, *one[1:], dora), one, dora)
            for one, (packed, _) in zip(given, weights, strict=True)
        ]
        torch.cuda.synchronize()
        for found in (outputs, eager):
            assert all(
                torch.equal(a, b)
                for ours, theirs in zip(found, expected, strict=True)
                for a, b in zip(ours, theirs, strict=True)
            )


@pytest.mark.gpu
@pytest.mark.parametrize("form", [None, "float32", "rows"])
def test_peak_memory_is_the_plain_layers_and_one_scratch(form):
    shape = {"k": 4096, "n": 4096}
    given = leaves("cuda", torch.bfloat16, m=4096, r=16, **shape)
    packed, dense = pair("cuda", False, torch.bfloat16, form=form, **shape)
    peaks = []
    for weight in (dense, packed):
        grads(call(given[0], weight, *given[1:], False), given, False)
        torch.cuda.synchronize()
        gc.collect()  # what other tests left would be freed within and lower a peak
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grads(call(given[0], weight, *given[1:], False), given, False)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert isinstance(packed, WrittenWeight)
    assert peaks[1] <= 1.01 * peaks[0] + 2 * 4096 * 4096
