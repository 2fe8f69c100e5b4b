"""The prompts of `sequoia bench`."""

from __future__ import annotations

from sequoia.cli.benchmarks.prompt_set import prompt_set

CATEGORIES = ["code", "prose", "translation", "question answering", "summarisation with copying"]


def test_every_category_has_as_many_prompts_and_they_come_in_turn() -> None:
    categories = [each.category for each in prompt_set()]
    assert categories == CATEGORIES * (len(categories) // len(CATEGORIES))
    assert len(categories) >= 3 * len(CATEGORIES)


def test_a_name_and_a_text_stand_for_one_prompt() -> None:
    prompts = prompt_set()
    assert len({(each.category, each.name) for each in prompts}) == len({each.text for each in prompts}) == len(prompts)
    assert all(each.text == each.text.strip() and len(each.text) > 40 for each in prompts)


def test_fewer_prompts_are_the_first_of_every_category() -> None:
    assert prompt_set(1) == prompt_set()[: len(CATEGORIES)]
