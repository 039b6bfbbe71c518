"""Models whose attention diffusers shards (``enable_parallelism``): the same exchanges, written so that the backend
sees them, in training too, and with heads that are assigned to ranks by what they cost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import Module

from ..errors import value_error
from ..thresholds.calibration import Calibration
from ..user_model import user_model
from .attention import Ranks, sharded_attention
from .heads import balanced, imbalance
from .measured import attention_seconds_by_rank

CONFIG = "_parallel_config"  # of an attention processor of diffusers, and of a model
HEADS, KEY_HEADS = (("heads", "num_heads", "num_attention_heads"), ("kv_heads", "num_kv_heads", "num_key_value_heads"))


class Split(NamedTuple):
    """How the attention of one module is divided: what ``sharded_attention`` takes, the order by the number of key
    heads, since some models repeat these and others leave them grouped."""

    heads: Ranks | None
    ring: Ranks | None
    orders: dict[int, Tensor]


@dataclass(frozen=True)
class ShardedSite:
    """The key heads of a site on the ranks that exchange them: the order, and what each costs with its queries."""

    name: str
    ranks: int
    order: Sequence[int]
    costs: Sequence[float]

    @property
    def expected(self) -> float:
        """The cost of the dearest rank over the mean of all."""
        return imbalance(self.costs, self.order, self.ranks)

    @property
    def unbalanced(self) -> float:
        """The same for heads as they come."""
        return imbalance(self.costs, range(len(self.order)), self.ranks)


class Sharded:
    """A model whose attention is divided among processes by :func:`shard_attention`. Printed, it is a table."""

    def __init__(self, sites: list[ShardedSite], split: Split, restore: list[tuple[Any, Any]]) -> None:
        self.sites = sites
        self._split, self._restore = split, restore
        self.measured: float | None = None

    def measure(self, run: Callable[[], object]) -> float:
        """Run something of the compiled model on all ranks, and say what its attention takes on the dearest ÷ the mean.

        What waits for other ranks does not count. The result stands in ``measured`` and in the table. Call the model
        once before, so that nothing is compiled meanwhile.

        Raises:
            ValueError: nothing sparse ran.
        """
        seconds = attention_seconds_by_rank(run)
        self.measured = imbalance(seconds, range(len(seconds)), len(seconds))
        return self.measured

    def remove(self) -> None:
        """Leave attention to diffusers again."""
        for processor, config in self._restore:
            setattr(processor, CONFIG, config)

    def __str__(self) -> str:
        ways = (("{} ranks that exchange heads", self._split.heads), ("a ring of {}", self._split.ring))
        said = [way.format(ranks.size) for way, ranks in ways if ranks is not None]
        head = f"sparge: attention over {' and '.join(said)}"
        if self.measured is not None:
            head += f"; time of the dearest rank ÷ mean, measured: {self.measured:.2f}"
        rows = [[x.name, f"{x.unbalanced:.2f}", f"{x.expected:.2f}"] for x in self.sites]
        columns = ["site", "cost of the dearest rank ÷ mean, heads as they come", "balanced"]
        return f"{head}\n{tabulate(rows, headers=columns)}" if rows else head


def shard_attention(model: Module, calibration: Calibration | str | None = None, copy_engines: bool = False) -> Sharded:
    """Divide the attention of a diffusers model for which ``enable_parallelism`` was called among its processes.

    diffusers splits the sequence and gathers the output, as it did; its exchanges for Ulysses, and its ring, are
    replaced by :func:`sharded_attention`. Under ``torch.compile(backend="sparge")`` attention is then sparse in
    inference and in training, with the block map of the whole sequence and the thresholds of the whole model, by site
    and head. Without the backend it is dense.

    Gradients of parameters are those of a rank's own tokens: the sum over the ranks is that of one GPU. Where they are
    averaged (DDP, FSDP), multiply the loss by the number of ranks.

    Args:
        model: on its device; compiled or not.
        calibration: heads are assigned to ranks by the share of blocks that they keep, as it was measured, or at most
            by their thresholds. None: as they come.
        copy_engines: heads are exchanged by the GPUs' copy engines, as :meth:`Ranks.of` says.

    Raises:
        ValueError: no context parallelism of diffusers in this model, heads that the ranks do not divide, or
            ``copy_engines`` where processes do not share memory.
    """
    target = user_model(model)
    assert isinstance(target, Module)
    found = list(_sharded_modules(target))
    if not found:
        raise value_error(
            "shard_attention: nothing is shared among processes in this model",
            given=type(target).__name__,
            allowed="a model of diffusers with context parallelism",
            todo="Call model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=…, ring_degree=…)) before; "
            "in a model of your own call sparge_compile.sharded_attention in the place of SDPA.",
        )
    _take_over()
    calibration = None if calibration is None else Calibration.parse(calibration)
    device = next(target.parameters()).device
    sites, restore = [], []
    for name, module in found:
        processor = module.processor
        config = copy.copy(getattr(processor, CONFIG))
        heads, ring = _ranks(config.context_parallel_config, copy_engines)
        found_sites = [] if heads is None else _sites(name, module, heads, calibration)
        sites += found_sites[:1]
        changed = [x.order for x in found_sites if list(x.order) != sorted(x.order)]
        orders = {len(x): torch.tensor(x, dtype=torch.int64, device=device) for x in changed}
        config.sparge = split = Split(heads, ring, orders)
        restore.append((processor, getattr(processor, CONFIG)))
        setattr(processor, CONFIG, config)
    return Sharded(sites, split, restore)


def _sharded_modules(model: Module) -> Iterator[tuple[str, Module]]:
    """The attention modules that diffusers shards, with their names; cross-attention is not told apart by it."""
    for name, module in model.named_modules():
        config = getattr(getattr(module, "processor", None), CONFIG, None)
        if getattr(config, "context_parallel_config", None) is not None:
            yield name, module


def _ranks(config: Any, copy_engines: bool) -> tuple[Ranks | None, Ranks | None]:
    """Who exchanges heads, and who forms a ring.

    Raises:
        ValueError: parts of the sequence may be of different lengths.
    """
    if unequal := [x for x in ("ulysses_anything", "ring_anything") if getattr(config, x, False)]:
        raise value_error(
            "shard_attention: ranks may have parts of different lengths",
            given=f"ContextParallelConfig({unequal[0]}=True)",
            allowed="equal parts of the sequence",
            todo="Leave that out, and pad the sequence to a multiple of the number of ranks.",
        )
    heads = Ranks.of(config._ulysses_mesh, copy_engines) if config.ulysses_degree > 1 else None
    return heads, Ranks.of(config._ring_mesh) if config.ring_degree > 1 else None


def _sites(name: str, module: Any, heads: Ranks, calibration: Calibration | None) -> list[ShardedSite]:
    """The heads of a module by their cost, grouped by key heads as the module says, and each by itself if they are
    grouped; none where nothing is known of them, or the ranks do not divide them (an error when they are exchanged)."""
    number = _first_number(module, HEADS)
    costs = None if calibration is None or number is None else calibration.densities(name, number)
    if costs is None:
        return []
    found = []
    for groups in dict.fromkeys((_first_number(module, KEY_HEADS) or len(costs), len(costs))):
        if groups % heads.size == 0 and len(costs) % groups == 0:
            size = len(costs) // groups
            by_group = [sum(costs[i * size :][:size]) for i in range(groups)]
            found.append(ShardedSite(name, heads.size, balanced(by_group, heads.size), by_group))
    return found


def _first_number(module: Any, names: Sequence[str]) -> int | None:
    """The first attribute of a module that is a number."""
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _take_over() -> None:
    """Have diffusers ask for attention here where a configuration has a :class:`Split`; once for all models."""
    from diffusers.models import attention_dispatch as dispatch

    name = "_templated_context_parallel_attention"
    original = getattr(dispatch, name, None)
    if original is None:
        raise value_error(
            "shard_attention: this version of diffusers shards attention in another way",
            given=f"no {name} in diffusers.models.attention_dispatch",
            allowed="diffusers 0.36 to 0.42",
            todo="Install one of these, or call sparge_compile.sharded_attention in the model.",
        )
    if getattr(original, "sparge", False):
        return

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal=False,
                  scale=None, enable_gqa=False, return_lse=False, **others: Any) -> Any:  # fmt: skip
        split = getattr(others.get(CONFIG), "sparge", None)
        if split is None or return_lse:
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse, **others)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # from [B, R, H, D]
        out = sharded_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            heads=split.heads, ring=split.ring, order=split.orders.get(key.shape[1]),
        )  # fmt: skip
        return out.transpose(1, 2)

    attention.sparge = True  # type: ignore[attr-defined]
    setattr(dispatch, name, attention)
