"""``DistillationHook``: a sparse student learns, in the user's own loop, to give what its dense teacher gives.

In: a model that the backend rewrote, and its training calls. Out: the loss of each. The loop, the optimizer and
everything that wraps the model stay the user's.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ..errors import explain_error
from ..options import Options
from ..running.listeners import want_outputs
from ..user_model import unwrapped
from .forwards import Heard, intercept
from .teacher import Teacher, check_adapters, compiled_blocks, copy_of, has_adapters

_FORMAT = 1  # of what state_dict gives


class DistillationHook:
    """Runs a dense teacher beside each training forward of a sparse student, and gives the loss between the two.

    ::

        student = torch.compile(model, backend="sparge", options={"topk": 0.03, "topp": 0.2})
        hook = DistillationHook(student)
        for batch in batches:
            student(**batch)
            hook.loss().backward()

    A training forward is one in training mode with gradients enabled; all others are left alone. The teacher gets the
    same arguments, under ``no_grad``, in evaluation mode and in the same autocast. The hook belongs to the object that
    it was given: give it what the loop calls, or what that calls in turn (a model inside DDP, say). It may be one that
    was compiled, a module whose blocks were, or a wrapper (DDP, accelerate) of these.

    Args:
        student: the model that the backend ``"sparge"`` compiles, as a whole or block by block.
        teacher: None makes a dense copy of the student's weights as they are now or, where it has adapters of PEFT,
            uses the student's own base weights with the adapters switched off; ``"base"`` asks for that. Else a module,
            which is frozen. It must not share parameters with the student.
        select: what of an output counts: an index, a key, the name of an attribute, or a function of the output that
            gives a tensor [B, ...]. None: the output itself, or the first entry of a tuple, dict or dataclass.
        layers: weights of the errors of attention outputs: a number for all sparse sites, or a mapping from names and
            patterns to numbers. 0, the default: no such errors. See :meth:`loss`. What torch compiled before is then
            compiled anew.
        compile: compile the teacher as the student is, with the options ``inner``, ``inductor`` and
            ``inductor_mode`` of the student. False: call it as it is.

    Raises:
        ValueError, TypeError: arguments that do not fit, as a teacher that shares weights with the student. At a
            training forward: a student that is not rewritten, or of which nothing is sparse; and, at a step of an
            optimizer, one that holds the teacher's parameters.

    Source: velocity distillation of SpargeAttention2 (arXiv 2602.13515, section 4.2).
    """

    def __init__(
        self,
        student: Module,
        teacher: Module | str | None = None,
        *,
        select: int | str | Callable[[Any], Tensor] | None = None,
        layers: float | Mapping[str, float] = 0.0,
        compile: bool = True,
    ) -> None:
        if not isinstance(student, Module):
            raise TypeError(_wrong("bad student", type(student).__name__, "an nn.Module", "Pass the compiled model."))
        self._select = _selector(select)
        self._layers = _weights(layers)
        if self._layers and not compile:
            raise ValueError(
                _wrong(
                    "layers need a compiled teacher",
                    "compile=False",
                    "compile=True",
                    "Its attention outputs are found in its graph; the option inner='eager' compiles nothing.",
                )
            )
        self._teacher = _teacher(student, teacher, compile)
        self._student = student
        self._forward: _Forward | None = None
        self._parts: dict[str, Tensor] = {}
        if self._layers:
            want_outputs(1)
        self._interception = intercept(student)
        self._interception.hooks.append(self)
        self._guard = None if self._teacher.is_student else _watch_optimizers(self)

    @property
    def teacher(self) -> Module:
        """The teacher's module; the student's own one where its base weights teach."""
        return self._teacher.module

    @property
    def outputs(self) -> tuple[Tensor, Tensor]:
        """What counts of the last training forward, by the student and by the teacher: for a loss of your own."""
        return self._last().student, self._last().teacher

    @property
    def parts(self) -> dict[str, Tensor]:
        """The parts of the last loss, detached: ``"output"``, and the relative squared error of each site by name."""
        return dict(self._parts)

    def loss(self, weights: Tensor | None = None) -> Tensor:
        """The loss of the last training forward, a float32 scalar.

        The mean over the samples of ``weights`` · (‖u − v‖² ÷ n + Σ w · ‖o − p‖² ÷ ‖p‖² ÷ number of sites): u, v what
        student and teacher predict (n numbers), o, p the attention outputs of a site and w its weight in ``layers``.
        In float32, whatever the models compute in. Under DDP and FSDP it is the loss of the rank's own samples.

        Args:
            weights: [B], one for each sample; default 1.

        Raises:
            ValueError: no training forward since the last loss, or weights of another shape.
        """
        last = self._last()
        error = _squared_error(last.student, last.teacher) / max(1, last.teacher[0].numel())
        parts, total = {"output": error.detach().mean()}, error
        for name, weight in last.weights.items():
            pairs = zip(last.sites[name], last.teacher_sites[name], strict=True)
            relative = torch.stack([_relative_error(o, p, len(total)) for o, p in pairs]).mean(0)
            parts[name] = relative.detach().mean()
            total = total + weight / len(last.weights) * relative
        if weights is not None:
            if weights.shape != total.shape:
                raise ValueError(
                    _wrong(
                        "weights of another shape",
                        tuple(weights.shape),
                        f"{tuple(total.shape)}, one for each sample",
                        "Give one weight for each element of the batch.",
                    )
                )
            total = total * weights.to(total)
        self._forward, self._parts = None, parts
        return total.mean()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the student: a checksum of the teacher. All ranks call it together."""
        return {"format": _FORMAT, "teacher": self._teacher.checksum()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that training goes on with the teacher that it began with.

        Raises:
            ValueError: it is another one, as when the student's checkpoint was loaded before the teacher was copied.
        """
        if set(state) != {"format", "teacher"} or state["format"] != _FORMAT:
            raise ValueError(
                _wrong("not a state of a hook", sorted(state), "what state_dict gave", "Use the same version.")
            )
        if state["teacher"] != self._teacher.checksum():
            raise ValueError(
                _wrong(
                    "training began with another teacher",
                    "a teacher with other weights, or of another dtype",
                    "the one that the state was saved with",
                    "Load the pre-trained weights, make the hook, and load the student's checkpoint after that.",
                )
            )

    def remove(self) -> None:
        """Leave the student as it was before. The teacher is let go."""
        if self not in self._interception.hooks:
            return
        self._interception.hooks.remove(self)
        self._interception.restore()
        if self._layers:
            want_outputs(-1)
        if self._guard is not None:
            self._guard.remove()
        self._forward = None

    def __enter__(self) -> DistillationHook:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        teacher = "its base weights" if self._teacher.is_student else type(unwrapped(self.teacher)).__name__
        return f"DistillationHook({type(unwrapped(self._student)).__name__}, teacher: {teacher})"

    def _last(self) -> _Forward:
        if self._forward is None:
            raise ValueError(
                _wrong(
                    "there is no training forward to give the loss of",
                    "none since the hook was made, or since its last loss",
                    "one loss for each forward of the student in training mode with gradients",
                    "Call the object that the hook was given (not what is inside it, nor from within other compiled "
                    "code), after student.train(); compile it before you make the hook.",
                )
            )
        return self._forward

    def ran(self, output: Any, heard: Heard, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The student ran on these arguments: run the teacher, and keep what the loss needs."""
        self._forward = None
        options = _check_rewritten(heard)
        weights = {
            name: next((w for pattern, w in self._layers.items() if fnmatchcase(name, pattern)), 0.0)
            for name in heard.names
        }
        weights = {name: weight for name, weight in weights.items() if weight > 0}
        if self._layers and not weights:
            raise ValueError(
                _wrong(
                    "layers fit no sparse site",
                    ", ".join(self._layers),
                    f"names and patterns of {', '.join(heard.names[:4])}",
                    "sparge_compile.explain(model)(...) lists the sites.",
                )
            )
        student = self._select(output)
        _check_outputs(student, heard, weights)
        answer = Heard()
        with ExitStack() as stack:
            for kind, dtype in heard.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype))
            given = self._teacher(args, kwargs, options, frozenset(weights), answer)
        teacher = self._select(given)
        if teacher.shape != student.shape:
            raise ValueError(
                _wrong(
                    "student and teacher differ in what they give",
                    f"{tuple(student.shape)} and {tuple(teacher.shape)}",
                    "equal shapes",
                    "Give a teacher for the same task, or select= another part of the output.",
                )
            )
        lost = [name for name in weights if len(answer.outputs.get(name, ())) != len(heard.outputs[name])]
        if lost:
            raise ValueError(
                _wrong(
                    "the teacher lacks sites of the student",
                    ", ".join(lost[:4]),
                    "a teacher of the same structure",
                    "Leave these out of layers, or give a teacher with the same module names.",
                )
            )
        sites = {name: heard.outputs[name] for name in weights}
        self._forward = _Forward(student, teacher, weights, sites, answer.outputs)


