"""The options of ``torch.compile(model, backend="sparge", options={...})``: their meaning, validation, and one digest.

The string under each field is its documentation; the table in README.md is made from these strings.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from .cost import CostModel
from .errors import type_error, value_error
from .keeping import NOTHING, Kept, parse_kept
from .kernels.order import TILE, Grid, Tile, parse_grid, parse_tile
from .pair import Pair, check_pair
from .schedule import Schedule, parse_schedule
from .thresholds.calibration import Calibration

# Untuned, nothing is known of a model, so half of the blocks and 80 % of the pooled mass are kept: heads that look
# everywhere keep up to 0.8, others half. What that costs, beside other pairs: docs/fidelity.md. Lower values want a
# calibration or a fine-tuned checkpoint (docs/design.md, "Sparse only where it pays").
DEFAULT_TOPK = 0.5
DEFAULT_TOPP = 0.8

ON_UNSUPPORTED = ("dense", "warn", "error")
TOKEN_ORDER = ("raster", "tiles")
PRECISIONS = ("fp8",)
INNER = ("inductor", "aot_eager", "eager")


@dataclass(frozen=True)
class Options:
    """Every option of the backend. Built with :meth:`parse`, which refuses what it does not know."""

    calibration: Calibration | None = None
    """A `Calibration`, or the path of one, gives thresholds to each site and head, by name or pattern."""
    topk: float = DEFAULT_TOPK
    """Sites that the calibration does not name keep this share of their visible key blocks, in (0, 1]."""
    topp: float = DEFAULT_TOPP
    """They keep at least this much of the pooled probability mass, in [0, 1]: the larger set of the two is kept."""
    dense_steps: int | tuple[int, int | None] | None = None
    """Steps of a denoising run in which everything is dense: `10` for the first ten, `-2` for the last two, or `(start,
    stop)`. `diffusers_callback(model)` or `set_step` say which step it is. `attach` takes it, too."""
    dense_layers: int | str | tuple[str, ...] | None = None
    """Layers that stay dense: `2` for the blocks 0 and 1 (by the first number in a site's name), or names and patterns
    of sites or modules (`"blocks.5"`, `["*.attn2"]`). `None` leaves it to the calibration."""
    keep_keys: int | tuple[int, int | None] | str | None = None
    """Tokens whose key blocks are always kept and do not count against the thresholds: `512` for the first, `-512` for
    the last, `(start, stop)`, or `"text"`: the shorter part, where the graph puts the sequence together of a short and
    a long one. `None` leaves it to the calibration, which by default keeps none."""
    dense_queries: bool = False
    """The query rows of these tokens keep every visible key block, where queries and keys are one sequence."""
    token_order: str | None = None
    """Which tokens form a block: `"raster"`, consecutive ones, or `"tiles"` of space and time, where a site's grid is
    known: as the graph shows it, as `grid` says, or as `attach(..., grid=)` does. `None` leaves it to the calibration,
    which has the order that each site was measured in; without one it is raster."""
    tile: Tile | None = None
    """Frames, rows and columns of a tile, at most 64 tokens together: the shape that blocks come close to. An image has
    one frame: there `(4, 4, 4)` is 8 rows of 8. Three numbers more move the borders of tiles by as many tokens along
    each axis. `None` leaves it to the calibration; without one it is `(4, 4, 4)`."""
    grid: Grid | tuple[int, ...] | Mapping[str, Any] | None = None
    """The grid of tokens, where the graph does not show it: `(frames, height, width)` in tokens, or `(prefix, frames,
    height, width, suffix)` with the numbers of tokens before and behind, of which one may be `-1`: what is left. Or a
    dict of these by site name or pattern."""
    precision: str | None = None
    """The products of sparse sites in the forward: `None` in the operands' own dtype, `"fp8"` in eight bits, where a
    site allows it: no mask, no packed sequences, head sizes that are multiples of 16, an NVIDIA GPU of compute
    capability 8.9 or newer, or a CPU; the report says. Backwards stay in the operands' dtype."""
    min_seq_len: int | None = None
    """Sites with fewer keys stay dense. `None` lets the cost model decide from 1,024 keys on; a number (0 too) replaces
    both."""
    costs: CostModel | None = None
    """Coefficients of the cost model for your device, dtype and head size, as `benchmarks/fit_cost_model.py` prints
    them; of the host (`dense_host`, `sparse_host`) and of `training`, where you give them. `None` takes measured sets
    and times the host."""
    additive_masks: bool = False
    """Replace attention with a float mask that changes scores, too. Blocks are then ranked by pooled scores that
    include the mask."""
    on_unsupported: str = "warn"
    """What happens where attention cannot be replaced: `"dense"` (nothing), `"warn"` (once for each reason) or
    `"error"`."""
    inner: str = "inductor"
    """Who compiles the rewritten graph: `"inductor"`, `"aot_eager"` or `"eager"`."""
    inductor: Mapping[str, Any] = field(default_factory=dict)
    """A dict of Inductor's own options."""
    inductor_mode: str | None = None
    """A mode of `torch.compile`, which itself refuses `mode` beside `options`."""

    def __post_init__(self) -> None:
        if isinstance(self.calibration, (str, os.PathLike)):
            object.__setattr__(self, "calibration", Calibration.parse(self.calibration))
        _expect("calibration", self.calibration, (Calibration, type(None)), "a path or a Calibration")
        check_pair(self.topk, self.topp, "options")
        if isinstance(self.dense_layers, list):
            object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        if isinstance(self.dense_steps, list):
            object.__setattr__(self, "dense_steps", tuple(self.dense_steps))
        parse_schedule(self.dense_steps, self.dense_layers, "options")
        if isinstance(self.keep_keys, list):
            object.__setattr__(self, "keep_keys", tuple(self.keep_keys))
        parse_kept(self.keep_keys, self.dense_queries, "options")
        if self.tile is not None:
            object.__setattr__(self, "tile", parse_tile(self.tile, "options"))
        if isinstance(self.grid, Mapping):
            object.__setattr__(
                self, "grid", {name: parse_grid(x, f"options: {name!r}") for name, x in self.grid.items()}
            )
        elif self.grid is not None:
            object.__setattr__(self, "grid", parse_grid(self.grid, "options"))
        _expect("min_seq_len", self.min_seq_len, (int, type(None)), "a number of keys, or None for the cost model")
        if self.min_seq_len is not None and self.min_seq_len < 0:
            raise _bad_value("min_seq_len", self.min_seq_len, "0 or more keys, or None for the cost model")
        _expect("additive_masks", self.additive_masks, (bool,), "True or False")
        if self.costs is not None:
            object.__setattr__(self, "costs", CostModel.parse(self.costs))
        for name, known in (
            ("token_order", (*TOKEN_ORDER, None)),
            ("precision", (*PRECISIONS, None)),
            ("on_unsupported", ON_UNSUPPORTED),
            ("inner", INNER),
        ):
            if getattr(self, name) not in known:
                raise _bad_value(name, getattr(self, name), ", ".join(map(repr, known)))
        _expect("inductor", self.inductor, (Mapping,), "a dict of Inductor's options")
        _expect("inductor_mode", self.inductor_mode, (str, type(None)), "a mode of torch.compile, or None")
        self._check_inductor()
        if self.inner != "inductor" and (self.inductor or self.inductor_mode):
            raise _bad_value("inner", self.inner, "'inductor' where inductor or inductor_mode is given")

    def _check_inductor(self) -> None:
        """Refuse a mode or an option that Inductor does not know, before it meets a graph."""
        if not self.inductor and self.inductor_mode is None:
            return
        from torch._inductor import list_mode_options, list_options

        modes, known = sorted(list_mode_options()), {name.replace("-", "_") for name in list_options()}
        if self.inductor_mode is not None and self.inductor_mode not in modes:
            raise _bad_value("inductor_mode", self.inductor_mode, ", ".join(modes))
        unknown = [name for name in self.inductor if name.replace("-", "_") not in known]
        if unknown:
            raise _bad_value("inductor", ", ".join(unknown), "the names that torch._inductor.list_options() gives")
        object.__setattr__(self, "inductor", {name.replace("-", "_"): value for name, value in self.inductor.items()})

    @classmethod
    def parse(cls, options: Mapping[str, Any] | Options | None) -> Options:
        """Options from what a user gave to ``torch.compile``."""
        if isinstance(options, cls):
            return options
        _expect("options", options, (Mapping, type(None)), "a dict")
        given = dict(options or {})  # type: ignore[arg-type]
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(map(str, given)) - set(known))
        if unknown:
            raise value_error(
                "unknown option for backend 'sparge'",
                given=", ".join(map(repr, unknown)),
                allowed=", ".join(known),
                todo="Remove it or mend its spelling; Inductor's own options go into 'inductor'.",
            )
        return cls(**given)

    @property
    def launched(self) -> str:
        """Who launches the kernels: ``"compiled"`` code, ``"eager"`` code, or a CUDA ``"graph"``."""
        if self.inner != "inductor":
            return "eager"
        from torch._inductor import config, list_mode_options

        patches = {**list_mode_options(self.inductor_mode or "default"), **self.inductor}
        return "graph" if patches.get("triton.cudagraphs", config.triton.cudagraphs) else "compiled"

    def thresholds_of(self, name: str, heads: int, head_size: int) -> tuple[Pair, ...]:
        """One (topk, topp) for each query head of a site: from the calibration, else ``topk`` and ``topp``.

        Raises:
            ValueError: the calibration has thresholds for another number of heads or another head size.
        """
        if self.is_dense_layer(name):
            return ((1.0, 0.0),) * heads
        found = self.calibration.lookup(name, heads, head_size) if self.calibration is not None else None
        return found or ((self.topk, self.topp),) * heads

    def is_dense_layer(self, name: str) -> bool:
        """Whether a site stays dense by plan: that of the options, else that of the calibration."""
        if self.dense_layers is not None:
            return self.schedule.is_dense_layer(name)
        return self.calibration is not None and self.calibration.schedule.is_dense_layer(name)

    @property
    def names_sites(self) -> bool:
        """Whether some of these options name sites of the model, so that a name may fit none."""
        return self.calibration is not None or bool(self.schedule.dense_layers) or isinstance(self.grid, Mapping)

    @property
    def schedule(self) -> Schedule:
        """The plan of these options; what a calibration plans besides is not in it."""
        return parse_schedule(self.dense_steps, self.dense_layers)

    def kept_of(self, name: str) -> Kept:
        """What is kept of a site's tokens: as the options say, else as its calibration does."""
        own = parse_kept(self.keep_keys, self.dense_queries, "options")
        return own if own != NOTHING or self.calibration is None else self.calibration.kept_of(name)

    @property
    def keeps(self) -> bool:
        """Whether tokens of some site are kept: then the thresholds of all sites have ranges, [H, 6]."""
        return self.keep_keys is not None or (self.calibration is not None and bool(self.calibration.kept))

    def rows_of(self, name: str, pairs: Sequence[Pair], wide: bool = False) -> list[tuple[float, ...]]:
        """The thresholds of a site as a tensor holds them; with ranges where these options keep tokens, or ``wide``."""
        ranges = self.kept_of(name).numbers if self.keeps or wide else ()
        return [(*pair, *ranges) for pair in pairs]

    def tile_of(self, measured: Tile | None) -> Tile | None:
        """The tile of a site whose thresholds were measured in this one; None: raster order, measured or asked for."""
        if self.token_order == "raster" or (self.token_order is None and measured is None):
            return None
        return self.tile or measured or TILE

    @property
    def orders_tokens(self) -> bool:
        """Whether tokens of some site are to be in tiles."""
        measured = self.calibration is not None and bool(self.calibration.tiles)
        return self.token_order == "tiles" or (self.token_order is None and measured)

    def grid_of(self, name: str) -> Grid | None:
        """The grid that is given for a site; of several patterns that fit, the first."""
        if not isinstance(self.grid, Mapping):
            return self.grid  # type: ignore[return-value]
        fitting = (grid for pattern, grid in self.grid.items() if fnmatchcase(name, pattern))
        return self.grid.get(name) or next(fitting, None)

    def with_thresholds(self, topk: float, topp: float) -> Options:
        """The same options with one pair of thresholds for all sites, nothing kept, and nothing dense by plan."""
        pair: dict[str, Any] = {"topk": topk, "topp": topp}
        return replace(self, calibration=None, dense_layers=None, keep_keys=None, dense_queries=False, **pair)

    def digest(self) -> str:
        """A hash over all fields: equal for equal options, in any process."""
        content = {**asdict(self), "calibration": self.calibration.to_dict() if self.calibration else None}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()


def option_table() -> str:
    """Every option as a row of a markdown table: its name, its documentation, its default."""
    documented: dict[str, str] = {}
    body = ast.parse(inspect.getsource(Options)).body[0].body  # type: ignore[attr-defined]
    for assigned, text in pairwise(body):
        if isinstance(assigned, ast.AnnAssign) and isinstance(text, ast.Expr):
            documented[assigned.target.id] = " ".join(ast.literal_eval(text.value).split())  # type: ignore[union-attr]
    default = Options()
    rows = [f"| `{f.name}` | {documented[f.name]} | `{_literal(getattr(default, f.name))}` |" for f in fields(Options)]
    return "\n".join(["| option | meaning | default |", "|---|---|---|", *rows])


def _literal(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


_SEE = "The README's table says what each option means; leave it out for its default."


def _bad_value(name: str, given: object, allowed: str) -> ValueError:
    return value_error(f"option {name!r} has a bad value", given=repr(given), allowed=allowed, todo=_SEE)


def _expect(name: str, value: object, types: tuple[type, ...], allowed: str) -> None:
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise type_error(f"option {name!r} has the wrong type", given=repr(value), allowed=allowed, todo=_SEE)
