"""The crossing on a real model, a few steps of it; the committed record says the same of all of them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "experiments" / "crossing" / "results" / "stories260K.json"


def held(results):
    assert results["largest_difference"] < 1e-4
    for name in ("trained in PEFT", "trained in lora_jax"):
        found = results[name]
        size = found["largest_logit"]
        assert found["largest_logit_difference"] < 1e-5 * size
        assert found["largest_logit_difference_merged"] < 1e-5 * size
        assert abs(found["held_out_loss_in_PEFT"] - found["held_out_loss_in_lora_jax"]) < 1e-5
        assert found["held_out_loss_in_PEFT"] < results["start"]["held_out_loss"] - 0.5


@pytest.mark.filterwarnings("default")
@pytest.mark.skipif("LORA_JAX_DATA" not in os.environ, reason="set LORA_JAX_DATA to a folder with the data")
def test_a_few_steps(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    import jax

    from experiments.crossing import run

    settings = json.loads((run.HERE / "config.json").read_text()) | {"steps": 8, "held_out": 32}
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
        held(run.crossing(settings, tmp_path))


def test_the_record():
    record = json.loads(RECORD.read_text())
    assert not record["uncommitted_changes"]
    held(record["results"])
    steps = record["settings"]["steps"]
    assert all(len(curve) == steps for curve in record["results"]["curves"].values())
    assert np.mean(record["results"]["curves"]["PEFT"][-20:]) < 3.0
