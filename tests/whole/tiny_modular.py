"""Modular pipelines of diffusers in miniature: real classes, random weights, real strides between pixels and tokens."""

from __future__ import annotations

from typing import Any

import tiny_texts as texts
from tiny_pipelines import shaken

ENCODER_LAYERS = 51  # the pipeline reads the states behind the fiftieth
FLAT = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}


def minimax_h3_transformer() -> Any:
    import diffusers

    return shaken(
        diffusers.MiniMaxH3Transformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            ffn_dim=48,
            in_channels=4,
            audio_in_channels=4,
            text_dim=texts.WIDTH,
            freq_dim=16,
            rope_freq_dim=4,
            time_embed_hidden_dim=16,
            time_embed_dim=16,
        )
    )


def minimax_h3() -> Any:
    """Text to video and sound. The processor is one that needs no torchvision; for a text it only tells its tokens."""
    import diffusers
    import transformers
    from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3Blocks, MiniMaxH3ModularPipeline

    transformer = minimax_h3_transformer()
    decoder = {f"decoder_{name}": value for name, value in {"num_layers": 1, "num_attention_heads": 2}.items()}
    vae = diffusers.AutoencoderKLMiniMaxH3(
        latent_channels=4,
        block_out_channels=(4,) * 6,
        layers_per_block=1,
        norm_num_groups=2,
        decoder_attention_head_dim=16,
        **decoder,
        **FLAT,
    )
    twice = {"encoder_rates": (2,), "decoder_rates": (2,), "decoder_kernel_sizes": (4,)}  # not 800 times: quick
    audio_vae = diffusers.AutoencoderKLMiniMaxH3Audio(
        encoder_dim=4, latent_dim=8, latent_channels=4, num_attention_heads=2, decoder_dim=4, **twice, **FLAT
    )
    made = MiniMaxH3ModularPipeline(MiniMaxH3Blocks().get_workflow("t2va"))
    made.update_components(
        transformer=transformer,
        vae=shaken(vae),
        audio_vae=audio_vae.eval(),
        text_encoder=texts.qwen3_vl(ENCODER_LAYERS),
        tokenizer=texts.tokenizer(),
        processor=transformers.CLIPProcessor(transformers.CLIPImageProcessorPil(), texts.tokenizer()),
        scheduler=diffusers.MiniMaxH3Scheduler(),
        audio_scheduler=diffusers.MiniMaxH3Scheduler(shift=3.0),
    )
    return made
