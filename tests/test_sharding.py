"""Law 2 for shardings: on a mesh of eight devices the outputs are sharded as the bare function's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import weight
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax


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
        return jnp.sum(jnp.sin(lora_jax.lora(fn)(w.replace(a=ab[0], b=ab[1]), x)))

    gradients = jax.grad(loss)((w.a, w.b), w, x)
    with jax.set_mesh(mesh(kind)) as on:
        on = on if on is not None else jax.sharding.get_mesh()
        specs = derived(axes, w_spec) if factors == "as the base" else {k: P() for k in ("a", "b", "scale")}
        placed = w.replace(
            w=jax.device_put(w.w, NamedSharding(on, w_spec)),
            **{k: jax.device_put(getattr(w, k), NamedSharding(on, spec)) for k, spec in specs.items()},
        )
        x = jax.device_put(x, NamedSharding(on, x_spec))
        bare = jax.jit(fn)(placed.w, x)
        ours = jax.jit(lora_jax.lora(fn))(placed, x)
        assert ours.sharding.is_equivalent_to(bare.sharding, ours.ndim)
        assert jax.typeof(ours) == jax.typeof(bare)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12 * 100)
        for got, want in zip(
            jax.jit(jax.grad(loss))((placed.a, placed.b), placed, x), gradients, strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * (1 + np.abs(want).max()))
