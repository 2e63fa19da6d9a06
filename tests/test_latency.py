"""Table 1: ratios within rounds, the paper's percentages, what merged LoRA runs, and a column made again."""

import json

import jax
import numpy as np
import pytest

from experiments.benchmarks.step import compiler_figures
from experiments.latency import run
from experiments.models import bert

RECORD = run.HERE / "results" / "all-MiniLM-L6-v2.json"
SETTINGS = json.loads((run.HERE / "config.json").read_text())
TINY = bert.BertConfig(20, 16, 2, 32, 1, 2, 64, pooler=False)
PAPER = {
    "columns": ["batch 32, len 512", "batch 16, len 256", "batch 1, len 128"],
    "FT or merged LoRA": [1449.4, 338.0, 19.8],
    "AdapterL": [1482.0, 354.8, 23.9],
    "AdapterH": [1492.2, 366.3, 25.8],
}


@pytest.fixture(autouse=True)
def as_the_command_runs():
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
        yield


def counts(d, layers, pairs):
    """Trained numbers of a BERT by the paper's formulas; `pairs` is in + out, summed over a layer's."""
    down = {way: round(share * d) for way, share in SETTINGS["bottleneck"].items()}
    return {
        "base": 0,
        "merged": layers * 8 * 4 * d,
        "lora_qv": layers * 8 * 4 * d,
        "lora_all": layers * 8 * pairs,
        "adapter_l": layers * (2 * d * down["adapter_l"] + down["adapter_l"] + d + 2 * d),
        "adapter": 2 * layers * (2 * d * down["adapter"] + down["adapter"] + d),
    }


def test_ratios_are_taken_within_a_round():
    drift = np.linspace(1, 3, 41)
    noise = np.random.default_rng(0).normal(1, 0.01, (2, 41))
    seconds = {"base": drift * noise[0], "lora": 1.2 * drift * noise[1]}
    cell = {"ways": {way: {"seconds": list(x)} for way, x in seconds.items()}}
    middle, low, high = run.over_base(cell, "lora")
    assert abs(middle - 1.2) < 0.01 and low < 1.2 < high and high - low < 0.03
    assert run.over_base(cell, "base") == (1, 1, 1)


def test_the_papers_percentages():
    record = {"paper": PAPER}
    shown = {
        way: [run.percent(x) for s in SETTINGS["settings"] if (x := run.published(record, way, s))]
        for way in run.NAMES
    }
    assert shown == {
        "base": [],
        "merged": ["+0.0%"] * 3,
        "lora_qv": [],
        "lora_all": [],
        "adapter_l": ["+2.2%", "+5.0%", "+20.7%"],
        "adapter": ["+3.0%", "+8.4%", "+30.3%"],
    }
    assert run.published(record, "adapter", {"batch": 2, "length": 128}) is None


@pytest.fixture(scope="module")
def column():
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
        return run.measure(TINY, SETTINGS | {"seconds": 1e-4}, {"batch": 2, "length": 8, "rounds": 2})


def test_merged_runs_the_bases_program_and_no_other_way_does(column):
    ways = column["ways"]
    assert list(ways) == list(run.NAMES)
    same = {way for way, x in ways.items() if x["program"] == ways["base"]["program"]}
    assert same == {"base", "merged"}
    assert ways["merged"]["gflop"] == ways["base"]["gflop"]
    for way in ways.keys() - same:
        assert ways[way]["gflop"] > ways["base"]["gflop"]
    assert {way: x["trained"] for way, x in ways.items()} == counts(32, 1, 4 * 2 * 32 + 2 * (32 + 64))
    assert all(len(x["seconds"]) == 2 and min(x["seconds"]) > 0 for x in ways.values())


def test_a_table_has_a_line_for_every_way(column):
    setting = {"batch": 1, "length": 128}
    text = run.table({"paper": PAPER, "cells": [column | {"setting": setting}]})
    lines = text.splitlines()
    assert len(lines) == 2 + len(run.NAMES)
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert "| +30.3% | no |" in lines[-1]


