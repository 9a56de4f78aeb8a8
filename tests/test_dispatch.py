"""Which path an operator takes, and how it says so."""

import subprocess
import sys
import warnings

import pytest
import torch

import lora_fast
from lora_fast import dispatch
from lora_fast.functional import lora_linear

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No decision remembered, no warning given yet."""
    monkeypatch.setattr(dispatch, "_told", set())
    monkeypatch.setattr(dispatch, "_decided", {})


def call(backend="auto", dtype=torch.float32):
    x = torch.ones(2, 4, dtype=dtype)
    return lora_linear(x, x[:, :4], x[:1], x[:, :1], 1.0, backend=backend)


def test_backends_are_checked():
    assert lora_fast.get_backend() == "auto"
    for backend in ("reference", "triton", "auto"):
        lora_fast.set_backend(backend)
        assert lora_fast.get_backend() == backend
    with pytest.raises(ValueError, match="backend: got 'cuda', expected one of 'auto', 'triton', 'reference'"):
        lora_fast.set_backend("cuda")
    assert lora_fast.get_backend() == "auto"
    with pytest.raises(ValueError, match="backend: got 'cuda'"):
        call(backend="cuda")


def test_backends_are_checked_where_the_kernels_could_run(monkeypatch):
    monkeypatch.setattr(dispatch, "why_not_triton", lambda device, dtype: None)
    for backend in ("foo", ["triton"], None):
        with pytest.raises(ValueError, match="backend: got"):
            dispatch.choose(backend, CPU, torch.float32)


def test_the_slow_path_warns_once_per_reason():
    with pytest.warns(lora_fast.SlowPathWarning, match="'cpu'.*need an NVIDIA GPU") as told:
        call()
        call()
        call(dtype=torch.float64)
    assert len(told) == 1 and told[0].filename == __file__
    with pytest.warns(lora_fast.SlowPathWarning, match="'meta'"):
        assert dispatch.choose("auto", torch.device("meta"), torch.float32) == "reference"


def test_the_warning_points_past_libraries():
    """At the line that called a library which called the layer, not into the library."""
    library = {"__name__": "transformers.models.llama", "tell": dispatch.tell}
    exec(compile("def forward(): tell('is slow', 'on purpose')", "modeling_llama.py", "exec"), library)
    with pytest.warns(lora_fast.SlowPathWarning) as told:
        library["forward"]()
    assert [warning.filename for warning in told] == [__file__]


def test_asked_for_the_slow_path_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call("reference")
        lora_fast.set_backend("reference")
        call()


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="backend='triton': the fused kernels cannot run here: .*'cpu'"):
        call("triton")
    lora_fast.set_backend("triton")
    with pytest.raises(RuntimeError, match="backend='triton'"):
        call()
    call("reference")


@pytest.mark.interpreted
def test_triton_runs_interpreted_on_the_cpu():
    assert dispatch.interpreted()
    assert dispatch.choose("triton", CPU, torch.float32) == "triton"
    assert dispatch.choose("auto", CPU, torch.float32) == "reference"


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "cpu"])
def test_other_devices_are_named(device):
    assert repr(device) in dispatch.why_not_triton(torch.device(device), torch.float32)


@pytest.mark.parametrize(
    "capability, dtype, reason",
    [
        ((9, 0), torch.bfloat16, None),
        ((8, 0), torch.float16, None),
        ((12, 0), torch.float32, None),
        ((7, 5), torch.float16, "older than compute capability 8.0"),
        ((9, 0), torch.float64, "float64 has no fused kernel"),
    ],
)
def test_gpus_and_dtypes(monkeypatch, capability, dtype, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name)
    said = dispatch.why_not_triton(GPU, dtype)
    assert said is None if reason is None else reason in said


def test_rocm_and_absent_triton_are_named(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert dispatch.why_not_triton(GPU, torch.float16) == "Triton is not installed"
    assert not dispatch.interpreted()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in dispatch.why_not_triton(GPU, torch.float16)


@pytest.mark.medium
def test_without_triton_the_reference_runs():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch, lora_fast\n"
        "layer = lora_fast.LoRALinear(4, 3)\n"
        "layer(torch.ones(2, 4)).sum().backward()\n"
        "assert layer.lora_B.grad.abs().sum() > 0 and 'lora_fast.ops' not in sys.modules\n"
        "print('ran')"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout == "ran\n", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_gpu_takes_the_fused_path_without_a_warning(dropout_p):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = torch.ones(2, 4, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        y = lora_linear(x, x.detach(), x.detach()[:1], x.detach()[:, :1], 1.0, dropout_p=dropout_p)
    assert "LoRALinear" in type(y.grad_fn).__name__
