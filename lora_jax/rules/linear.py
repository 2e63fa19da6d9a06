"""Rules for primitives linear in the weight: the base equation as the model wrote it, plus the branch.

The branch works on labelled axes. Every axis of the weight has a label; an operand's axis that is
contracted or paired with it has the same one. `a` holds the labels of the batch and in axes and the
rank, `b` those of the batch axes, the rank and the out axes. One of the two is contracted with the
operand, then the other with the result: the order decides the cost, the labels the rest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.interpret import Context, bind, register
from lora_jax.rules.shape import (
    as_dtype,
    broadcasted,
    per_axis,
    permuted,
    relabelled,
    scaled,
    squeezed,
)
from lora_jax.weight import AxisKind, LoraWeight, joint_path, wide_dtype

RANK = "rank"
ROWS = "rows"
Label = Hashable


class Labelled(NamedTuple):
    """An array whose axes have names."""

    array: jax.Array
    labels: tuple[Label, ...]


def factor_labels(weight: LoraWeight, labels: Sequence[Label]) -> tuple[tuple[Label, ...], tuple[Label, ...]]:
    """The labels of a's and of b's axes, from those of the weight's."""
    batch, inner, outer = (tuple(labels[i] for i in weight.axes_of(kind)) for kind in ("batch", "in", "out"))
    return (*batch, *inner, RANK), (*batch, RANK, *outer)


def contract(x: Labelled, y: Labelled, keep: set[Label], precision: Any, specs: Any = None) -> Labelled:
    """The product of two labelled arrays, summed over the labels that both have and `keep` has not."""
    shared = [label for label in x.labels if label in y.labels]
    batch = [label for label in shared if label in keep]
    summed = [label for label in shared if label not in keep]
    free_x = [label for label in x.labels if label not in shared]
    free_y = [label for label in y.labels if label not in shared]
    labels = (*batch, *free_x, *free_y)
    if specs is None and not batch and _is_matrix(x, free_x, summed) and _is_matrix(y, free_y, summed):
        return Labelled(_flat_dot(x, y, free_x, free_y, summed, precision), labels)
    dims = (
        ([x.labels.index(s) for s in summed], [y.labels.index(s) for s in summed]),
        ([x.labels.index(s) for s in batch], [y.labels.index(s) for s in batch]),
    )
    product = lax.dot_general(
        x.array,
        y.array,
        dims,
        precision=precision,
        preferred_element_type=x.array.dtype,
        out_sharding=None if specs is None else _sharding(x.array, [dict(specs).get(s) for s in labels]),
    )
    return Labelled(product, labels)


def _is_matrix(x: Labelled, free: list[Label], summed: list[Label]) -> bool:
    """Whether reshaping to a matrix moves no data: the free axes lie together, and so do the summed."""
    return x.labels in ((*free, *summed), (*summed, *free))


def _flat_dot(
    x: Labelled, y: Labelled, free_x: list[Label], free_y: list[Label], summed: list[Label], precision: Any
) -> jax.Array:
    def matrix(z: Labelled, free: list[Label]) -> tuple[jax.Array, int, tuple[int, ...]]:
        """The matrix, the position of its summed axis, and the shape of its free axes."""
        size = dict(zip(z.labels, z.array.shape, strict=True))
        free_shape = tuple(size[s] for s in free)
        n_free, n_summed = math.prod(free_shape), math.prod(size[s] for s in summed)
        free_first = z.labels == (*free, *summed)
        shape = (n_free, n_summed) if free_first else (n_summed, n_free)
        array = z.array if z.array.shape == shape else lax.reshape(z.array, shape)
        return array, int(free_first), free_shape

    left, left_axis, left_shape = matrix(x, free_x)
    right, right_axis, right_shape = matrix(y, free_y)
    if right_axis == 0 and right.shape[1] < right.shape[0]:
        # The gradient of a tall factor, xᵀ dt, is one of XLA's slow products on CPUs; that of its
        # transpose, dtᵀ x, is not. The barrier keeps XLA from undoing the transposition.
        right, right_axis = lax.optimization_barrier(lax.transpose(right, (1, 0))), 1
    dims = (((left_axis,), (right_axis,)), ((), ()))
    flat = lax.dot_general(left, right, dims, precision=precision, preferred_element_type=left.dtype)
    shape = (*left_shape, *right_shape)
    return flat if flat.shape == shape else lax.reshape(flat, shape)


def _specs(x: Labelled, out: jax.Array, out_labels: Sequence[Label]) -> tuple[tuple[Label, Any], ...] | None:
    """The mesh axes of each label where shardings are part of types, or None where they are not."""
    mesh = jax.typeof(x.array).sharding.mesh
    if AxisType.Explicit not in getattr(mesh, "axis_types", ()):
        return None
    specs: dict[Label, Any] = dict(zip(x.labels, jax.typeof(x.array).sharding.spec, strict=True))
    specs.update(zip(out_labels, jax.typeof(out).sharding.spec, strict=True))
    return tuple(specs.items())


