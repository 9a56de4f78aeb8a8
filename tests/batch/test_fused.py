"""Several adapters in one batch on the kernels: the error rule, blocks of rows that adapters share, NaN, dropout, many
adapters, and what autograd makes of it."""

import warnings

import pytest
import torch
from accuracy import compare
from devices import TRITON

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from batches import an_adapter, results
from crossed import crossed, named
from fused import seed_drawn
from kept import launched

from lora_fast import SlowPathWarning, dora_linear_batch, lora_linear_batch
from lora_fast.bases.four_bits import BlockWeight, Mxfp4Weight, Nf4Weight
from lora_fast.batch import fused as by_addresses
from lora_fast.batch import reference
from lora_fast.kernels import mask

pytestmark = pytest.mark.usefixtures("poisoned")

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32


def drawn(shape, ranks, dtype, device, seed=0, p=0.0, bias=True, dora=False):
    m, k, n = shape
    gen = torch.Generator(device).manual_seed(seed)
    x, dy = (torch.randn(m, width, generator=gen, device=device).to(dtype) for width in (k, n))
    weight = (torch.randn(n, k, generator=gen, device=device) * k**-0.5).to(dtype)
    adapters = [
        an_adapter(n, k, r, dtype, device, gen=gen, dora=dora, scaling=(2.0, 0.5, 12.0)[i % 3], p=p if i % 2 else 0.0)
        for i, r in enumerate(ranks)
    ]
    which = torch.randint(-1, len(ranks), (m,), generator=gen, device=device)
    return x, weight, adapters, which, torch.randn(n, generator=gen, device=device).to(dtype) if bias else None, dy


def fused(x, weight, adapters, which, bias):
    torch.manual_seed(1)
    call = lora_linear_batch if adapters[0].lora_magnitude_vector is None else dora_linear_batch
    return call(x, weight, adapters, which, bias, backend="triton")


def plain(x, weight, adapters, which, bias):
    """The reference with the mask of ``fused``."""
    keep, p = None, max(one.dropout_p for one in adapters)
    if p:
        bits = mask.mask_bits(seed_drawn(x.device, 1), p, len(x), x.shape[1], x.device)
        dropping = torch.tensor([one.dropout_p > 0 for one in adapters] + [False], device=x.device)
        keep = mask.unpack(bits, x.shape[1]) | ~dropping[which.long()][:, None]
        rate = 1 - 1 / mask.keep_scale(p)
        adapters = [one._replace(dropout_p=rate if one.dropout_p else 0.0) for one in adapters]
    lora = adapters[0].lora_magnitude_vector is None
    call = reference.lora_linear_batch if lora else reference.dora_linear_batch
    return call(x, weight, adapters, which, bias, keep=keep)


def hold(draws, dtype):
    ours = [results(fused, *draw) for draw in draws]
    eagers = [results(plain, *draw) for draw in draws]
    compare(ours, eagers, [results(plain, *draw, torch.float64) for draw in draws], dtype)


SHAPES = {"even": ((40, 64, 48), 0.0), "odd": ((33, 70, 45), 0.3)}  # and their dropout
SMALL = {"few": (16, 3, 12), "one": (5,), "many": (40, 16, 4, 30, 8)}
TARGETS = [(8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096), (4096, 8192, 8192), (16384, 4096, 4096)]


@pytest.mark.medium
@pytest.mark.parametrize(
    "device, dtype, ranks, shape",
    crossed(
        [
            (FLOAT, "few", "even"),
            (FLOAT, "one", "odd"),
            (FLOAT, "many", "even"),
            (HALF, "few", "odd"),
            (HALF, "one", "even"),
            (HALF, "many", "odd"),
        ],
        (FLOAT, HALF),
        SMALL,
        SHAPES,
    ),
    ids=named,
)
def test_error_rule(device, dtype, ranks, shape):
    shape, p = SHAPES[shape]
    seeds = range(2 if device == "cpu" else 16)
    hold([drawn(shape, SMALL[ranks], dtype, device, seed, p) for seed in seeds], dtype)


