"""attach: thresholds on the model as buffers, read by every compiled graph at run time."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import wan
from test_names import FAST, NAMES, Attend, Block, BreakBetween, Model, around, by_block, calibration, expected, run
from torch.utils.checkpoint import checkpoint

from sparge_compile import Calibration, attach, attention, explain

X = (1, 300, 32)


def compiled(model, **options):
    return torch.compile(model, backend="sparge", options={**FAST, **options})


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_the_marker_is_nothing_by_itself():
    thresholds = torch.rand(4, 2)
    torch.library.opcheck(torch.ops.sparge.mark.default, (thresholds, 1))
    graphs = []

    def marked(x):
        torch.ops.sparge.mark(thresholds, 1)
        return x + 1

    compiled = torch.compile(marked, backend=lambda gm, _: graphs.append(gm) or gm.forward, fullgraph=True)
    x = torch.randn(3)
    assert torch.equal(compiled(x), x + 1) and "sparge.mark" in graphs[0].code


@pytest.mark.parametrize(
    "inner, grad",
    [
        ("eager", torch.enable_grad),
        ("aot_eager", torch.no_grad),
        ("aot_eager", torch.inference_mode),
        ("aot_eager", torch.enable_grad),
        ("inductor", torch.no_grad),
    ],
)
def test_twelve_blocks_take_one_compilation_and_have_their_own_thresholds(inner, grad, opened_graphs):
    model, x = Model(12), torch.randn(X, requires_grad=grad is torch.enable_grad)
    names = [f"blocks.{i}.attn.inner" for i in range(12)]  # more than Dynamo compiles one by one
    dense, want = run(model, x), expected(model, x, calibration(names), names)
    attach(model, calibration(names))
    by_block(model, {"min_seq_len": 0, "inner": inner, "topk": 1.0})
    with grad():
        close(model(x * 1), want)  # made in inference mode too: Dynamo guards on that
    assert len(opened_graphs) == 1 and (want - dense).abs().max() > 1e-3
    assert opened_graphs[0].steps[0][0].site.name == NAMES[0]
    assert "thresholds attached" in opened_graphs[0].steps[0][1].detail


@pytest.mark.parametrize("build", [Model, BreakBetween, lambda n: Model(n, around)])
def test_attached_thresholds_win_over_the_options_also_where_a_break_hides_the_marker(build):
    model, x = build(4), torch.randn(X)
    want = expected(model, x, names=NAMES[:4])
    attach(model, calibration(NAMES[:4]))
    close(run(compiled(model, calibration=Calibration({"*": [(0.1, 0.0)]})), x), want)


def test_gradients_are_those_of_the_op():
    model, x = Model(2), torch.randn(X)
    by_hand, thresholds = copy.deepcopy(model), calibration(NAMES[:2])
    for name in NAMES[:2]:
        pairs = torch.tensor(thresholds.lookup(name, 4))
        inner = by_hand.get_submodule(name)
        inner.forward = lambda q, k, v, p=pairs: attention(q, k, v, topk=p[:, 0], topp=p[:, 1])
    attach(model, thresholds)
    by_block(model.train(), {"min_seq_len": 0, "inner": "aot_eager"})(x).sum().backward()
    by_hand(x).sum().backward()
    for a, b in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_under_checkpointing(inner):
    class Checkpointed(Model):
        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    model, x = Checkpointed(2), torch.randn(X, requires_grad=True)
    want = expected(model, x, names=NAMES[:2])
    attach(model, calibration(NAMES[:2]))
    got = torch.compile(model, backend="sparge", fullgraph=True, options={"min_seq_len": 0, "inner": inner})(x)
    close(got, want)
    got.sum().backward()
    assert x.grad.isfinite().all()


def test_a_marker_outside_of_the_checkpointed_code_is_handed_down():
    class Inside(Block):
        def forward(self, x):
            return x + checkpoint(self._attend, x, use_reentrant=False)

        def _attend(self, x):
            q = x.unflatten(-1, (4, 8)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)

    model, x = Model(2, Inside), torch.randn(X, requires_grad=True)
    want = compiled(model, topk=0.2, topp=0.0, inner="aot_eager")(x)
    attach(model, Calibration({"blocks.0": [(0.2, 0.0)], "blocks.1": [(0.2, 0.0)] * 4}))
    got = torch.compile(model, backend="sparge", fullgraph=True, options={**FAST, "topk": 1.0, "inner": "aot_eager"})(x)
    close(got, want)
    assert (want - model(x)).abs().max() > 1e-3


def test_no_marker_is_left_and_thresholds_are_no_new_input(opened_graphs):
    model = Model(2)
    attach(model, Calibration({"blocks.*.inner": [(0.3, 0.0)]}))
    run(compiled(model), torch.randn(X))
    (graph,) = opened_graphs
    code = graph.graph_module.code
    assert code.count("sparge.attention") == 2 and "sparge.mark" not in code and graph.threshold_inputs == []


def test_set_writes_in_place_and_compiles_nothing(opened_graphs):
    model, x = Model(3), torch.randn(1, 700, 32)
    names, dense = NAMES[:3], run(model, x)
    handle = attach(model, Calibration(dict.fromkeys(names, [(1.0, 0.0)] * 4)))
    assert handle.names == tuple(names)
    by_block(model, FAST)
    close(run(model, x), dense)
    for topk in (0.5, 0.25):
        handle.set(topk=topk)
        close(run(model, x), expected(model, x, Calibration({"*": [(topk, 0.0)]}), names))
    with torch.inference_mode():
        handle.set(calibration(names))
    close(run(model, x), expected(model, x, calibration(names), names))
    handle.set(Calibration({NAMES[1]: [(0.125, 0.5)]}))
    assert handle.get().sites[NAMES[1]] == ((0.125, 0.5),) * 4 and handle.get().sites[NAMES[0]][1] == pytest.approx(
        (0.9, 0)
    )
    assert len(opened_graphs) == 1


def test_set_refuses_what_is_not_attached():
    handle = attach(Model(2), Calibration({NAMES[0]: [(0.5, 0.0)], NAMES[1]: [(0.5, 0.0)] * 4}))
    before = handle.get()
    for bad in (
        lambda: handle.set(Calibration({"blocks.9.attn.inner": [(0.5, 0.0)]})),
        lambda: handle.set(Calibration({NAMES[1]: [(0.2, 0.0)] * 3})),
        lambda: handle.set(Calibration({NAMES[1]: [(0.2, 0.0)], NAMES[0]: [(0.2, 0.0)] * 4})),
        lambda: handle.set(topk=0.0),
        lambda: handle.set(),
        lambda: handle.set(Calibration({"*": [(0.5, 0.0)]}), topk=0.5),
    ):
        with pytest.raises(ValueError, match="allowed: "):
            bad()
    assert handle.get() == before


def test_a_plan_that_cannot_be_read_is_said_of_what_was_called():
    with pytest.raises(TypeError, match=r"^attach: dense_steps cannot be read: got 'x'"):
        attach(Model(1), Calibration({"*": [(0.5, 0.0)]}), dense_steps="x")


@pytest.mark.parametrize(
    "entry, near", [("blocks.0.atn", "blocks.0.attn"), ("layers.*", "blocks"), ("blocks", "blocks.0")]
)
def test_names_that_fit_no_module_are_refused_with_near_ones(entry, near):
    model = Model(2)
    with pytest.raises(ValueError, match=f"{entry[:6]}.*{near}"):
        attach(model, Calibration({NAMES[0]: [(0.5, 0.0)], entry: [(0.5, 0.0)]}))
    assert not any("sparge" in key for key in model.state_dict())


def test_patterns_mean_the_users_modules():
    model = torch.nn.Sequential(Block(), torch.nn.MultiheadAttention(32, 4))
    names = attach(model, Calibration({"0.attn.inner": [(0.2, 0.0)], "*": [(0.5, 0.0)]})).names
    assert [n for n in names if "#" not in n] == ["0", "0.attn", "0.attn.inner", "1"]
    assert [n for n in names if "#" in n] == ["0#*", "0.attn#*", "0.attn.inner#*", "1#*"]


class Twice(torch.nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(F.scaled_dot_product_attention(q, k, v), k, v)


@pytest.mark.parametrize("sites", [
    {"(root)": [(0.2, 0.0)] * 2, "(root)#1": [(0.6, 0.0)]},
    {"(root)": [(0.2, 0.0)], "*": [(0.6, 0.0)] * 2},
    {"(root)": [(0.2, 0.0)], "(root)#*": [(0.6, 0.0)]},
])  # fmt: skip
def test_a_second_attention_of_a_module(sites):
    model, q = Twice(), torch.randn(1, 2, 700, 16)
    first = attention(q, q, q, topk=0.2)
    want = attention(first, q, q, topk=0.6)
    close(compiled(model, calibration=Calibration(sites))(q, q, q), want)
    attach(model, Calibration(sites))
    close(compiled(model)(q, q, q), want)


def test_a_module_that_is_called_twice_in_a_graph():
    """With and without guidance in one function: the thresholds hold for both calls."""
    model, x = Model(1), torch.randn(X)
    want = expected(model, x, names=NAMES[:1])
    attach(model, calibration(NAMES[:1]))
    step = compiled(lambda x: (model(x), model(-x), model(x)), topk=1.0)
    for got in run(step, x)[::2]:
        close(got, want)


def test_thresholds_travel():
    names = NAMES[:2]
    model, x, thresholds = Model(2), torch.randn(X), calibration(NAMES[:2])
    attach(model, thresholds)
    want = expected(model, x, thresholds, names)
    key = f"{NAMES[1]}.sparge.thresholds"
    assert model.state_dict()[key].dtype == torch.float32 and model.state_dict()[key].shape == (4, 2)
    other = Model(2)
    attach(other, Calibration(dict.fromkeys(names, [(1.0, 0.0)] * 4)))
    other.load_state_dict(model.state_dict())
    for copied in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(run(compiled(copied), x), want)
    assert run(copy.deepcopy(model).to("meta"), x.to("meta")).shape == X
    assert torch.equal(copy.deepcopy(model).to("meta").state_dict()[key], model.state_dict()[key])


def test_a_copy_is_attached_anew_and_its_own():
    model, x = Model(2), torch.randn(X)
    first = attach(model, calibration(NAMES[:2]))
    teacher = copy.deepcopy(model)
    second = attach(teacher, Calibration({"blocks.*.inner": [(1.0, 0.0)] * 4}))
    dense = run(teacher, x)
    close(run(compiled(teacher), x), dense)
    second.remove()
    assert not any("sparge" in k for k in teacher.state_dict()) and first.get().sites[NAMES[0]][2] == (1.0, 0.0)
    close(run(teacher, x), dense)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double().float()])
def test_thresholds_stay_float32(cast):
    model, thresholds = Model(2), Calibration({name: [(0.1003, 0.2007)] for name in NAMES[:2]})
    attach(model, thresholds)
    before = {k: v.clone() for k, v in model.state_dict().items() if "sparge" in k}
    cast(model)
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value) and model.state_dict()[key].dtype == torch.float32
    x = torch.randn(X, dtype=next(model.parameters()).dtype)
    assert [row.status for row in explain(model, FAST)(x)] == ["sparse"] * 2
    got = run(by_block(model, FAST), x)
    assert got.dtype == x.dtype and got.isfinite().all()


def test_without_the_backend_inductor_computes_what_it_did():
    q, k, v = (torch.randn(1, 4, 300, 8, requires_grad=True) for _ in range(3))
    model = Attend()
    with attach(model, Calibration({"(root)": [(0.3, 0.0)]})):
        got = torch.compile(model, backend="inductor", fullgraph=True)(q, k, v)
        close(got, F.scaled_dot_product_attention(q, k, v))
        got.sum().backward()


@pytest.mark.parametrize("how", [None, "aot_eager"])
def test_without_the_backend_nothing_changes(how):
    model, x = Model(2).train(), torch.randn(X, requires_grad=True)
    want = model(x)
    with attach(model, calibration(NAMES[:2])):
        got = (model if how is None else torch.compile(model, backend=how, fullgraph=True))(x)
        close(got, want)
        got.sum().backward()


def test_remove_leaves_the_model_as_it_was():
    model = Model(2)
    before = [name for name, _ in model.named_modules()]
    with attach(model, Calibration({"*": [(0.5, 0.0)]})):
        assert [name for name, _ in model.named_modules()] != before
    assert [name for name, _ in model.named_modules()] == before
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("compile_it", [compiled, lambda m, **o: by_block(m, {**FAST, **o})])
def test_attaching_to_a_compiled_model_and_removing_again(compile_it):
    """Dynamo's guards do not see a hook that comes or goes: the old graphs would run on."""
    model, x = Model(2), torch.randn(X)
    dense, want = run(model, x), expected(model, x, names=NAMES[:2])
    ready = compile_it(model, topk=1.0)
    close(run(ready, x), dense)
    with attach(model, calibration(NAMES[:2])):
        close(run(ready, x), want)
    close(run(ready, x), dense)


