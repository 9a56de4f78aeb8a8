"""The error rule: fused results must be as accurate as eager torch, not merely close to it.

The error of a tensor is the norm of its difference from the same function in float64, relative to that one's norm.
Ours may be at most 1.05 times eager torch's in the same dtype (2 times in float32, where another order of summation
alone makes up to 1.9) plus 2 eps / sqrt(number of elements). On small random shapes chance decides a single draw, so
squared errors are pooled over 16 draws; leave 1x1x1 out. With adapters of another dtype than x, eager means the
adapters cast to x's, as autocast does.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

NAMES = ("y", "dx", "dA", "dB", "dbias")
Results = dict[str, torch.Tensor]


@dataclass
class Inputs:
    """x [..., K], weight [N, K], lora_A [R, K], lora_B [N, R], bias [N] or None, dy [..., N]; in the low-rank branch
    the elements of x that the boolean mask ``keep`` names are multiplied by ``keep_scale``, the others are dropped."""

    x: torch.Tensor
    weight: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    bias: torch.Tensor | None
    dy: torch.Tensor
    scaling: float = 2.0
    keep: torch.Tensor | None = None
    keep_scale: float = 1.0


def draw(m, k, n, r, dtype, device="cpu", seed=0, bias=True, adapter=None, *, b_std=0.3) -> Inputs:
    """Random inputs in which all terms of y are of the size of one (with the default ``b_std``, B's deviation)."""
    gen = torch.Generator(device).manual_seed(seed)

    def normal(*shape, std=1.0, kind=dtype):
        return (std * torch.randn(*shape, generator=gen, device=device)).to(kind)

    return Inputs(
        x=normal(m, k),
        weight=normal(n, k, std=k**-0.5),
        lora_A=normal(r, k, std=k**-0.5, kind=adapter or dtype),
        lora_B=normal(n, r, std=b_std, kind=adapter or dtype),
        bias=normal(n) if bias else None,
        dy=normal(m, n),
    )


def eager(x, weight, lora_A, lora_B, bias, scaling, keep=None, keep_scale=1.0) -> torch.Tensor:
    """torch's plain formula, in x's dtype."""
    dropped = x if keep is None else x * keep * keep_scale
    low = F.linear(F.linear(dropped, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    return F.linear(x, weight, bias) + low * scaling


def gradients(fn: Callable, inputs: Inputs, dtype: torch.dtype | None = None) -> Results:
    """y, dx, dA, dB and dbias of ``fn(x, weight, lora_A, lora_B, bias)``, the inputs cast to ``dtype`` if given."""
    weight, dy = (t if dtype is None else t.to(dtype) for t in (inputs.weight, inputs.dy))
    wanted = {"dx": inputs.x, "dA": inputs.lora_A, "dB": inputs.lora_B, "dbias": inputs.bias}
    leaves = {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in wanted.items() if t is not None}
    y = fn(leaves["dx"], weight, leaves["dA"], leaves["dB"], leaves.get("dbias"))
    y.backward(dy.to(y.dtype))
    grads = {name: t.grad for name, t in leaves.items() if t.grad is not None}
    assert grads.keys() == leaves.keys(), f"gradients of {list(grads)} alone"
    return {"y": y.detach(), **grads}


def eager_gradients(inputs: Inputs, dtype: torch.dtype | None = None) -> Results:
    """What eager torch makes of them, in their own dtype or in another; float64 gives the truth."""
    rest = {"scaling": inputs.scaling, "keep": inputs.keep, "keep_scale": inputs.keep_scale}
    return gradients(lambda *args: eager(*args, **rest), inputs, dtype)


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference, relative to the truth's; absolute where the truth is zero."""
    assert result.shape == truth.shape, f"shape {tuple(result.shape)}, expected {tuple(truth.shape)}"
    return (torch.linalg.norm(result.double() - truth) / (torch.linalg.norm(truth).item() or 1.0)).item()


def allowed(eager_error: float, dtype: torch.dtype, numel: int) -> float:
    """The largest error that the rule accepts."""
    factor = 1.05 if dtype in (torch.float16, torch.bfloat16) else 2.0
    return factor * eager_error + 2 * torch.finfo(dtype).eps / math.sqrt(max(numel, 1))


def compare(ours: Iterable[Results], eagers: Iterable[Results], truths: Iterable[Results], dtype: torch.dtype) -> None:
    """Hold every named tensor to the rule, squared errors pooled over the draws. Raises AssertionError."""
    pooled: dict[str, list] = {}
    for our, base, truth in zip(ours, eagers, truths, strict=True):
        assert our.keys() == truth.keys()
        for name in our:
            assert our[name].shape == truth[name].shape, f"{name}: {tuple(our[name].shape)}"
            squares = [torch.linalg.norm(t.double() - truth[name]).item() ** 2 for t in (our[name], base[name])]
            size = torch.linalg.norm(truth[name]).item() ** 2
            pooled.setdefault(name, []).append((*squares, size, truth[name].numel()))
    too_far = []
    for name, rows in pooled.items():
        ours_sq, eager_sq, size, numels = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        ours_sq, eager_sq = (square / (size or 1.0) for square in (ours_sq, eager_sq))
        limit = allowed(math.sqrt(eager_sq), dtype, numels)
        if not math.sqrt(ours_sq) <= limit:  # so that a NaN fails
            too_far.append(f"{name}: {math.sqrt(ours_sq):.3e}, eager {math.sqrt(eager_sq):.3e}, allowed {limit:.3e}")
    assert not too_far, "error too large: " + "; ".join(too_far)


def check(fn: Callable, draws: list[Inputs], dtype: torch.dtype | None = None) -> None:
    """Hold ``fn(inputs)(x, weight, lora_A, lora_B, bias)`` to the rule in y and every gradient, in x's dtype.

    ``dtype`` is another one for both to compute in, as under autocast: eager's inputs are then cast to it.
    """
    ours = [gradients(fn(inputs), inputs) for inputs in draws]
    eagers = [eager_gradients(inputs, dtype) for inputs in draws]
    compare(ours, eagers, [eager_gradients(inputs, torch.float64) for inputs in draws], dtype or draws[0].x.dtype)


def with_mask(inputs: Inputs, keep: torch.Tensor, keep_scale: float) -> Inputs:
    """The same inputs with a dropout mask."""
    return replace(inputs, keep=keep.view(inputs.x.shape), keep_scale=keep_scale)


def check_one_mask(inputs: Inputs, results: Results) -> None:
    """Without a base and a bias, <dy, y> = <dx, x> = <dA, A> = <dB, B> if and only if one mask served them all."""
    y, dy = results["y"].double(), inputs.dy.double()
    for name, leaf in (("dx", inputs.x), ("dA", inputs.lora_A), ("dB", inputs.lora_B)):
        found = (results[name].double() * leaf.double()).sum()
        off = abs((found - (dy * y).sum()).item()) / (dy.norm() * y.norm()).item()
        assert off < torch.finfo(results["y"].dtype).eps, f"{name} saw another mask than y: {off:.2e}"
