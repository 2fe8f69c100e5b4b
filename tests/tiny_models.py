"""Tiny random models, written as a user's folder would be: config, safetensors, a real tokenizer, a chat template."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Starcoder2Config,
)

from sequoia.engine.draft_vocabulary import DraftVocabulary

ARCHITECTURES = ("llama", "qwen2", "gemma3")
# What the native and the lean decoder know.
READABLE_ARCHITECTURES = (*ARCHITECTURES, "mistral", "qwen3")
# Served by their own modules.
_OTHERS = {"gpt_neox": GPTNeoXConfig, "phi": PhiConfig, "starcoder2": Starcoder2Config}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
_VOCAB_SIZE = 400
_CORPUS = [
    "The sky is blue because short waves of light are scattered more than long ones by the air above the sea.",
    "A tree has one root, many nodes and more leaves; each node but the root has one parent and its own rank.",
    "What the small model proposes the large model accepts or rejects, and nothing that it says is ever changed.",
    "Seven quick brown foxes jumped over the lazy dogs while twelve grey geese were watching from the river bank.",
]


def write_tiny_model(
    folder: Path,
    architecture: str,
    *,
    seed: int = 0,
    vocab_size: int | None = None,
    num_layers: int = 4,
    tie_word_embeddings: bool = False,
    chat_template: str | None = None,
) -> None:
    """Write a model with hidden size 64, 4 heads and 2 KV heads. The same arguments give the same files.

    `vocab_size` (259 to 400, default 400) is the tokenizer's as well as the model's.
    """
    tokenizer = build_tokenizer(vocab_size or _VOCAB_SIZE)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    size = len(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _build(architecture, size, num_layers, tie_word_embeddings)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_tiny_pair(
    folder: Path, architecture: str = "llama", *, noise: float = 0.02, chat_template: str | None = None
) -> dict[str, Path]:
    """Write a random target and a draft with noise on its matrices. Returns the folder of each by role."""
    models = {"verify": folder / "target", "draft": folder / "draft"}
    write_tiny_model(models["verify"], architecture, chat_template=chat_template)
    write_perturbed_model(models["verify"], models["draft"], noise=noise)
    return models


def write_perturbed_model(source: Path, folder: Path, *, noise: float = 0.02, seed: int = 1) -> None:
    """Write the model in `source` with noise on its matrices: a draft that is often right and often wrong."""
    shutil.copytree(source, folder)
    module = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for weight in _matrices(module.parameters()):
        weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * noise)
    module.save_pretrained(folder)


def write_narrow_model(source: Path, folder: Path, token_ids: Sequence[int]) -> None:
    """Write the model in `source` as a draft that proposes some of its tokens."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    DraftVocabulary(torch.tensor(token_ids), AutoConfig.from_pretrained(source).vocab_size).save(folder)


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: <s> is 0, </s> is 1, then all bytes, then merges; <s> begins every encoded text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


def _matrices(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in parameters if parameter.dim() > 1]


def _build(architecture: str, vocab_size: int, num_layers: int, tie_word_embeddings: bool) -> PreTrainedModel:
    common = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        # Large enough for logits that differ and attention that matters.
        "initializer_range": 0.2,
        "tie_word_embeddings": tie_word_embeddings,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if architecture in _OTHERS:
        return AutoModelForCausalLM.from_config(_OTHERS[architecture](**common))
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**common))
    if architecture == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**common))
    if architecture == "mistral":
        return MistralForCausalLM(MistralConfig(**common, sliding_window=16))
    if architecture == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**common))
    return Gemma3ForCausalLM(_gemma3_config(common, num_layers))


def _gemma3_config(common: dict[str, object], num_layers: int) -> PreTrainedConfig:
    kinds = ("sliding_attention", "full_attention")
    layer_types = [kinds[layer % 2] for layer in range(num_layers)]
    return Gemma3TextConfig(**common, layer_types=layer_types, sliding_window=16, query_pre_attn_scalar=16)
