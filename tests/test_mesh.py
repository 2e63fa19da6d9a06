"""One train step on any mesh: the curve of a single device, shardings and where they come from."""

from collections.abc import Callable

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from newest import some

import lora_jax
from experiments.meshes import model as small
from lora_jax.sharding import factor_specs

AUTO = AxisType.Auto


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax's and flax's own functions mix dtypes
        yield


def mesh_of(*sizes, names=("data", "fsdp", "tensor"), kind=AUTO):
    n = int(np.prod(sizes))
    return jax.make_mesh(
        sizes, names[: len(sizes)], axis_types=(kind,) * len(sizes), devices=jax.devices()[:n]
    )


# --- The curve ------------------------------------------------------------------------------------

# Every shape of the mesh, and with it a kind of model, of axes and of numbers, so that every pair of
# those occurs; experiments/meshes runs all of them.
COMBINATIONS = [
    (shape, small.KINDS[i % 2], list(small.TYPES)[i // 2 % 2], list(small.BOUNDS)[(i + i // 2 + i // 4) % 2])
    for i, shape in enumerate(small.SHAPES)
]


@pytest.mark.parametrize("shape, kind, types, dtype", some(COMBINATIONS, 3))
def test_every_mesh_gives_the_curve_of_a_single_device(shape, kind, types, dtype):
    assert small.deviation(shape, kind, types, dtype) < small.BOUNDS[dtype]
    losses = small.single_device(kind, dtype)
    assert losses[-1] < 0.9 * losses[0]


def test_pairs_of_properties_all_occur():
    for i in range(1, 4):
        for j in range(i + 1, 4):
            values = {(row[i], row[j]) for row in COMBINATIONS}
            assert len(values) == 4


@pytest.mark.parametrize("types", small.TYPES)
def test_microbatches_weighted_by_tokens_give_the_curve_of_the_whole_batch(types):
    """Rows have from one to seven tokens that count, so no mean of means would do."""
    assert small.deviation((2, 2, 2), "linen", types, "float64", accumulate=2) < small.BOUNDS["float64"]


# --- Shardings and where they come from -----------------------------------------------------------

PARAMS = {
    "embed": jnp.ones((32, 16)),
    "layers": {"up": {"kernel": jnp.ones((4, 16, 64)), "bias": jnp.ones((4, 64))}},
    "head": {"kernel": jnp.ones((16, 7))},
}
RULES = {"up/kernel": P(None, "fsdp", "tensor"), "embed": P("tensor")}


def wrapped_params(**changes):
    return lora_jax.wrap(
        {**PARAMS, **changes}, rank=2, targets="up/kernel", train="head", axes={"up": ("batch", "in", "out")}
    )


def specs_of(tree):
    return {jax.tree_util.keystr(keys): x.spec for keys, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_the_factors_parts_are_those_of_their_weight():
    rows = [
        (P("x", "y"), ("in", "out"), (P("x"), P(None, "y"), P())),
        (P("x", None, ("y", "z")), ("out", "in", "out"), (P(), P(None, "x", ("y", "z")), P())),
        (P("x", "y", "z"), ("in", "batch", "out"), (P("y", "x"), P("y", None, "z"), P("y"))),
        (P(None, "y"), ("unit", "in", "out"), (P("y"), P(), P())),
    ]
    for spec, axes, expected in rows:
        assert factor_specs(spec, axes) == expected


def test_a_whole_state_by_rules_and_by_default():
    mesh = mesh_of(2, 2, 2)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    state = lora_jax.TrainState.create(wrapped_params(), tx, jax.random.key(0))
    where = lora_jax.shardings(state, mesh, RULES)
    assert jax.tree.structure(where) == jax.tree.structure(state)
    up, mu = where.wrapped["layers"]["up"], where.opt_state[1][0].mu
    assert up["kernel"].w.spec == P(None, "fsdp", "tensor")
    for node in (up["kernel"], mu["layers"]["up"]["kernel"]):
        assert (node.a.spec, node.b.spec) == (P(None, "fsdp"), P(None, None, "tensor"))
    assert where.wrapped["embed"].spec == P("tensor")
    assert where.wrapped["head"]["kernel"].value.spec == mu["head"]["kernel"].value.spec == P()
    assert where.step.spec == where.key.spec == where.opt_state[1][0].count.spec == P()
    # Without rules the largest axis that divides; a vector stays whole, also where layers stack it.
    where = lora_jax.shardings(state, mesh).wrapped
    assert where["embed"].spec == where["head"]["kernel"].value.spec == P(("fsdp", "tensor"))
    assert where["layers"]["up"]["kernel"].w.spec == P(None, None, ("fsdp", "tensor"))
    assert where["layers"]["up"]["bias"].spec == P()
    assert lora_jax.shardings(state, mesh_of(8, 1, 1)).wrapped["embed"].spec == P()


def test_what_an_optimizer_keeps_in_another_shape_is_replicated():
    mesh, tx = mesh_of(1, 4, 2), optax.adafactor(1e-3, min_dim_size_to_factor=2)
    state = lora_jax.TrainState.create(wrapped_params(), tx, jax.random.key(0))
    jax.device_put(state, lora_jax.shardings(state, mesh, RULES))


@pytest.mark.parametrize(
    "rules",
    [
        list(RULES.items()),
        [
            ("up/kernel", P(None, "fsdp", "tensor")),
            ("layers", P()),
            (lambda path, x: path == "embed", P("tensor")),
        ],
        {
            "embed": P("tensor"),
            "layers": {"up": {"kernel": P(None, "fsdp", "tensor"), "bias": P()}},
            "head": {"kernel": P()},
        },
    ],
    ids=["pairs", "predicate", "tree"],
)
def test_rules_come_as_pairs_and_as_a_tree(rules):
    where = lora_jax.shardings(wrapped_params(), mesh_of(1, 4, 2), rules)
    assert where["embed"].spec == P("tensor")
    assert where["layers"]["up"]["kernel"].a.spec == P(None, "fsdp")


def test_arrays_that_lie_on_the_mesh_stay_where_they_are():
    mesh = mesh_of(1, 4, 2)
    placed = jax.device_put(PARAMS["embed"], NamedSharding(mesh, P(None, "fsdp")))
    assert lora_jax.shardings({**PARAMS, "embed": placed}, mesh)["embed"].spec == P(None, "fsdp")
    assert lora_jax.shardings({**PARAMS, "embed": placed}, mesh, RULES)["embed"].spec == P("tensor")


def test_linen_metadata_says_where():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.initializers.lecun_normal()
            x = nn.Dense(64, kernel_init=nn.with_partitioning(init, ("fsdp", "tensor")), name="up")(x)
            return nn.Dense(
                16, kernel_init=nn.with_logical_partitioning(init, ("mlp", "embed")), name="down"
            )(x)

    mesh, x = mesh_of(1, 4, 2), jnp.ones((2, 16))
    wrapped = lora_jax.wrap(Model().init(jax.random.key(0), x)["params"], rank=2, targets=".*")
    with pytest.raises(
        ValueError, match=r"'down/kernel' has an axis named 'mlp'.*\('mlp', mesh axis or None\)"
    ):
        lora_jax.shardings(wrapped, mesh)
    where = lora_jax.shardings(wrapped, mesh, [("embed", "fsdp"), ("mlp", "fsdp"), ("mlp", "tensor")])
    assert where["up"]["kernel"].value.w.spec == P("fsdp", "tensor")
    assert where["up"]["kernel"].value.b.spec == P(None, "tensor")
    # The first rule of a name whose mesh axis is free: embed comes behind mlp and finds fsdp taken.
    assert where["down"]["kernel"].value.w.spec == P("fsdp")


def test_nnx_metadata_says_where():
    class Model(nnx.Module):
        def __init__(self, rngs):
            init = nnx.initializers.lecun_normal()
            self.up = nnx.Linear(
                16,
                64,
                rngs=rngs,
                kernel_init=nnx.with_partitioning(init, ("fsdp", "tensor"), eager_sharding=False),
            )

    model = lora_jax.wrap(Model(nnx.Rngs(0)), rank=2, targets=".*kernel")
    where = lora_jax.shardings(model, mesh_of(1, 4, 2))
    kernel = (
        where["up"]["kernel"].get_value()
        if hasattr(where["up"]["kernel"], "get_value")
        else where["up"]["kernel"]
    )
    assert kernel.w.spec == P("fsdp", "tensor") and kernel.a.spec == P("fsdp")


@pytest.mark.parametrize(
    "rules, error, message",
    [
        ({"upp/kernel": P()}, ValueError, "'upp/kernel' matches no parameter.*'layers/up/kernel'"),
        ({"up/kernel": P("model")}, ValueError, "'layers/up/kernel'.*no axis 'model'.*'tensor'"),
        ({"head": P(None, "fsdp")}, ValueError, "axis 1 of 'head/kernel' has size 7, which 'fsdp' of size 4"),
        ({"head": P(None, None, "fsdp")}, ValueError, r"'head/kernel' has shape \(16, 7\).*3 parts"),
        ([("up", 3)], TypeError, r"\('up', 3\) is no sharding rule"),
        ({"embed": {"x": 3}}, TypeError, "hold 3 at 'embed/x'"),
        ({"embed": P("fsdp", "fsdp")}, ValueError, "'embed'.*uses 'fsdp' twice"),
        ({"embed": P(P.UNCONSTRAINED)}, ValueError, "'embed'.*write None for an axis that stays whole"),
        ([("embed", "fsdp")], ValueError, "axes by name, such as 'embed', and no parameter names its axes"),
    ],
)
def test_rules_that_do_not_fit_are_refused(rules, error, message):
    with pytest.raises(error, match=message):
        lora_jax.shardings(PARAMS, mesh_of(1, 4, 2), rules)


# --- Placing --------------------------------------------------------------------------------------


def test_an_adapter_lies_where_its_weight_lies():
    mesh = mesh_of(1, 4, 2)
    placed = jax.device_put(PARAMS, lora_jax.shardings(PARAMS, mesh, RULES))
    wrapped = wrapped_params(**placed)
    assert specs_of(jax.tree.map(lambda x: x.sharding, wrapped)) == specs_of(
        lora_jax.shardings(wrapped_params(), mesh, RULES)
    )
    alone = wrapped_params()
    for ours, theirs in zip(jax.tree.leaves(wrapped), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    state = lora_jax.TrainState.create(wrapped, optax.adam(1e-3), jax.random.key(0))
    where = lora_jax.shardings(state, mesh)
    for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    again = lora_jax.attach(placed, lora_jax.adapter(alone))
    assert specs_of(jax.tree.map(lambda x: x.sharding, again)) == specs_of(
        jax.tree.map(lambda x: x.sharding, wrapped)
    )


def test_a_base_that_is_read_in_parts_is_never_whole(monkeypatch):
    """Every device asks for its own part of the weight; the factors and the state are made in parts."""
    mesh, asked = mesh_of(8, names=("fsdp",)), []

    def read(index):
        asked.append(tuple(len(range(*part.indices(n))) for part, n in zip(index, (64, 32), strict=True)))
        return np.ones(asked[-1], np.float32)

    kernel = jax.make_array_from_callback((64, 32), NamedSharding(mesh, P("fsdp")), read)
    wrapped = lora_jax.wrap({"up": {"kernel": kernel}}, rank=2)
    state = lora_jax.TrainState.create(wrapped, optax.adam(1e-3), jax.random.key(0))
    assert set(asked) == {(8, 32)}
    for node in (state.trainable, state.opt_state[0].mu, state.opt_state[0].nu):
        assert {shard.data.shape for shard in node["up"]["kernel"].a.addressable_shards} == {(8, 2)}
    assert state.wrapped["up"]["kernel"].w is kernel


def test_a_state_is_made_in_place():
    mesh, tx = mesh_of(1, 4, 2), optax.adam(1e-3)

    def init(key):
        params = {"up": {"kernel": jax.random.normal(key, (256, 512))}, "bias": jnp.ones(512)}
        return lora_jax.TrainState.create(lora_jax.wrap(params, rank=2, targets="up"), tx, key)

    rules = {"up": P("fsdp", "tensor")}
    made, alone = lora_jax.sharded_init(init, mesh, rules)(jax.random.key(0)), init(jax.random.key(0))
    where = lora_jax.shardings(alone, mesh, rules)
    for x, y, sharding in zip(*map(jax.tree.leaves, (made, alone, where)), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, rtol=1e-6)
    memory = jax.jit(init, out_shardings=where).lower(jax.random.key(0)).compile().memory_analysis()
    # The kernel's eighth, what is drawn to make it, and the small rest: no device holds all of it.
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < alone.frozen["up"]["kernel"].w.nbytes / 2


def test_look_ups_on_explicit_axes():
    mesh = mesh_of(2, 4, names=("data", "model"), kind=AxisType.Explicit)
    weight = lora_jax.LoraWeight(
        *(jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(16, 8), (16, 2), (2, 8)]))
    )
    tokens = jnp.arange(12).reshape(4, 3)

    def rows(table, tokens):
        spec = P("data", None, "model") if explicit else None
        return table.at[tokens].get(out_sharding=spec)

    def loss(a, b, weight, tokens):
        out = lora_jax.lora(rows)(weight.replace(a=a, b=b), tokens)
        return jnp.sum(jnp.sin(out)), out

    explicit = False
    expected = jax.grad(loss, (0, 1), has_aux=True)(weight.a, weight.b, weight, tokens)
    explicit = True
    with jax.set_mesh(mesh):
        weight = jax.device_put(weight, lora_jax.shardings({"w": weight}, mesh, {"w": P(None, "model")})["w"])
        tokens = jax.device_put(tokens, NamedSharding(mesh, P("data")))
        found = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(weight.a, weight.b, weight, tokens)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_a_process_reads_what_its_devices_hold():
    assert lora_jax.process_shard(mesh_of(2, 2, 2)) == (0, 1)


# --- The step -------------------------------------------------------------------------------------


def mse(params, batch, key):
    return jnp.mean((jnp.tanh(batch["x"] @ params["up"]["kernel"]) - batch["y"]) ** 2)


def make(mesh=None, **options):
    params = {"up": {"kernel": jax.random.normal(jax.random.key(0), (16, 64)), "bias": jnp.ones(64)}}
    tx = optax.adam(1e-2)
    state = lora_jax.TrainState.create(lora_jax.wrap(params, rank=2), tx, jax.random.key(1))
    return state, lora_jax.make_train_step(mse, tx, mesh=mesh, **options)


BATCH = {
    "x": np.linspace(-1, 1, 16 * 16, dtype=np.float32).reshape(16, 16),
    "y": np.linspace(0, 1, 16 * 64, dtype=np.float32).reshape(16, 64),
}


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (1, 1, 8), (8, 1, 1)])
def test_arrays_stay_where_they_are_and_the_second_step_compiles_nothing(sizes, compilations):
    mesh = mesh_of(*sizes)
    rules = {"up/kernel": P("fsdp", "tensor")}
    state, step = make(mesh, rules=rules)
    expected = jax.tree.leaves(lora_jax.shardings(state, mesh, rules))
    state, _ = step(state, BATCH)
    frozen = jax.tree.leaves(state.frozen)
    with compilations("") as events:
        state, metrics = step(state, BATCH)
        assert float(metrics["loss"]) > 0
    assert not events
    for x, where in zip(jax.tree.leaves(state), expected, strict=True):
        assert x.sharding == where
    assert all(a is b for a, b in zip(frozen, jax.tree.leaves(state.frozen), strict=True))


