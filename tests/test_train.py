"""A train step trains the trainable half, and leaves everything else exactly as it was."""

import functools
import re
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.files import load_adapter, save_adapter
from lora_jax.interpret import lora
from lora_jax.params import combine, labels, merge, partition, wrap
from lora_jax.train import TrainState, make_eval_step, make_train_step, only_trainable
from lora_jax.tree import leaves_with_path
from lora_jax.weight import LoraWeight, is_wrapped_leaf

KEY = jax.random.key(3)


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax's Adam and Flax's BatchNorm do not run under strict promotion; one test here does."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name="up", param_dtype=x.dtype)(x))
        x = nn.LayerNorm(name="norm", param_dtype=x.dtype)(x)
        return nn.Dense(3, name="head", param_dtype=x.dtype)(x)


MODEL = MLP()


def loss_fn(params, batch, key):
    error = MODEL.apply({"params": params}, batch["x"]) - batch["y"]
    return jnp.mean(error**2), {
        "worst": jnp.max(jnp.abs(error)),
        "count": jnp.asarray(error.shape[0], jnp.int32),
    }


def loss_of(params, batch):
    return loss_fn(params, batch, KEY)[0]


def make_batch(dtype=jnp.float32, size=8, seed=0):
    x, y = jax.random.split(jax.random.key(seed))
    return {"x": jax.random.normal(x, (size, 6), dtype), "y": jax.random.normal(y, (size, 3), dtype)}


def make_wrapped(dtype=jnp.float32, **kwargs):
    params = MODEL.init(jax.random.key(0), jnp.zeros((1, 6), dtype))["params"]
    options = {"rank": 2, "targets": "up/kernel", "train": "head", "dtype": dtype, "key": jax.random.key(1)}
    return wrap(params, **(options | kwargs))


def bits(tree):
    def data(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return [(str(x.dtype), x.shape, np.asarray(data(x)).tobytes()) for x in jax.tree.leaves(tree)]


def assert_close(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-12, atol=1e-12)


# --- What is given --------------------------------------------------------------------------------


def test_a_loss_of_two_arguments_is_refused_where_it_is_given():
    def two(params, batch):
        return loss_fn(params, batch, None)

    @functools.wraps(two)
    def decorated(params, batch, key):
        return two(params, batch)

    message = r"loss_fn is called as two\(params, batch, key\), and takes \(params, batch\)"
    for make in (lambda fn: make_train_step(fn, optax.sgd(0.1)), make_eval_step):
        with pytest.raises(TypeError, match=message):
            make(two)
        with pytest.raises(TypeError, match="loss_fn is int 3; write a function"):
            make(3)
        for good in (decorated, loss_fn, lambda *args: 0.0, jax.jit(loss_fn), functools.partial(loss_fn)):
            make(good)


def test_an_optimizer_is_checked_where_it_is_given():
    with pytest.raises(TypeError, match="tx is NoneType None; write an optax transformation"):
        make_train_step(loss_fn, None)  # type: ignore[arg-type]


# --- The step is the loop one would write by hand ---------------------------------------------------


def test_equals_the_loop_by_hand_bit_for_bit():
    wrapped, tx, batch = make_wrapped(dropout=0.3), optax.adamw(1e-2), make_batch()

    @jax.jit
    def by_hand(trainable, opt_state, frozen, number):
        first, second = jax.random.split(jax.random.fold_in(jax.random.fold_in(KEY, number), 0))

        def objective(t):
            return lora(loss_fn, key=second)(combine(t, frozen), batch, first)

        (loss, _), grads = jax.value_and_grad(objective, has_aux=True)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, loss

    state, step = TrainState.create(wrapped, tx, KEY), make_train_step(loss_fn, tx)
    trainable, frozen = partition(wrapped)
    opt_state = tx.init(trainable)
    losses, metrics = [], {}
    for number in range(40):
        state, metrics = step(state, batch)
        trainable, opt_state, loss = by_hand(trainable, opt_state, frozen, jnp.asarray(number, jnp.int32))
        losses.append(float(metrics["loss"]))
        assert bits(metrics["loss"]) == bits(loss)
        assert bits(state.trainable) == bits(trainable)
        assert bits(state.opt_state) == bits(opt_state)
    assert int(state.step) == int(metrics["step"]) == 40
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_no_work_beside_gradients_update_and_norm():
    wrapped, tx, batch = make_wrapped(), optax.sgd(1e-2), make_batch()
    state, step = TrainState.create(wrapped, tx, KEY), make_train_step(loss_fn, tx)

    def by_hand(trainable, frozen, batch):
        (loss, aux), grads = jax.value_and_grad(
            lambda t: lora(loss_fn)(combine(t, frozen), batch, KEY), has_aux=True
        )(trainable)
        updates, _ = tx.update(grads, tx.init(trainable), trainable)
        return optax.apply_updates(trainable, updates), loss, aux, optax.tree.norm(grads)

    def dots(fn, *args):
        return str(jax.make_jaxpr(fn)(*args)).count("dot_general[")

    assert dots(step, state, batch) == dots(by_hand, state.trainable, state.frozen, batch) > 0


def test_metrics_are_arrays_and_nothing_waits_for_the_device():
    state, step = (
        TrainState.create(make_wrapped(), optax.sgd(1e-2), KEY),
        make_train_step(loss_fn, optax.sgd(1e-2)),
    )
    # Abstract evaluation has no values: a step that read one would fail.
    new, metrics = jax.eval_shape(step, state, make_batch())
    assert jax.tree.structure(new) == jax.tree.structure(state)
    old = jax.tree.leaves(state)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(new)] == [(x.shape, x.dtype) for x in old]
    kinds = {name: (value.shape, str(value.dtype)) for name, value in metrics.items()}
    assert kinds == {
        "loss": ((), "float32"),
        "grad_norm": ((), "float32"),
        "step": ((), "int32"),
        "worst": ((), "float32"),
        "count": ((), "float32"),
    }
    first_state, first = step(state, make_batch())
    step(first_state, make_batch())
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(first))
    assert float(first["loss"]) > 0 and int(first["step"]) == 1  # still there after the next step


