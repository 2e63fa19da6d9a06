"""What a drawn program is held to: the law, in float64 to 1e-12, or a refusal by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo

import lora_jax
from experiments.programs.draw import Program

TOLERANCE = 1e-12
Way = Literal["reference", "jit", "eager"]


class MismatchError(AssertionError):
    """A program that breaks the law: what differs, and the program's text."""


class Outcome(NamedTuple):
    """What came of a program.

    Attributes:
        refused: The primitive that was refused, or None where the law holds without permission to densify.
        why: The refusal's reason.
        error: The largest difference met, relative to 1 + max |expected|.
    """

    refused: str | None
    why: str
    error: float


class Result(NamedTuple):
    """The leaves of a function's output: their paths, (shape, dtype, weak type) and numbers."""

    structure: Any
    paths: list[str]
    types: list[tuple[Any, ...]]
    numbers: list[np.ndarray]


def check(program: Program, way: Way = "reference", jitted: bool = False, seed: int = 0) -> Outcome:
    """Hold a program to the law.

    The value, and the gradient with respect to every a and b, must equal those of the program on dense
    weights. A program that is refused must name its weights, and must satisfy the law once it is
    permitted to make them dense.

    Args:
        program: The program.
        way: "reference" lowers the function as jit does and runs the result by StableHLO's reference
            interpreter, which takes hundredths of the time that XLA takes to compile. "jit" compiles
            both the value and the gradient; "eager" takes the value op by op.
        jitted: Whether the program is under a jit of its own, inside of lora.
        seed: Of the numbers in weights and inputs.

    Returns:
        The outcome.

    Raises:
        MismatchError: the law is broken. Anything else that is raised is an error too.
    """
    fn = program.function()
    weights, inputs = program.arguments(seed)
    factors = [(w.a, w.b) for w in weights]

    def merged(factors: Any) -> Any:
        return fn(*(w.dense() for w in _rebuilt(weights, factors)), *inputs)

    run = _interpreted if way == "reference" else _compiled
    expected = run(_with_gradient(merged), factors)
    if not all(np.all(np.isfinite(x)) for x in expected.numbers):
        raise MismatchError(f"the program itself is not finite\n{program}")

    def evaluate(densify: Any) -> Result:
        def adapted(factors: Any) -> Any:
            call = jax.jit(fn) if jitted else fn
            return lora_jax.lora(call, densify=densify)(*_rebuilt(weights, factors), *inputs)

        if way == "eager":
            gradient = jax.jit(_with_gradient(adapted))(factors)[1]
            return _result((adapted(factors), gradient))
        return run(_with_gradient(adapted), factors)

    refused, why = None, ""
    try:
        actual = evaluate(None)
    except lora_jax.RefusedError as error:
        refused, why = error.primitive, error.why
        known = {w.path for w in weights}
        if not refused or not error.paths or not known.issuperset(error.paths):
            named = f"the refusal of {refused!r} names {error.paths} and not some of {sorted(known)}"
            raise MismatchError(f"{named}\n{program}") from error
        actual = evaluate(lambda path, leaf: True)
    return Outcome(refused, why, _difference(actual, expected, program))


def _rebuilt(weights: Sequence[Any], factors: Any) -> list[Any]:
    return [w.replace(a=a, b=b) for w, (a, b) in zip(weights, factors, strict=True)]


def _with_gradient(fn: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, Any]]:
    """The function's value, and the gradient of a weighted sum of all of it."""

    def loss(factors: Any) -> tuple[jax.Array, Any]:
        out = fn(factors)
        total = jnp.zeros((), jnp.float64)
        for y in jax.tree.leaves(out):
            weights = np.cos(np.arange(y.size, dtype=np.float64)).reshape(y.shape)
            total += jnp.sum(y.astype(jnp.float64) * weights)
        return total, out

    def both(factors: Any) -> tuple[Any, Any]:
        gradient, out = jax.grad(loss, has_aux=True)(factors)
        return out, gradient

    return both


def _compiled(fn: Callable[[Any], Any], factors: Any) -> Result:
    return _result(jax.jit(fn)(factors))


def _interpreted(fn: Callable[[Any], Any], factors: Any) -> Result:
    info, numbers = interpreted(fn, factors)
    return _result(info)._replace(numbers=numbers)


def interpreted(fn: Callable[..., Any], *arguments: Any) -> tuple[Any, list[np.ndarray]]:
    """What jit lowers a function to, run by StableHLO's interpreter: the output's types, and its numbers.

    Raises:
        NotImplementedError: an operation is not StableHLO's own. (The interpreter would end the process.)
    """
    traced = jax.jit(fn, keep_unused=True).trace(*arguments)
    module: Any = traced.lower().compiler_ir("stablehlo")
    if others := set(re.findall(r"\bchlo\.\w+|\bstablehlo\.custom_call @\w+", str(module))):
        raise NotImplementedError(f"StableHLO's interpreter has no {', '.join(sorted(others))}")
    with module.context:
        constants = [_constant(np.asarray(x)) for x in jax.tree.leaves(arguments)]
        outs = [np.array(x) for x in stablehlo.eval_module(module, constants)]
    # The interpreter's arrays of one element have lost their axes.
    shapes = [x.shape for x in jax.tree.leaves(traced.out_info)]
    return traced.out_info, [x.reshape(shape) for x, shape in zip(outs, shapes, strict=True)]


def _constant(x: np.ndarray) -> Any:
    if x.dtype != bool:
        return ir.DenseElementsAttr.get(x)
    bits = np.packbits(x, axis=None, bitorder="little")
    return ir.DenseElementsAttr.get(bits, type=ir.IntegerType.get_signless(1), shape=x.shape)


def _result(out: Any) -> Result:
    leaves = jax.tree.leaves(out)
    return Result(
        jax.tree.structure(out),
        [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(out)],
        [(x.shape, x.dtype, x.weak_type) for x in leaves],
        [np.asarray(x) if isinstance(x, jax.Array) else np.zeros(()) for x in leaves],
    )


def _difference(actual: Result, expected: Result, program: Program) -> float:
    """The largest relative difference; raises where it is above the tolerance, or a type differs."""
    if actual.structure != expected.structure:
        raise MismatchError(f"the output is {actual.structure} and not {expected.structure}\n{program}")
    worst = 0.0
    numbers = zip(actual.numbers, expected.numbers, strict=True)
    types = zip(actual.types, expected.types, strict=True)
    for path, (ours, theirs), (x, y) in zip(expected.paths, types, numbers, strict=True):
        if ours != theirs:
            raise MismatchError(f"{path} is {ours} and not {theirs}\n{program}")
        error = float(np.max(np.abs(x - y), initial=0) / (1 + np.max(np.abs(y), initial=0)))
        if not error <= TOLERANCE:
            what = "value" if path.startswith("[0]") else "gradient"
            raise MismatchError(f"the {what} {path} is off by {error:.2e} of its size\n{program}")
        worst = max(worst, error)
    return worst
