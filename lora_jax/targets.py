"""Which leaves to adapt, and what each of their axes is for."""

from __future__ import annotations

import functools
import itertools
import math
import numbers
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import meta

from lora_jax.tree import Pattern, compile_pattern, leaves_with_path, literal, matches, nearest
from lora_jax.weight import AxisKind, Block, check_axes, is_wrapped_leaf, sizes

Shape = tuple[int, ...]
Axes = tuple[AxisKind, ...]
# How a leaf was stacked: (position, size) of each stacked axis, the outermost first. A position is
# what `variable_axes` or `out_axes` was given, so a kernel and its bias share it: 1 and -1 differ.
Stack = tuple[tuple[int, int], ...]


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


@dataclass(frozen=True)
class Layout:
    """What a layer's own type says of its weight before any stacking: the kinds and the sizes.

    A norm's weight has no axis of the kind "in".

    >>> Layout(("out", "in"), (4, 8)).lookup
    False
    """

    kinds: Axes
    shape: Shape
    lookup: bool = False


@dataclass(frozen=True)
class _Leaf:
    """A leaf with what its neighbourhood says about it."""

    path: str
    value: Any
    layout: Layout | None
    outside: str  # why it is no parameter; empty for a parameter
    names: tuple[str | None, ...] | None  # the names its metadata box gives its axes

    @functools.cached_property
    def module(self) -> tuple[str, ...]:
        return tuple(self.path.split("/")[:-1])

    @functools.cached_property
    def role(self) -> str:
        return role(self.path, self.layout)

    @property
    def floating(self) -> bool:
        return is_floating(self.value)

    @property
    def matrix(self) -> bool:
        return self.floating and len(self.value.shape) >= 2


