"""``lora-fast convert``: an adapter of a Llama-like model from PEFT's naming to torchtune's, or back."""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from lora_fast.cli.arguments import whole_number
from lora_fast.files.adapter import plain_number, read_adapter
from lora_fast.files.format import CONFIG, CONFIG_BYTES, PREFIX, TENSORS, inside, parse, read_config
from lora_fast.files.skeleton import skeleton_of_adapter
from lora_fast.files.torchtune import PT, Heads, reordered, to_peft, to_torchtune
from lora_fast.models.targets import some

EPILOG = """\
examples:
  lora-fast convert peft-adapter tune-adapter --to torchtune --config Llama-3.1-8B/config.json
  lora-fast convert epoch_0/adapter_model.pt peft-adapter --to peft --num-heads 32 --num-kv-heads 8 --alpha 16
  lora-fast convert qwen-adapter tune-adapter --to torchtune --no-permute

PEFT's side is a directory with adapter_config.json and adapter_model.safetensors. torchtune's is a .pt or .safetensors
file, or a directory with adapter_model.pt; it does not say lora_alpha: that is taken from an adapter_config.json
beside it, as torchtune writes it, or from --alpha.
Exit codes: 0 converted, 1 refused or failed (DST is as it was), 2 wrong arguments."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Convert an adapter of a Llama-like model between PEFT's format and torchtune's."
    parser.epilog = EPILOG
    parser.add_argument("src", metavar="SRC", type=Path, help="the adapter: a directory, or torchtune's file")
    parser.add_argument("dst", metavar="DST", type=Path, help="the directory to write")
    parser.add_argument("--to", choices=("peft", "torchtune"), required=True, help="the format of DST")
    parser.add_argument("--force", action="store_true", help="replace an adapter in DST")
    parser.add_argument("--alpha", type=float, help="lora_alpha of torchtune's adapter")
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--config", type=Path, metavar="JSON", help="the model's config.json, for its heads")
    rows.add_argument("--num-heads", type=whole_number, help="attention heads, where q_proj or k_proj has an adapter")
    rows.add_argument("--no-permute", action="store_true", help="keep the rows' order (torchtune's Qwen models)")
    parser.add_argument("--num-kv-heads", type=whole_number, help="heads of k and v, if not --num-heads")
    parser.add_argument("--dim", type=whole_number, help="embedding dimension, to check --num-heads by")


def run(args: argparse.Namespace) -> int:
    """Convert and say what was done. Raises OSError or ValueError, DST then as it was."""
    source = args.src if args.src.is_dir() else args.src.parent
    if args.dst.resolve() == source.resolve():
        raise ValueError(f"DST {args.dst} is where SRC is, expected another directory")
    if not args.dst.resolve().parent.is_dir():
        raise FileNotFoundError(f"{args.dst.resolve().parent}, where DST should be, is no directory")
    if args.alpha is not None and args.to == "torchtune":
        raise ValueError("--alpha: an adapter of PEFT's says its lora_alpha itself")
    if not args.force and any((args.dst / name).exists() for name in (CONFIG, TENSORS, PT)):
        raise ValueError(f"DST {args.dst} has an adapter already (--force replaces it)")
    heads = _heads(args)
    if args.to == "torchtune":
        config, state = _from_peft(args.src)
    else:
        config, state = _from_torchtune(args.src, args.alpha)
    if not args.no_permute:
        state = reordered(state, heads, args.to)
    _write(args.dst, config, state, args.to)
    layers = config["target_modules"]
    kinds = sorted({name.rpartition(".")[2] for name in layers})
    what = f"{len(layers)} {'DoRA' if config['use_dora'] else 'LoRA'} layers ({', '.join(kinds)})"
    print(f"Converted {what} into {args.dst}: r = {config['r']}, lora_alpha = {config['lora_alpha']:g}")
    return 0


def _from_peft(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    settings, ranks, alphas, state = read_adapter(skeleton_of_adapter(folder), folder)
    r, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    if settings.use_rslora:
        raise ValueError(
            f"{CONFIG}: use_rslora: torchtune divides lora_alpha by r alone; with use_rslora false and "
            f"lora_alpha {alpha * r**0.5:g} the adapter is the same"
        )
    if len(set(ranks.values())) > 1 or len(set(alphas.values())) > 1:
        raise ValueError(f"{CONFIG}: layers differ in r or lora_alpha, which torchtune does not know")
    if unknown := [key for key in state if to_torchtune(key) is None]:
        raise ValueError(f"{TENSORS}: torchtune's Llama has no place for {some(unknown)}")
    return _config(r, alpha, settings.lora_dropout, state), state


def _from_torchtune(source: Path, alpha: float | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = source if source.is_dir() else source.parent
    if source.is_dir() and (source / TENSORS).exists() and not (source / PT).exists():
        raise ValueError(f"SRC {source} is PEFT's already: nothing to convert (or --to torchtune?)")
    file = inside(source, PT) if source.is_dir() else source
    named = _tensors(file)
    if any(key.startswith(PREFIX) for key in named):
        raise ValueError(f"SRC {source} has PEFT's names already: nothing to convert (or --to torchtune?)")
    if unknown := [key for key in named if to_peft(key) is None]:
        raise ValueError(f"{file.name}: {some(unknown)}: not of an adapter on torchtune's Llama")
    state = {str(to_peft(key)): tensor for key, tensor in named.items()}
    dropout = 0.0
    if (folder / CONFIG).exists():
        settings = read_config(inside(folder, CONFIG))
        alpha, dropout = settings.lora_alpha if alpha is None else alpha, settings.lora_dropout
    if alpha is None:
        raise ValueError(f"{file.name}: does not say lora_alpha, nor is {CONFIG} beside it; give --alpha")
    ranks = [tensor.shape[0] for key, tensor in state.items() if key.endswith(".lora_A") and tensor.dim()]
    if not ranks:
        raise ValueError(f"{file.name}: holds no adapter")
    return _config(ranks[0], alpha, dropout, state), state


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, which may be hostile: no code in it runs."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zipfile, pickle, struct and safetensors: each has errors of its own
        lines = str(error).splitlines() or [""]
        raise ValueError(f"{path.name}: cannot be read as tensors alone: {lines[0]:.200}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name}: holds a {type(found).__name__}, expected names and tensors")
    for key, t in found.items():
        plain = type(t) in (Tensor, torch.nn.Parameter) and t.layout == torch.strided and t.is_contiguous()
        if not isinstance(key, str) or not plain or not t.is_floating_point():
            raise ValueError(f"{path.name}: {key!r:.200}: expected the name of a dense floating tensor")
    return {key: t.detach().clone() for key, t in found.items()}  # no two share memory


def _config(r: int, alpha: float, dropout: float, state: dict[str, Tensor]) -> dict[str, Any]:
    """adapter_config.json, which torchtune too writes with PEFT's names."""
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": plain_number(alpha),
        "lora_dropout": dropout,
        "use_dora": any(key.endswith(".lora_magnitude_vector") for key in state),
        "bias": "none",
        "target_modules": sorted({key.rpartition(".")[0] for key in state}),  # last parts might end other names, too
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
    }


