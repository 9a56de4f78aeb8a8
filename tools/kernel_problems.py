"""Problems of every kind that the kernels are launched for, on tensors without a device: what compile_kernels.py
compiles. A new kernel needs one here that reaches it."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from lora_fast.kernels.chip import Chip

BF16, FLOAT = torch.bfloat16, torch.float32

# M, K, N, r, the dtype of x, p, the dtype of the adapters, whether there is a bias
Case = tuple[int, int, int, int, torch.dtype, float, torch.dtype, bool]


def held_by(base_name: str, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors that such a base keeps in the place of W."""
    from lora_fast.kernels.bases import BASES

    (n, k), blocks = w.shape, w.numel() // 64
    bytes_of_scales = "nested" in base_name or "mxfp4" in base_name
    # Each form of scales that fp8 checkpoints have, with another dtype of the products.
    scales = {
        BF16: torch.empty(-(-n // 128), -(-k // 128)),
        torch.float16: torch.empty(-(-n // 128), -(-k // 128), dtype=torch.uint8),
        FLOAT: torch.empty(n, 1, dtype=BF16),
    }
    tensors = {
        "weight": w.t().contiguous().t() if base_name == "turned" else w,
        "stored": torch.empty(n, k, dtype=torch.uint8),
        "scale": scales[w.dtype],
        "packed": torch.empty(n * k // 2, dtype=torch.uint8),
        "absmax": torch.empty(blocks, dtype=torch.uint8 if bytes_of_scales else torch.float32),
        "table": torch.empty(16),
        "code2": torch.empty(256),
        "absmax2": torch.empty(blocks // 256),
        "offset": torch.empty(1),
        "row_scale": torch.empty(n),
        "col_scale": torch.empty(k),
    }
    return tuple(tensors[name] for name in BASES[base_name].tensors)


def launches_apart(case: Case) -> None:
    """Each launch of a layer of many rows by itself, and what only other modules use of the kernels."""
    from lora_fast.kernels import cast, down, gemm, mask, norm, passes, sums, weight

    m, k, n, r, dtype, p, adapter, with_bias = case
    x, w, dy = (torch.empty(*s, dtype=dtype) for s in ((m, k), (n, k), (m, n)))
    a, b = torch.empty(r, k, dtype=adapter), torch.empty(n, r, dtype=adapter)
    bias = torch.empty(n, dtype=dtype) if with_bias else None
    bits = mask.mask_bits(torch.zeros(1, dtype=torch.int64), p, m, k) if p else None
    if cast.cast_wanted((dtype, adapter, adapter), r):
        s, a, b = down.down_cast_fwd(x, a, b, 2.0, bits)
    else:
        s = down.down_fwd(x, a, 2.0, bits)
    gemm.gemm(x, w, s, b, transposed=True, bias=bias)
    row_norm, gain = norm.norm_fwd(w, a, b, 2.0, torch.empty(n))
    kept = torch.empty(m, n, dtype=dtype) if with_bias else None
    gemm.gemm(x, w, s, b, transposed=True, bias=bias, gain=gain, z=kept)
    grad_b, grad_bias = torch.empty(n, r, dtype=adapter), torch.empty(n, dtype=dtype) if with_bias else None
    ds = passes.dy_bwd(dy, s, b[:, :r], 2.0, grad_b, grad_bias)
    assert gain is not None
    made_of = () if with_bias else (x, w, s, b)
    dora = sums.Dora(gain, row_norm, torch.empty_like(dy), torch.empty_like(dy), torch.empty(n), *made_of)
    passes.dy_bwd(dy, s, b[:, :r], 2.0, grad_b, grad_bias, 1.0, dora)
    assert ds is not None
    passes.a_bwd(x, ds, torch.empty_like(a, dtype=adapter), bits)
    gemm.gemm(dy, w, ds, a, transposed=False, bits=bits)
    weight.weight_fwd(dy, b.t()[:r], s, 1.0, None, bias)  # a bottleneck adapter's sums, with activations for W
    a, b = torch.empty(r, k, dtype=adapter), torch.empty(n, r, dtype=adapter)
    for magnitude in (None, torch.empty(n)):
        v, norm_of_v = weight.weight_fwd(w, a, b, 2.0, magnitude)
        weight.weight_bwd(v, None if magnitude is None else w, a, b, 2.0, magnitude, norm_of_v, True)


def launches_in_fp8(case: Case) -> None:
    """Those of a layer of many rows that differ where the base is e4m3."""
    from lora_fast.kernels import down, gemm, mask, norm, passes
    from lora_fast.kernels.common import FP8

    m, k, n, r, dtype, p, _, with_bias = case
    x, dy = (torch.empty(*s, dtype=dtype) for s in ((m, k), (m, n)))
    a, b = torch.empty(r, k, dtype=dtype), torch.empty(n, r, dtype=dtype)
    bias = torch.empty(n, dtype=dtype) if with_bias else None
    bits = mask.mask_bits(torch.zeros(1, dtype=torch.int64), p, m, k) if p else None
    gain, scale = torch.empty(n), torch.empty(m)
    s, x8, x_scale = down.quantise_fwd(x, a, 2.0, bits)
    w8, w_scale = torch.empty(n, k, dtype=FP8), torch.empty(n)
    norm.norm_fwd(w8, a, b, 2.0, torch.empty(n), False, w_scale)
    kept = torch.empty(m, n, dtype=dtype) if with_bias else None
    gemm.gemm(x8, w8, s, b, transposed=True, bias=bias, gain=gain, x_scale=x_scale, w_scale=w_scale, z=kept)
    ds, dz8, dz_scale = down.quantise_fwd(dy, b.t()[:r], 2.0, None, 1.0, gain)
    of_dz = torch.empty(k)
    gemm.gemm(dz8, w8.new_empty(k, n), ds, a, transposed=False, bits=bits, x_scale=dz_scale, w_scale=of_dz)
    passes.a_bwd(x8, ds, torch.empty(r, k), bits, scale)


def layer(case: Case, magnitude: torch.Tensor | None, base_name: str = "plain") -> None:
    """A whole layer's launches, forward and backward; of 128 rows or fewer the forward alone, as in decoding."""
    from lora_fast.kernels import lora
    from lora_fast.kernels.problem import Call, Kinds, Needs, Problem, Saved

    m, k, n, r, dtype, p, adapter, with_bias = case
    x, w, dy = (torch.empty(*s, dtype=dtype) for s in ((m, k), (n, k), (m, n)))
    a, b, bias = torch.empty(r, k, dtype=adapter), torch.empty(n, r, dtype=adapter), None
    if with_bias:
        bias = torch.empty(n, dtype=dtype)
    dora = magnitude is not None
    kinds, needs = Kinds(dtype, adapter, adapter, dtype, dtype), Needs(True, True, True, with_bias, dora)
    if m <= 128:
        problem = Problem((m,), k, n, r, kinds, Needs(), dora=dora, alone=True)
        lora.forward(problem, Call(2.0, None, 0.0, (w,)), x, a, b, bias, magnitude)
        return
    problem = Problem((m,), k, n, r, kinds, needs, base_name, dora=dora, keep_z=dora and with_bias)
    held = held_by(base_name, w)
    y, made = lora.forward(problem, Call(2.0, 1 if p else None, p, held), x, a, b, bias, magnitude)
    saved = (*Saved(x, a, b, y if dora and not with_bias else None, *made), *held)
    lora.backward(problem, dy, saved, 2.0, p)


def embedding(dtype: torch.dtype, r: int) -> None:
    """The launches of an adapted embedding, forward and backward, with float32 adapters."""
    from lora_fast.kernels.embedding.step import Needs, Problem, backward, forward

    m, v, n = 8192, 32000, 2048
    ids, weight, dy = torch.zeros(m, dtype=torch.int64), torch.empty(v, n, dtype=dtype), torch.empty(m, n, dtype=dtype)
    a, b, factor = torch.empty(r, v), torch.empty(n, r), torch.empty(1)
    problem = Problem()
    _, norm, gain = forward(problem, ids, weight, a, b, 2.0, factor, torch.empty(n))
    backward(problem, dy, ids, weight, a, b, 2.0, factor, norm=norm, gain=gain, needs=Needs(True, True, True))


# M, K, the columns of each output, r, the dtype of x, p, the dtype of the adapters, whether there are magnitudes
GroupCase = tuple[int, int, tuple[int, ...], int, torch.dtype, float, torch.dtype, bool]


def described(case: GroupCase) -> str:
    m, k, widths, r, dtype, p, adapter, dora = case
    forms = "dora" if dora else "lora"
    return f"{m}x{k}x{'+'.join(map(str, widths))} r={r} {str(dtype)[6:]} p={p} {str(adapter)[6:]} {forms}"


def group(case: GroupCase, base_name: str = "plain") -> None:
    """The launches of layers with one input, forward and backward."""
    from lora_fast.kernels.group import backward, forward
    from lora_fast.kernels.problem import Kinds, Needs
    from lora_fast.kernels.siblings import Given, Kept, Sibling, Siblings

    m, k, widths, r, dtype, p, adapter, dora = case
    x, kinds, needs = torch.empty(m, k, dtype=dtype), Kinds(dtype, adapter, adapter), Needs(False, True, True)
    if dora:
        kinds, needs = kinds._replace(m=adapter), needs._replace(m=True)
    siblings = Siblings((m,), k, tuple(Sibling(n, r, kinds, needs, dora, base_name=base_name) for n in widths), True)
    each = [
        Given(
            held_by(base_name, torch.empty(n, k, dtype=dtype)),
            torch.empty(r, k, dtype=adapter),
            torch.empty(n, r, dtype=adapter),
            None,
            torch.empty(n, dtype=adapter) if dora else None,
            2.0,
        )
        for n in widths
    ]
    ys, made, late = forward(siblings, x, each, 1 if p else None, p)
    if late is not None:
        late.run()
    kept = [
        t
        for one, sibling, y in zip(each, siblings.each, ys, strict=True)
        for t in (*Kept(None if sibling.casts else one.b, y if dora else None), *one.held)
    ]
    dys = [torch.empty_like(y) for y in ys]
    backward(siblings, dys, x, made, kept, [2.0] * len(ys), p)


def mlp(case: GroupCase, act: str, form: str) -> None:
    """The launches of an MLP, forward and backward; its widths are those of h and of down. Its form: "glu", gate and
    up; "first", these as halves of one layer; "fc", one layer without a gate."""
    from lora_fast.kernels.mlp import Mlp, backward, forward
    from lora_fast.kernels.problem import Kinds, Needs
    from lora_fast.kernels.siblings import Given, Kept, Sibling, Siblings

    m, k, (width, n), r, dtype, p, adapter, dora = case
    kinds, needs = (
        Kinds(dtype, adapter, adapter, None, adapter if dora else None),
        Needs(False, True, True, False, dora),
    )
    rows_of = [width, width] if form == "glu" else [2 * width] if form == "first" else [width]
    inner, outer = (
        Sibling(rows_of[0], r, kinds, needs._replace(m=False), dora, scaled=dora),
        Sibling(n, r, kinds, needs, dora),
    )
    of_x, count = Siblings((m,), k, (inner,) * len(rows_of), True), len(rows_of)
    gate, of_h = "first" if form == "first" else None, Siblings((m,), width, (outer,), True)
    problem = Mlp(of_x, of_h, act, gate, (dora,) * count, (kinds.m,) * count)
    x, each = torch.empty(m, k, dtype=dtype), []
    for rows, cols in (*((rows, k) for rows in rows_of), (n, width)):
        a, b = torch.empty(r, cols, dtype=adapter), torch.empty(rows, r, dtype=adapter)
        magnitude = torch.empty(rows, dtype=adapter) if dora else None
        each.append(Given((torch.empty(rows, cols, dtype=dtype),), a, b, None, magnitude, 2.0))
    seed = 1 if p else None
    y, made, late = forward(problem, x, each, (seed, seed), (p, p))
    if late is not None:
        late.run()
    kept = [(*Kept(None if inner.casts else one.b), *one.held) for one in each]
    kept[-1] = *Kept(kept[-1][0], y if dora else None), *each[-1].held
    backward(problem, torch.empty_like(y), x, made, kept, 2.0, p, True)


# M, K, N, the ranks, the dtype of x, p, the dtype of the adapters
BatchCase = tuple[int, int, int, tuple[int, ...], torch.dtype, float, torch.dtype]


def batch(case: BatchCase) -> None:
    """The launches of a layer with several adapters in one batch, forward and backward, of LoRA and of DoRA: read where
    they lie, with dropout from copies."""
    from lora_fast.kernels.batch import run
    from lora_fast.kernels.batch.problem import Problem
    from lora_fast.kernels.batch.ranks import Ranks, addresses_on, numbers_of
    from lora_fast.kernels.problem import Kinds, Needs

    m, k, n, of, dtype, p, adapter = case
    x, weight, ranks = torch.empty(m, k, dtype=dtype), torch.empty(n, k, dtype=dtype), Ranks(of)
    for dora in (False, True):
        a, b = torch.empty(sum(of), k, dtype=adapter), torch.empty(n * sum(of), dtype=adapter)
        magnitudes = torch.empty(len(of), n, dtype=adapter) if dora else None
        given: tuple[Any, ...] = a, b, None, magnitudes
        if not p:
            given = addresses_on([x] * (3 if dora else 2) * len(of), x.device), None, None
        kinds, needs = Kinds(dtype, adapter, adapter, None, adapter), Needs(True, True, True, False, dora)
        problem = Problem((m,), k, n, ranks, kinds, needs, dora)
        numbers = numbers_of(ranks, [2.0] * len(of), [p] * len(of), problem.lifted, x.device)
        call = run.Call((weight,), torch.zeros(m, dtype=torch.int64), numbers, 1 if p else None)
        y, made = run.forward(problem, call, x, *given)
        run.backward(problem, torch.empty_like(y), run.to_save(problem, (weight,), numbers.scales, x, made, y))


def experts(
    tokens: int,
    k: int,
    count: int,
    h: int,
    i: int,
    r: int,
    dtype: torch.dtype,
    turned: bool = False,
    adapter: torch.dtype | None = None,
) -> None:
    """The launches of a layer of experts; ``turned``: as gpt-oss has them, with biases, a limit, in turn."""
    from lora_fast.kernels.experts import problem, run
    from lora_fast.kernels.experts.gate import Gate

    adapter = adapter or dtype
    x, weights = torch.empty(tokens, h, dtype=dtype), torch.empty(tokens, k)
    adapters: Any = (None,) * 4
    if r:
        shapes = (count * r, h), (2 * i, r * count), (count * r, i), (h, r * count)
        adapters = tuple(torch.empty(shape, dtype=adapter) for shape in shapes)
    held: Any = (torch.empty(count, 2 * i, h, dtype=dtype), torch.empty(count, h, i, dtype=dtype), None, None)
    if turned:
        biases = torch.empty(count, 2 * i, dtype=dtype), torch.empty(count, h, dtype=dtype)
        held = torch.empty(count, h, 2 * i, dtype=dtype), torch.empty(count, i, h, dtype=dtype), *biases
    kinds = problem.Kinds(dtype, torch.float32, *((adapter,) * 4 if r else ()))
    needs = problem.Needs(True, True, *(r > 0,) * 4)
    gate = Gate(1.702, 7.0, 1.0, True) if turned else Gate()
    made = problem.Problem(tokens, k, count, h, i, r, r, kinds, needs, (turned, turned), gate, x.device)
    call = run.Call(2.0, 2.0)
    _, hidden, room = run.forward(made, call, x, torch.empty(tokens, k, dtype=torch.int64), weights, adapters, held)
    saved = run.to_save(made, x, hidden, room, adapters, held)
    run.backward(made, call, torch.empty_like(x), saved[:5], saved[5:])


EXPERTS = (
    (4096, 8, 128, 2048, 768, 16, BF16),
    (4096, 4, 32, 2880, 2880, 16, BF16, True),
    (4096, 2, 8, 4096, 1536, 64, torch.float16, False, FLOAT),
    (4096, 2, 8, 4096, 1536, 40, BF16, True, FLOAT),
    (4096, 2, 8, 2051, 1031, 128, BF16),
    (4096, 2, 8, 2048, 1024, 0, BF16),
    (4096, 2, 8, 2048, 1024, 16, FLOAT),
)


LAYERS: list[Case] = [
    (4096, 4096, 4096, 16, BF16, 0.0, BF16, False),
    (4096, 4096, 4096, 16, BF16, 0.1, FLOAT, True),
    (4096, 4096, 4096, 64, torch.float16, 0.1, torch.float16, False),
    (4096, 4096, 4096, 256, BF16, 0.1, FLOAT, True),
    (4096, 4096, 1024, 16, BF16, 0.0, BF16, False),
    (1024, 1003, 1001, 16, BF16, 0.1, FLOAT, False),
    (4096, 4099, 4097, 16, BF16, 0.1, FLOAT, False),
    (4096, 4096, 4096, 16, FLOAT, 0.1, FLOAT, False),
    (4096, 128, 192, 16, FLOAT, 0.1, FLOAT, False),
]
FEW_ROWS: list[Case] = [  # which among them take every tile
    (1024, 2048, 2048, 16, BF16, 0.0, BF16, True),
    (256, 4096, 4096, 32, BF16, 0.1, BF16, False),
    (256, 2048, 512, 16, BF16, 0.1, BF16, False),
    (2048, 2048, 512, 32, BF16, 0.1, BF16, False),
    (256, 4096, 4096, 16, BF16, 0.0, BF16, False),
    (2048, 14336, 4096, 16, BF16, 0.0, BF16, True),
    (256, 2048, 512, 8, torch.float16, 0.1, FLOAT, False),
    (8, 14336, 4096, 16, BF16, 0.0, BF16, False),
    (64, 4096, 14336, 64, torch.float16, 0.0, FLOAT, True),
    (64, 2048, 2048, 16, BF16, 0.0, FLOAT, True),
    (128, 8192, 2048, 64, BF16, 0.0, BF16, True),
    (128, 14336, 4096, 16, BF16, 0.0, BF16, False),
    (512, 4096, 4096, 64, BF16, 0.1, BF16, False),
    (1024, 2048, 2048, 128, BF16, 0.0, BF16, True),
    (2048, 4096, 1024, 128, BF16, 0.1, BF16, False),
    (4096, 4096, 4096, 40, BF16, 0.0, BF16, False),  # whose B would be loaded by single elements, and spill
]

GROUPS: list[GroupCase] = [
    (8192, 4096, (4096, 1024, 1024), 16, BF16, 0.0, BF16, False),
    (8192, 4096, (14336, 14336), 16, BF16, 0.1, FLOAT, True),
    (2048, 2048, (2048, 512, 512), 16, BF16, 0.1, BF16, False),
    (2048, 2048, (2048, 512, 512), 16, BF16, 0.0, BF16, True),
    (512, 2048, (2048, 512, 512), 64, BF16, 0.1, BF16, False),
    (1024, 2048, (8192, 8192), 128, BF16, 0.0, BF16, True),
    (1000, 4096, (4096, 1000), 32, torch.float16, 0.0, FLOAT, False),
    (4096, 4096, (4096, 1024, 1024, 1000), 8, torch.float16, 0.0, FLOAT, False),
    (4096, 1024, (1024,), 16, FLOAT, 0.1, FLOAT, False),
]

BATCHES: list[BatchCase] = [
    (8192, 4096, 4096, (16,) * 4, BF16, 0.0, BF16),
    (8192, 4096, 4096, (16,) * 16, BF16, 0.1, FLOAT),
    (8192, 4096, 14336, (8, 64, 40, 128), torch.float16, 0.1, FLOAT),
    (1024, 2048, 2048, (16,) * 64, BF16, 0.0, BF16),
    (4096, 1003, 1001, (16, 40, 30), BF16, 0.1, BF16),
    (4096, 1024, 1024, (16, 64, 16), FLOAT, 0.1, FLOAT),
]

MLPS: list[tuple[str, str, GroupCase]] = [
    ("silu", "glu", (8192, 4096, (14336, 4096), 16, BF16, 0.0, BF16, False)),
    ("silu", "glu", (8192, 4096, (14336, 4096), 16, BF16, 0.1, FLOAT, True)),
    ("gelu", "glu", (4096, 2048, (8192, 2048), 64, BF16, 0.1, BF16, False)),
    ("silu", "glu", (512, 2048, (8192, 2048), 16, BF16, 0.0, BF16, False)),
    ("silu", "glu", (512, 2048, (8192, 2048), 16, BF16, 0.1, FLOAT, True)),
    ("gelu_tanh", "glu", (4096, 2048, (8192, 2048), 16, torch.float16, 0.0, FLOAT, False)),
    ("gelu", "glu", (4096, 1024, (2048, 1024), 16, FLOAT, 0.1, FLOAT, False)),
    ("silu", "first", (8192, 4096, (14336, 4096), 16, BF16, 0.1, BF16, False)),
    ("silu", "first", (8192, 4096, (14336, 4096), 16, BF16, 0.0, BF16, True)),
    ("gelu", "fc", (8192, 1024, (4096, 1024), 16, BF16, 0.1, BF16, False)),
    ("relu2", "fc", (8192, 1024, (4096, 1024), 16, BF16, 0.0, BF16, True)),
    ("quick_gelu", "fc", (2048, 1024, (4096, 1024), 16, torch.float16, 0.0, FLOAT, False)),
]


def problems(chip: Chip) -> Iterator[tuple[str, Callable[[], None]]]:
    """(what it is called, what launches its kernels) of every problem that a chip may be given."""
    from lora_fast.kernels.bases import BASES

    has_fp8 = chip.capability in (89, 90, 120)
    for case in LAYERS:
        m, k, n, r, dtype, p, adapter, _ = case
        name = f"{m}x{k}x{n} r={r} {str(dtype)[6:]} p={p} {str(adapter)[6:]}"
        yield name, partial(launches_apart, case)
        if has_fp8 and dtype.itemsize == 2:
            yield f"{name} fp8", partial(launches_in_fp8, case)
        if dtype == torch.float16:  # whose B carries a part of the scaling
            for magnitude in (None, torch.empty(n)):
                yield f"{name} lifted", partial(layer, case, magnitude)
    # Where few rows take what many do, one of them is enough.
    for case in FEW_ROWS if chip.has_tma and not chip.small else FEW_ROWS[-1:]:
        m, k, n, r, dtype, p, adapter, _ = case
        for magnitude in (None, torch.empty(n)):
            yield f"{m}x{k}x{n} r={r} {str(dtype)[6:]} p={p} {str(adapter)[6:]} layer", partial(layer, case, magnitude)
    for of_group in GROUPS:
        yield f"{described(of_group)} group", partial(group, of_group)
    for act, form, of_mlp in MLPS:
        yield f"{described(of_mlp)} {act} {form} mlp", partial(mlp, of_mlp, act, form)
    for one in BATCHES:
        m, k, n, of, dtype, p, adapter = one
        name = f"{m}x{k}x{n} r={max(of)} {str(dtype)[6:]} p={p} {str(adapter)[6:]} batch of {len(of)}"
        yield name, partial(batch, one)
    for given in EXPERTS:
        tokens, k, count, hidden, inner, rank, kind, *rest = given
        name = f"experts {tokens}x{k}x{count}x{hidden}x{inner} {str(kind)[6:]} r={rank} {rest}"
        yield name, partial(experts, *given)
    for base in BASES.values():
        if base.unpack_y and (not base.e4m3 or has_fp8):
            some = "nested" not in base.name and "scaled" not in base.name
            others = () if some else (torch.float16,) if base.e4m3 else (torch.float16, FLOAT)
            for dtype in (BF16, *others):
                case = 4096, 4096, 4096, 16, dtype, 0.0, dtype, False
                name = f"4096x4096x4096 r=16 {str(dtype)[6:]} p=0.0 {base.name}"
                yield name, partial(layer, case, torch.empty(4096), base.name)
            if some:
                of_group = 4096, 4096, (4096, 1024), 16, BF16, 0.1, BF16, True
                name = f"4096x4096x4096+1024 r=16 bfloat16 p=0.1 {base.name} group"
                yield name, partial(group, of_group, base.name)
    for dtype, r in ((BF16, 16), (torch.float16, 64), (FLOAT, 16)):
        yield f"8192x32000x2048 r={r} {str(dtype)[6:]} embedding", partial(embedding, dtype, r)
    for dtype in (BF16, torch.float16, FLOAT):
        case = 4096, 4096, 4096, 16, dtype, 0.1, FLOAT, False
        name = f"4096x4096x4096 r=16 {str(dtype)[6:]} p=0.1 turned"
        yield name, partial(layer, case, torch.empty(4096), "turned")


def is_wide(problem: str) -> bool:
    """Whether x has 32 bits, by the problem's name."""
    return "float32" in problem.split()[:3]


def kind_of(problem: str) -> tuple[bool, bool, str]:
    """(whether in 32 bits, whether with dropout, what products differ by)."""
    of = next((kind for kind in ("fp8", "batch", "turned", "group", "mlp") if kind in problem), "")
    return is_wide(problem), "p=0.1" in problem, of
