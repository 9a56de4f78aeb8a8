"""Several adapters in one batch as callers see them: against runs of each adapter on its rows, NaN, bad input."""

import pytest
import torch
from batches import an_adapter, apart, results

import lora_fast
from lora_fast import Adapter, dora_linear_batch, lora_linear_batch

FORMS = {"lora": lora_linear_batch, "dora": dora_linear_batch}
FLOAT = torch.float32


def drawn(form="lora", lead=(12,), k=24, n=20, ranks=(3, 16, 5), dtype=FLOAT, bias=True, seed=0):
    gen = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(*lead, width, generator=gen).to(dtype) for width in (k, n))
    weight = torch.randn(n, k, generator=gen).to(dtype) * k**-0.5
    scalings = 2.0, 0.5, torch.tensor(1.5)
    adapters = [
        an_adapter(n, k, r, dtype, gen=gen, dora=form == "dora", scaling=s)
        for r, s in zip(ranks, scalings, strict=False)
    ]
    return x, weight, adapters, torch.randn(n, generator=gen).to(dtype) if bias else None, dy


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lead, shape", [((12,), (12,)), ((3, 4), (3,)), ((3, 4), (3, 4)), ((2, 3, 2), (2, 3))])
def test_equals_runs_of_their_own(form, lead, shape):
    x, weight, adapters, bias, dy = drawn(form, lead, dtype=torch.float64)
    which = torch.randint(-1, 3, shape, generator=torch.Generator().manual_seed(1))
    ours = results(FORMS[form], x, weight, adapters, which, bias, dy)
    expected = results(apart, x, weight, adapters, which, bias, dy)
    for name, t in expected.items():
        torch.testing.assert_close(ours[name], t, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("form", FORMS)
def test_adapters_that_occur_nowhere_get_zeros(form):
    x, weight, adapters, bias, dy = drawn(form)
    found = results(FORMS[form], x, weight, adapters, torch.zeros(12, dtype=torch.int32), bias, dy)
    assert not any(t.any() for name, t in found.items() if name.endswith(("1", "2")))
    assert found["dlora_A0"].any()


@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_in_its_row_and_its_adapter(form):
    x, weight, adapters, bias, dy = drawn(form)
    which = torch.arange(12) % 4 - 1
    clean = results(FORMS[form], x, weight, adapters, which, bias, dy)
    x[5], dy[5] = torch.nan, torch.nan  # adapter 0
    x[4], dy[4] = torch.nan, torch.nan  # none
    found = results(FORMS[form], x, weight, adapters, which, None, dy)
    clean["y"] -= bias
    for name, t in found.items():
        if name.endswith("0"):
            assert t.isnan().any(), name
        elif name in ("y", "dx"):
            assert torch.equal(t.isnan().any(1), torch.isin(torch.arange(12), torch.tensor([4, 5]))), name
        else:
            torch.testing.assert_close(t, clean[name])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("broken", ["lora_A", "lora_B"])
def test_a_diverged_adapter_leaves_the_others_alone(form, broken):
    x, weight, adapters, _, dy = drawn(form)
    getattr(adapters[1], broken)[0, 0] = torch.inf
    which = torch.arange(12) % 4 - 1
    found = results(FORMS[form], x, weight, adapters, which, None, dy)
    assert torch.equal(~found["y"].isfinite().all(1), which == 1)
    assert all(t.isfinite().all() for name, t in found.items() if name.endswith(("0", "2")))
    assert found["dx"][which != 1].isfinite().all()


def test_dropout_has_the_rate_of_each_row():
    x, weight, adapters, _, _ = drawn(lead=(400,), ranks=(1, 1))
    x, weight = torch.ones_like(x), torch.zeros_like(weight)
    adapters = [
        Adapter(torch.ones(1, 24), torch.ones(20, 1), 1.0, 0.5),
        Adapter(torch.ones(1, 24), torch.ones(20, 1), 1.0, 0.0),
    ]
    which = torch.arange(400) % 3 - 1
    y = lora_linear_batch(x, weight, adapters, which)[:, 0]
    assert (y[which == -1] == 0).all() and (y[which == 1] == 24).all()
    dropped = y[which == 0]
    assert dropped.unique().numel() > 5 and abs(dropped.mean() - 24) < 2
    assert (lora_linear_batch(x, weight, adapters, which, training=False)[which == 0] == 24).all()


def changed(adapters, i, **what):
    return [one._replace(**what) if i == j else one for j, one in enumerate(adapters)]


def test_bad_input_is_named():
    x, weight, adapters, bias, _ = drawn()
    which = torch.zeros(12, dtype=torch.int64)
    cases = [
        (TypeError, "adapters: got Adapter", (x, weight, adapters[0], which)),
        (ValueError, "adapters: got none", (x, weight, [], which)),
        (TypeError, r"adapters\[1\]: got int", (x, weight, [adapters[0], 3], which)),
        (ValueError, r"adapters\[2\].lora_B: got shape", (x, weight, changed(adapters, 2, lora_B=x), which)),
        (ValueError, r"adapters\[0\].dropout_p: got 1", (x, weight, changed(adapters, 0, dropout_p=1), which)),
        (ValueError, r"adapters\[0\].scaling: got nan", (x, weight, changed(adapters, 0, scaling=torch.nan), which)),
        (
            ValueError,
            r"adapters\[1\].lora_magnitude_vector: got a tensor, expected None",
            (x, weight, changed(adapters, 1, lora_magnitude_vector=torch.ones(20)), which),
        ),
        (TypeError, "which: got list", (x, weight, adapters, [0] * 12)),
        (TypeError, "which: got dtype torch.float32", (x, weight, adapters, which.float())),
        (ValueError, r"which: got shape \(11,\), expected \(12,\)", (x, weight, adapters, which[1:])),
        (ValueError, "x: got shape", (x[0], weight, adapters, which)),
        (ValueError, "which: got 0 to 3, expected -1", (x, weight, adapters, torch.arange(12) % 4)),
        (ValueError, "which: got -2", (x, weight, adapters, torch.arange(12) % 4 - 2)),
        (ValueError, "bias: got shape", (x, weight, adapters, which, bias[1:])),
    ]
    for error, message, args in cases:
        with pytest.raises(error, match=f"^{message}"):
            lora_linear_batch(*args)
    with pytest.raises(ValueError, match=r"^adapters\[0\].lora_magnitude_vector: got None, expected a tensor"):
        dora_linear_batch(x, weight, adapters, which)


def test_no_rows():
    x, weight, adapters, bias, _ = drawn()
    assert lora_linear_batch(x[:0], weight, adapters, torch.zeros(0, dtype=torch.int64), bias).shape == (0, 20)


def test_is_exported():
    assert {"Adapter", "lora_linear_batch", "dora_linear_batch"} <= set(lora_fast.__all__)
