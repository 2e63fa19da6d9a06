"""GLUE's metrics, and the paired bootstrap.

A metric takes labels and predictions of shape (..., rows), arrays that broadcast, and gives (...): classes
as integers for accuracy, F1 and Matthews, numbers for Pearson and Spearman. What is undefined, since all
labels or all predictions are equal, is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

Metric = Callable[[Any, Any], np.ndarray]


def accuracy(labels: Any, predictions: Any) -> np.ndarray:
    return np.mean(np.asarray(labels) == np.asarray(predictions), axis=-1)


def f1(labels: Any, predictions: Any) -> np.ndarray:
    """Of class 1: 2 TP / (2 TP + FP + FN)."""
    y, p = np.asarray(labels) == 1, np.asarray(predictions) == 1
    return _ratio(2.0 * np.sum(y & p, axis=-1), np.sum(y, axis=-1) + np.sum(p, axis=-1))


def matthews(labels: Any, predictions: Any) -> np.ndarray:
    """Of two classes, 0 and 1: the correlation of labels and predictions."""
    return pearson(np.asarray(labels) == 1, np.asarray(predictions) == 1)


def pearson(labels: Any, predictions: Any) -> np.ndarray:
    x, y = (np.asarray(z, np.float64) for z in (labels, predictions))
    x, y = x - x.mean(axis=-1, keepdims=True), y - y.mean(axis=-1, keepdims=True)
    return _ratio(np.sum(x * y, axis=-1), np.sqrt(np.sum(x**2, axis=-1) * np.sum(y**2, axis=-1)))


def spearman(labels: Any, predictions: Any) -> np.ndarray:
    """Pearson's of the ranks; equal values share the mean of their ranks."""
    return pearson(rankdata(labels, axis=-1), rankdata(predictions, axis=-1))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.where(below > 0, above / np.where(below > 0, below, 1), 0.0)


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "F1": f1,
    "Matthews": matthews,
    "Pearson": pearson,
    "Spearman": spearman,
}

# The first is what the LoRA paper's Table 2 reports; GLUE has the mean of two where there are two.
OF_TASK = {
    "CoLA": ("Matthews",),
    "SST-2": ("accuracy",),
    "MRPC": ("accuracy", "F1"),
    "STS-B": ("Pearson", "Spearman"),
    "QQP": ("accuracy", "F1"),
    "MNLI": ("accuracy",),
    "QNLI": ("accuracy",),
    "RTE": ("accuracy",),
}


def scores(task: str, labels: Any, predictions: Any) -> dict[str, float]:
    """All metrics of a task, by name."""
    return {name: float(METRICS[name](labels, predictions)) for name in OF_TASK[task]}


class Interval(NamedTuple):
    value: float
    low: float
    high: float


def bootstrap(
    metric: Metric,
    labels: Any,
    predictions: Any,
    against: Any = None,
    *,
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A metric, or the difference to another system's on the same rows, with its bootstrap interval.

    The value is the mean over seeds of the metric over all rows. A draw takes as many rows with
    replacement, the same for every seed and both systems, and as many seeds with replacement, the same for
    both systems (run i of one is paired with run i of the other: same data order, same new head); the
    interval holds the middle `level` of the draws. So it has the sampling of the development rows
    and that of the seeds; of few seeds it knows little, and takes their spread as too small by the factor
    sqrt(1 - 1 / seeds).

    Args:
        metric: One of `METRICS`.
        labels: (rows,).
        predictions: (seeds, rows).
        against: (seeds, rows); the difference is predictions' minus against's.
        draws: How many draws.
        level: The share of them that the interval holds.
        seed: Of the draws.

    Raises:
        ValueError: the shapes do not fit.
    """
    labels, systems = np.asarray(labels), [np.asarray(predictions)]
    if against is not None:
        systems.append(np.asarray(against))
    for system in systems:
        if system.ndim != 2 or system.shape != (systems[0].shape[0], *labels.shape):
            raise ValueError(
                f"predictions are of shape {[x.shape for x in systems]}, labels of {labels.shape}; give "
                "(seeds, rows) for every system, and (rows,)."
            )

    def value(labels: Any, rows: Any, seeds: Any) -> np.ndarray:
        # (draws, seeds) -> (draws,), one system less the other
        found = [np.stack([metric(labels, run[rows]) for run in system], -1) for system in systems]
        means = [np.take_along_axis(x, seeds, axis=-1).mean(-1) for x in found]
        return means[0] - means[1] if len(means) == 2 else means[0]

    runs, count = systems[0].shape
    rng = np.random.default_rng(seed)
    drawn = []
    for start in range(0, draws, 500):  # few at a time, for the memory's sake
        size = min(500, draws - start)
        rows = rng.integers(count, size=(size, count))
        drawn.append(value(labels[rows], rows, rng.integers(runs, size=(size, runs))))
    whole = np.arange(count)[None]
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value(labels[whole], whole, np.arange(runs)[None])[0]), float(low), float(high))
