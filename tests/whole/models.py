"""Real models in miniature: each case builds a model with random weights and inputs, and says what it hands to SDPA.

Self-attention has a few hundred tokens that neither 64 nor 128 divides. ``CASES`` is the table of what was found in
diffusers and transformers; test_models.py holds it against the libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparge_compile.report import Reason

FRAMES, HEIGHT, WIDTH = 5, 7, 9
TOKENS = FRAMES * HEIGHT * WIDTH  # 315 tokens of a video, after patching
TEXT = 11


@dataclass(frozen=True)
class Attention:
    """One attention of a model: its site in a report, and what the library hands to SDPA in eager mode.

    ``mask`` is ``"none"``, ``"bool"`` or ``"additive"``, and ``mask_shape`` its shape. What Dynamo's graph computes
    instead (a boolean mask for ``is_causal``, repeated keys for ``enable_gqa``) must be recognised as the same;
    ``recognised`` is the mask's kind in the report where it is simpler than what SDPA gets.
    """

    name: str
    length: int
    keys: int
    mask: str = "none"
    mask_shape: tuple[int, ...] | None = None
    recognised: str | None = None
    is_causal: bool = False
    enable_gqa: bool = False
    kind: str = "sdpa"
    reason: Reason = Reason.LONG_ENOUGH  # the answer to min_seq_len = 0

    @property
    def status(self) -> str:
        return "sparse" if self.reason.sparse else "dense"


def seeded(build: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> tuple[nn.Module, dict[str, Any]]:
    """The model and the inputs that ``build`` makes, always the same, without layers that start at zero."""
    torch.manual_seed(0)
    model, inputs = build()
    with torch.no_grad():
        for parameter in model.parameters():  # a layer of zeros hides what comes before it
            parameter += 0.05 * torch.randn_like(parameter)
    return model, inputs


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], tuple[nn.Module, dict[str, Any]]]
    attentions: tuple[Attention, ...]

    def make(self) -> tuple[nn.Module, dict[str, Any]]:
        """The model, in training mode, and its inputs by name; always the same."""
        model, inputs = seeded(self.build)
        return model.train(), inputs


def tensor_of(output: Any) -> Tensor:
    """The main tensor of what a model returns."""
    return output if isinstance(output, Tensor) else tensor_of(output[0])


def wan(layers: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=64,
        num_layers=layers,
        rope_max_seq_len=32,
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "return_dict": False,
    }
    return model, inputs


def hunyuan_video() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    padding = torch.ones(1, TEXT, dtype=torch.long)
    padding[:, 7:] = 0
    inputs = {
        "hidden_states": torch.randn(1, 4, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "encoder_attention_mask": padding,
        "pooled_projections": torch.randn(1, 8),
        "guidance": torch.tensor([6000.0]),
        "return_dict": False,
    }
    return model, inputs


def cogvideox() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=2 * WIDTH,
        sample_height=2 * HEIGHT,
        sample_frames=4 * FRAMES - 3,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )
    angles = torch.randn(TOKENS, 8).repeat_interleave(2, dim=1)
    inputs = {
        "hidden_states": torch.randn(1, FRAMES, 4, 2 * HEIGHT, 2 * WIDTH),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
        "return_dict": False,
    }
    return model, inputs


def ltx_video() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=16,
    )
    padding = torch.ones(1, TEXT, dtype=torch.long)
    padding[:, 7:] = 0
    inputs = {
        "hidden_states": torch.randn(1, TOKENS, 4),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": padding,
        "num_frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
        "return_dict": False,
    }
    return model, inputs


def flux() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )
    height, width = 17, 19
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    inputs = {
        "hidden_states": torch.randn(1, height * width, 8),
        "encoder_hidden_states": torch.randn(1, TEXT, 16),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([torch.zeros(height * width), rows.flatten(), columns.flatten()], -1),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }
    return model, inputs


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=40,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=8,
        pos_embed_max_size=20,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 34, 38),
        "encoder_hidden_states": torch.randn(2, TEXT, 16),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([500.0, 250.0]),
        "return_dict": False,
    }
    return model, inputs


def llama(attn_implementation: str = "sdpa") -> tuple[nn.Module, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attn_implementation=attn_implementation,
    )
    return LlamaModel(config), {"input_ids": torch.randint(97, (1, 333)), "use_cache": False}


def deepseek() -> tuple[nn.Module, dict[str, Any]]:
    """Latent attention: keys of 16 + 8 numbers, of which 8 carry the position, and values of 16."""
    from transformers import DeepseekV3Config, DeepseekV3Model

    config = DeepseekV3Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        max_position_embeddings=512,
        attn_implementation="sdpa",
    )
    return DeepseekV3Model(config), {"input_ids": torch.randint(97, (1, 333)), "use_cache": False}


def bert(attn_implementation: str = "sdpa") -> tuple[nn.Module, dict[str, Any]]:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=attn_implementation,
    )
    padding = torch.ones(2, 300, dtype=torch.long)
    padding[1, 170:] = 0
    return BertModel(config, add_pooling_layer=False), {
        "input_ids": torch.randint(97, (2, 300)),
        "attention_mask": padding,
    }


def vit(attn_implementation: str = "sdpa") -> tuple[nn.Module, dict[str, Any]]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=72,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=attn_implementation,
    )
    return ViTModel(config, add_pooling_layer=False), {"pixel_values": torch.randn(2, 3, 72, 72)}


def mha() -> tuple[nn.Module, dict[str, Any]]:
    x = torch.randn(2, 300, 32)
    return nn.MultiheadAttention(32, 2, batch_first=True), {"query": x, "key": x, "value": x, "need_weights": False}


def mha_padded() -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = mha()
    padding = torch.zeros(2, 300, dtype=torch.bool)
    padding[1, 170:] = True
    return model, {**inputs, "key_padding_mask": padding}


class CrossAttention(nn.Module):
    """nn.MultiheadAttention in its other layout, [L, B, C], with keys of another length and width."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(32, 2, kdim=24, vdim=24)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return x + self.attend(x, context, context, need_weights=False)[0]


