"""safetensors files, one tensor at a time: read in place, and written without holding the rest."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

INSTALL = 'pip install "lora-jax[safetensors]"'
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
    "C64": np.dtype(np.complex64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": jnp.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": jnp.dtype(jnp.float8_e5m2),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def package(path: str | os.PathLike[str]) -> Any:
    """The package safetensors, or an error that says how to install it."""
    try:
        import safetensors
    except ImportError:
        raise ModuleNotFoundError(
            f"{os.fspath(path)!r} is a safetensors file, which needs the package safetensors: {INSTALL}."
        ) from None
    return safetensors


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a file.

    Attributes:
        dtype: Its dtype as the format names it, "BF16".
        shape: Its shape.
        start: The offset of its first byte in the file.
        size: Its number of bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class File:
    """A safetensors file whose header was read, and none of its tensors.

    Attributes:
        path: Where it is.
        entries: By name, in the order of the bytes, where each tensor lies.
        metadata: The header's texts.
    """

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    def read(self, name: str) -> np.ndarray:
        """One tensor, as an array of its own.

        Raises:
            ValueError: numpy has no such dtype, or the file is shorter than it was.
        """
        entry = self.entries[name]
        data = bytearray(entry.size)
        with self.path.open("rb") as file:
            file.seek(entry.start)
            if file.readinto(data) != entry.size:
                raise ValueError(f"{str(self.path)!r} ends inside of the tensor {name!r}; it is truncated.")
        return np.frombuffer(data, dtype_of(self, name)).reshape(entry.shape)

    def view(self, name: str) -> np.ndarray:
        """One tensor, mapped from the file and not to be written to: only what is used of it is read.

        Raises:
            ValueError: numpy has no such dtype.
        """
        entry, dtype = self.entries[name], dtype_of(self, name)
        if not entry.size:
            return np.zeros(entry.shape, dtype)
        data = np.memmap(self.path, np.uint8, "r", entry.start, (entry.size,))
        return np.asarray(data).view(dtype).reshape(entry.shape)


def dtype_of(file: File, name: str) -> np.dtype[Any]:
    """The numpy dtype of one tensor of a file."""
    dtype = file.entries[name].dtype
    if dtype not in DTYPES:
        raise ValueError(
            f"the tensor {name!r} in {str(file.path)!r} has dtype {dtype}, which has no array here; "
            f"{', '.join(DTYPES)} have."
        )
    return DTYPES[dtype]


def opened(path: str | os.PathLike[str]) -> File:
    """Read and check a file's header: no overlap, no hole, no byte too few or too many.

    Raises:
        ValueError: the file is truncated or damaged, or no safetensors file.
        ModuleNotFoundError: safetensors is not installed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/x.safetensors", {"w": ("F32", (2, 2))}, iter([np.eye(2, dtype=np.float32)]))
    ...     opened(f"{folder}/x.safetensors").read("w").tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    path = Path(path)
    safetensors = package(path)
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass  # the library's own check of the header against the file
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length), object_pairs_hook=_once)
        metadata = header.pop("__metadata__", None) or {}
        entries = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            entries[name] = Entry(entry["dtype"], tuple(entry["shape"]), 8 + length + start, stop - start)
    except FileNotFoundError:
        raise
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError, struct.error) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"{str(path)!r} is truncated or damaged, or no safetensors file: {cause}. Fetch or save it again."
        ) from None
    return File(path, entries, metadata)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key stands twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The fields of a JSON file, none of which may stand there twice.

    Raises:
        ValueError: it is no JSON, or no object.
    """
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}. Fetch or save it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__} and no fields.")
    return content


def header(entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """What stands in front of a file's tensors, which follow without a gap in the order of `entries`.

    >>> len(header({"w": Entry("F32", (2, 2), 0, 16)})) % 8
    0
    """
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, entry in entries.items():
        offsets = [offset, offset + entry.size]
        content[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        offset += entry.size
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
    return struct.pack("<Q", len(text)) + text


_REMEDIES = {
    errno.EFBIG: "; raise the limit (ulimit -f), or write smaller files (of a merge, --shard-size)",
    errno.ENOSPC: "; free some space, or write to another disk",
    errno.EDQUOT: "; free some space, or write to another disk",
}


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Have an error name the file and a remedy, which one of writing or syncing does not.

    >>> with writing("model.safetensors"):
    ...     raise OSError(errno.EFBIG, "File too large")
    Traceback (most recent call last):
        ...
    OSError: [Errno 27] File too large; raise the limit (ulimit -f), or write ...: 'model.safetensors'
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        text = f"{error.strerror}{_REMEDIES.get(error.errno, '')}"
        raise OSError(error.errno, text, os.fspath(path)) from None


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    arrays: Iterator[np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file, taking one array after the other; the bytes are durable when it returns.

    Args:
        path: Where to; what is there is replaced.
        tensors: By name, the dtype as the format names it and the shape.
        arrays: The tensors themselves, in that order.
        metadata: Texts for the header.

    Raises:
        ValueError: an array has another dtype or shape than was said.
        OSError: the disk is full, or the file too large for it.
    """
    entries = {
        name: Entry(dtype, shape, 0, DTYPES[dtype].itemsize * math.prod(shape))
        for name, (dtype, shape) in tensors.items()
    }
    with writing(path), Path(path).open("wb") as file:
        file.write(header(entries, metadata))
        for (name, (dtype, shape)), array in zip(tensors.items(), arrays, strict=True):
            if array.dtype != DTYPES[dtype] or array.shape != shape:
                raise ValueError(f"{name!r} is {array.dtype}{list(array.shape)}, not {dtype}{list(shape)}.")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def name_of(dtype: Any) -> str:
    """What the format calls a dtype.

    >>> name_of(np.float32), name_of(jnp.bfloat16)
    ('F32', 'BF16')
    """
    return _NAMES[np.dtype(dtype)]
