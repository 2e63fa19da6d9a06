"""Law 3: no value made from parameters alone, an a or b among them, has its target's size.

Checked by provenance. A dense update depends on factors and on no input of the function, so every
value of the jaxpr is followed to the inputs it depends on.
"""

import math

import jax
import jax.numpy as jnp
import pytest
from cases import CASES
from jax.extend.core import Literal

import lora_jax
from lora_jax.rules.control import scan_parts
from lora_jax.weight import LoraWeight, is_wrapped_leaf

DATA = "data"


def merge_marks(marks):
    """Provenance: {weight index or DATA: the size that a value of it must stay under}."""
    out = {}
    for mark in marks:
        for k, size in mark.items():
            out[k] = min(size, out.get(k, math.inf))
    return out


def inner_jaxprs(eqn):
    for value in eqn.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one


def carried(eqn):
    """Where a loop's carry begins among its body's inputs, and how long it is."""
    if eqn.primitive.name == "scan":
        return scan_parts(eqn.params)
    if eqn.primitive.name == "while":
        return eqn.params["body_nconsts"], len(eqn.outvars)
    return 0, 0


def check(jaxpr, marks, found):
    """Follow the marks through a jaxpr, note the values that are too large, give the outputs' marks."""
    env = dict(zip(jaxpr.invars, marks, strict=True))

    def read(v):
        return {} if isinstance(v, Literal) else env.get(v, {})

    for eqn in jaxpr.eqns:
        ins = [read(v) for v in eqn.invars]
        union, results = merge_marks(ins), []
        for inner in inner_jaxprs(eqn):
            if eqn.primitive.name == "while" and inner is not eqn.params["body_jaxpr"].jaxpr:
                continue
            n = len(inner.invars)
            inner_marks = [dict(m) for m in ins[len(ins) - n :]] if n <= len(ins) else [union] * n
            for mark, outer, var in zip(inner_marks, eqn.invars[len(ins) - n :], inner.invars, strict=False):
                share = math.prod(outer.aval.shape) // max(1, math.prod(var.aval.shape))
                for k in mark:
                    mark[k] = mark[k] / max(1, share)
            outs = []
            for _ in range(2):  # once more with what the carries have picked up
                outs = check(inner, inner_marks, found)
                start, count = carried(eqn)
                for i in range(count):
                    inner_marks[start + i] = merge_marks([inner_marks[start + i], outs[i]])
            results.append(outs)
        for i, v in enumerate(eqn.outvars):
            # What comes out of an inner jaxpr depends on what its own output does.
            keys = {k for outs in results for k in outs[i]} if results else union.keys()
            env[v] = mark = {k: union.get(k, math.inf) for k in keys}
            if DATA not in mark and any(math.prod(v.aval.shape) >= size for size in mark.values()):
                found.append((eqn.primitive.name, v.aval.shape, mark))
    return [read(v) for v in jaxpr.outvars]


def dense_values(fn, wrapped, inputs):
    leaves, treedef = jax.tree.flatten((wrapped, inputs))
    closed = jax.make_jaxpr(lambda *xs: fn(*(lambda t: (t[0], *t[1]))(treedef.unflatten(xs))))(*leaves)
    marks = []
    for i, node in enumerate(jax.tree.leaves((wrapped, inputs), is_leaf=is_wrapped_leaf)):
        if isinstance(node, LoraWeight):
            marks += [{}, {i: node.w.size}, {i: node.w.size}, {}]
        else:
            marks.append({})
    for j in range(1, len(jax.tree.leaves(inputs)) + 1):
        marks[-j] = {DATA: math.inf}
    found = []
    check(closed.jaxpr, marks, found)
    return found


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_the_update_is_never_formed(case):
    wrapped, inputs = case.wrapped(jnp.float32, False), case.inputs(jnp.float32)
    assert dense_values(lora_jax.lora(case.fn), wrapped, inputs) == []


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_the_check_finds_a_formed_update(case):
    """The check itself is checked: on the merged function it finds every case's dense update."""
    wrapped, inputs = case.wrapped(jnp.float32, False), case.inputs(jnp.float32)

    def merged(tree, *xs):
        return case.fn(
            jax.tree.map(
                lambda x: x.dense() if isinstance(x, LoraWeight) else x, tree, is_leaf=is_wrapped_leaf
            ),
            *xs,
        )

    assert dense_values(merged, wrapped, inputs)
