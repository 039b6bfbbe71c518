"""Other front doors than torch.compile: ``rewrite`` takes an exported program or an FX graph and gives a rewritten one.

Finding, deciding and substituting are those of the backend. Here the thresholds become buffers of the result.
"""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, overload

from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
)
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputSpec,
    TensorArgument,
)
from torch.fx import GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_leaves, tree_map

from .errors import type_error, value_error
from .misfits import warn_of_names, warn_of_unused_without_forward
from .naming import user_path
from .notices import warn_of_orders, warn_of_unsupported
from .options import Options
from .passes.mha.leaves import LeafOpener
from .passes.mha.open import EXAMPLE_SHAPES
from .passes.pipeline import decide_sites, find, rewriting_passes
from .passes.read.fx_utils import clone, submodule_of, value_of
from .passes.work import Work, analyse, logger, run, sheltered
from .passes.write.threshold_inputs import ThresholdInput, Thresholds, restore_markers
from .report import Failure, Report

THRESHOLDS = "sparge_thresholds"  # the module that owns the buffers
REPORT = "sparge_report"  # the key of the report in the result's meta
_COMPILERS = ("inner", "inductor", "inductor_mode")  # options that say who compiles; nothing is compiled here
_STORED = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@overload
def rewrite(graph: ExportedProgram, options: Mapping[str, Any] | Options | None = None) -> ExportedProgram: ...


@overload
def rewrite(
    graph: GraphModule,
    options: Mapping[str, Any] | Options | None = None,
    *,
    example_inputs: Sequence[Any] | None = None,
) -> GraphModule: ...


def rewrite(
    graph: ExportedProgram | GraphModule,
    options: Mapping[str, Any] | Options | None = None,
    *,
    example_inputs: Sequence[Any] | None = None,
) -> ExportedProgram | GraphModule:
    """Replace attention where it pays, in a program of ``torch.export`` or an FX graph of any tracer.

    Args:
        graph: a ``torch.export.ExportedProgram``, or a ``torch.fx.GraphModule``: of ``symbolic_trace``, ``make_fx``,
            ``ExportedProgram.module()``, Dynamo. It is not changed; parameters are shared with the result.
        options: those of the backend, but for ``inner``, ``inductor`` and ``inductor_mode``: nothing is compiled here.
        example_inputs: positional inputs (real or fake tensors) of a GraphModule that was traced without shapes.
            Without them, all its sites stay dense.

    Returns:
        A graph of the same type. The report is ``.meta["sparge_report"]`` of a GraphModule, and of a program's
        ``graph_module``. Thresholds are persistent float32 buffers [H, 2], named ``sparge_thresholds.<site>`` with
        ``_`` for what no name may hold: they are saved, loaded and read at run time. What was saved is loaded after
        ``import sparge_compile.ops``.

    Raises:
        TypeError: ``graph`` is neither of the two.
        ValueError: an option that is unknown, has a bad value, or means nothing here; ``example_inputs`` for a program;
            with ``on_unsupported="error"``, a site that cannot be replaced.
    """
    settings = _options(options)
    if not isinstance(graph, (ExportedProgram, GraphModule)):
        raise type_error(
            "this is not a graph",
            given=type(graph).__name__,
            allowed="a torch.export.ExportedProgram or a torch.fx.GraphModule",
            todo='Trace the model first, or use torch.compile(model, backend="sparge").',
        )
    if isinstance(graph, ExportedProgram):
        if example_inputs is not None:
            raise value_error(
                "example_inputs have no meaning here",
                given="example_inputs for an exported program",
                allowed="them for a GraphModule without shapes",
                todo="Leave them out: the program carries its shapes.",
            )
        return _rewrite_program(graph, settings)
    return _rewrite_module(graph, settings, example_inputs)


def _rewrite_module(given: GraphModule, settings: Options, example_inputs: Sequence[Any] | None) -> GraphModule:
    def fresh() -> GraphModule:
        new = _copy(given)
        if example_inputs is not None:
            _propagate_shapes(new, example_inputs)
        return new

    # Leaves are opened in a trial. Only those are opened in the result in which something becomes sparse.
    opener, trial = LeafOpener(), fresh()
    opened: dict[Node, str] = {}
    failures: list[Failure] = []
    with sheltered(failures, "open_leaves"):
        opened = opener.open(trial)
    trial = fresh() if failures else trial
    work = _decided(trial, settings, partial(_attached_buffer, given, trial))
    work.failures[:0] = failures
    report = _report(work, settings)
    new = trial
    if opened:
        firsts = [(match.callers[0].node if match.callers else match.node) for match in work.sparse]
        wanted = {opened[node] for node in firsts if node in opened}
        new = fresh()
        opener.open(new, wanted)
        work = _decided(new, settings, partial(_attached_buffer, given, new))
    for target, made in _substituted(work, settings, _attributes(given), report):
        _add_buffer(new, target, made.values)
        with new.graph.inserting_before(made.placeholder):
            buffer = new.graph.get_attr(target)
        buffer.meta = {"val": value_of(made.placeholder)}
        made.placeholder.replace_all_uses_with(buffer)
        new.graph.erase_node(made.placeholder)
        if hasattr(given, "_param_name_to_source"):  # AOTAutograd asks where each tensor of a Dynamo graph came from
            sources = {**new.__dict__["_param_name_to_source"], str(buffer.target): ConstantSource(buffer.name)}
            new.__dict__["_param_name_to_source"] = sources
    new.meta.pop(EXAMPLE_SHAPES, None)
    new.meta[REPORT] = report
    new.graph.lint()
    new.recompile()
    return new


