"""Each way to adapt trains what it says and nothing else, and starts as the base, on Bert and on Llama."""

import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from newest import newest

import lora_jax
from experiments import methods
from experiments.models import bert, generate, llama

DATA = os.environ.get("LORA_JAX_DATA")
D, LAYERS, VOCAB, R, BOTTLENECK, PREFIX = 8, 2, 20, 2, 5, 4
HEADS = {"bert": "classifier", "llama": "lm_head"}
BOUND = 1e-12
SETTINGS = {"rank": R, "bottleneck": BOTTLENECK, "prefix": PREFIX}
PAIRS = [(kind, way) for way in methods.WAYS for kind in HEADS]
# What is computed, for every way on one of the two: compiling takes the time.
IN_TURN = [(list(HEADS)[i % 2], way) for i, way in enumerate(methods.WAYS)]
TOKENS = jnp.asarray([[3, 9, 4, 1, 7], [5, 2, 8, 0, 0]], jnp.int32)
VALID = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)


# On the older versions the experiments' own tests run what is here.
pytestmark = newest


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm mixes dtypes
        yield


def new_model(kind, layers=LAYERS, scan=False, dtype=jnp.float64, window=None):
    if kind == "bert":
        config = bert.BertConfig(VOCAB, 16, 2, D, layers, 2, 12, num_labels=3, scan=scan)
        return bert.Bert(config, dtype)
    config = llama.LlamaConfig(
        model_type="llama",
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=12,
        num_layers=layers,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        max_positions=32,
        sliding_window=window,
        attention_bias=True,
        rms_norm_eps=1e-6,
        rope_theta=100.0,
        rope_scaling=None,
        tie_embeddings=False,
        bos_id=None,
        eos_ids=(),
    )
    return llama.Llama(config, dtype, scan)


def noisy(tree, seed, size=0.5):
    """A tree with noise on every leaf, so that none is zero or one."""
    leaves, treedef = jax.tree.flatten(tree)
    draw = np.random.default_rng(seed).normal
    return treedef.unflatten([x + jnp.asarray(size * draw(size=x.shape), x.dtype) for x in leaves])


@functools.cache
def drawn(kind, *layers):
    model = new_model(kind, *layers)
    with jax.numpy_dtype_promotion("standard"):
        shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    start = {path: np.full(x.shape, path[-1] == "scale", x.dtype) for path, x in flatten_dict(shapes).items()}
    return model, noisy(unflatten_dict(start), 1)


@functools.cache
def prepared(kind, way, *layers):
    model, params = drawn(kind, *layers)
    with jax.numpy_dtype_promotion("standard"):
        return methods.prepare(way, model, params, jax.random.key(3), head=HEADS[kind], **SETTINGS)


def outputs(out):
    return out if isinstance(out, jax.Array) else jnp.concatenate([out.hidden.ravel(), out.logits.ravel()])


def close(actual, expected, bound=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound * np.abs(expected).max())


def blind(kind, path):
    """A bias that adds the same to all of a query's scores, of which softmax sees nothing."""
    return kind == "bert" and path.endswith("/key/bias")


def marked(wrapped):
    """What of a tree is trained, by path."""
    found = flatten_dict(wrapped, sep="/")
    return {p: x for p, x in found.items() if isinstance(x, lora_jax.LoraWeight | lora_jax.FullWeight)}


def test_there_is_no_way_without_a_test():
    assert set(EXPECTED) == set(methods.WAYS)


# --- What is trained -----------------------------------------------------------------------------------

