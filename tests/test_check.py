"""check_merge reports what rounding lost, against figures worked out here by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import weight
from flax import nnx

import lora_jax

X = jax.random.normal(jax.random.key(0), (16, 32), jnp.float32)


def sized(ratio, dtype):
    """A weight whose update has rms `ratio` times that of its base."""
    w = weight("layer/kernel", (32, 64), ("in", "out"), dtype)
    rms = lambda x: float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))  # noqa: E731
    return {"layer": {"kernel": w.replace(b=w.b * jnp.float32(ratio * rms(w.w) / rms(w.delta())))}}


def apply(params, x):
    return x.astype(params["layer"]["kernel"].dtype) @ params["layer"]["kernel"]


@pytest.mark.parametrize("factor", [1.0, 2.0**-63, 2.0**63])  # whose squares leave float32
def test_figures_are_those_worked_out_by_hand(factor):
    node = sized(0.002, jnp.bfloat16)["layer"]["kernel"]
    node = node.replace(w=node.w * jnp.bfloat16(factor), b=node.b * jnp.float32(factor))
    (leaf,) = lora_jax.check_merge(apply, {"layer": {"kernel": node}}, X).leaves
    w, delta = np.asarray(node.w, np.float64), np.asarray(node.delta(), np.float64)
    merged = np.asarray((w + delta).astype(jnp.bfloat16), np.float64)
    assert leaf.path == "layer/kernel" and leaf.dtype == "bfloat16"
    np.testing.assert_allclose(leaf.size, 0.002, rtol=1e-3)
    np.testing.assert_allclose(
        leaf.lost, np.linalg.norm(merged - w - delta) / np.linalg.norm(delta), rtol=1e-3
    )
    np.testing.assert_allclose(leaf.unmoved, np.mean(merged == w), rtol=1e-6)


def test_small_updates_are_lost_in_bfloat16_and_kept_in_float32():
    small, large, fine = (
        lora_jax.check_merge(apply, sized(ratio, dtype), X).leaves[0]
        for ratio, dtype in ((0.0015, jnp.bfloat16), (0.015, jnp.bfloat16), (0.0015, jnp.float32))
    )
    assert small.unmoved > 0.5 and small.lost > 0.5
    assert large.unmoved < 0.25 and large.lost < 0.2
    assert fine.lost < 1e-4


def test_an_update_of_a_zero_base_is_infinitely_large_and_none_has_no_size():
    node = sized(0.01, jnp.float32)["layer"]["kernel"]
    updated = node.replace(w=jnp.zeros_like(node.w))
    for kernel, size in ((updated, np.inf), (updated.replace(b=jnp.zeros_like(node.b)), 0.0)):
        (leaf,) = lora_jax.check_merge(apply, {"layer": {"kernel": kernel}}, X).leaves
        assert (leaf.size, leaf.lost, leaf.unmoved) == (size, 0.0, 0.0)


def test_masked_logits_are_equal():
    masked = lambda p, x: jnp.where(jnp.arange(64) < 32, apply(p, x), -jnp.inf)  # noqa: E731
    tree = sized(0.01, jnp.float32)
    report = lora_jax.check_merge(masked, tree, X)
    y = np.asarray(X) @ np.asarray(lora_jax.merge(tree)["layer"]["kernel"])
    np.testing.assert_allclose(report.scale, np.abs(y[:, :32]).max(), rtol=1e-5)
    assert report.difference < 1e-4 and report.agreement == 1.0


@pytest.mark.parametrize("order", [1, -1])
def test_a_nan_shows_in_whatever_output_it_is(order):
    spoiled = lambda p, x: (apply(p, x), apply(p, x).at[3, 5].set(jnp.nan))[::order]  # noqa: E731
    report = lora_jax.check_merge(spoiled, sized(0.01, jnp.float32), X)
    assert np.isnan(report.difference) and np.isfinite(report.scale)
    assert report.agreement == (1.0 if order == 1 else 15 / 16)


def test_outputs_and_table():
    report = lora_jax.check_merge(apply, sized(0.01, jnp.float32), X)
    assert report.difference < 1e-4 < report.scale and report.agreement == 1.0
    text = str(report)
    assert "layer/kernel" in text and "top-1 agreement 100.00%" in text


def test_a_scalar_output_has_no_agreement():
    report = lora_jax.check_merge(lambda p, x: jnp.sum(apply(p, x)), sized(0.01, jnp.float32), X)
    assert report.agreement is None


def test_a_module_is_left_as_it_is():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.calls = nnx.Linear(32, 8, rngs=rngs), nnx.Variable(jnp.zeros((), jnp.int32))

        def __call__(self, x):
            self.calls.set_value(self.calls.get_value() + 1)
            return self.linear(x)

    net = lora_jax.wrap(Net(nnx.Rngs(0)), rank=2)
    report = lora_jax.check_merge(lambda net, x: net(x), net, X)
    assert int(net.calls.get_value()) == 0 and report.leaves[0].path == "linear/kernel"


def test_a_shared_variable_has_one_row():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(32, 32, rngs=rngs), nnx.Linear(32, 32, rngs=rngs)
            self.down.kernel = self.up.kernel

        def __call__(self, x):
            return self.down(self.up(x))

    report = lora_jax.check_merge(lambda net, x: net(x), lora_jax.wrap(Net(nnx.Rngs(0)), rank=2), X)
    assert len(report.leaves) == 1


def test_rows_have_the_names_of_the_tree():
    named = weight("mlp/kernel", (32, 8), ("in", "out"), jnp.float32)
    tree = {"q": {"kernel": named}, "k": {"kernel": named.replace(path="")}}
    report = lora_jax.check_merge(lambda p, x: x @ p["q"]["kernel"] + x @ p["k"]["kernel"], tree, X)
    assert [leaf.path for leaf in report.leaves] == ["k/kernel", "q/kernel"]
    (alone,) = lora_jax.check_merge(lambda w, x: x @ w, named, X).leaves
    assert alone.path == "mlp/kernel"


def test_what_cannot_be_compared_raises():
    with pytest.raises(ValueError, match="LoraWeight"):
        lora_jax.check_merge(apply, {"layer": {"kernel": jnp.ones((32, 4))}}, X)
    with pytest.raises(ValueError, match="floating"):
        lora_jax.check_merge(lambda p, x: jnp.argmax(apply(p, x)), sized(0.01, jnp.float32), X)
    with pytest.raises(ValueError, match="a batch that is not empty"):
        lora_jax.check_merge(apply, sized(0.01, jnp.float32), X[:0])


def test_what_has_no_values_raises():
    tree = sized(0.01, jnp.float32)
    with pytest.raises(TypeError, match="'layer/kernel/w' is traced; call it outside of jit"):
        jax.jit(lambda tree: lora_jax.check_merge(apply, tree, X).difference)(tree)
    with pytest.raises(TypeError, match="an output of fn is traced; call it outside of jit"):
        jax.vmap(lambda x: lora_jax.check_merge(apply, tree, x).difference)(X)
    with pytest.raises(TypeError, match="'layer/kernel/w' is a ShapeDtypeStruct.*give the arrays"):
        lora_jax.check_merge(apply, jax.eval_shape(lambda: tree), X)


def test_a_wrapped_tree_may_lie_inside_of_another():
    tree = sized(0.01, jnp.bfloat16)
    nested = lora_jax.check_merge(lambda p, x: apply(p["params"], x), {"params": tree}, X)
    plain = lora_jax.check_merge(apply, tree, X)
    (leaf,) = plain.leaves
    leaf = dataclasses.replace(leaf, path="params/layer/kernel")
    assert nested == dataclasses.replace(plain, leaves=(leaf,))
