"""`lora-fast doctor`: what it finds on this machine, in a model, in an adapter, and in broken ones of each."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from checkout import ROOT
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fast
from lora_fast import LoRAConfig, add_lora, save_adapter
from lora_fast.cli import doctor, machine, main, selfcheck
from lora_fast.dispatch import interpreted
from lora_fast.files.format import CONFIG, PREFIX, TENSORS

GPU = torch.cuda.is_available()


@pytest.fixture
def quick(monkeypatch):
    """The self-check replaced, where another part is tested."""
    monkeypatch.setattr(doctor, "self_check", lambda: True)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write a module that doctor finds in the folder where it runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_model", raising=False)

    def write(source):
        (tmp_path / "my_model.py").write_text("import torch\nfrom torch import nn\nimport lora_fast\n" + source)

    yield write
    sys.modules.pop("my_model", None)


@pytest.mark.medium
def test_machine(capsys):
    """The real checks of what can run here."""
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"lora_fast {lora_fast.__version__}, Python 3." in said
    assert re.search(rf"torch +{re.escape(torch.__version__.partition('+')[0])}(\+\w+)?\n", said)
    expected = 12 if GPU else 4 if interpreted() else 6
    assert f"{expected} of {expected} passed" in said
    lines = [line for line in said.splitlines() if line.startswith("  ok ")]
    assert len(lines) == expected and "FAIL" not in said
    for line in lines:
        error, bound = map(float, re.search(r"error (\S+) \(of \w+\), bound (\S+)$", line).groups())
        assert 0 < error <= bound
    for method in ("LoRA", "DoRA"):
        assert sum(line.startswith(f"  ok    {method}, ") for line in lines) == expected / 2
    if not GPU:
        assert "the fused kernels need an NVIDIA GPU" in said
        assert ("in Triton's interpreter" in said) == interpreted()


def test_reference_alone(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.dispatch, "interpreted", lambda: False)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "self-check of the reference alone" in said and "TRITON_INTERPRET=1" in said and "6 of 6 passed" in said
    assert all(f"{method}, {name}" in said for method in ("LoRA", "DoRA") for name in ("bf16", "fp16", "fp32"))


@pytest.mark.gpu
def test_on_a_gpu(capsys):
    test_machine(capsys)
    assert 1 < machine.launch_us(torch.device("cuda")) < 1000


def test_versions(quick, monkeypatch, capsys):
    """One too old is told and counts; one that is not installed does not."""
    found = {"torch": "2.11.0+cu130", "triton": "3.5.1", "numpy": "2.0", "peft": "1.2", "transformers": "4.9"}

    def version(name):
        if name not in found:
            raise machine.importlib.metadata.PackageNotFoundError
        return found[name]

    monkeypatch.setattr(machine.importlib.metadata, "version", version)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "triton       3.5.1  (too old: lora_fast needs 3.6 or newer)\n" in said
    assert "torch        2.11.0+cu130\n" in said and "safetensors  not installed" in said and said.count("too old") == 1
    assert "peft         1.2  (newer than 0.21, the newest that lora_fast was tried with)\n" in said
    found["triton"] = "3.10.0"
    assert main(["doctor"]) == 0
    assert "triton       3.10.0  (newer than 3.9, the" in capsys.readouterr().out


@pytest.mark.parametrize("capability, words", [((9, 0), "can run"), ((7, 5), "cannot run: GTX 1 is older than")])
def test_gpus(capability, words, quick, monkeypatch, capsys):
    properties = SimpleNamespace(name="GTX 1", major=capability[0], minor=capability[1], total_memory=80 * 2**30)
    for name, value in {
        "device_count": 1,
        "is_available": True,
        "get_device_properties": properties,
        "get_device_name": "GTX 1",
        "get_device_capability": capability,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(machine, "launch_us", lambda device: 7)
    pytest.importorskip("triton")
    from lora_fast.kernels import launchers

    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"cuda:0: GTX 1, compute capability {capability[0]}.{capability[1]}, 80 GiB" in said
    assert f"  fused kernels: {words}" in said
    launches = "  launches: direct, without Triton's own path; one costs the host 7.0 us here\n"
    assert (launches in said) == (words == "can run")
    monkeypatch.setattr(launchers, "why_not_direct", lambda: "not known")
    assert machine.launches() == "not known"


FAULTS = {
    "off by 1%": lambda y, dtype: y * 0.99,
    "NaN": lambda y, dtype: y + torch.nan,
    "16-bit sum": lambda y, dtype: y.to(torch.bfloat16).to(dtype) * 1.0,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_check_sees_faults(fault, dtype, monkeypatch, capsys):
    right = selfcheck.lora_linear
    monkeypatch.setattr(selfcheck, "lora_linear", lambda *a, **k: FAULTS[fault](right(*a, **k), a[0].dtype))
    found = list(selfcheck.check(torch.device("cpu"), [dtype], doctor.TINY, "reference"))
    assert [check.passed for check in found] == [False, True]  # LoRA, DoRA
    assert str(found[0]).startswith("FAIL  LoRA")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.dispatch, "interpreted", lambda: False)
    assert main(["doctor"]) == 1
    passed = 4 if fault == "16-bit sum" else 3  # for bf16 that one is none
    assert f"{passed} of 6 passed" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["x", "a", "b", "bias", "m"])
def test_the_check_sees_a_wrong_gradient(name, monkeypatch):
    """A gradient off by a thousandth, one input at a time."""

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.view_as(t)

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.001

    right = selfcheck.dora_linear
    places = {"x": 0, "a": 2, "b": 3, "m": 4, "bias": 6}

    def wrong(*args, **kwargs):
        args = [Off.apply(t) if i == places[name] else t for i, t in enumerate(args)]
        return right(*args, **kwargs)

    monkeypatch.setattr(selfcheck, "dora_linear", wrong)
    found = list(selfcheck.check(torch.device("cpu"), [torch.float32], doctor.TINY, "reference"))
    assert [check.passed for check in found] == [True, False] and found[1].tensor == f"d{name}"


@pytest.mark.medium
def test_a_kernel_that_does_not_run(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(selfcheck, "dora_linear", broken)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"FAIL  DoRA, .*: RuntimeError: no such instruction\n", said) and "ok    LoRA" in said


MODEL = """
def build():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU(),
                          nn.MultiheadAttention(8, 2), nn.Linear(8, 4, dtype=torch.bfloat16))
    model[1].register_forward_hook(lambda *args: None)
    model[0] = lora_fast.LoRALinear.from_linear(model[0], 2)
    model[2] = lora_fast.DoRALinear.from_linear(model[2], 3)
    return model