# Which paths are marked, and how many numbers are trained, beside the head.
HOUSLBY = LAYERS * 2 * (2 * D * BOTTLENECK + BOTTLENECK + D)
LIN = LAYERS * (2 * D * BOTTLENECK + BOTTLENECK + D + 2 * D)
ALONG = {"bert": LAYERS * R * 4 * D, "llama": LAYERS * R * (D + 8 + D + 4)}
# Attention has four matrices and the MLP two, and Bert's pooler is linear too; Llama's MLP has three.
LINEAR = {
    "bert": LAYERS * R * (4 * 2 * D + 2 * (D + 12)) + R * 2 * D,
    "llama": LAYERS * R * (2 * (D + 8) + 2 * (D + 4) + 3 * (D + 12)),
}
BIASES = {"bert": 2 * D + LAYERS * (7 * D + 12), "llama": LAYERS * (8 + 4 + 4 + D)}
LAYER = {
    "bert": 4 * (D * D + D) + 2 * D * 12 + 12 + D + 4 * D,
    "llama": 2 * D * 8 + 2 * D * 4 + 8 + 4 + 4 + D + 3 * D * 12 + 2 * D,
}
REST = {"bert": VOCAB * D + 18 * D + 2 * D + D * D + D, "llama": VOCAB * D + D}
EVERY = {kind: LAYERS * LAYER[kind] + REST[kind] for kind in HEADS}
EXPECTED = {
    "full": (r".*", EVERY),
    "top2": (r".*layers?_[01]/.*", {kind: 2 * LAYER[kind] for kind in HEADS}),
    "head": (r"(?!)", dict.fromkeys(HEADS, 0)),
    "bitfit": (r".*/bias", BIASES),
    "lora_qv": (r".*/(query|value|q_proj|v_proj)/kernel", ALONG),
    "lora_all": (r".*/kernel", LINEAR),
    "adapter": (
        r".*_\d/(attention/output|output|self_attn|mlp)/adapter/.*",
        dict.fromkeys(HEADS, HOUSLBY),
    ),
    "adapter_l": (r".*_\d/adapter/.*", dict.fromkeys(HEADS, LIN)),
    "prefix": (r".*_\d/prefix", dict.fromkeys(HEADS, LAYERS * PREFIX * D)),
    "lora_prefix": (
        r".*_\d/prefix|.*/(query|value|q_proj|v_proj)/kernel",
        {kind: n + LAYERS * PREFIX * D for kind, n in ALONG.items()},
    ),
}
HEAD_SIZE = {"bert": 3 * D + 3, "llama": D * VOCAB}


@pytest.mark.parametrize(("kind", "way"), PAIRS)
def test_what_is_marked_and_how_much_it_is(kind, way):
    pattern, counts = EXPECTED[way]
    tree, base = prepared(kind, way).wrapped, flatten_dict(drawn(kind)[1], sep="/")
    paths = flatten_dict(tree, sep="/").keys()
    found = marked(tree)
    expected = {path for path in paths if re.fullmatch(pattern, path) or path.startswith(HEADS[kind])}
    assert found.keys() == expected
    assert lora_jax.summary(tree).trainable == counts[kind] + HEAD_SIZE[kind]
    lora = {path for path, x in found.items() if isinstance(x, lora_jax.LoraWeight)}
    kernels = rf"(?!{HEADS[kind]}).*/kernel"
    assert lora == {path for path in found if "lora" in way and re.fullmatch(kernels, path)}
    for path, x in base.items():  # frozen leaves are the caller's own arrays
        leaf = flatten_dict(tree, sep="/")[path]
        assert leaf is x or path in found
        assert path not in lora or leaf.w is x


def test_top2_is_the_last_two():
    model = new_model("llama", layers=12)

    def marks(key):
        return methods.prepare("top2", model, model.init(key, TOKENS)["params"], key).wrapped

    found = marked(jax.eval_shape(marks, jax.random.key(0)))
    assert {path.split("/")[0] for path in found} == {"layers_10", "layers_11"}


@pytest.mark.skipif(DATA is None, reason="set LORA_JAX_DATA to a folder that holds paper/lora_paper.json")
@pytest.mark.parametrize(
    ("way", "layers", "width", "bottleneck", "table", "row"),
    [
        ("adapter_l", 24, 1024, 6, "table3_e2e", "gpt2-medium AdapterL {:.2f}M"),
        ("adapter_l", 24, 1024, 224, "table3_e2e", "gpt2-medium AdapterL {:.2f}M"),
        ("adapter", 96, 12288, 8, "table4_gpt3", "AdapterH {:.1f}M"),
    ],
)
def test_bottlenecks_have_the_sizes_that_the_paper_gives(way, layers, width, bottleneck, table, row):
    """Only the width and the number of the layers count, so Bert stands for the paper's models."""
    config = bert.BertConfig(10, 8, 2, width, layers, 2, 4, pooler=False, scan=True)

    def wrapped():
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), bert.abstract(config))
        way_ = methods.prepare(way, bert.Bert(config), params, jax.random.key(0), bottleneck=bottleneck)
        return way_.wrapped

    count = lora_jax.summary(jax.eval_shape(wrapped)).trainable
    paper = json.loads((Path(DATA) / "paper" / "lora_paper.json").read_text())
    assert row.format(count / 1e6) in paper[table]


