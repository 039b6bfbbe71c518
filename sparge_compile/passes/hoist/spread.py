"""The tensors that have the tokens of some sites, and who reads them in which order.

From the operands and the results of the sites it goes both ways, through nodes whose rows are those of their inputs
(:mod:`..match.carried`), into the graphs that a graph runs and out of them. Such a node runs in either order, if all
that it reads has the same. Sites are in the order of blocks; a node that mixes tokens, or is not understood, in that of
the tokens. The graph is only read.
"""

from __future__ import annotations

import operator
from collections import defaultdict, deque
from collections.abc import Hashable, Iterable
from functools import partial
from typing import Any, cast

from torch import Tensor
from torch.fx import Node

from ..match.sdpa import arguments_of, is_sdpa
from ..read.fx_utils import asserts_metadata
from .graphs import Place, Site, Use, maker
from .order import Order

Actor = Hashable  # what has one order: a node that computes tensors, or the keys of a node that attends
BLOCKS, TOKENS = "order of blocks", "order of tokens"


class Spread:
    """What is known of the tensors around some sites of one order."""

    def __init__(self, order: Order, sites: Iterable[Site]) -> None:
        self.order = order
        self.graphs = graphs = order.graphs
        self.places: dict[Node, Place] = {}  # of the tensors, where they have tokens
        self.readers: dict[Node, dict[Actor, Use]] = defaultdict(dict)  # who reads them in its own order
        self.in_tokens: dict[Node, list[Use]] = defaultdict(list)  # who reads them in that of the tokens
        self.ends: dict[Actor, str] = {}  # actors whose order is settled
        self.alike: list[tuple[Actor, Actor]] = []  # actors of one order
        self.is_torn = False  # something would have to be in both orders
        self._sites = {site.node: site for site in sites}
        self._writers: set[Node] = set()
        self._waiting: deque[Node] = deque()
        self._begin()
        while self._waiting:
            value = self._waiting.popleft()
            self._look_back(value, self.places[value])
            for user in value.users:
                if not asserts_metadata(user):
                    self._look_at(value, self.places[value], user)
        for writer in self._writers:
            target: Any = writer.args[0] if writer.target is operator.setitem else writer
            place = self.places.get(target)
            if place is None or graphs.rows(writer).carried(writer, place.dim) is None:
                self._settle(writer)
        for value in self.places:
            if any(map(partial(self._is_view, value), self.in_tokens[value])):
                self._settle(maker(value))

    def _begin(self) -> None:
        for site in self._sites.values():
            for actor, is_ordered, places in _sides(site):
                if is_ordered:
                    self.ends[actor] = BLOCKS
                    for place in places:
                        self._add(site.node.args[place], Place(2))
            if site.queries:
                self._add(site.node, Place(2))

    def _is_view(self, value: Node, use: Use) -> bool:
        """Whether a reader looks at a tensor that is written to, here or by the caller, and would look at a copy."""
        node, reader = use.node, self.graphs.scopes[value.graph].reader
        if node.op == "output":
            served = [] if self.graphs.writers(value) else [x for x in value.users if x not in self.places]
            others = {*node.graph.find_nodes(op="placeholder"), *node.all_input_nodes} - {value, *served}
            return any(reader.share_memory(x, value) for x in others)  # but views of the one copy for all
        results = [node, *(user for user in node.users if user.target is operator.getitem)]
        return bool(self.graphs.writers(value)) and any(reader.share_memory(x, value) for x in results)

    def _settle(self, actor: Actor) -> None:
        """Have an actor in the order of the tokens."""
        self.is_torn |= self.ends.setdefault(actor, TOKENS) is BLOCKS

    def _reads(self, value: Node, place: Place, actor: Actor, use: Use) -> None:
        """Note that an actor reads a tensor in its own order."""
        holds = self.order.holds(value, place)
        if holds and self._add(value, place):
            self.readers[value][actor] = use
        elif not self.order.is_beside(value, place):  # what is beside the grid is the same in both orders
            self.in_tokens[value].append(use)
            self._settle(actor)

    def _add(self, value: Any, place: Place) -> bool:
        """Note a tensor with the tokens at a place; False where it has them at another."""
        if value in self.places:
            if not self.places[value].equals(place):
                self._settle(maker(value))
            return self.places[value].equals(place)
        self.places[value] = place
        self._waiting.append(value)
        actor = maker(value)
        for writer in self.graphs.writers(value):
            self.alike.append((actor, writer))
            self._writers.add(writer)
        return True

    def _look_back(self, value: Node, place: Place) -> None:
        """Note what a tensor is made of."""
        actor = maker(value)
        if self.ends.get(actor) is not BLOCKS:
            origin = self._origin(value, place)
            if origin is None or not self.order.is_known(value):
                self._settle(actor)
            for x, (at, use) in (origin or {}).items():
                self._reads(x, at, actor, use)

    def _origin(self, value: Node, place: Place) -> dict[Node, tuple[Place, Use]] | None:
        """The tensors of whose rows those of a value are made, the places of these, and where they are read."""
        scope = self.graphs.scopes[value.graph]
        around = scope.around(value)
        if around is not None:
            other, x, reader = around
            if other.reader.owner.graph not in self.graphs.scopes:
                return None
            number = value.args[1] if reader.op == "output" else scope.place_of(value)
            return {x: (place, Use(reader, (number,)))}  # type: ignore[arg-type]
        carried = self.graphs.rows(value).carried(value, place.dim)
        use = Use(maker(value), _places(value, "query") if is_sdpa(value) else None)
        return None if carried is None else {x: (place.before(at), use) for x, at in carried.items()}

    def _place_in(self, result: Node, value: Node, place: Place, rank: int | None = None) -> Place | None:
        """Where a node has the tokens that a tensor has at a place; None where it has them not, or mixes them."""
        for dim in range(self.graphs.rank(result) if rank is None else rank):
            origin = (self.graphs.rows(result).carried(result, dim) or {}).get(value)
            if origin is not None and origin.dim == place.dim:
                return place.after(origin, dim)
        return None

    def _look_at(self, value: Node, place: Place, user: Node) -> None:
        """Note how a node reads a tensor."""
        if user in self._sites:
            self._look_at_site(value, place, self._sites[user])
        elif is_sdpa(user):
            self._look_at_sdpa(value, place, user)
        elif user.op == "output":
            self._look_at_end(value, place, user)
        elif (inside := self.graphs.inside(user)) is not None:
            inputs = inside.reader.owner.graph.find_nodes(op="placeholder")
            taken = [x for x, operand in zip(inputs, inside.operands, strict=False) if operand is value]
            for x in taken:
                self._add(x, place)
            if len(taken) < sum(x is value for x in (*user.args, *user.kwargs.values())):
                self.in_tokens[value].append(Use(user))
        elif user.target is operator.setitem:
            self._look_at_setitem(value, place, user)
        else:
            self._look_at_results(value, place, user)

    def _look_at_results(self, value: Node, place: Place, user: Node) -> None:
        rows, fake = self.graphs.rows(user), self.graphs.fake(user)
        several = isinstance(fake, (tuple, list)) and any(isinstance(x, Tensor) for x in fake)
        results = list(user.users) if several else [user]
        understood = (isinstance(x.args[-1], int) and rows.reader.value(x) is not None for x in results)
        told = not several or (bool(results) and all(understood))
        found = {x: self._place_in(x, value, place) for x in (results if told else ())}
        held = {x: at for x, at in found.items() if at is not None and self.order.holds(x, at)}
        added = [self._add(x, at) for x, at in held.items()]
        missed = [
            x
            for x, at in found.items()
            if x not in held and rows.is_read(value, x) and (at is None or not self.order.is_beside(x, at))
        ]
        if missed or not told or not all(added):
            self.in_tokens[value].append(Use(user))
            if held:
                self._settle(maker(next(iter(held))))

    def _look_at_site(self, value: Node, place: Place, site: Site) -> None:
        node = site.node
        for actor, is_ordered, places in _sides(site):
            read = tuple(number for number in places if node.args[number] is value)
            if read and is_ordered and place.equals(Place(2)):
                self.readers[value][actor] = Use(node, read)
            elif read:
                self.in_tokens[value].append(Use(node, read))
        others = tuple(name for name, x in node.kwargs.items() if x is value)
        if others:
            self.in_tokens[value].append(Use(node, others))

    def _look_at_sdpa(self, value: Node, place: Place, user: Node) -> None:
        given = arguments_of(user)
        if given["query"] is value:
            at = self._place_in(user, value, place)
            if at is None or not self._add(user, at):
                self.in_tokens[value].append(Use(user, _places(user, "query")))
        read = tuple(number for name in ("key", "value") if given[name] is value for number in _places(user, name))
        if read:  # in any order, if keys and their values have the same
            is_free = given["attn_mask"] is None and not given["is_causal"] and given["dropout_p"] == 0
            dims = {given[name]: self.graphs.rank(given[name]) - 2 for name in ("key", "value")}
            places = {x: place._replace(dim=dim) for x, dim in dims.items()}
            if is_free and place.dim == dims[value] and all(self._add(x, at) for x, at in places.items()):
                self.readers[value][user, "keys"] = Use(user, read)
            else:
                self.in_tokens[value].append(Use(user, read))
        if given["attn_mask"] is value:
            self.in_tokens[value].append(Use(user))

    def _look_at_end(self, value: Node, place: Place, end: Node) -> None:
        call, results = self.graphs.scopes[end.graph].call, end.args[0]
        reads = [user for user in call.users if user.target is operator.getitem] if call is not None else []
        if call is None or len(reads) < len(call.users) or not isinstance(results, (tuple, list)):
            self.in_tokens[value].append(Use(end))
            return
        for number in (number for number, result in enumerate(results) if result is value):
            same = [user for user in reads if user.args[1] == number]
            self.alike += [(same[0], user) for user in same[1:]]
            for user in same:
                self._add(user, place)

    def _look_at_setitem(self, value: Node, place: Place, user: Node) -> None:
        x, index, rows = cast(tuple[Node, Any, Any], user.args)
        carried = self.graphs.rows(user).carried
        if x is value:
            for given, origin in (carried(user, place.dim) or {}).items():
                if given is not x:
                    self._reads(given, place.before(origin), user, Use(user, (2,)))
        if rows is value:
            at = self._place_in(user, value, place, self.graphs.rank(x))
            if at is not None and self.order.holds(x, at) and self._add(x, at):
                self.readers[value][user] = Use(user, (2,))
            else:
                self.in_tokens[value].append(Use(user, (2,)))
        if value in (index if isinstance(index, tuple) else (index,)):
            self.in_tokens[value].append(Use(user))


def _sides(site: Site) -> list[tuple[Actor, bool, tuple[int, ...]]]:
    """The two sides of a site: who it is, whether it has the order, and its operands."""
    return [(site.node, site.queries, (0,)), ((site.node, "keys"), site.keys, (1, 2))]


def _places(node: Node, name: str) -> tuple[int | str, ...]:
    """Where a call of dense attention has an operand."""
    position = ("query", "key", "value").index(name)
    return (position if position < len(node.args) else name,)
