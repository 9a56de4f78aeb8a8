"""Adapters under names, sharded by FSDP2 in two processes."""

import json

import pytest
from pairs import two_processes


@pytest.mark.slow
def test_two_processes(tmp_path):
    for kind in ("LoRA", "DoRA"):
        (tmp_path / kind).mkdir()
    two_processes("named_distributed.py", tmp_path)
    for rank in range(2):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert list(seen) == ["LoRA", "DoRA"]
        assert {kind: [step for step, good in found.items() if not good] for kind, found in seen.items()} == {
            "LoRA": [],
            "DoRA": [],
        }
