"""PEFT's adapter format, read with suspicion: ``adapter_config.json`` and the header of ``adapter_model.safetensors``.

Nothing in the files is trusted: which layers an adapter belongs to comes from the tensors' names and must fit the
model, shapes are compared before a tensor is read, and no pattern from a file is ever run as a regex.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fast.files.experts import layer_of, shapes_of, targeted, wrappers_of
from lora_fast.files.hub_names import in_memory
from lora_fast.files.pattern_keys import Pattern, is_name
from lora_fast.files.ways_out import BASE_WEIGHTS, NO_LINEAR, RENAMED, RESIZED, UNSUPPORTED
from lora_fast.wrappers.names import plain_modules, plain_name

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before the names of a model's modules
CONFIG_BYTES = 1 << 20  # more than any config needs
MAX_RANK = 1 << 16
_ADAPTER = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)")
# What input embeddings and output heads are called.
HEADS = {"lm_head", "embed_out"}
VOCABULARY = {"embed_tokens", "embed_in", "wte", "word_embeddings", "tok_embeddings", "shared", *HEADS}
_OWN = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}
# Settings of PEFT's under which the same tensors mean something else, with the values that are harmless.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # the others also change the base weight
    **dict.fromkeys(("lora_bias", "use_qalora"), (False,)),
    **dict.fromkeys(
        (
            "alora_invocation_tokens",
            "arrow_config",
            "kasa_config",
            "layer_replication",
            "megatron_config",
            "monteclora_config",
            "trainable_token_indices",
            "use_bdlora",
            "velora_config",
        ),
        (),
    ),
}


@dataclass
class Settings:
    """What of adapter_config.json matters here, checked."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    use_dora: bool
    bias: str
    rank_pattern: Pattern
    alpha_pattern: Pattern
    modules_to_save: list[str]
    ensure_weight_tying: bool
    target_parameters: list[str]

    def of(self, pattern: Pattern, default: Any, name: str) -> Any:
        """The value for a layer, by the first key that stands for it to PEFT. ValueError if its own comes later."""
        keys = pattern.keys_of(name)
        value = pattern[keys[0]] if keys else default
        if name in keys and pattern[name] != value:
            raise ValueError(
                f"{CONFIG}: the key {keys[0]!r:.200} comes before {name!r:.200} and, a regex to PEFT, stands for that "
                f"layer too, with another value; write it as {re.escape(keys[0])!r:.200}"
            )
        return value


def inside(folder: Path, name: str) -> Path:
    """The file in the folder; a link may lead out of it only to where Hugging Face's cache keeps the files of the same
    repository: from ``REPOSITORY/snapshots/REVISION/...`` to ``REPOSITORY/blobs``."""
    path = (folder / name).resolve(strict=True)
    home = folder.resolve()
    blobs = [place.parent / "blobs" for place in home.parents if place.name == "snapshots"]
    if path.parent not in (home, *blobs):
        raise ValueError(f"{name}: is a link to {path}, outside {folder}")
    if not path.is_file():
        raise ValueError(f"{name}: is no file")
    return path


def read_config(path: Path) -> Settings:
    if path.stat().st_size > CONFIG_BYTES:
        raise ValueError(f"{CONFIG}: has {path.stat().st_size} bytes, expected at most {CONFIG_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{CONFIG}: is no UTF-8 text: {error}") from None
    return settings_of(parse(text, CONFIG))


