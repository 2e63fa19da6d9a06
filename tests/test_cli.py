"""The command `lora-jax`: a merged checkpoint is W + s·B·A rounded once; what fails leaves nothing."""

import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import cli, names, stream, tensors

pytest.importorskip("safetensors")

RANK, ALPHA = 2, 5
SCALE = ALPHA / RANK
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16, "float64": jnp.float64}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of few rows, so that small tensors have several and a rest."""
    monkeypatch.setattr(stream, "_BLOCK", 24)


def draw(*shape, dtype=np.float32, scale=1.0, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return np.array(jnp.asarray(scale * rng.standard_normal(shape)).astype(dtype))


def write(path, arrays, metadata=None):
    kinds = {name: (tensors.name_of(x.dtype), x.shape) for name, x in arrays.items()}
    tensors.write(path, kinds, iter(arrays.values()), metadata or {"format": "pt"})


def make_base(folder, arrays, shards=1, **config):
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"} | config)
    )
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        write(folder / "model.safetensors", arrays)
        return folder
    place = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(arrays)}
    for file in set(place.values()):
        write(folder / file, {name: x for name, x in arrays.items() if place[name] == file})
    index = {"metadata": {"total_size": 1, "more": "yes"}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make_adapter(folder, updates, full=None, **config):
    """`updates` has for every module its kind, A and B, as PEFT lays them out."""
    folder.mkdir()
    forms = {"embedding": ("lora_embedding_A", "lora_embedding_B")}
    arrays = {}
    for module, (kind, a, b) in updates.items():
        pair = forms.get(kind, ("lora_A.weight", "lora_B.weight"))
        arrays |= {f"base_model.model.{module}.{form}": x for form, x in zip(pair, (a, b), strict=True)}
    for name, x in (full or {}).items():
        arrays[f"base_model.model.{name}"] = x
    write(folder / "adapter_model.safetensors", arrays)
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(updates)}
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return folder


def linear(n, m, seed=0, scale=1.0):
    return ("linear", draw(RANK, m, seed=seed), draw(n, RANK, seed=seed + 1, scale=scale))


def read(folder):
    """All tensors of a checkpoint."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = tensors.opened(path)
        assert file.metadata["format"] == "pt"
        found |= {name: file.read(name) for name in file.entries}
    return found


def one_rounding(got, exact):
    """Whether numbers are float64 ones rounded to their dtype, allowing for a sum in float32."""
    got64 = got.astype(np.float64)
    unit = jnp.finfo(got.dtype).eps * np.maximum(np.abs(exact), float(jnp.finfo(got.dtype).smallest_normal))
    slack = 2e-6 if got.dtype.itemsize <= 4 else 1e-14
    return np.all(np.abs(got64 - exact) <= unit / 2 + slack * np.maximum(1, np.abs(exact)))


def run(capsys, *arguments):
    code = cli.main([str(x) for x in arguments])
    done = capsys.readouterr()
    return code, done.out, done.err


def leftovers(folder, *known):
    return sorted({path.name for path in folder.iterdir()} - set(known))


# --- merge --------------------------------------------------------------------------------------------


def deltas(updates):
    """The update of each module in torch's layout, in float64."""
    found = {}
    for module, (kind, a, b) in updates.items():
        rank = len(a)
        delta = SCALE * b.reshape(len(b), rank).astype(np.float64) @ a.reshape(rank, -1).astype(np.float64)
        found[module] = delta.T if kind == "embedding" else delta
    return found


