"""Rules for primitives that hold a jaxpr; every difference between JAX versions lives here.

Each re-enters the public transform on the interpreted body, inside a jitted function that is kept
by the identity of the inner jaxpr. So a block that is used in many layers is interpreted once, and
a second eager call finds what the first one compiled. A kept function sees placeholder paths, since
layers that share a body differ in theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p
from jax.sharding import AxisType, PartitionSpec

from lora_jax.interpret import Context, RefusedError, evaluate, register
from lora_jax.weight import LoraWeight, joint_path, parted, wide_dtype

_KEPT = 1024  # functions; each also keeps its jaxpr alive
# What the placeholder paths stand for, the innermost function's first, while one is traced.
_NAMES: ContextVar[tuple[dict[str, str], ...]] = ContextVar("names", default=())


class Closed:
    """A jaxpr with its constants, in the form of every version: 0.10 has two classes, 0.11 one."""

    def __init__(self, jaxpr: Any):
        self.jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        self.consts = getattr(jaxpr, "consts", ())


def _run(jaxpr: Any, operands: Sequence[Any], key: Any, densify: frozenset[str]) -> list[Any]:
    return evaluate(Closed(jaxpr), operands, key, densify)


def kept(
    make: Callable[..., Callable[..., Any]],
    context: Context,
    operands: Any,
    *statics: Hashable,
    key: Any = None,
) -> Any:
    """Call the function that `make(densify, *statics)` gives, one for each set of statics, on operands.

    LoraWeights travel under placeholder paths; errors and results get the paths back.
    """
    weights = [x for x in jax.tree.leaves(operands, is_leaf=is_weight) if is_weight(x)]
    names = {f"#{i}": weight.path for i, weight in enumerate(weights)}
    densify = frozenset(short for short, path in names.items() if context.densify.issuperset(parted(path)))
    if not any(weight.dropout for weight in weights):
        key = None
    shorts = iter(names)
    operands = _map_weights(lambda weight: weight.replace(path=next(shorts)), operands)
    token = _NAMES.set((names, *_NAMES.get()))
    try:
        out = _function(make, densify, *statics)(operands, key)
    except RefusedError as error:
        raise error.located(names, context.where) from None
    finally:
        _NAMES.reset(token)
    return _map_weights(
        lambda weight: weight.replace(path=joint_path(names[short] for short in weight.paths)), out
    )


def true_names(weights: Sequence[LoraWeight]) -> dict[str, str]:
    """The user's paths of weights under placeholders: those of the first layer that shares the function.

    For an error that is raised when the trace is over, in a backward pass.
    """
    found = {}
    for placeholder in {path for weight in weights for path in weight.paths}:
        path = placeholder
        for names in _NAMES.get():
            path = joint_path(names[part] for part in parted(path))
        found[placeholder] = path
    return found


@functools.lru_cache(maxsize=_KEPT)
def _function(make: Callable[..., Any], *statics: Hashable) -> Callable[..., Any]:
    return make(*statics)


def is_weight(node: Any) -> bool:
    """Whether a node of a tree is a LoraWeight."""
    return isinstance(node, LoraWeight)


def arrays_only(out: Sequence[Any], densify: frozenset[str], primitive: str, why: str) -> list[Any]:
    """What leaves a body that must give arrays: permitted weights are made dense, others refused."""
    weights = [x for x in out if is_weight(x) and not densify.issuperset(x.paths)]
    if weights:
        raise RefusedError([path for w in weights for path in w.paths], primitive, "", why)
    return [x.dense() if is_weight(x) else x for x in out]


def _map_weights(fn: Callable[[LoraWeight], LoraWeight], tree: Any) -> Any:
    return jax.tree.map(lambda x: fn(x) if is_weight(x) else x, tree, is_leaf=is_weight)


# jit


@register(p.jit_p)
def jit(context: Context, *operands: Any, jaxpr: Any, **params: Any) -> list[Any]:
    """The body is interpreted under a jit of the same name, shardings and options."""
    ins = tuple(_sharding(s) for s in params["in_shardings"])
    ins = tuple(None if is_weight(x) else s for x, s in zip(operands, ins, strict=True))
    outs = tuple(_sharding(s) for s in params["out_shardings"])
    options = tuple(params.get("compiler_options_kvs") or ())
    statics = (jaxpr, params["name"], params["inline"], params["keep_unused"], ins, outs, options)
    return kept(_jitted, context, list(operands), *statics, key=context.key)


def _sharding(sharding: Any) -> Any:
    return sharding if isinstance(sharding, jax.sharding.Sharding) else None


def _jitted(
    densify: Any, jaxpr: Any, name: str, inline: Any, keep_unused: bool, ins: Any, outs: Any, options: Any
) -> Any:
    def body(operands: Any, key: Any) -> Any:
        # The shardings are constraints on values, which hold for a LoraWeight's base only at its own.
        operands = [_constrain(x, s) for x, s in zip(operands, ins, strict=True)]
        values = _run(jaxpr, operands, key, densify)
        return [x if is_weight(x) else _constrain(x, s) for x, s in zip(values, outs, strict=True)]

    body.__name__ = body.__qualname__ = name
    return jax.jit(
        body, inline=inline, keep_unused=keep_unused, compiler_options=dict(options) if options else None
    )


def _constrain(x: Any, sharding: Any) -> Any:
    return x if sharding is None else lax.with_sharding_constraint(x, sharding)


@register(p.closed_call_p)
def closed_call(context: Context, *operands: Any, call_jaxpr: Any, **params: Any) -> list[Any]:
    """The body is interpreted in place."""
    return _run(call_jaxpr, operands, context.key, context.densify)


# remat


@register(p.remat_p)
def remat(
    context: Context, *operands: Any, jaxpr: Any, policy: Any, prevent_cse: Any, differentiated: bool
) -> list[Any]:
    """The body is interpreted under `jax.checkpoint` with the same policy, but for the branch's dots."""
    return kept(_rematted, context, list(operands), jaxpr, policy, prevent_cse, key=context.key)