def _sharding(x: jax.Array, spec: Sequence[Any]) -> NamedSharding:
    """A spec on x's mesh; a mesh axis that an earlier axis uses is not used again."""
    used: set[Any] = set()
    parts = []
    for part in spec:
        names = part if isinstance(part, tuple) else (part,)
        parts.append(None if used.intersection(names) - {None} else part)
        used.update(names)
    return NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*parts))


def add_branch(context: Context, base: jax.Array, branch: jax.Array) -> jax.Array:
    """Base + branch, added in the branch's dtype and rounded once to the base's."""
    total = as_dtype(lax.add(as_dtype(base, branch.dtype), branch), base.dtype)
    aval: Any = context.eqn.outvars[0].aval
    if aval.weak_type:
        total = p.convert_element_type_p.bind(total, new_dtype=aval.dtype, weak_type=True, sharding=None)
    return total


def dropped(context: Context, x: jax.Array, rate: float) -> jax.Array:
    """The branch's input with each entry dropped at `rate` and the rest scaled up, in the mean x again.

    Sixteen random bits an entry: drawing them is what dropout costs. The rate is rounded to
    2⁻¹⁶, and the scale is that of the rounded rate.
    """
    if context.key is None or not rate:
        return x
    kept = min(max(round((1.0 - rate) * 2**16), 1), 2**16 - 1)
    key = context.key
    for name in sorted(jax.typeof(x).manual_axis_type.varying):  # so that a shard of its own has its own
        key = jax.random.fold_in(key, lax.axis_index(name))
    bits = jax.random.bits(key, x.shape, jnp.uint16)
    keep = lax.lt(bits, lax.full_like(bits, kept))
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit in getattr(sharding.mesh, "axis_types", ()):
        keep = jax.sharding.reshard(keep, sharding)
    scaled = lax.mul(x, lax.full_like(x, 2**16 / kept))
    return lax.select(keep, scaled, lax.full_like(x, 0))


