"""Merging where a wrapper keeps the weights: FSDP2's shards, accelerate's offloading, FSDP1's flat parameters."""

import json

import pytest
import torch
from merged import KIND, OWN, base_layers, made, merge, unmerge, weights
from pairs import two_processes
from peft_nets import inputs
from torch import nn

from lora_fast import LoRAConfig, add_lora, disable_lora, merge_lora, remove_lora, unmerge_lora


@pytest.mark.medium
def test_two_processes(tmp_path):
    """FSDP2: merged weights, the forward after, an exact unmerge, state dicts of merged models; LoRA and DoRA."""
    two_processes("merge_distributed.py", tmp_path)
    for rank in range(2):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen["wrong"] == [] and len(seen["cases"]) >= 6


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", ["peft", "peft dora"])
def test_two_adapters_of_pefts_in_shards(kind, safe, mesh):
    """PEFT's DoRA unmerges and merges again within such a merge."""
    from torch.distributed.fsdp import fully_shard

    def both():
        return made(kind, more=[{"r": 2, "use_dora": kind == "peft dora"}])

    alone, model, x = both(), fully_shard(both(), mesh=mesh), inputs()
    before = [model(x).detach(), weights(both())]
    for layer in (*_layers(alone), *_layers(model)):
        layer.merge(safe, ["default", "more0"])
    assert all(
        torch.allclose(ours.full_tensor(), live) for ours, live in zip(weights(model), weights(alone), strict=True)
    )
    torch.testing.assert_close(model(x), alone(x))
    model.unmerge_adapter()
    assert all(torch.equal(ours.full_tensor(), base) for ours, base in zip(weights(model), before[1], strict=True))
    torch.testing.assert_close(model(x), before[0])


def _layers(model):
    return model.base_model.model.up, model.base_model.model.down


@pytest.fixture
def accelerate():
    return pytest.importorskip("accelerate")


@pytest.mark.parametrize("buffers", [False, True])
@KIND
def test_offloaded_to_the_cpu(accelerate, kind, buffers):
    model, x = made(kind), inputs()
    expected, base = model(x).detach(), weights(model)
    twin = made(kind)
    merge(twin)
    live = weights(twin)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=buffers)
    assert all(layer.weight.is_meta for layer in base_layers(model))

    def held():
        return [layer._hf_hook.weights_map["weight"] for layer in base_layers(model)]

    for _ in range(2):
        merge(model)
        assert all(map(torch.equal, held(), live))
        torch.testing.assert_close(model(x), expected)
        state = accelerate.utils.modeling.get_state_dict_offloaded_model(model)
        assert all(any(torch.equal(t, w) for t in state.values()) for w in live + base)
        unmerge(model)
        assert all(map(torch.equal, held(), base))
        if kind != "peft dora":  # whose forward does not run in stock PEFT so
            torch.testing.assert_close(model(x), expected)
    merge(model)
    with disable_lora(model) if kind in OWN else model.disable_adapter():
        found = model(x)
    with disable_lora(twin) if kind in OWN else twin.disable_adapter():
        torch.testing.assert_close(found, twin(x))


@pytest.mark.parametrize("kind", ["peft", "peft dora"])
def test_an_offloaded_layer_of_pefts_merges_by_itself(accelerate, kind):
    model, x = made(kind), inputs()
    expected, base = model(x).detach(), weights(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    layers = _layers(model)
    for layer in layers:
        layer.merge()
    torch.testing.assert_close(model(x), expected)
    for layer in layers:
        layer.unmerge()
        assert layer.base_layer.weight.is_meta
    assert all(map(torch.equal, [layer.base_layer._hf_hook.weights_map["weight"] for layer in layers], base))


def test_offloaded_to_disk_is_refused(accelerate, tmp_path):
    model, x = made("lora"), inputs()
    expected = model(x).detach()
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="weight: is offloaded to disk"):
        merge_lora(model)
    assert not model.up.merged
    torch.testing.assert_close(model(x), expected)


@KIND
def test_offloaded_with_more_hooks_or_around(accelerate, kind):
    """Where a layer has several hooks, or the module around it brings its weights: merged rightly, or refused."""
    cpu = torch.device("cpu")
    for around in (False, True):
        model, x = made(kind), inputs()
        expected, base = model(x).detach(), weights(model)
        if around:
            accelerate.cpu_offload(model, execution_device=cpu, preload_module_classes=["Net"])
        else:
            for layer in base_layers(model):
                accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
            accelerate.cpu_offload(model, execution_device=cpu)
        try:
            merge(model)
        except ValueError as error:
            assert around or kind not in OWN
            assert "weight: is o" in str(error) and not any(getattr(m, "merged", False) for m in model.modules())
        if around or kind != "peft dora":
            torch.testing.assert_close(model(x), expected)
        held = [layer._hf_hook.hooks[1].weights_map["weight"] for layer in base_layers(model) if not around]
        assert around or kind in OWN or all(map(torch.equal, held, base))


