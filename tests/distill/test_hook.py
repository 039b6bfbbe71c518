"""The distillation hook in one process: its loss and gradients, what it leaves alone, and each misuse."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_error_bounded
from models import wan
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import Block

import sparge_compile
from sparge_compile import Calibration, DistillationHook, SparsitySchedule, attach
from sparge_compile.distill.checksum import checksum
from sparge_compile.kernels import cpu, reference

LENGTH = 300  # neither 64 nor 128 divides it
SPARSE = {"min_seq_len": 0, "topk": 0.3, "topp": 0.0, "inner": "eager"}
NO_TERMS = torch.zeros(1)  # nothing cancels here: roundings count by the size of the results


class Plain(nn.Module):
    """Two blocks of attention; ``reentrant`` is None without checkpointing."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(heads=2) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def batch(size: int = 2) -> Tensor:
    return torch.randn(size, LENGTH, 32)


def compiled(model: nn.Module, **options: object) -> nn.Module:
    return torch.compile(model, backend="sparge", fullgraph=True, options={**SPARSE, **options})


def compiled_blocks(model: Plain) -> Plain:
    for block in model.blocks:
        block.compile(backend="sparge", fullgraph=True, options=SPARSE)
    return model


def defined(model: nn.Module, *args: Tensor, **kwargs: object):
    """What a model gives with the definition of the sparse op in the place of SDPA over long keys, in float64 with the
    blocks that float32 keeps, and the outputs of these."""
    dense, outputs = F.scaled_dot_product_attention, []

    def attention(query: Tensor, key: Tensor, value: Tensor, **named: object) -> Tensor:
        if key.shape[2] < 64:
            return dense(query, key, value, **named)
        q, k, v = query, key, value
        thresholds = torch.tensor([[SPARSE["topk"], SPARSE["topp"]]]).expand(q.shape[1], 2)
        scale = q.shape[-1] ** -0.5
        found = cpu.block_map(q.detach().float(), k.detach().float(), thresholds, None, False, scale)
        outputs.append(reference.attention(q, k, v, sparge_compile.BlockMap(*found), None, False, scale)[0])
        return outputs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        return model(*args, **kwargs), outputs