def test_grad_norm_is_that_of_the_gradients():
    wrapped, batch = make_wrapped(jnp.float64), make_batch(jnp.float64)
    state = TrainState.create(wrapped, optax.sgd(1.0), KEY)
    before = jax.tree.map(jnp.copy, state.trainable)
    state, metrics = make_train_step(loss_fn, optax.sgd(1.0))(state, batch)
    moved = jax.tree.map(jnp.subtract, before, state.trainable)
    assert_close(metrics["grad_norm"], optax.tree.norm(moved))


@pytest.mark.parametrize("accumulate", [0, 2.0, "2", True])
def test_a_bad_number_of_microbatches_is_refused(accumulate):
    with pytest.raises(ValueError, match="number of microbatches"):
        make_train_step(lambda params, batch, key: 0.0, optax.sgd(0.1), accumulate=accumulate)


def test_a_tree_in_the_place_of_a_state_is_refused():
    step = make_train_step(lambda params, batch, key: 0.0, optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"TrainState\.create"):
        step({"w": 1}, {})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_step_itself_needs_no_promotion(accumulate):
    tx = optax.sgd(1e-2)
    with jax.numpy_dtype_promotion("strict"):
        state = TrainState.create(make_wrapped(dropout=0.1), tx, KEY)
        step = make_train_step(loss_fn, tx, accumulate=accumulate)
        state, first = step(state, make_batch())
        assert step(state, make_batch())[1]["grad_norm"] > 0 and first["count"].dtype == jnp.float32


# --- What is trained, and what is not ---------------------------------------------------------------


def test_optimizer_state_is_that_of_the_trainable_part():
    state = TrainState.create(make_wrapped(), optax.adam(1e-2), KEY)
    sizes = sorted(x.shape for x in jax.tree.leaves(state.opt_state))
    assert sizes == sorted([(), *2 * [(6, 2), (2, 16), (16, 3), (3,)]])


