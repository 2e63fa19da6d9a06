"""Paths, patterns and structure: what every other file knows about trees."""

from __future__ import annotations

import difflib
import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from flax.core import meta
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, KeyEntry, SequenceKey

Pattern = str | Callable[[str, Any], bool]


def path_str(keys: Sequence[KeyEntry]) -> str:
    """The slash-joined name of a key path.

    >>> keys = [k for k, _ in jax.tree_util.tree_leaves_with_path({"a": [1, 2]})]
    >>> [path_str(k) for k in keys]
    ['a/0', 'a/1']
    """
    return "/".join(_segment(key) for key in keys)


def _segment(key: KeyEntry) -> str:
    match key:
        case DictKey() | FlattenedIndexKey():
            return str(key.key)
        case SequenceKey():
            return str(key.idx)
        case GetAttrKey():
            return key.name
    return str(key)


def is_box(node: Any) -> bool:
    """A container of one value that is no level of its own: an nnx Variable, a Linen metadata box."""
    nnx = sys.modules.get("flax.nnx")
    return isinstance(node, meta.AxisMetadata) or (nnx is not None and isinstance(node, nnx.Variable))


def leaves_with_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """The leaves of a tree with their paths, in `jax.tree.leaves` order.

    An nnx Variable's or a Linen box's own `.value` does not show in a path.

    >>> leaves_with_path({"dense": {"kernel": 1.0, "bias": 2.0}})
    [('dense/bias', 2.0), ('dense/kernel', 1.0)]
    """
    return list(_walk(tree, is_leaf))


def _walk(tree: Any, is_leaf: Callable[[Any], bool] | None) -> Iterator[tuple[str, Any]]:
    def stop(node: Any) -> bool:
        return is_box(node) or (is_leaf is not None and is_leaf(node))

    for keys, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=stop):
        if is_box(node) and not (is_leaf is not None and is_leaf(node)):
            for inner_keys, leaf in jax.tree_util.tree_leaves_with_path(node, is_leaf=is_leaf):
                yield path_str((*keys, *inner_keys[1:])), leaf
        else:
            yield path_str(keys), node


def map_with_path(
    fn: Callable[..., Any],
    tree: Any,
    *rest: Any,
    is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
    """`jax.tree.map` whose function also receives the leaf's path, first.

    >>> map_with_path(lambda path, x: f"{path}={x}", {"a": 1, "b": [2]})
    {'a': 'a=1', 'b': ['b/0=2']}
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_leaf)
    paths = [path for path, _ in leaves_with_path(tree, is_leaf)]
    others = [treedef.flatten_up_to(other) for other in rest]
    return treedef.unflatten([fn(*args) for args in zip(paths, leaves, *others, strict=True)])


@functools.lru_cache(maxsize=1024)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A regular expression over whole path segments: `query` is not found in `query_norm`.

    The expression may cover any run of segments, so `attn/(q|v)` finds `block_0/attn/q/kernel`.

    >>> bool(compile_pattern("query").search("layer/query/kernel"))
    True
    >>> bool(compile_pattern("query").search("layer/query_norm/scale"))
    False
    """
    try:
        re.compile(pattern)  # alone first, for an error that counts positions from its own start
        return re.compile(rf"(?:^|(?<=/))(?:{pattern})(?=/|$)")
    except re.error as error:
        raise ValueError(
            f"{pattern!r} is not a regular expression: {error}. A pattern matches whole path "
            "segments, for instance 'query', 'attn/(q|v)' or 'layer_[0-3]/.*'."
        ) from None


def literal(path: str) -> str:
    """The pattern that matches a path to the letter, for the line that an error shows.

    >>> bool(compile_pattern(literal("a+(b/kernel")).search("a+(b/kernel"))
    True
    """
    return re.sub(r"([.^$*+?{}\[\]\\|()])", r"\\\1", path)


def matches(pattern: Pattern, path: str, leaf: Any = None) -> bool:
    """Whether a pattern (a string, or a predicate of path and leaf) selects a path.

    >>> matches("attn/(q|v)", "block/attn/q/kernel")
    True
    """
    if callable(pattern):
        return bool(pattern(path, leaf))
    return compile_pattern(pattern).search(path) is not None


def nearest(pattern: str, paths: Iterable[str], count: int = 5) -> list[str]:
    """The paths most like a pattern that matched nothing, for the error that says so.

    >>> nearest("qeury", ["attn/query/kernel", "mlp/up/kernel"], count=1)
    ['attn/query/kernel']
    """
    paths = list(dict.fromkeys(paths))

    def likeness(path: str) -> float:
        return max(difflib.SequenceMatcher(None, pattern, part).ratio() for part in (path, *path.split("/")))

    return sorted(paths, key=lambda path: (-likeness(path), path))[:count]


def some(items: Iterable[str], count: int = 5) -> str:
    """The first few of some names, for an error that lists them.

    >>> some(["a", "b", "c"], count=2)
    "'a', 'b' and 1 more"
    """
    items = list(items)
    shown = ", ".join(map(repr, items[:count]))
    return f"{shown} and {len(items) - count} more" if len(items) > count else shown


def structure_difference(expected: Any, actual: Any, is_leaf: Callable[[Any], bool] | None = None) -> str:
    """What two trees' paths differ by, as text; empty when they do not differ.

    >>> print(structure_difference({"a": 1, "b": 2}, {"a": 1, "c": 2}))
    only in the first: b
    only in the second: c
    """
    first = [path for path, _ in leaves_with_path(expected, is_leaf)]
    second = [path for path, _ in leaves_with_path(actual, is_leaf)]
    lines = []
    for name, ours, theirs in (("first", first, second), ("second", second, first)):
        missing = [path for path in ours if path not in set(theirs)]
        if missing:
            shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            lines.append(f"only in the {name}: {shown}")
    return "\n".join(lines)
