"""The notebooks run from top to bottom, and their kept outputs are what a run gives.

    python -m experiments.notebooks.execute

keeps them anew.
"""

import copy
import os
import re

import nbformat
import pytest
from newest import newest

from experiments.notebooks import execute

PATHS = sorted(execute.HERE.glob("*.ipynb"))


@pytest.fixture(scope="module")
def kept():
    return nbformat.read(execute.HERE / "quickstart.ipynb", as_version=4)


@newest
@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_a_run_gives_the_kept_outputs(path):
    """That a cell raises, or that it warns, fails as well."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    made = execute.executed(path, JAX_DISABLE_MOST_OPTIMIZATIONS="1", XLA_FLAGS=" ".join(flags))
    assert execute.differences(nbformat.read(path, as_version=4), made) == []


def test_the_notebooks_are_there():
    assert [path.stem for path in PATHS] == ["analysis", "quickstart"]


@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_links_lead_somewhere(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []


def output(notebook, name):
    return next(cell for cell in notebook.cells if cell.id == name).outputs[0]


@pytest.mark.parametrize(
    ("cell", "old", "new"),
    [
        ("lora", "True", "False"),
        ("wrap", "4,229", "4,230"),
        ("wrap", "trained in full", "skipped"),
        ("own-loop", ": 9", ": 8"),
        ("check", "bfloat16 ", "float32 "),
        ("plain", ": 0.00", ": 0.0"),
    ],
)
def test_what_a_changed_output_is_called(kept, cell, old, new):
    made = copy.deepcopy(kept)
    assert old in output(made, cell).text
    output(made, cell).text = output(made, cell).text.replace(old, new)
    (found,) = execute.differences(kept, made)
    assert found.startswith(f"{cell}: kept stdout")


def test_what_else_is_a_difference(kept):
    made = copy.deepcopy(kept)
    next(cell for cell in made.cells if cell.id == "compare").outputs = []
    output(made, "lora").name = "stderr"
    found = execute.differences(kept, made)
    assert [line.split(":")[0] for line in found] == ["lora", "compare"]
    made = copy.deepcopy(kept)
    made.cells[-2].execution_count = None
    assert ["is not of a run" in line for line in execute.differences(made, kept)] == [True]


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("accuracy: 91.8%", "accuracy: 90.1%", True),
        ("accuracy: 91.8%", "accuracy: 88.7%", False),
        ("loss 0.002", "loss  0.003", True),
        ("loss 0.002", "loss 0.005", False),
        ("loss 1e-07", "loss 1.5e-07", True),
        ("loss 2e-03", "loss 9e-03", False),
        ("loss 0.00", "loss 0.02", True),
        ("loss 0.00", "loss 0.03", False),
        ("loss 0.5", "loss -0.5", False),
        ("loss 0.5", "loss 0.5%", False),
        ("26 kB", "27 kB", False),
        ("(64, 4)", "(64, 5)", False),
        ("0.0 of 3", "0.0 of 3", True),
    ],
)
def test_what_may_vary(old, new, same):
    assert execute._same_text(old, new) == same


def test_a_cell_that_fails_fails_the_run_and_keeps_the_file(tmp_path, monkeypatch):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(notebook, tmp_path / "broken.ipynb")
    before = (tmp_path / "broken.ipynb").read_bytes()
    monkeypatch.setattr(execute, "HERE", tmp_path)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        execute.main(["broken"])
    assert (tmp_path / "broken.ipynb").read_bytes() == before


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        execute.main(["quickstat"])
    assert "there is no notebook quickstat; write some of" in capsys.readouterr().err
