"""Does one train step give the same curve on every mesh?

    python -m experiments.meshes.run

Every mesh of (data, fsdp, tensor) with eight devices, for Linen and NNX, Auto and Explicit axes, float32 and
float64: 20 steps, beside the same 20 on a single device. Without eight devices it pretends that the CPU is
eight of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where the record goes; by default results/jax-VERSION.json")
    options = parser.parse_args(arguments)

    import jax

    jax.config.update("jax_enable_x64", True)
    from tqdm import tqdm

    from experiments.meshes import model
    from experiments.records import provenance

    rows, started = [], time.perf_counter()
    cells = list(itertools.product(model.KINDS, model.TYPES, model.BOUNDS, model.SHAPES))
    for kind, types, dtype, shape in tqdm(cells, desc="meshes", unit="mesh"):
        rows.append(
            {
                "model": kind,
                "axes": types,
                "dtype": dtype,
                "mesh": dict(zip(model.AXES, shape, strict=True)),
                "largest_relative_difference": model.deviation(shape, kind, types, dtype),
            }
        )
        jax.clear_caches()
    worst = {
        dtype: max(row["largest_relative_difference"] for row in rows if row["dtype"] == dtype)
        for dtype in model.BOUNDS
    }
    record = {
        **provenance("python -m experiments.meshes.run"),
        "steps": model.STEPS,
        "curves": len(rows),
        "bounds": model.BOUNDS,
        "largest_relative_difference": worst,
        "seconds": round(time.perf_counter() - started, 1),
        "rows": rows,
    }
    out = options.out or HERE / "results" / f"jax-{jax.__version__}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    for dtype, bound in model.BOUNDS.items():
        print(f"{dtype}: within {worst[dtype]:.1e} of a single device's curve (bound {bound:g})")
    print(f"{len(rows)} curves of {model.STEPS} steps: {out}")
    if any(worst[dtype] > bound for dtype, bound in model.BOUNDS.items()):
        raise SystemExit(1)


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    main()
