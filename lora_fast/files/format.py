"""PEFT's adapter format, read with suspicion: ``adapter_config.json``. (The tensors' header: header.py.)

Nothing in the files is trusted: which layers an adapter belongs to comes from the tensors' names and must fit the
model, shapes are compared before a tensor is read, and no pattern from a file is ever run as a regex.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_fast.files.pattern_keys import Pattern, is_name
from lora_fast.files.ways_out import UNSUPPORTED
from lora_fast.layers.rules import LEAVE_THE_BASE
from lora_fast.wrappers.names import plain_name

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before the names of a model's modules
CONFIG_BYTES = 1 << 20  # more than any config needs
MAX_RANK = 1 << 16
# Settings of PEFT's under which the same tensors mean something else, with the values that are harmless.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "init_lora_weights": LEAVE_THE_BASE,
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
    fan_in_fan_out: bool  # of a layer that both kinds of weights are in it says nothing: PEFT goes by its class

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
        # PEFT's own keys for adapters that it fused for experts begin with ".*\.", which adds nothing to a last part.
        pattern = {key.removeprefix(".*\\."): value for key, value in get(name, {}, dict, "an object").items()}
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
        get("fan_in_fan_out", False, bool, "true or false"),
    )
    if not math.isfinite(settings.lora_alpha):
        raise ValueError(f"{CONFIG}: lora_alpha: got {settings.lora_alpha}, expected a finite number")
    if not 0 <= settings.lora_dropout < 1:
        raise ValueError(f"{CONFIG}: lora_dropout: got {settings.lora_dropout}, expected a probability in [0, 1)")
    if settings.bias not in ("none", "all", "lora_only"):
        raise ValueError(f'{CONFIG}: bias: got {settings.bias!r:.100}, expected "none", "all" or "lora_only"')
    return settings
