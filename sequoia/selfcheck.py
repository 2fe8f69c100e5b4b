"""Whether the rules of a running system leave the target's distribution unchanged, measured through its client alone.

The law of the first three tokens after a prompt is read from the logprobs of plain decoding, after every beginning that
top_k leaves possible. Then every rule answers the prompt many times, and how often which three tokens come is compared
with that law. Greedy text and the text of a seed must not change at all: they are compared token by token.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

from sequoia.access import Access
from sequoia.checks import (
    OFF,
    Difference,
    Drafting,
    IdentityCheck,
    Law,
    LawCheck,
    SelfCheck,
    Tokens,
    check_law,
    has_16_bits,
    near_tie,
    simulate,
)
from sequoia.client import AsyncClient, Generation, RequestOptions
from sequoia.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from sequoia.rules import COUPLED, GREEDY, SAMPLED_RULES
from sequoia.topology import TokenLogprobs, Topology

Progress: TypeAlias = Callable[[int, int], None]
Step: TypeAlias = Callable[[str], AbstractContextManager[Progress]]

# Ids that every vocabulary has. The sampled answers are short: a draft with much to prefill would miss all their steps.
LAW_PROMPTS = tuple((token_id,) for token_id in range(100, 116))
PROMPTS = (tuple(range(100, 116)), tuple(range(140, 156)), tuple(range(180, 196)))
SHAPES = {"chain": Topology.chain(4), "tree": Topology((-1, 0, 0, 0, 1, 1, 2))}

_NUM_TOKENS = 3
_TOP_K = 4
# More than top_k, to see what is cut, and all that is tied with it.
_NUM_LOGPROBS = 8
_LITTLE_AT_STAKE = 0.03
# Half the change of a logprob. SmolLM2-135M in bfloat16: 0.08 on average between a tree's forward and a plain one.
_ROUNDING_OF_16_BITS = 0.05
_NUM_IDENTITY_TOKENS = 64
_SEED = 1
_MOST_REQUESTS = 4
_RETRY_SECONDS = (0.05, 0.1, 0.2, 0.5, *[1.0] * 20)


async def check_system(
    address: str, *, temperature: float, num_samples: int, step: Step, access: Access | None = None
) -> SelfCheck:
    """Check every rule on the coordinator at `address`. `step` is entered around each part (see sequoia.cli.steps).

    Raises InvalidArgument for a temperature that is not above 0 or too few samples, FailedPrecondition naming `draft`
    when there is no draft worker, ResourceExhausted when others keep every slot, Unavailable when a part is missing.
    """
    if not temperature > 0.0:
        raise InvalidArgument(f"is {temperature:g}; it must be above 0 (greedy text is checked anyway)", "temperature")
    if num_samples < 1:
        raise InvalidArgument(f"is {num_samples}; it must be at least 1", "samples")
    async with AsyncClient(address, **(access or {})) as client:
        pair = await client.describe_pair()
        if not pair.HasField("draft"):
            raise FailedPrecondition("there is no draft worker at present; start one and check again", "draft")
        requests = Requests(client, min(pair.verify.num_slots, pair.draft.num_slots))
        laws = await _check_laws(requests, pair.verify.dtype, temperature, num_samples, step)
        identities = await _check_identities(requests, pair.verify.dtype, temperature, step)
    return SelfCheck(pair.verify.model, pair.draft.model, pair.verify.dtype, temperature, laws, identities)


class Requests:
    """Sends requests a few at a time, and fewer from when the system is out of slots."""

    def __init__(self, client: AsyncClient, num_slots: int) -> None:
        self._client = client
        # The slots of an answer are free a moment after its last message.
        self._width = max(1, min(_MOST_REQUESTS, num_slots - 1))
        self._free = asyncio.Semaphore(self._width)

    async def answers(
        self, prompts: Sequence[Tokens], options: RequestOptions, on_progress: Progress = lambda done, total: None
    ) -> list[Generation]:
        """One answer a prompt, in that order; no end-of-sequence token ends one."""
        num_done = 0

        async def answer(prompt: Tokens) -> Generation:
            nonlocal num_done
            generation = await self._answer(prompt, {**options, "ignore_eos": True})
            on_progress(num_done := num_done + 1, len(prompts))
            return generation

        return await asyncio.gather(*map(answer, prompts))

    async def _answer(self, prompt: Tokens, options: RequestOptions) -> Generation:
        for seconds in _RETRY_SECONDS:
            async with self._free:
                try:
                    return await self._client.generate(prompt, **options)
                except ResourceExhausted:
                    await self._narrow()
                    await asyncio.sleep(seconds * random.uniform(0.5, 1.5))
        return await self._client.generate(prompt, **options)

    async def _narrow(self) -> None:
        if self._width > 1:
            self._width -= 1
            await self._free.acquire()


async def _check_laws(
    requests: Requests, dtype: str, temperature: float, num_samples: int, step: Step
) -> tuple[LawCheck, ...]:
    with step("reading the target's law") as on_progress:
        law = await _clearest_law(requests, dtype, temperature, on_progress)
    reference = simulate(law, num_samples)
    # A tree is cut where the answer ends: one token more, and the tree after the first token keeps all its levels.
    options: RequestOptions = {"temperature": temperature, "top_k": _TOP_K, "max_tokens": _NUM_TOKENS + 1}
    speculation: dict[str, RequestOptions] = {OFF: {"speculation": "off"}}
    speculation |= {rule.name: {"speculation": SHAPES["tree"], "rule": rule.name} for rule in SAMPLED_RULES}
    checks = []
    for rule, speculating in speculation.items():
        with step(f"sampling: {rule}") as on_progress:
            answers = await requests.answers([law.prompt] * num_samples, {**options, **speculating}, on_progress)
        samples = Counter(each.token_ids[:_NUM_TOKENS] for each in answers)
        checks.append(check_law(rule, samples, law, reference, _drafting(answers)))
    return tuple(checks)


async def _clearest_law(requests: Requests, dtype: str, temperature: float, on_progress: Progress) -> Law:
    """Of the prompts, one after which rounding matters little, or else least."""
    laws: list[Law] = []
    for prompt in LAW_PROMPTS:
        laws.append(await target_law(requests, prompt, dtype, temperature))
        on_progress(len(laws), len(LAW_PROMPTS))
        if sum(laws[-1].at_stake.values()) < _LITTLE_AT_STAKE:
            break
    return min(laws, key=lambda law: law.allowance)


async def target_law(requests: Requests, prompt: Tokens, dtype: str, temperature: float) -> Law:
    """The law of the first three tokens after a prompt: one request for every beginning of up to two tokens."""
    options: RequestOptions = {"temperature": temperature, "top_k": _TOP_K, "speculation": "off"}
    p: dict[Tokens, float] = {(): 1.0}
    at_stake: dict[Tokens, float] = {}
    for _ in range(_NUM_TOKENS):
        prompts = [prompt + beginning for beginning in p]
        answers = await requests.answers(prompts, {**options, "max_tokens": 1, "logprobs": _NUM_LOGPROBS})
        rows = {beginning: answer.logprobs[0] for beginning, answer in zip(p, answers, strict=True)}
        for beginning, row in rows.items():
            if _gap_at_cut(row) < near_tie(dtype):
                at_stake[beginning] = p[beginning] * min(_kept(row).values())
        p = {(*beginning, t): p[beginning] * own for beginning, row in rows.items() for t, own in _kept(row).items()}
    return Law(prompt, p, at_stake, _ROUNDING_OF_16_BITS if has_16_bits(dtype) else 0.0)


def _kept(row: TokenLogprobs) -> dict[int, float]:
    """The probabilities of the tokens that are not cut."""
    return {token_id: math.exp(processed) for token_id, _, processed in row.top if math.isfinite(processed)}


def _gap_at_cut(row: TokenLogprobs) -> float:
    """Between the raw logprobs of the least likely token that is kept and the likeliest that is cut."""
    kept = [raw for _, raw, processed in row.top if math.isfinite(processed)]
    cut = [raw for _, raw, processed in row.top if not math.isfinite(processed)]
    return min(kept) - max(cut, default=-math.inf)


async def _check_identities(
    requests: Requests, dtype: str, temperature: float, step: Step
) -> tuple[IdentityCheck, ...]:
    options: dict[str, RequestOptions] = {
        GREEDY.name: {"temperature": 0.0, "logprobs": 2},
        COUPLED.name: {"temperature": temperature, "seed": _SEED},
    }
    checks = []
    for rule, own in options.items():
        with step(f"comparing texts: {rule}"):
            checks.append(await _check_identity(requests, rule, dtype, own))
    return tuple(checks)


async def _check_identity(requests: Requests, rule: str, dtype: str, options: RequestOptions) -> IdentityCheck:
    options = {**options, "rule": rule, "max_tokens": _NUM_IDENTITY_TOKENS}
    plain = await requests.answers(PROMPTS, {**options, "speculation": "off"})
    differences: list[Difference] = []
    drafted: list[Generation] = []
    for shape, topology in SHAPES.items():
        answers = await requests.answers(PROMPTS, {**options, "speculation": topology})
        drafted += answers
        for prompt, (expected, found) in enumerate(zip(plain, answers, strict=True)):
            if expected.token_ids != found.token_ids:
                differences.append(_difference(prompt, shape, expected, found))
    return IdentityCheck(rule, dtype, tuple(differences), _drafting(drafted))


def _difference(prompt: int, shape: str, expected: Generation, found: Generation) -> Difference:
    pairs = zip(expected.token_ids, found.token_ids, strict=True)
    num_same_tokens = next(index for index, pair in enumerate(pairs) if pair[0] != pair[1])
    if not expected.logprobs:
        return Difference(prompt, shape, num_same_tokens, gap=None)
    (_, best, _), (_, second, _) = expected.logprobs[num_same_tokens].top
    return Difference(prompt, shape, num_same_tokens, best - second)


def _drafting(answers: Sequence[Generation]) -> Drafting:
    figures = [each.speculation for each in answers]
    reasons = (each.fallback_reason for each in reversed(figures) if each.fallback_reason)
    return Drafting(len(figures), sum(each.num_drafted_steps > 0 for each in figures), next(reasons, ""))
