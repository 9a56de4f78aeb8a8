"""lora_embedding: the error rule, a fixed order of sums, what is refused; in plain torch and on the kernels."""

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import compare
from devices import TRITON, saving

from lora_fast import SlowPathWarning, reference
from lora_fast.embedding import lora_embedding

HALF, BF16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
NAMES = ("dA", "dB", "dm")

# ids, vocabulary, columns, rank; dtype of the adapters; whether there is a factor; an id that is padding
SMALL = [((150, 7, 40, 3), None, False, None), ((70, 50, 33, 70), FLOAT, True, 4)]
LARGE = [
    ((8192, 32000, 2048, 8), FLOAT, False, None),
    ((4096, 50257, 768, 16), None, True, 11),
    ((1003, 1001, 515, 100), None, False, None),
    ((16384, 3, 256, 8), FLOAT, False, 2),
]
CASES = [pytest.param("cpu", dtype, *case, marks=pytest.mark.interpreted) for dtype in (FLOAT, HALF) for case in SMALL]
CASES += [pytest.param("cuda", dtype, *case, marks=pytest.mark.gpu) for dtype in (BF16, HALF, FLOAT) for case in LARGE]
BOTH = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


def draw(shape, dtype, device, adapter=None, factor=False, padding=None, seed=0):
    """Arguments of ``lora_embedding``, and dy."""
    m, v, n, r = shape
    gen = torch.Generator(device).manual_seed(seed)

    def normal(*size, std=1.0, kind=dtype):
        return (std * torch.randn(*size, generator=gen, device=device)).to(kind)

    given = {
        "ids": torch.randint(v, (m,), generator=gen, device=device),
        "weight": normal(v, n),
        "lora_embedding_A": normal(r, v, kind=adapter or dtype),
        "lora_embedding_B": normal(n, r, std=0.5 * r**-0.5, kind=adapter or dtype),
        "scaling": 1.5,
        "magnitude": normal(n, kind=FLOAT),
        "embed_scale": torch.tensor(3.3, device=device) if factor else None,
        "padding_idx": padding,
    }
    return given, normal(m, n)


def eager(ids, weight, lora_embedding_A, lora_embedding_B, scaling, magnitude=None, embed_scale=None, padding_idx=None):
    """PEFT's formula, the adapters in the dtype of their product and its sum in float32 or better."""
    wide = torch.promote_types(weight.dtype, FLOAT)
    factor = 1 if embed_scale is None else embed_scale.to(weight.dtype)
    low = F.embedding(ids, lora_embedding_A.t(), padding_idx) @ lora_embedding_B.t() * scaling
    z = (F.embedding(ids, weight) * factor).to(wide) + low * (1 if embed_scale is None else embed_scale)
    if magnitude is not None:
        dense = weight.to(wide).t() + scaling * (lora_embedding_B.to(wide) @ lora_embedding_A.to(wide))
        z = z * (magnitude / torch.linalg.vector_norm(dense.detach(), dim=1))
    return z.to(weight.dtype)


def results(fn, given, dy, dora, dtype=None):
    """y and the gradients."""
    given = {k: t.to(dtype) if dtype and isinstance(t, torch.Tensor) and k != "ids" else t for k, t in given.items()}
    names = ["lora_embedding_A", "lora_embedding_B", *(["magnitude"] if dora else [])]
    if not dora:
        given["magnitude"] = None
    given |= {name: given[name].detach().clone().requires_grad_() for name in names}
    y = fn(**given)
    grads = torch.autograd.grad(y, [given[name] for name in names], dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(NAMES, grads, strict=False))}


def ours(backend):
    return lambda **given: lora_embedding(**given, backend=backend)


