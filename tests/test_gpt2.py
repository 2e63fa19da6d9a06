"""The GPT-2 of the experiments computes what transformers computes, from files in the same layout."""

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from newest import some

import lora_jax
from experiments.models import generate, gpt2, hub
from lora_jax import names
from lora_jax.tree import leaves_with_path

FIXTURES = Path(__file__).parent / "fixtures"
# The record is in float64, so only rounding separates it from either.
BOUNDS = {jnp.dtype("float32"): 1e-5, jnp.dtype("float64"): 1e-12}


def close(actual, expected, bound=None):
    """The largest difference is small beside the largest value."""
    bound = BOUNDS[actual.dtype] if bound is None else bound
    assert actual.shape == expected.shape
    assert np.abs(np.asarray(actual) - expected).max() <= bound * np.abs(expected).max()


load = functools.cache(gpt2.load)


def recorded(name):
    found = dict(np.load(FIXTURES / f"{name}.npz"))
    return found, jnp.asarray(found["tokens"]), jnp.asarray(found["valid"])


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm mixes dtypes
        yield


@pytest.mark.parametrize("name", ["gpt2_tiny", "gpt2_untied"])
@pytest.mark.parametrize(("dtype", "scan"), some([("float64", True), ("float32", False)]))
def test_logits_hidden_states_and_gradients_equal_the_recorded_ones(name, dtype, scan):
    known, tokens, valid = recorded(name)
    model, params = load(FIXTURES / name, dtype, scan=scan)

    def scalar(params):
        logits, kept = model.apply(
            {"params": params},
            tokens,
            valid,
            capture_intermediates=lambda module, _: not scan or module.name == "ln_f",
            mutable=["intermediates"],
        )
        kept = kept["intermediates"]
        last = kept["ln_f"]["__call__"][0]
        value = jnp.sum(logits * known["probe"].astype(dtype))
        return value + jnp.sum(last * known["probe_hidden"].astype(dtype)), (logits, kept)

    gradients, (logits, kept) = jax.jit(jax.grad(scalar, has_aux=True))(params)
    close(logits[valid], known["logits"][known["valid"]])
    close(kept["ln_f"]["__call__"][0][valid], known["hidden"][-1][known["valid"]])
    if not scan:
        hidden = [kept["wte"]["__call__"][0] + kept["wpe"]["__call__"][0]]
        hidden += [kept[f"h_{i}"]["__call__"][0][0] for i in range(model.config.num_layers - 1)]
        for actual, expected in zip(hidden, known["hidden"][:-1], strict=True):
            close(actual[valid], expected[known["valid"]])
    leaves, seen = dict(leaves_with_path(gradients)), set()
    for piece in itertools.chain(*names.named(gradients, names.gpt2()).values()):
        if (key := f"gradient:{piece.name}") in known:
            close(piece.of(leaves[piece.path]), known[key])
            seen.add(key)
    assert seen == {key for key in known if key.startswith("gradient:")}


@pytest.mark.parametrize("scan", some([True, False]))
def test_cached_decoding_gives_the_logits_of_the_whole_sequence(scan):
    model, params = load(FIXTURES / "gpt2_tiny", "float64", scan=scan)
    _, tokens, valid = recorded("gpt2_tiny")
    cache = model.empty_cache(2, 9)
    apply = jax.jit(model.apply, static_argnames="method")
    whole = apply({"params": params}, tokens, valid)
    for first, last in ((0, 5), (5, 6), (6, 9)):
        logits, cache = apply(
            {"params": params}, tokens[:, first:last], valid[:, first:last], cache, method="decode"
        )
        close(logits, whole[:, last - 1], 1e-12)
    assert int(cache["start"]) == 9
    assert {leaf.shape[0] for leaf in jax.tree.leaves((cache["valid"], cache["layers"]))} == {2}


