"""The E2E experiment: its data, its loss, and a whole run on a tiny model without a network."""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import lora_jax
from experiments import data as files
from experiments.e2e_nlg import data, run
from experiments.models import llama

TINY = Path(__file__).parent / "fixtures" / "llama_tiny"
BOS, EOS = 0, 1


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No data folder and an empty cache, whose parent is returned."""
    monkeypatch.delenv("LORA_JAX_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def tokenizer():
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


def lines(count):
    foods, areas = ("fish", "tea", "pie"), ("north", "south")
    for i in range(count):
        food, area = foods[i % 3], areas[i % 2]
        yield f"name : Inn {i} | food : {food} | area : {area}||Inn {i} in the {area} has {food} . \n"


@pytest.fixture
def corpus(tmp_path):
    for split, count in (("train", 24), ("valid", 7), ("test", 5)):
        (tmp_path / f"{split}.txt").write_text("".join(lines(count)))
    return tmp_path


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_file_is_found_in_the_data_folder(nowhere, monkeypatch):
    (nowhere / "files").mkdir()
    (nowhere / "files" / "x.txt").write_text("content")
    monkeypatch.setenv("LORA_JAX_DATA", str(nowhere / "files"))
    assert files.fetch("x.txt", "file:///nothing", sha256("content")) == nowhere / "files" / "x.txt"
    with pytest.raises(files.DataError, match="not the expected file"):
        files.fetch("x.txt", "file:///nothing", sha256("other"))


def test_a_download_is_checked_kept_and_found_again(nowhere):
    source = nowhere / "source.txt"
    source.write_text("content")
    path = files.fetch("sub/x.txt", source.as_uri(), sha256("content"))
    assert path == nowhere / ".cache" / "lora_jax" / "sub" / "x.txt"
    source.unlink()
    assert files.fetch("sub/x.txt", source.as_uri(), sha256("content")).read_text() == "content"


def test_a_download_with_a_wrong_sum_leaves_nothing(nowhere):
    source = nowhere / "source.txt"
    source.write_text("conte")
    with pytest.raises(files.DataError, match="did not give the expected file"):
        files.fetch("sub/x.txt", source.as_uri(), sha256("content"))
    assert [path for path in (nowhere / ".cache").rglob("*") if path.is_file()] == []


def test_no_file_and_no_network_names_both_ways_out(nowhere):
    with pytest.raises(files.DataError) as error:
        files.fetch("e2e/x.txt", (nowhere / "gone.txt").as_uri(), sha256(""))
    assert "run again with a network, or set LORA_JAX_DATA to a folder that holds e2e/x.txt" in str(
        error.value
    )
    assert [path for path in (nowhere / ".cache").rglob("*") if path.is_file()] == []


def test_a_model_is_found_by_path_and_by_name(nowhere, monkeypatch):
    assert files.find_model(str(TINY)) == TINY
    with pytest.raises(files.DataError, match="there is no model 'llama_tiny'.*LORA_JAX_DATA"):
        files.find_model("llama_tiny")
    monkeypatch.setenv("LORA_JAX_DATA", str(TINY.parent))
    assert files.find_model("llama_tiny") == TINY


def test_lines_are_split_at_the_first_separator(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("name : A||A . \n\n name : Café | food : £ ||B || C \n", encoding="utf-8")
    assert data.read_pairs(path) == [("name : A", "A ."), ("name : Café | food : £", "B || C")]


@pytest.mark.parametrize("line", ["no separator", "||text", "name : A||  "])
def test_a_line_that_is_no_example_is_named(tmp_path, line):
    path = tmp_path / "x.txt"
    path.write_text(f"name : A||A .\n{line}\n")
    with pytest.raises(files.DataError, match=r"x\.txt, line 2: .* is not MR\|\|text"):
        data.read_pairs(path)


def test_own_files_that_are_missing_are_named(tmp_path):
    with pytest.raises(files.DataError, match=r"train\.txt does not exist"):
        data.load_split("train", str(tmp_path))


def test_only_the_text_and_its_end_count(tokenizer):
    examples = data.encode([("a : b", "C d"), ("x", "longer text")], tokenizer, None, BOS, EOS)
    assert examples.tokens.shape == (2, 32)
    assert examples.dropped == 0
    row = examples.row(0)
    prompt = [BOS, *tokenizer.encode("a : b", add_special_tokens=False).ids, BOS]
    text = [*tokenizer.encode("C d", add_special_tokens=False).ids, EOS]
    assert row["tokens"][: len(prompt) + len(text)].tolist() == prompt + text
    assert row["tokens"][row["weight"] > 0].tolist() == text
    assert [prompt] == data.encode_prompts(["a : b"], tokenizer, BOS)


def test_what_is_too_long_is_dropped_and_counted(tokenizer):
    pairs = [("a", "b"), ("a", "b" * 40), ("a", "c")]
    examples = data.encode(pairs, tokenizer, 8, BOS, EOS)
    assert (len(examples), examples.dropped) == (2, 1)
    assert tokenizer.decode(examples.tokens[1].tolist()) == "ac"
    with pytest.raises(files.DataError, match="none of 1 examples fits in 8 tokens"):
        data.encode(pairs[1:2], tokenizer, 8, BOS, EOS)


@pytest.fixture
def examples(tokenizer, corpus):
    return data.encode(data.load_split("train", str(corpus)), tokenizer, None, BOS, EOS)


def take(batches, count):
    return np.stack([next(batches)["tokens"] for _ in range(count)])


def test_batches_depend_on_the_seed_alone(examples):
    first = take(data.train_batches(examples, 5, seed=3), 8)
    np.testing.assert_array_equal(first, take(data.train_batches(examples, 5, seed=3), 8))
    assert (first != take(data.train_batches(examples, 5, seed=4), 8)).any()


def test_every_epoch_has_another_order_of_all_examples(examples):
    tokens = take(data.train_batches(examples, 6, seed=0), 8).reshape(2, 24, -1)
    wanted = sorted(map(tuple, examples.tokens.tolist()))
    for epoch in tokens:
        assert sorted(map(tuple, epoch.tolist())) == wanted
    assert (tokens[0] != tokens[1]).any()


def test_batches_resume_where_they_were(examples):
    batches = data.train_batches(examples, 5, seed=3)
    take(batches, 6)
    state = json.loads(json.dumps(batches.get_state()))
    following = take(batches, 6)
    resumed = data.train_batches(examples, 5, seed=3)
    resumed.set_state(state)
    np.testing.assert_array_equal(following, take(resumed, 6))


def test_a_batch_larger_than_the_data_is_refused(examples):
    with pytest.raises(files.DataError, match="24 examples do not fill a batch of 25"):
        data.train_batches(examples, 25, seed=0)


def test_evaluation_counts_every_example_once(examples):
    batches = list(data.eval_batches(examples, 7))
    assert {batch["tokens"].shape[0] for batch in batches} == {7}
    weights = np.concatenate([batch["weight"] for batch in batches])
    np.testing.assert_array_equal(weights[:24].sum(1), examples.end - examples.start)
    assert weights[24:].sum() == 0


def test_the_loss_is_smoothed_cross_entropy_of_the_completion(examples):
    model, params = llama.load(TINY)
    batch = next(data.eval_batches(examples, 3))
    logits = np.asarray(jax.jit(model.apply)({"params": params}, batch["tokens"]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = jax.jit(run.token_losses, static_argnums=0)
    for smoothing in (0.0, 0.1):
        expected = 0.0
        for i in range(3):
            for t in range(examples.start[i], examples.end[i]):
                goal = np.full(logits.shape[-1], smoothing / logits.shape[-1])
                goal[batch["tokens"][i, t]] += 1 - smoothing
                expected -= goal @ log_p[i, t - 1]
        found = loss(model, params, batch, jnp.float32(smoothing))
        np.testing.assert_allclose(float(found), expected, rtol=1e-5)


def test_the_learning_rate_warms_up_and_decays():
    rate = run.schedule(0.5, warmup=10, steps=110)
    found = [float(rate(jnp.int32(step))) for step in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(found, [0.0, 0.25, 0.5, 0.25, 0.0], atol=1e-6)


def test_defaults_are_the_papers():
    s = run.parse([])
    assert (s.rank, s.alpha, s.targets, s.dropout) == (4, 32.0, "q_proj|v_proj", 0.1)
    assert (s.learning_rate, s.batch, s.epochs, s.warmup) == (2e-4, 8, 5, 500)
    assert (s.label_smoothing, s.weight_decay) == (0.1, 0.01)


def test_flags_go_before_the_config_file(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text('{"rank": 2, "steps": 7}')
    s = run.parse(["--config", str(config), "--steps", "9"])
    assert (s.rank, s.steps, s.alpha) == (2, 9, 32.0)
    config.write_text('{"ranks": 2}')
    with pytest.raises(SystemExit):
        run.parse(["--config", str(config)])
    assert "no such setting: ['ranks']" in capsys.readouterr().err


def test_the_committed_config_is_one_the_parser_takes():
    config = Path(run.__file__).parent / "config.json"
    settings = run.parse(["--config", str(config)])
    assert {name: getattr(settings, name) for name in json.loads(config.read_text())} == json.loads(
        config.read_text()
    )


def test_a_base_weight_in_a_file_is_noticed():
    _, params = llama.load(TINY)
    kernel = np.asarray(params["layers_0"]["mlp"]["up_proj"]["kernel"])
    other = np.zeros((3, 2), np.float32)
    assert not run.holds_a_base_weight({"a": other, "b": kernel + 1}, params)
    assert run.holds_a_base_weight({"a": other, "b": kernel}, params)
    assert run.holds_a_base_weight({"a": other, "b": np.ascontiguousarray(kernel.T)}, params)


def arguments(corpus, out, *more):
    fixed = "--targets linear --rank 4 --alpha 8 --dropout 0 --learning-rate 0.01 --warmup 2 --steps 16"
    fixed += " --batch 4 --evals 2 --eval-batch 4 --decode 4 --max-new 8 --name tiny"
    return [*fixed.split(), "--model", str(TINY), "--data", str(corpus), "--out", str(out), *more]


def test_a_whole_run(nowhere, corpus, tmp_path):
    out = tmp_path / "out"
    # optax's Adam promotes dtypes implicitly, as is allowed in a user's process.
    with jax.numpy_dtype_promotion("standard"):
        run.main(arguments(corpus, out))
    record = json.loads((out / "tiny.json").read_text())

    loss = record["validation_loss"]
    assert loss["adapted"] < loss["untouched"] - 0.2
    assert loss["merged"] == pytest.approx(loss["adapted"], abs=1e-4)
    assert [step for step, _ in record["curves"]["valid"]] == [0, 8, 16]
    assert record["curves"]["valid"][0][1] == loss["untouched"]
    assert record["curves"]["train"][-1][0] == record["steps"] == 16
    assert record["decoding"] == {"inputs": 4, "merged_equals_adapted": 4}
    assert record["base"]["bit_identical_after_training"] is True

    # Per layer: q, k, v, o of 16 by 24, 12, 12, 24 and three of 16 by 40, each with rank 4.
    trainable = 2 * 4 * (2 * (16 + 24) + 2 * (16 + 12) + 3 * (16 + 40))
    assert record["parameters"]["trainable"] == trainable
    adapter = record["adapter"]
    tensors = load_file(out / "tiny.safetensors")
    assert adapter["tensors"].keys() == tensors.keys()
    assert adapter["holds_a_base_weight"] is False
    assert adapter["loads_bit_identical"] is True
    assert adapter["numbers"] == trainable + 14  # and one scale for each of 14 weights
    assert adapter["bytes_on_disk"] == (out / "tiny.safetensors").stat().st_size

    assert {"command", "commit", "versions", "machine", "settings"} <= record.keys()
    assert record["settings"]["seed"] == 0
    assert (out / "tiny.png").read_bytes().startswith(b"\x89PNG")
    assert "merged decodes the same text  4 of 4" in run.summary(record)


def test_training_that_was_stopped_goes_on(examples, tmp_path):
    settings = run.Settings(steps=6, warmup=1, evals=3, batch=4)
    model, params = llama.load(TINY)

    def train(directory, stop=None):
        evaluated = []

        def evaluate(params):
            if len(evaluated) == stop:
                raise KeyboardInterrupt
            evaluated.append(params)
            return len(evaluated) / 4

        wrapped = lora_jax.wrap(params, rank=2, targets="q_proj")
        batches = data.train_batches(examples, settings.batch, settings.seed)
        return run.train(settings, model, wrapped, batches, 6, evaluate, directory)

    with jax.numpy_dtype_promotion("standard"):
        whole, curves, seconds = train(tmp_path / "whole")
        assert len(seconds) == 6
        assert [step for step, _ in curves["train"]] == [1, 2, 3, 4, 5, 6]
        assert curves["valid"] == [[2, 0.25], [4, 0.5], [6, 0.75]]
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped", stop=1)
        resumed, again, seconds = train(tmp_path / "stopped")
        assert len(seconds) == 3  # from the save of step 3
        assert again["train"] == curves["train"]
        assert run.digests(resumed) == run.digests(whole)
        finished, again, seconds = train(tmp_path / "whole")
        assert (again, seconds) == (curves, [])
        assert run.digests(finished) == run.digests(whole)


def test_a_run_is_not_continued_with_other_settings(tmp_path):
    run.claim(tmp_path, run.Settings(rank=2))
    run.claim(tmp_path, run.Settings(rank=2, name="other", decode=3))
    with pytest.raises(files.DataError, match=r"was begun with rank 2, seed 0\. Give the same settings"):
        run.claim(tmp_path, run.Settings(rank=3, seed=1))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--warmup", "16"], "the warm-up takes 16 of 16 steps; lower --warmup"),
        (["--model", "gone"], "there is no model 'gone'"),
        (["--length", "9"], "none of 24 examples fits in 9 tokens"),
    ],
)
def test_a_mistake_ends_with_one_line(nowhere, corpus, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        run.main(arguments(corpus, tmp_path / "out", *more))
