"""What a machine has: Python packages, GPUs, whether the fused kernels can run on them, and what starting one takes."""

import importlib.metadata
import importlib.util
import platform
import re
import statistics
import time

import torch

from lora_fast import __version__, dispatch

# The oldest version that lora_fast works with, and the newest that it was tried with.
TRIED = {
    "torch": ("2.11", "2.13"),
    "triton": ("3.6", "3.9"),
    "numpy": ("", ""),
    "safetensors": ("", ""),
    "peft": ("0.13", "0.21"),
    "transformers": ("", ""),
}


def versions() -> bool:
    """Print them; whether all that are installed are new enough."""
    print(f"lora_fast {__version__}, Python {platform.python_version()}, {platform.platform()}")
    good = True
    for name, (oldest, newest) in TRIED.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"  {name:13}not installed")
            continue
        too_old = _numbers(found) < _numbers(oldest)
        note = f"  (too old: lora_fast needs {oldest} or newer)" if too_old else ""
        if newest and _numbers(found) > _numbers(newest):
            note = f"  (newer than {newest}, the newest that lora_fast was tried with)"
        print(f"  {name:13}{found}{note}")
        good &= not too_old
    return good


def devices() -> None:
    """Print the GPUs, and whether the fused kernels can run on them."""
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        print(
            f"cuda:{i}: {properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, {built}"
        )
        why = dispatch.why_not_triton(torch.device("cuda", i), torch.bfloat16)
        print(f"  fused kernels: {f'cannot run: {why}' if why else 'can run'}")
        if not why:
            print(f"  launches: {launches()}; one costs the host {launch_us(torch.device('cuda', i)):.1f} us here")
    if not torch.cuda.is_available():
        has = torch.version.cuda or torch.version.hip
        print(f"no GPU: torch is a build {f'for {built} but sees none' if has else 'without CUDA'}")
        other = torch.accelerator.current_accelerator() or torch.device("cpu")
        why = dispatch.why_not_triton(other, torch.bfloat16) or ""
        print(f"  fused kernels: cannot run: {why.rpartition('; ')[2]}")
        tell_launches()


def as_if(chip: str, capability: tuple[int, int]) -> None:
    """Print what a GPU of this compute capability could run, with the Triton that is installed."""
    device = torch.device("cuda")
    with dispatch.assume_capability(*capability):
        fused, eight = dispatch.why_not_triton(device, torch.bfloat16), dispatch.why_not_fp8(device)
    if not has_triton():
        fused = "Triton is not installed"
    print(f"as if on a GPU of {chip}:")
    for what, why in (("fused kernels", fused), ("fp8 bases and 8-bit products", eight)):
        print(f"  {what}: {f'cannot run: {why}' if why else 'can run'}")
    tell_launches()


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def tell_launches() -> None:
    """Print how a GPU's kernels would be started, where Triton is installed."""
    if has_triton():
        print(f"  launches, on a GPU with this Triton: {launches()}")


def launches() -> str:
    """How kernels are started here, in words."""
    from lora_fast.kernels import launchers  # needs Triton

    return launchers.why_not_direct() or "direct, without Triton's own path"


def launch_us(device: torch.device, rounds: int = 200) -> float:
    """What starting a small kernel of ours takes the host, in microseconds: the median."""
    from lora_fast.kernels.down import down
    from lora_fast.kernels.operands import program

    with torch.cuda.device(device):
        x, a, s = (torch.zeros(16, k, device=device, dtype=torch.bfloat16) for k in (64, 64, 16))
        launch, times = program(down, x=x, a=a, s=s, scaling=1.0, keep=1.0), []
        for _ in range(rounds):
            began = time.perf_counter()
            launch(x, a, s, 1.0, 1.0)
            times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


def _numbers(version: str) -> list[int]:
    return [int(word) for word in re.findall(r"\d+", version)[:2]]
