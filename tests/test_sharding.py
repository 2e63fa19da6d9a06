"""Law 2 for shardings: on a mesh of eight devices the outputs are sharded as the bare function's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, weight
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax.weight import is_wrapped_leaf


def mesh(kind):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


def row_parallel(w, x):
    # Its contraction is over a sharded axis, so with explicit axes the model itself says how the result lies.
    explicit = AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types
    return jnp.einsum("bsi,io->bso", x, w, out_sharding=P("data") if explicit else None)


# name: (function, the weight's shape, axes and spec, the input's shape and spec)
ROWS = {
    "column parallel": (lambda w, x: x @ w, (8, 16), ("in", "out"), P(None, "model"), (4, 3, 8), P("data")),
    "row parallel": (
        row_parallel,
        (8, 16), ("in", "out"), P("model", None), (4, 3, 8), P("data", None, "model"),
    ),
    "fsdp": (lambda w, x: x @ w, (8, 16), ("in", "out"), P(), (4, 4, 8), P("data", "model")),
    "heads": (
        lambda w, x: jnp.einsum("bsd,dhk->bshk", x, w),
        (8, 4, 2), ("in", "out", "out"), P(None, "model"), (4, 3, 8), P("data"),
    ),
    "transposed": (lambda w, x: x @ w.T, (16, 8), ("in", "out"), P("model"), (4, 3, 8), P("data")),
    "experts": (
        lambda w, x: jnp.einsum("bei,eio->beo", x, w),
        (4, 8, 16), ("batch", "in", "out"), P("model"), (4, 4, 8), P("data", "model"),
    ),
    "scanned": (
        lambda w, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0],
        (3, 8, 8), ("batch", "in", "out"), P(), (4, 3, 8), P("data"),
    ),
}  # fmt: skip


def derived(axes, spec):
    """The specs of a and b when each axis is sharded as the base's."""
    parts = [*spec, *(None,) * (len(axes) - len(spec))]
    batch, inner, outer = ([p for p, k in zip(parts, axes, strict=True) if k == kind] for kind in KINDS)
    return {"a": P(*batch, *inner, None), "b": P(*batch, None, *outer), "scale": P(*batch)}


KINDS = ("batch", "in", "out")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("factors", ["replicated", "as the base"])
@pytest.mark.parametrize("row", ROWS)
def test_values_gradients_and_shardings(row, factors, kind):
    fn, shape, axes, w_spec, x_shape, x_spec = ROWS[row]
    w = weight("w", shape, axes, jnp.float64)
    x = jax.random.normal(jax.random.key(1), x_shape, jnp.float64)
    expected = fn(w.dense(), x)

    def loss(ab, w, x):
        out = lora_jax.lora(fn)(w.replace(a=ab[0], b=ab[1]), x)
        return jnp.sum(jnp.sin(out)), out

    both = jax.jit(jax.grad(loss, has_aux=True))
    gradients, _ = both((w.a, w.b), w, x)
    with jax.set_mesh(mesh(kind)) as on:
        on = on if on is not None else jax.sharding.get_mesh()
        specs = derived(axes, w_spec) if factors == "as the base" else {k: P() for k in ("a", "b", "scale")}
        placed = w.replace(
            w=jax.device_put(w.w, NamedSharding(on, w_spec)),
            **{k: jax.device_put(getattr(w, k), NamedSharding(on, spec)) for k, spec in specs.items()},
        )
        x = jax.device_put(x, NamedSharding(on, x_spec))
        bare = jax.jit(fn)(placed.w, x)
        found, ours = both((placed.a, placed.b), placed, x)
        assert ours.sharding.is_equivalent_to(bare.sharding, ours.ndim)
        assert jax.typeof(ours) == jax.typeof(bare)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12 * 100)
        for got, want in zip(found, gradients, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * (1 + np.abs(want).max()))


def placements():
    """Specs for a weight and for an input: column-parallel, row-parallel, data-parallel, replicated."""

    def first(x, name):
        return P(name) if x.ndim and x.shape[0] % 2 == 0 else P()

    def last(w):
        return P(*(None,) * (w.ndim - 1), "model") if w.shape[-1] % 2 == 0 else P()

    yield last, lambda x: first(x, "data")
    yield lambda w: first(w, "model"), lambda x: first(x, "data")
    yield lambda w: P(), lambda x: first(x, "data")
    yield lambda w: P(), lambda x: P()


