"""Training runs on disk: saved while they go on, and resumed where they were.

A run's directory holds `run.json`, which says that it is one, by what number its best save is known, and
whether a save was ever whole; `metrics.jsonl`, a line for every `log`; and `checkpoints/STEP`, the saves (see
saves.py).
"""

from __future__ import annotations

import base64
import contextlib
import inspect
import json
import operator
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.core import Tracer
from jax.experimental import multihost_utils

from lora_jax import saves
from lora_jax.files import local_path
from lora_jax.saves import RunError
from lora_jax.train import TrainState

_MARK = "run.json"
_METRICS = "metrics.jsonl"
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

    What the save does not hold is the caller's to keep the same: the settings of the optimizer and its
    schedule, `loss_fn`, and what the data are. Rates of dropout are compared, and must be the same. The key
    is the save's, so another one in the new state changes nothing.

    Saving is asynchronous: arrays are copied to the host, and the loop goes on while they are written. A
    save that was not finished does not count. When the loop ends by itself the last state is saved at
    once, and after a `break` when the run is left. On SIGTERM the step is finished and saved, and
    SystemExit(143) ends the program; code behind the loop does not run. Any other exception, Ctrl-C among
    them, leaves the saves as they are; one that `save` had asked for in that step is still made. Catch
    KeyboardInterrupt outside of the `with`: caught inside, it leaves a half-done body that is saved as whole.

    Of several processes all run the same loop, on one directory that all of them see. Each has its own
    `data`; they stop at the same step when one of them is told to.

    A step is saved once. After the loop numbers and lines are added to its save, and a `state` that was
    put in the place of the saved one is refused; a Run is entered once.

    In the directory `run.json`, `metrics.jsonl` and `checkpoints` are the run's, and files and folders of
    other names are left alone. The lines of `metrics.jsonl` up to the last save must stay, and in
    `checkpoints` every folder whose name is a number is a save.

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
        best: The name of a number given to `save`; the save with the best one is kept as well. Once
            there is such a save the run goes on under the same name and mode alone.
        mode: Whether the best is the least ("min") or the greatest ("max").
        steps: How many steps the run has in all, where the data does not end.

    Raises:
        TypeError: `state` is no `TrainState`, or `data` has no position.
        ValueError: an option does not make sense. When the run is entered: the directory holds something
            else; its saves or lines of its metrics are lost; a save is damaged or of a newer format; it was
            made for another base, other trained arrays, rates of dropout or another optimizer, with a list of
            the differences;
            its best save is known by another name.
        OSError: the directory cannot be written.

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
        self.directory = local_path(directory)
        self.steps = _count("steps", steps, 0)
        self._every, self._keep = _count("every", every, 1), _count("keep", keep, 1)
        self._best = _best(best, mode)
        self._state = _checked(state)
        self._data = data
        self._saves = self.directory / saves.FOLDER
        self._manager: Any = None
        self._is_first = jax.process_index() == 0
        self._in_body = False  # whether a batch was given and the loop did not come round since
        self._before: str | None = None  # the data's position before a batch that no step has taken yet
        self._asked: dict[str, float] | None = None  # the numbers of a save at the end of the body
        self._lines: list[tuple[int, dict[str, Any]]] = []  # logged, and not written yet
        self._writing: int | None = None  # the step whose save may not be whole yet
        self._stop = False
        self._replaced = False  # whether `state` is another than when it was last saved
        self._left = False

    # --- Entering and leaving ---------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._manager is not None:
            raise RuntimeError(f"the run in {str(self.directory)!r} is open; enter it once.")
        if self._left:
            raise RuntimeError(
                f"this Run in {str(self.directory)!r} was left; to go on make another one: with "
                "Run(directory, state, data, ...) as run."
            )
        with contextlib.ExitStack() as undo:
            self._iterator = _iterator(self._data)
            self._position(check=True)
            with _writable(self.directory):
                _check_ours(self.directory)
                if self._is_first:
                    self._claim(undo)
                    undo.callback(shutil.rmtree, self._saves / _TRASH, ignore_errors=True)
                _check_not_lost(self.directory)
            self._resume()
            # Nothing was touched before all was found in order.
            with _writable(self.directory):
                size = _size(self.directory / _METRICS, self._line_count, self.step)
                if self._is_first:
                    self._note(undo)
                    self._saves.mkdir(exist_ok=True)
                    self._file = undo.enter_context(open(self.directory / _METRICS, "ab"))
                    self._file.truncate(size)
                    if self._line_count and not size:  # somebody has emptied it: those lines are given up
                        self._line_count = self._content["lines"] = 0
                        saves.amend(self.directory, self._content)
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
            mark.touch()
        _lock(undo, mark)
        if not mark.stat().st_size:  # only with the lock, since several may start at once
            mark.write_text(json.dumps({"lora_jax": "run", "format": saves.FORMAT}) + "\n")

    def _resume(self) -> None:
        """Take what the newest save holds."""
        # Every save is looked at, for the numbers that say which is the best.
        contents = [saves.description(self.directory, n) for n in saves.saved_steps(self.directory)]
        self._numbers = {content["step"]: content["metrics"] for content in contents}
        self._check_best()
        self._base = saves.base(self._state)
        self._form = saves.form(self._state) | {"dropout": saves.dropout(self._state)}
        if contents:
            self._content = contents[-1]
            self._state = saves.restored(self.directory, self._content, self._state, self._form)
            self._set_position(self._content["positions"])
        else:
            self._check_unspent()
        self._replaced = False
        self.step = self._content["step"] if contents else int(self._state.step)
        self._saved = self.step if contents else None
        self._line_count = self._content["lines"] if contents else 0

    def _check_best(self) -> None:
        """Refuse to go on in a way that deletes the save which was the best until now."""
        known = _known_best(self.directory)
        if known is None or known == self._best:
            return
        name, mode = known
        step = saves.best_step(self._numbers, name, mode)
        if step is not None:
            raise RunError(
                f"the run in {str(self.directory)!r} keeps the save of step {step}, the best by {name!r}; "
                f"write best={name!r}, mode={mode!r}. To let it go, take 'best' out of "
                f"{str(self.directory / _MARK)!r}."
            )

    def _note(self, undo: contextlib.ExitStack) -> None:
        """Say in run.json by what the best is known, and whether a save was ever whole."""
        known = _read_mark(self.directory)
        new = {name: value for name, value in known.items() if name not in ("best", "mode", "saved")}
        if self._best is not None:
            new |= {"best": self._best[0], "mode": self._best[1]}
        self._noted = self._saved is not None
        if self._noted:
            new["saved"] = True
        if new != known:
            mark = self.directory / _MARK
            file = mark.with_suffix(".new")
            file.write_text(json.dumps(new) + "\n")
            _lock(undo, file)  # before it has the name by which others find it
            os.replace(file, mark)

    def _opened(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Kept(self),
            # Renamed at once and deleted later, so that a kill leaves no half of a checkpoint.
            todelete_subdir=_TRASH,
            cleanup_tmp_directories=True,
            # A folder that cannot be made is an error at once, and not a thread that waits for it.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
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

        before, process = signal.getsignal(signal.SIGTERM), os.getpid()

        def handler(number: int, frame: Any) -> None:
            if os.getpid() == process:
                self._stop = True
            elif callable(before):  # in a child that inherited the handler it is as if there were no run
                before(number, frame)
            elif before != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)

        signal.signal(signal.SIGTERM, handler)
        undo.callback(signal.signal, signal.SIGTERM, signal.SIG_DFL if before is None else before)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            with self._undo:
                if error is None:
                    self._save(self._asked or {})
                elif self._asked is None:
                    # What was logged may say why it went wrong, if it can be had.
                    with contextlib.suppress(Exception):
                        self._write()
                else:
                    try:
                        self._save(self._asked)
                    except Exception as other:
                        error.add_note(f"The save of step {self.step} was asked for and not made: {other}")
                self._wait()
        finally:
            self._manager, self._left = None, True
        if error is None and self._stop:
            raise SystemExit(_STOPPED)

    # --- The loop -----------------------------------------------------------------------------------

    @property
    def state(self) -> TrainState:
        """The state: to be read, and replaced by every step."""
        return self._state

    @state.setter
    def state(self, new: TrainState) -> None:
        self._replaced |= _checked(new) is not self._state
        self._state = new
        if self._in_body and self._before is not None:
            self._before = None
            self.step += 1

    def __iter__(self) -> Iterator[Any]:
        if self._manager is not None and self._in_body and self._before is not None:
            # A loop was left before the step: the next one begins with that batch.
            self._in_body = False
            if self._iterator is not None:
                self._iterator.set_state(_unpack(self._before))
        return self

    def __next__(self) -> Any:
        if self._manager is None:
            raise RuntimeError("the run is not open; write: with Run(...) as run: for batch in run: ...")
        self._come_round()
        if self.steps is not None and self.step >= self.steps:
            self._save({})
            raise StopIteration
        self._check_unspent()
        self._before = self._position()
        try:
            batch = self._data(self.step) if self._iterator is None else next(self._iterator)
        except StopIteration:
            self._save({})
            raise
        self._in_body = True
        return batch

    def __len__(self) -> int:
        """The steps that are left, where `steps` is given: what a progress bar asks for."""
        if self.steps is None:
            raise TypeError("the number of steps is not known; give Run(..., steps=...).")
        if not hasattr(self, "step"):
            raise RuntimeError("where the run goes on is not known before: with Run(...) as run: len(run).")
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

    def save(self, *wrong: Any, **metrics: Any) -> None:
        """Save this step, when the loop's body is through: what it still does and logs belongs to it.

        When a loop has ended by itself its state is saved already, and the numbers are added to that save.
        So are those of a second call in one step; of equal names the later number counts.

        Args:
            *wrong: Nothing: numbers are given by name.
            **metrics: Numbers to keep with the save, such as `val_loss`; among them the one that
                `Run(best=...)` names, if any are given.

        Raises:
            ValueError: the number that `best` names is missing.
            TypeError: what is given is no number.
            RuntimeError: the step is saved already, and `state` was replaced since by another one.
            FileNotFoundError: files of the run were deleted or moved.
        """
        if self._manager is None:
            raise RuntimeError("the run is not open; write: with Run(...) as run: ... run.save().")
        if wrong:
            raise TypeError(
                f"save was given {_shown(wrong[0])}; write a name for it, as run.save(val_loss=0.5)."
            )
        for name, value in metrics.items():
            if not _is_number(value) or np.ndim(value):
                raise TypeError(f"save was given {name}={_shown(value)}; write a number: {name}=float(...).")
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
        known = (self._asked or self._numbers.get(self.step, {})) | numbers
        if numbers and self._best is not None and self._best[0] not in known:
            raise ValueError(
                f"save was given {sorted(numbers)}, and the best is known by {self._best[0]!r}; "
                f"write run.save({self._best[0]}=...)."
            )
        if self._in_body:
            self._asked = (self._asked or {}) | numbers
        else:
            self._save(numbers)

    def _save(self, numbers: dict[str, float]) -> None:
        self._asked = None
        self._check_there()
        self._write()
        if self.step != self._saved:
            self._start_save(numbers)
            return
        numbers = {} if self._replaced else numbers
        if numbers or self._line_count != self._content["lines"]:
            self._amend(numbers)
        if self._replaced:
            raise RuntimeError(
                f"step {self.step} is saved already, and run.state is another one now, which that save does "
                "not hold. Replace run.state in the loop's body, before the step is saved, or start a Run "
                "in another directory with the new state."
            )

    def _start_save(self, numbers: dict[str, float]) -> None:
        self._check_unspent()
        arrays = saves.changing(self._state)
        taken = int(self._state.step)
        if taken != self.step:
            raise ValueError(
                f"run.state has taken {taken} steps and the loop {self.step}: every batch must be one step "
                "of a state that counts them, as make_train_step does."
            )
        base = saves.base(self._state)
        moved = {name: x for name, x in base.items() if x is not self._base.get(name)}
        if moved:  # by the first step, to where the others are; the bits must be what they were
            known = {name: self._form["base"].get(name) for name in moved}
            if lines := saves.differences(saves.marked(moved), known):
                raise ValueError(
                    f"the steps have changed the frozen base, which is not saved:\n{lines}\nWhat an "
                    "nnx.Module mutates must be a Variable that is no nnx.Param, such as nnx.BatchStat."
                )
            self._base = base
        position = self._position(check=True) if self._before is None else self._before
        content = {
            **self._form,
            "arrays": saves.marked(arrays),
            "step": self.step,
            "positions": _gathered(position),
            "lines": self._line_count,
            "metrics": numbers,
        }
        self._wait()
        if self._is_first:
            os.fsync(self._file.fileno())  # the lines that the save counts must last as long as it does
            shutil.rmtree(self._saves / _TRASH, ignore_errors=True)  # else it grows, and holds equal names
        self._writing = self.step
        self._numbers[self.step] = numbers
        with self._saving():
            self._manager.save(self.step, args=saves.arguments(arrays, content), force=True)
        self._saved, self._content, self._replaced = self.step, content, False

    def _amend(self, numbers: dict[str, float]) -> None:
        """Add numbers, and the lines that were logged since, to the save of this step."""
        self._wait()
        self._numbers[self.step] = self._numbers[self.step] | numbers
        self._content |= {"lines": self._line_count, "metrics": self._numbers[self.step]}
        if self._is_first:
            saves.amend(self.directory, self._content)
        if numbers:  # by which another save may be the best
            steps = self._manager.all_steps()
            for step in set(steps) - self._kept(steps):
                self._manager.delete(step)

    def _kept(self, steps: Sequence[int]) -> set[int]:
        """Which of the saves are to be kept."""
        kept = set(steps if self._keep is None else sorted(steps)[-self._keep :])
        if self._best is not None:
            best = saves.best_step({step: self._numbers[step] for step in steps}, *self._best)
            kept |= set() if best is None else {best}
        return kept

    def _check_unspent(self) -> None:
        arrays = jax.tree.leaves((self._state.trainable, self._state.opt_state))
        if any(isinstance(x, jax.Array) and x.is_deleted() for x in arrays):
            raise RuntimeError(
                "run.state is spent: a step took its arrays and gave a new state that run.state does not "
                "have. Write: run.state, metrics = step(run.state, batch); and for every Run make a state of "
                "its own: lora_jax.TrainState.create(wrapped, tx, key)."
            )

    def _check_there(self) -> None:
        if not (self.directory / _MARK).exists():
            lost = f"directory {str(self.directory)!r}"
        elif not self._saves.is_dir():
            lost = f"folder of saves {str(self._saves)!r}"
        elif self._is_first and not _is_open(self._file, self.directory / _METRICS):
            lost = f"file {str(self.directory / _METRICS)!r}"
        else:
            return
        raise FileNotFoundError(
            f"the run's {lost} was deleted or moved while the run went on, so step {self.step} cannot be "
            "saved; leave it until the run has ended."
        )

    def _wait(self) -> None:
        with self._saving():
            self._manager.wait_until_finished()
        if self._writing is not None and self._is_first and not self._noted:
            self._check_there()
            self._note(self._undo)
        self._writing = None

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._check_there()
            whole = [step for step in saves.saved_steps(self.directory) if step != self._writing]
            onward = f"goes on from step {whole[-1]}" if whole else "begins anew"
            error.add_note(
                f"Step {self._writing} of the run in {str(self.directory)!r} could not be saved. Started "
                f"again, the run {onward}."
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
        line may hold: numbers, strings, arrays of numbers, and dicts and lists of those. Several lines may
        belong to one step.

        Args:
            metrics: Names and values. `step`, if it is among them as in those of a train step, says
                which step they belong to; else it is `run.step`.

        Raises:
            TypeError: `metrics` is no dict with strings as names, or JSON does not hold what is in it.
            RuntimeError: one of the arrays was given to a step, which took its memory.
            FileNotFoundError: the file was deleted or moved; told when the line is written.
        """
        if self._manager is None:
            raise RuntimeError("the run is not open; write: with Run(...) as run: ... run.log(metrics).")
        if not isinstance(metrics, Mapping):
            raise TypeError(
                f"run.log was given {_shown(metrics)}; write names and values: run.log({{'loss': loss}})."
            )
        try:
            line = {"step": self.step} | _loggable(metrics, "metrics")
        except RecursionError:
            raise TypeError(
                "run.log was given a dict or list that contains itself, or one nested too deep; write "
                "numbers and names."
            ) from None
        step = line["step"]
        if isinstance(step, bool) or not (
            isinstance(step, int)
            or (isinstance(step, jax.Array) and not step.shape and jnp.issubdtype(step.dtype, jnp.integer))
        ):
            raise TypeError(
                f"run.log was given 'step': {_shown(step)}, and that names the step a line belongs to; write "
                f"an integer, leave it out (it is {self.step}), or take another name for what it is."
            )
        if self._is_first:
            self._lines.append((self.step, line))

    def _write(self, before: int | None = None) -> None:
        """Write the lines that were logged before a step; all of them by default."""
        count = sum(before is None or step < before for step, _ in self._lines)
        lines, self._lines = self._lines[:count], self._lines[count:]
        if lines:
            self._check_there()
        for _, line in lines:
            _loggable(line, "metrics")  # once more, since a step may have taken an array
            text = json.dumps(line, default=lambda x: np.asarray(x).tolist())
            self._file.write(text.encode() + b"\n")
            self._line_count += 1
        if lines:
            self._file.flush()


class _Kept(ocp.checkpoint_managers.PreservationPolicy):
    """orbax's question which saves to keep, answered by a run."""

    def __init__(self, run: Run):
        self._run = run

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        kept = self._run._kept([info.step for info in checkpoints])
        return [info.step in kept for info in checkpoints]


def restore(
    directory: str | os.PathLike[str],
    state: TrainState,
    step: int | None = None,
    *,
    best: str | None = None,
    mode: Literal["min", "max"] | None = None,
) -> TrainState:
    """Read a state out of a run's directory, for use outside of the run. Nothing there is touched.

    Args:
        directory: That of the `Run`, which may still go on.
        state: The form of what is read, as for `Run`: the same base, and arrays of the same shapes. Its
            rates of dropout may be others.
        step: Which save; by default the newest.
        best: The name of a number given to `save`: the save that has the best one is read. A run that was
            given `best` has kept the best by that name alone, and no other is read.
        mode: Whether the best is the least ("min") or the greatest ("max"); by default as the run has it,
            and the least where it was given no `best`.

    Returns:
        The `TrainState` that was saved, with the base's arrays of `state`.

    Raises:
        FileNotFoundError: there is no such save.
        ValueError: as for `Run`; `step` and `best` are both given; `best` or `mode` is not the run's.

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
    step, by = _count("step", step, 0), _best(best, "min" if mode is None else mode)
    if step is not None and by is not None:
        raise ValueError(f"step={step} and best={best!r} are both given; write the one or the other.")
    path = local_path(directory)
    known = _known_best(path)
    if by is not None and known is not None:
        if by[0] != known[0] or mode not in (None, known[1]):
            raise RunError(
                f"the run in {str(path)!r} keeps the best by {known[0]!r}, mode {known[1]!r}, and was asked "
                f"for best={best!r}, mode={by[1]!r}; write best={known[0]!r}, or the step of another save."
            )
        by = known
    form = saves.form(state)
    while True:
        saved = saves.saved_steps(path)
        try:
            content = saves.description(path, _chosen(path, saved, step, by))
            return saves.restored(path, content, state, form)
        except RunError:
            # A run that goes on deletes a save once it has a newer one.
            if saves.saved_steps(path) == saved:
                raise


def _chosen(path: Path, saved: list[int], step: int | None, by: tuple[str, str] | None) -> int:
    """Which of the saves `restore` is to read."""
    if not saved:
        raise FileNotFoundError(f"there is no save in {str(path)!r}; write the directory of a Run.")
    if by is not None:
        step = saves.best_step({n: saves.description(path, n)["metrics"] for n in saved}, *by)
        if step is None:
            raise FileNotFoundError(f"no save in {str(path)!r} has a {by[0]!r}; write run.save({by[0]}=...).")
    if step is not None and step not in saved:
        raise FileNotFoundError(f"there is no save of step {step} in {str(path)!r}; there are {saved}.")
    return saved[-1] if step is None else step


# --- What is given ------------------------------------------------------------------------------------


def _checked(state: Any) -> TrainState:
    if not isinstance(state, TrainState):
        raise TypeError(
            f"the state is a {type(state).__name__}; write lora_jax.TrainState.create(wrapped, tx, key), "
            "and in the loop run.state, metrics = step(run.state, batch)."
        )
    return state


def _count(name: str, value: Any, least: int) -> int | None:
    if value is None:
        return None
    with contextlib.suppress(TypeError):
        if not isinstance(value, bool) and operator.index(value) >= least:
            return operator.index(value)
    raise ValueError(f"{name} is {value!r}; write an integer of at least {least}, or None.")


def _best(best: Any, mode: Any) -> tuple[str, str] | None:
    """The name of the number by which the best is known, and whether it is the least or the greatest."""
    if mode not in ("min", "max"):
        raise ValueError(f"mode is {mode!r}; write 'min' or 'max'.")
    if best is None:
        if mode != "min":
            raise ValueError(f"mode is {mode!r} and best is not given; write best='accuracy', mode={mode!r}.")
        return None
    if not isinstance(best, str) or not best:
        raise ValueError(f"best is {best!r}; write the name of a number given to save, as 'val_loss'.")
    return best, mode


# --- The directory ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _writable(directory: Path) -> Iterator[None]:
    """Say of what the system refuses which directory it was for."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"a run cannot be kept here ({error.strerror}); write another directory",
            str(directory),
        ) from error


