"""LTX-Video: tokens of 32 pixels and 8 frames, so few of them: at 704 × 512 and 161 frames 7,392.

    python examples/pipelines/ltx.py
    python examples/pipelines/ltx.py --arguments '{"height": 704, "width": 1216, "num_frames": 257}'

Text is another sequence: attention to it (``attn2``) stays dense.
"""

from compare import Recipe, main

RECIPE = Recipe(
    hub="Lightricks/LTX-Video",
    call={"height": 512, "width": 704, "num_frames": 161, "num_inference_steps": 50},
    grid=lambda pipe, call: ((call["num_frames"] - 1) // 8 + 1, call["height"] // 32, call["width"] // 32),
    fps=24,
)

if __name__ == "__main__":
    rows = main(RECIPE)
