"""The command ``sparge``, and what it runs on: models by name and diffusers pipelines in a folder."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from processes import torchrun

from sparge_compile import Calibration
from sparge_compile.cli import main
from sparge_compile.version import __version__

MODULE = """
import torch
from test_record import Fused, Model

def build():
    torch.manual_seed(0)
    return Model(Fused, 2).eval()

def with_call():
    model = build()
    return model, lambda x, times: [model(x) for _ in range(times)]

def batches():
    for seed in range(4):
        yield torch.randn(1, 700, 32, generator=torch.Generator().manual_seed(seed))

pairs = [(x, 2) for x in batches()]
number = 3
none = []
one = torch.randn(1, 700, 32)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a user's module in it."""
    (tmp_path / "my_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


SOURCE = ["--model", "my_models:build", "--inputs", "my_models:batches", "--min-seq-len", "0"]


def test_from_calibration_to_pictures(here, capsys):
    assert main(["calibrate", *SOURCE, "--out", "c.json", "--target-error", "0.2", "--query-blocks", "3"]) == 0
    shown = capsys.readouterr()
    found = Calibration.load("c.json")
    assert (
        found.origin.target_error == 0.2 and found.origin.batches == 4 and set(found.sites) == {"blocks.0", "blocks.1"}
    )
    assert "blocks.1" in shown.out and "aim: error 0.2" in shown.out and "4/4" not in shown.out
    assert "calibrating" in shown.err, "a bar"
    assert main(["show", "c.json"]) == 0 and capsys.readouterr().out == shown.out
    assert main(["show", "c.json", "--target-sparsity", "0.3", "--out", "d.json"]) == 0
    assert Calibration.load("d.json").summary().sparsity >= 0.3 - 1e-3
    capsys.readouterr()
    assert main(["show", "c.json", "--site", "blocks.1", "--about", "model_id=mine", "--out", "d.json"]) == 0
    assert Calibration.load("d.json") == found.described(model_id="mine")
    assert capsys.readouterr().out.count("blocks.1") == len(found.sites["blocks.1"])
    assert main(["plot", "c.json"]) == 0
    for name in capsys.readouterr().out.split()[-2:]:
        assert (here / name).read_bytes().startswith(b"\x89PNG")
    assert main(["plot", "c.json", *SOURCE, "--site", "blocks.1", "--out", "seen", "--no-times"]) == 0
    assert capsys.readouterr().out.split() == ["seen-map.png"] and (here / "seen-map.png").exists()
    assert main(["report", "c.json", *SOURCE, "--out", "page.html", "--title", "mine"]) == 0
    page = (here / "page.html").read_text("utf-8")
    assert "<title>mine</title>" in page and "Block maps" in page and "Time by site" in page
    assert (
        main(["report", "c.json", "--out", "file.html"]) == 0 and "Block maps" not in (here / "file.html").read_text()
    )
    assert main(["explain", *SOURCE, "--calibration", "c.json"]) == 0
    assert "2 of 2 attention sites sparse" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.multigpu
def test_two_processes_of_torchrun_write_the_file_of_one(here):
    how = [*SOURCE, "--target-error", "0.2", "--query-blocks", "3"]
    assert main(["calibrate", *how, "--out", "one.json"]) == 0
    torchrun(here, "-m", "sparge_compile.calibrate", *how, "--out", "two.json")
    assert (here / "two.json").read_bytes() == (here / "one.json").read_bytes()


def test_an_error_of_the_output_and_a_plan(here, capsys):
    aim = ["--target-output-error", "0.05", "--dense-steps", "2", "--dense-layers", "1"]
    assert main(["calibrate", *SOURCE, "--out", "c.json", "--query-blocks", "3", *aim]) == 0
    shown = capsys.readouterr()
    found = Calibration.load("c.json")
    assert found.origin.target_output_error == 0.05 and found.schedule == ((0, 2), 1)
    assert "aim: error of the output 0.05" in shown.out and "dense by plan: steps 0:2; blocks 0:1" in shown.out
    assert "time: " in shown.err and " forwards)" in shown.err
    assert (
        main(["show", "c.json", "--target-output-error", "0.02", "--dense-layers", "blocks.1", "--out", "d.json"]) == 0
    )
    again = Calibration.load("d.json")
    assert again.summary().sparsity < found.summary().sparsity and again.schedule.dense_layers == ("blocks.1",)
    steps = ["--sparsities", "0", "0.3", "--dense-steps", "2", "4"]
    assert main(["show", "c.json", *steps, "--out", "e.json"]) == 0
    planned = Calibration.load("e.json")
    assert list(planned.phases) == [0.5] and planned.schedule.dense_steps == (2, 4)
    assert main(["show", "c.json", "--dense-layers", "nowhere"]) == 2
    assert "mean no site" in capsys.readouterr().err


def test_a_callable_may_run_the_model_and_calls_may_be_skipped(here):
    given = ["--model", "my_models:with_call", "--inputs", "my_models:pairs", "--min-seq-len", "0", "--every", "2"]
    assert main(["calibrate", *given, "--out", "c.json", "--target-sparsity", "0.3", "--batches", "3"]) == 0
    found = Calibration.load("c.json")
    assert found.origin.batches == 3 and found.origin.by == "mean" and found.origin.curves["blocks.0"].samples == 3
    assert main(["explain", *given[:-2], "--calibration", "c.json"]) == 0


@pytest.mark.parametrize(
    "given, words",
    [
        (["show", "none.json"], "no calibration file: got 'none.json'"),
        (["show", "plain.json", "--dense-steps", "1", "2", "3"], "sparge: the plan: dense_steps cannot be read"),
        (["explain", "--model", "my_models:build", "--inputs", "my_models:none"], "batches: got none"),
        (["explain", "--model", "my_models:build", "--inputs", "my_models:one"], "would be taken to pieces"),
        (["report", "--model", "my_models:build", "--inputs", "my_models:none", "--out", "x"], "batches: got none"),
        (["show", "my_models.py"], "not JSON"),
        (["calibrate", "--out", "c.json"], "--model and --inputs, or --pipeline and --prompts"),
        (["calibrate", *SOURCE, "--out", "c.json", "--target-error", "2"], "target_error is out of range"),
        (["calibrate", "--model", "my_models", "--inputs", "my_models:pairs", "--out", "c.json"], "module:object"),
        (["calibrate", "--model", "my_models:nothing", "--inputs", "my_models:pairs", "--out", "c.json"], "nothing"),
        (["calibrate", "--model", "my_models:number", "--inputs", "my_models:pairs", "--out", "c.json"], "nn.Module"),
        (["calibrate", "--model", "my_models:build", "--inputs", "my_models:number", "--out", "c.json"], "iterable"),
        (
            ["calibrate", "--pipeline", "nowhere", "--prompts", "my_models.py", "--out", "c.json"],
            "nothing is downloaded",
        ),
        (["plot", "plain.json"], "without measurements"),
        (["report", "--out", "c.html"], "a calibration or a survey"),
        (["calibrate", "--pipeline", ".", "--prompts", "x", "--arguments", "[1]", "--out", "c.json"], "JSON object"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(here, capsys, given, words):
    Calibration({"a": [(0.5, 0.0)]}).save("plain.json")
    assert main(given) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


@pytest.mark.parametrize(
    "given, words",
    [
        (["doctor", "--device", "nix"], "'nix' is no device here"),
        (["explain", "--device", "cuda:99"], "'cuda:99' is no device here"),
        (["doctor", "--shape", "1,2,3,x"], "'1,2,3,x' is not B,H,L,D"),
        (["doctor", "--shape", "1,2,3"], "'1,2,3' is not B,H,L,D"),
    ],
)
def test_what_is_wrong_with_an_argument_is_said_behind_the_usage(capsys, given, words):
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_what_is_written_makes_its_folder(here, capsys):
    Calibration({"a": [(0.5, 0.0)]}).save("plain.json")
    assert main(["show", "plain.json", "--out", "new/c.json"]) == 0 and Calibration.load("new/c.json").sites
    assert main(["report", "plain.json", "--out", "other/r.html"]) == 0 and (here / "other/r.html").exists()


def test_without_matplotlib_the_error_says_how_to_get_it(here, capsys, monkeypatch):
    assert main(["calibrate", *SOURCE, "--out", "c.json", "--batches", "1"]) == 0
    assert "; 1 batch, " in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", "c.json"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_interrupted_by_ctrl_c_the_command_leaves_a_file_that_says_so(here, capsys, monkeypatch):
    import sparge_compile.calibrate.record as record

    real, seen = record.Recorder.record, []

    def interrupt(self, number, run):
        if number == 2:
            raise KeyboardInterrupt
        seen.append(number)
        return real(self, number, run)

    monkeypatch.setattr(record.Recorder, "record", interrupt)
    assert main(["calibrate", *SOURCE, "--out", "c.json"]) == 130
    capsys.readouterr()
    assert main(["show", "c.json"]) == 0 and "NOT COMPLETE" in capsys.readouterr().out
    monkeypatch.setattr(
        record.Recorder, "record", lambda self, number, run: seen.append(number) or real(self, number, run)
    )
    assert main(["calibrate", *SOURCE, "--out", "c.json"]) == 0 and seen == [0, 1, 2, 3]
    assert "NOT COMPLETE" not in capsys.readouterr().out


def test_the_package_runs_as_a_module(here):
    command = [sys.executable, "-W", "ignore", "-m", "sparge_compile.calibrate", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--target-sparsity" in text and "goes on where it stopped" in text


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"sparge_compile {__version__}\n"


def tiny_wan(**parts):
    """A real Wan pipeline with random weights; without a text encoder unless one is given."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
    from models import wan

    torch.manual_seed(0)
    small = {"base_dim": 4, "z_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1}
    vae = AutoencoderKLWan(**small, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    given = {"tokenizer": None, "text_encoder": None, **parts}
    pipe = WanPipeline(vae=vae, transformer=wan()[0].eval(), scheduler=FlowMatchEulerDiscreteScheduler(), **given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_text_encoder():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "cat": 4, "dog": 5}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = UMT5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return {"tokenizer": tokenizer, "text_encoder": UMT5EncoderModel(config).eval()}


@pytest.mark.parametrize("version, name", [("0.39.1", "torch_dtype"), ("0.40.0.dev0", "dtype"), ("1.0.0", "dtype")])
def test_a_dtype_has_the_name_that_a_diffusers_listens_to(version, name):
    from sparge_compile.calibrate.sources import dtype_name

    assert dtype_name(version) == name


def test_a_pipeline_in_a_folder(here, capsys, monkeypatch):
    from diffusers import WanTransformer3DModel

    monkeypatch.setattr(WanTransformer3DModel, "_keep_in_fp32_modules", None)  # diffusers wants accelerate for it
    tiny_wan(**tiny_text_encoder()).save_pretrained("wan")
    (here / "prompts.txt").write_text("a cat\n\na dog\n")
    source = ["--pipeline", "wan", "--prompts", "prompts.txt", "--steps", "2", "--device", "cpu"]
    source += ["--arguments", '{"height": 256, "width": 256, "num_frames": 9}', "--min-seq-len", "600"]
    more = ["--query-blocks", "2", "--every", "2", "--phases", "0.5", "--about", "note=tiny", "inputs=two pets"]
    assert main(["calibrate", *source, *more, "--out", "c.json"]) == 0, capsys.readouterr().err
    found = Calibration.load("c.json")
    assert set(found.sites) == {"blocks.0.attn1", "blocks.1.attn1"} and found.origin.model == "WanTransformer3DModel"
    assert found.origin.batches == 2 and list(found.phases) == [0.5]
    assert dict(found.about) == {
        "model_id": "wan",
        "part": "transformer",
        "resolution": "9x256x256",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "steps": "2",
        "inputs": "two pets",
        "note": "tiny",
    }
    assert found.origin.curves["blocks.0.attn1"].samples == 4, "two of four calls for each prompt"
