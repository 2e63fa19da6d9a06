"""Adapters of Hugging Face PEFT and of loralib: read onto any tree of parameters, and written from one."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import nnx, tensors
from lora_jax import params as params_lib
from lora_jax.factors import Factors, factors_of, kinds, weight_of
from lora_jax.files import local_path, on_host, one_writer, replacing
from lora_jax.layouts import Reader, known_layouts, read_leaves
from lora_jax.names import Piece, Rule, checked, named
from lora_jax.params import Adapter
from lora_jax.peft_config import (
    CONFIG,
    in_saved,
    is_full,
    is_in_pattern,
    is_number,
    is_target,
    of_pattern,
    rank_of,
    read_config,
    scale_of,
    selects,
    unserved,
)
from lora_jax.tree import leaves_with_path, nearest, some
from lora_jax.weight import FullWeight, LoraWeight, is_wrapped_leaf, wide_dtype

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class PeftAdapter:
    """What a PEFT adapter's folder holds.

    Attributes:
        config: adapter_config.json.
        updates: By the module's name, its A, B and scale.
        kinds: By the module's name, "linear", "embedding" or "conv2d".
        shapes: By the module's name, the shape of torch's weight: (out, in), (num, dim) of an embedding,
            (out, in, kh, kw).
        full: By name, parameters that were trained in full: biases, and those of modules_to_save; mapped
            from the file, as copies are.
        copies: By name, base weights that PEFT stored beside the adapter.
    """

    config: Mapping[str, Any]
    updates: Mapping[str, Factors]
    kinds: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    full: Mapping[str, np.ndarray]
    copies: Mapping[str, np.ndarray]


def read_peft(folder: str | os.PathLike[str]) -> PeftAdapter:
    r"""Read `adapter_config.json` and `adapter_model.safetensors`.

    The scale of each module is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora, with PEFT's own
    look-up of rank_pattern and alpha_pattern. The format has no checksums: a value that was changed on
    disk to another finite one is not noticed.

    Args:
        folder: The folder of the two files; or one that has a single adapter in a folder of its name.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: a file is truncated or damaged, or holds a value that is not finite; the config has a
            field whose meaning is not implemented, or contradicts the tensors.
        ModuleNotFoundError: safetensors is not installed.

    >>> read_peft("no/such/adapter")
    Traceback (most recent call last):
        ...
    FileNotFoundError: there is no adapter_config.json in '.../no/such/adapter'...
    """
    place = _folder(folder)
    config = read_config(place / CONFIG)
    path = place / WEIGHTS
    if not path.is_file():
        pickled = (place / "adapter_model.bin").exists()
        raise FileNotFoundError(
            f"there is no {WEIGHTS} in {str(place)!r}. "
            + (
                "adapter_model.bin is a pickle, which can run code and is not read: load it in PEFT and save "
                "it with save_pretrained(folder, safe_serialization=True)."
                if pickled
                else "Give the folder that PEFT's save_pretrained wrote."
            )
        )
    file = tensors.opened(path)
    if not file.entries:
        raise ValueError(f"{str(path)!r} holds no tensors; save the adapter again.")
    keys = {name: _parsed(path, name) for name in file.entries}
    found: dict[str, dict[str, str]] = {}
    full, copies = {}, {}
    twice = []
    for name, (module, part, leaf) in keys.items():
        if part == "original_module" or (part == "base_layer" and leaf != "bias"):
            copies[f"{module}.{leaf}"] = name
        elif part in ("", "base_layer", "modules_to_save"):
            if f"{module}.{leaf}" in full:
                twice.append((name, full[f"{module}.{leaf}"]))
            full[f"{module}.{leaf}"] = name
        elif part == "lora_magnitude_vector":
            raise unserved(place / CONFIG, "use_dora", f"the tensors have {name!r}")
        elif leaf == "bias":
            raise unserved(place / CONFIG, "lora_bias", f"the tensors have {name!r}")
        elif part in found.setdefault(module, {}):
            raise ValueError(
                f"{str(path)!r}: {found[module][part]!r} and {name!r} are the same factor. Save one adapter "
                "alone: save_pretrained(folder, selected_adapters=['...'])."
            )
        else:
            found[module][part] = name
    _check_full(path, config, full, copies, found)
    _check_targets(path, config, found)
    updates, kinds, shapes = {}, {}, {}
    for module, parts in found.items():
        updates[module], kinds[module], shapes[module] = _update(file, config, module, parts)
    in_full = {name: _finite(file, key, file.view(key)) for name, key in full.items()}
    # bias="all" and modules_to_save both write a saved module's bias.
    for one, other in twice:
        if not np.array_equal(file.view(one), file.view(other)):
            raise ValueError(f"{str(path)!r}: {one!r} and {other!r} are one parameter, and differ.")
    kept = {name: file.view(key) for name, key in copies.items()}
    return PeftAdapter(config, updates, kinds, shapes, in_full, kept)


def _folder(folder: str | os.PathLike[str]) -> Path:
    place = local_path(folder)
    if (place / CONFIG).is_file():
        return place
    inner = sorted(path.parent for path in place.glob(f"*/{CONFIG}")) if place.is_dir() else []
    if len(inner) == 1:
        return inner[0]
    if inner:
        names = ", ".join(repr(str(path)) for path in inner[:5])
        raise ValueError(
            f"there are {len(inner)} adapters in {str(place)!r}; give one of their folders: {names}."
        )
    raise FileNotFoundError(
        f"there is no {CONFIG} in {str(place)!r}; give the folder that PEFT's save_pretrained wrote."
    )


def _parsed(path: Path, key: str) -> tuple[str, str, str]:
    """A tensor's key as a module, the part of the adapter ("" for none), and the parameter's name."""
    names = key.removeprefix(_PREFIX).split(".")
    part = next((name for name in names if name in _PARTS), "")
    if key.startswith(_PREFIX) and all(names):
        if not part and len(names) > 1:
            return ".".join(names[:-1]), "", names[-1]
        where = names.index(part) if part else 0
        rest = names[where + 1 :]
        if where and rest and part in ("modules_to_save", "original_module"):
            return ".".join([*names[:where], *rest[:-1]]), part, rest[-1]
        if where and part.startswith("lora_embedding") and len(rest) < 2:
            return ".".join(names[:where]), part, "weight"
        if where and part == "lora_magnitude_vector":
            return ".".join(names[:where]), part, "weight"
        # Some versions leave the adapter's own name in front of `weight`.
        if (
            where
            and rest
            and rest[-1] in ("weight", "bias")
            and len(rest) <= (1 if part == "base_layer" else 2)
        ):
            return ".".join(names[:where]), part, rest[-1]
    raise ValueError(
        f"{str(path)!r}: the tensor {key!r} has no name that PEFT gives, such as "
        f"'{_PREFIX}....q_proj.lora_A.weight'."
    )


_PARTS = frozenset(
    "lora_A lora_B lora_embedding_A lora_embedding_B lora_magnitude_vector base_layer modules_to_save "
    "original_module".split()
)


def _finite(file: tensors.File, name: str, value: np.ndarray) -> np.ndarray:
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{str(file.path)!r}: {name!r} has dtype {value.dtype.name}, and no floating one.")
    flat, step = value.reshape(-1), 1 << 20
    # Some versions of numpy have no isfinite of bfloat16.
    blocks = (flat[at : at + step] for at in range(0, flat.size, step))
    if not all(np.isfinite(x.astype(np.float32) if x.dtype.itemsize < 4 else x).all() for x in blocks):
        raise ValueError(
            f"{str(file.path)!r}: {name!r} has entries that are infinite or not a number: the file is "
            "damaged, or the run that wrote it diverged."
        )
    return value


def _update(
    file: tensors.File, config: Mapping[str, Any], module: str, parts: Mapping[str, str]
) -> tuple[Factors, str, tuple[int, ...]]:
    where = f"{str(file.path)!r}: {module!r}"
    embedding = any(part.startswith("lora_embedding") for part in parts)
    pair = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if set(parts) != set(pair):
        raise ValueError(f"{where} has {' and '.join(sorted(parts))}, and not both of {' and '.join(pair)}.")
    a, b = (_finite(file, parts[part], file.read(parts[part])) for part in pair)
    kind = "embedding" if embedding else "conv2d" if a.ndim == 4 else "linear"
    rank = rank_of(config, module)
    if a.ndim != b.ndim or a.ndim != (4 if kind == "conv2d" else 2) or b.shape[2:] not in ((), (1, 1)):
        raise ValueError(
            f"{where}: A has shape {a.shape} and B {b.shape}; linear layers and embeddings have two axes, "
            "and Conv2d four, of which B's last two are 1. Other layers are not implemented."
        )
    if a.shape[0] != rank or b.shape[1] != rank:
        raise ValueError(
            f"{where}: A has shape {a.shape} and B {b.shape}, and the config gives rank {rank}: the two "
            "files do not belong together, or the layer is a grouped convolution, which is not implemented."
        )
    shape = (a.shape[1], len(b)) if embedding else (len(b), *a.shape[1:])
    return Factors(a.reshape(rank, -1), b.reshape(len(b), rank), scale_of(config, module, rank)), kind, shape


def _check_targets(path: Path, config: Mapping[str, Any], found: Iterable[str]) -> None:
    stray = [module for module in found if not is_target(config, module)]
    if stray:
        raise ValueError(
            f"{str(path)!r} has factors for {some(stray)}, which target_modules, exclude_modules and "
            "layers_to_transform of the config leave out: the two files do not belong together."
        )
    for name in ("rank_pattern", "alpha_pattern"):
        for key in config.get(name) or {}:
            if key not in found and not any(is_in_pattern(key, module) for module in found):
                raise ValueError(
                    f"{str(path)!r}: {name} has {key!r}, which none of the adapted modules matches. "
                    "Take it out of the config if it is meant for another model."
                )


def _check_full(
    path: Path,
    config: Mapping[str, Any],
    full: Mapping[str, str],
    copies: Mapping[str, str],
    found: Mapping[str, Any],
) -> None:
    stray = [name for name in full if not is_full(config, name, found)]
    if stray:
        raise ValueError(
            f"{str(path)!r} holds {some([full[name] for name in stray])}, which "
            f"bias={config.get('bias', 'none')!r} and modules_to_save={config.get('modules_to_save')} of the "
            "config do not name. An embedding is saved by "
            "save_embedding_layers=False without its table."
        )
    foreign = [
        key
        for name, key in copies.items()
        if name.rpartition(".")[0] not in found and not is_full(config, name, ())
    ]
    if foreign:
        raise ValueError(
            f"{str(path)!r} holds {some(foreign)} of modules that are neither adapted nor trained in full."
        )


# --- Onto a tree --------------------------------------------------------------------------------------


def load_peft(folder: str | os.PathLike[str], base: Any, rules: Iterable[Rule]) -> Any:
    r"""Put a PEFT adapter onto parameters of any kind: the wrapped tree it is there.

    For torch's (out, in) weight PEFT computes :math:`W + s\,B A` with A of shape (r, in) and B of
    shape (out, r); here a = Aᵀ and b = Bᵀ, in the axes of the leaf. Factors become float32 (float64 if
    they were), lora_dropout the leaves' dropout, and biases and modules_to_save leaves trained in full.

    A table that the model also uses as its output layer is adapted in both uses, as it is once merged;
    PEFT adapts the look-up alone until it merges. A warning says so where it is known: the rules have a
    lm_head.weight, and the base no such leaf. Parts of one leaf whose scales differ (the q and v of a
    fused kernel) get the scale of the first, and b takes in the rest: the function is the same, AdamW's
    steps in b are not. Grouped convolutions are not served.

    Args:
        folder: The folder that PEFT's save_pretrained wrote.
        base: The parameters, in any tree.
        rules: What the leaves are called in the torch model: `lora_jax.names.llama()` and its kin, or
            your own; the first rule that matches a path counts.

    Returns:
        A wrapped tree; its scales are PEFT's. The base's arrays are the very objects of `base`.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: as of `read_peft`; a name that no leaf has by the rules, or a shape that does not fit;
            or a module that the config targets and the file does not hold.

    >>> import tempfile, lora_jax
    >>> params = {"fc": {"kernel": jnp.ones((8, 4))}}
    >>> rules = [lora_jax.names.Rule("fc/kernel", "fc.weight")]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_peft(lora_jax.wrap(params, rank=2, alpha=4), f"{folder}/out", rules, base_model=None)
    ...     again = load_peft(f"{folder}/out", params, rules)
    >>> again["fc"]["kernel"].a.shape, float(again["fc"]["kernel"].scale)
    ((8, 2), 2.0)
    """
    read = read_peft(folder)
    rules = checked(rules)
    where = f"the adapter in {str(local_path(folder))!r}"
    tree, _ = nnx.opened(base)
    table = named(tree, rules)
    by_name = {piece.name: piece for parts in table.values() for piece in parts}
    _check_names(where, by_name, [*(f"{module}.weight" for module in read.updates), *read.full, *read.copies])
    wrong = []
    for module, kind in read.kinds.items():
        piece = by_name[f"{module}.weight"]
        ours = ("linear", piece.shape[::-1]) if piece.kind == "conv1d" else (piece.kind, piece.shape)
        if (kind, read.shapes[module]) != ours:
            wrong.append(
                f"{module} is {kind} of shape {read.shapes[module]}, and {piece.path} by its rule "
                f"{ours[0]} of shape {ours[1]}"
            )
    wrong += [
        f"{name} has shape {value.shape}, and {by_name[name].path} is {by_name[name].shape} there"
        for name, value in (*read.full.items(), *read.copies.items())
        if value.shape != by_name[name].shape
    ]
    if wrong:
        raise ValueError(f"{where} does not fit this base:\n" + "\n".join(wrong[:20]))
    kinds_of_layers = ("linear", "conv1d", "embedding", "conv2d")
    modules = [piece.module for piece in by_name.values() if piece.kind in kinds_of_layers]
    if text := lost(read, by_name, modules):
        raise ValueError(
            f"{where} {text}: tensors were lost, or the base has more layers than the adapter's."
        )
    _check_axes(where, base, [by_name[f"{module}.weight"] for module in read.updates])
    _check_tied(where, read.full, by_name, rules)
    tied = _tables([f"{module}.weight" for module in read.updates], by_name, rules)
    if tied:
        warnings.warn(
            f"{where} adapts {', '.join(repr(by_name[name].path) for name in tied)}, and this base has no "
            "lm_head: a table that the model also uses as its output layer is adapted in both uses, as it is "
            "once merged; PEFT adapts the look-up alone until it merges. For a model without a head, leave "
            "the rule of lm_head.weight out.",
            stacklevel=2,
        )
    values = dict(leaves_with_path(tree, is_wrapped_leaf))
    _check_copies(where, read.copies, by_name, values)
    dropout = float(read.config.get("lora_dropout") or 0.0)
    leaves = _leaves(where, table, values, read.updates, read.full, dropout)
    return params_lib.attach(base, Adapter(leaves), check=False)


def _leaves(
    where: str,
    table: Mapping[str, Sequence[Piece]],
    values: Mapping[str, Any],
    updates: Mapping[str, Factors],
    full: Mapping[str, np.ndarray],
    dropout: float = 0.0,
) -> dict[str, LoraWeight | FullWeight]:
    """By path, the leaves that updates by module and parameters in full are."""
    leaves: dict[str, LoraWeight | FullWeight] = {}
    for path, parts in table.items():
        found = [(p, updates.get(p.module) if p.name.endswith(".weight") else None) for p in parts]
        given = [(p, full[p.name]) for p in parts if p.name in full]
        changed = given or any(update is not None for _, update in found)
        if changed and not jnp.issubdtype(values[path].dtype, jnp.floating):
            raise ValueError(
                f"{where} changes {path!r}, which has dtype {values[path].dtype}; only floating leaves "
                "can be adapted. Give the base that it was quantised from."
            )
        if any(update is not None for _, update in found):
            if given:
                raise ValueError(f"{where} both adapts {path!r} and holds it in full.")
            leaves[path] = _weight(where, found, 0.0 if parts[0].kind == "embedding" else dropout)
        elif given:
            leaves[path] = _full(where, path, values[path], given)
    return leaves


def _weight(where: str, updates: Sequence[tuple[Piece, Factors | None]], dropout: float) -> LoraWeight:
    dtype = wide_dtype(
        *(x.dtype for _, update in updates if update is not None for x in (update.a, update.b))
    )
    _check_dtype(where, dtype)
    weight = weight_of(updates, dropout, dtype)
    return weight.replace(a=jnp.array(weight.a), b=jnp.array(weight.b), scale=jnp.array(weight.scale))


def _check_dtype(where: str, dtype: Any) -> None:
    if (rounded := jax.dtypes.canonicalize_dtype(dtype)) != dtype:
        raise ValueError(
            f"{where} is {dtype.name}, which jax would round to {rounded.name}; write "
            'jax.config.update("jax_enable_x64", True) first.'
        )


def _full(where: str, path: str, value: Any, given: Sequence[tuple[Piece, np.ndarray]]) -> FullWeight:
    whole = np.array(value, dtype=wide_dtype(value.dtype, *(x.dtype for _, x in given)), order="C")
    for piece, parameter in given:
        piece.put(whole, parameter.astype(whole.dtype))
    _check_dtype(where, whole.dtype)
    return FullWeight(jnp.array(whole), value.dtype, path)


def _check_names(where: str, by_name: Mapping[str, Piece], names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in by_name]
    if not unknown:
        return
    hint = ""
    for name in by_name:
        for long, short, text in ((unknown[0], name, "with"), (name, unknown[0], "without")):
            prefix = long.removesuffix(short) if long.endswith("." + short) else ""
            moved = [prefix + n if text == "without" else n.removeprefix(prefix) for n in names]
            if prefix and all(n in by_name for n in moved):
                hint = f" The rules' names fit {text} {prefix!r} in front: prefix='...' of a rule set."
    close = nearest(unknown[0], by_name)
    raise ValueError(
        f"{where} has parameters that no leaf is by these rules: {some(unknown)}. The nearest names "
        f"that the rules give are {some(close)}.{hint} Write a rule for them, or give the base they are for."
    )


def _check_axes(where: str, base: Any, adapted: Iterable[Piece]) -> None:
    """Raise where a rule takes a kernel the other way than its layer's own name or type does."""
    leaves = {leaf.path: leaf for leaf in read_leaves(nnx.opened(base)[0], known_layouts(base))}
    reader = Reader(list(leaves.values()))
    for piece in adapted:
        leaf = leaves[piece.path]
        known = reader.of(leaf) if leaf.role in ("kernel", "embedding") else []
        if len(known) == 1 and known[0] != kinds(piece):
            raise ValueError(
                f"{where}: the rule for {piece.path!r} takes its axes as {kinds(piece)}, and by its layer "
                f"they are {known[0]}. Write the layout in the leaf's own order of axes, for a weight of "
                "(out, in) Rule(..., 'linear: o i -> o i')."
            )


