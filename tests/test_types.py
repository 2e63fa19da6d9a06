"""Laws 2 and 4: outputs have the types of the bare function, and its values while b is zero."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, dense_tree
from newest import NEWEST, newest

import lora_jax


@contextlib.contextmanager
def optimized():
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


DTYPES = [jnp.float32, jnp.bfloat16]
# XLA fuses a bare look-up into the norm's sums, in other fused multiply-adds than those of a look-up with
# a branch (on jax 0.10 across a barrier too): one unit in the last place. Unfused, the bits are the same.
FUSED = {"linen_tied_embedding"}


def is_model(case):
    """Whether it is a whole model, whose operations are rows of their own."""
    return case.name.startswith(("linen", "nnx"))


ROWS = [case for case in CASES if case.name != "cast"]  # which computes in float64 by its own doing
# Operation by operation nothing is fused, so every third row, in the dtype whose rounding is coarse, will do.
EAGER = [case for case in ROWS if not is_model(case)][::3]


@pytest.mark.parametrize("case", ROWS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_types_are_those_of_the_bare_function(case, dtype):
    wrapped, inputs = case.wrapped(dtype, False), case.inputs(dtype)
    expected = jax.eval_shape(case.fn, dense_tree(wrapped), *inputs)
    actual = jax.eval_shape(lora_jax.lora(case.fn), wrapped, *inputs)
    assert jax.tree.map(lambda y: (y.shape, y.dtype, y.weak_type), actual) == jax.tree.map(
        lambda y: (y.shape, y.dtype, y.weak_type), expected
    )


# How XLA rounds bfloat16, and the bits of whole models, are looked at on the newest jax alone: they take a
# fifth of the tests' time.
@pytest.mark.parametrize("case", [case for case in ROWS if NEWEST or not is_model(case)], ids=repr)
@pytest.mark.parametrize(
    "dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=newest)], ids=["float32", "bfloat16"]
)
def test_values_are_those_of_the_bare_function_while_b_is_zero(case, dtype):
    wrapped, inputs = case.wrapped(dtype, True), case.inputs(dtype)
    base = dense_tree(wrapped)

    def compare(run):
        expected, actual = run(case.fn)(base, *inputs), run(lora_jax.lora(case.fn))(wrapped, *inputs)
        for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(ours, theirs)

    with contextlib.nullcontext() if case.name in FUSED else optimized():
        compare(jax.jit)
        if dtype == jnp.bfloat16 and case in EAGER:
            compare(lambda f: f)


@newest
@pytest.mark.parametrize("case", [case for case in ROWS if not is_model(case)], ids=repr)
def test_bfloat16_is_as_close_to_the_truth_as_merging(case):
    """The branch is kept in float32, so the error is that of the base's own rounding."""
    wrapped, inputs = case.wrapped(jnp.bfloat16, False), case.inputs(jnp.bfloat16)

    def wide(tree):
        return jax.tree.map(
            lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
        )

    @jax.jit
    def three(wrapped, inputs):
        truth = case.fn(dense_tree(wide(wrapped)), *wide(inputs))
        return truth, lora_jax.lora(case.fn)(wrapped, *inputs), case.fn(dense_tree(wrapped), *inputs)

    for t, o, m in zip(*(jax.tree.leaves(x) for x in three(wrapped, inputs)), strict=True):
        t, o, m = (np.asarray(x, np.float64) for x in (t, o, m))
        size = np.sqrt(np.nanmean(t**2)) + 1e-30
        error, theirs = (np.sqrt(np.nanmean((x - t) ** 2)) / size for x in (o, m))
        assert error <= 2 * theirs + 2**-8, (error, theirs)
