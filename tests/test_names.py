"""Rules: every weight of a foreign tree has the name, the shape and the numbers of Hugging Face's."""

import json
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import names, peft
from lora_jax.names import Rule, named, pieces
from lora_jax.tree import leaves_with_path

D, F, N, K, H, V = 16, 24, 4, 2, 8, 11  # width, hidden, heads, heads of keys, size of a head, vocabulary


@pytest.fixture(autouse=True)
def usual_promotion():
    with jax.numpy_dtype_promotion("standard"):  # tunix mixes dtypes
        yield


def hub_shapes(layers, prefix="model.", kv_heads=K, head=False, **norms):
    """The names and shapes of a decoder on the hub: Llama's, with further norms for Gemma."""
    shapes = {f"{prefix}embed_tokens.weight": (V, D), f"{prefix}norm.weight": (D,)}
    if head:
        shapes["lm_head.weight"] = (V, D)
    kernels = {
        "self_attn.q_proj": (N * H, D),
        "self_attn.k_proj": (kv_heads * H, D),
        "self_attn.v_proj": (kv_heads * H, D),
        "self_attn.o_proj": (D, N * H),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    norms = {"input_layernorm": D, "post_attention_layernorm": D} | norms
    kernels |= {name.replace("__", "."): (size,) for name, size in norms.items()}
    for i in range(layers):
        shapes |= {f"{prefix}layers.{i}.{name}.weight": shape for name, shape in kernels.items()}
    return shapes


GEMMA2 = {"pre_feedforward_layernorm": D, "post_feedforward_layernorm": D}
GEMMA3 = GEMMA2 | {"self_attn__q_norm": H, "self_attn__k_norm": H}


def drawn(shapes, dtype=np.float64):
    rng = np.random.default_rng(3)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_adapter(folder, state, rank=3, alpha=5.0):
    """A PEFT adapter of every matrix of a state, written by hand; and the state with s·BA added."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(4)
    tensors, changed = {}, dict(state)
    for name, value in state.items():
        if value.ndim < 2:
            continue
        module = name.removesuffix(".weight")
        a, b = (0.3 * rng.standard_normal(s) for s in ((rank, value.shape[1]), (value.shape[0], rank)))
        key = f"base_model.model.{module}."
        if module.endswith("embed_tokens"):  # whose A holds a column for every word
            tensors[f"{key}lora_embedding_A"], tensors[f"{key}lora_embedding_B"] = b.T.copy(), a.T.copy()
        else:
            tensors[f"{key}lora_A.weight"], tensors[f"{key}lora_B.weight"] = a, b
        changed[name] = (value + alpha / rank * b @ a).astype(value.dtype)
    modules = [name.removesuffix(".weight") for name in state if state[name].ndim > 1]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": modules}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return changed


def values(tree):
    from lora_jax.nnx import opened

    return {path: np.asarray(x) for path, x in leaves_with_path(opened(tree)[0]) if hasattr(x, "shape")}


def assert_loads(folder, state, convert, rules, bound=1e-12):
    """An adapter loaded onto a converted base and merged is the conversion of base plus s·BA; and back."""
    changed = write_adapter(folder / "in", state)
    base, expected = convert(state), values(convert(changed))
    wrapped = peft.load_peft(folder / "in", base, rules)
    merged = values(lora_jax.merge(wrapped))
    assert merged.keys() == expected.keys()
    before, moved = values(base), set()
    for path, theirs in expected.items():
        assert merged[path].dtype == theirs.dtype, path
        np.testing.assert_allclose(merged[path], theirs, rtol=0, atol=bound * np.abs(theirs).max())
        if not path.endswith(("scale", "norm/w")):
            moved.add(path)
            assert np.abs(before[path] - theirs).max() > 0.1 * np.abs(theirs).max(), path
    assert moved
    peft.save_peft(wrapped, folder / "out", rules, None)
    first, second = (peft.read_peft(folder / x).updates for x in ("in", "out"))
    assert first.keys() == second.keys()
    for module, update in first.items():
        delta, again = (u.scale * u.b @ u.a for u in (update, second[module]))
        np.testing.assert_allclose(again, delta, rtol=0, atol=bound * np.abs(delta).max())
    return base, wrapped


def assert_complete(tree, rules, shapes, without=()):
    """Every leaf but those in `without` has a name, and the names and shapes are the hub's."""
    table = named(tree, rules)
    nameless = {path for path, x in leaves_with_path(tree) if hasattr(x, "shape")} - set(table)
    assert nameless == set(without)
    found = {piece.name: piece.shape for parts in table.values() for piece in parts}
    assert sum(map(len, table.values())) == len(found)
    assert found == {name: shape for name, shape in shapes.items() if name in found}
    matrices = {name for name, shape in shapes.items() if len(shape) > 1}
    assert matrices <= set(found)


# tunix


@pytest.fixture
def tunix():
    """A function that gives one of tunix's models: its module, a config of it, and how it is loaded."""
    flax = pytest.importorskip("flax")
    with flax.config.temp_flip_flag("always_shard_variable", False):  # tunix sets it when it is imported
        pytest.importorskip("tunix.models.llama3.model")
        import importlib

        def given(family, loader, cls, **changes):
            model = importlib.import_module(f"tunix.models.{family}.model")
            loading = importlib.import_module(f"tunix.models.{family}.{loader}")
            sizes = {"num_layers": 2, "embed_dim": D, "hidden_dim": F, "num_heads": N, "head_dim": H}
            sizes |= {"num_kv_heads": K} | changes
            if "attention_types" in sizes:
                sizes["attention_types"] = (model.AttentionType.GLOBAL,) * 2
            config = model.ModelConfig(**sizes)
            return getattr(model, cls), config, loading

        yield given


GEMMA = {"num_embed": V, "final_logit_softcap": None, "attention_types": ()}
TUNIX = {
    "llama": (
        ("llama3", "params", "Llama3"),
        {"vocab_size": V, "rope_theta": 10_000, "norm_eps": 1e-5},
        names.tunix_llama(),
        hub_shapes(2, head=True),
        (),
    ),
    "llama, tied": (
        ("llama3", "params", "Llama3"),
        {"vocab_size": V, "rope_theta": 10_000, "norm_eps": 1e-5, "weight_tying": True},
        names.tunix_llama(),
        hub_shapes(2),
        (),
    ),
    "gemma 1": (
        ("gemma", "params_safetensors", "Gemma"),
        GEMMA | {"use_post_attn_norm": False, "use_post_ffw_norm": False, "num_kv_heads": 1},
        names.tunix_gemma(),
        hub_shapes(2, kv_heads=1),
        ("layers/0/pre_ffw_norm/scale", "layers/1/pre_ffw_norm/scale"),
    ),
    "gemma 2": (
        ("gemma", "params_safetensors", "Gemma"),
        GEMMA | {"use_post_attn_norm": True, "use_post_ffw_norm": True},
        names.tunix_gemma(),
        hub_shapes(2, **GEMMA2),
        ("layers/0/pre_ffw_norm/scale", "layers/1/pre_ffw_norm/scale"),
    ),
    "gemma 2, as many heads of keys": (
        ("gemma", "params_safetensors", "Gemma"),
        GEMMA | {"use_post_attn_norm": True, "use_post_ffw_norm": True, "num_kv_heads": N},
        names.tunix_gemma(),
        hub_shapes(2, kv_heads=N, **GEMMA2),
        ("layers/0/pre_ffw_norm/scale", "layers/1/pre_ffw_norm/scale"),
    ),
    "gemma 3": (
        ("gemma3", "params_safetensors", "Gemma3"),
        {"num_embed": V, "sliding_window_size": 4, "param_dtype": jnp.float32},
        names.tunix_gemma(),
        hub_shapes(2, **GEMMA3),
        ("layers/0/pre_ffw_norm/scale", "layers/1/pre_ffw_norm/scale"),
    ),
}


# What tunix uses of flax is deprecated there.
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", TUNIX)
def test_every_leaf_of_tunix_has_its_name(kind, tunix):
    from flax import nnx

    which, changes, rules, shapes, without = TUNIX[kind]
    cls, config, _ = tunix(*which, **changes)
    model = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
    assert_complete(nnx.state(model), rules, shapes, without)


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", [kind for kind in TUNIX if kind != "gemma 1"])
def test_an_adapter_on_tunix_is_its_own_conversion(kind, tunix, tmp_path):
    """tunix reads Gemma 1's norms by Gemma 2's names, and none of its files."""
    from safetensors.numpy import save_file

    which, changes, rules, shapes, _ = TUNIX[kind]
    _, config, loading = tunix(*which, **changes)
    count = iter(range(9))

    def convert(state):
        folder = tmp_path / f"model{next(count)}"
        folder.mkdir()
        save_file(state, folder / "model.safetensors")
        return loading.create_model_from_safe_tensors(str(folder), config, dtype=jnp.float32)

    state = {name: np.float32(0.3) * x for name, x in drawn(shapes, np.float32).items()}
    tied = pytest.warns(UserWarning, match="adapted in both uses") if kind == "llama, tied" else nullcontext()
    with tied:
        base, wrapped = assert_loads(tmp_path, state, convert, rules, 1e-6)

    def fn(model):
        tokens, mask = jnp.asarray([[1, 5, 2, 10, 3]]), jnp.tril(jnp.ones((1, 5, 5), bool))
        return model(tokens, jnp.arange(5)[None], None, mask)[0]

    ours, merged, before = lora_jax.lora(fn)(wrapped), fn(lora_jax.merge(wrapped)), fn(base)
    assert np.abs(ours - merged).max() < 1e-5 * np.abs(merged).max()
    assert np.abs(before - merged).max() > 0.1 * np.abs(merged).max()


@pytest.mark.parametrize("kinds", [("batch", "out", "in", "out"), ("out", "out", "in", "out")])
@pytest.mark.parametrize(("form", "count"), [("BSD,CKDH->CBSKH", 2), ("BTD,SNDH->SBTNH", 3)])
def test_a_fused_weight_runs_in_the_models_own_einsum(kinds, form, count, tmp_path):
    """k_proj and v_proj have an A each (batch), or share one (out)."""
    rng = np.random.default_rng(5)
    w, x = jnp.asarray(rng.standard_normal((count, K, D, H))), jnp.asarray(rng.standard_normal((2, 3, D)))
    path = f"layers/0/attn/{'kv' if count == 2 else 'qkv'}_einsum/w"
    tree = {"layers": [{"attn": {path.split("/")[3]: {"w": w}}}]}
    wrapped = lora_jax.wrap(tree, rank=3, alpha=6, axes={path: kinds}, targets=path, dtype=jnp.float64)
    trainable, frozen = lora_jax.partition(wrapped)
    point = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), trainable)

    def fn(tree):
        return jnp.einsum(form, x, dict(leaves_with_path(tree))[path])

    def both(run):
        def loss(point):
            out = run(lora_jax.combine(point, frozen))
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(point)

    ours, expected = both(lora_jax.lora(fn)), both(lambda tree: fn(lora_jax.merge(tree)))
    for actual, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert actual.shape == theirs.shape
        np.testing.assert_allclose(actual, theirs, rtol=0, atol=1e-12 * (1 + np.abs(theirs).max()))

    wrapped = lora_jax.combine(point, frozen)
    peft.save_peft(wrapped, tmp_path / "adapter", names.tunix_gemma(), None)
    again = peft.load_peft(tmp_path / "adapter", tree, names.tunix_gemma())
    written = peft.read_peft(tmp_path / "adapter").updates
    assert {m.rpartition(".")[2] for m in written} == {f"{x}_proj" for x in ("kv" if count == 2 else "qkv")}
    merged, expected = (values(lora_jax.merge(tree))[path] for tree in (again, wrapped))
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


