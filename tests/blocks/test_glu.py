"""A gated MLP on the kernels: the error rule, what it keeps, whose memory it takes, and when it comes apart."""

import pytest
import torch
from accuracy import compare
from devices import CPU, CUDA, TRITON, saving

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from blocks import a_layer, close, keep_mask, results, trained
from torch.utils.checkpoint import checkpoint

from lora_fast import SlowPathWarning, dispatch, lora_glu
from lora_fast.blocks import mlp, paths, reference
from lora_fast.kernels import activations, mask, memo, pass_tiles, program
from lora_fast.kernels import glu as glu_kernels
from lora_fast.kernels import mlp as mlp_kernels
from lora_fast.ops import linear

pytestmark = pytest.mark.usefixtures("poisoned")

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
# What gate, up and down have.
FORMS: dict[str, list[dict]] = {
    "lora": [{}, {}, {}],
    "ranks": [{"r": 16}, {"r": 3, "scaling": 0.7}, {"r": 40, "scaling": 8.0}],
    "dora": [{"dora": True}] * 3,
    "bias": [{"dora": True, "bias": True}, {"bias": True}, {"bias": True, "dora": True}],
    "biased": [{"dora": True, "bias": True}, {"dora": True, "bias": True}, {}],
    "kept": [{"r": 0}, {"dora": True, "save": "z"}, {}],
    "inner": [{}, {"dora": True}, {"r": 0, "bias": True}],
    "outer": [{"r": 0}, {"r": 0}, {}],
    "one": [{"r": 0, "bias": True}, {}, {"r": 0}],
    "ends": [{"dora": True}, {"r": 0}, {"dora": True}],
    "mixed": [{"dora": True, "adapter": FLOAT}, {"adapter": FLOAT, "r": 5}, {"dora": True, "save": "z"}],
}
SMALL, ODD = (24, 32, 64, 48, 16), (33, 70, 45, 21, 3)  # M, K, I, N, r


def drawn(form, shape, dtype, device, seed=0, p=0.0):
    """x, the layers, and a dY in a list."""
    gen = torch.Generator(device).manual_seed(seed)
    m, k, width, n, r = shape
    x = torch.randn(m, k, generator=gen, device=device).to(dtype)
    sizes = (width, k), (width, k), (n, width)
    layers = [
        a_layer(*size, dtype=dtype, device=device, gen=gen, p=p, **{"r": r, **what})
        for size, what in zip(sizes, FORMS[form], strict=True)
    ]
    return x, layers, [torch.randn(m, n, generator=gen, device=device).to(dtype)]


def fused(act="silu", seed=1):
    def fn(x, layers):
        torch.manual_seed(seed)
        return lora_glu(x, *layers, act, backend="triton")

    return fn


def plain(act="silu", p=0.0, shape=SMALL, device="cpu", form="lora"):
    """The reference with the masks of ``fused``: x's seed is drawn first, where a layer with an adapter reads x."""
    if p == 0:
        return lambda x, layers: reference.lora_glu(x, *layers, act)
    m, k, width, *_ = shape
    keep_x, scale = keep_mask(p, m, k, device)
    torch.manual_seed(1)
    seeds = [linear.draw_seed(torch.device(device)) for _ in range(2)]
    keep_h = mask.unpack(mask.mask_bits(seeds[form != "outer"], p, m, width, torch.device(device)), width)

    def fn(x, layers):
        layers = [layer._replace(dropout_p=1 - 1 / scale) for layer in layers]
        return reference.lora_glu(x, *layers, act, keep_x=keep_x, keep_h=keep_h)

    return fn


ACTS = activations.ACTIVATIONS


def here(dtype, form, shape, act="silu", p=0.0, fast=False):
    """A case of the interpreter's."""
    marks = CPU.marks if fast else (*CPU.marks, pytest.mark.medium)
    return pytest.param("cpu", dtype, form, act, shape, p, marks=marks, id=f"cpu-{str(dtype)[6:]}-{form}-{act}-p{p}")


