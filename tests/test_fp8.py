"""An fp8 base: the weight as a tensor, the layers over it, the kernels against the emulated quantisation in float64."""

import copy
import json
import pickle
import re

import pytest
import torch
from accuracy import draw
from checkout import ROOT
from devices import CPU, CUDA, GPU, TRITON, saving
from pairs import two_processes
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_fast
from lora_fast import DoRALinear, LoRAConfig, LoRALinear, add_lora, dispatch
from lora_fast.fp8 import E4M3, Fp8Shard, Fp8Weight, dequantise_rows, quantise_rows
from lora_fast.functional import dora_linear, lora_linear

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32


def weight_of(n=32, k=48, dtype=BF16):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(dtype)


def linear_of(weight, bias=True):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    linear.weight.data = weight
    return linear.requires_grad_(False)


def test_quantised_rows():
    t = weight_of(5, 64, FLOAT) * torch.tensor([[1e-3], [1], [1e4], [0], [1e-25]])
    t[1, 3] = 7.0
    q, scale = quantise_rows(t)
    assert q.dtype == E4M3 and scale.dtype == FLOAT
    assert torch.equal(scale, torch.exp2(torch.log2(scale).round()))
    assert (q.float().abs().amax(1)[:3] > 224 - 16).all() and torch.isfinite(q.float()).all()
    error = (dequantise_rows(q, scale, FLOAT) - t).abs()
    assert (error <= t.abs() * 2**-4 + scale[:, None] * 2**-10).all()
    assert not q[3].float().any() and torch.equal(dequantise_rows(q, scale, BF16).float(), q.float() * scale[:, None])


def test_weight_is_a_tensor_that_moves_and_copies(tmp_path):
    weight = weight_of()
    linear = linear_of(weight)
    linear.weight = nn.Parameter(Fp8Weight.quantise(weight), requires_grad=False)
    held = linear.weight
    assert isinstance(held, Fp8Weight) and held.dtype == BF16 and held.shape == (32, 48)
    assert sum(getattr(held, name).nbytes for name in ("rows", "columns")) == weight.nbytes
    assert torch.equal(
        held.columns.float() * held.col_scale[:, None], dequantise_rows(*quantise_rows(weight.t()), FLOAT)
    )
    torch.save(linear.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt")["weight"]
    other = linear_of(torch.zeros_like(weight))
    other.weight = nn.Parameter(Fp8Weight.quantise(other.weight), requires_grad=False)
    other.load_state_dict(linear.state_dict())
    from_plain = copy.deepcopy(other)
    from_plain.load_state_dict({"weight": weight, "bias": linear.bias})
    on_meta = copy.deepcopy(linear).to("meta").to_empty(device="cpu")
    on_meta.load_state_dict(linear.state_dict())
    copies = [copy.deepcopy(linear), pickle.loads(pickle.dumps(linear)), other, from_plain, on_meta]
    for found in [loaded, *(c.weight for c in copies)]:
        assert isinstance(found, Fp8Weight) and found.dtype == BF16
        for name in Fp8Weight.INNER:
            assert torch.equal(getattr(found, name).float(), getattr(held, name).float()), name
    assert all(isinstance(c.weight, nn.Parameter) for c in copies)
    assert copies[0].weight.rows.data_ptr() != held.rows.data_ptr()
    assert copies[1].share_memory().weight.is_shared() and not copies[0].weight.is_shared()
    assert linear.to(HALF).weight.dtype == HALF and isinstance(linear.weight, Fp8Weight)
    assert torch.equal(linear.weight.float(), held.dequantise(FLOAT))
    with pytest.raises(RuntimeError, match="read-only"):
        linear.weight.data.add_(1)


@pytest.mark.parametrize(
    "weight, error, words",
    [
        (torch.ones(3, 4, dtype=torch.int8), TypeError, "expected float16"),
        (torch.ones(3, 4, dtype=torch.float64), TypeError, "float64"),
        (torch.ones(4), ValueError, r"expected \[N, K\]"),
        (torch.ones(0, 4), ValueError, "not empty"),
        (torch.full((3, 4), float("nan")), ValueError, "not finite"),
    ],
)
def test_weights_that_are_refused(weight, error, words):
    with pytest.raises(error, match=words):
        Fp8Weight.quantise(weight)


def test_plain_linear_over_it():
    """Forward from x and the rows, dX from dY and the columns, each rounded to e4m3."""
    weight = Fp8Weight.quantise(weight_of(dtype=FLOAT))
    x, dy = torch.randn(2, 5, 48, requires_grad=True), torch.randn(2, 5, 32)
    bias = torch.randn(32)
    y = nn.functional.linear(x, weight, bias)
    y.backward(dy)
    rounded = lambda t: dequantise_rows(*quantise_rows(t), t.dtype)  # noqa: E731
    torch.testing.assert_close(y, rounded(x) @ weight.dequantise().t() + bias)
    torch.testing.assert_close(x.grad, rounded(dy) @ (weight.columns.float() * weight.col_scale[:, None]).t())


def emulated(inputs, weight, magnitude, dy, dtype=torch.float64):
    """y and the gradients in float64, with x, W and dZ rounded to e4m3 for the base products alone; n by W's rows."""
    x, a, b = (t.detach().to(dtype).requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B))
    bias = None if inputs.bias is None else inputs.bias.detach().to(dtype).requires_grad_()
    z = _Exact.apply(x, weight) + (x @ a.t()) @ b.t() * inputs.scaling
    m = None
    if magnitude is not None:
        m = magnitude.detach().to(dtype).requires_grad_()
        norm = (weight.dequantise(dtype) + inputs.scaling * b.detach() @ a.detach()).norm(dim=1)
        z = z * (m / norm)
    y = z if bias is None else z + bias
    y.backward(dy.to(dtype))
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dA": a.grad,
        "dB": b.grad,
        "dm": None if m is None else m.grad,
        "dbias": None if bias is None else bias.grad,
    }


