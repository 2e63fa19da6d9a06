"""Text from any causal model with a key-value cache: greedy, sampled, or by beam search.

A model has `empty_cache(batch, slots)` and the method `decode(tokens, valid, cache)`, which appends
tokens (batch, length) to a cache and gives the logits (batch, vocab) that follow each row, with the new
cache. Prompts are int32 (batch, length) with `valid` (batch, length) False on padding, on either side.
All functions are pure, to be jitted as a whole with the parameters as an argument, so that
`lora_jax.lora` applies to them as to any function of parameters:

    fn = functools.partial(beam, model, max_new=32, eos_id=2, num_beams=4)
    new = jax.jit(lora_jax.lora(fn))(wrapped, prompts, valid)

A prompt has a valid token in every row, and those are of the vocabulary; what padding holds does not count.
That is checked of arrays with values. What is traced has none, such as the arguments of a function under jit
or lora_jax.lora, so check before such a call: a token outside the vocabulary or a row without a valid one
then gives a text without meaning.

They return int32 (batch, max_new); `eos_id` is one token or several that end a text, -1 for none, and a
text that has ended is filled up with the first. What `greedy` and `beam` give are the tokens of transformers'
`generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FAR = -1e9
"""What transformers adds to a score to rule a beam out; equal results need an equal number."""


def greedy(
    model: nn.Module,
    params: Any,
    prompts: jax.Array,
    valid: jax.Array,
    *,
    max_new: int,
    eos_id: int | Sequence[int] | jax.Array,
    no_repeat_ngram_size: int = 0,
) -> jax.Array:
    """The most probable next token, `max_new` times or until every row has ended.

    With `no_repeat_ngram_size` n > 0 no n tokens come twice in one order, the prompt's included; padding
    does not count.

    Raises:
        TypeError: the prompts, `valid` or `eos_id` are of another kind.
        ValueError: `max_new` or `no_repeat_ngram_size` is no such number, the shapes differ, or of arrays
            with values, a token is outside the vocabulary or a row has no valid one.
    """
    return _one_by_one(
        model, params, prompts, valid, max_new, eos_id, no_repeat_ngram_size, lambda scores, step: scores
    )


def sample(
    model: nn.Module,
    params: Any,
    prompts: jax.Array,
    valid: jax.Array,
    key: jax.Array,
    *,
    max_new: int,
    eos_id: int | Sequence[int] | jax.Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    no_repeat_ngram_size: int = 0,
) -> jax.Array:
    """Draw every next token from softmax(logits / temperature), cut off as transformers does.

    `top_k` keeps the k most probable tokens, then `top_p` of them the fewest that have at least that
    probability together. The same key gives the same text.

    Raises:
        ValueError: `temperature`, `top_k` or `top_p` is out of range; what `greedy` refuses.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; write a number above 0, or call greedy.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; write 1 or more, or None for all tokens.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; write a probability in (0, 1].")

    def drawn(scores: jax.Array, step: jax.Array) -> jax.Array:
        scores = cut_off(scores / temperature, top_k, top_p)
        # The largest of logits with Gumbel noise is a draw from their softmax.
        return scores + jax.random.gumbel(jax.random.fold_in(key, step), scores.shape, scores.dtype)

    return _one_by_one(model, params, prompts, valid, max_new, eos_id, no_repeat_ngram_size, drawn)


def cut_off(scores: jax.Array, top_k: int | None, top_p: float | None) -> jax.Array:
    """Scores (batch, vocab) with -inf on what `top_k` and then `top_p` leave out."""
    if top_k is not None:
        least = lax.top_k(scores, min(top_k, scores.shape[-1]))[0][:, -1:]
        scores = jnp.where(scores < least, -jnp.inf, scores)
    if top_p is not None:
        order = jnp.argsort(scores, axis=-1)
        rising = jnp.take_along_axis(scores, order, axis=-1)
        out = jnp.cumsum(jax.nn.softmax(rising), axis=-1) <= 1 - top_p
        out = out.at[:, -1].set(False)
        scores = jnp.where(jnp.take_along_axis(out, jnp.argsort(order, axis=-1), axis=-1), -jnp.inf, scores)
    return scores


