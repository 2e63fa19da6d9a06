"""Kill a training run at random moments, resume it each time, and compare it with one never killed.

The committed result is made by

    python -m experiments.kills.run --kills 50 --seed 0

A child, experiments/kills/train.py, trains a small model and saves often. It is killed with SIGKILL and
started again by the same command until it has finished. Then its curve must be, byte for byte, that of
a run that was never killed, and so must its last state and the saves it kept. The command fails if they
differ, if a save cannot be read, or if a resumed run starts before the last whole save.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.kills.train import make_state
from experiments.records import provenance
from lora_jax import checkpoint

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TEMPORARY = ".orbax-checkpoint-tmp"

EPILOG = """\
examples:
  the committed result, some minutes:
    python -m experiments.kills.run --kills 50 --seed 0
  a quick look:
    python -m experiments.kills.run --kills 3 --steps 200 --out /tmp/kills.json

Half of the kills come at a moment drawn over a child's life, from its first instruction on; the others
some milliseconds after a save has begun, while its folder has orbax's temporary name. A run that finishes
before all kills are spent is compared and followed by another from the start.
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=50, help="how often a child is killed [50]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [0]")
    parser.add_argument("--steps", type=int, default=2000, help="steps of the training run [2000]")
    parser.add_argument("--every", type=int, default=20, help="steps between two saves [20]")
    parser.add_argument("--out", type=Path, help="default: results/jax-VERSION.json")
    return parser.parse_args(arguments)