def test_a_state_that_lies_otherwise_than_the_rules_say_is_moved():
    mesh, rules = mesh_of(2, 2, 2), {"up/kernel": P("fsdp", "tensor")}
    state, step = make(mesh, rules=rules)
    for _ in range(2):  # known once and again
        replicated = jax.device_put(state, NamedSharding(mesh, P()))
        state, _ = step(replicated, BATCH)
        assert state.frozen["up"]["kernel"].w.sharding.spec == P("fsdp", "tensor")


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.up, self.norm = nnx.Linear(16, 64, rngs=rngs), nnx.BatchNorm(64, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.up(x))


def test_statistics_of_a_module_stay_where_they_are(compilations):
    mesh, tx = mesh_of(1, 4, 2), optax.sgd(1e-2)
    rules = {"up/kernel": P("fsdp", "tensor")}

    def loss_fn(model, batch, key):
        return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)

    module = lora_jax.sharded_init(lambda: Normed(nnx.Rngs(0)), mesh, rules)()
    assert module.up.kernel[...].sharding.spec == P("fsdp", "tensor")
    state = lora_jax.TrainState.create(lora_jax.wrap(module, rank=2), tx, jax.random.key(0))
    step = lora_jax.make_train_step(loss_fn, tx, mesh=mesh, rules=rules)
    before = [x.sharding for x in jax.tree.leaves(state.frozen)]
    mean = np.asarray(module.norm.mean[...])
    state, _ = step(state, BATCH)
    with compilations("") as events:
        state, _ = step(state, BATCH)
    assert not events
    assert [x.sharding for x in jax.tree.leaves(state.frozen)] == before
    assert np.abs(state.wrapped.norm.mean[...] - mean).max() > 0


