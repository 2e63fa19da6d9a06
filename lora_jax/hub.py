"""Checkpoints in the Hugging Face layout: config.json, safetensors files and their index."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_jax import tensors
from lora_jax.files import local_path
from lora_jax.tree import some

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Weights:
    """The safetensors files of a model, of which the headers were read.

    Attributes:
        folder: Where they are.
        files: The files by name.
        owner: By tensor, the name of its file; in the order of the files and their bytes.
        metadata: What the index says beside the names.
    """

    folder: Path
    files: Mapping[str, tensors.File]
    owner: Mapping[str, str]
    metadata: Mapping[str, Any]

    def entry(self, name: str) -> tensors.Entry:
        """Where a tensor lies."""
        return self.files[self.owner[name]].entries[name]


def opened(folder: str | os.PathLike[str]) -> Weights:
    """Read the index, if there is one, and the headers of the safetensors files.

    Raises:
        FileNotFoundError: there is no safetensors file, or one that the index names is missing.
        ValueError: a file is damaged, or the index is not that of the files.
        ModuleNotFoundError: safetensors is not installed.

    >>> opened("no/such/model")
    Traceback (most recent call last):
        ...
    FileNotFoundError: there is neither model.safetensors nor model.safetensors.index.json in '...'...
    """
    place = local_path(folder)
    where = repr(str(place))
    single, index = (place / SINGLE).is_file(), (place / INDEX).is_file()
    if single and index:
        raise ValueError(f"there are both {SINGLE} and {INDEX} in {where}; remove the one that is not meant.")
    if single:
        names, metadata, claimed = [SINGLE], {}, None
    elif index:
        content = tensors.read_json(place / INDEX)
        claimed, metadata = content.get("weight_map"), content.get("metadata") or {}
        if not isinstance(claimed, dict) or not isinstance(metadata, dict) or not claimed:
            raise ValueError(f"{str(place / INDEX)!r} has no weight_map of tensors to files.")
        names = sorted({str(name) for name in claimed.values()})
        stray = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if stray:
            raise ValueError(f"{str(place / INDEX)!r} names {stray[0]!r}, which is no file beside it.")
        missing = [name for name in names if not (place / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{where} has no {', '.join(missing)}, which its index names.")
    else:
        raise FileNotFoundError(
            f"there is neither {SINGLE} nor {INDEX} in {where}. Other forms of weights are not read: load "
            "the model in transformers and save it with save_pretrained(folder)."
        )
    files = {name: tensors.opened(place / name) for name in names}
    owner: dict[str, str] = {}
    for name, file in files.items():
        for tensor in file.entries:
            if tensor in owner:
                raise ValueError(f"the tensor {tensor!r} is in both {owner[tensor]} and {name} of {where}.")
            owner[tensor] = name
    if claimed is not None and claimed != owner:
        wrong = sorted(x for x in {**claimed, **owner} if claimed.get(x) != owner.get(x))
        raise ValueError(
            f"{str(place / INDEX)!r} does not agree with the files about {some(wrong)}; fetch or save the "
            "model again."
        )
    return Weights(place, files, owner, metadata)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a model's config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON object.
    """
    place = local_path(folder)
    if not (place / CONFIG).is_file():
        raise FileNotFoundError(
            f"there is no {CONFIG} in {str(place)!r}; give the folder that transformers' save_pretrained "
            "wrote, or that the model was downloaded to."
        )
    return tensors.read_json(place / CONFIG)
