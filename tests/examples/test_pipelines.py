"""The scripts of examples/pipelines on tiny pipelines: each from a folder to its table and its picture."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

PIPELINES = Path(__file__).parents[2] / "examples" / "pipelines"
VIDEO = {"height": 192, "width": 192, "num_frames": 9, "max_sequence_length": 16}
LARGE = {"height": 448, "width": 448, "num_frames": 9}  # more tokens than the text, which has 1,985
LONG = {"height": 256, "width": 256, "num_frames": 33, "max_sequence_length": 16}
SOUND = {"height": 160, "width": 160, "num_frames": 124, "num_inference_steps": 3}  # five seconds are the least
IMAGE = {"height": 256, "width": 256, "max_sequence_length": 32}
ONE_CALL = {  # of LTX-2's guidance, which has four calls a step
    **{f"{of}guidance_scale": 1.0 for of in ("", "audio_")},
    **{f"{of}modality_scale": 1.0 for of in ("", "audio_")},
    **{f"{of}stg_scale": 0.0 for of in ("", "audio_")},
    "spatio_temporal_guidance_blocks": None,
}
JOINT = "keeps text with dense queries"


class Case(NamedTuple):
    """Who builds the pipeline, arguments of its call, how many sites are sparse, a word of the report, what else."""

    build: str
    call: dict[str, Any]
    sparse: str
    word: str
    more: tuple[str, ...] = ()


CASES = {
    "wan21": Case("wan", VIDEO, "2 of 4", "tiles 2×4×8 of 3×12×12"),
    "wan22": Case("wan22", VIDEO, "2 of 4", "tiles 2×4×8 of 3×12×12"),
    "hunyuan_video": Case("hunyuan_video", VIDEO, "2 of 3", JOINT),
    "hunyuan_video15": Case("hunyuan_video15", LARGE, "2 of 3", JOINT, ("--min-seq-len", "1024", "--sparsity", "0.2")),
    "ltx": Case("ltx", LONG, "2 of 4", "tiles 2×4×8 of 5×8×8"),
    "ltx2": Case("ltx2", LONG | ONE_CALL, "4 of 12", "tiles 2×4×8 of 5×8×8"),
    "cogvideox": Case("cogvideox", VIDEO, "2 of 2", JOINT),
    "mochi": Case("mochi", VIDEO | {"num_frames": 13}, "4 of 5", JOINT),
    "flux": Case("flux", IMAGE, "3 of 3", "tiles 1×8×8 of 1×16×16 with 32 before"),
    "flux2": Case("flux2", IMAGE | {"text_encoder_out_layers": [1, 2, 3]}, "3 of 3", "with 32 before"),
    "qwen_image": Case("qwen_image", IMAGE, "2 of 2", JOINT),
    "z_image": Case("z_image", IMAGE, "3 of 4", "tiles 1×8×8 of 1×16×16 with 32 behind"),
    "minimax_h3": Case("minimax_h3", SOUND, "2 of 3", "tiles 2×4×8 of 37×5×5 with 463 before"),
    "sd35": Case("sd35", IMAGE, "3 of 3", JOINT),
    "sdxl": Case("sdxl", {"height": 256, "width": 256}, "3 of 22", "tiles 1×8×8 of 1×16×16"),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a script on its tiny pipeline in a folder; gives the rows of its table, and the folder that it wrote."""

    def run(script: str, *more: str, **arguments: Any) -> tuple[dict[str, Any], Path]:
        case = CASES[script]
        pipeline(case.build).save_pretrained(str(tmp_path / "pipeline"))
        (tmp_path / "prompts.txt").write_text("a cat\n")
        call = {"num_inference_steps": 2, **case.call, **arguments}
        argv = [
            "--model",
            tmp_path / "pipeline",
            "--arguments",
            json.dumps(call),
            "--prompts",
            tmp_path / "prompts.txt",
        ]
        argv += ["--dtype", "float32", "--device", "cpu", "--inner", "eager", "--min-seq-len", "200", "--every", "2"]
        argv += ["--sparsity", "0.3", "--no-influence", "--orders", "2x4x8", "--out", tmp_path / "out"]
        argv += [*case.more, *more]
        monkeypatch.syspath_prepend(PIPELINES)
        monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
        left = runpy.run_path(str(PIPELINES / f"{script}.py"), run_name="__main__")
        return left["rows"], tmp_path / "out"

    return run


def pipeline(build: str) -> Any:
    pytest.importorskip("diffusers")
    import tiny_images
    import tiny_modular
    import tiny_pipelines

    torch.manual_seed(0)
    return next(getattr(of, build) for of in (tiny_images, tiny_pipelines, tiny_modular) if hasattr(of, build))()


def looks_right(script: str, rows: dict[str, Any], out: Path, sparse: str = "") -> None:
    case = CASES[script]
    call, word, sparse = case.call, case.word, sparse or case.sparse
    report = (out / "report.txt").read_text()
    assert f"{sparse} attention sites sparse" in report and word in report, report
    assert 0.15 < rows["sparse"]["sparsity"] < 0.5
    assert 0 < rows["sparse"]["error"] < 0.2 and 15 < rows["sparse"]["PSNR"] < 200
    assert "seconds" in (out / "table.txt").read_text()
    (picture,) = out.glob("dense-sparse.*")
    with Image.open(picture) as image:
        width, height = image.size
        assert (width, height) == (2 * call["width"] + 6, call["height"] + 18)  # a gap between, names above
        assert getattr(image, "n_frames", 1) == call.get("num_frames", 1)


def test_wan(run):
    rows, out = run("wan21", guidance_scale=1.0)
    looks_right("wan21", rows, out)


@pytest.mark.slow
@pytest.mark.parametrize("script", [script for script in CASES if script != "wan21"])
def test_a_script(run, script):
    rows, out = run(script)
    looks_right(script, rows, out)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["model", "group"])
def test_offloading_and_a_lora(run, tmp_path, how):
    from safetensors.torch import save_file

    wide = {"A": (4, 48), "B": (48, 4)}
    names = [f"transformer.blocks.{i}.attn1.{to}.lora_" for i in range(2) for to in ("to_q", "to_v")]
    lora = {f"{name}{side}.weight": 0.3 * torch.randn(*shape) for name in names for side, shape in wide.items()}
    save_file(lora, tmp_path / "pytorch_lora_weights.safetensors")
    rows, out = run("wan21", "--offload", how, "--lora", str(tmp_path), "--dense-steps", "1")
    looks_right("wan21", rows, out, "of 4")  # hooks break graphs, sizes are dynamic then, and each call decides


def test_the_readme_lists_them():
    named = set(re.findall(r"\[(\w+\.py)\]", (PIPELINES / "README.md").read_text()))
    assert named == {path.name for path in PIPELINES.glob("*.py")}
    assert {Path(name).stem for name in named} == {"compare", *CASES}
