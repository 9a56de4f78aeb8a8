"""An MLP of two layers on the kernels, with a gate in its first layer and without: the error rule, what it keeps, what
its operator is, and what it is not given."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import compare
from devices import CPU, CUDA, TRITON, saving

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from blocks import a_layer, close, results, trained
from crossed import crossed, named
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lora_fast import dispatch, lora_group, lora_mlp
from lora_fast.bases.four_bits import Nf4Weight
from lora_fast.blocks import paths, reference
from lora_fast.blocks.mlp import FusedMlp
from lora_fast.fp8 import Fp8Weight
from lora_fast.kernels import activations, mask, program
from lora_fast.kernels import mlp as mlp_kernels
from lora_fast.ops import linear

pytestmark = pytest.mark.usefixtures("poisoned")

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
# What fc1 and fc2 have.
FORMS: dict[str, list[dict]] = {
    "lora": [{}, {}],
    "bias": [{"bias": True}, {"bias": True, "r": 5}],
    "dora": [{"dora": True}, {"dora": True}],
    "biased": [{"dora": True, "bias": True}, {"dora": True, "bias": True}],
    "first": [{"dora": True, "adapter": FLOAT}, {"r": 0, "bias": True}],
    "second": [{"r": 0, "bias": True}, {"dora": True, "save": "z"}],
}
SMALL, ODD = (24, 32, 64, 48, 16), (33, 70, 45, 21, 3)  # M, K, I, N, r
GATES = None, "first", "second"


def drawn(form, gate, shape, dtype, device, seed=0, p=0.0):
    """x, the layers, and a dY in a list."""
    gen = torch.Generator(device).manual_seed(seed)
    m, k, width, n, r = shape
    x = torch.randn(m, k, generator=gen, device=device).to(dtype)
    sizes = (width * (1 if gate is None else 2), k), (n, width)
    layers = [
        a_layer(*size, dtype=dtype, device=device, gen=gen, p=p, **{"r": r, **what})
        for size, what in zip(sizes, FORMS[form], strict=True)
    ]
    return x, layers, [torch.randn(m, n, generator=gen, device=device).to(dtype)]


def turned(layers):
    """The layers over weights that are stored as [K, N]."""
    return [layer._replace(weight=layer.weight.t().contiguous().t()) for layer in layers]


def fused(act, gate):
    def fn(x, layers):
        torch.manual_seed(1)
        return lora_mlp(x, *layers, act, gate=gate, backend="triton")

    return fn


def plain(act, gate, p=0.0, shape=SMALL, device="cpu", form="lora"):
    """The reference with the masks of ``fused``: x's seed is drawn first, where fc1 has an adapter."""
    m, k, width, *_ = shape
    masks = {}
    if p:
        torch.manual_seed(1)
        adapted = FORMS[form][0].get("r") != 0, FORMS[form][1].get("r") != 0
        for name, cols, there in zip(("keep_x", "keep_h"), (k, width), adapted, strict=True):
            if there:
                bits = mask.mask_bits(linear.draw_seed(torch.device(device)), p, m, cols, torch.device(device))
                masks[name] = mask.unpack(bits, cols)

    def fn(x, layers):
        layers = [layer._replace(dropout_p=1 - 1 / mask.keep_scale(p) if p else 0.0) for layer in layers]
        return reference.lora_mlp(x, *layers, act, gate=gate, **masks)

    return fn


def here(dtype, form, act, gate=None, shape=ODD, p=0.0, fast=False):
    """A case of the interpreter's."""
    marks = CPU.marks if fast else (*CPU.marks, pytest.mark.medium)
    name = f"cpu-{str(dtype)[6:]}-{form}-{act}-{gate}-p{p}"
    return pytest.param("cpu", dtype, form, act, gate, shape, p, marks=marks, id=name)


CASES = [
    *(here(FLOAT, "bias", act, fast=act in ("relu2", "quick_gelu")) for act in activations.ACTIVATIONS),
    here(FLOAT, "lora", "silu", "first", fast=True),
    here(HALF, "dora", "silu", "second", SMALL, fast=True),
    here(HALF, "biased", "gelu", None, SMALL),
    here(HALF, "biased", "gelu", "first", p=0.3),
    here(FLOAT, "dora", "gelu_tanh", None, SMALL, p=0.3),
    here(HALF, "first", "silu", "first"),
    here(FLOAT, "second", "relu", None, p=0.3, fast=True),
    here(HALF, "second", "silu", "second", SMALL),
    *(
        pytest.param(
            "cuda",
            dtype,
            form,
            act,
            gate,
            shape,
            p,
            marks=CUDA.marks,
            id=f"cuda-{str(dtype)[6:]}-{form}-{act}-{gate}-{name}",
        )
        for dtype in (BF16, HALF, FLOAT)
        for form, act, gate in [
            *((form, "gelu", None) for form in FORMS),
            *((form, "silu", "first") for form in FORMS),
            ("dora", "silu", "second"),
            *(("bias", act, None) for act in ("relu", "relu2", "quick_gelu")),
        ]
        for name, shape, p in [
            ("many", (4096, 1024, 4096, 1024, 16), 0.1),
            ("few", (1000, 1024, 3072, 1024, 16), 0.0),
            ("odd", (1003, 1001, 333, 70, 12), 0.1),
        ]
    ),
]


