"""GLUE: its rows, batches, metrics and intervals, and the grid of cells on a tiny model."""

import hashlib
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy import stats
from sklearn import metrics as sklearn_metrics
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from experiments import data as files
from experiments.glue import cells, data, metrics, run
from experiments.models import bert

TINY = Path(__file__).parent / "fixtures" / "bert_tiny"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
GOOD, BAD = ("good", "great", "fine", "nice"), ("bad", "awful", "poor", "sad")


@pytest.fixture(autouse=True)
def standard_numbers():
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
        yield


def row(i, pair=False, label=None):
    word = (GOOD if i % 2 else BAD)[i // 2 % 4]
    text = " ".join(["it", "was", word, "and", "long"][: 2 + i % 4] + [word])
    label = str(i % 2) if label is None else label
    return {"text_a": text, "text_b": "so " + word if pair else None, "label": label}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a random BERT of one layer and 50 words, and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    stored = load_file(TINY / "model.safetensors")
    save_file({name: x for name, x in stored.items() if "layer.1." not in name}, folder / "model.safetensors")
    config = json.loads((TINY / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    words = [*SPECIAL, "it", "was", "and", "long", "so", *GOOD, *BAD]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    special = [(name, SPECIAL.index(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special
    )
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(model):
    return data.tokenizer(model)


def public(rows):
    return json.dumps({str(i): row for i, row in enumerate(rows)}, indent=4).encode()


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A data folder of tiny tasks, CoLA and STS-B, and one of the paper's tables."""
    (tmp_path / "glue").mkdir()
    (tmp_path / "paper").mkdir()
    sums = {}
    for name, label in (("CoLA", None), ("STS-B", "2.5")):
        sums[name] = {}
        for split, count in (("train", 24), ("dev", 10)):
            rows = [row(i, name == "STS-B", label and str(i % 2 * 2.5)) for i in range(count)]
            lines = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in rows)
            (tmp_path / "glue" / f"{name}.{split}.jsonl").write_text(lines)
            sums[name][split] = hashlib.sha256(public(rows)).hexdigest()
    paper = {"table2_glue": {"columns": ["CoLA"], "roberta-base LoRA": [63.4], "deberta": [72.0]}}
    (tmp_path / "paper" / "lora_paper.json").write_text(json.dumps(paper))
    monkeypatch.setattr(data, "SHA256", data.SHA256 | sums)
    monkeypatch.setenv("LORA_JAX_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run.load_task.cache_clear()
    return tmp_path


# --- The rows ------------------------------------------------------------------------------------------


def test_rows_are_read_from_the_folder_and_from_the_public_file(corpus, monkeypatch):
    rows = data.read("CoLA", "dev")
    assert rows == [row(i) for i in range(10)]
    (corpus / "glue" / "CoLA.dev.jsonl").unlink()
    (corpus / "CoLA").mkdir()
    (corpus / "CoLA" / "dev.json").write_bytes(public(rows))
    monkeypatch.setattr(data, "HOME", corpus.as_uri())
    assert data.read("CoLA", "dev") == rows
    assert (corpus / "home/.cache/lora_jax/glue/CoLA.dev.json").is_file()


def test_other_rows_are_refused(corpus):
    path = corpus / "glue" / "CoLA.dev.jsonl"
    path.write_text(path.read_text().replace('"0"', '"1"', 1))
    with pytest.raises(files.DataError, match=r"CoLA\.dev\.jsonl does not hold the rows of https://"):
        data.read("CoLA", "dev")
    path.write_text("no json\n")
    with pytest.raises(files.DataError, match=r"CoLA\.dev\.jsonl is not one JSON object to a line"):
        data.read("CoLA", "dev")


def test_a_missing_file_is_named_with_its_home(corpus, monkeypatch):
    monkeypatch.setattr(data, "HOME", (corpus / "nowhere").as_uri())
    with pytest.raises(
        files.DataError, match=r"glue/RTE\.train\.json is in none of .*nowhere/RTE/train\.json"
    ):
        data.read("RTE", "train")
    with pytest.raises(files.DataError, match="there is no task 'WNLI'; there are "):
        data.read("WNLI", "train")


def test_pairs_have_types_and_what_is_too_long_is_cut_and_counted(tokenizer):
    pair = {"text_a": "it was good", "text_b": "so bad", "label": "entailment"}
    long = {"text_a": "it " * 20, "text_b": "so bad", "label": "not_entailment"}
    rows = data.encode([pair, long], data.LABELS["RTE"], tokenizer, 12)
    ids = tokenizer.token_to_id
    cls, sep = ids("[CLS]"), ids("[SEP]")
    first = [cls, ids("it"), ids("was"), ids("good"), sep, ids("so"), ids("bad"), sep, 0, 0, 0, 0]
    assert rows.tokens[0].tolist() == first and rows.types[0].tolist() == [0] * 5 + [1] * 3 + [0] * 4
    # Seven of the twenty words are left beside the three marks and the two words of the shorter text.
    assert rows.tokens[1].tolist() == [cls, *[ids("it")] * 7, sep, ids("so"), ids("bad"), sep]
    assert rows.length.tolist() == [8, 12] and rows.labels.tolist() == [0, 1] and rows.cut == 1
    assert len(tokenizer.encode("it " * 20).ids) == 22


@pytest.mark.parametrize(("task", "label"), [("RTE", "maybe"), ("STS-B", "5.1")])
def test_a_label_that_is_none_is_named(tokenizer, task, label):
    with pytest.raises(files.DataError, match=f"the label '{label}' of 'it good'"):
        data.encode([{"text_a": "it good", "text_b": "so", "label": label}], data.LABELS[task], tokenizer, 8)


@pytest.mark.parametrize("batch", [1, 4, 5, 64])
def test_an_epoch_has_every_row_once_in_few_shapes(batch):
    length = np.random.default_rng(0).integers(2, 40, size=61).astype(np.int32)
    number = np.arange(61, dtype=np.int32)
    tokens = np.where(np.arange(40) < length[:, None], number[:, None] + 1, 0)
    rows = data.Rows(tokens, np.zeros_like(tokens), length, number, 0)
    orders = []
    for seed in (0, 0, 1):
        made = list(data.epoch(rows, batch, seed, widths=(8, 16, 32)))
        assert len(made) == -(-61 // batch)
        assert {x["tokens"].shape for x in made} <= {(batch, width) for width in (8, 16, 32, 40)}
        orders.append([int(i) for x in made for i in x["labels"][x["weight"] > 0]])
        assert sorted(orders[-1]) == number.tolist()
        for x in made:
            assert (x["valid"].sum(1) == length[x["labels"]]).all()
            assert (x["tokens"] == np.where(x["valid"], x["labels"][:, None] + 1, 0)).all()
    assert orders[0] == orders[1] != orders[2]
    out = np.full(61, -1)
    for index, x in data.in_order(rows, batch, widths=(8, 40)):
        out[index] = x["labels"][: len(index)]
    assert (out == number).all()


def test_what_is_held_out_is_apart_and_what_is_drawn_is_nested():
    rows = data.Rows(*[np.arange(20)[:, None]] * 2, *[np.arange(20)] * 2, 0)
    rest, held_out = data.split(rows, 5, seed=3)
    assert len(held_out) == 5
    assert sorted([*rest.labels, *held_out.labels]) == list(range(20))
    assert {*data.first(rows, 4, seed=1).labels} < {*data.first(rows, 9, seed=1).labels}
    with pytest.raises(ValueError, match="20 rows cannot be held out of 20"):
        data.split(rows, 20, seed=0)
    with pytest.raises(ValueError, match="there are 20 rows, not 21"):
        data.first(rows, 21, seed=0)


# --- The metrics ---------------------------------------------------------------------------------------


def test_metrics_are_those_of_scikit_learn_and_scipy():
    rng = np.random.default_rng(0)
    y, p = rng.integers(2, size=(2, 80))
    p = np.where(rng.random(80) < 0.5, y, p)
    assert metrics.accuracy(y, p) == sklearn_metrics.accuracy_score(y, p)
    assert metrics.f1(y, p) == pytest.approx(sklearn_metrics.f1_score(y, p), abs=1e-12)
    assert metrics.matthews(y, p) == pytest.approx(sklearn_metrics.matthews_corrcoef(y, p), abs=1e-12)
    x = rng.integers(6, size=80).astype(float)  # with ties
    z = x + rng.normal(size=80).round(1)
    assert metrics.pearson(x, z) == pytest.approx(stats.pearsonr(x, z).statistic, abs=1e-12)
    assert metrics.spearman(x, z) == pytest.approx(stats.spearmanr(x, z).statistic, abs=1e-12)


def test_metrics_by_hand():
    y, p = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]  # TP 2, FN 1, FP 1, TN 1
    assert metrics.accuracy(y, p) == 3 / 5
    assert metrics.f1(y, p) == pytest.approx(2 / 3)
    assert metrics.matthews(y, p) == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))
    assert metrics.scores("MRPC", y, p) == {"accuracy": 3 / 5, "F1": pytest.approx(2 / 3)}


@pytest.mark.parametrize("name", ["F1", "Matthews", "Pearson", "Spearman"])
def test_what_is_undefined_is_zero_and_leading_axes_are_kept(name):
    metric = metrics.METRICS[name]
    assert metric(np.zeros(5, int), np.zeros(5, int)) == 0
    y, p = np.random.default_rng(0).integers(2, size=(2, 3, 20))
    np.testing.assert_allclose(metric(y, p), [metric(*pair) for pair in zip(y, p, strict=True)], atol=1e-12)


def test_the_bootstrap_of_one_seed_is_the_binomial():
    labels, predictions = np.ones(400, int), (np.arange(400) < 300).astype(int)
    found = metrics.bootstrap(metrics.accuracy, labels, predictions[None], draws=4000)
    assert found.value == 0.75
    low, high = stats.binom.ppf([0.025, 0.975], 400, 0.75) / 400
    assert abs(found.low - low) < 0.004 and abs(found.high - high) < 0.004


def test_the_bootstrap_is_paired_over_rows_and_seeds():
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=200)
    first = np.stack([np.where(rng.random(200) < 0.8, labels, 1 - labels) for _ in range(3)])
    same = metrics.bootstrap(metrics.matthews, labels, first, first, draws=200)
    assert same == (0, 0, 0)
    # Right on ten rows more in every seed: whatever the other rows and the seeds are, it is ahead.
    second = first.copy()
    for run_ in second:
        run_[np.flatnonzero(run_ != labels)[:10]] ^= 1
    found = metrics.bootstrap(metrics.accuracy, labels, second, first, draws=2000)
    assert found.value == pytest.approx(0.05)
    low, high = stats.binom.ppf([0.025, 0.975], 200, 0.05) / 200
    assert 0 < found.low and abs(found.low - low) < 0.01 and abs(found.high - high) < 0.01
    alone = metrics.bootstrap(metrics.accuracy, labels, second, draws=2000)
    assert alone.high - alone.low > 1.5 * (found.high - found.low)


def test_seeds_are_drawn_too():
    labels = np.ones(1000, int)
    runs = np.stack([np.ones(1000, int), np.zeros(1000, int)])
    found = metrics.bootstrap(metrics.accuracy, labels, runs, draws=500)
    assert found == (0.5, 0, 1)


def test_the_bootstrap_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"\(seeds, rows\) for every system"):
        metrics.bootstrap(metrics.accuracy, np.ones(4), np.ones((2, 4)), np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"\(seeds, rows\) for every system"):
        metrics.bootstrap(metrics.accuracy, np.ones(4), np.ones(4))


# --- The model -----------------------------------------------------------------------------------------


def test_the_head_reads_the_mean_of_what_is_valid(model):
    network, params = run.load_model(str(model), "mean", 2)
    assert {*params} == {"embeddings", "encoder", "classifier"}
    tokens = np.array([[2, 5, 6, 3, 0, 0], [2, 7, 8, 9, 10, 3]], np.int32)
    valid = np.arange(6) < np.array([[4], [6]])
    apply = jax.jit(network.apply)
    out = apply({"params": params}, tokens, valid)
    encoder, whole = bert.load(model)
    hidden = np.asarray(jax.jit(encoder.apply)({"params": whole}, tokens, valid).hidden)
    np.testing.assert_allclose(out.hidden, hidden, atol=1e-6)
    mean = np.stack([hidden[0, :4].mean(0), hidden[1].mean(0)])
    head = run.new_head(params, jax.random.key(1))["classifier"]
    again = apply({"params": params | {"classifier": head}}, tokens, valid)
    np.testing.assert_allclose(out.pooled, mean, atol=1e-5)
    np.testing.assert_allclose(again.logits, mean @ head["kernel"] + head["bias"], atol=1e-5)
    assert float(abs(out.logits - again.logits).max()) > 1e-3


def test_a_model_with_a_head_of_its_own():
    network, params = run.load_model(str(TINY.with_name("roberta_tiny")), "first", 1)
    drawn = run.new_head(params, jax.random.key(1))["classifier"]
    assert {*drawn} == {"dense", "out_proj"} and not np.asarray(drawn["dense"]["bias"]).any()
    shape = jax.eval_shape(network.apply, {"params": params}, np.zeros((2, 5), np.int32)).logits.shape
    assert shape == (2, 1)
    with pytest.raises(files.DataError, match="pooling is 'max'; write 'mean' or 'first'"):
        run.load_model(str(TINY), "max", 1)


# --- The grid ------------------------------------------------------------------------------------------


@pytest.fixture
def config(corpus, model):
    settings = json.loads((run.HERE / "config.json").read_text())["settings"]
    settings |= {"model": str(model), "length": 12, "batch": 8, "rank": 2, "bottleneck": 2, "prefix": 2}
    plan = {
        "settings": settings,
        "epochs": {"CoLA": 12, "STS-B": 3},
        "head_epochs": 3,
        "ways": ["full", "lora_qv", "head"],
        "more_ways": ["prefix"],
        "more_tasks": ["STS-B"],
        "seeds": [0, 1],
        "one_seed": ["STS-B"],
        "sweep": {
            "tasks": {"CoLA": {"rows": 15, "epochs": 16}},
            "held_out": 6,
            "rates": {"full": [1e-5, 1e-2], "lora_qv": [1e-2], "head": [1e-2], "prefix": [1e-2]},
        },
        "bootstrap_draws": 50,
    }
    path = corpus / "config.json"
    path.write_text(json.dumps(plan))
    return path


def command(what, config, *more):
    run.main([what, "--config", str(config), "--out", str(config.parent / "out"), *more])


def record(path):
    return json.loads(path.read_text())


def test_sweep_grid_and_table(config, capsys, monkeypatch):
    out = config.parent / "out"
    with pytest.raises(SystemExit, match=r"sweep\.json has no learning rate for 'full': run .*sweep"):
        command("grid", config)
    command("sweep", config, "--ways", "full", "lora_qv", "head")
    swept = record(out / "sweep.json")["ways"]
    tried = {rate: x["mean"] for rate, x in swept["full"]["tried"].items()}
    assert {*tried} == {"1e-05", "0.01"} and tried["0.01"] > tried["1e-05"]
    assert swept["full"]["learning_rate"] == 0.01 and swept["full"]["at_the_edge"]
    assert record(out / "sweep" / "CoLA_full_0.01.json")["rows"] == {
        "train": 15,
        "evaluated": 6,
        "cut": [0, 0],
    }

    command("grid", config, "--tasks", "STS-B", "--ways", "head", "--seeds", "1")
    command("grid", config, "--tasks", "CoLA")
    names = {path.name for path in (out / "cells").iterdir()}
    cola = {f"CoLA_{way}_{seed}.json" for way in ("full", "lora_qv", "head") for seed in (0, 1)}
    assert names == cola | {"STS-B_head_1.json"}
    cell = record(out / "cells" / "CoLA_full_0.json")
    assert cell["command"].startswith("python -m experiments.glue.run grid")
    assert cell["rows"] == {"train": 24, "evaluated": 10, "cut": [0, 0]} and cell["steps"] == 36
    assert cell["learning_rate"] == swept["full"]["learning_rate"]
    # A word tells the class, and 36 steps of all parameters are enough to see it.
    assert cell["scores"] == {"Matthews": 1.0} and cell["predictions"] == "0101010101"
    assert cell["curve"][-1][0] == 36 and cell["curve"][-1][1] < cell["curve"][0][1] / 2
    qv = record(out / "cells" / "CoLA_lora_qv_0.json")
    assert qv["trainable"] == {"all": 2 * 2 * (16 + 16) + 34, "head": 34}
    assert qv["saved_bytes"] < cell["saved_bytes"]
    taken = {way: made["step_bytes"] for way, made in (("full", cell), ("qv", qv))}
    assert taken["qv"]["peak"] > taken["qv"]["arguments"] > 4 * cell["trainable"]["all"]
    # Adam's two moments of everything.
    assert taken["full"]["arguments"] > 3 * 4 * cell["trainable"]["all"]
    head = record(out / "cells" / "CoLA_head_0.json")
    assert head["trainable"] == {"all": 34, "head": 34} and head["step_bytes"] is None
    regression = record(out / "cells" / "STS-B_head_1.json")
    assert len(regression["predictions"]) == 10 and {*regression["scores"]} == {"Pearson", "Spearman"}

    capsys.readouterr()
    monkeypatch.setattr(run, "train_and_score", lambda *_: pytest.fail("a finished cell was made again"))
    command("grid", config, "--tasks", "CoLA")
    text = capsys.readouterr().out
    rows = [line.split(" | ")[0] for line in text.splitlines()]
    assert rows.index("| full fine-tuning") < rows.index("| LoRA, q and v") < rows.index("| the head alone")
    assert "| *the paper: roberta-base LoRA* | *63.4* |  |" in text
    assert "deberta" not in text and (out / "glue.png").stat().st_size > 1000
    found = record(out / "glue.json")["tasks"]["CoLA"]["ways"]
    assert found["full"]["scores"]["Matthews"]["mean"] == 1.0 and "minus_full" not in found["full"]
    assert found["head"]["minus_full"]["value"] == pytest.approx(
        found["head"]["scores"]["Matthews"]["mean"] - 1.0
    )
    assert found["head"]["minus_full"]["seeds"] == [0, 1]


def test_only_what_is_missing_is_made_and_nothing_is_taken_for_another(config, monkeypatch):
    made, stopped = [], []

    def instead(settings, recipe, task):
        if len(made) == 2 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        made.append((task.name, recipe.way, recipe.seed, settings.rank))
        zeros = np.zeros(len(task.dev), int)
        return {
            "scores": metrics.scores(task.name, task.dev.labels, zeros),
            "predictions": cells.packed(zeros),
            "rows": {"train": 24, "evaluated": 10, "cut": [0, 0]},
            "trainable": {"all": 1, "head": 1},
            "step_bytes": {"peak": 1},
            "saved_bytes": 1,
            "seconds_per_step": 0.1,
            "steps": 1,
        }

    monkeypatch.setattr(run, "train_and_score", instead)
    more = ("--ways", "full", "lora_qv", "--learning-rate", "0.1", "--tasks", "CoLA")
    with pytest.raises(SystemExit, match="130"):
        command("grid", config, *more)
    first, made[:] = list(made), []
    command("grid", config, *more)
    assert first == [("CoLA", "full", 0, 2), ("CoLA", "lora_qv", 0, 2)]
    assert made == [("CoLA", "full", 1, 2), ("CoLA", "lora_qv", 1, 2)]
    with pytest.raises(
        SystemExit, match=r"CoLA_full_0\.json was made otherwise: settings\.rank was 2, and is 3 now\."
    ):
        command("grid", config, *more, "--rank", "3")

    made[:] = []
    command("ablate", config, *more, "--rank", "3", "--targets", "query|value", "--seeds", "0")
    name = "CoLA_lora_qv_learning_rate=0.1_rank=3_targets=query+value_0.json"
    out = config.parent / "out"
    assert made[1] == ("CoLA", "lora_qv", 0, 3) and (out / "ablations" / name).exists()
    row = record(out / "glue.json")["ablations"][1]
    assert (row["way"], row["differs"]) == ("lora_qv", "learning_rate=0.1_rank=3_targets=query+value")
    assert row["minus_full"] == {"value": 0, "low": 0, "high": 0, "seeds": [0]} and row["of_the_grid"] == 0

    # Full fine-tuning with the same difference is what it is compared with, not the grid's.
    path = out / "ablations" / name.replace("lora_qv", "full")
    perfect = cells.packed(run.data.labels_of(run.data.read("CoLA", "dev"), run.data.LABELS["CoLA"]))
    path.write_text(json.dumps(record(path) | {"predictions": perfect}))
    command("table", config)
    full, lora = record(out / "glue.json")["ablations"]
    assert lora["minus_full"]["value"] == -1 and "minus_full" not in full


def test_the_grid_is_seed_by_seed_with_more_ways_on_some_tasks_and_one_seed_of_others(config):
    options = run.parser_of().parse_args(["grid", "--learning-rate", "1"])
    plan = record(config)
    found = [made.path.stem for made in run.grid_cells(run.Settings(**plan["settings"]), plan, options)]
    ways = ["full", "lora_qv", "head"]
    cola, stsb = [f"CoLA_{way}" for way in ways], [f"STS-B_{way}" for way in (*ways, "prefix")]
    assert found == [f"{name}_0" for name in (*cola, *stsb)] + [f"{name}_1" for name in cola]


def test_what_a_command_has_no_use_for_is_refused(config, capsys):
    with pytest.raises(SystemExit):
        command("sweep", config, "--tasks", "CoLA")
    assert "sweep has no use for --tasks" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="nothing differs from the grid"):
        command("ablate", config)
    with pytest.raises(SystemExit, match="there are no cells in "):
        command("table", config)


