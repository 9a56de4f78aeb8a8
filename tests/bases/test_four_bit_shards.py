"""4-bit bases of which each process keeps a part."""

import copy
import io
import json
import pickle

import pytest
import torch
from devices import CUDA, GPU, TRITON
from pairs import two_processes
from torch import nn
from torch.distributed.fsdp import fully_shard

from lora_fast import LoRAConfig, add_lora
from lora_fast.bases.four_bit_shards import FourBitShard
from lora_fast.bases.four_bits import KINDS, BlockWeight, Mxfp4Weight, Nf4Weight
from lora_fast.functional import lora_linear


@pytest.mark.parametrize("kind", KINDS.values())
@pytest.mark.parametrize("shape, count", [((32, 48), 2), ((256, 192), 8), ((16, 80), 4)])
def test_parts_act_as_their_rows(kind, shape, count):
    """What is not asked for by FSDP2 gives plain tensors, and so does a product over a shard; also where the blocks
    that share a scale's scale, or a scale, are cut."""
    torch.manual_seed(0)
    weight = kind.quantise(torch.randn(shape))
    dense, parts = weight.dequantise(), weight.chunk(count)
    n = shape[0] // count
    assert all(isinstance(part, FourBitShard) and part.shape == (n, shape[1]) for part in parts)
    assert all(2 * part.packed.numel() == n * shape[1] for part in parts)
    assert torch.equal(torch.cat(parts), dense)
    last = parts[-1]
    x = torch.randn(3, shape[1], requires_grad=True)
    torch.testing.assert_close(nn.functional.linear(x, last), x @ dense[-n:].t())
    assert type(weight.new_zeros(5)) is type(weight.new_zeros(n + 1, shape[1])) is type(weight[:4]) is torch.Tensor
    assert type(weight.view(-1)) is torch.Tensor and type(weight[:]) is kind
    stored = io.BytesIO()
    torch.save(last, stored)
    stored.seek(0)
    for same in (pickle.loads(pickle.dumps(last)), torch.load(stored), copy.deepcopy(last), last.view_as(last)):
        assert type(same) is type(last) and torch.equal(same.dequantise(), dense[-n:])
    moved = last.to(torch.bfloat16)
    assert type(moved) is type(last) and torch.equal(moved.dequantise(), dense[-n:].bfloat16())
    with pytest.raises(TypeError, match="expected the whole weight"):
        lora_linear(x, last, torch.zeros(2, shape[1]), torch.zeros(n, 2), 1.0)
    for other in (parts[0].dequantise(), weight):
        with pytest.raises(RuntimeError, match="load it before fully_shard"):
            last.copy_(other)


@pytest.mark.parametrize("base_dtype, base_compute", [("nf4", None), ("mxfp4", "float8_e4m3"), ("float8_e4m3", None)])
def test_fully_shard_of_one_process(base_dtype, base_compute, mesh):
    """Where there is nothing to gather: the bits of the model that is not sharded, again and again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48, bias=False), nn.Linear(48, 16))
    add_lora(model, LoRAConfig(r=4, base_dtype=base_dtype, base_compute=base_compute, target_modules="all-linear"))
    nn.init.normal_(model[0].lora_B, std=0.1)
    sharded, x = copy.deepcopy(model), torch.randn(8, 32)
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for _ in range(2):
        y, same = model(x), sharded(x)
        assert torch.equal(y, same)
        y.square().mean().backward()
        same.square().mean().backward()
        assert torch.equal(model[0].lora_A.grad, sharded[0].lora_A.grad.full_tensor())


def test_scales_are_kept_whole_where_blocks_are_cut():
    for kind, shape, own in (
        (Nf4Weight, (32, 48), True),
        (Nf4Weight, (16, 20), False),
        (BlockWeight, (16, 20), False),
        (Mxfp4Weight, (16, 20), True),
        (Mxfp4Weight, (8, 4), False),
    ):
        weight = kind.quantise(torch.randn(shape))
        for part in weight.chunk(2):
            assert part.has_own_scales == own
            assert part.absmax.numel() == weight.absmax.numel() // (2 if own else 1)


def test_what_cannot_be_cut():
    said = "expected a number of processes that divides its rows, into parts of an even number of elements"
    with pytest.raises(ValueError, match=rf"weight: got nf4 \[32, 48\] to shard, {said}"):
        Nf4Weight.quantise(torch.randn(32, 48)).chunk(5)
    with pytest.raises(ValueError, match=rf"weight: got nf4 \[64, 3\] to shard, {said}"):
        Nf4Weight.quantise(torch.randn(64, 3)).chunk(64)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_two_processes(device, tmp_path):
    """DDP and FSDP2 give the bits of one process, forward and backward, and their adapters train."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    backends = ["auto"] if device == "cuda" else ["reference", "triton"] if TRITON and not GPU else ["reference"]
    two_processes("four_bits_distributed.py", tmp_path, device, *backends)
    for rank in range(2):
        seen, refusals = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(refusals) == 2 * (device == "cpu") and all("that divides its rows" in text for text in refusals)
        assert list(seen) == backends and all(seen.values())
        assert not any(wrong for modes in seen.values() for wrong in modes.values()), seen
