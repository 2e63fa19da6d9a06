"""Which leaves are adapted, and what each of their axes is read to be, on real models."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze

from lora_jax.layouts import known_layouts
from lora_jax.params import wrap
from lora_jax.targets import resolve
from lora_jax.weight import LoraWeight

KEY = jax.random.key(0)
X = jnp.ones((2, 5, 8), jnp.float32)
LETTERS = {"batch": "b", "in": "i", "out": "o", "unit": "u"}


def axes(params, **options):
    """The axes of every target, one letter each, by path."""
    tree = nnx.split(params)[1] if isinstance(params, nnx.Module) else params
    found, _ = resolve(tree, 2, layouts=known_layouts(params), **options)
    return {path: "".join(LETTERS[kind] for kind in target.axes) for path, target in found.items()}


def init(module, *inputs):
    """A Linen model's parameters as shapes, which are all that axes are read from."""
    return jax.eval_shape(module.init, KEY, *inputs)["params"]


class Block(nn.Module):
    """Every layer kind of Flax, in one block whose carry keeps its shape."""

    bias: bool = True
    d: int = 8

    @nn.compact
    def __call__(self, c, _=None):
        h = nn.LayerNorm()(c)
        h = nn.Dense(12, use_bias=self.bias, name="up")(h)
        h = nn.Dense(self.d, use_bias=self.bias, name="down")(h)
        h = nn.MultiHeadDotProductAttention(num_heads=2, use_bias=self.bias)(h, h)
        h = nn.Conv(self.d, (3,), use_bias=self.bias)(h)
        if self.bias:
            h = nn.DenseGeneral((2, 4), name="split")(h)
            h = nn.DenseGeneral(self.d, axis=(-2, -1), name="join")(h)
            h = nn.Einsum((8, 8), "...a,ab->...b")(h)
        return h, None


PLAIN = {
    "Conv_0/kernel": "iio",
    "MultiHeadDotProductAttention_0/key/kernel": "ioo",
    "MultiHeadDotProductAttention_0/out/kernel": "iio",
    "MultiHeadDotProductAttention_0/query/kernel": "ioo",
    "MultiHeadDotProductAttention_0/value/kernel": "ioo",
    "down/kernel": "io",
    "up/kernel": "io",
}
WITH_BIAS = PLAIN | {"Einsum_0/kernel": "io", "split/kernel": "ioo", "join/kernel": "iio"}


def stacked(table, position):
    """The same table with a batch axis inserted where `variable_axes` puts it."""

    def insert(kinds):
        place = position if position >= 0 else len(kinds) + 1 + position
        return kinds[:place] + "b" + kinds[place:]

    return {path: insert(kinds) for path, kinds in table.items()}


def scan(module, position, length=3, **options):
    return nn.scan(
        module, variable_axes={"params": position}, split_rngs={"params": True}, length=length, **options
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("freezing", [dict, freeze], ids=["dict", "FrozenDict"])
def test_linen_layers(bias, freezing):
    params = freezing(init(Block(bias), X))
    assert axes(params) == (WITH_BIAS if bias else PLAIN)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("position", [0, 1, -1, -2])
@pytest.mark.parametrize("length", [3, 8], ids=["L=3", "L=d"])
def test_linen_scan(bias, position, length):
    params = init(scan(Block, position, length)(bias), X, None)
    assert axes(params) == stacked(WITH_BIAS if bias else PLAIN, position)


@pytest.mark.parametrize("position", [0, 1, -1])
def test_linen_scan_inside_a_model(position):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(11, 8, name="embed")
            x, _ = scan(Block, position)(name="layers")(embed(tokens), None)
            x = nn.LayerNorm(name="final_norm")(x)
            return nn.Dense(11, name="lm_head")(x)

    params = init(Model(), jnp.ones((2, 5), jnp.int32))
    layers = {f"layers/{path}": kinds for path, kinds in stacked(WITH_BIAS, position).items()}
    assert axes(params) == layers
    assert axes(params, targets="all") == layers | {"lm_head/kernel": "io"}
    assert axes(params, targets=["embed", "lm_head"]) == {"embed/embedding": "io", "lm_head/kernel": "io"}


def test_nested_scan():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, c, _):
            return scan(Block, 0, 4)(name="inner")(c, None)

    params = init(scan(Outer, 0, 3)(), X, None)
    table = {f"inner/{path}": "bb" + kinds for path, kinds in WITH_BIAS.items()}
    assert axes(params) == table


