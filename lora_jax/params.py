"""Trees of parameters: wrapped, parted, merged, and the adapter taken out and put in."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from lora_jax import initializers, nnx
from lora_jax import targets as targets_lib
from lora_jax.layouts import is_floating, known_layouts
from lora_jax.tree import leaves_with_path, map_with_path, some, structure_difference
from lora_jax.weight import FullWeight, LoraWeight, check_whole, is_wrapped_leaf, sizes, wide_dtype

Leaf = LoraWeight | FullWeight


def _is_hole(node: Any) -> bool:
    return node is None or is_wrapped_leaf(node)


def _items(tree: Any) -> list[tuple[str, Any]]:
    return leaves_with_path(tree, is_wrapped_leaf)


def _wrapped_items(tree: Any) -> dict[str, Leaf]:
    return {path: leaf for path, leaf in _items(tree) if is_wrapped_leaf(leaf)}


def require_wrapped(tree: Any, name: str) -> None:
    """Raise where no leaf of a tree is wrapped; `name` is the function that was given it."""
    if not _wrapped_items(tree):
        raise ValueError(
            f"{name} was given a tree without any LoraWeight. Give what lora_jax.wrap(params, rank=...) "
            "returned."
        )


# --- Wrap and merge -------------------------------------------------------------------------------


def wrap(
    params: Any,
    rank: Any,
    *,
    alpha: Any = None,
    targets: Any = None,
    exclude: Any = None,
    train: Any = None,
    key: jax.Array | None = None,
    init: Any = "default",
    dropout: Any = 0.0,
    dtype: Any = jnp.float32,
    axes: Any = None,
    parts: Any = None,
) -> Any:
    r"""Put a `LoraWeight` in the place of every target leaf: :math:`W` becomes :math:`W + s\,A B`.

    With s = alpha / rank, a uniform within one over the root of fan-in, and b zero, so that the
    wrapped tree starts as the same function. No base weight is copied.

    Patterns are regular expressions over whole path segments ("query" never matches
    "query_norm"), or functions of path and leaf that return a bool, or lists of those. A pattern
    that names a module takes the linear kernels under it.

    Args:
        params: The parameters: Flax Linen's, an `nnx.State`, an `nnx.Module`, an Equinox module,
            Haiku's, or any pytree of arrays.
        rank: The rank r: an integer, {pattern: integer} (the first match counts), or a function of
            path and leaf. For stacked layers an integer may also be a list, one for every layer, in
            which 0 leaves a layer as it is.
        alpha: The scale's numerator, in the same forms; by default the rank, so s = 1.
        targets: What to adapt. By default every linear kernel (attention, MLP, convolution), but no
            embedding and no output head; "all" adds the head; else a pattern. With `train` it may be
            empty, `targets=()`: then nothing is adapted, and what `train` names is trained.
        exclude: A pattern of what not to adapt.
        train: A pattern of leaves to train in full, such as a new head: each becomes a `FullWeight`.
        key: The random key; by default `jax.random.key(0)`.
        init: "default", "gaussian", a function `(key, w, target) -> (w, a, b)`, or {pattern: ...}.
        dropout: The rate on the branch's input, in the three forms of rank; it acts only under
            `lora(fn, key=...)`.
        dtype: The dtype of a and b.
        axes: {pattern: kinds} for leaves whose axes names and siblings do not tell, with "batch",
            "in", "out" or "unit" for each axis; a function of path and leaf; or what `infer_axes` read
            off the model's own trace.
        parts: {pattern: ranges} for fused kernels of which only some parts are adapted, as ranges of the
            flattened out axes: {"qkv": [(0, 64), (128, 192)]}. Each has `rank` columns of its own; a part
            in several pieces is a list of ranges. The rest stays exactly as it is.

    Returns:
        A tree of the same structure, its targets wrapped. For an `nnx.Module`, a new module.

    Raises:
        ValueError: a pattern matches nothing; a rank below 1; a leaf that is no floating array is
            named; the tree is wrapped already; a kernel's axes are ambiguous; no linear kernel is
            recognised; a path is both adapted and trained in full; two leaves have one path.
        TypeError: an argument of the wrong kind, or a module inside another container.

    The definition is that of LoRA (arXiv:2106.09685), section 4.1.

    >>> params = {"mlp": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
    >>> wrapped = wrap(params, rank=2)
    >>> wrapped["mlp"]["kernel"].a.shape, wrapped["mlp"]["kernel"].b.shape
    ((8, 2), (2, 4))
    >>> wrapped["mlp"]["kernel"].w is params["mlp"]["kernel"]
    True
    """
    tree, close = nnx.opened(params)
    found, full = targets_lib.resolve(
        tree,
        rank,
        alpha=alpha,
        targets=targets,
        exclude=exclude,
        train=train,
        init=init,
        dropout=dropout,
        axes=axes,
        parts=parts,
        layouts=known_layouts(params),
    )
    _require_dtype(dtype, "a and b need a floating dtype, such as jnp.float32")
    key = jax.random.key(0) if key is None else key
    if not isinstance(key, jax.Array):
        raise TypeError(f"key is {key!r}; write key=jax.random.key({key if isinstance(key, int) else 0}).")
    in_full = frozenset(full)

    def leaf(path: str, value: Any) -> Any:
        if path in in_full:
            return _full(path, value)
        target = found.get(path)
        if target is None:
            return value
        _require_array(path, value)
        w, a, b = initializers.initialize(key, value, target, dtype)
        scale_dtype = wide_dtype(dtype)
        scale = jnp.asarray(target.scale, scale_dtype)
        if scale.ndim:
            scale = scale.reshape(sizes(tuple(w.shape), target.axes)[0])
        scale = jnp.broadcast_to(scale, sizes(tuple(w.shape), target.axes)[0])
        a, b, scale = initializers.placed((a, b, scale), w, target.axes)
        return LoraWeight(w, a, b, scale, target.axes, path, target.dropout, target.blocks)

    return close(map_with_path(leaf, tree))


def _require_dtype(dtype: Any, need: str) -> None:
    try:
        floating = dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(f"dtype is {dtype!r}; {need}.")
    if (rounded := jax.dtypes.canonicalize_dtype(dtype)) != jnp.dtype(dtype):
        raise ValueError(
            f"dtype is {jnp.dtype(dtype)}, which jax rounds to {rounded} while jax_enable_x64 is off; turn "
            "it on, or write jnp.float32."
        )


def _require_array(path: str, value: Any) -> None:
    if isinstance(value, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{path!r} is a ShapeDtypeStruct. For an abstract tree write, for instance, "
            "jax.eval_shape(lambda p: lora_jax.wrap(p, rank=...), params)."
        )
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        raise TypeError(
            f"{path!r} has dtype {value.dtype}, in which there is no update; cast the base to a floating "
            "dtype, such as jnp.float32."
        )
    # numpy's: jax has none of its own then, and would give float32 back for it without a word.
    if value.dtype.itemsize > 4 and jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
        raise TypeError(
            f"{path!r} has dtype {value.dtype}, which jax rounds to "
            f"{jax.dtypes.canonicalize_dtype(value.dtype)} while jax_enable_x64 is off; turn it on, or cast "
            "the base yourself."
        )


def _full(path: str, value: Any) -> FullWeight:
    _require_array(path, value)
    # A copy even where the dtype stays: a train step donates it, and the base is the user's.
    wide = wide_dtype(value.dtype)
    return FullWeight(jnp.array(value, dtype=wide, copy=True), value.dtype, path)


@functools.partial(jax.jit, static_argnums=(1,))
def _dense(leaf: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """A leaf's dense value, and whether it is finite wherever what it came from was."""
    if isinstance(leaf, LoraWeight):
        value, source = leaf.dense(dtype), leaf.w
    elif isinstance(leaf, FullWeight):
        value, source = leaf.dense(dtype), leaf.value
    else:
        value, source = lax.convert_element_type(leaf, dtype), leaf
    return value, jnp.all(jnp.isfinite(value) | ~jnp.isfinite(source))


def merge(wrapped: Any, dtype: Any = None) -> Any:
    r"""The plain parameters: :math:`W + s\,A B` for every wrapped leaf.

    The sum is made in float32 (or wider, if a factor or the base is) and rounded once. Where the
    update is zero the base's entry is kept bit for bit, so `merge(wrap(params, ...))` equals params.

    Args:
        wrapped: A tree from `wrap`; or the same tree under a JAX transformation.
        dtype: The dtype of every floating leaf of the result; by default the one it had.

    Returns:
        A tree of the structure, shapes and shardings that the parameters had. Leaves that were
        neither adapted nor cast are the same objects.

    Raises:
        ValueError: no leaf is wrapped, dtype is no floating one or a 64-bit one while jax_enable_x64 is
            off, or an entry overflows or is not a number where the base's was finite (not checked under a
            transformation).

    >>> W = jnp.array([[1., 2., 3.], [4., 5., 6.], [7., 8., 9.]])
    >>> wrapped = wrap({"kernel": W}, rank=2)
    >>> A = jnp.array([[1., 0.], [0., 1.], [1., 1.]])
    >>> B = jnp.array([[1., 2., 3.], [4., 5., 6.]])
    >>> wrapped["kernel"] = wrapped["kernel"].replace(a=A, b=B)
    >>> merge(wrapped)["kernel"].tolist()
    [[2.0, 4.0, 6.0], [8.0, 10.0, 12.0], [12.0, 15.0, 18.0]]
    """
    if dtype is not None:
        _require_dtype(dtype, "merge into a floating dtype, such as jnp.float32")
    tree, close = nnx.opened(wrapped)
    require_wrapped(tree, "merge")
    checks: dict[str, Any] = {}

    def leaf(path: str, node: Any) -> Any:
        out = None if dtype is None else jnp.dtype(dtype)
        if not is_wrapped_leaf(node):
            if out is None or not is_floating(node) or node.dtype == out:
                return node
            _require_array(path, node)
            source = node
        else:
            if isinstance(node, LoraWeight):
                check_whole(node)
            source = node.w if isinstance(node, LoraWeight) else node.value
            _require_array(path, source)
            # One compilation for all leaves of a shape: the path is static.
            node = node.replace(path="")
        value, finite = _dense(node, out)
        checks[path] = finite
        return _placed_as(value, source)

    merged = map_with_path(leaf, tree, is_leaf=is_wrapped_leaf)
    remedy = "merge into a wider dtype"
    if dtype is None or jnp.dtype(dtype).itemsize < 4:
        remedy += ": merge(wrapped, dtype=jnp.float32)"
    _raise_unfinite("merging", checks, remedy)
    return close(merged)


def _raise_unfinite(what: str, checks: Mapping[str, Any], remedy: str) -> None:
    concrete = {path: x for path, x in checks.items() if not isinstance(x, Tracer)}
    values = jax.device_get(list(concrete.values()))
    bad = [path for path, fine in zip(concrete, values, strict=True) if not fine]
    if bad:
        raise ValueError(
            f"{what} gives infinite or undefined entries where the base is finite, at {some(bad)}. Look "
            f"for a diverged run (NaN in a or b), or {remedy}."
        )


def _placed_as(value: Any, source: Any) -> Any:
    if isinstance(value, Tracer) or not isinstance(source, jax.Array):
        return value
    if isinstance(source, Tracer) or value.sharding == source.sharding:
        return value
    return jax.device_put(value, source.sharding) if source.committed else value


# --- Partition and combine ------------------------------------------------------------------------


def partition(wrapped: Any) -> tuple[Any, Any]:
    """Part a wrapped tree into what is trained and what is frozen. Nothing is copied.

    Args:
        wrapped: A tree from `wrap`.

    Returns:
        trainable: The same structure with a and b of every `LoraWeight` and the value of every
            `FullWeight`; None stands for all else, so an optimizer's state exists for these alone.
        frozen: The same structure with w and scale, and every other leaf. For an `nnx.Module`
            trainable is an `nnx.State` and frozen a pair of graphdef and state.

    Raises:
        ValueError: no leaf is wrapped.

    >>> wrapped = wrap({"mlp": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}, rank=2)
    >>> trainable, frozen = partition(wrapped)
    >>> [x.shape for x in jax.tree.leaves(trainable)], [x.shape for x in jax.tree.leaves(frozen)]
    ([(8, 2), (2, 4)], [(4,), (8, 4), ()])
    """
    if nnx.is_module(wrapped):
        graphdef, state = nnx.split(wrapped)
        trainable, frozen = partition(state)
        return trainable, (graphdef, frozen)
    tree, _ = nnx.opened(wrapped)
    require_wrapped(tree, "partition")
    trainable = jax.tree.map(_trainable_part, tree, is_leaf=is_wrapped_leaf)
    frozen = jax.tree.map(_frozen_part, tree, is_leaf=is_wrapped_leaf)
    return trainable, frozen


def _trainable_part(leaf: Any) -> Any:
    if isinstance(leaf, LoraWeight):
        return leaf.replace(w=None, scale=None)
    return leaf if isinstance(leaf, FullWeight) else None


def _frozen_part(leaf: Any) -> Any:
    if isinstance(leaf, LoraWeight):
        return leaf.replace(a=None, b=None)
    return leaf.replace(value=None) if isinstance(leaf, FullWeight) else leaf


def combine(trainable: Any, frozen: Any) -> Any:
    """The wrapped tree again, from the two halves that `partition` gave. Nothing is copied.

    Args:
        trainable: The first half; its arrays may be new ones, or tracers.
        frozen: The second half.

    Returns:
        The wrapped tree; for a module, a new module.

    Raises:
        ValueError: the two have different structures; the paths that differ are named.

    >>> wrapped = wrap({"mlp": {"kernel": jnp.ones((8, 4))}}, rank=2)
    >>> again = combine(*partition(wrapped))
    >>> again["mlp"]["kernel"].w is wrapped["mlp"]["kernel"].w
    True
    """
    if nnx.is_split(frozen):
        graphdef, state = frozen
        return nnx.merge(graphdef, combine(trainable, state))
    ours, structure = jax.tree.flatten(trainable, is_leaf=_is_hole)
    theirs, other = jax.tree.flatten(frozen, is_leaf=_is_hole)
    if structure != other:
        difference = structure_difference(trainable, frozen, is_leaf=_is_hole)
        raise ValueError(
            "combine: the trainable and the frozen half have different structures. Give the two halves of "
            f"one partition(wrapped), in this order.\n{difference or f'{structure}{chr(10)}{other}'}"
        )
    for path, a, b in zip(_hole_paths(frozen), ours, theirs, strict=True):
        _check_halves(path, a, b)
    return structure.unflatten([_joined(a, b) for a, b in zip(ours, theirs, strict=True)])


def _hole_paths(tree: Any) -> list[str]:
    return [path for path, _ in leaves_with_path(tree, is_leaf=_is_hole)]


def _check_halves(path: str, trainable: Any, frozen: Any) -> None:
    match trainable, frozen:
        case LoraWeight(), LoraWeight():
            fits = trainable.axes == frozen.axes and frozen.a is None and trainable.w is None
        case FullWeight(), FullWeight():
            fits = frozen.value is None
        case None, _:
            fits = not is_wrapped_leaf(frozen)
        case _:
            fits = False
    if not fits:
        raise ValueError(
            f"combine: the halves do not fit at {path!r}: {_kind(trainable)} and {_kind(frozen)}. Give the "
            "two halves of one partition(wrapped): combine(trainable, frozen)."
        )


def _kind(node: Any) -> str:
    return "nothing" if node is None else f"a {type(node).__name__}"


def _joined(trainable: Any, frozen: Any) -> Any:
    if isinstance(trainable, LoraWeight):
        scale = frozen.scale if trainable.scale is None else trainable.scale
        return frozen.replace(a=trainable.a, b=trainable.b, scale=scale)
    return frozen if trainable is None else trainable


def stack(adapters: Sequence[Any]) -> Any:
    """Several adapters of one base along a new first axis, to run or train them in one `jax.vmap`.

    The base stays outside of the stack and is shared:

        trainable, frozen = partition(adapters[0])
        vmap(lambda t, x: lora(f)(combine(t, frozen), x))(stack(adapters), xs)

    Smaller ranks are filled up with zero columns of a and zero rows of b, whose gradients are zero
    too. The scales are stacked with them, so each adapter keeps its alpha; `partition(stacked)` parts
    them from what is trained, and `combine` puts them back. One adapter of the stack is
    `jax.tree.map(lambda x: x[i], stacked)`.

    Args:
        adapters: Wrapped trees of one base, with the same leaves adapted and trained in full. That the
            base is one is not checked.

    Returns:
        A tree like the first half of `partition`, whose arrays (a, b, scale; value) have a new first
        axis. The base's leaves are None.

    Raises:
        ValueError: no adapter, or two that differ in their leaves, axes, blocks or rates of dropout.

    >>> base = {"mlp": {"kernel": jnp.ones((8, 4))}}
    >>> two = [wrap(base, rank=2), wrap(base, rank=3, alpha=6, key=jax.random.key(1))]
    >>> both = stack(two)
    >>> both["mlp"]["kernel"].a.shape, both["mlp"]["kernel"].scale.tolist()
    ((2, 8, 3), [1.0, 2.0])
    """
    if not isinstance(adapters, Sequence) or not adapters:
        raise ValueError(
            "stack was given no list of adapters; write stack([first, second, ...]) of wrapped trees."
        )
    trees = [nnx.opened(tree)[0] for tree in adapters]
    for tree in trees:
        require_wrapped(tree, "stack")
    found = [trained_leaves(tree) for tree in trees]
    lines = []
    for number, leaves in enumerate(found[1:], 1):
        for path in dict.fromkeys((*found[0], *leaves)):
            first, other = found[0].get(path), leaves.get(path)
            if first is None or other is None:
                lines.append(f"{path}: only in adapter {0 if other is None else number}")
            elif _form(first) != _form(other):
                lines.append(f"{path}: {_form(first)} in adapter 0, {_form(other)} in adapter {number}")
    if lines:
        raise ValueError(f"stack: the adapters are not of one form:\n{_lines(lines)}")

    def leaf(path: str, node: Any) -> Any:
        if not is_wrapped_leaf(node):
            return None
        nodes: list[Any] = [leaves[path] for leaves in found]
        if isinstance(node, FullWeight):
            return node.replace(value=jnp.stack([n.value for n in nodes]))
        rank, batch = max(n.rank for n in nodes), len(node.axes_of("batch"))
        return node.replace(
            w=None,
            a=jnp.stack([_filled(n.a, -1, rank) for n in nodes]),
            b=jnp.stack([_filled(n.b, batch, rank) for n in nodes]),
            scale=jnp.stack([n.scale for n in nodes]),
        )

    return map_with_path(leaf, trees[0], is_leaf=is_wrapped_leaf)


def _form(leaf: Any) -> str:
    """What must agree for two leaves to be stacked; of a blocked one the rank too."""
    if isinstance(leaf, FullWeight):
        return f"trained in full, {leaf.value.dtype}{list(leaf.value.shape)}"
    rank = f", rank {leaf.rank} in the blocks {leaf.blocks}" if leaf.blocks else ""
    drop = f", dropout {leaf.dropout}" if leaf.dropout else ""
    return f"{leaf.a.dtype} factors of shape {_base_shape(leaf)} with axes {leaf.axes}{rank}{drop}"


def _filled(x: jax.Array, axis: int, size: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def labels(trainable: Any) -> Any:
    """A label for every trained array, for `optax.partition`: "a", "b" or "full".

    Args:
        trainable: The first half of `partition`.

    Returns:
        The same structure with a string for every array.

    Raises:
        ValueError: no leaf is wrapped.

    >>> wrapped = wrap({"mlp": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}, rank=2, train="bias")
    >>> jax.tree.leaves(labels(partition(wrapped)[0]))
    ['full', 'a', 'b']
    """
    require_wrapped(trainable, "labels")

    def leaf(node: Any) -> Any:
        if isinstance(node, LoraWeight):
            return node.replace(w=None, a="a", b="b", scale=None)
        return node.replace(value="full") if isinstance(node, FullWeight) else None

    return jax.tree.map(leaf, trainable, is_leaf=is_wrapped_leaf)


# --- The adapter ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """What training changed, apart from the base: what is saved, loaded and swapped.

    Attributes:
        leaves: By path, each `LoraWeight` without its w, and each `FullWeight`.
        shapes: By path, shape and dtype of the base's leaves that were adapted, trained in full, or
            have a fingerprint.
        fingerprint: By path, a number made of the bits of the base's weights; see `fingerprint`.

    >>> made = adapter(wrap({"mlp": {"kernel": jnp.ones((8, 4), jnp.float32)}}, rank=2))
    >>> list(made.leaves), made.shapes
    (['mlp/kernel'], {'mlp/kernel': ((8, 4), 'float32')})
    """

    leaves: dict[str, Leaf]
    shapes: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    fingerprint: dict[str, int] = field(default_factory=dict)


def adapter(wrapped: Any) -> Adapter:
    """Take the adapter out of a wrapped tree: what was trained, and what identifies the base.

    Args:
        wrapped: A tree from `wrap`, of concrete arrays.

    Returns:
        The `Adapter`; its arrays are those of the tree.

    Raises:
        ValueError: no leaf is wrapped.

    >>> made = adapter(wrap({"mlp": {"kernel": jnp.ones((8, 4))}}, rank=2))
    >>> made.leaves["mlp/kernel"].w is None, made.leaves["mlp/kernel"].a.shape
    (True, (8, 2))
    """
    return _taken(wrapped)


def _taken(wrapped: Any) -> Adapter:
    tree, _ = nnx.opened(wrapped)
    leaves = trained_leaves(tree)
    for leaf in _wrapped_items(tree).values():
        if isinstance(leaf, LoraWeight):
            check_whole(leaf)
    marks = fingerprint(tree)
    base = {
        path: (tuple(leaf.shape), jnp.dtype(leaf.dtype).name)
        for path, leaf in _items(tree)
        if path in leaves or path in marks
    }
    return Adapter(leaves, base, marks)


def trained_leaves(given: Any) -> dict[str, Leaf]:
    """By path, the trained leaves of an `Adapter` or of a wrapped tree, without their w."""
    if isinstance(given, Adapter):
        return given.leaves
    tree, _ = nnx.opened(given)
    require_wrapped(tree, "adapter")
    found: dict[str, Leaf] = {}
    for path, leaf in _wrapped_items(tree).items():
        lora = isinstance(leaf, LoraWeight)
        if (leaf.a is None or leaf.scale is None) if lora else leaf.value is None:
            raise ValueError(
                f"{path!r} is one half of a partition. Give the whole: combine(trainable, frozen)."
            )
        found[path] = leaf.replace(w=None) if lora else leaf
    return found


def attach(params: Any, adapter: Any, check: bool = True) -> Any:
    """Put an adapter on a base: the wrapped tree that `adapter` was taken from, if the base is its own.

    Args:
        params: The base, a tree of any kind with the paths that the adapter names.
        adapter: An `Adapter`, or a wrapped tree.
        check: Whether the base must have the very values that the adapter was trained on.

    Returns:
        The wrapped tree; the base's arrays and the adapter's are the same objects.

    Raises:
        ValueError: paths, shapes or (with check) dtypes and fingerprints differ; all are listed.

    >>> base = {"mlp": {"kernel": jnp.ones((8, 4))}}
    >>> again = attach(base, adapter(wrap(base, rank=2)))
    >>> again["mlp"]["kernel"].rank
    2
    """
    tree, close = nnx.opened(params)
    leaves = trained_leaves(adapter)
    already = list(_wrapped_items(tree))
    if already:
        raise ValueError(
            f"attach: the base is wrapped already, at {some(already)}. Give the plain parameters, or write "
            "swap(wrapped, adapter)."
        )
    if check and not isinstance(adapter, Adapter):
        adapter = _taken(adapter)
    differences = _differences(tree, leaves, adapter if check else None)
    if differences:
        raise ValueError(
            f"the adapter does not belong to this base:\n{_lines(differences)}\n"
            "Give the base it was trained on"
            + ("; check=False skips the comparison of values." if check else ".")
        )

    def leaf(path: str, value: Any) -> Any:
        new = leaves.get(path)
        if isinstance(new, LoraWeight):
            a, b, scale = initializers.placed((new.a, new.b, new.scale), value, new.axes)
            return _checked(path, new.replace(w=value, a=a, b=b, scale=scale, path=path))
        if new is None:
            return value
        return new.replace(value=_placed_as(new.value, value), path=path, dtype=jnp.dtype(value.dtype))

    return close(map_with_path(leaf, tree))


def _checked(path: str, leaf: LoraWeight) -> LoraWeight:
    """The same leaf through the constructor, which compares the shapes."""
    return LoraWeight(leaf.w, leaf.a, leaf.b, leaf.scale, leaf.axes, path, leaf.dropout, leaf.blocks)


def _differences(tree: Any, leaves: Mapping[str, Leaf], known: Adapter | None) -> list[str]:
    base = {
        path: (tuple(getattr(leaf, "shape", ())), str(getattr(leaf, "dtype", type(leaf).__name__)))
        for path, leaf in _items(tree)
    }
    expected = {path: (_base_shape(leaf), None) for path, leaf in leaves.items()}
    found: dict[str, str] = {}
    for path, (shape, dtype) in (expected | (known.shapes if known else {})).items():
        if path not in base:
            found[path] = "the base has no such leaf"
        elif base[path][0] != shape:
            found[path] = f"shape {base[path][0]}, the adapter was made for {shape}"
        elif dtype not in (None, base[path][1]):
            found[path] = f"dtype {base[path][1]}, the adapter was made for {dtype}"
    marks = fingerprint(tree) if known is not None else {}
    for path, mark in marks.items():
        before = known.fingerprint.get(path) if known is not None else None
        if path in found or path in leaves and before is None:
            continue
        if before is None:
            found[path] = "the base the adapter was made for has no such leaf"
        elif mark != before:
            found[path] = f"other values (fingerprint {mark:08x}, the adapter was made for {before:08x})"
    return [f"{path}: {text}" for path, text in found.items()]


def _lines(differences: Sequence[str], count: int = 20) -> str:
    more = [f"and {len(differences) - count} more"] if len(differences) > count else []
    return "\n".join([*differences[:count], *more])


def _base_shape(leaf: Leaf) -> tuple[int, ...]:
    """The shape of the base's leaf, from the factors."""
    if isinstance(leaf, FullWeight):
        return tuple(leaf.value.shape)
    batch = len(leaf.axes_of("batch"))
    parts = {
        "batch": iter(leaf.a.shape[:batch]),
        "in": iter(leaf.a.shape[batch:-1]),
        "out": iter(leaf.b.shape[batch + 1 :]),
    }
    return tuple(1 if kind == "unit" else next(parts[kind]) for kind in leaf.axes)


def swap(wrapped: Any, adapter: Any) -> Any:
    """Another adapter on the same base: new a, b and scale, and new values of leaves trained in full.

    The base's arrays stay the same objects; whether the adapter was made for them `attach` checks, and
    this does not. With equal ranks every shape and the tree's structure
    stay too, so a compiled function is not compiled again.

    Args:
        wrapped: A wrapped tree.
        adapter: An `Adapter`, or another wrapped tree, with the same paths.

    Returns:
        The wrapped tree with the other adapter; dropout rates are those of `wrapped`.

    Raises:
        ValueError: the paths, the axes or the shapes differ.

    >>> first = wrap({"kernel": jnp.ones((8, 4))}, rank=2)
    >>> second = wrap({"kernel": jnp.ones((8, 4))}, rank=2, alpha=4, key=jax.random.key(1))
    >>> both = swap(first, second)
    >>> both["kernel"].w is first["kernel"].w, float(both["kernel"].scale)
    (True, 2.0)
    """
    tree, close = nnx.opened(wrapped)
    require_wrapped(tree, "swap")
    mine, theirs = _wrapped_items(tree), trained_leaves(adapter)
    lines = [f"{path}: only in the wrapped tree" for path in mine if path not in theirs]
    lines += [f"{path}: only in the adapter" for path in theirs if path not in mine]
    for path in mine:
        other = theirs.get(path)
        if other is None:
            continue
        for what, here, there in (
            ("a", type(mine[path]).__name__, type(other).__name__),
            ("axes", getattr(mine[path], "axes", ()), getattr(other, "axes", ())),
            ("blocks", getattr(mine[path], "blocks", ()), getattr(other, "blocks", ())),
            ("shape", tuple(mine[path].shape), _base_shape(other)),
        ):
            if here != there:
                lines.append(f"{path}: {what} {here} here, {what} {there} in the adapter")
                break
    if lines:
        raise ValueError(
            f"swap: the adapter does not fit the wrapped tree:\n{_lines(lines)}\nTo put it on the plain "
            "parameters instead, write lora_jax.attach(params, adapter)."
        )

    def leaf(path: str, node: Any) -> Any:
        new = theirs.get(path)
        if isinstance(new, LoraWeight):
            # Where the old ones lie, so that a compiled function finds them there.
            a, b, scale = (_placed_as(getattr(new, x), getattr(node, x)) for x in ("a", "b", "scale"))
            return _checked(path, node.replace(a=a, b=b, scale=scale))
        return node if new is None else node.replace(value=_placed_as(new.value, node.value))

    return close(map_with_path(leaf, tree, is_leaf=is_wrapped_leaf))


def unmerge(params: Any, adapter: Any) -> Any:
    r"""Take an adapter out of merged parameters: a wrapped tree whose base is :math:`W - s\,A B`.

    The difference is made in float32 (or wider) and rounded once to the leaf's dtype, so the base
    comes back up to rounding in float32 or wider, and not in bfloat16 or float16, where `merge`
    has lost bits for good. Keep the base instead, wherever that is possible. A leaf that was
    trained in full has no known base and stays as it is.

    Args:
        params: Merged parameters.
        adapter: The `Adapter` that was merged, or the wrapped tree.

    Returns:
        A wrapped tree: `merge(unmerge(params, adapter))` is params, up to rounding.

    Raises:
        ValueError: params is wrapped, the paths or shapes differ, or an entry overflows or is not a number
            where that of params is finite (not checked under a transformation).

    >>> wrapped = wrap({"kernel": jnp.ones((3, 2))}, rank=1)
    >>> wrapped["kernel"] = wrapped["kernel"].replace(a=jnp.ones((3, 1)), b=jnp.ones((1, 2)))
    >>> unmerge(merge(wrapped), wrapped)["kernel"].w.tolist()
    [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    merged, _ = nnx.opened(params)
    already = list(_wrapped_items(merged))
    if already:
        raise ValueError(
            f"unmerge: the parameters are wrapped, at {some(already)}, so nothing is merged into them. Give "
            "what merge returned."
        )
    tree, close = nnx.opened(attach(params, Adapter(trained_leaves(adapter)), check=False))
    values, checks = dict(leaves_with_path(merged)), {}

    def leaf(path: str, node: Any) -> Any:
        if isinstance(node, FullWeight):
            return _full(path, values[path])
        if not isinstance(node, LoraWeight):
            return node
        _require_array(path, node.w)
        w, checks[path] = _dense(node.replace(scale=-node.scale, path="", dropout=0.0), None)
        return node.replace(w=_placed_as(w, node.w))

    unmerged = map_with_path(leaf, tree, is_leaf=is_wrapped_leaf)
    _raise_unfinite("unmerging", checks, "give the merged parameters in a wider dtype")
    return close(unmerged)


# --- Fingerprint ----------------------------------------------------------------------------------


def fingerprint(tree: Any) -> dict[str, int]:
    r"""A number for every floating leaf of two or more dimensions: the same bits, the same number.

    It is :math:`\sum_i h(\mathrm{bits}(w_i), i) \bmod 2^{32}`, where h mixes an entry's bits with its
    position in row-major order. For one position h is a bijection, so a change of one bit is always
    seen, -0.0 differs from 0.0, and two entries that change places are seen but for one case in
    2^32. The sum does not depend on the order, and so not on the sharding. It is not cryptographic.

    Args:
        tree: Plain parameters or a wrapped tree, of concrete arrays. Of a `LoraWeight` its w counts;
            a `FullWeight` has none.

    Returns:
        A number below 2^32 for every path.

    >>> first, second = jnp.array([[0.0, 1.0]]), jnp.array([[-0.0, 1.0]])
    >>> fingerprint({"w": first}) == fingerprint({"w": second})
    False
    """
    tree, _ = nnx.opened(tree)
    found: dict[str, Any] = {}
    for path, leaf in _items(tree):
        value = leaf.w if isinstance(leaf, LoraWeight) else leaf
        if not isinstance(leaf, FullWeight) and is_floating(value) and len(value.shape) >= 2:
            found[path] = value
    return dict(zip(found, bit_numbers(found.values()), strict=True))


def bit_numbers(arrays: Iterable[Any]) -> list[int]:
    """The number of `hash_bits` for every array.

    >>> bit_numbers([jnp.zeros(3, jnp.int32)]) == [int(hash_bits(jnp.zeros(3, jnp.int32)))]
    True
    """
    found = []
    for x in arrays:
        found.append(hash_bits(x))
        if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1:
            # Sums over devices that are under way together can wait for one another for ever on CPUs.
            found[-1].block_until_ready()
    return [int(number) for number in jax.device_get(found)]


@jax.jit
def hash_bits(x: jax.Array) -> jax.Array:
    """The number of `fingerprint` for one array of any shape and numeric dtype: uint32, shape ().

    >>> x = jnp.arange(6)
    >>> bool(hash_bits(x) == hash_bits(x[::-1]))
    False
    """
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if x.dtype.itemsize == 1 and not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.uint8)  # booleans, and integers of less than a byte
    width = x.dtype.itemsize * 8
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
    mixed = jnp.zeros_like(bits, dtype=jnp.uint32)
    stride = 1
    for axis in reversed(range(x.ndim)):
        mixed = mixed + lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride % 2**32)
        stride *= x.shape[axis]
    mixed = _mix(mixed)
    for shift in range(0, width, 32):
        part = bits >> np.array(shift, bits.dtype) if shift else bits
        mixed = _mix(mixed + part.astype(jnp.uint32))
    return jnp.sum(mixed, dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit integers in which every bit of the input reaches every bit of the output."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))
