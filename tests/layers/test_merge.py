"""LoRALinear's merge and unmerge, copies of merged layers, and state dicts."""

import copy
import io
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.prune import l1_unstructured

from lora_fast import LoRALinear

CHANGED = {"r": 3, "lora_alpha": 6, "init_lora_weights": False}


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return LoRALinear(7, 5, **CHANGED)


def bits(tensor):
    return tensor.detach().clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_rounds_once_and_unmerge_restores_every_bit(dtype):
    torch.manual_seed(0)
    layer = LoRALinear(64, 48, **CHANGED, dtype=dtype)
    x = torch.randn(4, 64, dtype=dtype)
    base, unmerged = bits(layer.weight), layer(x)
    layer.merge()
    delta = layer.scaling * (layer.lora_B.float() @ layer.lora_A.float())
    assert layer.merged and torch.equal(layer.weight, (base.float() + delta).to(dtype))
    assert not layer.weight.requires_grad
    ulps = 4 * torch.finfo(dtype).eps * unmerged.abs().max().item()
    torch.testing.assert_close(layer(x), unmerged, rtol=0, atol=ulps)
    merged = layer.weight
    layer.merge()
    assert layer.weight is merged
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged and torch.equal(layer.weight, base) and torch.equal(layer(x), unmerged)


def _through_a_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "to": lambda layer: layer.to("cpu"),
    "to_dtype_and_back": lambda layer: layer.double().float(),
    "save": _through_a_file,
}


@pytest.mark.parametrize("how", COPIES)
def test_unmerge_is_exact_in_copies(layer, how):
    base = bits(layer.weight)
    layer.merge()
    merged = bits(layer.weight)
    other = COPIES[how](layer)
    assert other.merged and torch.equal(other.weight, merged)
    other.unmerge()
    assert torch.equal(other.weight, base) and isinstance(other.weight, nn.Parameter)
    assert not other.weight.requires_grad
    if how in ("deepcopy", "pickle", "save"):
        assert layer.merged and torch.equal(layer.weight, merged)


@pytest.mark.gpu
def test_unmerge_is_exact_after_moving_to_a_gpu(layer):
    base = bits(layer.weight)
    layer.merge()
    layer.cuda().unmerge()
    assert layer.weight.is_cuda and torch.equal(layer.weight.cpu(), base)
    layer(torch.ones(2, 7, device="cuda")).sum().backward()


def test_state_dict_of_a_merged_layer_holds_what_it_computes_with(layer):
    before = {name: bits(t) for name, t in layer.state_dict().items()}
    layer.merge()
    after = layer.state_dict()
    assert torch.equal(after["weight"], layer.weight) and not torch.equal(after["weight"], before["weight"])
    assert torch.equal(after.pop("lora_unmerged_weight"), before["weight"])
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before if n != "weight")
    kept = layer.state_dict(keep_vars=True)
    assert kept["weight"] is layer.weight and kept["lora_unmerged_weight"] is layer.base_weight
    assert after["weight"].requires_grad is False
    layer.unmerge()
    assert list(layer.state_dict()) == list(before) == ["weight", "bias", "lora_A", "lora_B"]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("source_merged", [False, True])
def test_loading(layer, merged, source_merged):
    """A merged layer stays merged, with what it was given."""
    source = LoRALinear(7, 5, **CHANGED)
    x = torch.randn(3, 7)
    expected = source(x)
    if source_merged:
        source.merge()
    if merged:
        layer.merge()
    layer.load_state_dict(source.state_dict())
    assert layer.merged == merged and torch.equal(layer.base_weight, source.base_weight)
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    torch.testing.assert_close(layer(x), expected)


def test_a_failed_load_leaves_the_layer_usable(layer):
    layer.merge()
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(LoRALinear(7, 5, r=4).state_dict())
    assert layer.merged
    layer.unmerge()


def test_layers_that_share_the_base_weight_do_not_change(layer):
    linear = nn.Linear(7, 5)
    first, second = (LoRALinear.from_linear(linear, **CHANGED) for _ in range(2))
    base, x = bits(linear.weight), torch.randn(3, 7)
    unchanged = second(x)
    first.merge()
    assert torch.equal(linear.weight, base) and second.weight is linear.weight
    assert torch.equal(second(x), unchanged)
    second.merge()
    first.unmerge()
    second.unmerge()
    assert first.weight is second.weight is linear.weight and torch.equal(linear.weight, base)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_safe_merge_refuses_what_is_not_finite(layer, value):
    with torch.no_grad():
        layer.lora_B[0, 0] = value
    base = bits(layer.weight)
    with pytest.raises(ValueError, match="^safe_merge: .*NaN or infinite"):
        layer.merge(safe_merge=True)
    assert not layer.merged and torch.equal(layer.weight, base)
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer.weight, base)


@pytest.mark.parametrize("compute", [partial(l1_unstructured, name="weight", amount=0.5), spectral_norm, weight_norm])
def test_a_weight_that_is_computed_in_each_forward_is_left_alone(layer, compute):
    """torch would put it back in the next forward, and find the merged one in its way."""
    compute(layer.eval())
    x = torch.randn(4, 7)
    expected = layer(x)
    for into in (layer.merge, layer.to_linear):
        with pytest.raises(ValueError, match="weight: is computed in each forward .*, expected a parameter"):
            into()
    assert not layer.merged and torch.equal(layer(x), expected)


def test_safe_merge_of_an_overflow():
    layer = LoRALinear(7, 5, **CHANGED, dtype=torch.float16)
    with torch.no_grad():
        layer.lora_B.fill_(1e6)
    with pytest.raises(ValueError, match="^safe_merge"):
        layer.merge(safe_merge=True)