def test_frozen_arrays_are_the_same_objects():
    wrapped, tx = make_wrapped(), optax.adamw(1e-1, weight_decay=0.1)
    state, step = TrainState.create(wrapped, tx, KEY), make_train_step(loss_fn, tx, accumulate=2)
    theirs = {id(x) for x in jax.tree.leaves(wrapped)}
    frozen = jax.tree.leaves(state.frozen)
    before = bits(frozen)
    for _ in range(3):
        state, _ = step(state, make_batch())
    after = jax.tree.leaves(state.frozen)
    assert len(after) == len(frozen) > 3
    assert all(new is old and id(new) in theirs for new, old in zip(after, frozen, strict=True))
    assert bits(after) == before


def test_trainable_and_optimizer_state_are_donated_and_nothing_else():
    tx = optax.adam(1e-2)
    state, step = TrainState.create(make_wrapped(), tx, KEY), make_train_step(loss_fn, tx)
    batch = make_batch()
    step(state, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves((state.trainable, state.opt_state)))
    assert not any(x.is_deleted() for x in jax.tree.leaves((state.frozen, state.step, state.key, batch)))


def test_the_tree_given_to_create_stays_good():
    params = MODEL.init(jax.random.key(0), jnp.zeros((1, 6)))["params"]
    wrapped = wrap(params, rank=2, targets="up/kernel", train="head", key=jax.random.key(1))
    before = bits(wrapped), bits(params)
    # schedule_free keeps the parameters themselves in its state: one buffer, met twice.
    tx = optax.contrib.schedule_free_sgd(1e-2)
    state = TrainState.create(wrapped, tx, KEY)
    make_train_step(loss_fn, tx)(state, make_batch(jnp.float64))
    assert (bits(wrapped), bits(params)) == before


def test_the_base_is_an_argument_and_no_constant():
    state, step = (
        TrainState.create(make_wrapped(), optax.adam(1e-2), KEY),
        make_train_step(loss_fn, optax.adam(1e-2)),
    )
    jaxpr = jax.make_jaxpr(step)(state, make_batch())
    assert not jaxpr.consts
    text = jax.jit(step).lower(state, make_batch()).as_text()
    constants = re.findall(r"stablehlo\.constant dense<([^>]*)>", text)
    assert constants and max(map(len, constants)) < 200  # a splat or a few numbers, 96 would be more


def test_wrapped_puts_the_state_together():
    wrapped = make_wrapped()
    state = TrainState.create(wrapped, optax.sgd(1e-2), KEY)
    assert jax.tree.structure(state.wrapped) == jax.tree.structure(wrapped)
    assert bits(state.wrapped) == bits(wrapped)
    assert bits(merge(state.wrapped)) == bits(merge(wrapped))


def test_numpy_params_are_put_on_the_device_once():
    params = jax.tree.map(np.asarray, MODEL.init(jax.random.key(0), jnp.zeros((1, 6), jnp.float32))["params"])
    state = TrainState.create(wrap(params, rank=2, targets="up/kernel"), optax.sgd(1e-2), KEY)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    state, metrics = make_train_step(loss_fn, optax.sgd(1e-2))(state, make_batch())
    assert np.isfinite(metrics["loss"])


def test_a_loaded_adapter_trains_on(tmp_path):
    wrapped, tx, batch = make_wrapped(), optax.adam(1e-2), make_batch()
    save_adapter(tmp_path / "adapter", wrapped)
    loaded = load_adapter(
        tmp_path / "adapter", MODEL.init(jax.random.key(0), jnp.zeros((1, 6), jnp.float32))["params"]
    )
    step = make_train_step(loss_fn, tx)
    ours, theirs = (step(TrainState.create(tree, tx, KEY), batch)[0] for tree in (loaded, wrapped))
    assert bits(ours.wrapped) == bits(theirs.wrapped)


class Layer(eqx.Module):
    kernel: jax.Array
    activation: Any
    scale: float
    residual: bool

    def __call__(self, x):
        y = self.activation(x @ self.kernel) * self.scale
        return y + x if self.residual else y


def test_equinox_modules_keep_leaves_that_are_no_arrays():
    model = {
        "up": Layer(jnp.ones((6, 6)), jnp.tanh, 1, True),
        "head": Layer(jnp.ones((6, 3)), jnp.tanh, 1.0, False),
    }

    def loss_fn(model, batch, key):
        return jnp.mean((model["head"](model["up"](batch["x"])) - batch["y"]) ** 2)

    tx = optax.sgd(1e-2)
    state = TrainState.create(wrap(model, rank=2, targets="kernel", axes={"kernel": ("in", "out")}), tx, KEY)
    step = make_train_step(loss_fn, tx, accumulate=2)
    state, first = step(state, make_batch(jnp.float64))
    state, second = step(state, make_batch(jnp.float64))
    assert second["loss"] < first["loss"]
    after = state.wrapped["up"]
    assert after.activation is jnp.tanh and after.residual is True and type(after.scale) is int