def _tables(names: Iterable[str], by_name: Mapping[str, Piece], rules: Iterable[Rule]) -> list[str]:
    """Of the names the tables that are the head too: the rules know a head, and the base has none."""
    if not any(rule.name == "lm_head.weight" for rule in rules):
        return []
    if any(name.split(".")[0] in ("lm_head", "score", "classifier") for name in by_name):
        return []
    return [n for n in names if n.rpartition(".")[0].rpartition(".")[2] in ("wte", "embed_tokens")]


def _check_tied(where: str, full: Iterable[str], by_name: Mapping[str, Piece], rules: Iterable[Rule]) -> None:
    """Raise for a table trained in full that is the head too, of which PEFT trains a copy for the look-up."""
    for name in _tables(full, by_name, rules):
        raise ValueError(
            f"{where} holds {name!r} in full, and this base has no lm_head, so its head is the same "
            f"leaf {by_name[name].path!r}. PEFT trains a copy for the look-up and leaves the head as it "
            "was, which one leaf cannot be. Give a base whose head is a leaf of its own; for a model "
            "without a head, leave the rule of lm_head.weight out."
        )


def lost(read: PeftAdapter, names: Iterable[str], modules: Iterable[str]) -> str:
    """What an adapter does not hold although its config names it; nothing where it holds all.

    Args:
        read: The adapter.
        names: The base's parameters, by the adapter's names.
        modules: Of the base's modules those of a kind that PEFT adapts.
    """
    full = [name for name in names if name not in read.full and is_full(read.config, name, read.updates)]
    if full:
        return f"does not hold {some(full)}, which bias or modules_to_save of its config name"
    if read.config.get("target_modules") in (None, "all-linear"):
        return ""
    missing = [name for name in modules if name not in read.updates and is_target(read.config, name)]
    return f"has no factors for {some(missing)}, which its config targets" if missing else ""