class _Plan(NamedTuple):
    """All that is static about a branch, so that layers of one form share one trace of it."""

    x: tuple[Label, ...]
    a: tuple[Label, ...]
    b: tuple[Label, ...]
    out: tuple[Label, ...]
    precision: Any
    specs: tuple[tuple[Label, Any], ...] | None
    flatten: bool


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _branch(plan: _Plan, x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """Σ x · s·a · b over the labels that the output does not have, in x's dtype and the output's order."""
    # On a the scale is of one piece with the transposition that a tall factor gets in _flat_dot.
    first = Labelled(scaled(as_dtype(a, x.dtype), scale), plan.a)
    second = Labelled(as_dtype(b, x.dtype), plan.b)
    keep = set(plan.out)

    def summed(factor: Labelled) -> int:
        sizes = zip(factor.labels, factor.array.shape, strict=True)
        return math.prod(n for label, n in sizes if label in plan.x and label not in keep)

    # The factor that sums more of x goes first, and leaves the smaller intermediate.
    if summed(first) < summed(second):
        first, second = second, first
    operand, rows, out = Labelled(x, plan.x), (), plan.out
    if plan.flatten:
        operand, rows, out = _with_rows(operand, out, {*plan.a, *plan.b})
        keep = set(out)
    middle = contract(operand, first, keep | set(second.labels), plan.precision, plan.specs)
    product = contract(middle, second, keep, plan.precision, plan.specs)
    order = [product.labels.index(label) for label in out]
    array = product.array if order == sorted(order) else lax.transpose(product.array, order)
    if rows:
        place = out.index(ROWS)
        array = lax.reshape(array, (*array.shape[:place], *rows, *array.shape[place + 1 :]))
    return array


def _with_rows(
    x: Labelled, out: tuple[Label, ...], held: set[Label]
) -> tuple[Labelled, tuple[int, ...], tuple[Label, ...]]:
    """Give x with the axes that no factor has merged into one, if they lie together in it and in the output.

    Gives also the merged axes' sizes, none if nothing was merged, and the output's new labels.
    """
    free = tuple(label for label in x.labels if label not in held)
    start = x.labels.index(free[0]) if free else 0
    place = out.index(free[0]) if free else 0
    end, out_end = start + len(free), place + len(free)
    if len(free) < 2 or x.labels[start:end] != free or out[place:out_end] != free:
        return x, (), out
    shape = x.array.shape
    rows = shape[start:end]
    merged = lax.reshape(x.array, (*shape[:start], math.prod(rows), *shape[end:]))
    labels = (*x.labels[:start], ROWS, *x.labels[end:])
    return Labelled(merged, labels), rows, (*out[:place], ROWS, *out[out_end:])


def through(
    x: Labelled,
    weight: LoraWeight,
    labels: Sequence[Label],
    out: jax.Array,
    out_labels: Sequence[Label],
    precision: Any,
) -> jax.Array:
    """The branch x·a·s·b of a product whose base, without unit axes, is `out`.

    Products are flattened to matrices since XLA's CPU backend runs the gradient of a product over
    several axes with a transposition of the whole operand. Other backends have no need of it, and
    where an inner axis may be sharded merging it into another would gather it.
    """
    specs = _specs(x, out, out_labels)
    device = jax.sharding.get_abstract_mesh().abstract_device  # a mesh of another platform is compiled for
    platform = jax.default_backend() if device is None else device.platform
    flatten = specs is None and platform == "cpu"
    plan = _Plan(x.labels, *factor_labels(weight, labels), tuple(out_labels), precision, specs, flatten)
    return _branch(plan, x.array, weight.a, weight.b, weight.scale)


def _plain_precision(precision: Any, swap: bool) -> Any:
    """The precision of the base's product, for the branch's; a dot algorithm fixes dtypes and is not one."""
    if isinstance(precision, tuple) and all(isinstance(one, lax.Precision) for one in precision):
        return precision[::-1] if swap else precision
    return precision if isinstance(precision, lax.Precision) else None


@register(p.dot_general_p)
def dot_general(
    context: Context, lhs: Any, rhs: Any, *, dimension_numbers: Any, precision: Any, **params: Any
) -> Any:
    """x·W + s·(x·A)·B for every form of dot_general, the weight on either side."""
    if isinstance(lhs, LoraWeight) and isinstance(rhs, LoraWeight):
        return _product_of_weights(context, lhs, rhs, dimension_numbers, precision)
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = dimension_numbers
    swap = isinstance(lhs, LoraWeight)
    weight, x = (lhs, rhs) if swap else (rhs, lhs)
    x = x if isinstance(x, jax.Array) else jnp.asarray(x, x.dtype)  # a literal
    w_sum, x_sum, w_batch, x_batch = (
        (lhs_sum, rhs_sum, lhs_batch, rhs_batch) if swap else (rhs_sum, lhs_sum, rhs_batch, lhs_batch)
    )
    base = bind(context.eqn, [v.w if isinstance(v, LoraWeight) else v for v in (lhs, rhs)])[0]

    w_labels: list[Label] = [("w", i) for i in range(len(weight.axes))]
    x_labels: list[Label] = [("x", i) for i in range(x.ndim)]
    for i, j in zip((*w_sum, *w_batch), (*x_sum, *x_batch), strict=True):
        x_labels[j] = w_labels[i]
    free_w = [s for i, s in enumerate(w_labels) if i not in (*w_sum, *w_batch)]
    free_x = [s for i, s in enumerate(x_labels) if i not in (*x_sum, *x_batch)]
    free = (*free_w, *free_x) if swap else (*free_x, *free_w)
    out_labels = [*(w_labels[i] for i in w_batch), *free]
    if not any(weight.axes[i] in ("in", "out") for i in w_sum):
        return _mixture(context, weight, w_labels, Labelled(x, tuple(x_labels)), base, out_labels)
    # A unit axis is in neither factor: it leaves x, and comes back as an axis of size one.
    units = {w_labels[i] for i in weight.axes_of("unit")}
    gone = [j for j, label in enumerate(x_labels) if label in units]
    dtype = wide_dtype(x.dtype, weight.a.dtype, weight.b.dtype, base.dtype)
    entry = dropped(context, as_dtype(x, dtype), weight.dropout)
    entry = lax.squeeze(entry, gone) if gone else entry
    operand = Labelled(entry, tuple(label for label in x_labels if label not in units))
    kept = [label for label in out_labels if label not in units]
    thin = (
        base
        if len(kept) == len(out_labels)
        else lax.squeeze(base, [i for i, label in enumerate(out_labels) if label in units])
    )
    branch = through(operand, weight, w_labels, thin, kept, _plain_precision(precision, swap))
    if len(kept) < len(out_labels):
        branch = lax.expand_dims(branch, [i for i, label in enumerate(out_labels) if label in units])
    return add_branch(context, base, branch)


def _mixture(
    context: Context,
    weight: LoraWeight,
    w_labels: Sequence[Label],
    x: Labelled,
    base: jax.Array,
    out_labels: Sequence[Label],
) -> LoraWeight:
    """Σ x·W over batch axes alone, or over none: a weight for each of x's own axes.

    x multiplies one factor, and what is summed goes to the rank: Σₗ xₗAₗBₗ = [x₁A₁ x₂A₂ …][B₁; B₂; …].
    """
    kind = dict(zip(w_labels, weight.axes, strict=True))
    varies = {kind[label] for label in x.labels if label in kind}
    if {"in", "out"} <= varies:
        raise context.refuse([weight], "the product is elementwise along in and along out axes")
    units = {label for label in w_labels if kind[label] == "unit"}
    gone = [i for i, label in enumerate(x.labels) if label in units]
    x = Labelled(lax.squeeze(x.array, gone), tuple(label for label in x.labels if label not in units))
    a_labels, b_labels = factor_labels(weight, w_labels)
    dtype = wide_dtype(x.array.dtype, weight.a.dtype, weight.b.dtype)
    a = Labelled(scaled(as_dtype(weight.a, dtype), weight.scale), a_labels)
    b = Labelled(as_dtype(weight.b, dtype), b_labels)
    x = Labelled(as_dtype(x.array, dtype), x.labels)
    if "out" in varies:
        b = contract(b, x, {*b.labels, *x.labels}, lax.Precision.HIGHEST)
    else:
        a = contract(a, x, {*a.labels, *x.labels}, lax.Precision.HIGHEST)
    sizes = {s: n for y in (a, b) for s, n in zip(y.labels, y.array.shape, strict=True)}
    sizes |= dict(zip(x.labels, x.array.shape, strict=True))
    axes: tuple[AxisKind, ...] = tuple(kind.get(label, "batch") for label in out_labels)
    batch, inner, outer = (
        [label for label, k in zip(out_labels, axes, strict=True) if k == which]
        for which in ("batch", "in", "out")
    )
    ranks = [label for label in w_labels if kind[label] == "batch" and label not in out_labels] + [RANK]

    def factor(y: Labelled, labels: Sequence[Label]) -> jax.Array:
        order = [label for label in labels if label in y.labels]
        array = lax.transpose(y.array, [y.labels.index(label) for label in order])
        return lax.broadcast_in_dim(
            array, [sizes[label] for label in labels], [labels.index(label) for label in order]
        )

    rank = math.prod(sizes[label] for label in ranks)
    shape, m, n = ([sizes[label] for label in labels] for labels in (batch, inner, outer))
    return weight.replace(
        w=base,
        a=lax.reshape(factor(a, [*batch, *inner, *ranks]), (*shape, *m, rank)),
        b=lax.reshape(factor(b, [*batch, *ranks, *outer]), (*shape, rank, *n)),
        scale=jnp.ones(shape, weight.scale.dtype),
        axes=axes,
    )


def _product_of_weights(
    context: Context, lhs: LoraWeight, rhs: LoraWeight, dimension_numbers: Any, precision: Any
) -> LoraWeight:
    """W₁W₂ with both updates: A₁·(B₁W₂') + (W₁A₂)·B₂, where W₂' = W₂ + A₂B₂, is of the ranks' sum."""
    sums, batches = dimension_numbers
    pairs = [*zip(*sums, strict=True), *zip(*batches, strict=True)]
    labels: list[list[Label]] = [[("l", i) for i in range(lhs.ndim)], [("r", i) for i in range(rhs.ndim)]]
    for i, j in pairs:
        labels[1][j] = labels[0][i]
    for weight, summed, mapped in ((lhs, sums[0], batches[0]), (rhs, sums[1], batches[1])):
        sides = [set(weight.axes_of("in")), set(weight.axes_of("out"))]
        if set(summed) not in sides or set(mapped) != set(weight.axes_of("batch")):
            raise context.refuse(
                [lhs, rhs], "it is a product of two weights over a part of their in, out or batch axes"
            )
    if context.key is not None and lhs.dropout != rhs.dropout:
        raise context.refuse([lhs, rhs], "it is a product of weights with different rates of dropout")
    base = bind(context.eqn, [lhs.w, rhs.w])[0]
    dtype = wide_dtype(base.dtype, lhs.a.dtype, lhs.b.dtype, rhs.a.dtype, rhs.b.dtype)

    def parts(weight: LoraWeight, axis_labels: Sequence[Label], rank: Label, summed: Sequence[int]) -> Any:
        """The factor with the free axes, and the one with the summed axes, the second scaled."""
        a_labels, b_labels = (
            [rank if s == RANK else s for s in x] for x in factor_labels(weight, axis_labels)
        )
        a = Labelled(as_dtype(weight.a, dtype), tuple(a_labels))
        b = Labelled(as_dtype(weight.b, dtype), tuple(b_labels))
        return (a, b) if weight.axes[summed[0]] == "out" else (b, a)

    w1, w2 = (Labelled(as_dtype(x.w, dtype), tuple(s)) for x, s in zip((lhs, rhs), labels, strict=True))
    far1, near1 = parts(lhs, labels[0], (RANK, 1), sums[0])
    far2, near2 = parts(rhs, labels[1], (RANK, 2), sums[1])
    batch: tuple[Label, ...] = tuple(labels[0][i] for i in batches[0])
    free1 = [s for i, s in enumerate(labels[0]) if i not in (*sums[0], *batches[0])]
    free2 = [s for j, s in enumerate(labels[1]) if j not in (*sums[1], *batches[1])]
    specs = _specs(w1, base, [*batch, *free1, *free2])
    thin1, thin2 = ([s for s in f if s in far.labels] for f, far in ((free1, far1), (free2, far2)))
    # In float32 or wider, whatever the precision of the base's product.
    exact = lax.Precision.HIGHEST

    def ordered(x: Labelled, wanted: Sequence[Label]) -> jax.Array:
        """The array with its axes as wanted; a unit axis, which no factor has, is left out."""
        units = [i for i, s in enumerate(x.labels) if s not in wanted]
        left = [s for s in x.labels if s in wanted]
        array = lax.squeeze(x.array, units) if units else x.array
        array = lax.transpose(array, [left.index(s) for s in wanted])
        if specs is None:
            return array
        return jax.sharding.reshard(array, _sharding(array, [dict(specs).get(s) for s in wanted]))

    keep = {*batch, *free1, *free2, (RANK, 1), (RANK, 2)}
    rank1, rank2 = (*batch, (RANK, 1), *thin2), (*batch, (RANK, 2), *thin2)
    through = ordered(contract(near1, w2, keep, exact, specs), rank1)
    inner = contract(near1, near2, keep, exact, specs)
    inner = Labelled(
        scaled(ordered(inner, (*batch, (RANK, 1), (RANK, 2))), rhs.scale), (*batch, (RANK, 1), (RANK, 2))
    )
    far2 = Labelled(ordered(far2, rank2), rank2)
    through = lax.add(through, ordered(contract(inner, far2, keep - {(RANK, 2)}, exact, specs), rank1))
    left = ordered(contract(w1, near2, keep, exact, specs), (*batch, *thin1, (RANK, 2)))
    a = lax.concatenate([ordered(far1, (*batch, *thin1, (RANK, 1))), left], len(batch) + len(thin1))
    b = lax.concatenate([scaled(through, lhs.scale), scaled(far2.array, rhs.scale)], len(batch))
    axes: list[AxisKind] = ["batch"] * base.ndim
    for place, label in enumerate((*free1, *free2), len(batch)):
        axes[place] = "in" if label in thin1 else "out" if label in thin2 else "unit"
    return lhs.replace(
        w=base,
        a=a,
        b=b,
        scale=jnp.ones(base.shape[: len(batch)], lhs.scale.dtype),
        axes=tuple(axes),
        path=joint_path([lhs.path, rhs.path]),
    )


@register("ragged_dot_general")
def ragged_dot(
    context: Context,
    lhs: Any,
    rhs: Any,
    group_sizes: jax.Array,
    *,
    ragged_dot_dimension_numbers: Any,
    precision: Any,
    **params: Any,
) -> jax.Array:
    """Rows in groups, each group through its own expert: a factor that has the group axis runs ragged too."""
    dims = ragged_dot_dimension_numbers
    if not isinstance(rhs, LoraWeight) or isinstance(lhs, LoraWeight) or len(dims.rhs_group_dimensions) != 1:
        raise context.refuse([lhs, rhs], "the weight is not the operand that holds a matrix for every group")
    if params.get("group_offset") is not None or params.get("out_sharding") is not None:
        raise context.refuse([rhs], "the ragged product has a group offset or a sharding of its own")
    weight, (group,) = rhs, dims.rhs_group_dimensions
    (x_sum, w_sum), (x_batch, w_batch) = dims.dot_dimension_numbers
    kinds: dict[int, AxisKind] = {
        group: "batch",
        **dict.fromkeys(w_batch, "batch"),
        **dict.fromkeys(w_sum, "in"),
    }
    axes: list[AxisKind] = [
        kinds.get(i, "unit") if kind == "unit" else kind for i, kind in enumerate(weight.axes)
    ]
    thick = relabelled(weight, axes)  # an axis of size one that the product uses is in a factor
    weight = weight if thick is None else thick
    if not any(weight.axes[i] in ("in", "out") for i in w_sum):
        raise context.refuse([weight], "it sums over none of the weight's in or out axes")
    base = bind(context.eqn, [lhs, weight.w, group_sizes])[0]
    w_labels: list[Label] = [("w", i) for i in range(weight.ndim)]
    x_labels: list[Label] = [("x", i) for i in range(lhs.ndim)]
    for i, j in zip((*w_sum, *w_batch), (*x_sum, *x_batch), strict=True):
        x_labels[j] = w_labels[i]
    ragged = x_labels[dims.lhs_ragged_dimensions[0]]
    dtype = wide_dtype(lhs.dtype, weight.a.dtype, weight.b.dtype, base.dtype)
    x = Labelled(dropped(context, as_dtype(lhs, dtype), weight.dropout), tuple(x_labels))
    a_labels, b_labels = factor_labels(weight, w_labels)
    factors = [
        Labelled(as_dtype(weight.a, dtype), a_labels),
        Labelled(scaled(as_dtype(weight.b, dtype), weight.scale), b_labels),
    ]
    factors.sort(key=lambda factor: not any(w_labels[i] in factor.labels for i in w_sum))
    plain = _plain_precision(precision, swap=False)
    keep: set[Label] = {w_labels[i] for i in w_batch}
    for n, factor in enumerate(factors):
        # What the second factor has too is not summed yet.
        later = keep | set(factors[1].labels) if n == 0 else keep
        if w_labels[group] not in factor.labels:
            x = contract(x, factor, later, plain)
            continue
        shared = [s for s in x.labels if s in factor.labels]
        batch, summed = [s for s in shared if s in later], [s for s in shared if s not in later]
        numbers = lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(
                ([x.labels.index(s) for s in summed], [factor.labels.index(s) for s in summed]),
                ([x.labels.index(s) for s in batch], [factor.labels.index(s) for s in batch]),
            ),
            lhs_ragged_dimensions=[x.labels.index(ragged)],
            rhs_group_dimensions=[factor.labels.index(w_labels[group])],
        )
        product = lax.ragged_dot_general(
            x.array, factor.array, group_sizes, numbers, precision=plain, preferred_element_type=dtype
        )
        rest = [s for s in factor.labels if s not in shared and s != w_labels[group]]
        x = Labelled(product, (*batch, *(s for s in x.labels if s not in shared), *rest))
    free_w = [s for i, s in enumerate(w_labels) if i not in (*w_sum, *w_batch, group)]
    free_x = [s for j, s in enumerate(x_labels) if j not in (*x_sum, *x_batch)]
    wanted = [*(w_labels[i] for i in w_batch), *free_x, *free_w]
    kept = [s for s in wanted if s in x.labels]
    branch = lax.transpose(x.array, [x.labels.index(s) for s in kept])
    branch = lax.expand_dims(branch, [i for i, s in enumerate(wanted) if s not in kept])
    return add_branch(context, base, branch)


