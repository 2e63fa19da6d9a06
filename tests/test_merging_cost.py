"""What merging costs: the theory, the two parts of the difference, the record, and a cell made again."""

import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from experiments.data import DataError
from experiments.merging_cost import run

NAMES = ("all-MiniLM-L6-v2", "stories260K")
FILES = {name: run.HERE / "results" / f"{name}.json" for name in NAMES}
RECORDS = {name: json.loads(path.read_text()) for name, path in FILES.items()}
CELLS = [
    pytest.param(name, dtype, cell, id=f"{name} {dtype} {cell['size']:.1e}")
    for name, record in RECORDS.items()
    for dtype, cells in record["dtypes"].items()
    for cell in cells
]
RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((64, 32)).astype(np.float32)


@pytest.fixture(autouse=True)
def as_the_command_runs():
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
        yield


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape) / math.sqrt(shape[0]), jnp.float32)


def forward(dtype):
    def logits(params):
        x = jnp.asarray(INPUTS, dtype)
        return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]

    return logits


@pytest.fixture(scope="module")
def runner():
    with jax.enable_x64(False):
        params = {"up": {"kernel": normal(32, 64)}, "down": {"kernel": normal(64, 8)}}
        wrapped = lora_jax.wrap(params, rank=4)
        for name in params:
            node = wrapped[name]["kernel"]
            wrapped[name]["kernel"] = node.replace(b=normal(*node.b.shape))
        return run.Runner(run.Subject(wrapped, forward, RNG.integers(8, size=64), {}))


def sized(runner, dtype, size):
    wrapped = runner.subject.wrapped
    return run.based_in(run.scaled(wrapped, size / run.size_of(wrapped)), dtype)


