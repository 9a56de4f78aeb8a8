"""LoRA, DoRA and bottleneck adapters in plain torch: the CPU fallback, the tests' oracle (in float64), the baseline of
the benchmarks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from lora_fast.bases.packed import PackedWeight, rounds_norm
from lora_fast.dispatch import has_data, no_autocast


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float | torch.Tensor,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    *,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y = x W^T + S B^T + bias`` with ``S = scaling * drop(x) A^T`` (Hu et al. 2021, arXiv 2106.09685).

    Only the low-rank branch sees dropped inputs; the base product sees x as it is. Adapters of another dtype than x are
    cast to x's, as autocast does; the products are made in x's dtype (in autocast's where that is on). In float16 the
    scaling comes last, as in PEFT: ``scaling * drop(x) A^T`` can pass 65504 where y does not.

    Args:
        x: [..., K], any strides.
        weight: [N, K]; an Fp8Weight gives the products of :func:`lora_fast.fp8.fp8_linear`.
        lora_A: [R, K].
        lora_B: [N, R].
        scaling: number or 0-dim tensor.
        bias: [N] or None.
        dropout_p: probability that an element of x is dropped in the low-rank branch, when ``training``.
        keep: boolean mask like x that says which elements stay, instead of a drawn one.

    Returns:
        [..., N], in the dtype that ``F.linear(x, weight, bias)`` has.
    """
    dropped = x
    if keep is not None:
        dropped = torch.where(keep, x, 0) * (1 / (1 - dropout_p))
    elif training and dropout_p > 0:
        dropped = F.dropout(x, dropout_p)
    base = F.linear(x, weight, bias)  # [..., N]
    down, up = F.linear(dropped, lora_A.to(x.dtype)), lora_B.to(x.dtype)  # [..., R], [N, R]
    if down.dtype == torch.float16:
        return base + F.linear(down, up) * scaling
    n, r = lora_B.shape
    return torch.addmm(base.reshape(-1, n), (down * scaling).reshape(-1, r), up.t()).view(base.shape)


ROWS = 1024  # rows of W + scaling * B A that are in memory at a time


def dora_norm(
    weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float | torch.Tensor
) -> torch.Tensor:
    """Norms of the rows of ``V = W + scaling * B A``, without gradient, a block of rows at a time.

    The factored form, ``n^2 = |W|^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B A A^T) * B)``, reads as much and loses
    the rows whose terms cancel.

    Args:
        weight: [N, K].
        lora_A: [R, K].
        lora_B: [N, R].
        scaling: number or 0-dim tensor.

    Returns:
        [N] float32, float64 if one of the tensors is.
    """
    if isinstance(weight, PackedWeight):
        weight = weight.multiplied(torch.float32)
    dtype = torch.float32
    for t in (weight, lora_A, lora_B):
        dtype = torch.promote_types(dtype, t.dtype)
    with torch.no_grad(), no_autocast(weight.device):
        a, sb = lora_A.to(dtype), lora_B.to(dtype) * scaling
        if len(weight) <= ROWS:
            return _rows_norm(weight.to(dtype), sb, a)
        return torch.cat(
            [_rows_norm(w.to(dtype), b, a) for w, b in zip(weight.split(ROWS), sb.split(ROWS), strict=True)]
        )


def _rows_norm(w: torch.Tensor, sb: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.addmm(w, sb, a), dim=1)


