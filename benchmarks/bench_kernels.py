"""Each fused kernel against its floor.

Run from the repository root, on a machine with an NVIDIA GPU: python -m benchmarks.bench_kernels

The floor of a pass is the bytes that it must move over the rate at which this card reads (a sum over 512 MiB); that of
the mask bits, which only writes, the same over the copy rate; that of a product is cuBLAS's time for the base product
alone. Floors are measured in the same rounds as the kernels, in random order. Everything runs in CUDA graphs of
several launches, so no host time is in it; the launches take turns among copies of x and dY that together exceed the
cache by far, so nothing is read from there that a training step would not find there.

mask_bits  the dropout mask       dy_pass  dS and dB from dY, with the kernel that adds up the parts
down       S = s drop(x) A^T      d_a      dA = dS^T drop(x), likewise
up_gemm    y = x W^T + S B^T      dx_gemm  dX = dY W + mask * (dS A)
norm       DoRA's n and g from W  dora_pass  dZ, dm, dS and dB from dY and z, likewise

In bf16 at r=16 also what writes W out ahead of a product, whose floor is torch's fill_ of the result:
nf4_whole, nf4_rows, nf4_columns    NF4 in bf16, in e4m3 by rows and by columns
fp8_blocks_whole, _rows, _columns   e4m3 over blocks of 128 x 128, as fp8 checkpoints have it, likewise
"""

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from benchmarks import arguments, common
from lora_fast import timing

COLUMNS = "gpu torch triton commit dtype M K N r p kernel median_us floor_us ratio bound".split()
P = 0.1
READ_BYTES = 2**29


class Case(NamedTuple):
    dtype: str
    M: int
    K: int
    N: int
    r: int


class Kernel(NamedTuple):
    name: str
    p: float
    run: Callable[[int], Any]  # launches it on the inputs' copy of that number
    floor: float | str  # bytes to move, or the name of cuBLAS's product
    bound: float | str  # how many times the floor it may take; "" where nothing was set


def all_cases(shapes: list[tuple[int, int, int]]) -> list[Case]:
    """Every shape at r=16, the first one at the other ranks and dtypes too."""
    cases = [Case("bf16", *shape, 16) for shape in shapes] + [Case("bf16", *shapes[0], r) for r in (64, 256)]
    return cases + [Case(dtype, *shapes[0], 16) for dtype in ("fp16", "fp32")]


class Inputs(NamedTuple):
    x: Tensor  # [copies, M, K]
    dy: Tensor  # [copies, M, N]
    ws: Tensor  # [copies, N, K]
    a: Tensor  # [r, K]
    b: Tensor  # [N, r]
    s: Tensor  # [M, padded r]
    ds: Tensor
    seed: Tensor
    bits: Tensor
    grad_a: Tensor  # float32, as LoRALinear's adapters; written by the kernels
    grad_b: Tensor
    dz: Tensor  # like dy
    columns: Tensor  # [4, N] float32: DoRA's m, g, n and dm


def inputs(case: Case, device: str, copies: int) -> Inputs:
    from lora_fast.kernels import down, mask

    torch.manual_seed(0)
    _, m, k, n, r = case
    kind: dict[str, Any] = {"device": device, "dtype": common.DTYPES[case.dtype]}
    x, dy = torch.randn(copies, m, k, **kind), torch.randn(copies, m, n, **kind)
    ws = torch.randn(copies, n, k, **kind) / k**0.5
    a, b = torch.randn(r, k, **kind) / k**0.5, torch.randn(n, r, **kind)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    s, ds = down.down_fwd(x[0], a, 1.0), down.down_fwd(dy[0], b.t(), 1.0)
    return Inputs(
        x,
        dy,
        ws,
        a,
        b,
        s,
        ds,
        seed,
        mask.mask_bits(seed, P, m, k),
        torch.empty_like(a, dtype=torch.float32),
        torch.empty_like(b, dtype=torch.float32),
        torch.empty_like(dy),
        0.5 + torch.rand(4, n, device=device),
    )


