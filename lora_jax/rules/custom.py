"""Functions with a backward pass of their own, and a weight inside.

The function's own backward pass makes the gradient of the whole weight, dW. That of a is dW·(sB)ᵀ, of
b it is (sA)ᵀ·dW. So the jaxpr of the backward pass is followed from dW back to the products that make
it, and the factors are contracted with their operands: dW itself is never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Literal
from jax.extend.core import primitives as p

from lora_jax.interpret import Context, RefusedError, evaluate, register
from lora_jax.rules.control import Closed, arrays_only, is_weight, true_names
from lora_jax.rules.linear import Label, Labelled, as_dtype, contract, factor_labels, scaled
from lora_jax.weight import LoraWeight, wide_dtype


@register(p.custom_jvp_call_p)
def custom_jvp(context: Context, *operands: Any, **params: Any) -> Any:
    """A weight inside would lose the function's own derivative rule, so it is refused."""
    raise context.refuse(
        operands, "the function has a derivative rule of its own, which knows nothing of the factors"
    )


@register(p.custom_vjp_call_p)
def custom_vjp(context: Context, *operands: Any, **params: Any) -> list[Any]:
    """The body is interpreted; its own backward pass gives the gradients of the factors."""
    if context.key is not None and any(isinstance(x, LoraWeight) and x.dropout for x in operands):
        raise context.refuse(operands, "its own backward pass could not drop the entries that it drops")
    try:
        names = true_names([x for x in operands if is_weight(x)])
        return _with_vjp(context, params, names)(list(operands))
    except RefusedError as error:
        raise error.located({}, context.where) from None


def _with_vjp(context: Context, params: dict[str, Any], names: dict[str, str]) -> Callable[..., list[Any]]:
    densify, primitive = context.densify, context.eqn.primitive

    def bare(*values: Any) -> list[Any]:
        return primitive.bind(*values, **primitive.get_bind_params(params))

    @jax.custom_vjp
    def run(operands: Any) -> list[Any]:
        return _returned(evaluate(Closed(params["call_jaxpr"]), operands, None, densify))

    def forward(marked: Any) -> tuple[Any, Any]:
        operands = jax.tree.map(lambda x: x.value, marked, is_leaf=_is_marked)
        # Whether a base is differentiated too; a structure says it, since residuals are arrays.
        asked = [x.w.perturbed if is_weight(x) else False for x in marked]
        # What the function's own forward pass gives, which second derivatives go through, as in jax.
        out = evaluate(_forward(bare, operands), operands, None, densify)
        return _returned(out), (operands, [() if yes else None for yes in asked])

    def backward(saved: Any, cotangents: Any) -> Any:
        operands, asked = saved
        # Outputs without a cotangent are left out, so that the backward pass sees a symbolic zero, as in jax.
        live = [not isinstance(x, SymbolicZero) for x in cotangents]
        given = [x for x, yes in zip(cotangents, live, strict=True) if yes]

        def of_live(*values: Any) -> list[Any]:
            return [x for x, yes in zip(bare(*values), live, strict=True) if yes]

        try:
            return (_gradients(of_live, operands, [x is not None for x in asked], given, densify),)
        except RefusedError as error:
            raise error.located(names, context.where) from None

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


def _returned(out: list[Any]) -> list[Any]:
    why = "the function returns a weight, or one made of weights"
    return arrays_only(out, frozenset(), "custom_vjp_call", why)


def _is_marked(x: Any) -> bool:
    return hasattr(x, "perturbed")


def _pulled(bare: Callable[..., Any], values: Sequence[Any]) -> tuple[list[Any], Callable[..., Any]]:
    """`jax.vjp` of a function with respect to its floating operands."""
    floating = [jnp.issubdtype(x.dtype, jnp.inexact) for x in values]

    def of_floats(*floats: Any) -> Any:
        given = iter(floats)
        return bare(*(next(given) if yes else x for x, yes in zip(values, floating, strict=True)))

    return jax.vjp(of_floats, *(x for x, yes in zip(values, floating, strict=True) if yes))


def _forward(bare: Callable[..., Any], operands: Sequence[Any]) -> Any:
    """The jaxpr of the function's own forward pass, without its residuals."""
    bases = [x.w if is_weight(x) else x for x in operands]
    whole = jax.make_jaxpr(lambda *values: _pulled(bare, values)[0])(*bases)
    return _Needed(whole, Closed(whole).jaxpr.outvars)


