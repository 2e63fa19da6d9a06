"""Rules for linear algebra on weights: sums, joined, scaled, padded and reduced weights, and products of two.

Each gives a LoraWeight whose base is the equation's own result. Where two weights meet, their factors
are stacked along the rank: A₁B₁ + A₂B₂ = [A₁ A₂][B₁; B₂].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from lora_jax.interpret import Context, bind, register
from lora_jax.rules.shape import broadcasted, only, per_axis, relabelled, scaled
from lora_jax.weight import AxisKind, LoraWeight, joint_path, sizes, wide_dtype


def _base(context: Context, *operands: Any) -> jax.Array:
    return bind(context.eqn, [x.w if isinstance(x, LoraWeight) else x for x in operands])[0]


# Weights of one form


def _alike(context: Context, weights: Sequence[LoraWeight], axes: Sequence[AxisKind]) -> list[LoraWeight]:
    """The weights with these kinds of axes; refused where a weight has others, or drops at another rate."""
    alike = []
    for weight in weights:
        found = relabelled(weight, axes)
        if found is None:
            raise context.refuse(weights, f"it joins weights with axes {tuple(axes)} and {weight.axes}")
        alike.append(found)
    if context.key is not None and len({weight.dropout for weight in weights}) > 1:
        raise context.refuse(weights, "it joins weights with different rates of dropout")
    return alike


def _joined(w: jax.Array, a: jax.Array, b: jax.Array, weights: Sequence[LoraWeight]) -> LoraWeight:
    """A weight whose scales are in b already."""
    first = weights[0]
    dtype = wide_dtype(*(weight.scale.dtype for weight in weights))
    shape = b.shape[: len(first.axes_of("batch"))]
    return first.replace(
        w=w, a=a, b=b, scale=jnp.ones(shape, dtype), path=joint_path(weight.path for weight in weights)
    )


def _concatenated(arrays: Sequence[jax.Array], axis: int) -> jax.Array:
    dtype = wide_dtype(*(x.dtype for x in arrays))
    return lax.concatenate([lax.convert_element_type(x, dtype) for x in arrays], axis)


def _repeated(weight: LoraWeight, shape: Sequence[int]) -> LoraWeight:
    """The weight as elementwise operations see it: its axes of size one are as long as the result's."""
    if weight.w.shape == tuple(shape):
        return weight
    w = lax.broadcast_in_dim(weight.w, shape, range(len(shape)))
    return broadcasted(weight, w, range(len(shape)))


# Sums


def _sum(context: Context, w: jax.Array, x: Any, y: Any) -> LoraWeight:
    """The sum of two weights, or of a weight and an array, of which only the base changes."""
    weights = [v for v in (x, y) if isinstance(v, LoraWeight)]
    weights = [_repeated(weight, w.shape) for weight in weights]
    if len(weights) == 1:
        return weights[0].replace(w=w)
    x, y = _alike(context, weights, weights[0].axes)
    rank = len(x.axes_of("batch"))
    a = _concatenated([x.a, y.a], x.a.ndim - 1)
    b = _concatenated([scaled(x.b, x.scale), scaled(y.b, y.scale)], rank)
    return _joined(w, a, b, [x, y])


@register(p.add_p, p.add_jaxvals_p)
def add(context: Context, x: Any, y: Any, **params: Any) -> LoraWeight:
    """W₁ + W₂ stacks the factors; a weight plus an array keeps them."""
    return _sum(context, _base(context, x, y), x, y)


@register(p.sub_p)
def sub(context: Context, x: Any, y: Any, **params: Any) -> LoraWeight:
    """W₁ - W₂ = W₁ + (-W₂)."""
    minus = y.replace(scale=lax.neg(y.scale)) if isinstance(y, LoraWeight) else y
    return _sum(context, _base(context, x, y), x, minus)


@register(p.concatenate_p)
def concatenate(context: Context, *operands: Any, dimension: int) -> LoraWeight:
    """Along an in or an out axis the factor that holds it becomes block-diagonal; layers are stacked.

    An array among the operands has a zero update.
    """
    return _concatenate(context, _base(context, *operands), operands, dimension)


@register("stack")
def stack(context: Context, *operands: Any, axis: int) -> LoraWeight:
    """Weights along a new axis, of the kind batch."""

    def expanded(x: Any) -> Any:
        if not isinstance(x, LoraWeight):
            return lax.expand_dims(x, [axis])
        dimensions = [i for i in range(x.ndim + 1) if i != axis]
        return broadcasted(x, lax.expand_dims(x.w, [axis]), dimensions)

    return _concatenate(context, _base(context, *operands), [expanded(x) for x in operands], axis)


