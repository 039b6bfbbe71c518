r"""Stable Diffusion 3.5: an image of 4,096 tokens at 1024 × 1024 before 333 of text.

    python examples/pipelines/sd35.py
    python examples/pipelines/sd35.py --model stabilityai/stable-diffusion-3.5-medium \
        --arguments '{"height": 1440, "width": 1440}'

In the medium model the first blocks attend twice: to image and text (``attn``), and to the image alone (``attn2``).
"""

from compare import Recipe, keep_text, main

RECIPE = Recipe(
    hub="stabilityai/stable-diffusion-3.5-large",
    blocks=("JointTransformerBlock",),
    call={"height": 1024, "width": 1024, "num_inference_steps": 40, "guidance_scale": 4.5},
    grid=lambda pipe, call: (1, call["height"] // 16, call["width"] // 16),
    options=keep_text,
)

if __name__ == "__main__":
    rows = main(RECIPE)
