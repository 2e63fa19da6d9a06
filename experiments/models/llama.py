"""Llama as a plain Flax Linen model that reads the Hugging Face layout.

The model knows nothing of LoRA. `load` reads config.json and the safetensors files (sharded or not),
`Llama` computes logits, and `greedy` decodes a batch with a key-value cache:

    model, params = load("path/to/llama")
    logits = model.apply({"params": params}, tokens)
    new = greedy(model, params, prompts, valid, max_new=32, eos_id=model.config.eos_id)
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """How Llama 3.1 stretches the low rotary frequencies to a longer context."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The fields of a Llama config.json that the computation depends on."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    tie_embeddings: bool
    bos_id: int | None
    eos_id: int | None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> LlamaConfig:
        """Read the content of a config.json; what this model cannot compute is refused by name."""
        served = {
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "quantization_config": None,
        }
        for field, value in served.items():
            if raw.get(field, value) != value:
                raise ValueError(
                    f"config.json: {field} is {raw[field]!r}, but only {value!r} is served; use a Llama "
                    "checkpoint such as HuggingFaceTB/SmolLM2-135M or meta-llama/Llama-3.2-1B."
                )
        heads, eos = raw["num_attention_heads"], raw.get("eos_token_id")
        # transformers 5 gathers theta and the scaling under rope_parameters; older files keep them apart.
        rope = {"rope_theta": raw.get("rope_theta", 10000.0)}
        rope |= raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        return cls(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            max_positions=raw.get("max_position_embeddings", 2048),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=_rope_scaling(rope),
            tie_embeddings=raw.get("tie_word_embeddings", False),
            bos_id=raw.get("bos_token_id"),
            eos_id=eos[0] if isinstance(eos, list) else eos,
        )


def _rope_scaling(rope: dict[str, Any]) -> Llama3Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "llama3":
        return Llama3Scaling(**{f.name: rope[f.name] for f in dataclasses.fields(Llama3Scaling)})
    raise ValueError(f"config.json: the rope type {kind!r} is not served; 'default' and 'llama3' are.")


def _frequencies(config: LlamaConfig) -> np.ndarray:
    """The angle per position of every pair of a head's dimensions, shape (head_dim / 2,)."""
    frequency = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    if (scaling := config.rope_scaling) is not None:
        # How often a pair turns within the original context decides: often, it is kept; seldom, it is
        # slowed by the factor; between the two thresholds, a linear mix.
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = frequency * (kept + (1.0 - kept) / scaling.factor)
    return frequency.astype(np.float32)


def rotate(x: jax.Array, positions: jax.Array, config: LlamaConfig) -> jax.Array:
    """Rotary position embedding of x (batch, length, heads, head_dim), halves paired."""
    angle = positions.astype(jnp.float32)[:, :, None, None] * jnp.asarray(_frequencies(config))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class RMSNorm(nn.Module):
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x):
        # As transformers rounds: the statistics in float32, then the scale in the model's dtype.
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)
        wide = x.astype(jnp.float32)
        wide *= lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return scale * wide.astype(self.dtype)


class Attention(nn.Module):
    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, positions, mask, cache=None, start=None):
        """Attend; `mask` is (batch, queries, keys), `cache` the layer's keys and values so far."""
        c = self.config
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype, param_dtype=self.dtype)

        def heads(name, count):
            return dense(count * c.head_dim, name=name)(x).reshape(*x.shape[:2], count, c.head_dim)

        groups = (c.num_kv_heads, c.num_heads // c.num_kv_heads)
        q = rotate(heads("q_proj", c.num_heads), positions, c)
        k = rotate(heads("k_proj", c.num_kv_heads), positions, c)
        v = heads("v_proj", c.num_kv_heads)
        if cache is not None:
            k, v = (
                lax.dynamic_update_slice_in_dim(old, new, start, axis=1)
                for old, new in zip(cache, (k, v), strict=True)
            )
        q = q.reshape(*x.shape[:2], *groups, c.head_dim)
        # Queries before groups, as the product comes out: no transpose of anything quadratic.
        scores = jnp.einsum("btkgd,bskd->bktgs", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, :, None], scores * c.head_dim**-0.5, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores).astype(self.dtype)
        y = jnp.einsum("bktgs,bskd->btkgd", weights, v)
        y = y.reshape(*x.shape[:2], c.num_heads * c.head_dim)
        return dense(c.hidden_size, name="o_proj")(y), (k, v)


