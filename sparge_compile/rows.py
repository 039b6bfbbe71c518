"""Inductor's choices beside sparse attention: rows of up to 2,048 numbers, as norms have them, are read once.

Inductor reads rows of more than 1,024 twice, but for its option ``triton.multi_kernel``, which has it say of which
longer ones one piece is right: so it is asked here. Where its insides are not those that we know it chooses as ever.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

logger = logging.getLogger("sparge_compile")

INDUCTORS_MOST, MOST = 1024, 2048


class WholeRows(InductorChoices):
    """Inductor's choices, but for rows."""

    def should_use_persistent_reduction(self, *args: Any, **kwargs: Any) -> bool:  # type: ignore[override]
        """Whether a kernel adds up rows in one piece."""
        choose = super().should_use_persistent_reduction
        usual = choose(*args, **kwargs)
        try:
            return usual or _in_one_piece(choose, *args, **kwargs)
        except Exception as error:  # whatever it is, a user's compilation goes on
            _say(f"{type(error).__name__}: {error}")
            return usual


def _in_one_piece(choose: Callable[..., bool], features: Any, cooperative_reduction: bool) -> bool:
    known, length = V.graph.sizevars.statically_known_leq, features.reduction_numel
    medium = known(length, MOST) and not known(length, INDUCTORS_MOST)
    if cooperative_reduction or not medium or not _reads_whole_rows(features):
        return False
    rows = copy.copy(features)
    rows.get_reduction_hint = lambda *args, **kwargs: ReductionHint.INNER
    with config.patch({"triton.multi_kernel": 1}):
        return choose(rows, cooperative_reduction)


def _reads_whole_rows(features: Any) -> bool:
    """Whether a kernel adds up along rows, and reads them whole: of rows in heads, as rotary positions want, not."""
    for node in features.scheduler_nodes():
        columns, reduced = node.get_ranges()
        reads = [x for x in node.read_writes.reads if getattr(x, "var_names", ())]
        if reduced and any(x.index.coeff(x.var_names[-1]) not in (0, 1) for x in reads):
            return False
        if not reduced and len(columns) > 1 and columns[-1] not in (1, features.reduction_numel):
            return False
    return True


@functools.cache
def _say(what: str) -> None:
    logger.info("Inductor adds up rows as ever: %s", what)
