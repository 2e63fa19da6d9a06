"""`LoraWeight`: a weight and its low-rank update, standing where the leaf stood."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, Literal, NoReturn, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

AxisKind = Literal["batch", "in", "out", "unit"]
# Which columns of a feed which of the flattened out axes: ((rank start, stop), (out start, stop)).
Block = tuple[tuple[int, int], tuple[int, int]]
AXIS_KINDS: tuple[AxisKind, ...] = ("batch", "in", "out", "unit")


_JOINT = " + "


def joint_path(paths: Iterable[str]) -> str:
    """The path of a weight that several were made into: each of theirs once.

    >>> joint_path(["q/kernel", "k/kernel", "q/kernel"])
    'q/kernel + k/kernel'
    """
    return _JOINT.join(dict.fromkeys(part for path in paths for part in parted(path)))


def parted(path: str) -> tuple[str, ...]:
    """The paths in a joint path."""
    return tuple(path.split(_JOINT))


class NotUnderLoraError(TypeError):
    """A wrapped leaf met code that was not called through `lora_jax.lora`."""


class _NotUnderLoraAttributeError(NotUnderLoraError, AttributeError):
    """The same, from an attribute, so that `hasattr` still answers."""


class _Node:
    """What `LoraWeight` and `FullWeight` share: a path, and refusing to be mistaken for an array."""

    path: str

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise NotUnderLoraError(self._refusal())

    def _refusal(self) -> str:
        return (
            f"the parameter {self.path!r} is a {type(self).__name__}, which model code cannot use as "
            "an array. Call the model through lora: lora_jax.lora(fn)(wrapped, ...) in place of "
            "fn(wrapped, ...), with the wrapped tree among the arguments, not closed over. "
            "For plain arrays, use lora_jax.merge(wrapped)."
        )

    def __getattr__(self, name: str) -> Any:
        if name in _ARRAY_ATTRIBUTES:
            raise _NotUnderLoraAttributeError(self._refusal())
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __str__(self) -> str:
        # jax puts this into its own error where a lax function is given the node.
        return f"{self!r}: call the model through lora_jax.lora(fn)"

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; nothing is validated, so holes and tracers pass."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__, **changes)
        return new


_ARRAY_ATTRIBUTES = frozenset(
    "T mT at astype reshape transpose swapaxes sum mean dot ravel flatten squeeze take real imag "
    "conj max min view copy std var prod item tolist addressable_data block_until_ready".split()
)
for _name in (
    "array add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow "
    "matmul rmatmul neg pos abs getitem iter len float int bool lt le gt ge"
).split():
    setattr(_Node, f"__{_name}__", _Node._refuse)
# A property, since jax only asks whether the attribute is there and then raises an error of its own.
_Node.__jax_array__ = property(_Node._refuse)  # type: ignore[attr-defined]


class LoraWeight(_Node):
    r"""A weight with a low-rank update: the leaf's value is :math:`W + s\,A B`.

    Every axis of `w` has a kind: `batch` (stacked layers, experts), `in`, `out`, or `unit` (size
    one, in neither factor). Batch axes may stand anywhere. With the sizes of each kind taken in
    `w`'s order,

        a.shape == batch + in + (rank,)
        b.shape == batch + (rank,) + out
        scale.shape == batch

    `w` and `scale` are frozen, `a` and `b` are trained. Flattening gives w, a, b, scale; the rest
    is static. Unflattening validates nothing, so that transformations may put anything there;
    this constructor does.

    Args:
        w: The base weight, of any floating dtype; or None in a tree that was partitioned.
        a: The first factor, usually float32.
        b: The second factor, usually float32.
        scale: s = alpha / rank; float32, broadcast to the batch shape.
        axes: A kind for every axis of `w`. The default is ("in", "out"), for a matrix.
        path: The leaf's path in its tree, for errors.
        dropout: The rate at which entries of the branch's input are dropped in training.
        blocks: For a fused kernel of which only some parts are adapted, ((rank start, stop), (out
            start, stop)) for each part, along the flattened out axes: b counts inside these blocks
            only, whatever stands elsewhere. Without any, all of b counts.

    Raises:
        ValueError: the shapes of w, a, b and scale do not fit the axes, or a block not the shapes.

    The definition is that of LoRA (arXiv:2106.09685), section 4.1, with x @ W for W x.

    >>> W = jnp.array([[1., 2., 3.], [4., 5., 6.], [7., 8., 9.]])
    >>> A = jnp.array([[1., 0.], [0., 1.], [1., 1.]])
    >>> B = jnp.array([[1., 2., 3.], [4., 5., 6.]])
    >>> LoraWeight(W, A, B).dense().tolist()
    [[2.0, 4.0, 6.0], [8.0, 10.0, 12.0], [12.0, 15.0, 18.0]]
    """

    w: Any
    a: Any
    b: Any
    scale: Any
    axes: tuple[AxisKind, ...]
    dropout: float
    blocks: tuple[Block, ...]

    def __init__(
        self,
        w: Any,
        a: Any,
        b: Any,
        scale: Any = 1.0,
        axes: tuple[AxisKind, ...] = ("in", "out"),
        path: str = "",
        dropout: float = 0.0,
        blocks: Iterable[Block] = (),
    ):
        where = f"LoraWeight at {path!r}" if path else "LoraWeight"
        check_axes(w.shape, axes, where)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"{where}: dropout is {dropout}; write a rate in [0, 1).")
        batch, inner, outer = sizes(w.shape, axes)
        rank = a.shape[-1] if a.ndim else 0
        if a.shape != (*batch, *inner, rank) or b.shape != (*batch, rank, *outer) or rank < 1:
            raise ValueError(
                f"{where}: w has shape {w.shape} and axes {axes}, so a must have shape "
                f"{(*batch, *inner, 'rank')} and b {(*batch, 'rank', *outer)}, with rank at least 1; "
                f"they have {a.shape} and {b.shape}."
            )
        scale = jnp.asarray(scale, wide_dtype(scale.dtype) if hasattr(scale, "dtype") else jnp.float32)
        if scale.shape not in ((), batch):
            raise ValueError(f"{where}: scale has shape {scale.shape}; write a number or shape {batch}.")
        self.w, self.a, self.b = w, a, b
        self.scale = jnp.broadcast_to(scale, batch)
        self.axes, self.path, self.dropout = tuple(axes), path, float(dropout)
        self.blocks = tuple(((r0, r1), (o0, o1)) for (r0, r1), (o0, o1) in blocks)
        width = math.prod(outer)
        for block in self.blocks:
            (r0, r1), (o0, o1) = block
            if not (0 <= r0 < r1 <= rank and 0 <= o0 < o1 <= width):
                raise ValueError(
                    f"{where}: the block {block} is not inside of rank {rank} and {width} outputs."
                )

    # The model may ask a leaf for these before it computes with it; they are the base's.
    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `w`."""
        return self.w.shape

    @property
    def ndim(self) -> int:
        """The number of axes of `w`."""
        return len(self.axes)

    @property
    def dtype(self) -> Any:
        """The dtype of `w`."""
        return self.w.dtype

    @property
    def rank(self) -> int:
        """The rank r: the size of a's last axis."""
        return self.a.shape[-1]

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths it comes from: several for a sum, a product or a concatenation inside `lora`."""
        return parted(self.path)

    @property
    def live_b(self) -> Any:
        """The b that counts: zero outside of the blocks, if there are any."""
        if not self.blocks:
            return self.b
        outer = self.b.shape[len(self.axes_of("batch")) + 1 :]
        mask = np.zeros((self.rank, math.prod(outer)), bool)
        for (r0, r1), (o0, o1) in self.blocks:
            mask[r0:r1, o0:o1] = True
        inside = jnp.asarray(np.broadcast_to(mask.reshape(self.rank, *outer), self.b.shape))
        return lax.select(_laid_out_as(inside, self.b), self.b, jnp.zeros_like(self.b))

    def axes_of(self, kind: AxisKind) -> tuple[int, ...]:
        """The positions in `w` of the axes of one kind."""
        return tuple(i for i, k in enumerate(self.axes) if k == kind)

    def delta(self, dtype: Any = None) -> jax.Array:
        """The update s·A·B in `w`'s own layout, shape `w.shape`.

        It is computed in `dtype`, by default float32 or wider if a factor is.
        """
        if dtype is None:
            dtype = wide_dtype(self.a.dtype, self.b.dtype)
        a, b, scale = (x.astype(dtype) for x in (self.a, self.live_b, self.scale))
        n = scale.ndim
        batch = tuple(range(n))
        scaled = b * lax.expand_dims(scale, tuple(range(n, b.ndim)))
        product = lax.dot_general(
            a,
            scaled,
            (((a.ndim - 1,), (n,)), (batch, batch)),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=dtype,
        )  # batch + in + out
        order = [*self.axes_of("batch"), *self.axes_of("in"), *self.axes_of("out")]
        present = sorted(order)
        product = lax.transpose(product, [order.index(axis) for axis in present])
        return lax.expand_dims(product, self.axes_of("unit"))

    def dense(self, dtype: Any = None) -> jax.Array:
        """W + s·A·B, added in float32 (or wider) and rounded once to `dtype`, by default w's.

        Where the update is zero the entry of `w` is kept as it is, so -0.0 survives. The
        derivative is that of the sum everywhere.
        """
        wide = wide_dtype(self.w.dtype, self.a.dtype, self.b.dtype)
        out = self.w.dtype if dtype is None else jnp.dtype(dtype)
        delta = _laid_out_as(self.delta(wide), self.w)
        return _sum(out, self.w, delta)

    def __repr__(self) -> str:
        def show(x: Any) -> str:
            return f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else repr(x)

        return (
            f"LoraWeight({self.path!r}, w={show(self.w)}, a={show(self.a)}, b={show(self.b)}, "
            f"scale={show(self.scale)}, axes={self.axes}, dropout={self.dropout})"
        )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum(dtype: Any, w: jax.Array, delta: jax.Array) -> jax.Array:
    # Without a rule of its own the select would pass no gradient to an update that is still zero.
    total = lax.convert_element_type(w.astype(delta.dtype) + delta, dtype)
    return jnp.where(delta == 0, w.astype(dtype), total)


@_sum.defjvp
def _sum_jvp(dtype: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    w, delta = tangents
    return _sum(dtype, *primals), lax.convert_element_type(w.astype(delta.dtype) + delta, dtype)


def _laid_out_as(x: jax.Array, like: Any) -> jax.Array:
    """An array in another's sharding where axes are Explicit, which add and select demand."""
    sharding = jax.typeof(like).sharding
    explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    return jax.sharding.reshard(x, sharding) if explicit else x


