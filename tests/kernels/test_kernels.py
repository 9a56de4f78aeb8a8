"""Each kernel by itself against its formula, under the error rule, in fresh memory full of NaN."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from accuracy import compare, draw, eager_gradients, gradients
from devices import CPU, CUDA, TRITON

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

import triton.language as tl

from lora_fast.kernels import down, gemm, mask, norm, passes, sums
from lora_fast.kernels.operands import Number, Operand
from lora_fast.kernels.program import OWN, View

pytestmark = pytest.mark.usefixtures("poisoned")

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
SMALL = [(300, 70, 45, 3), (17, 64, 96, 16), (5, 24, 16, 40)]
TINY = [(1, 9, 7, 1), (3, 130, 300, 8)]
HERE = [(140, 70, 45, 3), *SMALL[1:]]  # interpreted
LARGE = [
    (4096, 4096, 4096, 16),
    (8192, 4096, 1024, 64),
    (1000, 1003, 1001, 12),
    (4099, 2048, 4097, 100),
    (2048, 1024, 768, 256),
    (2049, 1032, 520, 200),
]
CASES = [
    pytest.param(
        *device.values,
        dtype,
        shape,
        id=f"{device.values[0]}-{str(dtype)[6:]}-{'x'.join(map(str, shape))}",
        marks=(*device.marks, pytest.mark.medium) if shape in (SMALL[0], HERE[0]) else device.marks,
    )
    for device, dtypes, shapes in ((CPU, (FLOAT, HALF), HERE), (CUDA, (BF16, HALF, FLOAT), TINY + SMALL + LARGE))
    for dtype, shape in product(dtypes, shapes)
]


def in_turn(choices):
    """Every case with every choice; interpreted, which is slow, each dtype has each choice at one of the shapes."""
    return [
        pytest.param(*case.values, choice, id=f"{case.id}-{'+'.join(choice)}", marks=case.marks)
        for case in CASES
        for i, choice in enumerate(choices)
        if case.values[0] == "cuda" or HERE.index(case.values[2]) == i % len(HERE)
    ]


P = 0.25
KEEP_SCALE = mask.keep_scale(P)


def hold(kernel, formula, device, dtype, shape, **options):
    """The error rule for what ``kernel(inputs, keep, bits)`` and ``formula(inputs, keep)`` return by name; the formula
    is eager torch in the inputs' dtype and the truth in float64."""
    m, k, n, r = shape
    ours, eagers, truths = [], [], []
    for seed in range(
        (4 if m * n < 2000 else 2) if device == "cpu" else 16 if m * n < 10000 else 1
    ):  # the interpreter is slow
        inputs = draw(m, k, n, r, dtype, device, seed, **options)
        bits = mask.mask_bits(torch.tensor([seed], device=device), P, m, k)
        keep = mask.unpack(bits, k)
        ours.append(kernel(inputs, bits))
        eagers.append(formula(inputs, keep))
        truths.append(formula(doubled(inputs), keep))
    compare(ours, eagers, truths, dtype)


def doubled(inputs):
    tensors = {name: t.double() for name, t in vars(inputs).items() if isinstance(t, torch.Tensor)}
    return type(inputs)(**{**vars(inputs), **tensors})


def padded(tensor):
    """S or dS as the passes hand it on: its ranks padded with zeros to a multiple of 16."""
    return F.pad(tensor, (0, -tensor.shape[1] % 16))


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("device, dtype, shape", CASES)
def test_down(device, dtype, shape, masked):
    scaling = torch.tensor(0.7, device=device) if masked else 0.7
    r = shape[3]

    def kernel(inputs, bits):
        s = down.down_fwd(inputs.x, inputs.lora_A, scaling, bits if masked else None, KEEP_SCALE if masked else 1.0)
        assert s.dtype == dtype and s.shape[1] % 16 == 0 and not s[:, r:].any()
        return {"S": s[:, :r]}

    def formula(inputs, keep):
        x = inputs.x * keep * KEEP_SCALE if masked else inputs.x
        return {"S": F.linear(x, inputs.lora_A) * 0.7}

    hold(kernel, formula, device, dtype, shape)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("device, dtype, shape", CASES)
