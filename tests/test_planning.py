"""Plans: counts against XLA's and by hand, collectives that are known by hand, refusals and errors."""

import collections
import dataclasses
import importlib.util
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.errors import JaxRuntimeError
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.plan import models, run
from lora_jax import planning
from lora_jax.hlo import Collective, collective_ops, collectives
from lora_jax.interpret import RefusedError
from lora_jax.operations import flops
from lora_jax.planning import plan

GIB = 2**30


@pytest.fixture(autouse=True, scope="module")
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        yield


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def xla_flops(fn, *args):
    """XLA's own count of a program that is not optimized: for products alone it is exact."""
    return known(jax.jit(fn).lower(*args).cost_analysis())["flops"]


def known(x):
    assert x is not None
    return x


# Operations


def chain(ws, x):
    return lax.scan(lambda x, w: (x @ w, None), x, ws)[0]


def unrolled(ws, x):
    for w in ws:
        x = x @ w
    return x


def gradient(fn):
    """The value, and the gradients for a given cotangent, so that nothing but products is left."""

    def both(w, x, dy):
        y, backward = jax.vjp(fn, w, x)
        return y, backward(dy)

    return both


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_counts_as_its_steps_unrolled_do_for_xla(remat):
    scanned = jax.checkpoint(chain) if remat else chain
    stacked, single, x = shape(5, 16, 16), [shape(16, 16)] * 5, shape(8, 16)
    forward = 5 * 2 * 8 * 16**2
    assert flops(chain, stacked, x) == flops(unrolled, single, x) == xla_flops(unrolled, single, x) == forward
    backward = flops(gradient(scanned), stacked, x, x)
    assert backward == (4 if remat else 3) * forward
    if not remat:
        assert backward == xla_flops(gradient(unrolled), single, x, x)


@pytest.mark.parametrize(
    "strides, padding, spread, dilation, groups",
    [
        ((1, 1), "VALID", (1, 1), (1, 1), 1),
        ((2, 3), "SAME", (1, 1), (1, 1), 1),
        ((1, 2), [(3, 0), (1, 4)], (1, 1), (2, 3), 2),
        ((1, 1), [(2, 2), (1, 1)], (2, 3), (1, 1), 1),
        ((1, 1), "SAME", (1, 1), (1, 1), 4),
    ],
)
def test_convolutions_count_as_for_xla(strides, padding, spread, dilation, groups):
    def convolve(w, x):
        return lax.conv_general_dilated(
            x,
            w,
            strides,
            padding,
            spread,
            dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    w, x = shape(3, 4, 4 // groups, 8), shape(2, 9, 10, 4)
    y = jax.eval_shape(convolve, w, x)
    assert flops(convolve, w, x) == xla_flops(convolve, w, x)
    assert flops(gradient(convolve), w, x, y) == xla_flops(gradient(convolve), w, x, y)


def test_a_ragged_dot_counts_each_row_once():
    def experts(w, x):
        return lax.ragged_dot(x, w, jnp.array([2, 3, 1], jnp.int32))

    w, x, y = shape(3, 8, 4), shape(6, 8), shape(6, 4)
    assert flops(experts, w, x) == 2 * 6 * 8 * 4
    assert flops(gradient(experts), w, x, y) == 3 * 2 * 6 * 8 * 4


def test_control_flow():
    w, x = shape(16, 16), shape(8, 16)
    once = 2 * 8 * 16**2
    assert flops(lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), w, x) == 2 * once
    assert flops(lambda w, x: lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ w, x), w, x) == once
    assert flops(lambda w, x: (x @ w, x @ w @ w)[0], w, x) == once  # what nothing depends on
    assert flops(jax.jit(lambda w, x: jax.jit(lambda x: x @ w)(x) + jax.jit(jnp.dot)(x, w)), w, x) == 2 * once

    @jax.custom_vjp
    def doubled(w, x):
        return x @ w @ w

    doubled.defvjp(lambda w, x: (doubled(w, x), (w, x)), lambda kept, dy: (kept[1].T @ dy, dy @ kept[0].T))
    assert flops(doubled, w, x) == 2 * once
    assert flops(gradient(doubled), w, x, x) == 4 * once

    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(P(), P("x")), out_specs=P("x"))
    assert flops(sharded, w, x) == once


def test_a_carry_that_only_gradients_use_is_followed_around_the_loop():
    # The carry is a product's operand one step later, though its last value is dropped.
    def fn(w, x):
        return lax.scan(lambda c, _: (c @ w, c), x, length=3)[1][1]

    assert flops(fn, shape(16, 16), shape(8, 16)) == 3 * 2 * 8 * 16**2


def mlp(params, batch, key):
    h = jnp.tanh(batch["x"] @ params["up"]["kernel"])
    return jnp.mean((h @ params["down"]["kernel"]) ** 2)


MLP = {
    "up": {"kernel": shape(32, 64, dtype=jnp.bfloat16)},
    "down": {"kernel": shape(64, 16, dtype=jnp.bfloat16)},
}
X = {"x": shape(24, 32, dtype=jnp.bfloat16)}
UP, DOWN = 2 * 24 * 32 * 64, 2 * 24 * 64 * 16
RANK = 4


def branch(size_in, size_out, to_input):
    """The branch's own products: forward two, and t's gradient, dA and dB; and dx where it is needed."""
    first, second = 2 * 24 * size_in * RANK, 2 * 24 * RANK * size_out
    return 2 * first + 3 * second + to_input * first


