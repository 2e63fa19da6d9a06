"""The experiments' files: configs, and data from LORA_JAX_DATA, from the cache, or from their public home."""

from __future__ import annotations

import hashlib
import json
import os
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tqdm import tqdm


class DataError(RuntimeError):
    """A file or model is missing, cannot be fetched, or is not what it should be."""


def read_config(path: Path, like: Path) -> dict[str, Any]:
    """The settings in a JSON file that has the names of another one, the committed config.

    Raises:
        DataError: the file cannot be read, or names are missing or unknown.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Give a file like {like}.") from None
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}. Give a file like {like}.") from None
    known = json.loads(like.read_text())
    if not isinstance(found, dict) or found.keys() != known.keys():
        names = [*found] if isinstance(found, dict) else []
        missing, unknown = [x for x in known if x not in names], [x for x in names if x not in known]
        raise DataError(f"{path}: missing are {missing}, unknown are {unknown}. Give a file like {like}.")
    return found


def data_folder() -> Path | None:
    """The folder that the environment variable LORA_JAX_DATA names, if it is set."""
    value = os.environ.get("LORA_JAX_DATA")
    return Path(value).expanduser() if value else None


def cache_folder() -> Path:
    """Where downloads are kept."""
    return Path.home() / ".cache" / "lora_jax"


def _folders() -> list[Path]:
    return [folder for folder in (data_folder(), cache_folder()) if folder is not None]


def fetch(name: str, url: str, sha256: str) -> Path:
    """A file by its name inside the data folder; downloaded into the cache if it is nowhere yet.

    Wherever it is found, its content must have the given sha256.
    """
    for folder in _folders():
        if (path := folder / name).is_file():
            if (found := _digest(path)) != sha256:
                raise DataError(
                    f"{path} is not the expected file: its sha256 is {found}, not {sha256}. Move it away to "
                    "have the right one downloaded."
                )
            return path
    return _download(name, url, sha256)


def _download(name: str, url: str, sha256: str) -> Path:
    target = cache_folder() / name
    target.parent.mkdir(parents=True, exist_ok=True)
    # Under a name of its own until it is whole and checked, so a broken download is never found later.
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=30) as response, part.open("wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=name) as bar:
                while chunk := response.read(1 << 16):
                    file.write(chunk)
                    bar.update(len(chunk))
        if (found := _digest(part)) != sha256:
            raise DataError(
                f"{url} did not give the expected file: its sha256 is {found}, not {sha256}. Run again, or "
                f"set LORA_JAX_DATA to a folder that holds {name}."
            )
        os.replace(part, target)
    except (OSError, HTTPException) as error:
        raise DataError(
            f"{name} is in none of {[str(folder) for folder in _folders()]}, and downloading it from {url} "
            f"failed: {error}. Either run again with a network, or set LORA_JAX_DATA to a folder that holds "
            f"{name}."
        ) from None
    finally:
        part.unlink(missing_ok=True)
    return target


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def paper() -> dict[str, Any]:
    """The paper's numbers, by table."""
    folder = data_folder()
    if folder is None or not (path := folder / "paper" / "lora_paper.json").is_file():
        raise DataError("set LORA_JAX_DATA to a folder that holds paper/lora_paper.json")
    return json.loads(path.read_text())


def find_model(name: str) -> Path:
    """A model's folder: a path, a folder in LORA_JAX_DATA or the cache, or a name on the hub."""
    for folder in (Path(name).expanduser(), *(folder / name for folder in _folders())):
        if (folder / "config.json").is_file():
            return folder
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _from_hub(name)
    raise DataError(
        f"there is no model {name!r}: looked for {name}/config.json here and in "
        f"{[str(folder) for folder in _folders()]}. Either set LORA_JAX_DATA to a folder that holds {name}/, "
        "or pass the path of a folder with config.json, tokenizer.json and safetensors, or a name on the "
        "Hugging Face hub with its owner, such as HuggingFaceTB/SmolLM2-135M."
    )


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise DataError(
            f"{name!r} is no folder here; as a name on the Hugging Face hub it needs "
            "`pip install huggingface_hub`"
        ) from None
    try:
        files = ["config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json"]
        return Path(snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name!r} is no folder here and could not be fetched from the Hugging Face hub: {error}"
        ) from None
