"""What has no low-rank form is refused with its path, its primitive, its line and the ways on."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, weight
from jax import lax
from test_equivalence import assert_same

import lora_jax

X = jnp.ones((2, 4), jnp.float32)


@jax.custom_jvp
def _own_jvp(w, x):
    return x @ w


_own_jvp.defjvp(lambda primals, tangents: (_own_jvp(*primals), primals[1] @ tangents[0]))


@jax.custom_vjp
def _own_vjp(w, x):
    return x @ w


_own_vjp.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (jnp.sign(saved[1].T @ g), g @ saved[0].T))

REFUSED = {
    "sin": lambda w, x: x @ jnp.sin(w),
    "sort": lambda w, x: x @ jnp.sort(w),
    "mul": lambda w, x: x @ (w * (x.T @ x)),
    "integer_pow": lambda w, x: x @ w / jnp.sum(w**2),
    "gt": lambda w, x: jnp.sum(w > 0).astype(x.dtype) + x @ w,
    "along in and along out": lambda w, x: jnp.einsum("io,sio->sio", w, jnp.ones((2, 4, 4), x.dtype)),
    "merges": lambda w, x: w.reshape(-1)[:4] + x,
    "product of two weights": lambda w, x: x @ (w * w),
    "over a part": lambda w, x: jnp.einsum("io,io,s->s", w, w, x[:, 0]),
    "is an 'in' axis": lambda w, x: lax.scan(lambda c, row: (c, row @ x.T), 0, w)[1],
    "returns the weight itself": lambda w, x: w,
    "a branch returns": lambda w, x: x @ lax.cond(x[0, 0] > 0, lambda: w, lambda: jnp.zeros_like(w)),
    "with the same rank": lambda w, x: lax.scan(lambda c, _: (c + w, None), w, None, length=2)[0] @ x.T,
    "carry": lambda w, x: lax.scan(lambda c, _: (w, None), x[:, :4].T @ x, None, length=2)[0],
    "custom_jvp_call": lambda w, x: _own_jvp(w, x),
    "int32": lambda w, x: x @ w.astype(jnp.int32).astype(x.dtype),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["plain", "inside jit"])
@pytest.mark.parametrize("named", REFUSED)
def test_refused_by_name(named, jitted):
    fn = jax.jit(REFUSED[named]) if jitted else REFUSED[named]
    w = weight("layer/kernel", (4, 4), ("in", "out"), jnp.float32)
    with pytest.raises(lora_jax.RefusedError) as error:
        lora_jax.lora(fn)(w, X)
    message = str(error.value)
    assert named in message
    assert "'layer/kernel'" in message and "#" not in message
    without_a_rule = {"sin", "sort", "integer_pow", "gt"}
    assert ("lora_jax.register" in message) == (named in without_a_rule)
    assert ("exclude='layer/kernel'" in message) == (named not in without_a_rule)
    assert "densify='layer/kernel'" in message
    assert "test_refusals.py" in message or error.value.primitive == "return"
    assert error.value.paths == ("layer/kernel",)


@pytest.mark.parametrize("named", [name for name in REFUSED if "jvp" not in name and "vjp" not in name])
@pytest.mark.parametrize("jitted", [False, True], ids=["plain", "inside jit"])
def test_densify_permits_it(named, jitted):
    fn = jax.jit(REFUSED[named]) if jitted else REFUSED[named]
    w = weight("layer/kernel", (4, 4), ("in", "out"), jnp.float64)
    x = X.astype(jnp.float64)
    expected = fn(w.dense(), x)
    np.testing.assert_allclose(lora_jax.lora(fn, densify="layer")(w, x), expected, rtol=0, atol=1e-12)


def test_the_line_is_the_models_own():
    w = weight("w", (4, 4), ("in", "out"), jnp.float32)
    with pytest.raises(lora_jax.RefusedError, match=r"test_refusals\.py:\d+"):
        lora_jax.lora(REFUSED["sin"])(w, X)


def test_paths_with_special_characters_are_escaped_in_the_advice():
    w = weight("a+(b/kernel", (4, 4), ("in", "out"), jnp.float32)
    with pytest.raises(lora_jax.RefusedError) as error:
        lora_jax.lora(REFUSED["sin"])(w, X)
    advice = re.findall("densify='(.*)'", str(error.value))[0].encode().decode("unicode_escape")
    assert lora_jax.lora(REFUSED["sin"], densify=advice)(w, X).shape == (2, 4)


def test_densify_that_matches_nothing_names_the_nearest():
    w = weight("layer/kernel", (4, 4), ("in", "out"), jnp.float32)
    with pytest.raises(ValueError, match="layer/kernel"):
        lora_jax.lora(REFUSED["sin"], densify="kernal")(w, X)


def test_densify_of_another_path_permits_nothing():
    ws = {name: weight(name, (4, 4), ("in", "out"), jnp.float32) for name in ("v", "w")}
    with pytest.raises(lora_jax.RefusedError):
        lora_jax.lora(lambda p, x: x @ jnp.sin(p["w"]) + x @ p["v"], densify="v")(ws, X)


@pytest.mark.parametrize(
    "use",
    [
        lambda w: X @ w,
        lambda w: w + 1,
        lambda w: jnp.dot(X, w),
        lambda w: jnp.einsum("si,io->so", X, w),
        lambda w: lax.dot_general(X, w, (((1,), (0,)), ((), ()))),
        lambda w: w.T,
        lambda w: w.astype(jnp.bfloat16),
        lambda w: jnp.sum(w),
        lambda w: np.asarray(w),
        lambda w: w[0],
        lambda w: jax.jit(lambda w: X @ w)(w),
        lambda w: lora_jax.lora(lambda x: x @ w)(X),
    ],
)
def test_outside_lora_the_error_says_to_wrap_the_call(use):
    w = weight("layer/kernel", (4, 4), ("in", "out"), jnp.float32)
    with pytest.raises(TypeError) as error:
        use(w)
    # lax functions put an error of jax's own before ours, which stays its cause.
    message = f"{error.value} {error.value.__cause__}"
    assert "layer/kernel" in message and "lora_jax.lora(fn)" in message


def test_a_second_rule_is_an_error():
    from jax.extend.core import primitives

    with pytest.raises(ValueError, match="transpose has a rule already"):
        lora_jax.register(primitives.transpose_p)(lambda *args, **params: None)


def test_half_of_a_partition_is_an_error():
    w = weight("layer/kernel", (4, 4), ("in", "out"), jnp.float32)
    for half in lora_jax.partition({"w": w}):
        with pytest.raises(ValueError, match="combine"):
            lora_jax.lora(lambda p, x: x @ p["w"])(half, X)


def test_weights_stacked_after_they_were_made_are_an_error_that_says_where_vmap_belongs():
    w = weight("layer/kernel", (4, 4), ("in", "out"), jnp.float32)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), w)

    def fn(w, x):
        return x @ w

    with pytest.raises(ValueError, match=r"layer/kernel.*jax\.vmap\(lora_jax\.lora\(fn\)"):
        lora_jax.lora(jax.vmap(fn, in_axes=(0, None)))(stacked, X)
    assert jax.vmap(lora_jax.lora(fn), in_axes=(0, None))(stacked, X).shape == (2, 2, 4)


def test_a_backward_pass_that_is_not_a_product_is_refused():
    w = weight("layer/kernel", (4, 4), ("in", "out"), jnp.float64)
    x = X.astype(jnp.float64)

    def loss(b, **options):
        return jnp.sum(lora_jax.lora(lambda w, x: _own_vjp(w, x), **options)(w.replace(b=b), x))

    message = (
        r"'layer/kernel': `custom_vjp_call` at .*test_refusals\.py.*makes the weight's gradient by `sign`"
    )
    with pytest.raises(lora_jax.RefusedError, match=message):
        jax.grad(loss)(w.b)
    expected = jax.grad(lambda b: jnp.sum(_own_vjp(w.replace(b=b).dense(), x)))(w.b)
    np.testing.assert_allclose(
        jax.grad(lambda b: loss(b, densify="layer"))(w.b), expected, rtol=0, atol=1e-12
    )


@jax.custom_vjp
def _reversed_gradient(w, x):
    return x @ w


_reversed_gradient.defvjp(
    lambda w, x: (x @ w + 1, (w, x)), lambda saved, g: (-(saved[1].T @ g) / 3.0, -(g @ saved[0].T))
)


def test_a_custom_vjp_is_followed_as_jax_follows_it():
    """Its own forward pass where it is differentiated, and second derivatives through both its passes."""
    w = weight("layer/kernel", (4, 4), ("in", "out"), jnp.float64)
    x = jax.random.normal(jax.random.key(0), (2, 4), jnp.float64)

    def loss(run):
        def of_factors(ab):
            return jnp.sum(jnp.tanh(run(w.replace(a=ab[0], b=ab[1]), x)) ** 2)

        return of_factors

    def second(run):
        return jax.grad(lambda ab: sum(jnp.sum(jnp.sin(g)) for g in jax.grad(loss(run))(ab)))((w.a, w.b))

    def ours(w, x):
        return lora_jax.lora(lambda w, x: _reversed_gradient(w, x))(w, x)

    def merged(w, x):
        return _reversed_gradient(w.dense(), x)

    for measure in (lambda run: jax.value_and_grad(loss(run))((w.a, w.b)), second):
        assert_same(measure(ours), measure(merged))
    assert_same(ours(w, x), merged(w, x))


def test_a_reshape_without_entries_is_refused_by_name():
    w = weight("layer/kernel", (4, 4), ("in", "out"), jnp.float64)
    with pytest.raises(lora_jax.RefusedError, match="layer/kernel.*without entries"):
        lora_jax.lora(lambda w, x: x @ w[:, :0].reshape(4, 0, 2).reshape(4, 0))(w, X.astype(jnp.float64))


@pytest.mark.parametrize("given", [(), (jnp.cumsum,), (None,)])
def test_registering_what_is_no_primitive_is_refused(given):
    with pytest.raises(TypeError, match="lora_jax.register"):
        lora_jax.register(*given)


def test_outputs_without_a_cotangent_stay_symbolic_zeros():
    """As in jax, whose vmap of a custom_vjp counts on it from 0.12 on."""

    @jax.custom_vjp
    def both(w, x):
        return x @ w, 2.0 * w.sum(0)

    both.defvjp(
        lambda w, x: (both(w, x), (w, x)),
        lambda saved, g: (saved[1].T @ g[0], g[0] @ saved[0].T),
    )
    w = weight("w", (4, 4), ("in", "out"), jnp.float64)
    xs = jax.random.normal(jax.random.key(0), (3, 2, 4), jnp.float64)

    def gradient(run):
        def mapped(w):
            return jax.vmap(lambda x: both(w, x), out_axes=(0, None))(xs)[0]

        return jax.grad(lambda ab: jnp.sum(jnp.sin(run(mapped)(w.replace(a=ab[0], b=ab[1])))))((w.a, w.b))

    assert_same(gradient(lora_jax.lora), gradient(lambda f: lambda w: f(w.dense())))


@pytest.mark.parametrize("wrong", [lambda w: None, lambda w: w.w[0], lambda w: [w.w], lambda w: w.w.sum()])
def test_what_a_rule_returns_is_checked(wrong, monkeypatch):
    from jax.extend.core import primitives

    from lora_jax import interpret

    monkeypatch.setitem(interpret._RULES, primitives.cumprod_p, lambda context, w, **params: wrong(w))
    w = weight("layer/kernel", (4, 4), ("in", "out"), jnp.float32)
    with pytest.raises(TypeError, match=r"the rule for `cumprod` at .*test_refusals\.py.*float32\[4, 4\]"):
        lora_jax.lora(lambda w, x: x @ lax.cumprod(w, axis=0))(w, X)


@pytest.mark.parametrize(
    "change", [{"scale": jnp.ones(4)}, {"a": None}, {"b": jnp.ones((2, 4))}, {"axes": ("in",)}], ids=list
)
def test_the_factors_that_a_rule_returns_are_checked(change, monkeypatch):
    from jax.extend.core import primitives

    from lora_jax import interpret

    def rule(context, w, **params):
        return w.replace(**change)

    monkeypatch.setitem(interpret._RULES, primitives.cumprod_p, rule)
    w = weight("layer/kernel", (4, 4), ("in", "out"), jnp.float32)
    with pytest.raises(TypeError, match=r"the rule for `cumprod` at .*LoraWeight\('layer/kernel'.*"):
        lora_jax.lora(lambda w, x: x @ lax.cumprod(w, axis=0))(w, X)


def test_a_rule_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match="a rule is a function"):
        lora_jax.register("no_such_primitive")(3)


@pytest.mark.parametrize(
    ("options", "message"), [({"key": 0}, "jax.random.key"), ({"densify": True}, "densify='head'")]
)
def test_options_of_the_wrong_kind_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        lora_jax.lora(lambda x: x, **options)


def test_a_batch_axis_is_not_absorbed_where_the_factors_would_outgrow_the_weight():
    w = weight("layer/kernel", (8, 4, 6), ("batch", "in", "out"), jnp.float32)
    with pytest.raises(lora_jax.RefusedError, match=r"layer/kernel.*merges 'batch' and 'in' axes"):
        lora_jax.lora(lambda w, x: x @ w.reshape(32, 6))(w, jnp.ones((2, 32), jnp.float32))


def test_a_function_that_returns_a_constant_beside_the_product():
    @jax.custom_vjp
    def product(w, x):
        return x @ w, 1.0

    product.defvjp(
        lambda w, x: ((x @ w, 1.0), (w, x)), lambda saved, g: (saved[1].T @ g[0], g[0] @ saved[0].T)
    )
    w = weight("w", (4, 4), ("in", "out"), jnp.float64)
    x = X.astype(jnp.float64)

    def gradient(fn):
        return jax.grad(lambda ab: jnp.sum(jnp.sin(fn(ab)[0])))((w.a, w.b))

    ours = gradient(lambda ab: lora_jax.lora(lambda w: product(w, x))(w.replace(a=ab[0], b=ab[1])))
    assert_same(ours, gradient(lambda ab: product(w.replace(a=ab[0], b=ab[1]).dense(), x)))


def test_a_refused_backward_pass_inside_jit_names_the_path():
    w = weight("layer/kernel", (4, 4), ("in", "out"), jnp.float64)
    block = jax.jit(lambda w, x: _own_vjp(w, x))

    def loss(b):
        return jnp.sum(lora_jax.lora(lambda w, x: block(w, x))(w.replace(b=b), X.astype(jnp.float64)))

    with pytest.raises(lora_jax.RefusedError, match=r"^'layer/kernel': .*densify='layer/kernel'"):
        jax.grad(loss)(w.b)


def test_the_base_has_a_gradient_through_a_backward_pass_of_its_own():
    case = next(case for case in CASES if case.name == "custom_vjp_of_a_weight")
    tree, inputs = case.wrapped(jnp.float64, False), case.inputs(jnp.float64)

    def gradient(fn):
        return jax.grad(lambda w: jnp.sum(fn({"w": tree["w"].replace(w=w)}, *inputs)))(tree["w"].w)

    expected = gradient(lambda t, *xs: case.fn({"w": t["w"].dense()}, *xs))
    np.testing.assert_allclose(gradient(lora_jax.lora(case.fn)), expected, rtol=0, atol=1e-12)
