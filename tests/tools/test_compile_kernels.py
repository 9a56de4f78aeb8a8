"""Every kernel compiled for every chip, without a GPU: its matrix instructions, shared memory, no spills."""

import json
import os
import subprocess
import sys

import pytest
from checkout import ROOT
from devices import TRITON

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from lora_fast.kernels.chip import SHARED_MEMORY, Chip

INSTRUCTION = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}
PRODUCT = "_gemm_kernel"
FEW_ROWS = PRODUCT, "_few_rows_kernel", "_decode_kernel"
PRODUCTS = *FEW_ROWS, "_products_kernel", "_experts_kernel", "_fan_kernel"
PASSES = (
    "_down_fwd_kernel",
    "_glu_down_kernel",
    "_grad_kernel",
    "_weight_kernel",
    "_weight_bwd_kernel",
    "_batch_columns_kernel",
)
BATCH = (
    "_pack_kernel",
    "_places_kernel",
    "_lists_kernel",
    "_batch_columns_kernel",
    "_ds_kernel",
    "_squares_kernel",
    "_dots_kernel",
    "_gains_kernel",
    "_mixed_kernel",
    "_magnitudes_kernel",
)
EXPERTS = "_place_kernel", "_experts_rows_kernel", "_experts_kernel", "_experts_columns_kernel", "_collect_kernel"

# Bytes: on 10.0, where nothing was ever run, a few passes keep 2 to 16 registers in memory; a sum in float32 four.
SPILLS = {80: 16, 86: 16, 89: 16, 100: 64}


def faults(chip, kernel):
    """What is wrong with one compiled kernel, in words."""
    name, sixteen_bit = kernel["kernel"], "float32" not in kernel["problem"].split()[2]
    if kernel["shared"] > (most := Chip(chip, 132).shared_memory):
        yield f"{kernel['shared']} bytes of shared memory, the chip has {most}"
    if kernel["stack"] > SPILLS.get(chip, 0):
        yield f"spills: {kernel['stack']} bytes of stack"
    if sixteen_bit and name in (*PRODUCTS, *PASSES) and kernel["dots"] and not kernel[INSTRUCTION[chip]]:
        # A pass's product, 16 ranks wide, may take the warp's own instruction on a newer chip.
        if name in PRODUCTS or not kernel["mma.sync"]:
            yield f"no {INSTRUCTION[chip]}"
    if chip == 90 and name in PRODUCTS and sixteen_bit and kernel["run"] < 2:
        yield "its wgmma wait for each other: ptxas has serialised them"
    if kernel["overwritten"]:
        yield "a tile is loaded over one that is still multiplied"


@pytest.mark.slow
@pytest.mark.parametrize("chip", SHARED_MEMORY, ids="sm_{}".format)
def test_kernels_of(chip):
    """One test a chip, since compiling takes most of a minute: all problems where the kernels were tuned."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "tools" / "compile_kernels.py"), str(chip)] + ["--once"] * (chip != 90)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(k["dots"] for k in kernels if k["kernel"] in PRODUCTS)
    for p in ("p=0.0", "p=0.1"):
        assert {k["kernel"] for k in kernels if p in k["problem"]} >= {PRODUCT, *PASSES, "_sum_kernel"}
    assert {"_products_kernel", "_stack_kernel", "_glu_grad_kernel"} <= {k["kernel"] for k in kernels}
    assert {"_embedding_kernel", "_embedding_columns_kernel", "_embedding_runs_kernel"} <= {
        k["kernel"] for k in kernels
    }
    assert {"_mask_kernel", "_norm_kernel"} <= {k["kernel"] for k in kernels}
    assert "_whole_kernel" in {k["kernel"] for k in kernels}
    assert {"_rows_kernel", "_columns_kernel"} <= {k["kernel"] for k in kernels} or chip not in (89, 90, 120)
    few = {k["kernel"] for k in kernels if "layer" in k["problem"]}
    assert {"_pair_kernel", "_dz_kernel"} <= few or chip not in (90, 100)
    assert {"_fan_kernel", "_downs_kernel"} <= {k["kernel"] for k in kernels} or chip not in (90, 100)
    assert {*FEW_ROWS} <= few or chip != 90
    assert {*EXPERTS} <= {k["kernel"] for k in kernels if k["problem"].startswith("experts")}
    assert {*BATCH} <= {k["kernel"] for k in kernels if " batch of " in k["problem"]}
    found = [f"{k['kernel']} {k['problem']}: {fault}" for k in kernels for fault in faults(chip, k)]
    assert not found, "\n" + "\n".join(found)


def test_faults_are_found():
    good = {
        "kernel": PRODUCT,
        "problem": "1x1x1 r=1 float16 p=0.0 float16",
        "shared": 0,
        "stack": 0,
        "dots": 1,
        "run": 4,
        "overwritten": 0,
        "mma.sync": 0,
        "wgmma": 1,
        "tcgen05": 0,
    }
    assert not list(faults(90, good))
    bad = [{"shared": 232449}, {"stack": 8}, {"wgmma": 0, "mma.sync": 1}, {"run": 1}, {"overwritten": 1}]
    assert [len(list(faults(90, {**good, **change}))) for change in bad] == [1, 1, 1, 1, 1]
    assert list(faults(100, good)) == ["no tcgen05"]
    assert not list(faults(90, {**good, "kernel": PASSES[0], "wgmma": 0, "mma.sync": 1}))
    assert not list(faults(90, {**good, "kernel": PASSES[1], "wgmma": 0, "dots": 0}))  # DoRA's pass at large ranks