def _gradients(
    bare: Callable[..., Any], operands: Sequence[Any], asked: Sequence[bool], cotangents: Any, densify: Any
) -> list[Any]:
    """The gradients of all operands: of a LoraWeight those of a and b, and of w if it is asked for."""
    n = len(operands)
    floating = [jnp.issubdtype(x.dtype, jnp.inexact) for x in operands]

    def pull(*values: Any) -> list[Any]:
        backward = _pulled(bare, values[:n])[1]
        lax.optimization_barrier_p.bind()
        return list(backward(list(values[n:])))

    bases = [x.w if is_weight(x) else x for x in operands]
    flat = jax.make_jaxpr(_inlined(jax.make_jaxpr(pull)(*bases, *cotangents)))(*bases, *cotangents)
    jaxpr = Closed(flat).jaxpr
    made = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    results = iter(jaxpr.outvars)
    outvars = [next(results) if yes else None for yes in floating]

    products: dict[int, list[_Product]] = {}
    wanted: list[Any] = []
    for i, (x, var) in enumerate(zip(operands, outvars, strict=True)):
        if is_weight(x):
            labels: list[Label] = [("w", k) for k in range(x.ndim)]
            try:
                products[i] = list(_products(made, var, labels, x))
            except RefusedError:
                if not densify.issuperset(x.paths):
                    raise
                products[i] = [_Product(var, tuple(labels), _ONE, (), (), 1)]
            wanted += [
                v for product in products[i] for v in (product.x, product.y, *(v for v, _ in product.factors))
            ]
        if var is not None and (not is_weight(x) or asked[i]):
            wanted.append(var)
    needed = list(dict.fromkeys(v for v in wanted if not isinstance(v, Literal) and v is not _ONE))
    values = evaluate(_Needed(flat, needed), [*operands, *cotangents], None, densify)
    value: dict[Any, Any] = dict(zip(needed, values, strict=True))

    def read(v: Any) -> Any:
        x: Any = jnp.ones(()) if v is _ONE else v.val if isinstance(v, Literal) else value[v]
        if not is_weight(x):
            return x
        if not densify.issuperset(x.paths):
            raise RefusedError(x.paths, "custom_vjp_call", "", "its backward pass uses the weight as data")
        return x.dense()

    gradients: list[Any] = []
    for i, (x, var) in enumerate(zip(operands, outvars, strict=True)):
        if is_weight(x):
            a, b, scale = _of_factors(x, products[i], read)
            w = as_dtype(read(var), x.w.dtype) if asked[i] else None
            gradients.append(x.replace(w=w, a=a, b=b, scale=scale))
        else:
            gradients.append(None if var is None else read(var))
    return gradients


class _Needed:
    """A closed jaxpr cut down to what some of its variables need, and to its effects."""

    def __init__(self, whole: Any, outvars: Sequence[Any]):
        jaxpr, eqns = Closed(whole).jaxpr, []
        needed = {v for v in outvars if not isinstance(v, Literal)}
        own = True  # not of a forward pass that has run already
        for eqn in reversed(jaxpr.eqns):
            own = own and not _is_boundary(eqn)
            if needed.intersection(eqn.outvars) or (own and eqn.effects):
                eqns.append(eqn)
                needed.update(v for v in eqn.invars if not isinstance(v, Literal))
        self.jaxpr = SimpleNamespace(
            invars=jaxpr.invars, constvars=jaxpr.constvars, eqns=eqns[::-1], outvars=list(outvars)
        )
        self.consts = Closed(whole).consts


def _is_boundary(eqn: Any) -> bool:
    """Whether it is the barrier without operands that stands between a forward and a backward pass."""
    return eqn.primitive is lax.optimization_barrier_p and not eqn.invars


