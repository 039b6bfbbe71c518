"""Helpers of the kernel tests: inputs, comparison of block maps up to ties, error bounds that come from arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparge_compile.kernels import reference
from sparge_compile.kernels.block_map import KEY_BLOCK, QUERY_BLOCK, BlockMap, ceil_div

GARBAGE = 1 << 30  # what fresh integer memory holds in tests: an index that no tensor has


class Case(NamedTuple):
    """One attention problem; ``str(case)`` is its test id."""

    length: int
    keys: int
    head_size: int
    batch: int = 1
    heads: int = 2
    key_heads: int = 2
    dtype: torch.dtype = torch.float32
    mask: str = "none"
    is_causal: bool = False
    layout: str = "bhld"
    scale: float | None = None
    value_size: int | None = None

    def __str__(self) -> str:
        words = [f"L{self.length}", f"S{self.keys}", f"D{self.head_size}", f"B{self.batch}", f"H{self.heads}"]
        words += [f"Dv{self.value_size}"] * (self.value_size is not None)
        words += [f"Hk{self.key_heads}", str(self.dtype).removeprefix("torch."), self.mask, self.layout]
        return "-".join(words + ["causal"] * self.is_causal + [f"scale{self.scale}"] * (self.scale is not None))


def random_matrix(batch: int, heads: int, length: int, head_size: int, dtype: torch.dtype, layout: str) -> Tensor:
    """Normal numbers [B, H, L, D] on the default device, whose memory is laid out as ``layout`` says."""
    if layout == "bhld":
        return torch.randn(batch, heads, length, head_size, dtype=dtype)
    if layout == "blhd":
        return torch.randn(batch, length, heads, head_size, dtype=dtype).transpose(1, 2)
    if layout == "fused":  # a slice of a fused projection: not dense, rows not 16-byte aligned for odd head sizes
        fused = torch.randn(batch, length, heads, 3 * head_size, dtype=dtype)
        return fused[..., head_size : 2 * head_size].transpose(1, 2)
    if layout == "bhdl":  # the last dimension is strided
        return torch.randn(batch, heads, head_size, length, dtype=dtype).mT
    raise ValueError(f"unknown layout {layout!r}; known: bhld, blhd, fused, bhdl")


def random_qkv(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    q = random_matrix(case.batch, case.heads, case.length, case.head_size, case.dtype, case.layout)
    k, v = (
        random_matrix(case.batch, case.key_heads, case.keys, size, case.dtype, case.layout)
        for size in (case.head_size, case.value_size or case.head_size)
    )
    return q, k, v


def random_mask(case: Case) -> Tensor | None:
    """``none``, ``key`` (padding), ``full`` (bool, some rows closed), ``add`` (float, with -inf), ``add_key``."""
    rows, keys = case.length, case.keys
    if case.mask == "none":
        return None
    if case.mask == "key":
        visible = torch.randint(max(1, keys // 2), keys + 1, (case.batch, 1, 1, 1))
        return torch.arange(keys) < visible
    if case.mask == "full":
        mask = torch.rand(1, case.heads, rows, keys) < 0.7
        mask[:, :, ::37] = False  # rows that see nothing
        return mask
    if case.mask == "add":
        mask = torch.randn(case.batch, 1, rows, keys).to(case.dtype)
        return mask.masked_fill(torch.rand(rows, keys) < 0.2, -torch.inf)
    if case.mask == "add_key":
        return torch.randn(1, 1, 1, keys).to(case.dtype).expand(case.batch, 1, 1, keys)
    raise ValueError(f"unknown mask {case.mask!r}; known: none, key, full, add, add_key")


def random_map(case: Case, density: float = 0.5) -> BlockMap:
    """Lists of random blocks; some query blocks keep none, and causality is not respected, as in a caller's own map."""
    n_query, n_key = ceil_div(case.length, QUERY_BLOCK), ceil_div(case.keys, KEY_BLOCK)
    return BlockMap.from_dense(torch.rand(case.batch, case.heads, n_query, n_key) < density)


def rewrite_graph(graph_module: Any, options: Any) -> Any:
    """The passes on a graph, in place; gives the finished work."""
    from functools import partial

    from sparge_compile.passes.pipeline import decide_sites, find, rewriting_passes
    from sparge_compile.passes.work import Work, run

    work = Work(graph_module)
    run(work, find, partial(decide_sites, options=options), *rewriting_passes(options, lambda x: x))
    return work


def block_constant(batch: int, heads: int, length: int, head_size: int, block: int, values: int = 2) -> Tensor:
    """Small integers, equal in all rows of a block: block means and scores are exact in float32, and ties are real."""
    blocks = torch.randint(-values, values + 1, (batch, heads, ceil_div(length, block), head_size))
    return blocks.repeat_interleave(block, 2)[:, :, :length].float()


