"""A model with its KV cache: packed forwards, whole trees, logits now or later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sequoia.engine.attention import PackedBatch, Segment
from sequoia.engine.decoder import Decoder
from sequoia.engine.draft_vocabulary import DraftVocabulary
from sequoia.engine.kv_cache import KVCache
from sequoia.engine.target_table import TargetTable
from sequoia.engine.tree_logits import HiddenRows
from sequoia.engine.verification import MakeTarget, TargetRows
from sequoia.engine.whole_tree import AnyGrownTree, AnyWholeTree


class Engine:
    """A model with its KV cache. `forward` is called by one thread only.

    `reads_once`: trees are grown and verified where the logits are, and the host reads the result in one copy a step,
    because it would wait for the device with each. By default on every device but the CPU.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        device: torch.device,
        dtype: torch.dtype,
        *,
        reads_once: bool | None = None,
        vocabulary: DraftVocabulary | None = None,
    ) -> None:
        self._decoder, self._device, self._dtype, self._vocabulary = decoder, device, dtype, vocabulary
        self.reads_once = device.type != "cpu" if reads_once is None else reads_once
        self.cache = cache
        decoder.attach(cache)
        self.num_forwards = 0
        self.num_forward_tokens = 0

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> list[Tensor]:
        """One forward over all segments. Returns each segment's logits, (wanted tokens, vocabulary)."""
        assert not any(each.logits_later for each in segments), "they are answered by `forward_some`"
        logits = self._decoder.forward(self._packed(segments), self.cache)
        if self._vocabulary is not None:
            logits = self._vocabulary.widened(logits)
        return list(logits.split([len(s.logit_tokens) for s in segments]))

    @property
    def can_wait(self) -> bool:
        """Whether logits can be made later."""
        return self._decoder.hidden_rows is not None and self._vocabulary is None

    @torch.inference_mode()
    def forward_some(self, segments: Sequence[Segment]) -> list[Tensor | HiddenRows]:
        """`forward`, where some segments want their logits later."""
        if not any(each.logits_later for each in segments):
            return [*self.forward(segments)]
        make_rows, head = self._decoder.hidden_rows, self._decoder.logits
        assert make_rows, "this engine makes all logits at once"
        assert head, "of rows that come later"
        hidden = make_rows(self._packed(segments), self.cache)
        parts = hidden.split([len(each.logit_tokens) for each in segments])
        pairs = zip(segments, parts, strict=True)
        return [HiddenRows(part, head) if each.logits_later else head(part) for each, part in pairs]

    def _packed(self, segments: Sequence[Segment]) -> PackedBatch:
        batch = PackedBatch(segments, self._device, self._dtype)
        self.num_forwards += 1
        self.num_forward_tokens += batch.num_tokens
        return batch

    @property
    def can_grow(self) -> bool:
        """Whether whole trees can be asked for."""
        return self._decoder.grow is not None

    @property
    def make_target(self) -> MakeTarget:
        """How trees are verified: as the decoder has it, or all nodes at once, or those that are visited."""
        return self._decoder.make_target or (TargetTable if self.reads_once else TargetRows)

    @property
    def make_target_later(self) -> MakeTarget:
        """The same for logits that come later: only nodes that are visited. A device is then read for each of them."""
        return self._decoder.make_target or TargetRows

    @torch.inference_mode()
    def grow(self, tree: AnyWholeTree) -> AnyGrownTree:
        """All forwards of a tree, and the rankings between them."""
        assert self._decoder.grow is not None, "this engine grows no whole trees"
        if self._vocabulary is not None:
            tree = replace(tree, vocabulary=self._vocabulary)
        grown = self._decoder.grow(tree, self.cache)
        self.num_forwards += grown.num_forwards
        self.num_forward_tokens += grown.num_forwarded
        return grown