@pytest.mark.medium
@pytest.mark.parametrize("device, dtype, form, act, gate, shape, p", CASES)
def test_error_rule(device, dtype, form, act, gate, shape, p):
    draws = [
        drawn(form, gate, shape, dtype, device, seed, p) for seed in range(2 if (device, dtype) == ("cpu", HALF) else 1)
    ]
    base = plain(act, gate, p, shape, device, form)
    ours = [results(fused(act, gate), *draw) for draw in draws]
    eagers = [results(base, *draw) for draw in draws]
    compare(ours, eagers, [results(base, *draw, torch.float64) for draw in draws], dtype)


TURNED = [
    *(here(FLOAT, form, "gelu_tanh", shape=SMALL, fast=form == "bias") for form in ("bias", "dora")),
    here(HALF, "biased", "gelu_tanh", p=0.3),
    here(HALF, "second", "gelu_tanh", "first", SMALL),
    *(
        pytest.param(
            "cuda", dtype, form, "gelu_tanh", None, shape, 0.1, marks=CUDA.marks, id=f"cuda-{dtype}-{form}-{shape[0]}"
        )
        for dtype in (BF16, HALF)
        for form in ("bias", "biased", "first")
        for shape in [(4096, 1024, 4096, 1024, 16), (1003, 1001, 333, 70, 12)]
    ),
]


@pytest.mark.parametrize("device, dtype, form, act, gate, shape, p", TURNED)
def test_turned_weights(monkeypatch, device, dtype, form, act, gate, shape, p):
    """As GPT-2's Conv1D stores them; nothing copies them."""
    monkeypatch.setattr(paths, "calls", {})
    draws = [drawn(form, gate, shape, dtype, device, seed, p) for seed in range(2 if device == "cpu" else 1)]
    base = plain(act, gate, p, shape, device, form)
    ours = [results(fused(act, gate), x, turned(layers), dys) for x, layers, dys in draws]
    assert paths.calls and all(isinstance(call, FusedMlp) for call in paths.calls.values())
    eagers = [results(base, *draw) for draw in draws]
    compare(ours, eagers, [results(base, *draw, torch.float64) for draw in draws], dtype)


def test_turned_group(device):
    """Beside a layer whose weight is not."""
    gen = torch.Generator(device).manual_seed(0)
    forms = {"bias": True}, {"dora": True, "r": 3}, {"r": 0}
    layers = [
        a_layer(n, 48, dtype=FLOAT, device=device, gen=gen, **{"r": 16, **form})
        for n, form in zip((32, 16, 24), forms, strict=True)
    ]
    x, dys = torch.randn(20, 48, generator=gen, device=device), [torch.ones(20, n, device=device) for n in (32, 16, 24)]
    eager = results(reference.lora_group, x, layers, dys)
    ours = results(lambda x, layers: lora_group(x, [*turned(layers[:2]), layers[2]], backend="triton"), x, layers, dys)
    for name, t in eager.items():
        close(ours[name], t, name)


def test_activations_are_torchs():
    """With transformers' modules for the three that torch has no function for."""
    from transformers.activations import ACT2FN

    e = torch.linspace(-4, 4, 33, dtype=torch.float64)
    by_name = {"gelu_tanh": "gelu_pytorch_tanh"}
    for name in activations.ACTIVATIONS:
        torch.testing.assert_close(reference.ACTIVATIONS[name](e), ACT2FN[by_name.get(name, name)](e))
    assert set(reference.ACTIVATIONS) == set(activations.ACTIVATIONS)


@pytest.mark.medium
@pytest.mark.parametrize("gate", GATES)
def test_keeps_one_output(device, gate):
    """x, fc1's output, and what is small; the gradient of that output lies where it lay, if the graph is not kept."""
    m = 96 if device == "cpu" else 512
    x, layers, dys = drawn("bias", gate, (m, 32, 256, 48, 4), HALF, device)
    x, layers = x.requires_grad_(), [trained(layer) for layer in layers]
    with saving() as saved:
        y = fused("gelu", gate)(x, layers)
    given = {t.data_ptr() for t in (x, y, *(t for layer in layers for t in layer.tensors if t is not None))}
    others = {t.data_ptr(): t for t in saved if t.data_ptr() not in given}
    size = m * len(layers[0].weight) * 2
    assert sum(t.nbytes == size for t in others.values()) == 1, "fc1's output alone"
    small = (32 + 256 + 2 * m + len(layers[0].weight) + 48) * 16 * 2 + 12 * 128
    assert sum(t.nbytes for t in others.values()) - size <= small
    leaves = [x, *(t for layer in layers for t in layer.tensors[1:] if t is not None)]
    first, second, last = (torch.autograd.grad(y, leaves, dys, retain_graph=keep) for keep in (True, True, False))
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, first, last))