class Namespace:
    made = build()
"""


@pytest.mark.parametrize("target", ["my_model:build", "my_model.build", "my_model:Namespace.made"])
def test_model(target, package, quick, capsys):
    package(MODEL)
    assert main(["doctor", target]) == 0
    said = capsys.readouterr().out
    lines = [
        re.split(r"  +", line.strip()) for line in said.partition("model ")[2].partition("\n\n")[0].splitlines()[1:]
    ]
    why = "the tensors are on 'cpu'; the fused kernels need an NVIDIA GPU"
    no_gpu = doctor.dispatch.why_not_triton(torch.device("cpu"), torch.float32)
    assert no_gpu == why
    assert lines == [
        ["0", "1", "not fused", "LoRALinear 8 -> 8, float32, r=2"],
        [
            "1",
            "1",
            "plain",
            "Linear 8 -> 8, float32: cannot be converted: it has hooks or a replaced forward, which would "
            "be lost (register hooks after the conversion)",
        ],
        ["2", "1", "not fused", "DoRALinear 8 -> 8, float32, r=3"],
        [
            "4.out_proj",
            "1",
            "plain",
            "NonDynamicallyQuantizableLinear 8 -> 8, float32: cannot be converted: it is the "
            "output projection of nn.MultiheadAttention, which reads its weight and would skip "
            "the adapter",
        ],
        ["5", "1", "plain", "Linear 8 -> 4, bfloat16"],
        [f"not fused: {why}"],
        ["0 fused, 2 not fused, 3 without an adapter"],
    ]
    assert said.index("model ") < said.index("lora_fast ")  # what was asked for comes first


@pytest.mark.interpreted
def test_require_fused(package, quick, capsys):
    package("def build():\n    return nn.Sequential(lora_fast.LoRALinear(8, 8))\n")
    assert main(["doctor", "my_model:build", "--require-fused"]) == 1
    lora_fast.set_backend("triton")
    assert main(["doctor", "my_model:build", "--require-fused"]) == 0
    assert "0  1  fused  LoRALinear" in capsys.readouterr().out


@pytest.mark.parametrize("change, word", [("merge", "merged"), ("disable", "disabled")])
def test_layers_that_are_switched_off(change, word, package, quick, capsys):
    package(f"made = nn.Sequential(lora_fast.LoRALinear(8, 8))\nmade[0].{change}()\n")
    assert main(["doctor", "my_model:made"]) == 0
    assert f"r=8: {word}" in capsys.readouterr().out


def test_the_whole_model_is_a_layer(package, quick, capsys):
    package("def build():\n    return lora_fast.LoRALinear(8, 8)\n")
    lora_fast.set_backend("reference")
    assert main(["doctor", "my_model:build"]) == 0
    assert (
        '(itself)  1  not fused  LoRALinear 8 -> 8, float32, r=8: set_backend("reference") is on'
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "target, source, message",
    [
        ("my_model:build", "def build():\n    raise RuntimeError('no weights')", "RuntimeError: no weights"),
        ("my_model:build", "def build():\n    return 3", "gives a int, expected an nn.Module"),
        ("my_model:build", "def build(path):\n    pass", "TypeError"),
        ("my_model:build", "import absent_module", "ModuleNotFoundError: No module named 'absent_module'"),
        ("my_model:build", "def (", "SyntaxError"),
    ],
)
def test_models_that_cannot_be_made(target, source, message, package, quick, capsys):
    package(source)
    assert main(["doctor", target]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"lora-fast doctor: error: {target}: ") and message in error and "Traceback" not in error


@pytest.mark.parametrize("target", ["my_model:other", "my_model:build.other", "absent_module:build", "my_model.sub:x"])
def test_targets_that_name_nothing(target, package, quick, capsys):
    package("def build():\n    pass")
    assert main(["doctor", target]) == 2
    assert capsys.readouterr().err.startswith(f"lora-fast doctor: error: {target}: ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "is no directory and not of the form"),
        (["a b:c"], "not of the form"),
        (["a:b:c"], "not of the form"),
        (["absent/folder"], "absent/folder is no directory"),
        (["--require-fused"], "needs a TARGET"),
        ([".", "--require-fused"], "needs a TARGET that is a model"),
    ],
)
def test_wrong_arguments(arguments, message, quick, capsys):
    assert main(["doctor", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("lora-fast doctor: error: ") and message in captured.err and not captured.out


def test_stock_peft_layers(package, quick, capsys):
    pytest.importorskip("peft")
    package("""