def _rewrite_program(given: ExportedProgram, settings: Options) -> ExportedProgram:
    new = clone(given.graph_module)
    names = {user_path(name): held for held, name in given.graph_signature.inputs_to_buffers.items()}
    inputs = {node.name: node for node in new.graph.find_nodes(op="placeholder")}
    kept = [spec.arg.name for spec in given.graph_signature.input_specs if spec.kind in _STORED]
    stored = [inputs[name] for name in kept if name in inputs]
    work = _decided(new, settings, lambda name: inputs.get(names.get(name, "")), stored)
    report = _report(work, settings)
    renamed: dict[str, str] = {}
    with new._set_replace_hook(lambda old, new, user: renamed.update({old.name: new})):
        added = list(_substituted(work, settings, {*given.state_dict, *given.constants}, report))
    specs, state = list(given.graph_signature.input_specs), dict(given.state_dict)
    # Parameters and buffers come before constants and what the user passes.
    early = {InputKind.TOKEN, InputKind.PARAMETER, InputKind.BUFFER}
    place = sum(spec.kind in early for spec in specs)
    following = [*new.graph.find_nodes(op="placeholder")[place : len(specs)], None][0]
    for offset, (target, made) in enumerate(added):
        placeholder = made.placeholder
        placeholder._rename(f"b_{target.replace('.', '_')}")
        placeholder.target = placeholder.name
        if following is not None:
            following.prepend(placeholder)
        spec = InputSpec(InputKind.BUFFER, TensorArgument(name=placeholder.name), target, persistent=True)
        specs.insert(place + offset, spec)
        state[target] = made.values
    outputs = [_rename_output(spec, renamed) for spec in given.graph_signature.output_specs]
    calls = copy.deepcopy(given.module_call_graph)
    for call in calls:
        if call.signature is not None:
            call.signature.outputs[:] = [_rename(argument, renamed) for argument in call.signature.outputs]
            call.signature.inputs[:] = [_rename(argument, renamed) for argument in call.signature.inputs]
    new.meta[REPORT] = report
    new.graph.lint()
    new.recompile()
    return ExportedProgram(
        root=new,
        graph=new.graph,
        graph_signature=ExportGraphSignature(specs, outputs),
        state_dict=state,
        range_constraints=copy.deepcopy(given.range_constraints),
        module_call_graph=calls,
        example_inputs=given.example_inputs,
        constants=given.constants,
        verifiers=given.verifiers,
    )


def _decided(new: GraphModule, settings: Options, thresholds: Thresholds, stored: Collection[Node] = ()) -> Work:
    """The graph with what was found and decided. ``thresholds`` finds the node of attached thresholds by their name."""
    work = Work(new, stored=stored)
    analyse(work, find, partial(_restore_markers, thresholds=thresholds), partial(_decide, options=settings))
    return work


def _restore_markers(work: Work, thresholds: Thresholds) -> None:
    restore_markers(work.markers, work.matches, thresholds)


def _decide(work: Work, options: Options) -> None:
    decide_sites(work, options, attached=work.markers)


def _attached_buffer(given: GraphModule, new: GraphModule, name: str) -> Node | None:
    """A node that reads a buffer of the given module in the new one, by the buffer's name there."""
    target = next((full for full, _ in given.named_buffers() if user_path(full) == name), None)
    if target is None:
        return None
    buffer = given.get_buffer(target)
    _add_buffer(new, target, buffer)
    with new.graph.inserting_before(next(iter(new.graph.nodes), None)):
        node = new.graph.get_attr(target)
    node.meta["val"] = _as_input(new)(buffer)
    return node


def _add_buffer(graph_module: GraphModule, target: str, values: Tensor) -> None:
    """Put a buffer below a graph module, and the modules that its name needs."""
    path, _, name = target.rpartition(".")
    try:
        graph_module.get_submodule(path)
    except AttributeError:
        graph_module.add_submodule(path, nn.Module())
    graph_module.get_submodule(path).register_buffer(name, values)


def _attributes(given: GraphModule) -> set[str]:
    """The names of a graph module's tensors and of whatever else it holds, but for modules that only hold others."""
    modules = (name for name, module in given.named_modules() if type(module) is not nn.Module)
    return {*modules, *given.__dict__, *dict(given.named_parameters()), *dict(given.named_buffers())}


