"""Adapters cross from PEFT 0.21.2 and loralib to here and back, beside torch: the extra `parity`."""

import functools
import itertools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_models import (
    BOOK,
    CASES,
    FIXTURES,
    LORALIB,
    TRAINED,
    TRAINED_TOO,
    conv,
    dense,
    difference,
    from_torch,
    recorded,
    train,
)

import lora_jax
from lora_jax import peft, peft_config, tensors
from lora_jax.names import Rule, named
from lora_jax.tree import leaves_with_path, map_with_path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("peft")
    loralib = pytest.importorskip("loralib")
    pytest.importorskip("transformers")
    from experiments.peft import record

# What torch, transformers and PEFT warn of themselves.
pytestmark = pytest.mark.filterwarnings("ignore")
SEED = 1  # the fixtures are made with 0
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A case in one of its trees, as PEFT has just trained it."""

    @functools.cache
    def folder(name):
        where = tmp_path_factory.mktemp("peft") / name
        record.record(name, where, SEED)
        return where

    return lambda name, tree: recorded(name, tree, folder(name))


def opened(name, folder):
    """PEFT's model with a saved adapter, of which it must take every tensor and miss none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = theirs.PeftModel.from_pretrained(record.start(name, SEED)[0], folder).eval()
    assert not [w for w in caught if "missing" in str(w.message) or "unexpected" in str(w.message)]
    file = tensors.opened(folder / peft.WEIGHTS)
    state = theirs.get_peft_model_state_dict(model, save_embedding_layers=False)
    extra = {key for key in state if ".original_module." in key or ".modules_to_save." in key}
    assert set(file.entries) == set(state) - extra
    assert all(np.array_equal(file.read(key), state[key].numpy()) for key in file.entries)
    return model


def torch_state(params, rules):
    values = dict(leaves_with_path(params))
    return {p.name: p.of(values[path]) for path, parts in named(params, rules).items() for p in parts}


def crosses(name, case, wrapped, folder, target="peft", fn=None):
    """The largest differences of logits and of merged weights between here and PEFT, through its files."""
    peft.save_peft(wrapped, folder, case.rules, base_model=None, target=target)
    model, x = opened(name, folder), torch.from_numpy(case.arrays["x"])
    fn = jax.jit(lora_jax.lora(case.fn)) if fn is None else fn
    ours = fn(wrapped, jnp.asarray(case.arrays["x"]))
    assert difference(ours, case.arrays["base"]) > 0.1
    found = [difference(ours, record.logits(model, x).numpy())]
    state = model.merge_and_unload().state_dict()
    merged = torch_state(lora_jax.merge(wrapped), case.rules)
    return *found, max(difference(value, state[key].numpy()) for key, value in merged.items())


@pytest.mark.parametrize(("name", "tree"), CASES, ids=[f"{name} {tree}" for name, tree in CASES])
def test_adapters_cross_to_here_and_back(name, tree, made, tmp_path):
    case = made(name, tree)
    wrapped = peft.load_peft(case.folder, case.params, case.rules)
    x = jnp.asarray(case.arrays["x"])
    fn = jax.jit(lora_jax.lora(case.fn))
    logits = fn(wrapped, x)
    assert difference(logits, case.arrays["base"]) > 0.1
    there = difference(logits, case.arrays["logits"])

    def moved(path, leaf):
        if isinstance(leaf, lora_jax.LoraWeight):
            return leaf.replace(b=leaf.b * 1.5)
        return leaf.replace(value=leaf.value + 0.25) if isinstance(leaf, lora_jax.FullWeight) else leaf

    other = map_with_path(moved, wrapped, is_leaf=lambda x: hasattr(x, "path"))
    back, merged = crosses(name, case, other, tmp_path, fn=fn)
    assert max(there, back, merged) <= 1e-5


BOTH = TRAINED + TRAINED_TOO


@pytest.mark.parametrize(("name", "tree"), BOTH, ids=[f"{name} {tree}" for name, tree in BOTH])
def test_training_goes_as_in_peft_and_its_result_opens_there(name, tree, made, tmp_path):
    case = made(name, tree)
    wrapped = peft.load_peft(case.folder, case.params, case.rules)
    losses, trained = train(wrapped, case.fn, case.arrays["x"], case.arrays["targets"])
    apart = np.abs(losses - case.arrays["losses"]).max()
    assert losses[-1] < 0.95 * losses[0]
    back, merged = crosses(name, case, trained, tmp_path)
    assert apart <= 1e-4
    assert max(back, merged) <= 1e-5


