"""The Llama of the experiments computes what transformers computes, from files in the same layout."""

import dataclasses
import functools
import itertools
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from newest import some
from safetensors.numpy import load_file, save_file

import lora_jax
from experiments.models import hub, llama
from lora_jax import names
from lora_jax.tree import leaves_with_path

FIXTURES = Path(__file__).parent / "fixtures"
TINY = FIXTURES / "llama_tiny"
STORIES = Path(os.environ.get("LORA_JAX_DATA", "")) / "stories260K"
needs_data = pytest.mark.skipif(
    "LORA_JAX_DATA" not in os.environ, reason="set LORA_JAX_DATA to a folder that holds stories260K/"
)


def stored_in(folder):
    return functools.reduce(dict.__or__, (load_file(file) for file in sorted(folder.glob("*.safetensors"))))


def tiny_tensors():
    return stored_in(TINY)


def tiny_config(**changes):
    return json.loads((TINY / "config.json").read_text()) | changes


def write_model(folder, tensors=None, **changes):
    (folder / "config.json").write_text(json.dumps(tiny_config(**changes)))
    save_file(tiny_tensors() if tensors is None else tensors, folder / "model.safetensors")
    return folder


RECORDED = np.load(FIXTURES / "llama_cases.npz")
CASES = json.loads(str(RECORDED["cases"]))
TOKENS, VALID = jnp.asarray(RECORDED["tokens"]), jnp.asarray(RECORDED["valid"])


def recorded(prefix):
    return {name.removeprefix(prefix): RECORDED[name] for name in RECORDED.files if name.startswith(prefix)}


