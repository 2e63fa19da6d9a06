r"""What a trained update looks like: its singular values and directions, beside W's and another run's.

These are the measurements of LoRA's sections 7.2 and 7.3 (arXiv:2106.09685), made on the host in float64
whatever the dtype of the arrays, and returned as numpy arrays; no update is ever formed. In and out axes
are flattened in the order in which the `LoraWeight` has them, its batch axes lead every result, its scale
counts, and of a fused kernel the adapted parts. The paper writes W x where this library has x @ W: its
left singular vectors are the `outputs` here, its right ones the `inputs`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax import nnx
from lora_jax.params import require_wrapped
from lora_jax.tree import leaves_with_path
from lora_jax.weight import LoraWeight, is_wrapped_leaf


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
        weight: ‖W‖.
        onto_update: ‖Uᵀ W V‖ with the k singular directions of ΔW.
        onto_weight: The same with W's own top k directions, the largest that it can be.
        onto_random: The same with random directions: the root of the mean of its square.
        factor: update / onto_update; nan for an update that is zero, inf where W has nothing there.
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
        weight: A `LoraWeight`, of concrete arrays; its w may be None, as in an `Adapter`.

    Returns:
        An `SVD`. The directions of singular values that are zero are arbitrary.

    Raises:
        ValueError: a factor is missing, or has an entry that is infinite or not a number; the weight was
            stacked after it was made.
        TypeError: it is no LoraWeight, or a factor no array of real floating numbers.

    >>> weight = LoraWeight(np.zeros((3, 2)), np.diag([3.0, 4.0])[[0, 1, 1]], np.eye(2), scale=2.0)
    >>> svd(weight).values.round(6).tolist()
    [11.313708, 6.0]
    """
    a, b, scale = (_float64(x, _name(weight)) for x in _factors(weight))
    left, lower = np.linalg.qr(a)
    right, upper = np.linalg.qr(_transposed(b))
    x, values, y = np.linalg.svd(scale[..., None, None] * (lower @ _transposed(upper)), full_matrices=False)
    return SVD(left @ x, values, right @ _transposed(y))


def effective_rank(values: Any) -> np.ndarray:
    r"""Roy and Vetterli's effective rank: how many directions an update uses, weighed by its singular values.

    .. math:: \exp\Bigl(-\sum_i p_i \ln p_i\Bigr), \qquad p_i = \sigma_i \Big/ \sum_j \sigma_j

    It is k for k equal singular values, near 1 where one has nearly all, and here 0 where all are zero.
    The definition is that of "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.

    Args:
        values: Singular values, such as `svd(weight).values`: shape batch + (k,), in any order.

    Returns:
        float64 of shape batch.

    Raises:
        ValueError: a value is negative or not finite, or there is no axis of values.
        TypeError: they are no floating numbers.

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
    largest = values.max(-1, keepdims=True, initial=0.0)
    return np.sum((values / np.where(largest > 0, largest, 1.0)) ** 2, -1)


def subspace_similarity(first: Any, second: Any, of: Literal["a", "b", "in", "out"] = "a") -> np.ndarray:
    r"""φ(i, j) for all i and j: the share of one's top i directions that lies in the other's top j.

    .. math:: \varphi(A_1, A_2, i, j) = \frac{\|U_1[:, :i]^\top\, U_2[:, :j]\|_F^2}{\min(i, j)} \in [0, 1]

    with U₁ and U₂ the singular vectors of A₁ and A₂ in the space that both share, by falling singular value.
    It is 1 if the smaller space lies in the larger, 0 if they are orthogonal, and between random spaces of
    d dimensions max(i, j) / d in the mean: that is what to compare with. One SVD of each gives all of it.

    The definition is that of LoRA (arXiv:2106.09685), section 7.2. With p = min(i, j) and the projection
    metric d of its appendix G, φ = 1 - d²/p; the appendix misprints it as (1 - d²)/p.

    Args:
        first: A `LoraWeight`, or an array of shape batch + (d, n), whose left singular vectors are taken: a
            matrix of random numbers, or w.
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
    return np.where(defined, total / np.minimum(i[:, None], j), np.nan)


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
    u, values, v = svd(weight)
    w = _float64(_base(weight), _name(weight))
    defined = _defined(values, u.shape[-2], v.shape[-2])
    count = defined.sum(-1)
    inside = (_transposed(u) @ w @ v) * (defined[..., :, None] & defined[..., None, :])
    own = np.linalg.svd(w, compute_uv=False)[..., : values.shape[-1]] * defined
    update, size, onto = _norm(values[..., None]), _norm(w), _norm(inside)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.where(count > 0, update / onto, np.nan)
    random = size * count / math.sqrt(w.shape[-2] * w.shape[-1])
    return Amplification(update, size, onto, _norm(own[..., None]), random, factor)


