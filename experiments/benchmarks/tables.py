"""What the benchmarks share: taking turns, ratios, the record of a run, and the tables in the README."""

from __future__ import annotations

import json
import platform
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from experiments.records import fill, markdown, provenance

HERE = Path(__file__).parent


def in_turn(names: Iterable[str], number: int) -> list[str]:
    """The names in order, every second round backwards, so that none always follows the same one."""
    names = list(names)
    return names[::-1] if number % 2 else names


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def paired(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """The spread of the ratios of what was measured in the same round."""
    return spread(n / d for n, d in zip(numerator, denominator, strict=True))


def requirement(name: str, value: float, limit: float | None) -> dict[str, Any]:
    return {"name": name, "value": value, "limit": limit, "met": None if limit is None else value <= limit}


def about_this_run(module: str) -> dict[str, Any]:
    """The command, the commit, the versions and the kind of machine."""
    command = " ".join(["python", "-m", module, *sys.argv[1:]])
    packages = ("optax", "qwix") if find_spec("qwix") else ("optax",)
    about = provenance(command, packages)
    about["machine"]["processor"] = _processor()
    return about


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def requirements_table(requirements: Iterable[dict[str, Any]]) -> str:
    def row(r: dict[str, Any]) -> list[str]:
        limit = ["", ""] if r["limit"] is None else [f"{r['limit']:g}", "yes" if r["met"] else "**no**"]
        return [r["name"], f"{r['value']:.3f}", *limit]

    return markdown(["held to", "measured", "at most", "met"], map(row, requirements))


def origin(result: dict[str, Any]) -> str:
    """A sentence saying where the figures come from."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    machine = result["machine"]
    where = f"{machine['processor']}, {machine['cpus']} cores, {', '.join(machine['devices'])}"
    commit = f"commit {result['commit']}" if result["commit"] else "no commit"
    if result["uncommitted_changes"]:
        commit += " and uncommitted changes"
    return f"`{result['command']}` on {where}; {versions}; {commit}."


def save(result: dict[str, Any], out: Path, text: str) -> None:
    """Write the record, and its tables into the README where that has a place for the file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    readme = HERE / "README.md"
    if out.resolve().parent == HERE / "results" and f"<!-- {out.name} -->\n" in readme.read_text():
        fill(readme, {out.name: f"{text}\n"})
    print(f"\n{text}\n\nwritten to {out}")
