"""The rows of combinations.py: what people use beside sparse attention, and what shall come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from combining import (
    attends_by,
    averaged,
    blocks_of_unet,
    by_block,
    by_deepspeed,
    by_flash,
    by_flash_3,
    by_group,
    by_model,
    by_sage,
    by_xformers,
    caching,
    cast_by_layer,
    clip,
    controlled,
    flux,
    gradient,
    image,
    named_to_accelerate,
    prepared,
    saved_and_loaded,
    sdxl,
    sequential,
    shown_an_image,
    tiled,
    wan,
    without,
)
from combining_weights import as_gguf, as_peft, blocks_of_peft, by_bitsandbytes, loads, quantised, ready_to_swap
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """A row: the pipeline, what is done to it before thresholds are attached and after compilation, what shall come.

    ``note`` is what a user must know, ``refused`` a part of the sentence with which it is refused. ``sites`` is how
    many are sparse. With ``is_drawn_before`` the compiled pipeline runs once before ``after``.
    """

    name: str
    before: Callable[[Any], Any] = lambda pipe: pipe
    after: Callable[[Any], Any] = lambda pipe: None
    note: str = ""
    refused: str = ""
    build: Callable[[], Any] = wan
    draw: Callable[[Any], Tensor] = clip
    models: tuple[str, ...] = ("transformer",)
    pattern: str = "blocks.*.attn1"
    sites: int = 2
    compile: Callable[[Any, dict[str, Any]], None] = by_block
    needs: tuple[str, ...] = ()
    is_drawn_before: bool = False


LIMIT = "Raise `torch._dynamo.config.recompile_limit` to more than the number of blocks."

OFFLOADING = (
    Row("offloading by model", by_model),
    Row("offloading by group, leaf by leaf", by_group(offload_type="leaf_level"), note=LIMIT),
    Row(
        "offloading by group, block by block", by_group(offload_type="block_level", num_blocks_per_group=1), note=LIMIT
    ),
    Row("offloading, sequential", sequential, note=LIMIT),
    Row("layerwise casting to float8", cast_by_layer),
)

ADAPTERS = (
    Row("LoRA, loaded before compilation", loads(), needs=("peft",)),
    Row(
        "LoRA, loaded into a compiled model",
        after=loads(),
        needs=("peft",),
        is_drawn_before=True,
        note="Compiles anew.",
    ),
    Row("LoRA, fused", loads(fuse=True), needs=("peft",)),
    Row("LoRA, swapped in place", ready_to_swap, loads(2, hotswap=True), needs=("peft",), is_drawn_before=True),
    Row("LoRA, scaled", loads(), lambda pipe: pipe.set_adapters("one", 0.5), needs=("peft",), is_drawn_before=True),
    Row("LoRA, unloaded", loads(), lambda pipe: pipe.unload_lora_weights(), needs=("peft",), is_drawn_before=True),
    Row("PEFT around the model", as_peft, compile=blocks_of_peft, needs=("peft",)),
)

_FLUX: dict[str, Any] = {"build": flux, "pattern": "*.attn", "sites": 3}

WEIGHTS = (
    Row("bitsandbytes, 8 bits", by_bitsandbytes("Linear8bitLt", has_fp16_weights=False), needs=("bitsandbytes",)),
    Row(
        "bitsandbytes, 4 bits",
        by_bitsandbytes("Linear4bit", quant_type="nf4", compute_dtype=torch.float32),
        needs=("bitsandbytes",),
    ),
    Row("GGUF, Q8_0", as_gguf, draw=lambda pipe: image(pipe, max_sequence_length=32), **_FLUX, needs=("gguf",)),
    Row("torchao, int8 weights", quantised("Int8WeightOnlyConfig"), needs=("torchao",)),
    Row("torchao, float8 weights", quantised("Float8WeightOnlyConfig"), needs=("torchao",)),
)

_ALWAYS = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 1001)}

CACHES = (
    Row("FirstBlockCache", caching("FirstBlockCacheConfig", threshold=0.2)),
    Row("TaylorSeer", caching("TaylorSeerCacheConfig", cache_interval=2, disable_cache_before_step=2)),
    Row("Pyramid Attention Broadcast", caching("PyramidAttentionBroadcastConfig", **_ALWAYS)),
)

STAND_IN = "Tried with a stand-in of the library's functions, on a CPU."
SAGE = f"{STAND_IN} Where its own code is traced to its kernels, or breaks the graph, it stays, and the report says so."

BACKENDS = (
    Row("set_attention_backend: native", attends_by("native")),
    Row("set_attention_backend: _native_math", attends_by("_native_math")),
    Row("set_attention_backend: _native_flash", attends_by("_native_flash")),
    Row("set_attention_backend: flex", attends_by("flex")),
    Row("set_attention_backend: flash", by_flash, note=STAND_IN),
    Row("set_attention_backend: _flash_3", by_flash_3, note=STAND_IN),
    Row("set_attention_backend: xformers", by_xformers, note=STAND_IN),
    Row("set_attention_backend: sage", by_sage, note=SAGE),
)

SAVED = (
    "The file has the thresholds, and `from_pretrained` leaves them out with a warning: keep "
    "`attached.get().save(path)` beside it, and `attach(model, path)`."
)

_UNET: dict[str, Any] = {"build": sdxl, "draw": image, "models": ("unet",), "pattern": "*.attn1", "sites": 11}

_CONTROL = {**_UNET, "build": controlled, "models": ("unet", "controlnet"), "compile": blocks_of_unet}

_SHOWN = {"ip_adapter_image_embeds": [torch.linspace(-1, 1, 32).reshape(2, 1, 16)]}

PARTS = (
    Row(
        "ControlNet",
        draw=lambda pipe: image(pipe, image=torch.full((1, 3, 256, 256), 0.5)),
        **without(_CONTROL, "draw"),
    ),
    Row("IP-Adapter", shown_an_image, draw=lambda pipe: image(pipe, **_SHOWN), **without(_UNET, "draw")),
    Row("tiles of the VAE", tiled, draw=lambda pipe: clip(pipe, output_type="pt")),
    Row("guidance, two calls a step", draw=lambda pipe: clip(pipe, guidance_scale=5.0)),
    Row("guidance, a batch of two", **_UNET),
    Row("no guidance", draw=lambda pipe: clip(pipe, guidance_scale=1.0)),
    Row("EMA", after=averaged, is_drawn_before=True),
    Row("save_pretrained, from_pretrained", saved_and_loaded, note=SAVED),
)

LIST = (
    "accelerate has a closed list of backends, its plugin names none else. Call `compile` yourself, before `prepare`."
)

ACCELERATE = (
    Row("accelerate: prepare", after=prepared, is_drawn_before=True),
    Row("accelerate: TorchDynamoPlugin", named_to_accelerate, refused="'SPARGE' is not a valid", note=LIST),
)

HOOKS = "Its hooks break graphs: raise `torch._dynamo.config.recompile_limit` to more than the number of modules."

DEEPSPEED = (
    Row("deepspeed, a step with ZeRO 2", after=by_deepspeed(2), draw=gradient, needs=("deepspeed",)),
    Row("deepspeed, a step with ZeRO 3", after=by_deepspeed(3), draw=gradient, needs=("deepspeed",), note=HOOKS),
)

ROWS = (*OFFLOADING, *ADAPTERS, *WEIGHTS, *CACHES, *BACKENDS, *PARTS, *ACCELERATE, *DEEPSPEED)
