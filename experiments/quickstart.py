"""Teach a small vision transformer five digits it has never seen, with LoRA and three other ways.

A Flax ViT is trained on the digits 0 to 4 (8 × 8 images that come with scikit-learn; nothing is
downloaded). Then, from a few images per class, it learns the digits 5 to 9 behind a new head:

    LoRA          updates of low rank in every linear layer, and the head in full
    full          every parameter
    head alone    the head; the rest stays as it is
    from scratch  every parameter, from random ones: what was the first training worth?

Each way runs with several seeds, at the learning rate that does best on validation images. A seed
draws the images, their order, the new head and the factors, the same for every way. The model that
LoRA adapted is merged and compared, saved, loaded and compared again.
"""

import argparse
import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

import lora_jax
from experiments.records import provenance

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter
    from safetensors.numpy import save_file
    from sklearn.datasets import load_digits
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(f'{error}; write: pip install -e ".[experiments]"') from None

LIMITS = """\
What so small a model can show: that a model's own code trains through low-rank weights, that its base
stays as it was bit for bit, that an adapter file gives the same model back, and what merging rounds off.

What it cannot show: LoRA's savings. A rank-4 update of a 64 × 64 kernel is an eighth of it (of a
4096 × 4096 kernel, 0.2%), and where many small operations make up a step, LoRA's takes no less time. Nor
how LoRA compares with full fine-tuning elsewhere: this base has seen some 670 images of five digits, and has
more to learn for the other five than a large model has for a new task. Differences as small as the spread
over the seeds mean nothing (mostly, the rank's), and few seeds and 224 test images measure it poorly.
The rates to choose from, the scale, the shots and the steps were settled with these test images in sight."""

EXAMPLES = """\
examples:
  python -m experiments.quickstart                       all of it, a minute or two on two cores
  python -m experiments.quickstart --shots 5 --seeds 10  fewer images per class, more seeds
  python -m experiments.quickstart --ranks 4 --seeds 1   a quick look

written to the folder of --out:
  quickstart.png            accuracy against rank
  quickstart.json           every number, with the command, commit, versions and machine
  adapter.safetensors       the adapter of --rank and the first seed, for lora_jax.load_adapter
  base.safetensors          what it was trained on
  full.safetensors, head.safetensors    the same by full fine-tuning, and by the head alone"""

CLASSES, BATCH = 5, 50
PRETRAINING_RATE = 2e-3
ALPHA = 4  # the update is scaled by alpha / rank, so that one learning rate serves all ranks
# From which each way's learning rate is chosen; Adam, with a linear decay to zero.
RATES = {
    "LoRA": (1e-2, 3e-2, 1e-1),
    "full": (1.5e-3, 5e-3, 1.5e-2),
    "head alone": (3e-2, 1e-1, 3e-1),
    "from scratch": (5e-4, 1.5e-3, 5e-3),
}

Images = tuple[np.ndarray, np.ndarray]  # (n, 8, 8) in [0, 1], and (n,) classes 0 to 4


# The model: plain Flax, which knows nothing of LoRA.


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(2 * x.shape[-1], name="mlp_in")(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1], name="mlp_out")(hidden)


class ViT(nn.Module):
    width: int = 64
    layers: int = 2

    @nn.compact
    def __call__(self, images):
        n = images.shape[0]
        patches = images.reshape(n, 4, 2, 4, 2).swapaxes(2, 3).reshape(n, 16, 4)  # 2 × 2 pixels each
        x = nn.Dense(self.width, name="patches")(patches)
        x = x + self.param("positions", nn.initializers.normal(0.02), (16, self.width))
        for i in range(self.layers):
            x = Block(name=f"block_{i}")(x)
        return nn.Dense(CLASSES, name="head")(nn.LayerNorm()(x).mean(axis=1))


MODEL = ViT()


@jax.jit
def initial(key: jax.Array) -> Any:
    return MODEL.init(key, jnp.zeros((1, 8, 8)))["params"]


