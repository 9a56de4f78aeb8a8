"""Whole models that PEFT made, stock and patched, against the frozen model: a step's time and peak memory.

Run from the repository root, on a machine with an NVIDIA GPU: python -m benchmarks.bench_model
or on any machine, a tiny model on the CPU:                    python -m benchmarks.bench_model --tiny
or under torch.compile, where the host decides:                python -m benchmarks.bench_model --compiled

A Llama with the widths of Llama-3-8B and a quarter of its layers (8), and of its vocabulary, so that the head has the
share that it has there. Random weights in bf16, 2 x 4096 tokens, LoRA at r=16 on all seven linears of a layer, adapters
not zero. A step is forward, loss and backward; the embeddings ask for a gradient (enable_input_require_grads), so that
every layer, the frozen model's too, makes its dX. All models share one set of base weights and run in random order each
round, those with gradient checkpointing and those without in rounds of their own.

frozen          the model without adapters; frozen_again is the same once more, to show the noise
peft_lora       stock PEFT, adapters in the model's dtype (autocast_adapter_dtype=False)
lora_fast_lora  the same model after lora_fast.patch_peft
peft_dora       the first of these two with DoRA
lora_fast_dora  the second
lora_fast_lora_x8  lora_fast_lora where the down projections, whose x nothing else keeps, keep it in 8 bits (save_x)
lora_fast_fp8_lora, lora_fast_fp8_dora  ours over an fp8 base (patch_peft with base_dtype)

Our peak memory must not exceed stock's, and be 0.75 of it at most with DoRA and, without checkpointing, with dropout:
there with the 8-bit x, for stock's own without dropout is at 0.77.

--compiled: Llama-3.2-1B's widths, 4 layers, 512 tokens, each model compiled as a whole in the default mode, LoRA and
DoRA without dropout; a step of ours must not take longer than stock's.
"""

import argparse
import copy
import functools
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.bench_lora import FROZEN, only, positive
from lora_fast import patch_peft, set_backend, timing

COLUMNS = (
    "gpu torch triton commit dtype layers tokens r p checkpointing what impl median_us p20_us p80_us "
    "ratio_to_frozen peak_mib"
).split()
IMPLS = (
    *FROZEN,
    "peft_lora",
    "lora_fast_lora",
    "peft_dora",
    "lora_fast_dora",
    "lora_fast_lora_x8",
    "lora_fast_fp8_lora",
    "lora_fast_fp8_dora",
)
KINDS: dict[str, Callable[[str], Any]] = {"p": float, "checkpointing": int, "impl": str}
R = 16
MUST = {
    ("lora_fast_lora", 0): "1.07 / 1.08",
    ("lora_fast_lora", 0.1): "0.03 more than p=0",
    ("lora_fast_dora", 0): "1.12 / 1.15",
    ("lora_fast_dora", 0.1): "1.12 / 1.15",
    ("lora_fast_fp8_lora", 0): "0.80",
}


class Size(NamedTuple):
    """A Llama and the batch that it is given."""

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


LARGE = Size(4096, 14336, 32, 8, 32064, 8, 2, 4096, "bf16", "cuda")
ONE_B = Size(2048, 8192, 32, 8, 32064, 4, 1, 512, "bf16", "cuda")  # for --compiled
TINY = Size(256, 688, 8, 4, 1024, 4, 2, 64, "fp32", "cpu")


class Case(NamedTuple):
    checkpointing: int
    impl: str
    p: float

    def __str__(self) -> str:
        return f"{self.impl} p={self.p}" + " checkpointing" * self.checkpointing


def stock_of(impl: str) -> str:
    """The stock PEFT that a candidate of ours stands beside."""
    return impl.replace("lora_fast_", "peft_").replace("fp8_", "").removesuffix("_x8")


def all_cases() -> list[Case]:
    ps = {impl: common.PS[:1] if impl in FROZEN else common.PS for impl in IMPLS}
    return [Case(checkpointing, impl, p) for checkpointing in (0, 1) for impl in IMPLS for p in ps[impl]]


