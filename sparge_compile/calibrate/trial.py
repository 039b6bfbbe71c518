"""A model that runs with thresholds on trial, and how far what it returns lies from what it returns without.

In: a model, its calibrated sites, calls of it. Out: relative errors of its output. The model is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from ..backend import sparge
from ..distill.forwards import GraphCalls
from ..eager.replacement import Replacement, replace_attention
from ..errors import value_error
from ..keeping import Kept
from ..kernels.order import TILE, Tile, made_as
from ..notices import unsaid
from ..options import Options
from ..pair import Sites
from ..passes.hoist.hoist import made_at_sites
from ..running.listeners import heard_by
from ..running.observe import NO_LIMITS, uncompiled
from ..thresholds.attached import Attachment
from ..thresholds.buffers import attached_to
from ..thresholds.calibration import Calibration
from ..thresholds.fronts import DENSE
from .calls import ModelCall

REPEATS = 1e-6  # relative squared error up to which two dense runs count as the same
_HELD = 1 << 30  # bytes of dense outputs that are kept; others are computed anew


class Trial:
    """Runs calls of a model under thresholds. Made by :func:`on_trial`.

    ``open_eagerly`` has attention in eager code take thresholds, and returns what reports of it.
    """

    def __init__(
        self,
        model: nn.Module,
        sparse: Callable[..., Any],
        attached: Attachment,
        open_eagerly: Callable[[], Replacement],
        codes: Mapping[str, Hashable],
    ) -> None:
        self._model, self._sparse, self._attached, self._open_eagerly = model, sparse, attached, open_eagerly
        start = attached.get()
        self.sites, self._kept = {name: len(pairs) for name, pairs in start.sites.items()}, start.kept
        self._eager: Replacement | None = None
        numbers = {code: number for number, code in enumerate(dict.fromkeys(codes.values()))}
        self._stand_ins = {name: (*TILE, 0, 0, 1 + numbers[code]) for name, code in codes.items()}
        self._tiles: dict[str, Tile | None] = {}  # that graphs are compiled for, once sites were reordered
        self._made: dict[Tile, Tile | None] = {}  # as which orders of these are made
        self.forget()

    def forget(self) -> None:
        """Forget all calls, and leave eager code as it is until one is made; graphs stay."""
        self._outputs: dict[tuple[int, int], list[Tensor]] = {}
        self._held, self.forwards, self._repeats = 0, 0, False
        self._close_eagerly()

    def off(self) -> AbstractContextManager[None]:
        """The model as it was before, until it is asked again."""
        return self._attached.off()

    def _close_eagerly(self) -> None:
        if self._eager is not None:
            self._eager.remove()
        self._eager, self._is_heard = None, False

    def everything_kept(self, call: ModelCall) -> list[Tensor]:
        """What the model returns by the op, with all blocks kept, float32.

        Raises:
            ValueError: a calibrated site did not become sparse, or the model does not return the same twice.
        """
        exact = self._checked(call, self.sites)
        self._check_repeats(self._sparse, call, exact)
        return exact

    def reorder(self, tiles: Mapping[str, Tile | None]) -> None:
        """Have these sites run in other orders: those with a grid, or of them those in tiles.

        All are tried by the same graphs, which are compiled for tiles that stand for others; but where sites that share
        their code are to have several, that is compiled for each.
        """
        stand_ins = {name: self._stand_ins.get(name, TILE) for name in tiles}
        self._made = {stand_ins[name]: tile for name, tile in tiles.items()}
        are_apart = all(self._made[stand_ins[name]] == tile for name, tile in tiles.items())
        self._made = self._made if are_apart else {}
        compiled: dict[str, Tile | None] = {**stand_ins} if are_apart else dict(tiles)
        if compiled == self._tiles:
            return
        self._tiles = compiled
        self._attached.set_tiles(compiled)
        if self._eager is not None:  # its calls are known by their forms alone
            self._close_eagerly()

    def _checked(self, call: ModelCall, sites: Collection[str]) -> list[Tensor]:
        """What it returns under the thresholds that hold, where these sites run sparse."""
        missing, outputs = self._heard(call, sites)
        if missing and self._eager is None:
            self._eager = self._open_eagerly()
            missing, outputs = self._heard(call, sites)
        if missing:
            raise value_error(
                "calibrate: measured attention does not run sparse when the model is asked for its output",
                given=f"{', '.join(sorted(missing))}: not replaced or not run",
                allowed="sites that run sparse on these inputs",
                todo="Give inputs that reach them, and the options that they were measured with (additive_masks).",
            )
        self._is_heard = True
        return outputs

    def _heard(self, call: ModelCall, sites: Collection[str]) -> tuple[set[str], list[Tensor]]:
        """Which of these sites are not sparse in a call, and what it returns."""
        graphs = GraphCalls()
        with heard_by(graphs):
            outputs = self._run(self._sparse, call)
        eager = [row.name for row in self._eager.report.sparse] if self._eager else []
        return set(sites).difference(graphs.names, eager), outputs

    def sparse(self, call: ModelCall, sites: Sites) -> list[Tensor]:
        """What it returns under thresholds; sites that are not named keep all blocks."""
        kept = {name: what for name, what in self._kept.items() if name in sites}
        self._attached.set(Calibration(sites, kept=kept))
        try:
            return self._run(self._sparse, call) if self._is_heard else self._checked(call, sites)
        finally:
            self._attached.set(Calibration({name: dense_pairs(self.sites[name]) for name in sites}, kept=kept))

    def error(self, call: ModelCall, sites: Sites) -> float:
        """The relative L2 error ‖u − v‖ ÷ ‖v‖ of the output u under these thresholds; v is that of the model as it is.

        Raises:
            ValueError: a calibrated site did not become sparse, or the model does not return the same twice.
        """
        exact = self._outputs.get(call[:2])
        if exact is None:
            exact = self._run(self._model, call)
            self._check_repeats(self._model, call, exact)
            size = sum(x.nbytes for x in exact)
            if self._held + size <= _HELD:
                self._outputs[call[:2]], self._held = exact, self._held + size
        return float(squared_error(self.sparse(call, sites), exact) ** 0.5)

    def _run(self, model: Callable[..., Any], call: ModelCall) -> list[Tensor]:
        self.forwards += 1
        # Each order is compiled once, however many there are.
        no_limits = torch._dynamo.config.patch(NO_LIMITS)
        with unsaid(), uncompiled(self._model), torch.no_grad(), no_limits, made_at_sites(), made_as(self._made):
            return _floats(call.run(model))

    def _check_repeats(self, model: Callable[..., Any], call: ModelCall, first: Sequence[Tensor]) -> None:
        if self._repeats:
            return
        if (error := squared_error(self._run(model, call), first)) > REPEATS:
            raise value_error(
                "calibrate: the model",
                given=f"outputs that differ by {error:.2g} between two calls",
                allowed="the same ones",
                todo="Switch off what is random in it, or keeps something from one call to the next (a cache).",
            )
        self._repeats = True


class KeptTrial(ExitStack):
    """The trial of a run. A context manager: the trial ends with it.

    It stays open for whoever asks next of the same sites, since Dynamo would trace the model for another; meanwhile
    nothing is attached to the model, which its user may save, load or copy.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__()
        self._model, self._options = model, options
        self._trial: Trial | None = None
        self._off = ExitStack()  # of what is taken off the model while nobody asks

    @contextmanager
    def of(self, sites: Mapping[str, int], codes: Mapping[str, Hashable] = MappingProxyType({})) -> Iterator[Trial]:
        """The trial of these sites, with their numbers of heads. What it heard is forgotten in the end.

        Args:
            sites: by name.
            codes: what computes each, as far as it is known: sites of equal codes may run the same graph.

        Raises:
            ValueError: as :func:`on_trial`.
        """
        self._off.close()
        if self._trial is None or self._trial.sites != sites:
            self._trial = None
            self.close()
            kept = {name: self._options.kept_of(name) for name in sites}
            self._trial = self.enter_context(on_trial(self._model, sites, self._options, kept, codes))
        try:
            yield self._trial
        finally:
            self._trial.forget()
            self._off = self.enter_context(ExitStack())
            self._off.enter_context(self._trial.off())


