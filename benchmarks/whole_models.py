"""Whole models of diffusers in one run: Inductor against the backend, by default and at 75 % sparsity.

    python benchmarks/whole_models.py                                   # a GPU: eight layers of each, under six minutes
    python benchmarks/whole_models.py --layers 0 --models flux,wan      # all layers of two of them
    python benchmarks/whole_models.py --check                           # compares a model that keeps all blocks, too
    python benchmarks/whole_models.py --device cpu --tiny --inner eager # that everything runs

The real configurations with random weights, which time does not hang on; fewer layers than the real ones unless all are
asked for. Compiled block by block, as diffusers' ``compile_repeated_blocks`` does, for each shape of its own
(``dynamic=False``): embeddings and the last layers run eagerly in all columns. One forward is timed, without gradients,
the host included; dense and sparse models, of the same tensors, in turns. Pooled scores of random weights are flat, so
by default 80 % of the blocks are kept.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import harness
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparge_compile.options import Options
from sparge_compile.running.listeners import heard_by

LAYERS = 8
SPARSITIES: dict[str, dict[str, Any]] = {"default": {}, "75 %": {"topk": 0.25, "topp": 0.0}}
# All blocks, though it would not pay. 1 would leave the site dense.
WHOLE = {"topk": 0.99999, "topp": 0.0, "min_seq_len": 1024}
LARGEST_ERROR = 0.05  # relative, of the model with all blocks kept against the dense one, in bfloat16


class Model(NamedTuple):
    """How to build one: ``config`` of so many layers (0: all), and ``inputs`` on the default device and dtype."""

    name: str
    kind: str  # the class of diffusers
    blocks: tuple[str, ...]  # the classes that are compiled
    config: Callable[[int, bool], dict[str, Any]]
    inputs: Callable[[bool], dict[str, Any]]
    tokens: int


def _some(layers: int, most: int) -> int:
    return min(layers, most) if layers else most


# ---- FLUX.1 dev at 1024², text of 512


def flux_config(layers: int, tiny: bool) -> dict[str, Any]:
    double = max(1, round(_some(layers, 57) / 3))  # 19 and 38
    small = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 16}
    return {
        "num_layers": double,
        "num_single_layers": max(1, _some(layers, 57) - double),
        "guidance_embeds": True,
        **(small | {"axes_dims_rope": (4, 6, 6)} if tiny else {}),
    }


def flux_inputs(tiny: bool) -> dict[str, Any]:
    side, text, wide, pooled = (16, 20, 32, 16) if tiny else (64, 512, 4096, 768)
    return {
        "hidden_states": torch.randn(1, side * side, 64),
        "encoder_hidden_states": torch.randn(1, text, wide),
        "pooled_projections": torch.randn(1, pooled),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.cartesian_prod(*(torch.ones(n).cumsum(0) - 1 for n in (1, side, side))),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.tensor([3.5]),
    }


# ---- SD3.5 medium at 1024², text of 333, both halves of guidance


def sd3_config(layers: int, tiny: bool) -> dict[str, Any]:
    n = _some(layers, 24)
    large = {"attention_head_dim": 64, "num_attention_heads": 24, "caption_projection_dim": 1536}
    small = {"attention_head_dim": 16, "num_attention_heads": 2, "caption_projection_dim": 32, "sample_size": 32}
    return {
        "num_layers": n,
        "dual_attention_layers": tuple(range(max(1, n * 13 // 24))),
        "qk_norm": "rms_norm",
        "pos_embed_max_size": 384,
        **(small | {"joint_attention_dim": 32, "pooled_projection_dim": 16} if tiny else large),
    }


def sd3_inputs(tiny: bool) -> dict[str, Any]:
    side, text, wide, pooled = (32, 20, 32, 16) if tiny else (128, 333, 4096, 2048)
    return {
        "hidden_states": torch.randn(2, 16, side, side),
        "encoder_hidden_states": torch.randn(2, text, wide),
        "pooled_projections": torch.randn(2, pooled),
        "timestep": torch.tensor([500.0, 500.0]),
    }


# ---- SDXL's UNet at 1024², both halves of guidance


def sdxl_config(layers: int, tiny: bool) -> dict[str, Any]:
    return {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 32, 64) if tiny else (320, 640, 1280),
        "attention_head_dim": (1, 2, 4) if tiny else (5, 10, 20),  # the number of heads
        "transformer_layers_per_block": (1, 1 if tiny else 2, _some(layers, 10)),
        "cross_attention_dim": 16 if tiny else 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8 if tiny else 256,
        "projection_class_embeddings_input_dim": 64 if tiny else 2816,
    }


def sdxl_inputs(tiny: bool) -> dict[str, Any]:
    side, wide, pooled = (32, 16, 16) if tiny else (128, 2048, 1280)
    return {
        "sample": torch.randn(2, 4, side, side),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(2, 77, wide),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, pooled), "time_ids": torch.ones(2, 6)},
    }


# ---- LTX-Video at 704 × 512, 161 frames, both halves of guidance


def ltx_config(layers: int, tiny: bool) -> dict[str, Any]:
    small = {"attention_head_dim": 16, "num_attention_heads": 2, "cross_attention_dim": 32, "caption_channels": 16}
    return {"num_layers": _some(layers, 28), **(small if tiny else {})}


def ltx_inputs(tiny: bool) -> dict[str, Any]:
    frames, height, width = (3, 8, 9) if tiny else (21, 16, 22)
    text, wide = (20, 16) if tiny else (128, 4096)
    return {
        "hidden_states": torch.randn(2, frames * height * width, 128),
        "encoder_hidden_states": torch.randn(2, text, wide),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_attention_mask": torch.ones(2, text),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


# ---- Wan2.1 1.3B at 480p, 33 frames


def wan_config(layers: int, tiny: bool) -> dict[str, Any]:
    heads, size, ffn, text = (2, 16, 64, 32) if tiny else (12, 128, 8960, 4096)
    return {
        "num_attention_heads": heads,
        "attention_head_dim": size,
        "ffn_dim": ffn,
        "text_dim": text,
        "num_layers": _some(layers, 30),
    }


def wan_inputs(tiny: bool) -> dict[str, Any]:
    latents, text, wide = ((3, 16, 18), 20, 32) if tiny else ((9, 60, 104), 512, 4096)
    return {
        "hidden_states": torch.randn(1, 16, *latents),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, text, wide),
    }


FLUX_BLOCKS = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
MODELS = {
    "flux": Model("FLUX.1 dev 1024²", "FluxTransformer2DModel", FLUX_BLOCKS, flux_config, flux_inputs, 4608),
    "sd3": Model(
        "SD3.5 medium 1024²", "SD3Transformer2DModel", ("JointTransformerBlock",), sd3_config, sd3_inputs, 4429
    ),
    "sdxl": Model("SDXL 1024²", "UNet2DConditionModel", ("BasicTransformerBlock",), sdxl_config, sdxl_inputs, 4096),
    "ltx": Model(
        "LTX-Video 512p × 161",
        "LTXVideoTransformer3DModel",
        ("LTXVideoTransformerBlock",),
        ltx_config,
        ltx_inputs,
        7392,
    ),
    "wan": Model(
        "Wan2.1 1.3B 480p × 33", "WanTransformer3DModel", ("WanTransformerBlock",), wan_config, wan_inputs, 14040
    ),
}


@contextmanager
def defaults(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """What is made meanwhile is made there, in this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


