"""The contents of a tensor as a formula in its indices: ``arange``, comparisons, ``tril``, fills, and their sums.

A boolean tensor becomes a sympy condition, a numeric one a list of cases (condition, formula). What is not understood
is an unknown function of its own indices, so that which indices a formula depends on stays true.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from .axes import PERMUTES, casts_values, order_of, same
from .calls import Call, Value
from .reader import Reader

Cases = list[tuple[Any, Any]]  # disjoint conditions that cover everything, and a formula for each
Index = tuple[Any, ...]

# What is larger is not the mask of any model.
MAX_CASES = 16
MAX_DEPTH = 100
MAX_VALUES = 500

_COMPARISONS = {"eq": sympy.Eq, "ne": sympy.Ne, "lt": sympy.Lt, "le": sympy.Le, "gt": sympy.Gt, "ge": sympy.Ge}
_FILLS = {"zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1}
_FILLED = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}  # where the number stands
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: b - a,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "pow": lambda a, b: a**b,
    "remainder": sympy.Mod,
    "floor_divide": lambda a, b: sympy.floor(a / b),
}
_FUNCTIONS = {
    "neg": lambda a: -a, "sqrt": sympy.sqrt, "rsqrt": lambda a: 1 / sympy.sqrt(a), "reciprocal": lambda a: 1 / a,
    "exp": sympy.exp, "abs": sympy.Abs,
}  # fmt: skip
_LOGIC: dict[str, Callable[..., Any]] = {
    "bitwise_and": sympy.And, "logical_and": sympy.And, "bitwise_or": sympy.Or, "logical_or": sympy.Or,
    "bitwise_xor": sympy.Xor, "logical_xor": sympy.Xor, "mul": sympy.And, "add": sympy.Or,
}  # fmt: skip
_SAME = {"clone", "_to_copy", "alias", "lift_fresh", "lift_fresh_copy", "detach", "contiguous"}


class Unknown(Exception):
    """This value is not understood."""


def formula(reader: Reader, value: Value, at: Node, index: Sequence[Any]) -> Any:
    """The value, as ``at`` reads it, at an index (one sympy expression for each dimension): a condition or cases."""
    if value.constant is not None:
        return _number(value.constant.item())
    found = reader.definition(value, at) if reader.depth < MAX_DEPTH and reader.spent < MAX_VALUES else None
    if found is None:
        return _unknown(reader, value, at, index)
    made, node = found
    if made.constant is not None:
        return _number(made.constant.item())
    reader.spent = reader.spent + 1 if reader.depth else 0
    reader.depth += 1
    try:
        return _fitting(_of_call(reader, made, node, tuple(index)), value.dtype)
    except Unknown:
        return _unknown(reader, value, at, index)
    finally:
        reader.depth -= 1


def number(reader: Reader, value: Any, at: Node) -> float | None:
    """The one number that a value is known to hold, everywhere, at compile time; or None."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, Value):
        return None
    anywhere = sympy.symbols(f"anywhere:{len(value.shape)}", integer=True, nonnegative=True)
    index = [sympy.S.Zero if same(size, 1) else i for size, i in zip(value.shape, anywhere, strict=True)]
    cases = as_cases(formula(reader, value, at, index))
    if len(cases) != 1 or not cases[0][1].is_number or cases[0][1].has(sympy.nan):
        return None
    return float(cases[0][1])


def as_condition(x: Any) -> Any:
    """Where a formula is not zero."""
    if isinstance(x, Boolean):
        return x
    return sympy.Or(*(sympy.And(condition, sympy.Ne(value, 0)) for condition, value in x))


def as_cases(x: Any) -> Cases:
    """A formula as cases; a condition is 1 where it holds and 0 elsewhere."""
    if not isinstance(x, Boolean):
        return x
    return [case for case in ((x, sympy.S.One), (sympy.Not(x), sympy.S.Zero)) if case[0] != sympy.false]


def symbol_of(size: Any) -> Any:
    """A size or a number as a sympy expression; a float that is a whole number as that, so that 0.0 is 0."""
    if isinstance(size, float) and size.is_integer():
        return sympy.Integer(int(size))
    return size.node.expr if isinstance(size, (torch.SymInt, torch.SymFloat)) else sympy.sympify(size)


def _fitting(said: Any, dtype: torch.dtype) -> Any:
    """A formula, unless a dtype of few bits rounds or wraps what it says."""
    if isinstance(said, Boolean) or dtype.itemsize >= 4:
        return said
    low, high = (-256, 256) if dtype.is_floating_point else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    for _, value in said:
        hides = dtype.is_floating_point and value.is_number and value.is_extended_real and value <= -1e4
        if not hides and not (value.is_Integer and low <= value <= high):
            raise Unknown
    return said


def _whole(a: Cases, b: Cases) -> None:
    """Refuse what is not computed exactly: numbers with a fraction beside indices."""
    values = [value for _, value in (*a, *b)]
    if any(v.free_symbols for v in values) and not all(v.free_symbols or v.is_Integer for v in values):
        raise Unknown


