"""Which kernels of Inductor add up rows in one piece: those that read them whole, where it would read them twice."""

from __future__ import annotations

import logging
import pickle
from types import SimpleNamespace

import pytest
import sympy
from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

from sparge_compile import rows
from sparge_compile.rows import WholeRows

X, R = sympy.symbols("x r", integer=True)


@pytest.fixture(autouse=True)
def _sizes(monkeypatch):
    sizes = SimpleNamespace(statically_known_leq=lambda a, b: bool(a <= b), optimization_hint=int)
    rows._say.cache_clear()
    with V.set_graph_handler(SimpleNamespace(sizevars=sizes)):
        yield


class Features:
    """What Inductor knows of a kernel that adds up 32,760 rows of ``length`` numbers, so far apart."""

    numel = sympy.Integer(32760)

    def __init__(self, length: int, apart: int = 1, hint: ReductionHint = ReductionHint.INNER):
        self.reduction_numel, self.hint = sympy.Integer(length), hint
        read = SimpleNamespace(index=length * apart * X + apart * R, var_names=(X, R))
        self.node = SimpleNamespace(
            get_ranges=lambda: ((self.numel,), (self.reduction_numel,)), read_writes=SimpleNamespace(reads=[read])
        )

    def scheduler_nodes(self):
        return [self.node]

    def get_reduction_hint(self, *args):
        return self.hint

    def strict_sum_rblock(self):  # from torch 2.14 on
        return None

    strict_reduction_rblock = strict_sum_rblock  # from torch 2.15 on


@pytest.mark.parametrize("hint", [ReductionHint.INNER, ReductionHint.DEFAULT])
@pytest.mark.parametrize("length", [1025, 1536, 2048])
def test_rows_of_medium_length_are_added_up_in_one_piece(length, hint):
    features = Features(length, hint=hint)
    assert not InductorChoices().should_use_persistent_reduction(features, False)
    assert WholeRows().should_use_persistent_reduction(features, False)
    assert WholeRows().should_use_persistent_reduction(features=features, cooperative_reduction=False)
    assert features.get_reduction_hint() is hint and not config.triton.multi_kernel


@pytest.mark.parametrize(
    "features, cooperative",
    [
        pytest.param(Features(512), False, id="short rows"),
        pytest.param(Features(512, hint=ReductionHint.DEFAULT), False, id="short, and not along rows"),
        pytest.param(Features(2049), False, id="long rows"),
        pytest.param(Features(1536, apart=12), False, id="rows in heads"),
        pytest.param(Features(1536), True, id="rows that several programs share"),
    ],
)
def test_other_kernels_are_as_inductor_has_them(features, cooperative):
    usual = InductorChoices().should_use_persistent_reduction(features, cooperative)
    assert WholeRows().should_use_persistent_reduction(features, cooperative) is usual


def test_who_wants_no_kernel_so_gets_none():
    with config.patch({"triton.persistent_reductions": False}):
        assert not WholeRows().should_use_persistent_reduction(Features(1536), False)


def test_where_insides_are_otherwise_inductor_chooses_as_ever_and_it_is_said_once(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "sparge_compile")
    features = Features(1536)
    features.node.get_ranges = lambda: 1 / 0
    for _ in range(2):
        assert WholeRows().should_use_persistent_reduction(features, False) is False
    # An Inductor that asks with one thing more.
    monkeypatch.setattr(
        InductorChoices, "should_use_persistent_reduction", lambda self, features, cooperative, more: features is None
    )
    assert WholeRows().should_use_persistent_reduction(features, False, more=1) is False
    assert WholeRows().should_use_persistent_reduction(None, False, more=1) is True
    assert [x.message.split(":")[1].strip() for x in caplog.records] == ["ZeroDivisionError", "TypeError"]


def test_choices_go_to_another_process():
    assert type(pickle.loads(pickle.dumps(WholeRows()))) is WholeRows