# MaxText: what its conversion to and from Hugging Face does, written out


def nested(flat):
    tree = {}
    for path, value in flat.items():
        *above, last = path.split("/")
        node = tree
        for name in above:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


def interleaved(kernel):
    """The halves of a head become its even and odd places."""
    out = np.empty_like(kernel)
    out[..., 0::2], out[..., 1::2] = np.split(kernel, 2, axis=-1)
    return out


def maxtext_layer(state, name, norms, query=1.0, rope=lambda x: x):
    """One layer as MaxText has it; `norms` maps its names to Hugging Face's and what is added to them."""

    def kernel(module, *shape):
        return state[f"{name}.{module}.weight"].T.reshape(shape)

    out = {
        "self_attention/query/kernel": rope(kernel("self_attn.q_proj", D, N, H)) * query,
        "self_attention/key/kernel": rope(kernel("self_attn.k_proj", D, K, H)),
        "self_attention/value/kernel": kernel("self_attn.v_proj", D, K, H),
        "self_attention/out/kernel": kernel("self_attn.o_proj", N, H, D),
        "mlp/wi_0/kernel": kernel("mlp.gate_proj", D, F),
        "mlp/wi_1/kernel": kernel("mlp.up_proj", D, F),
        "mlp/wo/kernel": kernel("mlp.down_proj", F, D),
    }
    return out | {ours: state[f"{name}.{theirs}.weight"] + plus for ours, (theirs, plus) in norms.items()}


