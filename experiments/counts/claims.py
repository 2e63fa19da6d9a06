"""Compute what the LoRA paper says of parameters, checkpoints and memory, from shapes alone.

    LORA_JAX_DATA=... python -m experiments.counts.claims

Every row has a figure as the paper prints it (arXiv 2106.09685 v2), the number that follows from the model's
shapes and the paper's own formulas, and whether the one rounds to the other. What paper/lora_paper.json (in
the folder LORA_JAX_DATA) holds is read from there. LoRA's own counts are those of experiments.counts.run,
and what a compiled step takes is read from a record of experiments.plan. Written are results/claims.json
and the table in README.md.

A number that is not the one in results/claims.json fails the command, which then changes nothing. Where
the new number is right, delete that file and run the command again.

exit code: 0 every number is the recorded one; 1 one differs; 2 the command or the data folder is wrong
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lora_jax
from experiments.counts import run, shapes
from experiments.data import DataError, paper
from experiments.records import fill, markdown, provenance

RESULT = run.HERE / "results" / "claims.json"
PLAN = run.HERE.parent / "plan" / "results" / "gpt3-175b-v5p-2x2x4.json"
UNITS = {"": 1, "times": 1, "%": 0.01, "M": 1e6, "B": 1e9, "MB": 1e6, "GB": 1e9, "TB": 1e12}


class Key(NamedTuple):
    """Where lora_paper.json has a figure: the last word of the name of a row, as in "BitFit 14.2M"."""

    table: str
    row: str


class Claim(NamedTuple):
    claim: str
    section: str
    published: str | Key
    computed: float
    note: str = ""


# --- What is counted -----------------------------------------------------------------------------------


def size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def bytes_of(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@functools.cache
def model(name: str) -> Any:
    """The parameters' shapes; of RoBERTa with the head for MNLI."""
    return run.MODELS[name]()


def biases(name: str) -> int:
    """All bias vectors of a model, those of norms among them, but for a classifier's."""
    leaves = jax.tree_util.tree_leaves_with_path(model(name))
    named = [([key.key for key in path], leaf) for path, leaf in leaves]
    return size([leaf for path, leaf in named if path[-1] == "bias" and path[0] != "classifier"])


def adapters(width: int, rank: int, layers: int, norms: int = 0) -> int:
    """Layers of two linear maps with biases, down to the rank and up again, and norms beside them."""
    layer = [shapes.linear(width, rank), shapes.linear(rank, width)]
    return layers * size(layer) + norms * size(shapes.norm(width))


def prefix(width: int, tokens: int, layers: int = 1) -> int:
    """Trained vectors in place of so many tokens, in front of the model or after each of its layers."""
    return layers * size(shapes.table(tokens, width))


def lora(name: str, targets: str, rank: int, **others: Any) -> int:
    row = {"model": name, "targets": targets, "rank": rank} | others
    return run.count(row)["counted"]["trainable"]


def training_bytes(trainable: Any, frozen: Any) -> tuple[int, int]:
    """Weights with Adam's two moments of what is trained; and with the gradients too."""
    moments = bytes_of(jax.eval_shape(optax.adam(1e-4).init, trainable))
    held = bytes_of(frozen) + bytes_of(trainable) + moments
    return held, held + bytes_of(trainable)


def nearest(counted: Callable[[int], int], published: float) -> int:
    """The whole number for which the count comes nearest to a published one."""
    return min(range(1, 513), key=lambda n: abs(counted(n) - published))


# --- The claims ----------------------------------------------------------------------------------------