def test_up_product(device, dtype, shape, with_bias):
    def kernel(inputs, bits):
        s = padded(F.linear(inputs.x, inputs.lora_A))
        return {
            "y": gemm.gemm(
                inputs.x, inputs.weight, s, inputs.lora_B, transposed=True, bias=inputs.bias if with_bias else None
            )
        }

    def formula(inputs, keep):
        s = F.linear(inputs.x.to(dtype), inputs.lora_A.to(dtype)).to(inputs.x.dtype)
        base = F.linear(inputs.x, inputs.weight, inputs.bias if with_bias else None)
        return {"y": base + s @ inputs.lora_B.T}

    hold(kernel, formula, device, dtype, shape)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("device, dtype, shape", CASES)
def test_dx_product(device, dtype, shape, masked):
    def kernel(inputs, bits):
        ds = padded(inputs.dy @ inputs.lora_B)
        return {
            "dx": gemm.gemm(
                inputs.dy, inputs.weight, ds, inputs.lora_A, transposed=False, bits=bits if masked else None
            )
        }

    def formula(inputs, keep):
        ds = (inputs.dy.to(dtype) @ inputs.lora_B.to(dtype)).to(inputs.x.dtype)
        branch = ds @ inputs.lora_A
        return {"dx": inputs.dy @ inputs.weight + (branch * keep if masked else branch)}

    hold(kernel, formula, device, dtype, shape)


WANTED = [("dS",), ("dB",), ("dbias",), ("dS", "dB"), ("dB", "dbias"), ("dS", "dB", "dbias")]


@pytest.mark.parametrize("device, dtype, shape, wanted", in_turn(WANTED))
def test_pass_over_dy(device, dtype, shape, wanted):
    r = shape[3]

    def kernel(inputs, bits):
        s = padded(F.linear(inputs.x, inputs.lora_A)) if "dB" in wanted else None
        grad_b = torch.empty_like(inputs.lora_B) if "dB" in wanted else None
        b = inputs.lora_B if "dS" in wanted else None
        bias = torch.empty(shape[2], dtype=dtype, device=device) if "dbias" in wanted else None
        ds = passes.dy_bwd(inputs.dy, s, b, 0.7, grad_b, bias, KEEP_SCALE)
        assert ds is None or not ds[:, r:].any()
        found = {"dS": ds if ds is None else ds[:, :r], "dB": grad_b, "dbias": bias}
        assert {name for name, t in found.items() if t is not None} == set(wanted)
        return {name: found[name] for name in wanted}

    def formula(inputs, keep):
        s = F.linear(inputs.x.to(dtype), inputs.lora_A.to(dtype)).to(inputs.x.dtype)
        made = {"dS": inputs.dy @ inputs.lora_B * (0.7 * KEEP_SCALE), "dB": inputs.dy.T @ s, "dbias": inputs.dy.sum(0)}
        return {name: made[name] for name in wanted}

    hold(kernel, formula, device, dtype, shape)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("device, dtype, shape", CASES)
def test_gradient_of_a(device, dtype, shape, masked):
    def kernel(inputs, bits):
        grad_a = torch.empty_like(inputs.lora_A, dtype=FLOAT)  # as of float32 adapters
        passes.a_bwd(inputs.x, padded(inputs.dy @ inputs.lora_B), grad_a, bits if masked else None)
        return {"dA": grad_a}

    def formula(inputs, keep):
        ds = (inputs.dy.to(dtype) @ inputs.lora_B.to(dtype)).to(inputs.x.dtype)
        return {"dA": ds.T @ (inputs.x * keep if masked else inputs.x)}

    hold(kernel, formula, device, dtype, shape)


def gained(inputs, seed=0):
    """A gain and norms as DoRA has them, and dY scaled by the gain as eager torch would."""
    gen = torch.Generator().manual_seed(seed)
    n = inputs.weight.shape[0]
    wide = torch.promote_types(inputs.x.dtype, FLOAT)
    gain, norm = (torch.randn(n, generator=gen), 0.5 + torch.rand(n, generator=gen))
    gain[::5] *= 1e-3
    return gain.to(inputs.x.device, wide), norm.to(inputs.x.device, wide)