def all_kinds(dtype):
    updates = {
        "model.embed_tokens": ("embedding", draw(RANK, 13), draw(6, RANK, seed=1)),
        "model.layers.0.fc": linear(10, 6),
        "model.layers.0.square": linear(6, 6, seed=3),
        "model.layers.1.c_fc": linear(9, 6, seed=4),
        "model.conv": ("conv2d", draw(RANK, 3, 2, 5), draw(8, RANK, 1, 1, seed=6)),
    }
    shapes = {"model.embed_tokens": (13, 6), "model.layers.1.c_fc": (6, 9), "model.conv": (8, 3, 2, 5)}
    arrays = {
        f"{module}.weight": draw(*shapes.get(module, (len(b), a.shape[1])), dtype=dtype, seed=7)
        for module, (_, a, b) in updates.items()
    }
    arrays |= {"model.layers.0.fc.bias": draw(10, dtype=dtype), "model.ids": np.arange(5)}
    arrays["model.norm.weight"] = draw(6, dtype=dtype)
    return arrays, updates


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merged_checkpoint_is_the_sum_rounded_once(tmp_path, capsys, dtype, shards):
    arrays, updates = all_kinds(DTYPES[dtype])
    base = make_base(tmp_path / "base", arrays, shards, model_type="gpt2")
    full = {"model.layers.0.fc.base_layer.bias": draw(10, seed=9)}
    bias = {"bias": "lora_only", "modules_to_save": ["other"]}
    adapter = make_adapter(tmp_path / "adapter", updates, full, **bias)
    code, out, err = run(capsys, "merge", base, adapter, tmp_path / "out", "--json")
    assert code == 0, err
    report = json.loads(out)
    got = read(tmp_path / "out")
    assert {name: (x.dtype, x.shape) for name, x in got.items()} == {
        name: (x.dtype, x.shape) for name, x in arrays.items()
    }
    for module, delta in deltas(updates).items():
        name = f"{module}.weight"
        w = arrays[name].astype(np.float64)
        turned = delta.T if w.shape == delta.T.shape and w.shape != delta.shape else delta
        assert one_rounding(got[name], w + turned.reshape(w.shape)), name
    bias = draw(10, seed=9).astype(DTYPES[dtype])
    assert got["model.layers.0.fc.bias"].tobytes() == bias.tobytes()
    for name in ("model.ids", "model.norm.weight"):
        assert got[name].tobytes() == arrays[name].tobytes()
    assert [x["name"] for x in report["tensors"]] == [
        n for n in arrays if n.removesuffix(".weight") in updates
    ] or (shards > 1)
    assert report["replaced"] == ["model.layers.0.fc.bias"]
    if shards > 1:
        code, table, _ = run(capsys, "merge", base, adapter, tmp_path / "out", "--overwrite")
        assert code == 0 and "ΔW lost" in table and all(f"{module}.weight" in table for module in updates)
    assert {path.name for path in base.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    if shards > 1:
        index = json.loads((tmp_path / "out" / stream.INDEX).read_text())
        assert index["metadata"] == {"total_size": sum(x.nbytes for x in arrays.values()), "more": "yes"}
    assert leftovers(tmp_path, "base", "adapter", "out") == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_entries_without_an_update_keep_their_bits(tmp_path, capsys, dtype):
    w = draw(20, 8, dtype=DTYPES[dtype])
    w[:3, :4] = [-0.0, np.nan, np.inf, jnp.finfo(w.dtype).smallest_subnormal]
    bits = w.view(f"u{w.dtype.itemsize}")
    bits[3, 0] = (
        {2: 0x7F81, 4: 0x7F800001}[w.dtype.itemsize] if dtype != "float16" else 0x7C01
    )  # a signalling NaN
    a, b = draw(RANK, 8), draw(20, RANK)
    b[:5] = 0
    base = make_base(tmp_path / "base", {"fc.weight": w})
    adapter = make_adapter(tmp_path / "adapter", {"fc": ("linear", a, b)})
    code, out, err = run(capsys, "merge", base, adapter, tmp_path / "out", "--json")
    assert code == 0, err
    got = read(tmp_path / "out")["fc.weight"]
    assert got[:5].tobytes() == w[:5].tobytes()
    (tensor,) = json.loads(out)["tensors"]
    still = np.mean(got[5:] == w[5:])
    assert tensor["unmoved"] == pytest.approx(still) and still < 0.1 and 0 < tensor["size"] < 100


def test_zero_factors_change_nothing(tmp_path, capsys):
    w = draw(6, 4, dtype=jnp.bfloat16)
    base = make_base(tmp_path / "base", {"fc.weight": w})
    adapter = make_adapter(
        tmp_path / "adapter", {"fc": ("linear", draw(RANK, 4), np.zeros((6, RANK), np.float32))}
    )
    code, out, _ = run(capsys, "merge", base, adapter, tmp_path / "out", "--json")
    assert code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert json.loads(out)["tensors"] == [
        {"name": "fc.weight", "dtype": "bfloat16", "size": 0.0, "lost": 0.0, "unmoved": 0.0}
    ]


@pytest.mark.parametrize(("size", "update"), [(1.0, 1e-27), (1e-30, 1e-32), (1e-30, 1.0)])
def test_numbers_whose_squares_underflow_are_counted(tmp_path, capsys, size, update):
    w = draw(24, 16, dtype=jnp.bfloat16, scale=size)
    kind, a, b = linear(24, 16, scale=update)
    base = make_base(tmp_path / "base", {"fc.weight": w})
    adapter = make_adapter(tmp_path / "adapter", {"fc": (kind, a, b)})
    code, out, err = run(capsys, "merge", base, adapter, tmp_path / "out", "--json")
    assert code == 0, err
    (tensor,) = json.loads(out)["tensors"]
    delta, old = SCALE * b.astype(np.float64) @ a, w.astype(np.float64)
    moved = read(tmp_path / "out")["fc.weight"].astype(np.float64) - old
    lost = np.linalg.norm(moved - delta) / np.linalg.norm(delta)
    assert tensor["lost"] == pytest.approx(lost, rel=1e-3) and lost > 1e-4
    assert tensor["size"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(old), rel=1e-5)


def test_a_base_of_zeros_has_no_size_to_compare_with(tmp_path, capsys):
    base = make_base(tmp_path / "base", {"fc.weight": np.zeros((6, 4), np.float32)})
    adapter = make_adapter(tmp_path / "adapter", {"fc": linear(6, 4, scale=1e-3)})
    code, out, err = run(capsys, "merge", base, adapter, tmp_path / "out", "--json")
    assert code == 0, err
    assert json.loads(out)["tensors"][0]["size"] is None
    code, out, err = run(capsys, "merge", base, adapter, tmp_path / "again")
    assert code == 0 and " inf " in out, err


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("to", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_report_is_that_of_check_merge(tmp_path, capsys, dtype, to, zeros):
    w = draw(24, 16, dtype=DTYPES[dtype])
    kind, a, b = linear(24, 16, scale=1e-3)
    if zeros:
        b[:4], a[:, 3] = 0, 0
    base = make_base(tmp_path / "base", {"fc.weight": w})
    adapter = make_adapter(tmp_path / "adapter", {"fc": (kind, a, b)})
    code, out, err = run(
        capsys, "merge", base, adapter, tmp_path / "out", "--json", *(["--dtype", to] if to else [])
    )
    assert code == 0, err
    (tensor,) = json.loads(out)["tensors"]
    delta = (SCALE * b @ a).astype(np.float32)
    old = w.astype(np.float32)
    new = read(tmp_path / "out")["fc.weight"]
    assert new.dtype == DTYPES[to or dtype] and tensor["dtype"] == (to or dtype)
    moved = new.astype(np.float32) - old
    assert tensor["size"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(old), rel=1e-5)
    lost = np.linalg.norm((moved - delta).astype(np.float64)) / np.linalg.norm(delta)
    assert tensor["lost"] == pytest.approx(lost, rel=1e-3)
    assert tensor["unmoved"] == pytest.approx(np.mean(moved[delta != 0] == 0), abs=1e-9)
    if to is None:
        params = {"fc": {"kernel": jnp.asarray(w).T}}
        rules = [names.Rule("fc/kernel", "fc.weight")]
        wrapped = lora_jax.peft.load_peft(adapter, params, rules)
        (leaf,) = lora_jax.check_merge(lambda p, x: x @ p["fc"]["kernel"], wrapped, jnp.asarray(w[:1])).leaves
        assert (tensor["lost"], tensor["unmoved"]) == pytest.approx((leaf.lost, leaf.unmoved), rel=1e-3)


@pytest.mark.parametrize(
    ("config", "flag", "module", "turned"),
    [
        ({"model_type": "gpt2"}, False, "h.0.attn.c_proj", True),
        ({"model_type": "gpt2"}, True, "h.0.attn.c_attn", True),
        ({"model_type": "gpt2"}, True, "head", False),
        ({"model_type": "bert"}, False, "c_proj", False),
        ({"model_type": "llama"}, True, "q_proj", False),  # which PEFT passes over in a Linear
        ({"model_type": "other"}, False, "c_proj", False),
        ({"model_type": "other"}, True, "c_proj", None),
        ({"model_type": None}, True, "c_proj", None),
    ],
)
def test_square_matrices_lie_as_the_configs_say(tmp_path, capsys, config, flag, module, turned):
    w, update = draw(8, 8), linear(8, 8)
    base = make_base(tmp_path / "base", {f"{module}.weight": w}, **config)
    adapter = make_adapter(tmp_path / "adapter", {module: update}, fan_in_fan_out=flag)
    if turned is None:
        refused(tmp_path, capsys, "fan_in_fan_out")
        return
    code, _, err = run(capsys, "merge", base, adapter, tmp_path / "out")
    assert code == 0 and ("fan_in_fan_out is passed over" in err) == (config["model_type"] == "llama")
    delta = deltas({module: update})[module]
    assert one_rounding(read(tmp_path / "out")[f"{module}.weight"], w + (delta.T if turned else delta))


@pytest.mark.parametrize(
    ("config", "flag", "module", "shape", "fine"),
    [
        ({"model_type": "llama"}, False, "model.k_proj", (6, 8), False),
        ({"model_type": "llama"}, True, "model.k_proj", (6, 8), False),
        ({"model_type": "llama"}, True, "model.k_proj", (8, 6), True),
        ({"model_type": "other"}, False, "model.k_proj", (6, 8), False),
        ({"model_type": "llama"}, False, "model.k_proj", (8, 6), True),
        ({"model_type": "other"}, True, "model.k_proj", (6, 8), True),
        ({"model_type": "other"}, True, "model.k_proj", (8, 6), True),
        ({"model_type": "gpt2"}, True, "h.c_fc", (6, 8), True),
        ({"model_type": "gpt2"}, True, "h.c_fc", (8, 6), False),
        ({"model_type": "gpt2"}, True, "h.other", (6, 8), False),
    ],
)
def test_a_matrix_of_the_turned_shape_is_only_a_conv1d(tmp_path, capsys, config, flag, module, shape, fine):
    w, update = draw(*shape), linear(8, 6)
    make_base(tmp_path / "base", {f"{module}.weight": w}, **config)
    make_adapter(tmp_path / "adapter", {module: update}, fan_in_fan_out=flag)
    if not fine:
        err = refused(tmp_path, capsys, "maps 6 to 8")
        assert ("fan_in_fan_out" in err.splitlines()[-1]) == (config["model_type"] == "other")
        return
    assert run(capsys, "merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")[0] == 0
    delta = deltas({module: update})[module]
    got = read(tmp_path / "out")[f"{module}.weight"]
    assert one_rounding(got, w + (delta if shape == (8, 6) else delta.T))


def test_shards_dtype_and_other_files(tmp_path, capsys):
    arrays = {f"l.{i}.fc.weight": draw(16, 8, seed=i) for i in range(5)} | {"ids": np.arange(3)}
    base = make_base(tmp_path / "base", arrays, 2, text_config={"dtype": "float32"})
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("[]")
    weights = ["adapter_config.json", "model.safetensors.bak", "pytorch_model.bin"]
    for name in (*weights, ".hidden"):
        (base / name).write_text("{}")
    (base / ".git").mkdir()
    (base / ".git" / "HEAD").write_text("ref")
    os.symlink(base / "tokenizer.json", base / "link.json")
    os.symlink(base / "1_Pooling", base / "linked")
    os.symlink(base / "nothing", base / "1_Pooling" / "dangling")
    adapter = make_adapter(tmp_path / "adapter", {f"l.{i}.fc": linear(16, 8, seed=i) for i in range(4)})
    out = tmp_path / "deep" / "out"
    code, text, err = run(
        capsys, "merge", base, adapter, out, "--shard-size", "0.6KB", "--dtype", "bfloat16", "--json"
    )
    assert code == 0, err
    report = json.loads(text)
    assert report["files"] == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    merged, strange = report["notes"]
    assert merged.endswith(f": {', '.join(weights)}") and merged in err
    assert strange.endswith(": .git, .hidden, 1_Pooling/dangling, linked") and strange in err
    expected = [*report["files"], "config.json", "tokenizer.json", "link.json", "1_Pooling", stream.INDEX]
    assert sorted(path.name for path in out.iterdir()) == sorted(expected)
    assert not (out / "link.json").is_symlink() and (out / "1_Pooling" / "config.json").is_file()
    config = json.loads((out / "config.json").read_text())
    assert (config["torch_dtype"], config["text_config"], config["model_type"]) == (
        *("bfloat16", {"dtype": "bfloat16"}, "llama"),
    )
    got = read(out)
    for name, x in arrays.items():
        if name == "ids":
            assert got[name].tobytes() == x.tobytes()
            continue
        delta = deltas({"m": linear(16, 8, seed=int(name[2]))})["m"] if name[2] != "4" else 0.0
        assert got[name].dtype == jnp.bfloat16 and one_rounding(got[name], x + delta)
    assert stream.opened(out).owner == {name: stream.opened(out).owner[name] for name in arrays}


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ("transformer.h.0.fc", "h.0.fc", "without 'transformer.'"),
        ("base.model.h.0.fc", "h.0.fc", "without 'base.model.'"),
        ("h.0.fc", "bert.h.0.fc", "with 'bert.'"),
    ],
)
def test_a_prefix_that_all_names_share_may_differ(tmp_path, capsys, theirs, ours, said):
    w = draw(8, 6)
    base = make_base(tmp_path / "base", {f"{ours}.weight": w, f"{ours}.bias": draw(8), "other.weight": w})
    full = {f"{theirs}.base_layer.bias": draw(8, seed=2)}
    adapter = make_adapter(tmp_path / "adapter", {theirs: linear(8, 6)}, full, bias="lora_only")
    code, _, err = run(capsys, "merge", base, adapter, tmp_path / "out")
    assert code == 0 and said in err
    got = read(tmp_path / "out")
    assert one_rounding(got[f"{ours}.weight"], w + deltas({"m": linear(8, 6)})["m"])
    assert got[f"{ours}.bias"].tobytes() == draw(8, seed=2).tobytes()
    assert got["other.weight"].tobytes() == w.tobytes()


