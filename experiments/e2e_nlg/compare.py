"""Ways to adapt a causal language model to the E2E task, compared as in the LoRA paper's Table 3.

Full fine-tuning, LoRA, bottleneck adapters and prefixes: each takes the learning rate that does best on
validation loss, is trained with several seeds, and says the test meanings by beam search. BLEU, NIST, ROUGE-L
and CIDEr score the texts, with bootstrap intervals over the meanings. The committed result is made by

    LORA_JAX_DATA=path/to/data python -m experiments.e2e_nlg.compare --config experiments/e2e_nlg/compare.json

What is finished, a training run or the texts of one, is a file in --run-dir: the same command goes on with
what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer
from tqdm import tqdm

import lora_jax
from experiments import methods
from experiments.data import DataError, find_model, paper
from experiments.e2e_nlg import data, metrics, run
from experiments.e2e_nlg.run import setting
from experiments.glue.cells import Cell, run_cells
from experiments.models import generate, llama
from experiments.records import fill, markdown, provenance, write

HERE = Path(__file__).parent
CONFIG = HERE / "compare.json"

EPILOG = """\
examples:
  the committed result (stories260K, about an hour on two cores):
    python -m experiments.e2e_nlg.compare --config experiments/e2e_nlg/compare.json
  the paper's settings on a model from the Hugging Face hub (wants a GPU):
    python -m experiments.e2e_nlg.compare --model HuggingFaceTB/SmolLM2-135M --dtype bfloat16 \\
        --out my/results
  two ways, one learning rate each, on a folder with config.json, tokenizer.json and safetensors:
    python -m experiments.e2e_nlg.compare --model path/to/llama --out my/results \\
        --rates '{"full": [3e-5], "lora_qv": [2e-4]}'

order: a default, then what --config says, then the other flags. For the data see experiments.e2e_nlg.run."""

SOME_RATES = """'{"full": [3e-5], "lora_qv": [1e-4, 2e-4]}'"""

RATES = {
    "full": (1e-5, 3e-5, 1e-4),
    "lora_qv": (1e-4, 2e-4, 5e-4),
    "lora_all": (1e-4, 2e-4, 5e-4),
    "adapter": (1e-4, 3e-4, 1e-3),
    "prefix": (1e-3, 3e-3, 1e-2),
}


def rates_of(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}; write {SOME_RATES}") from None


@dataclasses.dataclass(frozen=True)
class Settings:
    """Defaults are the LoRA paper's for GPT-2 medium (arXiv:2106.09685, table 11) where it has them."""

    model: str = setting("stories260K", str, "a folder, one inside LORA_JAX_DATA, or a hub name")
    data: str | None = setting(None, str, "a folder of your own with train.txt, valid.txt and test.txt")
    dtype: str | None = setting(None, str, "dtype of the base, such as bfloat16; as stored if not given")
    rates: Any = setting(
        None, rates_of, f"JSON: ways, each with the rates to choose from [{json.dumps(RATES)}]"
    )
    seeds: int = setting(3, int, "runs of each way at its rate; the first chooses it")
    rank: int = setting(4, int, "of LoRA")
    alpha: float = setting(32.0, float, "LoRA's update is scaled by alpha / rank")
    dropout: float = setting(0.1, float, "of the inputs of LoRA's update")
    bottleneck: int = setting(64, int, "width of the adapters")
    prefix: int = setting(8, int, "positions of the prefix")
    weight_decay: float = setting(0.01, float, "AdamW's, of what is trained")
    warmup: int = setting(500, int, "steps of linear warm-up; a linear decay to zero follows")
    batch: int = setting(8, int, "examples per step")
    epochs: int = setting(5, int, "passes over the training set")
    steps: int | None = setting(None, int, "steps in place of epochs")
    label_smoothing: float = setting(0.1, float, "probability spread evenly over the vocabulary")
    length: int | None = setting(None, int, "tokens of the longest example; longer ones are dropped")
    eval_examples: int | None = setting(None, int, "validation examples, evenly spaced; all by default")
    eval_batch: int = setting(32, int, "examples per batch in evaluation")
    decode: int | None = setting(None, int, "test meanings to say, evenly spaced; all by default")
    decode_batch: int = setting(32, int, "meanings that are said at once")
    beams: int = setting(10, int, "of beam search")
    no_repeat: int = setting(4, int, "so many tokens do not come twice in one order in a text; 0 allows it")
    length_penalty: float = setting(0.9, float, "log-probabilities are divided by tokens to this power")
    max_new: int = setting(64, int, "tokens of the longest text")
    draws: int = setting(1000, int, "of the bootstrap")
    name: str = setting("compare", str, "of the files that are written")
    out: str = setting(str(HERE / "results"), str, "the folder they are written to")
    run_dir: str | None = setting(None, str, "where finished parts are kept; by default OUT/NAME_run")


