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


ALWAYS = [("forward", 128, "dense"), ("dq", 128, "dense"), ("dkv", 128, "dense")]
RARELY = [("forward", 64, "dense"), ("dkv", 64, "causal")]
RARELY += [(direction, 128, kind) for direction in ("forward", "dq", "dkv") for kind in ("causal", "packed-corner")]


@pytest.mark.parametrize(
    ("direction", "head_pad", "kind"), [*ALWAYS, *(pytest.param(*case, marks=pytest.mark.slow) for case in RARELY)]
)
def test_compiles_to_tensor_core_and_tma_instructions(direction, head_pad, kind, tmp_path):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(HERE.parent.parent)}
    done = subprocess.run(
        [sys.executable, HERE / "compile_hopper.py", direction, str(head_pad), kind],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wgmma.mma_async"] and found["cp.async.bulk.tensor"], found
    assert found["setmaxnreg"] >= 2, found
    assert found["st.local"] == found["ld.local"] == 0, found
    assert found["shared"] <= SHARED_MEMORY
