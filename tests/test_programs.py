"""Law 1 for drawn programs, in float64 to 1e-12: each satisfies the law or is refused by name.

A short profile; `python -m experiments.programs.run` is the long one.
"""

import collections
import json
import random
import re

import jax
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from experiments.programs import run
from experiments.programs.draw import NESTINGS, STEPS, Input, Program, Weight, draw
from experiments.programs.law import MismatchError, check
from experiments.programs.shrink import shrunk

# On jax 0.10 StableHLO's interpreter takes the process with it on some programs, so there XLA runs them.
REFERENCE = jax.__version_info__ >= (0, 11)
WAY = "reference" if REFERENCE else "jit"

# Derandomized, so that a change fails for what it does and not for what was drawn that day.
SHORT = settings(
    derandomize=True,
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@st.composite
def programs(draw_from, operations=(5, 30)):
    return draw(lambda n: draw_from(st.integers(0, n - 1)), operations)


@st.composite
def products(draw_from):
    """One dot_general with any dimension_numbers, of a weight whose axes are split in any way."""
    return draw(lambda n: draw_from(st.integers(0, n - 1)), (0, 0))


@settings(SHORT, max_examples=30)
@given(products())
def test_any_dimension_numbers_and_axis_splits(program):
    note(str(program))
    assert check(program, WAY).refused is None


@settings(SHORT, max_examples=25 if REFERENCE else 8)
@given(programs(), st.booleans())
def test_programs(program, jitted):
    note(str(program))
    check(program, WAY, jitted)


@settings(SHORT, max_examples=3)
@given(programs((5, 12)), st.sampled_from(["jit", "eager"]))
def test_programs_run_by_xla(program, way):
    note(str(program))
    check(program, way)


def test_what_is_drawn():
    """From 5 to 30 operations of every kind, over 1 to 4 weights that all are used, three deep at most."""
    drawn = [run.program_of(0, number) for number in range(400)]
    assert str(drawn[7]) == str(run.program_of(0, 7))
    used, depths = collections.Counter(), set()
    for program in drawn:
        assert 5 <= program.operations <= 30
        assert 1 <= len(program.weights) <= 4
        body = program.source.split("\n", 1)[1]
        for i in range(len(program.weights)):
            assert re.search(rf"\bw{i}\b", body)
        used.update(program.used)
        depths.add(program.depth)
    assert depths == {0, 1, 2, 3}
    assert {step.__name__ for step in (*STEPS, *NESTINGS)} <= set(used)


# A program that is not pure: with every call it answers otherwise, in its value or in its gradient alone.
IMPURE = {
    "value": "x0 @ w0 * program.calls",
    "gradient": "x0 @ w0 * program.calls - lax.stop_gradient(x0 @ w0 * (program.calls - 1.0))",
}


@pytest.mark.parametrize("way", ["reference", "jit", "eager"])
@pytest.mark.parametrize("what", IMPURE)
def test_the_check_finds_a_difference(what, way):
    lines = [
        "def program(w0, x0):",
        '    program.calls = getattr(program, "calls", 0.0) + 1.0',
        f"    return ({IMPURE[what]},)",
    ]
    source = "\n".join(lines) + "\n"
    weights, inputs = (Weight((3, 2), ("in", "out"), 1),), (Input((4, 3), 0),)
    with pytest.raises(MismatchError, match=f"the {what} .* is off by"):
        check(Program(source, weights, inputs, 1, 0, ()), way)


def test_a_failing_program_is_made_smaller():
    drawn = (draw(random.Random(n).randrange) for n in range(1000))
    program = next(p for p in drawn if "lax.rev(" in p.source and len(p.source.splitlines()) > 25)

    def fails(candidate):
        weights, inputs = candidate.arguments()
        try:
            jax.eval_shape(candidate.function(), *(w.w for w in weights), *inputs)
        except (NameError, SyntaxError, TypeError):
            return False
        return "lax.rev(" in candidate.source

    small = shrunk(program, fails)
    assert fails(small)
    assert len(small.source.splitlines()) <= 8


def test_the_command(tmp_path, capsys):
    every, ways = ("3", {"jit": 1, "reference": 2}) if REFERENCE else ("1", {"jit": 2, "eager": 1})
    run.main(
        ["--programs", "3", "--seed", "5", "--compiled-every", every, "--out", str(tmp_path / "out.json")]
    )
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["programs"] == 3
    assert record["mismatches"] == 0
    assert record["satisfied_share"] + record["refused_share"] == pytest.approx(1, abs=1e-4)
    assert record["run_by"] == ways
    assert "0 mismatches" in capsys.readouterr().out