# Numbers that may be zero, and those that are shares; all others are above zero.
FROM_ZERO = ("dropout", "weight_decay", "warmup", "label_smoothing", "no_repeat", "length_penalty")
SHARES = ("dropout", "label_smoothing")


def check(settings: Settings) -> None:
    """Refuse what would end in the middle of training, or train nothing.

    Raises:
        DataError: a number is out of its range, or the rates are not of ways that there are.
    """
    for field in dataclasses.fields(settings):
        name, kind, x = field.name, field.metadata["kind"], getattr(settings, field.name)
        if kind not in (int, float) or (x is None and field.default is None):
            continue
        within = isinstance(x, (int, kind)) and x < (1 if name in SHARES else math.inf)
        if not within or x < 0 or (x == 0 and name not in FROM_ZERO):
            wanted = "a whole number" if kind is int else "a number"
            wanted += " from 0 on" if name in FROM_ZERO else " above 0"
            wanted += " and below 1" if name in SHARES else ""
            raise DataError(f"--{name.replace('_', '-')} is {x!r}; give {wanted}.")
    if not isinstance(settings.rates, dict) or not settings.rates:
        raise DataError(f"--rates are {settings.rates!r}; write ways with their rates, as {SOME_RATES}.")
    if unknown := sorted(set(settings.rates) - set(methods.WAYS)):
        raise DataError(f"there are no ways {unknown} to adapt; --rates takes {', '.join(methods.WAYS)}.")
    for way, rates in settings.rates.items():
        listed = rates if isinstance(rates, (list, tuple)) else []
        good = {f"{x:g}" for x in listed if isinstance(x, (int, float)) and 0 < x < math.inf}
        if not good or len(good) < len(listed):
            raise DataError(f"--rates has {rates!r} for {way!r}; give a list of different numbers above 0.")


# --- The model and the data ----------------------------------------------------------------------------


class Task(NamedTuple):
    """All that the ways have in common."""

    settings: Settings
    model: llama.Llama
    params: Any
    tokenizer: Tokenizer
    bos: int
    eos: int
    train: data.Examples
    valid: data.Examples
    test: dict[str, list[str]]  # references by meaning
    steps: int


