"""What `infer_axes` reads from a trace, that `wrap` takes it, and that the law holds with it."""

import functools
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from jax import lax
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import infer_axes
from lora_jax.layouts import known_layouts
from lora_jax.targets import resolve
from lora_jax.weight import LoraWeight, is_wrapped_leaf

KEY = jax.random.key(0)
LETTERS = {"batch": "b", "in": "i", "out": "o", "unit": "u"}


def S(*shape, dtype=jnp.float64):
    return jax.ShapeDtypeStruct(shape, dtype)


X = S(2, 5, 8)
TOKENS = S(2, 5, dtype=jnp.int32)


def letters(kinds):
    return {path: "".join(LETTERS[kind] for kind in each) for path, each in kinds.items()}


def read(fn, params, *args, **kwargs):
    """The inferred kinds, one letter for each axis."""
    return letters(infer_axes(fn, params, *args, **kwargs))


def targets(params, axes=None, **options):
    """The kinds of what wrap would adapt."""
    tree = nnx.split(params)[1] if isinstance(params, nnx.Module) else params
    found, _ = resolve(tree, 2, axes=axes, layouts=known_layouts(params), **options)
    return letters({path: target.axes for path, target in found.items()})


def linen(module):
    """A Linen model as a function of its parameters."""

    def fn(params, *args):
        with jax.numpy_dtype_promotion("standard"):  # flax's own layers mix dtypes
            return module.apply({"params": params}, *args)

    return fn


def init(module, *inputs):
    with jax.numpy_dtype_promotion("standard"):
        return jax.eval_shape(module.init, KEY, *inputs)["params"]


def drawn(tree, seed=0):
    """A tree of arrays in place of one of shapes."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def draw(key, leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return 0.5 * jax.random.normal(key, leaf.shape, jnp.float64)
        return jax.random.randint(key, leaf.shape, 0, 5).astype(leaf.dtype)

    return treedef.unflatten([draw(key, leaf) for key, leaf in zip(keys, leaves, strict=True)])


def check_law(fn, params, *args, expected=None, **options):
    """lora(fn) with inferred axes equals fn on the merged weights, with every target adapted."""
    params, args = drawn(params), drawn(args, 1)
    wrapped = lora_jax.wrap(params, 2, axes=infer_axes(fn, params, *args), dtype=jnp.float64, **options)
    nodes = {
        node.path: node for node in jax.tree.leaves(wrapped, is_leaf=is_wrapped_leaf) if is_wrapped_leaf(node)
    }
    if expected is not None:
        assert set(nodes) == set(expected)
    keys = dict(zip(nodes, jax.random.split(KEY, len(nodes)), strict=True))

    def trained(node):
        if not isinstance(node, LoraWeight):
            return node
        a, b = (0.5 * jax.random.normal(keys[node.path], x.shape, jnp.float64) for x in (node.a, node.b))
        return node.replace(a=a, b=b)

    wrapped = jax.tree.map(trained, wrapped, is_leaf=is_wrapped_leaf)
    ours, theirs = lora_jax.lora(fn)(wrapped, *args), fn(lora_jax.merge(wrapped), *args)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)
    base = fn(params, *args)
    assert not np.allclose(jax.tree.leaves(base)[0], jax.tree.leaves(theirs)[0])


# Linen


class Block(nn.Module):
    """Every linear layer of Linen, in one block whose carry keeps its shape."""

    @nn.compact
    def __call__(self, c, _=None):
        h = nn.LayerNorm(param_dtype=jnp.float64)(c)
        h = nn.Dense(12, param_dtype=jnp.float64, name="up")(h)
        h = nn.Dense(8, param_dtype=jnp.float64, name="down")(nn.gelu(h))
        h = nn.MultiHeadDotProductAttention(num_heads=2, param_dtype=jnp.float64, name="attention")(h, h)
        h = nn.Conv(6, (3,), feature_group_count=2, param_dtype=jnp.float64)(h)
        h = nn.ConvTranspose(8, (2,), transpose_kernel=True, param_dtype=jnp.float64)(h)
        h = nn.DenseGeneral((2, 4), param_dtype=jnp.float64, name="split")(h)
        h = nn.DenseGeneral(8, axis=(-2, -1), param_dtype=jnp.float64, name="join")(h)
        h = nn.Einsum((8, 8), "...a,ab->...b", param_dtype=jnp.float64)(h)
        return c + h, None


BLOCK = {
    "ConvTranspose_0/kernel": "ioi",
    "Conv_0/kernel": "iio",
    "Einsum_0/kernel": "io",
    "attention/key/kernel": "ioo",
    "attention/out/kernel": "iio",
    "attention/query/kernel": "ioo",
    "attention/value/kernel": "ioo",
    "down/kernel": "io",
    "join/kernel": "iio",
    "split/kernel": "ioo",
    "up/kernel": "io",
}


def stacked(table, position):
    return {path: kinds[:position] + "b" + kinds[position:] for path, kinds in table.items()}


def scanned(position, block=Block):
    return nn.scan(block, variable_axes={"params": position}, split_rngs={"params": True}, length=3)


@pytest.mark.parametrize("freezing", [dict, freeze], ids=["dict", "FrozenDict"])
def test_linen_layers_agree_with_their_names(freezing):
    params = freezing(init(Block(), X))
    assert read(linen(Block()), params, X) == BLOCK
    assert targets(params) == BLOCK
    assert targets(params, infer_axes(linen(Block()), params, X)) == BLOCK


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("wrapping", [lambda block: block, nn.remat], ids=["plain", "remat"])
def test_linen_scan(position, wrapping):
    model = scanned(position, wrapping(Block))()
    params = init(model, X, None)
    assert read(linen(model), params, X, None) == stacked(BLOCK, position)
    assert targets(params) == stacked(BLOCK, position)


class Model(nn.Module):
    """Tied embeddings, learned positions, blocks scanned on axis 1, a head."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8, param_dtype=jnp.float64, name="embed")
        positions = self.param("positions", nn.initializers.normal(), (9, 8), jnp.float64)
        x = embed(tokens) + positions[: tokens.shape[1]]
        x, _ = scanned(1)(name="layers")(x, None)
        return nn.Dense(3, param_dtype=jnp.float64, name="lm_head")(x), embed.attend(x)