def parse(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: its config is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: its config is a {type(found).__name__}, expected an object")
    return found


def settings_of(config: dict[str, Any]) -> Settings:
    def get(name: str, default: Any, kind: tuple[type, ...] | type, what: str) -> Any:
        value = config.get(name)
        value = default if value is None else value
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{CONFIG}: {name}: got {value!r:.100}, expected {what}")
        return value

    if config.get("peft_type") != "LORA":
        raise ValueError(f'{CONFIG}: peft_type: got {config.get("peft_type")!r:.100}, expected "LORA"')
    for name, harmless in _PLAIN.items():
        value = config.get(name)
        if value not in (None, [], {}, *harmless):
            raise ValueError(f"{CONFIG}: {name}: got {value!r:.100}, which is not supported{UNSUPPORTED.get(name, '')}")
    patterns = {}
    for name, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        pattern = get(name, {}, dict, "an object")
        for key, value in pattern.items():
            if not is_name(key):
                raise ValueError(
                    f"{CONFIG}: {name}: the key {key!r:.100} is no plain module name; regexes are refused"
                    f" (load the adapter with PEFT, set its config's {name} to the layers' names, each "
                    "through re.escape, with their values, and save it again)"
                )
            if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
                raise ValueError(f"{CONFIG}: {name}[{key!r}]: got {value!r:.100}, expected a finite number")
        patterns[name] = Pattern({plain_name(f"{key}.").removesuffix("."): value for key, value in pattern.items()})
    r = get("r", 8, int, "an integer")
    bounded = [("r", r), *((f"rank_pattern[{key!r}]", value) for key, value in patterns["rank_pattern"].items())]
    for name, value in bounded:
        if not 1 <= value <= MAX_RANK:
            raise ValueError(f"{CONFIG}: {name}: got {value}, expected a rank from 1 to {MAX_RANK}")
    saved = get("modules_to_save", [], list, "a list of module names")
    if not all(isinstance(name, str) for name in saved):
        raise ValueError(f"{CONFIG}: modules_to_save: got {saved!r:.100}, expected a list of module names")
    parameters = get("target_parameters", [], list, "a list of parameter names")
    if not all(isinstance(name, str) for name in parameters):
        raise ValueError(f"{CONFIG}: target_parameters: got {parameters!r:.100}, expected a list of parameter names")
    settings = Settings(
        r,
        get("lora_alpha", 8, (int, float), "a number"),
        get("lora_dropout", 0.0, (int, float), "a number"),
        get("use_rslora", False, bool, "true or false"),
        get("use_dora", False, bool, "true or false"),
        get("bias", "none", str, "a string"),
        patterns["rank_pattern"],
        patterns["alpha_pattern"],
        saved,
        get("ensure_weight_tying", False, bool, "true or false"),
        parameters,
    )
    if not math.isfinite(settings.lora_alpha):
        raise ValueError(f"{CONFIG}: lora_alpha: got {settings.lora_alpha}, expected a finite number")
    if not 0 <= settings.lora_dropout < 1:
        raise ValueError(f"{CONFIG}: lora_dropout: got {settings.lora_dropout}, expected a probability in [0, 1)")
    if settings.bias not in ("none", "all", "lora_only"):
        raise ValueError(f'{CONFIG}: bias: got {settings.bias!r:.100}, expected "none", "all" or "lora_only"')
    return settings


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
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if settings.use_dora else set())
    ranks, alphas = {}, {}
    for name, parts in found.items():
        if parts.keys() != wanted:
            raise ValueError(
                f"{TENSORS}: {name!r:.200} has {', '.join(sorted(parts))}, expected {', '.join(sorted(wanted))}"
            )
        r = ranks[name] = settings.of(settings.rank_pattern, settings.r, written[name])
        alphas[name] = settings.of(settings.alpha_pattern, settings.lora_alpha, written[name])
        if name in experts:
            _check_experts(modules, experts[name], r, file, parts)
            continue
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            what = "the model has no such module" if layer is None else f"it is a {type(layer).__name__}"
            raise ValueError(
                f"{TENSORS}: has an adapter for {name!r:.200}, but {what}; expected an nn.Linear"
                + (RENAMED if layer is None else "")
            )
        n, k = layer.out_features, layer.in_features
        for part, shape in (("lora_A", [r, k]), ("lora_B", [n, r]), ("lora_magnitude_vector", [n])):
            if part in parts:
                _check_shape(file, parts[part], shape)
    return ranks, alphas, sources


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
