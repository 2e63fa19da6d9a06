"""An adapter on disk comes back bit for bit, onto its own base, or not at all."""

import json
import os
import shutil
import struct
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from flax.core import freeze

from lora_jax import files
from lora_jax.files import load_adapter, read_adapter, save_adapter
from lora_jax.params import Adapter, adapter, combine, merge, partition, wrap
from lora_jax.tree import leaves_with_path

FORMATS = ["adapter", "adapter.safetensors"]
DTYPES = [jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16]


class Dense(eqx.Module):
    kernel: jax.Array
    bias: jax.Array
    activation: object = jax.nn.relu


class Net(nnx.Module):
    def __init__(self, dtype):
        rngs = nnx.Rngs(0)
        self.block = nnx.Linear(6, 4, rngs=rngs, param_dtype=dtype)
        self.head = nnx.Linear(4, 3, rngs=rngs, param_dtype=dtype)


def make_dict(dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "block": {"kernel": jax.random.normal(keys[0], (6, 4), dtype), "bias": jnp.zeros(4, dtype)},
        "head": {"kernel": jax.random.normal(keys[1], (4, 3), dtype), "bias": jnp.ones(3, dtype)},
    }


def make_equinox(dtype):
    return {name: Dense(**layer) for name, layer in make_dict(dtype).items()}


KINDS = {
    "dict": make_dict,
    "frozen dict": lambda dtype: freeze(make_dict(dtype)),
    "nnx state": lambda dtype: nnx.state(Net(dtype)),
    "nnx module": Net,
    "equinox": make_equinox,
}


def wrapped_of(params, dtype=jnp.float32, **kwargs):
    """A wrapped tree in which no number is easy: noise, with -0.0, inf, nan and a subnormal."""
    options = {"rank": 2, "alpha": 3.0, "targets": "block/kernel", "train": "head", "dropout": 0.1}
    trainable, frozen = partition(wrap(params, **(options | kwargs), dtype=dtype))

    def noise(leaf):
        values = np.random.default_rng(0).normal(size=leaf.shape).astype(leaf.dtype)
        values.flat[:3] = [-0.0, np.inf, np.nan]
        values.flat[-1:] = np.finfo(np.float16).smallest_subnormal
        return jnp.asarray(values)

    return combine(jax.tree.map(noise, trainable), frozen)


def bits(tree):
    """All that an adapter must bring back: structure, static fields, and every array's bytes."""
    found = adapter(tree)
    leaves = {
        (path, field): (str(value.dtype), value.shape, np.asarray(value).tobytes())
        for path, leaf in found.leaves.items()
        for field, value in leaf.__dict__.items()
        if isinstance(value, jax.Array)
    }
    statics = {
        (path, field): value
        for path, leaf in found.leaves.items()
        for field, value in leaf.__dict__.items()
        if not isinstance(value, jax.Array)
    }
    return leaves, statics


@pytest.fixture
def simple():
    params = make_dict(jnp.float32)
    return params, wrapped_of(params)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_exact(kind, dtype, name, tmp_path):
    params = KINDS[kind](dtype)
    wrapped = wrapped_of(params, dtype)
    save_adapter(tmp_path / name, wrapped)
    loaded = load_adapter(tmp_path / name, params)
    assert type(loaded) is type(wrapped)
    assert bits(loaded) == bits(wrapped)
    assert len(bits(loaded)[0]) == 5
    assert jax.tree.structure(partition(loaded)) == jax.tree.structure(partition(wrapped))
    # The base is that of `params`, the objects themselves.
    ours = {id(leaf) for leaf in jax.tree.leaves(params)}
    kernels = [leaf.w for _, leaf in leaves_with_path(partition(loaded)[1], hasattr_w) if hasattr_w(leaf)]
    assert kernels and all(id(kernel) in ours for kernel in kernels)


