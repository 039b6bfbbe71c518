"""The models of the coverage table, at tiny random sizes: how to build each, and how its attention is counted.

Builders that the tests use as well are in tests/whole/models.py. Where a library has several spellings of one model
(SDPA and eager attention), each is a row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.append(str(Path(__file__).parent.parent / "tests" / "whole"))
import models

Built = tuple[nn.Module, dict[str, Any]]
VIDEO = (models.FRAMES, 2 * models.HEIGHT, 2 * models.WIDTH)
TEXT = models.TEXT
TOKENS = 300  # of a text; no block divides it
VOCABULARY = 97


@dataclass(frozen=True)
class Model:
    """A row of the table.

    ``executed`` is how often attention runs, where no call of a library's function tells. ``fullgraph`` is False where
    Dynamo must break the graph, and ``inner`` compiles the rest. With ``gradients``, autograd is on.
    """

    name: str
    library: str
    build: Callable[[], Built]
    executed: int | None = None
    training: bool = False
    gradients: bool = False
    fullgraph: bool = True
    inner: str = "aot_eager"

    @property
    def missing(self) -> str | None:
        """A package that the model needs and this machine has not."""
        needs = {"timm": ("timm", "torchvision"), "torch.nn": ()}.get(self.library, (self.library,))
        return next((package for package in needs if find_spec(package) is None), None)


# ---- diffusers


def diffusers_model(name: str, config: dict[str, Any], inputs: Callable[[], dict[str, Any]]) -> Callable[[], Built]:
    def build() -> Built:
        model = getattr(import_module("diffusers"), name)(**config)
        return model, {**inputs(), "return_dict": False}

    return build


def _padding() -> torch.Tensor:
    mask = torch.ones(1, TEXT, dtype=torch.long)
    mask[:, 7:] = 0
    return mask


def _image(channels: int = 4) -> torch.Tensor:
    return torch.randn(1, channels, 34, 38)  # 17 × 19 patches


def _text(width: int = 16) -> torch.Tensor:
    return torch.randn(1, TEXT, width)


TWO_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}

mochi = diffusers_model(
    "MochiTransformer3DModel",
    {**TWO_HEADS, "num_layers": 2, "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 16}
    | {"time_embed_dim": 4, "max_sequence_length": TEXT},
    lambda: {
        "hidden_states": torch.randn(1, 4, *VIDEO),
        "encoder_hidden_states": _text(),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": _padding().bool(),
    },
)
allegro = diffusers_model(
    "AllegroTransformer3DModel",
    {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "cross_attention_dim": 48}
    | {"sample_width": VIDEO[2], "sample_height": VIDEO[1], "sample_frames": VIDEO[0], "caption_channels": 16},
    lambda: {
        "hidden_states": torch.randn(1, 4, *VIDEO),
        "encoder_hidden_states": _text().unsqueeze(1),
        "timestep": torch.tensor([500]),
        "attention_mask": torch.ones(1, *VIDEO),
        "encoder_attention_mask": _padding(),
        "image_rotary_emb": _allegro_angles(),
    },
)


def _allegro_angles() -> Any:
    """Angles and positions of frames, rows and columns, as the pipeline prepares them."""
    frames, height, width = VIDEO[0], VIDEO[1] // 2, VIDEO[2] // 2
    *angles, grid_t, grid_h, grid_w = import_module("diffusers.models.embeddings").get_3d_rotary_pos_embed_allegro(
        embed_dim=24, crops_coords=((0, 0), (height, width)), grid_size=(height, width), temporal_size=frames
    )
    grid = torch.cartesian_prod(grid_t.long(), grid_h.long(), grid_w.long())
    return angles, tuple(grid.mT.reshape(3, 1, -1).contiguous())


pixart = diffusers_model(
    "PixArtTransformer2DModel",
    {**TWO_HEADS, "num_layers": 2, "cross_attention_dim": 32, "sample_size": 34, "caption_channels": 16}
    | {"use_additional_conditions": False},
    lambda: {
        "hidden_states": _image(),
        "encoder_hidden_states": _text(),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": _padding(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    },
)
dit = diffusers_model(
    "DiTTransformer2DModel",
    {**TWO_HEADS, "num_layers": 2, "sample_size": 34, "in_channels": 4},
    lambda: {  # squares only
        "hidden_states": torch.randn(1, 4, 34, 34),
        "timestep": torch.tensor([500]),
        "class_labels": torch.tensor([3]),
    },
)
latte = diffusers_model(
    "LatteTransformer3DModel",
    {**TWO_HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 1, "sample_size": 34, "patch_size": 2}
    | {"caption_channels": 16, "cross_attention_dim": 32, "attention_bias": True, "norm_type": "ada_norm_single"}
    | {"activation_fn": "gelu-approximate", "norm_elementwise_affine": False, "video_length": 5},
    lambda: {
        "hidden_states": torch.randn(1, 4, 5, 34, 34),
        "encoder_hidden_states": _text(),
        "timestep": torch.tensor([500]),
    },
)
sana = diffusers_model(  # self-attention is linear, without a softmax; only the attention to the text is attention here
    "SanaTransformer2DModel",
    {**TWO_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 2}
    | {"cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 16, "sample_size": 34},
    lambda: {
        "hidden_states": _image(),
        "encoder_hidden_states": _text(),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": _padding(),
    },
)
auraflow = diffusers_model(
    "AuraFlowTransformer2DModel",
    {**TWO_HEADS, "sample_size": 40, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1}
    | {"joint_attention_dim": 16, "caption_projection_dim": 32, "pos_embed_max_size": 400},
    lambda: {"hidden_states": _image(), "encoder_hidden_states": _text(), "timestep": torch.tensor([0.5])},
)
lumina2 = diffusers_model(
    "Lumina2Transformer2DModel",
    {"sample_size": 40, "in_channels": 4, "hidden_size": 48, "num_layers": 1, "num_refiner_layers": 1}
    | {"num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (8, 8, 8)}
    | {"axes_lens": (64, 64, 64), "cap_feat_dim": 16},
    lambda: {
        "hidden_states": _image(),
        "encoder_hidden_states": _text(),
        "timestep": torch.tensor([0.5]),
        "encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.bool),
    },
)
qwen_image = diffusers_model(
    "QwenImageTransformer2DModel",
    {**TWO_HEADS, "in_channels": 8, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 16}
    | {"axes_dims_rope": (4, 6, 6)},
    lambda: {
        "hidden_states": torch.randn(1, 17 * 19, 8),
        "encoder_hidden_states": _text(),
        "encoder_hidden_states_mask": torch.ones(1, TEXT, dtype=torch.long),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 17, 19)]],
    },
)
unet = diffusers_model(
    "UNet2DConditionModel",
    {"sample_size": 18, "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 16}
    | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 2, "norm_num_groups": 8}
    | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
    lambda: {
        "sample": torch.randn(1, 4, 18, 20),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": _text(),
    },
)
autoencoder = diffusers_model(
    "AutoencoderKL",
    {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1}
    | {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
    lambda: {"sample": torch.randn(1, 3, 34, 38)},
)


def plain_attention(build: Callable[[], Built]) -> Callable[[], Built]:
    """The same model with AttnProcessor: baddbmm, softmax, bmm."""

    def built() -> Built:
        model, inputs = build()
        model.set_attn_processor(import_module("diffusers.models.attention_processor").AttnProcessor())
        return model, inputs

    return built


# ---- transformers

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**DECODER, "num_key_value_heads": 2}
ENCODER = {**DECODER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 72,
    "patch_size": 4,
}


def _ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, TOKENS))


def ids() -> dict[str, Any]:
    return {"input_ids": _ids(), "use_cache": False}


def ids_alone() -> dict[str, Any]:
    return {"input_ids": _ids()}


def ids_twice() -> dict[str, Any]:
    """For an encoder with a decoder."""
    return {"input_ids": _ids(), "decoder_input_ids": _ids()[:, :200], "use_cache": False}


def pixels() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 72, 72)}


def padded_ids() -> dict[str, Any]:
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, 170:] = 0
    return {"input_ids": torch.randint(3, VOCABULARY, (2, TOKENS)), "attention_mask": mask}


def _transformers(
    model: str, config: str, settings: dict[str, Any], inputs: Callable[[], dict[str, Any]], attention: str
) -> Built:
    library = import_module("transformers")
    configuration = getattr(library, config)(**settings, attn_implementation=attention)
    return getattr(library, model)(configuration), inputs()


@dataclass(frozen=True)
class Family:
    """A class of transformers, with the implementations of attention that it has."""

    name: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    model: str | None = None  # the class, where it is not the name and "Model"
    implementations: tuple[str, ...] = ("sdpa", "eager")
    executed: int | None = None
    gradients: bool = False
    fullgraph: bool = True

    def rows(self) -> Iterator[Model]:
        model = self.model or f"{self.name}Model"
        for attention in self.implementations:
            build = partial(_transformers, model, self._config_class(), self.config, self.inputs, attention)
            how = {"executed": self.executed, "gradients": self.gradients, "fullgraph": self.fullgraph}
            yield Model(f"{model} {attention}", "transformers", build, **how)

    def _config_class(self) -> str:
        return f"{self.name}Config"


FAMILIES = (
    Family("Mistral", {**GROUPED, "sliding_window": 100}, ids),
    Family("Qwen2", GROUPED, ids),
    Family("Qwen3", {**GROUPED, "head_dim": 16}, ids),
    Family("Gemma2", {**GROUPED, "head_dim": 16, "sliding_window": 100}, ids, implementations=("eager",)),
    Family(
        "GPT2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        | {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
        ids,
    ),
    Family("GPTNeoX", DECODER, ids),
    Family("Phi3", GROUPED, ids),
    Family("Mixtral", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, ids, fullgraph=False),
    Family(
        "GptOss",
        {**GROUPED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 100},
        ids,
        implementations=("eager",),
        fullgraph=False,
    ),
    Family(
        "OPT",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"max_position_embeddings": 512, "word_embed_proj_dim": 64, "dropout": 0.0, "pad_token_id": 0},
        ids,
    ),
    Family(  # attention stands in the layer's forward; there is one implementation, and ALiBi in each of two layers
        "Bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
        ids,
        implementations=("eager",),
        executed=2,
    ),
    Family(
        "T5",
        {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}
        | {"dropout_rate": 0.0, "pad_token_id": 0, "decoder_start_token_id": 0},
        ids_twice,
        gradients=True,  # which make its bias a learned one
    ),
    Family(
        "Bart",
        {"vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
        | {"max_position_embeddings": 512, "dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2},
        ids_twice,
    ),
    Family("Roberta", ENCODER, padded_ids),
    Family(
        "DistilBert",
        {"vocab_size": VOCABULARY, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "dropout": 0.0}
        | {"attention_dropout": 0.0, "max_position_embeddings": 512, "pad_token_id": 0},
        padded_ids,
    ),
    Family("CLIPVision", IMAGES, pixels),
    Family("CLIPText", DECODER, ids_alone),
    Family("SiglipVision", IMAGES, pixels),
    Family(
        "Swin",
        {"image_size": 72, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 6},
        pixels,
        gradients=True,  # which make its bias a learned one
    ),
    Family("Dinov2", {**IMAGES, "mlp_ratio": 2}, pixels),
    Family(
        "Whisper",
        {"vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
        | {"max_source_positions": TOKENS, "max_target_positions": 256, "pad_token_id": 0, "bos_token_id": 1}
        | {"eos_token_id": 2, "decoder_start_token_id": 1, "dropout": 0.0},
        lambda: {
            "input_features": torch.randn(1, 8, 2 * TOKENS),
            "decoder_input_ids": _ids()[:, :200],
            "use_cache": False,
        },
    ),
    Family(
        "Wav2Vec2",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"intermediate_size": 96, "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
        | {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "hidden_dropout": 0.0}
        | {"activation_dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0},
        lambda: {"input_values": torch.randn(1, 6000)},
    ),
)

# ---- torch.nn

_WIDTH = {"d_model": 32, "nhead": 2, "dim_feedforward": 64, "dropout": 0.0, "batch_first": True}


def _sequence(length: int = TOKENS) -> torch.Tensor:
    return torch.randn(2, length, 32)


def decoder() -> Built:
    layer = nn.TransformerDecoderLayer(**_WIDTH)
    inputs = {"tgt": _sequence(), "memory": _sequence(200)}
    causal = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    return nn.TransformerDecoder(layer, num_layers=2), {**inputs, "tgt_mask": causal, "tgt_is_causal": True}


def transformer() -> Built:
    model = nn.Transformer(**_WIDTH, num_encoder_layers=1, num_decoder_layers=1)
    return model, {"src": _sequence(), "tgt": _sequence(200)}


# ---- timm


def _timm(name: str, fused: bool, settings: dict[str, Any]) -> Built:
    timm = import_module("timm")
    import_module("timm.layers").set_fused_attn(fused)
    model = timm.create_model(name, pretrained=False, num_classes=10, **settings)
    return model, {"x": torch.randn(2, 3, settings["img_size"], settings["img_size"])}


TIMM = {  # the name, its settings, and how many attentions it runs
    "vit_tiny_patch16_224": ({"img_size": 72, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "depth": 2}, 2),
    "eva02_tiny_patch14_224": ({"img_size": 70, "embed_dim": 32, "num_heads": 2, "depth": 2}, 2),
    "beit_base_patch16_224": ({"img_size": 64, "embed_dim": 32, "num_heads": 2, "depth": 2}, 2),
    "swin_tiny_patch4_window7_224": ({"img_size": 56, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}, 4),
}

MODELS = (
    *(
        Model(name, "diffusers", build)
        for name, build in {
            "WanTransformer3DModel": models.wan,
            "HunyuanVideoTransformer3DModel": models.hunyuan_video,
            "CogVideoXTransformer3DModel": models.cogvideox,
            "LTXVideoTransformer3DModel": models.ltx_video,
            "MochiTransformer3DModel": mochi,
            "AllegroTransformer3DModel": allegro,
            "LatteTransformer3DModel": latte,
            "FluxTransformer2DModel": models.flux,
            "SD3Transformer2DModel": models.sd3,
            "PixArtTransformer2DModel": pixart,
            "DiTTransformer2DModel": dit,
            "SanaTransformer2DModel": sana,
            "AuraFlowTransformer2DModel": auraflow,
            "QwenImageTransformer2DModel": qwen_image,
            "UNet2DConditionModel": unet,
            "UNet2DConditionModel AttnProcessor": plain_attention(unet),
        }.items()
    ),
    # Its length depends on the data: on how many words of the text are padding.
    Model("Lumina2Transformer2DModel", "diffusers", lumina2, fullgraph=False),
    # AOTAutograd refuses its group normalisation of transposed memory, with and without this backend.
    Model("AutoencoderKL", "diffusers", autoencoder, inner="eager"),
    Model("AutoencoderKL AttnProcessor", "diffusers", plain_attention(autoencoder), inner="eager"),
    *(
        Model(f"{name} {attention}", "transformers", partial(build, attention))
        for name, build in {"LlamaModel": models.llama, "BertModel": models.bert, "ViTModel": models.vit}.items()
        for attention in ("sdpa", "eager")
    ),
    *(row for family in FAMILIES for row in family.rows()),
    Model("MultiheadAttention", "torch.nn", models.mha, training=True, gradients=True),
    Model("MultiheadAttention padded", "torch.nn", models.mha_padded, training=True, gradients=True),
    Model("MultiheadAttention cross", "torch.nn", models.mha_cross, training=True, gradients=True),
    Model("TransformerEncoderLayer", "torch.nn", models.encoder_layer, training=True, gradients=True),
    Model("TransformerEncoder", "torch.nn", models.encoder, training=True, gradients=True),
    Model("TransformerEncoder inference", "torch.nn", models.encoder),
    Model("TransformerDecoder", "torch.nn", decoder, training=True, gradients=True),
    Model("Transformer", "torch.nn", transformer, training=True, gradients=True),
    *(
        Model(f"{name} {'fused' if fused else 'plain'}", "timm", partial(_timm, name, fused, settings), executed)
        for name, (settings, executed) in TIMM.items()
        for fused in (True, False)
    ),
)
