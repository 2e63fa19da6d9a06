"""The cost of one training gradient: by the compiler's count, and by time, the methods in turn.

    python -m experiments.benchmarks.step

The floor is the frozen forward pass and the gradient with respect to the embeddings' output: what
any method pays that sends a gradient back through every layer. Training the linear layers' biases
alone pays a little less: the gradient does not go through the first block's query, key and value.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

import lora_jax
from experiments.benchmarks import tables
from experiments.benchmarks.model import GPT, LINEAR_PER_BLOCK, next_token_loss
from experiments.records import markdown

QWIX_INSTALL = "pip install qwix==0.1.8"
SIZES = {
    "d": 512,
    "layers": 6,
    "heads": 8,
    "vocab": 8000,
    "batch": 8,
    "length": 256,
    "rank": 8,
    "dtype": "float32",
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Arm(NamedTuple):
    """A method: a function giving loss and gradients, its arguments, and gradients by a common name."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    by_name: Callable[[Any], dict[str, Any]] | None = None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in SIZES.items():
        if name == "dtype":
            parser.add_argument(
                "--dtype", choices=DTYPES, default=default, help="of the base; a and b are float32"
            )
        else:
            parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=12, help="in each, every method is timed once")
    parser.add_argument("--repeat", type=int, default=1, help="steps timed together, for fast devices")
    parser.add_argument("--out", type=Path, default=tables.HERE / "results" / "step.json")
    return parser.parse_args()


