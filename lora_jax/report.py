"""A table of what is adapted, trained in full and skipped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_jax import nnx
from lora_jax.layouts import is_floating, skipped_because
from lora_jax.params import require_wrapped
from lora_jax.tree import leaves_with_path
from lora_jax.weight import FullWeight, LoraWeight, check_whole, is_wrapped_leaf, sizes


@dataclass(frozen=True)
class Row:
    """One line of a summary.

    Attributes:
        path: The leaf's path.
        shape: Its shape.
        axes: A kind for every axis, if it is adapted.
        rank: The rank, or 0.
        alpha: The scale times the rank, a number, or None if layers differ or it is not known.
        trainable: How many numbers are trained in its place.
        total: How many numbers the leaf has.
        status: "adapted", "trained in full" or "skipped".
        why: Why it is skipped.
        wasteful: Whether the factors hold as many numbers as the leaf itself or more, r(m+n) >= mn.

    >>> from lora_jax import wrap
    >>> summary(wrap({"mlp": {"kernel": jnp.ones((8, 8))}}, rank=2)).rows[0].share
    0.5
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    rank: int
    alpha: float | None
    trainable: int
    total: int
    status: str
    why: str = ""
    wasteful: bool = False

    @property
    def share(self) -> float:
        """The trained numbers as a share of the leaf's own."""
        return self.trainable / self.total if self.total else 0.0


@dataclass(frozen=True)
class Summary:
    """What `summary` returns: rows as data, and a table as text.

    Attributes:
        rows: A row for every floating leaf of two or more dimensions, and for every leaf trained in
            full, in tree order.
        trainable: How many numbers are trained in all.
        total: How many numbers the base has in its floating leaves.

    >>> from lora_jax import wrap
    >>> made = summary(wrap({"mlp": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}, rank=2))
    >>> made.trainable, made.total, len(made.rows)
    (32, 72, 1)
    """

    rows: tuple[Row, ...]
    trainable: int
    total: int

    @property
    def share(self) -> float:
        """The trained numbers as a share of the base's."""
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        lines = [("path", "shape", "axes", "rank", "trainable", "of", "share", "status")]
        for row in self.rows:
            status = row.status + (f": {row.why}" if row.why else "")
            status += "  (!) r(m+n) >= mn" if row.wasteful else ""
            lines.append(
                (
                    row.path,
                    "x".join(map(str, row.shape)),
                    " ".join(row.axes),
                    str(row.rank or ""),
                    f"{row.trainable:,}",
                    f"{row.total:,}",
                    f"{row.share:.2%}",
                    status,
                )
            )
        lines.append(("total", "", "", "", f"{self.trainable:,}", f"{self.total:,}", f"{self.share:.2%}", ""))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if 3 <= i <= 6 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    __repr__ = __str__


def summary(wrapped: Any) -> Summary:
    """What is adapted, trained in full and skipped, leaf by leaf.

    Args:
        wrapped: A tree from `wrap`, concrete or abstract.

    Returns:
        A `Summary`: `print` it for a table, or read its rows.

    Raises:
        ValueError: no leaf is wrapped.

    A matrix of 1000 by 1000 has 1,000,000 numbers, its update of rank 5 has 10,000:

    >>> from lora_jax import wrap
    >>> print(summary(wrap({"mlp": {"kernel": jnp.ones((1000, 1000))}}, rank=5)))
    path        shape      axes    rank  trainable         of  share  status
    mlp/kernel  1000x1000  in out     5     10,000  1,000,000  1.00%  adapted
    total                                   10,000  1,000,000  1.00%
    """
    tree, _ = nnx.opened(wrapped)
    require_wrapped(tree, "summary")
    rows, total = [], 0
    for path, leaf in leaves_with_path(tree, is_wrapped_leaf):
        if isinstance(leaf, LoraWeight):
            check_whole(leaf)
        if not is_floating(leaf):
            continue
        size = math.prod(leaf.shape)
        total += size
        if isinstance(leaf, LoraWeight):
            rows.append(_adapted_row(path, leaf, size))
        elif isinstance(leaf, FullWeight):
            rows.append(Row(path, tuple(leaf.shape), (), 0, None, size, size, "trained in full"))
        elif len(leaf.shape) >= 2:
            why = skipped_because(path, leaf)
            rows.append(Row(path, tuple(leaf.shape), (), 0, None, 0, size, "skipped", why))
    return Summary(tuple(rows), sum(row.trainable for row in rows), total)


def _adapted_row(path: str, leaf: LoraWeight, size: int) -> Row:
    batch, inner, outer = sizes(tuple(leaf.w.shape), leaf.axes)
    m, n = math.prod(inner), math.prod(outer)
    # Of each column of a: how many of b's entries count, and in which layers it is not zero for good.
    widths = np.full(leaf.rank, 0 if leaf.blocks else n)
    for (r0, r1), (o0, o1) in leaf.blocks:
        widths[r0:r1] += o1 - o0
    live = _live(leaf, len(batch))
    parts = len({ranks for ranks, _ in leaf.blocks}) or 1
    trained = int((live * (m + widths)).sum())
    return Row(
        path,
        tuple(leaf.shape),
        leaf.axes,
        leaf.rank // parts,
        _alpha(leaf, live.sum(-1) // parts),
        trained,
        size,
        "adapted",
        wasteful=trained >= size,
    )


def _is_concrete(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray) and not isinstance(x, Tracer)


def _live(leaf: LoraWeight, n: int) -> np.ndarray:
    """For every layer and column of a whether it is trained: not if a and b are both zero there."""
    shape = (*leaf.b.shape[:n], leaf.rank)
    if not n or not (_is_concrete(leaf.a) and _is_concrete(leaf.b)):
        return np.ones(shape, bool)
    of_a = jnp.any(leaf.a != 0, axis=tuple(range(n, leaf.a.ndim - 1)))
    of_b = jnp.any(leaf.b != 0, axis=tuple(range(n + 1, leaf.b.ndim)))
    return np.asarray(jax.device_get(of_a | of_b))


def _alpha(leaf: LoraWeight, ranks: np.ndarray) -> float | None:
    if not _is_concrete(leaf.scale):
        return None
    values = np.unique((np.asarray(jax.device_get(leaf.scale)) * ranks)[ranks > 0])
    return float(values[0]) if values.size == 1 else None
