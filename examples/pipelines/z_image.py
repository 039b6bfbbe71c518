"""Z-Image: one stream, an image of 4,096 tokens at 1024 × 1024 before its text.

    python examples/pipelines/z_image.py

Image and text are put together before the blocks, so numbers say where the text is: behind the image, as long as it
may be. How long it is differs from prompt to prompt: -1 in the grid is what the sequence has left. The blocks of
``noise_refiner`` see the image alone; those of ``context_refiner`` the text, in which nothing is dropped.
"""

from compare import Recipe, main

MOST_TEXT = 1 << 20  # what lies beyond the sequence is cut off

RECIPE = Recipe(
    hub="Tongyi-MAI/Z-Image-Turbo",
    call={"height": 1024, "width": 1024, "num_inference_steps": 9, "guidance_scale": 0.0},
    grid=lambda pipe, call: dict.fromkeys(
        ("layers.*", "noise_refiner.*"), (0, 1, call["height"] // 16, call["width"] // 16, -1)
    ),
    options=lambda pipe, call: {
        "keep_keys": (call["height"] // 16 * (call["width"] // 16), MOST_TEXT),
        "dense_queries": True,
    },
)

if __name__ == "__main__":
    rows = main(RECIPE)
