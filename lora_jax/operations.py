"""The operations of a traced program's products, counted: of a step, of its floor, of full fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jax.extend.core import primitives as p

from lora_jax import nnx
from lora_jax.rules.control import scan_parts
from lora_jax.train import take_apart
from lora_jax.tree import leaves_with_path
from lora_jax.weight import LoraWeight, is_wrapped_leaf


def flops(fn: Callable[..., Any], *args: Any) -> int:
    """The floating-point operations of a function's products: two for each multiplication and addition.

    Counted on the traced program are dot_general, convolution (the positions that padding or dilation
    leave empty are not), ragged_dot, and what a Pallas kernel estimates of itself; nothing elementwise.
    A scan's body counts once for each of its steps, where XLA's cost analysis counts it once; a while
    loop, whose steps are not known, once; of a cond the costliest branch; a shard_map's body once for
    each shard. What no result depends on is not counted.

    Args:
        fn: Any function that JAX can trace.
        *args: Its arguments; arrays may be abstract.

    >>> x, w = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((6, 16, 16), jnp.float32)
    >>> flops(lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], w, x)
    24576
    """
    jaxpr, _ = _traced(fn, args)
    return _walk(jaxpr, [_NEEDED] * len(jaxpr.out_avals), {})[0]


def unread(fn: Callable[..., Any], *args: Any) -> list[Any]:
    """The arrays among a function's arguments from which it computes nothing; it may return them as they are.

    >>> x, table = jnp.ones(3), jnp.ones((2, 4))
    >>> [leaf.shape for leaf in unread(lambda params, x: (params, 2 * x), {"table": table}, x)]
    [(2, 4)]
    """
    jaxpr, arrays = _traced(fn, args)
    given = set(map(id, jaxpr.jaxpr.invars))
    wanted = [_DEAD if id(variable) in given else _NEEDED for variable in jaxpr.jaxpr.outvars]
    _, ins = _walk(jaxpr, wanted, {})
    return [x for x, use in zip(arrays, ins, strict=True) if use == _DEAD]


def _traced(fn: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    rest, arrays = take_apart(args)
    return jax.make_jaxpr(lambda arrays: take_apart(fn(*rest.join(arrays)))[1])(arrays), arrays


def bare_flops(
    loss_fn: Any, params: Any, trainable: Any, batch: Any, accumulate: int
) -> tuple[int, int, bool]:
    """The operations of the floor and of full fine-tuning; and whether the model recomputes anything.

    Args:
        loss_fn: As for `make_train_step`.
        params: The base.
        trainable: What is trained of it, the first half of `partition`.
        batch: The whole batch of a step, of arrays, which may be abstract.
        accumulate: Into how many microbatches it is divided.

    >>> from lora_jax import params as params_lib
    >>> params, x = {"kernel": jnp.ones((16, 32))}, jnp.ones((8, 16))
    >>> trainable, _ = params_lib.partition(params_lib.wrap(params, rank=2, targets="kernel"))
    >>> bare_flops(lambda params, x, key: jnp.sum(x @ params["kernel"]), params, trainable, x, 1)
    (8192, 16384, False)
    """
    tree, close = nnx.opened(params)
    rest, arrays = take_apart(tree)
    floats = [i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)]

    def loss(trained: Sequence[Any], arrays: Sequence[Any], batch: Any) -> Any:
        arrays = list(arrays)
        for i, x in zip(floats, trained, strict=True):
            arrays[i] = x
        out = loss_fn(close(rest.join(arrays)), batch, jax.random.key(0))
        return out if isinstance(out, tuple) else (out, ())

    if accumulate > 1:
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((x.shape[0] // accumulate, *x.shape[1:]), x.dtype), batch
        )
    gradients = jax.value_and_grad(loss, has_aux=True)
    jaxpr = jax.make_jaxpr(gradients)([arrays[i] for i in floats], arrays, batch)

    kinds = {
        node.path: _GRADIENT if isinstance(node, LoraWeight) else _NEEDED
        for _, node in leaves_with_path(trainable, is_wrapped_leaf)
        if is_wrapped_leaf(node)
    }
    kept = zip(leaves_with_path(tree), rest.kinds, strict=True)
    paths = [path for (path, _), kind in kept if kind is jax.Array]
    values = [_NEEDED] * (len(jaxpr.out_avals) - len(floats))
    floor, *_ = _walk(jaxpr, values + [kinds.get(paths[i], _DEAD) for i in floats], {})
    full, *_ = _walk(jaxpr, values + [_NEEDED] * len(floats), {})
    return accumulate * floor, accumulate * full, _recomputes(jaxpr)


# What a value is for: nothing; a gradient that is not counted, and reaches it through no further
# product; or anything else. The larger one counts where there are several.
_DEAD, _GRADIENT, _NEEDED = 0, 1, 2


def _walk(jaxpr: Any, wanted: Sequence[int], seen: dict[Any, Any]) -> tuple[int, list[int]]:
    """The operations of the products that are needed, and what each input is for."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    key = (id(jaxpr), tuple(wanted))
    if key not in seen:
        uses: dict[Any, int] = {}

        def use(variables: Iterable[Any], kinds: Iterable[int]) -> None:
            for variable, kind in zip(variables, kinds, strict=True):
                if not isinstance(variable, Literal):
                    uses[variable] = max(uses.get(variable, _DEAD), kind)

        use(jaxpr.outvars, wanted)
        total = 0
        for eqn in reversed(jaxpr.eqns):
            outs = [uses.get(variable, _DEAD) for variable in eqn.outvars]
            if any(outs) or eqn.effects:
                count, ins = _equation(eqn, outs, seen)
                total += count
                use(eqn.invars, ins)
        seen[key] = total, [uses.get(variable, _DEAD) for variable in jaxpr.invars]
    return seen[key]


