"""One torch parameter's update, out of a leaf's factors and into them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lora_jax.names import Piece
from lora_jax.weight import Block, LoraWeight


def kinds(piece: Piece) -> tuple[Any, ...]:
    """A kind for every axis of the leaf, as the rule has it.

    An axis that counts torch's parameters is a batch axis; so is none of which only a part does, which
    is an out axis in blocks.

    Raises:
        ValueError: an axis of the leaf mixes in and out axes, or counts parameters along an in axis.

    >>> from lora_jax.names import Rule, pieces
    >>> rule = Rule("qkv", "l.{n}.{c}.weight", "linear: n d (c o) -> o d", {"c": ("q", "k", "v")})
    >>> kinds(pieces("qkv", (2, 8, 24), [rule])[0])
    ('batch', 'in', 'out')
    """
    found = []
    for group in piece.leaf:
        what = {_kind(piece, axis) for axis, _ in group}
        if what == {"batch", "out"}:
            what = {"out"}
        if len(what) > 1:
            raise ValueError(
                f"the rule for {piece.path!r} makes one axis of {' and '.join(axis for axis, _ in group)}, "
                "which are not of one kind; no factors of low rank have that form."
            )
        found.append(what.pop())
    return tuple(found)


def _kind(piece: Piece, axis: str) -> str:
    return "in" if axis in piece.inner else "out" if axis in piece.outer else "batch"


@dataclass(frozen=True)
class Factors:
    """The update of one torch parameter: s·B·A with A of shape (r, in) and B of shape (out, r).

    Where torch has more axes, the in axes are flattened in torch's order: (in, kh, kw) for a Conv2d.
    Outside of the blocks, if there are any, B is zero and stays so in training.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    blocks: tuple[Block, ...] = ()


def factors_of(weight: LoraWeight, piece: Piece) -> Factors | None:
    """The update of one torch parameter, taken out of a leaf's; None where the leaf has none for it.

    Columns that are zero in both factors, which smaller ranks of stacked layers are filled up with, are
    left out.

    Raises:
        ValueError: the weight's axes are not those of the rule.
    """
    a, b = np.asarray(weight.a), np.asarray(weight.live_b)
    scale = np.asarray(weight.scale)
    groups = {kind: [piece.leaf[i] for i in weight.axes_of(kind)] for kind in ("batch", "in", "out")}
    atoms = {kind: [axis for axis, _ in itertools.chain(*many)] for kind, many in groups.items()}
    atoms["unit"] = [axis for i in weight.axes_of("unit") for axis, _ in piece.leaf[i]]
    rank = weight.rank
    size = piece.size
    a = a.reshape([size[x] for x in (*atoms["batch"], *atoms["in"])] + [rank])
    b = b.reshape([size[x] for x in atoms["batch"]] + [rank] + [size[x] for x in atoms["out"]])
    scale = scale.reshape([size[x] for x in atoms["batch"]])
    wrong = [axis for axis in piece.inner if axis not in atoms["in"]]
    wrong += [axis for axis in piece.outer if axis not in atoms["out"]]
    wrong += [axis for axis in piece.index if axis not in atoms["batch"] + atoms["out"] + atoms["in"]]
    wrong = [axis for axis in wrong if not (axis in atoms["unit"] and size[axis] == 1)]
    if wrong:
        raise ValueError(
            f"{piece.path!r} has the axes {weight.axes}, and the rule for {piece.name!r} takes them as "
            f"{kinds(piece)}. Wrap it with those, axes={{{piece.path!r}: {kinds(piece)}}}, or write another "
            "rule."
        )

    def at(axes: Sequence[str]) -> tuple[Any, ...]:
        return tuple(piece.index.get(axis, slice(None)) for axis in axes)

    place = at(atoms["batch"])
    a = a[(*place, *at(atoms["in"]))]
    b = b[(*place, slice(None), *at(atoms["out"]))]
    left = {kind: [axis for axis in atoms[kind] if axis not in piece.index] for kind in ("in", "out")}
    inner = [axis for axis in piece.inner if axis in left["in"]]
    outer = [axis for axis in piece.outer if axis in left["out"]]
    a = a.transpose([len(inner), *(left["in"].index(axis) for axis in inner)]).reshape(rank, -1)
    b = b.transpose([*(1 + left["out"].index(axis) for axis in outer), 0]).reshape(-1, rank)
    alive = np.array([a[i].any() or b[:, i].any() for i in range(rank)], bool)
    if weight.blocks:
        alive &= _feeding(weight, piece, atoms["out"])
    if not alive.any():
        return None
    return Factors(a[alive], b[:, alive], float(scale[place]) / piece.factor)


def _feeding(weight: LoraWeight, piece: Piece, outer: Sequence[str]) -> np.ndarray:
    """Which columns reach the part of the out axes that a piece is, by the weight's blocks."""
    positions = _positions(piece, outer)
    found = np.zeros(weight.rank, bool)
    for (r0, r1), (o0, o1) in weight.blocks:
        found[r0:r1] |= bool(np.any((positions >= o0) & (positions < o1)))
    return found