MODEL = {
    "embed/embedding": "io",
    **{f"layers/{path}": kinds for path, kinds in stacked(BLOCK, 1).items()},
    "lm_head/kernel": "io",
}


def test_a_whole_model_and_the_targets_that_wrap_takes_from_it():
    params = init(Model(), TOKENS)
    found = infer_axes(linen(Model()), params, TOKENS)
    layers = {path: kinds for path, kinds in MODEL.items() if path.startswith("layers")}
    assert letters(found) == MODEL
    assert found.lookups == {"embed/embedding"}
    assert targets(params, found) == layers
    assert targets(params, found, targets="all") == layers | {"lm_head/kernel": "io"}
    assert targets(params, found, targets="embed") == {"embed/embedding": "io"}
    assert targets(params, found, targets=[".*"]) == MODEL
    check_law(linen(Model()), params, TOKENS, expected=MODEL, targets=".*")


def test_the_collection_of_parameters_alone_is_read():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            table = self.variable("cache", "table", jnp.ones, (8, 8), jnp.float32).value
            return nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x @ table))

    x = S(2, 8, dtype=jnp.float32)
    variables = jax.eval_shape(Normed().init, KEY, x)
    assert read(Normed().apply, variables, x) == {"params/Dense_0/kernel": "io"}


@pytest.mark.parametrize("position", [0, 1])
def test_linen_vmapped_experts(position):
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"variable_axes": {"params": position}, "split_rngs": {"params": True}}
            x = nn.vmap(nn.Dense, in_axes=0, **options)(6, param_dtype=jnp.float64, name="own_input")(x)
            one = nn.vmap(nn.Dense, in_axes=None, axis_size=3, **options)
            return one(6, param_dtype=jnp.float64, name="one_input")(x.sum(0))

    params = init(Experts(), S(3, 5, 8))
    # Where all experts see one input, nothing in the product tells their axis from one of heads.
    assert read(linen(Experts()), params, S(3, 5, 8)) == {
        "one_input/kernel": {0: "oio", 1: "ioo"}[position],
        "own_input/kernel": {0: "bio", 1: "ibo"}[position],
    }
    check_law(linen(Experts()), params, S(3, 5, 8))