# --- Accumulation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(count):
    batch, tx = make_batch(jnp.float64), optax.sgd(1.0)
    results = []
    for accumulate in (1, count):
        state = TrainState.create(make_wrapped(jnp.float64), tx, KEY)
        results.append(make_train_step(loss_fn, tx, accumulate=accumulate)(state, batch))
    (whole, one), (parts, many) = results
    assert_close(parts.trainable, whole.trainable)
    assert_close((many["loss"], many["grad_norm"]), (one["loss"], one["grad_norm"]))
    assert int(many["step"]) == 1 and many["count"] == 8 / count
    assert jax.eval_shape(lambda: many) == jax.eval_shape(lambda: one)


def test_microbatches_draw_their_own_keys():
    def loss_fn(params, batch, key):
        return 0 * loss_of(params, batch), {"draw": jax.random.uniform(key, (), jnp.float64)}

    tx = optax.sgd(1.0)
    state, metrics = make_train_step(loss_fn, tx, accumulate=4)(
        TrainState.create(make_wrapped(jnp.float64), tx, KEY), make_batch(jnp.float64)
    )
    keys = [jax.random.split(jax.random.fold_in(jax.random.fold_in(KEY, 0), i))[0] for i in range(4)]
    assert_close(
        metrics["draw"], jnp.mean(jnp.stack([jax.random.uniform(key, (), jnp.float64) for key in keys]))
    )


def test_a_tuple_of_parameters_accumulates():
    def loss_fn(params, batch, key):
        return jnp.mean((batch["x"] @ params[0] @ params[1] - batch["y"]) ** 2)

    tx = optax.sgd(1e-2)
    wrapped = wrap((jnp.ones((6, 4)), jnp.ones((4, 3))), rank=1, targets="0", axes={"0": ("in", "out")})
    state, step = TrainState.create(wrapped, tx, KEY), make_train_step(loss_fn, tx, accumulate=2)
    state, first = step(state, make_batch(jnp.float64))
    assert step(state, make_batch(jnp.float64))[1]["loss"] < first["loss"]


def test_batches_that_do_not_divide():
    tx = optax.sgd(1e-2)
    step = make_train_step(loss_fn, tx, accumulate=3)
    state = TrainState.create(make_wrapped(), tx, KEY)
    with pytest.raises(ValueError, match=r"8 examples does not divide into accumulate=3.*x: \(8, 6\)"):
        step(state, make_batch())
    with pytest.raises(ValueError, match=r"same size; the shapes are .*positions: \(6,\)"):
        step(state, make_batch(size=9) | {"positions": jnp.arange(6)})
    with pytest.raises(ValueError, match=r"same size; the shapes are .*temperature: \(\)"):
        step(state, make_batch(size=9) | {"temperature": 1.0})
    with pytest.raises(ValueError, match="accumulate is 0"):
        make_train_step(loss_fn, tx, accumulate=0)
    step(state, make_batch(size=9))  # a refused batch spends no state


# --- Compiled once ----------------------------------------------------------------------------------


def scheduled():
    return optax.inject_hyperparams(optax.adamw)(learning_rate=optax.linear_schedule(1e-2, 0.0, 10))


def constant():
    # A learning rate without a schedule starts as a weakly typed number.
    return optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2)


def plateau():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2), optax.contrib.reduce_on_plateau())


def noisy():
    # Its state holds a typed key.
    return optax.chain(optax.add_noise(1e-3, 0.5, key=jax.random.key(0)), optax.sgd(1e-2))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("make_tx", [scheduled, constant, plateau, noisy], ids=lambda f: f.__name__)
