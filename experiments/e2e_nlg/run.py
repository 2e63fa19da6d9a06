"""Adapt a causal language model to the E2E data-to-text task with LoRA, and check what came out.

The committed result is made by

    LORA_JAX_DATA=path/to/data python -m experiments.e2e_nlg.run --config experiments/e2e_nlg/config.json

Killed, preempted or interrupted, it goes on where it was when it is started again by the same command.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer
from tqdm import tqdm

import lora_jax
from experiments.data import DataError, find_model
from experiments.e2e_nlg import data
from experiments.models import generate, llama
from experiments.records import provenance
from lora_jax import checkpoint

RESULTS = Path(__file__).parent / "results"

EPILOG = """\
examples:
  the committed result (stories260K, some minutes on two cores):
    python -m experiments.e2e_nlg.run --config experiments/e2e_nlg/config.json
  the paper's hyperparameters on a model from the Hugging Face hub (wants a GPU):
    python -m experiments.e2e_nlg.run --model HuggingFaceTB/SmolLM2-135M --dtype bfloat16
  a quick look at a folder with config.json, tokenizer.json and safetensors:
    python -m experiments.e2e_nlg.run --model path/to/llama --steps 50 --warmup 5 --out /tmp/look

data: the files e2e/{train,valid,test}.txt are looked for in the folder that the environment variable
LORA_JAX_DATA names, then in ~/.cache/lora_jax; else they are downloaded (12 MB) and checked. --data names
a folder with train.txt, valid.txt and test.txt of your own, with lines MR||text.

order: a default, then what --config says, then the other flags.

the run: training saves itself in --run-dir. The same command goes on from the last save there; when training
is through, it evaluates and writes the results again. Other settings want another --run-dir or --name.
"""

# What may differ when a run goes on: it does not reach the training or its curves.
FREE = ("out", "name", "run_dir", "decode", "max_new")


def setting(default: Any, kind: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"kind": kind, "help": text})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Defaults are the LoRA paper's for GPT-2 medium (arXiv:2106.09685, table 11)."""

    model: str = setting("stories260K", str, "a folder, one inside LORA_JAX_DATA, or a hub name")
    data: str | None = setting(None, str, "a folder of your own with train.txt, valid.txt and test.txt")
    dtype: str | None = setting(None, str, "dtype of the base, such as bfloat16; as stored if not given")
    rank: int = setting(4, int, "rank of the update")
    alpha: float = setting(32.0, float, "the update is scaled by alpha / rank")
    targets: str = setting(
        "q_proj|v_proj", str, "pattern over the segments of parameter paths, or 'linear', or 'all'"
    )
    dropout: float = setting(0.1, float, "rate at which inputs of the update are dropped in training")
    learning_rate: float = setting(2e-4, float, "peak of AdamW's learning rate")
    weight_decay: float = setting(0.01, float, "AdamW's weight decay, of the adapter alone")
    warmup: int = setting(500, int, "steps of linear warm-up; a linear decay to zero follows")
    batch: int = setting(8, int, "examples per step")
    epochs: int = setting(5, int, "passes over the training set")
    steps: int | None = setting(None, int, "steps in place of epochs")
    label_smoothing: float = setting(0.1, float, "probability spread evenly over the vocabulary")
    length: int | None = setting(
        None, int, "tokens per example; longer ones are dropped. By default that of the longest"
    )
    evals: int = setting(10, int, "points of the validation curve after the first")
    eval_examples: int | None = setting(None, int, "validation examples, evenly spaced; all by default")
    eval_batch: int = setting(32, int, "examples per batch in evaluation")
    decode: int = setting(64, int, "test inputs to decode, evenly spaced")
    max_new: int = setting(100, int, "longest text to decode, in tokens")
    seed: int = setting(0, int, "of the adapter, the order of the data and dropout")
    name: str = setting("run", str, "of the files that are written")
    out: str = setting(str(RESULTS), str, "the folder they are written to")
    run_dir: str | None = setting(None, str, "where training saves itself; by default OUT/NAME_run")


