"""FLUX.1: an image of 4,096 tokens at 1024 × 1024 behind 512 of text.

    python examples/pipelines/flux.py
    python examples/pipelines/flux.py --arguments '{"height": 2048, "width": 2048}'

The pipeline lays out the tokens, so no graph shows their grid: the recipe says it.
"""

from compare import Recipe, keep_text, main

RECIPE = Recipe(
    hub="black-forest-labs/FLUX.1-dev",
    call={"height": 1024, "width": 1024, "num_inference_steps": 28, "guidance_scale": 3.5, "max_sequence_length": 512},
    grid=lambda pipe, call: (1, call["height"] // 16, call["width"] // 16),
    options=keep_text,
)

if __name__ == "__main__":
    rows = main(RECIPE)
