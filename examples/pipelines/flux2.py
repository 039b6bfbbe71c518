"""FLUX.2: an image of 4,096 tokens at 1024 × 1024 behind 512 of text.

    python examples/pipelines/flux2.py
    python examples/pipelines/flux2.py --arguments '{"height": 2048, "width": 2048}'

The first blocks put text and image together, the others get them as one: compiled one by one, these do not show where
the text ends. The pipeline pads it to ``max_sequence_length``, so numbers say it.
"""

from compare import Recipe, main

RECIPE = Recipe(
    hub="black-forest-labs/FLUX.2-dev",
    call={"height": 1024, "width": 1024, "num_inference_steps": 50, "guidance_scale": 4.0, "max_sequence_length": 512},
    grid=lambda pipe, call: (call["max_sequence_length"], 1, call["height"] // 16, call["width"] // 16, 0),
    options=lambda pipe, call: {"keep_keys": call["max_sequence_length"], "dense_queries": True},
)

if __name__ == "__main__":
    rows = main(RECIPE)
