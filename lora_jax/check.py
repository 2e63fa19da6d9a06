"""`check_merge`: what rounding costs when an update is merged into its base."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_jax import nnx
from lora_jax.interpret import lora
from lora_jax.params import combine, merge, partition, require_wrapped
from lora_jax.tree import leaves_with_path
from lora_jax.weight import LoraWeight, is_wrapped_leaf, wide_dtype


@dataclasses.dataclass(frozen=True)
class MergedLeaf:
    """What merging did to one leaf.

    Attributes:
        path: The leaf's path in the tree.
        dtype: The base's dtype, which the sum was rounded to.
        size: rms(ΔW) / rms(W): how large the update is beside the weight; inf for a W that is zero.
        lost: ‖(W′ - W) - ΔW‖ / ‖ΔW‖ in the Frobenius norm, W′ being what merge gives: the share of
            the update that rounding lost; 0 is none, and 1 is as much as the update itself.
        unmoved: The share of entries with an update that kept their old value.
    """

    path: str
    dtype: str
    size: float
    lost: float
    unmoved: float


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What `check_merge` found; `str()` gives a table.

    Attributes:
        leaves: A `MergedLeaf` for every adapted leaf; of a Variable that a module shares, one.
        difference: The largest absolute difference between an output of `lora(fn)(wrapped, ...)` and
            of `fn(merge(wrapped), ...)`. Equal entries differ by 0, infinite ones (masked logits) too;
            it is nan wherever one of the two has a NaN.
        scale: The largest finite absolute value among the outputs of `lora(fn)(wrapped, ...)`.
        agreement: The share of positions whose largest entry along the last axis of the first
            floating output is the same in both (top-1 agreement), where neither has a NaN; None if that
            output is a scalar.
    """

    leaves: tuple[MergedLeaf, ...]
    difference: float
    scale: float
    agreement: float | None

    def __str__(self) -> str:
        width = max(len("path"), *(len(leaf.path) for leaf in self.leaves))
        lines = [f"{'path':<{width}}  {'dtype':<9} {'rms ΔW/W':>9} {'ΔW lost':>8} {'unmoved':>8}"]
        lines += [
            f"{x.path:<{width}}  {x.dtype:<9} {x.size:>9.2g} {x.lost:>8.2%} {x.unmoved:>8.2%}"
            for x in self.leaves
        ]
        lines.append(f"largest output difference {self.difference:.3g} (largest output {self.scale:.3g})")
        if self.agreement is not None:
            lines.append(f"top-1 agreement {self.agreement:.2%}")
        return "\n".join(lines)


def check_merge(fn: Callable[..., Any], wrapped: Any, *args: Any, **kwargs: Any) -> MergeReport:
    r"""Compare `lora(fn)(wrapped, ...)` with `fn(merge(wrapped), ...)`, and the merged leaves with W + ΔW.

    Merging rounds :math:`W + \Delta W` once to the base's dtype. An entry moves only if its update is
    at least half a unit in W's last place: 2⁻⁹ of W in bfloat16, 2⁻¹² in float16, 2⁻²⁵ in float32
    (up to a factor of two, by where W lies between powers of two). Smaller updates are lost there
    and kept by `lora`, which adds the branch to the output instead.

    Args:
        fn: The function; its first argument is the tree.
        wrapped: The wrapped tree. An nnx module is not changed.
        *args: fn's other arguments.
        **kwargs: fn's keyword arguments.

    Returns:
        A `MergeReport`.

    Raises:
        ValueError: the tree holds no LoraWeight; merging gives a value that is not finite; fn returns no
            floating array with an entry.
        TypeError: a leaf or an output is traced or abstract.

    >>> weight = LoraWeight(jnp.ones((4, 4), jnp.bfloat16), jnp.full((4, 1), 1e-4), jnp.ones((1, 4)))
    >>> report = check_merge(lambda w, x: x @ w, weight, jnp.ones((2, 4), jnp.bfloat16))
    >>> report.leaves[0].unmoved
    1.0
    """
    tree, _ = nnx.opened(wrapped)
    require_wrapped(tree, "check_merge")
    _require_values(tree)
    merged = merge(wrapped)
    nodes, new = leaves_with_path(tree, is_wrapped_leaf), leaves_with_path(nnx.opened(merged)[0])
    leaves = tuple(
        _leaf(path or node.path, node, value)
        for (path, node), (_, value) in zip(nodes, new, strict=True)
        if isinstance(node, LoraWeight)
    )
    if not leaves:
        raise ValueError("check_merge was given a tree without a LoraWeight; there is nothing to compare.")
    unmerged_out = lora(fn)(combine(*partition(wrapped)), *args, **kwargs)
    merged_out = fn(merged, *args, **kwargs)
    pairs = [
        (ours.astype(wide_dtype(ours.dtype)), theirs.astype(wide_dtype(ours.dtype)))
        for ours, theirs in zip(jax.tree.leaves(unmerged_out), jax.tree.leaves(merged_out), strict=True)
        if isinstance(ours, jax.Array) and jnp.issubdtype(ours.dtype, jnp.floating) and ours.size
    ]
    if not pairs:
        raise ValueError(
            "fn returned no floating array with an entry to compare; give one that returns logits or a loss, "
            "and a batch that is not empty."
        )
    if any(isinstance(x, Tracer) for pair in pairs for x in pair):
        raise TypeError("check_merge: an output of fn is traced; call it outside of jit, grad and vmap.")
    return MergeReport(
        leaves,
        # By numpy: Python's max keeps a number before a NaN.
        difference=float(np.max([_difference(*pair) for pair in pairs])),
        scale=max(float(jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0))) for x, _ in pairs),
        agreement=_agreement(*pairs[0]),
    )


def _require_values(tree: Any) -> None:
    for path, leaf in leaves_with_path(tree):
        if isinstance(leaf, Tracer):
            raise TypeError(f"check_merge: {path!r} is traced; call it outside of jit, grad and vmap.")
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"check_merge: {path!r} is a ShapeDtypeStruct, which has no values; give the arrays "
                "themselves."
            )


def _difference(x: jax.Array, y: jax.Array) -> float:
    return float(jnp.max(jnp.where(x == y, 0, jnp.abs(x - y))))


def _agreement(x: jax.Array, y: jax.Array) -> float | None:
    if not x.ndim:
        return None
    same = jnp.argmax(x, -1) == jnp.argmax(y, -1)
    return float(jnp.mean(same & ~jnp.any(jnp.isnan(x) | jnp.isnan(y), -1)))


def _leaf(path: str, weight: LoraWeight, merged: jax.Array) -> MergedLeaf:
    wide = wide_dtype(weight.w.dtype, weight.a.dtype, weight.b.dtype)
    delta, old = weight.delta(wide), weight.w.astype(wide)
    moved = merged.astype(wide) - old
    updated = delta != 0
    size = _norm(delta)
    still = jnp.sum(updated & (moved == 0)) / jnp.maximum(jnp.sum(updated), 1)
    return MergedLeaf(
        path,
        jnp.dtype(weight.w.dtype).name,
        size=_ratio(size, _norm(old)),
        lost=_ratio(_norm(moved - delta), size),
        unmoved=float(still),
    )


def _norm(x: jax.Array) -> float:
    # Squares of float32 are 0 below 1e-23 and infinite above 1e19.
    largest = jnp.max(jnp.abs(x))
    return float(largest) * float(jnp.linalg.norm(x / jnp.where(largest > 0, largest, 1)))


def _ratio(x: float, y: float) -> float:
    return x / y if y else math.inf if x else 0.0