def parse(
    argv: list[str],
    kind: Any = Settings,
    module: str = "run",
    description: str = __doc__,
    epilog: str = EPILOG,
) -> Any:
    """The settings of a module here, of the dataclass `kind`, from flags and the file of --config."""
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.e2e_nlg.{module}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="a JSON file of settings, named like the flags with underscores")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, field in fields.items():
        text = field.metadata["help"] + ("" if field.default is None else f" [{field.default}]")
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=field.metadata["kind"], default=argparse.SUPPRESS, help=text)
    values = vars(parser.parse_args(argv))
    if config := values.pop("config"):
        try:
            from_file = dict(json.loads(Path(config).read_text()))
        except (OSError, ValueError, TypeError) as error:
            example = Path(__file__).with_name("config.json")
            raise SystemExit(
                f"error: --config: {error}. Give a file of settings such as {example}."
            ) from None
        if unknown := sorted(set(from_file) - set(fields)):
            parser.error(f"{config}: no such setting: {unknown}; there are {sorted(fields)}")
        values = from_file | values
    return kind(**values)


def token_losses(model: llama.Llama, params: Any, batch: Any, smoothing: float) -> jax.Array:
    """The weighted sum over the batch of (1-e)·(-log p(target)) + e·mean(-log p), float32."""
    tokens, weight = batch["tokens"], batch["weight"][:, 1:]
    logits = model.apply({"params": params}, tokens[:, :-1]).astype(jnp.float32)
    minus_log = -jax.nn.log_softmax(logits)
    target = jnp.take_along_axis(minus_log, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(weight * ((1 - smoothing) * target + smoothing * minus_log.mean(-1)))


def schedule(peak: float, warmup: int, steps: int) -> optax.Schedule:
    """The learning rate: linearly up to the peak, then linearly down to zero at the last step."""
    up, down = optax.linear_schedule(0.0, peak, warmup), optax.linear_schedule(peak, 0.0, steps - warmup)
    return optax.join_schedules([up, down], [warmup])


def evaluator(model: llama.Llama, examples: data.Examples, batch: int):
    """A function of plain or wrapped parameters: the mean loss per completion token, unsmoothed."""
    total = jax.jit(lora_jax.lora(functools.partial(token_losses, model, smoothing=0.0)))
    batches = list(data.eval_batches(examples, batch))
    tokens = sum(float(b["weight"].sum()) for b in batches)

    def evaluate(params: Any) -> float:
        bar = tqdm(batches, desc="validation", leave=False)
        return sum(float(total(params, b)) for b in bar) / tokens

    return evaluate


def claim(directory: Path, settings: Settings) -> None:
    """Refuse a directory where training was begun with other settings; write them down in a new one."""
    ours = {name: value for name, value in dataclasses.asdict(settings).items() if name not in FREE}
    file = directory / "settings.json"
    if file.exists():
        theirs = json.loads(file.read_text())
        changed = [f"{name} {theirs.get(name)!r}" for name in ours if ours[name] != theirs.get(name)]
        if changed:
            raise DataError(
                f"training in {directory} was begun with {', '.join(changed)}. Give the same settings to go "
                "on with it; else another --run-dir, or delete that folder."
            )
    directory.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(ours, indent=1) + "\n")


