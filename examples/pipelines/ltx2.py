"""LTX-2: video and sound, two streams that attend to themselves, to the text and to each other.

    python examples/pipelines/ltx2.py

Self-attention of the video (``attn1``) becomes sparse, and where it pays so does what the sound reads of the video
(``video_to_audio_attn``). Sound has some hundred tokens, so its own attention and what attends to it stay dense, as
does attention to the text. The clip is drawn without its sound.
"""

from compare import Recipe, main

RECIPE = Recipe(
    hub="Lightricks/LTX-2",
    call={"height": 512, "width": 768, "num_frames": 121, "num_inference_steps": 40, "frame_rate": 24.0},
    grid=lambda pipe, call: ((call["num_frames"] - 1) // 8 + 1, call["height"] // 32, call["width"] // 32),
    fps=24,
)

if __name__ == "__main__":
    rows = main(RECIPE)