def matrices(wrapped: Any) -> dict[str, LoraWeight]:
    """Every adapted matrix of a tree by itself: a plain `LoraWeight` with axes ("in", "out") for each.

    Stacked layers are taken apart, several in or out axes become one, each adapted part of a fused kernel
    has its own rows, columns and w, and the zeros that fill up smaller ranks are left out; a layer of
    rank 0 is not there. The update is that of the tree.

    Args:
        wrapped: A tree from `wrap`, an `nnx.Module`, or the `leaves` of an `Adapter`, which have no w.

    Returns:
        LoraWeights of numpy arrays, in the dtypes that they had, by name: the path, then the layer and the
        part's outputs as they would be indexed, such as layers/qkv/kernel[3][:, 0:64].

    Raises:
        ValueError: no leaf is adapted; parts of a kernel overlap; or as for `svd`.

    >>> import lora_jax
    >>> params = {"layers": {"kernel": jnp.ones((2, 8, 12))}}
    >>> wrapped = lora_jax.wrap(params, rank=[2, 1], axes={"layers": ("batch", "in", "out")})
    >>> [(name, x.shape, x.rank) for name, x in matrices(wrapped).items()]
    [('layers/kernel[0]', (8, 12), 2), ('layers/kernel[1]', (8, 12), 1)]
    >>> fused = lora_jax.wrap({"qkv": {"kernel": jnp.ones((8, 12))}}, 2, parts={"qkv": [(0, 4), (8, 12)]})
    >>> [(name, x.shape, x.rank) for name, x in matrices(fused).items()]
    [('qkv/kernel[:, 0:4]', (8, 4), 2), ('qkv/kernel[:, 8:12]', (8, 4), 2)]
    """
    tree, _ = nnx.opened(wrapped)
    require_wrapped(tree, "matrices")
    found = {}
    for path, leaf in leaves_with_path(tree, is_wrapped_leaf):
        if not isinstance(leaf, LoraWeight):
            continue
        a, b, scale = _factors(leaf)
        w = None if leaf.w is None else _base(leaf)
        for place in np.ndindex(scale.shape):
            name = path + "".join(f"[{i}]" for i in place)
            for label, columns, outputs in _parts(leaf):
                left, right = a[place][:, columns], b[place][columns][:, outputs]
                alive = left.any(0) | right.any(1)
                if alive.any():
                    found[name + label] = leaf.replace(
                        w=None if w is None else w[place][:, outputs],
                        a=left[:, alive],
                        b=right[alive],
                        scale=scale[place],
                        axes=("in", "out"),
                        path=name + label,
                        blocks=(),
                    )
    if not found:
        raise ValueError("matrices was given a tree in which no leaf is adapted; see lora_jax.summary(tree).")
    return found


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


