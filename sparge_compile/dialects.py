"""What a call of another library's attention means: its arguments by name in, one form out, or why it is refused.

flash-attn 2 and 3, torch's varlen attention, xformers and SageAttention say the same in different words. Here they are
told by the name of the function or op and by the names of its arguments, never by where it comes from (builds from the
Hub carry a hash in their namespace). The values may be tensors or the nodes of a graph: none is looked into.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from .report import Reason

# Whose keys a query sees under causality: key ≤ query, or key ≤ query + S − L.
TOP_LEFT, BOTTOM_RIGHT = "top_left", "bottom_right"


@dataclass(frozen=True)
class Dialect:
    """A way to call attention: functions with such a name, whose signature has all of these arguments."""

    kind: str  # in a report; of fixed lengths, and of packed sequences
    packed_kind: str
    name: str
    needs: tuple[str, ...]
    causal: str = BOTTOM_RIGHT

    def fits(self, name: str, arguments: Collection[str]) -> bool:
        """Whether a function of this name and with arguments of these names is called so."""
        return re.fullmatch(self.name, name) is not None and set(self.needs) <= set(arguments)


_FLASH = ("q", "k", "v", "softmax_scale")
DIALECTS = (
    Dialect("flash_attn", "varlen", r"_?flash_attn(_varlen)?_(forward|func)", (*_FLASH, "causal")),
    Dialect("flash_attn", "varlen", r"(varlen_|mha_)?fwd", (*_FLASH, "is_causal", "window_size_left")),
    Dialect("flash_attn", "varlen", r"_flash_attention_forward", ("query", "key", "value", "cum_seq_q", "is_causal")),
    Dialect("varlen", "varlen", r"_?varlen_attn", ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")),
    Dialect("xformers", "xformers", r"flash_fwd", ("query", "key", "value", "cu_seqlens_q", "softmax_scale")),
    Dialect("xformers", "xformers", r"memory_efficient_attention_forward(_with_bias)?", ("q", "k", "v", "b", "scale")),
    Dialect("xformers", "xformers", r"memory_efficient_attention", ("query", "key", "value", "attn_bias", "scale")),
    Dialect("xformers", "xformers", r"_efficient_attention_forward", ("query", "key", "value", "custom_mask_type")),
    Dialect("sage", "sage", r"sageattn(_qk_.*)?", ("q", "k", "v", "tensor_layout", "sm_scale"), TOP_LEFT),
)

# What arguments say, by name.
_WORDS = {
    "query": ("query", "q"),
    "key": ("key", "k"),
    "value": ("value", "v"),
    "scale": ("scale", "softmax_scale", "sm_scale"),
    "dropout": ("dropout_p", "p_dropout", "p"),
    "causal": ("causal", "is_causal"),
    "mask_type": ("custom_mask_type",),  # of torch's efficient attention: 0 none, 1 top left, 2 bottom right
    "mask": ("b", "bias", "attn_bias"),
    "window": ("window_size",),
    "window_left": ("window_size_left", "window_left"),
    "window_right": ("window_size_right", "window_right"),
    "layout": ("tensor_layout",),
    "cu_seqlens_q": ("cu_seqlens_q", "cu_seq_q", "cum_seq_q"),
    "cu_seqlens_k": ("cu_seqlens_k", "cu_seq_k", "cum_seq_k"),
    "max_seqlen_q": ("max_seqlen_q", "max_q"),
    "max_seqlen_k": ("max_seqlen_k", "max_k"),
}
_MEANING = {word: meaning for meaning, words in _WORDS.items() for word in words}
# How a kernel goes about its work, and what it returns besides: no matter, whatever the value.
_FREE = {
    *("deterministic", "num_splits", "pack_gqa", "sm_margin", "scheduler_metadata", "rotary_interleaved", "backend"),
    *("return_softmax", "return_attn_probs", "return_debug_mask", "return_lse", "compute_log_sumexp", "enable_gqa"),
    *("smooth_k", "smooth_v", "qk_quant_gran", "pv_accum_dtype", "quantization_backend"),
}
_REASONS = {
    "softcap": Reason.SOFTCAP,
    "alibi_slopes": Reason.ALIBI,
    "block_table": Reason.PAGED,
    "block_tables": Reason.PAGED,
    "page_table": Reason.PAGED,
}


@dataclass(frozen=True)
class Meaning:
    """What a call asks for.

    Attributes:
        layout: of the operands and the result: ``"blhd"``, ``"bhld"``, or ``"thd"`` for packed sequences.
        causal: ``""``, ``"top_left"`` or ``"bottom_right"``.
        scale: of the scores; None stands for D ** -0.5.
        dropout: its probability.
        mask: what is added to the scores, broadcastable to [B, H, L, S], or None.
        cu_seqlens_q, cu_seqlens_k: where packed sequences begin and end, int32 [N + 1]; None for others.
        max_seqlen_q, max_seqlen_k: the longest of them.
    """

    query: Any
    key: Any
    value: Any
    layout: str = "blhd"
    causal: str = ""
    scale: Any = None
    dropout: Any = 0.0
    mask: Any = None
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    max_seqlen_q: Any = None
    max_seqlen_k: Any = None


@dataclass(frozen=True)
class Unspoken:
    """Why a call cannot be had in sparse: a reason, and the argument with its value."""

    reason: Reason
    detail: str


def dialect_of(name: str, arguments: Collection[str]) -> Dialect | None:
    """The dialect of a function, told by its name (without its namespace or module) and those of its arguments."""
    return next((dialect for dialect in DIALECTS if dialect.fits(name, arguments)), None)


def understand(dialect: Dialect, arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> Meaning | Unspoken:
    """What a call means.

    Args:
        dialect: of the function that is called.
        arguments: all of its arguments by name, defaults filled in.
        defaults: the default of each argument that has one. An argument that is not known here must have its default.
    """
    said = {_MEANING[name]: value for name, value in arguments.items() if name in _MEANING}
    for name, value in arguments.items():
        if name not in _MEANING and name not in _FREE and not _is_neutral(name, value, defaults):
            return Unspoken(_REASONS.get(name, Reason.ARGUMENT), f"{name} = {value}")
    causal = _causality(said, dialect)
    if isinstance(causal, Unspoken):
        return causal
    layout = {"NHD": "blhd", "HND": "bhld", "BLHD": "blhd"}.get(said.get("layout", "BLHD"))
    if layout is None:
        return Unspoken(Reason.LAYOUT, f"tensor_layout = {said['layout']}")
    packing = {name: said.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")}
    lengths = packing["cu_seqlens_q"], packing["cu_seqlens_k"]
    if any(x is None for x in lengths) and not all(x is None for x in lengths):
        return Unspoken(Reason.ARGUMENT, "cu_seqlens of queries or keys alone")
    return Meaning(
        said["query"],
        said["key"],
        said["value"],
        layout="thd" if lengths[0] is not None else layout,
        causal=causal,
        scale=said.get("scale"),
        dropout=said.get("dropout") or 0.0,
        mask=said.get("mask"),
        **(packing if lengths[0] is not None else {}),
    )


def _is_neutral(name: str, value: Any, defaults: Mapping[str, Any]) -> bool:
    if name == "softcap":
        return isinstance(value, (int, float)) and value <= 0
    return value is None or (isinstance(value, (bool, int, float, str, tuple)) and value == defaults.get(name))


def _causality(said: Mapping[str, Any], dialect: Dialect) -> str | Unspoken:
    """Causality, which is also said as a window that ends at the query."""
    if not isinstance(said.get("causal"), (bool, int, type(None))):
        return Unspoken(Reason.ARGUMENT, f"causal = {said['causal']}")
    mask_type = said.get("mask_type", 0)
    if mask_type not in (0, 1, 2):
        return Unspoken(Reason.ARGUMENT, f"custom_mask_type = {mask_type}")
    causal = {0: "", 1: TOP_LEFT, 2: BOTTOM_RIGHT}[mask_type] or (dialect.causal if said.get("causal") else "")
    window = said.get("window")
    if window is None:
        window = said.get("window_left"), said.get("window_right")
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        return Unspoken(Reason.WINDOW, f"window_size = {window}")
    left, right = (-1 if side is None else side for side in window)
    ends_anywhere = causal or (isinstance(right, int) and right <= 0)
    if not (isinstance(left, int) and left < 0 and ends_anywhere):
        return Unspoken(Reason.WINDOW, f"window_size = ({left}, {right})")
    return causal or (dialect.causal if right == 0 else "")
