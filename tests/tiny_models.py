"""Tiny random models on disk, with a small real tokenizer: llama, qwen2 and gemma3 (with sliding-window layers)."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

CONTEXT_LENGTH = 512
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}assistant:"
)
_TEXT = ["the quick brown fox jumps over the lazy dog", "a tree of tokens grows level by level", "speculation pays"]

_CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, object]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "gemma3": (
        Gemma3TextConfig,
        {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
}
ARCHITECTURES = tuple(_CONFIGS)


def write_tiny_model(folder: Path, architecture: str, *, seed: int = 0, vocab_size: int = 320) -> None:
    """A random model of 4 layers with grouped-query attention, whose logits are far from flat."""
    kind, extra = _CONFIGS[architecture]
    config = kind(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **extra,
    )
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(config)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            # The default spread of 0.02 gives the same flat logits after any prompt.
            parameter.data.normal_(0.0, 0.3 if "embed" in name or "lm_head" in name else 0.15)
    module.save_pretrained(folder)
    _tokenizer(vocab_size).save_pretrained(folder)


def write_perturbed_model(source: Path, folder: Path, *, noise: float = 0.05, seed: int = 1) -> None:
    """The same model with some relative noise on its weights: a draft that is right often and wrong often."""
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_pretrained(source)
    for parameter in module.parameters():
        parameter.data.mul_(1.0 + noise * torch.randn_like(parameter))
    module.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(source).save_pretrained(folder)


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(_TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = _TEMPLATE
    return fast
