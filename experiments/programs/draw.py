"""Drawn programs: Python source of functions that use low-rank weights in every way the law speaks of.

`draw(below)` writes a program step by step. Every choice it makes is one call `below(n)`, a number in
[0, n), of which 0 is the plainest; so a seeded generator and Hypothesis draw the same programs, and
Hypothesis shrinks them. A program is text: what fails can be pasted and run.

The writer follows shapes, and for what is still linear in a weight the kinds of the axes, so that most of
what it writes has a low-rank form. Where its own notion of the kinds is rougher than the library's, a
refusal is the worst that can follow.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lora_jax import LoraWeight

T = TypeVar("T")
Below = Callable[[int], int]
Shape = tuple[int, ...]
Kinds = tuple[str, ...]
LARGEST = 160  # elements of one value
DEEPEST = 3
NAMESPACE = {
    "jax": jax,
    "jnp": jnp,
    "lax": lax,
    "functools": functools,
    "checkpoint_name": checkpoint_name,
}


class Weight(NamedTuple):
    """A parameter of a program."""

    shape: Shape
    kinds: Kinds
    rank: int


class Input(NamedTuple):
    """An input of a program: floats, or where `limit` is not 0 integers below it."""

    shape: Shape
    limit: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of weights w0, w1 … and of inputs x0, x1 …, as source.

    Attributes:
        source: The definition of `program`.
        weights: The weights' shapes, kinds of axes and ranks.
        inputs: The inputs' shapes and ranges.
        operations: How many operations were drawn, the final contractions not counted.
        depth: How deep the control flow is nested.
        used: The names of the drawn operations.
    """

    source: str
    weights: tuple[Weight, ...]
    inputs: tuple[Input, ...]
    operations: int
    depth: int
    used: tuple[str, ...]

    def __str__(self) -> str:
        weights = "\n".join(
            f"# w{i}: {w.shape}, {w.kinds}, rank {w.rank}" for i, w in enumerate(self.weights)
        )
        inputs = "\n".join(
            f"# x{i}: {x.shape}, {f'below {x.limit}' if x.limit else 'float'}"
            for i, x in enumerate(self.inputs)
        )
        return "\n".join(filter(None, (weights, inputs, self.source)))

    def function(self) -> Callable[..., Any]:
        """The program itself: it takes the weights, then the inputs."""
        namespace = dict(NAMESPACE)
        exec(compile(self.source, "<program>", "exec"), namespace)
        return namespace["program"]

    def arguments(self, seed: int = 0) -> tuple[list[LoraWeight], list[jax.Array]]:
        """Weights with factors drawn at random, b too, and inputs; in float64."""
        random = np.random.default_rng(seed)
        weights = [_weight(random, f"w{i}", weight) for i, weight in enumerate(self.weights)]
        inputs = [
            _array(random.integers(0, x.limit, x.shape), np.int32)
            if x.limit
            else _array(random.normal(size=x.shape))
            for x in self.inputs
        ]
        return weights, inputs


def _array(x: Any, dtype: Any = np.float64) -> jax.Array:
    return jax.device_put(np.asarray(x, dtype))


def _weight(random: Any, path: str, spec: Weight) -> LoraWeight:
    batch, inner, outer = (
        tuple(n for n, k in zip(spec.shape, spec.kinds, strict=True) if k == kind)
        for kind in ("batch", "in", "out")
    )
    return LoraWeight(
        _array(0.7 * random.normal(size=spec.shape)),
        _array(random.normal(size=(*batch, *inner, spec.rank)) / math.sqrt(math.prod(inner))),
        _array(0.6 * random.normal(size=(*batch, spec.rank, *outer))),
        _array(random.uniform(0.4, 1.2, size=batch), np.float32),
        spec.kinds,  # type: ignore[arg-type]
        path,
    )


class Value(NamedTuple):
    """A variable of a program; `kinds` is None where it is not linear in a weight."""

    name: str
    shape: Shape
    kinds: Kinds | None = None

    @property
    def axes(self) -> Kinds:
        """The kinds, none for data."""
        return self.kinds or ()


@dataclasses.dataclass
class Scope:
    """A function being written.

    Attributes:
        values: What it can see.
        own: What it was given or has made itself.
        indent: How far its lines are indented.
        depth: How many functions it is nested in.
        closed: Whether it may see its arguments only.
        mapped: Whether it is under vmap.
    """

    values: list[Value]
    own: list[Value]
    indent: int = 1
    depth: int = 0
    closed: bool = False
    mapped: bool = False


class Writer:
    """What is common to the functions of a program while it is written."""

    def __init__(self, below: Below):
        self.below = below
        self.lines: list[str] = []
        self.weights: list[Weight] = []
        self.inputs: list[Input] = []
        self.loose: set[str] = set()  # values that nothing has used
        self.names = itertools.count()
        self.drawn: list[str] = []
        self.deepest = 0
        # What has no low-rank form at all is kept to a few programs.
        self.wild = self.chance(6)

    # Choices

    def chance(self, percent: int) -> bool:
        return self.below(100) >= 100 - percent

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def between(self, low: int, high: int) -> int:
        return low + self.below(high - low + 1)

    def shuffled(self, items: Iterable[T]) -> list[T]:
        rest, out = list(items), []
        while rest:
            out.append(rest.pop(self.below(len(rest))))
        return out

    def some(self, items: Sequence[T], percent: int = 50) -> list[T]:
        return [item for item in items if self.chance(percent)]

    # Names and lines

    def name(self, letter: str = "v") -> str:
        return f"{letter}{next(self.names)}"

    def line(self, scope: Scope, text: str) -> None:
        self.lines.append("    " * scope.indent + text)

    def new(self, scope: Scope, name: str, shape: Shape, kinds: Kinds | None = None) -> Value:
        if kinds is not None and not {"in", "out"} <= set(kinds):
            kinds = None
        value = Value(name, shape, kinds)
        scope.values.append(value)
        scope.own.append(value)
        self.loose.add(name)
        return value

    def let(self, scope: Scope, expression: str, shape: Sequence[int], kinds: Any = None) -> Value:
        name = self.name()
        self.line(scope, f"{name} = {expression}")
        return self.new(scope, name, tuple(shape), None if kinds is None else tuple(kinds))

    def use(self, value: Value) -> str:
        self.loose.discard(value.name)
        return value.name

    def input(self, shape: Shape, limit: int = 0) -> str:
        self.inputs.append(Input(shape, limit))
        return f"x{len(self.inputs) - 1}"

    # What a step works on

    def weight(
        self, scope: Scope, suits: Callable[[Value], bool] = lambda value: True, loose: int = 60
    ) -> Value | None:
        """A weight, or what is still linear in one; rather one that nothing has used yet."""
        found = [v for v in scope.values if v.kinds is not None and suits(v)][::-1]
        unused = [v for v in found if v.name in self.loose]
        if unused and self.chance(loose):
            return self.pick(unused)
        return self.pick(found) if found else None

    def array(self, scope: Scope) -> Value | None:
        """Data that depend on no weight linearly."""
        found = [v for v in scope.values if v.kinds is None][::-1]
        unused = [v for v in found if v.name in self.loose]
        if unused and self.chance(70):
            return self.pick(unused)
        return self.pick(found) if found else None

    def data(self, scope: Scope, shape: Sequence[int]) -> str:
        """An expression for data of a shape: a value of that shape, one made to fit, or an input."""
        shape = tuple(shape)
        same = [v for v in scope.values if v.kinds is None and v.shape == shape][::-1]
        if same and self.chance(60):
            return self.use(self.pick(same))
        other = self.array(scope)
        if other is not None and (scope.closed or self.chance(45)):
            return self.fit(other, shape)
        if scope.closed or self.chance(3):
            return f"lax.full({shape}, 0.75)"
        return self.input(shape)

    def fit(self, value: Value, shape: Shape) -> str:
        name = self.use(value)
        if value.shape == shape:
            return name
        if not shape:
            return f"jnp.mean({name})"
        return f"jnp.resize({name}, {shape})" if value.shape else f"jnp.broadcast_to({name}, {shape})"

    def mixed(self, scope: Scope, shape: Shape) -> str:
        """All of a function's unused data in one expression."""
        loose = [v for v in scope.own if v.kinds is None and v.name in self.loose]
        terms = [self.fit(v, shape) for v in loose] or [self.data(scope, shape)]
        return f"jnp.tanh({' + '.join(terms)})"


