"""The kernels whose tiles tools/search_tiles.py looks for: how each is run, what is right, which tiles are tried."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_fast.kernels import decode as decoding
from lora_fast.kernels import down, few_rows, gemm, pair, tiles
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.common import padded_rank
from lora_fast.kernels.operands import Scratch, program
from lora_fast.kernels.program import Launch, Program
from lora_fast.kernels.tiles import Tile, rank_block

# The fields of a tile that each kernel reads.
FIELDS = {
    "product": "m n k warps stages fill",
    "product_with_s": "m n k warps stages",
    "down": "m k r ways warps stages",
    "pair": "m n warps stages",
    "decode": "m n k r warps stages fill ahead",
}
WAYS = {
    "product": ("fwd", "dx", "masked"),
    "product_with_s": ("fwd", "dx", "masked"),
    "down": ("s", "masked", "ds"),
    "pair": ("plain", "masked"),
    "decode": ("y",),
}
TOLERANCE = 0.02  # of the largest element; 16 bits round by a tenth of that


class Shape(NamedTuple):
    m: int
    k: int
    n: int


def candidates(kernel: str, shape: Shape, r: int, chip: Chip) -> list[Tile | None]:
    """All that is tried: what fits shared memory by its stages alone, and registers by its sums."""
    made: Iterable[dict[str, Any]]
    if kernel.startswith("product"):
        fills = (1.0, 2.0) if kernel == "product" else (1.0,)
        made = grid(m=(64, 128), n=(64, 128, 256), k=(64, 128), warps=(4, 8), stages=(3, 4, 5, 6), fill=fills)
    elif kernel == "down":
        ranks = rank_block(r, 128)
        several = sorted({ranks, min(ranks, 32), min(ranks, 64)})  # or programs for some of the ranks each
        whole = grid(m=(16, 32, 64, 128), k=(64, 128, 256), r=(ranks,), warps=(2, 4, 8), stages=(2, 3, 4))
        side = grid(m=(16, 32), k=(64, 128, 256), r=several, ways=(4,), warps=(4,), stages=(2, 3, 4))
        made = itertools.chain(whole, side)
    elif kernel == "pair":
        made = grid(m=(64, 128, 256, 512), n=(32, 64, 128), warps=(4, 8), stages=(2, 3, 4, 5))
    else:
        rows = (rank_block(shape.m, 128),)
        some = grid(m=rows, n=(64, 128), k=(64, 128, 256), r=(64,), warps=(4, 8), stages=(3, 4, 5, 6), fill=(0.5, 1.0))
        made = (each | {"ahead": columns // each["k"]} for each in some for columns in (0, 512))
    found: list[Tile | None] = [tile for tile in (Tile(**each) for each in made) if fits(kernel, tile, r, chip)]
    return [*found, None] if kernel == "product_with_s" else found


def grid(**values: Sequence[Any]) -> Iterator[dict[str, Any]]:
    for each in itertools.product(*values.values()):
        yield dict(zip(values, each, strict=True))


def fits(kernel: str, tile: Tile, r: int, chip: Chip) -> bool:
    """Whether a program's stages fit shared memory (a processor's, of as many programs as it shall have), and its sums
    three quarters of the registers."""
    ranks = tile.r or rank_block(r, 64)
    elements, sums = {
        "product": (tile.k * (tile.m + tile.n), tile.m * tile.n),
        "product_with_s": (tile.k * (tile.m + tile.n + ranks), tile.m * (tile.n + ranks)),
        "down": (max(tile.ways, 1) * tile.k * (tile.m + ranks), max(tile.ways, 1) * tile.m * ranks),
        "pair": (tile.m * (tile.n + ranks), tile.n * ranks),
        "decode": (tile.k * (tile.m + tile.n + ranks), tile.m * (tile.n + ranks)),
    }[kernel]
    return 2 * elements * tile.stages * tile.fill <= chip.shared_memory and sums <= 192 * 32 * tile.warps


@dataclass
class Work:
    """One way to run a kernel: what makes its launches, and of what, a set of inputs for each copy."""

    make: Callable[..., Launch | list[Launch]]
    given: list[dict[str, Any]]
    outputs: tuple[str, ...]  # which of them are filled
    expected: tuple[Tensor, ...]  # in float32, for the first copy
    library: Callable[[int], object] | None = None  # cuBLAS, for the copy of that number

    def program(self) -> Program:
        """With the tiles that are chosen, or overridden, now."""
        return program(self.make, **self.given[0])

    def run(self, made: Program, copy: int) -> None:
        made(*self.given[copy].values())

    def error(self, made: Program) -> float:
        """The largest error beside the largest element; NaN where something was not written."""
        ours = [self.given[0][name] for name in self.outputs]
        for out in ours:
            out.fill_(float("nan"))
        self.run(made, 0)
        pairs = zip(ours, self.expected, strict=True)
        return max(
            ((out.float() - true).abs().max() / true.abs().max()).nan_to_num(torch.inf).item() for out, true in pairs
        )


def whole_or_apart(
    x: Any, w: Any, d: Any, u: Any, out: Any, *, s: Any, scaling: Any, keep: Any, transposed: bool, bits: Any = None
) -> Launch | list[Launch]:
    """A product with S, and the two launches that take its place."""
    whole = few_rows.product_with_s(x, w, d, u, out, s=s, scaling=scaling, keep=keep, transposed=transposed, bits=bits)
    if whole is not None:
        return whole
    apart = down.down(x, d if transposed else d.t(), s, scaling, keep)
    return [apart, gemm.product(x, w, s, u, out, transposed=transposed, bits=bits)]


def decode(x: Any, w: Any, a: Any, b: Any, y: Any, scaling: Any) -> list[Launch]:
    return decoding.decode(x, w, a, b, y, scaling, Scratch(x.device))


def work(kernel: str, way: str, shape: Shape, r: int, dtype: torch.dtype, device: str, copies: int = 1) -> Work:
    (m, k, n), ranks, masked = shape, padded_rank(r), way == "masked"
    torch.manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(size, device=device)).to(dtype)

    def one() -> tuple[dict[str, Any], tuple[Tensor, ...]]:
        x, dy, w = normal(m, k), normal(m, n), normal(n, k, std=k**-0.5)
        a, b, s, ds = normal(r, k, std=k**-0.5), normal(n, r, std=0.3), normal(m, ranks), normal(m, ranks)
        bits, mask = None, torch.ones((), device=device)
        if masked:
            bits = torch.randint(-(2**31), 2**31 - 1, (m, -(-k // 32)), dtype=torch.int32, device=device)
            mask = ((bits[:, :, None] >> torch.arange(32, device=device)) & 1).flatten(1)[:, :k].float()
        xf, dyf, wf, af, bf = (t.float() for t in (x, dy, w, a, b))
        scaled: dict[str, Any] = {"scaling": 1.0, "keep": 1.0}
        y, dx, small = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(s)
        if kernel == "product":
            if way == "fwd":
                given = {"x": x, "w": w, "p": s, "q": b, "out": y, "transposed": True}
                return given, (xf @ wf.T + s[:, :r].float() @ bf.T,)
            given = {"x": dy, "w": w, "p": ds, "q": a, "out": dx, "transposed": False, "bits": bits}
            return given, (dyf @ wf + mask * (ds[:, :r].float() @ af),)
        if kernel == "product_with_s":
            if way == "fwd":
                low = xf @ af.T
                given = {"x": x, "w": w, "d": a, "u": b, "out": y, "s": small, **scaled, "transposed": True}
                return given, (xf @ wf.T + low @ bf.T, padded(low, ranks))
            low = dyf @ bf
            given = {
                "x": dy,
                "w": w,
                "d": b,
                "u": a,
                "out": dx,
                "s": small,
                **scaled,
                "transposed": False,
                "bits": bits,
            }
            return given, (dyf @ wf + mask * (low @ af), padded(low, ranks))
        if kernel == "down":
            z, low, d = (dy, dyf @ bf, b.t()) if way == "ds" else (x, (mask * xf) @ af.T, a)
            return {"x": z, "a": d, "s": small, **scaled, "bits": bits}, (padded(low, ranks),)
        if kernel == "pair":
            given = {
                "x": x,
                "dy": dy,
                "ds": ds,
                "s": s,
                "grad_a": torch.empty_like(a),
                "grad_b": torch.empty_like(b),
                "bits": bits,
            }
            return given, (ds[:, :r].float().T @ (mask * xf), dyf.T @ s[:, :r].float())
        return {"x": x, "w": w, "a": a, "b": b, "y": y, "scaling": 1.0}, (xf @ wf.T + xf @ af.T @ bf.T,)

    first, expected = one()
    given = [first, *(one()[0] for _ in range(copies - 1))]
    makes: dict[str, Callable[..., Launch | list[Launch]]] = {
        "product": gemm.product,
        "product_with_s": whole_or_apart,
        "down": down.down,
        "pair": lambda x, dy, ds, s, grad_a, grad_b, **bits: pair.pair(
            x, ds, grad_a, [pair.OverDy(dy, s, grad_b)], **bits
        ),
        "decode": decode,
    }
    outputs = {"product": ("out",), "product_with_s": ("out", "s"), "down": ("s",), "pair": ("grad_a", "grad_b")}
    made = Work(makes[kernel], given, outputs.get(kernel, ("y",)), expected)
    if kernel in ("product", "product_with_s", "decode"):
        turned = kernel == "decode" or way == "fwd"
        made.library = lambda i: torch.mm(given[i]["x"], given[i]["w"].T if turned else given[i]["w"])
    return made


def padded(low: Tensor, ranks: int) -> Tensor:
    return torch.nn.functional.pad(low, (0, ranks - low.shape[1]))


def refused(kernel: str, shape: Shape, r: int, dtype: torch.dtype, chip: Chip) -> str | None:
    """Why a layer of this shape does not run the kernel, in words."""
    m, k, n = shape
    if k % 8 or n % 8:
        return "K and N must be multiples of 8, for tensor descriptors"
    most = {"product_with_s": 32, "pair": pair.RANKS}.get(kernel)
    if most and not tiles.few_rows(m, r, dtype=dtype, chip=chip, ranks=most):
        return f"few rows are up to 2048, of up to {most} ranks, on Hopper and later"
    if kernel == "decode" and not tiles.decodes(m, n, k, r, dtype=dtype, chip=chip):
        return "decoding takes up to 64 rows (128 where K is at least 2 N), of up to 64 ranks, on Hopper"
    return None


def tile_of(kernel: str, made: Program, chip: Chip) -> Tile | None:
    """The tile that a program was made with; None for the launches that take a product's place that makes S."""
    launch = made.launches[0]
    if kernel == "product_with_s" and len(made.launches) > 1:
        return None
    constants, options = launch.constants, launch.options
    found = {axis: constants.get(f"BLOCK_{axis.upper()}", 0) for axis in "mnkr"}
    found |= {"k": constants.get("BLOCK_C", found["k"]), "ways": constants.get("WAYS", 0)}
    found |= {"ahead": constants.get("AHEAD", 0)}
    found |= {"warps": options["num_warps"], "stages": options["num_stages"]}
    if kernel == "product":
        found["fill"] = constants["PROGRAMS"] / chip.processors
    return Tile(**{name: found[name] for name in FIELDS[kernel].split() if name in found})


def named(kernel: str, tile: Tile | None) -> str:
    """A tile as it stands in the tables."""
    if tile is None:
        return "apart"
    plain = Tile()
    shown = (name for name in FIELDS[kernel].split() if getattr(tile, name) != getattr(plain, name))
    return f"Tile({', '.join(f'{name}={getattr(tile, name)}' for name in shown)})"