def _one_by_one(
    model: nn.Module,
    params: Any,
    prompts: jax.Array,
    valid: jax.Array,
    max_new: int,
    eos_id: Any,
    ngram: int,
    scored: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """The largest entry of scored(logits, step), one token after the other."""
    prompts, valid, eos = _checked(model, params, prompts, valid, eos_id, max_new, ngram)
    batch, length = prompts.shape

    def choose(step, logits, texts, ended):
        scores = logits.astype(jnp.float32)
        scores = _without_repeats(scores, prompts, valid, texts, step, ngram)
        token = jnp.argmax(scored(scores, step), axis=-1).astype(jnp.int32)
        token = jnp.where(ended, eos[0], token)
        texts = lax.dynamic_update_slice_in_dim(texts, token[:, None], step, axis=1)
        return step + jnp.int32(1), token, texts, ended | jnp.isin(token, eos)

    def unfinished(carry):
        (step, _, _, ended), _ = carry
        return (step < max_new) & ~jnp.all(ended)

    def body(carry):
        (step, token, texts, ended), cache = carry
        logits, cache = _decode(model, params, token[:, None], None, cache)
        return choose(step, logits, texts, ended), cache

    cache = model.empty_cache(batch, length + max_new)
    logits, cache = _decode(model, params, prompts, valid, cache)
    texts = jnp.full((batch, max_new), eos[0], jnp.int32)
    first = choose(jnp.int32(0), logits, texts, jnp.zeros((batch,), bool))
    return lax.while_loop(unfinished, body, (first, cache))[0][2]


class _Beams(NamedTuple):
    """Beam search after some steps: n beams that go on and the n best texts that have ended, per row."""

    step: jax.Array  # how many tokens have been chosen
    texts: jax.Array  # (batch, n, max_new)
    scores: jax.Array  # (batch, n), the sum of the log-probabilities
    parents: jax.Array  # (batch, n), which of the beams before this one goes on from
    ended_texts: jax.Array  # (batch, n, max_new), the best first
    ended_scores: jax.Array  # (batch, n), divided by length ** length_penalty
    ended: jax.Array  # (batch, n), whether there is such a text yet
    hopeful: jax.Array  # (batch, 1), whether a better text may still come
    stopped: jax.Array  # (), whether no beam can go on


def beam(
    model: nn.Module,
    params: Any,
    prompts: jax.Array,
    valid: jax.Array,
    *,
    max_new: int,
    eos_id: int | Sequence[int] | jax.Array,
    num_beams: int,
    length_penalty: float | jax.Array = 1.0,
    no_repeat_ngram_size: int = 0,
) -> jax.Array:
    """The text of the largest sum of log-probabilities / (new tokens ** length_penalty) that is found.

    `num_beams` texts are followed at once. A row stops when its best running text, scored at its present
    length, is no better than the worst of `num_beams` that have ended: `early_stopping=False`, the default
    of transformers. With one beam it is `greedy`. For `no_repeat_ngram_size` see there.

    Raises:
        ValueError: `num_beams` is no such number; what `greedy` refuses.
    """
    if num_beams < 1:
        raise ValueError(f"num_beams is {num_beams}; write 1 or more.")
    if num_beams == 1:
        return greedy(
            model,
            params,
            prompts,
            valid,
            max_new=max_new,
            eos_id=eos_id,
            no_repeat_ngram_size=no_repeat_ngram_size,
        )
    prompts, valid, eos = _checked(model, params, prompts, valid, eos_id, max_new, no_repeat_ngram_size)
    (batch, length), n = prompts.shape, num_beams
    slots = length + max_new
    # A text of one beam may end in every one of these tokens; n that go on must be left.
    kept = n * (1 + eos.shape[0])
    divisor = jnp.arange(1, max_new + 1, dtype=jnp.float32) ** length_penalty
    rows_prompts, rows_valid = (jnp.repeat(x, n, axis=0) for x in (prompts, valid))

    def choose(beams: _Beams, logits: jax.Array) -> _Beams:
        step = beams.step
        gains = jax.nn.log_softmax(logits.astype(jnp.float32))
        texts = beams.texts.reshape(batch * n, max_new)
        gains = _without_repeats(gains, rows_prompts, rows_valid, texts, step, no_repeat_ngram_size)
        vocab = gains.shape[-1]
        totals = gains.reshape(batch, n, vocab) + beams.scores[:, :, None]
        top, place = lax.top_k(totals.reshape(batch, n * vocab), kept)
        parents, token = place // vocab, place % vocab
        texts = _pick(beams.texts, parents)
        texts = lax.dynamic_update_slice_in_dim(texts, token[:, :, None], step, axis=2)
        ends = jnp.isin(token, eos) | (step + jnp.int32(1) == max_new)

        scores, running = lax.top_k(top + jnp.where(ends, FAR, 0.0), n)

        # Candidates beyond the first n are there to go on, not to end.
        newly = ends & (jnp.arange(kept) < n)
        final = top / divisor[step]
        final += jnp.where(beams.hopeful, 0.0, FAR) + jnp.where(newly, 0.0, FAR)
        ended_scores, best = lax.top_k(jnp.concatenate([beams.ended_scores, final], axis=1), n)
        ended = _pick(jnp.concatenate([beams.ended, newly], axis=1), best)

        possible = scores[:, :1] / divisor[step]
        worst = jnp.where(ended, jnp.min(ended_scores, axis=1, keepdims=True), FAR)
        return _Beams(
            step=step + jnp.int32(1),
            texts=_pick(texts, running),
            scores=scores,
            parents=_pick(parents, running),
            ended_texts=_pick(jnp.concatenate([beams.ended_texts, texts], axis=1), best),
            ended_scores=ended_scores,
            ended=ended,
            hopeful=beams.hopeful & jnp.any(possible > worst, axis=1, keepdims=True),
            stopped=jnp.all(ends),
        )

    def unfinished(carry):
        beams, _ = carry
        return jnp.any(beams.hopeful) & ~beams.stopped

    def body(carry):
        beams, cache = carry
        rows = (beams.parents + n * jnp.arange(batch, dtype=jnp.int32)[:, None]).reshape(-1)
        cache = jax.tree.map(lambda x, axis: x if axis < 0 else jnp.take(x, rows, axis), cache, row_axes)
        last = lax.dynamic_slice_in_dim(beams.texts, beams.step - jnp.int32(1), 1, axis=2)
        logits, cache = _decode(model, params, last.reshape(batch * n, 1), None, cache)
        return choose(beams, logits), cache

    row_axes = _row_axes(model, slots)
    logits, cache = _decode(model, params, prompts, valid, model.empty_cache(batch, slots))
    cache = jax.tree.map(lambda x, axis: x if axis < 0 else jnp.repeat(x, n, axis), cache, row_axes)
    texts = jnp.full((batch, n, max_new), eos[0], jnp.int32)
    start = _Beams(
        step=jnp.int32(0),
        texts=texts,
        # All beams are the prompt yet, so only the first may go on.
        scores=jnp.where(jnp.arange(n) == 0, 0.0, jnp.full((batch, n), FAR, jnp.float32)),
        parents=jnp.zeros((batch, n), jnp.int32),
        ended_texts=texts,
        ended_scores=jnp.full((batch, n), FAR, jnp.float32),
        ended=jnp.zeros((batch, n), bool),
        hopeful=jnp.ones((batch, 1), bool),
        stopped=jnp.array(False),
    )
    first = choose(start, jnp.repeat(logits, n, axis=0))
    return lax.while_loop(unfinished, body, (first, cache))[0].ended_texts[:, 0]


def _checked(model, params, prompts, valid, eos_id, max_new, ngram):
    if max_new < 1:
        raise ValueError(f"max_new is {max_new}; write 1 or more.")
    if ngram < 0:
        raise ValueError(f"no_repeat_ngram_size is {ngram}; write 0 to allow repetition, or 1 or more.")
    if prompts.shape != valid.shape or prompts.ndim != 2:
        raise ValueError(
            f"prompts have shape {prompts.shape} and valid {valid.shape}; write (batch, length) for both."
        )
    if not jnp.issubdtype(prompts.dtype, jnp.integer):
        raise TypeError(f"prompts are {prompts.dtype}; write integers, the tokens.")
    if valid.dtype != bool and not jnp.issubdtype(valid.dtype, jnp.integer):
        raise TypeError(f"valid is {valid.dtype}; write booleans, False on padding.")
    if _has_values(valid):
        real = np.asarray(valid).astype(bool)
        if empty := np.flatnonzero(~real.any(axis=1)).tolist():
            raise ValueError(f"no token of the rows {empty[:8]} of prompts is valid; write at least one.")
        if _has_values(prompts):
            vocab = _vocab_size(model, params)
            tokens = np.asarray(prompts)
            for row, slot in np.argwhere(real & ((tokens < 0) | (tokens >= vocab)))[:1].tolist():
                raise ValueError(
                    f"prompts[{row}, {slot}] is {tokens[row, slot]}; the vocabulary has the tokens 0 to "
                    f"{vocab - 1}."
                )
    ends = eos_id if isinstance(eos_id, jax.Array) else np.asarray(eos_id)
    if not jnp.issubdtype(ends.dtype, jnp.integer) or not ends.size:
        raise TypeError(
            f"eos_id is {eos_id!r}; write the token that ends a text, or several; -1 where none does."
        )
    valid = jnp.asarray(valid).astype(bool)
    # No weight of zero makes up for a value that is not a number, which an embedding may give outside.
    prompts = jnp.where(valid, jnp.asarray(prompts).astype(jnp.int32), jnp.int32(0))
    # Padding to the left, so that a prompt and what follows it are one sequence.
    order = jnp.argsort(valid, axis=1, stable=True)
    prompts, valid = (jnp.take_along_axis(x, order, axis=1) for x in (prompts, valid))
    return prompts, valid, jnp.asarray(eos_id, jnp.int32).reshape(-1)


def _has_values(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def _vocab_size(model: nn.Module, params: Any) -> int:
    def logits(params):
        return _decode(model, params, jnp.zeros((1, 1), jnp.int32), None, model.empty_cache(1, 1))[0]

    return jax.eval_shape(logits, params).shape[-1]


def _decode(model, params, tokens, valid, cache):
    valid = jnp.ones(tokens.shape, bool) if valid is None else valid
    return model.apply({"params": params}, tokens, valid, cache, method="decode")


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
    """Of x (batch, n, ...) the entries index (batch, m) along its second axis."""
    return jax.vmap(lambda row, places: row[places])(x, index)


def _row_axes(model: nn.Module, slots: int) -> Any:
    """Which axis of each array of a cache counts the rows: the one that grows with them; -1 for none."""
    one, two = (jax.eval_shape(lambda n=n: model.empty_cache(n, slots)) for n in (1, 2))

    def axis(x, y):
        return next((i for i, (a, b) in enumerate(zip(x.shape, y.shape, strict=True)) if a != b), -1)

    return jax.tree.map(axis, one, two)


def _without_repeats(scores, prompts, valid, texts, step, n):
    """Scores with -inf on the tokens that would repeat n tokens of a row's prompt and text so far."""
    history = jnp.concatenate([prompts, texts], axis=1)
    windows = history.shape[1] - n + 1
    if n == 0 or windows < 1:
        return scores
    length = prompts.shape[1] + step
    known = jnp.concatenate([valid, jnp.ones(texts.shape, bool)], axis=1)
    last = lax.dynamic_slice_in_dim(history, length - jnp.int32(n - 1), n - 1, axis=1)
    repeats = known[:, :windows] & (jnp.arange(windows, dtype=jnp.int32) + jnp.int32(n) <= length)
    for i in range(n - 1):
        repeats &= history[:, i : i + windows] == last[:, i : i + 1]
    vocab = scores.shape[1]
    banned = jnp.where(repeats, history[:, n - 1 :], vocab)
    rows = np.arange(scores.shape[0])[:, None]
    return scores.at[rows, banned].set(-jnp.inf, mode="drop")