def dora_gain(magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """``magnitude / norm``, 0 where the norm is 0."""
    alive = norm != 0
    return torch.where(alive, magnitude / torch.where(alive, norm, 1.0), 0.0)


def dora_scale(
    z: torch.Tensor,
    gain: torch.Tensor,
    bias: torch.Tensor | None = None,
    base: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """``y = gain * z + bias`` in z's dtype, computed in float32 or better and rounded once. z [..., N], the others [N].

    ``base``: the x and the weight of z. Where the gain is 1, y is then the adapter's part added to ``F.linear(x,
    weight, bias)`` bit for bit, so that a fresh layer equals its base. On the CPU alone: elsewhere it is off by the one
    rounding that z is made with, as the host would have to wait for a look at the gains.
    """
    y = z * gain.to(torch.promote_types(gain.dtype, torch.float32))
    if bias is not None:
        y = y + bias
        rest = None if base is None else _rest_of_base(*base, bias, gain)
        y = y if rest is None else y + rest
    return y.to(z.dtype)


def _rest_of_base(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gain: torch.Tensor) -> torch.Tensor | None:
    """What ``x W^T + bias`` as one product has more than as a product and a sum, where the gain is 1."""
    seen = gain.device.type == "cpu" and has_data(gain) and not torch.compiler.is_compiling()
    if not seen or torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return None
    if not (gain == 1).any():
        return None
    with torch.no_grad():
        one, two = F.linear(x, weight, bias), F.linear(x, weight)
        wide = torch.promote_types(two.dtype, torch.float32)
        rest = one.to(wide) - (two.to(wide) + bias.to(wide))
        return torch.where((gain == 1) & torch.isfinite(rest), rest, 0)


def dora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float | torch.Tensor,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    *,
    detach_norm: bool = True,
    keep: torch.Tensor | None = None,
    round_norm: bool = False,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y = g * z + bias`` with ``z = x W^T + S B^T`` and ``g = magnitude / |W + scaling * B A|`` per output row
    (Liu et al. 2024, arXiv 2402.09353; the norm is a constant in the backward, section 4.3, unless ``detach_norm`` is
    False).

    Arguments and result as in :func:`lora_linear`; magnitude is [N]; ``round_norm`` rounds the norm to the weight's
    dtype, as PEFT does. ``gain``: g, if it is there already.
    """
    z = lora_linear(x, weight, lora_A, lora_B, scaling, None, dropout_p, training, keep=keep)
    if gain is None:
        gain = gain_of(weight, lora_A, lora_B, magnitude, scaling, detach_norm, round_norm)
    return dora_scale(z, gain, bias, (x, weight))


def gain_of(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float | torch.Tensor,
    detach_norm: bool = True,
    round_norm: bool = False,
) -> torch.Tensor:
    """g [N] as :func:`dora_linear` has it."""
    norm = (dora_norm if detach_norm else dense_norm)(weight, lora_A, lora_B, scaling)
    if round_norm and rounds_norm(weight):
        norm = norm.to(weight.dtype).to(norm.dtype)
    return dora_gain(magnitude, norm)


def dense_norm(
    weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float | torch.Tensor
) -> torch.Tensor:
    """As :func:`dora_norm`, with gradients to the adapters, from V in memory."""
    with no_autocast(weight.device):
        dtype = torch.promote_types(torch.promote_types(weight.dtype, lora_A.dtype), torch.float32)
        v = weight.to(dtype) + (lora_B.to(dtype) * scaling) @ lora_A.to(dtype)
        return torch.linalg.vector_norm(v, dim=1)


def lora_weight(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """``V = W + scaling * B A``, or with a magnitude ``magnitude * V / |V|``, the norm of each row a constant in the
    backward and a row of zero norm 0 (Hu et al. 2021, arXiv 2106.09685; Liu et al. 2024, arXiv 2402.09353).

    Gradients, G that of the result: LoRA  dW = G, dA = scaling B^T G, dB = scaling G A^T; DoRA, with g = magnitude /
    |V|, the same of g * G, and dmagnitude = rowsum(G * V) / |V|.

    Args:
        weight: [N, ...], read as [N, K]; lora_A: [R, K], lora_B: [N, R], magnitude: [N], of any float dtypes.
        scaling: a number.

    Returns:
        The shape and dtype of weight; made in float32 or better and rounded once.
    """
    with no_autocast(weight.device):
        dtype = torch.float32
        for t in (weight, lora_A, lora_B):
            dtype = torch.promote_types(dtype, t.dtype)
        v = torch.addmm(weight.flatten(1).to(dtype), lora_B.to(dtype) * scaling, lora_A.to(dtype))
        if magnitude is not None:
            v = v * dora_gain(magnitude, torch.linalg.vector_norm(v.detach(), dim=1))[:, None]
        return v.to(weight.dtype).view(weight.shape)


# All of them leave 0 as it is.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def bottleneck(
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    down_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    activation: str = "gelu",
) -> torch.Tensor:
    """``y = x + act(x D^T + d) U^T + u`` (Houlsby et al. 2019, arXiv 1902.00751).

    Gradients, G that of y, a = act(h), h = x D^T + d and H = (G U) * act'(h): dx = G + H D, dD = H^T x, dd = colsum(H),
    dU = G^T a, du = colsum(G).

    Args:
        x: [..., N], any strides.
        down: [R, N], up: [N, R], down_bias: [R] or None, up_bias: [N] or None; cast to x's dtype, as for autocast.
        activation: a key of ``ACTIVATIONS``.

    Returns:
        The shape and dtype of x.
    """
    down, up = down.to(x.dtype), up.to(x.dtype)
    down_bias, up_bias = (t if t is None else t.to(x.dtype) for t in (down_bias, up_bias))
    low = ACTIVATIONS[activation](F.linear(x, down, down_bias))  # [..., R]
    return (x + F.linear(low, up, up_bias)).to(x.dtype)


def lora_embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float | torch.Tensor,
    magnitude: torch.Tensor | None = None,
    embed_scale: float | torch.Tensor | None = None,
    padding_idx: int | None = None,
    round_norm: bool = False,
) -> torch.Tensor:
    """``y = g * (c E[ids] + c scaling * A^T[ids] B^T)`` (Hu et al. 2021, arXiv 2106.09685), g = 1, or with a magnitude
    ``magnitude / |E + scaling * (B A)^T|`` per column, a constant norm in the backward (Liu et al. 2024, arXiv
    2402.09353).

    The product is made in the adapters' dtype; the sum, in float32 or better, is rounded once. The gradient of A is
    zero at ``padding_idx``.

    Args:
        ids: [...], weight: E [V, N], lora_A: [R, V], lora_B: [N, R], magnitude: [N].
        scaling, embed_scale: numbers, or tensors of one element; c is the latter, or 1, for E's rows in their dtype.
        round_norm: round the norm to the weight's dtype.

    Returns:
        [..., N] in weight's dtype.
    """
    with no_autocast(weight.device):
        kind = torch.promote_types(lora_A.dtype, lora_B.dtype)
        wide = torch.promote_types(torch.promote_types(weight.dtype, kind), torch.float32)
        rows = F.embedding(ids, weight).to(wide)
        low = F.embedding(ids, lora_A.t(), padding_idx).to(kind) @ lora_B.t().to(kind) * scaling
        if isinstance(embed_scale, torch.Tensor):
            rows, low = rows * embed_scale.to(weight.dtype), low * embed_scale
        elif embed_scale is not None:
            rows, low = rows * torch.tensor(embed_scale, dtype=weight.dtype), low * embed_scale
        y = rows + low.to(wide)
        if magnitude is not None:
            norm = dora_norm(weight.t(), lora_A, lora_B, scaling)
            y = y * dora_gain(magnitude, norm.to(weight.dtype).to(norm.dtype) if round_norm else norm)
        return y.to(weight.dtype)
