"""A module of `transformers` without its weights: what the model is, in no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from sequoia.errors import InvalidArgument


def hollow_module(config: PreTrainedConfig, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """On the meta device, with the generation settings of the model's folder.

    Raises InvalidArgument naming `offload` for what is no model of `transformers` itself.
    """
    try:
        with torch.device("meta"):
            module: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except ValueError as error:
        raise InvalidArgument(f"{folder} cannot be offloaded: {error}", "offload") from error
    if (folder / "generation_config.json").exists():
        module.generation_config = GenerationConfig.from_pretrained(folder)
    return module.eval().requires_grad_(False)


def fill_buffers(module: PreTrainedModel) -> None:
    """What a readable module computes with and no file holds: it follows from the configuration."""
    body: Any = module.model
    body.rotary_emb = type(body.rotary_emb)(module.config)
    if hasattr(body.embed_tokens, "embed_scale"):
        body.embed_tokens.embed_scale = torch.tensor(body.embed_tokens.scalar_embed_scale)
