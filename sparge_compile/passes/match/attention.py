"""Attention in one form, whatever its spelling: operands with the axes of their dimensions, masks, scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...kernels.sizes import surely
from ...report import Reason
from ...sharding import dims_of, is_sharded
from ..read.axes import Dim, Layout, axes_of, size_of
from ..read.fx_utils import value_of


@dataclass(frozen=True)
class Refusal:
    """Why something is not, or cannot become, sparse attention. ``node`` is one of its products, where it is known."""

    reason: Reason
    detail: str = ""
    node: Node | None = None


@dataclass(frozen=True)
class Axes:
    """The axes of one attention problem. ``group`` are those of the heads that share a key head, minor to ``heads``."""

    batch: Dim
    heads: Dim  # of the keys
    group: Dim
    rows: Dim
    keys: Dim
    feature: Dim  # of query and key
    value_feature: Dim


@dataclass(frozen=True)
class Operand:
    """A tensor of the graph, the axes of its dimensions, and the axes that it shall have, dimension by dimension.

    Axes that it lacks are broadcast; a mask keeps size 1 there (``expand`` is false). ``user`` is the node that reads
    it in the graph as it was found.
    """

    node: Node
    user: Node
    layout: Layout
    wanted: Layout
    expand: bool = True

    def has(self, dim: Dim) -> bool:
        """Whether it has one of the axes of a dimension."""
        return not set(dim).isdisjoint(axes_of(self.layout))


@dataclass(frozen=True)
class Mask:
    """One condition on (query, key) pairs, or one tensor added to scores.

    ``kind``: ``keep`` (bool, True attends), ``drop`` (bool, True hides), ``hide`` (numbers: 0, or so low that they
    hide), ``add`` (numbers that change scores). ``row``: the row that stands for all, ``"first"`` or ``"last"``, where
    rows are alike but for causality, which is told apart.
    """

    operand: Operand
    kind: str
    row: str | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Factor:
    """A number or tensor that scales scores row by row: multiplied by, or divided by where ``inverse``."""

    operand: Operand | Node  # a node that is a number at run time
    inverse: bool = False


@dataclass(frozen=True)
class Packing:
    """Several sequences one after the other in rows and keys: a batch of one, that attends sequence by sequence.

    Nodes of int32 [N + 1] on the device: where each sequence begins, and where the last one ends. The lengths of the
    longest ones are numbers, or nodes that are numbers at run time.
    """

    cu_seqlens_q: Node
    cu_seqlens_k: Node
    max_seqlen_q: Node | int
    max_seqlen_k: Node | int


@dataclass(frozen=True)
class Exchange:
    """Ranks have exchanged parts of the sequence for heads: each has the whole of it, for its share of the heads.

    ``key_heads`` are those of all ranks; ``order`` [Hk] says which belong to which rank, None: as they come.
    """

    rank: int
    ranks: int
    key_heads: int
    order: Node | None


@dataclass(frozen=True)
class Ring:
    """Keys and values go round among ranks, each of which has its part of the queries and of the keys."""

    rank: int
    ranks: int
    group: str


@dataclass(frozen=True)
class Attention:
    """softmax(scale · Q Kᵀ + masks) V of a graph, and the node that holds its result.

    ``bottom_right``: the causal diagonal ends at the last query and key (flash-attn), instead of beginning at the first
    ones (SDPA). ``packing``: rows and keys hold several sequences. ``exchange``, ``ring``: other processes
    have heads or tokens of it.

    ``autocast``: where it is on, it casts queries, keys and values, as it does those of SDPA and of products.
    ``rewritten``: the result is changed in place later on. ``region`` are the nodes that have no reader but one another
    once the result is replaced, in graph order. ``trains``: a backward will follow, by what was traced.
    ``gathers``: operands and result are brought into an order of tokens, and back, beside it.
    """

    axes: Axes
    query: Operand
    key: Operand
    value: Operand
    output: Node
    output_layout: Layout
    dtype: torch.dtype
    masks: tuple[Mask, ...] = ()
    is_causal: bool = False
    bottom_right: bool = False
    packing: Packing | None = None
    exchange: Exchange | None = None
    ring: Ring | None = None
    scale: float | None = None
    factors: tuple[Factor, ...] = ()
    dropout: Any = 0.0
    region: tuple[Node, ...] = ()
    rewritten: bool = False
    autocast: bool = True
    trains: bool = False
    gathers: bool = False

    @property
    def batch(self) -> Any:
        """B: the batch size, an int or a SymInt."""
        return size_of(self.axes.batch)

    @property
    def kv_heads(self) -> Any:
        """Hk: the number of key heads."""
        return size_of(self.axes.heads)

    @property
    def heads(self) -> Any:
        """H: the number of query heads."""
        return size_of(self.axes.heads) * size_of(self.axes.group)

    @property
    def all_heads(self) -> Any:
        """The number of query heads of all ranks: thresholds belong to these."""
        return self.heads * (1 if self.exchange is None else self.exchange.ranks)

    @property
    def is_shared(self) -> bool:
        """Whether other processes have heads or tokens of it."""
        return self.exchange is not None or self.ring is not None

    @property
    def splits_rows(self) -> bool:
        """Whether the queries are a DTensor that is sharded along the sequence, as torch's context_parallel has it."""
        value, layout = value_of(self.query.node), self.query.layout
        dims = dims_of(value) if is_sharded(value) else []
        return any(dim >= 0 and not set(layout[dim]).isdisjoint(self.axes.rows) for dim in dims)

    @property
    def length(self) -> Any:
        """L: the number of queries."""
        return size_of(self.axes.rows)

    @property
    def keys(self) -> Any:
        """S: the number of keys; of packed sequences, those of the longest, in a ring, those of all ranks."""
        if self.packing is not None:
            return value_of(self.packing.max_seqlen_k)
        return size_of(self.axes.keys) * (1 if self.ring is None else self.ring.ranks)

    @property
    def head_size(self) -> Any:
        """D: the size of a query and of a key."""
        return size_of(self.axes.feature)

    @property
    def value_head_size(self) -> Any:
        """Dv: the size of a value; a symbol that is surely D is D."""
        size = size_of(self.axes.value_feature)
        return self.head_size if isinstance(size, torch.SymInt) and surely(size == self.head_size) else size

    @property
    def result(self) -> Tensor:
        """The fake tensor of the result."""
        value = value_of(self.output)
        return value[0] if isinstance(value, (tuple, list)) else value

    @property
    def device(self) -> torch.device:
        """The device of the result."""
        return self.result.device

    @property
    def mask_kind(self) -> str:
        """``"none"``, ``"bool"`` or ``"additive"``."""
        return "none" if not self.masks else "additive" if any(m.kind == "add" for m in self.masks) else "bool"

    @property
    def learned_mask(self) -> bool:
        """Whether a gradient would flow into what is added to the scores."""
        added = (value_of(m.operand.node) for m in self.masks if m.kind in ("add", "hide"))
        return any(isinstance(x, Tensor) and x.requires_grad for x in added)
