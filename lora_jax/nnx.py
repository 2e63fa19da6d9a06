"""NNX graph nodes among the leaves of a tree: taken apart into states and put together again.

A bare tree map over an `nnx.Module` visits a shared Variable twice and loses what a call mutates,
so modules always go through `nnx.split` and `nnx.merge`. flax.nnx is imported by whoever made the
module; this file only finds it.
"""

from __future__ import annotations

import sys
from typing import Any


def is_graph_node(node: Any) -> bool:
    """Whether a node of a tree is an NNX graph node: a Module, an Rngs, an Optimizer, a Variable."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, (nnx.Pytree, nnx.Variable))


def split(nodes: tuple[Any, ...]) -> tuple[Any, Any]:
    """`nnx.split` of several graph nodes at once, so that what they share is one leaf."""
    return sys.modules["flax.nnx"].split(nodes)


def merge(graphdef: Any, state: Any) -> tuple[Any, ...]:
    """The graph nodes anew, from what `split` gave."""
    return sys.modules["flax.nnx"].merge(graphdef, state)


def update(nodes: tuple[Any, ...], state: Any) -> None:
    """Write a state's values into existing graph nodes, in place."""
    sys.modules["flax.nnx"].update(nodes, state)