# --- What is computed ----------------------------------------------------------------------------------


@functools.cache
def base_outputs(kind):
    model, params = drawn(kind)
    return outputs(model.apply({"params": params}, TOKENS, VALID))


@pytest.mark.parametrize(("kind", "way"), IN_TURN)
def test_ways_start_as_the_base_but_for_prefixes(kind, way):
    start = prepared(kind, way)
    out, base = outputs(lora_jax.lora(start.apply)(start.wrapped, TOKENS, VALID)), base_outputs(kind)
    if "prefix" in way:
        assert np.abs(out - base).max() > 0.01
    else:
        close(out, base, BOUND)


@pytest.mark.parametrize(("kind", "way"), IN_TURN)
def test_gradients_reach_all_that_is_trained(kind, way):
    way = prepared(kind, way)
    trainable, frozen = lora_jax.partition(way.wrapped)
    trainable = noisy(trainable, 6)  # where b and up are zero, a and down get none

    def loss_fn(trainable):
        tree = lora_jax.combine(trainable, frozen)
        return jnp.sum(jnp.sin(outputs(lora_jax.lora(way.apply)(tree, TOKENS, VALID))))

    for path, leaf in marked(jax.grad(loss_fn)(trainable)).items():
        for gradient in jax.tree.leaves(leaf):
            assert (np.abs(gradient).max() > 1e-9) != blind(kind, path), path


FULL = {"full": r".*", "head": "(?!)", "bitfit": r".*/bias"}


