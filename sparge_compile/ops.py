"""The ops: schemas, fake kernels, autograd, and dispatch to the CPU or the GPU.

``sparge::attention`` is what the passes put into a graph. It checks its arguments and becomes one op that is opaque to
tracing: ``attend``, or ``attend_for_backward`` where a gradient will be wanted, whose backward is ``backward``.
``block_map``, ``forward`` and ``pack`` are their parts, for those who look at a map or bring their own.
No op synchronises with the host, and no allocation depends on data. No fake kernel asks a symbolic size anything, so a
graph with our ops is guarded as it would be without them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import sharding
from .errors import explain_error
from .kernels import allocate, attend, capability, cpu, direct
from .kernels.block_map import BlockMap
from .kernels.how import TENSORS, How
from .kernels.order import Grid, Orders, copy_of_order
from .kernels.reorder import into_order, out_of_order, rows
from .kernels.rule import default_scale
from .limit import NO_LIMIT, Limit

_QKV = "Tensor query, Tensor key, Tensor value"
_HOW = "Tensor? attn_mask, bool is_causal, float scale"
_LIMIT = "int least_keys=0, float[] gain=[]"  # the two fields of a Limit
_PACKED = (  # the fields of a How after the first three, but for those of an order
    "bool bottom_right=False, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "SymInt max_seqlen_q=0, SymInt max_seqlen_k=0, SymInt[]? parts=None"
)
# All fields of a How after the first three.
_REST = f"{_PACKED}, Tensor? slots_q=None, Tensor? slots_k=None, bool eight_bits=False"
_FLAGS = "bool reordered=False, bool eight_bits=False"
_ORDERS = ", ".join([*(f"Tensor? {name}=None" for name in Orders._fields), _FLAGS])
_PACKED_FIELDS, _ORDER_FIELDS = _PACKED.count(",") + 1, len(Orders._fields)

library = torch.library.Library("sparge", "DEF")
for _name in ("attention", "attention.as_given"):
    library.define(
        f"{_name}({_QKV}, Tensor thresholds, Tensor? attn_mask=None, bool is_causal=False, float? scale=None, "
        f"{_LIMIT}, {_PACKED}, {_ORDERS}) -> Tensor"
    )
library.define(
    "order(SymInt prefix, SymInt frames, SymInt height, SymInt width, SymInt suffix, int[] tile, Device device) "
    "-> (Tensor slots, Tensor places)"
)
library.define("rows(Tensor x, Tensor index, Tensor inverse, int dim=2) -> Tensor")
library.define("mark(Tensor thresholds, int index, int[] tile=[]) -> ()")
library.define("grid(SymInt prefix, SymInt frames, SymInt height, SymInt width, SymInt suffix, str sites) -> ()")
library.define("constant(float[] numbers, Device device, int width=2) -> Tensor")
library.define(f"attend({_QKV}, Tensor thresholds, {_HOW}, {_LIMIT}, {_REST}) -> Tensor")
library.define(
    f"attend_for_backward({_QKV}, Tensor thresholds, {_HOW}, {_LIMIT}, {_REST}) "
    "-> (Tensor out, Tensor lse, Tensor bits)"
)
library.define(
    f"block_map(Tensor query, Tensor key, Tensor thresholds, {_HOW}, {_REST}) -> (Tensor counts, Tensor indices)"
)
library.define(f"forward({_QKV}, Tensor counts, Tensor indices, {_HOW}, {_REST}) -> (Tensor out, Tensor lse)")
library.define("pack(Tensor counts, Tensor indices) -> Tensor")
library.define(
    f"backward(Tensor grad_out, {_QKV}, Tensor out, Tensor lse, Tensor? grad_lse, Tensor bits, {_HOW}, "
    f"{_REST}, {_LIMIT}) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)


def attend_by_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    thresholds: Tensor,
    how: How,
    limit: Limit = NO_LIMIT,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Check everything and attend by the rule, as one op: (out [B, H, L, Dv], lse [B, H, L] where it is asked for)."""
    thresholds, how = _checked_by_rule(query, key, value, thresholds, how)
    if thresholds.requires_grad:
        thresholds = thresholds.detach()  # selection is discrete
    arguments = (query, key, value, thresholds, *how[:3], *limit, *how[3:])
    plain, trains = _are_plain(query, key, value), _any_requires_grad(query, key, value)
    if not with_lse and not trains:
        attend_op = torch.ops.sparge.attend
        return (attend_op.direct if plain else attend_op.default)(*arguments), None
    attend_op = torch.ops.sparge.attend_for_backward
    if plain and trains:  # what the dispatcher would come to
        return _Attention.apply(attend_op.direct, None, *arguments[:3], arguments[3:])[:2]
    return attend_op.default(*arguments)[:2]


