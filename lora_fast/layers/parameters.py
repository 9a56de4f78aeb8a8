"""LoRA on parameters of modules that are no ``nn.Linear``: an adapter as the module's child, and a class with another
forward. Here a matrix by itself, as routers have one; the weights of experts: experts.py."""

import math
from typing import Any

import torch
from torch import nn

from lora_fast.experts.form import Adapter
from lora_fast.layers.rules import check_hyperparameters, init_adapter
from lora_fast.reference import lora_weight
from lora_fast.wrappers.gather import is_sharded
from lora_fast.wrappers.placement import kind_of, offloading
from lora_fast.wrappers.zero3 import is_split

CHILD = "lora_"  # and the parameter's name: what the module calls its adapter

# torch's classes that hold parameters of others, or none.
PLAIN = (nn.Module, nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)


class AdaptedModule(nn.Module):
    """A module whose parameters have adapters, which is what :func:`adapted` makes of its class."""

    ADAPTED: Any  # the class that it was, and is again without adapters
    WAY: Any  # the subclass of this one that has the forward

    def adapters(self) -> list[Any]:
        """Each :class:`ParameterLoRA` that it has."""
        return [child for child in self._modules.values() if isinstance(child, ParameterLoRA)]

    def is_adapted(self) -> bool:
        """Whether it needs this class."""
        return any(self.adapters())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _bare, (self.ADAPTED, self.WAY), vars(self).copy()  # the class itself is in no file


class AdaptedMatrices(AdaptedModule):
    """In whose forward each adapted matrix is ``W + scaling * B A``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, with the matrices as they then are; returns and raises as that does."""
        seen = {one.parameter: one.effective_weight() for one in self.adapters() if one.enabled != one.merged}
        for name, weight in seen.items():
            self.__dict__[name] = weight  # found before the parameter, which nn.Module looks up last
        try:
            return super().forward(*args, **kwargs)
        finally:
            for name in seen:
                del self.__dict__[name]


