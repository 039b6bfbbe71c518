"""Qwen-Image: an image of 6,889 tokens at 1328 × 1328 behind as many as its text has.

    python examples/pipelines/qwen_image.py

Guidance is a second call with the negative prompt, whose text is of another length: sizes become symbols after it.
"""

from compare import Recipe, keep_text, main

RECIPE = Recipe(
    hub="Qwen/Qwen-Image",
    call={"height": 1328, "width": 1328, "num_inference_steps": 50, "negative_prompt": " ", "true_cfg_scale": 4.0},
    grid=lambda pipe, call: (1, call["height"] // 16, call["width"] // 16),
    options=keep_text,
)

if __name__ == "__main__":
    rows = main(RECIPE)
