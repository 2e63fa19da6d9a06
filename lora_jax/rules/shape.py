"""Rules for primitives that only move, cut or cast a weight: a LoraWeight goes in, a LoraWeight comes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import primitives as p
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.interpret import Context, bind, register
from lora_jax.weight import AxisKind, LoraWeight, sizes, wide_dtype


def only(context: Context, operands: Sequence[Any]) -> LoraWeight:
    """The first operand, which must be the only LoraWeight."""
    if not isinstance(operands[0], LoraWeight) or any(isinstance(x, LoraWeight) for x in operands[1:]):
        raise context.refuse(operands, "the weight is an operand that says where or how much")
    return operands[0]


def _base(context: Context, weight: LoraWeight, *others: Any) -> jax.Array:
    return bind(context.eqn, [weight.w, *others])[0]


def scaled(factor: jax.Array, scale: jax.Array) -> jax.Array:
    """s·a or s·b; the scale has the factor's leading axes, those of the batch."""
    by = lax.broadcast_in_dim(as_dtype(scale, factor.dtype), factor.shape, range(scale.ndim))
    return lax.mul(factor, by)


def as_dtype(x: jax.Array, dtype: Any) -> jax.Array:
    """The array in a dtype; the same one where it has it."""
    return lax.convert_element_type(x, dtype) if x.dtype != dtype else x


def per_axis(
    weight: LoraWeight, w: jax.Array, fn: Callable[[Any, Callable[[int], int | None]], Any]
) -> LoraWeight:
    """Act on the factors as on `w`, where the action names axes of `w`.

    `fn(factor, where)` acts on one factor; `where(i)` is the position in it of w's axis i, or None
    where the factor does not hold that axis.
    """
    batch, inner, outer = (weight.axes_of(kind) for kind in ("batch", "in", "out"))

    def locate(order: Sequence[int | None]) -> Callable[[int], int | None]:
        places = {axis: i for i, axis in enumerate(order)}
        return places.get

    return weight.replace(
        w=w,
        a=fn(weight.a, locate([*batch, *inner, None])),
        b=fn(weight.b, locate([*batch, None, *outer])),
        scale=fn(weight.scale, locate(batch)),
    )


def flipped(weight: LoraWeight) -> LoraWeight:
    """The same weight with in axes called out and out axes in: of (A B)ᵀ = Bᵀ Aᵀ the right side."""
    n = len(weight.axes_of("batch"))
    swap: dict[AxisKind, AxisKind] = {"in": "out", "out": "in"}
    a_order = [*range(n), *range(n + 1, weight.b.ndim), n]
    b_order = [*range(n), weight.a.ndim - 1, *range(n, weight.a.ndim - 1)]
    return weight.replace(
        a=lax.transpose(weight.b, a_order),
        b=lax.transpose(weight.a, b_order),
        axes=tuple(swap.get(kind, kind) for kind in weight.axes),
    )


def relabelled(weight: LoraWeight, axes: Sequence[AxisKind]) -> LoraWeight | None:
    """The same weight with other kinds of axes, or None: an axis of size one may be of any kind."""

    def fits(kinds: Sequence[AxisKind]) -> bool:
        return all(n == 1 or k == new for n, k, new in zip(weight.w.shape, kinds, axes, strict=True))

    if not fits(weight.axes):
        weight = flipped(weight)
        if not fits(weight.axes):
            return None
    changed = [i for i, kind in enumerate(weight.axes) if kind != axes[i]]
    if not changed:
        return weight

    def thin(factor: jax.Array, where: Any) -> jax.Array:
        return lax.squeeze(factor, [place for i in changed if (place := where(i)) is not None])

    thinned = per_axis(weight, weight.w, thin)

    def thick(factor: jax.Array, kinds: Sequence[str]) -> jax.Array:
        order = [i for kind in kinds for i, k in enumerate(axes) if k == kind]
        rank = len(axes)  # stands for the rank axis: behind a's in axes, before b's out axes
        order.insert(len(order) if "in" in kinds else sum(k == "batch" for k in axes), rank)
        if kinds == ("batch",):
            order.remove(rank)
        return lax.expand_dims(factor, [place for place, i in enumerate(order) if i in changed])

    return thinned.replace(
        a=thick(thinned.a, ("batch", "in")),
        b=thick(thinned.b, ("batch", "out")),
        scale=thick(thinned.scale, ("batch",)),
        axes=tuple(axes),
    )