def stacked(layers, axis):
    return {path: np.stack([layer[path] for layer in layers], axis) for path in layers[0]}


def under(prefix, layer):
    return {f"params/decoder/{prefix}/{path}": value for path, value in layer.items()}


LLAMA_NORMS = {
    "pre_self_attention_layer_norm/scale": ("input_layernorm", 0.0),
    "post_self_attention_layer_norm/scale": ("post_attention_layernorm", 0.0),
}
GEMMA_NORMS = {
    "pre_self_attention_norm/scale": ("input_layernorm", 1.0),
    "post_self_attention_norm/scale": ("post_attention_layernorm", 1.0),
    "pre_ffw_norm/scale": ("pre_feedforward_layernorm", 1.0),
    "post_ffw_norm/scale": ("post_feedforward_layernorm", 1.0),
}


def maxtext_llama(state, scan, rope, axis=1):
    layers = [maxtext_layer(state, f"model.layers.{i}", LLAMA_NORMS, 1 / np.sqrt(H), rope) for i in range(3)]
    if scan:
        flat = under("layers", stacked(layers, axis))
    else:
        flat = {path: x for i, layer in enumerate(layers) for path, x in under(f"layers_{i}", layer).items()}
    flat["params/decoder/decoder_norm/scale"] = state["model.norm.weight"]
    flat["params/decoder/logits_dense/kernel"] = state["lm_head.weight"].T
    flat["params/token_embedder/embedding"] = state["model.embed_tokens.weight"]
    return nested(flat)


