"""Several adapters in one batch in plain torch: one after the other, each on all rows, of which it gets its own.

Rows are selected, not multiplied by zeros: what is not finite stays in its row and with its adapter.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from lora_fast import reference
from lora_fast.batch.form import Adapter, MaybeTensor, of_rows


def lora_linear_batch(
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Sequence[Adapter],
    which: torch.Tensor,
    bias: MaybeTensor = None,
    training: bool = True,
    keep: MaybeTensor = None,
) -> torch.Tensor:
    """``y_i = W x_i + scaling_j B_j A_j drop_j(x_i) + bias`` with j = which_i, or without the low-rank term where no
    adapter has that number (Hu et al. 2021, arXiv 2106.09685).

    Args:
        x: [..., K], two dimensions or more.
        which: integers, one a row or one a sample: their shape is the first of x's leading dimensions, or all.
        keep: boolean mask like x that says which elements stay, instead of those that are drawn for each adapter.
        weight, bias: as in :func:`lora_fast.reference.lora_linear`.

    Returns:
        [..., N], in the dtype that ``F.linear(x, weight, bias)`` has.
    """
    rows, y = of_rows(x, which), F.linear(x, weight, bias)
    for j, one in enumerate(adapters):
        mine = rows == j
        y = torch.where(mine, _adapted(y, torch.where(mine, x, 0), one, training, keep), y)
    return y


def dora_linear_batch(
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Sequence[Adapter],
    which: torch.Tensor,
    bias: MaybeTensor = None,
    training: bool = True,
    keep: MaybeTensor = None,
    round_norm: bool = False,
) -> torch.Tensor:
    """:func:`lora_linear_batch` with the gain of each row's adapter: ``y_i = g_j * (W x_i + ...) + bias`` (Liu et al.
    2024, arXiv 2402.09353), as :func:`lora_fast.reference.dora_linear` has it; g = 1 for rows without an adapter."""
    rows, z = of_rows(x, which), F.linear(x, weight)
    y = F.linear(x, weight, bias)
    for j, one in enumerate(adapters):
        mine = rows == j
        own = torch.where(mine, x, 0)
        low = _adapted(torch.where(mine, z, 0), own, one, training, keep)
        magnitude = one.lora_magnitude_vector
        assert magnitude is not None
        gain = reference.gain_of(weight, one.lora_A, one.lora_B, magnitude, _number(one), round_norm=round_norm)
        y = torch.where(mine, reference.dora_scale(low, gain, bias, (own, weight)), y)
    return y


def _adapted(z: torch.Tensor, x: torch.Tensor, one: Adapter, training: bool, keep: MaybeTensor) -> torch.Tensor:
    """z + scaling * (drop(x) A^T) B^T, rounded as ``reference.lora_linear`` rounds it."""
    p = one.dropout_p if training else 0.0
    if keep is not None:
        x = torch.where(keep, x, 0) * (1 / (1 - p))
    elif p > 0:
        x = F.dropout(x, p)
    down, up = F.linear(x, one.lora_A.to(x.dtype)), one.lora_B.to(x.dtype)
    if down.dtype == torch.float16:
        return z + F.linear(down, up) * _number(one)
    n, r = up.shape
    return torch.addmm(z.reshape(-1, n), (down * _number(one)).reshape(-1, r), up.t()).view(z.shape)


def _number(one: Adapter) -> float | torch.Tensor:
    return one.scaling.detach() if isinstance(one.scaling, torch.Tensor) else one.scaling
