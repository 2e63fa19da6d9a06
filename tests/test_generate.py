"""Generation gives the texts of transformers, changes nothing for padding, and runs under lora."""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from newest import newest, some

import lora_jax
from experiments.models import generate, llama

FIXTURES = Path(__file__).parent / "fixtures"
RECORDED = np.load(FIXTURES / "llama_texts.npz")
QWEN = FIXTURES / "qwen2_tiny"
STORIES = Path(os.environ.get("LORA_JAX_DATA", "")) / "stories260K"
needs_data = pytest.mark.skipif(
    "LORA_JAX_DATA" not in os.environ, reason="set LORA_JAX_DATA to a folder that holds stories260K/"
)
PROMPTS = [[0, 40, 50, 60, 13, 8], [0, 9], [0, 33, 44, 55]]


def pad(prompts, side="left", token=7):
    longest = max(map(len, prompts))
    tokens = np.full((len(prompts), longest), token, np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, mask, prompt in zip(tokens, valid, prompts, strict=True):
        span = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        row[span], mask[span] = prompt, True
    return jnp.asarray(tokens), jnp.asarray(valid)


@functools.cache
def model_of(folder, scan=False):
    return llama.load(folder, scan=scan)


@functools.cache
def compiled(fn, folder, **settings):
    return jax.jit(functools.partial(fn, model_of(folder)[0], **settings))


def text(fn, prompts, side="left", folder=QWEN, **settings):
    return np.asarray(compiled(fn, folder, **settings)(model_of(folder)[1], *pad(prompts, side)))


def assert_texts_are_recorded(name, folder, scan, num_beams, ngram):
    """Over all length penalties and ends at once; each is an argument of one compiled function."""
    recorded = {key: RECORDED[f"{name}/{key}"] for key in ("texts", "prompts", "ends", "penalties")}
    expected = recorded["texts"][num_beams - 1, (0, 2, 3).index(ngram)]
    model, params = model_of(folder, scan)
    tokens = jnp.asarray(recorded["prompts"], jnp.int32)
    fn = functools.partial(
        generate.beam, model, max_new=expected.shape[-1], num_beams=num_beams, no_repeat_ngram_size=ngram
    )

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0, None))
    @functools.partial(jax.vmap, in_axes=(None, None, 0))
    def all_texts(params, penalty, end):
        return fn(params, tokens, tokens >= 0, eos_id=end, length_penalty=penalty)

    ends = jnp.asarray(recorded["ends"], jnp.int32)
    found = np.asarray(all_texts(params, jnp.asarray(recorded["penalties"]), ends))
    np.testing.assert_array_equal(found, expected)


# Of the fifteen that are recorded; each has three penalties and two or three ends.
@pytest.mark.parametrize(("num_beams", "ngram"), some([(3, 2), (1, 0), (5, 3)]))
def test_texts_are_those_of_transformers(num_beams, ngram):
    assert_texts_are_recorded("qwen2_tiny", QWEN, num_beams % 2 == 0, num_beams, ngram)


@pytest.mark.parametrize(("max_new", "num_beams", "ngram"), some([(1, 4, 2), (5, 1, 3)]))
def test_short_texts_are_those_of_transformers(max_new, num_beams, ngram):
    assert_texts_are_recorded(f"qwen2_tiny_{max_new}", QWEN, False, num_beams, ngram)


@needs_data
def test_texts_of_stories260k_are_those_of_transformers():
    assert_texts_are_recorded("stories260K", STORIES, True, num_beams=5, ngram=3)


@newest
def test_any_of_several_ends_ends_a_text():
    expected = RECORDED["qwen2_tiny/several"][2]
    prompts = [[int(token) for token in row if token >= 0] for row in RECORDED["qwen2_tiny/prompts"]]
    ends = tuple(RECORDED["qwen2_tiny/ends"][:2].tolist())
    found = text(generate.beam, prompts, max_new=expected.shape[1], eos_id=ends, num_beams=3)
    np.testing.assert_array_equal(found, expected)
    assert ends[0] in found[:, :-1]