def test_a_module_with_functions_is_made_in_place():
    mesh, tx = mesh_of(1, 4, 2), optax.sgd(1e-2)

    class Model(eqx.Module):
        linear: eqx.nn.Linear
        activation: Callable

    def init(key):
        model = Model(eqx.nn.Linear(16, 64, key=key), jax.nn.tanh)
        return lora_jax.TrainState.create(lora_jax.wrap(model, rank=2), tx, key)

    state = lora_jax.sharded_init(init, mesh, {"linear/weight": P("tensor", "fsdp")})(jax.random.key(0))
    assert state.wrapped.activation is jax.nn.tanh
    assert state.wrapped.linear.weight.a.sharding.spec == P("fsdp")


def test_another_adapter_lies_where_the_old_one_lay():
    mesh = mesh_of(1, 4, 2)
    placed = jax.device_put(PARAMS, lora_jax.shardings(PARAMS, mesh, RULES))
    wrapped = wrapped_params(**placed)
    both = lora_jax.swap(wrapped, lora_jax.adapter(wrapped_params()))
    assert [x.sharding for x in jax.tree.leaves(both)] == [x.sharding for x in jax.tree.leaves(wrapped)]


def test_a_step_with_a_mesh_is_not_traced():
    state, step = make(mesh_of(8))
    with pytest.raises(ValueError, match=r"Call it outside of jax.jit.*without mesh="):
        jax.jit(step)(state, BATCH)