# --- Tied heads ---------------------------------------------------------------------------------------

TABLE = ("embedding", draw(RANK, 12), draw(6, RANK, seed=1))


@pytest.mark.parametrize("tie", [True, None])
def test_an_adapted_embedding_says_that_a_tied_head_changes(tmp_path, capsys, tie):
    config = {"model_type": "other"} if tie is None else {"tie_word_embeddings": tie}
    base = make_base(tmp_path / "base", {"model.embed_tokens.weight": draw(12, 6)}, **config)
    adapter = make_adapter(tmp_path / "adapter", {"model.embed_tokens": TABLE})
    code, _, err = run(capsys, "merge", base, adapter, tmp_path / "out")
    assert code == 0 and "tied" in err and "changes with it" in err


@pytest.mark.parametrize(("tie", "same"), [(True, True), (True, False), (False, True), (None, True)])
def test_a_stored_head_changes_only_as_the_embeddings_copy(tmp_path, capsys, tie, same):
    w = draw(12, 6)
    head = w if same else draw(12, 6, seed=5)
    config = {} if tie is None else {"tie_word_embeddings": tie}
    base = make_base(tmp_path / "base", {"model.embed_tokens.weight": w, "lm_head.weight": head}, **config)
    adapter = make_adapter(tmp_path / "adapter", {"model.embed_tokens": TABLE})
    code, _, err = run(capsys, "merge", base, adapter, tmp_path / "out")
    got = read(tmp_path / "out")
    assert code == 0
    assert one_rounding(got["model.embed_tokens.weight"], w + deltas({"m": TABLE})["m"])
    if tie and same:
        assert got["lm_head.weight"].tobytes() == got["model.embed_tokens.weight"].tobytes()
        assert "stored copy" in err
    else:
        assert got["lm_head.weight"].tobytes() == head.tobytes()
        assert ("other values" in err) == bool(tie)


