"""The inputs that kernels accept: asked as a value by the passes, and as an error by the ops."""

from __future__ import annotations

import functools
import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..errors import type_error, value_error
from ..keeping import NOTHING, PLAIN_WIDTH, WIDTH, Kept
from ..pair import check_pair
from ..report import Reason
from . import eight_bits, launch
from .block_map import KEY_BLOCK, QUERY_BLOCK, BlockMap, ceil_div
from .how import How
from .order import Orders
from .sizes import differ, surely

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_SIZE = 256
MAX_WIDE_HEAD_SIZE = 128  # float32 on a GPU with little shared memory
DEVICES = ("cpu", "cuda")
HAS_TRITON = find_spec("triton") is not None  # asked here, where Dynamo does not look
MIN_COMPUTE_CAPABILITY = (8, 0)  # older GPUs lack the asynchronous copies that the pipelined loops are built on


def refusal(device: torch.device, dtype: torch.dtype, *head_sizes: int) -> tuple[Reason, str] | None:
    """Why this device, dtype and head sizes (of keys, of values) have no sparse kernel, or None where they have one."""
    if device.type not in DEVICES:
        return Reason.DEVICE, f"{device.type}; kernels exist for {' and '.join(DEVICES)}"
    if device.type == "cuda":
        if not HAS_TRITON:
            return Reason.DEVICE, "Triton is not installed"
        capability = launch.compute_capability(device)
        if torch.version.hip is None and capability < MIN_COMPUTE_CAPABILITY:
            return Reason.DEVICE, f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if dtype not in DTYPES:
        return Reason.DTYPE, f"{_short(dtype)}; kernels exist for {', '.join(map(_short, DTYPES))}"
    if (
        device.type == "cuda"
        and dtype == torch.float32
        and max(head_sizes) > MAX_WIDE_HEAD_SIZE
        and launch.architecture(device) not in launch.MAJORS_WITH_227_KB
    ):
        return Reason.HEAD_SIZE, f"{max(head_sizes)} in float32; this GPU's shared memory holds {MAX_WIDE_HEAD_SIZE}"
    for head_size in head_sizes:
        if not 1 <= head_size <= MAX_HEAD_SIZE:
            return Reason.HEAD_SIZE, f"{head_size}; kernels exist for 1 to {MAX_HEAD_SIZE}"
    return None


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise a ``ValueError`` unless q [B, H, L, D], k [B, Hk, S, D] and v [B, Hk, S, Dv] can be attended to."""
    if torch.compiler.is_compiling():  # to look into what is remembered would guard it
        return _check_qkv(q, k, v)
    form: Any = tuple((x.shape, x.dtype, x.device) for x in (q, k, v))
    try:
        if form in _FITTING:
            return
    except TypeError:  # symbolic sizes have no hash
        form = None
    _check_qkv(q, k, v)
    if form is not None and len(_FITTING) < 4096:
        _FITTING.add(form)


_FITTING: set[Any] = set()  # what was found right, since asking takes longer than a small attention


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_sizes(q, k, v)
    if not q.dtype == k.dtype == v.dtype:
        raise value_error(
            "dtypes differ",
            given=f"{q.dtype}, {k.dtype}, {v.dtype}",
            allowed="one dtype",
            todo="Cast query, key and value alike.",
        )
    if not q.device == k.device == v.device:
        raise value_error(
            "devices differ",
            given=f"{q.device}, {k.device}, {v.device}",
            allowed="one device",
            todo="Move them together.",
        )
    refused = refusal(q.device, q.dtype, q.shape[3], v.shape[3])
    if refused:
        reason, detail = refused
        raise value_error(
            f"{reason.value} without a sparse kernel",
            given=detail,
            allowed=f"{' or '.join(DEVICES)}, {', '.join(map(_short, DTYPES))}, head sizes 1 to {MAX_HEAD_SIZE}",
            todo="Use dense attention for it.",
        )


def check_sizes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise a ``ValueError`` unless q is [B, H, L, D], k [B, Hk, S, D], v [B, Hk, S, Dv], and Hk divides H.

    Of symbolic sizes only what is known for certain is an error; the others are asked again at run time.
    """
    for name, x in (("query", q), ("key", k), ("value", v)):
        if x.dim() != 4:
            raise value_error(
                f"{name} has the wrong rank",
                given=tuple(x.shape),
                allowed="[batch, heads, length, head size]",
                todo="Add or fold dimensions.",
            )
    if differ(k.shape[:3], v.shape[:3]):
        raise value_error(
            "key and value differ in batch, heads or length",
            given=f"key {tuple(k.shape)}, value {tuple(v.shape)}",
            allowed="equal shapes, but for the head size",
            todo="Give one value for each key.",
        )
    if differ((q.shape[0], q.shape[3]), (k.shape[0], k.shape[3])):
        raise value_error(
            "query and key do not fit",
            given=f"query {tuple(q.shape)}, key {tuple(k.shape)}",
            allowed="equal batch and head size",
            todo="Expand the batch, or project to one head size.",
        )
    if surely(k.shape[1] == 0) or surely(q.shape[1] % k.shape[1] != 0):
        raise value_error(
            "query heads are not a multiple of key heads",
            given=f"{q.shape[1]} and {k.shape[1]}",
            allowed="query heads = n × key heads",
            todo="Each key head serves the same number of query heads.",
        )