class Counted(TorchFunctionMode):
    """Counts the calls of SDPA."""

    def __init__(self) -> None:
        self.calls = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += function is F.scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


class Sites:
    """Hears which sites are sparse."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def ran(self, options: Options, names: list[str], outputs: Sequence[Tensor]) -> None:
        self.names.update(names)


def twin(model: nn.Module) -> nn.Module:
    """A model of the same tensors, to be compiled in another way."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(x): x for x in tensors})


def compile_blocks(model: nn.Module, blocks: Sequence[str], inner: str, options: dict[str, Any] | None) -> nn.Module:
    """The model with each block of these classes compiled, with ``inner`` alone or with the sparse backend over it."""
    how: dict[str, Any] = {"backend": inner} if options is None else {"backend": "sparge", "options": options}
    for module in model.modules():
        if type(module).__name__ in blocks:
            module.compile(dynamic=False, **how)
    return model


def measure(
    key: str, args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, object]]:
    """The rows of one model, in all ways in turns: other work on a shared host disturbs each of them alike."""
    import diffusers

    spec = MODELS[key]
    torch.manual_seed(0)
    with defaults(device, dtype):
        model = getattr(diffusers, spec.kind)(**spec.config(args.layers, args.tiny)).eval().requires_grad_(False)
        inputs = {**spec.inputs(args.tiny), "return_dict": False}
    options: dict[str, Any] = {"inner": args.inner, "on_unsupported": "dense"}
    options |= {"min_seq_len": 64} if args.tiny else {}
    with Counted() as counted:
        model(**inputs)
    if args.check:
        _check(spec, model, inputs, args.inner, options)

    calls: dict[str, Callable[[], Any]] = {}
    sparse = {}
    for name, chosen in {
        args.inner: None,
        **{f"sparge, {name}": options | x for name, x in SPARSITIES.items()},
    }.items():
        compiled, sites = compile_blocks(twin(model), spec.blocks, args.inner, chosen), Sites()
        calls[name] = partial(compiled, **inputs)
        with heard_by(sites):
            found = calls[name]()[0]
        if not found.isfinite().all():
            raise SystemExit(f"{spec.name} by {name}: the result is not finite: no time counts.")
        sparse[name] = len(sites.names)
    seconds = in_turns(calls, device, args.rounds)
    for name, each in seconds.items():
        yield {
            "model": spec.name,
            "layers": args.layers or "all",
            "tokens": "–" if args.tiny else spec.tokens,
            "backend": name,
            "sites": counted.calls,
            "sparse": sparse[name],
            "ms": 1000 * statistics.median(each),
            "least ms": 1000 * min(each),
            "x": statistics.median(seconds[args.inner]) / statistics.median(each),
        }


