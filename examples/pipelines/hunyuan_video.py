"""HunyuanVideo: video and text are one sequence, the text behind the video and padded to 256 tokens.

    python examples/pipelines/hunyuan_video.py

All blocks attend jointly; padding of the text is a key mask, which is obeyed. The text's keys are always read, and its
own rows see everything.
"""

from compare import Recipe, keep_text, main

RECIPE = Recipe(
    hub="hunyuanvideo-community/HunyuanVideo",
    call={"height": 720, "width": 1280, "num_frames": 129, "num_inference_steps": 50, "guidance_scale": 6.0},
    grid=lambda pipe, call: ((call["num_frames"] - 1) // 4 + 1, call["height"] // 16, call["width"] // 16),
    options=keep_text,
    fps=24,
)

if __name__ == "__main__":
    rows = main(RECIPE)