def test_recurrent_cells():
    model = nn.RNN(nn.LSTMCell(4, param_dtype=jnp.float64))
    params = init(model, X)
    assert set(read(linen(model), params, X).values()) == {"io"}
    assert read(linen(model), params, X) == targets(params)


# NNX


class Net(nnx.Module):
    """Every NNX twin, a layer that is there twice, statistics and keys."""

    def __init__(self, rngs):
        layer = functools.partial(nnx.Linear, rngs=rngs)
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.linear = layer(8, 8)
        self.general = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.back_general = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)
        self.conv = nnx.Conv(8, 6, (3,), feature_group_count=2, rngs=rngs)
        self.transposed = nnx.ConvTranspose(6, 8, (3,), transpose_kernel=True, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, 6, decode=False, rngs=rngs)
        self.einsum = nnx.Einsum("abc,dc->abd", (8, 8), (8,), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.cache = nnx.Cache(jnp.ones((8, 8)))
        self.again = self.linear
        self.head = layer(8, 3)

    def __call__(self, tokens):
        with jax.numpy_dtype_promotion("standard"):
            x = self.again(self.linear(self.embed(tokens)))
            x = self.back_general(self.general(x))
            x = self.transposed(self.conv(x))
            x = self.einsum(self.attention(x))
            x = self.norm(self.dropout(x)) @ self.cache[...]
            return self.head(x), self.embed.attend(x)


NET = {
    "again/kernel": "io",
    "attention/key/kernel": "ioo",
    "attention/out/kernel": "iio",
    "attention/query/kernel": "ioo",
    "attention/value/kernel": "ioo",
    "back_general/kernel": "iio",
    "conv/kernel": "iio",
    "einsum/kernel": "oi",
    "embed/embedding": "io",
    "general/kernel": "ioo",
    "head/kernel": "io",
    "transposed/kernel": "ioi",
}


def test_nnx_modules_and_states():
    net = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    found = infer_axes(lambda model, tokens: model(tokens), net, TOKENS)
    assert letters(found) == NET
    assert found.lookups == {"embed/embedding"}
    assert targets(net, found) == targets(net)
    graphdef, state = nnx.split(net)
    assert read(lambda state, tokens: nnx.merge(graphdef, state)(tokens), state, TOKENS) == NET


def test_a_concrete_nnx_module_is_left_as_it_was():
    net = Net(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.state(net, nnx.BatchStat, nnx.RngCount))
    helper = Net(nnx.Rngs(1))

    def fn(model, tokens, other):
        return model(tokens), other(tokens)

    tokens = jnp.zeros((2, 5), jnp.int32)
    assert read(fn, net, tokens, helper) == NET
    after = jax.tree.map(np.asarray, nnx.state(net, nnx.BatchStat, nnx.RngCount))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(nnx.state(helper)))


def test_nnx_scan():
    class Layers(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=0, out_axes=1)
            def make(rngs):
                return nnx.Linear(8, 8, param_dtype=jnp.float64, rngs=rngs)

            self.layers = make(rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 1), out_axes=nnx.Carry)
            def step(x, layer):
                return jnp.tanh(layer(x))

            return step(x, self.layers)

    state = nnx.state(nnx.eval_shape(lambda: Layers(nnx.Rngs(0))))
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Layers(nnx.Rngs(0))))

    def fn(state, x):
        with jax.numpy_dtype_promotion("standard"):
            return nnx.merge(graphdef, state)(x)

    assert read(fn, state, X) == {"layers/kernel": "ibo"}


# Equinox