def memory() -> list[Claim]:
    gpt3 = model("gpt3-175b")
    total = size(gpt3)
    # Two bytes a number for the factors too, as the paper counts.
    wrapped = jax.eval_shape(
        lambda p: lora_jax.wrap(p, 4, targets="attention/(q|v)/kernel", dtype=jnp.bfloat16), gpt3
    )
    trainable, frozen = lora_jax.partition(wrapped)
    trained = size(trainable)
    held, with_gradients = training_bytes(gpt3, ())
    lora_held, lora_with_gradients = training_bytes(trainable, frozen)
    plan = json.loads(PLAN.read_text())["plan"]
    peaks = plan["full"]["peak"] / plan["memory"]["peak"]
    saved = 1 - plan["flops"]["step"] / plan["flops"]["full"]
    base, adapter = bytes_of(gpt3), bytes_of(trainable)
    bytes_each = "weights, gradients and two moments of two bytes each are 8 bytes a parameter"
    return [
        Claim("GPT-3's parameters", "abstract", "175B", total),
        Claim("trained parameters, fewer by", "abstract", "10,000 times", total / trained, "r 4 on q and v"),
        Claim(
            "GPU memory of training, less by",
            "abstract",
            "3 times",
            with_gradients / lora_with_gradients,
            f"the states alone: {bytes_each}; the paper's 1.2 TB and 350 GB make {1200 / 350:.1f} times",
        ),
        Claim(
            "GPU memory of the compiled step, less by",
            "abstract",
            "3 times",
            peaks,
            f"activations included, on {plan['devices']} chips: experiments/plan",
        ),
        Claim("trained share of GPT-3", "section 2", "0.01%", trained / total, "r 4 on q and v"),
        Claim(
            "memory saved with Adam, up to",
            "section 4.2",
            "2/3",
            1 - lora_held / held,
            f"weights and moments; with gradients too it is {1 - lora_with_gradients / with_gradients:.3f}",
        ),
        Claim(
            "memory of full fine-tuning",
            "section 4.2",
            "1.2TB",
            with_gradients,
            f"{bytes_each}; the published figure is {1.2e12 / total:.1f} of them",
        ),
        Claim("memory of LoRA's training", "section 4.2", "350GB", lora_with_gradients),
        Claim("checkpoint of GPT-3", "section 4.2", "350GB", base),
        Claim(
            "checkpoint of the adapter",
            "section 4.2",
            "35MB",
            adapter,
            f"r 4 on q and v at two bytes a number; {adapter / 2**20:.1f} MiB. Saved here in float32: "
            f"{2 * adapter / 1e6:.1f} MB",
        ),
        Claim("checkpoint, smaller by", "section 4.2", "10,000 times", base / adapter),
        Claim(
            "100 models as one base and adapters",
            "footnote 4",
            "354GB",
            base + 100 * adapter,
            "the published sum is 350 GB + 100 × 35 MB",
        ),
        Claim("100 models in full", "footnote 4", "35TB", 100 * base),
        Claim(
            "faster training",
            "section 4.2",
            "25%",
            1 - 32.5 / 43.1,
            "time saved, by the 32.5 and 43.1 tokens a second of footnote 5, which are "
            f"{43.1 / 32.5 - 1:.0%} more; operations saved by the plan of experiments/plan: {saved:.1%}",
        ),
        Claim("parameter budget, r 8 on q alone", "section 7.1", "18M", lora("gpt3-175b", "q", 8)),
        Claim("that budget, stored in float16", "section 7.1", "35MB", 2 * lora("gpt3-175b", "q", 8)),
    ]


def full() -> list[Claim]:
    medium = model("gpt2-medium")
    top = size([medium["h_22"], medium["h_23"]])
    table2 = functools.partial(Key, "table2_glue")
    return [
        Claim("RoBERTa base in full", "Table 2", table2("roberta-base FT 125M"), size(model("roberta-base"))),
        Claim(
            "RoBERTa large in full", "Table 2", table2("roberta-large FT 355M"), size(model("roberta-large"))
        ),
        Claim(
            "DeBERTa XXL in full",
            "Table 2",
            table2("deberta-xxl FT 1500M"),
            size(model("deberta-v2-xxlarge")),
            "its embedding and layers alone are more",
        ),
        Claim(
            "GPT-2 medium in full",
            "Table 3",
            "354.92M",
            size(medium),
            "0.1M too many; marked as a number of earlier work",
        ),
        Claim("GPT-2 medium in full", "Tables 13, 14", "354M", size(medium)),
        Claim("GPT-2 large in full", "Table 3", "774.03M", size(model("gpt2-large"))),
        Claim("GPT-2 medium, the last two layers", "Table 3", "25.19M", top),
        Claim("GPT-2 medium, the last two layers", "Tables 13, 14", "24M", top, "Table 3 has it right"),
        Claim(
            "GPT-3 in full",
            "Table 4",
            "175,255.8M",
            size(model("gpt3-175b")),
            "the head is the embedding here; with one of its own GPT-3 has "
            f"{(size(model('gpt3-175b')) + size(model('gpt3-175b')['embedding'])) / 1e6:,.1f}M",
        ),
    ]


def bitfit() -> list[Claim]:
    width, layers = 12288, 96
    return [
        Claim(
            "RoBERTa base, BitFit",
            "Table 2",
            Key("table2_glue", "roberta-base BitFit 0.1M"),
            biases("roberta-base"),
            "without the head's",
        ),
        Claim(
            "GPT-3, BitFit",
            "Table 4",
            Key("table4_gpt3", "BitFit 14.2M"),
            biases("gpt3-175b"),
            "11 bias vectors of the width a layer, and the last norm's; "
            f"{12 * width * layers / 1e6:.1f}M would be 12",
        ),
    ]


