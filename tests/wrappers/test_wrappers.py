"""Wrappers of other tools in a model or around it: no name in a file or a state dict holds their parts."""

import copy
import json
from functools import partial

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

from lora_fast import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    load_adapter,
    load_lora_state_dict,
    lora_state_dict,
    merge_lora,
    merge_peft,
    patch_peft,
    remove_lora,
    save_adapter,
)
from lora_fast.files.format import CONFIG, TENSORS
from lora_fast.wrappers.names import plain_modules, plain_name

eager = partial(torch.compile, backend="eager")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x):
        return torch.tanh(self.fc(x))


class Model(nn.Module):
    """A model with a module that is called as some wrappers call theirs."""

    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 16)

    def forward(self, x):
        x = self.module(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def inner(wrap):
    """The wrapper around one block of two."""

    def wrapped(model):
        model.blocks[1] = wrap(model.blocks[1])
        return model

    return wrapped


def layer(wrap):
    """The wrapper around a single layer."""

    def wrapped(model):
        model.blocks[1].fc = wrap(model.blocks[1].fc)
        return model

    return wrapped


fsdp1 = partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))
WRAPPERS = {
    "compile": eager,
    "DataParallel": DataParallel,
    "DDP": DistributedDataParallel,
    "compiled DDP": lambda model: eager(DistributedDataParallel(model)),
    "AveragedModel": AveragedModel,
    "checkpoint_wrapper": checkpoint_wrapper,
    "FSDP1": fsdp1,
    "compiled block": inner(eager),
    "checkpointed block": inner(checkpoint_wrapper),
    "offloaded block": inner(offload_wrapper),
    "FSDP1 block": inner(fsdp1),
    "compiled, checkpointed block in DDP": lambda m: DistributedDataParallel(
        inner(lambda b: eager(checkpoint_wrapper(b)))(m)
    ),
    "checkpointed layer": layer(checkpoint_wrapper),
    "compiled layer": layer(eager),
}
KINDS = [
    {"target_modules": ["module.0", "fc"]},
    {"target_modules": "all-linear", "use_dora": True, "alpha_pattern": {"blocks.1.fc": 3}, "rank_pattern": {"fc": 2}},
    {"target_modules": ["blocks.1.fc"], "bias": "lora_only", "modules_to_save": ["norm", "head"]},
]
wrappers = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
kinds = pytest.mark.parametrize("kind", KINDS, ids=["lora", "dora", "more"])


@pytest.fixture(autouse=True, scope="module")
def group(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def base():
    torch.manual_seed(0)
    return Model()


def trained(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for _, module in plain_modules(model):
            for parameter in module._parameters.values():
                if parameter is not None and parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def adapted(kind):
    return trained(add_lora(base(), LoRAConfig(r=4, lora_alpha=6, **kind)))


@pytest.mark.medium
@wrappers
@kinds
def test_no_trace_in_a_file(wrap, kind, tmp_path):
    """Saved as without the wrapper, and loaded into a wrapped model."""
    model = adapted(kind)
    save_adapter(model, tmp_path / "plain")
    wrapped = wrap(copy.deepcopy(model))
    save_adapter(wrapped, tmp_path / "wrapped")
    assert (tmp_path / "plain" / CONFIG).read_text() == (tmp_path / "wrapped" / CONFIG).read_text()
    one, two = load_file(tmp_path / "plain" / TENSORS), load_file(tmp_path / "wrapped" / TENSORS)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    found, wanted = lora_state_dict(wrapped), lora_state_dict(model)
    assert list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)
    other = wrap(add_lora(base(), LoRAConfig(r=4, **kind)))
    load_adapter(other, tmp_path / "plain")
    again = lora_state_dict(other)
    assert list(again) == list(wanted) and all(torch.equal(again[name], wanted[name]) for name in wanted)
    scalings = [m.scaling for m in model.modules() if isinstance(m, LoRALinear)]
    assert [m.scaling for m in other.modules() if isinstance(m, LoRALinear)] == scalings


@pytest.mark.medium
@pytest.mark.parametrize(
    "wrap", [w for name, w in WRAPPERS.items() if "FSDP1" not in name and name != "compiled layer"]
)
@kinds
def test_conversion_inside(wrap, kind, tmp_path):
    """A model is converted, and an adapter loaded, after it was wrapped; and converted back."""
    model, x = adapted(kind), torch.randn(3, 16)
    save_adapter(model, tmp_path)
    for parameter in (plain := base()).parameters():
        parameter.requires_grad_(True)
    wrapped = load_adapter(wrap(plain), tmp_path)
    torch.testing.assert_close(wrapped(x), model(x))
    converted = trained(add_lora(wrap(base()), LoRAConfig(r=4, lora_alpha=6, **kind)))
    torch.testing.assert_close(converted(x), model(x))
    remove_lora(converted)
    assert not any(isinstance(m, LoRALinear) for m in converted.modules())


@pytest.mark.parametrize("name", [name for name in WRAPPERS if "FSDP1" not in name])
def test_state_dicts_of_older_versions(name):
    """Their keys held the wrappers' parts."""
    model = WRAPPERS[name](adapted(KINDS[1]))
    state = lora_state_dict(model)
    old = {
        f"{at}.{part}": tensor
        for at, module in model.named_modules()
        for part, tensor in module._parameters.items()
        if part.startswith("lora_")
    }
    wanted = {key: tensor.clone() for key, tensor in state.items()}
    assert len(old) == len(wanted) and old.keys() != wanted.keys()
    old = {key: tensor.detach().clone() for key, tensor in old.items()}
    for tensor in state.values():
        tensor.zero_()
    load_lora_state_dict(model, old)
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in lora_state_dict(model).items())