class _Exact(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return _rounded(x) @ weight.dequantise(x.dtype).t()

    @staticmethod
    def backward(ctx, dz):
        return _rounded(dz) @ (ctx.weight.columns.to(dz.dtype) * ctx.weight.col_scale[:, None]).t(), None


def _rounded(t):
    q, scale = quantise_rows(t.float())
    return q.to(t.dtype) * scale[:, None].to(t.dtype)


def results(inputs, weight, magnitude, dy, **options):
    x, a, b = (t.detach().clone().requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B))
    bias = None if inputs.bias is None else inputs.bias.detach().clone().requires_grad_()
    m = None if magnitude is None else magnitude.detach().clone().requires_grad_()
    if m is None:
        y = lora_linear(x, weight, a, b, inputs.scaling, bias, **options)
    else:
        y = dora_linear(x, weight, a, b, m, inputs.scaling, bias, **options)
    y.backward(dy)
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dA": a.grad,
        "dB": b.grad,
        "dm": None if m is None else m.grad,
        "dbias": None if bias is None else bias.grad,
    }


def relative(found, truth):
    return {
        name: ((found[name].double() - truth[name]).norm() / truth[name].norm()).item()
        for name in truth
        if truth[name] is not None
    }


KINDS = ["lora", "dora", "lora_fp8_x", "dora_fp8_x"]
SHAPES = [
    pytest.param("cpu", FLOAT, (33, 70, 45, 3), marks=CPU.marks, id="cpu-float32"),
    pytest.param("cpu", HALF, (24, 64, 48, 20), marks=CPU.marks, id="cpu-float16"),
    *(
        pytest.param("cuda", dtype, shape, marks=CUDA.marks, id=f"cuda-{str(dtype)[6:]}-{'x'.join(map(str, shape))}")
        for dtype in (BF16, HALF, FLOAT)
        for shape in [
            (4096, 4096, 4096, 16),
            (1000, 1003, 1001, 12),
            (2048, 14336, 1024, 64),
            (2048, 1024, 768, 256),
            (3, 64, 48, 5),
        ]
    ),
]


@pytest.mark.medium
@pytest.mark.skipif(not TRITON, reason="needs Triton")
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device, dtype, shape", SHAPES)
def test_kernels_against_the_emulation(device, dtype, shape, kind, bias):
    """Against float64 with the same quantisation the kernels err by little more than the plain torch emulation. (In the
    interpreter, which cuts digits off where a GPU rounds, the quantisation itself is the error.)"""
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 matrix units")
    inputs = draw(*shape, dtype, device, 0, bias)
    inputs.weight[1] = 0
    weight = Fp8Weight.quantise(inputs.weight)
    magnitude = None
    torch.manual_seed(0)
    if kind.startswith("dora"):
        magnitude = torch.rand(shape[2], device=device) + 0.5
    save = {"save_x": "fp8"} if kind.endswith("fp8_x") else {}
    truth = emulated(inputs, weight, magnitude, inputs.dy)
    ours = relative(results(inputs, weight, magnitude, inputs.dy, backend="triton", **save), truth)
    plain = relative(results(inputs, weight, magnitude, inputs.dy, backend="reference"), truth)
    for name, error in ours.items():
        allowed = 2 * plain[name] + 4 * torch.finfo(dtype).eps
        if device == "cpu" and name in ("y", "dx", "dm"):
            allowed = 0.07
        elif name in ("y", "dx", "dm"):  # fp8 units keep 13 bits or so of a sum
            allowed += 2**-8 * max(1, max(shape[:3]) / 8192)
        if name == "dA" and save:
            allowed = 0.07 if device == "cpu" else 0.035
        assert error <= allowed, (name, error, plain[name])


