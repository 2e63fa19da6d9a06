"""`infer_axes`: what each axis of each weight is for, read from the model's own trace.

Every axis of every weight is given an atom, and the function's jaxpr is walked with the atoms on the
axes of its values. Operations that move, cut, scale or add weights carry them on; a product or a
look-up records how it used each of the weight's axes; anything else ends the weight's trace.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import Literal
from jax.extend.core import primitives as p

from lora_jax import nnx
from lora_jax.rules.control import Closed, scan_parts
from lora_jax.rules.shape import reshape_groups
from lora_jax.tree import Pattern, leaves_with_path, literal, matches, nearest
from lora_jax.weight import AxisKind, is_wrapped_leaf

_ARRAYS = (jax.Array, jax.ShapeDtypeStruct, np.ndarray)
Atoms = frozenset[int]
_NONE: Atoms = frozenset()
_IN = frozenset({"contracted", "looked up"})
_BATCH = frozenset({"batch", "scanned", "selected"})


class InferredAxes(dict[str, tuple[AxisKind, ...]]):
    """Kinds of axes by path, as `infer_axes` gives them and `wrap(axes=...)` takes them.

    Attributes:
        lookups: The paths of the look-up tables, which `wrap` adapts only where it is told to.

    `inferred | {path: kinds}` states other kinds by hand.

    >>> InferredAxes({"foo": ("in", "out")}) | {"bar": ("out", "in")}
    {'foo': ('in', 'out'), 'bar': ('out', 'in')}
    """

    def __init__(self, kinds: Mapping[str, tuple[AxisKind, ...]], lookups: Iterable[str] = ()):
        super().__init__(kinds)
        self.lookups = frozenset(lookups)

    def __or__(self, other: Mapping[str, tuple[AxisKind, ...]]) -> InferredAxes:  # type: ignore[override]
        return InferredAxes({**self, **other}, self.lookups)


def infer_axes(
    fn: Callable[..., Any],
    params: Any,
    *example_args: Any,
    exclude: Pattern | None = None,
    **kwargs: Any,
) -> InferredAxes:
    """Read from the trace of `fn(params, *example_args, **kwargs)` what the axes of every weight are for.

    With the result `wrap` needs no names: `wrap(params, rank, axes=infer_axes(fn, params, x))` adapts
    every leaf that the model contracts, but look-up tables and what a name calls an output head (the trace
    knows no head: of a list of arrays, exclude it yourself). Nothing is computed, and
    shapes will do for arrays. In words:

    1. Every axis of every floating parameter of two or more dimensions gets an atom.
    2. The jaxpr is walked, through jit, scan, while, cond, remat, shard_map and functions with a
       derivative of their own. What moves, cuts, casts, scales, adds or joins weights carries the atoms
       on; any other function of a weight ends its trace.
    3. Each product (dot, ragged dot, convolution) and each look-up records of each axis of the weight
       whether it was contracted, looked up, a batch axis of the product, scanned over, selected by a
       single index, or free. What was added to an activation, such as a table of positions, counts
       as part of the activation where it meets a weight.
    4. An axis is "batch" if every use takes it as a batch axis, scans over it or selects one entry of
       it; "in" if the first use contracts it or looks it up; "unit" if it has size one and no use sees
       it; else "out". So an embedding that also gives the logits is ("in", "out").

    A leaf that is never contracted or looked up is no linear weight and is left out; so is one without
    an "in" or an "out" axis, and a leaf whose type or collection says that it is no parameter. Experts
    that all see one input leave their axis free, as heads do, and so it is an "out" axis.

    Args:
        fn: The function, pure as for `jax.jit`.
        params: Its first argument: any tree that `wrap` takes.
        *example_args: Its other arguments. Arrays, numpy's too, are traced, and may be
            `jax.ShapeDtypeStruct`s; every other leaf reaches fn as it is.
        exclude: A pattern of paths, or a predicate of path and leaf, to infer nothing for.
        **kwargs: Keyword arguments of fn.

    Returns:
        A dict of kinds by path, in the order of the tree; its attribute `lookups` holds the paths of
        the look-up tables.

    Raises:
        ValueError: an axis is a batch axis in one use and contracted in another, so no single
            factorisation serves: the message names both lines of the model. Also if params is wrapped
            already, or exclude matches nothing.
        TypeError: an nnx module stands inside another container.

    >>> import jax.numpy as jnp
    >>> def model(params, tokens):
    ...     x = params["foo"][tokens]
    ...     x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["bar"])
    ...     return x @ params["foo"].T
    >>> params = {"foo": jnp.ones((11, 4)), "bar": jnp.ones((3, 4, 4))}
    >>> found = infer_axes(model, params, jnp.zeros((2, 5), int))
    >>> found
    {'bar': ('batch', 'in', 'out'), 'foo': ('in', 'out')}
    >>> found.lookups
    frozenset({'foo'})
    """
    opened, close = nnx.opened(params)
    read = _read_leaves(opened, exclude)
    rest, together = nnx.apart((fn, example_args, kwargs))
    leaves, treedef = jax.tree.flatten((opened, rest))
    traced = [i for i, leaf in enumerate(leaves) if isinstance(leaf, _ARRAYS)]

    # A new function each time, as in `lora`: the cache of make_jaxpr goes by the function.
    def flat(*values: Any) -> list[Any]:
        full = list(leaves)
        for i, value in zip(traced, values, strict=True):
            full[i] = value
        inner_params, inner = treedef.unflatten(full)
        inner_fn, args, keywords = together(inner)
        out = inner_fn(close(inner_params), *args, **keywords)
        return [leaf for leaf in jax.tree.leaves(out) if isinstance(leaf, jax.Array)]

    closed = jax.make_jaxpr(flat)(*(leaves[i] for i in traced))
    values = [read[i][1] if i < len(read) else _Value(data=True) for i in traced]
    trace = _Trace()
    _walk(trace, closed, values)
    found, lookups = {}, []
    for path, shape in [(part.path, part.shape) for _, value in read for part in value.parts]:
        uses = [use for use in trace.uses.values() if use.path == path]
        kinds = _kinds(path, shape, uses)
        if "in" in kinds and "out" in kinds:
            found[path] = kinds
            lookups += [path] if "looked up" in uses[0].how else []
    return InferredAxes(found, lookups)


def _read_leaves(tree: Any, exclude: Pattern | None) -> list[tuple[str, _Value]]:
    """The path of each leaf of params, and what is known of its value: atoms, data, or neither."""
    leaves = leaves_with_path(tree, is_wrapped_leaf)
    wrapped = [path for path, leaf in leaves if is_wrapped_leaf(leaf)]
    if wrapped:
        raise ValueError(
            f"the tree is wrapped already, at {wrapped[0]!r}. Infer axes from the plain parameters: "
            "infer_axes(fn, lora_jax.merge(wrapped), ...)."
        )
    paths = [path for path, _ in leaves]
    if exclude is not None and not any(matches(exclude, path, leaf) for path, leaf in leaves):
        near = ", ".join(map(repr, nearest(exclude, paths) if isinstance(exclude, str) else paths[:5]))
        raise ValueError(f"exclude={exclude!r} matches no path; the nearest paths are {near}.")
    variables = leaves_with_path(tree, nnx.is_other_variable)
    other = {path for path, node in variables if nnx.is_other_variable(node)}
    collections = isinstance(tree, Mapping) and "params" in tree
    read = []
    for path, leaf in leaves:
        floating = isinstance(leaf, _ARRAYS) and jnp.issubdtype(leaf.dtype, jnp.floating)
        if path in other or (collections and not path.startswith("params/")):
            value = _Value(data=True)
        elif not floating or leaf.ndim < 2 or (exclude is not None and matches(exclude, path, leaf)):
            value = _Value()
        else:
            value = _Value((_Part(path, leaf.shape, tuple(frozenset({i}) for i in range(leaf.ndim))),))
        read.append((path, value))
    return read


def _kinds(path: str, shape: Sequence[int], uses: Sequence[_Use]) -> tuple[AxisKind, ...]:
    """The kinds of a leaf's axes from its uses, in the order of the trace; none if there are no uses."""
    kinds: list[AxisKind] = []
    for axis, size in enumerate(shape):
        hows = [use.how[axis] for use in uses]
        met = set(hows)
        if met & _BATCH and met & _IN:
            batch, inner = (next(use for use in uses if use.how[axis] in which) for which in (_BATCH, _IN))
            raise ValueError(_conflict(path, shape, axis, batch, inner))
        # A scan over an axis of another kind has no low-rank form, even if other uses leave it free.
        if met and (met <= _BATCH or "scanned" in met):
            kinds.append("batch")
        elif met and hows[0] in _IN:
            kinds.append("in")
        else:
            kinds.append("unit" if size == 1 and met <= {"unseen"} else "out")
    return tuple(kinds) if uses else ()


