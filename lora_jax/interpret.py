"""`lora(fn)`: run a function with low-rank weights, its own code untouched.

The function is traced with the base's values where LoraWeights stand, and its jaxpr is evaluated
equation by equation with the LoraWeights in their place. An equation none of them reaches is bound
as it is; one that they reach is handed to its primitive's rule, which binds the base equation as
the model wrote it and adds the low-rank branch, or passes on a LoraWeight. The rules live in
`lora_jax.rules`; this file knows no primitive.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import JaxprEqn, Literal, Primitive

from lora_jax import nnx
from lora_jax.tree import Pattern, literal, matches, nearest
from lora_jax.weight import FullWeight, LoraWeight, check_whole, is_wrapped_leaf, parted, sizes

P = ParamSpec("P")
R = TypeVar("R")


class RefusedError(NotImplementedError):
    """What the model does with a weight has no low-rank form here.

    Args:
        paths: The paths of the weights the equation met.
        primitive: The name of the primitive.
        where: The line of the model's source.
        why: What stands in the way.
    """

    def __init__(self, paths: Sequence[str], primitive: str, where: str, why: str):
        self.paths = tuple(dict.fromkeys(paths))
        self.primitive, self.where, self.why = primitive, where, why
        named = ", ".join(repr(path) for path in self.paths)
        at = f" at {where}" if where else ""
        pattern = "|".join(map(literal, self.paths))
        # Where the primitive has a rule, or a weight leaves the function itself, there is none to register.
        ruled = primitive == "return" or any(getattr(known, "name", known) == primitive for known in _RULES)
        first = (
            f"leave the weight out of what is adapted, wrap(..., exclude={pattern!r})"
            if ruled
            else "register a rule for it with @lora_jax.register"
        )
        super().__init__(
            f"{named}: `{primitive}`{at} has no low-rank form: {why}. To go on, {first}, or permit the dense "
            f"weight by name: lora_jax.lora(fn, densify={pattern!r})."
        )

    def located(self, names: dict[str, str], where: str) -> RefusedError:
        """The same error with its paths replaced, and a place if it has none yet."""
        paths = [part for path in self.paths for part in parted(names.get(path, path))]
        return RefusedError(paths, self.primitive, self.where or where, self.why)


class Context(NamedTuple):
    """What a rule is told beside its operands.

    Attributes:
        key: This equation's dropout key, or None where nothing is dropped.
        densify: The paths of the weights that may become dense.
        eqn: The equation, for its avals and its source line.
        jaxpr: The jaxpr that the equation stands in.
    """

    key: jax.Array | None
    densify: frozenset[str]
    eqn: JaxprEqn
    jaxpr: Any

    def refuse(self, weights: Sequence[Any], why: str) -> RefusedError:
        """The error to raise: it names the weights' paths, the primitive and the model's line."""
        paths = [path for w in weights if isinstance(w, LoraWeight) for path in w.paths]
        return RefusedError(paths, self.eqn.primitive.name, self.where, why)

    @property
    def where(self) -> str:
        """The line of the model's source; empty for an equation that a library function wrote."""
        return source_info_util.summarize(self.eqn.source_info)


Rule = Callable[..., Any]
_RULES: dict[Primitive | str, Rule] = {}


