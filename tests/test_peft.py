"""Adapters in PEFT's and loralib's files: what PEFT computes, here, from fixtures recorded by PEFT itself."""

import json
import os
import shutil
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st
from peft_models import (
    BOOK,
    CASES,
    FIXTURES,
    LORALIB,
    TRAINED,
    UNROLLED,
    difference,
    from_torch,
    recorded,
    train,
)

import lora_jax
from lora_jax import peft, tensors
from lora_jax.names import Rule, named

ids = [f"{name} {tree}" for name, tree in CASES]
IN_FULL = ("bias_all", "lora_only", "saved", "saved_bias_all")


def contents(folder):
    """The config and the tensors of an adapter's folder."""
    file = tensors.opened(Path(folder, peft.WEIGHTS))
    config = json.loads(Path(folder, peft.CONFIG).read_text())
    return config, {name: file.read(name) for name in file.entries}


def rewrite(folder, config, arrays):
    Path(folder).mkdir(exist_ok=True)
    Path(folder, peft.CONFIG).write_text(json.dumps(config))
    shapes = {name: (tensors.name_of(x.dtype), x.shape) for name, x in arrays.items()}
    tensors.write(Path(folder, peft.WEIGHTS), shapes, iter(arrays.values()))


def deltas(folder):
    """By module, s·B·A in float64, from the files."""
    return {
        module: update.scale * update.b.astype(np.float64) @ update.a.astype(np.float64)
        for module, update in peft.read_peft(folder).updates.items()
    }


@pytest.mark.parametrize(("name", "tree"), CASES, ids=ids)
def test_an_adapter_of_peft_gives_its_logits_here(name, tree):
    case = recorded(name, tree)
    wrapped = peft.load_peft(case.folder, case.params, case.rules)

    @jax.jit
    def both(wrapped, x):
        return lora_jax.lora(case.fn)(wrapped, x), case.fn(lora_jax.merge(wrapped), x)

    adapted, merged = both(wrapped, jnp.asarray(case.arrays["x"]))
    assert difference(adapted, case.arrays["base"]) > 0.1
    assert difference(adapted, case.arrays["logits"]) <= 1e-5
    assert difference(merged, case.arrays["merged"]) <= 1e-5


@pytest.mark.parametrize(("name", "tree"), TRAINED, ids=[f"{name} {tree}" for name, tree in TRAINED])
def test_training_goes_on_as_in_peft(name, tree):
    case = recorded(name, tree)
    wrapped = peft.load_peft(case.folder, case.params, case.rules)
    losses, _ = train(wrapped, case.fn, case.arrays["x"], case.arrays["targets"])
    assert losses[-1] < 0.95 * losses[0]
    assert np.abs(losses - case.arrays["losses"]).max() <= 1e-4


@pytest.mark.parametrize(("name", "tree"), CASES, ids=ids)
def test_saving_gives_pefts_own_file_and_saving_again_the_same_bytes(name, tree, tmp_path):
    case = recorded(name, tree)
    wrapped = peft.load_peft(case.folder, case.params, case.rules)
    peft.save_peft(wrapped, tmp_path / "one", case.rules, base_model="some/model")
    config, ours = contents(tmp_path / "one")
    assert config["base_model_name_or_path"] == "some/model"
    theirs = contents(case.adapter)[1]
    # What PEFT writes besides: the table of an adapted embedding, and a saved module's biases thrice.
    extra = ("base_layer.weight", "original_module.bias", "modules_to_save.bias")
    theirs = {key: x for key, x in theirs.items() if not key.endswith(extra)}
    assert {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in theirs.items()}
    if (name, tree) != ("fused", "qkv"):  # its parts have two scales, of which one goes into b
        assert all(np.array_equal(x, theirs[key]) for key, x in ours.items())
    known = deltas(case.adapter)
    assert all(difference(x, known[module]) <= 1e-6 for module, x in deltas(tmp_path / "one").items())

    again = peft.load_peft(tmp_path / "one", case.params, case.rules)
    peft.save_peft(again, tmp_path / "two", case.rules, base_model="some/model")
    for file in (peft.CONFIG, peft.WEIGHTS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_patterns_are_looked_up_as_peft_does(tmp_path):
    alphas = {"up": 7, "a.up": 3, "a.gup": 1, "b.1.up": 2, "b.1.down": 5, "b.11.down": 1, "c.down": 1}
    patterns = {"^up": 7, r"b\.\d\.up": 2, "up": 3, "1.down": 5}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "alpha_pattern": patterns}
    prefix, one = "base_model.model", np.ones((1, 1), np.float32)
    rewrite(tmp_path, config, {f"{prefix}.{m}.lora_{x}.weight": one for m in alphas for x in "AB"})
    assert {module: update.scale for module, update in peft.read_peft(tmp_path).updates.items()} == alphas


# --- For vLLM -----------------------------------------------------------------------------------------

FOR_VLLM = [(name, tree) for name, tree in CASES if name not in (*IN_FULL, "bert", "conv2d")]


@pytest.mark.parametrize(("name", "tree"), FOR_VLLM, ids=[f"{name} {tree}" for name, tree in FOR_VLLM])
def test_for_vllm_one_rank_is_one_alpha_and_the_updates_are_the_same(name, tree, tmp_path):
    case = recorded(name, tree)
    wrapped = peft.load_peft(case.folder, case.params, case.rules)
    peft.save_peft(wrapped, tmp_path, case.rules, None, target="vllm")
    config, arrays = contents(tmp_path)
    assert config["lora_alpha"] == config["r"]
    for field in ("rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save", "use_dora"):
        assert not config[field]
    assert config["bias"] == "none"
    assert {x.shape[0] for key, x in arrays.items() if "_A" in key} == {config["r"]}
    assert {x.shape[1] for key, x in arrays.items() if "_B" in key} == {config["r"]}
    known, found = deltas(case.adapter), deltas(tmp_path)
    assert known.keys() == found.keys()
    assert max(difference(found[module], known[module]) for module in known) <= 1e-6


