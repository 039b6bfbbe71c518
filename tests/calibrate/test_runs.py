"""Runs that are interrupted, resumed, killed or shared end with the same file, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
import torch.multiprocessing
from test_record import Fused, Model

import sparge_compile
from sparge_compile import Calibration

BATCHES = 6
SETTINGS = {"target_error": 0.3, "options": {"min_seq_len": 0}, "query_blocks": 2}


def model() -> Model:
    torch.manual_seed(0)
    return Model(Fused, 1).eval()


def batches(stop_at: int | None = None):
    for number in range(BATCHES):
        if number == stop_at:
            raise KeyboardInterrupt
        yield torch.randn(1, 400, 32, generator=torch.Generator().manual_seed(number))


def calibrate(out=None, **changes) -> Calibration:
    return sparge_compile.calibrate(model(), **{"batches": batches(), "out": out, **SETTINGS, **changes})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A forked process would wait for the threads of its parent, which it does not have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """The file of a run that nobody disturbed."""
    path = tmp_path_factory.mktemp("whole") / "c.json"
    calibrate(path)
    return path.read_bytes()


def test_an_interrupted_run_leaves_a_file_that_says_so_and_goes_on(tmp_path, whole):
    path = tmp_path / "c.json"
    with pytest.raises(KeyboardInterrupt):
        calibrate(path, batches=batches(stop_at=4))
    part = Calibration.load(path)
    assert not part.origin.complete and part.origin.batches == 4 and part.sites
    calls = []
    fresh = model()
    sparge_compile.calibrate(fresh, batches(), out=path, call=lambda x: calls.append(1) or fresh(x), **SETTINGS)
    assert len(calls) == BATCHES - 4, "what was measured is not measured again"
    assert path.read_bytes() == whole
    assert os.listdir(tmp_path) == ["c.json"], "the folder of batches is gone"


def test_an_error_of_the_model_leaves_what_was_measured_too(tmp_path):
    path, net, seen = tmp_path / "c.json", model(), []

    def call(x):
        seen.append(1)
        if len(seen) == 3:
            raise RuntimeError("out of luck")
        return net(x)

    with pytest.raises(RuntimeError, match="out of luck"):
        sparge_compile.calibrate(net, batches(), out=path, call=call, **SETTINGS)
    assert Calibration.load(path).origin.batches == 2 and net._compiled_call_impl is None


def test_batches_of_another_run_are_refused(tmp_path):
    path = tmp_path / "c.json"
    with pytest.raises(KeyboardInterrupt):
        calibrate(path, batches=batches(stop_at=2))
    with pytest.raises(ValueError, match="other settings"):
        calibrate(path, seed=1)
    (tmp_path / "c.json.partial" / "batch-000000.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read"):
        calibrate(path)
    assert not Calibration.load(path).origin.complete, "the old file is still there"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batches": []}, "at least one"),
        ({"batches": torch.zeros(2, 400, 32)}, "taken to pieces"),
        ({"batches": {"x": torch.zeros(1, 400, 32)}}, "taken to pieces"),
        ({"batches": None}, "batches, or a forward_loop"),
        ({"query_blocks": 0}, "query_blocks"),
        ({"phases": (0.5, 0.2)}, "phases"),
        ({"by": "best"}, "'worst', 'mean'"),
        ({"mode": "topq"}, "'hybrid'"),
        ({"target_sparsity": 0.5}, "one aim"),
        ({"call": lambda x: None}, "never reach"),
        ({"options": {"min_seq": 0}}, "unknown option"),
        ({"share_batches": True}, "initialised"),
    ],
)
def test_bad_settings_are_refused_with_a_sentence(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        calibrate(**change)


def killed_run(path: str) -> None:
    os.setpgid(0, 0)
    calibrate(path)


def kill_at_random(path, times: int, seed: int) -> set[str]:
    """Start a run, kill it somewhere, look at the file; so many times over. Returns what was found.

    Where runs are slower than the one that was timed, as beside other work, the kills move: later after one that came
    in time, earlier after one that did not.
    """
    draw, fork, found = random.Random(seed), multiprocessing.get_context("fork"), set()
    begun = time.perf_counter()
    calibrate(path.with_name("timed.json"))
    length = time.perf_counter() - begun
    for _ in range(times):
        process = fork.Process(target=killed_run, args=(str(path),))
        process.start()
        process.join(draw.uniform(0.0, 1.3) * length)
        length *= 1.15 if process.is_alive() else 0.87
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        if not path.exists():
            found.add("absent")
            continue
        state = Calibration.load(path)
        found.add("complete" if state.origin.complete else "part")
        if state.origin.complete and draw.random() < 0.7:
            path.unlink()
    return found


def test_killed_12_times_the_file_is_absent_or_valid_and_a_resumed_run_ends_the_same(tmp_path, whole):
    path = tmp_path / "c.json"
    assert kill_at_random(path, 12, seed=0) == {"absent", "complete"}, "some kills must come early and some late"
    calibrate(path)
    assert path.read_bytes() == whole
    left = {name for name in os.listdir(tmp_path) if not name.endswith(".tmp")}
    assert left == {"c.json", "timed.json"}


def shared_run(rank: int, path: str, port: int) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    calls, net = [], model()
    found = sparge_compile.calibrate(
        net, batches(), out=path, call=lambda x: calls.append(1) or net(x), share_batches=True, **SETTINGS
    )
    assert len(calls) == BATCHES // 2
    found.save(f"{path}.{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_find_what_one_does(tmp_path, whole):
    path = tmp_path / "c.json"
    port = 20000 + os.getpid() % 20000
    torch.multiprocessing.start_processes(shared_run, (str(path), port), nprocs=2, start_method="fork")
    assert path.read_bytes() == whole
    assert (tmp_path / "c.json.0").read_bytes() == (tmp_path / "c.json.1").read_bytes() == whole


def shared_run_that_asks(rank: int, path: str, port: int) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    asked = {"target_output_error": 0.05, "options": SETTINGS["options"], "query_blocks": 2}
    found = sparge_compile.calibrate(model(), batches(), share_batches=True, **asked)
    found.save(f"{path}.{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_ask_the_model_what_one_does(tmp_path):
    path = tmp_path / "c.json"
    port = 20001 + os.getpid() % 20000
    torch.multiprocessing.start_processes(shared_run_that_asks, (str(path), port), nprocs=2, start_method="fork")
    asked = {"target_output_error": 0.05, "options": SETTINGS["options"], "query_blocks": 2}
    sparge_compile.calibrate(model(), batches(), **asked).save(path)
    assert (tmp_path / "c.json.0").read_bytes() == (tmp_path / "c.json.1").read_bytes() == path.read_bytes()


def test_inputs_may_be_arguments_of_any_kind_or_a_loop():
    net = model()
    net.forward = lambda x, scale=1.0, *, shift=0.0: net.blocks[0](x * scale + shift)
    xs = list(batches())[:2]
    tables = [
        sparge_compile.calibrate(net, given, **SETTINGS).origin.curves
        for given in (
            [(x,) for x in xs],
            [[x] for x in xs],
            [{"x": x, "shift": 0.0} for x in xs],
            [((x, 1.0), {"shift": 0.0}) for x in xs],
            xs,
        )
    ]
    assert all(table == tables[0] for table in tables)
    loop = sparge_compile.calibrate(net, forward_loop=lambda m: [m(x) for x in xs], **SETTINGS)
    assert loop.origin.batches == 1 and loop.origin.curves["blocks.0"].samples == 2