def _are_plain(*tensors: Tensor) -> bool:
    """Whether tensors are what they look like: nobody traces or transforms the call, and no view of theirs is lazy."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not in_forward_mode()
        and all(type(x) is Tensor and not x.is_neg() and not _is_batched(x) for x in tensors)
    )


_is_batched = torch._C._functorch.is_legacy_batchedtensor  # where gradients are batched, of which no stack tells


def build_map(query: Tensor, key: Tensor, value: Tensor, thresholds: Tensor, how: How) -> BlockMap:
    """Check everything and build the block map by the rule."""
    thresholds, how = _checked_by_rule(query, key, value, thresholds, how)
    return BlockMap(*torch.ops.sparge.block_map.default(query.detach(), key.detach(), thresholds.detach(), *how))


def attend_listed(query: Tensor, key: Tensor, value: Tensor, block_map: BlockMap, how: How) -> tuple[Tensor, Tensor]:
    """Check everything and attend to the blocks of a map: (out [B, H, L, Dv], lse [B, H, L])."""
    if sharding.is_sharded(query):
        block_map = BlockMap(*sharding.on_the_mesh_of(query, *block_map))
    how = _checked(query, key, value, how)
    capability.check_block_map(block_map, query, key, how)
    return torch.ops.sparge.forward.default(query, key, value, *block_map, *how)


def in_order(
    query: Tensor, key: Tensor, value: Tensor, how: How, orders: Orders, reordered: bool = False
) -> tuple[Tensor, Tensor, Tensor, How]:
    """Check everything and bring the operands of a call into the order of blocks, unless they are in it already."""
    how = _checked(query, key, value, how)
    capability.check_orders(how, query, key, orders)
    return into_order(query, key, value, how, orders, reordered)


def _checked_by_rule(query: Tensor, key: Tensor, value: Tensor, thresholds: Tensor, how: How) -> tuple[Tensor, How]:
    """The thresholds and what follows the operands as the ops take them, once all operands are checked."""
    if sharding.is_sharded(query):
        (thresholds,) = sharding.on_the_mesh_of(query, thresholds)
    how = _checked(query, key, value, how)
    capability.check_thresholds(thresholds, query)
    return thresholds, how


def _checked(query: Tensor, key: Tensor, value: Tensor, how: How) -> How:
    """What follows the operands as the ops take it, on the mesh of the query, once all operands are checked."""
    if sharding.is_sharded(query):
        how = How(*sharding.on_the_mesh_of(query, *how))
    capability.check_qkv(query, key, value)
    capability.check_packing(how, query, key)
    capability.check_slots(how, query, key)
    capability.check_eight_bits(how, query, value)
    mask = how.attn_mask
    if mask is not None:
        capability.check_mask(mask, query, key)
        mask = capability.normal_mask(mask, key.shape[2])
    return how._replace(attn_mask=mask)


def attention(query, key, value, thresholds, attn_mask=None, is_causal=False, scale=None, least_keys=0, gain=(), *rest):
    """What the op ``attention`` is made of."""
    thresholds = thresholds.float()  # as buffers of a module they were cast with it
    packed, orders = rest[:_PACKED_FIELDS], Orders(*rest[_PACKED_FIELDS:][:_ORDER_FIELDS])
    reordered, eight_bits = (*rest[_PACKED_FIELDS + _ORDER_FIELDS :], False, False)[:2]
    how = How(attn_mask, is_causal, default_scale(query.shape[-1], scale), *packed)._replace(eight_bits=eight_bits)
    if orders.given:
        query, key, value, how = in_order(query, key, value, how, orders, reordered)
    out, _ = attend_by_rule(query, key, value, thresholds, how, Limit(least_keys, tuple(gain)))
    return out if reordered else out_of_order(out, orders)


library.impl("attention", attention, "CompositeImplicitAutograd")
# Autocast leaves its operands alone, as it does those of other libraries' ops.
library.impl("attention.as_given", attention, "CompositeImplicitAutograd")


def _autocast(device: str):
    """Cast as autocast does for dense attention: query, key, value and a float mask, not the thresholds."""

    def attention(query, key, value, thresholds, attn_mask=None, *others):
        dtype = torch.get_autocast_dtype(device)

        def cast(x):
            eligible = x is not None and x.device.type == device and x.is_floating_point() and x.dtype != torch.float64
            return x.to(dtype) if eligible else x

        with torch.amp.autocast(device, enabled=False):
            return torch.ops.sparge.attention(cast(query), cast(key), cast(value), thresholds, cast(attn_mask), *others)

    return attention


# What ``attach`` calls where a module is entered: the backend reads it off Dynamo's graph; to all others it is nothing.
library.impl("mark", lambda thresholds, index, tile=(): None, "CompositeImplicitAutograd")
# The same for the grid that ``attach(..., grid=)`` states, for the sites of this name or pattern; "": of this module.
library.impl("grid", lambda *sizes_and_sites: None, "CompositeImplicitAutograd")
REST = -1  # the index of a marker for every attention of its module that has none of its own


@cache
def _held(numbers: tuple[float, ...], device: torch.device, width: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.float32, device=device).view(-1, width)


def _constant(numbers, device, width=2):
    return _held(tuple(numbers), device, width).clone()


def _order(prefix, frames, height, width, suffix, tile, device):
    return tuple(copy_of_order(Grid(prefix, frames, height, width, suffix), tile, device))


# The token order of a grid: the same numbers for the same sizes, made on the device.
library.impl("order", _order, "CompositeExplicitAutograd")
library.impl("rows", rows, "CompositeImplicitAutograd")

# The thresholds of a graph that torch stores: it must be whole. A copy on the device, so that no call waits for it.
library.impl("constant", _constant, "CompositeExplicitAutograd")

library.impl("attention", _autocast("cpu"), "AutocastCPU")
library.impl("attention", _autocast("cuda"), "AutocastCUDA")


# Real kernels: each device has a face of the same four functions.


class _TritonFace:
    """The face of the GPU, imported when a kernel runs, so that importing the package needs no Triton."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        from .kernels import triton

        return getattr(triton, name)


