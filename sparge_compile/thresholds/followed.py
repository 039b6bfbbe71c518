"""The grid of tokens that a model's inputs tell, for graphs that do not show it, as ``attach(..., grid=)`` has it.

A forward pre-hook of the model asks for the grid and keeps it as the sizes of an empty tensor, of which the hook of
each attention makes a marker in whatever graph that is in: sizes are what Dynamo takes for symbols, so another grid is
no other graph. Where compiled code calls the model, the model's hook is traced itself, and leaves a marker for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from .. import ops  # noqa: F401  importing it registers the ops
from ..kernels.order import LEFT, parse_grid

Given = tuple[int, ...] | Callable[..., "tuple[int, ...] | None"]  # numbers, or a function of the model's inputs
Grids = Given | Mapping[str, Given]  # of all sites, or by site name or pattern

EVERY = "*"
HERE = ""  # the sites of a marker that means those of its own module


class FollowedGrid:
    """The grid of the sites that a pattern names; ``numbers`` is an empty tensor [0, prefix + 1, frames, height, width,
    suffix + 1], where ``LEFT`` is a size too, or None where it is not known yet."""

    def __init__(self, sites: str, given: Given) -> None:
        if not callable(given):
            given = parse_grid(given, "attach")
        self.sites = sites
        self.given = given
        self.numbers: Tensor | None = None

    def fits(self, name: str) -> bool:
        """Whether it is the grid of a site."""
        return name == self.sites or fnmatchcase(name, self.sites)

    def follow(self, args: Any, kwargs: Any, is_traced: bool) -> None:
        """Take the grid of a call of the model: into the graph that is being traced, or for the graphs of its parts."""
        if is_traced:
            given = self.given(*args, **kwargs) if callable(self.given) else self.given
            if given is not None:
                torch.ops.sparge.grid(*_five(given), self.sites)
            return
        # A function is a frame as well, of which Dynamo would make a graph of sizes.
        given = torch._dynamo.disable(self.given)(*args, **kwargs) if callable(self.given) else self.given
        grid = None if given is None else parse_grid(given, "attach")
        if grid is None:
            self.numbers = None
            return
        sizes = grid.prefix - LEFT, *grid[1:4], grid.suffix - LEFT
        if self.numbers is None or self.numbers.shape[1:] != sizes:
            with torch.inference_mode(False):
                self.numbers = torch.empty(0, *sizes, device="cpu")


class GridHook:
    """The forward pre-hook of a model that follows its grids."""

    def __init__(self, grid: Grids) -> None:
        grids = grid if isinstance(grid, Mapping) else {EVERY: grid}
        self.grids = [FollowedGrid(sites, given) for sites, given in grids.items()]

    def __call__(self, module: Any, args: Any, kwargs: Any) -> None:
        """Follow the grids of a call. Dynamo may trace it as a part of another frame, and has no frame of it alone."""
        is_traced = torch.compiler.is_compiling()
        for each in self.grids:
            each.follow(args, kwargs, is_traced)

    def hook(self, model: Module) -> RemovableHandle:
        """Put the hook on a model."""
        for function in (GridHook.__call__, FollowedGrid.follow):
            is_no_frame(function)
        return model.register_forward_pre_hook(self, with_kwargs=True)

    def of(self, name: str) -> FollowedGrid | None:
        """The grid of a site: one by its name before one by a pattern."""
        by_name = (each for each in self.grids if each.sites == name)
        return next(by_name, next((each for each in self.grids if each.fits(name)), None))


def is_no_frame(hook: Callable[..., Any]) -> None:
    """Have Dynamo leave a hook alone unless it traces what is around it.

    The hooks of a compiled module itself are frames of their own: what a graph of those says, no attention reads.
    """
    torch._dynamo.eval_frame.skip_code(hook.__code__)


def _five(given: Any) -> Any:
    """The five numbers of a grid while it is traced: nothing is asked of them."""
    return given if len(given) == 5 else (0, *given, 0)