def test_a_run_that_diverges_is_said_to(config):
    more = ("--tasks", "CoLA", "--ways", "full", "--learning-rate", "1e30", "--seeds", "0")
    command("grid", config, *more)
    cell = record(config.parent / "out" / "cells" / "CoLA_full_0.json")
    assert cell["scores"] is None and cell["predictions"] is None
    row = record(config.parent / "out" / "glue.json")["tasks"]["CoLA"]["ways"]["full"]
    assert row["diverged"] == 1 and "scores" not in row


def cells_in(folder, *of):
    """Cells of the head on CoLA, one for each dict, which says what differs from the usual."""
    usual = {
        "task": "CoLA",
        "way": "head",
        "seed": 0,
        "learning_rate": 0.1,
        "epochs": 1,
        "settings": {"model": "m", "batch": 8, "length": 12},
    }
    usual |= {"rows": {"train": 24, "evaluated": 10, "cut": [0, 0]}, "steps": 3, "predictions": "0" * 10}
    usual |= {"scores": {"Matthews": 0.0}, "trainable": {"all": 1, "head": 1}, "seconds_per_step": None}
    usual |= {"saved_bytes": 1, "step_bytes": None}
    folder.mkdir(parents=True)
    for differs in of:
        cell = usual | differs
        name = cell.pop("name", f"CoLA_{cell['way']}_{cell['seed']}.json")
        (folder / name).write_text(json.dumps(cell) if "text" not in cell else cell["text"])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1, "epochs": 2}, "head on CoLA: epochs of seed 1 differs from that of seed 0"),
        ({"seed": 1, "learning_rate": 0.2}, "head on CoLA: learning_rate of seed 1 differs"),
        ({"way": "full", "settings": {"batch": 3}}, "cells were made with different settings; part them"),
        ({"name": "CoLA_head_0_copy.json"}, "a cell of head on CoLA named '0_copy', which no grid makes"),
        ({"seed": 1, "text": '{"task": "CoLA"'}, r"CoLA_head_1\.json cannot be read: .* Delete it"),
        ({"seed": 1, "text": "[]"}, r"CoLA_head_1\.json holds no record"),
        ({"seed": 1, "text": "{}"}, r"CoLA_head_1\.json has no \['task', 'way'"),
    ],
)
def test_cells_that_do_not_belong_together_are_not_averaged(config, other, message):
    cells_in(config.parent / "out" / "cells", {}, other)
    with pytest.raises(SystemExit, match=message):
        command("table", config)


