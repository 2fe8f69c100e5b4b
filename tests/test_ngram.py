"""What a session's tokens repeat: the index against a search by brute force."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from draft_worker.ngram import LONGEST, MOST_PLACES, ORDERS, SHORTEST, NgramIndex, Tokens
from sequoia.engine.trie import NOWHERE, Trie


def match_length(tokens: Tokens, position: int) -> int:
    """How many tokens before `position` are the last ones of the text."""
    lengths = [n for n in range(1, min(position, LONGEST) + 1) if tokens[position - n : position] == tokens[-n:]]
    return max(lengths, default=0)


def virtual(tokens: Tokens, position: int, depth: int) -> Tokens:
    """What stands from `position` on, the text going on as if it repeated itself from there."""
    text = list(tokens)
    while len(text) < position + depth:
        text.append(text[len(text) - (len(tokens) - position)])
    return tuple(text[position : position + depth])


def expected(tokens: Tokens, depth: int, size: int) -> dict[Tokens, float]:
    """The weight of every path among its siblings, from all places in the text of that size; {} without a match."""
    lengths = {p: n for p in range(size) if (n := match_length(tokens, p)) >= SHORTEST}
    masses: dict[Tokens, float] = defaultdict(float)
    for position, length in lengths.items():
        for end in range(depth + 1):
            masses[virtual(tokens, position, end)] += 0.25 ** (max(lengths.values()) - length)
    return {path: mass / masses[path[:-1]] for path, mass in masses.items() if path}


def paths(trie: Trie) -> dict[Tokens, int]:
    """Every node but the root by the tokens that lead to it."""
    found: dict[Tokens, int] = {}
    prefixes: list[Tokens] = [()]
    for node in range(1, len(trie.parents)):
        prefixes.append((*prefixes[trie.parents[node]], trie.token_ids[node]))
        found[prefixes[-1]] = node
    return found


@pytest.mark.parametrize("seed", range(40))
def test_trie_holds_what_a_search_finds(seed: int) -> None:
    """Texts so short that no sequence has more places than a trie is made from."""
    source = random.Random(seed)
    text = tuple(source.choices(range(source.choice((2, 3))), k=MOST_PLACES + SHORTEST))
    index, num_matches = NgramIndex(), 0
    for size in range(1, len(text) + 1):
        index.extend(text[:size])
        trie = index.continuations(text[:size], 4, 10**6)
        wanted = expected(text[:size], 4, size)
        assert (trie is None) == (not wanted)
        if trie is not None:
            num_matches += 1
            found = {path: trie.weights[node] for path, node in paths(trie).items()}
            assert found == pytest.approx(wanted)
            assert trie.token_ids[0] == text[size - 1]
    assert num_matches > 2


@pytest.mark.parametrize("seed", range(10))
def test_latest_places_of_the_longest_match_are_found_in_a_long_text(seed: int) -> None:
    text = tuple(random.Random(seed).choices(range(3), k=600))
    index = NgramIndex()
    index.extend(text)
    trie = index.continuations(text, 1, 10**6)
    longest = max(match_length(text, position) for position in range(len(text)))
    assert trie is not None
    assert longest in ORDERS or longest > ORDERS[1], "a match between two orders may have too many places"
    assert trie.lengths[0] == longest
    places = [p for p in range(len(text)) if match_length(text, p) == longest][-MOST_PLACES:]
    assert set(trie.children[0]) >= {text[place] for place in places}


def test_length_grows_along_the_path_up_to_the_longest_that_is_looked_up() -> None:
    index, text = NgramIndex(), (1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3)
    index.extend(text)
    trie = index.continuations(text, 7, 100)
    assert trie is not None
    assert trie.token_ids == (3, 4, 5, 6, 7, 8, 9, 1)
    assert trie.lengths == (3, 4, 5, 6, 7, 8, 8, 8)


def test_a_text_that_repeats_itself_goes_on_repeating_itself() -> None:
    index, text = NgramIndex(), (7, 1, 2, 1, 2, 1, 2)
    index.extend(text)
    trie = index.continuations(text, 5, 100)
    assert trie is not None
    assert trie.find((1, 2, 1, 2, 1)) != NOWHERE
    assert trie.find((2,)) == NOWHERE


def test_a_longer_match_weighs_more_than_a_later_one() -> None:
    index, text = NgramIndex(), (1, 2, 3, 10, 9, 2, 3, 11, 1, 2, 3)
    index.extend(text)
    trie = index.continuations(text, 1, 100)
    assert trie is not None
    assert trie.token_ids == (3, 10, 11)
    assert trie.weights == pytest.approx((1.0, 0.8, 0.2))


def test_tokens_beyond_the_text_are_guessed_at_and_not_remembered() -> None:
    index, text = NgramIndex(), (1, 2, 3, 4, 5, 6)
    index.extend(text)
    guessed = index.continuations((*text, 2, 3), 2, 100)
    assert guessed is not None
    assert guessed.token_ids == (3, 4, 5)
    index.extend((*text, 1, 2))
    found = index.continuations((*text, 1, 2), 2, 100)
    assert found is not None
    assert found.token_ids == (2, 3, 4)


def test_trie_has_no_more_nodes_than_asked_for() -> None:
    text = tuple(random.Random(0).choices(range(3), k=300))
    index = NgramIndex()
    index.extend(text)
    trie = index.continuations(text, 6, 20)
    assert trie is not None
    assert len(trie.parents) == len(trie.token_ids) == len(trie.weights) == len(trie.lengths) == 20
    assert list(trie.parents) == sorted(trie.parents)