def test_equinox_under_vmap():
    eqx: Any = pytest.importorskip("equinox")
    dtype = jnp.float64

    class Eqx(eqx.Module):
        embed: Any
        linear: Any
        attention: Any
        conv: Any
        back: Any
        norm: Any
        function: Any

        def __init__(self):
            self.embed = eqx.nn.Embedding(11, 8, key=KEY, dtype=dtype)
            self.linear = eqx.nn.Linear(8, 8, key=KEY, dtype=dtype)
            self.attention = eqx.nn.MultiheadAttention(2, 8, key=KEY, dtype=dtype)
            self.conv = eqx.nn.Conv1d(8, 4, 3, padding=1, groups=2, key=KEY, dtype=dtype)
            self.back = eqx.nn.ConvTranspose1d(4, 8, 3, padding=1, key=KEY, dtype=dtype)
            self.norm = eqx.nn.LayerNorm(8, dtype=dtype)
            self.function = jnp.tanh

        def __call__(self, tokens):
            x = jax.vmap(self.norm)(jax.vmap(self.embed)(tokens))
            x = self.function(jax.vmap(self.linear)(x))
            x = self.attention(x, x, x)
            return self.back(self.conv(x.T)).T

    model = eqx.filter_eval_shape(Eqx)
    found = infer_axes(lambda model, tokens: jax.vmap(model)(tokens), model, TOKENS)
    assert letters(found) == {
        "embed/weight": "io",
        "linear/weight": "oi",
        "attention/query_proj/weight": "oi",
        "attention/key_proj/weight": "oi",
        "attention/value_proj/weight": "oi",
        "attention/output_proj/weight": "oi",
        "conv/weight": "oii",
        "back/weight": "oii",
    }
    assert found.lookups == {"embed/weight"}
    assert targets(model, found) == targets(model)
    one = S(5, dtype=jnp.int32)
    assert infer_axes(lambda model, tokens: model(tokens), model, one) == found


# Plain trees


def dense(p, x):
    return x @ p["foo"] @ p["bar"].T


def test_any_names():
    params = {"foo": S(8, 6), "bar": S(4, 6), "kernel": S(8, 8), "b": S(6), "n": 3, "name": "x"}
    found = infer_axes(dense, params, X)
    assert letters(found) == {"bar": "oi", "foo": "io"}
    assert targets({k: params[k] for k in ("foo", "bar", "kernel", "b")}, found) == letters(found)
    check_law(dense, {"foo": S(8, 6), "bar": S(4, 6), "kernel": S(8, 8)}, X, expected={"foo", "bar"})


def test_haiku_like_dict():
    params = {
        "net/~/linear_0": {"w": S(8, 4), "b": S(4)},
        "net/~/embed": {"embeddings": S(11, 8)},
        "net/~/conv2_d": {"w": S(3, 8, 8), "b": S(8)},
        "net/~/layer_norm": {"scale": S(8), "offset": S(8)},
    }

    def fn(p, tokens):
        x = p["net/~/embed"]["embeddings"][tokens] * p["net/~/layer_norm"]["scale"]
        x = lax.conv_general_dilated(
            x, p["net/~/conv2_d"]["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return x @ p["net/~/linear_0"]["w"] + p["net/~/linear_0"]["b"]

    assert read(fn, params, TOKENS) == {
        "net/~/conv2_d/w": "iio",
        "net/~/embed/embeddings": "io",
        "net/~/linear_0/w": "io",
    }
    check_law(fn, params, TOKENS, expected={"net/~/conv2_d/w", "net/~/linear_0/w"})


def test_experts():
    def fn(p, x, choice):
        x = x + jnp.einsum("bed,edf,efg->beg", x, p["wi"], p["wo"])
        own = jnp.einsum("bi,bio->bo", x[:, 0], p["taken"][choice])
        two = jnp.einsum("bi,bkio->bko", own, p["top"][jnp.stack([choice, choice + 1], 1)])
        hot = jnp.einsum("be,eio->bio", jax.nn.one_hot(choice, 3, dtype=x.dtype), p["hot"])
        rows = lax.ragged_dot(
            jnp.einsum("bi,bio->bo", two[:, 0], hot), p["ragged"], jnp.array([1, 0, 1], jnp.int32)
        )
        return rows, x @ p["router"]

    params = {name: S(3, 8, 8) for name in ("wi", "wo", "taken", "top", "hot", "ragged")} | {
        "router": S(8, 3)
    }
    choice = S(2, dtype=jnp.int32)
    expected = {
        "hot": "bio",
        "ragged": "bio",
        "router": "io",
        "taken": "bio",
        "top": "bio",
        "wi": "bio",
        "wo": "bio",
    }
    found = infer_axes(fn, params, S(2, 3, 8), choice)
    assert letters(found) == expected
    assert found.lookups == set()


def test_layers_by_index():
    def fn(p, x):
        for i in range(3):
            x = jnp.tanh(x @ p["python"][i] + p["bias"][i])
        x = lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["fori"][:, i] + p["bias"][i]), x)
        x, _ = lax.scan(lambda x, i: (jnp.tanh(x @ p["scan"][i]), None), x, jnp.arange(3))
        i, x = lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] @ p["while"][s[0]]), (0, x))
        for w in p["iter"]:
            x = x @ w
        return x

    params = {name: S(3, 8, 8) for name in ("python", "scan", "while", "iter")}
    params |= {"fori": S(8, 3, 8), "bias": S(3, 8)}
    expected = {"fori": "ibo", "iter": "bio", "python": "bio", "scan": "bio", "while": "bio"}
    assert read(fn, params, X) == expected
    check_law(fn, params, X, expected=expected)