def _check_copies(
    where: str, copies: Mapping[str, np.ndarray], by_name: Mapping[str, Piece], values: Mapping[str, Any]
) -> None:
    for name, copy in copies.items():
        piece = by_name[name]
        ours = piece.of(values[piece.path])
        if not np.array_equal(copy.astype(ours.dtype), ours):
            raise ValueError(
                f"{where} holds a copy of {name!r} that is not {piece.path!r}: the base was another, or its "
                "vocabulary was changed before training. Give that base."
            )


# --- From a tree --------------------------------------------------------------------------------------


def save_peft(
    wrapped: Any,
    folder: str | os.PathLike[str],
    rules: Iterable[Rule],
    base_model: str | os.PathLike[str] | None,
    *,
    target: Literal["peft", "vllm"] = "peft",
    task_type: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter that PEFT opens: `adapter_config.json` and `adapter_model.safetensors`.

    Each torch parameter gets its own A and B, in float32 as they are trained; alpha = s·r. Of a table that
    is the head too, both uses are adapted here, and in PEFT the look-up alone until it is merged. Different
    ranks and alphas go to rank_pattern and alpha_pattern. Leaves trained in full become biases ("all" or
    "lora_only") and modules_to_save.

    Args:
        wrapped: A wrapped tree of any kind.
        folder: The folder to write.
        rules: What the leaves are called in the torch model.
        base_model: What the config gives as base_model_name_or_path, or None.
        target: "vllm" folds each scale into B under one r = alpha, and refuses what vLLM does.
        task_type: What the config gives as task_type: "CAUSAL_LM", "SEQ_CLS" and so on. PEFT's
            AutoPeftModel classes need one, `PeftModel.from_pretrained` does not.
        overwrite: Whether an adapter that is there may be replaced.

    Raises:
        FileExistsError: there is an adapter, or something else by one of the two names.
        ValueError: a wrapped leaf that no rule names, or whose axes are not its rule's; a leaf trained in
            full that PEFT has no form for; target="vllm" and a convolution or a leaf trained in full.
        ModuleNotFoundError: safetensors is not installed.

    >>> import tempfile, lora_jax
    >>> wrapped = lora_jax.wrap({"fc": {"kernel": jnp.ones((8, 4))}}, rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_peft(wrapped, folder, [lora_jax.names.Rule("fc/kernel", "fc.weight")], "my/model")
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    if target not in ("peft", "vllm"):
        raise ValueError(f"target is {target!r}; write 'peft' or 'vllm'.")
    if not isinstance(base_model, str | os.PathLike | None):
        raise TypeError(f"base_model is {base_model!r}; write the model's name, its path, or None.")
    base_model = base_model if base_model is None else os.fspath(base_model)
    place = local_path(folder)
    tensors.package(place / WEIGHTS)
    tree, _ = nnx.opened(wrapped)
    config, arrays = _to_peft(tree, checked(rules), target)
    config |= {"base_model_name_or_path": base_model, "task_type": task_type}
    one_writer(place, lambda: _write(place, config, arrays, overwrite))


def _write(place: Path, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray], overwrite: bool) -> None:
    if place.exists() and not place.is_dir():
        raise FileExistsError(f"{str(place)!r} is a file; write a folder.")
    there = [place / name for name in (CONFIG, WEIGHTS) if (place / name).exists()]
    for file in there:
        if not file.is_file():
            raise FileExistsError(f"{str(file)!r} is no file; move it, or write another folder.")
    if there and not overwrite:
        names = " and ".join(file.name for file in there)
        raise FileExistsError(
            f"there is {names} in {str(place)!r} already; write overwrite=True to replace the adapter, or "
            "another folder."
        )
    shapes = {name: (tensors.name_of(x.dtype), x.shape) for name, x in arrays.items()}
    with replacing(place, there, last=CONFIG) as new:
        tensors.write(new / WEIGHTS, shapes, iter(arrays.values()), {"format": "pt"})
        (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _to_peft(tree: Any, rules: list[Rule], target: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    params_lib.require_wrapped(tree, "save_peft")
    leaves = {path: jax.tree.map(on_host, leaf) for path, leaf in params_lib.trained_leaves(tree).items()}
    table = named(tree, rules)
    unnamed = [path for path in leaves if path not in table]
    if unnamed:
        raise ValueError(
            f"no rule names {some(unnamed)}. Write one: "
            f"lora_jax.names.Rule({unnamed[0]!r}, '....weight', 'linear')."
        )
    updates: dict[str, tuple[Piece, Factors]] = {}
    full: dict[str, np.ndarray] = {}
    dropouts = set()
    for path, leaf in leaves.items():
        _check_finite(path, *([leaf.value] if isinstance(leaf, FullWeight) else [leaf.a, leaf.b, leaf.scale]))
        if isinstance(leaf, FullWeight):
            full |= {piece.name: piece.of(leaf.value) for piece in table[path]}
            continue
        for piece in table[path]:
            if piece.kind == "plain" or not piece.name.endswith(".weight"):
                raise ValueError(
                    f"the rule for {path!r} calls it {piece.name!r}, of the kind {piece.kind!r}, which has "
                    "no factors."
                )
            update = factors_of(leaf, piece)
            if update is not None:
                updates[piece.module] = (piece, update)
                dropouts |= {leaf.dropout} if piece.kind != "embedding" else set()
    if not updates:
        raise ValueError(
            "save_peft: there is no update to write: no leaf has low-rank factors, or all of them are zero."
        )
    if len(dropouts) > 1 and target == "peft":
        raise ValueError(
            f"the leaves have dropout rates {sorted(dropouts)}, and PEFT's config holds one. Set one: "
            "leaf.replace(dropout=...)."
        )
    by_name = {piece.name: piece for parts in table.values() for piece in parts}
    _check_tied("the wrapped tree", full, by_name, rules)
    names = set(by_name)
    if target == "vllm":
        updates = _folded(updates, full)
    bias, saved = _in_full(full, names, updates)
    config = _ranks(updates) | {
        "peft_type": "LORA",
        "inference_mode": True,
        "lora_dropout": max(dropouts, default=0.0) if target == "peft" else 0.0,
        "target_modules": _targets(updates, names),
        "fan_in_fan_out": all(piece.kind == "conv1d" for piece, _ in updates.values()),
        "bias": bias,
        "modules_to_save": saved or None,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    arrays: dict[str, np.ndarray] = {}
    for module, (piece, update) in updates.items():
        a, b = update.a, update.b
        if piece.kind == "conv2d":
            a, b = a.reshape(len(a), *piece.shape[1:]), b.reshape(*b.shape, 1, 1)
        forms = (
            ("lora_embedding_A", "lora_embedding_B")
            if piece.kind == "embedding"
            else ("lora_A.weight", "lora_B.weight")
        )
        arrays |= {
            f"{_PREFIX}{module}.{form}": np.ascontiguousarray(x)
            for form, x in zip(forms, (a, b), strict=True)
        }
    for name, value in full.items():
        module, _, leaf = name.rpartition(".")
        layer = f"{module}.base_layer" if module in updates else module
        arrays[f"{_PREFIX}{layer}.{leaf}"] = np.ascontiguousarray(value)
    return config, arrays


def _targets(updates: Mapping[str, Any], names: Iterable[str]) -> list[str] | str:
    """The adapted modules' names; a regular expression where PEFT would take a name for others' end too."""
    targets = sorted(updates)
    # With the modules that hold others, which PEFT would try to adapt, and cannot.
    modules = {
        ".".join(parts[:i]) for name in names for parts in [name.split(".")] for i in range(1, len(parts))
    }
    if all(module in updates or not selects(targets, module) for module in modules):
        return targets
    return "|".join(map(re.escape, targets))


def _check_finite(path: str, *arrays: Any) -> None:
    if not all(np.isfinite(np.asarray(x)).all() for x in arrays):
        raise ValueError(
            f"{path!r} has values that are infinite or not a number: the run diverged. Save an earlier "
            "state; lora_jax.save_adapter keeps this one as it is."
        )


def _ranks(updates: Mapping[str, tuple[Piece, Factors]]) -> dict[str, Any]:
    """The most common rank and alpha, and patterns for the others."""
    ranks = {module: len(update.a) for module, (_, update) in updates.items()}
    alphas = {module: _alpha(update) for module, (_, update) in updates.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": _patterns(ranks, r),
        "alpha_pattern": _patterns(alphas, alpha),
    }


def _alpha(update: Factors) -> float:
    """The alpha whose quotient by the rank is the scale, whole where one is."""
    rank = len(update.a)
    alpha = update.scale * rank
    if not is_number(alpha):
        raise ValueError(
            f"an update has the scale {update.scale:.3g}, whose alpha = s·r float32 does not hold."
        )
    whole = round(alpha)
    return whole if np.float32(whole / rank) == np.float32(update.scale) else alpha


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    found = {module: value for module, value in values.items() if value != default}
    if all(of_pattern(found, module, default) == value for module, value in values.items()):
        return found
    return {f"^{re.escape(module)}": value for module, value in found.items()}


def _folded(
    updates: Mapping[str, tuple[Piece, Factors]], full: Mapping[str, Any]
) -> dict[str, tuple[Piece, Factors]]:
    """Every scale in B, and every rank filled up with zeros to the largest: what vLLM reads."""
    if full:
        raise ValueError(
            f"vLLM loads no biases and no modules_to_save, and {some(full)} are trained in full. Merge "
            "instead."
        )
    convolutions = [module for module, (piece, _) in updates.items() if piece.kind == "conv2d"]
    if convolutions:
        raise ValueError(f"vLLM adapts no convolutions, and {some(convolutions)} are some. Merge instead.")
    rank = max(len(update.a) for _, update in updates.values())
    found = {}
    for module, (piece, update) in updates.items():
        more = rank - len(update.a)
        b = (update.b.astype(np.float64) * update.scale).astype(update.b.dtype)
        found[module] = (
            piece,
            Factors(np.pad(update.a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more))), 1.0),
        )
    return found


def _in_full(full: Mapping[str, Any], names: set[str], updates: Mapping[str, Any]) -> tuple[str, list[str]]:
    """PEFT's `bias` and `modules_to_save` for the parameters that are trained in full."""
    by_module: dict[str, set[str]] = {}
    for name in names:
        by_module.setdefault(name.rpartition(".")[0], set()).add(name)
    saved = sorted(
        module
        for module, theirs in by_module.items()
        if module not in updates
        and theirs <= set(full)
        and any(not name.endswith(".bias") for name in theirs)
    )
    # PEFT takes these names for the end of any module's, and adapts nothing below them.
    others = [module for module in by_module if module not in saved and module.endswith(tuple(saved))]
    others += [module for module in updates if in_saved(map(re.escape, saved), module)]
    if saved and others:
        raise ValueError(
            f"PEFT's modules_to_save={saved} would take in {some(others)} too, which is not trained in "
            "full. Train those too, or merge."
        )
    left = set(full) - {name for module in saved for name in by_module[module]}
    biases = {name for name in names if name.endswith(".bias")}
    if not left:
        return "none", saved
    if left == {f"{module}.bias" for module in updates} & biases:
        return "lora_only", saved
    if left <= biases and biases <= set(full):
        return "all", saved
    raise ValueError(
        f"PEFT has no form for {some(sorted(left))} trained in full: it saves whole modules (weight and "
        "bias), all biases, or the biases of adapted modules. Train one of those, or merge."
    )


# --- loralib ------------------------------------------------------------------------------------------


def load_loralib(
    state: Mapping[str, Any],
    base: Any,
    rules: Iterable[Rule],
    *,
    scale: float | Mapping[str, float],
    enable_lora: Mapping[str, Sequence[bool]] | None = None,
) -> Any:
    """Put the factors of loralib's `lora_state_dict`, or of a LinearWithLoRA, onto parameters of any kind.

    Read are `{module}.lora_A` of shape (r, in) with `{module}.lora_B` of shape (out, r), for an Embedding
    (r, num) and (dim, r); a MergedLinear's A of shape (n·r, in) and B of shape (n·out/len, r) for its n
    enabled parts; and `{module}.lora.A` of shape (in, r) with `{module}.lora.B` of shape (r, out).

    Args:
        state: Names and arrays. A torch file is pickled: read it in torch, and give
            `{name: x.numpy() for name, x in state.items()}`.
        base: The parameters, in any tree.
        rules: What the leaves are called in the torch model.
        scale: s, which the state does not hold: lora_alpha / r for loralib, and alpha itself for a
            LinearWithLoRA that computes alpha·x@A@B. One for all, or {module: s}.
        enable_lora: Of a MergedLinear the parts that are adapted: {module: (True, False, True)}.

    Returns:
        A wrapped tree. Of a MergedLinear only the enabled parts are trained.

    Raises:
        ValueError: a name that no leaf has by the rules, a shape that does not fit, half a pair, a value that
            is not finite, or a weight beside its own factors, as in a state with W merged.

    >>> import lora_jax
    >>> params = {"qkv": {"kernel": jnp.ones((8, 12))}}
    >>> state = {"qkv.lora_A": np.ones((4, 8), np.float32), "qkv.lora_B": np.ones((8, 2), np.float32)}
    >>> wrapped = load_loralib(state, params, [lora_jax.names.Rule("qkv/kernel", "qkv.weight")], scale=1.0,
    ...                        enable_lora={"qkv": (True, False, True)})
    >>> lora_jax.merge(wrapped)["qkv"]["kernel"][0].tolist()
    [3.0, 3.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0]
    """
    for one in scale.values() if isinstance(scale, Mapping) else [scale]:
        if not is_number(one):
            raise ValueError(f"scale is {one!r}; write lora_alpha / r as a number, or {{module: number}}.")
    pairs: dict[str, dict[str, np.ndarray]] = {}
    full: dict[str, np.ndarray] = {}
    for name, value in state.items():
        array = np.asarray(value)
        if not np.isfinite(array.astype(np.float32) if array.dtype.itemsize < 4 else array).all():
            raise ValueError(f"the state's {name!r} has values that are infinite or not a number.")
        found = re.fullmatch(r"(.+)\.(lora_[AB]|lora\.[AB])", name)
        if found is None:
            full[name] = array
            continue
        ours = array.T if "." in found[2] else array
        pairs.setdefault(found[1], {})[found[2][-1]] = ours
    if not pairs:
        raise ValueError(
            "the state has no lora_A and lora_B; give what loralib.lora_state_dict(model) returned."
        )
    merged = [f"{module}.weight" for module in pairs if f"{module}.weight" in full]
    if merged:
        raise ValueError(
            f"the state has {some(merged)} beside their factors, and W may have them merged in. Give "
            "loralib.lora_state_dict(model), and the base as it was."
        )
    tree, _ = nnx.opened(base)
    table = named(tree, rules)
    by_name = {piece.name: piece for parts in table.values() for piece in parts}
    _check_names("the state", by_name, [*(f"{module}.weight" for module in pairs), *full])
    for what, modules in (("enable_lora", enable_lora or {}), ("scale", scale)):
        unused = [m for m in modules if m not in pairs] if isinstance(modules, Mapping) else []
        if unused:
            raise ValueError(f"{what} names {some(unused)}, and the state has factors for {some(pairs)}.")
    scales = scale if isinstance(scale, Mapping) else dict.fromkeys(pairs, scale)
    without = [module for module in pairs if module not in scales]
    if without:
        raise ValueError(f"scale has no number for {some(without)}.")
    for name, value in full.items():
        if value.shape != by_name[name].shape:
            raise ValueError(
                f"the state's {name!r} has shape {value.shape}, and {by_name[name].path!r} is "
                f"{by_name[name].shape} there."
            )
    updates = {
        module: _loralib_update(
            module, pair, by_name[f"{module}.weight"], scales[module], (enable_lora or {}).get(module)
        )
        for module, pair in pairs.items()
    }
    values = dict(leaves_with_path(tree, is_wrapped_leaf))
    leaves = _leaves("the state", table, values, updates, full)
    return params_lib.attach(base, Adapter(leaves), check=False)


def _loralib_update(
    module: str, pair: Mapping[str, np.ndarray], piece: Piece, scale: float, enabled: Sequence[bool] | None
) -> Factors:
    if set(pair) != {"A", "B"}:
        raise ValueError(f"the state has {module!r} with {' and '.join(pair)} alone; A and B are one update.")
    a, b = pair["A"], pair["B"]
    inner, outer = (math.prod(piece.size[x] for x in axes) for axes in (piece.inner, piece.outer))
    n, m = (sum(map(bool, enabled)), len(enabled)) if enabled is not None else (1, 1)
    rank = b.shape[1] if b.ndim == 2 else 0
    if not n or outer % m or a.shape != (n * rank, inner) or b.shape != (outer // m * n, rank) or not rank:
        raise ValueError(
            f"the state has {module!r} with A {a.shape} and B {b.shape}, and {piece.path!r} maps {inner} to "
            f"{outer}{f' in {m} parts of which {n} are enabled' if enabled is not None else ''}. For a "
            "MergedLinear give enable_lora={module: (True, False, True)}; a ConvLoRA is not implemented."
        )
    if enabled is None:
        return Factors(a, b, float(scale))
    width = outer // m
    spread = np.zeros((outer, n * rank), b.dtype)
    blocks = []
    for i, part in enumerate(part for part, on in enumerate(enabled) if on):
        columns, rows = (i * rank, (i + 1) * rank), (part * width, (part + 1) * width)
        spread[slice(*rows), slice(*columns)] = b[i * width : (i + 1) * width]
        blocks.append((columns, rows))
    return Factors(a, spread, float(scale), tuple(blocks))