def test_the_table_says_which_entries_have_fewer_seeds(config, capsys):
    full, folder = {"way": "full"}, config.parent / "out" / "cells"
    cells_in(folder, full, full | {"seed": 1}, {})
    command("table", config)
    text = capsys.readouterr().out
    assert "| full fine-tuning | 0.0 ± 0.0 |" in text and "| the head alone | 0.0 (1 of 2 seeds) |" in text
    assert "| the head alone | +0.0 [+0.0, +0.0] (1 of 2 seeds) |" in text


def test_rates_are_chosen_of_whole_sweeps(config, capsys):
    out = config.parent / "out"
    command("sweep", config, "--ways", "head", "full")
    (out / "sweep" / "CoLA_full_1e-05.json").unlink()
    plan = record(config)
    plan["sweep"]["rates"] |= {"lora_qv": [1e-2, 1e-1]}
    config.write_text(json.dumps(plan))
    capsys.readouterr()
    command("sweep", config, "--ways", "head")
    assert [*record(out / "sweep.json")["ways"]] == ["head"]
    assert "full         not all of its rates are tried: sweep --ways full" in capsys.readouterr().out
    plan["settings"]["rank"] = 1
    config.write_text(json.dumps(plan))
    with pytest.raises(SystemExit, match=r"CoLA_head_0\.01\.json was made otherwise: settings.rank was 2"):
        command("sweep", config, "--ways", "head")
    with pytest.raises(SystemExit, match=r"the config's sweep has no rates for \['top2'\]"):
        command("sweep", config, "--ways", "top2")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda x: x | {"sed": 1}, r"unknown are \['sed'\]"),
        (lambda x: {"ways": x["ways"]}, r"missing are \['settings', 'epochs'"),
        (lambda x: x | {"settings": {"rnk": 2}}, r"settings has \['rnk'\], and must have \['model'"),
        (lambda x: x | {"ways": ["lora_vq"]}, r"no such ways are \['lora_vq'\]; there are \['full'"),
        (lambda x: x | {"settings": x["settings"] | {"length": 2}}, "length is 2; give 5 or more"),
        (lambda x: x | {"settings": x["settings"] | {"warmup": 1.0}}, "warmup is 1.0; give a share in"),
        (lambda x: [], "missing are"),
    ],
)
def test_configs_that_say_something_else_are_refused(config, changed, message):
    config.write_text(json.dumps(changed(record(config))))
    with pytest.raises(SystemExit, match=message):
        command("grid", config)


