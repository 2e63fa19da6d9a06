"""Draws programs by the thousand and holds each to the law: it is satisfied, or the refusal has a name.

    python -m experiments.programs.run --programs 10000 --seed 0

A program that breaks the law is printed, made as small as it will go, and the command fails.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from experiments.programs.draw import Program, draw
from experiments.programs.law import TOLERANCE, MismatchError, Way, check
from experiments.programs.shrink import shrunk
from experiments.records import provenance

HERE = Path(__file__).parent
CLEARED_EVERY, COLLECTED_EVERY = 250, 25  # programs, so that what is kept of each does not fill the memory


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Hold drawn programs to the law.")
    parser.add_argument("--programs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compiled-every",
        type=int,
        default=20,
        help="of so many programs one is run by XLA, under jit and eagerly by turns; the others run on "
        "StableHLO's reference interpreter",
    )
    parser.add_argument("--only", type=int, help="print and check the program of this number alone")
    parser.add_argument("--out", type=Path, help="default: results/jax-VERSION.json")
    return parser.parse_args(arguments)


def program_of(seed: int, number: int) -> Program:
    return draw(random.Random(f"{seed}/{number}").randrange)


def way_of(number: int, compiled_every: int) -> Way:
    turn, rest = divmod(number, compiled_every)
    return "reference" if rest else ("jit", "eager")[turn % 2]


def failure(program: Program, way: Way, jitted: bool, seed: int) -> str | None:
    """What goes wrong with a program: a line that is the same for a smaller one that fails alike."""
    try:
        weights, inputs = program.arguments(seed)
        jax.eval_shape(program.function(), *(w.w for w in weights), *inputs)
    except Exception:  # a program that was cut where it may not be
        return None
    try:
        check(program, way, jitted, seed)
    except MismatchError as error:
        return f"MismatchError: {str(error).split()[0:2]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:30]}"
    return None


def smallest(program: Program, way: Way, jitted: bool, seed: int) -> str:
    kind = failure(program, way, jitted, seed)
    return str(shrunk(program, lambda p: failure(p, way, jitted, seed) == kind, tries=300))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.only is not None:
        program = program_of(options.seed, options.only)
        print(program)
        way = way_of(options.only, options.compiled_every)
        print(check(program, way, options.only % 3 == 1, options.only))
        return

    refused: collections.Counter[str] = collections.Counter()
    reasons: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    used: collections.Counter[str] = collections.Counter()
    depths: collections.Counter[int] = collections.Counter()
    lengths: collections.Counter[int] = collections.Counter()
    weights: collections.Counter[int] = collections.Counter()
    ways: collections.Counter[str] = collections.Counter()
    failures: list[dict[str, Any]] = []
    worst, started, processor = (0.0, 0), time.perf_counter(), time.process_time()
    # A trace makes so many objects that most of the collector's passes would find nothing.
    gc.disable()
    bar = tqdm(range(options.programs), desc="programs", unit="program", smoothing=0.02)
    for number in bar:
        program, way = program_of(options.seed, number), way_of(number, options.compiled_every)
        jitted = number % 3 == 1
        used.update(program.used)
        depths[program.depth] += 1
        lengths[program.operations] += 1
        weights[len(program.weights)] += 1
        ways[way] += 1
        try:
            outcome = check(program, way, jitted, number)
        except Exception as error:
            text = smallest(program, way, jitted, number)
            what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            failures.append({"number": number, "way": way, "what": what, "smallest": text})
            tqdm.write(f"program {number} ({way}): {what}\n{text}")
        else:
            worst = max(worst, (outcome.error, number))
            if outcome.refused:
                refused[outcome.refused] += 1
                reasons[outcome.refused][outcome.why.split(";")[0][:60]] += 1
        bar.set_postfix(refused=f"{refused.total() / (number + 1):.1%}", failures=len(failures))
        if number % COLLECTED_EVERY == 0:
            gc.collect()
        if number % CLEARED_EVERY == CLEARED_EVERY - 1:
            jax.clear_caches()

    gc.enable()

    def share(count: int) -> float:
        return round(count / max(1, options.programs), 5)

    command = f"python -m experiments.programs.run --programs {options.programs} --seed {options.seed}"
    if options.compiled_every != 20:
        command += f" --compiled-every {options.compiled_every}"
    result = {
        **provenance(command),
        "programs": options.programs,
        "operations": sum(k * v for k, v in lengths.items()),
        "tolerance": TOLERANCE,
        "mismatches": len(failures),
        "failures": failures,
        "largest_relative_difference": worst[0],
        "largest_relative_difference_in": worst[1],
        "satisfied_share": share(options.programs - refused.total() - len(failures)),
        "refused_share": share(refused.total()),
        "refused_share_by_primitive": {k: share(v) for k, v in refused.most_common()},
        "refusals": {k: dict(reasons[k].most_common(5)) for k, _ in refused.most_common()},
        "run_by": dict(ways),
        "programs_by_depth": dict(sorted(depths.items())),
        "programs_by_weights": dict(sorted(weights.items())),
        "programs_by_operations": dict(sorted(lengths.items())),
        "operations_by_kind": dict(used.most_common()),
        "seconds": round(time.perf_counter() - started, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
    }
    out = options.out or HERE / "results" / f"jax-{jax.__version__}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{result['programs']} programs of {result['operations']} operations, {len(failures)} mismatches, "
        f"{result['refused_share']:.1%} refused, {result['seconds']:.0f} s: {out}"
    )
    for primitive, part in result["refused_share_by_primitive"].items():
        print(f"  refused at {primitive}: {part:.2%}")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    # Compiling is most of the time of what XLA runs.
    jax.config.update("jax_disable_most_optimizations", True)
    main()