def test_the_lowered_step_of_abstract_arrays_is_that_of_concrete_ones():
    mesh = mesh_of(1, 4, 2)
    state, step = make(mesh, rules={"up/kernel": P("fsdp", "tensor")})
    abstract = jax.eval_shape(lambda s: s, state)
    shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in BATCH.items()}
    assert step.lower(abstract, shapes).as_text() == step.lower(state, BATCH).as_text()


def test_an_evaluation_drops_nothing_and_spends_nothing():
    mesh = mesh_of(2, 2, 2)
    params = {"up": {"kernel": jnp.ones((16, 64))}}
    wrapped = lora_jax.wrap(params, rank=2, dropout=0.5)
    wrapped["up"]["kernel"] = wrapped["up"]["kernel"].replace(b=jnp.ones((2, 64)))
    state = lora_jax.TrainState.create(wrapped, optax.sgd(1.0), jax.random.key(0))

    def loss_fn(params, batch, key):
        assert key is None
        return mse(params, batch, key), {"examples": len(batch["x"])}

    expected = mse(lora_jax.merge(wrapped), BATCH, None)
    for options in ({}, {"mesh": mesh}):
        evaluate = lora_jax.make_eval_step(loss_fn, **options)
        for _ in range(2):
            metrics = evaluate(state, BATCH)
            np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
            assert float(metrics["examples"]) == 16


