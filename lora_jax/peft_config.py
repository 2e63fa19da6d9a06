"""What the fields of PEFT's adapter_config.json mean, and which are refused."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax import tensors

CONFIG = "adapter_config.json"
# What a config says of the adapter's origin, and nothing of its meaning.
# The rules say fan_in_fan_out; megatron_core and qalora_group_size mean something with refused fields only.
_INFORMATIVE = frozenset(
    "auto_mapping base_model_name_or_path revision task_type inference_mode peft_version runtime_config "
    "fan_in_fan_out eva_config loftq_config corda_config lora_ga_config megatron_core "
    "qalora_group_size".split()
)
_USED = frozenset(
    "peft_type r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern target_modules "
    "exclude_modules layers_to_transform layers_pattern bias modules_to_save init_lora_weights".split()
)
_REMEDIES = {
    "use_dora": "merge it in PEFT (merge_and_unload) and load the merged weights",
    "lora_bias": "merge it in PEFT (merge_and_unload) and load the merged weights",
    "layer_replication": "merge it in PEFT (merge_and_unload) and load the merged weights",
    "target_parameters": "train it on target_modules",
    "trainable_token_indices": "merge it in PEFT (merge_and_unload) and load the merged weights",
}
# Initialisations that leave the base as it is; with the others the adapter is none of the base's own.
_KEEP_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def read_config(path: Path) -> dict[str, Any]:
    """The fields, each of the form it must have, with those refused whose meaning is not implemented."""
    config = tensors.read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{str(path)!r}: peft_type is {config.get('peft_type')!r}; adapters of type 'LORA' are read."
        )
    for name in ("r", "lora_alpha"):
        if name not in config:
            raise ValueError(f"{str(path)!r} has no field {name!r}, and a default would be a guess.")
    init = config.get("init_lora_weights")
    if init not in _KEEP_THE_BASE:
        raise ValueError(
            f"{str(path)!r}: init_lora_weights is {init!r}, which changes the base or is not known: this "
            "adapter is none of the base's own. In PEFT, save it with "
            "path_initial_model_for_weight_conversion."
        )
    for name, value in config.items():
        # Some of PEFT's fields switch something on even when they are empty.
        if name not in _USED | _INFORMATIVE and value is not None and value is not False:
            raise unserved(path, name, f"it is {value!r}"[:200])
    for name, (fine, text) in _FORMS.items():
        if name in config and not fine(config[name]):
            raise ValueError(f"{str(path)!r}: {name} is {config[name]!r}, and {text}.")
    return config


_LARGEST = float(np.finfo(np.float32).max)


def is_number(x: Any) -> bool:
    """Whether it is a number that float32 holds."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= _LARGEST