@newest
def test_padding_changes_no_text():
    settings = {"num_beams": 3, "no_repeat_ngram_size": 2, "max_new": 10, "eos_id": 1}
    alone = np.concatenate([text(generate.beam, [prompt], **settings) for prompt in PROMPTS[1:]])
    for side in ("left", "right"):
        np.testing.assert_array_equal(text(generate.beam, PROMPTS, side, **settings)[1:], alone)


def test_greedy_takes_the_most_probable_token():
    model, params = model_of(QWEN)
    apply = jax.jit(model.apply)
    found = text(generate.greedy, PROMPTS, max_new=10, eos_id=-1)
    for prompt, new in zip(PROMPTS, found, strict=True):
        sequence = jnp.zeros((1, 16), jnp.int32).at[0, : len(prompt) + 10].set(jnp.asarray([*prompt, *new]))
        best = apply({"params": params}, sequence)[0].argmax(-1)
        np.testing.assert_array_equal(new, best[len(prompt) - 1 :][:10])


def test_a_row_that_has_ended_stays_ended():
    free = text(generate.greedy, PROMPTS, max_new=10, eos_id=-1)
    end = int(free[0, 3])
    ended = text(generate.greedy, PROMPTS, max_new=10, eos_id=end)
    for before, after in zip(free, ended, strict=True):
        stop = [*before, end].index(end)
        np.testing.assert_array_equal(after[:stop], before[:stop])
        assert (after[stop:] == end).all()


@newest
def test_no_ngram_comes_twice():
    found = text(generate.greedy, PROMPTS, max_new=24, eos_id=-1, no_repeat_ngram_size=2)
    for prompt, new in zip(PROMPTS, found, strict=True):
        row = [*prompt, *new.tolist()]
        grams = list(zip(row, row[1:], strict=False))
        assert len(set(grams)) == len(grams)


@pytest.mark.parametrize(
    ("fn", "settings", "scan"),
    [(generate.greedy, {}, False), (generate.beam, {"num_beams": 3, "no_repeat_ngram_size": 2}, True)],
    ids=["greedy-unrolled", "beam-scanned"],
)
def test_a_wrapped_tree_gives_the_text_of_the_merged_one(fn, settings, scan):
    model, params = model_of(QWEN, scan)
    wrapped = lora_jax.wrap(params, rank=2, alpha=8, targets="all")
    trained, frozen = lora_jax.partition(wrapped)
    noise = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(trained))))
    trained = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(noise), x.shape, x.dtype), trained)
    wrapped = lora_jax.combine(trained, frozen)
    fn = functools.partial(fn, model, max_new=8, eos_id=1, **settings)
    merged = jax.jit(fn)(lora_jax.merge(wrapped), *pad(PROMPTS))
    unmerged = jax.jit(lora_jax.lora(fn))(wrapped, *pad(PROMPTS))
    np.testing.assert_array_equal(unmerged, merged)
    assert (np.asarray(merged) != np.asarray(jax.jit(fn)(params, *pad(PROMPTS)))).any()


@newest
def test_what_is_cut_off_is_what_transformers_cuts_off():
    scores = jnp.asarray(RECORDED["cut_off/scores"])
    names = [name for name in RECORDED.files if name.startswith("cut_off/") and name.count("/") == 2]
    assert len(names) == 4
    for name in names:
        top_k, top_p = (None if part == "None" else float(part) for part in name.split("/")[1:])
        found = generate.cut_off(scores / 0.7, top_k if top_k is None else int(top_k), top_p)
        np.testing.assert_allclose(found, RECORDED[name], rtol=1e-6)