def hasattr_w(node):
    return "w" in getattr(node, "__dict__", {})


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_knows_paths_only(name, tmp_path):
    save_adapter(tmp_path / name, wrapped_of(Net(jnp.float32)))
    loaded = load_adapter(tmp_path / name, nnx.to_pure_dict(nnx.state(Net(jnp.float32))))
    assert bits(loaded) == bits(wrapped_of(Net(jnp.float32)))


@pytest.mark.parametrize("name", FORMATS)
def test_stacked_layers_keep_their_scales(name, tmp_path):
    params = {"layers": {"kernel": jnp.ones((5, 6, 4)), "bias": jnp.zeros((5, 4))}}
    kwargs = {"targets": "kernel", "train": None, "axes": {"kernel": ("batch", "in", "out")}}
    wrapped = wrapped_of(params, **kwargs)
    weight = wrapped["layers"]["kernel"]
    wrapped["layers"]["kernel"] = weight.replace(scale=jnp.arange(5, dtype=jnp.float32) / 3)
    save_adapter(tmp_path / name, wrapped)
    loaded = load_adapter(tmp_path / name, params)
    assert bits(loaded) == bits(wrapped)
    assert loaded["layers"]["kernel"].scale.shape == (5,)


@pytest.mark.parametrize("name", FORMATS)
def test_names_with_slashes_dots_colons_and_spaces(name, tmp_path):
    params = {
        "mlp/~/linear_0": {"w": jnp.ones((3, 4))},
        "a.b:a": {"w": jnp.ones((3, 4))},
        "../ é": {"w": jnp.ones((3, 4))},
    }
    wrapped = wrapped_of(params, targets="w", train=None, axes={"w": ("in", "out")})
    save_adapter(tmp_path / name, wrapped)
    assert bits(load_adapter(tmp_path / name, params)) == bits(wrapped)


@pytest.mark.parametrize("name", FORMATS)
def test_leaves_without_entries(name, tmp_path):
    params = {"block": {"kernel": jnp.ones((6, 4))}, "head": {"kernel": jnp.ones((0, 3))}}
    for options in ({}, {"targets": None, "train": "head", "rank": 2}):
        wrapped = wrapped_of(params, **options) if not options else only_head(params)
        save_adapter(tmp_path / name, wrapped, overwrite=True)
        assert bits(load_adapter(tmp_path / name, params)) == bits(wrapped)


def only_head(params):
    found = adapter(wrapped_of(params))
    head = {path: leaf for path, leaf in found.leaves.items() if path == "head/kernel"}
    return files.params_lib.attach(
        params, Adapter(leaves=head, shapes=found.shapes, fingerprint=found.fingerprint)
    )


@pytest.mark.parametrize("name", FORMATS)
def test_an_adapter_is_saved_as_a_tree_is(name, simple, tmp_path):
    params, wrapped = simple
    save_adapter(tmp_path / name, adapter(wrapped))
    assert bits(load_adapter(tmp_path / name, params)) == bits(wrapped)
    assert list(read_adapter(tmp_path / name).leaves) == list(adapter(wrapped).leaves)


def test_the_base_is_never_written(tmp_path):
    params = {"block": {"kernel": jax.random.normal(jax.random.key(1), (256, 256))}, "bias": jnp.ones(7)}
    wrapped = wrapped_of(params, rank=1, train="bias")
    names = {"block/kernel:a", "block/kernel:b", "block/kernel:scale", "bias:value"}
    for name in FORMATS:
        save_adapter(tmp_path / name, wrapped)
    with safetensors.safe_open(tmp_path / "adapter.safetensors", framework="numpy") as file:
        assert set(file.keys()) == names
    with ocp.StandardCheckpointer() as checkpointer:  # an orbax checkpoint, for anyone to read
        assert set(checkpointer.restore(tmp_path / "adapter" / "arrays")) == names
    base = np.asarray(params["block"]["kernel"]).tobytes()
    total = 0
    for file in every_file(tmp_path):
        data = file.read_bytes()
        total += len(data)
        assert not any(base[i : i + 64] in data for i in range(0, len(base), 4096))
    assert total < len(base) / 8


