"""Modules that are MLPs, with a gate or without, and have a forward that is one step."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.nn.modules import module as torch_module

from lora_fast import dispatch
from lora_fast.blocks.form import Layer
from lora_fast.blocks.functional import lora_glu, lora_mlp
from lora_fast.blocks.recognise import HOLDERS, Mlp, activation_of, is_conv1d
from lora_fast.blocks.reference import ACTIVATIONS, halved
from lora_fast.blocks.siblings import CHILDREN, SIBLINGS, Joins

# In the __dict__ of a module, so that it follows deepcopy and pickle: what an MLP is, or why a module that looks like
# one is none; and beside an MLP what it was traced with.
MLP, TRACED = "_mlp", "_mlp_traced"
NO_SETTINGS = {*vars(nn.Module()), MLP, TRACED, SIBLINGS, CHILDREN}


class Traced(NamedTuple):
    """What an MLP's forward rests on beside its linear layers, as it was when it was traced."""

    children: tuple[str, ...]  # their names
    activation: str | None  # of the child that is one
    settings: dict[str, Any]  # but for those that are lists and the like, which have no changes that could be seen

    @classmethod
    def of(cls, module: nn.Module, mlp: Mlp) -> "Traced":
        activation = None if mlp.act is None else activation_of(module._modules[mlp.act])  # type: ignore[arg-type]
        plain = {name: value for name, value in settings(module).items() if not isinstance(value, HOLDERS)}
        return cls(tuple(module._modules), activation, plain)


def settings(module: nn.Module) -> dict[str, Any]:
    """The instance's own attributes: what its forward may depend on beside its class and its children."""
    return {name: value for name, value in vars(module).items() if name not in NO_SETTINGS}


class FastMlp:
    """The first base of an MLP's class while its forward is one step. Not constructed: see :func:`join`."""

    PLAIN: type[Any]  # the class that the module had

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of the class that it had, and what that gives where the layers cannot be joined."""
        layers = why_apart_now(self, args, kwargs)
        if isinstance(layers, tuple):
            mlp: Mlp = vars(self)[MLP]
            *inner, down = layers
            if len(inner) == 2:
                y = lora_glu(args[0], inner[0], inner[1], down, mlp.activation)
            else:
                y = lora_mlp(args[0], inner[0], down, mlp.activation, gate=mlp.gate)
            if all(getattr(self._modules[name], "casts_back", False) for name in mlp.layers):  # type: ignore[attr-defined]
                y = y.to(args[0].dtype)
            return y if mlp.after is None else getattr(self, mlp.after)(y)
        if layers is not None:
            dispatch.tell("runs a block layer by layer", layers)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self.PLAIN,), self.__getstate__()


def why_apart_now(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Layer, ...] | str | None:
    """The layers as ``lora_glu`` or ``lora_mlp`` takes them in this call; or why they are not joined in it, in words,
    or None where that is nobody's loss."""
    mlp: Mlp | None = vars(module).get(MLP)
    if mlp is None or not (module.training or torch.is_grad_enabled()):
        return None  # made of another one, as a part of an nn.Sequential; evaluation keeps more of a layer than a block
    if len(args) != 1 or kwargs:
        return "it was called with more than x"
    x, modules = args[0], module._modules
    if (changed := _changed(module, mlp)) is not None:
        return f"its {changed} changed since it was joined"
    if mlp.dropout is not None and (dropout := modules[mlp.dropout]).training and dropout.p > 0:
        return "it drops elements itself, ahead of its last linear layer"
    if torch_module._has_any_global_hook():
        return "there are hooks on all modules"
    for name in (*mlp.layers, mlp.act, mlp.dropout):
        if name is not None and hooked(modules[name]):
            return f"{name} has hooks or a replaced forward"
    found = []
    for name in mlp.layers:
        layer = _layer_of(modules[name], x)
        if layer is None:
            return None
        if isinstance(layer, str):
            return f"{name}: {layer}"
        found.append(layer)
    if not any(layer.adapted for layer in found):
        return None
    proved = True if is_compiling() else _proved(module, x)
    if proved is None:
        return None
    return tuple(found) if proved else "its forward gives other numbers than its layers"


