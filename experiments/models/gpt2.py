"""GPT-2 as a plain Flax Linen model that reads the Hugging Face layout.

The model knows nothing of LoRA. It computes what transformers' GPT2LMHeadModel computes without dropout:

    model, params = load("path/to/gpt2")
    logits = model.apply({"params": params}, tokens)

Its attention is fused as the files have it: `h_0/attn/c_attn/kernel` of shape (d, 3 d) holds the
queries', keys' and values' columns. With `scan` the layers are one stack, `h/attn/c_attn/kernel`.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from experiments.models import hub
from lora_jax import names

# What transformers takes for a field that config.json does not have, and other names that it reads.
DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The fields of a GPT-2 config.json that the computation depends on, and `scan`."""

    vocab_size: int = 50257
    max_positions: int = 1024
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    activation: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    tie_embeddings: bool = True
    bos_id: int | None = 50256
    eos_id: int | None = 50256
    scan: bool = False

    @classmethod
    def from_dict(cls, raw: dict[str, Any], scan: bool = False) -> GPT2Config:
        """Read the content of a config.json; what this model cannot compute is refused by name.

        A field that is missing has the default of transformers.
        """
        served = {"model_type": ["gpt2"], "activation_function": ["gelu_new", *hub.ACTIVATIONS]}
        served |= {"scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False]}
        served |= {"add_cross_attention": [False], "quantization_config": [None]}
        hub.require(raw, served)
        raw = {**raw, **{name: raw[alias] for alias, name in _ALIASES.items() if alias in raw}}
        raw = hub.complete(raw, DEFAULTS, nullable=("bos_token_id", "eos_token_id"))
        eos = raw["eos_token_id"]
        return cls(
            vocab_size=raw["vocab_size"],
            max_positions=raw["n_positions"],
            hidden_size=raw["n_embd"],
            num_layers=raw["n_layer"],
            num_heads=raw["n_head"],
            intermediate_size=raw["n_inner"] or 4 * raw["n_embd"],
            activation=raw["activation_function"],
            layer_norm_eps=raw["layer_norm_epsilon"],
            tie_embeddings=raw["tie_word_embeddings"],
            bos_id=raw["bos_token_id"],
            eos_id=eos[0] if isinstance(eos, list) else eos,
            scan=scan,
        )


PRESETS = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096),
    "gpt2-large": GPT2Config(hidden_size=1280, num_layers=36, num_heads=20, intermediate_size=5120),
}


class Attention(nn.Module):
    config: GPT2Config
    dtype: Any

    @nn.compact
    def __call__(self, x, mask, cache=None, start=None):
        """Attend; `mask` is (batch, queries, keys), `cache` the layer's keys and values so far."""
        c, kinds = self.config, {"dtype": self.dtype, "param_dtype": self.dtype}
        size = c.hidden_size // c.num_heads
        parts = jnp.split(nn.Dense(3 * c.hidden_size, name="c_attn", **kinds)(x), 3, axis=-1)
        q, k, v = (part.reshape(*x.shape[:2], c.num_heads, size) for part in parts)
        if cache is not None:
            k, v = cache = tuple(
                lax.dynamic_update_slice_in_dim(old, new, start, axis=1)
                for old, new in zip(cache, (k, v), strict=True)
            )
        wide = jnp.promote_types(self.dtype, jnp.float32)
        scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=wide)
        scores = jnp.where(mask[:, None], scores * size**-0.5, jnp.finfo(wide).min)
        y = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores).astype(self.dtype), v)
        return nn.Dense(c.hidden_size, name="c_proj", **kinds)(y.reshape(x.shape)), cache


class MLP(nn.Module):
    config: GPT2Config
    dtype: Any

    @nn.compact
    def __call__(self, x):
        c, kinds = self.config, {"dtype": self.dtype, "param_dtype": self.dtype}
        x = hub.ACTIVATIONS[c.activation](nn.Dense(c.intermediate_size, name="c_fc", **kinds)(x))
        return nn.Dense(c.hidden_size, name="c_proj", **kinds)(x)


class Block(nn.Module):
    config: GPT2Config
    dtype: Any

    @nn.compact
    def __call__(self, x, mask, cache=None, start=None):
        c = self.config
        y, cache = Attention(c, self.dtype, name="attn")(_norm(c, self.dtype, "ln_1")(x), mask, cache, start)
        x = x + y
        return x + MLP(c, self.dtype, name="mlp")(_norm(c, self.dtype, "ln_2")(x)), cache


def _norm(config: GPT2Config, dtype: Any, name: str | None = None) -> nn.LayerNorm:
    # The fast variance loses digits where the mean is far from zero.
    kinds = {"dtype": dtype, "param_dtype": dtype, "use_fast_variance": False}
    return nn.LayerNorm(epsilon=config.layer_norm_eps, name=name, **kinds)