def _constants(*operands: Cases) -> None:
    """Refuse indices in what is rounded."""
    if any(value.free_symbols for cases in operands for _, value in cases):
        raise Unknown


def _number(x: Any) -> Any:
    if isinstance(x, bool):
        return sympy.true if x else sympy.false
    if isinstance(x, float) and math.isinf(x):
        return [(sympy.true, sympy.oo if x > 0 else -sympy.oo)]
    if isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):
        return [(sympy.true, symbol_of(x))]
    raise Unknown


def _unknown(reader: Reader, value: Value, at: Node, index: Sequence[Any]) -> Any:
    # By version: what a tensor holds before and after a change in place are two functions.
    seen = reader.version(value.node, at) if value.node is not None else None
    name = seen.name if seen is not None else f"{value.node or id(value)}_as_{at}_reads_it"
    result = sympy.Function(name)(*index)
    return sympy.Ne(result, 0) if value.dtype == torch.bool else [(sympy.true, result)]


def _of_call(reader: Reader, made: Value, node: Node, index: Index) -> Any:
    assert made.call is not None
    call, shape, boolean = made.call, made.shape, made.dtype == torch.bool
    name, args = call.name, call.args

    def read(x: Any, at_index: Index = index) -> Any:
        """An operand that was broadcast to the shape of the result."""
        if not isinstance(x, Value):
            return _number(x)
        aligned = at_index[len(at_index) - len(x.shape) :]
        return formula(
            reader, x, node, [sympy.S.Zero if same(n, 1) else i for n, i in zip(x.shape, aligned, strict=True)]
        )

    def typed(cases: Any) -> Any:
        return as_condition(cases) if boolean else as_cases(cases)

    if name in _SAME:
        result = read(args[0])
        return typed(result) if boolean or not casts_values(call) or _exact(made, args[0]) else _fail()
    if name == "arange":
        start, step = (args[0], args[2] if len(args) > 2 else 1) if call.op._overloadname != "default" else (0, 1)
        return [(sympy.true, symbol_of(start) + symbol_of(step) * index[0])]
    if name in _FILLS:
        return typed(_number(_FILLS[name]))
    if name in _FILLED:
        position = _FILLED[name]
        fill = args[position] if len(args) > position else call.kwargs["fill_value"]
        if not boolean and not made.dtype.is_floating_point and fill != int(fill):
            raise Unknown  # it is cut off
        return typed(_number(fill))
    if name in ("expand", *PERMUTES, "unsqueeze", "squeeze", "view", "_unsafe_view", "slice", "select"):
        return formula(reader, args[0], node, index_before(call, shape, index))
    if name == "cat":
        return typed(_concatenated(reader, args[0], int(call.argument(1, "dim", 0)) % len(index), node, index))
    if name == "cumsum":
        anywhere = sympy.Symbol("anywhere", integer=True, nonnegative=True)
        dim = int(args[1]) % len(index)
        inner = as_cases(formula(reader, args[0], node, [*index[:dim], anywhere, *index[dim + 1 :]]))
        return inner if inner == [(sympy.true, sympy.S.Zero)] else _fail()
    if name == "index":
        return _indexed(reader, call, node, read)
    if name in ("tril", "triu"):
        offset = index[-1] - index[-2] - symbol_of(call.argument(1, "diagonal", 0))
        inside = sympy.Le(offset, 0) if name == "tril" else sympy.Ge(offset, 0)
        return typed(_choose(inside, as_cases(read(args[0])), [(sympy.true, sympy.S.Zero)]))
    return _of_elements(call, made, read, typed)


def _of_elements(call: Call, made: Value, read: Callable[[Any], Any], typed: Callable[[Any], Any]) -> Any:
    """The value of a call that computes each element from the elements of its operands in the same place."""
    name, args, boolean = call.name, call.args, made.dtype == torch.bool
    if name in _COMPARISONS:
        return _compare(_COMPARISONS[name], read(args[0]), read(args[1]))
    if name == "where":
        return typed(_choose(as_condition(read(args[0])), as_cases(read(args[1])), as_cases(read(args[2]))))
    if name == "masked_fill":
        return typed(_choose(as_condition(read(args[1])), as_cases(read(args[2])), as_cases(read(args[0]))))
    if name == "fill":
        return typed(read(args[1]))
    if name in ("bitwise_not", "logical_not") and (boolean or name == "logical_not"):
        return sympy.Not(as_condition(read(args[0])))
    if name in _LOGIC and boolean:
        return _LOGIC[name](as_condition(read(args[0])), as_condition(read(args[1])))
    if name in _ARITHMETIC and not boolean:
        if call.kwargs.get("rounding_mode") or call.argument(2, "alpha", 1) != 1:
            raise Unknown
        a, b = as_cases(read(args[0])), as_cases(read(args[1]))
        _whole(a, b)
        if name not in ("add", "sub", "rsub", "mul"):
            _constants(a, b)
        return _map(_ARITHMETIC[name], a, b)
    if name in _FUNCTIONS:
        operand = as_cases(read(args[0]))
        if name != "neg":
            _constants(operand)
        return _map(_FUNCTIONS[name], operand)
    raise Unknown