@contextmanager
def on_trial(
    model: nn.Module,
    sites: Mapping[str, int],
    options: Options,
    kept: Mapping[str, Kept],
    codes: Mapping[str, Hashable] = MappingProxyType({}),
) -> Iterator[Trial]:
    """A model that takes thresholds, by the names of its sites and their numbers of heads.

    What sites keep is by name, too, and what computes them (:meth:`KeptTrial.of`).

    It runs as the options say (masks, the order of tokens), but for thresholds and for who compiles it. What this
    process has compiled, of this model or others, is compiled anew when it is used after the trial.

    Raises:
        ValueError: a model in training mode, or with thresholds attached.
    """
    _check_model(model)
    start = Calibration({name: dense_pairs(heads) for name, heads in sites.items()}, kept=kept)
    eager = replace(
        options.with_thresholds(*DENSE[:2]),
        dense_steps=None,
        min_seq_len=0,
        on_unsupported="dense",
        inner="inductor",
        inductor={},
        inductor_mode=None,
    )
    compiled = replace(eager, inner="eager")

    def backend(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return sparge(graph_module, example_inputs, options=compiled)

    # Dynamo knows compiled code by its backend: this one's is of this trial alone, whatever was compiled before.
    sparse = torch.compile(model, backend=backend)
    with Attachment(model, start) as attached:
        trial = Trial(model, sparse, attached, partial(replace_attention, model, eager), codes)
        try:
            yield trial
        finally:
            trial.forget()


def dense_pairs(heads: int) -> tuple[tuple[float, float], ...]:
    """Thresholds that keep all blocks."""
    return (DENSE[:2],) * heads


def squared_error(changed: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """‖u − v‖² ÷ ‖v‖².

    Raises:
        ValueError: other shapes, or numbers that are not finite or all 0.
    """
    if [u.shape for u in changed] != [v.shape for v in exact]:
        raise value_error(
            "calibrate: the model",
            given="outputs whose shapes differ between calls on the same input",
            allowed="equal shapes",
            todo="Take out what makes the size of the output depend on its values.",
        )
    norm = sum(float(v.square().sum()) for v in exact)
    error = sum(float((u - v).square().sum()) for u, v in zip(changed, exact, strict=True))
    if not (0 < norm < float("inf") and error < float("inf")):
        raise value_error(
            "calibrate: the model",
            given=f"outputs whose squares add up to {norm:g}",
            allowed="finite numbers, not all 0",
            todo="Run the model on this batch without calibration and see where they come from.",
        )
    return error / norm


def _check_model(model: nn.Module) -> None:
    if model.training:
        raise value_error(
            "calibrate: model", given="one in training mode", allowed="evaluation mode", todo="Call model.eval()."
        )
    if any(attached_to(module) is not None for module in model.modules()):
        raise value_error(
            "calibrate: model",
            given="one with thresholds attached",
            allowed="one without",
            todo="Call remove() of what attach returned.",
        )


def _floats(output: Any) -> list[Tensor]:
    """The floating tensors in what a model returned, in float32 on their device, as they are now."""
    tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
    floats = [x.to(torch.float32, copy=True) for x in tensors if x.is_floating_point()]
    if not floats:
        raise value_error(
            "calibrate: the model",
            given=f"{type(output).__name__} without floating tensors",
            allowed="tensors",
            todo="Have it return them.",
        )
    return floats
