"""What a model's leaves are called elsewhere: rules from paths to the parameters of a torch model."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.tree import leaves_with_path, nearest
from lora_jax.weight import is_wrapped_leaf

# The axes of a leaf as this library's users have it, and of the parameter as torch has it.
LAYOUTS = {
    "linear": "i o -> o i",
    "conv1d": "i o -> i o",
    "embedding": "v d -> v d",
    "conv2d": "h w i o -> o i h w",
    "plain": "... -> ...",
}


@dataclass(frozen=True)
class Rule:
    r"""How the leaves at some paths are named and laid out in a torch model.

    A layout is a kind and, where the leaf's axes are not that kind's own, the axes of the leaf and
    of torch's parameter, written as in einops: `"linear: d n h -> (n h) d"` is an attention kernel
    of three axes that torch holds as a matrix. The kinds, and what they stand for alone:

        linear      i o -> o i              torch.nn.Linear
        conv1d      i o -> i o              the Conv1D of GPT-2
        embedding   v d -> v d              torch.nn.Embedding
        conv2d      h w i o -> o i h w      torch.nn.Conv2d
        plain       the same axes           biases, norms

    An axis of the leaf that torch's parameter does not have counts several of them, and stands in
    the name in braces: `layers` in `"linear: layers i o -> o i"` and `model.layers.{layers}.fc.weight`.
    The braces hold its index, or the entry of `names`. A leaf's axis in parentheses is split, with
    all sizes but one from `names` and `sizes`.

    Attributes:
        pattern: A regular expression that the end of the path matches, from the start of a segment.
        name: The parameter's name in torch; `\1` stands for the pattern's first group.
        layout: The kind, and the axes if they are not the kind's own.
        names: For an axis in the name's braces what stands for 0, 1, ...: {"c": ("k_proj", "v_proj")}.
        sizes: The sizes of axes in parentheses.
        factor: What torch's parameter is multiplied by to give the leaf.

    Raises:
        ValueError: the pattern is no regular expression, or the layout cannot be read.

    >>> rule = Rule(r"blocks/qkv/kernel", "blocks.{n}.{c}.weight", "linear: n d (c o) -> o d",
    ...             names={"c": ("q", "k", "v")})
    >>> [piece.name for piece in pieces("blocks/qkv/kernel", (2, 8, 24), [rule])]  # doctest: +ELLIPSIS
    ['blocks.0.q.weight', 'blocks.0.k.weight', ..., 'blocks.1.v.weight']
    """

    pattern: str
    name: str
    layout: str = "linear"
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    factor: float = 1.0

    def __post_init__(self) -> None:
        try:
            self.matcher  # noqa: B018
        except re.error as error:
            raise ValueError(f"{self}: the pattern is not a regular expression: {error}.") from None
        try:
            re.compile(f"(?:{self.pattern})|").sub(self.name, "")
        except (re.error, IndexError) as error:
            raise ValueError(f"{self}: the name refers to no group of the pattern: {error}.") from None
        self.axes  # noqa: B018

    @functools.cached_property
    def matcher(self) -> re.Pattern[str]:
        """The compiled pattern."""
        return re.compile(rf"(?:^|(?<=/))(?:{self.pattern})$")

    @property
    def kind(self) -> str:
        """What torch's module is: the first word of the layout."""
        return self.layout.partition(":")[0].strip()

    @functools.cached_property
    def axes(self) -> tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]:
        """The axes of the leaf and of torch's parameter, each a tuple of names."""
        if self.kind not in LAYOUTS:
            raise ValueError(
                f"{self}: there is no layout of the kind {self.kind!r}; write one of {', '.join(LAYOUTS)}, "
                "and perhaps the axes: 'linear: d n h -> (n h) d'."
            )
        text = self.layout.partition(":")[2].strip() or LAYOUTS[self.kind]
        halves = [_parsed(half) for half in text.split("->")]
        if len(halves) != 2 or None in halves:
            raise ValueError(f"{self}: the axes {text!r} cannot be read; write them as 'd n h -> (n h) d'.")
        leaf, torch = halves
        assert leaf is not None and torch is not None
        ours, theirs = list(itertools.chain(*leaf)), list(itertools.chain(*torch))
        twice = [axis for axis in ours if ours.count(axis) > 1 or theirs.count(axis) > 1]
        unknown = [axis for axis in theirs if axis not in ours]
        unnamed = [axis for axis in ours if axis not in theirs and "{" + axis + "}" not in self.name]
        braces = [axis for axis in re.findall(r"{(.*?)}", self.name) if axis not in ours or axis in theirs]
        wrong = {"is on one side twice": twice, "is torch's alone": unknown}
        wrong["is in the name's braces and no axis of the leaf's alone"] = braces
        wrong["is neither torch's nor in the name's braces"] = unnamed
        for what, which in wrong.items():
            if which:
                raise ValueError(f"{self}: the axis {which[0]!r} in {text!r} {what}.")
        expected = {"linear": 2, "conv1d": 2, "embedding": 2, "conv2d": 4}.get(self.kind, len(torch))
        if len(torch) != expected:
            raise ValueError(
                f"{self}: torch's parameter has {expected} axes, and {text!r} gives {len(torch)}."
            )
        return leaf, torch

    def __str__(self) -> str:
        return f"Rule({self.pattern!r}, {self.name!r}, {self.layout!r})"


