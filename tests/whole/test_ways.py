"""Other ways to compile and to store what was compiled, as docs/compiling.md lists them: they work or say why not."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from toys import Stack

from sparge_compile import Calibration, attach

EXACT = {"min_seq_len": 0, "topk": 1.0, "topp": 0.0}
CALIBRATION = Calibration({"blocks.0": [(0.1, 0.0)], "blocks.1": [(0.1 * i, 0.0) for i in (1, 3, 5, 7)]})


def near(got, want):
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def compiled_with(model, inner="inductor", **options):
    return torch.compile(model, backend="sparge", fullgraph=True, options={**EXACT, "inner": inner, **options})


def inputs():
    return torch.randn(2, 300, 32)


def stored(compiled, *args):
    """What aot_compile makes: a function of the model and its inputs."""
    make = getattr(compiled.forward, "aot_compile", None)
    if make is None:
        pytest.skip("this torch has no aot_compile")
    return partial(make((args, {})), compiled._orig_mod)


def test_aot_compile_stores_the_thresholds_of_a_calibration():
    model, x = Stack(), inputs()
    with torch.no_grad():
        ahead = stored(compiled_with(model, calibration=CALIBRATION), x)
        near(ahead(x), compiled_with(model, "eager", calibration=CALIBRATION)(x))
        assert (ahead(x) - model(x)).abs().max() > 1e-3


def test_aot_compile_reads_attached_thresholds_at_run_time():
    model, x = Stack(), inputs()
    handle = attach(model, CALIBRATION)
    with torch.no_grad():
        ahead = stored(compiled_with(model), x)
        near(ahead(x), compiled_with(model, "eager")(x))
        handle.set(topk=1.0)
        near(ahead(x), model(x))


def test_aot_compile_says_what_it_cannot_store():
    with (
        torch.no_grad(),
        pytest.raises(Exception, match=r"sparge: aot_compile cannot store.*inner='inductor'"),
    ):
        stored(compiled_with(Stack(1), "eager"), inputs())


def test_dense_steps_cannot_be_stored():
    """What is stored is not told which step it is: it would be sparse in all of them."""
    with torch.no_grad(), pytest.raises(Exception, match=r"sparge: a graph that is dense in some steps.*attach"):
        stored(compiled_with(Stack(1), "aot_eager", dense_steps=2), inputs())


def test_attached_dense_steps_are_stored():
    model, x = Stack(), inputs()
    handle = attach(model, Calibration({"*": [(0.1, 0.0)]}), dense_steps=1)
    with torch.no_grad():
        ahead = stored(compiled_with(model), x)
        for step in range(3):
            handle.set_step(step, 3)
            near(ahead(x), compiled_with(model, "eager")(x))
            assert ((ahead(x) - model(x)).abs().max() < 1e-5) == (step == 0)


class BlockByBlock(Stack):
    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block.compile(backend="sparge", fullgraph=True, options={**EXACT, "calibration": CALIBRATION})


def test_thresholds_of_equal_blocks_cannot_be_stored_in_their_one_graph():
    """Whatever is stored runs where nobody looks up thresholds; the message points to attach, which works."""
    with (
        torch.no_grad(),
        torch._dynamo.config.patch(caching_precompile=True),
        pytest.raises(Exception, match=r"sparge: the thresholds of 'blocks.1' cannot.*attach"),
    ):
        BlockByBlock()(inputs())


SCRIPT = """
import sys, torch
from toys import Stack
from sparge_compile import Calibration, backend

torch._dynamo.config.caching_precompile = True
torch.manual_seed(0)
model, x = Stack(), torch.randn(2, 300, 32)
options = {"min_seq_len": 0, "calibration": Calibration({"blocks.*": [(0.1 * i, 0.0) for i in (1, 3, 5, 7)]})}
act, path = sys.argv[1:]
if act == "load":
    backend.open_graph = None  # nothing is compiled here
    torch.compiler.load_cache_artifacts(open(path, "rb").read())
compiled = torch.compile(model, backend="sparge", fullgraph=True, options=options)
out = compiled(x)
out.square().mean().backward()
if act == "save":
    open(path, "wb").write(torch.compiler.save_cache_artifacts()[0])
