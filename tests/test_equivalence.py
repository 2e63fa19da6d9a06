"""Law 1: lora(f)(w, x) == f(merge(w), x), in float64 to 1e-12, with transformations on either side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, dense_tree, weight
from jax import lax
from newest import NEWEST

import lora_jax
from experiments.programs.law import interpreted


def scaled_inputs(xs, s):
    return [x * s.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in xs]


def vmap(f):
    steps = jnp.array([1.0, 2.0])
    return lambda p, *xs: jax.vmap(lambda s: f(p, *scaled_inputs(xs, s)))(steps)


def scan(f):
    steps = jnp.array([1.0, 2.0])
    return lambda p, *xs: lax.scan(lambda c, s: (c, f(p, *scaled_inputs(xs, s))), 0, steps)[1]


TRANSFORMS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "vmap": vmap,
    "scan of remat": lambda f: scan(jax.checkpoint(f)),
}


# What the bare function itself cannot do: nnx refuses a state from outside of vmap in its scan, and jax
# has no vmap of ragged_dot over the rows alone.
IMPOSSIBLE = {("nnx_stacked", "vmap"), ("nnx_stacked_behind", "vmap")} | {
    (c.name, "vmap") for c in CASES if c.name.startswith("ragged_dot")
}
# vmap turns a branch into a select between weights, masked entry by entry, if its predicate is mapped.
REFUSED_INSIDE = {("cond", "vmap")}


EAGER = CASES[::2]


def ways(case):
    """A scan of the rematerialised function has what jit has: the older versions of jax run that alone."""
    if not NEWEST:
        return ["scan of remat"]
    # The models' operations are rows of their own; eagerly the models are in test_types.
    model = case.name.startswith(("linen", "nnx"))
    names = ["vmap", "scan of remat"] if model else list(TRANSFORMS)
    if case not in EAGER and not model:  # jit interprets what an eager call does
        names.remove("eager")
    return [name for name in names if (case.name, name) not in IMPOSSIBLE]


PAIRS = [(case, name) for case in CASES for name in ways(case)]


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert type_of(ours) == type_of(theirs)
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        size = 1 + np.max(np.abs(theirs), initial=0, where=np.isfinite(theirs))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * size)


class Numbers:
    """An output of the interpreter: numbers, and the type that jax gives them."""

    def __init__(self, numbers, info):
        self.numbers, self.type = numbers, (info.shape, info.dtype, info.weak_type)

    def __array__(self, dtype=None, copy=None):
        return self.numbers


def type_of(x):
    return x.type if isinstance(x, Numbers) else jax.typeof(x)


def compiled(fn, **options):
    """What jit makes of a function; the options are XLA's.

    Run by StableHLO's own interpreter, whose definition of each operation is the reference and which takes
    a fraction of the time that XLA needs to compile. XLA runs what it has no operation for, and all on
    the older versions of jax, where it takes the process with it on some programs.
    """

    def run(*args):
        if not NEWEST:
            return jax.jit(fn, compiler_options=options)(*args)
        try:
            infos, numbers = interpreted(fn, *args)
        except NotImplementedError:
            return jax.jit(fn)(*args)
        infos, treedef = jax.tree.flatten(infos)
        return treedef.unflatten(map(Numbers, numbers, infos))

    return run


@pytest.mark.parametrize(("case", "transform"), PAIRS, ids=repr)
def test_equals_the_merged_function(case, transform):
    wrapped, inputs = case.wrapped(jnp.float64, False), case.inputs(jnp.float64)
    change = TRANSFORMS[transform]
    refused = (case.name, transform) in REFUSED_INSIDE

    def every_way(tree, *xs):
        merged = change(case.fn)(dense_tree(tree), *xs)
        ours = [change(lora_jax.lora(case.fn))(tree, *xs)]
        if transform != "eager" and not refused:
            ours.append(lora_jax.lora(change(case.fn))(tree, *xs))
        return merged, ours

    # One compilation for all of them, unless the row is to run operation by operation.
    run = every_way if transform == "eager" else compiled(every_way)
    expected, found = run(wrapped, *inputs)
    assert jax.tree.leaves(expected)
    for ours in found:
        assert_same(ours, expected)
    if refused:
        with pytest.raises(lora_jax.RefusedError, match="select_n"):
            lora_jax.lora(change(case.fn))(wrapped, *inputs)


@pytest.mark.parametrize("shape", [(1, 3), (4, 1), (1, 1)])
def test_a_weight_that_was_broadcast_times_an_array_that_was_not(shape):
    """No row of the table, since the repeated factors are larger than so small a weight."""
    w = weight("w", shape, ("in", "out"), jnp.float64)
    s = jax.random.normal(jax.random.key(1), (5, *shape), jnp.float64)

    def fn(w, s):
        repeated = jnp.broadcast_to(w, (5, *shape))
        return jnp.einsum("bi,nio->bo", jnp.ones((2, shape[0]), s.dtype), repeated * s / (2.0 + s**2))

    def measure(run):
        def loss(ab, s):
            return jnp.sum(jnp.sin(run(w.replace(a=ab[0], b=ab[1]), s)))

        return jax.value_and_grad(loss, (0, 1))((w.a, w.b), s)

    assert_same(measure(lora_jax.lora(fn)), measure(lambda w, s: fn(w.dense(), s)))