@pytest.mark.medium
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("device, dtype, shape", CASES)
def test_up_product_with_gain(device, dtype, shape, with_bias):
    """Beside y it stores z, as it was before gain and bias."""

    def kernel(inputs, bits):
        s, gain = padded(F.linear(inputs.x, inputs.lora_A)), gained(inputs)[0]
        z = torch.empty_like(inputs.dy)
        bias = inputs.bias if with_bias else None
        given = inputs.x, inputs.weight, s, inputs.lora_B
        y = gemm.gemm(*given, transposed=True, bias=bias, gain=gain, z=z)
        assert torch.equal(y, gemm.gemm(*given, transposed=True, bias=bias, gain=gain))
        return {"y": y, "z": z}

    def formula(inputs, keep):
        s = F.linear(inputs.x.to(dtype), inputs.lora_A.to(dtype)).to(inputs.x.dtype)
        z = F.linear(inputs.x, inputs.weight) + s @ inputs.lora_B.T
        y = z * gained(inputs)[0] + (inputs.bias if with_bias else 0)
        return {"y": y.to(z.dtype), "z": z}

    hold(kernel, formula, device, dtype, shape)


GAINED = [("dZ",), ("dm",), ("dZ", "dS"), ("dm", "dB"), ("dZ", "dm", "dS", "dB"), ("dZ", "dm", "dS", "dB", "dbias")]


@pytest.mark.medium
@pytest.mark.parametrize("device, dtype, shape, wanted", in_turn(GAINED))
def test_pass_over_dy_with_gain(device, dtype, shape, wanted):
    """dm from z where there is a dbias, else from y, also where the gain is too small for y to carry z."""
    from_y = "dbias" not in wanted

    def kernel(inputs, bits):
        s, (gain, norm) = padded(F.linear(inputs.x, inputs.lora_A)), gained(inputs)
        gain[1] = 0.0
        if from_y:
            gain[0] = 1e-35
        z = torch.empty_like(inputs.dy)
        y = gemm.gemm(inputs.x, inputs.weight, s, inputs.lora_B, transposed=True, gain=gain, z=z)
        new = {"dZ": inputs.dy, "dm": norm, "dB": inputs.lora_B, "dbias": inputs.bias}
        found = {name: torch.empty_like(t) if name in wanted else None for name, t in new.items()}
        again = (inputs.x, inputs.weight, s, inputs.lora_B) if from_y and "dm" in wanted else ()
        kept = (y if from_y else z) if "dm" in wanted else None
        dora = sums.Dora(gain, norm, kept, found["dZ"], found["dm"], *again)
        b = inputs.lora_B if "dS" in wanted else None
        ds = passes.dy_bwd(inputs.dy, s, b, 0.7, found["dB"], found["dbias"], KEEP_SCALE, dora)
        assert ds is None or not ds[:, shape[3] :].any()
        found["dS"] = ds if ds is None else ds[:, : shape[3]]
        return {name: found[name] for name in wanted}

    def formula(inputs, keep):
        s = F.linear(inputs.x.to(dtype), inputs.lora_A.to(dtype)).to(inputs.x.dtype)
        z = inputs.x @ inputs.weight.T + s @ inputs.lora_B.T
        gain, norm = gained(inputs)
        gain[1] = 0.0
        if from_y:
            gain[0] = 1e-35
        dz = (inputs.dy * gain).to(inputs.x.dtype)
        made = {
            "dZ": dz,
            "dm": (inputs.dy * z.to(norm.dtype)).sum(0) / norm,
            "dbias": inputs.dy.sum(0),
            "dS": dz @ inputs.lora_B * (0.7 * KEEP_SCALE),
            "dB": dz.T @ s,
        }
        return {name: made[name] for name in wanted}

    hold(kernel, formula, device, dtype, shape)


def off(found, weight, a, b, scaling):
    truth = torch.linalg.vector_norm(weight.double() + scaling * b.double() @ a.double(), dim=1)
    return ((found.double() - truth).abs() / truth).max().item()


