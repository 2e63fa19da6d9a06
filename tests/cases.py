"""The law's table: every way a model uses a weight, as a function of a tree and some inputs.

A case is a row; the files that test a property cross all rows with it. To cover something new, add
a row here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lora_jax
from lora_jax.weight import AxisKind, LoraWeight, is_wrapped_leaf, sizes


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    fn: Callable[..., Any]
    wrapped: Callable[[Any, bool], Any]  # dtype, whether b is zero
    inputs: Callable[[Any], tuple[Any, ...]]

    def __repr__(self) -> str:
        return self.name


def add(name: str, fn: Callable[..., Any], wrapped: Callable[..., Any], inputs: Callable[..., Any]) -> None:
    # Every property asks for the same trees, and an nnx or Linen model takes a second to make.
    CASES.append(Case(name, fn, functools.cache(wrapped), functools.cache(inputs)))


def numbers(name: str, shape: tuple[int, ...]) -> Any:
    # By numpy and device_put, which have nothing to compile for every shape.
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)


def normal(name: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.device_put(numbers(name, shape).astype(dtype))


def array(name: str, x: Any, dtype: Any) -> jax.Array:
    """Numbers of a shape, or the integers that are given."""
    return normal(name, x, dtype) if isinstance(x, tuple) else jax.device_put(np.asarray(x, np.int32))


def weight(
    name: str,
    shape: tuple[int, ...],
    axes: tuple[AxisKind, ...],
    dtype: Any,
    zero: bool = False,
    rank: int = 3,
) -> LoraWeight:
    batch, inner, outer = sizes(shape, axes)
    factor = jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32
    b = numbers(name + "b", (*batch, rank, *outer))
    return LoraWeight(
        normal(name + "w", shape, dtype),
        normal(name + "a", (*batch, *inner, rank), factor),
        jax.device_put((np.zeros_like(b) if zero else b).astype(factor)),
        1.0 + jnp.arange(sum(batch) or 1, dtype=jnp.float32)[: batch[0]] if len(batch) == 1 else 0.5,
        axes,
        name,
    )


CASES: list[Case] = []


def case(
    weights: dict[str, tuple[tuple[int, ...], tuple[AxisKind, ...]]], *inputs: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A case on a dict of weights by name; an input is the shape of a float array, or an int array."""

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        name = fn.__name__.strip("_")

        def wrapped(dtype: Any, zero: bool) -> Any:
            return {k: weight(k, shape, axes, dtype, zero) for k, (shape, axes) in weights.items()}

        def make(dtype: Any) -> tuple[Any, ...]:
            return tuple(
                normal(f"{name}{i}", x, dtype)
                if isinstance(x, tuple)
                else jax.device_put(np.asarray(x, np.int32))
                for i, x in enumerate(inputs)
            )

        add(name, fn, wrapped, make)
        return fn

    return decorate


def randomised(tree: Any, dtype: Any, zero: bool) -> Any:
    """A wrapped tree in a dtype, with a and b drawn at random, or b zero."""

    def leaf(node: Any) -> Any:
        if not isinstance(node, LoraWeight):
            return node.astype(dtype) if jnp.issubdtype(node.dtype, jnp.floating) else node
        factor = jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32
        # Of the size of trained factors: with larger ones the models' norms lose digits to cancellation.
        fan_in = math.prod(sizes(node.w.shape, node.axes)[1])
        a = numbers(node.path + "a", node.a.shape) / np.sqrt(fan_in)
        b = numbers(node.path + "b", node.b.shape) * (0 if zero else 0.3)
        a, b = (jax.device_put(x.astype(factor)) for x in (a, b))
        return node.replace(w=node.w.astype(dtype), a=a, b=b)

    return jax.tree.map(leaf, tree, is_leaf=is_wrapped_leaf)