def test_compiles_once(make_tx, accumulate, compilations):
    tx = make_tx()
    state, step = (
        TrainState.create(make_wrapped(dropout=0.1), tx, KEY),
        make_train_step(loss_fn, tx, accumulate=accumulate),
    )
    batches = [make_batch(seed=seed) for seed in range(4)]
    with compilations() as events:
        avals = [jax.typeof(x) for x in jax.tree.leaves(state)]
        state, _ = step(state, batches[0])
        assert events
        assert [jax.typeof(x) for x in jax.tree.leaves(state)] == avals
        changing = jax.tree.leaves((state.trainable, state.opt_state, state.step))
        assert not any(getattr(x, "weak_type", False) for x in changing)
        events.clear()
        for batch in batches[1:]:
            state, _ = step(state, batch)
        assert not events


def on_one_device(tree):
    return jax.device_put(tree, jax.devices()[1])


def replicated(tree):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split(tree):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))


def left(tree):
    return tree


PLACES = {
    "a placed base": (on_one_device, left),
    "a placed batch": (left, on_one_device),
    "both placed": (on_one_device, on_one_device),
    "data parallel": (replicated, split),
    "data parallel, base not placed": (left, split),
}


@pytest.mark.parametrize("place", PLACES)
def test_compiles_once_wherever_things_are(place, compilations):
    put_base, put_batch = PLACES[place]
    tx, batch = optax.adam(1e-2), put_batch(make_batch())
    params = put_base(MODEL.init(jax.random.key(0), jnp.zeros((1, 6), jnp.float32))["params"])
    state = TrainState.create(wrap(params, rank=2, targets="up/kernel", train="head"), tx, KEY)
    step = make_train_step(loss_fn, tx)
    state, first = step(state, batch)
    with compilations() as events:
        state, _ = step(state, batch)
        state, last = step(state, batch)
        assert not events
    assert last["loss"] < first["loss"]


def test_a_step_is_traced_once():
    count = []

    def counted(params, batch, key):
        count.append(1)
        return loss_fn(params, batch, key)

    tx = optax.sgd(1e-2)
    state, step = TrainState.create(make_wrapped(), tx, KEY), make_train_step(counted, tx, accumulate=2)
    for _ in range(3):
        state, _ = step(state, make_batch())
    assert len(count) == 1


# --- The state is a pytree --------------------------------------------------------------------------


def test_the_state_is_a_pytree():
    tx = optax.adam(1e-2)
    state = TrainState.create(make_wrapped(), tx, KEY)
    same = jax.jit(lambda s: s)(jax.tree.map(lambda x: x, state))
    assert jax.tree.structure(same) == jax.tree.structure(state) and bits(same) == bits(state)
    assert any(path == "trainable/up/kernel/a" for path, _ in leaves_with_path(state))
    # Under the caller's own jit, the step is a function like any other.
    step = make_train_step(loss_fn, tx)
    inner, _ = jax.jit(step)(state, make_batch())
    outer, _ = step(state, make_batch())
    assert bits(inner.trainable) == bits(outer.trainable)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_resumed_run_repeats_the_one_that_never_stopped(kind, tmp_path):
    tx = optax.adam(1e-2)

    def fresh():
        if kind == "linen":
            return TrainState.create(make_wrapped(dropout=0.5), tx, jax.random.key_data(KEY))
        return TrainState.create(wrap(Net(), rank=2, targets="up", dropout=0.5), tx, jax.random.key_data(KEY))

    dtype = jnp.float32 if kind == "linen" else jnp.float64
    step = make_train_step(loss_fn if kind == "linen" else net_loss, tx)
    batches = [make_batch(dtype, seed=seed) for seed in range(4)]
    state = fresh()
    for batch in batches[:2]:
        state, _ = step(state, batch)

    def data(tree):
        return [
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            for x in jax.tree.leaves(tree)
        ]

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", data(state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "run", data(state))
    leaves, treedef = jax.tree.flatten(fresh())
    resumed = treedef.unflatten(
        jax.random.wrap_key_data(new) if jnp.issubdtype(old.dtype, jax.dtypes.prng_key) else new
        for old, new in zip(leaves, restored, strict=True)
    )
    for batch in batches[2:]:
        state, _ = step(state, batch)
        resumed, _ = step(resumed, batch)
    assert bits(resumed) == bits(state)