grad = model.blocks[0].qkv.weight.grad.norm()
print(float((out - model(x)).abs().max()) > 1e-3, float(out.norm()), float(grad))
"""


@pytest.mark.slow
def test_a_second_process_starts_from_stored_artifacts(tmp_path):
    """Forward and backward are those of the first process, with its thresholds, and nothing is compiled."""
    told = []
    for act in ("save", "load"):
        script = f"import sys; sys.path[:0] = {sys.path!r}\n{SCRIPT}"
        env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / act)}
        told.append(run(script, act, str(tmp_path / "artifacts"), env=env).split())
    assert told[0][0] == "True" and told[0] == told[1]


def run(script, *args, env):
    done = subprocess.run(
        [sys.executable, "-c", script, *args], capture_output=True, text=True, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("by", ["option", "config"])
def test_cpp_wrapper(by):
    """The config is what TORCHINDUCTOR_CPP_WRAPPER=1 sets."""
    model, x = Stack(1), inputs()
    with torch.no_grad(), torch._inductor.config.patch(cpp_wrapper=by == "config"):
        near(compiled_with(model, inductor={"cpp_wrapper": True} if by == "option" else {})(x), model(x))


def test_a_stored_function_is_loaded(tmp_path):
    model, x = Stack(1), inputs()
    load = getattr(torch.compiler, "load_compiled_function", None)
    with torch.no_grad():
        ahead = stored(compiled_with(model, "aot_eager", topk=0.2), x)
        if load is None or not hasattr(ahead.func, "save_compiled_function"):
            pytest.skip("this torch cannot save it")
        ahead.func.save_compiled_function(str(tmp_path / "model"))
        torch.compiler.reset()
        with open(tmp_path / "model", "rb") as file:
            near(load(file)(model, x), ahead(x))


def freezing():
    model, x = Stack(1).eval(), inputs()
    with torch.no_grad():
        near(compiled_with(model, inductor={"freezing": True})(x), model(x))


def compiled_autograd():
    """Its graph of the backward goes through the backend like any other."""
    model, x = Stack(1), inputs()
    compiled = compiled_with(model, "aot_eager")
    with torch._dynamo.config.patch(compiled_autograd=True):
        compiled(x).square().sum().backward()
    got = model.blocks[0].qkv.weight.grad.clone()
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(got, model.blocks[0].qkv.weight.grad, atol=1e-4, rtol=1e-4)


def inference_mode():
    """One compiled model before, in and after inference mode, and in training."""
    model, x = Stack(1), inputs()
    compiled = compiled_with(model, "aot_eager")
    for context in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with context():
            near(compiled(x), model(x))
    near(compiled(x), model(x))
    compiled(x).sum().backward()


def set_stance():
    model, x = Stack(1), inputs()
    compiled = compiled_with(model, "aot_eager", topk=0.2)
    sparse = compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        near(compiled(x), sparse)
    with torch.compiler.set_stance("force_eager"):
        near(compiled(x), model(x))
    near(compiled(x), sparse)


def copies():
    model, x = Stack(1), inputs()
    compiled = compiled_with(model, "aot_eager", topk=0.2)
    want = compiled(x)
    near(copy.deepcopy(compiled)(x), want)
    model.compile(backend="sparge", options={**EXACT, "topk": 0.2, "inner": "aot_eager"})
    near(model(x), want)
    again = copy.deepcopy(model)  # torch leaves out of it what model.compile did
    again.compile(backend="sparge", options={**EXACT, "topk": 0.2, "inner": "aot_eager"})
    near(again(x), want)


def passes_of_a_user():
    model, x = Stack(1), inputs()
    seen = []
    with torch._inductor.config.patch(
        joint_custom_post_pass=lambda graph: seen.extend(str(n.target) for n in graph.nodes), force_disable_caches=True
    ):
        near(compiled_with(model)(x), model(x))
    assert any(target.startswith("sparge.") for target in seen)


def max_autotune():
    model, x = Stack(1), inputs()
    with torch.no_grad():
        near(compiled_with(model, inductor_mode="max-autotune-no-cudagraphs")(x), model(x))


HERE = [freezing, compiled_autograd, inference_mode, set_stance, copies, passes_of_a_user, max_autotune]


@pytest.mark.parametrize("way", HERE, ids=lambda way: way.__name__)
def test_a_way_to_compile(way):
    way()


def test_the_page_of_ways_names_the_test_of_each_row():
    root = Path(__file__).parents[2]
    rows = [row for row in (root / "docs" / "compiling.md").read_text().splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        file, name = re.search(r"`([\w/]+\.py)::(\w+)`", row).groups()
        kind, _, case = name.partition("__")
        text = (root / file).read_text()
        assert f"def {kind}(" in text and (not case or case in text), row


@pytest.mark.gpu
def test_reduce_overhead_records_cuda_graphs():
    model, x = Stack(1).cuda(), inputs().cuda()
    compiled = compiled_with(model, inductor_mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            near(compiled(x).clone(), model(x))


@pytest.mark.gpu
def test_a_stored_function_on_a_gpu():
    model, x = Stack(1).cuda(), inputs().cuda()
    with torch.no_grad():
        ahead = stored(compiled_with(model, topk=0.2), x)
        near(ahead(x), compiled_with(model, "eager", topk=0.2)(x))
