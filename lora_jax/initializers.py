"""How the factors of a new update are drawn."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_jax.sharding import factor_shardings
from lora_jax.targets import Target
from lora_jax.weight import sizes

Factors = tuple[Any, Any, Any]
Initializer = Callable[[jax.Array, Any, Target], Factors]


def leaf_key(key: jax.Array, path: str) -> jax.Array:
    """The key of one leaf, `fold_in(key, crc32(path))`: adding a target does not reseed another.

    >>> key = jax.random.key(0)
    >>> bool(jnp.all(leaf_key(key, "q/kernel") == jax.random.fold_in(key, zlib.crc32(b"q/kernel"))))
    True
    """
    return jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))


def shapes(w: Any, target: Target) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a and b: batch + in + (rank,) and batch + (rank,) + out.

    >>> w = jax.ShapeDtypeStruct((6, 8, 4, 2), jnp.float32)
    >>> shapes(w, Target("q/kernel", ("batch", "in", "out", "out"), rank=3, alpha=3.0))
    ((6, 8, 3), (6, 3, 4, 2))
    """
    batch, inner, outer = sizes(tuple(w.shape), target.axes)
    return (*batch, *inner, target.columns), (*batch, target.columns, *outer)


def default(key: jax.Array, w: Any, target: Target, dtype: Any = jnp.float32) -> Factors:
    r"""`a` uniform within :math:`\pm 1/\sqrt{n}`, n the product of the in sizes, and `b` zero.

    For a table read by row `a` is zero and `b` standard normal, since a row of `a` is looked up and
    never contracted with an input. Both are the defaults of PEFT; loralib has the first too.

    Args:
        key: The leaf's key.
        w: The base weight; it is returned as it is.
        target: The axes and the rank.
        dtype: The dtype of a and b.

    Returns:
        w, a of shape batch + in + (rank,), b of shape batch + (rank,) + out.

    >>> target = Target("mlp/kernel", ("in", "out"), rank=2, alpha=2.0)
    >>> _, a, b = default(jax.random.key(0), jnp.ones((100, 3)), target)
    >>> bool(jnp.abs(a).max() <= 0.1), a.shape, b.tolist()
    (True, (100, 2), [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    """
    a_shape, b_shape = shapes(w, target)
    if target.lookup:
        return w, jnp.zeros(a_shape, dtype), jax.random.normal(key, b_shape, dtype)
    fan_in = math.prod(sizes(tuple(w.shape), target.axes)[1])
    bound = 1 / math.sqrt(max(fan_in, 1))
    return w, jax.random.uniform(key, a_shape, dtype, -bound, bound), jnp.zeros(b_shape, dtype)


def gaussian(key: jax.Array, w: Any, target: Target, dtype: Any = jnp.float32) -> Factors:
    """`a` normal with standard deviation 1 / rank, and `b` zero: PEFT's reading of the paper's rule.

    Args:
        key: The leaf's key.
        w: The base weight; it is returned as it is.
        target: The axes and the rank.
        dtype: The dtype of a and b.

    Returns:
        w, a of shape batch + in + (rank,), b of shape batch + (rank,) + out. For a table read by row
        a is zero and b normal, as by default.

    >>> target = Target("mlp/kernel", ("in", "out"), rank=2, alpha=2.0)
    >>> _, a, _ = gaussian(jax.random.key(0), jnp.ones((4000, 3)), target)
    >>> bool(jnp.abs(a.std() - 0.5) < 0.02)
    True
    """
    if target.lookup:
        return default(key, w, target, dtype)
    a_shape, b_shape = shapes(w, target)
    a = jax.random.normal(key, a_shape, dtype) * jnp.asarray(1 / target.rank, dtype)
    return w, a, jnp.zeros(b_shape, dtype)


INITIALIZERS: dict[str, Callable[..., Factors]] = {"default": default, "gaussian": gaussian}