def _rematted(densify: Any, jaxpr: Any, policy: Any, prevent_cse: Any) -> Any:
    def body(operands: Any, key: Any) -> Any:
        return _run(jaxpr, operands, key, densify)

    kept_policy = None if policy is None else _Policy(policy, frozenset(_products(jaxpr)))
    checkpointed = jax.checkpoint(body, policy=kept_policy, prevent_cse=prevent_cse)
    return jax.jit(checkpointed, inline=True)


class _Policy:
    """A remat policy that never saves a product the model did not write.

    A policy such as dots_saveable says of every dot that its result be kept. It would keep the
    branch's too, of the size of the base's, and double the residuals.
    """

    def __init__(self, policy: Any, products: frozenset[Any]):
        self.policy, self.products = policy, products

    def __call__(self, primitive: Any, *avals: Any, **params: Any) -> Any:
        if primitive in _PRODUCTS and _signature(primitive, avals, params) not in self.products:
            return False
        return self.policy(primitive, *avals, **params)


_PRODUCTS = {p.dot_general_p: "dimension_numbers", p.conv_general_dilated_p: "dimension_numbers"}


def _signature(primitive: Any, avals: Sequence[Any], params: dict[str, Any]) -> Any:
    return primitive, tuple((x.shape, x.dtype) for x in avals), params[_PRODUCTS[primitive]]