def _parsed(text: str) -> tuple[tuple[str, ...], ...] | None:
    """`d (n h)` as (("d",), ("n", "h")); None where that is not how it is written."""
    groups = re.findall(r"\(([^()]*)\)|(\w+|\.\.\.)", text)
    if re.sub(r"\([\w\s]*\)|\w+|\.\.\.|\s", "", text) or re.search(r"\b\d", text):
        return None
    return tuple(tuple(many.split()) if not one else (one,) for many, one in groups)


@dataclass(frozen=True)
class Piece:
    """One parameter of a torch model, and the part of a leaf that it is.

    Attributes:
        name: Its name.
        kind: What its module is: linear, conv1d, embedding, conv2d or plain.
        path: The leaf's path.
        leaf: The axes of the leaf as (name, size) pairs, a tuple for every axis.
        torch: The names of torch's axes, a tuple for every axis.
        index: For every axis that torch's parameter does not have, this one's place along it.
        factor: What torch's parameter is multiplied by to give its part of the leaf.
    """

    name: str
    kind: str
    path: str
    leaf: tuple[tuple[tuple[str, int], ...], ...]
    torch: tuple[tuple[str, ...], ...]
    index: Mapping[str, int]
    factor: float

    @functools.cached_property
    def size(self) -> dict[str, int]:
        """The size of every axis by name."""
        return dict(itertools.chain(*self.leaf))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of torch's parameter."""
        return tuple(math.prod(self.size[axis] for axis in group) for group in self.torch)

    @property
    def module(self) -> str:
        """The name of the module that holds the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def inner(self) -> tuple[str, ...]:
        """The in axes in torch's order."""
        match self.kind:
            case "linear":
                return self.torch[1]
            case "conv1d" | "embedding":
                return self.torch[0]
        return tuple(itertools.chain(*self.torch[1:]))

    @property
    def outer(self) -> tuple[str, ...]:
        """The out axes in torch's order."""
        return self.torch[1] if self.kind in ("conv1d", "embedding") else self.torch[0]

    def of(self, leaf: Any) -> np.ndarray:
        """Torch's parameter, from the whole leaf.

        >>> rule = Rule("w", "w.{n}", "linear: n i o -> o i")
        >>> leaf = np.arange(12).reshape(2, 2, 3)
        >>> pieces("w", leaf.shape, [rule])[1].of(leaf).tolist()
        [[6, 9], [7, 10], [8, 11]]
        """
        part = np.asarray(leaf).reshape(tuple(self.size.values()))[self._place]
        return _divided(self._ordered(part), self.factor)

    def put(self, leaf: np.ndarray, parameter: np.ndarray) -> None:
        """Write torch's parameter into its part of the leaf, in place; the leaf must be contiguous."""
        kept = [axis for axis in self.size if axis not in self.index]
        order = list(itertools.chain(*self.torch))
        part = parameter.reshape([self.size[axis] for axis in order])
        part = part.transpose([order.index(axis) for axis in kept])
        if self.factor != 1.0:
            part = (part.astype(np.float64) * self.factor).astype(leaf.dtype)
        if not leaf.flags.c_contiguous:
            raise ValueError(
                f"the array for {self.path!r} is not contiguous, so no part can be written into it."
            )
        leaf.reshape(tuple(self.size.values()))[self._place] = part

    @property
    def _place(self) -> tuple[Any, ...]:
        return tuple(self.index.get(axis, slice(None)) for axis in self.size)

    def _ordered(self, part: np.ndarray) -> np.ndarray:
        kept = [axis for axis in self.size if axis not in self.index]
        order = itertools.chain(*self.torch)
        return part.transpose([kept.index(axis) for axis in order]).reshape(self.shape)


