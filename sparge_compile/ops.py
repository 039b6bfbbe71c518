"""The ops: schemas, fake kernels, autograd, and dispatch to the CPU or the GPU.

``sparge::attention`` is what the passes put into a graph. It falls apart into ``block_map`` (which blocks), ``forward``
(attention over them) and, for training, ``pack`` (the map as bits) and ``backward``; these four are opaque to tracing.
No op synchronises with the host, and no allocation depends on data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import sharding
from .errors import explain_error
from .kernels import allocate, capability, cpu
from .kernels.block_map import BlockMap
from .kernels.rule import default_scale

_QKV = "Tensor query, Tensor key, Tensor value"
_HOW = "Tensor? attn_mask, bool is_causal, float scale"

library = torch.library.Library("sparge", "DEF")
library.define(
    f"attention({_QKV}, Tensor thresholds, Tensor? attn_mask=None, bool is_causal=False, float? scale=None) -> Tensor"
)
library.define("mark(Tensor thresholds, int index) -> ()")
library.define(f"block_map(Tensor query, Tensor key, Tensor thresholds, {_HOW}) -> (Tensor counts, Tensor indices)")
library.define(f"forward({_QKV}, Tensor counts, Tensor indices, {_HOW}) -> (Tensor out, Tensor lse)")
library.define("pack(Tensor counts, Tensor indices) -> Tensor")
library.define(
    f"backward(Tensor grad_out, {_QKV}, Tensor out, Tensor lse, Tensor? grad_lse, Tensor bits, {_HOW}) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_map: BlockMap | None,
    thresholds: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, BlockMap]:
    """Check everything, build the map unless one is given, attend: (out [B, H, L, D], lse [B, H, L], the map)."""
    if sharding.is_sharded(query):
        maps = sharding.on_the_mesh_of(query, *(block_map or (None, None)))
        block_map = None if block_map is None else BlockMap(*maps)
        thresholds, attn_mask = sharding.on_the_mesh_of(query, thresholds, attn_mask)
    capability.check_qkv(query, key, value)
    resolved = default_scale(query.shape[-1], scale)
    if attn_mask is not None:
        capability.check_mask(attn_mask, query, key)
        attn_mask = capability.normal_mask(attn_mask, key.shape[2])
    if block_map is None:
        assert thresholds is not None
        capability.check_thresholds(thresholds, query)
        # Selection is discrete: it has no gradient, and its op none to give.
        block_map = BlockMap(
            *torch.ops.sparge.block_map(
                query.detach(), key.detach(), thresholds.detach(), attn_mask, is_causal, resolved
            )
        )
    else:
        capability.check_block_map(block_map, query, key)
    out, lse = torch.ops.sparge.forward(query, key, value, *block_map, attn_mask, is_causal, resolved)
    return out, lse, block_map


def _attention(query, key, value, thresholds, attn_mask=None, is_causal=False, scale=None):
    thresholds = thresholds.float()  # as buffers of a module they were cast with it
    return attend(query, key, value, None, thresholds, attn_mask, is_causal, scale)[0]


library.impl("attention", _attention, "CompositeImplicitAutograd")


def _autocast(device: str):
    """Cast as autocast does for dense attention: query, key, value and a float mask, not the thresholds."""

    def attention(query, key, value, thresholds, attn_mask=None, is_causal=False, scale=None):
        dtype = torch.get_autocast_dtype(device)

        def cast(x):
            eligible = x is not None and x.device.type == device and x.is_floating_point() and x.dtype != torch.float64
            return x.to(dtype) if eligible else x

        with torch.amp.autocast(device, enabled=False):
            return torch.ops.sparge.attention(
                cast(query), cast(key), cast(value), thresholds, cast(attn_mask), is_causal, scale
            )

    return attention


# What ``attach`` calls where a module is entered: the backend reads it off Dynamo's graph; to all others it is nothing.
library.impl("mark", lambda thresholds, index: None, "CompositeImplicitAutograd")
REST = -1  # the index of a marker for every attention of its module that has none of its own

library.impl("attention", _autocast("cpu"), "AutocastCPU")
library.impl("attention", _autocast("cuda"), "AutocastCUDA")


# Real kernels: each device has a face of the same four functions.


def _on_gpu(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        from .kernels import triton  # when a kernel runs, so that importing the package needs no Triton

        return getattr(triton, name)(*args)

    return run


for _name in ("block_map", "forward", "pack", "backward"):
    library.impl(_name, getattr(cpu, _name), "CPU")
    library.impl(_name, _on_gpu(_name), "CUDA")


# Fake kernels, from the same allocation code as the real ones.


@torch.library.register_fake("sparge::block_map", lib=library)
def _(query, key, thresholds, attn_mask, is_causal, scale):
    return allocate.new_block_map(query, key)


@torch.library.register_fake("sparge::forward", lib=library)
def _(query, key, value, counts, indices, attn_mask, is_causal, scale):
    return allocate.dense_like(query), allocate.new_lse(query)


@torch.library.register_fake("sparge::pack", lib=library)
def _(counts, indices):
    return allocate.new_bits(counts, indices.shape[-1])


@torch.library.register_fake("sparge::backward", lib=library)
def _(grad_out, query, key, value, out, lse, grad_lse, bits, attn_mask, is_causal, scale):
    return allocate.dense_like(query), allocate.dense_like(key), allocate.dense_like(value)


# Autograd.


def _save(ctx, inputs, output):
    query, key, value, counts, indices, attn_mask, is_causal, scale = inputs
    out, lse = output
    bits = torch.ops.sparge.pack(counts, indices)  # one bit for each (query block, key block), instead of the lists
    ctx.save_for_backward(query, key, value, out, lse, bits, attn_mask)
    ctx.is_causal, ctx.scale = is_causal, scale
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, grad_lse):
    query, key, value, out, lse, bits, attn_mask = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 8
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = torch.ops.sparge.backward(
        grad_out, query, key, value, out, lse, grad_lse, bits, attn_mask, ctx.is_causal, ctx.scale
    )
    return *grads, None, None, None, None, None


torch.library.register_autograd("sparge::forward", _differentiate, setup_context=_save, lib=library)


def _refuse_second_derivative(ctx, *grads):
    raise NotImplementedError(
        explain_error(
            "sparge attention was differentiated twice",
            given="a backward through its backward",
            allowed="first derivatives",
            todo="Use dense attention where second derivatives are needed (backend option min_seq_len).",
        )
    )


torch.library.register_autograd("sparge::backward", _refuse_second_derivative, lib=library)