def _run(face: Any, name: str, *args: Any) -> Any:
    return getattr(face, name)(*args)


# The ops that Inductor's code calls as ``direct`` or ``at`` a line, which are beside their ``default`` (lowering.py).
DIRECT = [getattr(torch.ops.sparge, name).default for name in ("attend", "attend_for_backward", "backward")]

for _key, _face in (("CPU", cpu), ("CUDA", _TritonFace())):
    _kernels: dict[str, Callable[..., Any]] = {
        _name: partial(_run, _face, _name) for _name in ("block_map", "forward", "pack")
    }
    _kernels |= {
        "backward": partial(attend.backward, _face),
        "attend": partial(attend.attend, _face),
        "attend_for_backward": partial(attend.attend_for_backward, _face),
    }
    if _key == "CUDA":
        _kernels = {_name: direct.replayed(_kernel) for _name, _kernel in _kernels.items()}
    for _name, _kernel in _kernels.items():
        library.impl(_name, _kernel, _key)
for _op in DIRECT:
    _packet, _gpu = getattr(torch.ops.sparge, _op._opname), cast(direct.Lazily, _kernels[_op._opname])
    _packet.direct, _packet.at = direct.directly(_op, _gpu), direct.at_a_line(_op, _gpu)


# Fake kernels, from the same allocation code as the real ones.


@torch.library.register_fake("sparge::attend", lib=library)
def _(query, key, value, thresholds, *others):
    return allocate.new_out(query, value)


@torch.library.register_fake("sparge::attend_for_backward", lib=library)
def _(query, key, value, thresholds, attn_mask, is_causal, scale, least_keys=0, gain=(), *packed):
    bits = allocate.new_bits(query, key, How(attn_mask, is_causal, scale, *packed))
    return allocate.new_out(query, value), allocate.new_lse(query), bits


