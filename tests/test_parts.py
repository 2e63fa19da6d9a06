"""Parts of fused kernels, ranks by layer, and several adapters in one vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_equivalence import assert_same

import lora_jax

FUSED = {"qkv": [(0, 4), [(9, 10), (11, 12)]]}  # of 12 outputs: unequal, and one in two pieces


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def params():
    return {
        "qkv": {"kernel": normal(0, (8, 12)), "bias": normal(1, (12,))},
        "layers": {"kernel": normal(2, (4, 12, 8)), "bias": normal(3, (4, 8))},
    }


def model(p, x):
    def layer(x, p):
        return jnp.tanh(jnp.tile(x, (1, 2))[:, :12] @ p["kernel"] + p["bias"]), None

    return jax.lax.scan(layer, x, p["layers"])[0] @ p["qkv"]["kernel"] + p["qkv"]["bias"]


def trained(wrapped):
    """With random factors where they are trained, which for b is in the dead entries of blocks too."""

    def leaf(w):
        if not isinstance(w, lora_jax.LoraWeight):
            return w
        n = w.scale.ndim
        live = jnp.any(w.a != 0, axis=tuple(range(n, w.a.ndim - 1)))
        live = jnp.expand_dims(live, tuple(range(n + 1, w.b.ndim)))
        return w.replace(b=jnp.where(live, normal(5, w.b.shape), 0.0))

    return jax.tree.map(leaf, wrapped, is_leaf=lambda x: isinstance(x, lora_jax.LoraWeight))


def fused():
    return trained(lora_jax.wrap(params(), rank=2, targets="qkv", parts=FUSED, dtype=jnp.float64))


def test_disabled_parts_of_a_fused_kernel_are_exactly_the_base():
    wrapped = fused()
    delta = np.asarray(lora_jax.merge(wrapped)["qkv"]["kernel"] - params()["qkv"]["kernel"])
    changed = [*range(4), 9, 11]
    assert np.all(np.delete(delta, changed, axis=1) == 0) and np.all(delta[:, changed] != 0)
    x = normal(9, (3, 8))
    out = lora_jax.lora(model)(wrapped, x)
    assert_same(out, model(lora_jax.merge(wrapped), x))
    still = np.delete(np.asarray(out - model(params(), x)), changed, axis=1)
    assert np.all(still == 0)


def test_each_part_has_columns_of_its_own():
    weight = fused()["qkv"]["kernel"]
    assert weight.a.shape == (8, 4)
    assert weight.blocks == (((0, 2), (0, 4)), ((2, 4), (9, 10)), ((2, 4), (11, 12)))
    delta = np.asarray(weight.delta())
    assert np.linalg.matrix_rank(delta[:, :4]) == 2 and np.linalg.matrix_rank(delta[:, 4:]) == 2


def test_disabled_parts_stay_zero_after_training():
    tx = optax.adamw(1e-2, weight_decay=0.1)
    step = lora_jax.make_train_step(lambda p, x, key: jnp.sum(model(p, x) ** 2), tx)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        state = lora_jax.TrainState.create(fused(), tx, jax.random.key(0))
        for _ in range(3):
            state, _ = step(state, normal(9, (3, 8)))
    before, after = params()["qkv"]["kernel"], lora_jax.merge(state.wrapped)["qkv"]["kernel"]
    dead = np.delete(np.arange(12), [*range(4), 9, 11])
    np.testing.assert_array_equal(after[:, dead], before[:, dead])
    assert np.all(after[:, :4] != before[:, :4])


def test_a_part_of_several_out_axes():
    tree = {"qkv": {"kernel": normal(0, (6, 3, 2, 4))}}
    wrapped = lora_jax.wrap(
        tree, rank=2, axes={"qkv": ("in", "out", "out", "out")}, parts={"qkv": [(0, 8), (16, 24)]}
    )
    delta = trained(wrapped)["qkv"]["kernel"].delta()
    assert jnp.all(delta[:, 1] == 0) and jnp.all(delta[:, 0] != 0) and jnp.all(delta[:, 2] != 0)


def test_masked_entries_are_not_counted():
    (row,) = [row for row in lora_jax.summary(fused()).rows if row.rank]
    assert (row.rank, row.alpha, row.trainable) == (2, 2.0, 2 * (8 + 4) + 2 * (8 + 2))


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_parts_and_ranks_survive_a_file(tmp_path, suffix):
    for wrapped in (fused(), by_layer()):
        target = tmp_path / f"{len(list(tmp_path.iterdir()))}{suffix}"
        lora_jax.save_adapter(target, wrapped)
        again = lora_jax.load_adapter(target, params())
        assert jax.tree.structure(again) == jax.tree.structure(wrapped)
        for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(wrapped), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_swapping_in_other_blocks_is_refused():
    whole = lora_jax.wrap(params(), rank=4, targets="qkv", dtype=jnp.float64)
    with pytest.raises(ValueError, match="qkv/kernel: blocks"):
        lora_jax.swap(fused(), whole)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"qkv": [(0, 13)]}, r"\(0, 13\) is not a range of its 12 outputs"),
        ({"qkv": [(0, 5), (4, 6)]}, "overlaps"),
        ({"qkv": [(3, 3)]}, "not a range"),
        ({"qkv": "q"}, "is no range"),
        ({"qkv": [(0, 1.5)]}, "is no range"),
        ({"qkv": []}, "are empty"),
        ({"kqv": [(0, 1)]}, "matches no path.*qkv/kernel"),
    ],
)
def test_bad_parts_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        lora_jax.wrap(params(), rank=2, parts=parts)


@pytest.mark.parametrize(
    "parts",
    [[range(0, 4), range(8, 12)], np.array([[0, 4], [8, 12]]), ([0, 4], (8, 12)), [(0, 4), [(8, 12)]]],
)
def test_ranges_may_be_written_in_any_way(parts):
    ours = lora_jax.wrap(params(), rank=2, targets="qkv", parts={"qkv": parts})["qkv"]["kernel"]
    plain = lora_jax.wrap(params(), rank=2, targets="qkv", parts={"qkv": [(0, 4), (8, 12)]})["qkv"]["kernel"]
    assert ours.blocks == plain.blocks


def test_adapters_with_different_dropout_are_not_stacked():
    first, second = (lora_jax.wrap(params(), rank=2, targets="qkv", dropout=rate) for rate in (0.0, 0.5))
    with pytest.raises(ValueError, match=r"qkv/kernel: .* in adapter 0, .*dropout 0\.5 in adapter 1"):
        lora_jax.stack([first, second])


def test_parts_that_are_no_mapping_are_refused():
    with pytest.raises(TypeError, match="parts="):
        lora_jax.wrap(params(), rank=2, parts=[(0, 4)])


# Layers of a scan


def by_layer():
    return trained(
        lora_jax.wrap(params(), [2, 0, 3, 1], alpha=[2, 9, 6, 1], targets="layers", dtype=jnp.float64)
    )


def test_layers_of_a_scan_have_their_own_rank_and_alpha():
    weight = by_layer()["layers"]["kernel"]
    assert weight.scale.tolist() == [1.0, 0.0, 2.0, 1.0]
    assert [int(np.linalg.matrix_rank(d)) for d in weight.delta()] == [2, 0, 3, 1]
    x = normal(9, (3, 8))
    assert_same(lora_jax.lora(model)(by_layer(), x), model(lora_jax.merge(by_layer()), x))


def test_what_a_rank_leaves_out_has_no_gradient():
    trainable, frozen = lora_jax.partition(by_layer())

    def loss(trainable):
        return jnp.sum(lora_jax.lora(model)(lora_jax.combine(trainable, frozen), normal(9, (3, 8))) ** 2)

    weight = jax.grad(loss)(trainable)["layers"]["kernel"]
    for layer, rank in enumerate([2, 0, 3, 1]):
        assert np.all(np.asarray(weight.a)[layer, :, rank:] == 0)
        assert np.all(np.asarray(weight.b)[layer, rank:] == 0)
        assert np.all(np.asarray(weight.b)[layer, :rank] != 0)


def test_only_live_columns_are_counted():
    (row,) = [row for row in lora_jax.summary(by_layer()).rows if row.rank]
    assert (row.rank, row.alpha, row.trainable) == (3, None, (2 + 3 + 1) * (12 + 8))


@pytest.mark.parametrize("rank", [[1, 2], [0, 0, 0, 0], [1, -1, 1, 1], [[1, 1, 1, 1]], [1, 1.5, 1, 1]])
def test_bad_ranks_of_layers_are_refused(rank):
    with pytest.raises(ValueError, match="layers/kernel"):
        lora_jax.wrap(params(), rank, targets="layers")


def test_a_list_for_a_leaf_that_is_not_stacked_is_refused():
    with pytest.raises(ValueError, match="'qkv/kernel'.*not stacked"):
        lora_jax.wrap(params(), [1, 2], targets="qkv")


# Several adapters on one base


def three():
    made = [
        lora_jax.wrap(
            params(), rank, alpha=2 * rank + 1, key=jax.random.key(rank), dtype=jnp.float64, train="qkv/bias"
        )
        for rank in (1, 3, 2)
    ]
    return [trained(tree) for tree in made]


def run(t, frozen, x):
    return lora_jax.lora(model)(lora_jax.combine(t, frozen), x)


def test_a_batch_of_different_adapters_shares_the_base():
    adapters, xs = three(), normal(9, (3, 5, 8))
    _, frozen = lora_jax.partition(adapters[0])
    out = jax.jit(jax.vmap(run, (0, None, 0)))(lora_jax.stack(adapters), frozen, xs)
    for one, x, tree in zip(out, xs, adapters, strict=True):
        assert_same(one, model(lora_jax.merge(tree), x))


def test_one_adapter_comes_out_of_the_stack():
    adapters = three()
    _, frozen = lora_jax.partition(adapters[0])
    for i, tree in enumerate(adapters):
        one = lora_jax.combine(jax.tree.map(lambda x, i=i: x[i], lora_jax.stack(adapters)), frozen)
        assert_same(lora_jax.merge(one), lora_jax.merge(tree))


def test_training_a_stack_is_training_each():
    adapters, xs = three(), normal(9, (3, 5, 8))
    _, frozen = lora_jax.partition(adapters[0])
    trainable, scales = lora_jax.partition(lora_jax.stack(adapters))
    assert all(label in ("a", "b", "full") for label in jax.tree.leaves(lora_jax.labels(trainable)))

    def loss(t, x):
        return jnp.sum(run(t, frozen, x) ** 2)

    def total(trainable):
        return jnp.sum(jax.vmap(loss)(lora_jax.combine(trainable, scales), xs))

    stacked = jax.jit(jax.grad(total))(trainable)
    for i, tree in enumerate(adapters):
        alone, frozen_alone = lora_jax.partition(tree)
        expected = jax.grad(lambda t, f=frozen_alone, i=i: jnp.sum(run(t, f, xs[i]) ** 2))(alone)
        for name in ("qkv", "layers"):
            rank = tree[name]["kernel"].rank
            ours, theirs = stacked[name]["kernel"], expected[name]["kernel"]
            assert_same(ours.a[i][..., :rank], theirs.a)
            assert_same(ours.b[i][..., :rank, :], theirs.b)
            assert np.all(np.asarray(ours.a[i][..., rank:]) == 0)
            assert np.all(np.asarray(ours.b[i][..., rank:, :]) == 0)


def test_stacks_of_different_forms_are_refused():
    first = lora_jax.wrap(params(), rank=2)
    with pytest.raises(ValueError, match="layers/kernel: only in adapter 0"):
        lora_jax.stack([first, lora_jax.wrap(params(), rank=2, targets="qkv")])
    with pytest.raises(ValueError, match="qkv/kernel"):
        lora_jax.stack([first, lora_jax.wrap(params(), rank=2, parts=FUSED)])
    with pytest.raises(ValueError, match="no list of adapters"):
        lora_jax.stack([])


def test_a_stack_without_vmap_is_refused():
    adapters = three()
    _, frozen = lora_jax.partition(adapters[0])
    together = lora_jax.combine(lora_jax.stack(adapters), frozen)
    for use in (
        lora_jax.merge,
        lora_jax.summary,
        lora_jax.adapter,
        lambda tree: lora_jax.lora(model)(tree, normal(9, (3, 8))),
    ):
        with pytest.raises(ValueError, match=r"kernel' has axes .* stacked.*jax.vmap"):
            use(together)


def test_one_adapter_of_a_stack_is_saved_as_it_was(tmp_path):
    adapters = three()
    _, frozen = lora_jax.partition(adapters[0])
    one = lora_jax.combine(jax.tree.map(lambda x: x[2], lora_jax.stack(adapters)), frozen)
    with pytest.raises(ValueError, match="stacked"):
        lora_jax.save_adapter(tmp_path / "all", lora_jax.combine(lora_jax.stack(adapters), frozen))
    lora_jax.save_adapter(tmp_path / "one", one)
    assert_same(
        lora_jax.merge(lora_jax.load_adapter(tmp_path / "one", params())), lora_jax.merge(adapters[2])
    )
