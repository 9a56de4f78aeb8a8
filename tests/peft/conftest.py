import pytest

from lora_fast import dispatch


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Every test hears every warning."""
    monkeypatch.setattr(dispatch, "_told", set())
    monkeypatch.setattr(dispatch, "_decided", {})