def build(case: Case, t: Inputs) -> tuple[list[Kernel], dict[str, Callable[[int], Tensor]]]:
    """(the kernels, cuBLAS's products by name)."""
    from lora_fast.kernels import down, gemm, mask, norm, passes
    from lora_fast.kernels.sums import Dora

    _, m, k, n, r = case
    x, dy, ws, a, b, s, ds, seed, bits, grad_a, grad_b, dz, (magnitude, gain, norms, grad_m) = t
    w, keep = ws[0], mask.keep_scale(P)

    def dora(i: int) -> Dora[Tensor]:  # another dY stands for z
        return Dora(gain, norms, dy[i - 1], dz[i], grad_m)

    small = m * r * x.itemsize  # bytes of S or dS; an adapter has 2 * r a column or row, its gradient 4 * r
    x_pass = m * k * x.itemsize + small + k * 4 * r  # down: x, A, S; dA: x, dS, dA
    dy_pass = m * n * x.itemsize + 2 * small + n * 6 * r  # dY, S, B, dS, dB
    mask_bytes = m * k / 8
    w_bytes = n * k * x.itemsize + r * (n + k) * x.itemsize
    kernels = [
        Kernel("mask_bits", P, lambda i: mask.mask_bits(seed, P, m, k), mask_bytes, ""),
        Kernel("down", 0, lambda i: down.down_fwd(x[i], a, 1.0), x_pass, 1.3),
        Kernel("down", P, lambda i: down.down_fwd(x[i], a, 1.0, bits, keep), x_pass + mask_bytes, 1.5),
        Kernel("up_gemm", 0, lambda i: gemm.gemm(x[i], w, s, b, transposed=True), "cublas_up", 1.04),
        Kernel("dy_pass", 0, lambda i: passes.dy_bwd(dy[i], s, b, 1.0, grad_b), dy_pass, 1.5),
        Kernel("d_a", 0, lambda i: passes.a_bwd(x[i], ds, grad_a), x_pass, 1.3),
        Kernel("d_a", P, lambda i: passes.a_bwd(x[i], ds, grad_a, bits), x_pass + mask_bytes, 1.5),
        Kernel("dx_gemm", 0, lambda i: gemm.gemm(dy[i], w, ds, a, transposed=False), "cublas_dx", 1.04),
        Kernel("dx_gemm", P, lambda i: gemm.gemm(dy[i], w, ds, a, transposed=False, bits=bits), "cublas_dx", 1.04),
        Kernel("norm", 0, lambda i: norm.norm_fwd(ws[i], a, b, 1.0, magnitude), w_bytes, 1.5),
        Kernel(
            "dora_pass",
            0,
            lambda i: passes.dy_bwd(dy[i], s, b, 1.0, grad_b, None, 1.0, dora(i)),
            dy_pass + 2 * dz[0].nbytes,
            1.5,
        ),
    ]
    return kernels, {"cublas_up": lambda i: x[i] @ w.t(), "cublas_dx": lambda i: dy[i] @ w}


FILLED = 4  # weights in turn
BOUNDS = {"whole": 1.2, "rows": 1.8, "columns": 2.8}


class Held(NamedTuple):
    """The inner tensors of a packed weight, those that it has."""

    t0: Any
    t1: Any
    t2: Any = None
    t3: Any = None
    t4: Any = None
    t5: Any = None
    t6: Any = None
    t7: Any = None


def _fill(out: Any, held: Held, base: str, y: bool) -> list[Any]:
    from lora_fast.kernels.bases import BASES, Wanted

    known = BASES[base]
    n, k = out.shape if y else out.shape[::-1]
    wanted = Wanted(n, k, torch.bfloat16, out)
    tensors = held[: len(known.tensors)]
    return list((known.y(tensors, wanted) if y else known.dx(tensors, wanted)).launches)


def fills(ws: Tensor) -> tuple[list[Kernel], dict[str, Callable[[int], Tensor]]]:
    """(what writes these weights [copies, N, K] out, torch's fill_ of as many bytes by name)."""
    from lora_fast.bases.four_bits import Nf4Weight
    from lora_fast.bases.packed import tensors_of
    from lora_fast.bases.scaled import ScaledFp8Weight
    from lora_fast.kernels.operands import run

    _, n, k = ws.shape
    room = torch.empty(FILLED, 2 * n * k, dtype=torch.uint8, device=ws.device)
    outs = {
        "whole": room.view(torch.bfloat16).view(FILLED, n, k),
        "rows": room[:, : n * k].view(torch.float8_e4m3fn).view(FILLED, n, k),
        "columns": room[:, : n * k].view(torch.float8_e4m3fn).view(FILLED, k, n),
    }
    kernels = []
    for name, kind in ("nf4", Nf4Weight), ("fp8_blocks", ScaledFp8Weight):
        exact = [kind.quantise(w) for w in ws[:FILLED]]
        for what, made in outs.items():
            weights = exact if what == "whole" else [weight.for_e4m3() for weight in exact]
            held = [Held(*cast(Any, tensors_of(weight))(weight)) for weight in weights]

            told = {"base": weights[0].BASE, "y": what != "columns"}

            def write(i: int, made: Tensor = made, held: list[Held] = held, told: dict[str, Any] = told) -> Tensor:
                run(_fill, out=made[i % FILLED], held=held[i % FILLED], **told)
                return made[i % FILLED]

            kernels.append(Kernel(f"{name}_{what}", 0, write, f"fill_{16 if what == 'whole' else 8}", BOUNDS[what]))

    bytes_of_it = room[:, : n * k]  # torch fills no e4m3
    return kernels, {
        "fill_16": lambda i: outs["whole"][i % FILLED].fill_(7),
        "fill_8": lambda i: bytes_of_it[i % FILLED].fill_(7),
    }


