"""The comparison of ways on E2E: its batches, its beam search, its figures, and a whole small one."""

import functools
import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from experiments.data import DataError
from experiments.e2e_nlg import compare, data, metrics, run
from experiments.models import generate, llama

TINY = Path(__file__).parent / "fixtures" / "llama_tiny"
RECORD = compare.HERE / "results" / "compare.json"


def parse(*flags):
    return run.parse([*flags], compare.Settings, "compare", "", "")


def test_defaults_are_the_papers():
    s = parse()
    assert (s.rank, s.alpha, s.dropout, s.weight_decay) == (4, 32.0, 0.1, 0.01)
    assert (s.batch, s.epochs, s.warmup, s.label_smoothing) == (8, 5, 500, 0.1)
    assert (s.beams, s.no_repeat, s.length_penalty, s.max_new) == (10, 4, 0.9, 64)


def test_the_committed_config_is_one_the_parser_takes():
    config = Path(compare.__file__).parent / "compare.json"
    settings = parse("--config", str(config), "--rates", '{"full": [0.5]}')
    assert settings.rates == {"full": [0.5]}
    rest = json.loads(config.read_text()) | {"rates": {"full": [0.5]}}
    assert {name: getattr(settings, name) for name in rest} == rest


# --- Batches -------------------------------------------------------------------------------------------


@pytest.fixture
def examples():
    rng = np.random.default_rng(0)
    end = rng.integers(5, 120, size=70).astype(np.int32)
    tokens = np.where(np.arange(128) < end[:, None], 1 + np.arange(70)[:, None], 0).astype(np.int32)
    return data.Examples(tokens, end - 3, end, dropped=0)


def test_batches_have_whole_examples_of_like_length(examples):
    found = list(itertools.islice(compare.batches(examples, 4, seed=1), 17))
    assert {batch["tokens"].shape[1] for batch in found} <= {32, 64, 96, 128}
    seen = [int(i) for batch in found for i in batch["tokens"][:, 0] - 1]
    assert len(set(seen)) == len(seen) == 68  # an epoch, without the rest of two
    for batch in found:
        ends = examples.end[batch["tokens"][:, 0] - 1]
        assert batch["weight"].sum() == 12  # no text is cut
        assert batch["tokens"].shape[1] - 32 < ends.max() <= batch["tokens"].shape[1]
    assert sum(batch["tokens"].size for batch in found) < 0.75 * 68 * 128


def test_batches_depend_on_the_seed_alone(examples):
    def order(seed):
        batches = itertools.islice(compare.batches(examples, 4, seed), 40)
        return [batch["tokens"][:, 0].tolist() for batch in batches]

    assert order(1) == order(1) != order(2)
    assert order(1)[:17] != order(1)[17:34]  # another epoch has another order


# --- Beam search ---------------------------------------------------------------------------------------


def test_only_repetitions_within_the_text_are_ruled_out():
    model, params = llama.load(TINY)
    prompts = jnp.asarray(np.random.default_rng(0).integers(2, 258, (8, 100)), jnp.int32)
    valid = jnp.ones(prompts.shape, bool).at[:, :7].set(False)

    def said(beams, no_repeat):
        settings = SimpleNamespace(max_new=12, beams=beams, length_penalty=0.9, no_repeat=no_repeat)
        search = compare._beam(SimpleNamespace(model=model, eos=1, settings=settings))
        return np.asarray(jax.jit(search)(params, prompts, valid))

    plain = functools.partial(generate.greedy, model, max_new=12, eos_id=1)
    free = said(beams=1, no_repeat=0)
    np.testing.assert_array_equal(free, jax.jit(plain)(params, prompts, valid))
    assert any(len(set(text)) < len(text) for text in free[:, :4].tolist())

    texts = [text[text != 1].tolist() for text in said(beams=2, no_repeat=1)]
    assert all(len(set(text)) == len(text) for text in texts)
    # With its prompt counted, no text would have a token of it.
    assert any(set(text) & set(prompt) for text, prompt in zip(texts, prompts[:, 7:].tolist(), strict=True))


# --- Figures -------------------------------------------------------------------------------------------


REFERENCES = {
    "a": ["the pub is by the river near the old bar", "by the river there is a pub"],
    "b": ["it is a cheap bar in the city near the river"],
    "c": ["a café in the city for the whole family", "the family goes to a café in the city"],
}
PERFECT = [some[0] for some in REFERENCES.values()]
POOR = ["the pub is by a river", "a cheap bar", "no"]


