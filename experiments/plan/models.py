"""The models that plans are made of, by their shapes: GPT-3 and Llama 3 as plain functions.

Layers are stacked and scanned, and each is rematerialised; activations say where they lie on the mesh
axes `fsdp` (the batch) and `tensor` (heads, hidden units, and the length between layers). Nothing here
knows of LoRA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a decoder, and which of the two kinds it is."""

    kind: Literal["gpt", "llama"]
    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int
    length: int
    rope_theta: float = 10000.0
    remat: bool = True

    @property
    def head(self) -> int:
        return self.width // self.heads


CONFIGS = {
    # Brown et al., 2020 (arXiv:2005.14165), table 2.1. Every layer attends densely here, where GPT-3 has
    # locally banded sparse attention in every second one.
    "gpt3-175b": Config("gpt", 96, 12288, 96, 96, 4 * 12288, 50257, 2048),
    # Llama Team, 2024 (arXiv:2407.21783), table 3.
    "llama3-8b": Config("llama", 32, 4096, 32, 8, 14336, 128256, 8192, 500000.0),
    "llama3-70b": Config("llama", 80, 8192, 64, 8, 28672, 128256, 8192, 500000.0),
}


def tiny(config: Config) -> Config:
    """The same model, small enough to run."""
    sizes = {"layers": 3, "width": 32, "heads": 4, "kv_heads": min(config.kv_heads, 2), "hidden": 64}
    if config.kind == "gpt":
        sizes["kv_heads"] = sizes["heads"]
    return dataclasses.replace(config, vocabulary=96, length=16, **sizes)


# What each linear layer maps from and to.
def kernels(c: Config) -> dict[str, tuple[int, int]]:
    keys = c.kv_heads * c.head
    attention = {"q": (c.width, c.width), "k": (c.width, keys), "v": (c.width, keys), "o": (c.width, c.width)}
    up, down = (c.width, c.hidden), (c.hidden, c.width)
    mlp = {"up": up, "down": down} if c.kind == "gpt" else {"gate": up, "up": up, "down": down}
    return {f"attention/{name}": shape for name, shape in attention.items()} | {
        f"mlp/{name}": shape for name, shape in mlp.items()
    }


def init(key: jax.Array, c: Config, dtype: Any = jnp.bfloat16) -> Any:
    """Parameters of a model; call it through `jax.eval_shape` for their shapes alone."""
    keys = iter(jax.random.split(key, 16))

    def normal(*shape: int) -> jax.Array:
        return (0.02 * jax.random.normal(next(keys), shape)).astype(dtype)

    def norm(*stack: int) -> dict[str, jax.Array]:
        scale = {"scale": jnp.ones((*stack, c.width), dtype)}
        return scale | ({"bias": jnp.zeros((*stack, c.width), dtype)} if c.kind == "gpt" else {})

    layers: dict[str, Any] = {"attention": {}, "mlp": {}}
    for path, (rows, columns) in kernels(c).items():
        part, name = path.split("/")
        layers[part][name] = {"kernel": normal(c.layers, rows, columns)}
        if c.kind == "gpt":
            layers[part][name]["bias"] = jnp.zeros((c.layers, columns), dtype)
    layers |= {"attention_norm": norm(c.layers), "mlp_norm": norm(c.layers)}
    params = {"embedding": normal(c.vocabulary, c.width), "layers": layers, "norm": norm()}
    if c.kind == "gpt":  # whose head is its embedding
        return params | {"positions": normal(c.length, c.width)}
    return params | {"head": {"kernel": normal(c.width, c.vocabulary)}}


def rules(c: Config) -> list[tuple[str, P]]:
    """How the parameters lie on a mesh with the axes `fsdp` and `tensor`."""
    # Of the vocabulary's axis nothing is asked: GPT-3's 50,257 divides by nothing that a mesh is made of.
    others = [("embedding|positions", P(None, ("fsdp", "tensor"))), ("bias", P())]
    if c.kind == "llama":
        others = [("embedding", P(None, ("fsdp", "tensor"))), ("head/kernel", P("fsdp", "tensor"))]
    return [
        ("attention/(q|k|v)/kernel|mlp/(gate|up)/kernel", P(None, "fsdp", "tensor")),
        ("attention/o/kernel|mlp/down/kernel", P(None, "tensor", "fsdp")),
        (".*norm/.*", P()),
        *others,
    ]