def _concatenate(context: Context, w: jax.Array, operands: Sequence[Any], dimension: int) -> LoraWeight:
    weights = [x for x in operands if isinstance(x, LoraWeight)]
    axes = list(weights[0].axes)
    if all(x.shape[dimension] == 1 for x in weights) and any(w.axes[dimension] == "unit" for w in weights):
        axes[dimension] = "batch"  # jnp.stack: each operand was given an axis of size one
    weights = _alike(context, weights, axes)
    kind = axes[dimension]
    if kind == "unit":
        raise context.refuse(weights, "it joins arrays along an axis of the weight that has size one")
    in_turn = iter(weights)
    parts = [next(in_turn) if isinstance(x, LoraWeight) else _without_update(x, weights[0]) for x in operands]
    n = axes.count("batch")
    place = sum(k == kind for k in axes[:dimension])  # among the axes of its kind
    of_rank = (parts[0].a.ndim - 1, n)
    if kind == "batch":
        rank = max(x.rank for x in parts)
        a = _concatenated([_among(x.a, of_rank[0], 0, rank) for x in parts], place)
        b = _concatenated([_among(x.b, of_rank[1], 0, rank) for x in parts], place)
        scale = _concatenated([x.scale for x in parts], place)
        return _joined(w, a, b, weights).replace(scale=scale)
    starts = [sum(x.rank for x in parts[:i]) for i in range(len(parts))]
    rank = sum(x.rank for x in parts)
    a, b = [x.a for x in parts], [scaled(x.b, x.scale) for x in parts]
    if kind == "in":
        a = [_among(x, of_rank[0], start, rank) for x, start in zip(a, starts, strict=True)]
        return _joined(w, _concatenated(a, n + place), _concatenated(b, of_rank[1]), weights)
    b = [_among(x, of_rank[1], start, rank) for x, start in zip(b, starts, strict=True)]
    return _joined(w, _concatenated(a, of_rank[0]), _concatenated(b, n + 1 + place), weights)


def _without_update(x: jax.Array, like: LoraWeight) -> LoraWeight:
    """An array as a weight of rank zero."""
    batch, inner, outer = sizes(x.shape, like.axes)
    a, b = (jnp.zeros(shape, like.a.dtype) for shape in ((*batch, *inner, 0), (*batch, 0, *outer)))
    return like.replace(w=x, a=a, b=b, scale=jnp.zeros(batch, like.scale.dtype))


def _among(factor: jax.Array, axis: int, start: int, size: int) -> jax.Array:
    """The factor with its rank axis in a longer one that is zero elsewhere."""
    config = [(0, 0, 0)] * factor.ndim
    config[axis] = (start, size - start - factor.shape[axis], 0)
    return lax.pad(factor, jnp.zeros((), factor.dtype), config)


# Scaling


@register(p.neg_p)
def neg(context: Context, weight: LoraWeight, **params: Any) -> LoraWeight:
    """The sign goes to the scale."""
    return weight.replace(w=_base(context, weight), scale=lax.neg(weight.scale))


@register(p.mul_p)
def mul(context: Context, x: Any, y: Any, **params: Any) -> LoraWeight:
    """A scalar goes to the scale, a vector along in axes to a, one along out axes to b."""
    if isinstance(x, LoraWeight) and isinstance(y, LoraWeight):
        raise context.refuse([x, y], "the product of two weights is elementwise")
    weight, factor = (x, y) if isinstance(x, LoraWeight) else (y, x)
    return _times(context, weight, factor, context.eqn.invars[int(weight is x)], _base(context, x, y))


@register(p.div_p)
def div(context: Context, weight: Any, divisor: Any, **params: Any) -> LoraWeight:
    """As the product with one over the divisor."""
    if isinstance(divisor, LoraWeight):
        raise context.refuse([weight, divisor], "it divides by the weight")
    dtype = wide_dtype(weight.scale.dtype, divisor.dtype)
    inverse = lax.div(jnp.ones(jnp.shape(divisor), dtype), lax.convert_element_type(divisor, dtype))
    return _times(context, weight, inverse, context.eqn.invars[1], _base(context, weight, divisor))


def _thinned(context: Context, factor: Any, var: Any) -> Any:
    """The array, of a variable, with size one along the axes that a broadcast in the same jaxpr made."""
    for eqn in context.jaxpr.eqns:
        if eqn.primitive is p.broadcast_in_dim_p and eqn.outvars[0] is var:
            shape, old = jnp.shape(factor), eqn.invars[0].aval.shape
            real = {place for n, place in zip(old, eqn.params["broadcast_dimensions"], strict=True) if n != 1}
            limits = [n if i in real else min(n, 1) for i, n in enumerate(shape)]
            return lax.slice(factor, [0] * len(shape), limits)
    return factor


