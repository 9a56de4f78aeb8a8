"""Blocks over packed bases: against plain torch over the dense weights, or layer by layer where products are of 8 bits;
what is kept; what a step's launches write."""

import pytest
import torch
from accuracy import compare
from devices import CPU, CUDA, TRITON, saving

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from base_calls import scaled
from blocks import a_layer, close, keep_mask, trained
from torch.utils.checkpoint import checkpoint

from lora_fast import lora_glu, lora_group
from lora_fast.bases.four_bits import Mxfp4Weight, Nf4Weight
from lora_fast.blocks import apart, reference
from lora_fast.fp8 import Fp8Weight
from lora_fast.kernels import mask, program
from lora_fast.ops import linear

pytestmark = pytest.mark.usefixtures("poisoned")

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
EXACT = {
    "nf4": Nf4Weight.quantise,
    "mxfp4": Mxfp4Weight.quantise,
    "checkpoint": lambda w: scaled("float32", w.shape[0], w.shape[1], w.dtype, str(w.device)),
}
E4M3 = {
    "fp8": Fp8Weight.quantise,
    "nf4 e4m3": lambda w: Nf4Weight.quantise(w).for_e4m3(),
    "checkpoint e4m3": lambda w: scaled("bf16 rows", w.shape[0], w.shape[1], w.dtype, str(w.device)).for_e4m3(),
}
FORMS = {
    "lora": [{}, {"scaling": 0.7}, {}],
    "dora": [{"dora": True}] * 3,
    "mixed": [{"dora": True, "bias": True}, {"bias": True}, {"dora": True, "save": "z"}],
    "some": [{}, {"r": 0}, {"dora": True}],
}
SMALL, LARGE = (24, 64, 128, 64, 16), (4096, 2048, 4096, 2048, 16)  # M, K, I, N, r


def drawn(block, form, base, shape, dtype, device, p=0.0):
    """x, the layers, plain ones with the same weights, and dYs."""
    gen = torch.Generator(device).manual_seed(0)
    m, k, width, n, r = shape
    x = torch.randn(m, k, generator=gen, device=device).to(dtype)
    sizes = [(width, k), (width, k), (n, width)] if block == "glu" else [(width, k), (n, k), (n, k)]
    plain = [
        a_layer(*size, dtype=dtype, device=device, gen=gen, p=p, **{"r": r, **what})
        for size, what in zip(sizes, FORMS[form], strict=True)
    ]
    layers = [layer._replace(weight=base(layer.weight)) for layer in plain]
    plain = [one._replace(weight=layer.weight.dequantise()) for one, layer in zip(plain, layers, strict=True)]
    widths = [n] if block == "glu" else [rows for rows, _ in sizes]
    return x, layers, plain, [torch.randn(m, rows, generator=gen, device=device).to(dtype) for rows in widths]


def results(fn, x, layers, dys, dtype=None):
    """As in support/blocks.py, over weights that are left as they are, but for a dtype."""
    x = x.detach().to(dtype or x.dtype).requires_grad_()
    own = [trained(layer._replace(weight=torch.empty(0)), dtype) for layer in layers]
    weights = [layer.weight if dtype is None else layer.weight.to(dtype) for layer in layers]
    own = [layer._replace(weight=weight) for layer, weight in zip(own, weights, strict=True)]
    ys = fn(x, own)
    ys = (ys,) if isinstance(ys, torch.Tensor) else ys
    torch.autograd.backward(ys, [dy.to(y.dtype) for y, dy in zip(ys, dys, strict=True)])
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)} | {"dx": x.grad}
    for i, layer in enumerate(own):
        found |= {f"{name}{i}": t.grad for name, t in zip("ABbm", layer.tensors[1:], strict=True) if t is not None}
    return found


def fused(block):
    def fn(x, layers):
        torch.manual_seed(1)
        if block == "glu":
            return lora_glu(x, *layers, backend="triton")
        return lora_group(x, layers, backend="triton")

    return fn


def plain(block, p, shape, device):
    """The reference with the masks of ``fused``."""
    m, k, width, *_ = shape
    masks, scale = {}, 1.0
    if p > 0:
        keep, scale = keep_mask(p, m, k, device)
        torch.manual_seed(1)
        seeds = [linear.draw_seed(torch.device(device)) for _ in range(2)]
        keep_h = mask.unpack(mask.mask_bits(seeds[1], p, m, width, torch.device(device)), width)
        masks = {"keep_x": keep, "keep_h": keep_h} if block == "glu" else {"keep": keep}

    def fn(x, layers):
        layers = [layer._replace(dropout_p=1 - 1 / scale) for layer in layers]
        return reference.lora_glu(x, *layers, **masks) if block == "glu" else reference.lora_group(x, layers, **masks)

    return fn