# Look-ups


@register(p.gather_p)
def gather(
    context: Context,
    operand: Any,
    indices: Any,
    *,
    dimension_numbers: Any,
    slice_sizes: Sequence[int],
    **params: Any,
) -> Any:
    """Rows of W, as rows of a times b; a gather over batch axes selects whole weights."""
    if not isinstance(operand, LoraWeight) or isinstance(indices, LoraWeight):
        raise context.refuse([operand, indices], "the weight is used as indices")
    weight = operand
    base = bind(context.eqn, [weight.w, indices])[0]
    dims, indices = _without_batching(dimension_numbers, indices)
    shape = weight.w.shape
    looked_up = [i for i in range(len(shape)) if slice_sizes[i] != shape[i] or i in dims.collapsed_slice_dims]
    kinds = {weight.axes[i] for i in looked_up}
    stays = [i for i in range(len(shape)) if i not in dims.collapsed_slice_dims]
    n_index = indices.ndim - 1

    def act(factor: jax.Array, where: Any) -> jax.Array:
        """The factor's own rows: index axes first, then its axes that stay, then the rank's place."""
        axis_of = {where(i): i for i in range(len(shape)) if where(i) is not None}
        columns = [k for k, i in enumerate(dims.start_index_map) if where(i) is not None and i in looked_up]
        if not columns:
            return factor
        collapsed = tuple(k for k in range(factor.ndim) if axis_of.get(k) in dims.collapsed_slice_dims)
        sizes = [slice_sizes[axis_of[k]] if k in axis_of else factor.shape[k] for k in range(factor.ndim)]
        picked = (
            indices
            if len(columns) == indices.shape[-1]
            else jnp.stack([indices[..., k] for k in columns], -1)
        )
        return lax.gather(
            factor,
            picked,
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(n_index, n_index + factor.ndim - len(collapsed))),
                collapsed_slice_dims=collapsed,
                start_index_map=tuple(where(dims.start_index_map[k]) for k in columns),
            ),
            sizes,
            indices_are_sorted=params["indices_are_sorted"],
            unique_indices=params["unique_indices"] and len(columns) == len(dims.start_index_map),
            mode=params["mode"],
            fill_value=0,
        )

    # The base's output has the axes that stay at offset_dims, and the index axes in the other places.
    out_labels: list[Label] = [None] * base.ndim
    for place, axis in zip(dims.offset_dims, stays, strict=True):
        out_labels[place] = ("w", axis)
    for n, place in enumerate([i for i in range(base.ndim) if i not in dims.offset_dims]):
        out_labels[place] = ("index", n)
    remaining = {weight.axes[i] for i in stays}
    if "unit" in kinds and len(kinds) > 1 and params["fill_value"] is not None:
        raise context.refuse([weight], "it looks up an axis of size one with others, and a value for misses")
    if {"in", "out"} <= remaining and kinds == {"unit"}:
        # Every entry of that axis is the weight itself, or a miss, where the update is zero.
        hit = lax.gather(
            jnp.ones((1,) * len(looked_up), weight.scale.dtype),
            indices,
            lax.GatherDimensionNumbers(
                offset_dims=tuple(
                    range(n_index, n_index + sum(i not in dims.collapsed_slice_dims for i in looked_up))
                ),
                collapsed_slice_dims=tuple(
                    k for k, i in enumerate(looked_up) if i in dims.collapsed_slice_dims
                ),
                start_index_map=tuple(looked_up.index(i) for i in dims.start_index_map),
            ),
            (1,) * len(looked_up),
            mode=params["mode"],
            fill_value=0,
        )
        hit = lax.reshape(hit, hit.shape[:n_index])
        gone = [i for i in looked_up if i in dims.collapsed_slice_dims]
        thin = squeezed(weight, lax.squeeze(weight.w, gone), gone)
        places = [out_labels.index(("w", i)) for i in stays]
        return _of_hits(broadcasted(thin, base, places), hit, out_labels)
    if {"in", "out"} <= remaining:
        return _selected_weights(context, weight, base, act, looked_up, kinds, stays, out_labels, n_index)

    # The scale's axes are those of the batch, which the index axes come before, so b takes it first.
    picked = per_axis(weight.replace(b=scaled(weight.b, weight.scale)), base, act)
    dtype = wide_dtype(picked.a.dtype, picked.b.dtype, base.dtype)
    index_labels = [("index", n) for n in range(n_index)]

    def label(factor: jax.Array, kind: str, rank_last: bool) -> Labelled:
        touched = bool(kinds & {"batch", kind})
        held = [i for which in ("batch", kind) for i in weight.axes_of(which)]  # type: ignore[arg-type]
        batch = [("w", i) for i in weight.axes_of("batch") if i in stays]
        own = [("w", i) for i in held if i in stays and weight.axes[i] == kind]
        tail = [*batch, *own, RANK] if rank_last else [*batch, RANK, *own]
        return Labelled(as_dtype(factor, dtype), (*(index_labels if touched else ()), *tail))

    a, b = label(picked.a, "in", True), label(picked.b, "out", False)
    units = [
        place
        for place, name in enumerate(out_labels)
        if isinstance(name, tuple) and name[0] == "w" and weight.axes[name[1]] == "unit"
    ]
    kept = [name for place, name in enumerate(out_labels) if place not in units]
    product = contract(a, b, set(kept), None)
    order = [product.labels.index(name) for name in kept]
    branch = product.array if order == sorted(order) else lax.transpose(product.array, order)
    return add_branch(context, base, lax.expand_dims(branch, units) if units else branch)