@pytest.fixture(params=some([True, False]), ids=lambda scan: "scanned" if scan else "unrolled")
def scan(request):
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For each model that transformers computed, its folder."""
    found = {}
    for name, (base, changes) in CASES.items():
        found[name] = folder = tmp_path_factory.mktemp(name)
        raw = json.loads((FIXTURES / base / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(raw))
        tensors = stored_in(FIXTURES / base) | recorded(f"{name}/tensors/")
        save_file(tensors, folder / "model.safetensors")
    return found


@pytest.fixture(scope="module")
def computed(folders):
    """A function of a case and `scan`: its parameters, logits, hidden states, loss and gradients."""

    @functools.cache
    def compute(name, scan):
        model, params = llama.load(folders[name], scan=scan)

        def loss_fn(params):
            logits = model.apply({"params": params}, TOKENS, VALID)
            log_p = jax.nn.log_softmax(logits)[:, :-1]
            picked = jnp.take_along_axis(log_p, TOKENS[:, 1:, None], axis=2)[..., 0]
            return -jnp.mean(picked, where=VALID[:, :-1] & VALID[:, 1:]), logits

        @jax.jit
        def everything(params):
            layers = (lambda module, _: isinstance(module, llama.Layer)) if not scan else False
            hidden, state = model.apply(
                {"params": params},
                TOKENS,
                VALID,
                method="hidden",
                mutable=["intermediates"],
                capture_intermediates=layers,
            )
            (loss, logits), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
            found = {"logits": logits, "hidden": hidden, "loss": loss, "gradients": gradients}
            if not scan:
                found["layer_0"] = state["intermediates"]["layers_0"]["__call__"][0][0]
            return found

        return {"params": params, **everything(params)}

    return compute


def assert_near(found, expected, tolerance):
    """The largest difference, over the largest number."""
    assert found.shape == expected.shape
    assert float(np.abs(found - expected).max() / np.abs(expected).max()) < tolerance


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for one, two in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", some(CASES))
def test_logits_and_hidden_states_are_those_of_transformers(computed, name, scan):
    found, seen = computed(name, scan), np.asarray(VALID)
    assert found["logits"].dtype == jnp.float32
    for key in ("logits", "hidden", *(() if scan else ("layer_0",))):
        assert_near(np.asarray(found[key])[seen], RECORDED[f"{name}/{key}"][seen], 5e-6)


@pytest.mark.parametrize("name", some(CASES))
def test_gradients_are_those_of_transformers(computed, name, scan):
    found = computed(name, scan)
    np.testing.assert_allclose(found["loss"], RECORDED[f"{name}/loss"], rtol=2e-6)
    leaves = dict(leaves_with_path(found["gradients"]))
    pieces = itertools.chain(*names.named(found["params"], names.llama()).values())
    pieces = {piece.name: piece for piece in pieces}
    expected = recorded(f"{name}/gradients/")
    assert len(expected) >= 4
    for parameter, value in expected.items():
        piece = pieces[parameter]
        assert_near(piece.of(leaves[piece.path]), value, 5e-6)


@pytest.mark.parametrize("name", some(CASES))
def test_scanned_layers_compute_what_unrolled_ones_do(computed, name):
    unrolled, scanned = computed(name, False), computed(name, True)
    for key in ("logits", "hidden", "loss"):
        assert_near(np.asarray(scanned[key]), np.asarray(unrolled[key]), 1e-6)
    for module, leaf in (("self_attn", "q_proj"), ("mlp", "down_proj")):
        stacked = [unrolled["gradients"][f"layers_{i}"][module][leaf]["kernel"] for i in range(2)]
        found = scanned["gradients"]["layers"][module][leaf]["kernel"]
        assert_near(np.asarray(found), np.asarray(jnp.stack(stacked)), 1e-6)


def test_a_lora_of_scanned_layers_is_that_of_unrolled_ones():
    (model, params), (scanned_model, scanned_params) = (llama.load(TINY, scan=scan) for scan in (False, True))
    unrolled, scanned = (
        lora_jax.wrap(tree, rank=2, targets="q_proj|down_proj") for tree in (params, scanned_params)
    )
    for name, module in (("self_attn", "q_proj"), ("mlp", "down_proj")):
        nodes = []
        for i in range(2):
            node = unrolled[f"layers_{i}"][name][module]["kernel"]
            nodes.append(node.replace(b=jnp.full_like(node.b, 0.1 * (i + 1))))
            unrolled[f"layers_{i}"][name][module]["kernel"] = nodes[-1]
        a, b = (jnp.stack([getattr(node, factor) for node in nodes]) for factor in "ab")
        node = scanned["layers"][name][module]["kernel"]
        scanned["layers"][name][module]["kernel"] = node.replace(a=a, b=b)
    one = jax.jit(lora_jax.lora(model.apply))({"params": unrolled}, TOKENS)
    other = jax.jit(lora_jax.lora(scanned_model.apply))({"params": scanned}, TOKENS)
    assert_near(np.asarray(other), np.asarray(one), 1e-6)
    merged = jax.jit(model.apply)({"params": lora_jax.merge(unrolled)}, TOKENS)
    assert_near(np.asarray(one), np.asarray(merged), 1e-5)


@pytest.mark.parametrize("shard_bytes", [10**9, 9_000])
@pytest.mark.parametrize("name", some(CASES))
def test_what_is_loaded_is_saved_again(folders, tmp_path, name, scan, shard_bytes):
    model, params = llama.load(folders[name], scan=scan)
    config = model.config.to_dict()
    hub.save(tmp_path, params, names.llama(), config, shard_bytes=shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_bytes == 9_000)
    before, after = stored_in(folders[name]), stored_in(tmp_path)
    assert before.keys() == after.keys()
    for tensor_name, tensor in before.items():
        assert tensor.dtype == after[tensor_name].dtype
        assert tensor.tobytes() == after[tensor_name].tobytes()
    again, same = llama.load(tmp_path, scan=scan)
    assert again == model
    assert_same(params, same)


def test_no_model_is_overwritten_by_chance(tmp_path):
    model, params = llama.load(TINY)
    llama.save(tmp_path, model, params)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"
    with pytest.raises(FileExistsError, match="overwrite=True"):
        llama.save(tmp_path, model, params)
    llama.save(tmp_path, model, params, overwrite=True)


def test_a_merged_model_is_saved(tmp_path):
    model, params = llama.load(TINY)
    wrapped = lora_jax.wrap(params, rank=2)
    wrapped = jax.tree.map(lambda x: x + 0.01 if x.ndim > 1 else x, wrapped)
    merged = lora_jax.merge(wrapped)
    llama.save(tmp_path, model, merged)
    _, loaded = llama.load(tmp_path)
    assert_same(merged, loaded)


def test_each_tensor_goes_to_its_sharding(scan):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    model, params = llama.load(TINY, scan=scan)

    def place(leaf):
        spec = ["x" if leaf.shape[-1] % 8 == 0 else None]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*[None] * (leaf.ndim - 1), *spec))

    shardings = jax.tree.map(place, params)
    _, spread = llama.load(TINY, shardings=shardings, scan=scan)
    assert jax.tree.map(lambda x: x.sharding, spread) == shardings
    assert_same(params, spread)


@pytest.mark.parametrize("name", some(CASES))
def test_configurations_survive(folders, name):
    config = llama.LlamaConfig.from_dict(hub.config(folders[name]))
    assert llama.LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    several = dataclasses.replace(config, eos_ids=(1, 5, 9))
    assert llama.LlamaConfig.from_dict(several.to_dict()) == several
    assert several.eos_id == 1


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 9}, 9),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 256}, None),
        ({"model_type": "mistral"}, None),
        ({"model_type": "mistral", "max_position_embeddings": 10_000}, 4096),
        ({"model_type": "qwen2", "sliding_window": 9}, None),
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True}, None),
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}, 9),
        ({"sliding_window": 9}, None),
    ],
)
def test_the_window_is_what_transformers_takes(changes, window):
    assert llama.LlamaConfig.from_dict(tiny_config(**changes)).sliding_window == window


def test_rope_fields_of_older_files_mean_the_same():
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    new = tiny_config(rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, **scaling})
    old = tiny_config(rope_theta=500.0, rope_scaling={"type": "llama3", **scaling})
    del old["rope_parameters"]
    config = llama.LlamaConfig.from_dict(old)
    assert config == llama.LlamaConfig.from_dict(new)
    assert config.rope_scaling is not None


def test_one_file_loads_as_the_shards_do(tmp_path):
    _, sharded = llama.load(TINY)
    _, single = llama.load(write_model(tmp_path))
    assert_same(sharded, single)


def test_parameter_names_and_layout():
    _, params = llama.load(TINY)
    stored = tiny_tensors()
    np.testing.assert_array_equal(
        params["layers_1"]["self_attn"]["k_proj"]["kernel"],
        stored["model.layers.1.self_attn.k_proj.weight"].T,
    )
    np.testing.assert_array_equal(params["embed_tokens"]["embedding"], stored["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["lm_head"]["kernel"], stored["lm_head.weight"].T)
    assert set(params["layers_0"]["mlp"]) == {"gate_proj", "up_proj", "down_proj"}


def test_a_tied_head_reads_the_embedding(tmp_path):
    tensors = tiny_tensors()
    del tensors["lm_head.weight"]
    model, params = llama.load(write_model(tmp_path, tensors, tie_word_embeddings=True))
    assert "lm_head" not in params
    untied = llama.Llama(llama.LlamaConfig.from_dict(tiny_config()))
    head = {"lm_head": {"kernel": params["embed_tokens"]["embedding"].T}}
    tokens = jnp.asarray([[0, 5, 9]], jnp.int32)
    np.testing.assert_allclose(
        model.apply({"params": params}, tokens),
        untied.apply({"params": params | head}, tokens),
        rtol=0,
        atol=1e-5,
    )


def test_bfloat16_stays_bfloat16():
    model, params = llama.load(TINY, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    tokens = jnp.asarray([[0, 5, 9, 30]], jnp.int32)
    logits = model.apply({"params": params}, tokens)
    assert logits.dtype == jnp.bfloat16
    exact, exact_params = llama.load(TINY)
    expected = exact.apply({"params": exact_params}, tokens)
    assert float(jnp.abs(logits.astype(jnp.float32) - expected).max()) < 0.05 * float(jnp.abs(expected).max())


def test_cached_decoding_gives_the_logits_of_the_whole_sequence(folders, scan):
    model, params = llama.load(folders["mistral" if scan else "llama3"], scan=scan)
    whole = jax.jit(model.apply)({"params": params}, TOKENS)
    cache = model.empty_cache(2, 12)
    apply = jax.jit(model.apply, static_argnames="method")
    for first, last in ((0, 8), (8, 11), (11, 12)):
        piece = TOKENS[:, first:last]
        valid = jnp.ones(piece.shape, bool)
        logits, cache = apply({"params": params}, piece, valid, cache, method="decode")
        np.testing.assert_allclose(logits, whole[:, last - 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 9},
            "1 of 2 layers have a sliding_window",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
    ],
)
def test_what_is_not_served_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        llama.load(write_model(tmp_path, **changes))


def test_a_missing_part_of_the_scaling_is_named():
    rope = {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}
    with pytest.raises(ValueError, match="'llama3' needs low_freq_factor too"):
        llama.LlamaConfig.from_dict(tiny_config(rope_parameters=rope))


def test_tensors_that_do_not_fit_are_named(tmp_path):
    tensors = tiny_tensors()
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)
    tensors["model.layers.9.mlp.up_proj.bias"] = np.zeros((3,), np.float32)
    with pytest.raises(ValueError) as error:
        llama.load(write_model(tmp_path, tensors))
    for part in (
        "norm/scale is missing",
        "'model.layers.9.mlp.up_proj.bias' is not part of the model",
        "'model.layers.0.mlp.up_proj.weight' has shape (3, 4), config.json says (40, 16)",
    ):
        assert part in str(error.value)


def test_several_dtypes_need_a_choice(tmp_path):
    tensors = tiny_tensors()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float16)
    folder = write_model(tmp_path, tensors)
    with pytest.raises(ValueError, match="several dtypes"):
        llama.load(folder)
    _, params = llama.load(folder, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_missing_weights_are_named(tmp_path):
    shutil.copy(TINY / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        llama.load(tmp_path)


@needs_data
def test_stories260k_logits_equal_the_recorded_ones():
    recorded = np.load(FIXTURES / "stories260K_logits.npz")
    model, params = llama.load(STORIES)
    logits = jax.jit(model.apply)({"params": params}, jnp.asarray(recorded["tokens"]))
    assert_near(np.asarray(logits), recorded["logits"], 5e-6)