def _times(context: Context, weight: LoraWeight, factor: Any, var: Any, w: jax.Array) -> LoraWeight:
    factor = _thinned(context, factor, var)
    shape = jnp.shape(factor) or (1,) * len(weight.axes)
    weight = _repeated(weight, w.shape)
    varies = {weight.axes[i] for i, n in enumerate(shape) if n != 1}
    if {"in", "out"} <= varies:
        why = f"the product with an array of shape {shape} is elementwise; multiply by vectors in turn"
        raise context.refuse([weight], why)
    # The array in the order of a factor's axes, of size one along those that it does not depend on.
    taken: list[AxisKind] = ["batch"] + [kind for kind in ("in", "out") if kind in varies]  # type: ignore
    held = [i for kind in taken for i in weight.axes_of(kind)]
    rest = [i for i in range(len(shape)) if i not in held]
    factor = lax.reshape(jnp.asarray(factor), shape)
    factor = lax.squeeze(lax.transpose(factor, [*held, *rest]), range(len(held), len(shape)))

    def product(part: jax.Array, rank_axis: int | None) -> jax.Array:
        dtype = wide_dtype(part.dtype, factor.dtype)
        by = lax.convert_element_type(factor, dtype)
        by = by if rank_axis is None else lax.expand_dims(by, [rank_axis])
        return lax.convert_element_type(part, dtype) * by

    if "in" in varies:
        return weight.replace(w=w, a=product(weight.a, weight.a.ndim - 1))
    if "out" in varies:
        return weight.replace(w=w, b=product(weight.b, len(weight.axes_of("batch"))))
    return weight.replace(w=w, scale=product(weight.scale, None))


@register(p.pad_p)
def pad(context: Context, *operands: Any, padding_config: Sequence[tuple[int, int, int]]) -> LoraWeight:
    """The update is zero where the base is padding, whatever the padding's value."""
    weight = only(context, operands)

    def act(factor: jax.Array, where: Any) -> jax.Array:
        config = [(0, 0, 0)] * factor.ndim
        for axis, low_high_interior in enumerate(padding_config):
            place = where(axis)
            if place is not None:
                config[place] = low_high_interior
        return lax.pad(factor, jnp.zeros((), factor.dtype), config)

    w = _base(context, weight, operands[1])
    if any(weight.axes[i] == "unit" and n != 1 for i, n in enumerate(w.shape)):
        raise context.refuse([weight], "it pads an axis of the weight that has size one")
    return per_axis(weight, w, act)


# Reductions


@register(p.reduce_sum_p)
def reduce_sum(context: Context, weight: LoraWeight, *, axes: Sequence[int], **params: Any) -> LoraWeight:
    """A sum over in or out axes reduces one factor; one over layers moves them to the rank."""
    w = _base(context, weight)
    layers = [i for i in axes if weight.axes[i] == "batch"]
    for i in sorted(layers, reverse=True):
        weight = _layers_to_rank(weight, i)

    def act(factor: jax.Array, where: Any) -> jax.Array:
        return lax.reduce_sum(factor, [place for i in axes if (place := where(i)) is not None])

    kept = tuple(kind for i, kind in enumerate(weight.axes) if i not in axes)
    return per_axis(weight, w, act).replace(axes=kept)


def _layers_to_rank(weight: LoraWeight, axis: int) -> LoraWeight:
    """Σ over a batch axis of s·A·B, with the axis left behind as a unit axis: the rank grows by its size."""
    n = len(weight.axes_of("batch"))
    place = weight.axes_of("batch").index(axis)
    rank = weight.w.shape[axis] * weight.rank
    others = [i for i in range(n) if i != place]
    a_rest, b = list(range(n, weight.a.ndim - 1)), scaled(weight.b, weight.scale)
    a = lax.transpose(weight.a, [*others, *a_rest, place, weight.a.ndim - 1])
    b = lax.transpose(b, [*others, place, *range(n, b.ndim)])
    a = lax.reshape(a, (*a.shape[:-2], rank))
    b = lax.reshape(b, (*b.shape[: n - 1], rank, *b.shape[n + 1 :]))
    axes = tuple("unit" if i == axis else kind for i, kind in enumerate(weight.axes))
    return weight.replace(a=a, b=b, scale=jnp.ones(b.shape[: n - 1], weight.scale.dtype), axes=axes)
