"""Adapters made by PEFT and loralib, and what they and torch compute from them, for tests that have neither.

    pip install torch==2.13.0
    pip install peft==0.21.2 transformers==5.23.0 loralib==0.1.2
    python -m experiments.peft.record                        # writes tests/fixtures/peft_*

A folder holds the base (`base.safetensors`, or what transformers saves), the adapter as PEFT saves it
after FIRST steps of AdamW, and `record.npz`: inputs x0, x1, ..., the targets, the logits of the base, of the
adapted and of the merged model, and the losses of STEPS further steps from a fresh AdamW. The loss is the
mean squared difference of logits and targets.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import loralib
import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import peft

FIXTURES = Path(__file__).parents[2] / "tests" / "fixtures"
FIRST, STEPS = 5, 20
RATE, DECAY = 0.02, 0.1


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return x + self.fc2(torch.tanh(self.fc1(x)))


class Blocks(nn.Module):
    """Three residual blocks and a head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Table(nn.Module):
    """A table of vectors and a layer."""

    def __init__(self):
        super().__init__()
        self.table, self.fc = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(torch.tanh(self.table(x)))


class Images(nn.Module):
    """Two convolutions with a stride and padding, and a head; channels first, as torch has them."""

    def __init__(self, **more: Any):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(4, 6, (3, 2), **more)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(self.conv2(torch.tanh(self.conv1(x))))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """One head of attention, with its three products apart."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(5, 4, bias=False) for _ in range(3))
        self.o = nn.Linear(4, 3)

    def forward(self, x):
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1)
        return self.o(weights @ self.v(x))


def gpt2() -> nn.Module:
    """A tiny GPT-2."""
    sizes = {"vocab_size": 23, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": 12}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **off))


def bert() -> nn.Module:
    """A tiny BERT that classifies."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    sizes |= {"vocab_size": 23, "max_position_embeddings": 8, "num_labels": 3}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **off))


def llama(**more: Any) -> nn.Module:
    """A tiny Llama, four heads on two of keys and values."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 23, "intermediate_size": 12, "max_position_embeddings": 16}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **more))


def _numbers(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(*shape)


def _tokens(most: int, *shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randint(most, shape)


@dataclass(frozen=True)
class Case:
    """A model, what it is given, and the config of its adapter."""

    model: Callable[[], nn.Module]
    x: Callable[[], torch.Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    adapter: str = "default"


def _blocks(adapter: str = "default", **config: Any) -> Case:
    return Case(Blocks, _numbers(5, 4), {"r": 2, "lora_alpha": 3, **config}, adapter)


CASES = {
    "linear": _blocks(target_modules=["fc1", "fc2"]),
    "bias_all": _blocks(target_modules=["fc1"], bias="all"),
    "lora_only": _blocks(target_modules=["fc1", "head"], bias="lora_only"),
    "saved": _blocks(target_modules=["fc1", "fc2"], modules_to_save=["head"]),
    "saved_bias_all": _blocks(target_modules=["fc2"], modules_to_save=["head"], bias="all"),
    "patterns": _blocks(
        target_modules=["fc1", "fc2"],
        rank_pattern={"layers.1.fc1": 3, r"^layers\.\d\.fc2": 1},
        alpha_pattern={"0.fc1": 5, "fc2": 7},
    ),
    "rslora": _blocks(target_modules=["fc1", "fc2"], use_rslora=True, rank_pattern={"fc2": 3}),
    "other": _blocks("other", target_modules=["fc1", "fc2"]),
    "regex": _blocks(target_modules=r"layers\.[02]\.fc[12]|head", exclude_modules=["layers.2.fc1"]),
    "layers": _blocks(target_modules=["fc1", "fc2"], layers_to_transform=[2], layers_pattern="layers"),
    "all_linear": _blocks(target_modules="all-linear", init_lora_weights="gaussian"),
    "embedding": Case(Table, _tokens(7, 4, 3), {"r": 2, "target_modules": ["table", "fc"]}),
    "conv2d": Case(
        Images, _numbers(2, 3, 9, 8), {"r": 2, "lora_alpha": 4, "target_modules": ["conv1", "conv2", "head"]}
    ),
    "fused": Case(
        Attention,
        _numbers(3, 4, 5),
        {"r": 2, "target_modules": ["q", "v", "o"], "rank_pattern": {"v": 3}, "alpha_pattern": {"v": 6}},
    ),
    "kv": Case(Attention, _numbers(3, 4, 5), {"r": 2, "lora_alpha": 6, "target_modules": ["q", "k", "v"]}),
    "gpt2": Case(
        gpt2,
        _tokens(23, 2, 6),
        {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "bert": Case(
        bert,
        _tokens(23, 3, 6),
        {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"},
    ),
    "llama": Case(
        llama,
        _tokens(23, 2, 6),
        {
            "r": 2,
            "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "embed_tokens"],
            "rank_pattern": {"k_proj": 3},
            "use_rslora": True,
            "task_type": "CAUSAL_LM",
        },
    ),
}


def spread(model: nn.Module, scale: float = 0.2) -> nn.Module:
    """The model with every parameter moved, so that no zero or one of its initialisation hides a mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)
    return model.eval()


