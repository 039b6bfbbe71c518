"""Code that looks like attention and must not be rewritten, with the reasons that the report may give."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from spelling import FINITE, OTHER_AXIS, SCALE, WEIGHTS_CHANGED, B, D, H, Inputs, L, S, qkv
from torch import Tensor, nn

from sparge_compile.report import Reason

E = 6  # experts


@dataclass(frozen=True)
class LookAlike:
    """``reasons`` are those that the report may give; where ``silent``, it may also say nothing at all."""

    name: str
    function: Callable[..., Any]
    inputs: Inputs
    reasons: tuple[Reason, ...]
    silent: bool = False
    kinds: tuple[str, ...] = ("decomposed", "softmax")


LOOKALIKES: list[LookAlike] = []


def lookalike(*reasons: Reason, inputs: Inputs | None = None, silent: bool = False, **more: Any) -> Callable[..., Any]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        LOOKALIKES.append(LookAlike(function.__name__, function, inputs or qkv(), reasons, silent, **more))
        return function

    return register


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * SCALE


def with_extra(*extra: Callable[[], Tensor], **how: Any) -> Inputs:
    return lambda: (*qkv(**how)(), *(make() for make in extra))


def tokens() -> tuple[Tensor, Tensor]:
    """Tokens [B, L, D] and a gate [D, E]."""
    return torch.randn(B, L, D), torch.randn(D, E)


# ---- softmax over something else


@lookalike(Reason.NOT_ATTENTION)
def softmax_over_queries(q, k, v):
    """Slot attention, before its weights are normalised."""
    return scores_of(q, k).softmax(dim=-2) @ v


@lookalike(*OTHER_AXIS)
def softmax_over_heads(q, k, v):
    return scores_of(q, k).softmax(dim=1) @ v


@lookalike(*OTHER_AXIS)
def softmax_over_the_batch(q, k, v):
    return scores_of(q, k).softmax(dim=0) @ v


@lookalike(Reason.NOT_ATTENTION, inputs=qkv(length=S))
def weights_transposed_before_the_values(q, k, v):
    return scores_of(q, k).softmax(-1).mT @ v


@lookalike(Reason.NOT_ATTENTION)
def softmax_of_queries_and_keys_apart(q, k, v):
    """Linear attention."""
    return q.softmax(dim=-1) @ (k.softmax(dim=-2).mT @ v)


@lookalike(Reason.NOT_ATTENTION)
def attention_over_channels(q, k, v):
    """Cross-covariance attention with its softmax over the wrong channels; over the others, channels are tokens."""
    weights = (F.normalize(q[:, :, :L], dim=-2).mT @ F.normalize(k[:, :, :L], dim=-2)).softmax(-2)
    return (weights @ v[:, :, :L].mT).mT


@lookalike(Reason.NOT_ATTENTION, inputs=lambda: (torch.randn(B, D), torch.randn(D, E)))
def classifier(x, weight):
    return (x @ weight).softmax(dim=-1)


@lookalike(Reason.NOT_ATTENTION, inputs=tokens)
def routing(x, gate):
    """Mixture of experts: the best two of the softmax, renormalised."""
    weights, chosen = (x @ gate).softmax(dim=-1).topk(2, dim=-1)
    return weights / weights.sum(-1, keepdim=True), chosen


@lookalike(Reason.NOT_ATTENTION, Reason.LAYOUT, inputs=lambda: (*tokens(), torch.randn(E, D, D)))
def soft_mixture_of_experts(x, gate, experts):
    """The values belong to the token, so the shapes do not fit."""
    outputs = torch.einsum("bld,edf->blef", x, experts)
    return torch.einsum("ble,blef->blf", (x @ gate).softmax(dim=-1), outputs)


@lookalike(Reason.NOT_ATTENTION, Reason.LAYOUT, inputs=lambda: (torch.randn(B, L, D), torch.randn(D)))
def attention_pooling(x, query):
    """One vector of weights for a sequence, from a product with a vector."""
    return ((x @ query).softmax(dim=1).unsqueeze(-1) * x).sum(1)


@lookalike(Reason.NOT_ATTENTION, inputs=with_extra(lambda: torch.randn(H, L, S)))
def weights_without_a_product(q, k, v, scores):
    """Synthesizer: the scores are parameters."""
    return scores.softmax(dim=-1) @ v


@lookalike(Reason.NOT_ATTENTION, inputs=lambda: (torch.randn(B, L, D), torch.randn(B, L, D)))
def weights_of_elementwise_products(q, k):
    return (q * k).softmax(dim=-1) @ k.mT


@lookalike(Reason.NOT_ATTENTION, Reason.WEIGHTS_USED, silent=True)
def log_softmax(q, k, v):
    return scores_of(q, k).log_softmax(dim=-1) @ v


@lookalike(silent=True)
def sigmoid(q, k, v):
    return scores_of(q, k).sigmoid() @ v


@lookalike(Reason.SCORES_USED)
def softmax_by_hand_of_scores_by_their_columns(q, k, v):
    """What is subtracted differs from key to key."""
    scores = scores_of(q, k)
    weights = (scores - scores.amax(-2, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v


@lookalike(silent=True)
def exp_by_the_sum_of_another(q, k, v):
    scores = scores_of(q, k)
    return (scores.exp() / (scores + 1).exp().sum(-1, keepdim=True)) @ v


@lookalike(Reason.SCORES_USED)
def softmax_by_hand_whose_exp_is_returned(q, k, v):
    weights = scores_of(q, k).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v, weights


@lookalike(Reason.NOT_ATTENTION, silent=True)
def softmax_with_one_more_in_the_denominator(q, k, v):
    weights = scores_of(q, k).exp()
    return (weights / (1 + weights.sum(-1, keepdim=True))) @ v


# ---- weights that somebody else wants


@lookalike(Reason.WEIGHTS_USED)
def weights_returned(q, k, v):
    weights = scores_of(q, k).softmax(dim=-1)
    return weights @ v, weights


@lookalike(Reason.WEIGHTS_USED)
def entropy_of_the_weights(q, k, v):
    weights = scores_of(q, k).softmax(dim=-1)
    return weights @ v, -(weights * weights.clamp(min=1e-9).log()).sum(-1).mean()


@lookalike(Reason.WEIGHTS_USED)
def weights_of_the_first_key_read(q, k, v):
    """A view of the weights is a use of them."""
    weights = scores_of(q, k).softmax(dim=-1)
    return weights @ v, weights[..., 0]


@lookalike(Reason.SCORES_USED)
def scores_returned(q, k, v):
    scores = scores_of(q, k)
    return scores.softmax(dim=-1) @ v, scores


@lookalike(*WEIGHTS_CHANGED, inputs=with_extra(lambda: torch.rand(S)))
def weights_multiplied(q, k, v, gate):
    return (scores_of(q, k).softmax(dim=-1) * gate) @ v


@lookalike(*WEIGHTS_CHANGED)
def weights_of_the_best_keys(q, k, v):
    best, where = scores_of(q, k).softmax(dim=-1).topk(8, dim=-1)
    return torch.zeros(B, H, L, S).scatter(-1, where, best) @ v


@lookalike(*WEIGHTS_CHANGED)
def weights_normalised_again(q, k, v):
    weights = scores_of(q, k).softmax(dim=-1) + 1e-3
    return (weights / weights.sum(dim=-2, keepdim=True)) @ v


@lookalike(*WEIGHTS_CHANGED)
def mask_multiplied_after_the_softmax(q, k, v):
    return (scores_of(q, k).softmax(-1) * (torch.arange(S) < 77)) @ v


@lookalike(Reason.NOT_ATTENTION, inputs=with_extra(lambda: torch.randn(H, H)))
def heads_mixed_after_the_softmax(q, k, v, mix):
    weights = torch.einsum("bhqk,hg->bgqk", scores_of(q, k).softmax(dim=-1), mix)
    return weights @ v


@lookalike(*WEIGHTS_CHANGED)
def difference_of_two_softmaxes(q, k, v):
    """Differential attention."""
    first, second = scores_of(q, k).chunk(2, dim=1)
    return (first.softmax(-1) - 0.5 * second.softmax(-1)) @ v[:, : H // 2]


# ---- scores that are changed


@lookalike(Reason.SCORES_CHANGED, inputs=with_extra(lambda: torch.randn(H, H)))
def heads_mixed_before_the_softmax(q, k, v, mix):
    return torch.einsum("bhqk,hg->bgqk", scores_of(q, k), mix).softmax(dim=-1) @ v


@lookalike(Reason.SCORES_CHANGED, inputs=with_extra(lambda: torch.randn(1, H, 1, 1)))
def sink_column(q, k, v, sink):
    """The softmax of gpt-oss: one more column of scores, which no value belongs to."""
    scores = torch.cat([scores_of(q, k), sink.expand(B, H, L, 1)], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return scores.softmax(dim=-1)[..., :-1] @ v


@lookalike(Reason.SCORES_CHANGED)
def column_of_zeros(q, k, v):
    return F.pad(scores_of(q, k), (0, 1)).softmax(dim=-1)[..., :-1] @ v


@lookalike(Reason.SCORES_CHANGED)
def softcap(q, k, v):
    return (torch.tanh(scores_of(q, k) / 5.0) * 5.0).softmax(dim=-1) @ v


@lookalike(Reason.SCORES_CHANGED)
def relu_of_the_scores(q, k, v):
    return scores_of(q, k).relu().softmax(dim=-1) @ v


@lookalike(Reason.SCORES_CHANGED, inputs=with_extra(lambda: torch.rand(S)))
def scale_along_the_keys(q, k, v, scale):
    return (scores_of(q, k) * scale).softmax(dim=-1) @ v


@lookalike(Reason.SCORES_CHANGED, inputs=with_extra(lambda: torch.rand(B, H, L, S)))
def scale_of_each_pair(q, k, v, scale):
    return (scores_of(q, k) * scale).softmax(dim=-1) @ v


@lookalike(
    Reason.SCORES_CHANGED,
    Reason.ADDITIVE_MASK,
    Reason.LEARNED_BIAS,
    inputs=with_extra(lambda: torch.randn(B, H, S, D)),
)
def sum_of_two_products(q, k, v, other):
    """Scores of content and scores of position, as in DeBERTa."""
    return (scores_of(q, k) + scores_of(q, other)).softmax(dim=-1) @ v


@lookalike(Reason.LEARNED_BIAS, inputs=with_extra(lambda: torch.randn(1, H, L, S).requires_grad_()))
def learned_bias(q, k, v, bias):
    return (scores_of(q, k) + bias).softmax(dim=-1) @ v


@lookalike(Reason.LEARNED_BIAS, inputs=with_extra(lambda: torch.randn(32, H).requires_grad_()))
def bias_of_relative_positions(q, k, v, table):
    """T5: a row of a learned table for each distance."""
    distance = (torch.arange(S)[None, :] - torch.arange(L)[:, None]).abs().clamp(max=31)
    bias = F.embedding(distance, table).permute(2, 0, 1).unsqueeze(0)
    scores = scores_of(q, k)
    scores += bias
    return scores.softmax(dim=-1) @ v


@lookalike(Reason.ADDITIVE_MASK)
def alibi(q, k, v):
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(H, 1, 1)
    distance = torch.arange(S)[None, :] - torch.arange(L)[:, None]
    return (scores_of(q, k) - slopes * distance.abs()).softmax(dim=-1) @ v


@lookalike(Reason.ADDITIVE_MASK, inputs=with_extra(lambda: torch.randn(B, 1, L, S)))
def additive_mask_from_outside(q, k, v, bias):
    """Nothing in the graph says that it only hides keys."""
    return (scores_of(q, k) + bias).softmax(dim=-1) @ v


@lookalike(*FINITE)
def finite_number_at_masked_places(q, k, v):
    return scores_of(q, k).masked_fill(torch.arange(S) >= 77, -1.0).softmax(dim=-1) @ v


@lookalike(*FINITE, Reason.LEARNED_BIAS)
def another_tensor_at_masked_places(q, k, v):
    """Of where's two branches neither is a number."""
    return torch.where(torch.arange(S) < 77, scores_of(q, k), scores_of(q, v)).softmax(dim=-1) @ v