@pytest.mark.parametrize(
    "keywords, floor, extra",
    [
        ({"targets": "up|down"}, UP + 2 * DOWN, branch(32, 64, False) + branch(64, 16, True)),
        ({"targets": "up"}, UP + 2 * DOWN, branch(32, 64, False)),
        ({"targets": "down"}, UP + DOWN, branch(64, 16, False)),
        ({"targets": "up", "train": "down"}, UP + 3 * DOWN, branch(32, 64, False)),
        ({"targets": "up", "accumulate": 3}, UP + 2 * DOWN, branch(32, 64, False)),
    ],
    ids=["both", "first", "last", "last in full", "accumulated"],
)
def test_the_step_the_floor_and_full_fine_tuning(keywords, floor, extra, monkeypatch):
    monkeypatch.setattr(planning, "_compile", lambda *_: planning._Compiled(0))
    found = plan(mlp, MLP, X, rank=RANK, tx=optax.sgd(1.0), topology="cpu:1", **keywords).flops
    assert (found.floor, found.full) == (floor, 2 * UP + 3 * DOWN)
    assert found.step == floor + extra


# Collectives


def on_mesh(fn, in_specs, out_specs, *args):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(mapped).lower(*args).compile().as_text()


def test_each_kind_by_hand():
    def fn(x):  # (2, 8) on a device
        x = x + lax.psum(x, "a")
        x = x + lax.psum_scatter(lax.all_gather(x, "b"), "b")
        x = x + lax.ppermute(x, "a", [(i, (i + 1) % 4) for i in range(4)])
        return x + lax.all_to_all(x.reshape(2, 4, 2), "a", 1, 1).reshape(2, 8)

    text = on_mesh(fn, P("a", "b"), P("a", "b"), shape(8, 16))
    assert collectives(text) == {
        "all-gather": Collective(1, 2 * 2 * 8 * 4),
        "reduce-scatter": Collective(1, 2 * 2 * 8 * 4),
        "all-reduce": Collective(1, 2 * 8 * 4),
        "collective-permute": Collective(1, 2 * 8 * 4),
        "all-to-all": Collective(1, 2 * 8 * 4),
    }
    ops = {op.kind: op for op in collective_ops(text)}
    assert ops["all-reduce"].groups == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert ops["all-gather"].groups == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert known(ops["collective-permute"].groups)[0] == (0, 2)
    dtype, sizes = ops["all-gather"].arrays[0]
    assert dtype == "f32" and math.prod(sizes) == 32


def test_loops_multiply():
    def fn(x):
        def inner(x, _):
            return jnp.sin(lax.psum(x, "b")), None

        def outer(x, _):
            x, _ = lax.scan(inner, x, length=5)
            return jnp.cos(lax.psum(x, "a")), None

        return lax.scan(outer, x, length=3)[0]

    ops = collective_ops(on_mesh(fn, P(), P(), shape(6, 8, dtype=jnp.float32)))
    assert sorted((op.times, len(op.groups), op.bytes) for op in ops) == [(3, 2, 192), (15, 4, 192)]


def test_fsdp_gathers_every_layer_of_a_scan():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))

    def on(x, *spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*spec)))

    def layer(x, w):
        return lax.with_sharding_constraint(jnp.tanh(x @ w), NamedSharding(mesh, P("fsdp"))), None

    fn = jax.jit(lambda w, x: lax.scan(layer, x, w)[0])
    text = fn.lower(on(shape(6, 64, 64), None, "fsdp"), on(shape(16, 64), "fsdp")).compile().as_text()
    assert collectives(text) == {"all-gather": Collective(6, 6 * 64 * 64 * 4)}


