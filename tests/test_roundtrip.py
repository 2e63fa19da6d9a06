"""What is wrapped, parted, taken out or merged comes back: the same bits, structure and buffers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, freeze
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.params import (
    Adapter,
    adapter,
    attach,
    combine,
    fingerprint,
    labels,
    merge,
    partition,
    swap,
    unmerge,
    wrap,
)
from lora_jax.report import summary
from lora_jax.tree import leaves_with_path
from lora_jax.weight import FullWeight, LoraWeight, is_wrapped_leaf

DTYPES = [jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16]


def array(dtype, *shape):
    """Numbers of both signs, with a -0.0 among them."""
    values = np.random.default_rng(sum(shape)).normal(size=shape)
    values.flat[0] = -0.0
    return jnp.asarray(values, dtype)


def plain(dtype) -> Any:
    return {
        "embed": {"embedding": array(dtype, 11, 8)},
        "layers": {
            "mlp": {"kernel": array(dtype, 3, 8, 6), "bias": array(dtype, 3, 6)},
            "norm": {"scale": array(dtype, 3, 8)},
        },
        "up": {"kernel": array(dtype, 8, 4), "bias": array(dtype, 4)},
        "head": {"kernel": array(dtype, 4, 3), "bias": array(dtype, 3)},
        "steps": jnp.arange(3),
    }


def boxed(dtype):
    tree = plain(dtype)
    tree["up"]["kernel"] = nn.Partitioned(tree["up"]["kernel"], ("in", "out"))
    tree["layers"]["mlp"]["kernel"] = nn.LogicallyPartitioned(
        tree["layers"]["mlp"]["kernel"], ("layers", "embed", "mlp")
    )
    return tree


class Net(nnx.Module):
    def __init__(self, dtype):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(8, 4, param_dtype=dtype, rngs=rngs)
        self.again = self.up
        self.bn = nnx.BatchNorm(4, param_dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 3, param_dtype=dtype, rngs=rngs)


def equinox(dtype):
    import equinox as eqx

    return eqx.nn.MLP(8, 3, 4, 1, dtype=dtype, key=jax.random.key(0))


def haiku(dtype):
    return {
        "mlp/~/linear_0": {"w": array(dtype, 8, 4), "b": array(dtype, 4)},
        "head": {"w": array(dtype, 4, 3)},
    }


TREES = {
    "dict": plain,
    "FrozenDict": lambda dtype: freeze(plain(dtype)),
    "boxed": boxed,
    "State": lambda dtype: nnx.split(Net(dtype))[1],
    "Module": Net,
    "Equinox": equinox,
    "Haiku": haiku,
}
TRAIN = {"Equinox": "layers/1", "Haiku": "head"}
EXCLUDE = {"Equinox": "layers/1"}

everywhere = pytest.mark.parametrize("kind", TREES)
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)


def options(kind):
    return {"train": TRAIN.get(kind, "head"), "exclude": EXCLUDE.get(kind)}


def disturbed(wrapped: Any, seed: int = 0) -> Any:
    """The same with random b, and shifted full weights, so that the update is not zero."""
    rng = np.random.default_rng(seed)

    def leaf(node):
        if isinstance(node, LoraWeight):
            return node.replace(b=jnp.asarray(rng.normal(size=node.b.shape), node.b.dtype))
        if isinstance(node, FullWeight):
            return node.replace(value=node.value + jnp.ones_like(node.value))
        return node

    if isinstance(wrapped, nnx.Module):
        graphdef, state = nnx.split(wrapped)
        return nnx.merge(graphdef, jax.tree.map(leaf, state, is_leaf=is_wrapped_leaf))
    return jax.tree.map(leaf, wrapped, is_leaf=is_wrapped_leaf)


def state_of(tree):
    return nnx.split(tree)[1] if isinstance(tree, nnx.Module) else tree


def structure(tree):
    if isinstance(tree, nnx.Module):
        graphdef, state = nnx.split(tree)
        return graphdef, jax.tree.structure(state)
    return jax.tree.structure(tree)


def bits(x):
    if not hasattr(x, "dtype"):
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        x = jax.random.key_data(x)
    return str(x.dtype), x.shape, np.asarray(x).tobytes()


def assert_identical(first, second):
    assert structure(first) == structure(second)
    for one, other in zip(jax.tree.leaves(state_of(first)), jax.tree.leaves(state_of(second)), strict=True):
        assert bits(one) == bits(other)


def wrapped_leaves(tree):
    leaves = leaves_with_path(state_of(tree), is_wrapped_leaf)
    return {path: leaf for path, leaf in leaves if is_wrapped_leaf(leaf)}


@everywhere
@in_every_dtype
def test_merge_of_wrap_is_the_tree_bit_for_bit(kind, dtype):
    params = TREES[kind](dtype)
    wrapped = wrap(params, 2, **options(kind))
    assert {type(leaf) for leaf in wrapped_leaves(wrapped).values()} == {LoraWeight, FullWeight}
    assert type(wrapped) is type(params)
    assert_identical(merge(wrapped), params)


@everywhere
def test_wrap_partition_and_combine_copy_no_base_weight(kind):
    params = TREES[kind](jnp.float32)
    base = dict(leaves_with_path(state_of(params)))
    wrapped = wrap(params, 2, **options(kind))
    again = combine(*partition(wrapped))
    assert structure(again) == structure(wrapped)
    for tree in (wrapped, again):
        for path, leaf in leaves_with_path(state_of(tree), is_wrapped_leaf):
            if isinstance(leaf, FullWeight):
                # The trained copy is donated by train steps, so it may not be the user's buffer.
                assert leaf.value.unsafe_buffer_pointer() != base[path].unsafe_buffer_pointer()
            elif isinstance(leaf, LoraWeight):
                assert leaf.w is base[path]
            else:
                assert leaf is base[path]
    mine, back = jax.tree.leaves(state_of(wrapped)), jax.tree.leaves(state_of(again))
    assert all(one is other for one, other in zip(mine, back, strict=True))


@everywhere
def test_partition_parts_what_is_trained(kind):
    wrapped = wrap(TREES[kind](jnp.bfloat16), 2, **options(kind))
    trainable, frozen = partition(wrapped)
    full = [x for x in wrapped_leaves(wrapped).values() if isinstance(x, FullWeight)]
    lora = [x for x in wrapped_leaves(wrapped).values() if isinstance(x, LoraWeight)]
    assert len(jax.tree.leaves(trainable)) == 2 * len(lora) + len(full)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(trainable))
    rest = jax.tree.leaves(frozen[1] if kind == "Module" else frozen)
    assert len(rest) + len(jax.tree.leaves(trainable)) == len(jax.tree.leaves(state_of(wrapped)))
    counts = {x: jax.tree.leaves(labels(trainable)).count(x) for x in ("a", "b", "full")}
    assert counts == {"a": len(lora), "b": len(lora), "full": len(full)}
    assert jax.tree.structure(labels(trainable)) == jax.tree.structure(trainable)


def test_partition_of_a_small_tree_in_one_literal():
    w, bias = array(jnp.float32, 4, 3), array(jnp.float32, 3)
    wrapped = wrap({"mlp": {"kernel": w, "bias": bias}, "norm": {"scale": bias}}, 2, train="mlp/bias")
    leaf, full = wrapped["mlp"]["kernel"], wrapped["mlp"]["bias"]
    trainable, frozen = partition(wrapped)
    assert trainable["norm"]["scale"] is None and frozen["norm"]["scale"] is bias
    assert vars(trainable["mlp"]["kernel"]) == vars(leaf) | {"w": None, "scale": None}
    assert vars(frozen["mlp"]["kernel"]) == vars(leaf) | {"a": None, "b": None}
    assert trainable["mlp"]["bias"].value is full.value and frozen["mlp"]["bias"].value is None


def test_partition_keeps_what_the_tree_held_as_none():
    params = {"kernel": array(jnp.float32, 4, 3), "bias": None}
    again = combine(*partition(wrap(params, 2)))
    assert set(again) == {"kernel", "bias"} and again["bias"] is None


def test_gradients_go_through_combine():
    wrapped = disturbed(wrap(plain(jnp.float64), 2, dtype=jnp.float64, train="head"))
    trainable, frozen = partition(wrapped)
    x = array(jnp.float64, 5, 8)

    def loss(trainable):
        params = merge(combine(trainable, frozen))
        return jnp.sum((x @ params["up"]["kernel"]) @ params["head"]["kernel"])

    grads = jax.jit(jax.grad(loss))(trainable)
    assert jax.tree.structure(grads) == jax.tree.structure(trainable)
    up = wrapped["up"]["kernel"]
    upstream = x.T @ jnp.ones((5, 3)) @ wrapped["head"]["kernel"].value.T
    np.testing.assert_allclose(grads["up"]["kernel"].a, upstream @ up.b.T, rtol=1e-12)
    np.testing.assert_allclose(grads["up"]["kernel"].b, up.a.T @ upstream, rtol=1e-12)


@everywhere
@in_every_dtype
def test_merge_adds_wide_and_rounds_once(kind, dtype):
    wrapped = disturbed(wrap(TREES[kind](dtype), 2, alpha=3, **options(kind)))
    merged = dict(leaves_with_path(state_of(merge(wrapped))))
    for path, leaf in wrapped_leaves(wrapped).items():
        assert merged[path].dtype == dtype
        if isinstance(leaf, FullWeight):
            assert bits(merged[path]) == bits(leaf.value.astype(dtype))
            continue
        letters = "".join({"batch": "z", "in": "i", "out": "o"}[kind] for kind in leaf.axes)
        z = "z" * letters.count("z")
        a, b = np.asarray(leaf.a, np.float64), np.asarray(leaf.b, np.float64)
        exact = np.asarray(leaf.w, np.float64) + 1.5 * np.einsum(f"{z}ir,{z}ro->{letters}", a, b)
        # Half a unit of the leaf's dtype, and what the product in float32 (float64) may be off.
        rounding, product = float(jnp.finfo(dtype).eps) / 2, 1e-12 if dtype == jnp.float64 else 4e-6
        actual = np.asarray(merged[path], np.float64)
        np.testing.assert_allclose(actual, exact, rtol=rounding * 1.01, atol=product)


@pytest.mark.parametrize("kind", ["dict", "Module"])
def test_merge_into_another_dtype_casts_every_floating_leaf(kind):
    params = TREES[kind](jnp.float32)
    wrapped = disturbed(wrap(params, 2, **options(kind)))
    merged = state_of(merge(wrapped, dtype=jnp.bfloat16))
    for one, other in zip(jax.tree.leaves(merged), jax.tree.leaves(state_of(params)), strict=True):
        floating = jnp.issubdtype(other.dtype, jnp.floating)
        assert one.dtype == (jnp.bfloat16 if floating else other.dtype)
    wide = dict(leaves_with_path(state_of(merge(wrapped, dtype=jnp.float64))))
    assert {str(x.dtype) for x in wide.values() if jnp.issubdtype(x.dtype, jnp.floating)} == {"float64"}


def test_merge_under_jit_and_eval_shape():
    params = plain(jnp.float32)
    assert_identical(jax.jit(lambda p: merge(wrap(p, 2)))(params), params)
    wrapped = wrap(params, 2)
    assert_identical(jax.jit(merge)(wrapped), params)
    abstract = jax.eval_shape(lambda p: wrap(p, 2, train="head"), params)
    concrete = wrap(params, 2, train="head")
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    assert [x.shape for x in jax.tree.leaves(abstract)] == [x.shape for x in jax.tree.leaves(concrete)]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_shardings_are_kept(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    specs = {"kernel": PartitionSpec("x", "y"), "bias": PartitionSpec("y")}
    values = {"kernel": array(jnp.float32, 8, 4), "bias": array(jnp.float32, 4)}
    params = {name: jax.device_put(values[name], NamedSharding(mesh, specs[name])) for name in specs}
    assert fingerprint(params) == fingerprint(values)
    wrapped = wrap(params, 2, train="bias")
    assert wrapped["bias"].value.sharding == params["bias"].sharding
    for tree in (wrapped, disturbed(wrapped)):
        for merged in (merge(tree), jax.jit(merge)(tree)):
            assert {name: x.sharding.spec for name, x in merged.items()} == specs
    assert_identical(merge(wrapped), values)
    again = unmerge(merge(disturbed(wrapped)), disturbed(wrapped))
    assert again["kernel"].w.sharding == params["kernel"].sharding


def test_shared_variables_stay_shared_and_the_model_is_left_alone():
    net = Net(jnp.float32)
    kernel = net.up.kernel.get_value()
    wrapped = wrap(net, 2)
    assert wrapped.again is wrapped.up
    assert isinstance(wrapped.up.kernel.get_value(), LoraWeight)
    assert net.up.kernel.get_value() is kernel
    merged = merge(combine(*partition(disturbed(wrapped))))
    assert merged.again is merged.up
    assert isinstance(merged.up.kernel, nnx.Param)
    assert not np.array_equal(merged.up.kernel.get_value(), kernel)


def test_boxes_and_frozen_dicts_stay():
    wrapped = wrap(boxed(jnp.float32), 2)
    assert isinstance(wrapped["up"]["kernel"], nn.Partitioned)
    assert merge(wrapped)["layers"]["mlp"]["kernel"].names == ("layers", "embed", "mlp")
    assert isinstance(merge(wrap(freeze(plain(jnp.float32)), 2)), FrozenDict)


# --- Initial values -------------------------------------------------------------------------------


def test_initial_factors():
    params = {
        "layers": {"kernel": jnp.ones((3, 400, 6)), "bias": jnp.ones((3, 6))},
        "embed": {"embedding": jnp.ones((5, 2000))},
    }
    wrapped = wrap(params, 4, targets=["layers", "embed"])
    a, b = wrapped["layers"]["kernel"].a, wrapped["layers"]["kernel"].b
    assert a.dtype == b.dtype == jnp.float32 and a.shape == (3, 400, 4) and not b.any()
    assert 0.99 / 20 < jnp.abs(a).max() <= 1 / 20
    assert abs(float(a.std()) - 1 / 20 / 3**0.5) < 1e-3
    assert not np.allclose(a[0], a[1]) and not np.allclose(a[1], a[2])
    table = wrapped["embed"]["embedding"]
    assert not table.a.any() and abs(float(table.b.std()) - 1) < 0.05

    normal = wrap(params, 4, targets="layers", init="gaussian", dtype=jnp.bfloat16)["layers"]["kernel"]
    assert normal.a.dtype == normal.b.dtype == jnp.bfloat16 and not normal.b.any()
    assert abs(float(normal.a.astype(jnp.float32).std()) - 1 / 4) < 0.01


def test_a_convolutions_fan_in_is_the_whole_window():
    params = {"conv": {"kernel": jnp.ones((5, 5, 16, 3)), "bias": jnp.ones(3)}}
    a = wrap(params, 4)["conv"]["kernel"].a
    assert a.shape == (5, 5, 16, 4) and 0.99 / 20 < jnp.abs(a).max() <= 1 / 20


def test_another_target_does_not_reseed_the_others():
    params = plain(jnp.float32)
    few, many = wrap(params, 2, targets="up"), wrap(params, 2)
    assert_identical(few["up"]["kernel"], many["up"]["kernel"])
    other = wrap(params, 2, key=jax.random.key(1))
    assert not np.array_equal(other["up"]["kernel"].a, many["up"]["kernel"].a)


def test_a_custom_initializer():
    def init(key, w, target):
        return w - jnp.ones_like(w), jnp.ones((8, target.rank)), jnp.ones((target.rank, 4)) / target.rank

    params = {"up": {"kernel": array(jnp.float64, 8, 4)}}
    wrapped = wrap(params, 2, init={"up": init}, dtype=jnp.float64)
    np.testing.assert_allclose(merge(wrapped)["up"]["kernel"], params["up"]["kernel"], rtol=0, atol=1e-12)


# --- The adapter ----------------------------------------------------------------------------------


@everywhere
def test_attach_of_adapter_is_the_wrapped_tree(kind):
    params = TREES[kind](jnp.bfloat16)
    wrapped = disturbed(wrap(params, 2, **options(kind)))
    made = adapter(wrapped)
    assert set(made.leaves) == set(wrapped_leaves(wrapped))
    assert all(leaf.w is None for leaf in made.leaves.values() if isinstance(leaf, LoraWeight))
    assert_identical(attach(params, made), wrapped)
    assert_identical(attach(params, wrapped), wrapped)
    assert_identical(merge(attach(params, made)), merge(wrapped))


def test_attach_lists_every_difference():
    params = plain(jnp.float32)
    made = adapter(wrap(params, 2, targets=["up", "layers"], train="head/bias"))
    other = plain(jnp.float32)
    other["up"]["kernel"] = other["up"]["kernel"].at[1, 2].add(jnp.float32(1))
    other["embed"]["embedding"] = other["embed"]["embedding"].astype(jnp.bfloat16)
    other["layers"]["mlp"]["kernel"] = jnp.ones((3, 8, 7), jnp.float32)
    del other["head"]["bias"]
    other["new"] = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="does not belong to this base") as error:
        attach(other, made)
    text = str(error.value)
    for line in (
        "up/kernel: other values",
        "embed/embedding: dtype bfloat16, the adapter was made for float32",
        "layers/mlp/kernel: shape (3, 8, 7), the adapter was made for (3, 8, 6)",
        "head/bias: the base has no such leaf",
        "new/kernel: the base the adapter was made for has no such leaf",
    ):
        assert line in text
    assert "head/kernel" not in text and "norm/scale" not in text


def test_attach_without_check_takes_other_values_and_no_other_shapes():
    params = plain(jnp.float32)
    made = adapter(wrap(params, 2))
    other = jax.tree.map(lambda x: x + jnp.ones_like(x), params)
    assert attach(other, made, check=False)["up"]["kernel"].w is other["up"]["kernel"]
    other["up"]["kernel"] = jnp.ones((8, 5), jnp.float32)
    with pytest.raises(ValueError, match=r"up/kernel: shape \(8, 5\)"):
        attach(other, made, check=False)
    with pytest.raises(ValueError, match="wrapped already"):
        attach(wrap(params, 2), made)


@everywhere
def test_swap_keeps_the_base_and_the_structure(kind):
    params = TREES[kind](jnp.float32)
    first = wrap(params, 2, **options(kind))
    second = disturbed(wrap(params, 2, alpha=5, key=jax.random.key(1), **options(kind)))
    for given in (second, adapter(second)):
        swapped = swap(first, given)
        assert structure(swapped) == structure(first)
        assert_identical(swapped, second)
        mine, theirs = wrapped_leaves(swapped), wrapped_leaves(first)
        assert all(mine[p].w is theirs[p].w for p in mine if isinstance(mine[p], LoraWeight))


def test_swap_compiles_nothing_and_takes_other_ranks():
    params = plain(jnp.float32)
    first = wrap(params, 2, dropout=0.1)
    traced = []

    @jax.jit
    def run(tree):
        traced.append(1)
        return merge(tree)["up"]["kernel"]

    run(first)
    run(swap(first, wrap(params, 2, alpha=3)))
    assert len(traced) == 1
    assert swap(first, wrap(params, 3))["up"]["kernel"].rank == 3


def test_swap_lists_what_does_not_fit():
    params = plain(jnp.float32)
    first = wrap(params, 2, targets=["up", "layers"])
    with pytest.raises(ValueError, match="layers/mlp/kernel: only in the wrapped tree"):
        swap(first, wrap(params, 2, targets="up"))
    with pytest.raises(ValueError, match="head/kernel: only in the adapter"):
        swap(first, wrap(params, 2, targets="all"))
    with pytest.raises(ValueError, match="up/kernel: a LoraWeight here, a FullWeight in the adapter"):
        swap(first, wrap(params, 2, targets="layers", train="up/kernel"))
    other = wrap(params, 2, targets=["up", "layers"], axes={"up/kernel": ("out", "in")})
    with pytest.raises(ValueError, match="up/kernel: axes"):
        swap(first, other)
    wide = params | {"up": {"kernel": jnp.ones((8, 5))}}
    with pytest.raises(ValueError, match=r"up/kernel: shape \(8, 4\) here, shape \(8, 5\)"):
        swap(first, wrap(wide, 2, targets=["up", "layers"]))
    with pytest.raises(ValueError, match="one half of a partition"):
        swap(first, partition(first)[0])


@everywhere
def test_unmerge_takes_out_what_was_merged(kind):
    params = TREES[kind](jnp.float64)
    wrapped = disturbed(wrap(params, 2, dtype=jnp.float64, exclude=EXCLUDE.get(kind)))
    for given in (wrapped, adapter(wrapped)):
        again = unmerge(merge(wrapped), given)
        assert structure(again) == structure(wrapped)
        for one, other in zip(
            jax.tree.leaves(state_of(again)), jax.tree.leaves(state_of(wrapped)), strict=True
        ):
            if jnp.issubdtype(getattr(one, "dtype", int), jnp.floating):
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def test_unmerge_leaves_what_was_trained_in_full():
    params = {"up": {"kernel": jnp.ones((4, 3))}, "head": {"kernel": jnp.ones((3, 2), jnp.bfloat16)}}
    wrapped = disturbed(wrap(params, 2, targets="up", train="head"))
    merged = merge(wrapped)
    merged["head"]["kernel"] = merged["head"]["kernel"] + 1  # trained on after it was merged
    again = unmerge(merged, wrapped)
    np.testing.assert_array_equal(again["head"]["kernel"].value, merged["head"]["kernel"])
    assert again["head"]["kernel"].value.dtype == jnp.float32
    np.testing.assert_allclose(merge(again)["up"]["kernel"], merged["up"]["kernel"], rtol=1e-12)
    assert merge(again)["head"]["kernel"].dtype == jnp.bfloat16


def test_unmerge_refuses_what_is_wrapped_and_what_overflows():
    leaf = LoraWeight(jnp.full((2, 2), 6e4, jnp.float16), jnp.ones((2, 1)), jnp.full((1, 2), -1e4), path="k")
    with pytest.raises(ValueError, match="unmerge: the parameters are wrapped, at 'k'"):
        unmerge({"k": leaf}, {"k": leaf})
    with pytest.raises(ValueError, match="unmerging gives infinite or undefined entries .* at 'k'"):
        unmerge({"k": leaf.w}, {"k": leaf})


@pytest.mark.parametrize("call", [merge, lambda tree: unmerge({"k": tree["k"].w}, tree)])
@pytest.mark.parametrize(
    ("w", "message"),
    [
        (jnp.ones((2, 2), jnp.int8), "'k' has dtype int8, in which there is no update"),
        (jax.ShapeDtypeStruct((2, 2), jnp.float32), "'k' is a ShapeDtypeStruct"),
    ],
)
def test_a_base_without_an_update_is_refused(call, w, message):
    with pytest.raises(TypeError, match=message):
        call({"k": LoraWeight(w, jnp.ones((2, 1)), jnp.full((1, 2), 0.4), path="k")})


def test_float64_is_never_rounded_to_float32_without_a_word():
    params = {"up": {"kernel": np.ones((4, 3))}, "head": {"kernel": np.ones((3, 2))}}
    with jax.enable_x64(False):
        for chosen in ({"targets": "up"}, {"targets": "head"}, {"targets": (), "train": "head"}):
            with pytest.raises(TypeError, match="has dtype float64, which jax rounds to float32"):
                wrap(params, 2, **chosen)
        leaf = LoraWeight(np.ones((4, 3)), np.ones((4, 1)), np.ones((1, 3)), path="k")
        with pytest.raises(TypeError, match="'k' has dtype float64"):
            merge({"k": leaf})


# --- Fingerprint ----------------------------------------------------------------------------------


@in_every_dtype
def test_fingerprint_sees_any_change(dtype):
    w = array(dtype, 6, 5)
    mark = fingerprint({"w": w})["w"]
    raw = np.asarray(w)
    changed = [w.T.reshape(6, 5), w.at[0, 0].set(jnp.asarray(0.0, dtype))]
    as_int = raw.view(f"uint{raw.itemsize * 8}")
    for bit in range(raw.itemsize * 8):
        flipped = as_int.copy()
        flipped[3, 2] ^= np.array(1 << bit, flipped.dtype)
        changed.append(jnp.asarray(flipped.view(raw.dtype)))
    for i, j in ((1, 2), (0, 29), (3, 19)):
        swapped = raw.copy().reshape(-1)
        swapped[[i, j]] = swapped[[j, i]]
        changed.append(jnp.asarray(swapped.reshape(6, 5)))
    assert all(fingerprint({"w": other})["w"] != mark for other in changed)
    assert 0 <= mark < 2**32


def test_fingerprint_of_powers_of_two_far_apart():
    """Position weights alone would miss this: 1.0 and 2.0 differ by a power of two in their bits."""
    w = jnp.ones((1, 1024), jnp.float32).at[0, 0].set(jnp.float32(2))
    moved = jnp.ones((1, 1024), jnp.float32).at[0, 512].set(jnp.float32(2))
    assert fingerprint({"w": w}) != fingerprint({"w": moved})


def test_fingerprint_is_that_of_the_base():
    params = plain(jnp.float32)
    marks = fingerprint(params)
    assert set(marks) == {
        "embed/embedding",
        "head/kernel",
        "layers/mlp/bias",
        "layers/mlp/kernel",
        "layers/norm/scale",
        "up/kernel",
    }
    assert fingerprint(disturbed(wrap(params, 2))) == marks
    trained = fingerprint(wrap(params, 2, train="head"))
    assert trained == {path: mark for path, mark in marks.items() if path != "head/kernel"}


def test_fingerprint_is_one_number_on_every_version():
    """Saved adapters hold it, so it may not depend on jax."""
    w = jnp.arange(12, dtype=jnp.float32).reshape(3, 4)
    assert fingerprint({"w": w, "x": w.astype(jnp.bfloat16), "y": w.astype(jnp.float64)}) == {
        "w": 41332913,
        "x": 2199409894,
        "y": 245425611,
    }


# --- Whole-tree optimizers ------------------------------------------------------------------------


@jax.numpy_dtype_promotion("standard")  # which optax's Adam needs
def test_labels_part_an_optimizer():
    trainable, _ = partition(wrap(plain(jnp.float32), 2, train="head"))
    tx = optax.partition({"a": optax.sgd(1.0), "b": optax.sgd(2.0), "full": optax.set_to_zero()}, labels)
    grads = jax.tree.map(jnp.ones_like, trainable)
    updates: Any = tx.update(grads, tx.init(trainable), trainable)[0]
    assert float(updates["up"]["kernel"].a.max()) == -1 and float(updates["up"]["kernel"].b.max()) == -2
    assert not updates["head"]["kernel"].value.any()


# --- Summary --------------------------------------------------------------------------------------


def test_summary_lists_what_becomes_of_every_matrix():
    table = summary(wrap(plain(jnp.float32), {"up": 3, ".*": 2}, alpha=6, train="head"))
    rows = {row.path: row for row in table.rows}
    assert [(row.path, row.status, row.why) for row in table.rows] == [
        ("embed/embedding", "skipped", "embedding"),
        ("head/bias", "trained in full", ""),
        ("head/kernel", "trained in full", ""),
        ("layers/mlp/bias", "skipped", "bias"),
        ("layers/mlp/kernel", "adapted", ""),
        ("layers/norm/scale", "skipped", "norm"),
        ("up/kernel", "adapted", ""),
    ]
    mlp, up = rows["layers/mlp/kernel"], rows["up/kernel"]
    assert (mlp.shape, mlp.axes, mlp.rank, mlp.alpha) == ((3, 8, 6), ("batch", "in", "out"), 2, 6.0)
    assert (mlp.trainable, mlp.total, mlp.wasteful) == (3 * 2 * (8 + 6), 3 * 8 * 6, False)
    assert (up.trainable, up.total, up.wasteful) == (3 * (8 + 4), 32, True)
    assert table.trainable == 84 + 36 + 15
    assert table.total == 88 + 15 + 18 + 144 + 24 + 32 + 4
    text = str(table)
    assert "r(m+n) >= mn" in text.splitlines()[-2] and "embedding" in text
    assert text.splitlines()[0].split() == "path shape axes rank trainable of share status".split()
    assert max(map(len, text.splitlines())) < 120


def test_summary_of_an_abstract_tree():
    abstract = jax.eval_shape(lambda p: wrap(p, 2), plain(jnp.float32))
    assert str(summary(abstract)) == str(summary(wrap(plain(jnp.float32), 2)))


def test_an_adapter_is_frozen_data():
    made = adapter(wrap(plain(jnp.float32), 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.leaves = {}  # type: ignore[misc]
    assert isinstance(made, Adapter) and set(made.fingerprint) <= set(made.shapes)