def load(settings: Settings) -> Task:
    folder = find_model(settings.model)
    try:
        model, params = llama.load(folder, settings.dtype)
    except ValueError as error:
        raise DataError(str(error)) from None
    eos = model.config.eos_id
    if eos is None:
        raise DataError(f"{folder}/config.json names no eos_token_id; add it, so that texts can end.")
    bos = eos if model.config.bos_id is None else model.config.bos_id
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    train = data.encode(data.load_split("train", settings.data), tokenizer, settings.length, bos, eos)
    if len(train) < settings.batch:
        raise DataError(f"{len(train)} examples do not fill a batch of {settings.batch}; lower --batch.")
    epochs = settings.epochs * (len(train) // settings.batch)
    valid = run.spaced(data.load_split("valid", settings.data), settings.eval_examples)
    test: dict[str, list[str]] = {}
    for mr, text in data.load_split("test", settings.data):
        test.setdefault(mr, []).append(text)
    return Task(
        settings,
        model,
        params,
        tokenizer,
        bos,
        eos,
        train,
        data.encode(valid, tokenizer, train.tokens.shape[1], bos, eos),
        {mr: test[mr] for mr in run.spaced(list(test), settings.decode)},
        epochs if settings.steps is None else settings.steps,
    )


def batches(examples: data.Examples, batch: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Shuffled batches for ever, of examples of like length, cut to a multiple of 32 tokens.

    What is alike is found among 16 batches' examples, which are drawn at random.
    """
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(examples))
        for window in np.split(order, range(16 * batch, len(order), 16 * batch)):
            window = window[: len(window) // batch * batch]
            window = window[np.argsort(examples.end[window], kind="stable")]
            for chosen in rng.permutation(window.reshape(-1, batch)):
                length = -(-examples.end[chosen].max() // 32) * 32
                rows = [examples.row(i) for i in chosen]
                yield {key: np.stack([row[key][:length] for row in rows]) for key in rows[0]}


# --- One way -------------------------------------------------------------------------------------------


class System(NamedTuple):
    """A way to adapt the model; its seeds and rates share what it compiles."""

    wrapped: Callable[[int], Any]  # of a seed: the tree before the first step
    optimizer: Callable[[float], optax.GradientTransformation]  # of a rate
    step: Any
    loss: Callable[[Any], float]  # of a tree: on the validation examples
    say: Callable[[Any], list[str]]  # of a tree: the texts of the test meanings


def system(task: Task, way: str) -> System:
    """The way `base` is the model as it is."""
    settings, model = task.settings, task.model

    def prepared(seed: int) -> methods.Prepared:
        return methods.prepare(
            way,
            model,
            task.params,
            jax.random.key(seed),
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            bottleneck=settings.bottleneck,
            prefix=settings.prefix,
        )

    try:
        within = (lambda fn: fn) if way == "base" else prepared(0).within
    except ValueError as error:
        raise DataError(f"this model cannot be adapted by {way!r}: {error}") from None
    smoothed = within(functools.partial(_losses, model, settings.label_smoothing))

    def loss_fn(params: Any, batch: Any, key: Any) -> jax.Array:
        del key  # the model has no dropout of its own; the update's is the step's affair
        return smoothed(params, batch) / jnp.sum(batch["weight"][:, 1:])

    shape = run.schedule(1.0, settings.warmup, task.steps)

    # The rate is in the optimizer's state, so that one compiled step serves all rates.
    @optax.inject_hyperparams
    def optimizer(peak: float) -> optax.GradientTransformation:
        decay = settings.weight_decay
        return optax.adamw(lambda count: peak * shape(count), b1=0.9, b2=0.999, eps=1e-6, weight_decay=decay)

    return System(
        lambda seed: prepared(seed).wrapped,
        optimizer,
        lora_jax.make_train_step(loss_fn, optimizer(1.0)),
        functools.partial(validation_loss, task, jax.jit(lora_jax.lora(within(_plain(model))))),
        functools.partial(say, task, jax.jit(lora_jax.lora(within(_beam(task))))),
    )


def _losses(model: llama.Llama, smoothing: float, params: Any, batch: Any) -> jax.Array:
    return run.token_losses(model, params, batch, smoothing)


def _plain(model: llama.Llama) -> Callable[..., jax.Array]:
    return functools.partial(_losses, model, 0.0)


def validation_loss(task: Task, total: Callable[..., jax.Array], tree: Any) -> float:
    """The mean loss per token of the texts, unsmoothed."""
    some = list(data.eval_batches(task.valid, task.settings.eval_batch))
    bar = tqdm(some, desc="validation", leave=False)
    return sum(float(total(tree, batch)) for batch in bar) / sum(float(b["weight"].sum()) for b in some)


class TextAlone(NamedTuple):
    """A model that is given the tokens of prompts as numbers beyond its vocabulary.

    `generate.beam` holds prompt and text together against repetition, as transformers does, so a text could
    not say a name of four tokens from its prompt. The paper's decoder looks at the text alone, as beam search
    does with this model.
    """

    model: llama.Llama

    def apply(self, variables: Any, tokens: jax.Array, *args: Any, **kwargs: Any) -> Any:
        return self.model.apply(variables, tokens % self.model.config.vocab_size, *args, **kwargs)

    def empty_cache(self, batch: int, slots: int) -> Any:
        return self.model.empty_cache(batch, slots)


def _beam(task: Task) -> Callable[..., jax.Array]:
    settings = task.settings
    search = functools.partial(
        generate.beam,
        TextAlone(task.model),
        max_new=settings.max_new,
        eos_id=task.eos,
        num_beams=settings.beams,
        length_penalty=settings.length_penalty,
        no_repeat_ngram_size=settings.no_repeat,
    )
    return lambda tree, tokens, valid: search(tree, tokens + task.model.config.vocab_size, valid)


def check_positions(task: Task) -> None:
    """Refuse texts that may become longer than the model allows; else only the beam search would."""
    settings, most = task.settings, task.model.config.max_positions
    longest = max(map(len, data.encode_prompts(list(task.test), task.tokenizer, task.bos)))
    front = settings.prefix if {"prefix", "lora_prefix"} & settings.rates.keys() else 0
    if front + longest + settings.max_new > most:
        raise DataError(
            f"a prefix of {front}, a meaning of {longest} tokens and --max-new {settings.max_new} exceed the "
            f"model's {most} positions; lower --max-new or --prefix."
        )


def say(task: Task, search: Callable[..., jax.Array], tree: Any) -> list[str]:
    """The texts of the test meanings, in their order."""
    prompts = data.encode_prompts(list(task.test), task.tokenizer, task.bos)
    tokens = np.full((len(prompts), max(map(len, prompts))), task.eos, np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, mask, prompt in zip(tokens, valid, prompts, strict=True):
        row[-len(prompt) :], mask[-len(prompt) :] = prompt, True

    size, texts = task.settings.decode_batch, [""] * len(prompts)
    # Texts of like length together: a batch takes as long as its longest.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in tqdm(range(0, len(order), size), desc="beam search", unit=" batches", leave=False):
        chosen = order[first : first + size]
        rows = np.resize(chosen, size)  # one shape: the last batch is filled up with its own rows
        new = np.asarray(search(tree, tokens[rows], valid[rows]))
        for i, text in zip(chosen, task.tokenizer.decode_batch(new[: len(chosen)]), strict=True):
            texts[i] = text.strip()
    return texts


# --- Cells ---------------------------------------------------------------------------------------------

# What a cell does not depend on.
FREE = ("rates", "seeds", "draws", "name", "out", "run_dir")
DECODING = ("decode", "decode_batch", "beams", "no_repeat", "length_penalty", "max_new")


def training(task: Task, made: System, weights: Path, rate: float, seed: int) -> dict[str, Any]:
    """Train, write what was trained to `weights`, and say what came out."""
    tx = made.optimizer(rate)
    state = lora_jax.TrainState.create(made.wrapped(seed), tx, jax.random.key(seed))
    stream = itertools.islice(batches(task.train, task.settings.batch, seed), task.steps)
    losses, seconds, seen = [], [], set()
    for batch in tqdm(stream, desc=weights.stem, total=task.steps, unit=" steps", leave=False):
        begin = time.perf_counter()
        state, found = made.step(state, batch)
        losses.append(float(found["loss"]))
        length = batch["tokens"].shape[1]
        if length in seen:  # else it may have been compiled
            seconds.append(time.perf_counter() - begin)
        seen.add(length)
    trained, _ = lora_jax.partition(state.wrapped)
    weights.parent.mkdir(parents=True, exist_ok=True)
    np.savez(weights, *[np.asarray(x) for x in jax.tree.leaves(trained)])
    window = max(1, task.steps // 20)
    return {
        "validation_loss": made.loss(state.wrapped),
        "trainable": sum(x.size for x in jax.tree.leaves(trained)),
        "seconds_per_step": float(np.median(seconds)) if seconds else None,
        "first_losses": losses[:4],
        "curve": [
            [end, float(np.mean(losses[end - window : end]))] for end in range(window, task.steps + 1, window)
        ],
    }


def restored(made: System, weights: Path, seed: int) -> Any:
    """The tree that `training` has written."""
    if not weights.exists():
        raise DataError(f"{weights} is gone; delete {weights.with_suffix('.json')} to have it made anew.")
    trained, frozen = lora_jax.partition(made.wrapped(seed))
    with np.load(weights) as arrays:
        leaves = [jnp.asarray(arrays[f"arr_{i}"]) for i in range(len(arrays.files))]
    return lora_jax.combine(jax.tree.unflatten(jax.tree.structure(trained), leaves), frozen)


class Cells(NamedTuple):
    """The finished parts of a comparison: files that are made where they are missing."""

    task: Task
    directory: Path
    system: Callable[[str], System]

    def identity(self, way: str, rate: float | None, seed: int, free: tuple[str, ...]) -> dict[str, Any]:
        settings = dataclasses.asdict(self.task.settings)
        settings = {name: x for name, x in settings.items() if name not in FREE + free}
        return {"way": way, "learning_rate": rate, "seed": seed, "settings": settings}

    def path(self, way: str, rate: float | None, seed: int, what: str) -> Path:
        stem = way if rate is None else f"{way}_{rate:g}_{seed}"
        return self.directory / f"{stem}_{what}.json"

    def training(self, way: str, rate: float | None, seed: int) -> Cell:
        path = self.path(way, rate, seed, "training")

        def make() -> dict[str, Any]:
            made = self.system(way)
            if rate is None:
                return {"validation_loss": made.loss(self.task.params), "trainable": 0}
            return training(self.task, made, path.with_suffix(".npz"), rate, seed)

        return Cell(path, self.identity(way, rate, seed, DECODING), make)

    def texts(self, way: str, rate: float | None, seed: int) -> Cell:
        weights = self.path(way, rate, seed, "training").with_suffix(".npz")

        def make() -> dict[str, Any]:
            made, begin = self.system(way), time.perf_counter()
            texts = made.say(self.task.params if rate is None else restored(made, weights, seed))
            return {"texts": texts, "seconds": time.perf_counter() - begin}

        return Cell(self.path(way, rate, seed, "texts"), self.identity(way, rate, seed, ()), make)


def make_cells(cells: Cells, command: str) -> dict[str, dict[str, Any]]:
    """Make what is missing, and read it: by way, the rates that were tried and what every seed gave."""
    settings = cells.task.settings
    run_cells([cells.training("base", None, 0)], command)
    swept = [(way, rate, 0) for way, rates in settings.rates.items() for rate in rates]
    made = run_cells([cells.training(*of_run) for of_run in swept], command)
    losses = {of_run: training["validation_loss"] for of_run, training in zip(swept, made, strict=True)}
    found: dict[str, dict[str, Any]] = {"base": {"learning_rate": None, "seeds": [0]}}
    for way, rates in settings.rates.items():
        tried = {rate: losses[way, rate, 0] for rate in rates}
        best = min(tried, key=lambda rate: np.nan_to_num(tried[rate], nan=np.inf))
        found[way] = {
            "learning_rate": best,
            "at_the_edge": len(tried) > 1 and best in (min(tried), max(tried)),
            "tried": {f"{rate:g}": loss for rate, loss in tried.items()},
            "seeds": list(range(settings.seeds)),
        }
    of_runs = [(way, row["learning_rate"], seed) for way, row in found.items() for seed in row["seeds"]]
    for name, cell in (("training", cells.training), ("texts", cells.texts)):
        made = run_cells([cell(*of_run) for of_run in of_runs], command)
        for (way, _, _), record in zip(of_runs, made, strict=True):
            found[way].setdefault(name, []).append(record)
    return found


# --- The result ----------------------------------------------------------------------------------------


def interval(draws: np.ndarray) -> list[float]:
    return np.percentile(draws, [2.5, 97.5]).tolist()


def words_of(texts: Iterable[str]) -> float:
    """The median length of a text."""
    return statistics.median(len(text.split()) for text in texts)


def judged(task: Task, found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the record says of every way: figures are means over seeds, with intervals over the meanings."""
    references, rows = list(task.test.values()), {}
    texts = [(way, some["texts"]) for way, row in found.items() for some in row["texts"]]
    for way, some in tqdm(texts, desc="metrics", unit=" systems", leave=False):
        for name, x in metrics.statistics(some, references).items():
            rows.setdefault(way, {}).setdefault(name, []).append(x)
    ways: dict[str, dict[str, Any]] = {}
    drawn: dict[str, dict[str, np.ndarray]] = {}
    for way, row in found.items():
        trainings = row["training"]
        seconds = [x["seconds_per_step"] for x in trainings if x.get("seconds_per_step")]
        ways[way] = {name: row[name] for name in row if name not in ("training", "texts")} | {
            "trainable": trainings[0]["trainable"],
            "validation_loss": [x["validation_loss"] for x in trainings],
            "seconds_per_step": float(np.median(seconds)) if seconds else None,
            "seconds_of_beam_search": [x["seconds"] for x in row["texts"]],
            "words": words_of(text for some in row["texts"] for text in some["texts"]),
            "first_losses": [x.get("first_losses") for x in trainings],
            "curves": [x.get("curve") for x in trainings],
            "metrics": {},
        }
        for name, metric in metrics.METRICS.items():
            stacked = np.stack(rows[way][name], axis=1)
            of_seeds = metric.score(stacked.sum(0))
            draws = metrics.bootstrap(stacked, name, task.settings.draws, seed=0).mean(axis=1)
            drawn.setdefault(name, {})[way] = draws
            ways[way]["metrics"][name] = {
                "value": float(of_seeds.mean()),
                "interval": interval(draws),
                "seeds": of_seeds.tolist(),
            }
            if "full" in found and way not in ("full", "base"):
                full = ways["full"]["metrics"][name]["value"]
                ways[way]["metrics"][name]["minus_full"] = {
                    "value": float(of_seeds.mean()) - full,
                    "interval": interval(draws - drawn[name]["full"]),
                }
    return ways


# The rows of the paper's Table 3 that ours are called by.
PAPER = {
    "full": "gpt2-medium FT",
    "top2": "gpt2-medium FTTop2",
    "lora_qv": "gpt2-medium LoRA",
    "adapter": "gpt2-medium AdapterH 11.09M",
    "adapter_l": "gpt2-medium AdapterL 11.09M",
    "prefix": "gpt2-medium PreLayer 0.35M",
}


def paper_rows() -> dict[str, dict[str, float]] | None:
    """The figures of Table 3 by way, where the data folder has them."""
    try:
        table = paper()["table3_e2e"]
    except DataError:
        return None
    return {way: dict(zip(table["columns"], table[name], strict=True)) for way, name in PAPER.items()}


NAMES = {
    "base": "the model as it is",
    "full": "full fine-tuning",
    "top2": "the last two layers",
    "lora_qv": "LoRA, queries and values",
    "lora_all": "LoRA, every linear layer",
    "adapter": "bottleneck adapters",
    "adapter_l": "bottleneck adapters, one a layer",
    "prefix": "prefix",
    "lora_prefix": "LoRA and prefix",
}
PERCENT = ("BLEU", "ROUGE-L")


def shown(name: str, found: dict[str, Any]) -> str:
    factor, digits = (100, 1) if name in PERCENT else (1, 2)
    value, (low, high) = factor * found["value"], (factor * x for x in found["interval"])
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def tables(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    ways, names = record["ways"], list(metrics.METRICS)
    head = ["way", "trained", "learning rate", "validation loss", *names, "words", "ms per step"]
    lines = []
    for way, row in ways.items():
        loss, rate = row["validation_loss"], row["learning_rate"]
        lines.append(
            [
                NAMES.get(way, way),
                f"{row['trainable']:,}",
                "" if rate is None else f"{rate:g}" + (" (edge)" if row["at_the_edge"] else ""),
                f"{np.mean(loss):.3f}" + (f" ({min(loss):.3f} to {max(loss):.3f})" if len(loss) > 1 else ""),
                *(shown(name, row["metrics"][name]) for name in names),
                f"{row['words']:.0f}",
                f"{1e3 * row['seconds_per_step']:.0f}" if row["seconds_per_step"] else "",
            ]
        )
    text = markdown(head, lines)
    if compared := {way: row for way, row in ways.items() if "minus_full" in row["metrics"][names[0]]}:
        lines = []
        for way, row in compared.items():
            cells = (shown(name, row["metrics"][name]["minus_full"]) for name in names)
            lines.append([NAMES.get(way, way), *cells])
        text += "\n" + markdown(["minus full fine-tuning", *names], lines)
    if of_ways := {way: row for way, row in (record["paper"] or {}).items() if way in ways}:
        columns = list(next(iter(of_ways.values())))
        lines = [[NAMES[way], *(f"{row[name]:g}" for name in columns)] for way, row in of_ways.items()]
        text += "\n" + markdown(["the paper, GPT-2 medium", *columns], lines)
    return text


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ways = {way: row for way, row in record["ways"].items() if way != "base"}
    names = list(metrics.METRICS)
    figure, axes = pyplot.subplots(1, len(names) + 1, figsize=(13, 3.4), layout="constrained", sharey=True)
    rows = range(len(ways))
    for i, row in zip(rows, ways.values(), strict=True):
        axes[0].plot(row["validation_loss"], [i] * len(row["validation_loss"]), "o", color="tab:blue")
    for axis, name in zip(axes[1:], names, strict=True):
        for i, row in zip(rows, ways.values(), strict=True):
            found = row["metrics"][name]
            axis.plot(found["interval"], [i, i], color="tab:blue", linewidth=2)
            axis.plot(found["seeds"], [i] * len(found["seeds"]), "o", color="tab:blue", markersize=4)
    for axis, name in zip(axes, ["validation loss", *names], strict=True):
        axis.set_title(name, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(rows, [f"{NAMES.get(way, way)}\n{row['trainable']:,}" for way, row in ways.items()])
    axes[0].invert_yaxis()
    figure.suptitle(
        f"{record['settings']['model']}: seeds, and 95% intervals over {record['data']['meanings']} meanings",
        fontsize=11,
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def is_committed(settings: Settings) -> bool:
    """Whether these are the settings, the name and the folder of the committed result."""
    known = Settings(**json.loads(CONFIG.read_text()))
    same = dataclasses.replace(settings, out=known.out, run_dir=None) == known
    return same and Path(settings.out).resolve() == Path(known.out).resolve()


def compare(settings: Settings, command: str) -> dict[str, Any]:
    begin = time.perf_counter()
    settings = dataclasses.replace(settings, rates=RATES if settings.rates is None else settings.rates)
    check(settings)
    task = load(settings)
    if settings.warmup >= task.steps:
        raise DataError(f"the warm-up takes {settings.warmup} of {task.steps} steps; lower --warmup.")
    check_positions(task)
    out = Path(settings.out)
    directory = Path(settings.run_dir or out / f"{settings.name}_run")
    # `base` is no way to adapt, and needs no weights of its own.
    cells = Cells(task, directory, functools.cache(functools.partial(system, task)))
    for way in settings.rates:  # one that this model has not is refused before any is trained
        cells.system(way)
    found = make_cells(cells, command)
    mrs = list(task.test)
    record = {
        **provenance(command, ("tokenizers", "sacrebleu")),
        "settings": dataclasses.asdict(settings) | {"out": out.name, "run_dir": directory.name},
        "data": {
            "train": len(task.train),
            "valid": len(task.valid),
            "dropped_as_too_long": {"train": task.train.dropped, "valid": task.valid.dropped},
            "meanings": len(mrs),
            "references": sum(map(len, task.test.values())),
            "words": words_of(text for texts in task.test.values() for text in texts),
        },
        "steps": task.steps,
        "seconds_of_the_last_call": time.perf_counter() - begin,
        "ways": judged(task, found),
        "paper": paper_rows(),
        "samples": [
            {"mr": mrs[i], "reference": task.test[mrs[i]][0]}
            | {way: row["texts"][0]["texts"][i] for way, row in found.items()}
            for i in run.spaced(list(range(len(mrs))), 8)
        ],
    }
    write(out / f"{settings.name}.json", record)
    plot(record, out / f"{settings.name}.png")
    if is_committed(settings):
        fill(HERE / "README.md", {"compare": tables(record)})
    return record


def main(argv: list[str]) -> dict[str, Any]:
    settings = run.parse(argv, Settings, "compare", __doc__, EPILOG)
    try:
        record = compare(settings, shlex.join(["python", "-m", "experiments.e2e_nlg.compare", *argv]))
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    print(tables(record))
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
