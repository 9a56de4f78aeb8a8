"""Blocks under torch.compile, without a graph break: one operator forward, one backward."""

import pytest
import torch
from devices import TRITON
from torch._dynamo.testing import CompileCounterWithBackend

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from base_calls import scaled
from blocks import a_layer, close, results, trained
from crossed import crossed

from lora_fast import lora_glu, lora_group
from lora_fast.bases.four_bits import BlockWeight, Mxfp4Weight, Nf4Weight
from lora_fast.fp8 import Fp8Weight

FLOAT = torch.float32


@pytest.fixture
def compiled(device):
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("inductor" if device == "cuda" else "aot_eager")

    def compiled(function):
        return torch.compile(function, backend=backend, fullgraph=True)

    compiled.counter = backend
    return compiled


def drawn(sizes, forms, device, p=0.0):
    gen = torch.Generator(device).manual_seed(0)
    x = torch.randn(3, 8, 32, generator=gen, device=device)
    layers = [
        a_layer(n, k, dtype=FLOAT, device=device, gen=gen, p=p, **{"r": 4, **what})
        for (n, k), what in zip(sizes, forms, strict=True)
    ]
    return x, layers, gen


def same(ours, expected):
    assert ours.keys() == expected.keys()
    for name in ours:
        close(ours[name], expected[name], name)


FORMS = {
    "lora": [{}, {}, {}],
    "dora": [{"dora": True}, {"dora": True, "bias": True}, {"dora": True, "save": "z"}],
}


@pytest.mark.medium
@pytest.mark.parametrize("form, p", [("lora", 0.3), ("dora", 0.0), ("mixed", 0.0)])
def test_group(device, compiled, form, p):
    forms = {**FORMS, "mixed": [{"r": 0, "bias": True}, {"bias": True, "scaling": 0.5}, {"dora": True}]}[form]
    x, layers, gen = drawn([(32, 32), (16, 32), (8, 32)], forms, device, p)
    dys = [torch.randn(3, 8, len(layer.weight), generator=gen, device=device) for layer in layers]

    def fn(x, layers):
        return lora_group(x, layers, backend="triton")

    once = compiled(fn)
    if p:  # other seeds than in eager
        ours = results(once, x, layers, dys)
        assert ours.keys() == results(fn, x, layers, dys).keys() and all(t.isfinite().all() for t in ours.values())
    else:
        same(results(once, x, layers, dys), results(fn, x, layers, dys))
    assert compiled.counter.frame_count == 1


def test_output_that_the_graph_drops(device, compiled):
    """Its adapters get no gradient. (An unused output of the compiled function itself gets zeros.)"""
    x, layers, gen = drawn([(32, 32), (16, 32), (8, 32)], FORMS["lora"], device)
    dys = [torch.randn(3, 8, len(layers[i].weight), generator=gen, device=device) for i in (0, 2)]

    def fn(x, layers):
        first, _, last = lora_group(x, layers, backend="triton")
        return first, last

    ours = results(compiled(fn), x, layers, dys)
    assert "A1" not in ours
    same(ours, results(fn, x, layers, dys))


@pytest.mark.medium
@pytest.mark.parametrize("form, p", [("lora", 0.3), ("lora", 0.0), ("dora", 0.0)])
def test_glu(device, compiled, form, p):
    x, layers, gen = drawn([(48, 32), (48, 32), (40, 48)], FORMS[form], device, p)
    dys = [torch.randn(3, 8, 40, generator=gen, device=device)]

    def fn(x, layers):
        return lora_glu(x, *layers, "gelu_tanh", backend="triton")

    once = compiled(fn)
    if p:
        ours = results(once, x, layers, dys)
        assert ours.keys() == results(fn, x, layers, dys).keys() and all(t.isfinite().all() for t in ours.values())
    else:
        same(results(once, x, layers, dys), results(fn, x, layers, dys))
    assert compiled.counter.frame_count == 1


PACKED = {
    "nf4": Nf4Weight.quantise,
    "mxfp4": Mxfp4Weight.quantise,
    "fp8": Fp8Weight.quantise,
    "checkpoint": lambda w: scaled("float32", w.shape[0], w.shape[1], w.dtype, str(w.device)),
}


