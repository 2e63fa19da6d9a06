"""The metrics of the E2E challenge without Java or Perl: BLEU, NIST, ROUGE-L and CIDEr.

A metric is two functions: `statistics(texts, references)` gives one row of numbers for every text, and
`score(total)` the figure of the rows' sum, (..., k) to (...,). So a corpus is scored once, and the bootstrap
over its texts only adds rows up again:

    score(texts, references)                  # {"BLEU": 0.61, "NIST": 8.9, "ROUGE-L": 0.64, "CIDEr": 1.9}

BLEU and NIST are mteval-v13a's, on its tokens without case; BLEU is computed by sacrebleu. ROUGE-L and CIDEr
are those of the COCO caption evaluation, on Penn Treebank tokens without case and punctuation. What the
challenge's own script calls CIDEr is CIDEr-D: counts are clipped, and lengths that differ are penalised.

On the test set's own references (tests/test_metrics.py) BLEU and NIST agree with that script in every digit
that it prints, and ROUGE-L and CIDEr within .003: their tokens are those of Stanford's tokenizer, of which
`treebank` does what matters to this text.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

try:
    from sacrebleu.metrics import BLEU
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
except ImportError as error:
    raise ModuleNotFoundError(f'{error}; run: pip install -e ".[experiments]"') from None

Texts = Sequence[str]
References = Sequence[Sequence[str]]
Tokens = tuple[str, ...]


class Metric(NamedTuple):
    statistics: Callable[[Texts, References], np.ndarray]
    score: Callable[[np.ndarray], np.ndarray]


def statistics(texts: Texts, references: References) -> dict[str, np.ndarray]:
    """For each metric one row of numbers per text; `references[i]` are those of `texts[i]`.

    Raises:
        ValueError: there are no texts, not as many lists of references, or one of these is empty.
    """
    if len(texts) != len(references) or not len(texts):
        raise ValueError(f"{len(texts)} texts and {len(references)} lists of references; give one for each.")
    for number, (text, some) in enumerate(zip(texts, references, strict=True)):
        if isinstance(some, str) or not some or not all(ref.strip() for ref in some):
            raise ValueError(f"the references of text {number}, {text[:40]!r}, are {some!r}; give texts.")
    return {name: metric.statistics(texts, references) for name, metric in METRICS.items()}


def score(texts: Texts, references: References) -> dict[str, float]:
    """The figure of each metric for a whole corpus; BLEU and ROUGE-L are between 0 and 1."""
    rows = statistics(texts, references)
    return {name: float(METRICS[name].score(rows[name].sum(0))) for name in rows}


def bootstrap(rows: np.ndarray, metric: str, draws: int, seed: int) -> np.ndarray:
    """A metric's figure on `draws` corpora of as many texts, drawn with replacement: (draws, ...).

    `rows` (texts, ..., k) are its statistics. The same seed draws the same texts, so the figures of two
    systems on one test set are paired. The weights of n-grams in NIST and CIDEr stay those of the whole set.
    """
    n = len(rows)
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    return METRICS[metric].score(np.tensordot(times, rows, axes=1))


# --- BLEU ----------------------------------------------------------------------------------------------


def bleu_statistics(texts: Texts, references: References) -> np.ndarray:
    """Matches and counts of n-grams of 1 to 4 tokens, and lengths of the text and the closest reference."""
    bleu = BLEU(lowercase=True, force=True)
    rows = []
    for text, some in zip(texts, references, strict=True):
        found = bleu.corpus_score([text], [[reference] for reference in some])
        rows.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    return np.array(rows, np.float64)


def bleu_score(total: np.ndarray) -> np.ndarray:
    def one(row: Sequence[float]) -> float:
        return BLEU.compute_bleu(list(row[:4]), list(row[4:8]), int(row[8]), int(row[9])).score / 100

    return np.apply_along_axis(one, -1, total)


# --- NIST ----------------------------------------------------------------------------------------------

NIST_ORDER = 5


def mteval(text: str) -> Tokens:
    """Tokens as mteval-v13a makes them, without case."""
    return tuple(Tokenizer13a()(text.lower()).split())


# The references of one test set are scored against many times.
@functools.lru_cache(1 << 14)
def ngrams(tokens: Tokens, order: int) -> Counter[Tokens]:
    """How often every n-gram of 1 to `order` tokens occurs."""
    starts = ((n, i) for n in range(1, order + 1) for i in range(len(tokens) - n + 1))
    return Counter(tokens[i : i + n] for n, i in starts)


def nist_statistics(texts: Texts, references: References) -> np.ndarray:
    """Information that matches carry and number of n-grams, by order; lengths of the text and of references.

    An n-gram's information is log2 of how often its first n - 1 tokens occur in all references, for each time
    that it does itself.
    """
    tokens = [[mteval(reference) for reference in some] for some in references]
    counts: Counter[Tokens] = Counter()
    for some in tokens:
        for reference in some:
            counts.update(ngrams(reference, NIST_ORDER))
            counts[()] += len(reference)  # what a single token follows
    rows = np.zeros((len(texts), 2 * NIST_ORDER + 2))
    for row, text, some in zip(rows, texts, tokens, strict=True):
        words = mteval(text)
        most: Counter[Tokens] = Counter()
        for reference in some:
            most |= ngrams(reference, NIST_ORDER)
        for ngram, times in ngrams(words, NIST_ORDER).items():
            row[NIST_ORDER + len(ngram) - 1] += times
            if matches := min(times, most[ngram]):
                row[len(ngram) - 1] += matches * math.log2(counts[ngram[:-1]] / counts[ngram])
        row[-2:] = len(words), np.mean([len(reference) for reference in some])
    return rows


def nist_score(total: np.ndarray) -> np.ndarray:
    """Mean information per n-gram, summed over n, times a penalty that is 1/2 at two thirds of the length."""
    information, counts = total[..., :NIST_ORDER], total[..., NIST_ORDER:-2]
    ratio = np.minimum(total[..., -2] / total[..., -1], 1.0)
    with np.errstate(divide="ignore"):  # no token at all: the penalty is 0
        penalty = 0.5 ** (np.log(ratio) / math.log(1.5)) ** 2
    return np.sum(information / np.maximum(counts, 1.0), axis=-1) * penalty


# --- ROUGE-L and CIDEr ---------------------------------------------------------------------------------

CONTRACTIONS = r"n't|'(?:s|m|d|re|ve|ll)"


@functools.lru_cache(1 << 14)
def treebank(text: str) -> Tokens:
    """Penn Treebank tokens without case and punctuation: don't is two words, kid-friendly one, £20 two."""
    text = re.sub(r"([£$€#%&@()\[\]{}])", r" \1 ", text.lower())
    text = re.sub(rf"(?<=\w)({CONTRACTIONS})(?!\w)", r" \1", text)
    text = re.sub(r"(?<!\d)[,:]|[,:](?!\d)|[;?!\"`]|(?<=\d)-(?!\w)", " ", text)
    words = (w if re.fullmatch(CONTRACTIONS, w) else w.strip(".'") for w in text.split())
    return tuple(word for word in words if word.strip("-"))


