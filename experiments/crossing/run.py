"""One adapter trained twice from the same start, in PEFT and in lora_jax, and each opened by the other.

    pip install torch==2.13.0 && pip install -e ".[parity]"
    LORA_JAX_DATA=path/to/data python -m experiments.crossing.run

writes results/stories260K.json and crossing.png beside it. The committed figure is of that command.
"""

import argparse
import functools
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer
from tqdm import tqdm

import lora_jax
from experiments.data import find_model
from experiments.e2e_nlg import data
from experiments.models import llama
from experiments.records import provenance
from lora_jax import names, peft

HERE = Path(__file__).parent


def batches(folder: Path, settings: dict[str, Any], model: llama.Llama) -> tuple[list[Any], list[Any]]:
    """The training batches in order, and the held-out ones, as numpy arrays for both sides."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = {
        split: data.encode(
            data.load_split(split),
            tokenizer,
            settings["length"],
            model.config.bos_id,
            model.config.eos_id,
        )
        for split in ("train", "valid")
    }
    stream = data.train_batches(encoded["train"], settings["batch"], settings["seed"])
    training = [next(stream) for _ in range(settings["steps"])]
    held_out = data.eval_batches(encoded["valid"], 32)
    return training, [next(held_out) for _ in range(settings["held_out"] // 32)]


# --- lora_jax ------------------------------------------------------------------------------------------


def loss_fn(model: llama.Llama, params: Any, batch: Any, key: Any) -> jax.Array:
    logits = model.apply({"params": params}, batch["tokens"][:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
    weight = batch["weight"][:, 1:]
    return jnp.sum(losses * weight) / jnp.sum(weight)


def train_here(model: llama.Llama, wrapped: Any, training: list[Any], rate: float) -> tuple[Any, list[float]]:
    tx = optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    step = lora_jax.make_train_step(functools.partial(loss_fn, model), tx)
    state, losses = lora_jax.TrainState.create(wrapped, tx, jax.random.key(0)), []
    for batch in tqdm(training, desc="lora_jax", unit=" steps"):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    return state.wrapped, [float(x) for x in losses]


def loss_here(model: llama.Llama, wrapped: Any, held_out: list[Any]) -> float:
    run = jax.jit(lora_jax.lora(functools.partial(loss_fn, model)))
    return float(np.mean([run(wrapped, batch, None) for batch in held_out]))


def logits_here(model: llama.Llama, wrapped: Any, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(lora_jax.lora(model.apply)({"params": wrapped}, tokens))


# --- PEFT ----------------------------------------------------------------------------------------------


def torch_loss(model: Any, batch: Any) -> Any:
    import torch

    tokens = torch.tensor(batch["tokens"], dtype=torch.long)
    weight = torch.tensor(batch["weight"][:, 1:])
    logits = model(input_ids=tokens[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return (losses * weight).sum() / weight.sum()


def bare(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")


def new_adapter(folder: Path, settings: dict[str, Any]) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(settings["seed"])
    config = LoraConfig(
        r=settings["rank"], lora_alpha=settings["alpha"], target_modules=settings["targets"], lora_dropout=0.0
    )
    return get_peft_model(bare(folder), config)


def opened(folder: Path, adapter: str) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(bare(folder), adapter).eval()


def train_there(model: Any, training: list[Any], rate: float) -> list[float]:
    import torch

    trainable = [p for p in model.parameters() if p.requires_grad]
    tx = torch.optim.AdamW(trainable, lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    model.train()
    losses = []
    for batch in tqdm(training, desc="PEFT", unit=" steps"):
        tx.zero_grad()
        loss = torch_loss(model, batch)
        loss.backward()
        tx.step()
        losses.append(loss.item())
    model.eval()
    return losses


def loss_there(model: Any, held_out: list[Any]) -> float:
    import torch

    with torch.no_grad():
        return float(np.mean([torch_loss(model, batch).item() for batch in held_out]))


def logits_there(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens, dtype=torch.long)).logits.numpy()


# --- The crossing --------------------------------------------------------------------------------------


def crossing(settings: dict[str, Any], scratch: Path) -> dict[str, Any]:
    folder = find_model(settings["model"])
    model, params = llama.load(folder)
    training, held_out = batches(folder, settings, model)
    tokens = held_out[0]["tokens"]

    torch_model = new_adapter(folder, settings)
    torch_model.save_pretrained(scratch / "start")
    wrapped = peft.load_peft(scratch / "start", params, names.llama())

    theirs = train_there(torch_model, training, settings["learning_rate"])
    torch_model.save_pretrained(scratch / "peft")
    wrapped, ours = train_here(model, wrapped, training, settings["learning_rate"])
    peft.save_peft(wrapped, scratch / "lora_jax", names.llama(), settings["model"])

    results: dict[str, Any] = {"curves": {"PEFT": theirs, "lora_jax": ours}}
    results["largest_difference"] = float(np.max(np.abs(np.subtract(ours, theirs))))
    results["start"] = {"held_out_loss": loss_there(bare(folder).eval(), held_out)}
    for name in ("peft", "lora_jax"):
        here = peft.load_peft(scratch / name, params, names.llama())
        there = opened(folder, str(scratch / name))
        a, b = logits_here(model, here, tokens), logits_there(there, tokens)
        merged = there.merge_and_unload()
        c = np.asarray(model.apply({"params": lora_jax.merge(here)}, tokens))
        results[f"trained in {'PEFT' if name == 'peft' else name}"] = {
            "held_out_loss_in_lora_jax": loss_here(model, here, held_out),
            "held_out_loss_in_PEFT": loss_there(opened(folder, str(scratch / name)), held_out),
            "largest_logit": float(np.max(np.abs(b))),
            "largest_logit_difference": float(np.max(np.abs(a - b))),
            "largest_logit_difference_merged": float(np.max(np.abs(c - logits_there(merged, tokens)))),
        }
    return results


def draw(results: dict[str, Any], settings: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = results["curves"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), dpi=130)
    left.plot(curves["PEFT"], color="#f4b183", linewidth=4, label="PEFT, torch")
    left.plot(curves["lora_jax"], color="#1f4e79", linewidth=1, label="lora_jax")
    left.set_ylabel("training loss")
    left.legend(frameon=False)
    left.set_title(f"{settings['model']}, E2E, rank {settings['rank']}: the same start, the same batches")
    difference = np.abs(np.subtract(curves["PEFT"], curves["lora_jax"]))
    right.semilogy(np.maximum(difference, 1e-9), color="#333333", linewidth=0.8)
    right.set_ylabel("|difference|")
    right.set_title("float32 rounding, as it grows")
    for axis in (left, right):
        axis.set_xlabel("AdamW steps")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="experiments.crossing.run",
    )
    parser.add_argument("--config", type=Path, default=HERE / "config.json", help="the settings, as JSON")
    parser.add_argument("--steps", type=int, help="AdamW steps, in place of the config's")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="the folder for the results")
    given = parser.parse_args(arguments)
    settings = json.loads(given.config.read_text())
    settings["steps"] = given.steps or settings["steps"]
    with tempfile.TemporaryDirectory() as scratch:
        results = crossing(settings, Path(scratch))
    command = shlex.join(["python", "-m", "experiments.crossing.run", *arguments])
    record = provenance(command, ("torch", "peft", "transformers")) | {
        "settings": settings,
        "results": results,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"{settings['model']}.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(results, settings, given.out / "crossing.png")
    print(json.dumps({name: x for name, x in results.items() if name != "curves"}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
