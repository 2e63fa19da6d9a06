"""How long does a forward pass take with LoRA, merged and not, and with bottleneck adapters? (Table 1)

    LORA_JAX_DATA=path/to/data python -m experiments.latency.run

A BERT of all-MiniLM-L6-v2's shape is run as it is, with LoRA merged, with LoRA unmerged, and with adapters,
at the paper's three settings of batch and length. Written are results/MODEL.json, results/MODEL.png and the
table in README.md. The weights are random: no time depends on them.

Interrupted, it goes on where it was when it is started again by the same command.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import hashlib
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import lora_jax
from experiments import methods
from experiments.benchmarks.step import compiler_figures
from experiments.data import DataError, paper
from experiments.glue.cells import Cell, run_cells
from experiments.models import bert
from experiments.records import fill, markdown, provenance, write

HERE = Path(__file__).parent
MINILM = bert.BertConfig(hidden_size=384, num_layers=6, intermediate_size=1536)
PRESETS = {
    name: dataclasses.replace(config, pooler=False)  # the hidden states are what is computed
    for name, config in ({"all-MiniLM-L6-v2": MINILM} | bert.PRESETS).items()
}
NAMES = {
    "base": "base",
    "merged": "LoRA on q and v, merged",
    "lora_qv": "LoRA on q and v",
    "lora_all": "LoRA on every linear layer",
    "adapter_l": "AdapterL",
    "adapter": "AdapterH",
}
# The paper's rows that are of the same kind.
PAPER = {"merged": "FT or merged LoRA", "adapter_l": "AdapterL", "adapter": "AdapterH"}

EPILOG = """\
examples:
  python -m experiments.latency.run                              the committed result
  python -m experiments.latency.run --settings 1x128 --rounds 5 --out /tmp/look
  python -m experiments.latency.run --model roberta-large --out roberta_large
                                                    width and depth of the paper's GPT-2 medium
  python -m experiments.latency.run --model roberta-large --dtype bfloat16 --out gpu

