"""DoRA's magnitude when a state dict comes in parts, or without one."""

import copy
import itertools
import json
import tempfile

import pytest
import torch
from torch import nn

from lora_fast import DoRALinear, LoRAConfig, add_lora, load_lora_state_dict, lora_state_dict
from lora_fast.functional import dora_norm

PARTS = ("weight", "bias", "lora_A", "lora_B", "lora_magnitude_vector")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def norm(layer):
    return dora_norm(layer.base_weight, layer.lora_A, layer.lora_B, layer.scaling).detach()


def trained(parts=PARTS[2:], dtype=torch.float32):
    layer = DoRALinear(7, 5, r=3, dtype=dtype)
    with torch.no_grad():
        for name in parts:
            p = getattr(layer, name)
            p.add_(torch.rand_like(p))
    return layer


def load(layer, state, *names):
    layer.load_state_dict({name: state[name] for name in names}, strict=False)


SOURCES = {
    "trained": PARTS[2:],
    "B alone trained": ("lora_B",),  # its magnitude is the norm of its base, and of one without B
    "fresh": (),
}


@pytest.mark.medium
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("same_base", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_parts_in_any_order(source, same_base, merged):
    """Into a fresh layer, on the same base or on another one."""
    source, x = trained(SOURCES[source]), torch.randn(3, 7)
    state, expected = source.state_dict(), source(x).detach()
    for order in itertools.permutations(PARTS):
        target = DoRALinear(7, 5, r=3)
        if same_base:
            target.load_state_dict({"weight": state["weight"]}, strict=False)
        if merged:
            target.merge()
        for name in order:
            load(target, state, name)
        target.unmerge()
        assert all(torch.equal(t, state[name]) for name, t in target.state_dict().items()), order
        torch.testing.assert_close(target(x), expected, rtol=0, atol=0)


def test_parts_without_a_magnitude_in_any_order():
    """It is the norm of what came, as if all had come at once; one that was trained stays."""
    source = trained(("lora_A", "lora_B"))
    state = source.state_dict()
    for order in itertools.permutations(PARTS[:4]):
        fresh, old = DoRALinear(7, 5, r=3), trained()
        before = old.lora_magnitude_vector.detach().clone()
        for name in order:
            load(fresh, state, name)
            load(old, state, name)
        torch.testing.assert_close(fresh.lora_magnitude_vector.detach(), norm(source), rtol=1e-6, atol=0)
        assert torch.equal(old.lora_magnitude_vector, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_base_takes_a_magnitude_along_that_was_its_norm(dtype):
    """Also after merges, loads in full, a cast; not one that training changed, by an optimiser that leaves no trace."""
    layer, base = DoRALinear(64, 48, r=3, dtype=dtype), nn.Linear(64, 48, dtype=dtype)
    whole = lambda: layer.load_state_dict(copy.deepcopy(layer.state_dict()))  # noqa: E731
    changes = [lambda: None, layer.merge, whole, layer.unmerge, whole, lambda: layer.to(torch.bfloat16)]
    for change in changes:
        change()
        base.reset_parameters()
        layer.load_state_dict(base.state_dict(), strict=False)
        torch.testing.assert_close(layer.lora_magnitude_vector.detach(), norm(layer).to(layer.lora_A.dtype))
    layer, base = DoRALinear(64, 48, r=3), nn.Linear(64, 48)
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B, layer.lora_magnitude_vector], lr=1e-4, fused=True)
    layer(torch.randn(2, 64)).square().sum().backward()
    optimizer.step()
    before = layer.lora_magnitude_vector.detach().clone()
    for _ in range(2):
        base.reset_parameters()
        layer.load_state_dict(base.state_dict(), strict=False)
        assert torch.equal(layer.lora_magnitude_vector, before)


def test_adapters_loaded_before_their_base():
    """By lora_fast's own function or as a part of a state dict."""
    source = nn.Sequential(trained())
    base = {name: t for name, t in source.state_dict().items() if "lora_" not in name}
    for into in (load_lora_state_dict, lambda model, state: model.load_state_dict(state, strict=False)):
        target = add_lora(nn.Sequential(nn.Linear(7, 5)), LoRAConfig(r=3, target_modules=["0"], use_dora=True))
        into(target, lora_state_dict(source))
        target.load_state_dict(base, strict=False)
        x = torch.randn(3, 7)
        torch.testing.assert_close(target(x), source(x), rtol=0, atol=0)