@pytest.mark.medium
@pytest.mark.skipif(not TRITON, reason="needs Triton")
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("device, dtype, shape", SHAPES)
def test_8_bit_x_over_a_plain_base(device, dtype, shape, dora, p):
    """save_x="fp8" keeps x in 8 bits and nothing else of its size, and changes the gradient of lora_A alone: to what x
    so rounded gives."""
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 conversions")
    inputs = draw(*shape, dtype, device, 0, False)
    magnitude = torch.rand(shape[2], device=device) + 0.5 if dora else None
    kept, found = {}, {}
    for save_x in ("x", "fp8"):
        options = {"save": "z"} if dora else {}
        torch.manual_seed(3)
        with saving() as kept[save_x]:
            found[save_x] = results(
                inputs, inputs.weight, magnitude, inputs.dy, dropout_p=p, backend="triton", save_x=save_x, **options
            )
    if shape[1] != shape[2]:  # else DoRA's z looks like x
        of_x = {save_x: [t.dtype for t in ts if t.shape == inputs.x.shape] for save_x, ts in kept.items()}
        assert of_x == {"x": [dtype], "fp8": [E4M3]}
    for name, error in relative(found["fp8"], {k: v for k, v in found["x"].items() if k != "dA"}).items():
        assert error <= 2 * torch.finfo(dtype).eps, name
    error = relative(found["fp8"], {"dA": found["x"]["dA"].double()})["dA"]
    assert 1e-3 < error < (0.07 if device == "cpu" else 0.035)
    if not p and not dora and device == "cuda":
        ds = inputs.dy.double() @ inputs.lora_B.double() * inputs.scaling
        plain, exact = ({"dA": ds.t() @ x} for x in (inputs.x.double(), _rounded(inputs.x.double())))
        assert relative(found["fp8"], exact)["dA"] <= 2 * relative(found["x"], plain)["dA"] + torch.finfo(dtype).eps


