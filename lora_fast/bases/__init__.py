"""Frozen weights in other forms than a plain tensor, in 8 bits for instance.

packed.py says what each of them is and does. To add one: a subclass of its ``PackedWeight`` in a file here, and a row
of ``PACKED``; what its products read, as a row of ``BASES`` in kernels/bases.py; and if that is not the inner tensors
as they are, a kernel that writes the weight into memory which the product reads, with the launch as ``unpack`` of that
row.
"""

from lora_fast.bases.four_bits import Mxfp4Weight, Nf4Weight
from lora_fast.bases.fp8 import Fp8Weight
from lora_fast.bases.packed import PackedWeight

# By what ``base_dtype`` calls them.
PACKED: dict[str, type[PackedWeight]] = {"float8_e4m3": Fp8Weight, "nf4": Nf4Weight, "mxfp4": Mxfp4Weight}
LABELS = " or ".join(kind.LABEL for kind in PACKED.values())