class MLP(nn.Module):
    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(self, x):
        c = self.config
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype, param_dtype=self.dtype)
        gate = dense(c.intermediate_size, name="gate_proj")(x)
        up = dense(c.intermediate_size, name="up_proj")(x)
        return dense(c.hidden_size, name="down_proj")(nn.silu(gate) * up)


class Layer(nn.Module):
    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, positions, mask, cache=None, start=None):
        norm = functools.partial(RMSNorm, self.config.rms_norm_eps, self.dtype)
        attention = Attention(self.config, self.dtype, name="self_attn")
        y, cache = attention(norm(name="input_layernorm")(x), positions, mask, cache, start)
        x = x + y
        return x + MLP(self.config, self.dtype, name="mlp")(norm(name="post_attention_layernorm")(x)), cache


class Llama(nn.Module):
    """The causal language model. `__call__` gives all logits; `decode` the next ones, with a cache."""

    config: LlamaConfig
    dtype: Any = jnp.float32

    def setup(self):
        c, kinds = self.config, {"dtype": self.dtype, "param_dtype": self.dtype}
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size, **kinds)
        self.layers = [Layer(c, self.dtype) for _ in range(c.num_layers)]
        self.norm = RMSNorm(c.rms_norm_eps, self.dtype)
        if not c.tie_embeddings:
            self.lm_head = nn.Dense(c.vocab_size, use_bias=False, **kinds)

    def __call__(self, tokens: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """Logits (batch, length, vocab) of tokens (batch, length); `valid` is False on padding."""
        if valid is None:
            valid = jnp.ones(tokens.shape, bool)
        length = tokens.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool))
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x, _ = layer(x, _positions(valid), causal & valid[:, None, :])
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
        positions = before[:, None] + _positions(valid)
        x, layers = self.embed_tokens(tokens), []
        for layer, old in zip(self.layers, cache["layers"], strict=True):
            x, new = layer(x, positions, causal & seen[:, None, :], old, start)
            layers.append(new)
        last = jnp.max(jnp.where(valid, slots[:length], jnp.int32(0)), axis=1)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)
        cache = {"start": start + jnp.int32(length), "valid": seen, "layers": layers}
        return self._head(x)[:, 0], cache

    def _head(self, x):
        x = self.norm(x)
        return self.embed_tokens.attend(x) if self.config.tie_embeddings else self.lm_head(x)

    def empty_cache(self, batch: int, slots: int) -> dict[str, Any]:
        """A cache for `slots` tokens: needs no parameters, so it is called on the bare model."""
        c = self.config
        zeros = jnp.zeros((batch, slots, c.num_kv_heads, c.head_dim), self.dtype)
        return {
            "start": jnp.int32(0),
            "valid": jnp.zeros((batch, slots), bool),
            "layers": [(zeros, zeros)] * c.num_layers,
        }


def _positions(valid: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - jnp.int32(1), jnp.int32(0))