MIXED = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit, AUTO))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"rules": {}}, ValueError, "rules says how arrays lie on a mesh; give mesh="),
        ({"batch_spec": P()}, ValueError, "batch_spec says how arrays lie on a mesh; give mesh="),
        ({"mesh": 8}, TypeError, "mesh is 8; write jax.make_mesh"),
        ({"mesh": MIXED}, ValueError, r"make it of one kind: jax.make_mesh\(\(2, 4\), \('data', 'tensor'\)"),
        ({"mesh": mesh_of(8), "batch_spec": P("x")}, ValueError, r"batch_spec is .*'x'.*\('data',\)"),
        (
            {"mesh": mesh_of(8), "batch_spec": "data"},
            TypeError,
            r"batch_spec is 'data'; .*batch_spec=jax.sharding.PartitionSpec\('data'\)",
        ),
    ],
)
def test_arguments_about_the_mesh_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        lora_jax.make_train_step(mse, optax.sgd(1.0), **options)


def test_a_mesh_with_names_of_its_own_needs_the_batchs_spec():
    mesh = mesh_of(2, 4, names=("replica", "model"))
    with pytest.raises(ValueError, match=r"\('replica', 'model'\).*batch_spec=PartitionSpec\('replica'\)"):
        lora_jax.make_train_step(mse, optax.sgd(1.0), mesh=mesh, rules={"up": P()})
    state, step = make(mesh, rules={"up/kernel": P(None, "model")}, batch_spec=P("replica"))
    alone, plain = make()
    np.testing.assert_allclose(step(state, BATCH)[1]["loss"], plain(alone, BATCH)[1]["loss"], rtol=1e-6)