def check_mask(attn_mask: Tensor, q: Tensor, k: Tensor) -> None:
    """Raise a ``ValueError`` unless the mask broadcasts to [B, H, L, S] and is boolean or floating."""
    check_mask_size(attn_mask, q, k)
    if attn_mask.dtype not in (torch.bool, torch.float64, *DTYPES):
        raise value_error(
            "attn_mask has the wrong dtype",
            given=attn_mask.dtype,
            allowed="bool, float64, or a dtype of the kernels",
            todo="Cast it; True means attend.",
        )
    if attn_mask.device != q.device:
        raise value_error(
            "attn_mask is on another device",
            given=attn_mask.device,
            allowed=str(q.device),
            todo="Move it to the query's.",
        )
    if attn_mask.requires_grad:
        raise value_error(
            "attn_mask requires a gradient",
            given="requires_grad=True",
            allowed="a constant mask",
            todo="Detach it or use dense attention.",
        )


def check_mask_size(attn_mask: Tensor, q: Tensor, k: Tensor) -> None:
    """Raise a ``ValueError`` unless the mask broadcasts to [B, H, L, S]; of symbols, as :func:`check_sizes`."""
    target = (*q.shape[:3], k.shape[2])
    shape = tuple(attn_mask.shape)
    padded = (1,) * (4 - len(shape)) + shape
    if len(shape) > 4 or any(
        surely(have != want) and surely(have != 1) for have, want in zip(padded, target, strict=True)
    ):
        raise value_error(
            "attn_mask has the wrong shape",
            given=shape,
            allowed=f"what broadcasts to {target}",
            todo="Reshape or expand the mask.",
        )


def normal_mask(attn_mask: Tensor, keys: int) -> Tensor:
    """A mask as the ops take it: [B or 1, H or 1, L or 1, S], with -inf for every number that is meant as -inf.

    Many models hide keys with finfo.min. Its sums overflow, and no sum with it means anything.
    """
    attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
    attn_mask = attn_mask.expand(*attn_mask.shape[:3], keys)
    if attn_mask.dtype == torch.bool:
        return attn_mask
    return attn_mask.masked_fill(attn_mask <= torch.finfo(attn_mask.dtype).min / 2, -math.inf)


def check_thresholds(thresholds: Tensor, q: Tensor) -> None:
    """Raise a ``ValueError`` unless thresholds are float32 [H, 2 or 6] on the query's device. Values are not read."""
    wanted = [(q.shape[1], width) for width in (PLAIN_WIDTH, WIDTH)]
    known = all(isinstance(n, int) for n in (q.shape[1], *thresholds.shape)) and thresholds.shape in wanted
    if (
        (not known and all(differ(thresholds.shape, want) for want in wanted))
        or thresholds.dtype != torch.float32
        or thresholds.device != q.device
    ):
        raise value_error(
            "thresholds do not fit the query",
            given=f"{thresholds.dtype} {tuple(thresholds.shape)} on {thresholds.device}",
            allowed=f"float32 {wanted[0]} on {q.device}: (topk, topp) for each head; with kept tokens {wanted[1]}",
            todo="Give one pair for each query head.",
        )


