import pytest
import torch


@pytest.fixture
def compiler(monkeypatch):
    """torch.compile without code generation; what it was asked for."""
    torch._dynamo.reset()
    asked, honest = [], torch.compile

    def compiled(model, **given):
        asked.append(given)
        return honest(model, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", compiled)
    return asked