def n_copies(case: Case) -> int:
    """So many that the smaller of x and dY has 256 MiB in all, five times the cache of an H100."""
    smaller = case.M * min(case.K, case.N) * common.DTYPES[case.dtype].itemsize
    return max(4, -(-(2**28) // smaller))


@torch.no_grad()
def measured(case: Case, rounds: int, about: common.Row) -> tuple[list[common.Row], dict[str, float]]:
    """(a row for each kernel, this case's read and copy rates in bytes per microsecond)."""
    copies = n_copies(case)
    given = inputs(case, "cuda", copies)
    kernels, products = build(case, given)
    if (case.dtype, case.r) == ("bf16", 16):
        more, written = fills(given.ws)
        kernels, products = kernels + more, products | written
    source = torch.randn(READ_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    launches = {f"{k.name} {k.p}": copies if isinstance(k.floor, str) else max(copies, 16) for k in kernels}
    launches |= dict.fromkeys(products, copies)
    runs = {f"{k.name} {k.p}": k.run for k in kernels} | products

    def several(name: str) -> Callable[[], None]:
        def launch() -> None:
            for i in range(launches[name]):
                runs[name](i % copies)

        return launch

    torch.cuda.synchronize()
    graphs: dict[str, Callable[[], object]] = {name: timing.graphed(several(name)) for name in runs}
    graphs |= {"read": timing.graphed(source.sum), "copy": timing.graphed(lambda: target.copy_(source))}
    times = {name: timing.summary(us)[0] / launches.get(name, 1) for name, us in timing.measure(graphs, rounds).items()}
    rates = {"read": READ_BYTES / times["read"], "copy": 2 * READ_BYTES / times["copy"]}
    rows = []
    for kernel in kernels:
        median = times[f"{kernel.name} {kernel.p}"]
        if isinstance(kernel.floor, str):
            floor = times[kernel.floor]
        else:
            floor = kernel.floor / rates["copy" if kernel.name == "mask_bits" else "read"]
        rows.append(
            {
                **about,
                **case._asdict(),
                "p": kernel.p,
                "kernel": kernel.name,
                "bound": kernel.bound,
                "median_us": round(median, 2),
                "floor_us": round(floor, 2),
                "ratio": round(median / floor, 3),
            }
        )
    return rows, rates


def table(rows: list[common.Row]) -> str:
    """A line for each case: time in microseconds and times the floor of each kernel, in bold where over the bound."""
    names = list(dict.fromkeys((row["kernel"], row["p"], row["bound"]) for row in rows))
    lines: dict[tuple[Any, ...], dict[tuple[Any, ...], str]] = {}
    for row in rows:
        line = lines.setdefault(tuple(row[key] for key in Case._fields), {})
        over = row["bound"] != "" and row["ratio"] > row["bound"]
        ratio = f"**{row['ratio']:.2f}**" if over else f"{row['ratio']:.2f}"
        line[row["kernel"], row["p"]] = f"{row['median_us']:.1f} ({ratio})"
    header = [*Case._fields, *(f"{kernel} p={p}" if p else kernel for kernel, p, _ in names)]
    bounds = ["at most", *[""] * 4, *(bound for *_, bound in names)]
    return common.markdown(
        header, [bounds, *([*case, *(line.get(n[:2], "") for n in names)] for case, line in lines.items())]
    )


def main(argv: list[str] | None = None) -> int:
    parser = arguments.parser_of("bench_kernels", __doc__)
    arguments.add_rounds_of_dtypes(parser)
    parser.add_argument("--quick", action="store_true", help="the first shape alone, in bf16 at r=16")
    arguments.add_files(parser, "bench_kernels_CARD.csv is rewritten")
    args = parser.parse_args(argv)
    reason = common.why_no_gpu()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    about, start = common.run_columns(args.commit), time.monotonic()
    cases = all_cases(common.SHAPES)
    rows: list[common.Row] = []
    rates: list[dict[str, float]] = []
    for case in common.progress(cases[:1] if args.quick else cases, "bench_kernels"):
        new, rate = measured(case, args.rounds if case.dtype == "bf16" else max(3, args.rounds // 3), about)
        rows += new
        rates.append(rate)
        common.write_csv(args.out / f"bench_kernels_{common.card(about['gpu'])}.csv", COLUMNS, rows)
        torch.cuda.empty_cache()
    read, copy = (sum(rate[name] for rate in rates) / len(rates) / 1e6 for name in ("read", "copy"))
    print(
        f"\n{about['gpu']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}: reads "
        f"{read:.2f} TB/s, copies {copy:.2f} TB/s (read and written bytes); {time.monotonic() - start:.0f} s\n\n"
        "Microseconds (times the floor):\n"
    )
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