class FullWeight(_Node):
    """A leaf trained in full: `value` is the trained float32 copy, `dtype` what the model sees.

    Inside `lora_jax.lora` the model meets `value.astype(dtype)`; `merge` gives the same.

    Args:
        value: The trained array, float32 or wider; or None in a tree that was partitioned.
        dtype: The dtype the leaf had.
        path: The leaf's path in its tree, for errors.

    >>> FullWeight(jnp.ones((2, 3)), jnp.bfloat16, "head/kernel").dense().dtype
    dtype(bfloat16)
    """

    value: Any
    dtype: Any

    def __init__(self, value: Any, dtype: Any, path: str = ""):
        self.value, self.dtype, self.path = value, jnp.dtype(dtype), path

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's shape."""
        return self.value.shape

    @property
    def ndim(self) -> int:
        """The leaf's number of axes."""
        return self.value.ndim

    def dense(self, dtype: Any = None) -> jax.Array:
        """The value rounded to `dtype`, by default the dtype the leaf had."""
        return self.value.astype(self.dtype if dtype is None else dtype)

    def __repr__(self) -> str:
        shape = list(self.value.shape) if hasattr(self.value, "shape") else self.value
        return f"FullWeight({self.path!r}, {shape}, {self.dtype})"


def wide_dtype(*dtypes: Any) -> Any:
    """The dtype to accumulate in: float32, or wider where one of the dtypes is.

    >>> wide_dtype(jnp.bfloat16, jnp.float16)
    dtype('float32')
    """
    # By hand, since strict promotion refuses mixtures and the float8 formats promote to nothing.
    kinds = [jnp.dtype(d) for d in dtypes]
    double = any(d in (jnp.float64, jnp.complex128) for d in kinds)
    if any(jnp.issubdtype(d, jnp.complexfloating) for d in kinds):
        return jnp.dtype(jnp.complex128 if double else jnp.complex64)
    return jnp.dtype(jnp.float64 if double else jnp.float32)