HLO = """HloModule jit_f, is_scheduled=true, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%wrapped (p: bf16[8,2]) -> bf16[2,2] {
  %p = bf16[8,2]{1,0} parameter(0)
  ROOT %rs = bf16[2,2]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}

%own_slice (q: f32[8,4]) -> f32[2,4] {
  %q = f32[8,4]{1,0:T(8,128)} parameter(0)
  %i = u32[] partition-id()
  %z = u32[] constant(0)
  %reduced = f32[8,4]{1,0:T(8,128)} all-reduce(%q), channel_id=9, replica_groups={}, to_apply=%add
  ROOT %slice = f32[2,4]{1,0:T(8,128)S(1)} dynamic-slice(%reduced, %i, %z), dynamic_slice_sizes={2,4}
}

%begin (r: s8[4]) -> (s8[4], s8[16]) {
  %r = s8[4]{0} parameter(0)
  %gathered.1 = s8[16]{0} all-gather(%r), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %c.1 = (s8[4]{0}, s8[16]{0}) custom-call(%r, %gathered.1), custom_call_target="AsyncCollectiveStart"
}

%goes_on (r.2: s8[4]) -> s8[16] {
  %r.2 = s8[4]{0} parameter(0)
  ROOT %gathered.2 = s8[16]{0} all-gather(%r.2), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
}

%small (s: f32[]) -> f32[] {
  %s = f32[] parameter(0)
  ROOT %r.3 = f32[] all-reduce(%s), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
}

%large (t: f32[]) -> f32[] {
  %t = f32[] parameter(0)
  %t.1 = f32[] all-reduce(%t), replica_groups=mesh['x'=2,'y'=2] {'y'}, to_apply=%add
  ROOT %t.2 = f32[] all-reduce(%t.1), replica_groups=mesh['x'=4] {'x':(1)2}, to_apply=%add
}

%below (v: (u32[], f32[4], u32[])) -> pred[] {
  %v = (u32[]{:T(128)}, f32[4]{0}, /*index=2*/u32[]) parameter(0)
  %n = u32[] constant(7)
  %v.0 = u32[] get-tuple-element(%v), index=0
  ROOT %lt = pred[] compare(%v.0, %n), direction=LT
}

%turn (u: (u32[], f32[4], u32[])) -> (u32[], f32[4], u32[]) {
  %u = (u32[], f32[4]{0}, u32[]) parameter(0)
  %u.0 = u32[] get-tuple-element(%u), index=0
  %u.1 = f32[4]{0} get-tuple-element(%u), index=1
  %u.2 = u32[] get-tuple-element(%u), index=2
  %next = u32[] add(%u.0, %u.2)
  %cp = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%u.1), source_target_pairs={{0,1},{1,0}}
  %cp.done = f32[4]{0} collective-permute-done(%cp)
  %f = s8[16]{0} fusion(%u.1), kind=kCustom, calls=%goes_on
  ROOT %out = (u32[], f32[4]{0}, u32[]) tuple(%next, %cp.done, %u.2)
}

ENTRY %main (a: bf16[8,2], b: f32[8,4], c: s8[4], d: f32[], e: s32[], g: f32[4]) -> f32[] {
  %a = bf16[8,2]{1,0} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  %c = s8[4]{0} parameter(2)
  %d = f32[] parameter(3)
  %e = s32[] parameter(4)
  %g = f32[4]{0} parameter(5)
  %start = ((bf16[8,2]{1,0}), bf16[2,2]{1,0}, u32[]) async-start(%a), calls=%wrapped
  %done = bf16[2,2]{1,0} async-done(%start), calls=%wrapped
  %ag = (f32[4]{0}, f32[16]{0}) all-gather-start(%g), replica_groups={{0,1,2,3}}, dimensions={0}
  %ag.done = f32[16]{0} all-gather-done(%ag)
  %own = f32[2,4]{1,0} fusion(%b), kind=kCustom, calls=%own_slice
  %begun = (s8[4]{0}, s8[16]{0}) fusion(%c), kind=kCustom, calls=%begin
  %zero = u32[] constant(0)
  %zero.1 = u32[] copy(%zero)
  %two = u32[] constant(2)
  %pair = (u32[], u32[]) parameter(6)
  %other = u32[] get-tuple-element(%pair), index=1
  %first = (u32[], f32[4]{0}, u32[], u32[]) tuple(%zero.1, %g, %two, %other)
  %loop = (u32[], f32[4]{0}, u32[]) while(%first), condition=%below, body=%turn
  ROOT %either = f32[] conditional(%e, %d, %d), branch_computations={%small, %large}, metadata={}
}
"""


def test_forms_that_accelerators_write():
    ops = collective_ops(HLO)
    found = [(op.kind, op.bytes, op.times, op.groups) for op in ops]
    everyone = ((0, 1, 2, 3),)
    assert found == [
        ("reduce-scatter", 32, 1, everyone),
        ("all-gather", 64, 1, everyone),
        ("reduce-scatter", 128, 1, ()),  # fused: all-reduce, and of the sum the device's own slice
        ("all-gather", 16, 1, everyone),  # spread over two fusions, one of them in the loop
        ("collective-permute", 16, 4, ((0, 1), (1, 0))),  # 0, 2, 4, 6 are below 7
        ("all-reduce", 4, 1, ((0, 1), (2, 3))),
        ("all-reduce", 4, 1, ((0, 2), (1, 3))),
    ]
    unknown = HLO.replace("%n = u32[] constant(7)", "%n = u32[] partition-id()")
    assert [op.times for op in collective_ops(unknown) if op.kind == "collective-permute"] == [1]
    with pytest.raises(ValueError, match=r"compiled.as_text\(\)"):
        collectives("module @jit_f {}")


# Plans


def stacked(**keywords):
    """A plan of a small scanned model, its weights sharded over eight devices."""
    keywords = {
        "topology": "cpu:8",
        "tx": optax.adam(1e-3),
        "axes": {"kernel": ("batch", "in", "out")},
    } | keywords
    params = {"kernel": shape(4, 64, 64, dtype=jnp.bfloat16), "bias": shape(64, dtype=jnp.bfloat16)}

    def loss_fn(params, batch, key):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        layer = jax.checkpoint(layer) if keywords.get("remat") else layer
        y = lax.scan(layer, batch, params["kernel"])[0] + params["bias"]
        return jnp.mean(y**2), {"largest": jnp.max(y)}

    batch = shape(32, 64, dtype=jnp.bfloat16)
    given = {name: value for name, value in keywords.items() if name != "remat"}
    return plan(loss_fn, params, batch, rank=2, **given)


@pytest.fixture(scope="module")
def small():
    return stacked(compile_full=True)


