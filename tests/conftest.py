"""Settings for all tests. Without a GPU, Triton's kernels run in its interpreter, which must be asked for early."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings

pytest.register_assert_rewrite("helpers", "spelling", "models", "toys")
settings.register_profile("repo", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("repo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("interpreter") and os.environ.get("TRITON_INTERPRET") != "1":
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 (set where there is no GPU)"))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random numbers for each test; no compiled code, no hook and no warning left over from another."""
    torch.manual_seed(0)
    torch.compiler.reset()
    from sparge_compile import notices
    from sparge_compile.running import listeners

    notices.forget_warnings()
    monkeypatch.setattr(listeners, "_wanted", 0)


@pytest.fixture
def opened_graphs(monkeypatch: pytest.MonkeyPatch) -> list:
    """What the backend opens: for each compilation its graph in work, with steps and threshold inputs."""
    from sparge_compile import backend

    graphs: list = []
    real = backend.open_graph
    monkeypatch.setattr(backend, "open_graph", lambda *args: graphs.append(real(*args)) or graphs[-1])
    return graphs