@pytest.mark.parametrize("kind", ["peft", "peft dora"])
def test_a_model_without_data_merges(kind):
    """As in stock PEFT, where nothing will bring data; a layer by itself does not know that."""
    model = made(kind).to("meta")
    model.merge_adapter()
    assert all(layer.merged for layer in _layers(model))
    model.unmerge_adapter()
    layer = _layers(model)[0]
    with pytest.raises(ValueError, match="on the meta device, without data; where accelerate brings it"):
        layer.merge()
    plain = model.merge_and_unload()
    assert type(plain.up) is nn.Linear and all(p.is_meta for p in plain.parameters())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight
        add_lora(self, LoRAConfig(r=2, target_modules=["head"], init_lora_weights=False))

    def forward(self, ids):
        return self.head(self.embed(ids))


@pytest.mark.parametrize("wrapper", ["accelerate", "FSDP2", None])
def test_what_is_tied_does_not_change_with_it(accelerate, wrapper, mesh):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(4)
    expected = model(ids).detach()
    if wrapper == "FSDP2":
        fully_shard(model, mesh=mesh)
    elif wrapper:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if wrapper:
        with pytest.raises(ValueError, match="weight: is (sharded|offloaded) and tied"):
            merge_lora(model)
    else:
        merge_lora(model)
    torch.testing.assert_close(model(ids), expected)
    torch.testing.assert_close(unmerge_lora(model)(ids), expected)


@pytest.mark.parametrize("kind", OWN)
def test_fsdp1(mesh, kind):
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    model, x = made(kind), inputs()
    merged = made(kind)
    merge_lora(merged)
    live, base, y = weights(merged), weights(model), model(x).detach()
    wrapped = FullyShardedDataParallel(
        model, use_orig_params=True, device_id=torch.device("cpu"), sharding_strategy=ShardingStrategy.FULL_SHARD
    )
    summon = FullyShardedDataParallel.summon_full_params
    merge_lora(wrapped)
    with summon(wrapped):
        assert all(map(torch.equal, weights(model), live))
    torch.testing.assert_close(wrapped(x), y)
    unmerge_lora(wrapped)
    with summon(wrapped):
        assert all(map(torch.equal, weights(model), base))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", ["peft", "peft dora"])
def test_fsdp1_and_pefts_layers(mesh, kind, safe):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    model, alone = made(kind), made(kind)
    base = weights(model)
    wrapped = FSDP(model, use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="expected .*: merge and unmerge within FSDP1's summon_full_params"):
        _layers(model)[0].base_layer.weight.data = torch.empty(0)  # as it is in shards
        model.merge_adapter()
    wrapped = FSDP(model := made(kind), use_orig_params=True, device_id=torch.device("cpu"))
    for change in ("merge", "unmerge"):
        for layer in _layers(alone):
            getattr(layer, change)(*[safe] * (change == "merge"))
        with FSDP.summon_full_params(wrapped, writeback=True):
            for layer in _layers(model):
                getattr(layer, change)(*[safe] * (change == "merge"))
        with FSDP.summon_full_params(wrapped):
            assert all(map(torch.equal, weights(model), weights(alone)))
    assert all(map(torch.equal, weights(alone), base))


@pytest.mark.parametrize("wrapper", ["accelerate", "FSDP2"])
def test_layers_that_a_wrapper_keeps_are_not_replaced(accelerate, wrapper, mesh):
    from torch.distributed.fsdp import fully_shard

    from lora_fast import parametrize

    models, x = [made("lora"), parametrize.add_lora(nn.Sequential(nn.Linear(16, 4)))], inputs()
    expected = [model(x).detach() for model in models]
    for model, change, y in zip(models, (remove_lora, parametrize.merge_lora), expected, strict=True):
        if wrapper == "FSDP2":
            fully_shard(model, mesh=mesh)
        else:
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        with pytest.raises(ValueError, match=f"model: .* (keeps|keeping).*{wrapper[:4]}"):
            change(model)
        torch.testing.assert_close(model(x), y)