@pytest.mark.parametrize("part", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
def test_files_that_hold_them(part, tmp_path):
    """As PEFT writes them of a model with a wrapped block."""
    model, x = adapted(KINDS[1]), torch.randn(3, 16)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for name in ("rank_pattern", "alpha_pattern"):
        config[name] = {key.replace("blocks.1.", f"blocks.1.{part}."): value for key, value in config[name].items()}
    tensors = load_file(tmp_path / TENSORS)
    tensors = {key.replace("blocks.1.", f"blocks.1.{part}."): tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / TENSORS, {"format": "pt"})
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert torch.equal(load_adapter(base(), tmp_path)(x), model(x))


@pytest.mark.parametrize("name", [name for name in WRAPPERS if "FSDP1" not in name])
def test_merging_into_a_checkpoint(name, tmp_path):
    """The layer "blocks.1.fc" is merged into "blocks.1.fc.weight"."""
    model = base()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    trained(add_lora(model, LoRAConfig(r=4, target_modules=["module.0", "fc"], base_dtype="float8_e4m3")))
    wanted = merge_lora(copy.deepcopy(model), original=tmp_path)
    wrapped = WRAPPERS[name](model)
    merge_lora(wrapped, original=tmp_path)
    for (_, a), (_, b) in zip(plain_modules(wrapped), plain_modules(wanted), strict=True):
        if isinstance(a, LoRALinear):
            assert torch.equal(a.weight, b.weight)


def test_merging_peft_into_a_checkpoint(tmp_path):
    peft = pytest.importorskip("peft")
    model = base()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["fc"], init_lora_weights=False))
    patch_peft(model, base_dtype="float8_e4m3")
    wanted = merge_peft(copy.deepcopy(model), tmp_path)
    model.base_model.model.blocks[1] = checkpoint_wrapper(model.base_model.model.blocks[1])
    merge_peft(AveragedModel(model), tmp_path)
    x = torch.randn(3, 16)
    assert torch.equal(merge_peft(model, tmp_path)(x), wanted(x))


def test_layers_that_are_compiled_alone(tmp_path):
    """torch.compile's wrapper holds on to the module that it was given: a swap behind its back would do nothing."""
    save_adapter(adapted(KINDS[0]), tmp_path)
    model = layer(eager)(base())
    for change in (
        lambda: add_lora(model, LoRAConfig(target_modules="all-linear")),
        lambda: load_adapter(model, tmp_path),
    ):
        with pytest.raises(ValueError, match="blocks.1.fc, which is compiled by itself"):
            change()
    model = layer(eager)(adapted(KINDS[0]))
    with pytest.raises(ValueError, match="torch.compile was given blocks.1.fc by itself"):
        remove_lora(model)
    with pytest.raises(ValueError, match="cannot be replaced in place"):
        add_lora(eager(nn.Linear(2, 2)), LoRAConfig(target_modules="all-linear"))


def test_the_head_of_a_wrapped_model_is_left_alone():
    model = base()
    model.get_output_embeddings = lambda: model.head
    model.head = checkpoint_wrapper(model.head)
    add_lora(DataParallel(model), LoRAConfig(target_modules="all-linear"))
    assert not any(isinstance(module, LoRALinear) for module in model.head.modules())


def test_names():
    assert plain_name("_orig_mod.a._checkpoint_wrapped_module.module.b") == "a.module.b"
    assert plain_name("a_orig_mod.b") == "a_orig_mod.b"
    model = inner(eager)(base())
    assert [name for name, _ in plain_modules(eager(model))] == [name for name, _ in base().named_modules()]
    model.again = model.blocks[1]
    names = [name for name, _ in plain_modules(model, remove_duplicate=False)]
    assert "blocks.1.fc" in names and "again.fc" in names and len(names) == len(set(names))
