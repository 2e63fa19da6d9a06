"""Law 1 for derivatives: those of lora(f) with respect to every a, b and input equal those of f(merge)."""

import jax
import jax.numpy as jnp
import pytest
from cases import CASES, dense_tree
from jax import lax
from newest import FUSED, NEWEST
from test_equivalence import assert_same, compiled

import lora_jax
from lora_jax.weight import LoraWeight, is_wrapped_leaf


def scalar(out):
    total = jnp.zeros((), jnp.float64)
    for y in jax.tree.leaves(out):
        if jnp.issubdtype(y.dtype, jnp.floating):
            weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float64)).reshape(y.shape)
            total += jnp.sum(jnp.where(jnp.isnan(y), 0, y.astype(jnp.float64)) * weights)
    return total


def split(wrapped, inputs):
    """The differentiable leaves (factors and float inputs), and how to put everything back."""
    nodes, treedef = jax.tree.flatten(wrapped, is_leaf=is_wrapped_leaf)
    factors = [(n.a, n.b) if isinstance(n, LoraWeight) else None for n in nodes]
    floats = [x if jnp.issubdtype(x.dtype, jnp.floating) else None for x in inputs]

    def rebuild(factors, floats):
        new = [
            n.replace(a=f[0], b=f[1]) if isinstance(n, LoraWeight) else n
            for n, f in zip(nodes, factors, strict=True)
        ]
        xs = [x if f is None else f for x, f in zip(inputs, floats, strict=True)]
        return treedef.unflatten(new), xs

    return (factors, floats), rebuild


def losses(case):
    wrapped, inputs = case.wrapped(jnp.float64, False), case.inputs(jnp.float64)
    point, rebuild = split(wrapped, inputs)

    def merged(factors, floats):
        tree, xs = rebuild(factors, floats)
        return scalar(case.fn(dense_tree(tree), *xs))

    def ours(factors, floats):
        tree, xs = rebuild(factors, floats)
        return scalar(lora_jax.lora(case.fn)(tree, *xs))

    return ours, merged, point


def at_once(measure, ours, merged, *args, **options):
    """A measure of both functions in one compilation."""
    return compiled(lambda *args: (measure(ours, *args), measure(merged, *args)), **options)(*args)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_reverse_mode(case):
    ours, merged, point = losses(case)
    options = FUSED if case.name.startswith("nnx") else {}  # some of which is in float32
    assert_same(*at_once(lambda f, *x: jax.grad(f, (0, 1))(*x), ours, merged, *point, **options))


# jax has no forward mode for a custom_vjp function, with or without lora; and nnx's attention takes its
# softmax in float32, whose derivative the bare function too has to 1e-8 only.
NO_FORWARD = {"custom_derivatives_without_weights", "nnx_block", "nnx_tied_embedding"}
NO_FORWARD |= {case.name for case in CASES if case.name.startswith("custom_vjp")}
# On the older versions of jax a few rows; there all of them go backwards.
SOME = [c for c in CASES if c.name in ("dense", "tied", "scanned", "conv", "linen_attention")]
FORWARD = [case for case in (CASES if NEWEST else SOME) if case.name not in NO_FORWARD]


@pytest.mark.parametrize("case", FORWARD, ids=repr)
def test_forward_mode(case):
    ours, merged, point = losses(case)
    tangent = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), point)
    assert_same(*at_once(jax.jvp, ours, merged, point, tangent))


@pytest.mark.parametrize("case", SOME, ids=repr)
def test_reverse_mode_inside_a_scan(case):
    ours, merged, point = losses(case)
    expected = jax.jit(jax.grad(merged, (0, 1)))(*point)
    in_a_scan = lax.scan(lambda c, _: (c, jax.grad(ours, (0, 1))(*point)), 0, None, length=1)[1]
    assert_same(jax.tree.map(lambda g: g[0], in_a_scan), expected)


@pytest.mark.parametrize("case", SOME, ids=repr)
def test_second_derivatives(case):
    ours, merged, point = losses(case)
    tangent = jax.tree.map(jnp.ones_like, point)

    assert_same(*at_once(lambda f, *x: jax.jvp(jax.grad(f, (0, 1)), *x), ours, merged, point, tangent))


def test_merging_inside_a_loss_has_a_gradient_while_b_is_zero():
    case = next(case for case in CASES if case.name == "dense")
    wrapped, (x,) = case.wrapped(jnp.float64, True), case.inputs(jnp.float64)

    def gradient(run):
        return jax.grad(lambda b: scalar(run({"w": wrapped["w"].replace(b=b)})))(wrapped["w"].b)

    expected = gradient(lambda tree: lora_jax.lora(case.fn)(tree, x))
    assert_same(gradient(lambda tree: case.fn(lora_jax.merge(tree), x)), expected)
    assert jnp.any(expected != 0)
