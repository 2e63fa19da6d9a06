"""Folders in the Hugging Face layout: what they hold is read and written, or an error says why not."""

import copy
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lora_jax
from experiments.models import bert, gpt2, hub, llama
from lora_jax import names
from lora_jax.tree import leaves_with_path, map_with_path

FIXTURES = Path(__file__).parent / "fixtures"
TINY = FIXTURES / "gpt2_tiny"
CONFIG = gpt2.GPT2Config.from_dict(hub.config(TINY))
MODELS = {"gpt2_tiny": (gpt2, names.gpt2), "gpt2_untied": (gpt2, names.gpt2)}
MODELS |= {"bert_tiny": (bert, names.bert), "roberta_tiny": (bert, lambda: names.bert("roberta."))}
template = functools.cache(gpt2.abstract)


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm mixes dtypes
        yield


def stored():
    return load_file(TINY / "model.safetensors")


def write(folder, tensors):
    folder.mkdir(exist_ok=True)
    shutil.copy(TINY / "config.json", folder)
    save_file(tensors, folder / "model.safetensors")
    return folder


def load(folder, **options):
    return hub.load(folder, template(CONFIG), names.gpt2(), **options)


def same_bits(first, second):
    """Two folders hold the same tensors, bit for bit."""
    first, second = hub.stored(first), hub.stored(second)
    assert first.keys() == second.keys()
    for name in first:
        assert (first[name].dtype, first[name].shape) == (second[name].dtype, second[name].shape)
        assert first[name].view().tobytes() == second[name].view().tobytes()


# --- Round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scan", [False, True])
def test_what_was_loaded_is_saved_bit_for_bit(tmp_path, name, scan):
    library, rules = MODELS[name]
    _, params = library.load(FIXTURES / name, scan=scan)
    hub.save(tmp_path / "one", params, rules(), hub.config(FIXTURES / name))
    same_bits(FIXTURES / name, tmp_path / "one")
    hub.save(tmp_path / "shards", params, rules(), hub.config(FIXTURES / name), shard_bytes=6000)
    same_bits(FIXTURES / name, tmp_path / "shards")
    assert hub.config(tmp_path / "shards") == hub.config(FIXTURES / name)
    files = sorted(file.name for file in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        with safe_open(tmp_path / "shards" / file, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
            sizes = [opened.get_tensor(key).nbytes for key in opened.keys()]
            assert sum(sizes) <= 6000 or len(sizes) == 1
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    tensors = hub.stored(tmp_path / "shards")
    assert index["weight_map"] == {key: tensor.file.path.name for key, tensor in tensors.items()}
    assert index["metadata"]["total_size"] == sum(
        x.nbytes for x in load_file(FIXTURES / name / "model.safetensors").values()
    )


@pytest.mark.parametrize("name", ["gpt2_tiny", "roberta_tiny"])
def test_stacked_layers_hold_what_the_single_ones_do(name):
    library, _ = MODELS[name]
    _, single = library.load(FIXTURES / name)
    _, stacked = library.load(FIXTURES / name, scan=True)
    root, layer = (single, "h") if library is gpt2 else (single["encoder"], "layer")
    expected = jax.tree.map(lambda *x: jnp.stack(x), *[root[f"{layer}_{i}"] for i in range(2)])
    found = stacked["h"] if library is gpt2 else stacked["encoder"]["layer"]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_bfloat16_is_read_and_written(tmp_path):
    params = load(TINY, dtype=jnp.bfloat16)
    wide = load(TINY)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), params, wide)
    hub.save(tmp_path, params, names.gpt2(), hub.config(TINY))
    assert hub.one_dtype(tmp_path) == jnp.bfloat16 and hub.config(tmp_path)["dtype"] == "bfloat16"
    again = load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {jnp.dtype(jnp.bfloat16)}