def test_config_files_that_are_none(config):
    config.write_text("{")
    with pytest.raises(SystemExit, match=r"config\.json is no JSON"):
        command("grid", config)
    config.unlink()
    with pytest.raises(SystemExit, match=r"config\.json cannot be read: No such file"):
        command("grid", config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("grid", "--epochs", "0"), "--epochs is 0; give 1 or more"),
        (("grid", "--seeds", "-1"), "--seeds has -1; give 0 or more"),
        (("table", "--rank", "64"), "table has no use for --rank"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(config, capsys, arguments, message):
    with pytest.raises(SystemExit):
        command(arguments[0], config, *arguments[1:])
    assert message in capsys.readouterr().err


def test_a_way_without_lora_has_no_rank_to_change(config):
    with pytest.raises(SystemExit, match=r"\['head'\] have no LoRA, and so no rank"):
        command("ablate", config, "--ways", "head", "--rank", "3")


def test_nothing_is_trained_where_nothing_can_be_written(config, monkeypatch):
    monkeypatch.setattr(run, "train_and_score", lambda *_: pytest.fail("trained"))
    (config.parent / "out").write_text("a file")
    with pytest.raises(SystemExit, match="nothing can be written to .*Give another --out"):
        command("grid", config, "--learning-rate", "0.1")


# --- The record ----------------------------------------------------------------------------------------


def recorded():
    config = record(run.HERE / "config.json")
    return config, record(run.RESULTS / "glue.json")


def with_data():
    if "LORA_JAX_DATA" not in os.environ:
        pytest.skip("set LORA_JAX_DATA to a folder with the data")


def test_the_record_is_whole_and_is_that_of_its_cells():
    config, found = recorded()
    assert not found["uncommitted_changes"] and found["settings"] == config["settings"]
    assert [*found["tasks"]] == [*config["epochs"]] and found["contaminated"]["MNLI"]
    for name, task in found["tasks"].items():
        more = config["more_ways"] if name in config["more_tasks"] else []
        assert {*task["ways"]} >= {*config["ways"], *more}
        for way, row in task["ways"].items():
            made = [record(run.RESULTS / "cells" / f"{name}_{way}_{seed}.json") for seed in row["seeds"]]
            assert row["seeds"] == run.seeds_of(config, name)
            assert row["diverged"] == 0
            assert not any(cell["uncommitted_changes"] for cell in made)
            assert {cell["learning_rate"] for cell in made} == {found["sweep"][way]["learning_rate"]}
            values = [cell["scores"][task["metric"]] for cell in made]
            assert row["scores"][task["metric"]]["mean"] == pytest.approx(np.mean(values))
            assert row["interval"]["low"] <= np.mean(values) <= row["interval"]["high"]


def test_the_scores_are_those_of_the_predictions():
    config, found = recorded()
    with_data()
    for name, task in found["tasks"].items():
        labels = data.labels_of(data.read(name, "dev"), data.LABELS[name])
        for way in task["ways"]:
            cell = record(run.RESULTS / "cells" / f"{name}_{way}_{config['seeds'][0]}.json")
            assert metrics.scores(name, labels, cells.unpacked(cell["predictions"])) == cell["scores"]


def test_a_cell_made_again_is_the_recorded_one():
    config, found = recorded()
    with_data()
    try:
        bert.minilm_folder()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    cell = record(run.RESULTS / "cells" / "CoLA_head_0.json")
    settings = run.Settings(**config["settings"])
    recipe = run.Recipe(*(cell[name] for name in run.Recipe._fields))
    again = run.train_and_score(settings, recipe, run.task_for(settings, "CoLA", "head"))
    stated = found["tasks"]["CoLA"]["ways"]["head"]["interval"]
    assert stated["low"] <= again["scores"]["Matthews"] <= stated["high"]
    # The same seed on another machine: rounding may turn a row, not more.
    pairs = zip(again["predictions"], cell["predictions"], strict=True)
    assert sum(x != y for x, y in pairs) <= 0.01 * cell["rows"]["evaluated"]