def test_thresholds_for_other_heads_are_refused():
    model = Model(1)
    attach(model, Calibration({NAMES[0]: [(0.5, 0.0)] * 3}))
    with pytest.raises(Exception, match=r"blocks\.0\.attn\.inner.*3 heads.*4 pairs"):
        run(compiled(model), torch.randn(X))


def test_explain_says_what_is_attached_whatever_the_values():
    """All blocks may be kept now and a tenth later: the graph has to be ready for it."""
    model = Model(1)
    attach(model, Calibration({NAMES[0]: [(1.0, 0.0)]}))
    costs = {"dense_base": 0, "dense_pair": 1e-9, "sparse_base": 0, "pool": 0, "select": 0, "sparse_pair": 1e-9}
    for build in (model, copy.deepcopy(model)):
        (row,) = explain(build, {"costs": costs})(torch.randn(1, 1100, 32))
        assert (row.status, row.detail, row.name) == ("sparse", "thresholds attached", NAMES[0])


WAN = {f"blocks.{i}.attn1": [(0.2 + 0.3 * i, 0.1), (0.6 - 0.3 * i, 0.3)] for i in range(2)}


@pytest.mark.parametrize("given", ["options", "attached"])
def test_whole_model_and_block_by_block_agree_on_wan(given, opened_graphs):
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model, inputs = wan()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        outs = [model.eval()(**inputs)[0]]
        thresholds, options = Calibration(WAN), {**FAST, "min_seq_len": 100}
        reference = torch.compile(
            copy.deepcopy(model), backend="sparge", options={**options, "calibration": thresholds}
        )
        outs.append(reference(**inputs)[0])
        if given == "options":
            options["calibration"] = thresholds
        else:
            attach(model, thresholds)
            outs.append(torch.compile(model, backend="sparge", options=options)(**inputs)[0])
        torch.compiler.reset()
        opened_graphs.clear()
        model.compile_repeated_blocks(backend="sparge", options=options)
        outs.append(model(**inputs)[0])
    dense, want, *others = outs
    for out in others:
        close(out, want)
    assert (want - dense).abs().max() > 1e-4
    (plan,) = opened_graphs
    assert [(m.site.name, d.status) for m, d in plan.steps] == [
        ("blocks.0.attn1", "sparse"),
        ("blocks.0.attn2", "dense"),
    ]
    names = [row.name for row in explain(model, options)(**inputs)]
    assert names == [f"blocks.{i}.attn{j}" for i in range(2) for j in (1, 2)]


