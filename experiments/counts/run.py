"""Count what LoRA trains in the models of the paper, and of others, from shapes alone.

    LORA_JAX_DATA=... python -m experiments.counts.run

Every row of paper/lora_paper.json (in the folder LORA_JAX_DATA) is wrapped under jax.eval_shape, without a
weight in memory, and counted by lora_jax.summary; so is GPT-2 as LLMs-from-scratch adapts it. The record is
written to results/counts.json, and the table into README.md.

exit code: 0 all counts are those of the file; 1 one differs; 2 the command or the data folder is wrong
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

import lora_jax
from experiments.counts import shapes
from experiments.data import DataError, paper
from experiments.models import bert, gpt2
from experiments.plan import models as plan
from experiments.records import fill, markdown, provenance

HERE = Path(__file__).parent
# RoBERTa's totals in the file are those of a classifier of MNLI's three classes, BERT's of the encoder.
MNLI = 3


def roberta(preset: str) -> Any:
    return bert.abstract(dataclasses.replace(bert.PRESETS[preset], num_labels=MNLI))


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2-medium": lambda: gpt2.abstract(gpt2.PRESETS["gpt2-medium"]),
    "gpt2-large": lambda: gpt2.abstract(gpt2.PRESETS["gpt2-large"]),
    "roberta-base": lambda: roberta("roberta-base"),
    "roberta-large": lambda: roberta("roberta-large"),
    "deberta-v2-xxlarge": shapes.deberta,
    "gpt3-175b": lambda: jax.eval_shape(
        lambda key: plan.init(key, plan.CONFIGS["gpt3-175b"]), jax.random.key(0)
    ),
    "bloom-3b": shapes.bloom,
    "bert-base-uncased": lambda: bert.abstract(bert.PRESETS["bert-base"]),
    "gpt2 (LLMs-from-scratch)": shapes.gpt2_from_scratch,
}
# How each model calls the paper's q, k, v and o.
NAMES = {
    "roberta-base": "attention/self/{}/kernel",
    "roberta-large": "attention/self/{}/kernel",
    "bert-base-uncased": "attention/self/{}/kernel",
    "deberta-v2-xxlarge": "attention/self/{}_proj/kernel",
    "gpt3-175b": "attention/{}/kernel",
}
LONG = {"q": "query", "k": "key", "v": "value"}
# Not in the paper: appendix E of Raschka, Build a Large Language Model (From Scratch), whose LoRA takes
# every linear layer, the new head among them.
FROM_SCRATCH = {
    "model": "gpt2 (LLMs-from-scratch)",
    "d_model": 768,
    "layers": 12,
    "targets": "every linear layer",
    "rank": 16,
    "trainable": 2_666_528,
    "published": "2,666,528",
    "note": "2,654,208 of the blocks and 12,320 of the two-class head",
}


def adapted(row: dict[str, Any]) -> dict[str, Any]:
    """What `wrap` is told for a row: its targets, and of a fused kernel its parts."""
    model, targets = row["model"], row["targets"]
    if model.startswith("gpt2-"):  # q and v are the first and the last third of c_attn's columns
        d = row["d_model"]
        thirds = dict(zip("qkv", [(i * d, (i + 1) * d) for i in range(3)], strict=True))
        parts = [thirds[name] for name in targets.split(",")]
        return {"targets": "attn/c_attn/kernel", "parts": {"attn/c_attn/kernel": parts}}
    if targets.startswith("fused"):
        return {"targets": "query_key_value"}
    if targets.startswith("every"):
        return {"targets": "all"}
    names = targets.split(",")
    if model != "gpt3-175b":
        names = [LONG[name] for name in names]
    return {"targets": NAMES[model].format(f"({'|'.join(names)})")}


def count(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the file with what is counted here beside it."""
    params = MODELS[row["model"]]()
    wrapped = jax.eval_shape(lambda p: lora_jax.wrap(p, row["rank"], **adapted(row)), params)
    found = lora_jax.summary(wrapped)
    return row | {"counted": {"trainable": found.trainable, "total": found.total}}


def same(row: dict[str, Any]) -> bool:
    """Whether the counts are the file's, its total as well where it has one."""
    ours = row["counted"]
    return ours["trainable"] == row["trainable"] and ours["total"] == row.get("total", ours["total"])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = ["model", "adapted", "rank", "trained here", "published", "of", "note"]
    lines = []
    for row in rows:
        total = f"{row['counted']['total']:,}" if "total" in row else ""
        trained = f"{row['counted']['trainable']:,}" + ("" if same(row) else " (!)")
        note = row.get("note", "")
        lines.append([row["model"], row["targets"], str(row["rank"]), trained, row["published"], total, note])
    return markdown(head, lines, words=2, notes=1)


def rows_of() -> list[dict[str, Any]]:
    """The rows of the data folder's file, and the one that it has not."""
    return [*paper()["parameter_counts"], FROM_SCRATCH]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.counts.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "counts.json", help="%(default)s")
    options = parser.parse_args(arguments)
    try:
        rows = [count(row) for row in rows_of()]
    except DataError as error:
        parser.error(str(error))
    result = {**provenance("python -m experiments.counts.run"), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    text = table(rows)
    if options.out.resolve().parent == HERE / "results":
        fill(HERE / "README.md", {"counts": text})
    print(text, end="")
    wrong = [row["model"] for row in rows if not same(row)]
    if wrong:
        print(f"the counts of {', '.join(wrong)} are not those of the file", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