def longest_common(first: Tokens, second: Tokens) -> int:
    """How many tokens the longest common subsequence has."""
    best = [0] * (len(second) + 1)
    for x in first:
        before = 0  # best[j - 1] without x
        for j, y in enumerate(second, start=1):
            before, best[j] = best[j], before + 1 if x == y else max(best[j], best[j - 1])
    return best[-1]


def rouge_l(words: Tokens, references: Sequence[Tokens], beta: float = 1.2) -> float:
    """(1 + β²) P R / (R + β² P), with the best precision P and the best recall R, of any two references."""
    common = [longest_common(words, reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(words)
    recall = max(n / len(reference) for n, reference in zip(common, references, strict=True) if reference)
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def rouge_statistics(texts: Texts, references: References) -> np.ndarray:
    pairs = zip(texts, references, strict=True)
    return _means(rouge_l(treebank(text), [treebank(ref) for ref in some]) for text, some in pairs)


CIDER_ORDER, CIDER_SIGMA = 4, 6.0


def cider_statistics(texts: Texts, references: References) -> np.ndarray:
    """Ten times the mean, over references and n, of cos(tf-idf of n-grams) exp(-(difference in length)²/2σ²).

    A text's counts are clipped to the reference's in the product, not in the norm. The idf is that of the
    references, a text's own together being one document.
    """
    tokens = [[treebank(reference) for reference in some] for some in references]
    documents: Counter[Tokens] = Counter()
    for some in tokens:
        documents.update(set().union(*(ngrams(reference, CIDER_ORDER) for reference in some)))

    def vectors(words: Tokens) -> list[dict[Tokens, float]]:
        found: list[dict[Tokens, float]] = [{} for _ in range(CIDER_ORDER)]
        for ngram, times in ngrams(words, CIDER_ORDER).items():
            found[len(ngram) - 1][ngram] = times * math.log(len(tokens) / max(1, documents[ngram]))
        return found

    def consensus(words: Tokens, some: Sequence[Tokens]) -> float:
        ours, total = vectors(words), 0.0
        for reference in some:
            apart = len(words) - len(reference)
            near = math.exp(-(apart**2) / (2 * CIDER_SIGMA**2))
            for x, y in zip(ours, vectors(reference), strict=True):
                product = sum(min(x[ngram], y[ngram]) * y[ngram] for ngram in x.keys() & y.keys())
                total += near * product / (_norm(x) * _norm(y) or 1.0)
        return 10 * total / (CIDER_ORDER * len(some))

    return _means(consensus(treebank(text), some) for text, some in zip(texts, tokens, strict=True))


def _norm(vector: dict[Tokens, float]) -> float:
    return math.sqrt(sum(x * x for x in vector.values()))


def _means(values: Iterator[float]) -> np.ndarray:
    return np.array([[value, 1.0] for value in values])


def mean_score(total: np.ndarray) -> np.ndarray:
    return total[..., 0] / total[..., 1]


METRICS: dict[str, Metric] = {
    "BLEU": Metric(bleu_statistics, bleu_score),
    "NIST": Metric(nist_statistics, nist_score),
    "ROUGE-L": Metric(rouge_statistics, mean_score),
    "CIDEr": Metric(cider_statistics, mean_score),
}