def start(name: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The base of a case, its inputs and targets."""
    torch.manual_seed(100 * seed + list(CASES).index(name))
    case = CASES[name]
    model, x = spread(case.model()), case.x()
    return model, x, torch.randn_like(logits(model, x))


def adapted(name: str, model: nn.Module) -> peft.PeftModel:
    """PEFT's model around a base, with a fresh adapter."""
    case = CASES[name]
    made = peft.get_peft_model(model, peft.LoraConfig(**case.config), adapter_name=case.adapter)
    return made.eval()


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a model computes, without a gradient."""
    with torch.no_grad():
        return _called(model, x)


def _called(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    # transformers' models are called by names, and give an object.
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if isinstance(inner, transformers.PreTrainedModel):
        return model(input_ids=x).logits
    return model(x)


def train(model: nn.Module, x: torch.Tensor, targets: torch.Tensor, steps: int) -> list[float]:
    """The losses of some steps of a fresh AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    losses = []
    for _ in range(steps):
        loss = ((_called(model, x) - targets) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def save_base(model: nn.Module, folder: Path) -> None:
    """Write a base: transformers' own form, or its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(folder)
    else:
        save_file({k: x.contiguous() for k, x in model.state_dict().items()}, folder / "base.safetensors")


def record(name: str, folder: Path, seed: int = 0) -> None:
    """Write one case's folder."""
    model, x, targets = start(name, seed)
    save_base(model, folder)
    found = {"x": x, "targets": targets, "base": logits(model, x)}
    made = adapted(name, model)
    train(made, x, targets, FIRST)
    made.save_pretrained(folder)
    found["logits"] = logits(made, x)
    losses = train(made, x, targets, STEPS)
    again = peft.PeftModel.from_pretrained(start(name, seed)[0], adapter_folder(name, folder))
    found["merged"] = logits(again.merge_and_unload(), x)
    arrays = {key: value.numpy() for key, value in found.items()}
    np.savez_compressed(folder / "record.npz", **arrays, losses=np.array(losses))
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "generation_config.json").unlink(missing_ok=True)


def adapter_folder(name: str, folder: Path) -> Path:
    """Where PEFT puts a case's adapter in a folder."""
    return folder if CASES[name].adapter == "default" else folder / CASES[name].adapter


class LinearWithLora(nn.Module):
    """The book's form: alpha·x@A@B with A (in, r) and B (r, out), and no division by the rank."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.linear, self.lora, self.alpha = linear, nn.Module(), alpha
        self.lora.A = nn.Parameter(0.3 * torch.randn(linear.in_features, rank))
        self.lora.B = nn.Parameter(0.3 * torch.randn(rank, linear.out_features))

    def forward(self, x):
        return self.linear(x) + self.alpha * (x @ self.lora.A @ self.lora.B)


def loralib_model() -> nn.Module:
    """Each of loralib's layers once: a table, a fused layer of three parts and a plain one; s = 3/2."""
    kind = {"r": 2, "lora_alpha": 3}
    return nn.Sequential(
        loralib.Embedding(7, 4, **kind),
        loralib.MergedLinear(4, 6, enable_lora=[True, False, True], **kind),
        nn.Tanh(),
        loralib.Linear(6, 3, **kind),
    )


def rasbt_model() -> nn.Module:
    """Two layers of the book's form, alpha 5 at rank 2."""
    return nn.Sequential(
        LinearWithLora(nn.Linear(4, 6), 2, 5.0), nn.Tanh(), LinearWithLora(nn.Linear(6, 3), 2, 5.0)
    )


def record_states(folder: Path) -> None:
    """Write the states of loralib's layers and of the book's, with what they compute."""
    found: dict[str, torch.Tensor] = {}
    for name, model, x in (
        ("loralib", loralib_model, _tokens(7, 4, 3)),
        ("rasbt", rasbt_model, _numbers(5, 4)),
    ):
        torch.manual_seed(len(name))
        made = spread(model().train())
        x = x()
        state = made.train().state_dict()
        found |= {f"{name}:{key}": value for key, value in state.items()}
        found |= {f"{name}:x": x, f"{name}:logits": logits(made, x)}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "states.npz", **{key: value.numpy() for key, value in found.items()})


def main() -> None:
    """Write every case's folder anew."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in CASES:
        folder = FIXTURES / f"peft_{name}"
        shutil.rmtree(folder, ignore_errors=True)
        record(name, folder)
    record_states(FIXTURES / "peft_loralib")


if __name__ == "__main__":
    main()
