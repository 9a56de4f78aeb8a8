"""Llama-3-70B on one card: its widths and 80 layers, the linear layers in NF4 (36 GB), LoRA on all of them.

The weights are random, made and quantised layer by layer, so that never more than one layer is there in 16 bits. Beside
it PEFT's layers on bitsandbytes' NF4, where that is installed, stock and under patch_peft. Without a GPU, and with
--small, scaled down.
"""

import argparse
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import four_bits
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import lora_fast

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
LLAMA_3_70B = LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    tie_word_embeddings=False,
    dtype=DTYPE,
)
SMALL = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
R = 16


def materialise(module: nn.Module) -> None:
    """Random weights in the place of none."""
    module.to_empty(device=DEVICE)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else nn.init.ones_(parameter)


def model_of(config: LlamaConfig, adapt: Callable[[nn.Module], object]) -> Any:
    """The model, frozen, each of whose blocks is made, adapted and so quantised before the next is there."""
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
        model.to(DTYPE).requires_grad_(False)
    for block in model.model.layers:
        materialise(block)
        with torch.random.fork_rng():  # the same weights whatever an adapter draws
            adapt(block)
    for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
        materialise(module)
    with DEVICE:
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def ours(config: LlamaConfig, base_compute: str | None) -> Any:
    adapters = lora_fast.LoRAConfig(
        r=R, lora_alpha=2 * R, target_modules="all-linear", base_dtype="nf4", base_compute=base_compute
    )
    return model_of(config, lambda block: lora_fast.add_lora(block, adapters))


def peft_on_bitsandbytes(config: LlamaConfig, patched: bool) -> Any:
    model = model_of(config, lambda block: four_bits.quantise_linears(block, "bitsandbytes"))
    model.is_loaded_in_4bit = True
    names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    adapters = LoraConfig(r=R, lora_alpha=2 * R, target_modules=names, task_type="CAUSAL_LM")
    model = get_peft_model(model, adapters, autocast_adapter_dtype=False)
    if patched:
        lora_fast.patch_peft(model)
    return model


def measure(model: Any, length: int, steps: int) -> tuple[float, float, float]:
    """(seconds a step, peak memory in GiB, the first loss) of steps of one row; the first two are not counted."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)
    own = torch.Generator().manual_seed(0)  # the same tokens for all
    tokens = torch.randint(model.config.vocab_size, (1, length), generator=own).to(DEVICE)
    times, losses = [], []
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps + 2):
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0
    return statistics.median(times[2:]), peak, losses[0]


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", default=not GPU, help="scaled down (always without a GPU)")
    parser.add_argument("--layers", type=int, help="that many, in the place of all")
    parser.add_argument("--length", type=int, help="tokens of the row (default: 4096, scaled down 64)")
    parser.add_argument("--steps", type=int, default=3, help="timed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and adapters (default: %(default)s)")
    args = parser.parse_args(argv)
    config, length = LLAMA_3_70B, args.length or (64 if args.small else 4096)
    changes = (SMALL if args.small else {}) | ({"num_hidden_layers": args.layers} if args.layers else {})
    if changes:
        config = LlamaConfig(**{**config.to_dict(), **changes, "head_dim": None})
        config.head_dim = config.hidden_size // config.num_attention_heads
    kinds: dict[str, Callable[[], Any]] = {
        "lora_fast, nf4": lambda: ours(config, None),
        "lora_fast, nf4, 8-bit products": lambda: ours(config, "float8_e4m3"),
    }
    if importlib.util.find_spec("bitsandbytes"):
        kinds["PEFT on bitsandbytes"] = lambda: peft_on_bitsandbytes(config, False)
        kinds["the same, patched"] = lambda: peft_on_bitsandbytes(config, True)
    where = torch.cuda.get_device_name() if GPU else "cpu"
    print(f"{config.num_hidden_layers} layers of {config.hidden_size}, 1 x {length} tokens, r={R}, on {where}")
    found = {}
    for name, make in kinds.items():
        set_seed(args.seed)
        start = time.perf_counter()
        model = make()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        made = time.perf_counter() - start
        seconds, peak, loss = found[name] = measure(model, length, args.steps)
        memory = f", peak {peak:.1f} GiB" if GPU else ""
        print(
            f"{name:31} {seconds:7.3f} s a step, {length / seconds:8,.0f} tokens/s{memory}, first loss {loss:.4f}; "
            f"{trained:,} parameters train, made in {made:.0f} s",
            flush=True,
        )
        del model
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    main()
