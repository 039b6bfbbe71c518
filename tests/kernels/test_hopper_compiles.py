"""The Hopper kernels compile on any machine, to what it claims: asynchronous products, TMA, registers by warp."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHARED_MEMORY = 227 * 1024  # of one program on an H100 or H200


DENSE = ["forward-128-dense", "forward_8-128-dense", "dq-128-dense", "dkv-128-dense"]
OTHERS = [["forward-64-dense", "forward_8-64-dense", "dkv-64-causal"]]
OTHERS += [[f"{name}-128-{kind}" for kind in ("causal", "packed-corner")] for name in ("forward", "dq", "dkv")]


@pytest.mark.parametrize("cases", [DENSE, *(pytest.param(cases, marks=pytest.mark.slow) for cases in OTHERS)])
def test_they_compile_to_tensor_core_and_tma_instructions(cases, tmp_path):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(HERE.parent.parent)}
    done = subprocess.run(
        [sys.executable, HERE / "compile_hopper.py", *cases],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    for case, found in zip(cases, map(json.loads, lines), strict=True):
        assert found["wgmma.mma_async"] and found["cp.async.bulk.tensor"], (case, found)
        assert found["setmaxnreg"] >= 2, (case, found)
        assert found["st.local"] == found["ld.local"] == 0, (case, found)
        assert found["shared"] <= SHARED_MEMORY, case