_KERNEL = re.compile(r"kernel|weights?|[wW][0-9]*|[wW]_?(q|k|v|o|qkv|kv|in|out|i|up|down|gate|x|h)")
_EMBEDDING = re.compile(r"(input_|token_)?embeddings?|embedding_table")
_BIAS = re.compile(r"bias|b[0-9]*|bias_n|beta|offset")
_NORM = re.compile(r"scale|gamma|mean|var")
_NORM_MODULE = re.compile(r"(.*_)?(\w*norm|ln|bn)(_?[0-9a-z]+)?", re.IGNORECASE)
_HEAD = re.compile(
    r"head|lm_head|output_head|classification_head|classifier_head|cls_head|mlm_head|qa_head"
    r"|logits|logits_dense|logits_layer|classifier|unembed|unembedding|output_projection|logitdense"
    r"|readout|decoder_head|score_head|pooler_head"
)
_CONV = re.compile(r"(.*_)?[a-z]{0,2}conv(s|olution|transpose)?(_?[0-9]+_?d?)?(_.*)?", re.IGNORECASE)
# The names Flax gives to modules that have none, which say the class.
_AUTO = re.compile(r"((?:Vmap|Scan|Remat|Checkpoint)*)([A-Z][A-Za-z]*)_[0-9]+")
_ATTENTION = (
    ("query", "key", "value", "out"),
    ("q", "k", "v", "o"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("wq", "wk", "wv", "wo"),
)
_MATRIX: Axes = ("in", "out")
_TORCH: Axes = ("out", "in")
_QUERY: Axes = ("in", "out", "out")
_STACKED_NAMES = frozenset("layer layers stack scan scan_layers expert experts exp".split())


def is_floating(leaf: Any) -> bool:
    """Whether a leaf is an array (or its abstract value) of a floating dtype.

    >>> is_floating(jnp.ones(2, jnp.bfloat16)), is_floating(jnp.arange(2)), is_floating("x")
    (True, False, False)
    """
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape") and jnp.issubdtype(leaf.dtype, jnp.floating)


def role(path: str, layout: Layout | None = None) -> str:
    """What a leaf's name says it is: kernel, embedding, bias, norm, or nothing known.

    >>> [role(path) for path in ("mlp/kernel", "embed/embedding", "ln/scale", "rotary/table")]
    ['kernel', 'embedding', 'norm', '']
    """
    if layout is not None:
        return "embedding" if layout.lookup else "kernel" if "in" in layout.kinds else "norm"
    *module, name = path.split("/")
    if _BIAS.fullmatch(name):
        return "bias"
    if _NORM.fullmatch(name) or (module and name != "kernel" and _NORM_MODULE.fullmatch(module[-1])):
        return "norm"
    if _EMBEDDING.fullmatch(name):
        return "embedding"
    return "kernel" if _KERNEL.fullmatch(name) else ""


def in_head(path: str) -> bool:
    """Whether a path lies in an output head, by the name of one of its modules.

    >>> in_head("lm_head/kernel"), in_head("my_head/kernel"), in_head("head_norm/scale")
    (True, False, False)
    """
    return any(_HEAD.fullmatch(segment) for segment in path.split("/"))


# --- The layer's own type -------------------------------------------------------------------------


def known_layouts(model: Any) -> dict[str, Layout]:
    """The layouts that layer types state, by path: NNX and Equinox modules know their own kernels.

    Neither library is imported for it: who holds a module has imported them.

    >>> from flax import nnx
    >>> known_layouts(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    {'kernel': Layout(kinds=('in', 'out'), shape=(8, 4), lookup=False)}
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(model, nnx.Pytree):
        return _nnx_layouts(model, nnx)
    eqx = sys.modules.get("equinox")
    return _equinox_layouts(model, eqx) if eqx is not None else {}


def _nnx_layouts(model: Any, nnx: Any) -> dict[str, Layout]:
    found: dict[str, Layout] = {}
    for path, module in nnx.iter_modules(model):
        prefix = "".join(f"{segment}/" for segment in path)
        match module:
            case nnx.Linear():
                layout = Layout(("in", "out"), (module.in_features, module.out_features))
            case nnx.LinearGeneral() if not dict(module.batch_axis):
                inner, outer = _as_tuple(module.in_features), _as_tuple(module.out_features)
                layout = Layout(("in",) * len(inner) + ("out",) * len(outer), inner + outer)
            case nnx.Conv():
                kernel = tuple(module.kernel_shape)
                layout = Layout(("in",) * (len(kernel) - 1) + ("out",), kernel)
            case nnx.ConvTranspose():
                kernel = tuple(module.kernel_shape)
                last: Axes = ("out", "in") if module.transpose_kernel else ("in", "out")
                layout = Layout(("in",) * (len(kernel) - 2) + last, kernel)
            case nnx.Embed():
                found[f"{prefix}embedding"] = Layout(
                    ("in", "out"), (module.num_embeddings, module.features), lookup=True
                )
                continue
            case nnx.Einsum():
                kinds = _einsum_kinds(module.einsum_str, len(module.kernel_shape))
                if kinds is None:
                    continue
                layout = Layout(kinds, tuple(module.kernel_shape))
            case _:
                continue
        found[f"{prefix}kernel"] = layout
    return found


def _einsum_kinds(equation: str | None, ndim: int) -> Axes | None:
    """Kinds of an einsum's second operand, where its letters tell them all."""
    parts = re.fullmatch(r"([a-zA-Z.]*),([a-zA-Z]*)->([a-zA-Z.]*)", (equation or "").replace(" ", ""))
    if parts is None or len(parts[2]) != ndim:
        return None
    inputs, kernel, output = parts.groups()
    kinds: list[AxisKind] = []
    for letter in kernel:
        if letter in inputs:
            kinds.append("batch" if letter in output else "in")
        elif letter in output:
            kinds.append("out")
        else:
            return None
    return tuple(kinds) if "in" in kinds and "out" in kinds else None


def _equinox_layouts(model: Any, eqx: Any) -> dict[str, Layout]:
    nn = eqx.nn
    norms = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
    layers = (nn.Linear, nn.Conv, nn.ConvTranspose, nn.Embedding, nn.GRUCell, nn.LSTMCell, *norms)
    found: dict[str, Layout] = {}
    for path, layer in leaves_with_path(model, is_leaf=lambda node: isinstance(node, layers)):
        prefix = f"{path}/" if path else ""
        match layer:
            case nn.Linear():
                sizes = _scalar(layer.out_features), _scalar(layer.in_features)
                found[f"{prefix}weight"] = Layout(("out", "in"), sizes)
            case nn.Conv() | nn.ConvTranspose():
                n = layer.num_spatial_dims
                # Equinox keeps both kinds as (out, in / groups, *spatial), like the bias (out, 1, ...).
                shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
                found[f"{prefix}weight"] = Layout(("out", "in") + ("in",) * n, shape)
            case nn.Embedding():
                shape = layer.num_embeddings, layer.embedding_size
                found[f"{prefix}weight"] = Layout(("in", "out"), shape, lookup=True)
            case nn.GRUCell() | nn.LSTMCell():
                gates = (3 if isinstance(layer, nn.GRUCell) else 4) * layer.hidden_size
                found[f"{prefix}weight_ih"] = Layout(("out", "in"), (gates, layer.input_size))
                found[f"{prefix}weight_hh"] = Layout(("out", "in"), (gates, layer.hidden_size))
            case nn.LayerNorm() | nn.RMSNorm():
                found[f"{prefix}weight"] = Layout(("out",) * len(layer.shape), tuple(layer.shape))
            case nn.GroupNorm():
                found[f"{prefix}weight"] = Layout(("out",), (layer.channels,))
    return found


def _as_tuple(features: Any) -> Shape:
    return tuple(features) if isinstance(features, Iterable) else (features,)


def _scalar(features: int | str) -> int:
    return 1 if isinstance(features, str) else features


# --- Stacks and layouts that shapes allow ---------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _stacks(shape: Shape) -> tuple[Stack, ...]:
    """Every way that up to two axes of a shape may have been stacked on a smaller leaf."""
    found: list[Stack] = [()]
    for first in range(-len(shape), len(shape)):
        rest = list(shape)
        outer = (first, rest.pop(first))
        found.append((outer,))
        found += [(outer, (second, rest[second])) for second in range(-len(rest), len(rest))]
    return tuple(found)


@functools.lru_cache(maxsize=65536)
def _unstacked(shape: Shape, stack: Stack) -> tuple[int, ...] | None:
    """The axes of a shape that a stack leaves, or None if the shape cannot be so stacked."""
    left = list(range(len(shape)))
    for position, size in stack:
        if not -len(left) <= position < len(left) or shape[left.pop(position)] != size:
            return None
    return tuple(left)


def _sizes(shape: Shape, axes: tuple[int, ...]) -> Shape:
    return tuple(shape[axis] for axis in axes)


def _kinds(shape: Shape, left: tuple[int, ...], kinds: Axes) -> Axes:
    full: list[AxisKind] = ["batch"] * len(shape)
    for axis, kind in zip(left, kinds, strict=True):
        full[axis] = kind
    return tuple(full)


Candidate = tuple[Stack, Axes]


@functools.lru_cache(maxsize=4096)
def _candidates(
    shape: Shape, bias: Shape | None, family: str, layout: Layout | None
) -> tuple[Candidate, ...]:
    """Every stack and every layout that a kernel's shape, its bias and its layer's kind allow."""
    found: list[Candidate] = []
    flipped: list[Candidate] = []
    for stack in _stacks(shape):
        left = _unstacked(shape, stack)
        if left is None or len(left) < 2:
            continue
        sizes = _sizes(shape, left)
        bias_left = None if bias is None else _unstacked(bias, stack)
        if bias is not None and not bias_left:
            continue
        outer = None if bias is None or bias_left is None else _sizes(bias, bias_left)
        if layout is not None:
            pairs = zip(layout.shape, layout.kinds, strict=True)
            out_size = math.prod(n for n, kind in pairs if kind != "in")
            if sizes == layout.shape and (outer is None or math.prod(outer) == out_size):
                found.append((stack, _kinds(shape, left, layout.kinds)))
            continue
        n = len(left)
        if family == "Dense" and n != 2:
            continue
        if outer is not None:
            k = len(outer)
            if family == "Conv" and k != 1:
                continue
            if family != "weight" and k < n and sizes[n - k :] == outer:
                found.append((stack, _kinds(shape, left, ("in",) * (n - k) + ("out",) * k)))
            elif family == "weight" and n == 2 and k == 1:
                for position in (0, 1):
                    if sizes[position] == outer[0]:
                        kinds = _MATRIX if position else _TORCH
                        found.append((stack, _kinds(shape, left, kinds)))
            elif n > 2 and k == 1 and sizes[n - 2] == outer[0]:  # a transposed convolution's
                flipped.append((stack, _kinds(shape, left, ("in",) * (n - 2) + ("out", "in"))))
            elif family == "" and k < n and sizes[:k] == outer:  # an einsum's, the output's letters first
                flipped.append((stack, _kinds(shape, left, ("out",) * k + ("in",) * (n - k))))
            continue
        if family == "weight":
            if n == 2:
                found += [(stack, _kinds(shape, left, kinds)) for kinds in (_MATRIX, _TORCH)]
            continue
        for k in (1,) if family == "Conv" else range(1, n):
            found.append((stack, _kinds(shape, left, ("in",) * (n - k) + ("out",) * k)))
    return tuple(found or flipped)


class _Reader:
    """Reads the axes of a tree's kernels off names, siblings and layer types.

    A module's siblings are taken to be stacked as it is: Flax stacks whole blocks. The evidence is
    searched from the module outwards, and what stays undecided is reported, never guessed.
    """

    def __init__(self, leaves: Sequence[_Leaf]):
        self._modules: dict[tuple[str, ...], dict[str, _Leaf]] = {}
        for leaf in leaves:
            if leaf.floating:
                self._modules.setdefault(leaf.module, {})[leaf.path.rsplit("/", 1)[-1]] = leaf
        self._quartets = dict(self._find_quartets())
        self._scopes: dict[tuple[str, ...], frozenset[Stack]] = {}
        for module in self._modules:
            stacks = self._module_stacks(module)
            if stacks is not None:
                for depth in range(len(module) + 1):
                    scope = module[:depth]
                    self._scopes[scope] = self._scopes.get(scope, stacks) & stacks

    def of(self, leaf: _Leaf) -> list[Axes]:
        """The axes of a leaf: one entry if they are known, several if in doubt, none if unknown."""
        candidates = self._local(leaf)
        distinct = list(dict.fromkeys(axes for _, axes in candidates))
        if len(distinct) < 2:
            return distinct
        chosen = candidates
        for depth in reversed(range(len(leaf.module))):
            stacks = self._scopes.get(leaf.module[:depth], frozenset())
            narrowed = [candidate for candidate in chosen if candidate[0] in stacks]
            if not narrowed:
                break
            chosen = narrowed
            if len({axes for _, axes in chosen}) == 1:
                break
        # Nobody stacks on -2; but a last axis stacked on -1 nearly always allows that reading too.
        usual = [c for c in chosen if all(position >= -1 for position, _ in c[0])]
        chosen = usual or chosen
        kept = list(dict.fromkeys(axes for _, axes in chosen))
        if len(kept) > 1 or self._own_stack_possible(leaf, candidates, chosen):
            return kept if len(kept) > 1 else distinct
        return kept

    def _own_stack_possible(
        self, leaf: _Leaf, candidates: Sequence[Candidate], chosen: Sequence[Candidate]
    ) -> bool:
        """Whether the leaf may be stacked once more than its siblings, as experts of a vmap are.

        Stacks counted from the end are not considered: every DenseGeneral would be in doubt.
        """
        if leaf.layout is not None or leaf.module in self._quartets:
            return False
        if _family(leaf) in ("Conv", "DenseGeneral"):
            return False
        stack, axes = chosen[0]
        return any(
            other != axes and len(more) == len(stack) + 1 and more[: len(stack)] == stack and more[-1][0] >= 0
            for more, other in candidates
        )

    def _local(self, leaf: _Leaf) -> tuple[Candidate, ...]:
        shape = tuple(leaf.value.shape)
        if leaf.role == "embedding" and leaf.layout is None:
            found = tuple(
                (stack, _kinds(shape, left, ("in", "out")))
                for stack in _stacks(shape)
                if (left := _unstacked(shape, stack)) is not None and len(left) == 2
            )
        else:
            found = _candidates(shape, self._bias(leaf), _family(leaf), leaf.layout)
        quartet = self._quartets.get(leaf.module)
        if quartet is not None and leaf.layout is None:
            found = tuple(c for c in quartet if leaf.role == "kernel") or found
        if leaf.names is not None and len(leaf.names) == len(shape):
            stacked = [i for i, name in enumerate(leaf.names) if name in _STACKED_NAMES]
            if stacked:
                found = tuple(c for c in found if all(c[1][i] == "batch" for i in stacked)) or found
        return found

    def _bias(self, leaf: _Leaf) -> Shape | None:
        siblings = self._modules.get(leaf.module, {})
        name = leaf.path.rsplit("/", 1)[-1]
        own = re.sub(r"^[wW]", "b", name)
        for candidate in ("bias", own) if re.fullmatch(r"[wW][0-9]*", name) else ("bias",):
            if candidate in siblings and candidate != name:
                return tuple(siblings[candidate].value.shape)
        return None

    def _kernel(self, module: tuple[str, ...]) -> _Leaf | None:
        leaves = self._modules.get(module, {}).values()
        kernels = [leaf for leaf in leaves if leaf.role == "kernel" and leaf.matrix]
        return kernels[0] if len(kernels) == 1 else None

    def _module_stacks(self, module: tuple[str, ...]) -> frozenset[Stack] | None:
        """The stacks that a module's leaves allow; None if they tell nothing."""
        leaves = self._modules[module]
        tables = [leaf for leaf in leaves.values() if leaf.matrix and leaf.role in ("kernel", "embedding")]
        if tables:
            return frozenset.intersection(*(frozenset(s for s, _ in self._local(x)) for x in tables)) or None
        for name in ("scale", "weight", "gamma"):
            norm = leaves.get(name)
            if norm is not None and norm.role == "norm" and norm.value.shape:
                shape, ndim = tuple(norm.value.shape), 1 if norm.layout is None else len(norm.layout.shape)
                return frozenset(
                    stack
                    for stack in _stacks(shape)
                    if (left := _unstacked(shape, stack)) is not None and len(left) == ndim
                )
        return None

    def _find_quartets(self) -> Iterator[tuple[tuple[str, ...], tuple[Candidate, ...]]]:
        """Attention's four kernels tell more together than each alone: heads must agree."""
        parents = dict.fromkeys(module[:-1] for module in self._modules if module)
        for parent, names in itertools.product(parents, _ATTENTION):
            members = [self._kernel((*parent, name)) for name in names]
            if any(member is None or member.layout is not None for member in members):
                continue
            shapes = [tuple(member.value.shape) for member in members if member is not None]
            biases = [self._bias(member) for member in members if member is not None]
            solved = _solve_attention(tuple(shapes), tuple(biases))
            for name, candidates in zip(names, solved, strict=True):
                if candidates:
                    yield (*parent, name), candidates


@functools.lru_cache(maxsize=1024)
def _solve_attention(
    shapes: tuple[Shape, ...], biases: tuple[Shape | None, ...]
) -> tuple[tuple[Candidate, ...], ...]:
    """The stacks under which query, key, value and out fit together, and each one's axes."""
    found: list[list[Candidate]] = [[] for _ in shapes]
    for stack in _stacks(shapes[0]):
        lefts = [_unstacked(shape, stack) for shape in shapes]
        if any(left is None for left in lefts):
            continue
        q, k, v, o = (_sizes(shape, left or ()) for shape, left in zip(shapes, lefts, strict=True))
        if len(q) == len(k) == len(v) == len(o) == 3:
            fits = q[1:] == o[:2] and k[1:] == v[1:] and q[2] == k[2] and q[1] % k[1] == 0
            kinds: tuple[Axes, ...] = (*[_QUERY] * 3, ("in", "in", "out"))
            outs = [q[1:], k[1:], v[1:], o[2:]]
        elif len(q) == len(k) == len(v) == len(o) == 2:
            fits = q[1] == o[0] and k[0] == v[0]
            kinds = (_MATRIX,) * 4
            outs = [x[1:] for x in (q, k, v, o)]
        else:
            continue
        for bias, outer in zip(biases, outs, strict=True):
            if bias is not None:
                left = _unstacked(bias, stack)
                fits = fits and left is not None and _sizes(bias, left) == outer
        if fits:
            for list_, shape, left, kind in zip(found, shapes, lefts, kinds, strict=True):
                list_.append((stack, _kinds(shape, left or (), kind)))
    return tuple(map(tuple, found))


def _family(leaf: _Leaf) -> str:
    """Dense, DenseGeneral, Conv, weight (of either orientation) or nothing known, by names."""
    name = leaf.path.rsplit("/", 1)[-1]
    if name in ("weight", "weights"):
        return "weight"
    for segment in leaf.module[-1:]:
        auto = _AUTO.fullmatch(segment)
        if auto and auto[2] in ("Dense", "DenseGeneral") and not (auto[1] and auto[2] == "DenseGeneral"):
            return auto[2]
        if _CONV.fullmatch(segment.rsplit("/", 1)[-1]):
            return "Conv"
    # Haiku's linear and a hand-written `w` are matrices, its convolutions are named.
    return ""


# --- Selection ------------------------------------------------------------------------------------


def _read_leaves(params: Any, layouts: Mapping[str, Layout]) -> list[_Leaf]:
    """The leaves of a tree in order, each with its layout, metadata and reason to be no parameter."""
    nnx = sys.modules.get("flax.nnx")

    def is_box(node: Any) -> bool:
        return isinstance(node, meta.AxisMetadata) or (nnx is not None and isinstance(node, nnx.Variable))

    boxes: dict[str, Any] = {
        path: node for path, node in leaves_with_path(params, is_leaf=is_box) if is_box(node)
    }
    collections = isinstance(params, Mapping) and "params" in params
    found = []
    for path, value in leaves_with_path(params, is_wrapped_leaf):
        box = boxes.get(path)
        outside = ""
        if nnx is not None and isinstance(box, nnx.Variable):
            if not isinstance(box, nnx.Param):
                outside = f"an nnx.{type(box).__name__}, not an nnx.Param"
        elif collections and not path.startswith("params/"):
            outside = "outside the collection 'params'"
        found.append(_Leaf(path, value, layouts.get(path), outside, _axis_names(box)))
    return found


def _axis_names(box: Any) -> tuple[str | None, ...] | None:
    names = getattr(box, "names", None)
    if names is None and box is not None and hasattr(box, "get_metadata"):
        metadata = box.get_metadata()
        names = metadata.get("sharding_names") or metadata.get("out_sharding") or metadata.get("sharding")
    return tuple(names) if isinstance(names, tuple | list) else None


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

    >>> found, full = resolve({"q": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}, rank=2, train="bias")
    >>> found["q/kernel"].axes, found["q/kernel"].alpha, full
    (('in', 'out'), 2.0, ['q/bias'])
    """
    leaves = _read_leaves(params, layouts or {})
    _check_tree(leaves)
    by_path = {leaf.path: leaf for leaf in leaves}
    given = _given_axes(axes, leaves)
    # What `infer_axes` gives remembers which leaves are look-up tables; then the trace decides, not names.
    lookups: frozenset[str] | None = getattr(axes, "lookups", None)
    excluded = _chosen("exclude", exclude, leaves)
    left = [leaf for leaf in leaves if leaf.path not in excluded]
    chosen = _targets(targets, left, given, lookups, leaves)
    full = _trained(train, leaves)
    overlap = [path for path in full if path in chosen]
    if overlap:
        raise ValueError(
            f"{_some(overlap)} would be both adapted and trained in full: write "
            f"exclude={literal(overlap[0])!r} to train in full alone, or take the path out of train."
        )
    reader = _Reader(leaves)
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


def _check_tree(leaves: Sequence[_Leaf]) -> None:
    wrapped = [leaf.path for leaf in leaves if is_wrapped_leaf(leaf.value)]
    if wrapped:
        raise ValueError(
            f"the tree is wrapped already, at {_some(wrapped)}. Write wrap(lora_jax.merge(wrapped), ...) "
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


def _chosen(name: str, given: Any, leaves: Sequence[_Leaf]) -> set[str]:
    found: set[str] = set()
    for pattern in _patterns(name, given):
        hits = {leaf.path for leaf in leaves if matches(pattern, leaf.path, leaf.value)}
        if not hits:
            raise ValueError(_nothing(f"{name}={pattern!r}", pattern, [leaf.path for leaf in leaves]))
        found |= hits
    return found


def _nothing(what: str, pattern: Pattern, paths: Sequence[str]) -> str:
    if callable(pattern):
        return f"{what} selects none of the {len(paths)} leaves; the first paths are {_some(paths)}."
    close = nearest(pattern, paths)
    return (
        f"{what} matches no path. A pattern matches whole path segments; the nearest paths are "
        f"{', '.join(map(repr, close)) or '(the tree is empty)'}."
    )


def _is_lookup(leaf: _Leaf, given: Mapping[str, Axes], lookups: frozenset[str] | None) -> bool:
    if lookups is not None and leaf.path in given:
        return leaf.path in lookups
    return leaf.role == "embedding"


def _targets(
    targets: Any,
    leaves: Sequence[_Leaf],
    given: Mapping[str, Axes],
    lookups: frozenset[str] | None,
    everything: Sequence[_Leaf],
) -> dict[str, _Leaf]:
    if targets is None or (isinstance(targets, str) and targets == "all"):
        return _default_targets(leaves, given, lookups, head=targets is not None)
    patterns = _patterns("targets", targets)
    if not patterns:
        raise ValueError("targets is empty: leave it out to adapt every linear kernel, or name some.")
    found: set[str] = set()
    for pattern in patterns:
        if isinstance(pattern, str) and pattern == "all":
            found |= set(_default_targets(leaves, given, lookups, head=True))
            continue
        hits = [leaf for leaf in leaves if matches(pattern, leaf.path, leaf.value)]
        if not hits:
            shut = [leaf.path for leaf in everything if matches(pattern, leaf.path, leaf.value)]
            if shut:
                raise ValueError(f"targets={pattern!r} matches only what exclude takes out: {_some(shut)}.")
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
    leaves: Sequence[_Leaf], given: Mapping[str, Axes], lookups: frozenset[str] | None, head: bool
) -> dict[str, _Leaf]:
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
                f"the only linear kernels are an output head's, {_some(heads)}, which the default leaves "
                "alone. Write targets='all' to adapt it, or train='...' to train it in full."
            )
        if lookups:
            raise ValueError(
                f"in the trace that the axes are from the only linear weights are look-up tables, "
                f"{_some(sorted(lookups))}, which the default leaves alone. Name one: targets='...'."
            )
        shown = [f"{leaf.path} {tuple(leaf.value.shape)}" for leaf in leaves if leaf.matrix]
        raise ValueError(
            "no linear kernel is recognised here that exclude leaves. Name what to adapt and say what its "
            "axes are: wrap(params, rank, targets='...', axes={'...': ('in', 'out')}). Floating leaves of "
            "two or more "
            f"dimensions: {_some(shown) if shown else 'none'}."
        )
    return found


def _adaptable(
    leaf: _Leaf, pattern: Pattern, given: Mapping[str, Axes], lookups: frozenset[str] | None
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


def _refusal(leaf: _Leaf) -> str:
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


def _known_axes(reader: _Reader, leaf: _Leaf) -> Axes:
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


def _example(leaf: _Leaf, found: Sequence[Axes] = ()) -> Axes:
    n = len(leaf.value.shape)
    return found[0] if found else ("in",) * (n - 1) + ("out",)


def _given_axes(axes: Any, leaves: Sequence[_Leaf]) -> dict[str, Axes]:
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


def _trained(train: Any, leaves: Sequence[_Leaf]) -> list[str]:
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


def _values(name: str, spec: Any, chosen: Mapping[str, _Leaf], callables: bool = True) -> dict[str, Any]:
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
    if isinstance(given, str) or not isinstance(given, Sequence | np.ndarray):
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
    parts: Any, chosen: Mapping[str, _Leaf], kinds: Mapping[str, Axes]
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
            isinstance(x, Sequence)
            and len(x) == 2
            and all(isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in x)
        )

    example = f"parts={{{literal(path)!r}: [(0, {max(1, width // 3)}), ...]}}"
    taken: list[tuple[int, int]] = []
    found = []
    for part in ranges if isinstance(ranges, Sequence) and not isinstance(ranges, str) else [ranges]:
        many = [part] if is_range(part) else part
        if not isinstance(many, Sequence) or not many or not all(is_range(one) for one in many):
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


def _checked_layer_rank(path: str, rank: Any) -> int:
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 0:
        raise ValueError(
            f"the rank of a layer of {path!r} is {rank!r}; write an integer, and 0 to leave a layer as it is."
        )
    return int(rank)


def _checked_rank(path: str, rank: Any) -> int:
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
        raise ValueError(
            f"the rank of {path!r} is {rank!r}; write an integer of at least 1. To leave the leaf as it is, "
            f"write exclude={literal(path)!r}."
        )
    return int(rank)


def _checked_alpha(path: str, alpha: Any) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float | np.number) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha of {path!r} is {alpha!r}; write a positive number; the default is the rank.")
    return float(alpha)


def _checked_dropout(path: str, dropout: Any) -> float:
    if isinstance(dropout, bool) or not isinstance(dropout, int | float | np.number) or not 0 <= dropout < 1:
        raise ValueError(f"dropout of {path!r} is {dropout!r}; write a rate in [0, 1).")
    return float(dropout)


def _some(items: Sequence[str], count: int = 5) -> str:
    shown = ", ".join(repr(item) for item in items[:count])
    return f"{shown} and {len(items) - count} more" if len(items) > count else shown


def skipped_because(path: str, leaf: Any) -> str:
    """Why a leaf is neither adapted nor trained, as far as its name tells.

    >>> skipped_because("lm_head/kernel", jnp.ones((4, 2)))
    'output head'
    """
    kind = role(path)
    if kind in ("embedding", "bias", "norm"):
        return kind
    if in_head(path):
        return "output head"
    return "not targeted" if kind == "kernel" else "not targeted: no linear kernel by its name"
