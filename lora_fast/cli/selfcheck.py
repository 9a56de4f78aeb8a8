"""The operators against the textbook formula on this machine, in y and every gradient.

The error of a tensor is the norm of its difference from the formula in float64, relative to that one's norm, squares
averaged over several draws. It may be at most 1.05 times (float32: 2 times) the error of the formula in plain torch and
the same dtype, plus ``2 eps / sqrt(elements)`` (float32 DoRA: plus 1e-5, its norm's tolerance).
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fast.functional import dora_linear, lora_linear

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
DRAWS, SCALING = 8, 2.0


class Shape(NamedTuple):
    M: int
    K: int
    N: int
    r: int


class Check(NamedTuple):
    """The tensor that came nearest to its bound or went farthest beyond; or the ``problem`` that stopped the check."""

    method: str
    dtype: torch.dtype
    shape: Shape
    tensor: str = ""
    error: float = math.nan
    bound: float = math.nan
    problem: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # so that NaN fails

    def __str__(self) -> str:
        what = (
            f"{self.method}, {NAMES[self.dtype]}, M={self.shape.M} K={self.shape.K} N={self.shape.N} r={self.shape.r}"
        )
        if self.problem:
            return f"FAIL  {what}: {self.problem}"
        error = f"error {self.error:.2e} (of {self.tensor}), bound {self.bound:.2e}"
        return f"{'ok' if self.passed else 'FAIL':4}  {what}: {error}"


def check(
    device: torch.device, dtypes: list[torch.dtype], shapes: list[Shape], backend: str, seed: int = 0
) -> Iterator[Check]:
    """Check LoRA and DoRA on this path, one by one. What an operator raises becomes the check's ``problem``."""
    for method in ("LoRA", "DoRA"):
        for dtype in dtypes:
            for shape in shapes:
                try:
                    yield _check(method, dtype, shape, device, backend, seed)
                except Exception as error:  # a kernel that does not compile, a driver that is too old, ...
                    lines = str(error).splitlines() or [""]
                    problem = f"{type(error).__name__}: {lines[0]:.300}"
                    yield Check(method, dtype, shape, problem=problem)


def _check(method: str, dtype: torch.dtype, shape: Shape, device: torch.device, backend: str, seed: int) -> Check:
    def ours(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, m: Tensor | None = None) -> Tensor:
        if m is None:
            return lora_linear(x, w, a, b, SCALING, bias, backend=backend)
        return dora_linear(x, w, a, b, m, SCALING, bias, backend=backend)

    squares: dict[str, list[float]] = {}  # [ours, eager's, elements]
    for i in range(DRAWS):
        tensors = _draw(method, dtype, shape, device, seed + i)
        truth = _results(formula, {name: t.double() for name, t in tensors.items()})
        found, eager = _results(ours, tensors), _results(formula, tensors)
        for name, true in truth.items():
            size = true.square().sum().item() or 1.0
            sums = squares.setdefault(name, [0.0, 0.0, true.numel()])
            for j, results in enumerate((found, eager)):
                sums[j] += (results[name].double() - true).square().sum().item() / size / DRAWS
    worst = None
    for name, (our, base, numel) in squares.items():
        bound = (2.0 if dtype == torch.float32 else 1.05) * math.sqrt(base)
        bound += 2 * torch.finfo(dtype).eps / math.sqrt(numel)
        bound += 1e-5 if method == "DoRA" and dtype == torch.float32 else 0.0
        found_one = Check(method, dtype, shape, name, math.sqrt(our), bound)
        if worst is None or not found_one.error / bound <= worst.error / worst.bound:
            worst = found_one
        if math.isnan(our):
            break
    assert worst is not None
    return worst


def formula(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, m: Tensor | None = None) -> Tensor:
    """LoRA's equation as papers have it, or DoRA's with a constant norm (float32 or better), in x's dtype."""
    z = F.linear(x, w) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * SCALING
    if m is None:
        return z + bias
    with torch.no_grad():
        n = torch.linalg.vector_norm(w.to(m.dtype) + SCALING * (b.to(m.dtype) @ a.to(m.dtype)), dim=1)
    return (m / n * z).to(x.dtype) + bias


def _draw(method: str, dtype: torch.dtype, shape: Shape, device: torch.device, seed: int) -> dict[str, Tensor]:
    """Random inputs whose terms are all of the size of one; adapters in float32, as the layers have them."""
    generator = torch.Generator(device).manual_seed(seed)
    m, k, n, r = shape

    def normal(*size: int, std: float = 1.0, kind: torch.dtype = torch.float32) -> Tensor:
        return (std * torch.randn(*size, generator=generator, device=device)).to(kind)

    tensors = {
        "x": normal(m, k, kind=dtype),
        "w": normal(n, k, std=k**-0.5, kind=dtype),
        "bias": normal(n, kind=dtype),
        "dy": normal(m, n, kind=dtype),
        "a": normal(r, k, std=k**-0.5),
        "b": normal(n, r, std=0.3),
    }
    if method == "DoRA":
        tensors["m"] = 1 + normal(n, std=0.1)
    return tensors


def _results(fn: Callable[..., Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """y and the gradient of everything but the weight."""
    inputs = {name: t.detach().clone() for name, t in tensors.items() if name != "dy"}
    leaves = {f"d{name}": t.requires_grad_() for name, t in inputs.items() if name != "w"}
    y = fn(**inputs)
    y.backward(tensors["dy"].to(y.dtype))
    grads = {name: t.grad if t.grad is not None else torch.full_like(t, math.nan) for name, t in leaves.items()}
    return {"y": y.detach(), **grads}