def _read_mark(directory: Path) -> dict[str, Any]:
    """What run.json says; nothing if there is none, or an empty one that is being made."""
    mark = directory / _MARK
    if not mark.exists() or not mark.stat().st_size:
        return {}
    known: dict[str, Any] = {}
    try:
        known = json.loads(mark.read_text())
        ours = known["lora_jax"] == "run" and isinstance(known["format"], int)
    except (ValueError, TypeError, KeyError):
        ours = False
    if not ours:
        raise RunError(f"{str(mark)!r} is not what a run writes; write another directory, or move it away.")
    saves.check_format(directory, known["format"])
    best, mode = known.get("best"), known.get("mode", "min")
    if not (best is None or (isinstance(best, str) and best)) or mode not in ("min", "max"):
        raise RunError(
            f"{str(mark)!r} has 'best': {best!r}, 'mode': {mode!r}; write there the name of a number, and "
            "'min' or 'max', or take both out."
        )
    return known


def _known_best(directory: Path) -> tuple[str, str] | None:
    """By what number, and which mode, a run in a directory knows its best save."""
    known = _read_mark(directory)
    return None if known.get("best") is None else (known["best"], known.get("mode", "min"))


def _check_not_lost(directory: Path) -> None:
    """Refuse to start over where there were saves."""
    metrics, folder = directory / _METRICS, directory / saves.FOLDER
    if not metrics.exists() or not metrics.stat().st_size or saves.saved_steps(directory):
        return
    if not folder.is_dir() or _read_mark(directory).get("saved"):
        raise RunError(
            f"{str(metrics)!r} has the lines of a run, and its saves in {str(folder)!r} are gone. Restore "
            "that folder from a copy; to start again from step 0, move the file away."
        )


