"""A small decoder for any mesh of (data, fsdp, tensor), in Linen and in NNX, with Auto or Explicit axes.

With Explicit axes shardings are part of the types, so the model itself says where a weight is gathered
and how a product lies; with Auto axes the same lines leave both to the compiler.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import lora_jax

D, HEADS, WIDTH, LAYERS, VOCAB, BATCH, LENGTH = 16, 8, 32, 1, 32, 16, 8
STEPS = 20
AXES = ("data", "fsdp", "tensor")
SHAPES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(shape) == 8]
ROWS = P(("data", "fsdp"))

COLUMN, ROW = P("fsdp", "tensor"), P("tensor", "fsdp")
KERNELS = {"q": COLUMN, "k": COLUMN, "v": COLUMN, "o": ROW, "up": COLUMN, "down": ROW}
RULES = {
    r"(q|k|v|up)_\d/kernel": COLUMN,
    r"(o|down)_\d/kernel": ROW,
    "embed/kernel": P("tensor", "fsdp"),
    "head/kernel": COLUMN,
    "scale": P(),
}


def explicit() -> bool:
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def linear(x: jax.Array, kernel: jax.Array, spec: P) -> jax.Array:
    """x @ kernel, the kernel gathered over fsdp."""
    if not explicit():
        return jnp.einsum("bsi,io->bso", x, kernel)
    inner, outer = ("tensor" if part == "tensor" else None for part in spec)
    kernel = jax.sharding.reshard(kernel, P(inner, outer))
    return jnp.einsum("bsi,io->bso", x, kernel, out_sharding=P(*ROWS, None, outer))


def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
    if not explicit():
        return table[tokens]
    return jax.sharding.reshard(table, P()).at[tokens].get(out_sharding=P(*ROWS, None, None))


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    heads = (*q.shape[:2], HEADS, q.shape[2] // HEADS)
    q, k, v = (x.reshape(heads) for x in (q, k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * heads[-1] ** -0.5
    seen = np.tri(q.shape[1], dtype=bool)
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.full_like(scores, -1e30)))
    y = jnp.einsum("bhts,bshd->bthd", weights, v)
    return y.reshape(*y.shape[:2], -1)


def forward(kernel: Any, scale: Any, tokens: jax.Array) -> jax.Array:
    """Logits; `kernel(name)` and `scale(name)` give the parameters."""

    def dense(x: jax.Array, name: str, i: int) -> jax.Array:
        return linear(x, kernel(f"{name}_{i}"), KERNELS[name])

    x = look_up(kernel("embed"), tokens)
    for i in range(LAYERS):
        h = norm(x, scale(f"before_attention_{i}"))
        x = x + dense(attend(*(dense(h, name, i) for name in "qkv")), "o", i)
        h = norm(x, scale(f"before_mlp_{i}"))
        x = x + dense(jax.nn.gelu(dense(h, "up", i)), "down", i)
    return linear(norm(x, scale("last")), kernel("head"), COLUMN)


def shapes() -> dict[str, tuple[int, int]]:
    block = {"q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D), "up": (D, WIDTH), "down": (WIDTH, D)}
    layers = {f"{name}_{i}": shape for i in range(LAYERS) for name, shape in block.items()}
    return {"embed": (VOCAB, D), **layers, "head": (D, VOCAB)}


NORMS = [*(f"{name}_{i}" for i in range(LAYERS) for name in ("before_attention", "before_mlp")), "last"]


class Kernel(nn.Module):
    shape: tuple[int, int]
    dtype: Any

    @nn.compact
    def __call__(self):
        return self.param("kernel", nn.initializers.lecun_normal(), self.shape, self.dtype)


class Scale(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self):
        return self.param("scale", nn.initializers.ones, (D,), self.dtype)


class Linen(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, tokens):
        kernels = {name: Kernel(shape, self.dtype, name=name) for name, shape in shapes().items()}
        scales = {name: Scale(self.dtype, name=name) for name in NORMS}
        return forward(lambda name: kernels[name](), lambda name: scales[name](), tokens)


class Holder(nnx.Module):
    def __init__(self, **params: jax.Array):
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))


class NNX(nnx.Module):
    def __init__(self, params: Any):
        for name, leaves in params.items():
            setattr(self, name, Holder(**leaves))

    def __call__(self, tokens):
        return forward(
            lambda name: getattr(self, name).kernel[...],
            lambda name: getattr(self, name).scale[...],
            tokens,
        )


def mean_loss(logits: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean over the tokens that count, and their number."""
    wanted = jax.nn.one_hot(batch["tokens"][:, 1:], VOCAB, dtype=logits.dtype)
    if explicit():
        wanted = jax.sharding.reshard(wanted, jax.typeof(logits).sharding)
    losses = -jnp.sum(wanted * jax.nn.log_softmax(logits), axis=-1)
    counts = batch["counts"][:, 1:].astype(logits.dtype)
    return jnp.sum(losses * counts) / jnp.sum(counts), {"tokens": jnp.sum(counts)}


