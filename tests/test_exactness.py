"""The promise, through three real processes: the text is the target's own, whatever the tree."""

from __future__ import annotations

import doctest
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import grpc
import pytest
import reference
import torch
from conftest import System
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from sequoia.cli.deployment import Deployment, DeploymentSettings
from sequoia.cli.steps import Steps
from sequoia.client import Client, Message
from sequoia.engine.model import load_model
from sequoia.engine.sources import resolve
from sequoia.errors import InvalidArgument, SequoiaError
from sequoia.rpc import open_channel
from sequoia.rules import SAMPLED_RULES
from sequoia.sampling import Sampling
from sequoia.topology import DynamicShape, Topology, TreeShape
from sequoia.v1 import draft_pb2, draft_pb2_grpc
from sequoia.v1.sampling_pb2 import RULE_SEQUOIA
from sequoia.wire import sampling_to_wire, shape_to_wire

TREES = (Topology.chain(4), Topology((-1, 0, 0, 0, 1, 1, 2, 4, 5, 7)), Topology((-1, *([0] * 7))))
DYNAMIC = (DynamicShape(16, 5, 4), DynamicShape(8, 3, 1), DynamicShape(12, 8, 3))
PROMPTS = (
    "Explain why the sky is blue.",
    "Write a haiku about the sea.",
    "What is the capital of Norway, and what is it known for?",
    "List five uses of a paper clip.",
    "Translate to French: the cat sleeps on the sofa.",
    "Write a Python function that reverses a list.",
    "Who wrote Don Quixote?",
    "Give me a recipe for pancakes.",
    "Summarise the plot of Romeo and Juliet in two sentences.",
    "Count from one to twenty.",
)


