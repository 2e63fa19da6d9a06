"""The Hugging Face layout, read and written by the rules of lora_jax.names.

A folder in that layout holds config.json and model.safetensors, or several such files and
model.safetensors.index.json. `load` fills a tree of shapes from it, `save` writes a tree:

    template = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    params = load("path/to/model", template, lora_jax.names.gpt2(), shardings=shardings)
    save("path/to/another", params, lora_jax.names.gpt2(), config("path/to/model"))
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import hub, names, tensors
from lora_jax.files import local_path, replacing
from lora_jax.tree import leaves_with_path
from lora_jax.weight import is_wrapped_leaf

# What config.json calls a function.
ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), jax.nn.gelu),
    **{"relu": jax.nn.relu, "silu": jax.nn.silu, "swish": jax.nn.silu, "tanh": jnp.tanh},
}


def config(folder: str | Path) -> dict[str, Any]:
    """The content of a folder's config.json."""
    return hub.read_config(folder)


def complete(
    raw: Mapping[str, Any], defaults: Mapping[str, Any], nullable: Sequence[str] = ()
) -> dict[str, Any]:
    """The fields of a config.json, with the defaults for those that it does not have.

    Raises:
        ValueError: a field is null that has another default and is not `nullable`.
    """
    for field, default in defaults.items():
        if default is not None and field not in nullable and raw.get(field, default) is None:
            raise ValueError(f"config.json: {field} is null; write its value, such as {default!r}.")
    return {**defaults, **raw}


def require(raw: Mapping[str, Any], served: Mapping[str, Sequence[Any]]) -> None:
    """Refuse a config.json in which a field has a value that is not served, by its name."""
    for field, values in served.items():
        if raw.get(field, values[0]) not in values:
            raise ValueError(
                f"config.json: {field} is {raw[field]!r}; served is {' and '.join(map(repr, values))}."
            )