@register(p.convert_element_type_p, p.reduce_precision_p)
def cast(context: Context, *operands: Any, **params: Any) -> LoraWeight:
    """The base is rounded as the model says; the factors keep their precision."""
    weight = only(context, operands)
    out: Any = context.eqn.outvars[0].aval
    if not jax.numpy.issubdtype(out.dtype, jax.numpy.inexact):
        raise context.refuse(operands, f"it is converted to {out.dtype}, which is not a floating dtype")
    return weight.replace(w=_base(context, weight))


@register("reshard")
def reshard(context: Context, *operands: Any, **params: Any) -> LoraWeight:
    """The base moves; the factors follow onto a mesh whose axes are of other types, replicated."""
    weight = only(context, operands)
    w = _base(context, weight)
    mesh = jax.typeof(w).sharding.mesh
    if mesh == jax.typeof(weight.w).sharding.mesh:
        return weight.replace(w=w)
    a, b, scale = (
        jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))
        for x in (weight.a, weight.b, weight.scale)
    )
    return weight.replace(w=w, a=a, b=b, scale=scale)


@register(p.copy_p, p.name_p, p.sharding_constraint_p, "pvary", "layout_constraint")
def pass_on(context: Context, *operands: Any, **params: Any) -> LoraWeight:
    """What concerns the base array alone."""
    weight = only(context, operands)
    return weight.replace(w=_base(context, weight))


@register(p.stop_gradient_p)
def stop_gradient(context: Context, weight: LoraWeight, **params: Any) -> LoraWeight:
    """No gradient passes to the base, and none to the factors."""
    return jax.tree.map(lax.stop_gradient, weight)


@register(p.transpose_p)
def transpose(context: Context, *operands: Any, permutation: Sequence[int]) -> LoraWeight:
    """The factors hold their axes in w's order, so they are transposed with it."""
    weight = only(context, operands)
    return permuted(weight, _base(context, weight), permutation)


def permuted(weight: LoraWeight, w: jax.Array, permutation: Sequence[int]) -> LoraWeight:
    """The weight whose axes are `permutation` of this one's, with the base already transposed."""

    def act(factor: jax.Array, where: Callable[[int], int | None]) -> jax.Array:
        held = sorted(permutation, key=lambda i: weight.axes[i] != "batch")  # stably: batch axes come first
        order = [i for i in map(where, held) if i is not None]
        rank = sorted(set(range(factor.ndim)) - set(order))
        # The rank axis stays where it is: behind the in axes of a, before the out axes of b.
        for place in rank:
            order.insert(place, place)
        return lax.transpose(factor, order)

    return per_axis(weight, w, act).replace(axes=tuple(weight.axes[i] for i in permutation))


@register(p.rev_p)
def rev(context: Context, *operands: Any, dimensions: Sequence[int]) -> LoraWeight:
    """The factor that holds a reversed axis is reversed along it."""
    weight = only(context, operands)

    def act(factor: jax.Array, where: Callable[[int], int | None]) -> jax.Array:
        return lax.rev(factor, [i for i in map(where, dimensions) if i is not None])

    return per_axis(weight, _base(context, weight), act)