def forward(params: Any, images: jax.Array) -> jax.Array:
    return MODEL.apply({"params": params}, images)


def loss_fn(params: Any, batch: dict[str, Any], key: Any) -> jax.Array:
    del key  # the model draws nothing
    logits = forward(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


# `lora` passes plain parameters through, so the same function serves every way.
logits_of = jax.jit(lora_jax.lora(forward))


def accuracy(params: Any, images: Images) -> float:
    return float(np.mean(np.argmax(np.asarray(logits_of(params, images[0])), axis=-1) == images[1]))


# The data.


def read_digits(seed: int) -> tuple[Images, Images, Images, Images]:
    """Train and test images of the digits 0 to 4, then of 5 to 9; a quarter is for testing."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    x, y = (digits.images[order] / 16).astype(np.float32), digits.target[order].astype(np.int32)
    parts = []
    for chosen in (y < CLASSES, y >= CLASSES):
        images, classes = x[chosen], y[chosen] % CLASSES
        cut = len(images) // 4
        parts += [(images[cut:], classes[cut:]), (images[:cut], classes[:cut])]
    return tuple(parts)


def draw(images: Images, shots: int, rng: np.random.Generator) -> tuple[Images, Images]:
    """So many images of every class, and the others."""
    x, y = images
    chosen = [rng.choice(np.flatnonzero(y == c), shots, replace=False) for c in range(CLASSES)]
    mask = np.isin(np.arange(len(y)), np.concatenate(chosen))
    return (x[mask], y[mask]), (x[~mask], y[~mask])


def batches(images: Images, rng: np.random.Generator, shift: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Batches for ever, each image moved at random by at most `shift` pixels either way."""
    x, y = images
    padded = np.pad(x, ((0, 0), (shift, shift), (shift, shift)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (8, 8), (1, 2))
    while True:
        i = rng.integers(len(y), size=BATCH)
        down, right = rng.integers(2 * shift + 1, size=(2, BATCH))
        yield {"x": windows[i, down, right], "y": y[i]}


# Training. Rate and length are in the optimizer's state, so that one compiled step serves all runs.


@optax.inject_hyperparams
def optimizer(peak: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(lambda count: peak * jnp.maximum(0.0, 1.0 - count / steps))


TX = optimizer(peak=1.0, steps=1)
lora_step = lora_jax.make_train_step(loss_fn, TX)


@jax.jit
def plain_step(trained: Any, frozen: Any, opt_state: Any, batch: Any) -> tuple[Any, Any]:
    """What the ways without LoRA use: what is trained and what not are dictionaries of modules."""
    grads = jax.grad(lambda part: loss_fn(frozen | part, batch, None))(trained)
    updates, opt_state = TX.update(grads, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state


def timed(step: Any, state: Any, data: Iterator, steps: int, bar: tqdm) -> tuple[Any, list[float]]:
    seconds = []
    for batch in itertools.islice(data, steps):
        begin = time.perf_counter()
        state = jax.block_until_ready(step(state, batch))
        seconds.append(time.perf_counter() - begin)
        bar.update()
    return state, seconds


def train_lora(wrapped: Any, rate: float, data: Iterator, steps: int, bar: tqdm) -> tuple[Any, list[float]]:
    """The trained tree, and every step's seconds."""
    state = lora_jax.TrainState.create(wrapped, optimizer(rate, steps), jax.random.key(0))
    state, seconds = timed(lambda state, batch: lora_step(state, batch)[0], state, data, steps, bar)
    return state.wrapped, seconds


def train_plain(
    trained: Any, frozen: Any, rate: float, data: Iterator, steps: int, bar: tqdm
) -> tuple[Any, list[float]]:
    state = trained, optimizer(rate, steps).init(trained)
    state, seconds = timed(lambda s, batch: plain_step(s[0], frozen, s[1], batch), state, data, steps, bar)
    return frozen | state[0], seconds


def wrap(base: Any, rank: int, key: jax.Array | None = None) -> Any:
    # The patches' kernel is 4 × 64: from rank 4 on, its factors would be larger than it is.
    return lora_jax.wrap(base, rank=rank, alpha=ALPHA, exclude="patches", train="head", key=key)


def adapt(way: str, rank: int, base: Any, random: Any, key: jax.Array, *how: Any) -> tuple[Any, list[float]]:
    """`base` has the new head already; `random` is a whole new model, with the same head."""
    if way == "LoRA":
        return train_lora(wrap(base, rank, key), *how)
    if way == "head alone":
        return train_plain({"head": base["head"]}, {k: v for k, v in base.items() if k != "head"}, *how)
    return train_plain(base if way == "full" else random, {}, *how)


def size_of(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def experiment(settings: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """What to report, and by name the first seed's models and the base they came from."""
    seed, key = settings.seed, jax.random.key(settings.seed)
    old_train, old_test, new_train, new_test = read_digits(seed)
    ranks = sorted({*settings.ranks} - {settings.rank})
    ways = [(way, settings.rank if way == "LoRA" else 0) for way in RATES]
    ways += [("LoRA", rank) for rank in ranks]
    runs = settings.seeds * (sum(map(len, RATES.values())) + len(ranks))
    bar = tqdm(total=settings.pretraining_steps + settings.steps * runs, unit=" steps", mininterval=0.5)

    bar.set_description("training on the digits 0 to 4")
    data = batches(old_train, np.random.default_rng(seed), shift=1)
    params, _ = train_plain(initial(key), {}, PRETRAINING_RATE, data, settings.pretraining_steps, bar)
    before = jax.device_get(params)

    results, models, rates = {}, {}, dict(RATES)
    for way, rank in ways:
        name = f"LoRA, rank {rank}" if rank else way
        tried = {rate: {"validation": [], "test": []} for rate in rates[way]}
        seconds = []
        for rate, number in itertools.product(tried, range(settings.seeds)):
            bar.set_description(f"{name}: rate {rate}, seed {number + 1} of {settings.seeds}")
            few, others = draw(new_train, settings.shots, np.random.default_rng([seed, number]))
            random_key, lora_key = jax.random.split(jax.random.fold_in(key, 1 + number))
            random = initial(random_key)
            base = params | {"head": random["head"]}
            data = batches(few, np.random.default_rng([seed, number, 1]))
            adapted, times = adapt(way, rank, base, random, lora_key, rate, data, settings.steps, bar)
            tried[rate]["validation"].append(accuracy(adapted, others))
            tried[rate]["test"].append(accuracy(adapted, new_test))
            models.setdefault((name, rate), (base, adapted))
            seconds += times
        best = max(tried, key=lambda rate: np.mean(tried[rate]["validation"]))
        rates[way] = (best,)  # the other ranks take that of --rank
        models[name] = base, adapted = models[name, best]
        if rank:
            trained = lora_jax.summary(adapted).trainable
        else:
            trained = size_of(base["head"] if way == "head alone" else base)
        results[name] = {
            "rank": rank,
            "accuracy": tried[best]["test"],
            "learning_rate": best,
            "tried": tried,
            "trained": trained,
            "share": trained / size_of(base),
            "step_seconds": float(np.median(seconds)),
        }
    bar.close()
    require(same_bits(before, params), "after all runs the base is bit for bit what it was")
    return {
        "images": {
            "5 to 9": settings.shots * CLASSES,
            "tested on": len(new_test[1]),
            "0 to 4": len(old_train[1]),
        },
        "accuracy_on_0_to_4": accuracy(params, old_test),
        "results": results,
    }, models | {"images": new_test[0]}


# What a user may rely on, checked on the trained model.


def require(condition: Any, text: str) -> None:
    if not condition:
        raise SystemExit(f"FAILED: {text}")
    print(f"  ok: {text}")


def same_bits(first: Any, second: Any) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def verify(base: Any, adapted: Any, images: np.ndarray, path: Path) -> dict[str, Any]:
    """Merge, save and load; what merging costs in float32 and in bfloat16."""
    unmerged, merged = logits_of(adapted, images), logits_of(lora_jax.merge(adapted), images)
    close = np.allclose(merged, unmerged, rtol=1e-4, atol=1e-4)
    require(close, "merged, the model gives the same logits up to rounding")
    lora_jax.save_adapter(path, adapted, overwrite=True)
    loaded = lora_jax.load_adapter(path, base)  # compares the base with the one that was adapted
    same = same_bits(logits_of(loaded, images), unmerged)
    require(same, "saved and loaded, the adapter gives the same logits bit for bit")

    # The same adapter on the base in bfloat16, where merging rounds small updates away.
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    narrow = lora_jax.swap(wrap(narrow, adapted["block_0"]["mlp_in"]["kernel"].rank), adapted)
    costs = {}
    for dtype, wrapped in (("float32", adapted), ("bfloat16", narrow)):
        found = lora_jax.check_merge(jax.jit(forward), wrapped, images.astype(dtype))
        costs[dtype] = {
            "lost": float(np.median([leaf.lost for leaf in found.leaves])),
            "unmoved": float(np.median([leaf.unmoved for leaf in found.leaves])),
            "difference": found.difference,
            "scale": found.scale,
            "agreement": found.agreement,
        }
    return costs


def save_plain(path: Path, params: Any) -> int:
    """Write an ordinary checkpoint, and count its bytes."""
    save_file({name: np.asarray(x) for name, x in flatten_dict(params, sep="/").items()}, path)
    return path.stat().st_size


# The report.


def print_tables(record: dict[str, Any]) -> None:
    print("\nMerging ΔW into W (medians over layers):")
    print(f"{'':14}{'ΔW lost':>10}{'W unmoved':>12}{'logits differ by':>20}{'same answers':>15}")
    for dtype, row in record["merging"].items():
        difference = f"{row['difference']:.1e} of {row['scale']:.1f}"
        print(f"{dtype:14}{row['lost']:10.2%}{row['unmoved']:12.2%}{difference:>20}{row['agreement']:15.1%}")

    images, results, settings = record["images"], record["results"], record["settings"]
    print(
        f"\nThe base: {record['accuracy_on_0_to_4']:.1%} on the digits 0 to 4, from {images['0 to 4']} images"
        f"\nThe digits 5 to 9, from {images['5 to 9']} images, tested on {images['tested on']} "
        f"(mean ± standard deviation over {settings['seeds']} seeds):"
    )
    print(f"{'':14}{'accuracy':>14}{'trained':>10}{'share':>9}{'bytes on disk':>16}{'step':>10}{'rate':>9}")
    for name, row in results.items():
        runs = row["accuracy"]
        mean = f"{np.mean(runs):.1%}" + (f" ± {100 * np.std(runs, ddof=1):.1f}" if len(runs) > 1 else "")
        size, step = f"{row['bytes']:,}" if "bytes" in row else "", f"{row['step_seconds'] * 1e3:.1f} ms"
        print(
            f"{name:14}{mean:>14}{row['trained']:10,}{row['share']:9.1%}{size:>16}{step:>10}"
            f"{row['learning_rate']:9g}"
        )


def plot(record: dict[str, Any], path: Path) -> None:
    """Accuracy against rank, and the levels of the other ways."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = sorted(record["results"].items(), key=lambda item: item[1]["rank"] or 1e9)
    runs = [row["accuracy"] for _, row in rows]
    mean, low, high = np.mean(runs, axis=1), np.min(runs, axis=1), np.max(runs, axis=1)
    colors = {"full": "tab:green", "head alone": "tab:red", "from scratch": "tab:gray"}
    ranks = len(rows) - len(colors)
    for i, (name, _) in enumerate(rows[ranks:], ranks):
        axes.axhline(mean[i], linestyle="--", linewidth=1, color=colors[name])
        axes.errorbar(
            i, mean[i], [[mean[i] - low[i]], [high[i] - mean[i]]], fmt="s", capsize=4, color=colors[name]
        )
    bars = [(mean - low)[:ranks], (high - mean)[:ranks]]
    axes.errorbar(range(ranks), mean[:ranks], bars, fmt="o-", capsize=4, color="tab:blue")
    names = [f"rank {row['rank']}" if row["rank"] else name for name, row in rows]
    ticks = [f"{name}\n{row['trained']:,}" for name, (_, row) in zip(names, rows, strict=True)]
    axes.set_xticks(range(len(rows)), ticks)
    axes.axvspan(ranks - 0.5, len(rows) - 0.5, color="black", alpha=0.04, linewidth=0)
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set(xlabel="LoRA's rank, or the way; below it, how many parameters are trained")
    axes.set(ylabel="test accuracy on the digits 5 to 9")
    shots, seeds = record["settings"]["shots"], record["settings"]["seeds"]
    axes.set_title(
        f"Five new digits from {shots} images each: mean and range over {seeds} seeds", fontsize=11
    )
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)


def run(settings: argparse.Namespace, out: Path) -> dict[str, Any]:
    record, models = experiment(settings)
    results, main = record["results"], f"LoRA, rank {settings.rank}"
    base, adapted = models[main]
    record["merging"] = verify(base, adapted, models["images"], out / "adapter.safetensors")
    save_plain(out / "base.safetensors", base)
    results[main]["bytes"] = (out / "adapter.safetensors").stat().st_size
    results["full"]["bytes"] = save_plain(out / "full.safetensors", models["full"][1])
    results["from scratch"]["bytes"] = results["full"]["bytes"]
    head = {"head": models["head alone"][1]["head"]}
    results["head alone"]["bytes"] = save_plain(out / "head.safetensors", head)

    print("\nWhat LoRA trains (the other block is like block_0):")
    lines = str(lora_jax.summary(adapted)).splitlines()
    print("\n".join(line for line in lines if not line.startswith("block_") or line.startswith("block_0")))
    return record


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("write a whole number, at least 1")
    return int(text)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.quickstart",
        description=f"{__doc__}\n{LIMITS}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def option(name: str, default: Any, text: str, **how: Any) -> None:
        parser.add_argument(name, default=default, help=f"{text} [%(default)s]", **{"type": positive} | how)

    option("--out", Path("quickstart_out"), "the folder to write to", type=Path)
    option("--seed", 0, "of everything that is drawn", type=int)
    option("--seeds", 3, "runs of every way and rank")
    option("--shots", 20, "images per class to learn 5 to 9 from, at most 100")
    option("--rank", 4, "of the LoRA that the table compares, and that is merged and saved")
    option("--ranks", [1, 2, 4, 8, 16], "of the figure", nargs="+")
    option("--steps", 100, f"of every adaptation, {BATCH} images each")
    option("--pretraining-steps", 1000, "on the digits 0 to 4")
    settings = parser.parse_args(argv)
    if settings.shots > 100:
        parser.error("--shots: write at most 100; there are some 130 images per class to draw from")
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        (settings.out / "quickstart.json").touch()
    except OSError as error:
        parser.error(f"{error}; write --out with a folder that can be written to")

    begin, cpu = time.perf_counter(), time.process_time()
    with jax.default_matmul_precision("highest"):  # else a GPU would compare in less than float32
        record = {"settings": {k: v for k, v in vars(settings).items() if k != "out"}} | run(
            settings, settings.out
        )
    print_tables(record)
    plot(record, settings.out / "quickstart.png")
    seconds = {"wall": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
    command = shlex.join(["python", "-m", "experiments.quickstart", *argv])
    made = provenance(command, ("scikit-learn", "matplotlib", "safetensors"))
    (settings.out / "quickstart.json").write_text(
        json.dumps(made | record | {"seconds": seconds}, indent=1) + "\n"
    )
    print(f"\n{LIMITS}\n\n{seconds['wall']:.0f} s; figure, numbers and adapter are in {settings.out}{os.sep}")


if __name__ == "__main__":
    main(sys.argv[1:])
