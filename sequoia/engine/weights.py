"""What a forward of a Llama, Qwen or Gemma decoder needs, read from the `transformers` module that loaded it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

# Decoders of one pattern: RMS norm, rotary positions, grouped queries, a gated MLP. `tests/test_decoders.py` compares
# each of them with `transformers`; every other model runs on its own modules.
MODEL_TYPES = frozenset(("llama", "mistral", "qwen2", "qwen3", "gemma3_text"))
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Kinds of rotary positions whose frequencies do not depend on the length of the sequence.
_ROTATIONS = frozenset(("default", "linear", "llama3", "yarn"))
_LINEARS = ("qkv", "out", "gate_up", "down")


class LinearWeights(NamedTuple):
    """One or several linear layers on the same input, their outputs one behind the other."""

    weight: Tensor  # (outputs, inputs)
    bias: Tensor | None  # (outputs,)


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Norm weights are float32 and what the normalised input is multiplied by."""

    qkv: LinearWeights
    out: LinearWeights
    gate_up: LinearWeights
    down: LinearWeights
    attention_norm: Tensor  # (hidden,)
    mlp_norm: Tensor
    attention_output_norm: Tensor | None  # before the sum with the residual, where a model has one
    mlp_output_norm: Tensor | None
    query_norm: Tensor | None  # (head size,)
    key_norm: Tensor | None


class LayerKind(NamedTuple):
    """What tells one layer from another, beside its weights."""

    rotation: str  # which of the model's tables of rotations
    window: int | None  # positions a token sees


@dataclass(frozen=True)
class DecoderShape:
    """Sizes and scalars of a decoder."""

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    epsilon: float
    attention_scale: float
    embedding_scale: float
    activation: str  # silu or gelu_tanh
    num_layers: int


@dataclass(frozen=True)
class DecoderWeights:
    """A decoder, layer by layer. `layers` may be read once: each takes its weights out of the module."""

    shape: DecoderShape
    embedding: Tensor  # (padded vocabulary, hidden)
    output_norm: Tensor  # (hidden,)
    head: LinearWeights
    rotations: dict[str, Tensor]  # (positions, 2, head size / 2) float32: cosines, sines
    kinds: tuple[LayerKind, ...]  # of the layers
    layers: Iterator[LayerWeights]


def is_readable(module: PreTrainedModel) -> bool:
    """Whether `take_weights` knows this kind of model. Code that came with a model may do anything under any name."""
    return type(module).__module__.startswith("transformers.models.") and is_readable_config(module.config)


def is_readable_config(config: PreTrainedConfig) -> bool:
    """The same of a model that is not loaded yet, if its code is that of `transformers`."""
    text = config.get_text_config()
    return (
        config.model_type in MODEL_TYPES
        and _activation(text) in ACTIVATIONS
        and all(map(_is_plain_rotation, _rotation_parameters(text)))
        and not getattr(text, "attn_logit_softcapping", None)
        and not getattr(text, "final_logit_softcapping", None)
        and not getattr(text, "use_bidirectional_attention", False)
    )


def read_shape(module: PreTrainedModel) -> DecoderShape:
    """Sizes and scalars of a readable module."""
    body: Any = module.model
    config: Any = module.config
    attention: Any = body.layers[0].self_attn
    return DecoderShape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_size=attention.head_dim,
        epsilon=config.rms_norm_eps,
        attention_scale=attention.scaling,
        embedding_scale=_embedding_scale(body.embed_tokens),
        activation=ACTIVATIONS[_activation(config)],
        num_layers=config.num_hidden_layers,
    )


def layer_tensors(layer: LayerWeights) -> dict[str, Tensor]:
    """All of its tensors by name; what it does not have is left out."""
    linears = {name: getattr(layer, name)._asdict() for name in _LINEARS}
    tensors = {f"{name}.{part}": each for name, parts in linears.items() for part, each in parts.items()}
    tensors |= {field.name: getattr(layer, field.name) for field in fields(layer) if field.name not in _LINEARS}
    return {name: each for name, each in tensors.items() if each is not None}


def layer_of(tensors: Mapping[str, Tensor]) -> LayerWeights:
    """What `layer_tensors` was given."""
    linears = {name: LinearWeights(tensors[f"{name}.weight"], tensors.get(f"{name}.bias")) for name in _LINEARS}
    others = [field.name for field in fields(LayerWeights) if field.name not in _LINEARS]
    return LayerWeights(**linears, **{name: tensors.get(name) for name in others})  # type: ignore[arg-type]


def on_device(weights: DecoderWeights, device: torch.device) -> DecoderWeights:
    """All but the layers, which stay where they are; a head that is the embedding stays it."""
    embedding, head = weights.embedding.to(device), weights.head
    is_tied = head.weight.data_ptr() == weights.embedding.data_ptr()
    return replace(
        weights,
        embedding=embedding,
        output_norm=weights.output_norm.to(device),
        head=LinearWeights(
            embedding if is_tied else head.weight.to(device), None if head.bias is None else head.bias.to(device)
        ),
        rotations={kind: table.to(device) for kind, table in weights.rotations.items()},
    )


