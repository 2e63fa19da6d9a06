"""Models by the shapes of their parameters alone, for those that the experiments have no code for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def linear(inner: int, outer: int, bias: bool = True) -> dict[str, Any]:
    kernel = {"kernel": jax.ShapeDtypeStruct((inner, outer), jnp.float32)}
    return kernel | ({"bias": vector(outer)} if bias else {})


def norm(width: int) -> dict[str, Any]:
    return {"scale": vector(width), "bias": vector(width)}


def table(count: int, width: int) -> dict[str, Any]:
    return {"embedding": jax.ShapeDtypeStruct((count, width), jnp.float32)}


def vector(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size,), jnp.float32)


def bloom(width: int = 2560, layers: int = 30, vocabulary: int = 250_880) -> Any:
    """BLOOM-3B (bigscience/bloom-3b): queries, keys and values in one kernel, the head the embedding."""
    block = {
        "input_layernorm": norm(width),
        "self_attention": {"query_key_value": linear(width, 3 * width), "dense": linear(width, width)},
        "post_attention_layernorm": norm(width),
        "mlp": {"dense_h_to_4h": linear(width, 4 * width), "dense_4h_to_h": linear(4 * width, width)},
    }
    tops = {"word_embeddings": table(vocabulary, width), "word_embeddings_layernorm": norm(width)}
    return tops | {f"h_{i}": block for i in range(layers)} | {"ln_f": norm(width)}


def deberta(width: int = 1536, layers: int = 48, vocabulary: int = 128_100) -> Any:
    """DeBERTa v2 XXL's embedding and layers, without its convolution, relative positions and heads."""
    attention = {f"{name}_proj": linear(width, width) for name in ("query", "key", "value")}
    block = {
        "attention": {"self": attention, "output": {"dense": linear(width, width), "LayerNorm": norm(width)}},
        "intermediate": {"dense": linear(width, 4 * width)},
        "output": {"dense": linear(4 * width, width), "LayerNorm": norm(width)},
    }
    embeddings = {"word_embeddings": table(vocabulary, width), "LayerNorm": norm(width)}
    return {"embeddings": embeddings, "encoder": {f"layer_{i}": block for i in range(layers)}}


def gpt2_from_scratch(width: int = 768, layers: int = 12, classes: int = 2) -> Any:
    """GPT-2 124M as LLMs-from-scratch has it (appendix E): separate q, k and v, and a head of two classes."""
    block = {
        "att": {name: linear(width, width) for name in ("W_query", "W_key", "W_value", "out_proj")},
        "ff": {"layers_0": linear(width, 4 * width), "layers_2": linear(4 * width, width)},
        "norm1": norm(width),
        "norm2": norm(width),
    }
    tables = {"tok_emb": table(50_257, width), "pos_emb": table(1024, width)}
    blocks = {f"trf_blocks_{i}": block for i in range(layers)}
    return tables | blocks | {"final_norm": norm(width), "out_head": linear(width, classes)}
