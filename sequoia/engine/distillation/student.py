"""The draft to be trained: some layers of the target, with a head for some of its tokens."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sequoia.engine.draft_vocabulary import narrow_head

_LAYER = re.compile(r"(?<=\blayers\.)(\d+)(?=\.)")


@torch.no_grad()
def make_student(target: PreTrainedModel, layers: Sequence[int], token_ids: Tensor | None) -> PreTrainedModel:
    """A model in float32, on the target's device, with copies of those of its layers, embedding, norms, and a head.

    `token_ids` (known,) int64, ascending: the tokens that its head has rows for; None: all. The embedding is not to be
    trained: it stays the target's.
    """
    config = _config(target, layers)
    student: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(target.device)
    theirs = target.state_dict()
    for name, ours in student.state_dict().items():
        ours.copy_(theirs[_LAYER.sub(lambda found: str(layers[int(found[0])]), name)])
    if token_ids is not None:
        narrow_head(student, token_ids)
    student.requires_grad_(True).get_input_embeddings().requires_grad_(False)
    return student


@torch.no_grad()
def further_student(draft: PreTrainedModel) -> PreTrainedModel:
    """A draft to be trained further: itself, in float32 like it; its embedding stays as it is."""
    embedding, head = draft.get_input_embeddings(), draft.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    assert isinstance(embedding, nn.Embedding)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.clone())
        draft.config.tie_word_embeddings = False
    draft.requires_grad_(True).get_input_embeddings().requires_grad_(False)
    return draft


@torch.no_grad()
def widen_head(student: PreTrainedModel, target: PreTrainedModel, token_ids: Tensor) -> None:
    """Give the head of a student for `token_ids` the target's rows for all other tokens."""
    wide, narrow = copy.deepcopy(target.get_output_embeddings()), student.get_output_embeddings()
    assert isinstance(wide, nn.Linear)
    assert isinstance(narrow, nn.Linear)
    wide.weight[token_ids] = narrow.weight.to(wide.weight.dtype)
    student.set_output_embeddings(wide)


def _config(target: PreTrainedModel, layers: Sequence[int]) -> PreTrainedConfig:
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [target.config.layer_types[layer] for layer in layers]
    config.tie_word_embeddings = False
    return config
