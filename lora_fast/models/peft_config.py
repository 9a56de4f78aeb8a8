"""PEFT's ``LoraConfig`` in the place of ours, and the fields of it that ours has not."""

from dataclasses import fields
from typing import Any

from lora_fast.models.config import WAY_OUT, WITHOUT_MEANING, LoRAConfig

# What settings of other features are at rest: read only where another field asks for the feature.
AT_REST = {"megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"}


def is_pefts(config: Any) -> bool:
    """Whether it is a ``LoraConfig`` of PEFT's, which need not be imported for that."""
    return any(
        f"{kind.__module__}.{kind.__name__}" == "peft.tuners.lora.config.LoraConfig" for kind in type(config).__mro__
    )


def from_peft(config: Any) -> LoRAConfig:
    """The LoRAConfig that means what PEFT's ``LoraConfig`` means for ``nn.Linear`` layers and experts.

    Raises:
        ValueError: a field asks for what our own layers have not; TypeError, ValueError: as LoRAConfig.
    """
    own = {field.name for field in fields(LoRAConfig)}
    given = config.to_dict()
    for name, value in given.items():
        if (
            name not in own
            and name not in WITHOUT_MEANING
            and name not in AT_REST
            and value not in (None, False, {}, [])
        ):
            raise ValueError(f"{name}: got {value!r}, which our own layers do not have; {WAY_OUT}")
    taken = {name: value for name, value in given.items() if name in own and value is not None}
    for name, value in taken.items():
        if isinstance(value, set):  # what PEFT makes of a list
            taken[name] = sorted(value)
    if not taken.get("target_parameters"):
        taken.pop("target_parameters", None)
    return LoRAConfig(**taken)