@pytest.mark.medium
@pytest.mark.parametrize("shards", [2, 5])
def test_transformers_sharded_checkpoints(shards, tmp_path):
    """The Trainer's way to resume: shard by shard, in whatever order a set has."""
    trainer_utils = pytest.importorskip("transformers.trainer_utils")
    from safetensors.torch import save_file

    def net():
        model = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5, bias=False))
        return add_lora(model, LoRAConfig(r=3, target_modules=["0", "2"], use_dora=True))

    source, x = net(), torch.randn(3, 7)
    for p in source.parameters():
        if p.requires_grad:
            p.data.add_(torch.rand_like(p))
    state = source.state_dict()
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {key: names[i % shards] for i, key in enumerate(state)}
    for name in names:
        save_file({key: t for key, t in state.items() if where[key] == name}, tmp_path / name, {"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    target = net()
    trainer_utils.load_sharded_checkpoint(target, str(tmp_path), strict=False)
    torch.testing.assert_close(target(x), source(x), rtol=0, atol=0)


def test_a_dict_that_torch_fills_up_is_still_a_part():
    """set_model_state_dict adds what the model has to a whole dict that lacks it."""
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    base = nn.Linear(7, 5)
    for layer in (DoRALinear(7, 5, r=3), DoRALinear(7, 5, r=3, device="meta").to_empty(device="cpu")):
        layer.reset_lora_parameters()
        set_model_state_dict(layer, base.state_dict(), options=options)
        torch.testing.assert_close(layer.lora_magnitude_vector.detach(), norm(layer))
    destroy_process_group()


def test_what_comes_bit_by_bit_into_a_layer_without_data():
    state, x = trained().state_dict(), torch.randn(3, 7)
    layer = DoRALinear(7, 5, r=3, device="meta")
    for name in PARTS[:4]:
        layer.load_state_dict({name: state[name]}, strict=False, assign=True)
    layer.lora_magnitude_vector = nn.Parameter(torch.full((5,), torch.nan))
    assert torch.isfinite(layer(x)).all()
    torch.testing.assert_close(layer.lora_magnitude_vector.detach(), norm(layer))


def test_a_magnitude_made_in_a_forward_would_be_lost_in_shards():
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    model, x = (
        fully_shard(nn.Sequential(DoRALinear(7, 5, r=3, device="meta"))).to_empty(device="cpu"),
        torch.randn(3, 7),
    )
    base = nn.Linear(7, 5)
    for own, theirs in ((model[0].weight, base.weight), (model[0].bias, base.bias)):
        own.to_local().copy_(theirs.detach())
    model[0].reset_lora_parameters()
    with pytest.raises(RuntimeError, match=r"lora_magnitude_vector: is not made yet, .*FSDP; call reset_magnitude\(\)"):
        model(x)
    model[0].reset_magnitude()
    for _ in range(2):
        torch.testing.assert_close(model(x), base(x))
    destroy_process_group()


def in_place(model, state):
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, t in model.state_dict().items():
            t.copy_(state[name])


def by_attribute(model, state):
    for name, t in state.items():
        at, _, last = name.rpartition(".")
        setattr(model.get_submodule(at), last, nn.Parameter(t.clone(), requires_grad="lora_" in name))


def magnitudes_before_the_rest(model, state):
    model.to_empty(device="cpu")
    magnitudes = {name for name in state if "magnitude" in name}
    with torch.no_grad():
        for name in magnitudes:
            model.get_parameter(name).copy_(state[name])
    model.load_state_dict({name: t for name, t in state.items() if name not in magnitudes}, strict=False)


def by_accelerate(model, state):
    accelerate = pytest.importorskip("accelerate")
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        save_file(state, f"{folder}/model.safetensors")
        accelerate.load_checkpoint_and_dispatch(model, f"{folder}/model.safetensors", {"": "cpu"})


def by_dcp(model, state):
    from torch.distributed import checkpoint as dcp

    model.to_empty(device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        dcp.save(state, checkpoint_id=folder)
        dcp.load(model.state_dict(), checkpoint_id=folder)


WAYS = [in_place, by_attribute, magnitudes_before_the_rest, by_accelerate, by_dcp]


@pytest.mark.medium
@pytest.mark.parametrize(
    "way, use",
    [
        *((way, "forward") for way in WAYS),
        *((in_place, use) for use in ("merge", "merged_weight", "compile", "later")),
        *((magnitudes_before_the_rest, use) for use in ("merge", "later")),
    ],
    ids=lambda given: getattr(given, "__name__", given),
)
def test_a_magnitude_that_comes_into_a_model_without_data(way, use):
    """By whatever way, it is the one that counts, not the norm at the first use."""
    source, x = nn.Sequential(trained(), nn.ReLU(), DoRALinear(5, 4, r=3)), torch.randn(3, 7)
    expected = source(x).detach()
    with torch.device("meta"):
        model = nn.Sequential(DoRALinear(7, 5, r=3), nn.ReLU(), DoRALinear(5, 4, r=3))
    way(model, {name: t.clone() for name, t in source.state_dict().items()})
    if use == "merged_weight":
        torch.testing.assert_close(model[0].merged_weight(), source[0].merged_weight(), rtol=0, atol=0)
    elif use == "merge":
        model[0].merge()
        model[0].unmerge()
    elif use == "later":
        model.load_state_dict({"0.bias": source[0].bias}, strict=False)
        model = model.to(torch.float64).to(torch.float32)
    run = torch.compile(model, backend="eager") if use == "compile" else model
    torch.testing.assert_close(run(x), expected)
    torch.testing.assert_close(run(x), expected)


def test_a_magnitude_that_accelerate_keeps_on_disk(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from safetensors.torch import save_file

    source, x = nn.Sequential(trained(), nn.ReLU()), torch.randn(3, 7)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = nn.Sequential(DoRALinear(7, 5, r=3), nn.ReLU())
    devices, kept = {"0": "disk", "1": "cpu"}, str(tmp_path / "kept")
    accelerate.load_checkpoint_and_dispatch(model, str(tmp_path / "model.safetensors"), devices, offload_folder=kept)
    for _ in range(2):
        torch.testing.assert_close(model(x), source(x), rtol=0, atol=0)


def test_parameters_given_to_one_call():
    source, x = trained(), torch.randn(3, 7)
    for _ in range(2):
        y = torch.func.functional_call(DoRALinear(7, 5, r=3, device="meta"), source.state_dict(), x)
        torch.testing.assert_close(y, source(x), rtol=0, atol=0)


def test_a_layer_that_lost_its_data_and_got_no_magnitude():
    layer, base, x = trained(), nn.Linear(7, 5), torch.randn(3, 7)
    layer.to("meta").to_empty(device="cpu")
    layer.reset_lora_parameters()
    layer.load_state_dict(base.state_dict(), strict=False)
    torch.testing.assert_close(layer(x), base(x))
