"""Merging under FSDP2 in two processes. tests/wrappers/test_placement.py starts this script twice: ``RANK FOLDER``.

What is wrong with a model goes to ``FOLDER/RANK.json``, by kind, units and step.
"""

import json
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from lora_fast import LoRAConfig, add_lora, disable_lora, merge_lora, patch_peft, unmerge_lora

OWN = ("LoRA", "DoRA")
KINDS = (*OWN, "PEFT's LoRA", "PEFT's DoRA") if find_spec("peft") else OWN
BRIEFLY = ("DoRA", "PEFT's LoRA")  # two of the kinds show most
WHOLE = StateDictOptions(full_state_dict=True)
FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def network(kind: str, model: Any = None, seed: int = 1, base_dtype: str | None = None) -> Any:
    """Of rows that two processes do not share evenly; adapters that are not zero, bases that are the same."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 9, bias=False), nn.LayerNorm(9))
    if kind in OWN:
        add_lora(model, LoRAConfig(r=3, target_modules=["0", "2"], use_dora=kind == "DoRA", base_dtype=base_dtype))
    else:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["0", "2"], use_dora="DoRA" in kind))
        patch_peft(model, base_dtype=base_dtype)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.rand_like(parameter) * 0.3)
    return model


def by_layers(model: nn.Module) -> Any:
    for module in list(model.modules()):
        if hasattr(module, "lora_A"):
            fully_shard(module)
    return fully_shard(model)


def kept(model: nn.Module) -> Any:
    """One unit, which stays gathered after a forward, as every root does."""
    return fully_shard(model)


UNITS: dict[str, Callable] = {"a unit": kept, "by layers": by_layers}


def merge(model: Any) -> None:
    model.merge_adapter() if hasattr(model, "merge_adapter") else merge_lora(model)


def unmerge(model: Any) -> None:
    model.unmerge_adapter() if hasattr(model, "unmerge_adapter") else unmerge_lora(model)


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in get_model_state_dict(model, options=WHOLE).items()}  # type: ignore[union-attr]


def weights(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [t for name, t in state.items() if name.endswith(("0.weight", "2.weight", "base_layer.weight"))]


def near(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(a, b, strict=True))


def steps(kind: str, wrap: Callable, x: torch.Tensor, folder: Path) -> dict[str, bool]:
    alone, model = network(kind), wrap(network(kind))
    y, before = alone(x), alone.state_dict()
    base = {name: t.clone() for name, t in before.items()}
    merge(alone)
    live = [t.clone() for t in weights(alone.state_dict())]
    seen = {"before": near([model(x)], [y])}
    merge(model)  # just after a forward
    state = whole(model)
    seen["merged weights"] = near(weights(state), live) and not near(live, weights(base))
    seen["merged"] = all(near([model(x)], [y]) for _ in range(2))
    seen["dict of a merged model"] = state.keys() == alone.state_dict().keys() and near(weights(whole(model)), live)
    with model.disable_adapter() if hasattr(model, "disable_adapter") else disable_lora(model):
        plain = model(x)
    with alone.disable_adapter() if hasattr(alone, "disable_adapter") else disable_lora(alone):
        seen["disabled"] = near([plain], [alone(x)])
    unmerge(model)
    seen["unmerged"] = near([model(x)], [y])
    found = whole(model)
    seen["exact"] = found.keys() == base.keys() and all(torch.equal(t, base[name]) for name, t in found.items())
    for merged in (False, True):
        for options in (WHOLE, FIRST):
            if kind in BRIEFLY and (options is FIRST or merged):
                continue
            target = wrap(network(kind, seed=3))
            if merged:
                merge(target)
            given = {name: t.clone() for name, t in state.items()}
            first = dist.get_rank() == 0 or not options.broadcast_from_rank0
            set_model_state_dict(target, given if first else {}, options=options)  # type: ignore[arg-type]
            how = f"loaded, {'merged' if merged else 'fresh'}, {'from the first' * options.broadcast_from_rank0}"
            seen[how] = near([target(x)], [y])
            unmerge(target)
            seen[how + ", exact"] = all(torch.equal(t, base[name]) for name, t in whole(target).items())
    if kind not in BRIEFLY:
        seen |= checkpoint(kind, wrap, x, folder, y)
    early = network(kind)
    merge(early)
    early = wrap(early)
    seen["merged before"] = near([early(x)], [y])
    unmerge(early)
    seen["merged before, exact"] = all(torch.equal(t, base[name]) for name, t in whole(early).items())
    return seen


def checkpoint(kind: str, wrap: Callable, x: torch.Tensor, folder: Path, y: torch.Tensor) -> dict[str, bool]:
    """Through torch's distributed checkpoint, in shards, from a merged model into another one."""
    from torch.distributed import checkpoint as dcp

    source, target = wrap(network(kind)), wrap(network(kind, seed=3))
    merge(source)
    merge(target)
    dcp.save(get_model_state_dict(source), checkpoint_id=folder)
    state = get_model_state_dict(target)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(target, state)
    seen = {"checkpoint": near([target(x)], [y])}
    unmerge(target)
    return seen | {"checkpoint, unmerged": near([target(x)], [y])}


def even(kind: str, seed: int = 1) -> Any:
    """Over fp8 bases, which two processes can share."""
    return network(kind, nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 10)), seed, "float8_e4m3")


def loaded(kind: str, x: torch.Tensor) -> bool:
    """What one process merged over fp8 bases, into shards."""
    alone, model = even(kind), kept(even(kind, seed=3))
    y = alone(x)
    merge(alone)
    set_model_state_dict(model, alone.state_dict(), options=WHOLE)
    return near([model(x)], [y])


def refused(kind: str, x: torch.Tensor) -> bool:
    """An fp8 base in shards is, before anything is changed."""
    model = kept(even(kind))
    y = model(x)
    try:
        merge(model)
    except ValueError as error:
        return "merge before fully_shard" in str(error) and torch.equal(model(x), y)
    return False


def base_alone(x: torch.Tensor) -> bool:
    """A base that is loaded into shards takes DoRA's magnitude along, where that was its norm."""
    fresh = lambda: add_lora(nn.Sequential(nn.Linear(8, 7)), LoRAConfig(r=3, target_modules=["0"], use_dora=True))  # noqa: E731
    torch.manual_seed(5)
    base = nn.Sequential(nn.Linear(8, 7))
    model: Any = fully_shard(fresh())
    model.load_state_dict(
        {n: distributed(t, model.state_dict()[n]) for n, t in base.state_dict().items()}, strict=False
    )
    return near([model(x)], [base(x)])


def distributed(t: torch.Tensor, like: Any) -> torch.Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, like.device_mesh, like.placements)


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    seen: dict = {}
    for kind in KINDS:
        for units, wrap in UNITS.items():
            if kind in BRIEFLY and wrap is kept:
                continue
            seen[f"{kind}, {units}"] = steps(kind, wrap, x, folder / f"{kind}, {units}")
        seen[f"{kind}, fp8"] = {"refused": refused(kind, x), "loaded": loaded(kind, x)}
    seen["base"] = {"loaded alone": base_alone(x)}
    wrong = [f"{case}: {step}" for case, steps in seen.items() for step, right in steps.items() if not right]
    (folder / f"{rank}.json").write_text(json.dumps({"wrong": wrong, "cases": list(seen)}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