def settle(writer: Writer, scope: Scope, keep: Sequence[Value] = ()) -> None:
    """Contract with data what is linear in a weight and unused, so that data alone remain."""
    for value in list(scope.own):
        if value.kinds is not None and value.name in writer.loose and value not in keep:
            contraction(writer, scope, value)


# Products with data


def contraction(w: Writer, scope: Scope, value: Value | None = None) -> bool:
    """dot_general in any form, the weight on either side."""
    value = value or w.weight(scope)
    if value is None or value.kinds is None:
        return False
    axes = range(len(value.shape))
    summable = [i for i in axes if value.kinds[i] in ("in", "out")]
    first = w.pick(summable)
    summed = w.shuffled([i for i in axes if i == first or w.chance(40)])
    batch = w.shuffled([i for i in axes if i not in summed and w.chance(30)])
    free_size = math.prod(n for i, n in enumerate(value.shape) if i not in summed)
    free = [w.between(1, 3) for _ in range(w.below(3))]
    while free and free_size * math.prod(free) > LARGEST:
        free.pop()
    roles = w.shuffled([*(("w", i) for i in (*summed, *batch)), *(("x", j) for j in range(len(free)))])
    x_shape = tuple(value.shape[i] if side == "w" else free[i] for side, i in roles)
    x_sum, x_batch = ([roles.index(("w", i)) for i in group] for group in (summed, batch))
    x_free = [n for (side, _), n in zip(roles, x_shape, strict=True) if side == "x"]
    w_free = [n for i, n in enumerate(value.shape) if i not in summed and i not in batch]
    batch_sizes = [value.shape[i] for i in batch]
    x = w.data(scope, x_shape)
    if w.chance(50):
        dims = ((tuple(x_sum), tuple(summed)), (tuple(x_batch), tuple(batch)))
        product, shape = f"{x}, {w.use(value)}", (*batch_sizes, *x_free, *w_free)
    else:
        dims = ((tuple(summed), tuple(x_sum)), (tuple(batch), tuple(x_batch)))
        product, shape = f"{w.use(value)}, {x}", (*batch_sizes, *w_free, *x_free)
    count = math.prod(value.shape[i] for i in summed)
    bounded(w, scope, f"lax.dot_general({product}, {dims})", shape, count)
    return True


def bounded(w: Writer, scope: Scope, expression: str, shape: Sequence[int], count: int) -> None:
    """The sum of `count` products, brought to the size of one."""
    factor = f"{1 / math.sqrt(2 * max(count, 1)):.3f}"
    form = w.below(4)
    if form == 0:
        w.let(scope, f"jnp.tanh({expression})" if count < 5 else f"jnp.tanh({factor} * {expression})", shape)
    elif form == 1:
        w.let(scope, f"{expression} * {factor}", shape)
    elif form == 2:
        w.let(scope, f"jnp.sin({factor} * {expression})", shape)
    else:
        w.let(scope, f"jax.nn.silu({expression} / {max(count, 2)}.0)", shape)


def einsum(w: Writer, scope: Scope) -> bool:
    """An einsum of a weight with one or two arrays, in any order of operands."""
    value = w.weight(scope)
    if value is None or value.kinds is None:
        return False
    letters = string.ascii_lowercase[: len(value.shape)]
    size = dict(zip(letters, value.shape, strict=True)) | {"x": w.between(1, 3), "y": w.between(1, 2)}
    first = w.pick([i for i, kind in enumerate(value.kinds) if kind in ("in", "out")])
    shared = [c for i, c in enumerate(letters) if i == first or w.chance(40)]
    gone = {c for c in shared if c == letters[first] or w.chance(60)}
    terms = ["".join(w.shuffled([*shared, *w.some("xy", 40)]))]
    # A third operand may be multiplied into the weight first; along in and out that has no low-rank form.
    if w.chance(10):
        terms.append("".join(w.shuffled([*w.some(terms[0], 50), *w.some("x", 40)])))
    out = w.shuffled([c for c in size if c in letters + "".join(terms) and c not in gone])
    if math.prod(size[c] for c in out) > LARGEST:
        return False
    operands = [(term, w.data(scope, tuple(size[c] for c in term))) for term in terms]
    operands.insert(w.below(len(operands) + 1), (letters, w.use(value)))
    spec = ",".join(term for term, _ in operands) + "->" + "".join(out)
    arrays = ", ".join(array for _, array in operands)
    count = math.prod(size[c] for c in size if c not in out)
    bounded(w, scope, f"jnp.einsum({spec!r}, {arrays})", [size[c] for c in out], count)
    return True


def matmul(w: Writer, scope: Scope) -> bool:
    """`x @ w` or `w @ x`, with batch axes where the weight has them."""
    value = w.weight(scope, lambda v: len(v.shape) >= 2 and set(v.axes[-2:]) <= {"in", "out"})
    if value is None or value.kinds is None:
        return False
    *batch, rows, columns = value.shape
    n = w.between(1, 3)
    # An array of two axes meets every matrix of the weight; a vector too.
    lead = w.pick([batch, []])
    if math.prod(value.shape) * n > LARGEST:
        return False
    if w.chance(50):
        shape = (*lead, n, rows)
        bounded(w, scope, f"{w.data(scope, shape)} @ {w.use(value)}", (*batch, n, columns), rows)
    elif w.chance(30):
        bounded(w, scope, f"{w.use(value)} @ {w.data(scope, (columns,))}", (*batch, rows), columns)
    else:
        shape = (*lead, columns, n)
        bounded(w, scope, f"{w.use(value)} @ {w.data(scope, shape)}", (*batch, rows, n), columns)
    return True


