"""The fused operator: the error rule through autograd, and what Triton, autograd and the compiler make of it."""

import math

import pytest
import torch
from accuracy import check, draw, gradients
from devices import CPU, CUDA, TRITON, saving
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from fused import forgetful, fused, masked, seed_drawn

from lora_fast import paths
from lora_fast.functional import dora_linear, lora_linear
from lora_fast.kernels import down, layer, operands, program
from lora_fast.ops import custom_op
from lora_fast.ops import linear as ops
from lora_fast.ops import parts as op_parts

pytestmark = pytest.mark.usefixtures("poisoned")

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32


def case(device, dtype, m, k, n, r, p=0.0, bias=True, adapter=None):
    name = f"{device.values[0]}-{str(dtype)[6:]}-{m}x{k}x{n}-r{r}-p{p}"
    name += ("" if bias else "-no_bias") + (f"-{str(adapter)[6:]}_adapters" if adapter else "")
    return pytest.param(device.values[0], dtype, (m, k, n, r), p, bias, adapter, marks=device.marks, id=name)


CASES = [
    case(CPU, FLOAT, 33, 70, 45, 3, 0.3),
    case(CPU, FLOAT, 20, 64, 48, 80, bias=False),
    case(CPU, HALF, 33, 70, 45, 3, bias=False),
    case(CPU, HALF, 24, 64, 48, 16, 0.5),
    case(CPU, HALF, 24, 64, 48, 16, 0.1, adapter=FLOAT),
    *(
        case(CUDA, dtype, *shape, p, bias, adapter)
        for dtype in (BF16, HALF, FLOAT)
        for shape, p, bias, adapter in [
            ((4096, 4096, 4096, 16), 0.0, False, FLOAT),
            ((4096, 4096, 4096, 16), 0.1, True, None),
            ((8192, 4096, 1024, 64), 0.1, False, FLOAT),
            ((1000, 1003, 1001, 12), 0.5, True, None),
            ((1000, 1003, 1001, 12), 0.0, True, FLOAT),
            ((1024, 4096, 14336, 8), 0.0, False, None),
            ((4099, 2048, 4096, 100), 0.1, True, FLOAT),
            ((2048, 1024, 768, 256), 0.1, True, None),
            ((2048, 1024, 768, 256), 0.0, False, FLOAT),
            ((33, 70, 45, 3), 0.3, True, None),
            ((20, 24, 16, 80), 0.0, True, FLOAT),
            ((1, 64, 48, 5), 0.1, False, None),
        ]
        if adapter != dtype
    ),
]


@pytest.mark.parametrize("device, dtype, shape, p, bias, adapter", CASES)
def test_error_rule(device, dtype, shape, p, bias, adapter):
    pooled = 2 if device == "cpu" else 16 if shape[0] * shape[2] < 10000 else 1
    draws = [draw(*shape, dtype, device, seed, bias, adapter) for seed in range(pooled)]
    check(fused(p), [masked(inputs, p) for inputs in draws])


@pytest.mark.parametrize("dtype", [FLOAT, pytest.param(BF16, marks=pytest.mark.gpu)])
def test_mutant_that_drops_the_lora_term_fails(device, dtype, monkeypatch):
    inputs = draw(40, 64, 48, 16, dtype, device, b_std=0.002)
    check(fused(), [inputs])
    for honest in (layer.product, layer.product_with_s):
        monkeypatch.setattr(layer, honest.__name__, forgetful(honest))
    monkeypatch.setattr(paths, "calls", {})
    with pytest.raises(AssertionError, match="y: .*dx: "):
        check(fused(), [inputs])


@pytest.mark.medium
@pytest.mark.parametrize(
    "examples",
    [pytest.param(5, marks=pytest.mark.interpreted, id="cpu"), pytest.param(50, marks=pytest.mark.gpu, id="cuda")],
)
def test_error_rule_everywhere(examples):
    gpu = examples > 6
    dim = st.integers(1, 300 if gpu else 40)
    dtypes = st.sampled_from([BF16, HALF, FLOAT] if gpu else [HALF, FLOAT])

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(
        m=dim,
        k=dim,
        n=dim,
        r=st.integers(1, 140 if gpu else 40),
        dtype=dtypes,
        bias=st.booleans(),
        p=st.sampled_from([0.0, 0.1, 0.9]),
        float_adapters=st.booleans(),
        layout=st.sampled_from(["plain", "transposed", "sliced"]),
    )
    def run(m, k, n, r, dtype, p, bias, float_adapters, layout):
        if m * k * n * r == 1:
            return
        draws = [
            draw(m, k, n, r, dtype, "cuda" if gpu else "cpu", seed, bias, FLOAT if float_adapters else None)
            for seed in range(16 if gpu else 2)
        ]
        for inputs in draws:
            if layout == "transposed":
                inputs.x, inputs.dy = inputs.x.T.contiguous().T, inputs.dy.T.contiguous().T
            elif layout == "sliced":
                inputs.x = torch.cat([inputs.x, inputs.x], 1)[:, :k]
                inputs.weight = torch.cat([inputs.weight, inputs.weight], 1)[:, k:]
        check(fused(p), [masked(inputs, p) for inputs in draws])

    run()


