"""What the paper says of sizes and memory, computed again: the record, the formulas, when figures agree."""

import functools
import json
import os
from pathlib import Path

import jax
import pytest

from experiments.counts import claims

RECORD = json.loads(claims.RESULT.read_text())
DATA = os.environ.get("LORA_JAX_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="set LORA_JAX_DATA to a folder with the data")


@pytest.fixture(autouse=True)
def usual_promotion():
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm mixes dtypes
        yield


@functools.cache
def computed():
    return claims.claims()


def test_the_numbers_are_the_recorded_ones():
    assert [(c.claim, c.section) for c in computed()] == [(r["claim"], r["section"]) for r in RECORD["rows"]]
    assert [c.computed for c in computed()] == [r["computed"] for r in RECORD["rows"]]


def test_every_claim_has_a_name_of_its_own():
    names = [(row["claim"], row["section"]) for row in RECORD["rows"]]
    assert len(set(names)) == len(names)


def test_the_readme_has_the_records_table():
    assert claims.table(RECORD["rows"]) in (claims.run.HERE / "README.md").read_text()


@needs_data
def test_the_published_figures_are_those_of_the_file():
    assert DATA is not None
    data = json.loads((Path(DATA) / "paper" / "lora_paper.json").read_text())
    assert [claims.row(claim, data) for claim in computed()] == RECORD["rows"]


@needs_data
def test_a_number_that_changed_fails_the_command_and_changes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claims, "claims", computed)
    out = tmp_path / "claims.json"
    rows = [row | {"computed": row["computed"] + (i == 3)} for i, row in enumerate(RECORD["rows"])]
    out.write_text(json.dumps({"rows": rows}))
    before = out.read_bytes()
    assert claims.main(["--out", str(out)]) == 1
    assert RECORD["rows"][3]["claim"] in capsys.readouterr().err and out.read_bytes() == before
    out.unlink()
    assert claims.main(["--out", str(out)]) == 0
    assert json.loads(out.read_text())["rows"] == RECORD["rows"]


def test_a_figure_that_the_file_has_no_row_for_is_refused():
    claim = claims.Claim("BitFit", "Table 4", claims.Key("table4_gpt3", "BitFit 14.2M"), 1)
    data = {"table4_gpt3": {"BitFit 13.0M": []}}
    with pytest.raises(KeyError, match="no row 'BitFit 14.2M' in 'table4_gpt3'"):
        claims.row(claim, data)


@pytest.mark.parametrize(
    ("figure", "number", "fits"),
    [
        ("14.2M", 14_249_999, True),
        ("14.2M", 14_250_001, False),
        ("354.92M", 354_823_168, False),
        ("18M", 18_874_368, False),
        ("175,255.8M", 175_255_849_000, True),
        ("10,000 times", 5_001, True),  # zeros at the end are no digits
        ("10,000 times", 4_999, False),
        ("350GB", 349.2e9, True),
        ("354GB", 353.0e9, False),
        ("2/3", 0.67, True),
        ("2/3", 0.75, False),
        ("0.01%", 0.000108, True),
    ],
)
def test_two_figures_agree_if_one_rounds_to_the_other(figure, number, fits):
    assert claims.agrees(figure, number) == fits


def test_what_was_cut_off_is_said_to_be():
    cut = claims.row(claims.Claim("a", "b", "18M", 18_874_368, "why"), {})
    assert not cut["agrees"] and cut["note"] == "cut off, not rounded; why"
    more = claims.row(claims.Claim("a", "b", "18M", 19_100_000), {})
    assert not more["agrees"] and more["note"] == ""


def test_the_shapes_are_counted_by_the_papers_formulas():
    d, r, layers, norms, tokens = 24, 5, 6, 3, 7
    assert claims.adapters(d, r, layers, norms) == layers * (2 * d * r + r + d) + 2 * norms * d
    assert claims.prefix(d, tokens) == d * tokens
    assert claims.prefix(d, tokens, layers) == layers * d * tokens
    assert claims.lora("gpt3-175b", "q,v", 3) == 2 * (2 * 96) * 12288 * 3
