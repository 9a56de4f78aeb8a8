"""Conversion of a whole model: LoRA on its nn.Linear layers in place; take it out."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from lora_fast.bases.packed import PackedWeight
from lora_fast.bases.stack import PackedStack
from lora_fast.bases.written import WrittenWeight
from lora_fast.blocks.joining import join, part
from lora_fast.layers.dora import DoRALinear
from lora_fast.layers.embedding import LoRAEmbedding
from lora_fast.layers.experts import AdaptedExperts, ExpertsLoRA, adapter_of, check_packable
from lora_fast.layers.held_linears import dtype_beside, is_held, plain_linear
from lora_fast.layers.lora import LoRALinear
from lora_fast.layers.named import NamedLinear
from lora_fast.layers.parameters import ParameterLoRA
from lora_fast.layers.replacing import forget_adapted, note_adapted
from lora_fast.layers.rules import check_quantisable, is_linear, kind_asked_for
from lora_fast.models.adapters import BEFORE, SAVED, TRAINED, check_adapted, names_in, standing
from lora_fast.models.all_linear import layers_before
from lora_fast.models.config import LoRAConfig
from lora_fast.models.named import check_addition, remove_named, swap, taken_out, under_name
from lora_fast.models.packing import guard_saving
from lora_fast.models.peft_config import from_peft, is_pefts
from lora_fast.models.projections import missed_by, patterns
from lora_fast.models.targets import find_parameters, find_targets, holders, matching, resolve_pattern, some
from lora_fast.wrappers import fsdp1
from lora_fast.wrappers.names import compiled_alone, plain_modules, unwrapped
from lora_fast.wrappers.placement import keeper


def add_lora(model: nn.Module, config: Any, *, name: str | None = None, blocks: str | bool = "auto") -> nn.Module:
    """Replace the targeted ``nn.Linear`` layers of ``model``, and transformers' ``Conv1D`` (GPT-2's), by LoRALinear, or
    DoRALinear, and the targeted ``nn.Embedding`` s by LoRAEmbedding, in place, give the targeted parameters adapters,
    freeze the rest, return ``model``.

    ``config`` is a :class:`LoRAConfig`, or PEFT's ``LoraConfig``: what of it means nothing here (``task_type``) is
    dropped, what our layers have not is an error that says how to get it.

    "all-linear" also means what was an ``nn.Linear`` in transformers 4, as it does to PEFT: experts, and the routers of
    Mixtral's and Qwen's families. Other parameters that ``target_modules`` speaks of and that are no ``nn.Linear``'s
    get no adapter, and a warning names them: fused experts, routers.

    Layers that hold fp8 (transformers' FP8Linear, compressed-tensors') keep their bytes, as a
    :class:`lora_fast.bases.ScaledFp8Weight`, which acts as most elements of the model's other parameters do.

    Training flags are kept. Names are as without the wrappers of torch.compile, checkpointing or parallel training, in
    the model or around it; patterns may also spell these out. A layer found under several names is converted once, in
    all its places: it is a target if one of its names is, unless one of them is excluded. From then on
    a tool that would put another layer in the place of one of these, and so drop its adapter, gets a RuntimeError.

    With a ``name`` the adapter may come beside others, each with a config of its own (but for bias, modules_to_save,
    target_parameters and embeddings among its targets, which it has not); the first is the active one
    (:func:`lora_fast.set_adapter`), or each sample of a batch names its own (:func:`lora_fast.use_adapters`). One that
    came without a name is then called "default".

    With ``blocks="auto"`` MLPs run as one step each, and layers that their parent calls with one input as a group
    (docs/blocks.md); with False every layer runs by itself. Where several adapters come the last call decides.

    Raises:
        TypeError: not a module, neither of the configs.
        ValueError: a field of PEFT's config asks for what our layers have not; the model has LoRA layers already (and
            this one no ``name``), is itself an ``nn.Linear`` or wrapped by FSDP1; a target is no plain ``nn.Linear`` or
            its forward would not be called; a name or pattern of the config matches nothing; a weight to quantise that
            is not finite, or of a shape that the base cannot have; a base_compute alone where no weight is kept so that
            it applies; ``blocks`` neither "auto" nor False; a ``name`` that is there already or cannot be one, and what
            adapters with names have not.
        RuntimeError: an fp8 base, or products of 8-bit operands, on a GPU that has no units for them.
        After any error the model, its modules and its requires_grad flags are as they were.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    if is_pefts(config):
        config = from_peft(config)
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected a LoRAConfig, or PEFT's LoraConfig")
    if blocks not in ("auto", False):
        raise ValueError(f'blocks: got {blocks!r}, expected "auto" or False')
    config = replace(config)  # its fields may have been assigned since it was checked
    if name is not None:
        check_addition(model, config, name)
    elif present := [place or "itself" for place in standing(model)]:
        raise ValueError(
            f"model: has LoRA layers already ({some(present)}); call remove_lora first, or give another adapter a name"
        )
    if fsdp1.holds(model):
        raise ValueError("model: is wrapped by FSDP1 (FullyShardedDataParallel); call add_lora first, then wrap it")
    if is_linear(own := unwrapped(model)):
        raise ValueError(
            f"model: got a {type(own).__name__}, which cannot be replaced in place; use LoRALinear.from_linear"
        )
    if name is None:
        _convert(model, config)
    else:
        with taken_out(model) as before:
            _convert(model, config, named=True)
        under_name(model, name, before)
    matrices = [layer for layer in _beside(model) if not isinstance(layer, ExpertsLoRA)]
    beside = [f"{type(layer.owner).ADAPTED.__name__}.{layer.parameter}" for layer in matrices]
    beside += [type(module).__name__ for module in model.modules() if isinstance(module, LoRAEmbedding)]
    beside += ["Conv1D" for module in model.modules() if isinstance(module, LoRALinear) and module.fan_in_fan_out]
    if config.base_dtype is not None and beside:
        warnings.warn(
            f"add_lora: base_dtype={config.base_dtype!r} is for nn.Linear layers and experts; these stay as they are: "
            f"{some(list(dict.fromkeys(beside)))}",
            stacklevel=2,
        )
    if missed := missed_by(model, config.target_modules, config.exclude_modules):
        warnings.warn(
            f"add_lora: target_modules={config.target_modules!r} also means parameters that are no nn.Linear's, which "
            f"(target_parameters names experts) get no adapter and stay frozen: {some(patterns(missed))}",
            stacklevel=2,
        )
    if name is not None:
        part(model)
    if blocks:
        join(model)
    return model


