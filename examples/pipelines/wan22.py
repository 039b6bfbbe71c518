r"""Wan 2.2: two experts, of which each has its own steps, and its own calibration; or the 5B model, which has one.

    python examples/pipelines/wan22.py
    python examples/pipelines/wan22.py --model Wan-AI/Wan2.2-TI2V-5B-Diffusers \
        --arguments '{"height": 704, "num_frames": 121}'

``transformer`` draws the noisy steps and ``transformer_2`` the rest (``boundary_ratio`` of the pipeline). Both run the
same code, so what is compiled for one serves the other. Text is another sequence, as in Wan 2.1.
"""

from compare import Recipe, main

RECIPE = Recipe(
    hub="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    models=("transformer", "transformer_2"),
    call={"height": 720, "width": 1280, "num_frames": 81, "num_inference_steps": 40, "guidance_scale": 4.0},
    grid=lambda pipe, call: (
        (call["num_frames"] - 1) // 4 + 1,
        call["height"] // (2 * pipe.vae_scale_factor_spatial),
        call["width"] // (2 * pipe.vae_scale_factor_spatial),
    ),
    fps=16,
)

if __name__ == "__main__":
    rows = main(RECIPE)