@pytest.mark.medium
@pytest.mark.parametrize("gate", GATES[:2])
def test_checkpoint(device, monkeypatch, gate):
    """The second forward makes neither y nor its product; equal gradients with dropout."""
    x, layers, dys = drawn("bias", gate, SMALL, HALF, device, p=0.3)
    expected = results(fused("gelu", gate), x, layers, dys)
    launched, run = [], program.Program.run

    def counted(self, bound, first=0, last=None):
        launched.extend(launch.kernel.fn.__name__ for launch in self.launches[first:last])
        return run(self, bound, first, last)

    monkeypatch.setattr(program.Program, "run", counted)
    for reentrant in (False, True):
        launched.clear()

        def again(x, layers, reentrant=reentrant):
            return checkpoint(fused("gelu", gate), x, layers, use_reentrant=reentrant)

        found = results(again, x, layers, dys)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        if not reentrant:
            assert launched.count("_gemm_kernel") == 4, "fc1, y, dh, and fc1 again"


@pytest.mark.medium
@pytest.mark.parametrize("gate", GATES[:2])
def test_tiny_gains(device, gate):
    """float16: where gains leave y no digits of z, z is made again; fc1's dY is scaled after that."""
    x, layers, dys = drawn("dora", gate, SMALL, HALF, device)
    kinds = []
    for layer in layers:
        magnitude = layer.lora_magnitude_vector.float()
        magnitude[::3] *= 1e-3
        magnitude[1::3] = 0
        kinds.append(layer._replace(lora_magnitude_vector=magnitude))
    ours = results(fused("silu", gate), x, kinds, dys)
    truth = results(plain("silu", gate), x, kinds, dys, torch.float64)
    for name in ("m0", "m1", "A0", "B0", "dx"):
        torch.testing.assert_close(ours[name].double(), truth[name], rtol=0.02, atol=0.02 * truth[name].std())
    assert not ours["B0"][1::3].any(), "columns whose gain is 0"


@pytest.mark.medium
@pytest.mark.parametrize(
    "device, gate, kind",
    crossed([("first", Nf4Weight), (None, Fp8Weight)], GATES[:2], (Nf4Weight, Fp8Weight)),
    ids=named,
)
def test_packed_bases(device, gate, kind):
    """As the layers one by one over the same bases, whose h is quantised alike."""
    x, layers, dys = drawn("biased", gate, (24, 64, 128, 64, 16), FLOAT, device)
    weights = [kind.quantise(layer.weight) for layer in layers]

    def over(fn):
        def run(x, layers):
            return fn(x, [layer._replace(weight=weight) for layer, weight in zip(layers, weights, strict=True)])

        return run

    ours = results(over(fused("gelu", gate)), x, layers, dys)
    other = results(
        over(lambda x, layers: paths.apart.lora_mlp(x, layers, True, activation="gelu", gate=gate, backend="triton")),
        x,
        layers,
        dys,
    )
    for name, t in other.items():
        error = (ours[name] - t).norm() / t.norm()
        assert error < (0.02 if kind is Fp8Weight else 1e-4), f"{name}: {error}"


