"""Text encoders with random weights and tokenizers that take any text, a byte for a token: built without network."""

from __future__ import annotations

from typing import Any

import torch

PAD, END, UNKNOWN, START = range(4)
WIDTH = 16  # of every text encoder here
_SPECIAL = {"<pad>": PAD, "</s>": END, "<unk>": UNKNOWN, "<s>": START}
VOCABULARY = len(_SPECIAL) + 256

_CHAT = "{% for m in messages %}{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}{% endfor %}"


def tokenizer(length: int = 32) -> Any:
    """Bytes as tokens, at most so many, and an end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({**_SPECIAL, **{x: len(_SPECIAL) + i for i, x in enumerate(alphabet)}}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    made = PreTrainedTokenizerFast(tokenizer_object=bytewise, model_max_length=length, **names)
    made.chat_template = _CHAT
    return made


def seeded(kind: Any, config: Any) -> Any:
    torch.manual_seed(1)
    return kind(config).eval()


def t5(kind: str = "T5", width: int = WIDTH) -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return seeded(getattr(transformers, f"{kind}EncoderModel"), config)


def clip(projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=3,
        projection_dim=WIDTH,
        max_position_embeddings=80,
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=END,
    )
    return seeded(CLIPTextModelWithProjection if projected else CLIPTextModel, config)


DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "bos_token_id": START,
    "eos_token_id": END,
}


def decoder(kind: str) -> Any:
    """A language model of transformers by the name of its family."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**DECODER)
    return seeded(getattr(transformers, f"{kind}Model"), config)


_ROTARY = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}}


def qwen_vl_text() -> Any:
    from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    return seeded(Qwen2_5_VLTextModel, Qwen2_5_VLTextConfig(**DECODER, **_ROTARY))


def qwen_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    config = Qwen2_5_VLConfig(text_config={**DECODER, **_ROTARY}, vision_config=eyes)
    return seeded(Qwen2_5_VLForConditionalGeneration, config)


def qwen3_vl(layers: int) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    text = {**DECODER, "num_hidden_layers": layers, "head_dim": 8, **_ROTARY}
    config = Qwen3VLConfig(text_config=text, vision_config={**eyes, "deepstack_visual_indexes": [0]})
    return seeded(Qwen3VLForConditionalGeneration, config)


def mistral3() -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    eyes = {"model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    eyes = {**eyes, "intermediate_size": 16, "image_size": 32, "patch_size": 8}
    config = Mistral3Config(text_config={"model_type": "mistral", **DECODER}, vision_config=eyes)
    return seeded(Mistral3ForConditionalGeneration, config)


def gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    eyes = {**eyes, "image_size": 32, "patch_size": 8}
    config = Gemma3Config(text_config={**DECODER, "head_dim": 8}, vision_config=eyes, mm_tokens_per_image=4)
    return seeded(Gemma3ForConditionalGeneration, config)