@register(p.slice_p)
def slice_(
    context: Context, *operands: Any, start_indices: Any, limit_indices: Any, strides: Any
) -> LoraWeight:
    """The factor that holds a sliced axis is sliced along it."""
    weight = only(context, operands)
    steps = strides or (1,) * len(weight.axes)

    def act(factor: jax.Array, where: Callable[[int], int | None]) -> jax.Array:
        start, limit, stride = [0] * factor.ndim, list(factor.shape), [1] * factor.ndim
        for axis in range(len(weight.axes)):
            place = where(axis)
            if place is not None:
                start[place], limit[place] = start_indices[axis], limit_indices[axis]
                stride[place] = steps[axis]
        return lax.slice(factor, start, limit, stride)

    w = _base(context, weight)
    return per_axis(weight, w, act)


@register(lax.split_p)
def split(context: Context, *operands: Any, sizes: Sequence[int], axis: int) -> list[LoraWeight]:
    """Each part is a slice, of the base and of the factor that holds the axis."""
    weight = only(context, operands)

    def part(w: jax.Array, start: int) -> LoraWeight:
        def act(factor: jax.Array, where: Callable[[int], int | None]) -> jax.Array:
            place = where(axis)
            return (
                factor
                if place is None
                else lax.slice_in_dim(factor, start, start + w.shape[axis], axis=place)
            )

        return per_axis(weight, w, act)

    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [part(w, start) for w, start in zip(bind(context.eqn, [weight.w]), starts, strict=True)]


@register("unstack")
def unstack(context: Context, *operands: Any, axis: int) -> list[LoraWeight]:
    """Each entry along an axis: a slice of size one, squeezed."""
    weight = only(context, operands)

    def entry(w: jax.Array, i: int) -> LoraWeight:
        def act(factor: jax.Array, where: Callable[[int], int | None]) -> jax.Array:
            place = where(axis)
            return factor if place is None else lax.index_in_dim(factor, i, place, keepdims=False)

        axes = (*weight.axes[:axis], *weight.axes[axis + 1 :])
        return per_axis(weight, w, act).replace(axes=axes)

    return [entry(w, i) for i, w in enumerate(bind(context.eqn, [weight.w]))]


@register("tile")
def tile(context: Context, *operands: Any, reps: Sequence[int]) -> LoraWeight:
    """The factor that holds a repeated axis is repeated along it."""
    weight = only(context, operands)
    if any(n > 1 and kind == "unit" for n, kind in zip(reps, weight.axes, strict=True)):
        raise context.refuse(operands, "it repeats an axis of the weight that has size one")

    def act(factor: jax.Array, where: Callable[[int], int | None]) -> jax.Array:
        for axis, count in enumerate(reps):
            place = where(axis)
            if place is not None and count != 1:
                factor = lax.concatenate([factor] * count, place)
        return factor

    return per_axis(weight, _base(context, weight), act)


@register(p.all_gather_p, "all_gather_invariant")
def all_gather(
    context: Context, *operands: Any, axis_name: Any, all_gather_dimension: int, tiled: bool, **params: Any
) -> LoraWeight:
    """The factor that holds the gathered axis is gathered too, in place of the update."""
    weight = only(context, operands)
    if not tiled or weight.axes[all_gather_dimension] == "unit":
        raise context.refuse(operands, "it gathers shards along an axis that none of the factors has")

    def act(factor: jax.Array, where: Callable[[int], int | None]) -> jax.Array:
        place = where(all_gather_dimension)
        if place is None:
            return factor
        moved = {**params, "axis_name": axis_name, "all_gather_dimension": place, "tiled": True}
        return context.eqn.primitive.bind(factor, **moved)

    return per_axis(weight, _base(context, weight), act)


@register(p.device_put_p, lax.optimization_barrier_p)
def pass_on_together(context: Context, *operands: Any, **params: Any) -> list[Any]:
    """The base arrays move, or pass the barrier, with whatever else does; the factors follow in use."""
    arrays = bind(context.eqn, [x.w if isinstance(x, LoraWeight) else x for x in operands])
    return [x.replace(w=w) if isinstance(x, LoraWeight) else w for x, w in zip(operands, arrays, strict=True)]


