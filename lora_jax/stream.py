"""Merging an adapter into a checkpoint on disk, a few rows at a time."""

from __future__ import annotations

import collections
import dataclasses
import filecmp
import functools
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax import tensors
from lora_jax.check import MergedLeaf
from lora_jax.factors import Factors
from lora_jax.files import local_path, put, sync
from lora_jax.hub import CONFIG, INDEX, SINGLE, Weights, opened, read_config
from lora_jax.peft import PeftAdapter, lost, read_peft
from lora_jax.tree import some
from lora_jax.weight import wide_dtype

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes that an update can be added to."""

_BLOCK = 1 << 20  # entries of a tensor that are in memory at once, in each worker
_WORKERS = 3  # so that one reads while two add
_SYNC = 1 << 28  # bytes that are written between two calls to make them durable
# The models whose layers are transformers' Conv1D, of shape (in, out), and those layers' names.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")
# What the models have, with which a config.json without tie_word_embeddings is read.
_TIED_BY_DEFAULT = (
    "albert bart bert bloom camembert ctrl distilbert electra falcon gemma gemma2 gemma3 gemma3_text "
    "gpt2 gpt_bigcode gpt_neo mbart openai-gpt opt roberta smollm3 starcoder2 xglm xlm-roberta"
).split()
_UNTIED_BY_DEFAULT = (
    "codegen deepseek_v2 deepseek_v3 gpt_neox gpt_oss gptj granite llama mistral mixtral olmo olmo2 phi phi3 "
    "qwen2 qwen2_moe qwen3 qwen3_moe stablelm"
).split()
# The models of which it is known that they have no Conv1D.
_LINEAR_MODELS = {*_TIED_BY_DEFAULT, *_UNTIED_BY_DEFAULT} - set(_CONV1D_MODELS)
_TABLES = ("wte", "embed_tokens", "word_embeddings", "embed_in", "tok_embeddings", "tokens_embed", "shared")
_HEADS = ("lm_head", "embed_out", "cls.predictions.decoder", "lm_head.decoder", "output", "generator_lm_head")
# Weights in other forms, which would not be merged; and all that has .safetensors in its name.
_OTHER_WEIGHTS = (
    ".bin .bin.index.json .pt .pth .ckpt .h5 .msgpack .gguf .onnx .onnx_data .ot .tflite .mlmodel"
).split()
_UNTIE = (
    "In transformers load it, set config.tie_word_embeddings = False, give the head a weight of its own "
    "(lm_head.weight = torch.nn.Parameter(lm_head.weight.clone())), save it, and merge into that."
)
_STAGING = ".lora_jax-"  # what the folder begins with in which a model lies until it is whole
# What lies in a model's folder, and may be replaced with it.
_MODEL_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_MODEL_FILES = (
    "config.json generation_config.json model.safetensors.index.json tokenizer.json tokenizer.model "
    "tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt "
    "spiece.model sentencepiece.bpe.model chat_template.jinja chat_template.json preprocessor_config.json "
    "processor_config.json"
).split()


@dataclass(frozen=True)
class Checkpoint(Weights):
    """A model's weights and its config.json."""

    config: Mapping[str, Any]


def _checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    config = read_config(folder)
    return Checkpoint(**vars(opened(folder)), config=config)


# --- What changes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """The update of one tensor, scale·left·right, on the tensor's first axis and its others flattened."""

    left: np.ndarray
    right: np.ndarray
    scale: float

    @functools.cached_property
    def is_full(self) -> bool:
        """Whether no entry of a factor is zero."""
        return bool(self.scale and self.left.all() and self.right.all())


@dataclass(frozen=True)
class Changes:
    """What an adapter makes of a checkpoint.

    Attributes:
        updates: By the tensor's name, what is added.
        replaced: By the tensor's name, what stands there instead.
        notes: What is worth saying about it.
    """

    updates: Mapping[str, Update]
    replaced: Mapping[str, np.ndarray]
    notes: Sequence[str]