@pytest.mark.parametrize("position", [0, 1, -1])
def test_linen_vmapped_experts(position):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(x)
            experts = nn.vmap(
                nn.Dense,
                variable_axes={"params": position},
                split_rngs={"params": True},
                in_axes=None,  # type: ignore[arg-type]
                axis_size=4,
            )
            return experts(12)(x).sum(0)

    params = init(Model(), X)
    assert axes(params) == stacked({"VmapDense_0/kernel": "io"}, position)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("position", [None, 0, 1, -1])
def test_attention_alone(use_bias, position):
    class Attend(nn.Module):
        @nn.compact
        def __call__(self, c, _=None):
            return nn.MultiHeadDotProductAttention(2, qkv_features=6, out_features=8, use_bias=use_bias)(
                c, c
            ), None

    module = Attend() if position is None else scan(Attend, position)()
    params = init(module, X, None)["MultiHeadDotProductAttention_0"]
    table = {
        "key/kernel": "ioo",
        "out/kernel": "iio",
        "query/kernel": "ioo",
        "value/kernel": "ioo",
    }
    assert axes(params) == (table if position is None else stacked(table, position))


def test_grouped_query_attention_without_bias():
    shapes = {"query": (16, 4, 2), "key": (16, 2, 2), "value": (16, 2, 2), "out": (4, 2, 16)}
    params = {name: {"kernel": jnp.ones((3, *shape), jnp.float32)} for name, shape in shapes.items()}
    found = axes(params)
    assert found == {
        "key/kernel": "bioo",
        "out/kernel": "biio",
        "query/kernel": "bioo",
        "value/kernel": "bioo",
    }


def test_stacked_dense_attention_is_not_taken_for_heads():
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    params = {name: {"kernel": jnp.ones((4, 8, 8), jnp.float32)} for name in names}
    assert set(axes(params).values()) == {"bio"}


def test_llama_like_stack_without_any_bias():
    def kernel(*shape):
        return {"kernel": jnp.ones(shape, jnp.float32)}

    params = {
        "layers": {
            "input_norm": {"scale": jnp.ones((3, 8), jnp.float32)},
            "gate": kernel(3, 8, 12),
            "up": kernel(3, 8, 12),
            "down": kernel(3, 12, 8),
        }
    }
    assert set(axes(params).values()) == {"bio"}


def test_convolutions():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (3, 3), use_bias=False, name="conv_init")(x)
            x = nn.BatchNorm(use_running_average=False)(x)
            x = nn.Conv(8, (3, 3), feature_group_count=4)(x)
            x = nn.ConvTranspose(6, (2, 2))(x)
            x = nn.ConvTranspose(5, (2, 2), transpose_kernel=True)(x)
            return nn.Dense(3)(x.mean((1, 2)))

    params = init(Net(), jnp.ones((1, 8, 8, 3), jnp.float32))
    assert axes(params) == {
        "ConvTranspose_0/kernel": "iiio",
        "ConvTranspose_1/kernel": "iioi",
        "Conv_0/kernel": "iiio",
        "Dense_0/kernel": "io",
        "conv_init/kernel": "iiio",
    }


def test_recurrent_cells():
    params = init(nn.RNN(nn.LSTMCell(4)), X)
    assert set(axes(params).values()) == {"io"}
    assert len(axes(params)) == 8


def test_boxes_with_axis_names():
    boxed = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))

    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, c, _):
            return nn.Dense(8, use_bias=False, kernel_init=boxed)(c), None

    plain = init(Boxed(), X, None)
    wrapped = jax.eval_shape(lambda p: wrap(p, 2), plain)
    assert isinstance(wrapped["Dense_0"]["kernel"], nn.LogicallyPartitioned)
    assert isinstance(wrapped["Dense_0"]["kernel"].value, LoraWeight)

    # Nothing but the name that scan gave to its axis tells where it is.
    names = {nn.PARTITION_NAME: "layers"}
    for position in (0, 1, 2):
        params = init(scan(Boxed, position, metadata_params=names)(), X, None)
        assert axes(params) == stacked({"Dense_0/kernel": "io"}, position)