def on_weights(fn, tree):
    return jax.tree.map(lambda n: fn(n) if is_wrapped_leaf(n) else n, tree, is_leaf=is_wrapped_leaf)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_row_keeps_the_shardings_that_are_part_of_types(case):
    """In the first placement in which the bare function itself can be typed; A and B are replicated."""
    explicit = jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4]
    )
    tree, inputs = case.wrapped(jnp.float32, False), case.inputs(jnp.float32)

    def types(fn, tree, inputs):
        return [(aval, aval.weak_type) for aval in jax.make_jaxpr(fn)(tree, *inputs).out_avals]

    def put(x, spec):
        return jax.device_put(x, NamedSharding(explicit, spec))

    with jax.set_mesh(explicit):
        replicated = jax.tree.map(lambda x: put(x, P()), tree)
        for of_weight, of_input in placements():
            placed = on_weights(lambda n, spec=of_weight: n.replace(w=put(n.w, spec(n.w))), replicated)
            xs = [put(x, of_input(x)) for x in inputs]
            try:
                expected = types(case.fn, on_weights(lambda n: n.w, placed), xs)
            except Exception:  # jax's own: this placement leaves a result's sharding open
                continue
            assert types(lora_jax.lora(case.fn), placed, xs) == expected
            return
    assert case.name.startswith("ragged_dot"), "only of ragged_dot jax itself has no such type"


def two_layers(up, down, gathered, x):
    """Column-parallel, row-parallel, and a weight that is gathered where it is used."""
    hidden = jnp.tanh(x @ up)
    return lax.psum(hidden @ down, "model") @ lax.all_gather(gathered, "data", axis=0, tiled=True)


SPECS = (P(None, "model"), P("model", None), P("data", None), P("data", None))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_gives_every_shard_its_part_of_the_factors(kind, check_vma):
    shapes = {"up": (8, 16), "down": (16, 8), "gathered": (8, 6)}
    ws = [weight(name, shape, ("in", "out"), jnp.float64) for name, shape in shapes.items()]
    x = jax.random.normal(jax.random.key(1), (4, 8), jnp.float64)
    point = [(w.a, w.b) for w in ws]

    def merged(point, ws, x):
        up, down, gathered = (w.replace(a=a, b=b).dense() for w, (a, b) in zip(ws, point, strict=True))
        return jnp.tanh(x @ up) @ down @ gathered

    def gradient(fn, ws, x):
        return jax.jit(jax.grad(lambda point: jnp.sum(jnp.sin(fn(point, ws, x)))))(point)

    expected, expected_gradient = merged(point, ws, x), gradient(merged, ws, x)
    with jax.set_mesh(mesh(kind)) as on:
        on = on if on is not None else jax.sharding.get_mesh()
        mapped = jax.shard_map(
            two_layers, mesh=on, in_specs=SPECS, out_specs=P("data", None), check_vma=check_vma
        )
        placed = [
            w.replace(w=jax.device_put(w.w, NamedSharding(on, s))) for w, s in zip(ws, SPECS, strict=False)
        ]
        x = jax.device_put(x, NamedSharding(on, SPECS[3]))

        def ours(point, ws, x):
            return lora_jax.lora(mapped)(
                *(w.replace(a=a, b=b) for w, (a, b) in zip(ws, point, strict=True)), x
            )

        out, bare = jax.jit(ours)(point, placed, x), jax.jit(mapped)(*(w.w for w in placed), x)
        assert jax.typeof(out) == jax.typeof(bare) and out.sharding == bare.sharding
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)
        for got, want in zip(
            jax.tree.leaves(gradient(ours, placed, x)), jax.tree.leaves(expected_gradient), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * (1 + np.abs(want).max()))


def test_shards_with_data_of_their_own_drop_other_entries():
    w = weight("w", (8, 8), ("in", "out"), jnp.float32).replace(dropout=0.5)
    w = w.replace(w=jnp.zeros_like(w.w))
    x = jnp.ones((4, 8), jnp.float32)
    with jax.set_mesh(mesh(AxisType.Auto)):
        for check_vma in (True, False):
            mapped = jax.shard_map(
                lambda w, x: x @ w, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=check_vma
            )
            out = jax.jit(lora_jax.lora(mapped, key=jax.random.key(0)))(w, x)
            assert not jnp.allclose(out[:2], out[2:])


def test_a_weight_that_leaves_a_shard_is_refused():
    w = weight("layer/kernel", (8, 8), ("in", "out"), jnp.float32)
    with jax.set_mesh(mesh(AxisType.Auto)):
        mapped = jax.shard_map(lambda w: w.T, in_specs=P("data"), out_specs=P(None, "data"))
        with pytest.raises(lora_jax.RefusedError, match=r"layer/kernel.*shard_map.*densify='layer/kernel'"):
            lora_jax.lora(lambda w, x: x @ mapped(w))(w, jnp.ones((2, 8), jnp.float32))
