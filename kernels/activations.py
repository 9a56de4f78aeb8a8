"""The activations of MLPs, and their derivatives, of a tile in the accumulator's dtype."""

import triton
import triton.language as tl

ACTIVATIONS = "silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"
ROOT_HALF = tl.constexpr(0.7071067811865476)  # sqrt(1 / 2)
NORMAL = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
TWICE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi): (1 + tanh(u)) / 2 = sigmoid(2 u)
CUBE = tl.constexpr(0.044715)
QUICK = tl.constexpr(1.702)


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
    elif ACT == "quick_gelu":
        part = tl.sigmoid(e * QUICK)
        f = e * part
        slope = part + f * (1 - part) * QUICK
    elif ACT == "relu":
        f = tl.where(e <= 0, 0.0, e)  # what is no number stays so
        slope = tl.where(e <= 0, 0.0, 1.0)
    elif ACT == "relu2":
        part = tl.where(e <= 0, 0.0, e)
        f = tl.where(e <= 0, 0.0, e * e)
        slope = 2 * part
    else:
        part = tl.sigmoid((e + e * e * e * CUBE) * TWICE)
        f = e * part
        slope = part + f * (1 - part) * TWICE * (1 + e * e * (3 * CUBE))
    return f, slope


@triton.jit
def gated(e, g, ACT: tl.constexpr, ACC: tl.constexpr, DTYPE: tl.constexpr):
    """h = act(e) * g of two tiles in DTYPE, or act(e) where g is None, rounded as plain torch does: act(e), then the
    product."""
    f, _ = act_and_slope(e.to(ACC), ACT)
    h = f.to(DTYPE)
    if g is not None:
        h = (h.to(ACC) * g.to(ACC)).to(DTYPE)
    return h