def _divided(x: np.ndarray, factor: float) -> np.ndarray:
    return x if factor == 1.0 else (x.astype(np.float64) / factor).astype(x.dtype)


def pieces(path: str, shape: Sequence[int], rules: Iterable[Rule]) -> list[Piece]:
    r"""The parameters of a torch model that one leaf is, by the first rule that matches its path.

    Args:
        path: The leaf's path.
        shape: Its shape.
        rules: The rules.

    Returns:
        A `Piece` for each; none where no rule matches.

    Raises:
        ValueError: the shape does not fit the rule's layout.

    >>> [piece] = pieces("h_3/mlp/c_fc/kernel", (8, 32), [Rule(r"h_(\d+)/mlp/(\w+)/kernel",
    ...     r"transformer.h.\1.mlp.\2.weight", "conv1d")])
    >>> piece.name, piece.shape
    ('transformer.h.3.mlp.c_fc.weight', (8, 32))
    """
    for rule in rules:
        found = rule.matcher.search(path)
        if found is None:
            continue
        groups, torch = rule.axes
        if any("..." in group for group in groups):
            names = tuple((f"axis_{i}",) for i in range(len(shape)))
            groups, torch = names, names
        leaf = _sized(rule, path, groups, tuple(shape))
        sizes = dict(itertools.chain(*leaf))
        counted = [axis for axis in sizes if axis not in itertools.chain(*torch)]
        for axis in counted:
            if axis in rule.names and len(rule.names[axis]) != sizes[axis]:
                raise ValueError(
                    f"{rule}: the axis {axis!r} of {path!r} has size {sizes[axis]}, and names gives "
                    f"{len(rule.names[axis])} names for it."
                )
        template = found.expand(rule.name)
        made = []
        for place in itertools.product(*(range(sizes[axis]) for axis in counted)):
            index = dict(zip(counted, place, strict=True))
            shown = {axis: rule.names[axis][i] if axis in rule.names else i for axis, i in index.items()}
            name = re.sub(r"{(\w+)}", lambda found: str(shown[found[1]]), template)  # noqa: B023
            made.append(Piece(name, rule.kind, path, leaf, torch, index, rule.factor))
        return made
    return []


