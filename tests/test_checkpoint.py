"""A run that is stopped, killed or moved goes on as if nothing had happened, and nothing is lost."""

import dataclasses
import functools
import json
import os
import pathlib
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import zlib
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from newest import newest
from tqdm import tqdm

from experiments.kills import run as kills
from lora_jax import checkpoint, saves
from lora_jax.params import merge, wrap
from lora_jax.train import TrainState, make_train_step

ROOT = pathlib.Path(__file__).parent.parent
TX = optax.adam(1e-2)
STEPS = 9


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax's Adam and Flax's BatchNorm do not run under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def make_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "up": {"kernel": jax.random.normal(keys[0], (6, 16), jnp.float32), "bias": jnp.zeros(16)},
        "head": {"kernel": jax.random.normal(keys[1], (16, 3), jnp.float32)},
    }


def loss_fn(params, batch, key):
    h = jnp.tanh(batch @ params["up"]["kernel"] + params["up"]["bias"])
    return jnp.mean((h @ params["head"]["kernel"]) ** 2) + 1e-3 * jax.random.normal(key)


STEP = make_train_step(loss_fn, TX)


def make_state(params=None, tx=TX, **kwargs):
    options = {"rank": 2, "train": "head", "dropout": 0.2, "key": jax.random.key(1)} | kwargs
    return TrainState.create(wrap(params or make_params(), **options), tx, jax.random.key(2))