def system_of(*texts):
    training = {"validation_loss": 0.5, "trainable": 7, "seconds_per_step": 0.1}
    return {
        "learning_rate": 0.1,
        "at_the_edge": False,
        "seeds": list(range(len(texts))),
        "training": [training] * len(texts),
        "texts": [{"texts": some, "seconds": 1.0} for some in texts],
    }


def test_figures_are_means_over_seeds_and_differences_are_paired():
    task = SimpleNamespace(test=REFERENCES, settings=SimpleNamespace(draws=200))
    found = {"full": system_of(PERFECT, POOR), "prefix": system_of(PERFECT, POOR), "adapter": system_of(POOR)}
    ways = compare.judged(task, found)
    poor = metrics.score(POOR, list(REFERENCES.values()))
    perfect = metrics.score(PERFECT, list(REFERENCES.values()))
    for name in metrics.METRICS:
        full, prefix, adapter = (ways[way]["metrics"][name] for way in ("full", "prefix", "adapter"))
        assert full["seeds"] == pytest.approx([perfect[name], poor[name]])
        assert full["value"] == pytest.approx((perfect[name] + poor[name]) / 2)
        assert full["interval"][0] < full["interval"][1]
        assert "minus_full" not in full
        assert prefix["minus_full"] == {"value": 0.0, "interval": [0.0, 0.0]}
        assert adapter["minus_full"]["value"] == pytest.approx(poor[name] - full["value"])
        assert adapter["minus_full"]["interval"][1] < 0
    assert ways["adapter"]["words"] == np.median([len(text.split()) for text in POOR])
    table = compare.tables({"ways": ways, "paper": None})
    assert f"| bottleneck adapters | 7 | 0.1 | 0.500 | {100 * poor['BLEU']:.1f} [" in table


# --- A whole one ---------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    foods = ("fish", "tea", "pie")
    for split, count in (("train", 12), ("valid", 2), ("test", 3)):
        lines = (
            f"name : Inn {i} | food : {foods[i % 3]}||Inn {i} of the {area} has it . \n"
            for i, area in itertools.product(range(count), ("north", "south"))
        )
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    return tmp_path


def test_a_whole_comparison_goes_on_where_it_was(corpus, monkeypatch):
    monkeypatch.delenv("LORA_JAX_DATA", raising=False)
    fixed = "--seeds 2 --rank 2 --alpha 4 --dropout 0 --warmup 2 --steps 12 --batch 4 --eval-batch 5"
    fixed += " --decode-batch 2 --beams 1 --max-new 4 --draws 50 --name tiny"
    rates = json.dumps({"lora_qv": [0.00001, 0.05]})
    flags = [*fixed.split(), "--rates", rates, "--model", str(TINY), "--data", str(corpus)]
    out = corpus / "out"
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
        record = compare.main([*flags, "--out", str(out)])

        way = record["ways"]["lora_qv"]
        assert record["data"] | {"dropped_as_too_long": 0} == {
            "train": 24,
            "valid": 4,
            "meanings": 3,
            "references": 6,
            "words": 8.0,
            "dropped_as_too_long": 0,
        }
        assert record["ways"]["base"]["trainable"] == 0
        assert way["learning_rate"] == 0.05 and way["at_the_edge"]
        assert way["trainable"] == 2 * 2 * ((16 + 24) + (16 + 12))
        assert (
            way["validation_loss"][0] == way["tried"]["0.05"] < record["ways"]["base"]["validation_loss"][0]
        )
        assert way["validation_loss"][0] != way["validation_loss"][1]
        assert len(way["metrics"]["BLEU"]["seeds"]) == 2
        assert record["samples"][0]["reference"] == "Inn 0 of the north has it ."
        assert (out / "tiny.png").read_bytes().startswith(b"\x89PNG")

        # What is there is read; what is gone is made again, from the weights.
        files = sorted((out / "tiny_run").glob("*.json"))
        assert len(files) == 2 + 3 + 2
        text = out / "tiny_run" / "lora_qv_0.05_1_texts.json"
        before, known = {file: file.stat().st_mtime_ns for file in files}, json.loads(text.read_text())
        text.unlink()
        again = compare.main([*flags, "--out", str(out)])
        assert {file for file in files if file.stat().st_mtime_ns != before[file]} == {text}
        assert json.loads(text.read_text())["texts"] == known["texts"]
        assert again["ways"]["lora_qv"]["metrics"] == way["metrics"]

        with pytest.raises(SystemExit, match="was made otherwise"):
            compare.main([*flags, "--out", str(out), "--rank", "3"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rates", '{"lora": [1]}'], r"no ways \['lora'\] to adapt; --rates takes full, "),
        (["--rates", '{"full": [1]}', "--steps", "5"], "the warm-up takes 500 of 5 steps; lower --warmup"),
        (["--rates", "{}"], "--rates are {}; write ways with their rates"),
        (["--rates", '{"full": 0.1}'], "--rates has 0.1 for 'full'; give a list of different numbers"),
        (["--rates", '{"full": [0.1, 0.1]}'], "give a list of different numbers above 0"),
        (["--rates", '{"head": [1]}', "--warmup", "0"], "this model cannot be adapted by 'head'"),
        (["--dropout", "1"], "--dropout is 1.0; give a number from 0 on and below 1"),
        (["--alpha", "nan"], "--alpha is nan; give a number above 0"),
        (["--warmup", "-1"], "--warmup is -1; give a whole number from 0 on"),
        (["--dtype", "int32"], "dtype is 'int32'; write a floating one"),
        (["--batch", "25"], "24 examples do not fill a batch of 25; lower --batch"),
        (["--max-new", "300", "--warmup", "0"], "--max-new 300 exceed the model's 256 positions"),
        (["--config", "nowhere.json"], "error: --config: .*nowhere.json.*. Give a file of settings such as"),
        (["--config", __file__], "error: --config: Extra data.*. Give a file of settings"),
    ],
)
def test_a_mistake_ends_with_one_line(corpus, flags, message):
    with pytest.raises(SystemExit, match=message):
        compare.main(["--model", str(TINY), "--data", str(corpus), "--out", str(corpus / "out"), *flags])
    assert not (corpus / "out").exists()  # nothing was trained


