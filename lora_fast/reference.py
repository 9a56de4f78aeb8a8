"""LoRA in plain torch: the CPU fallback, the oracle of the tests (in float64) and the baseline of the benchmarks."""

import torch
import torch.nn.functional as F


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float | torch.Tensor,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y = x W^T + S B^T + bias`` with ``S = scaling * drop(x) A^T`` (Hu et al. 2021, arXiv 2106.09685).

    Only the low-rank branch sees dropped inputs; the base product sees x as it is. Adapters of another dtype than x are
    cast to x's, as autocast does; the products are made in x's dtype (in autocast's where that is on).

    Args:
        x: [..., K], any strides.
        weight: [N, K].
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
    down = F.linear(dropped, lora_A.to(x.dtype)) * scaling  # [..., R]
    n, r = lora_B.shape
    y = torch.addmm(base.reshape(-1, n), down.reshape(-1, r), lora_B.to(x.dtype).t())
    return y.view(base.shape)
