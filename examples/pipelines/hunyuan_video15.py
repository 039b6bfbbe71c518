"""HunyuanVideo 1.5: 8.3B, a VAE of 16 pixels, and a text that comes from two encoders.

    python examples/pipelines/hunyuan_video15.py

Video and text are one sequence in all blocks. The pipeline has no ``callback_on_step_end``, so nothing tells in which
step a run is: ``--dense-steps`` is refused; ``handle.set_step`` in a loop of your own is the way.
"""

from compare import Recipe, keep_text, main

RECIPE = Recipe(
    hub="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v",
    call={"height": 720, "width": 1280, "num_frames": 121, "num_inference_steps": 50},
    grid=lambda pipe, call: ((call["num_frames"] - 1) // 4 + 1, call["height"] // 16, call["width"] // 16),
    options=keep_text,
    fps=24,
)

if __name__ == "__main__":
    rows = main(RECIPE)
