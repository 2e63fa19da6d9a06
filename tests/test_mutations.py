"""A damaged adapter fails clearly or loads what its bytes say; and the judge of that can tell.

A short profile; `python -m experiments.mutations.run` is the long one.
"""

import json
import time

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.mutations import reader, run
from lora_jax import peft


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The base and the two files, before any mutation."""
    folder = tmp_path_factory.mktemp("adapter")
    params = run.make(folder)
    return params, {name: (folder / name).read_bytes() for name in (run.CONFIG, run.WEIGHTS)}


def test_drawn_mutations(tmp_path):
    found = run.run(tmp_path, range(400), seed=0)
    assert not found["failures"], json.dumps(found["failures"][:5], indent=2)
    assert set(found["ended"]) == set(run.KINDS)
    total = {how: sum(n.get(how, 0) for n in found["ended"].values()) for how in ("loaded", "refused")}
    assert total["loaded"] > 50 and total["refused"] > 200
    assert set(found["ended"]["nothing"]) == {"loaded"}


def test_a_case_is_its_seed_and_number(adapter):
    _, files = adapter

    def ten(seed):
        return [run.mutated(files, seed, number) for number in range(1, 11)]

    assert ten(0) == ten(0)
    assert all(ours != theirs for ours, theirs in zip(ten(0), ten(1), strict=True) if ours[0] != "nothing")


def test_the_reader_reads_what_was_written(adapter):
    params, files = adapter
    found = run.expected_of(files, params)
    assert set(found.updates) == {"embed/embedding", *(f"layers_{i}/fc/kernel" for i in range(3))}
    assert set(found.full) == {"head/kernel", "head/bias", *(f"layers_{i}/fc/bias" for i in range(3))}
    # rank and alpha as run.make gives them
    scales = {path: (len(a), s) for path, (a, _, s) in found.updates.items()}
    assert scales == {
        "embed/embedding": (2, 2.0),
        "layers_0/fc/kernel": (3, 2.0),
        "layers_1/fc/kernel": (4, 2.0),
        "layers_2/fc/kernel": (3, 4.0),
    }
    assert found.dropout == 0.1


def test_every_other_kind_of_end_is_a_failure(adapter, tmp_path, monkeypatch):
    params, files = adapter
    load = peft.load_peft
    ends = {}

    def ending(name):
        def decorate(fn):
            ends[name] = fn

        return decorate

    @ending("KeyError: 'x'")
    def wrong_exception(*_):
        raise KeyError("x")

    @ending("UnicodeError: adapter_config.json")
    def subclass(*_):
        raise UnicodeError("adapter_config.json")

    @ending("an error that names no file: no")
    def nameless(*_):
        raise ValueError("no")

    @ending("MemoryError: ")
    def too_much(*_):
        raise MemoryError

    @ending("more than 0.1 s")
    def hangs(*_):
        monkeypatch.setattr(run, "SECONDS", 0.1)
        run.signal.setitimer(run.signal.ITIMER_REAL, run.SECONDS)
        time.sleep(30)

    @ending("layers_1/fc/kernel is not what the bytes say")
    def another_scale(*given):
        tree = load(*given)
        leaf = tree["layers_1"]["fc"]["kernel"]
        tree["layers_1"]["fc"]["kernel"] = leaf.replace(scale=leaf.scale * np.float32(1 + 2**-23))
        return tree

    @ending("layers_0/fc/kernel is not what the bytes say")
    def another_bit(*given):
        tree = load(*given)
        leaf = tree["layers_0"]["fc"]["kernel"]
        tree["layers_0"]["fc"]["kernel"] = leaf.replace(a=jnp.nextafter(leaf.a, jnp.float32(9)))
        return tree

    @ending("head/kernel is not what the bytes say")
    def dropped(*given):
        return load(*given) | {"head": params["head"]}

    @ending("layers_2/fc/kernel is not what the bytes say")
    def no_dropout(*given):
        tree = load(*given)
        tree["layers_2"]["fc"]["kernel"] = tree["layers_2"]["fc"]["kernel"].replace(dropout=0.0)
        return tree

    for message, fn in ends.items():
        monkeypatch.setattr(peft, "load_peft", fn)
        monkeypatch.setattr(run, "SECONDS", 60)
        with pytest.raises(run.Failure) as failure:
            run.judge(tmp_path / "case", files, params)
        assert str(failure.value) == message, fn.__name__
    monkeypatch.setattr(peft, "load_peft", load)
    assert run.judge(tmp_path / "case", files, params) == "loaded"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"use_dora": True}, "not served"),
        ({"init_lora_weights": "pissa"}, "base was changed"),
        ({"exclude_modules": ["embed"]}, "targets other modules"),
        ({"modules_to_save": None}, "in full there are"),
        ({"bias": "none"}, "in full there are"),
        ({"r": 2}, "rank 2"),
        ({"rank_pattern": {}}, "rank 3"),
        ({"peft_type": "LOHA"}, "not an adapter"),
    ],
)
def test_the_reader_refuses_what_the_config_contradicts(adapter, change, why):
    params, files = adapter
    config = json.dumps(json.loads(files[run.CONFIG]) | change).encode()
    with pytest.raises(reader.Refused, match=why):
        run.expected_of(files | {run.CONFIG: config}, params)


def test_a_load_that_the_reader_refuses_is_a_failure(adapter, tmp_path, monkeypatch):
    params, files = adapter
    load = peft.load_peft
    (tmp_path / "whole").mkdir()
    for name, data in files.items():
        (tmp_path / "whole" / name).write_bytes(data)
    tree = load(tmp_path / "whole", params, run.RULES)
    monkeypatch.setattr(peft, "load_peft", lambda *_: tree)
    cut = files | {run.WEIGHTS: files[run.WEIGHTS][:-4]}
    with pytest.raises(run.Failure, match="loaded, and must not be"):
        run.judge(tmp_path / "case", cut, params)


def test_the_command_and_its_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "guard", lambda: None)  # which would bind this process
    out = tmp_path / "result.json"
    assert run.main(["--cases", "20", "--seed", "3", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["cases"] == sum(record["total"].values()) == 20
    assert record["command"] == "python -m experiments.mutations.run --cases 20 --seed 3"
    assert "20 cases" in capsys.readouterr().out


def test_the_committed_result_is_whole():
    [file] = (run.HERE / "results").glob("*.json")
    record = json.loads(file.read_text())
    assert record["cases"] == 10_000 and record["failures"] == []
    assert set(record["ended"]) == set(run.KINDS)
    assert sum(n for ends in record["ended"].values() for n in ends.values()) == 10_000
    assert record["memory_grown_mib"] < 256
