"""Where a compiled frame stands in the user's model: graph inputs and the Python stack in, places out.

A frame knows modules by a local of its own (a base, ``L['self']``), so in block-by-block compilation and after graph
breaks its paths begin at the block. Parameters tell where that is: they are inputs of the graph, by identity, and the
model knows their full names. Frames without parameters are placed by the module that is being called.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Module
from torch.utils.weak import WeakTensorKeyDictionary

from ..naming import ROOT, base_of, clean_path, join, user_path
from ..user_model import HELD_AS, bare, remember_compiled, user_names
from .stack import find_root, modules_on_stack, remember_model


class Place:
    """A module of a model: ``prefix`` is its full name in ``root``; None where it is not known."""

    def __init__(self, root: Module | None = None, prefix: str | None = None) -> None:
        self._root = None if root is None else ref(root)
        self.prefix = prefix

    @property
    def root(self) -> Module | None:
        """The model; None where it is not known, or gone."""
        return self._root() if self._root is not None else None

    def name(self, path: str) -> str:
        """The full name of a path below this place; the path itself where the place is unknown."""
        return path if not self.prefix else join(self.prefix, path)

    def module(self, path: str) -> Module | None:
        """The user's module under a path below this place; None where the place is unknown."""
        root = self.root
        if root is None or self.prefix is None:
            return None
        full = join(self.prefix, path)
        full = "" if full == ROOT else full
        try:
            return bare(root.get_submodule(full))
        except AttributeError:  # there are wrappers on the way
            return Names(root).by_name.get(full)


