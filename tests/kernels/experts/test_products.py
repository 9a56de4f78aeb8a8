"""The products over experts, and what lies around them, each kernel by itself against its formula."""

import math

import pytest
import torch
from accuracy import allowed
from devices import CPU, CUDA, TRITON

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from lora_fast.kernels import tiles
from lora_fast.kernels.chip import Chip
from lora_fast.kernels.experts import tiles as expert_tiles
from lora_fast.kernels.experts.pack import Stack, collect, pack, padded_ranks
from lora_fast.kernels.experts.product import experts_product
from lora_fast.kernels.experts.route import Table
from lora_fast.kernels.operands import run
from lora_fast.kernels.tiles import Tile

pytestmark = pytest.mark.usefixtures("poisoned")

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
TINY = Tile(m=16, n=32, k=16)
COUNTS = [20, 0, 7, 16]


def table_of(counts, rows, device):
    """A table of these experts' rows with room for three spans more, whose numbers lead nowhere."""
    spans, firsts, start = [], [], 0
    for expert, count in enumerate(counts):
        firsts.append(len(spans))
        spans += [(expert, row, min(row + rows, start + count)) for row in range(start, start + count, rows)]
        start += count
    columns = torch.full((3, len(spans) + 3), 10**6)
    columns[:, : len(spans)] = torch.tensor(spans).T
    numbers = [*columns.flatten().tolist(), *firsts, len(spans)]
    return torch.tensor(numbers, dtype=torch.int32, device=device), columns.shape[1]


def product(x, w, counts, transposed, p=None, q=None, bias=None):
    n = w.shape[1 if transposed else 2]
    rows = expert_tiles.experts_product(n, x.shape[1], dtype=x.dtype, chip=Chip.of(x.device), tma=True).m
    at, length = table_of(counts, rows, x.device)
    out = x.new_empty(len(x), n)

    def make(x, w, out, at, p, q, bias):
        return experts_product(x, w, out, Table(at, length, rows), transposed=transposed, p=p, q=q, bias=bias)

    run(make, x=x, w=w, out=out, at=at, p=p, q=q, bias=bias)
    return out


@pytest.fixture
def small(device):
    """Several tiles each way, in the interpreter."""
    if device == "cuda":
        yield
    else:
        with tiles.override(experts_product=TINY):
            yield


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("c, n, ranks", [(40, 72, 16), (35, 37, 32), (64, 64, None)])
@pytest.mark.usefixtures("small")
def test_product(device, transposed, c, n, ranks):
    """A tile that is nobody's row is written nowhere; NaN in one expert's weight, adapter and bias, and in rows past
    the last, stay where they are."""
    gen = torch.Generator(device).manual_seed(0)
    s, experts, spoilt = sum(COUNTS) + 5, len(COUNTS), 2

    def normal(*shape):
        return torch.randn(*shape, generator=gen, device=device)

    x, w, bias = normal(s, c), normal(experts, *((n, c) if transposed else (c, n))), normal(experts, n)
    x[sum(COUNTS) :] = math.nan
    p = q = None
    if ranks:
        p, q = normal(s, ranks), normal(experts, *((n, ranks) if transposed else (ranks, n)))
        q[spoilt] = math.nan
    w[spoilt] = math.nan
    out, start = product(x, w, COUNTS, transposed, p, q, bias), 0
    for expert, count in enumerate(COUNTS):
        rows = slice(start, start + count)
        start += count
        if expert == spoilt:
            assert out[rows].isnan().all()
            continue
        expected = x[rows].double() @ (w[expert].T if transposed else w[expert]).double() + bias[expert]
        if ranks:
            expected += p[rows].double() @ (q[expert].T if transposed else q[expert]).double()
        torch.testing.assert_close(out[rows].double(), expected, rtol=1e-4, atol=1e-4)
    assert out[start:].isnan().all(), "memory that nobody wrote"


@pytest.mark.versions
@pytest.mark.medium
@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("experts, r", [(4, 16), (16, 4), (3, 20), (5, 70)])
@pytest.mark.parametrize("ranks_first", [True, False])
def test_adapters_are_packed_and_gradients_collected(device, experts, r, ranks_first):
    """PEFT's B has its experts fastest, its A slowest."""
    n, ranks = 37, padded_ranks(r)
    a = torch.randn(experts * r, n, device=device)
    b = torch.randn(n, r * experts, device=device)
    for given, of in ((a, Stack.of_a), (b, Stack.of_b)):
        matrices = given.view(experts, r, n) if given is a else given.view(n, r, experts).permute(2, 1, 0)
        expected = torch.zeros(experts, ranks, n, dtype=HALF, device=device)
        expected[:, :r] = matrices.half()
        dst = torch.empty(expected.shape if ranks_first else expected.mT.shape, dtype=HALF, device=device)
        run(
            lambda src, dst, of=of: pack(of(src, experts), dst, ranks_first=ranks_first, r=r),
            src=given,
            dst=dst,
        )
        assert torch.equal(dst if ranks_first else dst.mT, expected)

    chunks = [1, 3, 0, *[2] * (experts - 3)]  # of each expert
    at, length = table_of([16 * count for count in chunks], 16, device)
    parts, grads, start = torch.randn(length, n, ranks, device=device), [], 0
    parts[sum(chunks) :] = math.nan
    for of, like in ((Stack.of_a, a), (Stack.of_b, b)):
        grad = torch.empty_like(like)
        run(
            lambda parts, at, grad, of=of: collect(parts, Table(at, length, 16), of(grad, experts), experts, r),
            parts=parts,
            at=at,
            grad=grad,
        )
        grads.append(grad)
    for expert, count in enumerate(chunks):
        expected = parts[start : start + count, :, :r].sum(0)  # [n, r]
        start += count
        torch.testing.assert_close(grads[0].view(experts, r, n)[expert].T, expected)
        torch.testing.assert_close(grads[1].view(n, r, experts)[..., expert], expected)


PIPELINED = [
    (True, BF16, (1024, 2048)),
    (False, BF16, (2880, 2880)),
    (True, HALF, (768, 2048)),
    (True, FLOAT, (512, 256)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("transposed, dtype, shape", PIPELINED, ids=str)
def test_product_on_a_gpu(transposed, dtype, shape):
    """As exact as torch's product of each expert."""
    (c, n), counts, device = shape, [300, 1, 0, 128, 700], "cuda"
    x, p = (torch.randn(sum(counts), width, device=device).to(dtype) for width in (c, 16))
    w, q = (
        torch.randn(len(counts), *((n, width) if transposed else (width, n)), device=device).to(dtype)
        for width in (c, 16)
    )
    out = product(x, w, counts, transposed, p, q)
    ours, theirs, norm = 0.0, 0.0, 0.0
    for ws, qs, xs, ps, found in zip(w, q, x.split(counts), p.split(counts), out.split(counts), strict=True):
        ws, qs = (ws.T, qs.T) if transposed else (ws, qs)
        true = xs.double() @ ws.double() + ps.double() @ qs.double()
        ours += (found.double() - true).square().sum().item()
        theirs += ((xs @ ws + ps @ qs).double() - true).square().sum().item()
        norm += true.square().sum().item()
    assert math.sqrt(ours / norm) <= allowed(math.sqrt(theirs / norm), dtype, out.numel())
