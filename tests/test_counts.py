"""Trained and total parameters of published models, on abstract parameters; and an alpha that is a scale."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from experiments.counts import run, shapes
from lora_jax import peft
from lora_jax.names import Rule

RECORD = json.loads((run.HERE / "results" / "counts.json").read_text())
DATA = os.environ.get("LORA_JAX_DATA")


@pytest.fixture(autouse=True)
def usual_promotion():
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm mixes dtypes
        yield


def named(row):
    return f"{row['model']} {row['targets'].split()[0]} r{row['rank']}"


@pytest.mark.parametrize("row", RECORD["rows"], ids=named)
def test_counts_are_the_recorded_ones(row):
    given = {name: value for name, value in row.items() if name != "counted"}
    assert run.count(given)["counted"] == row["counted"]
    assert row["counted"]["trainable"] == row["trainable"]
    assert row["counted"]["total"] == row.get("total", row["counted"]["total"])


@pytest.mark.skipif(DATA is None, reason="set LORA_JAX_DATA to a folder that holds paper/lora_paper.json")
def test_the_record_has_every_row_of_the_file():
    rows = run.rows_of()
    recorded = [{name: value for name, value in row.items() if name != "counted"} for row in RECORD["rows"]]
    assert recorded == rows


def test_the_readme_has_the_records_table():
    assert run.table(RECORD["rows"]) in (run.HERE / "README.md").read_text()
    assert "(!)" not in run.table(RECORD["rows"])


def test_a_count_that_differs_fails_the_command(tmp_path, monkeypatch, capsys):
    row = next(row for row in RECORD["rows"] if row["model"] == "bloom-3b")
    rows = [row | {"trainable": row["trainable"] + 1}]
    monkeypatch.setattr(run, "rows_of", lambda: rows)
    assert run.main(["--out", str(tmp_path / "counts.json")]) == 1
    said = capsys.readouterr()
    assert "2,457,600 (!)" in said.out and "bloom-3b" in said.err


def test_the_published_shares():
    rows = {row["model"]: row["counted"] for row in RECORD["rows"]}
    bloom, bert = rows["bloom-3b"], rows["bert-base-uncased"]
    assert f"{bloom['trainable'] / (bloom['total'] + bloom['trainable']):.4%}" == "0.0818%"  # not 0.0812%
    assert f"{bert['trainable'] / bert['total']:.2%}" == "0.15%"


def test_gpt2_from_scratch_is_counted_layer_by_layer():
    params = shapes.gpt2_from_scratch()
    assert sum(x.size for x in jax.tree.leaves(params)) == 124_441_346  # as that book prints it
    wrapped = jax.eval_shape(lambda p: lora_jax.wrap(p, 16, targets="all"), params)
    rows = {row.path: row.trainable for row in lora_jax.summary(wrapped).rows if row.trainable}
    assert rows.pop("out_head/kernel") == 12_320
    assert len(rows) == 12 * 6 and sum(rows.values()) == 2_654_208


def test_a_linear_with_lora_keeps_its_scale():
    """alpha·x@A@B with A (in, r) and B (r, out), for which alpha is no multiple of the rank."""
    rng = np.random.default_rng(0)
    alpha, rank, layers = 16.0, 6, {"W_query": (8, 8), "layers_0": (8, 32), "layers_2": (32, 8)}

    def drawn(*shape):
        return rng.standard_normal(shape)

    params, state = {}, {}
    for name, (inner, outer) in layers.items():
        params[name] = {"kernel": jnp.asarray(drawn(inner, outer)), "bias": jnp.asarray(drawn(outer))}
        state |= {f"blocks.{name}.lora.A": drawn(inner, rank), f"blocks.{name}.lora.B": drawn(rank, outer)}

    def model(params, x):
        for name in layers:
            x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
        return x

    x = drawn(5, 8)
    theirs = x
    for name in layers:
        p, (a, b) = params[name], (state[f"blocks.{name}.lora.{part}"] for part in "AB")
        theirs = np.tanh(theirs @ p["kernel"] + p["bias"] + alpha * (theirs @ a @ b))
    rules = [Rule(r"(\w+)/kernel", r"blocks.\1.weight"), Rule(r"(\w+)/bias", r"blocks.\1.bias", "plain")]
    wrapped = peft.load_loralib(state, params, rules, scale=alpha)
    for tree, fn in ((wrapped, lora_jax.lora(model)), (lora_jax.merge(wrapped), model)):
        np.testing.assert_allclose(fn(tree, jnp.asarray(x)), theirs, rtol=0, atol=1e-12)
    for name in layers:
        leaf = wrapped[name]["kernel"]
        assert float(leaf.scale) == alpha and leaf.rank == rank
        np.testing.assert_array_equal(leaf.a, state[f"blocks.{name}.lora.A"])


def test_a_scale_that_is_no_multiple_of_the_rank_survives_the_files(tmp_path):
    pytest.importorskip("safetensors")
    rng = np.random.default_rng(1)
    params = {"W_query": {"kernel": jnp.asarray(rng.standard_normal((8, 8)))}}
    state = {"W_query.lora.A": rng.standard_normal((8, 6)), "W_query.lora.B": rng.standard_normal((6, 8))}
    rules = [Rule(r"(\w+)/kernel", r"\1.weight")]
    wrapped = peft.load_loralib(state, params, rules, scale=16.0)
    peft.save_peft(wrapped, tmp_path, rules, None)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 16.0 and config["r"] == 6
    again = peft.load_peft(tmp_path, params, rules)
    np.testing.assert_array_equal(again["W_query"]["kernel"].delta(), wrapped["W_query"]["kernel"].delta())
