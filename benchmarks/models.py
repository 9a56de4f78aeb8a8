"""The models that the benchmarks of whole models measure, of random weights, and how their steps are timed."""

import copy
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.bench_lora import FROZEN
from lora_fast import LoRAConfig, add_lora, load_lora_state_dict, patch_peft, register_experts, set_backend

PLAIN = (
    *FROZEN,
    "peft_lora",
    "lora_fast_lora",
    "lora_fast_own_lora",
    "peft_dora",
    "lora_fast_dora",
    "lora_fast_own_dora",
)
WHOLE = (
    "lora_fast_layers_lora",
    "lora_fast_layers_dora",
    "lora_fast_lora_x8",
    "lora_fast_fp8_lora",
    "lora_fast_fp8_dora",
    "lora_fast_nf4_lora",
    "lora_fast_nf4_dora",
    "lora_fast_nf4_fp8_lora",
    "lora_fast_nf4_fp8_dora",
)
OF_EXPERTS = (*FROZEN, "lora_fast_frozen", "peft_lora", "lora_fast_lora")
IMPLS = (*PLAIN, *WHOLE, "lora_fast_frozen")
MODES = ("eager", "default", "reduce-overhead")
R = 16


class Size(NamedTuple):
    """A Llama, or with experts a Qwen3-MoE, and the batch that it is given."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    layers: int
    batch: int
    length: int
    dtype: str
    device: str
    tied: bool = False
    experts: int = 0  # of a layer, each of ``intermediate`` columns; a token takes 8


LARGE = Size(4096, 14336, 32, 8, 32064, 8, 2, 4096, "bf16", "cuda")
SMALL = Size(2048, 8192, 32, 8, 32064, 4, 1, 512, "bf16", "cuda")
ONE_B = SMALL._replace(vocabulary=128256, layers=16, tied=True)
EXPERTS = Size(2048, 768, 32, 4, 151936, 4, 1, 4096, "bf16", "cuda", experts=128)
TINY = Size(256, 688, 8, 4, 1024, 4, 2, 64, "fp32", "cpu")
SIZES = {
    "large": [LARGE],
    "8b": [LARGE._replace(batch=1, length=length) for length in (512, 2048)],
    "1b": [ONE_B._replace(batch=batch, length=length) for batch, length in ((1, 512), (2, 1024), (8, 1024))],
    "30b": [EXPERTS],
    "small": [SMALL],
    "tiny": [TINY],
}


class Case(NamedTuple):
    checkpointing: int
    impl: str
    p: float

    def __str__(self) -> str:
        return f"{self.impl} p={self.p}" + " checkpointing" * self.checkpointing


def prepare(device: str) -> None:
    """This process, to measure on such a device."""
    if device == "cpu":
        torch.set_num_threads(1)
    else:
        set_backend("triton")  # never the slow path unawares


def stock_of(impl: str) -> str:
    """The stock PEFT that a candidate of ours stands beside."""
    if "frozen" in impl:
        return "frozen"
    return f"peft_{'dora' if impl.endswith('dora') else 'lora'}" if impl.startswith("lora_fast") else impl


def all_cases(size: str = "large", mode: str = "eager") -> list[Case]:
    """Those of a few layers or tokens, and compiled ones: without checkpointing and what saves memory. LoRA on experts
    has no dropout, in PEFT neither."""
    if any(of.experts for of in SIZES[size]):
        return [Case(0, impl, 0) for impl in OF_EXPERTS]
    whole = size in ("large", "tiny") and mode == "eager"
    return [
        Case(checkpointing, impl, p)
        for checkpointing in ((0, 1) if whole else (0,))
        for impl in PLAIN + (WHOLE if whole else ())
        for p in (common.PS[:1] if impl in FROZEN else common.PS)
    ]


def base_model(size: Size) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

    shared: dict[str, Any] = dict(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.length,
        tie_word_embeddings=size.tied,
        use_cache=False,
    )
    if size.experts:
        shared["head_dim"] = 128  # not hidden / heads
        config: Any = Qwen3MoeConfig(
            **shared,
            moe_intermediate_size=size.intermediate,
            num_experts=size.experts,
            num_experts_per_tok=8,
            norm_topk_prob=True,
        )
    else:
        config = LlamaConfig(**shared, intermediate_size=size.intermediate)
    torch.manual_seed(0)
    with torch.device(size.device):
        model = AutoModelForCausalLM.from_config(config, dtype=common.DTYPES[size.dtype])
    return model.requires_grad_(False)


def has_experts(base: Any) -> bool:
    return hasattr(base.config, "num_experts")


def model_of(case: Case, base: nn.Module) -> nn.Module:
    """A model of its own on the base's weights. Cases that differ in who computes hold equal adapters."""
    model = copy_of(case, base)
    if "_own_" in case.impl:
        return with_own_layers(case, model, base).train()
    return patched(case, with_adapters(case, model)).train()