def bits(tree):
    def data(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return [(str(x.dtype), x.shape, np.asarray(data(x)).tobytes()) for x in jax.tree.leaves(tree)]


def batch_of(index):
    return np.random.default_rng(index).standard_normal((4, 6)).astype(np.float32)


class Bytes:
    """An iterator that ends by itself, with a generator's state as its position."""

    def __init__(self, size=STEPS):
        self.rng, self.left = np.random.default_rng(0), size

    def __iter__(self):
        return self

    def __next__(self):
        if not self.left:
            raise StopIteration
        self.left -= 1
        return self.rng.standard_normal((4, 6)).astype(np.float32)

    def get_state(self) -> Any:
        return pickle.dumps((self.rng.bit_generator.state, self.left))

    def set_state(self, state):
        self.rng.bit_generator.state, self.left = pickle.loads(state)


def grain_dataset():
    examples = grain.MapDataset.range(13).seed(0).shuffle().map(lambda i: batch_of(i)[0])
    return examples.repeat().batch(4).to_iter_dataset(grain.ReadOptions(num_threads=1))


def grain_loader():
    class Source:
        def __len__(self):
            return 13

        def __getitem__(self, index):
            return batch_of(index)[0]

        def __repr__(self):  # which grain compares
            return "batches"

    sampler = grain.samplers.IndexSampler(13, shuffle=True, seed=0, num_epochs=9)
    return grain.DataLoader(
        data_source=Source(), sampler=sampler, operations=[grain.transforms.Batch(4, drop_remainder=True)]
    )


DATA = {"a function": lambda: batch_of, "bytes": Bytes, "grain": grain_dataset, "a loader": grain_loader}


def go(
    directory, data: Any = batch_of, stop=None, how: Any = None, steps=STEPS, state=None, step=STEP, **kwargs
):
    """Train; after `stop` steps `how` ends it."""
    run = checkpoint.Run(directory, state or make_state(), data, every=2, steps=steps, **kwargs)
    with run:
        run.first = run.step
        for batch in run:
            run.state, metrics = step(run.state, batch)
            run.log(metrics)
            if run.step == stop:
                how()
    return run


def crash():
    raise ZeroDivisionError


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@functools.cache
def unbroken(kind):
    """The curve and the last state of a run that nothing happened to."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder, jax.numpy_dtype_promotion("standard"):
        run = go(folder, DATA[kind]())
        return (pathlib.Path(folder) / "metrics.jsonl").read_bytes(), bits(run.state)


# --- Going on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DATA)
def test_a_broken_run_is_the_unbroken_one(tmp_path, kind):
    for stop in (1, 5):
        with pytest.raises(ZeroDivisionError):
            go(tmp_path, DATA[kind](), stop, crash)
    run = go(tmp_path, DATA[kind]())
    assert run.first == 4
    assert ((tmp_path / "metrics.jsonl").read_bytes(), bits(run.state)) == unbroken(kind)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, STEPS + 1))


def test_the_state_goes_on_and_not_only_the_curve(tmp_path):
    with pytest.raises(ZeroDivisionError):
        go(tmp_path, stop=5, how=crash)
    given = make_state()
    with checkpoint.Run(tmp_path, given, batch_of) as run:
        assert (run.step, int(run.state.step)) == (4, 4)
        assert jax.tree.structure(run.state) == jax.tree.structure(given)
        for new, form in zip(jax.tree.leaves(run.state), jax.tree.leaves(given), strict=True):
            assert new.aval == form.aval
            assert (new.sharding, new.committed) == (form.sharding, form.committed)
        assert run.state.frozen["up"]["kernel"].w is given.frozen["up"]["kernel"].w
        assert bits(run.state.trainable) != bits(given.trainable)


def test_a_restored_state_compiles_nothing_anew(tmp_path, compilations):
    step = make_train_step(loss_fn, TX)
    go(tmp_path, steps=3, step=step)
    with checkpoint.Run(tmp_path, make_state(), batch_of, steps=5) as run:
        with compilations() as compiled:
            for batch in run:
                run.state, _ = step(run.state, batch)
            jax.block_until_ready(run.state)
    assert compiled == []


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = go(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = go(tmp_path, stop=STEPS, how=crash)
    assert (again.first, again.step) == (STEPS, STEPS)
    assert bits(again.state) == bits(first.state)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert go(tmp_path, steps=STEPS + 2).step == STEPS + 2


def test_data_that_end_end_the_run(tmp_path):
    run = go(tmp_path, Bytes(3), steps=None)
    assert run.step == 3
    assert go(tmp_path, Bytes(3), steps=None).first == 3
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("before", [True, False], ids=["before its step", "after it"])
def test_break_saves_what_was_done_and_the_batch_that_was_not_used(tmp_path, before):
    with checkpoint.Run(tmp_path, make_state(), Bytes(), every=None) as run:
        for batch in run:
            if before and run.step == 3:
                break
            run.state, metrics = STEP(run.state, batch)
            run.log(metrics)
            if run.step == 3 and not before:
                break
    run = go(tmp_path, Bytes())
    assert run.first == 3
    assert ((tmp_path / "metrics.jsonl").read_bytes(), bits(run.state)) == unbroken("bytes")


@pytest.mark.parametrize("kind", ["a function", "bytes"])
def test_an_error_behind_the_loop_loses_nothing(tmp_path, kind):
    with pytest.raises(ZeroDivisionError):
        with checkpoint.Run(tmp_path, make_state(), DATA[kind](), every=None, steps=STEPS) as run:
            for batch in run:
                run.state, metrics = STEP(run.state, batch)
                run.log(metrics)
            run.log({"note": "is logged again by the code behind the loop"})
            crash()
    run = go(tmp_path, DATA[kind]())
    assert run.first == STEPS
    assert ((tmp_path / "metrics.jsonl").read_bytes(), bits(run.state)) == unbroken(kind)


@pytest.mark.parametrize("behind", [True, False], ids=["behind a break", "in the body"])
def test_a_save_that_was_asked_for_stands_when_an_error_follows(tmp_path, behind):
    with pytest.raises(ZeroDivisionError):
        with checkpoint.Run(tmp_path, make_state(), Bytes(), every=None, best="val") as run:
            for batch in run:
                run.state, metrics = STEP(run.state, batch)
                run.log(metrics)
                if run.step == 3:
                    run.save(val=0.5)
                    if behind:
                        break
                    crash()
            crash()
    assert numbers_of(tmp_path, 3) == {"val": 0.5}
    run = go(tmp_path, Bytes(), best="val")
    assert run.first == 3
    assert ((tmp_path / "metrics.jsonl").read_bytes(), bits(run.state)) == unbroken("bytes")


def test_an_asked_save_that_cannot_be_made_does_not_hide_the_error(tmp_path):
    with pytest.raises(ZeroDivisionError) as error:
        with checkpoint.Run(tmp_path, make_state(), batch_of) as run:
            for batch in run:
                run.save()
                STEP(run.state, batch)
                crash()
    (note,) = error.value.__notes__
    assert note.startswith("The save of step 0 was asked for and not made: run.state is spent")
    assert saved(tmp_path) == []


def numbers_of(directory, step):
    return saves.description(directory, step)["metrics"]


def test_numbers_that_come_after_the_save_are_added_and_count_for_the_best(tmp_path):
    def train(steps, val):
        with checkpoint.Run(
            tmp_path, make_state(), batch_of, every=None, keep=1, best="val", steps=steps
        ) as run:
            for batch in run:
                run.state, _ = STEP(run.state, batch)
                if run.step == 2:
                    run.save(val=1.0, other=1)
                    run.save(other=2)
            run._wait()
            assert saved(tmp_path)[-1] == steps
            run.save(val=val, more=3)
        return bits(run.state)

    train(4, val=2.0)
    assert saved(tmp_path) == [2, 4]
    assert numbers_of(tmp_path, 2) == {"val": 1.0, "other": 2.0}
    assert numbers_of(tmp_path, 4) == {"val": 2.0, "more": 3.0}
    train(4, val=3.0)  # a run that has ended, started again
    assert numbers_of(tmp_path, 4) == {"val": 3.0, "more": 3.0}
    last = train(6, val=0.5)
    assert saved(tmp_path) == [6]
    assert not (tmp_path / "checkpoints" / "deleted").exists()
    assert bits(checkpoint.restore(tmp_path, make_state(), best="val")) == last


def test_what_is_logged_behind_the_loop_stays_when_the_run_goes_on(tmp_path):
    for steps in (3, 5):
        with checkpoint.Run(tmp_path, make_state(), batch_of, steps=steps) as run:
            for batch in run:
                run.state, metrics = STEP(run.state, batch)
                run.log(metrics)
            run.log({"final": steps})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 3, 4, 5, 5]
    assert [line["final"] for line in lines(tmp_path) if "final" in line] == [3, 5]


def test_tqdm_shows_what_is_left(tmp_path):
    go(tmp_path, steps=3)
    with checkpoint.Run(tmp_path, make_state(), batch_of, steps=5) as run:
        bar = tqdm(run, initial=run.step, total=run.steps, disable=None)
        assert (len(run), bar.total, bar.n) == (2, 5, 3)
        for batch in bar:
            run.state, _ = STEP(run.state, batch)
        assert len(run) == 0
    with pytest.raises(TypeError, match="the number of steps is not known"):
        len(checkpoint.Run(tmp_path, make_state(), batch_of))
    with pytest.raises(RuntimeError, match="where the run goes on is not known before: with Run"):
        len(checkpoint.Run(tmp_path, make_state(), batch_of, steps=5))


def test_what_is_saved_is_the_state_of_its_step_while_training_goes_on(tmp_path):
    """The step takes the arrays that are being written."""
    state, states = make_state({"kernel": jnp.ones((300, 200))}, rank=64, targets="kernel", train=None), {}
    step = make_train_step(lambda params, batch, key: jnp.mean((batch @ params["kernel"]) ** 2), TX)
    with checkpoint.Run(
        tmp_path, state, lambda i: jnp.full((2, 300), i), every=3, keep=None, steps=14
    ) as run:
        for batch in run:
            run.state, _ = step(run.state, batch)
            states[run.step] = bits(jax.tree.map(jnp.copy, run.state))
    saved = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert saved == [3, 6, 9, 12, 14]
    form = make_state({"kernel": jnp.ones((300, 200))}, rank=64, targets="kernel", train=None)
    for number in saved:
        assert bits(checkpoint.restore(tmp_path, form, number)) == states[number], number


class Net(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(params=seed, dropout=7)
        self.up = nnx.Linear(6, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)
        self.seen = nnx.BatchStat(jnp.zeros((4, 6)))  # a matrix, and no part of the base

    def __call__(self, x):
        self.seen.set_value(self.seen.get_value() + x)
        return self.head(self.drop(nnx.relu(self.norm(self.up(x)))))


def net_loss(model, batch, key):
    return jnp.mean(model(batch) ** 2)


NET_STEP = make_train_step(net_loss, TX)


def net_state(seed=0):
    return TrainState.create(wrap(Net(seed), rank=2, train="head"), TX, jax.random.key(3))


def test_what_a_module_mutates_goes_on_too(tmp_path):
    whole = go(tmp_path / "whole", state=net_state(), step=NET_STEP)
    for stop in (3, 7):
        with pytest.raises(ZeroDivisionError):
            go(tmp_path / "broken", stop=stop, how=crash, state=net_state(), step=NET_STEP)
    broken = go(tmp_path / "broken", state=net_state(), step=NET_STEP)
    assert broken.first == 6
    assert bits(broken.state) == bits(whole.state)
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")
    model = merge(broken.state.wrapped)
    assert model.drop.rngs.count.get_value() == STEPS
    assert float(jnp.abs(model.seen.get_value()).sum()) > 0
    with pytest.raises(ValueError, match="another base.*\n(.*\n)*base/up/kernel: other values"):
        go(tmp_path / "broken", state=net_state(seed=1), step=NET_STEP)


def test_a_parameter_that_the_steps_change_is_refused(tmp_path):
    class Counter(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
            self.count = nnx.Param(jnp.zeros(()))

        def __call__(self, x):
            self.count.set_value(self.count.get_value() + 1)
            return self.linear(x)

    state = TrainState.create(wrap(Counter(), rank=1, targets="linear"), TX, jax.random.key(0))
    with pytest.raises(ValueError, match="frozen base, which is not saved:\ncount: other values"):
        go(tmp_path, state=state, step=make_train_step(net_loss, TX))
    assert not (tmp_path / "checkpoints").exists() or saved(tmp_path) == []


# --- Elsewhere ----------------------------------------------------------------------------------------


def sharded(axis_type, count):
    mesh = jax.make_mesh((count,), ("x",), axis_types=(axis_type,), devices=jax.devices()[:count])
    spec = {"up": {"kernel": PartitionSpec(None, "x"), "bias": PartitionSpec("x")}}
    spec |= {"head": {"kernel": PartitionSpec("x", None)}}
    where = jax.tree.map(
        lambda s: NamedSharding(mesh, s), spec, is_leaf=lambda s: isinstance(s, PartitionSpec)
    )
    return make_state(jax.device_put(make_params(), where), dropout=0.0)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_run_goes_on_on_another_mesh(tmp_path, axis_type):
    plain, last = functools.partial(make_state, dropout=0.0), None
    forms = (
        lambda: sharded(axis_type, 4),
        plain,
        lambda: sharded(axis_type, 2),
    )
    for taken, new in enumerate(forms):
        form = new()
        with checkpoint.Run(tmp_path, form, batch_of, steps=None) as run:
            assert last in (None, bits(run.state))
            for x, like in zip(jax.tree.leaves(run.state), jax.tree.leaves(form), strict=True):
                assert (x.sharding, x.committed) == (like.sharding, like.committed)
            next(run)
            trainable, moments = jax.tree.map(lambda x: x + 1, (run.state.trainable, run.state.opt_state))
            run.state = dataclasses.replace(
                run.state, trainable=trainable, opt_state=moments, step=run.state.step + 1
            )
        last = bits(run.state)
        assert run.step == taken + 1


# --- What is on disk ----------------------------------------------------------------------------------


def saved(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name != "deleted")


def test_the_base_is_never_written(tmp_path):
    base = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    state = make_state({"kernel": jnp.asarray(base)}, targets="kernel", train=None)
    step = make_train_step(lambda params, batch, key: jnp.mean((batch @ params["kernel"]) ** 2), TX)
    go(tmp_path, lambda i: jnp.ones((2, 64)), steps=2, state=state, step=step)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < base.nbytes * 4
    held = b"".join(path.read_bytes() for path in files)
    assert base.tobytes()[:64] not in held
    content = json.loads((tmp_path / "checkpoints" / "2" / "run" / "metadata").read_text())["content"]
    assert sorted(content["arrays"]) == [
        *("key", "opt_state/0/count", "opt_state/0/mu/kernel:a", "opt_state/0/mu/kernel:b"),
        *("opt_state/0/nu/kernel:a", "opt_state/0/nu/kernel:b", "step"),
        *("trainable/kernel:a", "trainable/kernel:b"),
    ]
    assert sorted(content["base"]) == ["kernel", "kernel:scale"]


def test_the_last_and_the_best_are_kept(tmp_path):
    losses = {2: 3.0, 3: 1.0, 5: 2.0, 6: float("nan"), 8: 4.0}
    for stop in (4, None):  # the best is known again after a start
        with checkpoint.Run(tmp_path, make_state(), batch_of, every=2, best="val", steps=stop or 9) as run:
            for batch in run:
                run.state, _ = STEP(run.state, batch)
                if run.step in losses:
                    run.save(val=jnp.float32(losses[run.step]), other=1)
    assert saved(tmp_path) == [3, 8, 9]
    assert int(checkpoint.restore(tmp_path, make_state(), best="val").step) == 3
    for given in ({"best": "val", "mode": "max"}, {"best": "other"}, {"best": "other", "mode": "min"}):
        message = (
            "keeps the best by 'val', mode 'min', and was asked for best=.*; write best='val', or the step"
        )
        with pytest.raises(ValueError, match=message):
            checkpoint.restore(tmp_path, make_state(), **given)
    assert int(checkpoint.restore(tmp_path, make_state(), best="val", mode="min").step) == 3
    assert int(checkpoint.restore(tmp_path, make_state()).step) == 9
    assert bits(checkpoint.restore(tmp_path, make_state())) == bits(run.state)
    with pytest.raises(FileNotFoundError, match=r"no save of step 4 in .*; there are \[3, 8, 9\]"):
        checkpoint.restore(tmp_path, make_state(), 4)


def test_without_a_best_in_the_run_any_number_tells_a_save(tmp_path):
    with checkpoint.Run(tmp_path, make_state(), batch_of, steps=2, every=None) as run:
        for batch in run:
            run.state, _ = STEP(run.state, batch)
            run.save(val=run.step)
    for mode, step in ((None, 1), ("min", 1), ("max", 2)):
        assert int(checkpoint.restore(tmp_path, make_state(), best="val", mode=mode).step) == step
    with pytest.raises(FileNotFoundError, match="has a 'loss'; write run.save"):
        checkpoint.restore(tmp_path, make_state(), best="loss")


def test_the_greatest_can_be_the_best(tmp_path):
    with checkpoint.Run(tmp_path, make_state(), batch_of, keep=1, best="acc", mode="max", steps=4) as run:
        for batch in run:
            run.state, _ = STEP(run.state, batch)
            run.save(acc={1: 0.3, 2: 0.9, 3: 0.5, 4: 0.1}[run.step])
    assert saved(tmp_path) == [2, 4]
    for given in ({}, {"mode": "max"}):
        assert int(checkpoint.restore(tmp_path, make_state(), best="acc", **given).step) == 2
    with pytest.raises(ValueError, match="by 'acc', mode 'max', and was asked for best='acc', mode='min'"):
        checkpoint.restore(tmp_path, make_state(), best="acc", mode="min")


@pytest.mark.parametrize("step", [None, 2])
def test_restore_looks_again_when_a_run_has_deleted_the_save(four_steps, tmp_path, monkeypatch, step):
    shutil.copytree(four_steps, tmp_path / "run")
    folder, real, read = tmp_path / "run" / "checkpoints", saves.description, []
    (folder / "4").rename(tmp_path / "4")

    def description(directory, step):
        read.append(step)
        if len(read) == 1:  # what the run does between the look at the folder and the read
            (tmp_path / "4").rename(folder / "4")
            (folder / "2").rename(tmp_path / "2")
        return real(directory, step)

    monkeypatch.setattr(saves, "description", description)
    if step is None:
        assert int(checkpoint.restore(tmp_path / "run", make_state()).step) == 4
        assert read == [2, 4]
    else:
        with pytest.raises(FileNotFoundError, match=r"no save of step 2 in .*; there are \[4\]"):
            checkpoint.restore(tmp_path / "run", make_state(), step)


@pytest.mark.parametrize(
    "other", [{}, {"best": "loss"}, {"best": "val", "mode": "max"}], ids=["none", "another", "the greatest"]
)
def test_the_best_is_not_lost_by_another_name(tmp_path, other):
    def train(steps, **options):
        with checkpoint.Run(tmp_path, make_state(), batch_of, keep=1, steps=steps, **options) as run:
            for batch in run:
                run.state, _ = STEP(run.state, batch)
                if run.step == 2 and options:
                    run.save(**{options["best"]: 1.0})

    train(1, best="typo")  # with no such number there is nothing to lose
    train(3, best="val")
    before = snapshot(tmp_path)
    message = "keeps the save of step 2, the best by 'val'; write best='val', mode='min'. To let it go, take"
    with pytest.raises(ValueError, match=message):
        train(5, **other)
    assert snapshot(tmp_path) == before
    mark = tmp_path / "run.json"
    assert json.loads(mark.read_text()) == {
        **{"lora_jax": "run", "format": 1},
        **{"best": "val", "mode": "min", "saved": True},
    }
    train(4, best="val")
    assert saved(tmp_path) == [2, 4]
    mark.write_text('{"lora_jax": "run", "format": 1}')
    train(5, **other)
    assert saved(tmp_path) == ([2, 5] if other.get("best") == "val" else [5])


def test_a_best_that_comes_later_is_kept_and_the_run_still_locked(tmp_path):
    go(tmp_path, steps=2)
    with checkpoint.Run(tmp_path, make_state(), batch_of, best="val", steps=2):
        assert json.loads((tmp_path / "run.json").read_text())["best"] == "val"
        with pytest.raises(RuntimeError, match="another Run in this one, is at work"):
            go(tmp_path, best="val")


def test_a_number_that_is_nan_is_no_best():
    nan = float("nan")
    assert saves.best_step({1: {"x": nan}, 2: {}}, "x", "min") is None
    assert saves.best_step({1: {"x": 3.0}, 2: {"x": nan}, 3: {"x": 3.0}, 4: {}}, "x", "max") == 3


def test_a_save_begins_when_all_that_belongs_to_it_is_written(tmp_path, monkeypatch):
    """So that a kill between the two leaves no gap in the curve."""
    real, written = ocp.CheckpointManager.save, {}

    def save(manager, step, *args, **kwargs):
        written[step] = [line["step"] for line in lines(tmp_path)]
        return real(manager, step, *args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    with checkpoint.Run(tmp_path, make_state(), batch_of, every=2, steps=5) as run:
        for batch in run:
            run.state, metrics = STEP(run.state, batch)
            if run.step == 3:
                run.save()
            run.log(metrics)
    assert written == {step: list(range(1, step + 1)) for step in (2, 3, 4, 5)}


def test_a_line_may_hold_more_than_numbers(tmp_path):
    with checkpoint.Run(tmp_path, make_state(), batch_of, steps=0) as run:
        run.log({"note": "late", "list": [jnp.float32(0.1), None], "half": jnp.bfloat16(1.5), "step": 7})
    line = {"step": 7, "note": "late", "list": [float(np.float32(0.1)), None], "half": 1.5}
    assert lines(tmp_path) == [line]


def test_a_save_that_is_not_kept_goes_at_once(tmp_path, monkeypatch):
    """It is renamed and then deleted, so that a kill leaves no half of a save."""
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
    go(tmp_path)
    assert saved(tmp_path) == [8, 9]
    deleted = tmp_path / "checkpoints" / "deleted"
    assert sorted(path.name for path in deleted.iterdir()) == ["2", "4", "6"]
    names = {
        path.relative_to(tmp_path / "checkpoints" / "8")
        for path in (tmp_path / "checkpoints" / "8").iterdir()
    }
    assert {path.relative_to(deleted / "2") for path in (deleted / "2").iterdir()} == names


def test_lines_are_written_when_the_next_step_is_under_way(tmp_path):
    written = []
    with checkpoint.Run(tmp_path, make_state(), batch_of, every=None, steps=4) as run:
        for batch in run:
            written.append(len(lines(tmp_path)))
            run.state, metrics = STEP(run.state, batch)
            run.log(metrics)
    assert written == [0, 0, 1, 2]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert lines(tmp_path)[0].keys() == {"step", "loss", "grad_norm"}


def test_a_torn_line_is_dropped_and_another_refused(tmp_path):
    go(tmp_path, steps=4)
    file = tmp_path / "metrics.jsonl"
    whole = file.read_bytes()
    for more in (b'{"step": 5, "loss": 1.0}\n{"step": 6, "lo', b'{"step": 5, "lo', b"\n", b" \n\n"):
        file.write_bytes(whole + more)
        go(tmp_path, steps=4)
        assert file.read_bytes() == whole
    file.write_bytes(b"\n" + whole)  # not behind what the save counts
    with pytest.raises(ValueError, match=r"metrics.jsonl', line 1: b'\\n' is no line"):
        go(tmp_path, steps=4)
    file.write_bytes(b"loss,step\n" + whole)
    with pytest.raises(ValueError, match=r"metrics.jsonl', line 1: b'loss,step\\n' is no line that run.log"):
        go(tmp_path, steps=4)
    assert file.read_bytes() == b"loss,step\n" + whole


@pytest.mark.parametrize(
    "more", [b'{"step": 5}\n{"step": 6}garbage\n{"step": 7}\n', b"note\n", b'{"step": "5"}\n']
)
def test_lines_of_others_are_not_dropped_in_silence(four_steps, tmp_path, more):
    directory = tmp_path / "run"
    shutil.copytree(four_steps, directory)
    file = directory / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + more)
    before = snapshot(directory)
    with pytest.raises(
        ValueError, match=r"metrics.jsonl', line [56]: .* is no line that run.log wrote; repair"
    ):
        go(directory)
    assert snapshot(directory) == before


@pytest.mark.parametrize("how", ["deleted", "cut", "torn"])
def test_lost_lines_are_told_of_and_the_way_out_works(four_steps, tmp_path, how):
    directory = tmp_path / "run"
    shutil.copytree(four_steps, directory)
    file = directory / "metrics.jsonl"
    whole = file.read_bytes()
    if how == "deleted":
        file.unlink()
    elif how == "cut":
        file.write_bytes(b"".join(whole.splitlines(keepends=True)[1:]))
    else:
        file.write_bytes(whole[:-3])
    before = snapshot(directory)
    message = (
        f"has lost lines: {0 if how == 'deleted' else 3} are there, .* step 4 was made when there were 4"
    )
    with pytest.raises(
        ValueError, match=f"{message}.*leave an empty file there: then the curve starts at step 4"
    ):
        go(directory)
    assert snapshot(directory) == before
    file.write_bytes(b"")
    with pytest.raises(ZeroDivisionError):
        go(directory, stop=5, how=crash)
    for steps in (4, STEPS, STEPS + 1):
        go(directory, steps=steps)
        assert [line["step"] for line in lines(directory)] == list(range(5, steps + 1))


@pytest.mark.parametrize("emptied", [False, True])
def test_lost_saves_are_told_of_and_the_way_out_works(four_steps, tmp_path, emptied):
    directory = tmp_path / "run"
    shutil.copytree(four_steps, directory)
    shutil.rmtree(directory / "checkpoints")
    if emptied:
        (directory / "checkpoints").mkdir()
    before = snapshot(directory)
    with pytest.raises(
        ValueError, match="metrics.jsonl' has the lines of a run, .*checkpoints' are gone. Restore"
    ):
        go(directory)
    assert snapshot(directory) == before
    (directory / "metrics.jsonl").rename(tmp_path / "away")
    with pytest.raises(ZeroDivisionError):  # before a first save there is again nothing to lose
        go(directory, stop=1, how=crash)
    assert len(lines(directory)) == 1
    assert go(directory).first == 0
    assert (directory / "metrics.jsonl").read_bytes() == unbroken("a function")[0]


def test_a_run_that_was_killed_before_its_first_save_starts_again(tmp_path):
    with pytest.raises(ZeroDivisionError):
        go(tmp_path, stop=1, how=crash)
    assert len(lines(tmp_path)) == 1
    assert (tmp_path / "checkpoints").is_dir()
    run = go(tmp_path)
    assert run.first == 0
    assert ((tmp_path / "metrics.jsonl").read_bytes(), bits(run.state)) == unbroken("a function")


def test_files_of_the_user_are_left_alone(tmp_path):
    go(tmp_path, steps=2)
    for folder in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "2"):
        (folder / "notes.txt").write_text("mine")
        (folder / "adapter").mkdir()
    assert go(tmp_path, steps=4, keep=2).first == 2
    for folder in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "2"):
        assert (folder / "notes.txt").read_text() == "mine"
        assert (folder / "adapter").is_dir()


def snapshot(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


OTHERS = {
    "base": (lambda: make_state(make_params(1)), "\nbase/up/kernel: other values\nGive those"),
    "bias": (
        lambda: make_state(make_params() | {"up": make_params()["up"] | {"bias": jnp.ones(16)}}),
        "another base, adapter or optimizer:\nbase/up/bias: other values\nGive those",
    ),
    "alpha": (lambda: make_state(alpha=7), "optimizer:\nbase/up/kernel:scale: other values\nGive those"),
    "rank": (
        lambda: make_state(rank=3),
        r"\ntrainable/up/kernel:a: float32\[6, 3\] here, float32\[6, 2\] in",
    ),
    "optimizer": (
        lambda: make_state(tx=optax.sgd(0.1, momentum=0.9)),
        r"\nopt_state/0/trace/head/kernel:value: not in the save\n(.*\n)*opt_state/0/count: only in the save",
    ),
    "targets": (lambda: make_state(train=None), "trainable/head/kernel:value: only in the save\n"),
    "dropout": (
        lambda: make_state(dropout=0.5),
        r"optimizer:\ndropout/up/kernel: 0.5 here, 0.2 in the save\nGive those .*, for dropout by wrap",
    ),
    "parts": (
        lambda: make_state(parts={"up": [(0, 8)]}),
        r"adapter/up/kernel: axes \('in', 'out'\), blocks \(\(.* here, axes .*, blocks \(\) in",
    ),
    "key": (
        lambda: TrainState.create(make_state().wrapped, TX, jax.random.key(2, impl="rbg")),
        r"key: key<rbg>\[\] here, key<fry>\[\] in the save",
    ),
}


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """A run of four steps, to be copied."""
    directory = tmp_path_factory.mktemp("run")
    with jax.numpy_dtype_promotion("standard"):
        go(directory, steps=4)
    return directory


@pytest.mark.parametrize("other", OTHERS)
def test_what_does_not_belong_to_a_run_is_refused_with_a_list(four_steps, other):
    new, message = OTHERS[other]
    before = snapshot(four_steps)
    with pytest.raises(ValueError, match=message) as error:
        go(four_steps, state=new())
    assert str(four_steps) in str(error.value)
    assert snapshot(four_steps) == before


def test_restore_takes_another_dropout(four_steps):
    state = checkpoint.restore(four_steps, make_state(dropout=0.0))
    assert bits(state) == bits(checkpoint.restore(four_steps, make_state()))
    assert state.trainable["up"]["kernel"].dropout == 0.0


def test_data_of_another_kind_are_refused(four_steps):
    with pytest.raises(ValueError, match="was saved with a function of the step as its data; give the same"):
        go(four_steps, Bytes())


def truncate(save):
    for path in (save / "state").glob("**/d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(save):
    """In an array, as a disk may do it: what reads the file sees nothing."""
    names = json.loads((save / "run" / "metadata").read_text())["content"]["arrays"]
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        as_numpy = dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray))
        arrays = checkpointer.restore(save / "state", args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        arrays["opt_state/0/mu/up/kernel:a"].view(np.uint32)[0, 0] ^= 1
        checkpointer.save(save / "state", arrays, force=True)


DAMAGES = {
    "arrays truncated": truncate,
    "arrays gone": lambda save: shutil.rmtree(save / "state"),
    "a bit flipped": flip_a_bit,
    "description truncated": lambda save: os.truncate(save / "run" / "metadata", 500),
    "description gone": lambda save: (save / "run" / "metadata").unlink(),
    "description changed": lambda save: (save / "run" / "metadata").write_text(
        (save / "run" / "metadata").read_text().replace('"step": 4', '"step": 3')
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_save_is_refused_and_the_way_out_works(four_steps, tmp_path, kind, monkeypatch):
    # Threads of orbax complain of their own when one of several reads fails.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    directory = tmp_path / "run"
    shutil.copytree(four_steps, directory)
    newest = directory / "checkpoints" / "4"
    DAMAGES[kind](newest)
    before = snapshot(directory)
    message = rf"the save in '{re.escape(str(newest))}' is damaged.*: then the run goes on from step 2\."
    with pytest.raises(ValueError, match=message):
        go(directory)
    assert snapshot(directory) == before
    shutil.move(newest, tmp_path / "away")
    run = go(directory)
    assert run.first == 2
    assert ((directory / "metrics.jsonl").read_bytes(), bits(run.state)) == unbroken("a function")


def test_of_a_damaged_only_save_the_way_out_works_too(tmp_path):
    go(tmp_path / "run", steps=1)
    (tmp_path / "run" / "checkpoints" / "1" / "run" / "metadata").write_text("")
    message = "is damaged.*, or move it and metrics.jsonl away: then the run starts again"
    with pytest.raises(ValueError, match=message):
        go(tmp_path / "run")
    for name in ("checkpoints/1", "metrics.jsonl"):
        shutil.move(tmp_path / "run" / name, tmp_path / pathlib.Path(name).name)
    assert go(tmp_path / "run", steps=2).first == 0


def test_half_a_save_does_not_count(four_steps, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(four_steps, directory)
    (directory / "checkpoints" / "4").rename(directory / "checkpoints" / "4.orbax-checkpoint-tmp")
    (directory / "checkpoints" / "deleted" / "2").mkdir(parents=True)
    assert go(directory).first == 2
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["8", "9"]


def test_a_newer_format_is_refused(four_steps, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(four_steps, directory)
    file = directory / "checkpoints" / "4" / "run" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": saves.FORMAT + 1}))
    with pytest.raises(
        ValueError, match="format 2 and this version of lora_jax reads formats up to 1; install"
    ):
        go(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2 and this version of lora_jax reads formats up to 1; install"),
        ({"best": ["a"]}, r"run.json' has 'best': \['a'\], 'mode': 'min'; write there the name"),
        ({"best": "val", "mode": 1}, "run.json' has 'best': 'val', 'mode': 1; write there"),
        ({"format": None}, "run.json' is not what a run writes"),
    ],
)
def test_another_run_json_is_refused(four_steps, tmp_path, change, message):
    directory = tmp_path / "run"
    shutil.copytree(four_steps, directory)
    file = directory / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    before = snapshot(directory)
    for call in (lambda: go(directory), lambda: checkpoint.restore(directory, make_state(), best="val")):
        with pytest.raises(ValueError, match=message):
            call()
    assert snapshot(directory) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "run.json"])
def test_a_directory_that_holds_something_else_is_refused(tmp_path, name):
    if name == "checkpoints":
        (tmp_path / name / "100").mkdir(parents=True)
    else:
        (tmp_path / name).write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*{name}.*write another directory"):
        go(tmp_path)
    assert (tmp_path / name).exists()
    (tmp_path / "notes.txt").write_text("a file of the user's own does not matter")
    with pytest.raises(ValueError, match="is a file; write a directory"):
        go(tmp_path / "notes.txt")


def test_a_save_that_fails_is_told_of_and_leaves_the_one_before(tmp_path, monkeypatch):
    real = ocp.CheckpointManager.save

    def save(manager, step, *args, **kwargs):
        if step == 4:
            raise OSError("no space left on device")
        return real(manager, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", save)
        with pytest.raises(OSError, match="no space left") as error:
            go(tmp_path)
    (note,) = error.value.__notes__
    assert re.fullmatch(
        r"Step 4 of .* could not be saved. Started again, the run goes on from step 2\.", note
    )
    run = go(tmp_path)
    assert run.first == 2
    assert ((tmp_path / "metrics.jsonl").read_bytes(), bits(run.state)) == unbroken("a function")


def test_one_run_at_a_time_in_a_process_too(tmp_path):
    with checkpoint.Run(tmp_path, make_state(), batch_of, steps=1):
        (tmp_path / "run.json").read_text()  # which closes the same file
        with pytest.raises(RuntimeError, match="another Run in this one, is at work"):
            checkpoint.Run(tmp_path, make_state(), batch_of, steps=1).__enter__()


def test_of_several_that_start_at_once_one_is_at_work(tmp_path, monkeypatch):
    real, random = pathlib.Path.exists, np.random.default_rng(0)

    def exists(path, **kwargs):  # where one may overtake another
        found = real(path, **kwargs)
        if path.parent.parent == tmp_path:
            time.sleep(random.random() / 300)
        return found

    monkeypatch.setattr(pathlib.Path, "exists", exists)
    for attempt in range(30):
        directory, runs, errors = tmp_path / str(attempt), [], []
        start = threading.Barrier(3)

        def enter(run, start=start, runs=runs, errors=errors):
            start.wait()
            try:
                runs.append(run.__enter__())
            except Exception as refused:
                errors.append(refused)

        made = [checkpoint.Run(directory, make_state(), batch_of, best="val") for _ in range(3)]
        threads = [threading.Thread(target=enter, args=(run,)) for run in made]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for run in runs:
            run.__exit__(None, None, None)
        assert (len(runs), len(errors)) == (1, 2), errors
        assert all("at work on the run" in str(error) for error in errors), errors


def test_a_run_that_was_killed_while_it_made_its_mark_starts_again(tmp_path):
    (tmp_path / "run.json").touch()
    assert go(tmp_path, steps=1).first == 0
    assert go(tmp_path, steps=2).first == 1


def test_one_process_at_a_time(tmp_path):
    go(tmp_path, steps=1)
    code = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True)"
    command = [sys.executable, "-c", f"{code}; input()", str(tmp_path / "run.json")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(
            RuntimeError, match="another process, or another Run in this one, is at work on the run in"
        ):
            go(tmp_path)
        other.communicate(b"\n")
    assert go(tmp_path).first == 1


# --- Stopping -----------------------------------------------------------------------------------------


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_finishes_the_step_saves_and_ends_the_program(tmp_path):
    before, after = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(SystemExit) as stop:
        go(tmp_path, stop=5, how=terminate)
        after.append("ran")
    assert (stop.value.code, after) == (143, [])
    assert signal.getsignal(signal.SIGTERM) is before
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    run = go(tmp_path)
    assert run.first == 5
    assert ((tmp_path / "metrics.jsonl").read_bytes(), bits(run.state)) == unbroken("a function")


def test_sigterm_in_the_last_step_ends_the_program_too(tmp_path):
    with pytest.raises(SystemExit):
        go(tmp_path, stop=STEPS, how=terminate)
    assert go(tmp_path).first == STEPS


def test_sigterm_outside_of_a_step_is_not_forgotten(tmp_path):
    with pytest.raises(SystemExit):
        with checkpoint.Run(tmp_path, make_state(), batch_of) as run:
            terminate()
            for _ in run:
                crash()
    with pytest.raises(SystemExit):
        with checkpoint.Run(tmp_path, make_state(), batch_of, steps=1) as run:
            for batch in run:
                run.state, _ = STEP(run.state, batch)
            terminate()
    assert go(tmp_path).first == 1


@pytest.mark.parametrize("own", [False, True], ids=["by default", "with a handler"])
def test_sigterm_ends_a_forked_child(tmp_path, own):
    before = signal.signal(signal.SIGTERM, (lambda *_: os._exit(7)) if own else signal.SIG_DFL)
    try:
        with checkpoint.Run(tmp_path, make_state(), batch_of, steps=1) as run:
            with warnings.catch_warnings(action="ignore"):  # of threads, which the child does not use
                child = os.fork()
            if not child:
                terminate()
                time.sleep(0.1)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == (7 if own else -signal.SIGTERM)
            assert not run._stop
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_thread_can_train(tmp_path):
    runs = []

    def target():
        with jax.numpy_dtype_promotion("standard"):
            runs.append(go(tmp_path, steps=2))

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    assert runs[0].step == 2


def test_ctrl_c_leaves_the_last_save(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, stop=3, how=interrupt)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert saved(tmp_path) == [2]
    assert go(tmp_path).first == 2


# --- Mistakes -----------------------------------------------------------------------------------------


def test_a_state_that_the_body_keeps_to_itself_is_noticed_at_once(tmp_path):
    state = make_state()
    with pytest.raises(RuntimeError, match="left run.state as it was; write: run.state, metrics = step"):
        with checkpoint.Run(tmp_path, state, batch_of) as run:
            for batch in run:
                state, _ = STEP(state, batch)
    with pytest.raises(RuntimeError, match="run.state is spent"):
        with checkpoint.Run(tmp_path / "other", make_state(), batch_of) as run:
            for batch in run:
                STEP(run.state, batch)
                break
            run._saved = None  # as if there had been steps before
            run.step += 1


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("before", [True, False], ids=["before its step", "after it"])
def test_a_second_loop_goes_on_where_the_first_was_left(tmp_path, kind, before):
    with checkpoint.Run(tmp_path, make_state(), DATA[kind](), every=2, steps=STEPS) as run:
        for stop in (3, 3, 6, None) if before else (3, 6, None):
            for batch in run:
                if before and run.step == stop:
                    break
                run.state, metrics = STEP(run.state, batch)
                run.log(metrics)
                if not before and run.step == stop:
                    break
    assert run.step == STEPS
    assert ((tmp_path / "metrics.jsonl").read_bytes(), bits(run.state)) == unbroken(kind)


def test_a_run_that_was_left_is_not_entered_again(tmp_path):
    run = go(tmp_path, steps=2)
    with pytest.raises(RuntimeError, match="was left; to go on make another one: with Run"):
        with run:
            pass
    go(tmp_path, steps=3)


@pytest.mark.parametrize("again", [False, True], ids=["behind the loop", "in a finished run"])
def test_a_state_that_takes_the_place_of_a_saved_one_is_refused(tmp_path, again):
    def train(state=None, numbers=None):
        run = checkpoint.Run(tmp_path, make_state(), batch_of, steps=3)
        run.state = make_state()  # before a start it is but the form
        with run:
            for batch in run:
                run.state, _ = STEP(run.state, batch)
            run.state = run.state
            if state is not None:
                run.log({"note": "stays"})
                run.state = state(run.state)
            if numbers:
                run.save(**numbers)
        return bits(run.state)

    if again:
        train()
    for numbers in ({"val": 1.0}, None):
        with pytest.raises(RuntimeError, match="step 3 is saved already, and run.state is another one now"):
            train(lambda state: dataclasses.replace(state, key=jax.random.key(9)), numbers)
    assert numbers_of(tmp_path, 3) == {}
    assert [line["note"] for line in lines(tmp_path)] == ["stays", "stays"]
    last = train(numbers={"val": 2.0})
    assert numbers_of(tmp_path, 3) == {"val": 2.0}
    assert bits(checkpoint.restore(tmp_path, make_state())) == last


def test_a_state_that_does_not_count_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="run.state has taken 0 steps and the loop 2: every batch must be one"
    ):
        with checkpoint.Run(tmp_path, make_state(), batch_of, every=2, steps=4) as run:
            for _ in run:
                run.state = run.state


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1, 2], "data is a list, which has no position to save. Give a function of the step"),
        ((x for x in [1]), "data is a generator, which has no position"),
        (3, "data is a int, which has no position"),
    ],
)
def test_data_without_a_position_are_refused(tmp_path, data, message):
    with pytest.raises(TypeError, match=message):
        go(tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


def test_a_function_that_takes_no_step_is_refused(tmp_path):
    for data in (lambda: batch_of(0), lambda step, epoch: batch_of(step)):
        with pytest.raises(
            TypeError, match="cannot be called with the step alone: .*. Write data=lambda step"
        ):
            go(tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("/proc/run", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=f"a run cannot be kept here .*; write another.*{place}"):
            go(place)


def test_a_directory_that_is_deleted_while_the_run_goes_on_is_told_of(tmp_path):
    directory = tmp_path / "run"
    message = (
        f"the run's directory '{directory}' was deleted or moved while the run went on, so step [34] cannot"
    )

    def delete():
        while not (directory / "checkpoints" / "2").exists():
            time.sleep(0.01)
        shutil.rmtree(directory)

    with pytest.raises(FileNotFoundError, match=message):
        go(directory, stop=3, how=delete)
    assert not directory.exists()


@pytest.mark.parametrize("logs", [True, False])
@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints"])
def test_files_that_are_deleted_while_the_run_goes_on_are_told_of(tmp_path, name, logs):
    kind = {"metrics.jsonl": "file", "checkpoints": "folder of saves"}[name]
    message = f"the run's {kind} '{tmp_path / name}' was deleted or moved while the run .*; leave it until"
    run = checkpoint.Run(tmp_path, make_state(), batch_of, every=None if logs else 4, steps=6)
    with pytest.raises(FileNotFoundError, match=message):
        with run:
            for batch in run:
                run.state, metrics = STEP(run.state, batch)
                if logs:
                    run.log(metrics)
                if run.step == 2:
                    run.save()
                if run.step == 3:
                    run._wait()
                    (tmp_path / name).rename(tmp_path / "away")
                    if name == "metrics.jsonl":  # another one is not it
                        (tmp_path / name).write_text("")
    assert run.step == 4
    if name == "metrics.jsonl":
        (tmp_path / name).unlink()
    (tmp_path / "away").rename(tmp_path / name)
    assert go(tmp_path).first == 2


def test_one_state_serves_one_run(tmp_path):
    state = make_state()
    message = "run.state is spent: .* for every Run make a state of its own"
    with checkpoint.Run(tmp_path / "a", state, batch_of) as a:
        with pytest.raises(RuntimeError, match=message):
            with checkpoint.Run(tmp_path / "b", state, batch_of) as b:
                for batch in a:
                    a.state, _ = STEP(a.state, batch)
                    next(b)
        with pytest.raises(RuntimeError, match=message):
            go(tmp_path / "c", state=state)
        run_a = bits(a.state)
    with checkpoint.Run(tmp_path / "a", state, batch_of) as again:  # here it is but the form
        assert (again.step, bits(again.state)) == (1, run_a)


def test_a_position_that_is_no_json_is_refused_at_the_start(tmp_path):
    class Tuples(Bytes):
        def get_state(self) -> Any:
            return {"state": (1, 2)}

    with pytest.raises(TypeError, match=r"get_state\(\) gave {'state': \(1, 2\)}, which JSON does not hold"):
        go(tmp_path / "run", Tuples())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0; write an integer of at least 1, or None"),
        ({"keep": 0}, "keep is 0"),
        ({"steps": -1}, "steps is -1; write an integer of at least 0"),
        ({"steps": "5"}, "steps is '5'; write an integer"),
        ({"best": True}, "best is True; write the name of a number"),
        ({"best": ""}, "best is ''; write the name of a number"),
        ({"mode": "max"}, "mode is 'max' and best is not given; write best='accuracy', mode='max'"),
        ({"best": "loss", "mode": "least"}, "mode is 'least'; write 'min' or 'max'"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.Run(tmp_path, make_state(), batch_of, **options)


def test_integers_may_be_those_of_numpy(tmp_path):
    with checkpoint.Run(tmp_path, make_state(), batch_of, steps=np.int64(5), every=np.int32(2)) as run:
        assert (len(run), type(run.steps)) == (5, int)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step": 2, "best": "val"}, "step=2 and best='val' are both given; write the one or the other"),
        ({"step": "2"}, "step is '2'; write an integer of at least 0"),
        ({"best": True}, "best is True; write the name of a number"),
        ({"mode": "max"}, "mode is 'max' and best is not given"),
    ],
)
def test_what_restore_cannot_mean_is_refused(four_steps, given, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(four_steps, make_state(), **given)


ITSELF: dict[str, Any] = {}
ITSELF["a"] = [ITSELF]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1], r"run.log was given \[1\]; write names and values: run.log\({'loss': loss}\)"),
        ({"a": 1, 2: 3}, r"run.log was given metrics\[2\]; write a string as its name: '2'"),
        ({"a": {"b": {3: 1}}}, r"was given metrics\['a'\]\['b'\]\[3\]; write a string as its name"),
        ({"x": [1, object()]}, r"was given metrics\['x'\]\[1\] = <object .*; write a number"),
        ({"x": 1j}, r"was given metrics\['x'\] = 1j; write a number"),
        ({"x": np.ones(2, np.complex64)}, r"metrics\['x'\] = complex64\[2\]; write a number"),
        ({"x": jax.random.key(0)}, r"metrics\['x'\] = key<fry>\[\]; write a number"),
        ({"step": "two"}, "was given 'step': 'two', and that names the step a line belongs to; write"),
        ({"step": 1.5}, "was given 'step': 1.5, and that names.*leave it out .it is 0., or take another"),
        ({"step": jnp.ones(2, int)}, r"was given 'step': int64\[2\]"),
        ({"step": True}, "was given 'step': True"),
        ({"step": None}, "was given 'step': None"),
        ({"a": 10**5000}, r"metrics\['a'\] = an integer of 16610 bits, more than a float holds; write"),
        ({"step": 10**400}, r"metrics\['step'\] = an integer of 1329 bits"),
        (ITSELF, "was given a dict or list that contains itself, or one nested too deep"),
    ],
)
def test_what_no_line_can_hold_is_refused_when_it_is_logged(tmp_path, given, message):
    with checkpoint.Run(tmp_path, make_state(), batch_of, steps=0) as run:
        with pytest.raises(TypeError, match=message):
            run.log(given)
        run.log({"step": jnp.int32(3), "x": np.float32(0.5), "y": jnp.ones(2), "z": (np.bool_(True), None)})
    assert lines(tmp_path) == [{"step": 3, "x": 0.5, "y": [1.0, 1.0], "z": [True, None]}]


def test_a_logged_array_that_a_step_takes_is_told_of(tmp_path):
    message = r"given metrics\['b'\], an array that a step has taken since; log a copy: jnp.copy"
    with pytest.raises(RuntimeError, match=message):
        with checkpoint.Run(tmp_path, make_state(), batch_of, steps=3) as run:
            for batch in run:
                run.log({"a": run.step})
                run.log({"b": run.state.trainable["up"]["kernel"].a})
                run.state, _ = STEP(run.state, batch)
    assert lines(tmp_path) == [{"step": 0, "a": 0}]


@pytest.mark.parametrize(
    ("args", "numbers", "message"),
    [
        ((None,), {}, r"save was given None; write a name for it, as run.save\(val_loss=0.5\)"),
        (({"val": 1},), {}, "save was given {'val': 1}; write a name for it"),
        ((), {"x": 1j}, r"save was given x=1j; write a number: x=float"),
        ((), {"x": None}, "save was given x=None; write a number"),
        ((), {"x": "1"}, "save was given x='1'; write a number"),
        ((), {"x": 10**400}, "save was given x=an integer of 1329 bits, more than a float holds; write"),
        ((), {"x": [1]}, "save was given x=.1.; write a number"),
        ((), {"x": np.complex64(1)}, "save was given x=.*; write a number"),
    ],
)
def test_what_is_no_number_is_refused_by_save(tmp_path, args, numbers, message):
    with checkpoint.Run(tmp_path, make_state(), batch_of, steps=0) as run:
        with pytest.raises(TypeError, match=message):
            run.save(*args, **numbers)
        run.save(x=True, y=np.float64(2), z=jnp.int32(3))
    assert numbers_of(tmp_path, 0) == {"x": 1.0, "y": 2.0, "z": 3.0}


def test_arguments_of_the_wrong_kind_are_refused(tmp_path):
    with pytest.raises(TypeError, match="the state is a dict; write lora_jax.TrainState.create"):
        checkpoint.Run(tmp_path, {}, batch_of)
    with pytest.raises(ValueError, match="is a URL; write a path of a mounted file system"):
        checkpoint.Run("gs://bucket/run", make_state(), batch_of)
    with pytest.raises(FileNotFoundError, match="there is no save in"):
        checkpoint.restore(tmp_path / "nothing", make_state())
    run = checkpoint.Run(tmp_path, make_state(), batch_of, best="val")
    for call in (lambda: next(run), run.save, lambda: run.log({})):
        with pytest.raises(RuntimeError, match="the run is not open; write: with Run"):
            call()
    with run:
        with pytest.raises(RuntimeError, match="is open; enter it once"):
            run.__enter__()
        with pytest.raises(ValueError, match=r"save was given \['loss'\], and the best is known by 'val'"):
            run.save(loss=1.0)
        with pytest.raises(TypeError, match="save was given val=.*; write a number"):
            run.save(val=jnp.ones(2))
        with pytest.raises(TypeError, match="the state is a tuple"):
            run.state = STEP(run.state, batch_of(0))
        run.state = make_state()
    assert run.step == 0


# --- Processes ----------------------------------------------------------------------------------------

PROCESS = """
import os, signal, sys, time
index, count, steps, stop = (int(x) for x in sys.argv[1:5])
port, directory = sys.argv[5:]
import jax, jax.numpy as jnp, numpy as np, optax
jax.config.update("jax_num_cpu_devices", 2)
if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, index)
import lora_jax
from jax.sharding import NamedSharding, PartitionSpec
from lora_jax import checkpoint