def initialize(key: jax.Array, w: Any, target: Target, dtype: Any = jnp.float32) -> Factors:
    """The base weight and the factors of one target, by its `init`.

    Args:
        key: The key of the whole tree; `leaf_key` makes the leaf's of it.
        w: The base weight.
        target: The axes, the rank and the initializer: a name, or `(key, w, target) -> (w, a, b)`.
        dtype: The dtype of a and b.

    Returns:
        w (of its shape and dtype, another one only if a custom initializer says so), a and b.

    Raises:
        ValueError: an unknown name, or a custom initializer that gave other shapes.

    >>> target = Target("q/kernel", ("batch", "in", "out"), rank=2, alpha=2.0)
    >>> _, a, b = initialize(jax.random.key(0), jnp.ones((6, 8, 4)), target)
    >>> a.shape, b.shape
    ((6, 8, 2), (6, 2, 4))
    """
    key = leaf_key(key, target.path)
    if not isinstance(target.init, str):
        w, a, b = _custom(target.init, key, w, target, dtype)
        return w, *(_limited(a, b, target) if target.ranks else (a, b))
    if target.init not in INITIALIZERS:
        raise ValueError(
            f"init of {target.path!r} is {target.init!r}; write one of {sorted(INITIALIZERS)}, or a "
            "function (key, w, target) -> (w, a, b)."
        )

    initializer = INITIALIZERS[target.init]

    def factors(key: jax.Array) -> tuple[Any, Any]:
        _, a, b = initializer(key, w, target, dtype)
        return _limited(a, b, target) if target.ranks else (a, b)

    where = factor_shardings(w, target.axes)
    if where is not None and w.sharding.num_devices > 1:
        # Every device makes its own part; no device ever holds a whole factor.
        return w, *jax.jit(factors, out_shardings=where[:2])(key)
    return w, *factors(key)


def _limited(a: Any, b: Any, target: Target) -> tuple[Any, Any]:
    """The factors with zeros in what a layer's rank leaves of the largest: their gradients are zero too."""
    n = target.axes.count("batch")
    column = np.arange(target.columns) % target.rank
    live = column < np.reshape(target.ranks, (*b.shape[:n], 1))
    of_a = np.expand_dims(live, tuple(range(n, a.ndim - 1)))
    of_b = np.expand_dims(live, tuple(range(n + 1, b.ndim)))
    return jnp.where(of_a, a, jnp.zeros_like(a)), jnp.where(of_b, b, jnp.zeros_like(b))


def _custom(init: Any, key: jax.Array, w: Any, target: Target, dtype: Any) -> Factors:
    if not callable(init):
        raise TypeError(
            f"init of {target.path!r} is {init!r}; write a name or a function (key, w, target) -> (w, a, b)."
        )
    result = init(key, w, target)
    if not isinstance(result, tuple) or len(result) != 3:
        raise ValueError(f"init of {target.path!r} gave {type(result).__name__}; it must return (w, a, b).")
    base, a, b = result
    expected = (tuple(w.shape), *shapes(w, target))
    given = tuple(tuple(jnp.shape(x)) for x in (base, a, b))
    if given != expected or base.dtype != w.dtype:
        raise ValueError(
            f"init of {target.path!r} gave w, a, b of shapes {given} with w of dtype {base.dtype}; they must "
            f"have shapes {expected} and w the dtype {w.dtype}."
        )
    return base, jnp.asarray(a, dtype), jnp.asarray(b, dtype)


def placed(factors: tuple[Any, ...], w: Any, axes: Any) -> tuple[Any, ...]:
    """a, b and perhaps the scale where their weight lies: on its device, or in their parts of its mesh.

    >>> w = jax.device_put(jnp.ones((3, 3)), jax.devices()[0])
    >>> placed((jnp.ones((3, 1)),), w, ("in", "out"))[0].devices() == {jax.devices()[0]}
    True
    """
    if isinstance(w, Tracer) or not isinstance(w, jax.Array) or not w.committed:
        return factors
    where = factor_shardings(w, axes)
    if where is None:
        where = (w.sharding,) * 3 if len(w.sharding.device_set) == 1 else None
    return factors if where is None else tuple(map(jax.device_put, factors, where))