def dense_outputs(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    dense, outputs = F.scaled_dot_product_attention, []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", lambda *a: outputs.append(dense(*a)) or outputs[-1])
        return model(x), outputs


def relative(x: Tensor, y: Tensor) -> Tensor:
    return ((x - y).square().flatten(1).sum(1) / y.square().flatten(1).sum(1)).mean()


@pytest.mark.parametrize("way", ["whole", "blocks", "checkpoint inside", "checkpoint around"])
def test_loss_and_gradients_are_those_of_the_definition(way):
    model = Plain(reentrant=False if "checkpoint" in way else None)
    exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    student = compiled_blocks(model) if way in ("blocks", "checkpoint around") else compiled(model)
    x = batch()
    with DistillationHook(student, layers={"blocks.*": 2.0}) as hook:
        student(x)
        loss = hook.loss()
        loss.backward()
        assert set(hook.parts) == {"output", "blocks.0", "blocks.1"}
    found = []
    for other, z in ((exact, x.double()), (plain, x)):
        other.reentrant = None
        target, teachers = dense_outputs(other, z)
        out, students = defined(other, z)
        pairs = zip(students, teachers, strict=True)
        total = (out - target).square().mean() + 2.0 * torch.stack([relative(s, t) for s, t in pairs]).mean()
        total.backward()
        found.append((total.detach(), [p.grad for p in other.parameters()]))
    (exact_loss, exact_grads), (plain_loss, plain_grads) = found
    assert_error_bounded(loss.detach(), exact_loss, plain_loss, NO_TERMS, "loss", factor=8)
    for (name, p), e, g in zip(model.named_parameters(), exact_grads, plain_grads, strict=True):
        assert_error_bounded(p.grad, e, g, NO_TERMS, name, factor=8)


@pytest.mark.slow  # nearly all of it in the C++ compiler
@pytest.mark.parametrize("reentrant", [None, False], ids=["plain", "checkpoint"])
def test_inductor_gives_the_same_gradients(reentrant):
    model, x = Plain(reentrant), batch()
    grads = []
    for inner in ("eager", "inductor"):
        model.zero_grad()
        student = compiled(model, inner=inner)
        with DistillationHook(student, layers=1.0) as hook:
            student(x)
            hook.loss().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def test_nothing_of_the_teacher_is_kept_for_the_backward():
    """Autograd keeps as much beside a teacher as without one: its own output, and that of the student."""
    student, x = compiled(Plain()), batch()

    def kept(call: Callable[[], Tensor]) -> int:
        found: dict[int, int] = {}

        def note(y: Tensor) -> Tensor:
            found[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
            return y

        with torch.autograd.graph.saved_tensors_hooks(note, lambda y: y):
            alive = call()
        del alive
        return sum(found.values())

    def hooked() -> Tensor:
        student(x)
        return hook.loss()

    alone = kept(lambda: student(x).square().mean())
    with DistillationHook(student) as hook:
        assert kept(hooked) <= alone + 4 * x.numel() * x.element_size()


def test_a_video_transformer_trains_and_evaluates_in_full_graphs():
    model, inputs = wan(layers=1)
    model.train()
    exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    student = compiled(model)
    hook = DistillationHook(student, compile=False)
    torch._dynamo.utils.counters.clear()
    student(**inputs)
    hook.loss().backward()
    student.eval()
    with torch.no_grad():
        student(**inputs)
    assert not torch._dynamo.utils.counters["graph_break"]
    grads = []
    for other, dtype in ((exact, torch.float64), (plain, torch.float32)):
        given = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
        with torch.no_grad():
            target = other(**given)[0]
        out, _ = defined(other, **given)
        (out[0] - target).square().mean().backward()
        grads.append([p.grad for p in other.parameters()])
    for (name, p), e, g in zip(model.named_parameters(), *grads, strict=True):
        if e is not None:
            assert_error_bounded(p.grad, e, g, NO_TERMS, name, factor=16)


class WrittenOut(Block):
    """Attention as products and a softmax over [B · H, L, D], which is found as such."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        return x + self.out((weights @ v).unflatten(0, (-1, 2)).transpose(1, 2).flatten(2))


class Opened(Block):
    """Attention inside a larger call."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.transpose(0, 1)
        out, _ = F.multi_head_attention_forward(
            q, q, q, q.shape[-1], 2, self.qkv.weight, self.qkv.bias, None, None, False, 0.0,
            self.out.weight, self.out.bias, need_weights=False,
        )  # fmt: skip
        return x + out.transpose(0, 1)


@pytest.mark.parametrize("kind", [WrittenOut, Opened])
@pytest.mark.parametrize("reentrant", [None, False], ids=["plain", "checkpoint"])
def test_sites_of_any_spelling_give_their_outputs(kind, reentrant):
    """The same weights give the same errors, however attention is spelled."""
    torch.manual_seed(0)
    want, x = Plain(), batch()
    model = Plain(reentrant)
    for i, block in enumerate(want.blocks):
        model.blocks[i] = kind()
        model.blocks[i].load_state_dict(block.state_dict())
    found = []
    for each in (want, model):
        student = compiled(each)
        with DistillationHook(student, layers=1.0) as hook:
            student(x)
            hook.loss().backward()
            found.append(hook.parts)
    assert found[0].keys() == found[1].keys() and len(found[0]) == 3
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-8)


def test_the_teacher_is_a_frozen_copy_and_stays_as_it_is():
    student = compiled(Plain())
    before = copy.deepcopy(student._orig_mod.state_dict())
    hook = DistillationHook(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    x = batch()
    for _ in range(5):
        optimizer.zero_grad()
        student(x)
        loss = hook.loss()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(p.requires_grad for p in hook.teacher.parameters())
    for name, value in hook.teacher.state_dict().items():
        assert torch.equal(value, before[name])


def test_evaluation_and_no_grad_are_left_alone():
    student = compiled(Plain())
    hook, calls = DistillationHook(student), []
    hook.teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        student(batch())
    student.eval()
    student(batch())
    assert not calls
    with pytest.raises(ValueError, match="no training forward"):
        hook.loss()
    student.train()
    student(batch())
    assert calls


def test_what_a_checkpoint_computes_again_is_no_forward():
    student = compiled(Plain())
    with DistillationHook(student) as hook:
        x = batch()
        student(x)
        want = hook.loss()
        checkpoint(student, x, use_reentrant=False)
        loss = hook.loss()
        loss.backward()
        assert torch.equal(loss, want)
        with pytest.raises(ValueError, match="no training forward"):
            hook.loss()


def test_gradients_accumulate_over_micro_batches():
    model = Plain()
    student, x = compiled(model), batch(4)
    with DistillationHook(student) as hook:
        student(x)
        hook.loss().backward()
        whole = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        for part in x.chunk(2):
            student(part)
            (hook.loss() / 2).backward()
    for p, want in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-7)


def test_weights_count_samples():
    student, x = compiled(Plain()), batch(3)
    hook = DistillationHook(student)
    student(x)
    hook.loss(torch.tensor([0.0, 3.0, 0.0])).backward()
    student(x[1:2])
    alone = hook.loss()
    student(x)
    torch.testing.assert_close(hook.loss(torch.tensor([0.0, 3.0, 0.0])), alone)


def test_autocast_reaches_the_teacher():
    student = compiled(Plain())
    hook = DistillationHook(student, layers=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        student(batch())
        assert [x.dtype for values in hook._last().teacher_sites.values() for x in values] == [torch.bfloat16] * 2
        loss = hook.loss()
    assert loss.dtype == torch.float32
    loss.backward()


@pytest.mark.parametrize("way", ["whole", "blocks"])
def test_mixed_precision_of_accelerate_reaches_the_teacher(way):
    """It enters autocast inside of what the loop calls, where the hook does not see it."""
    accelerate = pytest.importorskip("accelerate")
    model = Plain()
    student = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(
        compiled(model) if way == "whole" else compiled_blocks(model)
    )
    hook = DistillationHook(student, layers=1.0)
    student(batch())
    assert [x.dtype for values in hook._last().teacher_sites.values() for x in values] == [torch.bfloat16] * 2
    accelerate.state.AcceleratorState._reset_state(True)


def test_a_copy_that_would_run_the_student_is_refused():
    model = Plain()
    model.forward = lambda x: Plain.forward(model, x)
    with pytest.raises(ValueError, match="would still run the student"):
        DistillationHook(compiled(model))


def test_several_hooks_come_and_go_in_any_order():
    student = compiled(Plain())
    forward = student.forward
    first = DistillationHook(student)
    second = DistillationHook(student, teacher=Plain())
    student(batch())
    assert first.loss() != second.loss()
    first.remove()
    student(batch())
    second.loss()
    with pytest.raises(ValueError, match="no training forward"):
        first.loss()
    second.remove()
    assert student.forward is forward


def test_copies_of_a_student_are_not_hooked():
    student = compiled(Plain())
    hook = DistillationHook(student)
    average = torch.optim.swa_utils.AveragedModel(student._orig_mod, use_buffers=True)
    x = batch()
    student(x)
    hook.loss().backward()
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    average.update_parameters(student._orig_mod)
    average(x)
    with pytest.raises(ValueError, match="no training forward"):
        hook.loss()


@pytest.mark.parametrize(
    "select, output",
    [
        (None, lambda x: {"sample": x}),
        (None, lambda x: (x, 1)),
        (1, lambda x: (1, x)),
        ("b", lambda x: {"a": 1, "b": x}),
        (lambda found: found[0][0], lambda x: ((x,),)),
    ],
    ids=["dict", "tuple", "index", "key", "function"],
)
def test_select_finds_the_prediction(select, output):
    class Wrapped(Plain):
        def forward(self, x: Tensor) -> object:
            return output(super().forward(x))

    student = compiled(Wrapped())
    hook = DistillationHook(student, select=select)
    student(batch())
    assert hook.outputs[0].shape == (2, LENGTH, 32)


def test_the_teacher_may_be_called_as_it_is():
    student = compiled(Plain())
    with DistillationHook(student, compile=False) as called, DistillationHook(student, called.teacher) as again:
        student(batch())
        torch.testing.assert_close(called.loss(), again.loss())


def test_what_was_compiled_before_the_hook_gives_its_sites_too():
    student = compiled(Plain())
    student(batch())
    hook = DistillationHook(student, layers=1.0)
    student(batch())
    hook.loss()
    assert set(hook.parts) == {"output", "blocks.0", "blocks.1"}


def test_equal_models_that_were_compiled_without_site_outputs_do_not_hide_them():
    """Dynamo runs a copy of a model with what it compiled for the model itself."""
    model = Plain()
    other = copy.deepcopy(model)
    student = compiled(model)
    with DistillationHook(student) as hook:
        student(batch())
    student = compiled(other)
    with DistillationHook(student, layers=1.0) as hook:
        student(batch())
        hook.loss()
    assert set(hook.parts) == {"output", "blocks.0", "blocks.1"}


def test_a_teacher_of_a_sparse_student_is_dense():
    """Blocks that were wrapped by torch.compile stay sparse in a deep copy unless they are unwrapped."""
    model = Plain()
    want = copy.deepcopy(model)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = compiled(block)
    hook, x = DistillationHook(model), batch()
    model(x)
    torch.testing.assert_close(hook.outputs[1], want(x))


# ---- adapters


def with_adapters(model: nn.Module | None = None) -> nn.Module:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        Plain() if model is None else model, peft.LoraConfig(r=4, target_modules=["qkv", "out"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def test_base_weights_teach_adapters():
    model = with_adapters()
    student, x = compiled(model), batch()
    with DistillationHook(student, layers=1.0) as hook:
        assert hook.teacher is model
        student(x)
        target = hook.outputs[1]
        hook.loss().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora" in name)
    with model.disable_adapter():
        torch.testing.assert_close(target, model(x))
    assert not torch.allclose(target, model(x))


def test_base_weights_that_train_are_no_teacher():
    model = with_adapters()
    model.base_model.model.blocks[0].out.base_layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="takes gradients"):
        DistillationHook(compiled(model))


# ---- misuse


def run(hook: DistillationHook, student: nn.Module) -> None:
    student(batch())
    hook.loss()


def test_a_student_that_is_not_rewritten():
    student = torch.compile(Plain(), backend="eager")
    with pytest.raises(ValueError, match="not rewritten"):
        run(DistillationHook(student), student)


def test_nothing_sparse():
    student = compiled(Plain(), min_seq_len=10_000)
    with pytest.raises(ValueError, match="nothing is sparse"):
        run(DistillationHook(student), student)


def test_what_is_fine_tuned_is_decided_as_the_inference_that_it_is_for():
    """Alone, a training step would be dense where sparse attention does not pay with its backward."""
    six = {"dense_base": 0.0, "dense_pair": 1e-9, "sparse_base": 0.0, "pool": 0.0, "select": 0.0, "sparse_pair": 1e-9}
    options = {"inner": "eager", "topk": 0.3, "topp": 0.0, "costs": {**six, "training": {**six, "sparse_base": 1.0}}}
    model, x = Plain(), torch.randn(1, 1100, 32)
    student = torch.compile(model, backend="sparge", options=options)
    assert not sparge_compile.explain(model, options)(x).sparse
    with DistillationHook(student) as hook:
        student(x)
        hook.loss().backward()
        assert len(sparge_compile.explain(model, options)(x).sparse) == 2
    assert not sparge_compile.explain(model, options)(x).sparse


def test_the_teacher_in_the_optimizer():
    student = compiled(Plain())
    hook = DistillationHook(student)
    both = nn.ModuleList([student, hook.teacher])
    optimizer = torch.optim.AdamW(both.parameters())
    student(batch())
    hook.loss().backward()
    with pytest.raises(ValueError, match="teacher is in an optimizer"):
        optimizer.step()
    hook.remove()
    optimizer.step()


def test_a_teacher_that_shares_weights():
    student = compiled(Plain())
    with pytest.raises(ValueError, match="shares parameters"):
        DistillationHook(student, student._orig_mod)
    with pytest.raises(ValueError, match="no adapters"):
        DistillationHook(student, "base")


def test_a_teacher_for_another_task():
    class Other(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, :5]

    student = compiled(Plain())
    hook = DistillationHook(student, Other())
    with pytest.raises(ValueError, match="differ in what they give"):
        student(batch())
    with pytest.raises(ValueError, match="no training forward"):
        hook.loss()


def test_reentrant_checkpoints_hide_sites():
    student = compiled_blocks(Plain(reentrant=True))
    x = batch().requires_grad_()
    with DistillationHook(student) as hook:
        student(x)
        hook.loss().backward()
    DistillationHook(student, layers=1.0)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        student(x)


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"layers": -1.0}, "bad layers"),
        ({"layers": {"blocks.0": "1"}}, "bad layers"),
        ({"layers": 1.0, "compile": False}, "compiled teacher"),
        ({"select": 1.5}, "bad select"),
        ({"teacher": 3}, "bad teacher"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_arguments(arguments, match):
    student = compiled(Plain())
    with pytest.raises((TypeError, ValueError), match=match):
        DistillationHook(student, **arguments)


def test_layers_that_fit_no_site():
    student = compiled(Plain())
    DistillationHook(student, layers={"other.*": 1.0})
    with pytest.raises(ValueError, match=r"fit no sparse site.*blocks\.0"):
        student(batch())


def test_weights_of_another_shape():
    student = compiled(Plain())
    hook = DistillationHook(student)
    student(batch())
    with pytest.raises(ValueError, match="one for each sample"):
        hook.loss(torch.ones(5))


def test_resuming_with_another_teacher_is_refused():
    model = Plain()
    hook = DistillationHook(compiled(model))
    state = hook.state_dict()
    hook.load_state_dict(state)
    with torch.no_grad():
        model.blocks[0].qkv.bias[0] += 1e-6
    with pytest.raises(ValueError, match="another teacher"):
        DistillationHook(compiled(copy.deepcopy(model))).load_state_dict(state)


# ---- schedule


def test_thresholds_anneal_and_nothing_is_compiled_anew():
    model = Plain()
    attached = attach(model, Calibration({"blocks.0": [(0.03, 0.2)], "blocks.1": [(0.8, 0.0)]}))
    target = {name: values.clone() for name, values in attached.buffers().items()}
    student = compiled(model)
    hook, schedule = DistillationHook(student), SparsitySchedule(attached, steps=4, start=(0.5, 0.6))
    torch.testing.assert_close(attached.buffers()["blocks.0"], torch.tensor([[0.5, 0.6]]))
    torch.testing.assert_close(attached.buffers()["blocks.1"], torch.tensor([[0.8, 0.6]]))
    seen, before = [], None
    for _ in range(6):
        student(batch())
        hook.loss().backward()
        before = before or dict(torch._dynamo.utils.counters["stats"])
        schedule.step()
        seen.append(attached.buffers()["blocks.0"][0, 0].item())
    assert dict(torch._dynamo.utils.counters["stats"]) == before
    assert seen == sorted(seen, reverse=True) and schedule.progress == 1
    for name, values in attached.buffers().items():
        assert torch.equal(values, target[name])


def test_a_schedule_goes_on_from_its_state():
    def make() -> tuple[sparge_compile.SparsitySchedule, Tensor]:
        attached = attach(Plain(), Calibration({"*": [(0.05, 0.2)]}))
        return SparsitySchedule(attached, steps=5), attached.buffers()["blocks.1"]

    schedule, values = make()
    schedule.step()
    schedule.step()
    other, others = make()
    other.load_state_dict(schedule.state_dict())
    assert torch.equal(values, others) and other.progress == 0.4
    with pytest.raises(ValueError, match="other thresholds"):
        SparsitySchedule(attach(Plain(), Calibration({"blocks.0": [(0.1, 0.1)]})), 3).load_state_dict(
            other.state_dict()
        )


def test_a_schedule_refuses_phases_and_bad_steps():
    phased = attach(Plain(), Calibration({"*": [(1.0, 0.0)]}, phases={0.5: {"*": [(0.1, 0.0)]}}))
    with pytest.raises(ValueError, match="have phases"):
        SparsitySchedule(phased, 5)
    with pytest.raises(ValueError, match="number of steps"):
        SparsitySchedule(attach(Plain(), Calibration({"*": [(0.1, 0.0)]})), -1)


# ---- quantised base weights


class Sealed(torch.Tensor):
    """int8 weights with a scale, as a tensor without storage that refuses whatever it does not know."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, requires_grad=False)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __reduce_ex__(self, protocol):
        return type(self), (self.values, self.scale)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.alias.default, aten.clone.default):
            return cls(args[0].values.clone(), args[0].scale.clone())
        if func is aten.t.default:
            return aten.t(args[0].values * args[0].scale)
        raise NotImplementedError(f"{func} of quantised weights")


class Quantised(Sealed):
    """One that says what it consists of, as torch asks of tensors that it shall compile."""

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["values"], inner["scale"])


class OfItsOwnKind(torch.nn.Parameter):
    """A tensor with storage whose results have its type and need what it carries (as GGUF's)."""

    def __new__(cls, data, scale):
        made = torch.Tensor._make_subclass(cls, data, False)
        made.scale = scale
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return cls(result, args[0].scale) if isinstance(result, torch.Tensor) else result


def quantised(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 127, (8, 6), dtype=torch.int8, generator=generator)
    return kind(values, torch.full((8, 1), 0.01))


@pytest.mark.parametrize("kind", [Quantised, Sealed, OfItsOwnKind])
def test_the_checksum_of_quantised_weights(kind):
    weight = quantised(kind)
    assert checksum([weight]) == checksum([quantised(kind)]) != checksum([quantised(kind, seed=1)])
    changed = quantised(kind)
    (changed.data if kind is OfItsOwnKind else changed.values)[3, 3] += 1
    assert checksum([changed]) != checksum([weight])


def test_a_checkpoint_of_adapters_on_quantised_weights():
    model = with_adapters()
    frozen = [m for m in model.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    for linear in frozen:
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        values = (linear.weight.detach() / scale).round().to(torch.int8)
        linear.weight = nn.Parameter(Quantised(values, scale), requires_grad=False)
    student = compiled(model.train())
    hook = DistillationHook(student)
    student(batch())
    hook.loss().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(grad is not None for grad in trained.values())
    state = hook.state_dict()
    hook.load_state_dict(state)
    frozen[0].weight.values[0, 0] ^= 1
    with pytest.raises(ValueError, match="another teacher"):
        hook.load_state_dict(state)


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_the_checksum_of_weights_that_torchao_quantised(name):
    quantization = pytest.importorskip("torchao.quantization")
    linear = nn.Linear(16, 64)
    before = checksum(linear.parameters())
    quantization.quantize_(linear, getattr(quantization, name)())
    assert checksum(linear.parameters()) == checksum(linear.parameters()) != before