REAL = [(BF16, shape, 4) for shape in TARGETS] + [
    (dtype, TARGETS[0], count) for dtype in (BF16, HALF, FLOAT) for count in (4, 16, 64)
][1:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, shape, count", REAL)
def test_error_rule_at_real_shapes(dtype, shape, count):
    x, weight, adapters, _, bias, dy = drawn(shape, (16,) * count, dtype, "cuda", p=0.1 if count == 4 else 0.0)
    which = torch.arange(shape[0], device="cuda") * count // shape[0]
    hold([(x, weight, adapters, which, bias, dy)], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, HALF, FLOAT], ids=str)
def test_error_rule_with_rows_in_any_order(dtype):
    hold([drawn((1003, 1001, 777), (4, 40, 16, 100, 7, 16, 33, 8), dtype, "cuda", p=0.2)], dtype)


@pytest.mark.versions
@pytest.mark.medium
@pytest.mark.parametrize(
    "dtype, bias, p", [(FLOAT, True, 0.0), (FLOAT, False, 0.3), (HALF, False, 0.0), (HALF, True, 0.3)]
)
def test_dora(device, dtype, bias, p):
    seeds = range((2 if dtype == HALF else 1) if device == "cpu" else 16)
    hold([drawn((33, 70, 45), (16, 3, 40), dtype, device, seed, p, bias, True) for seed in seeds], dtype)


KINDS = BlockWeight, Nf4Weight, Mxfp4Weight


@pytest.mark.versions
@pytest.mark.medium
@pytest.mark.parametrize(
    "device, kind, dora",
    crossed([(BlockWeight, False), (Nf4Weight, True), (Mxfp4Weight, False)], KINDS, (False, True)),
    ids=named,
)
def test_packed_bases_have_the_bits_of_their_dense_form(device, kind, dora):
    x, weight, adapters, which, _, dy = drawn((40, 64, 48), (8, 5), HALF, device, bias=False, dora=dora)
    packed = kind.quantise(weight)
    expected = results(fused, x, packed.multiplied(), adapters, which, None, dy)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPathWarning)
        for _ in range(2):  # the second by what was settled for such calls
            found = results(fused, x, packed, adapters, which, None, dy)
            assert all(torch.equal(t, expected[name]) for name, t in found.items())


@pytest.mark.parametrize("dtype, bias", [(FLOAT, True), (HALF, False)], ids=str)
def test_dora_where_blocks_of_rows_are_one_adapters(device, dtype, bias):
    """One adapter's, no one's, shared, another's, and a part of a block."""
    x, weight, adapters, which, bias, dy = drawn((520, 24, 20), (8, 5), dtype, device, bias=bias, dora=True)
    for first, own in ((0, 1), (128, -1), (384, 0), (512, 1)):
        which[first : first + 128] = own
    assert set(which[256:384].tolist()) == {-1, 0, 1}
    hold([(x, weight, adapters, which, bias, dy)], dtype)


@pytest.mark.versions
@pytest.mark.medium
@pytest.mark.parametrize("ranks", [(16, 3), (33, 40)], ids=str)
def test_norms_whose_terms_come_in_parts(device, ranks):
    """Along a long way, with |w|^2 on the way and by itself."""
    seeds = range(2 if device == "cpu" else 3)
    hold([drawn((24, 1100, 24), ranks, HALF, device, seed, bias=False, dora=True) for seed in seeds], HALF)


@pytest.mark.versions
@pytest.mark.medium
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
def test_magnitudes_that_are_zero_or_tiny(device, dtype):
    """What the forward keeps, y, carries no z where gains are that small: their z is made again, of the adapter's own
    rows. A NaN in rows of others does not reach it."""
    rows = 40 if (device, dtype) == ("cpu", FLOAT) else 150
    x, weight, adapters, which, _, dy = drawn((rows, 40, 48), (16, 3, 40), dtype, device, bias=False, dora=True)
    for one, columns in zip(adapters, (slice(0, 48), slice(5, 6), slice(0, 0)), strict=True):
        one.lora_magnitude_vector[columns] = torch.tensor([0.0, 1e-35 if dtype == FLOAT else 1e-6], device=device)[
            torch.arange(48, device=device)[columns] % 2
        ].to(dtype)
    hold([(x, weight, adapters, which, None, dy)], dtype)
    found = results(fused, x, weight, adapters, which, None, dy)
    x[which == 2], dy[which == -1] = torch.nan, torch.inf
    again = results(fused, x, weight, adapters, which, None, dy)
    assert all(torch.equal(t, again[name]) for name, t in found.items() if name.endswith(("0", "1")))