@pytest.mark.parametrize("scaling", [1e-6, 0.7, 1e5])
@pytest.mark.parametrize("device, dtype, shape", CASES)
def test_row_norms(device, dtype, shape, scaling):
    inputs = draw(*shape, dtype, device, adapter=FLOAT if scaling == 0.7 else None)
    by = torch.tensor(scaling, device=device) if scaling == 0.7 else scaling
    v = inputs.weight, inputs.lora_A, inputs.lora_B
    found, none = norm.norm_fwd(*v, by)
    assert none is None and found.dtype == FLOAT and off(found, *v, scaling) < 1e-5
    m = torch.randn(shape[2], device=device)
    again, gain = norm.norm_fwd(*v, by, m, True)
    if device == "cuda":  # the interpreter's casts are its own
        assert torch.equal(again, found.to(dtype).float())
    assert ((gain - m / again).abs() <= 1e-6 * gain.abs()).all()
    if found.max() < torch.finfo(dtype).max:
        assert off(again, *v, scaling) < 1e-5 + torch.finfo(dtype).eps


@pytest.mark.parametrize("r", [80, 200])
def test_row_norms_of_many_ranks(device, r):
    """Their columns are shared out among programs, whose sums lie in the room that there is, or in scratch."""
    inputs = draw(1, 330, 70, r, HALF, device)
    v = inputs.weight, inputs.lora_A, inputs.lora_B
    m = torch.randn(70, device=device)
    found, gain = norm.norm_fwd(*v, 0.7, m)
    assert off(found, *v, 0.7) < 1e-5
    torch.testing.assert_close(gain, m / found)
    weight, a, b, room = (Operand.of(i, t) for i, t in enumerate((*v, torch.empty(0))))

    def place(size):
        made = norm.norms(weight, a, b, Number(4), weight, gain=weight, room=replace(room, shape=(size,)))
        (parts,) = {part for launch in made for part in launch.args if isinstance(part, View)}
        assert len(made) == 2
        return parts.arg

    few = next(size for size in range(10**4) if place(size) == room.place)
    assert few > 70 and few % 70 == 0
    assert place(few - 1) == OWN


@pytest.mark.parametrize("left, bound", [(0.1, 1e-5), (1e-2, 1e-4), (1e-3, 1e-3), (1e-4, 1e-2)])
def test_row_norms_that_cancel(device, left, bound):
    """W = -B A but for a share: a factored sum would be off by 1e-5 to more than 1. A row of zeros has no gain."""
    inputs = draw(1, 70, 45, 20, FLOAT, device, b_std=1.0)
    product, rest = inputs.lora_B.double() @ inputs.lora_A.double(), inputs.weight.double()
    rest *= left * product.norm(dim=1, keepdim=True) / rest.norm(dim=1, keepdim=True)
    weight = (rest - product).float()
    weight[7] = 0
    inputs.lora_B[7] = 0
    found, gain = norm.norm_fwd(weight, inputs.lora_A, inputs.lora_B, 1.0, torch.ones(45, device=device))
    assert found[7] == 0 and gain[7] == 0
    others = torch.arange(45, device=device) != 7
    assert off(found[others], weight[others], inputs.lora_A, inputs.lora_B[others], 1.0) < bound


def test_no_rows(device):
    inputs = draw(0, 24, 20, 3, FLOAT, device)
    s = down.down_fwd(inputs.x, inputs.lora_A, 1.0)
    assert s.shape == (0, 16)
    assert gemm.gemm(inputs.x, inputs.weight, s, inputs.lora_B, transposed=True).shape == (0, 20)
    grad_a, grad_b = torch.empty_like(inputs.lora_A), torch.empty_like(inputs.lora_B)
    grad_bias = torch.empty_like(inputs.bias)
    ds = passes.dy_bwd(inputs.dy, s, inputs.lora_B, 1.0, grad_b, grad_bias)
    passes.a_bwd(inputs.x, ds, grad_a)
    assert ds.shape == (0, 16)
    assert not grad_a.any() and not grad_b.any() and not grad_bias.any()


def strided(tensor, how):
    """The same values under other strides, or at an address that is no multiple of 16 bytes."""
    if how == "transposed":
        return tensor.T.contiguous().T
    rows, columns = tensor.shape
    if how == "padded":
        return tensor.new_zeros(rows, columns + 3)[:, :columns].copy_(tensor)
    if how == "every_second":
        return tensor.new_zeros(rows, 2 * columns)[:, ::2].copy_(tensor)
    return tensor.new_zeros(tensor.numel() + 1)[1:].view(rows, columns).copy_(tensor)