def _substituted(
    work: Work, settings: Options, taken: set[str], report: Report
) -> Iterator[tuple[str, ThresholdInput]]:
    """Substitute: for each sparse site the full name of its buffer, and the graph input made for its thresholds.

    ``taken`` are the names that the given graph has already. What became of orders is added to the report.
    """
    run(work, *rewriting_passes(settings, _as_input(work.graph_module)))
    work.update(report)
    owner = THRESHOLDS
    while owner in taken:
        owner += "_"
    for made in work.threshold_inputs:
        name = f"{owner}." + re.sub(r"\W+", "_", made.match.site.name.strip("()"))
        while name in taken:
            name += "_"
        taken.add(name)
        yield name, made


def _as_input(graph_module: GraphModule) -> Callable[[Tensor], Any]:
    """What makes a tensor an input of this graph like the others: fake where they are fake."""
    values = (value for node in graph_module.graph.nodes for value in tree_leaves(node.meta.get("val")))
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    return (lambda x: mode.from_tensor(x, static_shapes=True)) if mode is not None else lambda x: x


def _rename(argument: Any, renamed: Mapping[str, str]) -> Any:
    """An argument of a signature under the name that its node has now."""
    name = getattr(argument, "name", None)
    return argument if name is None or name not in renamed else type(argument)(name=renamed[name])


def _rename_output(spec: OutputSpec, renamed: Mapping[str, str]) -> OutputSpec:
    return OutputSpec(spec.kind, _rename(spec.arg, renamed), spec.target)


def _copy(given: GraphModule) -> GraphModule:
    """A copy of a graph module that shares its tensors: of the same class, with its hooks and kinds of attributes."""
    new = clone(given)
    for name in _HOOKS:
        setattr(new, name, copy.copy(getattr(given, name)))
    # Each graph module has a class of its own, which torch knows by its name, below the class that was asked for.
    own, kind = type(given).__mro__[:2]
    if kind is not GraphModule:
        new.__class__ = types.new_class(
            own.__name__, (kind,), exec_body=lambda body: body.update(__qualname__=own.__qualname__)
        )
    # torch makes a persistent buffer of each tensor that a graph reads. What state_dict holds must not change.
    for node in given.graph.find_nodes(op="get_attr"):
        path, _, name = str(node.target).rpartition(".")
        if submodule_of(node, given) is None:
            old, made = given.get_submodule(path), new.get_submodule(path)
            if name in made._buffers and old is not made:
                if name in old._non_persistent_buffers_set:
                    made._non_persistent_buffers_set.add(name)
                elif name not in old._buffers:
                    setattr(made, name, made._buffers.pop(name))
    new.recompile()
    return new


def _propagate_shapes(graph_module: GraphModule, inputs: Sequence[Any]) -> None:
    """Note on each node what it gives for these inputs, up to the first that depends on their values.

    Nothing is computed and nothing of the module changes.
    """
    mode = detect_fake_mode(tree_leaves(inputs)) or FakeTensorMode()
    with FakeCopyMode(mode):
        fake = copy.deepcopy(graph_module)  # layers write to their buffers, even if they are run for shapes alone
    fakes = tree_map(lambda x: _as_fake(x, mode), tuple(inputs))
    with suppress(DataDependentOutputException, DynamicOutputShapeException):
        FakeTensorProp(fake, mode).propagate_dont_convert_inputs(*fakes)
    for node, known in zip(graph_module.graph.nodes, fake.graph.nodes, strict=True):
        node.meta.pop("example_value", None)
        node.meta["val"] = known.meta.get("val")
    graph_module.meta[EXAMPLE_SHAPES] = True


def _as_fake(x: Any, mode: FakeTensorMode) -> Any:
    return mode.from_tensor(x) if isinstance(x, Tensor) and not isinstance(x, FakeTensor) else x


def _report(work: Work, settings: Options) -> Report:
    report = work.add_to(Report())
    logger.info("%s", report)
    warn_of_unsupported(report, settings)
    warn_of_orders(work.orders_by_name, settings)
    free = [match for match in work.matches if match.is_attention and match.node not in work.markers]
    if free:
        warn_of_names(settings, [match.site.name for match in work.sparse if match in free])
        warn_of_unused_without_forward(settings, [match.site.name for match in free], "in the graph that was given")
    return report


def _options(options: Mapping[str, Any] | Options | None) -> Options:
    """The options, without those that say who compiles."""
    default = Options()
    if isinstance(options, Options):
        given = [name for name in _COMPILERS if getattr(options, name) != getattr(default, name)]
    else:
        given = [name for name in _COMPILERS if isinstance(options, Mapping) and name in options]
    if given:
        raise value_error(
            "options that mean nothing to rewrite",
            given=", ".join(map(repr, given)),
            allowed="the other options of the backend",
            todo="Nothing is compiled here: give the result to torch.compile or AOTInductor.",
        )
    settings = Options.parse(options)
    if settings.schedule.dense_steps is not None:
        raise value_error(
            "an option that means nothing to rewrite",
            given=f"dense_steps={settings.dense_steps!r}",
            allowed="the same in every step: no graph is told which step it is",
            todo="Run the program that was given in these steps.",
        )
    return settings