def _conflict(path: str, shape: Sequence[int], axis: int, batch: _Use, inner: _Use) -> str:
    name = literal(path)
    return (
        f"axis {axis} of {path!r}, of shape {tuple(shape)}, is {_WORDS[batch.how[axis]]} by "
        f"`{batch.primitive}` at {batch.where} and {inner.how[axis]} by `{inner.primitive}` at "
        f"{inner.where}, so no single factorisation serves both. State its axes by hand, "
        f"axes=lora_jax.infer_axes(..., exclude={name!r}) | {{{path!r}: (...)}}, or leave it as it is: "
        f"axes=lora_jax.infer_axes(..., exclude={name!r})."
    )


_WORDS = {"batch": "taken as a batch axis", "scanned": "scanned over", "selected": "selected from"}


# The walk


class _Part(NamedTuple):
    """A leaf that a value is linear in, and the leaf's axes that each of the value's axes holds.

    `gone` says how the value left other axes of the leaf. `row` is the record of the look-up that gave
    the value. A product with an activation replaces it: then whole weights were looked up, not rows.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[Atoms, ...]
    gone: frozenset[tuple[int, str]] = frozenset()
    row: Hashable = None

    def moved(self, axes: Iterable[Atoms], how: str = "selected") -> _Part:
        """The part with other axes; what has gone from them, and was longer than one, went so."""
        axes = tuple(axes)
        lost = _NONE.union(*self.axes) - _NONE.union(*axes)
        return self._replace(axes=axes, gone=self.gone | {(i, how) for i in lost if self.shape[i] > 1})

    def placed(self, ndim: int, places: Mapping[int, int], how: str = "selected") -> _Part:
        """The part with its axes at new places among `ndim`."""
        back = {new: self.axes[old] for old, new in places.items()}
        return self.moved((back.get(i, _NONE) for i in range(ndim)), how)

    def long(self, places: Iterable[int]) -> int:
        """How many of the leaf's axes are longer than one among those at some places."""
        return sum(self.shape[i] > 1 for i in _NONE.union(*(self.axes[place] for place in places)))


