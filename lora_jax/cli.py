"""The command `lora-jax`: what is in an adapter, and an adapter merged into a checkpoint."""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np

from lora_jax import analysis, stream
from lora_jax.factors import Factors
from lora_jax.files import local_path, read_adapter
from lora_jax.params import Adapter
from lora_jax.peft import CONFIG, WEIGHTS, PeftAdapter, read_peft
from lora_jax.weight import FullWeight, LoraWeight

PROGRAM = "lora-jax"
_MARK = "lora_jax.json"  # what `save_adapter` leaves in a folder

HELP = """\
LoRA adapters on the command line: what is in one, and one merged into its base.

  lora-jax inspect ADAPTER              targets, ranks, norms, effective rank, size
  lora-jax merge BASE ADAPTER OUT       the base plus the adapter, as a checkpoint of its own

`lora-jax inspect --help` and `lora-jax merge --help` have examples and formulas."""

CODES = """\
exit codes:
  0    done
  1    something in the files is wrong, or in the way; what, and what to do, is on stderr. Also where the
       report cannot be written; stderr says whether OUT is complete
  2    the command is written wrong
  129, 130, 143  stopped by SIGHUP, SIGINT (Ctrl-C) or SIGTERM; nothing is left half"""

INSPECT = f"""\
Shows what an adapter holds: one of PEFT (the folder that save_pretrained wrote, with {CONFIG}), or
one of this library (the folder, or the .safetensors file, that save_adapter wrote).

example:
  lora-jax inspect my-adapter
  lora-jax inspect my-adapter --json | jq '.targets[] | select(.effective_rank < 2) | .name'

A target's update is ΔW = s·B·A with A of shape (r, in), B of shape (out, r) and s = alpha / r (or
alpha / √r with use_rslora). Of it the table has, without ever forming ΔW:
  |A|, |B|        Frobenius norms of the factors
  |ΔW|            Frobenius norm of the update, the square root of the sum of σᵢ²
  |ΔW|₂           its spectral norm, the largest singular value σ₁
  eff. rank       exp(-Σ pᵢ ln pᵢ) with pᵢ = σᵢ / Σσ: r if all directions weigh the same, 1 if one has
                  all; 0 for an update that is zero (Roy and Vetterli, 2007)
Layers that are stacked in one leaf have a line each, layers/kernel[3]."""

INSPECT_JSON = """\
--json prints one object:
  adapter   the path            format   "peft" or "lora_jax"
  config    base_model, bias, dropout, use_rslora, target_modules, modules_to_save; null where unknown
  targets   a list of {name, kind, shape, rank, alpha, scale, norm_a, norm_b, norm, spectral_norm,
            effective_rank, dtype, numbers, bytes}; shape is (out, in), for an embedding (num, dim), and
            for an adapter of this library in then out axes
  full      leaves trained in full, a list of {name, shape, dtype, numbers, bytes}
  totals    {targets, full, numbers, bytes}"""

MERGE = """\
Adds a PEFT adapter to a model in the Hugging Face layout and writes a model of that layout, which
transformers opens without PEFT.

  BASE     a folder with config.json and model.safetensors, or the shards and their index
  ADAPTER  the folder that PEFT's save_pretrained wrote; one of this library is written as such by
           lora_jax.peft.save_peft
  OUT      the folder to make; BASE and ADAPTER are only read

example:
  lora-jax merge Llama-3.2-1B my-adapter merged
  lora-jax merge gpt2 my-adapter merged --dtype float32 --json > report.json

Computes W + s·B·A in float32 (float64 if the base is), a few rows at a time, and rounds once to the
base's dtype; entries whose update is zero keep their bits. Biases and modules_to_save of the adapter
replace the base's. Memory stays bounded, whatever the model's size.

The other files in BASE, such as the tokenizer, are copied, those of its folders too. Not copied are weights
in other forms (.bin, .pt, .gguf and so on, and all with .safetensors in the name), an adapter_config.json,
what has a name that begins with a dot, and links to folders; a note on stderr names what is left out.

OUT appears when all of it is written and durable, and not before; an empty folder at OUT is filled then.
What fails or is interrupted leaves nothing there. --overwrite replaces a model: config, weights and
tokenizer whatever they hold, other files only if they equal those of BASE, and never a folder with anything
else. Only a kill that cannot be caught (SIGKILL, out of memory, a power cut) leaves a hidden folder
.lora_jax-..., as large as the model, beside OUT, or in it if that was an empty folder; remove it. A merge
that starts beside one says so.

The report has for every tensor:
  rms ΔW/W   how large the update is beside the weight
  ΔW lost    |(W' - W) - ΔW| / |ΔW|: the share of the update that rounding lost. In bfloat16 an entry moves
             only if its update is at least 2⁻⁹ or so of it. If much is lost, write --dtype float32, or
             keep the adapter unmerged.
  unmoved    the share of entries with an update that kept their old value"""