def greedy(module: torch.nn.Module, prompt: list[int], max_tokens: int) -> list[int]:
    """What `transformers` generates, an end-of-sequence token included."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
        )
    return output[0, len(prompt) :].tolist()


def test_greedy_output_equals_generate_on_every_architecture(every_tiny_system: System) -> None:
    module = AutoModelForCausalLM.from_pretrained(every_tiny_system.target, dtype=torch.float32)
    num_accepted = 0
    for seed in range(10):
        prompt = torch.randint(5, 250, (3 + 7 * seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        found = every_tiny_system.client.generate(
            prompt, max_tokens=64, temperature=0, speculation=TREES[seed % len(TREES)]
        )
        assert list(found.token_ids) == greedy(module, prompt, 64)
        num_accepted += found.speculation.num_accepted_tokens
        # While the draft reads the prompt, and for no other reason: the steps that one fallback once ran on for.
        assert found.speculation.fallback_reason in ("", "draft: not ready yet")
        assert found.speculation.num_fallback_steps <= 5
    assert num_accepted > 50, "a draft that is never accepted proves nothing"


def test_greedy_output_with_dynamic_trees_equals_generate_on_every_architecture(every_tiny_system: System) -> None:
    module = AutoModelForCausalLM.from_pretrained(every_tiny_system.target, dtype=torch.float32)
    num_accepted = 0
    for seed in range(6):
        prompt = torch.randint(5, 250, (3 + 7 * seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        shape = DYNAMIC[seed % len(DYNAMIC)]
        found = every_tiny_system.client.generate(prompt, max_tokens=64, temperature=0, speculation=shape)
        assert list(found.token_ids) == greedy(module, prompt, 64)
        assert shape in {usage.shape for usage in found.speculation.trees}
        assert found.speculation.offered == (), "a dynamic tree says nothing about ranks"
        num_accepted += found.speculation.num_accepted_tokens
    assert num_accepted > 50, "a draft that is never accepted proves nothing"


def test_speculation_off_gives_the_same_greedy_text(tiny_system: System) -> None:
    prompt = list(range(20, 60))
    texts = {
        tiny_system.client.generate(prompt, max_tokens=48, temperature=0, speculation=mode).token_ids
        for mode in ("auto", "off", "tree")
    }
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("rule", "shape"),
    [
        *((rule.name, TREES[1]) for rule in SAMPLED_RULES),
        *((rule.name, DYNAMIC[0]) for rule in SAMPLED_RULES if rule.takes_any_shape),
    ],
    ids=str,
)
def test_first_three_tokens_have_the_targets_joint_law(tiny_system: System, rule: str, shape: TreeShape) -> None:
    """Chi-square of 500 triples of tokens, cells below 5 expected pooled, z above 3.72: false alarm 1e-4 a rule.

    Answers are longer, because a tree is cut to what is left of an answer. The draws are seeded under `coupled`; the
    other rules draw afresh, so that alarm can go off.
    """
    module = AutoModelForCausalLM.from_pretrained(tiny_system.target, dtype=torch.float32)
    draws, prompt = 500, list(range(30, 50))
    parameters = {
        **{"temperature": 0.7, "top_k": 4, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.2},
        **{"presence_penalty": 0.3, "frequency_penalty": 0.2},
    }

    def law(tokens: list[int]) -> dict[int, float]:
        with torch.inference_mode():
            row = module(torch.tensor([tokens])).logits[0, -1].tolist()
        p = reference.probabilities(row, Sampling(**parameters), prompt, tokens[len(prompt) :])
        return {token: mass for token, mass in enumerate(p) if mass > 0.0}

    joint = {(a, b): pa * pb for a, pa in law(prompt).items() for b, pb in law([*prompt, a]).items()}
    triples = {(*ab, c): pab * pc for ab, pab in joint.items() for c, pc in law([*prompt, *ab]).items()}

    def triple(draw: int) -> tuple[int, ...]:
        seed = draw if rule == "coupled" else None
        found = tiny_system.client.generate(
            prompt, max_tokens=6, **parameters, rule=rule, seed=seed, ignore_eos=True, speculation=shape
        )
        assert found.rule == rule
        return found.token_ids[:3]

    found = Counter(map(triple, range(draws)))
    assert set(found) <= set(triples)
    assert chi_square_z(found, triples, draws) < 3.72


@pytest.mark.parametrize("rule", [rule.name for rule in SAMPLED_RULES if not rule.takes_any_shape])
def test_a_dynamic_tree_is_refused_where_it_would_not_be_exact(tiny_system: System, rule: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"speculation\.dynamic: {rule} is exact only with"):
        tiny_system.client.generate([5, 6, 7], max_tokens=4, temperature=0.7, rule=rule, speculation=DYNAMIC[0])


async def test_the_draft_worker_refuses_a_dynamic_tree_of_draws(tiny_system: System) -> None:
    sampling = sampling_to_wire(Sampling(0.7))
    opening = draft_pb2.DraftOpen(token_ids=[5, 6, 7], num_prompt_tokens=1, sampling=sampling, rule=RULE_SEQUOIA)
    step = draft_pb2.DraftStep(step=1, base_len=2, token_ids=[7], **shape_to_wire(DYNAMIC[0]))
    async with open_channel(tiny_system.deployment.processes["draft"].address) as channel:
        call = draft_pb2_grpc.DraftServiceStub(channel).Draft(timeout=30)
        await call.write(draft_pb2.DraftRequest(open=opening))
        await call.read()
        await call.write(draft_pb2.DraftRequest(step=step))
        with pytest.raises(grpc.aio.AioRpcError, match="dynamic: sequoia is exact only with"):
            await call.read()
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


def chi_square_z(found: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float], draws: int) -> float:
    """The statistic as a standard normal deviate."""
    cells = [(found[key], draws * p) for key, p in law.items() if draws * p >= 5]
    rest = (draws - sum(count for count, _ in cells), draws - sum(expected for _, expected in cells))
    cells = [*cells, rest] if rest[1] >= 1 else cells
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    freedom = len(cells) - 1
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


@pytest.fixture(scope="module")
def real_client() -> Iterator[Client]:
    settings = DeploymentSettings(target="smollm2-135m", dtype="float32", listen="127.0.0.1:0", context_length=1024)
    with (
        Deployment(settings, Steps(Console(quiet=True))) as deployment,
        Client(deployment.address, timeout_seconds=120) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def real_module() -> torch.nn.Module:
    files = resolve("smollm2-135m")
    return load_model(files, dtype="float32", device="cpu").module


def assert_equal_to_generate(client: Client, module: torch.nn.Module, prompts: Sequence[str]) -> None:
    files = resolve("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(files.directory, gguf_file=files.gguf_file)
    num_accepted = 0
    for index, text in enumerate(prompts):
        found = client.generate([Message("user", text)], max_tokens=64, temperature=0, speculation=TREES[index % 2])
        messages = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert list(found.token_ids) == greedy(module, prompt, 64), text
        num_accepted += found.speculation.num_accepted_tokens
    assert num_accepted > 10 * len(prompts)


@pytest.mark.timeout(420)  # the first run fetches and unpacks the model
def test_greedy_output_equals_generate_on_the_real_model(real_client: Client, real_module: torch.nn.Module) -> None:
    assert_equal_to_generate(real_client, real_module, PROMPTS[:2])


@pytest.mark.parametrize("method", [Client.generate, Client.batch])
def test_the_examples_of_the_client_say_what_it_answers(real_client: Client, method: Callable[..., object]) -> None:
    names = {"client": real_client, "Message": Message, "SequoiaError": SequoiaError}
    [example] = doctest.DocTestFinder().find(method, globs=names)
    found = doctest.DocTestRunner().run(example)
    assert (found.attempted, found.failed) == (1, 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_greedy_output_equals_generate_on_ten_prompts(real_client: Client, real_module: torch.nn.Module) -> None:
    assert_equal_to_generate(real_client, real_module, PROMPTS)