def every_file(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


# --- Paths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_relative_and_home_paths(name, simple, tmp_path, monkeypatch):
    params, wrapped = simple
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for path in (name, f"./new/folders/{name}", f"~/{name}", Path("a") / ".." / "b" / name):
        save_adapter(path, wrapped)
        assert bits(load_adapter(path, params)) == bits(wrapped)
    assert (tmp_path / name).exists() and (tmp_path / "home" / name).exists()
    assert (tmp_path / "b" / name).exists()


def test_a_url_is_refused(simple):
    with pytest.raises(ValueError, match="gs://bucket/adapter.*mounted file system"):
        save_adapter("gs://bucket/adapter", simple[1])


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_else_is_left_behind(name, simple, tmp_path):
    save_adapter(tmp_path / name, simple[1])
    save_adapter(tmp_path / name, simple[1], overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", FORMATS)
def test_a_link_is_followed(name, simple, tmp_path):
    params, wrapped = simple
    (tmp_path / "runs").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "runs" / name)
    save_adapter(tmp_path / name, wrapped)
    save_adapter(tmp_path / name, wrapped, overwrite=True)
    assert (tmp_path / name).is_symlink()
    assert bits(load_adapter(tmp_path / "runs" / name, params)) == bits(wrapped)


# --- Overwriting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_overwriting_is_asked_for(name, simple, tmp_path):
    params, wrapped = simple
    other = wrap(params, rank=3, targets="head/kernel")
    save_adapter(tmp_path / name, wrapped)
    with pytest.raises(FileExistsError, match=f"{name}.*overwrite=True"):
        save_adapter(tmp_path / name, other)
    assert bits(load_adapter(tmp_path / name, params)) == bits(wrapped)
    save_adapter(tmp_path / name, other, overwrite=True)
    assert bits(load_adapter(tmp_path / name, params)) == bits(other)


def test_only_an_adapter_is_overwritten(simple, tmp_path):
    """`overwrite=True` with a mistyped path costs nobody a folder, or a base model."""
    _, wrapped = simple
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "table.txt").write_text("figures")
    (tmp_path / "notes").write_text("notes")
    (tmp_path / "folder.safetensors").mkdir()
    safetensors.numpy.save_file({"w": np.ones(3)}, tmp_path / "model.safetensors")
    before = {file: file.read_bytes() for file in every_file(tmp_path)}
    for name in ("results", "notes", "model.safetensors", "folder.safetensors"):
        with pytest.raises(FileExistsError, match=f"{name}.*Remove it"):
            save_adapter(tmp_path / name, wrapped, overwrite=True)
    assert {file: file.read_bytes() for file in every_file(tmp_path)} == before


def test_an_empty_folder_is_filled(simple, tmp_path):
    save_adapter(tmp_path, simple[1])
    assert bits(load_adapter(tmp_path, simple[0])) == bits(simple[1])


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_failed_save_keeps_the_old_adapter(name, call, simple, tmp_path, monkeypatch):
    params, wrapped = simple
    save_adapter(tmp_path / name, wrapped)
    other = wrap(params, rank=3, targets="head/kernel")
    original = getattr(os, call)

    def fail(*args, **kwargs):
        # Only in the renaming that would publish: the old adapter may be moved aside, and back.
        if call == "fsync" or "new" in str(args[0]):
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(files.os, call, fail)
    reached = call == "fsync" or (call == "replace") == name.endswith(".safetensors")
    if reached:
        with pytest.raises(OSError, match="No space"):
            save_adapter(tmp_path / name, other, overwrite=True)
    else:
        save_adapter(tmp_path / name, other, overwrite=True)
    monkeypatch.undo()
    assert bits(load_adapter(tmp_path / name, params)) == bits(wrapped if reached else other)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_what_cannot_be_put_back_is_not_deleted(tmp_path, monkeypatch):
    for name in ("config", "weights"):
        (tmp_path / name).write_text("old")
    rename = os.rename

    def moved_aside_only(source, target):
        if target.parent.name != "old":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", moved_aside_only)
    with pytest.raises(OSError, match="Input/output"):
        with files.replacing(tmp_path, sorted(tmp_path.iterdir()), last="config") as new:
            (new / "config").write_text("new")
    assert [file.read_text() for file in sorted(tmp_path.rglob("old/*"))] == ["old", "old"]


