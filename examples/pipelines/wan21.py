r"""Wan 2.1: text to video, 1.3B at 480p or 14B at 720p.

    python examples/pipelines/wan21.py --model Wan-AI/Wan2.1-T2V-14B-Diffusers \
        --arguments '{"height": 720, "width": 1280}'

Video and text are two sequences: self-attention (``attn1``) becomes sparse, attention to the 512 tokens of the text
(``attn2``) stays dense, and no text is to be kept. The first fifth of the steps lays out the scene: ``--dense-steps
10``.
"""

from compare import Recipe, main

RECIPE = Recipe(
    hub="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    call={"height": 480, "width": 832, "num_frames": 81, "num_inference_steps": 50, "guidance_scale": 5.0},
    grid=lambda pipe, call: ((call["num_frames"] - 1) // 4 + 1, call["height"] // 16, call["width"] // 16),
    fps=16,
)

if __name__ == "__main__":
    rows = main(RECIPE)
