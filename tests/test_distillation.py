"""Text that a target writes, the student that learns from it, and what training does."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import load_engine
from safetensors.torch import load_file
from tiny_models import write_tiny_model
from transformers import AutoModelForCausalLM

from sequoia.engine.distillation.batches import grouped
from sequoia.engine.distillation.corpus import TEACHER_WIDTH, Document, Shard
from sequoia.engine.distillation.loss import HeadLoss
from sequoia.engine.distillation.ranking import NUM_RANKS, acceptance_of, greedy_documents, ranks_of
from sequoia.engine.distillation.schedule import Schedule
from sequoia.engine.distillation.student import make_student
from sequoia.engine.distillation.training import Training
from sequoia.engine.distillation.writing import Assignment, Lengths, read, write
from sequoia.engine.draft_vocabulary import DraftVocabulary
from sequoia.errors import FailedPrecondition

TURN = (5, 6, 7)
EOS = (1,)
LENGTHS = Lengths(question=6, answer=10)
KNOWN = torch.tensor(sorted({0, 1, *range(20, 280)}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    write_tiny_model(folder, "llama", num_layers=3)
    return folder


@pytest.fixture(scope="module")
def module(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def written(folder: Path, temperature: float, *, turn: tuple[int, ...] = TURN, num_slots: int = 3) -> list[Document]:
    engine = load_engine(folder, num_slots=num_slots, slot_rows=64)
    assignments = [Assignment((0, 40 + number, 50), turn, temperature) for number in range(8)]
    return list(write(engine, assignments, EOS, LENGTHS, np.random.default_rng(3), 400))


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = []
    for number, temperature in enumerate((0.0, 1.0)):
        paths.append(tmp_path_factory.mktemp("corpus") / f"{number}.safetensors")
        Shard.of(written(folder, temperature)).save(paths[-1])
    return paths


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_documents_hold_what_the_target_expects_behind_every_token(folder, module, temperature) -> None:
    for document in written(folder, temperature):
        with torch.no_grad():
            logs = module(document.token_ids[None].long()).logits[0, :-1].log_softmax(-1)
        expected = logs.gather(1, document.teacher_ids.long())
        torch.testing.assert_close(document.teacher_logprobs.float(), expected, atol=5e-3, rtol=1e-3)
        torch.testing.assert_close(expected, logs.topk(TEACHER_WIDTH).values, atol=1e-4, rtol=1e-4)


def test_greedy_answers_are_those_of_generate(folder, module) -> None:
    for document in written(folder, 0.0):
        prompt, answer = document.token_ids[: document.answer_start], document.token_ids[document.answer_start :]
        expected = module.generate(
            prompt[None].long(), max_new_tokens=LENGTHS.answer, do_sample=False, eos_token_id=1, pad_token_id=1
        )
        assert answer.tolist() == expected[0, len(prompt) :].tolist()


def test_a_question_ends_with_the_turn_and_an_answer_at_its_length(folder) -> None:
    documents = written(folder, 1.0)
    assert len(documents) == 8
    for document in documents:
        start = document.answer_start
        assert tuple(document.token_ids[start - len(TURN) : start].tolist()) == TURN
        assert 3 + len(TURN) <= start <= 3 + LENGTHS.question + len(TURN)
        answer = document.token_ids[start:].tolist()
        assert len(answer) == LENGTHS.answer or answer[-1] in EOS


def test_without_a_turn_the_opening_itself_is_continued(folder) -> None:
    for document in written(folder, 1.0, turn=()):
        assert document.answer_start == 3
        assert len(document.token_ids) <= 3 + LENGTHS.answer


def test_documents_do_not_depend_on_the_memory_there_is(folder) -> None:
    few, many = (sorted(written(folder, 0.0, num_slots=slots, turn=()), key=_first) for slots in (2, 8))
    assert [each.token_ids.tolist() for each in few] == [each.token_ids.tolist() for each in many]


def _first(document: Document) -> list[int]:
    return document.token_ids[:3].tolist()


def test_texts_of_others_are_read_as_they_are(folder, module) -> None:
    [document] = read(load_engine(folder), [(0, 33, 44, 55)], 400)
    assert document.token_ids.tolist() == [0, 33, 44, 55]
    with torch.no_grad():
        expected = module(document.token_ids[None].long()).logits[0, :-1].argmax(-1)
    assert document.teacher_ids[:, 0].tolist() == expected.tolist()


def test_a_shard_gives_back_its_documents(shards) -> None:
    shard = Shard.load(shards[1])
    again = Shard.of(list(shard.documents()))
    for name in Shard.__slots__:
        torch.testing.assert_close(getattr(again, name), getattr(shard, name), rtol=0, atol=0)


def test_what_is_expected_is_counted_behind_every_token_but_the_last(shards) -> None:
    shard = Shard.load(shards[0])
    expected = torch.zeros(400)
    for document in shard.documents():
        for ids, logs in zip(document.teacher_ids, document.teacher_logprobs, strict=True):
            expected[ids.long()] += logs.float().exp()
    torch.testing.assert_close(shard.expected(400), expected, rtol=1e-4, atol=1e-4)


def test_groups_hold_every_document_once_within_the_limit(shards) -> None:
    documents = [each for path in shards for each in Shard.load(path).documents()]
    groups = grouped(documents, 64, torch.Generator().manual_seed(2))
    assert sorted(id(each) for group in groups for each in group) == sorted(map(id, documents))
    sizes = [len(group) * max(len(each.token_ids) for each in group) for group in groups]
    assert max(sizes) <= 64
    assert any(len(group) > 1 for group in groups)


def test_the_head_loss_and_its_slopes_are_those_of_autograd() -> None:
    generator = torch.Generator().manual_seed(4)
    hidden, head = (torch.randn(rows, 32, generator=generator).bfloat16().float() for rows in (700, 90))
    ids = torch.stack([torch.randperm(90, generator=generator)[:5] for _ in range(700)])
    p = torch.rand(700, 5, generator=generator) / 5
    weights = torch.rand(700, generator=generator)
    ours = [each.clone().requires_grad_() for each in (hidden, head)]
    theirs = [each.clone().requires_grad_() for each in (hidden, head)]
    found = HeadLoss.apply(*ours, ids, p, weights)
    logs = (theirs[0] @ theirs[1].T).log_softmax(-1)
    expected = -(weights * (p * logs.gather(1, ids)).sum(1)).sum()
    (found * 2).backward()
    (expected * 2).backward()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0.0)
    for our, their in zip(ours, theirs, strict=True):
        assert float((our.grad - their.grad).norm() / their.grad.norm()) < 0.01


@pytest.mark.parametrize("narrow", [False, True], ids=["all tokens", "some tokens"])
def test_ranks_are_those_of_the_students_own_logits(module, shards, narrow) -> None:
    vocabulary = DraftVocabulary(KNOWN, 400) if narrow else None
    student = make_student(module, (0, 2), KNOWN if narrow else None).eval()
    documents = list(Shard.load(shards[0]).documents())
    for document, ranks in zip(documents, ranks_of(student, vocabulary, documents), strict=True):
        ids = document.token_ids[None].long()
        with torch.no_grad():
            logits = student(ids).logits[0]
        if vocabulary:
            logits = vocabulary.widened(logits)
        places = logits.argsort(-1, descending=True)
        first = document.answer_start
        assert len(ranks) == len(document.token_ids) - 1 - first
        for offset, rank in enumerate(ranks):
            at = int((places[first + offset] == document.teacher_ids[first + offset, 0]).nonzero()[0])
            is_near = vocabulary is None or int(document.teacher_ids[first + offset, 0]) in KNOWN
            close = logits[first + offset].topk(NUM_RANKS + 1).values.diff().abs().min() < 0.02  # bfloat16's rounding
            assert close or rank == (at if is_near and at < NUM_RANKS else None)


def test_acceptance_counts_positions_by_rank() -> None:
    assert acceptance_of([[0, 0, None], [1]])[:3] == (0.5, 0.25, 0.0)


def test_only_answers_of_likeliest_tokens_count_as_greedy(shards) -> None:
    assert len(greedy_documents(list(Shard.load(shards[0]).documents()))) == 8
    assert len(greedy_documents(list(Shard.load(shards[1]).documents()))) < 4


def trained(module, shards, vocabulary, num_steps: int = 30) -> Training:
    student = make_student(module, (0,), None if vocabulary is None else vocabulary.token_ids)
    return Training(student, vocabulary, shards, Schedule(num_steps, batch_tokens=96, learning_rate=3e-3, seed=5))


@pytest.mark.parametrize("narrow", [False, True], ids=["all tokens", "some tokens"])
def test_training_brings_the_student_nearer_to_its_target(module, shards, narrow) -> None:
    vocabulary = DraftVocabulary(KNOWN, 400) if narrow else None
    training = trained(module, shards, vocabulary)
    documents = list(Shard.load(shards[0]).documents())
    before = acceptance_of(ranks_of(training.student, vocabulary, documents))[0]
    losses = list(training.steps())
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    assert acceptance_of(ranks_of(training.student, vocabulary, documents))[0] > before


def test_a_resumed_training_takes_the_steps_of_one_that_was_not_interrupted(module, shards, tmp_path) -> None:
    whole = trained(module, shards, None)
    expected = list(whole.steps())
    first = trained(module, shards, None)
    losses = list(islice(first.steps(), 12))
    first.save(tmp_path / "at.safetensors")
    second = trained(module, shards, None)
    second.resume(tmp_path / "at.safetensors")
    assert (second.num_steps_done, second.loss) == (12, pytest.approx(first.loss))
    losses += list(second.steps())
    assert losses == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(second.student.parameters(), whole.student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_matrices_are_moved_by_muon_all_else_by_adamw_and_the_embedding_by_none(module, shards, tmp_path) -> None:
    training = trained(module, shards, DraftVocabulary(KNOWN, 400), num_steps=3)
    before = {name: each.clone() for name, each in training.student.state_dict().items()}
    list(training.steps())
    moved = {name for name, each in training.student.state_dict().items() if not torch.equal(each, before[name])}
    assert moved == set(before) - {"model.embed_tokens.weight"}
    training.save(tmp_path / "at.safetensors")
    kept = load_file(tmp_path / "at.safetensors")
    by_muon = {name.partition(".")[2] for name in kept if name.startswith("momentum_buffer.")}
    by_adamw = {name.partition(".")[2] for name in kept if name.startswith("exp_avg.")}
    assert by_muon == {name for name in moved if name.endswith("proj.weight")}
    assert by_adamw == moved - by_muon
    assert "lm_head.weight" in by_adamw


def test_a_damaged_checkpoint_is_refused_by_name(module, shards, tmp_path) -> None:
    (tmp_path / "at.safetensors").write_bytes(b"nothing")
    with pytest.raises(FailedPrecondition, match=r"at\.safetensors cannot be read"):
        trained(module, shards, None).resume(tmp_path / "at.safetensors")


def test_a_checkpoint_of_another_schedule_is_refused(module, shards, tmp_path) -> None:
    training = trained(module, shards, None, num_steps=2)
    list(training.steps())
    training.save(tmp_path / "at.safetensors")
    with pytest.raises(FailedPrecondition, match="another training"):
        trained(module, shards, None, num_steps=3).resume(tmp_path / "at.safetensors")


@pytest.mark.parametrize("other", ["text", "vocabulary"])
def test_a_checkpoint_of_other_text_or_tokens_is_refused(module, shards, tmp_path, other) -> None:
    vocabulary = DraftVocabulary(KNOWN, 400)
    training = trained(module, shards, vocabulary, num_steps=2)
    list(training.steps())
    training.save(tmp_path / "at.safetensors")
    tokens = vocabulary if other == "text" else DraftVocabulary(KNOWN + 1, 400)
    with pytest.raises(FailedPrecondition, match="another training"):
        trained(module, shards[:1] if other == "text" else shards, tokens, num_steps=2).resume(
            tmp_path / "at.safetensors"
        )


def test_padding_of_the_vocabulary_is_never_written_or_expected(folder) -> None:
    assignments = [Assignment((0, 40 + number, 50), TURN, 1.0) for number in range(4)]
    engine = load_engine(folder, num_slots=3, slot_rows=64)
    documents = [*write(engine, assignments, EOS, LENGTHS, np.random.default_rng(3), 120)]
    documents += read(load_engine(folder), [(0, 33, 44, 55)], 120)
    assert max(int(each.token_ids.max()) for each in documents) < 120
    assert max(int(each.teacher_ids.max()) for each in documents) < 120


def test_a_shard_that_is_none_is_refused_with_its_name(tmp_path) -> None:
    (tmp_path / "0000.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(FailedPrecondition, match=r"0000\.safetensors cannot be read") as raised:
        Shard.load(tmp_path / "0000.safetensors")
    assert raised.value.field == "corpus"


def test_a_student_has_the_chosen_layers(module) -> None:
    student = make_student(module, (0, 2), None)
    for ours, theirs in ((0, 0), (1, 2)):
        mine, target = student.model.layers[ours].state_dict(), module.model.layers[theirs].state_dict()
        assert all(torch.equal(mine[name], target[name]) for name in target)
    assert torch.equal(student.lm_head.weight, module.lm_head.weight)
