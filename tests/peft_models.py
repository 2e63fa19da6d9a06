"""The models of tests/fixtures/peft_* as functions of parameter trees, and what was recorded of PEFT's."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import lora_jax
from experiments.models import bert, gpt2, llama
from lora_jax import tensors
from lora_jax.names import Rule, named
from lora_jax.tree import leaves_with_path, map_with_path

FIXTURES = Path(__file__).parent / "fixtures"
STEPS, RATE, DECAY = 20, 0.02, 0.1


def dense(params, x):
    y = x @ params["kernel"]
    return y + params["bias"] if "bias" in params else y


def block(params, x):
    return x + dense(params["fc2"], jnp.tanh(dense(params["fc1"], x)))


def blocks(params, x, axis=None):
    if axis is None:
        for i in range(3):
            x = block(params[f"layers_{i}"], x)
    else:
        stacked = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, axis, 0), params["layers"])
        x, _ = lax.scan(lambda x, layer: (block(layer, x), None), x, stacked)
    return dense(params["head"], x)


def table(params, x):
    return dense(params["fc"], jnp.tanh(params["table"]["embedding"][x]))


def conv(params, x, stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1)):
    kinds = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(
        x, params["kernel"], stride, padding, rhs_dilation=dilation, dimension_numbers=kinds
    )
    return y + params["bias"]


def images(params, x):
    x = jnp.tanh(conv(params["conv1"], jnp.transpose(x, (0, 2, 3, 1)), (2, 2), ((1, 1), (1, 1))))
    return dense(params["head"], jnp.mean(jnp.tanh(conv(params["conv2"], x)), (1, 2)))


def attention(params, x):
    """Its q, k and v are one kernel (d, 3 o); or q, and k and v as one of shape (2, d, o)."""
    if "qkv" in params:
        q, k, v = jnp.split(x @ params["qkv"]["kernel"], 3, axis=-1)
    else:
        q = x @ params["q"]["kernel"]
        k, v = jnp.einsum("btd,cdo->cbto", x, params["kv"]["kernel"])
    weights = jax.nn.softmax(jnp.einsum("bto,bso->bts", q, k))
    return dense(params["o"], jnp.einsum("bts,bso->bto", weights, v))


PLAIN = [Rule(r"(\w+)/bias", r"\1.bias", "plain"), Rule(r"(\w+)/kernel", r"\1.weight")]
UNROLLED = [
    Rule(r"layers_(\d)/(\w+)/kernel", r"layers.\1.\2.weight"),
    Rule(r"layers_(\d)/(\w+)/bias", r"layers.\1.\2.bias", "plain"),
    *PLAIN,
]


def scanned(axis):
    kernel, bias = (("layers i o", "layers d"), ("i layers o", "d layers"))[axis]
    return [
        Rule(r"layers/(\w+)/kernel", r"layers.{layers}.\1.weight", f"linear: {kernel} -> o i"),
        Rule(r"layers/(\w+)/bias", r"layers.{layers}.\1.bias", f"plain: {bias} -> d"),
        *PLAIN,
    ]


def _scanned_shapes(axis):
    def shape(n, *sizes):
        return (n, *sizes) if axis == 0 else (sizes[0], n, *sizes[1:])

    layers = {"fc1": (4, 6), "fc2": (6, 4)}
    shapes = {f"layers/{m}/kernel": shape(3, *io) for m, io in layers.items()}
    return shapes | {f"layers/{m}/bias": shape(3, io[1]) for m, io in layers.items()} | HEAD


HEAD = {"head/kernel": (4, 3), "head/bias": (3,)}
OUT = {"o/kernel": (4, 3), "o/bias": (3,)}
UNROLLED_SHAPES = {
    f"layers_{i}/{m}/{leaf}": shape
    for i in range(3)
    for m, io in (("fc1", (4, 6)), ("fc2", (6, 4)))
    for leaf, shape in (("kernel", io), ("bias", io[1:]))
}
QKV = Rule("qkv/kernel", "{c}.weight", "linear: d (c o) -> o d", names={"c": ("q", "k", "v")})
KV = Rule("kv/kernel", "{c}.weight", "linear: c d o -> o d", names={"c": ("k", "v")})
CONVOLUTIONS = [Rule(r"(conv\d)/kernel", r"\1.weight", "conv2d"), *PLAIN]
IMAGES = {"conv1/kernel": (3, 3, 3, 4), "conv1/bias": (4,), "conv2/kernel": (3, 2, 4, 6), "conv2/bias": (6,)}


def sequence(params, x):
    if "3" in params:  # loralib's has a table first
        x = params["0"]["kernel"][x]
    first, second = ("1", "3") if "3" in params else ("0", "2")
    return dense(params[second], jnp.tanh(dense(params[first], x)))


LORALIB = (
    sequence,
    [Rule("0/kernel", "0.weight", "embedding"), *PLAIN],
    {"0/kernel": (7, 4), "1/kernel": (4, 6), "1/bias": (6,), "3/kernel": (6, 3), "3/bias": (3,)},
)
BOOK = (sequence, PLAIN, {"0/kernel": (4, 6), "0/bias": (6,), "2/kernel": (6, 3), "2/bias": (3,)})


def tree_of(shapes):
    """A nested dict of zeros from {path: shape}."""
    tree: dict[str, Any] = {}
    for path, shape in shapes.items():
        *above, last = path.split("/")
        functools.reduce(lambda node, name: node.setdefault(name, {}), above, tree)[last] = np.zeros(
            shape, np.float32
        )
    return tree


# A function of parameters and inputs, rules for the parameters, and their shapes by path.
TREES: dict[str, tuple[Callable[..., Any], list[Rule], dict[str, tuple[int, ...]]]] = {
    "unrolled": (blocks, UNROLLED, UNROLLED_SHAPES | HEAD),
    "scanned": (functools.partial(blocks, axis=0), scanned(0), _scanned_shapes(0)),
    "scanned on axis 1": (functools.partial(blocks, axis=1), scanned(1), _scanned_shapes(1)),
    "table": (
        table,
        [Rule("table/embedding", "table.weight", "embedding"), *PLAIN],
        {"table/embedding": (7, 4), "fc/kernel": (4, 3), "fc/bias": (3,)},
    ),
    "images": (images, CONVOLUTIONS, IMAGES | {"head/kernel": (6, 3), "head/bias": (3,)}),
    "qkv": (attention, [QKV, *PLAIN], {"qkv/kernel": (5, 12)} | OUT),
    "kv": (attention, [KV, *PLAIN], {"q/kernel": (5, 4), "kv/kernel": (2, 5, 4)} | OUT),
}


@dataclass(frozen=True)
class Recorded:
    """What a folder of fixtures holds, with the model as a function of a tree."""

    folder: Path
    fn: Callable[..., Any]
    params: Any
    rules: list[Rule]

    @functools.cached_property
    def arrays(self):
        with np.load(self.folder / "record.npz") as file:
            return dict(file)

    @property
    def adapter(self):
        return next(self.folder.rglob("adapter_config.json")).parent


def from_torch(shapes, rules, found):
    """A tree of parameters from torch's, by the rules."""
    tree = tree_of(shapes)
    values = dict(leaves_with_path(tree))
    for path, parts in named(tree, rules).items():
        for piece in parts:
            piece.put(values[path], found[piece.name])
    return map_with_path(lambda _, leaf: jnp.asarray(leaf), tree)


