"""A group on the kernels: the error rule, what autograd makes of it, what it keeps, and when it comes apart."""

import warnings

import pytest
import torch
from accuracy import compare
from devices import CPU, CUDA, TRITON, saving

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from blocks import a_layer, close, keep_mask, results, trained
from torch.utils.checkpoint import checkpoint

from lora_fast import Layer, SlowPathWarning, dispatch, lora_group
from lora_fast.blocks import paths, reference
from lora_fast.fp8 import Fp8Weight
from lora_fast.functional import lora_linear
from lora_fast.kernels import group as group_kernels
from lora_fast.kernels import program

pytestmark = pytest.mark.usefixtures("poisoned")

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
FORMS: dict[str, list[dict]] = {
    "lora": [{}, {}, {}],
    "ranks": [{"r": 16}, {"r": 3, "scaling": 0.7}, {"r": 40, "scaling": 8.0}],
    "dora": [{"dora": True}] * 3,
    "mixed": [{"dora": True, "bias": True}, {"bias": True, "scaling": 0.5}, {"r": 0, "bias": True}],
    "adapters": [{"adapter": FLOAT}, {"adapter": FLOAT, "dora": True, "r": 5}, {}],
    "frozen": [{}, {"r": 0}, {"r": 0}],
    "biased": [{"dora": True, "bias": True}, {"dora": True, "bias": True, "r": 3}],
    "some": [{"dora": True}, {"r": 0}, {"dora": True, "r": 3}],
    "two": [{"r": 8}, {"bias": True}],
    "four": [{"r": 12, "dora": True, "save": "z"}, {"r": 0}, {}, {"bias": True}],
}


def drawn(form, shape, dtype, device, seed=0, p=0.0):
    """x, layers and dYs."""
    gen = torch.Generator(device).manual_seed(seed)
    m, k, widths, r = shape
    x = torch.randn(m, k, generator=gen, device=device).to(dtype)
    layers = [
        a_layer(n, k, dtype=dtype, device=device, gen=gen, p=p, **{"r": r, **what})
        for n, what in zip(widths, FORMS[form], strict=False)
    ]
    return x, layers, [torch.randn(m, len(a.weight), generator=gen, device=device).to(dtype) for a in layers]


def fused(x, layers, seed=1):
    torch.manual_seed(seed)
    return lora_group(x, layers, backend="triton")


def plain(p, shape, device):
    """The reference with the mask of ``fused``."""
    if p == 0:
        return reference.lora_group
    keep, scale = keep_mask(p, shape[0], shape[1], device)

    def fn(x, layers):
        layers = [layer._replace(dropout_p=1 - 1 / scale) for layer in layers]
        return reference.lora_group(x, layers, keep=keep.view(x.shape))

    return fn


SMALL, ODD = (24, 64, (48, 16, 32, 16), 16), (33, 70, (45, 21, 18, 16), 3)
WIDE = 24, 64, (48, 16, 32, 16), 56  # in all more ranks than a program takes


def here(dtype, form, shape, p=0.0, fast=False):
    """A case of the interpreter's."""
    marks = CPU.marks if fast else (*CPU.marks, pytest.mark.medium)
    return pytest.param("cpu", dtype, form, shape, p, marks=marks, id=f"cpu-{str(dtype)[6:]}-{form}-p{p}")