class _Value(NamedTuple):
    """What is known of a value: the leaves it is linear in, and whether example arguments enter it.

    Without leaves, with data, it is an activation; with both, a sum or a product of the two.
    """

    parts: tuple[_Part, ...] = ()
    data: bool = False
    one_hot: bool = False

    @property
    def activation(self) -> bool:
        return self.data and not self.parts

    def each(self, fn: Callable[[_Part], _Part]) -> _Value:
        return self._replace(parts=tuple(map(fn, self.parts)))


class _Use(NamedTuple):
    """How a product or a look-up used each axis of a leaf."""

    path: str
    how: tuple[str, ...]
    primitive: str
    where: str


class _Trace:
    """The uses found so far, in the order of the trace, and the calls around the present equation."""

    def __init__(self):
        self.uses: dict[Hashable, _Use] = {}
        self.calls: list[Any] = []

    def inside(self, eqn: Any, walk: Callable[[], list[_Value]]) -> list[_Value]:
        self.calls.append(eqn)
        out = walk()
        self.calls.pop()
        return out

    def record(self, eqn: Any, side: int, part: _Part, taken: Any, how: str, batch: Any) -> Hashable:
        """Record a use that takes some of an operand's axes; give its key, or None if none is left free."""
        shape, gone, hows = _shape(eqn.invars[side]), dict(part.gone), []
        for axis in range(len(part.shape)):
            places = {i for i, atoms in enumerate(part.axes) if axis in atoms}
            if places.intersection(taken):
                hows.append(how)
            elif axis in gone:  # even if it is back, as after a scan that returns layers
                hows.append(gone[axis])
            elif places.intersection(batch) and all(shape[i] == 1 for i in places.difference(batch)):
                hows.append("batch")
            else:
                hows.append("free" if places else "unseen")
        if how not in hows or "free" not in hows:
            return None
        calls = [*self.calls, eqn]
        lines = [source_info_util.summarize(call.source_info) for call in reversed(calls)]
        line = next(filter(None, lines), "an unknown line")
        key = (*map(id, calls), part)
        self.uses[key] = _Use(part.path, tuple(hows), eqn.primitive.name, line)
        return key


