"""The draft to be trained: some layers of the target, over some of its tokens."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sequoia.engine.draft_vocabulary import rows_of

_LAYER = re.compile(r"(?<=\blayers\.)(\d+)(?=\.)")


@torch.no_grad()
def make_student(target: PreTrainedModel, layers: Sequence[int], token_ids: Tensor | None) -> PreTrainedModel:
    """A model in float32 with copies of those layers of the target's, embedding, head and norms.

    `token_ids` (known,) int64, ascending: the tokens it is to know, by the target's ids. It has a row for each, and one
    more, the mean of all, for the others; None: it knows all tokens.
    """
    student: PreTrainedModel = AutoModelForCausalLM.from_config(_config(target, layers, token_ids), dtype=torch.float32)
    theirs = target.state_dict()
    for name, ours in student.state_dict().items():
        source = theirs[_LAYER.sub(lambda found: str(layers[int(found[0])]), name)]
        is_table = len(ours) != len(source)
        ours.copy_(rows_of(source.float(), token_ids) if is_table and token_ids is not None else source)
    return student


def _config(target: PreTrainedModel, layers: Sequence[int], token_ids: Tensor | None) -> object:
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [target.config.layer_types[layer] for layer in layers]
    if token_ids is not None:
        config.vocab_size = len(token_ids) + 1
        # Ids of the target's: rows that the student may not have.
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    return config
