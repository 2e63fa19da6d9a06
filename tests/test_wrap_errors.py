"""Every refusal of the tree functions names the path and shows what to write instead."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.params import (
    adapter,
    attach,
    combine,
    labels,
    merge,
    partition,
    swap,
    wrap,
)
from lora_jax.report import summary
from lora_jax.weight import LoraWeight

PARAMS = {
    "attn": {
        "query": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)},
        "query_norm": {"scale": jnp.ones(8)},
    },
    "codes": {"kernel": jnp.ones((8, 4), jnp.int8)},
    "lm_head": {"kernel": jnp.ones((4, 11))},
    "mlp": {"kernel": jnp.ones((4, 8))},
    "step": jnp.array(0),
    "table": jnp.ones((5, 6)),
}
FINE: dict[str, Any] = {"exclude": "codes"}


def refused(error, *texts, params: Any = None, rank: Any = 2, **options: Any):
    with pytest.raises(error) as caught:
        wrap(PARAMS if params is None else params, rank, **options)
    for text in texts:
        assert text in str(caught.value)
    return str(caught.value)


def test_the_tree_of_these_tests_can_be_wrapped():
    assert isinstance(wrap(PARAMS, 2, **FINE)["attn"]["query"]["kernel"], LoraWeight)


@pytest.mark.parametrize("name", ["targets", "exclude", "train"])
def test_a_pattern_that_matches_nothing_lists_the_nearest_paths(name):
    options = FINE | {name: "qeury"}
    refused(
        ValueError,
        f"{name}='qeury'",
        "matches no path",
        "nearest paths are",
        "'attn/query/kernel'",
        **options,
    )


def test_a_pattern_matches_whole_segments_only():
    refused(ValueError, "matches no path", targets="quer")
    refused(ValueError, "matches no path", targets="head", **FINE)


@pytest.mark.parametrize("name", ["rank", "alpha", "dropout", "init"])
def test_an_option_that_leaves_a_target_out_or_matches_none(name):
    value = {"rank": 3, "alpha": 1.0, "dropout": 0.0, "init": "default"}[name]
    text = f"{name}={{..., '.*': {value!r}}}"
    refused(ValueError, "'mlp/kernel'", text, "exclude='mlp/kernel'", **FINE, **{name: {"attn": value}})
    both = {"atn": value, ".*": value}
    refused(
        ValueError,
        f"{name}={{'atn': ...}}",
        "matches no target",
        "'attn/query/kernel'",
        **FINE,
        **{name: both},
    )


def test_axes_that_match_nothing_or_do_not_fit():
    refused(ValueError, "'tabel'", "'table'", axes={"tabel": ("in", "out")}, **FINE)
    refused(
        ValueError, "'table'", "(5, 6)", "for each of its 2 axes", axes={"table": ("in", "in", "out")}, **FINE
    )
    refused(ValueError, "'table'", "at least one 'in'", axes={"table": ("out", "out")}, **FINE)
    refused(ValueError, "'attn/query/bias'", "two axes", axes={"query/bias": ("in", "out")}, **FINE)
    refused(TypeError, "'table'", "('in', 'out')", axes={"table": "in"}, **FINE)
    refused(TypeError, "{pattern: kinds}", axes=("in", "out"), **FINE)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, None, "4"])
def test_rank_below_one_or_no_integer(rank):
    refused(ValueError, "'attn/query/kernel'", f"{rank!r}", "at least 1", "exclude=", rank=rank, **FINE)
    refused(ValueError, "'mlp/kernel'", rank={"mlp": rank, ".*": 2}, **FINE)
    refused(ValueError, "'mlp/kernel'", rank=lambda path, leaf: rank if "mlp" in path else 2, **FINE)


def test_other_values_out_of_range():
    for alpha in (0, -1.0, float("inf"), float("nan"), "8"):
        refused(ValueError, "alpha of 'attn/query/kernel'", "positive", alpha=alpha, **FINE)
    for dropout in (-0.1, 1.0, float("nan"), "no"):
        refused(ValueError, "dropout of 'attn/query/kernel'", "[0, 1)", dropout=dropout, **FINE)
    refused(ValueError, "init of 'attn/query/kernel'", "'normal'", "'gaussian'", init="normal", **FINE)
    refused(TypeError, "init of 'attn/query/kernel'", "(key, w, target)", init=3, **FINE)
    for dtype in (jnp.int32, "bf16", None, 3.5):
        refused(ValueError, "floating dtype", dtype=dtype, **FINE)


def test_a_custom_initializer_of_wrong_shapes():
    refused(ValueError, "init of 'attn/query/kernel'", "(8, 2)", init=lambda k, w, t: (w, w, w), **FINE)
    refused(ValueError, "must return (w, a, b)", init=lambda k, w, t: w, **FINE)


def test_leaves_that_cannot_be_adapted():
    refused(ValueError, "'codes/kernel'", "int8", "exclude='codes/kernel'")
    refused(ValueError, "'codes/kernel'", "int8", targets="codes")
    refused(ValueError, "'step'", "int", "exclude='step'", targets="step")
    refused(ValueError, "'attn/query/bias'", "two axes", "train='attn/query/bias'", targets="query/bias")
    refused(ValueError, "'attn/query_norm/scale'", "train=", targets="query_norm")
    keys = {"mlp": {"kernel": jnp.ones((4, 8))}, "rng": jax.random.split(jax.random.key(0), (2, 2))}
    refused(ValueError, "'rng'", "key<", targets="rng", params=keys)
    named = {"mlp": {"kernel": jnp.ones((4, 8))}, "name": "x"}
    refused(ValueError, "'name'", "a str", targets="name", params=named)
    refused(ValueError, "'step'", "only floating", train="step", **FINE)


def test_axes_that_cannot_be_known_show_the_line_to_write():
    text = refused(ValueError, "the axes of 'table'", "(5, 6)", targets="table")
    line = re.search(r"axes=(\{'table': \('in', 'out'\)\})", text)
    assert line and wrap(PARAMS, 2, targets="table", axes=eval(line[1]))["table"].axes == ("in", "out")
    refused(ValueError, "the axes of 'table'", targets=lambda path, leaf: path == "table")


def test_no_kernel_recognised():
    refused(
        ValueError,
        "no linear kernel",
        "targets=",
        "axes=",
        "table (5, 6)",
        params={"table": jnp.ones((5, 6))},
    )
    refused(ValueError, "no linear kernel", "none", params={})
    refused(ValueError, "'lm_head/kernel'", "targets='all'", params={"lm_head": PARAMS["lm_head"]})
    refused(ValueError, "only what exclude takes out", targets="mlp", exclude="mlp")
    refused(ValueError, "targets is empty", "give train=", targets=[])


def test_a_wrapped_tree_is_not_wrapped_again():
    wrapped = wrap(PARAMS, 2, train="lm_head", **FINE)
    refused(ValueError, "wrapped already", "'attn/query/kernel'", "merge(wrapped)", params=wrapped)


def test_a_path_is_adapted_or_trained_in_full():
    refused(ValueError, "'mlp/kernel'", "both", "exclude='mlp/kernel'", train="mlp", **FINE)
    wrap(PARAMS, 2, train="mlp", exclude=["codes", "mlp/kernel"])


def test_two_leaves_of_one_path():
    same = {"a": {"kernel": jnp.ones((4, 4))}, "a/kernel": jnp.ones((4, 4))}
    refused(ValueError, "two leaves have the path 'a/kernel'", params=same)


def test_patterns_of_the_wrong_kind():
    refused(TypeError, "targets=3", targets=3)
    refused(TypeError, "exclude contains 3", exclude=["mlp", 3])
    refused(ValueError, "not a regular expression", targets="(")
    refused(ValueError, "selects none", targets=lambda path, leaf: False)


def test_abstract_leaves_ask_for_eval_shape():
    abstract = jax.eval_shape(lambda: {"kernel": jnp.ones((4, 4))})
    refused(TypeError, "'kernel'", "jax.eval_shape(lambda p: lora_jax.wrap(p", params=abstract)
    refused(
        TypeError,
        "'bias'",
        "jax.eval_shape",
        params={"bias": abstract["kernel"]} | PARAMS,
        train="bias$|^bias",
        **FINE,
    )


def test_modules_inside_other_containers():
    module = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    for call in (lambda x: wrap(x, 2), merge, partition, summary):
        with pytest.raises(TypeError, match="nnx.Linear stands inside another container, at 'net'"):
            call({"net": module})


def test_functions_of_wrapped_trees_refuse_plain_ones():
    for call in (merge, partition, summary, adapter, labels, lambda x: swap(x, x)):
        with pytest.raises(ValueError, match=r"without any LoraWeight.*lora_jax\.wrap"):
            call(PARAMS)
    with pytest.raises(ValueError, match="without any LoraWeight"):
        attach(PARAMS, PARAMS)


def test_combine_names_the_paths_that_differ():
    trainable, frozen = partition(wrap(PARAMS, 2, **FINE))
    less = {name: value for name, value in frozen.items() if name != "mlp"}
    with pytest.raises(ValueError, match="only in the first: mlp/kernel"):
        combine(trainable, less)
    with pytest.raises(ValueError, match=r"do not fit at 'attn/query/bias'.*combine\(trainable, frozen\)"):
        combine(frozen, trainable)
    other = wrap(PARAMS, 2, targets="mlp")
    with pytest.raises(ValueError, match="attn/query/kernel"):
        combine(trainable, partition(other)[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6], ids=str)
def test_merge_refuses_what_is_not_finite(bad):
    params = {"fine": {"kernel": jnp.ones((4, 3))}, "up": {"kernel": jnp.ones((4, 3), jnp.float16)}}
    wrapped = wrap(params, 2)
    wrapped["up"]["kernel"] = wrapped["up"]["kernel"].replace(
        b=jnp.full((2, 3), bad, jnp.float32), a=jnp.ones((4, 2))
    )
    with pytest.raises(ValueError, match="infinite or undefined entries.*'up/kernel'") as error:
        merge(wrapped)
    assert "fine/kernel" not in str(error.value)
    if bad == 1e6:
        assert jnp.isfinite(merge(wrapped, dtype=jnp.float32)["up"]["kernel"]).all()
    assert not jnp.isfinite(jax.jit(merge)(wrapped)["up"]["kernel"]).any()


def test_merge_refuses_overflow_of_other_leaves_and_keeps_the_bases_own():
    params = {"up": {"kernel": jnp.ones((4, 3)), "bias": jnp.array([1.0, 1e9, 1.0])}}
    with pytest.raises(ValueError, match="'up/bias'"):
        merge(wrap(params, 2), dtype=jnp.float16)
    params = {"up": {"kernel": jnp.ones((4, 3)).at[1, 1].set(jnp.inf)}}
    assert jnp.isinf(merge(wrap(params, 2))["up"]["kernel"]).sum() == 1


def test_64_bit_dtypes_that_jax_would_round_are_refused():
    params = {"up": {"kernel": np.ones((4, 3), np.float32), "bias": np.full(3, 1e300)}}
    with jax.enable_x64(False):
        wrapped = wrap(params, 2)
        with pytest.raises(TypeError, match="'up/bias' has dtype float64, which jax rounds to float32"):
            merge(wrapped, dtype=jnp.float32)
        for call in (lambda: merge(wrapped, dtype=np.float64), lambda: wrap(params, 2, dtype="float64")):
            with pytest.raises(ValueError, match="dtype is float64, which jax rounds to float32"):
                call()
        assert merge(wrapped)["up"]["bias"] is params["up"]["bias"]
    with jax.enable_x64(True):
        assert merge(wrapped, dtype=np.float64)["up"]["kernel"].dtype == np.float64


@pytest.mark.parametrize("number", [jnp.int32(2), np.int64(2), np.array(2)])
def test_numbers_may_be_arrays_of_no_dimensions(number):
    plain = wrap(PARAMS, 2, alpha=4, **FINE)["mlp"]["kernel"]
    ours = wrap(PARAMS, number, alpha=number * 2, **FINE)["mlp"]["kernel"]
    assert ours.rank == plain.rank and ours.scale == plain.scale


@pytest.mark.parametrize("dtype", ["foo", jnp.int32, 3])
def test_merging_into_what_is_no_floating_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match="floating dtype"):
        merge(wrap(PARAMS, 2, **FINE), dtype=dtype)