In every round each way is timed once, in an order drawn anew, after one call that is not timed. It is called
as often as takes --seconds, and waited for each time. A way's time over the base's is the median over the
rounds of the ratio within a round; its 95% interval is a bootstrap over the rounds."""


class Arm(NamedTuple):
    """A way to run: a function of a tree and tokens, the tree, and how many numbers of it were trained."""

    fn: Callable[[Any, jax.Array], jax.Array]
    tree: Any
    trained: int = 0


def shaken(wrapped: Any, seed: int) -> Any:
    """The tree with noise on what is trained: else LoRA and adapters would be nothing, as they start."""
    trainable, frozen = lora_jax.partition(wrapped)
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [x + 0.02 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return lora_jax.combine(treedef.unflatten(leaves), frozen)


def make_arms(config: bert.BertConfig, settings: dict[str, Any]) -> dict[str, Arm]:
    """Everything that is timed, of one base."""
    key, dtype = jax.random.key(settings["seed"]), jnp.dtype(settings["dtype"])
    model = bert.Bert(config, dtype)
    params = jax.jit(model.init)(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def plain(params: Any, tokens: jax.Array) -> jax.Array:
        return model.apply({"params": params}, tokens).hidden

    def adapted(apply: Callable[..., bert.Output]) -> Callable[..., jax.Array]:
        return lora_jax.lora(lambda tree, tokens: apply(tree, tokens).hidden)

    arms = {"base": Arm(plain, params)}
    for way in ("lora_qv", "lora_all", "adapter_l", "adapter"):
        prepared = methods.prepare(
            way,
            model,
            params,
            key,
            rank=settings["rank"],
            alpha=settings["alpha"],
            bottleneck=round(settings["bottleneck"].get(way, 0) * config.hidden_size),
        )
        tree = shaken(prepared.wrapped, settings["seed"])
        trained = lora_jax.summary(tree).trainable
        if way == "lora_qv":
            arms["merged"] = Arm(plain, lora_jax.merge(tree), trained)
        arms[way] = Arm(adapted(prepared.apply), tree, trained)
    return arms


def check_agreement(outputs: dict[str, jax.Array], bound: float) -> dict[str, float]:
    """How far each is from the base, as rms: unmerged LoRA is as far as merged, and no way is the base."""
    out = {name: np.asarray(x, np.float32) for name, x in outputs.items()}

    def distance(one: str, other: str) -> float:
        return float(np.sqrt(np.mean((out[one] - out[other]) ** 2) / np.mean(out[other] ** 2)))

    found = {name: distance(name, "base") for name in out}
    error = distance("lora_qv", "merged")
    lost = [name for name, x in found.items() if name != "base" and x <= 10 * bound]
    if error > bound or lost:
        raise AssertionError(f"merged and unmerged LoRA differ by {error:.1e}; as the base are {lost}")
    return found


def measure(config: bert.BertConfig, settings: dict[str, Any], setting: dict[str, int]) -> dict[str, Any]:
    """One column of the table: compile every way, hold them against each other, and time them in turn."""
    name = f"{setting['batch']} x {setting['length']}"
    arms = make_arms(config, settings)
    shape = (setting["batch"], setting["length"])
    tokens = jax.random.randint(jax.random.key(settings["seed"]), shape, 0, config.vocab_size, jnp.int32)
    compiled, figures, outputs = {}, {}, {}
    for way, arm in tqdm(arms.items(), desc=f"{name}: compiling", unit=" ways"):
        compiled[way] = jax.jit(arm.fn).lower(arm.tree, tokens).compile()
        program = hashlib.sha256(compiled[way].as_text().encode()).hexdigest()
        figures[way] = {"trained": arm.trained, "program": program, **compiler_figures(compiled[way])}
        outputs[way] = compiled[way](arm.tree, tokens)
    apart = check_agreement(outputs, 1e-4 if settings["dtype"] == "float32" else 1e-2)
    outputs.clear()

    def call(way: str) -> float:
        start = time.perf_counter()
        compiled[way](arms[way].tree, tokens).block_until_ready()
        return time.perf_counter() - start

    repeat = math.ceil(settings["seconds"] / min(call("base") for _ in range(3)))
    seconds: dict[str, list[float]] = {way: [] for way in arms}
    draw = np.random.default_rng([settings["seed"], *shape])
    for _ in tqdm(range(setting["rounds"]), desc=f"{name}: timing", unit=" rounds"):
        gc.collect()
        for way in draw.permutation(list(arms)):
            call(way)
            seconds[way].append(sum(call(way) for _ in range(repeat)) / repeat)
    return {
        "calls": repeat,
        "ways": {
            way: {**figure, "rms_from_base": apart[way], "seconds": seconds[way]}
            for way, figure in figures.items()
        },
    }


# --- What the record says --------------------------------------------------------------------------------


def over_base(cell: dict[str, Any], way: str, draws: int = 5000) -> tuple[float, float, float]:
    """A way's time over the base's: the median of the rounds' ratios, and its 95% bootstrap interval."""
    ratios = np.divide(cell["ways"][way]["seconds"], cell["ways"]["base"]["seconds"])
    places = np.random.default_rng(0).integers(len(ratios), size=(draws, len(ratios)))
    low, high = np.percentile(np.median(ratios[places], axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def published(record: dict[str, Any], way: str, setting: dict[str, int]) -> float | None:
    """The paper's time of a way over that of its merged LoRA."""
    column = f"batch {setting['batch']}, len {setting['length']}"
    times = record["paper"]
    if way not in PAPER or column not in times["columns"]:
        return None
    i = times["columns"].index(column)
    return times[PAPER[way]][i] / times[PAPER["merged"]][i]


def percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}%"


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    head = ["batch x length", "way", "trained", "GFLOP", "over base", "GB accessed", "over base"]
    head += ["ms", "over base (95% interval)", "the paper's", "the base's program"]
    lines = []
    for cell in record["cells"]:
        setting, base = cell["setting"], cell["ways"]["base"]
        for way, x in cell["ways"].items():
            ratio, low, high = over_base(cell, way)
            theirs = published(record, way, setting)
            line = [
                f"{setting['batch']} x {setting['length']}",
                NAMES[way],
                f"{x['trained']:,}",
                f"{x['gflop']:.2f}",
                percent(x["gflop"] / base["gflop"]),
                f"{x['gigabytes_accessed']:.3f}",
                percent(x["gigabytes_accessed"] / base["gigabytes_accessed"]),
                f"{1e3 * np.median(x['seconds']):.1f}",
                "" if way == "base" else f"{percent(ratio)} ({percent(low)} to {percent(high)})",
                "" if theirs is None else percent(theirs),
                "yes" if x["program"] == base["program"] else "no",
            ]
            lines.append(line)
    return markdown(head, lines, words=2, notes=1)


def draw(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells, ways = record["cells"], [way for way in NAMES if way != "base"]
    colors = dict(zip(ways, ["#9dc3e6", "#2e75b6", "#1f4e79", "#f4b183", "#c55a11"], strict=True))
    figure, axis = plt.subplots(figsize=(9, 3.8), dpi=130)
    for i, way in enumerate(ways):
        at = np.arange(len(cells)) + (i - 2) * 0.16
        found = 100 * (np.array([over_base(cell, way) for cell in cells]) - 1)
        middle, low, high = found.T
        axis.bar(at, middle, 0.15, color=colors[way], label=NAMES[way])
        axis.errorbar(at, middle, [middle - low, high - middle], fmt="none", ecolor="#333333", linewidth=1)
        theirs = [published(record, way, cell["setting"]) for cell in cells]
        pairs = [(x, 100 * (y - 1)) for x, y in zip(at, theirs, strict=True) if y is not None]
        if pairs:
            label = "the paper's, GPT-2 medium on a GPU" if way == "merged" else None
            axis.plot(*zip(*pairs, strict=True), "D", color="white", markeredgecolor="#c00000", label=label)
    axis.axhline(0, color="#333333", linewidth=0.8)
    axis.set_xticks(range(len(cells)))
    settings = [cell["setting"] for cell in cells]
    axis.set_xticklabels([f"batch {x['batch']}, length {x['length']}" for x in settings])
    axis.set_ylabel("time over the base, %")
    machine = ", ".join(record["machine"]["devices"])
    axis.set_title(f"{record['settings']['model']}, {record['settings']['dtype']}, {machine}", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def setting_of(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no BATCHxLENGTH; write two whole numbers, as in 1x128")
    return int(found[1]), int(found[2])


def check(parser: argparse.ArgumentParser, settings: dict[str, Any]) -> None:
    """Refuse what cannot be timed."""
    if not 0 < settings["seconds"] < math.inf:
        parser.error(f"--seconds is {settings['seconds']:g}; give a number above 0.")
    config = PRESETS[settings["model"]]
    positions = config.max_positions - (config.pad_id + 1 if config.roberta else 0)
    for x in settings["settings"]:
        if x["rounds"] < 1:
            parser.error(f"--rounds is {x['rounds']}; give a whole number above 0.")
        if x["length"] > positions:
            name = f"{x['batch']}x{x['length']}"
            parser.error(f"--settings {name}: {settings['model']} has {positions} positions; give no more.")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.latency.run",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=PRESETS, help="the shape of the model [the config's]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the base [the config's]")
    parser.add_argument(
        "--settings", nargs="+", type=setting_of, metavar="BATCHxLENGTH", help="[the config's]"
    )
    config = json.loads((HERE / "config.json").read_text())
    rounds = {(x["batch"], x["length"]): x["rounds"] for x in config["settings"]}
    fewest = min(rounds.values())
    parser.add_argument(
        "--rounds", type=int, help=f"of every setting [the config's; {fewest} if it has not the setting]"
    )
    parser.add_argument("--seconds", type=float, help="of calls in a round, of each way [the config's]")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="the folder for the results")
    given = parser.parse_args(arguments)
    names = ("model", "dtype", "seconds")
    settings = config | {name: x for name in names if (x := getattr(given, name)) is not None}
    if given.settings is not None:
        settings["settings"] = [
            {"batch": b, "length": n, "rounds": rounds.get((b, n), fewest)} for b, n in given.settings
        ]
    if given.rounds is not None:
        settings["settings"] = [x | {"rounds": given.rounds} for x in settings["settings"]]
    check(parser, settings)
    theirs = paper()["table1_latency_ms"]
    command = shlex.join(["python", "-m", "experiments.latency.run", *arguments])
    common = {name: x for name, x in settings.items() if name != "settings"}
    work = given.out / f"{settings['model']}_run"
    cells = []
    for setting in settings["settings"]:
        path = work / f"{setting['batch']}x{setting['length']}.json"
        make = functools.partial(measure, PRESETS[settings["model"]], settings, setting)
        cells.append(Cell(path, common | {"setting": setting}, make))
    made = run_cells(cells, command)
    record = provenance(command) | {
        "settings": settings,
        "paper": theirs,
        "cells": [{name: x for name, x in cell.items() if name not in common} for cell in made],
    }
    write(given.out / f"{settings['model']}.json", record)
    draw(record, given.out / f"{settings['model']}.png")
    text = table(record)
    if given.out.resolve() == HERE / "results" and settings == config:
        fill(HERE / "README.md", {"latency": text})
    print(text, end="")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
