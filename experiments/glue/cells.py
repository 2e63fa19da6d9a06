"""Training runs as files: one for each, written when it is done, so that a command goes on where it was."""

from __future__ import annotations

import json
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


def run_cells(cells: list[Cell], command: str) -> None:
    """Make those that are missing, one after the other.

    Raises:
        DataError: a cell is there that was made with other settings.
    """
    missing = []
    for cell in cells:
        if not cell.path.exists():
            missing.append(cell)
            continue
        known = json.loads(cell.path.read_text())
        other = {name: known.get(name) for name, x in cell.identity.items() if known.get(name) != x}
        if other:
            ours = {name: cell.identity[name] for name in other}
            raise DataError(
                f"{cell.path} was made with {other}, not with {ours}. Give the settings it was made with, or "
                "another --out; or delete it to have it made anew."
            )
    for cell in tqdm(missing, desc="cells", unit=" cells", smoothing=0):
        record = provenance(command, ("tokenizers",)) | cell.identity | cell.make()
        write(cell.path, record)


def packed(predictions: np.ndarray) -> str | list[float]:
    """Classes as a string of digits; the numbers of a regression as they are."""
    if np.issubdtype(predictions.dtype, np.integer):
        return "".join(map(str, predictions))
    return predictions.tolist()


def unpacked(stored: str | list[float]) -> np.ndarray:
    return np.array([int(x) for x in stored] if isinstance(stored, str) else stored)
