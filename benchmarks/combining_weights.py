"""What is done to the weights of a tiny pipeline in the rows of combinations.py: adapters, and weights of few bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# ---- adapters


def lora(pipe: Any, seed: int, rank: int = 4) -> dict[str, Tensor]:
    """The weights of a LoRA of the attention's projections, as they are in a file."""
    torch.manual_seed(seed)
    layers = {name: x for name, x in bare(pipe).named_modules() if name.endswith(("attn1.to_q", "attn1.to_v"))}
    return {
        f"transformer.{name.replace('.base_layer', '')}.lora_{side}.weight": 0.3 * torch.randn(*shape)
        for name, layer in layers.items()
        for side, shape in {"A": (rank, layer.in_features), "B": (layer.out_features, rank)}.items()
    }


def bare(pipe: Any) -> nn.Module:
    return pipe.transformer


def loads(seed: int = 1, fuse: bool = False, **how: Any) -> Callable[[Any], Any]:
    def load(pipe: Any) -> Any:
        pipe.load_lora_weights(lora(pipe, seed), adapter_name="one", **how)
        if fuse:
            pipe.fuse_lora()
        return pipe

    return load


def ready_to_swap(pipe: Any) -> Any:
    pipe.enable_lora_hotswap(target_rank=4)
    return loads(1)(pipe)


def as_peft(pipe: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer = get_peft_model(pipe.transformer, config)
    return pipe


def blocks_of_peft(model: Any, options: dict[str, Any]) -> None:
    model.get_base_model().compile_repeated_blocks(backend="sparge", options=options)


# ---- weights of few bits


def linear_layers(module: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Each with the module that holds it, and its name there."""
    found = [(name.rpartition("."), x) for name, x in module.named_modules() if isinstance(x, nn.Linear)]
    return [(module.get_submodule(path), name, layer) for (path, _, name), layer in found]


def quantised(config: str) -> Callable[[Any], Any]:
    def quantise(pipe: Any) -> Any:
        from torchao import quantization

        quantization.quantize_(pipe.transformer.blocks, getattr(quantization, config)())
        return pipe

    return quantise


def by_bitsandbytes(kind: str, **how: Any) -> Callable[[Any], Any]:
    """The linear layers of the blocks as bitsandbytes has them; a GPU is not needed for it."""

    def replace(pipe: Any) -> Any:
        from bitsandbytes import nn as layers

        for parent, name, layer in linear_layers(pipe.transformer.blocks):
            other = getattr(layers, kind)(layer.in_features, layer.out_features, True, **how)
            other.load_state_dict(layer.state_dict())
            setattr(parent, name, other.to("cpu"))
        return pipe

    return replace


def as_gguf(pipe: Any) -> Any:
    """The linear layers as a GGUF file has them, in Q8_0."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType.Q8_0
    for parent, name, layer in linear_layers(pipe.transformer):
        if layer.in_features % 32 == 0:
            other = GGUFLinear(layer.in_features, layer.out_features, True, compute_dtype=torch.float32)
            packed = torch.from_numpy(quants.quantize(layer.weight.detach().numpy(), kind))
            other.weight, other.bias = GGUFParameter(packed, quant_type=kind), layer.bias
            setattr(parent, name, other)
    return pipe