@pytest.mark.parametrize("name", [*IN_FULL, "conv2d"])
def test_what_vllm_refuses_is_refused(name, tmp_path):
    case = recorded(name, "images" if name == "conv2d" else "unrolled")
    wrapped = peft.load_peft(case.folder, case.params, case.rules)
    what = "adapts no convolutions, and 'conv1', 'conv2'" if name == "conv2d" else "loads no biases and no"
    with pytest.raises(ValueError, match=f"vLLM {what}.*Merge"):
        peft.save_peft(wrapped, tmp_path / "new", case.rules, None, target="vllm")
    assert not (tmp_path / "new").exists()


# --- Drawn trees --------------------------------------------------------------------------------------

KINDS = {
    "linear": (Rule("m/kernel", "m.weight"), (5, 4), ("in", "out")),
    "heads": (Rule("m/kernel", "m.weight", "linear: d n h -> (n h) d"), (5, 2, 3), ("in", "out", "out")),
    "output": (Rule("m/kernel", "m.weight", "linear: n h d -> d (n h)"), (2, 3, 5), ("in", "in", "out")),
    "conv1d": (Rule("m/kernel", "m.weight", "conv1d"), (5, 4), ("in", "out")),
    "embedding": (Rule("m/kernel", "m.weight", "embedding"), (5, 4), ("in", "out")),
    "conv2d": (Rule("m/kernel", "m.weight", "conv2d"), (3, 2, 4, 5), ("in", "in", "in", "out")),
    "scaled": (Rule("m/kernel", "m.weight", "embedding", factor=3.0), (5, 4), ("in", "out")),
    "qkv": (
        Rule("m/kernel", "{c}.weight", "linear: d (c o) -> o d", names={"c": ("q", "k", "v")}),
        (4, 9),
        ("in", "out"),
    ),
}
KINDS |= {
    f"{name} {layout}": (Rule("m/kernel", "b.{l}.m.weight", layout), shape, axes)
    for name, layout, shape, axes in (
        ("stacked", "linear: l i o -> o i", (3, 4, 5), ("batch", "in", "out")),
        ("stacked", "linear: i l o -> o i", (4, 3, 5), ("in", "batch", "out")),
        ("stacked", "conv1d: i o l -> i o", (4, 5, 3), ("in", "out", "batch")),
        ("stacked", "linear: l d n h -> (n h) d", (3, 4, 2, 3), ("batch", "in", "out", "out")),
        ("stacked", "embedding: l v d -> v d", (3, 4, 5), ("batch", "in", "out")),
    )
}
KINDS["stacked kv"] = (
    Rule("m/kernel", "b.{l}.{c}.weight", "linear: l c k d h -> (k h) d", names={"c": ("k", "v")}),
    (3, 2, 2, 4, 3),
    ("batch", "batch", "out", "in", "out"),
)