def test_rows_of_a_wider_tensor_are_read_where_they_lie(device, monkeypatch):
    given = draw(24, 64, 48, 4, FLOAT, device, bias=False)
    seen, fwd, bwd = [], ops.forward, op_parts.backward
    monkeypatch.setattr(ops, "forward", lambda *args: seen.append(args[2].data_ptr()) or fwd(*args))
    monkeypatch.setattr(
        op_parts, "backward", lambda *args: seen.extend([args[1].data_ptr(), args[2][0].data_ptr()]) or bwd(*args)
    )
    x = torch.cat([given.x, given.x], 1).view(2, 12, 128)[..., 64:].requires_grad_()
    dy = torch.cat([given.dy, given.dy], 1).view(2, 12, 96)[..., 48:]
    a, b = (t.requires_grad_() for t in (given.lora_A, given.lora_B))
    results = [
        torch.autograd.grad(lora_linear(x, given.weight, a, b, 2.0, backend=backend), (x, a, b), dy)
        for backend in ("triton", "reference")
    ]
    assert seen == [x.data_ptr(), dy.data_ptr(), x.data_ptr()]
    assert results[0][0].shape == x.shape
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [False, True])
def test_adapters_are_cast_with_the_first_pass_or_ahead_of_it(device, first, monkeypatch):
    monkeypatch.setattr(down, "casts_first", lambda *problem, **others: first)
    monkeypatch.setattr(operands, "_programs", operands.Memo())
    monkeypatch.setattr(paths, "calls", {})
    inputs = draw(33, 64, 45, 19, HALF, device, bias=False, adapter=FLOAT)
    check(fused(0.3), [masked(inputs, 0.3)])
    s, a, b = down.down_cast_fwd(inputs.x, inputs.lora_A, inputs.lora_B, 1.0)
    assert torch.equal(a, inputs.lora_A.half()) and torch.equal(b[:, :19], inputs.lora_B.half()) and not b[:, 19:].any()
    torch.testing.assert_close(s[:, :19], inputs.x @ a.T, rtol=2e-3, atol=2e-3)
    (alone,) = [made for key, made in operands._programs.items() if key[0] is down.cast_and_down]
    assert len(alone.launches) == 1 + first
    (call,) = paths.calls.values()
    (forward,) = [made for key, made in call.problem.programs.items() if key[0] is layer.forward_launches]
    assert len(forward.launches) == 3 + first


def test_two_runs_give_the_same_bits(device):
    shape = (40, 70, 45, 5) if device == "cpu" else (4096, 4096, 4096, 16)
    inputs = draw(*shape, FLOAT if device == "cpu" else BF16, device, adapter=FLOAT)
    first, again = (gradients(fused(0.2)(inputs), inputs) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], again[name]), name
    other = gradients(fused(0.2, seed=2)(inputs), inputs)
    assert not torch.equal(first["y"], other["y"])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_nan_stays_in_its_row(device, p):
    inputs = draw(40, 64, 48, 16, FLOAT, device)
    clean = gradients(fused(p)(inputs), inputs)
    inputs.x[17], inputs.dy[17] = math.nan, math.nan
    ours = gradients(fused(p)(inputs), inputs)
    others = torch.arange(40) != 17
    for name in ("y", "dx"):
        assert ours[name][17].isnan().all()
        assert torch.equal(ours[name][others], clean[name][others])


