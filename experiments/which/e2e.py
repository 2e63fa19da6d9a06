"""Validation loss against rank on E2E, the shape of the paper's Table 18: all ranks in one run for each seed.

    LORA_JAX_DATA=path/to/data python -m experiments.which.e2e

Writes results/E2E.json and E2E.png, and the table into README.md. Stopped and started again by the same
command, it goes on with the seeds that are not done.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

import lora_jax
from experiments.data import DataError, find_model, paper
from experiments.e2e_nlg import data
from experiments.e2e_nlg.run import spaced, token_losses
from experiments.glue import cells
from experiments.models import llama
from experiments.records import markdown, provenance, write
from experiments.which import stacked, tables

FLAGS = {
    "model": "a Llama's folder in the Hugging Face layout, one inside LORA_JAX_DATA, or a hub name",
    "length": "tokens per example; longer ones are left out",
    "steps": "optimizer steps",
    "batch": "examples per step, of each member",
    "learning_rate": "the peak of Adam's",
    "alpha": "the update's scale is alpha / rank",
    "seeds": "of the factors and the order of the data",
    "valid": "validation examples, evenly spaced",
}


class Problem(NamedTuple):
    """What is adapted, to what."""

    model: llama.Llama
    params: Any
    train: data.Examples
    valid: data.Examples


def open_problem(settings: dict[str, Any]) -> Problem:
    folder = find_model(settings["model"])
    model, params = llama.load(folder)
    tokenizer, end = Tokenizer.from_file(str(folder / "tokenizer.json")), model.config.eos_id
    # GPT-2's vocabulary has one token for both, and so do its heirs.
    begin = end if model.config.bos_id is None else model.config.bos_id
    pairs = {split: data.load_split(split) for split in ("train", "valid")}
    pairs["valid"] = spaced(pairs["valid"], settings["valid"])
    encoded = (data.encode(x, tokenizer, settings["length"], begin, end) for x in pairs.values())
    return Problem(model, params, *encoded)


def wrap(problem: Problem, settings: dict[str, Any], rank: int, seed: int) -> Any:
    key, targets = jax.random.key(seed), settings["targets"]
    return lora_jax.wrap(problem.params, rank, alpha=settings["alpha"], targets=targets, key=key)


def run_seed(problem: Problem, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """All ranks in one run: their validation losses, in the order of the settings."""

    def loss_fn(params: Any, batch: Any, key: Any) -> jax.Array:
        del key  # nothing is dropped
        loss = token_losses(problem.model, params, batch, settings["label_smoothing"])
        return loss / jnp.sum(batch["weight"][:, 1:])

    stream = data.train_batches(problem.train, settings["batch"], seed)
    done = stacked.train(
        loss_fn,
        [[wrap(problem, settings, rank, seed) for rank in settings["ranks"]]],
        [settings["learning_rate"]] * len(settings["ranks"]),
        (jax.tree.map(lambda x: x[None], next(stream)) for _ in range(settings["steps"])),
        settings["steps"],
        f"seed {seed}: {len(settings['ranks'])} ranks",
    )
    evaluate = stacked.make_eval(functools.partial(token_losses, problem.model, smoothing=0.0))
    held_out = list(data.eval_batches(problem.valid, 32))
    total = sum(np.asarray(evaluate(done.trainable, done.scales, done.frozen, x))[0] for x in held_out)
    return {
        "losses": (total / sum(float(x["weight"].sum()) for x in held_out)).tolist(),
        "first_losses": done.losses[:3, 0].tolist(),
        "costs": done.costs,
    }


def untouched_loss(problem: Problem) -> float:
    fn = jax.jit(functools.partial(token_losses, problem.model, smoothing=0.0))
    held_out = list(data.eval_batches(problem.valid, 32))
    return sum(float(fn(problem.params, x)) for x in held_out) / sum(
        float(x["weight"].sum()) for x in held_out
    )


def experiment(settings: dict[str, Any], folder: Path, command: str) -> dict[str, Any]:
    """Every seed's results; each is written to a file when it is done, and read if it is there."""
    problem = open_problem(settings)
    made = [
        cells.Cell(
            folder / f"seed_{seed}.json",
            {"settings": settings, "seed": seed},
            functools.partial(run_seed, problem, settings, seed),
        )
        for seed in range(settings["seeds"])
    ]
    done = cells.run_cells(made, command)
    return {
        "untouched": untouched_loss(problem),
        "ranks": [
            {
                "rank": rank,
                "trained": stacked.factor_numbers(wrap(problem, settings, rank, 0)),
                "losses": [seed["losses"][i] for seed in done],
                "first_losses": [[x[i] for x in seed["first_losses"]] for seed in done],
            }
            for i, rank in enumerate(settings["ranks"])
        ],
        "costs": [seed["costs"] for seed in done],
    }


def bleu() -> dict[str, float]:
    """The BLEU of the paper's Table 18, by rank."""
    known = paper()["table18_e2e_rank"]
    return dict(zip(map(str, known["ranks"]), known["BLEU"], strict=True))


def texts(record: dict[str, Any]) -> dict[str, str]:
    rows = [
        [
            str(row["rank"]),
            f"{row['trained']:,}",
            f"{np.mean(row['losses']):.4f}",
            " ".join(f"{x:.4f}" for x in row["losses"]),
            f"{record['paper'][str(row['rank'])]:.2f}" if str(row["rank"]) in record["paper"] else "",
        ]
        for row in record["ranks"]
    ]
    header = ["rank", "trained", "validation loss", "by seed", "paper: GPT-2 medium, BLEU"]
    return {"e2e": markdown(header, rows)}


def draw(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), dpi=130, layout="constrained")
    ranks = [row["rank"] for row in record["ranks"]]
    losses = np.array([row["losses"] for row in record["ranks"]])
    left.plot(ranks, losses.mean(1), "o-", color="#1f4e79")
    left.fill_between(ranks, losses.min(1), losses.max(1), color="#1f4e79", alpha=0.2, linewidth=0)
    left.set(title=f"{record['settings']['model']} (band: the seeds)", ylabel="validation loss")
    right.plot([int(rank) for rank in record["paper"]], [*record["paper"].values()], "s-", color="#666666")
    right.set(title="the paper's, GPT-2 medium", ylabel="BLEU")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("rank")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def main(arguments: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.which.e2e",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=tables.HERE / "results", help="the folder for the results"
    )
    committed = json.loads((tables.HERE / "e2e.json").read_text())
    for name, text in FLAGS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(committed[name]), help=f"{text} [{committed[name]}]")
    ranks = " ".join(map(str, committed["ranks"]))
    parser.add_argument("--ranks", type=int, nargs="+", help=f"the ranks [{ranks}]")
    given = vars(parser.parse_args(arguments))
    out = given.pop("out")
    settings = committed | {name: value for name, value in given.items() if value is not None}
    for name in (*FLAGS, "ranks"):
        if name != "model" and not 0 < np.min(settings[name]) < np.inf:
            parser.error(f"--{name.replace('_', '-')}: {settings[name]} is not above 0; write what is.")
    command = shlex.join(["python", "-m", "experiments.which.e2e", *arguments])
    try:
        published, found = bleu(), experiment(settings, out / "E2E_run", command)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    record = provenance(command, ("grain", "tokenizers")) | {"settings": settings, "paper": published} | found
    write(out / "E2E.json", record)
    draw(record, out / "E2E.png")
    if settings == committed:
        tables.publish(texts(record), out)
    else:
        print("\n".join(texts(record).values()))
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
