"""What calls of other libraries mean: alignment of causality, layouts, and what is refused by name."""

from __future__ import annotations

import pytest

from sparge_compile.dialects import BOTTOM_RIGHT, TOP_LEFT, Meaning, Unspoken, dialect_of, understand
from sparge_compile.report import Reason

FLASH_2 = {
    "dropout_p": 0.0,
    "softmax_scale": 0.5,
    "causal": False,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
    "return_softmax": False,
}
PACKED = {"cu_seqlens_q": "cq", "cu_seqlens_k": "ck", "max_seqlen_q": 7, "max_seqlen_k": 9}
SAGE = {"tensor_layout": "HND", "is_causal": False, "sm_scale": None, "return_lse": False}
EFFICIENT = {"bias": None, "custom_mask_type": 0, "scale": None}


def said(name, arguments, operands=("q", "k", "v"), **changes):
    given = {**dict(zip(operands, "QKV", strict=True)), **arguments}
    dialect = dialect_of(name, given)
    assert dialect is not None
    return understand(dialect, {**given, **changes}, arguments)


@pytest.mark.parametrize(
    "name, needs, kind",
    [
        ("_flash_attn_forward", "q k v dropout_p softmax_scale causal", "flash_attn"),
        ("flash_attn_varlen_func", "q k v cu_seqlens_q softmax_scale causal", "flash_attn"),
        ("_varlen_attn", "query key value cu_seq_q cu_seq_k max_q max_k is_causal", "varlen"),
        ("flash_fwd", "query key value cu_seqlens_q softmax_scale is_causal", "xformers"),
        ("sageattn", "q k v tensor_layout sm_scale", "sage"),
        ("_flash_attn_forward", "q k v", None),
        ("_flash_attn_backward", "dout q k v softmax_scale causal", None),
        ("my_attention", "q k v softmax_scale causal", None),
    ],
)
def test_a_dialect_is_told_by_name_and_arguments(name, needs, kind):
    dialect = dialect_of(name, needs.split())
    assert (dialect.kind if dialect else None) == kind


def test_flash_attention_is_aligned_to_the_bottom_right():
    assert said("_flash_attn_forward", FLASH_2) == Meaning("Q", "K", "V", scale=0.5)
    assert said("_flash_attn_forward", FLASH_2, causal=True).causal == BOTTOM_RIGHT
    assert said("_flash_attn_forward", FLASH_2, window_size_right=0).causal == BOTTOM_RIGHT
    assert said("_flash_attn_forward", FLASH_2, causal=True, window_size_right=5).causal == BOTTOM_RIGHT


def test_packed_sequences():
    meaning = said("_flash_attn_varlen_forward", {**FLASH_2, **PACKED, "block_table": None})
    assert (meaning.layout, meaning.cu_seqlens_q, meaning.max_seqlen_k) == ("thd", "cq", 9)
    assert said("_flash_attn_forward", {**FLASH_2, **dict.fromkeys(PACKED)}).layout == "blhd"
    alone = said("_flash_attn_forward", {**FLASH_2, **dict.fromkeys(PACKED)}, cu_seqlens_k="ck")
    assert isinstance(alone, Unspoken) and alone.reason is Reason.ARGUMENT


def test_layouts_and_alignments_of_others():
    assert said("sageattn", SAGE, is_causal=True) == Meaning("Q", "K", "V", layout="bhld", causal=TOP_LEFT)
    assert said("sageattn", SAGE, tensor_layout="NHD").layout == "blhd"
    assert said("sageattn", SAGE, tensor_layout="DNH").reason is Reason.LAYOUT
    operands = ("query", "key", "value")
    causal = [said("_efficient_attention_forward", EFFICIENT, operands, custom_mask_type=i).causal for i in range(3)]
    assert causal == ["", TOP_LEFT, BOTTOM_RIGHT]
    varlen = {"cu_seq_q": "c", "cu_seq_k": "c", "max_q": 5, "max_k": 5, "is_causal": False, "window_size": None}
    assert said("_varlen_attn", varlen, operands, window_size=[-1, 0]).causal == BOTTOM_RIGHT
    assert said("_varlen_attn", varlen, operands).causal == ""
    assert said("_varlen_attn", {**varlen, "backend": 0}, operands, backend=3).layout == "thd"


@pytest.mark.parametrize(
    "changes, reason, detail",
    [
        ({"window_size_left": 128}, Reason.WINDOW, "window_size = (128, -1)"),
        ({"window_size_right": 3}, Reason.WINDOW, "window_size = (-1, 3)"),
        ({"window_size_left": 128, "causal": True}, Reason.WINDOW, "window_size = (128, -1)"),
        ({"softcap": 30.0}, Reason.SOFTCAP, "softcap = 30.0"),
        ({"alibi_slopes": "slopes"}, Reason.ALIBI, "alibi_slopes = slopes"),
        ({"block_table": "table"}, Reason.PAGED, "block_table = table"),
        ({"page_table": "table"}, Reason.PAGED, "page_table = table"),
        ({"seqused_k": "used"}, Reason.ARGUMENT, "seqused_k = used"),
        ({"out": "out"}, Reason.ARGUMENT, "out = out"),
        ({"attention_chunk": 64}, Reason.ARGUMENT, "attention_chunk = 64"),
        ({"what_comes_next": True}, Reason.ARGUMENT, "what_comes_next = True"),
    ],
)
def test_what_is_refused(changes, reason, detail):
    assert said("_flash_attn_forward", FLASH_2, **changes) == Unspoken(reason, detail)


def test_what_does_not_matter():
    arguments = {**FLASH_2, "attention_chunk": 0, "what_comes_next": 3, "page_table": None}
    meaning = said("_flash_attn_forward", arguments, num_splits=4, pack_gqa=True, deterministic=True, softcap=-1.0)
    assert meaning == Meaning("Q", "K", "V", scale=0.5)


def test_dropout_and_a_mask_are_handed_on():
    assert said("_flash_attn_forward", FLASH_2, dropout_p=0.1).dropout == 0.1
    assert said("memory_efficient_attention_forward", {"b": None, "p": 0.0, "scale": None}, b="bias").mask == "bias"