def test_a_failure_after_the_last_renaming_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "config").write_text("old")
    real = files.sync

    def sync(entry):
        if entry == tmp_path:
            raise OSError(5, "Input/output error")
        real(entry)

    monkeypatch.setattr(files, "sync", sync)
    with pytest.raises(OSError, match="Input/output"):
        with files.replacing(tmp_path, [tmp_path / "config"], last="config") as new:
            (new / "config").write_text("new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("config", "old")]


# --- Damage -----------------------------------------------------------------------------------------


def offsets(size):
    return sorted(
        {*range(0, size, max(1, size // 12)), 1, 7, 8, 9, size // 2, size - 2, size - 1} & set(range(size))
    )


@pytest.mark.parametrize("name", FORMATS)
def test_truncation_anywhere_is_one_clear_error(name, simple, tmp_path):
    params, wrapped = simple
    save_adapter(tmp_path / name, wrapped)
    tried = 0
    for file in every_file(tmp_path):
        whole = file.read_bytes()
        for cut in offsets(len(whole)):
            file.write_bytes(whole[:cut])
            with pytest.raises(ValueError, match="(truncated or damaged|no adapter that)") as raised:
                load_adapter(tmp_path / name, params)
            assert str(tmp_path / name) in str(raised.value) and raised.value.__cause__ is None
            tried += 1
        file.unlink()
        with pytest.raises((ValueError, FileNotFoundError), match=name):
            load_adapter(tmp_path / name, params)
        file.write_bytes(whole)
    assert tried >= 12
    assert bits(load_adapter(tmp_path / name, params)) == bits(wrapped)


@pytest.mark.parametrize("name", FORMATS)
def test_a_flipped_bit_is_found(name, simple, tmp_path):
    params, wrapped = simple
    save_adapter(tmp_path / name, wrapped)
    harmless = 0
    for file in every_file(tmp_path):
        whole = file.read_bytes()
        for at in offsets(len(whole)):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            try:
                loaded = load_adapter(tmp_path / name, params)
            except ValueError:
                continue
            # Blanks between the spec's entries may differ, and nothing else.
            assert chr(whole[at]).isspace() and bits(loaded) == bits(wrapped)
            harmless += 1
        file.write_bytes(whole)
    assert harmless < 8


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_adapter(name, simple, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"there is no adapter at .*{name}"):
        load_adapter(tmp_path / "none" / name, simple[0])


def test_what_is_not_an_adapter(simple, tmp_path):
    params, _ = simple
    safetensors.numpy.save_file({"w": np.ones(3)}, tmp_path / "model.safetensors")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", {"w": jnp.ones(3)})
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder.safetensors").mkdir()
    for name, why in {
        "model.safetensors": "has no entry 'lora_jax'",
        "orbax": "has no lora_jax.json",
        "file": "ends in .safetensors",
        "folder.safetensors": "it is a folder",
    }.items():
        with pytest.raises(ValueError, match=f"{name}' is no adapter that save_adapter wrote: .*{why}"):
            load_adapter(tmp_path / name, params)


def rewrite_spec(target, change):
    """Write the spec anew as a future version, or someone's own program, might have written it."""
    arrays = {}
    if target.suffix == ".safetensors":
        with safetensors.safe_open(target, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
            spec = json.loads(file.metadata()["lora_jax"])
    else:
        spec = json.loads((target / "lora_jax.json").read_text())
    change(spec)
    spec["crc32"] = files.zlib.crc32(files._canonical(spec["content"]))
    if target.suffix == ".safetensors":
        safetensors.numpy.save_file(arrays, target, metadata={"lora_jax": json.dumps(spec)})
    else:
        (target / "lora_jax.json").write_text(json.dumps(spec))


@pytest.mark.parametrize("name", FORMATS)
def test_a_newer_format_says_so(name, simple, tmp_path):
    save_adapter(tmp_path / name, simple[1])
    rewrite_spec(tmp_path / name, lambda spec: spec.update(format=files.FORMAT + 1))
    with pytest.raises(ValueError, match=r"has format 2 and .* up to 1; .*pip install --upgrade"):
        load_adapter(tmp_path / name, simple[0])


LIES = {
    "shape": lambda c: c["leaves"]["block/kernel"]["arrays"]["a"].update(shape=[1 << 40, 1 << 20]),
    "zero shape": lambda c: c["leaves"]["block/kernel"]["arrays"]["a"].update(shape=[0, 2]),
    "dtype": lambda c: c["leaves"]["block/kernel"]["arrays"]["a"].update(dtype="int32"),
    "no dtype": lambda c: c["leaves"]["block/kernel"]["arrays"]["a"].update(dtype="float99"),
    "axes": lambda c: c["leaves"]["block/kernel"].update(axes=["out", "in"]),
    "no axes": lambda c: c["leaves"]["block/kernel"].update(axes=7),
    "dropout": lambda c: c["leaves"]["block/kernel"].update(dropout=2.0),
    "kind": lambda c: c["leaves"]["block/kernel"].update(kind="other"),
    "leaf missing": lambda c: c["leaves"].pop("block/kernel"),
    "array missing": lambda c: c["leaves"]["block/kernel"]["arrays"].pop("b"),
    "array more": lambda c: c["leaves"]["block/kernel"]["arrays"].update(
        c={"shape": [1], "dtype": "float32"}
    ),
    "shapes": lambda c: c["shapes"].update({"block/kernel": [[1 << 40, 4], "float32"]}),
    "no shapes": lambda c: c.pop("shapes"),
    "checksums": lambda c: c.pop("checksums"),
    "fingerprint": lambda c: c.update(fingerprint="none"),
    "outside": lambda c: c["checksums"].update({"../../secret": [0, 0]}),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("lie", LIES)
def test_a_spec_that_lies_is_one_clear_error(lie, name, simple, tmp_path):
    save_adapter(tmp_path / name, simple[1])
    rewrite_spec(tmp_path / name, lambda spec: LIES[lie](spec["content"]))
    with pytest.raises(ValueError, match=f"{name}.* is truncated or damaged"):
        load_adapter(tmp_path / name, simple[0])


def test_a_header_that_lies_allocates_nothing(simple, tmp_path):
    target = tmp_path / "adapter.safetensors"
    save_adapter(target, simple[1])
    whole = target.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    claims = json.loads(json.dumps(header))
    claims["block/kernel:a"] |= {"shape": [1 << 40, 1 << 10], "data_offsets": [0, 1 << 52]}
    text = json.dumps(claims).encode()
    for forged in (
        struct.pack("<Q", len(text)) + text + whole[8 + length :],
        struct.pack("<Q", 1 << 62) + whole[8:],
        struct.pack("<Q", length + 8) + whole[8:],
        struct.pack("<Q", 20) + b"[" * 20,
    ):
        target.write_bytes(forged)
        with pytest.raises(ValueError, match=r"adapter.safetensors' is truncated or damaged"):
            load_adapter(target, simple[0])


# --- The base ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_another_base_is_refused_with_the_differences(name, simple, tmp_path):
    params, wrapped = simple
    save_adapter(tmp_path / name, wrapped)
    moved = jax.tree.map(lambda x: x, params)
    moved["block"]["kernel"] = params["block"]["kernel"].at[0, 0].add(1)
    with pytest.raises(ValueError, match="block/kernel"):
        load_adapter(tmp_path / name, moved)
    wider = make_dict(jnp.float32)
    wider["block"]["kernel"] = jnp.ones((6, 5))
    with pytest.raises(
        ValueError, match=r"block/kernel.*\(6, 4\).*\(6, 5\)|block/kernel.*\(6, 5\).*\(6, 4\)"
    ):
        load_adapter(tmp_path / name, wider)
    renamed = {"trunk": params["block"], "head": params["head"]}
    with pytest.raises(ValueError, match="block/kernel"):
        load_adapter(tmp_path / name, renamed)


@pytest.mark.parametrize("name", FORMATS)
def test_an_abstract_base_has_no_values_to_compare(name, simple, tmp_path):
    params, wrapped = simple
    save_adapter(tmp_path / name, wrapped)
    abstract = jax.eval_shape(lambda: params)
    loaded = load_adapter(tmp_path / name, abstract)
    weight = loaded["block"]["kernel"]
    assert isinstance(weight.w, jax.ShapeDtypeStruct)
    assert np.asarray(weight.a).tobytes() == np.asarray(wrapped["block"]["kernel"].a).tobytes()
    with pytest.raises(ValueError, match="block/kernel"):
        load_adapter(
            tmp_path / name, abstract | {"block": {"kernel": jax.ShapeDtypeStruct((9, 9), jnp.float32)}}
        )


@pytest.mark.parametrize("name", FORMATS)
def test_the_loaded_model_is_the_saved_one(name, tmp_path):
    params = make_dict(jnp.float32)
    trainable, frozen = partition(wrap(params, rank=2, targets="block/kernel", train="head"))
    wrapped = combine(jax.tree.map(lambda x: x + 0.5, trainable), frozen)
    save_adapter(tmp_path / name, wrapped)
    merged = jax.tree.leaves(merge(load_adapter(tmp_path / name, params)))
    for ours, theirs in zip(merged, jax.tree.leaves(merge(wrapped)), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@pytest.mark.parametrize("name", FORMATS)
def test_factors_sharded_over_devices(name, tmp_path):
    params = {"block": {"kernel": jnp.ones((8, 4))}}
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    wrapped = wrapped_of(params, train=None)
    weight = wrapped["block"]["kernel"]
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    sharded = {"block": {"kernel": weight.replace(a=jax.device_put(weight.a, rows))}}
    save_adapter(tmp_path / name, sharded)
    assert bits(load_adapter(tmp_path / name, params)) == bits(wrapped)


@pytest.mark.parametrize("name", FORMATS)
def test_float64_without_x64_is_refused(name, tmp_path):
    params = make_dict(jnp.float32)
    save_adapter(tmp_path / name, wrapped_of(params, jnp.float64))
    with jax.enable_x64(False), pytest.raises(ValueError, match="float64.*jax_enable_x64"):
        load_adapter(tmp_path / name, params)


# --- The package safetensors is optional --------------------------------------------------------------


def test_without_safetensors(simple, tmp_path, monkeypatch):
    params, wrapped = simple
    save_adapter(tmp_path / "adapter.safetensors", wrapped)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (
        lambda: save_adapter(tmp_path / "other.safetensors", wrapped),
        lambda: load_adapter(tmp_path / "adapter.safetensors", params),
    ):
        with pytest.raises(ModuleNotFoundError, match=r'pip install "lora-jax\[safetensors\]"'):
            call()
    save_adapter(tmp_path / "adapter", wrapped)
    assert bits(load_adapter(tmp_path / "adapter", params)) == bits(wrapped)


def test_a_dtype_that_safetensors_lacks(tmp_path):
    params = {"block": {"kernel": jnp.ones((6, 4))}, "head": jnp.ones(3, jnp.complex128)}
    wrapped = wrapped_of(params, train=None)
    found = adapter(wrapped)
    full = files.FullWeight(params["head"], jnp.complex128, "head")
    extended = Adapter(
        leaves=found.leaves | {"head": full},
        shapes=found.shapes | {"head": ((3,), "complex128")},
        fingerprint=found.fingerprint,
    )
    with pytest.raises(ValueError, match="cannot be written to .*without .safetensors makes a directory"):
        save_adapter(tmp_path / "adapter.safetensors", extended)
    save_adapter(tmp_path / "adapter", extended)
    assert np.array_equal(read_adapter(tmp_path / "adapter").leaves["head"].value, params["head"])
    shutil.rmtree(tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
