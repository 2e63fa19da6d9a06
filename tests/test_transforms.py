"""The law under what JAX does around a function: derivatives, ahead-of-time compilation, export, effects."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, dense_tree, weight
from jax import lax
from jax.experimental import io_callback
from test_equivalence import assert_same
from test_gradients import NO_FORWARD, at_once, losses

import lora_jax

SOME = (
    "dense",
    "tied",
    "scanned",
    "conv",
    "experts",
    "sum_of_weights",
    "product_of_weights",
    "linen_attention",
)
ROWS = [case for case in CASES if case.name in SOME]
assert len(ROWS) == len(SOME) and not NO_FORWARD.intersection(SOME)


def both(case):
    wrapped, inputs = case.wrapped(jnp.float64, False), case.inputs(jnp.float64)
    return lora_jax.lora(case.fn), lambda tree, *xs: case.fn(dense_tree(tree), *xs), wrapped, inputs


@pytest.mark.parametrize("case", ROWS, ids=repr)
def test_value_and_grad_and_linearize(case):
    ours, merged, point = losses(case)

    def measure(f, point, tangent):
        value, along = jax.linearize(f, *point)
        return jax.value_and_grad(f, (0, 1))(*point), value, along(*tangent)

    assert_same(*at_once(measure, ours, merged, point, jax.tree.map(jnp.ones_like, point)))


@pytest.mark.parametrize("case", ROWS, ids=repr)
def test_jacobian_of_the_factors(case):
    ours, merged, wrapped, inputs = both(case)
    leaves, treedef = jax.tree.flatten(wrapped, is_leaf=lambda x: isinstance(x, lora_jax.LoraWeight))

    def jacobian(fn):
        def of_b(b):
            first, *rest = (leaf for leaf in leaves if isinstance(leaf, lora_jax.LoraWeight))
            tree = treedef.unflatten([leaf.replace(b=b) if leaf is first else leaf for leaf in leaves])
            return jax.tree.leaves(fn(tree, *inputs))[0].sum(0)

        first = next(leaf for leaf in leaves if isinstance(leaf, lora_jax.LoraWeight))
        return jax.jit(jax.jacfwd(of_b))(first.b)

    assert_same(jacobian(ours), jacobian(merged))


@pytest.mark.parametrize("case", ROWS, ids=repr)
def test_shapes_lowering_and_export(case):
    ours, merged, wrapped, inputs = both(case)
    expected = merged(wrapped, *inputs)
    shapes = jax.eval_shape(ours, wrapped, *inputs)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (wrapped, *inputs))
    assert_same(jax.jit(ours).lower(*abstract).compile()(wrapped, *inputs), expected)

    leaves, treedef = jax.tree.flatten((wrapped, *inputs))
    flat = jax.jit(lambda *xs: jax.tree.leaves(ours(*treedef.unflatten(xs))))
    exported = jax.export.export(flat)(*leaves)
    assert_same(list(exported.call(*leaves)), jax.tree.leaves(expected))


def test_effects_are_kept_in_order():
    seen = []

    def model(w, x):
        for i in range(3):
            io_callback(lambda v, i=i: seen.append((i, float(v))), None, jnp.sum(x), ordered=True)
            x = jnp.tanh(x @ w)

        def step(x, i):
            io_callback(lambda v: seen.append(("scan", int(v))), None, i, ordered=True)
            return x @ w, None

        return lax.scan(step, x, jnp.arange(2))[0]

    w = weight("w", (4, 4), ("in", "out"), jnp.float64)
    x = jnp.ones((2, 4), jnp.float64)
    expected = model(w.dense(), x)
    jax.effects_barrier()
    bare, seen[:] = list(seen), []
    for run in (lora_jax.lora(model), jax.jit(lora_jax.lora(model))):
        assert_same(run(w, x), expected)
        jax.effects_barrier()
        assert [name for name, _ in seen] == [name for name, _ in bare] == [0, 1, 2, "scan", "scan"]
        np.testing.assert_allclose([v for _, v in seen], [v for _, v in bare], rtol=1e-12)
        seen.clear()


def test_effects_of_a_backward_pass_are_kept():
    seen = []

    def note(text, x):
        jax.debug.callback(lambda v: seen.append((text, round(float(v), 6))), jnp.sum(x))

    @jax.custom_vjp
    def product(w, x):
        return x @ w

    def forward(w, x):
        note("forward", x)
        return x @ w, (w, x)

    def backward(saved, g):
        w, x = saved
        note("backward", g)
        return x.T @ g, g @ w.T

    product.defvjp(forward, backward)
    w = weight("w", (4, 4), ("in", "out"), jnp.float64)
    x = jnp.ones((2, 4), jnp.float64)

    def gradient(run, point):
        return jax.grad(lambda p: jnp.sum(jnp.tanh(run(p))))(point)

    gradient(lambda w: product(w, x), w.dense())
    jax.effects_barrier()
    bare, seen[:] = list(seen), []
    run = lora_jax.lora(lambda w, x: product(w, x))
    gradient(lambda ab: run(w.replace(a=ab[0], b=ab[1]), x), (w.a, w.b))
    jax.effects_barrier()
    assert seen == bare and len(bare) == 2


def test_named_scopes_and_calls_survive():
    def model(w, x):
        with jax.named_scope("attention"):
            return jax.named_call(lambda x: x @ w, name="query")(x)

    w = weight("w", (4, 4), ("in", "out"), jnp.float64)
    text = jax.jit(lora_jax.lora(model)).lower(w, jnp.ones((2, 4), jnp.float64)).as_text(debug_info=True)
    assert "attention/query" in text


POLICIES = {
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "everything_saveable": jax.checkpoint_policies.everything_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "save_only_these_names": jax.checkpoint_policies.save_only_these_names("hidden"),
    "save_and_offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["hidden"],
        names_which_can_be_offloaded=[],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "both": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names("hidden")
    ),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_remat_policy(policy):
    def block(w, x):
        return jax.ad_checkpoint.checkpoint_name(jnp.tanh(x @ w), "hidden") @ w

    def loss(run, w, x):
        return jnp.sum(run(jax.checkpoint(block, policy=POLICIES[policy]))(w, x) ** 2)

    w = weight("w", (4, 4), ("in", "out"), jnp.float64)
    x = jax.random.normal(jax.random.key(0), (2, 4), jnp.float64)

    def gradient(run):
        return jax.jit(jax.grad(lambda ab: loss(run, w.replace(a=ab[0], b=ab[1]), x)))((w.a, w.b))

    assert_same(gradient(lora_jax.lora), gradient(lambda f: lambda w, x: f(w.dense(), x)))