class Net(nnx.Module):
    """Every NNX twin, and a layer that is there twice."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.bare = nnx.Linear(8, 12, use_bias=False, rngs=rngs)
        self.general = nnx.LinearGeneral((2, 4), (3, 5), axis=(-2, -1), rngs=rngs)
        self.bare_general = nnx.LinearGeneral(8, (2, 4), use_bias=False, rngs=rngs)
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.bare_conv = nnx.Conv(2, 4, (3, 3), use_bias=False, rngs=rngs)
        self.back = nnx.ConvTranspose(2, 4, (3, 3), transpose_kernel=True, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, 6, use_bias=False, decode=False, rngs=rngs)
        self.einsum = nnx.Einsum("abc,dc->abd", (6, 8), (6,), rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.again = self.linear
        self.head = nnx.Linear(8, 3, rngs=rngs)


# Of a shared layer the graph keeps the first name by the alphabet.
NET = {
    "again/kernel": "io",
    "attention/key/kernel": "ioo",
    "attention/out/kernel": "iio",
    "attention/query/kernel": "ioo",
    "attention/value/kernel": "ioo",
    "back/kernel": "iioi",
    "bare/kernel": "io",
    "bare_conv/kernel": "iiio",
    "bare_general/kernel": "ioo",
    "conv/kernel": "iiio",
    "einsum/kernel": "oi",
    "general/kernel": "iioo",
}


def test_nnx_module():
    net = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    assert axes(net) == NET
    assert axes(net, targets="all") == NET | {"head/kernel": "io"}
    assert axes(net, targets="embed") == {"embed/embedding": "io"}


def test_nnx_state_has_no_types_and_asks_where_names_do_not_tell():
    state = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))[1]
    with pytest.raises(ValueError, match="bare_general/kernel.*ambiguous"):
        wrap(state, 2)
    assert axes(state, axes={"bare_general/kernel": ("in", "out", "out")}) == NET


@pytest.mark.parametrize("position", [0, 1, -1])
def test_nnx_vmapped_module(position):
    @nnx.vmap(in_axes=0, out_axes=nnx.StateAxes({nnx.Param: position, ...: 0}))
    def make(key):
        return Net(nnx.Rngs(key))

    assert axes(nnx.eval_shape(lambda: make(jax.random.split(KEY, 3)))) == stacked(NET, position)


@pytest.mark.parametrize("position", [0, -1])
def test_nnx_vmapped_state(position):
    class Small(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(8, 12, rngs=rngs)
            self.split = nnx.LinearGeneral(12, (2, 4), rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)

    @nnx.vmap(in_axes=0, out_axes=position)
    def make(key):
        return Small(nnx.Rngs(key))

    state = nnx.split(nnx.eval_shape(lambda: make(jax.random.split(KEY, 3))))[1]
    assert axes(state) == stacked({"split/kernel": "ioo", "up/kernel": "io"}, position)


def test_equinox():
    import equinox as eqx

    keys = iter(jax.random.split(KEY, 20))
    layers = {
        "linear": lambda k: eqx.nn.Linear(8, 4, key=k),
        "square": lambda k: eqx.nn.Linear(8, 8, use_bias=False, key=k),
        "conv": lambda k: eqx.nn.Conv2d(2, 4, 3, key=k),
        "back": lambda k: eqx.nn.ConvTranspose2d(2, 4, 3, key=k),
        "embed": lambda k: eqx.nn.Embedding(11, 8, key=k),
        "attention": lambda k: eqx.nn.MultiheadAttention(2, 8, key=k),
        "gru": lambda k: eqx.nn.GRUCell(3, 4, key=k),
        "norm": lambda k: eqx.nn.LayerNorm(8),
        "experts": lambda k: eqx.filter_vmap(lambda k: eqx.nn.Linear(8, 4, key=k))(jax.random.split(k, 3)),
        "norms": lambda k: eqx.filter_vmap(lambda _: eqx.nn.LayerNorm(8))(jnp.arange(3)),
        "function": lambda k: jax.nn.relu,
        "head": lambda k: eqx.nn.Linear(8, 3, key=k),
    }
    model = {name: eqx.filter_eval_shape(make, next(keys)) for name, make in layers.items()}
    table = {
        "linear/weight": "oi",
        "square/weight": "oi",
        "conv/weight": "oiii",
        "back/weight": "oiii",
        "attention/query_proj/weight": "oi",
        "attention/key_proj/weight": "oi",
        "attention/value_proj/weight": "oi",
        "attention/output_proj/weight": "oi",
        "gru/weight_ih": "oi",
        "gru/weight_hh": "oi",
        "experts/weight": "boi",
    }
    assert axes(model) == table
    assert axes(model, targets="embed") == {"embed/weight": "io"}
    mlp = eqx.filter_eval_shape(lambda: eqx.nn.MLP(2, 3, 4, 1, key=KEY))
    assert axes(mlp) == {"layers/0/weight": "oi", "layers/1/weight": "oi"}


def test_haiku_like_and_hand_written_dicts():
    ones = jnp.ones
    params = {
        "net/~/linear_0": {"w": ones((8, 4)), "b": ones(4)},
        "net/~/conv2_d": {"w": ones((3, 3, 2, 4)), "b": ones(4)},
        "net/~/layer_norm": {"scale": ones(8), "offset": ones(8)},
        "net/~/embed": {"embeddings": ones((11, 8))},
    }
    assert axes(params) == {"net/~/conv2_d/w": "iiio", "net/~/linear_0/w": "io"}
    assert axes(params, targets="embeddings") == {"net/~/embed/embeddings": "io"}
    assert axes({"w1": ones((8, 4)), "b1": ones(4), "w2": ones((4, 4)), "b2": ones(4)}) == {
        "w1": "io",
        "w2": "io",
    }
    # A torch-like `weight` may be of either orientation: only its bias tells.
    assert axes({"l": {"weight": ones((4, 8)), "bias": ones(4)}}) == {"l/weight": "oi"}
    assert axes({"l": {"weight": ones((8, 4)), "bias": ones(4)}}) == {"l/weight": "io"}


def test_a_leaf_that_only_its_siblings_tell():
    """(d, h, hd) with bias (h, hd) has the shape of layers stacked on the last axis."""
    ones = jnp.ones
    heads = {"kernel": ones((8, 2, 4)), "bias": ones((2, 4))}
    assert axes({"a": heads, "b": {"kernel": ones((8, 8)), "bias": ones(8)}}) == {
        "a/kernel": "ioo",
        "b/kernel": "io",
    }
    assert axes({"a": heads, "norm": {"scale": ones((8, 4))}}) == {"a/kernel": "iob"}
    with pytest.raises(ValueError, match=r"'a/kernel'.*\(8, 2, 4\) is ambiguous"):
        wrap({"a": heads}, 2)


@pytest.mark.parametrize(
    "params",
    [
        {"k": {"kernel": jnp.ones((8, 8, 8)), "bias": jnp.ones((8, 8))}},
        {"k": {"kernel": jnp.ones((8, 8, 8)), "bias": jnp.ones((8, 8))}, "norm": {"scale": jnp.ones((8, 8))}},
        {"k": {"kernel": jnp.ones((8, 8, 8))}, "norm": {"scale": jnp.ones((8, 8))}},
        {"k": {"kernel": jnp.ones((3, 8, 8))}},
        {"k": {"kernel": jnp.ones((3, 8, 4))}, "norm": {"scale": jnp.ones(8)}},
        # Eight experts of eight inputs beside a norm that is not stacked: not a DenseGeneral.
        {"k": {"kernel": jnp.ones((8, 8, 16)), "bias": jnp.ones((8, 16))}, "norm": {"scale": jnp.ones(8)}},
        {"k": {"weight": jnp.ones((8, 8)), "bias": jnp.ones(8)}},
        {"k": {"weight": jnp.ones((8, 4))}},
        {"Conv_0": {"kernel": jnp.ones((3, 3, 8, 8))}},
    ],
    ids=lambda params: str(jax.tree.map(jnp.shape, params)),
)
def test_doubt_is_an_error_that_the_shown_line_resolves(params):
    with pytest.raises(ValueError, match="ambiguous") as error:
        wrap(params, 2)
    line = str(error.value).split("wrap(..., ")[1].split("})")[0] + "}"
    stated = eval(line.removeprefix("axes="))
    (kinds,) = stated.values()
    (found,) = axes(params, axes=stated).values()
    assert found == "".join(LETTERS[kind] for kind in kinds)


def test_default_targets_leave_heads_embeddings_norms_and_biases():
    names = "head lm_head logits logits_dense classifier unembed output_projection".split()
    kernel = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}
    params = {name: kernel for name in [*names, "my_head", "head_norm", "body"]}
    params |= {"embed": {"embedding": jnp.ones((11, 8))}, "ln": {"scale": jnp.ones(8)}}
    assert set(axes(params)) == {"my_head/kernel", "head_norm/kernel", "body/kernel"}
    assert set(axes(params, targets="all")) == {f"{name}/kernel" for name in params} - {
        "embed/kernel",
        "ln/kernel",
    }


PARAMS = {
    "layer": {
        "attn": {name: {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)} for name in ("q", "k", "v", "o")},
        "query_norm": {"scale": jnp.ones(8)},
        "mlp": {"kernel": jnp.ones((8, 4))},
        "table": jnp.ones((5, 6)),
    },
    "embed": {"embedding": jnp.ones((11, 8))},
}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q", ["layer/attn/q/kernel"]),
        ("attn/(q|v)", ["layer/attn/q/kernel", "layer/attn/v/kernel"]),
        (["mlp", "o"], ["layer/attn/o/kernel", "layer/mlp/kernel"]),
        (lambda path, leaf: "mlp" in path, ["layer/mlp/kernel"]),
        (["mlp", lambda path, leaf: path.endswith("q/kernel")], ["layer/attn/q/kernel", "layer/mlp/kernel"]),
        ("embed", ["embed/embedding"]),
        ("layer/mlp/kernel", ["layer/mlp/kernel"]),
        ("layer", [f"layer/attn/{name}/kernel" for name in "koqv"] + ["layer/mlp/kernel"]),
    ],
)
def test_patterns(targets, expected):
    assert list(axes(PARAMS, targets=targets)) == expected


def test_exclude_and_train():
    assert list(axes(PARAMS, exclude=["attn/(q|k)", "mlp"])) == ["layer/attn/o/kernel", "layer/attn/v/kernel"]
    assert resolve(PARAMS, 2, targets=(), train="query_norm") == ({}, ["layer/query_norm/scale"])
    found, full = resolve(PARAMS, 2, targets="mlp", train=["bias", "query_norm"])
    assert list(found) == ["layer/mlp/kernel"]
    assert full == [*(f"layer/attn/{name}/bias" for name in "koqv"), "layer/query_norm/scale"]


def test_options_by_value_pattern_and_function():
    found, _ = resolve(
        PARAMS,
        {"attn/q": 4, "attn": 2, ".*": 1},
        alpha=lambda path, leaf: 16 if "mlp" in path else 8,
        dropout={"mlp": 0.5, ".*": 0.0},
        init={"mlp": "gaussian", ".*": "default"},
    )
    assert {path: target.rank for path, target in found.items()} == {
        "layer/attn/k/kernel": 2,
        "layer/attn/o/kernel": 2,
        "layer/attn/q/kernel": 4,
        "layer/attn/v/kernel": 2,
        "layer/mlp/kernel": 1,
    }
    mlp = found["layer/mlp/kernel"]
    assert (mlp.alpha, mlp.scale, mlp.dropout, mlp.init) == (16.0, 16.0, 0.5, "gaussian")
    assert found["layer/attn/q/kernel"].scale == 2.0


def test_alpha_defaults_to_the_rank():
    found, _ = resolve(PARAMS, {"mlp": 3, ".*": 2})
    assert {target.scale for target in found.values()} == {1.0}


def test_axes_by_pattern_path_and_function():
    params = {"experts": {"wi_0": jnp.ones((4, 8, 12)), "wo": jnp.ones((4, 12, 8))}, "bias": jnp.ones((4, 8))}
    kinds = ("batch", "in", "out")
    for stated in (
        {"experts": kinds},
        {"experts/wi_0": kinds, "experts/wo": kinds},
        lambda path, leaf: kinds if path.startswith("experts") else None,
    ):
        assert axes(params, axes=stated) == {"experts/wi_0": "bio", "experts/wo": "bio"}
    assert axes(params, targets="wo", axes={"wo": ("batch", "out", "in")}) == {"experts/wo": "boi"}


def test_only_parameters_of_a_variables_dict_or_state_are_taken():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))

    variables = jax.eval_shape(Normed().init, KEY, X)
    found, full = resolve(variables, 2, train="BatchNorm_0")
    assert list(found) == ["params/Dense_0/kernel"]
    assert full == ["params/BatchNorm_0/bias", "params/BatchNorm_0/scale"]
    state = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))[1]
    assert resolve(state, 2, targets="linear|again", train="bn")[1] == ["bn/bias", "bn/scale"]
