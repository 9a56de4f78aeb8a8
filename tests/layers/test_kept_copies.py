"""LoRA's copies of its adapters are kept in evaluation where the user says that the weights do not change."""

import copy

import pytest
import torch
from devices import TRITON
from torch import nn

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from kept import launched, write

from lora_fast import DoRALinear, LoRALinear, patch_peft, set_backend

HALF, BF16 = torch.float16, torch.bfloat16
HERE = [pytest.param("cpu", HALF, marks=pytest.mark.interpreted), pytest.param("cuda", BF16, marks=pytest.mark.gpu)]
COPYING = "_cast_kernel", "_norm_kernel"


def own(device, dtype, kind=LoRALinear):
    """A layer on the fused path, in evaluation mode."""
    set_backend("triton")
    torch.manual_seed(0)
    base = nn.Linear(64, 48, device=device, dtype=dtype)
    return kind.from_linear(base, 5, 10, init_lora_weights=False).eval()


def patched(device, dtype):
    peft = pytest.importorskip("peft")
    base = own(device, dtype).to_linear()
    model = peft.get_peft_model(
        nn.Sequential(base), peft.LoraConfig(r=5, target_modules=["0"], init_lora_weights=False)
    )
    patch_peft(model)
    return model.eval().base_model.model[0]


@torch.no_grad()
def run(layer, x):
    with launched() as kernels:
        y = layer(x)
    return y, [name for name in kernels if name not in COPYING], sum(name in COPYING for name in kernels)


@pytest.mark.parametrize("device, dtype", HERE)
@pytest.mark.parametrize("form", [own, patched])
def test_copies_are_made_once(device, dtype, form):
    layer, plain = form(device, dtype), form(device, dtype)
    adapter = [p for name, p in layer.named_parameters() if "lora_" in name]
    others = [p for name, p in plain.named_parameters() if "lora_" in name]
    layer.keep_in_graphs = True
    x = torch.randn(3, 64, device=device, dtype=dtype)
    changes = {
        "nothing yet": lambda: None,
        "written": lambda: (write(adapter[1]), write(others[1])),
        "mode": layer.eval,
    }
    for name, change in changes.items():
        change()
        for made in (1, 0):
            (y, kernels, copies), (expected, all_kernels, always) = run(layer, x), run(plain, x)
            assert torch.equal(y, expected) and kernels == all_kernels and (copies, always) == (made, 1), name
    assert run(copy.deepcopy(layer), x)[2] == 1
    layer(x).sum().backward()  # with gradients it is dropped
    assert run(layer, x)[2] == 1


@pytest.mark.parametrize("device, dtype", HERE)
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_more_rows_read_them_too(device, dtype, kind):
    """By the launch that makes S with the product, or by two: sums may have another order."""
    layer, plain = own(device, dtype, kind), own(device, dtype, kind)
    layer.keep_in_graphs = True
    x = torch.randn(70, 64, device=device, dtype=dtype)
    for _ in range(2):
        y, kernels, _ = run(layer, x)
        assert "_few_rows_kernel" in kernels
        torch.testing.assert_close(y, run(plain, x)[0], rtol=2e-2, atol=2e-2)


def test_nothing_is_kept_where_nothing_is_copied():
    set_backend("triton")
    layer = LoRALinear.from_linear(nn.Linear(64, 48), 5, 10, init_lora_weights=False).eval()  # float32
    layer.keep_in_graphs = True
    with torch.no_grad():
        layer(torch.randn(3, 64))
    assert vars(layer)["_kept_norm"].found is None
