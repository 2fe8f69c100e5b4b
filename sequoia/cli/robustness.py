"""Acceptance over temperature: how much of a draft's children each rule accepts, the shipped functions in one process.

After Chen et al. 2024 (arXiv 2402.12374). Every position of a text counts once; steps seldom begin within the stretches
that are easy to guess, so that the tokens per step predicted from these figures are too many by several per cent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig

from sequoia.engine.children import coupled_children, draft_distributions, draw_children, top_children
from sequoia.engine.model import LoadedModel, load_model
from sequoia.engine.quantization import quantize_int8
from sequoia.engine.sampling import RandomChoices, coupled_token, target_distribution
from sequoia.engine.siblings import WholeTarget
from sequoia.engine.sources import resolve
from sequoia.engine.verification import reject_recursively, walk
from sequoia.errors import FailedPrecondition, InvalidArgument
from sequoia.planner import MAX_LEVELS, expected_tokens, optimal_tree
from sequoia.sampling import Sampling
from sequoia.topology import DraftDistributions, TokenTree, Topology, Verdict

SEED = 0
TEXT_TEMPERATURE = 0.6
TREE_SIZE = 16
# Trees drawn at every position, for the rules whose acceptance is a matter of chance.
NUM_DRAWS = 16

_MODEL_KEYS = ("reference", "revision", "dtype_name", "quantization")

Float = NDArray[np.float64]


class Pair(NamedTuple):
    """Two models that speak of the same tokens."""

    target: LoadedModel
    draft: LoadedModel


class Text(NamedTuple):
    """A prompt and what the target wrote behind it."""

    token_ids: Tensor  # (1, length) int64
    num_prompt_tokens: int


class LogitPair(NamedTuple):
    """Both models' logits at the same positions, on the CPU."""

    target: Tensor  # (positions, vocabulary)
    draft: Tensor  # (positions, vocabulary)


@dataclass(frozen=True, slots=True)
class Position:
    """One position at one temperature, as a rule meets it."""

    number: int
    target_logits: Tensor  # (vocabulary,)
    draft_logits: Tensor  # (vocabulary,)
    sampling: Sampling
    p: Tensor  # (vocabulary,) float64
    q: DraftDistributions  # one row
    num_children: int
    generator: np.random.Generator


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What one rule accepts at one temperature. `by_rank[rank]`: P(the child of that rank is the accepted one)."""

    rule: str
    temperature: float
    by_rank: tuple[float, ...]
    standard_error: float  # of `total`, from its spread over the positions

    @property
    def total(self) -> float:
        """Probability that any of the children is accepted."""
        return sum(self.by_rank)

    @property
    def tokens_per_step(self) -> float:
        """Expected of the best tree of TREE_SIZE nodes for this vector."""
        return expected_tokens(optimal_tree(self.by_rank, TREE_SIZE, MAX_LEVELS), self.by_rank)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "acceptance": self.total, "tokens_per_step": self.tokens_per_step}


def measure(
    logits: LogitPair, temperatures: Sequence[float], num_children: int, on_progress: Callable[[int, int], None]
) -> list[Acceptance]:
    """Every rule at every temperature, by temperature first. The same logits give the same figures.

    `on_progress` is called with (positions done, positions in all).
    """
    found: list[Acceptance] = []
    num_positions = len(logits.target)
    for index, temperature in enumerate(temperatures):
        shares = {rule: np.zeros((num_positions, num_children)) for rule in RULES}
        for position in _positions(logits, Sampling(temperature=temperature), num_children):
            on_progress(index * num_positions + position.number, len(temperatures) * num_positions)
            for rule, accepted in RULES.items():
                shares[rule][position.number] = accepted(position)
        found += [_acceptance(rule, temperature, each) for rule, each in shares.items()]
    return found


def to_dict(pair: Pair, found: Sequence[Acceptance], num_positions: int) -> dict[str, Any]:
    """Ready for JSON: the figures, and all that they depend on."""
    return {
        **{role: {name: getattr(model, name) for name in _MODEL_KEYS} for role, model in pair._asdict().items()},
        "num_positions": num_positions,
        "num_children": len(found[0].by_rank),
        "num_draws": NUM_DRAWS,
        "text_temperature": TEXT_TEMPERATURE,
        "tree_size": TREE_SIZE,
        "seed": SEED,
        "results": [each.to_dict() for each in found],
    }


def load_pair(target: str, draft: str, *, draft_quantization: str, dtype: str) -> Pair:
    """Both models by reference. Raises FailedPrecondition naming `draft` when their tokenizers differ."""
    if draft_quantization == "int4":
        raise InvalidArgument("is int4, which this benchmark does not know; use int8 or none", "draft-quantization")
    load = partial(load_model, dtype=dtype)
    pair = Pair(
        load(resolve(target), device="auto"),
        load(resolve(draft), device="cpu" if draft_quantization == "int8" else "auto"),
    )
    if draft_quantization == "int8":
        quantize_int8(pair.draft.module)
        pair = pair._replace(draft=replace(pair.draft, quantization="int8"))
    if pair.target.tokenizer.tokenizer_hash != pair.draft.tokenizer.tokenizer_hash:
        raise FailedPrecondition(f"{draft} has another tokenizer than {target}", "draft")
    return pair


def write_texts(target: LoadedModel, prompts: Sequence[str], num_positions: int) -> list[Text]:
    """Texts by the target at TEXT_TEMPERATURE, about equal in length, with at least `num_positions` tokens in all."""
    tokenizer = Tokenizer.from_buffer(target.tokenizer.tokenizer_json)
    texts: list[Text] = []
    num_left = num_positions
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(SEED)
        for prompt in cycle(prompts):
            token_ids = tokenizer.encode(prompt).ids
            texts.append(_write(target, token_ids, -(-num_positions // len(prompts))))
            num_left -= texts[-1].token_ids.shape[1] - len(token_ids)
            if num_left <= 0:
                break
    return texts


def pair_logits(pair: Pair, texts: Sequence[Text], num_positions: int) -> LogitPair:
    """Both models' logits wherever the target wrote a token, for the tokens that both models and the tokenizer know."""
    width = min(pair.target.tokenizer.vocab_size, *(model.padded_vocab_size for model in pair))
    return LogitPair(*(_written_logits(model, texts)[:num_positions, :width] for model in pair))


