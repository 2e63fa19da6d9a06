r"""Merges an adapter into a synthetic checkpoint, beside a plain copy of its files.

    python -m experiments.merging.run --gigabytes 8 --repeat 3

Makes a checkpoint of Llama's shapes (bfloat16, in shards) with random weights, and a PEFT adapter of rank 16
on every linear layer of the blocks. Then, one after the other and so many times: copies the files (shutil),
makes them durable, and merges with `lora-jax merge`, each in a process of its own, whose start counts. Before
each the files are read once, so that all begin with what memory holds of them. Writes results/NAME.json and
the table in README.md.

exit code: 0 the bounds hold; 1 they do not: under 1.5 GB resident, and at least half the speed of the copy
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.records import fill, provenance
from lora_jax import tensors

HERE = Path(__file__).parent
WIDTH, HIDDEN, KV, VOCABULARY = 4096, 14336, 1024, 32768
RESIDENT, SPEED = 1.5e9, 0.5  # what is held to
RANK = 16

# What the children run. The copy is made durable, as the merge is.
COPY = """
import os, shutil, sys
base, out = sys.argv[1:]
os.mkdir(out)
for name in sorted(os.listdir(base)):
    shutil.copyfile(os.path.join(base, name), os.path.join(out, name))
    handle = os.open(os.path.join(out, name), os.O_RDONLY)
    os.fsync(handle)
"""
MERGE = """
import sys
from lora_jax.cli import main
code = main(["merge", *sys.argv[1:]])
with open("/proc/self/status") as file:  # getrusage counts what its parent held as well
    print(next(line for line in file if line.startswith("VmHWM")).split()[1], file=sys.stderr)
sys.exit(code)
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.merging.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gigabytes", type=float, default=8.0, help="the size of the checkpoint (8)")
    parser.add_argument("--repeat", type=int, default=3, help="copies and merges, of which the median (3)")
    parser.add_argument("--shard", type=float, default=2.0, help="gigabytes in a shard (2)")
    parser.add_argument("--folder", type=Path, help="where to work; by default the temporary folder")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "merge.json", help="the record")
    options = parser.parse_args(arguments)
    if options.repeat < 1 or options.gigabytes <= 0:
        parser.error("write a --repeat of at least 1 and --gigabytes above 0")
    return options


def shapes(gigabytes: float) -> dict[str, tuple[int, int]]:
    """The tensors of a Llama whose number of blocks gives about that size."""
    found = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "lm_head.weight": (VOCABULARY, WIDTH)}
    layer = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (KV, WIDTH),
        "self_attn.v_proj": (KV, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (HIDDEN, WIDTH),
        "mlp.up_proj": (HIDDEN, WIDTH),
        "mlp.down_proj": (WIDTH, HIDDEN),
    }
    left = gigabytes * 1e9 / 2 - sum(n * m for n, m in found.values())
    count = max(1, round(left / sum(n * m for n, m in layer.values())))
    for i in range(count):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found