def convolution(w: Writer, scope: Scope) -> bool:
    """A convolution over one axis, the weight's three axes in any order."""
    value = w.weight(scope, lambda v: len(v.shape) == 3 and "batch" not in v.axes)
    if value is None or value.kinds is None:
        return False
    # The features that go in must be an in axis, or the transpose of an out axis; so must those that go out.
    kinds = value.kinds
    orders = [
        order
        for order in itertools.permutations(range(3))
        if kinds[order[1]] == "in" and kinds[order[2]] == "out"
    ]
    if not orders:
        return False
    order = w.pick(orders)
    spec = "".join("HIO"[order.index(i)] for i in range(3))
    window, entering, leaving = (value.shape[i] for i in order)
    length, stride, dilation = window + w.between(0, 3), w.between(1, 2), w.between(1, 2)
    padding = (w.below(3), w.between(1, 2))
    x = w.data(scope, (2, length, entering))
    out = (length + sum(padding) - (window - 1) * dilation - 1) // stride + 1
    if out < 1:
        return False
    options = (
        f"({stride},), [{padding}], rhs_dilation=({dilation},), dimension_numbers=('NHC', {spec!r}, 'NHC')"
    )
    expression = f"lax.conv_general_dilated({x}, {w.use(value)}, {options})"
    bounded(w, scope, expression, (2, out, leaving), window * entering)
    return True


def ragged(w: Writer, scope: Scope) -> bool:
    """ragged_dot: rows in groups, each with a weight of its own."""
    if scope.mapped:  # jax itself maps no ragged_dot but over its first axis
        return False
    value = w.weight(scope, lambda v: v.axes in (("batch", "in", "out"), ("batch", "out", "in")))
    if value is None or value.kinds is None:
        return False
    groups, rows, columns = value.shape
    sizes = [w.below(3) for _ in range(groups)]
    x = w.data(scope, (sum(sizes) + 1, rows))
    expression = f"lax.ragged_dot({x}, {w.use(value)}, jnp.array({sizes}, jnp.int32))"
    bounded(w, scope, expression, (sum(sizes) + 1, columns), rows)
    return True


def rows(w: Writer, scope: Scope) -> bool:
    """Look-ups: take, indexing by an array, along any axis."""
    value = w.weight(scope)
    if value is None or value.kinds is None:
        return False
    axis = w.below(len(value.shape))
    n, kind = value.shape[axis], value.kinds[axis]
    index_shape = tuple(w.between(1, 3) for _ in range(w.between(0, 2)))
    rest = (*value.shape[:axis], *value.shape[axis + 1 :])
    if scope.closed or math.prod(index_shape) * math.prod(rest) > LARGEST:
        return False
    ids = w.input(index_shape, n)
    shape = (*value.shape[:axis], *index_shape, *value.shape[axis + 1 :])
    kinds = (*value.kinds[:axis], *(kind for _ in index_shape), *value.kinds[axis + 1 :])
    if not {"in", "out"} <= {k for i, k in enumerate(value.kinds) if i != axis}:
        kinds = None
    name = w.use(value)
    form = w.below(4)
    if form == 0:
        expression = f"jnp.take({name}, {ids}, axis={axis})"
    elif form == 1:
        expression = f"{name}[{':, ' * axis}{ids}]"
    elif form == 2:
        expression = f"jnp.take({name}, {ids}, axis={axis}, mode='clip')"
    else:
        expression = f"{name}.at[{':, ' * axis}{ids}].get(mode='promise_in_bounds')"
    w.let(scope, expression, shape, kinds)
    return True


# Moving, cutting, reshaping


def transpose(w: Writer, scope: Scope) -> bool:
    value = w.weight(scope)
    if value is None or value.kinds is None:
        return False
    n = len(value.shape)
    if w.chance(30):
        i, j = w.below(n), w.below(n)
        order = list(range(n))
        order[i], order[j] = order[j], order[i]
        expression = f"jnp.swapaxes({w.use(value)}, {i}, {j})"
    else:
        order = w.shuffled(range(n))
        expression = f"jnp.transpose({w.use(value)}, {tuple(order)})"
    w.let(scope, expression, [value.shape[i] for i in order], [value.kinds[i] for i in order])
    return True


