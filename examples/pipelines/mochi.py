"""Mochi 1: text behind the video in one sequence, of which each prompt has as many tokens as it has.

    python examples/pipelines/mochi.py

Its attention looks up which tokens of the text are padding, a size that hangs on data. Dynamo breaks the graph there,
in a loop, which leaves the attention to Python; told to, it traces such sizes. The text's keys are always read, and
its own rows see everything. With guidance each half of the batch is a site of its own: ``attn1`` and ``attn1#1``.
"""

import torch
from compare import Recipe, keep_text, main

torch._dynamo.config.capture_dynamic_output_shape_ops = True

RECIPE = Recipe(
    hub="genmo/mochi-1-preview",
    blocks=("MochiTransformerBlock",),
    call={"height": 480, "width": 848, "num_frames": 85, "num_inference_steps": 64, "guidance_scale": 4.5},
    grid=lambda pipe, call: ((call["num_frames"] - 1) // 6 + 1, call["height"] // 16, call["width"] // 16),
    options=keep_text,
    fps=30,
)

if __name__ == "__main__":
    rows = main(RECIPE)
