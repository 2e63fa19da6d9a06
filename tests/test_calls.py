"""lora(fn) has fn's signature: what passes in and out, and what fn does on the way."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import weight
from flax import nnx
from jax.experimental import io_callback

import lora_jax

X = jnp.ones((2, 4), jnp.float32)
W = weight("w", (4, 4), ("in", "out"), jnp.float32)


def test_keywords_and_static_leaves_reach_fn_untraced():
    seen = {}

    def fn(w, x, *, flag, name=None, table=None, count=2, activation=jnp.tanh):
        seen.update(flag=flag, name=name, table=table, count=count)
        assert flag is True and table == (1, 2)
        return activation(x @ w) * count

    lora_jax.lora(fn)(W, X, flag=True, name="a", table=(1, 2))
    assert seen["name"] == "a" and seen["count"] == 2


def test_outputs_that_are_no_arrays_come_back():
    out = lora_jax.lora(lambda w, x: {"y": x @ w, "n": 3, "s": "text", "none": None, "np": np.ones(2)})(W, X)
    assert out["n"] == 3 and type(out["n"]) is int and out["s"] == "text" and out["none"] is None
    assert isinstance(out["np"], np.ndarray) and isinstance(out["y"], jax.Array)


def test_name_and_doc_are_kept():
    def model(w, x):
        """What it does."""
        return x @ w

    wrapped = lora_jax.lora(model)
    assert wrapped.__name__ == "model" and wrapped.__doc__ == "What it does."


def test_an_unwrapped_tree_runs_as_it_is():
    np.testing.assert_array_equal(lora_jax.lora(lambda w, x: x @ w)(W.w, X), X @ W.w)


def test_numpy_base_weights():
    w = W.replace(w=np.asarray(W.w))
    np.testing.assert_array_equal(
        lora_jax.lora(lambda w, x: x @ w)(w, X), lora_jax.lora(lambda w, x: x @ w)(W, X)
    )


def test_numpy_leaves_beside_a_weight_are_arrays_like_others():
    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    out = lora_jax.lora(lambda table, w, i, name: table[i] @ w if name == "sum" else None)(table, W, 2, "sum")
    np.testing.assert_allclose(out, table[2] @ W.dense(), rtol=1e-5)
    ids = jnp.array([1, 2])
    np.testing.assert_array_equal(lora_jax.lora(lambda t, w, i: t[i])(table, W, ids), table[1:])


def test_effects_happen_once_and_in_order():
    seen = []

    def fn(w, x):
        for i in range(3):
            x = jax.jit(lambda w, x: x @ w)(w, x)
            io_callback(lambda i: seen.append(int(i)), None, i, ordered=True)
        return x

    lora_jax.lora(fn)(W, X).block_until_ready()
    jax.effects_barrier()
    assert seen == [0, 1, 2]


def test_name_scopes_survive():
    def fn(w, x):
        with jax.named_scope("attention"):
            return x @ w

    text = jax.jit(lora_jax.lora(fn)).lower(W, X).as_text(debug_info=True)
    assert "attention" in text


def test_random_keys_and_integers_pass():
    def fn(w, x, key, ids):
        return (x @ w)[ids] + jax.random.normal(key, (2, 4), jnp.float32)

    args = (X, jax.random.key(3), jnp.array([1, 0]))
    np.testing.assert_array_equal(lora_jax.lora(fn)(W.replace(b=jnp.zeros_like(W.b)), *args), fn(W.w, *args))


def test_a_full_weight_has_its_own_dtype_inside():
    head = lora_jax.FullWeight(jnp.full((4, 3), 1.0009765625, jnp.float32), jnp.bfloat16, "head")
    out = lora_jax.lora(lambda h, x: (h.dtype, x.astype(h.dtype) @ h))(head, X)
    assert out[0] == jnp.bfloat16 and out[1].dtype == jnp.bfloat16
    grad = jax.grad(lambda h: lora_jax.lora(lambda h: jnp.sum(h.astype(jnp.float32)))(h))(head)
    assert grad.value.dtype == jnp.float32


# Modules


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(8, 8, rngs=rngs)
        self.tied = self.down
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        with jax.numpy_dtype_promotion("standard"):
            self.calls.set_value(self.calls.get_value() + 1)
            return self.tied(self.down(self.drop(self.norm(self.up(x)))))

    def shifted(self, x, by):
        return self(x) + by


def nets(x64=False):
    """A wrapped module and the same module with its weights merged."""
    module = Net(nnx.Rngs(0))
    wrapped = lora_jax.wrap(module, rank=2, init=random_b)
    return wrapped, lora_jax.merge(wrapped)


def random_b(key, w, target):
    from lora_jax.weight import sizes

    batch, inner, outer = sizes(w.shape, target.axes)
    first, second = jax.random.split(key)
    a = jax.random.normal(first, (*batch, *inner, target.rank), jnp.float32)
    return w, a, jax.random.normal(second, (*batch, target.rank, *outer), jnp.float32)


@pytest.mark.parametrize(
    "call",
    [
        lambda net, x: lora_jax.lora(net)(x),
        lambda net, x: lora_jax.lora(lambda net, x: net(x))(net, x),
        lambda net, x: lora_jax.lora(net.__call__)(x),
        lambda net, x: lora_jax.lora(net.shifted)(x, by=jnp.zeros((), jnp.float32)),
        lambda net, x: nnx.jit(lora_jax.lora(lambda net, x: net(x)))(net, x),
    ],
    ids=["module", "function", "bound call", "bound method", "nnx.jit"],
)
def test_what_a_module_mutates_is_written_back(call):
    wrapped, merged = nets()
    for step in range(2):
        x = jax.random.normal(jax.random.key(step), (5, 4), jnp.float32)
        np.testing.assert_allclose(call(wrapped, x), merged(x), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(wrapped.norm.mean.get_value(), merged.norm.mean.get_value(), rtol=1e-5)
    np.testing.assert_allclose(wrapped.norm.var.get_value(), merged.norm.var.get_value(), rtol=1e-5)
    assert int(wrapped.calls.get_value()) == 2
    assert int(wrapped.drop.rngs.count.get_value()) == int(merged.drop.rngs.count.get_value()) == 2
    assert isinstance(wrapped.up.kernel.get_value(), lora_jax.LoraWeight)
    assert wrapped.tied is wrapped.down


def test_a_changed_structure_is_refused():
    wrapped, _ = nets()

    def grows(net, x):
        net.extra = nnx.Param(jnp.ones(3))
        return net(x)

    with pytest.raises(ValueError, match="changed the structure"):
        lora_jax.lora(grows)(wrapped, jnp.ones((5, 4), jnp.float32))


def test_assigning_to_a_wrapped_leaf_is_refused_and_changes_nothing():
    wrapped, _ = nets()
    before = jax.tree.leaves(nnx.state(wrapped))

    def decays(net, x):
        net.up.kernel.set_value(net.up.kernel.get_value() * jnp.float32(0.5))
        return net(x)

    with pytest.raises(ValueError, match="up/kernel"):
        lora_jax.lora(decays)(wrapped, jnp.ones((5, 4), jnp.float32))
    assert all(a is b for a, b in zip(before, jax.tree.leaves(nnx.state(wrapped)), strict=True))


def test_a_cache_fills():
    attention = nnx.MultiHeadAttention(2, 4, decode=True, rngs=nnx.Rngs(0))
    attention.init_cache((2, 5, 4), dtype=jnp.float32)
    bare = nnx.clone(attention)
    wrapped = lora_jax.wrap(attention, rank=2)
    with jax.numpy_dtype_promotion("standard"):
        for step in range(3):
            x = jax.random.normal(jax.random.key(step), (2, 1, 4), jnp.float32)
            np.testing.assert_allclose(lora_jax.lora(wrapped)(x), bare(x), rtol=1e-6, atol=1e-6)
    assert int(wrapped.cache_index.get_value()) == int(bare.cache_index.get_value()) == 3
    np.testing.assert_array_equal(wrapped.cached_key.get_value(), bare.cached_key.get_value())


def test_one_variable_in_two_arguments_stays_one():
    first, second = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(1))
    second.kernel = first.kernel

    def same(a, b, x):
        assert a.kernel is b.kernel
        return a(x) + b(x)

    with jax.numpy_dtype_promotion("standard"):
        lora_jax.lora(same)(first, second, X)


def test_an_equinox_module_and_its_method():
    class Model(eqx.Module):
        first: eqx.nn.Linear
        second: eqx.nn.MLP
        name: str = eqx.field(static=True)

        def __call__(self, x):
            return self.second(jnp.tanh(self.first(x)))

        def twice(self, x):
            return 2 * self(x)

    keys = jax.random.split(jax.random.key(0))
    model = Model(
        eqx.nn.Linear(4, 6, key=keys[0], dtype=jnp.float32),
        eqx.nn.MLP(6, 3, 5, 2, key=keys[1], dtype=jnp.float32),
        "net",
    )
    wrapped = lora_jax.wrap(model, rank=2, init=random_b)
    merged = lora_jax.merge(wrapped)
    x = jnp.linspace(-1, 1, 4, dtype=jnp.float32)
    np.testing.assert_allclose(lora_jax.lora(wrapped)(x), merged(x), rtol=1e-5)
    np.testing.assert_allclose(lora_jax.lora(wrapped.twice)(x), merged.twice(x), rtol=1e-5)
    np.testing.assert_allclose(
        jax.vmap(lambda x: lora_jax.lora(wrapped)(x))(jnp.stack([x, x])),
        jax.vmap(merged)(jnp.stack([x, x])),
        rtol=1e-5,
    )


def test_linen_mutable_collections_come_back():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))

    with jax.numpy_dtype_promotion("standard"):
        model, x = Model(), jax.random.normal(jax.random.key(0), (5, 4), jnp.float32)
        variables = model.init(jax.random.key(1), x, train=False)
        wrapped = lora_jax.wrap(variables["params"], rank=2, init=random_b)
        apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
        ours, stats = lora_jax.lora(apply)({**variables, "params": wrapped}, x)
        theirs, expected = apply({**variables, "params": lora_jax.merge(wrapped)}, x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        stats["batch_stats"]["BatchNorm_0"]["mean"], expected["batch_stats"]["BatchNorm_0"]["mean"], rtol=1e-5
    )
