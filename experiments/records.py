"""What the experiments write alike: a record, its tables, and their places in a README."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

# All but the pages, which runs fill with their tables.
CODE = ("--", ":/", ":(top,exclude)*.md")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def provenance(command: str, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """The command, the commit it ran at, versions and the kind of machine."""
    return {
        "command": command,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no", *CODE)),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in (*PACKAGES, *packages)},
        "machine": {
            "platform": f"{platform.system()} {platform.machine()}",
            "cpus": os.cpu_count(),
            "devices": sorted({f"{device.platform}: {device.device_kind}" for device in jax.devices()}),
        },
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(x)}" for name, x in record.items())
    part.write_text(f"{{\n{lines}\n}}\n")
    os.replace(part, path)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1, notes: int = 0) -> str:
    """A Markdown table: the first `words` columns and the last `notes` are text, the others figures."""
    figures = range(words, len(head) - notes)
    lines = [head, ["---:" if i in figures else "---" for i in range(len(head))], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def fill(readme: Path, texts: Mapping[str, str]) -> None:
    """Put each text into the README, between `<!-- name -->` and `<!-- end of name -->`.

    Raises:
        ValueError: the README has no such place; nothing is written.
    """
    page = readme.read_text()
    for name, text in texts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{readme} has no place for {name}; write {begin.rstrip()} and below it {end}")
        page = f"{before}{begin}{text}{end}{after}"
    readme.write_text(page)