def test_a_stack_on_axis_1():
    def fn(p, x):
        def step(x, layer):
            return jax.nn.relu(x @ layer["wi"]) @ layer["wo"] * layer["scale"], None

        layers = jax.tree.map(lambda w: jnp.moveaxis(w, 1, 0), p)
        return lax.scan(jax.checkpoint(step), x, layers)[0]

    params = {"scale": S(8, 3), "wi": S(8, 3, 12), "wo": S(12, 3, 8)}
    assert read(fn, params, X) == {"wi": "ibo", "wo": "ibo"}
    check_law(fn, params, X)


def test_blocks_under_jit_close_over_their_weights():
    def fn(p, x):
        @jax.jit
        def block(x):
            product = jax.custom_jvp(lambda x, w: x @ w)

            product.defjvp(lambda primals, tangents: (product(*primals), product(tangents[0], primals[1])))

            other = jax.custom_vjp(lambda x, w: jnp.einsum("...i,oi->...o", x, w))

            other.defvjp(lambda x, w: (other(x, w), None), lambda _, g: (g, None))
            return other(product(x @ p["a"], p["b"]), p["c"])

        return lax.cond(x.sum() > 0, block, lambda x: x @ p["d"], x)

    params = {name: S(8, 8) for name in "abcd"}
    assert read(fn, params, X) == {"a": "io", "b": "io", "c": "oi", "d": "io"}


def test_vmapped_functions():
    def fn(p, xs):
        xs = jax.vmap(lambda x: x @ p["shared"])(xs)
        return jax.vmap(lambda w, x: x @ w, in_axes=(1, 0))(p["own"], xs)

    params = {"shared": S(8, 8), "own": S(8, 2, 4)}
    assert read(fn, params, X) == {"own": "ibo", "shared": "io"}
    check_law(fn, params, X)


def test_shard_map():
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

    def fn(p, x):
        def local(w, stages, x):
            w = lax.all_gather(w, "i", axis=0, tiled=True)
            return lax.psum(x @ w @ stages[0], "i")

        specs = (P("i"), P("i"), P())
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(
            p["w"], p["s"], x
        )

    assert read(fn, {"w": S(8, 8), "s": S(2, 8, 8)}, X) == {"s": "bio", "w": "io"}


def test_what_carries_atoms_on():
    def fn(p, x):
        w = p["moved"].astype(jnp.float32).astype(x.dtype)
        w = lax.optimization_barrier(jnp.flip(w.T.reshape(4, 3, 8), 0)).transpose(2, 0, 1) * 2.0
        y = jnp.einsum("bsi,ihd->bshd", x, lax.reduce_precision(w, 8, 10))
        a, b = jnp.split(p["fused"], 2, axis=1)
        z = x @ a[:, ::2] + x @ b[:, 1:]
        joined = jnp.concatenate([p["left"], jnp.zeros((8, 2))], 1) + p["scaled"] / p["by"]
        return y, z, x @ joined, x @ p["permuted"][:, jnp.array([1, 0, 2])], x @ jnp.squeeze(p["unit"], 1)

    params = {
        "by": S(6),
        "fused": S(8, 6),
        "left": S(8, 4),
        "moved": S(8, 12),
        "permuted": S(8, 3),
        "scaled": S(8, 6),
        "unit": S(8, 1, 3),
    }
    expected = {"fused": "io", "left": "io", "moved": "io", "permuted": "io", "scaled": "io", "unit": "iuo"}
    assert read(fn, params, X) == expected


