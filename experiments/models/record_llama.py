"""Record what transformers computes, for tests that need neither torch nor transformers.

    pip install torch transformers safetensors tokenizers
    LORA_JAX_DATA=path/to/data python -m experiments.models.record_llama

writes under tests/fixtures:

- stories260K_logits.npz: logits of that checkpoint for fixed tokens (the weights stay where they are);
- llama_tiny/: a random Llama of our own with grouped heads, an untied head and a head_dim that is not
  hidden / heads, in several shards with a byte-level tokenizer, and its logits with plain and with llama3
  rotary frequencies.
"""

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


def logits_of(model, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy().astype(np.float32)


def record_stories(folder: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager").eval()
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 16), dtype=np.int32)
    tokens[:, 0] = model.config.bos_token_id
    np.savez_compressed(FIXTURES / "stories260K_logits.npz", tokens=tokens, logits=logits_of(model, tokens))


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


def record_tiny() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = FIXTURES / "llama_tiny"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(folder, max_shard_size="24KB")
    (folder / "generation_config.json").unlink()

    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 16), dtype=np.int32)
    long = LlamaConfig.from_dict(config.to_dict() | {"rope_parameters": LLAMA3})
    stretched = LlamaForCausalLM(long).eval()
    stretched.load_state_dict(model.state_dict())
    np.savez_compressed(
        FIXTURES / "llama_tiny_logits.npz",
        tokens=tokens,
        default=logits_of(model, tokens),
        llama3=logits_of(stretched, tokens),
        rope_llama3=json.dumps(LLAMA3),
    )


if __name__ == "__main__":
    FIXTURES.mkdir(parents=True, exist_ok=True)
    record_stories(Path(os.environ["LORA_JAX_DATA"]) / "stories260K")
    record_tiny()
