"""A module of `transformers` without its weights: what the model is, in no memory."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from sequoia.engine.offload.checkpoint import Rename
from sequoia.errors import InvalidArgument


def hollow_module(config: PreTrainedConfig, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """On the meta device but for what no file holds, with the generation settings of the model's folder.

    Raises InvalidArgument naming `offload` for what is no model of `transformers` itself.
    """
    try:
        with init_empty_weights(include_buffers=False):
            module: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except ValueError as error:
        raise InvalidArgument(f"{folder} cannot be offloaded: {error}", "offload") from error
    if (folder / "generation_config.json").exists():
        module.generation_config = GenerationConfig.from_pretrained(folder)
    return module.eval().requires_grad_(False)


def weight_names(module: PreTrainedModel) -> Rename:
    """What `transformers` calls the tensors of a model's files; None for those that it makes others of."""
    transforms = get_model_conversion_mapping(module)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    known = module.state_dict()

    def rename(key: str) -> str | None:
        name, converted = rename_source_key(key, renamings, converters, module.base_model_prefix, known)
        return None if converted else str(name)

    return rename
