"""Dropout on the branch's input: off without a key, another mask for every use, the same in reverse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import weight
from jax import lax

import lora_jax

KEY = jax.random.key(7)
RATE = 0.4


def dropped(name, shape, axes, rate=RATE):
    w = weight(name, shape, axes, jnp.float64)
    # A base of zero and an identity for a and b show the mask itself.
    return w.replace(dropout=rate)


def mask_weight(n, rate=RATE, layers=None):
    eye = jnp.eye(n, dtype=jnp.float64)
    if layers is None:
        return lora_jax.LoraWeight(jnp.zeros((n, n)), eye, eye, path="w", dropout=rate)
    stack = jnp.broadcast_to(eye, (layers, n, n))
    return lora_jax.LoraWeight(
        jnp.zeros((layers, n, n)), stack, stack, 1.0, ("batch", "in", "out"), "w", rate
    )


def test_off_without_a_key_and_at_rate_zero():
    x = jnp.ones((6, 4), jnp.float64)
    for w, key in (
        (dropped("w", (4, 3), ("in", "out")), None),
        (dropped("w", (4, 3), ("in", "out"), 0.0), KEY),
    ):
        np.testing.assert_allclose(
            lora_jax.lora(lambda w, x: x @ w, key=key)(w, x), x @ w.dense(), atol=1e-12
        )


def test_entries_are_dropped_at_the_rate_and_the_rest_scaled():
    x = jnp.ones((200, 50), jnp.float64)
    out = lora_jax.lora(lambda w, x: x @ w, key=KEY)(mask_weight(50), x)
    low, high = np.unique(np.round(out, 12))
    assert low == 0 and abs(high - 1 / (1 - RATE)) < 1e-4
    assert abs(float(jnp.mean(out == 0)) - RATE) < 5 * np.sqrt(RATE * (1 - RATE) / out.size)


def test_the_same_key_gives_the_same_mask_and_another_key_another():
    run = lambda key: lora_jax.lora(lambda w, x: x @ w, key=key)(mask_weight(50), jnp.ones((8, 50)))  # noqa: E731
    np.testing.assert_array_equal(run(KEY), run(KEY))
    np.testing.assert_array_equal(run(KEY), jax.jit(run)(KEY))
    assert not np.array_equal(run(KEY), run(jax.random.key(8)))


def masks_of(fn, w, x):
    return np.asarray(lora_jax.lora(fn, key=KEY)(w, x)) == 0


def test_every_use_of_a_weight_has_its_own_mask():
    w, x = mask_weight(64), jnp.ones((8, 64), jnp.float64)
    first, second = masks_of(lambda w, x: jnp.stack([x @ w, x @ w]), w, x)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("loop", ["scan over layers", "scan with a constant", "fori", "jitted block"])
def test_every_layer_and_step_has_its_own_mask(loop):
    x = jnp.ones((8, 64), jnp.float64)
    block = jax.jit(lambda w, x: x @ w)

    def fori(w, x):
        zeros = jnp.zeros((3, *x.shape))
        return lax.fori_loop(0, jnp.asarray(3), lambda i, c: c.at[i].set(x @ w), zeros)

    fns = {
        "scan over layers": lambda w, x: lax.scan(lambda c, w: (c, x @ w), 0, w)[1],
        "scan with a constant": lambda w, x: lax.scan(lambda c, _: (c, x @ w), 0, None, length=3)[1],
        "fori": fori,
        "jitted block": lambda w, x: jnp.stack([block(w, x) for _ in range(3)]),
    }
    layers = 3 if loop == "scan over layers" else None
    masks = masks_of(fns[loop], mask_weight(64, layers=layers), x)
    assert masks.any(axis=(1, 2)).all()
    assert not any(np.array_equal(masks[i], masks[j]) for i in range(3) for j in range(i))


@pytest.mark.parametrize("wrapper", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_the_backward_pass_sees_the_same_mask(wrapper):
    w, x = mask_weight(64), jnp.ones((8, 64), jnp.float64)
    run = lora_jax.lora(wrapper(lambda w, x: jnp.sum((x @ w) ** 2) / 2), key=KEY)
    out = lora_jax.lora(wrapper(lambda w, x: x @ w), key=KEY)(w, x)
    # d/dx of |m*x/(1-p)|^2 / 2 is m*(m*x)/(1-p)^2: zero just where the forward pass dropped.
    gradient = jax.jit(jax.grad(run, argnums=1))(w, x)
    np.testing.assert_array_equal(gradient == 0, out == 0)


def test_the_base_path_is_not_dropped():
    w = dropped("w", (4, 3), ("in", "out")).replace(b=jnp.zeros((3, 3), jnp.float64))
    x = jnp.ones((6, 4), jnp.float64)
    np.testing.assert_array_equal(lora_jax.lora(lambda w, x: x @ w, key=KEY)(w, x), x @ w.w)


def test_convolutions_and_the_tied_product_drop_their_input():
    kernel = weight("k", (3, 3, 4, 6), ("in", "in", "in", "out"), jnp.float64).replace(dropout=0.5)
    x = jnp.ones((1, 8, 8, 4), jnp.float64)

    def conv(k, x):
        return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    table = weight("t", (11, 4), ("in", "out"), jnp.float64).replace(dropout=0.5)
    for fn, w, y in ((conv, kernel, x), (lambda t, x: x @ t.T, table, x[0, 0])):
        with_key, without = lora_jax.lora(fn, key=KEY)(w, y), lora_jax.lora(fn)(w, y)
        assert not np.allclose(with_key, without)
        mean = np.mean([lora_jax.lora(fn, key=jax.random.key(i))(w, y) for i in range(400)], axis=0)
        np.testing.assert_allclose(mean, without, atol=0.25 * np.abs(without).max())


def test_a_second_adapter_without_dropout_is_not_dropped():
    ws = {"v": mask_weight(64).replace(path="v"), "w": mask_weight(64, rate=0.0)}
    out = lora_jax.lora(lambda p, x: (x @ p["v"], x @ p["w"]), key=KEY)(ws, jnp.ones((8, 64)))
    assert (out[0] == 0).any() and not (out[1] == 0).any()
