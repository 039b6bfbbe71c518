"""``attach``: thresholds on a model's modules, for block-by-block compilation, checkpoints and changes at run time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import type_error
from ..user_model import user_model
from .attached import Attachment, compile_anew
from .calibration import Calibration, planned
from .followed import Grids


def attach(
    model: nn.Module,
    calibration: Calibration | str | os.PathLike[str],
    *,
    dense_steps: int | Sequence[int | None] | None = None,
    dense_layers: int | str | Sequence[str] | None = None,
    sparsities: Sequence[float] = (),
    grid: Grids | None = None,
) -> Attachment:
    """Put thresholds on a model's modules as float32 buffers, and have the backend read them there at run time.

    For compilation block by block (one graph serves equal blocks, each with its own thresholds), for thresholds that
    change while a model trains or denoises, and for checkpoints that carry them. The buffers are in the state dict (as
    ``blocks.3.attn1.sparge.thresholds``), move and are copied with the model, and stay float32 when it is cast. They
    win over the option ``calibration``. Uncompiled, or with another backend, the model computes what it did before.

    Args:
        model: the model, compiled or not. Code that was compiled for it is compiled anew.
        calibration: thresholds by site name (``blocks.3.attn1``; ``blocks.3.attn1#1`` for a second attention of that
            module) or pattern. A pattern holds for the modules whose names it matches, without containers and the
            building blocks of torch.nn (``nn.MultiheadAttention`` is none of those). A single pair is a buffer [1, 2]
            for any number of heads, several are [H, 2]; with kept tokens there are 6 columns. Of its phases the first
            one holds; see ``set_progress``.
        dense_steps, dense_layers, sparsities: a plan of what is dense, and how sparse each step is, instead of that of
            the calibration: ``calibration.scheduled(…)``. Dense steps and layers run the kernel of the dense model,
            from a second graph that is compiled together with the sparse one.
        grid: the grid of the model's tokens, for ``token_order="tiles"`` where graphs do not show it, as those of
            single blocks: ``(frames, height, width)`` in tokens, or ``(prefix, frames, height, width, suffix)``; or a
            function of the model's inputs that gives one of these, or None, and is asked at each call: ``lambda x,
            **kwargs: (x.shape[2], x.shape[3] // 2, x.shape[4] // 2)``. A dict has them by site name or pattern. Dynamo
            may trace the function. Another grid compiles nothing anew where sizes are dynamic. A module that attends in
            its own forward and is compiled by itself does not see it, and takes the option ``grid``.

    Returns:
        An :class:`Attachment`: change the values with ``set``, take them off with ``remove`` or as a context manager.

    Raises:
        TypeError: no module, no calibration, or a grid that is none of these.
        ValueError: a name or pattern that fits no module, in the calibration, ``dense_layers`` or ``grid``; the message
            lists names that are near. As ``Calibration.scheduled``.
    """
    if not isinstance(model, nn.Module):
        raise type_error(
            "attach: bad model",
            given=type(model).__name__,
            allowed="an nn.Module",
            todo="Pass the model, or what torch.compile(model) returned.",
        )
    root: Any = user_model(model)
    calibration = Calibration.parse(calibration)
    if dense_steps is not None or dense_layers is not None or sparsities:
        plan = {"dense_steps": dense_steps, "dense_layers": dense_layers, "sparsities": sparsities}
        calibration = planned(calibration, "attach", **plan)
    attached = Attachment(root, calibration, grid)
    compile_anew(root)
    return attached