@pytest.mark.parametrize(("model", "tied"), [("gpt2", True), ("llama", False), ("other", None)])
def test_a_config_that_does_not_say_is_that_of_its_model(tmp_path, capsys, model, tied):
    w = draw(12, 6)
    arrays = {"transformer.wte.weight": w, "lm_head.weight": w}
    base = make_base(tmp_path / "base", arrays, model_type=model)
    adapter = make_adapter(tmp_path / "adapter", {"transformer.wte": TABLE})
    if tied is None:
        refused(tmp_path, capsys, '"tie_word_embeddings": true or false')
        return
    code, _, err = run(capsys, "merge", base, adapter, tmp_path / "out")
    got = read(tmp_path / "out")
    assert code == 0 and one_rounding(got["transformer.wte.weight"], w + deltas({"m": TABLE})["m"])
    head = got["transformer.wte.weight"] if tied else w
    assert got["lm_head.weight"].tobytes() == head.tobytes() and ("stored copy" in err) == tied


@pytest.mark.parametrize(
    ("config", "stored", "fine"),
    [
        ({"tie_word_embeddings": True}, None, False),
        ({"tie_word_embeddings": True}, "same", False),
        ({"tie_word_embeddings": True}, "other", True),  # which transformers does not tie
        ({"tie_word_embeddings": False}, "same", True),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, None, False),
        ({"model_type": "bert", "architectures": ["BertModel"]}, None, True),
    ],
)
def test_an_embedding_that_was_trained_in_full_needs_a_head_of_its_own(
    tmp_path, capsys, config, stored, fine
):
    w, new = draw(12, 6), draw(12, 6, seed=3)
    arrays = {"model.embed_tokens.weight": w, "fc.weight": draw(8, 6)}
    head = {"same": w, "other": draw(12, 6, seed=4)}.get(stored)
    arrays |= {} if head is None else {"lm_head.weight": head}
    base = make_base(tmp_path / "base", arrays, **config)
    full = {"model.embed_tokens.weight": new}
    adapter = make_adapter(tmp_path / "adapter", {"fc": linear(8, 6)}, full, modules_to_save=["embed_tokens"])
    if not fine:
        refused(tmp_path, capsys, "tie_word_embeddings = False")
        return
    code, _, err = run(capsys, "merge", base, adapter, tmp_path / "out")
    got = read(tmp_path / "out")
    assert code == 0 and got["model.embed_tokens.weight"].tobytes() == new.tobytes(), err
    assert head is None or got["lm_head.weight"].tobytes() == head.tobytes()


def test_a_head_of_its_own_is_merged(tmp_path, capsys):
    w = draw(12, 6)
    arrays = {"model.embed_tokens.weight": w, "lm_head.weight": w}
    base = make_base(tmp_path / "base", arrays, tie_word_embeddings=False)
    adapter = make_adapter(tmp_path / "adapter", {"lm_head": linear(12, 6)})
    assert run(capsys, "merge", base, adapter, tmp_path / "out")[0] == 0
    got = read(tmp_path / "out")
    assert one_rounding(got["lm_head.weight"], w + deltas({"m": linear(12, 6)})["m"])
    assert got["model.embed_tokens.weight"].tobytes() == w.tobytes()


# --- Refusals -----------------------------------------------------------------------------------------

BASE = {"model.fc.weight": draw(8, 6), "model.fc.bias": draw(8), "model.embed_tokens.weight": draw(12, 6)}


def refused(tmp_path, capsys, text, *more, code=1, out="out", there=()):
    found, printed, err = run(capsys, "merge", tmp_path / "base", tmp_path / "adapter", tmp_path / out, *more)
    assert (found, printed) == (code, ""), err
    assert text in err and "Traceback" not in err, err
    assert leftovers(tmp_path, "base", "adapter", *there) == []
    return err


