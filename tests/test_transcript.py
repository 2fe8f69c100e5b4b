"""Ends inside an accepted run: end-of-sequence, stop strings, max_tokens; and what is counted on the way."""

from __future__ import annotations

import pytest
from tiny_models import build_tokenizer

from coordinator.report import Report
from coordinator.text import TextCodec, TextStream
from coordinator.transcript import Step, Transcript
from sequoia import topology
from sequoia.sampling import Sampling
from sequoia.v1.coordinator_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP
from sequoia.v1.draft_pb2 import (
    DRAFT_AHEAD_HIT,
    DRAFT_AHEAD_MISS,
    DRAFT_AHEAD_NOT_ATTEMPTED,
    DraftResponse,
)
from sequoia.v1.sampling_pb2 import TokenLogprobs
from sequoia.v1.tree_pb2 import TokenTree, Topology, WorkerTimes
from sequoia.v1.verify_pb2 import Verdict, VerifyResponse
from sequoia.v1.worker_pb2 import TokenizerFiles
from sequoia.wire import known_shape

EOS = 1


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    backend = build_tokenizer(400).backend_tokenizer
    return TextCodec.from_files(TokenizerFiles(tokenizer_json=backend.to_str().encode(), eos_token_ids=[EOS]))


def transcript(codec: TextCodec, max_tokens: int = 100, stops: tuple[str, ...] = (), min_tokens: int = 0) -> Transcript:
    sampling = Sampling(stop_token_ids=tuple(codec.eos_token_ids), min_tokens=min_tokens)
    return Transcript((5, 6, 7), max_tokens, sampling, TextStream(codec, stops))


def tokens(codec: TextCodec, text: str) -> tuple[int, ...]:
    return codec.encode(text)[1:]  # without <s>


def test_end_of_sequence_inside_a_run_ends_the_answer_and_is_no_text(codec: TextCodec) -> None:
    run = (*tokens(codec, "A tree"), EOS, *tokens(codec, " has leaked"))
    step = transcript(codec).commit(run)
    assert step == Step("A tree", run[: run.index(EOS) + 1], FINISH_REASON_STOP)


def test_stop_string_inside_a_run_cuts_text_and_tokens(codec: TextCodec) -> None:
    run = tokens(codec, "one root, many nodes and more leaves")
    step = transcript(codec, stops=(", many",)).commit(run)
    assert step.text == "one root"
    assert step.finish_reason == FINISH_REASON_STOP
    assert len(step.token_ids) < len(run)


def test_text_that_may_become_a_stop_string_is_held_back_until_it_cannot(codec: TextCodec) -> None:
    growing = transcript(codec, stops=("root!",))
    first = growing.commit(tokens(codec, "one root"))
    second = growing.commit(tokens(codec, " grows"))
    assert (first.text, second.text) == ("one ", "root grows")


def test_nothing_ends_the_answer_before_min_tokens(codec: TextCodec) -> None:
    run = tokens(codec, "one root, one root, one root")
    first = len(tokens(codec, "one root"))
    step = transcript(codec, stops=("root",), min_tokens=first).commit(run)
    assert step.text == "one root, one "
    assert step.finish_reason == FINISH_REASON_STOP


def test_logprobs_are_cut_with_the_tokens(codec: TextCodec) -> None:
    run = (*tokens(codec, "A tree"), EOS, *tokens(codec, " has leaked"))
    logprobs = [TokenLogprobs(token_id=token) for token in run]
    step = transcript(codec).commit(run, logprobs)
    assert [each.token_id for each in step.logprobs] == list(step.token_ids)


def test_max_tokens_inside_a_run_cuts_there_and_flushes_what_was_held_back(codec: TextCodec) -> None:
    run = tokens(codec, "one root")
    growing = transcript(codec, max_tokens=len(run), stops=("root!",))
    step = growing.commit((*run, *tokens(codec, " leaked")))
    assert step == Step("one root", run, FINISH_REASON_LENGTH)
    assert growing.num_tokens_left == 0


def test_all_committed_tokens_are_kept_for_a_rebuild(codec: TextCodec) -> None:
    growing = transcript(codec)
    growing.commit((20, 21))
    growing.commit((22,))
    assert growing.token_ids == [5, 6, 7, 20, 21, 22]
    assert growing.num_completion_tokens == 3


def test_counts_by_depth_and_rank_are_of_reached_nodes_only() -> None:
    """Root with three children, its second (node 2) accepted, of whose two children the first (node 5).

    A third child of node 2 was asked for: as it did not come, it was not accepted either. Node 5 was to have none.
    """
    tree = TokenTree(topology=Topology(parents=[-1, 0, 0, 0, 1, 2, 2]), token_ids=[0] * 7)
    report = Report()
    verdict = Verdict(accepted_nodes=[2, 5], bonus_token_id=9)
    response = VerifyResponse(verdict=verdict, worker_seconds=0.0)
    report.verified(response, DraftResponse(tree=tree), topology.Topology((-1, 0, 0, 0, 1, 2, 2, 2)))
    root, second = report.message.counts_by_depth
    assert (list(root.num_offered), list(root.num_accepted)) == ([1, 1, 1], [0, 1])
    assert (list(second.num_offered), list(second.num_accepted)) == ([1, 1, 1], [1])
    [usage] = report.message.trees
    assert (list(usage.topology.parents), usage.num_steps) == ([-1, 0, 0, 0, 1, 2, 2, 2], 1)
    assert usage.num_tokens == 3
    assert (report.message.num_drafted_tokens, report.message.num_accepted_tokens) == (6, 2)


