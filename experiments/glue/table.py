"""The cells of the GLUE experiment as one record, Markdown tables and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.data import DataError, paper
from experiments.glue import data, metrics
from experiments.glue.cells import read, unpacked
from experiments.records import fill, markdown, provenance, write

# What all-MiniLM-L6-v2 was trained on, by its model card, and is tested on here.
CONTAMINATED = {"MNLI": "all-MiniLM-L6-v2 was trained on MNLI", "QQP": "all-MiniLM-L6-v2 was trained on QQP"}
RELATED = {"QNLI": "all-MiniLM-L6-v2 was trained on SQuAD's questions and passages, of which QNLI is made"}


CELL = ("task", "way", "seed", "learning_rate", "epochs", "settings", "scores", "predictions", "trainable")
# What is the same for all seeds of a system.
SAME = ("learning_rate", "epochs", "settings")


def systems_of(folder: Path) -> dict[tuple[str, str, str], dict[int, dict[str, Any]]]:
    """The cells of a folder by (task, way, variant) and seed."""
    found: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        record = read(path)
        if lost := [name for name in CELL if name not in record]:
            raise DataError(f"{path} has no {lost}. Delete it to have it made anew.")
        task, way, seed = record["task"], record["way"], record["seed"]
        variant = path.stem.removeprefix(f"{task}_{way}").removesuffix(f"_{seed}").strip("_")
        found.setdefault((task, way, variant), {})[seed] = record
    return found


def judged(
    cells: dict[int, dict[str, Any]],
    against: dict[int, dict[str, Any]] | None,
    labels: np.ndarray,
    draws: int,
) -> dict[str, Any]:
    """What the seeds of one system gave, with the interval of its first metric and that of a difference."""
    some = next(iter(cells.values()))
    for seed, cell in cells.items():
        if other := [name for name in SAME if cell[name] != some[name]]:
            raise DataError(
                f"{some['way']} on {some['task']}: {', '.join(other)} of seed {seed} differs from that of "
                f"seed {next(iter(cells))}. Delete one of the two cells, or part them by folders."
            )
    row = {
        name: some[name]
        for name in ("learning_rate", "epochs", "steps", "trainable", "saved_bytes", "step_bytes")
    }
    row |= {"seeds": sorted(cells), "diverged": sum(x["scores"] is None for x in cells.values())}
    seconds = [x["seconds_per_step"] for x in cells.values() if x["seconds_per_step"]]
    row["seconds_per_step"] = float(np.median(seconds)) if seconds else None
    if row["diverged"]:
        return row
    names = metrics.OF_TASK[some["task"]]
    of_seeds = {name: [x["scores"][name] for x in cells.values()] for name in names}
    row["scores"] = {
        name: {"mean": float(np.mean(x)), "deviation": float(np.std(x, ddof=1)) if len(x) > 1 else None}
        for name, x in of_seeds.items()
    }
    metric = metrics.METRICS[names[0]]
    mine = {seed: unpacked(x["predictions"]) for seed, x in cells.items()}
    row["interval"] = metrics.bootstrap(metric, labels, [*mine.values()], draws=draws)._asdict()
    theirs = {} if against is None else against
    both = [seed for seed in mine if seed in theirs and theirs[seed]["predictions"] is not None]
    if both and against is not cells:
        pair = ([mine[s] for s in both], [unpacked(theirs[s]["predictions"]) for s in both])
        row["minus_full"] = metrics.bootstrap(metric, labels, *pair, draws=draws)._asdict()
        row["minus_full"]["seeds"] = both
    return row


def roberta_rows() -> dict[str, dict[str, float]]:
    """Table 2's rows for RoBERTa base, in percent."""
    table = paper()["table2_glue"]
    return {
        name: dict(zip(table["columns"], row, strict=True))
        for name, row in table.items()
        if name.startswith("roberta-base")
    }


