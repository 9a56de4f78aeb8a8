"""Frozen weights in other forms than a plain tensor, in 8 bits for instance.

packed.py says what each of them is and does. To add one: a subclass of its ``PackedWeight`` in a file here, and a row
of ``PACKED``; what its products read, as a row of ``BASES`` in kernels/bases.py; and if that is not the inner tensors
as they are, a kernel that writes the weight into memory which the product reads, with the launch as ``unpack_y`` and
``unpack_dx`` of that row.
"""

from typing import TypeGuard

import torch

from lora_fast.bases import four_bit_shards as four_bit_shards
from lora_fast.bases import scaled_shards as scaled_shards
from lora_fast.bases import written
from lora_fast.bases.four_bits import Mxfp4Weight, Nf4Weight
from lora_fast.bases.fp8 import Fp8Weight
from lora_fast.bases.packed import PackedWeight
from lora_fast.bases.scaled import ScaledFp8Weight as ScaledFp8Weight
from lora_fast.bases.stack import PackedStack as PackedStack
from lora_fast.bases.written import WrittenWeight

# By what ``base_dtype`` calls them.
PACKED: dict[str, type[PackedWeight]] = {"float8_e4m3": Fp8Weight, "nf4": Nf4Weight, "mxfp4": Mxfp4Weight}
KINDS = (Fp8Weight, *written.KINDS.values())  # all that there are
LABELS = " or ".join(kind.LABEL for kind in PACKED.values())
COMPUTE = (None, "float8_e4m3")  # what ``base_compute`` may be


def kind_of_base(base_dtype: str, base_compute: str | None) -> type[PackedWeight]:
    """The kind of weight that is kept so and whose products are made so."""
    return PACKED[base_dtype].for_compute(base_compute)


def packed_as(weight: torch.Tensor, kind: type[PackedWeight]) -> PackedWeight:
    """The weight as one of this kind: itself if it is one, the same storage if that is kept alike, else quantised."""
    if is_kept_as(weight, kind):
        return weight if type(weight) is kind else weight.as_kind(kind)
    return weight if isinstance(weight, kind) else kind.quantise(weight)


def is_kept_as(weight: torch.Tensor, kind: type[PackedWeight]) -> TypeGuard[WrittenWeight]:
    """Whether the storage of this kind is the weight's, whatever products it has."""
    if not isinstance(weight, WrittenWeight) or not issubclass(kind, WrittenWeight):
        return False
    return weight.exact() is kind.exact()
