"""The header of ``adapter_model.safetensors``: whose the tensors are, and whether they fit the model. See format.py."""

import re
from typing import Any

import torch
from torch import nn

from lora_fast.dispatch import has_data
from lora_fast.files.format import CONFIG, PREFIX, TENSORS, Settings
from lora_fast.files.hub_names import in_memory
from lora_fast.files.parameters import layer_of, shapes_of, targeted, wrappers_of
from lora_fast.files.ways_out import BASE_WEIGHTS, EMBEDDING, NO_LINEAR, RENAMED, RESIZED
from lora_fast.kept import PLAIN
from lora_fast.layers.rules import features, is_linear
from lora_fast.wrappers.names import plain_modules, plain_name

_ADAPTER = re.compile(
    r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector(?:\.weight)?)"
)
# What input embeddings and output heads are called.
HEADS = {"lm_head", "embed_out"}
VOCABULARY = {"embed_tokens", "embed_in", "wte", "word_embeddings", "tok_embeddings", "shared", *HEADS}
_OWN = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}
_OWN |= {name: name for name in ("lora_embedding_A", "lora_embedding_B")}


def check_header(
    model: nn.Module, settings: Settings, file: Any
) -> tuple[dict[str, int], dict[str, float], dict[str, str]]:
    """({layer: rank}, {layer: alpha}, {key of lora_state_dict: key in the file}) of a file whose header fits the model,
    whose layers may have names of transformers' before it renamed them."""
    modules = dict(plain_modules(model))
    own_tensors = _tensors(model)
    keys = [plain_name(key.removeprefix(PREFIX)) for key in file.keys()]  # noqa: SIM118 (not a dict)
    in_file = {match[1] for key in keys if (match := _ADAPTER.fullmatch(key))}
    renamed = in_memory(model, [f"{name}.weight" for name in in_file - modules.keys()])
    layers = {name: renamed.get(f"{name}.weight", name).removesuffix(".weight") for name in in_file}
    try:
        wrappers = wrappers_of(model, targeted(model, settings.target_parameters))
    except ValueError as error:
        raise ValueError(f"{CONFIG}: {error}") from None
    experts = {layer_of(parameter): parameter for parameter in wrappers}
    layers |= {wrapper: layer_of(parameter) for parameter, wrapper in wrappers.items()}
    written = {layer: name for name, layer in layers.items()} | experts
    found: dict[str, dict[str, str]] = {}
    sources: dict[str, str] = {}
    for key in file.keys():  # noqa: SIM118 (not a dict)
        name = plain_name(key.removeprefix(PREFIX))  # of wrappers that were inside the model that was saved
        if not key.startswith(PREFIX):
            raise ValueError(f"{TENSORS}: unexpected {key!r:.200}, expected names that begin with {PREFIX!r}")
        if match := _ADAPTER.fullmatch(name):
            part, own_name = _OWN.get(match[2], "lora_magnitude_vector"), layers[match[1]]
            if part in found.setdefault(own_name, {}):
                raise ValueError(f"{TENSORS}: has the {part} of {own_name!r:.200} twice")
            found[own_name][part] = sources[f"{own_name}.{part}"] = key
            continue
        owner, _, last = name.rpartition(".")
        if settings.bias == "all" and re.fullmatch(r".+\.(modules_to_save|original_module)\.bias", name):
            continue  # PEFT also writes these beside the bias that counts
        if owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
            name = f"{layers.get(owner, owner)}.{last}"
        allowed = settings.bias != "none" and last == "bias" or settings.modules_to_save
        if not allowed and last == "weight" and _holds(own_tensors.get(name), file, key):
            continue  # PEFT takes embeddings along where they are targets
        if not allowed or name not in own_tensors or name in sources:
            base = key.endswith(".base_layer.weight") or name in own_tensors and last == "weight"
            raise ValueError(
                f"{TENSORS}: unexpected {key!r:.200}, expected adapters and what the config says trains"
                + (BASE_WEIGHTS if base else NO_LINEAR if ".lora_" in key else "" if name in own_tensors else RENAMED)
            )
        own = own_tensors[name]
        _check_shape(file, key, list(own.shape), own.is_floating_point())
        sources[name] = key
    if not found:
        raise ValueError(f"{TENSORS}: holds no adapter")
    if missing := [parameter for layer, parameter in experts.items() if layer not in found]:
        raise ValueError(f"{TENSORS}: has no adapter for {missing[0]!r:.200}, which {CONFIG} names")
    ranks, alphas = {}, {}
    for name, parts in found.items():
        wanted = _parts_of(modules.get(name), settings.use_dora)
        if parts.keys() != set(wanted):
            raise ValueError(
                f"{TENSORS}: {name!r:.200} has {', '.join(sorted(parts))}, expected {', '.join(sorted(wanted))}"
                + (EMBEDDING if "lora_embedding_A" in parts.keys() - wanted else "")
            )
        r = ranks[name] = settings.of(settings.rank_pattern, settings.r, written[name])
        alphas[name] = settings.of(settings.alpha_pattern, settings.lora_alpha, written[name])
        if name in experts:
            _check_experts(modules, experts[name], r, file, parts)
            continue
        layer = modules.get(name)
        if layer is None or not (is_linear(layer) or isinstance(layer, nn.Embedding)):
            what = "the model has no such module" if layer is None else f"it is a {type(layer).__name__}"
            raise ValueError(
                f"{TENSORS}: has an adapter for {name!r:.200}, but {what}; expected an nn.Linear"
                + (RENAMED if layer is None else "")
            )
        if isinstance(layer, nn.Embedding):
            k, n = layer.num_embeddings, layer.embedding_dim
        else:
            k, n = features(layer)
        for part, shape in zip(wanted, ([r, k], [n, r], [n]), strict=False):
            _check_shape(file, parts[part], shape)
    return ranks, alphas, sources


