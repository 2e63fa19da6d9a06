"""Training runs on disk: saved while they go on, and resumed where they were.

A run's directory holds `run.json`, which says that it is one; `metrics.jsonl`, a line for every logged
step; and `checkpoints/STEP`, an orbax checkpoint each: `state`, the arrays by name, and `run`, a JSON
object with what else there is to know, the bits of every array and of the base as numbers among it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import shutil
import signal
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lora_jax import nnx
from lora_jax.files import local_path
from lora_jax.params import bit_numbers
from lora_jax.train import TrainState
from lora_jax.tree import leaves_with_path, path_str
from lora_jax.weight import LoraWeight, is_wrapped_leaf

FORMAT = 1
"""The version written into every save; a save of a newer version is refused."""

_MARK = "run.json"
_METRICS = "metrics.jsonl"
_SAVES = "checkpoints"
_TRASH = "deleted"
_STOPPED = 128 + signal.SIGTERM  # how a shell reports a process that SIGTERM ended


class Run:
    """A training run in a directory: one object owns resuming, saving and SIGTERM.

    The loop stays a loop. It goes on where the last save was: with that state, at that batch, and with
    `metrics.jsonl` cut back to it, so that on one device a run that was killed at any moment and started
    again by the same command has, bit for bit, the curve of one that was never killed.

    A save holds what changes: the trained arrays, the optimizer's state, the step, the key, the position
    of the data, and of an `nnx.Module` its Variables that are no `nnx.Param` (statistics, counts,
    caches). The frozen base is never written. Its fingerprint is, and a run does not go on with another.

    Saving is asynchronous: arrays are copied to the host, and the loop goes on while they are written. A
    save that was not finished does not count. When the loop ends, by itself or by `break`, the last state
    is saved. On SIGTERM the step is finished and saved, and SystemExit(143) ends the program; code behind
    the loop does not run. Any other exception, Ctrl-C among them, leaves the last save as it is.

    Of several processes all run the same loop, on one directory that all of them see. Each has its own
    `data`; they stop at the same step when one of them is told to.

    Args:
        directory: Where the run lives; made if it is not there. Relative paths and `~` are understood.
        state: The state to start from, and the form of what is restored: restored arrays take its
            shapes, dtypes and shardings. To go on with another mesh, or another number of processes,
            make the state there.
        data: The batches: an iterable whose iterator has `get_state` and `set_state`, which take and
            give JSON or bytes (grain's datasets and loaders have them), or a function of the step, 0
            first, that returns a batch. `get_state` is called before every batch.
        every: Save after so many steps; None saves at the end, on SIGTERM and when asked.
        keep: How many of the last saves to keep; None keeps all.
        best: The name of a number given to `save`; the save with the best one is kept as well.
        mode: Whether the best is the least ("min") or the greatest ("max").
        steps: How many steps the run has in all, where the data does not end.

    Raises:
        TypeError: `state` is no `TrainState`, or `data` has no position.
        ValueError: an option does not make sense. When the run is entered: the directory holds something
            else; a save is damaged or of a newer format; it was made for another base, other trained
            arrays or another optimizer, with a list of the differences.

    >>> import optax, tempfile, lora_jax
    >>> from lora_jax import checkpoint
    >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((8, 4), jnp.float32)}, rank=2, targets="kernel")
    >>> tx = optax.sgd(1e-2)
    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((batch @ params["kernel"]) ** 2)
    >>> step = lora_jax.make_train_step(loss_fn, tx)
    >>> def train(directory, steps):
    ...     state = lora_jax.TrainState.create(wrapped, tx, jax.random.key(0))
    ...     data = lambda i: jnp.full((2, 8), i, jnp.float32)
    ...     with checkpoint.Run(directory, state, data, every=2, steps=steps) as run:
    ...         for batch in run:
    ...             run.state, metrics = step(run.state, batch)
    ...             run.log(metrics)
    ...     return int(run.state.step)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     train(folder, steps=3), train(folder, steps=5)
    (3, 5)
    """

    directory: Path
    """Where the run lives."""
    step: int
    """The steps that `state` has taken: a number of the host, which waits for no device."""
    steps: int | None
    """How many steps the run has in all, if that is known."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        state: TrainState,
        data: Any,
        *,
        every: int | None = 500,
        keep: int | None = 2,
        best: str | None = None,
        mode: Literal["min", "max"] = "min",
        steps: int | None = None,
    ):
        for name, value, least in (("every", every, 1), ("keep", keep, 1), ("steps", steps, 0)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name} is {value!r}; write an integer of at least {least}, or None.")
        if best is not None and not isinstance(best, str):
            raise ValueError(f"best is {best!r}; write the name of a number given to save, as 'val_loss'.")
        self.directory = local_path(directory)
        self.steps = steps
        self._state = _checked(state)
        self._data, self._every, self._keep = data, every, keep
        self._best = None if best is None else (best, _sign(mode))
        self._saves = self.directory / _SAVES
        self._manager: Any = None
        self._is_first = jax.process_index() == 0
        self._in_body = False  # whether a batch was given and the loop did not come round since
        self._before: str | None = None  # the data's position before a batch that no step has taken yet
        self._asked: dict[str, float] | None = None  # the numbers of a save at the end of the body
        self._lines: list[tuple[int, Mapping[str, Any]]] = []
        self._writing: int | None = None  # the step whose save may not be whole yet
        self._stop = False

    # --- Entering and leaving ---------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._manager is not None:
            raise RuntimeError(f"the run in {str(self.directory)!r} is open; enter it once.")
        with contextlib.ExitStack() as undo:
            self._iterator = _iterator(self._data)
            self._position(check=True)
            _check_ours(self.directory)
            if self._is_first:
                self._claim(undo)
                undo.callback(shutil.rmtree, self._saves / _TRASH, ignore_errors=True)
            self._resume()
            if self._is_first:
                # Nothing was touched before all was found in order.
                _cut(self.directory / _METRICS, self._saved)
                self._file = undo.enter_context(open(self.directory / _METRICS, "a", encoding="utf-8"))
            manager = self._opened()
            undo.callback(manager.close)
            self._catch_sigterm(undo)
            self._manager, self._undo = manager, undo.pop_all()
        return self

    def _claim(self, undo: contextlib.ExitStack) -> None:
        """Mark the directory as a run's, and keep other processes away."""
        self.directory.mkdir(parents=True, exist_ok=True)
        mark = self.directory / _MARK
        if not mark.exists():
            new = mark.with_suffix(".new")
            new.write_text(json.dumps({"lora_jax": "run", "format": FORMAT}) + "\n")
            os.replace(new, mark)
        _lock(undo.enter_context(open(mark, "r+")), self.directory)

    def _resume(self) -> None:
        """Take what the newest save holds."""
        # Every save is looked at, since the manager will read them all.
        contents = [_content(self.directory, step) for step in _saved_steps(self.directory)]
        self._base, self._form = _base(self._state), _form(self._state)
        if contents:
            self._state = _restored(self.directory, contents[-1], self._state, self._form)
            self._set_position(contents[-1]["positions"])
        self.step = contents[-1]["step"] if contents else int(self._state.step)
        self._saved = self.step if contents else None

    def _opened(self) -> ocp.CheckpointManager:
        policies = ocp.checkpoint_managers
        policy: Any = policies.LatestN(self._keep)
        more: dict[str, Any] = {}
        if self._best is not None:
            name, sign = self._best

            def quality(metrics: Mapping[str, float]) -> float:
                return _quality(metrics, name, sign)

            best = policies.BestN(get_metric_fn=quality, n=1, keep_checkpoints_without_metrics=False)
            policy = policies.AnyPreservationPolicy([policy, best])
            more = {"best_fn": quality}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            # Renamed at once and deleted later, so that a kill leaves no half of a checkpoint.
            todelete_subdir=_TRASH,
            cleanup_tmp_directories=True,
            # A folder that cannot be made is an error at once, and not a thread that waits for it.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            **more,
        )
        return ocp.CheckpointManager(self._saves, options=options)

    def _catch_sigterm(self, undo: contextlib.ExitStack) -> None:
        self._synchronised = jax.distributed.is_initialized()
        if self._synchronised:
            try:
                multihost_utils.reached_preemption_sync_point(self.step)
                return  # jax catches the signal of any process, and tells all of them
            except RuntimeError:  # by jax_enable_preemption_service the user has turned it off
                self._synchronised = False
                if jax.process_count() > 1:
                    return
        if threading.current_thread() is not threading.main_thread():
            return  # only there can a signal be caught

        def handler(*_: Any) -> None:
            self._stop = True

        before = signal.signal(signal.SIGTERM, handler)
        undo.callback(signal.signal, signal.SIGTERM, signal.SIG_DFL if before is None else before)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            with self._undo:
                if error is None:
                    self._save(self._asked or {})
                else:
                    # What was logged may say why it went wrong, if it can be had.
                    with contextlib.suppress(Exception):
                        self._write()
                self._wait()
        finally:
            self._manager = None
        if error is None and self._stop:
            raise SystemExit(_STOPPED)

    # --- The loop -----------------------------------------------------------------------------------

    @property
    def state(self) -> TrainState:
        """The state: to be read, and replaced by every step."""
        return self._state

    @state.setter
    def state(self, new: TrainState) -> None:
        self._state = _checked(new)
        if self._in_body and self._before is not None:
            self._before = None
            self.step += 1

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._manager is None:
            raise RuntimeError("the run is not open; write: with Run(...) as run: for batch in run: ...")
        self._come_round()
        if self.steps is not None and self.step >= self.steps:
            raise StopIteration
        self._before = self._position()
        batch = self._data(self.step) if self._iterator is None else next(self._iterator)
        self._in_body = True
        return batch

    def __len__(self) -> int:
        """The steps that are left, where `steps` is given: what a progress bar asks for."""
        if self.steps is None:
            raise TypeError("the number of steps is not known; give Run(..., steps=...).")
        return max(0, self.steps - self.step)

    def _come_round(self) -> None:
        came, self._in_body = self._in_body, False
        if came:
            if self._before is not None:
                raise RuntimeError(
                    "the loop's body left run.state as it was; write: run.state, metrics = step(run.state, "
                    "batch). A batch that is to be left out must be filtered out of the data."
                )
            self._write(before=self.step)
            if self._writing is not None and not self._manager.is_saving_in_progress():
                self._wait()  # for nothing but the error it may have ended with
        stop = self._told_to_stop()
        if came and (stop or self._asked is not None or self._every and self.step % self._every == 0):
            self._save(self._asked or {})
        if stop:
            raise SystemExit(_STOPPED)

    def _told_to_stop(self) -> bool:
        if self._synchronised:
            return multihost_utils.reached_preemption_sync_point(self.step)
        return self._stop

    # --- Saving -------------------------------------------------------------------------------------

    def save(self, **metrics: Any) -> None:
        """Save this step, when the loop's body is through: what it still does and logs belongs to it.

        Args:
            **metrics: Numbers to keep with the save, such as `val_loss`; among them the one that
                `Run(best=...)` names, if any are given.

        Raises:
            ValueError: the number that `best` names is missing, or the step was saved before, with
                other numbers.
            TypeError: what is given is no number.
        """
        if self._manager is None:
            raise RuntimeError("the run is not open; write: with Run(...) as run: ... run.save().")
        numbers = {}
        for name, value in jax.device_get(metrics).items():
            if isinstance(value, str) or np.ndim(value):
                raise TypeError(f"save was given {name}={value!r}; write a number.")
            numbers[name] = float(value)
        if numbers and self._best is not None and self._best[0] not in numbers:
            raise ValueError(
                f"save was given {sorted(numbers)}, and the best is known by {self._best[0]!r}; "
                f"write run.save({self._best[0]}=...)."
            )
        if self._in_body:
            self._asked = (self._asked or {}) | numbers
        else:
            self._save(numbers)

    def _save(self, metrics: dict[str, float]) -> None:
        self._asked = None
        self._write()
        if self.step != self._saved:
            self._start_save(metrics)
        elif metrics:
            raise ValueError(f"step {self.step} was saved before; its numbers cannot be changed any more.")

    def _start_save(self, metrics: dict[str, float]) -> None:
        arrays = _changing(self._state)
        spent = [name for name, x in arrays.items() if isinstance(x, jax.Array) and x.is_deleted()]
        if spent:
            raise RuntimeError(
                "run.state is spent: a step took its arrays and gave a new state that run.state does not "
                "have. Write: run.state, metrics = step(run.state, batch)."
            )
        taken = int(self._state.step)
        if taken != self.step:
            raise ValueError(
                f"run.state has taken {taken} steps and the loop {self.step}: every batch must be one step "
                "of a state that counts them, as make_train_step does."
            )
        base = _base(self._state)
        moved = {name: x for name, x in base.items() if x is not self._base.get(name)}
        if moved:  # by the first step, to where the others are; the bits must be what they were
            known = {name: self._form["base"].get(name) for name in moved}
            if lines := _differences(_marked(moved), known):
                raise ValueError(
                    f"the steps have changed the frozen base, which is not saved:\n{lines}\nWhat an "
                    "nnx.Module mutates must be a Variable that is no nnx.Param, such as nnx.BatchStat."
                )
            self._base = base
        position = self._position(check=True) if self._before is None else self._before
        content = {
            **self._form,
            "arrays": _marked(arrays),
            "step": self.step,
            "positions": _gathered(position),
            "metrics": metrics,
        }
        self._wait()
        if self._is_first:
            shutil.rmtree(self._saves / _TRASH, ignore_errors=True)  # else it grows, and holds equal names
        self._writing = self.step
        with self._saving():
            self._manager.save(
                self.step,
                args=ocp.args.Composite(
                    # orbax holds no array without entries.
                    state=ocp.args.PyTreeSave({k: _raw(x) for k, x in arrays.items() if math.prod(x.shape)}),
                    run=ocp.args.JsonSave({"format": FORMAT, "crc32": _crc(content), "content": content}),
                ),
                metrics=metrics if self._best is not None else None,
                force=True,
            )
        self._saved = self.step

    def _wait(self) -> None:
        with self._saving():
            self._manager.wait_until_finished()
        self._writing = None

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            error.add_note(
                f"Step {self._writing} of the run in {str(self.directory)!r} could not be saved. The saves "
                "before it are whole; started again, the run goes on from the last of them."
            )
            raise

    # --- The data's position ------------------------------------------------------------------------

    def _position(self, check: bool = False) -> str:
        return _FUNCTION if self._iterator is None else _pack(self._iterator.get_state(), check)

    def _set_position(self, positions: Sequence[str]) -> None:
        count = jax.process_count()
        if len(positions) != count and len(set(positions)) > 1:
            raise ValueError(
                f"the run in {str(self.directory)!r} was saved by {len(positions)} processes, whose data "
                f"had come to different positions; {count} cannot share them. Go on with as many."
            )
        mine = positions[jax.process_index() if len(positions) == count else 0]
        if (mine == _FUNCTION) != (self._iterator is None):
            was = "a function of the step" if mine == _FUNCTION else "an iterator"
            raise ValueError(
                f"the run in {str(self.directory)!r} was saved with {was} as its data; give the same kind."
            )
        if self._iterator is not None:
            self._iterator.set_state(_unpack(mine))

    # --- metrics.jsonl --------------------------------------------------------------------------------

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Write a line of `metrics.jsonl`: {"step": n, ...}, with every digit of every number.

        Arrays are fetched when the step after is under way, so that logging waits for no device. What a
        line may hold: numbers, strings, arrays, and dicts and lists of those. Several lines may belong to
        one step.

        Args:
            metrics: Names and values. `step`, if it is among them as in those of a train step, says
                which step they belong to; else it is `run.step`.
        """
        if self._manager is None:
            raise RuntimeError("the run is not open; write: with Run(...) as run: ... run.log(metrics).")
        if self._is_first:
            self._lines.append((self.step, dict(metrics)))

    def _write(self, before: int | None = None) -> None:
        """Write the lines that were logged before a step; all of them by default."""
        count = sum(before is None or step < before for step, _ in self._lines)
        lines, self._lines = self._lines[:count], self._lines[count:]
        for (step, _), metrics in zip(lines, jax.device_get([m for _, m in lines]), strict=True):
            line = {"step": step} | jax.tree.map(_plain, metrics)
            try:
                self._file.write(json.dumps(line) + "\n")
            except (TypeError, ValueError) as error:
                raise TypeError(f"run.log was given {metrics!r}, which is no JSON: {error}.") from None
        if lines:
            self._file.flush()


def restore(
    directory: str | os.PathLike[str],
    state: TrainState,
    step: int | None = None,
    *,
    best: str | None = None,
    mode: Literal["min", "max"] = "min",
) -> TrainState:
    """Read a state out of a run's directory, for use outside of the run. Nothing there is touched.

    Args:
        directory: That of the `Run`, which may still go on.
        state: The form of what is read, as for `Run`: the same base, and arrays of the same shapes.
        step: Which save; by default the newest.
        best: The name of a number given to `save`: the save that has the best one is read.
        mode: Whether the best is the least ("min") or the greatest ("max").

    Returns:
        The `TrainState` that was saved, with the base's arrays of `state`.

    Raises:
        FileNotFoundError: there is no such save.
        ValueError: as for `Run`.

    >>> import optax, tempfile, lora_jax
    >>> from lora_jax import checkpoint
    >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((8, 4))}, rank=2, targets="kernel")
    >>> state = lora_jax.TrainState.create(wrapped, optax.sgd(1e-2), jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with checkpoint.Run(folder, state, lambda step: None) as run:
    ...         run.save(val_loss=0.5)
    ...     int(checkpoint.restore(folder, state, best="val_loss").step)
    0
    """
    _checked(state)
    path, sign = local_path(directory), _sign(mode)
    saved = _saved_steps(path)
    if not saved:
        raise FileNotFoundError(f"there is no save in {str(path)!r}; write the directory of a Run.")
    if step is not None and step not in saved:
        raise FileNotFoundError(f"there is no save of step {step} in {str(path)!r}; there are {saved}.")
    if best is not None:
        numbers = {n: _content(path, n)["metrics"] for n in saved if step in (None, n)}
        if not any(best in numbers[n] for n in numbers):
            raise FileNotFoundError(f"no save in {str(path)!r} has a {best!r}; write run.save({best}=...).")
        step = max(numbers, key=lambda n: (_quality(numbers[n], best, sign), n))
    return _restored(path, _content(path, saved[-1] if step is None else step), state, _form(state))


# --- What a state holds -------------------------------------------------------------------------------


def _checked(state: Any) -> TrainState:
    if not isinstance(state, TrainState):
        raise TypeError(
            f"the state is a {type(state).__name__}; write lora_jax.TrainState.create(wrapped, tx, key), "
            "and in the loop run.state, metrics = step(run.state, batch)."
        )
    return state


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


def _changing(state: TrainState) -> dict[str, Any]:
    arrays = {name: leaf for name, changes, leaf in _named(state) if changes}
    for name, leaf in arrays.items():
        if not isinstance(leaf, (jax.Array, np.ndarray)):
            raise TypeError(
                f"{name!r} of the state is a {type(leaf).__name__}; write an array, as TrainState.create "
                "does."
            )
    return arrays


def _raw(x: Any) -> Any:
    """An array of numbers: for typed keys the one they stand for."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _base(state: TrainState) -> dict[str, Any]:
    named = [(name, leaf) for name, changes, leaf in _named(state) if not changes]
    return {name: leaf for name, leaf in named if isinstance(leaf, (jax.Array, np.ndarray))}


def _marked(arrays: dict[str, Any]) -> dict[str, list[Any]]:
    """Of every array shape, dtype and a number made of its bits."""
    marks = bit_numbers(map(_raw, arrays.values()))
    return {name: [*_kind(x), mark] for (name, x), mark in zip(arrays.items(), marks, strict=True)}


def _kind(x: Any) -> list[Any]:
    return [list(x.shape), str(x.dtype)]


def _form(state: TrainState) -> dict[str, Any]:
    """What a state must have in common with one that is to take its place."""
    return {
        "base": _marked(_base(state)),
        "arrays": {name: _kind(x) for name, x in _changing(state).items()},
        "adapter": {
            path: [
                f"axes {node.axes}, blocks {node.blocks}" if isinstance(node, LoraWeight) else str(node.dtype)
            ]
            for path, node in leaves_with_path(state.trainable, is_wrapped_leaf)
        },
    }


def _differences(here: Mapping[str, Any], saved: Mapping[str, Any], count: int = 20) -> str:
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


# --- A save on disk -----------------------------------------------------------------------------------


class _RunError(ValueError):
    """An error that already names the directory and what is wrong with it."""


def _saved_steps(directory: Path) -> list[int]:
    saves = directory / _SAVES
    return sorted(ocp.utils.checkpoint_steps(saves)) if saves.is_dir() else []


def _check_ours(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise _RunError(f"{str(directory)!r} is a file; write a directory for the run.")
    mark = directory / _MARK
    if mark.exists():
        try:
            known = json.loads(mark.read_text())["lora_jax"] == "run"
        except (ValueError, TypeError, KeyError):
            known = False
        if not known:
            raise _RunError(
                f"{str(mark)!r} is not what a run writes; write another directory, or move it away."
            )
        return
    foreign = [name for name in (_METRICS, _SAVES) if (directory / name).exists()]
    if foreign:
        raise _RunError(
            f"{str(directory)!r} holds {' and '.join(foreign)}, and no {_MARK} that says they are a run's; "
            "write another directory, or move them away."
        )


@contextlib.contextmanager
def _reading(directory: Path, step: int) -> Iterator[None]:
    """Say of any failure in the body, whatever library it comes from, that the save is damaged."""
    try:
        yield
    except (_RunError, PermissionError):
        raise
    except Exception as error:
        cause = (str(error).strip().splitlines() or [""])[0][:200]
        others = [n for n in _saved_steps(directory) if n != step]
        onward = f"goes on from step {others[-1]}" if others else "starts again"
        raise _RunError(
            f"the save in {str(directory / _SAVES / str(step))!r} is damaged ({type(error).__name__}: "
            f"{cause}). Restore that folder from a copy, or move it away: then the run {onward}."
        ) from None


def _content(directory: Path, step: int) -> dict[str, Any]:
    with _reading(directory, step):
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            sealed: Any = checkpointer.restore(directory / _SAVES / str(step) / "run")
        if sealed["format"] > FORMAT:
            raise _RunError(
                f"the run in {str(directory)!r} has format {sealed['format']} and this version of lora_jax "
                f"reads formats up to {FORMAT}; install a newer one: pip install --upgrade lora-jax."
            )
        if _crc(sealed["content"]) != sealed["crc32"]:
            raise ValueError("the checksum of its description is wrong")
        return sealed["content"]


def _crc(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _restored(
    directory: Path, content: dict[str, Any], state: TrainState, form: dict[str, Any]
) -> TrainState:
    """The state that a save holds, on the base of another and laid out as its arrays are."""
    saved = content | {"arrays": {name: kind[:2] for name, kind in content["arrays"].items()}}
    here, there = (
        d["arrays"] | {f"{what}/{name}": x for what in ("adapter", "base") for name, x in d[what].items()}
        for d in (form, saved)
    )
    if lines := _differences(here, there):
        raise _RunError(
            f"the run in {str(directory)!r} was saved with another base, adapter or optimizer:\n{lines}\n"
            "Give those that it was started with, or another directory."
        )
    forms = {name: _raw(x) for name, x in _changing(state).items()}

    def layout(x: Any) -> ocp.RestoreArgs:
        if isinstance(x, jax.Array) and x.committed:
            return ocp.ArrayRestoreArgs(sharding=x.sharding)
        # What is bound to no device is to stay so: a step on other devices may follow.
        return ocp.RestoreArgs(restore_type=np.ndarray)

    with _reading(directory, content["step"]):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(
                directory / _SAVES / str(content["step"]) / "state",
                args=ocp.args.PyTreeRestore(
                    restore_args={name: layout(x) for name, x in forms.items() if math.prod(x.shape)}
                ),
            )
        arrays = {}
        for name, form in forms.items():
            new = found.get(name, form)
            # A copy, since a step gives its memory away.
            arrays[name] = new if isinstance(new, jax.Array) and new is not form else jnp.array(new)
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


def _lock(file: Any, directory: Path) -> None:
    """Keep every other `Run` away, until this one is left or its process ends in whatever way."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        # Not lockf, whose lock is gone once anything in the process has closed the same file.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise RuntimeError(
            f"another process, or another Run in this one, is at work on the run in {str(directory)!r}; end "
            "it, or write another directory."
        ) from None
    except OSError:  # a file system without locks
        pass


def _sign(mode: str) -> int:
    if mode not in ("min", "max"):
        raise ValueError(f"mode is {mode!r}; write 'min' or 'max'.")
    return 1 if mode == "max" else -1


def _quality(metrics: Mapping[str, float], name: str, sign: int) -> float:
    value = metrics.get(name, math.nan)
    return -math.inf if math.isnan(value) else sign * value


# --- The data's position ------------------------------------------------------------------------------


def _iterator(data: Any) -> Any:
    """The data's iterator; None for a function of the step."""
    iterator = iter(data) if hasattr(data, "__iter__") else None
    if hasattr(iterator, "get_state") and hasattr(iterator, "set_state"):
        return iterator
    if iterator is None and callable(data):
        return None
    raise TypeError(
        f"data is a {type(data).__name__}, which has no position to save. Give a function of the step, "
        "data=lambda step: batch, or an iterable whose iterator has get_state() and set_state(), as "
        "those of grain do: data=grain.MapDataset.source(examples).shuffle(seed=0).batch(8)."
    )


_FUNCTION = "a function"  # the position of one: the step is all there is to it


def _pack(position: Any, check: bool = False) -> str:
    """A position as text at once, since an iterator may go on to change the object it gave."""
    if isinstance(position, bytes):
        return json.dumps({"bytes": base64.b64encode(position).decode()})
    with contextlib.suppress(TypeError, ValueError):
        text = json.dumps({"json": position})
        if not check or json.loads(text)["json"] == position:
            return text
    raise TypeError(
        f"the data's get_state() gave {position!r}, which JSON does not hold as it is; return bytes, or "
        "dicts with strings as keys, lists, numbers and strings."
    )


def _unpack(text: str) -> Any:
    held = json.loads(text)
    return base64.b64decode(held["bytes"]) if "bytes" in held else held["json"]


def _gathered(text: str) -> list[str]:
    """What every process has, in their order."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(data.size, np.int32))
    rows = multihost_utils.process_allgather(np.pad(data, (0, int(max(sizes)) - data.size)))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


# --- metrics.jsonl ------------------------------------------------------------------------------------


def _cut(file: Path, step: int | None) -> None:
    """Drop the lines of later steps, and a last one that was not finished; without a save, all of them."""
    if not file.exists():
        return
    size = 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                at = int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                raise _RunError(
                    f"{str(file)!r}, line {number}: {line[:60]!r} is no line that run.log wrote; repair it, "
                    "or move the file away: then the curve starts where the run goes on."
                ) from None
            if step is None or at > step:
                break
            size += len(line)
    if size < file.stat().st_size:
        os.truncate(file, size)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