Handler = Callable[[_Trace, Any, Sequence[_Value]], list[_Value]]
_HANDLERS: dict[str, Handler] = {}


def _on(*primitives: Any) -> Callable[[Handler], Handler]:
    """Register a handler; a primitive that jax does not export goes by its name."""

    def decorate(handler: Handler) -> Handler:
        _HANDLERS.update({getattr(primitive, "name", primitive): handler for primitive in primitives})
        return handler

    return decorate


def _walk(trace: _Trace, jaxpr: Any, values: Sequence[_Value]) -> list[_Value]:
    """The values of a jaxpr's outputs; its constants and literals are nobody's weights."""
    jaxpr = Closed(jaxpr).jaxpr
    env: dict[Any, _Value] = dict(zip(jaxpr.invars, values, strict=True))

    def read(variables: Sequence[Any]) -> list[_Value]:
        return [_Value() if isinstance(v, Literal) else env.get(v, _Value()) for v in variables]

    for eqn in jaxpr.eqns:
        handler = _HANDLERS.get(eqn.primitive.name, _nonlinear)
        env.update(zip(eqn.outvars, handler(trace, eqn, read(eqn.invars)), strict=True))
    return read(jaxpr.outvars)


def _nonlinear(trace: _Trace, eqn: Any, values: Sequence[_Value]) -> list[_Value]:
    return [_Value(data=any(v.data for v in values))] * len(eqn.outvars)


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(variable.aval.shape)


def _either(*values: _Value) -> _Value:
    """A value that may be any of some: linear in the leaves of all, or an activation if one is."""
    if any(v.activation for v in values):
        return _Value(data=True)
    parts = tuple(dict.fromkeys(part for v in values for part in v.parts))
    return _Value(parts, any(v.data for v in values))


# Control flow


@_on(p.jit_p, p.remat_p, p.closed_call_p, p.call_p, p.custom_jvp_call_p, p.custom_vjp_call_p, "shard_map")
def _call(trace: _Trace, eqn: Any, values: Sequence[_Value]) -> list[_Value]:
    inner = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
    return trace.inside(eqn, lambda: _walk(trace, inner, values))


@_on(p.cond_p)
def _cond(trace: _Trace, eqn: Any, values: Sequence[_Value]) -> list[_Value]:
    index, *operands = values
    branches = eqn.params["branches"]
    outs = [trace.inside(eqn, lambda branch=branch: _walk(trace, branch, operands)) for branch in branches]
    return [(out := _either(*each))._replace(data=out.data or index.data) for each in zip(*outs, strict=True)]


