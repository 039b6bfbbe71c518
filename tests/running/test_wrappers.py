"""What is put around a model, or around a part of it, is no part of a site's name; a child with such a name is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel
from toys import Block, Stack

from sparge_compile import Calibration, attach, explain
from sparge_compile.user_model import bare

FAST = {"min_seq_len": 0, "inner": "eager"}
X = (1, 300, 32)
NAMES = ["blocks.0", "blocks.1"]
PAIRS = Calibration({name: [(0.1 + 0.2 * i, 0.0)] * 4 for i, name in enumerate(NAMES)})


def with_adapters(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv"]))


def with_saved_module(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["blocks.0.qkv"], modules_to_save=["blocks.1"])
    )


def blocks(wrap):
    def wrapped(model):
        for i, block in enumerate(model.blocks):
            model.blocks[i] = wrap(block)
        return model

    return wrapped


def hooked(module):
    hooks = pytest.importorskip("diffusers.hooks")
    registry = hooks.HookRegistry.check_if_exists_or_initialize(module)
    for name in ("first", "second"):
        registry.register_hook(hooks.ModelHook(), name)
    return module


WRAPS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "PEFT": with_adapters,
    "PEFT, a module saved": with_saved_module,
    "blocks with PEFT": blocks(with_adapters),
    "DataParallel of PEFT": lambda model: nn.DataParallel(with_adapters(model)),
    "checkpointed blocks": blocks(checkpoint_wrapper),
    "hooks of diffusers": hooked,
    "blocks with hooks of diffusers": blocks(hooked),
    "compiled blocks": blocks(lambda block: torch.compile(block, backend="sparge", options=FAST)),
}
ONLY_AS_A_WHOLE = "compiled blocks"


@pytest.mark.parametrize("wrap", WRAPS)
def test_names_are_those_of_the_bare_model(wrap):
    model, x = WRAPS[wrap](Stack()).eval(), torch.randn(X)
    with torch.no_grad():
        assert [row.name for row in explain(model, FAST)(x)] == NAMES


@pytest.mark.parametrize("give", ["calibration", "attach"])
@pytest.mark.parametrize("wrap", [wrap for wrap in WRAPS if wrap != ONLY_AS_A_WHOLE])
def test_thresholds_of_the_bare_model_fit_the_wrapped_one(wrap, give):
    base, x = Stack().eval(), torch.randn(X)
    model, options = WRAPS[wrap](copy.deepcopy(base)).eval(), dict(FAST)
    with torch.no_grad():
        want = torch.compile(base, backend="sparge", options={**FAST, "calibration": PAIRS})(x)
        if give == "attach":
            assert attach(model, PAIRS).names == tuple(NAMES)
        else:
            options["calibration"] = PAIRS
        torch.testing.assert_close(torch.compile(model, backend="sparge", options=options)(x), want)


class Held(nn.Module):
    """Children with the names that wrappers give to what they hold."""

    def __init__(self, name, inner):
        super().__init__()
        self.add_module(name, inner)
        self.name = name

    def forward(self, x):
        return getattr(self, self.name)(x)


@pytest.mark.parametrize("name", ["module", "model", "base_model"])
def test_a_child_with_the_name_of_a_wrapper_is_part_of_a_name(name):
    model, x = Held(name, Held("model", Stack())).eval(), torch.randn(X)
    names = [f"{name}.model.{site}" for site in NAMES]
    with torch.no_grad():
        assert [row.name for row in explain(model, FAST)(x)] == names
        assert [row.name for row in explain(with_adapters(model), FAST)(x)] == names
    assert bare(model) is model


class Hook:
    """Keeps the forward that it replaces, as those of diffusers do, behind a break."""

    def __init__(self, module):
        self.original_forward = module.forward
        module.forward = self.new_forward

    def new_forward(self, x):
        torch._dynamo.graph_break()
        return self.original_forward(x)


def test_sites_below_hooks_keep_their_names():
    base, x = Stack().eval(), torch.randn(X)
    model = copy.deepcopy(base)
    for block in model.blocks:
        Hook(block)
    with torch.no_grad():
        assert [row.name for row in explain(model, FAST)(x)] == NAMES
        options = {**FAST, "calibration": PAIRS}
        want = torch.compile(base, backend="sparge", options=options)(x)
        torch.testing.assert_close(torch.compile(model, backend="sparge", options=options)(x), want)


class Part(nn.Module):
    """A block without attention of its own."""

    def __init__(self):
        super().__init__()
        self.attn, self.side = Block(), nn.Linear(32, 32)

    def forward(self, x):
        return self.side(self.attn(x))


def test_modules_that_are_saved_in_blocks_that_are_compiled_alone():
    peft = pytest.importorskip("peft")
    names = [f"{name}.attn" for name in NAMES]
    pairs = Calibration({f"{name}.attn": pair for name, pair in PAIRS.sites.items()})
    base, x = Stack(2, Part).eval(), torch.randn(X)
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["side"], modules_to_save=["attn"])
    )
    options = {**FAST, "calibration": pairs}
    with torch.no_grad():
        want = torch.compile(base, backend="sparge", options=options)(x)
        for block in bare(model).blocks:
            block.compile(backend="sparge", options=options)
        torch.testing.assert_close(model(x), want)
        assert [row.name for row in explain(model, FAST)(x)] == names


class Called(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = Stack()

    def forward(self, x):
        weights = {name: 1.5 * value for name, value in self.stack.named_parameters()}
        return torch.func.functional_call(self.stack, weights, (x,))


def test_sites_below_functional_call_keep_their_names():
    model, x = Called().eval(), torch.randn(X)
    with torch.no_grad():
        assert [row.name for row in explain(model, FAST)(x)] == [f"stack.{name}" for name in NAMES]
