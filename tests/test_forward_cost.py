"""What a forward must read and compute: counted from configurations, against the modules that are built from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, write_tiny_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
)

from sequoia.engine.forward_cost import GATED_DECODERS, forward_cost
from sequoia.engine.quantization import Int8Linear, quantize_int8
from sequoia.errors import InvalidArgument
from sequoia.roofline import ForwardCost

# No two of them alike, so that nothing is mistaken for something else.
SIZES = {
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def cost_of(config: PreTrainedConfig, num_context_tokens: int = 0, weight_bits: int = 16) -> ForwardCost:
    return forward_cost(config, weight_bits=weight_bits, value_bytes=2, num_context_tokens=num_context_tokens)


def linear_parameters(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_counts_are_those_of_a_loaded_model(architecture: str, tied: bool, tmp_path: Path) -> None:
    write_tiny_model(tmp_path, architecture, tie_word_embeddings=tied)
    module = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    stored = sum(layer.weight.nbytes for layer in module.modules() if isinstance(layer, nn.Linear))
    cost = cost_of(module.config)
    assert (cost.linear_parameters, cost.weight_bytes) == (linear_parameters(module), stored)
    others = sum(each.numel() for name, each in module.named_parameters() if "norm" in name or "bias" in name)
    embedding = 0 if tied else module.get_input_embeddings().weight.numel()
    assert cost.linear_parameters == sum(each.numel() for each in module.parameters()) - others - embedding


def test_a_head_of_few_tokens_counts_for_those(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    config = AutoConfig.from_pretrained(tmp_path)
    few = forward_cost(config, weight_bits=16, value_bytes=2, num_context_tokens=0, num_logits=90)
    assert cost_of(config).linear_parameters - few.linear_parameters == (config.vocab_size - 90) * config.hidden_size


def test_an_int8_model_reads_a_byte_a_weight(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama", tie_word_embeddings=True)
    module = AutoModelForCausalLM.from_pretrained(tmp_path)
    quantize_int8(module)
    layers = [layer for layer in module.modules() if isinstance(layer, Int8Linear)]
    cost = cost_of(module.config, weight_bits=8)
    assert cost.weight_bytes == sum(layer.in_features * layer.out_features for layer in layers)


@pytest.mark.parametrize("head_size", [{}, {"head_dim": 10}])
@pytest.mark.parametrize("model_type", sorted(GATED_DECODERS))
def test_every_architecture_on_the_list_has_the_weights_that_are_counted(
    model_type: str, head_size: dict[str, int]
) -> None:
    config = AutoConfig.for_model(model_type, **SIZES, **head_size)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    assert cost_of(config).linear_parameters == linear_parameters(module)


def test_the_context_is_read_by_kv_head_and_computed_with_by_query_head() -> None:
    cost = cost_of(LlamaConfig(**SIZES), num_context_tokens=100)
    # 3 layers, 100 rows, heads of 8; keys and values of 2 heads in 2 bytes; two products of 6 heads, 2 operations each.
    assert (cost.kv_bytes, cost.attention_flops) == (3 * 100 * 8 * 2 * 2 * 2, 3 * 100 * 8 * 2 * 6 * 2)


def test_a_sliding_layer_reads_its_window_only() -> None:
    plain = cost_of(LlamaConfig(**SIZES), num_context_tokens=1).kv_bytes // 3
    mistral = MistralConfig(**SIZES, sliding_window=32)
    assert cost_of(mistral, 100).kv_bytes == 3 * 31 * plain
    assert cost_of(mistral, 20).kv_bytes == 3 * 20 * plain
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    gemma = Gemma3TextConfig(**SIZES, head_dim=8, layer_types=kinds, sliding_window=32)
    assert cost_of(gemma, 100).kv_bytes == (31 + 100 + 31) * plain


@pytest.mark.parametrize("model_type", ["starcoder2", "mixtral", "gpt2"])
def test_an_architecture_of_other_weights_is_refused_by_name(model_type: str) -> None:
    with pytest.raises(InvalidArgument, match=f"weights of a {model_type}"):
        cost_of(AutoConfig.for_model(model_type))