def loss_fn(c: Config) -> Callable[[Any, Any, Any], jax.Array]:
    """The next token's cross entropy, of a batch {"tokens", "targets"} of (batch, length) each."""

    def loss(params: Any, batch: Any, key: Any = None) -> jax.Array:
        return cross_entropy(logits(params, batch["tokens"], c), batch["targets"])

    return loss


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    # A sum over a mask, since a look-up along a sharded axis would gather the logits.
    at_target = lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
    chosen = jnp.sum(jnp.where(at_target, logits, 0.0), axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


def logits(params: Any, tokens: jax.Array, c: Config) -> jax.Array:
    # The table is gathered over fsdp first, as a layer's weights are: tokens lie there by example.
    x = lie(lie(params["embedding"], None, "tensor")[tokens], "fsdp", None, "tensor")
    if c.kind == "gpt":
        x = x + params["positions"][: tokens.shape[1]]

    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        # Between layers the length is sharded too, so that what is kept for the backward pass is.
        x = lie(x, "fsdp", "tensor", None)
        x = x + attention(lie(norm(x, p["attention_norm"]), "fsdp", None, None), p["attention"], c)
        x = lie(x, "fsdp", "tensor", None)
        x = x + mlp(lie(norm(x, p["mlp_norm"]), "fsdp", None, None), p["mlp"], c)
        return lie(x, "fsdp", "tensor", None), None

    x, _ = lax.scan(jax.checkpoint(layer) if c.remat else layer, x, params["layers"])
    x = lie(norm(x, params["norm"]), "fsdp", None, None)
    head = params["embedding"].T if c.kind == "gpt" else params["head"]["kernel"]
    out = jnp.matmul(x, head, preferred_element_type=jnp.float32)
    return lie(out, "fsdp", None, None if c.kind == "gpt" else "tensor")


def attention(x: jax.Array, p: Any, c: Config) -> jax.Array:
    def heads(name: str, count: int) -> jax.Array:
        out = linear(x, p[name]).reshape(*x.shape[:2], count, c.head)
        return lie(out, "fsdp", None, "tensor", None)

    q, k, v = heads("q", c.heads), heads("k", c.kv_heads), heads("v", c.kv_heads)
    if c.kind == "llama":
        q, k = rotate(q, c), rotate(k, c)
    grouped = q.reshape(*q.shape[:2], c.kv_heads, -1, c.head)
    scores = jnp.einsum("bqkgh,bskh->bkgqs", grouped, k, preferred_element_type=jnp.float32)
    length = x.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores * c.head**-0.5, -jnp.inf)).astype(x.dtype)
    mixed = jnp.einsum("bkgqs,bskh->bqkgh", weights, v).reshape(*x.shape[:2], -1)
    return linear(lie(mixed, "fsdp", None, "tensor"), p["o"])


def mlp(x: jax.Array, p: Any, c: Config) -> jax.Array:
    up = lie(linear(x, p["up"]), "fsdp", None, "tensor")
    if c.kind == "gpt":
        return linear(jax.nn.gelu(up), p["down"])
    gate = lie(linear(x, p["gate"]), "fsdp", None, "tensor")
    return linear(jax.nn.silu(gate) * up, p["down"])


def linear(x: jax.Array, p: Any) -> jax.Array:
    out = x @ p["kernel"]
    return out + p["bias"] if "bias" in p else out


def norm(x: jax.Array, p: Any) -> jax.Array:
    """Layer normalisation where there is a bias, root mean square where there is none."""
    wide = x.astype(jnp.float32)
    if "bias" in p:
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    out = wide.astype(x.dtype) * p["scale"]
    return out + p["bias"] if "bias" in p else out


def rotate(x: jax.Array, c: Config) -> jax.Array:
    """Rotary positions on (batch, length, heads, head), halves paired."""
    frequency = c.rope_theta ** -(jnp.arange(0, c.head, 2, dtype=jnp.float32) / c.head)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def lie(x: jax.Array, *axes: str | None) -> jax.Array:
    """Say where an activation lies on the mesh that is set; without one, nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else lax.with_sharding_constraint(x, P(*axes))
