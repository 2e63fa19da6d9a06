"""The Llama of the experiments computes what transformers computes, from files in the same layout."""

import functools
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from experiments.models import llama

FIXTURES = Path(__file__).parent / "fixtures"
TINY = FIXTURES / "llama_tiny"
STORIES = Path(os.environ.get("LORA_JAX_DATA", "")) / "stories260K"
needs_data = pytest.mark.skipif(
    "LORA_JAX_DATA" not in os.environ, reason="set LORA_JAX_DATA to a folder that holds stories260K/"
)


def tiny_tensors():
    return functools.reduce(dict.__or__, (load_file(file) for file in sorted(TINY.glob("*.safetensors"))))


def tiny_config(**changes):
    return json.loads((TINY / "config.json").read_text()) | changes


def write_model(folder, tensors=None, **changes):
    (folder / "config.json").write_text(json.dumps(tiny_config(**changes)))
    save_file(tiny_tensors() if tensors is None else tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("rope", ["default", "llama3"])
def test_logits_equal_the_recorded_ones(rope):
    recorded = np.load(FIXTURES / "llama_tiny_logits.npz")
    model, params = llama.load(TINY)
    if rope == "llama3":
        raw = tiny_config(rope_parameters=json.loads(str(recorded["rope_llama3"])))
        model = llama.Llama(llama.LlamaConfig.from_dict(raw))
    logits = model.apply({"params": params}, jnp.asarray(recorded["tokens"]))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, recorded[rope], rtol=0, atol=1e-4)


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
    assert jax.tree.structure(sharded) == jax.tree.structure(single)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), sharded, single)))


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
    model, params = llama.load(write_model(tmp_path, tie_word_embeddings=True))
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


def test_cached_decoding_gives_the_logits_of_the_whole_sequence():
    model, params = llama.load(TINY)
    tokens = jnp.asarray(np.load(FIXTURES / "llama_tiny_logits.npz")["tokens"])
    whole = model.apply({"params": params}, tokens)
    cache = model.empty_cache(2, 16)
    apply = jax.jit(model.apply, static_argnames="method")
    for first, last in ((0, 5), (5, 6), (6, 16)):
        piece = tokens[:, first:last]
        valid = jnp.ones(piece.shape, bool)
        logits, cache = apply({"params": params}, piece, valid, cache, method="decode")
        np.testing.assert_allclose(logits, whole[:, last - 1], rtol=0, atol=1e-4)


def pad(prompts, side):
    longest = max(map(len, prompts))
    tokens = np.full((len(prompts), longest), 7, np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, mask, prompt in zip(tokens, valid, prompts, strict=True):
        span = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        row[span], mask[span] = prompt, True
    return jnp.asarray(tokens), jnp.asarray(valid)


def generate(model, params, prompts, max_new, side="right", eos_id=1):
    decode = jax.jit(functools.partial(llama.greedy, model, max_new=max_new, eos_id=eos_id))
    return np.asarray(decode(params, *pad(prompts, side)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_text(side):
    model, params = llama.load(TINY)
    prompts = [[0, 40, 50, 60, 70, 80], [0, 90], [0, 33, 44, 55]]
    together = generate(model, params, prompts, 12, side)
    apply = jax.jit(model.apply)
    for prompt, row in zip(prompts, together, strict=True):
        new = [*row, 1][: [*row, 1].index(1) + 1][: len(row)]
        sequence = jnp.asarray([[*prompt, *new]], jnp.int32)
        best = apply({"params": params}, sequence)[0].argmax(-1)
        assert len(new) > 1
        np.testing.assert_array_equal(new, best[len(prompt) - 1 : -1])


def test_a_row_that_has_ended_stays_ended():
    model, params = llama.load(TINY)
    prompts = [[0, 40, 50, 60], [0, 90]]
    free = generate(model, params, prompts, 10, eos_id=-1)
    eos_id = int(free[0, 3])
    ended = generate(model, params, prompts, 10, eos_id=eos_id)
    for before, after in zip(free, ended, strict=True):
        stop = [*before, eos_id].index(eos_id)
        np.testing.assert_array_equal(after[:stop], before[:stop])
        assert (after[stop:] == eos_id).all()


def test_more_tokens_than_positions_is_refused():
    model, params = llama.load(TINY)
    with pytest.raises(ValueError, match="exceed the model's 256 positions"):
        generate(model, params, [[0] * 200], 57)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
    ],
)
def test_what_is_not_served_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        llama.load(write_model(tmp_path, **changes))


def test_tensors_that_do_not_fit_are_named(tmp_path):
    tensors = tiny_tensors()
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)
    tensors["model.layers.9.mlp.up_proj.bias"] = np.zeros((3,), np.float32)
    with pytest.raises(ValueError) as error:
        llama.load(write_model(tmp_path, tensors))
    for part in (
        "norm/scale is missing",
        "layers_9/mlp/up_proj/bias is not part of the model",
        r"layers_0/mlp/up_proj/kernel has shape (4, 3), config.json says (16, 40)",
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
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        llama.load(tmp_path)


@needs_data
def test_stories260k_logits_equal_the_recorded_ones():
    recorded = np.load(FIXTURES / "stories260K_logits.npz")
    model, params = llama.load(STORIES)
    logits = model.apply({"params": params}, jnp.asarray(recorded["tokens"]))
    np.testing.assert_allclose(logits, recorded["logits"], rtol=0, atol=1e-4)


@needs_data
def test_stories260k_tells_its_story():
    model, params = llama.load(STORIES)
    assert model.config.eos_id == 2
    tokenizer = Tokenizer.from_file(str(STORIES / "tokenizer.json"))
    prompt = tokenizer.encode("Once upon a time, there was a little girl").ids
    new = generate(model, params, [prompt], 40, eos_id=2)
    text = tokenizer.decode([*prompt, *new[0].tolist()])
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball."
    )
