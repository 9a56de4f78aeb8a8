"""torchtune's adapters of Llama-like models beside PEFT's: names, and the order of rows.

The tensors are the same but for their names and, in q_proj and k_proj, the order of the output rows: Hugging Face's
rotary embedding turns the halves of a head against each other, torchtune's (Meta's) neighbouring rows. So the rows of
lora_B and of DoRA's magnitude change places; nothing is computed, and there and back again gives the same bits.
"""

import re
from typing import NamedTuple

from torch import Tensor

PT = "adapter_model.pt"
MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
PARTS = {"lora_a.weight": "lora_A", "lora_b.weight": "lora_B", "magnitude": "lora_magnitude_vector"}
_ROWS = re.compile(r"(.*\.self_attn\.([qk])_proj)\.(lora_B|lora_magnitude_vector)")


class Heads(NamedTuple):
    """How the rows of q_proj and k_proj are parted; ``size`` of a head where it is known."""

    q: int
    k: int
    size: int | None = None


def to_peft(key: str) -> str | None:
    """torchtune's name of a tensor to that of lora_state_dict, as PEFT's model has it; None for any other."""
    for ours, theirs in PARTS.items():
        layer = key.removesuffix(f".{ours}")
        if layer == "output" != key:
            return f"lm_head.{theirs}"
        if (found := re.fullmatch(r"layers\.(\d+)\.(.+)", layer)) and layer != key and found[2] in MODULES:
            return f"model.layers.{found[1]}.{MODULES[found[2]]}.{theirs}"
    return None


def to_torchtune(key: str) -> str | None:
    """The reverse of :func:`to_peft`."""
    layer, _, part = key.rpartition(".")
    parts = {theirs: ours for ours, theirs in PARTS.items()}
    modules = {theirs: ours for ours, theirs in MODULES.items()}
    if part not in parts:
        return None
    if layer == "lm_head":
        return f"output.{parts[part]}"
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", layer)
    return f"layers.{found[1]}.{modules[found[2]]}.{parts[part]}" if found and found[2] in modules else None


def reordered(state: dict[str, Tensor], heads: Heads | None, to: str) -> dict[str, Tensor]:
    """The state with the rows of q_proj and k_proj in the other order: in a head of d rows, PEFT's row j + d/2 * i is
    torchtune's row 2 j + i.

    Raises:
        ValueError: rows that do not part into these heads.
    """
    result, sizes = dict(state), set() if heads is None or heads.size is None else {heads.size}
    for key, tensor in state.items():
        if not (found := _ROWS.fullmatch(key)):
            continue
        if heads is None:
            raise ValueError(f"{found[1]}: its rows change places by heads: give --config, --num-heads or --no-permute")
        count = heads.q if found[2] == "q" else heads.k
        size, rest = divmod(len(tensor), count)
        sizes.add(size)
        if rest or size % 2 or len(sizes) > 1:
            raise ValueError(
                f"{found[1]}: has {len(tensor)} rows, which are not {count} heads of an even size that "
                f"all share; are --num-heads, --num-kv-heads and --dim right?"
            )
        parts = (2, size // 2) if to == "torchtune" else (size // 2, 2)
        result[key] = tensor.unflatten(0, (count, *parts)).transpose(1, 2).flatten(0, 2).contiguous()
    return result