@pytest.mark.parametrize(("kind", "way"), [("llama", "full"), ("bert", "head"), ("bert", "bitfit")])
def test_training_in_full_equals_optax_by_hand(kind, way):
    (model, params), prepared_way = drawn(kind, 1), prepared(kind, way, 1)
    tx = optax.sgd(0.1, momentum=0.9)  # Adam would divide a gradient that is rounding by its own size

    def loss(out):
        return jnp.mean(jnp.sin(outputs(out)))

    def loss_fn(params, batch, key):
        return loss(prepared_way.apply(params, batch, VALID))

    state = lora_jax.TrainState.create(prepared_way.wrapped, tx, jax.random.key(0))
    step = lora_jax.make_train_step(loss_fn, tx)

    every = flatten_dict(params, sep="/")
    ours = {p: x for p, x in every.items() if re.fullmatch(FULL[way], p) or p.startswith(HEADS[kind])}
    assert (len(ours) == len(every)) == (way == "full")

    def whole(trained, batch):
        return loss(model.apply({"params": unflatten_dict(every | trained, sep="/")}, batch, VALID))

    @jax.jit
    def by_hand(gradients, opt_state, trained):
        updates, opt_state = tx.update(gradients, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state

    opt_state = jax.jit(tx.init)(ours)
    for batch in (TOKENS, TOKENS[::-1], TOKENS + 3):
        state, _ = step(state, batch)
        ours, opt_state = by_hand(jax.grad(whole)(ours, batch), opt_state, ours)
    for path, leaf in flatten_dict(state.wrapped, sep="/").items():
        if path in ours:
            close(leaf.value, ours[path], BOUND)
            assert np.abs(ours[path] - every[path]).max() > 0 or blind(kind, path)
        else:
            assert leaf is every[path]


@pytest.mark.parametrize("kind", HEADS)
def test_houlsby_s_adapter_works_on_the_output_of_attention_and_mlp(kind):
    """Where relu's inputs are far above zero y + (y D + c) U + b is linear: part of the product before it."""
    model, params = drawn(kind)
    way = prepared(kind, "adapter")
    leaves = flatten_dict(lora_jax.merge(way.wrapped), sep="/")
    places = {
        "bert": {"attention/output/adapter": "attention/output/dense", "output/adapter": "output/dense"},
        "llama": {"self_attn/adapter": "self_attn/o_proj", "mlp/adapter": "mlp/down_proj"},
    }[kind]
    draw = np.random.default_rng(5).normal
    changed: dict[str, Any] = dict(leaves)
    equal: dict[str, Any] = dict(flatten_dict(params, sep="/"))
    for path in [path for path in leaves if path.endswith("adapter/down/kernel")]:
        adapter = path.removesuffix("/down/kernel")
        place = next(place for place in places if re.search(rf"\d/{place}$", adapter))
        product = adapter.removesuffix(place) + places[place]
        down, up = draw(size=(D, BOTTLENECK)), 0.3 * draw(size=(BOTTLENECK, D))
        c = np.full(BOTTLENECK, 1e3)
        # Llama's last product has no bias to take the constant up.
        b = -c @ up + (draw(size=D) if f"{product}/bias" in equal else 0.0)
        changed |= {f"{adapter}/down/kernel": down, f"{adapter}/down/bias": c}
        changed |= {f"{adapter}/up/kernel": up, f"{adapter}/up/bias": b}
        linear = np.eye(D) + down @ up
        equal[f"{product}/kernel"] = equal[f"{product}/kernel"] @ linear
        if f"{product}/bias" in equal:
            equal[f"{product}/bias"] = equal[f"{product}/bias"] @ linear + c @ up + b
    assert sum(path.endswith("adapter/down/kernel") for path in changed) == 2 * LAYERS
    changed, equal = (unflatten_dict(x, sep="/") for x in (changed, equal))
    out = way.apply(changed, TOKENS, VALID)
    close(outputs(out), outputs(model.apply({"params": equal}, TOKENS, VALID)), 1e-10)


def by_layers(model, params, tokens, valid, layer):
    """Bert's hidden states with `layer(fn, x, mask, params)` in place of each layer fn(x, mask)."""
    empty = bert.Bert(dataclasses.replace(model.config, num_layers=0, num_labels=None), model.dtype)
    x = empty.apply({"params": params}, tokens, valid).hidden
    for i in range(LAYERS):
        own = params["encoder"][f"layer_{i}"]

        def fn(x, mask, own=own):
            return bert.Layer(model.config, model.dtype).apply({"params": own}, x, mask)[0]

        x = layer(fn, x, valid, own)
    return x


def test_bert_s_additions_are_those_written_by_hand():
    def with_adapter(fn, x, mask, own):
        x, own = fn(x, mask), own["adapter"]
        y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
        y = y * own["LayerNorm"]["scale"] + own["LayerNorm"]["bias"]
        y = jnp.maximum(y @ own["down"]["kernel"] + own["down"]["bias"], 0)
        return x + y @ own["up"]["kernel"] + own["up"]["bias"]

    def with_prefix(fn, x, mask, own):
        front = jnp.stack([own["prefix"]] * len(x))
        mask = jnp.concatenate([jnp.ones((len(x), PREFIX), bool), mask], 1)
        return fn(jnp.concatenate([front, x], 1), mask)[:, PREFIX:]

    model, _ = drawn("bert")
    for way, layer in (("adapter_l", with_adapter), ("prefix", with_prefix)):
        way = prepared("bert", way)
        tree = noisy(lora_jax.merge(way.wrapped), 4)
        expected = by_layers(model, tree, TOKENS, VALID, layer)
        close(way.apply(tree, TOKENS, VALID).hidden, expected)


# --- Prefixes before Llama ------------------------------------------------------------------------------


def tokens_of(way):
    """The tokens whose activations a prefix of Llama starts as."""
    tree = lora_jax.merge(way.wrapped)
    distance = tree["layers_0"]["prefix"][:, None] - tree["embed_tokens"]["embedding"]
    distance = jnp.abs(distance).max(-1)
    assert float(distance.min(-1).max()) == 0
    return distance.argmin(-1).astype(jnp.int32)


def left(tokens, valid):
    order = jnp.argsort(valid, axis=1, stable=True)
    return jnp.take_along_axis(tokens, order, 1), jnp.take_along_axis(valid, order, 1)


def test_a_new_prefix_is_the_tokens_it_was_made_from():
    """By a whole pass, and by `decode` in two pieces with a cache; padded on either side, in a window."""
    model, params = new_model("llama", window=6), drawn("llama")[1]
    way = methods.prepare("prefix", model, params, jax.random.key(3), prefix=PREFIX)
    tokens, valid = (jnp.concatenate(x) for x in zip((TOKENS, VALID), left(TOKENS, VALID), strict=True))
    last = np.arange(4), jnp.asarray([4, 2, 4, 4])
    front = jnp.broadcast_to(tokens_of(way), (4, PREFIX))

    def by_cache(tree):
        cache = model.empty_cache(4, 5)
        _, cache = model.apply({"params": tree}, tokens[:, :2], valid[:, :2], cache, method="decode")
        return model.apply({"params": tree}, tokens[:, 2:], valid[:, 2:], cache, method="decode")[0]

    with_front = [jnp.concatenate(x, 1) for x in ((front, tokens), (jnp.ones_like(front, bool), valid))]
    real = np.asarray(jax.jit(model.apply)({"params": params}, *with_front)[:, PREFIX:])
    whole = jax.jit(lora_jax.lora(way.apply))(way.wrapped, tokens, valid)
    close(whole[valid], real[valid], BOUND)
    close(jax.jit(lora_jax.lora(way.within(by_cache)))(way.wrapped), real[last], BOUND)


def test_generation_goes_on_from_a_prefix():
    model, params = drawn("llama")
    params = noisy(params, 8)  # so that the texts are not one token again and again
    way = methods.prepare("lora_prefix", model, params, jax.random.key(3), rank=R, prefix=PREFIX)
    prompts, valid = left(TOKENS, VALID)
    front = jnp.broadcast_to(tokens_of(way), (2, PREFIX))
    real = jnp.concatenate([front, TOKENS], 1), jnp.concatenate([jnp.ones_like(front, bool), VALID], 1)
    fn = functools.partial(generate.beam, model, max_new=5, eos_id=0, num_beams=2)
    text = jax.jit(lora_jax.lora(way.within(fn)))(way.wrapped, prompts, valid)
    np.testing.assert_array_equal(text, jax.jit(fn)(params, *real))
    assert len(np.unique(text)) > 3


# --- Stacked layers, and refusals -----------------------------------------------------------------------


def stacked(tree, kind):
    """The tree of an unrolled model as that of a scanned one."""
    tree = dict(tree)
    inner = dict(tree["encoder"]) if kind == "bert" else tree
    name = "layer" if kind == "bert" else "layers"
    layers = [inner.pop(f"{name}_{i}") for i in range(LAYERS)]
    inner[name] = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    return tree | ({"encoder": inner} if kind == "bert" else inner)


@pytest.mark.parametrize(
    ("kind", "way"), [("bert", "adapter"), ("llama", "adapter_l"), ("llama", "prefix"), ("bert", "prefix")]
)
def test_scanned_layers_have_their_own_additions(kind, way):
    model = new_model(kind, scan=True)
    unrolled = prepared(kind, way)
    tree = lora_jax.merge(unrolled.wrapped)
    base = stacked(drawn(kind)[1], kind)
    scanned = methods.prepare(way, model, base, jax.random.key(3), head=HEADS[kind], **SETTINGS)
    fresh = lora_jax.merge(scanned.wrapped)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, stacked(tree, kind))
    if way == "prefix":  # it begins without a draw of its own: as what flows
        jax.tree.map(functools.partial(close, bound=BOUND), fresh, stacked(tree, kind))
    tree = noisy(tree, 6)
    out = jax.jit(scanned.apply)(stacked(tree, kind), TOKENS, VALID)
    close(outputs(out), outputs(unrolled.apply(tree, TOKENS, VALID)), BOUND)


