"""Stable Diffusion XL: a U-Net, whose levels have grids of their own.

    python examples/pipelines/sdxl.py --arguments '{"height": 2048, "width": 2048}'

At 1024 × 1024 the upper level has 4,096 tokens in 10 blocks, the lower 1,024 in 60. Text is another sequence:
attention to it (``attn2``) stays dense.
"""

from compare import Recipe, main

RECIPE = Recipe(
    hub="stabilityai/stable-diffusion-xl-base-1.0",
    models=("unet",),
    call={"height": 1024, "width": 1024, "num_inference_steps": 50, "guidance_scale": 5.0},
    grid=lambda pipe, call: {
        level: (1, call["height"] // stride, call["width"] // stride)
        for level, stride in {
            "down_blocks.1.*": 16,
            "up_blocks.1.*": 16,
            "down_blocks.2.*": 32,
            "mid_block.*": 32,
            "up_blocks.0.*": 32,
        }.items()
    },
)

if __name__ == "__main__":
    rows = main(RECIPE)
