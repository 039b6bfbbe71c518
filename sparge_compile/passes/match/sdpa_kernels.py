"""SDPA after lowering: the ATen kernels that ``make_fx`` without ``pre_dispatch`` leaves in a graph.

They return the attention output first, and after it what a backward needs. ``attention_arguments`` says what a call
means in SDPA's terms.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from ..read.fx_utils import value_of

_aten = torch.ops.aten
SDPA_KERNELS = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
    _aten._scaled_dot_product_attention_math.default,
}


def attention_arguments(node: Node) -> Mapping[str, Any] | None:
    """The arguments of SDPA by name, of a call of such a kernel; None for any other node."""
    if node.op != "call_function" or node.target not in SDPA_KERNELS:
        return None
    given: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        by_name = node.kwargs.get(argument.name, argument.default_value)
        given[argument.name] = node.args[position] if position < len(node.args) else by_name
    return {
        **{name: given[name] for name in ("query", "key", "value", "dropout_p", "is_causal", "scale")},
        "attn_mask": given.get("attn_mask", given.get("attn_bias")),
        "enable_gqa": given.get("enable_gqa", True),  # a kernel that has no such argument shares heads as it can
    }


def gives_several(node: Node) -> bool:
    """Whether a call gives several results, of which the first is the attention's."""
    return isinstance(value_of(node), (tuple, list))


def only_attention_is_read(node: Node) -> bool:
    """Whether nobody reads anything of a call's results but the first."""
    reads = [user for user in node.users if not _unused(user)]
    return all(user.target is operator.getitem and user.args[1] == 0 for user in reads)


def replace_kernel(node: Node, new: Node) -> None:
    """Put ``new``, the attention output alone, in the place of a call and of the reads of its results."""
    for name in ("val", "example_value"):
        if isinstance(new.meta.get(name), (tuple, list)):
            new.meta[name] = new.meta[name][0]
    new.meta.pop("tensor_meta", None)
    for user in list(node.users):
        user.replace_all_uses_with(new)  # of outputs other than the first, there are no uses
        node.graph.erase_node(user)


def _unused(node: Node) -> bool:
    return node.target is operator.getitem and not node.users
