"""What Dynamo leaves to Python is told while a model is compiled, and so is a model without attention."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from toys import Block, Stack

from sparge_compile import backend, explain, notices
from sparge_compile.running.frames import hear_of_left_frames

FAST = {"min_seq_len": 0, "inner": "eager"}


class Loop(Block):
    """A graph break in a loop: the frame is left to Python, the projections behind it are compiled."""

    def forward(self, x):
        for _ in range(2):
            torch._dynamo.graph_break()
            x = x + F.scaled_dot_product_attention(x, x, x)
        return self.project(x)

    def project(self, x):
        return self.out(x)


@pytest.fixture
def x():
    return torch.randn(1, 100, 32)


@pytest.fixture(autouse=True)
def first_graph():
    """From the first graph of the backend on it hears of frames; torch.compiler.reset makes an end of that."""
    start()


def start():
    hear_of_left_frames(backend.sparge, notices.tell_of_left)


def said(caught, words):
    return [w for w in caught if words in str(w.message)]


def compiled(model, x, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(model, backend="sparge", options={**FAST, **options})(x)
    return caught


def test_a_function_with_attention_that_is_left_to_python_is_warned_of_once(x):
    (warning,) = said(compiled(Stack(2, Loop), x), "to Python")
    assert "'forward' (" in str(warning.message) and "test_frames.py:" in str(warning.message)


def test_a_function_that_calls_a_library_is_warned_of_and_the_door_is_named(x):
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
        return F.scaled_dot_product_attention(q, k, v)

    def attend(x):
        for _ in range(2):
            torch._dynamo.graph_break()
            x = flash_attn_func(x, x, x)
        return x

    (warning,) = said(compiled(attend, x), "to Python")
    assert "'attend' (" in str(warning.message) and "replace_attention(model)" in str(warning.message)


def test_dense_silences_it_and_error_raises_with_the_next_graph(x):
    assert not said(compiled(Stack(2, Loop), x, on_unsupported="dense"), "sparge")
    torch.compiler.reset()
    start()
    with pytest.raises(Exception, match=r"cannot be replaced: got 'forward'.* outside of graphs"):
        compiled(Stack(2, Loop), x, on_unsupported="error")


def test_other_backends_and_frames_without_attention_are_no_concern(x):
    def loop(x):
        for _ in range(2):
            torch._dynamo.graph_break()
            x = 2 * x
        return x

    assert not said(compiled(loop, x), "to Python")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(Stack(2, Loop), backend="eager")(x)
    assert not said(caught, "sparge")


def test_warnings_that_are_errors_do_not_disturb_dynamo(x):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "sparge", UserWarning)
        torch.compile(Stack(2, Loop), backend="sparge", options=FAST)(x)
    torch.compiler.reset()  # raises where Dynamo was left in the middle of a compilation


def test_after_explain_dynamo_tries_what_it_left_to_python_again(x):
    model = Stack(2, Loop)
    assert len(explain(model, FAST)(x)) == 2
    assert said(compiled(model, x), "to Python")


def test_a_model_without_attention_is_warned_of_once(x):
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    (warning,) = said(compiled(model, x), "no attention was found")
    assert "in Sequential" in str(warning.message)
    torch.compiler.reset()
    assert not said(compiled(model, x, on_unsupported="dense"), "no attention")
    with pytest.warns(UserWarning, match="no attention was found in Sequential"):
        assert not explain(model, FAST)(x).sites


def test_a_graph_without_attention_beside_others_is_no_reason_to_warn(x):
    class Broken(Stack):
        def forward(self, x):
            x = 2 * x
            torch._dynamo.graph_break()
            return 2 * self.blocks[0](x)

    assert not said(compiled(Broken(), x), "no attention")
    assert not said(compiled(Stack(), x), "no attention")


def test_a_block_without_attention_is_not_the_model(x):
    """As the patch embedding that diffusers compiles among the repeated blocks of HunyuanVideo."""
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), Stack())
    model[0].compile(backend="sparge", options=FAST)
    model[1].compile(backend="sparge", options=FAST)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(x)
    assert not said(caught, "no attention")


def test_hooks_of_the_compiled_model_are_no_model_without_attention(x):
    model = Stack()
    model.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model.register_forward_hook(lambda module, args, out: 2 * out)
    assert not said(compiled(model, x), "no attention")
    torch.compiler.reset()
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    model.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    assert len(said(compiled(model, x), "no attention was found in Sequential")) == 1