def test_padding_on_either_side_changes_nothing():
    model, params = load(FIXTURES / "gpt2_tiny", "float64")
    tokens = jnp.asarray([[5, 9, 30]], jnp.int32)
    apply = jax.jit(model.apply, static_argnames="method")
    alone = apply({"params": params}, tokens)
    for before, after in ((2, 0), (0, 2)):
        wide = jnp.pad(tokens, ((0, 0), (before, after)), constant_values=7)
        valid = jnp.pad(jnp.ones((1, 3), bool), ((0, 0), (before, after)))
        close(apply({"params": params}, wide, valid)[:, before : before + 3], alone, 1e-12)
        logits, _ = apply({"params": params}, wide, valid, model.empty_cache(1, 5), method="decode")
        close(logits, alone[:, -1], 1e-12)


@pytest.mark.parametrize("scan", some([True, False]))
def test_generated_texts_equal_the_recorded_ones(scan):
    known, tokens, valid = recorded("gpt2_tiny")
    model, params = load(FIXTURES / "gpt2_tiny", "float64", scan=scan)
    how = {"max_new": 8, "eos_id": 45}
    greedy = functools.partial(generate.greedy, model, no_repeat_ngram_size=2, **how)
    beam = functools.partial(
        generate.beam, model, no_repeat_ngram_size=3, num_beams=3, length_penalty=0.5, **how
    )
    for fn, name in ((greedy, "greedy"), (beam, "beam")):
        np.testing.assert_array_equal(jax.jit(fn)(params, tokens, valid), known[name])


@pytest.mark.parametrize("scan", some([True, False]))
def test_lora_runs_on_it(scan):
    model, params = load(FIXTURES / "gpt2_tiny", "float64", scan=scan)
    _, tokens, valid = recorded("gpt2_tiny")
    wrapped = lora_jax.wrap(params, rank=2, targets="attn/c_attn|mlp/c_fc|wte", dtype=jnp.float64)
    trainable, frozen = lora_jax.partition(wrapped)
    key = jax.random.key(0)
    trainable = jax.tree.map(lambda x: jax.random.normal(key, x.shape, x.dtype), trainable)
    wrapped = lora_jax.combine(trainable, frozen)
    apply = jax.jit(model.apply)
    merged = apply({"params": lora_jax.merge(wrapped)}, tokens, valid)
    close(jax.jit(lora_jax.lora(model.apply))({"params": wrapped}, tokens, valid), merged, 1e-12)
    assert float(jnp.abs(merged - apply({"params": params}, tokens, valid)).max()) > 0.1


@pytest.mark.parametrize(
    ("preset", "count"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080)],
)
@pytest.mark.parametrize("scan", some([True, False]))
def test_presets_have_the_published_sizes(preset, count, scan):
    config = dataclasses.replace(gpt2.PRESETS[preset], scan=scan)
    assert sum(leaf.size for leaf in jax.tree.leaves(gpt2.abstract(config))) == count


def test_bfloat16_stays_bfloat16():
    model, params = load(FIXTURES / "gpt2_untied", "bfloat16")
    known, tokens, valid = recorded("gpt2_untied")
    logits = jax.jit(model.apply)({"params": params}, tokens, valid)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {logits.dtype} == {jnp.dtype(jnp.bfloat16)}
    close(logits.astype(jnp.float32)[valid], known["logits"][known["valid"]], 0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_neo"}, "model_type is 'gpt_neo'"),
        ({"activation_function": "laplace"}, "activation_function is 'laplace'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_is_not_served_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        gpt2.GPT2Config.from_dict(hub.config(FIXTURES / "gpt2_tiny") | changes)


def test_more_tokens_than_positions_is_refused():
    model, params = load(FIXTURES / "gpt2_tiny")
    with pytest.raises(ValueError, match="25 tokens exceed the model's 24 positions"):
        model.apply({"params": params}, jnp.zeros((1, 25), jnp.int32))
    with pytest.raises(ValueError, match="25 slots exceed"):
        model.empty_cache(1, 25)