CASES = [
    *(here(FLOAT, form, SMALL, fast=form == "dora") for form in ("lora", "dora", "mixed", "frozen", "four")),
    *(here(HALF, form, ODD, fast=form == "mixed") for form in ("ranks", "dora", "mixed", "adapters", "two")),
    here(FLOAT, "ranks", ODD, 0.3),
    here(HALF, "dora", SMALL, fast=True),  # which few rows' launches take, as those that follow
    here(HALF, "lora", SMALL, 0.3),
    *(here(HALF, form, SMALL) for form in ("frozen", "biased", "some")),
    here(HALF, "mixed", SMALL, 0.3, fast=True),
    here(HALF, "lora", WIDE, fast=True),
    here(HALF, "dora", WIDE, 0.3),
    *(
        pytest.param("cuda", dtype, form, shape, p, marks=CUDA.marks, id=f"cuda-{str(dtype)[6:]}-{form}-{name}-p{p}")
        for dtype in (BF16, HALF, FLOAT)
        for form in FORMS
        for name, shape, p in [
            ("many", (4096, 4096, (4096, 1024, 1024, 512), 16), 0.1),
            ("few", (1000, 2048, (2048, 512, 512, 256), 16), 0.0),
            ("odd", (1003, 1001, (1003, 333, 70, 21), 12), 0.1),
            ("wide", (1000, 2048, (2048, 512, 512, 256), 64), 0.1),
        ]
    ),
]


@pytest.mark.parametrize("device, dtype, form, shape, p", CASES)
def test_error_rule(device, dtype, form, shape, p):
    draws = [drawn(form, shape, dtype, device, seed, p) for seed in range(2 if (device, dtype) == ("cpu", HALF) else 1)]
    base = plain(p, shape, device)
    ours = [results(fused, *draw) for draw in draws]
    eagers = [results(base, *draw) for draw in draws]
    compare(ours, eagers, [results(base, *draw, torch.float64) for draw in draws], dtype)


@pytest.mark.parametrize("unused", [(0,), (1, 2), (0, 1)], ids=str)
def test_unused_outputs_give_no_gradients(device, unused):
    x, layers, dys = drawn("mixed", SMALL, FLOAT, device)
    dys = [None if i in unused else dy for i, dy in enumerate(dys)]
    ours, truth = results(fused, x, layers, dys), results(reference.lora_group, x, layers, dys, torch.float64)
    compare([ours], [results(reference.lora_group, x, layers, dys)], [truth], FLOAT)  # the same names


@pytest.mark.medium
def test_second_backward_gives_the_same_bits(device):
    x, layers, dys = drawn("mixed", ODD, HALF, device, p=0.3)
    x, layers = x.requires_grad_(), [trained(layer) for layer in layers]
    leaves = [x, *(t for layer in layers for t in layer.tensors[1:] if t is not None)]
    ys = fused(x, layers)
    before = [t.detach().clone() for t in (x, *dys, *ys)]
    first = torch.autograd.grad(ys, leaves, dys, retain_graph=True)
    second = torch.autograd.grad(ys, leaves, dys)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, before, (x, *dys, *ys))), "something that is not its own was written"


def test_only_what_asks_for_a_gradient_gets_one(device):
    x, layers, dys = drawn("dora", SMALL, FLOAT, device)
    truth = results(reference.lora_group, x, layers, dys)
    layers = [trained(layer) for layer in layers]
    layers[0].lora_A.requires_grad_(False)
    layers[1].lora_B.requires_grad_(False)
    layers[2].lora_magnitude_vector.requires_grad_(False)
    torch.autograd.backward(fused(x, layers), dys)
    missing = {"A0", "B1", "m2"}
    for i, layer in enumerate(layers):
        for name, t in zip("ABbm", layer.tensors[1:], strict=True):
            if t is not None:
                assert (t.grad is None) == (f"{name}{i}" in missing), f"{name}{i}"
                if t.grad is not None:
                    close(t.grad, truth[f"{name}{i}"], f"{name}{i}")


@pytest.mark.medium
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (16,), (1, 16)], ids=str)
def test_rows_of_all_numbers(device, shape):
    gen = torch.Generator(device).manual_seed(0)
    layers = [a_layer(n, 16, 4, FLOAT, device, gen=gen, dora=dora) for n, dora in ((8, True), (24, False))]
    x = torch.randn(*shape, generator=gen, device=device)
    dys = [torch.randn(*shape[:-1], len(layer.weight), generator=gen, device=device) for layer in layers]
    ours, eager = results(fused, x, layers, dys), results(reference.lora_group, x, layers, dys)
    assert ours.keys() == eager.keys()
    for name, t in eager.items():
        close(ours[name], t, name)