def test_second_derivatives_raise_a_clear_error(device):
    inputs = draw(4, 8, 6, 2, FLOAT, device)
    x = inputs.x.requires_grad_()
    y = lora_linear(x, inputs.weight, inputs.lora_A, inputs.lora_B, 1.0, backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.interpreted
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_functorch_is_refused(transform):
    given = draw(4, 16, 16, 4, FLOAT, "cpu", bias=False)
    a = given.lora_A.requires_grad_()
    with pytest.raises(RuntimeError, match="take no transforms of torch.func.*reference"):
        transform(lambda x: lora_linear(x, given.weight, a, given.lora_B, 2.0, backend="triton").sum())(given.x)


def test_nothing_but_saved_tensors_is_kept(device):
    """What backward reads lies in saved tensors (which hooks may move), and only what it needs."""
    inputs = draw(40, 64, 48, 16, FLOAT, device, bias=False)
    scaling = torch.tensor(2.0, device=device)

    def saved(p, **needs):
        tensors = {
            name: getattr(inputs, name).detach().requires_grad_(needs.get(name, False))
            for name in ("x", "lora_A", "lora_B")
        }
        with saving() as kept:
            y = lora_linear(
                tensors["x"],
                inputs.weight,
                tensors["lora_A"],
                tensors["lora_B"],
                scaling,
                dropout_p=p,
                backend="triton",
            )
        assert not [v for v in vars(y.grad_fn).values() if isinstance(v, torch.Tensor)]
        return sorted((tuple(t.shape) for t in kept), key=lambda s: (len(s), s))

    x, w, a, b, bits, room = (40, 64), (48, 64), (16, 64), (48, 16), (40, 2), (40 * 16 * 4,)  # in it S
    assert saved(0.1, lora_B=True) == [(), room]
    assert saved(0.0, lora_A=True, lora_B=True) == sorted([(), x, b, room], key=lambda s: (len(s), s))
    assert saved(0.1, x=True) == sorted([(), w, a, b, bits], key=lambda s: (len(s), s))


@pytest.mark.medium
def test_opcheck(device):
    """torch's own checks of the custom operator: schema, fake tensors, autograd registration, under dynamic shapes."""
    inputs = draw(6, 40, 24, 3, FLOAT, device)
    seed = torch.tensor([7], device=device)
    scaling = torch.tensor(2.0, device=device)
    for x_grad, bias, p in [(True, inputs.bias, 0.5), (False, None, 0.0)]:
        leaves = [
            inputs.x.detach().view(2, 3, 40).requires_grad_(x_grad),
            [inputs.weight],
            inputs.lora_A.detach().requires_grad_(),
            inputs.lora_B.detach().requires_grad_(),
            bias if bias is None else bias.detach().requires_grad_(),
            None,
            scaling,
            seed if p else None,
            p,
            False,
            False,
            False,
            "plain",
        ]
        torch.library.opcheck(custom_op.lora_linear, leaves, atol=1e-4, rtol=1e-4)


def test_compiled_op_keeps_to_the_error_rule(device):
    inputs = masked(draw(33, 70, 45, 3, FLOAT, device), 0.25)

    def of(inputs):
        def fn(x, weight, a, b, bias):
            drawn = seed_drawn(x.device, 1)
            drawn = drawn if isinstance(drawn, torch.Tensor) else torch.tensor([drawn], device=x.device)
            scaling = torch.tensor(inputs.scaling, device=x.device)
            rest = scaling, drawn, 0.25, False, False, False, "plain"
            return custom_op.lora_linear(x, [weight], a, b, bias, None, *rest)

        return fn

    check(of, [inputs])


def test_gradient_of_an_expanded_output(device):
    """The gradient of a sum is expanded from one number: strides of zero."""
    inputs = draw(20, 24, 16, 4, FLOAT, device)
    inputs.dy = torch.ones((), device=device).expand(20, 16)
    check(fused(), [inputs])


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("magnitude", [None, "frozen", "trained"])
def test_a_checkpoint_makes_no_product_that_the_backward_does_not_read(device, magnitude, monkeypatch):
    """As with a frozen nn.Linear at its end: the second forward stops where all is saved. A magnitude needs y."""
    given = draw(16, 24, 32, 4, FLOAT, device, bias=False)
    leaves = [t.requires_grad_() for t in (given.x, given.lora_A, given.lora_B)]
    m = None
    if magnitude is not None:
        m = torch.rand(32, device=device).requires_grad_(magnitude == "trained")
        leaves += [m] * m.requires_grad
    ran, start = [], program.Program.run

    def recorded(program, bound, first=0, last=None):
        kernels = [launch.kernel for launch in program.launches[first:last]]
        ran.extend(getattr(kernel, "__name__", None) or kernel.fn.__name__ for kernel in kernels)
        start(program, bound, first, last)

    monkeypatch.setattr(program.Program, "run", recorded)

    def layer(x):
        torch.manual_seed(3)
        if m is None:
            return lora_linear(x, given.weight, given.lora_A, given.lora_B, 2.0, dropout_p=0.3, backend="triton")
        return dora_linear(x, given.weight, given.lora_A, given.lora_B, m, 2.0, dropout_p=0.3, backend="triton")

    def step(forward):
        ran.clear()
        grads = torch.autograd.grad(forward().sin().sum(), leaves)
        return grads, ran.count("_gemm_kernel"), ran.count("_down_fwd_kernel")

    plain, products, downs = step(lambda: layer(given.x))
    again, products_again, downs_again = step(lambda: checkpoint(layer, given.x, use_reentrant=False))
    assert (products, downs, downs_again) == (2, 1, 2)
    assert products_again == (3 if magnitude == "trained" else 2)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)