@register(p.dynamic_slice_p)
def dynamic_slice(context: Context, *operands: Any, slice_sizes: Sequence[int]) -> LoraWeight:
    """As slice, from starts known at run time; both clamp a start in the same way."""
    weight, *starts = only(context, operands), *operands[1:]

    def act(factor: jax.Array, where: Callable[[int], int | None]) -> jax.Array:
        for axis, (start, size) in enumerate(zip(starts, slice_sizes, strict=True)):
            place = where(axis)
            if place is not None and size != factor.shape[place]:
                factor = lax.dynamic_slice_in_dim(factor, start, size, place)
        return factor

    return per_axis(weight, _base(context, weight, *starts), act)


@register(p.squeeze_p)
def squeeze(context: Context, *operands: Any, dimensions: Sequence[int]) -> LoraWeight:
    """An axis of size one leaves the factor that holds it."""
    weight = only(context, operands)
    return squeezed(weight, _base(context, weight), dimensions)


def squeezed(weight: LoraWeight, w: jax.Array, dimensions: Sequence[int]) -> LoraWeight:
    """The weight without some axes of size one, with the base already squeezed."""

    def act(factor: jax.Array, where: Callable[[int], int | None]) -> jax.Array:
        return lax.squeeze(factor, [i for i in map(where, dimensions) if i is not None])

    axes = tuple(kind for i, kind in enumerate(weight.axes) if i not in dimensions)
    return per_axis(weight, w, act).replace(axes=axes)


@register(p.broadcast_in_dim_p)
def broadcast_in_dim(
    context: Context, *operands: Any, shape: Sequence[int], broadcast_dimensions: Sequence[int], sharding: Any
) -> LoraWeight:
    """A new axis of size one is a unit axis; a longer one repeats the weight, as a batch axis."""
    weight = only(context, operands)
    return broadcasted(weight, _base(context, weight), broadcast_dimensions)


def broadcasted(weight: LoraWeight, w: jax.Array, dimensions: Sequence[int]) -> LoraWeight:
    """The weight with its axis i at `dimensions[i]` of the base's, which is already broadcast."""
    old, shape = weight.w.shape, w.shape
    axes: list[AxisKind] = ["unit" if n == 1 else "batch" for n in shape]
    for i, place in enumerate(dimensions):
        if old[i] == shape[place]:
            axes[place] = weight.axes[i]
    # An axis of size one that is repeated is a batch axis from now on, so it leaves its factor first.
    grown = [i for i, place in enumerate(dimensions) if old[i] != shape[place]]
    thin = squeezed(weight, w, grown)
    kept = [place for i, place in enumerate(dimensions) if i not in grown]
    new_batch = [i for i, kind in enumerate(axes) if kind == "batch"]
    held = [place for place in new_batch if place in kept]
    batch_shape = [shape[i] for i in new_batch]

    def act(factor: jax.Array) -> jax.Array:
        rest = factor.shape[len(held) :]
        places = [new_batch.index(place) for place in held]
        places += [len(new_batch) + i for i in range(len(rest))]
        return lax.broadcast_in_dim(factor, (*batch_shape, *rest), places)

    return thin.replace(a=act(thin.a), b=act(thin.b), scale=act(thin.scale), axes=tuple(axes))