mesh = jax.make_mesh((2 * count,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
where = NamedSharding(mesh, PartitionSpec("x"))

def sharded(whole):
    return jax.make_array_from_callback(whole.shape, where, lambda at: whole[at])

def values(seed, *shape):
    return sharded(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))

class Batches:
    at = 0
    def __iter__(self):
        return self
    def __next__(self):
        self.at += 1
        return values(self.at, 8, 8)
    def get_state(self):
        return {"at": self.at}
    def set_state(self, state):
        self.at = state["at"]

tx = optax.adam(1e-2)
def init(kernel):
    wrapped = lora_jax.wrap({"kernel": kernel}, rank=2, targets="kernel")
    return lora_jax.TrainState.create(wrapped, tx, jax.random.key(0))
state = lora_jax.sharded_init(init, mesh)(values(0, 8, 4))
step = lora_jax.make_train_step(lambda params, x, key: jnp.mean((x @ params["kernel"]) ** 2), tx)
data = Batches()
with checkpoint.Run(directory, state, data, every=3, steps=steps) as run:
    print("from", run.step, data.at, flush=True)
    for batch in run:
        run.state, metrics = step(run.state, batch)
        run.log(metrics)
        time.sleep(0.02)
        if run.step == stop and index == count - 1:
            os.kill(os.getpid(), signal.SIGTERM)
"""


def train_in(count, directory, steps, stop=-1):
    """Exit codes and outputs of processes that train together; SIGTERM reaches the last one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, *map(str, (index, count, steps, stop, port, directory))],
            **{"env": env, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
        )
        for index in range(count)
    ]
    try:
        outputs = [child.communicate(timeout=100)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    return [child.returncode for child in children], "".join(outputs)


def test_another_number_of_processes_goes_on(tmp_path):
    codes, output = train_in(2, tmp_path, steps=100_000, stop=5)
    assert codes == [143, 143], output
    at = max(saved(tmp_path))
    assert 5 <= at < 100_000
    losses = [line["loss"] for line in lines(tmp_path)]
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, at + 1))

    def values(seed, *shape):
        return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))

    def train(state, steps):
        step = make_train_step(lambda params, x, key: jnp.mean((x @ params["kernel"]) ** 2), TX)
        for i in range(int(state.step) + 1, steps + 1):
            state, metrics = step(state, values(i, 8, 8))
            yield float(metrics["loss"])

    def state():
        wrapped = wrap({"kernel": values(0, 8, 4)}, rank=2, targets="kernel")
        return TrainState.create(wrapped, TX, jax.random.key(0))

    # What two processes sum, one sums in another order.
    assert losses[:5] == pytest.approx(list(train(state(), 5)), rel=1e-5)
    expected = list(train(checkpoint.restore(tmp_path, state()), at + 4))
    codes, output = train_in(1, tmp_path, steps=at + 4)
    assert codes == [0], output
    assert f"from {at} {at}" in output
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, at + 5))
    assert [line["loss"] for line in lines(tmp_path)][:at] == losses
    assert [line["loss"] for line in lines(tmp_path)][at:] == pytest.approx(expected, rel=1e-5)


