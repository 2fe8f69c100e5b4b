"""Records traces: a target writes texts, greedily or by a seed, and its draft ranks their tokens. In one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from torch import Tensor

from sequoia.cli.benchmarks.replay import Ranks
from sequoia.cli.benchmarks.traces import NUM_RANKS, Recording, Text, Trace
from sequoia.cli.robustness import Pair
from sequoia.engine import attention
from sequoia.engine.attention import TREE_ATTENTION, chunk_segment, tree_segment
from sequoia.engine.children import coupled_children, top_children
from sequoia.engine.decoder import TransformersDecoder
from sequoia.engine.forwards import Engine
from sequoia.engine.kv_cache import KVCache
from sequoia.engine.model import LoadedModel
from sequoia.engine.sampling import argmax, coupled_token
from sequoia.sampling import Sampling
from sequoia.topology import TokenTree, Topology

_MODEL_KEYS = ("reference", "revision", "dtype_name", "quantization")


def record(
    pair: Pair,
    prompts: Sequence[str],
    temperatures: Sequence[float],
    num_tokens: int,
    on_progress: Callable[[int, int], None],
) -> Recording:
    """About `num_tokens` tokens a temperature, a text a prompt; above 0 the prompt's index is the text's seed.

    Texts end at the end-of-sequence token; those behind a short one are longer. `on_progress` is called with
    (texts done, texts in all).
    """
    tokenizer = Tokenizer.from_buffer(pair.target.tokenizer.tokenizer_json)
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    recorder = _prepare(pair, max(map(len, encoded)) + num_tokens)
    traces: list[Trace] = []
    for temperature in temperatures:
        texts: list[Text] = []
        num_left = num_tokens
        for index, prompt in enumerate(encoded):
            on_progress(len(traces) * len(prompts) + index, len(temperatures) * len(prompts))
            sampling = Sampling(temperature=temperature, seed=index if temperature else None)
            texts.append(recorder.text(prompt, sampling, -(-num_left // (len(prompts) - index))))
            num_left -= texts[-1].num_tokens
        traces.append(Trace(temperature, tuple(texts)))
    return Recording(_description(pair.target), _description(pair.draft), tuple(traces))


def record_text(pair: Pair, prompt: Sequence[int], sampling: Sampling, num_tokens: int) -> Text:
    """One text of up to `num_tokens` tokens."""
    return _prepare(pair, len(prompt) + num_tokens).text(prompt, sampling, num_tokens)


def _description(model: LoadedModel) -> dict[str, str]:
    return {name: getattr(model, name) for name in _MODEL_KEYS}


def _prepare(pair: Pair, context_length: int) -> _Recorder:
    attention.register()
    vocab_size = min(pair.target.tokenizer.vocab_size, pair.target.padded_vocab_size)
    target, draft = (_engine(model, context_length) for model in pair)
    return _Recorder(target, draft, vocab_size, frozenset(pair.target.tokenizer.eos_token_ids))


def _engine(model: LoadedModel, context_length: int) -> Engine:
    """With the attention that the workers have, and KV memory for one session."""
    model.module.set_attn_implementation(TREE_ATTENTION)
    num_layers = model.module.config.get_text_config().num_hidden_layers
    return Engine(TransformersDecoder(model.module), KVCache(num_layers, 1, context_length), model.device, model.dtype)


@dataclass(frozen=True, slots=True)
class _Recorder:
    """Both models, ready to run, the tokens that the tokenizer knows, and those that end a text."""

    target: Engine
    draft: Engine
    vocab_size: int
    eos_token_ids: frozenset[int]

    def text(self, prompt: Sequence[int], sampling: Sampling, num_tokens: int) -> Text:
        tokens: list[int] = []
        for token in self._write(prompt, sampling):
            tokens.append(token)
            if len(tokens) == num_tokens or token in self.eos_token_ids:
                break
        return Text(sampling.seed, len(prompt), tuple(tokens), self._ranks(prompt, tokens, sampling))

    def _write(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """The target's tokens behind the prompt, for ever."""
        pending, position = list(prompt), len(prompt)
        with self.target.cache.slot() as slot:
            while True:
                [rows] = self.target.forward([chunk_segment(slot, pending, logits=True)])
                slot.keep(range(len(pending)))
                row = rows[0, : self.vocab_size]
                token = argmax(row) if sampling.greedy else coupled_token(row.double(), sampling, position)
                yield token
                pending, position = [token], position + 1

    def _ranks(self, prompt: Sequence[int], tokens: Sequence[int], sampling: Sampling) -> Ranks:
        """Of all tokens but the first, from one forward of the draft over the whole text.

        An int8 draft rounds a row by the rows beside it, and here are more of those than in a step's forwards.
        """
        if len(tokens) < 2:
            return ()
        chain = TokenTree(Topology.chain(len(tokens) - 1), tuple(tokens[:-1]))
        with self.draft.cache.slot() as slot:
            [logits] = self.draft.forward([tree_segment(slot, prompt, chain)])
        rows = enumerate(zip(logits[:, : self.vocab_size], tokens[1:], strict=True), start=len(prompt) + 1)
        return tuple(_rank(row, token, sampling, position) for position, (row, token) in rows)


def _rank(row: Tensor, token: int, sampling: Sampling, position: int) -> int | None:
    """Of the token at `position`, among the children that the draft proposes there; `row` (vocabulary,)."""
    if sampling.greedy:
        children = top_children(row, NUM_RANKS)
    else:
        (children,) = coupled_children(row[None], sampling, position, [NUM_RANKS])
    return children.index(token) if token in children else None