def adapter_tuning() -> list[Claim]:
    found = []
    for kind, per_layer, rank, published in (
        ("P", 1, 64, "3.0M"),
        ("P", 1, 16, "0.8M"),
        ("H", 2, 64, "6.0M"),
        ("H", 2, 8, "0.8M"),
    ):
        counted = adapters(1024, rank, 24 * per_layer)
        name = f"RoBERTa large, adapter {kind}, r {rank}"
        note = "a decimal that was not computed: Table 9 has whole millions" if rank == 64 else ""
        found.append(Claim(name, "Tables 2, 9", published, counted, note))
    # One adapter a layer and a norm beside it (L), or two adapters (H). The paper does not say their rank.
    for name, width, layers, kind, published in (
        ("medium", 1024, 24, "L", Key("table3_e2e", "gpt2-medium AdapterL 0.37M")),
        ("medium", 1024, 24, "L", Key("table3_e2e", "gpt2-medium AdapterL 11.09M")),
        ("medium", 1024, 24, "H", Key("table3_e2e", "gpt2-medium AdapterH 11.09M")),
        ("large", 1280, 36, "L", "0.88M"),
        ("large", 1280, 36, "L", "23.00M"),
    ):
        count, norms = (layers, layers) if kind == "L" else (2 * layers, 0)
        counted = functools.partial(adapters, width, layers=count, norms=norms)
        figure = published.row.split()[-1] if isinstance(published, Key) else published
        rank = nearest(counted, value(figure))
        note = "the rank that comes nearest; the paper gives none"
        claim = f"GPT-2 {name}, adapter {kind}, r {rank}"
        found.append(Claim(claim, "Table 3", published, counted(rank), note))
    for rank, published in (
        (1, "7.1M"),
        (4, "21.2M"),
        (8, Key("table4_gpt3", "AdapterH 40.1M")),
        (16, "77.9M"),
        (64, "304.4M"),
    ):
        counted = adapters(12288, rank, 2 * 96)
        section = "Tables 4, 15" if rank in (1, 8) else "Table 15"
        found.append(Claim(f"GPT-3, adapter H, r {rank}", section, published, counted))
    return found


def prefix_tuning() -> list[Claim]:
    found = []
    for name, width, layers, published in (
        ("medium", 1024, 24, Key("table3_e2e", "gpt2-medium PreLayer 0.35M")),
        ("large", 1280, 36, "0.77M"),
    ):
        figure = published.row.split()[-1] if isinstance(published, Key) else published
        counted = functools.partial(prefix, width, layers=layers)
        tokens = nearest(counted, value(figure))
        total = size(model(f"gpt2-{name}"))
        note = (
            f"the tokens that come nearest; {figure} is 0.1% of the model's {total / 1e6:.0f}M, which is "
            "how prefix tuning states its size"
        )
        claim = f"GPT-2 {name}, PreLayer, {tokens} tokens"
        found.append(Claim(claim, "Table 3", published, counted(tokens), note))
    for first, inner, published in (
        (32, 8, "0.4M"),
        (64, 8, "0.9M"),
        (128, 8, "1.7M"),
        (256, 8, Key("table4_gpt3", "PreEmbed 3.2M")),
        (512, 8, "6.4M"),
    ):
        section = "Tables 4, 15" if first == 256 else "Table 15"
        claim = f"GPT-3, PreEmbed, {first} + {inner} tokens"
        found.append(Claim(claim, section, published, prefix(12288, first + inner)))
    for first, inner, published in (
        (2, 2, "5.1M"),
        (8, 0, "10.1M"),
        (8, 8, Key("table4_gpt3", "PreLayer 20.2M")),
        (32, 4, "44.1M"),
        (64, 0, "76.1M"),
    ):
        section = "Tables 4, 15" if (first, inner) == (8, 8) else "Table 15"
        claim = f"GPT-3, PreLayer, {first} + {inner} tokens"
        note = "L·d·(l_p + l_i) of section 5.1; what else is counted the paper does not say"
        found.append(Claim(claim, section, published, prefix(12288, first + inner, 96), note))
    return found


def lora_tuning() -> list[Claim]:
    """Those that the counts of `experiments.counts.run` do not have."""
    slip = "Table 15 has r 4 for this figure, which is right"
    found = [
        Claim(
            "DeBERTa XXL, LoRA, r 8 on q, v",
            "Tables 2, 10",
            Key("table2_glue", "deberta-xxl LoRA 4.7M"),
            lora("deberta-v2-xxlarge", "q,v", 8),
            "r 16, as in the released scripts, gives 4.7M",
        ),
        Claim("GPT-3, LoRA, r 2 on q, k, v, o", "D.4", "37.7M", lora("gpt3-175b", "q,k,v,o", 2), slip),
        Claim("GPT-3, LoRA, r 4 on q, k, v, o", "Table 15", "37.7M", lora("gpt3-175b", "q,k,v,o", 4)),
        Claim("GPT-3, LoRA, r 4 on q, v", "Table 15", "18.8M", lora("gpt3-175b", "q,v", 4)),
        Claim(
            "GPT-3, LoRA, r 64 on q, k, v, o",
            "Table 15",
            "603.8M",
            lora("gpt3-175b", "q,k,v,o", 64),
            "twice 301.9M, which was cut off",
        ),
    ]
    for rank, published in ((8, "37.8M"), (32, "151.1M"), (64, "302.1M")):
        counted = lora("gpt3-175b", "q,v", rank) + prefix(12288, 8 + 4)
        claim = f"GPT-3, LoRA r {rank} and PreEmbed 8 + 4"
        found.append(Claim(claim, "Table 15", published, counted))
    counted = lora("gpt3-175b", "q,v", 8) + prefix(12288, 8 + 4, 96)
    found.append(
        Claim("GPT-3, LoRA r 8 and PreLayer 8 + 4", "Table 15", "52.8M", counted, "PreLayer as above")
    )
    return found


