"""The attention of a model and what became of it: Site, Reason, Decision, Failure, Report. Values only, no graphs."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .limit import Limit


@dataclass(frozen=True)
class Site:
    """One attention computation of a graph.

    Sizes are ints, or the text of a symbolic expression where the graph is dynamic; None where the graph carries no
    shapes. ``mask`` is ``"none"``, ``"bool"``, ``"additive"``, or ``"block"`` for a block mask of
    flex_attention. ``code`` is where in the user's code it was met, as ``file:line``.

    ``kind``: ``"sdpa"`` is a call of SDPA, ``"mha"`` a larger call that holds it, ``"decomposed"`` is written out,
    ``"flash_attn"``, ``"varlen"`` (packed sequences), ``"xformers"`` and ``"sage"`` are calls of other libraries,
    ``"flex"`` a call of flex_attention, ``"op"`` a custom op that attends, ``"softmax"`` is no attention.
    """

    name: str
    kind: str
    batch: int | str | None = None
    heads: int | str | None = None
    kv_heads: int | str | None = None
    length: int | str | None = None
    keys: int | str | None = None
    head_size: int | str | None = None
    dtype: str | None = None
    device: str | None = None
    mask: str = "none"
    is_causal: bool = False
    code: str | None = None


class Reason(Enum):
    """Why a site is sparse or dense. The list is closed; ``unsupported`` marks what the user may want to change."""

    # sparse
    PAYS = "predicted to be faster"
    LONG_ENOUGH = "min_seq_len is reached"
    AT_EACH_CALL = "sizes are dynamic, so each call decides"
    SHARED = "all blocks kept, in a graph shared with sparse sites"
    # dense, because sparse would not be faster
    SLOWER = "predicted not to be faster"
    TOO_SHORT = "too few keys"
    BY_PLAN = "dense by plan"
    # dense, because it cannot be replaced
    NO_SHAPES = "the graph carries no shapes"
    DROPOUT = "dropout is active"
    DTYPE = "dtype"
    DEVICE = "device"
    HEAD_SIZE = "head size"
    LAYOUT = "not [batch, heads, length, head size]"
    HEADS = "query and key heads do not fit"
    ADDITIVE_MASK = "additive mask changes scores"
    LEARNED_BIAS = "a learned bias needs gradients"
    MASK_SHAPE = "mask shape"
    CAUSAL_AND_MASK = "is_causal together with a mask"
    CONTROL_FLOW = "inside control flow"
    TRANSFORM = "inside torch.func.grad or jvp"
    OUTPUTS_USED = "more than the attention output is used"
    WEIGHTS_USED = "attention weights are read elsewhere"
    SCORES_USED = "scores are read elsewhere"
    SCORES_CHANGED = "scores or weights are changed"
    IN_PLACE = "a tensor is changed in place"
    CONTEXT = "autocast or gradient mode changes inside"
    OPAQUE = "fused kernel without a graph"
    WINDOW = "sliding window"
    SOFTCAP = "softcap changes scores"
    ALIBI = "alibi slopes change scores"
    PAGED = "keys lie in pages"
    ARGUMENT = "an argument of the call is not supported"
    FLEX = "flex_attention could not be read"
    LARGE_MASK = "a mask_mod would become too large a mask"
    CUSTOM_OP = "a custom op is not replaced"
    NESTED = "nested tensors"
    OUTSIDE = "outside of graphs"
    # no attention
    NOT_ATTENTION = "softmax that is not attention"

    @property
    def sparse(self) -> bool:
        """Whether a site with this reason is replaced."""
        return self in (Reason.PAYS, Reason.LONG_ENOUGH, Reason.AT_EACH_CALL, Reason.SHARED)

    @property
    def unsupported(self) -> bool:
        """Whether a site stays dense although sparse attention might be faster."""
        return not self.sparse and self not in _INTENDED


_INTENDED = (Reason.SLOWER, Reason.TOO_SHORT, Reason.BY_PLAN, Reason.NOT_ATTENTION)


@dataclass(frozen=True)
class Prediction:
    """The cost model's answer, in seconds: of a forward, or where ``trains`` of a forward with its backward.

    ``dense`` and ``sparse`` are the GPU's (a CPU's all), ``dense_host`` and ``sparse_host`` what launching takes the
    host meanwhile. ``density`` is the upper bound that it was asked for.
    """

    dense: float
    sparse: float
    density: float
    dense_host: float = 0.0
    sparse_host: float = 0.0
    trains: bool = False

    @property
    def speedup(self) -> float:
        """Dense seconds over sparse seconds, each the longer of device and host: in a queue of such calls alone."""
        return max(self.dense, self.dense_host) / max(self.sparse, self.sparse_host)

    def __str__(self) -> str:
        bound = ["host"] * (self.sparse_host > self.sparse) + ["training"] * self.trains
        return f"{self.speedup:.2f}x" + (f" ({', '.join(bound)})" if bound else "")


@dataclass(frozen=True)
class Decision:
    """Sparse or dense, why, and what the cost model said (None where it was not asked).

    ``limit`` is what the op asks at each call, where sizes of the graph are symbols that leave the answer open.
    ``order`` says in which order a sparse site has its tokens, where one was asked for; ``precision`` in which its
    products are, likewise.
    """

    reason: Reason
    detail: str = ""
    prediction: Prediction | None = None
    limit: Limit | None = None
    order: str = ""
    precision: str = ""

    @property
    def status(self) -> str:
        """``"sparse"`` or ``"dense"``."""
        return "sparse" if self.reason.sparse else "dense"


@dataclass(frozen=True)
class SiteReport:
    """A site and its decision, as one row of a report."""

    site: Site
    decision: Decision

    @property
    def name(self) -> str:
        """The site's name: the path of its module, and ``#1``, ``#2`` for further ones there."""
        return self.site.name

    @property
    def kind(self) -> str:
        """How the attention is written; see :class:`Site`."""
        return self.site.kind

    @property
    def status(self) -> str:
        """``"sparse"`` or ``"dense"``."""
        return self.decision.status

    @property
    def reason(self) -> Reason:
        """Why it is sparse or dense."""
        return self.decision.reason

    @property
    def detail(self) -> str:
        """The reason's particulars, or an empty text."""
        return self.decision.detail

    @property
    def order(self) -> str:
        """In which order the tokens are: the tiles of a grid, or raster and why; empty where no order was asked for."""
        return self.decision.order

    @property
    def precision(self) -> str:
        """What the products of a sparse site are in, and why not in eight bits; empty where these are not asked for."""
        return self.decision.precision

    @property
    def shapes(self) -> dict[str, int | str | None]:
        """The sizes batch, heads, kv_heads, length, keys and head_size by name."""
        names = ("batch", "heads", "kv_heads", "length", "keys", "head_size")
        return {name: getattr(self.site, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        prediction = self.decision.prediction
        return {
            **asdict(self.site),
            "status": self.status,
            "reason": self.reason.name.lower(),
            "detail": self.detail,
            "order": self.order,
            "precision": self.precision,
            "prediction": asdict(prediction) if prediction else None,
        }


@dataclass(frozen=True)
class Failure:
    """An analysis of ours that failed inside, so that a whole graph stayed as it was: a bug to be reported."""

    analysis: str  # the pass
    error: str  # its type and text
    where: str  # the innermost line of this package

    @classmethod
    def of(cls, analysis: str, error: BaseException) -> Failure:
        """Note an exception as the failure of an analysis, without keeping what its frames hold."""
        frames = traceback.extract_tb(error.__traceback__)
        package = str(Path(__file__).parent)
        ours = [frame for frame in frames if frame.filename.startswith(package)] or frames
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "an unknown line"
        text = " ".join(str(error).split())
        return cls(analysis, f"{type(error).__name__}: {text}" if text else type(error).__name__, where)

    def __str__(self) -> str:
        return f"analysis {self.analysis!r} failed at {self.where} with {self.error}"


@dataclass
class Report:
    """Every site of a model, in graph order, and every softmax that is no attention. Printed, it is a table."""

    sites: list[SiteReport] = field(default_factory=list)
    graphs: int = 0  # graphs that were looked at, those without attention included
    calls: int | None = None  # of attention, in a report of eager code, which has no graphs
    failures: list[Failure] = field(default_factory=list)  # graphs that could not be looked at
    kernels: dict[str, str] = field(default_factory=dict)  # of each GPU with sparse sites, as a line
    notes: list[str] = field(default_factory=list)  # what was not looked at, or not as may be meant, and why

    def __iter__(self) -> Iterator[SiteReport]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def sparse(self) -> list[SiteReport]:
        """The rows of sites that are replaced."""
        return [row for row in self.sites if row.status == "sparse"]

    @property
    def dense(self) -> list[SiteReport]:
        """The rows of sites that stay as they are."""
        return [row for row in self.sites if row.status == "dense"]

    def say_that_gradients_are_recorded(self) -> None:
        """Note, for a model in eval mode, that some decisions are about training, if they are."""
        if any(row.decision.prediction is not None and row.decision.prediction.trains for row in self.sites):
            self.notes.append(
                "(training): the model is in eval mode, but gradients are recorded, so these sites were decided for a "
                "forward with its backward. For inference, ask under torch.no_grad(), as you will run."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        return {
            "graphs": self.graphs,
            **({} if self.calls is None else {"calls": self.calls}),
            "kernels": self.kernels,
            "sites": [row.to_dict() for row in self.sites],
            "failures": [asdict(failure) for failure in self.failures],
            "notes": self.notes,
        }

    def __str__(self) -> str:
        graphs = "1 graph" if self.graphs == 1 else f"{self.graphs} graphs"
        if self.calls is not None:
            graphs = "eager code" if not self.calls else f"{self.calls} call{'s' * (self.calls > 1)} in eager code"
        failures = "".join(f"\nnot looked into: {each}" for each in dict.fromkeys(self.failures))
        failures += "".join(f"\n{note}" for note in self.notes)
        if not self.sites:
            return f"sparge: no attention found in {graphs}; nothing was replaced{failures}"
        attention = [row for row in self.sites if row.reason is not Reason.NOT_ATTENTION]
        head = f"sparge: {len(self.sparse)} of {len(attention)} attention sites sparse, in {graphs}"
        head += "".join(f"\n{device}: {kernels}" for device, kernels in self.kernels.items())
        columns = ["site", "kind", "status", "reason", "shape B H/Hk L×S D", "dtype", "mask", "predicted"]
        rows = [_row(row) for row in self.sites]
        for column in ("order", "precision"):
            texts = [getattr(row, column) for row in self.sites]
            if any(texts):
                columns.append(column)
                rows = [[*cells, text] for cells, text in zip(rows, texts, strict=True)]
        return f"{head}\n{tabulate(rows, headers=columns)}{failures}"


def _row(row: SiteReport) -> list[str]:
    site, prediction = row.site, row.decision.prediction
    reason = f"{row.reason.value}: {row.detail}" if row.detail else row.reason.value
    if row.reason.unsupported and site.code is not None:
        reason += f", at {'/'.join(Path(site.code).parts[-2:])}"
    heads = site.heads if site.heads == site.kv_heads else f"{site.heads}/{site.kv_heads}"
    shape = "" if site.length is None else f"{site.batch} {heads} {site.length}×{site.keys} {site.head_size}"
    mask = "causal" if site.is_causal and site.mask == "none" else site.mask
    predicted = str(prediction or "")
    return [site.name, site.kind, row.status, reason, shape, site.dtype or "", mask, predicted]
