"""What an adapter's two files say, by numpy and json alone: a second opinion on `lora_jax.peft.load_peft`.

It knows one tree, the one that `run.make` makes, and PEFT 0.21's meaning of the fields; it shares no line
with the library.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

import numpy as np

# A module of the torch model: what it is, its leaf, and its bias's.
MODULES = {
    "embed": ("embedding", "embed/embedding", None),
    "model.decoder.layers.0.mlp.fc": ("linear", "layers_0/fc/kernel", "layers_0/fc/bias"),
    "model.decoder.layers.1.mlp.fc": ("linear", "layers_1/fc/kernel", "layers_1/fc/bias"),
    "model.decoder.layers.2.mlp.fc": ("linear", "layers_2/fc/kernel", "layers_2/fc/bias"),
    "head": ("linear", "head/kernel", "head/bias"),
}
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# Fields that change what an adapter computes, none of which this reader computes.
OTHERS = (
    "use_dora lora_bias layer_replication target_parameters trainable_token_indices use_qalora "
    "alora_invocation_tokens arrow_config"
).split()
CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Refused(Exception):
    """The files have no meaning, or one that is not served: they must not load."""


class Adapter(NamedTuple):
    """By the leaf's path the matrices A (r, in) and B (out, r) with s; leaves in full, as they lie there."""

    updates: dict[str, tuple[np.ndarray, np.ndarray, float]]
    full: dict[str, np.ndarray]
    dropout: float


def read(config: bytes, weights: bytes, base: dict[str, np.ndarray]) -> Adapter:
    """The adapter that the bytes are, for a base whose leaves are given by path.

    Raises:
        Refused: they are none.
    """
    fields = _fields(config)
    tensors = _tensors(weights)
    factors: dict[str, dict[str, np.ndarray]] = {}
    full, copies = {}, {}
    for key, value in tensors.items():
        if not key.startswith("base_model.model."):
            raise Refused(f"the key {key!r}")
        name = key[len("base_model.model.") :]
        found = re.fullmatch(r"(.+?)\.(lora_[AB])(?:\.[^.]+)?\.weight", name)
        found = found or re.fullmatch(r"(.+?)\.(lora_embedding_[AB])(?:\.[^.]+)?(?:\.weight)?", name)
        own = re.fullmatch(r"(.+)\.base_layer(?:\.[^.]+)?\.(weight|bias)", name)
        if own is not None:  # an adapted module's own parameters, in PEFT's place for them
            name = f"{own[1]}.{own[2]}"
            if own[2] == "weight":
                copies[own[1]] = value
                continue
        if found is None:
            if name in full:
                raise Refused(f"{name} twice")
            full[name] = value
        elif found[2] in factors.setdefault(found[1], {}):
            raise Refused(f"{found[2]} of {found[1]} twice")
        else:
            factors[found[1]][found[2]] = value
    updates = {}
    for module, pair in factors.items():
        path = MODULES[_known(module)][1]
        updates[path] = _update(fields, module, pair, base)
    for module, copy in copies.items():
        kind, path, _ = MODULES[_known(module)]
        kernel = base[path].T if kind == "linear" else base[path]
        if module not in factors or not np.array_equal(copy.astype(kernel.dtype), kernel):
            raise Refused(f"the weight of {module} is not the base's")
    targeted = {module for module in MODULES if _targeted(fields, module)}
    if fields.get("target_modules") in (None, "all-linear"):
        targeted &= set(factors)
    saved = {module for module in MODULES if _saved(fields, module)}
    if set(factors) != targeted or saved & targeted:
        raise Refused("the config targets other modules")
    leaves = _leaves(fields, full, set(factors), saved, base)
    return Adapter(updates, leaves, _number(fields.get("lora_dropout", 0.0)))


def _known(module: str) -> str:
    if module not in MODULES:
        raise Refused(f"the module {module!r}")
    return module


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise Refused("a key twice")
    return dict(pairs)


def _no_constant(text: str) -> Any:
    raise Refused(f"{text} is no JSON")


def _json(data: bytes | str, **how: Any) -> dict[str, Any]:
    try:
        found = json.loads(data, object_pairs_hook=_once, **how)
    except (ValueError, RecursionError) as error:
        raise Refused(f"no JSON: {error}") from None
    if not isinstance(found, dict):
        raise Refused("no object")
    return found


def _number(x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, int | float) or abs(x) > 1e300 or x != x:
        raise Refused(f"{x!r} is no number")
    return float(x)


def _fields(data: bytes) -> dict[str, Any]:
    fields = _json(data)
    if fields.get("peft_type") != "LORA" or "r" not in fields or "lora_alpha" not in fields:
        raise Refused("not an adapter of LoRA")
    if any(fields.get(name) for name in OTHERS):
        raise Refused("a field that is not served")
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGED_BASES):
        raise Refused("the base was changed")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(fields.get(name) or {}, dict):
            raise Refused(name)
    if fields.get("use_rslora") not in (True, False, None):
        raise Refused("use_rslora")
    return fields


def _looked_up(fields: dict[str, Any], pattern: str, default: str, module: str) -> Any:
    for key, value in (fields.get(pattern) or {}).items():
        if _matches(rf"(.*\.)?({key})$", module):
            return value
    return (fields.get(pattern) or {}).get(module, fields[default])


def _matches(pattern: str, text: str, whole: bool = False) -> bool:
    try:
        return (re.fullmatch if whole else re.match)(pattern, text) is not None
    except re.error as error:
        raise Refused(f"{pattern!r}: {error}") from None


