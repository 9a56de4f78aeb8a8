"""Every way of installing carries the kernels; a machine without Triton works; nothing clashes with transformers."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from checkout import ROOT


def files_in(kernels: Path) -> list[str]:
    return sorted(path.relative_to(kernels).as_posix() for path in kernels.rglob("*.py"))


def name_of(file: str) -> str:
    return "lora_fast.kernels." + file.removesuffix(".py").replace("/", ".")


KERNELS = files_in(ROOT / "kernels")
GENERATED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")


def run(*command, cwd: Path, **env: str) -> str:
    """What a command prints; its output shows when it fails. It sees no PYTHONPATH."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | env
    command = tuple(map(str, command))
    done = subprocess.run(command, cwd=cwd, env=clean, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}"
    return done.stdout


def modules(root: Path) -> list[str]:
    """The files of lora_fast there, but for the kernels."""
    found = (path.relative_to(root) for path in (root / "lora_fast").rglob("*.py"))
    return sorted(str(path) for path in found if "kernels" not in path.parts)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the checkout, for builds leave files behind."""
    return Path(shutil.copytree(ROOT, tmp_path / "checkout", symlinks=True, ignore=GENERATED))


@pytest.fixture
def without_symlink(checkout) -> Path:
    """What git makes of the checkout where symlinks are switched off: a small text file in place of each."""
    link = checkout / "lora_fast" / "kernels"
    target = os.readlink(link)
    assert target == "../kernels"
    link.unlink()
    link.write_text(target)
    return checkout


class Environment:
    """A fresh virtual environment that borrows torch, Triton and setuptools from this one, but not lora_fast."""

    def __init__(self, path: Path):
        venv.create(path, symlinks=True)
        self.path, self.python = path, path / "bin" / "python"
        self.site = path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        borrowed = next(Path(p) for p in sys.path if (Path(p) / "torch").is_dir())
        # A folder named in a .pth file is put on the path, but .pth files in it (editable installs) are not followed.
        (self.site / "borrowed.pth").write_text(str(borrowed))

    def install(self, *what) -> None:
        options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
        run(sys.executable, "-m", "pip", "--python", self.python, "install", *options, *what, cwd=self.path)

    def check(self, expected: Path) -> None:
        """lora_fast comes from `expected`, with the marker of its types, its command and every kernel."""
        code = f"""
import importlib, importlib.metadata, pathlib
import lora_fast
package = pathlib.Path(lora_fast.__file__).resolve().parent
assert package == pathlib.Path({str(expected)!r}).resolve(), package
assert (package / "py.typed").is_file()
assert importlib.metadata.version("lora_fast") == lora_fast.__version__
(command,) = importlib.metadata.distribution("lora_fast").entry_points
assert command.name == "lora-fast" and callable(command.load())
for name in {list(map(name_of, KERNELS))!r}:
    importlib.import_module(name)
"""
        run(self.python, "-c", code, cwd=self.path)
        assert (self.path / "bin" / "lora-fast").is_file()


@pytest.fixture
def environment(tmp_path) -> Environment:
    return Environment(tmp_path / "environment")


def test_there_are_kernels():
    assert KERNELS


@pytest.mark.slow
def test_sdist_and_wheel(checkout, environment, tmp_path):
    """The wheel is made from the sdist, which has to have everything."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, checkout, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    expected = modules(checkout)
    shutil.rmtree(checkout)
    environment.install(wheel)
    environment.check(environment.site / "lora_fast")
    assert modules(environment.site) == expected and len(expected) > 50
    assert files_in(environment.site / "lora_fast" / "kernels") == KERNELS
    assert not (environment.site / "kernels").exists()


@pytest.mark.slow
def test_editable_install(checkout, environment):
    environment.install("--editable", checkout)
    environment.check(checkout / "lora_fast")


@pytest.mark.slow
def test_install_from_a_checkout_without_symlinks(without_symlink, environment):
    environment.install(without_symlink)
    environment.check(environment.site / "lora_fast")


@pytest.mark.medium
def test_in_place(checkout, environment):
    """A checkout that is not installed."""
    code = "import lora_fast.__main__\n" + "".join(f"import {name_of(file)}\n" for file in KERNELS)
    run(environment.python, "-c", code, cwd=checkout)


WITHOUT_TRITON = """
import importlib, importlib.util, sys

class Hide:
    # A finder that does as another one, but finds no triton: as on a machine that lacks it.
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] == "triton" else self.finder.find_spec(name, *rest)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Hide, sys.meta_path)
assert importlib.util.find_spec("triton") is None

import copy
import torch
import lora_fast
from lora_fast.dispatch import why_not_triton

assert why_not_triton(torch.device("cpu"), torch.float32)
torch.manual_seed(0)
for backend in ("auto", "reference"):
    lora_fast.set_backend(backend)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    config = lora_fast.LoRAConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules="all-linear")
    lora_fast.add_lora(model, config)
    parameters = list(lora_fast.lora_parameters(model))
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    x = torch.randn(5, 8)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert len(parameters) == 4 and all(p.grad.abs().sum() > 0 for p in parameters)
    model.eval()
    y = model(x)
    with lora_fast.disable_lora(model):
        assert not torch.allclose(model(x), y)
    saved = copy.deepcopy(lora_fast.lora_state_dict(model))
    lora_fast.load_lora_state_dict(model, saved)
    lora_fast.merge_lora(model)
    torch.testing.assert_close(model(x), y)
    lora_fast.unmerge_lora(model)
    assert torch.equal(model(x), y)
    lora_fast.remove_lora(model)
    assert not any(isinstance(m, lora_fast.LoRALinear) for m in model.modules())

try:
    lora_fast.functional.lora_linear(x, torch.ones(3, 8), torch.ones(2, 8), torch.ones(3, 2), 1.0, backend="triton")
except RuntimeError:
    pass
else:
    raise AssertionError("the fused path ran without Triton")
assert "triton" not in sys.modules
"""


@pytest.mark.medium
def test_works_without_triton():
    run(sys.executable, "-W", "ignore", "-c", WITHOUT_TRITON, cwd=ROOT)


BESIDE_TRANSFORMERS = """
import pathlib
import torch
import transformers

assert transformers.utils.is_kernels_available(), "transformers sees no `kernels` of its own: this proves nothing"
import lora_fast
import kernels
assert callable(kernels.get_kernel) and "site-packages" in pathlib.Path(kernels.__file__).parts, kernels.__file__

config = transformers.LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
)
model = transformers.LlamaForCausalLM(config)
lora_fast.add_lora(model, lora_fast.LoRAConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
tokens = torch.arange(12).reshape(2, 6)
model(input_ids=tokens, labels=tokens).loss.backward()
layer = model.model.layers[0].self_attn.q_proj
assert isinstance(layer, lora_fast.LoRALinear) and layer.lora_B.grad.abs().sum() > 0
"""


@pytest.mark.medium
def test_beside_transformers_and_hugging_face_kernels():
    """In the checkout's folder, where a top-level package `kernels` would be found first."""
    run(sys.executable, "-W", "ignore", "-c", BESIDE_TRANSFORMERS, cwd=ROOT, HF_HUB_OFFLINE="1")
