"""``DistillationHook``: a sparse student learns, in the user's own loop, to give what its dense teacher gives.

In: a model that the backend rewrote, and its training calls. Out: the loss of each. The loop, the optimizer and
everything that wraps the model stay the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..errors import type_error, value_error
from ..options import Options
from ..running.fine_tuning import fine_tune
from ..running.listeners import want_outputs
from ..user_model import unwrapped
from .forwards import GraphCalls, TrainingForwards
from .loss import Prediction, errors_by_sample, layer_weights, output_selector
from .make_teacher import make_teacher
from .teacher import refuse_in_optimizers

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
            raise type_error(
                "DistillationHook: bad student",
                given=type(student).__name__,
                allowed="an nn.Module",
                todo="Pass the compiled model.",
            )
        self._select = output_selector(select)
        self._layers = layer_weights(layers)
        if self._layers and not compile:
            raise value_error(
                "DistillationHook: layers need a compiled teacher",
                given="compile=False",
                allowed="compile=True",
                todo="Leave compile out: the outputs are found in a graph. The option inner='eager' compiles nothing.",
            )
        self._teacher = make_teacher(student, teacher, compiled=compile)
        self._student = student
        self._prediction: Prediction | None = None
        self._parts: dict[str, Tensor] = {}
        if self._layers:
            want_outputs(1)
        fine_tune(student, 1)
        self._forwards: TrainingForwards | None = TrainingForwards.of(student)
        self._forwards.add(self._teach)
        self._guard = None if self._teacher.is_student else refuse_in_optimizers(self._teacher)

    @property
    def teacher(self) -> Module:
        """The teacher's module; the student's own one where its base weights teach."""
        return self._teacher.module

    @property
    def outputs(self) -> tuple[Tensor, Tensor]:
        """The predictions [B, ...] of student and teacher in the last training forward: for a loss of your own.

        Raises:
            ValueError: no training forward since the last loss.
        """
        return self._last().student, self._last().teacher

    @property
    def parts(self) -> dict[str, Tensor]:
        """The parts of the last loss, detached: ``"output"``, and the relative squared error of each site by name."""
        return dict(self._parts)

    def loss(self, weights: Tensor | None = None) -> Tensor:
        """Return the loss of the last training forward, a float32 scalar.

        The mean over the samples of ``weights`` · (‖u − v‖² ÷ n + Σ w · ‖o − p‖² ÷ ‖p‖² ÷ number of sites): u, v what
        student and teacher predict (n numbers), o, p the attention outputs of a site and w its weight in ``layers``.
        In float32, whatever the models compute in. Under DDP and FSDP it is the loss of the rank's own samples.

        Args:
            weights: [B], one for each sample; default 1.

        Raises:
            ValueError: no training forward since the last loss, or weights of another shape.
        """
        total, parts = errors_by_sample(self._last())
        if weights is not None:
            if weights.shape != total.shape:
                raise value_error(
                    "DistillationHook: weights of another shape",
                    given=tuple(weights.shape),
                    allowed=f"{tuple(total.shape)}, one for each sample",
                    todo="Give one weight for each element of the batch.",
                )
            total = total * weights.to(total)
        self._prediction, self._parts = None, parts
        return total.mean()

    def state_dict(self) -> dict[str, Any]:
        """Return a checksum of the teacher, to be saved beside the student. All ranks call it together."""
        return {"format": _FORMAT, "teacher": self._teacher.checksum()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that training goes on with the teacher that it began with.

        Raises:
            ValueError: it is another one, as when the student's checkpoint was loaded before the teacher was copied.
        """
        if set(state) != {"format", "teacher"} or state["format"] != _FORMAT:
            raise value_error(
                "DistillationHook: not a state of a hook",
                given=sorted(state),
                allowed="what state_dict gave",
                todo="Load what hook.state_dict() of the same version gave.",
            )
        if state["teacher"] != self._teacher.checksum():
            raise value_error(
                "DistillationHook: training began with another teacher",
                given="a teacher with other weights, or of another dtype",
                allowed="the one that the state was saved with",
                todo="Load the pre-trained weights, make the hook, and load the student's checkpoint after that.",
            )

    def remove(self) -> None:
        """Leave the student as it was before. The teacher is let go."""
        if self._forwards is None:
            return
        self._forwards.remove(self._teach)
        self._forwards = None
        if self._layers:
            want_outputs(-1)
        fine_tune(self._student, -1)
        if self._guard is not None:
            self._guard.remove()
        self._prediction = None

    def __enter__(self) -> DistillationHook:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        teacher = "its base weights" if self._teacher.is_student else type(unwrapped(self.teacher)).__name__
        return f"DistillationHook({type(unwrapped(self._student)).__name__}, teacher: {teacher})"

    def _last(self) -> Prediction:
        if self._prediction is None:
            raise value_error(
                "DistillationHook: there is no training forward to give the loss of",
                given="none since the hook was made, or since its last loss",
                allowed="one loss for each forward of the student in training mode with gradients",
                todo="Call the object that the hook was given (not what is inside it, nor from within other compiled "
                "code), after student.train(); compile it before you make the hook.",
            )
        return self._prediction

    def _teach(self, output: Any, graphs: GraphCalls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """After a training forward of the student: run the teacher, and keep what the loss needs."""
        self._prediction = None
        options = _check_rewritten(graphs)
        weights = self._weights_of(graphs.names)
        student = self._select(output)
        _check_gradients(student, graphs, weights)
        teacher_graphs = GraphCalls()
        with ExitStack() as stack:
            for kind, dtype in graphs.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype))
            teacher_output = self._teacher(args, kwargs, options, frozenset(weights), teacher_graphs)
        student_sites = {name: graphs.outputs[name] for name in weights}
        prediction = Prediction(student, self._select(teacher_output), weights, student_sites, teacher_graphs.outputs)
        _check_alike(prediction)
        self._prediction = prediction

    def _weights_of(self, names: Sequence[str]) -> dict[str, float]:
        """The weights of the sparse sites that count."""
        weights = {
            name: next((w for pattern, w in self._layers.items() if fnmatchcase(name, pattern)), 0.0) for name in names
        }
        weights = {name: weight for name, weight in weights.items() if weight > 0}
        if self._layers and not weights:
            raise value_error(
                "DistillationHook: layers fit no sparse site",
                given=", ".join(self._layers),
                allowed=f"names and patterns of {', '.join(names[:4])}",
                todo="sparge_compile.explain(model)(...) lists the sites.",
            )
        return weights