def changes(base: Checkpoint, adapter: PeftAdapter) -> Changes:
    """Find every parameter of an adapter in a checkpoint.

    Raises:
        ValueError: the checkpoint is quantised; a name is not found, also with or without a prefix that
            all have in common; the adapter does not hold what its config names; a shape does not fit, or it
            is not known how a matrix lies; or a tied head is adapted.
    """
    where = repr(str(base.folder))
    if base.config.get("quantization_config"):
        raise ValueError(
            f"{where} is quantised (its {CONFIG} has quantization_config), and an update that is rounded to "
            "such numbers is lost. Merge into the model it was made from."
        )
    said = _says_tied(base.config)
    tied = _tied_by_default(base.config) if said is None else said
    weights = {f"{module}.weight": module for module in adapter.updates}
    _check_head(base, [*weights, *adapter.full], said, tied)
    names, notes = _named(base, [*weights, *adapter.full, *adapter.copies])
    _check_lost(base, adapter, names)
    model = base.config.get("model_type")
    if adapter.config.get("fan_in_fan_out") and model in _LINEAR_MODELS:
        notes.append(f"fan_in_fan_out is passed over, as PEFT does: {model} has no Conv1D")
    updates = {names[name]: _update(base, names[name], adapter, module) for name, module in weights.items()}
    for name, copy in adapter.copies.items():
        if not _is_copy(base, names[name], copy):
            raise ValueError(
                f"the adapter holds a copy of {name!r} that is not the tensor in {where}: it was trained on "
                "another base, or on one with another vocabulary. Give that base."
            )
    replaced = {names[name]: value for name, value in adapter.full.items()}
    for name, value in replaced.items():
        if value.shape != base.entry(name).shape:
            raise ValueError(
                f"{name!r} has shape {value.shape} in the adapter and {base.entry(name).shape} in {where}."
            )
        _require_float(base, name)
    both = sorted(set(updates) & set(replaced))
    if both:
        raise ValueError(f"the adapter both adapts {some(both)} and holds it in full.")
    for table in [name for name in (*updates, *replaced) if _is_table(name)]:
        head, note = _tied_to(base, table, tied, in_full=table in replaced)
        if head:
            updates[head] = updates[table]
        notes += [note] if note else []
    return Changes(updates, replaced, notes)