def test_states_are_those_of_the_shards(small):
    factors = 4 * 64 * 2  # of which one is sharded, the one with the kernel's own sharded axis
    trained = (factors // 8 + factors) * 4
    count, bias, scale = 4, 64 * 2, 4 * 4
    lora, full = small.memory, small.full
    assert (lora.base, lora.trained, lora.gradients) == (
        4 * 64 * 64 * 2 // 8 + bias + scale,
        trained,
        trained,
    )
    assert (lora.optimizer, lora.batch) == (2 * trained + count, 32 * 64 * 2 // 8)
    assert (full.base, full.trained, full.optimizer) == (
        0,
        lora.base - scale,
        2 * (lora.base - scale) + count,
    )
    assert (small.trained, small.parameters) == (2 * factors, 4 * 64 * 64 + 64)
    for memory in (lora, full):
        assert memory.peak == memory.states + memory.activations
        assert known(memory.activations) > 0


def test_states_are_the_arguments_that_the_compiler_counts(monkeypatch):
    said = []
    original = jax.stages.Compiled.memory_analysis
    monkeypatch.setattr(
        jax.stages.Compiled, "memory_analysis", lambda self: said.append(original(self)) or said[-1]
    )
    found = stacked(compile_full=True)
    for memory, counted in zip((found.memory, found.full), said, strict=True):
        assert counted.argument_size_in_bytes == memory.states + 4  # the step's number


def test_the_compiled_step_is_what_is_reported(small):
    # Every layer's kernel is gathered going forward and once more going back.
    assert known(small.collectives)["all-gather"].bytes >= 2 * 4 * 64 * 64 * 2
    assert small.flops.full == 3 * small.flops.floor / 2
    assert (small.fits, small.limit, small.advice, small.refusal) == (None, None, (), None)
    assert (small.topology, small.devices, small.mesh) == ("cpu:8", 8, {"fsdp": 8})


def test_a_plan_is_data_and_a_table(small):
    assert json.loads(json.dumps(dataclasses.asdict(small)))["memory"]["base"] == small.memory.base
    lines = str(small).splitlines()
    assert lines[0].startswith("not known whether it fits: ") and "8 x cpu (cpu:8, fsdp 8)" in lines[0]
    tables = [[line for line in block.splitlines()] for block in str(small).split("\n\n")[1:]]
    assert len(tables) == 4
    for table in tables:
        assert len({len(line) for line in table}) == 1, table


def test_activations_divide_by_microbatches():
    whole, parts = (stacked(accumulate=n, topology="cpu:1").memory for n in (1, 4))
    assert known(parts.activations) < known(whole.activations)


def test_memory_that_is_known_decides(monkeypatch, small):
    monkeypatch.setattr(planning, "_limit", lambda device: small.memory.peak)
    assert stacked().fits is True
    monkeypatch.setattr(planning, "_limit", lambda device: small.memory.peak - 1)
    found = stacked()
    assert found.fits is False and found.refusal is None
    assert str(found).startswith("does not fit: ")


def refused(monkeypatch, text, **keywords):
    def compile(self, *args, **kwargs):
        raise JaxRuntimeError(text)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
    return stacked(**keywords)


OVER = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for "
)
OVER += (
    "HLO temporaries ({}) exceeds available HBM ({}). HLO module: jit_f.\nSee https://openxla.org/xla/errors"
)


@pytest.mark.parametrize(
    "text, peak, limit",
    [
        (OVER.format("40.87G", "31.24G"), 40.87 * GIB, 31.24 * GIB),
        ("RESOURCE_EXHAUSTED: Ran out. Used 40.87G of 31.24G hbm. Exceeded", 40.87 * GIB, 31.24 * GIB),
        (OVER.format("512.00K", "100.50K"), 512 * 1024, 100.5 * 1024),
    ],
)
def test_a_refusal_for_memory_is_an_answer(monkeypatch, text, peak, limit):
    found = refused(monkeypatch, text, compile_full=True)
    assert (found.fits, found.memory.peak, found.limit) == (False, round(peak), round(limit))
    assert found.full.peak == round(peak)
    assert found.collectives is None and found.refusal == text.splitlines()[0]
    assert "the compiler refused the step" in str(found)


ADVICE = ("remat", "smaller batch", "more shards")


def test_advice_is_drawn_from_the_figures(monkeypatch):
    def advice(needed, limit, **keywords):
        return {
            line.split(":")[0]: line
            for line in refused(monkeypatch, OVER.format(needed, limit), **keywords).advice
        }

    # 11.4 KiB are states, so of 150 KiB 138.6 are left where 500.6 are needed: for 8.9 of 32 examples.
    found = advice("512.00K", "150.00K")
    assert next(iter(found)).startswith("138.6") and set(found) > set(ADVICE)
    assert "fewer than 9 examples at a time in place of 32" in found["smaller batch"]
    assert "accumulate=4 has 8 at a time" in found["smaller batch"]
    assert "fewer than 23 examples" in (larger := advice("512.00K", "360.00K")["smaller batch"])
    assert "accumulate=4 has 8 at a time" in larger  # and not 16, which may just be too many
    assert "about 28 devices in place of 8" in found["more shards"]
    # Each of the eight shards takes an example at least.
    assert "smaller batch" not in advice("512.00K", "150.00K", accumulate=2)
    assert "remat" not in advice("512.00K", "150.00K", remat=True)
    (only,) = advice("512.00K", "8.00K").values()
    assert only.startswith("more shards: parameters and optimizer alone take 11.")
    assert "12 devices in place of 8" in only


def test_other_errors_of_the_compiler_are_raised(monkeypatch):
    with pytest.raises(JaxRuntimeError, match="INTERNAL: something else"):
        refused(monkeypatch, "INTERNAL: something else")


class Network(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(nnx.relu(self.norm(self.up(x)))))


def test_a_module_with_statistics():
    def loss_fn(model, batch, key):
        return jnp.mean(model(batch) ** 2)

    found = plan(loss_fn, Network(nnx.Rngs(0)), shape(8, 16), rank=2, tx=optax.sgd(1e-2), topology="cpu:2")
    once = 2 * 8 * (16 * 32 + 32 * 8)
    assert found.flops.floor == once + 2 * 8 * 32 * 8
    assert found.trained == 2 * (16 + 32 + 32 + 8)
    assert found.parameters == 16 * 32 + 32 + 2 * 32 + 32 * 8 + 8  # statistics are not


def unread(topology, loss_fn=None, **keywords):
    """A plan of a model with arrays that its loss does not read: 22 GiB, and a whole batch of indices."""

    def kernel_alone(params, batch, key):
        return jnp.mean((batch["x"] @ params["kernel"]) ** 2)

    params = {
        "kernel": shape(512, 512, dtype=jnp.bfloat16),
        "tower": shape(11, 2**30, dtype=jnp.bfloat16),
        "hole": None,
    }
    batch = {"i": shape(8, dtype=jnp.int32), "x": shape(8, 512, dtype=jnp.bfloat16)}
    options = {"rank": 4, "targets": "kernel", "tx": optax.adam(1.0)} | keywords
    return plan(loss_fn or kernel_alone, params, batch, topology=topology, **options)


def constant(params, batch, key):
    return jnp.ones((), jnp.float32)


TOWER = 11 * 2**30 * 2


@pytest.mark.parametrize("devices", [1, 8])
def test_arrays_that_the_loss_does_not_read_lie_on_the_device_too(devices):
    sharded = {"rules": {"kernel": P(), "tower": P(None, "fsdp")}}
    read, nothing = unread(f"cpu:{devices}", **sharded), unread(f"cpu:{devices}", constant, **sharded)
    for memory in (read.memory, nothing.memory):
        assert memory.base == TOWER // devices + 512 * 512 * 2 + 4  # the scale
        assert memory.batch == 8 // devices * (4 + 512 * 2)
        assert known(memory.peak) == memory.states + known(memory.activations)
        assert 0 <= known(memory.activations) < 2**22
    # Its kernel's gradient, which the constant does not have, is more than a constant's work space.
    assert known(read.memory.activations) > known(nothing.memory.activations)


def test_what_the_compiler_leaves_out_is_all_that_is_added(monkeypatch):
    said = []
    original = jax.stages.Compiled.memory_analysis
    monkeypatch.setattr(
        jax.stages.Compiled, "memory_analysis", lambda self: said.append(original(self)) or said[-1]
    )
    memory = unread("cpu:1", constant).memory
    # Left out are the base, its scale and the batch; kept are the trained, Adam's state and the step.
    assert said[0].argument_size_in_bytes == memory.trained + memory.optimizer + 4
    own = said[0].temp_size_in_bytes + said[0].output_size_in_bytes - said[0].alias_size_in_bytes
    own += said[0].generated_code_size_in_bytes
    assert known(memory.peak) == memory.states + 4 + own


@pytest.mark.parametrize("loss_fn", [None, constant])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_refusal_does_not_count_them_and_the_plan_does(monkeypatch, loss_fn, accumulate):
    said = []
    original = jax.stages.Compiled.memory_analysis
    monkeypatch.setattr(
        jax.stages.Compiled, "memory_analysis", lambda self: said.append(original(self)) or said[-1]
    )
    compiled = unread("cpu:1", loss_fn, accumulate=accumulate).memory
    left_out = compiled.states + 4 - said[0].argument_size_in_bytes  # 4: the step's number

    def refuse(self, *args, **kwargs):
        raise JaxRuntimeError(OVER.format("17.00G", "15.75G"))

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    found = unread("cpu:1", loss_fn, accumulate=accumulate)
    assert left_out >= TOWER and found.fits is False
    assert known(found.memory.peak) == 17 * GIB + left_out


def test_numbers_of_less_than_a_byte_lie_close_together():
    params = {
        "kernel": shape(64, 64),
        "table": shape(3, 5, dtype=jnp.int4),
        "mask": shape(7, dtype=jnp.bool_),
    }

    def loss_fn(params, batch, key):
        return jnp.mean(batch @ params["kernel"]) + jnp.sum(params["table"].astype(jnp.float32))

    options = {"rank": 2, "targets": "kernel", "tx": optax.sgd(1.0), "topology": "cpu:1"}
    assert plan(loss_fn, params, shape(8, 64), **options).memory.base == 64 * 64 * 4 + 8 + 7 + 4


def test_leaves_that_are_no_arrays_reach_the_model():
    params = {"kernel": np.ones((16, 8), np.float32), "activation": jnp.tanh, "name": None}

    def loss_fn(params, batch, key):
        return jnp.mean(params["activation"](batch @ params["kernel"]))

    found = plan(
        loss_fn, params, shape(8, 16), rank=2, targets="kernel", tx=optax.sgd(1e-2), topology="cpu:1"
    )
    assert found.flops.floor == 2 * 8 * 16 * 8


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_of_its_own(kind):
    def loss_fn(params, batch, key):
        return jnp.mean((batch @ params["kernel"]) ** 2)

    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind,) * 2)
    params = {"kernel": shape(16, 8)}
    rules = {"kernel": P(None, "tensor")}
    found = plan(
        loss_fn, params, shape(8, 16), rank=2, targets="kernel", tx=optax.sgd(1e-2), mesh=mesh, rules=rules
    )
    assert (found.topology, found.mesh) == ("local", {"data": 2, "tensor": 4})
    assert found.memory.base == 16 * 8 * 4 // 4 + 4
    assert found.memory.batch == 8 * 16 * 4 // 2


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"topology": 5}, r"the topology is 5; write \"v5e:2x4\".*\"cpu:8\".*or leave it out"),
        ({"mesh": 8}, r"mesh is 8; .*mesh=\{'fsdp': 8\}"),
        ({"mesh": "data"}, r"mesh is 'data'; .*mesh=\{'data': -1\}"),
        ({"mesh": (2, 4)}, r"mesh is \(2, 4\); .*mesh=\{'fsdp': -1\}"),
        ({"mesh": {}}, r"mesh is \{\}; "),
        ({"tx": None}, "tx is NoneType None; write an optax transformation, such as optax.adamw"),
        ({"batch_spec": "fsdp"}, r"batch_spec is 'fsdp'; .*batch_spec=jax.sharding.PartitionSpec\('fsdp'\)"),
        ({"topolgy": "cpu:8"}, "plan has no argument 'topolgy'; the nearest is 'topology'"),
        ({"target": "kernel"}, "plan has no argument 'target'; the nearest is 'targets'"),
        ({"checkpoint": True}, r"no argument 'checkpoint': .* for loss_fn to say. Put jax.checkpoint \("),
    ],
)
def test_arguments_of_the_wrong_kind(keywords, message):
    with pytest.raises(TypeError, match=message):
        stacked(**keywords)


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"topology": "v5e:2x0"}, "the topology 'v5e:2x0' has no devices"),
        ({"topology": "v5e:2x4x4"}, "'v5e:2x4x4' has 3 axes, and the network of v5e has 2; .*\"v5e:4x4\""),
        ({"topology": "v5e:8"}, "'v5e:8' has 1 axes, and the network of v5e has 2"),
        ({"topology": "v6e:2x2x2"}, "'v6e:2x2x2' has 3 axes, and the network of v6e has 2"),
        ({"topology": "v5p:2x4"}, "'v5p:2x4' has 2 axes, and the network of v5p has 3; .*\"v5p:4x4x4\""),
        ({"topology": "v4:2x2"}, "'v4:2x2' has 2 axes, and the network of v4 has 3"),
        ({"topology": "v3:2x2x2"}, "'v3:2x2x2' has 3 axes, and the network of v3 has 2"),
        ({"topology": "v5e:1000x1000"}, 'larger than the largest slice of v5e, of 16x16; write "v5e:2x4"'),
        ({"topology": "v5e:8x32"}, "larger than the largest slice of v5e, of 16x16"),
        ({"topology": "v2:16x32"}, "larger than the largest slice of v2, of 16x16"),
        ({"topology": "v3:33x1"}, "larger than the largest slice of v3, of 32x32"),
        ({"topology": "v5p:16x16x28"}, "larger than the largest slice of v5p, of 6144 chips"),
        ({"topology": "v9x:2x2"}, "'v9x:2x2' is of no kind of TPU that is served, which are v2, v3, .*v6e"),
        ({"topology": "cpu:0"}, "the topology 'cpu:0' has no devices; .*\"cpu:8\" for so many CPU devices"),
        ({"topology": "gpu:8"}, r"'gpu:8' is none that is served.*TPUs and for CPUs only.*on a machine with"),
        ({"topology": "h100:2x4"}, r"'h100:2x4' is none that is served"),
        ({"mesh": {"fsdp": -1, "tensor": 0}}, r"'tensor' has the size 0; .*mesh=\{'tensor': -1\}"),
        ({"mesh": {"fsdp": "8"}}, r"'fsdp' has the size '8'"),
        ({"topology": "v5p-64"}, r"the topology is 'v5p-64'; write \"v5e:2x4\""),
        ({"topology": "cpu:9"}, r"needs 9 CPU devices, and there are 8. Write jax.config.update"),
        ({"mesh": {"fsdp": 3}}, r"the mesh fsdp 3 needs 3 devices, and cpu:8 has 8; .*mesh=\{'fsdp': 8\}"),
        ({"mesh": {"fsdp": -1, "tensor": 3}}, r"the mesh fsdp 2 x tensor 3 needs 6 devices"),
        ({"mesh": {"fsdp": -1, "tensor": -1}}, r"only one"),
        (
            {"batch_spec": P(None, ("fsdp",)), "mesh": {"fsdp": 8}, "accumulate": 5},
            r"32 examples does not divide",
        ),
    ],
)
def test_errors_say_what_to_write(keywords, message):
    with pytest.raises(ValueError, match=message):
        stacked(**keywords)