def _of_hits(weight: LoraWeight, hit: jax.Array, labels: Sequence[Any]) -> LoraWeight:
    """The weight with its update zero where a look-up along an axis of size one missed."""
    batch = weight.axes_of("batch")
    looked_up = [place for place, label in enumerate(labels) if label[0] == "index"]
    held = [n for n, place in enumerate(looked_up) if place in batch]
    hit = lax.reshape(hit, [hit.shape[n] for n in held])  # the others are of size one
    by = lax.broadcast_in_dim(hit, weight.scale.shape, [batch.index(looked_up[n]) for n in held])
    return weight.replace(scale=lax.mul(weight.scale, by))


def _without_batching(dims: Any, indices: jax.Array) -> tuple[Any, jax.Array]:
    """The same gather with every batch axis of its own looked up by an index that counts along it."""
    columns = [
        lax.broadcasted_iota(indices.dtype, (*indices.shape[:-1], 1), axis)
        for axis in dims.start_indices_batching_dims
    ]
    if not columns:
        return dims, indices
    plain = lax.GatherDimensionNumbers(
        offset_dims=dims.offset_dims,
        collapsed_slice_dims=tuple(sorted((*dims.collapsed_slice_dims, *dims.operand_batching_dims))),
        start_index_map=(*dims.operand_batching_dims, *dims.start_index_map),
    )
    return plain, lax.concatenate([*columns, indices], indices.ndim - 1)