CASES = [
    *(here(FLOAT, form, SMALL, fast=form == "dora") for form in ("lora", "dora", "ranks")),
    *(here(HALF, form, ODD, fast=form == "mixed") for form in ("lora", "bias", "mixed")),
    *(here(FLOAT, "lora", ODD, act, fast=True) for act in ACTS[1:]),
    here(FLOAT, "ranks", ODD, "gelu", 0.3),
    here(HALF, "dora", SMALL, p=0.3, fast=True),
    here(FLOAT, "outer", ODD, p=0.3, fast=True),
    here(HALF, "biased", SMALL, fast=True),
    here(HALF, "kept", SMALL, p=0.3),
    *(here(HALF, form, SMALL) for form in ("inner", "one", "ends")),
    *(
        pytest.param(
            "cuda", dtype, form, act, shape, p, marks=CUDA.marks, id=f"cuda-{str(dtype)[6:]}-{form}-{act}-{name}-p{p}"
        )
        for dtype in (BF16, HALF, FLOAT)
        for form, act in [*((form, "silu") for form in FORMS), ("lora", "gelu_tanh"), ("ranks", "gelu")]
        for name, shape, p in [
            ("many", (4096, 2048, 6144, 2048, 16), 0.1),
            ("few", (1000, 1024, 3072, 1024, 16), 0.0),
            ("odd", (1003, 1001, 333, 70, 12), 0.1),
        ]
    ),
]


@pytest.mark.versions
@pytest.mark.medium
@pytest.mark.parametrize("device, dtype, form, act, shape, p", CASES)
def test_error_rule(device, dtype, form, act, shape, p):
    draws = [drawn(form, shape, dtype, device, seed, p) for seed in range(2 if (device, dtype) == ("cpu", HALF) else 1)]
    base = plain(act, p, shape, device, form)
    ours = [results(fused(act), *draw) for draw in draws]
    eagers = [results(base, *draw) for draw in draws]
    compare(ours, eagers, [results(base, *draw, torch.float64) for draw in draws], dtype)


@pytest.mark.medium
@pytest.mark.parametrize(
    "form, shape, p", [("lora", ODD, 0.3), ("ranks", SMALL, 0.0), ("dora", (40, 32, 64, 48, 70), 0.3)]
)
def test_s_on_the_way_of_h(device, form, shape, p, monkeypatch):
    """As with many rows."""
    monkeypatch.setattr(mlp_kernels, "FEW", 0)
    memo.forget_all()
    honest, ranks = mlp_kernels.glu_down, []

    def seen(e, g, h, a, *rest, **others):
        ranks.append(a is not None)
        return honest(e, g, h, a, *rest, **others)

    monkeypatch.setattr(mlp_kernels, "glu_down", seen)
    draws = [drawn(form, shape, HALF, device, seed, p) for seed in range(2)]
    base = plain("silu", p, shape, device, form)
    eagers = [results(base, *draw) for draw in draws]
    compare(
        [results(fused(), *draw) for draw in draws], eagers, [results(base, *d, torch.float64) for d in draws], HALF
    )
    assert ranks and all(ranks)
    memo.forget_all()


@pytest.mark.medium
@pytest.mark.parametrize("dtype", [HALF, FLOAT], ids=str)
def test_h_alone_of_many_rows(device, dtype, monkeypatch):
    """As where something else makes S: the bits are those of few rows."""
    x, layers, dys = drawn("lora", ODD, dtype, device)
    few = results(fused(), x, layers, dys)
    monkeypatch.setattr(pass_tiles, "FEW", 0)
    memo.forget_all()
    many = results(fused(), x, layers, dys)
    assert all(torch.equal(few[name], many[name]) for name in few)
    memo.forget_all()


@pytest.mark.medium
@pytest.mark.parametrize("form", ["lora", "bias"])
def test_graph_that_is_kept(device, form):
    """Another backward gives the same bits, and the last one, which takes the memory of e and g, too."""
    x, layers, dys = drawn(form, ODD, HALF, device, p=0.3)
    x, layers = x.requires_grad_(), [trained(layer) for layer in layers]
    leaves = [x, *(t for layer in layers for t in layer.tensors[1:] if t is not None)]
    y = fused()(x, layers)
    before = [t.detach().clone() for t in (x, y, *dys)]
    first, second, last = (torch.autograd.grad(y, leaves, dys, retain_graph=keep) for keep in (True, True, False))
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, first, last))
    assert all(map(torch.equal, before, (x, y, *dys))), "something that is not its own was written"