@pytest.mark.medium
@pytest.mark.parametrize("form, gate, p", [("biased", None, 0.0), ("lora", "second", 0.0), ("bias", None, 0.3)])
def test_compiled(device, form, gate, p):
    """Over turned weights, too."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor" if device == "cuda" else "aot_eager")
    x, layers, dys = drawn(form, gate, SMALL, FLOAT, device, p=p)
    if form != "lora":
        layers = turned(layers)

    def fn(x, layers):
        return lora_mlp(x, *layers, "gelu", gate=gate, backend="triton")

    ours = results(torch.compile(fn, backend=counter, fullgraph=True), x, layers, dys)
    expected = results(fn, x, layers, dys)
    assert ours.keys() == expected.keys() and counter.frame_count == 1
    for name, t in ours.items():
        assert t.isfinite().all()
        if not p:  # else other seeds than in eager
            close(t, expected[name], name)


@pytest.mark.medium
@pytest.mark.parametrize("shape", [(0, 16), (16,), (2, 3, 16)], ids=str)
def test_rows_of_all_numbers(device, shape):
    gen = torch.Generator(device).manual_seed(0)
    layers = [a_layer(*size, 4, FLOAT, device, gen=gen, bias=True, dora=True) for size in ((48, 16), (8, 24))]
    x, dy = (torch.randn(*shape[:-1], n, generator=gen, device=device) for n in (16, 8))
    ours, eager = results(fused("silu", "first"), x, layers, [dy]), results(plain("silu", "first"), x, layers, [dy])
    assert ours.keys() == eager.keys()
    for name, t in eager.items():
        close(ours[name], t, name)


def test_reference_is_plain_torch():
    gen = torch.Generator().manual_seed(0)
    layers = [a_layer(*size, 0, FLOAT, gen=gen, bias=True) for size in ((48, 16), (8, 24))]
    x = torch.randn(5, 16, generator=gen)
    e, g = F.linear(x, layers[0].weight, layers[0].bias).chunk(2, -1)
    expected = F.linear(F.silu(g) * e, layers[1].weight, layers[1].bias)
    torch.testing.assert_close(lora_mlp(x, *layers, "silu", gate="second", backend="reference"), expected)


WRONG = {
    "activation": (dict(activation="selu"), ValueError, "activation: got 'selu', expected one of 'silu'"),
    "gate": (dict(gate=1), ValueError, 'gate: got 1, expected "first", "second" or None'),
    "odd": (dict(gate="first", rows=25), ValueError, r"fc1.weight: got 25 rows, expected two halves"),
    "width": (dict(gate="first"), ValueError, r"fc2.weight: got shape \(8, 24\), expected \[N, 12\]"),
    "no layer": (dict(fc2=None), TypeError, "fc2: got NoneType, expected a Layer"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_arguments(case):
    given, error, message = WRONG[case]
    given = dict(given)
    gen = torch.Generator().manual_seed(0)
    fc1 = a_layer(given.pop("rows", 24), 16, 4, FLOAT, gen=gen)
    fc2 = given.pop("fc2", a_layer(8, 24, 4, FLOAT, gen=gen))
    with pytest.raises(error, match=message):
        lora_mlp(torch.randn(5, 16), fc1, fc2, **given)


def test_mutants_fail(device, monkeypatch):
    """The other half as the gate, and parts of the magnitude's gradient of the other half."""
    x, layers, dys = drawn("dora", "first", SMALL, FLOAT, device)
    eager, truth = (results(plain("silu", "first"), x, layers, dys, kind) for kind in (None, torch.float64))
    with pytest.raises(AssertionError, match="y0: "):
        compare([results(fused("silu", "second"), x, layers, dys)], [eager], [truth], FLOAT)
    make = mlp_kernels.glu_grad

    def exchanged(*args, parts, **others):
        return make(*args, parts=parts[::-1], **others)

    monkeypatch.setattr(paths, "calls", {})
    monkeypatch.setattr(mlp_kernels, "glu_grad", exchanged)
    with pytest.raises(AssertionError, match="m0: "):
        compare([results(fused("silu", "first"), x, layers, dys)], [eager], [truth], FLOAT)


@pytest.mark.interpreted
@pytest.mark.parametrize("first", [True, False])
def test_functorch_is_refused(monkeypatch, first):
    """As of a layer by itself; and what a call comes to rests on it, whichever was there first."""
    monkeypatch.setattr(paths, "calls", {})
    x, layers, _ = drawn("lora", None, SMALL, FLOAT, "cpu")
    x, layers = x.requires_grad_(), [layer._replace(lora_A=layer.lora_A.requires_grad_()) for layer in layers]

    def run(x):
        return lora_mlp(x, *layers, backend="triton").sum()

    if first:
        run(x).backward()
    with pytest.raises(RuntimeError, match="take no transforms of torch.func.*reference"):
        torch.func.grad(run)(x)
    run(x).backward()
    assert any(isinstance(call, FusedMlp) for call in paths.calls.values())


def test_comes_apart_and_says_so(device, monkeypatch):
    monkeypatch.setattr(dispatch, "_told", set())
    monkeypatch.setattr(paths, "calls", {})
    x, layers, dys = drawn("bias", None, SMALL, FLOAT, device)
    layers[0] = layers[0]._replace(weight=layers[0].weight[:, ::2].repeat(1, 2)[:, ::2].contiguous())
    x = x[:, :16]
    layers[0] = layers[0]._replace(
        weight=torch.randn(64, 32, device=device)[:, ::2], lora_A=layers[0].lora_A[:, :16].contiguous()
    )
    with pytest.warns(dispatch.SlowPathWarning, match="runs an MLP layer by layer: rows of a base weight"):
        fused("gelu", None)(x, layers)
