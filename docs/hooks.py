"""What the site adds to docs/: sections of the README, links that lead elsewhere, pages without a place.

A paragraph that is one link, ``[README: Options](../README.md#options)``, becomes that section on the site; a reader of
the repository follows the link. ``{{ sparge --help }}`` becomes what that command prints, and what each of its commands
prints when asked the same.
"""

from __future__ import annotations

import logging
import posixpath
import re
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SECTION = re.compile(r"^\[README: [^\]]+\]\(\.\./README\.md#([\w-]+)\)$", re.MULTILINE)
HELP = "{{ sparge --help }}"
CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
SHARED = re.compile(r"^( +)(\w+), (\w+(?:, \w+)*): (.*\n(?:\1 +.*\n)*)", re.MULTILINE)  # a, b: what they are
ROLE = re.compile(r":\w+:`~?([^`]+)`")
# Files beside docs/ that are pages of the site, and sections of the README that have a page of their own.
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
OWN_PAGE = {
    "": "index.md",
    "more": "index.md",
    "two-commands": "start.md",
    "calibration": "calibration.md",
    "fine-tuning": "distillation.md",
}

log = logging.getLogger("mkdocs.hooks")


def on_config(config: Any) -> Any:
    """Give the pages that nobody named in mkdocs.yml a place at the end of the list."""
    named = set(re.findall(r"[\w./-]+\.md", str(config.nav)))
    if more := sorted(page for path in DOCS.rglob("*.md") if (page := uri_of(path)) not in named):
        config.nav.append({"More": more})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Make pages of the files beside docs/ that are meant to be read."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put in what a page asks for, and turn its links."""
    uri = page.file.src_uri
    turn = partial(turned, uri=uri, repository=config.repo_url)
    pieces = SECTION.split(markdown)  # texts, and anchors between them
    pieces[0::2] = [turn(text, ROOT if uri in PAGES.values() else (DOCS / uri).parent) for text in pieces[0::2]]
    pieces[1::2] = [turn(sections()[anchor], ROOT) for anchor in pieces[1::2]]
    text = "".join(pieces)
    return text.replace(HELP, commands()) if HELP in text else text


@cache
def sections() -> dict[str, str]:
    """The README's sections with their headings, by anchor."""
    parts = re.split(r"^(?=## )", (ROOT / "README.md").read_text(), flags=re.MULTILINE)[1:]
    return {slug(part.splitlines()[0][3:]): part.strip() for part in parts}


@cache
def homes() -> dict[str, str]:
    """Where each section of the README stands on the site."""
    pages = {anchor: path for path in DOCS.rglob("*.md") for anchor in SECTION.findall(path.read_text())}
    return OWN_PAGE | {anchor: f"{uri_of(path)}#{anchor}" for anchor, path in pages.items()}


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def uri_of(path: Path) -> str:
    """The name of a page, from docs/ on."""
    return path.relative_to(DOCS).as_posix()


def turned(text: str, base: Path, uri: str, repository: str | None) -> str:
    """A text with the links that it has from a folder of the repository, as the page ``uri`` has them."""

    def link(match: re.Match[str]) -> str:
        mark, shown, target = match.groups()
        path, _, anchor = target.partition("#")
        if ":" in path or (not path and base != ROOT):  # the web; this page itself
            return match[0]
        inside = posixpath.relpath((base / path if path else ROOT / "README.md").resolve().as_posix(), ROOT.as_posix())
        if to := address(inside, anchor):
            shown = title(inside) if inside.endswith(".md") and shown in (inside, Path(inside).name) else shown
            return f"{mark}[{shown}]({posixpath.relpath(to, posixpath.dirname(uri) or '.')})"
        return f"[{shown}]({repository.rstrip('/')}/blob/main/{inside})" if repository else shown

    pieces = CODE.split(text)
    pieces[0::2] = [LINK.sub(link, piece) for piece in pieces[0::2]]
    return "".join(pieces)


def address(inside: str, anchor: str) -> str | None:
    """Where the site has a file of the repository, or a heading in it; None for sources."""
    if inside == "README.md":
        if anchor not in homes():
            log.warning("no page shows the section #%s of the README", anchor)
        return homes().get(anchor, "index.md")
    page = PAGES.get(inside)
    if inside.startswith("docs/") and (ROOT / inside).is_file():
        page = inside.removeprefix("docs/")
    return f"{page}#{anchor}" if page and anchor else page


def commands() -> str:
    """What ``sparge --help`` prints, and each of its commands."""
    whole = printed("--help")
    return whole + "".join(
        f"\n\n## sparge {name}\n\n{printed(name, '--help')}"
        for name in re.findall(r"^    (\w+)\b", whole, re.MULTILINE)
    )


def title(inside: str) -> str:
    """What a page of the repository calls itself: links that show its path show this on the site."""
    heading = re.search(r"^# (.+)$", (ROOT / inside).read_text(), re.MULTILINE)
    return heading[1] if heading else inside


def printed(*arguments: str) -> str:
    """What ``sparge`` prints, as a block of code."""
    command = [sys.executable, "-m", "sparge_compile.cli", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env={"COLUMNS": "100"})
    return f"```text\n{run.stdout.rstrip()}\n```"


def plain(docstring: str) -> str:
    """A docstring without Sphinx's roles, and with one line for each of arguments that share one."""

    def apart(match: re.Match[str]) -> str:
        indent, first, others, text = match.groups()
        return f"{indent}{first}: {text}" + "".join(
            f"{indent}{other}: see `{first}`.\n" for other in others.split(", ")
        )

    return SHARED.sub(apart, ROLE.sub(r"`\1`", docstring + "\n"))


class PlainDocstrings(griffe.Extension):
    """Docstrings of the house as griffe reads them."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """Rewrite the docstring of whatever was read."""
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