def register(*primitives: Primitive | str) -> Callable[[Rule], Rule]:
    """Register a rule: what a primitive does when a LoraWeight is among its operands.

    The rule is called as `rule(context, *operands, **params)` with the equation's operands, of which
    at least one is a `LoraWeight`, and its params. It returns the equation's outputs: arrays, or
    LoraWeights that flow on; a list of them where the primitive has several results. To refuse, it
    raises `context.refuse(operands, why)`.

    Args:
        *primitives: The primitives, from `jax.extend.core.primitives` or your own; or the name of one
            that jax does not export.

    Raises:
        ValueError: a rule for one of the primitives is registered already.
        TypeError: no primitive is given, or what is given is none.

    >>> from jax.extend.core import primitives
    >>> @register(primitives.dot_general_p)
    ... def rule(context, lhs, rhs, **params): ...
    Traceback (most recent call last):
        ...
    ValueError: dot_general has a rule already; a primitive has one rule.
    """
    if not primitives or not all(isinstance(one, Primitive | str) for one in primitives):
        raise TypeError(
            f"register{primitives}: write @lora_jax.register(primitive), with a primitive such as "
            "jax.extend.core.primitives.cumsum_p, or its name."
        )

    def decorate(rule: Rule) -> Rule:
        if not callable(rule):
            raise TypeError(f"a rule is a function of context, operands and params, and not {rule!r}.")
        for primitive in primitives:
            name = getattr(primitive, "name", primitive)
            if primitive in _RULES or name in _RULES:
                raise ValueError(f"{name} has a rule already; a primitive has one rule.")
        for primitive in primitives:
            _RULES[primitive] = rule
        return rule

    return decorate


def lora(
    fn: Callable[P, R], *, key: jax.Array | None = None, densify: Pattern | None = None
) -> Callable[P, R]:
    r"""The same function with low-rank weights: every use of a leaf sees :math:`W + s\,A B`.

    `lora(fn)` has fn's signature. LoraWeights may stand anywhere in its arguments, and nnx and
    Equinox modules may hold them. `lora(fn)(wrapped, ...)` equals `fn(merge(wrapped), ...)` in value,
    gradient, structure, shape, dtype and weak type, but the update is never formed: each
    `x @ W` becomes `x @ W + s (x @ A) @ B`, in float32 or wider, rounded once to the base's dtype.
    It composes with jit, grad, vmap, scan, remat and shardings, inside and outside of fn.

    Arrays, jax's and numpy's, and LoraWeights are traced, as under `jax.jit`. Every other leaf (numbers,
    strings, functions) reaches fn as it is, and outputs that are no jax arrays come back as they are.
    What fn mutates on an nnx module that it was given is written back to the module.

    Args:
        fn: A pure function, as for `jax.jit`; also a module or a bound method of one.
        key: A dropout key. With it, the branch's input is dropped at each weight's rate, with a
            different mask for every equation and every step of a scan; without it nothing is.
        densify: A pattern of paths, or a predicate, whose weights may become dense where an
            operation has no low-rank form. Such an operation is refused otherwise.

    Returns:
        A function with fn's signature.

    Raises:
        RefusedError: an operation on a weight has no low-rank form. The message names the path,
            the primitive, the line of the model and the two ways on.
        ValueError: a tree with holes (one half of `partition`) or a densify pattern that matches
            nothing.
        TypeError: key is no random key, or densify no pattern.

    The parametrisation is LoRA's (arXiv:2106.09685), section 4.1.

    >>> weight = LoraWeight(jnp.eye(3), jnp.ones((3, 1)), jnp.ones((1, 3)), scale=0.5)
    >>> def model(params, x):
    ...     return x @ params["kernel"]
    >>> lora(model)({"kernel": weight}, jnp.array([1.0, 2.0, 3.0])).tolist()
    [4.0, 5.0, 6.0]
    """
    if key is not None and not isinstance(key, jax.Array):
        raise TypeError(f"key is {key!r}; write lora_jax.lora(fn, key=jax.random.key(0)).")
    if densify is not None and not (isinstance(densify, str) or callable(densify)):
        raise TypeError(
            f"densify is {densify!r}; write a pattern of the paths that may become dense, such as "
            "densify='head', or a function of path and leaf."
        )

    def with_lora(*args: P.args, **kwargs: P.kwargs) -> R:
        return _call(fn, args, kwargs, key, densify)

    if hasattr(fn, "__qualname__"):
        with_lora = functools.wraps(fn)(with_lora)
    return with_lora


def _is_leaf(node: Any) -> bool:
    return is_wrapped_leaf(node) or nnx.is_graph_node(node)