def test_bytes_of_bfloat16_stand_where_the_header_says(tmp_path):
    bits = np.array([0x3F80, 0xC000, 0x0001, 0x7F80], np.uint16)
    text = json.dumps(
        {
            "w": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [3, 11]},
            "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        }
    ).encode()
    (tmp_path / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + b"abc" + bits.tobytes()
    )
    tree = {"kernel": jax.ShapeDtypeStruct((2, 2), "float32")}
    params = hub.load(tmp_path, tree, [names.Rule("kernel", "w", "plain")], ignore=("odd",))
    assert params["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(params["kernel"]).view(np.uint16).ravel(), bits)


@pytest.mark.parametrize(
    "dtype", ["float64", "float16", "int8", "uint16", "bool", "float8_e4m3fn", "float8_e5m2"]
)
def test_every_dtype_goes_there_and_back(tmp_path, dtype):
    leaf = jnp.asarray([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    tree = {"a": leaf, "b": leaf[:, :0], "c": leaf[0, 0]}
    rules = [names.Rule("[abc]", r"\g<0>", "plain")]
    hub.save(tmp_path, tree, rules, {})
    again = hub.load(tmp_path, tree, rules)
    assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {jnp.dtype(dtype)}
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_one_leaf_may_be_several_tensors(tmp_path):
    kernel = np.arange(2 * 4 * 6, dtype=np.float32).reshape(2, 4, 6)
    rule = names.Rule(
        "qkv/kernel", "h.{n}.{c}.weight", "linear: n d (c o) -> o d", names={"c": ("q", "k", "v")}, factor=2.0
    )
    hub.save(tmp_path, {"qkv": {"kernel": kernel}}, [rule], {})
    assert sorted(hub.stored(tmp_path)) == [f"h.{n}.{c}.weight" for n in range(2) for c in "kqv"]
    np.testing.assert_array_equal(
        load_file(tmp_path / "model.safetensors")["h.1.k.weight"], kernel[1, :, 2:4].T / 2.0
    )
    tree = {"qkv": {"kernel": jax.ShapeDtypeStruct(kernel.shape, "float32")}}
    place = NamedSharding(jax.make_mesh((2, 4), ("n", "d")), P("n", "d"))
    for sharding in (None, place):
        loaded = hub.load(tmp_path, tree, [rule], shardings=sharding)["qkv"]["kernel"]
        np.testing.assert_array_equal(loaded, kernel)


def test_a_factor_is_applied_to_the_part_that_is_read(tmp_path):
    scale = np.arange(1, 9, dtype=np.float32)
    rule = names.Rule("norm/scale", "norm.weight", "plain", factor=4.0)
    hub.save(tmp_path, {"norm": {"scale": scale}}, [rule], {})
    np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")["norm.weight"], scale / 4)
    place = NamedSharding(jax.make_mesh((8,), ("x",)), P("x"))
    tree = {"norm": {"scale": jax.ShapeDtypeStruct((8,), "float32")}}
    np.testing.assert_array_equal(hub.load(tmp_path, tree, [rule], shardings=place)["norm"]["scale"], scale)


def test_merged_parameters_open_in_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for name, (library, rules) in MODELS.items():
        model, params = library.load(FIXTURES / name)
        wrapped = lora_jax.wrap(params, rank=2, targets=".*(c_attn|query)")
        trainable, frozen = lora_jax.partition(wrapped)
        trainable = jax.tree.map(lambda x: 0.1 * jnp.ones_like(x), trainable)
        merged = lora_jax.merge(lora_jax.combine(trainable, frozen))
        hub.save(tmp_path / name, merged, rules(), hub.config(FIXTURES / name), shard_bytes=20_000)
        kind = getattr(transformers, hub.config(FIXTURES / name)["architectures"][0])
        theirs, info = kind.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info.values())
        tokens = np.load(FIXTURES / f"{name}.npz")["tokens"][:1]
        with torch.no_grad():
            expected = theirs.eval()(torch.tensor(tokens).long()).logits.numpy()
        out = model.apply({"params": merged}, jnp.asarray(tokens))
        logits = out if library is gpt2 else out.logits
        assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


# --- What config.json leaves out ------------------------------------------------------------------

# transformers 5.23: the fields that the models read, as an empty file gives them.
CONFIGS = {
    "gpt2": ("GPT2Config", gpt2.GPT2Config),
    "bert": ("BertConfig", bert.BertConfig),
    "roberta": ("RobertaConfig", bert.BertConfig),
    "llama": ("LlamaConfig", llama.LlamaConfig),
    "mistral": ("MistralConfig", llama.LlamaConfig),
    "qwen2": ("Qwen2Config", llama.LlamaConfig),
}
DEFAULTS = {
    "gpt2": {
        "activation_function": "gelu_new",
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "layer_norm_epsilon": 1e-05,
        "n_embd": 768,
        "n_head": 12,
        "n_inner": None,
        "n_layer": 12,
        "n_positions": 1024,
        "tie_word_embeddings": True,
        "vocab_size": 50257,
    },
    "bert": {
        "attention_probs_dropout_prob": 0.1,
        "classifier_dropout": None,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": 30522,
    },
    "roberta": {
        "attention_probs_dropout_prob": 0.1,
        "classifier_dropout": None,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "type_vocab_size": 2,
        "vocab_size": 50265,
    },
    "llama": {
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "mistral": {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen2": {
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}
# What some fields do to others: the model_type, what the file has, and what becomes of it.
DERIVED = [
    ("gpt2", {"num_attention_heads": 4, "n_head": 2}, {"n_head": 4}),
    (
        "gpt2",
        {"hidden_size": 32, "num_hidden_layers": 3, "max_position_embeddings": 40},
        {"n_embd": 32, "n_layer": 3, "n_positions": 40},
    ),
    ("llama", {"hidden_size": 64, "num_attention_heads": 4}, {"num_key_value_heads": 4, "head_dim": 16}),
    ("mistral", {"hidden_size": 64, "num_attention_heads": 4}, {"num_key_value_heads": 8, "head_dim": 16}),
    ("qwen2", {"hidden_size": 64, "num_attention_heads": 4}, {"num_key_value_heads": 32}),
    (
        "qwen2",
        {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": None},
        {"num_key_value_heads": 4},
    ),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, {"sliding_window": 4096}),
    (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 2048,
            }
        },
    ),
    (
        "qwen2",
        {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
    ),
    (
        "mistral",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "rope_theta": 3.0,
                "original_max_position_embeddings": 64,
            },
            "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
        },
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "rope_theta": 3.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
]
DERIVED += [(kind, {}, {}) for kind in DEFAULTS]


@pytest.mark.parametrize(("kind", "given", "derived"), DERIVED)
def test_a_missing_field_is_what_transformers_takes(kind, given, derived):
    read = CONFIGS[kind][1].from_dict
    same = {name: value for name, value in given.items() if name in DEFAULTS[kind]}
    known = {"model_type": kind, **DEFAULTS[kind], **same, **derived}
    assert read({"model_type": kind, **given}) == read(known)


def test_every_default_is_a_recorded_one():
    assert CONFIGS.keys() == DEFAULTS.keys()
    for kind, defaults in {"gpt2": gpt2.DEFAULTS, **bert.DEFAULTS, **llama.DEFAULTS}.items():
        # Those that have another place or none in the class.
        fields = defaults.keys() - {"rope_theta", "attention_bias", "sliding_window", "head_dim"}
        assert fields <= DEFAULTS[kind].keys()


def test_the_record_is_of_transformers():
    transformers = pytest.importorskip("transformers")
    for kind, given, derived in DERIVED:
        theirs = getattr(transformers, CONFIGS[kind][0]).from_dict(copy.deepcopy(given)).to_dict()
        known = derived if given else DEFAULTS[kind]
        assert {name: theirs[name] for name in known} == known


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("gpt2", "tie_word_embeddings"),
        ("roberta", "pad_token_id"),
        ("llama", "rope_theta"),
        ("bert", "hidden_act"),
    ],
)
def test_a_field_that_is_null_is_refused_by_name(kind, field):
    with pytest.raises(ValueError, match=field):
        CONFIGS[kind][1].from_dict({"model_type": kind, field: None})


