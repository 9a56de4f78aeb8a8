"""Weights as fp8 checkpoints hold them, under FSDP2: each process keeps the bytes of some rows, and their scales."""

from lora_fast.bases.scaled import ScaledFp8E4m3Weight, ScaledFp8Weight
from lora_fast.bases.written import SHARDS
from lora_fast.bases.written_shards import WrittenShard


class ScaledFp8Shard(WrittenShard, ScaledFp8Weight):
    """The bytes of N/P rows, whole blocks of them, with their scales; but for these, col_scale is whole."""

    def gathered(self) -> tuple[str, ...]:
        return tuple(name for name in self.INNER if name != "col_scale")


class ScaledFp8E4m3Shard(ScaledFp8Shard, ScaledFp8E4m3Weight):
    INNER = ScaledFp8E4m3Weight.INNER


SHARDS.update({ScaledFp8Weight: ScaledFp8Shard, ScaledFp8E4m3Weight: ScaledFp8E4m3Shard})