def measured(runner, dtype, size):
    wrapped = sized(runner, dtype, size)
    return run.measure(runner, wrapped, dtype, runner.exact(run.base_of(wrapped)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_unit_in_the_last_place_is_the_distance_to_the_next_number(dtype):
    w = np.abs(RNG.standard_normal(100)).astype(jnp.dtype(dtype))
    bits = w.view(np.uint32 if dtype == "float32" else np.uint16)
    following = (bits + 1).view(w.dtype)
    np.testing.assert_array_equal(run.ulp(w, dtype), following.astype(np.float64) - w.astype(np.float64))
    assert run.ulp(np.zeros(1, w.dtype), dtype) > 0


@pytest.mark.parametrize("size", [3e-4, 1.5e-3, 1.5e-2])
def test_the_theory_has_its_limits(size):
    w = RNG.standard_normal((300, 300)).astype(jnp.bfloat16)
    found = run.theory(w, "bfloat16", size)
    within = [math.erf(unit / (math.sqrt(8) * size)) for unit in run.ulp(w, "bfloat16").flat]
    assert found["unmoved"] == pytest.approx(np.mean(within), abs=0.01)
    if size == 1.5e-2:  # updates of some units
        assert found["normal"] == pytest.approx(found["uniform"], rel=0.02)
    else:
        assert found["normal"] < min(1, found["uniform"])


def test_the_difference_has_two_parts(runner):
    found = measured(runner, "bfloat16", 5e-3)
    assert found["size"] == pytest.approx(5e-3, rel=0.01)
    assert found["leaf_lost"]["median"] == pytest.approx(found["theory"]["normal"], rel=0.15)
    parts, whole = (found["weights_alone"]["rms"], found["unmerged"]["rms"]), found["merged"]["rms"]
    assert max(parts) * 0.7 < whole < sum(parts)
    reported = found["check_merge"]
    assert reported["agreement"] == found["merged_and_unmerged"]["agreement"]


def test_in_float64_merging_costs_nothing_and_in_float32_next_to_nothing(runner):
    assert runner.floor(sized(runner, "float32", 0.1)) < 1e-14
    found = measured(runner, "float32", 0.1)
    assert found["leaf_lost"]["most"] < 1e-6 and found["merged_and_unmerged"]["rms"] < 1e-6
    assert found["effect"]["rms"] > 0.01 and found["unmerge"]["error"] < 1e-7


def test_an_update_far_below_a_unit_is_gone_when_merged_and_kept_when_not(runner):
    found = measured(runner, "bfloat16", 1e-5)
    assert found["leaf_unmoved"]["median"] > 0.98
    assert found["weights_alone"]["rms"] == pytest.approx(found["effect"]["rms"], rel=0.35)
    assert found["unmerge"]["returned"] > 0.98


def test_merged_before_the_cast_is_nearer_than_merged_after_it(runner):
    rows = {
        row["way"]: row for row in run.ways(runner, sized(runner, "float32", 5e-3), ["float32", "bfloat16"])
    }
    before, after = "merged in float32, then cast to bfloat16", "base cast to bfloat16, merged there"
    assert rows[before]["weights"] < rows[after]["weights"]
    assert rows["float32 throughout, merged"]["weights"] < 1e-4
    stored, unmerged = "base stored in bfloat16, merged into float32", "base cast to bfloat16, unmerged"
    assert rows[stored]["weights"] == pytest.approx(rows[unmerged]["weights"], rel=1e-4)
    assert rows[stored]["rms"] < rows[unmerged]["rms"]


def test_a_model_that_is_narrow_inside_is_refused(runner):
    def narrow(dtype):
        return lambda params: forward(dtype)(params).astype(jnp.float32)

    with pytest.raises(DataError, match="a float64 model computes in f32 inside"):
        run.Runner(runner.subject._replace(forward=narrow))


def test_what_was_made_is_kept_and_other_settings_are_refused(tmp_path):
    calls = []
    for _ in range(2):
        assert run.cell(tmp_path / "cell.json", lambda: calls.append(1) or {"x": 1}) == {"x": 1}
    assert len(calls) == 1
    (tmp_path / "cell.json").write_text('{"x": 1')
    with pytest.raises(DataError, match=r"cell.json cannot be read: .* Delete it to have it made anew"):
        run.cell(tmp_path / "cell.json", lambda: {"x": 1})
    run.claim(tmp_path / "work", {"seed": 0, "sizes": [1.0]})
    run.claim(tmp_path / "work", {"seed": 0, "sizes": [1.0]})
    with pytest.raises(DataError, match="begun with seed 0. Give the same settings"):
        run.claim(tmp_path / "work", {"seed": 1, "sizes": [1.0]})
    with pytest.raises(DataError, match="begun with seed 0. Give the same settings"):
        run.claim(tmp_path / "work", {"sizes": [1.0]})
    with pytest.raises(DataError, match="begun with no dtypes named. Give the same settings"):
        run.claim(tmp_path / "work", {"dtypes": ["float32"], "seed": 0, "sizes": [1.0]})


def test_models_of_one_last_name_do_not_share_files(tmp_path, monkeypatch):
    def stop(*_):
        raise DataError("there is no model")

    monkeypatch.setattr(run, "subject", stop)
    flags = ["--out", str(tmp_path), "--model"]
    with pytest.raises(SystemExit, match="llama.json would hold several models"):
        run.main([*flags, "v1/llama", "v2/llama/"])
    for _ in range(2):
        with pytest.raises(SystemExit, match="there is no model"):
            run.main([*flags, "v1/llama"])
    with pytest.raises(SystemExit, match="llama_run was begun with model 'v1/llama'"):
        run.main([*flags, "v2/llama"])


CONFIG = json.loads((run.HERE / "config.json").read_text())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "cannot be read: No such file or directory. Give a file like"),
        ("{", "is no JSON: .* Give a file like"),
        ({"sizes": [1.0]}, r"missing are \['models', 'dtypes', "),
        (CONFIG | {"sizes": [0]}, r"--sizes are \[0\]; give numbers above 0"),
        (CONFIG | {"dtypes": ["float8"]}, r"the dtypes \['float8'\] are not served; there are float32, "),
        (CONFIG | {"bert": {}}, r"'bert' has {}; give each of \['rank', .*\] a number above 0"),
        (CONFIG | {"llama": CONFIG["llama"] | {"steps": 0}}, "'llama' has .* a number above 0"),
    ],
)
def test_a_broken_config_ends_with_one_line(config, message, tmp_path):
    path = tmp_path / "mine.json"
    if config is not None:
        path.write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(SystemExit, match=f"error: .*{message}") as stop:
        run.main(["--config", str(path), "--out", str(tmp_path / "out")])
    assert "\n" not in str(stop.value) and not (tmp_path / "out").exists()