@pytest.mark.parametrize("is_interleaved", [True, False])
@pytest.mark.parametrize(("scan", "axis"), [(False, 1), (True, 1), (True, 0)])
def test_llama_of_maxtext(scan, axis, is_interleaved, tmp_path):
    shapes = hub_shapes(3, head=True)
    rules = names.maxtext_llama(H, interleaved=is_interleaved, stack=axis)

    def convert(state):
        return maxtext_llama(state, scan, interleaved if is_interleaved else lambda x: x, axis)

    state = drawn(shapes)
    assert_complete(convert(state), rules, shapes)
    assert_loads(tmp_path, state, convert, rules)
    # The order of a head's numbers is what the argument is for: the other one gives another tree.
    other = names.maxtext_llama(H, interleaved=not is_interleaved, stack=axis)
    wrong = values(lora_jax.merge(peft.load_peft(tmp_path / "in", convert(state), other)))
    right = values(lora_jax.merge(peft.load_peft(tmp_path / "in", convert(state), rules)))
    differ = {path.split("/")[-2] for path in right if not np.allclose(wrong[path], right[path])}
    assert differ == {"query", "key"}


def maxtext_gemma2(state, scan):
    layers = [maxtext_layer(state, f"model.layers.{i}", GEMMA_NORMS, 1 / np.sqrt(H)) for i in range(4)]

    def joined(local, other):
        pairs = ((local, "local"), (other, "global"))
        return {
            "/".join([f"{path.split('/')[0]}_{part}", *path.split("/")[1:]]): x
            for layer, part in pairs
            for path, x in layer.items()
        }

    both = [joined(*layers[i : i + 2]) for i in (0, 2)]
    if scan:
        flat = under("layers", stacked(both, 1))
    else:
        flat = under("layers_0", both[0]) | under("layers_1", both[1])
    flat["params/decoder/decoder_norm/scale"] = state["model.norm.weight"] + 1
    flat["params/token_embedder/embedding"] = state["model.embed_tokens.weight"] * np.sqrt(D)
    return nested(flat)


