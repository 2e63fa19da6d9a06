"""Llama, Mistral and Qwen2 as a plain Flax Linen model that reads and writes the Hugging Face layout.

The model knows nothing of LoRA. `load` reads config.json and the safetensors files (sharded or not),
`Llama` computes logits, `save` writes what transformers opens, and `generate` decodes with the cache:

    model, params = load("path/to/llama")                    # scan=True for layers stacked by nn.scan
    logits = model.apply({"params": params}, tokens)
    new = generate.greedy(model, params, prompts, valid, max_new=32, eos_id=model.config.eos_id)
    save("path/to/other", model, params)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.models import hub
from lora_jax import names

# What transformers takes for a field that config.json does not have.
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "sliding_window": None,
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEFAULTS = {
    "llama": _LLAMA,
    "mistral": _LLAMA
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _LLAMA
    | {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "bos_token_id": None,
        "eos_token_id": None,
    },
}
_NULLABLE = "num_key_value_heads head_dim sliding_window bos_token_id eos_token_id".split()
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """How Llama 3.1 stretches the low rotary frequencies to a longer context."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The fields of a config.json that the computation depends on."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    sliding_window: int | None
    attention_bias: bool
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    tie_embeddings: bool
    bos_id: int | None
    eos_ids: tuple[int, ...]

    @property
    def eos_id(self) -> int | None:
        """The first of the tokens that end a text, if there are any."""
        return self.eos_ids[0] if self.eos_ids else None

    @property
    def output_bias(self) -> bool:
        """Whether the attention's last product has a bias too: in Llama, not in Qwen2."""
        return self.attention_bias and self.model_type == "llama"

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> LlamaConfig:
        """Read the content of a config.json; what this model cannot compute is refused by name.

        A field that is missing has the default that transformers has for the model_type.
        """
        kind = raw.get("model_type", "llama")
        hub.require({"model_type": kind}, {"model_type": list(DEFAULTS)})
        raw = hub.complete(raw, DEFAULTS[kind], _NULLABLE)
        # transformers 5 gathers theta and the scaling under rope_parameters; older files keep them apart.
        rope = {"rope_theta": raw["rope_theta"]}
        rope |= {"original_max_position_embeddings": raw["max_position_embeddings"]}
        rope |= raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        served = {"hidden_act": ["silu"], "mlp_bias": [False], "quantization_config": [None]}
        served["partial_rotary_factor"] = [1.0]
        if kind == "mistral":
            served["attention_bias"] = [False]
        hub.require(rope | raw, served)
        heads, eos = raw["num_attention_heads"], raw["eos_token_id"]
        return cls(
            model_type=kind,
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=raw["num_key_value_heads"] or heads,
            head_dim=raw["head_dim"] or raw["hidden_size"] // heads,
            max_positions=raw["max_position_embeddings"],
            sliding_window=_sliding_window(raw, kind),
            attention_bias=kind == "qwen2" or raw["attention_bias"],
            rms_norm_eps=raw["rms_norm_eps"],
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=_rope_scaling(rope),
            tie_embeddings=raw["tie_word_embeddings"],
            bos_id=raw["bos_token_id"],
            eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )

    def to_dict(self) -> dict[str, Any]:
        """A config.json with these fields, as versions 4 and 5 of transformers read it."""
        scaling = self.rope_scaling and {"rope_type": "llama3"} | dataclasses.asdict(self.rope_scaling)
        raw = {
            "architectures": [_ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_id if len(self.eos_ids) < 2 else list(self.eos_ids),
        }
        if self.model_type == "llama":
            raw["attention_bias"] = self.attention_bias
        else:
            raw["sliding_window"] = self.sliding_window
        if self.model_type == "qwen2":
            raw |= {"use_sliding_window": self.sliding_window is not None, "max_window_layers": 0}
        return raw


def _sliding_window(raw: dict[str, Any], kind: str) -> int | None:
    """How many positions a query sees, itself included; None for all."""
    window = raw["sliding_window"]
    if kind == "llama" or window is None or (kind == "qwen2" and not raw["use_sliding_window"]):
        return None
    if kind == "qwen2":
        full = raw["max_window_layers"]
        layers = range(raw["num_hidden_layers"])
        kinds = raw.get("layer_types") or ["sliding" if i >= full else "full" for i in layers]
        sliding = [name.startswith("sliding") for name in kinds]
        if not any(sliding):
            return None
        if not all(sliding):
            raise ValueError(
                f"config.json: {sum(sliding)} of {len(sliding)} layers have a sliding_window, which is not "
                "served; it must hold for all layers or for none."
            )
    return window if window < raw["max_position_embeddings"] else None


def _rope_scaling(rope: dict[str, Any]) -> Llama3Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "llama3":
        fields = [field.name for field in dataclasses.fields(Llama3Scaling)]
        if missing := [field for field in fields if field not in rope]:
            raise ValueError(f"config.json: the rope type 'llama3' needs {', '.join(missing)} too.")
        return Llama3Scaling(**{field: rope[field] for field in fields})
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
    wide = np.promote_types(x.dtype, np.float32)
    angle = positions.astype(wide)[:, :, None, None] * jnp.asarray(_frequencies(config), wide)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class RMSNorm(nn.Module):
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x):
        # As transformers rounds: the statistics in float32 or wider, then the scale in the model's dtype.
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)
        wide = x.astype(np.promote_types(self.dtype, np.float32))
        wide *= lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return scale * wide.astype(self.dtype)


