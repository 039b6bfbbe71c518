"""The attention of real models at their usual resolutions: a table of sizes, written from the models' configurations.

Models of docs/coverage.md. A joint sequence is counted whole, its text included. What is no dense softmax attention
without a bias (Sana, Swin, T5, Gemma 2, …) or has a head size that no kernel takes (a VAE's 512) is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Row(NamedTuple):
    """One attention of a model: q [B, H, L, D] over k [B, Hk, S, D] and v [B, Hk, S, Dv]."""

    model: str
    at: str
    heads: int
    head_size: int
    length: int
    keys: int
    kv_heads: int
    value_head_size: int
    is_causal: bool = False
    times_batch: int = 1  # sequences for each sample, as frames that attend apart


def _self(model: str, heads: int, size: int, lengths: dict[str, int], **other: int | bool) -> Iterator[Row]:
    for at, n in lengths.items():
        yield Row(model, at, heads, size, n, n, **{"kv_heads": heads, "value_head_size": size, **other})  # type: ignore[arg-type]


def _cross(model: str, heads: int, size: int, lengths: dict[str, int], keys: int) -> Iterator[Row]:
    for at, n in lengths.items():
        yield Row(f"{model} cross", at, heads, size, n, keys, heads, size)


def _prefill(
    model: str, heads: int, kv_heads: int, size: int, *lengths: int, value: int | None = None
) -> Iterator[Row]:
    for n in lengths:
        yield Row(model, f"{n} tokens", heads, size, n, n, kv_heads, value or size, True)


def _video() -> Iterator[Row]:
    wan = {"480p 33 frames": 14040, "480p 49 frames": 20280, "480p 81 frames": 32760}
    yield from _self("Wan2.1 1.3B", 12, 128, wan)
    yield from _cross("Wan2.1 1.3B", 12, 128, wan, 512)
    large = {"480p 33 frames": 14040, "480p 81 frames": 32760, "720p 33 frames": 32400, "720p 81 frames": 75600}
    yield from _self("Wan2.1 14B", 40, 128, large)
    yield from _cross("Wan2.1 14B", 40, 128, {"720p 81 frames": 75600}, 512)
    yield from _self("Wan2.2 5B", 24, 128, {"704p 49 frames": 11440, "704p 121 frames": 27280})
    yield from _self(
        "HunyuanVideo",
        24,
        128,
        {"544p 33 frames": 18616, "544p 129 frames": 67576, "720p 61 frames": 57856, "720p 129 frames": 119056},
    )
    yield from _self("HunyuanVideo 1.5", 16, 128, {"480p 61 frames": 26440, "480p 121 frames": 50290})
    yield from _self("CogVideoX 2B", 30, 64, {"480p 9 frames": 4276, "480p 49 frames": 17776})
    yield from _self("CogVideoX 5B", 48, 64, {"480p 49 frames": 17776})
    yield from _self("CogVideoX 1.5", 48, 64, {"768p 81 frames": 45106})
    ltx = {"480p 25 frames": 1320, "480p 97 frames": 4290, "512p 161 frames": 7392, "768p 121 frames": 14592}
    yield from _self("LTX-Video", 32, 64, ltx)
    yield from _cross("LTX-Video", 32, 64, {"768p 121 frames": 14592}, 128)
    yield from _self("LTX-2", 32, 128, {"512p 121 frames": 6144, "720p 121 frames": 14080})
    yield from _self("Mochi", 24, 128, {"480p 37 frames": 11386, "480p 163 frames": 44776})
    yield from _self("Allegro", 24, 96, {"360p 40 frames": 9200, "720p 88 frames": 79200})
    yield from _self("Latte spatial", 16, 72, {"512² 16 frames": 1024}, times_batch=16)
    yield from _self("Kandinsky 5 Lite", 28, 64, {"512p 61 frames": 24576, "512p 121 frames": 47616})
    yield from _self("Cosmos 7B", 32, 128, {"704p 57 frames": 28160, "704p 121 frames": 56320})
    yield from _self("Moving digits", 4, 64, {"64² 16 frames": 4096})


def _image() -> Iterator[Row]:
    squares = {"512²": 1024, "768²": 2304, "1024²": 4096, "1536×1024": 6144, "2048²": 16384}
    joint = {n: {at: length + n for at, length in squares.items()} for n in (256, 333, 512)}
    yield from _self("FLUX.1 dev", 24, 128, joint[512])
    yield from _self("FLUX.1 schnell", 24, 128, {"1024²": 4352})
    yield from _self("FLUX.2 dev", 48, 128, {"1024²": 4608, "2048²": 16896})
    yield from _self("SD3.5 medium", 24, 64, joint[333])
    yield from _self("SD3.5 medium attn2", 24, 64, squares)
    yield from _self("SD3.5 large", 38, 64, {"1024²": 4429})
    yield from _self("PixArt-Σ", 16, 72, squares)
    yield from _cross("PixArt-Σ", 16, 72, {"2048²": 16384}, 300)
    yield from _self("DiT-XL/2", 16, 72, {"512²": 1024})
    yield from _self("AuraFlow", 12, 256, {"512²": 1280, "1024²": 4352})
    yield from _self("Qwen-Image", 24, 128, {"928×1664": 6288, "1328²": 7145})
    yield from _self("Lumina 2", 24, 96, {"1024²": 4352, "1536²": 9472}, kv_heads=8)
    yield from _self("Z-Image", 30, 128, {"1024²": 4352, "1536²": 9472})
    yield from _self("SDXL", 10, 64, {"1024² outer": 4096, "1536² outer": 9216})
    yield from _self("SDXL", 20, 64, {"1024² inner": 1024, "1536² inner": 2304, "2048² inner": 4096})
    yield from _cross("SDXL", 10, 64, {"1024² outer": 4096}, 77)
    yield from _self("SD1.5", 8, 40, {"512² outer": 4096, "768² outer": 9216})
    yield from _self("SD1.5", 8, 80, {"512² middle": 1024, "768² middle": 2304})
    yield from _self("SD1.5", 8, 160, {"1024² inner": 1024})
    yield from _self("SD2.1", 5, 64, {"768² outer": 9216})
    yield from _self("SD2.1", 10, 64, {"768² middle": 2304})


def _language() -> Iterator[Row]:
    yield from _prefill("Llama 3 8B", 32, 8, 128, 1024, 2048, 4096, 8192, 16384, 32768)
    yield from _prefill("Mistral 7B", 32, 8, 128, 4000)
    yield from _prefill("Qwen2 7B", 28, 4, 128, 4096, 32768)
    yield from _prefill("Qwen3 0.6B", 16, 8, 128, 2048, 8192, 32768)
    yield from _prefill("Qwen3 32B", 64, 8, 128, 8192)
    yield from _prefill("Phi-3 mini", 32, 32, 96, 2000, 4096)
    yield from _prefill("Mixtral 8x7B", 32, 8, 128, 8192)
    yield from _prefill("GPT-2", 12, 12, 64, 1024)
    yield from _prefill("GPT-NeoX 20B", 64, 64, 96, 2048)
    yield from _prefill("OPT 6.7B", 32, 32, 128, 2048)
    yield from _prefill("DeepSeek V2 Lite", 16, 16, 192, 4096, 16384, value=128)
    yield from _prefill("DeepSeek V3", 128, 128, 192, 4096, value=128)


def _vision_and_sound() -> Iterator[Row]:
    yield from _self("ViT-L/16", 16, 64, {"384²": 577, "1024²": 4097})
    yield from _self("SigLIP so400m", 16, 72, {"384²": 729, "896²": 4096})
    yield from _self("CLIP ViT-L/14", 16, 64, {"336²": 577})
    yield from _self("DINOv2 L/14", 16, 64, {"518²": 1370, "1022²": 5330})
    yield from _self("DINOv2 g/14", 24, 64, {"518²": 1370})
    yield from _self("DINOv3 L/16", 16, 64, {"512²": 1029, "1024²": 4101, "2048²": 16389})
    yield from _self("DINOv3 7B", 32, 128, {"1024²": 4101})
    yield from _self("EVA02 L/14", 16, 64, {"448²": 1025})
    yield from _self("SAM 2 Hiera L", 8, 72, {"1024²": 4096})
    yield from _self("Qwen3-VL vision", 16, 72, {"1024²": 4096, "2048²": 16384})
    yield from _self("Whisper large encoder", 20, 64, {"30 s": 1500})
    yield Row("Whisper large cross", "30 s", 20, 64, 448, 1500, 20, 64)
    yield from _self("Wav2Vec2 base", 12, 64, {"30 s": 1499, "120 s": 5999})
    yield from _self("BERT base", 12, 64, {"512 tokens": 512})
    yield from _self("BART large", 16, 64, {"1024 tokens": 1024})
    yield from _self("nn.TransformerEncoder", 8, 64, {"2048 tokens": 2048, "8192 tokens": 8192})


ROWS = (*_video(), *_image(), *_language(), *_vision_and_sound())
