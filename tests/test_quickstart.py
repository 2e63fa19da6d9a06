"""The quickstart as a user runs it, in a folder of its own, with a small model and little training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.quickstart import main

ROOT = Path(__file__).parents[1]
ARGUMENTS = "--seeds 2 --steps 2 --pretraining-steps 60 --shots 2 --rank 2 --ranks 1".split()


# One block in place of four, one rate in place of three: compiling is what takes the time.
SHALLOW = (
    "import sys; from experiments import quickstart as q; q.MODEL = q.ViT(layers=1); "
    "q.RATES = {way: rates[:1] for way, rates in q.RATES.items()}; q.main(sys.argv[1:])"
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", SHALLOW, *ARGUMENTS],
        cwd=folder,
        env=kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return folder / "quickstart_out", process


@pytest.fixture(scope="module")
def record(done):
    return json.loads((done[0] / "quickstart.json").read_text())


def test_every_check_passes_and_the_limits_are_told(done):
    output = done[1].stdout
    assert output.count("  ok: ") == 3
    for text in ("What it cannot show", "LoRA, rank 2", "bfloat16", "trained in full", "bytes on disk"):
        assert text in output


def test_nothing_is_left_on_the_error_stream_but_the_progress_bar(done):
    lines = [line for line in done[1].stderr.replace("\r", "\n").split("\n") if line]
    assert lines
    assert all(" steps" in line for line in lines), lines


def test_the_record_holds_every_run(record):
    results = record["results"]
    assert list(results) == ["LoRA, rank 2", "full", "head alone", "from scratch", "LoRA, rank 1"]
    for name, row in results.items():
        assert len(row["accuracy"]) == 2, name
        assert row["accuracy"] == row["tried"][str(row["learning_rate"])]["test"], name
        assert all(0 <= x <= 1 for runs in row["tried"].values() for part in runs.values() for x in part)
        assert row["step_seconds"] > 0
    assert record["accuracy_on_0_to_4"] > 0.5  # 0.2 would be chance
    assert results["full"]["share"] == results["from scratch"]["share"] == 1
    assert results["head alone"]["trained"] == 64 * 5 + 5
    # Of the block: q, k, v and out 64 × 64, and an MLP of 64 × 128 × 64.
    per_rank = 4 * (64 + 64) + 2 * (64 + 128)
    assert results["LoRA, rank 2"]["trained"] == 2 * per_rank + 325
    assert results["LoRA, rank 1"]["trained"] == per_rank + 325
    assert record["settings"]["seed"] == 0
    assert record["command"] == f"python -m experiments.quickstart {' '.join(ARGUMENTS)}"
    assert {"jax", "flax", "optax", "scikit-learn"} <= set(record["versions"])
    assert record["machine"]["cpus"] == os.cpu_count()


def test_merging_costs_nothing_in_float32_and_something_in_bfloat16(record):
    exact, narrow = record["merging"]["float32"], record["merging"]["bfloat16"]
    assert exact["lost"] < 1e-3 < narrow["lost"]
    assert exact["difference"] < 1e-4 * max(1, exact["scale"])
    assert exact["agreement"] == 1


def test_the_files_hold_what_the_record_says(done, record):
    folder, results = done[0], record["results"]
    for name, file in (("LoRA, rank 2", "adapter"), ("full", "full"), ("head alone", "head")):
        path = folder / f"{file}.safetensors"
        assert path.stat().st_size == results[name]["bytes"]
        arrays = {key: x for key, x in load_file(path).items() if not key.endswith(":scale")}
        assert sum(x.size for x in arrays.values()) == results[name]["trained"]
    base, full = load_file(folder / "base.safetensors"), load_file(folder / "full.safetensors")
    assert base.keys() == full.keys()
    assert not np.array_equal(base["head/kernel"], full["head/kernel"])


def test_the_figure_is_a_picture_with_something_in_it(done):
    from matplotlib.image import imread

    picture = imread(done[0] / "quickstart.png")
    assert picture.shape[0] > 400
    assert picture.shape[1] > 700
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "file"], "write --out with a folder that can be written to"),
        (["--shots", "200"], "write at most 100"),
        (["--rank", "0"], "--rank: write a whole number, at least 1"),
    ],
)
def test_a_wrong_argument_is_refused_before_any_training(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert " steps" not in error
