"""The pages say what the code does: links, cited files, the table of options, the list of passes, the layout."""

from __future__ import annotations

import re
from functools import partial
from itertools import takewhile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

import sparge_compile
from sparge_compile.options import Options, option_table
from sparge_compile.passes.pipeline import decide_sites, rewriting_passes
from sparge_compile.passes.work import run
from sparge_compile.running.graph import open_graph

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sparge_compile"
DESIGN = ROOT / "docs" / "design.md"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *ROOT.glob("examples/*.md"),
    *ROOT.glob("gallery/*.md"),
]
SOURCES = [p for folder in (PACKAGE, *map(ROOT.joinpath, ("tests", "benchmarks", "studies", "examples"))) for p in
           sorted(folder.rglob("*.py"))]  # fmt: skip


def section(page: Path, heading: str) -> str:
    """What stands under a heading of the second level."""
    return page.read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def anchors(page: Path) -> set[str]:
    """The anchors of the headings, as GitHub makes them, and of the README's sections that the site shows there."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    shown = re.findall(r"^\[README: .+\]\(\.\./README\.md#([\w-]+)\)$", page.read_text(), re.MULTILINE)
    return {*shown} | {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}: no such heading"


# The changelog tells of files that have gone since; the others may name those that a command writes.
@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_files_that_pages_name_are_there(page):
    for name in re.findall(r"[\w.*-]+(?:/[\w.*-]+)+\.(?:py|md)\b", page.read_text()):
        bases = (ROOT, PACKAGE, page.parent)
        assert any(any(base.glob(name)) for base in bases), f"{page.name} names {name}, which is not there"


def test_sources_cite_pages_that_are_there():
    for path in SOURCES:
        for cited in re.findall(r"\bdocs/[\w/.*-]+\.md\b", path.read_text()):
            assert any(ROOT.glob(cited)), f"{path.relative_to(ROOT)} cites {cited}, which is not there"


def test_readme_has_the_table_of_options():
    table = "\n".join(line for line in section(ROOT / "README.md", "Options").splitlines() if line.startswith("|"))
    assert table == option_table(), f"README.md, Options, should have this table:\n\n{option_table()}\n"


def test_the_site_names_each_page_once():
    named = re.findall(r"^      - [^:]+: ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(named) > 20 and len(named) == len(set(named))


def test_the_reference_has_every_public_name():
    listed = re.findall(
        r"^::: sparge_compile\.(?:[\w.]+\.)?(\w+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE
    )
    assert sorted(listed) == sorted(sparge_compile.__all__)


def test_design_lists_the_passes_that_run():
    q = torch.randn(1, 2, 128, 16)
    traced = make_fx(
        lambda x: (F.scaled_dot_product_attention(x, x, x),), tracing_mode="fake", pre_dispatch=True
    )(q)  # fmt: skip
    work = open_graph(traced, None)
    options = Options(min_seq_len=0)
    run(
        work,
        partial(decide_sites, options=options),
        *rewriting_passes(options, lambda values: values, with_outputs=True),
    )
    assert len(work.substituted) == 1
    listed = re.findall(r"^\d+\. `(\w+)`", section(DESIGN, "The passes"), re.MULTILINE)
    assert listed == work.passes


def tree() -> list[str]:
    """The paths of the layout in docs/design.md; folders end with a slash."""
    block = section(DESIGN, "Layout").split("```\n")[1]
    paths: list[str] = []
    for line in block.splitlines():
        depth = sum(1 for _ in takewhile(str.isspace, line)) // 2
        parents = [*paths[-1].split("/")][:depth] if paths else []
        paths.append("/".join([*parents, line.split()[0]]))
    return paths


def test_design_shows_the_layout():
    shown = [path for path in tree() if path.startswith("sparge_compile/")]
    files = [p for p in PACKAGE.rglob("*.py") if not p.name.startswith("__")]
    folders = {p.parent for p in PACKAGE.rglob("*.py")}
    there = {f"{p.relative_to(ROOT)}/" for p in folders} | {str(p.relative_to(ROOT)) for p in files}
    assert len(shown) == len(set(shown))
    gone, missing = sorted(set(shown) - there), sorted(there - set(shown))
    assert not gone, f"docs/design.md, Layout, shows {', '.join(gone)}; take it out"
    assert not missing, f"docs/design.md, Layout, lacks {', '.join(missing)}; add a line for each"


@pytest.mark.parametrize("path", [path for path in tree() if not path.startswith("sparge_compile/")])
def test_folders_beside_the_package_are_there(path):
    assert (ROOT / path).is_dir()