def scale_of(case: Case) -> float:
    return case.head_size**-0.5 if case.scale is None else case.scale


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN, or an index that does not exist: what a kernel forgets to write shows."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            garbage = torch.nan if x.is_floating_point() else GARBAGE if x.dtype != torch.int8 else 77
            return x.fill_(garbage) if x.dtype != torch.uint8 else x

        return made

    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_permuted", "empty_strided"):
            patch.setattr(torch, name, poison(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(Tensor, name, poison(getattr(Tensor, name)))
        yield


def assert_same_map(got: BlockMap, want: BlockMap) -> None:
    """Equal counts, equal blocks, and ascending lists."""
    assert got.counts.dtype == got.indices.dtype == torch.int32
    torch.testing.assert_close(got.counts, want.counts, rtol=0, atol=0)
    live = torch.arange(want.indices.shape[-1], device=want.indices.device) < want.counts.unsqueeze(-1)
    torch.testing.assert_close(got.indices[live], want.indices[live], rtol=0, atol=0)


def assert_map_matches(
    got: BlockMap,
    q: Tensor,
    k: Tensor,
    thresholds: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    slack: float = 1e-4,
) -> None:
    """A map obeys the rule up to ties: scores closer than ``slack``, or a mass so near ``topp``, may go either way.

    Checked in float64: nothing invisible is kept, the diagonal and what a mask cuts are kept, no dropped block scores
    above a kept one, and the number kept lies between the rule's for topp - slack and topp + slack.
    """
    kept = got.to_dense()
    wide_mask = attn_mask.double() if attn_mask is not None and attn_mask.dtype != torch.bool else attn_mask
    scores, visible, forced, anchor = reference.block_scores(q.double(), k.double(), wide_mask, is_causal, scale)
    forced = forced & visible
    assert not (kept & ~visible).any(), "an invisible block was kept"
    assert not (forced & ~kept).any(), "a diagonal or cut block was dropped"
    lowest_kept = scores.masked_fill(~kept | forced, torch.inf).amin(-1)
    highest_dropped = scores.masked_fill(kept | ~visible, -torch.inf).amax(-1)
    assert (lowest_kept >= highest_dropped - slack).all(), "a dropped block scores above a kept one"
    counts = []
    for shift in (-slack, slack):
        moved = thresholds.clone()
        moved[:, 1] = torch.where(moved[:, 1] > 0, moved[:, 1] + shift, 0.0)
        counts.append(reference.select(scores, visible, moved, forced, anchor).sum(-1))
    assert (got.counts >= counts[0]).all() and (got.counts <= counts[1]).all(), "wrong number of blocks"


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, attn_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Dense SDPA and log-sum-exp in the inputs' dtype over the allowed pairs, which every row must have."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    if scale < 0:  # a fused kernel of torch's gives NaN
        q, scale = -q, -scale
    bias = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device).masked_fill(~allowed, -torch.inf)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        bias = bias + torch.where(allowed, attn_mask, 0).to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out, torch.logsumexp(((q @ k.mT) * scale + bias).float(), -1)


class Problem(NamedTuple):
    """One call of attention, forward and backward; ``dlse`` is None where the log-sum-exp is not differentiated."""

    q: Tensor
    k: Tensor
    v: Tensor
    block_map: BlockMap
    mask: Tensor | None
    is_causal: bool
    scale: float
    dout: Tensor
    dlse: Tensor | None

    def allowed(self) -> Tensor:
        """bool [B, H, L, S]: the pairs that attention sees."""
        kept = self.block_map.to_dense().expand(*self.q.shape[:2], -1, -1)
        return reference.allowed_pairs(kept, self.q.shape[2], self.k.shape[2], self.mask, self.is_causal)


class Results(NamedTuple):
    """The results of attention and its backward, or the size of each."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def random_problem(case: Case, block_map: BlockMap, with_dlse: bool = True) -> Problem:
    q, k, v = random_qkv(case)
    mask = random_mask(case)
    dout = random_matrix(*q.shape[:3], v.shape[3], case.dtype, case.layout)
    dlse = torch.randn(q.shape[:3]) if with_dlse else None
    return Problem(q, k, v, block_map, mask, case.is_causal, scale_of(case), dout, dlse)


def exact_results(problem: Problem) -> Results:
    """The reference in float64, differentiated by autograd. Rows without a key have lse -inf and no gradient."""
    q, k, v, block_map, mask, is_causal, scale, dout, dlse = problem
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wide_mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    out, lse = reference.attention(*inputs, block_map, wide_mask, is_causal, scale)
    seen_lse = lse.masked_fill(lse == -torch.inf, 0.0)  # the gradient of -inf is NaN in autograd, and 0 in ours
    weights = dout.double(), torch.zeros_like(lse) if dlse is None else dlse.double()
    return Results(out.detach(), lse.detach(), *torch.autograd.grad((out, seen_lse), inputs, weights))


def plain_results(problem: Problem) -> Results:
    """Dense SDPA in the inputs' dtype over the same pairs: its error is the measure of ours."""
    allowed = problem.allowed()
    empty = ~allowed.any(-1)
    inputs = [x.detach().clone().requires_grad_() for x in problem[:3]]
    out, lse = plain_attention(*inputs, allowed | empty.unsqueeze(-1), problem.mask, problem.scale)
    dlse = torch.zeros_like(lse) if problem.dlse is None else problem.dlse
    weights = problem.dout.masked_fill(empty.unsqueeze(-1), 0.0), dlse.masked_fill(empty, 0.0)
    grads = torch.autograd.grad((out, lse), inputs, weights)
    return Results(
        out.detach().masked_fill(empty.unsqueeze(-1), 0.0), lse.detach().masked_fill(empty, -torch.inf), *grads
    )


def summed_terms(problem: Problem) -> Results:
    """The sums of the absolute values of all that is added up to each result, in float64.

    Rounding is relative to these, not to a result that cancels: in a row that sees one key dS = P * (dP - delta) is
    zero, yet P * dP and P * delta are not, and each of them is rounded.
    """
    allowed, group = problem.allowed(), problem.q.shape[1] // problem.k.shape[1]
    q, k, v, dout = (x.detach().double() for x in (problem.q, problem.k, problem.v, problem.dout))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    mask = (
        problem.mask
        if problem.mask is not None and problem.mask.dtype != torch.bool
        else torch.zeros_like(q[:1, :1, :1, :1])
    )
    mask = torch.where(allowed, mask.double(), 0.0)
    scores = (q @ k.mT * problem.scale + mask).masked_fill(~allowed, -torch.inf)
    p = scores.softmax(-1).nan_to_num(0.0)  # [B, H, L, S]
    q, k, v, dout = q.abs(), k.abs(), v.abs(), dout.abs()
    score_terms = (q @ k.mT * abs(problem.scale) + mask.abs()).masked_fill(~allowed, 0.0)
    out = p @ v
    delta = (dout * out).sum(-1)
    if problem.dlse is not None:
        delta = delta + problem.dlse.double().abs()
    ds = p * (dout @ v.mT + delta.unsqueeze(-1))
    dk, dv = ((x.mT @ y).unflatten(1, (-1, group)).sum(2) for x, y in ((ds, q), (p, dout)))
    scale = abs(problem.scale)
    return Results(out, score_terms.amax(-1), ds @ k * scale, dk * scale, dv)


def assert_error_bounded(
    actual: Tensor, exact: Tensor, plain: Tensor, terms: Tensor, what: str, factor: float = 3.0
) -> None:
    """The error is at most ``factor`` times that of a plain dense computation in the same dtype.

    A few roundings are always allowed, as the plain error may be zero: of the largest result in its own dtype,
    and in the dtype of the arithmetic (float32 at least) of the largest sum of absolute ``terms``.
    """
    assert not actual.isnan().any(), f"{what}: NaN"
    hidden = exact == -torch.inf
    assert torch.equal(actual == -torch.inf, hidden), f"{what}: other rows see no key"
    if not exact.numel():
        return
    actual, exact, plain = (x.masked_fill(hidden, 0.0) for x in (actual, exact, plain))
    error, plain_error = ((x.double() - exact).abs().amax() for x in (actual, plain))
    arithmetic = torch.promote_types(actual.dtype, torch.float32)
    rounding = 4 * torch.finfo(actual.dtype).eps * exact.abs().amax() + 8 * torch.finfo(arithmetic).eps * terms.amax()
    bound = factor * plain_error + rounding
    assert error <= bound, f"{what}: error {error:.3g}, bound {bound:.3g} (plain {plain_error:.3g})"


def assert_results_bounded(actual: Results, problem: Problem) -> None:
    """Each result has the shape and dtype of its input, and an error that arithmetic explains."""
    likes = problem.dout, actual.lse, problem.q, problem.k, problem.v
    for name, x, like in zip(Results._fields, actual, likes, strict=True):
        assert x.dtype == like.dtype and x.shape == like.shape, name
    bounds = exact_results(problem), plain_results(problem), summed_terms(problem)
    for name, x, exact, plain, terms in zip(Results._fields, actual, *bounds, strict=True):
        assert_error_bounded(x, exact, plain, terms, name)


def face_of(device: str) -> Any:
    """The four functions of one device: ``cpu``, or ``triton``, on a GPU or in Triton's interpreter."""
    return import_module(f"sparge_compile.kernels.{device}")


def run_face(face: Any, problem: Problem) -> Results:
    """Forward and backward in poisoned memory; the gradient of lse is NaN where it must not be read."""
    q, k, v, block_map, mask, is_causal, scale, dout, dlse = problem
    how = mask, is_causal, scale
    if dlse is not None:
        dlse = dlse.masked_fill(~problem.allowed().any(-1), torch.nan)
    with poisoned_memory():
        out, lse = face.forward(q, k, v, *block_map, *how)
        grads = face.backward(dout, q, k, v, out, lse, dlse, face.pack(*block_map), *how)
    return Results(out, lse, *grads)


def check_attention(case: Case, block_map: BlockMap, with_dlse: bool = True, face: Any = None) -> None:
    """Forward and backward of a face (of the Triton kernels if none is given) against the reference in float64.

    Masked rows count: where nothing is seen, out and gradients are zero and lse is -inf.
    """
    problem = random_problem(case, block_map, with_dlse)
    assert_results_bounded(run_face(face or face_of("triton"), problem), problem)