def base_model(size: Size) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.length,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(size.device):
        model = AutoModelForCausalLM.from_config(config, dtype=common.DTYPES[size.dtype])
    return model.requires_grad_(False)


def model_of(case: Case, base: nn.Module) -> nn.Module:
    """A model of its own on the base's weights. Cases that differ in who computes hold equal adapters."""
    model: Any = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    model.enable_input_require_grads()
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if case.impl not in FROZEN:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        config = LoraConfig(
            r=R,
            lora_alpha=2 * R,
            lora_dropout=case.p,
            target_modules="all-linear",
            use_dora=case.impl.endswith("dora"),
            init_lora_weights=False,
        )
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    if case.impl.startswith("lora_fast"):
        report = patch_peft(model, base_dtype="float8_e4m3" if "fp8" in case.impl else None)
        if report.not_fused and next(model.parameters()).is_cuda:
            raise RuntimeError(f"a candidate of ours is not fused everywhere:\n{report}")
    if case.impl.endswith("_x8"):
        for name, layer in model.named_modules():
            if name.endswith("down_proj"):
                layer.save_x = "fp8"
    return model.train()


def step_of(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    """The loss and its gradients, the last step's dropped."""
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    return step


def build(cases: list[Case], size: Size, compiled: bool = False) -> dict[str, Callable[[], Any]]:
    """Every case's step by its name, all on one base and one batch."""
    base = base_model(size)
    ids = torch.randint(size.vocabulary, (size.batch, size.length), device=size.device)
    models = {str(case): model_of(case, base) for case in cases}
    if compiled:
        models = {name: torch.compile(model) for name, model in models.items()}  # type: ignore[misc]
    return {name: step_of(model, ids) for name, model in models.items()}


def measure(steps: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """timing.measure for steps as long as a model's: in each round, in a new random order, one step to warm up and one
    that is timed; but for transformers, whose forward waits once, at its start, to look for packed sequences, nothing
    waits before the round's end. On the CPU it is CPU time, which other work on the machine disturbs least."""

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
            steps[name]()
            marks.append((name, began, now()))
        if device != "cpu":
            torch.cuda.synchronize()
        for name, began, ended in marks:
            times[name].append((ended - began) * 1e6 if device == "cpu" else began.elapsed_time(ended) * 1000)
    return times


def measured(cases: list[Case], size: Size, rounds: int, about: common.Row, compiled: bool = False) -> list[common.Row]:
    """A row for each case; they share their checkpointing, and frozen is among them."""
    steps = build(cases, size, compiled)
    peaks: dict[str, Any] = dict.fromkeys(steps, "")
    if size.device != "cpu":
        peaks = {name: round(timing.peak_mib(step), 1) for name, step in steps.items()}
    times = measure(steps, rounds, size.device)
    frozen = timing.summary(next(times[str(case)] for case in cases if case.impl == "frozen"))[0]
    rows = []
    for case in cases:
        median, p20, p80 = timing.summary(times[str(case)])
        rows.append(
            {
                **about,
                "dtype": size.dtype,
                "layers": size.layers,
                "tokens": size.batch * size.length,
                "r": R,
                "p": case.p,
                "checkpointing": case.checkpointing,
                "what": "fwd+bwd compiled" if compiled else "fwd+bwd",
                "impl": case.impl,
                "median_us": round(median),
                "p20_us": round(p20),
                "p80_us": round(p80),
                "ratio_to_frozen": round(median / frozen, 4),
                "peak_mib": peaks[str(case)],
            }
        )
    return rows


def summarise(rows: list[common.Row]) -> str:
    """All rows as a table, ours also as parts of stock PEFT's time and peak memory."""
    found = {(row["checkpointing"], row["impl"], row["p"]): row for row in rows}
    table = []
    for (checkpointing, impl, p), row in found.items():
        stock = found.get((checkpointing, stock_of(impl), p), row)
        of_stock = [
            f"{row[column] / stock[column]:.3f}" if row is not stock and row[column] else ""
            for column in ("median_us", "peak_mib")
        ]
        must = "" if row["gpu"] == "cpu" else MUST.get((impl, p), "")
        table.append(
            [
                impl,
                p,
                "yes" if checkpointing else "no",
                f"{row['median_us'] / 1000:.1f}",
                f"{row['ratio_to_frozen']:.3f}",
                must,
                row["peak_mib"],
                *of_stock,
            ]
        )
    return common.markdown(
        [
            "fwd+bwd",
            "p",
            "checkpointing",
            "ms",
            "of frozen",
            "must H200 / H100",
            "peak MiB",
            "time of stock's",
            "peak of stock's",
        ],
        table,
    )


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[Case]]:
    """(arguments, the cases to run)."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.bench_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a tiny model in fp32 on one core of the CPU, where "
        "patched steps may cost at most 1.05 of stock's; the file is bench_model_cpu.csv",
    )
    parser.add_argument(
        "--compiled", action="store_true", help="a small model under torch.compile; the file is bench_compiled_CARD.csv"
    )
    parser.add_argument("--rounds", type=positive, help="default 8; 60 with --tiny or --compiled")
    parser.add_argument(
        "--layers", type=positive, help=f"default {LARGE.layers}; {TINY.layers} with --tiny or --compiled"
    )
    parser.add_argument(
        "--only",
        type=functools.partial(only, kinds=KINDS),
        action="append",
        default=[],
        metavar="KEY=VALUE[,VALUE]",
        help="a part only, for instance --only p=0 --only impl=peft_lora; "
        f"KEY is one of {', '.join(KINDS)}; frozen always runs",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=common.RESULTS,
        metavar="DIR",
        help="where bench_model_CARD.csv is rewritten (default benchmarks/results)",
    )
    parser.add_argument("--commit", help="what to write as the commit where this is not a git checkout")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (60 if args.tiny or args.compiled else 8)
    unknown = {impl for key, values in args.only if key == "impl" for impl in values - set(IMPLS)}
    if unknown:
        parser.error(f"--only impl: got {', '.join(sorted(unknown))}, expected impls among {', '.join(IMPLS)}")

    def wanted(case: Case) -> bool:
        skipped = {"impl", "p"} if case.impl == "frozen" else {"p"} if case.impl in FROZEN else set()
        return all(getattr(case, key) in values for key, values in args.only if key not in skipped)

    cases = [case for case in all_cases() if wanted(case)]
    if args.compiled:
        plain = (*FROZEN, "peft_lora", "lora_fast_lora", "peft_dora", "lora_fast_dora")
        cases = [case for case in cases if case.impl in plain and not (case.p or case.checkpointing)]
    if not cases:
        parser.error("--only leaves nothing to measure")
    return args, cases


def main(argv: list[str] | None = None) -> int:
    args, cases = parse(argv)
    size = TINY if args.tiny else ONE_B if args.compiled else LARGE
    size = size._replace(layers=args.layers or size.layers)
    reason = None if args.tiny else common.why_no_gpu()
    if reason is not None:
        print(f"{reason} --tiny runs on the CPU.", file=sys.stderr)
        return 1
    if args.tiny:
        torch.set_num_threads(1)
    else:
        set_backend("triton")  # never the slow path unawares
    about, start = common.run_columns(args.commit, size.device), time.monotonic()
    rows: list[common.Row] = []
    for on in common.progress(sorted({case.checkpointing for case in cases}), "bench_model, checkpointing off and on"):
        rows += measured([case for case in cases if case.checkpointing == on], size, args.rounds, about, args.compiled)
        name = "bench_compiled" if args.compiled else "bench_model"
        common.write_csv(args.out / f"{name}_{common.card(about['gpu'])}.csv", COLUMNS, rows)
    print(
        f"\n{about['gpu']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}, "
        f"{time.monotonic() - start:.0f} s\n"
    )
    print(summarise(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