def test_null_stands_where_transformers_has_it():
    assert gpt2.GPT2Config.from_dict({"eos_token_id": None, "n_inner": None}).eos_id is None
    assert llama.LlamaConfig.from_dict({"eos_token_id": None}).eos_ids == ()
    assert bert.BertConfig.from_dict({"model_type": "bert", "pad_token_id": None}).pad_id == 0


# --- Heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "table", "library"),
    [
        ("gpt2_tiny", "transformer.wte.weight", gpt2),
        ("llama_tiny", "model.embed_tokens.weight", llama),
    ],
)
def test_a_tied_head_is_equal_to_the_embedding_or_refused(tmp_path, name, table, library):
    tensors = {key: t.view() for key, t in hub.stored(FIXTURES / name).items() if key != "lm_head.weight"}
    raw = hub.config(FIXTURES / name)

    def load_with(head, **tie):
        changed = {key: value for key, value in raw.items() if key != "tie_word_embeddings"} | tie
        (tmp_path / "config.json").write_text(json.dumps(changed))
        heads = {} if head is None else {"lm_head.weight": head}
        save_file(tensors | heads, tmp_path / "model.safetensors")
        return library.load(tmp_path)

    tied, untied = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
    missing = tied if library is gpt2 else untied  # what transformers takes
    other = tensors[table].copy()
    other[-1, -1] = np.nextafter(other[-1, -1], 1)  # one bit
    for tie in (tied, untied, {}):
        if (tie or missing) == tied:
            for head in (None, tensors[table]):
                assert "lm_head" not in load_with(head, **tie)[1]
            for head in (other, other[:-1], other.astype(np.float16)):
                with pytest.raises(ValueError, match=r"'lm_head.weight' differs from .*false in config.json"):
                    load_with(head, **tie)
        else:
            for head in (tensors[table], other):
                _, params = load_with(head, **tie)
                np.testing.assert_array_equal(params["lm_head"]["kernel"], head.T)
            with pytest.raises(ValueError, match="lm_head/kernel is missing"):
                load_with(None, **tie)