def _check_alike(prediction: Prediction) -> None:
    """Raise unless the teacher gave as much as the student, and ran the same sites as often."""
    student, teacher = prediction.student, prediction.teacher
    if teacher.shape != student.shape:
        raise value_error(
            "DistillationHook: student and teacher differ in what they give",
            given=f"{tuple(student.shape)} and {tuple(teacher.shape)}",
            allowed="equal shapes",
            todo="Give a teacher for the same task, or select= another part of the output.",
        )
    missing = [
        name
        for name, outputs in prediction.student_sites.items()
        if len(prediction.teacher_sites.get(name, ())) != len(outputs)
    ]
    if missing:
        raise value_error(
            "DistillationHook: the teacher lacks sites of the student",
            given=", ".join(missing[:4]),
            allowed="a teacher of the same structure",
            todo="Leave these out of layers, or give a teacher with the same module names.",
        )


def _check_rewritten(graphs: GraphCalls) -> Options:
    """Return the options of a forward in which the backend ran and something was sparse; raise for any other."""
    if graphs.options is None:
        raise value_error(
            "DistillationHook: the student is not rewritten",
            given="a forward in which no graph of the backend 'sparge' ran",
            allowed="torch.compile(model, backend='sparge'), or blocks compiled so",
            todo="Compile it before you make the hook.",
        )
    if not graphs.names:
        raise value_error(
            "DistillationHook: nothing is sparse in the student",
            given="a model whose attention all stays dense",
            allowed="at least one sparse site",
            todo="sparge_compile.explain(model)(...) says why; short sequences need min_seq_len=0.",
        )
    return graphs.options


def _check_gradients(student: Tensor, graphs: GraphCalls, weights: Mapping[str, float]) -> None:
    """Raise unless the student's output, and that of every site that counts, has a gradient."""
    if not student.requires_grad:
        raise value_error(
            "DistillationHook: the student's output has no gradient",
            given="an output that does not require one",
            allowed="a student with parameters that do",
            todo="Unfreeze its parameters (requires_grad), and run it without no_grad; where use_reentrant=True "
            "checkpoints code of which no input has a gradient, use use_reentrant=False.",
        )
    for name in weights:
        if not all(output.requires_grad for output in graphs.outputs.get(name, ())) or name not in graphs.outputs:
            raise value_error(
                "DistillationHook: the attention output of a site has no gradient",
                given=name,
                allowed="sites that run with gradients enabled",
                todo="Use torch.utils.checkpoint with use_reentrant=False, or leave this site out of layers.",
            )