def _update(
    fields: dict[str, Any], module: str, pair: dict[str, np.ndarray], base: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, float]:
    kind, path, _ = MODULES[module]
    part = "lora_embedding_" if kind == "embedding" else "lora_"
    if set(pair) != {f"{part}A", f"{part}B"}:
        raise Refused(f"{module} has {sorted(pair)}")
    a, b = pair[f"{part}A"], pair[f"{part}B"]
    rank = _looked_up(fields, "rank_pattern", "r", module)
    alpha = _number(_looked_up(fields, "alpha_pattern", "lora_alpha", module))
    inner, outer = base[path].shape
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise Refused(f"rank {rank!r}")
    if a.shape != (rank, inner) or b.shape != (outer, rank):
        raise Refused(f"{module}: {a.shape}, {b.shape}, rank {rank}")
    return a, b, alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def _names(given: Any) -> list[str]:
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(x, str) for x in given):
        raise Refused(f"{given!r} are no names")
    return given


def _selected(given: Any, module: str) -> bool:
    if isinstance(given, str):
        return _matches(given, module, whole=True)
    return any(module == name or module.endswith("." + name) for name in _names(given))


def _targeted(fields: dict[str, Any], module: str) -> bool:
    """PEFT's check_target_module_exists, for the modules that can have an adapter."""
    targets = fields.get("target_modules")
    if _selected(fields.get("exclude_modules"), module):
        return False
    if any(_matches(rf"(^|.*\.){name}($|\..*)", module) for name in _names(fields.get("modules_to_save"))):
        return False
    if targets is None:
        return True
    if targets == "all-linear":
        return MODULES[module][0] == "linear"
    if isinstance(targets, str) or module in _names(targets):
        return _selected(targets, module)
    layers = fields.get("layers_to_transform")
    if layers is None or layers == [] or not _selected(targets, module):
        return _selected(targets, module)
    patterns = fields.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else _names(patterns)
    found = None
    for pattern in [rf"(?:^|.*?\.){x}\.(?P<idx>\d+)\." for x in patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
        found = found or (re.match(pattern, module) if _matches(pattern, module) else None)
    return found is not None and int(found["idx"]) in (layers if isinstance(layers, list) else [layers])


def _saved(fields: dict[str, Any], module: str) -> bool:
    above = [module.rsplit(".", i)[0] for i in range(module.count(".") + 1)]
    return any(one.endswith(name) for name in _names(fields.get("modules_to_save")) for one in above)


def _leaves(
    fields: dict[str, Any],
    full: dict[str, np.ndarray],
    adapted: set[str],
    saved: set[str],
    base: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The leaves in full: those that the config names and no others, each as it lies in the tree."""
    mode = fields.get("bias", "none")
    if mode not in ("none", "all", "lora_only"):
        raise Refused(f"bias {mode!r}")
    expected = {}
    for module, (kind, kernel, bias) in MODULES.items():
        if module in saved:
            expected[f"{module}.weight"] = (kernel, kind == "linear")
        if bias and (module in saved or mode == "all" or (mode == "lora_only" and module in adapted)):
            expected[f"{module}.bias"] = (bias, False)
    if set(full) != set(expected):
        raise Refused(f"in full there are {sorted(full)}, and the config names {sorted(expected)}")
    leaves = {}
    for name, (path, turned) in expected.items():
        leaves[path] = full[name].T if turned else full[name]
        if leaves[path].shape != base[path].shape:
            raise Refused(f"{name}: {full[name].shape}")
    return leaves


def _tensors(data: bytes) -> dict[str, np.ndarray]:
    if len(data) < 8:
        raise Refused("too short")
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        raise Refused("the header is longer than the file")
    try:
        text = data[8 : 8 + length].decode()
    except UnicodeDecodeError:
        raise Refused("the header is no UTF-8") from None
    header = _json(text, parse_constant=_no_constant)
    texts = header.pop("__metadata__", None)
    if texts is not None and not (
        isinstance(texts, dict) and all(isinstance(x, str) for x in texts.values())
    ):
        raise Refused("the metadata")
    body, end = data[8 + length :], 0
    found = {}
    for name, entry in sorted(header.items(), key=lambda item: _place(item[1])):
        (start, stop), dtype, shape = _place(entry), entry.get("dtype"), entry.get("shape")
        if not isinstance(dtype, str) or dtype not in WIDTHS or not isinstance(shape, list):
            raise Refused(f"{name!r}: {dtype!r} {shape!r}")
        if not all(type(n) is int and n >= 0 for n in shape):
            raise Refused(f"{name!r}: the shape {shape}")
        if start != end or stop - start != math.prod(shape) * WIDTHS[dtype] or stop > len(body):
            raise Refused(f"{name!r}: the bytes {start} to {stop} for {dtype} {shape}")
        end = stop
        if dtype == "BF16":
            value = (np.frombuffer(body[start:stop], "<u2").astype("<u4") << 16).view("<f4")
        else:
            value = np.frombuffer(body[start:stop], DTYPES[dtype])
        if not np.isfinite(value).all():
            raise Refused(f"{name!r} is not finite")
        found[name] = value.reshape(shape)
    if end != len(body):
        raise Refused("bytes that belong to no tensor")
    return found


def _place(entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or [type(x) for x in offsets] != [int, int]:
        raise Refused(f"the entry {entry!r}")
    return offsets[0], offsets[1]