def batches(steps: int) -> list[dict[str, np.ndarray]]:
    """Two batches by turns: random tokens, of which few count in the first row and all in the last."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(2, LENGTH, BATCH).astype(int)
    counts = np.arange(LENGTH) < lengths[:, None]
    two = [
        {"tokens": rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32), "counts": counts}
        for _ in range(2)
    ]
    return [two[i % 2] for i in range(steps)]


def make_mesh(shape: tuple[int, int, int], kind: AxisType) -> Mesh:
    return jax.make_mesh(shape, AXES, axis_types=(kind,) * 3, devices=jax.devices()[: int(np.prod(shape))])


def curve(kind: str, dtype: Any, mesh: Mesh | None, steps: int = STEPS, accumulate: int = 1) -> np.ndarray:
    """The losses of a run: `kind` is "linen" or "nnx"; without a mesh it is on one device."""
    linen = Linen(dtype)
    tokens = jnp.zeros((1, LENGTH - 1), jnp.int32)
    params = linen.init(jax.random.key(0), tokens)["params"]

    def linen_loss(params: Any, batch: Any, key: Any) -> Any:
        return mean_loss(linen.apply({"params": params}, batch["tokens"][:, :-1]), batch)

    def nnx_loss(model: Any, batch: Any, key: Any) -> Any:
        return mean_loss(model(batch["tokens"][:, :-1]), batch)

    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-2))
    wrapped = lora_jax.wrap(
        params if kind == "linen" else NNX(params),
        rank=4,
        alpha=8,
        targets=r"(q|k|v|o|up|down)_\d",
        train="head",
        axes={"kernel": ("in", "out")},
        dtype=dtype,
    )
    state = lora_jax.TrainState.create(wrapped, tx, jax.random.key(1))
    on_mesh = {} if mesh is None else {"mesh": mesh, "rules": RULES}
    loss_fn = linen_loss if kind == "linen" else nnx_loss
    step = lora_jax.make_train_step(loss_fn, tx, accumulate=accumulate, weight="tokens", **on_mesh)
    losses = []
    for batch in batches(steps):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    return np.asarray(jax.device_get(losses), np.float64)


KINDS = ("linen", "nnx")
TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
BOUNDS = {"float32": 1e-5, "float64": 1e-10}


@functools.cache
def single_device(kind: str, dtype: str, accumulate: int = 1) -> np.ndarray:
    return curve(kind, jnp.dtype(dtype), None, accumulate=accumulate)


def deviation(shape: tuple[int, int, int], kind: str, types: str, dtype: str, accumulate: int = 1) -> float:
    """The largest relative difference of a curve on a mesh from the one on a single device."""
    found = curve(kind, jnp.dtype(dtype), make_mesh(shape, TYPES[types]), accumulate=accumulate)
    expected = single_device(kind, dtype)
    return float(np.max(np.abs(found - expected) / np.abs(expected)))
