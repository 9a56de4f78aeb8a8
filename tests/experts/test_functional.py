"""The experts with LoRA as one function: formulas, every layout, slots that are nobody's, and refusals."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from lora_fast.experts.form import Adapter, ExpertsForm, Gate
from lora_fast.experts.functional import lora_experts

E, R, H, N, T, K = 5, 3, 8, 6, 11, 2  # N: what is called I elsewhere
GATES = {"silu": Gate(), "gpt_oss": Gate("gpt_oss", 1.702, 1.5), "clamped": Gate("clamped", limit=1.5)}


def problem(form, seed=0, dtype=torch.float64):
    """(arguments by name, of which some require grad)"""
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    gate_up, down = draw(E, 2 * N, H), draw(E, H, N)
    if form.transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    index = torch.stack([torch.randperm(E, generator=gen)[:K] for _ in range(T)])
    index[index == 3] = 4  # an expert without tokens
    return {
        "x": draw(T, H).requires_grad_(),
        "top_k_index": index,
        "top_k_weights": draw(T, K).abs().requires_grad_(),
        "gate_up": gate_up,
        "down": down,
        "gate_up_lora": Adapter(draw(E * R, H).requires_grad_(), draw(2 * N, R * E).requires_grad_(), 0.5),
        "down_lora": Adapter(draw(E * R, N).requires_grad_(), draw(H, R * E).requires_grad_(), 1.5),
        "gate_up_bias": draw(E, 2 * N),
        "down_bias": draw(E, H),
    }


def run(given, form, **more):
    return lora_experts(**{**given, **more}, form=form, backend="reference")


def slowly(given, form):
    """Token by token, with the weights that PEFT would merge."""
    weights = []
    for name in ("gate_up", "down"):
        lora, weight = given[f"{name}_lora"], given[name]
        weight = weight.mT if form.transposed else weight
        if lora is not None:
            a, b = lora.lora_A.reshape(E, -1, lora.lora_A.shape[1]), lora.lora_B.reshape(len(lora.lora_B), -1, E)
            weight = weight + lora.scaling * torch.einsum("ore,eri->eoi", b, a)
        weights.append(weight)
    rows, gate = [], form.gate
    for x, ids, scores in zip(given["x"], given["top_k_index"].tolist(), given["top_k_weights"], strict=True):
        total = torch.zeros_like(x)
        for e, w in zip(ids, scores, strict=True):
            if not 0 <= e < E:
                continue
            h = weights[0][e] @ x + given["gate_up_bias"][e]
            g, u = (h[::2], h[1::2]) if form.interleaved else (h[:N], h[N:])
            if gate.kind != "silu":
                g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
            a = (u + 1) * g * torch.sigmoid(gate.alpha * g) if gate.kind == "gpt_oss" else F.silu(g) * u
            total = total + w * (weights[1][e] @ a + given["down_bias"][e])
        rows.append(total)
    return torch.stack(rows)


def trained(given):
    loras = [lora for lora in (given["gate_up_lora"], given["down_lora"]) if lora is not None]
    return [given["x"], given["top_k_weights"], *(t for lora in loras for t in lora[:2])]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("transposed", "interleaved"), list(itertools.product([False, True], repeat=2)))
def test_formulas(gate, transposed, interleaved):
    form = ExpertsForm(transposed, interleaved, GATES[gate])
    given = problem(form)
    y, expected = run(given, form), slowly(given, form)
    torch.testing.assert_close(y, expected)
    dy = torch.randn(T, H, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    ours, theirs = (torch.autograd.grad(out, trained(given), dy) for out in (y, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert not ours[2].reshape(E, R, H)[3].any() and not ours[3].reshape(2 * N, R, E)[..., 3].any()


@pytest.mark.parametrize("without", ["gate_up_lora", "down_lora"])
def test_one_adapter(without):
    form = ExpertsForm()
    given = problem(form) | {without: None}
    torch.testing.assert_close(run(given, form), slowly(given, form))


@pytest.mark.parametrize("foreign", [E, -1])
def test_slots_of_nobody_add_nothing(foreign):
    """Whatever is in their weights, and in the tokens that have no other."""
    form = ExpertsForm()
    given = problem(form)
    given["top_k_index"][::2, 0] = foreign
    given["top_k_index"][3] = foreign
    expected = slowly(given, form)
    with torch.no_grad():
        given["x"][3] = math.nan
        given["top_k_weights"][::2, 0] = math.nan
    y = run(given, form)
    torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(y.sum(), trained(given))
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][3].any() and not grads[1][::2, 0].any() and not y[3].any()


def test_nobody_has_tokens():
    form = ExpertsForm()
    given = problem(form)
    given["top_k_index"][:] = E
    y = run(given, form)
    assert not y.any()
    assert not any(grad.any() for grad in torch.autograd.grad(y.sum(), trained(given)))


def test_few_tokens_and_one_expert_each():
    form = ExpertsForm()
    given = problem(form)
    for tokens, k in ((1, 1), (0, 2), (T, 1)):
        part = {name: given[name][:tokens] for name in ("x", "top_k_index", "top_k_weights")}
        part |= {name: part[name][:, :k] for name in ("top_k_index", "top_k_weights")}
        y = run(given | part, form)
        assert y.shape == (tokens, H)
        if tokens:
            torch.testing.assert_close(y, slowly(given | part, form))


def test_integers_and_dtypes():
    form = ExpertsForm()
    given = problem(form, dtype=torch.float32)
    y = run(given, form)
    assert torch.equal(run(given, form, top_k_index=given["top_k_index"].int()), y)
    half = {name: t.bfloat16() for name, t in given.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    half["top_k_weights"] = given["top_k_weights"]
    assert run(given | half, form).dtype == torch.bfloat16  # float32 adapters and routing weights on a 16-bit base
    with torch.autocast("cpu", torch.bfloat16):
        under = run(given, form)
    assert under.dtype == torch.float32
    assert (under - y).norm() < 0.02 * y.norm()


def test_shapes_without_data():
    form = ExpertsForm()
    given = {name: t for name, t in problem(form).items() if not isinstance(t, Adapter)}
    y = lora_experts(**{name: t.to("meta") for name, t in given.items()}, form=form, backend="reference")
    assert y.shape == (T, H) and y.is_meta


def changed(**more):
    return lambda given: given | more


WRONG = {
    "x": (changed(x=torch.zeros(2, 3, H)), ValueError, r"x: got shape \(2, 3, 8\), expected \[T, H\]"),
    "index dtype": (lambda g: g | {"top_k_index": g["top_k_index"].float()}, TypeError, "top_k_index: got dtype"),
    "index shape": (
        lambda g: g | {"top_k_index": g["top_k_index"][1:]},
        ValueError,
        r"top_k_index: .* \[11, k",
    ),
    "weights": (lambda g: g | {"top_k_weights": g["top_k_weights"][:, :1]}, ValueError, r"top_k_weights: .* \(11, 2\)"),
    "gate_up": (lambda g: g | {"gate_up": g["gate_up"].mT}, ValueError, r"gate_up: got shape .* expected \[E, 2I, 8\]"),
    "down": (lambda g: g | {"down": g["down"][1:]}, ValueError, r"down: got shape .* expected \(5, 8, 6\)"),
    "bias": (lambda g: g | {"down_bias": g["down_bias"][0]}, ValueError, r"down_bias: got shape .* expected \(5, 8\)"),
    "A": (
        lambda g: g | {"gate_up_lora": g["gate_up_lora"]._replace(lora_A=torch.zeros(E * R + 1, H).double())},
        ValueError,
        r"gate_up_lora.lora_A: got shape \(16, 8\), expected \[5 \* r, 8\]",
    ),
    "B": (
        lambda g: g | {"down_lora": g["down_lora"]._replace(lora_B=torch.zeros(H, R).double())},
        ValueError,
        r"down_lora.lora_B: got shape \(8, 3\), expected \(8, 15\)",
    ),
    "scaling": (
        lambda g: g | {"down_lora": g["down_lora"]._replace(scaling=math.inf)},
        ValueError,
        "down_lora.scaling: got inf",
    ),
    "no adapter": (changed(down_lora=torch.zeros(3)), TypeError, "down_lora: got Tensor, expected an Adapter"),
    "grad": (
        lambda g: g | {"down": g["down"].clone().requires_grad_()},
        ValueError,
        "down: requires grad, expected frozen",
    ),
    "dtype": (lambda g: g | {"down": g["down"].float()}, TypeError, "down: got dtype torch.float32, expected x's"),
    "device": (lambda g: g | {"down": g["down"].to("meta")}, ValueError, "down: got a tensor on meta"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what):
    change, error, match = WRONG[what]
    form = ExpertsForm()
    with pytest.raises(error, match=match):
        run(change(problem(form)), form)


def test_wrong_forms():
    with pytest.raises(TypeError, match="form: got str, expected an ExpertsForm"):
        run(problem(ExpertsForm()), "gpt_oss")
    for kwargs, match in (
        ({"kind": "gelu"}, "kind: got 'gelu'"),
        ({"limit": 0.0}, "limit: got 0.0"),
        ({"alpha": math.nan}, "alpha: got nan"),
    ):
        with pytest.raises(ValueError, match=match):
            Gate(**kwargs)
