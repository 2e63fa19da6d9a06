"""The models that are measured: a GPT in Flax Linen, and one as plain functions of a dict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

# In every block: query, key, value, out, up, down.
LINEAR_PER_BLOCK = 6


class Block(nn.Module):
    """Causal self-attention and an MLP, each behind a LayerNorm."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = x.shape[-1]

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, param_dtype=self.dtype, name=name)

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(dtype=self.dtype, param_dtype=self.dtype, name=name)

        y = norm("norm_1")(x)
        q, k, v = (split_heads(dense(d, name)(y), self.heads) for name in ("query", "key", "value"))
        x = x + dense(d, "out")(attention(q, k, v))
        y = nn.gelu(dense(4 * d, "up")(norm("norm_2")(x)))
        return x + dense(d, "down")(y)


class GPT(nn.Module):
    """A decoder with tied embeddings. `offset`, if given, is added to what enters the first block."""

    vocab: int
    length: int
    d: int
    layers: int
    heads: int
    dtype: Any = jnp.float32
    block: Callable[..., nn.Module] = Block

    @nn.compact
    def __call__(self, tokens: jax.Array, offset: jax.Array | None = None) -> jax.Array:
        embed = nn.Embed(self.vocab, self.d, dtype=self.dtype, param_dtype=self.dtype, name="embed")
        position = self.param("position", nn.initializers.normal(0.02), (self.length, self.d), self.dtype)
        x = embed(tokens) + position[: tokens.shape[1]]
        if offset is not None:
            x = x + offset
        for i in range(self.layers):
            x = self.block(self.heads, self.dtype, name=f"block_{i}")(x)
        x = nn.LayerNorm(dtype=self.dtype, param_dtype=self.dtype, name="norm")(x)
        return embed.attend(x)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention over (batch, length, heads, head size), softmax in float32; heads merged."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    length = q.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))
    scores = jnp.where(mask, scores.astype(jnp.float32), -1e30)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    return y.reshape(*y.shape[:-2], -1)


def next_token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    logits = logits[:, :-1].astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


# A decoder without a module system, whose own tracing is much cheaper; with RMSNorm.


def init_functions(key: jax.Array, vocab: int, length: int, d: int, layers: int) -> dict[str, Any]:
    def dense(key: jax.Array, n_in: int, n_out: int) -> dict[str, jax.Array]:
        return {"kernel": jax.random.normal(key, (n_in, n_out)) * n_in**-0.5, "bias": jnp.zeros(n_out)}

    def norm() -> dict[str, jax.Array]:
        return {"scale": jnp.ones(d)}

    def block(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, LINEAR_PER_BLOCK)
        sizes = {"query": (d, d), "key": (d, d), "value": (d, d), "out": (d, d)}
        sizes |= {"up": (d, 4 * d), "down": (4 * d, d)}
        linear = {name: dense(k, *size) for k, (name, size) in zip(keys, sizes.items(), strict=True)}
        return {**linear, "norm_1": norm(), "norm_2": norm()}

    embed_key, position_key, *keys = jax.random.split(key, layers + 2)
    return {
        "embed": {"embedding": jax.random.normal(embed_key, (vocab, d)) * 0.02},
        "position": jax.random.normal(position_key, (length, d)) * 0.02,
        "norm": norm(),
        **{f"block_{i}": block(k) for i, k in enumerate(keys)},
    }


def block_function(params: dict[str, Any], x: jax.Array, heads: int) -> jax.Array:
    def dense(name: str, x: jax.Array) -> jax.Array:
        return x @ params[name]["kernel"] + params[name]["bias"]

    y = norm_function(params["norm_1"], x)
    q, k, v = (split_heads(dense(name, y), heads) for name in ("query", "key", "value"))
    x = x + dense("out", attention(q, k, v))
    return x + dense("down", jax.nn.gelu(dense("up", norm_function(params["norm_2"], x))))


def norm_function(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    # RMSNorm, since XLA's CPU backend fuses a LayerNorm written out by hand so deeply into what uses it
    # that compiling 48 bare layers takes minutes, which would flatter any other method.
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * params["scale"]


def apply_functions(
    params: dict[str, Any], tokens: jax.Array, layers: int, block: Callable[[Any, jax.Array], jax.Array]
) -> jax.Array:
    embedding = params["embed"]["embedding"]
    x = embedding[tokens] + params["position"][: tokens.shape[1]]
    for i in range(layers):
        x = block(params[f"block_{i}"], x)
    return norm_function(params["norm"], x) @ embedding.T