def start(directory: Path, options: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.kills.train", "--directory", str(directory)]
    command += ["--steps", str(options.steps), "--every", str(options.every)]
    log = (directory.parent / f"{directory.name}.log").open("w")
    with log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def saves_of(directory: Path) -> list[int]:
    """The whole saves: folders whose name is a number."""
    return sorted(int(e.name) for e in (directory / "checkpoints").glob("*") if e.name.isdigit())


def unfinished(directory: Path) -> list[str]:
    return sorted(e.name for e in (directory / "checkpoints").glob(f"*{TEMPORARY}*"))


def resumed_at(directory: Path) -> int | None:
    """The step that a child went on from, if it came to say so."""
    words = (directory.parent / f"{directory.name}.log").read_text().split()
    return int(words[words.index("step") + 1]) if "step" in words else None


def logged(directory: Path) -> tuple[int, bool]:
    """The last step in metrics.jsonl, and whether a torn line follows."""
    file = directory / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
    return (json.loads(lines[-2])["step"] if len(lines) > 1 else 0), lines[-1] != b""


def bits(state: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    def data(x: jax.Array) -> np.ndarray:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return [(str(x.dtype), x.shape, data(x).tobytes()) for x in jax.tree.leaves(state)]


def wait_for_a_save(child: subprocess.Popen, directory: Path, number: int) -> None:
    """Until a child has begun its save of this number, or has ended."""
    seen: set[str] = set()
    while len(seen) < number and child.poll() is None:
        seen.update(unfinished(directory))
        time.sleep(0.001)


def kill(directory: Path, options: argparse.Namespace, draw: random.Random, life: float) -> dict | None:
    """Start a child and kill it; None if it finished before."""
    begin = time.perf_counter()
    child = start(directory, options)
    planned = draw.choice(["at any moment", "in a save"])
    if planned == "in a save":
        wait_for_a_save(child, directory, draw.randint(1, 12))
        time.sleep(draw.uniform(0, 0.08))
    else:
        try:
            child.wait(draw.uniform(0, life))
        except subprocess.TimeoutExpired:
            pass
    child.kill()
    if child.wait() == 0:
        return None
    if child.returncode != -9:
        raise SystemExit(f"a child failed:\n{(directory.parent / f'{directory.name}.log').read_text()}")
    last, torn = logged(directory)
    return {
        "planned": planned,
        "seconds": round(time.perf_counter() - begin, 3),
        "went_on_from": resumed_at(directory),
        "saves": saves_of(directory),
        "unfinished": unfinished(directory),
        "deleting": any((directory / "checkpoints" / "deleted").glob("*")),
        "logged": last,
        "torn_line": torn,
    }


def unreadable(directory: Path, saves: list[int], template: Any) -> list[str]:
    """What goes wrong when saves are read."""
    found = []
    for step in saves:
        try:
            checkpoint.restore(directory, template, step)
        except Exception as error:
            found.append(f"the save of step {step} cannot be read: {error}")
    return found


def where(entry: dict[str, Any]) -> str:
    if entry["went_on_from"] is None:
        return "start-up"
    return "in a save" if entry["unfinished"] else "between saves"


def finish(directory: Path, options: argparse.Namespace) -> float:
    begin = time.perf_counter()
    if start(directory, options).wait() != 0:
        raise SystemExit(f"a child failed:\n{(directory.parent / f'{directory.name}.log').read_text()}")
    return time.perf_counter() - begin


def compare(directory: Path, reference: Path, template: Any) -> dict[str, bool]:
    ours, theirs = (checkpoint.restore(d, template) for d in (directory, reference))
    curves = [(d / "metrics.jsonl").read_bytes() for d in (directory, reference)]
    return {
        "curve_identical": curves[0] == curves[1],
        "state_identical": bits(ours) == bits(theirs),
        "same_saves_kept": saves_of(directory) == saves_of(reference),
    }


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    draw, begin = random.Random(options.seed), time.perf_counter()
    template, reference = make_state(), folder / "reference"
    seconds = finish(reference, options)
    life = min(seconds, 10.0)  # of which start-up is a good part
    kills: list[dict[str, Any]] = []
    runs: list[dict[str, bool]] = []
    problems: list[str] = []
    read = 0
    bar = tqdm(total=options.kills, desc="kills", unit="kill")
    while len(kills) < options.kills:
        directory, whole = folder / f"run_{len(runs)}", set()
        expected, finished = 0, False
        while not finished:
            entry = None
            if len(kills) < options.kills:
                entry = kill(directory, options, draw, life)
            else:
                finish(directory, options)
            finished, at = entry is None, resumed_at(directory)
            if at not in (expected, None):
                problems.append(f"run {len(runs)} went on from {at}; the last whole save was {expected}")
            if entry is not None:
                expected = max(entry["saves"], default=0)
                problems += unreadable(directory, sorted(set(entry["saves"]) - whole), template)
                whole.update(entry["saves"])
                kills.append({"run": len(runs), **entry, "lost_steps": max(0, entry["logged"] - expected)})
                bar.update()
        read += len(whole)
        runs.append(compare(directory, reference, template))
    bar.close()
    problems += [f"run {i}: not {name}" for i, r in enumerate(runs) for name, ok in r.items() if not ok]
    lost = [entry["lost_steps"] for entry in kills]
    command = f"python -m experiments.kills.run --kills {options.kills} --seed {options.seed}"
    if (options.steps, options.every) != (2000, 20):
        command += f" --steps {options.steps} --every {options.every}"
    return {
        **provenance(command, ("grain",)),
        "steps": options.steps,
        "save_every": options.every,
        "seconds_never_killed": round(seconds, 1),
        "seconds": round(time.perf_counter() - begin, 1),
        "kills": len(kills),
        "killed": dict(Counter(map(where, kills)).most_common()),
        "killed_while_deleting": sum(entry["deleting"] for entry in kills),
        "killed_while_logging": sum(entry["torn_line"] for entry in kills),
        "runs": runs,
        "saves_read": read,
        "lost_steps": {"mean": round(float(np.mean(lost)), 2), "max": max(lost)} if lost else {},
        "problems": problems,
        "each_kill": kills,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        record = run(options, Path(folder))
    out = options.out or HERE / "results" / f"jax-{jax.__version__}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    identical = sum(all(r.values()) for r in record["runs"])
    print(
        f"{record['kills']} kills {record['killed']}; {identical} of {len(record['runs'])} runs identical to "
        f"one never killed; {record['saves_read']} saves read; steps lost: {record['lost_steps']}: {out}"
    )
    if record["problems"]:
        raise SystemExit("\n".join(record["problems"]))
    return record


if __name__ == "__main__":
    main()