def reshape(w: Writer, scope: Scope) -> bool:
    """Split an axis, or merge neighbours of one kind."""
    value = w.weight(scope)
    if value is None or value.kinds is None:
        return False
    groups = [([n], kind) for n, kind in zip(value.shape, value.kinds, strict=True)]
    for _ in range(w.between(1, 2)):
        i = w.below(len(groups))
        sizes, kind = groups[i]
        if i + 1 < len(groups) and (
            groups[i + 1][1] == kind
            or 1 in (math.prod(sizes), math.prod(groups[i + 1][0]))
            or (w.wild and w.chance(30))
        ):
            merged = math.prod(sizes) * math.prod(groups[i + 1][0])
            larger = groups[i + 1][1] if math.prod(sizes) == 1 else kind
            groups[i : i + 2] = [([merged], larger)]
        elif len(groups) < 6:
            n = math.prod(sizes)
            first = w.pick([d for d in range(1, n + 1) if n % d == 0])
            groups[i] = ([first, n // first], kind)
    shape = [n for sizes, _ in groups for n in sizes]
    kinds = ["unit" if n == 1 else kind for sizes, kind in groups for n in sizes]
    form = w.pick(["{}.reshape{}", "jnp.reshape({}, {})"])
    w.let(scope, form.format(w.use(value), tuple(shape)), shape, kinds)
    return True


def cut(w: Writer, scope: Scope) -> bool:
    """A slice, with a stride or backwards, of one or more axes."""
    value = w.weight(scope)
    if value is None or value.kinds is None:
        return False
    parts, shape = [], []
    for n in value.shape:
        if w.chance(50) or n == 1:
            parts.append(":")
            shape.append(n)
            continue
        start = w.below(n)
        stop, step = w.between(start + 1, n), w.pick([1, 1, 2])
        backwards = w.chance(15)
        parts.append("::-1" if backwards else f"{start}:{stop}:{step}")
        shape.append(n if backwards else len(range(start, stop, step)))
    w.let(scope, f"{w.use(value)}[{', '.join(parts)}]", shape, value.kinds)
    return True


def rev(w: Writer, scope: Scope) -> bool:
    value = w.weight(scope)
    if value is None or value.kinds is None:
        return False
    w.let(
        scope, f"lax.rev({w.use(value)}, {tuple(w.some(range(len(value.shape))))})", value.shape, value.kinds
    )
    return True


def units(w: Writer, scope: Scope) -> bool:
    """Axes of size one come and go."""
    value = w.weight(scope)
    if value is None or value.kinds is None:
        return False
    ones = [i for i, n in enumerate(value.shape) if n == 1]
    if ones and w.chance(60):
        gone = w.some(ones, 70)
        kept = [i for i in range(len(value.shape)) if i not in gone]
        expression = f"lax.squeeze({w.use(value)}, {tuple(gone)})"
        w.let(scope, expression, [value.shape[i] for i in kept], [value.kinds[i] for i in kept])
        return True
    if len(value.shape) > 5:
        return False
    place = w.below(len(value.shape) + 1)
    shape = (*value.shape[:place], 1, *value.shape[place:])
    kinds = (*value.kinds[:place], "unit", *value.kinds[place:])
    w.let(scope, f"jnp.expand_dims({w.use(value)}, {place})", shape, kinds)
    return True


def broadcast(w: Writer, scope: Scope) -> bool:
    """The weight repeated along a new axis, or along one of size one."""
    value = w.weight(scope, lambda v: len(v.shape) < 5 and 2 * math.prod(v.shape) <= LARGEST)
    if value is None or value.kinds is None:
        return False
    n, ones = w.between(2, 3), [i for i, size in enumerate(value.shape) if size == 1]
    if math.prod(value.shape) * n > LARGEST:
        return False
    if ones and w.chance(40):
        place = w.pick(ones)
        shape = (*value.shape[:place], n, *value.shape[place + 1 :])
        kinds = (*value.kinds[:place], "batch", *value.kinds[place + 1 :])
        w.let(scope, f"jnp.broadcast_to({w.use(value)}, {shape})", shape, kinds)
        return True
    place = w.below(len(value.shape) + 1)
    shape = (*value.shape[:place], n, *value.shape[place:])
    kinds = (*value.kinds[:place], "batch", *value.kinds[place:])
    dims = tuple(i for i in range(len(shape)) if i != place)
    w.let(scope, f"lax.broadcast_in_dim({w.use(value)}, {shape}, {dims})", shape, kinds)
    return True


def split(w: Writer, scope: Scope) -> bool:
    value = w.weight(scope, lambda v: max(v.shape) > 1)
    if value is None or value.kinds is None:
        return False
    axis = w.pick([i for i, n in enumerate(value.shape) if n > 1])
    n = value.shape[axis]
    at = w.between(1, n - 1)
    names = [w.name(), w.name()]
    w.line(scope, f"{', '.join(names)} = jnp.split({w.use(value)}, [{at}], axis={axis})")
    for name, size in zip(names, (at, n - at), strict=True):
        w.new(scope, name, (*value.shape[:axis], size, *value.shape[axis + 1 :]), value.kinds)
    return True


def dynamic(w: Writer, scope: Scope) -> bool:
    """A slice or an index known only at run time."""
    value = w.weight(scope)
    if value is None or value.kinds is None or scope.closed:
        return False
    axis = w.below(len(value.shape))
    n = value.shape[axis]
    place = w.input((), n + 1)  # out of bounds at times: it is clamped
    size = w.between(1, n)
    if w.chance(40):
        expression = f"lax.dynamic_index_in_dim({w.use(value)}, {place}, {axis}, keepdims=False)"
        kept = [i for i in range(len(value.shape)) if i != axis]
        w.let(scope, expression, [value.shape[i] for i in kept], [value.kinds[i] for i in kept])
    else:
        expression = f"lax.dynamic_slice_in_dim({w.use(value)}, {place}, {size}, {axis})"
        w.let(scope, expression, (*value.shape[:axis], size, *value.shape[axis + 1 :]), value.kinds)
    return True


def index(w: Writer, scope: Scope) -> bool:
    """`layers[i]`: one entry of a batch axis, or of any other."""
    value = w.weight(scope, lambda v: len(v.shape) > 2)
    if value is None or value.kinds is None:
        return False
    stacked = [i for i, kind in enumerate(value.kinds) if kind in ("batch", "unit")]
    axis = w.pick(stacked) if stacked and w.chance(70) else w.below(len(value.shape))
    n = value.shape[axis]
    i = str(w.between(-n, n - 1)) if scope.closed or w.chance(50) else w.input((), n)
    kept = [k for k in range(len(value.shape)) if k != axis]
    expression = f"{w.use(value)}[{':, ' * axis}{i}]"
    w.let(scope, expression, [value.shape[k] for k in kept], [value.kinds[k] for k in kept])
    return True


def passed(w: Writer, scope: Scope) -> bool:
    """What changes no entry."""
    value = w.weight(scope)
    if value is None or value.kinds is None:
        return False
    form = w.below(6)
    name = w.use(value)
    if form == 0:
        w.let(scope, f"jnp.copy({name})", value.shape, value.kinds)
    elif form == 1:
        w.let(scope, f"lax.reduce_precision({name}, 11, 52)", value.shape, value.kinds)
    elif form == 2:
        w.let(scope, f"checkpoint_name({name}, 'kernel')", value.shape, value.kinds)
    elif form == 3:
        w.let(scope, f"lax.stop_gradient({name})", value.shape, value.kinds)
    elif form == 4:
        w.let(scope, f"{name}.astype(jnp.float64)", value.shape, value.kinds)
    else:
        names, x = (w.name(), w.name()), w.data(scope, (2,))
        w.line(scope, f"{names[0]}, {names[1]} = lax.optimization_barrier(({name}, {x}))")
        w.new(scope, names[0], value.shape, value.kinds)
        w.new(scope, names[1], (2,))
    return True


# Linear algebra


def alike(w: Writer, scope: Scope, value: Value) -> Value | None:
    """Another weight of a value's shape and kinds."""
    found = [v for v in scope.values if v.shape == value.shape and v.kinds == value.kinds and v != value]
    return w.pick(found) if found else None


def total(w: Writer, scope: Scope) -> bool:
    """The sum or difference of two weights, or of a weight and data."""
    kinds = [(v.shape, v.kinds) for v in scope.values]
    value = w.weight(scope, lambda v: kinds.count((v.shape, v.kinds)) > 1, 30) or w.weight(scope)
    if value is None:
        return False
    sign, name = w.pick("+-"), w.use(value)
    if w.chance(10):
        terms = w.shuffled([name, w.data(scope, value.shape)])
    else:
        other = alike(w, scope, value)
        terms = [name, w.use(other or value)]
    w.let(scope, f"({terms[0]} {sign} {terms[1]}) * 0.75", value.shape, value.kinds)
    return True


def concatenate(w: Writer, scope: Scope) -> bool:
    """Two weights joined along an axis, or stacked, or a weight and data joined."""
    value = w.weight(scope, lambda v: 2 * math.prod(v.shape) <= LARGEST and len(v.shape) < 5)
    if value is None or value.kinds is None:
        return False
    form, name = w.below(10), w.use(value)
    other = alike(w, scope, value) or value
    axis = w.below(len(value.shape))
    if form < 2:
        shape = (*value.shape[:axis], 2, *value.shape[axis:])
        kinds = (*value.kinds[:axis], "batch", *value.kinds[axis:])
        w.let(scope, f"jnp.stack([{name}, {w.use(other)}], {axis})", shape, kinds)
        return True
    n = value.shape[axis]
    if form < 9:
        second, size = w.use(other), n
        if value.kinds[axis] == "unit":
            return False
    else:
        size = w.between(1, 2)
        second = w.data(scope, (*value.shape[:axis], size, *value.shape[axis + 1 :]))
    shape = (*value.shape[:axis], n + size, *value.shape[axis + 1 :])
    w.let(scope, f"jnp.concatenate([{name}, {second}], {axis})", shape, value.kinds)
    return True


def scale(w: Writer, scope: Scope) -> bool:
    """A sign, a scalar, or a vector along one axis."""
    value = w.weight(scope)
    if value is None:
        return False
    form, name = w.below(7), w.use(value)
    axis = w.below(len(value.shape))
    shape = tuple(n if i == axis else 1 for i, n in enumerate(value.shape))
    if form == 0:
        expression = f"-{name}"
    elif form == 1:
        expression = w.pick(["{} * 0.8", "1.2 * {}", "{} / 1.6"]).format(name)
    elif form == 2:
        expression = f"{name} * {w.data(scope, ())}"
    elif form == 3:
        expression = f"{name} / (2.0 + jnp.cos({w.data(scope, ())}))"
    elif form == 4:
        vector = w.data(scope, (value.shape[axis],))
        expression = f"{name} * lax.broadcast_in_dim({vector}, {value.shape}, ({axis},))"
    elif form == 5:
        expression = f"{w.data(scope, shape)} * {name}"
    else:
        expression = f"{name} / (2.0 + jnp.sin({w.data(scope, shape)}))"
    w.let(scope, expression, value.shape, value.kinds)
    return True


def reduce(w: Writer, scope: Scope) -> bool:
    """The sum or the mean over an axis."""
    value = w.weight(scope, lambda v: len(v.shape) > 2)
    if value is None or value.kinds is None:
        return False
    kinds = value.kinds
    axis = w.pick([i for i, k in enumerate(kinds) if k != "batch" or kinds.count(k) == 1])
    kept = [i for i in range(len(kinds)) if i != axis]
    expression = f"{w.pick(['jnp.sum', 'jnp.mean'])}({w.use(value)}, axis={axis}) * 0.6"
    w.let(scope, expression, [value.shape[i] for i in kept], [kinds[i] for i in kept])
    return True


def product(w: Writer, scope: Scope) -> bool:
    """The product of two weights."""
    left = w.weight(scope, lambda v: "batch" not in v.axes)
    if left is None or left.kinds is None:
        return False
    right = w.weight(scope, lambda v: "batch" not in v.axes and bool(set(v.shape) & set(left.shape)))
    if right is None or right.kinds is None:
        return False
    pairs = [
        (i, j)
        for i, n in enumerate(left.shape)
        for j, m in enumerate(right.shape)
        if n == m
        and left.kinds[i] in ("in", "out")
        and right.kinds[j] in ("in", "out")
        and left.kinds[i] != right.kinds[j]
        and left.kinds.count(left.kinds[i]) == 1
        and right.kinds.count(right.kinds[j]) == 1
    ]
    if not pairs:
        return False
    i, j = w.pick(pairs)
    shape = [n for k, n in enumerate(left.shape) if k != i] + [n for k, n in enumerate(right.shape) if k != j]
    kinds = [n for k, n in enumerate(left.kinds) if k != i] + [n for k, n in enumerate(right.kinds) if k != j]
    if math.prod(shape) > LARGEST or len(shape) > 6:
        return False
    factor = f"{0.8 / math.sqrt(left.shape[i]):.3f}"
    expression = f"jnp.tensordot({w.use(left)}, {w.use(right)}, ({(i,)}, {(j,)})) * {factor}"
    w.let(scope, expression, shape, kinds)
    return True


def mixture(w: Writer, scope: Scope) -> bool:
    """The product with data over batch axes or none: a weight for each of the data's own axes."""
    value = w.weight(scope, lambda v: len(v.shape) < 6)
    if value is None or value.kinds is None:
        return False
    kinds, shape = value.kinds, value.shape
    apart = ("batch", "unit", w.pick(("in", "out")))
    summed = [i for i, kind in enumerate(kinds) if kind in ("batch", "unit") and w.chance(60)]
    batch = w.shuffled(
        [i for i, kind in enumerate(kinds) if i not in summed and kind in apart and w.chance(40)]
    )
    rest = [i for i in range(len(shape)) if i not in summed and i not in batch]
    free = [w.between(1, 3)] if w.chance(50) else []
    if math.prod(shape) * math.prod(free) > LARGEST:
        return False
    roles = w.shuffled([*(("w", i) for i in (*summed, *batch)), *(("x", n) for n in free)])
    x = w.data(scope, tuple(shape[i] if side == "w" else i for side, i in roles))
    x_sum, x_batch = (tuple(roles.index(("w", i)) for i in group) for group in (summed, batch))
    parts = [([shape[i] for i in rest], [kinds[i] for i in rest]), (free, ["batch"] * len(free))]
    operands, dims = [w.use(value), x], [(tuple(summed), tuple(batch)), (x_sum, x_batch)]
    if w.chance(50):
        parts, operands, dims = parts[::-1], operands[::-1], dims[::-1]
    numbers = tuple(zip(*dims, strict=True))
    factor = f"{1 / math.sqrt(max(1, math.prod(shape[i] for i in summed))):.3f}"
    w.let(
        scope,
        f"lax.dot_general({', '.join(operands)}, {numbers}) * {factor}",
        [*(shape[i] for i in batch), *(n for sizes, _ in parts for n in sizes)],
        [*(kinds[i] for i in batch), *(kind for _, names in parts for kind in names)],
    )
    return True


def pad(w: Writer, scope: Scope) -> bool:
    value = w.weight(scope)
    if value is None:
        return False
    widths, shape = [], []
    for n in value.shape:
        low, high, inner = (w.below(2), w.below(2), w.below(2)) if w.chance(40) else (0, 0, 0)
        widths.append((low, high, inner))
        shape.append(low + n + high + inner * (n - 1))
    if math.prod(shape) > LARGEST:
        return False
    w.let(scope, f"lax.pad({w.use(value)}, jnp.float64(0), {widths})", shape, value.kinds)
    return True


def refusal(w: Writer, scope: Scope) -> bool:
    """What no low-rank form exists for; kept to the programs that are wild."""
    value = w.weight(scope)
    if value is None:
        return False
    name = w.use(value)
    forms = [
        f"{name} * {w.data(scope, value.shape)}",
        f"jnp.tanh({name})",
        f"{name} * {name}",
        f"jnp.sort({name}, axis=-1)",
        f"jnp.where({name} > 0, {name}, 0.5)",
        f"{name} / jnp.sqrt(1.0 + jnp.sum({name} ** 2))",
        f"{name}.at[0].set(0.25)",
        f"jnp.cumsum({name}, axis=0)",
        f"{name} + 1.0",
    ]
    w.let(scope, w.pick(forms), value.shape)
    return True


# Data


def elementwise(w: Writer, scope: Scope) -> bool:
    value = w.array(scope)
    if value is None:
        return False
    x = w.use(value)
    y = functools.partial(w.data, scope, value.shape)
    form = w.below(8)
    if form == 0:
        expression = f"jnp.tanh({x})"
    elif form == 1:
        expression = f"jnp.sin({x}) * {y()}"
    elif form == 2:
        expression = f"({x} + {y()}) * 0.5"
    elif form == 3:
        expression = f"{x} / (1.5 + jnp.cos({y()}))"
    elif form == 4:
        expression = f"{x} / jnp.sqrt(1.0 + jnp.mean({x} ** 2))"
    elif form == 5:
        expression = f"jax.nn.gelu({x})"
    elif form == 6:
        expression = f"jax.nn.softmax({x} * {y()}, axis={None if not value.shape else -1})"
    else:
        expression = f"jax.nn.softplus({x} - {y()})"
    w.let(scope, expression, value.shape)
    return True


def rearranged(w: Writer, scope: Scope) -> bool:
    value = w.array(scope)
    if value is None or not value.shape:
        return False
    x, shape = w.use(value), value.shape
    axis, form = w.below(len(shape)), w.below(4)
    rest = (*shape[:axis], *shape[axis + 1 :])
    if form == 0:
        w.let(scope, f"jnp.moveaxis({x}, {axis}, 0)", (shape[axis], *rest))
    elif form == 1:
        w.let(scope, f"jnp.sum({x}, axis={axis}) * 0.5", rest)
    elif form == 2:
        w.let(scope, f"{x}.reshape(-1)", (math.prod(shape),))
    else:
        w.let(scope, f"jax.nn.logsumexp({x}, axis={axis})", rest)
    return True


# Control flow


def child(w: Writer, scope: Scope, arguments: Sequence[Value], closed: bool = False) -> Scope:
    w.deepest = max(w.deepest, scope.depth + 1)
    closed = closed or scope.closed
    seen = [] if closed else list(scope.values)
    w.loose.update(v.name for v in arguments)
    inner = Scope([*seen, *arguments], list(arguments), scope.indent + 1, scope.depth + 1, closed)
    inner.mapped = scope.mapped
    return inner


def handed(w: Writer, scope: Scope, budget: int) -> tuple[list[str], list[Value]]:
    """Arguments for a function to come: expressions, and the values they are inside of it."""
    outer, inner = [], []
    for _ in range(w.between(1, 2)):
        value = w.weight(scope)
        if value is not None and value.name not in outer:
            outer.append(w.use(value))
            inner.append(Value(w.name(), value.shape, value.kinds))
    shape = tuple(w.between(1, 3) for _ in range(w.between(1, 2)))
    x = w.array(scope)
    if x is not None:
        outer.append(w.use(x))
        inner.append(Value(w.name(), x.shape))
    else:
        outer.append(w.data(scope, shape))
        inner.append(Value(w.name(), shape))
    return outer, inner


def results(w: Writer, inner: Scope, weights: bool) -> list[Value]:
    """What a function returns: its unused data, and one weight at times."""
    kept = [v for v in inner.own if v.kinds is not None and v.name in w.loose] if weights else []
    kept = kept[-1:] if w.chance(35) else []
    settle(w, inner, kept)
    data = [v for v in inner.own if v.kinds is None and v.name in w.loose]
    if not data:
        data = [w.let(inner, w.mixed(inner, (2,)), (2,))]
    out = [*kept, *data[-3:]]
    for value in out:
        w.use(value)
    return out


def called(w: Writer, scope: Scope, call: str, out: Sequence[Value]) -> None:
    """A call's results under names of their own."""
    names = [w.name() for _ in out]
    w.line(scope, f"{', '.join(names)}, = {call}")
    for name, value in zip(names, out, strict=True):
        w.new(scope, name, value.shape, value.kinds)


def function(w: Writer, scope: Scope, budget: int) -> bool:
    """jit, or remat with any policy; a jitted function is called twice at times."""
    outer, arguments = handed(w, scope, budget)
    name = w.name("f")
    policies = ["None", "dots_saveable", "nothing_saveable", "everything_saveable"]
    policies += ["dots_with_no_batch_dims_saveable", "save_only_these_names('kernel')"]
    if w.chance(50):
        policy = w.pick(policies)
        policy = policy if policy == "None" else f"jax.checkpoint_policies.{policy}"
        w.line(scope, f"@functools.partial(jax.checkpoint, policy={policy}, prevent_cse={w.chance(70)})")
    else:
        w.line(scope, "@jax.jit")
    w.line(scope, f"def {name}({', '.join(v.name for v in arguments)}):")
    inner = child(w, scope, arguments)
    steps(w, inner, budget)
    out = results(w, inner, weights=True)
    w.line(inner, f"return ({', '.join(v.name for v in out)},)")
    called(w, scope, f"{name}({', '.join(outer)})", out)
    if w.chance(20):
        again = []
        for value, argument in zip(arguments, outer, strict=True):
            other = alike(w, scope, value) if value.kinds is not None else None
            again.append(w.use(other) if other else argument)
        called(w, scope, f"{name}({', '.join(again)})", out)
    return True


def scan(w: Writer, scope: Scope, budget: int) -> bool:
    """A scan over a batch axis of a weight, or with a weight as constant or carry."""
    stacked = w.weight(scope, lambda v: "batch" in v.axes)
    n = w.between(2, 3)
    xs, inner_xs = [], []
    if stacked is not None and stacked.kinds is not None and w.chance(80):
        axis = w.pick([i for i, kind in enumerate(stacked.kinds) if kind == "batch"])
        n = stacked.shape[axis]
        rest = [i for i in range(len(stacked.shape)) if i != axis]
        expression = w.use(stacked)
        xs.append(expression if axis == 0 else f"jnp.moveaxis({expression}, {axis}, 0)")
        shape, kinds = tuple(stacked.shape[i] for i in rest), tuple(stacked.kinds[i] for i in rest)
        inner_xs.append(Value(w.name(), shape, kinds))
    if not xs or w.chance(50):
        shape = tuple(w.between(1, 3) for _ in range(w.between(0, 2)))
        xs.append(w.data(scope, (n, *shape)))
        inner_xs.append(Value(w.name(), shape))
    carry_shape = tuple(w.between(1, 3) for _ in range(w.between(1, 2)))
    carry, inner_carry = [w.data(scope, carry_shape)], [Value(w.name(), carry_shape)]
    constant = w.weight(scope)
    if constant is not None and w.chance(25):
        carry.append(w.use(constant))
        inner_carry.append(Value(w.name(), constant.shape, constant.kinds))
    name, c, x = w.name("f"), w.name(), w.name()
    w.line(scope, f"def {name}({c}, {x}):")
    inner = child(w, scope, [*inner_carry, *inner_xs])
    w.line(inner, f"{', '.join(v.name for v in inner_carry)}, = {c}")
    w.line(inner, f"{', '.join(v.name for v in inner_xs)}, = {x}")
    steps(w, inner, budget)
    carried = inner_carry[1:]
    for value in carried:
        w.use(value)
    kept = [v for v in inner.own if v.kinds is not None and v.name in w.loose and v not in inner_carry]
    kept = kept[-1:] if w.chance(35) else []
    settle(w, inner, kept)
    data = [v for v in inner.own if v.kinds is None and v.name in w.loose][-2:]
    ys = [*kept, *w.some(data, 40)]
    new = w.mixed(inner, carry_shape)
    for value in ys:
        w.use(value)
    form = w.pick(["{}", "{}", "{} * 0.9", "-{}"])
    back = [new, *(form.format(v.name) for v in carried)]
    stacks = "".join(f"{v.name}, " for v in ys)
    w.line(inner, f"return ({', '.join(back)},), ({stacks})")
    options = f"reverse={w.chance(30)}, unroll={w.pick([1, 1, 2])}"
    last, out = w.name(), w.name()
    w.line(
        scope,
        f"{last}, {out} = lax.scan({name}, ({', '.join(carry)},), ({', '.join(xs)},), {options})",
    )
    w.let(scope, f"{last}[0]", carry_shape)
    if carried and w.chance(50):
        w.let(scope, f"{last}[1]", carried[0].shape, carried[0].kinds)
    for i, value in enumerate(ys):
        kinds = None if value.kinds is None else ("batch", *value.kinds)
        w.let(scope, f"{out}[{i}]", (n, *value.shape), kinds)
    return True


def loop(w: Writer, scope: Scope, budget: int) -> bool:
    """A fori_loop: of a length known beforehand, which is a scan, or of one known at run time only.

    There is no reverse mode for the latter, in jax itself, so all that enters is cut from gradients.
    """
    shape = tuple(w.between(1, 3) for _ in range(w.between(1, 2)))
    start = w.data(scope, shape)
    fixed = scope.closed or w.chance(50)
    count = str(w.between(1, 3)) if fixed else w.input((), 4)
    entering, arguments = handed(w, scope, budget)
    inside = [Value(v.name, v.shape, v.kinds) for v in arguments]
    for name, value in zip(entering, inside, strict=True):
        w.line(scope, f"{value.name} = {name if fixed else f'lax.stop_gradient({name})'}")
    name, i, carry = w.name("f"), w.name(), Value(w.name(), shape)
    w.line(scope, f"def {name}({i}, {carry.name}):")
    inner = child(w, scope, [*inside, carry])
    if not fixed:
        inner.values = [v for v in inner.values if v in inner.own]
        start = f"lax.stop_gradient({start})"
    steps(w, inner, budget)
    settle(w, inner)
    w.line(inner, f"return {w.mixed(inner, shape)}")
    w.let(scope, f"lax.fori_loop(0, {count}, {name}, {start})", shape)
    return True


def branches(w: Writer, scope: Scope, budget: int) -> bool:
    """cond and switch, on data; a branch returns a weight only in a wild program."""
    shape = tuple(w.between(1, 3) for _ in range(w.between(1, 2)))
    number = w.between(2, 3)
    outer, arguments = handed(w, scope, budget)
    names = []
    for k in range(number):
        inside = [Value(w.name(), v.shape, v.kinds) for v in arguments]
        names.append(w.name("f"))
        w.line(scope, f"def {names[-1]}({', '.join(v.name for v in inside)}):")
        inner = child(w, scope, inside)
        if k == 0 or w.chance(60):
            steps(w, inner, max(1, budget // number))
        else:
            # An operand need not be used in every branch.
            w.loose.difference_update(v.name for v in inside)
        settle(w, inner)
        w.line(inner, f"return {w.mixed(inner, shape)}")
    operands = ", ".join(outer)
    if scope.closed:
        x = w.data(scope, (2,))
        predicate = f"jnp.cos(jnp.sum({x})) > 0.3"
    else:
        predicate = w.input((), number)
    if number == 2:
        test = predicate if scope.closed else f"{predicate} > 0"
        call = f"lax.cond({test}, {names[0]}, {names[1]}, {operands})"
    else:
        which = f"({predicate}).astype(jnp.int32)" if scope.closed else predicate
        call = f"lax.switch({which}, [{', '.join(names)}], {operands})"
    w.let(scope, call, shape)
    return True


def own_derivative(w: Writer, scope: Scope, budget: int) -> bool:
    """custom_vjp, with a weight inside at times, and custom_jvp; the derivative is scaled, to tell."""
    if w.chance(30):
        return own_derivative_of_data(w, scope)
    outer, arguments = handed(w, scope, budget)
    name = w.name("f")
    w.line(scope, f"def {name}({', '.join(v.name for v in arguments)}):")
    inner = child(w, scope, arguments, closed=True)
    steps(w, inner, budget)
    out = results(w, inner, weights=False)
    w.line(inner, f"return ({', '.join(v.name for v in out)},)")
    custom, forward, backward = w.name("f"), w.name("f"), w.name("f")
    w.line(scope, f"{custom} = jax.custom_vjp({name})")
    if w.chance(50):
        w.line(scope, f"def {forward}(*args):")
        w.line(inner, f"return {name}(*args), args")
        w.line(scope, f"def {backward}(args, ct):")
        w.line(inner, f"return jax.vjp({name}, *args)[1](jax.tree.map(lambda t: 1.5 * t, ct))")
    else:
        w.line(scope, f"def {forward}(*args):")
        w.line(inner, f"return jax.vjp({name}, *args)")
        w.line(scope, f"def {backward}(pull, ct):")
        w.line(inner, "return jax.tree.map(lambda t: 0.5 * t, pull(ct))")
    w.line(scope, f"{custom}.defvjp({forward}, {backward})")
    called(w, scope, f"{custom}({', '.join(outer)})", out)
    return True


def own_derivative_of_data(w: Writer, scope: Scope) -> bool:
    value = w.array(scope)
    if value is None:
        return False
    name = w.name("f")
    inner = Scope([], [], scope.indent + 1)
    if w.chance(50):
        w.line(scope, "@jax.custom_jvp")
        w.line(scope, f"def {name}(x):")
        w.line(inner, "return jnp.sin(x)")
        w.line(scope, f"{name}.defjvp(lambda p, t: (jnp.sin(p[0]), 1.5 * jnp.cos(p[0]) * t[0]))")
    else:
        w.line(scope, "@jax.custom_vjp")
        w.line(scope, f"def {name}(x):")
        w.line(inner, "return jnp.sin(x)")
        w.line(scope, f"{name}.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (1.5 * jnp.cos(x) * ct,))")
    w.let(scope, f"{name}({w.use(value)})", value.shape)
    return True


def mapped(w: Writer, scope: Scope, budget: int) -> bool:
    """vmap over data, over a batch axis of a weight, or over both."""
    stacked = w.weight(scope, lambda v: "batch" in v.axes)
    n = w.between(2, 3)
    operands, axes, arguments = [], [], []
    if stacked is not None and stacked.kinds is not None and w.chance(50):
        axis = w.pick([i for i, kind in enumerate(stacked.kinds) if kind == "batch"])
        n = stacked.shape[axis]
        rest = [i for i in range(len(stacked.shape)) if i != axis]
        operands.append(w.use(stacked))
        axes.append(axis)
        shape, kinds = tuple(stacked.shape[i] for i in rest), tuple(stacked.kinds[i] for i in rest)
        arguments.append(Value(w.name(), shape, kinds))
    if not operands or w.chance(60):
        shape = tuple(w.between(1, 3) for _ in range(w.between(1, 2)))
        axis = w.below(len(shape) + 1)
        operands.append(w.data(scope, (*shape[:axis], n, *shape[axis:])))
        axes.append(axis)
        arguments.append(Value(w.name(), shape))
    name = w.name("f")
    w.line(scope, f"def {name}({', '.join(v.name for v in arguments)}):")
    inner = child(w, scope, arguments)
    inner.mapped = True
    steps(w, inner, budget)
    out = results(w, inner, weights=False)
    w.line(inner, f"return ({', '.join(v.name for v in out)},)")
    places = [w.below(len(v.shape) + 1) for v in out]
    shapes = [
        Value("", (*v.shape[:place], n, *v.shape[place:])) for v, place in zip(out, places, strict=True)
    ]
    call = f"jax.vmap({name}, {tuple(axes)}, {tuple(places)})({', '.join(operands)})"
    called(w, scope, call, shapes)
    return True


def derivative(w: Writer, scope: Scope, budget: int) -> bool:
    """A gradient taken inside of the program."""
    value = w.array(scope)
    if value is None or scope.closed:
        return False
    name, argument = w.name("f"), Value(w.name(), value.shape)
    w.line(scope, f"def {name}({argument.name}):")
    inner = child(w, scope, [argument])
    steps(w, inner, budget)
    settle(w, inner)
    w.line(inner, f"return {w.mixed(inner, ())}")
    w.let(scope, f"jax.grad({name})({w.use(value)})", value.shape)
    return True


# A program

Step = Callable[[Writer, Scope], bool]
Nesting = Callable[[Writer, Scope, int], bool]
STEPS: dict[Step, int] = {
    contraction: 16,
    einsum: 8,
    matmul: 6,
    convolution: 2,
    ragged: 2,
    rows: 5,
    transpose: 5,
    reshape: 6,
    cut: 4,
    rev: 2,
    units: 3,
    broadcast: 2,
    split: 3,
    dynamic: 4,
    index: 4,
    passed: 4,
    total: 4,
    concatenate: 4,
    scale: 6,
    reduce: 3,
    product: 3,
    mixture: 3,
    pad: 1,
    elementwise: 6,
    rearranged: 3,
}
NESTINGS: dict[Nesting, int] = {
    function: 8,
    scan: 6,
    loop: 2,
    branches: 3,
    own_derivative: 3,
    mapped: 4,
    derivative: 1,
}
_STEPS = [step for step, share in STEPS.items() for _ in range(share)]
_NESTINGS = [nesting for nesting, share in NESTINGS.items() for _ in range(share)]


def steps(w: Writer, scope: Scope, budget: int) -> None:
    """Write `budget` operations, those of nested functions among them."""
    while budget > 0:
        if budget >= 3 and scope.depth < DEEPEST and w.chance(28):
            before = len(w.drawn)
            if nest(w, scope, w.between(1, max(1, (2 * budget) // 3))):
                budget -= len(w.drawn) - before
                continue
        step = refusal if w.wild and w.chance(8) else w.pick(_STEPS)
        if attempt(w, scope, step):
            w.drawn.append(step.__name__)
            budget -= 1
        elif not any(v.kinds is not None for v in scope.values):
            # Without a weight in sight the data alone are left to compute with.
            if not elementwise(w, scope):
                w.let(scope, f"jnp.tanh({w.data(scope, (2,))})", (2,))
            w.drawn.append("elementwise")
            budget -= 1


def nest(w: Writer, scope: Scope, budget: int) -> bool:
    nesting = w.pick(_NESTINGS)

    def step(w: Writer, scope: Scope) -> bool:
        return nesting(w, scope, budget)

    if not attempt(w, scope, step):
        return False
    w.drawn.append(nesting.__name__)
    return True


def attempt(w: Writer, scope: Scope, step: Callable[[Writer, Scope], bool]) -> bool:
    """A step that finds nothing to work on leaves no trace but its choices."""
    lines, loose, inputs = len(w.lines), set(w.loose), len(w.inputs)
    if step(w, scope):
        return True
    del w.lines[lines:], w.inputs[inputs:]
    w.loose = loose
    return False


def draw_weights(w: Writer) -> None:
    """Two to five axes of kinds in any order, at least one in and one out."""
    for i in range(w.between(1, 4)):
        if i and w.chance(40):  # of a kind with the one before, to be added to it or joined
            shape, kinds, _ = w.weights[-1]
            w.weights.append(Weight(shape, kinds, w.between(1, 3)))
            continue
        more = w.pick([0, 0, 0, 1, 1, 1, 2, 2, 3])
        others = [w.pick(["in", "out", "batch", "batch", "unit"]) for _ in range(more)]
        kinds = w.shuffled(["in", "out", *others])
        shape = [1 if kind == "unit" else w.pick([2, 3, 2, 4, 3, 1, 5]) for kind in kinds]
        while math.prod(shape) > LARGEST // 2:
            largest = shape.index(max(shape))
            shape[largest] = 2 if shape[largest] > 2 else 1
        w.weights.append(Weight(tuple(shape), tuple(kinds), w.between(1, 3)))


def draw(below: Below, operations: tuple[int, int] = (5, 30)) -> Program:
    """Draw a program of so many operations, over one to four weights, nested up to three deep.

    Args:
        below: `below(n)` gives a number in [0, n).
        operations: The least and the most operations.

    Returns:
        The program.
    """
    w = Writer(below)
    draw_weights(w)
    scope = Scope([], [])
    for i, weight in enumerate(w.weights):
        w.new(scope, f"w{i}", weight.shape, weight.kinds)
    # Short programs are the more frequent, since they are the faster.
    least, most = operations
    steps(w, scope, w.between(least, w.between(least + min(4, most - least), most)))
    settle(w, scope)
    out = [v.name for v in scope.own if v.name in w.loose] or [scope.own[-1].name]
    w.line(scope, f"return ({', '.join(out)},)")
    names = [*(f"w{i}" for i in range(len(w.weights))), *(f"x{i}" for i in range(len(w.inputs)))]
    source = "\n".join([f"def program({', '.join(names)}):", *w.lines, ""])
    return Program(source, tuple(w.weights), tuple(w.inputs), len(w.drawn), w.deepest, tuple(w.drawn))