import peft
def build():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
""")
    assert main(["doctor", "my_model:build"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"base_model.model.0 +1  not fused  PEFT's Linear 8 -> 8, float32, r=2: not patched", said)
    assert "lora_A" not in said and "base_layer" not in said  # told with the layer
    assert "  0 fused, 1 not fused, 1 without an adapter\n" in said and "call lora_fast.patch_peft(model)" in said
    assert main(["doctor", "my_model:build", "--as-if", "sm_90", "--require-fused"]) == 0
    said = capsys.readouterr().out
    assert "as if on a GPU of sm_90" in said and "  1 fused, 0 not fused, 1 without an adapter\n" in said
    assert "as after lora_fast.patch_peft(model)" in said
    assert re.search(r"base_model.model.0 +1  fused  PEFT's Linear 8 -> 8, float32, r=2\n", said)


@pytest.mark.parametrize("chip, fused", [("sm_80", "0 fused, 1 not fused"), ("sm_90", "1 fused, 0 not fused")])
def test_a_base_in_8_bits_is_fused_where_the_card_has_units_for_it(chip, fused, package, capsys):
    package("""
def build():
    model = nn.Sequential(nn.Linear(32, 32))
    config = lora_fast.LoRAConfig(target_modules=["0"], base_dtype="float8_e4m3")
    return lora_fast.add_lora(model, config)
""")
    assert main(["doctor", "my_model:build", "--as-if", chip]) == 0
    said = capsys.readouterr().out
    assert fused in said and re.search(r"LoRALinear 32 -> 32, float32, r=8 \(.* base\)", said)
    assert ("has no fp8 matrix units" in said.partition("as if on a GPU of sm_80:")[0]) == (chip == "sm_80")


def test_conv1d_and_adapters_under_names(package, capsys):
    pytest.importorskip("transformers")
    package("""
from transformers.pytorch_utils import Conv1D
def build():
    model = nn.Sequential(Conv1D(6, 8), nn.Linear(6, 4))
    for name in ("a", "b"):
        lora_fast.add_lora(model, lora_fast.LoRAConfig(target_modules=["0"]), name=name)
    return model
def plain():
    return nn.Sequential(Conv1D(6, 8))