def _call(fn: Any, args: Any, kwargs: Any, key: Any, densify: Pattern | None) -> Any:
    bound = getattr(fn, "__self__", None)
    if nnx.is_graph_node(bound):
        fn, args = fn.__func__, (bound, *args)
    leaves, treedef = jax.tree.flatten((fn, args, kwargs), is_leaf=_is_leaf)
    is_node = [nnx.is_graph_node(leaf) for leaf in leaves]
    nodes = tuple(leaf for leaf, yes in zip(leaves, is_node, strict=True) if yes)
    graphdef, state = nnx.split(nodes) if nodes else (None, ())
    leaves = [None if yes else leaf for leaf, yes in zip(leaves, is_node, strict=True)]
    state_leaves, state_def = jax.tree.flatten(state, is_leaf=is_wrapped_leaf)
    everything = [_operand(leaf) for leaf in (*leaves, *state_leaves)]
    traced = [i for i, leaf in enumerate(everything) if isinstance(leaf, (jax.Array, LoraWeight))]
    operands = [everything[i] for i in traced]
    rejoin = _Rejoin()

    # A new function each time: the cache of make_jaxpr goes by the function and would serve what an
    # earlier call closed over.
    def flat(*values: Any) -> list[Any]:
        full = list(everything)
        for i, value in zip(traced, values, strict=True):
            full[i] = value
        inner_leaves, inner_state_leaves = full[: len(leaves)], full[len(leaves) :]
        inner_nodes = nnx.merge(graphdef, state_def.unflatten(inner_state_leaves)) if nodes else ()
        remaining = iter(inner_nodes)
        inner_leaves = [
            next(remaining) if yes else leaf for leaf, yes in zip(inner_leaves, is_node, strict=True)
        ]
        inner_fn, inner_args, inner_kwargs = treedef.unflatten(inner_leaves)
        out = inner_fn(*inner_args, **inner_kwargs)
        return rejoin.take_apart(out, inner_nodes, graphdef, inner_state_leaves, state)

    bases = [leaf.w if isinstance(leaf, LoraWeight) else leaf for leaf in operands]
    closed = jax.make_jaxpr(flat)(*bases)
    invars = dict(zip(traced, closed.jaxpr.invars, strict=True))
    rejoin.check_unchanged(closed.jaxpr, [invars.get(len(leaves) + i) for i in range(len(state_leaves))])
    weights = [leaf for leaf in operands if isinstance(leaf, LoraWeight)]
    permitted = _permitted(densify, weights)
    if not any(weight.dropout for weight in weights):
        key = None
    values = evaluate(closed, operands, key, permitted)
    values = values[: len(values) - len(rejoin.moved)]
    return rejoin.put_together(
        [_output(value, permitted) for value in values], nodes, state_def, state_leaves
    )


def _operand(leaf: Any) -> Any:
    if isinstance(leaf, LoraWeight):
        check_whole(leaf)
        w = leaf.w if isinstance(leaf.w, jax.Array) else jnp.asarray(leaf.w)
        return leaf.replace(w=w, b=leaf.live_b, blocks=())
    if isinstance(leaf, FullWeight):
        if leaf.value is None:
            raise ValueError(
                f"the FullWeight at {leaf.path!r} has a hole: this tree is one half of partition(). "
                "Write lora_jax.lora(fn)(lora_jax.combine(trainable, frozen), ...)."
            )
        return leaf.dense()
    if isinstance(leaf, np.ndarray) and (leaf.dtype == bool or jnp.issubdtype(leaf.dtype, np.number)):
        return jnp.asarray(leaf)
    return leaf


def _permitted(densify: Pattern | None, weights: Sequence[LoraWeight]) -> frozenset[str]:
    if densify is None:
        return frozenset()
    paths = [weight.path for weight in weights]
    found = frozenset(
        path for weight, path in zip(weights, paths, strict=True) if matches(densify, path, weight)
    )
    if not found:
        near = ", ".join(nearest(densify, paths)) if isinstance(densify, str) else ", ".join(paths[:5])
        raise ValueError(f"densify={densify!r} matches none of the wrapped paths; the nearest are: {near}.")
    return found