def test_weights_that_data_scales():
    def fn(p, x, style):
        y = x @ (p["modulated"] * style[:, None] + jnp.outer(style, x[0, 0]))
        outer = jnp.einsum("io,bo->bio", p["outer"], x[:, 0])
        return y, jnp.einsum("bsi,bio->bso", x, outer), (x + p["position"]) @ p["used"]

    params = {"modulated": S(8, 8), "outer": S(8, 8), "position": S(5, 8), "used": S(8, 4)}
    expected = {"modulated": "io", "used": "io"}
    assert read(fn, params, X, S(8)) == expected
    check_law(fn, params, X, S(8), expected=expected)


def test_layers_that_a_scan_returns():
    def fn(p, x):
        _, cast = lax.scan(lambda _, w: (None, w.astype(x.dtype).T), None, p["w"])
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, cast)[0] + x @ cast[0]

    params = {"w": S(3, 8, 8)}
    assert read(fn, params, X) == {"w": "boi"}
    check_law(fn, params, X)


def test_what_is_not_linear():
    def fn(p, x):
        x = x + p["position"][:5]
        x = x * p["gain"][0] + jnp.concatenate([x[:, :4], p["token"]], 1)
        x = jnp.tanh(p["squashed"]) @ x.mT
        x = jnp.where(x > 0, x, 0.0) * (p["decay"] * p["decay"]).sum()
        state, _ = lax.scan(lambda h, x: (jnp.tanh(h + x), None), p["state"], x)
        return x, jnp.einsum("bhd,hd->bh", x, p["vectors"][:, :5]), state @ p["used"]

    shapes = {
        "position": S(9, 8),
        "gain": S(2, 8),
        "token": S(2, 1, 8),
        "squashed": S(5, 8),
        "decay": S(3, 3),
        "state": S(5, 5),
        "vectors": S(5, 6),
        "used": S(5, 4),
    }
    assert read(fn, shapes, X) == {"used": "io"}
    with pytest.raises(ValueError, match="the axes of 'gain' of shape .* are not known"):
        lora_jax.wrap(drawn(shapes), 2, axes=infer_axes(fn, shapes, X), targets="gain")


def test_look_ups():
    def fn(p, tokens, step):
        one_hot = jax.nn.one_hot(tokens, 11, dtype=jnp.float64)
        x = p["rows"][tokens] + one_hot @ p["hot"] + jnp.take(p["take"], tokens, axis=1).transpose(1, 2, 0)
        x = x + p["positions"][jnp.arange(5)] + lax.dynamic_slice_in_dim(p["window"], step, 5)
        x = x + p["step"][step] + jax.vmap(lambda t, i: t[i], (0, 0))(p["tables"], tokens)
        return x @ p["rows"].T

    params = {name: S(11, 8) for name in ("rows", "hot", "positions", "window", "step")}
    params |= {"take": S(8, 11), "tables": S(2, 11, 8)}
    found = infer_axes(fn, params, TOKENS, S(dtype=jnp.int32))
    assert letters(found) == {
        "hot": "io",
        "positions": "io",
        "rows": "io",
        "step": "io",
        "tables": "bio",
        "take": "oi",
        "window": "io",
    }
    assert found.lookups == set(params)
    with pytest.raises(ValueError, match=r"only linear weights are look-up tables, 'hot'.*targets="):
        lora_jax.wrap(drawn(params), 2, axes=found)
    arguments = drawn(params), TOKENS, S(dtype=jnp.int32)
    check_law(fn, *arguments, targets="rows|take", expected={"rows", "take"})
    assert lora_jax.wrap(drawn(params), 2, axes=found, targets="take")["take"].axes == ("out", "in")


def test_uses_are_put_together():
    def fn(p, x):
        first = x @ p["tied"]
        q = jnp.einsum("bsr,rhd->bshd", x, p["absorbed"])
        scores = jnp.einsum("bshd,rhd->bshr", q, p["absorbed"])
        y, _ = lax.scan(lambda x, w: (x @ w, None), x, p["layers"])
        return first @ p["tied"].T, scores, y @ p["layers"][2]

    params = {"tied": S(8, 4), "absorbed": S(8, 2, 3), "layers": S(3, 8, 8)}
    assert read(fn, params, X) == {"absorbed": "ioo", "layers": "bio", "tied": "io"}
    check_law(fn, params, X)