MERGE_JSON = """\
--json prints one object instead of the table:
  out, files, bytes, seconds       the folder, its safetensors files, their bytes, and the time it took
  notes                            what is also on stderr: a prefix, a tied head, what was not copied
  tensors                          a list of {name, dtype, size, lost, unmoved}; size is rms ΔW/W, null where
                                   W is zero
  replaced                         the names of the tensors that the adapter holds in full"""

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    >>> main(["inspect", "no/such/adapter"])
    1
    """
    try:
        with _stoppable():
            for name in ("stdout", "stderr"):
                if getattr(sys, name) is None:  # closed; a file of the model would get its number
                    setattr(sys, name, _nowhere())
                output = getattr(sys, name)
                if isinstance(output, io.TextIOWrapper):
                    output.reconfigure(errors="replace")  # the tables have Δ, which not every terminal has
            options = _parser().parse_args(arguments)
            # Nothing here gains from an accelerator, and taking one would wait for, or stop, who has it.
            jax.config.update("jax_platforms", "cpu")
            if options.command == "inspect":
                _inspect(options)
            else:
                _merge(options)
    except KeyboardInterrupt as stop:
        _tell(f"{PROGRAM}: interrupted; nothing was left half")
        return 128 + (stop.number if isinstance(stop, _Stopped) else signal.SIGINT)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        _tell(f"{PROGRAM}: {error}")
        return 1
    return 0


def _tell(text: str) -> None:
    """Write to stderr, where that can be written to: a closed pipe stops nothing."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = _nowhere()


def _show(text: str) -> None:
    """Write to stdout."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = _nowhere()  # else what is left of the text fails once more at the exit
        raise


def _nowhere() -> io.TextIOWrapper:
    return open(os.devnull, "w", encoding="utf-8")


class _Stopped(KeyboardInterrupt):
    """A signal that ends the command."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextmanager
