"""What comes from the network is measured before it is copied, tokenised or allocated for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tiny_models import build_tokenizer

from coordinator.descriptions import check_description
from coordinator.request import parse_request
from coordinator.text import TextCodec
from sequoia.errors import FailedPrecondition, InvalidArgument
from sequoia.rules import DEFAULT_RULE
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1 import draft_pb2, sampling_pb2, tree_pb2, verify_pb2, worker_pb2
from sequoia.wire import sampling_from_wire, tree_from_wire

TARGET = worker_pb2.WorkerDescription(vocab_size=400, context_length=100, max_tree_size=64)
DESCRIPTION = worker_pb2.WorkerDescription(
    instance_id="a", model="m", vocab_size=400, padded_vocab_size=400, context_length=100, max_tree_size=64, num_slots=4
)


class Untouched:
    """A tokenizer that must not be asked."""

    def encode(self, *_: object, **__: object) -> Any:
        raise AssertionError("the text was tokenised")


@pytest.fixture(scope="module")
def files() -> worker_pb2.TokenizerFiles:
    template = "{% for each in messages %}{{ each.content }}{{ each.content }}{% endfor %}"
    tokenizer = build_tokenizer(400).backend_tokenizer.to_str().encode()
    return worker_pb2.TokenizerFiles(tokenizer_json=tokenizer, chat_template=template)


@pytest.fixture
def codec(files: worker_pb2.TokenizerFiles) -> TextCodec:
    return TextCodec.from_files(files)


def parse(message: pb.GenerateRequest, codec: TextCodec) -> Any:
    return parse_request(message, codec, TARGET, 64, DEFAULT_RULE)


def longest(codec: TextCodec) -> int:
    """Bytes of the longest token."""
    return codec._longest_token


def test_a_text_that_the_context_cannot_hold_is_refused_before_it_is_tokenised(codec: TextCodec) -> None:
    codec._tokenizer = Untouched()  # type: ignore[assignment]
    with pytest.raises(InvalidArgument, match=r"text: .* more than 100 tokens of"):
        parse(pb.GenerateRequest(text="a" * (100 * longest(codec) + 1)), codec)


def test_a_text_of_the_longest_tokens_that_fits_is_served(codec: TextCodec) -> None:
    token = max(codec._tokenizer.get_vocab(), key=len)
    codec.encode(token * 100, 100)


def test_a_chat_is_measured_as_it_was_rendered(codec: TextCodec) -> None:
    half = "a" * (60 * longest(codec))
    codec._tokenizer = Untouched()  # type: ignore[assignment]
    with pytest.raises(InvalidArgument, match=r"chat: .* more than 100 tokens of"):
        parse(pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content=half)])), codec)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=100 * [1])), "token_ids"),
        (pb.GenerateRequest(chat=pb.Chat(messages=100 * [pb.ChatMessage(role="user")])), "chat"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), generated_token_ids=300 * [1]), "generated_token_ids"),
        (pb.GenerateRequest(text="a", stop=17 * [b"a"]), "stop"),
        (
            pb.GenerateRequest(
                text="a",
                speculation=pb.Speculation(
                    mode=pb.SPECULATION_MODE_TREE, topology=tree_pb2.Topology(parents=(-1, *64 * [0]))
                ),
            ),
            "speculation.topology",
        ),
    ],
)
def test_a_list_that_is_too_long_is_refused_by_name(codec: TextCodec, message: pb.GenerateRequest, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(message, codec)
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids"])
def test_lists_of_sampling_are_counted_before_they_are_read(field: str) -> None:
    message = sampling_pb2.Sampling(logit_bias=dict.fromkeys(range(1025), 1.0), stop_token_ids=65 * [1])
    message.ClearField("stop_token_ids" if field == "logit_bias" else "logit_bias")
    with pytest.raises(InvalidArgument, match=rf"sampling.{field}: has \d+ entries; at most \d+ are served"):
        sampling_from_wire(message, 10**6)


def test_a_tree_has_a_token_a_node_and_no_others_are_read() -> None:
    message = tree_pb2.TokenTree(topology=tree_pb2.Topology(parents=[-1]), token_ids=10**5 * [1])
    with pytest.raises(InvalidArgument, match=r"tree.token_ids: 100000 token ids for 1 nodes"):
        tree_from_wire(message, 64, 400)


Change = Callable[[worker_pb2.DescribeResponse], object]
CHANGES: dict[str, Change] = {
    "model": lambda found: setattr(found.worker, "model", "m" * 4097),
    "hardware_key": lambda found: setattr(found.worker, "hardware_key", "m" * 4097),
    "max_tree_size": lambda found: setattr(found.worker, "max_tree_size", 2**16 + 1),
    "vocab_size": lambda found: setattr(found.worker, "vocab_size", 2**31 + 1),
    "num_slots": lambda found: setattr(found.worker, "num_slots", 2**32 - 1),
    "rules": lambda found: found.worker.rules.extend(65 * [1]),
    "latencies": lambda found: found.worker.latencies.extend(1025 * [worker_pb2.LatencyCurve()]),
    "eos_token_ids": lambda found: found.tokenizer.eos_token_ids.extend(range(5000)),
    "chat_template": lambda found: setattr(found.tokenizer, "chat_template", "a" * (2**20 + 1)),
    "special_tokens": lambda found: found.tokenizer.special_tokens.update({"a": 4096 * "b"}),
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_worker_that_says_more_than_any_has_is_not_believed(field: str) -> None:
    response = worker_pb2.DescribeResponse(worker=DESCRIPTION)
    check_description(response)
    CHANGES[field](response)
    with pytest.raises(FailedPrecondition, match=f"has a {field} that no worker has"):
        check_description(response)


@pytest.mark.parametrize(
    "curve",
    [
        worker_pb2.LatencyCurve(num_tokens=[2**20 + 1], seconds=[1.0]),
        worker_pb2.LatencyCurve(num_tokens=range(1, 4098), seconds=[1.0]),
        worker_pb2.LatencyCurve(num_tokens=[1], seconds=4097 * [1.0]),
        worker_pb2.LatencyCurve(num_sessions=2**21),
        worker_pb2.LatencyCurve(num_context_tokens=2**32 - 1),
    ],
)
def test_a_curve_that_none_measured_is_not_believed(curve: worker_pb2.LatencyCurve) -> None:
    response = worker_pb2.DescribeResponse(worker=DESCRIPTION)
    response.worker.latencies.append(curve)
    with pytest.raises(FailedPrecondition, match="has a latencies that no worker has"):
        check_description(response)


# Every field that has no bound by its type, and where it is bounded. A new one has to be thought of.
BOUNDED = {
    "Chat.messages": "request._prompt, by the context",
    "Chat.tools_json": "tools.read_json, tools.check_tools",
    "ChatMessage.role": "the message",
    "ChatMessage.content": "TextCodec, as it was rendered",
    "ChatMessage.tool_calls_json": "tools.read_json, tools.check_calls",
    "ChatMessage.tool_call_id": "TextCodec, as it was rendered",
    "ChatMessage.name": "TextCodec, as it was rendered",
    "DraftDistributions.token_ids": "wire._q_from_wire; replies.is_tree",
    "DraftDistributions.weights": "wire._q_from_wire; replies.is_tree",
    "DraftOpen.token_ids": "DraftServicer._tokens",
    "DraftResponse.ngram_nodes": "DraftStream._is_tree",
    "DraftStep.token_ids": "DraftServicer._tokens",
    "GenerateRequest.generated_token_ids": "request._generated",
    "GenerateRequest.stop": "stops.parse_stops",
    "GenerateRequest.text": "TextCodec.encode",
    "LatencyCurve.num_tokens": "check_description",
    "LatencyCurve.seconds": "check_description",
    "Sampling.json_schema": "sampling.Sampling; grammar.Grammars, where it is read",
    "Sampling.logit_bias": "wire.sampling_from_wire",
    "Sampling.stop_token_ids": "wire.sampling_from_wire",
    "TokenIds.ids": "request._prompt",
    "TokenLogprobs.token_bytes": "replies.is_verdict: a worker has none",
    "TokenLogprobs.top": "replies.is_verdict",
    "TokenTree.token_ids": "wire.tree_from_wire; replies.is_tree",
    "TokenizerFiles.chat_template": "check_description",
    "TokenizerFiles.eos_token_ids": "check_description",
    "TokenizerFiles.special_tokens": "check_description",
    "TokenizerFiles.tokenizer_json": "the message",
    "TopLogprob.token_bytes": "replies.is_verdict: a worker has none",
    "Topology.parents": "wire.topology_from_wire; replies.is_tree",
    "Verdict.accepted_nodes": "replies.is_verdict: it ends at the first that is no path",
    "Verdict.logprobs": "replies.is_verdict",
    "VerifyOpen.token_ids": "VerifyServicer._opening",
    "WorkerDescription.device_id": "check_description",
    "WorkerDescription.dtype": "check_description",
    "WorkerDescription.hardware_key": "check_description",
    "WorkerDescription.instance_id": "check_description",
    "WorkerDescription.latencies": "check_description",
    "WorkerDescription.model": "check_description",
    "WorkerDescription.model_revision": "check_description",
    "WorkerDescription.quantization": "check_description",
    "WorkerDescription.rules": "check_description",
    "WorkerDescription.tokenizer_hash": "check_description",
}
# What only a coordinator says, to clients that trust it: bounded by the message.
FROM_THE_COORDINATOR = (
    "GenerateResponse",
    "Finish",
    "SpeculationReport",
    "TreeUsage",
    "RankCounts",
    "DescribePairResponse",
    "ExplainResponse",
    "RealisedPace",
)


def test_every_field_without_a_bound_by_its_type_has_one_here() -> None:
    files = [each.DESCRIPTOR for each in (pb, draft_pb2, sampling_pb2, tree_pb2, verify_pb2, worker_pb2)]
    messages = [each for file in files for each in file.message_types_by_name.values()]
    unbounded = {
        f"{message.name}.{field.name}"
        for message in messages
        if message.name not in FROM_THE_COORDINATOR
        for field in message.fields
        if field.is_repeated or field.type in (field.TYPE_STRING, field.TYPE_BYTES)
    }
    assert unbounded == BOUNDED.keys()