def train(
    settings: Settings,
    model: llama.Llama,
    wrapped: Any,
    batches: Any,
    steps: int,
    evaluate: Any,
    directory: Path,
):
    """The trained tree, the two curves as [step, loss] pairs, and the seconds of each step made here."""

    def loss_fn(params, batch, key):
        del key  # the model has no dropout of its own; the update's is the step's affair
        loss = token_losses(model, params, batch, settings.label_smoothing)
        return loss / jnp.sum(batch["weight"][:, 1:])

    rate = schedule(settings.learning_rate, settings.warmup, steps)
    tx = optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-6, weight_decay=settings.weight_decay)
    step_fn = lora_jax.make_train_step(loss_fn, tx)
    state = lora_jax.TrainState.create(wrapped, tx, jax.random.key(settings.seed + 1))
    eval_at = set(np.linspace(0, steps, settings.evals + 1).round().astype(int).tolist()) - {0}
    seconds = []
    with checkpoint.Run(directory, state, batches, every=max(1, steps // 20), steps=steps) as run:
        with tqdm(run, desc="training", initial=run.step, total=steps) as bar:
            begin = time.perf_counter()
            for batch in bar:
                run.state, metrics = step_fn(run.state, batch)
                run.log({"train": metrics["loss"]})
                if run.step % max(1, steps // 100) == 0:
                    bar.set_postfix(loss=f"{float(metrics['loss']):.3f}", refresh=False)
                seconds.append(time.perf_counter() - begin)
                if run.step in eval_at:
                    run.log({"valid": evaluate(run.state.wrapped)})
                begin = time.perf_counter()
    return run.state.wrapped, read_curves(directory, steps), seconds


def read_curves(directory: Path, steps: int) -> dict[str, list]:
    """The two curves of a run; that of training as means over windows of a hundredth of the steps."""
    curves: dict[str, list] = {"train": [], "valid": []}
    window: list[float] = []
    for line in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines()):
        step = line["step"]
        if "valid" in line:
            curves["valid"].append([step, line["valid"]])
            continue
        window.append(line["train"])
        if step % max(1, steps // 100) == 0 or step == steps:
            curves["train"].append([step, float(np.mean(np.array(window, np.float32)))])
            window.clear()
    return curves


def decoder(model: llama.Llama, tokenizer: Tokenizer, mrs: list[str], bos: int, eos: int, max_new: int):
    """A function of plain or wrapped parameters: the greedy text for every MR."""
    prompts = data.encode_prompts(mrs, tokenizer, bos)
    tokens = np.full((len(prompts), max(map(len, prompts))), eos, np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, mask, prompt in zip(tokens, valid, prompts, strict=True):
        row[-len(prompt) :], mask[-len(prompt) :] = prompt, True

    greedy = functools.partial(generate.greedy, model, max_new=max_new, eos_id=eos)
    decode = jax.jit(lora_jax.lora(greedy))
    arrays = jnp.asarray(tokens), jnp.asarray(valid)

    return lambda params: [
        text.strip() for text in tokenizer.decode_batch(np.asarray(decode(params, *arrays)))
    ]


def spaced(items: list, count: int | None) -> list:
    if count is None or count >= len(items):
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def is_lora(node: Any) -> bool:
    return isinstance(node, lora_jax.LoraWeight)


def base_of(wrapped: Any) -> Any:
    """The untouched parameters inside a wrapped tree."""
    return jax.tree.map(lambda node: node.w if is_lora(node) else node, wrapped, is_leaf=is_lora)


def digests(params: Any) -> list[str]:
    return [hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for leaf in jax.tree.leaves(params)]


def holds_a_base_weight(tensors: dict[str, np.ndarray], params: Any) -> bool:
    """Whether any array of a file is a base weight, either way round, byte for byte."""
    base = set(digests(params)) | set(digests(jax.tree.map(np.transpose, params)))
    return not base.isdisjoint(digests(tensors))


def inspect_adapter(path: Path, params: Any, wrapped: Any) -> dict[str, Any]:
    """What the file holds, whether any of it is a base weight, and whether it loads as it was."""
    from safetensors.numpy import load_file

    tensors = load_file(path)
    return {
        "bytes_on_disk": path.stat().st_size,
        "numbers": sum(tensor.size for tensor in tensors.values()),
        "holds_a_base_weight": holds_a_base_weight(tensors, params),
        "loads_bit_identical": digests(lora_jax.load_adapter(path, params)) == digests(wrapped),
        "tensors": {name: f"{tensor.dtype}{list(tensor.shape)}" for name, tensor in sorted(tensors.items())},
    }


def plot(curves: dict[str, list], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(*zip(*curves["train"], strict=True), label="training, with label smoothing", linewidth=1)
    axes.plot(*zip(*curves["valid"], strict=True), "o-", label="validation, without")
    axes.set(xlabel="step", ylabel="loss per completion token (nats)", title=title, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def run(settings: Settings, command: str) -> dict[str, Any]:
    begin = time.perf_counter()
    folder = find_model(settings.model)
    model, params = llama.load(folder, settings.dtype)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    eos = model.config.eos_id
    if eos is None:
        raise DataError(f"{folder}/config.json names no eos_token_id; add it, so that texts can end.")
    # GPT-2's vocabulary has one token for both, and so do its heirs.
    bos = eos if model.config.bos_id is None else model.config.bos_id

    print("reading and tokenising the data ...", flush=True)
    pairs = {split: data.load_split(split, settings.data) for split in ("train", "valid", "test")}
    length = settings.length and min(settings.length, model.config.max_positions)
    train_set = data.encode(pairs["train"], tokenizer, length, bos, eos)
    length = train_set.tokens.shape[1]
    valid_pairs = spaced(pairs["valid"], settings.eval_examples)
    valid_set = data.encode(valid_pairs, tokenizer, length, bos, eos)
    steps = settings.epochs * (len(train_set) // settings.batch) if settings.steps is None else settings.steps
    if settings.warmup >= steps:
        raise DataError(f"the warm-up takes {settings.warmup} of {steps} steps; lower --warmup.")

    out = Path(settings.out)
    directory = Path(settings.run_dir or out / f"{settings.name}_run")
    claim(directory, settings)
    targets = None if settings.targets == "linear" else settings.targets
    wrapped = lora_jax.wrap(
        params,
        rank=settings.rank,
        alpha=settings.alpha,
        targets=targets,
        dropout=settings.dropout,
        key=jax.random.key(settings.seed),
    )
    trainable = sum(x.size for x in jax.tree.leaves(lora_jax.partition(wrapped)[0]))
    before = digests(params)

    evaluate = evaluator(model, valid_set, settings.eval_batch)
    untouched = evaluate(params)
    batches = data.train_batches(train_set, settings.batch, settings.seed)
    adapted, curves, seconds = train(settings, model, wrapped, batches, steps, evaluate, directory)
    curves["valid"].insert(0, [0, untouched])
    merged = lora_jax.merge(adapted)

    mrs = spaced(list(dict.fromkeys(mr for mr, _ in pairs["test"])), settings.decode)
    decode = decoder(model, tokenizer, mrs, bos, eos, settings.max_new)
    texts = {"untouched": decode(params), "adapted": decode(adapted), "merged": decode(merged)}

    out.mkdir(parents=True, exist_ok=True)
    adapter_file = out / f"{settings.name}.safetensors"
    lora_jax.save_adapter(adapter_file, adapted, overwrite=True)

    base_size = sum(x.size for x in jax.tree.leaves(params))
    record = {
        **provenance(command, ("grain", "tokenizers", "safetensors")),
        "settings": dataclasses.asdict(settings) | {"out": out.name, "run_dir": directory.name},
        "data": {
            "length": length,
            "train": {"examples": len(train_set), "dropped_as_too_long": train_set.dropped},
            "valid": {"examples": len(valid_set), "dropped_as_too_long": valid_set.dropped},
            "valid_completion_tokens": int((valid_set.end - valid_set.start).sum()),
        },
        "parameters": {"frozen": base_size, "trainable": trainable},
        "steps": steps,
        "validation_loss": {
            "untouched": untouched,
            "adapted": curves["valid"][-1][1],
            "merged": evaluate(merged),
        },
        "decoding": {
            "inputs": len(mrs),
            "merged_equals_adapted": sum(map(str.__eq__, texts["merged"], texts["adapted"])),
        },
        "base": {
            "bit_identical_after_training": digests(base_of(adapted)) == before == digests(params),
            "sha256": hashlib.sha256("".join(before).encode()).hexdigest(),
        },
        "adapter": inspect_adapter(adapter_file, params, adapted),
        "seconds": {
            "steps_made": len(seconds),  # by the process that wrote this
            "per_step": sum(seconds[1:]) / (len(seconds) - 1) if len(seconds) > 1 else None,
            "whole_run": time.perf_counter() - begin,
        },
        "curves": curves,
        "samples": [
            {"mr": mr, **{name: texts[name][i] for name in ("untouched", "adapted")}}
            for i, mr in spaced(list(enumerate(mrs)), 8)
        ],
    }
    (out / f"{settings.name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    plot(
        curves,
        out / f"{settings.name}.png",
        f"{settings.model}: {trainable:,} trained beside {base_size:,} frozen",
    )
    return record


def summary(record: dict[str, Any]) -> str:
    loss, sizes, adapter = record["validation_loss"], record["parameters"], record["adapter"]
    decoding, base, seconds = record["decoding"], record["base"], record["seconds"]
    rows = {
        "validation loss": " -> ".join(f"{loss[name]:.4f} {name}" for name in loss),
        "trained, beside the frozen": f"{sizes['trainable']:,} and {sizes['frozen']:,}",
        "merged decodes the same text": f"{decoding['merged_equals_adapted']} of {decoding['inputs']}",
        "base bit-identical": base["bit_identical_after_training"],
        "adapter on disk": f"{adapter['bytes_on_disk']:,} bytes, "
        f"a base weight in it: {adapter['holds_a_base_weight']}",
        "time": f"{seconds['whole_run']:.0f} s"
        + (f", {seconds['per_step'] * 1e3:.0f} ms per step" if seconds["per_step"] else ""),
    }
    return "\n".join(f"{name:30}{value}" for name, value in rows.items())


def main(argv: list[str]) -> dict[str, Any]:
    settings = parse(argv)
    try:
        record = run(settings, shlex.join(["python", "-m", "experiments.e2e_nlg.run", *argv]))
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    print(summary(record))
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