def copy_of(case: Case, base: nn.Module) -> Any:
    """A model on the base's weights, without adapters as yet."""
    model: Any = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    model.enable_input_require_grads()
    if case.impl == "lora_fast_frozen":
        register_experts()
        model.set_experts_implementation("lora_fast")
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def with_adapters(case: Case, model: Any) -> Any:
    """The model with stock PEFT's adapters in it."""
    if stock_of(case.impl) == "frozen":
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    experts = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")] if has_experts(model) else None
    config = LoraConfig(
        r=R,
        lora_alpha=2 * R,
        lora_dropout=case.p,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"] if experts else "all-linear",
        target_parameters=experts,
        use_dora=case.impl.endswith("dora"),
        init_lora_weights=False,
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def patched(case: Case, model: Any) -> Any:
    """The model, or a part of one that has stock PEFT's adapters, as the candidate runs it."""
    if not case.impl.startswith("lora_fast") or stock_of(case.impl) == "frozen":
        return model
    dtype = "nf4" if "nf4" in case.impl else "float8_e4m3" if "fp8" in case.impl else None
    compute = "float8_e4m3" if "nf4_fp8" in case.impl else None
    blocks = False if "layers" in case.impl or case.impl.endswith("_x8") else "auto"
    report = patch_peft(model, base_dtype=dtype, base_compute=compute, blocks=blocks)
    if report.not_fused and next(model.parameters()).is_cuda:
        raise RuntimeError(f"a candidate of ours is not fused everywhere:\n{report}")
    if case.impl.endswith("_x8"):
        for name, layer in model.named_modules():
            if name.endswith("down_proj"):
                layer.save_x = "fp8"
    return model


def with_own_layers(case: Case, model: nn.Module, base: nn.Module) -> nn.Module:
    """The model with our layers, and stock PEFT's adapters in them."""
    from peft import get_peft_model_state_dict

    stock: Any = model_of(Case(0, stock_of(case.impl), 0), base)
    adapters = {
        name.removeprefix("base_model.model.").removesuffix(".weight"): value
        for name, value in get_peft_model_state_dict(stock).items()
    }
    config = LoRAConfig(R, 2 * R, case.p, target_modules="all-linear", use_dora=case.impl.endswith("dora"))
    add_lora(model, config)
    load_lora_state_dict(model, adapters)
    return model


def step_of(model: Any, ids: Tensor, mode: str = "eager") -> Callable[[], Tensor]:
    """The loss and its gradients, the last step's dropped. The embeddings, which are made to ask for a gradient, are
    looked up ahead of a compiled model: inside it they would break its graph."""
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None  # of the last step, whose memory a graph's next replay overwrites
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        loss: Tensor = model(inputs_embeds=model.get_input_embeddings()(ids), labels=ids).loss
        loss.backward()
        return loss

    return step


def build(cases: Sequence[Case], size: Size, mode: str = "eager") -> dict[str, Callable[[], Tensor]]:
    """Every case's step by its name, all on one base and one batch."""
    base = base_model(size)
    ids = torch.randint(size.vocabulary, (size.batch, size.length), device=size.device)
    models: dict[str, Any] = {str(case): model_of(case, base) for case in cases}
    if mode != "eager":
        torch._dynamo.config.recompile_limit = 8 * len(cases)  # they share their code
        models = {name: torch.compile(model, mode=mode, dynamic=False) for name, model in models.items()}
    return {name: step_of(model, ids, mode) for name, model in models.items()}


def measure(steps: dict[str, Callable[[], Any]], rounds: int, device: str, in_a_row: int = 1) -> dict[str, list[float]]:
    """timing.measure for steps as long as a model's: in each round, in a new random order, one step to warm up and then
    some in a row that are timed, their mean; but for transformers, whose forward waits once, at its start, to look for
    packed sequences, nothing waits before the round's end. On the CPU it is CPU time, which other work on the machine
    disturbs least."""

    def now() -> Any:
        if device == "cpu":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    order, shuffle = list(steps), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        shuffle(order)
        marks = []
        for name in order:
            steps[name]()
            began = now()
            for _ in range(in_a_row):
                steps[name]()
            marks.append((name, began, now()))
        if device != "cpu":
            torch.cuda.synchronize()
        for name, began, ended in marks:
            took = (ended - began) * 1e6 if device == "cpu" else began.elapsed_time(ended) * 1000
            times[name].append(took / in_a_row)
    return times
