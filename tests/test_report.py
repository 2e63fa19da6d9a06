"""The page of results is what the results give, and its sentences follow from their numbers."""

import ast
import copy
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import pytest

from experiments import records, report

PAGE = (report.HERE / "REPORT.md").read_text()


def record_of(path):
    return json.loads((report.HERE / path).read_text())


def test_the_committed_page_is_what_the_results_give(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_links_and_figures_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert links
    assert [link for link in links if not (report.HERE / link).exists()] == []


def test_anchors_are_those_of_the_headings():
    headings = {
        re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in re.findall(r"^## (.*)$", PAGE, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) == headings


def test_every_result_of_an_experiment_is_on_the_page():
    """A record that no section takes up would be forgotten."""
    taken = {path for s in report.SECTIONS for pattern in s.records for path in report.HERE.glob(pattern)}
    made = {path for path in report.HERE.glob("*results/*.json")} | set(report.HERE.glob("*/results/*.json"))
    assert {path for path in made - taken if "sweep" not in path.name} == set()


def test_without_results_the_page_names_the_commands(tmp_path):
    text = report.page(tmp_path)
    assert "## " not in text
    for section in report.SECTIONS:
        assert f"- {section.title}: `{section.command}`\n" in text


@pytest.mark.parametrize("section", report.SECTIONS, ids=[section.title for section in report.SECTIONS])
def test_commands_and_folders_exist(section):
    (module,) = re.findall(r"python -m (\S+)", section.command)
    assert importlib.util.find_spec(module)
    assert (report.HERE / section.folder).is_dir()


def test_every_command_imports_the_records_cheaply():
    body = ast.parse((report.HERE / "records.py").read_text()).body
    names = [n.name for x in body if isinstance(x, ast.Import) for n in x.names]
    names += [x.module for x in body if isinstance(x, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "jax"}


def test_pages_that_runs_fill_are_no_changes_of_the_code(tmp_path):
    folder = tmp_path / "experiments"
    folder.mkdir()

    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout

    git("init", "-q", "..")
    for name in ("README.md", "run.py", "../code.py", "../README.md"):
        (folder / name).write_text("")
    git("add", "-A", "..")
    git("commit", "-qm", "all")
    (folder / "README.md").write_text("a table")
    (tmp_path / "README.md").write_text("a table")
    assert git("status", "--porcelain", *records.CODE) == ""
    for name in ("run.py", "../code.py"):
        (folder / name).write_text("changed")
        assert git("status", "--porcelain", *records.CODE).startswith(" M ")
        git("checkout", "-q", "--", name)


def test_texts_are_put_into_their_places(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- x -->\nold\n<!-- end of x -->\nb\n<!-- y -->\n<!-- end of y -->")
    records.fill(readme, {"y": "new\n", "x": records.markdown(["", "n", "note"], [["a", "1", ""]], notes=1)})
    whole = (
        "a\n<!-- x -->\n|  | n | note |\n| --- | ---: | --- |\n| a | 1 |  |\n<!-- end of x -->\n"
        "b\n<!-- y -->\nnew\n<!-- end of y -->"
    )
    assert readme.read_text() == whole
    for wrong in ("<!-- z -->\n", "<!-- end of z -->\n<!-- z -->\n", "<!-- end of z -->"):
        readme.write_text(whole + wrong)
        with pytest.raises(
            ValueError, match="README.md has no place for z; write <!-- z --> and below it <!--"
        ):
            records.fill(readme, {"x": "", "z": ""})
        assert readme.read_text() == whole + wrong


def test_check_shows_what_differs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "HERE", tmp_path)
    (tmp_path / "merging" / "results").mkdir(parents=True)
    source = report.__file__.replace("report.py", "merging/results/merge.json")
    target = tmp_path / "merging" / "results" / "merge.json"
    shutil.copy(source, target)
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    record = json.loads(target.read_text())
    record["speed_of_the_copy"] = 0.25
    target.write_text(json.dumps(record))
    capsys.readouterr()
    assert report.main(["--check"]) == 1
    assert "+The merge runs at 0.25 of the copy's speed." in capsys.readouterr().out


def test_provenance_and_the_line_it_gives():
    made = records.provenance("python -m experiments.x --seed 7", ("optax",)) | {
        "settings": {"seeds": [3, 4]}
    }
    assert made["versions"]["optax"]
    line = report.origin(made)
    assert line.startswith("`python -m experiments.x --seed 7`; commit `")
    assert line.endswith("; seeds 3, 4, 7")


@pytest.mark.parametrize(
    ("record", "seeds"),
    [
        ({"seed": 0, "seeds": 3}, {0, 1, 2}),
        ({"rows": [{"seed": 5}, {"seed": 6}]}, {5, 6}),
        ({"metrics": {"seeds": [0.5, 0.6]}}, set()),
        ({"learning_rate": 1}, set()),
    ],
)
def test_seeds(record, seeds):
    assert report.seeds_of({"command": "python"} | record) == seeds


@pytest.mark.parametrize(
    ("holds", "words"),
    [
        ([True, True], "agrees"),
        ([False], "does not agree"),
        ([True, False, True], "agrees in 2 of 3 points"),
        ([], "the paper has no figure for it"),
    ],
)
def test_verdicts(holds, words):
    found = report.Found("", [report.Point("x", x) for x in holds])
    assert report.verdict(found) == words
    assert report.beside(found).count("**no**") == holds.count(False)


def test_several_records_of_one_experiment():
    one = report.Found("a table\n", [report.Point("x", True)], "said")
    found = report.joined([one, one._replace(points=[report.Point("y", False)])])
    assert (found.tables, report.verdict(found)) == ("a table\n\na table\n", "agrees in 1 of 2 points")
    assert found.remark == "- said\n- said"
    assert report.joined([one]) == one


# The sentences of each section, on small records: they turn when the numbers do.


def silent(monkeypatch, module, *names):
    """Tables are tested where they are made."""
    for name in names:
        monkeypatch.setattr(module, name, lambda *_: "")


def holds(found):
    return [point.holds for point in found.points]


def test_latency(monkeypatch):
    from experiments.latency import run

    silent(monkeypatch, run, "table")

    def cell(batch, adapter):
        times = {"base": 1.0, "merged": 1.0, "adapter_l": adapter, "adapter": adapter + 0.01}
        ways = {way: {"program": way, "seconds": [x] * 4} for way, x in times.items()}
        ways["merged"]["program"] = "base"
        return {"setting": {"batch": batch, "length": 128}, "ways": ways}

    columns = ["batch 1, len 128", "batch 9, len 128"]
    paper = {"columns": columns, "FT or merged LoRA": [20, 100], "AdapterL": [24, 102], "AdapterH": [26, 103]}
    record = {"cells": [cell(9, 1.05), cell(1, 1.25)], "paper": paper}
    found = report.latency(record)
    assert holds(found) == [True, True, True, True]
    assert "+5.0% (+5.0% to +5.0%) at 9 x 128" in found.points[1].text
    assert found.points[1].text.endswith("the paper's +2.0%, +20.0%")
    record["cells"] = [cell(9, 1.25), cell(1, 0.995)]
    record["cells"][0]["ways"]["merged"]["program"] = "another"
    assert holds(report.latency(record)) == [False, False, True, False]


def test_glue(monkeypatch):
    from experiments.glue import table

    silent(monkeypatch, table, "report")

    def way(mean, low, high):
        return {
            "diverged": 0,
            "scores": {"accuracy": {"mean": mean}},
            "minus_full": {"value": (low + high) / 2, "low": low, "high": high},
        }

    ways = {
        "full": {"diverged": 0, "scores": {"accuracy": {"mean": 0.8}}},
        "bitfit": way(0.7, -0.2, 0.0),
        "lora_qv": way(0.81, -0.01, 0.03),
        "lora_all": way(0.7, -0.2, -0.1),
    }
    paper = {
        "roberta-base FT 125M": {"RTE": 78.7},
        "roberta-base BitFit 0.1M": {"RTE": 78.0},
        "roberta-base LoRA 0.3M": {"RTE": 86.6},
    }
    record = {"tasks": {"RTE": {"metric": "accuracy", "ways": ways}}, "paper": paper}
    found = report.glue(record)
    assert holds(found) == [True, False, True]
    assert "RTE +7.9" in found.points[0].text
    assert "below on RTE" in found.points[1].text
    changed = copy.deepcopy(record)
    changed["tasks"]["RTE"]["ways"]["lora_qv"] = way(0.6, -0.3, -0.1)
    assert holds(report.glue(changed)) == [False, False, False]
    changed["tasks"]["RTE"]["ways"]["lora_qv"] = {"diverged": 1}
    assert holds(report.glue(changed)) == [False, False]


def test_e2e(monkeypatch):
    from experiments.e2e_nlg import compare

    silent(monkeypatch, compare, "tables")

    def record(low, high):
        metric = {"BLEU": {"minus_full": {"value": (low + high) / 2, "interval": [low, high]}}}
        paper = {"full": {"BLEU": 68.2}, "lora_qv": {"BLEU": 70.4}}
        ways = {"full": {"metrics": {}}, "lora_qv": {"metrics": metric}, "lora_all": {"metrics": metric}}
        settings = {"model": "path/to/small", "rank": 4}
        return {"settings": settings, "steps": 7, "ways": ways, "paper": paper}

    assert holds(report.e2e(record(-0.01, 0.02))) == [True]
    assert holds(report.e2e(record(-0.03, -0.01))) == [False]
    (point,) = report.e2e(record(0.01, 0.03)).points
    assert point.text.startswith(
        "small: LoRA, queries and values less full fine-tuning: BLEU +2.00, the paper's +2.20"
    )
    assert "other side of zero in none" in point.text
    assert holds(report.e2e(record(0, 1) | {"paper": None})) == []


def test_which(monkeypatch):
    from experiments.which import tables

    monkeypatch.setattr(tables, "texts", lambda record: {})

    def compared(first, second, low, high):
        return {"pair": [first, second], "difference": [(low + high) / 2, low, high]}

    def points(*claims, better=0):
        rows = [{"targets": "q,v", "difference": None}, {"targets": "all", "difference": [0, better, 1]}]
        made = {"metric": "Matthews", "matrices": rows, "claims": claims}
        record = {"settings": {"task": "CoLA"}, "tables": made, "paper": paper}
        return report.which(record).points

    four = {"4": {"WikiSQL": 73.7, "MNLI": 91.3}}
    paper = {
        "matrices": {
            "q": {"8": {"WikiSQL": 70.4, "MNLI": 91.0}},
            "q,v": four,
            "q,k,v,o": {"2": {"WikiSQL": 73.7, "MNLI": 91.7}},
        },
        "ranks": {"q,v": four | {"1": {"WikiSQL": 73.4, "MNLI": 91.3}}},
    }
    assert [points()[0].holds, points(better=0.1)[0].holds] == [True, False]
    assert points(better=0.1)[0].text.endswith("Better on CoLA (Matthews): all")
    for first, second, low, high, holds in (
        (("q,v", 4), ("q", 8), 0.1, 0.2, True),
        (("q,v", 4), ("q", 8), -0.1, 0.2, False),
        (("q,v", 4), ("q,v", 1), -0.1, 0.2, True),
        (("q,v", 4), ("q,v", 1), 0.1, 0.2, False),
        (("q,k,v,o", 2), ("q,v", 4), -0.1, 0.2, True),
        (("q,k,v,o", 2), ("q,v", 4), -0.2, -0.1, False),
    ):
        assert points(compared(first, second, low, high))[1].holds == holds
    text = points(compared(("q,v", 4), ("q", 8), 0.1, 0.2))[1].text
    assert text.startswith(
        "q,v at rank 4 is better than q at rank 8: the difference is +15.0 (+10.0 to +20.0) on CoLA"
    )
    assert text.endswith("the paper's +3.3 on WikiSQL and +0.3 on MNLI")
    assert len(points(compared(("v", 8), ("q", 8), 0, 1))) == 1  # the paper has no such row


def test_every_comparison_of_the_record_is_judged():
    record = json.loads((report.HERE / "which" / "results" / "SST-2.json").read_text())
    assert len(report.which(record).points) == 1 + len(record["tables"]["claims"]) == 10


def test_rank_on_e2e():
    rows = [
        {"rank": rank, "trained": rank, "losses": [x, x + 0.01]}
        for rank, x in ((1, 0.9), (4, 0.7), (64, 0.8))
    ]
    record = {"ranks": rows, "paper": {"1": 68.72, "4": 70.38, "64": 69.24}}
    found = report.which_e2e(record)
    assert holds(found) == [True]
    assert (
        "BLEU is best at rank 4 of 1, 4, 64; here the validation loss is at rank 4, 0.7050"
        in found.points[0].text
    )
    assert "| 4 | 4 | 0.7050 | 0.7000 0.7100 | 70.38 |" in found.tables
    rows[2]["losses"] = [0.6, 0.6]
    assert holds(report.which_e2e(record)) == [False]


def test_low_data(monkeypatch):
    from experiments.low_data import run

    silent(monkeypatch, run, "report")

    def row(examples, low, high):
        return {"examples": examples, "minus_full": {"value": (low + high) / 2, "low": low, "high": high}}

    lora, prefix = [row(100, 0, 0.2), row(1000, -0.1, 0.1)], [row(100, -0.3, -0.1), row(1000, 0, 0.1)]
    paper = {"columns": [100, 1000], "FT": [60.2, 85.8], "LoRA": [63.8, 85.6], "PreLayer": [48.3, 82.5]}
    record = {"tasks": {"SST-2": {"ways": {"lora_qv": lora, "prefix": prefix}}}, "paper": paper}
    found = report.low_data(record)
    assert holds(found) == [True, True]
    assert found.points[0].text.endswith(
        "+10.0 of 100, +0.0 of 1,000; the paper's +3.6 of 100, -0.2 of 1,000"
    )
    assert found.points[1].text.endswith("the paper's -11.9 of 100")
    lora[1], prefix[0] = row(1000, -0.3, -0.1), row(100, -0.1, 0.1)
    assert holds(report.low_data(record)) == [False, False]


def test_merging_cost(monkeypatch):
    from experiments.merging_cost import run

    silent(monkeypatch, run, "costs_table", "ways_table")
    cell = {"leaf_lost": {"median": 0.25}, "weights_alone": {"rms": 0.125}, "unmerged": {"rms": 0.0625}}
    record = {"model": "tiny", "training": {"size": 0.5}, "dtypes": {"bfloat16": [{}, cell]}}
    (line,) = report.merging_cost(record).remark.splitlines()
    assert line.startswith(
        "- tiny, as trained (rms ΔW/W = 0.5): merging loses 25.0% of ΔW in bfloat16, which moves"
    )
    assert "by 12.5% (the unmerged model's own rounding: 6.2%)" in line


def test_counts_and_claims():
    counts = record_of("counts/results/counts.json")
    assert report.counts(counts).verdict == "8 of 13 published figures agree"
    counts["rows"][2]["counted"]["trainable"] *= 2
    found = report.counts(counts)
    assert found.verdict == "7 of 13 published figures agree"
    assert "roberta-base, q,v, rank 8: 0.3M" in found.remark
    assert "15 of 16 counts" in found.remark

    row = {
        "claim": "a size",
        "section": "Table 9",
        "published": "2.0M",
        "computed": 1e6,
        "agrees": False,
        "note": "",
    }
    found = report.claimed({"rows": [row, row | {"published": "1.0M", "agrees": True}]})
    assert found.verdict == "1 of 2 published figures agree"
    assert "further away: a size (Table 9), 2.00 of it." in found.remark


def test_plan():
    record = record_of("plan/results/gpt3-175b-v5p-2x2x4.json")
    before = holds(report.plans(record))
    assert before == [True, True, False, False, False]
    record["paper"][3]["here"] = "35.2 MB"
    record["paper"][5]["here"] = "1,180 GB to 353 GB (3.34 times)"
    assert holds(report.plans(record)) == [True, True, True, True, False]


def test_one_gradient():
    record, claims = record_of("benchmarks/results/step.json"), record_of("counts/results/claims.json")
    found = report.step(record, claims)
    assert holds(found) == [True]
    assert "commit" not in found.tables  # the page says it once, below
    record["methods"]["lora_jax"]["seconds"]["median"] *= 2
    assert holds(report.step(record, claims)) == [False]
