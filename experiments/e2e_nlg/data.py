"""The E2E data-to-text task: a meaning representation in, a sentence about a restaurant out.

A line is `MR||text`. As in the LoRA paper's preparation, an example is the MR's tokens, the
beginning-of-sequence token as the separator, the text's tokens and the end token; only what follows the
separator counts in the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np
from tokenizers import Tokenizer

from experiments import data

HOME = "https://raw.githubusercontent.com/microsoft/LoRA/main/examples/NLG/data/e2e"
SHA256 = {
    "train": "eae319082237310913d9f37f6a891d48fb3f821f29d86870d2cb4f92ddd72c5a",
    "valid": "ba963113c8401d3d26216c0dc0a6dae1ea6ea927de3bf830e32c41f65401c80d",
    "test": "81b1bcd40c4f12845ec4eb61a77bf43765d112483cd9b2f91ef10bfc1b3d8f13",
}

Pair = tuple[str, str]


def load_split(split: str, folder: str | None = None) -> list[Pair]:
    """The (MR, text) pairs of "train", "valid" or "test"; of one's own files if a folder is given."""
    if folder is not None:
        path = Path(folder) / f"{split}.txt"
        if not path.is_file():
            raise data.DataError(f"{path} does not exist; it should hold lines MR||text.")
    else:
        path = data.fetch(f"e2e/{split}.txt", f"{HOME}/{split}.txt", SHA256[split])
    return read_pairs(path)


def read_pairs(path: Path) -> list[Pair]:
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        mr, separator, text = line.partition("||")
        if not (separator and mr.strip() and text.strip()):
            raise data.DataError(f"{path}, line {number}: {line[:60]!r} is not MR||text.")
        pairs.append((mr.strip(), text.strip()))
    return pairs


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokenised examples, padded on the right to one length.

    `tokens` is int32 (examples, length); in row i the text is `tokens[i, start[i]:end[i]]`.
    """

    tokens: np.ndarray
    start: np.ndarray
    end: np.ndarray
    dropped: int

    def __len__(self) -> int:
        return len(self.tokens)

    def row(self, index: int) -> dict[str, np.ndarray]:
        """One example: its tokens, and a weight of 1 at every token that counts in the loss."""
        position = np.arange(self.tokens.shape[1])
        weight = (position >= self.start[index]) & (position < self.end[index])
        return {"tokens": self.tokens[index], "weight": weight.astype(np.float32)}


def encode_prompts(mrs: list[str], tokenizer: Tokenizer, bos_id: int) -> list[list[int]]:
    """The tokens that come before a text: beginning-of-sequence, MR, separator."""
    encoded = tokenizer.encode_batch(mrs, add_special_tokens=False)
    return [[bos_id, *e.ids, bos_id] for e in encoded]


def encode(pairs: list[Pair], tokenizer: Tokenizer, length: int | None, bos_id: int, eos_id: int) -> Examples:
    """Tokenise; examples longer than `length` are dropped and counted, never cut.

    Without a length it is that of the longest example, rounded up to a multiple of 32.
    """
    prompts = encode_prompts([mr for mr, _ in pairs], tokenizer, bos_id)
    texts = tokenizer.encode_batch([text for _, text in pairs], add_special_tokens=False)
    rows = [(prompt, [*text.ids, eos_id]) for prompt, text in zip(prompts, texts, strict=True)]
    if length is None:
        length = -(-max(len(prompt) + len(text) for prompt, text in rows) // 32) * 32
    kept = [(prompt, text) for prompt, text in rows if len(prompt) + len(text) <= length]
    if not kept:
        raise data.DataError(f"none of {len(rows)} examples fits in {length} tokens; raise --length.")
    tokens = np.full((len(kept), length), eos_id, np.int32)
    for row, (prompt, text) in zip(tokens, kept, strict=True):
        row[: len(prompt) + len(text)] = prompt + text
    start = np.array([len(prompt) for prompt, _ in kept], np.int32)
    end = start + np.array([len(text) for _, text in kept], np.int32)
    return Examples(tokens, start, end, dropped=len(rows) - len(kept))


def train_batches(examples: Examples, batch: int, seed: int) -> grain.DatasetIterator:
    """Endless shuffled batches, each epoch in another order, fixed by the seed.

    The iterator's `get_state()` is a small dict; `set_state` on a new iterator resumes from there.
    """
    if len(examples) < batch:
        raise data.DataError(f"{len(examples)} examples do not fill a batch of {batch}; lower --batch.")
    dataset = grain.MapDataset.range(len(examples)).seed(seed).shuffle().map(examples.row)
    dataset = dataset.batch(batch, drop_remainder=True).repeat()
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


def eval_batches(examples: Examples, batch: int) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order; the last batch is filled up with examples of weight 0."""
    for first in range(0, len(examples), batch):
        rows = [examples.row(i) for i in range(first, min(first + batch, len(examples)))]
        rows += [{**rows[0], "weight": np.zeros_like(rows[0]["weight"])}] * (batch - len(rows))
        yield {key: np.stack([row[key] for row in rows]) for key in rows[0]}
