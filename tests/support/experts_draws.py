"""Random layers of experts, and y with every gradient of one."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_fast.experts import reference
from lora_fast.experts.form import Adapter, ExpertsForm

NAMES = ("y", "dx", "dw", "dA1", "dB1", "dA2", "dB2")


@dataclass
class Draw:
    """What ``lora_experts`` takes, and the gradient of its output."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_lora: Adapter | None
    down_lora: Adapter | None
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    form: ExpertsForm
    dout: torch.Tensor

    @property
    def given(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in list(self.__dataclass_fields__)[:9])

    def to(self, dtype: torch.dtype) -> "Draw":
        """All floating tensors in this dtype."""

        def cast(value: Any) -> Any:
            if isinstance(value, Adapter):
                return Adapter(cast(value.lora_A), cast(value.lora_B), value.scaling)
            return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        return replace(self, **{name: cast(value) for name, value in vars(self).items()})


def draw(
    tokens: int = 12,
    k: int = 2,
    experts: int = 4,
    h: int = 32,
    i: int = 48,
    r: tuple[int, int] = (4, 16),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    *,
    form: ExpertsForm | None = None,
    bias: bool = False,
    adapter: torch.dtype | None = None,
    routing: torch.dtype = torch.float32,
    ids: torch.dtype = torch.int64,
) -> Draw:
    """All terms of h and of the experts' outputs are of the size of one. A rank of 0: no adapter."""
    gen, form = torch.Generator(device).manual_seed(seed), form or ExpertsForm()

    def normal(*shape: int, std: float = 1.0, kind: torch.dtype = dtype) -> torch.Tensor:
        return (std * torch.randn(*shape, generator=gen, device=device)).to(kind)

    def lora(rank: int, c: int, n: int, scaling: float) -> Adapter | None:
        if not rank:
            return None
        a = normal(experts * rank, c, std=c**-0.5, kind=adapter or dtype)
        return Adapter(a, normal(n, rank * experts, std=0.3, kind=adapter or dtype), scaling)

    scores, logits = torch.rand(tokens, experts, generator=gen, device=device), normal(tokens, k, kind=torch.float32)
    gate_up, down = normal(experts, 2 * i, h, std=h**-0.5), normal(experts, h, i, std=i**-0.5)
    if form.transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    return Draw(
        normal(tokens, h),
        scores.topk(k).indices.to(ids),
        logits.softmax(-1).to(routing),
        gate_up,
        down,
        lora(r[0], h, 2 * i, 2.0),
        lora(r[1], i, h, 1.5),
        normal(experts, 2 * i) if bias else None,
        normal(experts, h) if bias else None,
        form,
        normal(tokens, h),
    )


def fused(one: Draw) -> torch.Tensor:
    from lora_fast.experts.fused import FusedExperts

    return FusedExperts(*one.given, form=one.form)(*one.given)


def loop(one: Draw) -> torch.Tensor:
    """The reference, with adapters in x's dtype, as autocast has them."""
    return reference.lora_experts(*(same_kind(value, one.x.dtype) for value in one.given), form=one.form)


def same_kind(value: Any, dtype: torch.dtype) -> Any:
    return Adapter(value[0].to(dtype), value[1].to(dtype), value[2]) if isinstance(value, Adapter) else value


def asking(one: Draw, wanted: tuple[str, ...] = NAMES) -> tuple[Draw, dict[str, torch.Tensor]]:
    """The same draw whose tensors ask for these gradients, and these tensors by the gradients' names."""
    leaves: dict[str, torch.Tensor] = {}

    def leaf(name: str, t: torch.Tensor) -> torch.Tensor:
        if name not in wanted:
            return t
        leaves[name] = t.detach().clone().requires_grad_()
        return leaves[name]

    def lora(number: int, value: Adapter | None) -> Adapter | None:
        return value and Adapter(leaf(f"dA{number}", value[0]), leaf(f"dB{number}", value[1]), value[2])

    given: dict[str, Any] = {
        "x": leaf("dx", one.x),
        "weights": leaf("dw", one.weights),
        "gate_up_lora": lora(1, one.gate_up_lora),
        "down_lora": lora(2, one.down_lora),
    }
    return replace(one, **given), leaves


def results(function: Any, one: Draw, wanted: tuple[str, ...] = NAMES) -> dict[str, torch.Tensor]:
    """y and the gradients wanted."""
    one, leaves = asking(one, wanted)
    y = function(one)
    if leaves:
        y.backward(one.dout)
    found = {name: t.grad for name, t in leaves.items() if t.grad is not None}
    assert found.keys() == leaves.keys(), f"gradients of {list(found)} alone"
    assert all(found[name].dtype == leaves[name].dtype for name in leaves)
    return {"y": y.detach(), **found}