def test_a_batch_that_does_not_divide_is_refused_by_name():
    state, step = make(mesh_of(8))
    few = {k: v[:3] for k, v in BATCH.items()}
    with pytest.raises(ValueError, match=r"the batch's 'x' has shape \(3, 16\).*'data': 8.*device_put\(x"):
        step(state, few)
    with pytest.raises(ValueError, match=r"the batch's 'x' has shape \(3, 16\).*'data': 8.*ShapeDtypeStruct"):
        step.lower(state, jax.eval_shape(lambda x: x, few))


def test_a_weight_must_be_among_the_auxiliary_values():
    state, _ = make()
    step = lora_jax.make_train_step(mse, optax.adam(1e-2), weight="tokens")
    with pytest.raises(TypeError, match="weight='tokens' names none"):
        step(state, BATCH)


@pytest.mark.parametrize("mask", ["every second row", "no row"])
def test_microbatches_without_a_token_count_for_nothing(mask):
    """The auxiliary values are weighted as the loss is, and a batch of padding alone spoils nothing."""

    def loss_fn(params, batch, key):
        losses = jnp.sum((batch["x"] @ params["up"]["kernel"]) ** 2, axis=-1)
        count = jnp.sum(batch["mask"])
        mean = jnp.sum(losses * batch["mask"]) / jnp.maximum(count, 1)
        return mean, {"tokens": count, "rows": mean / 2}

    params = {"up": {"kernel": jnp.ones((16, 64))}}
    rows = np.tile([1.0, 0.0], 8) if mask == "every second row" else np.zeros(16)
    batch = {"x": BATCH["x"], "mask": rows.astype(np.float32)}
    found = []
    for accumulate in (1, 2):  # the second microbatch holds the odd rows
        tx = optax.sgd(1e-3)
        state = lora_jax.TrainState.create(lora_jax.wrap(params, rank=2), tx, jax.random.key(0))
        step = lora_jax.make_train_step(loss_fn, tx, accumulate=accumulate, weight="tokens")
        state, metrics = step(state, batch)
        found.append([float(metrics[name]) for name in ("loss", "grad_norm", "tokens", "rows")])
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(state.trainable))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


def test_a_boolean_is_no_weight():
    def loss_fn(params, batch, key):
        return mse(params, batch, key), {"tokens": jnp.sum(batch["x"]) > 0}

    state, _ = make()
    step = lora_jax.make_train_step(loss_fn, optax.adam(1e-2), weight="tokens")
    with pytest.raises(TypeError, match="a boolean 'tokens'"):
        step(state, BATCH)


def test_microbatches_that_do_not_divide_over_explicit_axes_are_refused():
    mesh = mesh_of(8, kind=AxisType.Explicit)
    state, step = make(mesh, rules={"up": P()}, accumulate=4)
    with pytest.raises(ValueError, match="a microbatch of 4 examples .* 8 Explicit shards"):
        step(state, BATCH)
