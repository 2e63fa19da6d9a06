"""Makes a failing program smaller: fewer lines and fewer results, while it fails in the same way."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from experiments.programs.draw import Program

_RESULTS = re.compile(r"    return \((.*),\)")
_BOUNDED = re.compile(r"= (?:jnp|jax\.nn)\.\w+\((lax\.\w+\(.*\))(?: / [\d.]+)?\)$")


def shrunk(program: Program, fails: Callable[[Program], bool], tries: int = 1000) -> Program:
    """The smallest program found, of fewer lines and results, that still fails.

    Args:
        program: A program for which `fails` is true.
        fails: Whether a program fails in the way that matters; one that does not run at all must not.
        tries: How often at most `fails` is asked.

    Returns:
        The program.
    """

    def works(lines: list[str]) -> bool:
        nonlocal program, tries
        if tries <= 0:
            return False
        tries -= 1
        candidate = dataclasses.replace(program, source="\n".join(lines) + "\n")
        if fails(candidate):
            program = candidate
            return True
        return False

    before = None
    while program.source != before and tries > 0:
        before = program.source
        _fewer_results(program.source.splitlines(), works)
        _fewer_lines(program.source.splitlines(), works)
    return program


def _fewer_results(lines: list[str], works: Callable[[list[str]], bool]) -> None:
    found = _RESULTS.fullmatch(lines[-1])
    names = found[1].split(", ") if found else []
    if len(names) > 1 and any(works([*lines[:-1], f"    return ({name},)"]) for name in reversed(names)):
        return
    for name in list(names):
        rest = [other for other in names if other != name]
        if rest and works([*lines[:-1], f"    return ({', '.join(rest)},)"]):
            names = rest


def _fewer_lines(lines: list[str], works: Callable[[list[str]], bool]) -> None:
    """From the end, so that what a line needs goes after it: a function with its body, or a line."""
    i = len(lines) - 2
    while i > 0:
        end = next(k for k in range(i + 1, len(lines)) if _indent(lines[k]) <= _indent(lines[i]))
        # A product need not be brought to the size of one either.
        bare = [*lines[:i], _BOUNDED.sub(r"= \1", lines[i]), *lines[i + 1 :]]
        for shorter in (lines[:i] + lines[end:], lines[:i] + lines[i + 1 :], bare):
            if shorter != lines and works(shorter):
                lines = shorter
                break
        i = min(i, len(lines) - 1) - 1


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
