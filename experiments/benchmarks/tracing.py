"""What 48 unrolled layers cost before they run: trace, lower, compile, against full fine-tuning.

    python -m experiments.benchmarks.tracing

Measured is the training gradient: of all parameters for the bare model, of the factors with lora.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from tqdm import tqdm

import lora_jax
from experiments.benchmarks import tables
from experiments.benchmarks.model import (
    GPT,
    Block,
    apply_functions,
    block_function,
    init_functions,
    next_token_loss,
)
from experiments.records import markdown

Apply = Callable[[Any, jax.Array], jax.Array]
STAGES = ("trace", "lower", "compile")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--rounds", type=int, default=6, help="in each, every variant is traced and lowered once; even"
    )
    parser.add_argument(
        "--compile-rounds", type=int, default=6, help="in how many of them it is also compiled; even"
    )
    parser.add_argument("--only", help="the variants whose name contains this")
    parser.add_argument("--out", type=Path, default=tables.HERE / "results" / "tracing.json")
    options = parser.parse_args()
    if options.rounds % 2 or options.compile_rounds % 2:
        parser.error("--rounds and --compile-rounds must be even: every second round has the other order")
    return options


def variants(options: argparse.Namespace) -> dict[str, tuple[Callable[[], Apply], Any]]:
    """For each variant a maker of a fresh forward function, and its parameters."""
    o = options
    tokens = jnp.zeros((o.batch, o.length), jnp.int32)
    plain_dict = init_functions(jax.random.key(0), o.vocab, o.length, o.d, o.layers)

    def linen_model(block: Any) -> GPT:
        return GPT(o.vocab, o.length, o.d, o.layers, o.heads, block=block)

    flax_dict = jax.jit(linen_model(Block).init)(jax.random.key(0), tokens)["params"]

    def linen(transform: Callable[[Any], Any]) -> Callable[[], Apply]:
        def fresh() -> Apply:
            model = linen_model(transform(Block))
            return lambda params, tokens: model.apply({"params": params}, tokens)

        return fresh

    def functions(transform: Callable[[Any], Any]) -> Callable[[], Apply]:
        def fresh() -> Apply:
            block = transform(lambda params, x: block_function(params, x, o.heads))
            return functools.partial(apply_functions, layers=o.layers, block=block)

        return fresh

    def same(block: Any) -> Any:
        return block

    return {
        "Linen": (linen(same), flax_dict),
        "Linen, nn.jit": (linen(nn.jit), flax_dict),
        "Linen, nn.remat": (linen(nn.remat), flax_dict),
        "functions": (functions(same), plain_dict),
        "functions, jax.jit": (functions(jax.jit), plain_dict),
        "functions, jax.checkpoint": (functions(jax.checkpoint), plain_dict),
    }


def bare(
    apply: Apply, params: Any, options: argparse.Namespace
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return next_token_loss(apply(params, tokens), tokens)

    return loss, (params,)


def low_rank(
    apply: Apply, params: Any, options: argparse.Namespace
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return next_token_loss(apply(params, tokens), tokens)

    def adapted(trainable: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        return lora_jax.lora(loss)(lora_jax.combine(trainable, frozen), tokens)

    wrapped = lora_jax.wrap(params, rank=options.rank, key=jax.random.key(1))
    return adapted, lora_jax.partition(wrapped)


ARMS = {"bare": bare, "lora": low_rank}


def stage_seconds(loss: Callable[..., Any], args: tuple[Any, ...], compiles: bool) -> dict[str, float]:
    """Seconds of each stage, with nothing of an earlier trace in jax's caches."""
    jax.clear_caches()
    gc.collect()
    fn = jax.jit(jax.value_and_grad(loss))
    times = [now()]
    traced = fn.trace(*args)
    times.append(now())
    lowered = traced.lower()
    times.append(now())
    if compiles:
        lowered.compile()
        times.append(now())
    seconds = {}
    for stage, (wall, cpu), (next_wall, next_cpu) in zip(STAGES, times, times[1:], strict=False):
        seconds |= {stage: next_wall - wall, f"{stage}_cpu": next_cpu - cpu}
    return seconds