def test_a_fresh_adapter_trained_here_opens_there(made, tmp_path):
    case = made("linear", "scanned on axis 1")
    wrapped = lora_jax.wrap(case.params, [2, 0, 3], alpha=[2, 1, 9], targets="layers", train="head")
    losses, trained = train(wrapped, case.fn, case.arrays["x"], case.arrays["targets"])
    assert losses[-1] < 0.9 * losses[0]
    assert max(crosses("linear", case, trained, tmp_path)) <= 1e-5


@pytest.mark.parametrize(("name", "tree"), [("llama", "layers"), ("patterns", "scanned")])
def test_what_is_for_vllm_opens_in_peft_too(name, tree, made, tmp_path):
    case = made(name, tree)
    wrapped = peft.load_peft(case.folder, case.params, case.rules)
    assert max(crosses(name, case, wrapped, tmp_path, "vllm")) <= 1e-5


# --- Configurations -----------------------------------------------------------------------------------


def test_the_fixtures_configs_have_the_fields_of_this_peft():
    config = json.loads((FIXTURES / "peft_linear" / peft.CONFIG).read_text())
    assert set(config) == set(theirs.LoraConfig().to_dict())


MODULES = [
    *(f"model.layers.{i}.{part}" for i in (0, 1, 11) for part in ("self_attn.q_proj", "mlp.up_proj")),
    *("model.layers.1.experts.0.up_proj", "layers.1.up_proj", "h.0.attn", "up_proj", "q_proj", "gup_proj"),
    *("model.embed", "lm_head", "head", "head.up_proj", "score.head"),
]
TARGETS = (
    ["q_proj"],
    ["q_proj", "up_proj", "head"],
    ["layers.1.up_proj", "attn"],
    r".*\.(up|q)_proj",
    "(?i)Q.*",
)
LAYERS = (
    {},
    {"layers_to_transform": 1},
    {"layers_to_transform": [0, 11], "layers_pattern": "layers"},
    {"layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
    {"layers_to_transform": [], "layers_pattern": None},
)
EXCLUDED = {}, {"exclude_modules": ["up_proj"]}, {"exclude_modules": r"model\.layers\.0.*"}
SAVED = {}, {"modules_to_save": ["head", "score"]}


def test_the_same_modules_are_targets():
    from peft.tuners.tuners_utils import check_target_module_exists

    counted = 0
    for targets, layers, excluded, saved in itertools.product(TARGETS, LAYERS, EXCLUDED, SAVED):
        if isinstance(targets, str) and layers:
            continue
        config = {"target_modules": targets, **layers, **excluded, **saved}
        real = theirs.LoraConfig(**config)
        for module in MODULES:
            expected = bool(check_target_module_exists(real, module))
            counted += expected
            assert bool(peft_config.is_target(config, module)) == expected, (config, module)
    assert counted > 100


def test_the_same_pattern_gives_rank_and_alpha():
    from peft.utils.other import get_pattern_key

    for patterns in (
        {"up_proj": 1, "q_proj": 2},
        {r"^model\.layers\.1.*": 3, "layers": 4, r".*": 5},
        {"0.up_proj": 6},
        {"odd+name": 7},
    ):
        for module in [*MODULES, "odd+name"]:
            expected = patterns.get(get_pattern_key(patterns.keys(), module), 9)
            assert peft_config.of_pattern(patterns, module, 9) == expected, (patterns, module)


# --- Where PEFT is wrong ------------------------------------------------------------------------------


def truth(folder, module, weight):
    """W + s·delta of torch's weight, in float64, from the files alone."""
    config = json.loads((folder / peft.CONFIG).read_text())
    file = tensors.opened(folder / peft.WEIGHTS)
    a, b = (x for key in sorted(file.entries) if f".{module}.lora" in key for x in [file.read(key)])
    delta = np.tensordot(b.reshape(len(b), -1).astype(np.float64), a.astype(np.float64), 1)
    if a.ndim == 2 and delta.shape != weight.shape:
        delta = delta.T  # of a table
    return weight.astype(np.float64) + config["lora_alpha"] / config["r"] * delta.reshape(weight.shape)


@pytest.mark.parametrize("kind", ["dilated", "circular"])
def test_a_convolution_that_peft_gets_wrong(kind, tmp_path):
    more = {"dilation": 2} if kind == "dilated" else {"padding": (1, 0), "padding_mode": "circular"}

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, (3, 2), **more)

        def forward(self, x):
            return self.conv(x)

    torch.manual_seed(0)
    net, x = record.spread(Net()), torch.randn(2, 3, 8, 7)
    weight, bias = net.conv.weight.detach().numpy().copy(), net.conv.bias.detach().numpy().copy()
    model = theirs.get_peft_model(net, theirs.LoraConfig(r=2, lora_alpha=4, target_modules=["conv"]))
    record.spread(model.base_model.model.conv.lora_B["default"], 0.5)
    model.save_pretrained(tmp_path)
    dense_weight = torch.from_numpy(truth(tmp_path, "conv", weight))
    plain = Net().double()
    plain.load_state_dict({"conv.weight": dense_weight, "conv.bias": torch.from_numpy(bias)})
    expected = record.logits(plain, x.double()).numpy()
    if kind == "dilated":
        with pytest.raises(RuntimeError, match="must match the size"):
            record.logits(model, x)
    else:
        assert difference(record.logits(model, x).numpy(), expected) > 0.1

    rules = [Rule("conv/kernel", "conv.weight", "conv2d"), Rule("conv/bias", "conv.bias", "plain")]
    shapes = {"conv/kernel": (3, 2, 3, 4), "conv/bias": (4,)}
    params = from_torch(shapes, rules, {"conv.weight": weight, "conv.bias": bias})

    def fn(params, x):
        x = jnp.transpose(x, (0, 2, 3, 1))
        if kind == "circular":
            x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)), mode="wrap")
        y = conv(params["conv"], x, dilation=(2, 2) if kind == "dilated" else (1, 1))
        return jnp.transpose(y, (0, 3, 1, 2))

    wrapped = peft.load_peft(tmp_path, params, rules)
    batch = jnp.asarray(x.numpy())
    assert difference(lora_jax.lora(fn)(wrapped, batch), expected) <= 1e-5
    assert difference(fn(lora_jax.merge(wrapped), batch), expected) <= 1e-5