@pytest.mark.parametrize("scan", [False, True])
def test_gemma_2_of_maxtext(scan, tmp_path):
    shapes, rules = hub_shapes(4, **GEMMA2), names.maxtext_gemma2(4, D, H)
    tree = maxtext_gemma2(drawn(shapes), scan)
    norms = [path for path, _ in leaves_with_path(tree) if path.endswith("scale")]
    assert len(norms) == 1 + (8 if scan else 16)
    assert_complete(tree, rules, shapes, norms)
    assert_loads(tmp_path, drawn(shapes), lambda state: maxtext_gemma2(state, scan), rules)
    # Norms are Hugging Face's plus one, so that none can be saved or loaded.
    trained = lora_jax.wrap(tree, rank=1, targets="wo/kernel|mlp_local/wo/kernel", train="decoder_norm")
    with pytest.raises(ValueError, match="no rule names 'params/decoder/decoder_norm/scale'"):
        peft.save_peft(trained, tmp_path / "norm", rules, None)


def maxtext_gemma3(state, layout, layers):
    prefix = "model.language_model."
    norms = GEMMA_NORMS | {
        "self_attention/query_norm/scale": ("self_attn.q_norm", 1.0),
        "self_attention/key_norm/scale": ("self_attn.k_norm", 1.0),
    }
    made = [maxtext_layer(state, f"{prefix}layers.{i}", norms) for i in range(layers)]
    flat = {}
    if layout == "unscanned":
        for i, layer in enumerate(made):
            flat |= under(f"layers_{i}", layer)
    elif layout == "one stack":
        flat |= under("layers", stacked(made, 1))
    else:
        whole = layers // 6 * 6
        for i in range(6 if whole else 0):
            flat |= under(f"layers/layers_{i}", stacked(made[i:whole:6], 1))
        for i, layer in enumerate(made[whole:]):
            flat |= under(f"layers_remainder/layers_{i}", layer)
    flat["params/decoder/decoder_norm/scale"] = state[f"{prefix}norm.weight"] + 1
    scale = float(jnp.asarray(D**0.5, jnp.bfloat16))
    flat["params/token_embedder/embedding"] = state[f"{prefix}embed_tokens.weight"] * scale
    return nested(flat)