def _is_open(file: Any, path: Path) -> bool:
    """Whether a path leads to a file that was opened, and to no other."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def _check_ours(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise RunError(f"{str(directory)!r} is a file; write a directory for the run.")
    # Looked for before run.json, which a run that starts at the same time makes first.
    foreign = [name for name in (_METRICS, saves.FOLDER) if (directory / name).exists()]
    if not _read_mark(directory) and foreign:
        raise RunError(
            f"{str(directory)!r} holds {' and '.join(foreign)}, and no {_MARK} that says they are a run's; "
            "write another directory, or move them away."
        )


def _lock(undo: contextlib.ExitStack, mark: Path) -> None:
    """Keep every other `Run` away, until this one is left or its process ends in whatever way."""
    at_work = RuntimeError(
        "another process, or another Run in this one, is at work on the run in "
        f"{str(mark.parent)!r}; end it, or write another directory."
    )
    try:
        import fcntl
    except ImportError:  # Windows
        return
    file = undo.enter_context(open(mark, "r+"))
    try:
        # Not lockf, whose lock is gone once anything in the process has closed the same file.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise at_work from None
    except OSError:  # a file system without locks
        pass
    if not _is_open(file, mark):  # it was replaced before the lock was had
        raise at_work


# --- The data's position ------------------------------------------------------------------------------


def _iterator(data: Any) -> Any:
    """The data's iterator; None for a function of the step."""
    iterator = iter(data) if hasattr(data, "__iter__") else None
    if hasattr(iterator, "get_state") and hasattr(iterator, "set_state"):
        return iterator
    if iterator is None and callable(data):
        try:
            signature = inspect.signature(data)
        except (TypeError, ValueError):  # of some builtins it cannot be had
            return None
        try:
            signature.bind(0)
        except TypeError as error:
            raise TypeError(
                f"data is a function that cannot be called with the step alone: {error}. Write data=lambda "
                "step: batch."
            ) from None
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