""")
    assert main(["doctor", "my_model:build", "--as-if", "sm_90"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"0\.adapter_b +1  fused  LoRALinear 8 -> 6, float32, r=8\n", said)
    assert "2 fused, 0 not fused, 1 without an adapter" in said and "cannot be converted" not in said
    assert main(["doctor", "my_model:plain", "--as-if", "sm_90"]) == 0
    assert "0  1  plain  Conv1D 8 -> 6, float32: add_lora can convert it" in capsys.readouterr().out


@pytest.mark.parametrize(
    "chip, eight", [("80", "cannot run: .* 8.0 has no fp8"), ("sm_89", "can run"), ("100", "cannot")]
)
def test_as_if(chip, eight, package, capsys):
    """Told without the GPU, and without a self-check of what is here."""
    pytest.importorskip("triton")
    package("""
def build():
    model = nn.Sequential(*(lora_fast.LoRALinear(8, 8) for _ in range(3)))
    assert model(torch.ones(1, 8)).shape == (1, 8)  # runs where it is
    model.append(lora_fast.LoRALinear(8, 8, dtype=torch.float64))
    return model
""")
    assert main(["doctor", "my_model:build", "--as-if", chip]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\* +3  fused +LoRALinear", said)
    assert "3  1  not fused  LoRALinear 8 -> 8, float64, r=8: torch.float64 has no fused kernel" in said
    assert "  fused kernels: can run\n" in said and re.search(rf"8-bit products: {eight}", said)
    assert "launches, on a GPU with this Triton: " in said and "self-check" not in said
    assert doctor.dispatch.why_not_triton(torch.device("cpu"), torch.float32) and not doctor.dispatch._assumed


def test_as_if_unknown(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--as-if", "sm_75"])
    assert stop.value.code == 2 and "expected one of sm_80, sm_89, sm_90" in capsys.readouterr().err


def test_without_triton(monkeypatch, capsys):
    """Nothing is advised that needs it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.dispatch, "interpreted", lambda: False)
    for module in (doctor, machine):
        monkeypatch.setattr(module, "has_triton", lambda: False)
    monkeypatch.setattr(selfcheck, "DRAWS", 1)
    main(["doctor"])
    said = capsys.readouterr().out
    assert "self-check of the reference alone" in said and "TRITON_INTERPRET" not in said and "launches" not in said


@pytest.mark.interpreted
def test_patched_peft_layers(package, quick, capsys):
    pytest.importorskip("peft")
    package("""
import peft
from lora_fast.peft import patch_peft
def build():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    patch_peft(model)
    return model
""")
    lora_fast.set_backend("triton")
    assert main(["doctor", "my_model:build", "--require-fused"]) == 0
    assert "  1 fused, 0 not fused, 1 without an adapter\n" in capsys.readouterr().out


def trained(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(4, 2))
    return add_lora(model, LoRAConfig(**{"r": 4, "target_modules": ["0", "2"], **options}))


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, ["LoRA, r = 4, lora_alpha = 8, bias = 'none'", "tensors: 4 of F32", "layers: 2: 2 of r = 4"]),
        ({"use_dora": True}, ["  DoRA, r = 4", "tensors: 6 of F32"]),
        ({"use_rslora": True, "rank_pattern": {"0": 2}}, ["rank-stabilised LoRA", "1 of r = 2, 1 of r = 4"]),
        ({"bias": "all", "modules_to_save": ["3"]}, ["bias = 'all'", "trained in full: 3"]),
        ({"bias": "lora_only"}, ["bias = 'lora_only'", "tensors: 6 of F32"]),
    ],
    ids=lambda value: "-".join(value) or "plain",
)
def test_adapter(options, words, tmp_path, quick, capsys):
    save_adapter(trained(**options), tmp_path / "a")
    assert main(["doctor", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in words), said
    assert "load_adapter takes it, into a model that has these layers\n" in said


@pytest.mark.parametrize("bias", ["none", "all"])
def test_adapter_of_peft(bias, tmp_path, quick, capsys):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    config = peft.LoraConfig(r=3, target_modules=["0"], modules_to_save=["1"], use_dora=True, bias=bias)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "a")
    assert main(["doctor", str(tmp_path / "a")]) == 0
    assert "DoRA, r = 3" in capsys.readouterr().out


def change(folder, tensors=(), **config):
    save_file({**load_file(folder / TENSORS), **dict(tensors)}, folder / TENSORS)
    settings = {**json.loads((folder / CONFIG).read_text()), **config}
    (folder / CONFIG).write_text(json.dumps(settings))


KEY = f"{PREFIX}0.lora_A.weight"


