"""Every Triton kernel compiles, with the launches of the table, for GPUs that are not here, and fits into them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
# Bytes of shared memory that one program may have. sm_90 stands for H100 and H200, 100 for B200, 120 for RTX 50.
SHARED_MEMORY = {
    "cuda:80": 163 * 1024,
    "cuda:86": 99 * 1024,
    "cuda:89": 99 * 1024,
    "cuda:90": 227 * 1024,
    "cuda:100": 227 * 1024,
    "cuda:120": 99 * 1024,
    "hip:gfx942": 64 * 1024,
}
# Bytes that a thread may spill: most where launches were not measured. A mask with rows needs pointers: the forward of
# 128 rows spills them on Hopper, and was slower with 8 warps, which spill nothing (H200: 1.37 ms, not 1.21).
STACK = {"none": 400, "causal": 480, "mask": 1536, "packed": 480, "order": 400, "fp8": 480}
KERNELS = {"pool", "score", "select", "forward", "pack", "unpack", "dq", "dkv"}


def compiled(target: str, head_sizes: str, dtype: str, kinds: str, cache: Path) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(HERE.parent.parent)}
    done = subprocess.run(
        [sys.executable, HERE / "compile_kernels.py", target, head_sizes, dtype, kinds],
        env=environment, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check_fits(target: str, head_sizes: str, dtype: str, kinds: str, cache: Path) -> None:
    rows = compiled(target, head_sizes, dtype, kinds, cache)
    for row in rows:
        assert row["shared"] <= SHARED_MEMORY[target], row
        assert row.get("stack", 0) <= STACK[row["kind"]], row
        assert row.get("registers", 0) <= 255, row
    names = {row["kernel"].removeprefix("_").removesuffix("_kernel") for row in rows}
    wanted = KERNELS | ({"kept"} if "order" in kinds else set())
    wanted = (
        wanted if kinds != "fp8" else wanted - {"pool", "forward"} | {"code", "forward_8", "rows", "values", "lower"}
    )
    assert names >= wanted, f"not compiled: {wanted - names}"


def test_kernels_fit_into_a_gpu_with_little_shared_memory(tmp_path):
    check_fits("cuda:86", "128", "bfloat16", "causal", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_MEMORY)
@pytest.mark.parametrize("head_size", ["32", "64", "128", "256", "192/128", "64/128"])
def test_kernels_fit_into_every_gpu(target, head_size, tmp_path):
    if target.startswith("hip"):
        pytest.importorskip("triton.backends.amd")
    check_fits(target, head_size, "bfloat16", "none,causal,mask,packed,order", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:86", "cuda:90", "hip:gfx942"])
def test_kernels_in_float32_fit_too(target, tmp_path):
    check_fits(target, "128", "float32", "none,causal", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:89", "cuda:90", "cuda:100", "cuda:120"])
@pytest.mark.parametrize("head_size", ["32", "64", "128", "256", "192/128", "64/128"])
def test_kernels_in_eight_bits_fit_where_there_are_such_products(target, head_size, tmp_path):
    check_fits(target, head_size, "bfloat16", "fp8", tmp_path)
