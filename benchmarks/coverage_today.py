"""Models of the last two years at tiny random sizes, as rows of the coverage table."""

from __future__ import annotations

from typing import Any

import torch
from coverage_models import GROUPED, IMAGES, TEXT, TOKENS, TWO_HEADS, VIDEO, VOCABULARY, Family, Model, diffusers_model

FRAMES, HEIGHT, WIDTH = VIDEO
PATCHES = FRAMES * HEIGHT * WIDTH // 4


def _text(width: int = 16) -> torch.Tensor:
    return torch.randn(1, TEXT, width)


ltx2 = diffusers_model(
    "LTX2VideoTransformer3DModel",
    {**TWO_HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "num_layers": 1}
    | {"audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 8}
    | {"audio_cross_attention_dim": 16, "caption_channels": 16},
    lambda: {
        "hidden_states": torch.randn(1, PATCHES, 4),
        "audio_hidden_states": torch.randn(1, 70, 4),
        "encoder_hidden_states": _text(),
        "audio_encoder_hidden_states": _text(),
        "timestep": torch.full((1, PATCHES), 500),
        "audio_timestep": torch.full((1, 70), 500),
        "num_frames": FRAMES,
        "height": HEIGHT // 2,
        "width": WIDTH // 2,
        "audio_num_frames": 70,
    },
)
flux2 = diffusers_model(
    "Flux2Transformer2DModel",
    {**TWO_HEADS, "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 16}
    | {"timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)},
    lambda: {
        "hidden_states": torch.randn(1, 17 * 19, 8),
        "encoder_hidden_states": _text(),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.randint(19, (1, 17 * 19, 4)),
        "txt_ids": torch.zeros(1, TEXT, 4),
        "guidance": torch.tensor([4.0]),
    },
)
hunyuan_video_15 = diffusers_model(
    "HunyuanVideo15Transformer3DModel",
    {**TWO_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_refiner_layers": 1, "mlp_ratio": 2.0}
    | {
        "patch_size": 2,
        "text_embed_dim": 16,
        "text_embed_2_dim": 16,
        "image_embed_dim": 16,
        "rope_axes_dim": (4, 6, 6),
    },
    lambda: {
        "hidden_states": torch.randn(1, 4, *VIDEO),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": _text(),
        "encoder_attention_mask": (torch.arange(TEXT) < 7).long().unsqueeze(0),
        "encoder_hidden_states_2": torch.randn(1, 5, 16),
        "encoder_attention_mask_2": (torch.arange(5) < 3).long().unsqueeze(0),
        "image_embeds": torch.zeros(1, 9, 16),
    },
)
kandinsky5 = diffusers_model(
    "Kandinsky5Transformer3DModel",
    {"in_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 16, "time_dim": 16, "out_visual_dim": 4, "model_dim": 32}
    | {"ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 6, 6)},
    lambda: {
        "hidden_states": torch.randn(1, *VIDEO, 4),
        "encoder_hidden_states": _text(),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": torch.randn(1, 16),
        "visual_rope_pos": tuple(map(torch.arange, (FRAMES, HEIGHT // 2, WIDTH // 2))),
        "text_rope_pos": torch.arange(TEXT),
    },
)
z_image = diffusers_model(
    "ZImageTransformer2DModel",
    {"in_channels": 4, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    | {"cap_feat_dim": 16, "axes_dims": [4, 6, 6], "axes_lens": [64, 32, 32]},
    lambda: {"x": [torch.randn(4, 1, 34, 38)], "t": torch.tensor([0.5]), "cap_feats": [torch.randn(TEXT, 16)]},
)
cosmos = diffusers_model(
    "CosmosTransformer3DModel",
    {**TWO_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 16}
    | {"adaln_lora_dim": 4, "max_size": (8, 32, 32), "encoder_hidden_states_channels": 16}
    | {"concat_padding_mask": False},
    lambda: {
        "hidden_states": torch.randn(1, 4, *VIDEO),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": _text(),
        "fps": 24,
    },
)
wan_animate = diffusers_model(
    "WanAnimateTransformer3DModel",
    {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 12, "latent_channels": 4, "out_channels": 4}
    | {"text_dim": 16, "freq_dim": 16, "ffn_dim": 64, "num_layers": 1, "image_dim": 16, "rope_max_seq_len": 32}
    | {"motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16, "motion_style_dim": 8}
    | {"motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2}
    | {"inject_face_latents_blocks": 1},
    lambda: {
        "hidden_states": torch.randn(1, 12, *VIDEO),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": _text(),
        "encoder_hidden_states_image": torch.randn(1, 9, 16),
        "pose_hidden_states": torch.randn(1, 4, FRAMES - 1, HEIGHT, WIDTH),
        "face_pixel_values": torch.randn(1, 3, 4 * FRAMES - 7, 16, 16),
    },
)


def _packed(text: int = TEXT, audio: int = 20, condition: int = 63, video: int = PATCHES) -> dict[str, Any]:
    """Text, condition frames, audio and video as rows of one sequence, each with its place and its noise level."""
    rows = text + condition + audio + video
    begin = torch.arange(rows)
    videos = torch.cat([begin[text : text + condition], begin[-video:]])
    tags = torch.zeros(rows, dtype=torch.long)
    tags[:text], tags[text + condition : text + condition + audio] = 1, 2
    return {
        "hidden_states": torch.randn(1, condition + video, 16),
        "audio_hidden_states": torch.randn(1, audio, 4),
        "encoder_hidden_states": _text(),
        "timestep": torch.tensor([0.0, 0.5]),
        "timestep_indices": (begin >= text + condition).long(),
        "token_tags": tags,
        "position_ids": torch.randint(9, (rows, 3)),
        "video_indices": videos,
        "audio_indices": begin[text + condition : text + condition + audio],
        "text_indices": begin[:text],
    }


minimax_h3 = diffusers_model(
    "MiniMaxH3Transformer3DModel",
    {**TWO_HEADS, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1, "ffn_dim": 48, "in_channels": 4}
    | {"audio_in_channels": 4, "text_dim": 16, "freq_dim": 16, "time_embed_hidden_dim": 24, "time_embed_dim": 16}
    | {"rope_freq_dim": 2},
    _packed,
)


def _pixels() -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 3, 72, 72)}


def _ids() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, VOCABULARY, (1, TOKENS)), "use_cache": False}


_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}
DEEPSEEK = {**GROUPED, "num_key_value_heads": 4, "first_k_dense_replace": 2, **_LATENT, **_EXPERTS}

FAMILIES = (
    Family("DINOv3ViT", IMAGES, _pixels),
    Family("DeepseekV2", DEEPSEEK, _ids),
    Family("DeepseekV3", DEEPSEEK, _ids),
    Family(
        "Sam2HieraDet",
        {"hidden_size": 16, "num_attention_heads": 1, "image_size": [64, 64], "blocks_per_stage": [1, 2, 2, 1]}
        | {"embed_dim_per_stage": [16, 32, 64, 128], "num_attention_heads_per_stage": [1, 2, 4, 8]}
        | {"window_size_per_stage": [8, 4, 8, 4], "global_attention_blocks": [4]}
        | {"window_positional_embedding_background_size": [4, 4]},
        lambda: {"pixel_values": torch.randn(1, 3, 64, 64)},
    ),
    Family(
        "Qwen3VLVision",
        {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32}
        | {"spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 324}
        | {"deepstack_visual_indexes": [0]},
        lambda: {"hidden_states": torch.randn(324, 96), "grid_thw": torch.tensor([[1, 18, 18]])},
        fullgraph=False,  # it reads sizes from grid_thw
    ),
)

MODELS = (
    *(
        Model(name, "diffusers", build)
        for name, build in {
            "LTX2VideoTransformer3DModel": ltx2,
            "Flux2Transformer2DModel": flux2,
            "Kandinsky5Transformer3DModel": kandinsky5,
            "ZImageTransformer2DModel": z_image,
            "CosmosTransformer3DModel": cosmos,
            "WanAnimateTransformer3DModel": wan_animate,
            "MiniMaxH3Transformer3DModel": minimax_h3,
        }.items()
    ),
    # It asks whether there is an image, of its values.
    Model("HunyuanVideo15Transformer3DModel", "diffusers", hunyuan_video_15, fullgraph=False),
    *(row for family in FAMILIES for row in family.rows()),
)