@pytest.mark.parametrize(
    ("lost", "message"),
    [("adapter", r"as the base are \['adapter'\]"), ("merged", "merged and unmerged LoRA differ by 1")],
)
def test_a_way_that_does_nothing_is_found(lost, message):
    outputs = {way: np.full(4, 1.0 if way == "base" else 2.0) for way in run.NAMES}
    run.check_agreement(outputs, 1e-4)
    with pytest.raises(AssertionError, match=message):
        run.check_agreement(outputs | {lost: outputs["base"]}, 1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "--rounds is 0; give a whole number above 0"),
        (["--seconds", "0"], "--seconds is 0; give a number above 0"),
        (["--seconds", "nan"], "--seconds is nan; give a number above 0"),
        (["--settings", "1x600"], "--settings 1x600: all-MiniLM-L6-v2 has 512 positions; give no more"),
        (["--settings", "1x513", "--model", "roberta-base"], None),
        (["--settings", "1x513", "--model", "roberta-base", "--rounds", "-1"], "--rounds is -1"),
        (["--settings", "0x8"], "'0x8' is no BATCHxLENGTH; write two whole numbers, as in 1x128"),
        (["--settings", "1y8"], "'1y8' is no BATCHxLENGTH"),
    ],
)
def test_what_cannot_be_timed_is_refused(flags, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run.main([*flags, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and (message or "roberta-base has 512 positions") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_setting_of_the_config_has_its_rounds(tmp_path, monkeypatch, column):
    def make(cells, command):
        for cell in cells:
            cell.path.parent.mkdir(parents=True, exist_ok=True)
            cell.path.write_text(json.dumps(cell.identity | column))
        return [cell.identity | column for cell in cells]

    filled = []
    monkeypatch.setattr(run, "paper", lambda: {"table1_latency_ms": PAPER})
    monkeypatch.setattr(run, "run_cells", make)
    monkeypatch.setattr(run, "draw", lambda *_: None)
    monkeypatch.setattr(run, "fill", lambda *given: filled.append(given))
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    monkeypatch.setattr(run, "HERE", tmp_path)
    run.main(["--settings", "1x128", "2x64"])
    record = json.loads((tmp_path / "results" / "all-MiniLM-L6-v2.json").read_text())
    assert [x["rounds"] for x in record["settings"]["settings"]] == [60, 10] and not filled
    run.main([])
    assert len(filled) == 1


def test_the_record_holds_what_can_be_made_again():
    """Times are the machine's. Counts are exact, and FLOPs those of any compiler that fuses differently."""
    record = json.loads(RECORD.read_text())
    assert [cell["setting"] for cell in record["cells"]] == SETTINGS["settings"]
    d, layers = 384, 6
    for cell in record["cells"]:
        ways, rounds = cell["ways"], cell["setting"]["rounds"]
        assert {way: x["trained"] for way, x in ways.items()} == counts(d, layers, 8 * d + 2 * 5 * d)
        assert ways["merged"]["program"] == ways["base"]["program"]
        assert all(len(x["seconds"]) == rounds for x in ways.values())
    found = record["cells"][-1]
    functions = {}

    def trees():
        arms = run.make_arms(run.PRESETS["all-MiniLM-L6-v2"], record["settings"])
        functions.update({way: arm.fn for way, arm in arms.items()})
        return {way: arm.tree for way, arm in arms.items()}

    shapes = jax.eval_shape(trees)  # no weight is needed for a count
    tokens = jax.ShapeDtypeStruct((found["setting"]["batch"], found["setting"]["length"]), "int32")
    for way in ("base", "adapter"):
        compiled = jax.jit(functions[way]).lower(shapes[way], tokens).compile()
        assert abs(compiler_figures(compiled)["gflop"] / found["ways"][way]["gflop"] - 1) < 0.01


def test_the_readme_has_the_records_table():
    assert run.table(json.loads(RECORD.read_text())) in (run.HERE / "README.md").read_text()