def check_packing(how: How, q: Tensor, k: Tensor) -> None:
    """Raise a ``ValueError`` unless the sequences of a packed call fit q over k. Where they begin is not read."""
    given = (how.cu_seqlens_q, how.cu_seqlens_k)
    if given[0] is None and given[1] is None:
        return
    fit = all(
        x is not None
        and x.dim() == 1
        and x.dtype == torch.int32
        and x.device == q.device
        and not surely(x.shape[0] < 2)
        and not surely(x.stride(0) != 1)
        for x in given
    )
    if not fit or differ(given[0].shape, given[1].shape):  # type: ignore[union-attr]
        raise value_error(
            "cu_seqlens do not fit",
            given=" and ".join(
                "None" if x is None else f"{x.dtype} {tuple(x.shape)}, strides {tuple(x.stride())}, on {x.device}"
                for x in given
            ),
            allowed=f"two contiguous int32 [N + 1] on {q.device}",
            todo="Give where each sequence begins, and where the last one ends, for queries and for keys.",
        )
    if surely(q.shape[0] != 1) or how.attn_mask is not None:
        raise value_error(
            "packed sequences do not go with a batch or a mask",
            given=f"query {tuple(q.shape)}, {'no mask' if how.attn_mask is None else 'a mask'}",
            allowed="query [1, H, T, D], no mask",
            todo="What a key-padding mask hides is left out of a packed batch.",
        )
    longest = (how.max_seqlen_q, how.max_seqlen_k)
    if not all(isinstance(x, (int, torch.SymInt)) for x in longest) or any(surely(x < 1) for x in longest):
        raise value_error(
            "the longest sequence has no row, or no number of rows",
            given=f"max_seqlen_q={how.max_seqlen_q}, max_seqlen_k={how.max_seqlen_k}",
            allowed="ints, 1 or more",
            todo="Give the longest length of the sequences, or more.",
        )


def check_eight_bits(how: How, q: Tensor, v: Tensor) -> None:
    """Raise a ``ValueError`` where eight bits are asked for and there are no kernels."""
    if not how.eight_bits:
        return
    refused = "attn_mask" if how.attn_mask is not None else "cu_seqlens" if how.packed else ""
    refused = refused or eight_bits.refusal(q.device, q.shape[3], v.shape[3])
    if refused:
        raise value_error(
            "no kernel for this call in eight bits",
            given=refused,
            allowed="no mask, no packed sequences, head sizes of multiples of 16, capability 8.9 or newer or a CPU",
            todo="Leave precision out: the operands' own dtype attends.",
        )


def check_slots(how: How, q: Tensor, k: Tensor) -> None:
    """Raise a ``ValueError`` unless the tokens of rows in another order fit q over k."""
    if not how.ordered:
        return
    for letter, slots, x in (("q", how.slots_q, q), ("k", how.slots_k, k)):
        if slots is not None:
            _check_whole_numbers(f"slots_{letter}", slots, x.shape[2], q.device)
    if how.is_causal or how.packed:
        raise value_error(
            "an order of tokens does not go with causality or packed sequences",
            given="is_causal=True" if how.is_causal else "cu_seqlens",
            allowed="attention in which the order of tokens has no meaning, masks included",
            todo="Leave the order out: such a call has its blocks in the order of its tokens.",
        )


def check_orders(how: How, q: Tensor, k: Tensor, orders: Orders) -> None:
    """Raise a ``ValueError`` unless the orders of tokens fit q over k, as far as their sizes say."""
    given = orders._asdict()
    if any((given[f"slots_{x}"] is None) != (given[f"places_{x}"] is None) for x in "qk"):
        raise value_error(
            "an order of tokens is not whole",
            given=", ".join(name for name, x in given.items() if x is not None),
            allowed="slots_q and places_q together, and slots_k and places_k together",
            todo="sparge::order gives both.",
        )
    for name, x in given.items():
        if x is not None:
            _check_whole_numbers(name, x, (q if name.endswith("q") else k).shape[2], q.device)


def _check_whole_numbers(name: str, x: Tensor, length: Any, device: torch.device) -> None:
    """Raise a ``ValueError`` unless x is contiguous int32 [length] on a device."""
    fits = x.dim() == 1 and x.dtype == torch.int32 and x.device == device and not surely(x.stride(0) != 1)
    if not fits or surely(x.shape[0] != length):
        raise value_error(
            f"{name} does not fit",
            given=f"{x.dtype} {tuple(x.shape)} on {x.device}",
            allowed=f"contiguous int32 [{length}] on {device}",
            todo="sparge::order gives an order that fits a grid; the grid must have as many tokens as the sequence.",
        )