@newest
def test_samples_follow_the_distribution():
    model, params = model_of(QWEN)
    tokens, valid = pad(PROMPTS[:1])
    count = 4000
    fn = functools.partial(generate.sample, model, max_new=1, eos_id=1, temperature=1.5, top_k=8)
    rows = (jnp.repeat(x, count, axis=0) for x in (tokens, valid))
    drawn = np.asarray(jax.jit(fn)(params, *rows, jax.random.key(0)))[:, 0]
    logits = generate.cut_off(model.apply({"params": params}, tokens)[:, -1] / 1.5, 8, None)
    expected = np.asarray(jax.nn.softmax(logits))[0] * count
    observed = np.bincount(drawn, minlength=64)
    assert observed[expected == 0].sum() == 0
    likely = expected > 0
    # Chi squared with 7 degrees of freedom; one key in 1000 would exceed it.
    assert ((observed - expected)[likely] ** 2 / expected[likely]).sum() < 24.3


@newest
def test_one_key_gives_one_text_and_one_token_is_no_choice():
    fn = compiled(generate.sample, QWEN, max_new=10, eos_id=1)
    _, params = model_of(QWEN)
    first, same, other = (np.asarray(fn(params, *pad(PROMPTS), jax.random.key(i))) for i in (3, 3, 4))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()
    fn = compiled(generate.sample, QWEN, max_new=10, eos_id=1, top_k=1)
    only = np.asarray(fn(params, *pad(PROMPTS), jax.random.key(3)))
    np.testing.assert_array_equal(only, text(generate.greedy, PROMPTS, max_new=10, eos_id=1))