def _size(file: Path, count: int, step: int) -> int:
    """The bytes of the first so many lines, those that a save was made with; what follows them is dropped.

    Only a last line may be torn, and blank lines may follow. A file that somebody has emptied is one without
    lines.
    """
    size = found = 0
    if file.exists():
        with open(file, "rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                if found >= count and not line.strip():
                    continue
                found += 1
                try:
                    known = isinstance(json.loads(line)["step"], int)
                except (ValueError, KeyError, TypeError):
                    known = False
                if not known:
                    raise RunError(
                        f"{str(file)!r}, line {found}: {line[:60]!r} is no line that run.log wrote; repair "
                        f"it, or empty the file: then the curve starts at step {step}."
                    )
                size += len(line) if found <= count else 0
        if not file.stat().st_size:
            return 0
    if found < count:
        raise RunError(
            f"{str(file)!r} has lost lines: {found} are there, and the save of step {step} was made when "
            f"there were {count}. Restore it from a copy; to go on without them, leave an empty file there: "
            f"then the curve starts at step {step}."
        )
    return size


def _is_number(value: Any) -> bool:
    """Whether a value is a real number or an array of them."""
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        kinds = (np.bool_, np.integer, np.floating)
        return not isinstance(value, Tracer) and any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
    if not isinstance(value, (bool, int, float)):
        return False
    try:
        float(value)
    except OverflowError:  # an integer greater than any float
        return False
    return True


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 1000:  # Python may refuse to write it
        return f"an integer of {value.bit_length()} bits, more than a float holds"
    is_array = isinstance(value, (jax.Array, np.ndarray))
    return f"{value.dtype}{list(value.shape)}" if is_array else repr(value)[:60]


def _loggable(value: Any, name: str) -> Any:
    """A value as JSON will hold it, but for a device's arrays."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(
                    f"run.log was given {name}[{key!r}]; write a string as its name: {str(key)!r}."
                )
        return {key: _loggable(x, f"{name}[{key!r}]") for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_loggable(x, f"{name}[{i}]") for i, x in enumerate(value)]
    if value is None or isinstance(value, str):
        return value
    if not _is_number(value):
        raise TypeError(
            f"run.log was given {name} = {_shown(value)}; write a number, a string, an array of real "
            "numbers, or a dict or list of those."
        )
    if isinstance(value, jax.Array):
        if value.is_deleted():
            raise RuntimeError(
                f"run.log was given {name}, an array that a step has taken since; log a copy: jnp.copy(...)."
            )
        if not value.is_fully_addressable and not value.is_fully_replicated:
            raise TypeError(
                f"run.log was given {name}, of which other processes hold parts; log a number made of it, "
                "such as its mean."
            )
        return value
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