@pytest.mark.parametrize(
    ("layout", "layers"), [("blocks", 14), ("blocks", 12), ("blocks", 2), ("one stack", 3), ("unscanned", 8)]
)
def test_gemma_3_of_maxtext(layout, layers, tmp_path):
    shapes = hub_shapes(layers, "model.language_model.", **GEMMA3)
    rules = names.maxtext_gemma3(layers, D)
    tree = maxtext_gemma3(drawn(shapes), layout, layers)
    norms = [path for path, _ in leaves_with_path(tree) if path.endswith("scale")]
    assert_complete(tree, rules, shapes, norms)
    assert_loads(tmp_path, drawn(shapes), lambda state: maxtext_gemma3(state, layout, layers), rules)


def test_the_embeddings_factor_is_rounded_as_maxtext_rounds_it():
    [piece] = pieces("token_embedder/embedding", (V, 2560), names.maxtext_gemma3(34, 2560))
    assert piece.factor == 50.5  # not 50.596: sqrt(2560) in bfloat16


def test_another_number_of_layers_is_refused():
    rules = names.maxtext_gemma3(14, D)
    with pytest.raises(ValueError, match="has size 3, and names gives 2 names"):
        pieces("decoder/layers/layers_0/mlp/wo/kernel", (F, 3, D), rules)
    with pytest.raises(ValueError, match="has size 3, and names gives 2 names"):
        pieces("decoder/layers/mlp_local/wo/kernel", (F, 3, D), names.maxtext_gemma2(4, D, H))
    # A block that a model of this length does not have has no name.
    assert not pieces("decoder/layers/layers_6/mlp/wo/kernel", (F, 3, D), rules)
    assert not pieces("decoder/layers_remainder/layers_2/mlp/wo/kernel", (F, D), rules)
    assert not pieces("decoder/layers_2/mlp_local/wo/kernel", (F, D), names.maxtext_gemma2(4, D, H))


# What a rule says


def test_an_odd_head_is_refused():
    with pytest.raises(ValueError, match="has size 7, which pair times half does not give"):
        pieces("decoder/layers_0/self_attention/query/kernel", (D, N, 7), names.maxtext_llama(7))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("dense", "no layout of the kind 'dense'"),
        ("linear: i o", "cannot be read"),
        ("linear: i, o -> o i", "cannot be read"),
        ("linear: i i -> i", "on one side twice"),
        ("linear: i o -> o k", "is torch's alone"),
        ("linear: n i o -> o i", "neither torch's nor in the name's braces"),
        ("linear: i o -> (i o)", "has 2 axes"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(layout, message):
    with pytest.raises(ValueError, match=message):
        Rule("w", "w.weight", layout)


def test_two_leaves_of_one_name_are_refused():
    tree = {"a": {"kernel": np.ones((2, 3))}, "b": {"kernel": np.ones((2, 3))}}
    with pytest.raises(ValueError, match="give one name, 'w.weight', to 'a/kernel' and to 'b/kernel'"):
        named(tree, [Rule("kernel", "w.weight")])


def test_no_rule_that_matches_is_refused():
    with pytest.raises(ValueError, match="none of the 1 rules matches a path.*'a/kernel'"):
        named({"a": {"kernel": np.ones((2, 3))}}, [Rule("kernels", "w.weight")])


def test_a_piece_goes_into_its_leaf_and_out_again():
    rng = np.random.default_rng(6)
    rule = Rule("w", "{n}.{c}.weight", "linear: d n (c o t) -> (t o) d", {"c": ("k", "v")}, {"t": 2}, 0.25)
    leaf = rng.standard_normal((5, 3, 12))
    parts = pieces("w", leaf.shape, [rule])
    again = np.zeros_like(leaf)
    for piece in parts:
        n, c = int(piece.name[0]), "kv".index(piece.name[2])
        expected = leaf[:, n].reshape(5, 2, 3, 2)[:, c].transpose(2, 1, 0).reshape(6, 5) * 4
        np.testing.assert_array_equal(piece.of(leaf), expected)
        piece.put(again, expected)
    np.testing.assert_array_equal(again, leaf)