def test_a_root_alone_was_asked_for_more_and_is_no_drafted_step() -> None:
    report = Report()
    tree = TokenTree(topology=Topology(parents=[-1]), token_ids=[0])
    verdict = Verdict(bonus_token_id=9)
    report.verified(VerifyResponse(verdict=verdict), DraftResponse(tree=tree), topology.Topology((-1, 0, 0, 1)))
    [root] = report.message.counts_by_depth
    assert (list(root.num_offered), list(root.num_accepted)) == ([1, 1], [])
    assert (report.message.num_steps, report.message.num_drafted_steps) == (1, 0)
    [usage] = report.message.trees
    assert (list(usage.topology.parents), usage.num_steps, usage.num_tokens) == ([-1, 0, 0, 1], 1, 1)


def test_accepted_nodes_that_continue_the_text_are_counted_apart() -> None:
    report = Report()
    tree = TokenTree(topology=Topology(parents=[-1, 0, 0, 1, 1]), token_ids=[0] * 5)
    response = VerifyResponse(verdict=Verdict(accepted_nodes=[1, 4], bonus_token_id=9))
    shape = topology.Topology((-1, 0, 0, 1, 1))
    report.verified(response, DraftResponse(tree=tree, ngram_nodes=[1, 2, 3]), shape)
    assert (report.message.num_ngram_tokens, report.message.num_accepted_ngram_tokens) == (3, 1)


def test_dynamic_trees_are_told_by_what_was_asked_for_and_say_nothing_about_ranks() -> None:
    shape, report = topology.DynamicShape(8, 3, 2), Report()
    for parents in ([-1, 0, 0, 1], [-1, 0, 1, 1]):
        tree = TokenTree(topology=Topology(parents=parents), token_ids=[0] * 4)
        response = VerifyResponse(verdict=Verdict(accepted_nodes=[1], bonus_token_id=9))
        report.verified(response, DraftResponse(tree=tree), shape)
    [usage] = report.message.trees
    assert (known_shape(usage), usage.num_steps, usage.num_tokens) == (shape, 2, 4)
    assert (report.message.num_drafted_tokens, report.message.num_accepted_tokens) == (6, 2)
    assert not report.message.counts_by_depth


def test_a_step_that_fell_back_is_no_plain_decoding() -> None:
    report = Report()
    for asked in (topology.Topology.chain(3), topology.Topology.root_only()):
        report.host()
        report.verified(VerifyResponse(worker_seconds=0.5), None, asked)
    [usage] = report.message.trees
    assert (list(usage.topology.parents), usage.num_steps) == ([-1], 1)
    assert report.message.num_steps == 2


def test_hits_and_misses_of_drafting_ahead_are_told_by_tree() -> None:
    report, chain = Report(), topology.Topology.chain(2)
    tree = TokenTree(topology=Topology(parents=chain.parents), token_ids=[0, 0])
    for ahead, seconds in ((DRAFT_AHEAD_HIT, 0.25), (DRAFT_AHEAD_MISS, 1.0), (DRAFT_AHEAD_NOT_ATTEMPTED, 1.0)):
        response = DraftResponse(tree=tree, ahead=ahead, worker_seconds=seconds)
        report.host()
        report.drafted(response)
        report.verified(VerifyResponse(verdict=Verdict(bonus_token_id=9)), response, chain)
    [usage] = report.message.trees
    assert (usage.num_steps, usage.num_ahead_hits, usage.num_ahead_misses) == (3, 1, 1)
    assert (usage.stages.draft, usage.hit_draft_seconds) == (2.25, 0.25)


def test_what_the_draft_spent_is_told_apart_from_what_verifying_did() -> None:
    report, chain = Report(), topology.Topology.chain(2)
    tree = TokenTree(topology=Topology(parents=chain.parents), token_ids=[0, 0])
    response = DraftResponse(tree=tree, times=WorkerTimes(forwards=0.5, work=0.125))
    report.host()
    report.drafted(response)
    times = WorkerTimes(forwards=2.0, work=1.0)
    report.verified(VerifyResponse(verdict=Verdict(bonus_token_id=9), times=times), response, chain)
    [usage] = report.message.trees
    assert (usage.stages.forwards, usage.stages.work) == (2.5, 1.125)
    assert (usage.stages.draft_forwards, usage.stages.draft_work) == (0.5, 0.125)
