"""What the planner has a pair write: the kinds of text that its users ask for, in the form in which they ask."""

from __future__ import annotations

from sequoia.client import Message, Prompt
from sequoia.v1.coordinator_pb2 import DescribePairResponse

# Texts to go on with: all that a model without a chat template can be asked.
TEXTS = (
    "The harbour was quiet that morning. Old Marta untied her boat and",
    "def is_prime(number: int) -> bool:\n    ",
    "Question: Why do leaves change colour in autumn?\nAnswer:",
    "Shopping list for a vegetable soup:\n- 2 onions\n- 3 carrots\n-",
    "Dear Ms Okafor,\n\nThank you for your letter of 3 May. We are pleased to",
    "The theorem follows by induction. For n = 1 the claim holds, since",
)
_QUESTIONS = (
    "Why does bread rise? Explain it to someone who has never baked.",
    "Write a Python function count_words(text) that returns a dictionary with how often each word occurs.",
    "Translate into German: The library closes at six today, but you can return your books in the box at the door.",
    "Write the beginning of a story about a clockmaker whose clocks all stop on the same night.",
    "Summarise in two sentences: The town council met on Tuesday. It decided to repair the old bridge over the Aller, "
    "which has been closed since March, before the new school is begun. The repair is to cost 1.2 million and to "
    "last until October. Two members voted against it, because the school's roof lets in the rain.",
)


def prompts_for(pair: DescribePairResponse) -> tuple[Prompt, ...]:
    """Six: mostly conversations for a target that has a chat template, texts for one that has none."""
    if not pair.has_chat_template:
        return TEXTS
    asked: list[Prompt] = [[Message("user", each)] for each in _QUESTIONS]
    return (asked[0], TEXTS[1], *asked[1:])