class ParameterLoRA(nn.Module):
    """A trainable low-rank update of a matrix W [out, in], a parameter of a module that is no ``nn.Linear``, whose
    forward sees ``W + scaling * B A`` in its place, summed in float32 and rounded once.

    Made beside the module; from :meth:`attach` on it is its child, and what the module computes.

    Args:
        module: whose parameter it is.
        parameter: its name there.
        r: the rank of the update, >= 1.
        lora_alpha, use_rslora, init_lora_weights: as of :class:`lora_fast.LoRALinear`.

    Attributes:
        lora_A [r, in], lora_B [out, r]: trainable; float32 on a 16-bit base, else the base's dtype.
        merged, enabled: the adapter's state.

    Raises:
        TypeError, ValueError: a parameter that can have no adapter, an argument of the wrong type or outside its range.
    """

    WAY: type[AdaptedModule] = AdaptedMatrices
    adapter_names: tuple[str, ...] = ("lora_A", "lora_B")
    keeps_adapter = True  # see lora_fast.layers.replacing
    use_dora = False
    experts = 1  # how many matrices the parameter is, each with a rank of r
    unmerged_weight: torch.Tensor | None

    def __init__(
        self,
        module: nn.Module,
        parameter: str,
        r: int = 8,
        lora_alpha: float = 8,
        use_rslora: bool = False,
        *,
        init_lora_weights: bool | str = True,
    ) -> None:
        check_hyperparameters(r, lora_alpha, 0.0, use_rslora, init_lora_weights)
        if why := self.why_not(module, parameter):
            raise TypeError(f"module: expected a parameter that can have an adapter, got one of which {why}")
        super().__init__()
        self.parameter = parameter
        self.r, self.lora_alpha, self.use_rslora, self.lora_dropout = r, lora_alpha, use_rslora, 0.0
        self.enabled = True
        self._owner = (module,)  # in a tuple, where nn.Module does not take it for a child
        self._measure()
        weight = self.weight
        dtype = torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype
        self.lora_A, self.lora_B = (
            nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype)) for shape in self.adapter_shapes
        )
        self.register_buffer("unmerged_weight", None)
        self.reset_lora_parameters(init_lora_weights)
        self.train(module.training)

    @staticmethod
    def why_not(module: nn.Module, parameter: str) -> str | None:
        """Why there can be no such adapter of this parameter of the module, in words; None where there can."""
        return why_no_matrix(module, parameter)

    def _measure(self) -> None:
        self.out_features, self.in_features = self.weight.shape

    @torch.no_grad()
    def reset_lora_parameters(self, init_lora_weights: bool | str = True) -> None:
        """Initialise lora_A and lora_B anew, as PEFT does."""
        init_adapter(self.lora_A, self.lora_B, init_lora_weights)
        if init_lora_weights == "gaussian":
            self.lora_A.mul_(self.experts)  # A ~ N(0, 1/r^2): the rank is r, not the number of rows

    def attach(self) -> None:
        """Become a child of the module, the parameter of which freezes, and what it computes."""
        self.owner._parameters[self.parameter].requires_grad_(False)
        if not isinstance(self.owner, AdaptedModule):
            self.owner.__class__ = adapted(type(self.owner), self.WAY)
        self.owner.add_module(CHILD + self.parameter, self)

    def release(self) -> None:
        """Leave the module, which is as before: with the adapter in its weight if it is merged."""
        owner = self.owner
        del owner._modules[CHILD + self.parameter]
        if isinstance(owner, AdaptedModule) and not owner.is_adapted():
            owner.__class__ = type(owner).ADAPTED

    @property
    def owner(self) -> Any:
        """The module."""
        return self._owner[0]

    @property
    def adapter_shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.experts * self.r, self.in_features), (self.out_features, self.r * self.experts)

    @property
    def weight(self) -> torch.Tensor:
        """The parameter as it is now, merged or not."""
        found: torch.Tensor = getattr(self.owner, self.parameter)
        return found

    @property
    def base_weight(self) -> torch.Tensor:
        """The frozen parameter without the adapter, whether merged or not."""
        return self.weight if self.unmerged_weight is None else self.unmerged_weight

    @property
    def bias(self) -> None:
        """None: what the module has of biases stays its own."""

    @property
    def merged(self) -> bool:
        return self.unmerged_weight is not None

    @property
    def scaling(self) -> float:
        return float(self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r))

    @property
    def adapter(self) -> Adapter:
        return Adapter(self.lora_A, self.lora_B, self.scaling)

    def enable(self) -> None:
        """Let the adapter act (the default)."""
        self.enabled = True

    def disable(self) -> None:
        """Let the module compute without the adapter, merged or not, until :meth:`enable`."""
        self.enabled = False

    def effective_weight(self) -> torch.Tensor:
        """What the module is to compute with, in the base's dtype: the base, or with the adapter in it."""
        return lora_weight(self.base_weight, *self.adapter) if self.enabled else self.base_weight

    def merged_weight(self) -> torch.Tensor:
        """The base with the adapter in it, in its layout and dtype, without gradient."""
        with torch.no_grad():
            return lora_weight(self.weight, *self.adapter)

    def merge(self, safe_merge: bool = False, original: torch.Tensor | None = None) -> None:
        """Put the base with the adapter in it, summed in float32 and rounded once, in the parameter's place; nothing if
        merged already. The base is kept for :meth:`unmerge`: what is merged takes twice the memory until
        ``remove_lora``.

        Raises:
            ValueError: with ``safe_merge``, a merged weight that is not finite; one that FSDP shards or accelerate
                offloads; an ``original``, which is for fp8 bases. The module is then as it was.
        """
        if self.merged:
            return
        if original is not None:
            raise ValueError(f"original: got a tensor, expected None for {self.parameter}, a parameter of a module")
        self.check_place()
        weight = self.weight
        with kind_of(weight):
            merged = self.merged_weight()
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError("safe_merge: the merged weight has NaN or infinite elements; the layer stays unmerged")
            self.register_buffer("unmerged_weight", weight.detach())
            self.owner._parameters[self.parameter] = nn.Parameter(merged, requires_grad=False)

    def unmerge(self) -> None:
        """Put the base back, bit for bit; nothing if not merged. Raises ValueError as :meth:`merge`."""
        if (base := self.unmerged_weight) is None:
            return
        self.check_place()
        with kind_of(base):
            self.owner._parameters[self.parameter] = nn.Parameter(base, requires_grad=False)
        self.register_buffer("unmerged_weight", None)

    def check_place(self) -> None:
        """Raise ValueError where the parameter cannot be merged into."""
        weight = self.weight
        managed = any(getattr(m, "_is_fsdp_managed_module", False) for m in (self.owner, self))
        managed = managed or is_split(weight)
        if managed or is_sharded(weight) or offloading(self.owner) is not None or weight.is_meta:
            raise ValueError(
                f"{self.parameter}: is sharded, offloaded or without data, expected it whole and in memory; merge and "
                "unmerge before that"
            )

    def parts_of_adapter(self) -> tuple[str, ...]:
        """Names in a state dict of what a merge is made with."""
        return self.adapter_names

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.out_features}, r={self.r}"
        flags = {"use_rslora=True": self.use_rslora, "merged": self.merged, "disabled": not self.enabled}
        return ", ".join([text, f"lora_alpha={self.lora_alpha}", *(name for name, on in flags.items() if on)])


_classes: dict[tuple[type, type], Any] = {}


def adapted(kind: type, way: type[AdaptedModule]) -> Any:
    """The class of modules of this kind whose parameters have adapters, with that one's forward."""
    if (kind, way) not in _classes:
        own = {"__module__": kind.__module__, "ADAPTED": kind, "WAY": way}
        _classes[kind, way] = type(f"LoRA{kind.__name__}", (way, kind), own)
    return _classes[kind, way]


def _bare(kind: type, way: type[AdaptedModule]) -> Any:
    made = adapted(kind, way)
    return made.__new__(made)


def is_torchs(module: nn.Module) -> bool:
    """Whether it is one of torch's own layers, or of a class made from one."""
    return any(kind.__module__.startswith("torch.nn.") and kind not in PLAIN for kind in type(module).__mro__)


def why_no_matrix(module: nn.Module, parameter: str) -> str | None:
    """Why a :class:`ParameterLoRA` cannot adapt this parameter of the module, in words; None where it can."""
    weight, kind = module._parameters.get(parameter), type(module).__name__
    if isinstance(module, nn.Linear):
        return "it is an nn.Linear's, which target_modules names"
    if is_torchs(module):
        return f"it is of torch's own layer {kind}"
    if weight is None or isinstance(weight, nn.UninitializedParameter) or weight.dim() != 2 or 0 in weight.shape:
        shape = "nothing" if weight is None else f"{weight.dim()}-dimensional"
        return f"the parameter of the {kind} is {shape}, not a matrix"
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return f"it is {weight.dtype}, not a floating matrix"
    if "forward" in vars(module):
        return "the module's forward was replaced"
    return None
