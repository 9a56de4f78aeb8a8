"""LoRAConfig: what a model is to get as adapters, checked when it is made."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_fast.layers.rules import check_base_dtype, check_hyperparameters

SUFFIX = r"(.*\.)?({})$"  # how PEFT reads a key of rank_pattern: it stands for a full name or its last parts

# Fields of PEFT's LoraConfig that say nothing about the layers, or what ours do anyway.
WITHOUT_MEANING = {
    "task_type": "PEFT wraps the model for a task, add_lora leaves it as it is",
    "inference_mode": "an adapter that was added trains; disable_lora and requires_grad say otherwise",
    "base_model_name_or_path": "nothing is loaded by it",
    "revision": "nothing is loaded by it",
    "auto_mapping": "nothing is loaded by it",
    "peft_type": "it is always LoRA",
    "peft_version": "it is PEFT's",
    "ensure_weight_tying": "what is tied trains together anyway",
    "fan_in_fan_out": "each layer's class says how its weight is stored",
}
WAY_OUT = "PEFT has it: get_peft_model(model, LoraConfig(...)), then lora_fast.patch_peft(model)"
# Its other fields.
OF_PEFT = {
    *("alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "kasa_config", "layer_replication"),
    *("layers_pattern", "layers_to_transform", "loftq_config", "lora_bias", "lora_ga_config", "megatron_config"),
    *("megatron_core", "monteclora_config", "qalora_group_size", "runtime_config", "trainable_token_indices"),
    *("use_bdlora", "use_qalora", "velora_config"),
}


@dataclass
class LoRAConfig:
    """What :func:`add_lora` converts and how: the names and meanings of PEFT's ``LoraConfig``.

    Args:
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights: as in :class:`lora_fast.LoRALinear`.
        base_dtype: None, "float8_e4m3", "nf4" or "mxfp4": the frozen weights of the converted layers are kept so (an
            :class:`lora_fast.fp8.Fp8Weight`, or 4 bits; of experts a :class:`lora_fast.bases.PackedStack`), one after
            the other, the original freed; one that is tied to another parameter stays as it is. remove_lora leaves
            them so.
        base_compute: None, or "float8_e4m3": the products over a base of 4 bits are made from 8-bit operands; without a
            base_dtype those over weights that are in 4 bits already, or as an fp8 checkpoint holds them. Experts have
            none.
        base_dtype_exclude: a list or a regex, as exclude_modules: converted layers that keep their weight as it is.
            None: all are quantised ("all-linear" leaves the output head out by itself).
        use_dora: convert to :class:`lora_fast.DoRALinear`, which also trains the lengths of the weight's rows.
        target_modules: a list of full module names or their last parts ("q_proj", "attn.q_proj"), a regex that must
            match the full name, or "all-linear": every ``nn.Linear`` and transformers' ``Conv1D`` but the model's
            ``get_output_embeddings()``, and, as in PEFT, what was one in transformers 4 in the families of Mixtral and
            Qwen: the router's ``gate.weight`` and experts, whose ``gate_up_proj``, once two layers, gets twice r and
            lora_alpha. What else projects and is no ``nn.Linear`` (gpt-oss' experts) gets no adapter by it, and
            add_lora's warning names it. A layer among them that no adapter can stand in for (of an
            ``nn.MultiheadAttention``, say) is an error. An ``nn.Embedding`` that is named becomes a
            :class:`lora_fast.LoRAEmbedding`: without dropout, its weight in no other base_dtype, and with use_dora its
            columns have lengths of their own.
        target_parameters: a list of names of parameters, or of their last parts ("mlp.experts.gate_up_proj"): those of
            transformers' experts, "gate_up_proj" and "down_proj", whose adapters have rank r for each expert, and
            matrices of modules that are no layers of torch's ("mlp.gate.weight", a router's). It stands beside
            ``target_modules``, which may then be None. Not with lora_dropout or use_dora, as in PEFT.
        exclude_modules: a list or a regex, likewise: targets to leave alone.
        rank_pattern, alpha_pattern: {regex of a full name or its last parts: r or lora_alpha}; the first match wins.
        bias: the existing biases that train: "none", "lora_only" (those of the converted layers) or "all".
        modules_to_save: names or last parts of modules that train in full: in place, never converted, and saved with
            the adapter; so does what is tied to them. (PEFT trains a copy, untied without its
            ensure_weight_tying; here disabling or removing LoRA does not bring the original back.)

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    exclude_modules: str | list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init_lora_weights: bool | Literal["gaussian"] = True
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    use_dora: bool = False
    base_dtype: str | None = None
    base_compute: str | None = None
    base_dtype_exclude: str | list[str] | None = None

    def __new__(cls, *args: Any, **given: Any) -> "LoRAConfig":
        """Name fields that are not here: TypeError, with what to do for those that PEFT has."""
        for name in given:
            if name not in cls.__dataclass_fields__:
                raise TypeError(f"{name}: LoRAConfig has no such field{_instead(name)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_hyperparameters(self.r, self.lora_alpha, self.lora_dropout, self.use_rslora, self.init_lora_weights)
        if not isinstance(self.use_dora, bool):
            raise TypeError(f"use_dora: got {self.use_dora!r}, expected True or False")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f'bias: got {self.bias!r}, expected "none", "all" or "lora_only"')
        if self.target_modules or self.target_parameters is None:  # none beside parameters is as good as None
            _check_names("target_modules", self.target_modules)
        if isinstance(self.target_parameters, str):
            raise TypeError(f"target_parameters: got {self.target_parameters!r}, expected a list of parameter names")
        _check_names("target_parameters", self.target_parameters)
        if self.target_parameters is not None:
            for name, given in (("lora_dropout", self.lora_dropout), ("use_dora", self.use_dora)):
                if given:
                    raise ValueError(f"{name}: got {given!r}, expected none with target_parameters")
        _check_names("exclude_modules", self.exclude_modules)
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save: got {self.modules_to_save!r}, expected a list of module names")
        _check_names("modules_to_save", self.modules_to_save)
        check_base_dtype(self.base_dtype, self.base_compute)
        _check_names("base_dtype_exclude", self.base_dtype_exclude)
        if self.base_dtype_exclude is not None and self.base_dtype is None and self.base_compute is None:
            raise ValueError(f"base_dtype_exclude: got {self.base_dtype_exclude!r}, expected None without a base_dtype")
        for argument in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, argument)
            if not isinstance(pattern, dict):
                raise TypeError(f"{argument}: got {pattern!r}, expected a dict of regex to number")
            for key, value in pattern.items():
                _check_regex(argument, key, SUFFIX)
                r, alpha = (value, 1) if argument == "rank_pattern" else (1, value)
                try:
                    check_hyperparameters(r, alpha, 0.0, False, True)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{argument}[{key!r}]: {error}") from None


def _instead(name: str) -> str:
    if name in WITHOUT_MEANING:
        return f", and it needs none: {WITHOUT_MEANING[name]}. Leave it out, or give add_lora PEFT's LoraConfig"
    return f" ({WAY_OUT})" if name in OF_PEFT else ""


def _check_names(argument: str, patterns: Any) -> None:
    if isinstance(patterns, str):
        _check_regex(argument, patterns)
    elif patterns is not None:
        if not isinstance(patterns, (list, tuple, set)) or not all(isinstance(entry, str) for entry in patterns):
            raise TypeError(f"{argument}: got {patterns!r}, expected a list of module names")
        if not patterns or "" in patterns:
            raise ValueError(f"{argument}: got {patterns!r}, expected one module name or more, none of them empty")


def _check_regex(argument: str, pattern: Any, within: str = "{}") -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"{argument}: got {pattern!r}, expected a regex as a string")
    try:
        re.compile(within.format(pattern))
    except re.error as error:
        raise ValueError(f"{argument}: {pattern!r} is not a valid regex: {error}") from None