def _output(value: Any, permitted: frozenset[str]) -> Any:
    if not isinstance(value, LoraWeight):
        return value
    if permitted.issuperset(value.paths):
        return value.dense()
    raise RefusedError(value.paths, "return", "the function's end", "the function returns the weight itself")


@dataclasses.dataclass
class _Rejoin:
    """The outputs of fn that are arrays travel through the jaxpr; this keeps the rest."""

    treedef: Any = None
    statics: Any = None
    changed: Any = None
    moved: Any = ()

    def take_apart(self, out: Any, inner_nodes: Any, graphdef: Any, before: Any, state: Any) -> list[Any]:
        out_nodes = [leaf for leaf in jax.tree.leaves(out, is_leaf=_is_leaf) if nnx.is_graph_node(leaf)]
        if out_nodes:
            raise TypeError(
                f"the function returns an nnx {type(out_nodes[0]).__name__}. What it mutates on its "
                "arguments is written back; return arrays, or nnx.split the module and return its state."
            )
        leaves, self.treedef = jax.tree.flatten(out, is_leaf=is_wrapped_leaf)
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        self.statics = [None if isinstance(leaf, jax.Array) else (leaf,) for leaf in leaves]
        self.changed, self.moved = [], []
        if not inner_nodes:
            return arrays
        after_def, after_state = nnx.split(inner_nodes)
        after = jax.tree.leaves(after_state)
        if after_def != graphdef or len(after) != len(before):
            raise ValueError(
                "the function changed the structure of an nnx module that it was given: a Variable or a "
                "submodule was added, removed, replaced or shared anew. Make it before wrapping; "
                "only values may change inside lora."
            )
        held, moved = jax.tree.leaves(state, is_leaf=is_wrapped_leaf), []
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            if new is old:
                continue
            if is_wrapped_leaf(held[i]):
                self.moved.append((i, held[i].path))
                moved.append(jnp.asarray(new))
                continue
            self.changed.append(i)
            arrays.append(jnp.asarray(new))
        return [*arrays, *moved]

    def check_unchanged(self, jaxpr: Any, invars: Sequence[Any]) -> None:
        """Raise where a wrapped leaf was assigned anything but itself, which are the last outputs."""
        outvars = jaxpr.outvars[len(jaxpr.outvars) - len(self.moved) :]
        for outvar, (i, path) in zip(outvars, self.moved, strict=True):
            if not nnx.unchanged(jaxpr, outvar, invars[i]):
                raise ValueError(
                    f"the function mutates {path!r}, which is wrapped. Exclude it from wrap "
                    f"(exclude={path!r}), or do not assign to it inside lora."
                )

    def put_together(self, values: list[Any], nodes: Any, state_def: Any, state_leaves: list[Any]) -> Any:
        count = len(values) - len(self.changed)
        if self.changed:
            new_leaves = list(state_leaves)
            for i, value in zip(self.changed, values[count:], strict=True):
                new_leaves[i] = value
            nnx.update(nodes, state_def.unflatten(new_leaves))
        remaining = iter(values[:count])
        return self.treedef.unflatten(
            [next(remaining) if static is None else static[0] for static in self.statics]
        )