def _concatenated(reader: Reader, parts: Sequence[Value], dim: int, node: Node, index: Index) -> Cases:
    place, begin, ended, cases = index[dim], sympy.S.Zero, sympy.false, []
    for i, part in enumerate(parts, 1):
        size = symbol_of(part.shape[dim])
        ends = sympy.Eq(place, 0) if begin == 0 and size == 1 else sympy.Lt(place - begin, size)
        ends = sympy.true if i == len(parts) else ends
        read = as_cases(formula(reader, part, node, [*index[:dim], place - begin, *index[dim + 1 :]]))
        cases += [(sympy.And(sympy.Not(ended), ends, c), v) for c, v in read]
        begin, ended = begin + size, ends
    return _merge(cases)


def _fail() -> Any:
    raise Unknown


def _exact(made: Value, given: Value) -> bool:
    """Whether a cast keeps every value: from bool or an integer to a number (masks hold small ones)."""
    return not given.dtype.is_floating_point and not made.dtype.is_complex


def index_before(call: Call, shape: Sequence[Any], index: Index) -> list[Any]:
    """The index into the argument of a layout call, from that into its result."""
    given = call.args[0].shape
    if call.name == "expand":
        aligned = index[len(index) - len(given) :]
        return [sympy.S.Zero if same(n, 1) else i for n, i in zip(given, aligned, strict=True)]
    if call.name in PERMUTES:
        order = order_of(call, len(given))
        return [index[order.index(i)] for i in range(len(given))]
    if call.name == "slice":
        dim = int(call.argument(1, "dim", 0)) % len(given)
        start, step = call.argument(2, "start", 0) or 0, call.argument(4, "step", 1)
        start = start + given[dim] if isinstance(start, int) and start < 0 else start
        return [symbol_of(start) + symbol_of(step) * x if d == dim else x for d, x in enumerate(index)]
    if call.name == "select":
        dim = int(call.args[1]) % len(given)
        chosen = call.args[2] if not isinstance(call.args[2], int) or call.args[2] >= 0 else call.args[2] + given[dim]
        return [*index[:dim], symbol_of(chosen), *index[dim:]]
    kept = [i for i, n in zip(index, shape, strict=True) if not same(n, 1)]
    if len(kept) != sum(not same(n, 1) for n in given):
        raise Unknown  # dimensions are merged or split
    sizes = [n for n in shape if not same(n, 1)]
    if not all(map(same, sizes, (n for n in given if not same(n, 1)))):
        raise Unknown
    rest = iter(kept)
    return [sympy.S.Zero if same(n, 1) else next(rest) for n in given]


def _indexed(reader: Reader, call: Call, node: Node, read: Callable[..., Any]) -> Any:
    """``x[i, j, ...]`` with an index tensor for each leading dimension."""
    x, tensors = call.args[0], call.args[1]
    if len(tensors) != len(x.shape) or any(not isinstance(t, Value) or t.dtype == torch.bool for t in tensors):
        raise Unknown
    where = []
    for t in tensors:
        cases = as_cases(read(t))
        if len(cases) != 1 or not cases[0][1].is_nonnegative:
            raise Unknown
        where.append(cases[0][1])
    return formula(reader, x, node, where)


def _compare(relation: Any, a: Any, b: Any) -> Any:
    if isinstance(a, Boolean) and isinstance(b, Boolean) and relation in (sympy.Eq, sympy.Ne):
        different = sympy.Xor(a, b)
        return different if relation is sympy.Ne else sympy.Not(different)
    parts = [sympy.And(ca, cb, _relate(relation, va, vb)) for ca, va in as_cases(a) for cb, vb in as_cases(b)]
    return sympy.Or(*parts)


def _relate(relation: Any, a: Any, b: Any) -> Any:
    """A comparison with 0 on the right, so that equal ones look alike."""
    if any(x.is_number and not x.is_extended_real for x in (a, b)):
        raise Unknown  # NaN
    if a.is_infinite or b.is_infinite:
        return relation(a, b)
    return relation(sympy.expand(a - b), 0)


def _choose(condition: Any, yes: Cases, no: Cases) -> Cases:
    cases = [(sympy.And(condition, c), v) for c, v in yes] + [(sympy.And(sympy.Not(condition), c), v) for c, v in no]
    return _merge(cases)


def _map(function: Callable[..., Any], *operands: Cases) -> Cases:
    cases: Cases = [(sympy.true, ())]
    for operand in operands:
        cases = [(sympy.And(c, oc), (*vs, v)) for c, vs in cases for oc, v in operand]
    return _merge([(c, function(*vs)) for c, vs in cases])


def _merge(cases: Cases) -> Cases:
    """Cases of one value together, impossible ones left out."""
    merged: dict[Any, Any] = {}
    for condition, value in cases:
        if condition != sympy.false:
            if sympy.Eq(value, 0) in sympy.And.make_args(condition):
                value = sympy.S.Zero  # x.masked_fill(x != 0, ...)
            merged[value] = sympy.Or(merged.get(value, sympy.false), condition)
    if len(merged) > MAX_CASES:
        raise Unknown
    return [(condition, value) for value, condition in merged.items()]
