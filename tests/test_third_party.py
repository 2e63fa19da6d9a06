"""Models from other libraries, unmodified: law 1 and its gradients, `infer_axes`, and merge.

Each is skipped where its library is absent. What installs all of them:

    pip install -e ".[test,models]"
    pip install --no-deps gemma==3.3.0 kauldron==1.4.2 google-tunix==0.1.7

The second line leaves out what those three ask for and their models do not import; the extra has the rest.
"""

import os

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from newest import FUSED

import lora_jax
from lora_jax.tree import leaves_with_path

# Keras chooses its backend when it is first imported, by whomever: tensorflow imports it too.
os.environ["KERAS_BACKEND"] = "jax"

TOKENS = jnp.asarray([[1, 5, 2, 10, 3], [4, 3, 10, 9, 7]], jnp.int32)


@pytest.fixture(autouse=True)
def usual_promotion():
    with jax.numpy_dtype_promotion("standard"):  # the libraries' own code mixes dtypes
        yield


def drawn(tree):
    """A tree of arrays of the same shapes and dtypes, drawn at random."""
    rng = np.random.default_rng(7)  # jax.random would compile for every shape
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), tree)


def cast(tree, dtype):
    return jax.tree.map(
        lambda x: (
            x.astype(dtype) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating) else x
        ),
        tree,
    )


def outputs(run, point):
    """What a function of the factors gives, and the gradients of a weighted sum of it, as a list."""

    def loss(point):
        out = run(point)
        weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return jnp.sum(out * weights), out

    gradients, out = jax.jit(jax.grad(loss, has_aux=True), compiler_options=FUSED)(point)
    assert jax.tree.structure(gradients) == jax.tree.structure(point)
    return [out, *jax.tree.leaves(gradients)]


def distance(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs)
    return np.max(np.abs(ours - theirs)) / (1 + np.max(np.abs(theirs)))


def assert_law(fn, params, wrapped, *inputs, float32_inside=False):
    """Law 1 in float64, with every factor drawn at random; and merge, as wrap made them.

    A model that casts to float32 inside returns rounding of 1e-16 as rounding of 1e-7, now and then. It is
    held to its own distance between float32 and float64, which is what it calls exact.
    """
    assert_merges_to(params, wrapped)
    trainable, frozen = lora_jax.partition(wrapped)
    point = drawn(trainable)
    assert {leaf.dtype for leaf in jax.tree.leaves(point)} == {jnp.dtype(jnp.float64)}

    def merged(point, frozen=frozen):
        return fn(lora_jax.merge(lora_jax.combine(point, frozen)), *inputs)

    def ours(point):
        return lora_jax.lora(fn)(lora_jax.combine(point, frozen), *inputs)

    expected = outputs(merged, point)
    tolerance = 1e-12
    if float32_inside:
        rounded = outputs(lambda p: merged(p, cast(frozen, jnp.float32)), cast(point, jnp.float32))
        tolerance = max(map(distance, rounded, expected))
        assert tolerance < 1e-5
    # What the factors do is far more than the tolerance, in the output and for each of them.
    assert distance(jax.jit(lambda: fn(params, *inputs))(), expected[0]) > 1e3 * tolerance
    for actual, theirs in zip(outputs(ours, point), expected, strict=True):
        assert jax.typeof(actual) == jax.typeof(theirs)
        assert np.max(np.abs(theirs)) > 1e2 * tolerance
        assert distance(actual, theirs) <= tolerance


def assert_merges_to(params, wrapped):
    """While b is zero merge gives the tree that was wrapped, bit for bit."""
    merged = lora_jax.merge(wrapped)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True):
        if isinstance(theirs, jax.Array):
            assert jax.typeof(ours) == jax.typeof(theirs)
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert ours is theirs


def adapted(wrapped):
    """The axes of what was wrapped, by path."""
    leaves = leaves_with_path(wrapped, lambda leaf: isinstance(leaf, lora_jax.LoraWeight))
    return {path: leaf.axes for path, leaf in leaves if isinstance(leaf, lora_jax.LoraWeight)}


def twice(layer, names):
    """Kinds for the layers 0 and 1 from those of one."""
    return {f"{layer.format(i)}/{name}": kinds for i in range(2) for name, kinds in names.items()}


class LinenBlock(nn.Module):
    """The decoder block of flax's lm1b example."""

    @nn.compact
    def __call__(self, x, mask):
        double = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        h = nn.LayerNorm(**double)(x)
        x += nn.MultiHeadDotProductAttention(num_heads=4, use_bias=False, **double)(h, mask=mask)
        h = nn.LayerNorm(**double)(x)
        return x + nn.Dense(16, **double)(nn.relu(nn.Dense(24, **double)(h)))


