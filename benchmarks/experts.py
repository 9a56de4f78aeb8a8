"""The layers of experts that bench_experts measures, of random weights, and what each candidate makes of them."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fast.experts.form import Adapter, ExpertsForm, Gate
from lora_fast.experts.functional import lora_experts
from lora_fast.experts.reference import apply_gate


class Size(NamedTuple):
    h: int
    i: int
    experts: int
    k: int
    form: ExpertsForm = ExpertsForm()
    bias: bool = False


MODELS = {
    "qwen3-30b": Size(2048, 768, 128, 8),
    "gpt-oss-20b": Size(2880, 2880, 32, 4, ExpertsForm(True, True, Gate("gpt_oss", 1.702, 7.0)), True),
    "mixtral-8x7b": Size(4096, 14336, 8, 2),
    "tiny": Size(32, 48, 4, 2),
}


@dataclass
class Layer:
    """What all candidates share: [in, out] are the logical sides of a weight, however it lies."""

    form: ExpertsForm
    x: Tensor  # [T, H]
    ids: Tensor  # [T, k]
    weights: Tensor
    dout: Tensor
    gate_up: Tensor
    down: Tensor
    biases: tuple[Tensor | None, Tensor | None]
    loras: tuple[Adapter, Adapter]

    @property
    def leaves(self) -> list[Tensor]:
        """All that get a gradient with LoRA; the first two do where the experts are frozen."""
        return [self.x, self.weights, *(t for lora in self.loras for t in lora[:2])]


def layer(size: Size, tokens: int, r: int, skew: float, dtype: torch.dtype, device: str) -> Layer:
    """``skew``: the deviation of what is added to all logits of an expert; theirs is one."""
    torch.manual_seed(0)
    kind: dict[str, Any] = {"device": device, "dtype": dtype}
    h, i, experts, k, form, bias = size
    logits = torch.randn(tokens, experts, device=device) + skew * torch.randn(experts, device=device)
    top = logits.topk(k)

    def weight(c: int, n: int) -> Tensor:
        shape = (experts, c, n) if form.transposed else (experts, n, c)
        return torch.empty(shape, **kind).normal_(std=c**-0.5)

    def lora(c: int, n: int) -> Adapter:
        a = torch.empty(experts * r, c, **kind).normal_(std=c**-0.5)
        return Adapter(a.requires_grad_(), torch.empty(n, r * experts, **kind).normal_(std=0.1).requires_grad_(), 2.0)

    biases = tuple(torch.randn(experts, n, **kind) if bias else None for n in (2 * i, h))
    return Layer(
        form,
        torch.randn(tokens, h, **kind).requires_grad_(),
        top.indices,
        top.values.softmax(-1).to(dtype).requires_grad_(),
        torch.randn(tokens, h, **kind),
        weight(h, 2 * i),
        weight(i, h),
        (biases[0], biases[1]),
        (lora(h, 2 * i), lora(i, h)),
    )


def grouped(at: Layer, lora: bool, product: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """``grouped_mm_experts_forward`` of transformers 5.22 without expert parallelism, restated; with ``lora`` as a
    composition of grouped products, as other trainers have it."""
    product = product or grouped_mm
    k, (tokens, h), experts = at.ids.shape[1], at.x.shape, at.gate_up.shape[0]
    ids, order = torch.sort(at.ids.reshape(-1))
    rows, weights = at.x[order // k], at.weights.reshape(-1)[order]
    counts = torch.histc(ids.float() if at.x.device.type == "cpu" else ids.int(), experts, min=0, max=experts - 1)
    ends = torch.cumsum(counts, 0, dtype=torch.int32)

    def projection(t: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> Tensor:
        out = product(t, weight if at.form.transposed else weight.mT, ends)
        if lora:
            a, b, scaling = adapter
            r = a.shape[0] // experts
            a, b = a.view(experts, r, -1), b.view(-1, r, experts).permute(2, 1, 0)  # [E, r, in], [E, r, out]
            if r % 8:  # F.grouped_mm wants rows of a multiple of 16 bytes
                a, b = (F.pad(one, (0, 0, 0, -r % 8)) for one in (a, b))
            out = out + product(product(t, a.mT, ends) * scaling, b.contiguous(), ends)
        return out if bias is None else out + bias[ids]

    hidden = projection(rows, at.gate_up, at.biases[0], at.loras[0])
    out = projection(gated(hidden, at.form), at.down, at.biases[1], at.loras[1]) * weights[:, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return out[back].view(tokens, k, h).sum(1).to(at.x.dtype)


def gated(hidden: Tensor, form: ExpertsForm) -> Tensor:
    if form != ExpertsForm():
        return apply_gate(hidden, form)
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate) * up


def grouped_mm(t: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(t, weight, offs=ends)


class PeftLayer(nn.Module):
    """The experts as PEFT adapts them (``target_parameters``), on the same weights and adapters."""

    def __init__(self, at: Layer) -> None:
        from peft import LoraConfig, get_peft_model

        super().__init__()
        self.at = at
        names = ["experts.gate_up_proj", "experts.down_proj"]
        config = LoraConfig(
            r=at.loras[0].lora_A.shape[0] // at.gate_up.shape[0], lora_alpha=32, target_parameters=names
        )
        model: Any = get_peft_model(nn.ModuleDict({"experts": _Experts(at)}), config, autocast_adapter_dtype=False)
        self.outer = model.base_model.model["experts"]
        for wrapper, lora in ((self.outer.base_layer, at.loras[0]), (self.outer, at.loras[1])):
            wrapper.scaling["default"] = lora.scaling
            wrapper.lora_A["default"].weight.data = lora.lora_A.detach().clone()
            wrapper.lora_B["default"].weight.data = lora.lora_B.detach().clone()
        self.leaves = [at.x, at.weights, *(p for p in self.outer.parameters() if p.requires_grad)]

    def forward(self) -> Tensor:
        return self.outer(self.at.x)


class _Experts(nn.Module):
    """As a model of transformers has them."""

    has_gate, is_concatenated, has_post_expert_norm, _is_expert_parallel = True, True, False, False

    def __init__(self, at: Layer) -> None:
        super().__init__()
        self.at, self.num_experts = at, at.gate_up.shape[0]
        self.is_transposed, self.has_bias = at.form.transposed, at.biases[0] is not None
        self.gate_up_proj_bias, self.down_proj_bias = at.biases
        self.gate_up_proj = nn.Parameter(at.gate_up, requires_grad=False)
        self.down_proj = nn.Parameter(at.down, requires_grad=False)

    def _apply_gate(self, hidden: Tensor) -> Tensor:
        return gated(hidden, self.at.form)

    def forward(self, x: Tensor) -> Tensor:
        at = Layer(**{**vars(self.at), "x": x, "gate_up": self.gate_up_proj, "down": self.down_proj})
        return grouped(at, False, None if at.x.is_cuda else product_by_loop)

    def installed(self) -> Tensor:
        """By the function of the transformers that is installed."""
        from transformers.integrations.moe import grouped_mm_experts_forward

        return grouped_mm_experts_forward(self, self.at.x, self.at.ids, self.at.weights)


def product_by_loop(t: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """A grouped product where there is no kernel for one."""
    sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return torch.cat([rows @ one for rows, one in zip(t.split(sizes), weight, strict=True)])


def calls(
    at: Layer, impls: tuple[str, ...], installed: bool = False
) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """(forward, what gets a gradient) of each candidate; peft is left out where it is not installed. ``installed``:
    frozen experts by the installed transformers."""
    product = None if at.x.is_cuda else product_by_loop

    def ours(*loras: Adapter | None) -> Tensor:
        given, (first, second) = (at.x, at.ids, at.weights, at.gate_up, at.down), at.biases
        return lora_experts(*given, *loras, gate_up_bias=first, down_bias=second, form=at.form)

    def frozen() -> Tensor:
        return grouped(at, False, product)

    stock = _Experts(at).installed if installed else frozen
    made: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "frozen": (stock, at.leaves[:2]),
        "frozen_again": (stock, at.leaves[:2]),
        "eager": (lambda: grouped(at, True, product), at.leaves),
        "lora_fast": (lambda: ours(*at.loras), at.leaves),
        "lora_fast_frozen": (ours, at.leaves[:2]),
    }
    if "peft" in impls and importlib.util.find_spec("peft"):
        layer = PeftLayer(at)
        made["peft"] = layer.forward, layer.leaves
    return {impl: made[impl] for impl in impls if impl in made}