def test_orbax_saves_a_state_as_it_is(tmp_path):
    state = TrainState.create(make_wrapped(), optax.adam(1e-2), jax.random.key_data(KEY))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", state)
    assert isinstance(restored, TrainState) and bits(restored) == bits(state)


# --- Dropout ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dropout_is_on_where_a_weight_has_a_rate_and_new_at_every_step(rate):
    trainable, frozen = partition(make_wrapped(jnp.float64, dropout=rate))
    wrapped = combine(jax.tree.map(lambda x: x + 0.1, trainable), frozen)
    tx = optax.sgd(0.0)
    state, step = TrainState.create(wrapped, tx, KEY), make_train_step(loss_fn, tx)
    losses = set()
    for _ in range(4):
        state, metrics = step(state, make_batch(jnp.float64))
        losses.add(float(metrics["loss"]))
    assert len(losses) == (4 if rate else 1)


# --- NNX modules ------------------------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(params=0, dropout=7)
        self.up = nnx.Linear(6, 8, rngs=rngs, param_dtype=jnp.float64)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs, param_dtype=jnp.float64)
        for statistic in (self.norm.mean, self.norm.var):  # float32 whatever else is asked for
            statistic.set_value(statistic.get_value().astype(jnp.float64))
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x):
        return self.head(self.drop(nnx.relu(self.norm(self.up(x)))))


def net_loss(model, batch, key):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2), {"draw": jax.random.uniform(key, (), jnp.float64)}


def moving(model):
    """What a call mutates: the statistics and the count of the dropout stream."""
    state = nnx.state(model, nnx.Any(nnx.BatchStat, nnx.RngCount))
    return {path: leaf for path, leaf in leaves_with_path(nnx.to_pure_dict(state))}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_statistics_and_dropout_of_a_module_move_as_in_plain_nnx(accumulate):
    tx = optax.sgd(0.1)
    state = TrainState.create(wrap(Net(), rank=2, targets="up", train="head", dtype=jnp.float64), tx, KEY)
    step = make_train_step(net_loss, tx, accumulate=accumulate)
    frozen_params = [x for x in jax.tree.leaves(state.frozen) if x.shape == (6, 8)]
    counts = []
    for number in range(3):
        batch = make_batch(jnp.float64, seed=number)
        # The plain model with the same weights, run by hand.
        plain = merge(state.wrapped)
        losses = []
        for i in range(accumulate):
            key = jax.random.split(jax.random.fold_in(jax.random.fold_in(KEY, number), i))[0]
            losses.append(net_loss(plain, jax.tree.map(lambda x, i=i: x[i::accumulate], batch), key)[0])
        state, metrics = step(state, batch)
        assert_close(metrics["loss"], jnp.mean(jnp.stack(losses)))
        ours, theirs = moving(state.wrapped), moving(plain)
        assert_close(ours, theirs)
        assert len(ours) >= 3
        counts.append(int(sum(x for path, x in ours.items() if path.endswith("count"))))
    assert np.all(np.diff(counts) == accumulate)
    assert isinstance(state.wrapped, Net)
    after = [x for x in jax.tree.leaves(state.frozen) if x.shape == (6, 8)]
    assert len(after) == 1 and after[0] is frozen_params[0]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_module_trains_and_compiles_once(accumulate, compilations):
    tx = optax.adam(1e-2)
    state = TrainState.create(wrap(Net(), rank=2, targets="up", train="head"), tx, KEY)
    shapes = {x.shape for x in jax.tree.leaves(state.opt_state)}
    assert shapes == {(), (6, 2), (2, 8), (8, 3), (3,)}
    step, batch = make_train_step(net_loss, tx, accumulate=accumulate), make_batch(jnp.float64)
    state, first = step(state, batch)
    last = first
    with compilations() as events:
        for _ in range(20):
            state, last = step(state, batch)
        assert not events
    assert last["loss"] < first["loss"]


def test_only_what_changed_comes_out_of_the_step():
    tx = optax.sgd(0.1)
    state = TrainState.create(wrap(Net(), rank=2, targets="up"), tx, KEY)
    before = {path: leaf for path, leaf in leaves_with_path(state.frozen)}
    state, _ = make_train_step(net_loss, tx)(state, make_batch(jnp.float64))
    changed = {path for path, leaf in leaves_with_path(state.frozen) if leaf is not before[path]}
    names = {"/".join(path.split("/")[-2:]) for path in changed}
    assert len(changed) == 3 and {"norm/mean", "norm/var"} < names
    assert any("count" in path for path in changed)