class GPT2(nn.Module):
    """The causal language model. `__call__` gives all logits; `decode` the next ones, with a cache."""

    config: GPT2Config
    dtype: Any = jnp.float32

    def setup(self):
        c, kinds = self.config, {"dtype": self.dtype, "param_dtype": self.dtype}
        self.wte = nn.Embed(c.vocab_size, c.hidden_size, **kinds)
        self.wpe = nn.Embed(c.max_positions, c.hidden_size, **kinds)
        if c.scan:
            stacked = nn.scan(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 1, nn.broadcast),
                out_axes=1,
                length=c.num_layers,
            )
            self.h = stacked(c, self.dtype)
        else:
            self.h = [Block(c, self.dtype) for _ in range(c.num_layers)]
        self.ln_f = _norm(c, self.dtype)
        if not c.tie_embeddings:
            self.lm_head = nn.Dense(c.vocab_size, use_bias=False, **kinds)

    def __call__(self, tokens: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """Logits (batch, length, vocab) of tokens (batch, length); `valid` is False on padding.

        A token's position is the number of valid ones before it.
        """
        if valid is None:
            valid = jnp.ones(tokens.shape, bool)
        length = tokens.shape[1]
        if length > self.config.max_positions:
            raise ValueError(f"{length} tokens exceed the model's {self.config.max_positions} positions.")
        causal = jnp.tril(jnp.ones((length, length), bool))
        x = self.wte(tokens) + self.wpe(_positions(valid))
        x, _ = self._layers(x, causal & valid[:, None, :])
        return self._head(x)

    def decode(self, tokens: jax.Array, valid: jax.Array, cache: dict[str, Any]):
        """Append tokens to a cache made by `empty_cache`.

        Returns the logits (batch, vocab) that follow each row's last valid token, and the new cache.
        Padding may stand on either side: a padded slot is never attended to and takes no position.
        """
        start, length = cache["start"], tokens.shape[1]
        seen = lax.dynamic_update_slice_in_dim(cache["valid"], valid, start, axis=1)
        slots = jnp.arange(seen.shape[1], dtype=jnp.int32)
        causal = slots[None, :] <= start + slots[:length, None]
        before = jnp.sum(cache["valid"], axis=1, dtype=jnp.int32)
        x = self.wte(tokens) + self.wpe(before[:, None] + _positions(valid))
        x, layers = self._layers(x, causal & seen[:, None, :], cache["layers"], start)
        last = jnp.max(jnp.where(valid, slots[:length], jnp.int32(0)), axis=1)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)
        return self._head(x)[:, 0], {"start": start + jnp.int32(length), "valid": seen, "layers": layers}

    def _layers(self, x, mask, caches=None, start=None):
        if self.config.scan:
            return self.h(x, mask, caches, start)
        new = []
        for i, block in enumerate(self.h):
            x, cache = block(x, mask, None if caches is None else caches[i], start)
            new.append(cache)
        return x, new

    def _head(self, x):
        x = self.ln_f(x)
        return self.wte.attend(x) if self.config.tie_embeddings else self.lm_head(x)

    def empty_cache(self, batch: int, slots: int) -> dict[str, Any]:
        """A cache for `slots` tokens: needs no parameters, so it is called on the bare model.

        The batch is the first axis of everything but `start`; of scanned layers the second counts them.
        """
        c = self.config
        if slots > c.max_positions:
            raise ValueError(f"{slots} slots exceed the model's {c.max_positions} positions.")
        layers = (c.num_layers,) if c.scan else ()
        zeros = jnp.zeros((batch, *layers, slots, c.num_heads, c.hidden_size // c.num_heads), self.dtype)
        return {
            "start": jnp.int32(0),
            "valid": jnp.zeros((batch, slots), bool),
            "layers": (zeros, zeros) if c.scan else [(zeros, zeros)] * c.num_layers,
        }


def _positions(valid: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - jnp.int32(1), jnp.int32(0))


def abstract(config: GPT2Config, dtype: Any = jnp.float32) -> Any:
    """The parameters' shapes: no memory is used, whatever the size."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(GPT2(config, dtype).init, jax.random.key(0), tokens)["params"]


def load(
    folder: str | Path, dtype: Any = None, *, scan: bool = False, shardings: Any = None, ignore: tuple = ()
) -> tuple[GPT2, Any]:
    """The model and parameters of a folder in the Hugging Face layout.

    `dtype` converts the tensors, which otherwise must be of one; `scan` stacks the layers; `shardings`
    and `ignore` are those of `hub.load`. The files may hold the language model or the bare GPT2Model. A head
    that is stored although the configuration ties it to the embedding must be equal to that bit for bit,
    unless `ignore` names it.

    Raises:
        FileNotFoundError: config.json or the weights are missing.
        ValueError: the configuration is not served, or the tensors do not fit it.
    """
    config = GPT2Config.from_dict(hub.config(folder), scan)
    found = hub.stored(folder)
    prefix = hub.prefix(found, ("transformer.", ""), "wte.weight")
    if config.tie_embeddings and not any(re.fullmatch(pattern, "lm_head.weight") for pattern in ignore):
        hub.require_tied(found, f"{prefix}wte.weight")
    dtype = hub.one_dtype(folder) if dtype is None else hub.floating(dtype)
    # The masks that old files hold, and the copy of a tied embedding.
    unused = [rf"{re.escape(prefix)}h\.\d+\.attn\.(masked_)?bias"]
    unused += [r"lm_head\.weight"] if config.tie_embeddings else []
    params = hub.load(
        folder,
        abstract(config, dtype),
        names.gpt2(prefix),
        shardings=shardings,
        dtype=dtype,
        ignore=(*unused, *ignore),
    )
    return GPT2(config, dtype), params