def _sized(
    rule: Rule, path: str, groups: tuple[tuple[str, ...], ...], shape: tuple[int, ...]
) -> tuple[tuple[tuple[str, int], ...], ...]:
    if len(groups) != len(shape):
        raise ValueError(
            f"{rule}: {path!r} has shape {shape}, and the layout has {len(groups)} axes. Write a rule for "
            "it before this one."
        )
    known = {axis: len(names) for axis, names in rule.names.items()} | dict(rule.sizes)
    found = []
    for group, size in zip(groups, shape, strict=True):
        unknown = [axis for axis in group if axis not in known] if len(group) > 1 else list(group)
        rest = math.prod(known[axis] for axis in group if axis not in unknown)
        if len(unknown) > 1:
            raise ValueError(
                f"{rule}: an axis of {path!r} is made of {' and '.join(group)}; give the sizes of all but "
                f"one: sizes={{{unknown[0]!r}: ...}}."
            )
        if size % rest or (not unknown and rest != size):
            raise ValueError(
                f"{rule}: an axis of {path!r} has size {size}, which {' times '.join(group)} does not give."
            )
        found.append(tuple((axis, size // rest if axis in unknown else known[axis]) for axis in group))
    return tuple(found)


def checked(rules: Any) -> list[Rule]:
    """The rules as a list, or an error that says what was given in their place."""
    if callable(rules):
        raise TypeError(f"rules is the function {getattr(rules, '__name__', rules)}; call it: rules=...().")
    found = list(rules) if isinstance(rules, Iterable) else [rules]
    if isinstance(rules, Rule) or not all(isinstance(rule, Rule) for rule in found):
        raise TypeError(
            f"rules is {rules!r}; write a list of lora_jax.names.Rule, or a rule set such as llama()."
        )
    return found


def named(tree: Any, rules: Iterable[Rule]) -> dict[str, list[Piece]]:
    r"""By path, what the leaves of a tree are called in a torch model; paths without a rule are left out.

    Args:
        tree: Parameters, plain or wrapped, or their shapes.
        rules: The rules; the first that matches a path counts.

    Raises:
        ValueError: two leaves, or two parts of one, have the same name; a shape does not fit its rule;
            or no leaf has a rule.

    >>> import jax
    >>> tree = {"h_0": {"mlp": {"c_fc": {"kernel": jax.ShapeDtypeStruct((8, 32), "float32")}}}}
    >>> rule = Rule(r"h_(\d+)/mlp/(\w+)/kernel", r"transformer.h.\1.mlp.\2.weight", "conv1d")
    >>> {path: [p.name for p in parts] for path, parts in named(tree, [rule]).items()}
    {'h_0/mlp/c_fc/kernel': ['transformer.h.0.mlp.c_fc.weight']}
    """
    rules = checked(rules)
    found: dict[str, list[Piece]] = {}
    owner: dict[str, str] = {}
    paths = []
    for path, leaf in leaves_with_path(tree, is_wrapped_leaf):
        if not hasattr(leaf, "shape"):
            continue
        paths.append(path)
        parts = pieces(path, tuple(leaf.shape), rules)
        for piece in parts:
            if piece.name in owner:
                raise ValueError(
                    f"the rules give one name, {piece.name!r}, to {owner[piece.name]!r} and to {path!r}. "
                    "Make a pattern narrower, or give the part of the tree that the names are for."
                )
            owner[piece.name] = path
        if parts:
            found[path] = parts
    if not found:
        close = nearest(rules[0].pattern, paths) if rules else paths[:5]
        raise ValueError(
            f"none of the {len(rules)} rules matches a path of this tree. The paths nearest to the first "
            f"rule's pattern are {', '.join(map(repr, close)) or '(the tree is empty)'}. Write rules for "
            "them: lora_jax.names.Rule(pattern, name, layout)."
        )
    return found


# --- Rule sets ---------------------------------------------------------------------------------------


def gpt2(prefix: str = "transformer.", stack: int = 0) -> list[Rule]:
    """The Hugging Face names of GPT-2, for leaves such as `h_0/attn/c_attn/kernel`.

    Layers are found under `h_0` or `h/0`, and stacked ones under `h` with their axis at `stack`.

    Args:
        prefix: What stands before the names of all but the heads; "" for the bare GPT2Model.
        stack: The axis of stacked layers.

    >>> pieces("h_3/mlp/c_fc/kernel", (8, 32), gpt2())[0].name
    'transformer.h.3.mlp.c_fc.weight'
    """
    norms = [("ln_1", "norm"), ("ln_2", "norm")]
    linear = [(name, "conv1d") for name in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")]
    return [
        *_layers("h", prefix, norms + linear, stack),
        *_modules(prefix, [("wte", "embedding"), ("wpe", "embedding"), ("ln_f", "norm")]),
        *_modules("", [("lm_head", "linear"), ("score", "linear")]),
    ]


def bert(prefix: str = "bert.", stack: int = 0) -> list[Rule]:
    """The Hugging Face names of BERT and RoBERTa, for leaves such as `encoder/layer_0/output/dense/kernel`.

    Args:
        prefix: What stands before the names of all but the heads: "roberta." for RoBERTa, and "" for an
            encoder alone, such as a sentence encoder.
        stack: The axis of stacked layers, under `encoder/layer`.

    >>> pieces("encoder/layer_0/attention/self/query/kernel", (8, 8), bert())[0].name
    'bert.encoder.layer.0.attention.self.query.weight'
    """
    linear = [f"attention/self/{name}" for name in ("query", "key", "value")]
    linear += ["attention/output/dense", "intermediate/dense", "output/dense"]
    norms = ["attention/output/LayerNorm", "output/LayerNorm"]
    tables = [f"embeddings/{name}_embeddings" for name in ("word", "position", "token_type")]
    heads = ["classifier", "classifier/dense", "classifier/out_proj", "regressor", "qa_outputs"]
    heads += ["cls/predictions/transform/dense", "cls/seq_relationship", "lm_head/dense"]
    return [
        *_layers("encoder/layer", prefix, _each(linear, "linear") + _each(norms, "norm"), stack),
        *_modules(prefix, _each(tables, "embedding") + [("embeddings/LayerNorm", "norm")]),
        *_modules(prefix, [("pooler/dense", "linear")]),
        *_modules("", _each(heads, "linear")),
        *_modules("", _each(["cls/predictions/transform/LayerNorm", "lm_head/layer_norm"], "norm")),
        Rule("cls/predictions/bias", "cls.predictions.bias", "plain"),
        Rule("lm_head/bias", "lm_head.bias", "plain"),
    ]


def llama(prefix: str = "model.", stack: int = 0) -> list[Rule]:
    """The Hugging Face names of Llama, Mistral and Qwen, for leaves such as `layers_0/mlp/up_proj/kernel`.

    Args:
        prefix: What stands before the names of all but the heads; "" for the bare LlamaModel.
        stack: The axis of stacked layers, under `layers`.

    >>> [p.name for p in pieces("layers/mlp/up_proj/kernel", (2, 8, 32), llama())]
    ['model.layers.0.mlp.up_proj.weight', 'model.layers.1.mlp.up_proj.weight']
    """
    linear = [f"self_attn/{name}_proj" for name in "qkvo"]
    linear += [f"mlp/{name}_proj" for name in ("gate", "up", "down")]
    norms = ["input_layernorm", "post_attention_layernorm", "self_attn/q_norm", "self_attn/k_norm"]
    return [
        *_layers("layers", prefix, _each(linear, "linear") + _each(norms, "norm"), stack),
        *_modules(prefix, [("embed_tokens", "embedding"), ("norm", "norm")]),
        *_modules("", [("lm_head", "linear"), ("score", "linear")]),
    ]


def _each(modules: Iterable[str], kind: str) -> list[tuple[str, str]]:
    return [(module, kind) for module in modules]


def _parameters(kind: str) -> list[tuple[str, str, str]]:
    """The parameters of a module of a kind: the leaf's name, torch's, and the layout."""
    if kind == "norm":
        return [("scale", "weight", "plain"), ("bias", "bias", "plain")]
    if kind == "embedding":
        return [("embedding", "weight", "embedding")]
    return [("kernel", "weight", kind), ("bias", "bias", "plain")]


def _modules(prefix: str, modules: Iterable[tuple[str, str]]) -> list[Rule]:
    return [
        Rule(f"{module}/{ours}", f"{prefix}{module.replace('/', '.')}.{theirs}", layout)
        for module, kind in modules
        for ours, theirs, layout in _parameters(kind)
    ]


def _layers(where: str, prefix: str, modules: Sequence[tuple[str, str]], stack: int) -> list[Rule]:
    found = []
    at = prefix + where.replace("/", ".")
    for module, kind in modules:
        dotted = module.replace("/", ".")
        for ours, theirs, layout in _parameters(kind):
            found.append(Rule(rf"{where}[_/](\d+)/{module}/{ours}", rf"{at}.\1.{dotted}.{theirs}", layout))
            name = f"{at}.{{layers}}.{dotted}.{theirs}"
            found.append(Rule(f"{where}/{module}/{ours}", name, _stacked(layout, stack)))
    return found


def _stacked(layout: str, stack: int) -> str:
    """A layout with the axis `layers` in the leaf at some place."""
    kind, _, axes = layout.partition(":")
    leaf, torch = (axes or ("d -> d" if kind == "plain" else LAYOUTS[kind])).split("->")
    ours = re.findall(r"\([^()]*\)|\S+", leaf)
    ours.insert(stack, "layers") if stack >= 0 else ours.insert(len(ours) + 1 + stack, "layers")
    return f"{kind}: {' '.join(ours)} ->{torch}"


_IN_HEADS, _OUT_OF_HEADS = "linear: d n h -> (n h) d", "linear: n h d -> d (n h)"


def tunix_llama(prefix: str = "model.") -> list[Rule]:
    """The Hugging Face names of Llama for tunix's trees (0.1.7), `layers/0/attn/q_proj/w` and so on.

    Args:
        prefix: What stands before the names of all but the head; "" for the bare LlamaModel.

    >>> pieces("layers/0/attn/o_proj/w", (4, 16, 64), tunix_llama())[0].name
    'model.layers.0.self_attn.o_proj.weight'
    """
    at = f"{prefix}layers.\\1."
    return [
        *(Rule(rf"layers/(\d+)/attn/{x}_proj/w", f"{at}self_attn.{x}_proj.weight", _IN_HEADS) for x in "qkv"),
        Rule(r"layers/(\d+)/attn/o_proj/w", f"{at}self_attn.o_proj.weight", _OUT_OF_HEADS),
        Rule(r"layers/(\d+)/mlp/(gate|up|down)_proj/kernel", rf"{at}mlp.\2_proj.weight"),
        Rule(r"layers/(\d+)/(input|post_attention)_layernorm/w", rf"{at}\2_layernorm.weight", "plain"),
        Rule("embedder/input_embedding", f"{prefix}embed_tokens.weight", "embedding"),
        Rule("final_norm/w", f"{prefix}norm.weight", "plain"),
        Rule("lm_head/w", "lm_head.weight"),
    ]


def tunix_gemma(prefix: str = "model.") -> list[Rule]:
    """The Hugging Face names of Gemma 1, 2 and 3 for tunix's trees (0.1.7), without the vision tower.

    `kv_einsum` holds k_proj and v_proj, and `qkv_einsum` all three. `pre_ffw_norm` has no name: it is
    pre_feedforward_layernorm of Gemma 2 and 3, and post_attention_layernorm of Gemma 1, so training it
    takes a rule of your own.

    Args:
        prefix: What stands before the names; "model.language_model." for Gemma 3 with images.

    >>> [p.name for p in pieces("layers/0/attn/kv_einsum/w", (2, 1, 64, 16), tunix_gemma(""))]
    ['layers.0.self_attn.k_proj.weight', 'layers.0.self_attn.v_proj.weight']
    """
    at = f"{prefix}layers.\\1."
    norms = {
        "pre_attention_norm": "input_layernorm",
        "post_attn_norm": "post_attention_layernorm",  # Gemma 2
        "post_attention_norm": "post_attention_layernorm",  # Gemma 3
        "post_ffw_norm": "post_feedforward_layernorm",
        "attn/_query_norm": "self_attn.q_norm",
        "attn/_key_norm": "self_attn.k_norm",
    }
    fused = [
        Rule(
            rf"layers/(\d+)/attn/{x}_einsum/w",
            f"{at}self_attn.{{c}}_proj.weight",
            "linear: c n d h -> (n h) d",
            {"c": tuple(x)},
        )
        for x in ("kv", "qkv")
    ]
    return [
        Rule(r"layers/(\d+)/attn/q_einsum/w", f"{at}self_attn.q_proj.weight", "linear: n d h -> (n h) d"),
        *fused,
        Rule(r"layers/(\d+)/attn/attn_vec_einsum/w", f"{at}self_attn.o_proj.weight", _OUT_OF_HEADS),
        Rule(r"layers/(\d+)/mlp/(gate|up|down)_proj/kernel", rf"{at}mlp.\2_proj.weight"),
        *(Rule(rf"layers/(\d+)/{ours}/scale", f"{at}{x}.weight", "plain") for ours, x in norms.items()),
        Rule("embedder/input_embedding", f"{prefix}embed_tokens.weight", "embedding"),
        Rule("final_norm/scale", f"{prefix}norm.weight", "plain"),
        Rule("score/kernel", "score.weight"),
    ]


def maxtext_llama(
    head_dim: int, *, interleaved: bool = True, prefix: str = "model.", stack: int = 1
) -> list[Rule]:
    """The Hugging Face names of Llama and Mistral for MaxText's trees, scanned or not.

    MaxText divides the query kernel by sqrt(head_dim). Its rotary embedding for Llama 3.1 and later
    (rope_type "llama3.1") pairs neighbours, and Hugging Face's the two halves of a head, so query and
    key are reordered; the one for Llama 2, Llama 3 and Mistral (rope_type "default") pairs halves too.
    Scanned layers stand at `param_scan_axis` of every leaf, norms (d, layers) among them.

    Args:
        head_dim: The size of a head.
        interleaved: Whether the rotary embedding pairs neighbours: False for Llama 2, Llama 3, Mistral.
        prefix: What stands before the names of all but the head.
        stack: MaxText's `param_scan_axis`.

    >>> piece = pieces("decoder/layers/self_attention/query/kernel", (8, 3, 2, 4), maxtext_llama(4))[2]
    >>> piece.name, piece.shape
    ('model.layers.2.self_attn.q_proj.weight', (8, 8))
    """
    rotary = "linear: d n (pair half) -> (n half pair) d" if interleaved else _IN_HEADS
    norms = {"pre": "input_layernorm", "post": "post_attention_layernorm"}
    layer = [
        *_maxtext_kernels("", head_dim**-0.5, rotary),
        *((f"{ours}_self_attention_layer_norm/scale", x, "plain", 1.0) for ours, x in norms.items()),
    ]
    return [
        *_maxtext_layers("decoder/layers", layer, prefix, stack),
        *_maxtext_layers(r"decoder/layers_(\d+)", layer, prefix, None),
        Rule("token_embedder/embedding", f"{prefix}embed_tokens.weight", "embedding"),
        Rule("decoder/decoder_norm/scale", f"{prefix}norm.weight", "plain"),
        Rule("decoder/logits_dense/kernel", "lm_head.weight"),
    ]


def maxtext_gemma2(
    layers: int, width: int, head_dim: int, *, prefix: str = "model.", stack: int = 1
) -> list[Rule]:
    """The Hugging Face names of Gemma 2 for MaxText's trees, scanned or not.

    A layer there is two of Hugging Face's: its local part is layer 2i, its global part 2i + 1. MaxText
    divides the query kernels by sqrt(head_dim) and multiplies the embedding by sqrt(width). Its norms are
    Hugging Face's plus one, which no rule can say: they have no name, and one that is trained or loaded
    is refused. MaxText may pad the vocabulary (256,128 rows for 256,000); such a table is refused by its
    shape.

    Args:
        layers: Hugging Face's number of layers.
        width: The width of the model.
        head_dim: The square of what the query kernels are divided by: the size of a head, as MaxText's
            conversion from Hugging Face has it; its older one divides those of 27B by 12 (head_dim=144).
        prefix: What stands before the names.
        stack: MaxText's `param_scan_axis`.

    >>> rules = maxtext_gemma2(4, 8, 4)
    >>> [p.name for p in pieces("decoder/layers/mlp_global/wo/kernel", (16, 2, 8), rules)]
    ['model.layers.1.mlp.down_proj.weight', 'model.layers.3.mlp.down_proj.weight']
    """
    found = []
    for offset, part in enumerate(("_local", "_global")):
        layer = _maxtext_kernels(part, head_dim**-0.5, _IN_HEADS)
        theirs = range(offset, layers, 2)
        found += _maxtext_layers("decoder/layers", layer, prefix, stack, theirs)
        for i, n in enumerate(theirs):
            found += _maxtext_layers(f"decoder/layers_{i}", layer, prefix, None, [n])
    return [*found, _maxtext_table(prefix, math.sqrt(width))]


def maxtext_gemma3(
    layers: int, width: int, *, prefix: str = "model.language_model.", stack: int = 1
) -> list[Rule]:
    """The Hugging Face names of Gemma 3 for MaxText's trees, scanned or not, without the vision tower.

    Scanned are blocks of six layers, `layers/layers_0` to `layers_5`, with the rest under
    `layers_remainder`; older checkpoints, whose layers are one stack, are read as well. The embedding is
    multiplied by sqrt(width) rounded to bfloat16, as MaxText's conversion from Hugging Face has it. Norms
    and padded vocabularies: as for `maxtext_gemma2`.

    Args:
        layers: The number of layers.
        width: The width of the model.
        prefix: What stands before the names; "model." for a model of text alone.
        stack: MaxText's `param_scan_axis`.

    >>> rules = maxtext_gemma3(14, 8, prefix="model.")
    >>> [p.name for p in pieces("decoder/layers/layers_1/mlp/wo/kernel", (16, 2, 8), rules)]
    ['model.layers.1.mlp.down_proj.weight', 'model.layers.7.mlp.down_proj.weight']
    """
    block = 6
    whole = layers - layers % block
    layer = _maxtext_kernels("", 1.0, _IN_HEADS)
    found = []
    for i in range(block):
        theirs = range(i, whole, block)
        found += _maxtext_layers(f"decoder/layers/layers_{i}", layer, prefix, stack, theirs)
    for i in range(layers - whole):
        where = f"decoder/layers_remainder/layers_{i}"
        found += _maxtext_layers(where, layer, prefix, None, [whole + i])
    return [
        *found,
        *_maxtext_layers("decoder/layers", layer, prefix, stack, range(layers)),
        *_maxtext_layers(r"decoder/layers_(\d+)", layer, prefix, None),
        _maxtext_table(prefix, float(jnp.dtype(jnp.bfloat16).type(math.sqrt(width)))),
    ]


def _maxtext_table(prefix: str, factor: float) -> Rule:
    return Rule("token_embedder/embedding", f"{prefix}embed_tokens.weight", "embedding", factor=factor)


def _maxtext_kernels(part: str, query: float, rotary: str) -> list[tuple[str, str, str, float]]:
    """Of a layer's kernels the path, torch's name, the layout and the factor."""
    attention, mlp = f"self_attention{part}", f"mlp{part}"
    return [
        (f"{attention}/query/kernel", "self_attn.q_proj", rotary, query),
        (f"{attention}/key/kernel", "self_attn.k_proj", rotary, 1.0),
        (f"{attention}/value/kernel", "self_attn.v_proj", _IN_HEADS, 1.0),
        (f"{attention}/out/kernel", "self_attn.o_proj", _OUT_OF_HEADS, 1.0),
        (f"{mlp}/wi_0/kernel", "mlp.gate_proj", "linear", 1.0),
        (f"{mlp}/wi_1/kernel", "mlp.up_proj", "linear", 1.0),
        (f"{mlp}/wo/kernel", "mlp.down_proj", "linear", 1.0),
    ]


def _maxtext_layers(
    where: str,
    modules: Iterable[tuple[str, str, str, float]],
    prefix: str,
    stack: int | None,
    numbers: Sequence[int] | None = None,
) -> list[Rule]:
    """Rules for layers stacked at an axis, or for one, whose number is given or the path's first group."""
    stacked = stack is not None
    names = {"layers": tuple(map(str, numbers))} if stacked and numbers is not None else {}
    number = "{layers}" if stacked else r"\1" if numbers is None else str(numbers[0])
    sizes = {"half": 2}
    return [
        Rule(
            f"{where}/{ours}",
            f"{prefix}layers.{number}.{theirs}.weight",
            layout if stack is None else _stacked(layout, stack),
            names,
            sizes if "half" in layout else {},
            factor,
        )
        for ours, theirs, layout, factor in modules
    ]
