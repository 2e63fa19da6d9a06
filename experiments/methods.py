"""Every way to adapt a model, as one thing: a tree in which what is trained is marked, and how to run on it.

    way = prepare("adapter", model, params, key, head="classifier")
    def loss_fn(params, batch, key): ... way.apply(params, batch["tokens"], batch["valid"]) ...
    step = lora_jax.make_train_step(loss_fn, tx)
    state = lora_jax.TrainState.create(way.wrapped, tx, key)
    out = lora_jax.lora(way.apply)(state.wrapped, tokens, valid)

What is trained is a `LoraWeight` or a `lora_jax.FullWeight`, so the library's train step, files, counts and
`merge` serve every way. Bottleneck adapters and prefixes are not in the models: Flax's `nn.intercept_methods`
puts them into the unchanged `bert.Bert` and `llama.Llama`, whether their layers are unrolled or scanned.
Their parameters stand in the tree beside what they work on: `layer_0/output/adapter/down/kernel`,
`layer_0/prefix`.

A function that runs the model in its own way, such as beam search with a cache, is run by `within`:

    fn = functools.partial(generate.beam, model, max_new=32, eos_id=2, num_beams=4)
    new = jax.jit(lora_jax.lora(way.within(fn)))(state.wrapped, prompts, valid)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

import lora_jax
from experiments.models import bert, llama

Model = bert.Bert | llama.Llama

WAYS = {
    "full": "every parameter",
    "top2": "the last two layers",
    "head": "the new head alone",
    "bitfit": "every bias (Ben Zaken et al., 2021)",
    "lora_qv": "LoRA on queries and values",
    "lora_all": "LoRA on every linear layer but the head",
    "adapter": "bottlenecks after attention and after the MLP (Houlsby et al., 2019)",
    "adapter_l": "one bottleneck behind every layer, with a norm of its own (Lin et al., 2020)",
    "prefix": "the inputs of every layer at new positions in front (the LoRA paper's PreLayer)",
    "lora_prefix": "LoRA on queries and values, and a prefix",
}
LORA_TARGETS = {"lora_qv": "query|value|q_proj|v_proj", "lora_all": None}
LORA_TARGETS["lora_prefix"] = LORA_TARGETS["lora_qv"]


class Prepared(NamedTuple):
    """A way to adapt a model."""

    apply: Callable[..., Any]
    """`apply(tree, *args, **kwargs)`: `model.apply({"params": tree}, *args, **kwargs)` with the additions."""
    wrapped: Any
    """The tree, for `TrainState.create` and `lora_jax.lora(apply)`."""
    within: Callable[[Callable[..., Any]], Callable[..., Any]]
    """`within(fn)` is fn, a function of the tree and more that runs the model, with the additions."""


def prepare(
    way: str,
    model: Model,
    params: Any,
    key: jax.Array,
    *,
    head: str | None = None,
    rank: Any = 8,
    alpha: Any = 16.0,
    targets: Any = None,
    bottleneck: int = 64,
    prefix: int = 8,
    dropout: Any = 0.0,
) -> Prepared:
    """Get a model ready to be adapted. A way that does not use a setting does not look at it.

    With d the model's width, L its layers, r the bottleneck and P the prefix, beside the head there train

        adapter     2 L (2 d r + r + d), up-projections of zero, so that it starts as the base
        adapter_l   L (2 d r + r + d) + 2 L d, likewise
        prefix      L P d, and starts as what the base computes of P tokens drawn at random

    Prefixes are positions before the first token: of Llama they take the first P positions, and `empty_cache`
    gives a cache that holds them already.

    Args:
        way: One of `WAYS`.
        model: A `bert.Bert` or a `llama.Llama`.
        params: Its parameters, which are neither changed nor copied; they may be abstract, under
            jax.eval_shape.
        key: The random key of the factors, adapters and prefixes.
        head: The pattern of the new head, which every way trains in full.
        rank: The rank, as for `lora_jax.wrap`; so are `alpha` and `dropout`, the branch's.
        alpha: The scale's numerator.
        targets: What LoRA adapts, in place of the way's own.
        bottleneck: The width of an adapter.
        prefix: The number of positions of a prefix.
        dropout: The rate on the input of the LoRA branch.

    Raises:
        ValueError: there is no such way, or nothing that it could train; the head's pattern matches nothing.
        TypeError: the model is of another kind.
    """
    if way not in WAYS:
        raise ValueError(f"there is no way {way!r} to adapt; write one of {', '.join(WAYS)}.")
    if not isinstance(model, Model):
        raise TypeError(f"the model is a {type(model).__name__}; a bert.Bert or a llama.Llama is served.")
    base = flatten_dict(params, sep="/")
    begin, intercept = _additions(way, model, bottleneck, prefix)
    leaves = dict(base)
    if begin is not None:
        leaves |= _made(model, begin, prefix, params, jax.random.fold_in(key, 1))

    in_full = _in_head(head, base) | (leaves.keys() - base.keys()) | _in_full(way, model, base)
    if not in_full and way not in LORA_TARGETS:
        raise ValueError(f"{way!r} trains nothing here: give head=, the pattern of the new head.")
    chosen = (lambda path, _: path in in_full) if in_full else None
    if way not in LORA_TARGETS:
        targets = ()
    wrapped = lora_jax.wrap(
        unflatten_dict(leaves, sep="/"),
        rank,
        alpha=alpha,
        targets=LORA_TARGETS[way] if targets is None else targets,
        exclude=chosen,
        train=chosen,
        key=key,
        dropout=dropout,
    )

    def within(fn: Callable[..., Any]) -> Callable[..., Any]:
        if intercept is None:
            return fn

        @functools.wraps(fn)
        def run(tree: Any, *args: Any, **kwargs: Any) -> Any:
            with nn.intercept_methods(intercept(tree)):
                return fn(tree, *args, **kwargs)

        return run

    def apply(tree: Any, *args: Any, **kwargs: Any) -> Any:
        return model.apply({"params": tree}, *args, **kwargs)

    return Prepared(within(apply), wrapped, within)


def _in_head(head: str | None, leaves: dict[str, Any]) -> set[str]:
    """The head's paths, by a regular expression over whole segments, as `lora_jax.wrap` reads it."""
    if head is None:
        return set()
    found = {path for path in leaves if re.search(rf"(?:^|(?<=/))(?:{head})(?=/|$)", path)}
    if not found:
        tops = ", ".join(sorted({path.split("/")[0] for path in leaves}))
        raise ValueError(f"head={head!r} matches no path; the model has {tops}.")
    return found