def evaluate(
    closed: Any, operands: Sequence[Any], key: jax.Array | None, densify: frozenset[str]
) -> list[Any]:
    """Evaluate a closed jaxpr on arrays and LoraWeights.

    Args:
        closed: The jaxpr, with its constants.
        operands: Its inputs; LoraWeights may stand for arrays of their base's shape and dtype.
        key: A dropout key, or None.
        densify: The paths of the weights that may become dense.

    Returns:
        Its outputs: arrays, and LoraWeights where a weight flows out.
    """
    jaxpr = closed.jaxpr
    env: dict[Any, Any] = {}
    env.update(zip(jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(jaxpr.invars, operands, strict=True))
    dead_after = _last_uses(jaxpr)
    for index, eqn in enumerate(jaxpr.eqns):
        values = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
        with (
            source_info_util.user_context(eqn.source_info.traceback, name_stack=name_stack),
            eqn.ctx.manager,
        ):
            if any(isinstance(value, LoraWeight) for value in values):
                outs = _apply(jaxpr, index, values, key, densify)
            else:
                outs = bind(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
        for var in dead_after[index]:
            del env[var]
    return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]


def _last_uses(jaxpr: Any) -> list[list[Any]]:
    """For each equation the variables that nothing after it reads, so that eager memory is freed."""
    seen = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    last: list[list[Any]] = []
    for eqn in reversed(jaxpr.eqns):
        here = {v for v in (*eqn.invars, *eqn.outvars) if not isinstance(v, Literal)} - seen
        seen |= here
        last.append(list(here))
    return last[::-1]


def bind(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The equation as it stands, on other operands; its outputs as a list."""
    params = eqn.primitive.get_bind_params(eqn.params)
    outs = eqn.primitive.bind(*values, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def _settled(out: Any) -> Any:
    """A row or a column of a weight, which has no in or no out axis left, is an array like another."""
    if isinstance(out, LoraWeight) and not {"in", "out"} <= set(out.axes):
        return out.dense()
    return out


def _check_outputs(context: Context, outs: Sequence[Any]) -> None:
    """Raise where a rule gives anything but the equation's outputs; it may be a user's own."""
    avals: list[Any] = [v.aval for v in context.eqn.outvars]
    expected = [(aval.shape, aval.dtype) for aval in avals]
    given = [(getattr(x, "shape", None), getattr(x, "dtype", None)) for x in outs]
    wrong = ""
    for out in outs:
        if isinstance(out, LoraWeight) and (why := _misshapen(out)):
            wrong = f"{out}: {why}."
    if given != expected:
        wrong = (
            f"{_shown(given)}, and the equation's outputs are {_shown(expected)}. Return them, as arrays or "
            "as LoraWeights whose w they are."
        )
    if wrong:
        where = f" at {context.where}" if context.where else ""
        raise TypeError(f"the rule for `{context.eqn.primitive.name}`{where} returned {wrong}")


def _misshapen(weight: LoraWeight) -> str:
    """What is wrong with the shapes of a LoraWeight that a rule made, if anything."""
    if len(weight.axes) != len(weight.w.shape):
        return f"w has {len(weight.w.shape)} axes and axes name {len(weight.axes)}"
    batch, inner, outer = sizes(weight.w.shape, weight.axes)
    shapes = [getattr(x, "shape", None) for x in (weight.a, weight.b, weight.scale)]
    rank = shapes[0][-1] if shapes[0] else 0
    expected = [(*batch, *inner, rank), (*batch, rank, *outer), batch]
    if shapes != expected:
        return f"the shapes of a, b and scale have to be {', '.join(map(str, expected))}"
    return ""


def _shown(types: Sequence[tuple[Any, Any]]) -> str:
    return ", ".join("no array" if shape is None else f"{dtype}{list(shape)}" for shape, dtype in types)


def _apply(jaxpr: Any, index: int, values: list[Any], key: Any, densify: frozenset[str]) -> list[Any]:
    eqn = jaxpr.eqns[index]
    context = Context(None if key is None else jax.random.fold_in(key, index), densify, eqn, jaxpr)
    rule = _RULES.get(eqn.primitive) or _RULES.get(eqn.primitive.name)
    try:
        if rule is None:
            raise context.refuse(values, "no rule is registered for this primitive")
        outs = rule(context, *values, **eqn.params)
        several = eqn.primitive.multiple_results and isinstance(outs, list | tuple)
        outs = list(outs) if several else [outs]
        _check_outputs(context, outs)
        return [_settled(out) for out in outs]
    except RefusedError as error:
        if not densify.issuperset(error.paths):
            raise
        named = set(error.paths)
        dense = [v.dense() if isinstance(v, LoraWeight) and named.issuperset(v.paths) else v for v in values]
        if any(isinstance(value, LoraWeight) for value in dense):
            return _apply(jaxpr, index, dense, key, densify)
        return bind(eqn, dense)