def test_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match=r"the batch's 'x' has shape \(6, 32\), which does not divide"):
        plan(mlp, MLP, {"x": shape(6, 32)}, rank=2, targets="up", tx=optax.sgd(1.0), topology="cpu:8")


def test_what_is_not_by_example_may_have_a_sharding_of_its_own():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((6, 32), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    found = plan(mlp, MLP, {"x": x}, rank=2, targets="up", tx=optax.sgd(1.0), mesh=mesh)
    assert found.memory.batch == 6 * 32 * 2


def test_a_number_in_the_batch_is_an_array_as_it_is_in_the_step():
    def loss_fn(params, batch, key):
        y = (batch["x"] @ params["up"]["kernel"]) * batch["factor"]
        assert y.dtype == jnp.bfloat16  # the number has no dtype of its own
        return jnp.mean(y.astype(jnp.float32))

    batch = {"x": np.ones((24, 32), jnp.bfloat16), "factor": 0.5}
    options = {"rank": 2, "targets": "up", "tx": optax.sgd(1.0), "topology": "cpu:8"}
    found = plan(loss_fn, MLP, batch, **options)
    assert found.memory.batch == 24 // 8 * 32 * 2 + 8
    with pytest.raises(TypeError, match=r"the batch's 'factor' is 'half'; write an array"):
        plan(loss_fn, MLP, batch | {"factor": "half"}, **options)


def test_no_batch():
    options = {"rank": 2, "targets": "kernel", "tx": optax.sgd(1.0), "topology": "cpu:1"}
    params = {"kernel": shape(16, 8)}
    with pytest.raises(TypeError, match=r"batch is None; write the whole batch .*or \{\} where"):
        plan(lambda params, batch, key: jnp.mean(batch["x"] @ params["kernel"]), params, None, **options)
    assert plan(lambda params, batch, key: jnp.mean(params["kernel"][0]), params, {}, **options).trained == 48


def test_a_loss_of_two_arguments():
    def loss(params, batch):
        return mlp(params, batch, None)

    with pytest.raises(
        TypeError, match=r"loss_fn is called as loss\(params, batch, key\), and takes \(params"
    ):
        plan(loss, MLP, X, rank=2, tx=optax.sgd(1.0), topology="cpu:1")


def test_errors_about_wrap_and_lora_say_that_plan_takes_the_same():
    def squared(params, batch, key):
        return mlp(jax.tree.map(jnp.square, params), batch, key)

    options = {"rank": 2, "tx": optax.sgd(1.0), "topology": "cpu:1"}
    with pytest.raises(RefusedError, match="densify='up/kernel'") as refused:
        plan(squared, MLP, X, targets="up", **options)
    assert refused.value.__notes__[-1] == "plan takes this itself: lora_jax.plan(..., densify=...)."
    found = plan(squared, MLP, X, targets="up", densify="up", compile_full=True, **options)
    assert found.trained == 2 * (32 + 64) and known(found.full.peak) > 0
    with pytest.raises(ValueError, match=r"'heads' .*wrap\(") as ambiguous:
        plan(mlp, MLP | {"heads": shape(4, 4, 4)}, X, targets="heads", **options)
    assert "lora_jax.plan(..., axes=...)" in ambiguous.value.__notes__[-1]


def test_a_mesh_has_its_devices():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match=r"mesh=\{'fsdp': 8\}, or leave the topology out"):
        stacked(mesh=mesh)