def _stoppable() -> Iterator[None]:
    """Have the signals that end a command raise, so that what is half written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    # An ignored one, as under nohup, stays so; None is a handler that Python did not set.
    old = {number: handler for number, handler in old.items() if handler not in (signal.SIG_IGN, None)}

    def stop(number: int, frame: Any) -> None:
        for each in old:  # a second one would end the removal
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(number)

    for number in old:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=PROGRAM, description=HELP, epilog=CODES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="inspect | merge")
    inspect = commands.add_parser(
        "inspect", description=INSPECT, epilog=f"{INSPECT_JSON}\n\n{CODES}", formatter_class=raw
    )
    inspect.add_argument("adapter", metavar="ADAPTER", help="a folder, or a file of this library")
    inspect.add_argument("--json", action="store_true", help="print JSON and no table")
    merge = commands.add_parser(
        "merge", description=MERGE, epilog=f"{MERGE_JSON}\n\n{CODES}", formatter_class=raw
    )
    merge.add_argument("base", metavar="BASE", help="the model's folder")
    merge.add_argument("adapter", metavar="ADAPTER", help="the PEFT adapter's folder")
    merge.add_argument("out", metavar="OUT", help="the folder to write")
    merge.add_argument(
        "--dtype", choices=_DTYPES, help="what all floating tensors become; by default each keeps its own"
    )
    merge.add_argument(
        "--shard-size",
        type=_size,
        metavar="SIZE",
        help="the largest file, such as 5GB or 500MB; by default the files are those of the base",
    )
    merge.add_argument(
        "--overwrite", action="store_true", help="replace a model that is at OUT, once the new one is whole"
    )
    merge.add_argument("--json", action="store_true", help="print JSON and no table")
    return parser


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text, re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[(found[2] or "").upper()]) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 5GB or 500MB")
    return size


def _is_ours(adapter: str) -> bool:
    """Whether there is an adapter of this library at a path, rather than one of PEFT."""
    place = local_path(adapter)
    if place.suffix == ".safetensors" and (place.name == WEIGHTS or (place.parent / CONFIG).is_file()):
        raise ValueError(f"{str(place)!r} is half of a PEFT adapter; give its folder, {str(place.parent)!r}.")
    return place.suffix == ".safetensors" or (place / _MARK).is_file()


# --- inspect ------------------------------------------------------------------------------------------


def _inspect(options: argparse.Namespace) -> None:
    place = str(local_path(options.adapter))
    if _is_ours(options.adapter):
        found = _of_ours(read_adapter(options.adapter))
    else:
        found = _of_peft(read_peft(options.adapter))
    parts = [*found["targets"], *found["full"]]
    found = {"adapter": place} | found
    found["totals"] = {
        "targets": len(found["targets"]),
        "full": len(found["full"]),
        "numbers": sum(x["numbers"] for x in parts),
        "bytes": sum(x["bytes"] for x in parts),
    }
    if options.json:
        _show(json.dumps(found, indent=1, allow_nan=False))
    else:
        _show(_inspected(found))


def _of_peft(adapter: PeftAdapter) -> dict[str, Any]:
    config = adapter.config
    targets = []
    for name, update in adapter.updates.items():
        kind = adapter.kinds[name]
        # alpha as in the config, of which the scale was made.
        rank = len(update.a)
        alpha = update.scale * (math.sqrt(rank) if config.get("use_rslora") else rank)
        targets.append(_target(name, kind, list(adapter.shapes[name]), alpha, update))
    facts = {
        "base_model": config.get("base_model_name_or_path"),
        "bias": config.get("bias", "none"),
        "dropout": config.get("lora_dropout", 0.0),
        "use_rslora": bool(config.get("use_rslora")),
        "target_modules": config.get("target_modules"),
        "modules_to_save": config.get("modules_to_save"),
    }
    return {"format": "peft", "config": facts, "targets": targets, "full": _in_full(adapter.full)}


def _of_ours(adapter: Adapter) -> dict[str, Any]:
    targets, full, dropouts = [], {}, set()
    for path, leaf in adapter.leaves.items():
        if isinstance(leaf, LoraWeight):
            dropouts.add(leaf.dropout)
            targets += _of_leaf(path, leaf)
        elif isinstance(leaf, FullWeight):
            full[path] = np.asarray(leaf.value)
    facts: dict[str, Any] = dict.fromkeys(
        ("base_model", "bias", "use_rslora", "target_modules", "modules_to_save")
    )
    facts["dropout"] = dropouts.pop() if len(dropouts) == 1 else sorted(dropouts)
    return {"format": "lora_jax", "config": facts, "targets": targets, "full": _in_full(full)}


def _of_leaf(path: str, leaf: LoraWeight) -> Iterator[dict[str, Any]]:
    """A leaf's update, or that of each of its stacked layers."""
    a, b, scale = np.asarray(leaf.a), np.asarray(leaf.live_b), np.asarray(leaf.scale)
    n, inner = scale.ndim, len(leaf.axes_of("in"))
    shape = [*a.shape[n : n + inner], *b.shape[n + 1 :]]
    kind = " ".join(axis for axis in leaf.axes if axis != "batch")
    parts = len({ranks for ranks, _ in leaf.blocks}) or 1
    for place in np.ndindex(scale.shape):
        left, right = a[place].reshape(-1, leaf.rank), b[place].reshape(leaf.rank, -1)
        alive = left.any(0) | right.any(1)  # smaller ranks are filled up with zeros
        update = Factors(left.T[alive], right.T[:, alive], float(scale[place]))
        name = path + "".join(f"[{i}]" for i in place)
        if alive.any():
            found = _target(name, kind, shape, update.scale * (len(update.a) // parts), update)
            yield found | {"rank": len(update.a) // parts}


def _target(name: str, kind: str, shape: Sequence[int], alpha: float, update: Factors) -> dict[str, Any]:
    base = jax.ShapeDtypeStruct((update.a.shape[1], len(update.b)), update.a.dtype)
    weight = LoraWeight(base, update.a.T, update.b.T, path=name)
    values = abs(update.scale) * analysis.svd(weight).values
    return {
        "name": name,
        "kind": kind,
        "shape": list(map(int, shape)),
        "rank": len(update.a),
        "alpha": float(f"{alpha:.9g}"),
        "scale": update.scale,
        "norm_a": _norm(update.a),
        "norm_b": _norm(update.b),
        "norm": _norm(values),
        "spectral_norm": float(values.max(initial=0.0)),
        "effective_rank": float(analysis.effective_rank(values)),
        "dtype": update.a.dtype.name,
        "numbers": update.a.size + update.b.size,
        "bytes": update.a.nbytes + update.b.nbytes,
    }


def _norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x.astype(np.float64)))


def _in_full(leaves: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    return [
        {"name": name, "shape": list(x.shape), "dtype": x.dtype.name, "numbers": x.size, "bytes": x.nbytes}
        for name, x in leaves.items()
    ]


def _inspected(found: Mapping[str, Any]) -> str:
    lines = [f"{found['adapter']} ({found['format']})"]
    lines += [f"{name}: {_shown(value)}" for name, value in found["config"].items() if value is not None]
    header = "target kind shape rank alpha scale |A| |B| |ΔW| |ΔW|₂ eff. bytes".split()
    rows = [
        [
            *(x["name"], x["kind"], "x".join(map(str, x["shape"])), str(x["rank"])),
            *(f"{x[key]:.4g}" for key in ("alpha", "scale", "norm_a", "norm_b", "norm", "spectral_norm")),
            *(f"{x['effective_rank']:.2f}", f"{x['bytes']:,}"),
        ]
        for x in found["targets"]
    ]
    header[-2] = "eff. rank"
    lines += ["", *_table([header, *rows], left=(0, 1, 2))] if rows else []
    if found["full"]:
        full = [
            [x["name"], "x".join(map(str, x["shape"])), x["dtype"], f"{x['bytes']:,}"] for x in found["full"]
        ]
        lines += ["", *_table([["trained in full", "shape", "dtype", "bytes"], *full], left=(0, 1, 2))]
    totals = found["totals"]
    lines += [
        "",
        f"{totals['targets']} targets, {totals['full']} in full, {totals['numbers']:,} numbers, "
        f"{totals['bytes']:,} bytes",
    ]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


# --- merge --------------------------------------------------------------------------------------------


def _merge(options: argparse.Namespace) -> None:
    if _is_ours(options.adapter):
        raise ValueError(
            f"{options.adapter!r} is an adapter of this library, whose names are paths of a tree and not a "
            "checkpoint's. Write it as one of PEFT first, in Python: lora_jax.peft.save_peft("
            f"lora_jax.load_adapter({options.adapter!r}, params), 'peft-adapter', rules, base_model=...), "
            "with rules such as lora_jax.names.llama()."
        )
    started = time.perf_counter()
    _keep_freed_memory()
    with _progress() as progress:
        made = stream.merge_checkpoint(
            options.base,
            options.adapter,
            options.out,
            dtype=_DTYPES.get(options.dtype),
            shard_size=options.shard_size,
            overwrite=options.overwrite,
            say=lambda text: _tell(f"{PROGRAM}: {text}"),
            progress=progress,
        )
    seconds = time.perf_counter() - started
    try:
        _show(_reported(made, seconds, options.json))
    except OSError as error:
        raise OSError(f"{str(made.folder)!r} is complete, but its report was not written: {error}") from None


def _reported(made: stream.Merged, seconds: float, as_json: bool) -> str:
    if as_json:
        report = {
            "out": str(made.folder),
            "files": list(made.files),
            "bytes": made.size,
            "seconds": round(seconds, 2),
            "notes": list(made.notes),
            "tensors": [
                {"name": x.path, "dtype": x.dtype, "size": x.size if math.isfinite(x.size) else None}
                | {"lost": x.lost, "unmoved": x.unmoved}
                for x in made.leaves
            ],
            "replaced": list(made.replaced),
        }
        return json.dumps(report, indent=1, allow_nan=False)
    rows = [["tensor", "dtype", "rms ΔW/W", "ΔW lost", "unmoved"]]
    rows += [[x.path, x.dtype, f"{x.size:.2g}", f"{x.lost:.2%}", f"{x.unmoved:.2%}"] for x in made.leaves]
    lines = _table(rows, left=(0, 1))
    if made.replaced:
        lines.append(f"replaced by the adapter's: {', '.join(made.replaced)}")
    lines.append(
        f"{str(made.folder)}: {_amount(made.size)} in {len(made.files)} "
        f"file{'s' if len(made.files) > 1 else ''}, {seconds:.1f} s"
    )
    return "\n".join(lines)


def _amount(size: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} bytes"


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is allocated next.

    Blocks come and go all the time; handing pages back and having others zeroed took as long as adding.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
            mallopt(parameter, 1 << 30)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr where that is a terminal and tqdm is there, else a line now and then."""
    if sys.stderr.isatty() and find_spec("tqdm"):
        from tqdm import tqdm

        with tqdm(unit="B", unit_scale=True, desc="merging", leave=False) as bar:

            def move(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield move
        return
    shown = 0

    def line(done: int, total: int) -> None:
        nonlocal shown
        tenths = 10 * done // max(1, total)
        if tenths > shown:
            shown = tenths
            _tell(f"merging: {_amount(done)} of {_amount(total)}")

    yield line


if __name__ == "__main__":
    raise SystemExit(main())
