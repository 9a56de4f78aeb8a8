"""torchao's NF4Tensor as a base: the same numbers over the same bytes, in layers of our own."""

import pytest
import torch
from nf4tensors import MAKERS, stand_in
from torch import nn

from lora_fast import DoRALinear, LoRAConfig, LoRALinear, add_lora
from lora_fast.bases.torchao import from_nf4tensor, nf4tensor_again, why_not_taken


def given(make, n=128, k=256, dtype=torch.bfloat16, block=64):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    return make(weight, block)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("block", [32, 64])
def test_same_numbers_over_the_same_bytes(make, dtype, block):
    theirs = given(make, dtype=dtype, block=block)
    ours = from_nf4tensor(theirs)
    dense = theirs.get_original_weight()
    assert torch.equal(ours.dequantise(), dense) and ours.dtype == dense.dtype == dtype
    assert ours.packed.data_ptr() == theirs.quantized_data.data_ptr()
    again = nf4tensor_again(theirs)(ours)
    assert type(again) is type(theirs) and torch.equal(again.get_original_weight(), dense)
    swapped = ours.packed.clone()
    ours.packed.copy_(swapped << 4 | swapped >> 4)  # the other order of nibbles is told apart
    assert not torch.equal(ours.dequantise(), dense)


@pytest.mark.parametrize("make", MAKERS)
def test_layers_over_it(make):
    linear, plain = (nn.Linear(256, 128, bias=False, dtype=torch.bfloat16) for _ in range(2))
    linear.weight = nn.Parameter(given(make), requires_grad=False)
    plain.weight = nn.Parameter(linear.weight.get_original_weight())
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    for kind in LoRALinear, DoRALinear:
        ours, dense = (kind.from_linear(base, r=4) for base in (linear, plain))
        ours.load_state_dict({name: getattr(dense, name) for name in dense.adapter_names}, strict=False)
        assert torch.equal(ours(x), dense(x)) and "4-bit" in str(ours)
    for base_dtype in ("float8_e4m3", "nf4"):
        with pytest.raises(TypeError, match="weight: got one in 4-bit, expected"):
            LoRALinear.from_linear(linear, base_dtype=base_dtype)
    model = add_lora(nn.Sequential(linear), LoRAConfig(r=4, target_modules="all-linear", base_compute="float8_e4m3"))
    assert model[0].weight.BASE == "four_bits_e4m3"


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda w: setattr(w, "block_size", 48), "in blocks of 48"),
        (lambda w: setattr(w, "quantized_data", w.quantized_data[:-16]), "elements, expected"),
        (lambda w: setattr(w, "quantized_data", w.quantized_data.view(torch.int8)), "elements, expected"),
        (lambda w: setattr(w, "nf4", w.nf4[:8]), "elements, expected"),
    ],
)
def test_another_form_is_refused(spoil, says):
    linear = nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)
    linear.weight = nn.Parameter(given(stand_in), requires_grad=False)
    spoil(linear.weight)
    assert says in why_not_taken(linear.weight)
    with pytest.raises(TypeError, match=says):
        LoRALinear.from_linear(linear)