def test_a_head_that_is_ignored_by_name_is_not_compared(tmp_path):
    folder = write(tmp_path, stored() | {"lm_head.weight": 2 * stored()["transformer.wte.weight"]})
    with pytest.raises(ValueError, match="differs from"):
        gpt2.load(folder)
    assert "lm_head" not in gpt2.load(folder, ignore=(r"lm_head\.weight",))[1]


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name, (library, rules) in MODELS.items():
        model, params = library.load(FIXTURES / name)
        hub.save(f"~/{name}", params, rules(), hub.config(FIXTURES / name))
        assert (tmp_path / name / "model.safetensors").is_file()
        assert library.load(f"~/{name}")[0] == model
    model, params = llama.load(FIXTURES / "llama_tiny")
    llama.save("~/llama", model, params)
    assert llama.load(Path("~/llama"))[0] == model


# --- Meshes ---------------------------------------------------------------------------------------


def spread(mesh, scan):
    """A sharding for every leaf: each kind of axis, stacked ones too, over all of the mesh."""

    def spec(path, leaf):
        if scan and path.startswith("h/"):
            return P("x", *([None] * (len(leaf.shape) - 2)), "y")
        return (
            P(("x", "y"), None) if path.endswith("c_fc/kernel") else P(*([None] * (len(leaf.shape) - 1)), "y")
        )

    return lambda tree: map_with_path(lambda path, leaf: NamedSharding(mesh, spec(path, leaf)), tree)


@pytest.mark.parametrize("scan", [False, True])
def test_a_mesh_gets_the_same_values_each_device_its_part(scan):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    _, whole = gpt2.load(TINY, scan=scan)
    places = spread(mesh, scan)(whole)
    model, params = gpt2.load(TINY, scan=scan, shardings=places)
    for leaf, place, expected in zip(*map(jax.tree.leaves, (params, places, whole)), strict=True):
        assert leaf.sharding == place
        assert leaf.addressable_shards[0].data.size < leaf.size
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[shard.index])
    tokens = jnp.asarray([[1, 2, 3, 4]], jnp.int32)
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply({"params": params}, tokens), apply({"params": whole}, tokens), rtol=1e-4)


def test_a_mesh_saves_the_same_bits(tmp_path):
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    _, params = gpt2.load(TINY, scan=True, shardings=NamedSharding(mesh, P()))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(params)} == {8}
    params = jax.device_put(params, spread(mesh, True)(params))
    hub.save(tmp_path, params, names.gpt2(), hub.config(TINY))
    same_bits(TINY, tmp_path)


def test_a_device_reads_the_layers_that_it_holds(monkeypatch):
    read = []
    view = hub.Tensor.view
    monkeypatch.setattr(hub.Tensor, "view", lambda self: read.append(self.name) or view(self))
    place = NamedSharding(jax.make_mesh((2,), ("x",), devices=jax.devices()[:2]), P("x"))
    tree = {"h": {"attn": {"c_attn": {"kernel": jax.ShapeDtypeStruct((2, 16, 48), "float32")}}}}
    hub.load(TINY, tree, names.gpt2(), shardings=place, ignore=(r"(?!.*attn\.c_attn\.weight).*",))
    assert read == [f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)]