@register(p.reshape_p)
def reshape(
    context: Context, *operands: Any, new_sizes: Sequence[int], dimensions: Any, **params: Any
) -> LoraWeight:
    """Adjacent axes of one kind merge, and any axis splits; an in axis never merges with an out axis.

    A batch axis that merges with one of those is absorbed by it, where that keeps the factors smaller
    than the weight.
    """
    weight = only(context, operands)
    w = _base(context, weight)
    if 0 in new_sizes:
        raise context.refuse(operands, "reshaping an array without entries")
    if dimensions is not None:
        weight = permuted(weight, lax.transpose(weight.w, dimensions), dimensions)
    shape: tuple[int, ...] = weight.w.shape
    axes: list[AxisKind] = []
    for old, new in reshape_groups(shape, new_sizes):
        kinds: set[AxisKind] = {weight.axes[i] for i in old if shape[i] != 1}
        if "batch" in kinds and len(kinds) == 2:
            (into,) = kinds - {"batch"}
            for i in old:
                if weight.axes[i] == "batch" and shape[i] != 1:
                    weight = absorbed(weight, i, into)
            kinds = {into}
        if len(kinds) > 1 or weight.a.size + weight.b.size > max(w.size, _held(operands[0])):
            merged = " and ".join(f"{operands[0].axes[i]!r}" for i in old)
            raise context.refuse(operands, f"reshaping {shape} to {tuple(new_sizes)} merges {merged} axes")
        for i in new:
            axes.append("unit" if new_sizes[i] == 1 else next(iter(kinds)))
    batch, inner, outer = sizes(tuple(new_sizes), tuple(axes))
    return weight.replace(
        w=w,
        a=lax.reshape(weight.a, (*batch, *inner, weight.rank)),
        b=lax.reshape(weight.b, (*batch, weight.rank, *outer)),
        scale=lax.reshape(weight.scale, batch),
        axes=tuple(axes),
    )


def _held(weight: LoraWeight) -> int:
    return weight.a.size + weight.b.size


def absorbed(weight: LoraWeight, axis: int, kind: AxisKind) -> LoraWeight:
    """The same weight with a batch axis called in or out; the rank grows by its size.

    The layers AₗBₗ side by side are [A₁ A₂ …] diag(B₁, B₂, …) along an out axis, and
    diag(A₁, A₂, …) [B₁; B₂; …] along an in axis.
    """
    batch = weight.axes_of("batch")
    layer, n = batch.index(axis), len(batch)
    rest = [i for i in range(n) if i != layer]
    ahead = sum(k == kind for k in weight.axes[:axis])  # of its new kind, before it
    a = weight.a
    b = scaled(as_dtype(weight.b, wide_dtype(weight.b.dtype, weight.scale.dtype)), weight.scale)
    # Both with the layer beside the rank.
    a = lax.transpose(a, [*rest, *range(n, a.ndim - 1), layer, a.ndim - 1])
    b = lax.transpose(b, [*rest, layer, *range(n, b.ndim)])

    def diagonal(factor: jax.Array, layer: int, place: int) -> jax.Array:
        """The factor with one more axis for the layers, zero where the two axes differ."""
        shape = (*factor.shape[:place], weight.w.shape[axis], *factor.shape[place:])
        layer += place <= layer
        rows, columns = (lax.broadcasted_iota("int32", shape, i) for i in (layer, place))
        kept = [i for i in range(len(shape)) if i != place]
        return lax.select(
            lax.eq(rows, columns),
            lax.broadcast_in_dim(factor, shape, kept),
            lax.full(shape, 0, factor.dtype),
        )

    if kind == "in":
        a = diagonal(a, a.ndim - 2, len(rest) + ahead)
    else:
        b = diagonal(b, len(rest), len(rest) + 2 + ahead)
    return weight.replace(
        a=lax.reshape(a, (*a.shape[:-2], a.shape[-2] * a.shape[-1])),
        b=lax.reshape(b, (*b.shape[: n - 1], b.shape[n - 1] * b.shape[n], *b.shape[n + 1 :])),
        scale=lax.full([weight.w.shape[batch[i]] for i in rest], 1, weight.scale.dtype),
        axes=(*weight.axes[:axis], kind, *weight.axes[axis + 1 :]),
    )


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of old axes that a reshape turns into runs of new axes.

    >>> reshape_groups((6, 4, 5), (2, 3, 20))
    [([0], [0, 1]), ([1, 2], [2])]
    """
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        ours, theirs = [], []
        while True:
            size, target = math.prod(old[k] for k in ours), math.prod(new[k] for k in theirs)
            if (ours or theirs) and size == target:
                break
            if i < len(old) and (size <= target and (ours == [] or size < target) or j >= len(new)):
                ours.append(i)
                i += 1
            else:
                theirs.append(j)
                j += 1
        groups.append((ours, theirs))
    return groups