def _in_full(way: str, model: Model, leaves: dict[str, Any]) -> set[str]:
    """What a way trains of the model's own parameters, in full."""
    if way == "full":
        return set(leaves)
    if way == "bitfit":
        biases = {path for path in leaves if path.endswith("/bias")}
        if not biases:
            raise ValueError(f"'bitfit' trains biases, and this {type(model).__name__} has none.")
        return biases
    if way == "top2":
        last = model.config.num_layers - 1
        layers = {path for path in leaves if re.search(rf"\blayers?_({last - 1}|{last})/", path)}
        if not layers:
            raise ValueError("'top2' trains two of the layers, which are one stack here; write scan=False.")
        return layers
    return set()


# --- What is put into the models -----------------------------------------------------------------------


Interceptor = Callable[..., Any]


class Bottleneck(nn.Module):
    """x + up(relu(down(x))), of the norm of x if it is `normed`. It begins as x."""

    size: int
    dtype: Any
    normed: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kinds = {"dtype": self.dtype, "param_dtype": self.dtype}
        y = nn.LayerNorm(use_fast_variance=False, name="LayerNorm", **kinds)(x) if self.normed else x
        y = nn.relu(nn.Dense(self.size, name="down", **kinds)(y))
        return x + nn.Dense(x.shape[-1], kernel_init=nn.initializers.zeros, name="up", **kinds)(y)


def _additions(
    way: str, model: Model, bottleneck: int, prefix: int
) -> tuple[Interceptor | None, Callable[[Any], Interceptor] | None]:
    """The interceptor that makes a way's new parameters, and one that uses them, of the tree."""
    if way == "adapter":
        adapted = functools.partial(_behind_sublayers, bottleneck)
        return adapted, lambda tree: adapted
    if way == "adapter_l":
        adapted = functools.partial(_behind_layers, bottleneck)
        return adapted, lambda tree: adapted
    if way in ("prefix", "lora_prefix"):
        if isinstance(model, bert.Bert):
            return _begin_prefix, lambda tree: _in_front_of_layers
        return _begin_prefix, lambda tree: functools.partial(_in_front_of_tokens, prefix, tree)
    return None, None


