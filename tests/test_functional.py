"""lora_linear as its callers see it, on every path: reference and fused kernels, here and on a GPU."""

from functools import cache
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from accuracy import check, check_one_mask, draw, eager, gradients
from devices import saving
from torch.utils.checkpoint import checkpoint

from lora_fast.functional import lora_linear

NAMES = ("x", "lora_A", "lora_B", "bias")


def args(inputs, grad=NAMES):
    found = {name: getattr(inputs, name).detach().clone().requires_grad_(name in grad) for name in NAMES}
    return found["x"], inputs.weight, found["lora_A"], found["lora_B"], found["bias"]


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.medium
@pytest.mark.parametrize(
    "grad",
    [[name for name, on in zip(NAMES, flags, strict=True) if on] for flags in product([False, True], repeat=4)],
    ids="-".join,
)
def test_gradients_go_to_whoever_asks(call, inputs, grad):
    everyone = args(inputs)
    call(*everyone).backward(inputs.dy)
    some = args(inputs, grad)
    y = call(*some)
    assert y.requires_grad == bool(grad)
    if grad:
        y.backward(inputs.dy)
    for name, tensor, full in zip(("x", "", "lora_A", "lora_B", "bias"), some, everyone, strict=True):
        assert (tensor.grad is not None) == (name in grad)
        if name in grad:
            close(tensor.grad, full.grad)


SHAPES = {
    "1d": lambda x: x[0],
    "1_row": lambda x: x[:1],
    "3d": lambda x: x.view(2, 6, x.shape[-1]),
    "4d": lambda x: x.view(2, 3, 2, x.shape[-1]),
    "no_rows": lambda x: x[:0],
    "no_rows_3d": lambda x: x.new_empty(3, 0, x.shape[-1]),
    "expanded": lambda x: x[:1].expand(5, x.shape[-1]),
    "expanded_3d": lambda x: x[None, :4].expand(3, 4, x.shape[-1]),
    "transposed": lambda x: x.T.contiguous().T,
    "swapped": lambda x: x.view(3, 4, x.shape[-1]).transpose(0, 1),
    "sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every_second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "flipped_rows": lambda x: x.flip(0)[::2],
}


@pytest.mark.parametrize("layout", SHAPES)
def test_any_shape_and_strides(call, inputs, layout):
    inputs.x = SHAPES[layout](inputs.x)
    inputs.dy = torch.ones((), device=inputs.x.device).expand(*inputs.x.shape[:-1], inputs.dy.shape[-1])
    ours = gradients(lambda *a: call(*a), inputs)
    expected = gradients(lambda *a: eager(*a, inputs.scaling), inputs)
    for name in expected:
        close(ours[name], expected[name])


def test_any_strides_of_the_gradient(call, inputs):
    expected = gradients(lambda *a: eager(*a, 2.0), inputs)
    inputs.dy = inputs.dy.T.contiguous().T
    ours = gradients(lambda *a: call(*a), inputs)
    for name in expected:
        close(ours[name], expected[name])


@pytest.mark.parametrize("scaling", [0.0, -1.5, 3, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)], ids=str)
def test_scaling_may_be_a_number_or_a_tensor(call, inputs, scaling):
    if isinstance(scaling, torch.Tensor):
        scaling = scaling.to(inputs.x.device)
    ours = gradients(lambda *a: call(*a, scaling=scaling), inputs)
    expected = gradients(lambda *a: eager(*a, float(scaling)), inputs)
    for name in expected:
        close(ours[name], expected[name])


def test_scaling_gets_no_gradient(call, inputs):
    scaling = torch.tensor(2.0, device=inputs.x.device, requires_grad=True)
    call(*args(inputs), scaling=scaling).sum().backward()
    assert scaling.grad is None


def test_dropout_acts_on_the_low_rank_branch_alone(call, inputs):
    x, weight, a, b, bias = args(inputs)
    base = F.linear(x, weight, bias)
    close(call(x, weight, a, 0 * b, bias, p=0.9), base)
    dropped = call(x, weight, a, b, bias, p=0.5)
    assert (dropped - call(x, weight, a, b, bias)).abs().max() > 0.1
    assert torch.equal(call(x, weight, a, b, bias, p=0.5, training=False), call(x, weight, a, b, bias))
    assert not torch.equal(dropped, call(x, weight, a, b, bias, p=0.5))


def test_forward_and_backward_use_one_mask(call, inputs):
    inputs.weight, inputs.bias = torch.zeros_like(inputs.weight), None
    ours = gradients(lambda *a: call(*a, p=0.5), inputs)
    check_one_mask(inputs, ours)


