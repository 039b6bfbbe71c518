"""Pipelines of diffusers in miniature: real classes, random weights, the real strides between pixels and tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny_texts as texts
import torch

TWO_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def shaken(model: Any) -> Any:
    """The model in evaluation mode; a layer of zeros would hide what comes before it."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def seeded(build: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return build()


# ---- Wan


def _wan_transformer() -> Any:
    from diffusers import WanTransformer3DModel

    sizes = {"in_channels": 4, "out_channels": 4, "text_dim": texts.WIDTH, "freq_dim": 16, "ffn_dim": 32}
    return shaken(WanTransformer3DModel(**{**TWO_HEADS, "attention_head_dim": 24}, **sizes, num_layers=2))


def wan(**parts: Any) -> Any:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    small = {"base_dim": 4, "z_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1}
    vae = AutoencoderKLWan(**small, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).eval()
    text = {"tokenizer": texts.tokenizer(), "text_encoder": texts.t5("UMT5")}
    return WanPipeline(
        vae=vae, transformer=_wan_transformer(), scheduler=FlowMatchEulerDiscreteScheduler(), **text, **parts
    )


def wan22() -> Any:
    """Two experts."""
    return wan(transformer_2=_wan_transformer(), boundary_ratio=0.875)


# ---- other videos


def hunyuan_video() -> Any:
    import diffusers

    kinds = {f"{way}_block_types": (f"HunyuanVideo{way.title()}Block3D",) * 4 for way in ("down", "up")}
    small = {"latent_channels": 4, "block_out_channels": (4,) * 4, "layers_per_block": 1, "norm_num_groups": 2}
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        **TWO_HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=texts.WIDTH,
        pooled_projection_dim=texts.WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    return diffusers.HunyuanVideoPipeline(
        vae=diffusers.AutoencoderKLHunyuanVideo(**small, **kinds).eval(),
        transformer=shaken(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=texts.decoder("Llama"),
        tokenizer=texts.tokenizer(),
        text_encoder_2=texts.clip(),
        tokenizer_2=texts.tokenizer(),
    )


def hunyuan_video15() -> Any:
    import diffusers

    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        **TWO_HEADS,
        in_channels=9,
        out_channels=4,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=texts.WIDTH,
        text_embed_2_dim=texts.WIDTH,
        image_embed_dim=12,
        rope_axes_dim=(4, 6, 6),
        target_size=256,
        task_type="t2v",
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1, spatial_compression_ratio=16
    )
    return diffusers.HunyuanVideo15Pipeline(
        vae=vae.eval(),
        transformer=shaken(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
        text_encoder=texts.qwen_vl_text(),
        tokenizer=texts.tokenizer(),
        text_encoder_2=texts.t5(),
        tokenizer_2=texts.tokenizer(),
    )


def _ltx_vae(kind: str, **more: Any) -> Any:
    """A token of 32 pixels and 8 frames."""
    import diffusers

    scaling = (True, True, True, False)
    return getattr(diffusers, kind)(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=scaling,
        decoder_spatio_temporal_scaling=scaling,
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        **more,
    ).eval()


def ltx() -> Any:
    import diffusers

    transformer = diffusers.LTXVideoTransformer3DModel(
        **TWO_HEADS, in_channels=4, out_channels=4, cross_attention_dim=32, num_layers=2, caption_channels=texts.WIDTH
    )
    return diffusers.LTXPipeline(
        vae=_ltx_vae("AutoencoderKLLTXVideo"),
        transformer=shaken(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=texts.t5(),
        tokenizer=texts.tokenizer(),
    )


def _ltx2_text(layers: int) -> Any:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    own = {
        f"{stream}_connector_{name}": value
        for stream in ("video", "audio")
        for name, value in {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_learnable_registers": None,
        }.items()
    }
    return LTX2TextConnectors(
        caption_channels=texts.WIDTH,
        text_proj_in_factor=layers + 1,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
        **own,
    )


def ltx2() -> Any:
    import diffusers
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    transformer = diffusers.LTX2VideoTransformer3DModel(
        **TWO_HEADS,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=texts.WIDTH,
        rope_double_precision=False,
        rope_type="split",
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        resolution=32,
        latent_channels=2,
        mid_block_add_attention=False,
        mel_bins=8,
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=16,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    return diffusers.LTX2Pipeline(
        vae=_ltx_vae(
            "AutoencoderKLLTX2Video",
            downsample_type=("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
            upsample_type=("spatiotemporal",) * 4,
        ),
        transformer=shaken(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=texts.gemma3(),
        tokenizer=texts.tokenizer(),
        connectors=_ltx2_text(texts.DECODER["num_hidden_layers"]).eval(),
        audio_vae=audio_vae.eval(),
        vocoder=vocoder.eval(),
    )


def cogvideox() -> Any:
    import diffusers

    kinds = {f"{way}_block_types": (f"CogVideoX{way.title()}Block3D",) * 4 for way in ("down", "up")}
    small = {"latent_channels": 4, "block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 2}
    transformer = diffusers.CogVideoXTransformer3DModel(
        **TWO_HEADS,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=texts.WIDTH,
        num_layers=2,
        sample_width=24,
        sample_height=24,
        sample_frames=9,
        max_text_seq_length=32,
        use_rotary_positional_embeddings=True,
    )
    return diffusers.CogVideoXPipeline(
        vae=diffusers.AutoencoderKLCogVideoX(**small, **kinds).eval(),
        transformer=shaken(transformer),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        text_encoder=texts.t5(),
        tokenizer=texts.tokenizer(),
    )


def mochi() -> Any:
    import diffusers

    transformer = diffusers.MochiTransformer3DModel(
        **TWO_HEADS,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=texts.WIDTH,
        time_embed_dim=4,
        max_sequence_length=32,
    )
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5
    )
    return diffusers.MochiPipeline(
        vae=vae.eval(),
        transformer=shaken(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=texts.t5(),
        tokenizer=texts.tokenizer(),
    )
