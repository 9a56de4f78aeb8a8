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

sys.path.insert(0, str(ROOT / "tools"))  # the tool is run as a script, beside kernel_problems.py
from compile_kernels import PASSES, PRODUCTS, faults  # noqa: E402

from lora_fast.kernels.chip import SHARED_MEMORY, Chip  # noqa: E402

PRODUCT, HOPPER = "_gemm_kernel", Chip(90, 132)
FEW_ROWS = "_few_rows_kernel", "_decode_kernel"
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


@pytest.mark.slow
@pytest.mark.parametrize("chip", SHARED_MEMORY, ids="sm_{}".format)
def test_kernels_of(chip):
    """A test a chip: each kernel once for each kind of problem where the kernels were tuned, elsewhere once in 16 bits
    and once in 32."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT)
    once = "kind" if chip == HOPPER.capability else "width"
    command = [sys.executable, str(ROOT / "tools" / "compile_kernels.py"), str(chip), "--once-a", once]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(k["dots"] for k in kernels if k["kernel"] in PRODUCTS)
    for p in ("p=0.0", "p=0.1") if once == "kind" else ("",):
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
    assert not list(faults(HOPPER, good))
    bad = [{"shared": 232449}, {"stack": 8}, {"wgmma": 0, "mma.sync": 1}, {"run": 1}, {"overwritten": 1}]
    assert [len(list(faults(HOPPER, {**good, **change}))) for change in bad] == [1, 1, 1, 1, 1]
    assert list(faults(Chip(100, 132), good)) == ["no tcgen05"]
    assert not list(faults(HOPPER, {**good, "kernel": PASSES[0], "wgmma": 0, "mma.sync": 1}))
    assert not list(faults(HOPPER, {**good, "kernel": PASSES[1], "wgmma": 0, "dots": 0}))  # DoRA's pass at large ranks
