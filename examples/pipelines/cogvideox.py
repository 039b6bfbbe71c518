"""CogVideoX: 226 tokens of text before the video, in one sequence.

    python examples/pipelines/cogvideox.py

The text's keys are always read, and its own rows see everything.
"""

from compare import Recipe, keep_text, main

RECIPE = Recipe(
    hub="zai-org/CogVideoX-5b",
    blocks=("CogVideoXBlock",),
    call={"height": 480, "width": 720, "num_frames": 49, "num_inference_steps": 50, "guidance_scale": 6.0},
    grid=lambda pipe, call: ((call["num_frames"] - 1) // 4 + 1, call["height"] // 16, call["width"] // 16),
    options=keep_text,
    fps=8,
)

if __name__ == "__main__":
    rows = main(RECIPE)