def _loop(trace: _Trace, eqn: Any, jaxpr: Any, consts: Any, carry: Any, xs: Any = ()) -> list[_Value]:
    """A body's values once its carry is what every earlier step left; only that pass is recorded."""
    before, carry = trace.uses, [_either(value) for value in carry]
    while True:
        trace.uses = dict(before)
        out = trace.inside(eqn, lambda now=carry: _walk(trace, jaxpr, [*consts, *now, *xs]))
        after = [_either(*each) for each in zip(carry, out[: len(carry)], strict=True)]
        if after == carry:
            return [*carry, *out[len(carry) :]]
        carry = after


@_on(p.while_p)
def _while(trace: _Trace, eqn: Any, values: Sequence[_Value]) -> list[_Value]:
    skip = eqn.params["cond_nconsts"]
    start = skip + eqn.params["body_nconsts"]
    return _loop(trace, eqn, eqn.params["body_jaxpr"], values[skip:start], values[start:])


@_on(p.scan_p)
def _scan(trace: _Trace, eqn: Any, values: Sequence[_Value]) -> list[_Value]:
    n_consts, n_carry = scan_parts(eqn.params)
    start = n_consts + n_carry
    xs = values[start:]
    rows = {(part.path, axis) for x in xs for part in x.parts for axis in part.axes[0]}

    def stacked(part: _Part) -> _Part:
        back = frozenset(i for i, how in part.gone if how == "scanned" and (part.path, i) in rows)
        return part._replace(axes=(back, *part.axes))

    slices = [x.each(lambda part: part.moved(part.axes[1:], "scanned")) for x in xs]
    out = _loop(trace, eqn, eqn.params["jaxpr"], values[:n_consts], values[n_consts:start], slices)
    return [*out[:n_carry], *(y.each(stacked) for y in out[n_carry:])]


# What carries the atoms on


@_on(p.convert_element_type_p, p.reduce_precision_p, p.copy_p, p.name_p, p.stop_gradient_p, p.neg_p, p.rev_p)
@_on(p.sharding_constraint_p, p.device_put_p, p.cumsum_p, p.pad_p, lax.optimization_barrier_p)
@_on(p.psum_p, "psum_invariant", "pvary", "pcast", "reshard", "layout_constraint")
def _same(trace: _Trace, eqn: Any, values: Sequence[_Value]) -> list[_Value]:
    return list(values[: len(eqn.outvars)])


@_on(p.add_p, p.sub_p, p.add_jaxvals_p, p.concatenate_p, p.select_n_p, p.mul_p, p.div_p, lax.stack_p)
def _linear(trace: _Trace, eqn: Any, values: Sequence[_Value]) -> list[_Value]:
    """Linear in the weights among the operands, unless they multiply."""
    held = [v for v in values if v.parts]
    # A scalar is a scale, whatever it depends on.
    data = any(v.data and math.prod(_shape(x)) > 1 for v, x in zip(values, eqn.invars, strict=True))
    paths = [{part.path for part in v.parts} for v in held]
    squared = eqn.primitive is p.mul_p and len(held) == 2 and paths[0] & paths[1]
    if not held or squared or (eqn.primitive is p.div_p and values[1].parts):
        return _nonlinear(trace, eqn, values)
    at = eqn.params["axis"] if eqn.primitive is lax.stack_p else None
    out = _either(*held)._replace(data=data)
    return [out if at is None else out.each(lambda q: q.moved((*q.axes[:at], _NONE, *q.axes[at:])))]


def _moves(*primitives: Any, how: str = "selected") -> Callable[[Any], Any]:
    """Register how the axes of the first operand stand in a result, by its own shape and the result's."""

    def decorate(move: Callable[..., Iterable[Atoms]]) -> Any:
        @_on(*primitives)
        def handler(trace: _Trace, eqn: Any, values: Sequence[_Value]) -> list[_Value]:
            def to(shape: tuple[int, ...]) -> _Value:
                before = _shape(eqn.invars[0])
                return values[0].each(lambda q: q.moved(move(q.axes, before, shape, eqn.params), how))

            return [to(_shape(out)) for out in eqn.outvars]

        return move

    return decorate