def test_without_libtpu_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lora-jax\[tpu\]". No TPU is needed'):
        stacked(topology="v5p:2x2x2")


# With the TPU compiler


@needs_libtpu
@pytest.mark.parametrize("topology, gib", [("v5e:2x2", 15.75), ("v5p:2x2x1", 95.73), ("v6e:2x2", 31.24)])
def test_a_slice_of_tpus(topology, gib):
    found = stacked(topology=topology, mesh={"fsdp": 4})
    assert found.fits is True and found.device.startswith("TPU")
    assert known(found.limit) / GIB == pytest.approx(gib, abs=0.02)
    assert found.memory.states < known(found.memory.peak) < 2**24


@needs_libtpu
def test_loops_multiply_where_the_text_does_not_say_how_often():
    mesh = planning._mesh("v5e:2x2", {"a": 2, "b": 2})

    def fn(x):
        def inner(x, _):
            return jnp.sin(lax.psum(x, "b")), None

        def outer(x, _):
            x, _ = lax.scan(inner, x, length=50)
            return jnp.cos(lax.psum(x, "a")), None

        return lax.scan(outer, x, length=30)[0]

    mapped = jax.shard_map(fn, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=NamedSharding(mesh, P()))
    text = known(jax.jit(mapped).lower(x).compile().as_text())
    assert " while(" in text and "known_trip_count" not in text
    times = collections.Counter()  # the compiler may unroll a part
    for op in collective_ops(text):
        times[op.groups] += op.times
        assert (op.kind, op.bytes) == ("all-reduce", 64 * 128 * 4)
    assert times == {((0, 2), (1, 3)): 30, ((0, 1), (2, 3)): 30 * 50}


