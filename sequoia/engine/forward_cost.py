"""What a model's forward must read and compute, from its configuration alone: whatever module runs it."""

from __future__ import annotations

from transformers import PreTrainedConfig

from sequoia.errors import InvalidArgument
from sequoia.roofline import ForwardCost

# Decoders whose layers are q, k, v and o, and a gated MLP of three matrices. A test counts each one's modules.
GATED_DECODERS = frozenset(
    ("gemma", "gemma3_text", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
)


def forward_cost(
    config: PreTrainedConfig,
    *,
    weight_bits: int,
    value_bytes: int,
    num_context_tokens: int,
    num_logits: int | None = None,
) -> ForwardCost:
    """Of a forward of one session behind a context, logits of every token included.

    weight_bits: of a weight of the linear layers as stored; value_bytes: of a key's or value's element; num_logits:
    rows of the head, None: one for each token. The head counts once, tied or not; embedding rows, norms, biases and
    scales do not, so the floor stays one. Raises InvalidArgument naming `model` for an architecture whose weights are
    not known.
    """
    text = config.get_text_config()
    if text.model_type not in GATED_DECODERS:
        known = ", ".join(sorted(GATED_DECODERS))
        raise InvalidArgument(f"the weights of a {text.model_type} are not counted; those of {known} are", "model")
    parameters = _linear_parameters(text, num_logits or text.vocab_size)
    rows = sum(_context_rows(text, num_context_tokens))
    head_size = _head_size(text)
    return ForwardCost(
        linear_parameters=parameters,
        weight_bytes=parameters * weight_bits // 8,
        kv_bytes=rows * 2 * text.num_key_value_heads * head_size * value_bytes,
        # q by the keys, then the weights by the values.
        attention_flops=rows * 4 * text.num_attention_heads * head_size,
    )


def _linear_parameters(text: PreTrainedConfig, num_logits: int) -> int:
    width = text.hidden_size
    attention = 2 * (text.num_attention_heads + text.num_key_value_heads) * _head_size(text) * width
    layer = attention + 3 * width * text.intermediate_size
    return text.num_hidden_layers * layer + num_logits * width


def _head_size(text: PreTrainedConfig) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _context_rows(text: PreTrainedConfig, num_context_tokens: int) -> list[int]:
    """By layer: the context's rows that a token behind it sees. A window holds the token itself."""
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    if window is None:
        return [num_context_tokens] * text.num_hidden_layers
    seen = min(num_context_tokens, window - 1)
    return [seen if kind == "sliding_attention" else num_context_tokens for kind in kinds]