def test_positions_of_other_processes_must_be_one(tmp_path):
    go(tmp_path, Bytes(), steps=2)
    file = tmp_path / "checkpoints" / "2" / "run" / "metadata"
    sealed = json.loads(file.read_text())
    (position,) = sealed["content"]["positions"]
    for positions in ([position, position], [position, position.replace("A", "B")]):
        content = sealed["content"] | {"positions": positions}
        crc = zlib.crc32(json.dumps(content, sort_keys=True).encode())
        file.write_text(json.dumps(sealed | {"crc32": crc, "content": content}))
        if positions[0] == positions[1]:
            run = go(tmp_path, Bytes(), steps=2)
            assert (run.first, run._data.left) == (2, STEPS - 2)
    with pytest.raises(
        ValueError, match="by 2 processes, whose data had come to different positions; 1 cannot"
    ):
        go(tmp_path, Bytes())


# --- Kills --------------------------------------------------------------------------------------------


@newest
def test_kills_at_random_moments_lose_nothing(tmp_path, monkeypatch):
    # Every child would compile the same again.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    out = tmp_path / "kills.json"
    arguments = "--kills 2 --seed 1 --steps 40 --every 4".split()
    record = kills.main([*arguments, "--out", str(out)])
    assert record["problems"] == []
    assert record["kills"] == len(record["each_kill"]) == 2
    assert all(all(run.values()) for run in record["runs"])
    assert record["saves_read"] > 0
    assert json.loads(out.read_text())["command"].endswith("run --kills 2 --seed 1 --steps 40 --every 4")