@needs_libtpu
def test_what_is_too_large_for_a_chip_is_refused():
    params = {"kernel": shape(8192, 8192)}
    batch = shape(2**20, 8192)

    def loss_fn(params, batch, key):
        return jnp.sum(jnp.tanh(batch @ params["kernel"]) @ params["kernel"].T)

    found = plan(loss_fn, params, batch, rank=2, targets="kernel", tx=optax.sgd(1.0), topology="v6e:1x1")
    assert found.fits is False and known(found.memory.peak) > known(found.limit) > 31 * GIB
    assert found.advice and "HBM" in known(found.refusal)


@needs_libtpu
def test_a_mesh_may_split_an_axis_of_the_slice():
    assert dict(planning._mesh("v5p:4x4x4", {"fsdp": -1, "tensor": 2}).shape) == {"fsdp": 32, "tensor": 2}


@needs_libtpu
def test_a_topology_that_libtpu_does_not_know():
    with pytest.raises(ValueError, match=r"libtpu knows no topology 'v5e:3x3'.*write \"v5e:2x4\""):
        stacked(topology="v5e:3x3")


@needs_libtpu
@pytest.mark.parametrize("topology, devices, gib", [("v4:2x2x1", 4, 30.75), ("v3:1x1", 2, 15.48)])
def test_kinds_with_two_cores_on_a_chip(topology, devices, gib):
    # Those of v4 are one device with the chip's whole memory, those of v3 two with a half each.
    found = stacked(topology=topology)
    assert (found.devices, found.fits) == (devices, True)
    assert known(found.limit) / GIB == pytest.approx(gib, abs=0.02)


@needs_libtpu
def test_a_base_that_is_larger_than_the_chip_does_not_fit_though_nothing_reads_it():
    found = unread("v5e:1x1")
    assert found.fits is False and found.refusal is None
    assert known(found.memory.peak) > TOWER > known(found.limit)
    assert 0 <= known(found.memory.activations) < 2**22
    assert found.advice[0].startswith("more shards: parameters and optimizer alone take 22.00 GiB; 2 devices")
    assert unread("v5e:2x2", rules={"kernel": P(), "tower": P(None, "fsdp")}, mesh={"fsdp": 4}).fits is True


# The command


