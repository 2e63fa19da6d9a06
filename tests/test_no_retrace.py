"""A second eager call compiles nothing; a block that is jitted or rematerialised is traced once."""

import jax
import jax.numpy as jnp
import pytest
from cases import CASES, dense_tree, weight
from newest import NEWEST

import lora_jax


def test_the_count_counts(compilations):
    fn, x = jax.jit(lambda x: x * 3.25), jnp.ones(7)
    with compilations() as seen, compilations("") as every_stage:
        fn(x)
    assert seen and set(seen) < set(every_stage)
    with compilations("") as every_stage:
        fn(x)
    assert not every_stage


# Every second row: a first eager call compiles each of a row's operations, of which others have the same.
@pytest.mark.parametrize("case", CASES[:: 2 if NEWEST else 4], ids=repr)
def test_a_second_eager_call_compiles_what_the_bare_one_does(case, compilations):
    wrapped, inputs = case.wrapped(jnp.float32, False), case.inputs(jnp.float32)
    base = dense_tree(wrapped)
    counts = []
    for fn, tree in ((case.fn, base), (lora_jax.lora(case.fn), wrapped)):
        fn(tree, *inputs)
        with compilations() as seen:
            fn(tree, *inputs)
        counts.append(len(seen))
    assert counts[1] <= counts[0]


@pytest.mark.parametrize("wrapper", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_a_block_of_many_layers_is_traced_once(wrapper):
    traced = []

    def block(w, x):
        traced.append(1)
        return jnp.tanh(x @ w)

    once = wrapper(block)

    def model(ws, x):
        for w in ws:
            x = once(w, x)
        return x

    ws = [weight(f"layer_{i}", (4, 4), ("in", "out"), jnp.float32) for i in range(6)]
    run = lora_jax.lora(model)
    closed = jax.make_jaxpr(run)(ws, jnp.ones((2, 4), jnp.float32))
    assert len(traced) == 1
    bodies = {id(eqn.params["jaxpr"]) for eqn in closed.jaxpr.eqns if "jaxpr" in eqn.params}
    assert len(bodies) == 1, "the six layers share one interpreted body"


def test_layers_that_share_a_body_keep_their_own_paths():
    @jax.jit
    def block(w, x):
        return x @ jnp.sin(w)

    def model(ws, x):
        return block(ws[1], ws[0] @ x)

    ws = [weight(name, (4, 4), ("in", "out"), jnp.float32) for name in ("first", "second")]
    with pytest.raises(lora_jax.RefusedError) as error:
        lora_jax.lora(model)(ws, jnp.ones((4, 4), jnp.float32))
    assert error.value.paths == ("second",)


def test_nothing_depends_on_what_was_called_before():
    """Closures, keys and shapes of an earlier call leave no trace in a later one."""
    w = weight("w", (4, 4), ("in", "out"), jnp.float32)
    x = jnp.ones((2, 4), jnp.float32)

    def model(factor):
        inner = jax.jit(lambda w, x: x @ w)
        return lambda w, x: factor * inner(w, x)

    first = lora_jax.lora(model(2.0))(w, x)
    assert jnp.allclose(lora_jax.lora(model(3.0))(w, x), first * 1.5)
    assert jnp.allclose(lora_jax.lora(model(2.0))(w, x), first)
    other = w.replace(b=2 * w.b)
    assert not jnp.allclose(lora_jax.lora(model(2.0))(other, x), first)