def test_half_a_precision_is_trained_in_float32():
    model = new_model("bert", dtype=jnp.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), drawn("bert")[1])
    way = jax.eval_shape(lambda p: methods.prepare("adapter", model, p, jax.random.key(0)).wrapped, params)
    assert {(x.value.dtype, x.dtype) for x in marked(way).values()} == {
        (jnp.dtype("float32"), jnp.dtype("bfloat16"))
    }


def test_refusals():
    prepare, key = functools.partial(methods.prepare, key=jax.random.key(0)), "bert"
    model, params = drawn(key)
    with pytest.raises(ValueError, match="no way 'lora' to adapt; write one of full, top2"):
        prepare("lora", model, params)
    with pytest.raises(ValueError, match="head='clasifier' matches no path; the model has classifier, emb"):
        prepare("full", model, params, head="clasifier")
    with pytest.raises(ValueError, match="'head' trains nothing here: give head="):
        prepare("head", model, params)
    with pytest.raises(TypeError, match="the model is a Dense; a bert.Bert or a llama.Llama"):
        prepare("full", bert.nn.Dense(2), params)
    with pytest.raises(ValueError, match="one stack here; write scan=False"):
        prepare("top2", new_model(key, scan=True), stacked(params, key))
    without = unflatten_dict(
        {path: x for path, x in flatten_dict(drawn("llama")[1]).items() if path[-1] != "bias"}
    )
    with pytest.raises(ValueError, match="'bitfit' trains biases, and this Llama has none"):
        prepare("bitfit", new_model("llama"), without)