_moves(p.transpose_p)(lambda axes, old, new, q: (axes[i] for i in q["permutation"]))
_moves(p.squeeze_p)(lambda axes, old, new, q: (x for i, x in enumerate(axes) if i not in q["dimensions"]))
_moves(lax.unstack_p)(lambda axes, old, new, q: (x for i, x in enumerate(axes) if i != q["axis"]))
_moves(p.slice_p, lax.split_p)(
    lambda axes, old, new, q: (_NONE if n == 1 < m else x for x, m, n in zip(axes, old, new, strict=True))
)
_moves(p.reduce_sum_p, how="summed")(
    lambda axes, old, new, q: (x for i, x in enumerate(axes) if i not in q["axes"])
)
_moves(lax.tile_p)(lambda axes, old, new, q: (*[_NONE] * (len(new) - len(old)), *axes))


@_moves(p.broadcast_in_dim_p)
def _broadcast(axes: Sequence[Atoms], old: Any, new: Any, params: Any) -> list[Atoms]:
    places = {place: i for i, place in enumerate(params["broadcast_dimensions"])}
    return [axes[places[j]] if j in places and old[places[j]] == n else _NONE for j, n in enumerate(new)]


@_moves(p.all_gather_p)
def _all_gather(axes: Sequence[Atoms], old: Any, new: Any, params: Any) -> list[Atoms]:
    at = params["all_gather_dimension"]
    return list(axes) if params["tiled"] else [*axes[:at], _NONE, *axes[at:]]


@_moves(p.reshape_p)
def _reshape(axes: Sequence[Atoms], old: Any, new: Any, params: Any) -> list[Atoms]:
    """A merged axis holds all its atoms, and each piece of a split one its own; axes of size one go apart."""
    out = [_NONE] * len(new)
    ours, theirs = ([i for i, n in enumerate(shape) if n != 1] for shape in (old, new))
    for group, pieces in reshape_groups([old[i] for i in ours], [new[j] for j in theirs]):
        for j in pieces:
            out[theirs[j]] = _NONE.union(*(axes[ours[i]] for i in group))
    for i, j in itertools.product(range(len(old)), range(len(new))):
        if old[i] == new[j] == 1 and math.prod(old[:i]) == math.prod(new[:j]):
            out[j] = out[j] | axes[i]
    return out


# Products and look-ups, which are the uses


def _product(
    trace: _Trace, eqn: Any, values: Sequence[_Value], side: int, summed: Any, batch: Any, places: Any
) -> list[_Part]:
    """Record what a product does to its left or right operand, and give what it carries on.

    That is whole weights that a one-hot product selects; `places` of the operand's axes in the result.
    """
    value, other = values[side], values[1 - side]
    others = {part.path for part in other.parts}
    carried = []
    for part in value.parts:
        # A product of a weight with itself is not linear. Looked-up rows that meet a weight are its input;
        # so is what data entered, unless it meets an activation, as a weight that data scales does.
        if part.path in others or (part.row and others) or (value.data and not other.activation):
            continue
        # A weight that is contracted nowhere is in an outer product, which has no low-rank form.
        if not any(part.axes[i] for i in summed):
            continue
        row = trace.record(eqn, side, part, summed, "looked up" if other.one_hot else "contracted", batch)
        if row is not None:
            trace.uses.pop(part.row, None)
        if other.one_hot and part.long(set(range(len(part.axes))).difference(summed)) > 1:
            carried.append(part.placed(len(_shape(eqn.outvars[0])), places)._replace(row=row))
    return carried


@_on(p.dot_general_p)
def _dot_general(trace: _Trace, eqn: Any, values: Sequence[_Value]) -> list[_Value]:
    parts, first = [], len(eqn.params["dimension_numbers"][1][0])
    for side, (summed, batch) in enumerate(zip(*eqn.params["dimension_numbers"], strict=True)):
        free = [i for i in range(len(_shape(eqn.invars[side]))) if i not in (*summed, *batch)]
        # The result has the batch axes, then the left operand's free ones, then the right one's.
        order = (*enumerate(batch), *enumerate(free, first))
        parts += _product(trace, eqn, values, side, summed, batch, {i: place for place, i in order})
        first += len(free)
    return [_Value(tuple(parts), any(v.data for v in values))]