def test_a_tied_table_that_peft_merges_into_another_function(tmp_path):
    from transformers import GPT2LMHeadModel

    from experiments.models import gpt2

    torch.manual_seed(0)
    base, x = record.spread(record.gpt2()), torch.randint(23, (2, 6))
    record.save_base(base, tmp_path / "base")
    table = base.transformer.wte.weight.detach().numpy().copy()
    model = theirs.get_peft_model(base, theirs.LoraConfig(r=2, target_modules=["wte"])).eval()
    with torch.no_grad():
        model.base_model.model.transformer.wte.lora_embedding_A["default"] += torch.randn(2, 23)
    model.save_pretrained(tmp_path / "adapter")
    before = record.logits(model, x).numpy()
    merged = record.logits(model.merge_and_unload(), x).numpy()
    assert np.abs(before - merged).max() > 1

    plain = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        plain.transformer.wte.weight.copy_(torch.from_numpy(truth(tmp_path / "adapter", "wte", table)))
    assert plain.lm_head.weight is plain.transformer.wte.weight
    expected = record.logits(plain, x).numpy()
    with jax.numpy_dtype_promotion("standard"):
        ours, params = gpt2.load(tmp_path / "base", jnp.float32)
        wrapped = peft.load_peft(tmp_path / "adapter", params, lora_jax.names.gpt2())

        def fn(params, x):
            return ours.apply({"params": params}, x)

        batch = jnp.asarray(x.numpy())
        bound = 1e-5 * np.abs(expected).max()
        assert difference(jax.jit(lora_jax.lora(fn))(wrapped, batch), expected) <= bound
        assert difference(jax.jit(fn)(lora_jax.merge(wrapped), batch), expected) <= bound


