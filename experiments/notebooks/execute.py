"""Executes the notebooks from top to bottom and keeps what they print and draw.

    pip install -e ".[test]"
    python -m experiments.notebooks.execute               # all that are in this folder
    python -m experiments.notebooks.execute quickstart    # one of them

Each runs on the CPU, in a kernel of its own and in an empty folder, and is written only if no cell fails. On
the same machine a second run writes the same file, but perhaps for the bytes of images. What may vary
between versions and machines, `differences` leaves out of account, which tests/test_notebooks.py uses.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import nbformat
    from nbclient import NotebookClient
    from PIL import Image
except ImportError as error:
    raise SystemExit(f'{error}; write: pip install -e ".[test]"') from None

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
MEASURED = re.compile(r"(?<![\w.])-?\d+\.\d*(?:e[-+]?\d+)?%?|(?<![\w.])-?\d+e[-+]?\d+")
POINTS, FACTOR = 3.0, 2.0  # how far percentages may lie apart, and other measured numbers


def executed(path: Path, **environment: str) -> Any:
    """The notebook with what its cells give now; the first cell that fails raises.

    What is in `environment` is set for the kernel.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "JAX_PLATFORMS": "cpu",
            "IPYTHONDIR": folder,  # whoever runs it may have a profile
            "IPYKERNEL_CELL_NAME": path.name,  # in errors, in place of a temporary file's name
            **environment,
        }
        client = NotebookClient(
            notebook,
            timeout=600,
            startup_timeout=300,
            kernel_name="python3",
            coalesce_streams=True,
            record_timing=False,
            extra_arguments=["--log-level=ERROR"],  # the kernel's own words are no output
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=environment)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _smaller(output.data["image/png"])
    notebook.metadata = nbformat.from_dict(KERNEL)
    return notebook


def _smaller(png: str) -> str:
    """The image in 256 colors, a third of the bytes: they are committed with every change."""
    file = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    image.convert("RGB").quantize(256).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def differences(kept: Any, made: Any) -> list[str]:
    """What a notebook's kept outputs say otherwise than an execution, cell by cell.

    Text is compared word for word and whole numbers digit for digit. Percentages with a decimal point may lie
    3 points apart, and other numbers with one a factor of 2 or two units in the last digit, since training
    differs in its roundings between versions of XLA. Of an image only that there is one is compared.
    """
    found = []
    cells = [[cell for cell in notebook.cells if cell.cell_type == "code"] for notebook in (kept, made)]
    for number, (ours, theirs) in enumerate(zip(*cells, strict=True), 1):
        if ours.execution_count != number:
            found.append(f"{ours.id}: its kept output is not of a run from top to bottom")
        pair = [[_content(output) for output in cell.outputs] for cell in (ours, theirs)]
        if len(pair[0]) != len(pair[1]):
            found.append(f"{ours.id}: {len(pair[0])} outputs are kept, and {len(pair[1])} were made")
        for (kind, old), (other, new) in zip(*pair, strict=False):
            if kind != other or not _same_text(old, new):
                found.append(f"{ours.id}: kept {kind}\n{old}\nmade {other}\n{new}")
    return found


def _content(output: Any) -> tuple[str, str]:
    """What kind of output it is, and its text."""
    if output.output_type == "stream":
        return output.name, output.text
    data = output.get("data", {})
    image = next((kind for kind in data if kind.startswith("image/")), None)
    return (image, "") if image else (output.output_type, data.get("text/plain", ""))


def _same_text(old: str, new: str) -> bool:
    if _words(old) != _words(new):
        return False
    return all(map(_close, MEASURED.findall(old), MEASURED.findall(new)))


def _words(text: str) -> list[str]:
    """Without the measured numbers, and without the spaces, which move as numbers grow."""
    return MEASURED.sub("#", text).split()


def _close(old: str, new: str) -> bool:
    if old.endswith("%") != new.endswith("%"):
        return False
    a, b = (float(number.rstrip("%")) for number in (old, new))
    if abs(a - b) <= (POINTS if old.endswith("%") else 2 * min(_last_digit(old), _last_digit(new))):
        return True
    return not old.endswith("%") and a * b > 0 and 1 / FACTOR <= a / b <= FACTOR


def _last_digit(number: str) -> float:
    """What one more in it would be."""
    digits, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))


def main(arguments: Sequence[str] | None = None) -> None:
    names = sorted(path.stem for path in HERE.glob("*.ipynb"))
    parser = argparse.ArgumentParser(
        prog="python -m experiments.notebooks.execute",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="*", help=f"of {', '.join(names)}; by default all")
    chosen = parser.parse_args(arguments).name or names
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"there is no notebook {', '.join(unknown)}; write some of {', '.join(names)}")
    for name in chosen:
        begin, path = time.perf_counter(), HERE / f"{name}.ipynb"
        nbformat.write(executed(path), path)
        print(f"{path}: {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