@_on("ragged_dot_general")
def _ragged_dot(trace: _Trace, eqn: Any, values: Sequence[_Value]) -> list[_Value]:
    dims = eqn.params["ragged_dot_dimension_numbers"]
    (_, summed), (_, batch) = dims.dot_dimension_numbers
    _product(trace, eqn, values, 1, summed, (*batch, *dims.rhs_group_dimensions), {})
    return _nonlinear(trace, eqn, values)


@_on(p.conv_general_dilated_p)
def _conv(trace: _Trace, eqn: Any, values: Sequence[_Value]) -> list[_Value]:
    _product(trace, eqn, values, 1, eqn.params["dimension_numbers"].rhs_spec[1:], (), {})
    return _nonlinear(trace, eqn, values)


@_on(p.eq_p)
def _eq(trace: _Trace, eqn: Any, values: Sequence[_Value]) -> list[_Value]:
    """Data compared with a constant array, such as a range, is one-hot."""
    constant = [v == _Value() and math.prod(_shape(x)) > 1 for v, x in zip(values, eqn.invars, strict=True)]
    data = any(v.data for v in values)
    return [_Value(data=data, one_hot=data and any(constant))]


@_on(p.dynamic_slice_p)
def _dynamic_slice(trace: _Trace, eqn: Any, values: Sequence[_Value]) -> list[_Value]:
    shape, sizes = _shape(eqn.invars[0]), eqn.params["slice_sizes"]
    data = any(v.data for v, n, size in zip(values[1:], shape, sizes, strict=True) if size != n)
    return _select(trace, eqn, values[0], data, {i: i for i in range(len(shape))}, (), ())


@_on(p.gather_p)
def _gather(trace: _Trace, eqn: Any, values: Sequence[_Value]) -> list[_Value]:
    dims, (weight, index) = eqn.params["dimension_numbers"], values
    left_out = (*dims.collapsed_slice_dims, *dims.operand_batching_dims)
    stays = [i for i in range(len(_shape(eqn.invars[0]))) if i not in left_out]
    indices = [i for i in range(len(_shape(eqn.outvars[0]))) if i not in dims.offset_dims]
    rows = [place for n, place in enumerate(indices) if n not in dims.start_indices_batching_dims]
    places = dict(zip(stays, dims.offset_dims, strict=True))
    return _select(trace, eqn, weight, index.data, places, rows, dims.operand_batching_dims)


def _select(
    trace: _Trace, eqn: Any, value: _Value, data: bool, places: Any, rows: Any, batch: Any
) -> list[_Value]:
    """Entries or windows of a weight at indices, which may be data; `rows`: the indices' axes in the result.

    Data or an array of indices look up: rows, which become an activation, or whole weights, if two axes
    are left. Which it was a later product tells.
    """
    shape, sizes, ndim = _shape(eqn.invars[0]), eqn.params["slice_sizes"], len(_shape(eqn.outvars[0]))
    cut = [i for i, n in enumerate(sizes) if n != shape[i] and i not in batch]
    single = [i for i in cut if sizes[i] == 1]
    carried = []
    for part in value.parts:
        row = trace.record(eqn, 0, part, cut, "looked up", batch) if data or rows else None
        if cut and data and part.long(i for i in range(len(shape)) if i not in cut) < 2:
            continue
        # Entries in a fixed order are still an axis: a permutation, say.
        kept = _NONE.union(*(part.axes[i] for i in single)) if rows and not data else _NONE
        after = part.moved((_NONE if i in batch else atoms for i, atoms in enumerate(part.axes)), "batch")
        axes = after.placed(ndim, {i: j for i, j in places.items() if i not in single}).axes
        axes = (atoms | kept if i in rows else atoms for i, atoms in enumerate(axes))
        carried.append(after.moved(axes)._replace(row=part.row if row is None else row))
    return [_Value(tuple(carried), value.data or data)]
