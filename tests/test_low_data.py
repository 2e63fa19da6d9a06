"""Few examples: the cells, what is drawn and what is taken from GLUE's grid, on a tiny model."""

import json
import os

import numpy as np
import pytest
from test_glue import corpus, model, standard_numbers, tokenizer  # noqa: F401  (fixtures)

from experiments.glue import data
from experiments.glue import run as glue
from experiments.low_data import run
from experiments.models import bert


@pytest.fixture
def command(corpus, model):  # noqa: F811
    settings = json.loads((glue.HERE / "config.json").read_text())["settings"]
    settings |= {"model": str(model), "length": 12, "batch": 8, "rank": 2, "bottleneck": 2, "prefix": 2}
    plan = {"settings": settings, "epochs": {"CoLA": 4}, "head_epochs": 5, "bootstrap_draws": 50}
    config = {
        "tasks": ["CoLA"],
        "ways": ["full", "head"],
        "epochs": {"6": 3},
        "head_epochs": {"6": 2},
        "seeds": [0, 1],
    }
    plan = record(glue.HERE / "config.json") | plan
    (corpus / "glue.json").write_text(json.dumps(plan))
    (corpus / "config.json").write_text(json.dumps(config))
    (corpus / "grid").mkdir()
    rates = {"ways": {way: {"learning_rate": 1e-2} for way in config["ways"]}}
    (corpus / "grid" / "sweep.json").write_text(json.dumps(rates))
    paper = json.loads((corpus / "paper" / "lora_paper.json").read_text())
    paper["table16_low_data_mnli"] = {"columns": [100], "LoRA": [63.8]}
    (corpus / "paper" / "lora_paper.json").write_text(json.dumps(paper))
    flags = {"config": "config.json", "glue-config": "glue.json", "glue": "grid", "out": "out"}
    return lambda: run.main([x for name, path in flags.items() for x in (f"--{name}", str(corpus / path))])


def record(path):
    return json.loads(path.read_text())


def test_few_and_all_examples(command, corpus, capsys, monkeypatch):  # noqa: F811
    drawn = []
    train_and_score = glue.train_and_score

    def watched(settings, recipe, task):
        if recipe.way == "full":
            drawn.append((recipe.seed, len(task.train), recipe.epochs, task.train.labels.tolist()))
        return train_and_score(settings, recipe, task)

    monkeypatch.setattr(glue, "train_and_score", watched)
    monkeypatch.setattr(glue, "step_bytes", lambda *_: None)  # which compiles once more
    command()
    assert {path.name for path in (corpus / "out" / "cells").iterdir()} == {
        f"CoLA_{way}_6_{seed}.json" for way in ("full", "head") for seed in (0, 1)
    }
    assert {path.name for path in (corpus / "grid" / "cells").iterdir()} == {
        f"CoLA_{way}_{seed}.json" for way in ("full", "head") for seed in (0, 1)
    }
    assert [x[:3] for x in drawn] == [(0, 6, 3), (0, 24, 4), (1, 6, 3), (1, 24, 4)]
    assert drawn[0][3] != drawn[2][3]  # a seed has its own six
    few = record(corpus / "out" / "cells" / "CoLA_head_6_1.json")
    assert few["examples"] == 6 and few["rows"]["train"] == 6 and few["steps"] == 2
    ways = record(corpus / "out" / "low_data.json")["tasks"]["CoLA"]["ways"]
    assert [row["examples"] for row in ways["full"]] == [6, 24]
    scores = [
        record(corpus / "out" / "cells" / f"CoLA_head_6_{i}.json")["scores"]["Matthews"] for i in (0, 1)
    ]
    assert ways["head"][0]["scores"]["Matthews"]["mean"] == pytest.approx(np.mean(scores))
    assert ways["head"][0]["minus_full"]["seeds"] == [0, 1]
    text = capsys.readouterr().out
    assert "| CoLA, Matthews | 6 examples | 24 examples |" in text and "| LoRA | 63.8 |" in text
    assert (corpus / "out" / "low_data.png").stat().st_size > 1000

    monkeypatch.setattr(glue, "train_and_score", lambda *_: pytest.fail("a finished cell was made again"))
    command()


def recorded():
    return record(run.HERE / "config.json"), record(run.RESULTS / "low_data.json")


def test_the_record_is_whole():
    config, found = recorded()
    assert not found["uncommitted_changes"] and [*found["tasks"]] == config["tasks"]
    for task in found["tasks"].values():
        assert [*task["ways"]] == config["ways"]
        for rows in task["ways"].values():
            assert len(rows) == len(config["epochs"]) + 1
            assert all(row["seeds"] == config["seeds"] and row["diverged"] == 0 for row in rows)


def test_a_cell_made_again_is_the_recorded_one():
    config, found = recorded()
    if "LORA_JAX_DATA" not in os.environ:
        pytest.skip("set LORA_JAX_DATA to a folder with the data")
    try:
        folder = bert.minilm_folder()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    name, settings = config["tasks"][0], glue.Settings(**found["settings"])
    cell = record(run.RESULTS / "cells" / f"{name}_head_100_0.json")
    recipe = glue.Recipe(*(cell[field] for field in glue.Recipe._fields))
    task = data.load_task(name, data.tokenizer(folder), settings.length)
    task = task._replace(train=data.first(task.train, 100, seed=0))
    task = glue.read_by(settings.model, settings.pooling, settings.batch, task)
    again, metric = glue.train_and_score(settings, recipe, task), found["tasks"][name]["metric"]
    stated = found["tasks"][name]["ways"]["head"][0]["interval"]
    assert stated["low"] <= again["scores"][metric] <= stated["high"]
    # The same seed on another machine: rounding may turn a row, not more.
    assert again["scores"][metric] == pytest.approx(cell["scores"][metric], abs=0.01)
