"""Generation by a whole model, greedy: frozen, under stock PEFT, patched; microseconds a new token.

Run from the repository root, on a machine with an NVIDIA GPU: python -m benchmarks.bench_generate
or on any machine, a tiny model on the CPU:  python -m benchmarks.bench_generate --tiny

transformers' ``generate``, without gradients. Random weights in bf16, LoRA at r=16 on all linears of a layer, adapters
in the model's dtype and not zero: Llama-3.2-1B's widths, 8 layers, a prompt of 32 tokens, 128 new ones, for 1 and for
8 texts. Models of one mode and batch run in random order each round; those that are compiled are each in a process of
its own, compiled all at once. Others share one set of base weights.

--mode eager   launch by launch, the cache grows
       static  cache_implementation="static": transformers compiles the forward of a token, in a CUDA graph on a GPU

frozen     the model without adapters; frozen_again is the same once more, to show the noise
peft_lora  stock PEFT; lora_fast_lora  the same model after lora_fast.patch_peft
peft_dora, lora_fast_dora  the same with DoRA

A patched model must never be slower than stock's. With --only impl=... others stay as they are in the file.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import apart, arguments, common, models
from benchmarks.arguments import positive
from benchmarks.bench_lora import FROZEN
from benchmarks.models import SMALL, TINY, Case, R, Size, base_model, model_of, stock_of
from lora_fast import timing

COLUMNS = (
    "gpu torch triton commit dtype layers batch prompt new r what mode impl median_us p20_us p80_us ratio_to_frozen"
).split()
SAME = ("layers", "batch", "mode", "impl")  # of a row that is measured again
IMPLS = (*FROZEN, "peft_lora", "lora_fast_lora", "peft_dora", "lora_fast_dora")
MODES = ("eager", "static")
PROMPT, NEW = 32, 128
BATCHES = (1, 8)


def size_of(batch: int, tiny: bool, new: int) -> Size:
    of = TINY._replace(layers=2) if tiny else SMALL._replace(layers=8)
    return of._replace(batch=batch, length=PROMPT + new)


def build(impls: Sequence[str], size: Size, mode: str, new: int) -> dict[str, Callable[[], Any]]:
    """What generates, by the candidate's name: [batch, prompt + new] ids."""
    base = base_model(size)
    ids = torch.randint(3, size.vocabulary, (size.batch, PROMPT), device=size.device)
    more: dict[str, Any] = {"cache_implementation": "static"} if mode == "static" else {}

    def call_of(impl: str) -> Callable[[], Any]:
        model: Any = model_of(Case(0, impl, 0), base)
        model.disable_input_require_grads()
        model.eval()
        return lambda: model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            use_cache=True,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=0,
            **more,
        )

    return {impl: call_of(impl) for impl in impls}


def checked(name: str, call: Callable[[], Any], size: Size, new: int) -> None:
    """Called twice: compiled, if that is asked for, and warm."""
    call()
    found = call()
    assert found.shape == (size.batch, PROMPT + new), f"{name} generated {tuple(found.shape)}"


def measured(impls: Sequence[str], size: Size, mode: str, rounds: int, new: int) -> dict[str, list[float]]:
    """Times of each candidate."""
    calls = build(impls, size, mode, new)
    for impl, call in calls.items():
        checked(impl, call, size, new)
    return models.measure(calls, rounds, size.device)


def one_apart(impl: str, size: Size, mode: str, new: int) -> apart.Made:
    """A candidate in a process of its own."""
    models.prepare(size.device)
    calls = build([impl], size, mode, new)
    checked(impl, calls[impl], size, new)
    return lambda: models.measure(calls, 1, size.device)[impl][0], None


def rows_of(times: dict[str, list[float]], size: Size, mode: str, new: int, about: common.Row) -> list[common.Row]:
    """A row for each candidate that has times."""
    frozen = timing.summary(times["frozen"])[0] if "frozen" in times else None
    rows = []
    for impl, found in times.items():
        median, p20, p80 = timing.summary(found)
        rows.append(
            {
                **about,
                "dtype": size.dtype,
                "layers": size.layers,
                "batch": size.batch,
                "prompt": PROMPT,
                "new": new,
                "r": R,
                "what": "generate",
                "mode": mode,
                "impl": impl,
                "median_us": round(median / new, 1),
                "p20_us": round(p20 / new, 1),
                "p80_us": round(p80 / new, 1),
                "ratio_to_frozen": "" if frozen is None else round(median / frozen, 4),
            }
        )
    return rows


def summarise(rows: Sequence[common.Row]) -> str:
    """All rows as a table, ours also as parts of stock's time."""
    found = {(row["batch"], row["mode"], row["impl"]): row["median_us"] for row in rows}

    def of_stock(row: common.Row) -> str:
        stock = found.get((row["batch"], row["mode"], stock_of(row["impl"])))
        return f"{row['median_us'] / stock:.3f}" if stock and row["impl"].startswith("lora_fast") else ""

    header = "batch,mode,impl,us a token,times frozen,times stock (must 1)".split(",")
    names = "batch", "mode", "impl", "median_us", "ratio_to_frozen"
    return common.markdown(header, [[*(row[name] for name in names), of_stock(row)] for row in rows])


def main(argv: list[str] | None = None) -> int:
    parser = arguments.parser_of("bench_generate", __doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, in fp32")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES), help="default both")
    parser.add_argument("--batch", nargs="+", type=positive, default=list(BATCHES), help="default 1 and 8")
    parser.add_argument("--new", type=positive, default=NEW, help=f"tokens to generate (default {NEW})")
    parser.add_argument("--rounds", type=positive, default=8)
    arguments.add_only(parser, {"impl": str}, f"it is one of {', '.join(IMPLS)}")
    arguments.add_files(parser, "bench_generate_CARD.csv is")
    args = parser.parse_args(argv)
    impls = [impl for impl in IMPLS if all(impl in values for _, values in args.only)]
    if not impls:
        parser.error("--only leaves nothing to measure")
    if not args.tiny and (reason := common.why_no_gpu()) is not None:
        print(f"{reason} --tiny runs on the CPU.", file=sys.stderr)
        return 1
    device = "cpu" if args.tiny else "cuda"
    models.prepare(device)
    about = common.run_columns(args.commit, device)
    path, rows = args.out / f"bench_generate_{common.card(about['gpu'])}.csv", list[common.Row]()
    for mode in args.mode:
        sizes = {batch: size_of(batch, args.tiny, args.new) for batch in args.batch}
        makes: dict[Any, apart.Make] = {}
        if mode == "static":
            makes = {(n, impl): (one_apart, impl, size, mode, args.new) for n, size in sizes.items() for impl in impls}
        with apart.workers(makes) as workers:
            for batch in common.progress(args.batch, f"bench_generate {mode}"):
                if makes:
                    times, _ = apart.measure({impl: workers[batch, impl] for impl in impls}, args.rounds)
                else:
                    times = measured(impls, sizes[batch], mode, args.rounds, args.new)
                found = rows_of(times, sizes[batch], mode, args.new, about)
                common.write_csv(path, COLUMNS, common.others(path, found, SAME) + found)
                rows += found
    print(f"\n{about['gpu']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}\n")
    print(summarise(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
