r"""What a trained update looks like: its singular values and directions, beside W's and another run's.

These are the measurements of LoRA's sections 7.2 and 7.3 (arXiv:2106.09685), made on the host in float64
whatever the dtype of the arrays, and returned as numpy arrays; no update is ever formed. In and out axes
are flattened in the order in which the `LoraWeight` has them, its batch axes lead every result, its scale
counts, and of a fused kernel the adapted parts. The paper writes W x where this library has x @ W: its
left singular vectors are the `outputs` here, its right ones the `inputs`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_jax import nnx
from lora_jax.params import Adapter, require_wrapped
from lora_jax.tree import is_box, leaves_with_path, some
from lora_jax.weight import AXIS_KINDS, FullWeight, LoraWeight, is_wrapped_leaf, sizes

_EPS = float(np.finfo(np.float64).eps)


class SVD(NamedTuple):
    r"""A thin singular value decomposition, :math:`\Delta W = U\,\mathrm{diag}(\sigma)\,V^\top`.

    With k the smallest of rank, inputs and outputs:

    Attributes:
        inputs: U, float64 of shape batch + (in, k): orthonormal columns.
        values: σ, float64 of shape batch + (k,), falling.
        outputs: V, float64 of shape batch + (out, k): orthonormal columns.
    """

    inputs: np.ndarray
    values: np.ndarray
    outputs: np.ndarray


class Amplification(NamedTuple):
    """Frobenius norms of an update, of its weight, and of the weight on some directions: shape batch.

    Attributes:
        update: ‖ΔW‖.
        weight: ‖W‖; of a fused kernel, W's columns of the adapted parts, here and below.
        onto_update: ‖Uᵀ W V‖ with the k singular directions of ΔW.
        onto_weight: The same with W's own top k directions, the largest that it can be.
        onto_random: The same with random directions: the root of the mean of its square.
        factor: update / onto_update; nan for an update that is zero, inf where W has nothing there, both
            up to the rounding of float64.
    """

    update: np.ndarray
    weight: np.ndarray
    onto_update: np.ndarray
    onto_weight: np.ndarray
    onto_random: np.ndarray
    factor: np.ndarray


def svd(weight: LoraWeight) -> SVD:
    r"""The thin SVD of an update :math:`\Delta W = s\,A B`, from its factors.

    With :math:`A = Q_A R_A` and :math:`B^\top = Q_B R_B`, the SVD :math:`s R_A R_B^\top = X \Sigma Y^\top` of
    an r × r matrix gives :math:`U = Q_A X` and :math:`V = Q_B Y`: work of order (in + out) r².

    Args:
        weight: A `LoraWeight`, of concrete arrays; its w may be None, as in an `Adapter`. It may lie in the
            nnx Variable or the Linen box that it has in its tree.

    Returns:
        An `SVD`. The directions of singular values that are zero are arbitrary.

    Raises:
        ValueError: a factor is missing, or has an entry that is infinite or not a number; the shapes do
            not fit; the weight was stacked after it was made.
        TypeError: it is no LoraWeight, or a factor no array of real floating numbers, or traced.

    >>> weight = LoraWeight(np.zeros((3, 2)), np.diag([3.0, 4.0])[[0, 1, 1]], np.eye(2), scale=2.0)
    >>> svd(weight).values.round(6).tolist()
    [11.313708, 6.0]
    """
    return _decomposed(_held(weight))[0]


def effective_rank(values: Any) -> np.ndarray:
    r"""Roy and Vetterli's effective rank: how many directions an update uses, weighed by its singular values.

    .. math:: \exp\Bigl(-\sum_i p_i \ln p_i\Bigr), \qquad p_i = \sigma_i \Big/ \sum_j \sigma_j

    It is k for k equal singular values, near 1 where one has nearly all, and here 0 where all are zero.
    The definition is that of "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.

    Args:
        values: Singular values, such as `svd(weight).values`: shape batch + (k,), in any order; an array or
            lists, of floating numbers or integers.

    Returns:
        float64 of shape batch.

    Raises:
        ValueError: a value is negative or not finite, or there is no axis of values.
        TypeError: they are no real numbers, or traced.

    >>> float(effective_rank(np.array([2.0, 2.0, 0.0]))), float(effective_rank(np.zeros(3)))
    (2.0, 0.0)
    """
    values = _values(values, "effective_rank")
    total = values.sum(-1, keepdims=True)
    p = values / np.where(total > 0, total, 1.0)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1.0)), -1)
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)


def stable_rank(values: Any) -> np.ndarray:
    r"""The stable rank :math:`\|\Delta W\|_F^2 / \|\Delta W\|_2^2 = \sum_i \sigma_i^2 / \max_i \sigma_i^2`.

    Never more than the rank, and moved little by small singular values; here 0 where all are zero. The
    definition is that of Rudelson and Vershynin, "Sampling from large matrices", JACM 2007 ("numerical
    rank" there).

    Args:
        values: As for `effective_rank`.

    Returns:
        float64 of shape batch.

    Raises:
        ValueError, TypeError: as for `effective_rank`.

    >>> float(stable_rank(np.array([2.0, 1.0, 1.0])))
    1.5
    """
    values = _values(values, "stable_rank")
    return np.sum(values**2, -1)


def subspace_similarity(first: Any, second: Any, of: Literal["a", "b", "in", "out"] = "a") -> np.ndarray:
    r"""φ(i, j) for all i and j: the share of one's top i directions that lies in the other's top j.

    .. math:: \varphi(A_1, A_2, i, j) = \frac{\|U_1[:, :i]^\top\, U_2[:, :j]\|_F^2}{\min(i, j)} \in [0, 1]

    with U₁ and U₂ the singular vectors of A₁ and A₂ in the space that both share, by falling singular value.
    It is 1 if the smaller space lies in the larger, 0 if they are orthogonal, and between random spaces of
    d dimensions max(i, j) / d in the mean: that is what to compare with. One SVD of each gives all of it.

    The definition is that of LoRA (arXiv:2106.09685), section 7.2. With p = min(i, j) and the projection
    metric d of its appendix G, φ = 1 - d²/p; the appendix misprints it as (1 - d²)/p.

    Args:
        first: A `LoraWeight`, as for `svd`, or an array of shape batch + (d, n), whose left singular vectors
            are taken: a matrix of random numbers, or w.
        second: The same, with the same batch shape and d.
        of: Whose directions to take of a LoraWeight: those of factor "a", as the paper does (its right
            singular vectors; d is in), of factor "b" (d is out), or of the update s·A·B, among the
            inputs ("in") or outputs ("out"). The update's are ordered by what they do in it; A's also by
            what its random start has left.

    Returns:
        float64 of shape batch + (k₁, k₂); [..., i - 1, j - 1] is φ(i, j). It is nan from the rank of
        either on, where directions would be arbitrary: everywhere for an update that is zero.

    Raises:
        ValueError: the sizes of the two differ; `of` is none of the four; or as for `svd`.
        TypeError: as for `svd`.

    >>> first = np.eye(4)[:, :2] * [2.0, 1.0]
    >>> second = np.eye(4)[:, 1:] * [3.0, 2.0, 1.0]
    >>> subspace_similarity(first, second).round(6).tolist()
    [[0.0, 0.0, 0.0], [1.0, 0.5, 0.5]]
    """
    if of not in ("a", "b", "in", "out"):
        raise ValueError(f"subspace_similarity: of is {of!r}; write 'a', 'b', 'in' or 'out'.")
    first, second = _held(first), _held(second)
    (u1, defined1), (u2, defined2) = _directions(first, of), _directions(second, of)
    if u1.shape[:-1] != u2.shape[:-1]:
        raise ValueError(
            f"subspace_similarity: {_name(first)} has directions of shape {u1.shape} and {_name(second)} of "
            f"{u2.shape}; all but the last size must agree, the batch axes and the dimension of the space."
        )
    overlap = (_transposed(u1) @ u2) ** 2
    total = overlap.cumsum(-2).cumsum(-1)
    i, j = (np.arange(1, n + 1) for n in total.shape[-2:])
    defined = defined1[..., :, None] & defined2[..., None, :]
    return np.where(defined, np.minimum(total / np.minimum(i[:, None], j), 1.0), np.nan)


def amplification(weight: LoraWeight) -> Amplification:
    r"""How far an update amplifies directions of its weight, and three norms to compare with.

    .. math:: \frac{\|\Delta W\|_F}{\|U^\top W V\|_F}, \qquad \Delta W = U\,\mathrm{diag}(\sigma)\,V^\top

    with the k singular directions of ΔW that are not zero. The definition is that of LoRA
    (arXiv:2106.09685), section 7.3, where the factor is 21.5 for r = 4 and 1.9 for r = 64; its Vᵀ stands
    for V, if V has the right singular vectors as columns.

    W's own top k directions in place of U and V give :math:`\sqrt{\sigma_1(W)^2 + \dots + \sigma_k(W)^2}`.
    Independent random directions give, for W of shape (m, n), exactly

    .. math:: \mathbb{E}\,\|U^\top W V\|_F^2
        = \mathbb{E}\,\mathrm{tr}(W^\top U U^\top\, W\, V V^\top) = \frac{k}{m}\,\frac{k}{n}\,\|W\|_F^2,

    since uniformly drawn spaces have :math:`\mathbb{E}\,UU^\top = (k/m) I` and
    :math:`\mathbb{E}\,VV^\top = (k/n) I`. Its root, :math:`\|W\|_F\,k/\sqrt{mn}`, is `onto_random`; for a
    square W that is the paper's ‖W‖ r/d.

    Args:
        weight: A `LoraWeight` with its w, whose singular values are computed too: work of order
            m n min(m, n).

    Returns:
        An `Amplification`.

    Raises:
        ValueError: w is missing, or as for `svd`.
        TypeError: as for `svd`.

    >>> weight = LoraWeight(np.diag([4.0, 3.0, 0.5]), np.eye(3)[:, 2:], 6.0 * np.eye(3)[2:])
    >>> found = amplification(weight)
    >>> [round(float(x), 3) for x in found]
    [6.0, 5.025, 0.5, 4.0, 1.675, 12.0]
    """
    weight = _held(weight)
    (u, values, v), defined = _decomposed(weight)
    outputs = _outputs(weight)
    v, w = v[..., outputs, :], _float64(_base(weight)[..., outputs], f"w of {_name(weight)}")
    count = defined.sum(-1)
    inside = (_transposed(u) @ w @ v) * (defined[..., :, None] & defined[..., None, :])
    own = np.linalg.svd(w, compute_uv=False)
    own = own * (np.arange(own.shape[-1]) < count[..., None])
    update, size, onto = _norm(values[..., None]), _norm(w), _norm(inside)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        factor = np.where(onto > _EPS * max(w.shape[-2:]) * size, update / onto, np.inf)
    factor = np.where(count > 0, factor, np.nan)
    random = size * count / math.sqrt(w.shape[-2] * w.shape[-1])
    return Amplification(update, size, onto, _norm(own[..., None]), random, factor)


def matrices(wrapped: Any) -> dict[str, LoraWeight]:
    """Every adapted matrix of a tree by itself: a plain `LoraWeight` with axes ("in", "out") for each.

    Stacked layers are taken apart, several in or out axes become one, each adapted part of a fused kernel
    has its own rows, columns and w, and the zeros that fill up smaller ranks are left out; a layer of
    rank 0 is not there. The update is that of the tree.

    Args:
        wrapped: A tree from `wrap`, an `nnx.Module`, or an `Adapter`, whose leaves have no w.

    Returns:
        LoraWeights of numpy arrays, in the dtypes that they had, by name: the path, then the layer and the
        part's outputs as they would be indexed, such as layers/qkv/kernel[3][:, 0:64].

    Raises:
        ValueError: no leaf is adapted, or none with a rank; two matrices would have one name; parts of a
            kernel overlap; or as for `svd`.
        TypeError: as for `svd`.

    >>> import lora_jax
    >>> params = {"layers": {"kernel": jnp.ones((2, 8, 12))}}
    >>> wrapped = lora_jax.wrap(params, rank=[2, 1], axes={"layers": ("batch", "in", "out")})
    >>> [(name, x.shape, x.rank) for name, x in matrices(wrapped).items()]
    [('layers/kernel[0]', (8, 12), 2), ('layers/kernel[1]', (8, 12), 1)]
    >>> fused = lora_jax.wrap({"qkv": {"kernel": jnp.ones((8, 12))}}, 2, parts={"qkv": [(0, 4), (8, 12)]})
    >>> [(name, x.shape, x.rank) for name, x in matrices(fused).items()]
    [('qkv/kernel[:, 0:4]', (8, 4), 2), ('qkv/kernel[:, 8:12]', (8, 4), 2)]
    """
    tree, _ = nnx.opened(wrapped.leaves if isinstance(wrapped, Adapter) else wrapped)
    require_wrapped(tree, "matrices")
    adapted = [
        leaf.replace(path=path or leaf.path)
        for path, leaf in leaves_with_path(tree, is_wrapped_leaf)
        if isinstance(leaf, LoraWeight)
    ]
    if not adapted:
        raise ValueError("matrices was given a tree in which no leaf is adapted; see lora_jax.summary(tree).")
    found: dict[str, LoraWeight] = {}
    for matrix in itertools.chain.from_iterable(map(_matrices, adapted)):
        if matrix.path in found:
            raise ValueError(
                f"two matrices would be called {matrix.path!r}. Rename one of the leaves, or give them in "
                "two trees."
            )
        found[matrix.path] = matrix
    if not found:
        raise ValueError(
            f"in all that is adapted, {some(leaf.path for leaf in adapted)}, a and b are both zero, as in a "
            "layer of rank 0: there is no matrix to take. svd takes such a leaf as it is."
        )
    return found


def _matrices(leaf: LoraWeight) -> Iterator[LoraWeight]:
    a, b, scale = _factors(leaf)
    w = None if leaf.w is None else _base(leaf)
    for place in np.ndindex(scale.shape):
        name = leaf.path + "".join(f"[{i}]" for i in place)
        for label, columns, outputs in _parts(leaf):
            left, right = a[place][:, columns], b[place][columns][:, outputs]
            alive = left.any(0) | right.any(1)
            if alive.any():
                yield leaf.replace(
                    w=None if w is None else w[place][:, outputs],
                    a=left[:, alive],
                    b=right[alive],
                    scale=scale[place],
                    axes=("in", "out"),
                    path=name + label,
                    blocks=(),
                )


def _parts(leaf: LoraWeight) -> Iterator[tuple[str, slice, Any]]:
    """The columns of a and the outputs of each adapted part."""
    if not leaf.blocks:
        yield "", slice(None), slice(None)
        return
    spans: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for ranks, span in leaf.blocks:
        spans.setdefault(ranks, []).append(span)
    every = sorted(span for many in spans.values() for span in many)
    if any(stop > start for (_, stop), (start, _) in zip(every, every[1:], strict=False)):
        raise ValueError(f"the parts {leaf.blocks} of {leaf.path!r} overlap; give the whole leaf to svd.")
    for ranks, many in spans.items():
        label = " and ".join(f"{start}:{stop}" for start, stop in many)
        yield f"[:, {label}]", slice(*ranks), np.concatenate([np.arange(*span) for span in many])


def _outputs(leaf: LoraWeight) -> Any:
    """The outputs of all adapted parts."""
    if not leaf.blocks:
        return slice(None)
    return np.unique(np.concatenate([np.arange(*span) for _, span in leaf.blocks]))


def _held(x: Any) -> Any:
    """What an nnx Variable or a Linen box holds; anything else as it is."""
    held = jax.tree.leaves(x, is_leaf=is_wrapped_leaf) if is_box(x) else [x]
    return held[0] if len(held) == 1 else x


def _decomposed(weight: LoraWeight) -> tuple[SVD, np.ndarray]:
    """The SVD of an update, and which of its directions are not arbitrary (batch, k)."""
    a, b, scale = (x.astype(np.float64) for x in _factors(weight))
    left, lower = np.linalg.qr(a)
    right, upper = np.linalg.qr(_transposed(b))
    with np.errstate(over="ignore", invalid="ignore"):
        core = scale[..., None, None] * (lower @ _transposed(upper))
    if not np.isfinite(core).all():
        raise ValueError(f"the update of the LoraWeight at {weight.path!r} overflows float64; scale it down.")
    x, values, y = np.linalg.svd(core, full_matrices=False)
    # Factors whose product cancels leave rounding of their own size, not of the product's.
    size = np.abs(scale) * _spectral_norm(lower) * _spectral_norm(upper)
    defined = _defined(values, size, a.shape[-2], b.shape[-1])
    return SVD(left @ x, values, right @ _transposed(y)), defined


def _factors(weight: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The factors (batch, in, r) and (batch, r, out), flattened by kind, and the scale (batch,)."""
    _require_factors(weight)
    _require_fitting(weight)
    names = {x: f"{x} of {_name(weight)}" for x in ("a", "b", "scale")}
    a, b, scale = (_array(getattr(weight, x), name) for x, name in names.items())
    a = a.reshape(*scale.shape, -1, weight.rank)
    b = b.reshape(*scale.shape, weight.rank, -1)
    if weight.blocks:
        # Not live_b, for which jax would round float64 where it has none.
        inside = np.zeros(b.shape[-2:], bool)
        for (r0, r1), (o0, o1) in weight.blocks:
            inside[r0:r1, o0:o1] = True
        b = np.where(inside, b, np.zeros((), b.dtype))
    for x, name in zip((a, b, scale), names.values(), strict=True):
        _require_finite(x, name)
    return a, b, scale


def _require_factors(weight: Any) -> None:
    if isinstance(weight, FullWeight):
        raise TypeError(
            f"{_name(weight)} was trained in full; it has no factors. Of its update give subspace_similarity "
            "the array: leaf.value - w, with the base's w."
        )
    if not isinstance(weight, LoraWeight):
        raise TypeError(
            f"{_name(weight)} is no LoraWeight; give a leaf of the tree that lora_jax.wrap returned, or one "
            "of lora_jax.analysis.matrices(tree)."
        )
    if weight.a is None or weight.b is None or weight.scale is None:
        raise ValueError(
            f"{_name(weight)} is one half of a partition. Give the whole: "
            "lora_jax.combine(trainable, frozen), or state.wrapped of a TrainState."
        )


def _require_fitting(weight: LoraWeight) -> None:
    axes = weight.axes
    n, inner = len(weight.axes_of("batch")), len(weight.axes_of("in"))
    a, b, scale = (tuple(np.shape(x)) for x in (weight.a, weight.b, weight.scale))
    w = None if weight.w is None else tuple(np.shape(weight.w))
    shapes = f"{_name(weight)} has axes {axes}, and w, a, b and scale of shapes {w}, {a}, {b} and {scale}"
    expected = (n + inner + 1, n + 1 + len(weight.axes_of("out")), n)
    if (len(a), len(b), len(scale)) != expected or w is not None and len(w) != len(axes):
        raise ValueError(
            f"{shapes}: it was stacked or mapped after it was made. Take one of the stack: "
            "jax.tree.map(lambda x: x[0], stacked)."
        )
    lead, ins, outs = (a[:n], a[n:-1], b[n + 1 :]) if w is None else sizes(w, axes)
    rank = a[-1]
    if (a, b, scale) != ((*lead, *ins, rank), (*lead, rank, *outs), lead) or 0 in (*a, *b):
        raise ValueError(
            f"{shapes}, which do not fit: a must be batch + in + (rank,), b batch + (rank,) + out and scale "
            "batch, with no size 0. Make it by lora_jax.LoraWeight(w, a, b, scale, axes), which compares "
            "them."
        )


def _base(weight: LoraWeight) -> np.ndarray:
    """The weight as (batch, in, out)."""
    if weight.w is None:
        raise ValueError(
            f"{_name(weight)} has no w, as in an Adapter or one half of a partition. Put "
            "it on its base: lora_jax.attach(params, adapter), or lora_jax.combine(trainable, frozen)."
        )
    w = _array(weight.w, f"w of {_name(weight)}")
    batch, inner, outer = sizes(w.shape, weight.axes)
    w = w.transpose([axis for kind in AXIS_KINDS for axis in weight.axes_of(kind)])
    return w.reshape(*batch, math.prod(inner), math.prod(outer))


def _directions(x: Any, of: str) -> tuple[np.ndarray, np.ndarray]:
    """Singular vectors (batch, d, k), and which of them are not arbitrary (batch, k)."""
    if is_wrapped_leaf(x):
        if of in ("in", "out"):
            found, defined = _decomposed(x)
            return found.inputs if of == "in" else found.outputs, defined
        a, b, _ = _factors(x)
        x = (a if of == "a" else _transposed(b)).astype(np.float64)
    elif np.ndim(x) < 2:
        raise ValueError(
            f"subspace_similarity: {_name(x)} is no matrix; write an array of shape (..., d, n), or a "
            "LoraWeight."
        )
    else:
        where = f"{_name(x)} given to subspace_similarity"
        x = _float64(_array(x, where), where)
    u, values, _ = np.linalg.svd(x, full_matrices=False)
    return u, _defined(values, values.max(-1, initial=0.0), *x.shape[-2:])


def _defined(values: np.ndarray, size: np.ndarray, *shape: int) -> np.ndarray:
    """Which singular values are more than the rounding of a computation with numbers of a size."""
    return values > (_EPS * max(shape) * size)[..., None]


def _values(values: Any, name: str) -> np.ndarray:
    """Singular values in float64, over the largest of them, which no rank depends on."""
    if isinstance(values, (SVD, LoraWeight)):
        raise TypeError(
            f"{name} takes singular values, and no {type(values).__name__}; write {name}(svd(weight).values)."
        )
    where = f"what {name} was given"
    array = _concrete(values, where)
    if np.issubdtype(array.dtype, np.integer):
        array = array.astype(np.float64)
    array = _float64(_array(array, where), where)
    if array.ndim < 1 or (array < 0).any():
        raise ValueError(f"{name} takes singular values, of shape (..., k) and none below zero.")
    largest = array.max(-1, keepdims=True, initial=0.0)
    return array / np.where(largest > 0, largest, 1.0)


def _concrete(x: Any, where: str) -> np.ndarray:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(x)):
        raise TypeError(f"{where} is traced; call it outside of jit, grad and vmap, with concrete arrays.")
    if isinstance(x, jax.ShapeDtypeStruct):
        raise TypeError(f"{where} is a ShapeDtypeStruct, which has no values; give the arrays themselves.")
    return np.asarray(x)


def _array(x: Any, where: str) -> np.ndarray:
    array = _concrete(x, where)
    # By jax, since numpy does not know bfloat16 and its kin for floating.
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{where} has dtype {array.dtype}, and not one of real floating numbers.")
    return array


def _float64(x: np.ndarray, where: str) -> np.ndarray:
    _require_finite(x, where)
    return x.astype(np.float64)


def _require_finite(x: np.ndarray, where: str) -> None:
    if not np.isfinite(x).all():
        raise ValueError(
            f"{where} has an entry that is infinite or not a number; if it is a factor, its run diverged."
        )


def _transposed(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2)


def _norm(x: np.ndarray) -> np.ndarray:
    # The squares of large or small entries would leave float64.
    largest = np.abs(x).max((-2, -1), keepdims=True, initial=0.0)
    squares = (x / np.where(largest > 0, largest, 1.0)) ** 2
    return largest[..., 0, 0] * np.sqrt(np.sum(squares, axis=(-2, -1)))


def _spectral_norm(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, 2, axis=(-2, -1))


def _name(x: Any) -> str:
    if is_wrapped_leaf(x):
        return f"the {type(x).__name__} at {x.path!r}" if x.path else f"a {type(x).__name__}"
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else f"a {type(x).__name__}"