def test_a_state_that_changes_its_dtype_is_refused():
    class Counter(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
            self.seen = nnx.Variable(jnp.zeros((), jnp.int32))

        def __call__(self, x):
            self.seen.set_value(jnp.asarray(self.seen.get_value() + 1, jnp.float32))
            return self.linear(x)

    tx = optax.sgd(0.1)
    state = TrainState.create(wrap(Counter(), rank=1, targets="linear"), tx, KEY)
    with pytest.raises(TypeError, match=r"'seen' from int32\[\] to float32\[\].*keep its shape and dtype"):
        make_train_step(net_loss, tx)(state, make_batch())


# --- Mistakes ---------------------------------------------------------------------------------------

MISTAKES = {
    "nothing": (lambda loss: None, "returned NoneType None; return a scalar float loss"),
    "a vector": (lambda loss: jnp.stack([loss, loss]), r"a loss that is float32\[2\]; return a scalar"),
    "an integer": (lambda loss: loss.astype(jnp.int32), r"a loss that is int32\[\]; return a scalar"),
    "three values": (lambda loss: (loss, {}, {}), "returned tuple .*; return a scalar"),
    "a dict": (lambda loss: {"loss": loss}, "returned dict .*; return a scalar"),
    "aux no dict": (lambda loss: (loss, loss), r"returned a loss and float32\[\]; return"),
    "aux a string": (lambda loss: (loss, {"name": "x"}), "auxiliary value 'name', str x; return"),
    "aux nested": (lambda loss: (loss, {"a": {"b": "x"}}), "auxiliary value 'a/b', str x; return"),
    "aux a key": (lambda loss: (loss, {"key": jax.random.key(0)}), "auxiliary value 'key', key"),
    "aux named loss": (lambda loss: (loss, {"loss": loss}), r"\['loss'\], as metrics are; rename"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_loss_that_is_none(mistake):
    returned, message = MISTAKES[mistake]

    def my_loss(params, batch, key):
        return returned(loss_fn(params, batch, key)[0])

    tx = optax.sgd(1e-2)
    state = TrainState.create(make_wrapped(), tx, KEY)
    with pytest.raises(TypeError, match="my_loss returned.*" + message.removeprefix("returned")):
        make_train_step(my_loss, tx)(state, make_batch())


def test_nothing_to_train():
    params = {"kernel": jnp.ones((6, 3))}
    with pytest.raises(ValueError, match=r"(?s)wrap\(params"):
        TrainState.create(params, optax.sgd(1e-2), KEY)
    with pytest.raises(ValueError, match=r"(?s)wrap\(params"):
        only_trainable(optax.sgd(1e-2)).init(params)


@pytest.mark.parametrize("key", [0, None, np.zeros(2, np.uint32)])
def test_a_key_that_is_none(key):
    with pytest.raises(TypeError, match=r"jax.random.key\(0\)"):
        TrainState.create(make_wrapped(), optax.sgd(1e-2), key)


# --- optax ------------------------------------------------------------------------------------------


def odd_tree():
    """A wrapped tree whose frozen leaves no sum leaves alone."""
    params = {
        "kernel": -jnp.zeros((6, 3), jnp.float32),
        "head": jnp.ones(3, jnp.float32),
        "tiny": jnp.full(2, 1e-40, jnp.float32),
        "half": jnp.array([-0.0, 6e-8, jnp.nan, jnp.inf], jnp.float16),
        "count": jnp.arange(3),
        "flag": jnp.array(True),
        "none": None,
    }
    return wrap(params, rank=2, targets="kernel", train="head", axes={"kernel": ("in", "out")})


@pytest.mark.parametrize("wrapper", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_only_trainable_leaves_the_rest_bit_for_bit(wrapper):
    tree = odd_tree()
    tx = only_trainable(optax.adamw(0.1, weight_decay=0.1))
    opt_state = tx.init(tree)
    sizes = sorted(x.shape for x in jax.tree.leaves(opt_state))
    assert sizes == sorted([(), *2 * [(6, 2), (2, 3), (3,)]])
    grads = jax.tree.map(
        lambda x: jnp.full(x.shape, 7.0, x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )

    @wrapper
    def update(tree, opt_state):
        updates, opt_state = tx.update(grads, opt_state, tree)
        assert {x.shape for x in jax.tree.leaves(updates)} == {(6, 2), (2, 3), (3,)}
        return optax.apply_updates(tree, updates), opt_state

    new = tree
    for _ in range(2):
        new, opt_state = update(new, opt_state)
    assert jax.tree.structure(new) == jax.tree.structure(tree)
    (trained, frozen), (old_trained, old_frozen) = partition(new), partition(tree)
    assert bits(frozen) == bits(old_frozen)
    assert all(
        np.all(x != y) for x, y in zip(jax.tree.leaves(trained), jax.tree.leaves(old_trained), strict=True)
    )


def test_only_trainable_equals_the_loop_over_the_halves():
    wrapped, tx, batch = make_wrapped(), optax.adam(1e-2), make_batch()
    trainable, frozen = partition(wrapped)
    whole_tx = only_trainable(tx)
    whole_state, half_state = whole_tx.init(wrapped), tx.init(trainable)

    def loss(tree):
        return lora(loss_fn)(tree, batch, KEY)[0]

    for _ in range(3):
        grads = jax.grad(loss)(wrapped)
        updates, whole_state = whole_tx.update(grads, whole_state, wrapped)
        wrapped = optax.apply_updates(wrapped, updates)
        grads = partition(grads)[0]
        updates, half_state = tx.update(grads, half_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    assert bits(wrapped) == bits(combine(trainable, frozen))
    assert bits(whole_state) == bits(half_state)


def test_only_trainable_passes_extra_arguments():
    tree: Any = {"x": LoraWeight(jnp.ones((2, 2)), jnp.ones((2, 1)), jnp.ones((1, 2)), path="x")}
    tx = only_trainable(optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1)))
    opt_state, updates = tx.init(tree), tree
    for _ in range(4):
        updates, opt_state = tx.update(tree, opt_state, tree, value=jnp.ones(()))
    update: Any = updates
    assert float(update["x"].a[0, 0]) > -1.0


@pytest.mark.parametrize("make", [make_wrapped, lambda: wrap(Net(), rank=2, targets="up", train="head")])
def test_learning_rates_of_their_own_for_a_and_b(make):
    """As in LoRA+, through optax.partition and the labels of the trainable half."""
    wrapped = make()
    tx = optax.partition({"a": optax.sgd(1.0), "b": optax.sgd(16.0), "full": optax.set_to_zero()}, labels)
    trainable, _ = partition(wrapped)
    names = labels(trainable)
    assert sorted(jax.tree.leaves(names)) == ["a", "b", "full", "full"]
    ones = jax.tree.map(jnp.ones_like, trainable)
    state = TrainState.create(wrapped, tx, KEY)
    for given in (labels, names):
        tx = optax.partition({"a": optax.sgd(1.0), "b": optax.sgd(16.0), "full": optax.set_to_zero()}, given)
        updates, _ = tx.update(ones, tx.init(trainable), trainable)
        rates = {"a": -1.0, "b": -16.0, "full": 0.0}
        for name, update in zip(jax.tree.leaves(names), jax.tree.leaves(updates), strict=True):
            assert np.all(update == rates[name])
    is_linen = isinstance(wrapped, dict)
    step = make_train_step(loss_fn if is_linen else net_loss, tx)
    head = bits([x for x in jax.tree.leaves(state.trainable) if x.shape[-1] == 3])
    state, metrics = step(state, make_batch(jnp.float32 if is_linen else jnp.float64))
    assert np.isfinite(metrics["loss"])
    assert bits([x for x in jax.tree.leaves(state.trainable) if x.shape[-1] == 3]) == head


def test_every_wrapped_leaf_is_labelled():
    for node in jax.tree.leaves(labels(make_wrapped()), is_leaf=is_wrapped_leaf):
        assert set(jax.tree.leaves(node)) <= {"a", "b", "full"}