def _selected_weights(
    context: Context,
    weight: LoraWeight,
    base: jax.Array,
    act: Any,
    looked_up: list[int],
    kinds: set[str],
    stays: list[int],
    out_labels: list[Label],
    n_index: int,
) -> LoraWeight:
    """Both in and out axes remain: the result is a LoraWeight, its index axes of the kind looked up."""
    if len(kinds) > 1 and n_index:
        raise context.refuse([weight], f"it looks up {' and '.join(sorted(kinds))} axes at once")
    kind = next(iter(kinds), "unit")
    picked = per_axis(weight, base, act)
    index_first = [*(kind for _ in range(n_index)), *(weight.axes[i] for i in stays)]
    if kind == "out":
        # The index axes come first in b too, before the batch axes and the rank.
        n_batch = sum(weight.axes[i] == "batch" for i in stays)
        order = [*range(n_index, n_index + n_batch + 1), *range(n_index)]
        order += range(len(order), picked.b.ndim)
        picked = picked.replace(b=lax.transpose(picked.b, order))
    elif kind == "in":
        n_batch = sum(weight.axes[i] == "batch" for i in stays)
        order = [*range(n_index, n_index + n_batch), *range(n_index)]
        order += range(len(order), picked.a.ndim)
        picked = picked.replace(a=lax.transpose(picked.a, order))
    names: list[Label] = [*(("index", n) for n in range(n_index)), *(("w", i) for i in stays)]
    picked = picked.replace(axes=tuple(index_first))
    return permuted(picked, base, [names.index(label) for label in out_labels])