@pytest.mark.medium
def test_without_knowing_whether_it_is_kept(device, monkeypatch):
    x, layers, dys = drawn("dora", SMALL, HALF, device)
    expected = results(fused(), x, layers, dys)
    monkeypatch.setattr(mlp, "_keeps_graph", lambda: True)
    found = results(fused(), x, layers, dys)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_no_gradient_of_gradients(device):
    x, layers, dys = drawn("lora", SMALL, FLOAT, device)
    x, layers = x.requires_grad_(), [trained(layer) for layer in layers]
    (dx,) = torch.autograd.grad(fused()(x, layers), x, dys[0].requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def kept_of(x, layers):
    """Bytes of what is saved, by kind: x and the parameters, matrices as large as e, the rest."""
    with saving() as saved:
        y = fused()(x, layers)
    given = {t.data_ptr() for t in (x, *(t for layer in layers for t in layer.tensors if t is not None))}
    others = {t.data_ptr(): t for t in saved if t.data_ptr() not in given and t.data_ptr() != y.data_ptr()}
    size = x.shape[0] * len(layers[0].weight) * x.element_size()
    return [t for t in others.values() if t.nbytes == size], sum(t.nbytes for t in others.values() if t.nbytes != size)


@pytest.mark.medium
@pytest.mark.parametrize("form, p", [("lora", 0.0), ("lora", 0.3), ("dora", 0.0)])
def test_keeps_two_matrices(device, form, p):
    x, layers, _ = drawn(form, (512, 32, 256, 48, 4), HALF, device, p=p)
    large, small = kept_of(x.requires_grad_(), [trained(layer) for layer in layers])
    assert len(large) == 2, "e and g alone"
    stacked, s, copies = (2 * 32 + 256) * 16 * 2, 3 * 512 * 16 * 2, (2 * 256 + 48) * 16 * 2
    bits, gains = (512 * (32 + 256) // 8) * (p > 0), 2 * 4 * (2 * 256 + 48)
    assert small <= stacked + s + copies + bits + gains + 20 * 128


def test_memory_of_a_step(device, monkeypatch):
    """Counted from allocations, with no launch: e, g and h forward; e, g and dh backward, then dX without dh."""
    monkeypatch.setattr(program.Program, "run", lambda *args: None)
    m, k, width, n, r = shape = 2048, 64, 512, 64, 4
    x, layers, dys = drawn("lora", shape, HALF, device)
    x, layers = x.requires_grad_(), [trained(layer) for layer in layers]
    matrix, narrow = m * width * 2, m * k * 2
    with Counting() as forward:
        y = fused()(x, layers)
    assert 3 * matrix + narrow <= forward.peak < 3.3 * matrix + narrow and forward.now < 2.3 * matrix + narrow
    with Counting() as backward:
        y.backward(dys[0])
    assert matrix <= backward.peak < 1.3 * matrix, "dh alone, and dX after it"
    assert backward.now < 0.3 * matrix


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of tensors that were made within and are still there, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.there = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("new_empty", "empty_like", "empty", "zeros", "new_zeros"):
            import weakref

            size = found.untyped_storage().nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(found.untyped_storage(), self.freed, size)
        return found

    def freed(self, size):
        self.now -= size


@pytest.mark.medium
def test_checkpoint_skips_the_last_product(device, monkeypatch):
    x, layers, dys = drawn("lora", SMALL, HALF, device, p=0.3)
    expected = results(fused(), x, layers, dys)
    launched = []
    run = program.Program.run

    def counted(self, bound, first=0, last=None):
        launched.extend(launch.kernel.fn.__name__ for launch in self.launches[first:last])
        return run(self, bound, first, last)

    monkeypatch.setattr(program.Program, "run", counted)
    results(lambda x, layers: checkpoint(fused(), x, layers, use_reentrant=False), x, layers, dys)
    assert launched.count("_gemm_kernel") == 2 and launched.count("_fan_kernel") == 2, "y, dh; e and g, and again"
    assert launched.count("_glu_down_kernel") == 2
    for reentrant in (False, True):

        def again(x, layers, reentrant=reentrant):
            return checkpoint(fused(), x, layers, use_reentrant=reentrant)

        found = results(again, x, layers, dys)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.medium
def test_tiny_gains(device):
    """float16: where gains leave y no digits of z, z is made again, for down from e and g; de is scaled after that."""
    gen = torch.Generator(device).manual_seed(0)
    small = {"dtype": HALF, "device": device, "gen": gen, "dora": True}
    layers = [a_layer(64, 32, 4, **small), a_layer(64, 32, 4, **small), a_layer(48, 64, 4, **small)]
    for layer in layers:
        layer.lora_magnitude_vector[::3] *= 1e-3
        layer.lora_magnitude_vector[1::3] = 0
    x = torch.randn(24, 32, generator=gen, device=device).half()
    dys = [torch.randn(24, 48, generator=gen, device=device).half()]
    kinds = [layer._replace(lora_magnitude_vector=layer.lora_magnitude_vector.float()) for layer in layers]
    ours, truth = results(fused(), x, kinds, dys), results(plain(), x, kinds, dys, torch.float64)
    for name in ("m0", "m1", "m2", "A0", "B0", "A1", "B1", "dx"):
        torch.testing.assert_close(ours[name].double(), truth[name], rtol=0.02, atol=0.02 * truth[name].std())
    for i in range(2):
        assert not ours[f"B{i}"][1::3].any(), "columns whose gain is 0"


@pytest.mark.medium
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (16,), (1, 16), (2, 3, 16)], ids=str)
def test_rows_of_all_numbers(device, shape):
    gen = torch.Generator(device).manual_seed(0)
    sizes = (24, 16), (24, 16), (8, 24)
    layers = [a_layer(*size, 4, FLOAT, device, gen=gen, dora=i != 1) for i, size in enumerate(sizes)]
    x = torch.randn(*shape, generator=gen, device=device)
    dys = [torch.randn(*shape[:-1], 8, generator=gen, device=device)]
    ours, eager = results(fused(), x, layers, dys), results(plain(), x, layers, dys)
    assert ours.keys() == eager.keys()
    for name, t in eager.items():
        close(ours[name], t, name)