def _products(jaxpr: Any) -> list[Any]:
    """The signatures of the products in a jaxpr and in those it holds."""
    found = []
    for eqn in Closed(jaxpr).jaxpr.eqns:
        if eqn.primitive in _PRODUCTS:
            found.append(_signature(eqn.primitive, [v.aval for v in eqn.invars], eqn.params))
        for param in eqn.params.values():
            for inner in param if isinstance(param, (tuple, list)) else (param,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    found += _products(inner)
    return found


# shard_map


@register("shard_map")
def shard_map(
    context: Context,
    *operands: Any,
    jaxpr: Any,
    mesh: Any,
    in_specs: Any,
    out_specs: Any,
    check_vma: bool,
    **params: Any,
) -> list[Any]:
    """Each shard runs with its part of the weight: a is split along in axes as w is, b along out axes."""
    manual = params["newly_manual_axes"]
    statics = (jaxpr, mesh, tuple(in_specs), tuple(out_specs), check_vma, frozenset(manual))
    return kept(_sharded, context, list(operands), *statics, key=context.key)


def _sharded(
    densify: Any, jaxpr: Any, mesh: Any, in_specs: Any, out_specs: Any, check_vma: bool, manual: Any
) -> Any:
    def body(operands: Any, key: Any) -> list[Any]:
        if key is not None and not check_vma:  # else the mask varies where its input does
            for name in sorted(manual):
                key = jax.random.fold_in(key, lax.axis_index(name))
        out = _run(jaxpr, operands, key, densify)
        return arrays_only(out, densify, "shard_map", "a shard returns the weight itself")

    def run(operands: Any, key: Any) -> list[Any]:
        specs = [_specs_of(x, spec) for x, spec in zip(operands, in_specs, strict=True)]
        if AxisType.Explicit in mesh.axis_types:  # where the operands' types have to say the same
            operands = jax.tree.map(lambda x, spec: jax.sharding.reshard(x, spec), operands, specs)
        mapped = jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(specs, PartitionSpec()),
            out_specs=list(out_specs),
            axis_names=manual,
            check_vma=check_vma,
        )
        return mapped(operands, key)

    return jax.jit(run, inline=True)


def _specs_of(x: Any, spec: Any) -> Any:
    """The spec of an operand; of a LoraWeight those of its parts, derived from that of its base."""
    if not is_weight(x):
        return spec
    parts = (*spec, *(None for _ in range(x.ndim - len(spec))))
    batch, inner, outer = ([parts[i] for i in x.axes_of(kind)] for kind in ("batch", "in", "out"))
    return x.replace(
        w=spec,
        a=PartitionSpec(*batch, *inner, None),
        b=PartitionSpec(*batch, None, *outer),
        scale=PartitionSpec(*batch),
    )


# Loops and branches