def linen(name: str, model: nn.Module, *inputs: Any, **options: Any) -> None:
    """A case on a Linen model, wrapped as a user would, with the options of wrap."""

    def make(dtype: Any) -> tuple[Any, ...]:
        return tuple(
            normal(f"{name}{i}", x, dtype)
            if isinstance(x, tuple)
            else jax.device_put(np.asarray(x, np.int32))
            for i, x in enumerate(inputs)
        )

    def wrapped(dtype: Any, zero: bool) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            params = jax.jit(model.init)(jax.random.key(0), *make(jnp.float32))["params"]
        return randomised(lora_jax.wrap(params, rank=3, alpha=6.0, **options), dtype, zero)

    def fn(params: Any, *xs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # flax's own layers mix dtypes
            return model.apply({"params": params}, *xs)

    add(name, fn, wrapped, make)


def nnx_case(name: str, make_model: Callable[[nnx.Rngs], Any], *inputs: Any, **options: Any) -> None:
    """A case on an NNX model, as a function of its state."""

    def make(dtype: Any) -> tuple[Any, ...]:
        return tuple(
            normal(f"{name}{i}", x, dtype)
            if isinstance(x, tuple)
            else jax.device_put(np.asarray(x, np.int32))
            for i, x in enumerate(inputs)
        )

    graphdef, _ = nnx.split(make_model(nnx.Rngs(0)))

    def wrapped(dtype: Any, zero: bool) -> Any:
        state = nnx.state(make_model(nnx.Rngs(0)))
        return randomised(lora_jax.wrap(state, rank=3, alpha=6.0, **options), dtype, zero)

    def fn(state: Any, *xs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return nnx.merge(graphdef, state)(*xs)

    add(name, fn, wrapped, make)


MATRIX: tuple[tuple[int, ...], tuple[AxisKind, ...]] = ((4, 6), ("in", "out"))
SQUARE: tuple[tuple[int, ...], tuple[AxisKind, ...]] = ((4, 4), ("in", "out"))
STACK: tuple[tuple[int, ...], tuple[AxisKind, ...]] = ((3, 4, 4), ("batch", "in", "out"))
# For rules that stack ranks: a rank of 9 is to be small beside the axes, as it is in models.
WIDE: tuple[tuple[int, ...], tuple[AxisKind, ...]] = ((32, 20), ("in", "out"))
BROAD: tuple[tuple[int, ...], tuple[AxisKind, ...]] = ((32, 32), ("in", "out"))
BROADS: tuple[tuple[int, ...], tuple[AxisKind, ...]] = ((3, 32, 32), ("batch", "in", "out"))
TABLE: tuple[tuple[int, ...], tuple[AxisKind, ...]] = ((11, 4), ("in", "out"))
KERNEL: tuple[tuple[int, ...], tuple[AxisKind, ...]] = ((3, 3, 4, 6), ("in", "in", "in", "out"))
IDS = [[1, 2, 10], [3, 0, 3]]

# dot_general


@case({"w": MATRIX}, (2, 5, 4))
def dense(p, x):
    return x @ p["w"]


@case({"w": MATRIX}, (4,))
def vector(p, x):
    return x @ p["w"]


@case({"w": MATRIX}, (2, 5, 4))
def weight_on_the_left(p, x):
    return jnp.einsum("io,bsi->obs", p["w"], x)


@case({"w": MATRIX}, (2, 5, 6))
def transposed(p, x):
    return x @ p["w"].T


@case({"w": ((4, 3, 2), ("in", "out", "out"))}, (2, 5, 4))
def heads_out(p, x):
    return jnp.einsum("ihd,bsi->bshd", p["w"], x)


@case({"w": ((3, 2, 7), ("in", "in", "out"))}, (2, 5, 3, 2))
def heads_in(p, x):
    return jnp.einsum("hdo,bshd->bso", p["w"], x)


@case({"w": ((3, 2, 7), ("in", "in", "out"))}, (2, 3, 5, 2))
def heads_in_mixed_order(p, x):
    return jnp.einsum("hdo,bhsd->bso", p["w"], x)


@case({"w": ((3, 2, 7), ("in", "in", "out"))}, (5, 3, 2))
def partial_contraction(p, x):
    return jnp.einsum("hdo,shd->hso", p["w"], x)


@case({"w": ((3, 4, 6), ("batch", "in", "out"))}, (2, 3, 4))
def experts(p, x):
    return jnp.einsum("eio,bei->beo", p["w"], x)


@case({"w": ((3, 4, 6), ("batch", "in", "out"))}, (2, 4))
def every_expert(p, x):
    return jnp.einsum("eio,bi->beo", p["w"], x)


@case({"w": ((4, 3, 6), ("in", "batch", "out"))}, (2, 4), (2, 3))
def mixture(p, x, gate):
    return jnp.einsum("ieo,bi,be->bo", p["w"], x, gate)


@case({"w": ((4, 2, 6), ("in", "batch", "out"))}, (2, 3, 4))
def batch_axis_in_the_middle(p, x):
    return jnp.einsum("ibo,bsi->bso", p["w"], x)


@case({"w": MATRIX}, (5, 6, 4))
def both_axes_contracted(p, x):
    return jnp.einsum("io,soi->s", p["w"], x)


@case({"w": MATRIX}, (6, 4, 3))
def out_axis_as_batch(p, x):
    return jnp.einsum("io,oim->om", p["w"], x)


@case({"w": MATRIX}, (6, 4, 3))
def in_axis_as_batch(p, x):
    return jnp.einsum("io,oim->im", p["w"], x)


@case({"w": ((1, 4, 6), ("unit", "in", "out"))}, (2, 5, 4))
def unit_axis(p, x):
    return jnp.einsum("uio,bsi->bsuo", p["w"], x)


@case({"w": ((1, 4, 6), ("unit", "in", "out"))}, (1, 5, 4))
def unit_axis_as_batch(p, x):
    return lax.dot_general(x, p["w"], (((2,), (1,)), ((0,), (0,))))


@case({"w": ((4, 1, 6), ("in", "unit", "out"))}, (5, 4, 1))
def unit_axis_contracted(p, x):
    return jnp.einsum("iuo,siu->so", p["w"], x)


@case({"w": MATRIX}, (2, 5, 4))
def precision_highest(p, x):
    return jnp.matmul(x, p["w"], precision="highest")


@case({"w": BROADS}, (2, 32), (3,))
def experts_mixed(p, x, gate):
    return x @ jnp.einsum("e,eio->io", gate, p["w"])


@case({"w": BROADS}, (2, 5, 32), (2, 3))
def experts_mixed_for_each_input(p, x, gate):
    return jnp.einsum("bsi,bio->bso", x, jnp.einsum("eio,be->bio", p["w"], gate))


@case({"w": ((32, 3, 2, 32), ("out", "batch", "batch", "in"))}, (2, 32), (3, 4, 2))
def experts_mixed_in_groups(p, x, gate):
    return jnp.einsum("egoik,bi->egkbo", lax.dot_general(p["w"], gate, (((), ()), ((1, 2), (0, 2)))), x)


@case({"w": BROAD}, (5, 32), (5,))
def outer_product(p, x, s):
    return jnp.einsum("sio,si->so", jnp.einsum("io,s->sio", p["w"], s), x)


@case({"w": BROAD}, (5, 32), (5, 32))
def product_along_in(p, x, s):
    return jnp.einsum("sio,si->so", jnp.einsum("io,si->sio", p["w"], s), x)


@case({"w": BROAD}, (5, 32), (5, 32))
def product_along_out(p, x, s):
    return jnp.einsum("soi,si->so", jnp.einsum("io,so->soi", p["w"], s), x)


@case({"w": ((2, 32, 20), ("batch", "in", "out"))}, (3, 64))
def layers_joined_along_in(p, x):
    return x @ p["w"].reshape(64, 20)


@case({"w": ((32, 3, 20), ("in", "batch", "out"))}, (3, 32))
def layers_joined_along_out(p, x):
    return x @ p["w"].reshape(32, 60)


@case({"w": ((2, 3, 32, 20), ("batch", "batch", "in", "out"))}, (3, 2, 96))
def layers_joined_in_groups(p, x):
    return jnp.einsum("bgi,gio->bgo", x, p["w"].reshape(2, 96, 20))


@case({"w": ((32, 4, 8), ("in", "out", "out"))}, (3, 32))
def heads_repeated(p, x):
    return jnp.einsum("bi,ihd->bhd", x, jnp.repeat(p["w"], 2, axis=1))


@case({"w": BROAD}, (3, 64))
def rows_repeated(p, x):
    return x @ jnp.repeat(p["w"], 2, axis=0)


@case({"w": ((1, 32, 20), ("unit", "in", "out"))}, (2, 32), (3, 1))
def unit_axis_mixed(p, x, gate):
    return jnp.einsum("bi,kio->kbo", x, jnp.einsum("eio,ke->kio", p["w"], gate))


# Look-ups


@case({"w": ((32, 1, 20), ("in", "unit", "out"))}, (2, 32), [0, 3])
def unit_axis_looked_up(p, x, ids):
    return jnp.einsum("bi,iho->bho", x, jnp.take(p["w"], ids, axis=1, mode="fill", fill_value=2))


@case({"w": TABLE}, IDS)
def embedding(p, ids):
    return p["w"][ids]


@case({"w": TABLE}, IDS)
def embedding_take(p, ids):
    return jnp.take(p["w"], ids, axis=0)


@case({"w": TABLE}, [[1, 99, 3]])
def embedding_out_of_bounds_filled(p, ids):
    return jnp.take(p["w"], ids, axis=0, mode="fill", fill_value=2)


@case({"w": TABLE}, [[1, 99, -3]])
def embedding_out_of_bounds_clipped(p, ids):
    return jnp.take(p["w"], ids, axis=0, mode="clip")


@case({"w": TABLE}, IDS)
def embedding_one_hot(p, ids):
    return jax.nn.one_hot(ids, 11, dtype=p["w"].dtype) @ p["w"]


@case({"w": TABLE}, IDS)
def tied(p, ids):
    return jnp.tanh(p["w"][ids]) @ p["w"].T


@case({"w": ((4, 11), ("in", "out"))}, IDS)
def embedding_by_column(p, ids):
    return p["w"][:, ids]


@case({"w": ((11, 2, 4), ("in", "out", "out"))}, IDS)
def embedding_two_axes(p, ids):
    return p["w"][ids]


@case({"w": ((3, 11, 4), ("batch", "in", "out"))}, IDS)
def embedding_of_every_layer(p, ids):
    return p["w"][:, ids]


@case({"w": TABLE}, 3)
def one_row(p, i):
    return p["w"][i]


@case({"w": STACK}, (2, 4))
def layers_by_index(p, x):
    for i in range(3):
        x = jnp.tanh(x @ p["w"][i])
    return x


@case({"w": STACK}, (2, 4), 2)
def layer_by_traced_index(p, x, i):
    return x @ p["w"][i]


@case({"w": ((3, 4, 5), ("batch", "in", "out"))}, (6, 4), [0, 1, 2, 2, 1, 0])
def expert_per_token(p, x, ids):
    return jnp.einsum("ti,tio->to", x, p["w"][ids])


@case({"w": ((8, 2, 3), ("in", "batch", "out"))}, (5, 8), [1, 0, 1])
def layers_by_index_in_the_middle(p, x, ids):
    return jnp.einsum("bi,iho->bho", x, p["w"][:, ids])


@case({"w": ((3, 11, 4), ("batch", "in", "out"))}, [[1, 2], [3, 0], [10, 3]])
def embedding_under_vmap(p, ids):
    return jax.vmap(lambda w, i: w[i])(p["w"], ids)


@case({"w": ((8, 2, 2), ("in", "out", "out"))}, (3, 8), [7, 6, 5, 4, 3, 2, 1, 0])
def heads_by_index(p, x, ids):
    return jnp.einsum("bi,iho->bho", x, p["w"][:, ids[:2] - 6])


# Convolution


def _conv(x, w, strides=(1, 1), padding: Any = "SAME", spec=("NHWC", "HWIO", "NHWC"), **kwargs):
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=spec, **kwargs)


@case({"w": KERNEL}, (2, 7, 8, 4))
def conv(p, x):
    return _conv(x, p["w"])


@case({"w": KERNEL}, (2, 7, 8, 4))
def conv_strides_and_dilations(p, x):
    return _conv(x, p["w"], (1, 1), [(1, 2), (0, 1)], rhs_dilation=(1, 2), lhs_dilation=(2, 1))


@case({"w": KERNEL}, (2, 7, 8, 4))
def conv_explicit_padding(p, x):
    return _conv(x, p["w"], (1, 2), [(0, 2), (3, 1)])


@case({"w": ((3, 3, 2, 12), ("in", "in", "in", "out"))}, (2, 7, 8, 4))
def conv_groups(p, x):
    return _conv(x, p["w"], (2, 1), feature_group_count=2)


@case({"w": ((3, 3, 1, 16), ("in", "in", "in", "out"))}, (2, 7, 8, 4))
def conv_depthwise(p, x):
    return _conv(x, p["w"], feature_group_count=4)


@case({"w": ((6, 4, 3, 3), ("out", "in", "in", "in"))}, (2, 4, 7, 8))
def conv_channels_first(p, x):
    return _conv(x, p["w"], (2, 2), spec=("NCHW", "OIHW", "NCHW"))


@case({"w": ((3, 3, 4, 6), ("in", "out", "in", "out"))}, (2, 7, 8, 4))
def conv_separable(p, x):
    return _conv(x, p["w"], (2, 1), rhs_dilation=(1, 2))


@case({"w": ((3, 4, 6), ("in", "in", "out"))}, (2, 7, 4))
def conv_one_axis(p, x):
    return _conv(x, p["w"], (2,), spec=("NHC", "HIO", "NHC"))


@case({"w": KERNEL}, (2, 4, 4, 4))
def conv_transposed(p, x):
    return lax.conv_transpose(x, p["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@case({"w": ((3, 3, 6, 4), ("in", "in", "in", "out"))}, (2, 4, 4, 4))
def conv_transposed_kernel(p, x):
    spec = ("NHWC", "HWIO", "NHWC")
    return lax.conv_transpose(x, p["w"], (2, 2), "SAME", dimension_numbers=spec, transpose_kernel=True)


# Shapes


@case({"w": ((4, 3, 2), ("in", "out", "out"))}, (2, 5, 4))
def reshape_merges(p, x):
    return x @ p["w"].reshape(4, 6)


@case({"w": MATRIX}, (2, 2, 2))
def reshape_splits(p, x):
    return jnp.einsum("bij,ijo->bo", x, p["w"].reshape(2, 2, 6))


@case({"w": ((3, 4, 2, 2), ("batch", "in", "out", "out"))}, (2, 4))
def reshape_stacked(p, x):
    return jnp.einsum("bi,eio->beo", x, p["w"].reshape(3, 4, 4))


@case({"w": ((4, 9), ("in", "out"))}, (2, 4))
def fused_sliced_before(p, x):
    w = p["w"]
    return jnp.tanh(x @ w[:, :3]) * (x @ w[:, 3:6]) + x @ w[:, 6:]


@case({"w": ((4, 9), ("in", "out"))}, (2, 4))
def fused_split_before(p, x):
    q, k, v = jnp.split(p["w"], 3, axis=1)
    return jnp.tanh(x @ q) * (x @ k) + x @ v


@case({"v": MATRIX, "w": MATRIX}, (2, 4))
def barrier(p, x):
    v, w, x = lax.optimization_barrier((p["v"], p["w"], x))
    return x @ v + x @ w


@case({"w": ((4, 9), ("in", "out"))}, (2, 4))
def fused_split_after(p, x):
    q, k, v = jnp.split(x @ p["w"], 3, axis=-1)
    return jnp.tanh(q) * k + v


@case({"w": ((4, 9), ("in", "out"))}, (2, 4), 2)
def dynamic_slice(p, x, i):
    return x @ lax.dynamic_slice_in_dim(p["w"], i, 3, axis=1)


@case({"w": MATRIX}, (2, 3))
def strided_slice(p, x):
    return x[:, :2] @ p["w"][::2, 1:5:2]


@case({"w": MATRIX}, (2, 4))
def reversed_axes(p, x):
    return x @ p["w"][::-1, ::-1]


@case({"w": STACK}, (2, 4))
def iterated(p, x):
    for w in p["w"]:
        x = jnp.tanh(x @ w)
    return x


@case({"w": ((2, 32, 32), ("batch", "in", "out"))}, (2, 64))
def tiled(p, x):
    return jnp.einsum("bi,eio->beo", x, jnp.tile(p["w"], (2, 2, 3)))


@case({"w": ((64, 64), ("in", "out"))}, (2, 64))
def rolled(p, x):
    return x @ jnp.roll(p["w"], (1, 2), axis=(0, 1))


@case({"w": MATRIX}, (2, 4))
def moved(p, x):
    return x @ jax.device_put(p["w"], jax.devices()[0])


@case({"w": MATRIX}, (2, 5, 4))
def expand_and_squeeze(p, x):
    return (x[:, :, None, :] @ p["w"][None])[:, :, 0] + x @ jnp.squeeze(p["w"][:, None, :], 1)


@case({"w": ((16, 16), ("in", "out"))}, (3, 5, 16))
def broadcast(p, x):
    return jnp.einsum("bsi,bio->bso", x, jnp.broadcast_to(p["w"], (3, 16, 16)))


@case({"w": MATRIX}, (2, 4))
def cast(p, x):
    return x.astype(jnp.float64) @ p["w"].astype(jnp.float64)


@case({"w": MATRIX}, (2, 4))
def scaled(p, x):
    two = jnp.asarray(2, x.dtype)
    return x @ (p["w"] * two / (two + two)) + x @ -p["w"]


@case({"w": MATRIX}, (2, 4))
def stopped_gradient(p, x):
    return x @ lax.stop_gradient(p["w"])


@case({"w": MATRIX}, (2, 4))
def named(p, x):
    return x @ checkpoint_name(p["w"], "kernel")


# Algebra on weights


@case({"v": WIDE, "w": WIDE}, (2, 32))
def sum_of_weights(p, x):
    return x @ (p["v"] + p["w"]) + x @ (p["v"] - p["w"] - p["w"])


@case({"v": BROAD, "w": BROAD}, (2, 32))
def sum_with_a_transpose(p, x):
    return x @ (p["v"] + p["w"].T)


@case({"v": BROADS, "w": BROADS}, (2, 32))
def sum_of_stacks(p, x):
    return jnp.einsum("bi,eio->beo", x, p["v"] + p["w"])


@case({"v": ((1, 32, 20), ("unit", "in", "out")), "w": ((1, 32, 20), ("batch", "in", "out"))}, (2, 32))
def sum_of_a_unit_and_a_batch_axis(p, x):
    return jnp.einsum("bi,eio->beo", x, p["v"] + p["w"])


@case({"w": MATRIX}, (2, 4), (4, 6))
def weight_plus_an_array(p, x, noise):
    return x @ (p["w"] + noise) + x @ (noise - p["w"])


@case({"v": ((64, 20), ("in", "out")), "w": ((64, 10), ("in", "out"))}, (2, 64))
def concatenated_along_out(p, x):
    return x @ jnp.concatenate([p["v"], p["w"], -p["v"]], axis=1)


@case({"v": ((20, 32), ("in", "out")), "w": ((18, 32), ("in", "out"))}, (2, 38), (2, 40))
def concatenated_along_in(p, x, y):
    constant = jnp.ones((2, 32), p["v"].dtype)
    return x @ jnp.concatenate([p["v"], p["w"]], axis=0) + y @ jnp.concatenate([p["w"], constant, p["v"]])


@case({"v": BROADS, "w": ((2, 32, 32), ("batch", "in", "out"))}, (2, 32))
def concatenated_layers(p, x):
    constant = jnp.ones((1, 32, 32), p["v"].dtype)
    ws = jnp.concatenate([p["v"], constant, p["w"]])
    # A sixteenth of the input, or six layers of such weights would multiply rounding by thousands.
    return lax.scan(lambda c, w: (_block(w, c / 16), None), x, ws)[0]


@case({"v": BROAD, "w": BROAD}, (2, 32))
def layers_stacked_by_the_model(p, x):
    ws = jnp.stack([p["v"], p["w"], p["v"].T])
    return lax.scan(lambda c, w: (_block(w, c), None), x, ws)[0]


@case({"v": BROAD, "w": BROAD}, (2, 32))
def layers_stacked_last(p, x):
    ws = jnp.stack([p["v"], p["w"]], axis=-1)
    return jnp.einsum("bi,ioe->beo", x, ws)


@case({"w": MATRIX}, (2, 4), (6,))
def scaled_by_a_broadcast(p, x, columns):
    return x @ (p["w"] * lax.broadcast_in_dim(columns, (4, 6), (1,)))


@case({"w": MATRIX}, (2, 4), (4,), (6,))
def scaled_by_vectors(p, x, rows, columns):
    return x @ (p["w"] * rows[:, None] / (2 + columns**2))


@case({"w": ((4, 3, 2), ("in", "out", "out"))}, (2, 4), (3,), (3, 2))
def scaled_by_heads(p, x, heads, both):
    return jnp.einsum("bi,ihd->bhd", x, heads[:, None] * p["w"] * both)


@case({"w": STACK}, (2, 4), (3,), (3, 4))
def scaled_by_layer(p, x, layers, rows):
    return jnp.einsum("bi,eio->beo", x, p["w"] * layers[:, None, None] * rows[:, :, None])


@case({"w": WIDE}, (2, 32), (2, 32))
def scaled_under_vmap(p, x, rows):
    return jax.vmap(lambda x, row: x @ (p["w"] * row[:, None]))(x, rows)


@case({"v": BROAD, "w": WIDE}, (2, 32))
def product_of_weights(p, x):
    return x @ (p["v"] @ p["w"]) + x @ (p["v"].T @ p["w"])


@case({"v": ((32, 4, 5), ("in", "out", "out")), "w": ((4, 5, 32), ("in", "in", "out"))}, (2, 32))
def product_over_two_axes(p, x):
    return x @ jnp.einsum("ihd,hdo->io", p["v"], p["w"])


@case({"v": BROADS, "w": BROADS}, (2, 32))
def product_of_stacks(p, x):
    return jnp.einsum("bi,eio->beo", x, p["v"] @ p["w"])


@case({"w": WIDE}, (2, 32))
def product_with_its_own_transpose(p, x):
    return x @ (p["w"] @ p["w"].T)


@case({"w": ((3, 2, 4, 5), ("batch", "in", "in", "out"))}, (2, 4), (2, 2, 4), (2, 3, 2))
def reduced(p, x, y, z):
    w = p["w"]
    of_layers = jnp.einsum("bhi,hio->bo", y, w.sum(0))
    return x @ w.sum((0, 1)) + of_layers + jnp.einsum("beh,eho->bo", z, w.mean(2))


@case({"w": MATRIX}, (2, 4))
def reduced_to_rows(p, x):
    return x @ p["w"] - jnp.sum(x, -1, keepdims=True) * p["w"].mean(0) + p["w"].sum()


@case({"w": MATRIX}, (2, 7))
def padded(p, x):
    return x @ jnp.pad(p["w"], ((1, 2), (0, 1)), constant_values=2.0)


@case({"w": MATRIX}, (2, 4))
def precision_reduced(p, x):
    return x @ lax.reduce_precision(p["w"], 11, 52)


@case({"w": ((2, 3, 3, 8, 16), ("batch", "in", "in", "in", "out"))}, (2, 1, 5, 5, 8))
def conv_vmapped(p, x):
    return jax.vmap(_conv2d)(x, p["w"])


@case({"w": ((3, 3, 8, 2, 16), ("in", "in", "in", "batch", "out"))}, (1, 5, 5, 8))
def conv_vmapped_over_the_kernels(p, x):
    return jax.vmap(_conv2d, in_axes=(None, 3))(x, p["w"])


def _conv2d(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


# Products in groups


@case({"w": ((3, 4, 5), ("batch", "in", "out"))}, (6, 4), [1, 2, 3])
def ragged_dot(p, x, groups):
    return lax.ragged_dot(x, p["w"], groups)


@case({"w": ((1, 4, 5), ("unit", "in", "out"))}, (6, 4), [4])
def ragged_dot_of_one_expert(p, x, groups):
    return lax.ragged_dot(x, p["w"], groups)


@case({"w": ((3, 4, 5), ("in", "in", "out"))}, (6, 4), [1, 2, 3])
def ragged_dot_with_one_b(p, x, groups):
    return lax.ragged_dot(x, p["w"], groups)


@case({"w": ((3, 4, 5), ("out", "in", "out"))}, (6, 4), [4, 0, 1])
def ragged_dot_with_one_a(p, x, groups):
    return lax.ragged_dot(x, p["w"], groups)


@case({"w": ((3, 4, 5), ("batch", "in", "out"))}, (6, 5), [1, 2, 3])
def ragged_dot_transposed(p, x, groups):
    return lax.ragged_dot(x, p["w"].mT, groups)


@case({"w": ((3, 4, 5), ("in", "in", "out"))}, (2, 4))
def experts_with_one_b(p, x):
    return jnp.einsum("eio,bi->beo", p["w"], x)


@case({"w": ((3, 4, 5), ("out", "in", "out"))}, (2, 3, 4))
def experts_with_one_a(p, x):
    return jnp.einsum("eio,bei->beo", p["w"], x)


# Control


def _block(w, x):
    return jnp.tanh(x @ w)


@case({"w": SQUARE}, (2, 4))
def jitted(p, x):
    block = jax.jit(_block)
    return block(p["w"], block(p["w"], x))


@case({"w": SQUARE}, (2, 4))
def jit_returns_a_weight(p, x):
    return x @ jax.jit(lambda w: w.T[::-1])(p["w"])


@case({"w": SQUARE}, (2, 4))
def remat(p, x):
    return jax.checkpoint(_block)(p["w"], x)


@case({"w": SQUARE}, (2, 4))
def remat_dots_saveable(p, x):
    return jax.checkpoint(_block, policy=jax.checkpoint_policies.dots_saveable)(p["w"], x)


@case({"w": STACK}, (2, 4))
def scanned(p, x):
    return lax.scan(lambda c, w: (_block(w, c), jnp.sum(c)), x, p["w"])


@case({"w": STACK}, (2, 4))
def scanned_reverse_unrolled(p, x):
    return lax.scan(lambda c, w: (_block(w, c), None), x, p["w"], reverse=True, unroll=2)[0]


@case({"w": STACK}, (2, 4))
def layers_moved_behind(p, x):
    return jnp.einsum("bi,ioe->beo", x, jnp.moveaxis(p["w"], 0, 2)) + jnp.einsum(
        "bi,ieo->beo", x, jnp.moveaxis(p["w"], 0, 1)
    )


@case({"w": ((4, 3, 4), ("in", "batch", "out"))}, (2, 4))
def scanned_along_axis_1(p, x):
    return lax.scan(lambda c, w: (_block(w, c), None), x, jnp.moveaxis(p["w"], 1, 0))[0]


@case({"w": SQUARE}, (2, 4))
def scan_constant(p, x):
    return lax.scan(lambda c, _: (_block(p["w"], c), None), x, None, length=3)[0]


@case({"w": SQUARE}, (2, 4))
def scan_carry(p, x):
    return lax.scan(lambda c, _: ((_block(c[1], c[0]), c[1]), None), (x, p["w"]), None, length=3)[0][0]


@case({"w": SQUARE}, (2, 4))
def scan_carry_scaled(p, x):
    def step(c, _):
        return (_block(c[1], c[0]), c[1] * jnp.asarray(0.9, c[1].dtype)), None

    return lax.scan(step, (x, p["w"]), None, length=3)[0][0]


@case({"w": STACK}, (2, 4))
def scan_returns_weights(p, x):
    _, ws = lax.scan(lambda c, w: (c, w.T), 0, p["w"])
    return jnp.einsum("bi,eio->beo", x, ws)


@case({"w": ((2, 3, 4, 4), ("batch", "batch", "in", "out"))}, (2, 4))
def scan_in_scan(p, x):
    def outer(c, ws):
        return lax.scan(jax.checkpoint(lambda c, w: (_block(w, c), None)), c, ws)

    return lax.scan(outer, x, p["w"])[0]


@case({"w": SQUARE}, (2, 4), 3)
def fori(p, x, n):
    return lax.stop_gradient(lax.fori_loop(0, n, lambda i, c: _block(p["w"], c), x))


@case({"v": SQUARE, "w": SQUARE}, (2, 4), 1)
def switch(p, x, i):
    return lax.switch(i, [lambda x: x @ p["v"], lambda x: _block(p["w"], x), lambda x: x], x)


@case({"w": SQUARE}, (2, 4))
def cond(p, x):
    return lax.cond(jnp.sum(x) > 0, lambda x: x @ p["w"], lambda x: 2 * x, x)


@case({"w": MATRIX}, (5, 4))
def vmapped_over_data(p, x):
    return jax.vmap(lambda x: x @ p["w"])(x)


@case({"w": ((5, 4, 6), ("batch", "in", "out"))}, (5, 4))
def vmapped_over_weights(p, x):
    return jax.vmap(lambda w, x: x @ w)(p["w"], x)


@case({"v": SQUARE, "w": MATRIX}, (5, 4))
def custom_derivatives_without_weights(p, x):
    return jax.nn.relu(_custom_vjp(x @ p["v"])) @ p["w"]


@jax.custom_vjp
def _custom_vjp(x):
    return jnp.sin(x)


_custom_vjp.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (3 * g * jnp.cos(x),))


@jax.custom_vjp
def _own_dense(x, w, b):
    return x @ w.astype(x.dtype) + b


def _own_dense_forward(x, w, b):
    return _own_dense(x, w, b), (x, w)


def _own_dense_backward(saved, g):
    x, w = saved
    rows, columns = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    clip = jnp.asarray(0.5, g.dtype)  # not the true gradient, which none but this pass knows
    return clip * g @ w.T, (clip * (columns.T @ rows).T).astype(w.dtype), jnp.sum(columns, 0)


_own_dense.defvjp(_own_dense_forward, _own_dense_backward)


@case({"w": WIDE}, (2, 5, 32), (20,))
def custom_vjp_of_a_weight(p, x, b):
    return jnp.tanh(_own_dense(x, p["w"], b)) + _own_dense(jnp.sin(x), p["w"], b)


@jax.custom_vjp
def _own_einsum(w, x):
    return jnp.einsum("iou,bui->bou", w, x)


_own_einsum.defvjp(
    lambda *xs: (_own_einsum(*xs), xs), lambda xs, g: jax.vjp(_own_einsum.__wrapped__, *xs)[1](g)
)


@case({"w": WIDE}, (3, 5, 32), (20,), ())
def custom_vjp_of_a_scaled_weight(p, x, b, s):
    return _own_dense(x, p["w"] * s, b)


@jax.custom_vjp
def _own_repeated(w, x):
    return jnp.einsum("bi,iho->bho", x, jnp.broadcast_to(w[:, None, :], (32, 2, 20)))


def _own_repeated_backward(saved, g):
    w, x = saved
    return jnp.einsum("bi,bho->iho", x, g).sum(1), g.sum(1) @ w.T


_own_repeated.defvjp(lambda *xs: (_own_repeated(*xs), xs), _own_repeated_backward)


@case({"w": WIDE}, (3, 32))
def custom_vjp_of_a_repeated_weight(p, x):
    return jnp.sin(_own_repeated(p["w"], x))


@case({"w": ((32, 20, 1), ("in", "out", "unit"))}, (3, 1, 32))
def custom_vjp_with_a_unit_axis(p, x):
    return _own_einsum(p["w"], x)


@jax.custom_vjp
def _own_experts(w, x, n):
    return jnp.einsum("eio,bei->beo", w, x) * n.astype(x.dtype)


def _own_experts_backward(saved, g):
    w, x, n = saved
    first, second = g * n.astype(g.dtype), 2 * g
    dw = jnp.einsum("bei,beo->eio", x, first) - jnp.einsum("beo,bei->eio", second, x)
    return dw, jnp.einsum("eio,beo->bei", w, g), None


_own_experts.defvjp(lambda w, x, n: (_own_experts(w, x, n), (w, x, n)), _own_experts_backward)


@case({"w": ((2, 16, 20), ("batch", "in", "out"))}, (3, 2, 16), 3)
def custom_vjp_of_experts(p, x, n):
    def step(c, _):
        return jnp.sum(_own_experts(p["w"], c, n), -1, keepdims=True) * jnp.cos(c), None

    return lax.scan(jax.checkpoint(step), x, None, length=2)[0]


@case({"w": SQUARE}, (2, 4))
def gradient_inside(p, x):
    return jax.grad(lambda x: jnp.sum(_block(p["w"], x)))(x)


# Models


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(nn.gelu(nn.Dense(8)(x)))


class Attention(nn.Module):
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, use_bias=self.bias)(nn.LayerNorm()(x))
        return x + nn.Dense(4)(nn.silu(nn.Dense(8)(nn.RMSNorm()(x))))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Attention()(x), None


class Stacked(nn.Module):
    axis: int = 0
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        layer: Any = nn.remat(Layer) if self.remat else Layer
        scanned = nn.scan(layer, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3)
        return scanned()(x, None)[0]


class Text(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 4)
        return embed.attend(Attention()(embed(ids)))


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), strides=2)(x))
        x = nn.Conv(8, (3, 3), feature_group_count=2, padding="CIRCULAR")(x)
        return nn.ConvTranspose(4, (3, 3), strides=(2, 2))(x)