def cases(bases, few):
    """Interpreted, these few; over nf4 in e4m3 a case would take a minute."""
    found = [
        pytest.param(
            "cpu",
            FLOAT,
            base,
            form,
            0.3 if base == "nf4" else 0.0,
            SMALL,
            block,
            id=f"cpu-{base}-{form}-{block}",
            marks=CPU.marks if form in ("mixed", "some") else (*CPU.marks, pytest.mark.medium),
        )
        for base, form, block in few
    ]
    return found + [
        pytest.param("cuda", BF16, base, form, 0.1, LARGE, block, id=f"cuda-{base}-{form}-{block}", marks=CUDA.marks)
        for base in bases
        for form in FORMS
        for block in ("group", "glu")
    ]


FEW = [
    ("nf4", "lora", "group"),
    ("nf4", "dora", "glu"),
    ("nf4", "mixed", "group"),
    ("nf4", "some", "glu"),
    ("mxfp4", "dora", "group"),
    ("checkpoint", "dora", "glu"),
]


@pytest.mark.parametrize("device, dtype, base, form, p, shape, block", cases(EXACT, FEW))
def test_exact(device, dtype, base, form, p, shape, block):
    x, layers, dense, dys = drawn(block, form, EXACT[base], shape, dtype, device, p)
    ours, by = results(fused(block), x, layers, dys), plain(block, p, shape, device)
    compare([ours], [results(by, x, dense, dys)], [results(by, x, dense, dys, torch.float64)], dtype)


FEW = [("fp8", "lora", "glu"), ("fp8", "dora", "glu"), ("fp8", "mixed", "group"), ("checkpoint e4m3", "dora", "group")]


@pytest.mark.parametrize("device, dtype, base, form, p, shape, block", cases(E4M3, FEW))
def test_products_of_8_bits(device, dtype, base, form, p, shape, block):
    """As layer by layer, whose h and dY are quantised alike; without masks, since each layer draws its own."""
    if form == "some":
        form = "lora"  # all have adapters
    x, layers, _, dys = drawn(block, form, E4M3[base], shape, dtype, device)

    def alone(x, layers):
        if block == "glu":
            return apart.lora_mlp(x, layers, True, activation="silu", gate=None, backend="triton")
        return apart.lora_group(x, layers, True, backend="triton")

    ours, other = results(fused(block), x, layers, dys), results(alone, x, layers, dys)
    assert ours.keys() == other.keys()
    for name, t in other.items():
        if device == "cuda" or block == "glu":  # roundings to 8 bits that fall otherwise
            error = (ours[name] - t).float().norm() / t.float().norm()
            assert error < 0.02, f"{name}: {error}"
        else:
            close(ours[name], t, name)


@pytest.mark.parametrize("block", ["group", "glu"])
def test_masked_product_of_8_bits_adds(device, block):
    """Dropout with 8-bit products: dX of several layers, each under the mask, against the same without one."""
    x, layers, _, dys = drawn(block, "lora", Fp8Weight.quantise, SMALL, FLOAT, device)
    kept = [layer._replace(dropout_p=1e-6) for layer in layers]  # of 4096 elements one is dropped: few, or none
    ours, other = results(fused(block), x, kept, dys), results(fused(block), x, layers, dys)
    error = (ours["dx"] - other["dx"]).norm() / other["dx"].norm()
    assert 0 <= error < 0.2, error  # 1 and more where a product is lost


def test_what_is_kept(device):
    """One x for all, no h, and nothing of the size of W."""
    x, layers, _, _ = drawn("glu", "lora", Nf4Weight.quantise, SMALL, HALF, device)
    m, k, width, n, r = SMALL
    x, layers = x.requires_grad_(), [layer._replace(lora_A=layer.lora_A.requires_grad_()) for layer in layers]
    fused("glu")(x, layers)
    with saving() as saved:
        fused("glu")(x, layers)
    inner = {getattr(layer.weight, name).data_ptr() for layer in layers for name in layer.weight.INNER}
    given = {t.data_ptr() for t in (x, *(t for layer in layers for t in layer.tensors[1:] if t is not None))}
    own = sum(t.nbytes for t in saved if t.data_ptr() not in inner | given)
    e_and_g, s = 2 * 2 * m * width, 3 * 2 * m * r
    copies = 2 * r * (2 * k + width) + 2 * r * (2 * width + n) + 4 * 3 * r
    assert own <= e_and_g + s + copies + 12 * 128


@pytest.mark.parametrize("again", [False, True], ids=["", "checkpoint"])
def test_launches(device, monkeypatch, again):
    """x is read once; W is written twice a layer, right ahead of what reads it, and not in a checkpoint's second
    forward."""
    x, layers, _, dys = drawn("group", "lora", Nf4Weight.quantise, SMALL, HALF, device)
    launched = []
    run = program.Program.run

    def counted(self, bound, first=0, last=None):
        launched.extend(launch.kernel.fn.__name__ for launch in self.launches[first:last])
        return run(self, bound, first, last)

    monkeypatch.setattr(program.Program, "run", counted)
    step = fused("group")
    results(lambda *given: checkpoint(step, *given, use_reentrant=False) if again else step(*given), x, layers, dys)
    written = [i for i, name in enumerate(launched) if name == "_whole_kernel"]
    assert len(written) == 6 and all(launched[i + 1] == "_gemm_kernel" for i in written)
    assert launched.count("_down_fwd_kernel") == 1 + again