def make_arms(options: argparse.Namespace) -> tuple[dict[str, Arm], dict[str, int]]:
    """The methods, and how many numbers each trains."""
    dtype = DTYPES[options.dtype]
    model = GPT(options.vocab, options.length, options.d, options.layers, options.heads, dtype)
    init_key, token_key, wrap_key, b_key = jax.random.split(jax.random.key(0), 4)
    tokens = jax.random.randint(token_key, (options.batch, options.length), 0, options.vocab)
    params = jax.jit(model.init)(init_key, tokens)["params"]

    def loss_fn(params: Any, tokens: jax.Array, offset: jax.Array | None = None) -> jax.Array:
        return next_token_loss(model.apply({"params": params}, tokens, offset), tokens)

    wrapped = lora_jax.wrap(params, rank=options.rank, key=wrap_key)
    trainable, frozen = lora_jax.partition(wrapped)
    # With b at zero the gradient of a would be zero, and agreement of the methods would say little.
    leaves, treedef = jax.tree.flatten(trainable, is_leaf=is_weight)
    keys = jax.random.split(b_key, len(leaves))
    leaves = [
        leaf.replace(b=0.02 * jax.random.normal(k, leaf.b.shape))
        for leaf, k in zip(leaves, keys, strict=True)
    ]
    trainable = treedef.unflatten(leaves)
    adapters = {leaf.path: {"a": leaf.a, "b": leaf.b} for leaf in leaves}
    if len(adapters) != LINEAR_PER_BLOCK * options.layers:
        raise AssertionError(f"{len(adapters)} leaves were wrapped, not {LINEAR_PER_BLOCK} in every block")

    def floor(offset: jax.Array, params: Any, tokens: jax.Array) -> jax.Array:
        return loss_fn(params, tokens, offset)

    def low_rank(trainable: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        return lora_jax.lora(loss_fn)(lora_jax.combine(trainable, frozen), tokens)

    def dense(adapters: Any, params: Any, tokens: jax.Array) -> jax.Array:
        summed = flat(params)
        for path, pair in adapters.items():
            summed[path] = summed[path] + (pair["a"] @ pair["b"]).astype(dtype)
        return loss_fn(nested(summed), tokens)

    def by_path(grads: Any) -> dict[str, Any]:
        weights = jax.tree.leaves(grads, is_leaf=is_weight)
        return {f"{w.path}/{name}": getattr(w, name) for w in weights for name in ("a", "b")}

    biases = {
        path: x
        for path, x in flat(params).items()
        if path.endswith("/bias") and path.replace("/bias", "/kernel") in adapters
    }

    def only_biases(biases: Any, params: Any, tokens: jax.Array) -> jax.Array:
        return loss_fn(nested({**flat(params), **biases}), tokens)

    offset = jnp.zeros((options.batch, options.length, options.d), dtype)
    # Those that are held against one another stand together, and so are timed close together.
    arms = {
        "floor": Arm(jax.value_and_grad(floor), (offset, params, tokens)),
        "lora_jax": Arm(jax.value_and_grad(low_rank), (trainable, frozen, tokens), by_path),
        **make_qwix_arm(model, params, adapters, tokens, options.rank),
        "W + AB": Arm(jax.value_and_grad(dense), (adapters, params, tokens), flat),
        "full": Arm(jax.value_and_grad(loss_fn), (params, tokens)),
        "biases": Arm(jax.value_and_grad(only_biases), (biases, params, tokens)),
    }
    # What is differentiated comes first; the floor's is an activation.
    return arms, {name: 0 if name == "floor" else count(arm.args[0]) for name, arm in arms.items()}


def make_qwix_arm(model: GPT, params: Any, adapters: Any, tokens: jax.Array, rank: int) -> dict[str, Arm]:
    """The same adapters in qwix; nothing where it is not installed."""
    try:
        import qwix
    except ImportError:
        return {}
    provider = qwix.LoraProvider(module_path="block_.*", rank=rank, alpha=float(rank))
    adapted = qwix.apply_lora_to_model(model, provider)
    shapes = jax.eval_shape(adapted.init, jax.random.key(0), tokens)["params"]
    values = {
        f"{path}_lora_{name}": pair[name].astype(params["position"].dtype)
        for path, pair in adapters.items()
        for name in ("a", "b")
    }
    expected = {path: leaf.shape for path, leaf in flat(shapes).items() if "_lora_" in path}
    if expected != {path: value.shape for path, value in values.items()}:
        raise AssertionError("qwix does not adapt the same layers with the same ranks")

    def loss(trainable: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        both = nested({**frozen, **trainable})
        return next_token_loss(adapted.apply({"params": both}, tokens), tokens)

    def by_path(grads: Any) -> dict[str, Any]:
        return {path.replace("_lora_", "/"): value for path, value in grads.items()}

    return {"qwix": Arm(jax.value_and_grad(loss), (values, flat(params), tokens), by_path)}


def flat(tree: Any) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")


def nested(leaves: dict[str, Any]) -> Any:
    return unflatten_dict(leaves, sep="/")


def is_weight(node: Any) -> bool:
    return isinstance(node, lora_jax.LoraWeight)


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def compiler_figures(compiled: Any) -> dict[str, float]:
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    memory = compiled.memory_analysis()
    return {
        "gflop": cost["flops"] / 1e9,
        "gigabytes_accessed": cost["bytes accessed"] / 1e9,
        "temporary_megabytes": memory.temp_size_in_bytes / 1e6,
    }


def check_agreement(outputs: dict[str, Any], arms: dict[str, Arm], tolerance: float) -> dict[str, float]:
    """The largest difference of each method's gradients from lora_jax's, over the largest entry of that leaf.

    It also holds that no gradient is zero: a method that loses its adapters would be fast for nothing.
    """
    ours_loss, ours = outputs["lora_jax"][0], arms["lora_jax"].by_name(outputs["lora_jax"][1])
    differences = {}
    for name, arm in arms.items():
        if arm.by_name is None:
            continue
        loss, grads = outputs[name]
        theirs = arm.by_name(grads)
        if theirs.keys() != ours.keys():
            raise AssertionError(f"{name} trains other leaves than lora_jax")
        worst = abs(float(loss) - float(ours_loss)) / abs(float(ours_loss))
        for path, mine in ours.items():
            mine, other = np.asarray(mine, np.float32), np.asarray(theirs[path], np.float32)
            if not other.any():
                raise AssertionError(f"{name}: the gradient of {path} is zero")
            worst = max(worst, float(np.abs(mine - other).max() / np.abs(mine).max()))
        if worst > tolerance:
            raise AssertionError(f"{name} computes something else: its gradients differ by {worst:.2g}")
        differences[name] = worst
    return differences


def measure(
    compiled: dict[str, Any], arms: dict[str, Arm], rounds: int, repeat: int
) -> dict[str, list[float]]:
    """Seconds per step, every method once a round."""
    wall: dict[str, list[float]] = {name: [] for name in arms}
    processor: dict[str, list[float]] = {name: [] for name in arms}
    with tqdm(total=rounds * len(arms), desc="timing", unit="step") as bar:
        for number in range(rounds):
            for name in tables.in_turn(arms, number):
                gc.collect()
                # Once untimed, as in a training loop: else a step pays for pages that the one before,
                # of another method, did not need.
                jax.block_until_ready(compiled[name](*arms[name].args))
                start, start_cpu = time.perf_counter(), time.process_time()
                for _ in range(repeat):
                    out = compiled[name](*arms[name].args)
                jax.block_until_ready(out)
                wall[name].append((time.perf_counter() - start) / repeat)
                processor[name].append((time.process_time() - start_cpu) / repeat)
                del out
                bar.update()
    return wall, processor


def main() -> None:
    options = parse()
    arms, trained = make_arms(options)
    if "qwix" not in arms:
        print(f"qwix is not installed, so the run goes without it; `{QWIX_INSTALL}` adds it.")
    compiled, outputs, figures = {}, {}, {}
    for name, arm in tqdm(arms.items(), desc="compiling", unit="method"):
        compiled[name] = jax.jit(arm.fn).lower(*arm.args).compile()
        figures[name] = {"trained": trained[name], **compiler_figures(compiled[name])}
        outputs[name] = jax.block_until_ready(compiled[name](*arm.args))
    agreement = check_agreement(outputs, arms, 1e-3 if options.dtype == "float32" else 0.2)
    outputs.clear()
    seconds, processor = measure(compiled, arms, options.rounds, options.repeat)

    for name, figure in figures.items():
        figure["flops_over_floor"] = figure["gflop"] / figures["floor"]["gflop"]
        figure["seconds"] = tables.spread(seconds[name])
        figure["time_over_floor"] = tables.paired(seconds[name], seconds["floor"])
        figure["processor_time_over_floor"] = tables.paired(processor[name], processor["floor"])
    sizes = {name: getattr(options, name) for name in SIZES}
    held_to = [
        ("FLOPs, over the floor's", figures["lora_jax"]["flops_over_floor"], 1.015),
        ("time, over the floor's", figures["lora_jax"]["time_over_floor"]["median"], 1.15),
    ]
    if "qwix" in arms:
        ratio = tables.paired(seconds["lora_jax"], seconds["qwix"])
        held_to.append(("time, over qwix's", ratio["median"], 0.7))
    # The limits are those of the default sizes on a CPU; elsewhere the ratios stand without them.
    limited = sizes == SIZES and jax.default_backend() == "cpu"
    requirements = [tables.requirement(n, value, limit if limited else None) for n, value, limit in held_to]
    result = {
        **tables.about_this_run("experiments.benchmarks.step"),
        "sizes": sizes,
        "requirements": requirements,
        "methods": figures,
        "gradients_differ_from_lora_jax_by": agreement,
        "seconds_by_round": seconds,
        "processor_seconds_by_round": processor,
    }
    tables.save(result, options.out, as_text(result))


def as_text(result: dict[str, Any]) -> str:
    def row(name: str, x: dict[str, Any]) -> list[str]:
        t, ratio = x["seconds"], x["time_over_floor"]
        return [
            name,
            f"{x['trained']:,}",
            f"{x['gflop']:.1f}",
            f"{x['flops_over_floor']:.3f}",
            f"{x['gigabytes_accessed']:.2f}",
            f"{x['temporary_megabytes']:.0f}",
            f"{1e3 * t['median']:.0f} ({1e3 * t['min']:.0f} to {1e3 * t['max']:.0f})",
            f"{ratio['median']:.3f}",
            f"{x['processor_time_over_floor']['median']:.3f}",
        ]

    header = [
        "method",
        "trained numbers",
        "GFLOP",
        "over floor",
        "GB accessed",
        "temporary MB",
        "ms, median (range)",
        "over floor",
        "processor time, over floor",
    ]
    methods = markdown(header, [row(name, x) for name, x in result["methods"].items()])
    missing = "" if "qwix" in result["methods"] else f"\n\nWithout qwix; `{QWIX_INSTALL}` adds it."
    return (
        "\n".join([tables.requirements_table(result["requirements"]), methods, tables.origin(result)])
        + missing
    )


if __name__ == "__main__":
    main()