def greedy(
    model: Llama, params: Any, prompts: jax.Array, valid: jax.Array, *, max_new: int, eos_id: int
) -> jax.Array:
    """The most probable next token, `max_new` times: int32 (batch, max_new), `eos_id` once ended.

    A pure function of `params`, to be jitted as a whole; it stops early when every row has ended.
    """
    batch, length = prompts.shape
    if length + max_new > model.config.max_positions:
        raise ValueError(
            f"a prompt of {length} and {max_new} new tokens exceed the model's "
            f"{model.config.max_positions} positions; shorten the prompt or lower max_new."
        )

    def advance(tokens, valid, cache):
        logits, cache = model.apply({"params": params}, tokens, valid, cache, method="decode")
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    def unfinished(carry):
        step, _, _, ended, _ = carry
        return (step < max_new) & ~jnp.all(ended)

    def body(carry):
        step, token, out, ended, cache = carry
        token = jnp.where(ended, jnp.int32(eos_id), token)
        out = lax.dynamic_update_slice_in_dim(out, token[:, None], step, axis=1)
        following, cache = advance(token[:, None], jnp.ones((batch, 1), bool), cache)
        return step + jnp.int32(1), following, out, ended | (token == eos_id), cache

    token, cache = advance(prompts, valid, model.empty_cache(batch, length + max_new))
    out = jnp.full((batch, max_new), eos_id, jnp.int32)
    start = (jnp.int32(0), token, out, jnp.zeros((batch,), bool), cache)
    return lax.while_loop(unfinished, body, start)[2]


def load(folder: str | Path, dtype: Any = None) -> tuple[Llama, Any]:
    """The model and parameters of a folder in the Hugging Face layout.

    Tensors are read one at a time, so the peak is the parameters and one tensor. `dtype` converts
    them; by default they stay as stored, which must then be one dtype.

    Raises:
        FileNotFoundError: config.json or the weights are missing.
        ValueError: the configuration is not served, or the tensors do not fit it.
    """
    folder = Path(folder)
    config = LlamaConfig.from_dict(json.loads((folder / "config.json").read_text()))
    flat: dict[str, jax.Array] = {}
    for name, tensor in _tensors(folder):
        if (path := _param_path(name, config)) is None:
            continue
        if path.endswith("/kernel"):
            tensor = tensor.T
        flat[path] = jnp.asarray(tensor, tensor.dtype if dtype is None else dtype)
    dtypes = {str(leaf.dtype) for leaf in flat.values()}
    if len(dtypes) > 1:
        raise ValueError(f"{folder}: several dtypes {sorted(dtypes)}; choose one: load(folder, dtype=...)")
    model = Llama(config, jnp.dtype(dtypes.pop()) if dtypes else jnp.float32)
    _check(folder, model, flat)
    params: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, params)[last] = leaf
    return model, params


def _tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        from safetensors import safe_open
    except ImportError:
        raise ModuleNotFoundError(
            'reading weights needs safetensors; run: pip install -e ".[experiments]"'
        ) from None
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for file in files:
        if not (folder / file).exists():
            raise FileNotFoundError(f"{folder / file} is missing; the weights must be in safetensors files.")
        with safe_open(folder / file, framework="np") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)


def _param_path(name: str, config: LlamaConfig) -> str | None:
    """`model.layers.0.mlp.up_proj.weight` is `layers_0/mlp/up_proj/kernel`; None for what is not needed."""
    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_embeddings):
        return None
    path = name.removeprefix("model.").replace("layers.", "layers_").replace(".", "/")
    stem, _, last = path.rpartition("/")
    if last != "weight":
        return path
    if stem == "embed_tokens":
        return f"{stem}/embedding"
    return f"{stem}/scale" if stem.endswith("norm") else f"{stem}/kernel"


def _check(folder: Path, model: Llama, flat: dict[str, jax.Array]) -> None:
    expected = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    shapes = {
        "/".join(str(key.key) for key in keys): leaf.shape
        for keys, leaf in jax.tree_util.tree_leaves_with_path(expected)
    }
    problems = [f"{path} is missing" for path in shapes if path not in flat]
    problems += [f"{path} is not part of the model" for path in flat if path not in shapes]
    problems += [
        f"{path} has shape {flat[path].shape}, config.json says {shape}"
        for path, shape in shapes.items()
        if path in flat and flat[path].shape != shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{folder}: the tensors do not fit config.json: {'; '.join(problems[:8])}{more}")
