"""check_merge reports what rounding lost, against figures worked out here by hand."""

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


def test_figures_are_those_worked_out_by_hand():
    tree = sized(0.002, jnp.bfloat16)
    (leaf,) = lora_jax.check_merge(apply, tree, X).leaves
    node = tree["layer"]["kernel"]
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


def test_what_cannot_be_compared_raises():
    with pytest.raises(ValueError, match="LoraWeight"):
        lora_jax.check_merge(apply, {"layer": {"kernel": jnp.ones((32, 4))}}, X)
    with pytest.raises(ValueError, match="floating"):
        lora_jax.check_merge(lambda p, x: jnp.argmax(apply(p, x)), sized(0.01, jnp.float32), X)


def test_a_wrapped_tree_may_lie_inside_of_another():
    tree = sized(0.01, jnp.bfloat16)
    nested = lora_jax.check_merge(lambda p, x: apply(p["params"], x), {"params": tree}, X)
    assert nested == lora_jax.check_merge(apply, tree, X)