@st.composite
def drawn(draw):
    """Wrapped parameters with any factors, and their rules."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    rule, shape, axes = KINDS[kind]
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ranks, alphas = st.integers(1, 3), st.integers(1, 9)
    rank, alpha, parts = draw(ranks), draw(alphas), None
    if kind.startswith("stacked ") and kind != "stacked kv" and draw(st.booleans()):
        rank = draw(st.lists(st.integers(0, 3), min_size=3, max_size=3).filter(any))
        alpha = draw(st.lists(alphas, min_size=3, max_size=3))
    if kind == "qkv":
        parts = draw(st.sampled_from([None, [(0, 3), (6, 9)], [(3, 6)]]))
    w = jnp.asarray(numbers.normal(size=shape), jnp.float32)
    params = {"m": {"kernel": w}, "head": {"bias": jnp.ones(3, jnp.float32)}}
    wrapped = lora_jax.wrap(
        params,
        rank,
        alpha=alpha,
        targets="m/kernel",
        axes={"m/kernel": axes},
        parts=None if parts is None else {"m/kernel": parts},
    )
    leaf = wrapped["m"]["kernel"]
    # Columns beyond a layer's own rank are zero in a; they stay so in b.
    alive = np.asarray(jnp.any(leaf.a != 0, axis=tuple(range(leaf.scale.ndim, leaf.a.ndim - 1))))
    b = numbers.normal(size=leaf.b.shape) * alive.reshape(alive.shape + (1,) * (leaf.b.ndim - alive.ndim))
    wrapped["m"]["kernel"] = leaf.replace(b=jnp.asarray(b, jnp.float32))
    return params, wrapped, [rule]


@hypothesis.settings(deadline=None, max_examples=30, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(drawn(), st.sampled_from(["peft", "vllm"]))
def test_what_was_saved_is_loaded(tmp_path_factory, case, target):
    params, wrapped, rules = case
    folder = tmp_path_factory.mktemp("peft")
    if target == "vllm" and rules[0].kind == "conv2d":
        target = "peft"
    peft.save_peft(wrapped, folder / "one", rules, None, target=target)
    again = peft.load_peft(folder / "one", params, rules)
    expected, found = (lora_jax.merge(tree)["m"]["kernel"] for tree in (wrapped, again))
    assert difference(found, expected) <= 1e-6 * np.abs(expected).max()
    peft.save_peft(again, folder / "two", rules, None, target=target)
    assert all(
        (folder / "one" / file).read_bytes() == (folder / "two" / file).read_bytes()
        for file in (peft.CONFIG, peft.WEIGHTS)
    )
    shutil.rmtree(folder)


def test_a_module_is_saved_and_loaded(tmp_path):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.fc1, self.fc2 = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.fc2(jnp.tanh(self.fc1(x)))

    rules = [Rule(r"(fc\d)/kernel", r"\1.weight"), Rule(r"(fc\d)/bias", r"\1.bias", "plain")]
    net, x = Net(nnx.Rngs(0)), jnp.ones((2, 4), jnp.float32)
    wrapped = lora_jax.wrap(net, 2, alpha=3, targets="fc1", train="fc2")
    kernel = nnx.state(wrapped)["fc1"]["kernel"]
    kernel.set_value(kernel.get_value().replace(b=jnp.full((2, 6), 9, jnp.float32)))
    nnx.update(wrapped, {"fc1": {"kernel": kernel}})
    expected = lora_jax.merge(wrapped)(x)
    assert difference(expected, net(x)) > 0.1
    peft.save_peft(wrapped, tmp_path / "one", rules, None)
    assert contents(tmp_path / "one")[0]["modules_to_save"] == ["fc2"]
    again = peft.load_peft(tmp_path / "one", net, rules)
    assert isinstance(again, Net)
    assert difference(lora_jax.lora(lambda net, x: net(x))(again, x), expected) <= 1e-6


def test_names_that_peft_would_find_elsewhere_become_an_expression(tmp_path):
    kernel = jnp.ones((4, 3), jnp.float32)
    params = {"fc": {"kernel": kernel}, "in": {"fc": {"kernel": kernel}}}
    rules = [Rule("in/fc/kernel", "in.fc.weight"), Rule("fc/kernel", "fc.weight")]
    wrapped = lora_jax.wrap(params, 2, targets=lambda path, leaf: path == "fc/kernel")
    peft.save_peft(wrapped, tmp_path, rules, None)
    assert contents(tmp_path)[0]["target_modules"] == "fc"
    again = peft.load_peft(tmp_path, params, rules)
    assert isinstance(again["fc"]["kernel"], lora_jax.LoraWeight)
    assert again["in"]["fc"]["kernel"] is kernel


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"pattern": "(fc"}, "the pattern is not a regular expression"),
        ({"layout": "lstm"}, "no layout of the kind 'lstm'; write one of linear"),
        ({"layout": "linear: i o"}, "the axes 'i o' cannot be read"),
        ({"layout": "linear: i [o] -> o i"}, "cannot be read"),
        ({"layout": "linear: i i -> i i"}, "the axis 'i' in .* is on one side twice"),
        ({"layout": "linear: i o -> o d"}, "the axis 'd' in .* is torch's alone"),
        ({"layout": "linear: l i o -> o i"}, "'l' in .* is neither torch's nor in the name's braces"),
        ({"layout": "linear: i o h -> o i h"}, "torch's parameter has 2 axes, and .* gives 3"),
        (
            {"name": "layers.{n}.fc.weight"},
            "'n' in .* is in the name's braces and no axis of the leaf's alone",
        ),
        (
            {"name": "layers.{i}.fc.weight"},
            "'i' in .* is in the name's braces and no axis of the leaf's alone",
        ),
    ],
)
def test_a_rule_that_cannot_be_read_is_refused(more, message):
    with pytest.raises(ValueError, match=message):
        Rule(**{"pattern": "fc/kernel", "name": "fc.weight"} | more)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            Rule("fc/kernel", "fc.weight", "linear: d n h -> (n h) d"),
            "has shape .4, 6., and the layout has 3 axes",
        ),
        (
            Rule("fc/kernel", "fc.weight", "linear: d (n h) -> (n h) d"),
            "give the sizes of all but one: sizes=",
        ),
        (
            Rule("fc/kernel", "{c}.weight", "linear: d (c o) -> o d", {"c": "abcd"}),
            "size 6, which c times o does",
        ),
        (Rule("fc/kernel", "{c}.weight", "plain: c d -> d", {"c": "abc"}), "has size 4, and names gives 3"),
        (
            Rule("fc/kernel", "fc.weight", "linear: d (n h) -> (n h) d", sizes={"n": 2, "h": 2}),
            "does not give",
        ),
        (Rule(r"\w+/kernel", "fc.weight"), "one name, 'fc.weight', to 'fc/kernel' and to 'up/kernel'"),
        (Rule("down", "fc.weight"), "none of the 1 rules matches a path of this tree"),
    ],
)
def test_rules_that_do_not_fit_a_tree_are_refused(rule, message):
    kernel = np.ones((4, 6), np.float32)
    with pytest.raises(ValueError, match=message):
        named({"fc": {"kernel": kernel}, "up": {"kernel": kernel}}, [rule])


def test_dropout_and_the_dtype_of_the_base_are_kept(tmp_path):
    params = {"fc": {"kernel": jnp.ones((4, 3), jnp.bfloat16), "bias": jnp.ones(3, jnp.bfloat16)}}
    rules = [Rule("fc/kernel", "fc.weight"), Rule("fc/bias", "fc.bias", "plain")]
    wrapped = lora_jax.wrap(params, 2, dropout=0.25, targets="fc/kernel", train="bias")
    peft.save_peft(wrapped, tmp_path, rules, None)
    assert contents(tmp_path)[0]["lora_dropout"] == 0.25
    again = peft.load_peft(tmp_path, params, rules)["fc"]
    assert again["kernel"].dropout == 0.25 and again["kernel"].dtype == jnp.bfloat16
    assert again["kernel"].a.dtype == again["bias"].value.dtype == jnp.float32
    assert again["bias"].dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_in_half_precision_become_float32(dtype, tmp_path):
    case = recorded("linear", "unrolled")
    config, arrays = contents(case.folder)
    arrays = {key: x.astype(jnp.dtype(dtype)) for key, x in arrays.items()}
    rewrite(tmp_path / "new", config, arrays)
    leaf = peft.load_peft(tmp_path / "new", case.params, case.rules)["layers_1"]["fc1"]["kernel"]
    assert leaf.a.dtype == leaf.b.dtype == jnp.float32
    assert np.array_equal(leaf.a, arrays[A].T.astype(np.float32))


def test_numbers_and_expressions_that_are_none_are_refused(tmp_path):
    for field, value in (
        ("lora_alpha", 10**400),
        ("lora_alpha", float("nan")),
        ("lora_alpha", True),
        ("r", 0),
        ("r", 2.0),
        ("lora_dropout", -0.5),
        ("target_modules", "(fc"),
        ("target_modules", "fc{99999999999999999999}"),
        ("rank_pattern", {"(": 2}),
        ("alpha_pattern", {"fc1": "8"}),
        ("init_lora_weights", "loftq"),
    ):
        load = changed(tmp_path, lambda config, _, new={field: value}: config.update(new))
        with pytest.raises(ValueError, match=f"{field} is|is no regular expression"):
            load()


def test_factors_in_float64_stay_so(tmp_path):
    params = {"fc": {"kernel": jnp.ones((4, 3), jnp.float64)}}
    wrapped = lora_jax.wrap(params, 3, alpha=1, dtype=jnp.float64)
    leaf = wrapped["fc"]["kernel"]
    wrapped["fc"]["kernel"] = leaf.replace(b=jnp.ones_like(leaf.b))
    rules = [Rule("fc/kernel", "fc.weight")]
    peft.save_peft(wrapped, tmp_path, rules, None)
    again = peft.load_peft(tmp_path, params, rules)
    kernels = [lora_jax.merge(tree)["fc"]["kernel"] for tree in (again, wrapped)]
    assert difference(*kernels) <= 1e-15
    with jax.enable_x64(False), pytest.raises(ValueError, match="float64, which jax would round to float32"):
        peft.load_peft(tmp_path, jax.tree.map(lambda x: np.asarray(x, np.float32), params), rules)


# --- What is refused ----------------------------------------------------------------------------------

REFUSED = {
    "use_dora": True,
    "lora_bias": True,
    "layer_replication": [[0, 2], [1, 3]],
    "target_parameters": ["experts.up"],
    "trainable_token_indices": [1],
    "megatron_config": {"hidden_size": 8},
    "velora_config": {"num_groups": 2},
    "alora_invocation_tokens": [],  # an empty list switches it on
    "use_qalora": True,
    "monteclora_config": {},
    "use_bdlora": {},
    "arrow_config": {},
    "kasa_config": {},
    "ensure_weight_tying": True,
    "a_field_of_another_version": 3,
}
INFORMATIVE = {
    "auto_mapping": None,
    "base_model_name_or_path": "some/model",
    "revision": "main",
    "task_type": "CAUSAL_LM",
    "inference_mode": False,
    "peft_version": "9.9",
    "fan_in_fan_out": True,
    "eva_config": {"rho": 2.0},
    "loftq_config": {"loftq_bits": 4},
    "corda_config": {},
    "lora_ga_config": {},
    "megatron_core": "megatron",
    "qalora_group_size": 8,
}
USED = {
    "peft_type": "LOHA",
    "r": 3,
    "lora_alpha": None,
    "lora_dropout": 1.5,
    "use_rslora": "yes",
    "rank_pattern": {"fc1": 3},
    "alpha_pattern": {"absent": 3},
    "target_modules": ["fc1"],
    "exclude_modules": ["fc1"],
    "layers_to_transform": [1],
    "layers_pattern": 3,
    "bias": "some",
    "modules_to_save": ["fc1"],
    "init_lora_weights": "pissa_niter_4",
}


def changed(tmp_path, change):
    """The recorded adapter of three blocks, changed, its base, and the error that loading it raises."""
    case = recorded("linear", "unrolled")
    config, arrays = contents(case.folder)
    change(config, arrays)
    rewrite(tmp_path / "new", config, arrays)
    return lambda: peft.load_peft(tmp_path / "new", case.params, case.rules)


def test_every_field_that_peft_writes_is_used_or_informative_or_refused():
    config = contents(FIXTURES / "peft_linear")[0]
    groups = [set(REFUSED) - {"a_field_of_another_version"}, set(INFORMATIVE), set(USED)]
    assert set().union(*groups) == set(config)
    assert sum(map(len, groups)) == len(config)


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_whose_meaning_is_not_served_is_refused_by_name(field, tmp_path):
    load = changed(tmp_path, lambda config, _: config.update({field: REFUSED[field]}))
    with pytest.raises(ValueError, match=f"adapter_config.json': {field} is not implemented, and it is"):
        load()


@pytest.mark.parametrize("field", INFORMATIVE)
def test_a_field_without_meaning_changes_nothing(field, tmp_path):
    load = changed(tmp_path, lambda config, _: config.update({field: INFORMATIVE[field]}))
    case = recorded("linear", "unrolled")
    known = peft.load_peft(case.folder, case.params, case.rules)
    same = jax.tree.map(lambda x, y: bool((x == y).all()), known, load())
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("field", USED)
def test_a_field_that_contradicts_the_tensors_is_noticed(field, tmp_path):
    load = changed(tmp_path, lambda config, _: config.update({field: USED[field]}))
    with pytest.raises(ValueError) as caught:
        load()
    text = str(caught.value)
    by_rank = "r", "rank_pattern", "rank 3"
    assert field in text or (field in by_rank and by_rank[2] in text) or "target_modules" in text, text


A, B = (f"base_model.model.layers.1.fc1.lora_{x}.weight" for x in "AB")


def lose(*keys):
    return lambda config, arrays: [arrays.pop(key) for key in keys]


def rename(text, new):
    def change(config, arrays):
        found = {key.replace(text, new): x for key, x in arrays.items()}
        arrays.clear()
        arrays.update(found)

    return change


def put(key, value):
    return lambda config, arrays: arrays.update({key: value})


ONES = np.ones((2, 4), np.float32)
WRONG = {
    "half a pair": (lose(B), "'layers.1.fc1' has lora_A, and not both of lora_A and lora_B"),
    "missing factors": (lose(A, B), "has no factors for 'layers.1.fc1', which its config targets"),
    "a name of no leaf": (
        lambda config, arrays: rename("layers.1.fc1", "layers.7.fc1")(config, arrays),
        "no leaf is by these rules: 'layers.7.fc1.weight'",
    ),
    "no name of PEFT's": (
        put("layers.1.fc1.lora_A", ONES),
        "'layers.1.fc1.lora_A' has no name that PEFT gives",
    ),
    "a shape of another base": (
        put(A, np.ones((2, 5), np.float32)),
        r"layers.1.fc1 is linear of shape \(6, 5\), and layers_1/fc1/kernel by its rule linear of .*\(6, 4\)",
    ),
    "another rank": (
        put(A, np.ones((3, 4), np.float32)),
        "A has shape .3, 4. and B .6, 2., and the config gives",
    ),
    "no matrix": (put(A, np.ones(4, np.float32)), "linear layers and embeddings have two axes"),
    "not finite": (put(A, np.full((2, 4), np.nan, np.float32)), "infinite or not a number"),
    "whole numbers": (put(A, np.ones((2, 4), np.int32)), "dtype int32, and no floating one"),
    "DoRA's magnitude": (
        put("base_model.model.layers.1.fc1.lora_magnitude_vector", np.ones(6, np.float32)),
        "use_dora is not implemented, and the tensors have",
    ),
    "a bias on B": (
        put("base_model.model.layers.1.fc1.lora_B.bias", np.ones(6, np.float32)),
        "lora_bias is not implemented, and the tensors have",
    ),
    "a bias that bias does not name": (
        put("base_model.model.layers.1.fc1.base_layer.bias", np.ones(6, np.float32)),
        "bias='none' and modules_to_save=None of the config do not name",
    ),
    "another base's weight": (
        put("base_model.model.layers.1.fc1.base_layer.weight", np.ones((6, 4), np.float32)),
        "a copy of 'layers.1.fc1.weight' that is not 'layers_1/fc1/kernel'",
    ),
    "a copy of nothing": (
        put("base_model.model.head.base_layer.weight", np.ones((3, 4), np.float32)),
        "neither adapted nor trained in full",
    ),
    "two adapters in one": (
        put(A.replace("lora_A.weight", "lora_A.other.weight"), ONES),
        "are the same factor. Save one adapter alone",
    ),
    "a table's factors": (
        lambda config, arrays: arrays.update(
            {
                "base_model.model.layers.1.fc1.lora_embedding_A": arrays.pop(A),
                "base_model.model.layers.1.fc1.lora_embedding_B": arrays.pop(B),
            }
        ),
        "is embedding of shape .*, and layers_1/fc1/kernel by its rule linear",
    ),
    "a prefix": (
        rename("base_model.model.", "base_model.model.net."),
        "The rules' names fit with 'net.' in front",
    ),
    "a grouped convolution": (
        lambda config, arrays: arrays.update(
            {A: np.ones((2, 4, 3, 3), np.float32), B: np.ones((6, 1, 1, 1), np.float32)}
        ),
        "the layer is a grouped convolution, which is not implemented",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_tensors_are_refused_by_name(what, tmp_path):
    change, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        changed(tmp_path, change)()


def test_a_parameter_that_the_file_holds_twice_must_be_one(tmp_path):
    case = recorded("saved_bias_all", "unrolled")
    config, arrays = contents(case.folder)
    key = "base_model.model.head.modules_to_save.bias"
    arrays[key] = arrays[key] + np.float32(1)
    rewrite(tmp_path / "new", config, arrays)
    with pytest.raises(ValueError, match="modules_to_save.bias' and .* are one parameter, and differ"):
        peft.load_peft(tmp_path / "new", case.params, case.rules)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("bias_all", "layers.1.fc2.bias"),
        ("lora_only", "layers.1.fc1.base_layer.bias"),
        ("saved", "head.weight"),
    ],
)
def test_a_lost_bias_or_head_is_noticed(name, key, tmp_path):
    case = recorded(name, "unrolled")
    config, arrays = contents(case.folder)
    del arrays[f"base_model.model.{key}"]
    rewrite(tmp_path / "new", config, arrays)
    lost = key.replace("base_layer.", "")
    with pytest.raises(ValueError, match=f"does not hold '{lost}', which bias or modules_to_save"):
        peft.load_peft(tmp_path / "new", case.params, case.rules)


def test_a_prefix_too_few_is_told(tmp_path):
    case = recorded("gpt2", "layers")
    with pytest.raises(ValueError, match=r"fit with 'transformer\.' in front"):
        peft.load_peft(case.folder, case.params, lora_jax.names.gpt2(prefix=""))
    bare = {key: value for key, value in case.params.items()}
    with pytest.raises(ValueError, match=r"fit without 'transformer\.' in front"):
        config, arrays = contents(case.folder)
        rename("base_model.model.transformer.", "base_model.model.")(config, arrays)
        rewrite(tmp_path / "new", config, arrays)
        peft.load_peft(tmp_path / "new", bare, case.rules)


def test_what_is_no_adapter_is_refused(tmp_path):
    case = recorded("linear", "unrolled")

    def load():
        return peft.load_peft(tmp_path, case.params, case.rules)

    with pytest.raises(FileNotFoundError, match=r"no adapter_config.json in"):
        load()
    shutil.copy(case.folder / peft.CONFIG, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no adapter_model.safetensors in"):
        load()
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"adapter_model.bin is a pickle, which can run code"):
        load()
    data = (case.folder / peft.WEIGHTS).read_bytes()
    for size in (0, 4, 100, len(data) - 1):
        (tmp_path / peft.WEIGHTS).write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"adapter_model.safetensors' is truncated or damaged"):
            load()
    (tmp_path / peft.WEIGHTS).write_bytes((2**60).to_bytes(8, "little") + data[8:])
    with pytest.raises(ValueError, match=r"truncated or damaged"):
        load()
    (tmp_path / peft.WEIGHTS).write_bytes(data)
    load()
    wrong = ("{", "is no JSON"), ("[]", "holds a list"), ('{"r": 1, "r": 2}', "stands there twice")
    for text, message in (*wrong, ('{"peft_type": "LORA", "r": 2}', "no field 'lora_alpha'")):
        (tmp_path / peft.CONFIG).write_text(text)
        with pytest.raises(ValueError, match=message):
            load()
    (tmp_path / peft.CONFIG).unlink()
    for name in ("one", "two"):
        shutil.copytree(case.folder, tmp_path / name)
    with pytest.raises(ValueError, match=r"there are 2 adapters in .*one', .*two'"):
        load()


def test_what_is_there_is_kept(tmp_path):
    case = recorded("linear", "unrolled")
    wrapped = peft.load_peft(case.folder, case.params, case.rules)
    (tmp_path / "notes.txt").write_text("mine")
    peft.save_peft(wrapped, tmp_path, case.rules, "one")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        peft.save_peft(wrapped, tmp_path, case.rules, "two")
    assert contents(tmp_path)[0]["base_model_name_or_path"] == "one"
    peft.save_peft(wrapped, tmp_path, case.rules, "two", overwrite=True)
    assert contents(tmp_path)[0]["base_model_name_or_path"] == "two"
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", peft.CONFIG, peft.WEIGHTS}
    with pytest.raises(FileExistsError, match="is a file; write a folder"):
        peft.save_peft(wrapped, tmp_path / "notes.txt", case.rules, None)


@pytest.mark.parametrize(
    ("there", "after"), [*((False, i) for i in range(2)), *((True, i) for i in range(4))]
)
def test_an_interrupt_while_saving_leaves_what_was_there(tmp_path, monkeypatch, there, after):
    case = recorded("linear", "unrolled")
    wrapped = peft.load_peft(case.folder, case.params, case.rules)
    if there:
        peft.save_peft(wrapped, tmp_path, case.rules, "one")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = jax.tree.map(lambda x: 2 * x, wrapped)
    done, real = [], os.rename

    def rename(source, target):
        if len(done) == after:
            done.append(None)
            raise KeyboardInterrupt
        done.append(target)
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        peft.save_peft(other, tmp_path, case.rules, "two", overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_has_no_form_there_is_not_saved(tmp_path):
    case = recorded("linear", "unrolled")

    def refused(message, wrapped=None, rules=None, **more):
        wrapped = lora_jax.wrap(case.params, 2, **more) if wrapped is None else wrapped
        with pytest.raises(ValueError, match=message):
            peft.save_peft(wrapped, tmp_path / "new", rules or case.rules, None)
        assert not (tmp_path / "new").exists()

    refused("no rule names 'head/kernel'", targets="all", rules=UNROLLED[:2])
    refused("PEFT has no form for 'layers.1.fc2.bias'", targets="fc1", train="layers_1/fc2/bias")
    refused("have dropout rates .0.0, 0.1., and PEFT", dropout={"layers_0": 0.1, ".*": 0.0})
    refused("without any LoraWeight", wrapped=case.params)
    swapped = {path: ("out", "in") for path in ("layers_0/fc1/kernel",)}
    refused("has the axes .'out', 'in'., and the rule", targets="layers_0/fc1", axes=swapped)
    infinite = lora_jax.wrap(case.params, 2)
    leaf = infinite["layers_1"]["fc1"]["kernel"]
    infinite["layers_1"]["fc1"]["kernel"] = leaf.replace(b=leaf.b + np.float32(np.inf))
    refused("'layers_1/fc1/kernel' has values that are infinite or not a number", wrapped=infinite)
    with pytest.raises(ValueError, match="write 'peft' or 'vllm'"):
        peft.save_peft(lora_jax.wrap(case.params, 2), tmp_path / "new", case.rules, None, target="hf")


def test_a_name_that_peft_would_take_for_anothers_is_not_saved(tmp_path):
    kernel = jnp.ones((4, 3), jnp.float32)
    params = {"up": {"kernel": kernel}, "head": {"kernel": kernel}, "overhead": {"kernel": kernel}}
    rules = [Rule(r"(\w+)/kernel", r"\1.weight")]
    wrapped = lora_jax.wrap(params, 2, targets="up", train="head")
    with pytest.raises(ValueError, match="modules_to_save=.'head'. would take in 'overhead' too"):
        peft.save_peft(wrapped, tmp_path / "new", rules, None)
    peft.save_peft(lora_jax.wrap(params, 2, targets="up", train="overhead"), tmp_path / "new", rules, None)
    again = peft.load_peft(tmp_path / "new", params, rules)
    assert isinstance(again["overhead"]["kernel"], lora_jax.FullWeight) and again["head"]["kernel"] is kernel


# --- loralib, and the book's LinearWithLoRA -----------------------------------------------------------


def states(name):
    with np.load(FIXTURES / "peft_loralib" / "states.npz") as file:
        return {key.removeprefix(f"{name}:"): file[key] for key in file if key.startswith(f"{name}:")}


def test_loralibs_state_gives_its_outputs_here():
    found = states("loralib")
    fn, rules, shapes = LORALIB
    params = from_torch(shapes, rules, found)
    state = {key: x for key, x in found.items() if "lora_" in key}
    load = {"scale": 1.5, "enable_lora": {"1": (True, False, True)}}
    wrapped = peft.load_loralib(state, params, rules, **load)
    x = jnp.asarray(found["x"])
    assert difference(fn(params, x), found["logits"]) > 0.1
    assert difference(lora_jax.lora(fn)(wrapped, x), found["logits"]) <= 1e-5
    assert difference(fn(lora_jax.merge(wrapped), x), found["logits"]) <= 1e-5
    still = wrapped["1"]["kernel"].dense()[:, 2:4]
    assert np.array_equal(still, params["1"]["kernel"][:, 2:4])
    biases = {"3.bias": found["3.bias"] + np.float32(1)}
    with_bias = peft.load_loralib(state | biases, params, rules, **load)
    assert difference(lora_jax.lora(fn)(with_bias, x), found["logits"] + 1) <= 1e-5

    for wrong, message in (
        ({"enable_lora": None}, "For a MergedLinear give enable_lora"),
        ({"enable_lora": {"1": (True, True, True)}}, "in 3 parts of which 3 are enabled"),
        ({"enable_lora": {"2": (True,)}}, "enable_lora names '2'"),
        ({"scale": None}, "scale is None"),
    ):
        with pytest.raises(ValueError, match=message):
            peft.load_loralib(state, params, rules, **load | wrong)
    with pytest.raises(ValueError, match="'3' with A alone"):
        peft.load_loralib({key: x for key, x in state.items() if key != "3.lora_B"}, params, rules, **load)


def test_the_books_adapter_keeps_its_scale():
    found = states("rasbt")
    fn, rules, shapes = BOOK
    params = from_torch(shapes, rules, {key.replace(".linear.", "."): x for key, x in found.items()})
    state = {key: x for key, x in found.items() if ".lora." in key}
    wrapped = peft.load_loralib(state, params, rules, scale=5.0)
    assert float(wrapped["0"]["kernel"].scale) == 5.0 and wrapped["0"]["kernel"].rank == 2
    x = jnp.asarray(found["x"])
    assert difference(fn(params, x), found["logits"]) > 0.1
    assert difference(lora_jax.lora(fn)(wrapped, x), found["logits"]) <= 1e-5


# --- Numbers that would be wrong without a word -------------------------------------------------------


def one_matrix(folder, module="fc", names=("fc/kernel",)):
    """An adapter of square matrices, saved by its right rules."""
    tree = {}
    for name in names:
        node = tree
        *parents, last = name.split("/")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = jnp.eye(4, dtype=jnp.float32)
    wrapped = lora_jax.wrap(tree, rank=2, targets="all")
    peft.save_peft(wrapped, folder, [Rule(name, f"{module}.weight") for name in names], None)


def test_a_rule_that_turns_a_square_kernel_is_refused(tmp_path):
    one_matrix(tmp_path)
    linen = {"fc": {"kernel": jnp.eye(4)}}
    with pytest.raises(
        ValueError, match="'fc/kernel' takes its axes as .*'out', 'in'.*they are .*'in', 'out'"
    ):
        peft.load_peft(tmp_path, linen, [Rule("fc/kernel", "fc.weight", "linear: o i -> o i")])
    equinox = pytest.importorskip("equinox")
    model = {"fc": equinox.nn.Linear(4, 4, key=jax.random.key(0))}
    with pytest.raises(ValueError, match="they are .*'out', 'in'"):
        peft.load_peft(tmp_path, model, [Rule("fc/weight", "fc.weight")])
    peft.load_peft(tmp_path, model, [Rule("fc/weight", "fc.weight", "linear: o i -> o i")])


def test_a_table_in_full_that_is_the_head_too_is_refused(tmp_path):
    params = {
        "embed_tokens": {"embedding": jnp.ones((7, 4))},
        "layers_0": {"mlp": {"up_proj": {"kernel": jnp.ones((4, 4))}}},
    }
    rules = lora_jax.names.llama()
    wrapped = lora_jax.wrap(params, rank=2, train="embed_tokens")
    with pytest.raises(ValueError, match="'model.embed_tokens.weight' in full, and this base has no lm_head"):
        peft.save_peft(wrapped, tmp_path, rules, None)
    headless = [rule for rule in rules if rule.name != "lm_head.weight"]
    peft.save_peft(wrapped, tmp_path, headless, None)
    with pytest.raises(ValueError, match="in full, and this base has no lm_head"):
        peft.load_peft(tmp_path, params, rules)
    peft.load_peft(tmp_path, params, headless)
    peft.load_peft(tmp_path, params | {"lm_head": {"kernel": jnp.ones((4, 7))}}, rules)


def test_an_adapted_table_that_is_the_head_too_is_warned_of(tmp_path):
    params = {"embed_tokens": {"embedding": jnp.ones((7, 4))}}
    rules = lora_jax.names.llama()
    peft.save_peft(lora_jax.wrap(params, rank=2, targets="embed_tokens"), tmp_path, rules, None)
    with pytest.warns(
        UserWarning, match="'embed_tokens/embedding', .* PEFT adapts the look-up alone"
    ) as seen:
        peft.load_peft(tmp_path, params, rules)
    assert len(seen) == 1 and seen[0].filename == __file__
    # Any warning is an error here.
    peft.load_peft(tmp_path, params, [rule for rule in rules if rule.name != "lm_head.weight"])
    peft.load_peft(tmp_path, params | {"lm_head": {"kernel": jnp.ones((4, 7))}}, rules)


def test_a_folder_by_an_adapters_name_is_refused(tmp_path):
    (tmp_path / peft.CONFIG / "mine").mkdir(parents=True)
    params = {"fc": {"kernel": jnp.ones((4, 3))}}
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="adapter_config.json' is no file"):
            peft.save_peft(
                lora_jax.wrap(params, rank=2),
                tmp_path,
                [Rule("fc/kernel", "fc.weight")],
                None,
                overwrite=overwrite,
            )
    assert [x.name for x in tmp_path.iterdir()] == [peft.CONFIG] and (
        tmp_path / peft.CONFIG / "mine"
    ).exists()


def test_a_leaf_of_whole_numbers_is_refused_as_wrap_does(tmp_path):
    params = {"fc": {"kernel": jnp.ones((4, 3))}}
    rules = [Rule("fc/kernel", "fc.weight")]
    peft.save_peft(lora_jax.wrap(params, rank=2), tmp_path, rules, None)
    quantised = jax.tree.map(lambda x: x.astype(jnp.int8), params)
    with pytest.raises(ValueError, match="'fc/kernel', which has dtype int8; only floating leaves"):
        peft.load_peft(tmp_path, quantised, rules)
    with pytest.raises(ValueError, match="only floating leaves"):
        state = {"fc.lora_A": np.ones((2, 4), np.float32), "fc.lora_B": np.ones((3, 2), np.float32)}
        peft.load_loralib(state, quantised, rules, scale=1.0)


def test_a_file_without_tensors_is_refused(tmp_path):
    case = recorded("linear", "unrolled")
    shutil.copy(case.folder / peft.CONFIG, tmp_path)
    (tmp_path / peft.WEIGHTS).write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="adapter_model.safetensors' holds no tensors"):
        peft.read_peft(tmp_path)


def test_a_name_that_ends_that_of_a_module_with_others_is_written_as_an_expression(tmp_path):
    params = {name: {"kernel": jnp.ones((4, 4))} for name in ("output", "enc_output_dense")}
    rules = [
        Rule("output/kernel", "output.weight"),
        Rule("enc_output_dense/kernel", "enc.output.dense.weight"),
    ]
    peft.save_peft(lora_jax.wrap(params, rank=2, targets="output"), tmp_path, rules, None)
    assert contents(tmp_path)[0]["target_modules"] == "output"


def loralib_state(**changes):
    state = {"fc.lora_A": np.ones((2, 4), np.float32), "fc.lora_B": np.ones((3, 2), np.float32)} | changes
    return {name: x for name, x in state.items() if x is not None}


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        (
            loralib_state(**{"g.weight": np.ones((8, 2))}),
            {},
            r"'g.weight' has shape \(8, 2\), and 'g/kernel' is \(4, 4\)",
        ),
        (loralib_state(**{"fc.weight": np.ones((3, 4))}), {}, "'fc.weight' beside their factors"),
        (loralib_state(**{"fc.lora_A": np.full((2, 4), np.nan)}), {}, "infinite or not a number"),
        ({"g.weight": np.ones((4, 4))}, {}, "has no lora_A and lora_B"),
        (loralib_state(), {"scale": {"g": 1.0}}, "scale names 'g'"),
        (loralib_state(), {"scale": {}}, "scale has no number for 'fc'"),
        (loralib_state(), {"scale": float("nan")}, "scale is nan"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(state, options, message):
    params = {"fc": {"kernel": jnp.zeros((4, 3))}, "g": {"kernel": jnp.zeros((4, 4))}}
    rules = [Rule(r"(\w+)/kernel", r"\1.weight")]
    with pytest.raises(ValueError, match=message):
        peft.load_loralib(state, params, rules, **({"scale": 1.0} | options))


def test_modules_have_scales_of_their_own():
    params = {"fc": {"kernel": jnp.zeros((4, 3))}, "g": {"kernel": jnp.zeros((4, 3))}}
    state = loralib_state() | {name.replace("fc", "g"): x for name, x in loralib_state().items()}
    wrapped = peft.load_loralib(
        state, params, [Rule(r"(\w+)/kernel", r"\1.weight")], scale={"fc": 1.0, "g": 3.0}
    )
    merged = lora_jax.merge(wrapped)
    np.testing.assert_array_equal(merged["g"]["kernel"], 3 * merged["fc"]["kernel"])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (lora_jax.names.llama, "rules is the function llama; call it"),
        (Rule("fc/kernel", "fc.weight"), "write a list of lora_jax.names.Rule"),
        (["fc.weight"], "write a list of lora_jax.names.Rule"),
        (7, "write a list of lora_jax.names.Rule"),
    ],
)
def test_what_is_no_list_of_rules_is_said(tmp_path, rules, message):
    with pytest.raises(TypeError, match=message):
        peft.save_peft(lora_jax.wrap({"fc": {"kernel": jnp.ones((4, 4))}}, rank=2), tmp_path, rules, None)


def test_wrong_arguments_write_nothing(tmp_path):
    wrapped = lora_jax.wrap({"fc": {"kernel": jnp.ones((4, 4))}}, rank=2)
    rules = [Rule("fc/kernel", "fc.weight")]
    with pytest.raises(TypeError, match="base_model is 7"):
        peft.save_peft(wrapped, tmp_path / "a", rules, 7)
    huge = {"fc": {"kernel": wrapped["fc"]["kernel"].replace(scale=jnp.float32(3e38))}}
    with pytest.raises(ValueError, match="float32 does not hold"):
        peft.save_peft(huge, tmp_path / "a", rules, None)
    assert not (tmp_path / "a").exists()
    peft.save_peft(wrapped, tmp_path / "a", rules, tmp_path / "model")
    assert contents(tmp_path / "a")[0]["base_model_name_or_path"] == str(tmp_path / "model")


@pytest.mark.parametrize(
    ("pattern", "name", "layout", "message"),
    [
        (r".*/kernel", r"l.\1.weight", "linear", "refers to no group of the pattern"),
        (r"(\w+)/kernel", r"\g<layer>.weight", "linear", "refers to no group of the pattern"),
        ("kernel", "w", "linear: 0 1 -> 1 0", "cannot be read"),
    ],
)
def test_rules_that_cannot_be_read_are_refused_when_made(pattern, name, layout, message):
    with pytest.raises(ValueError, match=message):
        Rule(pattern, name, layout)