def _check(spec: Model, model: nn.Module, inputs: dict[str, Any], inner: str, options: dict[str, Any]) -> None:
    """Print how far the model with all blocks kept lies from the dense one; end the run where it is another model."""
    dense, whole = (compile_blocks(twin(model), spec.blocks, inner, x) for x in (None, WHOLE | options))
    want, sites = dense(**inputs)[0].float(), Sites()
    with heard_by(sites):
        found = whole(**inputs)[0].float()
    error = (found - want).norm() / want.norm()
    kept = f"all blocks of {len(sites.names)} sites kept"
    print(f"{spec.name}, {kept}: error against dense {error:.2g}", flush=True)
    if not error < LARGEST_ERROR or not sites.names:
        raise SystemExit("The rewritten model with all blocks kept is not the dense model: no time counts.")


def in_turns(calls: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Wall seconds of each call in each round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - start)
    return times


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser)
    parser.add_argument("--models", default=",".join(MODELS), help=f"({','.join(MODELS)})")
    parser.add_argument(
        "--layers", type=int, default=LAYERS, help=f"how many at the most, of each kind; 0: all ({LAYERS})"
    )
    parser.add_argument("--rounds", type=int, default=15, help="how often each is timed, in turns (15)")
    parser.add_argument("--inner", default="inductor", help="what compiles the blocks, the rival's too (inductor)")
    parser.add_argument(
        "--check", action="store_true", help="first compare a model that keeps all blocks with the dense one"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models, to see that everything runs")
    parser.add_argument("--csv", help="write the rows to this file as well")
    args = parser.parse_args(argv)
    device, dtype = harness.start(args)
    torch._dynamo.config.recompile_limit = 64  # of a block's code, which all ways share
    rows: list[dict[str, object]] = []
    for key in args.models.split(","):
        try:
            for row in measure(key, args, device, dtype):
                rows.append(row)
                print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        except Exception as error:  # one model less is not the end of the run
            print(f"{key}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if args.csv:
            harness.write_csv(args.csv, rows)
    print(harness.table(rows))


if __name__ == "__main__":
    main()