def mha_cross() -> tuple[nn.Module, dict[str, Any]]:
    return CrossAttention(), {"x": torch.randn(300, 2, 32), "context": torch.randn(200, 2, 24)}


def _encoder_layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(32, 2, dim_feedforward=64, dropout=0.0, batch_first=True)


def encoder_layer() -> tuple[nn.Module, dict[str, Any]]:
    return _encoder_layer(), {"src": torch.randn(2, 300, 32)}


def encoder() -> tuple[nn.Module, dict[str, Any]]:
    return nn.TransformerEncoder(_encoder_layer(), num_layers=2), {"src": torch.randn(2, 300, 32)}


JOINT = TOKENS + TEXT
IMAGE = 17 * 19

CASES = (
    # diffusers: [B, L, H, D] seen as [B, H, L, D]; no mask unless text is padded.
    Case(
        "wan",
        wan,
        (
            Attention("blocks.0.attn1", TOKENS, TOKENS),
            Attention("blocks.0.attn2", TOKENS, TEXT),
            Attention("blocks.1.attn1", TOKENS, TOKENS),
            Attention("blocks.1.attn2", TOKENS, TEXT),
        ),
    ),
    Case(
        "hunyuan_video",  # padded text: a key-padding mask in joint attention, all pairs in the refiner
        hunyuan_video,
        (
            Attention(
                "context_embedder.token_refiner.refiner_blocks.0.attn",
                TEXT,
                TEXT,
                mask="bool",
                mask_shape=(1, 2, TEXT, TEXT),
            ),
            Attention("transformer_blocks.0.attn", JOINT, JOINT, mask="bool", mask_shape=(1, 1, 1, JOINT)),
            Attention("single_transformer_blocks.0.attn", JOINT, JOINT, mask="bool", mask_shape=(1, 1, 1, JOINT)),
        ),
    ),
    Case(
        "cogvideox",
        cogvideox,
        (
            Attention("transformer_blocks.0.attn1", JOINT, JOINT),
            Attention("transformer_blocks.1.attn1", JOINT, JOINT),
        ),
    ),
    Case(
        "ltx_video",  # padded text: 0 and -10000 are added to the scores of the cross-attention
        ltx_video,
        tuple(
            attention
            for layer in range(2)
            for attention in (
                Attention(f"transformer_blocks.{layer}.attn1", TOKENS, TOKENS),
                Attention(
                    f"transformer_blocks.{layer}.attn2",
                    TOKENS,
                    TEXT,
                    mask="additive",
                    mask_shape=(1, 2, 1, TEXT),
                    reason=Reason.ADDITIVE_MASK,
                ),
            )
        ),
    ),
    Case(
        "flux",
        flux,
        (
            Attention("transformer_blocks.0.attn", IMAGE + TEXT, IMAGE + TEXT),
            Attention("single_transformer_blocks.0.attn", IMAGE + TEXT, IMAGE + TEXT),
        ),
    ),
    Case(
        "sd3",
        sd3,
        (
            Attention("transformer_blocks.0.attn", IMAGE + TEXT, IMAGE + TEXT),
            Attention("transformer_blocks.0.attn2", IMAGE, IMAGE),
            Attention("transformer_blocks.1.attn", IMAGE + TEXT, IMAGE + TEXT),
        ),
    ),
    # transformers: while Dynamo traces, masks that eager mode leaves out are computed in the graph, and keys repeated.
    Case(
        "llama",
        llama,
        tuple(Attention(f"layers.{layer}.self_attn", 333, 333, is_causal=True, enable_gqa=True) for layer in range(2)),
    ),
    Case(
        "deepseek",
        deepseek,
        tuple(Attention(f"layers.{layer}.self_attn", 333, 333, is_causal=True) for layer in range(2)),
    ),
    Case(
        "bert",
        bert,
        tuple(
            Attention(f"encoder.layer.{layer}.attention.self", 300, 300, mask="bool", mask_shape=(2, 1, 300, 300))
            for layer in range(2)
        ),
    ),
    Case(
        "vit",  # transformers 5.17 computes a mask that hides nothing
        vit,
        tuple(Attention(f"layers.{layer}.attention", 325, 325) for layer in range(2)),
    ),
    # torch.nn: one call of F.multi_head_attention_forward; it makes an additive mask of a boolean padding mask,
    # which is boolean again where the call is opened.
    Case("mha", mha, (Attention("(root)", 300, 300, kind="mha"),)),
    Case(
        "mha_padded",
        mha_padded,
        (
            Attention(
                "(root)",
                300,
                300,
                mask="additive",
                mask_shape=(2, 2, 1, 300),
                recognised="bool",
                kind="mha",
            ),
        ),
    ),
    Case("mha_cross", mha_cross, (Attention("attend", 300, 200, kind="mha"),)),
    Case("encoder_layer", encoder_layer, (Attention("self_attn", 300, 300, kind="mha"),)),
    Case("encoder", encoder, tuple(Attention(f"layers.{layer}.self_attn", 300, 300, kind="mha") for layer in range(2))),
)
