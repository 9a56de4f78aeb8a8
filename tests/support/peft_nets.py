"""Small PEFT models, stock and patched, and their results beside each other."""

import copy

import pytest
import torch
from torch import nn

from lora_fast import patch_peft, set_backend

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(x + self.down(torch.relu(self.up(x))))


def config(**kwargs):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"], **kwargs})


def stir(model, seed=1):
    """Adapters that do something, as after training; magnitudes off their start."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=gen).to(p)
            if "lora_magnitude" in name:
                p.mul_(1 + 0.2 * noise)
            elif "lora_" in name:
                p.copy_(0.3 * noise)
    return model


def stock_model(device="cpu", dtype=torch.float32, more=(), **kwargs):
    """A stock PEFT model with an adapter, and more of them from dicts of settings."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Net().to(device, dtype), config(**kwargs))
    for i, settings in enumerate(more):
        model.add_adapter(f"more{i}", config(**settings))
    return stir(model)


def patched(model, path=("auto", "cpu")):
    """A copy that runs fast on the path; that it does is asserted, for every layer."""
    set_backend(path[0])
    model = copy.deepcopy(model)
    report = patch_peft(model)
    assert report.layers and (report.not_fused if path[0] == "triton" else report.fused) == 0, report
    return model


def results(model, x, dy=None):
    """y and every gradient."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(torch.ones_like(y) if dy is None else dy.to(y.dtype))
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad} | grads


def same(ours, expected, tol=1e-4):
    assert ours.keys() == expected.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}")


def inputs(path=("auto", "cpu"), *shape, dtype=torch.float32, seed=2):
    return torch.randn(*(shape or (2, 5, 16)), generator=torch.Generator().manual_seed(seed)).to(path[1], dtype)
