"""bench_four_bits as far as a machine without a GPU can tell: its candidates, what they hold, its summary."""

import importlib.util

import pytest

from benchmarks import bench_four_bits, bench_lora
from lora_fast.bases.packed import packed_in

CASE = bench_lora.Case("bf16", 32, 64, 128, 16, 0.1)


def test_the_candidates_are_named_after_their_bases():
    built = bench_four_bits.build(CASE, bench_four_bits.IMPLS, "cpu")
    missing = set(bench_four_bits.IMPLS) - built.keys()
    assert not missing or not all(map(importlib.util.find_spec, ("peft", "bitsandbytes")))
    bases = {}
    for name, candidate in built.items():
        for call in candidate.calls().values():
            call()
        assert all(leaf.grad is not None for leaf in candidate.leaves), name
        if name.startswith("lora_fast"):
            packed = packed_in(candidate.layer.weight)
            bases[name] = None if packed is None else (packed.LABEL, packed.E4M3_PRODUCTS)
    for kind in bench_four_bits.KINDS:
        assert bases[f"lora_fast_{kind}"] is None and bases[f"lora_fast_fp8_{kind}"] == ("fp8", True)
        assert bases[f"lora_fast_nf4_{kind}"] == ("nf4", False) and bases[f"lora_fast_nf4_fp8_{kind}"] == ("nf4", True)
        assert bases[f"lora_fast_mxfp4_{kind}"] == ("mxfp4", False)
        assert bases[f"lora_fast_fp8_blocks_{kind}"] == ("scaled fp8", False)
        assert bases[f"lora_fast_fp8_blocks_fp8_{kind}"] == ("scaled fp8", True)


def test_the_cases_and_the_summary():
    cases = bench_four_bits.FOUR_BITS.cases
    assert len(cases) == 12 and {case.M for case in cases} == {8192, 2048} and {case.p for case in cases} == {0, 0.1}
    rows = [
        {"M": 8192, "p": p, "what": "fwd+bwd", "impl": "lora_fast_nf4_lora", "ratio_to_frozen": ratio}
        for p, ratio in ((0, 2.0), (0, 0.5), (0.1, 1.25))
    ]
    said = bench_four_bits.summarise(rows, [])
    assert "| M=8192, eager | p=0 | p=0.1 |" in said and "| lora_fast_nf4_lora | 1.000 | 1.250 |" in said
    with pytest.raises(SystemExit):
        bench_four_bits.main(["--help"])
