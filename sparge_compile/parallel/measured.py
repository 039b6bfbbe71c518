"""How long sparse attention takes on each rank, without what it waits for: what heads that are unequal really cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from ..errors import value_error

# The ops that compute; those of an exchange, and a ring around its parts, wait for other ranks.
_COMPUTING = {
    f"sparge::{name}" for name in ("attend", "attend_for_backward", "block_map", "forward", "pack", "backward")
}


def attention_seconds(run: Callable[[], object]) -> float:
    """The seconds that sparse attention takes in a run on this process's GPU, or on the CPU where there is none."""
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    computing = [event for event in seen.events() or () if event.name in _COMPUTING and not _is_inside(event)]
    return sum(event.device_time_total if on_gpu else event.cpu_time_total for event in computing) / 1e6


def _is_inside(event: Any) -> bool:
    """Whether an event is a part of another that computes."""
    while (event := event.cpu_parent) is not None:
        if event.name in _COMPUTING:
            return True
    return False


def attention_seconds_by_rank(run: Callable[[], object], group: Any = None) -> list[float]:
    """Those of all ranks of a group; each calls this with the same run. None: of all processes.

    Raises:
        ValueError: nothing sparse ran on some rank.
    """
    seconds: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(seconds, attention_seconds(run), group)
    if min(seconds) == 0:
        raise value_error(
            "measured attention",
            given=f"{seconds.count(0)} ranks on which no sparse attention ran",
            allowed="a run of a model that is compiled with the backend and has sparse sites",
            todo='Compile it with torch.compile(model, backend="sparge"), and see sparge_compile.explain.',
        )
    return seconds
