"""How the tests run: the kernels in Triton's interpreter where there is no GPU, on the GPU where there is one."""

import subprocess

import pytest
import torch
from _pytest.junitxml import xml_key
from accuracy import draw
from checkout import ROOT
from devices import CPU, CUDA, GPU, PATHS, TRITON
from torch import distributed

from lora_fast import set_backend


def pytest_addoption(parser):
    parser.addoption("--commit", help="the commit for the junit report, where this is not a git checkout")


@pytest.hookimpl(trylast=True)  # after the junit report is there
def pytest_configure(config):
    config.addinivalue_line("markers", "interpreted: runs the kernels in Triton's interpreter, where there is no GPU")
    report = config.stash.get(xml_key, None)  # with xdist in the controller alone
    if report is not None:
        for name, value in environment(config.getoption("commit")).items():
            report.add_global_property(name, value)


def environment(commit: str | None) -> dict[str, str]:
    """What was tested, and on what."""
    if not commit and (ROOT / ".git").exists():
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    found = {"gpu": torch.cuda.get_device_name() if GPU else "none", "torch": torch.__version__}
    if TRITON:
        import triton

        found["triton"] = triton.__version__
    return found | {"commit": commit or "unknown"}


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not (GPU and TRITON):
        pytest.skip("needs a GPU and Triton")
    if item.get_closest_marker("interpreted") and (GPU or not TRITON):
        pytest.skip("needs Triton, interpreted")


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN or the largest integer, so that an output that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def as_scripts(monkeypatch, tmp_path):
    """What an example leaves, in files and in accelerate's state, goes elsewhere."""
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def own_backend():
    """The backend that a test asks for is not the next one's."""
    yield
    set_backend("auto")


@pytest.fixture(autouse=True)
def little_cached():
    """A GPU's memory that a test leaves free is there for the other processes of the run."""
    yield
    if GPU and torch.cuda.memory_reserved() > 2**31:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def ieee_products():
    """float32 products without tf32, so that eager torch is as exact as it gets."""
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(params=[CPU, CUDA])
def device(request):
    """Where the fused kernels run."""
    return request.param


@pytest.fixture(params=[pytest.param(path[:2], marks=path[2], id="-".join(path[:2])) for path in PATHS])
def path(request):
    """(backend, device) of every way that an operator can run."""
    return request.param


@pytest.fixture
def dtype16(path):
    """A 16-bit dtype that the path computes rightly: the interpreter's bfloat16 does not."""
    return torch.float16 if path == ("triton", "cpu") else torch.bfloat16


@pytest.fixture
def call(path):
    """lora_linear(x, weight, lora_A, lora_B, bias) on this path, with more arguments by name."""
    from lora_fast.functional import lora_linear

    def fn(x, weight, lora_A, lora_B, bias=None, scaling=2.0, p=0.0, **kwargs):
        return lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p=p, **{"backend": path[0], **kwargs})

    return fn


@pytest.fixture
def inputs(path):
    """Small float32 inputs on this path's device."""
    return draw(12, 40, 24, 3, torch.float32, path[1])


@pytest.fixture
def mesh():
    """Of one process."""
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()