@pytest.mark.parametrize("preset", models.CONFIGS)
def test_the_models_run_and_are_causal(preset):
    config = models.tiny(models.CONFIGS[preset])
    params = models.init(jax.random.key(0), config, jnp.float32)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        jnp.shape, jax.eval_shape(lambda key: models.init(key, config), jax.random.key(0))
    )
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, config.vocabulary, jnp.int32)
    loss = models.loss_fn(config)(params, {"tokens": tokens, "targets": tokens})
    assert abs(float(loss) - math.log(config.vocabulary)) < 0.5
    out = models.logits(params, tokens, config)
    changed = models.logits(params, tokens.at[:, 9].add(1) % config.vocabulary, config)
    np.testing.assert_array_equal(out[:, :9], changed[:, :9])
    assert not np.array_equal(out[:, 9:], changed[:, 9:])


def test_the_papers_count_of_parameters():
    sizes = {}
    for name, config in models.CONFIGS.items():
        leaves = jax.tree.leaves(jax.eval_shape(lambda key, c=config: models.init(key, c), jax.random.key(0)))
        sizes[name] = sum(leaf.size for leaf in leaves)
    assert sizes == {"gpt3-175b": 174_604_259_328, "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496}


SMALL = "--tiny --topology cpu:8 --mesh fsdp=4,tensor=2 --batch 8 --length 16".split()


def test_the_command(capsys, tmp_path):
    assert run.main(["--preset", "gpt3-175b", *SMALL, "--json", "--out", str(tmp_path / "plan.json")]) == 0
    printed, progress = capsys.readouterr()
    found = json.loads(printed)
    assert found == json.loads((tmp_path / "plan.json").read_text())["plan"]
    assert found["trained"] == 3 * 2 * (32 * 4 + 4 * 32)
    assert "compiling gpt3-175b for cpu:8, fsdp=4,tensor=2: a step of 8 x 16 tokens; " in progress


@pytest.mark.parametrize(
    "wrong, message",
    {
        "--mesh fsdp=4": "--mesh fsdp=4 needs 4 devices, and cpu:8 has 8; .* --mesh fsdp=8",
        "--mesh fsdp:4": "--mesh is 'fsdp:4'; write fsdp=16,tensor=4",
        "--mesh fsdp=0": "--mesh is 'fsdp=0'; write",
        "--mesh fsdp=-1,tensor=-1": "--mesh is 'fsdp=-1,tensor=-1'; .*of which one may be -1",
        "--mesh fsdp=1,tensor=8": "tensor = 8, which does not divide 4 heads",
        "--length 17": "has 16 positions",
        "--length 0": "--length: '0' is no integer of 1 or more",
        "--rank 0": "--rank: '0' is no integer of 1 or more",
        "--batch 6": r"--batch 6 does not divide into 1 \(--accumulate\) parts over fsdp=4 .*multiple of 4",
        "--accumulate 3": r"--batch 8 does not divide into 3 \(--accumulate\) parts",
        "--targets nothing": "--targets 'nothing' matches no path",
        "--targets positions": "'positions' .* not known. Name linear layers .*such as --targets",
        "--topology gpu:8": "'gpu:8' is none that is served",
        "--topology cpu:0": "'cpu:0' has no devices; .*or leave it out",
        "--topology v5p-64": "'v5p-64'; write \"v5e:2x4\"",
        "--topology v5e:2x2x2": "'v5e:2x2x2' has 3 axes, and the network of v5e has 2; .*\"v5e:4x4\"",
        "--out /proc/x/y.json": "--out /proc/x/y.json cannot be written .*; write another path",
        "--out /": "--out / is a folder; write the name of a file",
    }.items(),
)
def test_the_command_speaks_of_its_flags(capsys, wrong, message):
    with pytest.raises(SystemExit) as stopped:
        run.main(["--preset", "gpt3-175b", *SMALL, *wrong.split()])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error) and not re.search(r"None|\w=[^-\w]|\w\(", error)


def test_the_command_looks_at_out_before_it_compiles(monkeypatch, tmp_path, capsys):
    def never(*_, **__):
        raise AssertionError("compiled")

    monkeypatch.setattr(run, "plan", never)
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path, tmp_path / "file" / "plan.json"):
        with pytest.raises(SystemExit) as stopped:
            run.main(["--preset", "gpt3-175b", *SMALL, "--out", str(out)])
        assert stopped.value.code == 2
    run.check_out(tmp_path / "file")
    run.check_out(tmp_path / "new" / "plan.json")
    assert (tmp_path / "file").read_text() == "kept" and not list((tmp_path / "new").iterdir())


def test_the_command_says_so_where_the_record_cannot_be_written_after_all(monkeypatch, capsys, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "save", full)
    with pytest.raises(SystemExit) as stopped:
        run.main(["--preset", "gpt3-175b", *SMALL, "--out", str(tmp_path / "plan.json")])
    assert stopped.value.code == 2
    printed, error = capsys.readouterr()
    assert printed and "plan.json cannot be written (No space left on device)" in error


def test_the_devices_of_a_slice():
    names = ("v5e:2x4", "v4:2x2x2", "v3:2x2", "v2:2x2", "tpu7x:2x2x1", "cpu:3", "v5p-64")
    assert [run.device_count(name) for name in names] == [8, 8, 8, 8, 8, 3, 0]


def test_the_command_says_what_does_not_fit(monkeypatch, capsys):
    monkeypatch.setattr(
        planning, "_compile", lambda *_: planning._Compiled(GIB, GIB // 2, refusal="too much")
    )
    assert run.main(["--preset", "llama3-8b", "--tiny", "--topology", "cpu:8", "--batch", "8"]) == 1
    assert capsys.readouterr().out.startswith("does not fit: 1.00 GiB of 512.00 MiB")