def _factors(weight: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The factors (batch, in, r) and (batch, r, out), flattened by kind, and the scale (batch,)."""
    if not isinstance(weight, LoraWeight):
        raise TypeError(
            f"{_name(weight)} is no LoraWeight; give a leaf of the tree that lora_jax.wrap returned, or one "
            "of lora_jax.analysis.matrices(tree)."
        )
    if weight.a is None or weight.b is None or weight.scale is None:
        raise ValueError(
            f"the LoraWeight at {weight.path!r} is one half of a partition. Give the whole: "
            "lora_jax.combine(trainable, frozen)."
        )
    batch, inner, outer = (len(weight.axes_of(kind)) for kind in ("batch", "in", "out"))
    sizes = [tuple(np.shape(x)) for x in (weight.a, weight.b, weight.scale)]
    if tuple(map(len, sizes)) != (batch + inner + 1, batch + 1 + outer, batch):
        raise ValueError(
            f"the LoraWeight at {weight.path!r} has axes {weight.axes}, and a, b and scale of shapes "
            f"{', '.join(map(str, sizes))}: it was stacked or mapped after it was made. Take one of the "
            "stack: jax.tree.map(lambda x: x[0], stacked)."
        )
    lead, rank = sizes[2], weight.rank
    a, b, scale = (_array(x, _name(weight)) for x in (weight.a, weight.live_b, weight.scale))
    return a.reshape(*lead, -1, rank), b.reshape(*lead, rank, -1), scale


def _base(weight: LoraWeight) -> np.ndarray:
    """The weight as (batch, in, out)."""
    if weight.w is None:
        raise ValueError(
            f"the LoraWeight at {weight.path!r} has no w, as in an Adapter or one half of a partition. Put "
            "it on its base: lora_jax.attach(params, adapter), or lora_jax.combine(trainable, frozen)."
        )
    kinds = ("batch", "in", "out", "unit")
    w = _array(weight.w, _name(weight))
    sizes = {kind: [w.shape[axis] for axis in weight.axes_of(kind)] for kind in kinds}
    w = w.transpose([axis for kind in kinds for axis in weight.axes_of(kind)])
    return w.reshape(*sizes["batch"], math.prod(sizes["in"]), math.prod(sizes["out"]))


def _directions(x: Any, of: str) -> tuple[np.ndarray, np.ndarray]:
    """Singular vectors (batch, d, k), and which of them are not arbitrary (batch, k)."""
    if isinstance(x, LoraWeight):
        if of in ("in", "out"):
            u, values, v = svd(x)
            return u if of == "in" else v, _defined(values, u.shape[-2], v.shape[-2])
        a, b, _ = _factors(x)
        x = _float64(a if of == "a" else _transposed(b), _name(x))
    elif np.ndim(x) < 2:
        raise ValueError(
            f"subspace_similarity: {_name(x)} is no matrix; write an array of shape (..., d, n), or a "
            "LoraWeight."
        )
    else:
        x = _float64(_array(x, "subspace_similarity"), "subspace_similarity")
    u, values, _ = np.linalg.svd(x, full_matrices=False)
    return u, _defined(values, *x.shape[-2:])


def _defined(values: np.ndarray, *sizes: int) -> np.ndarray:
    """Which singular values are more than the rounding of their computation."""
    bound = values.max(-1, keepdims=True, initial=0.0) * max(sizes) * np.finfo(np.float64).eps
    return values > bound


def _values(values: Any, name: str) -> np.ndarray:
    values = _float64(_array(values, name), name)
    if values.ndim < 1 or (values < 0).any():
        raise ValueError(f"{name} takes singular values, of shape (..., k) and none below zero.")
    return values


def _array(x: Any, where: str) -> np.ndarray:
    array = np.asarray(x)
    # By jax, since numpy does not know bfloat16 and its kin for floating.
    if not jnp.issubdtype(array.dtype, jnp.floating):
        kind = f"{type(x).__name__} of dtype {array.dtype}"
        raise TypeError(f"{where}: {kind} is not an array of real floating numbers.")
    return array


def _float64(x: np.ndarray, where: str) -> np.ndarray:
    wide = x.astype(np.float64)
    if not np.isfinite(wide).all():
        raise ValueError(f"{where}: some entry is infinite or not a number; its run diverged.")
    return wide


def _transposed(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2)


def _norm(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.sum(x**2, axis=(-2, -1)))


def _name(x: Any) -> str:
    if isinstance(x, LoraWeight):
        return f"the LoraWeight at {x.path!r}" if x.path else "a LoraWeight"
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else f"a {type(x).__name__}"
