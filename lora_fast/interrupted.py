"""Imports torch, which takes seconds. A command that is interrupted meanwhile says so, where a program that imports
lora_fast gets its KeyboardInterrupt."""

import sys
from pathlib import Path

try:
    import torch as torch
except KeyboardInterrupt:
    by_name = sys.argv[:1] == ["-m"] and "lora_fast" in sys.orig_argv  # python -m lora_fast, which is not loaded yet
    if not by_name and Path(*sys.argv[:1]).name != "lora-fast":
        raise
    print("lora-fast: interrupted", file=sys.stderr)
    sys.exit(130)