@pytest.mark.parametrize("flag", ["--steps", "--decode", "--seeds", "--epochs", "--batch"])
def test_nothing_is_trained_on_a_number_below_one(flag):
    with pytest.raises(SystemExit, match=f"error: {flag} is 0; give a whole number above 0."):
        compare.main([flag, "0"])


def test_rates_that_are_no_json_are_named(capsys):
    with pytest.raises(SystemExit):
        compare.main(["--rates", "{full: 1}"])
    assert "'{full: 1}' is no JSON: " in capsys.readouterr().err


def test_only_the_committed_settings_fill_the_readme():
    def committed(*flags):
        return compare.is_committed(parse("--config", str(compare.CONFIG), *flags))

    assert committed() and committed("--run-dir", "elsewhere")
    for flags in (["--seeds", "2"], ["--name", "other"], ["--out", "elsewhere"], ["--model", "other"]):
        assert not committed(*flags)
    assert not compare.is_committed(parse())


def test_weights_that_are_gone_are_named(tmp_path):
    with pytest.raises(DataError, match=r"x\.npz is gone; delete .*x\.json"):
        compare.restored(None, tmp_path / "x.npz", 0)


# --- The committed record ------------------------------------------------------------------------------


def test_the_record_is_of_a_clean_checkout_and_its_texts_are_scored():
    record = json.loads(RECORD.read_text())
    assert not record["uncommitted_changes"]
    assert compare.tables(record) in (compare.HERE / "README.md").read_text()
    ways = record["ways"]
    assert {"base", "full", "lora_qv", "lora_all", "prefix", "adapter"} <= ways.keys()
    base = ways.pop("base")["validation_loss"][0]
    for row in ways.values():
        assert len(row["validation_loss"]) == record["settings"]["seeds"] == 3
        assert max(row["validation_loss"]) < base
        for found in row["metrics"].values():
            low, high = found["interval"]
            assert low <= found["value"] <= high


@pytest.mark.skipif("LORA_JAX_DATA" not in os.environ, reason="set LORA_JAX_DATA to a folder with the data")
def test_the_records_first_steps_are_made_again():
    record = json.loads(RECORD.read_text())
    found = record["ways"]["lora_qv"]
    settings = compare.Settings(**record["settings"])
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
        task = compare.load(settings)
        made = compare.system(task, "lora_qv")
        tx = made.optimizer(found["learning_rate"])
        state = lora_jax.TrainState.create(made.wrapped(0), tx, jax.random.key(0))
        losses = []
        for batch in itertools.islice(compare.batches(task.train, settings.batch, 0), 4):
            state, metrics_of_step = made.step(state, batch)
            losses.append(float(metrics_of_step["loss"]))
    # Another version of jax rounds otherwise.
    np.testing.assert_allclose(losses, found["first_losses"][0], rtol=1e-4)
