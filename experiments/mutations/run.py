r"""Load adapters whose files were damaged or changed, and compare each with what its bytes say.

The committed result is made by

    python -m experiments.mutations.run --cases 10000 --seed 0

An adapter of a small tree is written with `save_peft`; then, in each case, one of its two files is
mutated, and `load_peft` must either raise a clear error (a ValueError or FileNotFoundError that names the
file) or load exactly what reader.py, which shares no line with the library, reads from the same bytes.
Anything else fails: another exception, a warning, more than five seconds, an allocation far beyond the
file, a different number.

exit code: 0 no case fails; 1 some do, and they are printed; 2 the command is wrong
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import lora_jax
from experiments.mutations import reader
from experiments.records import provenance
from lora_jax.names import Rule

HERE = Path(__file__).parent
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SECONDS = 5
MEMORY = 1 << 30  # what a case may take of the address space
RULES = [
    Rule("embed/embedding", "embed.weight", "embedding"),
    Rule(r"layers_(\d+)/fc/kernel", r"model.decoder.layers.\1.mlp.fc.weight"),
    Rule(r"layers_(\d+)/fc/bias", r"model.decoder.layers.\1.mlp.fc.bias", "plain"),
    Rule("head/kernel", "head.weight"),
    Rule("head/bias", "head.bias", "plain"),
]


def make(folder: Path) -> Any:
    """Write the adapter that is mutated, and give its base: three layers, an embedding and a head.

    The layers have ranks and alphas of their own; their biases and the head are trained in full.
    """
    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    layers = {f"layers_{i}": {"fc": {"kernel": drawn(6, 6), "bias": drawn(6)}} for i in range(3)}
    params = {
        "embed": {"embedding": drawn(7, 6)},
        **layers,
        "head": {"kernel": drawn(6, 4), "bias": drawn(4)},
    }
    wrapped = lora_jax.wrap(
        params,
        rank={"embed": 2, "layers_1": 4, ".*": 3},
        alpha={"layers_2": 12, "layers_1": 8, "embed": 4, ".*": 6},
        targets="embed/embedding|layers_./fc/kernel",
        train="head/.*|layers_./fc/bias",
        dropout={"layers_.*": 0.1, ".*": 0.0},
    )
    trainable, frozen = lora_jax.partition(wrapped)
    wrapped = lora_jax.combine(jax.tree.map(lambda x: drawn(*x.shape), trainable), frozen)
    lora_jax.peft.save_peft(wrapped, folder, RULES, "a/model", overwrite=True)
    return params


# --- Mutations ------------------------------------------------------------------------------------------

Files = dict[str, bytes]
KINDS: dict[str, Callable[[random.Random, Files], None]] = {}


def kind(fn: Callable[[random.Random, Files], None]) -> Callable[[random.Random, Files], None]:
    KINDS[fn.__name__.replace("_", " ")] = fn
    return fn


def either(draw: random.Random) -> str:
    return draw.choice([CONFIG, WEIGHTS])


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def flipped(draw: random.Random, data: bytes, start: int, stop: int) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 4, 8])):
        changed[draw.randrange(start, stop)] ^= 1 << draw.randrange(8)
    return bytes(changed)


@kind
def bits_of_the_config(draw: random.Random, files: Files) -> None:
    files[CONFIG] = flipped(draw, files[CONFIG], 0, len(files[CONFIG]))


@kind
def bits_of_the_header(draw: random.Random, files: Files) -> None:
    data = files[WEIGHTS]
    files[WEIGHTS] = flipped(draw, data, 0, 8 + int.from_bytes(data[:8], "little"))


@kind
def bits_of_the_tensors(draw: random.Random, files: Files) -> None:
    data = files[WEIGHTS]
    files[WEIGHTS] = flipped(draw, data, 8 + int.from_bytes(data[:8], "little"), len(data))


@kind
def truncated(draw: random.Random, files: Files) -> None:
    name = either(draw)
    files[name] = files[name][: draw.randrange(len(files[name]))]


@kind
def extended(draw: random.Random, files: Files) -> None:
    name = either(draw)
    more = draw.choice([b"\0", b" ", b"\n", b"}", draw.randbytes(draw.randint(1, 64)), files[name]])
    files[name] = draw.choice([more + files[name], files[name] + more])


@kind
def bytes_moved(draw: random.Random, files: Files) -> None:
    """A run of bytes is left out, doubled, zeroed, made random, or changes places with another."""
    name = either(draw)
    data = files[name]
    start = draw.randrange(len(data))
    stop = min(len(data), start + draw.choice([1, 4, 8, 64, 512]))
    other = draw.randrange(len(data))
    files[name] = draw.choice(
        [
            data[:start] + data[stop:],
            data[:stop] + data[start:],
            data[:start] + bytes(stop - start) + data[stop:],
            data[:start] + draw.randbytes(stop - start) + data[stop:],
            data[:start] + data[other : other + stop - start] + data[stop:],
        ]
    )


@kind
def random_bytes(draw: random.Random, files: Files) -> None:
    name = either(draw)
    data = draw.randbytes(draw.choice([0, 1, 7, 8, 9, 64, 4096]))
    if name == WEIGHTS and draw.random() < 0.5:  # behind a length that is right
        data = struct.pack("<Q", draw.randint(0, len(data))) + data
    files[name] = data


@kind
def a_file_lost(draw: random.Random, files: Files) -> None:
    del files[either(draw)]


VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, 4, -1, 16, 0.5, -0.5, 1.0, 2.5, 1e-320, 1e39, 1e308, -1e308),
    *(float("nan"), float("inf"), 10**30, 10**400, "", "2", "LORA", "lora", "all", "none", "lora_only"),
    *("all-linear", "fc", "embed", r".*layers\.\d\.mlp\.fc|embed", "(", "*", r"([\w.]+)+!", "pissa"),
    *("gaussian", "\ud800", "\0", "x" * 100_000, [], [None], [0], [0, 1, 2], ["fc"], ["embed", "fc"]),
    *(["head"], ["fc", "head"], ["d"], [["fc"]], {}, {"fc": 3}, {"fc": "3"}, {"fc": -1}, {"fc": 10**30}),
    *({"(": 3}, {"": 3}, {"embed": 2, ".*": 3}, {r".*layers\.1\.mlp\.fc": 4}, {r"([\w.]+)+!": 3}),
]  # fmt: skip
FIELDS = (
    "use_dora lora_bias layer_replication target_parameters trainable_token_indices use_rslora use_qalora "
    "exclude_modules layers_to_transform layers_pattern init_lora_weights fan_in_fan_out megatron_config "
    "alora_invocation_tokens arrow_config loftq_config eva_config task_type inference_mode revision "
    "a_field_of_tomorrow"
).split()


def deep(draw: random.Random) -> Any:
    value: Any = draw.choice(VALUES)
    for _ in range(draw.choice([1, 3, 50])):
        value = [value] if draw.random() < 0.5 else {"fc": value}
    return value


def with_config(change: Callable[[random.Random, dict[str, Any]], None]) -> None:
    def mutate(draw: random.Random, files: Files) -> None:
        fields = json.loads(files[CONFIG])
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            change(draw, fields)
        files[CONFIG] = json.dumps(fields).encode()

    mutate.__name__ = change.__name__
    kind(mutate)


@with_config
def fields_changed(draw: random.Random, fields: dict[str, Any]) -> None:
    value = copy.deepcopy(draw.choice(VALUES)) if draw.random() < 0.9 else deep(draw)
    fields[draw.choice(sorted(fields))] = value


@with_config
def fields_removed(draw: random.Random, fields: dict[str, Any]) -> None:
    fields.pop(draw.choice(sorted(fields)))


@with_config
def fields_retyped(draw: random.Random, fields: dict[str, Any]) -> None:
    name = draw.choice(sorted(fields))
    old = fields[name]
    ways = [str(old), [old], {"fc": old}, bool(old), json.dumps(old, default=str)]
    if isinstance(old, int | float):
        ways += [float(old), -old, old + 1, int(old)]
    if isinstance(old, list | dict):
        ways += [list(old), len(old), old or None, dict.fromkeys(map(str, old), 3)]
    fields[name] = draw.choice(ways)


@with_config
def fields_renamed(draw: random.Random, fields: dict[str, Any]) -> None:
    name = draw.choice(sorted(fields))
    new = draw.choice([name.upper(), name + " ", name[:-1], "_" + name, draw.choice(sorted(fields)), *FIELDS])
    fields[new] = fields.pop(name)


@with_config
def fields_added(draw: random.Random, fields: dict[str, Any]) -> None:
    fields[draw.choice(FIELDS)] = copy.deepcopy(draw.choice(VALUES))


@with_config
def patterns_changed(draw: random.Random, fields: dict[str, Any]) -> None:
    """The names and numbers inside of a list or a pattern."""
    name = draw.choice(["rank_pattern", "alpha_pattern", "target_modules", "modules_to_save"])
    keys = "fc embed head layers .* 1.mlp.fc model.decoder.layers.0.mlp.fc c x layers.2.mlp.fc".split() + [""]
    if name.endswith("pattern"):
        old = dict(fields.get(name) or {})
        old[draw.choice(keys)] = draw.choice([1, 2, 3, 4, 6, 12, 0, -1, 2.5])
        items = list(old.items())
        draw.shuffle(items)
        fields[name] = dict(items[draw.randint(0, 1) :])
    else:
        fields[name] = (
            draw.sample(keys, draw.randint(0, 3)) + list(fields.get(name) or ())[draw.randint(0, 1) :]
        )


@kind
def keys_doubled_in_the_config(draw: random.Random, files: Files) -> None:
    fields = json.loads(files[CONFIG])
    name = draw.choice(sorted(fields))
    value = draw.choice([fields[name], draw.choice(VALUES)])
    text = json.dumps(fields)
    files[CONFIG] = (text[:-1] + ", " + json.dumps({name: value})[1:]).encode()


def is_entry(entry: Any) -> bool:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return (
        isinstance(offsets, list)
        and [type(x) for x in offsets] == [int, int]
        and {"shape", "dtype"} <= set(entry)
    )


def with_entry(change: Callable[[random.Random, dict[str, Any], str], None]) -> None:
    def mutate(draw: random.Random, files: Files) -> None:
        header, body = header_of(files[WEIGHTS])
        for _ in range(draw.choice([1, 1, 1, 2])):
            names = [name for name, entry in sorted(header.items()) if is_entry(entry)]
            if names:
                change(draw, header, draw.choice(names))
        files[WEIGHTS] = with_header(header, body)

    mutate.__name__ = change.__name__
    kind(mutate)


NUMBERS = [0, 1, -1, 2, 3, 8, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 1.5, "1"]


@with_entry
def offsets_changed(draw: random.Random, header: dict[str, Any], name: str) -> None:
    start, stop = draw.choice([e["data_offsets"] for e in header.values() if is_entry(e)])
    off = draw.choice([-4, -1, 1, 4])
    ways = [[start + off, stop], [start, stop + off], [start + off, stop + off], [stop, start], [start, stop]]
    ways += [[draw.choice(NUMBERS), stop], [start, draw.choice(NUMBERS)]] * 3
    header[name] = header[name] | {"data_offsets": draw.choice(ways)}
    if draw.random() < 0.1:
        header[name] = header[name] | {
            "data_offsets": draw.choice([[], [start], [start, stop, stop], None, "0, 96"])
        }


@with_entry
def shapes_changed(draw: random.Random, header: dict[str, Any], name: str) -> None:
    shape = header[name]["shape"]
    if not isinstance(shape, list) or not shape:
        header[name]["shape"] = draw.choice([[], [1], [6, 2]])
        return
    ways = [shape[::-1], [*shape, 1], [1, *shape], [2 * shape[0], *shape[1:]], shape[1:], [], "shape", None]
    absurd = list(shape)
    absurd[draw.randrange(len(shape))] = draw.choice(NUMBERS)
    header[name]["shape"] = draw.choice([*ways, absurd, [2**32, 2**32], [0, 2**62], [10**6] * 64, [1] * 65])


@with_entry
def dtypes_changed(draw: random.Random, header: dict[str, Any], name: str) -> None:
    dtypes = "F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL F8_E4M3 F8_E5M2 F4 C64 f32 float32".split()
    header[name]["dtype"] = draw.choice([*dtypes, "", None, 4, ["F32"]])


@with_entry
def tensors_renamed(draw: random.Random, header: dict[str, Any], name: str) -> None:
    parts = "lora_A lora_B lora_embedding_A lora_embedding_B lora_magnitude_vector base_layer".split()
    ways = [
        name.replace("base_model.model.", ""),
        name.replace("lora_", "lora_embedding_"),
        name.replace(".weight", ".bias"),
        name.replace(".weight", ".default.weight"),
        name.replace(".weight", ""),
        name.replace("layers.0", "layers.1"),
        name.replace("layers", "blocks"),
        re.sub("lora_(embedding_)?[AB]", draw.choice(parts), name),
        f"base_model.model.{draw.choice(parts)}.weight",
        "base_model.model.",
        "base_model.model..lora_A.weight",
        draw.choice(sorted(header)),
        name + "\0",
        "\ud800",
        "",
        "__metadata__",
        "x" * 100_000,
    ]
    header[draw.choice(ways)] = header.pop(name)


@with_entry
def entries_changed(draw: random.Random, header: dict[str, Any], name: str) -> None:
    """An entry is lost, doubled under another name, or has a field less, more, or of another kind."""
    entry = header[name]
    match draw.randrange(6):
        case 0:
            header.pop(name)
        case 1:
            header["base_model.model.model.decoder.layers.0.mlp.fc.lora_A.other.weight"] = dict(entry)
        case 2:
            entry.pop(draw.choice(sorted(entry)))
        case 3:
            entry["more"] = draw.choice(VALUES[:20])
        case 4:
            header[name] = draw.choice([None, [], [entry], "entry", 1])
        case 5:
            header["__metadata__"] = draw.choice(
                [None, {}, {"format": "np"}, {"format": 1}, [], {"": "x" * 10_000}]
            )


@kind
def the_headers_length_changed(draw: random.Random, files: Files) -> None:
    data = files[WEIGHTS]
    length = int.from_bytes(data[:8], "little")
    new = draw.choice(
        [0, 1, 2, length - 1, length + 1, length - 8, length + 8, len(data), len(data) - 8, 10**8 + 1]
        + [2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, draw.randrange(2**64), draw.randrange(len(data))]
    )
    files[WEIGHTS] = struct.pack("<Q", new) + data[8:]


@kind
def keys_doubled_in_the_header(draw: random.Random, files: Files) -> None:
    header, body = header_of(files[WEIGHTS])
    name = draw.choice(sorted(key for key in header if key != "__metadata__"))
    other = draw.choice(sorted(key for key in header if key != "__metadata__"))
    text = json.dumps(header)
    if draw.random() < 0.5:
        text = text[:-1] + ", " + json.dumps({name: header[other]})[1:]
    else:
        inner = json.dumps(header[name])
        text = text.replace(inner, inner[:-1] + ', "dtype": "F32"}')
    files[WEIGHTS] = with_header(text.encode(), body)


@kind
def the_header_written_otherwise(draw: random.Random, files: Files) -> None:
    """Another order of keys, other spaces, deep nesting, no metadata, or no JSON."""
    header, body = header_of(files[WEIGHTS])
    items = list(header.items())
    draw.shuffle(items)
    nested = b"[" * 10_000 + b"]" * 10_000
    text = draw.choice(
        [
            json.dumps(dict(items)).encode(),
            json.dumps(header, indent=4).encode(),
            b" " + json.dumps(header).encode(),
            json.dumps({k: v for k, v in items if k != "__metadata__"}).encode(),
            json.dumps(header).encode("utf-16"),
            json.dumps(items).encode(),
            b'{"a": ' + nested + b"}",
            nested,
            b"{}",
            b"",
            b"null",
        ]
    )
    files[WEIGHTS] = with_header(text, body)


@kind
def written_anew(draw: random.Random, files: Files) -> None:
    """Whole files that are well formed: tensors in another dtype, left out, transposed, doubled, or empty."""
    tensors = {
        name: np.frombuffer(raw, "<f4").reshape(shape)
        for name, (raw, shape) in tensors_of(files[WEIGHTS]).items()
    }
    way = draw.choice(
        ["dtype", "dtype", "dtype", "left out", "transposed", "stacked", "empty", "pair left out"]
    )
    chosen = draw.sample(sorted(tensors), draw.randint(1, len(tensors)))
    one = chosen[0]
    dtype = draw.choice(["F64", "F16", "BF16", "I32"])
    if way == "left out":
        tensors.pop(one)
    elif way == "transposed":
        tensors[one] = np.ascontiguousarray(tensors[one].T)
    elif way == "stacked":
        tensors[one] = np.concatenate([tensors[one]] * 2)
    elif way == "empty":
        tensors[one] = tensors[one][:0]
    elif way == "pair left out":
        module = re.sub(r"\.(lora_.*|weight|bias)$", "", one)
        tensors = {name: x for name, x in tensors.items() if not name.startswith(module + ".")}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, x in tensors.items():
        which = dtype if way == "dtype" and name in chosen else "F32"
        raw = as_bytes(x, which)
        offsets = [len(body), len(body) + len(raw)]
        header[name] = {"dtype": which, "shape": list(x.shape), "data_offsets": offsets}
        body += raw
    files[WEIGHTS] = with_header(header, body)


def tensors_of(data: bytes) -> dict[str, tuple[bytes, list[int]]]:
    header, body = header_of(data)
    header.pop("__metadata__", None)
    return {name: (body[slice(*e["data_offsets"])], e["shape"]) for name, e in header.items()}


def as_bytes(x: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":  # cut off, not rounded
        return (x.view("<u4") >> 16).astype("<u2").tobytes()
    return x.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2", "I32": "<i4"}[dtype]).tobytes()


@kind
def nothing(draw: random.Random, files: Files) -> None:
    """The adapter as it was written, which must load."""


# --- The judge ------------------------------------------------------------------------------------------


class Failure(Exception):
    """A case that neither failed clearly nor loaded what the bytes say."""


class _TimeUp(BaseException):
    pass


def judge(folder: Path, files: Files, params: Any) -> str:
    """How a case ends: "loaded" or "refused".

    Raises:
        Failure: in any other way.
    """
    folder.mkdir(exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        (folder / name).unlink(missing_ok=True)
        if name in files:
            (folder / name).write_bytes(files[name])

    def on_alarm(*_: Any) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrapped = lora_jax.peft.load_peft(folder, params, RULES)
    except (ValueError, FileNotFoundError) as error:
        if type(error) not in (ValueError, FileNotFoundError):
            raise Failure(f"{type(error).__name__}: {error}"[:500]) from error
        if not any(name in str(error) for name in (CONFIG, WEIGHTS, str(folder))):
            raise Failure(f"an error that names no file: {error}"[:500]) from error
        return "refused"
    except _TimeUp as error:
        raise Failure(f"more than {SECONDS} s") from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Failure(f"{type(error).__name__}: {error}"[:500]) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    compare(wrapped, files, params)
    return "loaded"


def expected_of(files: Files, params: Any) -> reader.Adapter:
    if len(files) < 2:
        raise reader.Refused("a file is lost")
    return reader.read(files[CONFIG], files[WEIGHTS], {k: np.asarray(x) for k, x in leaves(params).items()})


def is_served(files: Files, params: Any) -> bool:
    """Whether the reader reads it, in dtypes that jax has here."""
    try:
        found = expected_of(files, params)
    except reader.Refused:
        return False
    wide = any(
        x.dtype == np.float64
        for x in (*found.full.values(), *(y for u in found.updates.values() for y in u[:2]))
    )
    return jax.config.jax_enable_x64 or not wide


def compare(wrapped: Any, files: Files, params: Any) -> None:
    """Whether a loaded tree is what the bytes say, number for number."""
    base = leaves(params)
    try:
        expected = expected_of(files, params)
    except reader.Refused as error:
        raise Failure(f"loaded, and must not be: {error}"[:500]) from error
    for path, leaf in leaves(wrapped).items():
        if path in expected.updates:
            a, b, s = expected.updates[path]
            rate = 0.0 if path.startswith("embed") else expected.dropout
            dtype = np.result_type(a, b, np.float32)
            same = (
                isinstance(leaf, lora_jax.LoraWeight)
                and leaf.w is base[path]
                and equal(leaf.a, a.T.astype(dtype))
                and equal(leaf.b, b.T.astype(dtype))
                and equal(leaf.scale, np.float32(s))
                and leaf.axes == ("in", "out")
                and not leaf.blocks
                and leaf.dropout == rate
            )
        elif path in expected.full:
            value = expected.full[path]
            same = isinstance(leaf, lora_jax.FullWeight) and equal(
                leaf.value, value.astype(np.result_type(value, np.float32))
            )
        else:
            same = leaf is base[path]
        if not same:
            raise Failure(f"{path} is not what the bytes say")


def equal(ours: Any, theirs: np.ndarray) -> bool:
    ours = np.asarray(ours)
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()


def leaves(tree: Any) -> dict[str, Any]:
    found = {}
    for name, part in tree.items():
        if isinstance(part, dict):
            found |= {f"{name}/{path}": leaf for path, leaf in leaves(part).items()}
        else:
            found[name] = part
    return found


# --- The run --------------------------------------------------------------------------------------------


def mutated(files: Files, seed: int, number: int) -> tuple[str, Files]:
    """The files of one case, which depend on the seed and its number alone."""
    draw = random.Random(f"{seed}:{number}")
    name = draw.choice(sorted(KINDS)) if number else "nothing"
    changed = dict(files)
    KINDS[name](draw, changed)
    return name, changed


def run(folder: Path, numbers: Sequence[int], seed: int, progress: bool = False) -> dict[str, Any]:
    """Judge cases: how many of each kind ended how, and the failures."""
    params = make(folder / "adapter")
    files = {name: (folder / "adapter" / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    ended: dict[str, Counter[str]] = {name: Counter() for name in sorted(KINDS)}
    failures = []
    before = peak()
    for number in tqdm(numbers, desc="cases", disable=not progress, mininterval=1):
        name, changed = mutated(files, seed, number)
        try:
            how = judge(folder / "case", changed, params)
            if how == "refused" and changed.get(CONFIG) == files[CONFIG] and is_served(changed, params):
                raise Failure("refused, and the reader reads it")
            ended[name][how] += 1
        except Failure as failure:
            ended[name]["failed"] += 1
            failures.append({"case": number, "kind": name, "what": str(failure)})
    return {
        "ended": {name: dict(sorted(counts.items())) for name, counts in ended.items() if counts},
        "failures": failures,
        "memory_grown_mib": round((peak() - before) / 1024, 1),
    }


def peak() -> int:
    """The largest resident size so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def guard() -> None:
    """Bound the address space, so that an absurd allocation raises MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.mutations.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=int, default=10_000, help="how many adapters are mutated (10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (0)")
    parser.add_argument(
        "--only", type=int, help="judge one case by its number, and keep its files in --folder"
    )
    parser.add_argument("--folder", type=Path, default=Path("mutated"), help="where --only writes (mutated)")
    parser.add_argument("--out", type=Path, help="default: results/jax-VERSION.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    begin = time.perf_counter()
    if options.only is not None:
        found = run(options.folder, [options.only], options.seed)
        print(json.dumps(found["failures"] or found["ended"], indent=1))
        print(f"its files are in {options.folder / 'case'}")
        return 1 if found["failures"] else 0
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), range(1), options.seed)  # so that everything is loaded before the guard stands
        if Path("/proc/self/statm").exists():
            guard()
        found = run(Path(folder) / "again", range(options.cases), options.seed, progress=True)
    total: Counter[str] = Counter()
    for counts in found["ended"].values():
        total.update(counts)
    result = {
        **provenance(
            f"python -m experiments.mutations.run --cases {options.cases} --seed {options.seed}",
            ("safetensors",),
        ),
        "cases": options.cases,
        "seed": options.seed,
        "seconds": round(time.perf_counter() - begin, 1),
        "total": dict(total.most_common()),
        **found,
    }
    out = options.out or HERE / "results" / f"jax-{jax.__version__}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{options.cases} cases: {dict(total.most_common())}; written to {out}")
    for failure in found["failures"][:20]:
        print(f"case {failure['case']} ({failure['kind']}): {failure['what']}")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