def _positions(piece: Piece, outer: Sequence[str]) -> np.ndarray:
    """Where a piece's outputs lie along the leaf's flattened out axes."""
    sizes = [piece.size[axis] for axis in outer]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers[tuple(piece.index.get(axis, slice(None)) for axis in outer)].reshape(-1)


def weight_of(
    parts: Sequence[tuple[Piece, Factors | None]], dropout: float = 0.0, dtype: Any = np.float32
) -> LoraWeight:
    """A leaf's factors, without its w, from those of the torch parameters that it is.

    Smaller ranks are filled up with zeros. Parameters that share an out axis get columns of their own,
    in blocks.
    """
    first = parts[0][0]
    axes = kinds(first)
    size = first.size
    groups = {kind: [g for g, k in zip(first.leaf, axes, strict=True) if k == kind] for kind in axes}
    atoms = {
        kind: [axis for axis, _ in itertools.chain(*groups.get(kind, []))] for kind in ("batch", "in", "out")
    }
    fused = [axis for axis in first.index if axis in atoms["out"]]
    slots = sorted(
        {tuple(piece.index[axis] for axis in fused) for piece, found in parts if found is not None}
    )
    ranks = {
        slot: max(
            len(found.a)
            for piece, found in parts
            if found is not None and tuple(piece.index[axis] for axis in fused) == slot
        )
        for slot in slots
    }
    starts = dict(zip(slots, itertools.accumulate([0, *list(ranks.values())[:-1]]), strict=True))
    rank = sum(ranks.values())
    a = np.zeros([size[x] for x in (*atoms["batch"], *atoms["in"])] + [rank], dtype)
    b = np.zeros([size[x] for x in atoms["batch"]] + [rank] + [size[x] for x in atoms["out"]], dtype)
    scale = np.zeros([size[x] for x in atoms["batch"]], np.float64)
    # One scale for all parts of a layer: what another part's differs by goes into its b.
    for piece, found in parts:
        place = tuple(piece.index[axis] for axis in atoms["batch"] if axis in piece.index)
        if found is not None and not scale[place].any():
            scale[place] = found.scale * piece.factor
    blocks: dict[tuple[int, ...], list[Block]] = {}
    for piece, found in parts:
        if found is None:
            continue
        slot = tuple(piece.index[axis] for axis in fused)
        start, stop = starts[slot], starts[slot] + len(found.a)
        place = tuple(piece.index[axis] for axis in atoms["batch"])
        theirs = [size[axis] for axis in piece.inner]
        part = found.a.reshape(len(found.a), *theirs)
        part = part.transpose([*(1 + piece.inner.index(axis) for axis in atoms["in"]), 0])
        a[(*place, ..., slice(start, stop))] = part
        part = found.b.reshape(*(size[axis] for axis in piece.outer), len(found.a))
        kept = [axis for axis in atoms["out"] if axis not in piece.index]
        part = part.transpose([len(piece.outer), *(piece.outer.index(axis) for axis in kept)])
        ratio = found.scale * piece.factor / scale[place] if scale[place] else 1.0
        if ratio != 1.0:
            part = (part.astype(np.float64) * ratio).astype(dtype)
        outer = tuple(piece.index.get(axis, slice(None)) for axis in atoms["out"])
        # One array per rank, so that a number among the indices moves no axis.
        for column in range(stop - start):
            b[place][start + column][outer] = part[column]
        if found.blocks:
            same = blocks.setdefault(slot, list(found.blocks)) == list(found.blocks)
            if fused or not same or list(piece.outer) != atoms["out"]:
                raise ValueError(
                    f"{piece.path!r}: parts of torch's outputs that are adapted alone must be the same in "
                    "all stacked layers, and lie in the leaf in torch's order."
                )
        if fused:
            spans = _runs(_positions(piece, atoms["out"]))
            blocks[slot] = [((starts[slot], starts[slot] + ranks[slot]), span) for span in spans]
    shape = [math.prod(n for _, n in group) for group in first.leaf]
    final = {
        kind: [n for n, k in zip(shape, axes, strict=True) if k == kind] for kind in ("batch", "in", "out")
    }
    abstract = jax.ShapeDtypeStruct(tuple(shape), dtype)
    weight = LoraWeight(
        abstract,
        a.reshape([*final["batch"], *final["in"], rank]),
        b.reshape([*final["batch"], rank, *final["out"]]),
        scale.astype(dtype).reshape(final["batch"]),
        axes,
        first.path,
        dropout,
        [block for slot in slots for block in blocks.get(slot, [])],
    )
    return weight.replace(w=None)


def _runs(positions: np.ndarray) -> list[tuple[int, int]]:
    """Rising numbers as ranges without a gap.

    >>> _runs(np.array([0, 1, 2, 6, 7]))
    [(0, 3), (6, 8)]
    """
    positions = np.sort(positions)
    breaks = np.flatnonzero(np.diff(positions) != 1)
    starts = [0, *(breaks + 1).tolist()]
    stops = [*(breaks + 1).tolist(), len(positions)]
    return [(int(positions[i]), int(positions[j - 1]) + 1) for i, j in zip(starts, stops, strict=True)]