@pytest.mark.parametrize("save", ["auto", "z"])
def test_the_output_may_be_changed_in_place_where_z_is_saved(device, save):
    x, weight, adapters, which, _, dy = drawn((24, 32, 24), (8, 5), FLOAT, device, bias=False, dora=True)
    leaves = [one._replace(lora_magnitude_vector=one.lora_magnitude_vector.requires_grad_()) for one in adapters]
    for one in leaves:
        one.lora_A.requires_grad_(), one.lora_B.requires_grad_()
    y = dora_linear_batch(x, weight, leaves, which, backend="triton", save=save).mul_(2.0)
    if save == "auto":
        with pytest.raises(RuntimeError, match='(?s)inplace operation.*save="z"'):
            y.backward(dy)
        return
    y.backward(dy)
    expected = results(fused, x, weight, adapters, which, None, 2 * dy)
    assert all(torch.equal(one.lora_B.grad, expected[f"dlora_B{i}"]) for i, one in enumerate(leaves))


@pytest.mark.parametrize("ranks", [(8, 5), (8, 80)], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
def test_norms_of_rows_that_cancel(device, dtype, ranks):
    """An adapter that all but undoes some rows of the base's weight, one to the last bit. Rows of x pick elements, so
    that what is rounded is the gain."""
    x, weight, adapters, which, _, _ = drawn((64, 64, 48), ranks, dtype, device, dora=True)
    x.copy_(torch.eye(64))
    one = adapters[1]._replace(lora_A=torch.zeros_like(adapters[1].lora_A), scaling=-1.0)
    one.lora_A[0], one.lora_B[:, 0] = weight[3], 0
    one.lora_B[3, 0], one.lora_B[5] = 1, 0
    weight[4], weight[5] = (weight[3].float() * 1.002).to(dtype), 0
    one.lora_B[4, 0] = 1
    adapters = [adapters[0], one]
    exact = [a._replace(**{n: t.double() for n, t in a._asdict().items() if torch.is_tensor(t)}) for a in adapters]
    truth = {"y": plain(x.double(), weight.double(), exact, which, None)}
    if (device, dtype) == ("cuda", FLOAT):  # products of three parts in tf32, as one adapter's norms are made
        assert (fused(x, weight, adapters, which, None) - truth["y"]).norm() < 1e-6 * truth["y"].norm()
        return
    compare(
        [{"y": fused(x, weight, adapters, which, None)}],
        [{"y": plain(x, weight, adapters, which, None)}],
        [truth],
        dtype,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, HALF, FLOAT], ids=str)