@pytest.mark.parametrize("how", ["transposed", "padded", "every_second", "misaligned"])
def test_any_strides(device, how):
    inputs = draw(20, 32, 48, 8, FLOAT, device)
    bits = mask.mask_bits(torch.tensor([5], device=device), P, 20, 32)

    def run(x, weight, a, b):
        s = down.down_fwd(x, a, 1.0, bits)
        grad_a = torch.empty(8, 32, device=device)
        passes.a_bwd(x, s, grad_a, bits)
        return s, gemm.gemm(x, weight, s, b, transposed=True), gemm.gemm(x, weight.T, s, b.T, transposed=False), grad_a

    tensors = (inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B)
    plain = run(*tensors)
    for changed in range(4):
        again = run(*(strided(t, how) if i == changed else t for i, t in enumerate(tensors)))
        for one, other in zip(plain, again, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_plans_tell_aligned_from_misaligned(device):
    """The same shapes and strides, another alignment: the launch chosen for the one must not serve the other."""
    inputs = draw(16, 64, 64, 16, HALF, device)
    for x in (inputs.x, strided(inputs.x, "misaligned"), inputs.x):
        assert x.shape == inputs.x.shape and x.stride() == inputs.x.stride()
        torch.testing.assert_close(
            down.down_fwd(x, inputs.lora_A, 1.0), F.linear(inputs.x, inputs.lora_A), rtol=1e-2, atol=1e-2
        )


@pytest.mark.parametrize("first, then", [(1, 2.5), (3, 0.5), (0.5, 2), (2.0, None), (None, 2)])
def test_plans_tell_scalings_apart(device, first, then):
    """Whole numbers, floats and tensors in turn: Triton compiles each its own way."""
    inputs = draw(16, 64, 48, 16, FLOAT, device)
    for value in (first, then):
        scaling = torch.tensor(1.5, device=device) if value is None else value
        expected = F.linear(inputs.x, inputs.lora_A) * (1.5 if value is None else value)
        torch.testing.assert_close(down.down_fwd(inputs.x, inputs.lora_A, scaling), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.interpreted
def test_float64_gradients():
    """Interpreted, the kernels compute in float64: there they agree with the truth to its rounding."""
    from lora_fast.functional import lora_linear

    inputs = draw(4, 7, 5, 3, torch.float64)
    truth = eager_gradients(inputs)
    ours = gradients(lambda x, w, a, b, bias: lora_linear(x, w, a, b, 2.0, bias, backend="triton"), inputs)
    for name in truth:
        torch.testing.assert_close(ours[name], truth[name], rtol=1e-13, atol=1e-13)

    def op(x, a, b, bias):
        torch.manual_seed(3)
        return lora_linear(x, inputs.weight, a, b, 1.7, bias, dropout_p=0.4, backend="triton")

    leaves = (inputs.x, inputs.lora_A, inputs.lora_B, inputs.bias)
    assert torch.autograd.gradcheck(op, [t.clone().requires_grad_() for t in leaves], fast_mode=True)


def test_mutant_with_a_sixteen_bit_accumulator_fails(device, monkeypatch):
    shape = (64, 1024, 96, 8) if device == "cpu" else (512, 4096, 768, 16)
    inputs = draw(*shape, HALF, device)
    formula = eager_gradients(inputs)["y"]
    truth = eager_gradients(inputs, torch.float64)["y"]
    s = padded(F.linear(inputs.x, inputs.lora_A) * inputs.scaling)

    def run():
        y = gemm.gemm(inputs.x, inputs.weight, s, inputs.lora_B, transposed=True, bias=inputs.bias)
        compare([{"y": y}], [{"y": formula}], [{"y": truth}], HALF)

    run()
    inputs.x = strided(inputs.x, "padded")  # a problem that no launch was planned for yet
    monkeypatch.setattr(gemm, "acc_dtype", lambda dtype: tl.float16)
    with pytest.raises(AssertionError, match="error too large: y"):
        run()