def _convert(model: nn.Module, config: LoRAConfig, named: bool = False) -> None:
    """:func:`add_lora` of the first adapter. Nothing holds the old layers when bases change their kind, so that their
    weights are freed one by one."""
    for layer in _converted(model, config, named):
        layer.quantise_base(config.base_dtype, config.base_compute)
    if any(isinstance(p, PackedStack) for p in model.parameters()):
        guard_saving(model)


def _converted(model: nn.Module, config: LoRAConfig, named: bool) -> list[Any]:
    """The layers that are to get bases of another kind, each of which can, and experts."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in plain_modules(model, remove_duplicate=False):
        if name:
            names.setdefault(module, []).append(name)
    for name, module in model.named_modules(remove_duplicate=False):
        if name not in names.get(module, name):
            names[module].append(name)  # as patterns may have spelt it, a wrapper's parts and all
    saved = {m for root in matching("modules_to_save", config.modules_to_save, names) for m in root.modules()}
    meant = layers_before(model, config, names)
    targets = find_targets(model, config, names, saved, {module for module, _ in meant})
    parameters, times = find_parameters(config, names, saved, meant)
    without = [names[m][0] for m in targets if isinstance(m, nn.Embedding)]
    without += [full[0] for full in parameters.values()]
    if named and without:
        found = some(without)
        raise ValueError(f"target_modules: means {found}, too, which no adapter with a name has; use exclude_modules")
    both: dict[Any, list[str]] = {**{m: names[m] for m in targets}, **parameters}
    ranks = resolve_pattern("rank_pattern", config.rank_pattern, config.r, both, both, times)
    alphas = resolve_pattern("alpha_pattern", config.alpha_pattern, config.lora_alpha, both, both, times)
    trained = {m: _trained_names(m, config.bias, m in targets, m in saved) for m in model.modules()}
    to_train = {p for m, own in trained.items() for n, p in m._parameters.items() if n in own and p is not None}
    if tied := [names[m][0] for m in targets if m.weight in to_train]:
        raise ValueError(f"modules_to_save: would train the base weight of {some(tied)}, which is tied to it")
    if packed := [name for name, p in model.named_parameters() if isinstance(p, PackedWeight) and p in to_train]:
        raise ValueError(f"modules_to_save: would train {some(packed)}, expected weights that are not in 8 or 4 bits")

    excludable: dict[Any, list[str]] = {m: names[m] for m in targets}
    excludable |= {target: full + names[target.module] for target, full in parameters.items()}
    kept = matching("base_dtype_exclude", config.base_dtype_exclude, excludable)
    owners = holders(model)
    dtype = dtype_beside(model) if any(map(is_held, targets)) else None
    own: dict[Any, Any] = {m: plain_linear(m, dtype) if is_held(m) else m for m in targets}
    eight = _to_quantise(
        config,
        {
            m: linear
            for m, linear in own.items()
            if isinstance(linear, nn.Linear) and owners[id(m.weight)] == 1 and m not in kept
        },
    )
    before = {m: {n: p.requires_grad for n, p in m._parameters.items() if p is not None} for m in model.modules()}
    layers: dict[nn.Module, Any] = {}
    beside: list[ParameterLoRA] = []
    stacks: list[ExpertsLoRA] = []  # those to be packed
    kind = DoRALinear if config.use_dora else LoRALinear
    try:
        for linear, stand_in in own.items():
            init: Any = {"init_lora_weights": config.init_lora_weights}
            r_and_alpha = ranks[linear], alphas[linear]
            with noting(f"while converting {names[linear][0]!r}"):
                if isinstance(stand_in, nn.Embedding):
                    made = LoRAEmbedding.from_embedding(
                        stand_in, *r_and_alpha, config.use_rslora, config.use_dora, **init
                    )
                    made.lora_dropout = config.lora_dropout  # of which an embedding has none, as in PEFT: for its file
                    layers[linear] = made
                    continue
                layers[linear] = kind.from_linear(
                    stand_in, *r_and_alpha, config.lora_dropout, config.use_rslora, **init
                )
                if linear in eight:
                    weight = own[linear].weight
                    check_quantisable(weight, kind_asked_for(weight, config.base_dtype, config.base_compute))
        for target, full in parameters.items():
            hyper = ranks[target], alphas[target], config.use_rslora
            with noting(f"while converting {full[0]!r}"):
                one = adapter_of(target.module)(*target, *hyper, init_lora_weights=config.init_lora_weights)
                beside.append(one)
                if target not in kept and isinstance(one, ExpertsLoRA) and owners[id(one.weight)] == 1:
                    if _packs(one, full[0], config):
                        stacks.append(one)
        for parameter in model.parameters():
            parameter.requires_grad = parameter in to_train and parameter.is_floating_point()
    except BaseException:
        for module, flags in before.items():
            _set_flags(module, flags)
        raise
    # From here on nothing can fail.
    swap(model, layers)
    for each in beside:
        each.attach()
    note_adapted(model)
    for layer in layers.values():
        layer.base_is_tied = owners[id(layer.weight)] > 1
    for module, flags in before.items():
        note = {SAVED: True} if module in saved and trained[module] else {}
        flags = vars(module).get(BEFORE, flags)  # of the first of several adapters
        vars(layers.get(module, module)).update({BEFORE: flags, TRAINED: trained[module], **note})
    return [*(layers[linear] for linear in eight), *stacks]


def _packs(experts: ExpertsLoRA, name: str, config: LoRAConfig) -> bool:
    """Whether the config has the experts of this name packed, which then can be."""
    if config.base_compute is not None and (config.base_dtype is not None or isinstance(experts.weight, PackedStack)):
        raise ValueError(
            f"base_compute: got {config.base_compute!r}, expected None for experts, whose products are of 16 bits: "
            f"base_dtype_exclude=[{name!r}] leaves them as they are"
        )
    if config.base_dtype is None:
        return False
    check_packable(experts.weight, config.base_dtype, experts.form.transposed)
    return True


def _beside(model: nn.Module) -> list[ParameterLoRA]:
    """The adapters of parameters."""
    return [module for module in model.modules() if isinstance(module, ParameterLoRA)]


def _to_quantise(config: LoRAConfig, targets: dict[nn.Linear, nn.Linear]) -> list[nn.Linear]:
    """Those of the targets, each with what stands for it, whose bases are to be of another kind."""
    if config.base_dtype is not None or config.base_compute is None:
        return [] if config.base_dtype is None else list(targets)
    if found := [m for m, linear in targets.items() if isinstance(linear.weight, WrittenWeight)]:
        return found
    what = "None without a base_dtype, but over weights that are in 4 bits or as an fp8 checkpoint holds them"
    raise ValueError(f"base_compute: got {config.base_compute!r}, expected {what}")


def remove_lora(model: nn.Module, name: str | None = None) -> nn.Module:
    """Put plain ``nn.Linear`` and ``Conv1D`` layers back in place, and requires_grad as before :func:`add_lora`; return
    ``model``. With a ``name`` only the adapter of this name goes, if there are others; where it was the active one, the
    first of these is.

    The weights are the base's, bit for bit, or the merged ones where a layer is merged: merge_lora, then remove_lora.

    Raises:
        ValueError: no LoRA layer, no adapter of this name, or a merged one beside others; ``model`` is itself a layer,
            or torch.compile was given one by itself, or the weights are in the keeping of FSDP or accelerate.
    """
    check_adapted(model, complete=False)
    if name is not None and names_in(model) != [name]:
        remove_named(model, name)
        return model
    layers = standing(model)
    homes = {place: layer.owner if isinstance(layer, ParameterLoRA) else layer for place, layer in layers.items()}
    if kept := [f"{place} (by {who})" for place, home in homes.items() if (who := keeper(home))]:
        raise ValueError(f"model: has weights that a wrapper keeps: {some(kept)}; remove_lora before wrapping it")
    replaced = LoRALinear, NamedLinear, LoRAEmbedding
    if isinstance(own := unwrapped(model), replaced):
        ways = "to_embedding()" if isinstance(own, LoRAEmbedding) else "to_linear()"
        raise ValueError(f"model: got a {type(own).__name__}, which cannot be replaced in place; use its {ways}")
    if compiled := compiled_alone(model, replaced):
        raise ValueError(
            f"model: torch.compile was given {some(compiled)} by itself, so that its wrapper would go on "
            "calling the LoRA layer; put the wrapper's _orig_mod in its place first"
        )
    part(model)
    linears: dict[nn.Module, nn.Module] = {
        layer: layer.plain() for layer in layers.values() if isinstance(layer, replaced)
    }
    for each in _beside(model):
        each.release()
    modules = list(model.modules())
    swap(model, linears)
    for module in modules:
        forget_adapted(module)
        for note in (TRAINED, SAVED):
            vars(module).pop(note, None)
        _set_flags(linears.get(module, module), vars(module).pop(BEFORE, {}))
    return model


def _trained_names(module: nn.Module, bias: str, is_target: bool, is_saved: bool) -> list[str]:
    """Names of the module's own tensors that train, or follow training (buffers of modules_to_save)."""
    if is_saved:
        tensors = {**module._parameters, **module._buffers}
        return [n for n, t in tensors.items() if t is not None and n not in module._non_persistent_buffers_set]
    if bias == "all" or (bias == "lora_only" and is_target):
        return [n for n, p in module._parameters.items() if p is not None and n == "bias"]  # PEFT's rule
    return []


def _set_flags(module: nn.Module, flags: dict[str, bool]) -> None:
    for name, flag in flags.items():
        if (parameter := module._parameters.get(name)) is not None:
            parameter.requires_grad = flag and not isinstance(module, AdaptedExperts)  # packed ones stay frozen


@contextmanager
def noting(note: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise
