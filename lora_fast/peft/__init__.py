"""Fused LoRA and DoRA in models that PEFT made: :func:`patch_peft`, and back."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_fast.bases import packed_as
from lora_fast.bases.written import WrittenWeight
from lora_fast.blocks.joining import join, part
from lora_fast.kept import PLAIN
from lora_fast.layers.held_linears import dtype_beside, is_held, make_plain
from lora_fast.layers.rules import check_base_dtype, check_quantisable, kind_asked_for
from lora_fast.models.targets import holders, matching
from lora_fast.peft.report import PeftReport, experts_layers, lora_layers, peft_report
from lora_fast.wrappers.zero3 import LEFT, is_split


def patch_peft(
    model: nn.Module,
    save: str = "auto",
    base_dtype: str | None = None,
    base_dtype_exclude: str | list[str] | None = None,
    base_compute: str | None = None,
    blocks: str | bool = "auto",
) -> PeftReport:
    """Let the LoRA and DoRA layers of a PEFT model, linear ones and embeddings, run through fused kernels, in place.

    Each ``peft.tuners.lora.Linear`` on a plain ``nn.Linear``, on transformers' ``Conv1D`` (GPT-2), or on an
    ``nn.Linear`` that holds fp8 (transformers' FP8Linear, compressed-tensors'), and PEFT's layer on a ``Linear4bit`` of
    bitsandbytes', becomes an instance of a subclass of it, and so does the outermost ``ParamWrapper`` of PEFT's around
    a module of transformers' experts (``target_parameters``); parameters, state dict keys and all else that PEFT does
    with the model stay. Layers of adapters that are added later follow by themselves in a ``PeftModel``, with the same
    arguments; in a model with PEFT's layers alone, patch it again then.

    What changes after the patch (device, dtype, hooks, active adapters, merging) is looked at in every call: a layer is
    patched on the CPU too, runs in plain torch there and fused once the model is on a GPU. Calls that only stock PEFT
    can serve are stock PEFT's, with a :class:`lora_fast.SlowPathWarning` for each reason.

    Two things differ from stock on purpose: DoRA's dropout acts on the low-rank branch alone (same expectation, less
    noise), and several active adapters, fused as one of their joint rank, share a dropout mask.

    Args:
        model: a ``PeftModel``, or any model that contains PEFT's LoRA layers.
        save: what DoRA layers keep for the backward, as in :func:`lora_fast.functional.dora_linear`: "z" takes more
            memory, and lets a model change the outputs of these layers in place. Also an attribute of each layer.
        base_dtype: None, "float8_e4m3", "nf4" or "mxfp4": the base weights of the layers that can be fused are kept so
            (an :class:`lora_fast.fp8.Fp8Weight`, or 4 bits), one after the other, the original freed; unpatch_peft
            makes plain ones of them again. A merge puts a 16-bit weight in its place until the unmerge. Layers that are
            merged, whose base trains, or whose base weight is tied to another parameter stay as they are; the report
            says "fp8 base", "nf4 base" or "mxfp4 base" of the others. A DoRA magnitude stays PEFT's, the norm is that
            of what products read.
        base_compute: None, or "float8_e4m3": products over a base of 4 bits, bitsandbytes' too, or as an fp8 checkpoint
            holds it, are made from 8-bit operands.
        base_dtype_exclude: a list of names or last parts, or a regex: more layers whose base stays as it is.
        blocks: "auto": MLPs run as one step each, and layers that their parent
            calls with one input as a group (:mod:`lora_fast.blocks`): faster, and with fewer activations kept. The
            report names them. False: every layer by itself.

    Returns:
        What is fused as things stand now; :func:`peft_report` tells it anew.

    Raises:
        TypeError: not a module; a weight to quantise of another dtype than float16, bfloat16 or float32.
        ValueError: no LoRA layer of PEFT's in it, ``save`` neither "auto" nor "z", an unknown base_dtype, a weight to
            quantise that is not finite or of a shape that the base cannot have; a base_compute without a base_dtype
            where no weight is kept so that it applies; a base_dtype_exclude without either, or one that matches
            nothing; ``blocks`` neither "auto" nor False. The model is then as it was, as after any other error.
        RuntimeError: an fp8 base, or products of 8-bit operands, on a GPU that has no units for them.
        ImportError: without PEFT.
    """
    if save not in ("auto", "z"):
        raise ValueError(f'save: got {save!r}, expected "auto" or "z"')
    if blocks not in ("auto", False):
        raise ValueError(f'blocks: got {blocks!r}, expected "auto" or False')
    check_base_dtype(base_dtype, base_compute)
    layers = lora_layers(model)
    if base_compute is not None and base_dtype is None:
        if not any(map(_is_written_out, layers.values())):
            what = "a base_dtype, or a model that is kept in 4 bits or as an fp8 checkpoint holds it"
            raise ValueError(f"base_compute: got {base_compute!r}, expected None without {what}")
    if base_dtype_exclude is not None and base_dtype is None and base_compute is None:
        raise ValueError(f"base_dtype_exclude: got {base_dtype_exclude!r}, expected None without a base_dtype")
    from peft.tuners.lora import LoraModel

    from lora_fast.peft.layers import FastLinear
    from lora_fast.peft.merging import mark_ties
    from lora_fast.peft.model import FastLoraModel
    from lora_fast.peft.rules import why_never_fused

    asked = Asked(save, base_dtype, base_compute, base_dtype_exclude, bool(blocks))
    kept = matching("base_dtype_exclude", base_dtype_exclude, {layer: [name] for name, layer in layers.items()})
    done: list[Any] = []
    try:
        dtype = dtype_beside(model)
        for layer in layers.values():
            if why_never_fused(layer) is None:
                adopt(layer, base_compute, dtype)
                done.append(layer)
        done += adopt_experts(layers)
        eight = asked.quantisable(model, {name: layer for name, layer in layers.items() if layer not in kept})
        for name, layer in eight.items():
            asked.check_base(name, layer)
    except BaseException:
        for layer in done:
            layer.release()
        raise
    mark_ties(model)
    asked.quantise(model, eight.values())
    for name, module in model.named_modules():
        if isinstance(module, FastLinear):
            module.save = save
        elif type(module) in (LoraModel, FastLoraModel):
            module.__class__ = FastLoraModel
            module.patch_later = asked._replace(prefix=f"{name}." if name else "")
    part(model)
    if blocks:
        join(model)
    return peft_report(model)


class Asked(NamedTuple):
    """What :func:`patch_peft` was asked for. A tuner keeps it, and calls it when an adapter came later."""

    save: str
    base_dtype: str | None
    base_compute: str | None
    base_dtype_exclude: str | list[str] | None
    blocks: bool = True
    prefix: str = ""  # of the tuner's layers, in the names that base_dtype_exclude speaks of

    def __call__(self, tuner: nn.Module) -> None:
        """Patch the layers that are stock yet. A weight that cannot be quantised stays as it is, with a warning."""
        from lora_fast.peft.layers import FastLinear
        from lora_fast.peft.merging import mark_ties
        from lora_fast.peft.rules import why_never_fused

        layers = {self.prefix + name: layer for name, layer in lora_layers(tuner).items()}
        new = {name: layer for name, layer in layers.items() if why_never_fused(layer) is None}
        dtype = dtype_beside(tuner)
        for layer in new.values():
            adopt(layer, self.base_compute, dtype)
            if isinstance(layer, FastLinear):
                layer.save = self.save
        mark_ties(tuner)
        if self.blocks and new:
            join(tuner)
        adopt_experts(layers)
        names = {layer: [name] for name, layer in layers.items()}
        kept = matching("base_dtype_exclude", self.base_dtype_exclude, names)
        fit = self.quantisable(tuner, {name: layer for name, layer in new.items() if layer not in kept})
        for name in list(fit):
            try:
                self.check_base(name, fit[name])
            except (TypeError, ValueError, RuntimeError) as error:
                warnings.warn(
                    f"base_dtype: a layer that came later keeps its base weight as it is: {error}", stacklevel=2
                )
                del fit[name]
        self.quantise(tuner, fit.values())

    def quantisable(self, model: nn.Module, layers: dict[str, Any]) -> dict[str, Any]:
        """Those of the layers whose base weight is to become another: plain ones for a base_dtype, without it those
        that are written out for their products."""
        from lora_fast.peft.layers import FastLinear

        if self.base_dtype is None and self.base_compute is None:
            return {}
        found, held = {}, holders(model)
        for name, layer in layers.items():
            weight: Any = getattr(layer.base_layer, "weight", None)
            fits = isinstance(weight, WrittenWeight) if self.base_dtype is None else type(weight) in PLAIN
            fits = fits and not getattr(layer, "fan_in_fan_out", False)
            if isinstance(layer, FastLinear) and fits and not (weight.requires_grad or layer.merged):
                if held[id(weight)] == 1:
                    found[name] = layer
        return found

    def check_base(self, name: str, layer: Any) -> None:
        weight = layer.base_layer.weight
        if is_split(weight):
            raise ValueError(f"base_dtype: {name}: {LEFT}, expected it whole")
        try:
            check_quantisable(weight, kind_asked_for(weight, self.base_dtype, self.base_compute))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None

    def quantise(self, model: nn.Module, layers: Iterable[Any]) -> None:
        embeddings = set(_embeddings(model))
        for layer in layers:
            weight = layer.base_layer.weight
            packed = packed_as(weight, kind_asked_for(weight, self.base_dtype, self.base_compute))
            layer.base_layer.weight = nn.Parameter(packed, requires_grad=False)
            layer.is_embedding = layer in embeddings


def _is_written_out(layer: Any) -> bool:
    """Whether the base is kept so that its products could be made from 8-bit operands."""
    weight = getattr(layer.base_layer, "weight", None)
    four_bits = type(layer).__name__.endswith("Linear4bit")
    return four_bits or isinstance(weight, WrittenWeight) or is_held(layer.base_layer)


def adopt(layer: Any, base_compute: str | None, dtype: torch.dtype | None) -> None:
    """Make a stock layer, of which ``why_never_fused`` finds nothing, one of ours. A base that others hold in
    fp8 becomes a plain layer over the same bytes, which act as ``dtype``."""
    from lora_fast.peft.embedding import FastEmbedding
    from lora_fast.peft.four_bits import FastLinear4bit
    from lora_fast.peft.layers import FastLinear

    if type(layer) is FastEmbedding.STOCK:
        FastEmbedding.adopt(layer)
        return
    if type(layer).__name__ != "Linear4bit":
        FastLinear.adopt(layer)
        if is_held(layer.base_layer):
            make_plain(layer.base_layer, dtype)
        return
    FastLinear4bit.adopt(layer)
    layer.e4m3 = base_compute == "float8_e4m3"
    layer.base_weight()


def adopt_experts(layers: dict[str, Any]) -> list[Any]:
    """Make the stock wrappers of experts among the layers, where they can be, ones of ours: these."""
    done: list[Any] = []
    for name, wrapper in experts_layers(layers).items():
        from lora_fast.peft.experts import FastExperts, why_never_fused  # not in every PEFT

        if not isinstance(wrapper, FastExperts) and why_never_fused(wrapper) is None:
            FastExperts.adopt(wrapper, name)
            done.append(wrapper)
    return done


def _embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """What transformers' models say their embeddings and heads are: PEFT may save them with the adapter."""
    for module in model.modules():
        for name in ("get_input_embeddings", "get_output_embeddings"):
            if callable(get := getattr(module, name, None)):
                try:
                    found = get()
                except (AttributeError, NotImplementedError):  # transformers' way to say that it has none
                    continue
                if isinstance(found, nn.Module):
                    yield found


def unpatch_peft(model: nn.Module) -> None:
    """Undo :func:`patch_peft`. Layers that are merged stay merged, and unmerge as stock PEFT does: by subtraction.

    Raises:
        TypeError, ValueError, ImportError: as :func:`patch_peft`.
    """
    layers = lora_layers(model)
    from peft.tuners.lora import LoraModel

    from lora_fast.peft.embedding import FastEmbedding
    from lora_fast.peft.layers import FastLinear
    from lora_fast.peft.model import FastLoraModel

    part(model)
    for layer in layers.values():
        if isinstance(layer, (FastLinear, FastEmbedding)):
            layer.release()
    for wrapper in experts_layers(layers).values():
        if hasattr(wrapper, "release"):  # a FastExperts
            wrapper.release()
    for module in model.modules():
        if type(module) is FastLoraModel:
            vars(module).pop("patch_later", None)
            module.__class__ = LoraModel  # type: ignore[assignment]
