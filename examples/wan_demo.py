"""A Wan video transformer, dense and sparse, on a clip: the report, then sparsity, time and error by thresholds.

The model is diffusers' WanTransformer3DModel at reduced width with random weights, the clip a pan over a photograph.
Exits with 1 if keeping every block does not give dense attention, or if a figure belongs to another computation.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import diffusers
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image
from tabulate import tabulate
from torch import Tensor

import sparge_compile

THRESHOLDS = ((1.0, 0.0), (0.5, 0.6), (0.2, 0.0), (0.05, 0.0), (0.03, 0.2))  # (topk, topp)
PHOTO = "china.jpg"  # scikit-learn bundles it
PIXELS = 264  # side of a frame: 66 x 66 latents, 33 x 33 tokens, which neither 64 nor 128 divides
TOKENS_A_FRAME = (PIXELS // 8) ** 2
MIN_SEQ_LEN = 1024  # the text is shorter and stays dense
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest entry, for rounding in another order

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
inner = "inductor" if device.type == "cuda" else "eager"  # on a CPU, compiling takes longer than it saves here
start = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - start:5.1f} s] {text}", flush=True)


def clip_latents(frames: int) -> Tensor:
    """[1, 48, frames, 66, 66]: a window that pans over the photograph; 4 x 4 pixels a latent, in the place of a VAE."""
    image = torch.tensor(load_sample_image(PHOTO)).permute(2, 0, 1) / 127.5 - 1  # [3, height, width]
    top = (image.shape[1] - PIXELS) // 2
    lefts = torch.linspace(0, image.shape[2] - PIXELS, frames).round().int().tolist()
    windows = torch.stack([image[:, top : top + PIXELS, left : left + PIXELS] for left in lefts])
    return F.pixel_unshuffle(windows, 4).transpose(0, 1).unsqueeze(0)


def build(args: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """The model and its inputs: latents half way to noise, timestep 500, random text embeddings."""
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=48,
        out_channels=48,
        text_dim=64,
        freq_dim=64,
        ffn_dim=256,
        num_layers=args.layers,
    )
    latents = clip_latents(frames=-(-args.tokens // TOKENS_A_FRAME))
    inputs = {
        "hidden_states": (0.5 * latents + 0.5 * torch.randn_like(latents)).to(device, dtype),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": torch.randn(1, 64, 64).to(device, dtype),
    }
    diffusers.utils.logging.set_verbosity_error()  # it warns of every cast, also of one to the same dtype
    return model.to(device, dtype).eval(), inputs


def timed(call: Callable[..., Tensor], *args) -> float:
    """Seconds of one call."""
    before = time.perf_counter()
    call(*args).sum().item()  # waits for a GPU
    return time.perf_counter() - before


def watch(
    output: Callable[..., Tensor], model: torch.nn.Module, topk: float, topp: float
) -> tuple[Tensor, float, float]:
    """The model's output with sparse self-attention put in by hand, the sparsity, and the error of attention.

    The error is the mean over layers of sum |sparse - dense| / sum |dense|, on the same queries, keys and values.
    """
    dense_attention, sparsities, errors = F.scaled_dot_product_attention, [], []

    def attention(query: Tensor, key: Tensor, value: Tensor, **kwargs) -> Tensor:
        dense = dense_attention(query, key, value, **kwargs)
        if key.shape[2] < MIN_SEQ_LEN:
            return dense
        kwargs.update(topk=topk, topp=topp, return_sparsity=True)
        sparse, sparsity = sparge_compile.attention(query, key, value, **kwargs)
        sparsities.append(sparsity.item())
        errors.append(((sparse - dense).abs().sum() / dense.abs().sum()).item())
        return sparse

    F.scaled_dot_product_attention = attention
    try:
        return output(model), statistics.mean(sparsities), statistics.mean(errors)
    finally:
        F.scaled_dot_product_attention = dense_attention


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help=f"at least so many; {TOKENS_A_FRAME} a frame (8192)")
    parser.add_argument("--layers", type=int, default=2, help="transformer blocks (2)")
    parser.add_argument("--steps", type=int, default=3, help="timed rounds over all rows; the median counts (3)")
    args = parser.parse_args()
    if min(args.tokens, args.layers, args.steps) < 1:
        parser.error("--tokens, --layers and --steps are at least 1")

    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, sparge_compile {sparge_compile.__version__}")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, {dtype}, inner={inner!r}\n")
    model, inputs = build(args)
    frames = inputs["hidden_states"].shape[2]
    say(f"Wan, random weights, {args.layers} layers, 2 heads of 64; {frames} frames, {frames * TOKENS_A_FRAME} tokens")
    options = {"min_seq_len": MIN_SEQ_LEN, "inner": inner}
    print(f"\n{sparge_compile.explain(model, options)(**inputs)}\n")

    def output(call: Callable[..., tuple[Tensor]]) -> Tensor:
        return call(**inputs, return_dict=False)[0]

    models = [torch.compile(model, backend=inner, fullgraph=True)]
    dense = output(models[0])
    tolerance, results, faults = TOLERANCE[dtype] * dense.abs().max().item(), [], []
    for topk, topp in THRESHOLDS:
        settings = {**options, "topk": topk, "topp": topp}
        models.append(torch.compile(model, backend="sparge", fullgraph=True, options=settings))
        sparse = output(models[-1])
        watched, sparsity, attention_error = watch(output, model, topk, topp)
        results.append((f"{sparsity:.1%}", ((sparse - dense).norm() / dense.norm()).item(), attention_error))
        say(f"topk {topk}, topp {topp}: compiled; sparsity {sparsity:.1%}")
        if not (sparse - watched).abs().max() <= tolerance:
            faults.append(f"topk {topk}, topp {topp}: the compiled model differs from what was watched")
        if topk == 1:
            difference = (sparse - dense).abs().max().item()
            say(f"every block kept: max |sparse - dense| = {difference:.1e}, allowed {tolerance:.1e}")
            if not difference <= tolerance:
                faults.append("topk 1 does not give dense attention")

    rounds = []
    for step in range(args.steps):
        rounds.append([timed(output, each) for each in models])
        say(f"timed, round {step + 1} of {args.steps}")
    dense_time, *sparse_times = map(statistics.median, zip(*rounds, strict=True))
    rows = [
        (*thresholds, sparsity, dense_time, sparse_time, dense_time / sparse_time, *errors)
        for thresholds, (sparsity, *errors), sparse_time in zip(THRESHOLDS, results, sparse_times, strict=True)
    ]
    headers = ("topk", "topp", "sparsity", "dense s", "sparse s", "speed-up", "output error", "attention error")
    formats = ("g", "g", "", ".2f", ".2f", ".2f", ".1e", ".1e")
    print(f"\n{tabulate(rows, headers=headers, floatfmt=formats, stralign='right')}\n")
    print("Seconds: the whole model. Output error: relative, Euclidean. Attention error: relative L1, mean of layers.")
    print("Random weights have no attention structure: these errors say nothing of the quality of a trained model.")
    for fault in faults:
        print(f"FAULT: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