def _parts_of(module: nn.Module | None, dora: bool) -> list[str]:
    """The adapter's tensors of such a layer: A, B and perhaps a magnitude."""
    own = "lora_embedding_" if isinstance(module, nn.Embedding) else "lora_"
    return [f"{own}A", f"{own}B", *(["lora_magnitude_vector"] if dora else [])]


def _check_experts(modules: dict[str, nn.Module], parameter: str, r: int, file: Any, parts: dict[str, str]) -> None:
    """Raise where the tensors are no adapter of rank r for the parameter: E r rows of A, and columns of B."""
    owner, _, key = parameter.rpartition(".")
    shapes = shapes_of(modules[owner], key, r)
    if isinstance(shapes, str):
        raise ValueError(f"{TENSORS}: has an adapter for {parameter!r:.200}, but {shapes}")
    for part, shape in zip(("lora_A", "lora_B"), shapes, strict=True):
        _check_shape(file, parts[part], shape)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Each parameter and buffer under all its names."""
    return {
        f"{owner}.{name}".removeprefix("."): tensor
        for owner, module in plain_modules(model, remove_duplicate=False)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def _holds(own: torch.Tensor | None, file: Any, key: str) -> bool:
    """Whether the model has the values that are in the file."""
    if type(own) not in PLAIN or own is None or not has_data(own):
        return False
    if list(own.shape) != list(file.get_slice(key).get_shape()):
        return False
    t = file.get_tensor(key)
    return torch.equal(own.detach().to("cpu", t.dtype), t)


def _check_shape(file: Any, key: str, expected: list[int], floating: bool = True) -> None:
    header = file.get_slice(key)
    shape, dtype = list(header.get_shape()), header.get_dtype()
    if shape != expected:
        resized = shape[1:] == expected[1:] and not VOCABULARY.isdisjoint(key.split("."))
        raise ValueError(f"{TENSORS}: {key} has shape {shape}, expected {expected}" + (RESIZED if resized else ""))
    if (dtype in ("F64", "F32", "F16", "BF16")) != floating:
        raise ValueError(
            f"{TENSORS}: {key} has dtype {dtype}, expected {'a floating' if floating else 'an integer'} one"
        )