def test_a_grouped_convolution_is_refused(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 6, 3, groups=2, bias=False)

        def forward(self, x):
            return self.conv(x)

    config = theirs.LoraConfig(r=2, target_modules=["conv"])
    theirs.get_peft_model(Net(), config).save_pretrained(tmp_path / "theirs")
    params = {"conv": {"kernel": jnp.ones((3, 3, 2, 6), jnp.float32)}}
    rules = [Rule("conv/kernel", "conv.weight", "conv2d")]
    with pytest.raises(ValueError, match="a grouped convolution, which is not implemented"):
        peft.load_peft(tmp_path / "theirs", params, rules)
    wrapped = lora_jax.wrap(params, 2, axes={"conv/kernel": ("in", "in", "in", "out")})
    peft.save_peft(wrapped, tmp_path / "ours", rules, None)
    with pytest.raises(RuntimeError, match="size mismatch"):
        theirs.PeftModel.from_pretrained(Net(), tmp_path / "ours")


def test_pefts_other_forms_are_refused(tmp_path):
    rules = [Rule("fc/kernel", "fc.weight")]
    params = {"fc": {"kernel": jnp.ones((8, 6), jnp.float32)}}
    for field, value in (("use_dora", True), ("lora_bias", True), ("init_lora_weights", "pissa")):
        net = torch.nn.Sequential()
        net.add_module("fc", torch.nn.Linear(8, 6))
        config = theirs.LoraConfig(r=2, target_modules=["fc"], **{field: value})
        model = theirs.get_peft_model(net, config)
        model.save_pretrained(tmp_path / field)
        with pytest.raises(ValueError, match=field):
            peft.load_peft(tmp_path / field, params, rules)
        text = json.loads((tmp_path / field / peft.CONFIG).read_text()) | {field: False}
        (tmp_path / field / peft.CONFIG).write_text(json.dumps(text))
        if field != "init_lora_weights":  # the tensors tell too
            with pytest.raises(ValueError, match=field):
                peft.load_peft(tmp_path / field, params, rules)


# --- loralib, and the book's LinearWithLoRA -----------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_loralibs_state_gives_its_outputs_here(bias):
    fn, rules, shapes = LORALIB
    torch.manual_seed(SEED)
    model = record.spread(record.loralib_model().train()).train()
    x = torch.randint(7, (4, 3))
    params = from_torch(shapes, rules, {key: value.numpy() for key, value in model.state_dict().items()})
    record.spread(model).train()
    for index in "013":  # the base again, beside other factors
        model.get_submodule(index).weight.data = torch.from_numpy(
            np.array(params[index]["kernel"].T if index != "0" else params[index]["kernel"])
        )
    if bias == "none":
        for index in "13":
            model.get_submodule(index).bias.data = torch.from_numpy(np.array(params[index]["bias"]))
    state = {key: value.numpy() for key, value in loralib.lora_state_dict(model, bias).items()}
    assert ("3.bias" in state) == (bias == "lora_only")
    wrapped = peft.load_loralib(state, params, rules, scale=1.5, enable_lora={"1": (True, False, True)})
    expected = record.logits(model, x).numpy()
    batch = jnp.asarray(x.numpy())
    assert difference(fn(params, batch), expected) > 0.1
    assert difference(lora_jax.lora(fn)(wrapped, batch), expected) <= 1e-5
    assert difference(fn(lora_jax.merge(wrapped), batch), record.logits(model.eval(), x).numpy()) <= 1e-5


def test_the_books_adapter_keeps_its_scale():
    fn, rules, shapes = BOOK
    torch.manual_seed(SEED)
    model, x = record.rasbt_model(), torch.randn(5, 4)
    state = {key.replace(".linear.", "."): value.numpy() for key, value in model.state_dict().items()}
    params = from_torch(shapes, rules, state)
    lora = {key: value for key, value in state.items() if ".lora." in key}
    wrapped = peft.load_loralib(lora, params, rules, scale=5.0)
    expected, batch = record.logits(model, x).numpy(), jnp.asarray(x.numpy())
    assert difference(dense(params["2"], jnp.tanh(dense(params["0"], batch))), expected) > 0.1
    assert difference(lora_jax.lora(fn)(wrapped, batch), expected) <= 1e-5
