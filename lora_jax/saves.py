"""One save of a training run: what it holds of a state, and how it is written, read and told from others.

A save is a folder named for its step, in the folder `checkpoints` of the run: `state`, an orbax checkpoint of
the arrays by name, and `run/metadata`, a JSON object with what else there is to know, the bits of every
array and of the base as numbers among it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lora_jax import nnx
from lora_jax.params import bit_numbers
from lora_jax.train import TrainState
from lora_jax.tree import leaves_with_path, path_str
from lora_jax.weight import LoraWeight, is_wrapped_leaf

FORMAT = 1
"""The version written into every save; a save of a newer version is refused."""

FOLDER = "checkpoints"
"""Where in a run's directory the saves are."""

_DESCRIPTION = Path("run", "metadata")  # where orbax's JsonSave puts the item `run`


class RunError(ValueError):
    """An error that already names the directory and what is wrong with it."""


# --- What a state holds -------------------------------------------------------------------------------


def _is_unit(node: Any) -> bool:
    return is_wrapped_leaf(node) or nnx.is_other_variable(node)


def _names(state: TrainState) -> Iterator[tuple[str, bool]]:
    """For every leaf of a state a name, and whether training changes it."""
    frozen = state.frozen[1] if nnx.is_split(state.frozen) else state.frozen
    sections = {"trainable": state.trainable, "frozen": frozen, "opt_state": state.opt_state}
    for section, tree in (sections | {"step": state.step, "key": state.key}).items():
        for path, node in leaves_with_path(tree, _is_unit):
            changes = section != "frozen" or nnx.is_other_variable(node)
            for keys, _ in jax.tree_util.tree_leaves_with_path(node):
                name = path
                if is_wrapped_leaf(node):
                    name += "" if (part := path_str(keys)) == "w" else f":{part}"
                elif len(keys) > 1:  # a value of several arrays in one Variable
                    name += "/" + path_str(keys[1:])
                yield "/".join(part for part in (section if changes else "", name) if part), changes


def _named(state: TrainState) -> list[tuple[str, bool, Any]]:
    leaves = jax.tree.leaves(state)
    named = [(name, changes, leaf) for (name, changes), leaf in zip(_names(state), leaves, strict=True)]
    names = [name for name, _, _ in named]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"two arrays of the state have one name: {twice[:5]}; rename them in its trees.")
    return named


def changing(state: TrainState) -> dict[str, Any]:
    """The arrays that training changes, by name."""
    arrays = {name: leaf for name, changes, leaf in _named(state) if changes}
    for name, leaf in arrays.items():
        if not isinstance(leaf, (jax.Array, np.ndarray)):
            raise TypeError(
                f"{name!r} of the state is a {type(leaf).__name__}; write an array, as TrainState.create "
                "does."
            )
    return arrays


def base(state: TrainState) -> dict[str, Any]:
    """The arrays that training does not change, by name."""
    named = [(name, leaf) for name, changes, leaf in _named(state) if not changes]
    return {name: leaf for name, leaf in named if isinstance(leaf, (jax.Array, np.ndarray))}


def _raw(x: Any) -> Any:
    """An array of numbers: for typed keys the one they stand for."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def marked(arrays: dict[str, Any]) -> dict[str, list[Any]]:
    """Of every array shape, dtype and a number made of its bits."""
    marks = bit_numbers(map(_raw, arrays.values()))
    return {name: [*_kind(x), mark] for (name, x), mark in zip(arrays.items(), marks, strict=True)}


def _kind(x: Any) -> list[Any]:
    return [list(x.shape), str(x.dtype)]


def form(state: TrainState) -> dict[str, Any]:
    """What a state must have in common with one that is to take its place."""
    return {
        "base": marked(base(state)),
        "arrays": {name: _kind(x) for name, x in changing(state).items()},
        "adapter": {
            path: [
                f"axes {node.axes}, blocks {node.blocks}" if isinstance(node, LoraWeight) else str(node.dtype)
            ]
            for path, node in leaves_with_path(state.trainable, is_wrapped_leaf)
        },
    }


def dropout(state: TrainState) -> dict[str, list[float]]:
    """The rates of dropout, which have a part in the curve and none in what a state computes elsewhere."""
    units = leaves_with_path(state.trainable, is_wrapped_leaf)
    return {path: [node.dropout] for path, node in units if isinstance(node, LoraWeight)}


def differences(here: Mapping[str, Any], saved: Mapping[str, Any], count: int = 20) -> str:
    """What two forms differ by, a line for every name; empty when they do not differ."""
    lines = []
    for name in {**here, **saved}:
        ours, theirs = here.get(name), saved.get(name)
        if ours is None or theirs is None:
            lines.append(f"{name}: {'not in the save' if theirs is None else 'only in the save'}")
        elif ours[:2] != theirs[:2]:
            shown = (f"{x[1]}{x[0]}" if len(x) > 1 else x[0] for x in (ours, theirs))
            lines.append("{}: {} here, {} in the save".format(name, *shown))
        elif ours != theirs:
            lines.append(f"{name}: other values")
    more = [f"and {len(lines) - count} more"] if len(lines) > count else []
    return "\n".join([*lines[:count], *more])


# --- On disk ------------------------------------------------------------------------------------------


def saved_steps(directory: Path) -> list[int]:
    """The steps of a run's whole saves, in order."""
    saves = directory / FOLDER
    return sorted(ocp.utils.checkpoint_steps(saves)) if saves.is_dir() else []


