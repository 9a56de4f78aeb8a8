"""A frozen weight in 8 bits: what ``lora_fast.bases.fp8`` holds, by the name that code and files know it by."""

from lora_fast.bases.fp8 import (
    E4M3,
    Fp8Shard,
    Fp8Weight,
    dequantise_rows,
    emulated_product,
    fp8_linear,
    quantise_rows,
    unpickled,
)

__all__ = [
    "E4M3",
    "Fp8Shard",
    "Fp8Weight",
    "dequantise_rows",
    "emulated_product",
    "fp8_linear",
    "quantise_rows",
]

_unpickled = unpickled
