"""Record what transformers computes, for tests that need neither torch nor transformers.

    pip install torch transformers safetensors tokenizers
    LORA_JAX_DATA=path/to/data python -m experiments.models.record_llama

writes under tests/fixtures:

- llama_tiny/: a random Llama of our own with grouped heads, an untied head and a head_dim that is not
  hidden / heads, in several shards with a byte-level tokenizer;
- qwen2_tiny/: a random Qwen2 with biases and a tied head, in one file;
- llama_cases.npz: for each of CASES logits, hidden states, and gradients of the mean loss per token;
- llama_texts.npz: what `generate` gives for qwen2_tiny and stories260K, greedy and by beam search, and
  what its cut-offs leave of some scores;
- stories260K_logits.npz: logits of that checkpoint for fixed tokens (the weights stay where they are).
"""

import itertools
import json
import os
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parents[2] / "tests" / "fixtures"
BOS, EOS = "<s>", "</s>"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# The folder whose tensors it has, and what config.json says otherwise.
CASES = {
    "llama": ("llama_tiny", {}),
    "llama3": ("llama_tiny", {"rope_parameters": LLAMA3}),
    "mistral": ("llama_tiny", {"model_type": "mistral", "sliding_window": 5}),
    "qwen2": ("qwen2_tiny", {}),
    "llama_bias": ("qwen2_tiny", {"model_type": "llama", "attention_bias": True}),
}
GRADIENTS = [
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.self_attn.k_proj.bias",
    "model.layers.1.self_attn.o_proj.bias",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "model.norm.weight",
]


def record_stories(folder: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager").eval()
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 16), dtype=np.int32)
    tokens[:, 0] = model.config.bos_token_id
    with torch.no_grad():
        logits = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.savez_compressed(FIXTURES / "stories260K_logits.npz", tokens=tokens, logits=logits)


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([BOS, EOS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


def write(model, name: str, shard: str) -> None:
    """Make every norm and bias something else than ones and zeros, and save."""
    import torch

    for parameter, value in model.named_parameters():
        if "norm" in parameter:
            torch.nn.init.uniform_(value, 0.5, 1.5)
        elif "bias" in parameter:
            torch.nn.init.uniform_(value, -1.0, 1.0)
    model.save_pretrained(FIXTURES / name, max_shard_size=shard)
    (FIXTURES / name / "generation_config.json").unlink()


def record_models() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    common = {
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.3,
        "attn_implementation": "eager",
    }
    folder = FIXTURES / "llama_tiny"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), head_dim=6, **common)
    write(LlamaForCausalLM(config).eval(), "llama_tiny", "24KB")
    torch.manual_seed(1)
    config = Qwen2Config(vocab_size=64, tie_word_embeddings=True, **common)
    write(Qwen2ForCausalLM(config).eval(), "qwen2_tiny", "1MB")


