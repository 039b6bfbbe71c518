"""Run a user's model and measure its attention: batches in, samples out. The model computes what it computes anyway.

A sample is one call of one site. What is looked at depends on the seed, the site's name and the number of the batch and
of the call in it, and on nothing else: not on what ran before, nor in which process.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..eager.observation import eager_calls_of
from ..errors import value_error
from ..keeping import NOTHING, beside_longest
from ..kernels import capability
from ..kernels.block_map import QUERY_BLOCK, ceil_div
from ..kernels.kept import Always, always_read
from ..kernels.rule import default_scale
from ..notices import warn_of_failures
from ..options import Options
from ..passes.decide import least_keys, refusal
from ..passes.match.attention import Attention
from ..passes.pipeline import sheltered
from ..passes.write.taps import listening
from ..running.observe import Observer, Watched, calls_through, watching
from ..running.places import Place
from ..user_model import user_model
from .calls import NotedCalls
from .curves import Sums, measure


@dataclass(frozen=True)
class Sample:
    """One call of one site. ``call`` counts the calls of the model in a batch; ``blocks`` is the number of query blocks
    that the sampled ones of a head stand for. ``plain``: of the first sample of a site that keeps tokens, the sums
    without them."""

    site: str
    call: int
    head_size: int
    blocks: float
    sums: Sums
    plain: Sums | None = None


@dataclass
class Batch:
    """One batch as it was recorded: its samples, and for each call of the model, measured or not, which step it is in.

    Steps are numbered from 0 without gaps: they are those in which the model is called.
    """

    samples: list[Sample] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def progress(self, call: int) -> float:
        """Return the share of the model's steps that came before a call."""
        return self.steps[call] / (self.steps[-1] + 1)


