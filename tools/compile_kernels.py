"""Compile every kernel for one chip without a GPU, as the launchers would for real problems, and report what came out.

``python tools/compile_kernels.py 90`` prints one JSON line a compiled kernel: its name, the problem, its products and
matrix instructions, shared memory, registers and stack bytes (spills). What is wrong with one (:func:`faults`) goes to
stderr, and makes the exit code 1. With ``--once-a kind`` a kernel is compiled once for each kind of problem (16 bits or
32, with dropout or without, a batch, a group and so on), a quarter of all; with ``--once-a width`` once for 16 bits and
once for 32, a tenth.
Runs in a process of its own, since it puts a driver in Triton's place that knows its target and nothing else, and
turns launches into compilations.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from kernel_problems import is_wide, kind_of, problems
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from lora_fast.kernels.chip import SHARED_MEMORY, Chip, assume

MATRIX = {"mma.sync": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma"}


class TargetOnly:
    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_device_interface(self) -> ModuleType:
        return torch.cuda


def disassemble(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as f:
        f.write(cubin)
    try:
        return subprocess.run([tool, option, f.name], capture_output=True, text=True, check=True).stdout
    finally:
        os.unlink(f.name)


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, stack bytes a thread)."""
    text = disassemble(cubin, "-res-usage")
    registers, stack = (re.findall(rf"{name}:(\d+)", text)[0] for name in ("REG", "STACK"))
    return int(registers), int(stack)


def longest_run(cubin: bytes) -> int:
    """The most warpgroup matrix instructions that are issued without waiting for the one before.

    ptxas serialises them all when anything touches the accumulator while they run, at a third of the speed.
    """
    run = best = 0
    for line in disassemble(cubin, "-sass").splitlines():
        if "HGMMA" in line or "QGMMA" in line:  # of 16 and of 8 bits
            run += 1
            best = max(best, run)
        elif "WARPGROUP.DEPBAR" in line:
            run = 0
    return best


def overwritten(ttgir: str) -> int:
    """In how many loops a tile may be loaded over another that a matrix instruction under way still reads.

    With d loads ahead, and instructions that are waited for an iteration later, a tile needs d + 1 buffers. Triton 3.7
    gives d to one that is read otherwise, too (stored, say): results then differ from run to run.
    """
    found = 0
    for loop in re.findall(r"scf\.for.*?scf\.yield", ttgir, re.DOTALL):
        waits, copies = re.findall(r"async_wait.*num = (\d+)", loop), loop.count("async_copy_global_to_local")
        late = any(int(pending) for pending in re.findall(r"warp_group_dot_wait.*pendings = (\d+)", loop))
        if not (waits and copies and late):
            continue
        ahead = int(waits[0]) // copies + 1
        read = set(re.findall(r"warp_group_dot (%\w+), (%\w+)", loop)[0])
        read |= {of for t, of in re.findall(r"(%\w+) = ttg\.memdesc_trans (%\w+)", loop) if t in read}
        tiles = re.findall(r"(%\w+) = ttg\.memdesc_index .*? : !ttg\.memdesc<(\d+)x", loop)
        found += any(int(buffers) <= ahead for tile, buffers in tiles if tile in read)
    return found


ONCE_A: dict[str, Callable[[str], Any]] = {"kind": kind_of, "width": is_wide}
PRODUCTS = "_gemm_kernel", "_products_kernel", "_fan_kernel", "_few_rows_kernel", "_decode_kernel", "_experts_kernel"
PASSES = (
    "_down_fwd_kernel",
    "_glu_down_kernel",
    "_grad_kernel",
    "_weight_kernel",
    "_weight_bwd_kernel",
    "_batch_columns_kernel",
)
INSTRUCTION = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}
# Bytes: on 10.0, where nothing was ever run, a few passes keep 2 to 16 registers in memory; a sum in float32 four; on
# 12.0 a pass of 64 ranks under a mask two to four.
SPILLS = {80: 16, 86: 16, 89: 16, 100: 64, 120: 16}


def facts(name: str, kernel: Any, chip: Chip) -> dict[str, int]:
    """What there is to know of a compiled kernel."""
    registers, stack = resources(kernel.asm["cubin"])
    return {
        "shared": kernel.metadata.shared,
        "registers": registers,
        "stack": stack,
        "dots": kernel.asm["ttir"].count("tt.dot"),
        "run": longest_run(kernel.asm["cubin"]) if chip.capability == 90 and name in PRODUCTS else 0,
        "overwritten": overwritten(kernel.asm["ttgir"]),
        **{name: len(re.findall(pattern, kernel.asm["ptx"])) for name, pattern in MATRIX.items()},
    }


def faults(chip: Chip, kernel: dict[str, Any]) -> Iterator[str]:
    """What is wrong with one compiled kernel, in words."""
    name, sixteen_bit = kernel["kernel"], not is_wide(kernel["problem"])
    wanted = INSTRUCTION[chip.capability]
    if kernel["shared"] > chip.shared_memory:
        yield f"{kernel['shared']} bytes of shared memory, the chip has {chip.shared_memory}"
    if kernel["stack"] > SPILLS.get(chip.capability, 0):
        yield f"spills: {kernel['stack']} bytes of stack"
    if sixteen_bit and name in (*PRODUCTS, *PASSES) and kernel["dots"] and not kernel[wanted]:
        # A pass's product, 16 ranks wide, may take the warp's own instruction on a newer chip.
        if name in PRODUCTS or not kernel["mma.sync"]:
            yield f"no {wanted}"
    if chip.capability == 90 and name in PRODUCTS and sixteen_bit and kernel["run"] < 2:
        yield "its wgmma wait for each other: ptxas has serialised them"
    if kernel["overwritten"]:
        yield "a tile is loaded over one that is still multiplied"


def compile_for(chip: Chip, once_a: Callable[[str], Any] | None = None) -> list[dict[str, Any]]:
    """One record a compiled kernel, of which ``once_a`` tells the problems that need not be told apart."""
    from lora_fast.kernels import launchers
    from lora_fast.kernels.program import Launch

    driver.set_active(TargetOnly(chip.capability))
    # What was compiled is not started.
    for owner, name, value in (
        (launchers, "known", lambda: None),
        (Launch, "start_again", lambda launch, compiled, args: None),
    ):
        setattr(owner, name, value)
    found: list[dict[str, Any]] = []
    compiled: dict[tuple[Any, ...], Any] = {}  # by kernel, and what its problem counts as
    run = JITFunction.run

    def compile_for_problem(problem: str) -> Callable[..., Any]:
        def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            key = self.__name__, once_a and once_a(problem)
            if once_a and key in compiled:
                return compiled[key]
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
            if hasattr(kernel, "result"):
                kernel = kernel.result()
            compiled[key] = kernel
            found.append({"kernel": self.__name__, "problem": problem} | facts(self.__name__, kernel, chip))
            return kernel

        return compile_only

    with assume(chip):
        for problem, launches in problems(chip):
            JITFunction.run = compile_for_problem(problem)
            launches()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chip", type=int, choices=SHARED_MEMORY, help="its compute capability, times ten")
    parser.add_argument("--once-a", choices=ONCE_A, help="compile each kernel once for each, not for each problem")
    args = parser.parse_args()
    chip, wrong = Chip(args.chip, 132), False
    for row in compile_for(chip, ONCE_A.get(args.once_a)):
        print(json.dumps(row))
        for fault in faults(chip, row):
            print(f"{row['kernel']} {row['problem']}: {fault}", file=sys.stderr)
            wrong = True
    sys.exit(wrong)