def _equation(eqn: Any, outs: list[int], seen: dict[Any, Any]) -> tuple[int, list[int]]:
    params, inputs = eqn.params, len(eqn.invars)
    product = _PRODUCTS.get(eqn.primitive.name)
    if product is not None:
        return product(eqn) if max(outs) == _NEEDED else 0, [_NEEDED] * inputs
    if eqn.primitive is p.scan_p:
        consts, carry = scan_parts(params)
        total, ins = _loop(params["jaxpr"], outs, consts, carry, seen)
        return params["length"] * total, ins
    if eqn.primitive is p.while_p:
        first, second = params["cond_nconsts"], params["body_nconsts"]
        test, test_ins = _walk(params["cond_jaxpr"], [_NEEDED], seen)
        outs = list(map(max, outs, test_ins[first:]))
        total, ins = _loop(params["body_jaxpr"], outs, second, len(outs), seen)
        return test + total, test_ins[:first] + ins
    if eqn.primitive is p.cond_p:
        counts, uses = zip(*(_walk(branch, outs, seen) for branch in params["branches"]), strict=True)
        return max(counts), [_NEEDED, *map(max, *uses, [_DEAD] * (inputs - 1))]
    inner = next((params[name] for name in ("jaxpr", "call_jaxpr") if name in params), None)
    if inner is None:
        return 0, [_NEEDED if eqn.effects else max(outs)] * inputs
    shards = 1
    if eqn.primitive.name == "shard_map":
        shards = math.prod(params["mesh"].shape[name] for name in params["newly_manual_axes"])
    total, ins = _walk(inner, outs, seen)
    return shards * total, ins


def _loop(body: Any, outs: list[int], consts: int, carry: int, seen: dict[Any, Any]) -> tuple[int, list[int]]:
    """A body whose first results are carried into its next step."""
    while True:
        total, ins = _walk(body, outs, seen)
        carried = list(map(max, outs[:carry], ins[consts : consts + carry]))
        if carried == outs[:carry]:
            return total, ins
        outs = carried + outs[carry:]


def _dot(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return _product(eqn, contracted)


def _ragged_dot(eqn: Any) -> int:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    # Where the ragged axis is contracted, every group has a result of its own, of its part of the axis.
    groups = eqn.outvars[0].aval.shape[0] if set(numbers.lhs_ragged_dimensions) & set(contracted) else 1
    return _product(eqn, contracted) // max(groups, 1)


def _product(eqn: Any, contracted: Sequence[int]) -> int:
    shape = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)


def _convolution(eqn: Any) -> int:
    params = eqn.params
    numbers = params["dimension_numbers"]
    left, right = (variable.aval.shape for variable in eqn.invars)
    out = eqn.outvars[0].aval.shape
    total = 2 * math.prod(out[i] for i in numbers.out_spec[:2]) * right[numbers.rhs_spec[1]]
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    windows = zip(*(params[name] for name in names), strict=True)
    specs = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
    spatial = zip(*(spec[2:] for spec in specs), strict=True)
    for (i, j, k), (stride, (low, _), spread, dilation) in zip(spatial, windows, strict=True):
        at = np.arange(out[k])[:, None] * stride - low + np.arange(right[j]) * dilation
        total *= int(np.sum((at >= 0) & (at <= (left[i] - 1) * spread) & (at % spread == 0)))
    return total


def _kernel(eqn: Any) -> int:
    return getattr(eqn.params.get("cost_estimate"), "flops", 0)


_PRODUCTS: dict[str, Callable[[Any], int]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
    "pallas_call": _kernel,
}


def _recomputes(jaxpr: Any) -> bool:
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive is p.remat_p:
            return True
        for param in eqn.params.values():
            inner = param if isinstance(param, (tuple, list)) else [param]
            if any(hasattr(getattr(x, "jaxpr", x), "eqns") and _recomputes(x) for x in inner):
                return True
    return False
