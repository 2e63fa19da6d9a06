"""Two and four processes on one machine have the curve of one, saved by two and resumed by four."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from newest import NEWEST

import lora_jax

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "pod" / "train.py"
DEVICES = 4  # in all, over the processes


def run(folder, processes, steps, *options):
    """Start the script in so many processes; the curve that they log."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as in the other tests
    }
    line = [sys.executable, str(SCRIPT), "--dir", str(folder / "run"), "--steps", str(steps), "--batch", "8"]
    line += ["--every", "2", "--tensor", "2", "--fsdp", "2", *options]
    line += ["--coordinator", f"localhost:{port}", "--processes", str(processes), "--index"]
    with contextlib.ExitStack() as stack:
        started = []
        for i in range(processes):
            output = stack.enter_context((folder / f"output-{i}").open("w+"))
            process = subprocess.Popen([*line, str(i)], env=env, stdout=output, stderr=output)
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append((process, output))
        deadline = time.monotonic() + 200
        for process, output in started:
            code = process.wait(timeout=max(1, deadline - time.monotonic()))
            output.seek(0)
            assert code == 0, output.read()[-3000:]
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_curve_is_that_of_one_process_and_goes_on_with_another_number(tmp_path):
    folders = [tmp_path / "alone", tmp_path / "several"]
    for folder in folders:
        folder.mkdir()
    alone, first = run(folders[0], 1, 6), run(folders[1], 2, 3)
    assert [row["step"] for row in first] == [1, 2, 3]
    both = run(folders[1], 4 if NEWEST else 2, 6)
    assert both[:3] == first
    assert [row["step"] for row in both] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(*([row["loss"] for row in curve] for curve in (both, alone)), rtol=2e-5)
    ours, theirs = (lora_jax.read_adapter(folder / "run" / "adapter").leaves for folder in folders)
    for path, leaf in theirs.items():
        np.testing.assert_allclose(ours[path].a, leaf.a, rtol=0, atol=1e-3 * np.abs(leaf.a).max())
