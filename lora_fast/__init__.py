"""Fused-kernel LoRA and DoRA layers for PyTorch: drop-in replacements of ``nn.Linear``."""

from lora_fast import interrupted as interrupted  # first: it imports torch

# isort: split
from lora_fast import fp8 as fp8
from lora_fast import functional, parametrize, reference
from lora_fast.batch.form import Adapter
from lora_fast.batch.functional import dora_linear_batch, lora_linear_batch
from lora_fast.blocks.form import Layer
from lora_fast.blocks.functional import lora_glu, lora_group, lora_mlp
from lora_fast.dispatch import SlowPathWarning, get_backend, set_backend
from lora_fast.embedding import lora_embedding
from lora_fast.experts.functional import lora_experts
from lora_fast.experts.registry import register_experts
from lora_fast.files.adapter import load_adapter, save_adapter
from lora_fast.files.export import export_experts
from lora_fast.files.fp8_checkpoint import load_fp8
from lora_fast.files.trainer import checkpoint_adapters_only
from lora_fast.layers.bottleneck import BottleneckAdapter
from lora_fast.layers.dora import DoRALinear
from lora_fast.layers.embedding import LoRAEmbedding
from lora_fast.layers.lora import LoRALinear
from lora_fast.merging import merge_lora, merge_peft, unmerge_lora
from lora_fast.models.adapt import add_lora, remove_lora
from lora_fast.models.adapters import disable_lora, lora_parameters
from lora_fast.models.bottleneck import add_bottleneck, bottleneck_state_dict
from lora_fast.models.config import LoRAConfig
from lora_fast.models.counting import print_trainable_parameters
from lora_fast.models.lora_plus import lora_plus_groups
from lora_fast.models.named import set_adapter, use_adapters
from lora_fast.models.packing import pack_experts
from lora_fast.models.state import load_lora_state_dict, lora_state_dict
from lora_fast.peft import patch_peft, unpatch_peft
from lora_fast.peft.report import PeftReport, peft_report

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "BottleneckAdapter",
    "DoRALinear",
    "LoRAConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "Layer",
    "PeftReport",
    "SlowPathWarning",
    "add_bottleneck",
    "add_lora",
    "bottleneck_state_dict",
    "checkpoint_adapters_only",
    "disable_lora",
    "dora_linear_batch",
    "export_experts",
    "functional",
    "get_backend",
    "load_adapter",
    "load_fp8",
    "load_lora_state_dict",
    "lora_embedding",
    "lora_experts",
    "lora_glu",
    "lora_group",
    "lora_linear_batch",
    "lora_mlp",
    "lora_parameters",
    "lora_plus_groups",
    "lora_state_dict",
    "merge_lora",
    "merge_peft",
    "pack_experts",
    "parametrize",
    "patch_peft",
    "peft_report",
    "print_trainable_parameters",
    "reference",
    "register_experts",
    "remove_lora",
    "save_adapter",
    "set_adapter",
    "set_backend",
    "unmerge_lora",
    "unpatch_peft",
    "use_adapters",
]