class Recorder(Observer):
    """Measures the sites of a model.

    Args:
        model: the model, compiled or not.
        options: the backend's; ``min_seq_len`` and ``additive_masks`` say which sites may become sparse.
        query_blocks: how many query blocks of each call, head and batch element are looked at.
        every: in a batch, every so many calls of the model one is measured, beginning with the first.
        memory: bytes of scratch memory on the device.
        seed: of the choice of query blocks.
        noted: keeps those calls of the model that are measured.
    """

    def __init__(
        self,
        model: Module,
        *,
        options: Options,
        query_blocks: int,
        every: int,
        memory: int,
        seed: int,
        noted: NotedCalls | None = None,
    ) -> None:
        target = user_model(model)
        assert isinstance(target, Module)
        super().__init__(target)
        self._model, self._called = target, model
        self._options, self._query_blocks, self._every = options, query_blocks, every
        self._memory, self._seed, self._noted = memory, seed, noted
        self._watched = watching(target, self)
        self._batch, self._number = Batch(), 0
        self._ended = 0  # steps of this batch
        self._turns: Counter[str] = Counter()  # how often a site was met in this call

    def record(self, number: int, run: Callable[[], Any]) -> Batch:
        """Return the samples of one batch; ``run`` calls the model on it, once or as often as it likes.

        It may say where a step ends, with :meth:`end_step`; if it does not, each call is a step.
        """
        self._batch, self._number, self._ended = Batch(), number, 0
        with calls_through(self._called, self._call), torch.no_grad():
            run()
        samples = [_to_host(sample) for sample in self._batch.samples]
        return Batch(samples, _without_gaps(self._batch.steps) if self._ended else list(range(self._calls)))

    def note(self, number: int, run: Callable[[], Any]) -> None:
        """Have the calls of a batch kept that was recorded before."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._note(args, kwargs)
            self._batch.steps.append(0)
            return self._model(*args, **kwargs)

        self._batch, self._number = Batch(), number
        with calls_through(self._called, call), torch.no_grad():
            run()

    def _note(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._noted is not None and self._calls % self._every == 0:
            self._noted.note(self._number, self._calls, args, kwargs)

    def end_step(self) -> None:
        """Say that a step of a denoising run is over: phases are shares of steps, however many calls each has."""
        self._ended += 1

    @property
    def _calls(self) -> int:
        """How often the model was called in this batch before."""
        return len(self._batch.steps)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the model."""
        measured = self._calls % self._every == 0
        self._turns.clear()
        self._note(args, kwargs)
        try:
            if not measured:
                return self._model(*args, **kwargs)
            with eager_calls_of(self):
                return self._watched(*args, **kwargs)
        finally:
            self._batch.steps.append(self._ended)

    def ran(self, graph: Watched, places: list[Place], args: Sequence[Any]) -> Any:
        """Run a graph, and measure those of its sites that may become sparse; see ``running.observe.Observer``."""
        wanted: tuple[int, ...] = ()
        with sheltered(graph.failures, "refusal"):
            wanted = tuple(
                number
                for number, match in enumerate(graph.matches)
                if match.is_attention and refusal(match, self._options) is None
            )
        warn_of_failures(graph.failures)
        if not wanted:
            return graph.run(args)

        def listen(
            number: int,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None,
            *starts: Any,
            parts: Sequence[int] = (),
        ) -> None:
            attention = graph.matches[number].attention
            query, key, value = longest_sequence(query, key, value, *starts)
            if attention is not None and key.shape[2] >= least_keys(self._options):
                name = graph.slots[number].name(places[number])
                self._measure(name, attention, query, key, value, attn_mask, parts)

        with listening(listen):
            return graph.run_tapped(args, wanted, with_parts=self._options.keeps)

    def _measure(
        self,
        name: str,
        attention: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        parts: Sequence[int],
    ) -> None:
        batch, heads, length, head_size = query.shape
        n_query = ceil_div(length, QUERY_BLOCK)
        turn = self._turns[name]
        self._turns[name] += 1
        chosen = self._choose(f"{self._seed} {name} {self._number} {self._calls} {turn}", (batch, heads), n_query)
        kind = query.device.type
        if attention.autocast and torch.is_autocast_enabled(kind):  # what it does to the arguments of dense attention
            query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
        with torch.autocast(kind, enabled=False):
            mask = None if attn_mask is None else capability.normal_mask(attn_mask, key.shape[2])
            scale = default_scale(head_size, attention.scale)
            where = chosen.to(query.device, non_blocking=True)
            measured = (
                query,
                key,
                value,
                mask,
                attention.is_causal,
                scale,
                where,
                self._memory,
                attention.bottom_right,
            )
            always = self._always(name, query, key, parts)
            sums = measure(*measured, always=always)
            first = (self._number, self._calls, turn) == (0, 0, 0)
            plain = measure(*measured) if first and always is not None else None
        stands_for = n_query / max(1, chosen.shape[-1])
        self._batch.samples.append(Sample(name, self._calls, head_size, stands_for, sums, plain))

    def _always(self, name: str, query: Tensor, key: Tensor, parts: Sequence[int]) -> Always | None:
        """What a site keeps beside the rule."""
        kept = self._options.kept_of(name)
        if kept == NOTHING:
            return None
        numbers = torch.tensor([(1.0, 0.0, *kept.numbers)]).to(query.device, non_blocking=True)
        return always_read(numbers, query.shape[2], key.shape[2], beside_longest(parts))

    def _choose(self, seed: str, lead: tuple[int, int], n_query: int) -> Tensor:
        """Query blocks int64 [B, H, n]: all where there are few, else one at random out of each of n equal parts."""
        n = min(n_query, self._query_blocks)
        generator = torch.Generator().manual_seed(
            int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1
        )
        within = torch.rand(*lead, n, generator=generator, dtype=torch.float64)
        within = torch.zeros_like(within) if n == n_query else within
        return ((torch.arange(n) + within) * n_query / max(1, n)).long().clamp(max=max(0, n_query - 1))


def longest_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of packed sequences that with the most pairs of queries and keys; others are one sequence."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return query, key, value
    n = int((cu_seqlens_q.diff().long() * cu_seqlens_k.diff()).argmax())  # more pairs than 32 bits count
    rows, keys = (slice(*x[n : n + 2].tolist()) for x in (cu_seqlens_q, cu_seqlens_k))
    return query[:, :, rows], key[:, :, keys], value[:, :, keys]


def _without_gaps(steps: Sequence[int]) -> list[int]:
    """Ascending numbers of steps, renumbered from 0."""
    numbers = {step: number for number, step in enumerate(dict.fromkeys(steps))}
    return [numbers[step] for step in steps]


def _to_host(sample: Sample) -> Sample:
    """The sample in CPU memory. Numbers that are none are an error of the model or its inputs."""
    sums = Sums(*(x.cpu() for x in sample.sums))
    plain = None if sample.plain is None else Sums(*(x.cpu() for x in sample.plain))
    if not all(bool(torch.isfinite(x).all()) for x in sums):
        raise value_error(
            f"the attention of site {sample.site!r} is not finite",
            given="NaN or inf among its queries, keys, values or outputs",
            allowed="finite numbers",
            todo="Run the model on this batch without calibration and see where they come from.",
        )
    return replace(sample, sums=sums, plain=plain)