def summarise(config: dict[str, Any], out: Path, command: str) -> dict[str, Any]:
    """Gather the cells that there are into one record."""
    grid, ablations = systems_of(out / "cells"), systems_of(out / "ablations")
    draws, labels, tasks = config["bootstrap_draws"], {}, {}
    for name in data.LABELS:
        if any(name == task for task, *_ in (*grid, *ablations)):
            labels[name] = data.labels_of(data.read(name, "dev"), data.LABELS[name])
    for (name, way, variant), cells in tqdm(grid.items(), desc="intervals", unit=" systems"):
        if variant:
            raise DataError(
                f"{out / 'cells'} has a cell of {way} on {name} named {variant!r}, which no grid makes."
            )
        full = grid.get((name, "full", ""))
        known = {"metric": metrics.OF_TASK[name][0], "rows": next(iter(cells.values()))["rows"], "ways": {}}
        row = tasks.setdefault(name, known)
        row["ways"][way] = judged(cells, full, labels[name], draws)
    tried = []
    for (name, way, variant), cells in tqdm(ablations.items(), desc="ablations", unit=" systems"):
        # Full fine-tuning that was trained with the same difference, if there is such.
        full = ablations.get((name, "full", variant)) or grid.get((name, "full", ""))
        row = judged(cells, full, labels[name], draws)
        usual = [x["scores"] for seed, x in grid.get((name, way, ""), {}).items() if seed in cells]
        if len(usual) == len(cells) and None not in usual:
            row["of_the_grid"] = float(np.mean([x[metrics.OF_TASK[name][0]] for x in usual]))
        tried.append({"task": name, "way": way, "differs": variant} | row)
    some = next((cell for cells in grid.values() for cell in cells.values()), None)
    if some is None:
        raise DataError(f"there are no cells in {out / 'cells'}: run `python -m experiments.glue.run grid`.")
    if any(cell["settings"] != some["settings"] for cells in grid.values() for cell in cells.values()):
        raise DataError(f"the cells in {out / 'cells'} were made with different settings; part them.")
    sweep, minilm = out / "sweep.json", some["settings"]["model"] == "all-MiniLM-L6-v2"
    record = provenance(command) | {
        "settings": some["settings"],
        "contaminated": CONTAMINATED if minilm else {},
        "related": RELATED if minilm else {},
        "bootstrap_draws": draws,
        "tasks": {name: tasks[name] for name in [*config["epochs"], *data.LABELS] if name in tasks},
        "ablations": tried,
        "sweep": read(sweep)["ways"] if sweep.exists() else None,
        "paper": roberta_rows(),
    }
    write(out / "glue.json", record)
    return record


NAMES = {
    "full": "full fine-tuning",
    "lora_qv": "LoRA, q and v",
    "lora_all": "LoRA, all linear",
    "bitfit": "BitFit",
    "head": "the head alone",
    "adapter": "adapter",
    "prefix": "prefix",
    "lora_prefix": "LoRA and prefix",
}


def _percent(x: float, sign: str = "") -> str:
    return f"{100 * x:{sign}.1f}"