@pytest.mark.medium
@pytest.mark.parametrize(
    "device, base, block",
    crossed([("nf4", "glu"), ("mxfp4", "group"), ("fp8", "group"), ("checkpoint", "glu")], PACKED, ("group", "glu")),
)
def test_packed_bases(device, compiled, base, block):
    """Each layer's tensors go in by themselves; x is read once, and h is not kept."""
    gen = torch.Generator(device).manual_seed(0)
    x = torch.randn(24, 64, generator=gen, device=device)
    sizes = [(128, 64), (128, 64), (64, 128)] if block == "glu" else [(128, 64), (64, 64)]
    forms = {"nf4": [{}, {"r": 0}, {"dora": True, "bias": True}], "fp8": [{"dora": True}, {}, {}]}.get(base, [{}] * 3)
    dense = [
        a_layer(*size, dtype=FLOAT, device=device, gen=gen, **{"r": 4, **what})
        for size, what in zip(sizes, forms, strict=False)
    ]
    weights = [PACKED[base](layer.weight) for layer in dense]
    dys = [torch.randn(24, n, generator=gen, device=device) for n in ([64] if block == "glu" else [128, 64])]

    def fn(x, layers):
        layers = [layer._replace(weight=weight) for layer, weight in zip(layers, weights, strict=True)]
        if block == "glu":
            return lora_glu(x, *layers, backend="triton")
        return lora_group(x, layers, backend="triton")

    same(results(compiled(fn), x, dense, dys), results(fn, x, dense, dys))
    assert compiled.counter.frame_count == 1
    graph = []
    torch._dynamo.reset()
    torch.compile(lambda x: fn(x, dense), backend=lambda made, _: graph.append(made.graph) or made.forward)(x)
    called = [str(node.target) for node in graph[0].nodes if "lora_fast" in str(node.target)]
    name = "mlp" if block == "glu" else "group"
    assert called == [f"lora_fast.lora_{name}"], "one operator, not the layers'"


@pytest.mark.medium
@pytest.mark.parametrize("block", ["group", "glu"])
def test_bases_that_differ_in_the_size_of_their_blocks(device, compiled, block, monkeypatch):
    """One base, one N and K, tensors of other sizes: nothing of one is the other's."""
    gen = torch.Generator(device).manual_seed(0)
    x = torch.randn(24, 128, generator=gen, device=device)
    dys = [torch.randn(24, 128, generator=gen, device=device) for _ in range(1 if block == "glu" else 2)]
    dense = [a_layer(128, 128, 4, dtype=FLOAT, device=device, gen=gen) for _ in range(3 if block == "glu" else 2)]
    for size in (64, 128):
        monkeypatch.setattr(BlockWeight, "BLOCK", size)
        weights = [BlockWeight.quantise(layer.weight) for layer in dense]

        def fn(x, layers, weights=weights):
            layers = [layer._replace(weight=weight) for layer, weight in zip(layers, weights, strict=True)]
            if block == "glu":
                return lora_glu(x, *layers, backend="triton")
            return lora_group(x, layers, backend="triton")

        same(results(compiled(fn), x, dense, dys), results(fn, x, dense, dys))


@pytest.mark.medium
def test_other_sizes_hardly_recompile(device, compiled):
    def fn(x, layers):
        return lora_group(x, layers, backend="triton")

    once, gen = compiled(fn), torch.Generator(device).manual_seed(0)
    for n, k in ((32, 16), (48, 16), (64, 16), (64, 24), (64, 32), (64, 40)):
        layers = [a_layer(n, k, 4, dtype=FLOAT, device=device, gen=gen) for _ in range(2)]
        x = torch.randn(6, k, generator=gen, device=device)
        dys = [torch.randn(6, n, generator=gen, device=device) for _ in range(2)]
        same(results(once, x, layers, dys), results(fn, x, layers, dys))
    assert compiled.counter.frame_count <= 3


@pytest.mark.medium
def test_without_gradients(device, compiled):
    x, layers, _ = drawn([(32, 32), (32, 32), (16, 32)], FORMS["lora"], device)

    def fn(x, layers):
        return (*lora_group(x, layers, backend="triton"), lora_glu(x, *layers, backend="triton"))

    with torch.no_grad():
        for ours, expected in zip(compiled(fn)(x, layers), fn(x, layers), strict=True):
            close(ours, expected, "y")


@pytest.mark.medium
def test_scalings_hardly_recompile(device, compiled):
    x, layers, _ = drawn([(32, 32), (16, 32), (8, 32)], FORMS["lora"], device)

    def fn(x, scaling):
        return lora_group(x, [layer._replace(scaling=scaling) for layer in layers], backend="triton")

    once = compiled(fn)
    for scaling in (0.5, 1.5, 2.5, 3.5):
        for ours, expected in zip(once(x, scaling), fn(x, scaling), strict=True):
            close(ours, expected, "y")
    assert compiled.counter.frame_count <= 3


@pytest.mark.medium
def test_batch_sizes_hardly_recompile(device, compiled):
    x, layers, _ = drawn([(32, 32), (32, 32), (16, 32)], FORMS["lora"], device, p=0.3)
    layers = [trained(layer) for layer in layers]

    def fn(x):
        return (
            sum(y.sum() for y in lora_group(x, layers[:2], backend="triton"))
            + lora_glu(x, *layers, backend="triton").sum()
        )

    once = compiled(fn)
    for rows in (3, 5, 7, 9):
        once(x[:1].repeat(rows, 1, 1)).backward()
    assert compiled.counter.frame_count <= 2