class Attention(nn.Module):
    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, positions, mask, cache=None, start=None):
        """Attend; `mask` is (batch, queries, keys), `cache` the layer's keys and values so far."""
        c = self.config
        dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=self.dtype)

        def heads(name, count):
            y = dense(count * c.head_dim, use_bias=c.attention_bias, name=name)(x)
            return y.reshape(*x.shape[:2], count, c.head_dim)

        groups = (c.num_kv_heads, c.num_heads // c.num_kv_heads)
        q = rotate(heads("q_proj", c.num_heads), positions, c)
        k = rotate(heads("k_proj", c.num_kv_heads), positions, c)
        v = heads("v_proj", c.num_kv_heads)
        if cache is not None:
            k, v = cache = tuple(
                lax.dynamic_update_slice_in_dim(old, new, start, axis=1)
                for old, new in zip(cache, (k, v), strict=True)
            )
        q = q.reshape(*x.shape[:2], *groups, c.head_dim)
        # Queries before groups, as the product comes out: no transpose of anything quadratic.
        wide = np.promote_types(self.dtype, np.float32)
        scores = jnp.einsum("btkgd,bskd->bktgs", q, k, preferred_element_type=wide)
        scores = jnp.where(mask[:, None, :, None], scores * c.head_dim**-0.5, jnp.finfo(wide).min)
        weights = jax.nn.softmax(scores).astype(self.dtype)
        y = jnp.einsum("bktgs,bskd->btkgd", weights, v)
        y = y.reshape(*x.shape[:2], c.num_heads * c.head_dim)
        return dense(c.hidden_size, use_bias=c.output_bias, name="o_proj")(y), cache


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
    """The causal language model. `__call__` gives all logits; `decode` the next ones, with a cache.

    Layers are `layers_0`, `layers_1`, ...; with `scan` they are one, `layers`, stacked on axis 0.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    scan: bool = False

    def setup(self):
        c, kinds = self.config, {"dtype": self.dtype, "param_dtype": self.dtype}
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size, **kinds)
        if self.scan:
            stack = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast),
                length=c.num_layers,
            )
            self.layers = stack(c, self.dtype)
        else:
            self.layers = [Layer(c, self.dtype) for _ in range(c.num_layers)]
        self.norm = RMSNorm(c.rms_norm_eps, self.dtype)
        if not c.tie_embeddings:
            self.lm_head = nn.Dense(c.vocab_size, use_bias=False, **kinds)

    def __call__(self, tokens: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """Logits (batch, length, vocab) of tokens (batch, length); `valid` is False on padding."""
        return self._head(self.hidden(tokens, valid))

    def hidden(self, tokens: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """What the head is given: the last layer's output after the norm, (batch, length, hidden_size)."""
        if valid is None:
            valid = jnp.ones(tokens.shape, bool)
        positions = _positions(valid)
        mask = self._mask(positions, valid, jnp.int32(0))
        x, _ = self._layers(self.embed_tokens(tokens), positions, mask)
        return self.norm(x)

    def decode(self, tokens: jax.Array, valid: jax.Array, cache: dict[str, Any]):
        """Append tokens to a cache made by `empty_cache`.

        Returns the logits (batch, vocab) that follow each row's last valid token, and the new cache.
        Padding may stand on either side: a padded slot is never attended to and takes no position.
        """
        start, length = cache["start"], tokens.shape[1]
        seen = lax.dynamic_update_slice_in_dim(cache["valid"], valid, start, axis=1)
        before = jnp.sum(cache["valid"], axis=1, dtype=jnp.int32)
        positions = before[:, None] + _positions(valid)
        mask = self._mask(positions, seen, start)
        x, layers = self._layers(self.embed_tokens(tokens), positions, mask, cache["layers"], start)
        last = jnp.max(jnp.where(valid, jnp.arange(length, dtype=jnp.int32), jnp.int32(0)), axis=1)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)
        cache = {"start": start + jnp.int32(length), "valid": seen, "layers": layers}
        return self._head(self.norm(x))[:, 0], cache

    def _mask(self, positions, seen, start):
        """Which slots (batch, slots) the queries at positions (batch, length) see."""
        slots = jnp.arange(seen.shape[1], dtype=jnp.int32)
        causal = slots[None, :] <= start + slots[: positions.shape[1], None]
        mask = causal & seen[:, None, :]
        if (window := self.config.sliding_window) is not None:
            mask &= _positions(seen)[:, None, :] > positions[:, :, None] - jnp.int32(window)
        return mask

    def _layers(self, x, positions, mask, caches=None, start=None):
        if self.scan:
            return self.layers(x, positions, mask, caches, start)
        made = []
        for i, layer in enumerate(self.layers):
            x, cache = layer(x, positions, mask, None if caches is None else caches[i], start)
            made.append(cache)
        return x, made

    def _head(self, x):
        return self.embed_tokens.attend(x) if self.config.tie_embeddings else self.lm_head(x)

    def empty_cache(self, batch: int, slots: int) -> dict[str, Any]:
        """A cache for `slots` tokens: needs no parameters, so it is called on the bare model."""
        c = self.config
        if slots > c.max_positions:
            raise ValueError(
                f"{slots} tokens, prompt and new ones, exceed the model's {c.max_positions} positions; "
                "shorten the prompt or lower max_new."
            )
        shape = (batch, slots, c.num_kv_heads, c.head_dim)
        if self.scan:
            shape = (c.num_layers, *shape)
        pair = (jnp.zeros(shape, self.dtype),) * 2
        return {
            "start": jnp.int32(0),
            "valid": jnp.zeros((batch, slots), bool),
            "layers": pair if self.scan else [pair] * c.num_layers,
        }


