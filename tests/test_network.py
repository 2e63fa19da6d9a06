"""What crosses the network in one train step, read in the compiled program."""

import contextlib
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax.hlo import collective_ops

D, WIDTH, LAYERS, BATCH, LENGTH, RANK = 64, 128, 2, 16, 8, 4


@contextlib.contextmanager
def optimized():
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        with jax.numpy_dtype_promotion("standard"):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


def block(layer, x):
    return x + jax.nn.gelu(x @ layer["up"]) @ layer["down"]


def apart(params, x):
    for layer in params.values():
        x = block(layer, x)
    return x


def scanned(params, x):
    return lax.scan(lambda x, layer: (jax.checkpoint(block)(layer, x), None), x, params)[0]


def make_params(forward):
    def kernel(*shape):
        return jax.random.normal(jax.random.key(0), shape, jnp.float32) / 8

    stacked = {"up": kernel(LAYERS, D, WIDTH), "down": kernel(LAYERS, WIDTH, D)}
    if forward is scanned:
        return stacked
    return {f"layer_{i}": {name: w[i] for name, w in stacked.items()} for i in range(LAYERS)}


def compiled(forward, mesh, rules):
    """The collectives of the train step and of the frozen model's forward and input gradient; the state."""

    def loss_fn(params, batch, key):
        return jnp.mean((forward(params, batch["x"]) - batch["y"]) ** 2)

    tx, params = optax.adam(1e-3), make_params(forward)
    axes = {"up|down": (("batch",) if forward is scanned else ()) + ("in", "out")}
    state = lora_jax.TrainState.create(
        lora_jax.wrap(params, rank=RANK, targets="up|down", axes=axes), tx, jax.random.key(0)
    )
    step = lora_jax.make_train_step(loss_fn, tx, mesh=mesh, rules=rules)
    rows = NamedSharding(mesh, P(tuple(name for name in mesh.axis_names if name != "tensor")))
    batch = {name: jax.ShapeDtypeStruct((BATCH, LENGTH, D), jnp.float32, sharding=rows) for name in "xy"}
    with optimized():
        ours = step.lower(state, batch).compile()

        def frozen(x, params, y):
            return loss_fn(params, {"x": x, "y": y}, None)

        placed = jax.device_put(params, lora_jax.shardings(params, mesh, rules))
        bare = jax.jit(jax.value_and_grad(frozen)).lower(batch["x"], placed, batch["y"]).compile()
    return collective_ops(ours.as_text()), collective_ops(bare.as_text()), state


def auto(*sizes, names):
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))


def arrays(ops, *kinds, over=None):
    """Every array that collectives of some kinds move, but for single numbers, as often as it is moved."""
    return sorted(
        shape
        for op in ops
        if op.kind in kinds and (over is None or len(op.groups[0]) == over)
        for _, shape in op.arrays * op.times
        if math.prod(shape) > 1
    )


def without(first, second):
    """What the first list has beyond the second, each entry as often as it is there."""
    left = list(second)
    return [x for x in first if not (x in left and (left.remove(x) or True))]


@pytest.mark.parametrize("forward", [apart, scanned])
def test_data_parallel_sums_the_gradients_and_nothing_else(forward):
    ours, bare, state = compiled(forward, auto(8, names=("data",)), {"up|down": P()})
    assert {op.kind for op in ours} == {"all-reduce"} and not arrays(bare, "all-reduce")
    trainable = sum(x.nbytes for x in jax.tree.leaves(state.trainable))
    assert sum(4 * math.prod(shape) for shape in arrays(ours, "all-reduce")) == trainable
    numbers = sum(math.prod(shape) == 1 for op in ours for _, shape in op.arrays)
    assert numbers == 1, "the loss"


@pytest.mark.parametrize("forward", [apart, scanned])
def test_tensor_parallel_adds_tokens_times_rank(forward):
    """Once forward for a row-parallel weight, once backward for a column-parallel one, and no more."""
    stacked = (None,) if forward is scanned else ()
    rules = {"up": P(*stacked, None, "tensor"), "down": P(*stacked, "tensor", None)}
    ours, bare, _ = compiled(forward, auto(2, 4, names=("data", "tensor")), rules)
    tokens = BATCH // 2 * LENGTH
    extra = without(arrays(ours, "all-reduce", over=4), arrays(bare, "all-reduce", over=4))
    recomputed = LAYERS if forward is scanned else 0
    assert [math.prod(shape) for shape in extra] == [tokens * RANK] * (2 * LAYERS + recomputed)
    assert not arrays(ours, "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.mark.parametrize("forward", [apart, scanned])
def test_fsdp_gathers_a_and_b_and_of_w_what_the_frozen_model_does(forward):
    stacked = (None,) if forward is scanned else ()
    ours, bare, _ = compiled(forward, auto(8, names=("fsdp",)), {"up|down": P(*stacked, "fsdp")})

    def gathered(ops, least, most):
        return sum(n for n in map(math.prod, arrays(ops, "all-gather")) if least < n <= most)

    factor = WIDTH * RANK
    assert 0 < gathered(ours, factor, D * WIDTH) <= gathered(bare, factor, D * WIDTH)
    # Each factor at most once forward, once recomputed and once backward.
    assert gathered(ours, 0, factor) <= 3 * LAYERS * 2 * (D + WIDTH) * RANK
    assert not arrays(ours, "all-to-all", "collective-permute")