def claims() -> list[Claim]:
    return [*memory(), *full(), *bitfit(), *adapter_tuning(), *prefix_tuning(), *lora_tuning()]


# --- Published figures ---------------------------------------------------------------------------------


def parsed(figure: str) -> tuple[str, str]:
    """A figure's number and unit: "14.2M", "10,000 times", "2/3", "0.01%"."""
    found = re.fullmatch(r"([\d.,]+|\d+/\d+) ?([A-Za-z%]*)", figure)
    if found is None or found[2] not in UNITS:
        raise ValueError(f"{figure!r} is no figure; write a number and one of the units {sorted(UNITS)}")
    return found[1].replace(",", ""), found[2]


def value(figure: str) -> float:
    number, unit = parsed(figure)
    above, _, below = number.partition("/")
    return float(above) / float(below or 1) * UNITS[unit]


def step(figure: str) -> float:
    """What one more in the last printed digit would be; zeros at the end of a whole number are no digits."""
    number, unit = parsed(figure)
    if "/" in number:
        return 0.01
    if "." in number:
        return 10.0 ** -len(number.partition(".")[2]) * UNITS[unit]
    return 10.0 ** (len(number) - len(number.rstrip("0"))) * UNITS[unit]


def agrees(figure: str, computed: float) -> bool:
    """Whether a number rounds to a published figure."""
    return abs(computed - value(figure)) <= step(figure) / 2


def row(claim: Claim, data: dict[str, Any]) -> dict[str, Any]:
    """A claim as it is recorded, with its figure from the data where they have it."""
    published, note = claim.published, claim.note
    if isinstance(published, Key):
        if published.row not in data.get(published.table, {}):
            raise KeyError(f"lora_paper.json has no row {published.row!r} in {published.table!r}")
        published = published.row.split()[-1]
    fits = agrees(published, claim.computed)
    counts = parsed(published)[1] == "M"
    if not fits and counts and 0 < claim.computed - value(published) < step(published):
        note = "; ".join(filter(None, ["cut off, not rounded", note]))
    shown = {"claim": claim.claim, "section": claim.section, "published": published}
    return shown | {"computed": claim.computed, "agrees": fits, "note": note}


def here(row: dict[str, Any]) -> str:
    """What was computed, in the unit of what was published: parameters in full."""
    unit = parsed(row["published"])[1]
    if unit in ("M", "B"):
        return f"{row['computed']:,}"
    return f"{row['computed'] / UNITS[unit]:,.4g}{' ' if unit.isalpha() else ''}{unit}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head, lines = ["claim", "where", "published", "here", "agrees", "note"], []
    for row in rows:
        verdict = "yes" if row["agrees"] else "**no**"
        lines.append([row["claim"], row["section"], row["published"], here(row), verdict, row["note"]])
    count = sum(row["agrees"] for row in rows)
    return f"{count} of {len(rows)} agree.\n\n" + markdown(head, lines, words=2, notes=2)


def changed(rows: Sequence[dict[str, Any]], recorded: Sequence[dict[str, Any]]) -> list[str]:
    """The numbers that are not those of a record, a line each."""
    before = {(row["claim"], row["section"]): row["computed"] for row in recorded}
    names = [(row["claim"], row["section"], row["computed"]) for row in rows]
    return [
        f"{claim} ({section}): {computed}, recorded {before[claim, section]}"
        for claim, section, computed in names
        if not math.isclose(computed, before.get((claim, section), computed), rel_tol=1e-12)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.counts.claims",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=RESULT, help="%(default)s")
    options = parser.parse_args(arguments)
    try:
        data = paper()
        rows = [row(claim, data) for claim in claims()]
    except (DataError, KeyError) as error:
        parser.error(error.args[0])
    recorded = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    if different := changed(rows, recorded):
        print(f"not as in {options.out}:", *different, sep="\n  ", file=sys.stderr)
        return 1
    result = {**provenance("python -m experiments.counts.claims"), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    text = table(rows)
    if options.out.resolve() == RESULT:
        fill(run.HERE / "README.md", {"claims": text})
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