def test_arguments_of_every_kind():
    def fn(p, x, scale, *, activation, flag=False):
        assert flag is True and isinstance(scale, int) and isinstance(x, jax.core.Tracer)
        return activation(x @ p["w"]) * float(scale), "text"

    x = np.ones((2, 8))
    params = {"w": jnp.ones((8, 4)), "name": "layer", "none": None}
    expected = {"w": ("in", "out")}
    assert infer_axes(fn, params, x, 3, activation=jnp.tanh, flag=True) == expected
    traced = []
    jax.jit(lambda p: traced.append(infer_axes(fn, {"w": p}, x, 3, activation=jnp.tanh, flag=True)))(
        params["w"]
    )
    assert traced == [expected]


# Refusals


def conflicting(p, x):
    y = jnp.einsum("bei,eio->beo", x, p["shared"])
    return y, jnp.einsum("bei,eio->bio", x, p["shared"]), x @ p["plain"]


def test_batch_in_one_use_and_contracted_in_another():
    params = {"shared": S(3, 8, 8), "plain": S(8, 4)}
    x = S(2, 3, 8)
    with pytest.raises(ValueError, match="no single factorisation") as error:
        infer_axes(conflicting, params, x)
    line = inspect.getsourcelines(conflicting)[1]
    message = str(error.value)
    assert "axis 0 of 'shared', of shape (3, 8, 8), is taken as a batch axis by `dot_general`" in message
    assert f"test_axes.py:{line + 1}" in message and f"test_axes.py:{line + 2}" in message
    assert "infer_axes(..., exclude='shared') | {'shared': (...)}" in message
    found = infer_axes(conflicting, params, x, exclude="shared")
    assert found == {"plain": ("in", "out")}
    stated = found | {"shared": ("in", "in", "out")}
    assert targets(params, stated) == {"plain": "io", "shared": "iio"}
    arrays = drawn(params)
    assert lora_jax.wrap(arrays, 2, axes=stated)["shared"].a.shape == (3, 8, 2)
    assert lora_jax.wrap(arrays, 2, axes=found)["shared"] is arrays["shared"]


def test_other_refusals():
    params = {"foo": jnp.ones((8, 6)), "bar": jnp.ones((4, 6))}
    with pytest.raises(ValueError, match="exclude='baz' matches no path; the nearest paths are 'bar'"):
        infer_axes(dense, params, X, exclude="baz")
    wrapped = lora_jax.wrap(params, 2, axes=infer_axes(dense, params, X))
    with pytest.raises(ValueError, match="wrapped already, at 'bar'.*merge"):
        infer_axes(dense, wrapped, X)
    with pytest.raises(TypeError, match="stands inside another container, at 'net'"):
        infer_axes(lambda p, x: x, {"net": nnx.Linear(2, 2, rngs=nnx.Rngs(0))}, X)
    with pytest.raises(ValueError, match=r"axes=\{'p/bar': \.\.\.\} matches no path.*'bar'"):
        lora_jax.wrap(params, 2, axes=infer_axes(lambda p, x: dense(p["p"], x), {"p": params}, X))


def test_a_name_that_ends_another_path():
    params = {"w": S(8, 4), "inner": {"w": S(4, 8)}}

    def fn(p, x):
        return x @ p["w"] @ p["inner"]["w"], x @ p["inner"]["w"].T

    assert targets(params, infer_axes(fn, params, X)) == {"inner/w": "io", "w": "io"}
    turned = infer_axes(
        lambda p, x: (x @ p["inner"]["w"].T @ p["w"].T, 0)[1], {"w": S(8, 4), "inner": params["inner"]}, X
    )
    assert letters(turned) == {"inner/w": "oi", "w": "oi"}


def test_ambiguous_kernels_name_this_way_out():
    params = {"k": {"kernel": jnp.ones((3, 8, 8))}}
    with pytest.raises(ValueError, match=r"ambiguous.*axes=lora_jax.infer_axes\(fn, params, x\)"):
        lora_jax.wrap(params, 2)
    found = infer_axes(lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p["k"]["kernel"])[0], params, X)
    assert lora_jax.wrap(params, 2, axes=found)["k"]["kernel"].axes == ("batch", "in", "out")
