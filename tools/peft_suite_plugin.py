"""The pytest plugin of peft_suite.py: patches every LoRA model that a test makes, writes down how each test ended."""

import functools
import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

counts: Counter[str] = Counter()  # of the test that runs: models patched, forwards fused
_depth = 0  # of calls to what PEFT offers


class Everything(dict[str, Any]):
    """For PEFT's record of the hub's models that were read already: all were, so that none is asked for."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: object) -> int:
        return 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lora-fast-mode", choices=("stock", "patched"), default="stock")
    parser.addoption("--lora-fast-outcomes", required=True, help="a file for a line of JSON for each phase of a test")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--lora-fast-mode") == "patched":
        patch_whatever_peft_makes()
        count_fused_calls()


def patch_whatever_peft_makes() -> None:
    """Wrap the calls of PEFT's and transformers' that put adapters into a model: each patches it when it is done, as a
    user would next, unless it is part of another such call."""
    import peft
    from peft.tuners.tuners_utils import BaseTuner
    from transformers.integrations.peft import PeftAdapterMixin

    for name in ("get_peft_model", "inject_adapter_in_model"):
        stock: Any = getattr(peft, name)
        for module in [module for key, module in sys.modules.items() if key.partition(".")[0] == "peft"]:
            if vars(module).get(name) is stock:
                setattr(module, name, _then_patch(stock, lambda result, args: result))  # type: ignore[arg-type]
    owner: Any
    for owner in (peft.PeftModel, peft.PeftMixedModel, BaseTuner, PeftAdapterMixin):
        own: dict[str, Any] = dict(vars(owner))
        for name in {"__init__", "add_adapter", "load_adapter"} & own.keys():
            setattr(owner, name, _then_patch(own[name], lambda result, args: args[0]))
        if "from_pretrained" in own:
            make = _then_patch(own["from_pretrained"].__func__, lambda result, args: result)
            owner.from_pretrained = classmethod(make)


def _then_patch(stock: Callable[..., Any], model_of: Callable[[Any, tuple[Any, ...]], Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        global _depth
        _depth += 1
        try:
            result = stock(*args, **kwargs)
        finally:
            _depth -= 1
        if _depth == 0:
            patch(model_of(result, args))
        return result

    return wrapped


def patch(model: Any) -> None:
    import torch
    from peft.tuners.lora import LoraLayer

    import lora_fast

    if isinstance(model, torch.nn.Module) and any(isinstance(module, LoraLayer) for module in model.modules()):
        lora_fast.patch_peft(model)
        counts["patched"] += 1


def count_fused_calls() -> None:
    """Where a layer's forward takes the fused path: at once, or once it has looked at everything."""
    import torch

    from lora_fast.peft import layers

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if not torch.compiler.is_compiling():
                counts["fused"] += result is not None
            return result

        return counted

    layers.plainly = counting(layers.plainly)  # type: ignore[attr-defined]
    layers.FastLinear._fused = counting(layers.FastLinear._fused)  # type: ignore[method-assign]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out the tests of PEFT's other methods, as far as their parameters tell."""
    from peft import LoraConfig, PeftConfig

    def concerns_lora(item: pytest.Item) -> bool:
        given = item.callspec.params.values() if hasattr(item, "callspec") else ()
        kinds = [value if isinstance(value, type) else type(value) for value in given]
        configs = [kind for kind in kinds if issubclass(kind, PeftConfig)]
        return not configs or any(issubclass(kind, LoraConfig) for kind in configs)

    items[:] = filter(concerns_lora, items)
    if "tests.testing_utils" in sys.modules:
        sys.modules["tests.testing_utils"]._HUB_MODEL_ACCESSES = Everything()  # type: ignore[attr-defined]


def pytest_runtest_setup() -> None:
    from lora_fast import dispatch

    counts.clear()
    dispatch._told.clear()  # which warnings a test sees is not to depend on the tests before it


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report: pytest.TestReport = yield
    outcome: str = report.outcome
    message = ""
    if hasattr(report, "wasxfail"):
        outcome = "xfailed" if report.skipped else "xpassed"
    elif report.failed:
        outcome = "failed" if report.when == "call" else "error"
        message = str(call.excinfo.value) if call.excinfo else str(report.longrepr)
    if report.when == "call" or outcome != "passed":
        record: dict[str, Any] = {"test": item.nodeid, "outcome": outcome, "message": message[:2000]}
        record |= {"patched": counts["patched"], "fused": counts["fused"]}
        with open(item.config.getoption("--lora-fast-outcomes"), "a") as file:
            file.write(json.dumps(record) + "\n")
    return report