def _inlined(whole: Any) -> Callable[..., list[Any]]:
    """The function of a jaxpr, without the jits in it."""

    def run(*args: Any) -> list[Any]:
        jaxpr = Closed(whole).jaxpr
        env = dict(zip(jaxpr.constvars, Closed(whole).consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for eqn in jaxpr.eqns:
            values = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
            if eqn.primitive is p.jit_p:
                outs = _inlined(eqn.params["jaxpr"])(*values)
            else:
                outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
                outs = outs if eqn.primitive.multiple_results else [outs]
            env.update(zip(eqn.outvars, outs, strict=True))
        return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]

    return run


_ONE = object()  # in the place of a product's second operand


class _Product(NamedTuple):
    """A term of dW: the product of x and y over all labels that dW has not, times scalars."""

    x: Any
    x_labels: tuple[Label, ...]
    y: Any
    y_labels: tuple[Label, ...]
    factors: tuple[tuple[Any, int], ...]  # each with its power, 1 or -1
    sign: int


def _products(
    made: dict[Any, Any], var: Any, labels: Sequence[Label], weight: LoraWeight
) -> Iterator[_Product]:
    """The products that a gradient of the weight is the sum of; refused where it is made otherwise."""
    todo: list[tuple[Any, tuple[Label, ...], tuple[Any, ...], int]] = [(var, tuple(labels), (), 1)]
    fresh = 0
    while todo:
        var, labels, factors, sign = todo.pop()
        eqn = None if isinstance(var, Literal) else made.get(var)
        if eqn is None:
            why = "its backward pass hands on a gradient that it was given"
            raise RefusedError(weight.paths, "custom_vjp_call", "", why)
        name = eqn.primitive.name
        match name:
            case "dot_general":
                (x_sum, y_sum), (x_batch, y_batch) = eqn.params["dimension_numbers"]
                x, y = eqn.invars
                x_labels, y_labels = [None] * x.aval.ndim, [None] * y.aval.ndim
                given = iter(labels)
                for i, j in zip(x_batch, y_batch, strict=True):
                    x_labels[i] = y_labels[j] = next(given)
                for i, j in zip(x_sum, y_sum, strict=True):
                    x_labels[i] = y_labels[j] = ("sum", fresh)
                    fresh += 1
                x_labels = [next(given) if s is None else s for s in x_labels]
                y_labels = [next(given) if s is None else s for s in y_labels]
                yield _Product(x, tuple(x_labels), y, tuple(y_labels), factors, sign)
            case "transpose":
                order = eqn.params["permutation"]
                todo.append(
                    (eqn.invars[0], tuple(labels[order.index(i)] for i in range(len(order))), factors, sign)
                )
            case "convert_element_type" | "copy" | "sharding_constraint" | "reshard":
                todo.append((eqn.invars[0], labels, factors, sign))
            case "neg":
                todo.append((eqn.invars[0], labels, factors, -sign))
            case "add" | "add_any" | "sub":
                todo.append((eqn.invars[0], labels, factors, sign))
                todo.append((eqn.invars[1], labels, factors, -sign if name == "sub" else sign))
            case "mul" if any(v.aval.ndim == 0 for v in eqn.invars):
                scalar, array = sorted(eqn.invars, key=lambda v: v.aval.ndim)
                todo.append((array, labels, (*factors, (scalar, 1)), sign))
            case "div" if eqn.invars[1].aval.ndim == 0:
                todo.append((eqn.invars[0], labels, (*factors, (eqn.invars[1], -1)), sign))
            case "reduce_sum":
                axes, kept = eqn.params["axes"], iter(labels)
                new = [
                    ("sum", fresh + i) if i in axes else next(kept) for i in range(eqn.invars[0].aval.ndim)
                ]
                fresh += len(new)
                todo.append((eqn.invars[0], tuple(new), factors, sign))
            case "broadcast_in_dim" if isinstance(eqn.invars[0], Literal) and eqn.invars[0].val == 0:
                pass
            case _:
                raise RefusedError(
                    weight.paths,
                    "custom_vjp_call",
                    "",
                    f"its backward pass makes the weight's gradient by `{name}`",
                )


def _of_factors(
    weight: LoraWeight, products: Sequence[_Product], read: Callable[[Any], Any]
) -> tuple[jax.Array, ...]:
    """The gradients of a, b and the scale from the terms of dW."""
    a_labels, b_labels = factor_labels(weight, [("w", k) for k in range(weight.ndim)])
    a = Labelled(weight.a, a_labels)
    b = Labelled(weight.b, b_labels)

    def summed(factor: Labelled, wanted: tuple[Label, ...]) -> jax.Array:
        total = None
        keep = set(wanted)
        for product in products:
            sides = [Labelled(read(product.x), product.x_labels), Labelled(read(product.y), product.y_labels)]
            # The factor first meets the operand that it shares more with, and leaves the smaller result.
            sides.sort(key=lambda side: -len(set(side.labels) & set(factor.labels)))
            dtype = wide_dtype(factor.array.dtype, *(side.array.dtype for side in sides))
            first, second, third = (
                Labelled(as_dtype(x.array, dtype), x.labels) for x in (sides[0], factor, sides[1])
            )
            middle = contract(first, second, keep | set(third.labels), lax.Precision.HIGHEST)
            term = contract(middle, third, keep, lax.Precision.HIGHEST)
            # Left over are dW's unit axes, which neither factor has, and what dW is a sum over.
            rest = [i for i, s in enumerate(term.labels) if s not in wanted]
            left = [s for s in term.labels if s in wanted]
            array = lax.reduce_sum(term.array, rest) if rest else term.array
            array = lax.transpose(array, [left.index(s) for s in wanted])
            for scalar, power in product.factors:
                by = as_dtype(jnp.asarray(read(scalar)), array.dtype)
                array = array * by if power > 0 else array / by
            array = -array if product.sign < 0 else array
            total = array if total is None else total + array
        return total if total is not None else jnp.zeros(())

    of_a, of_b = (
        jnp.broadcast_to(x, like.shape)
        for x, like in ((summed(b, a_labels), weight.a), (summed(a, b_labels), weight.b))
    )
    # What is made of the whole product is divided among a, b and the scale as in s·A·B.
    of_scale = jnp.sum(of_a * as_dtype(weight.a, of_a.dtype), range(weight.scale.ndim, of_a.ndim))
    return (
        as_dtype(scaled(of_a, weight.scale), weight.a.dtype),
        as_dtype(scaled(of_b, weight.scale), weight.b.dtype),
        as_dtype(of_scale, weight.scale.dtype),
    )
