"""Who compiles the rewritten graph, and what of ours enters Inductor's cache key."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import GraphModule
from torch.torch_version import TorchVersion

from .errors import value_error
from .options import Options
from .parallel import engines
from .version import __version__


def overlap() -> dict[str, Any]:
    """Inductor's options for a graph that exchanges heads, where this torch has the passes that they name.

    Each exchange starts as soon as its tensors are there, what the next one sends is computed first, and each is waited
    for right before what came is read: it is under way while something is computed.
    """
    from torch._inductor import comms, config

    passes = [name for name in ("raise_comms", "sink_waits") if hasattr(comms, name)]
    options = {"reorder_for_compute_comm_overlap": True, "reorder_for_compute_comm_overlap_passes": passes}
    return options if all(hasattr(config, name) for name in options) else {}


def sound() -> dict[str, Any]:
    """Inductor's options without a fusion that computes wrong gradients, on a torch before 2.15.

    From 2.10 on reductions over rows and over columns share a kernel (``mix_order_reduction``). Where gradients are
    slices of one parameter's, as those of Wan's ``scale_shift_table`` are, some are never written: what memory held
    before takes their place (https://github.com/pytorch/pytorch/issues/193061). Who wants it asks: ``inductor={…}``.
    """
    from torch._inductor import config

    has_fault = TorchVersion(torch.__version__) < "2.15" and hasattr(config.triton, "mix_order_reduction")
    return {"triton.mix_order_reduction": False} if has_fault else {}


def exchanges(graph_module: GraphModule) -> bool:
    """Whether heads are exchanged among processes in a graph."""
    return _calls(graph_module, "sparge.to_heads")


def has_op_of_ours(graph_module: GraphModule) -> bool:
    """Whether attention is sparse in a graph, or exchanges its heads."""
    return _calls(graph_module, "sparge.")


def _calls(graph_module: GraphModule, name: str) -> bool:
    graphs = (module.graph for module in graph_module.modules() if isinstance(module, GraphModule))
    return any(name in str(node.target) for graph in graphs for node in graph.nodes)


def compile_graph(graph_module: GraphModule, inputs: Sequence[Any], settings: Options) -> Callable[..., Any]:
    """Compile a graph with whoever the options name as ``inner``."""
    compiled = _compile(graph_module, inputs, settings)
    # aot_compile takes what can be serialised; torch.compile's own cache leaves out what cannot.
    if (
        is_stored(graph_module)
        and not getattr(torch._dynamo.config, "caching_precompile", False)
        and getattr(compiled, "serialize", None) is None
    ):
        raise value_error(
            "sparge: aot_compile cannot store what was compiled here",
            given=f"inner={settings.inner!r}, whose result has nothing to be serialised",
            allowed="inner='inductor' or inner='aot_eager'",
            todo="Take one of them, or call the compiled model without aot_compile.",
        )
    return compiled


def is_stored(graph_module: GraphModule) -> bool:
    """Whether torch stores what is compiled of this graph (``aot_compile``, ``caching_precompile``)."""
    return getattr(graph_module, "_backend_id", None) is not None


def _compile(graph_module: GraphModule, inputs: Sequence[Any], settings: Options) -> Callable[..., Any]:
    if settings.inner != "inductor":
        backend: Any = torch._dynamo.lookup_backend(settings.inner)
        compiled: Any = backend(graph_module, inputs)
        return compiled
    # Not torch.compile again: nested, it would silently run eager.
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    from .lowering import call_directly
    from .sums import in_pieces

    call_directly()
    patches = {
        **sound(),
        **list_mode_options(settings.inductor_mode or "default"),
        **(overlap() if exchanges(graph_module) else {}),
        **settings.inductor,
    }
    # Inductor's caches know our ops by name alone; what they do enters the key here, and the options with it. Not the
    # thresholds: they are run-time inputs, and another pair may use what was compiled for this one. How Inductor adds
    # up is no part of a graph, so whether it is ours stands there too.
    adds_up, lanes = has_op_of_ours(graph_module), sorted(engines.lanes) if exchanges(graph_module) else []
    fixed = replace(settings, calibration=None, topk=1.0, topp=0.0)
    patches["unsafe_marked_cacheable_functions"] = {
        **patches.get("unsafe_marked_cacheable_functions", config.unsafe_marked_cacheable_functions),
        "sparge_compile": f"{source_digest()}-{fixed.digest()}-{lanes}" + "-sums" * adds_up,
    }
    compile_inner = in_pieces(compile_fx_inner) if adds_up else compile_fx_inner
    compiled = compile_fx(graph_module, inputs, inner_compile=compile_inner, config_patches=patches)
    return compiled


@functools.cache
def source_digest() -> str:
    """Return a SHA-256 of the package's version and of every source file of it."""
    digest = hashlib.sha256(__version__.encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def faker(example_inputs: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """Return a function that makes a real tensor an example input like the others: fake where they are fake.

    Its sizes are fixed: where all are dynamic, a number of heads that equals the batch would be one symbol with it.
    """
    mode = detect_fake_mode(example_inputs)
    return (lambda tensor: tensor) if mode is None else partial(mode.from_tensor, static_shapes=True)
