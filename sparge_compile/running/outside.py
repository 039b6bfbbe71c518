"""Attention that a model runs outside of all graphs: in frames that Dynamo left to Python.

A graph break in a loop, a disabled function, or a limit of recompilations leaves a whole frame uncompiled. What it
calls is seen by a profile function, which Dynamo does not mind, and which is set aside while Dynamo itself works.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import OpOverload, OpOverloadPacket

from ..naming import ROOT, TORCH, SiteNames
from ..passes.match.foreign import attends_as
from ..report import Decision, Reason, Report, Site, SiteReport
from .places import Names
from .profile import Profiler
from .stack import attends_by_name, outward

_BUILT_IN = {
    F.scaled_dot_product_attention: "sdpa",
    torch._native_multi_head_attention: "mha",
    torch._transformer_encoder_layer_fwd: "mha",
}
_TRACING = os.path.join("_dynamo", "convert_frame.py")  # to import it would import Triton
_OPS = (OpOverload.__call__.__code__, OpOverloadPacket.__call__.__code__)


@dataclass
class Outside:
    """Notes the calls of attention that nobody traced; ``graphs`` is the code that runs a traced graph."""

    names: Names | None
    graphs: tuple[CodeType, ...]
    calls: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # by module, kind and file:line; in order

    def add_to(self, report: Report) -> Report:
        """Report each place of such calls as a dense site."""
        names = SiteNames()
        for row in report.sites:
            names.name(row.name.partition("#")[0])
        for (module, kind, code), count in self.calls.items():
            site = Site(names.name(module), kind, code=code)
            calls = "1 call" if count == 1 else f"{count} calls"
            detail = (
                f"Dynamo left {calls} to Python, TORCH_LOGS=graph_breaks tells why; replace_attention needs no graph"
            )
            report.sites.append(SiteReport(site, Decision(Reason.OUTSIDE, detail)))
        return report

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Notice such calls in this thread. Where somebody else profiles it, nothing is noticed."""
        profiler = Profiler(self._profile)
        is_set = profiler.start()
        try:
            yield
        finally:
            if is_set:
                profiler.stop()

    def _profile(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "c_call":
            kind = _BUILT_IN.get(arg)
        elif event == "call":
            kind = _kind_of_call(frame)
        else:
            return
        if kind is not None:
            self._note(frame, kind, None if event == "c_call" else frame)

    def _note(self, frame: FrameType, kind: str, called: FrameType | None) -> None:
        """Note a call that a frame makes, or that ``called`` is."""
        code = None
        for at in outward(frame):
            if at.f_code in self.graphs or at.f_code.co_filename.endswith(_TRACING):
                return  # a graph runs, or Dynamo traces one
            is_function = attends_by_name(at.f_code)
            if is_function and at is not called:
                return  # noted when it was called
            if code is None and not is_function and not at.f_code.co_filename.startswith(TORCH):
                code = f"{at.f_code.co_filename}:{at.f_lineno}"
        module = ROOT if self.names is None else self.names.called()
        if module is not None:  # else somebody else attends: what calls the model, another model beside it
            self.calls[module or ROOT, kind, code or ""] += 1


def _kind_of_call(frame: FrameType) -> str | None:
    code = frame.f_code
    if any(code is op for op in _OPS):
        return "op" if attends_as(frame.f_locals["self"]) is not None else None
    if attends_by_name(code):
        name = code.co_name
        return next((library for library in ("flash_attn", "sage") if name.startswith(library)), name)
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    if flex is None or code.co_name != "flex_attention":
        return None
    # By its file: compiled by itself, as most code has it, it runs as code of Dynamo's.
    return "flex" if code.co_filename == flex.flex_attention.__code__.co_filename else None