def _positions(valid: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - jnp.int32(1), jnp.int32(0))


def load(
    folder: str | Path, dtype: Any = None, shardings: Any = None, scan: bool = False
) -> tuple[Llama, Any]:
    """The model and parameters of a folder in the Hugging Face layout.

    A head that is stored although the configuration ties it to the embedding must be equal to that bit for
    bit.

    Args:
        folder: Where config.json and the safetensors files are.
        dtype: The dtype to convert to; by default tensors stay as stored, which must then be one dtype.
        shardings: A tree of shardings like the parameters; each tensor goes straight to its own.
        scan: Whether layers are stacked on axis 0 of `layers/...`.

    Raises:
        FileNotFoundError: config.json or the weights are missing.
        ValueError: the configuration is not served, or the tensors do not fit it.
    """
    config = LlamaConfig.from_dict(hub.config(folder))
    if config.tie_embeddings:
        hub.require_tied(hub.stored(folder), "model.embed_tokens.weight")
    model = Llama(config, scan=scan)
    template = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    ignore = [r".*\.rotary_emb\.inv_freq"] + [r"lm_head\.weight"] * config.tie_embeddings
    params = hub.load(folder, template, names.llama(), shardings=shardings, dtype=dtype, ignore=ignore)
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
    if len(dtypes) > 1:
        raise ValueError(f"{folder}: several dtypes {sorted(dtypes)}; choose one: load(folder, dtype=...)")
    return model.clone(dtype=jnp.dtype(dtypes.pop())), params


def save(folder: str | Path, model: Llama, params: Any, overwrite: bool = False) -> None:
    """Write a model as transformers opens it; `params` are plain, such as `lora_jax.merge` gives."""
    config = model.config.to_dict() | {"torch_dtype": str(model.dtype)}
    hub.save(folder, params, names.llama(), config, overwrite=overwrite)