def test_what_was_attached_and_set_in_inference_mode_is_set_outside_of_it():
    model = Model(2)
    with torch.inference_mode():
        handle = attach(model, Calibration({"*.inner": [(0.25, 0.5)] * 4}))
        handle.set(topk=0.5)
    handle.set(topk=1.0, topp=0.0)
    assert handle.get().sites[NAMES[0]] == ((1.0, 0.0),) * 4


def test_a_saved_model_with_thresholds_is_built_and_attached_before_it_is_loaded():
    saved = Model(2)
    attach(saved, Calibration({"*.inner": [(0.25, 0.5)] * 4}))
    fresh = Model(2)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*blocks\.0\.attn\.inner\.sparge\.thresholds"):
        fresh.load_state_dict(saved.state_dict())
    handle = attach(fresh, Calibration({"*.inner": [(1, 0)] * 4}))
    fresh.load_state_dict(saved.state_dict())
    assert handle.get().sites[NAMES[1]] == ((0.25, 0.5),) * 4


@pytest.mark.parametrize("differ", ["a name between", "phases", "tiles"])
def test_names_of_one_module_may_differ_in_anything(differ):
    model = Model(3)
    model.blocks[1].attn = model.blocks[2].attn = model.blocks[0].attn
    first, between, last = NAMES[:3]
    one, other = ([(share, 0.0)] * 4 for share in (0.1, 0.2))
    how = {
        "a name between": {"sites": {first: one, between: other, last: one}},
        "phases": {"phases": {0.5: {first: one, between: one, last: other}}},
        "tiles": {"tiles": {last: (2, 4, 8)}},
    }[differ]
    with pytest.warns(UserWarning, match=f"{first} and {between} and {last} are one .* those of {last}"):
        attach(model, Calibration(**{"sites": dict.fromkeys(NAMES[:3], one), **how}))


def test_a_module_with_two_names_has_the_thresholds_of_the_last_and_says_so(recwarn):
    model = Model(2)
    model.blocks[1].attn = model.blocks[0].attn
    attach(model, calibration(["*"])).remove()
    assert not recwarn
    with pytest.warns(UserWarning, match=f"{NAMES[0]} and {NAMES[1]} are one module, whose thresholds are those of"):
        attached = attach(model, calibration(NAMES[:2]))
    assert torch.equal(attached.buffers()[NAMES[0]], torch.tensor(calibration(NAMES[:2]).sites[NAMES[1]]))
