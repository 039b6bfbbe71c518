"""MiniMax-H3: text, sound and a clip of 37,296 tokens at 1344 × 768 and 124 frames in one stream, in this order.

    python examples/pipelines/minimax_h3.py
    python examples/pipelines/minimax_h3.py --offload model

It is a modular pipeline of diffusers, and of its workflows this is text to video and sound (its frames are drawn, the
sound is not). Everything is put together before the blocks, and the text is as long as it is: the grid of the clip
stands behind what the sequence has left (-1), and what is kept ends where the clip begins. The last of
``num_inference_steps`` is no call of the model.
"""

from typing import Any

import torch
from compare import Recipe, main


def tokens_of(call: Any) -> tuple[int, int, int]:
    """Frames, rows and columns of a clip: 17 frames are 5 of the tokens, and 5 more are 2."""
    return (call["num_frames"] - 5) // 17 * 5 + 2, call["height"] // 32, call["width"] // 32


def load(name: str, dtype: torch.dtype) -> Any:
    from diffusers import ComponentsManager, ModularPipeline

    pipe = ModularPipeline.from_pretrained(name, workflow="t2va", components_manager=ComponentsManager())
    pipe.load_components(dtype=dtype)
    return pipe


def run(pipe: Any, prompt: str, call: Any) -> Any:
    """The frames of the clip; the pipeline has no step without decoding them."""
    return pipe(prompt=prompt, output="videos", **{**call, "output_type": "np"})[0]


def text_and_sound(pipe: Any, call: Any) -> dict[str, Any]:
    frames, rows, columns = tokens_of(call)
    return {"keep_keys": (0, -frames * rows * columns), "dense_queries": True}


RECIPE = Recipe(
    hub="MiniMaxAI/MiniMax-H3",
    call={"height": 768, "width": 1344, "num_frames": 124, "num_inference_steps": 50},
    grid=lambda pipe, call: (-1, *tokens_of(call), 0),
    options=text_and_sound,
    fps=24,
    load=load,
    run=run,
)

if __name__ == "__main__":
    rows = main(RECIPE)