def _made(model: Model, begin: Interceptor, length: int, params: Any, key: jax.Array) -> dict[str, Any]:
    """The parameters that `begin` adds to the model's, by path."""
    tokens_key, key = jax.random.split(key)
    tokens = jax.random.randint(tokens_key, (1, length), 0, model.config.vocab_size, jnp.int32)
    with nn.intercept_methods(begin):
        # What flows is the base's, since only what is missing is made.
        _, new = model.apply({"params": params}, tokens, rngs={"params": key}, mutable=["params"])
    base, new = flatten_dict(params, sep="/"), flatten_dict(new["params"], sep="/")
    return {path: x for path, x in new.items() if path not in base}


def _called(context: Any, kind: Any) -> bool:
    # A scan calls a method of its own on a subclass of the layer's.
    return isinstance(context.module, kind) and context.method_name == "__call__"


def _behind_sublayers(size: int, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    out, module = next_fun(*args, **kwargs), context.module
    if _called(context, nn.Dropout) and isinstance(module.parent, bert.Residual):
        residual = module.parent  # whose sum comes after its dropout
        return Bottleneck(size, residual.dtype, parent=residual, name="adapter")(out)
    if _called(context, llama.MLP):
        return Bottleneck(size, module.dtype, name="adapter")(out)
    if _called(context, llama.Attention):
        y, cache = out
        return Bottleneck(size, module.dtype, name="adapter")(y), cache
    return out


def _behind_layers(size: int, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    out, module = next_fun(*args, **kwargs), context.module
    if not _called(context, bert.Layer | llama.Layer):
        return out
    x, rest = out
    return Bottleneck(size, module.dtype, normed=True, name="adapter")(x), rest


def _begin_prefix(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    if _called(context, bert.Layer | llama.Layer):
        context.module.param("prefix", lambda key: args[0][0])
    return next_fun(*args, **kwargs)


def _prefix(layer: nn.Module, x: jax.Array) -> jax.Array:
    """A layer's prefix for every row of x."""
    prefix = layer.get_variable("params", "prefix").astype(x.dtype)
    return jnp.broadcast_to(prefix, (x.shape[0], *prefix.shape))


def _in_front_of_layers(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Bert: at every layer the prefix is put in front, and what becomes of it is taken off again."""
    if not _called(context, bert.Layer):
        return next_fun(*args, **kwargs)
    x, mask = args
    front = _prefix(context.module, x)
    mask = jnp.concatenate([jnp.ones(front.shape[:2], bool), mask], axis=1)
    x, rest = next_fun(jnp.concatenate([front, x], axis=1), mask)
    return x[:, front.shape[1] :], rest


def _in_front_of_tokens(length: int, tree: Any, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Llama: tokens in front, whose activations are replaced at every layer, so positions count them.

    They are added to a whole pass, and taken off behind it. When there is a cache they are in it from the
    start, and `decode` is as it was.
    """
    if not isinstance(context.module, llama.Llama):
        return next_fun(*args, **kwargs)

    def hidden(tokens: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        valid = jnp.ones(tokens.shape, bool) if valid is None else valid
        front = (tokens.shape[0], length)
        tokens = jnp.concatenate([jnp.zeros(front, tokens.dtype), tokens], axis=1)
        valid = jnp.concatenate([jnp.ones(front, valid.dtype), valid], axis=1)
        with nn.intercept_methods(_replaced):
            return next_fun(tokens, valid)[:, length:]

    def empty_cache(batch: int, slots: int) -> dict[str, Any]:
        cache = next_fun(batch, length + slots)
        front = jnp.zeros((batch, length), jnp.int32)
        with nn.intercept_methods(_replaced):
            return context.module.apply(
                {"params": tree}, front, jnp.ones(front.shape, bool), cache, method="decode"
            )[1]

    methods = {"hidden": hidden, "empty_cache": empty_cache}
    return methods.get(context.method_name, next_fun)(*args, **kwargs)


def _replaced(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    if not _called(context, llama.Layer):
        return next_fun(*args, **kwargs)
    x, *rest = args
    front = _prefix(context.module, x)
    return next_fun(jnp.concatenate([front, x[:, front.shape[1] :]], axis=1), *rest, **kwargs)
