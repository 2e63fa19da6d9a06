"""What a tree's names, shapes and layer types say of the use of each axis of each leaf."""

from __future__ import annotations

import functools
import itertools
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax.core import meta

from lora_jax.tree import leaves_with_path
from lora_jax.weight import AxisKind, is_wrapped_leaf

Shape = tuple[int, ...]
Axes = tuple[AxisKind, ...]
# How a leaf was stacked: (position, size) of each stacked axis, the outermost first. A position is
# what `variable_axes` or `out_axes` was given, so a kernel and its bias share it: 1 and -1 differ.
Stack = tuple[tuple[int, int], ...]


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
class Leaf:
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


class Reader:
    """Reads the axes of a tree's kernels off names, siblings and layer types.

    A module's siblings are taken to be stacked as it is: Flax stacks whole blocks. The evidence is
    searched from the module outwards, and what stays undecided is reported, never guessed.
    """

    def __init__(self, leaves: Sequence[Leaf]):
        self._modules: dict[tuple[str, ...], dict[str, Leaf]] = {}
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

    def of(self, leaf: Leaf) -> list[Axes]:
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
        self, leaf: Leaf, candidates: Sequence[Candidate], chosen: Sequence[Candidate]
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

    def _local(self, leaf: Leaf) -> tuple[Candidate, ...]:
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

    def _bias(self, leaf: Leaf) -> Shape | None:
        siblings = self._modules.get(leaf.module, {})
        name = leaf.path.rsplit("/", 1)[-1]
        own = re.sub(r"^[wW]", "b", name)
        for candidate in ("bias", own) if re.fullmatch(r"[wW][0-9]*", name) else ("bias",):
            if candidate in siblings and candidate != name:
                return tuple(siblings[candidate].value.shape)
        return None

    def _kernel(self, module: tuple[str, ...]) -> Leaf | None:
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


def _family(leaf: Leaf) -> str:
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


# --- The leaves of a tree --------------------------------------------------------------------------


def read_leaves(params: Any, layouts: Mapping[str, Layout]) -> list[Leaf]:
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
        found.append(Leaf(path, value, layouts.get(path), outside, _axis_names(box)))
    return found


def _axis_names(box: Any) -> tuple[str | None, ...] | None:
    names = getattr(box, "names", None)
    if names is None and box is not None and hasattr(box, "get_metadata"):
        metadata = box.get_metadata()
        names = metadata.get("sharding_names") or metadata.get("out_sharding") or metadata.get("sharding")
    return tuple(names) if isinstance(names, tuple | list) else None


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
