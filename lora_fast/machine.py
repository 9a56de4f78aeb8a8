"""What a machine has: Python packages, GPUs, and whether the fused kernels can run on them."""

import importlib.metadata
import platform
import re

import torch

from lora_fast import __version__, dispatch

OLDEST = {"torch": "2.11", "triton": "3.6", "numpy": "", "safetensors": "", "peft": "0.13", "transformers": ""}


def versions() -> bool:
    """Print them; whether all that are installed are new enough."""
    print(f"lora_fast {__version__}, Python {platform.python_version()}, {platform.platform()}")
    good = True
    for name, oldest in OLDEST.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"  {name:13}not installed")
            continue
        too_old = _numbers(found) < _numbers(oldest)
        print(f"  {name:13}{found}" + (f"  (too old: lora_fast needs {oldest} or newer)" if too_old else ""))
        good &= not too_old
    return good


def devices() -> None:
    """Print the GPUs, and whether the fused kernels can run on them."""
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        print(f"cuda:{i}: {properties.name}, compute capability {properties.major}.{properties.minor}, "
              f"{properties.total_memory / 2**30:.0f} GiB, {built}")  # fmt: skip
        why = dispatch.why_not_triton(torch.device("cuda", i), torch.bfloat16)
        print(f"  fused kernels: {f'cannot run: {why}' if why else 'can run'}")
    if not torch.cuda.is_available():
        has = torch.version.cuda or torch.version.hip
        print(f"no GPU: torch is a build {f'for {built} but sees none' if has else 'without CUDA'}")
        other = torch.accelerator.current_accelerator() or torch.device("cpu")
        print(f"  fused kernels: cannot run: {dispatch.why_not_triton(other, torch.bfloat16)}")


def _numbers(version: str) -> list[int]:
    return [int(word) for word in re.findall(r"\d+", version)[:2]]