def _write(target: LoadedModel, prompt: list[int], max_tokens: int) -> Text:
    ids = torch.tensor([prompt], device=target.device)
    eos_token_ids = list(target.tokenizer.eos_token_ids)
    # Neutral by name: what is left out here, the model's own generation config would decide.
    config = GenerationConfig(
        do_sample=True,
        temperature=TEXT_TEMPERATURE,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=max_tokens,
        eos_token_id=eos_token_ids or None,
        pad_token_id=eos_token_ids[0] if eos_token_ids else 0,
    )
    module: Any = target.module
    output = module.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return Text(output, len(prompt))


def _written_logits(model: LoadedModel, texts: Iterable[Text]) -> Tensor:
    """(positions, padded vocabulary) what the model made of every written token before it stood there."""
    with torch.inference_mode():
        rows = [
            model.module(text.token_ids.to(model.device)).logits[0, text.num_prompt_tokens - 1 : -1].cpu()
            for text in texts
        ]
    return torch.cat(rows)


def _positions(logits: LogitPair, sampling: Sampling, num_children: int) -> Iterable[Position]:
    generator = np.random.default_rng(SEED)
    for number, (target_row, draft_row) in enumerate(zip(logits.target, logits.draft, strict=True)):
        p = target_distribution(target_row.double(), sampling)
        q = draft_distributions(draft_row[None], sampling)
        yield Position(number, target_row, draft_row, sampling, p, q, num_children, generator)


def _acceptance(rule: str, temperature: float, shares: Float) -> Acceptance:
    """Of `shares` (positions, children)."""
    standard_error = shares.sum(axis=1).std() / len(shares) ** 0.5
    return Acceptance(rule, temperature, tuple(shares.mean(axis=0).tolist()), float(standard_error))


def _sequoia(at: Position) -> Float:
    return _share(at, (_reject(at, draw_children(at.q, 0, at.num_children, at.generator)) for _ in range(NUM_DRAWS)))


def _specinfer(at: Position) -> Float:
    """Independent draws, so that a token may come twice (Miao et al. 2023, arXiv 2305.09781)."""
    q = at.q.weights[0].astype(np.float64) / at.q.weights[0].sum(dtype=np.float64)
    draws = at.generator.choice(at.q.token_ids[0], (NUM_DRAWS, at.num_children), p=q).tolist()
    return _share(at, (_reject(at, tuple(tokens), with_replacement=True) for tokens in draws))


def _coupled(at: Position) -> Float:
    return _share(at, (_couple(at, replace(at.sampling, seed=SEED + draw)) for draw in range(NUM_DRAWS)))


def _top_k(at: Position) -> Float:
    """Exactly: a walk along the target's own tokens accepts a child as often as p has its token."""
    return at.p[list(top_children(at.draft_logits, at.num_children))].numpy()


# By name, what they accept of one position's children: (children,) by rank.
RULES: dict[str, Callable[[Position], Float]] = {
    "sequoia": _sequoia,
    "coupled": _coupled,
    "specinfer": _specinfer,
    "naive top-k": _top_k,
}


def _reject(at: Position, tokens: tuple[int, ...], *, with_replacement: bool = False) -> Verdict:
    tree, choices = _one_level(tokens, at.q), RandomChoices(at.generator)
    return reject_recursively(tree, lambda node: WholeTarget(at.p), choices, with_replacement=with_replacement)


def _couple(at: Position, sampling: Sampling) -> Verdict:
    (tokens,) = coupled_children(at.draft_logits[None], sampling, at.number, [at.num_children])
    token = coupled_token(at.target_logits.double(), sampling, at.number)
    return walk(_one_level(tokens), lambda node: token)


def _one_level(tokens: tuple[int, ...], q: DraftDistributions | None = None) -> TokenTree:
    return TokenTree(Topology((-1, *[0] * len(tokens))), (0, *tokens), q)


def _share(at: Position, verdicts: Iterable[Verdict]) -> Float:
    """How often each child was the accepted one, by rank; node 1 has rank 0."""
    ranks = [node - 1 for verdict in verdicts for node in verdict.accepted_nodes]
    return np.bincount(ranks, minlength=at.num_children) / NUM_DRAWS