def _standard(apply):
    def called(params, x):
        with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm mixes dtypes
            return apply({"params": params}, x)

    return called


@functools.cache
def recorded(name, tree, folder=None):
    """A case in one of its trees."""
    folder = FIXTURES / f"peft_{name}" if folder is None else folder
    if tree in TREES:
        fn, rules, shapes = TREES[tree]
        file = tensors.opened(folder / "base.safetensors")
        params = from_torch(shapes, rules, {key: file.read(key) for key in file.entries})
        return Recorded(folder, fn, params, rules)
    with jax.numpy_dtype_promotion("standard"):
        if name == "bert":
            model, params = bert.load(folder, jnp.float32, num_labels=3)
            return Recorded(
                folder,
                _standard(lambda *args: model.apply(*args).logits),
                params,
                lora_jax.names.bert(),
            )
        module, rules = {
            "gpt2": (gpt2, lora_jax.names.gpt2()),
            "llama": (llama, lora_jax.names.llama()),
        }[name]
        model, params = module.load(folder, jnp.float32, scan=tree == "scanned layers")
    return Recorded(folder, _standard(model.apply), params, rules)


BLOCKS = ("unrolled", "scanned", "scanned on axis 1")
# Every case with every tree that can hold its adapter.
CASES = [
    *((name, tree) for name in ("linear", "bias_all", "saved", "patterns", "rslora") for tree in BLOCKS),
    *((name, "unrolled") for name in ("lora_only", "saved_bias_all", "other", "all_linear")),
    *((name, tree) for name in ("regex", "layers") for tree in BLOCKS[:2]),
    ("embedding", "table"),
    ("conv2d", "images"),
    *((name, tree) for name in ("fused", "kv") for tree in ("qkv", "kv")),
    ("gpt2", "layers"),
    ("gpt2", "scanned layers"),
    ("bert", "layers"),
    ("llama", "layers"),
    ("llama", "scanned layers"),
]
# Where one leaf holds parts of different scales, b takes in the difference, and so do AdamW's steps.
TRAINED = [
    ("patterns", "unrolled"),
    ("patterns", "scanned on axis 1"),
    ("saved", "unrolled"),
    ("embedding", "table"),
    ("conv2d", "images"),
    ("kv", "qkv"),
    ("gpt2", "layers"),
]
# Those that tests/test_peft_parity.py trains besides: each takes seconds to compile.
TRAINED_TOO = [
    ("bias_all", "scanned"),
    ("rslora", "scanned"),
    ("kv", "kv"),
    ("bert", "layers"),
    ("llama", "scanned layers"),
]


def train(wrapped, fn, x, targets, steps=STEPS):
    """The losses of some steps of a fresh AdamW, and what they make of the wrapped tree."""

    def loss_fn(params, batch, key):
        return jnp.mean((fn(params, batch["x"]) - batch["y"]) ** 2)

    tx = optax.adamw(RATE, weight_decay=DECAY)
    with jax.numpy_dtype_promotion("standard"):
        state = lora_jax.TrainState.create(wrapped, tx, jax.random.key(0))
        step = lora_jax.make_train_step(loss_fn, tx)
        losses = []
        for _ in range(steps):
            state, metrics = step(state, {"x": jnp.asarray(x), "y": jnp.asarray(targets)})
            losses.append(float(metrics["loss"]))
    return losses, state.wrapped


def difference(actual, expected):
    assert actual.shape == expected.shape
    return float(np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64)).max())
