"""GLUE's tasks as arrays of tokens, and batches of few shapes.

    task = load_task("RTE", tokenizer, length=128)
    rest, held_out = split(task.train, 224, seed=0)
    for batch in epoch(rest, 32, seed=0):
        ...

The rows are those of a public repository that holds a part of each task: its development sets are slices
of GLUE's training sets (GLUE's own test labels are not public), and of MNLI, QNLI and QQP it has 9,999 rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from experiments import data

COMMIT = "d30afcc719deb8d148396b5f4c669cd1264465fb"
HOME = f"https://raw.githubusercontent.com/ZhengxiangShi/PowerfulPromptFT/{COMMIT}/data/glue_pretrain"
# Of the public files.
SHA256 = {
    "CoLA": {
        "train": "9123bf0375d2010f2e80224fb727d8a47521b5955d744aad99ffd69b98658df6",
        "dev": "d9612aab5eaefd614a724b142484f6a5ad891fdc4cbdea553ab3853d68f2a662",
    },
    "MNLI": {
        "train": "dae8f1133d8d48b3d6dc747b244eb75273ab398893eb2c459456bd46748c8e0b",
        "dev": "1229f3294d9fb83a61642fb7bf1fb7a98a0954218dca43e69a3840fabf37671a",
    },
    "MRPC": {
        "train": "7a7c3f02f2d5e4486af62b7a5cbb773d99968178d9e48e8b2548dcf0aa17844e",
        "dev": "15bba71be3be513229410843429c15639f8a3a5980aefe593410fa484951d029",
    },
    "QNLI": {
        "train": "ec4595783885f0363844d89c5685c2cebb25b415769f29445153d807d7aaed00",
        "dev": "b5b9c30765555407d7522d4c3a24ac6b0bd3d87c851cd5630ba1e1dc2f87b4ca",
    },
    "QQP": {
        "train": "90d61eea319216f1968490fe1fcd3d3e3aba6003ad0b1792dba235c2909042c2",
        "dev": "d3f19553e7842d0bf6369dcb4972a1a093a9ab95cb4de9eda1dd2101daa6a04d",
    },
    "RTE": {
        "train": "ff143f754243cac82de3d73cd4fdc41e86e3f38568ba1269092792cc249c3bb8",
        "dev": "dba86642bad6c742fe7886af570da3ff589892f7184acd3b5ac27403d39d6fa0",
    },
    "SST-2": {
        "train": "6ba1f709c7225db64e803dc61bdd2dbddbc5b6f45878f59c189c0d06f5ca12bc",
        "dev": "9822650f1057de4f703b20f19a053f4765c7d0e391a9cdae3d5aa8d949225813",
    },
    "STS-B": {
        "train": "3edac43ed14b70a19515683c4c096c75bc43768a97aedbca1688890b65812612",
        "dev": "2f9e180fc4c03a622f14292a82c796d99c98b28e012c8a160f26a56d46a0a3bd",
    },
}

_BINARY, _ENTAILMENT = ("0", "1"), ("entailment", "not_entailment")
# The classes in the order of their numbers; None is a regression, of a similarity from 0 to 5.
LABELS: dict[str, tuple[str, ...] | None] = {
    "CoLA": _BINARY,
    "SST-2": _BINARY,
    "MRPC": _BINARY,
    "STS-B": None,
    "QQP": _BINARY,
    "MNLI": ("entailment", "neutral", "contradiction"),
    "QNLI": _ENTAILMENT,
    "RTE": _ENTAILMENT,
}

# To which rows are padded: one shape, and one compilation, for each.
WIDTHS = (12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Tokenised rows, padded on the right to one length; `length` counts each row's own tokens."""

    tokens: np.ndarray  # int32 (rows, length)
    types: np.ndarray  # int32 (rows, length): 1 in the second text and the [SEP] after it
    length: np.ndarray  # int32 (rows,)
    labels: np.ndarray  # (rows,): int32 classes, or the float32 of a regression
    cut: int  # how many rows of the task's split were longer and lost an end

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, index: Any) -> Rows:
        """The rows of an index, in its order."""
        return Rows(self.tokens[index], self.types[index], self.length[index], self.labels[index], self.cut)


class Task(NamedTuple):
    name: str
    classes: tuple[str, ...] | None  # None is a regression
    train: Rows
    dev: Rows

    @property
    def outputs(self) -> int:
        """The size of the head: the classes, or 1."""
        return len(self.classes) if self.classes else 1


def read(task: str, split: str) -> list[dict[str, Any]]:
    """The rows of "train" or "dev": {text_a, text_b (or None), label}.

    They are looked for as glue/{task}.{split}.jsonl in the folder that LORA_JAX_DATA names, a row to a line;
    then as the public file, which is downloaded where it is nowhere. Either must hold the same rows.

    Raises:
        DataError: the file is nowhere and cannot be downloaded, or it is not what it should be.
    """
    if task not in SHA256:
        raise data.DataError(f"there is no task {task!r}; there are {sorted(SHA256)}.")
    expected, folder = SHA256[task][split], data.data_folder()
    path = None if folder is None else folder / "glue" / f"{task}.{split}.jsonl"
    if path is None or not path.is_file():
        path = data.fetch(f"glue/{task}.{split}.json", f"{HOME}/{task}/{split}.json", expected)
        return list(json.loads(path.read_text(encoding="utf-8")).values())
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except ValueError as error:
        raise data.DataError(f"{path} is not one JSON object to a line: {error}") from None
    # Written as the public file is, the same rows are the same bytes.
    public = json.dumps({str(i): row for i, row in enumerate(rows)}, indent=4)
    if hashlib.sha256(public.encode()).hexdigest() != expected:
        raise data.DataError(
            f"{path} does not hold the rows of {HOME}/{task}/{split}.json. Move it away to have the right "
            "file downloaded."
        )
    return rows


def tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model's folder, which neither cuts nor pads."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise data.DataError(f"{path} does not exist; it should be the tokenizer of the model beside it.")
    made = Tokenizer.from_file(str(path))
    made.no_truncation()
    made.no_padding()
    return made


def encode(
    rows: list[dict[str, Any]], classes: tuple[str, ...] | None, tokenizer: Tokenizer, length: int
) -> Rows:
    """Tokenise as [CLS] a [SEP] or [CLS] a [SEP] b [SEP]; the longer text loses what is too many."""
    labels = labels_of(rows, classes)
    texts = [row["text_a"] if row["text_b"] is None else (row["text_a"], row["text_b"]) for row in rows]
    whole = tokenizer.encode_batch(texts)
    cut = sum(len(x.ids) > length for x in whole)
    if cut:
        tokenizer.enable_truncation(length)
        whole = tokenizer.encode_batch(texts)
        tokenizer.no_truncation()
    pad = tokenizer.token_to_id("[PAD]") or 0
    tokens, types = np.full((len(rows), length), pad, np.int32), np.zeros((len(rows), length), np.int32)
    for i, x in enumerate(whole):
        tokens[i, : len(x.ids)], types[i, : len(x.ids)] = x.ids, x.type_ids
    return Rows(tokens, types, np.array([len(x.ids) for x in whole], np.int32), labels, cut)


def labels_of(rows: list[dict[str, Any]], classes: tuple[str, ...] | None) -> np.ndarray:
    """The numbers of the classes, int32, or the similarities, float32."""
    return np.array([_label(row, classes) for row in rows], np.int32 if classes else np.float32)


def _label(row: dict[str, Any], classes: tuple[str, ...] | None) -> float:
    label = row["label"]
    if classes is not None:
        if label not in classes:
            raise data.DataError(f"the label {label!r} of {row['text_a'][:40]!r} is none of {classes}.")
        return classes.index(label)
    if not 0 <= float(label) <= 5:
        raise data.DataError(f"the label {label!r} of {row['text_a'][:40]!r} is no similarity from 0 to 5.")
    return float(label)


def load_task(name: str, tokenizer: Tokenizer, length: int = 128) -> Task:
    """A task's training and development rows.

    Args:
        name: One of `LABELS`.
        tokenizer: As `tokenizer(folder)` gives it.
        length: The most tokens of a row; longer ones are cut, and counted in `cut`.

    Raises:
        DataError: as `read`; or a label is not one of the task's.
    """
    train, dev = read(name, "train"), read(name, "dev")
    classes = LABELS[name]
    return Task(
        name, classes, encode(train, classes, tokenizer, length), encode(dev, classes, tokenizer, length)
    )


def split(rows: Rows, count: int, seed: int) -> tuple[Rows, Rows]:
    """All but `count` rows, and those: what is chosen on them leaves the development set unseen."""
    if not 0 < count < len(rows):
        raise ValueError(f"{count} rows cannot be held out of {len(rows)}; give a number in between.")
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.take(np.sort(order[count:])), rows.take(np.sort(order[:count]))


def first(rows: Rows, count: int, seed: int) -> Rows:
    """`count` rows drawn by the seed: with a smaller count, some of the same."""
    if count > len(rows):
        raise ValueError(f"there are {len(rows)} rows, not {count}.")
    return rows.take(np.sort(np.random.default_rng(seed).permutation(len(rows))[:count]))


def epoch(
    rows: Rows, batch: int, seed: int | list[int], widths: tuple[int, ...] = WIDTHS
) -> Iterator[dict[str, np.ndarray]]:
    """Every row once, in an order drawn from the seed: ceil(rows / batch) batches, each of one width.

    Rows of similar length come together, padded to the smallest of the ascending widths that holds them; what
    is left over of a width goes into the next. The last batch is filled up with rows of weight 0.

    A batch has `tokens`, `types` and `valid` (batch, width), and `labels` and `weight` (batch,).
    """
    rng = np.random.default_rng(seed)
    batches = list(_grouped(rows, batch, widths, rng))
    for i in rng.permutation(len(batches)):
        width, index = batches[i]
        yield _batch(rows, index, batch, width)


def in_order(
    rows: Rows, batch: int, widths: tuple[int, ...] = WIDTHS
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Batches for evaluation, each after the indices of its rows: `out[index] = result[: len(index)]`."""
    for width, index in _grouped(rows, batch, widths, None):
        yield index, _batch(rows, index, batch, width)


def _grouped(
    rows: Rows, batch: int, widths: tuple[int, ...], rng: np.random.Generator | None
) -> Iterator[tuple[int, np.ndarray]]:
    longest = rows.tokens.shape[1]
    widths = (*(width for width in widths if width < longest), longest)
    place, left = np.searchsorted(widths, rows.length), np.zeros(0, np.int64)
    for i, width in enumerate(widths):
        found = np.flatnonzero(place == i)
        index = np.concatenate([left, found if rng is None else rng.permutation(found)])
        last = i == len(widths) - 1 or not np.any(place > i)
        whole = len(index) if last else len(index) // batch * batch
        for start in range(0, whole, batch):
            yield width, index[start : min(start + batch, whole)]
        if last:
            return
        left = index[whole:]


def _batch(rows: Rows, index: np.ndarray, batch: int, width: int) -> dict[str, np.ndarray]:
    real = len(index)
    index = np.concatenate([index, np.full(batch - real, index[0])])
    return {
        "tokens": rows.tokens[index, :width],
        "types": rows.types[index, :width],
        "valid": np.arange(width) < rows.length[index, None],
        "labels": rows.labels[index],
        "weight": (np.arange(batch) < real).astype(np.float32),
    }
