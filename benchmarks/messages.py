"""Every error and warning that the package can raise, as its source has it; and which of them a test raises.

``python benchmarks/messages.py`` lists them by file. ``python benchmarks/messages.py tests/test_errors.py …`` (what
pytest takes; ``tests`` is the whole suite) runs these tests, marks what was raised, and counts what was not.

A message is a call of the functions of ``errors.py``, of ``warn`` or ``warnings.warn``, of an exception's class behind
``raise``, or of a function that hands what it is given on to one of these. What is only known at run time stands in
braces. Exceptions without a text are caught where they are raised, and are left out.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from raised_messages import witnesses

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sparge_compile"
PARTS = ("what", "given", "allowed", "todo")  # of the functions of errors.py, and how they put them together
FOUR = "{what}: got {given}; allowed: {allowed}. {todo}"
WARNERS = {"warn": ("about", "text"), "warnings.warn": ("text",)}


class Message(NamedTuple):
    """One place that raises or warns."""

    path: str
    first: int
    last: int
    kind: str
    text: str


def text_of(node: ast.expr | None, known: Mapping[str, str]) -> str:
    """What an expression says: constants as they are, names that are known by their value, all else in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, known) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value, known)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left, known) + text_of(node.right, known)
    if isinstance(node, ast.IfExp):
        return f"{{{text_of(node.body, known)} | {text_of(node.orelse, known)}}}"
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    return f"{{{ast.unparse(node)}}}" if node is not None else "{}"


class Source:
    """The functions, constants and imported names of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path.relative_to(ROOT).as_posix()
        self.tree = ast.parse(path.read_text())
        self.functions = {node.name: node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)}
        self.imported = {
            alias.name for node in ast.walk(self.tree) if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        self.constants = {
            target.id: text_of(node.value, {})
            for node in self.tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.JoinedStr)
            for target in node.targets
            if isinstance(target, ast.Name)
        }


class Package:
    """The sources, and the functions in them that hand what they are given on to one that makes a text."""

    def __init__(self) -> None:
        self.sources = [Source(path) for path in sorted(PACKAGE.rglob("*.py")) if path.name != "errors.py"]
        self.constants = {name: text for source in self.sources for name, text in source.constants.items()}
        self.helpers: dict[tuple[str, str], ast.FunctionDef] = {}
        while more := {
            (source.path, name): function
            for source in self.sources
            for name, function in source.functions.items()
            if (source.path, name) not in self.helpers and self._hands_on(function, source)
        }:
            self.helpers |= more

    def helper(self, name: str, source: Source) -> tuple[ast.FunctionDef, Source] | None:
        """The helper that a name means in a file, and the file that has it."""
        for there in [source] if name in source.functions else self.sources if name in source.imported else []:
            if (there.path, name) in self.helpers:
                return self.helpers[there.path, name], there
        return None

    def text(self, node: ast.Call, source: Source, known: Mapping[str, str]) -> str | None:
        """The text that a call makes, if it makes one."""
        name = called(node)
        if {word.arg for word in node.keywords} >= {*PARTS[1:]}:
            return FOUR.format_map(bound(node, PARTS, known))
        if name in WARNERS:
            return bound(node, WARNERS[name], known).get("text")
        found = self.helper(name, source)
        if found is None:
            return None
        function, there = found
        inner = next(call for call in calls(function) if self.makes(call, there) and called(call) != name)
        given = bound(node, parameters(function), known)
        return self.text(inner, there, {**self.constants, **there.constants, **given})

    def makes(self, node: ast.Call, source: Source) -> bool:
        """Whether a call makes a text."""
        four = {word.arg for word in node.keywords} >= {*PARTS[1:]}
        return four or called(node) in WARNERS or self.helper(called(node), source) is not None

    def _hands_on(self, function: ast.FunctionDef, source: Source) -> bool:
        """Whether a short function gives a parameter of its own to a call that makes a text."""
        inner = [call for call in calls(function) if called(call) != function.name and self.makes(call, source)]
        given = (part for call in inner for whole in (*call.args, *call.keywords) for part in ast.walk(whole))
        names = {part.id for part in given if isinstance(part, ast.Name)}
        ends = isinstance(function.body[-1], ast.Return) or function.name == "_warn_once"
        return ends and len(function.body) < 5 and bool(names & {*parameters(function)})

    def messages(self) -> list[Message]:
        """Every message, by file and line."""
        return sorted(message for source in self.sources for message in self._messages_of(source))

    def _messages_of(self, source: Source) -> Iterator[Message]:
        inside = [function for (path, _), function in self.helpers.items() if path == source.path]
        done = {part for function in inside for part in ast.walk(function)}
        for node in ast.walk(source.tree):
            raised = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(raised, ast.Call) or raised in done:
                continue
            text = self.text(raised, source, {**self.constants, **source.constants})
            if text is None and raised is not node and raised.args and called(raised) not in ("AssertionError",):
                inner = [part for part in ast.walk(raised.args[0]) if isinstance(part, ast.Call)]
                if not any(self.makes(call, source) for call in inner):
                    text = text_of(raised.args[0], source.constants)
            if text is not None and not re.fullmatch(r"\{[^{}]*\}", text):  # a text of its own
                done |= {*ast.walk(raised)}
                kind = "warning" if text.startswith("sparge: ") and "; allowed: " not in text else "error"
                yield Message(source.path, raised.lineno, raised.end_lineno or raised.lineno, kind, text)


def called(node: ast.Call) -> str:
    """The name that a call has in the source, without ``self``."""
    return ast.unparse(node.func).removeprefix("self.").removeprefix("notices.")


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    """The calls below a node."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def bound(node: ast.Call, names: tuple[str, ...], known: Mapping[str, str]) -> dict[str, str]:
    """The texts of a call's arguments by the names of the parameters."""
    found = {name: text_of(given, known) for name, given in zip(names, node.args, strict=False)}
    return found | {word.arg: text_of(word.value, known) for word in node.keywords if word.arg is not None}


def parameters(function: ast.FunctionDef) -> tuple[str, ...]:
    """The names of a function's parameters, without ``self``."""
    every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return tuple(argument.arg for argument in every if argument.arg != "self")


def main() -> None:
    """Print the list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs=argparse.REMAINDER, help="what pytest is to run, with its options")
    parser.add_argument("--untested", action="store_true", help="print only what no test raised")
    args = parser.parse_args()
    found = witnesses(args.tests) if args.tests else None
    listed, raised = Package().messages(), 0
    for message in listed:
        lines = range(message.first, message.last + 1)
        by = next((test for line in lines if (test := (found or {}).get(f"{message.path}:{line}"))), "")
        raised += bool(by)
        if not (args.untested and by):
            print(f"{message.path}:{message.first} {message.kind}\n    {message.text}")
            print("" if found is None else f"    [{by or 'NO TEST'}]\n")
    print(f"{len(listed)} messages" + ("" if found is None else f", {raised} of them raised by a test"))


if __name__ == "__main__":
    main()
