"""Adapters of models whose tensors are elsewhere: in shards of several processes, on the CPU or disk, or nowhere."""

import copy

import pytest
import torch
from pairs import two_processes
from torch import nn

pytest.importorskip("safetensors")
from gather_distributed import stirred

from lora_fast import LoRAConfig, add_lora, load_adapter, load_lora_state_dict, lora_state_dict, save_adapter

KINDS = [{}, {"use_dora": True, "bias": "all", "modules_to_save": ["norm"]}]
kinds = pytest.mark.parametrize("kind", KINDS, ids=["lora", "dora"])


@pytest.mark.medium
def test_sharded(tmp_path):
    """FSDP2, FSDP1 and shards made by hand, all in one run of two processes."""
    two_processes("gather_distributed.py", tmp_path)
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert said == ["", ""], "\n".join(said)


class Model(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.fc = nn.Linear(6, 5)
        self.block = nn.Sequential(nn.Linear(5, 5), nn.ReLU())
        self.norm = nn.LayerNorm(5)


def adapted(kind, seed=1):
    return stirred(add_lora(Model(), LoRAConfig(r=2, target_modules=["fc", "block.0"], **kind)), seed)


def on_disk(model, tmp_path):
    return pytest.importorskip("accelerate").disk_offload(model, tmp_path / "disk", torch.device("cpu"))


def on_cpu(model, tmp_path):
    return pytest.importorskip("accelerate").cpu_offload(model, torch.device("cpu"))


def by_blocks(model, tmp_path):
    """The block's hook brings in all that is in it."""
    return pytest.importorskip("accelerate").cpu_offload(model, "cpu", preload_module_classes=["Sequential", "Model"])


def in_part(model, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    places = {"fc": "cpu", "block": "disk", "norm": "cpu"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "part", force_hooks=True)


def same(found, wanted):
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("offload", [on_cpu, by_blocks, on_disk, in_part])
@kinds
def test_offloaded_models_are_saved(kind, offload, tmp_path):
    model, x = adapted(kind), torch.randn(4, 6)
    wanted, y = lora_state_dict(copy.deepcopy(model)), model(x)
    offloaded = offload(model, tmp_path)
    for _ in range(2):
        save_adapter(offloaded, tmp_path / "adapter")
        assert torch.equal(load_adapter(Model(), tmp_path / "adapter")(x), y)
        same(lora_state_dict(offloaded), wanted)
        assert torch.equal(offloaded(x), y)  # and then offloaded again
    other = adapted(kind, seed=2)
    load_lora_state_dict(other, lora_state_dict(offloaded))
    same(lora_state_dict(other), wanted)


@pytest.mark.parametrize("offload", [on_cpu, by_blocks])
@kinds
def test_offloaded_models_take_an_adapter(kind, offload, tmp_path):
    """Where accelerate keeps it, to be there in the next forward."""
    source, x = adapted(kind), torch.randn(4, 6)
    save_adapter(source, tmp_path)
    for load in (lambda m: load_adapter(m, tmp_path), lambda m: load_lora_state_dict(m, lora_state_dict(source))):
        model = offload(adapted(kind, seed=2), tmp_path)
        before = model(x)
        load(model)
        assert torch.equal(model(x), source(x)) and not torch.equal(model(x), before)
        same(lora_state_dict(model), lora_state_dict(source))


@pytest.mark.parametrize("offload", [on_disk, in_part])
@kinds
def test_what_is_on_disk_is_not_changed(kind, offload, tmp_path):
    source, model = adapted(kind), offload(adapted(kind, seed=2), tmp_path)
    save_adapter(source, tmp_path / "adapter")
    before = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    for load in (load_adapter, lambda m, _: load_lora_state_dict(m, lora_state_dict(source))):
        with pytest.raises(ValueError, match=r"block.0.lora_A.* offloaded to disk.*load the adapter first"):
            load(model, tmp_path / "adapter")
    same(lora_state_dict(model), before)


def test_models_that_are_offloaded_too_early(tmp_path):
    save_adapter(adapted({}), tmp_path)
    model = on_cpu(Model(), tmp_path)
    with pytest.raises(ValueError, match="fc, which is dispatched by accelerate: add or load the adapter first"):
        load_adapter(model, tmp_path)
    assert type(model.fc) is nn.Linear


@kinds
def test_models_without_data(kind, tmp_path):
    """Saving nothing and loading into nothing are errors."""
    source, x = adapted(kind), torch.randn(4, 6)
    save_adapter(source, tmp_path / "a")
    with torch.device("meta"):
        model = Model()
    for start in ("plain", "converted"):
        if start == "converted":
            add_lora(model, LoRAConfig(r=2, target_modules=["fc", "block.0"], **kind))
            with pytest.raises(ValueError, match="fc.lora_A.* on the meta device, without data to save"):
                save_adapter(model, tmp_path / "b")
            with pytest.raises(ValueError, match="fc.lora_A.* on the meta device.*to_empty and load_state_dict"):
                load_lora_state_dict(model, lora_state_dict(source))
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match="fc.lora_A.* on the meta device.*to_empty and load_state_dict"):
            load_adapter(model, tmp_path / "a")
        assert kinds == [type(module) for module in model.modules()] and not (tmp_path / "b").exists()
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(load_adapter(model, tmp_path / "a")(x), source(x))


def test_a_dora_magnitude_that_comes_before_the_first_forward():
    """The layer was on the meta device, so that it put its own magnitude off."""
    source, x = adapted(KINDS[1]), torch.randn(4, 6)
    with torch.device("meta"):
        model = add_lora(Model(), LoRAConfig(r=2, target_modules=["fc", "block.0"], **KINDS[1]))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for own, other in zip(model.parameters(), source.parameters(), strict=True):
            own.copy_(other)
    load_lora_state_dict(model, lora_state_dict(source))
    assert torch.equal(model(x), source(x))


def test_shards_that_nothing_here_can_gather(tmp_path):
    """DeepSpeed leaves empty parameters behind, FSDP1's inner modules pieces in one dimension."""
    model, state = adapted({}), lora_state_dict(adapted({}))
    model.fc.lora_B.data = torch.empty(0)
    for call in (lora_state_dict, lambda m: save_adapter(m, tmp_path / "a"), lambda m: load_lora_state_dict(m, state)):
        with pytest.raises(ValueError, match=r"fc: lora_B has shape \(0,\), expected \(5, 2\): something shards it"):
            call(model)
    assert not (tmp_path / "a").exists()
