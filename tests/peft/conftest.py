import pytest

from lora_fast import dispatch, set_backend


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Every test hears every warning, and leaves the choice of the backend as it was."""
    monkeypatch.setattr(dispatch, "_told", set())
    monkeypatch.setattr(dispatch, "_decided", {})
    yield
    set_backend("auto")