linen("linen_dense", nn.Dense(5), (2, 3, 4))
GENERAL = {"kernel": ("in", "in", "out", "out")}
linen("linen_dense_general", nn.DenseGeneral((3, 2), axis=(-2, -1)), (2, 3, 4), axes=GENERAL)
linen("linen_mlp", Mlp(), (2, 4))
linen("linen_attention", Attention(), (2, 3, 4))
linen("linen_attention_without_bias", Attention(bias=False), (2, 3, 4))
linen("linen_scanned", Stacked(), (2, 3, 4))
linen("linen_scanned_axis_1", Stacked(axis=1), (2, 3, 4))
linen("linen_scanned_remat", Stacked(remat=True), (2, 3, 4))
linen("linen_tied_embedding", Text(), IDS, targets=".*(kernel|embedding)")
linen("linen_convolutions", Convolutions(), (2, 8, 8, 4))
HEADS = {"kernel": ("in", "out", "out")}
linen("linen_einsum", nn.Einsum((4, 2, 3), "...d,dhk->...hk"), (2, 5, 4), axes=HEADS)


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.down = nnx.LinearGeneral((8,), (4,), rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class NnxText(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(11, 4, rngs=rngs)
        self.embed.dtype = None  # else it computes in the dtype that it was made with
        self.block = NnxBlock(rngs)

    def __call__(self, ids):
        return self.embed.attend(self.block(self.embed(ids)))


class NnxStacked(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return NnxBlock(rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return layer(x)

        return run(x, self.layers)


class NnxStackedBehind(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=1)
        def make(rngs):
            return nnx.Linear(4, 4, use_bias=False, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 1), out_axes=nnx.Carry)
        def run(x, layer):
            return jnp.tanh(layer(x))

        return run(x, self.layers)


class NnxConvolutions(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(4, 6, (3, 3), rngs=rngs)
        self.second = nnx.ConvTranspose(6, 4, (3, 3), strides=(2, 2), rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


nnx_case("nnx_linear", lambda rngs: nnx.Linear(4, 5, rngs=rngs), (2, 3, 4))


def linear_general(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.LinearGeneral((3, 4), (2, 5), axis=(-2, -1), rngs=rngs)


nnx_case("nnx_linear_general", linear_general, (2, 3, 4), axes=GENERAL)
nnx_case("nnx_block", NnxBlock, (2, 3, 4))
nnx_case("nnx_stacked", NnxStacked, (2, 3, 4))
nnx_case("nnx_stacked_behind", NnxStackedBehind, (2, 4), axes={"kernel": ("in", "batch", "out")})
nnx_case("nnx_tied_embedding", NnxText, IDS, targets=".*(kernel|embedding)")
nnx_case("nnx_convolutions", NnxConvolutions, (2, 6, 6, 4))


def dense_tree(wrapped: Any) -> Any:
    """The tree with every weight formed, in the adapters' precision: what the law compares with."""
    return jax.tree.map(
        lambda x: x.dense() if isinstance(x, LoraWeight) else x, wrapped, is_leaf=is_wrapped_leaf
    )
