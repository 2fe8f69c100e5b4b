"""Which models the tree attention can serve. A model it would serve wrongly is refused, by name and with the reason."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from sequoia.errors import InvalidArgument

_PROBE = "sequoia_probe"
_LAYER_TYPES = frozenset(("full_attention", "sliding_attention"))
# What models hand to an attention function without changing what attention means. Everything else (sinks, a soft cap,
# a position bias, chosen rows) would be ignored, and the text be wrong without a word.
_HARMLESS = frozenset(
    (
        "dropout",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "position_ids",
        "return_dict",
        "scaling",
        "sliding_window",
        "use_cache",
    )
)


class AttentionProbe:
    """What a model's layers asked of their attention function in one forward."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.num_windows = 0
        self.surplus: set[str] = set()
        self.is_causal = True

    def record(self, module: nn.Module, arguments: dict[str, object]) -> None:
        """Take down one call."""
        self.num_calls += 1
        self.num_windows += arguments.get("sliding_window") is not None
        self.surplus |= {name for name, value in arguments.items() if value is not None and name not in _HARMLESS}
        self.is_causal &= getattr(module, "is_causal", True) is not False and arguments.get("is_causal") is not False


def check_config(config: PreTrainedConfig, reference: str) -> None:
    """Refuse what the configuration shows, before weights are read. Raises InvalidArgument naming `model`."""
    text = config.get_text_config()
    if config.is_encoder_decoder:
        _refuse(reference, config, "it is an encoder-decoder")
    if foreign := sorted(set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES):
        _refuse(reference, config, f"it has layers of type {', '.join(foreign)}")
    if getattr(text, "num_kv_shared_layers", None):
        _refuse(reference, config, "some of its layers share keys and values")
    if not getattr(text, "max_position_embeddings", None):
        _refuse(reference, config, "its configuration names no max_position_embeddings")


@torch.no_grad()
def check_attention(module: PreTrainedModel, reference: str) -> None:
    """Refuse what one forward of two tokens shows. Raises InvalidArgument naming `model`."""
    if not module.is_backend_compatible():
        _refuse(reference, module.config, "it does not use the attention registry of transformers")
    AttentionInterface.register(_PROBE, _probe_attention)
    implementation = module.config._attn_implementation
    module.set_attn_implementation(_PROBE)
    probe = AttentionProbe()
    ids = torch.zeros((1, 2), dtype=torch.int64, device=module.device)
    try:
        module(input_ids=ids, position_ids=ids, use_cache=False, attention_probe=probe)
    except TypeError as error:
        _refuse(reference, module.config, f"its forward does not take what the engine passes ({error})")
    finally:
        module.set_attn_implementation(implementation)
    if reason := _fault(probe, module.config.get_text_config()):
        _refuse(reference, module.config, reason)


def _probe_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, tokens, head size)
    key: Tensor,
    value: Tensor,  # (1, kv heads, tokens, value size)
    attention_mask: Tensor | None,
    *,
    attention_probe: AttentionProbe | None = None,
    **arguments: object,
) -> tuple[Tensor, None]:
    if attention_probe is not None:
        attention_probe.record(module, arguments)
    return query.new_zeros((1, query.shape[2], query.shape[1], value.shape[3])), None


def _fault(probe: AttentionProbe, config: PreTrainedConfig) -> str:
    """Why this attention cannot be served; empty when it can."""
    num_layers = config.num_hidden_layers
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        num_windows = list(layer_types).count("sliding_attention")
    else:
        num_windows = num_layers if getattr(config, "sliding_window", None) else 0
    if probe.num_calls != num_layers:
        return f"{probe.num_calls} of its {num_layers} layers pass the engine's arguments to the attention registry"
    if probe.surplus:
        return f"its attention needs {', '.join(sorted(probe.surplus))}"
    if not probe.is_causal:
        return "its attention is not causal"
    if probe.num_windows != num_windows:
        return f"{probe.num_windows} layers name their sliding window where {num_windows} have one"
    return ""


def _refuse(reference: str, config: PreTrainedConfig, reason: str) -> None:
    raise InvalidArgument(
        f"{reference} ({config.model_type}) cannot be served: {reason}; choose a causal LM of full and sliding-window "
        "attention, such as Llama, Qwen2, Qwen3, Mistral or Gemma 3",
        "model",
    )