@pytest.mark.parametrize(
    ("fn", "settings", "message"),
    [
        (generate.greedy, {"max_new": 0}, "max_new is 0"),
        (generate.greedy, {"max_new": 251}, "257 tokens, .* exceed the model's 256 positions"),
        (generate.greedy, {"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        (generate.beam, {"num_beams": 0}, "num_beams is 0"),
        (generate.beam, {"num_beams": 2, "max_new": 251}, "exceed the model's 256 positions"),
        (generate.sample, {"temperature": 0.0}, "temperature is 0.0; .* or call greedy"),
        (generate.sample, {"top_k": 0}, "top_k is 0"),
        (generate.sample, {"top_p": 0.0}, "top_p is 0.0"),
    ],
)
def test_a_number_out_of_range_is_refused(fn, settings, message):
    model, params = model_of(QWEN)
    arguments = [*pad(PROMPTS), *([jax.random.key(0)] if fn is generate.sample else [])]
    with pytest.raises(ValueError, match=message):
        fn(model, params, *arguments, **({"max_new": 4, "eos_id": 1} | settings))


@pytest.mark.parametrize("eos", [None, 2.0, [], "</s>", True])
@pytest.mark.parametrize("fn", [generate.greedy, generate.beam])
def test_an_end_that_is_no_token_is_refused(fn, eos):
    model, params = model_of(QWEN)
    settings = {"num_beams": 2} if fn is generate.beam else {}
    with pytest.raises(TypeError, match="eos_id is .* write the token that ends a text, or several; -1"):
        fn(model, params, *pad(PROMPTS), max_new=4, eos_id=eos, **settings)


def test_minus_one_ends_no_text():
    ended = text(generate.beam, PROMPTS, max_new=8, eos_id=-1, num_beams=2)
    vocab = model_of(QWEN)[0].config.vocab_size
    never = text(generate.beam, PROMPTS, max_new=8, eos_id=vocab, num_beams=2)  # a token that is never chosen
    np.testing.assert_array_equal(ended, never)
    assert ended.shape == (len(PROMPTS), 8) and np.all((ended >= 0) & (ended < vocab))


def test_prompts_and_their_padding_have_one_shape():
    model, params = model_of(QWEN)
    with pytest.raises(ValueError, match=r"shape \(3, 6\) and valid \(6,\)"):
        generate.greedy(model, params, pad(PROMPTS)[0], jnp.ones(6, bool), max_new=4, eos_id=1)


@pytest.fixture(params=some([generate.greedy, generate.beam, generate.sample]), ids=lambda fn: fn.__name__)
def short(request):
    """A way to write four tokens, of prompts and valid."""
    how = {"max_new": 4, "eos_id": 1} | ({"num_beams": 2} if request.param is generate.beam else {})
    more = [jax.random.key(0)] if request.param is generate.sample else []
    model, params = model_of(QWEN)
    return lambda prompts, valid: request.param(model, params, prompts, valid, *more, **how)


@pytest.mark.parametrize("token", [-1, model_of(QWEN)[0].config.vocab_size, 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_refused(short, token):
    prompts, valid = pad(PROMPTS)
    most = model_of(QWEN)[0].config.vocab_size - 1
    with pytest.raises(ValueError, match=rf"prompts\[2, 5\] is {token}; .* tokens 0 to {most}\."):
        short(prompts.at[2, 5].set(token), valid)


@newest
@pytest.mark.parametrize("short", [generate.greedy], indirect=True, ids=["greedy"])
def test_the_last_token_of_the_vocabulary_is_taken_and_tracing_changes_nothing(short):
    prompts, valid = pad(PROMPTS)
    last = model_of(QWEN)[0].config.vocab_size - 1
    prompts = prompts.at[2, 5].set(last).at[2, 4].set(0)
    np.testing.assert_array_equal(jax.jit(short)(prompts, valid), short(prompts, valid))


@newest
def test_what_padding_holds_does_not_count(short):
    prompts, valid = pad(PROMPTS)
    fn = jax.jit(short)
    expected = fn(prompts, valid)
    for token in (-1, 10**9):
        np.testing.assert_array_equal(fn(jnp.where(valid, prompts, token), valid), expected)


def test_a_row_without_a_valid_token_is_refused(short):
    prompts, valid = pad(PROMPTS)
    with pytest.raises(ValueError, match=r"no token of the rows \[1\] of prompts is valid"):
        short(prompts, valid.at[1].set(False))


@newest
@pytest.mark.parametrize("short", [generate.beam], indirect=True, ids=["beam"])
def test_valid_may_be_a_mask_of_integers_and_nothing_else(short):
    prompts, valid = pad(PROMPTS)
    fn = jax.jit(short)
    np.testing.assert_array_equal(fn(prompts, valid.astype(jnp.int32)), fn(prompts, valid))
    for wrong in (np.zeros((3, 6), np.int64), jnp.zeros((3, 6), jnp.int32)):
        with pytest.raises(ValueError, match=r"no token of the rows \[0, 1, 2\]"):
            short(prompts, wrong)
    with pytest.raises(TypeError, match="valid is float32; write booleans"):
        short(prompts, valid.astype(jnp.float32))
    with pytest.raises(TypeError, match="prompts are float32; write integers"):
        short(prompts.astype(jnp.float32), valid)


def test_prompts_with_values_are_checked_where_parameters_are_traced():
    model, params = model_of(QWEN)
    prompts, valid = pad(PROMPTS)
    how = {"prompts": prompts.at[0, 0].set(10**6), "valid": valid, "max_new": 2, "eos_id": 1}
    fn = jax.jit(lora_jax.lora(functools.partial(generate.greedy, model, **how)))
    with pytest.raises(ValueError, match=r"prompts\[0, 0\] is 1000000; the vocabulary has the tokens"):
        fn(lora_jax.wrap(params, rank=2, targets=".*q_proj"))


@needs_data
def test_stories260k_tells_its_story():
    model, params = model_of(STORIES)
    assert model.config.eos_id == 2
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(STORIES / "tokenizer.json"))
    prompt = tokenizer.encode("Once upon a time, there was a little girl").ids
    new = text(generate.greedy, [prompt], folder=STORIES, max_new=40, eos_id=2)
    assert tokenizer.decode([*prompt, *new[0].tolist()]).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball."
    )