CASES = {
    "not found": ({}, {"model.fb": linear(8, 6), "model.fd": linear(8, 6)}, {}, "\n  model.fd.weight"),
    "no head": ({}, {"model.fc": linear(8, 6)}, {"score.weight": draw(2, 6)}, "AutoModelForSequenceClass"),
    "shape": ({}, {"model.fc": linear(8, 7)}, {}, "has shape (8, 6)"),
    "kind": ({}, {"model.fc": TABLE}, {}, "(embedding) maps 12 to 6"),
    "full shape": ({}, {"model.fc": linear(8, 6)}, {"model.embed_tokens.weight": draw(11, 6)}, "(11, 6)"),
    "head": ({}, {"lm_head": linear(12, 6)}, {}, "tie_word_embeddings = False"),
    "head in full": ({}, {"model.fc": linear(8, 6)}, {"lm_head.weight": draw(12, 6)}, "head is tied"),
    "quantised": ({"quantization_config": {"bits": 4}}, {"model.fc": linear(8, 6)}, {}, "quantization_"),
    "copy": ({}, {"model.embed_tokens": TABLE}, {"model.embed_tokens.base_layer.weight": draw(12, 6, seed=8)},
             "a copy of 'model.embed_tokens.weight'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused(tmp_path, capsys, case):
    config, updates, full, text = CASES[case]
    make_base(tmp_path / "base", BASE, **config)
    in_full = case in ("no head", "full shape", "head in full")
    saved = {"modules_to_save": ["score", "embed_tokens", "lm_head"]} if in_full else {}
    make_adapter(tmp_path / "adapter", updates, full, **saved)
    refused(tmp_path, capsys, text)


def test_a_copy_of_the_embedding_that_is_the_bases_passes(tmp_path, capsys):
    make_base(tmp_path / "base", BASE)
    copy = {"model.embed_tokens.base_layer.weight": BASE["model.embed_tokens.weight"]}
    make_adapter(tmp_path / "adapter", {"model.embed_tokens": TABLE}, copy)
    assert run(capsys, "merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")[0] == 0


def test_names_in_two_places_are_refused(tmp_path, capsys):
    make_base(tmp_path / "base", {"encoder.fc.weight": draw(8, 6), "decoder.fc.weight": draw(8, 6)})
    make_adapter(tmp_path / "adapter", {"fc": linear(8, 6)})
    refused(tmp_path, capsys, "with 'decoder.', with 'encoder.'")


def test_a_head_beside_a_tied_config_is_refused(tmp_path, capsys):
    make_base(tmp_path / "base", BASE | {"lm_head.weight": draw(12, 6)}, tie_word_embeddings=True)
    make_adapter(tmp_path / "adapter", {"lm_head": linear(12, 6)})
    refused(tmp_path, capsys, "tie_word_embeddings = False")


def test_quantised_tensors_are_refused(tmp_path, capsys):
    make_base(tmp_path / "base", BASE | {"model.fc.weight": np.ones((8, 6), np.int8)})
    make_adapter(tmp_path / "adapter", {"model.fc": linear(8, 6)})
    refused(tmp_path, capsys, "has dtype I8")


def broken_index(base, change):
    index = json.loads((base / stream.INDEX).read_text())
    change(index["weight_map"])
    (base / stream.INDEX).write_text(json.dumps(index))


FILES = {
    "no config": (lambda base: (base / "config.json").unlink(), "no config.json"),
    "config no JSON": (lambda base: (base / "config.json").write_text("{"), "is no JSON"),
    "config a list": (lambda base: (base / "config.json").write_text("[]"), "holds a list"),
    "no index": (lambda base: (base / stream.INDEX).unlink(), "save_pretrained(folder)"),
    "both": (lambda base: shutil.copy(next(base.glob("*.safetensors")), base / stream.SINGLE), "are both"),
    "a file is missing": (lambda base: next(base.glob("*.safetensors")).unlink(), "which its index names"),
    "truncated": (lambda base: os.truncate(next(base.glob("*.safetensors")), 300), "truncated or damaged"),
    "outside": (lambda base: broken_index(base, lambda m: m.update(x="../x.safetensors")), "no file beside"),
    "unknown": (lambda base: broken_index(base, lambda m: m.update(x=m["model.fc.bias"])), "not agree"),
    "unlisted": (lambda base: broken_index(base, lambda m: m.pop("model.fc.weight")), "does not agree"),
    "empty": (lambda base: (base / stream.INDEX).write_text("{}"), "no weight_map"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_base_that_is_none_is_refused(tmp_path, capsys, case):
    change, text = FILES[case]
    change(make_base(tmp_path / "base", BASE, shards=2))
    make_adapter(tmp_path / "adapter", {"model.fc": linear(8, 6)})
    refused(tmp_path, capsys, text)


LAYERS = {f"model.layers.{i}.{x}.weight": draw(6, 6, seed=i) for i in range(3) for x in ("q", "k")}
LAYERS |= {f"model.layers.{i}.{x}.bias": draw(6, seed=i) for i in range(3) for x in ("q", "k")}
LAYERS |= {"model.norm.weight": draw(6), "lm_head.weight": draw(12, 6)}
ALL_Q = {f"model.layers.{i}.q": linear(6, 6) for i in range(3)}
ALL_BIASES = {name.replace("q.bias", "q.base_layer.bias"): x for name, x in LAYERS.items() if ".bias" in name}
Q_BIASES = {name: x for name, x in ALL_BIASES.items() if ".q." in name}


def without(entries, *names):
    return {name: x for name, x in entries.items() if name not in names}


LOST = {
    "factors": (without(ALL_Q, "model.layers.1.q"), {}, {}, "no factors for 'model.layers.1.q'"),
    "all factors": ({}, ALL_BIASES, {"bias": "all"}, "no factors for 'model.layers.0.q'"),
    "by expression": (
        without(ALL_Q, "model.layers.2.q"),
        {},
        {"target_modules": r".*\.\d+\.q"},
        "layers.2.q'",
    ),
    "every tensor": ({}, {}, {}, "holds no tensors"),
    "bias": (ALL_Q, without(ALL_BIASES, "model.layers.1.k.bias"), {"bias": "all"}, "'model.layers.1.k.bias'"),
    "layer's bias": (
        *(ALL_Q, without(Q_BIASES, "model.layers.2.q.base_layer.bias")),
        *({"bias": "lora_only"}, "'model.layers.2.q.bias'"),
    ),
    "module": (ALL_Q, {}, {"modules_to_save": ["lm_head"]}, "does not hold 'lm_head.weight'"),
}


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("case", LOST)
def test_an_adapter_that_lost_tensors_is_refused_as_load_peft_does(tmp_path, capsys, case, prefix):
    updates, full, config, text = LOST[case]
    arrays = LAYERS if case != "module" or not prefix else without(LAYERS, "lm_head.weight")
    # In the second case the base's names have no prefix, and the adapter's do.
    arrays = {name.removeprefix(prefix): x for name, x in arrays.items()}
    make_base(tmp_path / "base", arrays, tie_word_embeddings=False)
    make_adapter(tmp_path / "adapter", updates, full, **{"target_modules": ["q"]} | config)
    if case == "module" and prefix:
        assert run(capsys, "merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")[0] == 0
        return
    refused(tmp_path, capsys, text)
    params, rules = {}, []
    for name, x in LAYERS.items():
        linear_weight = x.ndim == 2
        params[name.replace(".", "_")] = jnp.asarray(x.T if linear_weight else x)
        rules.append(names.Rule(name.replace(".", "_"), name, "linear" if linear_weight else "plain"))
    with pytest.raises(ValueError, match=text):
        lora_jax.peft.load_peft(tmp_path / "adapter", params, rules)


NOT_TOUCHED = {
    "other layers": ({}, {}, {"layers_to_transform": [0, 2]}, ["model.layers.1.q"]),
    "other names": ({}, {}, {"exclude_modules": ["layers.1.q"]}, ["model.layers.1.q"]),
    "a pattern": ({}, {}, {"target_modules": r".*\.[02]\.q"}, ["model.layers.1.q"]),
    "whole names": ({}, {}, {"target_modules": sorted(ALL_Q)[:2]}, ["model.layers.2.q"]),
    "all linear": ({}, {}, {"target_modules": "all-linear"}, ["model.layers.1.q"]),
    "a norm": ({"model.layers.0.norm.q.weight": draw(6)}, {}, {}, []),
    "a drafting layer": ({"model.layers.3.q.weight": draw(6, 6)}, {"num_hidden_layers": 3}, {}, []),
    "a drafting model": ({"mtp.layers.0.q.weight": draw(6, 6)}, {}, {}, []),
    "experts": ({"model.layers.0.mlp.experts.4.q.weight": draw(6, 6)}, {}, {}, []),
    "a mask": ({"model.layers.0.bias": draw(1, 1, 6, 6)}, {}, {"bias": "all"}, []),
}


@pytest.mark.parametrize("case", NOT_TOUCHED)
def test_what_an_adapter_rightly_does_not_hold_is_not_missed(tmp_path, capsys, case):
    more, base, config, out = NOT_TOUCHED[case]
    make_base(tmp_path / "base", LAYERS | more, **base)
    full = ALL_BIASES if config.get("bias") else {}
    make_adapter(tmp_path / "adapter", without(ALL_Q, *out), full, **{"target_modules": ["q"]} | config)
    code, _, err = run(capsys, "merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert code == 0, err


def test_a_lost_expert_is_noticed_where_experts_are_adapted(tmp_path, capsys):
    names = [f"model.experts.{i}.w1" for i in range(3)]
    make_base(tmp_path / "base", {f"{name}.weight": draw(6, 6) for name in names})
    updates = {name: linear(6, 6) for name in names[:2]}
    make_adapter(tmp_path / "adapter", updates, target_modules=["w1"])
    refused(tmp_path, capsys, "no factors for 'model.experts.2.w1'")


def good(tmp_path, **config):
    make_base(tmp_path / "base", BASE, **config)
    make_adapter(tmp_path / "adapter", {"model.fc": linear(8, 6)})


def test_nothing_is_overwritten_without_being_told(tmp_path, capsys):
    good(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("all of it")
    refused(tmp_path, capsys, "--overwrite", there=["out"])
    refused(tmp_path, capsys, "replaces nothing else", "--overwrite", there=["out"])
    for text in ("{", "{}", '{"model_type": "llama"}'):  # no config, none of a model, no weights
        (out / "config.json").write_text(text)
        refused(tmp_path, capsys, "is no model", "--overwrite", there=["out"])
    assert (out / "thesis.txt").read_text() == "all of it"
    shutil.rmtree(out)
    out.write_text("a file")
    refused(tmp_path, capsys, "replaces nothing else", "--overwrite", there=["out"])


@pytest.mark.parametrize(
    "foreign", ["thesis.tex", ".git/HEAD", "src/train.py", "src/", "tokenizer/vocab.json"]
)
def test_a_model_with_anything_beside_it_is_not_overwritten(tmp_path, capsys, foreign):
    good(tmp_path)
    out = tmp_path / "out"
    write_it = ("merge", tmp_path / "base", tmp_path / "adapter", out)
    assert run(capsys, *write_it)[0] == 0
    (out / "generation_config.json").write_text("{}")  # of another model
    place = out / foreign
    place.parent.mkdir(exist_ok=True)
    place.mkdir() if foreign.endswith("/") else place.write_text("mine")
    refused(tmp_path, capsys, repr(foreign.removesuffix("/")), "--overwrite", there=["out"])
    assert place.exists() and (out / "generation_config.json").exists()
    shutil.rmtree(out / foreign.split("/")[0]) if "/" in foreign else place.unlink()
    assert run(capsys, *write_it, "--overwrite")[0] == 0
    assert sorted(x.name for x in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert leftovers(tmp_path, "base", "adapter", "out") == []


@pytest.mark.parametrize("name", ["README.md", "1_Pooling/notes.md", "README.md/"])
def test_a_file_that_the_base_has_too_is_replaced_only_by_its_equal(tmp_path, capsys, name):
    good(tmp_path)
    theirs, place = tmp_path / "base" / name.removesuffix("/"), tmp_path / "out" / name
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("the base's")
    write_it = ("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert run(capsys, *write_it)[0] == 0
    assert run(capsys, *write_it, "--overwrite")[0] == 0
    place = tmp_path / "out" / name.removesuffix("/")
    place.unlink()
    place.mkdir() if name.endswith("/") else place.write_text("my notes!!")
    refused(tmp_path, capsys, "the base has others by that name", "--overwrite", there=["out"])
    assert place.is_dir() or place.read_text() == "my notes!!"
    (tmp_path / "out" / "tokenizer.json").write_text("of another model")  # which is a model's
    if place.is_dir():
        place.rmdir()
    place.write_text("the base's")
    assert run(capsys, *write_it, "--overwrite")[0] == 0 and place.read_text() == "the base's"


def test_what_a_killed_merge_left_is_named(tmp_path, capsys):
    good(tmp_path)
    for name in (".lora_jax-0a", ".lora_jax-0b/old"):
        (tmp_path / name).mkdir(parents=True)
    code, _, err = run(capsys, "merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    one, two = (line for line in err.splitlines() if ".lora_jax-" in line)
    assert code == 0 and ".lora_jax-0a' is of a merge" in one and "what was at OUT before" in two
    assert (tmp_path / ".lora_jax-0b" / "old").is_dir()
    filled = tmp_path / "filled"
    (filled / ".lora_jax-0c").mkdir(parents=True)
    there = ["out", "filled", ".lora_jax-0a", ".lora_jax-0b"]
    for more in ([], ["--overwrite"]):
        refused(tmp_path, capsys, "filled/.lora_jax-0c' is of a merge", *more, out="filled", there=there)


@pytest.mark.parametrize("failure", [None, "write", "move", "interrupted", "space"])
def test_an_empty_folder_is_filled_and_stays_the_same(tmp_path, capsys, monkeypatch, failure):
    good(tmp_path)
    (tmp_path / "base" / "1_Pooling").mkdir()
    (tmp_path / "base" / "1_Pooling" / "x.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    inode = out.stat().st_ino
    monkeypatch.chdir(out)
    right, moved = os.rename, []

    def rename(source, target):
        moved.append(os.path.basename(target))
        if moved[-1] == "config.json" and failure in ("move", "interrupted"):
            monkeypatch.setattr(os, "rename", right)
            raise OSError("no rename today") if failure == "move" else KeyboardInterrupt
        right(source, target)

    def fails(*args):
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "rename", rename)
    if failure == "write":
        monkeypatch.setattr(stream, "_write_rest", fails)
    if failure == "space":
        free = {str(out): 10}
        usage = lambda path: type("Usage", (), {"free": free.get(str(path), 10**9)})  # noqa: E731
        monkeypatch.setattr(shutil, "disk_usage", usage)
    code, _, err = run(capsys, "merge", "../base", "../adapter", ".")
    assert code == {None: 0, "interrupted": 130}.get(failure, 1), err
    assert out.stat().st_ino == inode
    expected = ["1_Pooling", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(x.name for x in out.iterdir()) == ([] if failure else expected)
    assert leftovers(tmp_path, "base", "adapter", "out") == []
    if failure is None:
        assert moved[-1] == "config.json"
        code, _, err = run(capsys, "merge", "../base", "../adapter", ".", "--overwrite")
        assert code == 1 and "where this command runs" in err


def test_a_mount_point_is_not_replaced(tmp_path, capsys, monkeypatch):
    good(tmp_path)
    shutil.copytree(tmp_path / "base", tmp_path / "out")
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "out"))
    refused(tmp_path, capsys, "is a mount point", "--overwrite", there=["out"])


@pytest.mark.parametrize("out", ["base", "adapter", ".", "base/merged"])
def test_neither_base_nor_adapter_is_written_to(tmp_path, capsys, out):
    good(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refused(tmp_path, capsys, "write", "--overwrite", out=out)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_an_adapter_of_this_library_is_refused_with_the_way(tmp_path, capsys):
    make_base(tmp_path / "base", BASE)
    wrapped = lora_jax.wrap({"fc": {"kernel": jnp.ones((6, 8))}}, rank=2)
    lora_jax.save_adapter(tmp_path / "adapter", wrapped)
    assert "lora_jax.peft.save_peft(" in refused(tmp_path, capsys, "is an adapter of this library")


# --- What fails leaves nothing ------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("failure", ["infinite", "cast", "full", "no space", "interrupted", "read"])
def test_a_failure_leaves_what_was_there(tmp_path, capsys, monkeypatch, failure, overwrite):
    arrays = {f"l.{i}.weight": draw(16, 16, seed=i) for i in range(8)}
    update, more, code, text = linear(16, 16), [], 1, ""
    if failure == "infinite":
        arrays["l.7.weight"] = np.full((16, 16), 3e38, np.float32)
        update, text = (
            ("linear", np.full((RANK, 16), 1e19, np.float32), np.full((16, RANK), 1e19, np.float32)),
            "l.7",
        )
    elif failure == "cast":
        arrays["l.3.weight"][2, 2] = 1e9
        more, text = ["--dtype", "float16"], "'l.3.weight' would have infinite"
    base = make_base(tmp_path / "base", arrays)
    adapter = make_adapter(tmp_path / "adapter", {"l.7": update})
    out = tmp_path / "deep" / "out"
    if overwrite:
        shutil.copytree(base, out)
        more = [*more, "--overwrite"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if failure == "no space":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5000}))
        text = "are free at"
    elif failure == "interrupted":

        def stop(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(stream, "_write_rest", stop)
        code, text = 130, "interrupted"
    elif failure == "read":
        right = stream._bytes

        def fails(file, name, start, size):
            if name == "l.5.weight":
                raise OSError("the disk is gone")
            return right(file, name, start, size)

        monkeypatch.setattr(stream, "_bytes", fails)
        text = "the disk is gone"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if failure == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        text = "--shard-size): '"
    try:
        found, printed, err = run(capsys, "merge", base, adapter, out, *more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (found, printed) == (code, "") and text in err and "Traceback" not in err, err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert leftovers(tmp_path, "base", "adapter", *(["deep"] if overwrite else [])) == []
    if failure not in ("infinite", "cast"):  # what was in the way is gone: the same command works
        monkeypatch.undo()
        assert run(capsys, "merge", base, adapter, out, *more)[0] == 0


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_rename_that_fails_puts_the_old_model_back(tmp_path, capsys, monkeypatch, when):
    good(tmp_path)
    shutil.copytree(tmp_path / "base", tmp_path / "out")
    (tmp_path / "out" / "generation_config.json").write_text("mine")
    right = os.rename

    def fails(source, target):
        if os.path.basename(source) == "new":
            raise OSError("no rename today")
        right(source, target)
        if when == "between" and os.path.basename(target) == "old":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", fails)
    text, code = ("interrupted", 130) if when == "between" else ("no rename today", 1)
    refused(tmp_path, capsys, text, "--overwrite", code=code, there=["out"])
    assert read(tmp_path / "out")["model.fc.weight"].tobytes() == BASE["model.fc.weight"].tobytes()
    assert (tmp_path / "out" / "generation_config.json").read_text() == "mine"


# --- inspect ------------------------------------------------------------------------------------------


def of_dense(delta):
    values = np.linalg.svd(delta, compute_uv=False)
    p = values / values.sum()
    p = p[p > 1e-14]
    return np.sqrt(np.sum(values**2)), values[0], np.exp(-np.sum(p * np.log(p)))


def test_inspect_shows_what_the_dense_updates_have(tmp_path, capsys):
    _, updates = all_kinds(np.float32)
    updates["wide"] = ("linear", draw(5, 3), draw(4, 5))  # a rank above both sides
    full = {"model.layers.0.fc.base_layer.bias": draw(10)}
    more = {"bias": "lora_only", "base_model_name_or_path": "my/model", "lora_dropout": 0.1}
    folder = make_adapter(tmp_path / "a", updates, full, rank_pattern={"wide": 5}, **more)
    code, out, _ = run(capsys, "inspect", folder, "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["format"], found["config"]["base_model"], found["config"]["dropout"]) == (
        "peft",
        "my/model",
        0.1,
    )
    for target in found["targets"]:
        kind, a, b = updates[target["name"]]
        rank = len(a)
        assert (target["kind"], target["rank"], target["alpha"], target["scale"]) == (kind, rank, 5, 5 / rank)
        delta = 5 / rank * b.reshape(len(b), rank).astype(float) @ a.reshape(rank, -1)
        shape = delta.T.shape if kind == "embedding" else (len(delta), *a.shape[1:])
        assert target["shape"] == list(shape)
        measured = [target[key] for key in ("norm", "spectral_norm", "effective_rank")]
        assert measured == pytest.approx(of_dense(delta), rel=1e-6)
        assert (target["norm_a"], target["norm_b"]) == pytest.approx((np.linalg.norm(a), np.linalg.norm(b)))
        assert (target["numbers"], target["bytes"]) == (a.size + b.size, a.nbytes + b.nbytes)
    numbers = sum(a.size + b.size for _, a, b in updates.values()) + 10
    assert found["totals"] == {"targets": 6, "full": 1, "numbers": numbers, "bytes": 4 * numbers}
    code, table, _ = run(capsys, "inspect", folder)
    assert code == 0 and "eff. rank" in table and f"{numbers:,} numbers" in table
    assert all(module in table for module in updates)


def test_inspect_reads_adapters_of_this_library(tmp_path, capsys):
    params = {
        "layers": {"kernel": jnp.ones((3, 8, 6))},
        "qkv": {"kernel": jnp.ones((8, 12))},
        "conv": {"kernel": jnp.ones((3, 3, 2, 4))},
        "norm": {"scale": jnp.ones(8)},
    }
    axes = {"layers/kernel": ("batch", "in", "out")}
    ranks = {"layers/kernel": [4, 0, 2], ".*": 2}
    wrapped = lora_jax.wrap(params, ranks, axes=axes, alpha=8, train="norm", parts={"qkv": [(0, 4), (8, 12)]})
    drawn = iter(range(100))
    wrapped = jax.tree.map(
        lambda x: (
            x.replace(b=jnp.where(x.b == 0, draw(*x.b.shape, seed=next(drawn), dtype=x.b.dtype), x.b))
            if isinstance(x, lora_jax.LoraWeight) and not x.scale.ndim
            else x
        ),
        wrapped,
        is_leaf=lambda x: isinstance(x, lora_jax.LoraWeight),
    )
    for path in (tmp_path / "folder", tmp_path / "one.safetensors"):
        lora_jax.save_adapter(path, wrapped)
        code, out, err = run(capsys, "inspect", path, "--json")
        assert code == 0, err
        found = json.loads(out)
        rows = {x["name"]: x for x in found["targets"]}
        assert list(rows) == ["conv/kernel", "layers/kernel[0]", "layers/kernel[2]", "qkv/kernel"]
        assert [x["rank"] for x in rows.values()] == [2, 4, 2, 2]
        assert [x["alpha"] for x in rows.values()] == [8, 8, 8, 8]
        assert rows["layers/kernel[0]"]["effective_rank"] == rows["layers/kernel[0]"]["norm"] == 0
        for name in ("conv/kernel", "qkv/kernel"):
            leaf = wrapped[name.split("/")[0]]["kernel"]
            delta = np.asarray(leaf.delta(jnp.float64)).reshape(-1, leaf.shape[-1])
            measured = [rows[name][key] for key in ("norm", "spectral_norm", "effective_rank")]
            assert measured == pytest.approx(of_dense(delta), rel=1e-6)
        assert [x["name"] for x in found["full"]] == ["norm/scale"]
        code, table, _ = run(capsys, "inspect", path)
        assert code == 0 and "layers/kernel[2]" in table and "norm/scale" in table


def test_inspect_names_what_is_wrong(tmp_path, capsys):
    folder = make_adapter(tmp_path / "a", {"fc": linear(8, 6)}, use_dora=True)
    diverged = {"k": lora_jax.LoraWeight(jnp.ones((4, 4)), jnp.full((4, 1), jnp.nan), jnp.ones((1, 4)))}
    lora_jax.save_adapter(tmp_path / "nan", diverged)
    for path, text in (
        (tmp_path / "nowhere", "no adapter_config.json"),
        (folder, "use_dora"),
        (folder / "adapter_model.safetensors", "give its folder"),
        (tmp_path / "nan", "its run diverged"),
    ):
        code, out, err = run(capsys, "inspect", path)
        assert (code, out) == (1, "") and text in err and err.startswith("lora-jax: "), err


# --- The command --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [[], ["mend"], ["merge", "a", "b"], ["merge", "a", "b", "c", "--dtype", "int8"], ["inspect"],
     ["merge", "a", "b", "c", "--shard-size", "0"], ["merge", "a", "b", "c", "--shard-size", "5 apples"]],
)  # fmt: skip
def test_wrong_usage(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["inspect", "merge", "exit codes", "130"]),
        (["inspect"], ["effective_rank", "exp(-Σ pᵢ ln pᵢ)", "example", "exit codes"]),
        (["merge"], ["--overwrite", "rounds once", "example", "exit codes", "ΔW lost"]),
    ],
)
def test_help_teaches(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(word in text for word in words)
    assert max(map(len, text.splitlines())) <= 110


def test_the_command_runs_and_reports_progress(tmp_path):
    good(tmp_path)
    command = [sys.executable, "-m", "lora_jax.cli", "merge", "base", "adapter", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=_env())
    assert done.returncode == 0 and "merging: " in done.stderr and "model.fc.weight" in done.stdout


_HANGS = """
import signal, sys, time
from lora_jax import cli, stream
# A job in a shell's background is started with it ignored, and what is ignored stays so.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
before = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
def hang(*args):
    print("now", flush=True)
    time.sleep(60)
stream._write_rest = hang
code = cli.main(sys.argv[1:])
assert before == [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
sys.exit(code)
"""


@pytest.mark.parametrize(("number", "filled"), [("SIGTERM", False), ("SIGHUP", True), ("SIGINT", False)])
def test_a_signal_leaves_nothing(tmp_path, number, filled):
    good(tmp_path)
    if filled:
        (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", _HANGS, "merge", "base", "adapter", "out"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=_env(), **pipes) as process:
        assert process.stdout.readline() == "now\n"
        process.send_signal(getattr(signal, number))
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, number), err
    assert "interrupted" in err and "Traceback" not in err
    assert leftovers(tmp_path, "base", "adapter", *(["out"] if filled else [])) == []
    assert not filled or not any((tmp_path / "out").iterdir())


def test_closed_outputs_are_no_errors(tmp_path):
    good(tmp_path)
    program = f"{sys.executable} -m lora_jax.cli"
    for line in ("inspect adapter >&-", "merge base adapter out >&- 2>&-"):
        done = subprocess.run(
            ["sh", "-c", f"{program} {line}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env=_env(),
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert set(read(tmp_path / "out")) == set(BASE)


@pytest.mark.parametrize("full", [False, True])
def test_outputs_that_cannot_be_written_to_stop_no_merge(tmp_path, full):
    good(tmp_path)
    command = [sys.executable, "-m", "lora_jax.cli", "merge", "base", "adapter", "out", "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    device = os.open("/dev/full", os.O_WRONLY)
    outputs = {"stdout": device, "stderr": subprocess.PIPE} if full else {"stdout": writer, "stderr": writer}
    done = subprocess.run(command, cwd=tmp_path, **outputs, text=True, check=False, env=_env())
    os.close(writer)
    os.close(device)
    assert done.returncode == 1 and set(read(tmp_path / "out")) == set(BASE)
    assert leftovers(tmp_path, "base", "adapter", "out") == []
    if full:
        last = done.stderr.splitlines()[-1]
        assert "out' is complete, but its report was not written: [Errno 28]" in last


class Gone(io.StringIO):
    """A terminal that is gone."""

    def isatty(self):
        return True

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")


def test_a_terminal_that_is_gone_stops_no_merge(tmp_path, capsys, monkeypatch):
    good(tmp_path)
    (tmp_path / "base" / ".hidden").write_text("of which a note is written")
    monkeypatch.setattr(sys, "stderr", Gone())
    assert run(capsys, "merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")[0] == 0
    assert set(read(tmp_path / "out")) == set(BASE)
    assert sys.stderr.name == os.devnull
    sys.stderr.close()


def _env():
    root = os.path.dirname(os.path.dirname(lora_jax.__file__))
    return os.environ | {"PYTHONPATH": root, "PYTHONIOENCODING": "utf-8"}