@pytest.mark.medium
@BOTH
@pytest.mark.parametrize("device, dtype, shape, adapter, factor, padding", CASES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_error_rule(device, dtype, shape, adapter, factor, padding, dora):
    pooled = 4 if device == "cpu" else 1
    draws = [draw(shape, dtype, device, adapter, factor, padding, seed) for seed in range(pooled)]
    if factor:  # rounded as E is, which no formula in float64 does
        for given, _ in draws:
            given["embed_scale"] = given["embed_scale"].to(dtype).float()
    found, base, truth = (
        [results(fn, *one, dora, kind) for one in draws]
        for fn, kind in ((ours("triton"), None), (eager, None), (eager, DOUBLE))
    )
    for one, other in zip(found, base, strict=True):
        assert {name: t.dtype for name, t in one.items()} == {name: t.dtype for name, t in other.items()}
    compare(found, base, truth, dtype)


@BOTH
def test_formula(path, dora):
    for shape, padding in (((2, 9, 8, 2), None), ((40, 9, 24, 20), 3)):
        given, dy = draw(shape, FLOAT, path[1], factor=True, padding=padding)
        found, expected = (results(fn, given, dy, dora) for fn in (ours(path[0]), eager))
        for name, t in expected.items():
            torch.testing.assert_close(found[name], t, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        if padding is not None:
            assert not found["dA"][:, padding].any()


@pytest.mark.skipif(not TRITON, reason="needs Triton")
@BOTH
def test_two_runs_give_the_same_bits_and_little_is_kept(device, dora):
    """However long the runs of equal ids are: here over many blocks, and beginning and ending within one."""
    given, dy = draw((500, 60, 40, 5), FLOAT, device)
    given["ids"][:400] = 31
    given["ids"] = given["ids"][torch.randperm(500)].view(5, 100)
    dy = dy.view(5, 100, 40)
    with saving() as kept:
        first = results(ours("triton"), given, dy, dora)
    again = results(ours("triton"), given, dy, dora)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not [t for t in kept if t.shape == dy.shape]
    expected = results(eager, given, dy, dora)
    for name, t in expected.items():
        torch.testing.assert_close(first[name], t, rtol=1e-4, atol=1e-4)


def test_other_forms(path):
    """int32, no dimensions, no ids, a scaling in a tensor, adapters that are transposed, and one that is frozen."""
    given, dy = draw((6, 9, 8, 2), FLOAT, path[1])
    expected = results(ours(path[0]), given, dy, True)
    a = given["lora_embedding_A"].t().contiguous().t()
    other = given | {"ids": given["ids"].int(), "scaling": torch.tensor(1.5, device=path[1]), "lora_embedding_A": a}
    torch.testing.assert_close(results(ours(path[0]), other, dy, True), expected)
    call = ours(path[0])
    torch.testing.assert_close(call(**given | {"ids": given["ids"][2]}), expected["y"][2])
    assert call(**given | {"ids": given["ids"][:0]}).shape == (0, 8)
    b = given["lora_embedding_B"].clone().requires_grad_()
    y = call(**given | {"lora_embedding_B": b})
    torch.testing.assert_close(torch.autograd.grad(y, b, dy)[0], expected["dB"])


@pytest.mark.skipif(not TRITON, reason="needs Triton")
def test_ids_outside_read_nothing(device):
    given, dy = draw((6, 9, 8, 2), FLOAT, device)
    inside = results(ours("triton"), given | {"ids": given["ids"][:4]}, dy[:4], False)
    given["ids"][4:] = torch.tensor([9, -1])
    found = results(ours("triton"), given, dy, False)
    assert found["y"][4:].isnan().all() and torch.equal(found["y"][:4], inside["y"])
    torch.testing.assert_close(found["dA"], inside["dA"])
    with pytest.raises(IndexError):
        lora_embedding(
            **{k: t.cpu() if isinstance(t, torch.Tensor) else t for k, t in given.items()}, backend="reference"
        )


@pytest.mark.parametrize("outside", [[-100] * 5, [-1] * 70, [-200] * 65, [-200] * 64, [9] * 70])
def test_many_ids_outside(device, outside):
    """Whole blocks of them, and blocks that they fill up."""
    given, dy = draw((12, 9, 8, 2), FLOAT, device)
    inside = results(ours("triton"), given, dy, False)
    given["ids"] = torch.cat([given["ids"], torch.tensor(outside, device=device)])
    found = results(ours("triton"), given, torch.cat([dy, dy.new_ones(len(outside), dy.shape[1])]), False)
    assert found["y"][12:].isnan().all() and torch.equal(found["y"][:12], inside["y"])
    torch.testing.assert_close(found["dA"], inside["dA"])


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_stays_with_its_id(device, value):
    given, dy = draw((5, 20, 8, 2), FLOAT, device)
    given["ids"] = torch.tensor([3, 7, 7, 9, 12], device=device)
    clean = results(ours("triton"), given, dy, False)["dA"]
    dy[0] = value
    found = results(ours("triton"), given, dy, False)["dA"]
    assert not found[:, 3].isfinite().any()
    found[:, 3] = clean[:, 3]
    torch.testing.assert_close(found, clean)


@pytest.mark.skipif(not TRITON, reason="needs Triton")
def test_tf32_is_as_torch_is_set_now(device):
    """Forward and backward, whatever it was in the step before."""
    given, dy = draw((40, 30, 48, 24), FLOAT, device)
    steps = {}
    for allowed in (True, False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        found = list(results(ours("triton"), given, dy, True).values())
        steps.setdefault(allowed, found)
        assert all(map(torch.equal, steps[allowed], found))
    assert not any(map(torch.equal, steps[True], steps[False]))


@pytest.mark.interpreted
def test_gradcheck():
    given, _ = draw((5, 7, 4, 2), DOUBLE, "cpu")
    leaves = [given[name].double().requires_grad_() for name in ("lora_embedding_A", "lora_embedding_B")]
    fixed = {k: t for k, t in given.items() if k not in ("lora_embedding_A", "lora_embedding_B", "magnitude")}

    def call(a, b):
        return lora_embedding(lora_embedding_A=a, lora_embedding_B=b, **fixed, backend="triton")

    assert torch.autograd.gradcheck(call, leaves, eps=1e-4, atol=1e-4)


@pytest.mark.medium
@BOTH
def test_compiles_to_one_graph(path, dora):
    given, dy = draw((20, 9, 8, 2), FLOAT, path[1])
    expected = results(ours(path[0]), given, dy, dora)
    torch.compiler.reset()
    compiled = torch.compile(ours(path[0]), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(compiled, given, dy, dora), expected)


BAD = [
    ({"ids": [1]}, TypeError, "ids: got list, expected a tensor"),
    ({"ids": torch.ones(3)}, TypeError, "ids: got dtype torch.float32, expected int32 or int64"),
    ({"weight": torch.ones(9, 8).int()}, TypeError, "weight: got dtype torch.int32"),
    ({"weight": torch.ones(9)}, ValueError, r"weight: got shape \(9,\), expected \[V, N\]"),
    ({"weight": torch.ones(9, 8, requires_grad=True)}, ValueError, "weight: requires grad"),
    ({"lora_embedding_A": torch.ones(2, 8)}, ValueError, r"lora_embedding_A: got shape \(2, 8\), expected \[r, 9\]"),
    ({"lora_embedding_B": torch.ones(2, 8)}, ValueError, r"lora_embedding_B: got shape \(2, 8\), expected \(8, 2\)"),
    ({"lora_embedding_B": torch.ones(8, 2, device="meta")}, ValueError, "lora_embedding_B: got a tensor on meta"),
    ({"magnitude": torch.ones(9)}, ValueError, r"magnitude: got shape \(9,\), expected \(8,\)"),
    ({"scaling": "2"}, TypeError, "scaling: got str"),
    ({"scaling": math.inf}, ValueError, "scaling: got inf"),
    ({"embed_scale": torch.ones(2)}, ValueError, "embed_scale: got a torch.float32 tensor of shape"),
    ({"padding_idx": 9}, ValueError, "padding_idx: got 9, expected one of 0 to 8"),
    ({"padding_idx": True}, TypeError, "padding_idx: got True"),
    ({"round_norm": 1}, TypeError, "round_norm: got 1, expected True or False"),
    ({"backend": "cuda"}, ValueError, "backend: got 'cuda'"),
]


@pytest.mark.parametrize("wrong, kind, message", BAD, ids=lambda value: str(value)[:40])
def test_bad_input(wrong, kind, message):
    given, _ = draw((3, 9, 8, 2), FLOAT, "cpu")
    with pytest.raises(kind, match=message):
        lora_embedding(**given | wrong)


def test_rounded_norm_and_a_number_for_a_factor():
    given, _ = draw((6, 9, 8, 2), BF16, "cpu", adapter=FLOAT)
    dense = given["weight"].float().t() + 1.5 * given["lora_embedding_B"] @ given["lora_embedding_A"]
    norm = torch.linalg.vector_norm(dense, dim=1)
    y = reference.lora_embedding(*list(given.values())[:6], 2.0, None, True).float()
    plain = 2 * dense.t()[given["ids"]]
    torch.testing.assert_close(y, plain * (given["magnitude"] / norm.bfloat16().float()), rtol=0.01, atol=0.01)


def test_plain_torch_is_told_of():
    from lora_fast import dispatch

    given, _ = draw((3, 9, 8, 2), FLOAT, "cpu")
    dispatch._told.clear(), dispatch._decided.clear()
    with pytest.warns(SlowPathWarning, match="takes the plain torch path"):
        lora_embedding(**given)