MEMORY = """
import jax, json, sys
from experiments.models import hub
from lora_jax.names import Rule

shape, count, folder = (1024, 1024), 48, sys.argv[1]
size, header = 4 * 1024 * 1024, {}
for i in range(count):
    header[f"{i}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
text = json.dumps(header).encode()
with open(folder + "/model.safetensors", "wb") as stream:
    stream.write(len(text).to_bytes(8, "little") + text)
    stream.truncate(stream.tell() + count * size)

def used():
    # The most so far; what getrusage says may be that of the process this one was forked from.
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

tree = {str(i): {"kernel": jax.ShapeDtypeStruct(shape, "float32")} for i in range(count)}
rules = [Rule(r"(\\d+)/kernel", r"\\1.weight")]
jax.numpy.ones(3).block_until_ready()
before = used()
params = hub.load(folder, tree, rules)
loaded = used()
hub.save(folder + "/saved", params, rules, {})
print((loaded - before) / size / count, (used() - before) / size / count)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux counts it")
def test_the_host_never_holds_the_model_twice(tmp_path):
    root = Path(hub.__file__).parents[2]
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded, saved = map(float, done.stdout.split())
    assert 0.9 < loaded < 1.2 and saved < 1.2


# --- What is found, and what does not fit ----------------------------------------------------------


def test_a_bare_model_has_no_prefix(tmp_path):
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored().items()}
    masks = {f"h.{i}.attn.bias": np.ones((1, 1, 24, 24), np.float32) for i in range(2)}
    masks["lm_head.weight"] = bare["wte.weight"]
    _, params = gpt2.load(write(tmp_path / "bare", bare | masks))
    jax.tree.map(np.testing.assert_array_equal, params, load(TINY))
    bare["h.0.attn.c_attn.biases"] = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="'h.0.attn.c_attn.biases' is not part of the model"):
        gpt2.load(write(tmp_path / "bare", bare))


def test_all_that_does_not_fit_is_named(tmp_path):
    tensors = stored()
    del tensors["transformer.ln_f.weight"]
    tensors["transformer.wpe.weight"] = np.zeros((3, 16), np.float32)
    tensors["lm_head.biases"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError) as error:
        load(write(tmp_path / "model", tensors))
    for part in (
        "ln_f/scale is missing: no tensor 'transformer.ln_f.weight'",
        "wpe/embedding: 'transformer.wpe.weight' has shape (3, 16), config.json says (24, 16)",
        "'lm_head.biases' is not part of the model",
        r"ignore=('lm_head\\.biases',)",
    ):
        assert part in str(error.value)
    del tensors["lm_head.biases"]
    with pytest.raises(ValueError) as error:
        load(write(tmp_path / "model", {"other": np.zeros(2, np.float32)}))
    assert str(error.value).count(" is missing") == 8 and "and 21 more" in str(error.value)


def test_leaves_without_a_rule_are_named(tmp_path):
    tree = {**template(CONFIG), "adapter": {"weight": jax.ShapeDtypeStruct((2, 2), "float32")}}
    with pytest.raises(ValueError, match="adapter/weight has no rule"):
        hub.load(TINY, tree, names.gpt2())
    with pytest.raises(ValueError, match="adapter/weight has no rule"):
        hub.save(tmp_path, load(TINY) | {"adapter": {"weight": jnp.ones((2, 2))}}, names.gpt2(), {})
    assert not list(tmp_path.iterdir())


def test_ignored_names_are_matched_whole(tmp_path):
    folder = write(tmp_path / "model", stored() | {"score.weight.more": np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match="'score.weight.more' is not part of the model"):
        load(folder, ignore=(r"score\.weight",))
    load(folder, ignore=(r"score\.weight", r"score\.weight\..*"))


def test_several_dtypes_need_a_choice(tmp_path):
    tensors = stored()
    tensors["transformer.h.1.ln_1.bias"] = tensors["transformer.h.1.ln_1.bias"].astype(np.float16)
    folder = write(tmp_path / "model", tensors)
    with pytest.raises(ValueError, match=r"several dtypes \['float16', 'float32'\]; choose one"):
        gpt2.load(folder)
    stacked = gpt2.abstract(gpt2.GPT2Config.from_dict(hub.config(TINY), scan=True))
    with pytest.raises(ValueError, match="h/ln_1/bias is stored in several dtypes"):
        hub.load(folder, stacked, names.gpt2())
    assert load(folder)["h_1"]["ln_1"]["bias"].dtype == jnp.float16
    _, params = gpt2.load(folder, "float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_a_dtype_that_jax_would_round_is_refused(tmp_path):
    folder = write(tmp_path / "model", {name: x.astype(np.float64) for name, x in stored().items()})
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match="h_0/attn/c_attn/bias is float64, which jax rounds"):
            load(folder)
        load(folder, dtype=jnp.float32)


@pytest.mark.parametrize("dtype", ["int8", "bool", "float17", jnp.int32, jnp.complex64, "float8_e4m3fn"])
def test_a_dtype_that_is_no_floating_one_is_refused(dtype):
    folders = {"gpt2_tiny": gpt2, "bert_tiny": bert, "llama_tiny": llama}
    for name, library in folders.items():
        with pytest.raises(ValueError, match=r"dtype is .*; write a floating one"):
            library.load(FIXTURES / name, dtype=dtype)
    with pytest.raises(ValueError, match=r"dtype is .*; write a floating one"):
        load(TINY, dtype=dtype)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_whole_numbers_for_a_floating_leaf_are_refused(tmp_path, dtype):
    folder = write(tmp_path / "model", stored() | {"transformer.ln_f.weight": np.ones(16, np.int8)})
    with pytest.raises(
        ValueError, match=r"ln_f/scale: 'transformer.ln_f.weight' is int8, no floating numbers"
    ):
        load(folder, dtype=dtype)
    folder = write(tmp_path / "ints", {name: x.astype(np.int8) for name, x in stored().items()})
    with pytest.raises(ValueError, match=r"no tensor has a floating dtype"):
        gpt2.load(folder)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    ("stored_as", "value", "dtype"),
    [("float32", 1e6, "float16"), ("float32", 3.4e38, "bfloat16"), ("float64", 1e60, "float32")],
)  # fmt: skip
def test_a_value_that_another_dtype_does_not_hold_is_refused(tmp_path, scan, stored_as, value, dtype):
    name = "transformer.h.1.mlp.c_fc.bias"
    old = {key: x.astype(stored_as) for key, x in stored().items()}
    old[name][:3] = [value, np.inf, np.nan]  # of which the last two stay what they are
    folder = write(tmp_path / "model", old)
    with pytest.raises(
        ValueError, match=rf"{name}' would have infinite or undefined values in {dtype} at 1 "
    ):
        gpt2.load(folder, dtype, scan=scan)
    old[name][0] = 1
    gpt2.load(write(folder, old), dtype, scan=scan)


def test_a_value_is_checked_in_a_leaf_of_several_tensors_too(tmp_path):
    rule = names.Rule("qkv", "{c}.weight", "linear: d (c o) -> o d", names={"c": ("q", "k")})
    kernel = np.ones((4, 6), np.float32)
    kernel[0, 4] = -1e9
    hub.save(tmp_path, {"qkv": kernel}, [rule], {})
    template = {"qkv": jax.ShapeDtypeStruct(kernel.shape, "float32")}
    with pytest.raises(ValueError, match="'k.weight' would have infinite"):
        hub.load(tmp_path, template, [rule], dtype="float16")


# --- Files that are missing or damaged ---------------------------------------------------------------


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        load(tmp_path)
    hub.save(tmp_path, load(TINY), names.gpt2(), hub.config(TINY), shard_bytes=9000)
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(FileNotFoundError, match="has no model-00002-of-0000.*, which its index names"):
        load(tmp_path)


def header(changes):
    text = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x05",
        (2**62).to_bytes(8, "little") + b"{}",
        (TINY / "model.safetensors").read_bytes()[:-1],
        (TINY / "model.safetensors").read_bytes()[:100],
        header({"shape": [2**40, 2**40]}),
        header({"shape": [-2]}),
        header({"data_offsets": [0, 2**50]}),
        header({"data_offsets": [8, 0]}),
        header({"dtype": "F33"}),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="is truncated or damaged, or no safetensors file"):
        hub.stored(tmp_path)


def test_an_index_that_lies_is_refused(tmp_path):
    hub.save(tmp_path, load(TINY), names.gpt2(), hub.config(TINY), shard_bytes=9000)
    file = tmp_path / "model.safetensors.index.json"
    for text, message in (
        ("{", "index.json' is no JSON"),
        ("[]", "holds a list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "names '1', which is no file beside it"),
    ):
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / file.name).write_text(text)
        with pytest.raises(ValueError, match=message):
            hub.stored(tmp_path / "bad")
    index = json.loads(file.read_text())
    first, *_, last = index["weight_map"]
    for change, message in (
        ({"more": index["weight_map"][first]}, "does not agree with the files about 'more'"),
        ({first: index["weight_map"][last]}, f"does not agree with the files about '{first}'"),
        ({first: "../model.safetensors"}, "which is no file beside it"),
    ):
        file.write_text(json.dumps({"weight_map": index["weight_map"] | change}))
        with pytest.raises(ValueError, match=message):
            hub.stored(tmp_path)


# --- Writing ----------------------------------------------------------------------------------------


def test_nothing_is_overwritten_unless_asked(tmp_path):
    params, config = load(TINY), hub.config(TINY)
    hub.save(tmp_path, params, names.gpt2(), config, shard_bytes=9000)
    for other in ("tokenizer.json", "model_ema.safetensors"):
        (tmp_path / other).write_text("{}")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = jax.tree.map(lambda x: x + 1, params)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        hub.save(tmp_path, other, names.gpt2(), config)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    hub.save(tmp_path, other, names.gpt2(), config, overwrite=True)
    kept = ["model_ema.safetensors", "tokenizer.json"]
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", *kept]
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path), other)
    hub.save(tmp_path, params, names.gpt2(), config, overwrite=True, shard_bytes=9000)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_failure_leaves_the_old_model(tmp_path, monkeypatch):
    params = load(TINY)
    hub.save(tmp_path, params, names.gpt2(), hub.config(TINY))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    count = itertools.count()

    def full(number):
        if next(count) == 1:
            raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        hub.save(tmp_path, params, names.gpt2(), hub.config(TINY), shard_bytes=9000, overwrite=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("overwritten", [None, 9000])
@pytest.mark.parametrize("shard_bytes", [9000, 10**9])
def test_an_interrupt_while_files_are_renamed_leaves_the_old_model(
    tmp_path, monkeypatch, shard_bytes, overwritten
):
    params, config = load(TINY), hub.config(TINY)
    new = jax.tree.map(lambda x: x + 1, params)
    hub.save(tmp_path, params, names.gpt2(), config, **({"shard_bytes": overwritten} if overwritten else {}))
    (tmp_path / "tokenizer.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    real, opens = {name: getattr(os, name) for name in ("rename", "replace")}, []

    def after(count):
        calls = itertools.count(1)

        def move(source, target, how="rename"):
            real[how](source, target)
            opens.append((tmp_path / "config.json").exists())
            if next(calls) == count:
                raise KeyboardInterrupt

        return move

    for count in itertools.count(1):
        opens.clear()
        monkeypatch.setattr(os, "rename", after(count))
        monkeypatch.setattr(os, "replace", functools.partial(after(count), how="replace"))
        try:
            hub.save(tmp_path, new, names.gpt2(), config, shard_bytes=shard_bytes, overwrite=True)
        except KeyboardInterrupt:
            assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
            continue
        # A kill between two of them leaves a folder that does not open.
        assert count > 2 and not any(opens[:-1]) and opens[-1]
        break
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path), new)


def test_a_folder_by_a_models_name_is_refused(tmp_path):
    (tmp_path / "config.json" / "mine").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"config.json is no file"):
        hub.save(tmp_path, load(TINY), names.gpt2(), hub.config(TINY), overwrite=True)
    assert (tmp_path / "config.json" / "mine").is_dir()


def test_wrapped_parameters_are_not_saved(tmp_path):
    wrapped = lora_jax.wrap(load(TINY), rank=2, targets="h_0/attn/c_attn")
    with pytest.raises(ValueError, match="h_0/attn/c_attn/kernel is wrapped: merge first"):
        hub.save(tmp_path / "model", wrapped, names.gpt2(), {})
    assert not (tmp_path / "model").exists()


def test_a_dtype_that_the_format_lacks_is_named(tmp_path):
    tree = {"w": np.ones(2, np.complex128)}
    with pytest.raises(ValueError, match="w is complex128"):
        hub.save(tmp_path, tree, [names.Rule("w", "w", "plain")], {})


def test_leaves_keep_their_own_memory(tmp_path):
    folder = write(tmp_path / "model", stored())
    params = load(folder)
    before = jax.tree.map(lambda x: np.array(x), params)
    with open(folder / "model.safetensors", "r+b") as stream:
        stream.seek(-4000, os.SEEK_END)
        stream.write(bytes(4000))
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert dict(leaves_with_path(params))["wte/embedding"].shape == (61, 16)
