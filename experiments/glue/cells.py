"""Training runs as files: one for each, written when it is done, so that a command goes on where it was."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.data import DataError
from experiments.records import provenance, write


class Cell(NamedTuple):
    """One training run: where it is written, what identifies it, and what makes it."""

    path: Path
    identity: dict[str, Any]
    make: Callable[[], dict[str, Any]]


def loaded(path: Path) -> Any:
    """The JSON of a file that a command made.

    Raises:
        DataError: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}. Delete it to have it made anew.") from None


def read(path: Path) -> dict[str, Any]:
    """A cell that is there.

    Raises:
        DataError: it is damaged.
    """
    found = loaded(path)
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no record. Delete it to have it made anew.")
    return found


def run_cells(cells: list[Cell], command: str) -> list[dict[str, Any]]:
    """Make those that are missing, one after the other, and read them all.

    Raises:
        DataError: a cell is there that is damaged or was made with other settings, or there is no place to
            write to.
        SystemExit: interrupted.
    """
    missing, records = [], {}
    for cell in cells:
        if not cell.path.exists():
            missing.append(cell)
            continue
        records[cell.path] = read(cell.path)
        if differences := _differences(records[cell.path], cell.identity):
            raise DataError(
                f"{cell.path} was made otherwise: {'; '.join(differences)}. Give the settings it was made "
                "with, or another --out; or delete it to have it made anew."
            )
    for folder in {cell.path.parent for cell in missing}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise DataError(f"nothing can be written to {folder}: {error}. Give another --out.") from None
    try:
        for cell in tqdm(missing, desc="cells", unit=" cells", smoothing=0):
            record = provenance(command, ("tokenizers",)) | cell.identity | cell.make()
            write(cell.path, record)
            records[cell.path] = read(cell.path)
    except KeyboardInterrupt:
        print("stopped; what is finished is kept, and the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    return [records[cell.path] for cell in cells]


def _differences(known: Any, ours: Any, name: str = "") -> list[str]:
    """Where a record is not what identifies it now, an entry of each dict by itself."""
    if not isinstance(known, dict) or not isinstance(ours, dict):
        return [] if known == ours else [f"{name} was {known!r}, and is {ours!r} now"]
    names = [*ours, *(other for other in known if name and other not in ours)]
    pairs = [(known.get(other), ours.get(other), f"{name}.{other}" if name else other) for other in names]
    return [text for pair in pairs for text in _differences(*pair)]


def packed(predictions: np.ndarray) -> str | list[float]:
    """Classes as a string of digits; the numbers of a regression as they are."""
    if np.issubdtype(predictions.dtype, np.integer):
        return "".join(map(str, predictions))
    return predictions.tolist()


def unpacked(stored: str | list[float]) -> np.ndarray:
    return np.array([int(x) for x in stored] if isinstance(stored, str) else stored)