@torch.library.register_fake("sparge::constant", lib=library)
def _(numbers, device, width=2):
    return torch.empty(len(numbers) // width, width, dtype=torch.float32, device=device)


@torch.library.register_fake("sparge::order", lib=library)
def _(prefix, frames, height, width, suffix, tile, device):
    grid = Grid(prefix, frames, height, width, suffix)
    return tuple(torch.empty(grid.tokens, dtype=torch.int32, device=device) for _ in range(2))


@torch.library.register_fake("sparge::block_map", lib=library)
def _(query, key, thresholds, *how):
    return allocate.new_block_map(query, key, How(*how))


@torch.library.register_fake("sparge::forward", lib=library)
def _(query, key, value, counts, indices, *how):
    return allocate.new_out(query, value), allocate.new_lse(query)


@torch.library.register_fake("sparge::pack", lib=library)
def _(counts, indices):
    return allocate.new_words(counts, indices.shape[-1])


@torch.library.register_fake("sparge::backward", lib=library)
def _(grad_out, query, key, value, out, lse, grad_lse, bits, *how):
    return allocate.dense_like(query), allocate.dense_like(key), allocate.dense_like(value)


# Autograd.


class _Attention(torch.autograd.Function):
    """An op that attends, with what its backward needs. ``register_autograd`` does the same, in ten times the time.

    ``run`` is the op below autograd; ``block_map`` is there for ``forward``, None for ``attend_for_backward``.
    """

    @staticmethod
    def forward(ctx, run, block_map, query, key, value, others):
        given = run(query, key, value, *others)
        # The dispatcher leaves out what equals its default, from the end on.
        if block_map is not None:
            (out, lse), how = given, How(*others[2:])
            # One bit for each (query block, key block), instead of the lists.
            bits, ctx.limit = torch.ops.sparge.pack.default(*block_map), ()
        else:
            (out, lse, bits), how = given, How(*others[1:4], *others[6:])  # without thresholds and limit
            ctx.limit = others[4:6]
            ctx.mark_non_differentiable(bits)
        ctx.names = [name for name in TENSORS if getattr(how, name) is not None]
        ctx.save_for_backward(query, key, value, out, lse, bits, *(getattr(how, name) for name in ctx.names))
        without: dict[str, Any] = dict.fromkeys(ctx.names)
        ctx.how = how._replace(**without)
        ctx.set_materialize_grads(False)
        return given

    @staticmethod
    def backward(ctx, grad_out, grad_lse, *_):
        query, key, value, out, lse, bits, *tensors = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 6
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        how = ctx.how._replace(**dict(zip(ctx.names, tensors, strict=True)))
        backward = torch.ops.sparge.backward
        run = backward.direct if _are_plain(grad_out, query, key, value) else backward.default
        return None, None, *run(grad_out, query, key, value, out, lse, grad_lse, bits, *how, *ctx.limit), None


class _Gradients(torch.autograd.Function):
    """The op ``backward``, which has no derivative."""

    @staticmethod
    def forward(ctx, *arguments):
        return _below_autograd(torch.ops.sparge.backward.default, *arguments)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            explain_error(
                "sparge attention was differentiated twice",
                given="a backward through its backward",
                allowed="first derivatives",
                todo="Use dense attention where second derivatives are needed (backend option min_seq_len).",
            )
        )


def _below_autograd(op: Any, *arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _any_requires_grad(*arguments: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are being taken, by torch.func.jvp or torch.autograd.forward_ad."""
    return forward_ad._current_level >= 0


def _refuse_tangents(*tensors: Any) -> None:
    """Raise where forward-mode derivatives are asked for, which kernels would leave out without a word."""
    if in_forward_mode() and any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise NotImplementedError(
            explain_error(
                "sparge attention has no forward-mode derivative",
                given="an operand with a tangent, from torch.func.jvp, jacfwd or torch.autograd.forward_ad",
                allowed="derivatives by a backward",
                todo="Use a backward, or dense attention where forward-mode derivatives are needed.",
            )
        )


def _attend_under_autograd(query, key, value, *others):
    """``attend`` where it may be differentiated: lowered where no gradient was in sight, and trained after all."""
    _refuse_tangents(query, key, value)
    if _any_requires_grad(query, key, value):
        return torch.ops.sparge.attend_for_backward.default(query, key, value, *others)[0]
    return _below_autograd(torch.ops.sparge.attend.default, query, key, value, *others)


def _attention_under_autograd(op: Any, query, key, value, *others):
    _refuse_tangents(query, key, value)
    run = partial(_below_autograd, op)
    if not _any_requires_grad(query, key, value):
        return run(query, key, value, *others)
    block_map = others[:2] if op is torch.ops.sparge.forward.default else None
    return _Attention.apply(run, block_map, query, key, value, others)


def _backward_under_autograd(*arguments: Any) -> Any:
    _refuse_tangents(*arguments)
    if _any_requires_grad(*arguments):
        return _Gradients.apply(*arguments)
    return _below_autograd(torch.ops.sparge.backward.default, *arguments)


library.impl("attend", _attend_under_autograd, "Autograd")
library.impl("backward", _backward_under_autograd, "Autograd")
for _op in (torch.ops.sparge.forward.default, torch.ops.sparge.attend_for_backward.default):
    library.impl(_op, partial(_attention_under_autograd, _op), "Autograd")
