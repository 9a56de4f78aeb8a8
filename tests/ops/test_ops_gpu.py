"""The fused operator where only a GPU can show it: large offsets, graphs, streams, memory, compiled variants."""

import math

import pytest
import torch
from accuracy import check, check_one_mask, draw, error, gradients
from devices import TRITON
from torch._dynamo.utils import counters

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from fused import fused, masked, peak

from lora_fast.functional import lora_linear
from lora_fast.timing import graphed

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

BF16, FLOAT = torch.bfloat16, torch.float32


@pytest.mark.parametrize("shape", [(2048, 1024, 1024, 16), (1000, 1003, 1001, 12)])
def test_error_rule_with_tf32(shape):
    torch.backends.cuda.matmul.allow_tf32 = True
    check(fused(0.1), [masked(draw(*shape, FLOAT, "cuda"), 0.1)])


def large_offsets(columns, r):
    """x, dy, y and dx of more than 2^31 elements, zero but for the last rows, against those rows alone."""
    rows, last = 2**19 + 1, 3
    few = draw(last, columns, columns, r, BF16, "cuda")
    x = torch.zeros(rows, columns, dtype=BF16, device="cuda")
    dy = torch.zeros_like(x)
    x[-last:], dy[-last:] = few.x, few.dy
    weight, a, b = few.weight, few.lora_A.requires_grad_(), few.lora_B.requires_grad_()
    y = lora_linear(x.requires_grad_(), weight, a, b, 2.0, backend="triton")
    dx, grad_a, grad_b = torch.autograd.grad(y, [x, a, b], dy)
    few.bias = None
    truth = gradients(lambda *args: lora_linear(*args[:4], 2.0, backend="reference"), few, torch.float64)
    for name, ours in (("y", y[-last:]), ("dx", dx[-last:]), ("dA", grad_a), ("dB", grad_b)):
        assert error(ours, truth[name]) < 0.01, name
    assert not y[:-last].any() and not dx[:-last].any()


@pytest.mark.parametrize("columns, r", [(4096, 16), (4097, 16), (4096, 64), (4097, 64)])
def test_offsets_past_32_bits(columns, r, request):
    torch.use_deterministic_algorithms(False)  # filling these outputs with NaN would take their memory twice
    large_offsets(columns, r)
    torch.cuda.empty_cache()


def test_offsets_past_32_bits_under_a_mask():
    """The last rows of a large mask are as random as the first: offsets of mask words and outputs fit."""
    torch.use_deterministic_algorithms(False)
    rows, k = 2**19 + 1, 4096
    x = torch.ones(rows, k, dtype=BF16, device="cuda")
    eye = torch.eye(k, 16, device="cuda", dtype=BF16)  # y [:, :16] = 2 * keep of the first 16 columns
    y = lora_linear(
        x,
        torch.zeros(32, k, dtype=BF16, device="cuda"),
        eye.T.contiguous(),
        eye[:32].contiguous(),
        1.0,
        dropout_p=0.5,
        backend="triton",
    )
    tail = y[-4096:, :16]
    assert set(tail.unique().tolist()) == {0.0, 2.0}
    assert abs(tail.mean().item() - 1) < 5 / math.sqrt(tail.numel())
    torch.cuda.empty_cache()


def test_cuda_graph_replays_draw_new_masks():
    inputs = draw(256, 512, 384, 16, BF16, "cuda", bias=False)
    x, a, b = (t.requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B))
    weight = torch.zeros_like(inputs.weight)  # y is the low-rank branch alone

    outputs = []

    def step():
        y = lora_linear(x, weight, a, b, 2.0, dropout_p=0.5, backend="triton")
        outputs[:] = y, *torch.autograd.grad(y, [x, a, b], inputs.dy)

    replay, seen = graphed(step), []
    for _ in range(2):
        replay()
        seen.append([t.clone() for t in outputs])
        check_one_mask(inputs, dict(zip(("y", "dx", "dA", "dB"), seen[-1], strict=True)))
    assert not torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[0][1], seen[1][1])


def test_compiled_cuda_graphs_draw_new_masks():
    """So do the graphs that torch.compile captures, of forward and backward, with one mask in both."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    inputs, skipped = draw(256, 512, 384, 16, BF16, "cuda", bias=False), counters["inductor"]["cudagraph_skips"]
    leaves = [t.requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B)]
    weight = torch.zeros_like(inputs.weight)

    def forward(x, a, b):
        return lora_linear(x, weight, a, b, 2.0, dropout_p=0.5, backend="triton")

    compiled, seen = torch.compile(forward, mode="reduce-overhead", fullgraph=True), []
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(*leaves)
        seen.append([t.detach().clone() for t in (y, *torch.autograd.grad(y, leaves, inputs.dy))])
        check_one_mask(inputs, dict(zip(("y", "dx", "dA", "dB"), seen[-1], strict=True)))
    assert not torch.equal(seen[-2][0], seen[-1][0]) and counters["inductor"]["cudagraph_skips"] == skipped


def test_runs_on_the_current_stream():
    inputs = draw(2048, 2048, 2048, 16, BF16, "cuda")
    expected = gradients(fused(0.1)(inputs), inputs)
    later = draw(2048, 2048, 2048, 16, BF16, "cuda")
    later.x, later.dy = torch.zeros_like(inputs.x), torch.zeros_like(inputs.dy)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        later.x.copy_(inputs.x)
        later.dy.copy_(inputs.dy)
        ours = gradients(fused(0.1)(later), later)
    side.synchronize()
    for name in expected:
        assert torch.equal(ours[name], expected[name]), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_tensors_device():
    inputs = draw(256, 512, 384, 16, BF16, "cuda:1")
    check(fused(0.1), [masked(inputs, 0.1)])
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_peak_memory(p):
    """Forward and backward take what the frozen layer takes, S, and a bit an element of x: nothing [M, N] or [M, K]."""
    torch.use_deterministic_algorithms(False)
    m, k, n, r = 8192, 4096, 4096, 16
    inputs = draw(m, k, n, r, BF16, "cuda", bias=False, adapter=FLOAT)
    leaves = [t.requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B)]

    frozen = peak(lambda: torch.nn.functional.linear(inputs.x, inputs.weight), leaves, inputs.dy)
    ours = peak(
        lambda: lora_linear(inputs.x, inputs.weight, *leaves[1:], 2.0, dropout_p=p, backend="triton"), leaves, inputs.dy
    )
    assert ours <= 1.05 * frozen + m * r * 2 + (m * k / 8 if p else 0)
