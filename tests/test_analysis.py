"""lora_jax.analysis: every measurement against dense linear algebra in float64, and what does not move it."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import lora_jax
from lora_jax import analysis, cli
from lora_jax.weight import LoraWeight

BOUND = 1e-12
# name: (shape of w, axes, rank, blocks)
LAYOUTS = {
    "matrix": ((7, 5), ("in", "out"), 3, ()),
    "torch's order": ((5, 7), ("out", "in"), 3, ()),
    "rank above both": ((4, 3), ("in", "out"), 6, ()),
    "rank 1": ((4, 3), ("in", "out"), 1, ()),
    "heads": ((6, 2, 3), ("in", "out", "out"), 2, ()),
    "convolution": ((3, 3, 2, 5), ("in", "in", "in", "out"), 4, ()),
    "unit": ((6, 1, 5), ("in", "unit", "out"), 2, ()),
    "layers": ((3, 6, 4), ("batch", "in", "out"), 2, ()),
    "layers in the middle": ((2, 3, 4, 2), ("in", "batch", "out", "batch"), 2, ()),
    "parts": ((6, 9), ("in", "out"), 4, (((0, 2), (0, 3)), ((2, 4), (6, 9)))),
    "parts of layers": ((2, 6, 9), ("batch", "in", "out"), 4, (((0, 2), (0, 3)), ((2, 4), (6, 9)))),
}


def make(name, seed=0):
    shape, axes, rank, blocks = LAYOUTS[name]
    rng = np.random.default_rng(seed)
    batch, inner, outer = (
        [n for n, kind in zip(shape, axes, strict=True) if kind == which] for which in ("batch", "in", "out")
    )
    w, a, b = (
        jnp.asarray(rng.normal(size=size)) for size in (shape, (*batch, *inner, rank), (*batch, rank, *outer))
    )
    return LoraWeight(w, a, b, jnp.asarray(rng.uniform(0.5, 2.0, batch)), axes, name, 0.0, blocks)


def matrices_of(x, axes):
    """An array laid out as w is, as a dictionary of matrices by place."""
    order = [i for kind in ("batch", "in", "out", "unit") for i, k in enumerate(axes) if k == kind]
    sizes = {
        kind: [n for n, k in zip(x.shape, axes, strict=True) if k == kind] for kind in ("batch", "in", "out")
    }
    x = np.asarray(x).transpose(order).reshape(*sizes["batch"], np.prod(sizes["in"]), -1)
    return {place: x[place] for place in np.ndindex(*sizes["batch"])}


def parts_of(w, blocks):
    """The columns that the adapted parts are."""
    return np.concatenate([w[:, slice(*span)] for _, span in blocks], axis=1) if blocks else w


def close(actual, expected, bound=BOUND):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape and actual.dtype == np.float64
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound * max(1.0, np.abs(expected).max()))


def similarity(u1, u2, i, j):
    return np.linalg.norm(u1[:, :i].T @ u2[:, :j]) ** 2 / min(i, j)


# --- Against dense updates -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_svd_is_that_of_the_dense_update(name):
    weight = make(name)
    found = analysis.svd(weight)
    for place, delta in matrices_of(weight.delta(), weight.axes).items():
        u, values, v = (x[place] for x in found)
        k = min(weight.rank, *delta.shape)
        close(values, np.linalg.svd(delta, compute_uv=False)[:k])
        close(u * values @ v.T, delta)
        close(u.T @ u, np.eye(k))
        close(v.T @ v, np.eye(k))


@pytest.mark.parametrize("name", LAYOUTS)
def test_amplification_is_that_of_the_dense_update(name):
    weight = make(name)
    found = analysis.amplification(weight)
    bases = matrices_of(weight.w, weight.axes)
    for place, delta in matrices_of(weight.delta(), weight.axes).items():
        w, delta = (parts_of(x, weight.blocks) for x in (bases[place], delta))
        u, values, vt = np.linalg.svd(delta, full_matrices=False)
        k = min(weight.rank, *delta.shape)
        onto = np.linalg.norm(u[:, :k].T @ w @ vt[:k].T)
        own_u, _, own_vt = np.linalg.svd(w, full_matrices=False)
        close(found.update[place], np.linalg.norm(delta))
        close(found.weight[place], np.linalg.norm(w))
        close(found.onto_update[place], onto)
        close(found.onto_weight[place], np.linalg.norm(own_u[:, :k].T @ w @ own_vt[:k].T))
        close(found.onto_random[place], np.linalg.norm(w) * k / np.sqrt(w.size))
        close(found.factor[place], np.linalg.norm(values) / onto)
        assert found.onto_update[place] <= found.onto_weight[place] * (1 + BOUND)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("of", ["a", "b", "in", "out"])
def test_similarity_is_its_formula_on_dense_singular_vectors(name, of):
    first, second = make(name), make(name, seed=1)
    phi = analysis.subspace_similarity(first, second, of)
    batch = first.scale.shape
    for place in np.ndindex(batch):
        vectors = []
        for weight in (first, second):
            if of == "a":
                x = np.asarray(weight.a)[place].reshape(-1, weight.rank)
            elif of == "b":
                x = np.asarray(weight.live_b)[place].reshape(weight.rank, -1).T
            else:
                delta = matrices_of(weight.delta(), weight.axes)[place]
                x = delta if of == "in" else delta.T
            u, values, _ = np.linalg.svd(x)
            vectors.append(u[:, : np.sum(values > 1e-10)])
        expected = [
            [similarity(*vectors, i, j) for j in range(1, vectors[1].shape[1] + 1)]
            for i in range(1, vectors[0].shape[1] + 1)
        ]
        close(phi[place], expected)


def test_ranks_of_spectra_that_are_known():
    values = np.array(
        [[2.0, 2.0, 2.0, 2.0], [5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0]]
    )
    p = np.array([0.75, 0.25])
    close(analysis.effective_rank(values), [4.0, 1.0, 0.0, np.exp(-np.sum(p * np.log(p)))])
    close(analysis.stable_rank(values), [4.0, 1.0, 0.0, 10 / 9])
    # The singular values of this update are 6 and 2.
    weight = LoraWeight(
        jnp.zeros((2, 2)), jnp.array([[0.0, 3.0], [1.0, 0.0]]), jnp.eye(2), scale=jnp.float64(2)
    )
    close(analysis.svd(weight).values, [6.0, 2.0])


def test_ranks_of_lists_integers_and_numbers_of_any_size():
    close(analysis.effective_rank([2, 2]), 2.0)
    close(analysis.stable_rank([[2, 1, 1], [1, 0, 0]]), [1.5, 1.0])
    for size in (1.5e308, 1e-308):
        close(analysis.effective_rank([size, size]), 2.0)
        close(analysis.stable_rank(np.array([size, size])), 2.0)


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_norms_of_updates_whose_squares_leave_float64(size):
    weight = make("layers")
    found = analysis.amplification(weight.replace(a=weight.a * size, w=weight.w * size))
    for x, y in zip(found[:-1], analysis.amplification(weight)[:-1], strict=True):
        close(x / size, y)


def test_a_float64_part_is_measured_in_float64_where_jax_has_none():
    weight = jax.tree.map(np.asarray, make("parts"))
    with jax.enable_x64(False):
        values, found = analysis.svd(weight).values, analysis.matrices({"k": weight})
    close(values, np.linalg.svd(make("parts").delta(), compute_uv=False)[:4])
    assert all(x.a.dtype == x.b.dtype == np.float64 for x in found.values())


def test_amplification_of_one_part_is_that_of_its_matrix():
    part = make("parts").replace(blocks=(((0, 4), (3, 8)),))
    (matrix,) = analysis.matrices({"k": part}).values()
    for x, y in zip(analysis.amplification(part), analysis.amplification(matrix), strict=True):
        close(x, y)


# --- The controls --------------------------------------------------------------------------------------
# The mean over all spaces along coordinate axes is the mean over all spaces: both have E UUᵀ = (k / m) I.


def test_random_directions_give_the_norm_times_k_over_the_root_of_m_n():
    k, w = 2, np.random.default_rng(0).normal(size=(3, 5))
    squares = [
        np.linalg.norm(w[np.ix_(rows, columns)]) ** 2
        for rows in itertools.combinations(range(3), k)
        for columns in itertools.combinations(range(5), k)
    ]
    weight = LoraWeight(jnp.asarray(w), jnp.asarray(w[:, :k]), jnp.asarray(w[:k]))
    close(analysis.amplification(weight).onto_random ** 2, np.mean(squares))


def test_random_spaces_have_a_similarity_of_the_larger_dimension_over_d():
    first, second = np.eye(5)[:, :2] * [2.0, 1.0], np.eye(5)[:, :3] * [3.0, 2.0, 1.0]
    found = [
        analysis.subspace_similarity(first, second[list(order)]) for order in itertools.permutations(range(5))
    ]
    close(np.mean(found, axis=0), [[1 / 5, 2 / 5, 3 / 5], [2 / 5, 2 / 5, 3 / 5]])


# --- What moves them, and what does not ----------------------------------------------------------------


@pytest.mark.parametrize("of", ["a", "b", "in", "out"])
def test_similarity_with_itself_is_one_and_it_is_symmetric(of):
    first, second = make("layers"), make("layers", seed=1)
    close(analysis.subspace_similarity(first, first, of), np.ones((3, 2, 2)))
    one, other = (
        analysis.subspace_similarity(first, second, of),
        analysis.subspace_similarity(second, first, of),
    )
    close(one, np.swapaxes(other, -1, -2))


def test_similarity_is_never_more_than_one():
    for seed in range(20):
        x = np.random.default_rng(seed).normal(size=(30, 8))
        assert (analysis.subspace_similarity(x, x) <= 1).all()


def test_similarity_is_one_less_the_projection_metric_over_p():
    first, second = np.random.default_rng(0).normal(size=(2, 6, 4))
    phi = analysis.subspace_similarity(first, second)
    u1, u2 = (np.linalg.svd(x)[0] for x in (first, second))
    for p in range(1, 5):
        p1, p2 = (u[:, :p] @ u[:, :p].T for u in (u1, u2))
        close(phi[p - 1, p - 1], 1 - np.linalg.norm(p1 - p2) ** 2 / 2 / p)


def test_orthogonal_spaces_have_none():
    close(
        analysis.subspace_similarity(np.eye(4)[:, :2] * [2.0, 1.0], np.eye(4)[:, 2:] * [2.0, 1.0]),
        np.zeros((2, 2)),
    )


def test_a_rotation_inside_the_rank_changes_nothing():
    first, second = make("matrix"), make("matrix", seed=1)
    q = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    turned = first.replace(a=first.a @ q, b=q.T @ first.b)
    # Any invertible matrix keeps the update, and not A's singular vectors.
    m = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [1.0, 0.0, 1.0]])
    skewed = first.replace(a=first.a @ m, b=np.linalg.inv(m) @ first.b)
    for other, same in ((turned, ("a", "b", "in", "out")), (skewed, ("in", "out"))):
        close(analysis.svd(other).values, analysis.svd(first).values)
        for x, y in zip(analysis.amplification(other), analysis.amplification(first), strict=True):
            close(x, y)
        for of in same:
            close(
                analysis.subspace_similarity(other, second, of),
                analysis.subspace_similarity(first, second, of),
            )
    phi = [analysis.subspace_similarity(x, second) for x in (first, skewed)]
    assert np.abs(phi[0] - phi[1]).max() > 0.01


def test_the_scale_counts_where_it_should():
    first = make("matrix")
    tripled = first.replace(scale=-3 * first.scale)
    one, three = analysis.amplification(first), analysis.amplification(tripled)
    close(three.update, 3 * one.update)
    close(three.factor, 3 * one.factor)
    close(three.onto_update, one.onto_update)
    values, larger = analysis.svd(first).values, analysis.svd(tripled).values
    close(larger, 3 * values)
    for rank in (analysis.effective_rank, analysis.stable_rank):
        close(rank(larger), rank(values))
    for of in ("a", "b", "in", "out"):
        close(analysis.subspace_similarity(first, tripled, of), np.ones((3, 3)))


def test_bfloat16_is_measured_as_the_numbers_that_it_holds():
    weight = make("layers")
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weight)
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), low)
    close(analysis.svd(low).values, analysis.svd(wide).values, bound=0)
    for x, y in zip(analysis.amplification(low), analysis.amplification(wide), strict=True):
        close(x, y, bound=0)


# --- No update, and less than the rank -----------------------------------------------------------------


def test_an_update_of_zero():
    weight = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, rank=2, targets="kernel")["kernel"]
    values = analysis.svd(weight).values
    close(values, [0.0, 0.0])
    assert analysis.effective_rank(values) == analysis.stable_rank(values) == 0
    found = analysis.amplification(weight)
    assert found.update == found.onto_update == found.onto_weight == found.onto_random == 0
    assert np.isnan(found.factor)
    assert np.isnan(analysis.subspace_similarity(weight, weight, "in")).all()
    assert np.isnan(analysis.subspace_similarity(weight, weight, "b")).all()
    close(analysis.subspace_similarity(weight, weight), np.ones((2, 2)))


@pytest.mark.parametrize("name", ["matrix", "rank above both", "rank 1", "heads", "layers"])
def test_an_update_that_cancels_is_zero_up_to_rounding(name):
    weight = make(name)
    rank = len(weight.axes_of("batch"))
    a, b = jnp.concatenate([weight.a, weight.a], -1), jnp.concatenate([weight.b, -weight.b], rank)
    twice = weight.replace(a=a, b=b)
    found = analysis.amplification(twice)
    assert np.isnan(found.factor).all()
    close(found.onto_update, np.zeros(weight.scale.shape), bound=0)
    for of in ("in", "out"):
        assert np.isnan(analysis.subspace_similarity(twice, weight, of)).all()


def test_zeros_that_fill_up_smaller_ranks_count_for_nothing():
    full = make("layers")
    alive = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    ragged = full.replace(a=full.a * alive[:, None], b=full.b * alive[:, :, None])
    found, phi = analysis.amplification(ragged), analysis.subspace_similarity(ragged, full)
    single = LoraWeight(full.w[1], full.a[1][:, :1], full.b[1][:1], full.scale[1])
    for x, y in zip(found, analysis.amplification(single), strict=True):
        close(x[1], y)
    close(phi[1][0], analysis.subspace_similarity(single, LoraWeight(full.w[1], full.a[1], full.b[1]))[0])
    assert np.isnan(phi).tolist() == [[[False] * 2] * 2, [[False] * 2, [True] * 2], [[True] * 2] * 2]
    assert list(analysis.matrices({"x": ragged})) == ["x[0]", "x[1]"]
    assert [x.rank for x in analysis.matrices({"x": ragged}).values()] == [2, 1]


def test_a_weight_with_nothing_in_those_directions_is_amplified_without_bound():
    weight = LoraWeight(jnp.diag(jnp.array([1.0, 0.0])), jnp.eye(2)[:, 1:], jnp.eye(2)[1:])
    assert np.isinf(analysis.amplification(weight).factor)
    weight = make("matrix")
    for a in (weight.a, 1e3 * weight.a):
        projected = weight.w - a @ np.linalg.lstsq(a, weight.w)[0]
        assert np.isinf(analysis.amplification(weight.replace(w=projected, a=a)).factor)


# --- A tree's matrices ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_matrices_have_the_update_and_the_weight(name):
    weight = make(name)
    found = analysis.matrices({"block": {name: weight}})
    deltas, bases = matrices_of(weight.delta(), weight.axes), matrices_of(weight.w, weight.axes)
    expected = {}
    for place in deltas:
        label = f"block/{name}" + "".join(f"[{i}]" for i in place)
        if weight.blocks:
            for _, (start, stop) in weight.blocks:
                part = slice(start, stop)
                expected[f"{label}[:, {start}:{stop}]"] = deltas[place][:, part], bases[place][:, part]
        else:
            expected[label] = deltas[place], bases[place]
    assert list(found) == list(expected)
    for label, x in found.items():
        delta, base = expected[label]
        assert x.path == label and x.axes == ("in", "out") and not x.blocks
        assert x.a.dtype == weight.a.dtype and x.b.dtype == weight.b.dtype
        close(x.delta(), delta)
        close(np.asarray(x.w), base)
        close(analysis.svd(x).values, np.linalg.svd(delta, compute_uv=False)[: min(x.rank, *delta.shape)])


def test_a_part_in_several_pieces_is_one_matrix():
    params = {"qkv": {"kernel": jnp.ones((6, 12))}}
    wrapped = lora_jax.wrap(params, rank=2, parts={"qkv": [[(0, 2), (6, 8)], (10, 12)]})
    kernel = wrapped["qkv"]["kernel"]
    kernel = kernel.replace(b=jnp.asarray(np.random.default_rng(0).normal(size=kernel.b.shape)))
    found = analysis.matrices({"qkv": {"kernel": kernel}})
    assert list(found) == ["qkv/kernel[:, 0:2 and 6:8]", "qkv/kernel[:, 10:12]"]
    delta = np.asarray(kernel.delta(jnp.float64))
    for x, outputs in zip(found.values(), ([0, 1, 6, 7], [10, 11]), strict=True):
        close(x.delta(), delta[:, outputs])


def test_matrices_of_a_module_and_of_an_adapter():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(4, 6, rngs=rngs)
            self.head = nnx.Linear(6, 2, rngs=rngs)

    module = lora_jax.wrap(Model(nnx.Rngs(0)), rank=2, train="head")
    assert list(analysis.matrices(module)) == ["up/kernel"]
    (update,) = analysis.matrices(lora_jax.adapter(module).leaves).values()
    assert update.w is None and update.rank == 2
    close(analysis.svd(update).values, [0.0, 0.0])
    assert list(analysis.matrices(lora_jax.adapter(module))) == ["up/kernel"]
    # The leaves that the module holds are Variables.
    close(analysis.svd(module.up.kernel).values, [0.0, 0.0])
    assert analysis.amplification(module.up.kernel).update == 0
    close(analysis.subspace_similarity(module.up.kernel, module.up.kernel), np.ones((2, 2)))


def test_a_leaf_in_a_linen_box():
    box = linen.Partitioned(make("matrix"), ("x", "y"))
    close(analysis.svd(box).values, analysis.svd(box.value).values, bound=0)
    close(analysis.subspace_similarity(box, box.value), np.ones((3, 3)))


def test_matrices_have_the_names_of_the_tree():
    weight = make("matrix")
    assert list(analysis.matrices({"q": {"kernel": weight}, "v": weight.replace(path="")})) == [
        "q/kernel",
        "v",
    ]
    assert list(analysis.matrices(weight)) == ["matrix"]


def test_inspect_shows_the_very_numbers(tmp_path, capsys):
    weight = make("layers")
    lora_jax.save_adapter(tmp_path / "a", {"kernel": weight})
    assert cli.main(["inspect", str(tmp_path / "a"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["targets"]
    for row, (name, matrix) in zip(rows, analysis.matrices({"kernel": weight}).items(), strict=True):
        values = analysis.svd(matrix).values
        assert row["name"] == name
        assert row["effective_rank"] == pytest.approx(float(analysis.effective_rank(values)), rel=BOUND)
        assert row["spectral_norm"] == pytest.approx(values[0], rel=BOUND)


# --- What is refused -----------------------------------------------------------------------------------


def refused():
    weight = make("matrix")
    trainable, frozen = lora_jax.partition({"k": weight})
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), weight)
    shape = jax.ShapeDtypeStruct((3, 2), jnp.float32)
    abstract = LoraWeight(shape, shape, jax.ShapeDtypeStruct((2, 2), jnp.float32), path="k")
    state = lora_jax.TrainState.create({"k": weight}, optax.sgd(1.0), jax.random.key(0))
    full = lora_jax.FullWeight(weight.w, jnp.float32, "head/kernel")
    traced = lambda f, x=weight: jax.jit(lambda x: f(x) and None)(x)  # noqa: E731
    unfit = lambda **changes: lambda: analysis.svd(weight.replace(**changes))  # noqa: E731
    overlapping = weight.replace(blocks=(((0, 1), (0, 3)), ((1, 3), (2, 5))))
    phi = analysis.subspace_similarity
    return {
        "an array": (
            lambda: analysis.svd(weight.w),
            TypeError,
            "float64\\[7, 5\\] is no LoraWeight; give a leaf",
        ),
        "a half": (lambda: analysis.svd(frozen["k"]), ValueError, "'matrix' is one half of a partition"),
        "no w": (
            lambda: analysis.amplification(trainable["k"].replace(scale=weight.scale)),
            ValueError,
            "no w.*attach",
        ),
        "stacked": (lambda: analysis.svd(stacked), ValueError, "'matrix' has axes.*Take one of the stack"),
        "abstract": (
            lambda: analysis.svd(abstract),
            TypeError,
            "'k' is a ShapeDtypeStruct, which has no values; give the arrays",
        ),
        "complex": (
            lambda: phi(weight.a.astype(complex), weight),
            TypeError,
            "complex128.* not one of real",
        ),
        "diverged": (
            lambda: analysis.svd(weight.replace(b=weight.b * jnp.nan)),
            ValueError,
            "^b of the LoraWeight at 'matrix' has an entry that is infinite.*diverged",
        ),
        "overflowing": (
            lambda: analysis.svd(weight.replace(a=weight.a * 1e200, b=weight.b * 1e200)),
            ValueError,
            "'matrix' overflows float64",
        ),
        "infinite w": (
            lambda: analysis.amplification(weight.replace(w=weight.w + jnp.inf)),
            ValueError,
            "^w of the LoraWeight at 'matrix' has an entry that is infinite",
        ),
        "another space": (
            lambda: phi(weight, make("heads")),
            ValueError,
            r"'matrix'.*\(7, 3\).*'heads'.*\(6, 2\)",
        ),
        "another batch": (lambda: phi(make("layers"), np.ones((6, 2))), ValueError, "batch axes"),
        "a vector": (lambda: phi(weight, np.ones(7)), ValueError, r"float64\[7\] is no matrix"),
        "of what": (lambda: phi(weight, weight, "w"), ValueError, "of is 'w'; write 'a', 'b', 'in' or 'out'"),
        "negative": (lambda: analysis.effective_rank([1.0, -1.0]), ValueError, "effective_rank.*below zero"),
        "a number": (lambda: analysis.stable_rank(2.0), ValueError, "stable_rank takes singular values"),
        "words": (lambda: analysis.stable_rank("abc"), TypeError, "stable_rank was given has dtype <U3"),
        "a plain tree": (
            lambda: analysis.matrices({"k": weight.w}),
            ValueError,
            "matrices was given a tree without",
        ),
        "in full alone": (
            lambda: analysis.matrices({"k": lora_jax.FullWeight(weight.w, jnp.float32)}),
            ValueError,
            "no leaf is adapted",
        ),
        "overlap": (lambda: analysis.matrices({"k": overlapping}), ValueError, "'k' overlap"),
        "diverged in a tree": (
            lambda: analysis.matrices({"k": weight.replace(a=weight.a * jnp.nan)}),
            ValueError,
            "^a of the LoraWeight at 'k' has an entry that is infinite",
        ),
        "infinite scale": (unfit(scale=jnp.inf), ValueError, "^scale of the LoraWeight at 'matrix'"),
        "in full": (lambda: analysis.svd(full), TypeError, "'head/kernel' was trained in full; it has no"),
        "similarity in full": (lambda: phi(weight, full), TypeError, "'head/kernel' was trained in full"),
        "a state": (
            lambda: analysis.matrices(state),
            ValueError,
            "one half.*or state.wrapped of a TrainState",
        ),
        "svd traced": (
            lambda: traced(analysis.svd),
            TypeError,
            "^a of .*'matrix' is traced; call it outside",
        ),
        "svd mapped": (
            lambda: jax.vmap(analysis.svd)(jax.tree.map(lambda x: x[None], weight)),
            TypeError,
            "^a of .*'matrix' is traced; call it outside of jit, grad and vmap",
        ),
        "w traced": (
            lambda: jax.jit(lambda w: analysis.amplification(weight.replace(w=w)).factor)(weight.w),
            TypeError,
            "^w of .*'matrix' is traced",
        ),
        "similarity traced": (lambda: traced(lambda x: phi(x, x), weight.w), TypeError, "is traced; call it"),
        "matrices traced": (
            lambda: traced(analysis.matrices, {"k": weight}),
            TypeError,
            "'k' is traced; call",
        ),
        "rank traced": (
            lambda: traced(analysis.effective_rank, weight.a),
            TypeError,
            "effective_rank.*is traced",
        ),
        "ranks apart": (unfit(b=weight.b[:2]), ValueError, r"'matrix' has axes.*\(2, 5\).*do not fit"),
        "outputs apart": (unfit(b=weight.b[:, :4]), ValueError, r"'matrix' has axes.*\(3, 4\).*do not fit"),
        "a scale for each": (
            unfit(scale=jnp.ones(2)),
            ValueError,
            "'matrix' has axes.*Take one of the stack",
        ),
        "rank 0": (unfit(a=weight.a[:, :0], b=weight.b[:0]), ValueError, r"'matrix'.*\(7, 0\).*no size 0"),
        "no layers": (
            lambda: analysis.svd(jax.tree.map(lambda x: x[:0], make("layers"))),
            ValueError,
            r"'layers'.*\(0, 6, 2\).*no size 0",
        ),
        "a rank of all zeros": (
            lambda: analysis.matrices({"k": weight.replace(a=0 * weight.a, b=0 * weight.b)}),
            ValueError,
            "'k', a and b are both zero",
        ),
        "one name twice": (
            lambda: analysis.matrices({"q": make("layers"), "q[0]": weight}),
            ValueError,
            r"two matrices would be called 'q\[0\]'",
        ),
        "an svd": (
            lambda: analysis.effective_rank(analysis.svd(weight)),
            TypeError,
            r"and no SVD; write effective_rank\(svd\(weight\).values\)",
        ),
        "a weight": (lambda: analysis.stable_rank(weight), TypeError, "and no LoraWeight; write stable_rank"),
    }


@pytest.mark.parametrize("case", refused())
def test_what_is_refused_is_named(case):
    call, kind, text = refused()[case]
    with pytest.raises(kind, match=text):
        call()
