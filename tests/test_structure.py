"""House rules that a machine can keep: import arrows, cheap import, no Triton before a kernel runs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sparge_compile"

# A module may import from its own layer's left only (DESIGN section 5).
LAYERS = [
    ["errors", "__init__", "sharding"],
    ["kernels.block_map", "naming", "report", "documents", "fronts"],
    ["origin", "table"],
    ["thresholds", "kernels.allocate", "kernels.reference", "kernels.launch"],
    ["cost", "kernels.capability"],
    ["config"],
    ["kernels.tiles", "kernels.lists", "kernels.cpu_batches"],
    ["kernels.pool", "kernels.forward_hopper", "kernels.backward_query", "kernels.backward_key"],
    ["kernels.select", "kernels.forward", "kernels.backward", "kernels.cpu"],
    ["ops"],
    ["functional", "attached", "passes.fx_utils", "passes.places"],
    ["passes.mask_source", "passes.spelled_out", "passes.fused_kernels"],
    ["passes.lower", "passes.open_up"],
    ["passes.axes", "passes.mutations"],
    ["passes.attention", "passes.reading"],
    ["passes.index_math"],
    ["passes.masks"],
    ["passes.compose", "passes.emit"],
    ["passes.decomposed", "passes.fused"],
    ["passes.find", "passes.leaves"],
    ["passes.decide", "passes.substitute", "passes.tap", "passes.thresholds_in"],
    ["passes.runtime"],
    ["passes.outputs"],
    ["passes.pipeline"],
    ["observe"],
    ["backend", "attachment", "interception"],
    ["rewriting", "teacher", "schedule"],
    ["distill"],
    ["calibrate.curves"],
    ["calibrate.record"],
    ["calibrate.search", "calibrate.state"],
    ["calibrate.run"],
    ["calibrate.influence", "calibrate.sources", "calibrate.plot"],
    ["cli"],
    ["calibrate.__main__"],
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
TRITON = {f"kernels.{name}" for name in ("select", "pool", "forward", "backward", "backward_query", "backward_key")}
TRITON |= {"kernels.lists", "kernels.tiles", "kernels.forward_hopper"}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith(".__init__"):
            yield name, path


def imported(name: str, path: Path):
    """Modules of the package that a file imports at its top level, as names relative to the package."""
    package = name.split(".")[:-1]
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)]
            target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                full = f"{target}.{alias.name}".strip(".")
                yield full if full in RANK else target or "__init__"


@pytest.mark.parametrize("name, path", [pytest.param(*m, id=m[0]) for m in modules()])
def test_imports_point_one_way(name, path):
    assert name in RANK, f"{name} has no layer; give it one"
    for other in imported(name, path):
        assert RANK[other] < RANK[name] or other == name, f"{name} imports {other}, which is not below it"


@pytest.mark.parametrize("name, path", [pytest.param(*m, id=m[0]) for m in modules()])
def test_only_gpu_kernel_files_import_triton(name, path):
    tops = {
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        (node.module or "").split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and not node.level
    }
    assert ("triton" in tops) <= (name in TRITON)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_is_cheap_and_changes_nothing():
    assert run("import sys, sparge_compile; print('torch' in sys.modules)") == "False"
    assert (
        run("import sys, sparge_compile.backend, sparge_compile.functional; print('triton' in sys.modules)") == "False"
    )


def test_public_names_exist():
    import sparge_compile

    for name in sparge_compile.__all__:
        assert getattr(sparge_compile, name) is not None
    with pytest.raises(AttributeError):
        sparge_compile.no_such_name  # noqa: B018