def model_of(base: str, changes: dict):
    """The model of a case, and the tensors it has beside those of its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    stored = AutoModelForCausalLM.from_pretrained(FIXTURES / base).state_dict()
    raw = json.loads((FIXTURES / base / "config.json").read_text()) | changes
    config = AutoConfig.for_model(**raw)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    torch.manual_seed(2)
    more = {name: torch.rand(v.shape) for name, v in model.state_dict().items() if name not in stored}
    model.load_state_dict(stored | more)
    return model, {name: value.numpy() for name, value in more.items()}


def record_cases() -> None:
    import torch

    rng = np.random.default_rng(1)
    tokens = torch.tensor(rng.integers(0, 64, (2, 12)))
    valid = torch.ones(tokens.shape, dtype=torch.bool)
    valid[1, :3] = False
    found = {"tokens": tokens.numpy().astype(np.int32), "valid": valid.numpy(), "cases": json.dumps(CASES)}
    for case, (base, changes) in CASES.items():
        model, more = model_of(base, changes)
        out = model(
            tokens,
            attention_mask=valid.long(),
            position_ids=(valid.cumsum(1) - 1).clamp(min=0),
            output_hidden_states=True,
        )
        weight = valid[:, :-1] & valid[:, 1:]
        picked = out.logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
        loss = -(picked * weight).sum() / weight.sum()
        loss.backward()
        gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if name in GRADIENTS}
        found |= {f"{case}/gradients/{name}": value for name, value in gradients.items()}
        found |= {f"{case}/tensors/{name}": value for name, value in more.items()}
        found[f"{case}/logits"] = out.logits.detach().numpy()
        found[f"{case}/layer_0"] = out.hidden_states[1].detach().numpy()
        found[f"{case}/hidden"] = out.hidden_states[-1].detach().numpy()
        found[f"{case}/loss"] = loss.detach().numpy()
    np.savez_compressed(FIXTURES / "llama_cases.npz", **found)


def texts(
    model, prompts: list[list[int]], ends: list, penalties: list, max_new: int
) -> dict[str, np.ndarray]:
    """Texts (beams, n-gram sizes, penalties, ends, rows, max_new), filled up with the end."""
    import torch

    longest = max(map(len, prompts))
    rows = []
    for beams, ngram, penalty, end in itertools.product(range(1, 6), (0, 2, 3), penalties, ends):
        out = model.generate(
            torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in prompts]),
            attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
            max_new_tokens=max_new,
            do_sample=False,
            num_beams=beams,
            length_penalty=penalty,
            no_repeat_ngram_size=ngram,
            eos_token_id=end,
            pad_token_id=end,
        )[:, longest:]
        rows.append(torch.nn.functional.pad(out, (0, max_new - out.shape[1]), value=end).numpy())
    shape = (5, 3, len(penalties), len(ends), len(prompts), max_new)
    return {
        "texts": np.stack(rows).reshape(shape).astype(np.int16),
        "prompts": np.array([[-1] * (longest - len(prompt)) + prompt for prompt in prompts], np.int16),
        "ends": np.array(ends, np.int16),
        "penalties": np.array(penalties, np.float32),
    }


def several_ends(model, prompts: list[list[int]], ends: list[int], max_new: int) -> np.ndarray:
    """As `texts`, each row alone, with several ends at once: (beams, rows, max_new)."""
    import torch

    made = np.full((5, len(prompts), max_new), ends[0], np.int16)
    for (i, beams), (j, prompt) in itertools.product(enumerate(range(1, 6)), enumerate(prompts)):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new,
            do_sample=False,
            num_beams=beams,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )[0, len(prompt) :]
        made[i, j, : len(out)] = out.numpy()
    return made


def record_texts(stories: Path) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import (
        LlamaForCausalLM,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    found: dict[str, np.ndarray] = {}

    def record(name, *arguments):
        found.update({f"{name}/{key}": value for key, value in texts(*arguments).items()})

    model, _ = model_of(*CASES["qwen2"])
    prompts = [[0, 40, 50, 60, 13, 40, 50], [0, 9], [0, 33, 44, 55]]
    torch.manual_seed(3)
    free = model.generate(torch.tensor(prompts[:1]), max_new_tokens=64, do_sample=True, eos_token_id=None)
    common = np.bincount(free[0].numpy(), minlength=64).argsort()[::-1]
    record("qwen2_tiny", model, prompts, common[:3].tolist(), [0.6, 1.0, 2.0], 16)
    record("qwen2_tiny_1", model, prompts, common[:2].tolist(), [1.0], 1)
    record("qwen2_tiny_5", model, prompts, common[:2].tolist(), [0.6, 2.0], 5)
    found["qwen2_tiny/several"] = several_ends(model, prompts, common[:2].tolist(), 16)

    tokenizer = Tokenizer.from_file(str(stories / "tokenizer.json"))
    begun = ["Once upon a time, there was a little girl", "The cat", "Tim and his dog went to the park. Tim"]
    prompts = [tokenizer.encode(text).ids for text in begun]
    model = LlamaForCausalLM.from_pretrained(stories, dtype="float32", attn_implementation="eager").eval()
    period = tokenizer.encode("The cat.").ids[-1]
    record("stories260K", model, prompts, [2, period], [0.6, 1.0, 2.0], 40)

    scores = torch.tensor(np.random.default_rng(3).normal(0, 3, (4, 64)).astype(np.float32))
    found["cut_off/scores"] = scores.numpy()
    for k, p in ((None, 0.7), (5, None), (9, 0.8), (200, 1.0)):
        left = TemperatureLogitsWarper(0.7)(None, scores)
        left = left if k is None else TopKLogitsWarper(k)(None, left)
        left = left if p is None else TopPLogitsWarper(p)(None, left)
        found[f"cut_off/{k}/{p}"] = left.numpy()
    np.savez_compressed(FIXTURES / "llama_texts.npz", **found)


if __name__ == "__main__":
    FIXTURES.mkdir(parents=True, exist_ok=True)
    stories = Path(os.environ["LORA_JAX_DATA"]) / "stories260K"
    record_models()
    record_cases()
    record_stories(stories)
    record_texts(stories)
