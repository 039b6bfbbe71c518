"""Pipelines of diffusers that draw pictures, in miniature; as tiny_pipelines.py has those of clips."""

from __future__ import annotations

from typing import Any

import tiny_texts as texts
from tiny_pipelines import TWO_HEADS, shaken


def _vae(kind: str = "AutoencoderKL", channels: int = 4, **more: Any) -> Any:
    """A latent of 8 pixels."""
    import diffusers

    return getattr(diffusers, kind)(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        **more,
    ).eval()


_SHIFTED = {"shift_factor": 0.06, "scaling_factor": 1.5, "use_quant_conv": False, "use_post_quant_conv": False}


def flux() -> Any:
    import diffusers

    transformer = diffusers.FluxTransformer2DModel(
        **TWO_HEADS,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=texts.WIDTH,
        pooled_projection_dim=texts.WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return diffusers.FluxPipeline(
        vae=_vae(**_SHIFTED),
        transformer=shaken(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=texts.clip(),
        tokenizer=texts.tokenizer(),
        text_encoder_2=texts.t5(),
        tokenizer_2=texts.tokenizer(),
    )


def flux2() -> Any:
    import diffusers

    transformer = diffusers.Flux2Transformer2DModel(
        **TWO_HEADS,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=3 * texts.WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return diffusers.Flux2Pipeline(
        vae=_vae("AutoencoderKLFlux2", use_quant_conv=False, use_post_quant_conv=False),
        transformer=shaken(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=texts.mistral3(),
        tokenizer=texts.tokenizer(),
    )


def qwen_image() -> Any:
    import diffusers

    transformer = diffusers.QwenImageTransformer2DModel(
        **TWO_HEADS,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        joint_attention_dim=texts.WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    return diffusers.QwenImagePipeline(
        vae=vae.eval(),
        transformer=shaken(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=texts.qwen_vl(),
        tokenizer=texts.tokenizer(),
    )


def z_image() -> Any:
    import diffusers

    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=texts.WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        token.data.fill_(1.0)  # it is memory that nobody has written to
    return diffusers.ZImagePipeline(
        vae=_vae(**_SHIFTED),
        transformer=shaken(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=texts.decoder("Qwen3"),
        tokenizer=texts.tokenizer(),
    )


def sd35() -> Any:
    import diffusers

    transformer = diffusers.SD3Transformer2DModel(
        **TWO_HEADS,
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        joint_attention_dim=2 * texts.WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * texts.WIDTH,
        pos_embed_max_size=20,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        vae=_vae(**_SHIFTED),
        transformer=shaken(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=texts.clip(projected=True),
        tokenizer=texts.tokenizer(),
        text_encoder_2=texts.clip(projected=True),
        tokenizer_2=texts.tokenizer(),
        text_encoder_3=texts.t5(width=2 * texts.WIDTH),
        tokenizer_3=texts.tokenizer(),
    )


def sdxl() -> Any:
    import diffusers

    unet = diffusers.UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2, 2),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        cross_attention_dim=2 * texts.WIDTH,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + texts.WIDTH,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(),
        unet=shaken(unet),
        scheduler=diffusers.EulerDiscreteScheduler(),
        text_encoder=texts.clip(),
        tokenizer=texts.tokenizer(),
        text_encoder_2=texts.clip(projected=True),
        tokenizer_2=texts.tokenizer(),
    )
