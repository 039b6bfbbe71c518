"""The scripts of examples/pipelines on tiny pipelines: each from a folder to its table and its picture."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

PIPELINES = Path(__file__).parents[2] / "examples" / "pipelines"
TINY = runpy.run_path(str(PIPELINES / "tiny.py"))
JOINT = "keeps text with dense queries"


class Case(NamedTuple):
    """How many sites are sparse, and a word of the report."""

    sparse: str
    word: str


CASES = {
    "wan21": Case("2 of 4", "tiles 2×4×8 of 3×12×12"),
    "wan22": Case("2 of 4", "tiles 2×4×8 of 3×12×12"),
    "hunyuan_video": Case("2 of 3", JOINT),
    "hunyuan_video15": Case("2 of 3", JOINT),
    "ltx": Case("2 of 4", "tiles 2×4×8 of 5×8×8"),
    "ltx2": Case("4 of 12", "tiles 2×4×8 of 5×8×8"),
    "cogvideox": Case("2 of 2", JOINT),
    "mochi": Case("4 of 5", JOINT),
    "flux": Case("3 of 3", "tiles 1×8×8 of 1×16×16 with 32 before"),
    "flux2": Case("3 of 3", "with 32 before"),
    "qwen_image": Case("2 of 2", JOINT),
    "z_image": Case("3 of 4", "tiles 1×8×8 of 1×16×16 with 32 behind"),
    "minimax_h3": Case("2 of 3", "tiles 2×4×8 of 37×5×5 with 463 before"),
    "sd35": Case("3 of 3", JOINT),
    "sdxl": Case("3 of 22", "tiles 1×8×8 of 1×16×16"),
}


@pytest.fixture
def run(tmp_path: Path):
    """Runs a script on its tiny pipeline in a folder; gives the rows of its table, and the folder that it wrote."""
    pytest.importorskip("diffusers")

    def run(script: str, *more: str, **arguments: Any) -> tuple[dict[str, Any], Path]:
        return TINY["run"](script, tmp_path / "out", more, **arguments), tmp_path / "out"

    return run


def looks_right(script: str, rows: dict[str, Any], out: Path, sparse: str = "") -> None:
    case, call = CASES[script], TINY["TINY"][script].call
    word, sparse = case.word, sparse or case.sparse
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


def test_tiny_pipelines_need_what_the_examples_need(monkeypatch):
    """Not the requirements of the tests, in whose folder they are."""
    pytest.importorskip("diffusers")
    for name in ("tiny_images", "tiny_modular", "tiny_pipelines", "tiny_texts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("pytest", "hypothesis", "helpers"):
        monkeypatch.setitem(sys.modules, name, None)
    assert TINY["built"]("wan").transformer is not None


def test_wan(run):
    rows, out = run("wan21", guidance_scale=1.0)
    looks_right("wan21", rows, out)


@pytest.mark.slow
@pytest.mark.parametrize("script", [script for script in CASES if script != "wan21"])
def test_a_script(run, script):
    if script == "minimax_h3":
        pytest.importorskip("diffusers", "0.40")
    rows, out = run(script)
    looks_right(script, rows, out)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["model", "group"])
def test_offloading_and_a_lora(run, tmp_path, how):
    import torch
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
    assert TINY["TINY"].keys() == CASES.keys()
    assert {Path(name).stem for name in named} == {"compare", "tiny", *CASES}