def scan_parts(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's operands are constants and how many are carries."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def _widened(carry: Sequence[Any]) -> list[Any]:
    """The carry with every weight's factors and scale in the dtype that a step may make them of."""

    def widen(weight: LoraWeight) -> LoraWeight:
        parts = {"a": weight.a, "b": weight.b, "scale": weight.scale}
        dtype = wide_dtype(weight.w.dtype, *(x.dtype for x in parts.values()))
        return weight.replace(**{name: lax.convert_element_type(x, dtype) for name, x in parts.items()})

    return [widen(x) if is_weight(x) else x for x in carry]


def _form(carry: Sequence[Any]) -> Any:
    leaves, structure = jax.tree.flatten([x for x in carry if is_weight(x)])
    return jax.tree.structure(carry), structure, [(x.shape, x.dtype) for x in leaves]


def _check_carry(primitive: str, form: Any, new: Sequence[Any], old: Sequence[Any]) -> None:
    if _form(new) != form:
        weights = [w for w in (*new, *old) if is_weight(w)]
        why = "the carry is a weight on one side of a step and not the same, with the same rank, on the other"
        raise RefusedError([path for w in weights for path in w.paths], primitive, "", why)


@register(p.scan_p)
def scan(
    context: Context, *operands: Any, jaxpr: Any, length: int, reverse: bool, unroll: Any, **params: Any
) -> Any:
    """The body sees a weight without its first axis, which must be a batch axis; ys put it back."""
    n_consts, n_carry = scan_parts(params)
    consts = list(operands[:n_consts])
    carry = list(operands[n_consts : n_consts + n_carry])
    xs = list(operands[n_consts + n_carry :])
    for x in xs:
        if is_weight(x) and x.axes[0] != "batch":
            raise context.refuse(
                [x],
                f"the scan runs over axis 0 of shape {x.w.shape}, which is an {x.axes[0]!r} axis and not a "
                f"'batch' axis; if it stacks layers, say so in wrap(..., axes=...)",
            )
    keys = None
    if context.key is not None:
        keys = jax.random.split(context.key, length)
    statics = (jaxpr, length, reverse, unroll)
    carry, ys = kept(_scanned, context, (consts, carry, xs), *statics, key=keys)
    return [*carry, *ys]


def _scanned(densify: Any, jaxpr: Any, length: int, reverse: bool, unroll: Any) -> Any:
    def run(operands: Any, keys: Any) -> Any:
        consts, carry, xs = operands
        carry = _widened(carry)
        form = _form(carry)

        def step(carry: Any, x: Any) -> Any:
            x, key = x
            x = _map_weights(lambda weight: weight.replace(axes=weight.axes[1:]), x)
            out = _run(jaxpr, [*consts, *carry, *x], key, densify)
            new_carry, ys = _widened(out[: len(carry)]), out[len(carry) :]
            _check_carry("scan", form, new_carry, carry)
            return new_carry, _map_weights(lambda weight: weight.replace(axes=("batch", *weight.axes)), ys)

        return lax.scan(step, carry, (xs, keys), length=length, reverse=reverse, unroll=unroll)

    return jax.jit(run, inline=True)


@register(p.while_p)
def while_(
    context: Context, *operands: Any, cond_nconsts: int, cond_jaxpr: Any, body_nconsts: int, body_jaxpr: Any
) -> list[Any]:
    """Weights may be constants of the body; as a carry they must pass unchanged in kind."""
    cond_consts = list(operands[:cond_nconsts])
    body_consts = list(operands[cond_nconsts : cond_nconsts + body_nconsts])
    carry = list(operands[cond_nconsts + body_nconsts :])
    return kept(_looped, context, (cond_consts, body_consts, carry), cond_jaxpr, body_jaxpr, key=context.key)


def _looped(densify: Any, cond_jaxpr: Any, body_jaxpr: Any) -> Any:
    def run(operands: Any, key: Any) -> Any:
        cond_consts, body_consts, carry = operands
        carry = _widened(carry)
        form = _form(carry)

        def cond(state: Any) -> Any:
            _, values = state
            (go,) = _run(cond_jaxpr, [*cond_consts, *values], None, densify)
            return go

        def body(state: Any) -> Any:
            count, values = state
            step_key = None if key is None else jax.random.fold_in(key, count)
            out = _widened(_run(body_jaxpr, [*body_consts, *values], step_key, densify))
            _check_carry("while", form, out, values)
            return count if key is None else lax.add(count, jnp.ones_like(count)), out

        start = None if key is None else jnp.zeros((), jnp.int32)
        return lax.while_loop(cond, body, (start, carry))[1]

    return jax.jit(run, inline=True)


@register(p.cond_p)
def cond(context: Context, index: Any, *operands: Any, branches: Sequence[Any], **params: Any) -> list[Any]:
    """Every branch is interpreted; none may return a weight."""
    return kept(_switched, context, (index, list(operands)), tuple(branches), key=context.key)


def _switched(densify: Any, branches: Sequence[Any]) -> Any:
    def run(operands: Any, key: Any) -> Any:
        index, values = operands

        def branch(jaxpr: Any, values: Any, key: Any) -> list[Any]:
            out = _run(jaxpr, values, key, densify)
            return arrays_only(out, densify, "cond", "a branch returns the weight itself")

        return lax.switch(index, [functools.partial(branch, jaxpr) for jaxpr in branches], values, key)

    return jax.jit(run, inline=True)