def is_wrapped_leaf(node: Any) -> bool:
    """Whether a node of a tree is a LoraWeight or a FullWeight: the `is_leaf` of wrapped trees."""
    return isinstance(node, _Node)


def sizes(
    shape: tuple[int, ...], axes: tuple[AxisKind, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The sizes of the batch, in and out axes of a shape.

    >>> sizes((6, 8, 4, 2), ("batch", "in", "out", "out"))
    ((6,), (8,), (4, 2))
    """
    batch, inner, outer = (
        tuple(n for n, kind in zip(shape, axes, strict=True) if kind == which)
        for which in ("batch", "in", "out")
    )
    return batch, inner, outer


def check_axes(shape: tuple[int, ...], axes: tuple[AxisKind, ...], where: str) -> None:
    """Raise unless `axes` is a kind for every axis of `shape`, with an in and an out axis."""
    unknown = [kind for kind in axes if kind not in AXIS_KINDS]
    if unknown or len(axes) != len(shape):
        raise ValueError(
            f"{where}: axes {tuple(axes)} do not fit shape {shape}; write one of "
            f"{', '.join(map(repr, AXIS_KINDS))} for each of its {len(shape)} axes."
        )
    for n, kind in zip(shape, axes, strict=True):
        if kind == "unit" and n != 1:
            raise ValueError(f"{where}: an axis of size {n} is called 'unit' in {axes} for shape {shape}.")
    if "in" not in axes or "out" not in axes:
        raise ValueError(
            f"{where}: axes {tuple(axes)} for shape {shape} need at least one 'in' and one 'out' axis."
        )


def check_whole(leaf: LoraWeight) -> None:
    """Raise where a LoraWeight has holes, or was stacked after it was made; shapes alone are looked at."""
    if any(x is None for x in (leaf.w, leaf.a, leaf.b, leaf.scale)):
        raise ValueError(
            f"the LoraWeight at {leaf.path!r} has holes: this tree is one half of partition(), or a "
            "stack() of adapters. Put the halves together, of a stack one adapter with its base: "
            "lora_jax.combine(trainable, frozen)."
        )
    n = {kind: len(leaf.axes_of(kind)) for kind in AXIS_KINDS}
    expected = (len(leaf.axes), n["batch"] + n["in"] + 1, n["batch"] + 1 + n["out"], n["batch"])
    shapes = [tuple(getattr(x, "shape", ())) for x in (leaf.w, leaf.a, leaf.b, leaf.scale)]
    if tuple(map(len, shapes)) != expected:
        raise ValueError(
            f"the LoraWeight at {leaf.path!r} has axes {leaf.axes}, and w, a, b and scale of shapes "
            f"{', '.join(map(str, shapes))}: it was stacked "
            "or mapped after it was made. For several adapters put vmap outside: "
            "jax.vmap(lora_jax.lora(fn), in_axes=...), jax.vmap(lora_jax.merge); for layers, wrap the stack."
        )


def _register(cls: type, data: tuple[str, ...], static: tuple[str, ...]) -> None:
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in data)

    def flatten_with_keys(node: Any):
        fields = node.__dict__
        children = tuple(zip(keys, (fields[name] for name in data), strict=True))
        return children, tuple(fields[name] for name in static)

    def flatten(node: Any):
        fields = node.__dict__
        return tuple(fields[name] for name in data), tuple(fields[name] for name in static)

    def unflatten(aux: tuple[Any, ...], children: Any):
        node = object.__new__(cls)
        node.__dict__.update(zip(data, children, strict=True))
        node.__dict__.update(zip(static, aux, strict=True))
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


_register(LoraWeight, ("w", "a", "b", "scale"), ("axes", "path", "dropout", "blocks"))
_register(FullWeight, ("value",), ("dtype", "path"))