@lookalike(Reason.DROPOUT)
def active_dropout(q, k, v):
    return F.dropout(scores_of(q, k).softmax(dim=-1), 0.1, training=True) @ v


@lookalike(Reason.DROPOUT, Reason.SCORES_CHANGED)
def dropout_of_scores(q, k, v):
    return F.dropout(scores_of(q, k), 0.1, training=True).softmax(dim=-1) @ v


# ---- tensors that change on the way


@lookalike(Reason.IN_PLACE)
def key_written_after_the_scores(q, k, v):
    scores = scores_of(q, k)
    k.mul_(0.5)
    return scores.softmax(dim=-1) @ v


@lookalike(Reason.IN_PLACE)
def query_written_after_the_softmax(q, k, v):
    weights = scores_of(q, k).softmax(dim=-1)
    q.zero_()
    return weights @ v + q


@lookalike(Reason.IN_PLACE)
def view_of_the_key_written(q, k, v):
    """The write goes through another name of the same memory."""
    part = k[:, :, : S // 2]
    scores = scores_of(q, k)
    part.zero_()
    return scores.softmax(dim=-1) @ v


@lookalike(*WEIGHTS_CHANGED, Reason.IN_PLACE)
def weights_written(q, k, v):
    weights = scores_of(q, k).softmax(dim=-1)
    weights[..., 0] = 0.0
    return weights @ v


@lookalike(*WEIGHTS_CHANGED, Reason.IN_PLACE)
def weights_scaled_in_place(q, k, v):
    weights = scores_of(q, k).softmax(dim=-1)
    weights.mul_(torch.arange(S) < 77)
    return weights @ v


@lookalike(Reason.IN_PLACE, Reason.SCORES_CHANGED, Reason.NOT_ATTENTION)
def scores_written_through_a_view(q, k, v):
    scores = scores_of(q, k)
    scores[..., 0] = math.pi
    return scores.softmax(dim=-1) @ v


# ---- what inputs ask a table, which no input reaches

_table = nn.Parameter(torch.randn(60, D))
_tables = nn.Parameter(torch.randn(H, 60, D))
_head = nn.Linear(D, 60).requires_grad_(False)


@lookalike(Reason.NOT_ATTENTION)
def codebook(q, k, v):
    """Soft vector quantisation: rows of one table, as keys and as values."""
    return (q @ _table.T * SCALE).softmax(-1) @ _table


@lookalike(Reason.NOT_ATTENTION)
def vocabulary(q, k, v):
    """The mean of the embeddings of all words, by how likely they are; the embedding is cast as the queries are."""
    return _head(q).softmax(-1) @ _table.type_as(q)


@lookalike(Reason.NOT_ATTENTION)
def tables_of_each_head(q, k, v):
    """External attention: its memory is learned."""
    return (q @ _tables.mT * SCALE).softmax(-1) @ _tables.expand(B, -1, -1, -1)


@lookalike(Reason.NOT_ATTENTION)
def codebook_with_a_mask(q, k, v):
    scores = (q @ _table.T).masked_fill(torch.arange(60) >= 50, -torch.inf)
    return scores.softmax(-1) @ _table


@lookalike(Reason.NOT_ATTENTION, inputs=lambda: (torch.randn(B, L, D),))
def experts_of_one_vector(x):
    return torch.einsum("ble,ed->bld", _head(x).softmax(dim=-1), _table * 2)


@lookalike(Reason.NOT_ATTENTION)
def codebook_between_sizes_of_inputs(q, k, v):
    """Only the shape of the keys is read, and that reaches nothing."""
    table = _tables + torch.zeros_like(k[0, :, :60])
    return (q @ table.mT).softmax(-1) @ table


# ---- masks that nearly hide


@lookalike(Reason.ADDITIVE_MASK, inputs=with_extra(lambda: (torch.rand(B, 1, 1, S) < 0.7).long()))
def text_mask_of_an_integer_input(q, k, v, mask):
    """Nothing says that it holds 0 and 1 alone."""
    return (scores_of(q, k) + (1 - mask) * -10000.0).softmax(-1) @ v


@lookalike(Reason.ADDITIVE_MASK, inputs=with_extra(lambda: torch.rand(B, 1, 1, S) < 0.7))
def text_mask_that_lowers(q, k, v, mask):
    return (scores_of(q, k) + (1 - mask.float()) * -10.0).softmax(-1) @ v


@lookalike(*FINITE)
def later_keys_lowered_from_the_bottom_right(q, k, v):
    later = torch.arange(S) > torch.arange(L)[:, None] + (S - L)
    return scores_of(q, k).masked_fill(later, -1.0).softmax(-1) @ v


@lookalike(*FINITE)
def later_keys_lowered_from_the_top_left(q, k, v):
    return (scores_of(q, k) - torch.ones(L, S).triu(1)).softmax(-1) @ v


# ---- readers that nobody reads, and act


@lookalike(Reason.WEIGHTS_USED)
def weights_asserted(q, k, v):
    weights = scores_of(q, k).softmax(-1)
    torch._assert_async((weights >= 0).all(), "a weight is negative")
    return weights @ v


@lookalike(Reason.SCORES_USED)
def scores_returned_and_weights_averaged_for_nobody(q, k, v):
    scores = scores_of(q, k)
    weights = scores.softmax(-1)
    weights.mean(1)
    return weights @ v, scores.amax(-1)