def test_tensors_of_other_layouts(device):
    gen = torch.Generator(device).manual_seed(0)
    layers = [a_layer(n, 16, 4, FLOAT, device, gen=gen) for n in (16, 24)]
    layers = [layer._replace(weight=torch.cat([layer.weight] * 2, 1)[:, :16]) for layer in layers]
    x = torch.randn(16, 3, 5, generator=gen, device=device).permute(2, 1, 0)
    dys = [
        torch.randn(5, 16, 3, generator=gen, device=device).transpose(1, 2),
        torch.randn(5, 3, 1, generator=gen, device=device).expand(5, 3, 24),
    ]
    ours, eager = results(fused, x, layers, dys), results(reference.lora_group, x, layers, dys)
    for name, t in eager.items():
        close(ours[name], t, name)


@pytest.mark.medium
def test_scaling_in_a_tensor(device):
    x, layers, dys = drawn("lora", SMALL, HALF, device)
    inside = [layer._replace(scaling=torch.tensor(2.0, device=device)) for layer in layers]
    inside[1] = layers[1]
    ours, other = results(fused, x, layers, dys), results(fused, x, inside, dys)
    assert all(torch.equal(ours[name], other[name]) for name in ours)


def test_what_is_kept(device):
    x, layers, _ = drawn("lora", SMALL, HALF, device, p=0.3)
    x, layers = x.requires_grad_(), [trained(layer) for layer in layers]
    fused(x, layers)
    with saving() as saved:
        fused(x, layers)
    (m, k, _, r), given = SMALL, [t for layer in layers for t in layer.tensors if t is not None]
    own = {t.data_ptr() for t in (x, *given)}
    small = sum(t.nbytes for t in saved if t.data_ptr() not in own)
    stacked, s, copies = 3 * r * k * 2, 3 * r * m * 2, sum(len(layer.weight) * r * 2 for layer in layers)
    assert small <= stacked + s + copies + m * -(-k // 32) * 4 + 6 * 128


@pytest.mark.parametrize(
    "dtype, product, count",
    [(HALF, "_fan_kernel", 1), pytest.param(FLOAT, "_gemm_kernel", 3, marks=pytest.mark.medium)],
    ids=["one", "three"],
)
def test_checkpoint_skips_products(device, monkeypatch, dtype, product, count):
    """Its second forward ends where all is saved."""
    x, layers, dys = drawn("lora", SMALL, dtype, device, p=0.3)
    expected = results(fused, x, layers, dys)
    launched = []
    run = program.Program.run

    def counted(self, bound, first=0, last=None):
        launched.extend(launch.kernel.fn.__name__ for launch in self.launches[first:last])
        return run(self, bound, first, last)

    monkeypatch.setattr(program.Program, "run", counted)
    results(lambda x, layers: checkpoint(fused, x, layers, use_reentrant=False), x, layers, dys)
    assert launched.count(product) == count and launched.count("_stack_kernel") == 2
    for reentrant in (False, True):

        def again(x, layers, reentrant=reentrant):
            return checkpoint(fused, x, layers, use_reentrant=reentrant)

        found = results(again, x, layers, dys)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("form, forward, backward", [("lora", 3, 3), ("dora", 4, 5)])
def test_launches_of_few_rows(device, monkeypatch, form, forward, backward):
    """One for all layers of each kind."""
    x, layers, dys = drawn(form, SMALL, HALF, device)
    layers = [trained(layer) for layer in layers]
    launched = []
    run = program.Program.run

    def counted(self, bound, first=0, last=None):
        launched.extend(launch.kernel.fn.__name__ for launch in self.launches[first:last])
        return run(self, bound, first, last)

    monkeypatch.setattr(program.Program, "run", counted)
    ys = fused(x.requires_grad_(), layers)
    assert len(launched) == forward, launched
    torch.autograd.backward(ys, dys)
    assert len(launched) == forward + backward, launched


@pytest.mark.medium
def test_under_autocast(device):
    x, layers, dys = drawn("adapters", SMALL, FLOAT, device)
    layers = [layer._replace(dropout_p=0.0) for layer in layers]

    def autocast(x, layers):
        with torch.autocast(device, HALF):
            return fused(x, layers)

    ours = results(autocast, x, layers, dys)
    halves = [layer._replace(weight=layer.weight.half()) for layer in layers]
    other = results(fused, x.half(), halves, [dy.half() for dy in dys])
    assert ours["y0"].dtype == HALF and ours["dx"].dtype == ours["A0"].dtype == FLOAT
    for name, t in other.items():
        torch.testing.assert_close(ours[name].half(), t.half())


@pytest.mark.medium
@pytest.mark.parametrize("reason", ["dropout", "five", "strided"])
def test_comes_apart_and_says_so_once(device, reason, monkeypatch):
    monkeypatch.setattr(dispatch, "_told", set())
    monkeypatch.setattr(paths, "calls", {})
    x, layers, dys = drawn("lora", SMALL, FLOAT, device)
    if reason == "dropout":
        layers[1] = layers[1]._replace(dropout_p=0.5)
    elif reason == "five":
        layers, dys = [*layers, *layers[:2]], [*dys, *dys[:2]]
    else:
        layers[0] = layers[0]._replace(weight=layers[0].weight.repeat_interleave(2, 1)[:, ::2])
    message = {"dropout": r"differ in their dropout \(0.0, 0.5\)", "five": "has 5 layers", "strided": "contiguous"}
    with pytest.warns(SlowPathWarning, match=f"runs a group layer by layer: .*{message[reason]}"):
        fused(x, layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = results(fused, x, layers, dys)
    if reason != "dropout":
        close(found["dx"], results(reference.lora_group, x, layers, dys)["dx"], "dx")


def test_a_transform_after_a_step(device):
    """What took the step before does not serve it: it is refused as a layer refuses it."""
    x, layers, dys = drawn("two", SMALL, FLOAT, device)
    leaves = [trained(layer) for layer in layers]
    fused(x.clone().requires_grad_(), leaves)
    with pytest.raises(RuntimeError, match="take no transforms of torch.func"):
        torch.func.grad(lambda x: fused(x, leaves)[0].sum())(x)


@pytest.mark.medium
def test_packed_bases_run_as_layers_do(device):
    x, layers, dys = drawn("lora", SMALL, HALF, device)
    layers = [layer._replace(weight=Fp8Weight.quantise(layer.weight)) for layer in layers]
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPathWarning)
        ys = fused(x, layers)
    for y, one in zip(ys, layers, strict=True):
        alone = lora_linear(x, one.weight, one.lora_A, one.lora_B, one.scaling, backend="triton")
        assert torch.equal(y, alone)


def test_frozen_layers_alone(device):
    x = torch.randn(4, 8, device=device)
    layers = [Layer(torch.randn(n, 8, device=device)) for n in (3, 5)]
    assert all(torch.equal(y, x @ layer.weight.t()) for y, layer in zip(fused(x, layers), layers, strict=True))


def test_mutants_fail(device, monkeypatch):
    """dX without its low-rank term."""
    x, layers, dys = drawn("lora", SMALL, FLOAT, device)
    truth = results(reference.lora_group, x, layers, dys, torch.float64)
    eager = results(reference.lora_group, x, layers, dys)
    honest = group_kernels.products

    def without_ranks(*args, **others):
        launch = honest(*args, **others)
        launch.ints = (*launch.ints[:2], 0, *launch.ints[3:])
        return launch

    monkeypatch.setattr(group_kernels, "products", without_ranks)
    monkeypatch.setattr(paths, "calls", {})
    with pytest.raises(AssertionError, match="dx"):
        compare([results(fused, x, layers, dys)], [eager], [truth], FLOAT)