def _named(base: Checkpoint, names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Of the adapter's names those in the checkpoint, and what there is to say of them."""
    unknown = [name for name in names if name not in base.owner]
    if not unknown:
        return {name: name for name in names}, []
    found = {}
    first = names[0]
    segments = first.split(".")
    for i in range(1, len(segments) - 1):
        prefix = ".".join(segments[:i]) + "."
        if all(name.startswith(prefix) and name.removeprefix(prefix) in base.owner for name in names):
            found[f"without {prefix!r}"] = {name: name.removeprefix(prefix) for name in names}
    for tensor in base.owner:
        if tensor.endswith("." + first):
            prefix = tensor.removesuffix(first)
            if all(prefix + name in base.owner for name in names):
                found[f"with {prefix!r}"] = {name: prefix + name for name in names}
    if len(found) == 1:
        ((how, moved),) = found.items()
        return moved, [f"the adapter's names are found in the base {how} in front, and are taken so"]
    where = repr(str(base.folder))
    if found:
        raise ValueError(
            f"the adapter's names are in {where} in several places: {', '.join(sorted(found))} in front. "
            "Give the checkpoint of the part that was adapted."
        )
    heads = [name for name in unknown if name.rpartition(".")[0].split(".")[0] in ("score", "classifier")]
    hint = (
        " The head is no part of this base: in transformers load the base with it, "
        "AutoModelForSequenceClassification.from_pretrained(base, num_labels=...).save_pretrained(folder), "
        "and merge into that."
        if heads
        else ""
    )
    listed = "\n".join(f"  {name}" for name in unknown)
    raise ValueError(
        f"{len(unknown)} of the adapter's {len(names)} parameters are not in {where}, with names such as "
        f"{some(list(base.owner), 3)}. Nothing was written.{hint} Not found are:\n{listed}"
    )


def _update(base: Checkpoint, name: str, adapter: PeftAdapter, module: str) -> Update:
    found: Factors = adapter.updates[module]
    kind, shape = adapter.kinds[module], base.entry(name).shape
    _require_float(base, name)
    outer, inner = len(found.b), found.a.shape[1]
    straight = Update(found.b, found.a, found.scale)
    turned = Update(found.a.T, found.b.T, found.scale)
    if kind == "embedding" and shape == (inner, outer):
        return turned
    if kind == "conv2d" and shape == adapter.shapes[module]:
        return straight
    model = base.config.get("model_type")
    if kind == "linear":
        conv1d = _is_conv1d(base, adapter, module)
        if conv1d is None and shape == (inner, outer) == (outer, inner):
            raise ValueError(
                f"{name!r} in {str(base.folder)!r} has shape {shape}, fan_in_fan_out of the adapter's config "
                f"is true, and model_type {model!r} is not known, so that it may be a Linear or a Conv1D. "
                "Write fan_in_fan_out false in adapter_config.json if all adapted layers are Linear; else "
                "merge in PEFT (merge_and_unload)."
            )
        if conv1d is not False and shape == (inner, outer):
            return turned
        if conv1d is not True and shape == (outer, inner):
            return straight
    raise ValueError(
        f"{name!r} has shape {shape} in {str(base.folder)!r}, and the adapter's update of it ({kind}) maps "
        f"{inner} to {outer} numbers: it was trained on another model, or on one with another vocabulary."
        + (
            " It would fit a layer that is stored as (in, out), such as a Conv1D; if this is one, set "
            "fan_in_fan_out to true in the adapter_config.json."
            if kind == "linear"
            and shape == (inner, outer)
            and model not in _LINEAR_MODELS.union(_CONV1D_MODELS)
            else ""
        )
    )


def _is_conv1d(base: Checkpoint, adapter: PeftAdapter, module: str) -> bool | None:
    """Whether a matrix is stored as (in, out); None where its shape alone can tell."""
    model = base.config.get("model_type")
    if model in _CONV1D_MODELS:
        return module.rpartition(".")[2] in _CONV1D_MODULES
    # fan_in_fan_out is one for all layers, and PEFT passes over it where a layer is a Linear.
    return None if adapter.config.get("fan_in_fan_out") and model not in _LINEAR_MODELS else False


def _check_lost(base: Checkpoint, adapter: PeftAdapter, names: Mapping[str, str]) -> None:
    """Raise for what the adapter's config names of the base, and the adapter does not hold."""
    theirs, ours = next(iter(names.items()))
    more = theirs.removesuffix(ours) if theirs.endswith(ours) else ""
    less = ours.removesuffix(theirs) if ours.endswith(theirs) else ""
    found = {more + n.removeprefix(less): base.entry(n).shape for n in base.owner if n.startswith(less)}
    counts = [part.get("num_hidden_layers") for part in _parts(base.config)]
    count = max((x for x in counts if isinstance(x, int)), default=math.inf)
    # In newer versions of transformers the experts of a layer are one parameter, and no modules.
    experts = any(".experts." in module for module in adapter.updates)

    def of_model(name: str) -> bool:
        # Layers that only draft the tokens after the next one, which transformers does not load.
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        draft = name.startswith("mtp.") or (layer is not None and int(layer[1]) >= count)
        return not draft and (experts or ".experts." not in name)

    held = [name for name in found if of_model(name)]
    # GPT-2's files may have masks that are called bias.
    parameters = [name for name in held if not (name.endswith(".bias") and len(found[name]) > 1)]
    modules = [n.removesuffix(".weight") for n in held if n.endswith(".weight") and len(found[n]) in (2, 4)]
    if text := lost(adapter, parameters, modules):
        raise ValueError(
            f"the adapter {text}: tensors were lost, or {str(base.folder)!r} has parts that the adapter's "
            "model has not. In the second case load it in transformers by that model's class, save it with "
            "save_pretrained(folder), and merge into that."
        )


def _require_float(base: Checkpoint, name: str) -> None:
    dtype = base.entry(name).dtype
    if dtype not in FLOATS:
        raise ValueError(
            f"{name!r} in {str(base.folder)!r} has dtype {dtype}; {', '.join(FLOATS)} can be merged into. "
            "Merge into the model that it was quantised from."
        )


# --- Tied heads ---------------------------------------------------------------------------------------


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [part for part in (config, config.get("text_config")) if isinstance(part, dict)]


def _says_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether the config ties the head to the embedding; None where it does not say."""
    found = (part.get("tie_word_embeddings") for part in _parts(config))
    return next((value for value in found if isinstance(value, bool)), None)


def _tied_by_default(config: Mapping[str, Any]) -> bool | None:
    """Whether transformers ties them where a config does not say; None for a model that is not known."""
    models = {part.get("model_type") for part in _parts(config)}
    if models & set(_TIED_BY_DEFAULT):
        return True
    return False if models & set(_UNTIED_BY_DEFAULT) else None


def _head_of(names: Sequence[str]) -> str | None:
    return next((name for name in names if name.removesuffix(".weight") in _HEADS), None)


def _check_head(base: Checkpoint, names: Sequence[str], said: bool | None, tied: bool | None) -> None:
    head = _head_of(names)
    if head is None or said is False:
        return
    where = repr(str(base.folder))
    if head not in base.owner:
        raise ValueError(
            f"the adapter changes {head!r}, which {where} does not hold: there the head is tied to the "
            f"embedding, which would change with it. {_UNTIE}"
        )
    if tied:
        raise ValueError(
            f"the adapter changes {head!r}, and the {CONFIG} of {where} ties the head to the embedding "
            f"(tie_word_embeddings), so that loading would put the embedding in its place. {_UNTIE}"
        )


def _is_table(name: str) -> bool:
    return name.removesuffix(".weight").rpartition(".")[2] in _TABLES


def _tied_to(base: Checkpoint, name: str, tied: bool | None, in_full: bool) -> tuple[str | None, str | None]:
    """The head that is stored as a copy of an embedding, and what there is to say of a head."""
    if tied is False:
        return None, None
    where = repr(str(base.folder))
    head = _head_of(list(base.owner))
    if head is not None and not _same_bytes(base, name, head):
        return None, f"{name} changes, and {head} has other values and stays as it is" if tied else None
    if head is not None and tied is None:
        raise ValueError(
            f"the adapter changes {name!r}, {head!r} in {where} is a copy of it, and the {CONFIG} does not "
            'say whether the two are tied. Write it there: "tie_word_embeddings": true or false.'
        )
    if in_full and (head is not None or _has_head(base.config)):
        raise ValueError(
            f"the adapter holds {name!r} in full (modules_to_save), and the head of {where} is tied to it. "
            "PEFT trains a copy and leaves the old table to the head, which a tied model cannot hold. "
            f"{_UNTIE}"
        )
    if head is None:
        return None, (
            f"{name} changes, and no head is stored: a head that is tied to it changes with it, which it "
            "does not while PEFT trains"
        )
    return head, f"{name} changes, and {head}, a stored copy of it, changes with it"


def _has_head(config: Mapping[str, Any]) -> bool:
    """Whether a model without a stored head has one, by the name of its class."""
    names = config.get("architectures") or ["ForCausalLM"]
    kinds = ("ForCausalLM", "LMHead", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")
    return any(kind in str(name) for name in names for kind in kinds)


def _same_bytes(base: Checkpoint, one: str, other: str) -> bool:
    x, y = base.entry(one), base.entry(other)
    if (x.dtype, x.shape) != (y.dtype, y.shape):
        return False
    step = 1 << 22
    return all(
        np.array_equal(_read(base, one, at, step), _read(base, other, at, step))
        for at in range(0, x.size, step)
    )


def _is_copy(base: Checkpoint, name: str, copy: np.ndarray) -> bool:
    entry = base.entry(name)
    if copy.shape != entry.shape or entry.dtype not in FLOATS:
        return False
    flat, dtype = copy.reshape(-1), tensors.DTYPES[entry.dtype]
    return all(
        np.array_equal(
            flat[at : at + _BLOCK].astype(dtype),
            _read(base, name, at * dtype.itemsize, _BLOCK * dtype.itemsize).view(dtype),
        )
        for at in range(0, flat.size, _BLOCK)
    )


def _read(base: Checkpoint, name: str, start: int, size: int) -> np.ndarray:
    entry = base.entry(name)
    file = base.files[base.owner[name]].path
    with file.open("rb") as handle:
        return _bytes(handle, name, entry.start + start, min(size, entry.size - start))


def _bytes(file: BinaryIO, name: str, start: int, size: int) -> np.ndarray:
    """Some bytes of a file, read at a place of their own so that several threads can."""
    data = np.empty(size + 64, np.uint8)
    # Where jax takes it as it is, and does not copy it.
    data = data[-data.ctypes.data % 64 :][:size]
    done = 0
    while done < size:
        count = os.preadv(file.fileno(), [memoryview(data)[done:]], start + done)
        if not count:
            raise ValueError(f"{file.name!r} ends inside of the tensor {name!r}; it is truncated.")
        done += count
    return data


# --- A block of rows ----------------------------------------------------------------------------------


@dataclass
class Sums:
    """What is counted of one tensor: squares of its entries and of what rounding lost, and entries."""

    old: float = 0.0
    lost: float = 0.0
    updated: int = 0
    still: int = 0

    def __iadd__(self, other: Sums) -> Sums:
        self.old += other.old
        self.lost += other.lost
        self.updated += other.updated
        self.still += other.still
        return self


@functools.partial(jax.jit, static_argnames=("dtype", "count"))
def _added(
    w: jax.Array, left: jax.Array, right: jax.Array, scale: jax.Array, dtype: Any, count: bool
) -> tuple[jax.Array, ...]:
    """W + s·left·right rounded to a dtype, what that lost, and W; by columns two counts in one number."""
    delta = jnp.matmul(left, right, precision=lax.Precision.HIGHEST) * scale
    old = w.astype(delta.dtype)
    total = old + delta
    zero = delta == 0
    if dtype == jnp.bfloat16:
        # By this name, since XLA may leave out a cast there and back.
        total = lax.reduce_precision(total, 8, 7)
    new = total.astype(dtype)
    # As bits, which no select of floats is sure to keep of a NaN.
    new = _of_bits(jnp.where(zero, _bits(w.astype(dtype)), _bits(new)), dtype)
    wide = total if dtype == jnp.bfloat16 else new.astype(delta.dtype)
    made = (new, (wide - old) - delta, old)
    if not count:
        return made
    both, one, none = np.int32((1 << 16) + 1), np.int32(1), np.int32(0)
    counts = jnp.where(zero, none, jnp.where(wide == old, both, one))
    return (*made, jnp.sum(counts, 0, dtype=jnp.int32))


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, np.dtype(f"u{x.dtype.itemsize}"))


def _of_bits(x: jax.Array, dtype: Any) -> jax.Array:
    return lax.bitcast_convert_type(x, dtype)


def _sum(w: np.ndarray, left: np.ndarray, update: Update, dtype: Any) -> tuple[np.ndarray, Sums]:
    rows = len(left)
    wide = wide_dtype(w.dtype, update.left.dtype, update.right.dtype, dtype)
    # Of factors without a zero every entry counts as updated. Counting is half of the time otherwise.
    count = w.dtype != dtype or not update.is_full
    with jax.enable_x64(True):
        factors = (np.asarray(x, wide) for x in (left, update.right, update.scale))
        made = _added(w.reshape(rows, -1), *factors, dtype, count)
        new, lost, old, *counts = (np.asarray(x) for x in made)
    sums = Sums(_squares(old), _squares(lost))
    if count:
        sums.updated, sums.still = int((counts[0] & 0xFFFF).sum()), int((counts[0] >> 16).sum())
    else:
        unsigned = np.dtype(f"u{w.dtype.itemsize}")
        moved = int(np.count_nonzero(new.reshape(-1).view(unsigned) != w.view(unsigned)))
        sums.updated, sums.still = w.size, w.size - moved
    finite = math.isfinite(sums.old + sums.lost)
    if not finite:
        _check_finite(new, old)
    if not finite or min(sums.old, sums.lost) < 1e-30 * w.size:  # where squares in float32 underflow
        known = np.isfinite(old)
        sums.old, sums.lost = (_squares(np.where(known, x, 0).astype(np.float64)) for x in (old, lost))
    return new, sums


def _squares(x: np.ndarray) -> float:
    return float(np.einsum("ij,ij->i", x, x).sum(dtype=np.float64))


def _check_finite(new: np.ndarray, old: np.ndarray) -> None:
    with np.errstate(invalid="ignore"):  # which some versions say of any NaN in bfloat16
        bad = np.isfinite(old) & ~np.isfinite(new)
    if bad.any():
        raise ArithmeticError(f"{int(bad.sum())} entries")


def _cast(old: np.ndarray, dtype: Any) -> np.ndarray:
    if old.dtype == dtype:
        return old
    with jax.enable_x64(True):
        new = np.asarray(jnp.asarray(old).astype(dtype))
    _check_finite(new, old)
    return new


# --- The whole ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merged:
    """What `merge_checkpoint` did.

    Attributes:
        folder: Where the merged checkpoint is.
        leaves: A `lora_jax.check.MergedLeaf` for every tensor that was added to; its path is the name.
        replaced: The tensors that the adapter holds in full.
        files: The safetensors files.
        size: Their bytes.
        left_out: What of the base was not copied: weights in other forms, hidden files and folders, links
            to folders, and what is no file.
        notes: What is worth saying about it.
    """

    folder: Path
    leaves: Sequence[MergedLeaf]
    replaced: Sequence[str]
    files: Sequence[str]
    size: int
    left_out: Sequence[str]
    notes: Sequence[str]


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    shard_size: int | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Merged:
    r"""Add a PEFT adapter to a checkpoint in the Hugging Face layout, in bounded memory.

    :math:`W + s\,B A` is added in float32 (float64 if W or a factor is) and rounded once; entries whose
    update is zero keep their bits. Biases and modules_to_save replace the base's.

    The other files of the base are copied, those of its folders too, with what links to files point to. Not
    copied are weights in other forms (by their endings, and all with .safetensors in the name), an
    adapter_config.json, what has a name that begins with a dot, and links to folders; a note names them.

    What is written lies beside `out` in a folder `.lora_jax-…`, and is renamed when it is whole and durable.
    A folder at `out` that is empty stays the folder it is: what is written lies in it under such a name, and
    is moved up, config.json last. Only a process that is killed at once (SIGKILL, a power cut) leaves that
    folder behind; the next merge beside it says so.

    Args:
        base: The folder with config.json and safetensors files.
        adapter: The folder that PEFT's save_pretrained wrote.
        out: The folder to make.
        dtype: What all floating tensors become, "F32", "F16" or "BF16"; by default each keeps its own.
        shard_size: The largest size of a file in bytes; by default the tensors are in files as the base's.
        overwrite: Whether a model that is at `out` may be replaced: its config, weights and tokenizer, and
            other files only where they equal the base's. A folder with any other file never is.
        say: Called with notes, before anything is written.
        progress: Called with the bytes that were written and those there are to write.

    Raises:
        FileExistsError: there is something at `out`, and `overwrite` is not set or it is no model.
        FileNotFoundError: the base or the adapter is not there.
        ValueError: the two do not fit each other, a file is damaged, or a sum is infinite or no number.
        OSError: the disk is full, or a file too large for it; it names the file.
        ModuleNotFoundError: safetensors is not installed.

    >>> merge_checkpoint("no/such/model", "adapter", "out")
    Traceback (most recent call last):
        ...
    FileNotFoundError: there is no config.json in '.../no/such/model'...
    """
    source = _checkpoint(base)
    target = local_path(out)
    _check_places(source.folder, local_path(adapter), target)
    entries = _entries(source, dtype)
    files = _files(source, entries, shard_size)
    copied, weights, odd = _others(source)
    known = {**dict.fromkeys(files), **{name: source.folder / name for name in copied}}
    _check_vacant(target, overwrite, known)
    made = changes(source, read_peft(adapter))
    notes = [*made.notes]
    if weights:
        notes.append(f"not copied, since they hold weights that are not merged: {', '.join(weights)}")
    if odd:
        notes.append(f"not copied, being hidden, a link to a folder, or no file: {', '.join(odd)}")
    notes += [_stale(path) for path in sorted(target.parent.glob(f"{_STAGING}*"))]
    for note in notes:
        say(note)
    created = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    # An empty folder may be a mount point, or where a shell stands, and is filled.
    fill = target.is_dir() and not any(target.iterdir())
    # Else beside the target, since only inside one file system is a rename atomic.
    staging = (target if fill else target.parent) / f"{_STAGING}{secrets.token_hex(6)}"
    try:
        size = sum(entries[name].size for name in entries)
        _check_space(staging.parent, size + sum((source.folder / name).stat().st_size for name in copied))
        staging.mkdir(mode=0o700)
        new = staging / "new"
        new.mkdir()
        leaves = _write(new, source, made, entries, files, lambda done: progress(done, size))
        _write_rest(new, source, entries, files, copied, dtype)
        for path in (*new.rglob("*"), new):
            sync(path)
        if fill:
            _move_up(new, target, staging)
        else:
            _check_vacant(target, overwrite, known)
            put(new, target, staging / "old")
        created = []
    finally:
        # What was at the target is only there if it could not be put back.
        if target.exists() or not (staging / "old").exists():
            shutil.rmtree(staging, ignore_errors=True)
        for folder in created:  # of a merge that failed
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    return Merged(target, leaves, sorted(made.replaced), sorted(files), size, [*weights, *odd], notes)


def _check_places(base: Path, adapter: Path, target: Path) -> None:
    for what, place in (("the base", base), ("the adapter", adapter)):
        if target == place or target in place.parents:
            raise ValueError(
                f"{str(target)!r} is, or has in it, {what}, which would be lost; write another folder for "
                "the merged model."
            )
    if base in target.parents:
        raise ValueError(f"{str(target)!r} is inside of the base; write a folder beside it.")


def _stale(path: Path) -> str:
    old = ", and its 'old' is what was at OUT before" if (path / "old").exists() else ""
    return (
        f"{str(path)!r} is of a merge or save that was killed{old}, or of one that runs now; if none runs, "
        "remove it"
    )


def _check_vacant(target: Path, overwrite: bool, known: Mapping[str, Path | None]) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    where = repr(str(target))
    if target.is_dir():
        for path in target.glob(f"{_STAGING}*"):
            raise FileExistsError(f"{_stale(path)}. What else is in {where} may be half of a model.")
    if not overwrite:
        what = some(sorted(path.name for path in target.iterdir())) if target.is_dir() else "something"
        raise FileExistsError(
            f"there is {what} at {where} already; write another folder, or --overwrite to replace a model."
        )
    if not _is_model(target):
        raise FileExistsError(
            f"{where} is no model (a {CONFIG} with model_type or architectures, and {SINGLE} or {INDEX}), "
            "and --overwrite replaces nothing else. Remove it, or write another folder."
        )
    foreign = [name for name in _inside(target) if not _is_known(target, name, known)]
    if foreign:
        differ = " (where the base has others by that name)" if str(foreign[0]) in known else ""
        raise FileExistsError(
            f"{where} holds more than a model: {some(list(map(str, foreign)))}{differ}, which --overwrite "
            "would lose. Move or remove it, or write another folder."
        )
    if os.path.ismount(target) or target in (Path.cwd(), *Path.cwd().parents):
        raise FileExistsError(
            f"{where} is a mount point, or where this command runs, and no other folder can take its place. "
            "Remove the files in it, or write another folder."
        )


def _is_model(folder: Path) -> bool:
    if not (folder / CONFIG).is_file() or not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return False
    try:
        config = read_config(folder)
    except ValueError:
        return False
    return bool(config.get("model_type") or config.get("architectures"))


def _inside(folder: Path) -> Iterator[Path]:
    """All files and links of a folder, and the folders in it that are empty."""
    for place, folders, files in os.walk(folder):
        here = Path(place)
        links = [name for name in folders if (here / name).is_symlink()]
        if here != folder and not folders and not files:
            yield here.relative_to(folder)
        yield from ((here / name).relative_to(folder) for name in (*files, *links))


def _is_known(target: Path, name: Path, known: Mapping[str, Path | None]) -> bool:
    """Whether a file is a model's, or equal to the base's by that name."""
    if len(name.parts) == 1 and (name.name in _MODEL_FILES or _MODEL_FILE.fullmatch(name.name)):
        return True
    if str(name) not in known:
        return False
    base = known[str(name)]
    return base is None or ((target / name).is_file() and filecmp.cmp(target / name, base, shallow=False))


def _move_up(new: Path, target: Path, staging: Path) -> None:
    """Move what is in a folder to the one that it is staged in; all of it or nothing."""
    others = [path.name for path in target.iterdir() if path != staging]
    if others:
        raise FileExistsError(f"there is {some(others)} in {str(target)!r} now, which was empty before.")
    # Without its config, half of a model is none.
    paths = sorted(new.iterdir(), key=lambda path: path.name == CONFIG)
    try:
        for path in paths:
            os.rename(path, target / path.name)
    except BaseException:
        for path in reversed(paths):
            if (target / path.name).exists():
                os.rename(target / path.name, path)
        raise
    sync(target)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"the merged model takes {needed:,} bytes, and {free:,} are free at {str(folder)!r}. Nothing was "
            "written."
        )


def _entries(base: Checkpoint, dtype: str | None) -> dict[str, tensors.Entry]:
    """By tensor, the dtype, shape and size it is to have."""
    found = {name: base.entry(name) for name in base.owner}
    return {
        name: dataclasses.replace(
            entry, dtype=dtype, size=tensors.DTYPES[dtype].itemsize * math.prod(entry.shape)
        )
        if dtype and entry.dtype in FLOATS
        else entry
        for name, entry in found.items()
    }


def _files(base: Checkpoint, entries: Mapping[str, tensors.Entry], limit: int | None) -> dict[str, list[str]]:
    """By file, its tensors: as the base's are, or in order up to a size."""
    if limit is None:
        found: dict[str, list[str]] = {}
        for name, file in base.owner.items():
            found.setdefault(file, []).append(name)
        return found
    parts: list[list[str]] = []
    room = 0
    for name in base.owner:
        size = entries[name].size
        if not parts or size > room:
            parts.append([])
            room = limit
        parts[-1].append(name)
        room -= size
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def _others(base: Checkpoint) -> tuple[list[str], list[str], list[str]]:
    """The files to copy beside the weights; not to copy are weights in other forms, and what is odd."""
    copied, weights, odd = [], [], []
    made_anew = (CONFIG, INDEX, *base.files)
    for folder, folders, files in os.walk(base.folder):
        here = Path(folder)
        strange = [name for name in folders if name.startswith(".") or (here / name).is_symlink()]
        folders[:] = [name for name in folders if name not in strange]
        for path in [here / name for name in (*strange, *files)]:
            name = str(path.relative_to(base.folder))
            if name in made_anew:
                continue
            if path.name.startswith(".") or not path.is_file():
                odd.append(name)
            # An adapter beside a model is loaded with it, and would be added once more.
            elif (
                ".safetensors" in path.name
                or name.endswith(tuple(_OTHER_WEIGHTS))
                or path.name == "adapter_config.json"
            ):
                weights.append(name)
            else:
                copied.append(name)
    return sorted(copied), sorted(weights), sorted(odd)


def _write(
    folder: Path,
    base: Checkpoint,
    made: Changes,
    entries: Mapping[str, tensors.Entry],
    files: Mapping[str, Sequence[str]],
    progress: Callable[[int], None],
) -> list[MergedLeaf]:
    sums: dict[str, Sums] = {}
    done = 0
    handles = {name: file.path.open("rb", buffering=0) for name, file in base.files.items()}
    pool, syncing = ThreadPoolExecutor(_WORKERS), ThreadPoolExecutor(1)
    unsynced: list[Future[None]] = []
    try:
        for file, names in files.items():
            first = base.files[base.owner[names[0]]]
            header = tensors.header(
                {name: entries[name] for name in names}, {"format": "pt", **first.metadata}
            )
            with (folder / file).open("wb", buffering=0) as to:
                with tensors.writing(folder / file):
                    _write_all(to, header)
                for name, data, found in _made(pool, base, handles, made, entries, names):
                    with tensors.writing(folder / file):
                        _write_all(to, data)
                    if found is not None:
                        sums.setdefault(name, Sums()).__iadd__(found)
                    done += data.nbytes
                    progress(done)
                    if done // _SYNC > (done - data.nbytes) // _SYNC:
                        # While others compute, rather than all at the end.
                        unsynced.append(syncing.submit(os.fsync, to.fileno()))
                with tensors.writing(folder / file):
                    os.fsync(to.fileno())
                    for future in unsynced:
                        future.result()
                unsynced.clear()
    finally:
        pool.shutdown(cancel_futures=True)
        syncing.shutdown(cancel_futures=True)
        for handle in handles.values():
            handle.close()
    return [
        _leaf(name, entries[name].dtype, made.updates[name], sums[name])
        for name in base.owner
        if name in sums
    ]


def _write_all(file: Any, data: Any) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[file.write(view) :]


def _made(
    pool: ThreadPoolExecutor,
    base: Checkpoint,
    handles: Mapping[str, BinaryIO],
    made: Changes,
    entries: Mapping[str, tensors.Entry],
    names: Sequence[str],
) -> Iterator[tuple[str, np.ndarray, Sums | None]]:
    """The bytes of tensors in order, made a few blocks ahead."""
    ahead: collections.deque[Future[tuple[str, np.ndarray, Sums | None]]] = collections.deque()
    for name in names:
        old = base.entry(name)
        kept = name not in made.updates and name not in made.replaced and entries[name].dtype == old.dtype
        for start, stop in _pieces(old, kept):
            task = (base, handles[base.owner[name]], made, entries[name].dtype, name, start, stop)
            ahead.append(pool.submit(_copied if kept else _block, *task))
            if len(ahead) > 2 * _WORKERS:
                yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def _pieces(entry: tensors.Entry, kept: bool) -> Iterator[tuple[int, int]]:
    """Ranges of a tensor's rows; of its bytes where they stay as they are."""
    rows, columns = (entry.shape[0], math.prod(entry.shape[1:])) if entry.shape else (1, 1)
    # Two counts of a column's rows share one number. A power of two leaves fewer blocks of other shapes, each
    # of which is compiled.
    fit = min(_BLOCK // max(1, columns), (1 << 15) - 1)
    count, step = (entry.size, 4 * _BLOCK) if kept else (rows, 1 << max(0, fit.bit_length() - 1))
    return ((start, min(start + step, count)) for start in range(0, count, step))


def _copied(
    base: Checkpoint, file: BinaryIO, made: Changes, dtype: str, name: str, start: int, stop: int
) -> tuple[str, np.ndarray, Sums | None]:
    return name, _bytes(file, name, base.entry(name).start + start, stop - start), None


def _block(
    base: Checkpoint, file: BinaryIO, made: Changes, dtype: str, name: str, start: int, stop: int
) -> tuple[str, np.ndarray, Sums | None]:
    entry, to = base.entry(name), tensors.DTYPES[dtype]
    row = entry.size // (entry.shape[0] if entry.shape else 1)
    rows = slice(start, stop) if entry.shape else ()
    update, whole = made.updates.get(name), made.replaced.get(name)
    try:
        if whole is not None:
            new, sums = _cast(np.ascontiguousarray(whole[rows]), to), None
        else:
            data = _bytes(file, name, entry.start + start * row, (stop - start) * row)
            old = data.view(tensors.DTYPES[entry.dtype])
            new, sums = (_cast(old, to), None) if update is None else _sum(old, update.left[rows], update, to)
    except ArithmeticError as error:
        raise ValueError(
            f"{name!r} would have infinite or undefined values in {dtype} at {error}, which are finite now. "
            "Look for a diverged run (large values in A or B), or write a wider dtype: --dtype float32."
        ) from None
    return name, new.reshape(-1).view(np.uint8), sums


def _leaf(name: str, dtype: str, update: Update, sums: Sums) -> MergedLeaf:
    left, right = (x.astype(np.float64) for x in (update.left, update.right))
    # ‖LR‖² through two small matrices.
    squares = update.scale**2 * float(np.sum((left.T @ left) * (right @ right.T)))
    delta = math.sqrt(max(squares, 0.0)) if sums.updated else 0.0
    return MergedLeaf(
        name,
        tensors.DTYPES[dtype].name,
        size=delta / math.sqrt(sums.old) if sums.old else math.inf if delta else 0.0,
        lost=math.sqrt(sums.lost) / delta if delta else 0.0,
        unmoved=sums.still / max(sums.updated, 1),
    )


def _write_rest(
    folder: Path,
    base: Checkpoint,
    entries: Mapping[str, tensors.Entry],
    files: Mapping[str, Sequence[str]],
    copied: Sequence[str],
    dtype: str | None,
) -> None:
    for name in copied:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base.folder / name, folder / name)
    if dtype is None:
        shutil.copyfile(base.folder / CONFIG, folder / CONFIG)
    else:
        text = json.dumps(_with_dtype(base.config, tensors.DTYPES[dtype].name), indent=2, ensure_ascii=False)
        with tensors.writing(folder / CONFIG):
            (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    if list(files) != [SINGLE]:
        total = sum(entry.size for entry in entries.values())
        place = {name: file for file, names in files.items() for name in names}
        index = {
            "metadata": {**base.metadata, "total_size": total},
            "weight_map": dict(sorted(place.items())),
        }
        with tensors.writing(folder / INDEX):
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config that says another dtype, by the field that it has."""
    found = {
        name: dtype
        if name in ("dtype", "torch_dtype")
        else _with_dtype(value, dtype)
        if isinstance(value, dict) and {"dtype", "torch_dtype"} & set(value)
        else value
        for name, value in config.items()
    }
    return found if {"dtype", "torch_dtype"} & set(found) else {**found, "torch_dtype": dtype}
