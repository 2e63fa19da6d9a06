"""Adapters on disk: the trained factors and leaves, their spec and the base's fingerprint."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lora_jax import nnx, tensors
from lora_jax import params as params_lib
from lora_jax.params import Adapter
from lora_jax.tree import leaves_with_path
from lora_jax.weight import FullWeight, LoraWeight

FORMAT = 1
"""The version written into every file; a file of a newer version is refused."""

_MARK = "lora_jax"  # the key in a safetensors header, and the name of a directory's spec file
_SPEC_FILE = f"{_MARK}.json"
_ARRAYS = "arrays"


def save_adapter(path: str | os.PathLike[str], wrapped: Any, *, overwrite: bool = False) -> None:
    """Write an adapter: the factors and the leaves trained in full, never the base.

    Of a LoraWeight at path p the arrays `p:a`, `p:b` and `p:scale` are written, of a FullWeight
    `p:value`, each with its own shape and dtype, bit for bit. With them goes a JSON spec: the
    format's version, every leaf's kind, axes, rank, dropout and dtype, the shapes and the
    fingerprint of the base, and a checksum of all that was written.

    A path that ends in `.safetensors` names one file, with the spec in its header. Any other path
    names a directory: `arrays`, which is an orbax checkpoint of a flat dict, beside the spec in
    `lora_jax.json`. Relative paths and `~` are understood, and missing parent folders are made.

    The call returns when the bytes are durable; of several processes all must call it, and the first
    writes. The adapter is written under another name and
    renamed when it is whole, so no failure leaves half an adapter at `path`.

    Args:
        path: Where to write.
        wrapped: A wrapped tree of any kind, or an `Adapter`.
        overwrite: Whether an adapter that is already there may be replaced; it is kept until the
            new one is durable. Anything that is not an adapter is never replaced.

    Raises:
        FileExistsError: there is something at `path`, and `overwrite` is not set or it is no adapter.
        ValueError: `path` is a URL, or the format cannot hold one of the arrays.
        ModuleNotFoundError: a `.safetensors` file is asked for and safetensors is not installed.

    >>> import tempfile, lora_jax
    >>> params = {"mlp": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
    >>> wrapped = lora_jax.wrap(params, rank=2, targets="kernel")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_adapter(f"{folder}/run/adapter", wrapped)
    ...     loaded = load_adapter(f"{folder}/run/adapter", params)
    >>> loaded["mlp"]["kernel"].a.shape
    (8, 2)
    """
    target = local_path(path)
    if not isinstance(wrapped, Adapter):
        params_lib.require_wrapped(nnx.opened(wrapped)[0], "save_adapter")
    adapter = wrapped if isinstance(wrapped, Adapter) else params_lib.adapter(wrapped)
    if jax.process_count() > 1:
        adapter = dataclasses.replace(adapter, leaves=jax.tree.map(on_host, adapter.leaves))
    one_writer(target, lambda: _save(target, adapter, overwrite))


def one_writer(target: Path, write: Callable[[], None]) -> None:
    """Let the first of several processes write, and raise in all of them where it fails."""
    error = None
    if jax.process_index() == 0:
        try:
            write()
        except Exception as caught:
            if jax.process_count() == 1:
                raise
            error = caught
    if jax.process_count() == 1:
        return
    # The others must not wait for ever for one that failed.
    failed = multihost_utils.broadcast_one_to_all(np.asarray(error is not None))
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(f"process 0 could not write the adapter to {str(target)!r}; its error says why.")


def on_host(x: Any) -> Any:
    """An array of several processes as a whole on this one: an adapter is small."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return x
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _save(target: Path, adapter: Adapter, overwrite: bool) -> None:
    _check_vacant(target, overwrite)
    created = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, since only inside one file system is a rename atomic.
    staging = Path(tempfile.mkdtemp(prefix=f".{_MARK}-", dir=target.parent))
    new, old = staging / "new", staging / "old"
    try:
        if _is_file(target):
            _write_safetensors(new, adapter, target)
        else:
            _write_directory(new, adapter, target)
        _check_vacant(target, overwrite)
        put(new, target, old)
        for folder in created:
            sync(folder.parent)
    finally:
        # What was at the target is only there if it could not be put back.
        if target.exists() or not old.exists():
            shutil.rmtree(staging, ignore_errors=True)


def put(new: Path, target: Path, old: Path) -> None:
    """Rename a file or folder to where it belongs; a folder that was there is put aside until it is."""
    try:
        if target.is_dir():
            os.rename(target, old)  # no rename replaces a directory that holds something
            os.rename(new, target)
        else:
            os.replace(new, target)
    except BaseException:  # an interrupt between the two as well
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    sync(target.parent)


@contextmanager
def replacing(folder: Path, present: Iterable[Path], last: str) -> Iterator[Path]:
    """A folder to write files into; when the body is through they take the places of those that are present.

    A failure or an interrupt leaves in `folder` what was there. The file called `last` goes first and comes
    last: without it nothing opens the others, so no reader meets some of the old beside some of the new.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{_MARK}-", dir=folder))
    new, old = staging / "new", staging / "old"
    try:
        new.mkdir()
        old.mkdir()
        yield new
        made = sorted(new.iterdir(), key=lambda file: file.name == last)
        for file in made:
            sync(file)
        moves = [(file, old / file.name) for file in sorted(present, key=lambda file: file.name != last)]
        moves += [(file, folder / file.name) for file in made]
        try:
            for source, target in moves:
                os.rename(source, target)
            sync(folder)
        except BaseException:  # an interrupt after the renaming it fell into as well
            for source, target in reversed(moves):
                if target.exists() and not source.exists():
                    os.rename(target, source)
            raise
    except BaseException:
        # What was there is only here if it could not be put back.
        if not old.is_dir() or not any(old.iterdir()):
            shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(staging, ignore_errors=True)


def load_adapter(path: str | os.PathLike[str], params: Any, *, check: bool = True) -> Any:
    """Read an adapter and put it onto its base.

    Args:
        path: What `save_adapter` was given.
        params: The base: a tree of any kind with the paths, shapes and values that the adapter was
            trained on. On abstract leaves (`jax.ShapeDtypeStruct`) there are no values to compare.
        check: Whether the base's dtypes and values must be those the adapter was trained on; paths and
            shapes always must. Values are compared by a fingerprint of every leaf of two or more
            dimensions, so another bias or norm passes.

    Returns:
        A wrapped tree of the structure of `params`. The factors are bit for bit those that were
        saved, and lie where their weight does; the base's arrays are the very objects of `params`.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: what is there is truncated, damaged, of a newer format or no adapter; or the
            base's paths, shapes or values differ from those the adapter was trained on, with a
            list of the differences.
        ModuleNotFoundError: the path ends in `.safetensors` and safetensors is not installed.

    >>> load_adapter("no/such/adapter", {"kernel": jnp.ones((8, 4))})
    Traceback (most recent call last):
        ...
    FileNotFoundError: there is no adapter at '.../no/such/adapter'...
    """
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for _, leaf in leaves_with_path(params))
    return params_lib.attach(params, read_adapter(path), check=check and not abstract)


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter without its base, for `swap`, `unmerge` and `save_adapter`.

    Args:
        path: What `save_adapter` was given.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: what is there is truncated, damaged, of a newer format or no adapter.
        ModuleNotFoundError: the path ends in `.safetensors` and safetensors is not installed.

    >>> import tempfile, lora_jax
    >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((8, 4))}, rank=2, targets="kernel")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_adapter(f"{folder}/adapter", wrapped)
    ...     list(read_adapter(f"{folder}/adapter").leaves)
    ['kernel']
    """
    target = local_path(path)
    if not target.exists():
        raise FileNotFoundError(
            f"there is no adapter at {str(target)!r}; write the path that save_adapter was given."
        )
    if _is_file(target):
        spec, arrays = _read_safetensors(target)
    else:
        spec, arrays = _read_directory(target)
    with _damage(target, "its spec does not fit its arrays"):
        return _decode(spec, arrays, target)


def local_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a place in a mounted file system."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"the path is {path!r}; write a string or a pathlib.Path.")
    text = os.fspath(path)
    if "://" in text:
        raise ValueError(
            f"{text!r} is a URL; write a path of a mounted file system, and copy the adapter from there."
        )
    # orbax fails on a relative path in a background thread, and says nothing.
    return Path(text).expanduser().resolve()


def _is_file(target: Path) -> bool:
    return target.suffix == ".safetensors"


def _check_vacant(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not _is_file(target) and not any(target.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(
            f"there is something at {str(target)!r} already; write overwrite=True to replace an adapter, "
            "or another path."
        )
    try:
        _read_header(target) if _is_file(target) else _read_spec(target)
    except (ValueError, OSError) as error:
        raise FileExistsError(
            f"overwrite=True replaces an adapter and nothing else, and {str(target)!r} is not a whole one "
            f"({error}). Remove it, or write another path."
        ) from None


@contextmanager
def _damage(target: Path, what: str) -> Iterator[None]:
    """Say of any failure in the body, whatever library it comes from, that the adapter is damaged."""
    try:
        yield
    except (_AdapterError, PermissionError, ModuleNotFoundError):
        raise
    except Exception as error:
        cause = (str(error).strip().splitlines() or [""])[0][:200]
        raise _AdapterError(
            f"the adapter at {str(target)!r} is truncated or damaged: {what} "
            f"({type(error).__name__}: {cause}). Save it again, or restore it from a copy."
        ) from None


class _AdapterError(ValueError):
    """An error that already names the file and what is wrong with it."""


def _foreign(target: Path, what: str) -> _AdapterError:
    return _AdapterError(f"{str(target)!r} is no adapter that save_adapter wrote: {what}.")


# Spec: {"format": 1, "crc32": that of the JSON of the content, "content": {"leaves", "shapes",
# "fingerprint", "checksums": {name of an array or a file: [bytes, crc32]}}}


def _encode(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Any]]:
    leaves: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    for path, leaf in adapter.leaves.items():
        if isinstance(leaf, LoraWeight):
            parts = {"a": leaf.a, "b": leaf.b, "scale": leaf.scale}
            leaves[path] = {"kind": "lora", "axes": list(leaf.axes), "rank": leaf.rank}
            leaves[path] |= {"dropout": leaf.dropout, "blocks": leaf.blocks}
        else:
            parts = {"value": leaf.value}
            leaves[path] = {"kind": "full", "dtype": jnp.dtype(leaf.dtype).name}
        leaves[path]["arrays"] = {
            part: {"shape": list(x.shape), "dtype": x.dtype.name} for part, x in parts.items()
        }
        arrays |= {f"{path}:{part}": x for part, x in parts.items()}
    content = {
        "leaves": leaves,
        "shapes": {path: [list(shape), str(dtype)] for path, (shape, dtype) in adapter.shapes.items()},
        "fingerprint": dict(adapter.fingerprint),
    }
    return content, arrays


def _decode(content: Mapping[str, Any], arrays: Mapping[str, np.ndarray], target: Path) -> Adapter:
    shapes = {path: (tuple(shape), str(dtype)) for path, (shape, dtype) in content["shapes"].items()}
    leaves: dict[str, Any] = {}
    expected = {f"{path}:{part}" for path, entry in content["leaves"].items() for part in entry["arrays"]}
    if expected != set(arrays):
        raise ValueError(f"arrays differ from the spec: {sorted(expected ^ set(arrays))[:4]}")
    for path, entry in content["leaves"].items():
        parts = {}
        for part, kind in entry["arrays"].items():
            array = arrays[f"{path}:{part}"]
            if [list(array.shape), array.dtype.name] != [kind["shape"], kind["dtype"]]:
                raise ValueError(f"{path}:{part} is {array.dtype.name}{list(array.shape)}")
            parts[part] = _on_device(array, f"{path}:{part}", target)
        shape, dtype = shapes[path]
        if entry["kind"] == "lora":
            # An abstract base, so that the constructor checks the factors against the axes.
            base = jax.ShapeDtypeStruct(shape, dtype)
            axes, dropout, blocks = tuple(entry["axes"]), entry["dropout"], entry["blocks"]
            leaf = LoraWeight(base, parts["a"], parts["b"], parts["scale"], axes, path, dropout, blocks)
            leaves[path] = leaf.replace(w=None, scale=parts["scale"])
        elif entry["kind"] == "full" and parts["value"].shape == shape:
            leaves[path] = FullWeight(parts["value"], entry["dtype"], path)
        else:
            raise ValueError(f"the leaf {path} is neither a weight with factors nor one trained in full")
    fingerprint = {path: int(value) for path, value in content["fingerprint"].items()}
    return Adapter(leaves=leaves, shapes=shapes, fingerprint=fingerprint)


def _on_device(array: np.ndarray, name: str, target: Path) -> jax.Array:
    value = jnp.array(array)  # a copy, so that a train step may donate it
    if value.dtype != array.dtype:
        raise _AdapterError(
            f"the adapter at {str(target)!r} holds {name!r} as {array.dtype.name}, which jax would round to "
            f'{value.dtype.name}; write jax.config.update("jax_enable_x64", True) first.'
        )
    return value


def _checksum(data: Any) -> list[int]:
    return [len(data), zlib.crc32(data)]


def _seal(content: dict[str, Any], checksums: dict[str, list[int]]) -> str:
    content = content | {"checksums": checksums}
    crc = zlib.crc32(_canonical(content))
    return json.dumps({"format": FORMAT, "crc32": crc, "content": content}, indent=1)


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _unseal(text: str | bytes, target: Path) -> dict[str, Any]:
    with _damage(target, "its spec cannot be read"):
        spec = json.loads(text)
        version = int(spec["format"])
        if version > FORMAT:
            raise _AdapterError(
                f"the adapter at {str(target)!r} has format {version} and this version of lora_jax reads "
                f"formats up to {FORMAT}; install a newer one: pip install --upgrade lora-jax."
            )
        if zlib.crc32(_canonical(spec["content"])) != spec["crc32"]:
            raise ValueError("the spec's checksum is wrong")
        return spec["content"]


def _check_sums(found: Mapping[str, list[int]], content: Mapping[str, Any]) -> None:
    for name, sums in content["checksums"].items():
        if found.get(name) != sums:
            state = "is missing" if name not in found else "has other bytes than were written"
            raise ValueError(f"{name} {state}")


def _write_directory(new: Path, adapter: Adapter, target: Path) -> None:
    content, arrays = _encode(adapter)
    new.mkdir()
    # orbax holds no array without entries; the spec's shape is all there is to know of one.
    arrays = {name: x for name, x in arrays.items() if math.prod(x.shape)}
    if arrays:
        with _checkpointer() as checkpointer:
            checkpointer.save(new / _ARRAYS, args=ocp.args.PyTreeSave(arrays))
    files = {file.relative_to(new).as_posix(): file for file in _files(new)}
    checksums = {name: _checksum(file.read_bytes()) for name, file in files.items()}
    (new / _SPEC_FILE).write_text(_seal(content, checksums), encoding="utf-8")
    for entry in (*_files(new), *(folder for folder in new.rglob("*") if folder.is_dir()), new):
        sync(entry)


def _checkpointer() -> ocp.Checkpointer:
    """A writer and reader for this process alone, which waits for no other."""
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"{_MARK}-{this}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _files(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.rglob("*") if entry.is_file())


def _read_spec(target: Path) -> dict[str, Any]:
    if not target.is_dir():
        raise _foreign(target, "it is a file, and the name of an adapter in one file ends in .safetensors")
    file = target / _SPEC_FILE
    if not file.is_file():
        raise _foreign(target, f"the folder has no {_SPEC_FILE}")
    return _unseal(file.read_bytes(), target)


def _read_directory(target: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    content = _read_spec(target)
    with _damage(target, "its files are not those that were written"):
        # Before orbax reads them, whose errors come from several threads and name no file.
        found = {
            name: _checksum((target / name).read_bytes())
            for name in content["checksums"]
            if (target / name).is_file()
        }
        _check_sums(found, content)
    with _damage(target, "its arrays cannot be read"):
        stored, empty = [], {}
        for path, entry in content["leaves"].items():
            for part, kind in entry["arrays"].items():
                if math.prod(kind["shape"]):
                    stored.append(f"{path}:{part}")
                else:
                    empty[f"{path}:{part}"] = np.zeros(kind["shape"], jnp.dtype(kind["dtype"]))
        if not stored:
            return content, empty
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)  # the devices it was saved from may be gone
        with _checkpointer() as checkpointer:
            arrays = checkpointer.restore(
                target / _ARRAYS, args=ocp.args.PyTreeRestore(restore_args=dict.fromkeys(stored, as_numpy))
            )
        return content, arrays | empty


def _write_safetensors(new: Path, adapter: Adapter, target: Path) -> None:
    tensors.package(target)
    content, arrays = _encode(adapter)
    host = {name: np.asarray(x, order="C") for name, x in arrays.items()}
    for name, x in host.items():
        if x.dtype not in tensors.DTYPES.values():
            raise ValueError(
                f"the adapter cannot be written to {str(target)!r}: {name!r} is {x.dtype.name}, which the "
                "format has not. A path without .safetensors makes a directory, which holds every dtype."
            )
    checksums = {name: _checksum(x.tobytes()) for name, x in host.items()}
    kinds = {name: (tensors.name_of(x.dtype), x.shape) for name, x in host.items()}
    tensors.write(new, kinds, iter(host.values()), {_MARK: _seal(content, checksums)})


def _read_header(target: Path) -> tuple[tensors.File, dict[str, Any]]:
    if not target.is_file():
        raise _foreign(target, "it is a folder, whose name must not end in .safetensors")
    with _damage(target, "its header cannot be read"):
        file = tensors.opened(target)
    if _MARK not in file.metadata:
        raise _foreign(target, f"the header of the safetensors file has no entry {_MARK!r}")
    return file, _unseal(file.metadata[_MARK], target)


def _read_safetensors(target: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    file, content = _read_header(target)
    with _damage(target, "its arrays cannot be read"):
        arrays = {name: file.read(name) for name in file.entries}
        _check_sums({name: _checksum(x.tobytes()) for name, x in arrays.items()}, content)
        return content, arrays


def sync(entry: Path) -> None:
    """Make a file's bytes, or a folder's entries, durable."""
    if entry.is_dir() and os.name != "posix":
        return  # only there may a folder be opened, to make its entries durable
    handle = os.open(entry, os.O_RDONLY if entry.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