@pytest.mark.skipif(not TRITON, reason="needs Triton")
@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("shape", [(4096, 4096, 4096), (2048, 14336, 1024)])
def test_product_is_as_exact_as_torchs(device, shape):
    """The base product alone, beside torch._scaled_mm on the same 8-bit operands, in its fast mode."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 matrix units")
    m, k, n = shape
    inputs = draw(m, k, n, 16, BF16, device, 0, False)
    weight = Fp8Weight.quantise(inputs.weight)
    ours = lora_linear(inputs.x, weight, inputs.lora_A, torch.zeros_like(inputs.lora_B), 1.0, backend="triton")
    x8, x_scale = quantise_rows(inputs.x)
    scales = x_scale[:, None], weight.row_scale[None, :]
    stock = torch._scaled_mm(x8, weight.rows.t(), *scales, out_dtype=BF16, use_fast_accum=True)
    truth = {"y": _rounded(inputs.x.double()) @ weight.dequantise(torch.float64).t()}
    assert relative({"y": ours}, truth)["y"] <= 1.2 * relative({"y": stock}, truth)["y"]


@pytest.mark.medium
@pytest.mark.skipif(not TRITON, reason="needs Triton")
@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("dora", [False, True])
def test_dropout_and_checkpoint(device, dora):
    """One mask forward and backward; a checkpoint draws it again."""
    inputs = draw(40, 64, 48, 4, FLOAT, device, 0, False)
    weight = Fp8Weight.quantise(inputs.weight)
    m = (torch.rand(48, device=device) + 0.5).requires_grad_() if dora else None
    leaves = [t.requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B)] + [m] * dora

    def call(x):
        torch.manual_seed(5)
        if dora:
            return dora_linear(x, weight, inputs.lora_A, inputs.lora_B, m, 2.0, dropout_p=0.5, backend="triton")
        return lora_linear(x, weight, inputs.lora_A, inputs.lora_B, 2.0, dropout_p=0.5, backend="triton")

    plain = torch.autograd.grad(call(inputs.x).sin().sum(), leaves)
    again = torch.autograd.grad(checkpoint(call, inputs.x, use_reentrant=False).sin().sum(), leaves)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)
    undropped = lora_linear(inputs.x, weight, inputs.lora_A, inputs.lora_B, 2.0, backend="triton")
    if not dora:
        assert not torch.equal(undropped, call(inputs.x))


@pytest.mark.medium
@pytest.mark.skipif(not TRITON, reason="needs Triton")
@pytest.mark.parametrize("save_x", ["x", "fp8"])
@pytest.mark.parametrize("base", ["fp8", "plain"])
def test_compiled(base, save_x):
    inputs = draw(16, 32, 48, 4, FLOAT, "cpu", 0, True)
    weight = Fp8Weight.quantise(inputs.weight) if base == "fp8" else inputs.weight
    leaves = [t.requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B)]

    def call(x, a, b):
        return lora_linear(x, weight, a, b, 2.0, inputs.bias, backend="triton", save_x=save_x)

    eager = torch.autograd.grad(call(*leaves).sin().sum(), leaves)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for one, other in zip(eager, torch.autograd.grad(compiled(*leaves).sin().sum(), leaves), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_layer(kind):
    """At the start the layer is its quantised base; merged it is a plain 16-bit weight; unmerged the same fp8 one."""
    linear = linear_of(weight_of())
    layer = kind.from_linear(linear, r=4, base_dtype="float8_e4m3")
    assert "base_dtype='float8_e4m3'" in repr(layer) and type(linear.weight) is nn.Parameter
    x = torch.randn(6, 48).to(BF16)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), base, rtol=2**-7, atol=2**-7)
    with torch.no_grad():
        layer.lora_B.normal_()
    before, held = layer(x), layer.weight
    layer.merge()
    assert type(layer.weight) is nn.Parameter and layer.weight.dtype == BF16
    torch.testing.assert_close(layer.weight.float(), layer.merged_weight().to(BF16).float())
    assert (layer(x) - before).norm() / before.norm() < 0.06
    layer.unmerge()
    assert layer.weight is held and torch.equal(layer(x), before)
    state = copy.deepcopy(layer.state_dict())
    fresh = kind.from_linear(linear_of(torch.zeros_like(linear.weight) + 1), r=4, base_dtype="float8_e4m3")
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), before)
    plain = pickle.loads(pickle.dumps(layer)).to_linear()
    assert torch.equal(plain(x), base)
    assert kind.from_linear(plain, r=4).weight is plain.weight  # an adapter again, over the same base
    with pytest.raises(ValueError, match="base_dtype: got 'int8'"):
        kind.from_linear(linear, base_dtype="int8")


def test_model():
    model = nn.ModuleDict({name: linear_of(weight_of(48, 48)) for name in ("first", "second", "last")})
    config = LoRAConfig(r=2, target_modules="all-linear", base_dtype="float8_e4m3", base_dtype_exclude=["last"])
    add_lora(model, config)
    assert [isinstance(model[name].weight, Fp8Weight) for name in model] == [True, True, False]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{layer}.lora_{part}" for layer in model for part in "AB"
    }
    optimiser = torch.optim.AdamW(lora_fast.lora_parameters(model), lr=1e-2, weight_decay=0)
    x = torch.randn(64, 48).to(BF16)
    losses = []
    for _ in range(20):
        y = model["last"](model["second"](model["first"](x)))
        loss = (y.float() - x.float()).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    lora_fast.merge_lora(model)
    assert not isinstance(model["first"].weight, Fp8Weight)


def test_tied_weights_stay():
    model = nn.ModuleDict(
        {"words": nn.Embedding(32, 48), "head": nn.Linear(48, 32, bias=False), "up": nn.Linear(48, 48)}
    )
    model["head"].weight = model["words"].weight
    add_lora(model, LoRAConfig(r=2, target_modules="all-linear", base_dtype="float8_e4m3"))
    assert model["head"].weight is model["words"].weight and isinstance(model["up"].weight, Fp8Weight)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_two_processes(device, tmp_path):
    """DDP and FSDP2 train what one process does with all rows, the bases stay, and full_tensor gives them whole."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    backends = ["auto"] if device == "cuda" else ["reference", "triton"] if TRITON and not GPU else ["reference"]
    two_processes("fp8_distributed.py", tmp_path, device, *backends)
    for rank in range(2):
        seen, refusals = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(refusals) == 3 * (device == "cpu") and all("that divides both" in text for text in refusals)
        assert list(seen) == backends and all(seen.values())
        for backend, trainings in seen.items():
            tol = 1e-5 if backend == "reference" else 1e-2  # sums in another order can round x to the next e4m3
            for mode, (expected, found, apart, same) in trainings.items():
                assert same and apart <= tol, (mode, same, apart)
                assert found == pytest.approx(expected, rel=tol) and found[-1] < found[0] - 0.1, (mode, expected, found)