def check_block_map(block_map: BlockMap, q: Tensor, k: Tensor, how: How) -> None:
    """Raise unless the map's lists fit q over k. Contents are not read.

    Raises:
        TypeError: no pair of tensors. ValueError: lists of other shapes, dtypes or devices.
    """
    if not isinstance(block_map, tuple) or len(block_map) != 2 or not all(isinstance(x, Tensor) for x in block_map):
        raise type_error(
            "block_map has the wrong type",
            given=type(block_map).__name__,
            allowed="a BlockMap: its tensors counts and indices",
            todo="BlockMap.from_dense(kept) makes one from bool [B, H, query blocks, key blocks].",
        )
    n_query, n_key = ceil_div(how.length(q), QUERY_BLOCK), ceil_div(how.keys(k), KEY_BLOCK)
    counts, indices = block_map
    lead = tuple(counts.shape[:2])
    fits = all(have in (1, want) for have, want in zip(lead, (how.sequences(q), q.shape[1]), strict=False))
    if (
        counts.dim() != 3
        or not fits
        or tuple(counts.shape[2:]) != (n_query,)
        or tuple(indices.shape) != (*counts.shape, n_key)
    ):
        raise value_error(
            "block_map has the wrong shape",
            given=f"counts {tuple(counts.shape)}, indices {tuple(indices.shape)}",
            allowed=f"counts [B or 1, H or 1, {n_query}], indices [B or 1, H or 1, {n_query}, {n_key}]",
            todo=f"A query block has {QUERY_BLOCK} rows and a key block {KEY_BLOCK}; BlockMap.from_dense makes lists.",
        )
    if (
        counts.dtype != torch.int32
        or indices.dtype != torch.int32
        or counts.device != q.device
        or indices.device != q.device
    ):
        raise value_error(
            "block_map has the wrong dtype or device",
            given=f"{counts.dtype} on {counts.device}, {indices.dtype} on {indices.device}",
            allowed=f"int32 on {q.device}",
            todo="Convert it with .to().",
        )


def constant_thresholds(topk: float, topp: float, heads: int, device: torch.device, kept: Kept = NOTHING) -> Tensor:
    """:func:`make_thresholds` of numbers: the same tensor for the same ones, where nobody traces or records."""
    if (
        not all(isinstance(x, (int, float)) for x in (topk, topp))
        or torch.compiler.is_compiling()
        or torch.utils._python_dispatch._get_current_dispatch_mode() is not None
        or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    ):
        return make_thresholds(topk, topp, heads, device, kept)
    return _held_thresholds(topk, topp, heads, device, kept)


@functools.lru_cache(maxsize=256, typed=True)
def _held_thresholds(topk: float, topp: float, heads: int, device: torch.device, kept: Kept) -> Tensor:
    with torch.inference_mode(False):
        return make_thresholds(topk, topp, heads, device, kept)


def make_thresholds(
    topk: float | Tensor, topp: float | Tensor, heads: int, device: torch.device, kept: Kept = NOTHING
) -> Tensor:
    """float32 [H, 2] from numbers, or from tensors of one value for each head (whose values are not read).

    With kept tokens it is [H, 6].
    """
    # Numbers are filled in, where a copy would wait for the GPU.
    if not isinstance(topk, Tensor):
        topk = torch.full((), check_pair(topk, 0.0)[0], device=device)
    if not isinstance(topp, Tensor):
        topp = torch.full((), check_pair(1.0, topp)[1], device=device)
    for name, value in (("topk", topk), ("topp", topp)):
        if value.shape not in ((), (1,), (heads,)):
            raise value_error(
                f"{name} does not fit the query",
                given=f"shape {tuple(value.shape)}",
                allowed=f"a number or [{heads}]",
                todo="Give one for each head.",
            )
    numbers = [torch.full((), x, device=device) for x in (kept.numbers if kept != NOTHING else ())]
    return torch.stack([x.to(device=device, dtype=torch.float32).expand(heads) for x in (topk, topp, *numbers)], -1)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
