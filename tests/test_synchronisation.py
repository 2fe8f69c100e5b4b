"""The host waits for the device once a step: proved on a device that lets nobody look at its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import load_engine
from pretend_device import DEVICE, Held, HiddenWait, PretendDevice
from test_drafter import TREE
from tiny_models import write_tiny_model
from torch.nn.functional import linear

from draft_worker.drafter import DraftLimits, DraftSession
from sequoia.engine.attention import tree_attention
from sequoia.engine.executor import Job
from sequoia.engine.forwards import Engine
from sequoia.engine.graphs_decoder import GraphsDecoder
from sequoia.engine.kv_cache import KVCache
from sequoia.engine.lean_decoder import LeanDecoder
from sequoia.engine.model import load_model
from sequoia.engine.sampling import RandomChoices
from sequoia.engine.sources import resolve
from sequoia.engine.weights import DecoderWeights, LayerWeights, LinearWeights, take_weights
from sequoia.rules import COUPLED, GREEDY, SAMPLE_AND_WALK, SEQUOIA, TRAVERSAL, Rule
from sequoia.sampling import Decoding, Sampling
from sequoia.topology import TokenTree, Verdict
from verify_worker.verifier import VerifyLimits, VerifySession

PROMPT = tuple(range(30, 60))
WARM = Sampling(0.9, top_p=0.95, top_k=50, min_p=0.01)
DECODINGS = {
    "greedy": Decoding(GREEDY, Sampling(0.0), 1),
    "coupled": Decoding(COUPLED, replace(WARM, seed=7), 1),
    "sample_and_walk": Decoding(SAMPLE_AND_WALK, replace(WARM, temperature=0.3), 1),
    "sequoia": Decoding(SEQUOIA, WARM, 1),
    "traversal": Decoding(TRAVERSAL, WARM, 1),
    "dead nodes": Decoding(SEQUOIA, replace(WARM, top_k=2), 1),
}
NUM_STEPS = 3
PENALISED = replace(WARM, repetition_penalty=1.2, presence_penalty=0.1, logit_bias=((7, 1.0),))


def moved(value: Any) -> Any:
    return Held(value.detach()) if isinstance(value, torch.Tensor) else value


def moved_linear(weights: LinearWeights) -> LinearWeights:
    return LinearWeights(*map(moved, weights))


def moved_layer(layer: LayerWeights) -> LayerWeights:
    values = {name: getattr(layer, name) for name in layer.__dataclass_fields__}
    return LayerWeights(
        **{name: moved_linear(x) if isinstance(x, LinearWeights) else moved(x) for name, x in values.items()}
    )


def moved_weights(weights: DecoderWeights) -> DecoderWeights:
    return DecoderWeights(
        weights.shape,
        moved(weights.embedding),
        moved(weights.output_norm),
        moved_linear(weights.head),
        {kind: moved(table) for kind, table in weights.rotations.items()},
        weights.kinds,
        map(moved_layer, list(weights.layers)),
    )


def multiply(weights: LinearWeights) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda rows: linear(rows, *weights)


def near_weights(folder: Path) -> DecoderWeights:
    weights = take_weights(load_model(resolve(str(folder)), dtype="float32", device="cpu").module, 256)
    return replace(weights, layers=iter(list(weights.layers)))


def far_engine(near: DecoderWeights, *, captures: bool) -> Engine:
    weights = moved_weights(near)
    lean = LeanDecoder(weights, pack=multiply, attention=tree_attention)
    decoder = GraphsDecoder(lean, DEVICE) if captures else lean
    cache = KVCache(weights.shape.num_layers, 4, 256)
    return Engine(decoder, cache, DEVICE, torch.float32)


class Steps:
    """A draft and a verify session on one engine; `waits` are the copies to the host of each step."""

    def __init__(
        self, engine: Engine, device: PretendDevice, decoding: Decoding, draft_decoding: Decoding | None = None
    ) -> None:
        self._engine, self._device, self.waits = engine, device, list[int]()
        self._decoding, self._draft_decoding = decoding, draft_decoding or decoding

    def run(self, job: Job[Any]) -> Any:
        before, logits = self._device.num_reads, None
        while True:
            try:
                segment = next(job) if logits is None else job.send(logits)
            except StopIteration as end:
                self.waits.append(self._device.num_reads - before)
                return end.value
            [logits] = self._engine.forward([segment])

    def texts(self, count: int) -> Iterator[tuple[TokenTree, Verdict]]:
        reads_once, cache = self._engine.reads_once, self._engine.cache
        draft_limits = DraftLimits(8, 400, reads_once)
        verify_limits = VerifyLimits(8, 400, self._engine.make_target)
        with cache.slot() as a, cache.slot() as b:
            draft = DraftSession(a, self._draft_decoding, np.random.default_rng(1), draft_limits, 200)
            choices = RandomChoices(np.random.default_rng(4))
            verify = VerifySession(b, PROMPT, self._decoding, choices, verify_limits, 200)
            draft.commit(0, PROMPT)
            for _ in range(count):
                tree = self.run(draft.grow(TREE)).tree
                verdict = self.run(verify.verify(tree))
                yield tree, verdict
                draft.commit(draft.num_committed, verdict.tokens(tree))


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    write_tiny_model(path, request.param, num_layers=2)
    return path


def far_texts(
    folder: Path, decoding: Decoding, draft_decoding: Decoding | None = None, *, captures: bool = True
) -> tuple[list[tuple[TokenTree, Verdict]], list[int]]:
    device, weights = PretendDevice(), near_weights(folder)
    with torch.inference_mode(), device:
        engine = far_engine(weights, captures=captures)
        assert engine.reads_once
        steps = Steps(engine, device, decoding, draft_decoding)
        texts = list(steps.texts(NUM_STEPS))
    return texts, steps.waits


def near_texts(folder: Path, decoding: Decoding, *, reads_once: bool) -> list[tuple[TokenTree, Verdict]]:
    engine = load_engine(folder, engine="lean", reads_once=reads_once)
    with torch.inference_mode():
        return list(Steps(engine, PretendDevice(), decoding).texts(NUM_STEPS))


@pytest.mark.parametrize(("name", "captures"), [*product(DECODINGS, [True]), ("sequoia", False)])
def test_every_step_of_draft_and_verify_waits_once_and_gives_what_the_cpu_gives(
    folder: Path, name: str, captures: bool
) -> None:
    texts, waits = far_texts(folder, DECODINGS[name], captures=captures)
    assert waits == [1] * 2 * NUM_STEPS
    expected = near_texts(folder, DECODINGS[name], reads_once=True)
    for (tree, verdict), (near_tree, near_verdict) in zip(texts, expected, strict=True):
        assert (tree.topology, tree.token_ids, verdict) == (near_tree.topology, near_tree.token_ids, near_verdict)
    assert any(verdict.accepted_nodes for _, verdict in texts)


def test_logprobs_cost_a_wait_more(folder: Path) -> None:
    decoding = Decoding(COUPLED, replace(WARM, seed=7, num_logprobs=3), 1)
    texts, waits = far_texts(folder, decoding)
    assert waits == [1, 2] * NUM_STEPS
    expected = near_texts(folder, decoding, reads_once=False)
    for (_, verdict), (_, near) in zip(texts, expected, strict=True):
        assert [each.token_id for each in verdict.logprobs] == [each.token_id for each in near.logprobs]
        raw, near_raw = ([each.raw for each in verdict.logprobs], [each.raw for each in near.logprobs])
        np.testing.assert_allclose(raw, near_raw, atol=1e-4)


@pytest.mark.parametrize("rule", [GREEDY, COUPLED, SEQUOIA, TRAVERSAL, SAMPLE_AND_WALK], ids=lambda rule: rule.name)
def test_penalised_trees_are_verified_with_one_wait(folder: Path, rule: Rule) -> None:
    """Grown here as if they were not: with penalties that goes level by level, children depend on the tokens above."""
    changes = {"temperature": 0.0 if rule is GREEDY else 0.9, "seed": 3 if rule is COUPLED else None}
    plain, penalised = (Decoding(rule, replace(each, **changes), 1) for each in (WARM, PENALISED))
    assert far_texts(folder, penalised, plain)[1] == [1] * 2 * NUM_STEPS


LOOKS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0, 0].item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(x.sum() > 0),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "assigned mask": lambda x: x.__setitem__(x > 0, 0.0),
    "numbers": lambda x: x + torch.tensor([1.0, 2.0], device=DEVICE),
    "assigned numbers": lambda x: x.__setitem__(0, torch.tensor([1.0, 2.0])),
    "host index": lambda x: x[torch.tensor([0, 1])],
    "upload": lambda x: torch.ones(2).to(DEVICE),
    "equal": lambda x: torch.equal(x, x),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
}


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_is_caught(look: str) -> None:
    with torch.inference_mode(), PretendDevice():
        numbers = torch.ones(2, 2, device=DEVICE)
        with pytest.raises((HiddenWait, RuntimeError)):
            LOOKS[look](numbers)


def test_a_copy_to_the_host_is_counted() -> None:
    device = PretendDevice()
    with torch.inference_mode(), device:
        assert (torch.ones(2, device=DEVICE) + 1).cpu().tolist() == [2.0, 2.0]
    assert device.num_reads == 1