def test_only_the_committed_settings_fill_the_readme(tmp_path, monkeypatch):
    def study(name, settings, work):
        work.parent.mkdir(exist_ok=True)
        return {"model": name}

    filled = []
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name, fn in (("study", study), ("draw", lambda *_: None), ("fill", lambda *x: filled.append(x))):
        monkeypatch.setattr(run, name, fn)
    monkeypatch.setattr(run, "costs_table", str)
    monkeypatch.setattr(run, "ways_table", str)
    monkeypatch.setattr(run, "HERE", tmp_path)
    for flags in (["--model", "stories260K"], ["--sizes", "1"]):
        run.main(["--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "results"), *flags])
    assert not filled
    run.main(["--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "results")])
    assert len(filled) == 1


@pytest.mark.skipif("LORA_JAX_DATA" not in os.environ, reason="set LORA_JAX_DATA to a folder with the data")
def test_a_cell_of_the_table_made_again_with_another_adapter():
    """What merging loses hardly depends on the adapter: a random one is within the spread over the layers."""
    from experiments.models import llama

    _, params = llama.load(run.find_model("stories260K"), "float32")
    keys = iter(jax.random.split(jax.random.key(0), 100))

    def drawn(node):
        if not run.is_wrapped(node):
            return node
        node = node.replace(b=jax.random.normal(next(keys), node.b.shape))
        return run.scaled(node, 0.015 / run.size_of(node))

    wrapped = jax.tree.map(drawn, lora_jax.wrap(params, rank=8, targets="mlp"), is_leaf=run.is_wrapped)
    report = lora_jax.check_merge(lambda p: p["norm"]["scale"], run.based_in(wrapped, "bfloat16"))
    cell = min(RECORDS["stories260K"]["dtypes"]["bfloat16"], key=lambda x: abs(x["size"] - 0.015))
    for name in ("lost", "unmoved"):
        spread, ours = cell[f"leaf_{name}"], np.median([getattr(leaf, name) for leaf in report.leaves])
        assert spread["least"] < ours < spread["most"]


@pytest.mark.parametrize(("name", "dtype", "cell"), CELLS)
def test_the_record_is_by_the_theory(name, dtype, cell):
    lost, unmoved, theory = cell["leaf_lost"], cell["leaf_unmoved"], cell["theory"]
    assert lost["median"] == pytest.approx(theory["normal"], rel=0.15)
    # A trained update has more entries near zero than a normal one.
    assert 0.95 * theory["unmoved"] <= unmoved["median"] <= 1.4 * theory["unmoved"] + 0.01
    alone, own = cell["weights_alone"]["rms"], cell["unmerged"]["rms"]
    if cell["size"] <= RECORDS[name]["training"]["size"]:  # beyond it a model is out of its depth
        assert cell["merged"]["rms"] < 1.2 * (alone + own)
        assert alone < own or theory["normal"] > 0.35  # updates of less than some units


@pytest.mark.parametrize("name", NAMES)
def test_the_record(name):
    record = RECORDS[name]
    assert record["truth_known_to"] < 1e-12
    losses = record["training"]["losses"]
    assert np.mean(losses[-20:]) < np.mean(losses[:5])
    kind = "bert" if name == NAMES[0] else "llama"
    assert len(losses) == record["settings"][kind]["steps"]
    ways = {row["way"]: row for row in record["ways"]}
    for dtype in ("bfloat16", "float16"):
        cast_last = ways[f"merged in float32, then cast to {dtype}"]["weights"]
        assert cast_last < ways[f"base cast to {dtype}, merged there"]["weights"]


def test_the_readme_has_the_records_tables():
    readme = (run.HERE / "README.md").read_text()
    results = [RECORDS[name] for name in NAMES]
    assert run.costs_table(results) in readme and run.ways_table(results) in readme


def test_the_figure_is_drawn_from_the_record(tmp_path):
    run.draw(list(RECORDS.values()), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