def checkpointed(call, reentrant, p):
    return lambda *a: checkpoint(lambda *b: call(*b, p=p), *a, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(call, inputs, reentrant):
    torch.manual_seed(4)
    plain = gradients(lambda *a: call(*a, p=0.5), inputs)
    torch.manual_seed(4)
    ours = gradients(checkpointed(call, reentrant, 0.5), inputs)
    for name in plain:
        assert torch.equal(ours[name], plain[name]), name


def test_in_place_on_the_output(call, inputs):
    expected = gradients(lambda *a: ((eager(*a, 2.0) + 1) * 2).relu(), inputs)
    ours = gradients(lambda *a: call(*a).add_(1).mul_(2).relu_(), inputs)
    for name in expected:
        close(ours[name], expected[name])


def test_saved_tensors_may_be_moved(call, inputs):
    torch.manual_seed(4)
    plain = gradients(lambda *a: call(*a, p=0.5), inputs)
    torch.manual_seed(4)
    with torch.autograd.graph.save_on_cpu():
        ours = gradients(lambda *a: call(*a, p=0.5), inputs)
    for name in plain:
        assert torch.equal(ours[name], plain[name]), name


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
def test_autocast_gives_the_dtype_of_a_linear_layer(call, inputs, path, autocast, x_dtype):
    x, weight, a, b, bias = args(inputs)
    x = x.detach().to(x_dtype).requires_grad_()
    weight = weight.to(x_dtype)
    with torch.autocast(path[1], dtype=autocast):
        y, base = call(x, weight, a, b, bias), F.linear(x, weight, bias)
    assert y.dtype == base.dtype == autocast
    y.float().sum().backward()
    assert [t.grad.dtype for t in (x, a, b, bias)] == [x_dtype, *3 * [torch.float32]]


def test_autocast_keeps_to_the_error_rule(call, path, dtype16):
    def of(inputs):
        def fn(x, weight, a, b, bias):
            with torch.autocast(path[1], dtype=dtype16):
                return call(x, weight, a, b, bias)

        return fn

    check(of, [draw(33, 70, 45, 3, torch.float32, path[1], seed) for seed in range(4)], dtype16)


def test_float_adapters_upcast_nothing(call, path, dtype16):
    inputs = draw(64, 48, 40, 4, dtype16, path[1], adapter=torch.float32)
    with saving() as saved:
        y = call(*args(inputs))
    assert y.dtype == dtype16
    assert not [t.shape for t in saved if t.dtype == torch.float32 and t.numel() >= 40 * 48]
    grads = gradients(call, inputs)
    assert (grads["dA"].dtype, grads["dB"].dtype, grads["dx"].dtype) == (torch.float32, torch.float32, dtype16)


def test_no_grad_mode(call, inputs):
    expected = call(*args(inputs))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = call(*args(inputs))
        assert not y.requires_grad and torch.equal(y, expected)


BAD = [
    (TypeError, "x", [[1.0]]),
    (TypeError, "x", torch.ones(4, 6, dtype=torch.int64)),
    (TypeError, "weight", torch.ones(5, 6, dtype=torch.int8)),
    (TypeError, "weight", torch.ones(5, 6, dtype=torch.float64)),
    (TypeError, "lora_A", torch.ones(2, 6, dtype=torch.int32)),
    (TypeError, "lora_A", None),
    (TypeError, "lora_B", torch.ones(5, 2, dtype=torch.bool)),
    (TypeError, "bias", torch.ones(5, dtype=torch.complex64)),
    (TypeError, "bias", torch.ones(5, dtype=torch.bfloat16)),
    (TypeError, "bias", 0.0),
    (TypeError, "scaling", "2"),
    (TypeError, "scaling", None),
    (TypeError, "scaling", True),
    (TypeError, "dropout_p", "0.1"),
    (TypeError, "dropout_p", None),
    (ValueError, "x", torch.ones(())),
    (ValueError, "weight", torch.ones(6)),
    (ValueError, "weight", torch.ones(5, 7)),
    (ValueError, "weight", torch.ones(5, 6, requires_grad=True)),
    (ValueError, "lora_A", torch.ones(2, 5)),
    (ValueError, "lora_A", torch.ones(0, 6)),
    (ValueError, "lora_A", torch.ones(6)),
    (ValueError, "lora_A", torch.ones(2, 6, device="meta")),
    (ValueError, "lora_B", torch.ones(2, 5)),
    (ValueError, "lora_B", torch.ones(5, 3)),
    (ValueError, "lora_B", torch.ones(5, 2, 1)),
    (ValueError, "bias", torch.ones(6)),
    (ValueError, "bias", torch.ones(5, 1)),
    (ValueError, "bias", torch.ones(5, device="meta")),
    (ValueError, "scaling", float("nan")),
    (ValueError, "scaling", float("inf")),
    (ValueError, "scaling", torch.ones(1)),
    (ValueError, "scaling", torch.tensor(2)),
    (ValueError, "dropout_p", 1.0),
    (ValueError, "dropout_p", -0.1),
    (ValueError, "dropout_p", float("nan")),
    (ValueError, "backend", "cuda"),
]


@cache
def good_call(path):
    """The arguments of a call that was right, twice."""
    tensors = {
        "x": torch.ones(4, 6),
        "weight": torch.ones(5, 6),
        "lora_A": torch.ones(2, 6),
        "lora_B": torch.ones(5, 2),
        "bias": torch.ones(5),
    }
    good = {name: t.to(path[1]) for name, t in tensors.items()}
    good |= {"scaling": 1.0, "dropout_p": 0.1, "backend": path[0]}
    for _ in range(2):
        lora_linear(**good)
    return good


@pytest.mark.parametrize("error, name, value", BAD)
def test_bad_input_names_the_argument(error, name, value, path):
    """Also after calls that were right, which are known by what their arguments are."""
    good = good_call(path)
    if isinstance(value, torch.Tensor) and value.device.type == "cpu":
        value = value.detach().to(path[1]).requires_grad_(value.requires_grad)
    state = torch.get_rng_state()
    with pytest.raises(error, match=rf"^{name}: .*expected|^weight: requires grad"):
        lora_linear(**{**good, name: value})
    assert torch.equal(torch.get_rng_state(), state)