class _Forward(NamedTuple):
    """What the loss of one training forward needs: outputs [B, ...], and those of sites [B, H, L, D] by name."""

    student: Tensor
    teacher: Tensor
    weights: dict[str, float]
    sites: dict[str, list[Tensor]]
    teacher_sites: dict[str, list[Tensor]]


class _SquaredError(torch.autograd.Function):
    """Σ (x − y)² of each sample [B] in float32. Nothing is kept for the backward but x and y as they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return _squares(x.float() - y.float())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, y = ctx.saved_tensors
        grad = grad.view(-1, *[1] * (x.dim() - 1))
        return (2 * grad * (x.float() - y.float())).to(x.dtype), None


def _squared_error(x: Tensor, y: Tensor) -> Tensor:
    return _SquaredError.apply(x, y.detach())


def _relative_error(x: Tensor, y: Tensor, samples: int) -> Tensor:
    """‖x − y‖² ÷ ‖y‖² of each sample [samples]; [n, ...] may have windows or heads folded into its batch."""
    error, size = _squared_error(x, y), _squares(y)
    if len(size) % samples:  # not by samples: that of all of them
        error, size = error.sum().expand(samples), size.sum().expand(samples)
    else:
        error, size = (z.view(samples, -1).sum(1) for z in (error, size))
    return error / size.clamp(min=torch.finfo(torch.float32).tiny)


def _squares(x: Tensor) -> Tensor:
    return x.float().square().flatten(1).sum(1)


def _teacher(student: Module, given: Module | str | None, compiled: bool) -> Teacher:
    blocks = compiled_blocks(student)
    if given == "base" or (given is None and has_adapters(student)):
        check_adapters(student)
        return Teacher(unwrapped(student), is_student=True, compiled=compiled, blocks=blocks)
    if given is None:
        return Teacher(copy_of(student), is_student=False, compiled=compiled, blocks=blocks)
    if not isinstance(given, Module):
        raise TypeError(
            _wrong("bad teacher", repr(given), "an nn.Module, 'base' or None", "Leave it out: a dense copy is made.")
        )
    mine = {id(p) for p in unwrapped(student).parameters()}
    shared = [name for name, p in unwrapped(given).named_parameters() if id(p) in mine]
    if shared:
        raise ValueError(
            _wrong(
                "the teacher shares parameters with the student, which would train it",
                ", ".join(shared[:4]),
                "weights of its own",
                "Leave teacher out (a copy is made), give copy.deepcopy(model), or teacher='base' for adapters.",
            )
        )
    return Teacher(given, is_student=False, compiled=compiled, blocks=blocks)


def _selector(select: Any) -> Callable[[Any], Tensor]:
    def part(output: Any) -> Any:
        if callable(select):
            return select(output)
        if isinstance(select, str):
            return output[select] if isinstance(output, Mapping) else getattr(output, select)
        if select is not None:
            return output[select]
        if isinstance(output, Mapping):
            return next(iter(output.values()), None)
        if isinstance(output, (tuple, list)):
            return output[0] if output else None
        if dataclasses.is_dataclass(output):
            return getattr(output, dataclasses.fields(output)[0].name)
        return output

    def chosen(output: Any) -> Tensor:
        found = part(output)
        if not isinstance(found, Tensor) or found.dim() == 0:
            raise TypeError(
                _wrong(
                    "select finds no tensor [B, ...] in the output",
                    f"{type(found).__name__} in {type(output).__name__}",
                    "an index, a key, an attribute or a function that leads to the prediction",
                    "Pass select=.",
                )
            )
        return found

    if not (select is None or callable(select) or (isinstance(select, (int, str)) and not isinstance(select, bool))):
        raise TypeError(_wrong("bad select", repr(select), "an index, a name or a function", "Change it."))
    return chosen


def _weights(layers: Any) -> dict[str, float]:
    """Weights above 0 by pattern; none where no layer counts."""
    found = dict(layers) if isinstance(layers, Mapping) else {"*": layers}
    for name, weight in found.items():
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not isinstance(name, str) or not number or not weight >= 0:
            raise ValueError(
                _wrong("bad layers", repr(layers), "a number from 0 on, or one for each name or pattern", "Change it.")
            )
    return found if any(found.values()) else {}


def _check_rewritten(heard: Heard) -> Options:
    if heard.options is None:
        raise ValueError(
            _wrong(
                "the student is not rewritten",
                "a forward in which no graph of the backend 'sparge' ran",
                "torch.compile(model, backend='sparge'), or blocks compiled so",
                "Compile it before you make the hook.",
            )
        )
    if not heard.names:
        raise ValueError(
            _wrong(
                "nothing is sparse in the student",
                "a model whose attention all stays dense",
                "at least one sparse site",
                "sparge_compile.explain(model)(...) says why; short sequences need min_seq_len=0.",
            )
        )
    return heard.options


def _check_outputs(student: Tensor, heard: Heard, weights: Mapping[str, float]) -> None:
    """Every site that counts gave an output with a gradient."""
    if not student.requires_grad:
        raise ValueError(
            _wrong(
                "the student's output has no gradient",
                "an output that does not require one",
                "a student with parameters that do",
                "Is it frozen, or run under no_grad?",
            )
        )
    for name in weights:
        if not all(output.requires_grad for output in heard.outputs.get(name, ())) or name not in heard.outputs:
            raise ValueError(
                _wrong(
                    "the attention output of a site has no gradient",
                    name,
                    "sites that run with gradients enabled",
                    "Use torch.utils.checkpoint with use_reentrant=False, or leave this site out of layers.",
                )
            )


def _watch_optimizers(hook: DistillationHook) -> Any:
    """Refuse the first step of any optimizer that holds parameters of the hook's teacher."""
    seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
    teacher, handle = weakref.ref(hook._teacher), None

    def check(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        found = teacher()
        if found is None and handle is not None:
            handle.remove()
        if torch.compiler.is_compiling() or found is None or optimizer in seen:
            return
        frozen = {id(p): name for name, p in found.parameters()}
        held = [frozen[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in frozen]
        if held:
            raise ValueError(
                _wrong(
                    "the teacher is in an optimizer",
                    f"{type(optimizer).__name__} with {', '.join(held[:4])} of the teacher",
                    "the student's parameters",
                    "Make the optimizer from student.parameters(), not from a module that holds the teacher too.",
                )
            )
        seen.add(optimizer)

    handle = register_optimizer_step_pre_hook(check)
    return handle


def _wrong(what: str, given: object, allowed: str, todo: str) -> str:
    return explain_error(f"DistillationHook: {what}", given=given, allowed=allowed, todo=todo)