def test_dora_at_real_shapes(dtype):
    x, weight, adapters, _, bias, dy = drawn((4096, 4096, 2048), (16, 16, 8, 64), dtype, "cuda", p=0.1, dora=True)
    hold([(x, weight, adapters, torch.arange(4096, device="cuda") // 1000 - 1, bias, dy)], dtype)


@pytest.mark.versions
@pytest.mark.medium
@pytest.mark.parametrize("offset", [1, 63, 64, 127, 128, 129])
def test_blocks_shared_at_every_offset(device, offset):
    x, weight, adapters, _, bias, dy = drawn((140, 32, 24), (8, 5), FLOAT, device)
    which = (torch.arange(140, device=device) >= offset).int()
    hold([(x, weight, adapters, which, bias, dy)], FLOAT)


NARROW, WIDE = (8, 5, 16), (40, 16, 30)


@pytest.mark.medium
@pytest.mark.parametrize(
    "device, ranks, dora", crossed([(NARROW, False), (WIDE, True)], (NARROW, WIDE), (False, True)), ids=named
)
def test_nan_stays_in_its_row_and_its_adapter(device, ranks, dora):
    x, weight, adapters, _, _, dy = drawn((36, 32, 24), ranks, FLOAT, device, bias=False, dora=dora)
    which = torch.arange(36, device=device) % 4 - 1
    clean = results(fused, x, weight, adapters, which, None, dy)
    x[5], dy[5], x[4], dy[4] = torch.nan, torch.nan, torch.inf, torch.nan  # adapter 0, and none
    found = results(fused, x, weight, adapters, which, None, dy)
    for name, t in found.items():
        if name.endswith("0"):
            assert not t.isfinite().all(), name
        elif name in ("y", "dx"):
            assert (~t.isfinite()).any(1).nonzero().flatten().tolist() == [4, 5], name
        else:
            assert torch.equal(t, clean[name]), name


@pytest.mark.parametrize(
    "device, ranks, broken",
    crossed([(NARROW, "lora_B"), (WIDE, "lora_A")], (NARROW, WIDE), ("lora_A", "lora_B")),
    ids=named,
)
def test_a_diverged_adapter_leaves_the_others_alone(device, broken, ranks):
    x, weight, adapters, _, _, dy = drawn((36, 32, 24), ranks, FLOAT, device, bias=False)
    which = torch.arange(36, device=device) % 4 - 1
    clean = results(fused, x, weight, adapters, which, None, dy)
    getattr(adapters[1], broken)[0, 2] = torch.nan
    found = results(fused, x, weight, adapters, which, None, dy)
    others = which != 1
    assert found["y"][~others].isnan().all() and found["dlora_A1"].isnan().any() and found["dlora_B1"].isnan().any()
    for name in ("y", "dx"):
        assert torch.equal(found[name][others], clean[name][others]), name
    assert all(torch.equal(found[name], t) for name, t in clean.items() if name.endswith(("0", "2")))


def test_adapters_that_occur_nowhere_get_zeros(device):
    x, weight, adapters, _, bias, dy = drawn((40, 32, 24), (8, 40, 40), HALF, device)
    found = results(fused, x, weight, adapters, torch.full((40,), 1, device=device), bias, dy)
    assert not any(t.any() for name, t in found.items() if name.endswith(("0", "2")))
    none = results(fused, x, weight, adapters, torch.full((40,), -1, device=device), bias, dy)
    torch.testing.assert_close(none["y"], torch.nn.functional.linear(x, weight, bias), rtol=2e-3, atol=2e-3)
    assert not any(t.any() for name, t in none.items() if name.startswith("dlora"))


def test_samples_and_numbers_past_the_last(device):
    x, weight, adapters, _, bias, dy = drawn((24, 32, 24), (8, 5), FLOAT, device)
    which = torch.tensor([0, 1, -1, 1], device=device, dtype=torch.int16)
    ours = results(fused, x.view(4, 6, 32), weight, adapters, which, bias, dy.view(4, 6, 24))
    rows = results(fused, x, weight, adapters, which.repeat_interleave(6), bias, dy)
    assert all(torch.equal(t.view(rows[name].shape), rows[name]) for name, t in ours.items())


def test_only_what_asks_for_a_gradient_gets_one(device):
    x, weight, adapters, which, bias, dy = drawn((24, 32, 24), (8, 5), FLOAT, device)
    truth = results(fused, x, weight, adapters, which, bias, dy)
    leaf = adapters[1].lora_B.clone().requires_grad_()
    y = fused(x, weight, [adapters[0], adapters[1]._replace(lora_B=leaf)], which, bias)
    y.backward(dy)
    assert torch.equal(leaf.grad, truth["dlora_B1"])
    with torch.no_grad():
        assert torch.equal(fused(x, weight, adapters, which, bias), y)


@pytest.mark.filterwarnings("ignore:.*transform of torch.func")
def test_a_transform_after_a_step(device):
    """Runs the adapters one after the other; what took the step before does not serve it, nor this a step."""
    x, weight, (adapter,), which, bias, dy = drawn((24, 32, 24), (5,), FLOAT, device)
    leaf = adapter.lora_B.clone().requires_grad_()

    def of(b):
        return (fused(x, weight, [adapter._replace(lora_B=b)], which, bias) * dy).sum()

    for _ in range(2):
        with launched() as started:
            (expected,) = torch.autograd.grad(of(leaf), leaf)
        assert started
        torch.testing.assert_close(torch.func.grad(of)(leaf.detach()), expected)


def test_two_runs_give_the_same_bits_and_write_nothing_else(device):
    given = drawn((72, 32, 24), (40, 5, 40), HALF, device, p=0.3)
    tensors = [t for t in (*given[:2], *given[3:]) if t is not None]
    before = [t.clone() for t in tensors]
    first, second = results(fused, *given), results(fused, *given)
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    assert all(map(torch.equal, before, tensors))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_are_read_where_they_lie(device, dora, monkeypatch):
    """With the bits of copies one behind the other, which they are where one does not start as kernels can read it."""
    asked = []
    honest = by_addresses.addresses_on

    def watched(*args):
        asked.append(honest(*args))
        return asked[-1]

    monkeypatch.setattr(by_addresses, "addresses_on", watched)
    one = drawn((40, 64, 48), (16, 3, 12), FLOAT, device, dora=dora)
    found = results(fused, *one)
    x, weight, adapters, *rest = one
    memory = torch.empty(3 * 64 + 1, device=device)
    memory[1:] = adapters[1].lora_A.detach().flatten()
    shifted = [adapters[0], adapters[1]._replace(lora_A=memory[1:].view(3, 64)), adapters[2]]
    for name, t in results(fused, x, weight, shifted, *rest).items():
        assert torch.equal(t, found[name]), name
    assert asked[0] is not None and asked[-1] is None


@pytest.mark.gpu
def test_a_cuda_graph_serves_any_rows():
    x, weight, adapters, which, bias, dy = drawn((512, 256, 384), (16, 40, 8, 64), BF16, "cuda")
    adapters = [
        one._replace(lora_A=one.lora_A.requires_grad_(), lora_B=one.lora_B.requires_grad_()) for one in adapters
    ]
    leaves = [t for one in adapters for t in one.tensors[:2]]
    x.requires_grad_()

    def step():
        y = fused(x, weight, adapters, which, bias)
        return y.detach(), *torch.autograd.grad(y, [x, *leaves], dy)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        gen = torch.Generator("cuda").manual_seed(seed)
        which.copy_(torch.randint(-1, 4, (512,), generator=gen, device="cuda"))
        with torch.no_grad():
            adapters[seed].lora_A.mul_(1.5)  # as a step of an optimiser does
        graph.replay()
        assert all(map(torch.equal, captured, step()))


def test_numbers_may_be_tensors_and_come_first_in_inference(device):
    x, weight, adapters, which, bias, dy = drawn((24, 32, 24), (8, 5), HALF, device, seed=7)
    with torch.inference_mode():
        first = fused(x, weight, adapters, which, bias)
    expected = results(fused, x, weight, adapters, which, bias, dy)
    assert torch.equal(first.clone(), expected["y"])
    tensors = [one._replace(scaling=torch.tensor(one.scaling, device=device)) for one in adapters]
    found = results(fused, x, weight, tensors, which, bias, dy)
    assert all(torch.equal(t, expected[name]) for name, t in found.items())


def test_autocast_and_adapters_of_other_dtypes(device):
    """Adapters and their gradients in dtypes of their own, x of any strides."""
    x, weight, adapters, which, bias, dy = drawn((24, 32, 24), (8, 5), FLOAT, device)
    kinds = [torch.float64, FLOAT]
    mixed = [
        one._replace(lora_A=one.lora_A.to(kind), lora_B=one.lora_B.to(kind))
        for one, kind in zip(adapters, kinds, strict=True)
    ]
    expected = results(fused, x, weight, adapters, which, bias, dy)
    found = results(fused, x.T.contiguous().T, weight, mixed, which, bias, dy)
    for name, t in found.items():
        torch.testing.assert_close(t.float(), expected[name], rtol=1e-4, atol=1e-4)
    assert found["dlora_A0"].dtype == found["dlora_B0"].dtype == torch.float64
    dtype = HALF if device == "cpu" else BF16
    with torch.autocast(device, dtype):
        assert fused(x, weight, adapters, which, bias).dtype == dtype