def test_parts_act_as_their_rows():
    """What is not asked for by FSDP2 gives plain tensors, and so does a product over a shard."""
    weight = Fp8Weight.quantise(weight_of(dtype=FLOAT))
    first, second = weight.chunk(2)
    x = torch.randn(3, 48, requires_grad=True)
    assert isinstance(first, Fp8Shard) and first.shape == (16, 48) and first.columns.shape == (24, 32)
    assert torch.equal(torch.cat([first, second]), weight.dequantise())
    y = nn.functional.linear(x, second)
    torch.testing.assert_close(y, x @ weight.dequantise()[16:].t())
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantise()[16:].sum(0).expand(3, 48))
    assert type(weight.new_zeros(5)) is type(weight.new_zeros(5, 48)) is type(weight[:4]) is torch.Tensor
    assert type(weight.view(-1)) is torch.Tensor and type(weight[:]) is Fp8Weight
    with pytest.raises(ValueError, match=r"got fp8 \[32, 48\] to shard, expected a number of processes that divides"):
        weight.chunk(5)
    assert type(first.view_as(first)) is Fp8Shard
    assert type(pickle.loads(pickle.dumps(first))) is Fp8Shard and "Fp8Shard" in repr(first)
    with pytest.raises(TypeError, match="weight: got an Fp8Shard, expected the whole weight"):
        lora_linear(x, first, torch.zeros(2, 48), torch.zeros(16, 2), 1.0)
    with pytest.raises(RuntimeError, match="load it before fully_shard"):
        first.copy_(second.dequantise())
    columns = weight.columns.clone()
    weight.copy_(weight.dequantise())
    assert torch.equal(weight.columns.float(), columns.float())


def test_second_derivatives_are_refused():
    x = torch.randn(3, 48, requires_grad=True)
    y = nn.functional.linear(x, Fp8Weight.quantise(weight_of(dtype=FLOAT))).square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_conversion_that_fails_changes_nothing():
    model = nn.ModuleDict({"good": linear_of(weight_of()), "bad": linear_of(weight_of())})
    model["bad"].weight.data[0, 0] = float("inf")
    held = dict(model)
    with pytest.raises(ValueError, match="(?s)not finite.*'bad'"):
        add_lora(model, LoRAConfig(target_modules="all-linear", base_dtype="float8_e4m3"))
    assert dict(model) == held and not isinstance(model["good"].weight, Fp8Weight)
    with pytest.raises(ValueError, match="base_dtype_exclude"):
        LoRAConfig(target_modules="all-linear", base_dtype_exclude=["good"])


def test_the_page_in_the_docs():
    page = (ROOT / "docs" / "fp8.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict = {}
    exec(snippet, found)
    assert repr(found["model"]).count("base_dtype='float8_e4m3'") == 1
    assert found["model"][0].merged and found["model"][0].weight.dtype == BF16


def test_old_cards_are_named(monkeypatch):
    dispatch._fp8.clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if device.index is None else (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    try:
        with pytest.raises(RuntimeError, match="NVIDIA A100 has no fp8"):
            dispatch.choose("auto", torch.device("cuda"), BF16, fp8=True)
        with pytest.raises(RuntimeError, match="no fp8 product yet"):
            dispatch.choose("auto", torch.device("cuda", 1), BF16, fp8=True)
        assert dispatch.choose("reference", torch.device("cuda"), BF16, fp8=True) == "reference"
    finally:
        dispatch._fp8.clear()


def test_bad_save_x():
    inputs = draw(4, 16, 8, 2, FLOAT)
    with pytest.raises(ValueError, match="save_x: got 'half'"):
        lora_linear(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, 1.0, save_x="half")