def take_weights(module: PreTrainedModel, num_positions: int) -> DecoderWeights:
    """The weights of a readable module. It is empty when the layers have been read: memory holds them only once."""
    body: Any = module.model
    config: Any = module.config
    norm = _Norms(offset=1.0 if config.model_type == "gemma3_text" else 0.0)
    kinds = tuple(LayerKind(kind, _window(config, kind)) for kind in _layer_kinds(config))
    has_several = "full_attention" in (getattr(config, "rope_parameters", None) or {})
    rotations = {
        kind: _rotation_table(body.rotary_emb, (kind,) if has_several else (), num_positions, body)
        for kind in sorted({each.rotation for each in kinds})
    }
    head: Any = module.get_output_embeddings()
    return DecoderWeights(
        shape=read_shape(module),
        embedding=_take_parameter(body.embed_tokens, "weight"),
        output_norm=norm.weight(body.norm),
        head=_take((head,)),
        rotations=rotations,
        kinds=kinds,
        layers=(_take_layer(layer, norm) for layer in body.layers),
    )


class _Norms(NamedTuple):
    offset: float  # Gemma multiplies by 1 + weight

    def weight(self, norm: Any) -> Tensor:
        return _take_parameter(norm, "weight").float() + self.offset

    def optional(self, norm: Any) -> Tensor | None:
        return None if norm is None else self.weight(norm)


def _take_layer(layer: Any, norm: _Norms) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    has_output_norms = hasattr(layer, "pre_feedforward_layernorm")
    return LayerWeights(
        qkv=_take((attention.q_proj, attention.k_proj, attention.v_proj)),
        out=_take((attention.o_proj,)),
        gate_up=_take((mlp.gate_proj, mlp.up_proj)),
        down=_take((mlp.down_proj,)),
        attention_norm=norm.weight(layer.input_layernorm),
        mlp_norm=norm.weight(layer.pre_feedforward_layernorm if has_output_norms else layer.post_attention_layernorm),
        attention_output_norm=norm.weight(layer.post_attention_layernorm) if has_output_norms else None,
        mlp_output_norm=norm.weight(layer.post_feedforward_layernorm) if has_output_norms else None,
        query_norm=norm.optional(getattr(attention, "q_norm", None)),
        key_norm=norm.optional(getattr(attention, "k_norm", None)),
    )


def _layer_kinds(config: Any) -> list[str]:
    """Of every layer: full_attention, or sliding_attention with the configuration's window."""
    every = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return list(getattr(config, "layer_types", None) or [every] * config.num_hidden_layers)


def _window(config: Any, kind: str) -> int | None:
    return config.sliding_window if kind == "sliding_attention" else None


def _take(linears: Sequence[nn.Linear]) -> LinearWeights:
    weights = [_take_parameter(linear, "weight") for linear in linears]
    has_bias = any(linear.bias is not None for linear in linears)
    biases = [_take_bias(linear, len(weight)) for linear, weight in zip(linears, weights, strict=True) if has_bias]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    return LinearWeights(weight, torch.cat(biases) if biases else None)


def _take_bias(linear: nn.Linear, outputs: int) -> Tensor:
    return linear.weight.new_zeros(outputs) if linear.bias is None else _take_parameter(linear, "bias")


def _take_parameter(layer: Any, name: str) -> Tensor:
    """What the module no longer has: one tensor left in it would keep the whole file of weights in memory."""
    taken: Tensor = getattr(layer, name).detach()
    setattr(layer, name, nn.Parameter(taken.new_empty(0), requires_grad=False))
    return taken


@torch.inference_mode()
def _rotation_table(rotary: nn.Module, kind: tuple[str, ...], num_positions: int, body: nn.Module) -> Tensor:
    device = next(body.parameters()).device
    positions = torch.arange(num_positions, device=device)[None]
    cosines, sines = rotary(torch.zeros((), device=device), positions, *kind)  # (1, positions, head size) float32
    half = cosines.shape[-1] // 2
    return torch.stack([cosines[0, :, :half], sines[0, :, :half]], dim=1).contiguous()


def _embedding_scale(embedding: Any) -> float:
    scale = getattr(embedding, "embed_scale", None)
    return 1.0 if scale is None else float(torch.as_tensor(scale).to(embedding.weight.dtype))


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", ""))


def _rotation_parameters(config: Any) -> list[dict[str, Any]]:
    """One for all layers, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return list(parameters.values()) if "full_attention" in parameters else [parameters]


def _is_plain_rotation(parameters: dict[str, Any]) -> bool:
    """Whether whole heads are rotated, by frequencies that the length of the sequence does not change."""
    is_whole = (parameters.get("partial_rotary_factor") or 1.0) == 1.0
    return is_whole and parameters.get("rope_type", "default") in _ROTATIONS
