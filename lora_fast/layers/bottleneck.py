"""A bottleneck adapter: ``y = x + act(x D^T + d) U^T + u``, a small layer of its own in a frozen model."""

from typing import Any

import torch
from torch import nn

from lora_fast import dispatch, reference
from lora_fast.checks import FLOATS, check_tensors
from lora_fast.layers.rules import init_adapter


def bottleneck(
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    down_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    activation: str = "gelu",
    backend: str = "auto",
) -> torch.Tensor:
    """``y = x + act(x D^T + d) U^T + u`` (Houlsby et al. 2019, arXiv 1902.00751), gradients to all five tensors.

    Args:
        x: [..., N], one dimension or more, any strides, floating point.
        down: [R, N], up: [N, R], down_bias: [R] or None, up_bias: [N] or None, of any floating dtypes; computed in x's
            dtype (under autocast in its), their gradients come in their own.
        activation: "gelu", "relu", "silu" or "tanh".
        backend: as in :func:`lora_fast.functional.lora_linear`.

    Returns:
        [..., N] in x's dtype, under autocast too.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shapes or devices, an unknown activation.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.
    """
    _check(x, down, up, down_bias, up_bias, activation)
    if dispatch.choose(backend, x.device, x.dtype) == "triton":
        from lora_fast.ops import bottleneck as bottleneck_ops  # needs Triton

        return bottleneck_ops.bottleneck(x, down, up, down_bias, up_bias, activation)
    return reference.bottleneck(x, down, up, down_bias, up_bias, activation)


class BottleneckAdapter(nn.Module):
    """A residual bottleneck, ``y = x + act(x D^T + d) U^T + u``: at the start the identity (U and the biases are zero).

    Houlsby et al. 2019 (arXiv 1902.00751), who put one after the attention and one after the MLP of each block;
    :func:`lora_fast.add_bottleneck` does.

    Args:
        in_features: width of x and y, >= 1.
        r: width of the bottleneck, >= 1.
        activation: "gelu", "relu", "silu" or "tanh".
        bias: whether there are d and u.
        device, dtype: of the parameters; float32 in place of a 16-bit dtype.

    Attributes:
        down [r, in], down_bias [r] or None, up [in, r], up_bias [in] or None: trainable.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range, before anything is allocated.
    """

    keeps_adapter = True  # see lora_fast.layers.replacing

    def __init__(
        self,
        in_features: int,
        r: int = 64,
        activation: str = "gelu",
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("in_features", in_features), ("r", r)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: got {value!r}, expected an integer >= 1")
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected an integer >= 1")
        _check_activation(activation)
        if not isinstance(bias, bool):
            raise TypeError(f"bias: got {bias!r}, expected True or False")
        dtype = dtype or torch.get_default_dtype()
        if dtype not in FLOATS:
            raise TypeError(f"dtype: got {dtype}, expected float16, bfloat16, float32 or float64")
        super().__init__()
        self.in_features, self.r, self.activation = in_features, r, activation
        kind = {"device": device, "dtype": torch.promote_types(dtype, torch.float32)}
        self.down = nn.Parameter(torch.empty(r, in_features, **kind))
        self.up = nn.Parameter(torch.empty(in_features, r, **kind))
        self.down_bias = nn.Parameter(torch.zeros(r, **kind)) if bias else None
        self.up_bias = nn.Parameter(torch.zeros(in_features, **kind)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A Kaiming-uniform ``down``, the rest zero."""
        init_adapter(self.down, self.up, True)
        for bias in (self.down_bias, self.up_bias):
            if bias is not None:
                bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] to y, its shape and dtype; raises as :func:`bottleneck`."""
        return bottleneck(x, self.down, self.up, self.down_bias, self.up_bias, self.activation)

    def extra_repr(self) -> str:
        bias = self.down_bias is not None
        return f"in_features={self.in_features}, r={self.r}, activation={self.activation!r}, bias={bias}"


def _check_activation(activation: Any) -> None:
    if not isinstance(activation, str) or activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(reference.ACTIVATIONS)}")


def _check(x: Any, down: Any, up: Any, down_bias: Any, up_bias: Any, activation: Any) -> None:
    tensors = {"x": x, "down": down, "up": up, "down_bias": down_bias, "up_bias": up_bias}
    check_tensors({name: t for name, t in tensors.items() if t is not None or not name.endswith("bias")})
    if x.dim() < 1:
        raise ValueError("x: got a tensor without dimensions, expected [..., N]")
    n = x.shape[-1]
    if down.dim() != 2 or down.shape[1] != n or down.shape[0] < 1:
        raise ValueError(
            f"down: got shape {tuple(down.shape)}, expected [r, {n}] with r >= 1 to fit x {tuple(x.shape)}"
        )
    r = down.shape[0]
    for name, t, shape in (("up", up, (n, r)), ("down_bias", down_bias, (r,)), ("up_bias", up_bias, (n,))):
        if t is not None and t.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected {shape}")
    _check_activation(activation)
