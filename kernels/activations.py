"""The activations of gated MLPs, and their derivatives, of a tile in the accumulator's dtype."""

import triton
import triton.language as tl

ACTIVATIONS = "silu", "gelu", "gelu_tanh"
ROOT_HALF = tl.constexpr(0.7071067811865476)  # sqrt(1 / 2)
NORMAL = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
TWICE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi): (1 + tanh(u)) / 2 = sigmoid(2 u)
CUBE = tl.constexpr(0.044715)


@triton.jit
def act_and_slope(e, ACT: tl.constexpr):
    """act(e) and act'(e)."""
    if ACT == "silu":
        part = tl.sigmoid(e)
        f = e * part
        slope = part + f * (1 - part)
    elif ACT == "gelu":
        part = 0.5 * (1 + tl.erf(e * ROOT_HALF))
        f = e * part
        slope = part + e * NORMAL * tl.exp(-0.5 * e * e)
    else:
        part = tl.sigmoid((e + e * e * e * CUBE) * TWICE)
        f = e * part
        slope = part + f * (1 - part) * TWICE * (1 + e * e * (3 * CUBE))
    return f, slope


@triton.jit
def gated(e, g, ACT: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr):
    """h = act(e) * g of two tiles in DTYPE, rounded as plain torch does: act(e), then the product."""
    f, _ = act_and_slope(e.to(ACC), ACT)
    return (f.to(DTYPE).to(ACC) * g.to(ACC)).to(DTYPE)