class LinenLM(nn.Module):
    """Its language model, with learned positions and logits by the embedding."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 16, dtype=jnp.float64, param_dtype=jnp.float64, name="embed")
        positions = self.param("positions", nn.initializers.normal(1.0), (1, 8, 16), jnp.float64)
        x = embed(tokens) + positions[:, : tokens.shape[1]]
        for i in range(2):
            x = LinenBlock(name=f"block_{i}")(x, nn.make_causal_mask(tokens))
        return embed.attend(nn.LayerNorm(param_dtype=jnp.float64)(x)) / 4.0


def test_linen_lm():
    model = LinenLM()
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]

    def fn(params, tokens):
        return model.apply({"params": params}, tokens)

    axes = lora_jax.infer_axes(fn, params, TOKENS)
    kernels = twice(
        "block_{}",
        {
            "MultiHeadDotProductAttention_0/query/kernel": ("in", "out", "out"),
            "MultiHeadDotProductAttention_0/key/kernel": ("in", "out", "out"),
            "MultiHeadDotProductAttention_0/value/kernel": ("in", "out", "out"),
            "MultiHeadDotProductAttention_0/out/kernel": ("in", "in", "out"),
            "Dense_0/kernel": ("in", "out"),
            "Dense_1/kernel": ("in", "out"),
        },
    )
    assert axes == {"embed/embedding": ("in", "out")} | kernels
    assert axes.lookups == {"embed/embedding"}
    wrapped = lora_jax.wrap(params, rank=2, dtype=jnp.float64)
    assert adapted(wrapped) == kernels
    # The tied table as well, which is looked up first and contracted last.
    wrapped = lora_jax.wrap(params, rank=2, targets=".*(kernel|embedding)", dtype=jnp.float64)
    assert adapted(wrapped) == axes
    assert_law(fn, params, wrapped, TOKENS)


def test_gemma():
    pytest.importorskip("kauldron.typing")
    gm = pytest.importorskip("gemma.gm")
    config = gm.nn.config.TransformerConfig(
        num_embed=11,
        embed_dim=16,
        hidden_dim=24,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        final_logit_softcap=30.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        use_qk_norm=True,
        attention_types=(gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL),
        sliding_window_size=3,
    )
    model = gm.nn.Transformer(config=config, dtype=jnp.float64)
    params = model.init(jax.random.key(0), TOKENS)["params"]

    def fn(params, tokens):
        return model.apply({"params": params}, tokens).logits

    axes = lora_jax.infer_axes(fn, params, TOKENS)
    # Queries are (heads, in, head_dim), keys and values (2, heads, in, head_dim), the gate (2, in, hidden).
    kernels = twice(
        "layer_{}",
        {
            "attn/q_einsum/w": ("out", "in", "out"),
            "attn/kv_einsum/w": ("out", "out", "in", "out"),
            "attn/attn_vec_einsum/w": ("in", "in", "out"),
            "mlp/gating_einsum": ("out", "in", "out"),
            "mlp/linear": ("in", "out"),
        },
    )
    assert axes == {"embedder/input_embedding": ("in", "out")} | kernels
    assert axes.lookups == {"embedder/input_embedding"}
    wrapped = lora_jax.wrap(params, rank=2, axes=axes, dtype=jnp.float64)
    assert adapted(wrapped) == kernels
    assert_law(fn, params, wrapped, TOKENS)


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_tunix():
    with flax.config.temp_flip_flag("always_shard_variable", False):  # tunix sets it when it is imported
        llama3 = pytest.importorskip("tunix.models.llama3.model")
        config = llama3.ModelConfig(
            num_layers=2,
            vocab_size=11,
            embed_dim=16,
            hidden_dim=24,
            num_heads=4,
            head_dim=8,
            num_kv_heads=2,
            rope_theta=10_000,
            norm_eps=1e-5,
        )
        model = llama3.Llama3(config, rngs=nnx.Rngs(0))
    # It makes float32 kernels of zeros for the MLP.
    nnx.update(model, drawn(cast(nnx.state(model), jnp.float64)))
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    inputs = (TOKENS, positions, None, jnp.broadcast_to(jnp.tril(jnp.ones((5, 5), bool)), (2, 5, 5)))

    def fn(model, *inputs):
        return model(*inputs)[0]

    axes = lora_jax.infer_axes(fn, model, *inputs)
    kernels = twice(
        "layers/{}",
        {
            "attn/q_proj/w": ("in", "out", "out"),
            "attn/k_proj/w": ("in", "out", "out"),
            "attn/v_proj/w": ("in", "out", "out"),
            "attn/o_proj/w": ("in", "in", "out"),
            "mlp/gate_proj/kernel": ("in", "out"),
            "mlp/up_proj/kernel": ("in", "out"),
            "mlp/down_proj/kernel": ("in", "out"),
        },
    )
    assert axes == {"embedder/input_embedding": ("in", "out"), "lm_head/w": ("in", "out")} | kernels
    assert axes.lookups == {"embedder/input_embedding"}
    wrapped = lora_jax.wrap(model, rank=2, dtype=jnp.float64)
    assert adapted(nnx.state(wrapped)) == kernels
    assert_law(fn, model, wrapped, *inputs, float32_inside=True)


def test_equinox():
    pytest.importorskip("equinox")
    import equinox as eqx

    class Block(eqx.Module):
        norms: list
        attention: eqx.nn.MultiheadAttention
        mlp: eqx.nn.MLP

        def __init__(self, key):
            first, second = jax.random.split(key)
            self.norms = [eqx.nn.LayerNorm(16), eqx.nn.LayerNorm(16)]
            self.attention = eqx.nn.MultiheadAttention(4, 16, key=first)
            self.mlp = eqx.nn.MLP(16, 16, 24, 1, activation=jax.nn.gelu, key=second)

        def __call__(self, x):
            h = jax.vmap(self.norms[0])(x)
            x += self.attention(h, h, h, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
            return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))

    class Transformer(eqx.Module):
        embedding: eqx.nn.Embedding
        blocks: list
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            self.embedding = eqx.nn.Embedding(11, 16, key=keys[0])
            self.blocks = [Block(keys[1]), Block(keys[2])]
            self.head = eqx.nn.Linear(16, 11, key=keys[3])

        def __call__(self, tokens):
            x = jax.vmap(self.embedding)(tokens)
            for block in self.blocks:
                x = block(x)
            return jax.vmap(self.head)(x)

    def fn(model, tokens):
        return jax.vmap(model)(tokens)

    model = Transformer(jax.random.key(0))
    axes = lora_jax.infer_axes(fn, model, TOKENS)
    # Equinox's weights are (out, in).
    kernels = twice(
        "blocks/{}",
        {
            "attention/query_proj/weight": ("out", "in"),
            "attention/key_proj/weight": ("out", "in"),
            "attention/value_proj/weight": ("out", "in"),
            "attention/output_proj/weight": ("out", "in"),
            "mlp/layers/0/weight": ("out", "in"),
            "mlp/layers/1/weight": ("out", "in"),
        },
    )
    assert axes == {"embedding/weight": ("in", "out"), "head/weight": ("out", "in")} | kernels
    assert axes.lookups == {"embedding/weight"}
    wrapped = lora_jax.wrap(model, rank=2, dtype=jnp.float64)
    assert adapted(wrapped) == kernels
    assert_law(fn, model, wrapped, TOKENS)


def test_keras(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))  # where it would write a file of settings
    keras = pytest.importorskip("keras")
    assert keras.backend.backend() == "jax"
    double = {"dtype": "float64"}
    tokens = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(11, 16, name="embedding", **double)(tokens)
    for i in range(2):
        h = keras.layers.LayerNormalization(**double)(x)
        attention = keras.layers.MultiHeadAttention(4, 8, name=f"attention_{i}", **double)
        x = keras.layers.Add(**double)([x, attention(h, h, use_causal_mask=True)])
        h = keras.layers.LayerNormalization(**double)(x)
        h = keras.layers.Dense(24, activation="gelu", name=f"up_{i}", **double)(h)
        x = keras.layers.Add(**double)([x, keras.layers.Dense(16, name=f"down_{i}", **double)(h)])
    model = keras.Model(tokens, keras.layers.Dense(11, name="head", **double)(x))
    params = [variable.value for variable in model.trainable_variables]
    others = [variable.value for variable in model.non_trainable_variables]

    def fn(params, tokens):
        return model.stateless_call(params, others, tokens)[0]

    def named(kinds):
        return {model.trainable_variables[int(path)].path: axes for path, axes in kinds.items()}

    axes = lora_jax.infer_axes(fn, params, TOKENS)
    kernels = {
        f"{name.format(i)}/kernel": kinds
        for i in range(2)
        for name, kinds in {
            "attention_{}/query": ("in", "out", "out"),
            "attention_{}/key": ("in", "out", "out"),
            "attention_{}/value": ("in", "out", "out"),
            "attention_{}/attention_output": ("in", "in", "out"),
            "up_{}": ("in", "out"),
            "down_{}": ("in", "out"),
        }.items()
    }
    # A list has no names, so nothing tells the head from other kernels.
    kernels["head/kernel"] = ("in", "out")
    assert named(axes) == {"embedding/embeddings": ("in", "out")} | kernels
    assert list(named(dict.fromkeys(axes.lookups))) == ["embedding/embeddings"]
    wrapped = lora_jax.wrap(params, rank=2, axes=axes, dtype=jnp.float64)
    assert named(adapted(wrapped)) == kernels
    assert_law(fn, params, wrapped, TOKENS)