def _is_rank(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 1


def _is_names(x: Any) -> bool:
    return x is None or isinstance(x, str) or (isinstance(x, list) and all(isinstance(i, str) for i in x))


def _is_layers(x: Any) -> bool:
    return x is None or type(x) is int or (isinstance(x, list) and all(type(i) is int for i in x))


def _are(fine: Any) -> Any:
    return lambda x: x is None or (isinstance(x, dict) and all(map(fine, x.values())))


_FORMS: dict[str, tuple[Any, str]] = {
    "r": (_is_rank, "an integer of at least 1 is meant"),
    "lora_alpha": (is_number, "a number is meant"),
    "lora_dropout": (lambda x: is_number(x) and 0 <= x < 1, "a rate in [0, 1) is meant"),
    "use_rslora": (lambda x: x is None or isinstance(x, bool), "true or false is meant"),
    "rank_pattern": (_are(_is_rank), "ranks by name are meant"),
    "alpha_pattern": (_are(is_number), "numbers by name are meant"),
    "target_modules": (_is_names, "a list of names, or a regular expression, is meant"),
    "exclude_modules": (_is_names, "a list of names, or a regular expression, is meant"),
    "layers_to_transform": (_is_layers, "the numbers of layers are meant"),
    "layers_pattern": (_is_names, "names are meant"),
    "bias": (lambda x: x in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only' is meant"),
    "modules_to_save": (lambda x: x is None or (_is_names(x) and not isinstance(x, str)), "a list is meant"),
}


def unserved(path: Path, name: str, why: str) -> ValueError:
    """The refusal of a field whose meaning is not implemented."""
    remedy = _REMEDIES.get(name, "remove the field if the adapter does not depend on it")
    return ValueError(f"{str(path)!r}: {name} is not implemented, and {why}; {remedy}.")


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """A module's rank, by rank_pattern or r."""
    return of_pattern(config.get("rank_pattern"), module, config["r"])


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """A module's scale: alpha / r, or alpha / sqrt(r) with use_rslora; alpha by alpha_pattern."""
    alpha = of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def of_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches, as PEFT looks it up."""
    for key, value in (patterns or {}).items():
        if is_in_pattern(key, module):
            return value
    return (patterns or {}).get(module, default)


def is_in_pattern(key: str, module: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern matches a module."""
    return _compiled(rf"(.*\.)?({key})$").match(module) is not None


_TOKENS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?[:=!]|\{\d*,\d*\}|.", re.S)


def _runs_away(pattern: str, most: int = 8) -> bool:
    r"""Whether a match may take for ever: a repeated group that repeats or chooses, or many repetitions.

    >>> _runs_away(r"([\w.]+)+!"), _runs_away(r".*\.layers\.\d+\.(q|v)_proj")
    (True, False)
    """
    inside, group, count = [False], False, 0
    for token in _TOKENS.findall(pattern):
        repeats = token in "*+" or (len(token) > 2 and token[0] == "{")
        if repeats and group:
            return True
        count += repeats
        if token[0] == "(":
            inside.append(False)
        elif repeats or token in "|?":
            inside[-1] = True
        group = token == ")" and len(inside) > 1 and inside.pop()
        if group:
            inside[-1] = True
    return count > most


# There may be an expression for every module, which is more than re itself keeps.
@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    if _runs_away(pattern):
        raise ValueError(
            f"{CONFIG}: {pattern!r} repeats what repeats, and may take for ever to match; list the modules' "
            "names instead."
        )
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{CONFIG}: {pattern!r} is no regular expression: {error}.") from None


def selects(given: Any, module: str) -> bool:
    """Whether target_modules or exclude_modules name a module."""
    if isinstance(given, str):
        return _compiled(given).fullmatch(module) is not None
    return any(module == name or module.endswith(f".{name}") for name in given or ())


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT adapts a module, if it is of a kind that can be."""
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if selects(config.get("exclude_modules"), module):
        return False
    if in_saved(config.get("modules_to_save"), module):
        return False
    if targets is None or targets == "all-linear":
        return True
    if not selects(targets, module):
        return False
    # A module that is named in whole is a target whatever its layer.
    if layers in (None, []) or isinstance(targets, str) or module in targets:
        return True
    given = config.get("layers_pattern") or ()
    patterns = [rf"(?:^|.*?\.){one}" for one in ([given] if isinstance(given, str) else given)]
    matches = (_compiled(rf"{one}\.(?P<idx>\d+)\.").match(module) for one in patterns or [r".*?\.[^.]*"])
    found = next((match for match in matches if match), None)
    return found is not None and int(found["idx"]) in ([layers] if isinstance(layers, int) else layers)


def in_saved(saved: Iterable[str] | None, module: str) -> bool:
    """Whether PEFT takes a module out of its targets because of modules_to_save."""
    return any(_compiled(rf"(^|.*\.){name}($|\..*)").match(module) for name in saved or ())


def is_full(config: Mapping[str, Any], name: str, adapted: Container[str]) -> bool:
    """Whether PEFT trains a parameter in full."""
    parts, saved = name.split("."), tuple(config.get("modules_to_save") or ())
    if any(".".join(parts[:i]).endswith(saved) for i in range(1, len(parts))):
        return True
    bias = config.get("bias", "none") if parts[-1] == "bias" else "none"
    return bias == "all" or (bias == "lora_only" and ".".join(parts[:-1]) in adapted)