def _changed(module: Any, mlp: Mlp) -> str | None:
    """The name of what its forward rests on, beside linear layers, and was another one when it was traced."""
    own, modules = vars(module), module._modules
    traced: Traced = own[TRACED]
    if traced.children != tuple(modules):
        return "list of children"
    if mlp.act is not None and activation_of(modules[mlp.act]) != traced.activation:
        return mlp.act
    if mlp.dropout is not None and type(modules[mlp.dropout]) is not nn.Dropout:
        return mlp.dropout
    for name, value in traced.settings.items():
        now = own.get(name)
        if now is not value and not (type(now) is type(value) in (int, float, str) and now == value):
            return name
    return None


def _layer_of(module: Any, x: torch.Tensor) -> Layer | str | None:
    if isinstance(module, Joins):
        return module.as_layer(x)
    if type(module) is not nn.Linear and not is_conv1d(module):
        return f"is a {type(module).__name__}"
    weight, bias = module.weight, module.bias
    if type(weight) is not nn.Parameter or weight.requires_grad or weight.numel() == 0:
        return "it has no adapter, and its weight is trained, sharded or of a type of its own"
    if x.dtype != weight.dtype and dispatch.autocast_dtype(x.device) is None:
        return f"the input is {x.dtype} and the weight {weight.dtype}, without autocast"
    return Layer(weight.t() if is_conv1d(module) else weight, bias=bias)


def hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


_probed: dict[tuple[Any, ...], bool] = {}


def _proved(module: Any, x: torch.Tensor) -> bool | None:
    """Whether two rows of x give the same bits through the module's own forward as through its layers: looked at once
    for each class and each mode, with the same random numbers for both. Tracing cannot see what a forward asks of its
    input's type. None where the rows tell nothing, and the next call's are looked at."""
    dtype = dispatch.autocast_dtype(x.device)
    key = module.PLAIN.forward, vars(module)[MLP], module.training, x.dtype, dtype
    if key not in _probed:
        if x.is_meta or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return True  # no numbers to look at; by the trace alone
        same = _same_numbers(module, x)
        if same is None:
            return None
        _probed[key] = same
    return _probed[key]


def _same_numbers(module: Any, x: torch.Tensor) -> bool | None:
    mlp: Mlp = vars(module)[MLP]
    rows = x.detach().reshape(-1, x.shape[-1])
    rows = rows[rows.isfinite().all(-1)][:2]
    if not len(rows):
        return None
    devices = [x.device] if x.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        seed = torch.random.initial_seed()
        torch.manual_seed(seed)
        whole = super(FastMlp, module).forward(rows)
        if not whole.isfinite().all():
            return None  # NaN equals nothing
        for order in {mlp.inner, mlp.inner[::-1]}:  # in which the layers draw their masks
            torch.manual_seed(seed)
            if torch.equal(whole, _by_layers(module, mlp, rows, order)):
                return True
    return False


def _by_layers(module: Any, mlp: Mlp, x: torch.Tensor, order: tuple[str, ...]) -> torch.Tensor:
    made = {name: getattr(module, name)(x) for name in order}
    e, *others = (made[name] for name in mlp.inner)
    if mlp.gate is not None:
        e, *others = halved(e, mlp.gate)
    act = ACTIVATIONS[mlp.activation] if mlp.act is None else getattr(module, mlp.act)
    h = act(e) * others[0] if others else act(e)
    y = getattr(module, mlp.down)(h)
    return y if mlp.after is None else getattr(module, mlp.after)(y)


@cache
def fast(plain: Any) -> Any:
    """The class of MLPs of a class."""
    name = plain.__name__  # which tools compare
    return type(name, (FastMlp, plain), {"PLAIN": plain, "__module__": plain.__module__, "__qualname__": name})


def _rebuilt(plain: type) -> Any:
    kind = fast(plain)
    return kind.__new__(kind)
