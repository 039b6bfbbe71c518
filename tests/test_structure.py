"""House rules that a machine can keep: import arrows between folders, cheap import, no Triton before a kernel runs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sparge_compile"

# A room imports only from rooms that stand before it, wherever in a file the import is written. docs/design.md has the
# reasons. A folder is one room; a file of the package's root is one, too.
ROOMS = [
    ["version", "errors", "user_model", "limit", "cost_table"],
    ["pair", "keeping", "schedule", "report", "naming", "sharding", "host", "installed", "rows"],
    ["kernels", "dialects"],
    ["ops", "cost", "sums"],
    ["functional", "lowering", "thresholds"],
    ["options", "parallel", "sharing"],
    ["passes"],
    ["running", "inner"],
    ["notices"],
    ["misfits"],
    ["distill", "backend", "rewriting", "doctor", "eager"],
    ["calibrate"],
    ["showing"],
    ["cli"],
]
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}

# Within kernels and passes.
INNER_ROOMS = {
    "kernels": [
        ["block_map", "how", "launch", "sizes"],
        ["kept", "order", "eight_bits"],
        ["allocate", "capability", "rule", "reference"],
        ["dense"],
        ["check", "attend", "reorder"],
        ["cpu", "triton"],
        ["inventory", "direct"],
    ],
    "passes": [
        ["read"],
        ["match"],
        ["mha"],
        ["find"],
        ["stated"],
        ["decide", "order"],
        ["write"],
        ["substitute"],
        ["hoist", "work"],
        ["pipeline"],
    ],
}
# The rule stands below every kernel; what checks it is for tests, benchmarks, and the check of kernels on the spot.
ORACLE, JUDGE = "kernels.reference", "kernels.check"
# The modules that are run as a program go up to the command line.
PROGRAMS = {"calibrate.__main__"}


def modules() -> Iterator[tuple[str, Path]]:
    """Name (relative to the package; a folder's face has the folder's name) and file of each module but the root's."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name:
            yield name, path


NAMES = {name for name, _ in modules()}


def imported(name: str, path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, at its top, late, or for types."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "sparge_compile"):
            base = package[: len(package) - (node.level - 1)] if node.level else []
            target = ".".join([*base, *(node.module or "").split(".")]).strip(".").removeprefix("sparge_compile")
            for alias in node.names:
                full = f"{target}.{alias.name}".strip(".")
                yield full if full in NAMES else target.strip(".")


@pytest.mark.parametrize("name, path", [pytest.param(*m, id=m[0]) for m in modules()])
def test_imports_point_one_way(name: str, path: Path) -> None:
    room = name.split(".")[0]
    assert room in RANK, f"{name} stands in no room; give it one here and in docs/design.md"
    for other in imported(name, path):
        there = other.split(".")[0]
        assert there, f"{name} imports the package's own face"
        if there != room and name not in PROGRAMS:
            assert RANK[there] < RANK[room], f"{name} imports {other}, which is not below it"
        if there == room and room in INNER_ROOMS and name.count(".") and other.count("."):
            ranks = {inner: rank for rank, inners in enumerate(INNER_ROOMS[room]) for inner in inners}
            here, at = name.split(".")[1], other.split(".")[1]
            assert here == at or ranks[at] < ranks[here], f"{name} imports {other}, which is not below it"
        assert other != ORACLE or name in (ORACLE, JUDGE), f"{name} imports the oracle"


def test_there_is_no_circle() -> None:
    arrows = {name: set(imported(name, path)) - {name} for name, path in modules() if name not in PROGRAMS}

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in seen:
            for other in arrows.get(name, ()):
                visit(other, (*way, name))
            seen.add(name)

    seen: set[str] = set()
    for name in arrows:
        visit(name, ())


@pytest.mark.parametrize("name, path", [pytest.param(*m, id=m[0]) for m in modules()])
def test_only_gpu_kernel_files_import_triton(name: str, path: Path) -> None:
    tops = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            tops |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            tops.add((node.module or "").split(".")[0])
    assert "triton" not in tops or name.startswith("kernels.triton.")


@pytest.mark.parametrize("name, path", [pytest.param(*m, id=m[0]) for m in modules()])
def test_what_is_public_has_a_docstring(name: str, path: Path) -> None:
    def lacking(body: list[ast.stmt], owner: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_":
                overload = any(isinstance(x, ast.Name) and x.id == "overload" for x in node.decorator_list)
                if not ast.get_docstring(node) and not overload:
                    yield f"{owner}{node.name}"
                if isinstance(node, ast.ClassDef):
                    yield from lacking(node.body, f"{node.name}.")

    tree = ast.parse(path.read_text())
    missing = list(lacking(tree.body, ""))
    assert ast.get_docstring(tree) or path.name == "__init__.py", f"{name} does not say what it is"
    assert not missing, f"without a docstring: {', '.join(missing)}"


CHEAP = """
import sys, sparge_compile
assert "torch" not in sys.modules
import sparge_compile.backend, sparge_compile.functional
assert "triton" not in sys.modules
assert callable(sparge_compile.calibrate)  # a package of this name is there as well
from sparge_compile.calibrate import record
"""
BY_NAME = """
import torch, sys
assert "sparge" in torch._dynamo.list_backends() and "sparge_compile" not in sys.modules
from sparge_compile.calibrate import record
import sparge_compile
assert callable(sparge_compile.calibrate)
"""


@pytest.mark.parametrize("code", [CHEAP, BY_NAME], ids=["importing is cheap", "the backend is found by name"])
def test_a_new_process(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_exist() -> None:
    import sparge_compile

    for name in sparge_compile.__all__:
        assert getattr(sparge_compile, name) is not None
    with pytest.raises(AttributeError):
        sparge_compile.no_such_name  # noqa: B018


def test_type_checkers_know_every_public_name() -> None:
    import sparge_compile

    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    known = [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(known) == sorted(sparge_compile.__all__)