@pytest.mark.parametrize(
    "broken, message",
    [
        (lambda d: (d / CONFIG).unlink(), "No such file"),
        (lambda d: (d / CONFIG).write_text("{"), "no JSON"),
        (lambda d: (d / TENSORS).write_bytes(b"x"), "is no safetensors file"),
        (lambda d: change(d, r=5), "expected [5, 8]"),
        (lambda d: change(d, use_dora=True), "expected lora_A, lora_B, lora_magnitude_vector"),
        (lambda d: change(d, {KEY: torch.full((4, 8), torch.nan)}), "not finite"),
        (lambda d: change(d, {KEY: torch.zeros(8)}), "shape [8], expected [4, 8]"),
        (lambda d: change(d, {f"{PREFIX}2.base_layer.weight": torch.zeros(4, 6)}), "unexpected"),
        (lambda d: change(d, {f"{PREFIX}3.weight": torch.zeros(2, 4)}, modules_to_save=["absent"]), "unexpected"),
        (
            lambda d: change(
                d,
                {
                    f"{PREFIX}{'a.' * 99}lora_A.weight": torch.zeros(4, 8),
                    f"{PREFIX}{'a.' * 99}lora_B.weight": torch.zeros(6, 4),
                },
            ),
            "is no name of a tensor",
        ),
    ],
)
def test_adapters_that_are_refused(broken, message, tmp_path, quick, capsys):
    save_adapter(trained(), tmp_path)
    broken(tmp_path)
    assert main(["doctor", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert message in captured.out.partition("load_adapter refuses it: ")[2] and not captured.err


@pytest.mark.medium
def test_a_reader_that_goes_away():
    """As `lora-fast doctor | head -1` does."""
    code = "from lora_fast.cli import doctor, main; doctor.self_check = lambda: True; exit(main(['doctor']))"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as out:
        done = subprocess.run([sys.executable, "-c", code], stdout=out, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 1 and not done.stderr


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and all(
        word in said for word in ("TARGET", "examples:", "Exit codes", "--require-fused")
    )


def test_parameters_that_no_adapter_reaches_are_listed(package, quick, capsys):
    package("""
class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 16))
        self.down_proj_bias = nn.Parameter(torch.zeros(4, 8))

def build():
    block = nn.Sequential(nn.Linear(16, 16), Experts())
    return lora_fast.add_lora(block, lora_fast.LoRAConfig(r=2, target_modules=["0"]))
""")
    assert main(["doctor", "my_model:build"]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"1\.gate_up_proj +1  plain +parameter \[4, 8, 16\], float32: not adapted: it is no nn.Linear's", said
    )
    assert "down_proj_bias" not in said and "0 fused, 1 not fused, 1 without an adapter" in said


@pytest.mark.usefixtures("quick")
def test_experts(package, capsys):
    """Of every state that they can be in; in an adapter, too."""
    pytest.importorskip("transformers.integrations.moe")
    pytest.importorskip("peft", "0.21")
    package(
        """
import peft
from expert_nets import BOTH, moe_model, moe_peft
def frozen(): return moe_model(num_hidden_layers=1)
def unknown(): return moe_model(num_hidden_layers=1, hidden_act="gelu")
def ours(): return lora_fast.add_lora(frozen(), lora_fast.LoRAConfig(r=3, target_parameters=BOTH))
def theirs(): return moe_peft(sizes={"num_hidden_layers": 1})
def patched():
    model = theirs()
    lora_fast.patch_peft(model)
    return model
"""
    )
    said = {}
    for what in ("frozen", "unknown", "ours", "theirs", "patched"):
        assert main(["doctor", f"my_model:{what}"]) == 0
        said[what] = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "experts" in line]
    for what, name, match in (
        ("frozen", "model.layers.0.mlp.experts", r"plain .*gate_up_proj \[4, 48, 16\].*target_parameters can adapt"),
        ("unknown", "model.layers.0.mlp.experts", "LoRA cannot reach these experts: the activation .* is GELU"),
        ("ours", "model.layers.0.mlp.experts.down_proj", "ExpertsLoRA 4 x 24 -> 16, float32, r=3"),
        ("theirs", "base_model.model.model.layers.0.mlp.experts.gate_up_proj", "not fused"),
        ("patched", "base_model.model.model.layers.0.mlp.experts.down_proj", "fused" if GPU else "not fused"),
    ):
        lines = dict(said[what])
        assert len(lines) == (1 if what in ("frozen", "unknown") else 2) and re.search(match, lines[name]), said[what]
    save_adapter(sys.modules["my_model"].ours(), "adapter")
    assert main(["doctor", "./adapter"]) == 0
    assert "of experts: mlp.experts.down_proj, mlp.experts.gate_up_proj" in capsys.readouterr().out
