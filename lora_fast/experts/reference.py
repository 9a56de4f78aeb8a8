"""The experts with LoRA in plain torch, a loop over them: the CPU's path, and in float64 the tests' oracle."""

import torch
import torch.nn.functional as F

from lora_fast.bases.stack import PackedStack
from lora_fast.dispatch import has_data
from lora_fast.experts.form import Adapter, ExpertsForm, Gate
from lora_fast.reference import lora_linear, lora_weight


def lora_experts(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_lora: Adapter | None,
    down_lora: Adapter | None,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    *,
    form: ExpertsForm,
) -> torch.Tensor:
    """For each token t the sum of its k experts' outputs, each times its routing weight w.

    For one of the rows (t, e, w), with W1, b1, A1, B1 of ``gate_up`` and W2, b2, A2, B2 of ``down`` those of expert e,
    and s1, s2 the adapters' scalings:

        P1 = s1 x_t A1^T    h = x_t W1^T + P1 B1^T + b1    a = gate(h)    P2 = s2 a A2^T    y = a W2^T + P2 B2^T + b2
        out_t = the sum over the rows of t of w y, in float32 or better, rounded once

    Gradients, dout that of out; sums over the rows of an expert for its adapters, of a token for x:

        da' = dout_t W2 + s2 dout_t B2 A2    dw = <da', a> + <dout_t, b2>    dh = gate'(h, w da')
        dP1 = s1 dh B1    dx_t = sum dh W1 + dP1 A1    dB1 = sum dh^T P1    dA1 = sum dP1^T x_t
        dB2 = sum dout_t^T (w P2)    dA2 = sum s2 (dout_t B2)^T (w a)

    A slot whose id is no expert's (< 0, or >= E: expert parallelism marks those of other processes so) adds nothing,
    whatever its weight is, and its weight gets no gradient.

    Args:
        x: [T, H].
        top_k_index: [T, k], integers.
        top_k_weights: [T, k].
        gate_up: [E, 2I, H], down: [E, H, I] (``form.transposed``: the last two the other way round), also packed.
        gate_up_lora, down_lora: an :class:`Adapter`, or None.
        gate_up_bias: [E, 2I], down_bias: [E, H], or None.
        form: how the weights lie, and the gate.

    Returns:
        [T, H], x's dtype.
    """
    experts, slots = len(gate_up), top_k_index.reshape(-1)  # [T k]
    foreign = (slots < 0) | (slots >= experts)
    ids, order = torch.sort(torch.where(foreign, experts, slots).long(), stable=True)
    counts = [len(slots)] + [0] * (experts - 1)  # without data to count, for the shapes
    if has_data(ids):
        counts = torch.bincount(ids, minlength=experts + 1)[:experts].tolist()
    ways = [
        _per_expert(w, lora, bias, form.transposed)
        for w, lora, bias in ((gate_up, gate_up_lora, gate_up_bias), (down, down_lora, down_bias))
    ]
    parts, start = [], 0
    for expert, count in enumerate(counts):
        if not count and (expert or any(counts)):  # without any rows, expert 0 stands for a graph with no gradients
            continue
        rows = x[order[start : start + count] // top_k_index.shape[1]]
        hidden = apply_gate(_product(rows, ways[0], expert), form)
        parts.append(_product(hidden, ways[1], expert))
        start += count
    y = torch.cat(parts)  # [rows of all experts, H]
    wide = torch.promote_types(y.dtype, torch.float32)
    weights = torch.where(foreign, 0, top_k_weights.reshape(-1).to(wide))
    by_slot = torch.zeros(len(slots), x.shape[1], dtype=y.dtype, device=y.device).index_copy(0, order[:start], y)
    return (by_slot.to(wide) * weights[:, None]).view(*top_k_index.shape, x.shape[1]).sum(1).to(x.dtype)


def merged_weight(weight: torch.Tensor, lora: Adapter, transposed: bool) -> torch.Tensor:
    """``W_e + scaling * B_e A_e`` of every expert, in weight's layout and dtype: summed in float32 or better, rounded
    once, an expert at a time, without gradient."""
    weights, loras, scaling, _ = _per_expert(weight, lora, None, transposed)
    assert loras is not None
    merged = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        for own, new, (a, b) in zip(weights, merged, loras, strict=True):
            (new.mT if transposed else new).copy_(lora_weight(own, a, b, scaling))
    return merged


def apply_gate(h: torch.Tensor, form: ExpertsForm) -> torch.Tensor:
    """a [rows, I] of the gate and up projections h [rows, 2I]."""
    g, u = (h[:, ::2], h[:, 1::2]) if form.interleaved else h.chunk(2, dim=-1)
    return gated(g, u, form.gate)


def gated(g: torch.Tensor, u: torch.Tensor, gate: Gate) -> torch.Tensor:
    """As :class:`Gate` says."""
    if gate.kind != "silu":
        g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
    if gate.kind == "gpt_oss":
        return (u + 1) * (g * torch.sigmoid(g * gate.alpha))
    return F.silu(g) * u


Way = tuple[list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]] | None, float, list[torch.Tensor] | None]


def _per_expert(weight: torch.Tensor, lora: Adapter | None, bias: torch.Tensor | None, transposed: bool) -> Way:
    """Views of one projection by expert, packed ones of a packed one: weights [out, in], (A [r, in], B [out, r]),
    scaling, biases [out]."""
    if isinstance(weight, PackedStack):
        weights: list[torch.Tensor] = [*weight.experts()]
    else:
        weights = list(weight.mT if transposed else weight)
    biases = None if bias is None else list(bias)
    if lora is None:
        return weights, None, 0.0, biases
    experts = len(weights)
    downs = lora.lora_A.reshape(experts, -1, lora.lora_A.shape[1]).unbind(0)
    ups = lora.lora_B.reshape(lora.lora_B.shape[0], -1, experts).unbind(2)
    return weights, list(zip(downs, ups, strict=True)), lora.scaling, biases


def _product(rows: torch.Tensor, way: Way, expert: int) -> torch.Tensor:
    weights, loras, scaling, biases = way
    bias = None if biases is None else biases[expert]
    if loras is None:
        return F.linear(rows, weights[expert], bias)
    return lora_linear(rows, weights[expert], *loras[expert], scaling, bias)
