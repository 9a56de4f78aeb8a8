"""Frozen weights in other forms than a plain tensor: packed.py says what each of them is and does, and a row of
``PACKED`` makes one of them known.

What kernels read of it has a row of its own, in ``lora_fast.kernels.bases``.
"""

from lora_fast.bases.fp8 import Fp8Weight
from lora_fast.bases.packed import PackedWeight

PACKED: dict[str, type[PackedWeight]] = {"float8_e4m3": Fp8Weight}  # by what ``base_dtype`` calls them