def _write(folder: Path, config: dict[str, Any], state: dict[str, Tensor], to: str) -> None:
    """Both files beside DST, checked there as load_adapter would, then into their places."""
    from safetensors.torch import save_file

    folder = folder.resolve()
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        text = json.dumps(config, indent=2) + "\n"
        (part / CONFIG).write_text(text, encoding="utf-8")
        names = {key: key if key.endswith("_vector") else f"{key}.weight" for key in state}
        save_file(
            {PREFIX + names[key]: tensor for key, tensor in state.items()},
            part / TENSORS,
            {"format": "pt", "adapter_config": text},
        )
        read_adapter(skeleton_of_adapter(part), part)
        if to == "torchtune":
            (part / TENSORS).unlink()
            torch.save({str(to_torchtune(key)): tensor for key, tensor in state.items()}, part / PT)
        for path in part.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        folder.mkdir(exist_ok=True)
        for name in (TENSORS, PT, CONFIG):
            if (part / name).exists():
                os.replace(part / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)  # of another format: DST holds one adapter
    finally:
        shutil.rmtree(part)


def _heads(args: argparse.Namespace) -> Heads | None:
    if args.config is None:
        if args.num_heads is None:
            return None
        size = None if args.dim is None else args.dim // args.num_heads
        return Heads(args.num_heads, args.num_kv_heads or args.num_heads, size)
    if args.config.stat().st_size > CONFIG_BYTES:
        raise ValueError(f"{args.config}: has more than {CONFIG_BYTES} bytes")
    found = parse(args.config.read_text(encoding="utf-8"), str(args.config))
    q = found.get("num_attention_heads")
    k = found.get("num_key_value_heads") or q
    size, dim = found.get("head_dim"), found.get("hidden_size")
    size = dim // q if size is None and _is_whole(dim) and _is_whole(q) else size
    if not (_is_whole(q) and _is_whole(k) and _is_whole(size)):
        raise ValueError(
            f"{args.config}: expected num_attention_heads, num_key_value_heads and head_dim or "
            "hidden_size, in whole numbers of 1 or more"
        )
    return Heads(q, k, size)


def _is_whole(n: Any) -> TypeGuard[int]:
    return type(n) is int and n > 0