def arguments(arrays: dict[str, Any], content: dict[str, Any]) -> ocp.args.Composite:
    """What orbax is to write: arrays and their description."""
    # orbax holds no array without entries.
    some = {name: _raw(x) for name, x in arrays.items() if math.prod(x.shape)}
    return ocp.args.Composite(state=ocp.args.PyTreeSave(some), run=ocp.args.JsonSave(_sealed(content)))


def amend(directory: Path, content: dict[str, Any]) -> None:
    """Give a whole save another description."""
    file = directory / FOLDER / str(content["step"]) / _DESCRIPTION
    new = file.with_suffix(".new")
    new.write_text(json.dumps(_sealed(content)))
    os.replace(new, file)


def _sealed(content: dict[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, "crc32": _crc(content), "content": content}


def _crc(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


@contextlib.contextmanager
def _reading(directory: Path, step: int) -> Iterator[None]:
    """Say of any failure in the body, whatever library it comes from, that the save is damaged."""
    try:
        yield
    except (RunError, PermissionError):
        raise
    except Exception as error:
        cause = (str(error).strip().splitlines() or [""])[0][:200]
        others = [n for n in saved_steps(directory) if n != step]
        it = "it" if others else "it and metrics.jsonl"
        onward = f"goes on from step {others[-1]}" if others else "starts again"
        raise RunError(
            f"the save in {str(directory / FOLDER / str(step))!r} is damaged ({type(error).__name__}: "
            f"{cause}). Restore that folder from a copy, or move {it} away: then the run {onward}."
        ) from None


def check_format(directory: Path, number: int) -> None:
    """Refuse what a later version wrote."""
    if number > FORMAT:
        raise RunError(
            f"the run in {str(directory)!r} has format {number} and this version of lora_jax "
            f"reads formats up to {FORMAT}; install a newer one: pip install --upgrade lora-jax."
        )


def description(directory: Path, step: int) -> dict[str, Any]:
    """The description of a save."""
    with _reading(directory, step):
        sealed = json.loads((directory / FOLDER / str(step) / _DESCRIPTION).read_text())
        check_format(directory, sealed["format"])
        if _crc(sealed["content"]) != sealed["crc32"]:
            raise ValueError("the checksum of its description is wrong")
        return sealed["content"]


def restored(directory: Path, content: dict[str, Any], state: TrainState, form: dict[str, Any]) -> TrainState:
    """The state that a save holds, on the base of another and laid out as its arrays are.

    Args:
        directory: The run's.
        content: The save's description.
        state: The other state.
        form: What the other state must have in common with the save; `dropout` need not be in it.
    """
    saved = content | {"arrays": {name: kind[:2] for name, kind in content["arrays"].items()}}
    # The first saves that were ever made had no `dropout`.
    parts = [part for part in ("adapter", "base", "dropout") if part in form and part in saved]
    here, there = (
        d["arrays"] | {f"{part}/{name}": x for part in parts for name, x in d[part].items()}
        for d in (form, saved)
    )
    if lines := differences(here, there):
        rates = ", for dropout by wrap(..., dropout=...)" if "dropout/" in lines else ""
        raise RunError(
            f"the run in {str(directory)!r} was saved with another base, adapter or optimizer:\n{lines}\n"
            f"Give those that it was started with{rates}, or another directory."
        )
    forms = {name: _raw(x) for name, x in changing(state).items()}

    def layout(x: Any) -> ocp.RestoreArgs:
        if isinstance(x, jax.Array) and x.committed:
            return ocp.ArrayRestoreArgs(sharding=x.sharding)
        # What is bound to no device is to stay so: a step on other devices may follow.
        return ocp.RestoreArgs(restore_type=np.ndarray)

    with _reading(directory, content["step"]):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(
                directory / FOLDER / str(content["step"]) / "state",
                args=ocp.args.PyTreeRestore(
                    restore_args={name: layout(x) for name, x in forms.items() if math.prod(x.shape)}
                ),
            )
        arrays = {}
        for name, like in forms.items():
            new = found.get(name, like)
            # A copy, since a step gives its memory away.
            arrays[name] = new if isinstance(new, jax.Array) and new is not like else jnp.array(new)
        marks = dict(zip(arrays, bit_numbers(arrays.values()), strict=True))
        for name, mark in marks.items():
            if mark != content["arrays"][name][2]:
                raise ValueError(f"{name} has other bits than were saved")

    leaves = []
    for name, changes, leaf in _named(state):
        if changes:
            key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            new = arrays[name]
            leaf = jax.random.wrap_key_data(new, impl=jax.random.key_impl(leaf)) if key else new
        leaves.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


# --- The best of several --------------------------------------------------------------------------------


def best_step(numbers: Mapping[int, Mapping[str, float]], name: str, mode: str) -> int | None:
    """The step whose number of this name is the least ("min") or the greatest ("max").

    Of equal ones it is the last; None if there is no such number but NaN.

    >>> best_step({1: {"loss": 2.0}, 2: {"loss": 1.0}, 3: {}}, "loss", "min")
    2
    """
    known = {step: held[name] for step, held in numbers.items() if not math.isnan(held.get(name, math.nan))}
    sign = 1 if mode == "max" else -1
    return max(known, key=lambda step: (sign * known[step], step), default=None)