def make_base(folder: Path, gigabytes: float, shard: float) -> dict[str, tuple[int, int]]:
    folder.mkdir(parents=True)
    found = shapes(gigabytes)
    parts: list[list[str]] = [[]]
    for name, (n, m) in found.items():
        if sum(2 * found[x][0] * found[x][1] for x in parts[-1]) + 2 * n * m > shard * 1e9 and parts[-1]:
            parts.append([])
        parts[-1].append(name)
    files = {f"model-{i:05d}-of-{len(parts):05d}.safetensors": names for i, names in enumerate(parts, 1)}
    rng = np.random.default_rng(0)
    # One draw of normal numbers, of which every tensor takes a stretch: they need only look like weights.
    pool = (0.02 * rng.standard_normal(WIDTH * HIDDEN + 1_000_003, np.float32)).astype(jnp.bfloat16)

    def drawn(names: list[str]) -> Iterator[np.ndarray]:
        for name in tqdm(names, desc="making", leave=False, disable=None):
            start = int(rng.integers(1_000_003))
            n, m = found[name]
            yield np.resize(pool[start:], (n, m))

    for file, names in files.items():
        tensors.write(
            folder / file, {name: ("BF16", found[name]) for name in names}, drawn(names), {"format": "pt"}
        )
    place = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    config = {"model_type": "llama", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return found


def make_adapter(folder: Path, found: dict[str, tuple[int, int]]) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    arrays = {}
    modules = sorted({name.split(".")[-2] for name in found if "layers" in name})
    for name, (n, m) in found.items():
        if name.split(".")[-2] in modules:
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            arrays[f"{prefix}.lora_A.weight"] = rng.uniform(-1, 1, (RANK, m)).astype(np.float32) / m**0.5
            arrays[f"{prefix}.lora_B.weight"] = 1e-3 * rng.standard_normal((n, RANK), np.float32)
    kinds = {name: ("F32", x.shape) for name, x in arrays.items()}
    tensors.write(folder / "adapter_model.safetensors", kinds, iter(arrays.values()), {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def read(folder: Path) -> None:
    """Read all files once, so that the next run finds of them what it would anyway."""
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def timed(command: list[str]) -> dict[str, float]:
    """Seconds and peak resident bytes of one child."""
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    text = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text}")
    seconds = time.perf_counter() - started
    cpu = usage.ru_utime + usage.ru_stime
    found = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}
    return found | ({"resident": int(text.split()[-1]) * 1024} if text else {})


def measure(work: Path, base: Path, adapter: Path, repeat: int) -> dict[str, list[dict[str, float]]]:
    commands: dict[str, Callable[[Path], list[str]]] = {
        "copy": lambda out: [sys.executable, "-c", COPY, str(base), str(out)],
        "merge": lambda out: [*(sys.executable, "-c", MERGE, str(base), str(adapter), str(out))],
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(repeat):
        for name, command in commands.items():
            out = work / name
            read(base)
            runs[name].append(timed(command(out)))
            print(f"{name}: {runs[name][-1]}", file=sys.stderr, flush=True)
            shutil.rmtree(out)
            os.sync()  # so that no run pays for another's writing
    return runs


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    work = Path(tempfile.mkdtemp(prefix="merging-", dir=options.folder))
    try:
        base, adapter = work / "base", work / "adapter"
        found = make_base(base, options.gigabytes, options.shard)
        make_adapter(adapter, found)
        size = sum(path.stat().st_size for path in base.iterdir())
        began = datetime.now(UTC)
        load = os.getloadavg()[1]
        runs = measure(work, base, adapter, options.repeat)
    finally:
        shutil.rmtree(work)
    copy, merge = (statistics.median(x["seconds"] for x in runs[name]) for name in ("copy", "merge"))
    resident = max(x["resident"] for x in runs["merge"])
    result = {
        **provenance(
            f"python -m experiments.merging.run {' '.join(sys.argv[1:] if arguments is None else arguments)}"
        ),
        "began": began.isoformat(timespec="minutes"),
        "load_before": round(load, 1),
        "checkpoint": {"bytes": size, "tensors": len(found), "adapted": sum("layers" in x for x in found)},
        "runs": runs,
        "copy": {"seconds": copy, "gigabytes_per_second": round(size / copy / 1e9, 2)},
        "merge": {
            "seconds": merge,
            "gigabytes_per_second": round(size / merge / 1e9, 2),
            "resident_gigabytes": round(resident / 1e9, 2),
        },
        "speed_of_the_copy": round(copy / merge, 2),
        "held": resident < RESIDENT and copy / merge >= SPEED,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    table = text(result)
    print(table)
    if options.out.resolve() == HERE / "results" / "merge.json":
        fill(HERE / "README.md", {"merge.json": table})
    return 0 if result["held"] else 1


def text(result: dict) -> str:
    copy, merge = result["copy"], result["merge"]
    return (
        f"A checkpoint of {result['checkpoint']['bytes'] / 1e9:.2f} GB, {result['checkpoint']['adapted']} of "
        f"{result['checkpoint']['tensors']} tensors adapted at rank {RANK}; median of "
        f"{len(result['runs']['copy'])}; {result['machine']['cpus']} cores.\n\n"
        "| | seconds | GB/s | peak resident |\n|---|---:|---:|---:|\n"
        f"| copy of the files | {copy['seconds']:.1f} | {copy['gigabytes_per_second']:.2f} | |\n"
        f"| `lora-jax merge` | {merge['seconds']:.1f} | {merge['gigabytes_per_second']:.2f} | "
        f"{merge['resident_gigabytes']:.2f} GB |\n\n"
        f"The merge runs at {result['speed_of_the_copy']:.2f} of the copy's speed.\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