class Tensor(NamedTuple):
    """A tensor in a file."""

    file: tensors.File
    name: str

    @property
    def dtype(self) -> np.dtype:
        return tensors.dtype_of(self.file, self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.entries[self.name].shape

    def view(self) -> np.ndarray:
        """The values, mapped from the file: only what is used of them is read."""
        return self.file.view(self.name)


def stored(folder: str | Path) -> dict[str, Tensor]:
    """What a folder's safetensors files hold, by name; only their headers are read.

    Raises:
        FileNotFoundError: there are no such files, or one that the index names is missing.
        ValueError: a file is damaged, or does not hold what the index says.
    """
    found = hub.opened(folder)
    return {name: Tensor(found.files[file], name) for name, file in found.owner.items()}


def prefix(found: Iterable[str], candidates: Sequence[str], probe: str) -> str:
    """The first candidate that stands before the name `probe`; the first of all where none does."""
    found = set(found)
    return next((prefix for prefix in candidates if prefix + probe in found), candidates[0])


def require_tied(found: Mapping[str, Tensor], table: str, head: str = "lm_head.weight") -> None:
    """Refuse a head that is stored beside the embedding it is tied to, and is not equal to it bit for bit.

    Of such files transformers 5 takes the head and older versions the embedding.
    """
    if head not in found or table not in found:
        return
    one, two = found[head], found[table]
    if (one.dtype, one.shape) != (two.dtype, two.shape) or any(
        a.tobytes() != b.tobytes() for a, b in zip(one.view(), two.view(), strict=True)
    ):
        raise ValueError(
            f"{one.file.path}: {head!r} differs from {table!r}, to which the configuration ties it. Write "
            f'"tie_word_embeddings": false in config.json to use the head, or remove {head!r} from the files '
            "to use the embedding."
        )


def floating(dtype: Any) -> np.dtype:
    """A dtype that parameters can have.

    Raises:
        ValueError: it is none, or no floating one of 16 bits or more.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    # jax promotes no 8-bit floats, so that no model would run.
    if found is None or not jnp.issubdtype(found, jnp.floating) or found.itemsize < 2:
        raise ValueError(
            f"dtype is {dtype!r}; write a floating one of 16 bits or more, 'float32' or 'bfloat16'."
        )
    return found


def one_dtype(folder: str | Path) -> np.dtype:
    """The one floating dtype of a folder's tensors.

    Raises:
        ValueError: there are several, or none.
    """
    kinds = {t.dtype for t in stored(folder).values() if jnp.issubdtype(t.dtype, jnp.floating)}
    if not kinds:
        raise ValueError(f"{folder}: no tensor has a floating dtype; give the model that it was made from.")
    if len(kinds) != 1:
        raise ValueError(
            f"{folder}: several dtypes {sorted(map(str, kinds))}; choose one: load(folder, dtype=...)"
        )
    return kinds.pop()


def load(
    folder: str | Path,
    template: Any,
    rules: Iterable[names.Rule],
    *,
    shardings: Any = None,
    dtype: Any = None,
    ignore: Sequence[str] = (),
) -> Any:
    """Fill a tree of shapes from a folder, one leaf at a time, straight to where it shall lie.

    Args:
        folder: Holds model.safetensors, or shards and their index.
        template: The parameters' shapes, such as `jax.eval_shape(model.init, ...)["params"]`. Of their
            dtypes it only counts whether they are floating.
        rules: What the leaves are called in the files.
        shardings: One sharding for all leaves, or a tree of them like the template. Each device reads
            the part of a tensor that it holds. By default everything goes to the default device.
        dtype: The floating dtype of the leaves; by default each keeps the one it is stored in.
        ignore: Regular expressions for whole names in the files of what the model has no use for.

    Returns:
        The tree of arrays.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: tensors and template do not fit each other, with the names of all that do not; the
            dtype is no floating one, or a value is finite in the files and infinite in it.
    """
    dtype = None if dtype is None else floating(dtype)
    found = stored(folder)
    leaves = dict(leaves_with_path(template))
    named = names.named(template, rules)
    problems = [f"{path} has no rule" for path in leaves if path not in named]
    for piece in itertools.chain(*named.values()):
        if piece.name not in found:
            problems.append(f"{piece.path} is missing: no tensor {piece.name!r}")
        elif found[piece.name].shape != piece.shape:
            problems.append(
                f"{piece.path}: {piece.name!r} has shape {found[piece.name].shape}, "
                f"config.json says {piece.shape}"
            )
        elif jnp.issubdtype(leaves[piece.path].dtype, jnp.floating) and not jnp.issubdtype(
            found[piece.name].dtype, jnp.floating
        ):
            problems.append(f"{piece.path}: {piece.name!r} is {found[piece.name].dtype}, no floating numbers")
    wanted = {piece.name for piece in itertools.chain(*named.values())}
    passed = re.compile("|".join(f"(?:{pattern})" for pattern in ignore) or r"(?!)")
    extra = [name for name in found if name not in wanted and not passed.fullmatch(name)]
    problems += [f"{name!r} is not part of the model" for name in extra]
    kinds = {}
    for path, parts in named.items():
        dtypes = {found[piece.name].dtype for piece in parts if piece.name in found}
        if dtype is None and len(dtypes) > 1:
            problems.append(f"{path} is stored in several dtypes {sorted(map(str, dtypes))}; give a dtype")
        kinds[path] = np.dtype(next(iter(dtypes), np.float32) if dtype is None else dtype)
        if jax.dtypes.canonicalize_dtype(kinds[path]) != kinds[path]:
            problems.append(f"{path} is {kinds[path]}, which jax rounds without jax_enable_x64; give a dtype")
    if problems:
        hint = (
            f" Leave out what the model has no use for: ignore=({re.escape(extra[0])!r},)." if extra else ""
        )
        raise ValueError(f"{folder}: the tensors do not fit the model: {_some(problems, '; ')}.{hint}")
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        places = [shardings] * len(leaves)
    else:
        places = jax.tree.structure(template).flatten_up_to(shardings)
    filled = []
    for (path, leaf), place in zip(leaves.items(), places, strict=True):
        source = _Source(named[path], found, kinds[path])
        if place is None:
            filled.append(jax.device_put(source[(slice(None),) * len(leaf.shape)]))
        else:
            filled.append(jax.make_array_from_callback(tuple(leaf.shape), place, source.__getitem__))
        filled[-1].block_until_ready()  # or what is on its way to a device gathers in host memory
    return jax.tree.unflatten(jax.tree.structure(template), filled)


class _Source:
    """A leaf in the files: indexed by slices, it gives those entries as a new array."""

    def __init__(self, parts: Sequence[names.Piece], found: Mapping[str, Tensor], dtype: np.dtype):
        self.parts, self.found, self.dtype = parts, found, dtype
        self.groups = parts[0].leaf
        self.shape = tuple(math.prod(size for _, size in group) for group in self.groups)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        if any(len(group) > 1 for group in self.groups):
            # A leaf's axis made of several of torch's: a slice of it is no slice of theirs.
            whole = np.empty(self.shape, self.dtype)
            for piece in self.parts:
                old = self.found[piece.name].view()
                with np.errstate(over="ignore"):
                    piece.put(whole, old)
                self._check(piece, old, piece.of(whole))
            return whole[index]
        index = tuple(slice(*place.indices(size)) for place, size in zip(index, self.shape, strict=True))
        result = np.empty([place.stop - place.start for place in index], self.dtype)
        axes = [group[0][0] for group in self.groups]
        span = dict(zip(axes, index, strict=True))
        for piece in self.parts:
            if any(not span[axis].start <= i < span[axis].stop for axis, i in piece.index.items()):
                continue
            order = list(itertools.chain(*piece.torch))
            kept = [axis for axis in axes if axis not in piece.index]
            part = self.found[piece.name].view().reshape([piece.size[axis] for axis in order])
            part = part.transpose([order.index(axis) for axis in kept])[tuple(span[axis] for axis in kept)]
            if piece.factor != 1.0:
                part = part.astype(np.float64) * piece.factor
            here = [slice(None)] * len(axes)
            for axis, i in piece.index.items():
                here[axes.index(axis)] = i - span[axis].start
            with np.errstate(over="ignore"):
                result[tuple(here)] = part
            self._check(piece, part, result[tuple(here)])
        return result

    def _check(self, piece: names.Piece, old: np.ndarray, new: np.ndarray) -> None:
        """Raise for what is finite in the file and not in the leaf."""
        if (
            not jnp.issubdtype(old.dtype, jnp.floating)
            or jnp.finfo(new.dtype).max >= jnp.finfo(old.dtype).max
        ):
            return
        with np.errstate(invalid="ignore"):  # which some versions say of any NaN in bfloat16
            bad = int(np.count_nonzero(~np.isfinite(new) & np.isfinite(old)))
        if bad:
            raise ValueError(
                f"{piece.name!r} would have infinite or undefined values in {self.dtype} at {bad} entries, "
                "which are finite in the files; give a wider dtype."
            )


def save(
    folder: str | Path,
    params: Any,
    rules: Iterable[names.Rule],
    config: Mapping[str, Any],
    *,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write parameters as config.json and safetensors, which transformers opens, one tensor at a time.

    Args:
        folder: Made if it is not there; `~` is understood. Other files in it, such as a tokenizer, stay.
        params: Plain parameters; merge an adapter first.
        rules: What the leaves are called.
        config: The content of config.json. A dtype in it becomes that of the parameters.
        shard_bytes: What one file holds at most, unless one tensor alone is larger.
        overwrite: Whether a model that is there may be replaced, once the new one is written. The old
            config.json goes first and the new one comes last, so nothing opens a mixture of the two.

    Raises:
        FileExistsError: the folder holds a model, and `overwrite` is not set; or a folder by such a name.
        ValueError: leaves have no rule, or a dtype that the format cannot hold.
    """
    folder = local_path(folder)
    patterns = (hub.SINGLE, "model-?????-of-?????.safetensors", hub.INDEX)
    present = [file for pattern in ("config.json", *patterns) for file in folder.glob(pattern)]
    if present and not overwrite:
        raise FileExistsError(
            f"there is a model in {folder} already ({present[0].name}); write overwrite=True to replace it, "
            "or another folder."
        )
    for file in present:
        if not file.is_file():
            raise FileExistsError(f"{file} is no file; move it, or write another folder.")
    leaves = dict(leaves_with_path(params, is_wrapped_leaf))
    named = names.named(params, rules)
    problems = [f"{path} has no rule" for path in leaves if path not in named]
    problems += [f"{path} is wrapped: merge first" for path, leaf in leaves.items() if is_wrapped_leaf(leaf)]
    problems += [
        f"{path} is {leaves[path].dtype}"
        for path in named
        if leaves[path].dtype not in tensors.DTYPES.values()
    ]
    problems += [
        f"{path} lies in part on other processes: gather it first"
        for path, leaf in leaves.items()
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    ]
    if problems:
        raise ValueError(f"the parameters cannot be saved in {folder}: {_some(problems, '; ')}.")
    kinds = {str(leaf.dtype) for leaf in leaves.values()}
    kind = kinds.pop() if len(kinds) == 1 else None
    config = {**config, **{key: kind for key in ("dtype", "torch_dtype") if key in config}}

    shards: list[list[names.Piece]] = [[]]
    total = filled = 0
    for piece in itertools.chain(*named.values()):
        size = math.prod(piece.shape) * leaves[piece.path].dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(piece)
        filled, total = filled + size, total + size
    count = len(shards)
    files = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    files = [hub.SINGLE] if count == 1 else files
    with replacing(folder, present, last="config.json") as new:
        for file, shard in zip(files, shards, strict=True):
            _write(new / file, shard, leaves)
        if count > 1:
            index = {piece.name: file for file, shard in zip(files, shards, strict=True) for piece in shard}
            content = {"metadata": {"total_size": total}, "weight_map": index}
            (new / hub.INDEX).write_text(json.dumps(content, indent=2), encoding="utf-8")
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write(file: Path, shard: list[names.Piece], leaves: Mapping[str, Any]) -> None:
    # Wider numbers first, so that each lies at a multiple of its size.
    shard = sorted(shard, key=lambda piece: -leaves[piece.path].dtype.itemsize)
    kinds = {piece.name: (tensors.name_of(leaves[piece.path].dtype), piece.shape) for piece in shard}
    by_leaf = itertools.groupby(shard, key=lambda piece: piece.path)
    arrays = (
        piece.of(host) for path, parts in by_leaf for host in [_on_host(leaves[path])] for piece in parts
    )
    tensors.write(file, kinds, arrays, {"format": "pt"})


def _on_host(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        cpu = None
    # Part by part and through arrays that are soon gone: what numpy is given of an array, it keeps.
    host = np.empty(leaf.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            host[shard.index] = np.asarray(jax.device_put(shard.data, cpu))
    return host


def _some(items: Sequence[str], between: str = ", ", count: int = 8) -> str:
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return between.join(items[:count]) + more
