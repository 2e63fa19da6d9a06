"""Which leaves to adapt, with which rank, scale and dropout."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax.layouts import Axes, Layout, Leaf, Reader, Shape, in_head, read_leaves
from lora_jax.tree import Pattern, compile_pattern, literal, matches, nearest, some
from lora_jax.weight import Block, check_axes, is_wrapped_leaf, sizes


@dataclass(frozen=True)
class Target:
    """A leaf to adapt.

    Attributes:
        path: The leaf's path in its tree.
        axes: A kind for every axis of the leaf.
        rank: The rank r of the update, at least 1; of stacked layers the largest.
        alpha: The update is scaled by s = alpha / rank; a tuple if stacked layers differ.
        dropout: The rate at which entries of the branch's input are dropped in training.
        init: The name of an initializer, or a function `(key, w, target) -> (w, a, b)`.
        lookup: Whether the leaf is an embedding table, read by row.
        ranks: The rank of every stacked layer in row-major order, if they differ; 0 leaves one as it is.
        parts: The adapted parts of a fused kernel, each a tuple of ranges of the flattened out axes; each
            has `rank` columns of its own. Empty if all of the kernel is adapted.

    >>> Target("mlp/kernel", ("in", "out"), rank=4, alpha=8.0).scale
    2.0
    >>> Target("layers/kernel", ("batch", "in", "out"), rank=4, alpha=4.0, ranks=(4, 0, 2)).scale
    (1.0, 0.0, 2.0)
    """

    path: str
    axes: Axes
    rank: int
    alpha: float | tuple[float, ...]
    dropout: float = 0.0
    init: str | Callable[..., Any] = "default"
    lookup: bool = False
    ranks: tuple[int, ...] = ()
    parts: tuple[tuple[tuple[int, int], ...], ...] = ()

    @property
    def scale(self) -> float | tuple[float, ...]:
        """The factor s = alpha / rank; one for every stacked layer where they differ."""
        if not self.ranks and not isinstance(self.alpha, tuple):
            return self.alpha / self.rank
        n = max(len(self.ranks), len(self.alpha) if isinstance(self.alpha, tuple) else 0)
        alphas = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,) * n
        return tuple(a / r if r else 0.0 for a, r in zip(alphas, self.ranks or (self.rank,) * n, strict=True))

    @property
    def columns(self) -> int:
        """The size of a's last axis: `rank` columns for every adapted part."""
        return self.rank * max(1, len(self.parts))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of b that the parts are."""
        return tuple(
            ((i * self.rank, (i + 1) * self.rank), part)
            for i, parts in enumerate(self.parts)
            for part in parts
        )


def resolve(
    params: Any,
    rank: Any,
    *,
    alpha: Any = None,
    targets: Any = None,
    exclude: Any = None,
    train: Any = None,
    init: Any = "default",
    dropout: Any = 0.0,
    axes: Any = None,
    parts: Any = None,
    layouts: Mapping[str, Layout] | None = None,
) -> tuple[dict[str, Target], list[str]]:
    """The leaves to adapt, in tree order, and the paths of those to train in full.

    The arguments are those of `wrap`. `layouts` is what `known_layouts` read off the layers' types.

    Raises:
        ValueError: any of the refusals that `wrap` lists.
        TypeError: an argument of the wrong kind.

    >>> params = {"q": {"kernel": np.ones((8, 4)), "bias": np.ones(4)}}
    >>> found, full = resolve(params, rank=2, train="bias")
    >>> found["q/kernel"].axes, found["q/kernel"].alpha, full
    (('in', 'out'), 2.0, ['q/bias'])
    """
    leaves = read_leaves(params, layouts or {})
    _check_tree(leaves)
    by_path = {leaf.path: leaf for leaf in leaves}
    given = _given_axes(axes, leaves)
    # What `infer_axes` gives remembers which leaves are look-up tables; then the trace decides, not names.
    lookups: frozenset[str] | None = getattr(axes, "lookups", None)
    excluded = _chosen("exclude", exclude, leaves)
    left = [leaf for leaf in leaves if leaf.path not in excluded]
    chosen = _targets(targets, left, given, lookups, leaves)
    full = _trained(train, leaves)
    if not chosen and not full:
        raise ValueError(
            "targets is empty: leave it out to adapt every linear kernel, name some, or give train=, "
            "the leaves to train in full and nothing else."
        )
    overlap = [path for path in full if path in chosen]
    if overlap:
        raise ValueError(
            f"{some(overlap)} would be both adapted and trained in full: write "
            f"exclude={literal(overlap[0])!r} to train in full alone, or take the path out of train."
        )
    reader = Reader(leaves)
    kinds: dict[str, Axes] = {}
    for path in chosen:
        kinds[path] = given[path] if path in given else _known_axes(reader, by_path[path])
    ranks = _values("rank", rank, chosen)
    alphas = _values("alpha", alpha, chosen) if alpha is not None else {}
    dropouts = _values("dropout", dropout, chosen)
    inits = _values("init", init, chosen, callables=False)
    fused = _parts(parts, chosen, kinds)
    found = {}
    for path, leaf in chosen.items():
        layers = sizes(tuple(leaf.value.shape), kinds[path])[0]
        of_layers = _of_layers("rank", path, ranks[path], layers, _checked_layer_rank)
        r = max(of_layers) if of_layers else ranks[path]
        r = _checked_rank(path, r)
        if path in alphas:
            alpha_of_layers = _of_layers("alpha", path, alphas[path], layers, _checked_alpha)
        else:  # s = 1, in every layer
            alpha_of_layers = tuple(map(float, of_layers))
        found[path] = Target(
            path,
            kinds[path],
            r,
            alpha_of_layers or _checked_alpha(path, alphas.get(path, r)),
            _checked_dropout(path, dropouts[path]),
            inits[path],
            _is_lookup(leaf, given, lookups),
            of_layers,
            fused.get(path, ()),
        )
    return found, full


def _check_tree(leaves: Sequence[Leaf]) -> None:
    wrapped = [leaf.path for leaf in leaves if is_wrapped_leaf(leaf.value)]
    if wrapped:
        raise ValueError(
            f"the tree is wrapped already, at {some(wrapped)}. Write wrap(lora_jax.merge(wrapped), ...) "
            "to start from the merged weights, or wrap the plain tree again with all targets at once."
        )
    seen: set[str] = set()
    for leaf in leaves:
        if leaf.path in seen:
            raise ValueError(
                f"two leaves have the path {leaf.path!r}, so they cannot be told apart. Rename a key: a "
                "key that contains '/' or a number beside its string may not collide with another path."
            )
        seen.add(leaf.path)


def _patterns(name: str, given: Any) -> list[Pattern]:
    if given is None:
        return []
    many = [given] if isinstance(given, str) or callable(given) else given
    if not isinstance(many, Iterable) or isinstance(many, Mapping):
        raise TypeError(
            f"{name}={given!r}: write a pattern such as 'attention/(query|value)', a function "
            "of path and leaf, or a list of those."
        )
    patterns: list[Any] = list(many)
    for pattern in patterns:
        if not (isinstance(pattern, str) or callable(pattern)):
            raise TypeError(
                f"{name} contains {pattern!r}; a pattern is a string or a function of path and leaf."
            )
    return patterns


def _chosen(name: str, given: Any, leaves: Sequence[Leaf]) -> set[str]:
    found: set[str] = set()
    for pattern in _patterns(name, given):
        hits = {leaf.path for leaf in leaves if matches(pattern, leaf.path, leaf.value)}
        if not hits:
            raise ValueError(_nothing(f"{name}={pattern!r}", pattern, [leaf.path for leaf in leaves]))
        found |= hits
    return found


def _nothing(what: str, pattern: Pattern, paths: Sequence[str]) -> str:
    if callable(pattern):
        return f"{what} selects none of the {len(paths)} leaves; the first paths are {some(paths)}."
    close = nearest(pattern, paths)
    return (
        f"{what} matches no path. A pattern matches whole path segments; the nearest paths are "
        f"{', '.join(map(repr, close)) or '(the tree is empty)'}."
    )


def _is_lookup(leaf: Leaf, given: Mapping[str, Axes], lookups: frozenset[str] | None) -> bool:
    if lookups is not None and leaf.path in given:
        return leaf.path in lookups
    return leaf.role == "embedding"


def _targets(
    targets: Any,
    leaves: Sequence[Leaf],
    given: Mapping[str, Axes],
    lookups: frozenset[str] | None,
    everything: Sequence[Leaf],
) -> dict[str, Leaf]:
    if targets is None or (isinstance(targets, str) and targets == "all"):
        return _default_targets(leaves, given, lookups, head=targets is not None)
    patterns = _patterns("targets", targets)
    found: set[str] = set()
    for pattern in patterns:
        if isinstance(pattern, str) and pattern == "all":
            found |= set(_default_targets(leaves, given, lookups, head=True))
            continue
        hits = [leaf for leaf in leaves if matches(pattern, leaf.path, leaf.value)]
        if not hits:
            shut = [leaf.path for leaf in everything if matches(pattern, leaf.path, leaf.value)]
            if shut:
                raise ValueError(f"targets={pattern!r} matches only what exclude takes out: {some(shut)}.")
            raise ValueError(_nothing(f"targets={pattern!r}", pattern, [leaf.path for leaf in leaves]))
        taken = [leaf for leaf in hits if _adaptable(leaf, pattern, given, lookups)]
        if lookups is not None:
            taken = [leaf for leaf in taken if leaf.path in given] or taken
        refused = [leaf for leaf in hits if leaf not in taken]
        for leaf in refused:
            if not taken or (not leaf.floating and leaf.role in ("kernel", "embedding")):
                raise ValueError(f"targets={pattern!r}: {_refusal(leaf)}")
        found |= {leaf.path for leaf in taken}
    return {leaf.path: leaf for leaf in leaves if leaf.path in found}


def _default_targets(
    leaves: Sequence[Leaf], given: Mapping[str, Axes], lookups: frozenset[str] | None, head: bool
) -> dict[str, Leaf]:
    found = {}
    for leaf in leaves:
        if leaf.outside or (in_head(leaf.path) and not head):
            continue
        if lookups is None:
            linear = leaf.role == "kernel" or (leaf.path in given and leaf.role == "")
        else:
            linear = leaf.path in given and leaf.path not in lookups
        if not linear or len(getattr(leaf.value, "shape", ())) < 2:
            continue
        if not leaf.floating:
            raise ValueError(_refusal(leaf))
        found[leaf.path] = leaf
    if not found:
        heads = [
            leaf.path
            for leaf in leaves
            if leaf.matrix
            and in_head(leaf.path)
            and (leaf.role == "kernel" if lookups is None else leaf.path in given)
        ]
        if heads and not head:
            raise ValueError(
                f"the only linear kernels are an output head's, {some(heads)}, which the default leaves "
                "alone. Write targets='all' to adapt it, or train='...' to train it in full."
            )
        if lookups is not None and not given:
            raise ValueError(
                "infer_axes found no leaf that the traced function uses as a linear weight. Call it with the "
                "function that uses these params and with inputs that reach them, or state the axes: "
                "axes={'...': ('in', 'out')}."
            )
        if lookups:
            raise ValueError(
                f"in the trace that the axes are from the only linear weights are look-up tables, "
                f"{some(sorted(lookups))}, which the default leaves alone. Name one: targets='...'."
            )
        shown = [f"{leaf.path} {tuple(leaf.value.shape)}" for leaf in leaves if leaf.matrix]
        raise ValueError(
            "no linear kernel is recognised here. Name what to adapt and say what its axes are: "
            "wrap(params, rank, targets='...', axes={'...': ('in', 'out')}). Floating leaves of two or more "
            f"dimensions: {some(shown) if shown else 'none'}."
        )
    return found


def _adaptable(
    leaf: Leaf, pattern: Pattern, given: Mapping[str, Axes], lookups: frozenset[str] | None
) -> bool:
    """Whether a pattern that matches a leaf means to adapt it.

    A pattern that names a module takes the linear kernels under it; one that names the leaf itself,
    or the module that holds it, takes an embedding or a leaf of unknown use too.
    """
    if leaf.outside or not leaf.matrix:
        return False
    lookup = _is_lookup(leaf, given, lookups)
    if lookups is None or not lookup:
        if leaf.path in given or leaf.role == "kernel":
            return True
        if leaf.role in ("bias", "norm"):
            return False
    return _below(pattern, leaf.path) <= lookup


def _below(pattern: Pattern, path: str) -> int:
    """How many segments of a path lie below what a pattern names."""
    if callable(pattern):
        return 0
    return min(
        (path[found.end() :].count("/") for found in compile_pattern(pattern).finditer(path)), default=0
    )


def _refusal(leaf: Leaf) -> str:
    """Why a leaf that was named cannot be adapted, and what to write."""
    where = f"{leaf.path!r}"
    if not hasattr(leaf.value, "dtype"):
        kind = type(leaf.value).__name__
        return f"{where} is a {kind}, not an array; exclude={literal(leaf.path)!r} leaves it out."
    if not leaf.floating:
        return (
            f"{where} has dtype {leaf.value.dtype}; only floating leaves can be adapted. Write "
            f"exclude={literal(leaf.path)!r}, or name other targets."
        )
    if leaf.outside:
        return f"{where} is {leaf.outside}, so it is not adapted. Name the parameters alone."
    if len(leaf.value.shape) < 2:
        return (
            f"{where} has shape {tuple(leaf.value.shape)}; an update of low rank needs two axes. Write "
            f"train={literal(leaf.path)!r} to train it in full."
        )
    if leaf.role in ("bias", "norm"):
        return (
            f"{where} is a {leaf.role}, not a linear kernel. Write train={literal(leaf.path)!r} to train "
            f"it in full, or state its axes: axes={{{literal(leaf.path)!r}: {_example(leaf)}}}."
        )
    return (
        f"the pattern names a module above {where}, which is no linear kernel by its name. Name it itself: "
        f"targets={literal(leaf.path)!r}."
    )


def _known_axes(reader: Reader, leaf: Leaf) -> Axes:
    found = reader.of(leaf) if leaf.role in ("kernel", "embedding") else []
    if len(found) == 1:
        return found[0]
    shape = tuple(leaf.value.shape)
    line = f"wrap(..., axes={{{literal(leaf.path)!r}: {_example(leaf, found)}}})"
    last = (
        f"Say what each axis is: {line}, with 'in' for what the input is contracted over, 'out' for what "
        "the layer gives, 'batch' for stacked layers or experts. Or leave the leaf out: "
        f"exclude={literal(leaf.path)!r}. Or read the axes off the model: "
        "wrap(..., axes=lora_jax.infer_axes(fn, params, x))."
    )
    if found:
        shown = " or ".join(map(str, found[:4])) + (f" or {len(found) - 4} others" if len(found) > 4 else "")
        raise ValueError(
            f"the kernel {leaf.path!r} of shape {shape} is ambiguous: its axes may be {shown}, and neither "
            f"names nor siblings tell which. {last}"
        )
    raise ValueError(f"the axes of {leaf.path!r} of shape {shape} are not known. {last}")


def _example(leaf: Leaf, found: Sequence[Axes] = ()) -> Axes:
    n = len(leaf.value.shape)
    return found[0] if found else ("in",) * (n - 1) + ("out",)


def _given_axes(axes: Any, leaves: Sequence[Leaf]) -> dict[str, Axes]:
    """The axes that the user states, by path."""
    if axes is None:
        return {}
    found: dict[str, Axes] = {}
    if callable(axes):
        for leaf in leaves:
            kinds: Any = axes(leaf.path, leaf.value)
            if kinds is not None:
                found[leaf.path] = kinds
    elif isinstance(axes, Mapping):
        paths = [leaf.path for leaf in leaves]
        # A path that was inferred names one leaf, not every path that it ends.
        exact = frozenset(paths) if hasattr(axes, "lookups") else frozenset()
        for pattern in axes:
            hits = [
                leaf
                for leaf in leaves
                if pattern == leaf.path or (pattern not in exact and matches(pattern, leaf.path, leaf.value))
            ]
            if not hits:
                raise ValueError(_nothing(f"axes={{{pattern!r}: ...}}", pattern, paths))
            if not any(leaf.matrix for leaf in hits):
                raise ValueError(f"axes={{{pattern!r}: ...}}: {_refusal(hits[0])}")
        for leaf in leaves:
            if leaf.path in axes:
                found[leaf.path] = axes[leaf.path]
            elif leaf.matrix:
                for pattern, kinds in axes.items():
                    if pattern in exact:
                        continue
                    apart = leaf.role in ("bias", "norm") and _below(pattern, leaf.path)
                    if matches(pattern, leaf.path, leaf.value) and not apart:
                        found[leaf.path] = kinds
                        break
    else:
        raise TypeError(
            f"axes={axes!r}: write {{pattern: kinds}}, for instance "
            "axes={'experts/wi': ('batch', 'in', 'out')}, or a function of path and leaf."
        )
    for leaf in leaves:
        if leaf.path in found:
            kinds = found[leaf.path]
            if isinstance(kinds, str) or not isinstance(kinds, Sequence):
                raise TypeError(f"axes of {leaf.path!r}: {kinds!r}; write a tuple such as ('in', 'out').")
            if not leaf.matrix:
                raise ValueError(f"axes are given for {leaf.path!r}. {_refusal(leaf)}")
            check_axes(tuple(leaf.value.shape), tuple(kinds), f"axes of {leaf.path!r}")
            found[leaf.path] = tuple(kinds)
    return found


def _trained(train: Any, leaves: Sequence[Leaf]) -> list[str]:
    found: set[str] = set()
    for pattern in _patterns("train", train):
        hits = [leaf for leaf in leaves if matches(pattern, leaf.path, leaf.value)]
        if not hits:
            raise ValueError(_nothing(f"train={pattern!r}", pattern, [leaf.path for leaf in leaves]))
        taken = [leaf for leaf in hits if leaf.floating and not leaf.outside]
        if not taken:
            leaf = hits[0]
            why = leaf.outside or f"of dtype {getattr(leaf.value, 'dtype', type(leaf.value).__name__)}"
            raise ValueError(
                f"train={pattern!r}: {leaf.path!r} is {why}; only floating parameters can be trained. Name "
                "other leaves."
            )
        found |= {leaf.path for leaf in taken}
    return [leaf.path for leaf in leaves if leaf.path in found]


def _values(name: str, spec: Any, chosen: Mapping[str, Leaf], callables: bool = True) -> dict[str, Any]:
    """The value of an option for every target: the same, by pattern, or by a function."""
    if isinstance(spec, Mapping):
        found = {}
        if not spec:
            raise ValueError(f"{name} is an empty dict; write a value, or {{pattern: value}}.")
        for pattern in spec:
            if not any(matches(pattern, path, leaf.value) for path, leaf in chosen.items()):
                raise ValueError(
                    _nothing(f"{name}={{{pattern!r}: ...}}", pattern, list(chosen)).replace(
                        "matches no path.", "matches no target."
                    )
                )
        for path, leaf in chosen.items():
            values = [value for pattern, value in spec.items() if matches(pattern, path, leaf.value)]
            if not values:
                example = next(iter(spec.values()))
                raise ValueError(
                    f"{name} has no pattern for the target {path!r}. Add a last one that matches everything, "
                    f"{name}={{..., '.*': {example!r}}}, or leave the leaf out: exclude={literal(path)!r}."
                )
            found[path] = values[0]
        return found
    if callables and callable(spec):
        return {path: spec(path, leaf.value) for path, leaf in chosen.items()}
    return dict.fromkeys(chosen, spec)


def _of_layers(
    name: str, path: str, given: Any, layers: Shape, check: Callable[[str, Any], Any]
) -> tuple[Any, ...]:
    """A value for every stacked layer, in row-major order, or nothing where one value is given."""
    if isinstance(given, str) or not (isinstance(given, Sequence) or getattr(given, "shape", ())):
        return ()
    shape = np.shape(given)
    if shape != layers:
        stacked = f"has stacked layers of shape {layers}" if layers else "is not stacked"
        raise ValueError(
            f"{name} of {path!r} is a list of shape {shape}, and the leaf {stacked}. Write a number, or one "
            "for every stacked layer."
        )
    return tuple(check(path, value) for value in np.asarray(given).flatten().tolist())


def _parts(
    parts: Any, chosen: Mapping[str, Leaf], kinds: Mapping[str, Axes]
) -> dict[str, tuple[tuple[tuple[int, int], ...], ...]]:
    """The adapted parts of fused kernels, by path."""
    if parts is None:
        return {}
    if not isinstance(parts, Mapping):
        raise TypeError(
            f"parts={parts!r}: write {{pattern: ranges}} of the flattened out axes, for instance the first "
            "and the last third of a fused query-key-value kernel: parts={'qkv': [(0, 64), (128, 192)]}."
        )
    found = {}
    for pattern, ranges in parts.items():
        hits = [path for path, leaf in chosen.items() if matches(pattern, path, leaf.value)]
        if not hits:
            raise ValueError(_nothing(f"parts={{{pattern!r}: ...}}", pattern, list(chosen)))
        for path in hits:
            width = math.prod(sizes(tuple(chosen[path].value.shape), kinds[path])[2])
            found.setdefault(path, _checked_parts(path, ranges, width))
    return found


def _checked_parts(path: str, ranges: Any, width: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Each part as a tuple of ranges, within the width and apart from one another."""

    def is_range(x: Any) -> bool:
        return (
            isinstance(x, tuple | list)
            and len(x) == 2
            and all(isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in x)
        )

    def plain(x: Any) -> Any:
        return (x.start, x.stop) if isinstance(x, range) and x.step == 1 else x

    example = f"parts={{{literal(path)!r}: [(0, {max(1, width // 3)}), ...]}}"
    ranges = np.asarray(ranges).tolist() if hasattr(ranges, "shape") else ranges
    taken: list[tuple[int, int]] = []
    found = []
    for part in ranges if isinstance(ranges, tuple | list) else [ranges]:
        part = plain(part)
        many = [part] if is_range(part) else part
        many = [plain(one) for one in many] if isinstance(many, tuple | list) else many
        if not isinstance(many, tuple | list) or not many or not all(is_range(one) for one in many):
            raise ValueError(f"parts of {path!r}: {part!r} is no range. Write {example}.")
        spans = tuple((int(start), int(stop)) for start, stop in many)
        for start, stop in spans:
            if not 0 <= start < stop <= width:
                raise ValueError(
                    f"parts of {path!r}: ({start}, {stop}) is not a range of its {width} outputs. Write "
                    f"{example}."
                )
            if any(start < other_stop and other < stop for other, other_stop in taken):
                raise ValueError(f"parts of {path!r}: ({start}, {stop}) overlaps another range.")
            taken.append((start, stop))
        found.append(spans)
    if not found:
        raise ValueError(f"parts of {path!r} are empty. Write {example}, or leave it out to adapt all of it.")
    return tuple(found)


def _number(x: Any) -> Any:
    """A number for an array of no dimensions; anything else as it is."""
    return x.item() if getattr(x, "shape", None) == () else x


def _checked_layer_rank(path: str, rank: Any) -> int:
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 0:
        raise ValueError(
            f"the rank of a layer of {path!r} is {rank!r}; write an integer, and 0 to leave a layer as it is."
        )
    return int(rank)


def _checked_rank(path: str, rank: Any) -> int:
    rank = _number(rank)
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
        raise ValueError(
            f"the rank of {path!r} is {rank!r}; write an integer of at least 1. To leave the leaf as it is, "
            f"write exclude={literal(path)!r}."
        )
    return int(rank)


def _checked_alpha(path: str, alpha: Any) -> float:
    alpha = _number(alpha)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float | np.number) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha of {path!r} is {alpha!r}; write a positive number; the default is the rank.")
    return float(alpha)


def _checked_dropout(path: str, dropout: Any) -> float:
    dropout = _number(dropout)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float | np.number) or not 0 <= dropout < 1:
        raise ValueError(f"dropout of {path!r} is {dropout!r}; write a rate in [0, 1).")
    return float(dropout)