# Convolution


@register(p.conv_general_dilated_p)
def conv(context: Context, lhs: Any, rhs: Any, **params: Any) -> Any:
    """A convolution with each factor in turn, each over the spatial axes that it holds.

    A factor without a spatial axis has size one along it, so stride, padding and dilation belong to
    the factor that has it. Of g groups, each sees its own inputs through the same a, so a is
    repeated g times; b's outputs are g blocks.
    """
    if not isinstance(rhs, LoraWeight) or isinstance(lhs, LoraWeight):
        raise context.refuse([lhs, rhs], "the weight is the convolution's input, not its kernel")
    weight, dims = rhs, params["dimension_numbers"]
    groups = params["feature_group_count"]
    if params["batch_group_count"] != 1:
        raise context.refuse([weight], "the convolution has batch groups")
    if "batch" in weight.axes:
        raise context.refuse([weight], "the kernel has a batch axis; map over it with vmap or scan")
    base = bind(context.eqn, [lhs, weight.w])[0]
    out_axis, in_axis, *spatial = dims.rhs_spec
    feature_in, feature_out = weight.axes[in_axis], weight.axes[out_axis]
    if feature_in == feature_out or "unit" in (feature_in, feature_out):
        raise context.refuse(
            [weight],
            f"its input features are an {feature_in!r} axis and its output features an {feature_out!r} axis",
        )
    dtype = wide_dtype(lhs.dtype, weight.a.dtype, weight.b.dtype, base.dtype)
    x = dropped(context, as_dtype(lhs, dtype), weight.dropout)
    labels = list(range(len(weight.axes)))
    a_labels, b_labels = factor_labels(weight, labels)
    a = Labelled(as_dtype(weight.a, dtype), a_labels)
    b = Labelled(scaled(as_dtype(weight.b, dtype), weight.scale), b_labels)
    first, second = (a, b) if in_axis in a.labels else (b, a)
    plain = {k: params[k] for k in ("dimension_numbers", "precision")}
    plain["precision"] = _plain_precision(params["precision"], swap=False)

    def kernel(factor: Labelled, features: Sequence[Label]) -> jax.Array:
        """The factor in the kernel's own layout, with (out, in) features as given and size one elsewhere."""
        places = dict(zip((out_axis, in_axis), features, strict=True))
        wanted = [places.get(i, i) for i in labels]
        order = [factor.labels.index(s) for s in wanted if s in factor.labels]
        array = lax.transpose(factor.array, order)
        return lax.expand_dims(array, [i for i, s in enumerate(wanted) if s not in factor.labels])

    def options(factor: Labelled, group_count: int) -> dict[str, Any]:
        held = [axis in factor.labels for axis in spatial]
        pick = {"window_strides": 1, "padding": (0, 0), "lhs_dilation": 1, "rhs_dilation": 1}
        chosen = {
            name: [value if here else idle for value, here in zip(params[name], held, strict=True)]
            for name, idle in pick.items()
        }
        return {**chosen, **plain, "feature_group_count": group_count, "preferred_element_type": dtype}

    units = [axis for axis in spatial if weight.axes[axis] == "unit"]
    if units:  # of size one: they belong to whichever factor comes first
        first = Labelled(lax.expand_dims(first.array, range(len(units))), (*units, *first.labels))
    first_kernel = kernel(first, (RANK, in_axis))
    second_kernel = kernel(second, (out_axis, RANK))
    if groups > 1:
        first_kernel = lax.concatenate([first_kernel] * groups, out_axis)
    middle = lax.conv_general_dilated(x, first_kernel, **options(first, groups))
    branch = lax.conv_general_dilated(middle, second_kernel, **options(second, groups))
    return add_branch(context, base, branch)
