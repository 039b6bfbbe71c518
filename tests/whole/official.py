"""Stand-ins of the attention modules of official repositories, tiny: their layers and their sequence of calls.

Wan 2.1 and 2.2, HunyuanVideo, Open-Sora 2, Mochi and LongCat-Video, where flash-attn is installed. Inputs are tokens
[B, L, C]; a text joins them where the model is a joint one.
"""

from __future__ import annotations

import flash_2
import flash_3
import torch
from torch import Tensor, nn

HEADS, SIZE = 2, 16
WIDTH = HEADS * SIZE


def starts(lengths: Tensor) -> Tensor:
    """Where packed sequences of these lengths begin, and where the last one ends."""
    return torch.cat([lengths.new_zeros([1]), lengths]).cumsum(0, dtype=torch.int32)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding of x [B, L, H, D] by angles [L, D/2]."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)


class Wan(nn.Module):
    """Self-attention: the batch is folded into the rows of a varlen call, one length for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        q = rotate(self.norm_q(self.q(x)).view(batch, length, HEADS, SIZE), angles)
        k = rotate(self.norm_k(self.k(x)).view(batch, length, HEADS, SIZE), angles)
        v = self.v(x).view(batch, length, HEADS, SIZE)
        lengths = torch.full((batch,), length, dtype=torch.int32)
        out = flash_3.flash_attn_varlen_func(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), starts(lengths), starts(lengths), length, length
        )
        return self.o(out.unflatten(0, (batch, length)).flatten(2))


class Hunyuan(nn.Module):
    """Joint attention: image and text of each sample in one sequence, and the padding of its text in another."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.out = (
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x: Tensor, text: Tensor, padding: Tensor) -> Tensor:
        batch, length = x.shape[0], x.shape[1] + text.shape[1]
        used = padding.sum(1).to(torch.int32) + x.shape[1]
        ends = torch.arange(1, batch + 1, dtype=torch.int32) * length
        cu_q, cu_k = (
            torch.cat([used.new_zeros(1), torch.stack([ends - length + used, ends], 1).flatten()]) for _ in "qk"
        )
        parts = (self.image(x), self.text(text))
        qkv = torch.cat([part.unflatten(2, (3, HEADS, SIZE)) for part in parts], 1)
        q, k, v = (each.flatten(0, 1) for each in qkv.unbind(2))
        out = flash_2.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=length, max_seqlen_k=length
        )
        return self.out(out.unflatten(0, (batch, length)).flatten(2))[:, : x.shape[1]]


class OpenSora(nn.Module):
    """Joint attention by the fixed-length call: heads come first for the rotation, and go back for the call."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        qkv = self.qkv(torch.cat([text, x], 1)).unflatten(2, (3, HEADS, SIZE))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k, v = ((each * 1.0).transpose(1, 2) for each in (q, k, v))
        out = flash_3.flash_attn_func(q, k, v)
        return self.out(out.flatten(2))[:, text.shape[1] :]


class Mochi(nn.Module):
    """Joint attention of a packed qkv: the valid tokens of all samples, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, valid: Tensor, cu: Tensor, cu_k: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        qkv = self.qkv(rows.index_select(0, valid)).unflatten(1, (3, HEADS, SIZE))
        out = flash_2.flash_attn_varlen_func(
            qkv, cu_seqlens_q=cu, cu_seqlens_k=cu_k, max_seqlen_q=x.shape[1], max_seqlen_k=x.shape[1]
        )
        return torch.zeros_like(rows).index_copy(0, valid, self.out(out.flatten(1))).view_as(x)


class LongCat(nn.Module):
    """Self-attention by flash-attn 2: heads first, and transposed around the call."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm_q, self.norm_k = nn.RMSNorm(SIZE), nn.RMSNorm(SIZE)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        out = flash_2.flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=SIZE**-0.5)
        return self.out(out.reshape(*x.shape))


def hunyuan_inputs() -> tuple[Tensor, ...]:
    return torch.randn(2, 140, WIDTH), torch.randn(2, 12, WIDTH), (torch.arange(12) < torch.tensor([[7], [12]]))


def mochi_inputs() -> tuple[Tensor, ...]:
    lengths = torch.tensor([150, 90], dtype=torch.int32)
    valid = torch.cat([torch.arange(150), 150 + torch.arange(90)])
    return torch.randn(2, 150, WIDTH), valid, starts(lengths), starts(lengths)


OFFICIAL = {
    "Wan 2.1": (Wan, lambda: (torch.randn(2, 150, WIDTH), torch.randn(150, SIZE // 2)), "varlen"),
    "HunyuanVideo": (Hunyuan, hunyuan_inputs, "varlen"),
    "Open-Sora 2": (OpenSora, lambda: (torch.randn(2, 140, WIDTH), torch.randn(2, 12, WIDTH)), "flash_attn"),
    "Mochi": (Mochi, mochi_inputs, "varlen"),
    "LongCat-Video": (LongCat, lambda: (torch.randn(2, 150, WIDTH),), "flash_attn"),
}
