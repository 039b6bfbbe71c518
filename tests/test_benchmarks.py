"""The benchmarks' own judgement: what counts as a wrong result, and where a line breaks even. No times."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import choosing_orders
import limits
import messages
import methods
import peers
import plot_sweep
import pytest
import raised_messages
import scaling
import scaling_model
import scaling_ranks
import torch
import varlen

from sparge_compile.inner import sound
from sparge_compile.report import Reason

CPU = torch.device("cpu")


@pytest.fixture(params=[methods.Problem(1, 2, 2, 600, 32), methods.Problem(1, 4, 2, 600, 32, True)])
def inputs(request):
    return methods.Inputs.of(request.param, torch.float32, CPU)


def test_right_results_pass_the_gate(inputs):
    ours, _ = methods.our_methods(inputs, methods.thresholds_for(0.5, inputs))
    for method in ours:
        method.check()


@pytest.mark.parametrize("spoiled", ["map", "out", "lse", "dq", "dk", "dv"])
def test_wrong_results_do_not(inputs, spoiled, monkeypatch):
    real = methods.harness.kernels(CPU)

    def block_map(*args):
        counts, indices = real.block_map(*args)
        return methods.BlockMap(counts, indices.roll(1, -2) if spoiled == "map" else indices)

    def forward(*args):
        return tuple(
            x.add_(0.1) if name == spoiled else x for name, x in zip(("out", "lse"), real.forward(*args), strict=True)
        )

    def backward(*args):
        grads = zip(("dq", "dk", "dv"), real.backward(*args), strict=True)
        return tuple(x.mul_(1.05) if name == spoiled else x for name, x in grads)

    fake = SimpleNamespace(block_map=block_map, forward=forward, backward=backward, pack=real.pack)
    monkeypatch.setattr(methods.harness, "kernels", lambda device: fake)
    ours, _ = methods.our_methods(inputs, methods.thresholds_for(0.5, inputs))
    wrong = {m.method.name for m in methods.measure(ours, CPU, budget=0) if m.trouble}
    assert wrong and all("WRONG" in m.trouble for m in methods.measure(ours, CPU, budget=0) if m.trouble)


@pytest.mark.parametrize(
    ("speedups", "want"),
    [((1.5, 2, 3), 1024), ((0.5, 0.7, 0.9), None), ((0.5, 2, 3), 1448), ((2, 0.5, 2), 2896)],
)
def test_break_even(speedups, want):
    found = plot_sweep.break_even(list(zip((1024, 2048, 4096), speedups, strict=True)))
    assert found == (want if want is None else pytest.approx(want, abs=1))


def test_peers_get_equal_maps():
    maps = peers.Maps.of(methods.Inputs.of(methods.Problem(1, 2, 2, 1024, 32), torch.float32, CPU), 0.3)
    for found in (maps.even, maps.squares):
        assert found.counts.unique().numel() == 1, "kernels without counts need rows of one length"
    twice = peers.lists(maps.ours, 2)  # squares of 64
    assert twice.counts.unique().numel() > 1 and twice.indices.shape[-1] == twice.counts.max()
    kept = maps.ours.to_dense().repeat_interleave(2, 2)
    for row, counts, indices in zip(*(x.reshape(-1, *x.shape[3:]) for x in (kept, *twice)), strict=True):
        assert indices[:counts].tolist() == row.nonzero().flatten().tolist() and not indices[counts:].any()
    assert torch.equal(peers.squares(maps.mask).counts * 2, maps.squares.counts), "64 keys are half a square"


def test_a_peer_that_ends_early_loses_its_own_rows_alone():
    says = """print('{"a": 1}'); print('loading'); print('{"b": 2}', flush=True); raise SystemExit(3)"""
    process = subprocess.Popen([sys.executable, "-c", says], stdout=subprocess.PIPE, text=True)
    assert list(peers.read(process, "done", 60)) == [{"a": 1}, {"b": 2}] and process.returncode == 3
    late = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert list(peers.read(late, "done", 0.2)) == [] and late.returncode < 0


def test_what_is_expected_of_several_gpus():
    model = scaling_model.MODELS["1.3B"]
    steps = {n: scaling_model.predict(model, 32_760, n, 0.05) for n in (1, 2, 4, 8)}
    assert steps[1].exchange == steps[1].bytes == 0
    assert steps[1].total > steps[2].total > steps[4].total
    assert steps[2].bytes == model.layers * 4 * 16_380 * model.width * 2 / 2  # half of q, k, v and the result
    assert scaling_model.split(8, 12, scaling_model.Machine()) == (4, 2), (
        "12 heads are exchanged among 4, in a ring of 2"
    )
    one_at_a_time = scaling_model.predict(model, 32_760, 2, 0.05, overlap="off")
    assert one_at_a_time.exchange > steps[2].exchange and one_at_a_time.bytes == steps[2].bytes
    assert [scaling_model.bare(6, overlap) for overlap in ("on", "whole", "off")] == [(0.375, 2), (0.75, 2), (1.0, 3)]
    assert scaling_model.bare(3, "on")[0] == pytest.approx((2 * 1 / 3 + 2 / 3) / 4)
    assert scaling_model.bare(6, "on", queries=2**24) == scaling_model.bare(6, "whole")
    assert scaling_model.bare(3, "thirds")[0] == pytest.approx((2 * 1 / 3 + 1 / 3) / 4)
    dear = scaling_model.predict(model, 32_760, 4, 0.05, imbalance=2.0)
    assert dear.attention == pytest.approx(2 * steps[4].attention) and dear.tokens == steps[4].tokens


def test_rows_are_measured_in_turns_of_groups_that_are_as_large():
    """All of one GPU at once, then forwards, then training, then graphs; each number of GPUs in the order given."""
    (args,) = scaling.settings(["--device", "cpu", "--gpus", "1", "4", "2"])
    args.launches = ["kernels", "graph"]  # there are none on a CPU
    jobs = scaling.jobs_of(args)
    assert [(job.gpus, job.step, job.launch) for job in jobs[::2]] == [
        *[(1, step, "kernels") for step in ("forward", "training")],
        *[(n, step, "kernels") for step in ("forward", "training") for n in (4, 2)],
        *[(n, "forward", "graph") for n in (1, 4, 2)],
    ]
    assert [job.attention for job in jobs] == ["sparse", "dense"] * 9
    turns = [scaling.turn_of(job, args) for job in jobs]
    assert turns == sorted(turns) and len(set(turns)) == 8, "what one GPU does is one turn"


def test_the_dense_rival_is_compiled_as_soundly_as_the_sparse_model():
    """Inductor's own defaults compute wrong gradients of Wan's tables before torch 2.15 (pytorch 193061)."""
    (args,) = scaling.settings(["--device", "cpu", "--inner", "inductor"])
    given = []
    model = SimpleNamespace(blocks=[SimpleNamespace(compile=lambda **how: given.append(how))])
    scaling_ranks.Run(args, CPU).compiled(model, "dense")
    assert given == [{"backend": "inductor", "fullgraph": True, "options": sound()}]


def test_settings_are_parted_by_pluses():
    first, second = scaling.settings(["--layers", "3", "+", "--losses", "20", "--gpus", "1", "2"])
    assert (first.layers, first.losses, second.losses) == (3, 0, 20)
    ways = [(job.gpus, job.way) for job in scaling.jobs_of(second)]
    assert ways == [(1, ""), (2, "FSDP2"), (2, "heads"), (2, "ring")]


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"shape": "s", "method": methods.WHOLE, "who": "me", "dtype": "float32", "wanted": "0.5"}
    rows = [row | {"length": str(1024 * n), "x dense": str(n / 2)} for n in (1, 4)]
    plot_sweep.draw([*rows, row | {"length": "8192", "x dense": ""}], "s", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_versions_of_triton_are_compared_by_a_process_each(monkeypatch, tmp_path):
    """The installed one runs first and last; one that fails is a row, not the end."""
    import hopper_triton_versions as versions

    folder = tmp_path / "triton-x"
    (folder / "triton").mkdir(parents=True)
    (folder / "triton" / "__init__.py").write_text("raise SystemExit('cannot')")
    seen = []

    def one(command, env, **options):
        seen.append(env["PYTHONPATH"].split(":")[0])
        failed = seen[-1] == str(folder)
        rows = '[{"Triton": "1.0", "ms": 2.0}]'
        return SimpleNamespace(returncode=int(failed), stdout="" if failed else f"noise\n{rows}\n", stderr="")

    monkeypatch.setattr(versions.subprocess, "run", one)
    monkeypatch.setattr(versions.harness, "require", lambda device: CPU)
    monkeypatch.setattr(versions.harness, "header", lambda device: "a GPU")
    versions.main([str(folder), "--csv", str(tmp_path / "rows.csv")])
    assert [path == str(folder) for path in seen] == [False, True, False]
    assert (tmp_path / "rows.csv").read_text().count("1.0") == 2


NCU = """==PROF== Profiling "_pool_kernel"
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Description"
"0","_pool_kernel","SpeedOfLight","Duration","us","70.1",""
"0","_pool_kernel","SpeedOfLight","DRAM Throughput","%","80.1",""
"0","_pool_kernel","Compute","","","","FMA is the highest-utilized pipeline (22.0%) based on active cycles"
"0","_pool_kernel","Warps","","","","each warp spends 5.7 cycles being stalled waiting for X. It is 56.6% of the total"
"1","_pool_kernel","SpeedOfLight","Duration","us","99",""
"""


def test_what_ncu_says_becomes_a_row_for_each_kernel():
    row = {"kernel": "pool", "time": "70.1 us", "memory, %": "80.1", "busiest pipeline": "FMA 22.0 %"}
    assert limits.rows_of(NCU) == [{**row, "warps wait": "56.6 %: waiting for X"}]
    assert limits.rows_of("==ERROR== nothing") == []


def test_runs_of_the_suite_become_one_table(tmp_path):
    import compatibility

    junit = tmp_path / "suite.xml"
    for failures in (2, 1):
        junit.write_text(
            f'<testsuites><testsuite tests="10" failures="{failures}" errors="1" skipped="3" '
            'timestamp="2030-01-02T03:04"/></testsuites>'
        )
        compatibility.main([str(junit), "--docs", str(tmp_path)])
    (run,) = compatibility.json.loads((tmp_path / "compatibility.json").read_text())
    assert (run["passed"], run["failed"], run["skipped"], run["date"]) == (5, 2, 3, "2030-01-02")
    assert run["torch"] in (tmp_path / "compatibility.md").read_text(), "a later run took the place of the earlier"
    runs = compatibility.merged([run | {"torch": "2.9.1"}, run | {"torch": "2.15.0"}], run | {"torch": "2.11.0"})
    assert [each["torch"] for each in runs] == ["2.9.1", "2.11.0", "2.15.0"]


@pytest.mark.parametrize("more", [[], ["--causal"]])
def test_packed_sequences_are_measured(more, capsys):
    varlen.main(["--device", "cpu", "--lengths", "150,70", "--heads", "2", "--head-size", "16", "--budget", "0", *more])
    printed = capsys.readouterr().out
    assert "2 sequences, 220 rows, 73% of the padded batch" in printed and "padded with a key mask" in printed


def test_kept_text_is_measured_beside_the_plain_rule():
    import kept_keys

    rows = kept_keys.main(
        ["--device", "cpu", "--text", "128", "--side", "16", "--heads", "1", "--head-size", "16", "--budget", "0"]
    )
    assert rows[0][0] == "dense" and max(rows[0][1:4]) < 1e-3
    for name, sparsity, _, of_text, ms in rows[1:]:
        assert 0 < sparsity < 1 and ms > 0
        assert (of_text < 1e-5) == ("queries dense" in name)


def test_token_order_is_measured_beside_raster_order(monkeypatch):
    import token_order

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    grid = ["--grid", "3", "5", "7", "--heads", "1", "--head-size", "16"]
    rows = token_order.main(["--device", "cpu", *grid, "--budget", "0"])
    assert len(rows) == 2 * 2 * len(token_order.SHARES) and all(min(row[3:]) > 0 for row in rows)
    assert all(row[5:] == [1.0, 1.0] for row in rows if row[1] == "raster")


def test_the_cost_model_is_fitted_to_what_was_measured():
    import fit_cost_model as fitting

    six = (1e-5, 7e-15, 3e-5, 1e-12, 1e-11, 8e-15)
    shapes = [*fitting.shapes("cuda", 64, True), *fitting.shapes("cuda", 128, False)]
    found = []
    for shape in shapes:
        for density in fitting.DENSITIES["forward"]:
            dense = six[0] + six[1] * shape.pairs * shape.head_size
            kept = six[5] * density * shape.pairs * shape.head_size
            sparse = six[2] + six[3] * shape.pool + six[4] * shape.select + 1.5 * kept
            found.append(fitting.Sample(shape, "forward", density, dense, sparse, idle=1.5))
    assert fitting.fit_six(found)[0] == pytest.approx(six, rel=1e-2)


def test_the_table_of_costs_is_written_anew():
    import fit_cost_model as fitting

    from sparge_compile import cost_table

    text = Path(cost_table.__file__).read_text()
    assert run_text(fitting.table_text(text, "sm90", {})) == run_text(text), "nothing was measured"
    kind, six = ("float32", 128), (1e-5, 2e-14, 3e-5, 4e-12, 0.0, 6e-14)
    of_cpu = run_text(fitting.table_text(text, "cpu", {kind: [six, six]}))["GPU"]
    assert of_cpu == {**cost_table.GPU, "cpu": {kind: (six, six)}}
    hosts = dict.fromkeys(cost_table.HOST, ((1e-5, 2e-5), (3e-5, 4e-5)))
    written = run_text(fitting.table_text(text, "sm90", {kind: [six, six]}, 1.5e-5, hosts, (1e-6, 2e-6)))
    assert written["GPU"]["sm90"].pop(kind) == (six, six)
    assert written["GPU"]["cpu"] == cost_table.GPU["cpu"] and written["REFERENCE"] == 1.5e-5
    assert written["GPU"]["sm90"] == {k: v for k, v in cost_table.GPU["sm90"].items() if k != kind}
    assert written["HOST"] == hosts and written["MASKED"] == (1e-6, 2e-6)
    assert written["ESTIMATED"] == cost_table.ESTIMATED - {("sm90", kind), ("host", "eager"), ("host", "masked")}


def run_text(text):
    """What a module of numbers defines."""
    names = {}
    exec(text, names)
    return {name: value for name, value in names.items() if name.isupper()}


def test_the_cost_model_says_from_which_length_on(capsys):
    import break_even

    break_even.main(["--device-class", "sm90"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 12
    for *_, most, half, quarter, tenth in rows:
        least = [10**9 if x == "never" else int(x.replace(",", "")) for x in (most, half, quarter, tenth)]
        assert least == sorted(least, reverse=True) and least[-1] >= 1024


@pytest.mark.parametrize("code", ["inductor", "eager"])
def test_real_shapes_are_decided_and_measured(tmp_path, capsys, monkeypatch, code):
    import never_slower
    from real_shapes import ROWS

    assert len(list(never_slower.cases(ROWS))) >= 300
    first, second, asked = tmp_path / "first.csv", tmp_path / "second.csv", []
    real = never_slower.measured
    monkeypatch.setattr(never_slower, "measured", lambda seen, *how: asked.append(len(seen)) or real(seen, *how))
    given = ["--device", "cpu", "--tiny", "--only", "97 frames: 1×", "--all", *(["--eager"] if code == "eager" else [])]
    never_slower.main([*given, "--csv", str(first)])
    printed = capsys.readouterr().out
    assert "2 cases, 6 decisions" in printed and "decided sparse and not measured: 0" in printed
    assert first.read_text().count("training") == 3 and first.read_text().count(f",{code},") == 6
    assert asked == [3, 3]
    kept = [line for line in first.read_text().splitlines() if "training" not in line or "90 %" in line]
    first.write_text("\n".join(kept))
    never_slower.main([*given, "--after", str(first), "--csv", str(second)])
    assert asked == [3, 3, 2], "what was measured before is not measured again"
    assert "measured: 6" in capsys.readouterr().out
    before, after = never_slower.measured_before(first), never_slower.measured_before(second)
    assert len(before) == 4 and len(after) == 6
    assert all(after[key] == pytest.approx(times) for key, times in before.items())


def test_whole_models_are_measured(capsys):
    pytest.importorskip("diffusers")
    import whole_models

    of_wan = ["--models", "wan", "--layers", "1", "--rounds", "2"]
    whole_models.main(["--device", "cpu", "--tiny", "--inner", "eager", "--check", *of_wan])
    printed = capsys.readouterr().out
    assert "error against dense" in printed and "sparge, 75 %" in printed and "Error" not in printed


@pytest.fixture(scope="module")
def listed():
    return messages.Package().messages()


def test_every_message_says_what_to_do(listed):
    """What happened and what to do about it, in whole sentences. (What another message quotes is no message.)"""
    assert len(listed) > 200
    for message in listed:
        _, colon, allowed = message.text.partition("; allowed: ")
        told = message.text if message.kind == "warning" else allowed
        whole = told.count(". ") or "}" in told  # a part of it may be known at run time alone
        assert (message.kind != "warning" and not colon) or (whole and told[-1] in '.}")?'), message


def test_the_list_of_messages_reads_what_functions_hand_on(listed):
    texts = [message.text for message in listed]
    for words in (
        "--model {model}: got ",
        "option min_seq_len has a bad value: got ",
        "sparge: no attention was found in ",
    ):
        assert any(text.startswith(words) for text in texts), words


def test_symptoms_that_a_page_quotes_are_messages(listed):
    said = [*(message.text for message in listed), *(reason.value for reason in Reason)]
    headings = re.findall("^### (.+)$", (messages.ROOT / "docs" / "trouble.md").read_text(), re.MULTILINE)
    quoted = [part.strip() for line in headings for quote in re.findall('"([^"]+)"', line) for part in quote.split("…")]
    assert len(quoted) > 5
    for part in quoted:
        assert any(part in text for text in said), f"docs/trouble.md quotes {part!r}, which nothing says"


@pytest.mark.slow
def test_the_list_of_messages_knows_which_test_raised_one():
    found = raised_messages.witnesses(["tests/test_errors.py", "-k", "dropout", "-p", "no:cacheprovider"])
    assert {place.partition(":")[0] for place in found} >= {"sparge_compile/functional.py"}
    assert {*found.values()} == {"tests/test_errors.py::test_bad_input_is_refused_in_four_parts[dropout]"}


def test_what_a_choice_of_orders_adds_is_told_by_round():
    rows = [("raster", 8.0), ("chosen", 10.0), ("raster", 10.0), ("chosen", 11.0)]
    rows = [{"orders": orders, "seconds": seconds} for orders, seconds in rows]
    assert choosing_orders.added(rows) == pytest.approx([0.25, 0.1])


def test_a_choice_of_orders_is_measured_with_as_many_graphs():
    torch._dynamo.reset()
    raster, chosen = (choosing_orders.calibrated(choosing_orders.wan(CPU, True), way) for way in choosing_orders.WAYS)
    assert raster["graphs"] == chosen["graphs"] == 2
    assert "orders" in chosen["of which"] and "orders" not in raster["of which"]
