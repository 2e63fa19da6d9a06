"""NNX graph nodes among the leaves of a tree: taken apart into states and put together again.

A bare tree map over an `nnx.Module` visits a shared Variable twice and loses what a call mutates,
so modules always go through `nnx.split` and `nnx.merge`. flax.nnx is imported by whoever made the
module; this file only finds it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal
from jax.extend.core import primitives as p

from lora_jax.tree import leaves_with_path


def is_graph_node(node: Any) -> bool:
    """Whether a node of a tree is an NNX graph node: a Module, an Rngs, an Optimizer, a Variable."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, (nnx.Pytree, nnx.Variable))


def is_module(node: Any) -> bool:
    """Whether a tree, or a node of it, is an NNX module or another graph node that holds Variables."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Pytree)


def is_split(tree: Any) -> bool:
    """Whether a tree is what `split` gives: a graphdef and a state."""
    nnx = sys.modules.get("flax.nnx")
    pair = isinstance(tree, tuple) and len(tree) == 2
    return pair and nnx is not None and isinstance(tree[0], nnx.GraphDef)


def opened(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A tree whose leaves are each there once, and the function that closes it again.

    Raises:
        TypeError: a module stands inside another container.
    """
    if is_module(tree):
        graphdef, state = split(tree)
        return state, lambda new: merge(graphdef, new)
    for path, node in leaves_with_path(tree, is_leaf=is_module):
        if is_module(node):
            raise TypeError(
                f"an nnx.{type(node).__name__} stands inside another container, at {path!r}. Give the "
                "module itself, or nnx.state(module): a tree map would untie its shared Variables."
            )
    return tree, lambda new: new


def apart(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A pytree with the graph nodes' joint state beside it, and the function that makes the tree anew.

    The nodes it makes are new ones, so what a call mutates on them the tree's own do not see.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_graph_node)
    nodes = tuple(leaf for leaf in leaves if is_graph_node(leaf))
    if not nodes:
        return tree, lambda new: new
    is_node = [is_graph_node(leaf) for leaf in leaves]
    graphdef, state = split(nodes)
    held = [None if yes else leaf for leaf, yes in zip(leaves, is_node, strict=True)]

    def together(new: Any) -> Any:
        values, new_state = new
        fresh = iter(merge(graphdef, new_state))
        return treedef.unflatten([next(fresh) if yes else x for x, yes in zip(values, is_node, strict=True)])

    return (held, state), together


def is_other_variable(node: Any) -> bool:
    """Whether a node of a tree is an NNX Variable that is no parameter: a statistic, a cache, a key."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Variable) and not isinstance(node, nnx.Param)


def split(nodes: Any) -> tuple[Any, Any]:
    """`nnx.split` of a module, or of several graph nodes at once, so that what they share is one leaf."""
    return sys.modules["flax.nnx"].split(nodes)


def merge(graphdef: Any, state: Any) -> Any:
    """The graph nodes anew, from what `split` gave."""
    return sys.modules["flax.nnx"].merge(graphdef, state)


def update(nodes: tuple[Any, ...], state: Any) -> None:
    """Write a state's values into existing graph nodes, in place."""
    sys.modules["flax.nnx"].update(nodes, state)


def unchanged(jaxpr: Any, outvar: Any, invar: Any) -> bool:
    """Whether an output of a jaxpr is one of its inputs, at most moved along its axes and back.

    `nnx.scan` hands back what it scans over, and moves the layers' axis to the front and back for it.
    """
    return _followed(jaxpr, outvar) == (invar, tuple(range(outvar.aval.ndim)))


def _followed(jaxpr: Any, var: Any) -> tuple[Any, tuple[int, ...]] | None:
    """The input that a variable is a transposition of, and the order of its axes."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    made = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}
    if isinstance(var, Literal):
        return None
    order = tuple(range(var.aval.ndim))
    while var in made:
        eqn = made[var]
        inner = eqn.params.get("jaxpr")
        if eqn.primitive is p.transpose_p:
            var, step = eqn.invars[0], tuple(eqn.params["permutation"])
        elif eqn.primitive in (p.jit_p, p.scan_p):
            inner = getattr(inner, "jaxpr", inner)
            found = _followed(inner, inner.outvars[eqn.outvars.index(var)])
            if found is None:
                return None
            outer = eqn.invars[inner.invars.index(found[0])]
            step = found[1]
            if eqn.primitive is p.scan_p:  # only what is scanned over and stacked again
                if outer.aval.ndim != found[0].aval.ndim + 1 or var.aval.ndim != len(step) + 1:
                    return None
                step = (0, *(i + 1 for i in step))
            var = outer
        else:
            return None
        order = tuple(step[i] for i in order)
    return (var, order) if var in jaxpr.invars else None