class Names:
    """The full names of a model's tensors and modules, by identity; valid while the model is held."""

    def __init__(self, root: Module) -> None:
        self.root = bare(root)
        remember_model(self.root)
        self.tensors: defaultdict[int, list[str]] = defaultdict(list)
        self.modules: dict[int, str] = {}
        self.by_name: dict[str, Module] = {}
        self._short: dict[str, str] = {}  # by the name that says what wraps as well
        for name, short, module in user_names(self.root):
            self._short[user_path(name)] = short
            self.modules.setdefault(id(module), short)
            self.by_name[short] = module  # the last one is what a wrapper wraps
        for path, short in [*self._short.items()]:
            self._add_paths_below(path, short)
        for name, tensor in self._tensors():
            self.tensors[id(tensor)].append(name)

    def _add_paths_below(self, path: str, short: str) -> None:
        """Know a name that says what wraps also as a path below each module on the way, as graphs of blocks have it."""
        parts = path.split(".") if path != short else []
        for i in range(1, len(parts)):
            above = self._short.get(".".join(parts[:i]))
            if above is not None and f"{short}.".startswith(f"{above}."):
                self._short.setdefault(".".join(parts[i:]), short[len(above) + 1 :])

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for named in (self.root.named_parameters, self.root.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                yield self._shortened(user_path(name)), tensor

    def _shortened(self, name: str) -> str:
        above, _, last = name.rpartition(".")
        return self._short[name] if name in self._short else f"{self._short.get(above, above)}.{last}".lstrip(".")

    @cached_property
    def _ends(self) -> set[str]:
        """Every end of a name of a module or a tensor."""
        names = {*self.by_name, *(name for names in self.tensors.values() for name in names)}
        parts = (name.split(".") for name in names)
        return {".".join(split[i:]) for split in parts for i in range(len(split) + 1)}

    def below(self, path: str) -> str:
        """A path of Dynamo below some module, without what it leads through that wraps others."""
        rest = path
        while (short := self._shortened(rest)) not in self._ends:
            first, _, rest = rest.partition(".")
            if first not in HELD_AS:
                return path
        return short or ROOT

    def prefixes(self, tensor: object, path: str) -> list[str]:
        """Where a module can be that has this tensor under ``path``: full names, in the model's order."""
        found = (_without(name, path) for name in self.tensors.get(id(tensor), ()))
        return list(dict.fromkeys(prefix for prefix in found if prefix is not None))

    def alike(self, prefix: str, path: str) -> Iterator[tuple[Tensor, str]]:
        """Of all modules of the same class as that at ``prefix``: the tensor under ``path``, and the module's name."""
        kind = type(self.by_name.get(prefix))
        for name, tensor in self._tensors():
            other = _without(name, path)
            if other is not None and type(self.by_name.get(other)) is kind:
                yield tensor, other

    def called(self) -> str | None:
        """The name of the innermost module of this model that is being called."""
        called = (m if id(m) in self.modules else bare(m) for m in modules_on_stack())
        return next((self.modules[id(m)] for m in called if id(m) in self.modules), None)


class Anchor(NamedTuple):
    """A parameter or buffer among the inputs of a graph: its position, and its path below its base."""

    position: int
    path: str


class Frame:
    """The modules that a graph was traced from, as the inputs of Dynamo's own graph (no copy of it) tell them."""

    def __init__(self, graph_module: GraphModule) -> None:
        self._anchors: defaultdict[str, list[Anchor]] = defaultdict(list)
        self.inputs: list[Tensor | None] = []  # those that are anchors, as they were traced with
        for index, node in enumerate(graph_module.graph.find_nodes(op="placeholder")):
            self.inputs.append(None)
            given = node.meta.get("grapharg")
            if given is None or given.source is None or not isinstance(given.example, Tensor):
                continue
            source = given.source.name if isinstance(given.source.name, str) else given.source.name()
            base = base_of(source)
            if base is not None and ("_parameters" in source or "_buffers" in source):
                self._anchors[base].append(Anchor(index, clean_path(source)))
                self.inputs[index] = given.example
                remember_compiled(given.example)

    @property
    def tensors(self) -> frozenset[str]:
        """The paths of the parameters and buffers that the graph reads, each below its base."""
        return frozenset(anchor.path for anchors in self._anchors.values() for anchor in anchors)

    def rebased(self, base: str | None, path: str, names: Names | None) -> tuple[str | None, str]:
        """A base and a path below it, from the module on where what is above it is none of the model's modules.

        A tuple, a dict or the rest of an iterator that holds modules is such; their parameters know their names.
        """
        anchors = [] if base is None or names is None else self._anchors.get(base, [])
        if names is None or any(
            join(prefix, path) in names.by_name or path == ROOT
            for anchor in anchors
            for prefix in names.prefixes(self.inputs[anchor.position], names.below(anchor.path))
        ):
            return base, path
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            above = ".".join(parts[:end]) + "."
            inside = (a._replace(path=a.path.removeprefix(above)) for a in anchors if a.path.startswith(above))
            known = [a for a in inside if names.prefixes(self.inputs[a.position], a.path)]
            if known:
                self._anchors[f"{base}.{above}"] = known
                return f"{base}.{above}", ".".join(parts[end:]) or ROOT
        return base, path

    def locator(self, base: str | None, path: str, names: Names | None) -> Locator:
        """Make what finds the place of a base at run time; ``path`` is that of a module below it.

        A site that stands in no module stands in the module that is being called, mostly the base of all the others.
        """
        if names is not None:
            for found in self._anchors.values():
                found[:] = [anchor._replace(path=names.below(anchor.path)) for anchor in found]
        anchors = self._anchors.get(base, []) if base is not None else []
        if base is None and names is not None and (called := names.called()) is not None:
            every = (anchor for anchors in self._anchors.values() for anchor in anchors)
            anchors = [a for a in every if names.prefixes(self.inputs[a.position], a.path) == [called]]
        return Locator(anchors, path, self.inputs, names)


class Locator:
    """Finds the place of one base from the inputs of a call: one look-up where the parameter is known."""

    def __init__(self, anchors: list[Anchor], path: str, inputs: Sequence[Any], names: Names | None) -> None:
        self._anchors = anchors
        self._path = path
        self._known = WeakTensorKeyDictionary()
        self._called: WeakKeyDictionary[Module, Place] = WeakKeyDictionary()
        self._nowhere = Place()
        # A tensor that several modules share tells nothing, so look for one that stands for a single module.
        single = (a for a in anchors if names and len(names.prefixes(inputs[a.position], a.path)) == 1)
        self._anchor = next(single, anchors[0] if anchors else None)
        self.first = self.learn(inputs, names)

    def place(self, args: Sequence[Any]) -> Place:
        """The place of this call. Whatever was not met before is looked for in the model that is running now."""
        known = None if self._anchor is None else self._known.get(args[self._anchor.position])
        if known is None and (called := next(modules_on_stack(), None)) is not None:
            known = self._called.get(called)
        if known is not None and known.prefix:
            return known
        # Met alone, as a model of its own, a module may by now be called as a block of another.
        root = find_root()
        if root is None or (known is not None and known.root is root):
            return known or self._nowhere
        return self.learn(args, Names(root))

    def learn(self, args: Sequence[Any], names: Names | None) -> Place:
        """The place of these inputs in a model, kept for later calls together with the places of modules like it."""
        prefix = self.prefix(args, names)
        place = self._nowhere if names is None else Place(names.root, prefix)
        anchor = self._anchor
        if anchor is None or (names is not None and len(names.prefixes(args[anchor.position], anchor.path)) > 1):
            called = next(modules_on_stack(), None)
            if called is not None:
                self._called[called] = place
            return place
        self._known[args[anchor.position]] = place
        if names is not None and prefix is not None:
            for tensor, other in names.alike(prefix, anchor.path):
                if tensor not in self._known and len(names.prefixes(tensor, anchor.path)) == 1:
                    self._known[tensor] = Place(names.root, other)
        return place

    def where(self, args: Sequence[Any], names: Names | None) -> Place:
        """The place of these inputs in a model, for a look at it: nothing is kept."""
        return Place(names.root, self.prefix(args, names)) if names is not None else self._nowhere

    def prefix(self, args: Sequence[Any], names: Names | None) -> str | None:
        """Where in a model these inputs come from; None for what is not known."""
        if names is None:
            return None
        called = names.called()
        candidates: list[str] = []
        for anchor in self._anchors:
            prefixes = names.prefixes(args[anchor.position], anchor.path)
            if len(prefixes) == 1:
                return prefixes[0]
            candidates = [p for p in candidates if p in prefixes] or prefixes or candidates
        if candidates:
            return called if called in candidates else candidates[0]
        if called is None or (self._path != ROOT and join(called, self._path) not in names.by_name):
            return None
        return called

    def places(self) -> list[Place]:
        """Every place that is known: those of the modules that may share the graph."""
        return [*self._known.values(), *self._called.values()]


class Fixed(Locator):
    """Finds one place, which is known: that of a call in eager code."""

    def __init__(self, place: Place) -> None:
        self.first = place

    def place(self, args: Sequence[Any]) -> Place:
        """The place, whatever the inputs."""
        return self.first

    def where(self, args: Sequence[Any], names: Names | None) -> Place:
        """The place, whatever the inputs."""
        return self.first

    def places(self) -> list[Place]:
        """The one place."""
        return [self.first]


def find_names() -> Names | None:
    """The names of the model that is running; None where no module is."""
    root = find_root()
    return None if root is None else Names(root)


def _without(name: str, path: str) -> str | None:
    """The part of a name before ``path``; None where the name does not end so."""
    if name == path:
        return ""
    return name[: -len(path) - 1] if name.endswith("." + path) else None