def report(record: dict[str, Any]) -> str:
    """The record as Markdown tables."""
    tasks, order = record["tasks"], [*NAMES]
    present = dict.fromkeys(way for task in tasks.values() for way in task["ways"])
    ways = sorted(present, key=lambda way: order.index(way) if way in NAMES else len(order))
    marks = {name: "\\*" for name in record["contaminated"]} | {name: "†" for name in record["related"]}
    columns = [f"{name}{marks.get(name, '')}" for name in tasks]

    seeds = {name: max(len(row["seeds"]) for row in task["ways"].values()) for name, task in tasks.items()}

    def fewer(name: str, count: int) -> str:
        return "" if count == seeds.get(name, count) else f" ({count} of {seeds[name]} seeds)"

    def entry(name: str, way: str) -> str:
        row = tasks[name]["ways"].get(way)
        if row is None:
            return ""
        if row["diverged"]:
            return f"{row['diverged']} of {len(row['seeds'])} diverged"
        found = row["scores"][tasks[name]["metric"]]
        spread = "" if found["deviation"] is None else f" ± {_percent(found['deviation'])}"
        return _percent(found["mean"]) + spread + fewer(name, len(row["seeds"]))

    def difference(name: str, row: dict[str, Any] | None) -> str:
        if row is None or "minus_full" not in row:
            return ""
        x = row["minus_full"]
        bold = "**" if x["low"] > 0 or x["high"] < 0 else ""
        interval = f"[{_percent(x['low'], '+')}, {_percent(x['high'], '+')}]"
        return f"{bold}{_percent(x['value'], '+')}{bold} {interval}{fewer(name, len(x['seeds']))}"

    text = (
        "Mean over the seeds, ± their standard deviation, in percent; rows are to train on / to evaluate.\n\n"
    )
    first = [["metric", *(tasks[name]["metric"] for name in tasks)]]
    first.append(["rows", *(f"{x['rows']['train']:,} / {x['rows']['evaluated']:,}" for x in tasks.values())])
    first.append(["rows cut", *("{:,} / {:,}".format(*x["rows"]["cut"]) for x in tasks.values())])
    first.append(["seeds", *map(str, seeds.values())])
    first += [[NAMES.get(way, way), *(entry(name, way) for name in tasks)] for way in ways]
    for name, row in record["paper"].items():
        first.append([f"*the paper: {name}*", *(f"*{row[task]}*" if task in row else "" for task in tasks)])
    text += markdown(["", *columns], first)
    notes = [
        f"\\* {x}: its figures are contaminated.\n" for n, x in record["contaminated"].items() if n in tasks
    ]
    notes += [f"† {x}.\n" for name, x in record["related"].items() if name in tasks]
    text += "\n" + "\n".join(notes) + ("\n" if notes else "")

    text += (
        "The difference to full fine-tuning, with its 95 % interval by the paired bootstrap over development "
        "rows and seeds; bold where the interval leaves out zero.\n\n"
    )
    rest = [way for way in ways if way != "full"]
    second = []
    for way in rest:
        of_tasks = (difference(name, tasks[name]["ways"].get(way)) for name in tasks)
        second.append([NAMES.get(way, way), *of_tasks])
    text += markdown(["", *columns], second)

    text += f"\nWhat it takes; memory is of a step at {record['settings']['batch']} × "
    text += f"{record['settings']['length']} tokens, by the compiler.\n\n"
    head, third = ["", "trained", "of these the head", "on disk", "peak memory"], []
    head += ["seconds per step", "learning rate"]
    for way in ways:
        # A head of two classes, where there is one.
        name = min((n for n in tasks if way in tasks[n]["ways"]), key=lambda n: data.LABELS[n] != ("0", "1"))
        row, ratios = tasks[name]["ways"][way], []
        for task in tasks.values():
            times = [task["ways"].get(w, {}).get("seconds_per_step") for w in (way, "full")]
            ratios += [times[0] / times[1]] if all(times) else []
        trained = row["trainable"]
        peak = "on features" if row["step_bytes"] is None else f"{row['step_bytes']['peak'] / 1e6:,.0f} MB"
        speed = f"{np.median(ratios):.2f} of full's" if ratios and row["step_bytes"] else ""
        third.append(
            [NAMES.get(way, way), f"{trained['all']:,}", f"{trained['head']:,}"]
            + [f"{row['saved_bytes'] / 1e3:,.0f} kB", peak, speed, f"{row['learning_rate']:g}"]
        )
    text += markdown(head, third)

    if record["ablations"]:
        text += (
            "\nAblations, of which each differs from the table's settings in what it names; the grid's is "
            "the same way's figure in the table, of the same seeds. Full fine-tuning is the table's, or one "
            "with the same difference.\n\n"
        )
        fourth = []
        for row in record["ablations"]:
            name = metrics.OF_TASK[row["task"]][0]
            value = "diverged" if row["diverged"] else _percent(row["scores"][name]["mean"])
            usual = _percent(row["of_the_grid"]) if "of_the_grid" in row else ""
            fourth.append([row["task"], NAMES.get(row["way"], row["way"]), f"`{row['differs']}`"])
            fourth[-1] += [value, usual, difference(row["task"], row)]
        head = ["task", "way", "differs", "metric", "the grid's", "minus full fine-tuning"]
        text += markdown(head, fourth, words=3)

    if record["sweep"]:
        text += (
            "\nThe learning rates were chosen on held-out training rows: one seed, mean of the metrics.\n\n"
        )
        fifth = []
        for way, row in record["sweep"].items():
            tried = ", ".join(f"{rate}: {_percent(x['mean'])}" for rate, x in row["tried"].items())
            edge = " (at the edge)" if row["at_the_edge"] else ""
            fifth.append([NAMES.get(way, way), f"{row['learning_rate']:g}{edge}", tried])
        text += markdown(["", "chosen", "tried"], fifth, notes=1)
    return text


def draw(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = record["tasks"]
    ways = [
        w for w in NAMES if w != "full" and any("minus_full" in t["ways"].get(w, {}) for t in tasks.values())
    ]
    figure, axes = pyplot.subplots(
        1,
        max(1, len(tasks)),
        figsize=(2.1 * max(1, len(tasks)) + 1.5, 0.32 * len(ways) + 1.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
        dpi=130,
    )
    for axis, (name, task) in zip(axes[0], tasks.items(), strict=True):
        axis.axvline(0, color="#888888", linewidth=0.8)
        for i, way in enumerate(ways):
            x = task["ways"].get(way, {}).get("minus_full")
            if x is None:
                continue
            color = "#1f4e79" if "lora" in way else "#c55a11"
            axis.plot([100 * x["low"], 100 * x["high"]], [i, i], color=color, linewidth=1.4)
            axis.plot(100 * x["value"], i, "o", color=color, markersize=4)
        mark = " (contaminated)" if name in record["contaminated"] else ""
        axis.set_title(f"{name}{mark}\n{task['metric']}", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(ways)), [NAMES[way] for way in ways])
    axes[0][0].invert_yaxis()
    figure.supxlabel("points above full fine-tuning, 95 % interval", fontsize=8)
    figure.savefig(path)
    pyplot.close(figure)


def table(config: dict[str, Any], out: Path, command: str, readme: Path | None) -> None:
    """Write glue.json and glue.png, fill in the README if it is given, and print the tables."""
    record = summarise(config, out, command)
    draw(record, out / "glue.png")
    text = report(record)
    if readme is not None:
        fill(readme, {"glue.json": text})
    print(text, end="")