def now() -> tuple[float, float]:
    """Wall-clock and processor seconds; the second is the steadier where others use the machine."""
    return time.perf_counter(), time.process_time()


def main() -> None:
    options = parse()
    chosen = {k: v for k, v in variants(options).items() if options.only is None or options.only in k}
    if not chosen:
        raise SystemExit(f"--only {options.only!r} is in the name of none of {list(variants(options))}")
    tokens = jnp.zeros((options.batch, options.length), jnp.int32)
    records: dict[str, dict[str, list[dict[str, float]]]] = {
        name: {arm: [] for arm in ARMS} for name in chosen
    }
    with tqdm(total=options.rounds * len(chosen) * len(ARMS), desc="tracing", unit="trace") as bar:
        for number in range(options.rounds):
            for name in tables.in_turn(chosen, number):
                fresh, params = chosen[name]
                for arm in tables.in_turn(ARMS, number):
                    loss, args = ARMS[arm](fresh(), params, options)
                    compiles = number < options.compile_rounds
                    records[name][arm].append(stage_seconds(loss, (*args, tokens), compiles))
                    bar.update()

    figures = {name: summarise(arms) for name, arms in records.items()}
    requirements = []
    for name, figure in figures.items():
        # Of processor time: with two cores, what else the machine does is in the other clock by tenths.
        ratio = figure["trace_and_lower_over_bare_cpu"]["median"]
        requirements.append(tables.requirement(f"{name}: trace and lower, over the bare model's", ratio, 2.2))
        if "compile_over_full_cpu" in figure:
            ratio = figure["compile_over_full_cpu"]["median"]
            requirements.append(tables.requirement(f"{name}: compile, over full fine-tuning's", ratio, 1.25))
    result = {
        **tables.about_this_run("experiments.benchmarks.tracing"),
        "sizes": {
            k: v for k, v in vars(options).items() if k not in ("out", "rounds", "compile_rounds", "only")
        },
        "requirements": requirements,
        "variants": figures,
        "seconds_by_round": records,
    }
    tables.save(result, options.out, as_text(result))


def in_both_orders(seconds: list[float]) -> list[float]:
    """The sums of two rounds each: whoever compiles second in a process takes longer by a twentieth."""
    return [first + second for first, second in zip(seconds[::2], seconds[1::2], strict=True)]


def summarise(arms: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    figure: dict[str, Any] = {
        arm: {stage: tables.spread(r[stage] for r in rounds if stage in r) for stage in rounds[0]}
        for arm, rounds in arms.items()
    }
    for clock in ("", "_cpu"):
        prepared = {
            arm: in_both_orders([r["trace" + clock] + r["lower" + clock] for r in rounds])
            for arm, rounds in arms.items()
        }
        figure["trace_and_lower_over_bare" + clock] = tables.paired(prepared["lora"], prepared["bare"])
        stage = "compile" + clock
        compiled = {
            arm: in_both_orders([r[stage] for r in rounds if stage in r]) for arm, rounds in arms.items()
        }
        if compiled["bare"]:
            figure["compile_over_full" + clock] = tables.paired(compiled["lora"], compiled["bare"])
    return figure


def as_text(result: dict[str, Any]) -> str:
    def row(name: str, x: dict[str, Any]) -> list[str]:
        cells = [name]
        for stage in STAGES:
            cells += [f"{x[arm][stage]['median']:.2f}" if stage in x[arm] else "" for arm in ARMS]
        for ratio in ("trace_and_lower_over_bare", "compile_over_full"):
            if ratio not in x:
                cells.append("")
                continue
            of, processor = x[ratio], x[f"{ratio}_cpu"]
            cells.append(
                f"{of['median']:.2f} ({of['min']:.2f} to {of['max']:.2f}); {processor['median']:.2f}"
            )
        return cells

    header = ["variant", *(f"{stage}, {arm} (s)" for stage in STAGES for arm in ARMS)]
    header += [f"{what}, ratio (range); of processor time" for what in ("trace and lower", "compile")]
    rows = [row(name, x) for name, x in result["variants"].items()]
    parts = [tables.requirements_table(result["requirements"]), markdown(header, rows)]
    return "\n".join([*parts, tables.origin(result)])


if __name__ == "__main__":
    main()