def test_tensors_of_other_layouts(device):
    x, layers, _ = drawn("lora", (15, 32, 64, 48, 16), FLOAT, device)
    x = torch.cat([x, x], 1)[:, 32:].view(3, 5, 32)
    dys = [torch.randn(3, 48, 5, device=device).transpose(1, 2)]
    ours, eager = results(fused(), x, layers, dys), results(plain(), x, layers, dys)
    for name, t in eager.items():
        close(ours[name], t, name)


def test_only_what_asks_for_a_gradient_gets_one(device):
    x, layers, dys = drawn("dora", SMALL, FLOAT, device)
    truth = results(plain(), x, layers, dys)
    layers = [trained(layer) for layer in layers]
    layers[0].lora_A.requires_grad_(False)
    layers[1].lora_magnitude_vector.requires_grad_(False)
    layers[2].lora_B.requires_grad_(False)
    fused()(x, layers).backward(dys[0])
    for i, layer in enumerate(layers):
        for name, t in zip("ABbm", layer.tensors[1:], strict=True):
            if t is not None:
                assert (t.grad is None) == (f"{name}{i}" in ("A0", "m1", "B2")), f"{name}{i}"
                if t.grad is not None:
                    close(t.grad, truth[f"{name}{i}"], f"{name}{i}")


def test_comes_apart_and_says_so(device, monkeypatch):
    monkeypatch.setattr(dispatch, "_told", set())
    monkeypatch.setattr(paths, "calls", {})
    x, layers, _ = drawn("lora", SMALL, FLOAT, device)
    layers[1] = layers[1]._replace(dropout_p=0.5)
    with pytest.warns(SlowPathWarning, match="runs a gated MLP layer by layer: .*differ in their dropout"):
        fused()(x, layers)


def test_mutants_fail(device, monkeypatch):
    """One gelu for the other; dA of down from dh, as if h had not been put there."""
    x, layers, dys = drawn("lora", SMALL, FLOAT, device)
    eager, truth = (results(plain("gelu"), x, layers, dys, kind) for kind in (None, torch.float64))
    with pytest.raises(AssertionError, match="y0: .*dx: .*A2: "):
        compare([results(fused("gelu_tanh"), x, layers, dys)], [eager], [truth], FLOAT)

    def elsewhere(dh, e, g, de, dg, **others):
        launch = glu_kernels.glu_grad(dh, e, g, de, dg, **others)
        launch.args = (*launch.args[:5], launch.args[4], *launch.args[6:])
        return launch

    monkeypatch.setattr(paths, "calls", {})
    monkeypatch.setattr(mlp_kernels, "glu_grad", elsewhere)
    with pytest.raises(AssertionError, match="A2: "):
        compare([results(fused("gelu"), x, layers, dys)], [eager], [truth], FLOAT)
